package cast

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode"

	"github.com/creack/pty"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// ledger is a log that may take nothing.
type ledger struct {
	audit.Log
	mu     sync.Mutex
	down   bool
	events []audit.Event
}

func (l *ledger) Append(_ context.Context, e audit.Event) (audit.Receipt, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down {
		return audit.Receipt{}, fault.New(fault.AuditUnavailable, "", "it is down")
	}
	l.events = append(l.events, e)
	return audit.Receipt{}, nil
}

func (l *ledger) Note(e audit.Event) { _, _ = l.Append(context.Background(), e) }

func (l *ledger) State() audit.State { return audit.State{} }

func (l *ledger) set(down bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = down
}

// all returns the events as lines.
func (l *ledger) all() (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.events {
		line := strings.TrimSpace(fmt.Sprint(e.Kind, " ", e.Action, " ", e.Outcome))
		if e.Chunk != nil {
			line = fmt.Sprint("chunk ", e.Chunk.Last)
		}
		lines = append(lines, line)
	}
	return lines
}

// vouched checks that the log vouches for all of a recording.
func (l *ledger) vouched(t *testing.T, dir, name string) {
	t.Helper()
	data := read(t, dir, name)
	l.mu.Lock()
	defer l.mu.Unlock()
	covered, last := int64(0), false
	for _, e := range l.events {
		c := e.Chunk
		if c == nil || c.Session != name {
			continue
		}
		if e.Target != name || c.Offset > covered || c.Offset+c.Length > int64(len(data)) {
			t.Fatalf("a chunk of %q at %d, %d long, after %d of %d bytes", e.Target, c.Offset, c.Length, covered, len(data))
		}
		if sum := sha256.Sum256(data[c.Offset : c.Offset+c.Length]); hex.EncodeToString(sum[:]) != c.SHA256 {
			t.Fatalf("the digest at %d is wrong", c.Offset)
		}
		covered, last = max(covered, c.Offset+c.Length), last || c.Last
	}
	if covered != int64(len(data)) || !last {
		t.Fatalf("%d of %d bytes are vouched for; the end: %v", covered, len(data), last)
	}
}

func read(t *testing.T, dir, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, name+".cast"))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// replayed returns what a recording shows.
func replayed(t *testing.T, data []byte) string {
	t.Helper()
	_, events, err := Read(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	at := time.Duration(0)
	for e, err := range events {
		if err != nil {
			t.Fatal(err)
		}
		if e.At < at {
			t.Fatal("time runs backwards")
		}
		at = e.At
		if e.Kind == Output {
			text.WriteString(e.Text)
		}
	}
	return text.String()
}

// asciinema returns what the stock player shows of a file. It wants a terminal.
func asciinema(t *testing.T, path string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath("asciinema"); err != nil {
		t.Skip("no asciinema")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "asciinema", "cat", path)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "ASCIINEMA_CONFIG_HOME="+t.TempDir())
	cmd.Stdout = &out
	terminal, err := pty.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	go func() { _, _ = io.Copy(io.Discard, terminal) }()
	err = cmd.Wait()
	return out.String(), err
}

var (
	ada   = trust.Identity{Person: "ada", Role: trust.Responder, Kind: trust.Person, Session: "20261123-120000-0123456789"}
	robot = trust.Identity{Person: "robot", Role: trust.Responder, Kind: trust.Automation}
)

func open(t testing.TB, o Options) *Recorder {
	t.Helper()
	o.Logger = zerolog.Nop()
	r, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func begin(t testing.TB, r *Recorder, who trust.Identity) *Session {
	t.Helper()
	s, err := r.Begin(context.Background(), About{Who: who, What: Shell, At: "cp-1.lab", Columns: 100, Rows: 30, Term: "xterm"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func say(t testing.TB, s *Session, text string) {
	t.Helper()
	if err := s.Output([]byte(text)); err != nil {
		t.Fatal(err)
	}
}

// hostile is what nobody should send to a terminal.
const hostile = "\x1b]0;owned\a\x1b[2J\x9b31m</script>\u202e\x00\xff\xfe\u2028"

func TestRecord(t *testing.T) {
	dir, log := filepath.Join(t.TempDir(), "recordings"), &ledger{}
	r := open(t, Options{Dir: dir, Log: log})
	s := begin(t, r, ada)
	var shown bytes.Buffer
	w := s.Writer(&shown)
	// Characters may come in pieces, line feeds with and without a carriage return.
	for _, piece := range []string{"gr", "\xc3", "\xbc\xc3\x9f\n", "a\r", "\nb\r\n", "\xf0\x9f\x98", "\x80", hostile, "\xe2"} {
		if _, err := io.WriteString(w, piece); err != nil {
			t.Fatal(err)
		}
	}
	s.Input([]byte("typed"))
	s.Resize(80, 24)
	s.Next("get secret/x --reveal", false)
	say(t, s, "before ")
	s.Hide()
	say(t, s, "a secret")
	s.Next("", false)
	s.Next("status", true)
	bulk := strings.Repeat("x", 1<<20)
	for range 6 {
		say(t, s, bulk)
	}
	s.Next("", false)
	say(t, s, strings.Repeat("ö", 20<<10)+"the end")
	s.End(0, nil)
	s.End(1, nil) // is nothing more
	say(t, s, "late")
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	data := read(t, dir, s.name)
	h, _, err := Read(bytes.NewReader(data))
	if err != nil || h.Width != 100 || h.Height != 30 || h.Title != "ada as responder at cp-1.lab" || h.Env["TERM"] != "xterm" || time.Since(time.Unix(h.Timestamp, 0)).Abs() > time.Hour {
		t.Errorf("%+v, %v", h, err)
	}
	want := "grüß\r\na\r\nb\r\n😀" + strings.ToValidUTF8(hostile[:12], "") + strings.ReplaceAll(strings.ReplaceAll(strings.ReplaceAll(hostile[12:], "\xff", "\ufffd"), "\xfe", "\ufffd"), "\x9b", "\ufffd")
	got := replayed(t, data)
	if !strings.HasPrefix(got, want) || strings.Contains(got, "secret") || strings.Contains(got, "typed") || strings.Contains(got, "late") || !strings.HasSuffix(got, "the end") {
		t.Errorf("%q\nis not\n%q", got[:min(len(got), 300)], want)
	}
	for _, text := range []string{"before [what was revealed is not recorded]\r\n> status\r\n", "x\r\n[what one line shows beyond 4 MiB is not recorded]\r\nöö"} {
		if !strings.Contains(got, text) {
			t.Errorf("it lacks %q", text)
		}
	}
	if n := strings.Count(got, "x"); n < 4<<20 || n > 5<<20 {
		t.Errorf("%d bytes of one line", n)
	}
	for _, line := range bytes.Split(data, []byte("\n")) {
		if len(line) > 128<<10 {
			t.Errorf("a line of %d bytes", len(line))
		}
	}
	log.vouched(t, dir, s.name)
	events := log.all()
	if events[0] != "session shell" || !slices.Contains(events, "session-end shell ok") {
		t.Errorf("%q", events)
	}
	if e := log.events[0]; e.Target != s.name || e.Session != ada.Session || e.Actor.Person != "ada" {
		t.Errorf("%+v", e)
	}
	path := filepath.Join(dir, s.name+".cast")
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o400 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if out, err := asciinema(t, path); err != nil || out != got {
		t.Errorf("the stock player shows %d bytes of %d: %v", len(out), len(got), err)
	}
	// Input is recorded where it is wanted.
	r = open(t, Options{Dir: dir, Log: log, Input: true})
	s = begin(t, r, ada)
	_, _ = io.ReadAll(s.Reader(strings.NewReader("typed")))
	s.End(3, fault.New(fault.Unauthenticated, "", "revoked"))
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if data := read(t, dir, s.name); !bytes.Contains(data, []byte(`"i", "typed"]`)) {
		t.Errorf("%s", data)
	}
	if events := log.all(); !slices.Contains(events, "session-end shell failed") {
		t.Errorf("%q", events)
	}
}

// TestNone: a Recorder that is none lets everything pass.
func TestNone(t *testing.T) {
	var r *Recorder
	s := begin(t, r, robot)
	say(t, s, "x")
	s.Input(nil)
	s.Resize(1, 1)
	s.Next("x", true)
	s.Hide()
	if s.Warning() != "" || r.Refused() != "" || s.Refused() != nil {
		t.Error("it says something")
	}
	s.End(0, nil)
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	log := &ledger{}
	r = open(t, Options{Dir: filepath.Join(t.TempDir(), "r"), Log: log})
	s, err := r.Begin(t.Context(), About{Who: robot, What: Subsystem, Command: "halligan-grpc"})
	if err != nil {
		t.Fatal(err)
	}
	say(t, s, "x")
	s.End(0, nil)
	if got := log.all(); !slices.Equal(got, []string{"session subsystem", "session-end subsystem ok"}) {
		t.Errorf("%q", got)
	}
}

// TestCut: of a recording that was cut anywhere the next process makes one that
// plays, with all that was whole.
func TestCut(t *testing.T) {
	dir, log := filepath.Join(t.TempDir(), "recordings"), &ledger{}
	r := open(t, Options{Dir: dir, Log: log})
	s := begin(t, r, ada)
	for i := range 4 {
		say(t, s, fmt.Sprintf("ö%d", i))
	}
	s.End(0, nil)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	whole := read(t, dir, s.name)
	dir, log = t.TempDir(), &ledger{}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	name := func(i int) string { return fmt.Sprintf("20261123-120000-%010x", i) }
	put := func(i int, data []byte) string {
		t.Helper()
		path := filepath.Join(dir, name(i)+".cast")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for i := range len(whole) + 1 {
		put(i, whole[:i])
	}
	// Zeros are what some file systems leave after a power cut.
	put(len(whole)+1, append(bytes.Clone(whole[:len(whole)-5]), make([]byte, 100)...))
	put(len(whole)+2, make([]byte, 3<<20))
	for _, other := range []string{"x.cast", "README", name(1) + ".cast.old"} {
		if err := os.WriteFile(filepath.Join(dir, other), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// The stock player does not take what the next process mends.
	mid := len(whole) - 3
	if out, err := asciinema(t, filepath.Join(dir, name(mid)+".cast")); err == nil || !strings.Contains(out, "ö0ö1ö2") {
		t.Errorf("it plays a torn recording now, so that nothing has to be mended: %q, %v", out, err)
	}
	r = open(t, Options{Dir: dir, Log: log})
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for i := range len(whole) + 3 {
		data := read(t, dir, name(i))
		want := ""
		for _, line := range bytes.Split(whole[:min(i, len(whole))], []byte("\n"))[:bytes.Count(whole[:min(i, len(whole))], []byte("\n"))] {
			if e, err := event(line); err == nil {
				want += e.Text
			}
		}
		if i > len(whole) {
			want = map[int]string{1: "ö0ö1ö2"}[i-len(whole)]
		}
		if got := replayed(t, data); got != want {
			t.Errorf("cut at %d: %q, want %q", i, got, want)
		}
		log.vouched(t, dir, name(i))
	}
	if n := strings.Count(strings.Join(log.all(), "\n"), "recording  settled"); n != len(whole)+3 {
		t.Errorf("%d are on record as settled", n)
	}
	if out, err := asciinema(t, filepath.Join(dir, name(mid)+".cast")); err != nil || out != "ö0ö1ö2" {
		t.Errorf("%q, %v", out, err)
	}
	// Once is enough.
	r = open(t, Options{Dir: dir, Log: log})
	before := len(log.all())
	if err := r.Close(); err != nil || len(log.all()) != before {
		t.Errorf("settled again: %v", err)
	}
	// What others may write into is not taken.
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Options{Dir: dir, Log: log}); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Error(err)
	}
}

const childEnv = "HALLIGAN_TEST_CAST"

// TestMain is also the process that TestKill ends.
func TestMain(m *testing.M) {
	dir := os.Getenv(childEnv)
	if dir == "" {
		os.Exit(m.Run())
	}
	r, err := Open(Options{Dir: dir, Log: &ledger{}})
	if err != nil {
		panic(err)
	}
	s, err := r.Begin(context.Background(), About{Who: ada, What: Shell})
	if err != nil {
		panic(err)
	}
	for i := range 1500 { // less than maxOfLine, however late it is killed
		if err := s.Output(fmt.Appendf(nil, "%d%s\n", i, strings.Repeat("ö", i))); err != nil {
			panic(err)
		}
		fmt.Println(i)
	}
	select {}
}

// TestKill: all that was shown before a process was killed is in the recording.
func TestKill(t *testing.T) {
	for round := range 5 {
		dir, log := filepath.Join(t.TempDir(), "recordings"), &ledger{}
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
		time.Sleep(time.Duration(round) * 2311 * time.Microsecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		rest, err := io.ReadAll(out)
		if err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it was killed
		files, err := filepath.Glob(filepath.Join(dir, "*.cast"))
		if err != nil || len(files) != 1 {
			t.Fatalf("%q, %v", files, err)
		}
		if err := open(t, Options{Dir: dir, Log: log}).Close(); err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(filepath.Base(files[0]), ".cast")
		log.vouched(t, dir, name)
		got := replayed(t, read(t, dir, name))
		n := bytes.Count(rest, []byte("\n")) // the last that was acknowledged is n-1
		if !strings.Contains(got, fmt.Sprintf("%d%s\r\n", n-1, strings.Repeat("ö", n-1))) {
			t.Errorf("%d lines were shown, not all of them are there", n)
		}
		if round == 4 {
			if out, err := asciinema(t, files[0]); err != nil || out != got {
				t.Error(err)
			}
		}
	}
}

// TestQuota: the oldest recordings make room, whole ones, on record before.
func TestQuota(t *testing.T) {
	dir, log := filepath.Join(t.TempDir(), "recordings"), &ledger{}
	noon := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	now := noon
	r := open(t, Options{Dir: dir, Log: log, MaxBytes: 1 << 20, Now: func() time.Time { return now }})
	var all []*Session
	for range 12 {
		s := begin(t, r, ada)
		say(t, s, strings.Repeat("x", 100<<10))
		all = append(all, s)
		now = now.Add(time.Second)
		s.End(0, nil)
		settle(t, r, s)
	}
	left := func() (left []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			left = append(left, strings.TrimSuffix(e.Name(), ".cast"))
		}
		return left
	}
	if got := left(); len(got) != 8 || got[0] != all[4].name {
		t.Errorf("left: %q", got)
	}
	if n := strings.Count(strings.Join(log.all(), "\n"), "recording  removed"); n != 4 {
		t.Errorf("%d are on record as removed", n)
	}
	if used, problem := r.State(); used > 1<<20 || problem != "" {
		t.Errorf("%d bytes, %q", used, problem)
	}
	// One takes no more than its share, and then responders go on, on record.
	s := begin(t, r, ada)
	say(t, s, strings.Repeat("x", 200<<10))
	if w := s.Warning(); !strings.Contains(w, "is not recorded") || s.Refused() != nil {
		t.Errorf("%q", w)
	}
	s.End(0, nil)
	settle(t, r, s)
	log.vouched(t, dir, s.name)
	if !slices.Contains(log.all(), "recording shell unrecorded") {
		t.Errorf("%q", log.all())
	}
	other := begin(t, r, robot)
	if err := other.Output(make([]byte, 200<<10)); !fault.Is(err, fault.AuditUnavailable) || other.Refused() == nil || other.Context().Err() == nil {
		t.Errorf("%v", err)
	}
	other.End(0, nil)
	settle(t, r, other)
	// What is not on record as removed is not removed.
	log.set(true)
	before := left()
	for range 6 {
		s := begin(t, r, ada)
		say(t, s, strings.Repeat("x", 100<<10))
		s.End(0, nil)
	}
	if err := r.Close(); err == nil {
		t.Error("all is said to be vouched for")
	}
	for _, name := range before {
		read(t, dir, name)
	}
	if used, problem := r.State(); used > 1<<20 || !strings.Contains(problem, "it is down") {
		t.Errorf("%d bytes, %q", used, problem)
	}
	// The next process finds them, and goes on.
	log.set(false)
	r = open(t, Options{Dir: dir, Log: log, MaxBytes: 1 << 20})
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	var sum int64
	for _, name := range left() {
		log.vouched(t, dir, name)
		sum += int64(len(read(t, dir, name)))
	}
	if used, _ := r.State(); used != sum || used > 1<<20/8*7 {
		t.Errorf("%d bytes, %d counted", sum, used)
	}
}

// TestShares: whoever fills what there is for recordings pushes out the own ones, and
// nobody else's, the process before included.
func TestShares(t *testing.T) {
	dir, log, now := filepath.Join(t.TempDir(), "recordings"), &ledger{}, time.Now()
	o := Options{Dir: dir, Log: log, MaxBytes: 1 << 20, Now: func() time.Time { now = now.Add(time.Second); return now }}
	r := open(t, o)
	record := func(who trust.Identity, size int) *Session {
		s := begin(t, r, who)
		_ = s.Output(bytes.Repeat([]byte("x"), size)) // it says so where it is too much
		return s
	}
	done := func(s *Session) {
		s.End(0, nil)
		settle(t, r, s)
	}
	var kept []string
	for range 3 {
		s := record(ada, 60<<10)
		done(s)
		kept = append(kept, s.name)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r = open(t, o)
	for range 2 {
		for range 12 {
			done(record(robot, 100<<10))
		}
		var live []*Session
		for range 12 {
			live = append(live, record(robot, 100<<10))
		}
		for _, s := range live {
			done(s)
		}
	}
	for _, name := range kept {
		read(t, dir, name)
	}
	if len(r.making) > 0 {
		t.Errorf("still being made: %v", r.making)
	}
}

// settle waits until the log has all of a session.
func settle(t *testing.T, r *Recorder, s *Session) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		r.mu.Lock()
		done := !slices.Contains(r.ended, s) && len(r.waiting) == 0 && r.used.Load() <= r.o.MaxBytes/8*7
		r.mu.Unlock()
		if done {
			return
		}
	}
	t.Fatal("it is never done")
}

// TestFull: on a full disk whoever may have to rescue goes on, on record, and is
// recorded again when there is room. Nobody else goes on.
func TestFull(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("halligan-test", disk, "tmpfs", 0, "size=256k,mode=0700"); err != nil {
		t.Fatalf("mounting a tmpfs (the tests run as root): %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	dir, log := filepath.Join(disk, "recordings"), &ledger{}
	r := open(t, Options{Dir: dir, Log: log})
	s, bot := begin(t, r, ada), begin(t, r, robot)
	say(t, s, "one")
	ballast := filepath.Join(disk, "ballast")
	fill := func() { _ = os.WriteFile(ballast, make([]byte, 1<<20), 0o600) } // as far as it goes
	fill()
	text := strings.Repeat("ö", 7000)
	for range 4 {
		say(t, s, text)
	}
	if w := s.Warning(); !strings.Contains(w, "no space left") || s.Warning() != "" {
		t.Errorf("%q", w)
	}
	if err := errors.Join(bot.Output([]byte(text)), bot.Output([]byte(text))); !fault.Is(err, fault.AuditUnavailable) || !fault.Is(bot.Refused(), fault.AuditUnavailable) {
		t.Error(err)
	}
	bot.End(7, bot.Refused())
	// Nor can one begin.
	late := begin(t, r, ada)
	if w := late.Warning(); !strings.Contains(w, "no space left") {
		t.Errorf("%q", w)
	}
	if _, err := r.Begin(t.Context(), About{Who: robot, What: Exec, Command: "status"}); !fault.Is(err, fault.AuditUnavailable) {
		t.Error(err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Session{s, late} {
		s.mu.Lock()
		s.again = time.Time{}
		s.mu.Unlock()
		say(t, s, "two")
		if w := s.Warning(); w != "note: this session is recorded again" {
			t.Errorf("%q", w)
		}
		s.End(0, nil)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Session{s, late, bot} {
		log.vouched(t, dir, s.name)
	}
	got := replayed(t, read(t, dir, s.name))
	if !strings.HasPrefix(got, "one") || !strings.HasSuffix(got, " bytes were not recorded here]\r\ntwo") {
		t.Errorf("%q", got[max(0, len(got)-100):])
	}
	if events := strings.Join(log.all(), "\n"); strings.Count(events, "recording shell unrecorded") != 2 || strings.Count(events, "session shell unrecorded") != 1 ||
		strings.Count(events, "recording shell recorded") != 2 || strings.Count(events, "refusal exec unrecorded") != 1 {
		t.Errorf("%s", events)
	}
}

func TestAllowed(t *testing.T) {
	for _, c := range []struct {
		who  trust.Identity
		want bool
	}{
		{ada, true}, {robot, false},
		{trust.Identity{Kind: trust.Person, Role: trust.Observer}, false},
		{trust.Identity{Kind: trust.Person, Role: trust.Approver}, false},
		{trust.Identity{Kind: trust.Person, Role: trust.Observer, Roles: []trust.Role{trust.Commander}}, false},
		{trust.Identity{Kind: trust.Sealed, Role: trust.Commander}, true},
		{trust.Identity{Kind: trust.Person, Role: trust.Responder, Scope: trust.Scope{Drill: true}}, false},
		{trust.Identity{Kind: trust.Person, Roles: []trust.Role{trust.Observer, trust.Responder}}, true},
		{trust.Identity{Kind: trust.Person, Roles: []trust.Role{trust.Observer, trust.Approver}}, false},
		{trust.Identity{Kind: trust.Bastion}, false},
	} {
		if got := allowed(c.who); got != c.want {
			t.Errorf("%+v: %v", c.who, got)
		}
	}
}

// TestLogDown: what the log does not take it gets later, without a gap.
func TestLogDown(t *testing.T) {
	dir, log := filepath.Join(t.TempDir(), "recordings"), &ledger{}
	r := open(t, Options{Dir: dir, Log: log})
	s := begin(t, r, ada)
	for i := range 20 {
		log.set(i%3 != 0)
		say(t, s, strings.Repeat("x", 50<<10))
		r.passes(t)
	}
	log.set(false)
	s.End(0, nil)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	log.vouched(t, dir, s.name)
}

// passes waits for a pass that begins now.
func (r *Recorder) passes(t *testing.T) {
	t.Helper()
	for range 2 { // the channel has room for one, so that the first has been taken
		select {
		case r.wake <- struct{}{}:
		case <-time.After(20 * time.Second):
			t.Fatal("no pass")
		}
	}
}

func TestLines(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", ""},
		{"one\r\ntwo", "one|two"},
		{"a\r\n\r\nb\r\n", "a||b"},
		{"status\b\b\b\x1b[Krt", "start"[:3] + "rt"},
		{"progress 1\rprogress 2\r\n", "progress 2"},
		{"ab\x1b[2Dc\x1b[C!\r\n", "cb!"},
		{"one\r\ntwo\x1b[A\rONE\r\n", "one|two|ONE"},
		{"\x1b[31mred\x1b[0m\x1b[?2004h\r\n", "red"},
		{"a\tb\r\n", "a       b"},
		{"\x1b]0;owned\a\x1b[2J\x1b[10;10H", `\x1b]0;owned\x1b[2J\x1b[10;10H`},
		{"\x1b[?1049h\x1bc\u202e\u009b\x00", `\x1b[?1049h\x1bc\u202e\u009b\x00`},
		{strings.Repeat("y", 2*maxRow+1), strings.Repeat("y", maxRow) + "|" + strings.Repeat("y", maxRow) + "|y"},
		{"\x1b[", ""},
	} {
		var got []string
		for l, err := range Lines(func(yield func(Event, error) bool) { yield(Event{Kind: Output, Text: c.in}, nil) }) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, l.Text)
		}
		if strings.Join(got, "|") != c.want {
			t.Errorf("%q: %q, want %q", c.in, strings.Join(got, "|"), c.want)
		}
	}
}

// TestGrowth: few bytes do not become many lines.
func TestGrowth(t *testing.T) {
	for _, part := range []string{"\x1b[4000Cx\r\n", "\x1b[Ax\x1b[Bx"} {
		in, out, failed := Event{Kind: Output, Text: strings.Repeat("y", maxRow-1) + "\r\n" + strings.Repeat(part, 10_000)}, 0, false
		for l, err := range Lines(func(yield func(Event, error) bool) { yield(in, nil) }) {
			out += len(l.Text)
			failed = failed || err != nil
		}
		if !failed || out > 64<<10+maxGrowth*(len(in.Text)+1) {
			t.Errorf("%d bytes became %d: %v", len(in.Text), out, failed)
		}
	}
}

func TestRead(t *testing.T) {
	const head = `{"version":2,"width":80,"height":24}` + "\n"
	for in, want := range map[string]string{
		"": "ends within a line", "{}\n": "version 0", "x\n": "invalid", head[:20]: "ends within a line",
		head + "[1]\n": "no event", head + "[-1, \"o\", \"x\"]\n": "no event", head + "{}\n": "cannot unmarshal",
		head + "[1, \"o\", \"x\"]": "line 2: the recording ends within a line", head + strings.Repeat("x", 2<<20): "a line has more than",
		head + "[1, \"o\", \"x\", 2]\n": "no event", head + "[1e300, \"o\", \"x\"]\n": "no event",
	} {
		_, events, err := Read(strings.NewReader(in))
		if err == nil {
			for _, e := range events {
				err = e
			}
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %s", in, err, want)
		}
	}
	for _, name := range []string{"", "../x", "20261123-120000-0123456789/x", "20261123-120000-0123456789\n"} {
		if _, err := File("d", name); !fault.Is(err, fault.Usage) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if path, err := File("d", trust.NewSession(time.Now())); err != nil || !strings.HasPrefix(path, "d/") {
		t.Error(path, err)
	}
}

// FuzzRead: whatever a recording holds, reading ends, and its lines are inert.
func FuzzRead(f *testing.F) {
	head := `{"version":2,"width":80,"height":24}` + "\n"
	f.Add([]byte(head+`[0.1, "o", "a\u001b[2A\r\n\u001b[31mb\u001b[3K"]`+"\n"), "x\x1b[A\n\x1b[B\x9b")
	f.Add([]byte(head+`[1, "i", "x"]`), hostile)
	f.Fuzz(func(t *testing.T, data []byte, text string) {
		for _, data := range [][]byte{data, fmt.Appendf(nil, "%s[1, \"o\", %q]\n", head, text)} {
			_, events, err := Read(bytes.NewReader(data))
			if err != nil {
				continue
			}
			for l, err := range Lines(events) {
				if err == nil && strings.ContainsFunc(l.Text, func(r rune) bool { return !unicode.IsPrint(r) }) {
					t.Fatalf("%q", l.Text)
				}
			}
		}
		// What is written can be read.
		var b bytes.Buffer
		b.WriteString(head)
		encode(&b, time.Second, Output, text)
		if got := replayed(t, b.Bytes()); got != strings.ToValidUTF8(text, "\ufffd") && !strings.Contains(text, "\xff") && strings.ToValidUTF8(text, "") == text {
			t.Fatalf("%q, want %q", got, text)
		}
	})
}
