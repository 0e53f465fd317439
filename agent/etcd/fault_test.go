package etcd

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/fault"
)

// relay stands between client and etcd and breaks connections at chosen
// moments. It sees ciphertext, so a moment is one in the stream of bytes.
type relay struct {
	ln     net.Listener
	target string
	wg     sync.WaitGroup

	mu    sync.Mutex // guards what follows
	mode  mode
	thaw  chan struct{} // closed when what is frozen goes on
	conns map[net.Conn]bool
	cuts  int
}

type mode int

const (
	pass     mode = iota
	noAnswer      // cut on the first bytes of the server: the request was sent, the answer is lost
	noEffect      // cut on the first bytes of the client: the request is lost
	freeze        // hold what the client sends until thaw
)

func newRelay(t *testing.T, target string) *relay {
	t.Helper()
	r := &relay{ln: must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0")), target: target, conns: map[net.Conn]bool{}}
	r.wg.Go(func() {
		for {
			in, err := r.ln.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			r.mu.Lock()
			r.conns[in], r.conns[out] = true, true
			r.mu.Unlock()
			r.wg.Go(func() { r.copy(out, in, noEffect) })
			r.wg.Go(func() { r.copy(in, out, noAnswer) })
		}
	})
	t.Cleanup(func() {
		r.set(pass)
		r.ln.Close()
		r.mu.Lock()
		for c := range r.conns {
			c.Close()
		}
		r.mu.Unlock()
		r.wg.Wait()
	})
	return r
}

func (r *relay) addr() string { return r.ln.Addr().String() }

// set changes the mode. Cuts happen once and return to pass.
func (r *relay) set(m mode) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mode == freeze && m != freeze {
		close(r.thaw)
	}
	if m == freeze && r.mode != freeze {
		r.thaw = make(chan struct{})
	}
	r.mode = m
}

func (r *relay) copy(dst, src net.Conn, cut mode) {
	defer dst.Close()
	defer src.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		if err != nil {
			return
		}
		r.mu.Lock()
		m, thaw := r.mode, r.thaw
		if m == cut {
			r.mode = pass
			r.cuts++
		}
		r.mu.Unlock()
		if m == cut {
			return
		}
		if m == freeze && cut == noEffect {
			<-thaw
		}
		if _, err := dst.Write(buf[:n]); err != nil {
			return
		}
	}
}

// TestExactlyOnceThroughCuts writes through connections that break after the
// request went out, or before. A committed counter that is raised by one in
// each write shows a write that is lost or doubled.
func TestExactlyOnceThroughCuts(t *testing.T) {
	t.Parallel()
	cluster := etcdcluster.ForTest(t, 1)
	r := newRelay(t, cluster.Endpoints()[0])
	c := openWith(t, cluster, Config{Endpoints: []string{r.addr()}, RequestTimeout: 2 * time.Second})
	eye, ctx := raw(t, cluster), bound(t, 60*time.Second)
	rev, err := c.Commit(ctx, granted(), Write{Key: "/n", Value: []byte("0")})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 60 {
		r.set([]mode{noAnswer, noEffect, pass}[i%3])
		next, err := c.Commit(ctx, granted(), Write{Key: "/n", ModRevision: rev, Value: fmt.Append(nil, i+1)})
		if err != nil {
			t.Fatalf("write %d: %v", i, err)
		}
		kv := must[*clientv3.GetResponse](t)(eye.Get(ctx, "/n")).Kvs[0]
		if kv.ModRevision != next || kv.Version != int64(i+2) || string(kv.Value) != fmt.Sprint(i+1) {
			t.Fatalf("write %d said revision %d, but version %d is at %d", i, next, kv.Version, kv.ModRevision)
		}
		rev = next
	}
	if r.cuts < 20 {
		t.Errorf("only %d cuts", r.cuts)
	}
	for i := range 12 { // creates and deletes
		key := fmt.Sprintf("/c/%d", i)
		r.set([]mode{noAnswer, noEffect}[i%2])
		made, err := c.Commit(ctx, granted(), Write{Key: key, Value: []byte("v"), Since: rev})
		if err != nil {
			t.Fatal(err)
		}
		kv := must[*clientv3.GetResponse](t)(eye.Get(ctx, key)).Kvs[0]
		if kv.CreateRevision != made || kv.Version != 1 {
			t.Fatalf("create said %d: %v", made, kv)
		}
		r.set([]mode{noAnswer, noEffect}[i/2%2])
		if _, err := c.Commit(ctx, granted(), Write{Key: key, ModRevision: made}); err != nil {
			t.Fatal(err)
		}
		if n := must[*clientv3.GetResponse](t)(eye.Get(ctx, key)).Count; n != 0 {
			t.Fatal("still there")
		}
	}
	// A reader does not notice.
	for i := range 9 {
		r.set([]mode{noAnswer, noEffect, pass}[i%3])
		if kv, found, view, err := c.Get(ctx, "/n"); err != nil || !found || kv.ModRevision != rev || view.Stale != "" {
			t.Fatal(kv, found, view, err)
		}
	}
}

// TestWalkThroughCuts: a walk goes on where it was, at the same revision.
func TestWalkThroughCuts(t *testing.T) {
	t.Parallel()
	cluster := etcdcluster.ForTest(t, 1)
	r := newRelay(t, cluster.Endpoints()[0])
	c, eye, ctx := open(t, cluster, r.addr()), raw(t, cluster), bound(t, 60*time.Second)
	for i := range 400 {
		must[*clientv3.PutResponse](t)(eye.Put(ctx, fmt.Sprintf("/w/%05d", i), string(make([]byte, 10_000))))
	}
	for _, paged := range []bool{false, true} {
		c.noStream.Store(paged)
		n := 0
		view, err := c.Walk(ctx, "/w/", func(kv KV) error {
			if want := fmt.Sprintf("/w/%05d", n); kv.Key != want {
				return fmt.Errorf("%s, want %s", kv.Key, want)
			}
			if n%150 == 20 {
				r.set(noAnswer)
				if _, err := eye.Delete(ctx, "/w/00390"); err != nil {
					return err
				}
			}
			n++
			return nil
		})
		if err != nil || n != 400 || view.Stale != "" {
			t.Fatalf("paged %v: %d keys, %v, %v", paged, n, view, err)
		}
		must[*clientv3.PutResponse](t)(eye.Put(ctx, "/w/00390", string(make([]byte, 10_000))))
	}
	if r.cuts < 2 {
		t.Errorf("only %d cuts", r.cuts)
	}
}

// TestLateProposal is the hard case: the request is stuck on the way to a
// member while the client has given up on it, and arrives later.
func TestLateProposal(t *testing.T) {
	t.Parallel()
	cluster := etcdcluster.ForTest(t, 1)
	direct := cluster.Endpoints()[0]
	eye, ctx := raw(t, cluster), bound(t, 90*time.Second)

	t.Run("one way", func(t *testing.T) {
		// Everything is stuck: the answer is that it is not known, and what
		// arrives later is what Settle then finds.
		r := newRelay(t, direct)
		c := openWith(t, cluster, Config{Endpoints: []string{r.addr()}, RequestTimeout: time.Second})
		rev, err := c.Commit(ctx, granted(), Write{Key: "/one", Value: []byte("old")})
		if err != nil {
			t.Fatal(err)
		}
		w := Write{Key: "/one", ModRevision: rev, Value: []byte("new")}
		r.set(freeze)
		_, err = c.Commit(ctx, granted(), w)
		wantFault(t, err, fault.Unknown, "history")
		if fate, _, err := c.Settle(ctx, w.Expect()); fate != Undetermined || err == nil {
			t.Fatal("nobody can know yet:", fate, err)
		}
		r.set(pass)
		fate, at, err := settled(ctx, c, w.Expect())
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
		kv := must[*clientv3.GetResponse](t)(eye.Get(ctx, "/one")).Kvs[0]
		if landed := kv.Version == 2; landed != (fate == Done) || landed && kv.ModRevision != at || kv.Version > 2 {
			t.Fatalf("settled as %v at %d, but version %d is at %d", fate, at, kv.Version, kv.ModRevision)
		}
	})

	t.Run("another way", func(t *testing.T) {
		// The repetition goes past the stuck copy, which then comes too late.
		r := newRelay(t, direct)
		c := openWith(t, cluster, Config{Endpoints: []string{r.addr(), direct}, RequestTimeout: 2 * time.Second})
		rev, version := int64(0), int64(0)
		for i := 0; i < 8; i++ {
			c.Get(ctx, "/two") // both connections up
			r.set(freeze)
			w := Write{Key: "/two", ModRevision: rev, Value: fmt.Append(nil, i), Since: rev}
			next, err := c.Commit(ctx, granted(), w)
			r.set(pass)
			// What is still on its way is beyond Settle, as its comment says.
			time.Sleep(50 * time.Millisecond)
			if fault.Is(err, fault.Unknown) {
				fate, at, serr := settled(ctx, c, w.Expect())
				if serr != nil {
					t.Fatal(serr)
				}
				if err = nil; fate == NotDone {
					next = 0
				} else {
					next = at
				}
			}
			if err != nil {
				t.Fatal(i, err)
			}
			if next != 0 {
				rev, version = next, version+1
			}
			got := must[*clientv3.GetResponse](t)(eye.Get(ctx, "/two"))
			if version == 0 && got.Count == 0 {
				continue
			}
			if kv := got.Kvs[0]; kv.ModRevision != rev || kv.Version != version {
				t.Fatalf("write %d said %d (version %d), but version %d is at %d", i, rev, version, kv.Version, kv.ModRevision)
			}
		}
	})
}

// settled asks until there is an answer.
func settled(ctx context.Context, c *Client, e Expect) (fate Fate, at int64, err error) {
	for range 20 {
		if fate, at, err = c.Settle(ctx, e); fate != Undetermined {
			return fate, at, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fate, at, err
}

// TestMembersFail: the leader goes away in the middle of writes, then the
// quorum.
func TestMembersFail(t *testing.T) {
	t.Parallel()
	cluster := etcdcluster.ForTest(t, 3)
	ctx := bound(t, 120*time.Second)

	t.Run("leader", func(t *testing.T) {
		// As an agent has it: one member, its own.
		own := (cluster.Leader() + 1) % 3
		c := open(t, cluster, cluster.Endpoints()[own])
		eye := raw(t, cluster, own)
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for n := range 4 {
			key := fmt.Sprintf("/leader/%d", n)
			wg.Go(func() {
				rev, version := int64(0), int64(0)
				defer func() {
					got, err := eye.Get(ctx, key)
					if err != nil {
						t.Error(err)
						return
					}
					if len(got.Kvs) != 1 || got.Kvs[0].Version != version || got.Kvs[0].ModRevision != rev {
						t.Errorf("%s: counted %d writes, the last at %d; etcd has %v", key, version, rev, got.Kvs)
					}
					t.Logf("%s: %d writes", key, version)
				}()
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					case <-time.After(rand.N(10 * time.Millisecond)):
					}
					w := Write{Key: key, ModRevision: rev, Value: fmt.Appendf(nil, "%d of %d", i, n), Since: rev}
					next, err := c.Commit(ctx, granted(), w)
					if fault.Is(err, fault.Unknown) {
						var fate Fate
						if fate, next, err = settled(ctx, c, w.Expect()); fate == NotDone {
							continue
						}
					}
					if fault.Is(err, fault.NoQuorum) {
						continue
					}
					if err != nil {
						t.Errorf("%s: %v", key, err)
						return
					}
					rev, version = next, version+1
				}
			})
		}
		time.Sleep(300 * time.Millisecond)
		lead := cluster.Leader()
		cluster.Stop(lead)
		for range 100 {
			if l := cluster.Leader(); l >= 0 && l != lead {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(time.Second)
		close(stop)
		wg.Wait()
		if err := cluster.Restart(ctx, lead); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("quorum", func(t *testing.T) {
		// The one that stays is the leader, whose log keeps what it could not
		// commit.
		own := cluster.Leader()
		c := openWith(t, cluster, Config{Endpoints: cluster.Endpoints()[own : own+1], RequestTimeout: 2 * time.Second})
		rev, err := c.Commit(ctx, granted(), Write{Key: "/q", Value: []byte("before")})
		if err != nil {
			t.Fatal(err)
		}
		// Writes go on while the others stop, until one fails.
		var first Write
		var firstErr error
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 0; firstErr == nil; i++ {
				first = Write{Key: "/q", ModRevision: rev, Value: fmt.Append(nil, i)}
				var next int64
				if next, firstErr = c.Commit(ctx, granted(), first); firstErr == nil {
					rev = next
				}
			}
		})
		for i := range 3 {
			if i != own {
				cluster.Stop(i)
			}
		}
		wg.Wait()
		if !fault.Is(firstErr, fault.Unknown) && !fault.Is(firstErr, fault.NoQuorum) {
			t.Fatal(firstErr)
		}
		t.Log("at once:", firstErr)
		began := time.Now()
		for i := range 50 {
			kv, found, view, err := c.Get(ctx, "/q")
			if err != nil || !found || view.Stale == "" || kv.ModRevision != rev {
				t.Fatal(i, kv, found, view, err)
			}
		}
		if d := time.Since(began); d > 10*time.Second {
			t.Errorf("50 reads took %v", d)
		}
		n := 0
		if view, err := c.Walk(ctx, "/", func(KV) error { n++; return nil }); err != nil || view.Stale == "" || n == 0 {
			t.Error(n, view, err)
		}
		if n, view, err := c.Count(ctx, "/q"); err != nil || n != 1 || view.Stale == "" {
			t.Error(n, view, err)
		}
		began = time.Now()
		second := Write{Key: "/q2", Value: []byte("second"), Since: rev}
		_, err = c.Commit(ctx, granted(), second)
		wantFault(t, err, fault.NoQuorum, "no leader", "only reads work")
		if d := time.Since(began); d > 15*time.Second {
			t.Errorf("a refusal took %v", d)
		}
		if fate, _, err := c.Settle(ctx, first.Expect()); fate != Undetermined || !fault.Is(err, fault.NoQuorum) {
			t.Error(fate, err)
		}
		if st := c.Status(ctx); st.Err != nil || st.Quorum || st.LeaderID != 0 || len(st.Members) != 3 || st.Version == "" {
			t.Errorf("%+v", st)
		}
		for i := range 3 {
			if i != own {
				if err := cluster.StartMember(i); err != nil {
					t.Fatal(err)
				}
			}
		}
		fate, at, err := settled(ctx, c, first.Expect())
		if err != nil {
			t.Fatal(err)
		}
		t.Log("later:", fate, at)
		if fate == Done && fault.Is(firstErr, fault.NoQuorum) {
			t.Error("reported as not done, and done after all")
		}
		time.Sleep(300 * time.Millisecond)
		eye := raw(t, cluster)
		kv := must[*clientv3.GetResponse](t)(eye.Get(ctx, "/q")).Kvs[0]
		if landed := kv.ModRevision != rev; landed != (fate == Done) || landed && kv.ModRevision != at {
			t.Errorf("settled as %v at %d; etcd has version %d at %d", fate, at, kv.Version, kv.ModRevision)
		}
		if n := must[*clientv3.GetResponse](t)(eye.Get(ctx, "/q2")).Count; n != 0 {
			t.Error("refused for want of a quorum, and done after all")
		}
		// Reads are whole again by themselves.
		for range 100 {
			if _, _, view, err := c.Get(ctx, "/q"); err == nil && view.Stale == "" {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Error("reads stay stale")
	})
}
