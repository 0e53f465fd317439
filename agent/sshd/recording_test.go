package sshd

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/cast"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/internal/fault"
)

// notes is a log that may refuse.
type notes struct {
	audit.Log
	mu      sync.Mutex
	refused string
	events  []audit.Event
}

func (n *notes) Append(_ context.Context, e audit.Event) (audit.Receipt, error) {
	n.Note(e)
	return audit.Receipt{}, nil
}

func (n *notes) Note(e audit.Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.events = append(n.events, e)
}

func (n *notes) State() audit.State {
	n.mu.Lock()
	defer n.mu.Unlock()
	return audit.State{Refused: n.refused}
}

func (n *notes) refuse(why string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refused = why
}

// of returns the newest event of a kind, when there is one more than seen.
func (n *notes) of(t *testing.T, kind audit.Kind, seen int) audit.Event {
	t.Helper()
	for range 1000 {
		n.mu.Lock()
		all := slices.DeleteFunc(slices.Clone(n.events), func(e audit.Event) bool { return e.Kind != kind })
		n.mu.Unlock()
		if len(all) > seen {
			return all[seen]
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("no event %d of kind %s", seen, kind)
	return audit.Event{}
}

func recorder(t testing.TB, log audit.Log, dir string, bytes int64) *cast.Recorder {
	t.Helper()
	r, err := cast.Open(cast.Options{Dir: dir, Log: log, MaxBytes: bytes, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// shown returns what a recording shows, and its header.
func shown(t *testing.T, dir, name string) (cast.Header, string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, name+".cast"))
	if err != nil {
		t.Fatal(err)
	}
	h, events, err := cast.Read(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for e, err := range events {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == cast.Output {
			text.WriteString(e.Text)
		}
		if e.Kind == cast.Input {
			t.Errorf("input is recorded: %q", e.Text)
		}
	}
	return h, text.String()
}

// TestRecorded: what stock ssh shows is what the recording shows, but for what was
// revealed.
func TestRecorded(t *testing.T) {
	log, dir := &notes{}, filepath.Join(t.TempDir(), "recordings")
	h := openRecorded(t, recorder(t, log, dir, 0))

	// An exec line.
	_, out, errs := h.ssh(t, "", []string{"HALLIGAN_INCIDENT=INC-7"}, "cp-1", "scale deploy/web --to 0 --reason storm")
	begun, ended := log.of(t, audit.Session, 0), log.of(t, audit.SessionEnd, 0)
	head, text := shown(t, dir, begun.Target)
	if text != strings.ReplaceAll(out+errs, "\n", "\r\n") || head.Command != "scale deploy/web --to 0 --reason storm" || head.Title != "anna as responder at cp-1.lab" {
		t.Errorf("%+v %q, seen: %q %q", head, text, out, errs)
	}
	if begun.Action != cast.Exec || begun.Text != head.Command || begun.Incident != "INC-7" || begun.Actor.Person != "anna" || begun.Actor.Source == "" ||
		ended.Target != begun.Target || ended.Outcome != "failed" || !strings.HasPrefix(ended.Text, "exit status 2 after") {
		t.Errorf("%+v\n%+v", begun, ended)
	}

	// What was revealed, however it is asked for.
	for i, line := range []string{"get secret/x --reveal --reason x", "halligan get --reveal=true secret/x --reason x -o json"} {
		if _, out, errs = h.ssh(t, "", nil, "cp-1", line); !strings.Contains(out, "evil") {
			t.Errorf("%q %q", out, errs)
		}
		log.of(t, audit.SessionEnd, i+1)
		if _, text = shown(t, dir, log.of(t, audit.Session, i+1).Target); strings.Contains(text, "evil") || !strings.Contains(text, "[what was revealed is not recorded]") {
			t.Errorf("%s: %q", line, text)
		}
	}

	// Lines that no terminal shows, of which one reveals.
	_, out, _ = h.ssh(t, "whoami\nget secret/x --reveal --reason x\nget deploy\n", nil, "-T", "cp-1")
	log.of(t, audit.SessionEnd, 3)
	_, text = shown(t, dir, log.of(t, audit.Session, 3).Target)
	if strings.Count(out, "evil") != 2 || strings.Count(text, "evil") != 1 || !strings.HasPrefix(text, "> whoami\r\nanna\r\n") || !strings.Contains(text, "> get deploy\r\n") {
		t.Errorf("%q, seen: %q", text, out)
	}

	// A shell, to the last byte.
	p := h.sit(t, "cp-1")
	p.sees(prompt)
	p.types("whoami\r")
	p.sees(prompt)
	p.types("get secret/x --reveal --reason x\r")
	p.sees(`evil`)
	p.sees(prompt)
	p.types("exit\r")
	p.leaves(0)
	end := log.of(t, audit.SessionEnd, 4)
	head, text = shown(t, dir, log.of(t, audit.Session, 4).Target)
	p.mu.Lock()
	seen := string(p.seen)
	p.mu.Unlock()
	before, after, ok := strings.Cut(text, "[what was revealed is not recorded]\r\n")
	if !ok || !strings.HasPrefix(seen, before) || !strings.HasSuffix(seen, after) || strings.Contains(text, "evil") || head.Width != 100 || head.Height != 30 || end.Outcome != "ok" {
		t.Errorf("%+v %q\nseen: %q", head, text, seen)
	}

	// A session that is ended, and a subsystem, of which there is no text.
	p = h.sit(t, "cp-1")
	p.sees(prompt)
	h.revoke(fault.New(fault.Unauthenticated, "log in again", "the certificate was revoked"))
	p.leaves(255)
	if e := log.of(t, audit.SessionEnd, 5); e.ErrorCode != string(fault.Unauthenticated) || !strings.Contains(e.Error, "revoked") {
		t.Errorf("%+v", e)
	}
}

// TestReadOnly: a shell says before its next prompt what cannot be done any more,
// and when it can.
func TestReadOnly(t *testing.T) {
	log := &notes{}
	h := openRecorded(t, recorder(t, log, filepath.Join(t.TempDir(), "recordings"), 0))
	p := h.sit(t, "cp-1")
	p.sees(prompt)
	log.refuse("the disk is \x1bfull")
	p.types("whoami\r")
	if text := p.sees(prompt); !strings.Contains(text, `warning: nothing can be recorded (the disk is \x1bfull), so this session is read-only until it can`) || !strings.Contains(text, "role      responder") {
		t.Errorf("%q", text)
	}
	p.types("whoami\r")
	if text := p.sees(prompt); strings.Contains(text, "warning") {
		t.Errorf("it says so again: %q", text)
	}
	log.refuse("")
	p.types("whoami\r")
	if text := p.sees(prompt); !strings.Contains(text, "not read-only any more") {
		t.Errorf("%q", text)
	}
	p.types("exit\r")
	p.leaves(0)
}

// TestUnrecorded: where recordings have no room responders go on, and are told;
// automation does not.
func TestUnrecorded(t *testing.T) {
	log := &notes{}
	h := openRecorded(t, recorder(t, log, filepath.Join(t.TempDir(), "recordings"), 8))
	const told = "warning: this session is not recorded (recordings take all the room that they may), which is itself on record"
	if status, out, errs := h.ssh(t, "", nil, "cp-1", "whoami"); status != 0 || !strings.Contains(out, "anna") || !strings.Contains(errs, told) {
		t.Errorf("%d %q %q", status, out, errs)
	}
	if e := log.of(t, audit.Session, 0); e.Outcome != cast.Unrecorded || e.Error == "" || !e.BreakGlass() {
		t.Errorf("%+v", e)
	}
	p := h.sit(t, "cp-1")
	if text := p.sees(prompt); !strings.Contains(text, "warning: this session is not recorded") {
		t.Errorf("%q", text)
	}
	p.types("exit\r")
	p.leaves(0)
	for _, user := range []string{"responder-robot", "observer"} {
		if status, out, errs := h.ssh(t, "", nil, "-l", user, "cp-1", "whoami"); status != 7 || out != "" || !strings.Contains(errs, "halligan: this session cannot be recorded") {
			t.Errorf("%s: %d %q %q", user, status, out, errs)
		}
	}
	if e := log.of(t, audit.Refusal, 0); e.Actor.Credential != "automation" {
		t.Errorf("%+v", e)
	}
}

// BenchmarkRecording compares sessions with and without a recording, in a log on
// disk, by turns: a line typed key by key into a shell until the next prompt, and a
// list of about 3 MiB. overhead is the time with a recording over that without.
func BenchmarkRecording(b *testing.B) {
	log, err := ledger.Open(ledger.Options{Dir: filepath.Join(b.TempDir(), "audit"), Origin: "cp-1.lab", Now: time.Now, Log: zerolog.Nop()})
	if err != nil {
		b.Fatal(err)
	}
	defer log.Close()
	dir := filepath.Join(b.TempDir(), "recordings")
	r := recorder(b, log, dir, 0)
	connect := func(r *cast.Recorder) *gossh.Client {
		h := openRecorded(b, r)
		h.bulk = 40_000
		client, err := gossh.Dial("tcp", h.address, &gossh.ClientConfig{User: "responder", Auth: []gossh.AuthMethod{gossh.PublicKeys(h.key)},
			HostKeyCallback: gossh.FixedHostKey(h.key.PublicKey()), Timeout: 10 * time.Second})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { client.Close() })
		return client
	}
	clients := []*gossh.Client{connect(nil), connect(r)}
	compare := func(b *testing.B, unit string, run func(i int) time.Duration, rounds int) {
		run(0)
		run(1)
		for range b.N {
			best := []time.Duration{math.MaxInt64, math.MaxInt64}
			for range rounds {
				for i := range best {
					best[i] = min(best[i], run(i))
				}
			}
			b.ReportMetric(float64(best[1])/float64(best[0]), "overhead")
			b.ReportMetric(float64(best[1].Microseconds()), unit)
		}
	}
	b.Run("shell", func(b *testing.B) {
		var in [2]io.Writer
		var out [2]io.Reader
		for i, client := range clients {
			s, err := client.NewSession()
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			if in[i], err = s.StdinPipe(); err != nil {
				b.Fatal(err)
			}
			if out[i], err = s.StdoutPipe(); err != nil {
				b.Fatal(err)
			}
			if err := s.RequestPty("xterm", 30, 100, nil); err != nil {
				b.Fatal(err)
			}
			if err := s.Shell(); err != nil {
				b.Fatal(err)
			}
			until(b, out[i], prompt)
		}
		compare(b, "µs/line", func(i int) time.Duration {
			began := time.Now()
			for range 20 {
				for _, key := range "whoami" {
					fmt.Fprintf(in[i], "%c", key)
					until(b, out[i], string(key))
				}
				fmt.Fprint(in[i], "\r")
				until(b, out[i], prompt)
			}
			return time.Since(began) / 20
		}, 15)
	})
	b.Run("output", func(b *testing.B) {
		compare(b, "µs/list", func(i int) time.Duration {
			s, err := clients[i].NewSession()
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			began := time.Now()
			if got, err := s.Output("get deploy"); err != nil || len(got) < 1<<20 {
				b.Fatalf("%d bytes, %v", len(got), err)
			}
			return time.Since(began)
		}, 5)
	})
}

// until reads until what was read ends with the text.
func until(b *testing.B, r io.Reader, text string) {
	b.Helper()
	var seen []byte
	chunk := make([]byte, 4096)
	for !bytes.HasSuffix(seen, []byte(text)) {
		n, err := r.Read(chunk)
		if err != nil {
			b.Fatalf("%q: %v", seen, err)
		}
		seen = append(seen, chunk[:n]...)
	}
}
