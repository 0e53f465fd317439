package etcd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/labpki"
)

// open returns a client of the endpoints, of the first member without any.
func open(t *testing.T, c *etcdcluster.Cluster, endpoints ...string) *Client {
	t.Helper()
	return openWith(t, c, Config{Endpoints: endpoints})
}

func openWith(t *testing.T, c *etcdcluster.Cluster, cfg Config) *Client {
	t.Helper()
	if len(cfg.Endpoints) == 0 {
		cfg.Endpoints = c.Endpoints()[:1]
	}
	cfg.CAFile, cfg.CertFile, cfg.KeyFile = c.CAFile(), c.CertFile(), c.KeyFile()
	cl, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cl.Close(); err != nil {
			t.Error(err)
		}
	})
	return cl
}

// raw is the independent eye.
func raw(t *testing.T, c *etcdcluster.Cluster, members ...int) *clientv3.Client {
	t.Helper()
	cl, err := c.Client(members...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cl.Close() })
	return cl
}

func bound(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func wantFault(t *testing.T, err error, code fault.Code, words ...string) {
	t.Helper()
	if fault.CodeOf(err) != code {
		t.Fatalf("got %q error %v, want %q", fault.CodeOf(err), err, code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
	if strings.ContainsAny(err.Error(), "\n\x1b") {
		t.Errorf("%q is not one plain line", err)
	}
}

func TestCompareAndSwap(t *testing.T) {
	t.Parallel()
	cluster := etcdcluster.ForTest(t, 1)
	c, eye, ctx := open(t, cluster), raw(t, cluster), bound(t, 30*time.Second)
	get := func(key string) (KV, bool) {
		t.Helper()
		kv, found, view, err := c.Get(ctx, key)
		if err != nil || view.Stale != "" {
			t.Fatal(err, view.Stale)
		}
		return kv, found
	}

	r1, err := c.Commit(ctx, granted(), Write{Key: "/k", Value: []byte("one")})
	if err != nil {
		t.Fatal(err)
	}
	kv, found := get("/k")
	if !found || string(kv.Value) != "one" || kv.ModRevision != r1 || kv.CreateRevision != r1 || kv.Version != 1 {
		t.Fatalf("created %+v at %d", kv, r1)
	}
	_, err = c.Commit(ctx, granted(), Write{Key: "/k", Value: []byte("again")})
	wantFault(t, err, fault.Stale, "exists already", fmt.Sprint(r1))

	r2, err := c.Commit(ctx, granted(), Write{Key: "/k", ModRevision: r1, Value: []byte("two")})
	if err != nil || r2 <= r1 {
		t.Fatal(r2, err)
	}
	_, err = c.Commit(ctx, granted(), Write{Key: "/k", ModRevision: r1, Value: []byte("three")})
	wantFault(t, err, fault.Stale, "changed at revision", fmt.Sprint(r2))
	_, err = c.Commit(ctx, granted(), Write{Key: "/k", ModRevision: r1})
	wantFault(t, err, fault.Stale, "deleting /k")
	if kv, _ := get("/k"); string(kv.Value) != "two" || kv.Version != 2 {
		t.Fatalf("a refused write changed it: %+v", kv)
	}
	r3, err := c.Commit(ctx, granted(), Write{Key: "/k", ModRevision: r2, Value: []byte{}})
	if err != nil {
		t.Fatal(err)
	}
	if kv, found := get("/k"); !found || len(kv.Value) != 0 {
		t.Fatalf("an empty value is a value: %+v %v", kv, found)
	}
	if _, err := c.Commit(ctx, granted(), Write{Key: "/k", ModRevision: r3}); err != nil {
		t.Fatal(err)
	}
	if _, found := get("/k"); found {
		t.Fatal("still there")
	}
	_, err = c.Commit(ctx, granted(), Write{Key: "/k", ModRevision: r3})
	wantFault(t, err, fault.Stale, "gone")
	_, err = c.Commit(ctx, granted(), Write{Key: "/k"})
	wantFault(t, err, fault.Usage)
	_, err = c.Commit(ctx, granted(), Write{Value: []byte("x")})
	wantFault(t, err, fault.Usage)

	// Only the key itself, never one that it is a prefix of.
	must[*clientv3.PutResponse](t)(eye.Put(ctx, "/p/a", "1"))
	p := must[*clientv3.PutResponse](t)(eye.Put(ctx, "/p", "1"))
	if _, err := c.Commit(ctx, granted(), Write{Key: "/p", ModRevision: p.Header.Revision}); err != nil {
		t.Fatal(err)
	}
	if n, _, err := c.Count(ctx, "/p"); err != nil || n != 1 {
		t.Fatal(n, err)
	}

	t.Run("lease", func(t *testing.T) {
		l := must[*clientv3.LeaseGrantResponse](t)(eye.Grant(ctx, 600))
		rev, err := c.Commit(ctx, granted(), Write{Key: "/leased", Value: []byte("a"), Lease: int64(l.ID)})
		if err != nil {
			t.Fatal(err)
		}
		rev, err = c.Commit(ctx, granted(), Write{Key: "/leased", ModRevision: rev, Value: []byte("b"), KeepLease: true})
		if err != nil {
			t.Fatal(err)
		}
		if kv, _ := get("/leased"); kv.Lease != int64(l.ID) {
			t.Fatalf("the lease was lost: %+v", kv)
		}
		if alive, err := c.LeaseAlive(ctx, int64(l.ID)); err != nil || !alive {
			t.Fatal(alive, err)
		}
		must[*clientv3.LeaseRevokeResponse](t)(eye.Revoke(ctx, l.ID))
		if alive, err := c.LeaseAlive(ctx, int64(l.ID)); err != nil || alive {
			t.Fatal(alive, err)
		}
		_, err = c.Commit(ctx, granted(), Write{Key: "/leased", ModRevision: rev, Value: []byte("c"), KeepLease: true})
		wantFault(t, err, fault.Stale, "gone")
		_, err = c.Commit(ctx, granted(), Write{Key: "/leased", Value: []byte("c"), Lease: int64(l.ID)})
		wantFault(t, err, fault.Failed, "lease not found")
		if _, found := get("/leased"); found {
			t.Fatal("written without its lease")
		}
	})

	t.Run("size", func(t *testing.T) {
		big := bytes.Repeat([]byte("x"), 1536*1024-256)
		rev, err := c.Commit(ctx, granted(), Write{Key: "/big", Value: big})
		if err != nil {
			t.Fatal(err)
		}
		if kv, _ := get("/big"); !bytes.Equal(kv.Value, big) {
			t.Fatal("not the same")
		}
		for _, size := range []int{1536 * 1024, 3 << 20} { // refused by etcd, and by its gRPC server
			_, err = c.Commit(ctx, granted(), Write{Key: "/big", ModRevision: rev, Value: make([]byte, size)})
			wantFault(t, err, fault.TooLarge)
		}
		if _, err := c.Commit(ctx, granted(), Write{Key: "/big", ModRevision: rev}); err != nil {
			t.Fatal("a large object can be deleted:", err)
		}
	})

	t.Run("concurrent", func(t *testing.T) {
		rev, err := c.Commit(ctx, granted(), Write{Key: "/race", Value: []byte("0")})
		if err != nil {
			t.Fatal(err)
		}
		errs := make(chan error)
		for i := range 8 {
			go func() {
				_, err := c.Commit(ctx, granted(), Write{Key: "/race", ModRevision: rev, Value: fmt.Append(nil, i)})
				errs <- err
			}()
		}
		won := 0
		for range 8 {
			if err := <-errs; err == nil {
				won++
			} else {
				wantFault(t, err, fault.Stale)
			}
		}
		if kv, _ := get("/race"); won != 1 || kv.Version != 2 {
			t.Fatalf("%d won, version %d", won, kv.Version)
		}
	})

	t.Run("status", func(t *testing.T) {
		st := c.Status(ctx)
		r := must[*clientv3.StatusResponse](t)(eye.Status(ctx, cluster.Endpoints()[0]))
		if st.Err != nil || !st.Quorum || st.Endpoint != cluster.Endpoints()[0] || st.MemberID != r.Header.MemberId ||
			st.LeaderID != r.Leader || st.Revision == 0 || st.DBSize == 0 || st.DBQuota == 0 || len(st.Alarms) != 0 ||
			len(st.Members) != 1 || st.Members[0].Name != "m1" || len(st.Members[0].ClientURLs) == 0 || st.Latency <= 0 {
			t.Errorf("%+v", st)
		}
		if id, err := c.ClusterID(ctx); err != nil || id != fmt.Sprintf("%x", r.Header.ClusterId) {
			t.Error(id, err)
		}
	})
}

func TestWalk(t *testing.T) {
	t.Parallel()
	cluster := etcdcluster.ForTest(t, 1)
	eye, ctx := raw(t, cluster), bound(t, 60*time.Second)
	streamed := open(t, cluster)
	paged := openWith(t, cluster, Config{ReadChunk: 16 << 10})
	paged.noStream.Store(true)

	const keys = 1200
	for from := 0; from < keys; from += 100 {
		var ops []clientv3.Op
		for i := from; i < from+100; i++ {
			ops = append(ops, clientv3.OpPut(fmt.Sprintf("/w/%05d", i), strings.Repeat("v", i*37%3000)))
		}
		must[*clientv3.TxnResponse](t)(eye.Txn(ctx).Then(ops...).Commit())
	}
	must[*clientv3.PutResponse](t)(eye.Put(ctx, "/w0", "not below /w/"))
	must[*clientv3.PutResponse](t)(eye.Put(ctx, "/v", "neither"))

	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // writers all the while
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			key := fmt.Sprintf("/w/%05d", i*7919%(keys+50))
			if i%3 == 0 {
				eye.Delete(ctx, key)
			} else {
				eye.Put(ctx, key, fmt.Sprint("changed ", i))
			}
		}
	}()
	for name, c := range map[string]*Client{"stream": streamed, "pages": paged} {
		for range 3 {
			var got []KV
			view, err := c.Walk(ctx, "/w/", func(kv KV) error {
				got = append(got, kv)
				return nil
			})
			if err != nil || view.Stale != "" {
				t.Fatal(name, err, view)
			}
			want := must[*clientv3.GetResponse](t)(eye.Get(ctx, "/w/", clientv3.WithPrefix(), clientv3.WithRev(view.Revision)))
			if len(got) != len(want.Kvs) || len(got) < keys/3 {
				t.Fatalf("%s: %d keys, want %d", name, len(got), len(want.Kvs))
			}
			for i, kv := range want.Kvs {
				if g := got[i]; g.Key != string(kv.Key) || !bytes.Equal(g.Value, kv.Value) || g.ModRevision != kv.ModRevision ||
					g.CreateRevision != kv.CreateRevision || g.Version != kv.Version {
					t.Fatalf("%s: %d: %+v", name, i, g)
				}
			}
		}
	}
	close(stop)
	<-stopped
	if streamed.noStream.Load() {
		t.Error("etcd 3.7 streams, but it was not used")
	}

	for name, c := range map[string]*Client{"stream": streamed, "pages": paged} {
		t.Run(name, func(t *testing.T) {
			enough, n := errors.New("enough"), 0
			if _, err := c.Walk(ctx, "/w/", func(KV) error {
				if n++; n == 200 {
					return enough
				}
				return nil
			}); err != enough || n != 200 {
				t.Errorf("after %d: %v", n, err)
			}
			if _, err := c.Walk(ctx, "/none/", func(KV) error { return enough }); err != nil {
				t.Error(err)
			}
			all := 0
			if _, err := c.Walk(ctx, "", func(KV) error { all++; return nil }); err != nil {
				t.Error(err)
			}
			if n, _, err := c.Count(ctx, ""); err != nil || int64(all) != n {
				t.Errorf("walked %d, counted %d: %v", all, n, err)
			}
			done := false
			_, err := c.Walk(ctx, "/w/", func(KV) error {
				if !done {
					done = true
					r, err := eye.Put(ctx, "/other", "x")
					if err == nil {
						_, err = eye.Compact(ctx, r.Header.Revision)
					}
					return err
				}
				return nil
			})
			// A stream may already be past etcd by then.
			if name == "pages" || err != nil {
				wantFault(t, err, fault.Failed, "compacted while reading", "again")
			}
			cctx, cancel := context.WithCancel(ctx)
			_, err = c.Walk(cctx, "/w/", func(KV) error { cancel(); return nil })
			if name == "pages" || err != nil {
				wantFault(t, err, fault.Cancelled)
			}
		})
	}
}

// unstreamed is a server of before etcd 3.7.
type unstreamed struct {
	pb.UnimplementedKVServer
	kv      pb.KVClient
	streams int
	largest int
}

func (u *unstreamed) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	resp, err := u.kv.Range(ctx, r)
	if err == nil {
		u.largest = max(u.largest, len(resp.Kvs))
	}
	return resp, err
}

func (u *unstreamed) RangeStream(r *pb.RangeRequest, s grpc.ServerStreamingServer[pb.RangeStreamResponse]) error {
	u.streams++
	return u.UnimplementedKVServer.RangeStream(r, s)
}

func TestWalkOfAServerWithoutStreams(t *testing.T) {
	t.Parallel()
	cluster := etcdcluster.ForTest(t, 1)
	eye, ctx := raw(t, cluster), bound(t, 30*time.Second)
	for i := range 300 {
		must[*clientv3.PutResponse](t)(eye.Put(ctx, fmt.Sprintf("/w/%05d", i), strings.Repeat("v", 1000)))
	}
	ln := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	srv, old := grpc.NewServer(), &unstreamed{kv: pb.NewKVClient(eye.ActiveConnection())}
	pb.RegisterKVServer(srv, old)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	defer func() { srv.Stop(); <-served }()
	c, err := Open(Config{Endpoints: []string{ln.Addr().String()}, ReadChunk: 50_000})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 2 {
		n := 0
		if _, err := c.Walk(ctx, "/w/", func(KV) error { n++; return nil }); err != nil || n != 300 {
			t.Fatal(n, err)
		}
	}
	if old.streams != 1 {
		t.Errorf("asked for a stream %d times, want once", old.streams)
	}
	if old.largest > 60 {
		t.Errorf("a page of 50 kB of 1 kB values had %d", old.largest)
	}
}

func TestNoSpace(t *testing.T) {
	t.Parallel()
	cluster := etcdcluster.ForTest(t, 1, func(o *etcdcluster.Options) { o.QuotaBytes = 8 << 20 })
	c, ctx := open(t, cluster), bound(t, 30*time.Second)
	rev, err := c.Commit(ctx, granted(), Write{Key: "/keep", Value: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	doomed := rev
	for i := range 40 {
		var r int64
		if r, err = c.Commit(ctx, granted(), Write{Key: fmt.Sprintf("/fill/%d", i), Value: make([]byte, 1<<20)}); err != nil {
			break
		}
		doomed = r
		if i == 39 {
			t.Fatal("the quota never ended it")
		}
	}
	wantFault(t, err, fault.NoSpace, "deletes still work")
	_, err = c.Commit(ctx, granted(), Write{Key: "/keep", ModRevision: rev, Value: []byte("y")})
	wantFault(t, err, fault.NoSpace)
	_, err = c.Commit(ctx, granted(), Write{Key: "/new", Value: []byte("y")})
	wantFault(t, err, fault.NoSpace)
	if st := c.Status(ctx); len(st.Alarms) != 1 || st.Alarms[0] != "NOSPACE" || st.DBQuota != 8<<20 {
		t.Errorf("%+v", st)
	}
	if fate, _, err := c.Settle(ctx, Expect{Key: "/keep", ModRevision: rev}); err != nil || fate != NotDone {
		t.Error("settling needs no space:", fate, err)
	}
	var last KV
	if _, err := c.Walk(ctx, "/fill/", func(kv KV) error {
		if kv.ModRevision == doomed {
			last = kv
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Commit(ctx, granted(), Write{Key: last.Key, ModRevision: last.ModRevision}); err != nil {
		t.Fatal("a delete must pass:", err)
	}
}

func TestSettle(t *testing.T) {
	t.Parallel()
	cluster := etcdcluster.ForTest(t, 1)
	c, eye, ctx := open(t, cluster), raw(t, cluster), bound(t, 60*time.Second)
	put := func(key, value string) int64 {
		t.Helper()
		return must[*clientv3.PutResponse](t)(eye.Put(ctx, key, value)).Header.Revision
	}
	del := func(key string) int64 {
		t.Helper()
		return must[*clientv3.DeleteResponse](t)(eye.Delete(ctx, key)).Header.Revision
	}
	compact := func() {
		t.Helper()
		must[*clientv3.CompactResponse](t)(eye.Compact(ctx, put("/other", "x")))
	}
	ours := sha256.Sum256([]byte("ours"))
	for _, tt := range []struct {
		name string
		// make makes the history; before is the revision that the write was
		// planned at, at is that of the write.
		make    func(key string, before int64) (at int64)
		absent  bool // the write is a create
		blind   bool // of which no revision was known before
		deleted bool
		want    Fate
	}{
		{"done", func(k string, _ int64) int64 { return put(k, "ours") }, false, false, false, Done},
		{"done and overwritten", func(k string, _ int64) int64 { r := put(k, "ours"); put(k, "theirs"); put(k, "more"); return r }, false, false, false, Done},
		{"done and deleted", func(k string, _ int64) int64 { r := put(k, "ours"); del(k); return r }, false, false, false, Done},
		{"not done", func(string, int64) int64 { return 0 }, false, false, false, NotDone},
		{"not done, others busy", func(string, int64) int64 { put("/other", "ours"); put("/other", "ours"); return 0 }, false, false, false, NotDone},
		{"other writer first", func(k string, _ int64) int64 { put(k, "theirs"); return 0 }, false, false, false, NotDone},
		{"other writer first, then the same bytes", func(k string, _ int64) int64 { put(k, "theirs"); put(k, "ours"); return 0 }, false, false, false, NotDone},
		{"deleted by another", func(k string, _ int64) int64 { del(k); return 0 }, false, false, false, NotDone},
		{"deleted by another and made again", func(k string, _ int64) int64 { del(k); put(k, "ours"); return 0 }, false, false, false, NotDone},
		{"delete done", func(k string, _ int64) int64 { return del(k) }, false, false, true, Done},
		{"delete done and made again", func(k string, _ int64) int64 { r := del(k); put(k, "new"); return r }, false, false, true, Done},
		{"delete not done", func(string, int64) int64 { return 0 }, false, false, true, NotDone},
		{"delete, other writer first", func(k string, _ int64) int64 { put(k, "theirs"); del(k); return 0 }, false, false, true, NotDone},
		{"created", func(k string, _ int64) int64 { return put(k, "ours") }, true, false, false, Done},
		{"created and overwritten", func(k string, _ int64) int64 { r := put(k, "ours"); put(k, "theirs"); return r }, true, false, false, Done},
		{"created and deleted", func(k string, _ int64) int64 { r := put(k, "ours"); del(k); return r }, true, false, false, Done},
		{"not created", func(string, int64) int64 { return 0 }, true, false, false, NotDone},
		{"not created, others busy", func(string, int64) int64 { put("/other", "ours"); return 0 }, true, false, false, NotDone},
		{"created by another", func(k string, _ int64) int64 { put(k, "theirs"); return 0 }, true, false, false, NotDone},
		{"created, nothing known before", func(k string, _ int64) int64 { r := put(k, "ours"); put(k, "theirs"); return r }, true, true, false, Done},
		{"not created, nothing known before", func(string, int64) int64 { return 0 }, true, true, false, NotDone},
		{"done, compacted", func(k string, _ int64) int64 { r := put(k, "ours"); compact(); return r }, false, false, false, Done},
		{"not done, compacted", func(string, int64) int64 { compact(); return 0 }, false, false, false, NotDone},
		{"overwritten, compacted", func(k string, _ int64) int64 { put(k, "ours"); put(k, "theirs"); compact(); return 0 }, false, false, false, Undetermined},
		{"gone, compacted", func(k string, _ int64) int64 { put(k, "ours"); del(k); compact(); return 0 }, false, false, false, Undetermined},
		{"delete done, compacted", func(k string, _ int64) int64 { del(k); compact(); return 0 }, false, false, true, Done},
		{"delete and made again, compacted", func(k string, _ int64) int64 { del(k); put(k, "new"); compact(); return 0 }, false, false, true, Undetermined},
	} {
		t.Run(tt.name, func(t *testing.T) {
			key := "/settle/" + strings.ReplaceAll(tt.name, " ", "-")
			e := Expect{Key: key, Deleted: tt.deleted, SHA256: ours}
			e.Since = put("/other", "before")
			if !tt.absent {
				e.ModRevision = put(key, "old")
			} else if tt.blind {
				e.Since = 0
			}
			at := tt.make(key, e.ModRevision)
			before := must[*clientv3.GetResponse](t)(eye.Get(ctx, "x")).Header.Revision
			fate, rev, err := c.Settle(ctx, e)
			if err != nil || fate != tt.want || rev != at {
				t.Errorf("got %v at %d, %v; want %v at %d", fate, rev, err, tt.want, at)
			}
			if after := must[*clientv3.GetResponse](t)(eye.Get(ctx, "x")).Header.Revision; after != before {
				t.Errorf("asking changed something: revision %d, was %d", after, before)
			}
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, e := range []string{"localhost:2379", "etcd-1.example.org:2379", "127.0.0.1", "https://127.0.0.1:2379", "127.0.0.1:0", "127.0.0.1:http", ""} {
		_, err := Open(Config{Endpoints: []string{"127.0.0.1:2379", e}})
		wantFault(t, err, fault.Usage, "IP:port")
	}
	_, err := Open(Config{})
	wantFault(t, err, fault.Usage)
	for _, e := range []string{"127.0.0.1:2379", "[::1]:2379"} {
		c, err := Open(Config{Endpoints: []string{e}})
		if err != nil {
			t.Fatal("etcd need not be alive:", err)
		}
		c.Close()
	}
	ca := must[*labpki.CA](t)(labpki.Open(filepath.Join(t.TempDir(), "pki"), "ca"))
	pair := must[labpki.Pair](t)(ca.Issue("client", labpki.Client, nil))
	for name, cfg := range map[string]Config{
		"no CA":          {CertFile: pair.CertFile, KeyFile: pair.KeyFile},
		"no key":         {CAFile: ca.CertFile(), CertFile: pair.CertFile},
		"CA not there":   {CAFile: filepath.Join(t.TempDir(), "none")},
		"CA not one":     {CAFile: pair.KeyFile},
		"key not there":  {CAFile: ca.CertFile(), CertFile: pair.CertFile, KeyFile: "/nonexistent"},
		"key of another": {CAFile: ca.CertFile(), CertFile: ca.CertFile(), KeyFile: pair.KeyFile},
	} {
		cfg.Endpoints = []string{"127.0.0.1:2379"}
		if _, err := Open(cfg); fault.CodeOf(err) != fault.Usage {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUnreachableAndUntrusted(t *testing.T) {
	// A proxy that answers nothing must not be asked.
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	t.Setenv("https_proxy", "http://127.0.0.1:1")
	ctx := bound(t, 60*time.Second)
	ln := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	closed := ln.Addr().String()
	ln.Close()
	silent := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0")) // accepts in the kernel, says nothing
	defer silent.Close()
	all := func(t *testing.T, c *Client, code fault.Code, words ...string) {
		t.Helper()
		_, _, _, err := c.Get(ctx, "/k")
		wantFault(t, err, code, words...)
		_, err = c.Commit(ctx, granted(), Write{Key: "/k", Value: []byte("v")})
		wantFault(t, err, code, words...)
		_, err = c.Walk(ctx, "/k", func(KV) error { return nil })
		wantFault(t, err, code, words...)
		fate, _, err := c.Settle(ctx, Expect{Key: "/k"})
		wantFault(t, err, code, words...)
		if fate != Undetermined {
			t.Error(fate)
		}
		if st := c.Status(ctx); st.Quorum || fault.CodeOf(st.Err) != code {
			t.Errorf("%+v", st)
		}
		_, err = c.LeaseAlive(ctx, 1)
		wantFault(t, err, code, words...)
		_, err = c.ClusterID(ctx)
		wantFault(t, err, code, words...)
	}
	cluster := etcdcluster.ForTest(t, 1)
	t.Run("refused", func(t *testing.T) {
		all(t, openWith(t, cluster, Config{Endpoints: []string{closed}, RequestTimeout: 2 * time.Second}), fault.Unreachable, closed, "refused")
	})
	t.Run("silent", func(t *testing.T) {
		all(t, openWith(t, cluster, Config{Endpoints: []string{silent.Addr().String()}, RequestTimeout: time.Second}), fault.Unreachable)
	})
	t.Run("one of two", func(t *testing.T) {
		c := open(t, cluster, closed, cluster.Endpoints()[0])
		for range 10 {
			if _, _, view, err := c.Get(ctx, "/k"); err != nil || view.Stale != "" {
				t.Fatal(err, view)
			}
		}
	})
	other := must[*labpki.CA](t)(labpki.Open(filepath.Join(t.TempDir(), "pki"), "other"))
	stranger := must[labpki.Pair](t)(other.Issue("stranger", labpki.Client, nil))
	for name, cfg := range map[string]Config{
		"wrong CA":          {CAFile: other.CertFile(), CertFile: cluster.CertFile(), KeyFile: cluster.KeyFile()},
		"wrong certificate": {CAFile: cluster.CAFile(), CertFile: stranger.CertFile, KeyFile: stranger.KeyFile},
		"no certificate":    {CAFile: cluster.CAFile()},
		"wrong name":        {CAFile: cluster.CAFile(), CertFile: cluster.CertFile(), KeyFile: cluster.KeyFile(), ServerName: "etcd.example.org"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg.Endpoints, cfg.RequestTimeout = cluster.Endpoints(), 2*time.Second
			c, err := Open(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if strings.HasSuffix(name, "certificate") {
				// In TLS 1.3 a server refuses after the client is done, and its
				// reason can get lost behind the closed connection.
				_, err = c.Commit(ctx, granted(), Write{Key: "/k", Value: []byte("v")})
				if !fault.Is(err, fault.Unauthenticated) && !fault.Is(err, fault.Unreachable) || !strings.Contains(err.Error(), "certificate") {
					t.Error(err)
				}
				return
			}
			all(t, c, fault.Unauthenticated, "TLS")
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		cctx, cancel := context.WithCancel(ctx)
		cancel()
		_, _, _, err := open(t, cluster).Get(cctx, "/k")
		wantFault(t, err, fault.Cancelled)
	})
}

func TestQuietSince(t *testing.T) {
	c := etcdcluster.ForTest(t, 1)
	client, eye := open(t, c), raw(t, c)
	ctx := bound(t, 30*time.Second)
	put := func(key string) int64 {
		t.Helper()
		r, err := eye.Put(ctx, key, "x")
		if err != nil {
			t.Fatal(err)
		}
		return r.Header.Revision
	}
	remove := func(key string) int64 {
		t.Helper()
		r, err := eye.Delete(ctx, key)
		if err != nil {
			t.Fatal(err)
		}
		return r.Header.Revision
	}
	put("old")
	old := remove("old")
	put("other")
	compacted := put("other")
	if _, err := eye.Compact(ctx, compacted); err != nil {
		t.Fatal(err)
	}
	since := map[string]int64{"old": old, "none": 0, "future": 1 << 40}
	want := map[string]Quiet{"old": Forgotten, "none": Forgotten, "future": Forgotten}
	for i := range MaxMany - len(since) {
		key := fmt.Sprint("key-", i)
		put(key)
		since[key], want[key] = remove(key), Untouched
		if i%3 == 0 {
			want[key] = Touched
		}
	}
	for key, is := range want {
		if is == Touched {
			put(key)
			remove(key)
		}
	}
	last := put("other")
	found, upTo, err := client.QuietSince(ctx, since)
	if err != nil || upTo != last || !maps.Equal(found, want) {
		t.Errorf("up to %d of %d: %v, %v", upTo, last, found, err)
	}
	if found, _, err = client.QuietSince(ctx, map[string]int64{"key-1": last}); err != nil || found["key-1"] != Untouched {
		t.Errorf("%v, %v", found, err)
	}
	_, _, err = client.QuietSince(ctx, nil)
	wantFault(t, err, fault.Usage, "0 keys")
}
