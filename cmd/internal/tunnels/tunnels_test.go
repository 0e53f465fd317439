// Package tunnels tries the tunnels of nodes that cannot be dialled, and the
// bundles that bastions bring, with the real pieces of agent and bastion on
// loopback: neither may import the other, so they meet here.
//
// It stands on floor 5 and has nothing but tests.
package tunnels

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	agenttunnel "github.com/halligan-io/halligan/agent/tunnel"
	"github.com/halligan-io/halligan/api/mtls"
	"github.com/halligan-io/halligan/api/mux"
	"github.com/halligan-io/halligan/bastion/relay"
	bastiontunnel "github.com/halligan-io/halligan/bastion/tunnel"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// patience bounds what must happen at some time on a busy machine.
const patience = 40 * time.Second

func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in %v: %s", patience, what)
		}
	}
}

// free returns a port at which nobody listens.
func free(t testing.TB, address string) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", address+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String())
}

// pieces are a fleet with one bastion that takes tunnels.
type pieces struct {
	t       *testing.T
	fleet   *testfleet.Fleet
	store   *bundle.Store
	clock   *trust.Clock
	at      netip.AddrPort
	bastion *bastiontunnel.Tunnels
	stop    func() // of the bastion

	mu     sync.Mutex // guards events
	events []alarm.Event
}

// newPieces starts the bastion. Its inventory has cp-1 in prod and in staging.
func newPieces(t *testing.T) *pieces {
	p := &pieces{t: t, fleet: testfleet.New(t), clock: trust.NewClock(time.Time{}), at: free(t, "127.0.0.1"), bastion: bastiontunnel.New(zerolog.Nop())}
	path := filepath.Join(p.fleet.Dir, "bundle")
	if err := durable.Write(path, p.fleet.Inventory(func(inv *bundle.Inventory) {
		inv.Clusters[0].Nodes[0].Reach = bundle.ReachOut
		inv.Clusters = append(inv.Clusters, bundle.Cluster{Name: "staging", Nodes: []bundle.Host{{Name: "cp-1", Address: inv.Clusters[0].Nodes[0].Address, SSHPort: 3222}}})
		inv.Bastions = []bundle.Host{{Name: "bastion-a", Address: bundle.IP{Addr: p.at.Addr()}, SSHPort: 1, TunnelPort: p.at.Port()}}
	})); err != nil {
		t.Fatal(err)
	}
	var err error
	if p.store, err = bundle.Open(bundle.Options{Path: path}); err != nil {
		t.Fatal(err)
	}
	p.listen()
	return p
}

func (p *pieces) listen() {
	p.t.Helper()
	l, err := net.Listen("tcp", p.at.String())
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	authority := credential.New(credential.Options{Bundle: p.store, Clock: p.clock, Node: "bastion-a", Relay: true})
	secure := bastiontunnel.Listen(l, authority, mtls.Options{Certificate: p.server("bastion-a.bastion"), Log: zerolog.Nop(), Alarm: func(e alarm.Event) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.events = append(p.events, e)
	}})
	serving.Go(func() { _ = p.bastion.Serve(ctx, secure) })
	p.stop = func() { cancel(); serving.Wait() }
	p.t.Cleanup(func() { p.stop() })
}

// server returns a server certificate of the fleet's.
func (p *pieces) server(name string) func() (*tls.Certificate, error) {
	return server(p.t, p.fleet, name)
}

func server(t *testing.T, fleet *testfleet.Fleet, name string) func() (*tls.Certificate, error) {
	t.Helper()
	get, err := mtls.Load(must2(t, func() (string, string) { return fleet.ServerFiles(name, testfleet.Now()) }, name))
	if err != nil {
		t.Fatal(err)
	}
	return get
}

func must2(t *testing.T, files func() (string, string), name string) (certFile, keyFile, server string, log zerolog.Logger) {
	t.Helper()
	certFile, keyFile = files()
	return certFile, keyFile, name, zerolog.Nop()
}

// node keeps tunnels with a certificate until stop is called. Its SSH door sends
// back what it gets.
func (p *pieces) node(certificate func() (*tls.Certificate, error)) (tunnels *agenttunnel.Tunnels, stop func()) {
	p.t.Helper()
	tunnels = agenttunnel.New(agenttunnel.Options{Bundles: p.store, Servers: &credential.Servers{Bundle: p.store, Clock: p.clock}, Certificate: certificate, Log: zerolog.Nop()})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { tunnels.Run(ctx) })
	l := tunnels.Listener(trust.SSH)
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				_, _ = fmt.Fprintln(c, c.RemoteAddr())
				_, _ = io.Copy(c, c)
			})
		}
	})
	stop = sync.OnceFunc(func() { cancel(); l.Close(); running.Wait() })
	p.t.Cleanup(stop)
	return tunnels, stop
}

func (p *pieces) up(node string) bool {
	_, ok := p.bastion.Since()[node]
	return ok
}

// open opens the SSH door of a node and returns what it says of its peer.
func (p *pieces) open(node string) (conn net.Conn, peer string, err error) {
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	if conn, err = p.bastion.Open(ctx, node, trust.SSH); err != nil {
		return nil, "", err
	}
	p.t.Cleanup(func() { conn.Close() })
	line := make([]byte, len(p.at.String())+1)
	if _, err := io.ReadFull(conn, line); err != nil {
		return nil, "", err
	}
	return conn, strings.TrimSpace(string(line)), nil
}

// TestTunnel: a node that only dials out is reached, comes back after its bastion
// was gone, and is known by its bastion's address to its own doors.
func TestTunnel(t *testing.T) {
	p := newPieces(t)
	if _, _, err := p.open("cp-1.prod"); !errors.Is(err, relay.ErrNoTunnel) {
		t.Errorf("before: %v", err)
	}
	tunnels, stop := p.node(p.server("cp-1.prod"))
	eventually(t, "the tunnel is open", func() bool { return p.up("cp-1.prod") })
	conn, peer, err := p.open("cp-1.prod")
	if err != nil || peer != p.at.String() {
		t.Fatalf("the peer is %q, %v", peer, err)
	}
	eventually(t, "the agent says so", func() bool { return len(tunnels.Warnings("cp-1", "prod")) == 0 })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := p.bastion.Open(ctx, "cp-1.prod", trust.GRPC); err == nil || !strings.Contains(err.Error(), "not open") {
		t.Errorf("a door that is shut: %v", err)
	}

	p.stop()
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("a stream of a tunnel that has ended goes on")
	}
	eventually(t, "the agent says that it is down", func() bool {
		w := tunnels.Warnings("cp-1", "prod")
		return len(w) == 1 && strings.Contains(w[0], "the tunnel to bastion-a.bastion is down since")
	})
	p.listen()
	eventually(t, "the tunnel is open again", func() bool { return p.up("cp-1.prod") })
	if _, _, err := p.open("cp-1.prod"); err != nil {
		t.Error(err)
	}
	stop()
	eventually(t, "the bastion hears that it ended", func() bool { return !p.up("cp-1.prod") })
}

// TestNewest: of two tunnels of one node the newer one stays.
func TestNewest(t *testing.T) {
	p := newPieces(t)
	first := p.raw(p.server("cp-1.prod"))
	eventually(t, "the first is open", func() bool { return p.up("cp-1.prod") })
	was := p.bastion.Since()["cp-1.prod"]
	second := p.raw(p.server("cp-1.prod"))
	eventually(t, "the second is open", func() bool { return p.bastion.Since()["cp-1.prod"].After(was) })
	select {
	case <-first:
	case <-time.After(patience):
		t.Error("the first goes on")
	}
	select {
	case <-second:
		t.Error("the second has ended")
	default:
	}
	if n := len(p.bastion.Since()); n != 1 {
		t.Errorf("%d are open", n)
	}
}

// raw has a tunnel once, without the agent's own precautions. The channel is
// closed at its end.
func (p *pieces) raw(certificate func() (*tls.Certificate, error)) (ended chan struct{}) {
	p.t.Helper()
	ended = make(chan struct{})
	config := (&credential.Servers{Bundle: p.store, Clock: p.clock}).TLS("bastion-a.bastion")
	config.NextProtos = []string{mux.Protocol}
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate() }
	raw, err := net.Dial("tcp", p.at.String())
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { raw.Close() })
	go func() {
		defer close(ended)
		_ = mux.Node(tls.Client(raw, config), zerolog.Nop(), func(*mux.Session) {}, func(_ trust.Door, take func() (*mux.Stream, error)) error {
			s, err := take()
			if err == nil {
				_, err = io.WriteString(s, "stolen")
			}
			return err
		})
	}()
	return ended
}

// TestSilence: a link that carries nothing any more, and does not say so, is given
// up by both ends, and a new one is tried.
func TestSilence(t *testing.T) {
	if testing.Short() {
		t.Skip("it waits for 20 s")
	}
	t.Parallel() // it does little but wait
	p := newPieces(t)
	var dead atomic.Bool // what passes the link is lost
	link, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	go func() {
		for {
			near, err := link.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", p.at.String())
			if err != nil {
				near.Close()
				continue
			}
			silent := dead.Load() // those that come later are well
			pass := func(to, from net.Conn) {
				defer to.Close()
				defer from.Close()
				for buf := make([]byte, 4096); ; {
					n, err := from.Read(buf)
					if err != nil {
						return
					}
					if dead.Load() == silent {
						_, _ = to.Write(buf[:n]) // the next read tells of its end
					}
				}
			}
			go pass(far, near)
			go pass(near, far)
		}
	}()
	at := netip.MustParseAddrPort(link.Addr().String())
	if _, err := p.store.Offer(p.fleet.Inventory(func(inv *bundle.Inventory) {
		inv.Bastions = []bundle.Host{{Name: "bastion-a", Address: bundle.IP{Addr: at.Addr()}, SSHPort: 1, TunnelPort: at.Port()}}
	})); err != nil {
		t.Fatal(err)
	}
	tunnels, _ := p.node(p.server("cp-1.prod"))
	eventually(t, "the tunnel is open", func() bool { return p.up("cp-1.prod") && len(tunnels.Warnings("cp-1", "prod")) == 0 })
	was := p.bastion.Since()["cp-1.prod"]
	dead.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := p.bastion.Open(ctx, "cp-1.prod", trust.SSH); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a stream through a dead link: %v", err)
	}
	eventually(t, "there is another tunnel", func() bool { return p.bastion.Since()["cp-1.prod"].After(was) })
	// The peer that the node tells of has another port than the bastion's own.
	conn, err := p.bastion.Open(t.Context(), "cp-1.prod", trust.SSH)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

// TestCrowd: a node that only connects does not fill the bastion.
func TestCrowd(t *testing.T) {
	p := newPieces(t)
	config := (&credential.Servers{Bundle: p.store, Clock: p.clock}).TLS("bastion-a.bastion")
	config.NextProtos = []string{mux.Protocol}
	certificate, err := p.server("cp-1.staging")()
	if err != nil {
		t.Fatal(err)
	}
	config.Certificates = []tls.Certificate{*certificate}
	ended := make(chan struct{}, 8)
	for range 8 {
		c, err := tls.Dial("tcp", p.at.String(), config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		go func() { _, _ = io.Copy(io.Discard, c); ended <- struct{}{} }()
	}
	for range 4 { // the others wait for an answer, for some seconds
		select {
		case <-ended:
		case <-time.After(patience):
			t.Fatal("all of them stay")
		}
	}
	p.node(p.server("cp-1.prod"))
	eventually(t, "another node has its tunnel", func() bool { return p.up("cp-1.prod") })
}

// TestStrangers: nobody but the node itself is taken for it.
func TestStrangers(t *testing.T) {
	p := newPieces(t)
	p.node(p.server("cp-1.prod"))
	eventually(t, "the tunnel is open", func() bool { return p.up("cp-1.prod") })
	client := p.fleet.Client(nil, testfleet.Holder("bot", trust.Commander), testfleet.Now())
	other := testfleet.New(t)
	for name, c := range map[string]struct {
		certificate func() (*tls.Certificate, error)
		told        string
	}{
		"a client":                {func() (*tls.Certificate, error) { return &client, nil }, "certificate of a node"},
		"a bastion":               {p.server("bastion-a.bastion"), "no node bastion-a.bastion"},
		"a node of no inventory":  {p.server("cp-2.prod"), "no node cp-2.prod"},
		"a node of another fleet": {server(t, other, "cp-1.prod"), "certificate of a node"},
	} {
		select {
		case <-p.raw(c.certificate):
		case <-time.After(patience):
			t.Errorf("%s keeps a tunnel", name)
		}
		eventually(t, name+" is told of", func() bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			for _, e := range p.events {
				if e.Kind == alarm.Refusal && strings.Contains(e.Text, c.told) {
					p.events = nil
					return true
				}
			}
			return false
		})
	}
	// A node of another cluster is that one, and no other.
	stolen := p.raw(p.server("cp-1.staging"))
	eventually(t, "it is taken for itself", func() bool { return p.up("cp-1.staging") })
	if _, peer, err := p.open("cp-1.prod"); err != nil || peer != p.at.String() {
		t.Errorf("cp-1.prod is %q, %v", peer, err)
	}
	if n := len(p.bastion.Since()); n != 2 {
		t.Errorf("%d are open", n)
	}
	// Whoever speaks something else, or nothing, is no tunnel.
	config := (&credential.Servers{Bundle: p.store, Clock: p.clock}).TLS("bastion-a.bastion")
	config.NextProtos = []string{"h2"}
	config.Certificates = []tls.Certificate{client}
	if c, err := tls.Dial("tcp", p.at.String(), config); err == nil {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("gRPC is spoken there")
		}
		c.Close()
	}
	// A certificate that is revoked ends what it has opened.
	if _, err := p.store.Offer(p.fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"cp-1.staging"} })); err != nil {
		t.Fatal(err)
	}
	select {
	case <-stolen:
	case <-time.After(patience):
		t.Error("the tunnel of a node that was revoked goes on")
	}
	eventually(t, "it is forgotten", func() bool { return !p.up("cp-1.staging") })
	if !p.up("cp-1.prod") {
		t.Error("the other has ended, too")
	}
}

// TestImpostor: a node keeps no tunnel to anybody but the bastion, and ends the one
// it has when the bundle drops the bastion or revokes it.
func TestImpostor(t *testing.T) {
	for name, change := range map[string]func(*pieces) []byte{
		"dropped": func(p *pieces) []byte {
			return p.fleet.Inventory(func(inv *bundle.Inventory) { inv.Bastions = nil })
		},
		"no longer takes any": func(p *pieces) []byte {
			return p.fleet.Inventory(func(inv *bundle.Inventory) {
				inv.Bastions = []bundle.Host{inv.Bastions[0]}
				inv.Bastions[0].TunnelPort = 0
			})
		},
		"revoked": func(p *pieces) []byte {
			return p.fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"bastion-a.bastion"} })
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPieces(t)
			tunnels, _ := p.node(p.server("cp-1.prod"))
			eventually(t, "the tunnel is open", func() bool { return p.up("cp-1.prod") })
			if _, err := p.store.Offer(change(p)); err != nil {
				t.Fatal(err)
			}
			eventually(t, "it has ended", func() bool { return !p.up("cp-1.prod") })
			eventually(t, "the agent says why", func() bool {
				w := strings.Join(tunnels.Warnings("cp-1", "prod"), "\n")
				return strings.Contains(w, "revoked") || strings.Contains(w, "has a tunnelPort")
			})
		})
	}
	// Another server of the fleet at the bastion's address.
	p := newPieces(t)
	p.stop()
	l, err := net.Listen("tcp", p.at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	certificate, err := p.server("cp-1.staging")()
	if err != nil {
		t.Fatal(err)
	}
	spoken := make(chan error, 100)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			spoken <- tls.Server(c, &tls.Config{Certificates: []tls.Certificate{*certificate}, NextProtos: []string{mux.Protocol}, ClientAuth: tls.RequireAnyClientCert}).Handshake()
			c.Close()
		}
	}()
	tunnels, _ := p.node(p.server("cp-1.prod"))
	if err := <-spoken; err == nil {
		t.Error("the node shakes hands with another node")
	}
	eventually(t, "the agent says who is there", func() bool {
		return strings.Contains(strings.Join(tunnels.Warnings("cp-1", "prod"), "\n"), "the server is not bastion-a.bastion")
	})
}
