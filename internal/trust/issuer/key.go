// Package issuer signs certificates: OpenSSH ones for people and hosts, X.509
// ones for automation and servers. The key that signs lies in a file or in an
// ssh-agent, which may pass the question on to hardware.
//
// It makes nothing that an agent would refuse, so that a mistake is seen at the
// desk and not in an outage. It must never write a private key that others may
// read, never use one from a file that others may read, and never ask anybody
// over a network. It stands on floor 0.
package issuer

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

// Key is a key that signs, wherever its private half lies.
type Key struct {
	// Where is the file, or "ssh-agent", for messages.
	Where  string
	signer ssh.Signer
	agent  io.Closer
}

// Passphrase returns the passphrase of a key file.
type Passphrase func(file string) ([]byte, error)

// Generate makes an ed25519 key in a new file of OpenSSH's format, with its
// public half in file.pub. It replaces nothing. An empty passphrase leaves the
// key in the clear.
func Generate(file, comment string, passphrase []byte) (*Key, error) {
	for _, f := range []string{file, file + ".pub"} {
		if _, err := os.Lstat(f); !errors.Is(err, fs.ErrNotExist) {
			return nil, fault.New(fault.Refused, "move it away or choose another name; a key that is lost cannot be made again", "%s is there already", f)
		}
	}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		return nil, err
	}
	var block *pem.Block
	if len(passphrase) > 0 {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(private, comment, passphrase)
	} else {
		block, err = ssh.MarshalPrivateKey(private, comment)
	}
	if err != nil {
		return nil, err
	}
	if err := durable.Write(file, pem.EncodeToMemory(block)); err != nil {
		return nil, err
	}
	return &Key{Where: file, signer: signer}, durable.Write(file+".pub", PublicLine(signer.PublicKey(), comment))
}

// Load reads a key from a file of a format that ssh-keygen writes (of PKCS #8
// only one without a passphrase). The file is to be the user's own and nobody else's to read. ask is called for one with a
// passphrase; nil refuses it.
func Load(file string, ask Passphrase) (*Key, error) {
	if err := durable.CheckPrivate(file); err != nil {
		return nil, fault.New(fault.Usage, "name a private key of your own with --signer, or the .pub file of one in the ssh-agent", "key: %w", err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	signer, err := ssh.ParsePrivateKey(data)
	var locked *ssh.PassphraseMissingError
	if errors.As(err, &locked) {
		if ask == nil {
			return nil, fault.New(fault.Usage, "run this on a terminal, or load the key into an ssh-agent: ssh-add "+file, "key %s has a passphrase, and there is nobody to ask", file)
		}
		phrase, aerr := ask(file)
		if aerr != nil {
			return nil, aerr
		}
		signer, err = ssh.ParsePrivateKeyWithPassphrase(data, phrase)
		clear(phrase)
	}
	if err != nil {
		next := "make one with ssh-keygen -t ed25519"
		if strings.Contains(err.Error(), "unsupported key type") {
			next = "write it anew in OpenSSH's own format: ssh-keygen -p -f " + file
		}
		if strings.Contains(err.Error(), "unhandled key type") { // as that of sk- keys, which only name a token
			next = "load it into an ssh-agent, and name its public half: ssh-add " + file + "; --signer " + file + ".pub"
		}
		if strings.Contains(err.Error(), "decryption") || strings.Contains(err.Error(), "password") {
			next = "try again with the right passphrase"
		}
		return nil, fault.New(fault.Usage, next, "key %s cannot be read: %s", file, strings.TrimPrefix(err.Error(), "ssh: "))
	}
	return &Key{Where: file, signer: signer}, nil
}

// FromAgent finds the key in the ssh-agent that listens on the socket, such as
// SSH_AUTH_SOCK names. Close the key when it is no longer needed.
func FromAgent(socket string, public ssh.PublicKey) (*Key, error) {
	if socket == "" {
		return nil, fault.New(fault.Usage, "start one: eval $(ssh-agent); ssh-add KEY", "SSH_AUTH_SOCK names no ssh-agent")
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, fault.New(fault.Unreachable, "start one: eval $(ssh-agent); ssh-add KEY", "the ssh-agent does not answer: %w", err)
	}
	signers, err := agent.NewClient(conn).Signers()
	if err != nil {
		conn.Close()
		return nil, fault.New(fault.Failed, "see what it holds: ssh-add -l", "the ssh-agent does not list its keys: %w", err)
	}
	for _, s := range signers {
		if bytes.Equal(s.PublicKey().Marshal(), public.Marshal()) {
			return &Key{Where: "ssh-agent", signer: known{s, public}, agent: conn}, nil
		}
	}
	conn.Close()
	return nil, fault.New(fault.NotFound, "add it: ssh-add KEY; see what is there: ssh-add -l", "the ssh-agent does not have the key %s", ssh.FingerprintSHA256(public))
}

// known is a signer whose public key is more than bytes, which is all that an
// ssh-agent tells. An agent's signers can all choose the algorithm, which RSA
// needs.
type known struct {
	ssh.Signer
	public ssh.PublicKey
}

func (k known) PublicKey() ssh.PublicKey { return k.public }

func (k known) SignWithAlgorithm(random io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	s, ok := k.Signer.(ssh.AlgorithmSigner)
	if !ok {
		return nil, fmt.Errorf("the ssh-agent's key does not sign by %s", algorithm)
	}
	return s.SignWithAlgorithm(random, data, algorithm)
}

// Close lets go of the ssh-agent, if the key is there.
func (k *Key) Close() error {
	if k == nil || k.agent == nil {
		return nil
	}
	return k.agent.Close()
}

// Public returns the public half.
func (k *Key) Public() ssh.PublicKey { return k.signer.PublicKey() }

// SSH returns the key as a signer of SSH certificates and of SSHSIG.
func (k *Key) SSH() ssh.Signer { return k.signer }

// Crypto returns the key as a signer of X.509. It has to be ed25519: with every
// other type an ssh-agent hashes the message itself, and X.509 has only the hash
// to give.
func (k *Key) Crypto() (crypto.Signer, error) {
	public, ok := CryptoPublic(k.Public()).(ed25519.PublicKey)
	if !ok || k.Public().Type() != ssh.KeyAlgoED25519 {
		return nil, fault.New(fault.Usage, "take an ed25519 key: ssh-keygen -t ed25519", "a key of type %s cannot sign TLS certificates", k.Public().Type())
	}
	return raw{k.signer, public}, nil
}

// CryptoPublic returns the public key without its SSH form, nil where it has no
// other.
func CryptoPublic(key ssh.PublicKey) crypto.PublicKey {
	if c, ok := key.(ssh.CryptoPublicKey); ok {
		return c.CryptoPublicKey()
	}
	return nil
}

// raw takes the bare signature out of an SSH one: for ssh-ed25519 that is plain
// Ed25519 of the message (RFC 8709, section 6).
type raw struct {
	signer ssh.Signer
	public ed25519.PublicKey
}

func (r raw) Public() crypto.PublicKey { return r.public }

func (r raw) Sign(random io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != 0 {
		return nil, errors.New("ed25519 signs messages, not hashes")
	}
	sig, err := r.signer.Sign(random, message)
	if err != nil {
		return nil, err
	}
	if sig.Format != ssh.KeyAlgoED25519 || len(sig.Blob) != ed25519.SignatureSize {
		return nil, fmt.Errorf("the signature is of type %q, not ed25519", sig.Format)
	}
	return sig.Blob, nil
}

// PublicLine returns a key or certificate as a line of a .pub file.
func PublicLine(key ssh.PublicKey, comment string) []byte {
	line := strings.TrimSuffix(string(ssh.MarshalAuthorizedKey(key)), "\n")
	if comment != "" {
		line += " " + comment
	}
	return []byte(line + "\n")
}

// ReadPublic reads the one key or certificate of a .pub file and its comment.
func ReadPublic(file string) (ssh.PublicKey, string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, "", fault.New(fault.Usage, "name a file such as ssh-keygen writes beside a key: NAME.pub", "public key: %w", err)
	}
	key, comment, options, rest, err := ssh.ParseAuthorizedKey(data)
	if err != nil || len(options) > 0 || len(bytes.TrimSpace(rest)) > 0 {
		return nil, "", fault.New(fault.Usage, "name a file such as ssh-keygen writes beside a key: NAME.pub", "%s is no file of one public key", file)
	}
	return key, comment, nil
}
