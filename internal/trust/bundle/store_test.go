package bundle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/halligan-io/halligan/internal/fault"
)

// heard keeps what a store tells.
type heard struct {
	mu     sync.Mutex
	alarms []string
}

func (h *heard) alarm(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.alarms = append(h.alarms, err.Error())
}

// take returns the alarms since it was last called.
func (h *heard) take() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	defer func() { h.alarms = nil }()
	return h.alarms
}

// place is a machine: a folder for the copy by hand and one of the store's.
type place struct {
	path, state string
	heard       heard
}

func newPlace(t *testing.T) *place {
	t.Helper()
	dir := t.TempDir()
	p := &place{path: filepath.Join(dir, "etc", "bundle"), state: filepath.Join(dir, "state", "bundle")}
	if err := os.Mkdir(filepath.Dir(p.path), 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *place) options() Options {
	now := func() time.Time { return day.Add(time.Hour) }
	return Options{Path: p.path, State: p.state, Now: now, Wall: now, Alarm: p.heard.alarm}
}

func (p *place) copy(t *testing.T, data []byte) {
	t.Helper()
	if err := errors.Join(os.WriteFile(p.path, data, 0o644), os.Chmod(p.path, 0o644)); err != nil {
		t.Fatal(err)
	}
}

func (p *place) open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(p.options())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// grown returns the fleet's next revocations, signed an hour later.
func (f *fleet) grown(keyID string) []byte {
	f.t.Helper()
	next(&f.rev.Header, f.encode(f.rev))
	f.rev.KeyIDs = append(f.rev.KeyIDs, keyID)
	return f.revocations("delegate")
}

func TestStore(t *testing.T) {
	f, p := newFleet(t), newPlace(t)
	if _, err := Open(p.options()); !errors.Is(err, fs.ErrNotExist) || !fault.Is(err, fault.Usage) {
		t.Error("without any bundle:", err)
	}
	first := f.file()
	p.copy(t, first)
	s := p.open(t)
	if !bytes.Equal(s.Raw(), first) {
		t.Error("another one is in force")
	}
	changes, cancel := s.Subscribe()
	for i := range 2 {
		if changed, err := s.Offer(f.grown(fmt.Sprintf("mallory-%d", i))); !changed || err != nil {
			t.Fatal(changed, err)
		}
	}
	select {
	case <-changes:
	default:
		t.Error("nobody was told")
	}
	cancel()
	if s.Current().Revocations.Version != 3 {
		t.Error(s.Current())
	}
	if changed, err := s.Offer(s.Raw()); changed || err != nil {
		t.Error("its own is a change:", changed, err)
	}
	if changed, err := s.Offer(first); changed || !errors.Is(err, ErrOlder) || !fault.Is(err, fault.Stale) {
		t.Error("older:", changed, err)
	}
	if a := p.heard.take(); len(a) > 0 {
		t.Error("alarms without a reason:", a)
	}
	// What was pushed is there after a restart, whatever lies at the path.
	for _, there := range [][]byte{first, nil, []byte("hello")} {
		if there == nil {
			if err := os.Remove(p.path); err != nil {
				t.Fatal(err)
			}
		} else {
			p.copy(t, there)
		}
		if s := p.open(t); s.Current().Revocations.Version != 3 {
			t.Error(s.Current())
		}
	}
	if a := p.heard.take(); len(a) != 1 || !strings.Contains(a[0], "no entries") {
		t.Error("alarms:", a)
	}
	for path, want := range map[string]fs.FileMode{p.state: 0o600, filepath.Dir(p.state): fs.ModeDir | 0o700} {
		if st, err := os.Lstat(path); err != nil || st.Mode() != want {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
	select {
	case <-changes:
		t.Error("told after it was cancelled")
	default:
	}
}

// TestStoreAlone: without a folder of its own what is offered goes to the path.
func TestStoreAlone(t *testing.T) {
	f, p := newFleet(t), newPlace(t)
	p.copy(t, f.file())
	o := p.options()
	o.State = ""
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	if changed, err := s.Offer(f.grown("mallory")); !changed || err != nil {
		t.Fatal(changed, err)
	}
	if got, err := os.ReadFile(p.path); err != nil || !bytes.Equal(got, s.Raw()) {
		t.Error("not written:", err)
	}
	if s, err = Open(o); err != nil || s.Current().Revocations.Version != 2 {
		t.Error(s, err)
	}
}

// TestRefused: what is bad changes nothing, and a fork is cried out.
func TestRefused(t *testing.T) {
	f, p := newFleet(t), newPlace(t)
	p.copy(t, f.file())
	s := p.open(t)
	was := s.Current()
	fork := *f.rev
	fork.KeyIDs = []string{"alice"}
	ahead := *f.rev
	next(&ahead.Header, f.encode(f.rev))
	ahead.Signed = day.Add(time.Hour + maxAhead + time.Second)
	good := f.grown("mallory")
	for name, c := range map[string]struct {
		data  []byte
		want  string
		alarm bool
	}{
		"huge":      {make([]byte, 10*MaxSize), "more than", false},
		"truncated": {good[:len(good)/2], "", false},
		"tampered":  {bytes.Replace(good, []byte("mallory"), []byte("alice"), 1), "was changed after", false},
		"stranger":  {f.revocations("stranger"), "signed by no delegate", false},
		"ahead":     {f.entry(&ahead, RevocationsPart, []string{"delegate"}), "ahead of this machine's clock", false},
		"fork":      {f.entry(&fork, RevocationsPart, []string{"delegate"}), "in force with other bytes", true},
	} {
		t.Run(name, func(t *testing.T) {
			changed, err := s.Offer(c.data)
			if wantError(t, err, c.want); changed || s.Current() != was {
				t.Error("in force all the same")
			}
			if a := p.heard.take(); (len(a) == 1) != c.alarm || len(a) > 1 {
				t.Errorf("alarms: %q", a)
			}
		})
	}
	// A wall clock that fell back does not keep out what the roots' own word
	// covers.
	o := p.options()
	o.Wall = func() time.Time { return time.Unix(0, 0) }
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	if changed, err := s.Offer(good); !changed || err != nil {
		t.Error(changed, err)
	}
}

// TestDeadClock: a machine without a battery, whose policy is months old, is not
// kept from what the roots sign, nor from revocations that go with it; delegates
// alone push its time on by freshFor at most.
func TestDeadClock(t *testing.T) {
	const week = 7 * 24 * time.Hour
	month := day.Add(30 * 24 * time.Hour)
	for name, c := range map[string]struct {
		floor          time.Time
		signed, policy time.Time // policy: a new one goes with it
		by             []string
		want           string // "" is taken over
	}{
		"delegate, a week on":         {signed: day.Add(week), by: []string{"delegate"}},
		"delegate, over a week":       {signed: day.Add(week + time.Second), by: []string{"delegate"}, want: "Set it, or have that part signed by 2 roots"},
		"after the build":             {floor: month, signed: month.Add(week), by: []string{"delegate"}},
		"over a week after the build": {floor: month, signed: month.Add(week + time.Second), by: []string{"delegate"}, want: "Set it"},
		"one root":                    {signed: month, by: []string{"root-1"}, want: "Set it"},
		"roots":                       {signed: month, by: []string{"root-1", "root-2"}},
		"with a policy":               {signed: month.Add(week), policy: month, by: []string{"delegate"}},
		"over a week after a policy":  {signed: month.Add(week + time.Second), policy: month, by: []string{"delegate"}, want: "Set it"},
	} {
		t.Run(name, func(t *testing.T) {
			f, p := newFleet(t), newPlace(t)
			p.copy(t, f.file())
			o := p.options()
			o.Floor, o.Wall = c.floor, func() time.Time { return time.Unix(0, 0) }
			s, err := Open(o)
			if err != nil {
				t.Fatal(err)
			}
			next(&f.rev.Header, f.encode(f.rev))
			f.rev.Signed = c.signed
			data := f.revocations(c.by...)
			if !c.policy.IsZero() {
				next(&f.pol.Header, f.encode(f.pol))
				f.pol.Signed = c.policy
				data = join(f.policy("root-1", "root-2"), data)
			}
			changed, err := s.Offer(data)
			alarms := p.heard.take()
			if c.want != "" {
				if wantError(t, err, c.want); changed || len(alarms) > 0 {
					t.Error("in force all the same", alarms)
				}
				return
			}
			if err != nil || !changed || len(alarms) != 1 || !strings.Contains(alarms[0], "this machine's clock shows 1970-01-01T00:00:00Z") {
				t.Errorf("%v, %v, %q", changed, err, alarms)
			}
			// Nor a week on from there.
			next(&f.rev.Header, f.encode(f.rev))
			f.rev.Signed = c.signed.Add(week)
			if c.signed.After(month.Add(week-time.Second)) || c.signed.Equal(day.Add(week)) {
				_, err = s.Offer(f.revocations("delegate"))
				wantError(t, err, "Set it")
			}
		})
	}
}

// TestClockSetBack: whoever sets the clock of a running agent back keeps no
// revocation out.
func TestClockSetBack(t *testing.T) {
	f, p := newFleet(t), newPlace(t)
	p.copy(t, f.file())
	o := p.options()
	now := day.Add(60 * 24 * time.Hour)
	o.Wall = func() time.Time { return now }
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	signed := now
	now = day.Add(-1000 * time.Hour)
	next(&f.rev.Header, f.encode(f.rev))
	f.rev.Signed = signed
	if changed, err := s.Offer(f.revocations("delegate")); !changed || err != nil {
		t.Error(changed, err)
	}
}

// TestPermissions: what somebody else may have written is not trusted.
func TestPermissions(t *testing.T) {
	f := newFleet(t)
	for name, c := range map[string]struct {
		spoil func(*place) error
		want  string
	}{
		"group may write": {func(p *place) error { return os.Chmod(p.path, 0o664) }, "mode 0664"},
		"all may write":   {func(p *place) error { return os.Chmod(p.path, 0o646) }, "mode 0646"},
		"folder of all":   {func(p *place) error { return os.Chmod(filepath.Dir(p.path), 0o777) }, "mode 0777"},
		"link": {func(p *place) error {
			return errors.Join(os.Rename(p.path, p.path+"2"), os.Symlink(p.path+"2", p.path))
		}, "not a plain file"},
		"pipe":                {func(p *place) error { return errors.Join(os.Remove(p.path), syscall.Mkfifo(p.path, 0o600)) }, "not a plain file"},
		"folder":              {func(p *place) error { return errors.Join(os.Remove(p.path), os.Mkdir(p.path, 0o700)) }, "not a plain file"},
		"state folder of all": {func(p *place) error { return os.Mkdir(filepath.Dir(p.state), 0o755) }, "chmod 700"},
		"state for all": {func(p *place) error {
			return errors.Join(os.Mkdir(filepath.Dir(p.state), 0o700), os.WriteFile(p.state, nil, 0o644))
		}, "chmod 600"},
		"another's": {func(p *place) error {
			if os.Geteuid() != 0 {
				return os.Chmod(p.path, 0o666)
			}
			return os.Chown(p.path, 65534, -1)
		}, p65534()},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			p.copy(t, f.file())
			if err := c.spoil(p); err != nil {
				t.Fatal(err)
			}
			_, err := Open(p.options())
			wantError(t, err, c.want)
			if err != nil && !fault.Is(err, fault.Usage) {
				t.Error(fault.CodeOf(err))
			}
		})
	}
}

func p65534() string {
	if os.Geteuid() != 0 {
		return "mode 0666"
	}
	return "belongs to user 65534"
}

// TestLostState: a copy of its own that does not verify is told of, and the
// copy by hand is used.
func TestLostState(t *testing.T) {
	f, p := newFleet(t), newPlace(t)
	p.copy(t, f.file())
	p.open(t)
	for _, spoilt := range [][]byte{nil, []byte("hello"), f.revocations("delegate")} {
		if err := os.WriteFile(p.state, spoilt, 0o600); err != nil {
			t.Fatal(err)
		}
		s := p.open(t)
		if a := p.heard.take(); len(a) != 1 || !strings.Contains(a[0], "last good bundle") || s.Current().Policy.Version != 1 {
			t.Errorf("%v: %q", s.Current(), a)
		}
	}
	// The administrator trusts other roots by now.
	o := p.options()
	o.Anchor = anchor(t, 1, 0, "other-root")
	_, err := Open(o)
	wantError(t, err, "0 of the roots of this machine's configuration")
}

// TestFullDisk: a revocation holds even if it cannot be kept, and is kept later.
func TestFullDisk(t *testing.T) {
	f, p := newFleet(t), newPlace(t)
	p.copy(t, f.file())
	s := p.open(t)
	aside := filepath.Dir(p.state) + ".aside"
	if err := os.Rename(filepath.Dir(p.state), aside); err != nil {
		t.Fatal(err)
	}
	changed, err := s.Offer(f.grown("mallory"))
	if wantError(t, err, "could not be kept"); !changed || s.Current().Revocations.Version != 2 || len(p.heard.take()) != 1 {
		t.Error(changed, s.Current())
	}
	if err := os.Rename(aside, filepath.Dir(p.state)); err != nil {
		t.Fatal(err)
	}
	s.retry()
	if got := p.open(t).Current(); got.Revocations.Version != 2 {
		t.Error(got)
	}
}

// TestWatch copies files by hand, good ones and bad ones.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, p := newFleet(t), newPlace(t)
		f.pol.FreshFor = Duration(24 * time.Hour)
		data := f.file()
		p.copy(t, data)
		began := time.Now()
		o := p.options()
		o.Now = func() time.Time { return day.Add(time.Since(began)) }
		s, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		changes, cancel := s.Subscribe()
		defer cancel()
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { s.Watch(ctx); close(done) }()
		step := func() { time.Sleep(DefaultPoll); synctest.Wait() }
		told := func() bool {
			select {
			case <-changes:
				return true
			default:
				return false
			}
		}
		steps := func(what string, data []byte, version uint64, change bool, alarm string) {
			t.Helper()
			p.copy(t, data)
			for range 4 {
				step()
			}
			a := p.heard.take()
			if got := s.Current().Revocations.Version; got != version || told() != change {
				t.Errorf("%s: revocations %d", what, got)
			}
			if alarm == "" && len(a) > 0 || alarm != "" && (len(a) != 1 || !strings.Contains(a[0], alarm)) {
				t.Errorf("%s: alarms %q", what, a)
			}
		}
		whole := func(rev []byte) []byte {
			return join(f.policy("root-1", "root-2"), f.inventory("delegate"), rev)
		}
		two := whole(f.grown("mallory"))
		steps("a newer one", two, 2, true, "")
		steps("cut off", two[:len(two)-40], 2, false, "cut off")
		steps("a host name", bytes.Replace(two, []byte("10.0.0.12"), []byte("cp-2.example.com"), 1), 2, false, "IP address")
		steps("an older one", data, 2, false, "older")
		steps("huge", make([]byte, MaxSize+1), 2, false, "more than")
		steps("good again", two, 2, false, "")

		// A slow copy: nobody is alarmed by what is not complete yet.
		three := whole(f.grown("eve"))
		for n := 0; n < len(three); n += len(three)/7 + 1 {
			p.copy(t, three[:n])
			step()
		}
		steps("copied slowly", three, 3, true, "")

		if err := os.Chmod(p.path, 0o666); err != nil {
			t.Fatal(err)
		}
		step()
		step()
		if a := p.heard.take(); len(a) != 1 || !strings.Contains(a[0], "mode 0666") {
			t.Errorf("made lax: alarms %q", a)
		}
		if err := os.Remove(p.path); err != nil {
			t.Fatal(err)
		}
		step()
		step()
		if a := p.heard.take(); len(a) > 0 || s.Current().Revocations.Version != 3 {
			t.Errorf("removed: alarms %q", a)
		}
		time.Sleep(27 * time.Hour) // the last revocations were signed 2 h after the beginning
		synctest.Wait()
		if a := p.heard.take(); len(a) != 1 || !strings.Contains(a[0], "stale") {
			t.Errorf("stale: alarms %q", a)
		}
		stop()
		<-done
	})
}

// TestConcurrent is for the race detector.
func TestConcurrent(t *testing.T) {
	f, p := newFleet(t), newPlace(t)
	p.copy(t, f.file())
	s := p.open(t)
	var offers [][]byte
	for i := range 8 {
		offers = append(offers, f.grown(fmt.Sprint("m", i)))
	}
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() { s.Watch(ctx) })
	var offering sync.WaitGroup
	for _, data := range offers {
		offering.Go(func() {
			if _, err := s.Offer(data); err != nil && !errors.Is(err, ErrOlder) {
				t.Error(err)
			}
		})
		all.Go(func() {
			c, cancel := s.Subscribe()
			defer cancel()
			select {
			case <-c:
			case <-ctx.Done():
			}
			_ = s.Raw()
		})
	}
	offering.Wait()
	stop()
	all.Wait()
	if s.Current().Revocations.Version != 9 {
		t.Error(s.Current())
	}
}

const childEnv = "HALLIGAN_TEST_OFFER"

// TestMain is also the process that TestKill ends while it takes over bundles.
func TestMain(m *testing.M) {
	dir := os.Getenv(childEnv)
	if dir == "" {
		os.Exit(m.Run())
	}
	p := &place{path: filepath.Join(dir, "etc", "bundle"), state: filepath.Join(dir, "state", "bundle")}
	s, err := Open(p.options())
	if err != nil {
		panic(err)
	}
	for i := 2; ; i++ {
		data, err := os.ReadFile(filepath.Join(dir, strconv.Itoa(i)))
		if err != nil {
			select {} // all are taken over: wait for the end
		}
		if _, err := s.Offer(data); err != nil {
			panic(err)
		}
		fmt.Println(i)
	}
}

// TestKill ends a process with SIGKILL while it takes over bundles: what it has
// acknowledged is in force after that, or what came next.
func TestKill(t *testing.T) {
	f, p := newFleet(t), newPlace(t)
	dir := filepath.Dir(filepath.Dir(p.path))
	p.copy(t, f.file())
	const most = 40
	for i := 2; i <= most; i++ {
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), f.grown(fmt.Sprint("m", i)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for round := range 6 {
		if err := os.RemoveAll(filepath.Dir(p.state)); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		first := make([]byte, 1)
		if _, err := io.ReadFull(out, first); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(round) * 1300 * time.Microsecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		rest, err := io.ReadAll(out)
		if err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it was killed
		said := strings.Fields(string(first) + string(rest))
		last, err := strconv.ParseUint(said[len(said)-1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		s := p.open(t)
		if got := s.Current().Revocations.Version; got != last && got != last+1 {
			t.Errorf("%d was acknowledged, %d is in force", last, got)
		}
		if a := p.heard.take(); len(a) > 0 {
			t.Errorf("alarms %q", a)
		}
	}
}
