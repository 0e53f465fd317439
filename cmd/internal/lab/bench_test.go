package lab

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/halligan-io/halligan/agent/storage"
)

// BenchmarkConsole measures the real binaries on a lab of three members that
// holds 100,000 pods: the agent at rest, a cold start of the command, and an
// inventory. Times count only beside the reference of the same run.
func BenchmarkConsole(b *testing.B) {
	x := startBench(b)
	x.seedPods(b)
	b.Run("AtRest", x.atRest)
	b.Run("ColdStart", x.coldStart)
	b.Run("Inventory", x.inventory)
}

const (
	benchPods = 100_000
	// benchRounds alternate between ours and the reference.
	benchRounds = 5
)

type bench struct {
	lab      *Lab
	pid      int      // of the agent on cp-1
	halligan []string // command and console of cp-1
	etcdctl  []string // command, endpoint of cp-1's member and credentials
}

// startBench uses the binaries in bin/ and the etcdctl that the Makefile names.
func startBench(b *testing.B) *bench {
	bin, err := filepath.Abs("../../../bin")
	if err != nil {
		b.Fatal(err)
	}
	etcdctl := os.Getenv("HALLIGAN_ETCDCTL")
	if etcdctl == "" {
		b.Skip("HALLIGAN_ETCDCTL names no etcdctl: run make bench")
	}
	for _, file := range []string{filepath.Join(bin, "halligan-agent"), filepath.Join(bin, "halligan"), etcdctl} {
		if _, err := os.Stat(file); err != nil {
			b.Fatalf("run make bench: %v", err)
		}
	}
	dir := filepath.Join(b.TempDir(), "lab")
	l, err := Up(b.Context(), Options{Dir: dir, Net: network(), Agent: []string{filepath.Join(bin, "halligan-agent")}, Bastion: []string{filepath.Join(bin, "halligan-bastion")}, Halligan: []string{filepath.Join(bin, "halligan")}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	c := l.Cluster()
	return &bench{lab: l, pid: processOf(b, filepath.Join(dir, nodeName(0), "agent.yaml")),
		halligan: append(slices.Clone(l.opts.Halligan), "--socket", l.Socket(0)),
		etcdctl:  []string{etcdctl, "--endpoints", "https://" + c.Endpoints()[0], "--cacert", c.CAFile(), "--cert", c.CertFile(), "--key", c.KeyFile()}}
}

// processOf returns the process with the argument.
func processOf(b *testing.B, argument string) int {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		b.Fatal(err)
	}
	for _, f := range files {
		line, err := os.ReadFile(f)
		if err == nil && slices.Contains(strings.Split(string(line), "\x00"), argument) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			if err != nil {
				b.Fatal(err)
			}
			return pid
		}
	}
	b.Fatalf("no process has the argument %s", argument)
	return 0
}

// seedPods writes the pods of a cluster that has many more objects, and nothing
// else.
func (x *bench) seedPods(b *testing.B) {
	cli, err := x.lab.Cluster().Client()
	if err != nil {
		b.Fatal(err)
	}
	defer cli.Close()
	w := seedWriter{cli: cli, catalogue: storage.NewCatalogue()}
	pods := 0
	var batch []item
	flush := func() {
		if err := w.write(b.Context(), batch); err != nil {
			b.Fatal(err)
		}
		batch = nil
	}
	population(100*benchPods, 100, func(i item) bool {
		if i.kind != "Pod" {
			return true
		}
		pods++
		if batch = append(batch, i); len(batch) == seedOps {
			flush()
		}
		return pods < benchPods
	})
	flush()
	if pods != benchPods {
		b.Fatalf("%d pods", pods)
	}
}

// timed runs a command to its end, its output to nowhere.
func timed(b *testing.B, argv []string) time.Duration {
	cmd := exec.CommandContext(b.Context(), argv[0], argv[1:]...)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	began := time.Now()
	if err := cmd.Run(); err != nil {
		b.Fatalf("%s: %v: %s", argv, err, complaint.String())
	}
	return time.Since(began)
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// beside runs both in turn and returns the medians.
func (x *bench) beside(b *testing.B, rounds int, ours, reference []string) (o, r time.Duration) {
	var mine, theirs []time.Duration
	for range rounds {
		mine = append(mine, timed(b, ours))
		theirs = append(theirs, timed(b, reference))
	}
	return median(mine), median(theirs)
}

// inventory: all pods as a table, beside etcdctl that reads the same keys and
// decodes nothing. Bars: 1.5 times its time, and 64 MiB in the agent.
func (x *bench) inventory(b *testing.B) {
	ours := append(slices.Clone(x.halligan), "get", "pods", "-A")
	out, err := exec.CommandContext(b.Context(), ours[0], ours[1:]...).Output()
	if err != nil {
		b.Fatal(err)
	}
	if n := bytes.Count(out, []byte("\n")); n != benchPods+1 {
		b.Fatalf("the table has %d lines", n)
	}
	x.forgetPeak(b)
	o, r := x.beside(b, benchRounds, ours, append(slices.Clone(x.etcdctl), "get", "--prefix", "/registry/pods/"))
	fmt.Printf("\ninventory of %d pods: halligan get %.0f ms, etcdctl get --prefix %.0f ms: ratio %.2f, bar 1.50; the agent's peak meanwhile %.1f MiB resident, bar 64\n",
		benchPods, ms(o), ms(r), ms(o)/ms(r), x.memory(b, "VmHWM"))
	b.ReportMetric(ms(o)/ms(r), "ratio")
	b.ReportMetric(0, "ns/op")
}

// coldStart: two whole processes that each ask one member how it is.
func (x *bench) coldStart(b *testing.B) {
	o, r := x.beside(b, 50, append(slices.Clone(x.halligan), "status"), append(slices.Clone(x.etcdctl), "endpoint", "status"))
	fmt.Printf("\ncold start, p50: halligan status %.1f ms, etcdctl endpoint status %.1f ms: ratio %.2f, no bar\n", ms(o), ms(r), ms(o)/ms(r))
	b.ReportMetric(ms(o)/ms(r), "ratio")
	b.ReportMetric(0, "ns/op")
}

// atRest: what an agent costs that nobody uses.
func (x *bench) atRest(b *testing.B) {
	const watch = 10 * time.Second
	time.Sleep(2 * time.Second) // what the start left over
	before := x.cpu(b)
	time.Sleep(watch)
	used := (x.cpu(b) - before).Seconds() / watch.Seconds() * 100
	fmt.Printf("\nagent at rest: %.1f MiB anonymous, bar 24; %.1f MiB resident, bar 64; %.2f %% of a core over %s, bar 0.50\n",
		x.memory(b, "RssAnon"), x.memory(b, "VmRSS"), used, watch)
	b.ReportMetric(x.memory(b, "RssAnon"), "MiB")
	b.ReportMetric(0, "ns/op")
}

// forgetPeak makes the agent's VmHWM what it has now (proc_pid_clear_refs(5)).
func (x *bench) forgetPeak(b *testing.B) {
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", x.pid), []byte("5"), 0); err != nil {
		b.Fatal(err)
	}
}

// memory returns a line of the agent's /proc/PID/status in MiB.
func (x *bench) memory(b *testing.B, what string) float64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", x.pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); f[0] == what+":" {
			kib, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				b.Fatal(err)
			}
			return kib / 1024
		}
	}
	b.Fatalf("no %s", what)
	return 0
}

// cpu returns how long the agent has run.
func (x *bench) cpu(b *testing.B) time.Duration {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", x.pid))
	if err != nil {
		b.Fatal(err)
	}
	// Behind the name, which may hold anything, utime and stime are the fields
	// 12 and 13, in ticks of 10 ms (proc_pid_stat(5)).
	_, rest, _ := strings.Cut(string(stat), ") ")
	f := strings.Fields(rest)
	var sum time.Duration
	for _, ticks := range f[11:13] {
		n, err := strconv.ParseInt(ticks, 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		sum += time.Duration(n) * 10 * time.Millisecond
	}
	return sum
}
