package action

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/etcdcluster"
)

func synced(o *etcdcluster.Options) { o.UnsafeNoFsync = false }

func p50(d []time.Duration) float64 {
	slices.Sort(d)
	return float64(d[len(d)/2].Microseconds()) / 1000
}

// nowhere is no log at all, to tell what a log costs.
type nowhere struct{}

func (nowhere) Append(context.Context, audit.Event) (audit.Receipt, error) {
	return audit.Receipt{ID: "none"}, nil
}
func (nowhere) Note(audit.Event)                        {}
func (nowhere) Reserve(audit.Event) (audit.Room, error) { return nowhere{}, nil }
func (nowhere) Release()                                {}
func (nowhere) Hash([]byte) string                      { return "" }
func (nowhere) State() audit.State                      { return audit.State{} }

// BenchmarkScale: one surgical scale on three members that fsync, with the evidence
// log and without one, beside the sum of its unavoidable parts, all in turn: etcd Get,
// two fsynced local writes, a compare-and-swap and a Get, with etcd's bare client. Bar:
// 1.5 times.
func BenchmarkScale(b *testing.B) {
	l := newLab(b, 3, synced)
	key := l.put(collector())
	ctx := context.Background()
	dir := filepath.Join(b.TempDir(), "raw")
	if err := durable.Dir(dir); err != nil {
		b.Fatal(err)
	}
	log, err := ledger.Open(ledger.Options{Dir: filepath.Join(b.TempDir(), "audit"), Origin: "cp-1"})
	if err != nil {
		b.Fatal(err)
	}
	defer log.Close()
	local := func(data []byte) {
		f, err := os.OpenFile(filepath.Join(dir, "record"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err == nil {
			_, err = f.Write(data)
		}
		if err == nil {
			err = f.Sync()
		}
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	var parts []time.Duration
	type timings struct {
		apply, both []time.Duration
		phases      map[string]float64
	}
	ways := []struct {
		name string
		log  audit.Log
		timings
	}{{"with the evidence log", log, timings{phases: map[string]float64{}}}, {"without it", nowhere{}, timings{phases: map[string]float64{}}}}
	to := 0
	const rounds = 200
	for i := range rounds + 10 {
		began := time.Now()
		r, err := l.raw.Get(ctx, key)
		if err != nil {
			b.Fatal(err)
		}
		local(r.Kvs[0].Value)
		if _, err := l.raw.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", r.Kvs[0].ModRevision)).Then(clientv3.OpPut(key, string(r.Kvs[0].Value))).Commit(); err != nil {
			b.Fatal(err)
		}
		local([]byte("done"))
		if _, err := l.raw.Get(ctx, key); err != nil {
			b.Fatal(err)
		}
		if i >= 10 {
			parts = append(parts, time.Since(began))
		}
		for w := range ways {
			way := &ways[w]
			l.engine.audit = way.log
			began = time.Now()
			p, err := l.engine.Plan(ctx, responder, &halliganv1.PlanRequest{Action: "scale", Reason: "bench",
				Parameters: parameters(b, map[string]any{"target": "ds/collector", "namespace": "telemetry", "to": to})})
			if err != nil {
				b.Fatal(err)
			}
			planned := time.Now()
			res := l.engine.Apply(ctx, responder, toApply(p), nil)
			if res.Result != resultApplied {
				b.Fatal(res.Error)
			}
			if i >= 10 {
				for phase, took := range res.TimingsMs {
					way.phases[phase] += took / rounds
				}
				way.apply, way.both = append(way.apply, time.Since(planned)), append(way.both, time.Since(began))
			}
			to = 1 - to
		}
	}
	r := p50(parts)
	fmt.Printf("\nscale on the agent, p50 of %d; its unavoidable parts %.2f ms; bar 1.50\n", rounds, r)
	for _, way := range ways {
		a, w := p50(way.apply), p50(way.both)
		fmt.Printf("  %s: plan and apply %.2f ms, apply %.2f ms: ratio %.2f (apply alone %.2f); mean ms by phase:", way.name, w, a, w/r, a/r)
		for _, phase := range slices.Sorted(maps.Keys(way.phases)) {
			fmt.Printf(" %s %.2f", phase, way.phases[phase])
		}
		fmt.Println()
	}
	b.ReportMetric(p50(ways[0].both)/r, "ratio")
	b.ReportMetric(p50(ways[1].both)/r, "ratio-without-log")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkDelete: runaway objects deleted, each with its before-image, beside
// bare single-key deletions of the same number by etcd's client, as many at once
// and without any record. (kubectl delete, the reference of the design, needs
// the API server of the lab's second half.)
func BenchmarkDelete(b *testing.B) {
	const many = 5000
	l := newLab(b, 3, synced)
	seed := func() {
		plain := func(i int) (string, []byte) {
			cm := &corev1.ConfigMap{ObjectMeta: labelled("telemetry", fmt.Sprintf("run-%05d", i), "app", "runaway"), Data: map[string]string{"n": fmt.Sprint(i), "pad": string(make([]byte, 512))}}
			cm.UID = types.UID(fmt.Sprint("uid-", i))
			data, err := storage.EncodeTyped(cm)
			if err != nil {
				b.Fatal(err)
			}
			return "/registry/configmaps/telemetry/" + cm.Name, data
		}
		for i := 0; i < many; i += 100 {
			var ops []clientv3.Op
			for j := i; j < i+100; j++ {
				k, v := plain(j)
				ops = append(ops, clientv3.OpPut(k, string(v)))
			}
			if _, err := l.raw.Txn(context.Background()).Then(ops...).Commit(); err != nil {
				b.Fatal(err)
			}
		}
	}
	seed()
	began := time.Now()
	var wg sync.WaitGroup
	next := make(chan int)
	for range 32 {
		wg.Go(func() {
			for i := range next {
				if _, err := l.raw.Delete(context.Background(), fmt.Sprintf("/registry/configmaps/telemetry/run-%05d", i)); err != nil {
					b.Error(err)
				}
			}
		})
	}
	for i := range many {
		next <- i
	}
	close(next)
	wg.Wait()
	raw := many / time.Since(began).Seconds()

	seed()
	began = time.Now()
	p, err := l.engine.Plan(context.Background(), responder, &halliganv1.PlanRequest{Action: "delete", Reason: "bench",
		Parameters: parameters(b, map[string]any{"target": "cm", "namespace": "telemetry", "selector": "app=runaway"})})
	if err != nil {
		b.Fatal(err)
	}
	planned := time.Since(began)
	res := l.engine.Apply(context.Background(), responder, toApply(p), nil)
	if res.Result != resultApplied {
		b.Fatal(res.Error)
	}
	took := time.Since(began)
	rate := many / took.Seconds()
	fmt.Printf("\ndelete of %d objects, each with its before-image: %.0f/s (planned in %.0f ms); bare etcd deletions, 32 at once and without a record: %.0f/s: ratio %.2f, no bar; the bar of 10.00 is against kubectl delete, which needs the API server of a kube lab and is not measured here yet\n",
		many, rate, float64(planned.Milliseconds()), raw, rate/raw)
	b.ReportMetric(rate/raw, "ratio")
	b.ReportMetric(0, "ns/op")
}
