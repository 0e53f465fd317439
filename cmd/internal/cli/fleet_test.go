package cli

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/rs/zerolog"
	gossh "golang.org/x/crypto/ssh"
	sshagent "golang.org/x/crypto/ssh/agent"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/agent/door"
	"github.com/halligan-io/halligan/agent/sshd"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/sshclient/testagent"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/approval"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/issuer"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// fleetStage is three nodes of cluster prod and one of staging, which have real
// SSH doors, real bundles and a playing engine each.
type fleetStage struct {
	sealed *testagent.Token // the key that the policy itself lists, of carol
	t      testing.TB
	keys   *testfleet.Fleet
	file   *bundle.File
	dir    string
	nodes  []*sshNode
	// bastions are before the nodes, if there are any.
	bastions []*realBastion
	serial   uint64
}

// sshNode is one of them.
type sshNode struct {
	*stage
	id      string // NODE.CLUSTER
	address netip.AddrPort
	store   *bundle.Store
}

// Status says which bundle is in force.
func (n *sshNode) Status() *halliganv1.BundleStatus {
	b := n.store.Current()
	return &halliganv1.BundleStatus{PolicyVersion: b.Policy.Version, InventoryVersion: b.Inventory.Version, RevocationsVersion: b.Revocations.Version,
		Signed: timestamppb.New(b.Signed()), FreshUntil: timestamppb.New(b.FreshUntil())}
}

// Offer takes a bundle over.
func (n *sshNode) Offer(data []byte) (bool, error) { return n.store.Offer(data) }

// Raw is the bundle in force.
func (n *sshNode) Raw() []byte { return n.store.Raw() }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newFleet(t testing.TB, dir string, bastions int) *fleetStage {
	f := &fleetStage{t: t, keys: testfleet.New(t), dir: dir, serial: 1000}
	f.file = must(bundle.Parse(f.keys.Bundle()))
	_, hardware, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	f.sealed = &testagent.Token{Private: hardware}
	policy := *f.file.Policy
	policy.Header = policy.Next(time.Now().UTC().Truncate(time.Second))
	policy.Sealed = []bundle.Sealed{{Person: "carol", Key: bundle.Key{PublicKey: f.sealed.Public()}, Role: "commander", Clusters: []string{"prod"},
		NotBefore: time.Now().Add(-time.Hour).UTC().Truncate(time.Second), NotAfter: time.Now().Add(time.Hour).UTC().Truncate(time.Second)}}
	f.add(f.file, &policy, bundle.PolicyNamespace)
	inv := *f.file.Inventory
	inv.Header = inv.Next(time.Now().UTC().Truncate(time.Second))
	inv.Clusters = []bundle.Cluster{{Name: "prod"}, {Name: "staging"}}
	var outer []net.Listener
	for i, id := range []string{"cp-1.prod", "cp-2.prod", "cp-10.prod", "cp-1.staging"} {
		name, cluster, _ := strings.Cut(id, ".")
		l := must(net.Listen("tcp", "127.0.0.1:0"))
		outer = append(outer, l)
		address := netip.MustParseAddrPort(l.Addr().String())
		f.nodes = append(f.nodes, &sshNode{stage: newStage(name), id: id, address: address})
		c := &inv.Clusters[i/3]
		if c.Name != cluster {
			panic(c.Name)
		}
		c.Nodes = append(c.Nodes, bundle.Host{Name: name, Address: bundle.IP{Addr: address.Addr()}, SSHPort: address.Port()})
	}
	for i := range bastions {
		b := newBastion("bastion-" + string(rune('a'+i)))
		f.bastions = append(f.bastions, b)
		inv.Bastions = append(inv.Bastions, bundle.Host{Name: b.name, Address: bundle.IP{Addr: b.address.Addr()}, SSHPort: b.address.Port()})
	}
	f.add(f.file, &inv, bundle.InventoryNamespace)
	for i, n := range f.nodes {
		f.start(n, outer[i], n.id)
	}
	for _, b := range f.bastions {
		f.startBastion(b, b.name)
	}
	return f
}

// add signs a part into a file.
func (f *fleetStage) add(file *bundle.File, part any, namespace string) {
	text := must(bundle.Encode(part))
	if err := file.Add(text, must(bundle.Sign(text, namespace, f.keys.Root.SSH()))); err != nil {
		panic(err)
	}
}

// revoked returns the bundle with the next revocations.
func (f *fleetStage) revoked(person string) []byte {
	file := must(bundle.Parse(f.file.Format()))
	next := *file.Revocations
	next.Header = next.Next(time.Now().UTC().Truncate(time.Second))
	next.KeyIDs = []string{person}
	f.add(file, &next, bundle.RevocationsNamespace)
	f.file = file
	return file.Format()
}

// start opens the doors of a node, whose host certificate is for the name.
func (f *fleetStage) start(n *sshNode, relay net.Listener, name string) {
	path := filepath.Join(must(os.MkdirTemp(f.dir, "node")), "bundle")
	if err := os.WriteFile(path, f.file.Format(), 0o600); err != nil {
		panic(err)
	}
	n.store = must(bundle.Open(bundle.Options{Path: path}))
	_, cluster, _ := strings.Cut(n.id, ".")
	authority := credential.New(credential.Options{Bundle: n.store, Clock: trust.NewClock(time.Now().Add(-time.Hour)), Cluster: cluster, Node: n.node})
	n.approvers = func(tokens []string, p *halliganv1.Plan, who trust.Identity) error {
		b := n.store.Current()
		got, err := approval.Verify(tokens, approval.Plan{Fleet: b.Policy.Fleet, Cluster: p.GetCluster(), ClusterName: cluster, Node: n.id, ID: p.GetId(), SHA256: p.GetSha256(),
			Nonce: p.GetNonce(), Requester: who.Person, RequesterKey: who.Fingerprint, PolicyVersion: b.Policy.Version, Action: p.GetAction(), Namespaces: []string{"shop"}}, authority, time.Now())
		if err == nil && len(got) < int(p.GetApprovalsNeeded()) {
			err = fault.New(fault.AwaitingApproval, "", "%d approvals", len(got))
		}
		return err
	}
	server := must(door.New(door.Options{Engine: n.stage, Bundles: n, Cluster: cluster, Alarms: deaf{}, Log: zerolog.Nop()}))
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	host := must(gossh.NewSignerFromKey(private))
	f.serial++
	ssh := must(sshserver.New(sshserver.Options{
		HostSigners:  []gossh.Signer{must(gossh.NewCertSigner(must(f.keys.Host.Host(host.PublicKey(), name, f.serial, testfleet.Now())), host))},
		Authenticate: authority.User, Hold: authority.Hold, Log: zerolog.Nop(),
		Handlers: sshd.Handlers(sshd.Options{Door: server, Node: n.node, Cluster: cluster, Now: time.Now, Log: zerolog.Nop()}),
	}))
	inner := must(net.Listen("tcp", "127.0.0.1:0"))
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = ssh.Serve(ctx, inner) })
	running.Go(func() { n.relay(relay, "tcp", inner.Addr().String()) })
	n.stop = sync.OnceFunc(func() {
		n.goOn()
		relay.Close()
		n.cut()
		cancel()
		server.Shutdown()
		running.Wait()
	})
}

func (f *fleetStage) stop() {
	for _, b := range f.bastions {
		b.kill()
	}
	for _, n := range f.nodes {
		n.stop()
	}
}

func (f *fleetStage) node(id string) *sshNode {
	for _, n := range f.nodes {
		if n.id == id {
			return n
		}
	}
	panic(id)
}

// identity writes a key with its certificate.
func (f *fleetStage) identity(name string, passphrase string, h issuer.Holder, v issuer.Validity, by *issuer.Key) (ed25519.PrivateKey, *gossh.Certificate) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	block, err := gossh.MarshalPrivateKey(private, name)
	if passphrase != "" {
		block, err = gossh.MarshalPrivateKeyWithPassphrase(private, name, []byte(passphrase))
	}
	file := filepath.Join(f.dir, "ids", name)
	f.serial++
	cert := must(by.User(must(gossh.NewPublicKey(private.Public())), h, f.serial, v))
	for name, data := range map[string][]byte{file: pem.EncodeToMemory(must(block, err)), file + "-cert.pub": gossh.MarshalAuthorizedKey(cert)} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			panic(err)
		}
	}
	return private, cert
}

// TestFleet runs the real command against real SSH doors, one of which may be
// dead, an impostor or without a leader.
func TestFleet(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/fleet",
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("HALLIGAN_UPDATE") != "",
		Setup:               func(env *testscript.Env) error { return furnishFleet(t, env, 0) },
		Cmds:                fleetCommands(),
	})
}

// fleetCommands are what a story of a fleet can do to it.
func fleetCommands() map[string]func(*testscript.TestScript, bool, []string) {
	return map[string]func(*testscript.TestScript, bool, []string){
		"exits": exits,
		// applying waits until a node has begun, and go-on lets it finish.
		"applying": func(ts *testscript.TestScript, _ bool, args []string) { <-theFleet(ts).node(args[0]).begun },
		"go-on":    func(ts *testscript.TestScript, _ bool, args []string) { theFleet(ts).node(args[0]).goOn() },
		// bastion kill|stop|freeze|thaw|start NAME..., or impostor NAME OTHER, which lets the
		// other one answer at its address.
		"bastion": func(ts *testscript.TestScript, _ bool, args []string) {
			f := theFleet(ts)
			for _, b := range f.bastions {
				if !slices.Contains(args[1:], b.name) || args[0] == "impostor" && b.name != args[1] {
					continue
				}
				switch args[0] {
				case "kill":
					b.kill()
				case "freeze":
					ts.Check(b.cmd.Process.Signal(syscall.SIGSTOP))
				case "thaw":
					ts.Check(b.cmd.Process.Signal(syscall.SIGCONT))
				case "start":
					f.startBastion(b, b.name)
				case "impostor":
					b.kill()
					f.startBastion(b, args[2])
				default:
					ts.Fatalf("no %s", args[0])
				}
			}
		},
		// kill ends a node.
		"kill-node": func(ts *testscript.TestScript, _ bool, args []string) {
			for _, id := range args {
				theFleet(ts).node(id).stop()
			}
		},
		// impostor lets another machine answer in place of a node.
		"impostor": func(ts *testscript.TestScript, _ bool, args []string) {
			f := theFleet(ts)
			n := f.node(args[0])
			n.stop()
			l, err := net.Listen("tcp", n.address.String())
			ts.Check(err)
			f.start(n, l, args[1])
		},
		// silent lets nobody answer at a node, and nobody refuse either.
		"silent": func(ts *testscript.TestScript, _ bool, args []string) {
			n := theFleet(ts).node(args[0])
			n.stop()
			l, err := net.Listen("tcp", n.address.String())
			ts.Check(err)
			ts.Defer(func() { l.Close() })
		},
		"leaderless": func(ts *testscript.TestScript, _ bool, args []string) {
			for _, id := range args {
				n := theFleet(ts).node(id)
				n.mu.Lock()
				n.leaderless = true
				n.mu.Unlock()
			}
		},
		"applications": func(ts *testscript.TestScript, _ bool, args []string) {
			n := theFleet(ts).node(args[0])
			n.mu.Lock()
			defer n.mu.Unlock()
			if strconv.Itoa(n.applied) != args[1] {
				ts.Fatalf("%s was asked to apply %d times, want %s", args[0], n.applied, args[1])
			}
		},
		// revoke hands nodes a bundle in which a person is revoked.
		"revoke": func(ts *testscript.TestScript, _ bool, args []string) {
			f := theFleet(ts)
			newer := f.revoked(args[0])
			for _, id := range args[1:] {
				_, err := f.node(id).Offer(newer)
				ts.Check(err)
			}
		},
		// in-force compares the version of a node's revocations.
		"in-force": func(ts *testscript.TestScript, _ bool, args []string) {
			if v := theFleet(ts).node(args[0]).Status().GetRevocationsVersion(); strconv.FormatUint(v, 10) != args[1] {
				ts.Fatalf("%s has revocations %d, want %s", args[0], v, args[1])
			}
		},
	}
}

func theFleet(ts *testscript.TestScript) *fleetStage { return ts.Value("fleet").(*fleetStage) }

func furnishFleet(t *testing.T, env *testscript.Env, bastions int) (err error) {
	defer func() { // of must
		if r := recover(); r != nil {
			err = fmt.Errorf("%v", r)
		}
	}()
	f := newFleet(t, env.WorkDir, bastions)
	env.Values["fleet"] = f
	env.Defer(f.stop)
	if err := os.Mkdir(filepath.Join(f.dir, "ids"), 0o700); err != nil {
		return err
	}
	one := func(person string, roles ...trust.Role) issuer.Holder {
		return issuer.Holder{Person: person, Roles: roles, Clusters: []string{"prod"}}
	}
	life := func(from, to time.Duration) issuer.Validity {
		now := time.Now().Truncate(time.Second)
		return issuer.Validity{NotBefore: now.Add(from), NotAfter: now.Add(to)}
	}
	week := life(-time.Minute, issuer.MaxLife-time.Minute)
	private, cert := f.identity("responder", "", one("alice", trust.Observer, trust.Responder), week, f.keys.User)
	f.identity("observer", "", one("olaf", trust.Observer), week, f.keys.User)
	f.identity("approver", "", one("bob", trust.Approver), week, f.keys.User)
	f.identity("alice-approver", "", one("alice", trust.Approver), week, f.keys.User)
	f.identity("expired", "", one("alice", trust.Responder), life(-48*time.Hour, -3*time.Hour), f.keys.User)
	f.identity("late", "", one("alice", trust.Responder), life(-48*time.Hour, -time.Hour), f.keys.User)
	f.identity("short", "", one("alice", trust.Responder), life(-time.Hour, 26*time.Hour), f.keys.User)
	f.identity("everywhere", "", issuer.Holder{Person: "alice", Roles: []trust.Role{trust.Responder}, Clusters: []string{"prod", "staging"}}, week, f.keys.User)
	f.identity("foreign", "", one("alice", trust.Responder), week, f.keys.Root)
	f.identity("locked", "open sesame", one("alice", trust.Responder), week, f.keys.User)

	held := sshagent.NewKeyring()
	if err := held.Add(sshagent.AddedKey{PrivateKey: private, Certificate: cert, Comment: "laptop"}); err != nil {
		return err
	}
	locked := must(gossh.ParseRawPrivateKeyWithPassphrase(must(os.ReadFile(filepath.Join(f.dir, "ids", "locked"))), []byte("open sesame")))
	if err := held.Add(sshagent.AddedKey{PrivateKey: locked}); err != nil {
		return err
	}
	env.Setenv("AGENT", testagent.Serve(t, held))
	_, hardware, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	token := &testagent.Token{Private: hardware}
	f.serial++
	token.Certificate = must(f.keys.User.User(token.Public(), one("alice", trust.Responder), f.serial, week))
	env.Setenv("TOKEN", testagent.Serve(t, token))
	env.Setenv("SEALED", testagent.Serve(t, f.sealed))

	if err := os.WriteFile(filepath.Join(f.dir, "bundle"), f.file.Format(), 0o600); err != nil {
		return err
	}
	for _, b := range f.bastions {
		env.Setenv("ADDRESS_"+strings.ReplaceAll(b.name, "-", ""), b.address.String())
	}
	for _, n := range f.nodes {
		env.Setenv("ADDRESS_"+strings.NewReplacer("-", "", ".", "_").Replace(n.id), n.address.String())
	}
	for k, v := range map[string]string{"HALLIGAN_BUNDLE": "$WORK/bundle", "HALLIGAN_IDENTITY": "$WORK/ids/responder", "SSH_AUTH_SOCK": "", "HOME": "$WORK/home", "XDG_STATE_HOME": "", "XDG_CONFIG_HOME": "",
		"HALLIGAN_REASON": "storm", "TERM": "xterm"} {
		env.Setenv(k, strings.ReplaceAll(v, "$WORK", f.dir))
	}
	return os.Mkdir(filepath.Join(f.dir, "home"), 0o700)
}
