// Package push brings the bundle that a bastion has in force to every node of its
// inventory, and takes back what a node has that is newer: so a revocation that
// one bastion hears of is everywhere within seconds.
//
// It comes as the bastion itself, which may do nothing else at a node. It must
// never take over a bundle that its own roots have not signed, or let nodes that do
// not answer hold up those that do. Nobody depends on it: people carry bundles,
// too. It stands on floor 4.
package push

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/mtls"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
)

const (
	// DefaultEvery is how often all nodes are asked, though nothing has changed.
	DefaultEvery = time.Minute
	atOnce       = 16 // nodes
	// each is how long one node may take: to be reached, to shake hands and for
	// a bundle there and back.
	each      = 15 * time.Second
	maxAnswer = bundle.MaxSize + 64<<10
)

// Bundles is the bundle that the bastion trusts: a *bundle.Store.
type Bundles interface {
	Current() *bundle.Bundle
	Offer(data []byte) (changed bool, err error)
	Subscribe() (changed <-chan struct{}, cancel func())
}

// Options of pushing. All but Every are required.
type Options struct {
	Bundles Bundles
	// Connect returns a connection to the gRPC door of a node.
	Connect func(ctx context.Context, node bundle.Host) (net.Conn, error)
	// Servers verifies nodes.
	Servers *credential.Servers
	// Certificate returns the bastion's own, NAME.bastion.
	Certificate func() (*tls.Certificate, error)
	// Every is in place of DefaultEvery, where it is not 0.
	Every time.Duration
	Log   zerolog.Logger
}

// pusher is a Run.
type pusher struct {
	Options

	mu sync.Mutex // guards failed
	// failed says why a node could not be asked when it was last tried.
	failed map[string]string
}

// Run pushes at once, whenever the bundle changes, and every minute, until ctx
// ends.
func Run(ctx context.Context, o Options) {
	if o.Every == 0 {
		o.Every = DefaultEvery
	}
	p := &pusher{Options: o, failed: map[string]string{}}
	changed, cancel := o.Bundles.Subscribe()
	defer cancel()
	tick := time.NewTicker(o.Every)
	defer tick.Stop()
	for {
		// A change cuts off the round before, which may wait for the dead.
		round, end := context.WithCancel(ctx)
		over := make(chan struct{})
		go func() { defer close(over); p.round(round) }()
		again := false
		select {
		case <-over:
		case <-ctx.Done():
		case <-changed:
			again = true
		}
		end()
		<-over
		if again {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick.C:
		}
	}
}

// round asks every node that has a gRPC door: first those that answered when they
// were last asked.
func (p *pusher) round(ctx context.Context) {
	nodes := slices.DeleteFunc(p.Bundles.Current().Inventory.Nodes(""), func(h bundle.Host) bool { return h.GRPCPort == 0 })
	p.mu.Lock()
	failed := map[string]string{} // of nodes that are still there
	for _, h := range nodes {
		if why, ok := p.failed[h.ID()]; ok {
			failed[h.ID()] = why
		}
	}
	p.failed = failed
	slices.SortStableFunc(nodes, func(a, b bundle.Host) int { return min(1, len(failed[a.ID()])) - min(1, len(failed[b.ID()])) })
	p.mu.Unlock()
	var group errgroup.Group
	group.SetLimit(atOnce)
	for _, h := range nodes {
		group.Go(func() error {
			within, cancel := context.WithTimeout(ctx, each)
			defer cancel()
			if err := p.try(within, h); ctx.Err() == nil {
				p.note(h, err)
			}
			return nil
		})
	}
	_ = group.Wait() // they return none
}

// note tells of a node when that changes.
func (p *pusher) note(h bundle.Host, err error) {
	why := ""
	if err != nil {
		why = neutral.LineMax(fault.Of(err).Error(), 256)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch was, failed := p.failed[h.ID()]; {
	case err == nil && failed:
		delete(p.failed, h.ID())
		p.Log.Info().Str("node", h.ID()).Msg("the bundle is brought to it again")
	case err != nil && why != was:
		p.failed[h.ID()] = why
		p.Log.Info().Str("node", h.ID()).Str("why", why).Msg("the bundle could not be brought to it")
	}
}

// try is exchange, which fails where what a node answers makes it panic.
func (p *pusher) try(ctx context.Context, h bundle.Host) (err error) {
	defer func() {
		if r := recover(); r != nil {
			p.Log.Error().Str("node", h.ID()).Str("panic", neutral.LineMax(fmt.Sprint(r), 512)).Bytes("stack", debug.Stack()).Msg("panic with a node's bundle")
			err = fault.New(fault.Failed, "report it with the bastion's log of this moment", "a fault of the bastion with what %s answers", h.ID())
		}
	}()
	return p.exchange(ctx, h)
}

// exchange brings a node the bundle in force, and takes over what it has itself.
func (p *pusher) exchange(ctx context.Context, h bundle.Host) error {
	certificate, err := p.Certificate()
	if err != nil {
		return err
	}
	raw, err := p.Connect(ctx, h)
	if err != nil {
		return err
	}
	defer raw.Close()
	conn, err := mtls.Client(raw, h.ID(), p.Servers.TLS(h.ID()), certificate, maxAnswer)
	if err != nil {
		return err
	}
	defer conn.Close()
	ours := p.Bundles.Current().Raw()
	answer, err := halliganv1.NewAgentClient(conn).ExchangeBundle(ctx, &halliganv1.ExchangeBundleRequest{Bundle: ours})
	if err != nil {
		return api.FromStatus(err)
	}
	if theirs := answer.GetBundle(); len(theirs) > 0 {
		if _, err := p.Bundles.Offer(theirs); err != nil && !errors.Is(err, bundle.ErrOlder) {
			return err
		}
	}
	if e := answer.GetRefused(); e != nil {
		return fault.New(fault.Code(e.GetCode()), e.GetNext(), "the node refuses the bundle: %s", e.GetMessage())
	}
	return nil
}
