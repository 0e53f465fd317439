package bastion

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/audit/mirror"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// TestCopies: status and metrics tell of each copy how far it is, whether the log is
// what it was, and why it cannot be reached; the last is no problem of the log's.
func TestCopies(t *testing.T) {
	c := &copies{folder: filepath.Join(t.TempDir(), "mirror")}
	if c.status() != nil || c.warnings() != nil || c.problem("cp-1.prod") != "" {
		t.Error("something is told before the copies are open")
	}
	key, err := mirror.Key(filepath.Join(t.TempDir(), "audit", "witness-key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := durable.Dir(filepath.Join(c.folder, "cp-2.prod", "problems")); err != nil {
		t.Fatal(err)
	}
	if err := durable.Write(filepath.Join(c.folder, "cp-2.prod", "problems", "rollback-00ff00ff.00000001"), []byte("it was cut\nat noon\n")); err != nil {
		t.Fatal(err)
	}
	m, err := mirror.Open(mirror.Options{Dir: c.folder, Server: "a.bastion", Key: key, Bundle: func() *bundle.Bundle { return nil }, Now: time.Now, Raise: func(alarm.Event) {}, Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	c.opened.Store(m)
	away, err := m.Copy("cp-1.prod")
	if err != nil {
		t.Fatal(err)
	}
	away.Live(false, errors.New("nobody listens"))
	c.told("http://192.0.2.9", "the witness does not sign")
	got := map[string]string{}
	for _, s := range c.status() {
		got[s.GetOrigin()] = s.GetProblem()
		if s.GetLagSeconds() != -1 || s.GetEvents() != 0 {
			t.Errorf("%v", s)
		}
	}
	if len(got) != 2 || got["cp-1.prod"] != "nobody listens" || got["cp-2.prod"] != "it was cut" {
		t.Errorf("%q", got)
	}
	if c.problem("cp-1.prod") != "" || c.problem("cp-2.prod") != "it was cut" {
		t.Error("what cannot be reached counts as what is wrong")
	}
	if all := strings.Join(c.warnings(), "\n"); all != "the copy of the log of cp-2.prod: it was cut\nthe witness does not sign" {
		t.Errorf("%q", all)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(c)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems := map[string]float64{}
	for _, f := range families {
		for _, one := range f.GetMetric() {
			if f.GetName() == "halligan_bastion_mirror_problem" {
				problems[one.GetLabel()[0].GetValue()] = one.GetGauge().GetValue()
			}
		}
	}
	if len(families) != 3 || len(problems) != 2 || problems["cp-1.prod"] != 0 || problems["cp-2.prod"] != 1 {
		t.Errorf("%d metrics, %v", len(families), problems)
	}
}
