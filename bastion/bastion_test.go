package bastion

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/rs/zerolog"
	gossh "golang.org/x/crypto/ssh"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/bastion/store"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/issuer"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

func TestMain(m *testing.M) {
	store.Child()
	os.Exit(m.Run())
}

// patience bounds what must happen at some time on a busy machine.
const patience = 30 * time.Second

// The addresses of the test's network.
const (
	nodeAddress    = "127.0.0.11"
	bastionAddress = "127.0.0.21"
)

// syncBuffer is a buffer that one writes and others read.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in %v: %s", patience, what)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// free returns a port at which nobody listens.
func free(t testing.TB, address string) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", address+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String())
}

// world is a bastion before a node, with its SSH door and something that sends
// back what it gets where its gRPC door would be. Node cp-2 is down.
type world struct {
	t      testing.TB
	fleet  *testfleet.Fleet
	config Config
	log    *syncBuffer
	stop   func() error
	// Where the node's doors are.
	ssh, echo netip.AddrPort
	down      netip.AddrPort
}

// newWorld starts a bastion; change may alter its configuration.
func newWorld(t testing.TB, change func(*Config)) *world {
	t.Helper()
	w := &world{t: t, fleet: testfleet.New(t), log: &syncBuffer{}, down: free(t, nodeAddress)}
	at := free(t, bastionAddress)
	key, cert := w.fleet.HostFiles("bastion-a.bastion", testfleet.Now())
	crt, crtKey := w.fleet.ServerFiles("bastion-a.bastion", testfleet.Now())
	w.config = Config{Name: "bastion-a", StateDir: filepath.Join(w.fleet.Dir, "state"), LogLevel: "info",
		Trust:   &TrustConfig{Bundle: filepath.Join(w.fleet.Dir, "bundle"), Roots: []string{w.fleet.RootLine()}, Threshold: 1},
		SSH:     &SSHConfig{Listen: []string{at.String()}, HostKey: key, HostCertificate: cert},
		GRPC:    &GRPCConfig{Listen: []string{free(t, bastionAddress).String()}, CertFile: crt, KeyFile: crtKey},
		Metrics: MetricsConfig{Listen: free(t, bastionAddress).String()}}
	if change != nil {
		change(&w.config)
	}
	if err := w.config.check(); err != nil {
		t.Fatal(err)
	}
	w.node()
	w.put(w.fleet.Inventory(func(inv *bundle.Inventory) {
		host := func(name string, at netip.AddrPort, grpc uint16) bundle.Host {
			return bundle.Host{Name: name, Address: bundle.IP{Addr: at.Addr()}, SSHPort: at.Port(), GRPCPort: grpc}
		}
		inv.Clusters = []bundle.Cluster{{Name: "prod", Nodes: []bundle.Host{host("cp-1", w.ssh, w.echo.Port()), host("cp-2", w.down, 0)}},
			{Name: "staging", Nodes: []bundle.Host{host("st-1", netip.MustParseAddrPort("127.0.0.31:2222"), 0)}}}
		inv.Bastions = []bundle.Host{host("bastion-a", at, 0), host("bastion-b", netip.MustParseAddrPort("127.0.0.22:2222"), 0)}
	}))
	w.run()
	return w
}

// put copies a bundle to the bastion.
func (w *world) put(data []byte) {
	w.t.Helper()
	if err := os.WriteFile(w.config.Trust.Bundle, data, 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) run() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, w.config, zerolog.New(w.log)) }()
	w.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-ended:
			return err
		case <-time.After(patience):
			return errors.New("the bastion does not end")
		}
	})
	w.t.Cleanup(func() {
		if err := w.stop(); err != nil {
			w.t.Error(err)
		}
		if w.t.Failed() {
			w.t.Log(w.log.String())
		}
	})
}

// get asks the bastion's metrics server.
func (w *world) get(path string) (status int, body string) {
	r, err := http.Get("http://" + w.config.Metrics.Listen + path)
	if err != nil {
		return 0, ""
	}
	defer r.Body.Close()
	text, _ := io.ReadAll(r.Body)
	return r.StatusCode, string(text)
}

func (w *world) ready() *world {
	w.t.Helper()
	eventually(w.t, "the bastion is ready", func() bool { status, _ := w.get("/readyz"); return status == http.StatusOK })
	return w
}

// node opens the doors of cp-1.
func (w *world) node() {
	w.t.Helper()
	signers, _, err := sshserver.HostKey(must2(w.fleet.HostFiles("cp-1.prod", testfleet.Now())))
	if err != nil {
		w.t.Fatal(err)
	}
	b, err := bundle.Open(bundle.Options{Path: w.nodeBundle()})
	if err != nil {
		w.t.Fatal(err)
	}
	authority := credential.New(credential.Options{Bundle: b, Clock: trust.NewClock(time.Time{}), Cluster: "prod", Node: "cp-1"})
	server, err := sshserver.New(sshserver.Options{HostSigners: signers, Authenticate: authority.User, Offer: authority.Offered, Hold: authority.Hold, Log: zerolog.Nop(), Handlers: sshserver.Handlers{Session: func(s *sshserver.Session) {
		switch s.Command() {
		case "whoami":
			_, _ = fmt.Fprintln(s, s.Identity().Person, s.Identity().Role)
		case "cat":
			_, _ = io.Copy(s, s)
		case "wait":
			<-s.Context().Done()
		}
	}}})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	w.t.Cleanup(func() { cancel(); serving.Wait() })
	l := must(net.Listen("tcp", nodeAddress+":0"))
	serving.Go(func() { _ = server.Serve(ctx, l) })
	w.ssh = netip.MustParseAddrPort(l.Addr().String())

	e := must(net.Listen("tcp", nodeAddress+":0"))
	w.t.Cleanup(func() { e.Close() })
	w.echo = netip.MustParseAddrPort(e.Addr().String())
	go func() {
		for {
			c, err := e.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); c.Close() }()
		}
	}()
}

func must2(key, cert string) (string, string, string) { return key, cert, "cp-1.prod" }

func (w *world) nodeBundle() string {
	w.t.Helper()
	file := filepath.Join(w.fleet.Dir, "node-bundle")
	if err := os.WriteFile(file, w.fleet.Bundle(), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return file
}

// sshConfig writes a configuration for stock ssh as ada, a responder.
func (w *world) sshConfig() (file string) {
	w.t.Helper()
	at := netip.MustParseAddrPort(w.config.SSH.Listen[0])
	text := fmt.Sprintf(`Host bastion-a
  HostName %s
  Port %d
  HostKeyAlias bastion-a.bastion
Host by-ip by-name by-id plain
  User responder
  HostKeyAlias cp-1.prod
  Port %d
Host by-ip by-name by-id
  ProxyJump bastion-a
Host by-ip
  HostName %s
Host by-name plain
  HostName cp-1
Host by-id
  HostName cp-1.prod
Host *
  IdentityFile %s
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile %s
  GlobalKnownHostsFile none
  StrictHostKeyChecking yes
  HostKeyAlgorithms ssh-ed25519-cert-v01@openssh.com
  BatchMode yes
`, at.Addr(), at.Port(), w.ssh.Port(), nodeAddress, w.fleet.PersonFiles(testfleet.Holder("ada", trust.Responder), testfleet.Now()), w.fleet.KnownHosts())
	file = filepath.Join(w.fleet.Dir, "ssh_config")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return file
}

// command is stock ssh.
func (w *world) command(config string, args ...string) *exec.Cmd {
	w.t.Helper()
	program, err := exec.LookPath("ssh")
	if err != nil {
		w.t.Skip("no ssh")
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	w.t.Cleanup(cancel)
	return exec.CommandContext(ctx, program, append([]string{"-F", config}, args...)...)
}

func (w *world) shell(config, in string, args ...string) (stdout, stderr string, status int) {
	w.t.Helper()
	cmd := w.command(config, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(in), &out, &errs
	err := cmd.Run()
	if err != nil && cmd.ProcessState == nil {
		w.t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// TestOpenSSH has stock ssh jump, forward and copy through a bastion, whose host
// certificate it checks as well as the node's.
func TestOpenSSH(t *testing.T) {
	w := newWorld(t, nil).ready()
	config := w.sshConfig()
	big := strings.Repeat("0123456789abcdef", 1<<15)
	for _, c := range []struct {
		name, in string
		args     []string
		stdout   string
		stderr   string
		status   int
	}{
		{"-J by address", "", []string{"by-ip", "whoami"}, "ada responder\n", "", 0},
		{"-J by name", "", []string{"by-name", "whoami"}, "ada responder\n", "", 0},
		{"-J by NODE.CLUSTER", "", []string{"by-id", "whoami"}, "ada responder\n", "", 0},
		{"-J with an option", "", []string{"-J", "bastion-a", "plain", "whoami"}, "ada responder\n", "", 0},
		{"-J as anybody", "", []string{"-J", "whoever@bastion-a", "plain", "whoami"}, "ada responder\n", "", 0},
		{"the node's say", "", []string{"-l", "commander", "by-name", "whoami"}, "", "not for commander", 255},
		{"much, and an end of input", big, []string{"by-name", "cat"}, big, "", 0},
		{"-W", "hello", []string{"-W", fmt.Sprintf("cp-1:%d", w.echo.Port()), "bastion-a"}, "hello", "", 0},
		{"-W to a node that is down", "", []string{"-W", fmt.Sprintf("cp-2:%d", w.down.Port()), "bastion-a"}, "", "nobody listens at ssh of cp-2.prod", 255},
		{"another node's certificate", "", []string{"-oHostKeyAlias=cp-2.prod", "by-name", "whoami"}, "", "Host key verification failed", 255},
		{"another bastion's certificate", "", []string{"-oHostKeyAlias=bastion-b.bastion", "bastion-a", "whoami"}, "", "Host key verification failed", 255},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			stdout, stderr, status := w.shell(config, c.in, c.args...)
			if stdout != c.stdout || !strings.Contains(stderr, c.stderr) || status != c.status || c.stderr == "" && stderr != "" {
				t.Errorf("status %d, want %d\nstdout %.300q\n  want %.300q\nstderr %q, want %q", status, c.status, stdout, c.stdout, stderr, c.stderr)
			}
		})
	}
	t.Run("-L", func(t *testing.T) {
		t.Parallel()
		here := free(t, "127.0.0.1")
		cmd := w.command(config, "-N", "-oExitOnForwardFailure=yes", "-L", fmt.Sprintf("%s:cp-1:%d", here, w.echo.Port()), "bastion-a")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
		var c net.Conn
		eventually(t, "the forward listens", func() (ok bool) {
			var err error
			c, err = net.Dial("tcp", here.String())
			return err == nil
		})
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		_, _ = io.WriteString(c, "hello")
		_ = c.(*net.TCPConn).CloseWrite()
		if got, err := io.ReadAll(c); string(got) != "hello" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	})
}

// TestRefused asks stock ssh for what is not relayed.
func TestRefused(t *testing.T) {
	w := newWorld(t, nil).ready()
	config := w.sshConfig()
	own := netip.MustParseAddrPort(w.config.SSH.Listen[0])
	_, metrics, _ := net.SplitHostPort(w.config.Metrics.Listen)
	for target, want := range map[string]string{
		"10.1.2.3:22": "no node of the bundle's inventory has the address",
		fmt.Sprintf("[::ffff:%s]:%d", nodeAddress, w.ssh.Port()): "not how the inventory writes an address",
		fmt.Sprintf("[::ffff:7f00:b]:%d", w.ssh.Port()):          "not how the inventory writes an address",
		fmt.Sprintf("[::%s]:%d", nodeAddress, w.ssh.Port()):      "no node of the bundle's inventory has the address",
		own.String():                                                    "is the bastion bastion-a",
		fmt.Sprintf("bastion-b:%d", 2222):                               "is the bastion bastion-b",
		fmt.Sprintf("bastion-b.bastion:%d", 2222):                       "is the bastion bastion-b",
		fmt.Sprintf("127.0.0.1:%s", metrics):                            "would be the bastion itself",
		w.config.Metrics.Listen:                                         "is the bastion bastion-a",
		fmt.Sprintf("[::1]:%d", w.ssh.Port()):                           "would be the bastion itself",
		fmt.Sprintf("localhost:%d", w.ssh.Port()):                       "no node called localhost",
		fmt.Sprintf("cp-1:%d", 22):                                      "no door of cp-1.prod",
		fmt.Sprintf("st-1:%d", 2222):                                    "the credential of ada is not for st-1.staging",
		fmt.Sprintf("kubernetes.default.svc:%d", 443):                   "no node called kubernetes.default.svc",
		fmt.Sprintf("%s:%d", nodeAddress, w.down.Port()^w.ssh.Port()^1): "no door of cp-1.prod",
	} {
		t.Run(target, func(t *testing.T) {
			t.Parallel()
			stdout, stderr, status := w.shell(config, "", "-W", target, "bastion-a")
			if stdout != "" || status != 255 || !strings.Contains(stderr, want) || !strings.Contains(stderr, "administratively prohibited") {
				t.Errorf("status %d, %q %q; want %q", status, stdout, stderr, want)
			}
		})
	}
	t.Run("what else is forwarded", func(t *testing.T) {
		t.Parallel()
		c := w.login(t, "eve", nil)
		for name, payload := range map[string][]byte{
			"tcpip-forward": gossh.Marshal(struct {
				A string
				P uint32
			}{"0.0.0.0", 0}),
			"streamlocal-forward@openssh.com": gossh.Marshal(struct{ P string }{"/tmp/x"}),
			"hostkeys-prove-00@openssh.com":   nil,
		} {
			if ok, _, err := c.SendRequest(name, true, payload); ok || err != nil {
				t.Errorf("%s: %v, %v", name, ok, err)
			}
		}
		for _, kind := range []string{"direct-streamlocal@openssh.com", "forwarded-tcpip", "forwarded-streamlocal@openssh.com", "auth-agent@openssh.com", "x11", "tun@openssh.com"} {
			if _, _, err := c.OpenChannel(kind, gossh.Marshal(struct {
				Path, Reserved string
				Port           uint32
			}{"/run/x.sock", "", 0})); err == nil {
				t.Errorf("%s is opened", kind)
			}
		}
		s := must(c.NewSession())
		defer s.Close()
		for name, payload := range map[string][]byte{"auth-agent-req@openssh.com": nil, "x11-req": gossh.Marshal(struct {
			S    bool
			P, C string
			N    uint32
		}{false, "MIT-MAGIC-COOKIE-1", "00", 0}), "subsystem": gossh.Marshal(struct{ N string }{"sftp"})} {
			if ok, err := s.SendRequest(name, true, payload); ok || err != nil {
				t.Errorf("%s: %v, %v", name, ok, err)
			}
		}
	})
	t.Run("-A and -R", func(t *testing.T) {
		t.Parallel()
		if _, stderr, status := w.shell(config, "", "-R", "0:127.0.0.1:22", "-oExitOnForwardFailure=yes", "bastion-a", "whoami"); status != 255 || !strings.Contains(stderr, "remote port forwarding failed") {
			t.Errorf("-R: %d %s", status, stderr)
		}
	})
	t.Cleanup(func() { // once the parallel ones have ended
		log := w.log.String()
		for _, text := range []string{`"message":"relay refused"`, `"alarm":"relay"`, `"person":"ada"`, "kubernetes.default.svc"} {
			if !strings.Contains(log, text) {
				t.Errorf("the log lacks %s", text)
			}
		}
	})
}

// signer makes somebody with a credential for the cluster.
func (w *world) signer(h issuer.Holder) gossh.Signer {
	key, cert := w.fleet.Person(h, testfleet.Now())
	return must(gossh.NewCertSigner(cert, key))
}

// login comes to the bastion, from an address if that matters.
func (w *world) login(t testing.TB, person string, from net.Addr) *gossh.Client {
	t.Helper()
	c, err := w.dial(w.signer(testfleet.Holder(person, trust.Responder)), from)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (w *world) dial(signer gossh.Signer, from net.Addr) (*gossh.Client, error) {
	raw, err := (&net.Dialer{Timeout: patience, LocalAddr: from}).Dial("tcp", w.config.SSH.Listen[0])
	if err != nil {
		return nil, err
	}
	checker := &gossh.CertChecker{IsHostAuthority: func(k gossh.PublicKey, _ string) bool {
		return bytes.Equal(k.Marshal(), w.fleet.Host.Public().Marshal())
	}}
	conn, channels, requests, err := gossh.NewClientConn(raw, "bastion-a.bastion:22", &gossh.ClientConfig{User: "laptop", Auth: []gossh.AuthMethod{gossh.PublicKeys(signer)},
		HostKeyCallback: checker.CheckHostKey, HostKeyAlgorithms: []string{gossh.CertAlgoED25519v01}, Timeout: patience})
	if err != nil {
		raw.Close()
		return nil, err
	}
	return gossh.NewClient(conn, channels, requests), nil
}

// TestLobby looks around with stock ssh.
func TestLobby(t *testing.T) {
	w := newWorld(t, nil).ready()
	config := w.sshConfig()
	eventually(t, "the store works", func() bool { _, body := w.get("/readyz"); return !strings.Contains(body, "store") })
	me := must(user.Current()).Username
	for line, want := range map[string]struct {
		stdout, stderr []string
		status         int
	}{
		"whoami":                               {stdout: []string{"person      ada\n", "clusters    prod\n", "roles       responder\n", "ssh of bastion bastion-a", "ends in"}},
		"status":                               {stdout: []string{"bastion  bastion-a, version", "bundle   policy 1, inventory 2, revocations 1", "store    works"}},
		"nodes":                                {stdout: []string{"cp-1  prod     127.0.0.11  " + fmt.Sprint(w.ssh.Port()), "cp-2  prod"}},
		"nodes prod":                           {stdout: []string{"cp-1  prod"}},
		"sessions":                             {stdout: []string{"ada     person      ssh", "here  bastion-a"}},
		"approvals":                            {stdout: []string{"PLAN  NODE"}},
		"help":                                 {stdout: []string{"nodes [CLUSTER]", "whoami"}, stderr: []string{"ssh -J BASTION responder@NODE"}},
		"nodes a b":                            {stderr: []string{"nodes takes at most [CLUSTER]"}, status: 2},
		"exit":                                 {stderr: []string{"no command \"exit\""}, status: 2},
		"whoami; id":                           {stderr: []string{"one command of plain words"}, status: 2},
		"sh -c id":                             {stderr: []string{"this is a bastion's lobby"}, status: 2},
		"scale ds/c -n telemetry --to 0 --yes": {stderr: []string{"what acts on a cluster is asked of a node"}, status: 2},
		"approvals nope":                       {stderr: []string{"the mailbox has no plan"}, status: 1},
	} {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			stdout, stderr, status := w.shell(config, "", "bastion-a", line)
			for _, text := range want.stdout {
				if !strings.Contains(stdout, text) {
					t.Errorf("stdout lacks %q: %q", text, stdout)
				}
			}
			for _, text := range want.stderr {
				if !strings.Contains(stderr, text) {
					t.Errorf("stderr lacks %q: %q", text, stderr)
				}
			}
			if status != want.status || strings.Contains(stdout, "st-1") || len(want.stdout) == 0 && stdout != "" {
				t.Errorf("status %d, want %d; %q %q", status, want.status, stdout, stderr)
			}
		})
	}
	t.Run("lines", func(t *testing.T) {
		t.Parallel()
		stdout, stderr, status := w.shell(config, "whoami\n# nothing\nnope\nexit\nnodes\n", "-T", "bastion-a")
		if !strings.Contains(stdout, "ada") || strings.Contains(stdout, "cp-1") || !strings.Contains(stderr, `no command "nope"`) || status != 2 {
			t.Errorf("%d %q %q", status, stdout, stderr)
		}
	})
	t.Run("shell", func(t *testing.T) {
		t.Parallel()
		cmd := w.command(config, "-tt", me+"@bastion-a")
		terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 40, Cols: 132})
		if err != nil {
			t.Fatal(err)
		}
		defer terminal.Close()
		screen := &syncBuffer{}
		go func() { _, _ = io.Copy(screen, terminal) }()
		says := func(text string) {
			t.Helper()
			eventually(t, fmt.Sprintf("the screen shows %q", text), func() bool { return strings.Contains(screen.String(), text) })
		}
		says("halligan bastion-a> ")
		_, _ = io.WriteString(terminal, "whoa\t\r")
		says("person      ada\r\n")
		_, _ = io.WriteString(terminal, "scale x\r")
		says("what acts on a cluster")
		_, _ = io.WriteString(terminal, "help\r")
		says("leave; so does Ctrl-D")
		_, _ = io.WriteString(terminal, "\x04")
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v\n%s", err, screen)
		}
	})
	t.Run("automation", func(t *testing.T) {
		t.Parallel()
		pool := x509.NewCertPool()
		pool.AddCert(w.fleet.Servers.Certificate)
		conn, err := grpc.NewClient("passthrough:///"+w.config.GRPC.Listen[0], grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, ServerName: "bastion-a.bastion",
			Certificates: []tls.Certificate{w.fleet.Client(nil, testfleet.Holder("bot", trust.Responder), testfleet.Now())}})))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		s, err := halliganv1.NewBastionClient(conn).Status(ctx, &halliganv1.BastionStatusRequest{}, grpc.WaitForReady(true))
		if err != nil || s.GetPerson() != "bot" || s.GetDoor() != "grpc" {
			t.Errorf("%v, %v", s, err)
		}
	})
}

// TestStrangers come with credentials that are none.
func TestStrangers(t *testing.T) {
	w := newWorld(t, nil).ready()
	other := testfleet.New(t)
	key, cert := other.Person(testfleet.Holder("ada", trust.Responder), testfleet.Now())
	foreign := must(gossh.NewCertSigner(cert, key))
	for name, signer := range map[string]gossh.Signer{"another fleet's": foreign, "a plain key": key} {
		if c, err := w.dial(signer, nil); err == nil {
			c.Close()
			t.Errorf("%s is let in", name)
		}
	}
	// Anybody of the fleet is, and reaches nothing that the credential is not for.
	h := testfleet.Holder("zoe", trust.Approver)
	h.Clusters = []string{"elsewhere"}
	c, err := w.dial(w.signer(h), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Dial("tcp", w.ssh.String()); err == nil || !strings.Contains(err.Error(), "not for cp-1.prod") {
		t.Error(err)
	}
}

// TestRevocation ends a relayed session, and lets nobody in again.
func TestRevocation(t *testing.T) {
	w := newWorld(t, nil).ready()
	alice, bob := w.login(t, "alice", nil), w.login(t, "bob", nil)
	echoes := func(c net.Conn) bool {
		if _, err := io.WriteString(c, "x"); err != nil {
			return false
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err == nil
	}
	one, err := alice.Dial("tcp", w.echo.String())
	if err != nil {
		t.Fatal(err)
	}
	two, err := bob.Dial("tcp", w.echo.String())
	if err != nil {
		t.Fatal(err)
	}
	if !echoes(one) || !echoes(two) {
		t.Fatal("not relayed")
	}
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, one)
		close(ended)
	}()
	began := time.Now()
	w.put(w.fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = append(r.KeyIDs, "alice") }))
	select {
	case <-ended:
		t.Logf("ended after %v", time.Since(began))
	case <-time.After(patience):
		t.Fatal("a revoked certificate is relayed on")
	}
	if !echoes(two) {
		t.Error("so is somebody else's session")
	}
	if c, err := w.dial(w.signer(testfleet.Holder("alice", trust.Responder)), nil); err == nil {
		c.Close()
		t.Error("let in again")
	}
	eventually(t, "both ends are forgotten", func() bool {
		_, body := w.get("/metrics")
		return strings.Contains(body, "halligan_bastion_relays 1\n") && strings.Contains(body, `halligan_bastion_bundle_version{part="revocations"} 2`)
	})
}

// TestWithoutStore relays, and says what is degraded.
func TestWithoutStore(t *testing.T) {
	w := newWorld(t, func(c *Config) {
		c.Store = StoreConfig{Endpoints: []string{free(t, bastionAddress).String()}, CAFile: c.GRPC.CertFile, CertFile: c.GRPC.CertFile, KeyFile: c.GRPC.KeyFile}
	}).ready()
	config := w.sshConfig()
	if stdout, stderr, status := w.shell(config, "", "by-name", "whoami"); stdout != "ada responder\n" || status != 0 {
		t.Errorf("%d %q %q", status, stdout, stderr)
	}
	if _, stderr, status := w.shell(config, "", "bastion-a", "status"); status != 0 || !strings.Contains(stderr, "degraded: ") || !strings.Contains(stderr, "the bastion's store does not work") {
		t.Errorf("%d %q", status, stderr)
	}
	if stdout, stderr, status := w.shell(config, "", "bastion-a", "sessions"); status != 0 || !strings.Contains(stdout, "ada") || !strings.Contains(stderr, "sessions may be missing") {
		t.Errorf("%d %q %q", status, stdout, stderr)
	}
	if status, body := w.get("/readyz"); status != http.StatusOK || !strings.Contains(body, "store does not work") {
		t.Errorf("%d %q", status, body)
	}
	if _, body := w.get("/metrics"); !strings.Contains(body, "halligan_bastion_store_up 0\n") || strings.Contains(body, `"ada"`) {
		t.Error(body)
	}
}

// TestLateBundle starts without a bundle and with one that is not signed, and
// opens its doors when there is a good one.
func TestLateBundle(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Trust.Bundle += "-late" })
	good := w.fleet.Bundle()
	if err := w.stop(); err != nil {
		t.Fatal(err)
	}
	w.put([]byte("no bundle"))
	if err := os.RemoveAll(w.config.StateDir); err != nil {
		t.Fatal(err)
	}
	w.run()
	eventually(t, "health is served", func() bool { status, _ := w.get("/healthz"); return status == http.StatusOK })
	eventually(t, "the reason is told", func() bool {
		status, body := w.get("/readyz")
		return status == http.StatusServiceUnavailable && strings.Contains(body, "nobody is let in") && strings.Contains(body, "bundle is not open")
	})
	if _, err := net.Dial("tcp", w.config.SSH.Listen[0]); err == nil {
		t.Error("the door is open")
	}
	w.put(good)
	w.ready().login(t, "alice", nil)
}

// TestCrowd has 200 people at once, and one who takes all that there is.
func TestCrowd(t *testing.T) {
	w := newWorld(t, nil).ready()
	const people = 200
	greedy := w.login(t, "greedy", nil)
	stop := make(chan struct{})
	var grabbing sync.WaitGroup
	var mu sync.Mutex
	held, refused, why := 0, 0, ""
	for range 8 {
		grabbing.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				_, err := greedy.Dial("tcp", w.echo.String())
				mu.Lock()
				if err != nil {
					refused++
					why = err.Error()
				} else {
					held++
				}
				mu.Unlock()
				if err != nil {
					time.Sleep(20 * time.Millisecond) // or it is cut off, which is no fun
				}
			}
		})
	}
	eventually(t, "the greedy one is refused", func() bool { mu.Lock(); defer mu.Unlock(); return refused > 0 })
	var all, in sync.WaitGroup
	in.Add(people)
	for i := range people {
		all.Go(func() {
			c, err := w.dial(w.signerOf(i), &net.TCPAddr{IP: net.IPv4(127, 1, byte(i/100), byte(1+i%100))})
			in.Done()
			if err != nil {
				t.Errorf("person %d: %v", i, err)
				return
			}
			defer c.Close()
			in.Wait() // all of them at once
			conn, err := c.Dial("tcp", w.echo.String())
			if err != nil {
				t.Errorf("person %d: %v", i, err)
				return
			}
			text := fmt.Sprintf("person %d", i)
			if _, err := io.WriteString(conn, text); err != nil {
				t.Errorf("person %d: %v", i, err)
			}
			got := make([]byte, len(text))
			if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
				t.Errorf("person %d: %q, %v", i, got, err)
			}
		})
	}
	all.Wait()
	close(stop)
	grabbing.Wait()
	mu.Lock()
	defer mu.Unlock()
	if held > limits.ChannelsEach || !strings.Contains(why, "no more than") && !strings.Contains(why, "as many as one may have") {
		t.Errorf("the greedy one holds %d, and was told %q", held, why)
	}
	if !strings.Contains(w.log.String(), `"message":"relay begins"`) {
		t.Error("relays are not logged")
	}
}

// signerOf makes person i; keys are cheap, and the fleet counts serials.
func (w *world) signerOf(i int) gossh.Signer {
	signing.Lock()
	defer signing.Unlock()
	return w.signer(testfleet.Holder(fmt.Sprintf("person-%d", i), trust.Responder))
}

var signing sync.Mutex

// TestStop ends a bastion that is in use.
func TestStop(t *testing.T) {
	w := newWorld(t, nil).ready()
	config := w.sshConfig()
	cmd := w.command(config, "by-name", "wait")
	var stderr syncBuffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is relayed", func() bool {
		_, body := w.get("/metrics")
		return strings.Contains(body, "halligan_bastion_relays 1\n")
	})
	if err := w.stop(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the session outlives the bastion")
	}
	if c, err := net.Dial("tcp", w.config.SSH.Listen[0]); err == nil {
		c.Close()
		t.Error("somebody still listens")
	}
	if !strings.Contains(w.log.String(), "bastion ends") {
		t.Error("it did not end in order")
	}
}

// TestWrongHost has no door where clients could only find somebody else's name.
func TestWrongHost(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Name = "bastion-b" })
	eventually(t, "the reason is told", func() bool {
		status, body := w.get("/readyz")
		return status == http.StatusServiceUnavailable && strings.Contains(body, "ssh is not open") && strings.Contains(body, "and this is bastion-b.bastion")
	})
}
