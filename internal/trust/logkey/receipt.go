package logkey

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/mod/sumdb/note"
)

// MaxReceipt bounds a receipt in bytes.
const MaxReceipt = 1 << 10

const receiptHeading = "halligan event held 1"

// receipt is what is signed for an event that another log could not take. It
// cannot be taken for a checkpoint, nor what is signed under one for it: that
// begins with another line.
func receipt(server, id string, event []byte) string {
	sum := sha256.Sum256(event)
	return fmt.Sprintf("%s\n%s\n%s\n%s\n", receiptHeading, server, id, base64.StdEncoding.EncodeToString(sum[:]))
}

// SignReceipt says, as a signed note by the server's witness key, that the server
// has made the event durable.
func SignReceipt(server string, key ed25519.PrivateKey, id string, event []byte) ([]byte, error) {
	if id == "" || strings.ContainsAny(id, "\r\n") {
		return nil, errors.New("a receipt for an event without an ID")
	}
	name := WitnessName(server)
	vkey, err := VKey(name, key.Public().(ed25519.PublicKey))
	if err != nil {
		return nil, err
	}
	// PRIVATE+KEY+NAME+HASH+SEED is how the library takes a signer.
	hash := strings.Split(vkey, "+")[1]
	signer, err := note.NewSigner("PRIVATE+KEY+" + name + "+" + hash + "+" + base64.StdEncoding.EncodeToString(append([]byte{1}, key.Seed()...)))
	if err != nil {
		return nil, err
	}
	return note.Sign(&note.Note{Text: receipt(server, id, event)}, signer)
}

// VerifyReceipt checks that the server, whose witness key that is, has signed that
// it holds the event.
func VerifyReceipt(signed []byte, server string, key ed25519.PublicKey, id string, event []byte) error {
	if len(signed) > MaxReceipt {
		return fmt.Errorf("the receipt of %s is longer than %d bytes", server, MaxReceipt)
	}
	v, err := Verifier(WitnessName(server), key)
	if err != nil {
		return err
	}
	n, err := note.Open(signed, note.VerifierList(v))
	if err != nil {
		return fmt.Errorf("the receipt of %s: %w", server, err)
	}
	if n.Text != receipt(server, id, event) {
		return fmt.Errorf("the receipt of %s is for another event", server)
	}
	return nil
}
