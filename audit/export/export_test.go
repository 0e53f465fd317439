package export

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
)

// played has logs, each in order.
type played map[Log][]Entry

func (p played) entries() iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		for l, list := range p {
			for _, e := range list {
				if e.Log = l; !yield(e, nil) {
					return
				}
			}
		}
	}
}

var when = time.Date(2026, 11, 23, 18, 0, 0, 123456789, time.UTC)

func entry(t testing.TB, e audit.Event) Entry {
	t.Helper()
	e.Version, e.ID = audit.Version, fmt.Sprintf("20261123T180000.123-%016x", e.Seq)
	if e.Origin == "" {
		e.Origin = "cp-1.prod"
	}
	e.Time = when.Add(time.Duration(e.Seq) * time.Second)
	raw, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return Entry{Event: e, Raw: raw}
}

var anna = &audit.Actor{Person: "anna@example.com", Role: "responder", Credential: "person", Fingerprint: "SHA256:abc", Serial: "7", CA: "SHA256:ca", Door: "ssh", Source: "192.0.2.7:4711"}

// story has an event of every kind.
func story(t testing.TB) played {
	t.Helper()
	object := audit.Object{Key: "/registry/daemonsets/telemetry/collector", UID: "u-1", RevisionBefore: 5, RevisionAfter: 9, Operation: "update",
		Changes: []audit.Change{{Path: "spec.template.spec.nodeSelector", After: "{halligan.io/none: true}"}}}
	var list []Entry
	for _, e := range []audit.Event{
		{Kind: audit.Start, Text: "version 1"},
		{Kind: audit.Login, Actor: anna, Session: "s1"},
		{Kind: audit.Read, Actor: anna, Action: "top", Session: "s1", Count: 3},
		{Kind: audit.Intent, Actor: anna, Action: "scale", Incident: "INC-7", Reason: "collector eats the API", Session: "s1", Parameters: json.RawMessage(`{"to":0,"kind":"daemonset"}`),
			PlanID: "p1", PlanSHA256: "00ff", Objects: []audit.Object{object}},
		{Kind: audit.Objects, Actor: anna, Of: "i", Objects: []audit.Object{object}},
		{Kind: audit.Outcome, Actor: anna, Of: "i", Action: "scale", Outcome: "applied", Via: "etcd", Objects: []audit.Object{object}},
		{Kind: audit.Outcome, Actor: anna, Of: "i", Action: "delete", Outcome: "failed", ErrorCode: "no-quorum", Error: "etcd has no leader"},
		{Kind: audit.Secret, Actor: anna, Action: "get", Target: "cp-2.prod"},
		{Kind: audit.Refusal, Actor: &audit.Actor{Person: "bob", Credential: "automation"}, Action: "delete", ErrorCode: "refused"},
		{Kind: audit.Session, Actor: anna}, {Kind: audit.SessionEnd, Actor: anna}, {Kind: audit.Relay, Actor: anna, Target: "cp-1.prod"}, {Kind: audit.RelayEnd, Actor: anna},
		{Kind: audit.Recording, Chunk: &audit.Chunk{Session: "s1", Length: 5, SHA256: "aa"}},
		{Kind: audit.Seam, Previous: "halligan.io/log/…\n"}, {Kind: audit.Alarm, Text: "forked"}, {Kind: audit.Lost, Count: 4},
		{Kind: audit.Held, Target: "cp-2.prod", Payload: "{}"}, {Kind: audit.Adopted, Payload: "{}"}, {Kind: audit.Logout, Actor: anna}, {Kind: audit.Stop},
	} {
		e.Seq = uint64(len(list))
		list = append(list, entry(t, e))
	}
	return played{{"cp-1.prod", "0a0b0c0d"}: list}
}

func (p played) only() []Entry {
	for _, list := range p {
		return list
	}
	return nil
}

// TestOCSF holds every event to what the schema (1.9.0) requires of its class.
func TestOCSF(t *testing.T) {
	required := map[float64][]string{
		baseEvent:        nil,
		authentication:   {"user", "dst_endpoint"}, // one of service and dst_endpoint
		entityManagement: {"entity"},
		apiActivity:      {"actor", "api", "src_endpoint"},
	}
	activities := map[float64][]float64{baseEvent: {0, 99}, authentication: {0, 1, 2, 3, 4, 5, 6, 7, 99}, entityManagement: {0, 1, 2, 3, 4, 99}, apiActivity: {0, 1, 2, 3, 4, 99}}
	seen := map[float64]bool{}
	for _, e := range story(t).only() {
		data, err := OCSF(e)
		if err != nil {
			t.Fatal(err)
		}
		var o map[string]any
		if err := json.Unmarshal(data, &o); err != nil {
			t.Fatalf("%s: %v", e.Event.Kind, err)
		}
		class := o["class_uid"].(float64)
		seen[class] = true
		for _, name := range append([]string{"activity_id", "category_uid", "class_uid", "type_uid", "time", "severity_id", "metadata", "message"}, required[class]...) {
			if o[name] == nil {
				t.Errorf("%s: no %s", e.Event.Kind, name)
			}
		}
		if !slices.Contains(activities[class], o["activity_id"].(float64)) || o["type_uid"].(float64) != class*100+o["activity_id"].(float64) {
			t.Errorf("%s: activity %v, type %v", e.Event.Kind, o["activity_id"], o["type_uid"])
		}
		if o["raw_data"] != string(e.Raw) || int64(o["time"].(float64)) != e.Event.Time.UnixMilli() {
			t.Errorf("%s: raw %v, time %v", e.Event.Kind, o["raw_data"], o["time"])
		}
		meta := o["metadata"].(map[string]any)
		if meta["version"] != "1.9.0" || meta["product"] == nil || meta["uid"] != e.Event.ID {
			t.Errorf("%s: metadata %v", e.Event.Kind, meta)
		}
	}
	if len(seen) != len(required) {
		t.Errorf("classes seen: %v", seen)
	}
	var o struct {
		User   struct{ Name string }
		Src    struct{ IP string } `json:"src_endpoint"`
		Status string
		Cert   struct {
			Serial string `json:"serial_number"`
		} `json:"certificate"`
	}
	data, _ := OCSF(story(t).only()[1])
	if err := json.Unmarshal(data, &o); err != nil || o.User.Name != "anna@example.com" || o.Src.IP != "192.0.2.7" || o.Status != "Success" || o.Cert.Serial != "7" {
		t.Errorf("%v %s", err, data)
	}
}

// message is what RFC 5424 lets a receiver take apart (ABNF in section 6).
var message = regexp.MustCompile(`^<(\d{1,3})>1 (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) ([!-~]{1,255}) ([!-~]{1,48}) - ([!-~]{1,32}) \[halligan@32473((?: [!-<>-\\^-~]{1,32}="(?:[^"\\\]]|\\["\\\]])*")*)\] \x{feff}([^\n]*)$`)

func TestSyslog(t *testing.T) {
	for _, e := range story(t).only() {
		data, err := Syslog(e)
		if err != nil {
			t.Fatal(err)
		}
		m := message.FindSubmatch(data)
		if m == nil || len(data) > 8192 {
			t.Fatalf("no message: %q", data)
		}
		if string(m[2]) != e.Event.Time.Format("2006-01-02T15:04:05.000000Z") || string(m[3]) != "cp-1.prod" || string(m[5]) != string(e.Event.Kind) {
			t.Errorf("header: %q", data)
		}
	}
	data, _ := Syslog(story(t).only()[3])
	for _, part := range []string{"<109>1 ", ` incident="INC-7"`, ` person="anna@example.com"`, ` object="/registry/daemonsets/telemetry/collector"`, ` sha256="`,
		"\ufeffanna@example.com (responder) is about to scale kind=daemonset to=0 on /registry/daemonsets/telemetry/collector; reason: collector eats the API"} {
		if !strings.Contains(string(data), part) {
			t.Errorf("%q is not in %q", part, data)
		}
	}
}

// hostile is text that wants to be more than text.
var hostile = "\x1b]0;owned\a\x1b[2J\r\nInjected: <13>1 - - - - - -\n</script><img src=x onerror=alert(1)>\" ] \\\\ \u202e\u009b31m \x00\u2028" + strings.Repeat("A", 1<<20)

// TestHostile: whatever an event holds, a record is one line, in which nothing acts
// on a terminal and nothing ends what it stands in.
func TestHostile(t *testing.T) {
	text := hostile[:8000]
	e := audit.Event{Kind: audit.Kind(text[:200]), Origin: text, Reason: hostile, Incident: text, Text: text, Error: text, ErrorCode: text, Action: text, Outcome: text, Target: text, Session: text,
		Of: text, PlanID: text, Via: text, Boot: text, Images: text, Undoes: text, Payload: text, Previous: text, Parameters: json.RawMessage(strconv.Quote("x")),
		Actor:      &audit.Actor{Person: text, Role: text, Credential: text, Fingerprint: text, Serial: text, CA: text, Door: text, Source: text},
		ApprovedBy: []audit.Approval{{Person: text}}, Objects: []audit.Object{{Key: text, UID: text, Changes: []audit.Change{{Path: text, Before: text, After: text}}}}}
	for _, kind := range []audit.Kind{e.Kind, audit.Login, audit.Intent, audit.Outcome, audit.Refusal, audit.Alarm} {
		e.Kind = kind
		entry := entry(t, e)
		entry.Event.ID = text
		for _, f := range Formats {
			data, err := f.Encode(entry)
			if err != nil {
				t.Fatalf("%s: %v", f.Name, err)
			}
			if !utf8.Valid(data) {
				t.Errorf("%s: no UTF-8", f.Name)
			}
			if i := bytes.IndexFunc(data, func(r rune) bool { return !unicode.IsPrint(r) && r != '\ufeff' }); i >= 0 {
				t.Errorf("%s: %q is not plainly visible", f.Name, data[i:min(len(data), i+10)])
			}
			if f.Name != "rfc5424" && !json.Valid(data) {
				t.Errorf("%s: no JSON", f.Name)
			}
			if f.Name == "rfc5424" && (!message.Match(data) || len(data) > 8192) {
				t.Errorf("no message of at most 8 KiB: %d bytes, %.300q", len(data), data)
			}
			if len(data) > maxRecord*4 {
				t.Errorf("%s: %d bytes", f.Name, len(data))
			}
		}
	}
}

func FuzzSyslog(f *testing.F) {
	f.Add("a", "b", "c")
	f.Add(hostile[:200], `"]\`, "\xff")
	f.Fuzz(func(t *testing.T, origin, reason, kind string) {
		data, err := Syslog(Entry{Event: audit.Event{Origin: origin, Reason: reason, Kind: audit.Kind(kind), Time: when, ID: reason, Objects: []audit.Object{{Key: kind}}}})
		if err != nil || !message.Match(data) {
			t.Fatalf("%v %q", err, data)
		}
	})
}

func many(t testing.TB, n int) played {
	var list []Entry
	for i := range n {
		list = append(list, entry(t, audit.Event{Seq: uint64(i), Kind: audit.Read, Action: "get"}))
	}
	return played{{"cp-1.prod", "0a0b0c0d"}: list, {"cp-2.prod", "ffffffff"}: list[:min(n, 3)]}
}

func format(t testing.TB, name string) Format {
	f, err := FormatOf(name)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// fileRun is one export to a file, as a process does it.
func fileRun(ctx context.Context, t *testing.T, entries iter.Seq2[Entry, error], name string) (Result, error) {
	t.Helper()
	f, err := OpenFile(name, true)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := OpenCursor(name+".cursor", "jsonl", f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return Run(ctx, entries, format(t, "jsonl"), f, c)
}

func lines(t *testing.T, name string) []string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
}

// stopping ends a context before the entry of that number is had.
func stopping(p played, n int, stop context.CancelFunc) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		for e, err := range p.entries() {
			if n--; n == 0 {
				stop()
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

func TestResume(t *testing.T) {
	name := filepath.Join(t.TempDir(), "out")
	source := many(t, 20)
	ctx, stop := context.WithCancel(t.Context())
	if _, err := fileRun(ctx, t, stopping(source, 8, stop), name); !fault.Is(err, fault.Cancelled) {
		t.Fatal(err)
	}
	stop()
	if n := len(lines(t, name)); n != 7 {
		t.Fatalf("%d lines after a stop in the middle", n)
	}
	if r, err := fileRun(t.Context(), t, source.entries(), name); err != nil || r.Sent != 16 {
		t.Fatal(r, err)
	}
	if r, err := fileRun(t.Context(), t, source.entries(), name); err != nil || r.Sent != 0 {
		t.Fatal(r, err)
	}
	// A crash: more was written than the cursor knows, the last line not to its end.
	f, err := os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"v":1,"id":"to`); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	more := many(t, 22)
	if r, err := fileRun(t.Context(), t, more.entries(), name); err != nil || r.Sent != 2 {
		t.Fatal(r, err)
	}
	got := lines(t, name)
	if len(got) != 25 {
		t.Fatalf("%d lines", len(got))
	}
	seen := map[string]int{}
	for _, line := range got {
		if !json.Valid([]byte(line)) {
			t.Errorf("torn: %q", line)
		}
		seen[line]++
	}
	if len(seen) != 22 {
		t.Errorf("%d different lines", len(seen))
	}
	// Pruned before it went out.
	l := Log{"cp-1.prod", "0a0b0c0d"}
	r, err := fileRun(t.Context(), t, played{l: many(t, 30)[l][25:]}.entries(), name)
	if err != nil || r.Sent != 5 || !slices.Equal(r.Gaps, []Gap{{l, 22, 25}}) {
		t.Fatal(r, err)
	}
}

func TestCursor(t *testing.T) {
	name := filepath.Join(t.TempDir(), "c")
	c, err := OpenCursor(name, "jsonl", "file:a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCursor(name, "jsonl", "file:a"); err == nil {
		t.Error("two at once")
	}
	c.moveTo(Log{"a", "b"}, 7)
	if err := errors.Join(c.Save(), c.Close()); err != nil {
		t.Fatal(err)
	}
	for _, other := range [][2]string{{"ocsf", "file:a"}, {"jsonl", "file:b"}} {
		if _, err := OpenCursor(name, other[0], other[1]); !fault.Is(err, fault.Usage) {
			t.Errorf("%v: %v", other, err)
		}
	}
	if c, err = OpenCursor(name, "jsonl", "file:a"); err != nil || c.Next(Log{"a", "b"}) != 7 {
		t.Fatal(c, err)
	}
	_ = c.Close()
	if err := os.WriteFile(name, []byte(`{"version":1,`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCursor(name, "jsonl", "file:a"); err == nil {
		t.Error("half a cursor")
	}
}

// receiver is a syslog receiver over TLS.
type receiver struct {
	address string
	ca      []byte
	mu      sync.Mutex // guards what follows
	got     []string
	// drop ends a connection by force after so many messages.
	drop int
	// deaf hangs up, in order, before it has read anything.
	deaf atomic.Bool
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	r := &receiver{address: l.Addr().String(), ca: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				r.serve(conn.(*tls.Conn))
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); all.Wait() })
	return r
}

func (r *receiver) serve(conn *tls.Conn) {
	if r.deaf.Load() {
		_ = conn.Handshake()
		return
	}
	in := bufio.NewReader(conn)
	for {
		digits, err := in.ReadString(' ')
		if err != nil {
			return
		}
		n, err := strconv.Atoi(strings.TrimSuffix(digits, " "))
		if err != nil || n > 8192 {
			return
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(in, data); err != nil {
			return
		}
		r.mu.Lock()
		r.got = append(r.got, string(data))
		r.drop--
		drop := r.drop == 0
		r.mu.Unlock()
		if drop {
			_ = conn.NetConn().(*net.TCPConn).SetLinger(0)
			_ = conn.NetConn().Close()
			return
		}
	}
}

func (r *receiver) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := r.got
	r.got = nil
	return got
}

func TestReceiver(t *testing.T) {
	r := newReceiver(t)
	cursor := filepath.Join(t.TempDir(), "cursor")
	run := func(p played) (Result, error) {
		t.Helper()
		sink, err := NewReceiver(t.Context(), ReceiverOptions{Address: r.address, CA: r.ca})
		if err != nil {
			t.Fatal(err)
		}
		defer sink.Close()
		c, err := OpenCursor(cursor, "rfc5424", sink.Name())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return Run(t.Context(), p.entries(), format(t, "rfc5424"), sink, c)
	}
	// It hangs up before it has read anything: so it has got nothing.
	r.deaf.Store(true)
	if res, err := run(many(t, 3)); !fault.Is(err, fault.Unreachable) || res.Sent != 0 {
		t.Fatal(res, err)
	}
	r.deaf.Store(false)
	r.take()
	// It goes away in the middle: the cursor stays, and all of it comes again.
	r.drop = 5
	source := many(t, 3000)
	if res, err := run(source); !fault.Is(err, fault.Unreachable) || res.Sent != 0 {
		t.Fatal(res, err)
	}
	r.take()
	if res, err := run(source); err != nil || res.Sent != 3003 {
		t.Fatal(res, err)
	}
	got := r.take()
	if len(got) != 3003 {
		t.Fatalf("%d messages", len(got))
	}
	seen := map[string]int{}
	for i, m := range got {
		if !message.MatchString(m) {
			t.Fatalf("message %d: %q", i, m)
		}
		seen[m]++
	}
	if len(seen) != 3000 {
		t.Errorf("%d different messages", len(seen))
	}
	if res, err := run(source); err != nil || res.Sent != 0 || len(r.take()) != 0 {
		t.Fatal(res, err)
	}
	// A receiver that another authority vouches for gets nothing.
	other := newReceiver(t)
	sink, err := NewReceiver(t.Context(), ReceiverOptions{Address: r.address, CA: other.ca})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Run(t.Context(), source.entries(), format(t, "rfc5424"), sink, &Cursor{}); !fault.Is(err, fault.Unreachable) || len(r.take()) != 0 {
		t.Fatal(err)
	}
	for _, o := range []ReceiverOptions{{Address: "siem.example.com:6514", CA: r.ca}, {Address: r.address}} {
		if _, err := NewReceiver(t.Context(), o); !fault.Is(err, fault.Usage) {
			t.Errorf("%v: %v", o.Address, err)
		}
	}
}
