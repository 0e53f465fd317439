package cli

import (
	"testing"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// TestForksMeet: bundles of equal versions are exchanged where their bytes
// differ, since nothing else would raise the alarm.
func TestForksMeet(t *testing.T) {
	file, err := bundle.Parse(testfleet.New(t).Bundle())
	if err != nil {
		t.Fatal(err)
	}
	mine, err := bundle.Verify(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		revocations uint64
		hash        string
		same        bool
	}{{1, mine.Hash, true}, {1, "", true}, {1, "another", false}, {2, mine.Hash, false}} {
		theirs := &halliganv1.BundleStatus{PolicyVersion: 1, InventoryVersion: 1, RevocationsVersion: c.revocations, Hash: c.hash}
		if got := sameBundle(theirs, mine); got != c.same {
			t.Errorf("%v: %v", theirs, got)
		}
	}
}
