package sshserver

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	gssh "github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/trust"
)

// naive is a server as the library's own examples make one. It knows two keys
// by the files in its folder and serves until its standard input is closed.
func naive(kind string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	server := &gssh.Server{Handler: func(s gssh.Session) {
		switch s.RawCommand() {
		case "whoami":
			fmt.Fprintf(s, "%s\n", s.Permissions().Extensions["role"])
		case "env":
			fmt.Fprintf(s, "%d\n", len(s.Environ()))
		default:
			_, _ = io.Copy(io.Discard, s)
		}
	}}
	if kind == "keys" {
		roles := map[string]string{}
		for _, role := range []string{"commander", "observer"} {
			text, err := os.ReadFile(filepath.Join(os.Getenv("SSHSERVER_TEST_DIR"), role+".pub"))
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			key, _, _, _, err := gossh.ParseAuthorizedKey(text)
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			roles[string(key.Marshal())] = role
		}
		server.PublicKeyHandler = func(ctx gssh.Context, key gssh.PublicKey) bool {
			role, ok := roles[string(key.Marshal())]
			if ok && ctx.Permissions().Extensions["role"] == "" {
				ctx.Permissions().Extensions = map[string]string{"role": role}
			}
			return ok
		}
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Fprintln(os.Stderr, l.Addr())
	fmt.Fprintln(os.Stderr, server.Serve(l))
}

// target is what an attack is tried on.
type target struct {
	addr string
	o    *openssh
	// commander and observer are files of keys that the server knows.
	commander, observer string
	// alive reports whether the server still serves.
	alive func() bool
}

// dial logs in as the observer.
func (x *target) dial(t *testing.T) *gossh.Client {
	t.Helper()
	client, err := gossh.Dial("tcp", x.addr, &gossh.ClientConfig{User: "responder", Auth: []gossh.AuthMethod{gossh.PublicKeys(fileSigner(t, x.observer))},
		HostKeyCallback: gossh.InsecureIgnoreHostKey(), Timeout: patience}) // which key it has is not the point
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func (x *target) session(t *testing.T) (gossh.Channel, <-chan *gossh.Request) {
	t.Helper()
	ch, requests, err := x.dial(t).OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	return ch, requests
}

// startNaive starts the naive server in a process of its own.
func startNaive(t *testing.T, kind string, x *target) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "SSHSERVER_TEST_NAIVE="+kind, "SSHSERVER_TEST_DIR="+filepath.Dir(x.observer))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(stderr)
	if x.addr, err = lines.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	x.addr = strings.TrimSpace(x.addr)
	died := make(chan struct{})
	go func() {
		defer close(died)
		_, _ = io.Copy(io.Discard, lines)
	}()
	t.Cleanup(func() {
		stdin.Close()
		<-died
		_ = cmd.Wait()
	})
	x.alive = func() bool {
		select {
		case <-died:
			return false
		case <-time.After(100 * time.Millisecond):
			return true
		}
	}
}

// TestTraps tries each trap of the library on a server as the library's own
// documentation makes one, which must fall for it, and on ours, which must not.
func TestTraps(t *testing.T) {
	t.Parallel()
	for _, trap := range []struct {
		name string
		// naive is the kind of naive server: "keys", or "open" without handlers.
		naive string
		// works reports whether the attack does.
		works func(t *testing.T, x *target) bool
		// limits of ours, where the defaults would have the test wait.
		limits Limits
	}{
		{"privilege bleed: a key is only offered, another is proven", "keys", func(t *testing.T, x *target) bool {
			// OpenSSH offers the commander's public key, of which it has no more.
			public := x.o.path("stolen.pub")
			text, err := os.ReadFile(x.commander + ".pub")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(public, text, 0o600); err != nil {
				t.Fatal(err)
			}
			stdout, stderr, _ := x.o.ssh(t, []string{"-i", public, "-i", x.observer, "-oStrictHostKeyChecking=no", "-v"}, "whoami")
			if !strings.Contains(stderr, "Server accepts key: "+public) || !strings.Contains(stdout, "observer") && !strings.Contains(stdout, "commander") {
				t.Fatalf("the attack was not made: %s", stderr)
			}
			return strings.Contains(stdout, "commander")
		}, Limits{}},
		{"open door: no credentials", "open", func(t *testing.T, x *target) bool {
			_, _, status := x.o.ssh(t, []string{"-oPreferredAuthentications=none", "-oStrictHostKeyChecking=no"}, "whoami")
			return status == 0
		}, Limits{}},
		{"remote crash: a string longer than numbers go", "keys", func(t *testing.T, x *target) bool {
			ch, _ := x.session(t)
			_, _ = ch.SendRequest("pty-req", true, []byte{0xff, 0xff, 0xff, 0xff, 'x', 'x', 'x', 'x'})
			return !x.alive()
		}, Limits{}},
		{"agent forwarding is accepted", "keys", func(t *testing.T, x *target) bool {
			ch, _ := x.session(t)
			ok, err := ch.SendRequest("auth-agent-req@openssh.com", true, nil)
			return ok && err == nil
		}, Limits{}},
		{"variables without end", "keys", func(t *testing.T, x *target) bool {
			ch, _ := x.session(t)
			for i := range 50 {
				if ok, _ := ch.SendRequest("env", true, gossh.Marshal(struct{ Name, Value string }{fmt.Sprint("V", i), strings.Repeat("x", 30<<10)})); !ok {
					return false
				}
			}
			return true
		}, Limits{}},
		{"changes of a window stop the session", "keys", func(t *testing.T, x *target) bool {
			ch, _ := x.session(t)
			if ok, err := ch.SendRequest("pty-req", true, ptyRequest("xterm", 80, 24, "")); !ok || err != nil {
				t.Fatal("no terminal", err)
			}
			for i := range 40 {
				_, _ = ch.SendRequest("window-change", false, gossh.Marshal(struct{ W, H, X, Y uint32 }{uint32(80 + i), 24, 0, 0}))
			}
			answered := make(chan bool, 1)
			go func() {
				ok, err := ch.SendRequest("exec", true, gossh.Marshal(struct{ Command string }{"whoami"}))
				answered <- ok && err == nil
			}()
			select {
			case ok := <-answered:
				return !ok
			case <-time.After(2 * time.Second):
				return true
			}
		}, Limits{}},
		{"no deadline: who says nothing stays", "keys", func(t *testing.T, x *target) bool {
			return stays(t, x.addr, 2500*time.Millisecond)
		}, Limits{KeyExchange: time.Second}},
		{"no limit of connections without a login", "keys", func(t *testing.T, x *target) bool {
			var open []net.Conn
			for range 40 {
				conn, err := net.Dial("tcp", x.addr)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				open = append(open, conn)
			}
			time.Sleep(100 * time.Millisecond)
			left := 0
			for _, conn := range open {
				if !closed(conn, 5*time.Millisecond) {
					left++
				}
			}
			return left == len(open)
		}, Limits{UnauthenticatedEach: 10}},
		{"no keepalive: who has gone stays", "keys", func(t *testing.T, x *target) bool {
			// A client that is asked nothing cannot be known to be there.
			conn, err := net.Dial("tcp", x.addr)
			if err != nil {
				t.Fatal(err)
			}
			_, _, requests, err := gossh.NewClientConn(conn, x.addr, &gossh.ClientConfig{User: "responder", Auth: []gossh.AuthMethod{gossh.PublicKeys(fileSigner(t, x.observer))},
				HostKeyCallback: gossh.InsecureIgnoreHostKey()}) // as in dial
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			select {
			case req := <-requests: // never answered
				if req == nil || req.Type != "keepalive@openssh.com" || !req.WantReply {
					t.Errorf("asked %+v", req)
				}
			case <-time.After(2 * time.Second):
				return true
			}
			select {
			case _, more := <-requests:
				return more
			case <-time.After(patience):
				return true
			}
		}, Limits{KeepAlive: 200 * time.Millisecond, KeepAliveAnswer: 300 * time.Millisecond}},
		{"a host key is made up", "open", func(t *testing.T, x *target) bool {
			// Nobody has given the naive server one. That ours does not start
			// without is in TestNew; here it must show the one that it was given.
			_, stderr, _ := x.o.ssh(t, []string{"-i", x.observer, "-v"}, "whoami")
			return !strings.Contains(stderr, "is known and matches the ED25519 host key")
		}, Limits{}},
	} {
		t.Run(trap.name, func(t *testing.T) {
			t.Parallel()
			try := func(t *testing.T, ours bool) bool {
				s := serve(t, func(o *Options) { o.Limits = trap.limits })
				x := &target{addr: s.addr, o: newOpenSSH(t, s.addr, s.host.PublicKey()), alive: func() bool { return true }}
				for file, role := range map[*string]trust.Role{&x.commander: trust.Commander, &x.observer: trust.Observer} {
					var key gossh.PublicKey
					*file, key = x.o.key(t, role.String())
					s.enrol(key, trust.Identity{Person: role.String(), Role: role, Door: trust.SSH, Kind: trust.Person})
				}
				if !ours {
					startNaive(t, trap.naive, x)
					x.o.addr = x.addr
				}
				worked := trap.works(t, x)
				if ours { // whatever was tried, the next one gets in
					if out, err := run(s.mustDial(t, fileSigner(t, x.observer)), "whoami"); out != "observer observer\n" {
						t.Errorf("afterwards: %q, %v", out, err)
					}
				}
				return worked
			}
			t.Run("naive", func(t *testing.T) {
				if !try(t, false) {
					t.Error("the attack does not work on a naive server, so it tests nothing")
				}
			})
			t.Run("ours", func(t *testing.T) {
				if try(t, true) {
					t.Error("the attack works")
				}
			})
		})
	}
}

func ptyRequest(term string, columns, rows uint32, modes string) []byte {
	return gossh.Marshal(struct {
		Term       string
		W, H, X, Y uint32
		Modes      string
	}{term, columns, rows, 0, 0, modes})
}

// closed reports whether the other side closes the connection within some time.
func closed(conn net.Conn, within time.Duration) bool {
	_ = conn.SetReadDeadline(time.Now().Add(within))
	_, err := io.Copy(io.Discard, conn)
	var ne net.Error
	return !errors.As(err, &ne) || !ne.Timeout()
}

// stays reports whether a silent connection is still there after some time.
func stays(t *testing.T, addr string, after time.Duration) bool {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return !closed(conn, after)
}
