package action

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Pace bounds an action on many objects, so that the cure does not hurt etcd
// more than the illness: the number of writes under way follows etcd's own
// latency, additive up and multiplicative down, and a ceiling holds whatever the
// latency says.
type Pace struct {
	// PerSecond is the ceiling of writes per second; default 2000.
	PerSecond float64
	// Most writes under way at once; default 32.
	Most int
	// Latency of one write above which fewer are sent; default 50 ms.
	Latency time.Duration
}

// smallAction is the largest number of objects that are written one after the
// other, in the order of the plan.
const smallAction = 16

type pacer struct {
	limit   *rate.Limiter
	most    int
	latency time.Duration

	mu     sync.Mutex // guards all below
	freed  sync.Cond
	busy   int
	window float64
}

func (p Pace) start() *pacer {
	if p.PerSecond == 0 {
		p.PerSecond = 2000
	}
	if p.Most == 0 {
		p.Most = 32
	}
	if p.Latency == 0 {
		p.Latency = 50 * time.Millisecond
	}
	w := &pacer{limit: rate.NewLimiter(rate.Limit(p.PerSecond), p.Most), most: p.Most, latency: p.Latency, window: min(8, float64(p.Most))}
	w.freed.L = &w.mu
	return w
}

// begin waits for the turn of the next write.
func (w *pacer) begin(ctx context.Context) error {
	if err := w.limit.Wait(ctx); err != nil {
		return err
	}
	wake := context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.freed.Broadcast()
	})
	defer wake()
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.busy >= int(w.window) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		w.freed.Wait()
	}
	w.busy++
	return nil
}

// end gives the turn back and learns from how long the write took.
func (w *pacer) end(took time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.busy--
	if took > w.latency {
		w.window = max(1, w.window*0.9)
	} else {
		w.window = min(float64(w.most), w.window+1/w.window)
	}
	w.freed.Broadcast()
}
