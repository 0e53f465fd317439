// Package pubkey says which public keys and signatures are good enough, for
// people, servers and authorities, at a login, in a certificate and in the
// bundle: one rule, so that nothing is signed that is refused elsewhere.
//
// It must never know whose a key is. It stands on floor 0.
package pubkey

import (
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
)

// The size of RSA keys in bits: the least is what NIST SP 800-57 asks for beyond
// 2030, the most bounds the work that a stranger's key can cause.
const MinRSA, MaxRSA = 3072, 8192

// algorithms are those of signatures, which but for RSA are the types of keys.
var algorithms = []string{
	ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256,
	ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
	ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256,
}

// Algorithms returns the SSH signature algorithms that are accepted, best first:
// no SHA-1, no DSA.
func Algorithms() []string { return slices.Clone(algorithms) }

// Signature reports whether the algorithm of a signature is accepted.
func Signature(algorithm string) bool { return slices.Contains(algorithms, algorithm) }

// CheckType refuses types of keys that are not in use here. Certificates are not
// keys.
func CheckType(name string) error {
	if name == ssh.KeyAlgoRSA || Signature(name) && !strings.HasPrefix(name, "rsa-") {
		return nil
	}
	return fmt.Errorf("keys of type %.48q are not accepted; ed25519, ecdsa, the sk- forms of both and rsa are", name)
}

// Check refuses keys that are too weak, or of a type that is not in use here.
func Check(key ssh.PublicKey) error {
	if key == nil {
		return errors.New("no key")
	}
	if err := CheckType(key.Type()); err != nil || key.Type() != ssh.KeyAlgoRSA {
		return err
	}
	if c, ok := key.(ssh.CryptoPublicKey); ok {
		if k, ok := c.CryptoPublicKey().(*rsa.PublicKey); ok {
			return CheckRSA(k)
		}
	}
	return errors.New("an RSA key of unknown size")
}

// CheckRSA refuses RSA keys by their size.
func CheckRSA(key *rsa.PublicKey) error {
	if bits := key.N.BitLen(); bits < MinRSA || bits > MaxRSA {
		return fmt.Errorf("an RSA key of %d bits; %d to %d are accepted", bits, MinRSA, MaxRSA)
	}
	return nil
}

// Security reports whether the key is a FIDO2 one.
func Security(key ssh.PublicKey) bool {
	return key != nil && (key.Type() == ssh.KeyAlgoSKED25519 || key.Type() == ssh.KeyAlgoSKECDSA256)
}
