package etcdcluster

import (
	"context"
	"errors"
	"syscall"
	"testing"
)

// startTries bounds how often ForTest chooses ports anew.
const startTries = 5

// ForTest starts a cluster on free ports in a folder of its own, without fsync,
// and stops it when the test ends.
func ForTest(t testing.TB, members int, opt ...func(*Options)) *Cluster {
	t.Helper()
	for try := 1; ; try++ {
		o := Options{Dir: t.TempDir(), Members: make([]Member, members), UnsafeNoFsync: true}
		for _, f := range opt {
			f(&o)
		}
		c, err := Start(context.Background(), o)
		if err == nil {
			t.Cleanup(func() { c.Close() })
			return c
		}
		if !errors.Is(err, syscall.EADDRINUSE) || try == startTries {
			t.Fatal(err)
		}
	}
}
