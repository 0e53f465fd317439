package agent

import (
	"bytes"
	"crypto/tls"
	"net"
	"os"
	"path"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	grpccodes "google.golang.org/grpc/codes"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// TestBastionItself: under its own certificate a bastion brings bundles, and can do
// nothing else: every method that the agent has is tried.
func TestBastionItself(t *testing.T) {
	n := newNetwork(t, etcdcluster.ForTest(t, 1))
	first := n.fleet.Inventory(func(inv *bundle.Inventory) {
		inv.Bastions = []bundle.Host{{Name: "bastion-a", Address: inv.Clusters[0].Nodes[0].Address, SSHPort: 1}}
	})
	write(t, n.config.Trust.Bundle, string(first), 0o644)
	cert := func(name string) tls.Certificate {
		c, err := tls.LoadX509KeyPair(n.fleet.ServerFiles(name, testfleet.Now()))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	bot := n.dial(n.fleet.Client(nil, testfleet.Holder("bot", trust.Commander), testfleet.Now()))
	within(t, "the gRPC door is open", func() bool { _, err := bot.Status(t.Context(), &halliganv1.StatusRequest{}); return err == nil })
	conn := n.conn(cert("bastion-a.bastion"))

	// Only what the door refuses is refused with this text; whatever else is wrong
	// with an empty request would be told by what is behind it.
	refused := func(method string, err error) {
		t.Helper()
		if f := api.FromStatus(err); status.Code(err) != grpccodes.PermissionDenied || f.Code != fault.Refused || !strings.Contains(f.Message, "bastion-a.bastion may not call "+path.Base(method)) {
			t.Errorf("%s: %v", method, err)
		}
	}
	methods := 0
	service := halliganv1.Agent_ServiceDesc
	for _, m := range service.Methods {
		full := "/" + service.ServiceName + "/" + m.MethodName
		if full == halliganv1.Agent_ExchangeBundle_FullMethodName {
			continue
		}
		methods++
		refused(full, conn.Invoke(t.Context(), full, &emptypb.Empty{}, &emptypb.Empty{}))
	}
	stream := func(full string, request any) {
		t.Helper()
		methods++
		s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, full)
		if err == nil {
			_ = s.SendMsg(request) // it may have been refused before
			err = s.RecvMsg(&emptypb.Empty{})
		}
		refused(full, err)
	}
	for _, m := range service.Streams {
		stream("/"+service.ServiceName+"/"+m.StreamName, &emptypb.Empty{})
	}
	for _, full := range grpcdoor.Reflection {
		stream(full, &reflectionv1.ServerReflectionRequest{})
	}
	if methods < 11 {
		t.Errorf("only %d methods were tried", methods)
	}

	// It brings a bundle, and gets the agent's where that is newer.
	bastion := halliganv1.NewAgentClient(conn)
	newer := n.fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"mallory"} })
	if out, err := bastion.ExchangeBundle(t.Context(), &halliganv1.ExchangeBundleRequest{Bundle: newer}); err != nil || out.GetRefused() != nil || out.GetStatus().GetRevocationsVersion() != 2 {
		t.Errorf("%v, %v", out, err)
	}
	if out, err := bastion.ExchangeBundle(t.Context(), &halliganv1.ExchangeBundleRequest{Bundle: first}); err != nil || out.GetRefused() != nil || !bytes.Equal(out.GetBundle(), newer) {
		t.Errorf("an older one: %v, %v", out, err)
	}
	tampered := bytes.Replace(newer, []byte("mallory"), []byte("alice99"), 1)
	if out, err := bastion.ExchangeBundle(t.Context(), &halliganv1.ExchangeBundleRequest{Bundle: tampered}); err != nil || out.GetRefused() == nil || out.GetStatus().GetRevocationsVersion() != 2 {
		t.Errorf("one that nobody has signed: %v, %v", out, err)
	}
	// Nobody is woken every minute since a bastion came in.
	time.Sleep(200 * time.Millisecond) // what is told is told by then, most likely
	if n.told(alarm.Login, "bastion-a.bastion", "") {
		t.Error("a bastion that came in is told of as somebody")
	}

	// No other server's certificate is good for anything, nor is this one over SSH.
	for _, name := range []string{"cp-1.prod", "cp-2.prod", "bastion-b.bastion"} {
		if _, err := halliganv1.NewAgentClient(n.conn(cert(name))).ExchangeBundle(t.Context(), &halliganv1.ExchangeBundleRequest{}); status.Code(err) != grpccodes.Unavailable {
			t.Errorf("%s: %v", name, err)
		}
	}
	// It ends with the inventory.
	if _, err := bot.ExchangeBundle(t.Context(), &halliganv1.ExchangeBundleRequest{Bundle: n.fleet.Inventory(func(inv *bundle.Inventory) { inv.Bastions = nil })}); err != nil {
		t.Fatal(err)
	}
	within(t, "a bastion that was dropped is out", func() bool {
		_, err := bastion.ExchangeBundle(t.Context(), &halliganv1.ExchangeBundleRequest{})
		return err != nil
	})
}

// TestReach: an agent that reaches out says what it lacks, and its own doors stay
// open meanwhile.
func TestReach(t *testing.T) {
	n := &network{t: t, fleet: testfleet.New(t), config: configOf(t, etcdcluster.ForTest(t, 1))}
	certFile, keyFile := n.fleet.ServerFiles(testfleet.Server, testfleet.Now())
	n.config.Cluster, n.config.Reach, n.config.LogLevel = testfleet.Cluster, bundle.ReachOut, "info"
	n.config.Trust = &TrustConfig{Bundle: write(t, n.fleet.Dir+"/bundle", string(n.fleet.Bundle()), 0o600)}
	if err := n.config.check(); err == nil || !strings.Contains(err.Error(), "set that, too") {
		t.Errorf("without a certificate: %v", err)
	}
	n.config.GRPC = &GRPCConfig{Listen: []string{freeAddress(t)}, CertFile: certFile, KeyFile: keyFile}
	if err := n.config.check(); err != nil {
		t.Fatal(err)
	}
	bad := n.config
	bad.Reach = "both"
	if err := bad.check(); err == nil || !strings.Contains(err.Error(), "neither in nor out") {
		t.Errorf("both: %v", err)
	}
	console, _, _ := running(t, n.config)
	warned := func(text string) func() bool {
		return func() bool {
			st, err := console.Status(t.Context(), &halliganv1.StatusRequest{})
			return err == nil && strings.Contains(strings.Join(st.GetWarnings(), "\n"), text)
		}
	}
	within(t, "it says that no bastion takes tunnels", warned("no bastion of the bundle's inventory has a tunnelPort"))
	within(t, "it says that the inventory says otherwise", warned("give it reach: out there"))
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := gone.Addr().(*net.TCPAddr)
	gone.Close()
	next := n.fleet.Inventory(func(inv *bundle.Inventory) {
		inv.Clusters[0].Nodes[0].Reach = bundle.ReachOut
		inv.Bastions = []bundle.Host{{Name: "bastion-a", Address: inv.Clusters[0].Nodes[0].Address, SSHPort: 1, TunnelPort: uint16(at.Port)}}
	})
	if err := os.WriteFile(n.config.Trust.Bundle, next, 0o600); err != nil {
		t.Fatal(err)
	}
	within(t, "it names the bastion that it does not reach", warned("the tunnel to bastion-a.bastion is down since"))
	bot := n.dial(n.fleet.Client(nil, testfleet.Holder("bot", trust.Observer), testfleet.Now()))
	within(t, "its own door is open", func() bool { _, err := bot.Status(t.Context(), &halliganv1.StatusRequest{}); return err == nil })
}
