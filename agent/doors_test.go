package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/structpb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/approval"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// network is an agent with all of its doors.
type network struct {
	t      *testing.T
	fleet  *testfleet.Fleet
	config Config
	// console is a client at the node itself.
	console halliganv1.AgentClient

	mu     sync.Mutex // guards events
	events []alarm.Event
}

// freeAddress returns an address at which nobody listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// newNetwork runs an agent for the cluster whose bundle is not there yet.
func newNetwork(t *testing.T, cluster *etcdcluster.Cluster) *network {
	t.Helper()
	n := &network{t: t, fleet: testfleet.New(t), config: configOf(t, cluster)}
	hook := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var e alarm.Event
		if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
			t.Error(err)
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		n.events = append(n.events, e)
	}))
	t.Cleanup(hook.Close)
	certFile, keyFile := n.fleet.ServerFiles(testfleet.Server, testfleet.Now())
	n.config.Cluster = testfleet.Cluster
	n.config.Trust = &TrustConfig{Bundle: filepath.Join(n.fleet.Dir, "bundle"), Roots: []string{n.fleet.RootLine()}, Threshold: 1}
	n.config.GRPC = &GRPCConfig{Listen: []string{freeAddress(t)}, CertFile: certFile, KeyFile: keyFile}
	n.config.SSH = n.hostFiles()
	n.config.Alarms, n.config.LogLevel = []alarm.Config{{Webhook: hook.URL}}, "info"
	n.config.Logs = map[string][]string{"etcd": {filepath.Join(n.fleet.Dir, "etcd.log")}}
	write(t, n.config.Logs["etcd"][0], "{}\n", 0o600)
	if err := n.config.check(); err != nil {
		t.Fatal(err)
	}
	n.console, _, _ = running(t, n.config)
	return n
}

// hostFiles writes the SSH host's key and certificate.
func (n *network) hostFiles() *SSHConfig {
	n.t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		n.t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		n.t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		n.t.Fatal(err)
	}
	cert, err := n.fleet.Host.Host(signer.PublicKey(), testfleet.Server, 1, testfleet.Now())
	if err != nil {
		n.t.Fatal(err)
	}
	c := &SSHConfig{Listen: []string{freeAddress(n.t)}, HostKey: filepath.Join(n.fleet.Dir, "ssh_host_key"), HostCertificate: filepath.Join(n.fleet.Dir, "ssh_host_key-cert.pub")}
	write(n.t, c.HostKey, string(pem.EncodeToMemory(block)), 0o600)
	write(n.t, c.HostCertificate, string(ssh.MarshalAuthorizedKey(cert)), 0o644)
	return c
}

// told reports whether the webhook has heard of it.
func (n *network) told(kind alarm.Kind, person, text string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.ContainsFunc(n.events, func(e alarm.Event) bool {
		return e.Kind == kind && e.Person == person && strings.Contains(e.Text, text) && e.Node == testfleet.Node && e.Cluster == testfleet.Cluster
	})
}

// dial comes to the gRPC door.
func (n *network) dial(cert tls.Certificate) halliganv1.AgentClient {
	n.t.Helper()
	return halliganv1.NewAgentClient(n.conn(cert))
}

func (n *network) conn(cert tls.Certificate) *grpc.ClientConn {
	n.t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(n.fleet.Servers.Certificate)
	c, err := grpc.NewClient("passthrough:///"+n.config.GRPC.Listen[0], grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, ServerName: testfleet.Server,
		Certificates: []tls.Certificate{cert}})))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	return c
}

// login comes to the SSH door.
func (n *network) login(person string, role trust.Role) (*ssh.Client, error) {
	n.t.Helper()
	key, cert := n.fleet.Person(testfleet.Holder(person, role), testfleet.Now())
	signer, err := ssh.NewCertSigner(cert, key)
	if err != nil {
		n.t.Fatal(err)
	}
	checker := &ssh.CertChecker{IsHostAuthority: func(k ssh.PublicKey, _ string) bool { return bytes.Equal(k.Marshal(), n.fleet.Host.Public().Marshal()) }}
	raw, err := (&net.Dialer{Timeout: 20 * time.Second}).DialContext(n.t.Context(), "tcp", n.config.SSH.Listen[0])
	if err != nil {
		return nil, err
	}
	conn, channels, requests, err := ssh.NewClientConn(raw, testfleet.Server+":22", &ssh.ClientConfig{User: role.String(), Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)},
		HostKeyCallback: checker.CheckHostKey, HostKeyAlgorithms: []string{ssh.CertAlgoED25519v01}, Timeout: 20 * time.Second})
	if err != nil {
		raw.Close()
		return nil, err
	}
	client := ssh.NewClient(conn, channels, requests)
	n.t.Cleanup(func() { client.Close() })
	return client, nil
}

// run runs a line over SSH.
func (n *network) run(c *ssh.Client, line string) (string, error) {
	n.t.Helper()
	s, err := c.NewSession()
	if err != nil {
		return "", err
	}
	defer s.Close()
	out, err := s.CombinedOutput(line)
	return string(out), err
}

func planOf(client halliganv1.AgentClient, name string) (*halliganv1.Plan, error) {
	parameters, err := structpb.NewStruct(map[string]any{"target": "cm/" + name, "namespace": "shop"})
	if err != nil {
		return nil, err
	}
	return client.Plan(context.Background(), &halliganv1.PlanRequest{Action: "delete", Parameters: parameters, Reason: "it leaks"})
}

func apply(t *testing.T, client halliganv1.AgentClient, p *halliganv1.Plan, approvals ...string) *halliganv1.Result {
	t.Helper()
	stream, err := client.Apply(t.Context(), &halliganv1.ApplyRequest{PlanId: p.GetId(), PlanSha256: p.GetSha256(), Approvals: approvals})
	if err != nil {
		t.Fatal(err)
	}
	for {
		event, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if r := event.GetResult(); r != nil {
			return r
		}
	}
}

// TestNetworkDoors: what is believed comes from the bundle and changes with it,
// while the agent runs, at every door.
func TestNetworkDoors(t *testing.T) {
	cluster := etcdcluster.ForTest(t, 1)
	raw, err := cluster.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	space, err := storage.EncodeTyped(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", UID: "u0"}})
	if err != nil {
		t.Fatal(err)
	}
	values := map[string][]byte{"/registry/namespaces/shop": space}
	for _, name := range []string{"a", "b", "c"} {
		v, err := storage.EncodeTyped(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: "u1"}})
		if err != nil {
			t.Fatal(err)
		}
		values["/registry/configmaps/shop/"+name] = v
	}
	for k, v := range values {
		if _, err := raw.Put(t.Context(), k, string(v)); err != nil {
			t.Fatal(err)
		}
	}
	n := newNetwork(t, cluster)
	status := func(c halliganv1.AgentClient) *halliganv1.StatusResponse {
		t.Helper()
		st, err := c.Status(t.Context(), &halliganv1.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return st
	}

	// Without a bundle only the console is open, and it says so.
	st := status(n.console)
	if !slices.ContainsFunc(st.Warnings, func(w string) bool { return strings.Contains(w, "only the console is open") }) || !slices.ContainsFunc(st.Warnings, func(w string) bool { return strings.Contains(w, "copy the bundle there") }) || st.Bundle != nil || st.Cluster != "prod" || st.Door != "console" {
		t.Errorf("without a bundle: %v", st)
	}
	if _, err := net.Dial("tcp", n.config.GRPC.Listen[0]); err == nil {
		t.Error("the gRPC door is open to anybody")
	}
	within(t, "the missing bundle is told", func() bool { return n.told(alarm.Closed, "", "bundle") })

	write(t, n.config.Trust.Bundle, string(n.fleet.Bundle()), 0o644)
	bot := n.dial(n.fleet.Client(nil, testfleet.Holder("bot", trust.Responder), testfleet.Now()))
	within(t, "automation gets in", func() bool { _, err := bot.Status(t.Context(), &halliganv1.StatusRequest{}); return err == nil })
	st = status(bot)
	if st.Actor != "bot" || st.Door != "grpc" || st.Bundle.GetPolicyVersion() != 1 || st.Bundle.GetFreshUntil() == nil || st.CredentialExpires == nil || len(st.Warnings) != 2 ||
		!strings.Contains(st.Warnings[0], "gRPC certificate ends in") || !strings.Contains(st.Warnings[1], "SSH host certificate ends in") {
		t.Errorf("status of automation: %v", st)
	}
	var alice *ssh.Client
	within(t, "a person gets in", func() bool { alice, err = n.login("alice", trust.Responder); return err == nil })
	if out, err := n.run(alice, "status -o json"); err != nil || !strings.Contains(out, `"alice"`) {
		t.Errorf("status over SSH: %s, %v", out, err)
	}
	for _, person := range []string{"bot", "alice"} {
		within(t, "the login of "+person+" is told", func() bool { return n.told(alarm.Login, person, "") })
	}
	if _, err := n.login("alice", trust.Approver); err != nil {
		t.Errorf("alice as an approver: %v", err)
	}
	stranger := testfleet.New(t)
	if _, err := n.dial(stranger.Client(nil, testfleet.Holder("bot", trust.Commander), testfleet.Now())).Status(t.Context(), &halliganv1.StatusRequest{}); err == nil {
		t.Error("a client of another fleet gets in")
	}
	within(t, "the stranger is told", func() bool { return n.told(alarm.Refusal, "", "client certificate") })

	// One action as it is, then one that a new policy asks an approval for.
	p, err := planOf(bot, "a")
	if err != nil {
		t.Fatal(err)
	}
	if r := apply(t, bot, p); r.Result != "applied" {
		t.Errorf("%v", r)
	}
	next := n.fleet.Policy(func(p *bundle.Policy) {
		p.Approvals = []trust.ApprovalRule{{Actions: []string{"delete"}, Count: 1, Why: "deletions are for two"}}
	})
	exchanged, err := bot.ExchangeBundle(t.Context(), &halliganv1.ExchangeBundleRequest{Bundle: next})
	if err != nil || exchanged.GetRefused() != nil || exchanged.GetStatus().GetPolicyVersion() != 2 || len(exchanged.GetBundle()) != 0 {
		t.Fatalf("the new policy: %v, %v", exchanged, err)
	}
	p, err = planOf(bot, "b")
	if err != nil {
		t.Fatal(err)
	}
	if p.ApprovalsNeeded != 1 || p.PolicyVersion != 2 || p.ClusterName != "prod" || p.Nonce == "" {
		t.Errorf("plan under the new policy: %v", p)
	}
	if r := apply(t, bot, p); r.Result != "awaiting-approval" || r.GetError().GetCode() != string(fault.AwaitingApproval) {
		t.Errorf("without an approval: %v", r)
	}
	token := n.approve(p, "bob", trust.Approver)
	if r := apply(t, bot, p, n.approve(p, "bob", trust.Responder)); r.Result != "refused" {
		t.Errorf("approved by a responder: %v", r)
	}
	if r := apply(t, bot, p, token); r.Result != "applied" {
		t.Errorf("with an approval: %v", r)
	}
	if r := apply(t, bot, p, token); r.Result == "applied" {
		t.Errorf("the same again: %v", r)
	}

	// A tampered bundle changes nothing; a revocation ends what is live.
	tampered := bytes.Replace(next, []byte("version: 2"), []byte("version: 3"), 1)
	if exchanged, err = bot.ExchangeBundle(t.Context(), &halliganv1.ExchangeBundleRequest{Bundle: tampered}); err != nil || exchanged.GetRefused() == nil || exchanged.GetStatus().GetPolicyVersion() != 2 ||
		!bytes.Equal(exchanged.GetBundle(), next) {
		t.Errorf("a tampered bundle: %v, %v", exchanged.GetRefused(), err)
	}
	ended := make(chan error, 1)
	go func() { ended <- alice.Wait() }()
	revoked := n.fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"alice"} })
	write(t, n.config.Trust.Bundle, string(revoked), 0o644) // this time by hand
	select {
	case <-ended:
	case <-time.After(20 * time.Second): // in fact below 2 s: 0.5 s until it looks, twice for a file that is being copied
		t.Error("the session of somebody revoked goes on")
	}
	if _, err := n.login("alice", trust.Responder); err == nil {
		t.Error("somebody revoked gets in")
	}
	within(t, "the refusal is told", func() bool { return n.told(alarm.Refusal, "", "revoked") || n.told(alarm.Refusal, "alice", "revoked") })
	if st := status(bot); st.Bundle.GetRevocationsVersion() != 2 {
		t.Errorf("%v", st.Bundle)
	}
}

// approve returns a person's approval of a plan.
func (n *network) approve(p *halliganv1.Plan, person string, role trust.Role) string {
	n.t.Helper()
	key, cert := n.fleet.Person(testfleet.Holder(person, role), testfleet.Now())
	token, err := approval.Sign(approval.Statement{Fleet: testfleet.Name, Cluster: p.GetCluster(), ClusterName: p.GetClusterName(), Node: testfleet.Server, Plan: p.GetId(), PlanSHA256: p.GetSha256(),
		Nonce: p.GetNonce(), Requester: p.GetActor(), PolicyVersion: p.GetPolicyVersion(), Expires: time.Now().Add(10 * time.Minute)}, key, cert)
	if err != nil {
		n.t.Fatal(err)
	}
	return token.String()
}

// TestDoorThatCannotOpen: an address in use keeps one door shut, and nothing else;
// it opens when the address is free.
func TestDoorThatCannotOpen(t *testing.T) {
	n := &network{t: t, fleet: testfleet.New(t), config: configOf(t, etcdcluster.ForTest(t, 1))}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile := n.fleet.ServerFiles(testfleet.Server, testfleet.Now())
	n.config.Cluster = testfleet.Cluster
	n.config.Trust = &TrustConfig{Bundle: write(t, filepath.Join(n.fleet.Dir, "bundle"), string(n.fleet.Bundle()), 0o600)}
	n.config.GRPC = &GRPCConfig{Listen: []string{taken.Addr().String()}, CertFile: certFile, KeyFile: keyFile}
	console, _, stop := running(t, n.config)
	warned := func() bool {
		st, err := console.Status(t.Context(), &halliganv1.StatusRequest{})
		return err == nil && slices.ContainsFunc(st.Warnings, func(w string) bool { return strings.Contains(w, "grpc "+taken.Addr().String()+" is not open") })
	}
	within(t, "the console warns", warned)
	taken.Close()
	bot := n.dial(n.fleet.Client(nil, testfleet.Holder("bot", trust.Observer), testfleet.Now()))
	within(t, "the door opens", func() bool { _, err := bot.Status(t.Context(), &halliganv1.StatusRequest{}); return err == nil })
	if warned() {
		t.Error("it still warns")
	}
	// What was pushed outlives a restart, even where the file of root's is older.
	if _, err := bot.ExchangeBundle(t.Context(), &halliganv1.ExchangeBundleRequest{Bundle: n.fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"bot"} })}); err != nil {
		t.Logf("the exchange was cut off by what it brought: %v", api.FromStatus(err))
	}
	stop()
	console, _, _ = running(t, n.config)
	st, err := console.Status(t.Context(), &halliganv1.StatusRequest{})
	if err != nil || st.GetBundle().GetRevocationsVersion() != 2 {
		t.Errorf("after a restart: %v, %v", st.GetBundle(), err)
	}
}

func TestHostKey(t *testing.T) {
	n := &network{t: t, fleet: testfleet.New(t)}
	c := n.hostFiles()
	if _, cert, err := sshserver.HostKey(c.HostKey, c.HostCertificate, testfleet.Server); err != nil || cert.KeyId != testfleet.Server {
		t.Fatal(err)
	}
	other := write(t, filepath.Join(n.fleet.Dir, "other-cert.pub"), read(t, c.HostCertificate), 0o600)
	n.hostFiles() // another key, and its certificate
	user, cert := n.fleet.Person(testfleet.Holder("alice", trust.Responder), testfleet.Now())
	_ = user
	for name, try := range map[string]struct{ key, cert, name, want string }{
		"another node's": {c.HostKey, c.HostCertificate, "cp-2.prod", "and this is cp-2.prod"},
		"another key's":  {c.HostKey, other, testfleet.Server, "other-cert.pub"},
		"a user's":       {c.HostKey, write(t, filepath.Join(n.fleet.Dir, "user"), string(ssh.MarshalAuthorizedKey(cert)), 0o600), testfleet.Server, "no host certificate"},
		"no certificate": {c.HostKey, write(t, filepath.Join(n.fleet.Dir, "bare"), string(ssh.MarshalAuthorizedKey(user.PublicKey())), 0o600), testfleet.Server, "no host certificate"},
		"no key":         {c.HostCertificate, c.HostCertificate, testfleet.Server, "0644"},
		"missing":        {c.HostKey + "x", c.HostCertificate, testfleet.Server, "no such file"},
	} {
		if _, _, err := sshserver.HostKey(try.key, try.cert, try.name); !fault.Is(err, fault.Usage) || !strings.Contains(fmt.Sprint(err), try.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
