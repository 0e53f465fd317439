package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/internal/fault"
)

// server plays an API server that gives everybody a token, and answers the rest
// as it is told to.
type server struct {
	*httptest.Server
	status atomic.Int32
	mu     sync.Mutex
	from   []string // addresses that asked for something else than a token
	bearer []string
}

func newServer(t *testing.T) *server {
	s := &server{}
	s.status.Store(http.StatusOK)
	s.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/token") {
			var request authenticationv1.TokenRequest
			if err := json.NewDecoder(r.Body).Decode(&request); err != nil || request.Spec.BoundObjectRef == nil {
				t.Errorf("token request %+v, %v", request, err)
			} else {
				request.Status.Token = "token of " + request.Spec.BoundObjectRef.Name
			}
			json.NewEncoder(w).Encode(request)
			return
		}
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		s.mu.Lock()
		s.from, s.bearer = append(s.from, host), append(s.bearer, r.Header.Get("Authorization"))
		s.mu.Unlock()
		status := int(s.status.Load())
		if status == http.StatusTooManyRequests {
			w.Header().Set("Retry-After", "1")
		}
		w.WriteHeader(status)
		io.WriteString(w, "{}")
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *server) asked() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.from)
}

// config is that of the server's administrator.
func (s *server) config() *rest.Config {
	return person(&rest.Config{Host: s.URL, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}, "test")
}

// stormOn is a storm without etcd whose pods come and go as the test says.
func stormOn(t *testing.T, srv *server, o StormOptions) *Storm {
	o.Dir, o.Duration = "x", time.Minute
	if err := o.check(); err != nil {
		t.Fatal(err)
	}
	s := &Storm{opts: o, kind: stormKinds[0], admin: srv.config(), hosts: []string{srv.URL}}
	s.pods = pods{storm: s, begin: make(chan struct{}), running: map[string]*podClients{}}
	var err error
	if s.api, err = rest.UnversionedRESTClientFor(s.admin); err != nil {
		t.Fatal(err)
	}
	return s
}

func podValue(t *testing.T, name, ip string, phase corev1.PodPhase, terminating bool) []byte {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: offenderNamespace, Name: name, Labels: labelled(offenderName)},
		Status: corev1.PodStatus{Phase: phase, PodIP: ip}}
	if terminating {
		now := metav1.Now()
		pod.DeletionTimestamp = &now
	}
	value, err := storage.EncodeTyped(pod)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// TestClientEndsOnlyWithItsPod: refused in every way, and even while its pod is
// being deleted, a client goes on; once the pod is gone it ends.
func TestClientEndsOnlyWithItsPod(t *testing.T) {
	t.Parallel()
	srv := newServer(t)
	s := stormOn(t, srv, StormOptions{ClientsPerPod: 2, Pace: time.Millisecond})
	s.seen(t.Context(), "/pending", podValue(t, "pending", "", corev1.PodPending, false))
	s.seen(t.Context(), "/one", podValue(t, "one", "127.100.0.41", corev1.PodRunning, false))
	eventually(t, "the pod has its token", func() bool { all, armed := s.pods.count(); return all == 1 && armed == 1 })
	if n := srv.asked(); n != 0 {
		t.Errorf("%d requests before the storm began", n)
	}
	close(s.pods.begin)
	for status, count := range map[int]func(counts) int64{
		200: func(c counts) int64 { return c.Answered }, 401: func(c counts) int64 { return c.Unauthorized }, 403: func(c counts) int64 { return c.Forbidden },
		429: func(c counts) int64 { return c.Throttled }, 500: func(c counts) int64 { return c.Failed },
	} {
		before := s.load.read()
		srv.status.Store(int32(status))
		eventually(t, fmt.Sprint("it goes on at ", status), func() bool { return count(s.load.read().minus(before)) > 5 })
	}
	s.seen(t.Context(), "/one", podValue(t, "one", "127.100.0.41", corev1.PodRunning, true))
	before := srv.asked()
	eventually(t, "it goes on while its pod is being deleted", func() bool { return srv.asked() > before+5 })
	srv.mu.Lock()
	if other := slices.IndexFunc(srv.from, func(a string) bool { return a != "127.100.0.41" }); other >= 0 {
		t.Errorf("a request came from %s", srv.from[other])
	}
	if other := slices.IndexFunc(srv.bearer, func(b string) bool { return b != "Bearer token of one" }); other >= 0 {
		t.Errorf("a request had the credentials %q", srv.bearer[other])
	}
	srv.mu.Unlock()
	s.pods.changed(t.Context(), "/one", nil)
	s.pods.group.Wait()
	// What was on its way may still arrive.
	eventually(t, "nothing is asked any more", func() bool {
		before := srv.asked()
		time.Sleep(200 * time.Millisecond)
		return srv.asked() == before
	})
}

// TestBackoff: a client that backs off asks little once it is refused, and
// heeds Retry-After; one that hammers does neither.
func TestBackoff(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		share  float64
		status int
		least  int
		most   int
	}{{1, 403, 1, 4}, {1, 429, 1, 4}, {0, 403, 100, 1 << 30}, {0, 429, 100, 1 << 30}} {
		t.Run(fmt.Sprint(c.share, " ", c.status), func(t *testing.T) {
			t.Parallel()
			srv := newServer(t)
			srv.status.Store(int32(c.status))
			s := stormOn(t, srv, StormOptions{ClientsPerPod: 1, BackoffShare: c.share})
			close(s.pods.begin)
			s.pods.changed(t.Context(), "/p", &podID{"p", "n", "127.0.0.1"})
			eventually(t, "it asks", func() bool { return srv.asked() >= c.least })
			if c.most < 1<<30 {
				time.Sleep(1500 * time.Millisecond)
			}
			if n := srv.asked(); n > c.most {
				t.Errorf("%d requests in about 1.5 s", n)
			}
			s.pods.changed(t.Context(), "/p", nil)
			s.pods.group.Wait()
		})
	}
}

func TestShareOfTheImpatient(t *testing.T) {
	for _, c := range []struct {
		clients int
		share   float64
		want    int
	}{{1, 0, 1}, {1, 1, 0}, {20, 0.25, 15}, {20, 0, 20}, {20, 1, 0}, {3, 0.5, 2}} {
		s := &Storm{opts: StormOptions{ClientsPerPod: c.clients, BackoffShare: c.share}}
		n := 0
		for i := range c.clients {
			if s.impatient(i) {
				n++
			}
		}
		if n != c.want {
			t.Errorf("%d of %d hammer at a share of %v, want %d", n, c.clients, c.share, c.want)
		}
	}
}

func TestProbe(t *testing.T) {
	t.Parallel()
	srv := newServer(t)
	var block atomic.Bool
	p := &probe{name: "victim", config: srv.config(), interval: 10 * time.Millisecond, timeout: time.Minute, ask: func(ctx context.Context, api *rest.RESTClient) error {
		if block.Load() {
			<-ctx.Done()
			return ctx.Err()
		}
		return api.Get().AbsPath("/x").Do(ctx).Error()
	}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { p.run(ctx); close(done) }()
	if took, l, err := p.calm(ctx, 5*time.Second, 50*time.Millisecond, 30*time.Second); err != nil || took <= 0 || l.N == 0 || l.P99 <= 0 {
		t.Errorf("calm: %s, %+v, %v", took, l, err)
	}
	srv.status.Store(http.StatusForbidden)
	from := time.Now()
	eventually(t, "refusals are failures", func() bool { return p.began(from, time.Now()).Failed > 3 })
	if _, _, err := p.calm(ctx, time.Millisecond, 20*time.Millisecond, 100*time.Millisecond); err == nil || !strings.Contains(err.Error(), "the victim's p99 is not back under 1ms") {
		t.Errorf("calm although refused: %v", err)
	}
	block.Store(true)
	time.Sleep(30 * time.Millisecond)
	from = time.Now()
	eventually(t, "open questions count with their age", func() bool { return p.began(from, time.Now()).P99 > 200*time.Millisecond })
	if l := p.recent(from); l.N == 0 || l.P99 < 200*time.Millisecond {
		t.Errorf("recent: %+v", l)
	}
	cancel()
	<-done
	if l := p.began(from, time.Now()); l.N != 0 {
		t.Errorf("questions cut short by the end count: %+v", l)
	}
}

func TestPercentile(t *testing.T) {
	var d []time.Duration
	for i := range 100 {
		d = append(d, time.Duration(i+1))
	}
	for p, want := range map[int]time.Duration{1: 1, 50: 50, 99: 99, 100: 100} {
		if got := percentile(d, p); got != want {
			t.Errorf("p%d of 1..100 is %d", p, got)
		}
	}
	if got := percentile(d[:1], 99); got != 1 {
		t.Errorf("p99 of one is %d", got)
	}
}

func TestStormWithoutALab(t *testing.T) {
	t.Parallel()
	dir := func(files map[string]string) string {
		d := t.TempDir()
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(d, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return d
	}
	lock := func(d string) string {
		f, err := os.Open(filepath.Join(d, "lock"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		return d
	}
	for name, c := range map[string]struct {
		dir, want string
		change    func(*StormOptions)
		code      fault.Code
	}{
		"no folder":     {"", "the folder of a lab", nil, fault.Usage},
		"nothing there": {filepath.Join(t.TempDir(), "none"), "no lab is in", nil, fault.Failed},
		"not running":   {dir(map[string]string{"lock": "1"}), "does not run", nil, fault.Failed},
		"not ready":     {lock(dir(map[string]string{"lock": "1"})), "is not ready", nil, fault.Failed},
		"no API server": {lock(dir(map[string]string{"lock": "1", "env": "export ETCDCTL_KEY='x'\n"})), "has no API server", nil, fault.Failed},
		"kind":          {"x", `no kind of storm called "rain"`, func(o *StormOptions) { o.Kind = "rain" }, fault.Usage},
		"shape":         {"x", `no shape "c"`, func(o *StormOptions) { o.Shape = "c" }, fault.Usage},
		"clients":       {"x", "0 clients", func(o *StormOptions) { o.ClientsPerPod = 0 }, fault.Usage},
		"share":         {"x", "a share of 2", func(o *StormOptions) { o.BackoffShare = 2 }, fault.Usage},
		"size":          {"x", "objects of 2097152 bytes", func(o *StormOptions) { o.ObjectBytes = 2 << 20 }, fault.Usage},
		"duration":      {"x", "a storm of 0s", func(o *StormOptions) { o.Duration = 0 }, fault.Usage},
	} {
		t.Run(name, func(t *testing.T) {
			o := DefaultStorm()
			o.Dir, o.Out = c.dir, io.Discard
			if c.change != nil {
				c.change(&o)
			}
			err := RunStorm(t.Context(), o)
			if fault.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.want) || fault.Of(err).Next == "" {
				t.Errorf("got %v (%s)", err, fault.CodeOf(err))
			}
		})
	}
}

// stormLab runs a lab as a shape of the outage wants it.
func stormLab(t testing.TB, shape string, change ...func(*Options)) *Lab {
	needKube(t)
	base, err := os.MkdirTemp("", "storm") // sockets have short names only
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	o := options(filepath.Join(base, "lab"), network())
	kube := shapes[shape].kube
	kube.Binaries = kubeBinaries()
	o.Objects, o.Nodes, o.QuotaBytes, o.Kube = 0, 20, demoQuota, &kube
	for _, c := range change {
		c(&o)
	}
	l, err := Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// TestStormKinds makes one storm of each kind on one lab, one after the other,
// and sees that it does what it says.
func TestStormKinds(t *testing.T) {
	l := stormLab(t, "b")
	t.Run("told each second", func(t *testing.T) { toldEachSecond(t, l) })
	t.Run("top finds it", func(t *testing.T) { topFindsIt(t, l) })
	t.Run("pods come and go", func(t *testing.T) { podsComeAndGo(t, l) })
	for _, kind := range []struct {
		name string
		done func(c counts, s *Storm) bool
	}{
		{"herd", func(c counts, _ *Storm) bool { return c.Answered >= 100 }},
		{"writes", func(c counts, _ *Storm) bool { return c.Answered >= 50 }},
		{"etcd-reads", func(c counts, _ *Storm) bool { return c.Answered >= 50 }},
		{"objects", func(c counts, _ *Storm) bool { return c.Answered >= 400 }},
		// The last, since no pod starts after it.
		{"webhook", func(_ counts, s *Storm) bool {
			v := s.victim.recent(time.Now().Add(-time.Minute))
			return v.Failed > 0 && strings.Contains(v.Last.Error(), "failed calling webhook")
		}},
	} {
		t.Run(kind.name, func(t *testing.T) {
			var out bytes.Buffer
			o := DefaultStorm()
			o.Dir, o.Kind, o.ClientsPerPod, o.Objects, o.Out = l.opts.Dir, kind.name, 3, 300, &out
			s, err := NewStorm(t.Context(), o)
			if err != nil {
				t.Fatalf("%v\n%s", err, out.String())
			}
			defer s.Close()
			if err := s.Begin(t.Context()); err != nil {
				t.Fatal(err)
			}
			for began := time.Now(); !kind.done(s.load.read(), s); pause(t.Context(), 100*time.Millisecond) {
				if time.Since(began) > 30*time.Second {
					t.Fatalf("%s\n%s", s.load.read(), s.line(counts{}))
				}
			}
		})
	}
	for _, kind := range []string{"reports", "configmaps", "events"} {
		out, err := l.Kube().kubectl(t.Context(), l.Kube().AdminKubeconfig(), "", "get", kind, "-n", offenderNamespace, "-l", "app="+runawayApp, "-o", "name")
		if err != nil || strings.TrimSpace(out) == "" {
			t.Errorf("%s that the explosion left: %v, %q", kind, err, out)
		}
	}
}

func smallStorm(l *Lab, out io.Writer) StormOptions {
	o := DefaultStorm()
	o.Dir, o.ClientsPerPod, o.BackoffShare, o.Objects, o.Out = l.opts.Dir, 2, 0, 300, out
	return o
}

func toldEachSecond(t *testing.T, l *Lab) {
	var out bytes.Buffer
	o := smallStorm(l, &out)
	o.Duration = 2500 * time.Millisecond
	if err := RunStorm(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"shape b: flow control is off; the victim is a person, alice", "20 pods with 2 clients each, of which 2 hammer on and 0 back off",
		"   1 s  pods 20, offered ", "   2 s  pods 20, offered ", " | victim p50 ", " | admin p50 ", "ended after 2.5"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, out.String())
		}
	}
	o.Shape = "a"
	if err := RunStorm(t.Context(), o); fault.CodeOf(err) != fault.Usage || !strings.Contains(err.Error(), "has shape b, not a") {
		t.Errorf("got %v", err)
	}
}

// podsComeAndGo: the client of a pod that is deleted ends, and the pod that
// replaces it has one.
func podsComeAndGo(t *testing.T, l *Lab) {
	s, err := NewStorm(t.Context(), smallStorm(l, io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	names := func() (all []string) {
		s.pods.mu.Lock()
		defer s.pods.mu.Unlock()
		for key, c := range s.pods.running {
			if c.armed {
				all = append(all, key)
			}
		}
		return all
	}
	before := names()
	if _, err := l.Kube().kubectl(t.Context(), l.Kube().AdminKubeconfig(), "", "delete", "pods", "-n", offenderNamespace, "-l", "app="+offenderName, "--wait=false"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "every pod was replaced", func() bool {
		now := names()
		return len(now) == len(before) && !slices.ContainsFunc(now, func(key string) bool { return slices.Contains(before, key) })
	})
	answered := s.load.answered.Load()
	eventually(t, "the new ones ask", func() bool { return s.load.answered.Load() > answered+10 })
}

// TestStormUntilNoSpace fills an etcd with a small quota through the API server.
func TestStormUntilNoSpace(t *testing.T) {
	l := stormLab(t, "b", func(o *Options) { o.QuotaBytes = 24 << 20 })
	o := DefaultStorm()
	o.Dir, o.Kind, o.ClientsPerPod, o.Objects, o.ObjectBytes, o.Pace, o.Out = l.opts.Dir, "objects", 2, 0, 100<<10, 0, io.Discard
	s, err := NewStorm(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); s.load.full.Load() < 10; pause(t.Context(), 100*time.Millisecond) {
		if time.Since(began) > time.Minute {
			t.Fatalf("%s\n%s", s.load.read(), s.line(counts{}))
		}
	}
	from := time.Now()
	eventually(t, "the victim cannot write either", func() bool { return s.victim.began(from, time.Now()).Failed > 0 })
}
