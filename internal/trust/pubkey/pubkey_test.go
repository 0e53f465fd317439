package pubkey_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"math/big"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/trust/pubkey"
)

// sized is an RSA key of so many bits that opens nothing.
func sized(bits uint) *rsa.PublicKey {
	n := new(big.Int).Lsh(big.NewInt(1), bits-1)
	return &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: 65537}
}

func public(t *testing.T, key any) ssh.PublicKey {
	t.Helper()
	k, err := ssh.NewPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// called is a key of another type.
type called struct {
	ssh.PublicKey
	name string
}

func (c called) Type() string { return c.name }

func TestCheck(t *testing.T) {
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sk, err := ssh.ParsePublicKey(ssh.Marshal(struct {
		Name        string
		Key         []byte
		Application string
	}{ssh.KeyAlgoSKED25519, ed, "ssh:"}))
	if err != nil {
		t.Fatal(err)
	}
	plain := public(t, ed)
	old := called{plain, "ssh-dss"}
	for name, c := range map[string]struct {
		key      ssh.PublicKey
		refused  string
		security bool
	}{
		"ed25519": {key: plain}, "ecdsa": {key: public(t, ec.Public())}, "sk": {key: sk, security: true},
		"rsa, least": {key: public(t, sized(pubkey.MinRSA))}, "rsa, most": {key: public(t, sized(pubkey.MaxRSA))},
		"rsa, below": {key: public(t, sized(pubkey.MinRSA-1)), refused: "3071 bits"}, "rsa, above": {key: public(t, sized(pubkey.MaxRSA+1)), refused: "8193 bits"},
		"dsa": {key: old, refused: "ssh-dss"}, "certificate": {key: &ssh.Certificate{Key: plain}, refused: "not accepted"}, "nothing": {refused: "no key"},
	} {
		err := pubkey.Check(c.key)
		if (err == nil) != (c.refused == "") || err != nil && !strings.Contains(err.Error(), c.refused) {
			t.Errorf("%s: %v, want %q", name, err, c.refused)
		}
		if pubkey.Security(c.key) != c.security {
			t.Errorf("%s: a FIDO2 key: %v", name, !c.security)
		}
	}
	for _, weak := range []string{ssh.KeyAlgoRSA, "ssh-dss", ""} {
		if pubkey.Signature(weak) || slices.Contains(pubkey.Algorithms(), weak) {
			t.Errorf("signatures with %q are accepted", weak)
		}
	}
	if pubkey.CheckType(ssh.KeyAlgoRSASHA256) == nil {
		t.Error("an algorithm passes for the type of a key")
	}
}
