// Package witness is how a bastion gets its copies: it keeps a stream to every node
// that has a gRPC door, and to every other bastion, takes what is new in their logs,
// and sends countersignatures back. It also keeps what those logs cannot take.
//
// It comes as the bastion itself. It must never believe a log that its server did
// not sign, let a node that is hostile or does not answer hold up another, or hand
// one cluster's daemons what is another's. It stands on floor 4.
package witness

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/mtls"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/mirror"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
)

const (
	// soonest and latest bound the time until a stream that broke is begun again.
	soonest, latest = 250 * time.Millisecond, 15 * time.Second
	// well is how long a stream must have lasted for the next one to come soon.
	well = time.Second
	// atOnce is how many servers are being reached at a time, and reaching one may
	// take within.
	atOnce = 16
	within = 15 * time.Second
	// silence is how long entries that were announced may be missing.
	silence = time.Minute
	// lookAgain is how long a stream lasts in which something was not what it was,
	// since somebody may have looked at it.
	lookAgain = 10 * time.Minute
	// pace is how many heads and events to hold a server may send in a second, and
	// at once. A log has some five heads in a second at most.
	pace, burst = 10, 50
	// maxMessage bounds one message in bytes.
	maxMessage = 1 << 20
)

// Bundles is the bundle that the bastion trusts: a *bundle.Store.
type Bundles interface {
	Current() *bundle.Bundle
	Subscribe() (changed <-chan struct{}, cancel func())
}

// Options of witnessing. All are required.
type Options struct {
	// Origin is the bastion's own, NAME.bastion.
	Origin  string
	Bundles Bundles
	// Connect returns a connection to the gRPC door of a node or bastion.
	Connect func(ctx context.Context, to bundle.Host) (net.Conn, error)
	// Servers verifies them.
	Servers *credential.Servers
	// Certificate returns the bastion's own.
	Certificate func() (*tls.Certificate, error)
	Mirrors     *mirror.Mirrors
	// Identity returns the bastion's statement, nil while it has none.
	Identity func() []byte
	// Held is the bastion's own log.
	Held audit.Log
	Log  zerolog.Logger
}

// witness is a Run.
type witness struct {
	Options
	reaching chan struct{} // has room for those being reached
}

// Run witnesses until the context ends.
func Run(ctx context.Context, o Options) {
	w := &witness{Options: o, reaching: make(chan struct{}, atOnce)}
	changed, cancel := o.Bundles.Subscribe()
	defer cancel()
	var all sync.WaitGroup
	defer all.Wait()
	running := map[string]func(){} // by what is dialled
	for {
		wanted := map[string]bundle.Host{}
		for _, h := range w.hosts() {
			at, _ := h.GRPC()
			wanted[h.ID()+" "+at.String()+" "+h.Reach] = h
		}
		for at, stop := range running {
			if _, ok := wanted[at]; !ok {
				stop()
				delete(running, at)
			}
		}
		for at, h := range wanted {
			if running[at] == nil {
				one, stop := context.WithCancel(ctx)
				running[at] = stop
				all.Go(func() { w.keep(one, h) })
			}
		}
		select {
		case <-ctx.Done():
			for _, stop := range running {
				stop()
			}
			return
		case <-changed:
		}
	}
}

// hosts returns those whose logs are witnessed.
func (w *witness) hosts() []bundle.Host {
	inv := w.Bundles.Current().Inventory
	return slices.DeleteFunc(append(inv.Nodes(""), inv.Bastions...), func(h bundle.Host) bool { return h.GRPCPort == 0 || h.ID() == w.Origin })
}

// keep keeps a stream to one server.
func (w *witness) keep(ctx context.Context, h bundle.Host) {
	wait := soonest
	for {
		lasted, err := w.try(ctx, h)
		if ctx.Err() != nil {
			return
		}
		if lasted > well {
			wait = soonest
		}
		w.Log.Debug().Str("server", h.ID()).Str("why", why(err)).Msg("its log is not being witnessed")
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait/2 + rand.N(wait/2)): // #nosec G404 -- so that many do not come at once
		}
		wait = min(2*wait, latest)
	}
}

func why(err error) string {
	return neutral.LineMax(fault.Of(err).Error(), 256)
}

// try is stream, which fails where what a server sends makes it panic. It returns how
// long there was one.
func (w *witness) try(ctx context.Context, h bundle.Host) (lasted time.Duration, err error) {
	c, err := w.Mirrors.Copy(h.ID())
	if err != nil {
		return 0, err
	}
	defer func() {
		if r := recover(); r != nil {
			w.Log.Error().Str("server", h.ID()).Str("panic", neutral.LineMax(fmt.Sprint(r), 512)).Bytes("stack", debug.Stack()).Msg("panic with another's log")
			err = fault.New(fault.Failed, "report it with the bastion's log of this moment", "a fault of the bastion with the log of %s", h.ID())
		}
		if ctx.Err() != nil {
			c.Live(false, nil)
			return
		}
		c.Live(false, errors.New(why(err)))
	}()
	return w.stream(ctx, h, c)
}

// stream witnesses one server until that ends.
func (w *witness) stream(ctx context.Context, h bundle.Host, c *mirror.Copy) (lasted time.Duration, err error) {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	s, closed, err := w.reach(ctx, end, h, c)
	if err != nil {
		return 0, err
	}
	defer closed()
	began := time.Now()
	c.Live(true, nil)
	var telling sync.WaitGroup
	defer telling.Wait()
	defer end(nil)
	telling.Go(func() { s.tellPeers(ctx) })
	err = s.hear(ctx)
	return time.Since(began), err
}

// reach opens a stream and has both sides say who they are.
func (w *witness) reach(ctx context.Context, end context.CancelCauseFunc, h bundle.Host, c *mirror.Copy) (_ *session, closed func(), err error) {
	select {
	case w.reaching <- struct{}{}:
		defer func() { <-w.reaching }()
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	late := time.AfterFunc(within, func() {
		end(fault.New(fault.Unreachable, "see whether the daemon there is well", "%s does not answer within %v", h.ID(), within))
	})
	defer late.Stop()
	identity := w.Identity()
	if identity == nil {
		return nil, nil, fault.New(fault.Failed, "see why its SSH door is not open", "this bastion has no statement of its keys yet")
	}
	certificate, err := w.Certificate()
	if err != nil {
		return nil, nil, err
	}
	raw, err := w.Connect(ctx, h)
	if err != nil {
		return nil, nil, err
	}
	conn, err := mtls.Client(raw, h.ID(), w.Servers.TLS(h.ID()), certificate, maxMessage)
	if err != nil {
		raw.Close()
		return nil, nil, err
	}
	hangUp := func() { conn.Close(); raw.Close() }
	defer func() {
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			hangUp()
		}
	}()
	stream, err := halliganv1.NewEvidenceClient(conn).Witness(ctx)
	if err != nil {
		return nil, nil, api.FromStatus(err)
	}
	s := &session{witness: w, stream: stream, host: h, copy: c, end: end, images: c.Images(), limit: rate.NewLimiter(pace, burst), sent: map[generation]int64{}, broken: map[generation]bool{}}
	have := c.Have()
	for _, l := range have {
		s.sent[generation{l.GetLineage(), l.GetGeneration()}] = int64(l.GetSize()) // #nosec G115 -- what the copy has
	}
	// Where sending fails receiving has the reason.
	_ = s.send(&halliganv1.WitnessRequest{Message: &halliganv1.WitnessRequest_Have{Have: &halliganv1.WitnessHave{Logs: have, Identity: identity}}})
	first, err := s.recv()
	if err != nil {
		return nil, nil, err
	}
	if first.GetIdentity() == nil {
		return nil, nil, fault.New(fault.Usage, "", "%s does not begin with who it is", h.ID())
	}
	return s, hangUp, c.Identify(first.GetIdentity())
}

type generation struct {
	lineage string
	number  uint64
}

// session is one stream.
type session struct {
	*witness
	stream grpc.BidiStreamingClient[halliganv1.WitnessRequest, halliganv1.WitnessResponse]
	host   bundle.Host
	copy   *mirror.Copy
	end    context.CancelCauseFunc
	images *mirror.Images
	limit  *rate.Limiter
	// sent is how much of each generation the server has sent or was told of;
	// broken are those that are not what they were, of which nothing is taken.
	sent   map[generation]int64
	broken map[generation]bool
	again  *time.Timer // ends the stream, where something is broken
	// refused is the action whose sealed before-images are not taken.
	refused string

	sending sync.Mutex // held while one message is sent
}

// send sends a message. Where it fails receiving has the reason.
func (s *session) send(m *halliganv1.WitnessRequest) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	return s.stream.Send(m)
}

func (s *session) recv() (*halliganv1.WitnessResponse, error) {
	m, err := s.stream.Recv()
	if errors.Is(err, io.EOF) {
		return nil, fault.New(fault.Unreachable, "", "%s ended the stream", s.host.ID())
	}
	if err != nil {
		return nil, api.FromStatus(err)
	}
	return m, nil
}

// tellPeers sends an agent what the others of its cluster say of themselves, at
// first and whenever that changes.
func (s *session) tellPeers(ctx context.Context) {
	changed, cancel := s.Mirrors.Changed()
	defer cancel()
	var told [][]byte
	for {
		if now := s.Mirrors.Peers(s.host.ID(), s.host.Cluster); !slices.EqualFunc(now, told, slices.Equal) {
			if err := s.send(&halliganv1.WitnessRequest{Message: &halliganv1.WitnessRequest_Peers{Peers: &halliganv1.WitnessPeers{Identities: now}}}); err != nil {
				return // the stream has ended
			}
			told = now
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		select { // others come as well
		case <-ctx.Done():
			return
		case <-time.After(soonest):
		}
	}
}

// hear takes what the server sends.
func (s *session) hear(ctx context.Context) error {
	defer func() {
		s.images.Close()
		if s.again != nil {
			s.again.Stop()
		}
	}()
	for {
		m, err := s.recv()
		if err == nil {
			err = s.take(ctx, m)
		}
		for errors.Is(err, io.EOF) && ctx.Err() == nil { // of sending
			_, err = s.recv()
			if err == nil {
				err = io.EOF
			}
		}
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}
	}
}

// take handles one message that is not in the middle of entries.
func (s *session) take(ctx context.Context, m *halliganv1.WitnessResponse) error {
	switch m := m.GetMessage().(type) {
	case *halliganv1.WitnessResponse_Head:
		if err := s.limit.Wait(ctx); err != nil {
			return err
		}
		return s.head(ctx, m.Head)
	case *halliganv1.WitnessResponse_Hold:
		if err := s.limit.Wait(ctx); err != nil {
			return err
		}
		return s.send(&halliganv1.WitnessRequest{Message: &halliganv1.WitnessRequest_Receipt{Receipt: s.copy.Hold(ctx, s.Held, m.Hold)}})
	case *halliganv1.WitnessResponse_Sealed:
		return s.sealed(m.Sealed)
	case *halliganv1.WitnessResponse_Identity:
		return s.copy.Identify(m.Identity)
	default:
		return fault.New(fault.Usage, "", "%s sends what does not belong there", s.host.ID())
	}
}

// head takes a head with its entries, and sends it back countersigned. What is not
// what it was is told by the copy; the rest of the stream goes on, since it may have
// events to hold.
func (s *session) head(ctx context.Context, h *halliganv1.WitnessHead) error {
	to, err := tiles.ParseCheckpoint(h.GetCheckpoint())
	if err != nil {
		return fault.New(fault.Refused, "", "%s sends a malformed checkpoint: %w", s.host.ID(), err)
	}
	g := generation{h.GetLineage(), h.GetGeneration()}
	from := s.sent[g]
	s.sent[g] = max(from, to.N)
	e := &entries{session: s, next: from, to: to.N}
	if s.broken[g] {
		return e.drain(ctx)
	}
	signed, err := s.copy.Head(ctx, h, e.all(ctx))
	var problem *mirror.Problem
	switch {
	case errors.As(err, &problem):
		if len(s.broken) == 0 {
			s.again = time.AfterFunc(lookAgain, func() { s.end(problem) })
		}
		s.broken[g] = true
		return e.drain(ctx)
	case err != nil:
		return err
	case e.next < e.to:
		return fault.New(fault.Failed, "", "the copy of %s is not what it was told to have", s.host.ID())
	case signed == nil:
		return nil
	}
	return s.send(&halliganv1.WitnessRequest{Message: &halliganv1.WitnessRequest_Cosigned{Cosigned: &halliganv1.WitnessCosigned{Lineage: g.lineage, Generation: g.number, Checkpoint: signed}}})
}

// entries are those that a head has announced, as they come.
type entries struct {
	*session
	next, to int64
	batch    [][]byte
}

// all yields the entries, of which there are no others than announced.
func (e *entries) all(ctx context.Context) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for e.next < e.to || len(e.batch) > 0 {
			if len(e.batch) == 0 {
				if err := e.more(ctx); err != nil {
					yield(nil, err)
					return
				}
				continue
			}
			entry := e.batch[0]
			e.batch = e.batch[1:]
			if !yield(entry, nil) {
				return
			}
		}
	}
}

// drain lets pass what is left of them.
func (e *entries) drain(ctx context.Context) error {
	e.batch = nil
	for e.next < e.to {
		if err := e.more(ctx); err != nil {
			return err
		}
		e.batch = nil
	}
	return nil
}

// more waits for the next entries. What else comes meanwhile is handled.
func (e *entries) more(ctx context.Context) error {
	late := time.AfterFunc(silence, func() {
		e.end(fault.New(fault.Unreachable, "", "%s announces entries and does not send them", e.host.ID()))
	})
	defer late.Stop()
	for {
		m, err := e.recv()
		if err != nil {
			return err
		}
		if m.GetHead() != nil {
			return fault.New(fault.Usage, "", "%s sends a head before the entries of the last", e.host.ID())
		}
		batch := m.GetEntries()
		if batch == nil {
			if err := e.take(ctx, m); err != nil {
				return err
			}
			continue
		}
		n := int64(len(batch.GetEntries()))
		if n == 0 || batch.GetFirst() != uint64(e.next) || n > e.to-e.next { // #nosec G115 -- next is not negative
			return fault.New(fault.Usage, "", "%s sends other entries than it announced", e.host.ID())
		}
		e.next += n
		e.batch = batch.GetEntries()
		return nil
	}
}

// sealed takes a piece of sealed before-images, and says when they are durable.
// Those that cannot be taken are passed over.
func (s *session) sealed(p *halliganv1.WitnessSealed) error {
	if s.refused == p.GetActionId() && p.GetOffset() > 0 {
		return nil
	}
	s.refused = ""
	stored, err := s.images.Part(p)
	if err != nil {
		s.refused = p.GetActionId()
		s.Log.Warn().Str("server", s.host.ID()).Str("action", neutral.LineMax(p.GetActionId(), 64)).Str("why", why(err)).Msg("sealed before-images are not taken")
		return nil
	}
	if stored == nil {
		return nil
	}
	return s.send(&halliganv1.WitnessRequest{Message: &halliganv1.WitnessRequest_Stored{Stored: stored}})
}
