package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// kubeBinaries is the folder that make kube fills.
func kubeBinaries() string {
	if dir := os.Getenv("HALLIGAN_KUBE"); dir != "" {
		return dir
	}
	return "../../../bin/kube"
}

// needKube skips the test where make kube was never run. Where the binaries are
// promised, as by make test, they must be there.
func needKube(t testing.TB) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(kubeBinaries(), "kube-apiserver")); err != nil {
		if os.Getenv("HALLIGAN_KUBE") != "" {
			t.Fatalf("HALLIGAN_KUBE: %v", err)
		}
		t.Skipf("no real control plane to test with; build it with make kube: %v", err)
	}
}

func kubeOptions(dir, network string) Options {
	o := options(dir, network)
	o.Objects, o.Nodes, o.QuotaBytes, o.Kube = 0, 3, demoQuota, &KubeOptions{Binaries: kubeBinaries()}
	return o
}

func everyKubeOption(dir, network string) Options {
	o := kubeOptions(dir, network)
	o.Objects = 150
	o.Kube = &KubeOptions{Binaries: kubeBinaries(), APIServers: 2, Procs: 1, MaxInFlight: 40, NoFlowControl: true, Encrypt: true, Audit: true}
	return o
}

// shared is the lab with a real control plane that most tests use.
var shared struct {
	once sync.Once
	dir  string
	lab  *Lab
	err  error
}

// sharedKube returns it. TestMain ends it.
func sharedKube(t testing.TB) *Lab {
	t.Helper()
	needKube(t)
	shared.once.Do(func() {
		// Sockets have short names only.
		if shared.dir, shared.err = os.MkdirTemp("", "kube"); shared.err != nil {
			return
		}
		o := kubeOptions(filepath.Join(shared.dir, "lab"), network())
		o.Kube.Encrypt = true
		shared.lab, shared.err = Up(context.Background(), o)
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.lab
}

func closeShared() {
	if shared.lab != nil {
		shared.lab.Close()
	}
	if shared.dir != "" {
		os.RemoveAll(shared.dir)
	}
}

// kubectl runs it with a kubeconfig and returns what it printed.
func (k *Kube) kubectl(ctx context.Context, config, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	argv := append(append(k.Kubectl(), "--kubeconfig", config), args...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}

func TestKubeLivesDiesAndComesBack(t *testing.T) {
	needKube(t)
	t.Parallel()
	base, err := os.MkdirTemp("", "kube")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	dir, network := filepath.Join(base, "lab"), network()
	// sh runs a line as somebody who has sourced the lab's file.
	sh := func(t *testing.T, line string) string {
		t.Helper()
		out, err := exec.Command("sh", "-ec", `. "$0/env"; PATH="$1:$PATH"; `+line, dir, kubeBinaries()).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
		return string(out)
	}
	began := time.Now()
	cmd := startLab(t, "kube lab", dir, network)
	t.Logf("ready after %s", since(began))

	t.Run("environment", func(t *testing.T) {
		if out := sh(t, `kubectl get nodes -o name`); strings.Count(out, "node/worker-") != 3 {
			t.Errorf("nodes: %s", out)
		}
		if out := sh(t, `kubectl --context cp-2 get pods -n shop -l app=web --field-selector status.phase=Running -o name`); strings.Count(out, "pod/web-") != 3 {
			t.Errorf("pods at the second API server: %s", out)
		}
		if out := sh(t, `kubectl get configmaps -n telemetry -l app=runaway -o name`); strings.Count(out, "configmap/") != 150 {
			t.Errorf("ConfigMaps: %s", out)
		}
	})
	t.Run("options", func(t *testing.T) {
		if out := sh(t, `kubectl --kubeconfig "$KUBECONFIG_ADMIN" get --raw /debug/api_priority_and_fairness/dump_priority_levels 2>&1 || true`); !strings.Contains(out, "NotFound") {
			t.Errorf("flow control is on: %s", out)
		}
		audit, err := os.ReadFile(filepath.Join(dir, "log", "audit-cp-1.log"))
		if err != nil || !strings.Contains(string(audit), `"username":"alice"`) {
			t.Errorf("the audit log does not have alice: %v", err)
		}
		_, argv, environment := processWith(t, filepath.Join(dir, "log", "audit-cp-1.log"))
		if !strings.Contains(argv, "--max-requests-inflight=40 --max-mutating-requests-inflight=20") || !strings.Contains(environment, "GOMAXPROCS=1 ") {
			t.Errorf("%s\n%s", argv, environment)
		}
	})
	t.Run("an API server killed", func(t *testing.T) {
		second := filepath.Join(dir, "log", "audit-cp-2.log")
		before, _, _ := processWith(t, second)
		if err := syscall.Kill(before, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is started again", func() bool {
			out, err := exec.Command("sh", "-ec", `. "$0/env"; "$1/kubectl" --kubeconfig "$KUBECONFIG_ADMIN" --context cp-2 get --raw /readyz`, dir, kubeBinaries()).Output()
			return err == nil && string(out) == "ok"
		})
		if now, _, _ := processWith(t, second); now == before {
			t.Error("it was not killed")
		}
	})
	t.Run("killed", func(t *testing.T) {
		// Seen again after the lab came back.
		sh(t, `kubectl create configmap kept -n shop --from-literal=a=b`)
		cmd.Process.Kill()
		cmd.Wait()
		eventually(t, "nothing is left", func() bool { return len(children(t, dir)) == 0 })
	})
	t.Run("again", func(t *testing.T) {
		began := time.Now()
		cmd := startLab(t, "kube lab", dir, network)
		t.Logf("ready after %s", since(began))
		if out := sh(t, `kubectl get configmap kept -n shop -o jsonpath={.data.a}`); out != "b" {
			t.Errorf("got %q", out)
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("after SIGTERM: %v", err)
		}
		if left := children(t, dir); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

// processWith returns the process that has the file's name in its command line,
// that, and its environment.
func processWith(t *testing.T, file string) (pid int, argv, environment string) {
	t.Helper()
	for _, pid = range children(t, filepath.Dir(file)) {
		read := func(what string) string {
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, what))
			if err != nil {
				t.Fatal(err)
			}
			return strings.ReplaceAll(string(data), "\x00", " ")
		}
		if argv = read("cmdline"); strings.Contains(argv, file) {
			return pid, argv, read("environ")
		}
	}
	t.Fatalf("no process has %s in its command line", file)
	return 0, "", ""
}

func TestKubeIdentities(t *testing.T) {
	l := sharedKube(t)
	k := l.Kube()
	t.Run("rights", func(t *testing.T) {
		for _, c := range []struct {
			config string
			can    string
			want   string
		}{
			{k.UserKubeconfig(), "patch deployments.apps -n shop", "yes"},
			{k.UserKubeconfig(), "list nodes", "yes"},
			{k.UserKubeconfig(), "delete nodes", "no"},
			{k.UserKubeconfig(), "create clusterrolebindings", "no"},
			{k.AdminKubeconfig(), "* *", "yes"},
		} {
			// It exits 1 after no.
			if out, _ := k.kubectl(t.Context(), c.config, "", append([]string{"auth", "can-i"}, strings.Fields(c.can)...)...); strings.TrimSpace(out) != c.want {
				t.Errorf("%s: can %s: %s", filepath.Base(c.config), c.can, out)
			}
		}
	})
	// The API server names the level of a request in a header of the answer.
	t.Run("flow control", func(t *testing.T) {
		for config, want := range map[string]string{k.UserKubeconfig(): "global-default", k.AdminKubeconfig(): "exempt"} {
			if got := levelOf(t, k, config); got != want {
				t.Errorf("%s is in %s, want %s", filepath.Base(config), got, want)
			}
		}
	})
	t.Run("pods have loopback addresses", func(t *testing.T) {
		out, err := k.kubectl(t.Context(), k.UserKubeconfig(), "", "get", "pods", "-n", "shop", "-l", "app=web", "-o", "jsonpath={.items[*].status.podIP}")
		if err != nil || len(strings.Fields(out)) != 3 {
			t.Fatalf("%q, %v", out, err)
		}
		for _, ip := range strings.Fields(out) {
			if a := net.ParseIP(ip); a == nil || !a.IsLoopback() {
				t.Errorf("%s", ip)
			}
		}
	})
}

func levelOf(t *testing.T, k *Kube, kubeconfig string) string {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	r, err := client.Get(config.Host + "/api/v1/namespaces/shop/configmaps")
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != http.StatusOK {
		t.Fatal(r.Status)
	}
	uid := r.Header.Get("X-Kubernetes-Pf-Prioritylevel-Uid")
	out, err := k.kubectl(t.Context(), k.AdminKubeconfig(), "", "get", "prioritylevelconfigurations", "-o", "jsonpath={.items[?(@.metadata.uid=='"+uid+"')].metadata.name}")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestKubeWhatCannotStart(t *testing.T) {
	needKube(t)
	t.Run("no binaries", func(t *testing.T) {
		o := kubeOptions(t.TempDir(), network())
		o.Kube.Binaries = t.TempDir()
		_, err := Up(t.Context(), o)
		if err == nil || !strings.Contains(err.Error(), "make kube") || !strings.Contains(err.Error(), "kube-apiserver") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("port taken", func(t *testing.T) {
		o := kubeOptions(t.TempDir(), network())
		taken, err := net.Listen("tcp", o.Net+".11:6443")
		if err != nil {
			t.Fatal(err)
		}
		defer taken.Close()
		_, err = Up(t.Context(), o)
		if err == nil || !strings.Contains(err.Error(), o.Net+".11:6443 is taken") || !strings.Contains(err.Error(), "--net") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("too many API servers", func(t *testing.T) {
		o := kubeOptions(t.TempDir(), network())
		o.Kube.APIServers = 4
		if _, err := Up(t.Context(), o); err == nil || !strings.Contains(err.Error(), "--apiservers") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("folder of a lab without it", func(t *testing.T) {
		o := kubeOptions(t.TempDir(), network())
		note, err := json.Marshal(Seeded{Objects: 800})
		if err != nil {
			t.Fatal(err)
		}
		for name, data := range map[string][]byte{"lock": nil, "seeded.json": note} {
			if err := os.WriteFile(filepath.Join(o.Dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Up(t.Context(), o); err == nil || !strings.Contains(err.Error(), "another folder") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a server that ends", func(t *testing.T) {
		t.Parallel()
		o := kubeOptions(filepath.Join(t.TempDir(), "lab"), network())
		real, err := filepath.Abs(o.Kube.Binaries)
		if err != nil {
			t.Fatal(err)
		}
		o.Kube.Binaries = t.TempDir()
		for _, name := range []string{managerName, schedulerName, kubectlName, kwokName, stagesName} {
			if err := os.Symlink(filepath.Join(real, name), filepath.Join(o.Kube.Binaries, name)); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(o.Kube.Binaries, "kube-apiserver"), []byte("#!/bin/sh\necho the disk is made of cheese; exit 3\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := Up(t.Context(), o); err == nil || !strings.Contains(err.Error(), "made of cheese") {
			t.Errorf("got %v", err)
		}
		if left := children(t, o.Dir); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}
