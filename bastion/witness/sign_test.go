package witness

import (
	"crypto/ed25519"
	"encoding/base64"
	"strings"
	"testing"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// signedHead is a checkpoint of that many entries, which there need not be.
func signedHead(t *testing.T, key ed25519.PrivateKey, origin string, n int64) []byte {
	t.Helper()
	tree := logkey.Tree(origin, "00ff00ff", 1)
	vkey, err := logkey.VKey(tree, key.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner("PRIVATE+KEY+" + tree + "+" + strings.Split(vkey, "+")[1] + "+" + base64.StdEncoding.EncodeToString(append([]byte{1}, key.Seed()...)))
	if err != nil {
		t.Fatal(err)
	}
	signed, err := note.Sign(&note.Note{Text: torchwood.Checkpoint{Origin: tree, Tree: tlog.Tree{N: n}}.String()}, signer)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// countersigned adds a countersignature to a checkpoint.
func countersigned(t *testing.T, key ed25519.PrivateKey, by string, checkpoint []byte) []byte {
	t.Helper()
	text, sigs, _ := strings.Cut(string(checkpoint), "\n\n")
	signer, err := torchwood.NewCosignatureSigner(logkey.WitnessName(by), key)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := note.Sign(&note.Note{Text: text + "\n"}, signer)
	if err != nil {
		t.Fatal(err)
	}
	return append(signed, sigs...)
}
