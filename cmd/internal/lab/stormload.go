package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/utils/clock"
)

// tally counts what became of requests. Its zero value is ready for use.
type tally struct {
	offered, answered                        atomic.Int64
	unauthorized, forbidden, throttled, full atomic.Int64 // 401, 403, 429, etcd's NOSPACE
	failed                                   atomic.Int64 // any other answer
	silent                                   atomic.Int64 // no answer: timeouts and broken connections
}

// counts is a tally at one moment.
type counts struct {
	Offered, Answered, Unauthorized, Forbidden, Throttled, Full, Failed, Silent int64
}

func (t *tally) read() counts {
	return counts{t.offered.Load(), t.answered.Load(), t.unauthorized.Load(), t.forbidden.Load(), t.throttled.Load(), t.full.Load(), t.failed.Load(), t.silent.Load()}
}

func (c counts) minus(o counts) counts {
	return counts{c.Offered - o.Offered, c.Answered - o.Answered, c.Unauthorized - o.Unauthorized, c.Forbidden - o.Forbidden,
		c.Throttled - o.Throttled, c.Full - o.Full, c.Failed - o.Failed, c.Silent - o.Silent}
}

// String leaves out what did not happen.
func (c counts) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "offered %d answered %d", c.Offered, c.Answered)
	for _, other := range []struct {
		name string
		n    int64
	}{{"401", c.Unauthorized}, {"403", c.Forbidden}, {"429", c.Throttled}, {"no-space", c.Full}, {"other", c.Failed}, {"no-answer", c.Silent}} {
		if other.n != 0 {
			fmt.Fprintf(&b, " %s %d", other.name, other.n)
		}
	}
	return b.String()
}

// counting is a transport that counts every attempt, also those that client-go
// repeats by itself.
type counting struct {
	next http.RoundTripper
	to   *tally
}

func (c counting) RoundTrip(r *http.Request) (*http.Response, error) {
	c.to.offered.Add(1)
	resp, err := c.next.RoundTrip(r)
	switch {
	case errors.Is(err, context.Canceled):
		// The pod has gone, and took its question along.
	case err != nil:
		c.to.silent.Add(1)
	case resp.StatusCode < 300:
		c.to.answered.Add(1)
	case resp.StatusCode == http.StatusUnauthorized:
		c.to.unauthorized.Add(1)
	case resp.StatusCode == http.StatusForbidden:
		c.to.forbidden.Add(1)
	case resp.StatusCode == http.StatusTooManyRequests:
		c.to.throttled.Add(1)
	default:
		c.to.failed.Add(1)
	}
	return resp, err
}

// attemptTimeout bounds one request of a load client: half of what the API
// server gives it (apiserver/pkg/server/config.go: RequestTimeout).
const attemptTimeout = 30 * time.Second

// podConfig is how the process inside a pod reaches the API server: with its
// own token, from its own address, and without a limit of its own.
func podConfig(base *rest.Config, host, token, address string, to *tally) *rest.Config {
	dialer := &net.Dialer{Timeout: attemptTimeout, LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
	c := rest.AnonymousClientConfig(base)
	c.Host, c.BearerToken, c.UserAgent = host, token, offenderName+"/v2.4.0"
	c.QPS = -1
	c.Dial = dialer.DialContext
	c.ContentType, c.AcceptContentTypes = "application/json", "application/json"
	c.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	c.WarningHandler = rest.NoWarnings{}
	c.WrapTransport = func(next http.RoundTripper) http.RoundTripper { return counting{next, to} }
	return c
}

// caller is one of a pod's clients: a loop that asks until the pod is gone.
type caller struct {
	storm     *Storm
	api       *rest.RESTClient
	pod       podID
	number    int  // among all clients of its pod
	impatient bool // neither waits after a refusal nor heeds Retry-After
	round     int
}

// podID is what a pod's process knows of itself.
type podID struct{ name, node, ip string }

// run calls again and again until the context ends, which it does when the pod
// is gone and for no other reason: being refused stops no client.
func (c *caller) run(ctx context.Context, call func(context.Context, *caller) error) {
	delay := reflectorBackoff()
	for ctx.Err() == nil {
		began := time.Now()
		try, cancel := context.WithTimeout(ctx, attemptTimeout)
		err := call(try, c)
		cancel()
		c.round++
		switch {
		case c.impatient:
			pause(ctx, time.Until(began.Add(c.storm.opts.Pace)))
		case err != nil:
			pause(ctx, delay())
		default:
			pause(ctx, c.storm.opts.Pause)
		}
	}
}

// reflectorBackoff is how client-go's informers wait after a failed LIST:
// client-go/tools/cache/reflector.go.
func reflectorBackoff() wait.DelayFunc {
	const first, most = 800 * time.Millisecond, 30 * time.Second
	b := wait.Backoff{Duration: first, Cap: most, Steps: int(most/first) + 1, Factor: 2, Jitter: 1}
	return b.DelayWithReset(clock.RealClock{}, 2*time.Minute)
}

func pause(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// get asks for a path and throws the answer away, as it comes: compressed, so
// that a simulated client costs the machine little besides what the server
// spends on it.
func (c *caller) get(ctx context.Context, path string, params map[string]string) error {
	r := c.api.Get().AbsPath(path).SetHeader("Accept-Encoding", "gzip")
	for k, v := range params {
		r.Param(k, v)
	}
	return c.do(ctx, r)
}

// do sends a request as the client is: with client-go's own repetitions, or
// once.
func (c *caller) do(ctx context.Context, r *rest.Request) error {
	if c.impatient {
		r.MaxRetries(0)
	}
	body, err := r.Stream(ctx)
	if err != nil {
		return err
	}
	defer body.Close()
	_, err = io.Copy(io.Discard, body)
	return err
}

// pods runs the clients of a DaemonSet's pods, each pod's for as long as the
// pod is there.
type pods struct {
	storm *Storm
	begin chan struct{} // closed when all clients may start

	mu      sync.Mutex // guards what follows
	running map[string]*podClients
	group   sync.WaitGroup
}

type podClients struct {
	cancel context.CancelFunc
	armed  bool // has its token
}

// changed is told of a pod's state; nil: it is gone.
func (p *pods) changed(ctx context.Context, key string, id *podID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	has := p.running[key]
	switch {
	case id == nil && has != nil:
		has.cancel()
		delete(p.running, key)
	case id != nil && has == nil:
		ctx, cancel := context.WithCancel(ctx)
		c := &podClients{cancel: cancel}
		p.running[key] = c
		p.group.Go(func() {
			defer cancel()
			p.storm.live(ctx, *id, func() {
				p.mu.Lock()
				c.armed = true
				p.mu.Unlock()
			}, p.begin)
		})
	}
}

// count returns how many pods are there, and how many of them have a token.
func (p *pods) count() (all, armed int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.running {
		if c.armed {
			armed++
		}
	}
	return len(p.running), armed
}

// live is a pod's life: it gets its token, as the kubelet would, and runs its
// clients until the context ends. Nobody renews the token, so that it is good for
// longer than the storm.
func (s *Storm) live(ctx context.Context, id podID, armed func(), begin <-chan struct{}) {
	var token string
	for {
		var err error
		if token, err = s.token(ctx, offenderNamespace, offenderName, id.name, s.opts.Duration+time.Hour); err == nil {
			break
		}
		pause(ctx, time.Second)
		if ctx.Err() != nil {
			return
		}
	}
	armed()
	select {
	case <-ctx.Done():
		return
	case <-begin:
	}
	config := podConfig(s.admin, s.hostFor(id), token, id.ip, &s.load)
	api, err := rest.UnversionedRESTClientFor(config)
	if err != nil {
		s.say("pod %s has no client: %v", id.name, err)
		return
	}
	defer api.Client.CloseIdleConnections()
	var clients sync.WaitGroup
	for i := range s.opts.ClientsPerPod {
		c := &caller{storm: s, api: api, pod: id, number: i, impatient: s.impatient(i)}
		clients.Go(func() { c.run(ctx, s.kind.call) })
	}
	clients.Wait()
}

// impatient says of a pod's i-th client whether it hammers: the share is the
// same in every pod, to the nearest client.
func (s *Storm) impatient(i int) bool {
	return float64(i) >= s.opts.BackoffShare*float64(s.opts.ClientsPerPod)-0.5
}

// refused tells an answer that says no from one that never came.
func refused(err error) bool {
	return apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) || apierrors.IsTooManyRequests(err)
}
