package store

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// TestShare: the newest parts reach both bastions, and what nobody has signed
// reaches none.
func TestShare(t *testing.T) {
	t.Parallel()
	fleet := testfleet.New(t)
	of := func() *bundle.Store {
		path := filepath.Join(t.TempDir(), "bundle")
		must(t, os.WriteFile(path, fleet.Bundle(), 0o600))
		must(t, os.Chmod(filepath.Dir(path), 0o700))
		b, err := bundle.Open(bundle.Options{Path: path})
		must(t, err)
		return b
	}
	a, b := of(), of()
	s := open(t, Options{Dir: folder(t)})
	works(t, s)
	// One store for both will do: only its key counts.
	go s.Share(t.Context(), a)
	c := s.client.Load()
	stored := func() string {
		got, err := c.Get(t.Context(), bundleKey)
		if err != nil || len(got.Kvs) == 0 {
			return ""
		}
		return string(got.Kvs[0].Value)
	}
	eventually(t, "the bundle to be shared", func() bool { return stored() == string(a.Raw()) })
	go s.Share(t.Context(), b)

	newer := fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"mallory"} })
	if changed, err := b.Offer(newer); !changed || err != nil {
		t.Fatal(changed, err)
	}
	eventually(t, "a to have the newer one", func() bool { return a.Current().Hash == b.Current().Hash })

	// A forger's, with the highest version, and an older one change nothing.
	forged := testfleet.New(t)
	evil := forged.Revoke(func(r *bundle.Revocations) { r.Version = 99 })
	for _, bad := range [][]byte{evil, []byte("garbage"), nil} {
		_, err := c.Put(t.Context(), bundleKey, string(bad))
		must(t, err)
	}
	eventually(t, "garbage to be written over", func() bool { return stored() == string(newer) })
	if string(a.Raw()) != string(newer) || string(b.Raw()) != string(newer) {
		t.Error("a bastion took what nobody had signed")
	}
}
