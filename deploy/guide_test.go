package deploy_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	k8sruntime "k8s.io/apimachinery/pkg/runtime"

	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/internal/etcdcluster"
)

// inside names the folder of a guide's run, in the process that has a network
// of its own.
const inside = "HALLIGAN_TEST_GUIDE"

// blockTimeout bounds one block of the guide on one machine.
const blockTimeout = 60 * time.Second

// block is one piece of the guide: what to run where, and what it shows.
type block struct {
	line          int
	where, script string
	shows         []string
}

// guide reads the blocks that are run, and the table of machines.
func guide(t *testing.T) (blocks []block, addresses map[string]string) {
	t.Helper()
	fence, row := regexp.MustCompile("^```(\\w*) ?(.*)$"), regexp.MustCompile(`^\| ([a-z0-9-]+) \| (\d+\.\d+\.\d+\.\d+) \|`)
	addresses = map[string]string{}
	kind, where, text, began := "", "", "", 0
	n := 0
	for line := range strings.Lines(read(t, "README.md")) {
		n++
		m := fence.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		switch {
		case m == nil && began == 0:
			if r := row.FindStringSubmatch(line); r != nil {
				addresses[r[1]] = r[2]
			}
		case m == nil:
			text += line
		case began == 0:
			kind, where, text, began = m[1], m[2], "", n
		default:
			switch {
			case kind == "sh" && where != "":
				blocks = append(blocks, block{line: began, where: where, script: text})
			case kind == "text" && len(blocks) > 0:
				blocks[len(blocks)-1].shows = strings.Split(strings.TrimSpace(text), "\n")
			default:
				t.Errorf("README.md:%d: a block that nobody tries: %s %s", began, kind, where)
			}
			began = 0
		}
	}
	if len(blocks) < 20 || len(addresses) != 5 {
		t.Fatalf("%d blocks, machines %v", len(blocks), addresses)
	}
	return blocks, addresses
}

// TestGuide does what the guide says, on machines made of namespaces.
func TestGuide(t *testing.T) {
	if dir := os.Getenv(inside); dir != "" {
		follow(t, dir)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make machines of namespaces")
	}
	dir := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-o", filepath.Join(dir, "bin")+"/", "../cmd/halligan", "../cmd/halligan-agent", "../cmd/halligan-bastion")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "--net", "--mount", "--propagation", "private", "--", self, "-test.run", "^TestGuide$", "-test.timeout", "3m")
	cmd.Env = append(os.Environ(), inside+"="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func follow(t *testing.T, dir string) {
	blocks, addresses := guide(t)
	shell(t, "ip link set lo up && ip link add hal0 type bridge && ip addr add 192.0.2.1/24 dev hal0 && ip link set hal0 up")
	stick := filepath.Join(dir, "stick")
	if err := os.Mkdir(stick, 0o755); err != nil {
		t.Fatal(err)
	}
	etcd := etcdcluster.ForTest(t, 3)
	seed(t, etcd)

	machines := map[string]*machine{}
	for name, address := range addresses {
		machines[name] = newMachine(t, dir, name, address)
	}
	machines["offline"] = newMachine(t, dir, "offline", "")
	machines["laptop"] = newMachine(t, dir, "laptop", "192.0.2.100")
	machines["build"] = newMachine(t, dir, "build", "")
	groups := map[string][]string{"nodes": nil, "bastions": nil}
	for _, name := range slices.Sorted(maps.Keys(addresses)) {
		group := "nodes"
		if strings.HasPrefix(name, "bastion-") {
			group = "bastions"
		}
		groups[group] = append(groups[group], name)
	}
	groups["all"] = slices.Concat(groups["nodes"], groups["bastions"])
	groups["each"] = groups["all"]
	for i, name := range groups["nodes"] {
		kubeadm(t, machines[name], etcd, i)
		// The firewall: people reach no node but through a bastion.
		machines[name].run(t, "ip route add blackhole 192.0.2.100")
	}
	// A copy of the repository whose programs are built already.
	repository := filepath.Join(dir, "repository")
	shell(t, fmt.Sprintf("mkdir %[1]s && cp -r . %[1]s/deploy && cp -r %[2]s/bin %[1]s/bin", repository, dir))
	machines["build"].run(t, "cd "+repository+"\nmake() { :; }")

	for _, b := range blocks {
		names := groups[b.where]
		if names == nil {
			names = []string{b.where}
		}
		done := map[string]string{}
		for _, name := range names { // all at once
			m := machines[name]
			if m == nil {
				t.Fatalf("README.md:%d: there is no machine %q", b.line, name)
			}
			script := b.script
			if b.where == "each" {
				script = strings.NewReplacer("cp-1", name, addresses["cp-1"], addresses[name]).Replace(script)
			}
			done[name] = m.start(t, script)
		}
		for _, name := range names {
			shown := machines[name].until(t, done[name], b.line)
			t.Logf("README.md:%d, %s:\n%s", b.line, name, shown)
			for _, want := range b.shows {
				if !pattern(want).MatchString(squeeze(shown)) {
					t.Errorf("README.md:%d: on %s it does not show %q", b.line, name, want)
				}
			}
		}
	}
	// Whoever watches over them has heard of all that.
	machines["cp-1"].alarm(t, "login: alice (responder) at ssh")
	machines["bastion-a"].alarm(t, "not relayed: no node of the bundle's inventory")
}

// pattern is a line of what is shown, in which … stands for anything.
func pattern(line string) *regexp.Regexp {
	return regexp.MustCompile(`(?m)^` + strings.ReplaceAll(regexp.QuoteMeta(squeeze(line)), "…", ".*") + `$`)
}

// squeeze makes columns narrow.
func squeeze(s string) string {
	return regexp.MustCompile(`(?m)^ +| +$`).ReplaceAllString(regexp.MustCompile(` {2,}`).ReplaceAllString(s, " "), "")
}

func shell(t *testing.T, script string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "sh", "-ec", script).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// machine is a shell in namespaces of its own. It ends when its standard input
// does, and with it all that it started.
type machine struct {
	name, scratch string
	pid           int
	stdin         io.Writer
	lines         chan string
	blocks        int
	syslog        *net.UnixConn
}

func newMachine(t *testing.T, dir, name, address string) *machine {
	t.Helper()
	m := &machine{name: name, scratch: filepath.Join(dir, "machines", name), lines: make(chan string, 1024)}
	if err := os.MkdirAll(m.scratch, 0o755); err != nil {
		t.Fatal(err)
	}
	init, err := filepath.Abs("testdata/machine")
	if err != nil {
		t.Fatal(err)
	}
	if m.syslog, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(m.scratch, "log"), Net: "unixgram"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.syslog.Close() })
	if err := os.Chmod(filepath.Join(m.scratch, "log"), 0o666); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--fork", "--kill-child", "--pid", "--mount", "--net", "--uts", "--ipc", "--propagation", "private", "--",
		"bash", "--norc", "-c", `exec 2>&1; . "$0"; while read -r file; do . "$file" </dev/null; echo "done $file"; done`, init, name, filepath.Join(dir, "stick"), m.scratch)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var reading sync.WaitGroup
	reading.Go(func() {
		defer close(m.lines)
		for s := bufio.NewScanner(stdout); s.Scan(); {
			m.lines <- s.Text()
		}
	})
	t.Cleanup(func() {
		cmd.Process.Kill()
		for range m.lines { // so that the reader ends
		}
		reading.Wait()
		_ = cmd.Wait() // killed
		if t.Failed() {
			logs, _ := filepath.Glob(filepath.Join(m.scratch, "*.log"))
			for _, log := range logs {
				text, _ := os.ReadFile(log)
				t.Logf("%s of %s:\n%s", filepath.Base(log), name, text)
			}
		}
	})
	m.stdin, m.pid = stdin, cmd.Process.Pid
	m.until(t, "ready", 0)
	if address != "" {
		link := fmt.Sprintf("hal-%d", m.pid)
		shell(t, fmt.Sprintf("ip link add %[1]s type veth peer name eth0 netns %[2]d && ip link set %[1]s master hal0 up", link, m.pid))
		m.run(t, "ip addr add "+address+"/24 dev eth0; ip link set eth0 up")
	}
	return m
}

// alarm waits for a line in the machine's syslog.
func (m *machine) alarm(t *testing.T, want string) {
	t.Helper()
	if err := m.syslog.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var all []string
	for text := make([]byte, 8<<10); ; {
		n, err := m.syslog.Read(text)
		if err != nil {
			t.Fatalf("the syslog of %s has %q, and not %q: %v", m.name, all, want, err)
		}
		if all = append(all, string(text[:n])); strings.Contains(all[len(all)-1], want) {
			return
		}
	}
}

// run has the shell take the script, and waits for it.
func (m *machine) run(t *testing.T, script string) {
	t.Helper()
	m.until(t, m.start(t, script), 0)
}

// start has the shell take the script, and returns the line that it shows after
// it. A line that begins with ! must fail, which sh -e does not look at.
func (m *machine) start(t *testing.T, script string) (last string) {
	t.Helper()
	m.blocks++
	file := filepath.Join(m.scratch, fmt.Sprintf("block-%d.sh", m.blocks))
	script = regexp.MustCompile(`(?m)^! (.*)$`).ReplaceAllString(script, "if $1; then echo 'this should have failed: $1'; exit 1; fi")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _ = fmt.Fprintln(m.stdin, file) // a shell that has ended tells why below
	return "done " + file
}

// until collects what is shown before a line.
func (m *machine) until(t *testing.T, last string, line int) (shown string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), blockTimeout)
	defer cancel()
	for {
		select {
		case text, ok := <-m.lines:
			switch {
			case !ok:
				t.Fatalf("README.md:%d: it fails on %s:\n%s", line, m.name, shown)
			case text == last:
				return shown
			}
			shown += text + "\n"
		case <-ctx.Done():
			t.Fatalf("README.md:%d: it takes over %v on %s:\n%s", line, blockTimeout, m.name, shown)
		}
	}
}

// kubeadm makes the machine look like a control-plane node, whose etcd member is
// reached at its usual address.
func kubeadm(t *testing.T, m *machine, etcd *etcdcluster.Cluster, member int) {
	t.Helper()
	var pod = func(name, flags string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - name: %s\n    command: [%s, %s]\n", name, name, flags)
	}
	files := map[string]string{
		"manifests/etcd.yaml":           pod("etcd", "--listen-client-urls=https://127.0.0.1:2379"),
		"manifests/kube-apiserver.yaml": pod("kube-apiserver", "--etcd-servers=https://127.0.0.1:2379"),
	}
	for name, file := range map[string]string{"ca.crt": etcd.CAFile(), "healthcheck-client.crt": etcd.CertFile(), "healthcheck-client.key": etcd.KeyFile()} {
		files["pki/etcd/"+name] = read(t, file)
	}
	from := filepath.Join(m.scratch, "kubernetes")
	for name, text := range files {
		path := filepath.Join(from, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.run(t, "cp -r "+from+" /etc/kubernetes")

	l := listenIn(t, m.pid, "127.0.0.1:2379")
	var serving sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
	target := strings.TrimPrefix(etcd.Endpoints()[member], "https://")
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go carry(c, target)
		}
	})
}

func carry(c net.Conn, target string) {
	defer c.Close()
	d, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer d.Close()
	go func() {
		defer d.Close()
		_, _ = io.Copy(d, c)
	}()
	_, _ = io.Copy(c, d)
}

// listenIn listens in the network namespace of a process.
func listenIn(t *testing.T, pid int, address string) net.Listener {
	t.Helper()
	type result struct {
		net.Listener
		error
	}
	results := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with this
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err == nil {
			defer ns.Close()
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		}
		if err != nil {
			results <- result{error: err}
			return
		}
		l, err := net.Listen("tcp", address)
		results <- result{l, err}
	}()
	r := <-results
	if r.error != nil {
		t.Fatal(r.error)
	}
	return r.Listener
}

// seed writes the workload of which the guide makes a plan.
func seed(t *testing.T, etcd *etcdcluster.Cluster) {
	t.Helper()
	client, err := etcd.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	labels := map[string]string{"app": "collector"}
	put := func(key string, object k8sruntime.Object) {
		value, err := storage.EncodeTyped(object)
		if err == nil {
			_, err = client.Put(t.Context(), key, string(value))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	put("/registry/namespaces/telemetry", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "telemetry", UID: "5a0f3c0c-5b1d-4c44-9d0a-20c5e9b0a511", CreationTimestamp: metav1.Now()}})
	put("/registry/daemonsets/telemetry/collector", &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "collector", Namespace: "telemetry", UID: "0b1f0f2e-7a53-4a53-9d0b-5a3a7c1f9d10", CreationTimestamp: metav1.Now()},
		Spec: appsv1.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "collector", Image: "registry.example/collector:1"}}}}}})
}
