package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/sshclient"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// way is how nodes are reached: through bastions, of which one is enough and any
// may break, or directly. Its methods may be called concurrently.
type way struct {
	fleet *fleet
	// bastions are those to go through, in the order of choice; none: nodes are
	// dialled.
	bastions []bundle.Host
	ctx      context.Context // of what is dialled for all
	cancel   context.CancelFunc
	dialling sync.WaitGroup

	mu      sync.Mutex          // guards all below
	open    map[string]*passage // by bastion, also those that broke
	last    string              // bastion of the passage to take first
	flights map[string]*flight  // by the bastions that are tried
	carried string              // hash of the bundle that the bastions were shown
}

// flight is an attempt to get through, for whoever waits for it.
type flight struct {
	done chan struct{}
	got  *passage
	err  error
}

// passage is a login at a bastion, which many nodes share.
type passage struct {
	host   bundle.Host
	client *sshclient.Client

	mu  sync.Mutex // guards api
	api *grpc.ClientConn
}

// newWay says where to go through.
func (f *fleet) newWay() (*way, error) {
	a := f.app
	w := &way{fleet: f, open: map[string]*passage{}, flights: map[string]*flight{}}
	w.ctx, w.cancel = context.WithCancel(a.ctx)
	inv := f.bundles.Current().Inventory
	switch {
	case a.direct && (a.given("direct") || !a.given("bastion")):
	case a.bastion != "":
		one, err := inv.Bastion(a.bastion)
		if err != nil {
			return nil, err
		}
		w.bastions = []bundle.Host{one}
	default:
		w.bastions = inv.Bastions
	}
	return w, nil
}

// direct reports whether nodes are dialled.
func (w *way) direct() bool { return len(w.bastions) == 0 }

// ready gets through to a bastion before anything is asked of nodes, so that
// there is one error where none can be reached, and not one for each node.
func (w *way) ready(ctx context.Context) error {
	if w.direct() {
		return nil
	}
	ctx, cancel := w.fleet.bounded(ctx)
	defer cancel()
	_, err := w.through(ctx, nil)
	return err
}

// bounded ends when --timeout says so.
func (f *fleet) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if said := f.app.timeout(); said > 0 {
		return context.WithTimeout(ctx, said)
	}
	return context.WithCancel(ctx)
}

// through returns a passage that works as far as is known, by any bastion but
// those that the caller does not want.
func (w *way) through(ctx context.Context, not []string) (*passage, error) {
	var try []bundle.Host
	for _, b := range w.bastions {
		if !slices.Contains(not, b.ID()) {
			try = append(try, b)
		}
	}
	if len(try) == 0 {
		return nil, fault.New(fault.Unreachable, "try without --bastion", "no other bastion is left")
	}
	w.mu.Lock()
	if p := w.alive(try); p != nil {
		w.mu.Unlock()
		return p, nil
	}
	f := w.take(try)
	w.mu.Unlock()
	select {
	case <-f.done:
		return f.got, f.err
	case <-ctx.Done():
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return nil, ctx.Err()
	}
	return nil, fault.New(fault.Unreachable, "give it more with --timeout, or see whether this network reaches them", "no bastion let %s in in time: tried %s", w.fleet.login.Person, names(try))
}

func names(list []bundle.Host) string {
	all := make([]string, len(list))
	for i, h := range list {
		all[i] = h.ID()
	}
	return strings.Join(all, ", ")
}

// alive returns an open passage by one of the bastions. The caller holds mu.
func (w *way) alive(by []bundle.Host) (found *passage) {
	for _, b := range by {
		if p := w.open[b.ID()]; p != nil && !p.broken() && (found == nil || b.ID() == w.last) {
			found = p
		}
	}
	return found
}

// take returns the attempt that is under way, or begins one. It is nobody's own:
// whoever began it may leave. The caller holds mu.
func (w *way) take(try []bundle.Host) *flight {
	key := names(try)
	if f := w.flights[key]; f != nil {
		return f
	}
	f := &flight{done: make(chan struct{})}
	w.flights[key] = f
	w.dialling.Go(func() {
		f.got, f.err = w.dial(try)
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.flights, key)
		if f.err == nil {
			if was := w.open[f.got.host.ID()]; was != nil {
				w.dialling.Go(was.close) // broken, or beaten to it by another attempt
			}
			w.open[f.got.host.ID()] = f.got
			if first := w.open[w.last]; first == nil || first.broken() {
				w.last = f.got.host.ID()
			}
		}
		close(f.done)
	})
	return f
}

// dial logs in at the first of the bastions that lets it in.
func (w *way) dial(try []bundle.Host) (*passage, error) {
	f := w.fleet
	targets := make([]sshclient.Target, len(try))
	for i, b := range try {
		targets[i] = f.target(b)
		targets[i].Bastion = true
	}
	client, i, errs := sshclient.First(w.ctx, targets, f.login)
	if client != nil {
		return &passage{host: try[i], client: client}, nil
	}
	if w.ctx.Err() != nil {
		return nil, w.ctx.Err()
	}
	failed := make([]answer, len(try))
	for i, err := range errs {
		failed[i] = answer{host: try[i], err: err}
	}
	text := "no bastion lets " + f.login.Person + " through"
	if len(try) == 1 {
		text = "the bastion does not let " + f.login.Person + " through"
	}
	err := fault.Of(allDead(text, failed))
	if err.Code == fault.Unreachable {
		err.Next = "try from another network, or with --direct where this one reaches the nodes"
	}
	return nil, err
}

// target is the SSH door of a host.
func (f *fleet) target(h bundle.Host) sshclient.Target {
	t := sshclient.Target{Name: h.ID(), Address: h.SSH().String(), HostKey: f.servers.HostKey(h.ID())}
	if f.app.ErrTTY {
		t.Touch = func() { fmt.Fprintf(f.app.Err, "touch the key to log in at %s\n", h.ID()) }
	}
	return t
}

// enter opens the SSH door of a node. A bastion that breaks, or cannot reach the
// node, gives way to the next.
func (f *fleet) enter(ctx context.Context, host bundle.Host) (*sshclient.Client, error) {
	ctx, cancel := f.bounded(ctx)
	defer cancel()
	target := f.target(host)
	if f.way.direct() {
		return sshclient.Dial(ctx, target, f.login)
	}
	var not, why []string // bastions that do not lead there
	for breaks := 0; ; {
		p, err := f.way.through(ctx, not)
		if err != nil && len(not) > 0 && ctx.Err() == nil {
			return nil, fault.New(fault.Unreachable, "choose another node with --node", "%s cannot be reached: %s", host.ID(), strings.Join(why, "; "))
		}
		if err != nil {
			return nil, err
		}
		target.Through = p.client
		client, err := sshclient.Dial(ctx, target, f.login)
		if err == nil || ctx.Err() != nil {
			return client, err
		}
		var refused *sshclient.RelayError
		switch {
		// Another bastion would ask for another touch, most likely to say the same.
		case errors.As(err, &refused) && !f.login.SecurityKey():
			not, why = append(not, p.host.ID()), append(why, refused.Error())
		case refused == nil && p.breaks() && breaks < 2*len(f.way.bastions):
			breaks++
		// A login that hangs or is cut off may be the bastion's doing.
		case fault.Is(err, fault.Unreachable) && !f.login.SecurityKey() && len(f.way.bastions) > 1:
			not, why = append(not, p.host.ID()), append(why, fault.Of(err).Message)
		default:
			return nil, err
		}
	}
}

// broken reports whether the connection to the bastion has ended.
func (p *passage) broken() bool {
	select {
	case <-p.client.Done():
		return true
	default:
		return false
	}
}

// breaks is broken, for whoever has just seen a sign of it: what went through the
// connection ends a moment before the connection itself.
func (p *passage) breaks() bool {
	select {
	case <-p.client.Done():
		return true
	case <-time.After(noticed):
		return false
	}
}

// conn returns a connection to the bastion's own API.
func (p *passage) conn(ctx context.Context) (*grpc.ClientConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.api == nil {
		stream, err := p.client.API(ctx)
		if err != nil {
			return nil, err
		}
		if p.api, err = overConn(stream, p.host.ID(), func(context.Context) (net.Conn, error) {
			return nil, fmt.Errorf("the connection to %s is gone", p.host.ID())
		}); err != nil {
			return nil, err
		}
	}
	return p.api, nil
}

// bastion returns the bastion's own API.
func (p *passage) bastion(ctx context.Context) (halliganv1.BastionClient, error) {
	conn, err := p.conn(ctx)
	if err != nil {
		return nil, err
	}
	return halliganv1.NewBastionClient(conn), nil
}

func (p *passage) close() {
	p.mu.Lock()
	if p.api != nil {
		_ = p.api.Close()
	}
	p.mu.Unlock()
	_ = p.client.Close()
}

// passages returns the open ones.
func (w *way) passages() (all []*passage) {
	if w == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range w.bastions {
		if p := w.open[b.ID()]; p != nil && !p.broken() {
			all = append(all, p)
		}
	}
	return all
}

// each logs in at every bastion, for what is to be told to all of them, and calls
// do for each that lets it in. It returns when all calls have, and why the other
// bastions do not.
func (w *way) each(ctx context.Context, do func(context.Context, *passage)) map[string]error {
	failed := map[string]error{}
	if w.direct() {
		return failed
	}
	var mu sync.Mutex // guards failed
	var asking sync.WaitGroup
	for _, b := range w.bastions {
		asking.Go(func() {
			p, err := w.by(ctx, b)
			switch {
			case err == nil:
				do(ctx, p)
			case !errors.Is(err, errTouch):
				mu.Lock()
				defer mu.Unlock()
				failed[b.ID()] = err
			}
		})
	}
	asking.Wait()
	return failed
}

// errTouch is why a bastion is not asked besides.
var errTouch = errors.New("the key would have to be touched for it")

// by returns a passage by that bastion, for what is not needed: nobody touches a
// key for it.
func (w *way) by(ctx context.Context, b bundle.Host) (*passage, error) {
	if w.fleet.login.SecurityKey() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if p := w.alive([]bundle.Host{b}); p != nil {
			return p, nil
		}
		return nil, errTouch
	}
	var not []string
	for _, other := range w.bastions {
		if other.ID() != b.ID() {
			not = append(not, other.ID())
		}
	}
	return w.through(ctx, not)
}

// carry exchanges bundles with the bastions that are open, once in a run unless a
// newer one came since. Nobody waits for its outcome before the answer.
func (w *way) carry() {
	if w == nil {
		return
	}
	mine := w.fleet.bundles.Current().Hash
	w.mu.Lock()
	done := w.carried == mine
	w.carried = mine
	w.mu.Unlock()
	if done || w.ctx.Err() != nil {
		return
	}
	for _, p := range w.passages() {
		w.fleet.loose.Go(func() {
			ctx, cancel := context.WithTimeout(w.ctx, carrying)
			defer cancel()
			if api, err := p.bastion(ctx); err == nil {
				w.fleet.exchange(ctx, p.host.ID(), api)
			}
		})
	}
}

// close ends everything; nobody else uses it any more.
func (w *way) close() {
	if w == nil {
		return
	}
	w.cancel()
	w.dialling.Wait()
	for _, p := range w.open {
		p.close()
	}
}

// lookAround tells what is wrong with bastions, beside the answer.
func (w *way) lookAround(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, around)
	defer cancel()
	app := w.fleet.app
	failed := w.each(ctx, func(ctx context.Context, p *passage) {
		bastion, err := p.bastion(ctx)
		if err != nil {
			return
		}
		s, err := bastion.Status(ctx, &halliganv1.BastionStatusRequest{})
		if err != nil {
			app.note("%s does not tell its status: %s", p.host.ID(), api.FromStatus(err).Message)
			return
		}
		if why := s.GetStoreDegraded(); why != "" {
			app.note("%s: %s", p.host.ID(), why)
		}
		for _, text := range s.GetWarnings() {
			if text != s.GetStoreDegraded() {
				app.note("%s: %s", p.host.ID(), text)
			}
		}
	})
	for _, b := range w.bastions {
		if err := failed[b.ID()]; err != nil && !errors.Is(err, context.Canceled) {
			app.note("one bastion less: %s", strings.TrimPrefix(fault.Of(err).Message, "the bastion does not let "+w.fleet.login.Person+" through: "))
		}
	}
}

// around bounds looking at bastions beside the answer.
const around = 3 * time.Second
