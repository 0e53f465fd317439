package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

const (
	// parallel is how many nodes are asked at a time.
	// Each is a channel of the connection to the bastion, which takes 64.
	parallel = 32
	// patience is how long one node has for an answer, bastionPatience how long
	// where the bastion on the way may have to be replaced, and touched how long
	// where its login waits for a person to touch a key.
	patience        = 5 * time.Second
	bastionPatience = 10 * time.Second
	touched         = 60 * time.Second
	// better is how long to wait for a healthy agent once another has answered.
	better = time.Second
	// carrying bounds the exchange of bundles at the end of a connection.
	carrying = 2 * time.Second
)

// agent is a connection to one agent. What an agent says of its bundle in a
// status decides whether the two are exchanged at the end.
type agent struct {
	halliganv1.AgentClient
	conn io.Closer // of a console

	// Over the network:
	fleet *fleet
	host  bundle.Host
	line  *line

	mu     sync.Mutex // guards status
	status *halliganv1.StatusResponse
}

// Status asks the agent, and remembers the answer.
func (a *agent) Status(ctx context.Context, in *halliganv1.StatusRequest, opts ...grpc.CallOption) (*halliganv1.StatusResponse, error) {
	s, err := a.AgentClient.Status(ctx, in, opts...)
	if err == nil {
		a.mu.Lock()
		a.status = s
		a.mu.Unlock()
	}
	return s, err
}

// Close exchanges bundles where that is due, and ends the connection. All that
// the caller wanted is answered by then.
func (a *agent) Close() error {
	if a.line == nil {
		return a.conn.Close()
	}
	a.fleet.way.carry()
	a.carry()
	return a.line.close()
}

// dial logs in at a node.
func (f *fleet) dial(ctx context.Context, host bundle.Host) (*agent, error) {
	k, err := f.connect(ctx, host)
	if err != nil {
		return nil, err
	}
	l := &line{fleet: f, host: host, now: k}
	return &agent{AgentClient: halliganv1.NewAgentClient(l), fleet: f, host: host, line: l}, nil
}

// limits returns how many logins may run at a time, and how long each may take:
// a key that is to be touched can be touched for one at a time.
func (f *fleet) limits() (int, time.Duration) {
	n, limit := parallel, patience
	if !f.way.direct() {
		limit = bastionPatience
	}
	if f.login.SecurityKey() {
		n, limit = 1, touched
	}
	if said := f.app.timeout(); said > 0 {
		limit = said
	}
	return n, limit
}

// answer is what asking one node has brought.
type answer struct {
	host   bundle.Host
	agent  *agent // nil when it could not be reached
	status *halliganv1.StatusResponse
	// begun and took say when the question was sent and how long the answer took.
	begun time.Time
	took  time.Duration
	err   error
}

// healthy reports whether a mutation can be expected to work from there.
func (a answer) healthy() bool {
	e := a.status.GetEtcd()
	return a.err == nil && e.GetQuorum() && e.GetLeaderId() != "" && a.status.GetReadOnly() == ""
}

// ask asks one node for its status.
func (f *fleet) ask(ctx context.Context, host bundle.Host, limit time.Duration) (r answer) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	r.host = host
	if r.agent, r.err = f.dial(ctx, host); r.err != nil {
		return r
	}
	r.begun = f.app.Now()
	if r.status, r.err = r.agent.Status(ctx, &halliganv1.StatusRequest{}); r.err != nil {
		r.agent.abandon()
		r.agent = nil
	}
	r.took = f.app.Now().Sub(r.begun)
	return r
}

// askAll asks the nodes, some at a time, and hands on what each brings as it
// comes. The channel is closed at the end; it must be read to that.
func (f *fleet) askAll(ctx context.Context, hosts []bundle.Host) <-chan answer {
	n, limit := f.limits()
	out, turns := make(chan answer), make(chan struct{}, n)
	var asking sync.WaitGroup
	go func() {
		for _, host := range hosts {
			turns <- struct{}{}
			asking.Go(func() {
				defer func() { <-turns }()
				if ctx.Err() != nil {
					out <- answer{host: host, err: ctx.Err()}
					return
				}
				out <- f.ask(ctx, host, limit)
			})
		}
		asking.Wait()
		close(out)
	}()
	return out
}

// first logs in at the first node of the cluster that answers and is healthy.
// Where none is, one that answers serves: reads still work there, and it says
// itself what does not.
func (f *fleet) first(ctx context.Context) (*agent, error) {
	cluster, err := f.clusterOf()
	if err != nil {
		return nil, err
	}
	hosts := f.bundles.Current().Inventory.Nodes(cluster)
	switch len(hosts) {
	case 0:
		return nil, fault.New(fault.NotFound, "choose another with --cluster, or have the inventory completed", "the bundle's inventory has no nodes of cluster %s", cluster)
	case 1:
		return f.dial(ctx, hosts[0])
	}
	if err := f.way.ready(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var spare *agent
	var failed []answer
	// take returns the agent that is good enough to stop asking.
	take := func(r answer) *agent {
		switch {
		case r.err != nil:
			failed = append(failed, r)
		case r.healthy():
			spare.abandon()
			return r.agent
		case spare == nil:
			spare = r.agent
		default:
			r.agent.abandon()
		}
		return nil
	}
	if n, limit := f.limits(); n == 1 {
		for _, host := range hosts {
			if won := take(f.ask(ctx, host, limit)); won != nil {
				return won, nil
			}
		}
	} else {
		answers := f.askAll(ctx, hosts)
		defer func() {
			cancel()
			f.loose.Go(func() {
				for r := range answers {
					r.agent.abandon()
				}
			})
		}()
		var enough <-chan time.Time
		for asking := true; asking; {
			select {
			case r, more := <-answers:
				if asking = more; !more {
					break
				}
				if won := take(r); won != nil {
					return won, nil
				}
				if spare != nil && enough == nil {
					enough = time.After(better)
				}
			case <-enough:
				asking = false
			}
		}
	}
	if ctx.Err() != nil {
		spare.abandon()
		return nil, ctx.Err()
	}
	if spare != nil {
		return spare, nil
	}
	return nil, allDead("no agent of cluster "+cluster+" can be reached", failed)
}

// maxReasons is how many nodes' errors are told in one line.
const maxReasons = 3

// allDead is the error of a cluster or fleet of which nobody answers.
func allDead(text string, failed []answer) error {
	slices.SortFunc(failed, func(x, y answer) int { return strings.Compare(x.host.ID(), y.host.ID()) })
	code, next := fault.Unreachable, "try from another network, or at a node itself: halligan --socket "
	var reasons []string
	for _, r := range failed {
		e := fault.Of(r.err)
		if e.Code == fault.Unauthenticated {
			code, next = e.Code, e.Next
		}
		if len(reasons) < maxReasons && !slices.Contains(reasons, e.Message) {
			reasons = append(reasons, e.Message)
		}
	}
	if code == fault.Unreachable {
		next += api.DefaultSocket
	}
	if more := len(failed) - len(reasons); more > 0 && len(reasons) == maxReasons {
		reasons = append(reasons, fmt.Sprintf("and %d more", more))
	}
	return fault.New(code, next, "%s: %s", text, strings.Join(reasons, "; "))
}

// abandon ends a connection that is not needed.
func (a *agent) abandon() {
	if a != nil {
		_ = a.line.close()
	}
}

// carry shows the agent this machine's bundle and takes over the agent's, once
// in a run and only where the two may differ: so no bastion can keep a
// revocation from the agents. It is bounded, and nobody waits for its outcome.
func (a *agent) carry() {
	f, app := a.fleet, a.fleet.app
	mine := f.bundles.Current()
	a.mu.Lock()
	theirs := a.status
	a.mu.Unlock()
	if theirs != nil && sameBundle(theirs.GetBundle(), mine) {
		return
	}
	app.mu.Lock()
	done := app.exchanged[a.host.ID()]
	app.exchanged[a.host.ID()] = true
	app.mu.Unlock()
	if done || app.ctx.Err() != nil || a.line.current().gone() {
		return
	}
	ctx, cancel := context.WithTimeout(app.ctx, carrying)
	defer cancel()
	f.exchange(ctx, a.host.ID(), a)
}

// exchange shows a daemon this machine's bundle, and takes over a newer one.
func (f *fleet) exchange(ctx context.Context, name string, with interface {
	ExchangeBundle(context.Context, *halliganv1.ExchangeBundleRequest, ...grpc.CallOption) (*halliganv1.ExchangeBundleResponse, error)
}) {
	app := f.app
	got, err := with.ExchangeBundle(ctx, &halliganv1.ExchangeBundleRequest{Bundle: f.bundles.Current().Raw()})
	if err != nil {
		return // one that is older, or in trouble: the next one takes it
	}
	if e := got.GetRefused(); e != nil && e.GetCode() != string(fault.Stale) {
		app.note("%s refuses this machine's bundle: %s", name, e.GetMessage())
	}
	if len(got.GetBundle()) == 0 || f.store == nil {
		return
	}
	if _, err := f.store.Offer(got.GetBundle()); err != nil && !errors.Is(err, bundle.ErrOlder) && !errors.Is(err, bundle.ErrForked) {
		app.note("the bundle of %s is not taken over: %s", name, fault.Of(err).Message)
	}
}

// sameBundle reports whether there is nothing to exchange. Equal versions of other
// bytes have to meet: that is how a fork is noticed.
func sameBundle(theirs *halliganv1.BundleStatus, mine *bundle.Bundle) bool {
	return theirs.GetPolicyVersion() == mine.Policy.Version && theirs.GetInventoryVersion() == mine.Inventory.Version &&
		theirs.GetRevocationsVersion() == mine.Revocations.Version && (theirs.GetHash() == "" || theirs.GetHash() == mine.Hash)
}
