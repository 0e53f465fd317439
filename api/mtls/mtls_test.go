package mtls_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/mtls"
	"github.com/halligan-io/halligan/internal/admission"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/issuer"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// service answers with who asks, and reads until it is stopped.
type service struct {
	halliganv1.UnimplementedAgentServer
}

func (service) Status(ctx context.Context, _ *halliganv1.StatusRequest) (*halliganv1.StatusResponse, error) {
	c, err := grpcdoor.CallerOf(ctx)
	return &halliganv1.StatusResponse{Actor: c.Who.Person, Role: c.Who.Role.String(), Door: string(c.Who.Door), CredentialExpires: timestamppb.New(c.Who.NotAfter)}, err
}

func (service) Get(_ *halliganv1.GetRequest, stream grpc.ServerStreamingServer[halliganv1.GetEvent]) error {
	if err := stream.Send(&halliganv1.GetEvent{}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return stream.Context().Err()
}

// everybody may call everything.
func everybody() map[string]grpcdoor.Row {
	row := grpcdoor.Row{May: func(trust.Identity) bool { return true }, Record: grpcdoor.Routine}
	rows := map[string]grpcdoor.Row{}
	for _, m := range grpcdoor.Reflection {
		rows[m] = row
	}
	for _, m := range halliganv1.Agent_ServiceDesc.Methods {
		rows["/"+halliganv1.Agent_ServiceDesc.ServiceName+"/"+m.MethodName] = row
	}
	for _, m := range halliganv1.Agent_ServiceDesc.Streams {
		rows["/"+halliganv1.Agent_ServiceDesc.ServiceName+"/"+m.StreamName] = row
	}
	return rows
}

type silent struct{}

func (silent) Raise(alarm.Event) {}

// world is a daemon with only this door.
type world struct {
	t       *testing.T
	fleet   *testfleet.Fleet
	store   *bundle.Store
	address string

	mu      sync.Mutex // guards what follows
	refused []string
	floods  int
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, fleet: testfleet.New(t)}
	file := filepath.Join(w.fleet.Dir, "bundle")
	w.must(os.WriteFile(file, w.fleet.Bundle(), 0o600))
	var err error
	w.store, err = bundle.Open(bundle.Options{Path: file})
	w.must(err)
	authority := credential.New(credential.Options{Bundle: w.store, Clock: trust.NewClock(time.Time{}), Cluster: testfleet.Cluster, Node: testfleet.Node})
	certFile, keyFile := w.fleet.ServerFiles(testfleet.Server, testfleet.Now())
	certificate, err := mtls.Load(certFile, keyFile, testfleet.Server, zerolog.Nop())
	w.must(err)
	server, err := grpcdoor.New(grpcdoor.Options{Alarms: silent{}, Log: zerolog.Nop(), Methods: everybody(),
		Register: func(r grpc.ServiceRegistrar) { halliganv1.RegisterAgentServer(r, service{}) }})
	w.must(err)
	t.Cleanup(server.Shutdown)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	w.must(err)
	w.address = l.Addr().String()
	secure := mtls.NewListener(l, mtls.Options{Certificate: certificate, Authority: authority, Log: zerolog.Nop(), Alarm: func(e alarm.Event) {
		w.mu.Lock()
		defer w.mu.Unlock()
		switch e.Kind {
		case alarm.Refusal:
			w.refused = append(w.refused, e.Text)
		case admission.Flood:
			w.floods++
		}
	}})
	done := make(chan error, 1)
	go func() { done <- server.Serve(secure) }()
	t.Cleanup(func() {
		server.Shutdown()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// dial comes with a certificate, from an address of the loopback network.
func (w *world) dial(t *testing.T, cert tls.Certificate, from string) halliganv1.AgentClient {
	t.Helper()
	config := &tls.Config{RootCAs: w.store.Current().Policy.Authorities.TLSServer.Pool(), ServerName: testfleet.Server, Certificates: []tls.Certificate{cert}}
	c, err := grpc.NewClient("passthrough:///"+w.address, grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithContextDialer(dialer(from)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return halliganv1.NewAgentClient(c)
}

func dialer(from string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, address string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		return d.DialContext(ctx, "tcp", address)
	}
}

// said returns the last refusal.
func (w *world) said() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.refused) == 0 {
		return ""
	}
	return w.refused[len(w.refused)-1]
}

func status(c halliganv1.AgentClient) (*halliganv1.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return c.Status(ctx, &halliganv1.StatusRequest{})
}

func TestClient(t *testing.T) {
	w := newWorld(t)
	deploy := testfleet.Holder("deploy-bot", trust.Responder)
	st, err := status(w.dial(t, w.fleet.Client(nil, deploy, testfleet.Now()), "127.0.0.1"))
	if err != nil || st.GetActor() != "deploy-bot" || st.GetRole() != "responder" || st.GetDoor() != "grpc" || st.GetCredentialExpires().AsTime().Before(time.Now()) {
		t.Errorf("%v, %v", st, err)
	}

	// Another fleet, whose authorities have the same names.
	other := testfleet.New(t)
	elsewhere := deploy
	elsewhere.Clusters = []string{"staging"}
	now := time.Now()
	serverCert, serverKey := w.fleet.ServerFiles("cp-2.prod", testfleet.Now())
	asServer, err := tls.LoadX509KeyPair(serverCert, serverKey)
	w.must(err)
	stolen := w.fleet.Client(nil, deploy, testfleet.Now())
	stolen.PrivateKey = other.Client(nil, deploy, testfleet.Now()).PrivateKey
	for name, c := range map[string]struct {
		cert tls.Certificate
		said string
	}{
		"another CA":              {other.Client(nil, deploy, testfleet.Now()), "client certificate"},
		"a server's certificate":  {asServer, "usage"},
		"another cluster":         {w.fleet.Client(nil, elsewhere, testfleet.Now()), "staging"},
		"lapsed":                  {w.fleet.Client(nil, deploy, issuer.Validity{NotBefore: now.Add(-time.Hour), NotAfter: now.Add(-time.Minute)}), "ended"},
		"not yet valid":           {w.fleet.Client(nil, deploy, issuer.Validity{NotBefore: now.Add(time.Minute), NotAfter: now.Add(time.Hour)}), "not valid before"},
		"no certificate":          {tls.Certificate{}, ""},
		"somebody else's private": {stolen, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w.mu.Lock()
			w.refused = nil
			w.mu.Unlock()
			if st, err := status(w.dial(t, c.cert, "127.0.0.1")); err == nil {
				t.Errorf("let in as %v", st)
			}
			if c.said == "" { // it never becomes known who came
				return
			}
			within(t, "the refusal is told", func() bool { return w.said() != "" })
			if said := w.said(); !strings.Contains(said, c.said) {
				t.Errorf("refused with %q, want %q", said, c.said)
			}
		})
	}
}

// TestOldTLS: what is not TLS 1.3 with HTTP/2 gets nowhere, and no session can be
// resumed.
func TestOldTLS(t *testing.T) {
	w := newWorld(t)
	cert := w.fleet.Client(nil, testfleet.Holder("bot", trust.Observer), testfleet.Now())
	config := func() *tls.Config {
		return &tls.Config{RootCAs: w.store.Current().Policy.Authorities.TLSServer.Pool(), ServerName: testfleet.Server, Certificates: []tls.Certificate{cert},
			NextProtos: []string{"h2"}, ClientSessionCache: tls.NewLRUClientSessionCache(4)}
	}
	try := func(c *tls.Config) error {
		conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 20 * time.Second}, "tcp", w.address, c)
		if err != nil {
			return err
		}
		defer conn.Close()
		if conn.ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
		_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		_, err = io.ReadFull(conn, make([]byte, 9)) // a frame's head: the server's settings
		return err
	}
	good := config()
	for range 2 {
		if err := try(good); err != nil {
			t.Fatal(err)
		}
	}
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.2":  func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
		"HTTP/1.1": func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} },
		"no ALPN":  func(c *tls.Config) { c.NextProtos = nil },
	} {
		c := config()
		change(c)
		if try(c) == nil {
			t.Errorf("%s: let in", name)
		}
	}
}

// TestRevoked: a bundle that revokes a credential ends its live connections
// within a second, says why, and lets nobody in with it again.
func TestRevoked(t *testing.T) {
	w := newWorld(t)
	bot := w.fleet.Client(nil, testfleet.Holder("bot", trust.Responder), testfleet.Now())
	other := w.dial(t, w.fleet.Client(nil, testfleet.Holder("other", trust.Responder), testfleet.Now()), "127.0.0.1")
	client := w.dial(t, bot, "127.0.0.1")
	get, err := client.Get(t.Context(), &halliganv1.GetRequest{})
	w.must(err)
	if _, err := get.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := status(other); err != nil {
		t.Fatal(err)
	}
	data := w.fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"bot"} })
	began := time.Now()
	if changed, err := w.store.Offer(data); !changed || err != nil {
		t.Fatal(changed, err)
	}
	for err == nil {
		_, err = get.Recv()
	}
	took := time.Since(began)
	if took > 5*time.Second { // in fact some milliseconds; the machine may be busy
		t.Errorf("the session ended after %v", took)
	}
	if f := api.FromStatus(err); f.Code != fault.Unauthenticated || !strings.Contains(f.Message, "revoked") {
		t.Errorf("the session ended with %v", err)
	}
	if _, err := status(client); err == nil {
		t.Error("a revoked credential comes in again")
	}
	if _, err := status(other); err != nil {
		t.Errorf("somebody else's session: %v", err)
	}

	// The authority itself leaves the policy.
	next := testfleet.New(t)
	data = w.fleet.Policy(func(p *bundle.Policy) {
		cas := w.store.Current().Policy.Authorities
		cas.TLSClient = policyOf(t, next).Authorities.TLSClient
		p.Authorities = cas
	})
	if changed, err := w.store.Offer(data); !changed || err != nil {
		t.Fatal(changed, err)
	}
	within(t, "the sessions of an authority end with it", func() bool { _, err := status(other); return err != nil })
	if _, err := status(w.dial(t, next.Client(nil, testfleet.Holder("new", trust.Observer), testfleet.Now()), "127.0.0.1")); err != nil {
		t.Errorf("a client of the new authority: %v", err)
	}
}

func policyOf(t *testing.T, f *testfleet.Fleet) *bundle.Policy {
	t.Helper()
	file, err := bundle.Parse(f.Bundle())
	if err != nil {
		t.Fatal(err)
	}
	return file.Policy
}

func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 200 {
		if ok() {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("not within 10 s: %s", what)
}

// TestFlood: half-open connections, from one address and from many, keep nobody
// out.
func TestFlood(t *testing.T) {
	w := newWorld(t)
	cert := w.fleet.Client(nil, testfleet.Holder("bot", trust.Observer), testfleet.Now())
	ctx, cancel := context.WithCancel(t.Context())
	var flood sync.WaitGroup
	defer flood.Wait()
	defer cancel()
	var hello [5]byte
	copy(hello[:], "\x16\x03\x01\x02\x00") // the head of a ClientHello that never comes
	for i := range 40 {
		from := net.IPv4(127, 0, 1, byte(1+i)).String()
		if i < 20 {
			from = "127.0.0.9"
		}
		flood.Go(func() {
			for ctx.Err() == nil {
				c, err := dialer(from)(ctx, w.address)
				if err != nil {
					continue
				}
				_, _ = c.Write(hello[:])
				_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
				_, _ = c.Read(make([]byte, 1))
				defer c.Close() // half-open until the end, or dropped
				select {
				case <-ctx.Done():
				case <-time.After(50 * time.Millisecond):
				}
			}
		})
	}
	time.Sleep(300 * time.Millisecond)
	for _, from := range []string{"127.0.0.1", "127.0.0.9"} { // and from the address of the flood
		within(t, "somebody gets in from "+from, func() bool { _, err := status(w.dial(t, cert, from)); return err == nil })
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.floods != 1 {
		t.Errorf("the flood was told of %d times", w.floods)
	}
}

// TestCertificate: a renewed certificate is shown without a restart, a bad one
// never.
func TestCertificate(t *testing.T) {
	f := testfleet.New(t)
	certFile, keyFile := f.ServerFiles(testfleet.Server, testfleet.Now())
	load := func(name string) (func() (*tls.Certificate, error), error) {
		return mtls.Load(certFile, keyFile, name, zerolog.Nop())
	}
	certificate, err := load(testfleet.Server)
	if err != nil {
		t.Fatal(err)
	}
	first, err := certificate()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(certFile, []byte("not PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond) // it looks once in a second
	if same, err := certificate(); err != nil || same != first {
		t.Errorf("with a bad file: %v, %v", same, err)
	}
	f.ServerFiles(testfleet.Server, testfleet.Now())
	within(t, "the new certificate is shown", func() bool { c, err := certificate(); return err == nil && c != first })

	if _, err := load("cp-2.prod"); !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), "cp-1.prod") {
		t.Errorf("another node's certificate: %v", err)
	}
	if err := os.Chmod(keyFile, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := load(testfleet.Server); !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), "0640") {
		t.Errorf("a key that others may read: %v", err)
	}
	if _, err := mtls.Load(certFile+"x", keyFile, testfleet.Server, zerolog.Nop()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing certificate: %v", err)
	}
}
