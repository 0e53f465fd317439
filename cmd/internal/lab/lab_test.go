package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/halligan-io/halligan/agent"
	"github.com/halligan-io/halligan/bastion"
	"github.com/halligan-io/halligan/bastion/store"
	"github.com/halligan-io/halligan/cmd/internal/cli"
	"github.com/halligan-io/halligan/internal/daemonlog"
)

// TestMain lets this test's own binary be the agent, or a whole lab, so that
// the tests need no other build.
func TestMain(m *testing.M) {
	store.Child()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var err error
	switch os.Getenv("LAB_TEST_AS") {
	case "bastion":
		err = beBastion(ctx, os.Args[len(os.Args)-1])
	case "agent":
		err = beAgent(ctx, os.Args[len(os.Args)-1])
	case "halligan":
		os.Exit(cli.Main())
	case "lab":
		err = beLab(ctx, options(os.Args[1], os.Args[2]))
	case "kube lab":
		err = beLab(ctx, everyKubeOption(os.Args[1], os.Args[2]))
	default:
		stop()
		code := m.Run()
		closeShared()
		os.Exit(code)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func beAgent(ctx context.Context, config string) error {
	c, _, distribution, err := agent.LoadConfig(config)
	if err != nil {
		return err
	}
	log, err := daemonlog.New(os.Stderr, c.LogLevel, c.Node)
	if err != nil {
		return err
	}
	return agent.Run(ctx, c, distribution, log)
}

func beBastion(ctx context.Context, config string) error {
	c, err := bastion.LoadConfig(config)
	if err != nil {
		return err
	}
	log, err := daemonlog.New(os.Stderr, c.LogLevel, c.Name)
	if err != nil {
		return err
	}
	return bastion.Run(ctx, c, log)
}

func beLab(ctx context.Context, o Options) error {
	l, err := Up(ctx, o)
	if err != nil {
		return err
	}
	defer l.Close()
	fmt.Println("ready", o.Dir)
	return l.Wait(ctx)
}

func options(dir, network string) Options {
	return Options{Dir: dir, Net: network, Objects: 800, Nodes: 2, Agent: as("agent"), Bastion: as("bastion"), Halligan: as("halligan")}
}

// as is the command line that makes this binary something else.
func as(what string) []string { return []string{"/usr/bin/env", "LAB_TEST_AS=" + what, os.Args[0]} }

// networks counts the labs of this process.
var networks atomic.Int32

// network returns the beginning of addresses that no other lab is likely to
// use.
func network() string {
	n := os.Getpid()*8 + int(networks.Add(1))
	return fmt.Sprintf("127.%d.%d", 100+n/250%150, n%250)
}

// startLab runs a lab in a process of its own and waits until it is ready.
func startLab(t *testing.T, what, dir, network string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], dir, network)
	cmd.Env = append(os.Environ(), "LAB_TEST_AS="+what)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready "+dir+"\n" {
		t.Fatalf("the lab said %q, %v", line, err)
	}
	return cmd
}

// children returns the processes whose command line names the folder.
func children(t *testing.T, dir string) []int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, f := range files {
		line, err := os.ReadFile(f)
		if pid, perr := strconv.Atoi(filepath.Base(filepath.Dir(f))); perr == nil && err == nil && strings.Contains(string(line), dir+"/") {
			pids = append(pids, pid)
		}
	}
	return pids
}

func TestLabLivesDiesAndComesBack(t *testing.T) {
	t.Parallel()
	dir, network := filepath.Join(t.TempDir(), "lab"), network()
	cmd := startLab(t, "lab", dir, network)

	t.Run("environment", func(t *testing.T) {
		out, err := exec.Command("sh", "-ec", `. "$0/env"; . "$0/env.console"; echo "$ETCDCTL_ENDPOINTS $HALLIGAN_SOCKET"; cat "$ETCDCTL_CACERT" "$ETCDCTL_CERT" "$ETCDCTL_KEY" >/dev/null`, dir).CombinedOutput()
		want := fmt.Sprintf("https://%[1]s.11:2379,https://%[1]s.12:2379,https://%[1]s.13:2379 %[2]s/cp-1/console.sock\n", network, dir)
		if err != nil || string(out) != want {
			t.Errorf("got %q, %v, want %q", out, err, want)
		}
		if st, err := os.Stat(filepath.Join(dir, "cp-3", "console.sock")); err != nil || st.Mode().Type() != os.ModeSocket {
			t.Errorf("console of cp-3: %v, %v", st, err)
		}
	})
	t.Run("same folder", func(t *testing.T) {
		_, err := Up(t.Context(), options(dir, network))
		if err == nil || !strings.Contains(err.Error(), "a lab runs in "+dir) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("same addresses", func(t *testing.T) {
		fresh := filepath.Join(t.TempDir(), "fresh")
		_, err := Up(t.Context(), options(fresh, network))
		if _, there := os.Stat(fresh); there == nil {
			t.Error("a refused lab leaves its folder behind")
		}
		if err == nil || !strings.Contains(err.Error(), network+".1") || !strings.Contains(err.Error(), "is taken") || !strings.Contains(err.Error(), "--net") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("daemon killed", func(t *testing.T) {
		before := children(t, dir)
		if len(before) != controlNodes+bastionHosts {
			t.Fatalf("%d daemons", len(before))
		}
		if err := syscall.Kill(before[0], syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is started again", func() bool {
			now := children(t, dir)
			return len(now) == controlNodes+bastionHosts && fmt.Sprint(now) != fmt.Sprint(before)
		})
	})
	t.Run("killed", func(t *testing.T) {
		cmd.Process.Kill()
		cmd.Wait()
		eventually(t, "nothing is left", func() bool { return len(children(t, dir)) == 0 })
	})
	t.Run("again", func(t *testing.T) {
		cmd := startLab(t, "lab", dir, network)
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("after SIGTERM: %v", err)
		}
		if left := children(t, dir); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		if _, err := net.DialTimeout("tcp", network+".11:2379", time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("etcd still there: %v", err)
		}
	})
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not seen: %s", what)
		}
	}
}

func TestForeignFolderIsRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "thesis.txt"), []byte("years of work"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Up(t.Context(), options(dir, network())); err == nil || !strings.Contains(err.Error(), "not a lab's") {
		t.Errorf("got %v", err)
	}
}

func TestAgentThatDoesNotStart(t *testing.T) {
	t.Parallel()
	o := options(filepath.Join(t.TempDir(), "lab"), network())
	o.Objects = 0
	o.Agent = []string{"/bin/sh", "-c", "echo the disk is made of cheese; exit 3"}
	_, err := Up(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "made of cheese") {
		t.Errorf("got %v", err)
	}
}

func TestBadNet(t *testing.T) {
	for _, n := range []string{"10.0.0", "127.0", "127.0.0.1", "x"} {
		o := options(t.TempDir(), n)
		if _, err := Up(t.Context(), o); err == nil || !strings.Contains(err.Error(), "loopback") {
			t.Errorf("%s: got %v", n, err)
		}
	}
}

func TestExportsQuote(t *testing.T) {
	value := `a'b "c" $d`
	out, err := exec.Command("sh", "-c", string(exports("X", value))+`printf %s "$X"`).Output()
	if err != nil || string(out) != value {
		t.Errorf("got %q, %v", out, err)
	}
}
