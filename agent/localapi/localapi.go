// Package localapi is the API server of the agent's own node: reached by address on
// the node itself, past load balancers and DNS, with an administrator's credentials
// that flow control lets pass, and asked every few seconds how it is.
//
// It must never resolve a name, follow a redirect, start a program that a kubeconfig
// names, or wait without a bound: an overloaded API server takes connections and
// never answers. It stands on floor 4, below agent/action.
package localapi

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/client-go/rest"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

const (
	// every is the time between the beginnings of two probes.
	every = 5 * time.Second
	// within bounds each request of a probe, and a probe twice that.
	within = 2 * time.Second
	// renewBelow is how long the credentials must last not to be spoken of. kubeadm
	// makes them for a year.
	renewBelow = 7 * 24 * time.Hour
)

// Options of an endpoint.
type Options struct {
	// Kubeconfigs are files, the most powerful first. They need not be there, and are
	// read again when they change; the first one that is usable and has not ended is
	// taken. Of it only who the caller is and whom to trust counts, not the server.
	Kubeconfigs []string
	// Address is IP:PORT.
	Address string
	// ServerName is expected in the server's certificate; empty: what the kubeconfig
	// says, else kubernetes, which every API server's certificate has.
	ServerName string
	// Now is the agent's clock; nil: the system's.
	Now func() time.Time
	Log zerolog.Logger

	within time.Duration // for tests; 0: within
}

// State is what the last probe found.
type State struct {
	// Kubeconfig is the file in use; empty where none can be used.
	Kubeconfig string
	// Expires is when its client certificate ends; zero where it has none.
	Expires time.Time
	// Probed is when the probe ended; zero before the first.
	Probed time.Time
	// Answered: a small read was, in Latency, whatever the answer was.
	Answered bool
	Latency  time.Duration
	// Ready is what the API server says of itself.
	Ready bool
	// FlowControl is on or off, empty where it is not known. Exempt: these credentials
	// pass it at once.
	FlowControl string
	Exempt      bool
	// Err says why the API server cannot be used or is not ready.
	Err error
}

// Endpoint is the API server. Its methods may be called concurrently. A nil one stands
// for none: it asks nobody.
type Endpoint struct {
	o     Options
	files []*file // used by probe alone

	mu    sync.Mutex // guards what follows
	creds *credentials
	state State
}

// Open returns an endpoint that was not asked yet. Nothing has to be there.
func Open(o Options) *Endpoint {
	if o.Now == nil {
		o.Now = time.Now
	}
	o.within = cmp.Or(o.within, within)
	e := &Endpoint{o: o}
	for _, f := range o.Kubeconfigs {
		e.files = append(e.files, &file{path: f})
	}
	return e
}

// Run asks until the context ends.
func (e *Endpoint) Run(ctx context.Context) {
	if e == nil {
		return
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		e.probe(ctx)
		select {
		case <-ctx.Done():
			e.mu.Lock()
			defer e.mu.Unlock()
			e.creds.close()
			return
		case <-tick.C:
		}
	}
}

// State returns what the last probe found.
func (e *Endpoint) State() State {
	if e == nil {
		return State{}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state
}

// Config returns a copy of what client-go's clients are made of: address, names and
// credentials, without limits of its own.
func (e *Endpoint) Config() (*rest.Config, error) {
	if e == nil {
		return nil, fault.New(fault.Usage, "set localAPI.kubeconfig in the agent's configuration", "this agent asks no API server")
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.creds == nil {
		if e.state.Err != nil {
			return nil, e.state.Err
		}
		return nil, fault.New(fault.Unreachable, "try again", "the local API server was not asked yet")
	}
	return rest.CopyConfig(e.creds.config), nil
}

// Status returns the state for people and scripts.
func (e *Endpoint) Status() *halliganv1.LocalAPIStatus {
	if e == nil {
		return nil
	}
	s := e.State()
	out := &halliganv1.LocalAPIStatus{Endpoint: e.o.Address, Kubeconfig: s.Kubeconfig, Ready: s.Ready, LatencyMs: float64(s.Latency) / float64(time.Millisecond),
		Exempt: s.Exempt, FlowControl: s.FlowControl}
	if s.Err != nil {
		out.Error = fault.Of(s.Err).Error()
	}
	if !s.Probed.IsZero() {
		out.Probed = timestamppb.New(s.Probed)
	}
	if !s.Expires.IsZero() {
		out.CredentialExpires = timestamppb.New(s.Expires)
	}
	return out
}

// Warnings tells what is degraded, each in one line.
func (e *Endpoint) Warnings() (all []string) {
	if e == nil {
		return nil
	}
	s := e.State()
	if s.Err != nil {
		all = append(all, "local API server: "+fault.Of(s.Err).Error())
	}
	if s.Answered && s.FlowControl != "" && !s.Exempt {
		all = append(all, fmt.Sprintf("local API server: the credentials in %s are not exempt from flow control and wait with everybody in a storm; name a kubeconfig of system:masters with localAPI.kubeconfig", s.Kubeconfig))
	}
	if left := s.Expires.Sub(e.o.Now()); !s.Expires.IsZero() && left < renewBelow {
		when := "end in " + left.Round(time.Hour).String()
		if left <= 0 {
			when = "ended"
		}
		all = append(all, fmt.Sprintf("local API server: the credentials in %s %s, at %s; have them renewed", s.Kubeconfig, when, s.Expires.UTC().Format(time.RFC3339)))
	}
	return all
}

// probe asks once, and keeps and logs what came of it.
func (e *Endpoint) probe(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*e.o.within)
	defer cancel()
	creds, err := e.choose()
	e.mu.Lock()
	was := e.state
	if e.creds != creds {
		e.creds.close()
		e.creds = creds
	}
	e.mu.Unlock()
	s := State{Err: err}
	if creds != nil {
		s = creds.ask(ctx, e.o.within)
		s.Kubeconfig, s.Expires = creds.file, creds.expires
	}
	if context.Cause(ctx) == context.Canceled {
		return // the agent stops
	}
	s.Probed = e.o.Now()
	e.mu.Lock()
	e.state = s
	e.mu.Unlock()
	switch text, before := said(s), said(was); {
	case text != "" && text != before:
		e.o.Log.Warn().Str("endpoint", e.o.Address).Msg("local API server: " + neutral.Line(text))
	case text == "" && (before != "" || was.Probed.IsZero()):
		e.o.Log.Info().Str("endpoint", e.o.Address).Str("kubeconfig", s.Kubeconfig).Bool("exempt", s.Exempt).Str("flowControl", s.FlowControl).Msg("local API server answers")
	}
}

func said(s State) string {
	if s.Err == nil {
		return ""
	}
	return fault.Of(s.Err).Error()
}

// choose returns the credentials to use: of the first file that can be used and has not
// ended, else of the first that can be used.
func (e *Endpoint) choose() (*credentials, error) {
	var ended *credentials
	var broken, missing []string
	for _, f := range e.files {
		f.refresh(e.o)
		switch {
		case f.creds != nil && (f.creds.expires.IsZero() || f.creds.expires.After(e.o.Now())):
			return f.creds, nil
		case f.creds != nil:
			ended = cmp.Or(ended, f.creds)
		case f.err != nil:
			broken = append(broken, fault.Of(f.err).Message)
		default:
			missing = append(missing, f.path)
		}
	}
	const next = "name one of system:masters with localAPI.kubeconfig, or set localAPI.disabled"
	switch {
	case ended != nil:
		return ended, nil
	case len(broken) > 0:
		return nil, fault.New(fault.Failed, next, "no administrator's kubeconfig can be used: %s", strings.Join(broken, "; "))
	case len(missing) > 0:
		return nil, fault.New(fault.NotFound, next, "there is no administrator's kubeconfig: looked for %s", strings.Join(missing, ", "))
	}
	return nil, fault.New(fault.NotFound, next, "this node has no administrator's kubeconfig")
}
