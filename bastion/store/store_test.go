package store

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

func TestMain(m *testing.M) {
	Child()
	os.Exit(m.Run())
}

// open returns a store that ends with the test.
func open(t *testing.T, o Options) *Store {
	t.Helper()
	if o.Bastion == "" {
		o.Bastion = "a"
	}
	o.Log = zerolog.New(zerolog.NewTestWriter(t))
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// eventually waits for what happens by itself.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for began := time.Now(); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > 30*time.Second {
			t.Fatal("waited too long for " + what)
		}
	}
}

func works(t *testing.T, s *Store) {
	t.Helper()
	eventually(t, "the store", func() bool { return s.Degraded() == "" })
}

func TestEmbedded(t *testing.T) {
	s := open(t, Options{Dir: filepath.Join(t.TempDir(), "store")})
	began := time.Now()
	works(t, s)
	t.Log("ready after", time.Since(began))
}
