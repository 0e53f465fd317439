package tunnels

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/halligan-io/halligan/agent"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/bastion"
	"github.com/halligan-io/halligan/bastion/store"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// beBastion names, to a child of the test, the bastion's configuration that it runs
// until it is killed.
const beBastion = "HALLIGAN_TEST_BASTION"

func TestMain(m *testing.M) {
	store.Child()
	if file := os.Getenv(beBastion); file != "" {
		c, err := bastion.LoadConfig(file)
		if err == nil {
			err = bastion.Run(context.Background(), c, zerolog.New(os.Stderr))
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// world is one agent that only dials out, and two bastions, each a process.
type world struct {
	t        *testing.T
	fleet    *testfleet.Fleet
	agent    halliganv1.AgentClient // at its console
	bastions map[string]*process
	config   string // of ssh
}

type process struct {
	file string // its configuration
	cmd  *exec.Cmd
	log  *os.File
}

func (p *process) start(t *testing.T) {
	t.Helper()
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(os.Environ(), beBastion+"="+p.file)
	p.cmd.Stderr = p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

// kill is kill -9.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	_ = p.cmd.Wait()         // it was killed
}

func newWorld(t *testing.T) *world {
	if _, err := exec.LookPath("ssh"); err != nil {
		t.Skip("no ssh")
	}
	w := &world{t: t, fleet: testfleet.New(t), bastions: map[string]*process{}}
	dir := w.fleet.Dir
	type doors struct{ ssh, grpc, tunnel netip.AddrPort }
	places := map[string]doors{}
	for i, name := range []string{"bastion-a", "bastion-b"} {
		ip := fmt.Sprintf("127.0.0.%d", 21+i)
		places[name] = doors{free(t, ip), free(t, ip), free(t, ip)}
	}
	node := doors{ssh: free(t, "127.0.0.11"), grpc: free(t, "127.0.0.11")}
	first := w.fleet.Inventory(func(inv *bundle.Inventory) {
		inv.Clusters[0].Nodes = []bundle.Host{{Name: "cp-1", Address: bundle.IP{Addr: node.ssh.Addr()}, SSHPort: node.ssh.Port(), GRPCPort: node.grpc.Port(), Reach: bundle.ReachOut}}
		for name, at := range places {
			inv.Bastions = append(inv.Bastions, bundle.Host{Name: name, Address: bundle.IP{Addr: at.ssh.Addr()}, SSHPort: at.ssh.Port(), GRPCPort: at.grpc.Port(), TunnelPort: at.tunnel.Port()})
		}
	})
	put := func(path string, data []byte) string {
		if err := durable.Write(path, data); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, at := range places {
		own := filepath.Join(dir, name)
		if err := os.Mkdir(own, 0o700); err != nil {
			t.Fatal(err)
		}
		key, cert := w.fleet.HostFiles(name+".bastion", testfleet.Now())
		crt, crtKey := w.fleet.ServerFiles(name+".bastion", testfleet.Now())
		text, err := json.Marshal(bastion.Config{Name: name, StateDir: own, Trust: &bastion.TrustConfig{Bundle: put(own+".bundle", first)},
			SSH:    &bastion.SSHConfig{Listen: []string{at.ssh.String()}, HostKey: key, HostCertificate: cert},
			GRPC:   &bastion.GRPCConfig{Listen: []string{at.grpc.String()}, CertFile: crt, KeyFile: crtKey},
			Tunnel: &bastion.TunnelConfig{Listen: []string{at.tunnel.String()}}, Metrics: bastion.MetricsConfig{Listen: "off"}})
		if err != nil {
			t.Fatal(err)
		}
		p := &process{file: put(own+".yaml", text)}
		if p.log, err = os.Create(own + ".log"); err != nil {
			t.Fatal(err)
		}
		p.start(t)
		w.bastions[name] = p
		t.Cleanup(func() {
			p.kill()
			p.log.Close()
			if t.Failed() {
				text, _ := os.ReadFile(p.log.Name())
				t.Logf("%s: %.4000s", name, text)
			}
		})
	}

	key, cert := w.fleet.HostFiles("cp-1.prod", testfleet.Now())
	crt, crtKey := w.fleet.ServerFiles("cp-1.prod", testfleet.Now())
	short, err := os.MkdirTemp("", "tunnel") // paths of sockets are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(short) })
	text, err := json.Marshal(agent.Config{Node: "cp-1", Cluster: "prod", StateDir: short + "/state", Socket: short + "/run/console.sock", Reach: bundle.ReachOut,
		Etcd: agent.EtcdConfig{Endpoints: []string{free(t, "127.0.0.11").String()}}, Trust: &agent.TrustConfig{Bundle: put(filepath.Join(dir, "agent.bundle"), first)},
		SSH:  &agent.SSHConfig{Listen: []string{node.ssh.String()}, HostKey: key, HostCertificate: cert},
		GRPC: &agent.GRPCConfig{Listen: []string{node.grpc.String()}, CertFile: crt, KeyFile: crtKey}})
	if err != nil {
		t.Fatal(err)
	}
	c, _, distribution, err := agent.LoadConfig(put(filepath.Join(dir, "agent.yaml"), text))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := agent.Run(ctx, c, distribution, zerolog.Nop()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	conn, err := grpc.NewClient("unix:"+c.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	w.agent = halliganv1.NewAgentClient(conn)

	var ssh strings.Builder
	fmt.Fprintf(&ssh, "Host *\n  User responder\n  IdentityFile %s\n  IdentitiesOnly yes\n  StrictHostKeyChecking yes\n  UserKnownHostsFile %s\n  ConnectTimeout 20\n  BatchMode yes\n",
		w.fleet.PersonFiles(testfleet.Holder("alice", trust.Responder), testfleet.Now()), w.fleet.KnownHosts())
	for name, at := range places {
		fmt.Fprintf(&ssh, "Host %s\n  HostName %s\n  Port %d\n  HostKeyAlias %s.bastion\n", name, at.ssh.Addr(), at.ssh.Port(), name)
	}
	fmt.Fprintf(&ssh, "Host cp-1\n  Port %d\n  HostKeyAlias cp-1.prod\n", node.ssh.Port())
	w.config = put(filepath.Join(dir, "ssh_config"), []byte(ssh.String()))
	return w
}

// ssh runs stock ssh.
func (w *world) ssh(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, "ssh", append([]string{"-F", w.config}, args...)...).CombinedOutput()
	return string(out), err
}

func (w *world) warnings() string {
	st, err := w.agent.Status(w.t.Context(), &halliganv1.StatusRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return err.Error()
	}
	return strings.Join(st.GetWarnings(), "\n")
}

// TestDaemons: stock ssh reaches a node that only dials out, through either
// bastion, also when one of them has been killed and is back; and what one bastion
// hears of a bundle, the node and the other bastion hear.
func TestDaemons(t *testing.T) {
	w := newWorld(t)
	in := func(through string) bool {
		out, err := w.ssh("-J", through, "cp-1", "whoami")
		return err == nil && strings.Contains(out, "alice")
	}
	for name := range w.bastions {
		eventually(t, "in through "+name, func() bool { return in(name) })
	}
	if out, err := w.ssh("bastion-a", "nodes"); err != nil || !strings.Contains(out, "cp-1") || !strings.Contains(out, "out") {
		t.Errorf("nodes: %s, %v", out, err)
	}
	eventually(t, "the agent has no complaint", func() bool { return !strings.Contains(w.warnings(), "tunnel") })

	w.bastions["bastion-a"].kill()
	eventually(t, "the agent tells which tunnel is down", func() bool { return strings.Contains(w.warnings(), "the tunnel to bastion-a.bastion is down since") })
	if !in("bastion-b") {
		t.Error("with one bastion killed, the other does not relay")
	}

	// Bastion a is down while b hears of a revocation by hand.
	revoked := w.fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"mallory"} })
	if err := durable.Write(strings.TrimSuffix(w.bastions["bastion-b"].file, ".yaml")+".bundle", revoked); err != nil {
		t.Fatal(err)
	}
	version := func() uint64 {
		st, err := w.agent.Status(t.Context(), &halliganv1.StatusRequest{})
		if err != nil {
			return 0
		}
		return st.GetBundle().GetRevocationsVersion()
	}
	start := time.Now()
	eventually(t, "the node has the revocation", func() bool { return version() == 2 })
	t.Logf("after %v", time.Since(start).Round(time.Millisecond))

	w.bastions["bastion-a"].start(t)
	eventually(t, "in through bastion-a again", func() bool { return in("bastion-a") })
	eventually(t, "the agent has no complaint again", func() bool { return !strings.Contains(w.warnings(), "tunnel") })
}
