package testfleet

import (
	"testing"

	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// TestFleet: what it makes verifies, and goes on from what it made before.
func TestFleet(t *testing.T) {
	f := New(t)
	anchor, err := bundle.NewAnchor([]string{f.RootLine()}, 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{f.Bundle(), f.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"mallory"} }), f.Policy(func(*bundle.Policy) {})} {
		file, err := bundle.Parse(data)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := bundle.Verify(file, anchor); err != nil {
			t.Fatal(err)
		}
	}
}
