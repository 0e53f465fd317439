package ca

import (
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// TestSerialsAreGivenOutOnce: not twice at a time, not when the clock falls back,
// and not from a folder that was taken back from a copy.
func TestSerialsAreGivenOutOnce(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	dir := filepath.Join(t.TempDir(), "ca")
	if err := Init(dir, InitOptions{Fleet: "acme", Roots: 1, Now: now}); err != nil {
		t.Fatal(err)
	}
	f := func(now time.Time) *Folder { return &Folder{dir: dir, now: func() time.Time { return now }} }
	var mu sync.Mutex // guards seen
	seen := map[uint64]bool{}
	give := func(now time.Time) uint64 {
		n, err := f(now).serial()
		mu.Lock()
		defer mu.Unlock()
		if err != nil || n == 0 || seen[n] {
			t.Errorf("serial %d, %v", n, err)
		}
		seen[n] = true
		return n
	}
	if first := give(now); first != uint64(now.Unix()) {
		t.Errorf("the first is %d", first)
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 5 {
				give(now)
			}
		})
	}
	all.Wait()
	last := give(now.Add(-time.Hour))
	give(time.Unix(-5, 0))
	if later := give(now.Add(time.Hour)); later != uint64(now.Add(time.Hour).Unix()) || later <= last {
		t.Errorf("an hour later: %d", later)
	}
}

func TestHours(t *testing.T) {
	for d, want := range map[time.Duration]string{0: "0h", time.Minute: "1m", time.Hour: "1h", 90 * time.Minute: "1h30m", 24 * time.Hour: "24h", 168 * time.Hour: "168h",
		90 * 24 * time.Hour: "90 days", 59*time.Minute + 59*time.Second: "1h"} {
		if got := hours(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
}
