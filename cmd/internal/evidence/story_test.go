package evidence

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/labpki"
)

// story is a node's and a bastion's evidence of an incident.
func story(t *testing.T) (w *watch, node *peer) {
	w = newWatch(t)
	node, a := w.peer("cp-1.prod"), w.peer("a.bastion")
	alice := &audit.Actor{Person: "alice", Role: "responder", Source: "192.0.2.4:50000", Door: "ssh"}
	a.record(audit.Event{Kind: audit.Relay, Actor: alice, Target: "cp-1.prod", Session: "b"})
	node.record(audit.Event{Kind: audit.Start}, audit.Event{Kind: audit.Login, Actor: alice, Session: "s"}, audit.Event{Kind: audit.Login, Actor: &audit.Actor{Person: "carol"}, Session: "other"})
	intent := node.record(audit.Event{Kind: audit.Intent, Actor: alice, Session: "s", Action: "scale", Incident: "INC-7", Reason: "it floods\x1b[2J <b>the</b>\nAPI", Parameters: json.RawMessage(`{"target":"deploy/web","namespace":"shop","to":0}`),
		PlanID: "p-1", Objects: []audit.Object{{Key: "/registry/deployments/shop/web", RevisionBefore: 7, Changes: []audit.Change{{Path: "spec.replicas", Before: "3", After: "0"}}}}})
	node.record(audit.Event{Kind: audit.Outcome, Of: intent.ID, Actor: alice, Session: "s", Action: "scale", Outcome: "applied", Via: "etcd"})
	a.copyOf(node)
	node.record(audit.Event{Kind: audit.Logout, Actor: alice, Session: "s"})
	return w, node
}

// TestReport tells an incident from daemons and from a folder, and says aloud what
// does not hold.
func TestReport(t *testing.T) {
	w, _ := story(t)
	dir := t.TempDir()
	out := w.want(0, []string{"# Incident INC-7", "alice came in first", "### 1. scale deploy/web -n shop --to 0", "| spec.replicas | 3 | 0 |", "Outcome: **applied**",
		`> it floods\\x1b\[2J &lt;b&gt;the&lt;/b&gt;\\nAPI`, "was let through to cp-1.prod", "witness a.bastion, through event 5"}, "report", "INC-7")
	if strings.Contains(out, "carol") {
		t.Error("it tells of who had nothing to do with it")
	}
	page, markdown, kept := filepath.Join(dir, "r.html"), filepath.Join(dir, "r.md"), filepath.Join(dir, "kept")
	w.want(0, nil, "fetch", kept)
	w.want(0, []string{"r.html is written"}, "report", "inc-7", kept, "--html", page, "--markdown", markdown)
	data, err := os.ReadFile(page)
	must(t, err)
	for _, part := range []string{"Content-Security-Policy", "scale deploy/web -n shop --to 0", "c2sp.org/tlog-proof@v1", "halligan.io/witness/a.bastion", `<span class="chip good">witnessed</span>`} {
		if !strings.Contains(string(data), part) {
			t.Errorf("the page has no %q", part)
		}
	}
	for _, args := range [][]string{{"report"}, {"report", "INC-7", kept, "--html", page, "--markdown", page}, {"report", "INC-7", kept, "--recordings"}} {
		w.want(2, nil, args...)
	}
	w.want(1, []string{"no event names the incident INC-8"}, "report", "INC-8", kept)

	bundles, _ := filepath.Glob(filepath.Join(kept, "cp-1.prod", "logs", "*", "tile", "entries", "000.p", "6"))
	data, err = os.ReadFile(bundles[0])
	must(t, err)
	must(t, os.WriteFile(bundles[0], []byte(strings.Replace(string(data), `"applied"`, `"failed!"`, 1)), 0o600))
	w.want(1, []string{"## Before you rely on this", "cp-1.prod", "the evidence does not hold", "no outcome of it is in the evidence"}, "report", "INC-7", kept)
}

// TestExport hands events to a file and to a receiver, each once.
func TestExport(t *testing.T) {
	w, node := story(t)
	dir := t.TempDir()
	kept, file := filepath.Join(dir, "kept"), filepath.Join(dir, "events.json")
	w.want(0, nil, "fetch", kept)
	w.want(0, []string{"7 events went out to file:"}, "export", kept, "--format", "ocsf", "--out", file)
	w.want(0, []string{"0 events went out"}, "export", kept, "--format", "ocsf", "--out", file)
	node.record(audit.Event{Kind: audit.Login, Actor: &audit.Actor{Person: "dora"}})
	w.want(0, []string{"1 events went out"}, "export", "--format", "ocsf", "--out", file)
	data, err := os.ReadFile(file)
	must(t, err)
	if lines := strings.Split(strings.TrimSpace(string(data)), "\n"); len(lines) != 8 || !strings.Contains(lines[7], `"name":"dora"`) {
		t.Errorf("%s", data)
	}
	if out := w.want(0, nil, "export", kept); strings.Count(out, "\n") != 7 || !strings.HasPrefix(out, `{"v":1,`) {
		t.Errorf("%q", out)
	}

	ca, err := labpki.Open(filepath.Join(dir, "pki"), "siem")
	must(t, err)
	pair, err := ca.Issue("siem", labpki.Server, []net.IP{net.IPv4(127, 0, 0, 1)})
	must(t, err)
	certificate, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	must(t, err)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12})
	must(t, err)
	var got []string
	var mu sync.Mutex // guards got
	var done sync.WaitGroup
	done.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			for in := bufio.NewReader(conn); ; {
				digits, err := in.ReadString(' ')
				n, bad := strconv.Atoi(strings.TrimSpace(digits))
				if err != nil || bad != nil || n > 8192 {
					break
				}
				m := make([]byte, n)
				if _, err := io.ReadFull(in, m); err != nil {
					break
				}
				mu.Lock()
				got = append(got, string(m))
				mu.Unlock()
			}
			_ = conn.Close()
		}
	})
	defer func() { _ = l.Close(); done.Wait() }()
	to := []string{"export", kept, "--format", "rfc5424", "--to", l.Addr().String(), "--ca", ca.CertFile()}
	w.want(0, []string{fmt.Sprintf("7 events went out to tls:%s", l.Addr())}, to...)
	w.want(0, []string{"0 events went out"}, to...)
	mu.Lock()
	defer mu.Unlock()
	if len(got) != 7 || !strings.Contains(strings.Join(got, "\n"), `it floods\\x1b[2J <b>the</b>\\nAPI`) {
		t.Errorf("%d messages: %q", len(got), got)
	}

	for _, args := range [][]string{{"--format", "xml"}, {"--to", "127.0.0.1:1", "--format", "rfc5424"}, {"--to", "siem.example.com:6514", "--format", "rfc5424", "--ca", ca.CertFile(), "--cursor", "c"},
		{"--to", "127.0.0.1:1", "--ca", "x", "--cursor", "c"}, {"--ca", "x"}, {"--out", "x", "--to", "127.0.0.1:1"}, {"--out", file, "--format", "jsonl"}} {
		w.want(2, nil, append([]string{"export", kept}, args...)...)
	}
}
