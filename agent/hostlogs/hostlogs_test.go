package hostlogs

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

const (
	pod   = "/var/log/pods/kube-system_kube-apiserver-cp-1_2c1f/kube-apiserver/"
	mark  = "/etc/kubernetes/manifests/kube-apiserver.yaml"
	etcds = "/var/log/pods/kube-system_etcd-cp-1_77aa/etcd/"
)

// tree is a node's files.
type tree struct {
	*testing.T
	root string
}

func newTree(t *testing.T) tree { return tree{t, t.TempDir()} }

func (t tree) path(name string) string { return filepath.Join(t.root, name) }

func (t tree) write(name, content string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(t.path(name)), 0o755))
	f, err := os.OpenFile(t.path(name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	must(t, err)
	_, err = f.WriteString(content)
	must(t, errors.Join(err, f.Close()))
}

func (t tree) pack(name, content string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(t.path(name)), 0o755))
	f, err := os.Create(t.path(name))
	must(t, err)
	z := gzip.NewWriter(f)
	_, err = z.Write([]byte(content))
	must(t, errors.Join(err, z.Close(), f.Close()))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// cri is a line as containerd writes it, some seconds before noon.
func cri(ago int, text string) string {
	return noon.Add(-time.Duration(ago)*time.Second).Format(time.RFC3339Nano) + " stderr F " + text + "\n"
}

// heard is what came.
type heard struct {
	mu             sync.Mutex // guards all below
	lines, sources []string
	notes          []string
}

func (h *heard) send(l *halliganv1.LogLines) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lines = append(h.lines, l.GetLines()...)
	if l.GetSource() != "" {
		h.sources = append(h.sources, l.GetSource())
	}
	if l.GetNote() != "" {
		h.notes = append(h.notes, l.GetNote())
	}
	return nil
}

func (h *heard) all() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Join(h.lines, "|")
}

func (h *heard) told() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Join(h.notes, "|")
}

func (t tree) reader() *Reader {
	return New(Options{Root: t.root, Now: func() time.Time { return noon }, Poll: 5 * time.Millisecond, Journalctl: t.path("journalctl")})
}

func (t tree) read(req *halliganv1.LogsRequest) (*heard, error) {
	h := &heard{}
	return h, t.reader().Read(t.Context(), req, h.send)
}

func TestKubeletsFiles(t *testing.T) {
	n := newTree(t)
	n.write(mark, "")
	n.pack(pod+"0.log.20261123-110000.gz", cri(400, "first")+cri(390, "second"))
	n.write(pod+"0.log.20261123-113000", cri(300, "third"))
	n.write(pod+"0.log", cri(200, "fourth"))
	n.write(pod+"1.log", cri(100, "a token Bearer abc.def-ghi and eyJhbGciOi.eyJzdWIi.sig")+cri(50, "\x1b]0;evil\a\ttabbed\r")+
		strings.Replace(cri(20, "split in "), " F ", " P ", 1)+cri(20, "two"))
	n.write(pod+"1.log.20261123-113000.tmp", cri(1, "half a copy"))
	n.write("/var/log/pods/kube-system_kube-apiserver-cp-1_2c1f/other/0.log", cri(1, "another container"))
	n.write("/var/log/kubernetes/audit.log", "{}\n")
	h, err := n.read(&halliganv1.LogsRequest{Component: "apiserver"})
	want := `first|second|third|fourth|a token Bearer [masked] and [masked]|\x1b]0;evil\x07    tabbed|split in two`
	if err != nil || h.all() != want || h.told() != "" {
		t.Errorf("%v, %v:\n%s\nwant\n%s", err, h.notes, h.all(), want)
	}
	if len(h.sources) != 4 || !strings.HasSuffix(h.sources[0], ".gz") || !strings.HasSuffix(h.sources[3], "/1.log") {
		t.Errorf("from %q", h.sources)
	}
	for _, c := range []struct {
		req  *halliganv1.LogsRequest
		want string
	}{
		{&halliganv1.LogsRequest{Tail: 2}, `\x1b]0;evil\x07    tabbed|split in two`},
		{&halliganv1.LogsRequest{Tail: 3, Grep: "i"}, `third|\x1b]|split in two`},
		{&halliganv1.LogsRequest{SinceSeconds: 60}, `\x1b]0;evil\x07    tabbed|split in two`},
		{&halliganv1.LogsRequest{SinceSeconds: 350, Grep: "th"}, "third|fourth"},
		{&halliganv1.LogsRequest{Grep: "abc.def"}, ""}, // what is masked cannot be guessed at
	} {
		c.req.Component = "apiserver"
		h, err := n.read(c.req)
		want := strings.Split(c.want, "|")
		if c.want == "" {
			want = nil
		}
		if err != nil || len(want) != len(h.lines) || slices.ContainsFunc(want, func(w string) bool {
			return !slices.ContainsFunc(h.lines, func(l string) bool { return strings.Contains(l, w) })
		}) {
			t.Errorf("%v: %v, %q, want %q", c.req, err, h.lines, want)
		}
	}
}

func TestPlaces(t *testing.T) {
	t.Parallel()
	docker := `{"log":"a half, ","stream":"stderr","time":"2026-11-23T11:00:00Z"}` + "\n" + `{"log":"and the rest\n","stream":"stderr","time":"2026-11-23T11:00:00Z"}` + "\n"
	for name, c := range map[string]struct {
		component string
		make      func(tree)
		want      string
	}{
		"nothing marks the node": {"etcd", func(n tree) { n.write(etcds+"0.log", cri(5, "x")) }, "x"},
		"links only": {"apiserver", func(n tree) {
			n.write("/var/log/elsewhere/0.log", cri(5, "new"))
			n.write("/var/log/elsewhere/0.log.20261123-110000", cri(9, "old"))
			must(n, os.MkdirAll(n.path("/var/log/containers"), 0o755))
			must(n, os.Symlink(n.path("/var/log/elsewhere/0.log"), n.path("/var/log/containers/kube-apiserver-cp-1_kube-system_kube-apiserver-00ff.log")))
		}, "old|new"},
		"Docker": {"scheduler", func(n tree) {
			n.write("/var/lib/docker/containers/0/0-json.log", docker)
			dir := n.path("/var/log/pods/kube-system_kube-scheduler-cp-1_3/kube-scheduler")
			must(n, os.MkdirAll(dir, 0o755))
			must(n, os.Symlink(n.path("/var/lib/docker/containers/0/0-json.log"), filepath.Join(dir, "0.log")))
		}, "a half, and the rest"},
		"RKE2's kubelet, in a data-dir of its own": {"kubelet", func(n tree) {
			n.write("/etc/rancher/rke2/config.yaml", "data-dir: /data\n")
			n.write("/data/server/tls/x", "")
			n.write("/data/agent/logs/kubelet.log", "new\n")
			n.pack("/data/agent/logs/kubelet-2026-11-22T10-00-00.000.log.gz", "old\n")
			n.write("/data/agent/logs/kubelet-audit.log", "other\n")
		}, "old|new"},
		"k3s without systemd": {"scheduler", func(n tree) {
			n.write("/var/lib/rancher/k3s/server/tls/x", "")
			n.write("/var/log/k3s.log", "new\n")
			n.write("/var/log/k3s.log.1", "old\n")
		}, "old|new"},
		"OpenShift": {"scheduler", func(n tree) {
			n.write("/etc/kubernetes/manifests/kube-apiserver-pod.yaml", "")
			n.write("/var/log/pods/openshift-kube-scheduler_openshift-kube-scheduler-m0_1/kube-scheduler/0.log", cri(3, "x"))
		}, "x"},
		"Talos": {"etcd", func(n tree) {
			n.write("/system/secrets/etcd/ca.crt", "")
			n.write("/var/log/etcd.log", "x\n")
		}, "x"},
	} {
		n := newTree(t)
		c.make(n)
		if h, err := n.read(&halliganv1.LogsRequest{Component: c.component}); err != nil || h.all() != c.want {
			t.Errorf("%s: %v, %q, want %q", name, err, h.lines, c.want)
		}
	}
}

func TestNothingThere(t *testing.T) {
	n := newTree(t)
	n.write(mark, "")
	_, err := n.read(&halliganv1.LogsRequest{Component: "apiserver"})
	if f := fault.Of(err); f.Code != fault.NotFound || !strings.Contains(f.Message, n.path("/var/log/pods/kube-system_kube-apiserver-*")) || !strings.Contains(f.Message, n.path("/var/log/containers/kube-apiserver-")) || f.Next == "" {
		t.Error(err)
	}
	for _, req := range []*halliganv1.LogsRequest{{}, {Component: "audit"}, {Component: "../etc"}, {Component: "etcd", Tail: maxTail + 1}, {Component: "etcd", Grep: strings.Repeat("x", maxGrep+1)}} {
		if _, err := n.read(req); fault.CodeOf(err) != fault.Usage {
			t.Errorf("%v: %v", req.GetComponent(), err)
		}
	}
}

// TestTraps: what containers with a share in the folders of logs could lay there.
func TestTraps(t *testing.T) {
	n := newTree(t)
	n.write(mark, "")
	n.write("/etc/shadow", "root:secret\n")
	n.write("/var/log/kube-apiserver/audit.log", "who did what\n")
	n.write(pod+"3.log", cri(9, "honest")+`{"kind":"Event","apiVersion":"audit.k8s.io/v1","level":"Metadata"}`+"\n"+cri(8, `{"kind":"Event","apiVersion":"audit.k8s.io/v1"}`)+"garbage \xff\x00\n\n")
	must(t, os.Symlink(n.path("/etc/shadow"), n.path(pod+"0.log")))
	must(t, os.Symlink(n.path("/var/log/kube-apiserver/audit.log"), n.path(pod+"1.log")))
	must(t, syscall.Mkfifo(n.path(pod+"2.log"), 0o600))
	must(t, os.Mkdir(n.path(pod+"4.log"), 0o755))
	n.write(pod+"0.log.20261123-110000.gz", "no gzip")
	h, err := n.read(&halliganv1.LogsRequest{Component: "apiserver"})
	if err != nil || h.all() != `honest|garbage \xff\x00|` {
		t.Errorf("%v, %q", err, h.lines)
	}
	for _, want := range []string{"0.log is left out: it leads out of", "1.log is left out: it is an audit log", "2.log is left out: it is no file", "cannot be unpacked", "2 lines of the API server's audit log"} {
		if !strings.Contains(h.told(), want) {
			t.Errorf("no %q in %q", want, h.notes)
		}
	}
}

func TestBounds(t *testing.T) {
	n := newTree(t)
	n.write(mark, "")
	n.write(pod+"0.log", cri(9, strings.Repeat("x", 1<<20)+"END")+cri(8, "after"))
	h, err := n.read(&halliganv1.LogsRequest{Component: "apiserver"})
	if err != nil || len(h.lines) != 2 || len(h.lines[0]) > maxLine || !strings.HasSuffix(h.lines[0], "…") || h.lines[1] != "after" {
		t.Errorf("%v, %d lines", err, len(h.lines))
	}
	// Twenty thousand lines of 1 KiB: the last ones, up to the bytes that are held.
	var b strings.Builder
	for i := range 20_000 {
		b.WriteString(cri(5, fmt.Sprint(i, strings.Repeat("y", 1<<10))))
	}
	n.write(etcds+"0.log", b.String())
	h, err = n.read(&halliganv1.LogsRequest{Component: "etcd", Tail: maxTail})
	if err != nil || len(h.lines) < 8000 || len(h.all()) > maxHeld+maxTail || !strings.HasPrefix(h.lines[len(h.lines)-1], "19999y") || !strings.Contains(h.told(), "older ones are left out") {
		t.Errorf("%v, %d lines, %q", err, len(h.lines), h.notes)
	}
	// More than is read: the end, beginning with a whole line; and nothing of what is
	// older.
	n.pack(etcds+"0.log.20261123-110000.gz", cri(9, "older"))
	big, err := os.OpenFile(n.path(etcds+"0.log"), os.O_WRONLY, 0)
	must(t, err)
	_, err = big.WriteAt([]byte("\n"+cri(3, "end")), maxRead*2)
	must(t, errors.Join(err, big.Close()))
	h, err = n.read(&halliganv1.LogsRequest{Component: "etcd"})
	if err != nil || h.all() != "end" || !strings.Contains(h.told(), "only the last 64 MiB") {
		t.Errorf("%v, %d lines, %q", err, len(h.lines), h.notes)
	}
	// No more than so many at a time.
	r := n.reader()
	for range maxReaders {
		r.places <- struct{}{}
	}
	if err := r.Read(t.Context(), &halliganv1.LogsRequest{Component: "etcd"}, h.send); fault.CodeOf(err) != fault.Unreachable {
		t.Error(err)
	}
}

// TestFollow: whatever becomes of the names, every line comes once and in order.
func TestFollow(t *testing.T) {
	n := newTree(t)
	n.write(mark, "")
	n.write(pod+"0.log", cri(9, "0")+cri(9, "1")+"2026-11-23T12:00:00Z stderr F ha")
	h := &heard{}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- n.reader().Read(ctx, &halliganv1.LogsRequest{Component: "apiserver", Follow: true, Tail: 1}, h.send)
	}()
	came := func(want string) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); h.all() != want; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%q, want %q; notes %q", h.all(), want, h.told())
			}
		}
	}
	came("1")
	n.write(pod+"0.log", "lf\n")
	came("1|half")
	// As kubelets rotate: the writer goes on in the old file until there is a new one.
	must(t, os.Rename(n.path(pod+"0.log"), n.path(pod+"0.log.20261123-120000")))
	n.write(pod+"0.log.20261123-120000", cri(1, "late"))
	came("1|half|late")
	n.write(pod+"0.log.20261123-120000", cri(1, "later"))
	n.write(pod+"0.log", cri(0, "new"))
	came("1|half|late|later|new")
	n.pack(pod+"0.log.20261123-120000.gz", cri(1, "late"))
	must(t, os.Remove(n.path(pod+"0.log.20261123-120000")))
	n.write(pod+"1.log", cri(0, "restarted"))
	came("1|half|late|later|new|restarted")
	// Cut in place, and a pod of another UID.
	must(t, os.Truncate(n.path(pod+"1.log"), 0))
	n.write(pod+"1.log", cri(0, "cut"))
	came("1|half|late|later|new|restarted|cut")
	n.write(strings.Replace(pod, "2c1f", "3d2e", 1)+"0.log", cri(0, "another"))
	came("1|half|late|later|new|restarted|cut|another")
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestRotatedMidRead: a file that goes away between the look and the reading is no
// error.
func TestRotatedMidRead(t *testing.T) {
	n := newTree(t)
	n.write(mark, "")
	n.write(pod+"0.log", cri(9, "x"))
	q := &query{Reader: n.reader(), req: &halliganv1.LogsRequest{Component: "apiserver"}, tail: 5}
	h := &heard{}
	q.out = &batch{send: h.send}
	files := q.list(q.where())
	must(t, os.Rename(n.path(pod+"0.log"), n.path(pod+"0.log.20261123-120000")))
	if err := q.files(t.Context(), q.where(), files); err != nil {
		t.Error(err)
	}
}

const journalctl = `#!/bin/sh
echo "$*" > "$(dirname "$0")/asked"
cat "$(dirname "$0")/entries"
case "$*" in *--follow*) exec sleep 60;; esac
`

func TestJournal(t *testing.T) {
	n := newTree(t)
	n.write(mark, "")
	n.write("entries", "")
	n.write("journalctl", journalctl)
	must(t, os.Chmod(n.path("journalctl"), 0o700))
	_, err := n.read(&halliganv1.LogsRequest{Component: "kubelet"})
	if f := fault.Of(err); f.Code != fault.NotFound || !strings.Contains(f.Message, "the journal of kubelet.service") {
		t.Error(err)
	}
	entries := `{"MESSAGE":"one\ntwo","__REALTIME_TIMESTAMP":"1795348799000000"}
{"MESSAGE":[98,27,91,255],"__REALTIME_TIMESTAMP":"1795348799000000"}
{"MESSAGE":null,"__REALTIME_TIMESTAMP":"1"}
not JSON
{"MESSAGE":"Authorization: Bearer sesame","__REALTIME_TIMESTAMP":"1795348799000000"}
`
	n.write("entries", strings.ReplaceAll(entries, "1795348799", fmt.Sprint(noon.Unix()-1)))
	h, err := n.read(&halliganv1.LogsRequest{Component: "kubelet", SinceSeconds: 60, Tail: 9})
	if err != nil || h.all() != `one|two|b\x1b[\xff|Authorization: Bearer [masked]` || h.sources[0] != "journal of kubelet.service" || !strings.Contains(h.told(), "no JSON") {
		t.Errorf("%v, %q, %q", err, h.lines, h.notes)
	}
	asked, err := os.ReadFile(n.path("asked"))
	if want := fmt.Sprintf("--no-pager --quiet --all --output=json --output-fields=MESSAGE --unit=kubelet.service --lines=9 --since=@%d\n", noon.Unix()-60); err != nil || string(asked) != want {
		t.Errorf("%q, want %q", asked, want)
	}
	// Following ends what was started.
	ctx, stop := context.WithCancel(t.Context())
	h = &heard{}
	ended := make(chan error, 1)
	go func() {
		ended <- n.reader().Read(ctx, &halliganv1.LogsRequest{Component: "kubelet", Follow: true}, h.send)
	}()
	for deadline := time.Now().Add(20 * time.Second); !strings.HasPrefix(h.all(), "one|two"); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(h.all())
		}
	}
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	n.write("broken", "#!/bin/sh\necho 'no \x1b journal' >&2; exit 3\n")
	must(t, os.Rename(n.path("broken"), n.path("journalctl")))
	must(t, os.Chmod(n.path("journalctl"), 0o700))
	if _, err := n.read(&halliganv1.LogsRequest{Component: "kubelet"}); fault.CodeOf(err) != fault.Failed || !strings.Contains(err.Error(), `no \x1b journal`) {
		t.Error(err)
	}
}

func TestConfigured(t *testing.T) {
	n := newTree(t)
	zone := time.Local
	time.Local = time.UTC
	t.Cleanup(func() { time.Local = zone })
	n.write("/opt/kas-1.log", "I1123 11:00:00.000000       1 old.go:1] old\nno time\nI1123 11:59:30.000000       1 new.go:1] new\n  more of it\n")
	n.write("/opt/etcd.log", `{"level":"warn","ts":"2026-11-23T11:00:00.000000Z","msg":"old"}`+"\n"+`{"level":"warn","ts":"2026-11-23T11:59:59.000000+0000","msg":"new"}`+"\n")
	r := New(Options{Root: n.root, Now: func() time.Time { return noon }, Files: map[string][]string{"apiserver": {n.path("/opt/kas-*.log")}, "etcd": {n.path("/opt/etcd.log")}}})
	must(t, os.Chtimes(n.path("/opt/kas-1.log"), noon, noon))
	must(t, os.Chtimes(n.path("/opt/etcd.log"), noon, noon))
	for component, want := range map[string]string{"apiserver": "I1123 11:59:30.000000       1 new.go:1] new|  more of it", "etcd": `{"level":"warn","ts":"2026-11-23T11:59:59.000000+0000","msg":"new"}`} {
		h := &heard{}
		if err := r.Read(t.Context(), &halliganv1.LogsRequest{Component: component, SinceSeconds: 60}, h.send); err != nil || h.all() != want {
			t.Errorf("%s: %v, %q", component, err, h.lines)
		}
	}
	for component, files := range map[string][]string{"audit": {"/a"}, "etcd": {"etcd.log"}, "apiserver": {"/var/log/kube-audit.log"}} {
		if Check(component, files) == nil {
			t.Errorf("%s: %q is taken", component, files)
		}
	}
	if err := Check("kubelet", []string{"/var/log/kubelet.log"}); err != nil {
		t.Error(err)
	}
}

func FuzzLine(f *testing.F) {
	f.Add([]byte(cri(1, "x")), true)
	f.Add([]byte(`{"log":"x\n","stream":"stdout","time":"2026-11-23T11:00:00Z"}`+"\nI1123 11:00:00.000000 x"), false)
	f.Fuzz(func(t *testing.T, data []byte, runtime bool) {
		q := &query{Reader: New(Options{}), req: &halliganv1.LogsRequest{}}
		p := &parser{runtime: runtime, year: 2026}
		a := &assembler{max: 4096}
		emit := func(line []byte, cut bool) error {
			return p.parse(line, cut, func(text []byte, cut bool, at time.Time) error {
				return q.line(text, cut, at, func(s string) error {
					if len(s) > maxLine || neutral.Line(s) != s {
						t.Fatalf("%q", s)
					}
					return nil
				})
			})
		}
		must(t, errors.Join(a.feed(data, emit), a.flush(emit)))
	})
}
