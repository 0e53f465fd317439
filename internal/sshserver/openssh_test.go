package sshserver

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/rs/zerolog"
	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

func TestOpenSSH(t *testing.T) {
	s := serve(t, nil)
	o := newOpenSSH(t, s.addr, s.host.PublicKey())
	file, key := o.key(t, "ada")
	s.enrol(key, trust.Identity{Person: "ada", Role: trust.Responder, Door: trust.SSH, Kind: trust.Person})
	as := []string{"-i", file}

	for _, c := range []struct {
		name    string
		options []string
		command []string
		stdin   string
		stdout  string
		stderr  string
		status  int
	}{
		{name: "exec", command: []string{"whoami"}, stdout: "ada responder\n"},
		{name: "status", command: []string{"fail"}, stderr: "failed as asked\n", status: 7},
		{name: "input", command: []string{"cat"}, stdin: strings.Repeat("0123456789abcdef", 1<<14), stdout: strings.Repeat("0123456789abcdef", 1<<14)},
		{name: "raw line", command: []string{"raw", `'a  b'`, "\xff\x1b[2J"}, stdout: `"'a  b' \xff\x1b[2J"` + "\n"},
		{name: "environment", options: []string{"-oSetEnv=HALLIGAN_REASON=\"the\tAPI\" FOO=1"}, command: []string{"env"}, stdout: "HALLIGAN_INCIDENT=\nHALLIGAN_REASON=\nLANG=\nLC_ALL=\nLD_PRELOAD=\nTERM=\n"},
		{name: "known environment", options: []string{`-oSetEnv=HALLIGAN_REASON="the API is down" HALLIGAN_INCIDENT=INC-7 LANG=C LD_PRELOAD=/x.so TERM=dumb`}, command: []string{"env"},
			stdout: "HALLIGAN_INCIDENT=INC-7\nHALLIGAN_REASON=the API is down\nLANG=C\nLC_ALL=\nLD_PRELOAD=\nTERM=dumb\n"},
		{name: "subsystem", options: []string{"-s"}, command: []string{"echo"}, stdin: "hello\n", stdout: "hello\n"},
		{name: "unknown subsystem", options: []string{"-s"}, command: []string{"sftp"}, stderr: "subsystem request failed", status: 255},
		{name: "shell without a terminal", options: []string{"-T"}, stdin: "one\rexit\r", stdout: "pty=false term= 0x0\nyou said \"one\"\n", status: 3},
		{name: "panic", command: []string{"panic"}, stderr: "a fault of the server ended this session", status: 1},
		{name: "no key", options: []string{"-oPubkeyAuthentication=no"}, command: []string{"whoami"}, stderr: "Permission denied (publickey).", status: 255},
		{name: "password", options: []string{"-oPreferredAuthentications=password,keyboard-interactive,none"}, command: []string{"whoami"}, stderr: "Permission denied (publickey).", status: 255},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cmd := o.command(t, append(as, c.options...)...)
			cmd.Args = append(append(cmd.Args, "127.0.0.1"), c.command...)
			cmd.Stdin = strings.NewReader(c.stdin)
			stdout, stderr, status := finish(t, cmd)
			if stdout != c.stdout || !strings.Contains(stderr, c.stderr) || status != c.status || c.stderr == "" && stderr != "" {
				t.Errorf("status %d, want %d\nstdout %.300q\n  want %.300q\nstderr %q, want %q", status, c.status, stdout, c.stdout, stderr, c.stderr)
			}
		})
	}
	t.Run("quiet before the login", func(t *testing.T) {
		_, stderr, _ := o.ssh(t, append(as, "-v"), "whoami")
		if strings.Contains(strings.ToLower(strings.ReplaceAll(stderr, file, "")), "halligan") || !strings.Contains(stderr, "remote software version Go\r") && !strings.Contains(stderr, "remote software version Go\n") {
			t.Errorf("the server says more than that it is written in Go:\n%s", stderr)
		}
	})
}

// TestForwarding asks for all that OpenSSH can forward or copy.
func TestForwarding(t *testing.T) {
	t.Parallel()
	s := serve(t, nil)
	o := newOpenSSH(t, s.addr, s.host.PublicKey())
	file, key := o.key(t, "ada")
	s.enrol(key, trust.Identity{Person: "ada", Role: trust.Commander, Door: trust.SSH, Kind: trust.Person})
	// A secret nearby, that somebody may want to have forwarded or copied.
	if err := os.WriteFile(o.path("secret"), []byte("hunter2"), 0o600); err != nil {
		t.Fatal(err)
	}
	auth := o.path("agent")
	agent := exec.Command(tool(t, "ssh-agent"), "-D", "-a", auth)
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = agent.Process.Kill(); _ = agent.Wait() })
	eventually(t, "the agent listens", func() bool { _, err := os.Stat(auth); return err == nil })
	display := []string{"DISPLAY=127.0.0.1:77", "XAUTHORITY=" + o.path("xauth")}

	for _, c := range []struct {
		name    string
		options []string
		env     []string
		command string
		stderr  string
		status  int
	}{
		{"-R", []string{"-R", "0:" + s.addr, "-oExitOnForwardFailure=yes"}, nil, "whoami", "remote port forwarding failed", 255},
		{"-R of a socket", []string{"-R", o.path("sock") + ":" + s.addr, "-oExitOnForwardFailure=yes"}, nil, "whoami", "remote port forwarding failed", 255},
		{"-R dynamic", []string{"-R", "0", "-oExitOnForwardFailure=yes"}, nil, "whoami", "remote port forwarding failed", 255},
		{"-A", []string{"-A", "-v"}, []string{"SSH_AUTH_SOCK=" + auth}, "whoami", "Requesting authentication agent forwarding", 0},
		{"-X", []string{"-X", "-oForwardX11=yes", "-oExitOnForwardFailure=yes", "-v"}, display, "whoami", "X11 forwarding request failed", 0},
		{"-W", []string{"-W", s.addr}, nil, "", "administratively prohibited", 255},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := o.command(t, append([]string{"-i", file}, c.options...)...)
			cmd.Args = append(cmd.Args, "127.0.0.1")
			if c.name == "-A" {
				cmd.Args = replace(cmd.Args, "-oIdentityAgent=none", "-oIdentityAgent=SSH_AUTH_SOCK")
			}
			if c.command != "" {
				cmd.Args = append(cmd.Args, c.command)
			}
			cmd.Env = append(cmd.Env, c.env...)
			if _, stderr, status := finish(t, cmd); !strings.Contains(stderr, c.stderr) || status != c.status || strings.Contains(stderr, "auth-agent@openssh.com") {
				t.Errorf("status %d, want %d; %s", status, c.status, stderr)
			}
		})
	}
	for _, flag := range []string{"-L", "-D"} {
		t.Run(flag, func(t *testing.T) {
			at := o.path("forward" + flag)
			where := at + ":" + s.addr
			if flag == "-D" {
				where = freePort(t)
			}
			cmd := o.command(t, "-i", file, flag, where, "-v")
			cmd.Args = append(cmd.Args, "127.0.0.1", "wait")
			var stderr syncBuffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
			eventually(t, "the session runs", func() bool { return strings.Contains(stderr.String(), "Sending command") })
			conn := connect(t, flag, at, where, s.addr)
			defer conn.Close()
			// A connection that was let through would get the server's greeting.
			if got, _ := io.ReadAll(io.LimitReader(conn, 32)); bytes.Contains(got, []byte("SSH-2.0")) {
				t.Errorf("forwarded: %q", got)
			}
			eventually(t, "it is refused", func() bool { return strings.Contains(stderr.String(), "administratively prohibited") })
		})
	}
	for _, c := range []struct{ name, program, legacy string }{{"scp", "scp", "-s"}, {"scp of old", "scp", "-O"}, {"sftp", "sftp", "-q"}} {
		t.Run(c.name, func(t *testing.T) {
			to := filepath.Join(t.TempDir(), "stolen")
			cmd := exec.Command(tool(t, c.program), append([]string{c.legacy, "-i", file}, append(o.options(), "127.0.0.1:"+o.path("secret"), to)...)...)
			_, stderr, status := finish(t, cmd)
			if _, err := os.Stat(to); err == nil || status == 0 {
				t.Errorf("copied; %s", stderr)
			}
		})
	}
}

// freePort returns an address that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// connect connects to what ssh forwards, and through it to target.
func connect(t *testing.T, flag, socket, listen, target string) (conn net.Conn) {
	t.Helper()
	eventually(t, "ssh listens", func() (ok bool) {
		var err error
		if conn, err = net.Dial("unix", socket); flag == "-D" {
			conn, err = net.Dial("tcp", listen)
		}
		return err == nil
	})
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if flag == "-D" { // SOCKS5, RFC 1928, with an IPv4 address
		to, err := net.ResolveTCPAddr("tcp", target)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write(append(append([]byte{5, 1, 0, 5, 1, 0, 1}, to.IP.To4()...), byte(to.Port>>8), byte(to.Port)))
	}
	return conn
}

func fileSigner(t *testing.T, file string) gossh.Signer {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := gossh.ParsePrivateKey(text)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

func replace(all []string, from, to string) []string {
	for i := range all {
		if all[i] == from {
			all[i] = to
		}
	}
	return all
}

// TestShell uses a terminal as a person does: OpenSSH under a pty.
func TestShell(t *testing.T) {
	t.Parallel()
	s := serve(t, nil)
	o := newOpenSSH(t, s.addr, s.host.PublicKey())
	file, key := o.key(t, "ada")
	s.enrol(key, trust.Identity{Person: "ada", Role: trust.Responder, Door: trust.SSH, Kind: trust.Person})
	start := func(t *testing.T) (*os.File, *syncBuffer, func() int) {
		cmd := o.command(t, "-i", file)
		cmd.Args = append(cmd.Args, "127.0.0.1")
		cmd.Env = append(cmd.Env, "TERM=xterm-256color")
		terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 40, Cols: 132})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { terminal.Close() })
		var screen syncBuffer
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(&screen, terminal) // EIO when ssh has gone
		}()
		return terminal, &screen, func() int {
			_ = cmd.Wait()
			terminal.Close()
			<-done
			return cmd.ProcessState.ExitCode()
		}
	}
	seen := func(t *testing.T, screen *syncBuffer, text string) {
		t.Helper()
		eventually(t, fmt.Sprintf("%q on the screen", text), func() bool { return strings.Contains(screen.String(), text) })
	}

	t.Run("talk", func(t *testing.T) {
		terminal, screen, wait := start(t)
		seen(t, screen, "pty=true term=xterm-256color 132x40\r\n")
		_, _ = io.WriteString(terminal, "hello\r")
		seen(t, screen, "you said \"hello\"\r\n")
		if err := pty.Setsize(terminal, &pty.Winsize{Rows: 24, Cols: 90}); err != nil {
			t.Fatal(err)
		}
		seen(t, screen, "resized to 90x24\r\n")
		_, _ = io.WriteString(terminal, "\x03\r") // Ctrl-C is a byte
		seen(t, screen, `you said "\x03"`)
		_, _ = io.WriteString(terminal, "exit\r")
		if status := wait(); status != 3 {
			t.Errorf("status %d", status)
		}
	})
	t.Run("told when it ends", func(t *testing.T) {
		_, screen, wait := start(t)
		seen(t, screen, "pty=true")
		began := time.Now()
		s.end("ada", fault.New(fault.Unauthenticated, "ask for a new one", "the certificate was revoked\x1b[2J"))
		if status := wait(); status == 0 {
			t.Error("ended well")
		}
		t.Logf("ended after %v", time.Since(began))
		seen(t, screen, "\r\nhalligan: this session ends: the certificate was revoked\\x1b[2J; ask for a new one\r\n")
	})
}

// TestCertificates has ssh-keygen sign, and ssh-agent hold, what people come with.
func TestCertificates(t *testing.T) {
	t.Parallel()
	s := serve(t, nil)
	o := newOpenSSH(t, s.addr, s.host.PublicKey())
	keygen(t, "-q", "-t", "ed25519", "-N", "", "-f", o.path("ca"))
	keygen(t, "-q", "-t", "ed25519", "-N", "", "-f", o.path("otherca"))
	s.ca = fileSigner(t, o.path("ca"))
	file, _ := o.key(t, "ada")
	sign := func(name, ca string, args ...string) string {
		to := o.path(name)
		for _, suffix := range []string{"", ".pub"} {
			text, err := os.ReadFile(file + suffix)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(to+suffix, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		keygen(t, append([]string{"-q", "-s", o.path(ca), "-z", "7"}, append(args, to+".pub")...)...)
		return to
	}
	good := sign("good", "ca", "-I", "ada", "-n", "responder,observer", "-V", "-1h:+1h")
	for _, c := range []struct{ name, file, user, stdout, stderr string }{
		{"responder", good, "responder", "ada responder\n", ""},
		{"another principal", good, "observer", "ada observer\n", ""},
		{"not a principal", good, "commander", "", "halligan: certificate of ada: ssh: principal \"commander\" not in the set of valid principals"},
		{"expired", sign("expired", "ca", "-I", "ada", "-n", "responder", "-V", "-2h:-1h"), "responder", "", "halligan: certificate of ada: ssh: cert has expired; renew it"},
		{"of another CA", sign("foreign", "otherca", "-I", "ada", "-n", "responder"), "responder", "", "halligan: not a user certificate of this fleet"},
		{"of a host", sign("hosts", "ca", "-h", "-I", "ada", "-n", "responder"), "responder", "", "Permission denied"},
		{"plain key", file, "responder", "", "Permission denied (publickey)."},
	} {
		t.Run(c.name, func(t *testing.T) {
			stdout, stderr, status := o.ssh(t, []string{"-i", c.file, "-oUser=" + c.user}, "whoami")
			if stdout != c.stdout || !strings.Contains(stderr, c.stderr) || status != map[bool]int{true: 0, false: 255}[c.stdout != ""] {
				t.Errorf("status %d, stdout %q, stderr %q", status, stdout, stderr)
			}
			if strings.Contains(stderr, "for the log only") {
				t.Error("told what only the log should have")
			}
		})
	}
	t.Run("agent", func(t *testing.T) {
		at := o.path("agent")
		agent := exec.Command(tool(t, "ssh-agent"), "-D", "-a", at)
		if err := agent.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = agent.Process.Kill(); _ = agent.Wait() })
		eventually(t, "the agent listens", func() bool { _, err := os.Stat(at); return err == nil })
		add := exec.Command(tool(t, "ssh-add"), "-q", good)
		add.Env = append(os.Environ(), "SSH_AUTH_SOCK="+at)
		if out, err := add.CombinedOutput(); err != nil {
			t.Fatalf("ssh-add: %v\n%s", err, out)
		}
		stdout, stderr, status := o.ssh(t, []string{"-oIdentityAgent=" + at, "-oIdentitiesOnly=no"}, "whoami")
		if stdout != "ada responder\n" || status != 0 {
			t.Errorf("status %d, stdout %q, stderr %q", status, stdout, stderr)
		}
	})
	t.Run("alarms", func(t *testing.T) {
		if n, m := len(s.alarms.of(alarm.Login)), len(s.alarms.of(alarm.Refusal)); n != 3 || m < 4 {
			t.Errorf("%d logins and %d refusals were told of", n, m)
		}
		for _, e := range s.alarms.of(alarm.Login) {
			if e.Person != "ada" || e.Source == "" {
				t.Errorf("told of %+v", e)
			}
		}
	})
}

// TestHostCertificate has OpenSSH trust a CA instead of keys.
func TestHostCertificate(t *testing.T) {
	host, ca := newSigner(t), newSigner(t)
	cert := &gossh.Certificate{Key: host.PublicKey(), CertType: gossh.HostCert, KeyId: "cp-1.prod", ValidPrincipals: []string{"cp-1.prod"}, ValidBefore: gossh.CertTimeInfinity, Serial: 1}
	if err := cert.SignCert(rand.Reader, ca); err != nil {
		t.Fatal(err)
	}
	certified, err := gossh.NewCertSigner(cert, host)
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, func(o *Options) { o.HostSigners = []gossh.Signer{certified, host} })
	o := newOpenSSH(t, s.addr, host.PublicKey())
	line := fmt.Sprintf("@cert-authority *.prod %s", gossh.MarshalAuthorizedKey(ca.PublicKey()))
	if err := os.WriteFile(o.path("known_hosts"), []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	file, key := o.key(t, "ada")
	s.enrol(key, trust.Identity{Person: "ada", Role: trust.Responder, Door: trust.SSH, Kind: trust.Person})
	strict := []string{"-i", file, "-oHostKeyAlgorithms=ssh-ed25519-cert-v01@openssh.com"}
	if stdout, stderr, _ := o.ssh(t, append(strict, "-oHostKeyAlias=cp-1.prod"), "whoami"); stdout != "ada responder\n" {
		t.Errorf("%q %s", stdout, stderr)
	}
	if _, stderr, status := o.ssh(t, append(strict, "-oHostKeyAlias=cp-2.prod"), "whoami"); status != 255 || !strings.Contains(stderr, "Host key verification failed") {
		t.Errorf("taken for another node: status %d, %s", status, stderr)
	}
}

// TestHostRenewed: a renewed host certificate is shown without a restart, a bad
// one never, and who is in stays in.
func TestHostRenewed(t *testing.T) {
	ca := newSigner(t)
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	host, err := gossh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	block, err := gossh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	keyFile := filepath.Join(t.TempDir(), "host")
	certFile := keyFile + "-cert.pub"
	write := func(file string, data []byte) {
		t.Helper()
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	certify := func(serial uint64, name string) {
		t.Helper()
		cert := &gossh.Certificate{Key: host.PublicKey(), CertType: gossh.HostCert, KeyId: name, ValidPrincipals: []string{name}, ValidBefore: gossh.CertTimeInfinity, Serial: serial}
		if err := cert.SignCert(rand.Reader, ca); err != nil {
			t.Fatal(err)
		}
		write(certFile, gossh.MarshalAuthorizedKey(cert))
	}
	write(keyFile, pem.EncodeToMemory(block))
	certify(1, "cp-1.prod")
	renewed, err := HostFiles(keyFile, certFile, "cp-1.prod", zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, func(o *Options) { o.HostSigners, o.HostRenewed = nil, renewed })
	ada := s.person(t, "ada", nil)
	dial := func() (*gossh.Client, uint64) {
		t.Helper()
		var serial uint64
		client, err := gossh.Dial("tcp", s.addr, &gossh.ClientConfig{User: "responder", Auth: []gossh.AuthMethod{gossh.PublicKeys(ada)}, Timeout: patience,
			HostKeyCallback: func(_ string, _ net.Addr, key gossh.PublicKey) error {
				if cert, ok := key.(*gossh.Certificate); ok {
					serial = cert.Serial
				}
				return nil
			}})
		if err != nil {
			t.Fatal(err)
		}
		return client, serial
	}
	first, serial := dial()
	defer first.Close()
	if serial != 1 {
		t.Fatalf("shown: %d", serial)
	}
	certify(2, "cp-2.prod")
	time.Sleep(1100 * time.Millisecond) // it looks once in a second
	client, serial := dial()
	client.Close()
	if serial != 1 {
		t.Errorf("another node's certificate, %d, is shown", serial)
	}
	certify(3, "cp-1.prod")
	for end := time.Now().Add(patience); serial != 3; {
		if client, serial = dial(); time.Now().After(end) {
			t.Fatalf("shown after it was renewed: %d", serial)
		}
		client.Close()
		time.Sleep(50 * time.Millisecond)
	}
	if _, _, err := first.SendRequest("keepalive@openssh.com", true, nil); err != nil {
		t.Errorf("who was in before: %v", err)
	}
}

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
