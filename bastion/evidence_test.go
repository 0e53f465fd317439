package bastion

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/record"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/issuer"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// events returns the bastion's evidence once it has ended.
func (w *world) events(t *testing.T) (all []audit.Event) {
	t.Helper()
	e, err := record.Open(record.Options{StateDir: w.config.StateDir, Origin: w.config.origin(), Now: time.Now, Raise: func(alarm.Event) {}, Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for _, h := range e.Heads() {
		for data, err := range e.Entries(t.Context(), h.Lineage, h.Generation, 0, h.Size) {
			var event audit.Event
			if err == nil {
				err = json.Unmarshal(data, &event)
			}
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, event)
		}
	}
	return all
}

// TestEvidence: who came to a bastion, what they asked it and where they were relayed
// to stands in its log, once; so does who was refused.
func TestEvidence(t *testing.T) {
	w := newWorld(t, nil).ready()
	ada := w.login(t, "ada", nil)
	node, err := ada.Dial("tcp", w.echo.String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprint(node, "hello"); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Read(make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	node.Close()
	if _, err := ada.Dial("tcp", "198.51.100.7:22"); err == nil {
		t.Fatal("an address that the inventory lacks is relayed to")
	}
	if _, err := ada.Dial("tcp", w.down.String()); err == nil {
		t.Fatal("a node that is down answers")
	}
	for _, line := range []string{"sessions", "nodes", "shutdown"} {
		session, err := ada.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := session.CombinedOutput(line); (err == nil) != (line != "shutdown") {
			t.Errorf("%s: %v", line, err)
		}
	}
	session, err := ada.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := session.RequestSubsystem("sftp"); err == nil {
		t.Error("a bastion has files")
	}
	long := time.Now().Add(-48 * time.Hour)
	key, cert := w.fleet.Person(testfleet.Holder("mallory", trust.Commander), issuer.Validity{NotBefore: long, NotAfter: long.Add(time.Hour)})
	signer, err := gossh.NewCertSigner(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.dial(signer, nil); err == nil {
		t.Fatal("a certificate that has lapsed lets in")
	}
	ada.Close()
	eventually(t, "nothing is relayed any more", func() bool { return w.value("relays") == 0 })
	if err := w.stop(); err != nil {
		t.Fatal(err)
	}

	counts := map[string]int{}
	name := ""
	for _, e := range w.events(t) {
		what := strings.Join(strings.Fields(strings.Join([]string{string(e.Kind), e.Action, e.Target, e.Outcome}, " ")), " ")
		if e.Kind == audit.Session || e.Kind == audit.SessionEnd { // whose targets are names of recordings
			what = strings.Join(strings.Fields(string(e.Kind)+" "+e.Action+" "+e.Outcome), " ")
		}
		counts[what]++
		a := e.Actor
		switch {
		case e.Kind == audit.Start || e.Kind == audit.Stop || e.Kind == audit.Recording || e.Kind == audit.Alarm:
		case e.Kind == audit.Refusal && a.Person == "":
			if a.Fingerprint == "" || a.Source == "" || !strings.Contains(e.Error, "mallory") {
				t.Errorf("a stranger: %+v", e)
			}
			counts["stranger"]++
		case a.Person != "ada" || a.Door != "ssh" || a.Fingerprint == "" || a.Serial == "" || e.Session == "" || name != "" && e.Session != name:
			t.Errorf("%s by %+v in session %q, want %q", what, a, e.Session, name)
		default:
			name = e.Session
		}
	}
	for what, n := range map[string]int{"start": 1, "stop": 1, "alarm bundle": 1, "login": 1, "logout": 1, "relay grpc cp-1.prod": 1, "relay-end grpc cp-1.prod": 1, "relay ssh cp-2.prod failed": 1, "read Sessions ok": 1, "stranger": 1,
		"refusal refused": 3, "session exec": 3, "session-end exec ok": 2, "session-end exec failed": 1} {
		if counts[what] != n {
			t.Errorf("%d of %q, want %d: %v", counts[what], what, n, counts)
		}
	}
}
