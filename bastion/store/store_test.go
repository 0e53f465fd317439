package store

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/fault"
)

// abandoned, as an argument, makes this program a bastion that is killed.
const abandoned = "abandoned-bastion"

func TestMain(m *testing.M) {
	Child()
	if len(os.Args) == 3 && os.Args[1] == abandoned {
		s, err := Open(Options{Bastion: "a", Dir: os.Args[2], Log: zerolog.Nop()})
		for err == nil {
			if s.Degraded() == "" {
				_, _ = fmt.Println(s.server.process())
			}
			time.Sleep(10 * time.Millisecond)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// open returns a store that ends with the test.
func open(t *testing.T, o Options) *Store {
	t.Helper()
	if o.Bastion == "" {
		o.Bastion = "a"
	}
	o.Log = zerolog.Nop()
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// folder returns one for an embedded store.
func folder(t *testing.T) string { return filepath.Join(t.TempDir(), "store") }

// shared returns options for the members of a cluster.
func shared(t *testing.T, c *etcdcluster.Cluster, bastion string) Options {
	t.Helper()
	o := Options{Bastion: bastion, CAFile: c.CAFile(), CertFile: c.CertFile(), KeyFile: c.KeyFile()}
	for _, e := range c.Endpoints() {
		o.Endpoints = append(o.Endpoints, netip.MustParseAddrPort(e))
	}
	return o
}

// eventually waits for what happens by itself.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for began := time.Now(); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > 60*time.Second {
			t.Fatal("waited too long for " + what)
		}
	}
}

func works(t *testing.T, s *Store) {
	t.Helper()
	eventually(t, "the store to work", func() bool { return s.Degraded() == "" })
}

// isDown waits until the store is, and checks that everything says so at once.
func isDown(t *testing.T, s *Store, why string) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("degraded at the end: " + s.Degraded())
		}
	})
	eventually(t, "the store to be down", func() bool { return strings.Contains(s.Degraded(), why) })
	began := time.Now()
	_, plans := s.Plans(t.Context(), "")
	post := s.PostPlan(t.Context(), "alice", plan(1))
	approve := s.PostApproval(t.Context(), "alice", plan(1).GetId(), "bob", "token")
	watch := s.WatchApprovals(t.Context(), "alice", plan(1).GetId(), nil)
	for _, err := range []error{plans, post, approve, watch} {
		if !fault.Is(err, fault.Unreachable) || !strings.Contains(err.Error(), "relaying goes on") || fault.Of(err).Error() != s.Degraded() {
			t.Errorf("while it is down: %v\nDegraded: %s", err, s.Degraded())
		}
	}
	leave := s.Enter(&halliganv1.Session{Person: "alice"})
	defer leave()
	if list, incomplete := s.Sessions(t.Context()); len(list) == 0 || incomplete == "" {
		t.Errorf("sessions: %v, %q", list, incomplete)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("that took %v", took)
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	at := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:2379")}
	for name, o := range map[string]Options{
		"nothing":          {},
		"a relative path":  {Dir: "store"},
		"no certificates":  {Endpoints: at},
		"no key":           {Endpoints: at, CAFile: "/ca", CertFile: "/cert"},
		"no port":          {Endpoints: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}, CAFile: "/ca", CertFile: "/cert", KeyFile: "/key"},
		"no address":       {Endpoints: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:1")}, CAFile: "/ca", CertFile: "/cert", KeyFile: "/key"},
		"the zero address": {Endpoints: make([]netip.AddrPort, 1), CAFile: "/ca", CertFile: "/cert", KeyFile: "/key"},
	} {
		if s, err := Open(o); !fault.Is(err, fault.Usage) {
			t.Errorf("%s: %v", name, err)
			s.Close()
		}
	}
	// Files may come later, as may the store.
	s := open(t, Options{Endpoints: at, CAFile: "/nowhere/ca", CertFile: "/nowhere/cert", KeyFile: "/nowhere/key"})
	isDown(t, s, "/nowhere/ca")
}

// TestEmbedded: what is in the store is there again after a restart.
func TestEmbedded(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	s := open(t, Options{Dir: dir})
	works(t, s)
	if err := s.PostPlan(t.Context(), "alice", plan(1)); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open(t, Options{Dir: dir})
	works(t, s)
	if x, err := s.Plan(t.Context(), "alice", plan(1).GetId()); err != nil || x.GetPlan().GetSummary() != plan(1).GetSummary() {
		t.Errorf("after a restart: %v, %v", x, err)
	}
	// Nobody else can talk to it.
	st, err := os.Stat(dir)
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

// TestKilled: the store is killed, and comes back by itself. It hangs, and calls
// end all the same.
func TestKilled(t *testing.T) {
	t.Parallel()
	s := open(t, Options{Dir: folder(t)})
	works(t, s)
	if err := s.PostPlan(t.Context(), "alice", plan(1)); err != nil {
		t.Fatal(err)
	}
	pid := s.server.process()
	must(t, syscall.Kill(pid, syscall.SIGKILL))
	eventually(t, "another process", func() bool { p := s.server.process(); return p != 0 && p != pid })
	works(t, s)
	if x, err := s.Plan(t.Context(), "alice", plan(1).GetId()); err != nil {
		t.Errorf("after the kill: %v, %v", x, err)
	}
	pid = s.server.process()
	must(t, syscall.Kill(pid, syscall.SIGSTOP))
	isDown(t, s, "it does not answer in time")
	must(t, syscall.Kill(pid, syscall.SIGCONT))
	works(t, s)
	if _, err := s.Plans(t.Context(), ""); err != nil {
		t.Error(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestAbandoned: the store's process ends with a bastion that is killed.
func TestAbandoned(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("/proc/self/exe", abandoned, folder(t))
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer cmd.Wait()
	var pid int
	line, err := bufio.NewReader(out).ReadString('\n')
	must(t, err)
	if _, err := fmt.Sscan(line, &pid); err != nil || pid == 0 {
		t.Fatalf("%q: %v", line, err)
	}
	must(t, cmd.Process.Kill())
	eventually(t, "the store's process to end", func() bool {
		state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(state), ") Z ")
	})
}

// TestFullDisk: a store without room is told of, with what to do, and mends.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	disk := t.TempDir()
	if err := unix.Mount("halligan-test", disk, "tmpfs", 0, "size=64m,mode=0700"); err != nil {
		t.Fatalf("mounting a tmpfs (the tests run as root): %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(disk, unix.MNT_DETACH)) })
	ballast := func(size int) error { return os.WriteFile(filepath.Join(disk, "ballast"), make([]byte, size), 0o600) }

	// From the start.
	_ = ballast(64 << 20)
	s := open(t, Options{Dir: filepath.Join(disk, "store")})
	isDown(t, s, "no space left on device")
	if !strings.Contains(s.Degraded(), "make room on the disk of "+disk) {
		t.Error(s.Degraded())
	}
	must(t, os.Remove(filepath.Join(disk, "ballast")))
	works(t, s)

	// While it runs.
	_ = ballast(64 << 20)
	fill := plan(0)
	fill.Summary = strings.Repeat("x", maxPlan/2)
	var err error
	// A slow machine may refuse one before the disk is full.
	for i := 0; i < maxPlans && !strings.Contains(s.Degraded(), "no space left on device"); i++ {
		fill.Id = plan(i).GetId()
		if err = s.PostPlan(t.Context(), fmt.Sprint("p", i), fill); err != nil && !fault.Is(err, fault.Unreachable) {
			t.Fatalf("writing to a full disk: %v", err)
		} else if err != nil {
			time.Sleep(50 * time.Millisecond)
		}
	}
	if err == nil {
		t.Fatal("a full disk took everything")
	}
	isDown(t, s, "no space left on device")
	must(t, os.Remove(filepath.Join(disk, "ballast")))
	works(t, s)
	if x, err := s.Plan(t.Context(), "p0", plan(0).GetId()); err != nil || len(x.GetPlan().GetSummary()) != maxPlan/2 {
		t.Errorf("what was stored before: %v", err)
	}
}

// TestDamaged: a store whose files are damaged is told of, with what to do.
func TestDamaged(t *testing.T) {
	t.Parallel()
	zero := func(t *testing.T, pattern string) {
		t.Helper()
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatal(pattern, err)
		}
		for _, f := range files {
			st, err := os.Stat(f)
			must(t, err)
			must(t, os.WriteFile(f, []byte(strings.Repeat("\xa5", int(min(st.Size(), 64<<10)))), 0o600))
		}
	}
	for name, damage := range map[string]func(*testing.T, string){
		"database": func(t *testing.T, data string) { zero(t, filepath.Join(data, "member/snap/db")) },
		"log":      func(t *testing.T, data string) { zero(t, filepath.Join(data, "member/wal/*.wal")) },
		"a file where the folder was": func(t *testing.T, data string) {
			must(t, os.RemoveAll(data))
			must(t, os.WriteFile(data, nil, 0o600))
		},
		"others may look": func(t *testing.T, data string) { must(t, os.Chmod(data, 0o755)) },
		"short database": func(t *testing.T, data string) {
			must(t, os.Truncate(filepath.Join(data, "member/snap/db"), 5000))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := folder(t)
			data := filepath.Join(dir, "data")
			s := open(t, Options{Dir: dir})
			works(t, s)
			must(t, s.PostPlan(t.Context(), "alice", plan(1)))
			s.Close()
			damage(t, data)
			s = open(t, Options{Dir: dir})
			isDown(t, s, "move "+data+" away")
			if strings.Contains(s.Degraded(), "not answered yet") {
				t.Error(s.Degraded())
			}
			must(t, os.Rename(data, data+".old"))
			works(t, s)
		})
	}
}

// TestFullDatabase: a store at its quota is told of, and makes room by itself.
func TestFullDatabase(t *testing.T) {
	t.Parallel()
	s := open(t, Options{Dir: folder(t)})
	works(t, s)
	c := s.client.Load()
	must(t, s.PostPlan(t.Context(), "alice", plan(1)))
	// The alarm is what a full database raises.
	st, err := c.Status(t.Context(), c.Endpoints()[0])
	must(t, err)
	_, err = c.Put(t.Context(), root+"x", "x")
	must(t, err)
	raise(t, c, st.Header.MemberId)
	if err := s.PostPlan(t.Context(), "alice", plan(2)); !fault.Is(err, fault.NoSpace) {
		t.Errorf("a full store took a plan: %v", err)
	}
	eventually(t, "room", func() bool { return s.PostPlan(t.Context(), "alice", plan(2)) == nil })
	if list, err := s.Plans(t.Context(), "alice"); err != nil || len(list) != 2 {
		t.Errorf("%v, %v", list, err)
	}
}

// TestShared: two bastions share an etcd of three members.
func TestShared(t *testing.T) {
	t.Parallel()
	c := etcdcluster.ForTest(t, 3)
	a, b := open(t, shared(t, c, "a")), open(t, shared(t, c, "b"))
	works(t, a)
	works(t, b)
	leave := a.Enter(&halliganv1.Session{Person: "alice", Target: "cp-1.prod"})
	b.Enter(&halliganv1.Session{Person: "bob"})
	people := func(s *Store) string {
		list, incomplete := s.Sessions(t.Context())
		names := ""
		for _, x := range list {
			names += x.GetPerson() + "@" + x.GetBastion() + " "
		}
		return names + incomplete
	}
	sees := func(s *Store, want ...string) func() bool {
		return func() bool {
			got := people(s)
			for _, w := range want {
				got = strings.Replace(got, w+" ", "", 1)
			}
			return got == ""
		}
	}
	eventually(t, "both to see both", func() bool { return sees(a, "alice@a", "bob@b")() && sees(b, "alice@a", "bob@b")() })

	events, ended := make(chan *halliganv1.WatchPlanEvent), make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	must(t, a.PostPlan(t.Context(), "alice", plan(1)))
	go func() {
		ended <- a.WatchApprovals(ctx, "alice", plan(1).GetId(), func(e *halliganv1.WatchPlanEvent) error { events <- e; return nil })
	}()
	must(t, b.PostApproval(t.Context(), "alice", plan(1).GetId(), "bob", "token 1"))
	if e := <-events; e.GetApprover() != "bob" || e.GetApproval() != "token 1" {
		t.Errorf("%v", e)
	}

	// One member is lost: all goes on, and that is said.
	c.Stop(0)
	eventually(t, "the loss to be told", func() bool {
		return strings.Contains(a.Degraded(), "works, but without its members "+c.Endpoints()[0])
	})
	eventually(t, "a plan to be taken", func() bool { return b.PostPlan(t.Context(), "bob", plan(2)) == nil })
	must(t, b.PostApproval(t.Context(), "alice", plan(1).GetId(), "carol", "token 2"))
	if e := <-events; e.GetApprover() != "carol" {
		t.Errorf("%v", e)
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("a watch ended well that was given up")
	}

	// The quorum is lost.
	lead := c.Leader()
	c.Stop(lead)
	isDown(t, a, "mend the etcd that store.endpoints names")
	isDown(t, b, "the bastion's store does not work")
	leave()
	must(t, c.StartMember(0))
	must(t, c.Restart(t.Context(), lead))
	works(t, a)
	works(t, b)
	if x, err := b.Plan(t.Context(), "alice", plan(1).GetId()); err != nil || len(x.GetApprovers()) != 2 {
		t.Errorf("%v, %v", x, err)
	}
	eventually(t, "b to see that alice has left", sees(b, "bob@b"))
	a.Enter(&halliganv1.Session{Person: "dave"})
	eventually(t, "b to see dave", sees(b, "bob@b", "dave@a"))
	a.Close()
	eventually(t, "b to see that a has gone", sees(b, "bob@b"))
}

// TestSilentMember: a member that no longer says anything, as behind a broken
// network, costs no more than a moment.
func TestSilentMember(t *testing.T) {
	t.Parallel()
	c := etcdcluster.ForTest(t, 3)
	o := shared(t, c, "a")
	var broken atomic.Bool
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	to := o.Endpoints[0].String()
	o.Endpoints[0] = netip.MustParseAddrPort(l.Addr().String())
	pipe := func(from, to net.Conn) {
		defer to.Close()
		buffer := make([]byte, 32<<10)
		for {
			n, err := from.Read(buffer)
			if err != nil {
				return
			}
			if !broken.Load() {
				_, _ = to.Write(buffer[:n])
			}
		}
	}
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				near.Close()
				continue
			}
			go pipe(near, far)
			go pipe(far, near)
		}
	}()
	s := open(t, o)
	works(t, s)
	must(t, s.PostPlan(t.Context(), "alice", plan(1)))
	broken.Store(true)
	for range 4 {
		began := time.Now()
		_, err := s.Plans(t.Context(), "")
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("a call took %v: %v", took, err)
		}
	}
	eventually(t, "the member to be named", func() bool {
		return strings.Contains(s.Degraded(), "works, but without its members "+l.Addr().String())
	})
	eventually(t, "calls to be answered", func() bool { return s.PostPlan(t.Context(), "alice", plan(2)) == nil })
}

// TestHostileStore: whoever writes into the store cannot make more of it than
// lies about sessions, and those within bounds.
func TestHostileStore(t *testing.T) {
	t.Parallel()
	s := open(t, Options{Dir: folder(t)})
	works(t, s)
	c := s.client.Load()
	must(t, s.PostPlan(t.Context(), "alice", plan(1)))
	at := "alice/" + plan(1).GetId()
	put := func(key, value string) {
		t.Helper()
		_, err := c.Put(t.Context(), key, value)
		must(t, err)
	}
	put(sessions+"a/1", "of this very bastion")
	put(sessions+"b/1", "\xff\xff")
	put(sessions+"b/2", marshal(t, &halliganv1.Session{Id: "2", Bastion: "c", Person: "as another bastion's"}))
	put(sessions+"b/3", marshal(t, &halliganv1.Session{Id: "3", Bastion: "b", Person: "eve\x1b[2J" + strings.Repeat("x", 10_000)}))
	list, _ := s.Sessions(t.Context())
	if len(list) != 1 || strings.Contains(list[0].GetPerson(), "\x1b") || len(list[0].GetPerson()) > 2*maxText {
		t.Errorf("%v", list)
	}
	// Times that no client could print.
	never := &timestamppb.Timestamp{Seconds: 1 << 60, Nanos: -1}
	put(sessions+"b/4", marshal(t, &halliganv1.Session{Id: "4", Bastion: "b", Started: never}))
	put(heads+"eve/late", marshal(t, &halliganv1.WaitingPlan{Requester: "eve", PlanId: "late", Expires: never}))
	put(heads+"eve/early", marshal(t, &halliganv1.WaitingPlan{Requester: "eve", PlanId: "early", Posted: never}))
	unknown := append([]byte(marshal(t, &halliganv1.Session{Id: "5", Bastion: "b"})), 0xfa, 0x3f, 3, 'e', 'v', 'e') // field 1023
	put(sessions+"b/5", string(unknown))
	list, _ = s.Sessions(t.Context())
	if i := slices.IndexFunc(list, func(x *halliganv1.Session) bool { return x.GetId() == "5" }); len(list) != 2 || i < 0 || len(list[i].ProtoReflect().GetUnknown()) > 0 {
		t.Errorf("%v", list)
	}
	put(heads+"eve/"+plan(1).GetId(), marshal(t, &halliganv1.WaitingPlan{Requester: "alice", PlanId: plan(1).GetId()}))
	put(heads+"eve/x", "\xff")
	put(tokens+at+"/bob/1", strings.Repeat("x", 100<<10))
	put(tokens+at+"/bob/2", "\xff\xfe")
	put(tokens+"garbage", "")
	plans, err := s.Plans(t.Context(), "")
	if err != nil || len(plans) != 1 || plans[0].GetRequester() != "alice" || len(plans[0].GetApprovers()) != 1 {
		t.Errorf("%v, %v", plans, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var got []string
	_ = s.WatchApprovals(ctx, "alice", plan(1).GetId(), func(e *halliganv1.WatchPlanEvent) error {
		got = append(got, e.GetApproval())
		cancel()
		return nil
	})
	if len(got) != 1 || got[0] != "" {
		t.Errorf("%q", got)
	}
	if err := s.call(t.Context(), func(context.Context, *clientv3.Client) error { panic("what is this") }); !fault.Is(err, fault.Failed) || s.Degraded() != "" {
		t.Errorf("what this program cannot take: %v, %s", err, s.Degraded())
	}
	put(bodies+at, marshal(t, &halliganv1.Plan{Id: "another"}))
	if _, err := s.Plan(t.Context(), "alice", plan(1).GetId()); !fault.Is(err, fault.Undecodable) {
		t.Errorf("another plan in its place: %v", err)
	}
	for i := range 12 { // more than an answer may have
		put(fmt.Sprint(heads, "flood/", i), strings.Repeat("x", 1<<20))
	}
	if _, err := s.Plans(t.Context(), ""); !fault.Is(err, fault.TooLarge) {
		t.Errorf("an answer over the limit: %v", err)
	}
	if why := s.Degraded(); why != "" {
		t.Errorf("the rest does not work either: %s", why)
	}
	_, err = c.Delete(t.Context(), heads, clientv3.WithPrefix())
	must(t, err)
	works(t, s)
}
