package netlab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// lossBound is what a lost bastion may cost a responder here, where the machine
// may be as busy as in the outage.
const lossBound = 15 * time.Second

// TestOutage: without any name service, through bastions of which either may die,
// be cut off or be far away.
func TestOutage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	t.Run("nobody resolves names", w.nameless)
	t.Run("commands", w.commands)
	t.Run("killed in mid-session", w.killedInSession)
	t.Run("killed in mid-read", w.killedInRead)
	t.Run("killed in mid-action", w.killedInAction)
	t.Run("bastion cut off from nodes", w.partition)
	t.Run("bastion cut off from responders", w.unreachable)
	t.Run("log rolled back", w.rolledBack)
	t.Run("stores gone", w.storeless)
	t.Run("slow link", w.slow)
}

// nameless makes sure of the stage: no name leads anywhere, the responder reaches
// bastions only.
func (w *world) nameless(t *testing.T) {
	for i := range nodeNames {
		if c, err := w.dial("resp", fmt.Sprintf("%s:%d", nodeAddress(i), sshPort)); err == nil {
			c.Close()
			t.Errorf("the responder reaches %s", nodeNames[i])
		}
	}
	for _, space := range append(append([]string{"resp"}, bastionNames...), nodeNames...) {
		if c, err := w.dial(space, nowhere+":53"); !errors.Is(err, syscall.ENETUNREACH) {
			if err == nil {
				c.Close()
			}
			t.Errorf("from %s to a name server: %v", space, err)
		}
		if r := w.from(space, "", "getent", "hosts", "bastion-a.bastion"); r.status == 0 {
			t.Errorf("%s resolves names: %v", space, r)
		}
	}
}

// commands: the three through either bastion.
func (w *world) commands(t *testing.T) {
	for i, bastion := range bastionNames {
		t.Run(bastion, func(t *testing.T) {
			jump := fmt.Sprintf("%s:%d", bastionAddress(i), sshPort)
			for _, node := range nodeNames {
				if r := w.ssh("-J", jump, node, "whoami").ok(t); !strings.Contains(r.out, "ada") {
					t.Error(r)
				}
			}
			if r := w.halligan("--bastion", bastion, "status", "--cluster", "prod").ok(t); strings.Count(r.out, ".prod") < len(nodeNames) {
				t.Error(r)
			}
			name := "web-" + bastion
			key := w.deployment(name)
			if r := w.halligan("--bastion", bastionAddress(i), "scale", "deploy/"+name, "-n", "shop", "--to", "0", "--yes", "-o", "json").ok(t); r.result(t).Result != "applied" {
				t.Error(r)
			}
			if n := w.written(key); n != 2 {
				t.Errorf("written %d times", n)
			}
			w.grpcurl(t, i)
		})
	}
	if r := w.halligan("status", "--cluster", "prod").ok(t); strings.Count(r.out, ".prod") < len(nodeNames) {
		t.Error(r)
	}
}

// grpcurl asks an agent through a local forward of stock ssh.
func (w *world) grpcurl(t *testing.T, bastion int) {
	grpcurl := os.Getenv("HALLIGAN_GRPCURL")
	if grpcurl == "" {
		t.Log("HALLIGAN_GRPCURL names no grpcurl: run make test")
		return
	}
	const here = "127.0.0.1:17443"
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	forward := w.command(ctx, "resp", w.environment(), "ssh", "-F", w.file("ssh_config"), "-N", "-oExitOnForwardFailure=yes", "-L", here+":cp-2:7443", bastionAddress(bastion))
	if err := forward.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = forward.Process.Kill()
		_ = forward.Wait()
	}()
	w.opens("resp", "127.0.0.1", 17443)
	r := w.from("resp", "", grpcurl, "-cacert", w.file("ca.crt"), "-cert", w.file("robot.crt"), "-key", w.file("robot.key"), "-servername", "cp-2.prod", here, "halligan.v1.Agent/Status").ok(t)
	var status struct{ Node string }
	if err := json.Unmarshal([]byte(r.out), &status); err != nil || status.Node != "cp-2" {
		t.Errorf("%v: %v", err, r)
	}
	if r := w.from("resp", "", grpcurl, "-cacert", w.file("ca.crt"), "-cert", w.file("robot.crt"), "-key", w.file("robot.key"), "-servername", "cp-1.prod", here, "halligan.v1.Agent/Status"); r.status == 0 {
		t.Errorf("cp-2 passes for cp-1: %v", r)
	}
}

// killedInSession: stock ssh loses its shell, and has another one in seconds.
func (w *world) killedInSession(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	shell := w.command(ctx, "resp", w.environment(), "ssh", "-F", w.file("ssh_config"), "-J", bastionAddress(0), "cp-1")
	in := must(shell.StdinPipe())
	out := must(shell.StdoutPipe())
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	defer func() {
		cancel()
		<-ended
	}()
	lines := bufio.NewReader(out)
	_, _ = io.WriteString(in, "whoami\n")
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatal("no answer in the shell")
		}
		if strings.Contains(line, "ada") {
			break
		}
	}
	w.bastions[0].kill()
	restart := sync.OnceFunc(func() { w.startBastion(0) })
	defer restart()
	began := time.Now()
	go func() {
		_, _ = io.Copy(io.Discard, lines)
		ended <- shell.Wait()
	}()
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 255 {
			t.Errorf("the shell ended with %v", err)
		}
		ended <- nil
	case <-time.After(lossBound):
		t.Fatal("the shell hangs")
	}
	w.ssh("-J", bastionAddress(1), "cp-1", "whoami").ok(t)
	w.halligan("get", "deploy", "-n", "shop").ok(t)
	if took := time.Since(began); took > lossBound {
		t.Errorf("back after %v", took)
	}
	if r := w.halligan("--bastion", "bastion-a", "status"); r.status != 8 || !strings.Contains(r.errs, "bastion-a.bastion") {
		t.Errorf("status 8 is due: %v", r)
	}
	restart()
	w.ssh("-J", bastionAddress(0), "cp-1", "whoami").ok(t)
}

// distant makes every member of etcd that far away, so that there is a middle to
// what agents do.
func (w *world) distant(delay time.Duration) {
	for _, c := range w.toEtcd {
		c.back.Store(int64(delay))
	}
}

// background runs our command without waiting for its end.
func (w *world) background(args ...string) <-chan run {
	ended := make(chan run, 1)
	go func() { ended <- w.halligan(args...) }()
	return ended
}

// killedInRead: what only reads is read again through the other bastion.
func (w *world) killedInRead(t *testing.T) {
	w.idle()
	w.distant(500 * time.Millisecond)
	defer w.distant(0)
	reading := w.background("--node", "cp-1", "get", "deploy", "-n", "shop")
	i := w.serving()
	w.bastions[i].kill()
	defer w.startBastion(i)
	began := time.Now()
	r := (<-reading).ok(t)
	if !strings.Contains(r.out, "web-bastion-a") || time.Since(began) > lossBound {
		t.Errorf("%v after %s was killed: %v", time.Since(began), bastionNames[i], r)
	}
}

// killedInAction: etcd has the change and the agent does not know it yet when the
// bastion dies; the responder is told what became of it, and it is done once.
func (w *world) killedInAction(t *testing.T) {
	w.idle()
	key := w.deployment("collector")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	changes := w.eye.Watch(ctx, key)
	w.distant(300 * time.Millisecond)
	defer w.distant(0)
	acting := w.background("scale", "deploy/collector", "-n", "shop", "--to", "0", "--yes", "-o", "json")
	if _, seen := <-changes; !seen {
		t.Fatal("nothing changes")
	}
	i := w.serving()
	w.bastions[i].kill()
	defer w.startBastion(i)
	began := time.Now()
	w.distant(0)
	r := (<-acting).ok(t)
	got := r.result(t)
	if got.Result != "applied" || time.Since(began) > lossBound {
		t.Errorf("%v after %s was killed: %v", time.Since(began), bastionNames[i], r)
	}
	if n := w.written(key); n != 2 {
		t.Errorf("written %d times", n)
	}
	history := w.halligan("history").ok(t)
	if strings.Count(history.out, got.Action) != 1 {
		t.Error(history)
	}
}

// partition: a bastion lets people in and reaches no node any more, first while an
// agent is being asked through it, then from the beginning.
func (w *world) partition(t *testing.T) {
	w.idle()
	w.distant(time.Second)
	defer w.distant(0)
	logins := func() int { return strings.Count(w.agents[0].log.String(), `"message":"login"`) }
	before := logins()
	asked := w.background("--node", "cp-1", "get", "deploy", "-n", "shop")
	i := w.serving()
	eventually(t, "the agent lets them in", func() bool { return logins() > before })
	defer w.cut(bastionNames[i], "in")()
	began := time.Now()
	w.distant(0)
	for _, args := range [][]string{{"get", "deploy", "-n", "shop"}, {"--node", "cp-2", "get", "deploy", "-n", "shop"}} {
		if r := w.halligan(args...).ok(t); r.took > lossBound {
			t.Error(r)
		}
	}
	r := w.halligan("--bastion", bastionNames[i], "--node", "cp-2", "get", "deploy", "-n", "shop")
	if r.status != 8 || !strings.Contains(r.errs, "cp-2.prod") || !strings.Contains(r.errs, bastionNames[i]) {
		t.Error(r)
	}
	// A node may be slow to show a sign of life, so this one takes longest.
	if r := (<-asked).ok(t); !strings.Contains(r.out, "web-bastion-a") {
		t.Error(r)
	}
	t.Logf("what was under way ended %v after %s was cut off", time.Since(began), bastionNames[i])
}

// unreachable: packets to a bastion vanish.
func (w *world) unreachable(t *testing.T) {
	for _, bastion := range bastionNames {
		w.idle()
		mend := w.cut(bastion, "out")
		if r := w.halligan("get", "deploy", "-n", "shop").ok(t); r.took > lossBound {
			t.Error(r)
		}
		mend()
	}
}

// storeless: no bastion has its store any more; its process hangs, which is worse
// than none. People come through all the same, and are told.
func (w *world) storeless(t *testing.T) {
	told := func() int { return strings.Count(w.halligan("status").ok(t).errs, "store does not work") }
	eventually(t, "the stores work", func() bool { return told() == 0 })
	for _, b := range w.bastions {
		// proc(5): the children of each of its threads.
		var stores []string
		for _, file := range must(filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", b.cmd.Process.Pid))) {
			stores = append(stores, strings.Fields(string(must(os.ReadFile(file))))...)
		}
		if len(stores) != 1 {
			t.Fatalf("the children of a bastion: %q", stores)
		}
		store := must(strconv.Atoi(stores[0]))
		if err := syscall.Kill(store, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		defer syscall.Kill(store, syscall.SIGCONT)
	}
	for _, bastion := range bastionNames {
		if r := w.halligan("--bastion", bastion, "--node", "cp-2", "get", "deploy", "-n", "shop").ok(t); r.took > lossBound {
			t.Error(r)
		}
	}
	eventually(t, "people are told", func() bool { return told() == len(bastionNames) })
}

// slow: the way to both bastions takes 200 ms in each direction.
func (w *world) slow(t *testing.T) {
	const far = 200 * time.Millisecond
	w.space("far")
	for i := range bastionNames {
		w.ip("far", "addr", "add", bastionAddress(i)+"/32", "dev", "lo")
		at := fmt.Sprintf("%s:%d", bastionAddress(i), sshPort)
		c := &cable{}
		c.there.Store(int64(far))
		c.back.Store(int64(far))
		go c.carry(w.listen("far", at), func() (net.Conn, error) { return w.dial("resp", at) })
	}
	key := w.deployment("remote")
	halligan := func(args ...string) run { return w.from("far", "", append([]string{w.bin + "/halligan"}, args...)...) }
	ended := make(chan run, 3)
	go func() { ended <- halligan("scale", "deploy/remote", "-n", "shop", "--to", "0", "--yes") }()
	go func() { ended <- halligan("status", "--cluster", "prod") }()
	go func() {
		ended <- w.from("far", "", "ssh", "-F", w.file("ssh_config"), "-J", bastionAddress(1), "cp-3", "whoami")
	}()
	for range cap(ended) {
		r := <-ended
		if r.ok(t); r.took < 4*far {
			t.Errorf("the link is not slow: %v", r)
		}
		t.Logf("%v: %v", r.took, r.argv)
	}
	if n := w.written(key); n != 2 {
		t.Errorf("written %d times", n)
	}
}

// TestDialOut: a node that nobody can dial keeps tunnels to both bastions, and
// loses one with its bastion.
func TestDialOut(t *testing.T) {
	t.Parallel()
	const name, address = "cp-4", "192.0.2.14" // where no bastion has a route to
	out := host(name, address)
	out.Reach = bundle.ReachOut
	w := newWorld(t, out)
	w.space(name)
	w.plug(name, "in", "203.0.113.14/24")
	w.ip(name, "addr", "add", address+"/32", "dev", "lo")
	w.ip(name, "route", "add", "198.51.100.0/24", "dev", "in")
	w.startAgent(0, name, address, bundle.ReachOut)
	for i := range bastionNames {
		if c, err := w.dial(bastionNames[i], fmt.Sprintf("%s:%d", address, sshPort)); err == nil {
			c.Close()
			t.Errorf("%s can dial %s", bastionNames[i], name)
		}
	}
	whoami := func(i int) run {
		return w.ssh("-oHostKeyAlias=cp-4.prod", "-J", bastionAddress(i), name, "whoami")
	}
	for i := range bastionNames {
		eventually(t, "a tunnel is there", func() bool { return whoami(i).status == 0 })
	}
	scale := func(to string) run {
		return w.halligan("--node", name, "scale", "deploy/web", "-n", "shop", "--to", to, "--yes", "-o", "json").ok(t)
	}
	key := w.deployment("web")
	if r := scale("0"); r.result(t).Result != "applied" || w.written(key) != 2 {
		t.Error(r)
	}
	w.bastions[0].kill()
	if r := scale("5"); r.result(t).Result != "applied" || w.written(key) != 3 || r.took > lossBound {
		t.Error(r)
	}
	w.startBastion(0)
	eventually(t, "the tunnel is there again", func() bool { return whoami(0).status == 0 })
}
