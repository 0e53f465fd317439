package alarm

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/time/rate"

	"github.com/halligan-io/halligan/internal/neutral"
)

// Options of the alarms of one daemon.
type Options struct {
	Node, Cluster string
	Sinks         []Config
	// Log gets every event too.
	Log zerolog.Logger
}

// Bounds. An attacker who causes events must neither fill a queue with them nor
// bury others: each kind has a rate of its own, and so have strangers.
const (
	queueLength = 256
	quietLength = 192 // of it, what logins and refusals may fill
	sameWithin  = 10 * time.Second
	maxSame     = 1024 // events that are remembered to be known again
	burst       = 30   // of one kind, then one in a second
	loudBurst   = 60
)

// How long a sink is tried again for one event, and how long in between.
const (
	quietPatience = time.Minute
	loudPatience  = 15 * time.Minute
	firstPause    = time.Second
	longestPause  = 30 * time.Second
	// closeGrace is how long Close waits for what is queued.
	closeGrace = 3 * time.Second
)

// Alarms sends events to every sink. Its methods may be called concurrently.
type Alarms struct {
	node, cluster string
	log           zerolog.Logger
	queues        []*queue
	dropped       atomic.Uint64
	closing       chan struct{}
	grace         context.Context // of sending; ends some time after closing
	end           context.CancelFunc
	workers       sync.WaitGroup

	mu     sync.Mutex // guards all below
	done   bool
	same   map[string]time.Time
	gates  map[string]*gate
	raised map[Kind]uint64
}

// gate bounds one kind of events.
type gate struct {
	limit  *rate.Limiter
	unsaid uint64
}

// queue is what waits for one sink.
type queue struct {
	sink   sink
	events chan Event
	failed atomic.Bool
}

// Open starts the sinks. It does not wait for any of them to answer.
func Open(o Options) (*Alarms, error) {
	a := &Alarms{node: o.Node, cluster: o.Cluster, log: o.Log, closing: make(chan struct{}), same: map[string]time.Time{}, gates: map[string]*gate{}, raised: map[Kind]uint64{}}
	// The log, too, may be a pipe that nobody reads.
	a.queues = []*queue{{sink: logSink{o.Log}, events: make(chan Event, queueLength)}}
	for i, c := range o.Sinks {
		s, err := c.open()
		if err != nil {
			return nil, fmt.Errorf("alarms[%d]: %w", i, err)
		}
		a.queues = append(a.queues, &queue{sink: s, events: make(chan Event, queueLength)})
	}
	a.grace, a.end = context.WithCancel(context.Background())
	for _, q := range a.queues {
		a.workers.Go(func() { a.work(q) })
	}
	return a, nil
}

// Raise tells the log and every sink of the event. It does not block.
func (a *Alarms) Raise(e Event) {
	e = e.neutralised()
	e.Node, e.Cluster, e.Loud = a.node, a.cluster, e.Kind.Loud()
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	a.mu.Lock()
	defer a.mu.Unlock() // also keeps Close from closing the queues meanwhile
	a.raised[e.Kind]++
	if a.done || !a.pass(&e) {
		return
	}
	for _, q := range a.queues {
		if !e.Loud && len(q.events) >= quietLength {
			a.dropped.Add(1)
			continue
		}
		select {
		case q.events <- e:
		default:
			a.dropped.Add(1)
		}
	}
}

// pass holds back what was just told or is too much, and counts it; a.mu is
// held.
func (a *Alarms) pass(e *Event) bool {
	source, _, err := net.SplitHostPort(e.Source)
	if err != nil {
		source = e.Source
	}
	// Strangers, who cost nothing, must not bury those who are known.
	class, most := string(e.Kind), burst
	if e.Person == "" {
		class += " of strangers"
	}
	key := strings.Join([]string{class, e.Person, e.Role, e.Door, e.Fingerprint, e.Serial, source}, "\x00")
	if e.Loud {
		most, key = loudBurst, key+"\x00"+e.Text
	}
	g := a.gates[class]
	if g == nil {
		g = &gate{limit: rate.NewLimiter(1, most)}
		a.gates[class] = g
	}
	now := time.Now()
	if last, was := a.same[key]; was && now.Sub(last) < sameWithin || !g.limit.AllowN(now, 1) {
		g.unsaid++
		return false
	}
	if len(a.same) >= maxSame {
		clear(a.same)
	}
	a.same[key] = now
	e.Unsaid, g.unsaid = g.unsaid, 0
	return true
}

// Raised counts the events of a kind, those that were held back included.
func (a *Alarms) Raised(k Kind) uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.raised[k]
}

// Dropped counts the events that a sink did not get.
func (a *Alarms) Dropped() uint64 { return a.dropped.Load() }

// Failing names the sinks that did not take the last event.
func (a *Alarms) Failing() (names []string) {
	for _, q := range a.queues {
		if q.failed.Load() {
			names = append(names, q.sink.String())
		}
	}
	return names
}

// Close sends what is queued, for a few seconds at most.
func (a *Alarms) Close() {
	a.mu.Lock()
	if !a.done {
		a.done = true
		close(a.closing)
		for _, q := range a.queues {
			close(q.events)
		}
	}
	a.mu.Unlock()
	late := time.AfterFunc(closeGrace, a.end)
	a.workers.Wait()
	late.Stop()
	a.end()
}

func (a *Alarms) work(q *queue) {
	for e := range q.events {
		if err := a.deliver(q, e); err != nil {
			a.dropped.Add(1)
			a.log.Error().Str("sink", q.sink.String()).Str("alarm", string(e.Kind)).Msg("alarm not sent: " + neutral.LineMax(err.Error(), maxText))
		}
	}
}

// deliver tries until the sink takes the event or patience is over.
func (a *Alarms) deliver(q *queue, e Event) error {
	patience, pause := quietPatience, firstPause
	if e.Loud {
		patience = loudPatience
	}
	began := time.Now()
	for {
		err := q.sink.send(a.grace, e)
		if was := q.failed.Swap(err != nil); err != nil && !was {
			a.log.Warn().Str("sink", q.sink.String()).Msg("alarms do not get through: " + neutral.LineMax(err.Error(), maxText))
		}
		if err == nil || time.Since(began)+pause > patience {
			return err
		}
		select {
		case <-a.closing:
			return err
		case <-time.After(pause):
		}
		pause = min(2*pause, longestPause)
	}
}
