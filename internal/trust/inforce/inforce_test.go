package inforce_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/inforce"
	"github.com/halligan-io/halligan/internal/trust/issuer"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// world is a daemon's trust, and what it tells.
type world struct {
	*inforce.Trust
	fleet *testfleet.Fleet
	clock *trust.Clock
	file  string

	mu    sync.Mutex // guards heard
	heard []alarm.Event
	// faulty makes hearing of trouble with the bundle panic.
	faulty bool
}

func newWorld(t *testing.T, state string) *world {
	w := &world{fleet: testfleet.New(t), clock: trust.NewClock(time.Time{})}
	w.file = filepath.Join(t.TempDir(), "bundle")
	w.Trust = inforce.New(inforce.Options{Daemon: "agent", Server: testfleet.Server, Path: w.file, State: state, Anchor: &bundle.Anchor{}, Clock: w.clock,
		Credential: credential.Options{Cluster: testfleet.Cluster, Node: testfleet.Node}, Log: zerolog.Nop(), Raise: func(e alarm.Event) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.heard = append(w.heard, e)
			if w.faulty && e.Kind == alarm.Bundle {
				panic("faulty")
			}
		}})
	return w
}

func (w *world) open(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(w.file, w.fleet.Bundle(), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.Open(); err != nil {
		t.Fatal(err)
	}
}

func (w *world) warnings() string {
	return strings.Join(w.BundleWarnings("nobody comes in", "have it signed anew"), "\n")
}

// TestLater: a daemon without a bundle knows nobody, says so, and goes on once
// there is one.
func TestLater(t *testing.T) {
	w := newWorld(t, filepath.Join(t.TempDir(), "trust", "bundle"))
	if err := w.Open(); err == nil {
		t.Fatal("opened without a bundle")
	}
	if w.Current() != nil || w.Authority() != nil || w.Store() != nil || w.Raw() != nil {
		t.Error("somebody is believed without a bundle")
	}
	if _, err := w.Offer(w.fleet.Bundle()); !fault.Is(err, fault.Refused) {
		t.Errorf("an offer before the first bundle: %v", err)
	}
	if got := w.warnings(); !strings.Contains(got, "nobody comes in") {
		t.Error(got)
	}
	w.open(t)
	if w.Current() == nil || w.Authority() == nil || w.warnings() != "" {
		t.Error(w.warnings())
	}
	old := w.Raw()
	next := w.fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"mallory"} })
	if changed, err := w.Offer(next); !changed || err != nil {
		t.Errorf("a newer bundle: %v, %v", changed, err)
	}
	if changed, err := w.Offer(old); changed || err != nil {
		t.Errorf("an older bundle: %v, %v", changed, err)
	}
	if _, err := w.Offer([]byte("not one")); err == nil {
		t.Error("what is no bundle is taken")
	}
}

// TestTrouble: what is wrong is told, and forgotten when another bundle comes; a
// state folder that cannot be used keeps nobody out.
func TestTrouble(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "state")
	if err := os.WriteFile(folder, nil, 0o600); err != nil { // a file where a folder belongs
		t.Fatal(err)
	}
	w := newWorld(t, filepath.Join(folder, "bundle"))
	w.open(t)
	if w.Authority() == nil || !strings.HasPrefix(w.warnings(), "the bundle: ") || len(w.heard) != 1 || w.heard[0].Kind != alarm.Bundle {
		t.Errorf("warnings %q, alarms %v", w.warnings(), w.heard)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	watching.Go(func() { w.Watch(ctx) })
	defer watching.Wait()
	defer cancel()
	next := w.fleet.Revoke(func(*bundle.Revocations) {})
	for began := time.Now(); w.warnings() != ""; time.Sleep(10 * time.Millisecond) {
		if _, err := w.Offer(next); err != nil || time.Since(began) > 20*time.Second {
			t.Fatal(w.warnings(), err)
		}
	}
	if signed := w.Current().Signed(); w.clock.Now().Before(signed) {
		t.Errorf("it is %v, before the bundle of %v", w.clock.Now(), signed)
	}
}

// TestPanic: a fault ends neither the daemon nor its following of the bundle.
func TestPanic(t *testing.T) {
	w := newWorld(t, "")
	w.open(t)
	w.mu.Lock()
	w.faulty = true
	w.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	watching.Go(func() { w.Watch(ctx) })
	defer watching.Wait()
	defer cancel()
	replace := func(data []byte) {
		t.Helper()
		if err := os.WriteFile(w.file+".new", data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(w.file+".new", w.file); err != nil {
			t.Fatal(err)
		}
	}
	until := func(what string, done func() bool) {
		t.Helper()
		for began := time.Now(); !done(); time.Sleep(10 * time.Millisecond) {
			if time.Since(began) > 20*time.Second {
				t.Fatal(what)
			}
		}
	}
	replace([]byte("no bundle"))
	until("no alarm of the fault", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return slices.ContainsFunc(w.heard, func(e alarm.Event) bool { return e.Kind == alarm.Panic })
	})
	next := w.fleet.Revoke(func(*bundle.Revocations) {})
	replace(next)
	until("the next bundle is not taken over", func() bool { return bytes.Equal(w.Raw(), next) })
}

// TestShown: a daemon says itself what clients would refuse.
func TestShown(t *testing.T) {
	w := newWorld(t, "")
	w.open(t)
	other := testfleet.New(t)
	long := issuer.Validity{NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(30 * 24 * time.Hour)}
	pair := func(f *testfleet.Fleet, name string, v issuer.Validity) *tls.Certificate {
		cert, err := tls.LoadX509KeyPair(f.ServerFiles(name, v))
		if err != nil {
			t.Fatal(err)
		}
		return &cert
	}
	key, _ := w.fleet.Person(testfleet.Holder("ada", trust.Observer), testfleet.Now())
	host := func(f *testfleet.Fleet, name string, v issuer.Validity) *ssh.Certificate {
		cert, err := f.Host.Host(key.PublicKey(), name, 7, v)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	endless := host(w.fleet, testfleet.Server, long)
	endless.ValidBefore = ssh.CertTimeInfinity
	for name, c := range map[string]struct {
		got  []string
		want string
	}{
		"TLS, good":           {w.ServerWarnings(pair(w.fleet, testfleet.Server, long)), ""},
		"TLS, soon over":      {w.ServerWarnings(pair(w.fleet, testfleet.Server, testfleet.Now())), "gRPC certificate ends in"},
		"TLS, another CA":     {w.ServerWarnings(pair(other, testfleet.Server, long)), "clients refuse the agent's gRPC certificate"},
		"TLS, another server": {w.ServerWarnings(pair(w.fleet, "cp-2.prod", long)), "clients refuse the agent's gRPC certificate"},
		"SSH, good":           {w.HostWarnings(host(w.fleet, testfleet.Server, long)), ""},
		"SSH, soon over":      {w.HostWarnings(host(w.fleet, testfleet.Server, testfleet.Now())), "SSH host certificate ends in"},
		"SSH, another CA":     {w.HostWarnings(host(other, testfleet.Server, long)), "clients refuse the agent's SSH host certificate"},
		"SSH, another server": {w.HostWarnings(host(w.fleet, "cp-2.prod", long)), "clients refuse the agent's SSH host certificate"},
		"SSH, endless":        {w.HostWarnings(endless), "clients refuse the agent's SSH host certificate"},
	} {
		if got := strings.Join(c.got, "\n"); (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
