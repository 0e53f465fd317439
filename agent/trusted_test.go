package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// TestWarnsOfRulesThatMatchNothing: a slip of the keyboard, in the bundle or in
// the node's own file, is said and takes nothing else out of force.
func TestWarnsOfRulesThatMatchNothing(t *testing.T) {
	fleet := testfleet.New(t)
	dir := t.TempDir()
	c := Config{Node: testfleet.Node, Cluster: testfleet.Cluster, StateDir: filepath.Join(dir, "state"), PolicyFile: filepath.Join(dir, "policy.yaml"),
		Trust: &TrustConfig{Bundle: filepath.Join(fleet.Dir, "bundle")}}
	data := fleet.Policy(func(p *bundle.Policy) {
		p.Approvals = []trust.ApprovalRule{{Resources: []string{"deployments"}, Count: 1, Why: "two"}, {Actions: []string{"delete"}, Count: 1, Why: "two"}}
	})
	for file, text := range map[string]string{c.Trust.Bundle: string(data), c.PolicyFile: "version: 1\nprotect:\n- {actions: [scael], why: no}\n"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(c.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	alarms, err := alarm.Open(alarm.Options{Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	defer alarms.Close()
	believed, err := newTrusted(c, trust.NewClock(time.Time{}), alarms, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	if err := believed.Open(); err != nil {
		t.Fatal(err)
	}
	all := strings.Join(believed.warnings(), "\n")
	for _, want := range []string{"1 names in the node's own policy", `no action "scael"`, "1 names in the bundle's policy", `no resource "deployments"`} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is not in %q", want, all)
		}
	}
	who := trust.Identity{Person: "alice", Role: trust.Responder, Door: trust.SSH, Kind: trust.Person}
	if n, _, _ := believed.Policy().Approvals(who, trust.Request{Action: "delete", Mutates: true}, 1); n != 1 {
		t.Errorf("%d approvals for a deletion", n)
	}
	if st := believed.Status(); len(st.GetHash()) != 64 { // by which clients notice a fork
		t.Errorf("%v", st)
	}
}
