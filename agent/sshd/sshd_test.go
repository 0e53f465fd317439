package sshd

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
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
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/halligan-io/halligan/agent/door"
	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit/cast"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
)

// engine plays what the name in a target asks for.
type engine struct {
	begun, halted chan struct{} // of the applications that last
	ended         chan string   // what became of them
	bulk          int           // how many objects there are beside one

	mu      sync.Mutex // guards what follows
	plans   map[string]*halliganv1.Plan
	applied []string // by whom and why
}

func (e *engine) Describe() []*halliganv1.Action {
	actions, err := api.Actions()
	if err != nil {
		panic(err)
	}
	return actions
}

func (e *engine) Status(context.Context, trust.Identity) (*halliganv1.StatusResponse, error) {
	return &halliganv1.StatusResponse{Node: "cp-1", ReadOnly: "the disk is \x1bfull", Etcd: &halliganv1.EtcdStatus{Version: "3.7.3"}}, nil
}

func (e *engine) Plan(_ context.Context, who trust.Identity, req *halliganv1.PlanRequest) (*halliganv1.Plan, error) {
	_, play, _ := strings.Cut(req.GetParameters().GetFields()["target"].GetStringValue(), "/")
	if play == "refused" {
		return nil, fault.New(fault.Refused, "choose another", "it is protected")
	}
	p := &halliganv1.Plan{Id: "id-" + play, Action: req.GetAction(), Parameters: req.GetParameters(), Actor: who.Person, Node: "cp-1", Reason: req.GetReason(), Summary: req.GetAction() + " " + play,
		Objects: []*halliganv1.PlannedObject{{Key: "/registry/x/" + play, Resource: "deployments.apps", Name: play, Operation: "update"}}}
	if play == "approve" {
		p.ApprovalsNeeded = 1
	}
	var err error
	if p.Sha256, err = api.PlanSHA256(p); err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.plans[p.GetId()] = p
	return p, nil
}

func (e *engine) Undo(ctx context.Context, who trust.Identity, req *halliganv1.UndoRequest) (*halliganv1.Plan, error) {
	return e.Plan(ctx, who, &halliganv1.PlanRequest{Action: "undo", Reason: req.GetReason(), Incident: req.GetIncident(),
		Parameters: &structpb.Struct{Fields: map[string]*structpb.Value{"action": structpb.NewStringValue(req.GetActionId())}}})
}

func (e *engine) ShowPlan(_ context.Context, _ trust.Identity, id string) (*halliganv1.Plan, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if p := e.plans[id]; p != nil {
		return p, nil
	}
	return nil, fault.New(fault.NotFound, "plan again", "no plan %s", id)
}

func (e *engine) Apply(ctx context.Context, who trust.Identity, req *halliganv1.ApplyRequest, _ func(*halliganv1.Progress)) *halliganv1.Result {
	e.mu.Lock()
	p := e.plans[req.GetPlanId()]
	e.applied = append(e.applied, who.Person+" "+p.GetReason())
	e.mu.Unlock()
	r := &halliganv1.Result{Action: p.GetId(), Result: "applied", Plan: p, Objects: []*halliganv1.ObjectResult{{Outcome: "applied"}}}
	if p.GetId() == "id-slow" {
		e.begun <- struct{}{}
		select {
		case <-e.halted:
			r.Result, r.Error = "partial", api.ErrorOf(fault.New(fault.Cancelled, "see what is left", "stopped between two objects"))
			e.ended <- "stopped"
		case <-ctx.Done():
			e.ended <- "broken off"
		case <-time.After(time.Second):
			e.ended <- "done"
		}
	}
	return r
}

func (e *engine) Stop(trust.Identity, string) error { close(e.halted); return nil }

func (e *engine) Get(_ context.Context, _ trust.Identity, _ *halliganv1.GetRequest, send func(*halliganv1.Object) error) (*halliganv1.GetSummary, error) {
	for i := range e.bulk {
		if err := send(&halliganv1.Object{Namespace: "telemetry", Name: fmt.Sprintf("collector-%08d", i), State: "3/3 ready"}); err != nil {
			return nil, err
		}
	}
	return &halliganv1.GetSummary{Objects: 1}, send(&halliganv1.Object{Name: "evil\x1b]0;owned\a", State: "3/3", Json: `{"data":"evil"}`})
}

func (e *engine) History(context.Context, trust.Identity, *halliganv1.HistoryRequest, func(*halliganv1.HistoryEntry) error) error {
	return nil
}

func (e *engine) applications() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]string{}, e.applied...)
}

type silence struct{}

func (silence) Raise(alarm.Event) {}

// host is an agent's SSH door on loopback, and a stock ssh that may enter it.
type host struct {
	*engine
	config string
	revoke context.CancelCauseFunc
	// address and key are for who comes with no ssh.
	address string
	key     gossh.Signer
}

var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func open(t *testing.T) *host { return openRecorded(t, nil) }

func openRecorded(t testing.TB, recorder *cast.Recorder) *host {
	t.Helper()
	if _, err := exec.LookPath("ssh"); err != nil {
		t.Skip("no ssh")
	}
	h := &host{engine: &engine{begun: make(chan struct{}, 1), halted: make(chan struct{}), ended: make(chan string, 1), plans: map[string]*halliganv1.Plan{}}}
	api, err := door.New(door.Options{Engine: h.engine, Alarms: silence{}, Cluster: "lab", Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Shutdown)
	dir := t.TempDir()
	id := filepath.Join(dir, "id")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", id).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := gossh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	ended, revoke := context.WithCancelCause(context.Background())
	h.revoke = revoke
	server, err := sshserver.New(sshserver.Options{
		HostSigners: []gossh.Signer{signer},
		Authenticate: func(key gossh.PublicKey, given string, remote net.Addr) (trust.Identity, error) {
			kind, user := trust.Person, strings.TrimSuffix(given, "-robot")
			if user != given {
				kind = trust.Automation
			}
			role, err := trust.ParseRole(user)
			return trust.Identity{Person: "anna", Role: role, Door: trust.SSH, Kind: kind, Fingerprint: gossh.FingerprintSHA256(key),
				Source: remote.String(), NotAfter: noon.Add(50 * time.Hour)}, err
		},
		Hold: func(ctx context.Context, _ trust.Identity) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancelCause(ctx)
			stop := context.AfterFunc(ended, func() { cancel(context.Cause(ended)) })
			return ctx, func() { stop(); cancel(nil) }
		},
		Handlers: Handlers(Options{Door: api, Node: "cp-1", Cluster: "lab", Recorder: recorder, Now: func() time.Time { return noon }, Log: zerolog.Nop()}),
		Log:      zerolog.Nop(),
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	h.address, h.key = l.Addr().String(), signer // which is let in as any
	port := l.Addr().(*net.TCPAddr).Port
	known := fmt.Sprintf("[127.0.0.1]:%d %s", port, gossh.MarshalAuthorizedKey(signer.PublicKey()))
	h.config = filepath.Join(dir, "config")
	for name, text := range map[string]string{filepath.Join(dir, "known"): known, h.config: fmt.Sprintf(`Host cp-1
HostName 127.0.0.1
Port %d
User responder
IdentityFile %s
IdentitiesOnly yes
UserKnownHostsFile %s
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
LogLevel ERROR
SendEnv HALLIGAN_*
`, port, id, filepath.Join(dir, "known"))} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func (h *host) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "ssh", append([]string{"-F", h.config}, args...)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "TERM=xterm"}
	return cmd
}

// ssh runs stock ssh to its end.
func (h *host) ssh(t *testing.T, input string, env []string, args ...string) (status int, out, errs string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := h.command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &stdout, &stderr
	cmd.Env = append(cmd.Env, env...)
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
}

func TestExec(t *testing.T) {
	h := open(t)
	for _, c := range []struct {
		line      string
		status    int
		out, errs string
	}{
		{"whoami", 0, "anna\n  role      responder\n  door      ssh\n  agent     cp-1 (lab)\n  until     credential ends in 2d2h", ""},
		{"halligan whoami -o json", 0, `"actor":"anna"`, ""},
		{"help scale", 0, "halligan scale KIND/NAME", ""},
		{"scale deploy/web --to 0 --reason 'a storm' --yes", 0, "applied: 1 of 1 objects", ""},
		{"scale deploy/web --to 0 --reason storm", 2, "Plan id-web", "there is no terminal to ask on"},
		{"scale deploy/web --to 0 --yes", 2, "", "needs a reason"},
		{"scale deploy/web --to 0 --dry-run", 0, "Plan id-web", ""},
		{"scale deploy/refused --to 0 --reason x --yes", 4, "", "halligan: it is protected; choose another\n"},
		{"scale deploy/approve --to 0 --reason x --yes", 6, "halligan approve --node cp-1 id-approve\n", "awaits the approval"},
		{"apply id-approve --approval /etc/passwd", 2, "", "no files can be read here"},
		{"apply id-web --yes -o json", 0, `"result":"applied"`, ""},
		{"get deploy", 0, "evil\\x1b]0;owned\\x07", ""},
		{"status; id", 2, "", "plain words"},
		{"status | cat", 2, "", "plain words"},
		{"status > /tmp/x", 2, "", "plain words"},
		{"get $(id)", 2, "", "nothing is run"},
		{"get $HOME", 2, "", "no variables"},
		{"get 'x", 2, "", "plain words"},
		{"get \x1b[31m", 2, "", "control characters"},
		{"get \xff", 2, "", "UTF-8"},
		{"bash -i", 2, "", `unknown verb "bash"`},
		{"scp -t /tmp", 2, "", `unknown verb "scp"`},
		{"status --socket /run/halligan.sock", 2, "", "unknown flag"},
		{"completion bash", 2, "", "unknown verb"},
		{"__complete sc", 2, "", "unknown verb"},
		{"exit", 2, "", "unknown verb"},
		{"# nothing", 0, "", ""},
	} {
		status, out, errs := h.ssh(t, "", nil, "cp-1", c.line)
		if status != c.status || !strings.Contains(out, c.out) || !strings.Contains(errs, c.errs) || c.status == 0 && errs != "" || strings.ContainsAny(out+errs, "\x1b\r") {
			t.Errorf("%q: %d, %q, %q", c.line, status, out, errs)
		}
	}
	// A whole shell's reason, and a line too long for a command.
	if status, _, errs := h.ssh(t, "", []string{"HALLIGAN_REASON=by env"}, "cp-1", "scale deploy/web --to 0 -y"); status != 0 {
		t.Error(status, errs)
	}
	// A plan applied by its ID has its own reason, here none.
	if got := strings.Join(h.applications(), "|"); got != "anna a storm|anna |anna by env" {
		t.Error(got)
	}
	if status, out, _ := h.ssh(t, "", nil, "cp-1", "get "+strings.Repeat("x", 70<<10)); status == 0 || out != "" {
		t.Error(status, out)
	}
	// An approver has whoami, and the agent refuses the rest.
	if status, out, _ := h.ssh(t, "", nil, "-l", "approver", "cp-1", "whoami"); status != 0 || !strings.Contains(out, "approver") {
		t.Error(status, out)
	}
	if status, _, errs := h.ssh(t, "", nil, "-l", "approver", "cp-1", "get deploy"); status != 4 {
		t.Error(status, errs)
	}
}

func TestScript(t *testing.T) {
	h := open(t)
	status, out, errs := h.ssh(t, "# what is meant\nreason in the night\n\nscale deploy/a --to 0 -y\nscale deploy/refused --to 0 -y\r\nscale deploy/b --to 0 -y\nexit\nscale deploy/c --to 0 -y\n", nil, "-T", "cp-1")
	if status != 4 || strings.Count(out, "applied: 1 of 1") != 2 || !strings.Contains(errs, "it is protected") || strings.Contains(out, "halligan responder@") {
		t.Errorf("%d, %q, %q", status, out, errs)
	}
	if got := strings.Join(h.applications(), "|"); got != "anna in the night|anna in the night" {
		t.Error(got)
	}
	if status, _, errs := h.ssh(t, "get "+strings.Repeat("x", 1<<20), nil, "-T", "cp-1"); status != 2 || !strings.Contains(errs, "bytes") {
		t.Errorf("%d, %q", status, errs)
	}
}

// person sits at a terminal before ssh.
type person struct {
	t     *testing.T
	file  *os.File
	ended chan error

	mu   sync.Mutex // guards seen
	seen []byte
	at   int // what was expected ends here
}

func (h *host) sit(t *testing.T, args ...string) *person {
	t.Helper()
	cmd := h.command(t.Context(), args...)
	f, err := pty.StartWithSize(cmd, &pty.Winsize{Cols: 100, Rows: 30})
	if err != nil {
		t.Fatal(err)
	}
	p := &person{t: t, file: f, ended: make(chan error, 1)}
	go func() { // ends with the command
		chunk := make([]byte, 4096)
		for {
			n, err := f.Read(chunk)
			p.mu.Lock()
			p.seen = append(p.seen, chunk[:n]...)
			p.mu.Unlock()
			if err != nil {
				break
			}
		}
		p.ended <- cmd.Wait()
	}()
	t.Cleanup(func() { _ = cmd.Process.Kill(); f.Close() })
	return p
}

func (p *person) types(text string) {
	p.t.Helper()
	if _, err := p.file.WriteString(text); err != nil {
		p.t.Fatal(err)
	}
}

// sees waits until the text is shown, after what was seen before, and returns
// what was shown on the way.
func (p *person) sees(text string) string {
	p.t.Helper()
	for range 1000 {
		p.mu.Lock()
		rest := p.seen[p.at:]
		i := bytes.Index(rest, []byte(text))
		if i >= 0 {
			p.at += i + len(text)
			p.mu.Unlock()
			return string(rest[:i+len(text)])
		}
		p.mu.Unlock()
		time.Sleep(10 * time.Millisecond)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.t.Fatalf("no %q in:\n%q\nall:\n%q", text, p.seen[p.at:], p.seen)
	return ""
}

func (p *person) leaves(status int) {
	p.t.Helper()
	select {
	case err := <-p.ended:
		got := 0
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			got = exit.ExitCode()
		}
		if got != status {
			p.t.Errorf("exit status %d, want %d: %q", got, status, p.seen)
		}
	case <-time.After(20 * time.Second):
		p.mu.Lock()
		defer p.mu.Unlock()
		p.t.Fatalf("it does not end: %q", p.seen)
	}
}

const prompt = "halligan responder@cp-1.lab> "

func TestShell(t *testing.T) {
	h := open(t)
	p := h.sit(t, "cp-1")
	if banner := p.sees(prompt); !strings.Contains(banner, "anna as responder at cp-1.lab, credential ends in 2d2h, at 2026-11-25T14:00:00Z; help lists the verbs\r\nwarning: your credential ends in 2d2h, at 2026-11-25T14:00:00Z; have it renewed: halligan ca renew\r\n") ||
		!strings.Contains(banner, `warning: mutations are refused: the disk is \x1bfull`) {
		t.Errorf("%q", banner)
	}
	p.types("whoami\r")
	p.sees("role      responder\r\n")
	p.sees(prompt)
	// Completion: of a verb, of a flag, of a choice.
	p.types("sca\t")
	p.sees("scale ")
	p.types("deploy/web --t\t\t")
	p.sees("--timeout  --to\r\n")
	p.types("o 0\r")
	p.sees("scale needs a reason for the record")
	p.sees(prompt)
	p.types("reason storm in 'the shop'\r")
	p.sees("reason: storm in the shop")
	p.sees(prompt)
	// The line before the last comes back, and y before the question is no
	// answer to it.
	p.types("\x1b[A\x1b[A\ry\r")
	p.sees("Apply this plan? [y/N] ")
	p.types("y\r")
	p.sees("applied: 1 of 1 objects")
	p.sees(prompt)
	p.types("\x1b[A")
	p.sees("--to 0") // an answer is no line to have back
	// Ctrl-C clears the line.
	p.types(" and more\x03")
	p.sees(prompt)
	p.types("get deploy\r")
	if shown := p.sees(prompt); !strings.Contains(shown, `evil\x1b]0;owned\x07`) || strings.Contains(shown, "\a") {
		t.Errorf("%q", shown)
	}
	p.types("get deploy; id\r")
	p.sees("plain words")
	p.sees(prompt)
	// Ctrl-C declines, and stops what runs between two objects.
	p.types("scale deploy/web --to 0\r")
	p.sees("[y/N] ")
	p.types("\x03")
	p.sees("not confirmed")
	p.sees(prompt)
	p.types("scale deploy/slow --to 0 -y\r")
	<-h.begun
	p.types("\x03")
	p.sees("stopping id-slow between two objects")
	p.sees("stopped between two objects")
	p.sees(prompt)
	if err := pty.Setsize(p.file, &pty.Winsize{Cols: 60, Rows: 20}); err != nil {
		t.Fatal(err)
	}
	p.types("help\r")
	p.sees("exit ")
	p.sees(prompt)
	p.types("exit\r")
	p.leaves(0)
	if got := strings.Join(h.applications(), "|"); got != "anna storm in the shop|anna storm in the shop" {
		t.Error(got)
	}
	p = h.sit(t, "cp-1")
	p.sees(prompt)
	p.types("scale deploy/refused --to 0 -y --reason x\r")
	p.sees(prompt)
	p.types("\x04")
	p.leaves(4)
}

// TestExecOnTerminal: ssh -t asks.
func TestExecOnTerminal(t *testing.T) {
	h := open(t)
	p := h.sit(t, "-t", "cp-1", "scale deploy/web --to 0 --reason x")
	p.sees("[y/N] ")
	p.types("yes\r")
	p.sees("applied: 1 of 1 objects")
	p.leaves(0)
	p = h.sit(t, "-t", "cp-1", "scale deploy/web --to 0 --reason x")
	p.sees("[y/N] ")
	p.types("\x03")
	p.leaves(1)
}

// TestGone: an action goes on when nobody watches any more, and a login that
// ends takes the shell with it.
func TestGone(t *testing.T) {
	h := open(t)
	cmd := h.command(t.Context(), "cp-1", "scale deploy/slow --to 0 -y --reason x")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-h.begun
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if became := <-h.ended; became != "done" {
		t.Errorf("it was %s", became)
	}
	p := h.sit(t, "cp-1")
	p.sees(prompt)
	h.revoke(fault.New(fault.Unauthenticated, "log in again", "the certificate was revoked"))
	p.sees("the certificate was revoked")
	p.leaves(255)
}

// pipe is a program's standard streams as a connection.
type pipe struct {
	io.Reader
	io.WriteCloser
}

func (pipe) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (pipe) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (pipe) SetDeadline(time.Time) error      { return nil }
func (pipe) SetReadDeadline(time.Time) error  { return nil }
func (pipe) SetWriteDeadline(time.Time) error { return nil }

// TestSubsystem speaks the agent's API through ssh -s.
func TestSubsystem(t *testing.T) {
	h := open(t)
	cmd := h.command(t.Context(), "-s", "cp-1", grpcdoor.Subsystem)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("passthrough:///ssh", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return pipe{bufio.NewReader(out), in}, nil }))
	if err != nil {
		t.Fatal(err)
	}
	client := halliganv1.NewAgentClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if table, err := client.Describe(ctx, &halliganv1.DescribeRequest{}); err != nil || len(table.GetActions()) == 0 {
		t.Errorf("%v, %v", table, err)
	}
	plan, err := client.Plan(ctx, &halliganv1.PlanRequest{Action: "scale", Reason: "x"})
	if err != nil || plan.GetActor() != "anna" {
		t.Errorf("%v, %v", plan, err)
	}
	conn.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if status, out, _ := h.ssh(t, "", nil, "-s", "cp-1", "sftp"); status == 0 || out != "" {
		t.Error("there is sftp")
	}
}

func TestKeyboard(t *testing.T) {
	near, far := net.Pipe()
	k := newKeyboard(far)
	types := func(text string) {
		if _, err := io.WriteString(near, text); err != nil {
			t.Error(err)
		}
	}
	read := func(want string) {
		t.Helper()
		got := make([]byte, 100)
		n, err := k.Read(got)
		if string(got[:n]) != want || err != nil {
			t.Errorf("%q, %v; want %q", got[:n], err, want)
		}
	}
	// One line at a time, and Ctrl-C takes back what was typed before it.
	types("one\rtwo")
	read("one\r")
	read("two")
	types("lost\x03kept\r")
	read("kept\r")
	end := k.edit()
	types("lost\x03")
	read(clearLine)
	ctx, cancel := context.WithCancel(t.Context())
	defer k.interrupts(cancel)()
	types("lost\x03")
	<-ctx.Done()
	k.abandon()
	read(clearLine)
	end()
	k.abandon() // does nothing
	// More than the most makes the client wait, and is not lost.
	done := make(chan struct{})
	go func() {
		defer close(done)
		types(strings.Repeat("x", 3*maxAhead))
	}()
	total, chunk := 0, make([]byte, 1000)
	for total < 3*maxAhead {
		n, err := k.Read(chunk)
		if err != nil {
			t.Fatal(err)
		}
		k.mu.Lock()
		held := len(k.buf)
		k.mu.Unlock()
		if total += n; held > maxAhead+1024 {
			t.Fatalf("%d bytes are held", held)
		}
	}
	<-done
	near.Close()
	k.wait()
	if _, err := k.Read(chunk); err == nil {
		t.Error("it reads on")
	}
}
