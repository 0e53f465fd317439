package sshserver

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// TestMain becomes a naive server where TestTraps starts one: it has to be a
// process of its own, since one of the traps kills it.
func TestMain(m *testing.M) {
	if kind := os.Getenv("SSHSERVER_TEST_NAIVE"); kind != "" {
		naive(kind)
		return
	}
	os.Exit(m.Run())
}

// patience bounds what must happen at some time on a busy machine.
const patience = 20 * time.Second

// newSigner returns a key pair.
func newSigner(t testing.TB) gossh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := gossh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// event log of a server's alarms.
type alarms struct {
	mu  sync.Mutex
	all []alarm.Event
}

func (a *alarms) raise(e alarm.Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, e)
}

func (a *alarms) of(kind alarm.Kind) (found []alarm.Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range a.all {
		if e.Kind == kind {
			found = append(found, e)
		}
	}
	return found
}

// served is a server on loopback, with a user CA and the identities that tests
// come as.
type served struct {
	*Server
	addr   string
	host   gossh.Signer
	ca     gossh.Signer
	alarms *alarms

	mu    sync.Mutex
	known map[string]trust.Identity // plain keys, by fingerprint
	hold  map[string]context.CancelCauseFunc
	stop  func()
}

// serve starts a server; change may alter its options.
func serve(t testing.TB, change func(*Options)) *served {
	t.Helper()
	s := &served{host: newSigner(t), ca: newSigner(t), alarms: &alarms{}, known: map[string]trust.Identity{}, hold: map[string]context.CancelCauseFunc{}}
	o := Options{
		HostSigners:  []gossh.Signer{s.host},
		Authenticate: s.authenticate,
		Hold: func(ctx context.Context, who trust.Identity) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancelCause(ctx)
			s.mu.Lock()
			defer s.mu.Unlock()
			s.hold[who.Person] = cancel
			return ctx, func() { cancel(context.Canceled) }
		},
		Handlers: Handlers{Session: answer, Subsystems: map[string]func(*Session){"echo": echo}},
		Log:      zerolog.Nop(),
		Alarm:    s.alarms.raise,
	}
	if change != nil {
		change(&o)
	}
	var err error
	if s.Server, err = New(o); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(patience):
			buf := make([]byte, 1<<20)
			t.Errorf("Serve did not end\n%s", buf[:runtime.Stack(buf, true)])
		}
		if n, m, k := s.waiting.Count(), s.logins.Taken(), s.channels.Taken(); n+m+k+len(s.places) != 0 {
			t.Errorf("left behind: %d waiting, %d logins, %d channels, %d places", n, m, k, len(s.places))
		}
	})
	t.Cleanup(s.stop)
	return s
}

// authenticate knows plain keys, and certificates of the CA.
func (s *served) authenticate(key gossh.PublicKey, user string, remote net.Addr) (trust.Identity, error) {
	if cert, ok := key.(*gossh.Certificate); ok {
		checker := gossh.CertChecker{IsUserAuthority: func(k gossh.PublicKey) bool { return bytes.Equal(k.Marshal(), s.ca.PublicKey().Marshal()) }}
		if !checker.IsUserAuthority(cert.SignatureKey) || cert.CertType != gossh.UserCert {
			return trust.Identity{}, fault.New(fault.Unauthenticated, "", "not a user certificate of this fleet")
		}
		if err := checker.CheckCert(user, cert); err != nil {
			return trust.Identity{}, fault.New(fault.Unauthenticated, "renew it", "certificate of %s: %w", cert.KeyId, err)
		}
		role, err := trust.ParseRole(user)
		return trust.Identity{Person: cert.KeyId, Role: role, Door: trust.SSH, Kind: trust.Person, Source: remote.String()}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	who, ok := s.known[gossh.FingerprintSHA256(key)]
	if !ok {
		return trust.Identity{}, errors.New("unknown key; a text for the log only")
	}
	who.Source = remote.String()
	return who, nil
}

// enrol makes a key known.
func (s *served) enrol(key gossh.PublicKey, who trust.Identity) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known[gossh.FingerprintSHA256(key)] = who
}

// end ends the login of a person.
func (s *served) end(person string, cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hold[person](cause)
}

// person enrols somebody with a new key.
func (s *served) person(t testing.TB, name string, change func(*trust.Identity)) gossh.Signer {
	t.Helper()
	signer := newSigner(t)
	who := trust.Identity{Person: name, Role: trust.Responder, Door: trust.SSH, Kind: trust.Person}
	if change != nil {
		change(&who)
	}
	s.enrol(signer.PublicKey(), who)
	return signer
}

// dial logs in with x/crypto's client.
func (s *served) dial(t testing.TB, signers ...gossh.Signer) (*gossh.Client, error) {
	t.Helper()
	return gossh.Dial("tcp", s.addr, &gossh.ClientConfig{User: "responder", Auth: []gossh.AuthMethod{gossh.PublicKeys(signers...)},
		HostKeyCallback: gossh.FixedHostKey(s.host.PublicKey()), Timeout: patience})
}

func (s *served) mustDial(t testing.TB, signers ...gossh.Signer) *gossh.Client {
	t.Helper()
	client, err := s.dial(t, signers...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// run runs a command with x/crypto's client.
func run(client *gossh.Client, command string) (string, error) {
	session, err := client.NewSession()
	if err != nil {
		return "", err
	}
	defer session.Close()
	out, err := session.CombinedOutput(command)
	return string(out), err
}

// answer is the session handler of these tests: a few words that show what the
// handler got to know.
func answer(s *Session) {
	switch word, rest, _ := strings.Cut(s.Command(), " "); word {
	case "whoami":
		fmt.Fprintf(s, "%s %s\n", s.Identity().Person, s.Identity().Role)
	case "env":
		for _, name := range []string{"HALLIGAN_INCIDENT", "HALLIGAN_REASON", "LANG", "LC_ALL", "LD_PRELOAD", "TERM"} {
			fmt.Fprintf(s, "%s=%s\n", name, s.Env()[name])
		}
	case "raw":
		fmt.Fprintf(s, "%q\n", rest)
	case "cat":
		_, _ = io.Copy(s, s)
	case "fail":
		fmt.Fprintln(s.Stderr(), "failed as asked")
		_ = s.Exit(7)
	case "panic":
		panic("as asked")
	case "wait":
		fmt.Fprintln(s, "waiting")
		<-s.Context().Done()
	case "":
		shell(s)
	default:
		fmt.Fprintf(s.Stderr(), "no such verb %q\n", word)
		_ = s.Exit(2)
	}
}

// shell answers lines and tells of its terminal.
func shell(s *Session) {
	pty, ok := s.Pty()
	fmt.Fprintf(s, "pty=%v term=%s %dx%d\n", ok, pty.Term, pty.Window.Columns, pty.Window.Rows)
	lines := make(chan string)
	go func() {
		defer close(lines)
		for in := bufio.NewReader(s); ; {
			line, err := in.ReadString('\r')
			if err != nil {
				return
			}
			select {
			case lines <- strings.TrimSpace(line):
			case <-s.Context().Done():
				return
			}
		}
	}()
	for {
		select {
		case w := <-s.Windows():
			if w != pty.Window {
				fmt.Fprintf(s, "resized to %dx%d\n", w.Columns, w.Rows)
			}
		case line, more := <-lines:
			if !more || line == "exit" {
				_ = s.Exit(3)
				return
			}
			fmt.Fprintf(s, "you said %q\n", line)
		}
	}
}

func echo(s *Session) { _, _ = io.Copy(s, s) }

// tool returns the path of a program that tests compare with. Where it lacks the
// test is skipped, but not in CI, which installs it.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skipf("NOT TESTED: %v", err)
	}
	return path
}

// keygen runs ssh-keygen.
func keygen(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command(tool(t, "ssh-keygen"), args...).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen %q: %v\n%s", args, err, out)
	}
}

// readKey reads a public key or a certificate.
func readKey(t testing.TB, path string) gossh.PublicKey {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	key, _, _, _, err := gossh.ParseAuthorizedKey(text)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// openssh is stock OpenSSH in a folder of its own, that knows a server's host key.
type openssh struct {
	dir  string
	addr string
}

func newOpenSSH(t testing.TB, addr string, host gossh.PublicKey) *openssh {
	t.Helper()
	o := &openssh{dir: t.TempDir(), addr: addr}
	ip, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	line := fmt.Sprintf("[%s]:%s %s", ip, port, gossh.MarshalAuthorizedKey(host))
	if err := os.WriteFile(o.path("known_hosts"), []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *openssh) path(name string) string { return filepath.Join(o.dir, name) }

// options are what ssh, scp and sftp share; without the user's own files.
func (o *openssh) options() []string {
	_, port, _ := net.SplitHostPort(o.addr)
	return []string{"-F", "none", "-oPort=" + port, "-oUserKnownHostsFile=" + o.path("known_hosts"), "-oGlobalKnownHostsFile=none", "-oStrictHostKeyChecking=yes",
		"-oBatchMode=yes", "-oIdentitiesOnly=yes", "-oIdentityAgent=none", "-oConnectTimeout=20", "-oUser=responder"}
}

// command returns ssh with more arguments, of which host is the last option.
func (o *openssh) command(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	// Later options give way to earlier ones.
	cmd := exec.CommandContext(ctx, tool(t, "ssh"), append(args[:len(args):len(args)], o.options()...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "SSH_AUTH_SOCK=", "DISPLAY=")
	cmd.WaitDelay = time.Second
	return cmd
}

// ssh runs ssh; what follows the host comes last.
func (o *openssh) ssh(t testing.TB, options []string, rest ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd := o.command(t, options...)
	cmd.Args = append(append(cmd.Args, "127.0.0.1"), rest...)
	return finish(t, cmd)
}

func finish(t testing.TB, cmd *exec.Cmd) (stdout, stderr string, status int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if cmd.Env == nil {
		cmd.Env = append(os.Environ(), "LC_ALL=C", "SSH_AUTH_SOCK=", "DISPLAY=")
	}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// key makes a key pair with ssh-keygen and returns its file.
func (o *openssh) key(t testing.TB, name string) (file string, key gossh.PublicKey) {
	t.Helper()
	keygen(t, "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", o.path(name))
	return o.path(name), readKey(t, o.path(name)+".pub")
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in %v: %s", patience, what)
		}
	}
}

// Only a server that says so takes an identity without a role, and none takes
// one without a name.
func TestRoleless(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		roleless bool
		person   string
		in       bool
	}{{true, "ada", true}, {false, "ada", false}, {true, "", false}} {
		s := serve(t, func(o *Options) { o.Roleless = c.roleless })
		key := newSigner(t)
		s.enrol(key.PublicKey(), trust.Identity{Person: c.person, Door: trust.SSH, Kind: trust.Person})
		client, err := gossh.Dial("tcp", s.addr, &gossh.ClientConfig{User: "x", Auth: []gossh.AuthMethod{gossh.PublicKeys(key)}, HostKeyCallback: gossh.FixedHostKey(s.host.PublicKey()), Timeout: patience})
		if (err == nil) != c.in {
			t.Errorf("%+v: %v", c, err)
		}
		if err == nil {
			client.Close()
		}
	}
}
