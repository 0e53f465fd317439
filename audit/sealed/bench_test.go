package sealed_test

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"filippo.io/age"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit/sealed"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// BenchmarkSeal seals the record of one object of 4 KiB to an agent and three offline
// keys, beside a durable write of the same bytes. It runs beside the effect.
func BenchmarkSeal(b *testing.B) {
	policy := &bundle.Bundle{Policy: &bundle.Policy{}}
	for range 3 {
		key, err := age.GenerateX25519Identity()
		if err != nil {
			b.Fatal(err)
		}
		policy.Policy.Recovery = append(policy.Policy.Recovery, bundle.Recipient{X25519Recipient: key.Recipient()})
	}
	policy.Revocations, policy.Inventory = &bundle.Revocations{}, &bundle.Inventory{}
	dir := filepath.Join(b.TempDir(), "audit")
	store, err := sealed.Open(sealed.Options{Dir: dir, Server: "cp-1.prod", Bundle: func() *bundle.Bundle { return policy }})
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	value := bytes.Repeat([]byte("0123456789abcdef"), 256)
	record, err := io.ReadAll(recordOf(&halliganv1.Plan{Id: action}, string(value)))
	if err != nil {
		b.Fatal(err)
	}
	var bare time.Duration
	for b.Loop() {
		if _, err := store.Seal(action, bytes.NewReader(record)); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		began := time.Now()
		if err := durable.Write(filepath.Join(dir, "bare"), record); err != nil {
			b.Fatal(err)
		}
		bare += time.Since(began)
		b.StartTimer()
	}
	b.ReportMetric(float64(b.Elapsed())/float64(bare), "x-bare-write")
	if st, err := os.Stat(filepath.Join(dir, "sealed", action+".age")); err == nil {
		b.ReportMetric(float64(st.Size())/float64(len(record)), "x-bytes")
	}
}
