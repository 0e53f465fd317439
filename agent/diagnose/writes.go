package diagnose

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/internal/fault"
)

var writesRow = Row{
	Name: "writes", Title: "writes to etcd, by kind, namespace and owner", Unit: "writes/s",
	Timeout: (maxSeconds + 5) * time.Second, Memory: "8192 sums, and what etcd sends faster than it is counted, for at most the time of the watch",
	Blind: []string{"reads, and writes that were refused: both leave no trace in etcd", "who deletes, and who writes what has no owner: a field manager is only what a client calls itself"},
	look:  lookAtWrites,
}

// opened is how many values a second are opened to find owner and field manager;
// of the others the key is counted, and they are taken to be like those.
const opened = 2000

func (s *scene) watchFor(ctx context.Context) (context.Context, context.CancelFunc) {
	wait := s.watch
	if until, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(until)-time.Second) // to look owners up
	}
	return context.WithTimeout(ctx, max(wait, 0))
}

func lookAtWrites(ctx context.Context, s *scene) (*finding, error) {
	cat := s.kinds(ctx)
	wctx, cancel := s.watchFor(ctx)
	defer cancel()
	t := newTally()
	var began time.Time
	var once sync.Once
	var total, passed, second, odd, sealed, strange int
	var clock time.Time
	err := s.d.o.Etcd.Watch(wctx, root(s.d.o.Prefix), func() { once.Do(func() { began = time.Now() }) }, func(c etcd.Change) {
		total++
		k, ns, _, err := cat.ByKey(s.d.o.Prefix, c.Key)
		if err != nil {
			strange++
			t.at(heap{kind: unknownKind}).count++
			return
		}
		h := heap{kind: k, namespace: ns}
		if now := time.Now(); now.Sub(clock) >= time.Second {
			clock, second = now, 0
		}
		manager := ""
		switch {
		case c.Deleted: // there is no value
		case second >= opened:
			passed++
		case bytes.HasPrefix(c.Value, sealedPrefix):
			sealed++
		default:
			second++
			obj, err := storage.Decode(c.Value)
			if err != nil {
				odd++
				break
			}
			h.owner, manager = controllerOf(&obj.Meta), managerOf(obj)
		}
		p := t.at(h)
		p.count++
		p.bytes += float64(len(c.Value))
		if manager != "" {
			p.manager = strings.Clone(manager)
		}
	})
	if err != nil {
		return nil, err
	}
	if began.IsZero() {
		return nil, fault.New(fault.Unreachable, "look at etcd with: halligan status", "etcd did not begin to watch in time")
	}
	seconds := max(time.Since(began).Seconds(), 0.001)
	f := &finding{total: float64(total) / seconds, blind: s.elsewhere()}
	if passed > 0 {
		f.sampled = fmt.Sprintf("%d of %d writes were counted by their key alone", passed, total)
	}
	for _, b := range []struct {
		n   int
		why string
	}{{sealed, "the owners in %d encrypted values, which are not opened"}, {odd, "the owners in %d values that cannot be read"}, {strange, "what %d writes of no known kind are about"}} {
		if b.n > 0 {
			f.blind = append(f.blind, fmt.Sprintf(b.why, b.n))
		}
	}
	by := func(p *pile) float64 { return p.count / seconds }
	for _, m := range s.merge(ctx, t.sorted(by), by) {
		f.rows = append(f.rows, m.row())
		if share := m.value / f.total; share >= 0.05 && m.kind != unknownKind {
			f.leads = append(f.leads, m.lead(0.8*share*min(1, m.value/50), fmt.Sprintf("%.1f writes/s are to %s, %s of all", m.value, m.where(), percent(m.value, f.total))))
		}
	}
	return f, nil
}
