// Package netlab tries the real binaries in networks of their own, made of Linux
// network namespaces: a responder who reaches nothing but two bastions, the
// bastions, and three nodes behind them, without any name service. There a machine
// can be killed, cut off or far away, and a bastion can belong to an attacker.
//
// Everything that a test makes is gone at its end. The package stands on floor 5
// and has nothing but tests.
package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds what must happen at some time on a busy machine.
const patience = 30 * time.Second

// lastWords is how much of a log is shown, in bytes.
const lastWords = 3000

// nowhere is a name server that no route leads to.
const nowhere = "192.0.2.53"

// network is a set of namespaces, and of switches in one more of them, the hub.
type network struct {
	t      testing.TB
	prefix string
}

var (
	networks atomic.Int32
	folder   sync.Mutex // guards that /etc/netns is there
)

// newNetwork makes the hub with its switches.
func newNetwork(t testing.TB, switches ...string) *network {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("no ip: install iproute2")
	}
	n := &network{t: t, prefix: fmt.Sprintf("hl%dx%d-", os.Getpid(), networks.Add(1))}
	n.space("hub")
	for _, s := range switches {
		n.ip("hub", "link", "add", s, "type", "bridge")
		n.ip("hub", "link", "set", s, "up")
	}
	return n
}

// ip runs ip in a namespace.
func (n *network) ip(space string, args ...string) {
	n.t.Helper()
	if out, err := exec.Command("ip", append([]string{"-n", n.prefix + space}, args...)...).CombinedOutput(); err != nil {
		n.t.Fatalf("ip %s in %s: %v: %s", strings.Join(args, " "), space, err, out)
	}
}

// space makes a namespace, in which names lead nowhere.
func (n *network) space(name string) {
	n.t.Helper()
	full := n.prefix + name
	if out, err := exec.Command("ip", "netns", "add", full).CombinedOutput(); err != nil {
		n.t.Fatalf("ip netns add: %v: %s", err, out)
	}
	etc := filepath.Join("/etc/netns", full)
	n.t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", full).CombinedOutput(); err != nil {
			n.t.Errorf("ip netns del: %v: %s", err, out)
		}
		folder.Lock()
		defer folder.Unlock()
		if err := os.RemoveAll(etc); err != nil {
			n.t.Error(err)
		}
		_ = os.Remove(filepath.Dir(etc)) // if it was the last one
	})
	folder.Lock()
	defer folder.Unlock()
	// ip-netns(8) puts this in the place of /etc/resolv.conf.
	if err := errors.Join(os.MkdirAll(etc, 0o755), os.WriteFile(filepath.Join(etc, "resolv.conf"), []byte("nameserver "+nowhere+"\noptions timeout:1 attempts:1\n"), 0o644)); err != nil {
		n.t.Fatal(err)
	}
	n.ip(name, "link", "set", "lo", "up")
}

// plug connects a namespace to a switch. The other end of its cable is called
// SPACE-SWITCH in the hub.
func (n *network) plug(space, at, address string) {
	n.t.Helper()
	port := space + "-" + at
	n.ip("hub", "link", "add", port, "type", "veth", "peer", "name", at, "netns", n.prefix+space)
	n.ip("hub", "link", "set", port, "master", at, "up")
	n.ip(space, "addr", "add", address, "dev", at)
	n.ip(space, "link", "set", at, "up")
}

// cut pulls a cable at the far end, so that packets vanish and nobody is told,
// and returns what puts it back.
func (n *network) cut(space, at string) (mend func()) {
	n.t.Helper()
	n.ip("hub", "link", "set", space+"-"+at, "down")
	return sync.OnceFunc(func() { n.ip("hub", "link", "set", space+"-"+at, "up") })
}

// inside runs something that opens sockets in a namespace. Go may have to make
// another thread for it, which ends with it.
func (n *network) inside(space string, do func() error) error {
	ended := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocks: nobody else gets this thread
		f, err := os.Open("/run/netns/" + n.prefix + space)
		if err != nil {
			ended <- err
			return
		}
		defer f.Close()
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			ended <- err
			return
		}
		ended <- do()
	}()
	return <-ended
}

// listen listens in a namespace until the test ends.
func (n *network) listen(space, address string) (l net.Listener) {
	n.t.Helper()
	if err := n.inside(space, func() (err error) { l, err = net.Listen("tcp", address); return err }); err != nil {
		n.t.Fatalf("listening in %s: %v", space, err)
	}
	n.t.Cleanup(func() { l.Close() })
	return l
}

// dial dials from a namespace.
func (n *network) dial(space, address string) (c net.Conn, err error) {
	err = n.inside(space, func() (err error) { c, err = net.DialTimeout("tcp", address, 5*time.Second); return err })
	return c, err
}

// command is one that runs in a namespace.
func (n *network) command(ctx context.Context, space string, env []string, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", n.prefix + space}, argv...)...)
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = time.Second
	return cmd
}

// said is what a process writes, for others to look at meanwhile.
type said struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// process is a daemon in a namespace.
type process struct {
	t    testing.TB
	name string
	cmd  *exec.Cmd
	log  *said
	done chan struct{} // closed when it has ended
}

// daemon starts one. The end of its log is shown where the test fails.
func (n *network) daemon(space, name string, argv ...string) *process {
	n.t.Helper()
	p := &process{t: n.t, name: name, log: &said{}, done: make(chan struct{})}
	p.cmd = n.command(context.Background(), space, nil, argv...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the thread ends that made the process.
		runtime.LockOSThread()
		defer close(p.done)
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		n.t.Fatalf("%s: %v", name, err)
	}
	n.t.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(10 * time.Second):
			n.t.Errorf("%s does not end", name)
			p.kill()
		}
		if n.t.Failed() {
			text := p.log.String()
			n.t.Logf("%s says:\n%s", name, text[max(0, len(text)-lastWords):])
		}
	})
	return p
}

// kill is kill -9.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in %v: %s", patience, what)
		}
	}
}

// cable carries connections from a listener to wherever dial leads, with a delay
// each way that may change while it carries.
type cable struct {
	there, back atomic.Int64 // time.Duration
}

// carry serves the listener until it is closed.
func (c *cable) carry(l net.Listener, dial func() (net.Conn, error)) {
	for {
		near, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer near.Close()
			far, err := dial()
			if err != nil {
				return
			}
			defer far.Close()
			var both sync.WaitGroup
			both.Go(func() { late(far, near, &c.there) })
			both.Go(func() { late(near, far, &c.back) })
			both.Wait()
		}()
	}
}

// late copies what it reads, each piece after the delay that held when it came.
func late(to, from net.Conn, delay *atomic.Int64) {
	type piece struct {
		due  time.Time
		data []byte
	}
	pieces := make(chan piece, 1024)
	go func() {
		defer close(pieces)
		for {
			data := make([]byte, 16<<10)
			k, err := from.Read(data)
			if k > 0 {
				pieces <- piece{time.Now().Add(time.Duration(delay.Load())), data[:k]}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range pieces {
		time.Sleep(time.Until(p.due))
		if _, err := to.Write(p.data); err != nil {
			from.Close()
		}
	}
	if h, ok := to.(interface{ CloseWrite() error }); ok {
		_ = h.CloseWrite()
	}
}
