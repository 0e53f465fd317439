package netlab

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/issuer"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// Addresses: TEST-NET-2 is where responders and bastions are, TEST-NET-3 where
// bastions and nodes are (RFC 5737).
const (
	responderAddress = "198.51.100.10"
	sshPort          = 2222
	grpcPort         = 7443
	tunnelPort       = 7444
)

var (
	nodeNames    = []string{"cp-1", "cp-2", "cp-3"}
	bastionNames = []string{"bastion-a", "bastion-b"}
)

func nodeAddress(i int) string    { return fmt.Sprintf("203.0.113.%d", 11+i) }
func bastionAddress(i int) string { return fmt.Sprintf("198.51.100.%d", 21+i) }
func bastionInside(i int) string  { return fmt.Sprintf("203.0.113.%d", 21+i) }

// programs are the binaries in bin/, which make test has built; what has changed
// since is built again.
var programs = sync.OnceValues(func() (string, error) {
	bin, err := filepath.Abs("../../../bin")
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return "", err
	}
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", bin+"/", "../../halligan", "../../halligan-agent", "../../halligan-bastion")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return bin, nil
})

// world is a responder, two bastions and three nodes with their etcd.
type world struct {
	*network
	fleet *testfleet.Fleet
	bin   string
	home  string // of the responder
	etcd  *etcdcluster.Cluster
	eye   *clientv3.Client // sees etcd without an agent
	// toEtcd are the cables between agents and their members.
	toEtcd   []*cable
	agents   []*process
	bastions []*process
	identity string
	// Of benchmarks:
	sshd  *process
	crowd []one
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// newWorld starts everything, and returns when every door is open. The inventory
// has more nodes, if given, which are the caller's to make.
func newWorld(t testing.TB, more ...bundle.Host) *world {
	t.Helper()
	bin, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{network: newNetwork(t, "out", "in"), fleet: testfleet.New(t), bin: bin}
	w.home = filepath.Join(w.fleet.Dir, "home")
	w.write("home/.keep", nil)
	w.space("resp")
	w.plug("resp", "out", responderAddress+"/24")
	for i, name := range bastionNames {
		w.space(name)
		w.plug(name, "out", bastionAddress(i)+"/24")
		w.plug(name, "in", bastionInside(i)+"/24")
	}
	w.startEtcd()
	w.inventory(more)
	for i, name := range nodeNames {
		w.space(name)
		w.plug(name, "in", nodeAddress(i)+"/24")
		w.startAgent(i, name, nodeAddress(i), "in")
	}
	w.equipResponder()
	for i := range bastionNames {
		w.bastions = append(w.bastions, nil)
		w.startBastion(i)
	}
	for i := range nodeNames {
		for _, port := range []int{sshPort, grpcPort} {
			w.opens(bastionNames[0], nodeAddress(i), port)
		}
	}
	return w
}

func (w *world) file(name string) string { return filepath.Join(w.fleet.Dir, name) }

func (w *world) write(name string, data []byte) (file string) {
	w.t.Helper()
	file = w.file(name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, data, 0o600)); err != nil {
		w.t.Fatal(err)
	}
	return file
}

// opens waits until somebody listens.
func (w *world) opens(from, address string, port int) {
	w.t.Helper()
	eventually(w.t, fmt.Sprintf("%s:%d is open", address, port), func() bool {
		c, err := w.dial(from, fmt.Sprintf("%s:%d", address, port))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// startEtcd starts three members, which live outside of the network. Each node's
// loopback has a cable to its own.
func (w *world) startEtcd() {
	w.t.Helper()
	_, measured := w.t.(*testing.B)
	w.etcd = etcdcluster.ForTest(w.t, len(nodeNames), func(o *etcdcluster.Options) { o.UnsafeNoFsync = !measured })
	w.eye = must(w.etcd.Client())
	w.t.Cleanup(func() { w.eye.Close() })
	w.put("/registry/namespaces/shop", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", UID: "u0"}})
}

func (w *world) put(key string, object any) {
	w.t.Helper()
	var value []byte
	var err error
	switch o := object.(type) {
	case *corev1.Namespace:
		value, err = storage.EncodeTyped(o)
	case *appsv1.Deployment:
		value, err = storage.EncodeTyped(o)
	default:
		w.t.Fatalf("%T", o)
	}
	if err == nil {
		_, err = w.eye.Put(w.t.Context(), key, string(value))
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// deployment makes one with three replicas, and returns its key.
func (w *world) deployment(name string) (key string) {
	w.t.Helper()
	key = "/registry/deployments/shop/" + name
	w.put(key, &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: "u-1"},
		Spec: appsv1.DeploymentSpec{Replicas: new(int32(3)), Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": name}}}})
	return key
}

// written returns how often a key was written.
func (w *world) written(key string) int64 {
	w.t.Helper()
	got, err := w.eye.Get(w.t.Context(), key)
	if err != nil || len(got.Kvs) != 1 {
		w.t.Fatalf("%s: %v, %v", key, got, err)
	}
	return got.Kvs[0].Version
}

func host(name, address string) bundle.Host {
	return bundle.Host{Name: name, Address: bundle.IP{Addr: netip.MustParseAddr(address)}, SSHPort: sshPort, GRPCPort: grpcPort}
}

// inventory has the nodes and bastions, and one node of another cluster.
func (w *world) inventory(more []bundle.Host) {
	w.t.Helper()
	w.write("bundle", w.fleet.Inventory(func(inv *bundle.Inventory) {
		prod := bundle.Cluster{Name: testfleet.Cluster}
		for i, name := range nodeNames {
			prod.Nodes = append(prod.Nodes, host(name, nodeAddress(i)))
		}
		prod.Nodes = append(prod.Nodes, more...)
		inv.Clusters = []bundle.Cluster{prod, {Name: "staging", Nodes: []bundle.Host{host("st-1", "203.0.113.31")}}}
		inv.Bastions = nil
		for i, name := range bastionNames {
			h := host(name, bastionAddress(i))
			h.TunnelPort = tunnelPort
			inv.Bastions = append(inv.Bastions, h)
		}
	}))
}

// trusted is the part of a daemon's configuration that says whom to believe, with
// a copy of the bundle of its own.
func (w *world) trusted(name string) map[string]any {
	w.t.Helper()
	return map[string]any{"bundle": w.write(name+"/bundle", w.fleet.Bundle()), "roots": []string{w.fleet.RootLine()}, "threshold": 1}
}

// doors are the parts that open them.
func (w *world) doors(config map[string]any, id, address string) map[string]any {
	key, cert := w.fleet.HostFiles(id, testfleet.Now())
	crt, crtKey := w.fleet.ServerFiles(id, testfleet.Now())
	at := func(port int) []string { return []string{fmt.Sprintf("%s:%d", address, port)} }
	config["ssh"] = map[string]any{"listen": at(sshPort), "hostKey": key, "hostCertificate": cert}
	config["grpc"] = map[string]any{"listen": at(grpcPort), "certFile": crt, "keyFile": crtKey}
	return config
}

// startAgent starts one with member i of etcd.
func (w *world) startAgent(i int, name, address, reach string) {
	w.t.Helper()
	c := &cable{}
	const member = "127.0.0.1:2379"
	go c.carry(w.listen(name, member), func() (net.Conn, error) { return net.Dial("tcp", w.etcd.Endpoints()[i]) })
	w.toEtcd = append(w.toEtcd, c)
	config := must(yaml.Marshal(w.doors(map[string]any{
		"node": name, "cluster": testfleet.Cluster, "reach": reach, "stateDir": w.file(name + "/state"), "socket": w.file(name + "/console.sock"), "trust": w.trusted(name),
		"etcd": map[string]any{"endpoints": []string{member}, "caFile": w.etcd.CAFile(), "certFile": w.etcd.CertFile(), "keyFile": w.etcd.KeyFile()},
	}, name+"."+testfleet.Cluster, address)))
	w.agents = append(w.agents, w.daemon(name, name, w.bin+"/halligan-agent", "--config", w.write(name+"/agent.yaml", config)))
}

// startBastion starts one, again if need be.
func (w *world) startBastion(i int) {
	w.t.Helper()
	name := bastionNames[i]
	file := w.file(name + "/bastion.yaml")
	if _, err := os.Stat(file); err != nil {
		config := must(yaml.Marshal(w.doors(map[string]any{"name": name, "stateDir": w.file(name + "/state"), "trust": w.trusted(name),
			"tunnel": map[string]any{"listen": []string{fmt.Sprintf("%s:%d", bastionAddress(i), tunnelPort)}}},
			name+".bastion", bastionAddress(i))))
		w.write(name+"/bastion.yaml", config)
	}
	w.bastions[i] = w.daemon(name, name, w.bin+"/halligan-bastion", "--config", file)
	w.opens("resp", bastionAddress(i), sshPort)
}

// equipResponder writes what a responder's laptop has.
func (w *world) equipResponder() {
	w.t.Helper()
	w.identity = w.fleet.PersonFiles(issuer.Holder{Person: "ada", Roles: []trust.Role{trust.Observer, trust.Responder}, Clusters: []string{testfleet.Cluster}}, testfleet.Now())
	var b strings.Builder
	for i, name := range bastionNames {
		fmt.Fprintf(&b, "Host %s\n  HostKeyAlias %s.bastion\n", bastionAddress(i), name)
	}
	for _, name := range nodeNames {
		fmt.Fprintf(&b, "Host %s\n  HostKeyAlias %s.%s\n", name, name, testfleet.Cluster)
	}
	fmt.Fprintf(&b, `Host *
  Port %d
  User responder
  IdentityFile %s
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile %s
  GlobalKnownHostsFile none
  StrictHostKeyChecking yes
  HostKeyAlgorithms ssh-ed25519-cert-v01@openssh.com
  BatchMode yes
`, sshPort, w.identity, w.fleet.KnownHosts())
	w.write("ssh_config", []byte(b.String()))

	client := w.fleet.Client(nil, testfleet.Holder("robot", trust.Observer), testfleet.Now())
	file := must(bundle.Parse(w.fleet.Bundle()))
	encode := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	w.write("robot.crt", encode("CERTIFICATE", client.Certificate[0]))
	w.write("robot.key", encode("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(client.PrivateKey))))
	w.write("ca.crt", encode("CERTIFICATE", file.Policy.Authorities.TLSServer.Certificates[0].Raw))
}

// environment is the responder's.
func (w *world) environment() []string {
	return []string{"HOME=" + w.home, "XDG_STATE_HOME=", "XDG_CONFIG_HOME=", "SSH_AUTH_SOCK=", "HALLIGAN_SOCKET=", "HALLIGAN_CONFIG=/dev/null",
		"HALLIGAN_BUNDLE=" + w.file("bundle"), "HALLIGAN_IDENTITY=" + w.identity, "HALLIGAN_REASON=no names resolve"}
}

// run is a command that has run in the responder's namespace.
type run struct {
	argv        []string
	out, errs   string
	status      int
	took        time.Duration
	interrupted error
}

func (r run) String() string {
	return fmt.Sprintf("%s: status %d after %v (%v)\n%s%s", strings.Join(r.argv, " "), r.status, r.took.Round(time.Millisecond), r.interrupted, r.out, r.errs)
}

// from runs a command to its end.
func (w *world) from(space, in string, argv ...string) run {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	cmd := w.command(ctx, space, w.environment(), argv...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(in), &out, &errs
	began := time.Now()
	err := cmd.Run()
	if cmd.ProcessState == nil {
		w.t.Fatal(err)
	}
	return run{argv: argv, out: out.String(), errs: errs.String(), status: cmd.ProcessState.ExitCode(), took: time.Since(began), interrupted: ctx.Err()}
}

// halligan runs our command.
func (w *world) halligan(args ...string) run {
	w.t.Helper()
	return w.from("resp", "", append([]string{w.bin + "/halligan"}, args...)...)
}

// ssh runs stock ssh.
func (w *world) ssh(args ...string) run {
	w.t.Helper()
	if _, err := exec.LookPath("ssh"); err != nil {
		w.t.Skip("no ssh: install openssh-client")
	}
	return w.from("resp", "", append([]string{"ssh", "-F", w.file("ssh_config")}, args...)...)
}

// ok demands status 0.
func (r run) ok(t testing.TB) run {
	t.Helper()
	if r.status != 0 {
		t.Fatal(r)
	}
	return r
}

// result is what a mutation prints with -o json.
type result struct {
	Action, Result string
	Error          *struct{ Code, Message string }
}

func (r run) result(t testing.TB) (got result) {
	t.Helper()
	if err := json.Unmarshal([]byte(r.out), &got); err != nil {
		t.Fatalf("%v: %v", err, r)
	}
	return got
}

// relaying counts the connections of a bastion to the SSH doors of nodes.
func (w *world) relaying(i int) (count int) {
	w.t.Helper()
	table, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", w.bastions[i].cmd.Process.Pid))
	if err != nil {
		return 0
	}
	// Local and remote address, and 01 for an established connection (proc_net(5)).
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 3 && strings.HasSuffix(f[2], fmt.Sprintf(":%04X", sshPort)) && f[3] == "01" {
			count++
		}
	}
	return count
}

// serving returns the bastion that relays, once one does.
func (w *world) serving() (i int) {
	w.t.Helper()
	eventually(w.t, "a bastion relays", func() bool {
		for i = range bastionNames {
			if w.relaying(i) > 0 {
				return true
			}
		}
		return false
	})
	return i
}

// idle waits until no bastion relays any more.
func (w *world) idle() {
	w.t.Helper()
	eventually(w.t, "no bastion relays", func() bool {
		for i := range bastionNames {
			if w.relaying(i) > 0 {
				return false
			}
		}
		return true
	})
}
