package alarm

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/internal/trust"
)

var mallory = trust.Identity{Person: "mallory", Role: trust.Responder, Door: trust.SSH, Kind: trust.Person, Fingerprint: "SHA256:m", Serial: "9", Source: "192.0.2.9:4711"}

// text is a buffer that a test may read while it is written.
type text struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (t *text) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.Write(p)
}

func (t *text) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.String()
}

func open(t *testing.T, log io.Writer, sinks ...Config) *Alarms {
	t.Helper()
	a, err := Open(Options{Node: "cp-1", Cluster: "prod", Sinks: sinks, Log: zerolog.New(log)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a
}

func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 500 {
		if ok() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("not within 10 s: %s", what)
}

// hook is a webhook that collects what it gets.
type hook struct {
	server *httptest.Server
	events chan Event
}

func newHook(t *testing.T, secure bool, answer func() int) *hook {
	t.Helper()
	h := &hook{events: make(chan Event, 1000)}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if code := answer(); code != http.StatusOK {
			w.Header().Set("Location", "http://name.invalid/")
			w.WriteHeader(code)
			return
		}
		var e Event
		d := json.NewDecoder(r.Body)
		d.DisallowUnknownFields()
		if err := d.Decode(&e); err != nil || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s %q: %v", r.Method, r.Header.Get("Content-Type"), err)
		}
		h.events <- e
	})
	h.server = httptest.NewUnstartedServer(handler)
	h.server.Config.ErrorLog = log.New(io.Discard, "", 0) // handshakes fail on purpose
	if secure {
		h.server.StartTLS()
	} else {
		h.server.Start()
	}
	t.Cleanup(h.server.Close)
	return h
}

func always() int { return http.StatusOK }

func (h *hook) next(t *testing.T) Event {
	t.Helper()
	select {
	case e := <-h.events:
		return e
	case <-time.After(20 * time.Second):
		t.Fatal("no event in 20 s")
		return Event{}
	}
}

// TestWebhook: one POST for each event, with its text made harmless; and again
// until it is taken.
func TestWebhook(t *testing.T) {
	t.Parallel()
	failures := 2
	h := newHook(t, false, func() int {
		if failures > 0 {
			failures--
			return []int{http.StatusTemporaryRedirect, http.StatusInternalServerError}[failures]
		}
		return http.StatusOK
	})
	var lines text
	a := open(t, &lines, Config{Webhook: h.server.URL + "/token-in-the-path"})
	a.Raise(Of(Alone, mallory, "scaled\x1b[2J\u202e alone\nsecond line"))
	e := h.next(t)
	want := Event{Time: e.Time, Kind: Alone, Loud: true, Node: "cp-1", Cluster: "prod", Person: "mallory", Role: "responder", Door: "ssh", Credential: "person",
		Fingerprint: "SHA256:m", Serial: "9", Source: "192.0.2.9:4711", Text: `scaled\x1b[2J\u202e alone\nsecond line`}
	if e != want || time.Since(e.Time) > time.Minute {
		t.Errorf("%+v, want %+v", e, want)
	}
	a.Close()
	a.Close() // twice is once
	a.Raise(Of(Login, mallory, "too late"))
	if got := lines.String(); !strings.Contains(got, `"alarm":"alone"`) || !strings.Contains(got, "it answered 500") || strings.Contains(got, "token-in-the-path") || strings.Contains(got, "too late") {
		t.Errorf("log: %s", got)
	}
	if a.Dropped() != 0 {
		t.Errorf("%d dropped", a.Dropped())
	}
}

// TestWebhookTLS: over https only whom the CA vouches for.
func TestWebhookTLS(t *testing.T) {
	t.Parallel()
	h := newHook(t, true, always)
	file := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, io.Discard, Config{Webhook: h.server.URL, CAFile: file}).Raise(Of(Login, mallory, "in"))
	if e := h.next(t); e.Text != "in" {
		t.Errorf("%+v", e)
	}
	stranger := open(t, io.Discard, Config{Webhook: h.server.URL})
	stranger.Raise(Of(Login, mallory, "in"))
	within(t, "an unknown server fails", func() bool { return len(stranger.Failing()) == 1 })
	if len(h.events) != 0 {
		t.Error("an unknown server got the event")
	}
}

func TestSyslog(t *testing.T) {
	dir, err := os.MkdirTemp("", "syslog") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	local, err := net.ListenPacket("unixgram", dir+"/log")
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	stream, err := net.Listen("unix", dir+"/stream")
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	a := open(t, io.Discard, Config{Syslog: udp.LocalAddr().String()}, Config{Syslog: dir + "/log"}, Config{Syslog: dir + "/stream"})
	read := func(c net.PacketConn) string {
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		b := make([]byte, 4096)
		n, _, err := c.ReadFrom(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	for _, c := range []struct {
		kind     Kind
		severity int
		line     string
	}{
		{Alone, 1, "ALARM alone: mallory (responder) at ssh from 192.0.2.9:4711: did it"},
		{Login, 6, "login: mallory (responder) at ssh from 192.0.2.9:4711: did it"},
		{Refusal, 4, "refusal: mallory (responder) at ssh from 192.0.2.9:4711: did it"},
	} {
		a.Raise(Of(c.kind, mallory, "did it"))
		line := regexp.QuoteMeta(c.line)
		if got := read(udp); !regexp.MustCompile(fmt.Sprintf(`^<%d>1 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z cp-1 halligan-agent \d+ %s - %s$`, 80+c.severity, c.kind, line)).MatchString(got) {
			t.Errorf("RFC 5424: %q", got)
		}
		form := regexp.MustCompile(fmt.Sprintf(`^<%d>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d halligan-agent\[\d+\]: %s\n?$`, 80+c.severity, line))
		if got := read(local); !form.MatchString(got) {
			t.Errorf("local: %q", got)
		}
		conn, err := stream.Accept()
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(conn)
		conn.Close()
		if err != nil || !form.Match(got) || !bytes.HasSuffix(got, []byte("\n")) {
			t.Errorf("stream: %q, %v", got, err)
		}
	}
}

// script writes a program.
func script(t *testing.T, name, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestCommand(t *testing.T) {
	t.Setenv("SECRET_OF_THE_AGENT", "s3cr3t")
	out := filepath.Join(t.TempDir(), "out")
	open(t, io.Discard, Config{Command: []string{script(t, "page", `cat > "$1.new"; env >> "$1.new"; mv "$1.new" "$1"`), out}}).Raise(Of(Sealed, mallory, "came in"))
	var got []byte
	within(t, "the command wrote its file", func() bool { got, _ = os.ReadFile(out); return len(got) > 0 })
	first, rest, _ := bytes.Cut(got, []byte("\n"))
	var e Event
	if err := json.Unmarshal(first, &e); err != nil || e.Kind != Sealed || e.Person != "mallory" || bytes.Contains(rest, []byte("s3cr3t")) {
		t.Errorf("%s: %v", got, err)
	}
}

// TestCommandTimeout: one that hangs is killed with what it started.
func TestCommandTimeout(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	s, err := newCommand([]string{script(t, "hang", `sleep 600 & echo $$ $! > "$1"; wait`), pids})
	if err != nil {
		t.Fatal(err)
	}
	c := s.(command)
	c.timeout = time.Second
	if err := c.send(t.Context(), Event{}); err == nil || !strings.Contains(err.Error(), "did not end within 1s") {
		t.Errorf("%v", err)
	}
	data, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range strings.Fields(string(data)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			t.Fatal(err)
		}
		within(t, "process "+word+" is gone", func() bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			return syscall.Kill(pid, 0) != nil || err == nil && strings.Contains(string(stat), ") Z") // nobody may reap orphans here
		})
	}
}

// TestRefusedConfig: with what is wrong, and without any name that needs DNS.
func TestRefusedConfig(t *testing.T) {
	lax := script(t, "lax", "")
	if err := os.Chmod(lax, 0o722); err != nil {
		t.Fatal(err)
	}
	plain := script(t, "plain", "")
	if err := os.Chmod(plain, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		config Config
		want   string
	}{
		{Config{}, "set one of"},
		{Config{Webhook: "http://127.0.0.1", Syslog: "local"}, "set one of"},
		{Config{Webhook: "https://hooks.example.com/x"}, `"hooks.example.com" is not an IP address`},
		{Config{Webhook: "https://localhost/x"}, "is not an IP address"},
		{Config{Webhook: "ftp://127.0.0.1/x"}, "http or https"},
		{Config{Webhook: "https://user:pass@127.0.0.1/x"}, "without a user"},
		{Config{Webhook: "127.0.0.1:80"}, "URL"},
		{Config{Webhook: "http://127.0.0.1", CAFile: "/ca"}, "caFile goes with"},
		{Config{Webhook: "https://127.0.0.1", CAFile: "ca"}, "absolute"},
		{Config{Webhook: "https://127.0.0.1", CAFile: "/nonexistent/ca"}, "no such file"},
		{Config{Syslog: "loghost:514"}, "IP:PORT"},
		{Config{Syslog: "127.0.0.1"}, "IP:PORT"},
		{Config{Command: []string{"page"}}, "absolute"},
		{Config{Command: []string{"/nonexistent/page"}}, "no such file"},
		{Config{Command: []string{lax}}, "others may change it"},
		{Config{Command: []string{plain}}, "no program"},
	} {
		_, err := Open(Options{Sinks: []Config{c.config}, Log: zerolog.Nop()})
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "alarms[0]: ") {
			t.Errorf("%+v: %v, want %q", c.config, err, c.want)
		}
	}
}

// stuck is a sink that hangs.
type stuck struct{ entered chan struct{} }

func (stuck) String() string { return "stuck" }

func (s stuck) send(ctx context.Context, _ Event) error {
	select {
	case s.entered <- struct{}{}:
	default:
	}
	<-ctx.Done()
	return ctx.Err()
}

// TestStuckSink: raising never waits for one, and what it cannot take is counted.
func TestStuckSink(t *testing.T) {
	t.Parallel()
	h := newHook(t, false, always)
	a := open(t, io.Discard, Config{Webhook: h.server.URL})
	s := stuck{make(chan struct{}, 1)}
	q := &queue{sink: s, events: make(chan Event, queueLength)}
	a.queues = append(a.queues, q)
	a.workers.Go(func() { a.work(q) })
	a.Raise(Of(Bundle, trust.Identity{}, "first"))
	<-s.entered
	a.mu.Lock()
	for range quietLength { // so much is waiting for it
		q.events <- Event{}
	}
	a.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.Raise(Of(Login, mallory, "quiet"))
		a.Raise(Of(Alone, mallory, "loud"))
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("raising waits for a sink")
	}
	if len(q.events) != quietLength+1 || a.Dropped() != 1 {
		t.Errorf("%d wait, %d dropped: room for what is loud is not kept", len(q.events), a.Dropped())
	}
	for _, want := range []string{"first", "quiet", "loud"} {
		if e := h.next(t); e.Text != want {
			t.Errorf("the other sink got %q, want %q", e.Text, want)
		}
	}
	began := time.Now()
	a.Close()
	if took := time.Since(began); took > 15*time.Second { // closeGrace, on a busy machine
		t.Errorf("closing took %v", took)
	}
	if a.Dropped() < quietLength {
		t.Errorf("%d dropped", a.Dropped())
	}
}

// TestFlood: who causes refusals over and over buries neither them nor others.
func TestFlood(t *testing.T) {
	t.Parallel()
	h := newHook(t, false, always)
	a := open(t, io.Discard, Config{Webhook: h.server.URL})
	for i := range 1000 {
		a.Raise(Of(Refusal, mallory, fmt.Sprintf("no %d", i)))
		stranger := trust.Identity{Door: trust.GRPC, Source: fmt.Sprintf("10.0.%d.%d:1", i/250, i%250)}
		a.Raise(Of(Refusal, stranger, "no certificate"))
	}
	bob := mallory
	bob.Person = "bob"
	a.Raise(Of(Refusal, bob, "also refused"))
	a.Raise(Of(Alone, mallory, "alone"))
	a.Raise(Of(Alone, mallory, "alone, another"))
	a.Raise(Of(Alone, mallory, "alone"))
	a.Close()
	count := map[string]int{}
	unsaid := uint64(0)
	for len(h.events) > 0 {
		e := h.next(t)
		count[string(e.Kind)+" "+e.Person]++
		unsaid += e.Unsaid
	}
	if count["refusal mallory"] != 1 || count["refusal bob"] != 1 || count["alone mallory"] != 2 || count["refusal "] < burst || count["refusal "] > 10*burst {
		t.Errorf("%v", count)
	}
	if unsaid < 999 {
		t.Errorf("%d of 999 are accounted for", unsaid)
	}
	if len(a.same) > maxSame {
		t.Errorf("%d events are remembered", len(a.same))
	}
}

func TestLine(t *testing.T) {
	for _, c := range []struct {
		e    Event
		want string
	}{
		{Event{Kind: Bundle, Loud: true, Text: "stale"}, "ALARM bundle: stale"},
		{Event{Kind: Refusal, Door: "grpc", Source: "1.2.3.4:5", Text: "no", Unsaid: 7}, "refusal: at grpc from 1.2.3.4:5: no (and 7 before it that were held back)"},
		{Event{Kind: Refusal, Person: "p", Text: "no"}, "refusal: p (no role): no"},
	} {
		if got := c.e.Line(); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
	if e := Of(Login, mallory, strings.Repeat("x", 2*maxText)).neutralised(); len(e.Text) > maxText {
		t.Errorf("a text of %d bytes", len(e.Text))
	}
}
