package diagnose

import (
	"fmt"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/trust"
)

// inEnv has the process of TestAlone count what is in the etcd of another.
const inEnv = "HALLIGAN_TEST_CENSUS"

// TestAlone is the other process of BenchmarkCensus. It prints how long it took, in
// seconds, and the most memory that it had resident, in KiB, before and after.
func TestAlone(t *testing.T) {
	words := strings.Fields(os.Getenv(inEnv))
	if len(words) != 5 {
		t.Skip("is run by a benchmark")
	}
	debug.SetGCPercent(50) // as the agent does
	client, err := etcd.Open(etcd.Config{Endpoints: words[:1], CAFile: words[1], CertFile: words[2], KeyFile: words[3]})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	encryption := storage.OpenEncryption("")
	defer encryption.Close()
	s := &stage{t: t, Diagnoser: New(Options{Etcd: client, Encryption: encryption, Policy: trust.Default})}
	before, began := resident(t), time.Now()
	found, _ := s.top(&halliganv1.TopRequest{By: []string{"objects", "bytes"}, Sample: words[4] == "true"})
	fmt.Printf("CENSUS %f %d %d %.0f\n", time.Since(began).Seconds(), before, resident(t), found["objects"].GetTotal())
}

// resident is the most memory that this process had, in KiB.
func resident(t *testing.T) (n int) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// BenchmarkCensus counts 100,000 objects in a process of its own, beside etcdctl that
// reads them to nowhere.
func BenchmarkCensus(b *testing.B) {
	etcdctl := os.Getenv("HALLIGAN_ETCDCTL")
	if etcdctl == "" {
		b.Skip("HALLIGAN_ETCDCTL names no etcdctl: run make bench")
	}
	s := newStage(b)
	const objects, each = 100_000, 100
	for i := 0; i < objects; i += each {
		var ops []clientv3.Op
		for j := i; j < i+each; j++ {
			m := controlled(metav1.ObjectMeta{Namespace: fmt.Sprintf("ns-%d", j%50), Name: fmt.Sprintf("map-%d", j)}, "apps/v1", "DaemonSet", "collector", "uid-1")
			ops = append(ops, clientv3.OpPut("/registry/configmaps/"+m.Namespace+"/"+m.Name, stored(b, &corev1.ConfigMap{ObjectMeta: m, Data: map[string]string{"k": strings.Repeat("x", 700)}})))
		}
		if _, err := s.raw.Txn(b.Context()).Then(ops...).Commit(); err != nil {
			b.Fatal(err)
		}
	}
	reference := func() time.Duration {
		cmd := exec.CommandContext(b.Context(), etcdctl, "--endpoints="+s.cluster.Endpoints()[0], "--cacert="+s.cluster.CAFile(), "--cert="+s.cluster.CertFile(), "--key="+s.cluster.KeyFile(),
			"--command-timeout=60s", "get", "--prefix", "/registry/")
		began := time.Now()
		if err := cmd.Run(); err != nil { // its output goes nowhere
			b.Fatal(err)
		}
		return time.Since(began)
	}
	look := func(sample bool) (seconds float64, resident int) {
		cmd := exec.CommandContext(b.Context(), os.Args[0], "-test.run=^TestAlone$")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %s %s %v", inEnv, s.cluster.Endpoints()[0], s.cluster.CAFile(), s.cluster.CertFile(), s.cluster.KeyFile(), sample))
		out, err := cmd.Output()
		_, line, _ := strings.Cut(string(out), "CENSUS ")
		var before, count int
		if _, serr := fmt.Sscan(line, &seconds, &before, &resident, &count); err != nil || serr != nil || count != objects {
			b.Fatalf("%v, %v: %s", err, serr, out)
		}
		return seconds, resident
	}
	reference()
	for b.Loop() {
		raw := reference()
		whole, memory := look(false)
		part, _ := look(true)
		b.ReportMetric(whole/raw.Seconds(), "x-etcdctl")
		b.ReportMetric(part/raw.Seconds(), "x-etcdctl-sampled")
		b.ReportMetric(float64(memory)/(1<<10), "resident-MiB")
		b.ReportMetric(raw.Seconds(), "etcdctl-s")
	}
}
