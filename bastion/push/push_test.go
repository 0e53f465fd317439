package push

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// patience bounds what must happen at some time on a busy machine.
const patience = 30 * time.Second

func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in %v: %s", patience, what)
		}
	}
}

// node stands for an agent: it notes what it is brought, and answers with what it
// is told to.
type node struct {
	halliganv1.UnimplementedAgentServer
	at netip.AddrPort

	mu      sync.Mutex // guards what follows
	brought []byte
	times   int
	by      string
	answer  *halliganv1.ExchangeBundleResponse
}

func (n *node) ExchangeBundle(_ context.Context, req *halliganv1.ExchangeBundleRequest) (*halliganv1.ExchangeBundleResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.brought = req.GetBundle()
	n.times++
	if n.answer == nil {
		return &halliganv1.ExchangeBundleResponse{}, nil
	}
	return n.answer, nil
}

func (n *node) says(answer *halliganv1.ExchangeBundleResponse) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.answer = answer
}

func (n *node) has(data []byte) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return bytes.Equal(n.brought, data)
}

func (n *node) asked() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.times
}

// serve opens a node's gRPC door with the certificate of a name.
func serve(t *testing.T, fleet *testfleet.Fleet, name string) *node {
	t.Helper()
	n := &node{}
	cert, err := tls.LoadX509KeyPair(fleet.ServerFiles(name, testfleet.Now()))
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert, VerifyConnection: func(s tls.ConnectionState) error {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.by = strings.Join(s.PeerCertificates[0].DNSNames, " ")
		return nil
	}}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
	halliganv1.RegisterAgentServer(server, n)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.at = netip.MustParseAddrPort(l.Addr().String())
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	return n
}

// inventory lists the nodes as cp-0, cp-1 ..., and before them some that never
// answer.
func inventory(fleet *testfleet.Fleet, dead int, nodes ...*node) []byte {
	return fleet.Inventory(func(inv *bundle.Inventory) {
		var list []bundle.Host
		for i := range dead {
			list = append(list, bundle.Host{Name: fmt.Sprintf("dead-%d", i), Address: bundle.IP{Addr: netip.AddrFrom4([4]byte{127, 0, 2, byte(i)})}, SSHPort: 1, GRPCPort: 2})
		}
		for i, n := range nodes {
			list = append(list, bundle.Host{Name: fmt.Sprintf("cp-%d", i), Address: bundle.IP{Addr: n.at.Addr()}, SSHPort: uint16(1 + i), GRPCPort: n.at.Port()})
		}
		inv.Clusters = []bundle.Cluster{{Name: "prod", Nodes: append(list, bundle.Host{Name: "ssh-only", Address: bundle.IP{Addr: netip.MustParseAddr("127.0.0.98")}, SSHPort: 1})}}
	})
}

// run pushes what is at first in force until the test ends.
func run(t *testing.T, fleet *testfleet.Fleet, first []byte, every time.Duration, connect func(context.Context, bundle.Host) (net.Conn, error)) (*bundle.Store, *logged) {
	t.Helper()
	path := filepath.Join(fleet.Dir, "bundle")
	if err := durable.Write(path, first); err != nil {
		t.Fatal(err)
	}
	store, err := bundle.Open(bundle.Options{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(fleet.ServerFiles("bastion-a.bastion", testfleet.Now()))
	if err != nil {
		t.Fatal(err)
	}
	log := &logged{}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		Run(ctx, Options{Bundles: store, Servers: &credential.Servers{Bundle: store, Clock: trust.NewClock(time.Time{})}, Connect: connect, Every: every, Log: zerolog.New(log),
			Certificate: func() (*tls.Certificate, error) { return &cert, nil }})
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	return store, log
}

type logged struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) has(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.text.String(), text)
}

func dial(ctx context.Context, h bundle.Host) (net.Conn, error) {
	at, _ := h.GRPC()
	return (&net.Dialer{}).DialContext(ctx, "tcp", at.String())
}

// TestPush: what is in force is brought to all nodes at once and when it changes,
// by the bastion as itself; what a node has that is newer is taken over, and
// nothing else.
func TestPush(t *testing.T) {
	fleet := testfleet.New(t)
	a, b := serve(t, fleet, "cp-0.prod"), serve(t, fleet, "cp-1.prod")
	first := inventory(fleet, 0, a, b)
	store, log := run(t, fleet, first, 50*time.Millisecond, dial)
	eventually(t, "both have the first", func() bool { return a.has(first) && b.has(first) })
	a.mu.Lock()
	if a.by != "bastion-a.bastion" {
		t.Errorf("it comes as %q", a.by)
	}
	a.mu.Unlock()

	// A newer one of one node goes to the other.
	newer := fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"mallory"} })
	a.says(&halliganv1.ExchangeBundleResponse{Bundle: newer})
	eventually(t, "the bastion has the newer one", func() bool { return bytes.Equal(store.Raw(), newer) })
	eventually(t, "so has the other node", func() bool { return b.has(newer) })

	// One that is not signed, or forked, is not.
	tampered := bytes.Replace(newer, []byte("mallory"), []byte("alice99"), 1)
	a.says(&halliganv1.ExchangeBundleResponse{Bundle: tampered})
	eventually(t, "it is told", func() bool { return log.has("could not be brought") && log.has("cp-0.prod") })
	if !bytes.Equal(store.Raw(), newer) {
		t.Error("a bundle that nobody has signed is in force")
	}
	// An older one is no trouble, a node's refusal is told.
	a.says(&halliganv1.ExchangeBundleResponse{Bundle: first})
	eventually(t, "it is told again", func() bool { return log.has("brought to it again") })
	b.says(&halliganv1.ExchangeBundleResponse{Refused: api.ErrorOf(fault.New(fault.Refused, "", "signed in the future"))})
	eventually(t, "the refusal is told", func() bool { return log.has("signed in the future") })
	// More than a bundle may have is not read.
	a.says(&halliganv1.ExchangeBundleResponse{Bundle: make([]byte, 4<<20)})
	eventually(t, "it is too large", func() bool { return log.has("larger than max") })
}

// TestDead: nodes that do not answer hold up no revocation.
func TestDead(t *testing.T) {
	fleet := testfleet.New(t)
	alive := serve(t, fleet, "cp-0.prod")
	var waiting atomic.Int32
	var most atomic.Int32
	connect := func(ctx context.Context, h bundle.Host) (net.Conn, error) {
		if !strings.HasPrefix(h.Name, "dead") {
			return dial(ctx, h)
		}
		n := waiting.Add(1)
		defer waiting.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		select { // most of them fail, so that the others are what it hangs at
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
			if h.Name != "dead-0" {
				return nil, errors.New("no answer")
			}
		}
		<-ctx.Done()
		return nil, ctx.Err()
	}
	first := inventory(fleet, 100, alive)
	store, _ := run(t, fleet, first, time.Hour, connect)
	eventually(t, "the one that lives has it", func() bool { return alive.has(first) })
	if n := most.Load(); n > atOnce {
		t.Errorf("%d nodes at once", n)
	}
	newer := fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"mallory"} })
	if _, err := store.Offer(newer); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	eventually(t, "it has the newer one", func() bool { return alive.has(newer) })
	if d := time.Since(start); d >= each { // that is what the dead ones take
		t.Errorf("only after %v", d)
	}
}

// TestImpostor: a bundle goes to nobody else in the place of a node.
func TestImpostor(t *testing.T) {
	fleet := testfleet.New(t)
	other := serve(t, fleet, "cp-1.staging")
	_, log := run(t, fleet, inventory(fleet, 0, other), 20*time.Millisecond, dial)
	eventually(t, "it is told", func() bool { return log.has("the server is not cp-0.prod") })
	if other.asked() > 0 {
		t.Error("another node is brought the bundle")
	}
}

// TestFault: a node whose answer this program cannot take costs the others
// nothing.
func TestFault(t *testing.T) {
	fleet := testfleet.New(t)
	a, b := serve(t, fleet, "cp-0.prod"), serve(t, fleet, "cp-1.prod")
	first := inventory(fleet, 0, a, b)
	_, log := run(t, fleet, first, 50*time.Millisecond, func(ctx context.Context, h bundle.Host) (net.Conn, error) {
		if h.Name == "cp-0" {
			panic("what is this")
		}
		return dial(ctx, h)
	})
	eventually(t, "it is told", func() bool { return log.has("what is this") && log.has("a fault of the bastion") })
	asked := b.asked()
	eventually(t, "the other is asked again", func() bool { return b.has(first) && b.asked() > asked })
}
