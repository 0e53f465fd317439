package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/halligan-io/halligan/internal/fault"
)

// BenchmarkStorm measures a scale, through the console and through a bastion and
// the agent's SSH door in turn, with the real binaries
// while a LIST storm saturates the API server, beside what the victim's and the
// administrator's kubectl take for the same at the same moment; then the time
// from the first command to relief. One row for each shape of the outage.
func BenchmarkStorm(b *testing.B) {
	for _, shape := range []string{"a", "b"} {
		b.Run(shape, func(b *testing.B) { stormBench(b, shape) })
	}
}

const (
	stormTries = 100
	// stormEach spreads ours over the time that kubectl needs for some tries.
	stormEach = 400 * time.Millisecond
	// stormBar is what a scale under a storm may take, p99.
	stormBar = 500 * time.Millisecond
)

// tries are durations of a command that was run again and again; one that
// failed counts with the time that it took to fail.
type tries struct {
	took          []time.Duration
	failed, stale int
}

// run runs the command. One whose plan was stale, because a controller wrote the
// same object meanwhile, is given again, as a person would do, and counts with
// all of its time.
func (r *tries) run(ctx context.Context, argv []string) {
	began := time.Now()
	err := exec.CommandContext(ctx, argv[0], argv[1:]...).Run()
	for retry := 0; fault.Stale.Exit() == exitOf(err) && retry < 5; retry++ {
		r.stale++
		err = exec.CommandContext(ctx, argv[0], argv[1:]...).Run()
	}
	if ctx.Err() != nil {
		return
	}
	r.took = append(r.took, time.Since(began))
	if err != nil {
		r.failed++
	}
}

func exitOf(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return 0
}

func (r *tries) at(p int) time.Duration {
	if len(r.took) == 0 {
		return 0
	}
	slices.Sort(r.took)
	return percentile(r.took, p)
}

func (r *tries) String() string {
	return fmt.Sprintf("p50 %s p99 %s (%d tries, %d failed, %d stale)", short(r.at(50)), short(r.at(99)), len(r.took), r.failed, r.stale)
}

func stormBench(b *testing.B, shape string) {
	bin, err := filepath.Abs("../../../bin")
	if err != nil {
		b.Fatal(err)
	}
	halligan := filepath.Join(bin, "halligan")
	l := stormLab(b, shape, func(o *Options) {
		o.Agent, o.Halligan, o.Bastion = []string{filepath.Join(bin, "halligan-agent")}, []string{halligan}, []string{filepath.Join(bin, "halligan-bastion")}
	})
	o := DefaultStorm()
	load := shapes[shape]
	o.Dir, o.Shape, o.ClientsPerPod, o.BackoffShare, o.Pace, o.Out = l.opts.Dir, shape, load.clients, load.backoff, load.pace, io.Discard
	o.ProbeEach = demoProbeEach
	s, err := NewStorm(b.Context(), o)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	ours := func(args ...string) []string {
		return append([]string{halligan, "--socket", l.Socket(0), "--reason", "benchmark", "--yes"}, args...)
	}
	away := func(args ...string) []string {
		return append([]string{halligan, "--bundle", filepath.Join(l.opts.Dir, "bundle"), "--identity", filepath.Join(l.opts.Dir, "ids", "responder"),
			"--node", "cp-1", "--reason", "benchmark", "--yes"}, args...)
	}
	kubectl := func(config string, replicas int) []string {
		return append(l.Kube().Kubectl(), "--kubeconfig", config, "--request-timeout", unhurried.kubectl.String(),
			"scale", "deployment/checkout", "-n", victimNamespace, fmt.Sprint("--replicas=", replicas))
	}
	scale := func(n int) []string {
		return []string{"scale", "deploy/web", "-n", victimNamespace, "--to", fmt.Sprint(2 + n%2)}
	}
	var calmOurs, calmAway, calmVictim tries
	for i := range 10 {
		calmOurs.run(b.Context(), ours(scale(i)...))
		calmAway.run(b.Context(), away(scale(i+1)...))
		calmVictim.run(b.Context(), kubectl(s.VictimKubeconfig(), 2+i%2))
	}
	time.Sleep(3 * time.Second)
	calm := s.victim.began(time.Now().Add(-3*time.Second), time.Now())
	bar := max(2*calm.P99, reliefFloor)

	if err := s.Begin(b.Context()); err != nil {
		b.Fatal(err)
	}
	time.Sleep(unhurried.storm)
	ctx, cancel := context.WithCancel(b.Context())
	var mine, far, victim, ruler tries
	var others sync.WaitGroup
	for config, r := range map[string]*tries{s.VictimKubeconfig(): &victim, l.Kube().AdminKubeconfig(): &ruler} {
		others.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				r.run(ctx, kubectl(config, 2+i%2))
			}
		})
	}
	tick := time.NewTicker(stormEach)
	for i := range stormTries {
		mine.run(b.Context(), ours(scale(i)...))
		far.run(b.Context(), away(scale(i+1)...))
		<-tick.C
	}
	tick.Stop()
	cancel()
	others.Wait()

	first := time.Now()
	by := "revoke"
	var rescue tries
	rescue.run(b.Context(), ours("revoke", offender))
	began := time.Now()
	relief, _, err := s.victim.calm(b.Context(), bar, reliefSpan, 20*time.Second)
	if err != nil {
		by = "scale"
		rescue.run(b.Context(), ours("scale", "ds/"+offenderName, "-n", offenderNamespace, "--to", "0"))
		began = time.Now()
		if relief, _, err = s.victim.calm(b.Context(), bar, reliefSpan, 2*time.Minute); err != nil {
			b.Fatal(err)
		}
	}
	relief += began.Sub(first)
	for what, r := range map[string]*tries{"calm, at the console": &calmOurs, "calm, through a bastion": &calmAway, "at the console": &mine, "through a bastion": &far, "in the rescue": &rescue} {
		if r.failed > 0 {
			b.Errorf("halligan %s failed %d of %d times", what, r.failed, len(r.took))
		}
	}
	ratio := func(other, ours time.Duration) float64 { return float64(other) / float64(max(ours, 1)) }
	fmt.Printf("\nstorm %s (%s)\n  halligan scale at the console: %s, calm p50 %s; bar p99 %s\n  through a bastion: %s, calm p50 %s\n  kubectl scale of the victim: %s, calm p50 %s: ratio p50 %.0f, p99 %.0f\n"+
		"  kubectl scale of the administrator: %s: ratio p50 %.0f, p99 %.0f\n  from the first command to relief (p99 below %s): %s, with %s\n",
		shape, load.told, &mine, short(calmOurs.at(50)), short(stormBar), &far, short(calmAway.at(50)), &victim, short(calmVictim.at(50)), ratio(victim.at(50), mine.at(50)), ratio(victim.at(99), mine.at(99)),
		&ruler, ratio(ruler.at(50), mine.at(50)), ratio(ruler.at(99), mine.at(99)), short(bar), short(relief), by)
	b.ReportMetric(float64(mine.at(99).Milliseconds()), "p99-ms")
	b.ReportMetric(float64(far.at(99).Milliseconds()), "bastion-p99-ms")
	b.ReportMetric(ratio(victim.at(50), mine.at(50)), "victim/ours")
	b.ReportMetric(0, "ns/op")
}
