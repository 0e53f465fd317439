package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/sshclient"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// line is a connection to one agent that outlives the bastion on its way: a call
// that only reads is made again through the next one, and any call takes a new
// connection where the old one is known to be gone before it begins. What
// mutates is never sent twice: what became of it is asked by its ID.
type line struct {
	fleet *fleet
	host  bundle.Host

	mu      sync.Mutex // guards both below; held while a new connection is made
	now     *link
	renewed int
}

// link is one connection.
type link struct {
	ssh  *sshclient.Client
	conn *grpc.ClientConn
}

// connect logs in at a node.
func (f *fleet) connect(ctx context.Context, host bundle.Host) (*link, error) {
	client, stream, err := f.callable(ctx, host)
	if err != nil {
		return nil, err
	}
	conn, err := overConn(stream, host.ID(), func(context.Context) (net.Conn, error) {
		return nil, fmt.Errorf("the connection to %s is gone", host.ID())
	})
	if err != nil {
		client.Close()
		return nil, err
	}
	return &link{client, conn}, nil
}

// callable logs in at a node and opens its API. The bastion may break in between,
// and then there is another.
func (f *fleet) callable(ctx context.Context, host bundle.Host) (*sshclient.Client, net.Conn, error) {
	for breaks := 0; ; breaks++ {
		client, err := f.enter(ctx, host)
		if err != nil {
			return nil, nil, err
		}
		stream, err := client.API(ctx)
		if err == nil {
			return client, stream, nil
		}
		client.Close()
		if ctx.Err() != nil || !fault.Is(err, fault.Unreachable) || f.login.SecurityKey() || breaks >= len(f.way.bastions) {
			return nil, nil, err
		}
	}
}

func (k *link) gone() bool {
	select {
	case <-k.ssh.Done():
		return true
	default:
		return false
	}
}

func (k *link) close() error { return errors.Join(k.conn.Close(), k.ssh.Close()) }

// reads are the methods that change nothing, but for what an agent puts on record
// of them.
var reads = map[string]bool{
	halliganv1.Agent_Describe_FullMethodName:       true,
	halliganv1.Agent_Status_FullMethodName:         true,
	halliganv1.Agent_Plan_FullMethodName:           true,
	halliganv1.Agent_Undo_FullMethodName:           true,
	halliganv1.Agent_ShowPlan_FullMethodName:       true,
	halliganv1.Agent_ExchangeBundle_FullMethodName: true,
	halliganv1.Agent_Get_FullMethodName:            true,
	halliganv1.Agent_History_FullMethodName:        true,
	halliganv1.Agent_Top_FullMethodName:            true,
}

// noticed is how long after its last call has failed a connection may take to
// know that it has ended.
const noticed = 500 * time.Millisecond

// link returns the connection for a call that is about to begin.
func (l *line) link(ctx context.Context) (*link, error) {
	l.mu.Lock()
	k := l.now
	l.mu.Unlock()
	if l.fleet.way.direct() || !k.gone() {
		return k, nil
	}
	return l.renew(ctx, k)
}

// broke reports whether a call failed since its connection, which leads through
// bastions, has ended.
func (l *line) broke(ctx context.Context, k *link, err error) bool {
	if s, ok := status.FromError(err); !ok || s.Code() != codes.Unavailable || len(s.Details()) > 0 || l.fleet.way.direct() {
		return false
	}
	late := time.NewTimer(noticed)
	defer late.Stop()
	select {
	case <-k.ssh.Done():
		return true
	case <-late.C:
	case <-ctx.Done():
	}
	return false
}

// renew makes a connection in place of one that broke.
func (l *line) renew(ctx context.Context, was *link) (*link, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.now != was {
		return l.now, nil
	}
	if l.renewed >= 2*len(l.fleet.way.bastions) {
		return nil, fault.New(fault.Unreachable, "look at the bastions: halligan status", "the connection to %s breaks again and again", l.host.ID())
	}
	l.renewed++
	k, err := l.fleet.connect(ctx, l.host)
	if err != nil {
		return nil, err
	}
	l.fleet.app.note("the connection to %s broke and was made again", l.host.ID())
	l.fleet.loose.Go(func() { _ = was.close() })
	l.now = k
	return k, nil
}

// Invoke makes a call.
func (l *line) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	k, err := l.link(ctx)
	for err == nil {
		if err = k.conn.Invoke(ctx, method, args, reply, opts...); err == nil || !reads[method] || !l.broke(ctx, k, err) {
			return err
		}
		k, err = l.renew(ctx, k)
	}
	return err
}

// NewStream begins a call that streams.
func (l *line) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	k, err := l.link(ctx)
	if err != nil {
		return nil, err
	}
	begin := func(k *link) (grpc.ClientStream, error) { return k.conn.NewStream(ctx, desc, method, opts...) }
	stream, err := begin(k)
	if !reads[method] || desc.ClientStreams {
		return stream, err
	}
	r := &reread{ClientStream: stream, line: l, link: k, ctx: ctx, begin: begin}
	if err != nil {
		return r, r.again(err)
	}
	return r, nil
}

// reread is an answer that goes on where it was, over another connection, when
// its own breaks. It is used by one goroutine at a time.
type reread struct {
	grpc.ClientStream
	line    *line
	link    *link
	ctx     context.Context
	begin   func(*link) (grpc.ClientStream, error)
	request any // nil before it is sent
	delivered
}

// SendMsg sends the one request.
func (r *reread) SendMsg(m any) error {
	r.request = m
	if err := r.ClientStream.SendMsg(m); err == nil || !errors.Is(err, io.EOF) {
		return err
	}
	return nil // RecvMsg tells why
}

// CloseSend ends the request.
func (r *reread) CloseSend() error { return r.ClientStream.CloseSend() }

// RecvMsg returns the next message that was not delivered yet.
func (r *reread) RecvMsg(m any) error {
	for {
		err := r.ClientStream.RecvMsg(m)
		switch {
		case err == nil && r.fresh(m):
			return nil
		case err == nil:
			continue
		case errors.Is(err, io.EOF):
			return err
		}
		if err := r.again(err); err != nil {
			return err
		}
	}
}

// again asks again where the connection broke, and returns the error elsewhere.
func (r *reread) again(err error) error {
	for err != nil && r.line.broke(r.ctx, r.link, err) {
		k, rerr := r.line.renew(r.ctx, r.link)
		if rerr != nil {
			return rerr
		}
		r.link = k
		r.until, r.repeated = r.last, true
		if r.ClientStream, err = r.begin(k); err != nil || r.request == nil {
			continue
		}
		if err = r.ClientStream.SendMsg(r.request); err == nil {
			err = r.ClientStream.CloseSend()
		} else if errors.Is(err, io.EOF) {
			err = nil // RecvMsg tells why
		}
	}
	return err
}

// delivered is what of an answer was handed on already.
type delivered struct {
	last     string          // key of the last object; they come in the order of their keys
	entries  map[string]bool // actions
	repeated bool            // the answer was asked for again, and
	until    string          // what was its last key before
}

// fresh takes out of a message what was delivered, and reports whether something
// is left.
func (d *delivered) fresh(message any) bool {
	switch m := message.(type) {
	case *halliganv1.GetEvent:
		if d.repeated {
			m.Objects = slices.DeleteFunc(m.Objects, func(o *halliganv1.Object) bool { return o.GetKey() <= d.until })
		}
		if n := len(m.Objects); n > 0 {
			d.last = m.Objects[n-1].GetKey()
		}
		return !d.repeated || len(m.Objects) > 0 || m.GetSummary() != nil
	case *halliganv1.HistoryEntry:
		if d.entries == nil {
			d.entries = map[string]bool{}
		}
		was := d.entries[m.GetActionId()]
		d.entries[m.GetActionId()] = true
		return !was || !d.repeated
	}
	return true
}

func (l *line) current() *link {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now
}

func (l *line) close() error { return l.current().close() }
