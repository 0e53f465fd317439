package ledger

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/halligan-io/halligan/audit"
)

// BenchmarkAppend compares an event that is durable with a bare write and sync of
// the same bytes, in the same run: the ratios are what counts.
func BenchmarkAppend(b *testing.B) {
	dir := b.TempDir()
	l, err := Open(Options{Dir: filepath.Join(dir, "audit"), Origin: "cp-1.prod"})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	e := audit.Event{Kind: audit.Intent, Actor: ann, Reason: strings.Repeat("r", 100), Parameters: []byte(`{"replicas":0}`), Objects: []audit.Object{{Key: "/registry/deployments/telemetry/collector", UID: "u", RevisionBefore: 1}}}
	bare, err := os.OpenFile(filepath.Join(dir, "bare"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	defer bare.Close()
	ring := make([]byte, 8<<20)
	if _, err := bare.Write(ring); err != nil {
		b.Fatal(err)
	}
	if err := bare.Sync(); err != nil {
		b.Fatal(err)
	}
	data, err := encode(e)
	if err != nil {
		b.Fatal(err)
	}
	record := make([]byte, recordSize(len(data)+200))
	var ours, theirs []time.Duration
	for i := 0; b.Loop(); i++ {
		start := time.Now()
		if _, err := l.Append(b.Context(), e); err != nil {
			b.Fatal(err)
		}
		ours = append(ours, time.Since(start))
		start = time.Now()
		if _, err := bare.WriteAt(record, int64(i*len(record)%(len(ring)-len(record)))); err != nil {
			b.Fatal(err)
		}
		if err := unix.Fdatasync(int(bare.Fd())); err != nil {
			b.Fatal(err)
		}
		theirs = append(theirs, time.Since(start))
	}
	at := func(all []time.Duration, part float64) time.Duration {
		all = slices.Sorted(slices.Values(all))
		return all[min(len(all)-1, int(part*float64(len(all))))]
	}
	b.ReportMetric(float64(at(ours, 0.5))/float64(at(theirs, 0.5)), "p50/bare")
	b.ReportMetric(float64(at(ours, 0.99))/float64(at(theirs, 0.99)), "p99/bare")
	b.ReportMetric(float64(at(ours, 0.5).Microseconds()), "p50-µs")
	b.ReportMetric(float64(at(theirs, 0.5).Microseconds()), "bare-p50-µs")
}

// BenchmarkAppenders has many at once, which share syncs.
func BenchmarkAppenders(b *testing.B) {
	l, err := Open(Options{Dir: filepath.Join(b.TempDir(), "audit"), Origin: "cp-1.prod"})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	const appenders, each = 32, 8
	n := 0
	start := time.Now()
	for b.Loop() {
		var all sync.WaitGroup
		for range appenders {
			all.Go(func() {
				for range each {
					if _, err := l.Append(b.Context(), audit.Event{Kind: audit.Intent, Actor: ann}); err != nil {
						b.Error(err)
					}
				}
			})
		}
		all.Wait()
		n += appenders * each
	}
	b.ReportMetric(float64(n)/time.Since(start).Seconds(), "events/s")
}
