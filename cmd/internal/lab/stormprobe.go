package lab

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
)

// probe asks the API server one cheap thing at a steady pace, whether or not
// the last answer has come, each time over a connection of its own, as a person
// does who runs kubectl again and again. It keeps how long each took.
type probe struct {
	name     string
	config   *rest.Config
	ask      func(context.Context, *rest.RESTClient) error
	interval time.Duration
	timeout  time.Duration

	mu      sync.Mutex // guards samples
	samples []*sample
	group   sync.WaitGroup
}

// sample is one question. While it is open, took is zero.
type sample struct {
	began time.Time
	took  time.Duration
	err   error
}

// The pace and the patience of the storm's own probes.
const (
	probeEach    = 500 * time.Millisecond
	probeTimeout = 10 * time.Second
	// probeKeep is how many samples are kept.
	probeKeep = 10_000
)

// person makes a configuration that behaves as kubectl does: without a
// client-side limit that matters, with client-go's repetitions after 429, and
// with a connection for each question.
func person(base *rest.Config, userAgent string) *rest.Config {
	c := rest.CopyConfig(base)
	c.UserAgent, c.QPS = userAgent, -1
	c.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	c.ContentType, c.AcceptContentTypes = "application/json", "application/json"
	c.WarningHandler = rest.NoWarnings{}
	return c
}

// run asks until the context ends, and waits for what is open.
func (p *probe) run(ctx context.Context) {
	tick := time.NewTicker(p.interval)
	defer tick.Stop()
	defer p.group.Wait()
	for {
		p.group.Go(func() { p.once(ctx) })
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (p *probe) once(ctx context.Context) {
	s := &sample{began: time.Now()}
	p.mu.Lock()
	if len(p.samples) == probeKeep {
		p.samples = slices.Delete(p.samples, 0, probeKeep/2)
	}
	p.samples = append(p.samples, s)
	p.mu.Unlock()
	try, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	err := p.fresh(try)
	p.mu.Lock()
	defer p.mu.Unlock()
	s.took, s.err = max(time.Since(s.began), 1), err
	if ctx.Err() != nil { // cut short by the end of the probe, which says nothing
		p.samples = slices.DeleteFunc(p.samples, func(o *sample) bool { return o == s })
	}
}

// fresh asks once over a new connection.
func (p *probe) fresh(ctx context.Context) error {
	tls, err := rest.TLSConfigFor(p.config)
	if err != nil {
		return err
	}
	transport := &http.Transport{TLSClientConfig: tls, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	wrapped, err := rest.HTTPWrappersForConfig(p.config, transport)
	if err != nil {
		return err
	}
	api, err := rest.UnversionedRESTClientForConfigAndClient(p.config, &http.Client{Transport: wrapped})
	if err != nil {
		return err
	}
	return p.ask(ctx, api)
}

// latency is how long questions took. Those that failed or were not answered in
// time count with the time that they took to fail.
type latency struct {
	N, Failed int
	P50, P99  time.Duration
	// Last is the error of the last question that failed.
	Last error
}

func (l latency) String() string {
	if l.N == 0 {
		return "not asked"
	}
	text := fmt.Sprintf("p50 %s p99 %s", short(l.P50), short(l.P99))
	if l.Failed > 0 {
		text += fmt.Sprintf(", %d of %d failed", l.Failed, l.N)
	}
	return text
}

// short rounds for people.
func short(d time.Duration) string {
	switch {
	case d >= 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	case d >= 10*time.Millisecond:
		return d.Round(time.Millisecond).String()
	}
	return d.Round(100 * time.Microsecond).String()
}

// began sums up the questions that began in the span. One that is still open
// counts with its age: it takes at least that long.
func (p *probe) began(from, to time.Time) latency {
	return p.sum(func(s *sample, _ time.Duration) bool { return !s.began.Before(from) && !s.began.After(to) })
}

// recent sums up the questions that were open at any time since from.
func (p *probe) recent(from time.Time) latency {
	return p.sum(func(s *sample, took time.Duration) bool { return !s.began.Add(took).Before(from) })
}

func (p *probe) sum(counts func(*sample, time.Duration) bool) latency {
	p.mu.Lock()
	defer p.mu.Unlock()
	var l latency
	var took []time.Duration
	for _, s := range p.samples {
		d := s.took
		if d == 0 {
			d = time.Since(s.began)
		}
		if !counts(s, d) {
			continue
		}
		if s.err != nil {
			l.Failed++
			l.Last = s.err
		}
		took = append(took, d)
	}
	if l.N = len(took); l.N > 0 {
		slices.Sort(took)
		l.P50, l.P99 = percentile(took, 50), percentile(took, 99)
	}
	return l
}

// percentile returns the nearest rank of sorted durations.
func percentile(sorted []time.Duration, p int) time.Duration {
	return sorted[max(0, (len(sorted)*p+99)/100-1)]
}

// calm waits until every question that began within some span was answered
// within the bar, and returns how long after the call that span began. It gives
// up after patience.
func (p *probe) calm(ctx context.Context, bar, span, patience time.Duration) (time.Duration, latency, error) {
	began := time.Now()
	for {
		// A question is judged once it has had the time of the bar.
		to := time.Now().Add(-bar)
		from := to.Add(-span)
		l := p.began(from, to)
		if from.After(began) && l.N > 0 && l.Failed == 0 && l.P99 <= bar {
			return from.Sub(began), l, nil
		}
		if time.Since(began) > patience {
			return 0, l, fmt.Errorf("the %s's p99 is not back under %s after %s: %s", p.name, short(bar), short(patience), l)
		}
		pause(ctx, 50*time.Millisecond)
		if ctx.Err() != nil {
			return 0, l, context.Cause(ctx)
		}
	}
}
