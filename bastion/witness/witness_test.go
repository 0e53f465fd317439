package witness

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/mtls"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/audit/mirror"
	"github.com/halligan-io/halligan/audit/service"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/logkey"
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

// world is a fleet of daemons that are nothing but their evidence.
type world struct {
	t     *testing.T
	fleet *testfleet.Fleet
	store *bundle.Store
	at    map[string]netip.AddrPort
	// taken are the places until who belongs there is started for the first time.
	taken map[string]net.Listener
}

// listen takes a server's place.
func (w *world) listen(name string) net.Listener {
	w.t.Helper()
	if l := w.taken[name]; l != nil {
		delete(w.taken, name)
		return l
	}
	l, err := net.Listen("tcp", w.at[name].String())
	if err != nil {
		w.t.Fatal(err)
	}
	return l
}

// newWorld finds a place for each of the servers, nodes of prod and bastions.
func newWorld(t *testing.T, servers ...string) *world {
	t.Helper()
	w := &world{t: t, fleet: testfleet.New(t), at: map[string]netip.AddrPort{}, taken: map[string]net.Listener{}}
	for _, name := range servers {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		w.taken[name] = l
		w.at[name] = netip.MustParseAddrPort(l.Addr().String())
	}
	data := w.fleet.Inventory(func(inv *bundle.Inventory) {
		inv.Clusters, inv.Bastions = nil, nil
		var nodes []bundle.Host
		for i, name := range servers {
			host, cluster, _ := strings.Cut(name, ".")
			h := bundle.Host{Name: host, Cluster: cluster, Address: bundle.IP{Addr: w.at[name].Addr()}, SSHPort: uint16(1 + i), GRPCPort: w.at[name].Port()}
			if cluster == bundle.BastionDomain {
				inv.Bastions = append(inv.Bastions, h)
			} else {
				nodes = append(nodes, h)
			}
		}
		inv.Clusters = []bundle.Cluster{{Name: "prod", Nodes: nodes}}
	})
	path := filepath.Join(w.fleet.Dir, "bundle")
	if err := durable.Write(path, data); err != nil {
		t.Fatal(err)
	}
	var err error
	if w.store, err = bundle.Open(bundle.Options{Path: path}); err != nil {
		t.Fatal(err)
	}
	return w
}

// daemon is a server's evidence behind a door of gRPC, and of a bastion its copies.
type daemon struct {
	w           *world
	name, state string
	ledger      *ledger.Ledger
	holder      *service.Holder
	key         ed25519.PrivateKey // of a bastion's countersignatures
	mirrors     *mirror.Mirrors
	cert        tls.Certificate
	stop        func()

	mu     sync.Mutex // guards alarms
	alarms []string
}

func (d *daemon) raise(e alarm.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.alarms = append(d.alarms, e.Text)
}

func (d *daemon) heard(text string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.ContainsFunc(d.alarms, func(s string) bool { return strings.Contains(s, text) })
}

// start starts a daemon whose state is in a folder, which may be that of one before.
func (w *world) start(name, state string) *daemon {
	w.t.Helper()
	d := &daemon{w: w, name: name, state: state, holder: service.NewHolder()}
	var err error
	if d.ledger, err = ledger.Open(ledger.Options{Dir: filepath.Join(state, "audit"), Origin: name, GenerationBytes: 64 << 10, SpoolBytes: 1 << 20, Hold: d.holder, Raise: d.raise, Log: zerolog.Nop()}); err != nil {
		w.t.Fatal(err)
	}
	node, cluster, _ := strings.Cut(name, ".")
	bastion := cluster == bundle.BastionDomain
	o := credential.Options{Bundle: w.store, Clock: trust.NewClock(time.Time{}), Node: node}
	said := logkey.Statement{Server: name, Log: d.ledger.Key(), Signed: time.Now()}
	if bastion {
		o.Relay = true
		if d.key, err = mirror.Key(filepath.Join(state, "audit", "witness-key")); err != nil {
			w.t.Fatal(err)
		}
		said.Witness = d.key.Public().(ed25519.PublicKey)
	} else {
		o.Cluster = cluster
	}
	identity := w.fleet.Statement(said)
	evidence := service.Options{Ledger: d.ledger, Origin: name, Holder: d.holder, Identity: func() []byte { return identity }, Bundle: w.store.Current, Now: time.Now, Log: zerolog.Nop()}
	if bastion {
		evidence.Copies = filepath.Join(state, "mirror")
	}
	anybody := grpcdoor.Row{May: func(trust.Identity) bool { return true }, Record: grpcdoor.Routine}
	methods := map[string]grpcdoor.Row{grpcdoor.Reflection[0]: anybody, grpcdoor.Reflection[1]: anybody}
	for _, m := range slices.Concat([]string{halliganv1.Evidence_ListLogs_FullMethodName, halliganv1.Evidence_ReadLog_FullMethodName, halliganv1.Evidence_ReadRecording_FullMethodName, halliganv1.Evidence_ReadSealed_FullMethodName, halliganv1.Evidence_Witness_FullMethodName}) {
		methods[m] = anybody
	}
	var door *grpcdoor.Server
	evidence.Stopping = func() context.Context { return door.Stopping() }
	door, err = grpcdoor.New(grpcdoor.Options{Methods: methods, Alarms: d, Log: zerolog.Nop(), Register: func(r grpc.ServiceRegistrar) { halliganv1.RegisterEvidenceServer(r, service.New(evidence)) }})
	if err != nil {
		w.t.Fatal(err)
	}
	certFile, keyFile := w.fleet.ServerFiles(name, testfleet.Now())
	if d.cert, err = tls.LoadX509KeyPair(certFile, keyFile); err != nil {
		w.t.Fatal(err)
	}
	show := func() (*tls.Certificate, error) { return &d.cert, nil }
	l := w.listen(name)
	secure := mtls.NewListener(l, mtls.Options{Certificate: show, Authority: credential.New(o), Alarm: d.raise, Log: zerolog.Nop()})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = door.Serve(secure) })
	if bastion {
		if d.mirrors, err = mirror.Open(mirror.Options{Dir: evidence.Copies, Server: name, Key: d.key, Bundle: w.store.Current, Now: time.Now, Raise: d.raise, Log: zerolog.Nop()}); err != nil {
			w.t.Fatal(err)
		}
		running.Go(func() {
			Run(ctx, Options{Origin: name, Bundles: w.store, Connect: dial, Servers: &credential.Servers{Bundle: w.store, Clock: trust.NewClock(time.Time{})}, Certificate: show, Mirrors: d.mirrors,
				Identity: func() []byte { return identity }, Held: d.ledger, Log: zerolog.Nop()})
		})
	}
	d.stop = sync.OnceFunc(func() {
		cancel()
		secure.Close()
		door.Shutdown()
		running.Wait()
		if err := d.ledger.Close(); err != nil {
			w.t.Error(err)
		}
	})
	w.t.Cleanup(d.stop)
	return d
}

func (d *daemon) Raise(e alarm.Event) { d.raise(e) }

func dial(ctx context.Context, h bundle.Host) (net.Conn, error) {
	at, _ := h.GRPC()
	return (&net.Dialer{}).DialContext(ctx, "tcp", at.String())
}

func (d *daemon) record(n int, text string) {
	d.w.t.Helper()
	for i := range n {
		if _, err := d.ledger.Append(context.Background(), audit.Event{Kind: audit.Login, Text: fmt.Sprint(text, i)}); err != nil {
			d.w.t.Fatal(err)
		}
	}
}

// witnessed reports whether each of the bastions has countersigned all there is.
func (d *daemon) witnessed(by ...*daemon) bool {
	s := d.ledger.State()
	for _, b := range by {
		if s.Witnessed[logkey.WitnessName(b.name)] < s.Events {
			return false
		}
	}
	return s.Events > 0
}

func (d *daemon) problem(of string) string {
	return d.mirrors.Problem(of)
}

// TestWitness: all there is of all logs is with all bastions, over generations, and
// countersigned; it is the same there, byte for byte.
func TestWitness(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "cp-1.prod", "a.bastion", "b.bastion")
	node, a, b := w.start("cp-1.prod", t.TempDir()), w.start("a.bastion", t.TempDir()), w.start("b.bastion", t.TempDir())
	node.record(5, "at first ")
	a.record(1, "of a ")
	b.record(1, "of b ")
	eventually(t, "both have the node's", func() bool { return node.witnessed(a, b) })
	eventually(t, "b has a's", func() bool { return a.witnessed(b) })
	node.record(300, strings.Repeat("more of it ", 60))
	eventually(t, "both have all of it", func() bool { return node.witnessed(a, b) })
	heads := node.ledger.Heads()
	if len(heads) < 2 { // a round may be as large as some of them
		t.Errorf("%d generations", len(heads))
	}
	for _, at := range []*daemon{a, b} {
		for _, h := range heads {
			tree, err := tiles.Open(filepath.Join(at.state, "mirror", node.name, "logs", fmt.Sprintf("%s.%08d", h.Lineage, h.Generation)))
			if err != nil {
				t.Fatal(err)
			}
			_, c, err := tree.Checkpoint()
			if err != nil || uint64(c.N) != h.Size {
				t.Fatalf("%s has %d entries of %d: %v", at.name, c.N, h.Size, err)
			}
			i := 0
			for e, err := range node.ledger.Entries(t.Context(), h.Lineage, h.Generation, 0, h.Size) {
				if err != nil {
					t.Fatal(err)
				}
				for copied, err := range tree.Entries(t.Context(), int64(i), int64(i+1)) {
					if err != nil || string(copied) != string(e) {
						t.Fatalf("%s: entry %d differs: %v", at.name, i, err)
					}
				}
				if i++; i > 20 { // reading them one by one is slow
					break
				}
			}
		}
		eventually(t, "it is complete", func() bool {
			for _, s := range at.mirrors.Status() {
				if s.Lag != 0 || s.Problem != "" || s.Trouble != "" {
					return false
				}
			}
			return len(at.mirrors.Status()) == 2
		})
	}
	// A daemon that is away is behind, and catches up.
	node.stop()
	eventually(t, "a notices", func() bool {
		return slices.ContainsFunc(a.mirrors.Status(), func(s mirror.Status) bool { return s.Origin == node.name && s.Lag > 0 && s.Trouble != "" })
	})
	node = w.start(node.name, node.state)
	node.record(3, "again ")
	eventually(t, "both have what came since", func() bool { return node.witnessed(a, b) })
	if len(a.alarms)+len(b.alarms) > 0 {
		t.Error(a.alarms, b.alarms)
	}
}

// copyFolder is cp -a, for a state folder that is at rest.
func copyFolder(t *testing.T, from string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(to, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return os.Chmod(path, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	return to
}

// TestRolledBack: a node whose log is put back to what it was yesterday, with all
// keys, is found out by both bastions; so are two whose logs were swapped. What was
// copied stays.
func TestRolledBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "cp-1.prod", "cp-2.prod", "a.bastion", "b.bastion")
	node, a, b := w.start("cp-1.prod", t.TempDir()), w.start("a.bastion", t.TempDir()), w.start("b.bastion", t.TempDir())
	node.record(5, "yesterday ")
	eventually(t, "both have it", func() bool { return node.witnessed(a, b) })
	node.stop()
	yesterday := copyFolder(t, node.state)
	node = w.start(node.name, node.state)
	node.record(5, "what nobody is to know ")
	eventually(t, "both have all", func() bool { return node.witnessed(a, b) })
	node.stop()
	node = w.start(node.name, yesterday)
	eventually(t, "both see that it was cut", func() bool {
		return strings.Contains(a.problem(node.name), "it was cut") && strings.Contains(b.problem(node.name), "it was cut") && a.heard("it was cut") && b.heard("it was cut")
	})
	node.record(20, "and on as if nothing was ")
	for _, at := range []*daemon{a, b} {
		if s := at.mirrors.Status(); s[slices.IndexFunc(s, func(s mirror.Status) bool { return s.Origin == node.name })].Events != 10 {
			t.Errorf("%s: %+v", at.name, s)
		}
	}
	if node.witnessed(a) || node.witnessed(b) {
		t.Error("it was countersigned")
	}
	// The log of one node at another, with its keys: the host's key speaks for the
	// node's own name only, and its checkpoints are of another.
	node.stop()
	other := w.start("cp-2.prod", copyFolder(t, node.state))
	other.record(1, "swapped ")
	eventually(t, "it begins a log of its own", func() bool { return other.witnessed(a, b) })
}

// TestBastionKilled: a bastion that ends at any moment goes on from what it had.
func TestBastionKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "cp-1.prod", "a.bastion")
	node := w.start("cp-1.prod", t.TempDir())
	state := t.TempDir()
	node.record(200, strings.Repeat("x", 1000))
	for i := range 5 {
		a := w.start("a.bastion", state)
		time.Sleep(time.Duration(i) * 15 * time.Millisecond) // somewhere on the way, or not
		a.stop()
		node.record(3, "meanwhile ")
	}
	a := w.start("a.bastion", state)
	eventually(t, "it has all", func() bool { return node.witnessed(a) })
	if p := a.problem(node.name); p != "" || len(a.alarms) > 0 {
		t.Error(p, a.alarms)
	}
}

// TestHeld: what a node's log cannot take two bastions hold, in their own logs, and
// sign for; one is not enough.
func TestHeld(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "cp-1.prod", "a.bastion", "b.bastion")
	node, a := w.start("cp-1.prod", t.TempDir()), w.start("a.bastion", t.TempDir())
	eventually(t, "a is connected", func() bool { return node.holder.Bastions() == 1 })
	event := []byte(`{"v":1,"id":"e-1","origin":"cp-1.prod","kind":"intent"}`)
	if got, err := node.holder.Hold(t.Context(), "e-1", event); !fault.Is(err, fault.AuditUnavailable) || got != nil {
		t.Errorf("one bastion is enough: %q, %v", got, err)
	}
	b := w.start("b.bastion", t.TempDir())
	eventually(t, "b is connected", func() bool { return node.holder.Bastions() == 2 })
	before := a.ledger.State().Events
	receipts, err := node.holder.Hold(t.Context(), "e-1", event)
	if err != nil || len(receipts) != 2 {
		t.Fatalf("%q, %v", receipts, err)
	}
	for _, at := range []*daemon{a, b} {
		key := at.key.Public().(ed25519.PublicKey)
		if !slices.ContainsFunc(receipts, func(r string) bool { return logkey.VerifyReceipt([]byte(r), at.name, key, "e-1", event) == nil }) {
			t.Errorf("no receipt of %s", at.name)
		}
	}
	if now := a.ledger.State().Events; now != before+1 {
		t.Errorf("a has %d events after %d", now, before)
	}
	eventually(t, "it is signed", func() bool { return a.ledger.State().Signed == a.ledger.State().Events })
	h := a.ledger.Heads()[0]
	found := false
	for e, err := range a.ledger.Entries(t.Context(), h.Lineage, h.Generation, 0, h.Size) {
		if err != nil {
			t.Fatal(err)
		}
		found = found || strings.Contains(string(e), `"kind":"held"`) && strings.Contains(string(e), `\"id\":\"e-1\"`)
	}
	if !found {
		t.Error("a's log does not have it")
	}
	// What is not the node's, and what is held already, is held by nobody.
	for name, event := range map[string]string{"another's": `{"v":1,"id":"e-2","origin":"cp-2.prod","kind":"intent"}`, "another ID": `{"v":1,"id":"e-3","origin":"cp-1.prod","kind":"intent"}`,
		"held": `{"v":1,"id":"e-2","origin":"cp-1.prod","kind":"held"}`, "no event": `e-2`} {
		if got, err := node.holder.Hold(t.Context(), "e-2", []byte(event)); !fault.Is(err, fault.AuditUnavailable) || got != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if _, err := node.holder.Hold(t.Context(), "e-2", []byte(strings.Repeat(`"`, audit.MaxEvent/2))); !fault.Is(err, fault.AuditUnavailable) {
		t.Errorf("what does not fit: %v", err)
	}
	b.stop()
	eventually(t, "b is gone", func() bool { return node.holder.Bastions() == 1 })
}

// broken makes every write to a file fail that this process has open for writing, as
// a broken disk does, until it is mended.
func broken(t *testing.T, file string) (mend func()) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + d.Name()); err != nil || to != file {
			continue
		}
		var fd int
		if _, err := fmt.Sscan(d.Name(), &fd); err != nil {
			t.Fatal(err)
		}
		whole, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		reads, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer reads.Close()
		put := func(from int) {
			if err := unix.Dup3(from, fd, unix.O_CLOEXEC); err != nil {
				t.Error(err)
			}
		}
		put(int(reads.Fd()))
		return func() { put(whole); unix.Close(whole) }
	}
	t.Fatalf("nobody has %s open", file)
	return nil
}

// TestRule11: an action on a node whose log takes nothing stands on two bastions'
// logs; without them it does not begin; the node's own log adopts it.
func TestRule11(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "cp-1.prod", "a.bastion", "b.bastion")
	node, a, b := w.start("cp-1.prod", t.TempDir()), w.start("a.bastion", t.TempDir()), w.start("b.bastion", t.TempDir())
	node.record(1, "before ")
	eventually(t, "both are connected", func() bool { return node.holder.Bastions() == 2 && node.witnessed(a, b) })
	mend := broken(t, filepath.Join(node.state, "audit", "spool"))
	began := 0
	act := func() (audit.Receipt, error) {
		return audit.Do(t.Context(), node.ledger, audit.Event{Action: "scale", Actor: &audit.Actor{Person: "ada", Role: "commander", Credential: "person"}}, func(context.Context, audit.Permit) []audit.Event {
			began++
			return []audit.Event{{Kind: audit.Outcome, Outcome: "applied"}}
		})
	}
	r, err := act()
	if err != nil || r.Where != audit.Remote || began != 1 {
		t.Fatalf("%+v, %v, begun %d times", r, err, began)
	}
	b.stop()
	eventually(t, "b is gone", func() bool { return node.holder.Bastions() == 1 })
	if r, err := act(); !fault.Is(err, fault.AuditUnavailable) || began != 1 {
		t.Errorf("with one bastion: %+v, %v, begun %d times", r, err, began)
	}
	mend()
	eventually(t, "it is adopted", func() bool {
		return node.ledger.State().Refused == "" && node.ledger.State().Events >= 3 && node.witnessed(a)
	})
	adopted := 0
	for _, h := range node.ledger.Heads() {
		for e, err := range node.ledger.Entries(t.Context(), h.Lineage, h.Generation, 0, h.Size) {
			var event audit.Event
			if err == nil {
				err = json.Unmarshal(e, &event)
			}
			if err != nil {
				t.Fatal(err)
			}
			if event.Kind != audit.Adopted {
				continue
			}
			adopted++
			var inner audit.Event
			if err := json.Unmarshal([]byte(event.Payload), &inner); err != nil || len(event.Receipts) != 2 {
				t.Fatalf("%v, %q", err, event.Receipts)
			}
			for _, at := range []*daemon{a, b} {
				key := at.key.Public().(ed25519.PublicKey)
				if !slices.ContainsFunc(event.Receipts, func(r string) bool {
					return logkey.VerifyReceipt([]byte(r), at.name, key, inner.ID, []byte(event.Payload)) == nil
				}) {
					t.Errorf("%s has signed nothing for %s", at.name, inner.ID)
				}
			}
		}
	}
	if adopted != 2 {
		t.Errorf("%d events are adopted", adopted)
	}
}

// hostile is a server that answers Witness as a test likes.
type hostile struct {
	halliganv1.UnimplementedEvidenceServer
	witness func(grpc.BidiStreamingServer[halliganv1.WitnessRequest, halliganv1.WitnessResponse]) error
}

func (h hostile) Witness(s grpc.BidiStreamingServer[halliganv1.WitnessRequest, halliganv1.WitnessResponse]) error {
	return h.witness(s)
}

// TestHostileNode: a node that sends whatever it likes costs a bastion a bounded
// amount of memory and disk, and holds up no other node.
func TestHostileNode(t *testing.T) {
	w := newWorld(t, "cp-1.prod", "cp-2.prod", "a.bastion")
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	identity := w.fleet.Statement(logkey.Statement{Server: "cp-2.prod", Log: key.Public().(ed25519.PublicKey), Signed: time.Now()})
	type server = grpc.BidiStreamingServer[halliganv1.WitnessRequest, halliganv1.WitnessResponse]
	send := func(s server, m *halliganv1.WitnessResponse) error { return s.Send(m) }
	who := &halliganv1.WitnessResponse{Message: &halliganv1.WitnessResponse_Identity{Identity: identity}}
	entries := func(first uint64, n, size int) *halliganv1.WitnessResponse {
		e := &halliganv1.WitnessEntries{First: first}
		for range n {
			e.Entries = append(e.Entries, make([]byte, size))
		}
		return &halliganv1.WitnessResponse{Message: &halliganv1.WitnessResponse_Entries{Entries: e}}
	}
	head := func(n int64) *halliganv1.WitnessResponse {
		return &halliganv1.WitnessResponse{Message: &halliganv1.WitnessResponse_Head{Head: &halliganv1.WitnessHead{Lineage: "00ff00ff", Generation: 1, Checkpoint: signedHead(t, key, "cp-2.prod", n)}}}
	}
	// Each of them is what one stream does; the last one goes on.
	scenes := []func(server) error{
		func(s server) error { return nil },
		func(s server) error { return send(s, head(5)) },
		func(s server) error { return send(s, &halliganv1.WitnessResponse{}) },
		func(s server) error { return errors.Join(send(s, who), send(s, entries(0, 10, 10))) },
		func(s server) error { return errors.Join(send(s, who), send(s, head(5)), send(s, entries(3, 2, 10))) },
		func(s server) error { return errors.Join(send(s, who), send(s, head(5)), send(s, entries(0, 10, 10))) },
		func(s server) error { return errors.Join(send(s, who), send(s, head(5)), send(s, entries(0, 0, 0))) },
		func(s server) error { return errors.Join(send(s, who), send(s, head(5)), send(s, head(6))) },
		func(s server) error {
			return errors.Join(send(s, who), send(s, head(1<<60)), send(s, entries(0, 100, 1000)))
		},
		func(s server) error { return errors.Join(send(s, who), send(s, entries(0, 1, 4<<20))) },
		func(s server) error { return errors.Join(send(s, who), send(s, who), send(s, head(-1))) },
		func(s server) error { // of which none fits to the head
			err := errors.Join(send(s, who), send(s, head(300)))
			for i := uint64(0); err == nil; i += 100 {
				err = send(s, entries(i, 100, 100))
			}
			return err
		},
		func(s server) error { // endless
			err := send(s, who)
			for i := 0; err == nil; i++ {
				err = send(s, &halliganv1.WitnessResponse{Message: &halliganv1.WitnessResponse_Sealed{Sealed: &halliganv1.WitnessSealed{ActionId: "../../x", Offset: int64(i), Data: make([]byte, 1000)}}})
				if i > 2000 {
					return nil
				}
			}
			return err
		},
		func(s server) error { // a flood of holds
			err := send(s, who)
			for i := 0; err == nil; i++ {
				err = send(s, &halliganv1.WitnessResponse{Message: &halliganv1.WitnessResponse_Hold{Hold: &halliganv1.WitnessHold{Id: fmt.Sprint(i), Event: make([]byte, 50<<10)}}})
			}
			return err
		},
	}
	var mu sync.Mutex
	scene := 0
	l := w.listen("cp-2.prod")
	cert, err := tls.LoadX509KeyPair(w.fleet.ServerFiles("cp-2.prod", testfleet.Now()))
	if err != nil {
		t.Fatal(err)
	}
	evil := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert})))
	halliganv1.RegisterEvidenceServer(evil, hostile{witness: func(s server) error {
		mu.Lock()
		i := min(scene, len(scenes)-1)
		scene++
		mu.Unlock()
		return scenes[i](s)
	}})
	go func() { _ = evil.Serve(l) }()
	t.Cleanup(evil.Stop)

	var before, after runtime.MemStats
	node, a := w.start("cp-1.prod", t.TempDir()), w.start("a.bastion", t.TempDir())
	runtime.GC()
	runtime.ReadMemStats(&before)
	hosts := w.store.Current().Inventory.Nodes("")
	bad := hosts[slices.IndexFunc(hosts, func(h bundle.Host) bool { return h.ID() == "cp-2.prod" })]
	runner := &witness{Options: Options{Origin: a.name, Bundles: w.store, Connect: dial, Servers: &credential.Servers{Bundle: w.store, Clock: trust.NewClock(time.Time{})},
		Certificate: func() (*tls.Certificate, error) { return &a.cert, nil }, Mirrors: a.mirrors, Held: a.ledger, Log: zerolog.Nop(),
		Identity: func() []byte { return []byte("anything") }}, reaching: make(chan struct{}, atOnce)}
	for { // without the waits between them
		mu.Lock()
		i := scene
		mu.Unlock()
		if i >= len(scenes)-1 {
			break
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		if _, err := runner.try(ctx, bad); err == nil {
			t.Errorf("scene %d: taken", i)
		}
		cancel()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	_, _ = runner.try(ctx, bad) // the flood, which goes on until it is cut off
	cancel()
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 64<<20 {
		t.Errorf("%d MiB more memory", grown>>20)
	}
	if s := a.mirrors.Status(); slices.ContainsFunc(s, func(s mirror.Status) bool { return s.Origin == "cp-2.prod" && s.Events > 0 }) {
		t.Errorf("%+v", s)
	}
	if n := a.ledger.State().Events; n > 2*128 {
		t.Errorf("%d events of the flood are in the bastion's own log", n)
	}
	node.record(5, "meanwhile ")
	eventually(t, "the other node is witnessed", func() bool { return node.witnessed(a) })
}

// TestHostileBastion: what a bastion that was taken over sends to an agent changes
// nothing there but what is signed in it.
func TestHostileBastion(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "cp-1.prod", "cp-2.prod", "a.bastion")
	node, other := w.start("cp-1.prod", t.TempDir()), w.start("cp-2.prod", t.TempDir())
	node.record(5, "")
	other.record(5, "")
	eventually(t, "both have signed", func() bool { return node.ledger.State().Signed == 5 && other.ledger.State().Signed == 5 })
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	said := logkey.Statement{Server: "a.bastion", Log: key.Public().(ed25519.PublicKey), Witness: key.Public().(ed25519.PublicKey), Signed: time.Now()}
	identity := w.fleet.Statement(said)
	said.Server = "b.bastion"
	foreign := w.fleet.Statement(said)
	said.Server, said.Witness = "a.bastion", nil
	without := w.fleet.Statement(said)
	connect := func(name string) halliganv1.EvidenceClient {
		cert, err := tls.LoadX509KeyPair(w.fleet.ServerFiles(name, testfleet.Now()))
		if err != nil {
			t.Fatal(err)
		}
		raw, err := net.Dial("tcp", w.at[node.name].String())
		if err != nil {
			t.Fatal(err)
		}
		servers := &credential.Servers{Bundle: w.store, Clock: trust.NewClock(time.Time{})}
		conn, err := mtls.Client(raw, node.name, servers.TLS(node.name), &cert, maxMessage)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close(); raw.Close() })
		return halliganv1.NewEvidenceClient(conn)
	}
	// say sends the messages, and returns why the stream ended, nil where it goes on.
	say := func(have *halliganv1.WitnessHave, messages ...*halliganv1.WitnessRequest) error {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		s, err := connect("a.bastion").Witness(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if have != nil {
			messages = append([]*halliganv1.WitnessRequest{{Message: &halliganv1.WitnessRequest_Have{Have: have}}}, messages...)
		}
		for _, m := range messages {
			if s.Send(m) != nil {
				break
			}
		}
		// A message that belongs nowhere ends every stream that has not ended before.
		_ = s.Send(&halliganv1.WitnessRequest{})
		for {
			if _, err := s.Recv(); err != nil {
				if ctx.Err() != nil {
					t.Fatal("it does not end")
				}
				if e := api.FromStatus(err); !strings.Contains(e.Message, "does not send") {
					return e
				}
				return nil
			}
		}
	}
	h := node.ledger.Heads()[0]
	has := &halliganv1.WitnessHave{Identity: identity, Logs: []*halliganv1.LogHave{{Lineage: h.Lineage, Generation: 1, Size: 1 << 60}, {Lineage: "../..", Generation: 7}}}
	cosign := func(by, of string, checkpoint []byte) *halliganv1.WitnessRequest {
		signed := countersigned(t, key, by, checkpoint)
		return &halliganv1.WitnessRequest{Message: &halliganv1.WitnessRequest_Cosigned{Cosigned: &halliganv1.WitnessCosigned{Lineage: of, Generation: 1, Checkpoint: signed}}}
	}
	for name, c := range map[string]struct {
		have     *halliganv1.WitnessHave
		messages []*halliganv1.WitnessRequest
	}{
		"says nothing first":    {nil, nil},
		"no identity":           {&halliganv1.WitnessHave{}, nil},
		"another's identity":    {&halliganv1.WitnessHave{Identity: foreign}, nil},
		"no witness":            {&halliganv1.WitnessHave{Identity: without}, nil},
		"a log of another":      {has, []*halliganv1.WitnessRequest{cosign("a.bastion", other.ledger.Heads()[0].Lineage, other.ledger.Heads()[0].Checkpoint)}},
		"as another bastion":    {has, []*halliganv1.WitnessRequest{cosign("b.bastion", h.Lineage, h.Checkpoint)}},
		"of what nobody signed": {has, []*halliganv1.WitnessRequest{cosign("a.bastion", h.Lineage, signedHead(t, key, "cp-1.prod", 5))}},
		"not signed by it":      {has, []*halliganv1.WitnessRequest{{Message: &halliganv1.WitnessRequest_Cosigned{Cosigned: &halliganv1.WitnessCosigned{Lineage: h.Lineage, Generation: 1, Checkpoint: h.Checkpoint}}}}},
		"endless":               {has, []*halliganv1.WitnessRequest{{Message: &halliganv1.WitnessRequest_Cosigned{Cosigned: &halliganv1.WitnessCosigned{Lineage: h.Lineage, Generation: 1, Checkpoint: make([]byte, 1<<20)}}}}},
	} {
		if err := say(c.have, c.messages...); err == nil {
			t.Errorf("%s: it is taken", name)
		}
	}
	// These change nothing.
	if err := say(has, &halliganv1.WitnessRequest{Message: &halliganv1.WitnessRequest_Receipt{Receipt: &halliganv1.WitnessReceipt{Id: "e-1", Note: []byte("x")}}},
		&halliganv1.WitnessRequest{Message: &halliganv1.WitnessRequest_Peers{Peers: &halliganv1.WitnessPeers{Identities: [][]byte{identity, nil}}}},
		&halliganv1.WitnessRequest{Message: &halliganv1.WitnessRequest_Stored{Stored: &halliganv1.WitnessStored{ActionId: "../x", Sha256: "y"}}}); err != nil {
		t.Error(err)
	}
	if s := node.ledger.State(); len(s.Witnessed) > 0 || s.Events != 5 || s.Problem+s.Refused != "" {
		t.Errorf("%+v", s)
	}
	// Signatures of others beside its own are not kept.
	mine := cosign("a.bastion", h.Lineage, h.Checkpoint)
	mine.GetCosigned().Checkpoint = countersigned(t, key, "c.bastion", mine.GetCosigned().GetCheckpoint())
	if err := say(has, mine); err != nil {
		t.Error(err)
	}
	if s := node.ledger.State(); len(s.Witnessed) != 1 || s.Witnessed[logkey.WitnessName("a.bastion")] != 5 {
		t.Errorf("%+v", s)
	}
	if kept := string(node.ledger.Heads()[0].Cosigned); strings.Contains(kept, "c.bastion") || !strings.Contains(kept, "a.bastion") {
		t.Errorf("%s", kept)
	}
	// A node, or a client of the fleet, is no bastion.
	s, err := connect("cp-2.prod").Witness(t.Context())
	if err == nil {
		_, err = s.Recv()
	}
	if err == nil {
		t.Error("a node may witness")
	}
}
