package record

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/logkey"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// private returns a new private folder.
func private(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func open(t *testing.T, o Options) *Evidence {
	t.Helper()
	if o.StateDir == "" {
		o.StateDir = private(t)
	}
	o.Origin, o.Log = testfleet.Server, zerolog.Nop()
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Raise == nil {
		o.Raise = func(alarm.Event) {}
	}
	e, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// kinds returns the kinds of all events under the signed checkpoint.
func kinds(t *testing.T, e *Evidence) (all []string) {
	t.Helper()
	for _, h := range e.Heads() {
		for data, err := range e.Entries(t.Context(), h.Lineage, h.Generation, 0, h.Size) {
			var event audit.Event
			if err == nil {
				err = json.Unmarshal(data, &event)
			}
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, string(event.Kind))
		}
	}
	return all
}

// TestStartAndStop: a process begins and ends with an event, alarms go to people and,
// where they are nothing else's, into the log.
func TestStartAndStop(t *testing.T) {
	dir := private(t)
	var raised atomic.Int32
	o := Options{StateDir: dir, Raise: func(alarm.Event) { raised.Add(1) }}
	e := open(t, o)
	e.Login(alice)(nil)
	e.Raise(alarm.Event{Kind: alarm.Clock, Text: "x"})
	e.Raise(alarm.Event{Kind: alarm.Login, Person: "alice"})
	e.Close()
	if n := raised.Load(); n != 2 {
		t.Errorf("%d alarms were raised", n)
	}
	e = open(t, o)
	defer e.Close()
	if got := strings.Join(kinds(t, e), " "); got != "start login logout alarm stop" {
		t.Errorf("the log of the process before: %s", got)
	}
	if last := e.LastTime(); time.Since(last) > time.Minute {
		t.Errorf("the last event is of %v", last)
	}
	if s := e.Status(); s.GetEvents() < 5 || s.GetReserve() < 1000 || s.GetRefused() != "" || s.GetVkey() == "" {
		t.Errorf("%v", s)
	}
}

// TestIdentity: the host's key vouches for the keys of the evidence, and again when
// its certificate is renewed.
func TestIdentity(t *testing.T) {
	fleet := testfleet.New(t)
	file := filepath.Join(fleet.Dir, "bundle")
	if err := os.WriteFile(file, fleet.Policy(func(*bundle.Policy) {}), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := bundle.Open(bundle.Options{Path: file})
	if err != nil {
		t.Fatal(err)
	}
	key, _ := fleet.Person(testfleet.Holder("host", 1), testfleet.Now()) // any Ed25519 key
	certified := func(serial uint64) gossh.Signer {
		cert, err := fleet.Host.Host(key.PublicKey(), testfleet.Server, serial, testfleet.Now())
		if err != nil {
			t.Fatal(err)
		}
		signer, err := gossh.NewCertSigner(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return signer
	}
	e := open(t, Options{})
	defer e.Close()
	if e.Identity() != nil {
		t.Error("a statement without a host's key")
	}
	host := certified(1)
	e.Certified(func() []gossh.Signer { return []gossh.Signer{host} }, nil, "")
	first := e.Identity()
	s, err := logkey.Verify(first, b.Current(), time.Now())
	if err != nil || s.Server != testfleet.Server || !s.Log.Equal(e.Key()) {
		t.Errorf("%+v, %v", s, err)
	}
	if again := e.Identity(); !bytes.Equal(again, first) {
		t.Error("a statement is made anew without need")
	}
	host = certified(2)
	second := e.Identity()
	if bytes.Equal(second, first) {
		t.Error("the statement is of the certificate before")
	}
	if on, err := os.ReadFile(filepath.Join(e.Dir(), "identity")); err != nil || !bytes.Equal(on, second) {
		t.Errorf("on disk: %q, %v", on, err)
	}
	// Of a log whose key could not be read at first.
	other := open(t, Options{})
	defer other.Close()
	e.Ledger, other.Ledger = other.Ledger, e.Ledger
	if s, err := logkey.Verify(e.Identity(), b.Current(), time.Now()); err != nil || !s.Log.Equal(e.Key()) {
		t.Errorf("the statement has another key than the log: %v", err)
	}
}

// TestWarnings: what is wrong with the evidence is told, and a tail that nobody
// countersigned after a minute.
func TestWarnings(t *testing.T) {
	bastions := 0
	e := open(t, Options{Witnesses: func() int { return bastions }})
	defer e.Close()
	now := time.Now()
	state := audit.State{Events: 5, Signed: 5}
	want := func(name, text string) {
		t.Helper()
		if got := strings.Join(e.warnings(state, now), "\n"); got != text && (text == "" || !strings.Contains(got, text)) {
			t.Errorf("%s: %q, want %q", name, got, text)
		}
	}
	want("nothing is wrong", "")
	now = now.Add(2 * time.Minute)
	want("nobody is there to countersign", "")
	bastions = 2
	want("nobody did", "no bastion has countersigned the evidence for 2m0s: nobody else has its last 5 events")
	state.Witnessed = map[string]uint64{"a": 5}
	want("one did", "")
	state.Events, state.Signed = 9, 9
	now = now.Add(30 * time.Second)
	want("some are new", "")
	now = now.Add(70 * time.Second)
	want("they stay", "its last 4 events")
	state.Witnessed["a"] = 9
	want("they are taken", "")
	state.Refused, state.Problem, state.Lost = "the disk is full", "slow", 3
	want("refused", "nothing can be changed, since nothing can be recorded: the disk is full")
	want("a problem", "the evidence log: slow")
	want("lost", "3 events that nobody waited for")
}

func TestConfig(t *testing.T) {
	for _, c := range []struct {
		config Config
		bad    string
	}{
		{Config{}, ""},
		{Config{MaxBytes: 256 << 20, GenerationBytes: 32 << 20, ReserveBytes: 8 << 20, Recordings: RecordingsConfig{MaxBytes: 1 << 30, Input: true}}, ""},
		{Config{MaxBytes: 1 << 20}, "audit.maxBytes"},
		{Config{MaxBytes: 64 << 20, GenerationBytes: 32 << 20}, "audit.maxBytes"},
		{Config{GenerationBytes: 5}, "audit.generationBytes"},
		{Config{ReserveBytes: -1}, "audit.reserveBytes"},
		{Config{Recordings: RecordingsConfig{MaxBytes: 7}}, "audit.recordings.maxBytes"},
	} {
		if err := c.config.Check(); (err == nil) != (c.bad == "") || err != nil && !strings.Contains(err.Error(), c.bad) {
			t.Errorf("%+v: %v, want %q", c.config, err, c.bad)
		}
	}
}
