package bundle

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"
)

const (
	maxSignatures    = 64       // in one entry
	maxSignatureText = 64 << 10 // bytes of one entry
)

// Sign returns an armored SSHSIG signature over the bytes (hash sha512). The
// signer may come from a key file or from an ssh-agent; a FIDO key waits for its
// touch. Of a certificate its key signs. Signatures of several signers are put
// one after the other.
func Sign(part []byte, namespace string, signer ssh.Signer) ([]byte, error) {
	sig, err := sshsig.Sign(bytes.NewReader(part), plainSigner{signer}, sshsig.HashSHA512, namespace)
	if err != nil {
		return nil, fmt.Errorf("signing with %s: %w", ssh.FingerprintSHA256(signer.PublicKey()), err)
	}
	armored := sshsig.Armor(sig)
	// An agent that signs for another key, or without a touch, is noticed here
	// and not at every node of the fleet.
	if _, err := VerifySignature(part, namespace, armored); err != nil {
		return nil, fmt.Errorf("the signature just made with %s: %w", ssh.FingerprintSHA256(signer.PublicKey()), err)
	}
	return armored, nil
}

// plainSigner signs as the key of a certificate, not as the certificate. What
// an agent calls its keys is read anew, since it does not tell the two apart.
type plainSigner struct{ ssh.Signer }

func (s plainSigner) PublicKey() ssh.PublicKey {
	pub, err := ssh.ParsePublicKey(s.Signer.PublicKey().Marshal())
	if err != nil {
		return s.Signer.PublicKey()
	}
	if c, ok := pub.(*ssh.Certificate); ok {
		return c.Key
	}
	return pub
}

// SignWithAlgorithm is what RSA keys need, which have several.
func (s plainSigner) SignWithAlgorithm(random io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	if a, ok := s.Signer.(ssh.AlgorithmSigner); ok {
		return a.SignWithAlgorithm(random, data, algorithm)
	}
	return nil, fmt.Errorf("this signer cannot choose %s", algorithm)
}

// VerifySignature checks one armored signature over the bytes, in the
// namespace, and returns the key that made it. Whether that key is one that
// counts is the caller's question. Certificates are refused, and FIDO keys
// without the user's presence.
func VerifySignature(message []byte, namespace string, armored []byte) (ssh.PublicKey, error) {
	list, err := parseSignatures(armored)
	if err != nil {
		return nil, err
	}
	if len(list) != 1 {
		return nil, fmt.Errorf("%d signatures, want one", len(list))
	}
	return list[0].PublicKey, verify(message, namespace, list[0])
}

// verify checks one signature. x/crypto refuses a FIDO signature whose flag of
// user presence is not set, for keys that come without options as these do; a
// test holds it.
func verify(message []byte, namespace string, sig *sshsig.Signature) error {
	return sshsig.Verify(bytes.NewReader(message), sig, sig.PublicKey, sshsig.HashSHA512, namespace)
}

// parseSignatures reads armored signatures and nothing between them.
func parseSignatures(armored []byte) (list []*sshsig.Signature, err error) {
	if len(armored) > maxSignatureText {
		return nil, fmt.Errorf("more than %d bytes", maxSignatureText)
	}
	for rest := bytes.TrimSpace(armored); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var b *pem.Block
		if bytes.HasPrefix(rest, []byte("-----BEGIN "+sshsig.PEMType+"-----")) {
			b, rest = pem.Decode(rest)
		}
		if b == nil || b.Type != sshsig.PEMType || len(b.Headers) > 0 {
			return nil, errors.New("want armored blocks SSH SIGNATURE and nothing else")
		}
		sig, err := sshsig.ParseSignature(b.Bytes)
		if err != nil {
			return nil, err
		}
		if _, ok := sig.PublicKey.(*ssh.Certificate); ok {
			return nil, errors.New("signed with a certificate; sign with the key itself")
		}
		if sig.HashAlgorithm != sshsig.HashSHA512 {
			return nil, fmt.Errorf("hash %.16q, want sha512", sig.HashAlgorithm)
		}
		if list = append(list, sig); len(list) > maxSignatures {
			return nil, fmt.Errorf("more than %d signatures", maxSignatures)
		}
	}
	if len(list) == 0 {
		return nil, errors.New("none")
	}
	return list, nil
}

// SignedBy returns the keys that have signed the part, in the order of their
// signatures; nil stands for one that does not verify. Whether a key counts is
// not asked.
func (h *Header) SignedBy() []ssh.PublicKey {
	keys := make([]ssh.PublicKey, len(h.signatures))
	for i, sig := range h.signatures {
		if verify(h.bytes, Namespace(h.Part), sig) == nil {
			keys[i] = sig.PublicKey
		}
	}
	return keys
}

// signers counts which of the keys have signed the part, each once. A key of
// them whose signature does not verify is an error.
func (h *Header) signers(keys []Key) (int, error) {
	by := map[string]bool{}
	for _, sig := range h.signatures {
		for _, k := range keys {
			if !bytes.Equal(k.Marshal(), sig.PublicKey.Marshal()) {
				continue
			}
			if err := verify(h.bytes, Namespace(h.Part), sig); err != nil {
				return 0, fmt.Errorf("%s %d was changed after %s signed it, or the signature is not for it: %w", h.Part, h.Version, k, err)
			}
			by[identity(k)] = true
		}
	}
	return len(by), nil
}
