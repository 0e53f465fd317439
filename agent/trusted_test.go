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
	"github.com/halligan-io/halligan/internal/trust/inforce"
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
	believed, err := newTrusted(c, trust.NewClock(time.Time{}), func() []inforce.Moment { return nil }, alarms.Raise, nil, zerolog.Nop())
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

// TestRecordsBeyond: records are a floor of the clock, so that nobody brings an
// ended certificate to life by setting it back; but a clock that jumped ahead and
// was mended does not shut the doors for good.
func TestRecordsBeyond(t *testing.T) {
	fleet := testfleet.New(t)
	const day, week = 24 * time.Hour, 7 * 24 * time.Hour
	bundled := filepath.Join(fleet.Dir, "bundle")
	if err := os.WriteFile(bundled, fleet.Policy(func(*bundle.Policy) {}), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := bundle.Open(bundle.Options{Path: bundled})
	if err != nil {
		t.Fatal(err)
	}
	signed := b.Current().Signed()
	for name, c := range map[string]struct {
		wall, record time.Duration // after the bundle was signed
		counts       bool
	}{
		"back by a day":              {wall: week, record: week + day - time.Minute, counts: true},
		"ahead by over a day":        {wall: week, record: week + day + time.Minute},
		"ahead by years":             {wall: week, record: 4 * 365 * day},
		"before":                     {wall: week, record: day, counts: true},
		"dead clock":                 {wall: -30 * 365 * day, record: week - time.Minute, counts: true},
		"dead clock, ahead by years": {wall: -30 * 365 * day, record: 4 * 365 * day},
	} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			if err := os.Chmod(state, 0o700); err != nil {
				t.Fatal(err)
			}
			log := filepath.Join(t.TempDir(), "log")
			file, err := os.Create(log)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			alarms, err := alarm.Open(alarm.Options{Log: zerolog.New(file)})
			if err != nil {
				t.Fatal(err)
			}
			clock := trust.Steady(time.Time{}, func() time.Time { return signed.Add(c.wall) })
			past := []inforce.Moment{{What: "20300101-000000-aaaaaaaa", At: signed.Add(c.record)}, {What: "old", At: signed.Add(-day)}}
			config := Config{Node: testfleet.Node, Cluster: testfleet.Cluster, StateDir: state, Trust: &TrustConfig{Bundle: bundled}}
			believed, err := newTrusted(config, clock, func() []inforce.Moment { return past }, alarms.Raise, nil, zerolog.Nop())
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := believed.Open(); err != nil {
					t.Fatal(err)
				}
			}
			alarms.Close()
			if raised := !clock.Now().Before(signed.Add(c.record)); raised != c.counts {
				t.Errorf("the clock shows %v, the record is of %v", clock.Now(), signed.Add(c.record))
			}
			warned := strings.Contains(strings.Join(believed.warnings(), "\n"), "20300101-000000-aaaaaaaa")
			text, err := os.ReadFile(log)
			if alarmed := strings.Count(string(text), `"alarm":"clock"`); err != nil || warned == c.counts || (alarmed == 1) == c.counts || alarmed > 1 {
				t.Errorf("warned %v, alarms %s", warned, text)
			}
		})
	}
}
