package lobby

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/cast"
	"github.com/halligan-io/halligan/internal/execline"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
)

var now = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// hostile is what somebody may have chosen who wants a terminal.
const hostile = "a\x1b[2J\x1b]0;x\x07b\tc\nd\u202ee"

// bastion is an API that says the worst, and counts what would change something.
type bastion struct {
	halliganv1.UnimplementedBastionServer
	failing error
}

func (b bastion) Status(context.Context, *halliganv1.BastionStatusRequest) (*halliganv1.BastionStatusResponse, error) {
	return &halliganv1.BastionStatusResponse{Bastion: "bastion-a", Version: hostile, Time: timestamppb.New(now), Person: "ada", Clusters: []string{"prod", "staging"}, Roles: []string{"responder"},
		CredentialExpires: timestamppb.New(now.Add(time.Hour)), StoreDegraded: "the store is " + hostile, Warnings: []string{"beware of " + hostile}, Door: "ssh",
		Audit:   &halliganv1.AuditStatus{Events: 12, Signed: 11, Witnessed: map[string]uint64{hostile: 10}, Bytes: 2048, Reserve: 2048},
		Mirrors: []*halliganv1.MirrorStatus{{Origin: "cp-1.prod", Events: 7, LagSeconds: 90}, {Origin: "cp-2.prod", Problem: "it forked: " + hostile}, {Origin: "cp-3.prod", LagSeconds: -1}}}, b.failing
}

func (b bastion) Nodes(_ context.Context, req *halliganv1.NodesRequest) (*halliganv1.NodesResponse, error) {
	return &halliganv1.NodesResponse{Nodes: []*halliganv1.Node{
		{Name: "cp-1", Cluster: req.GetCluster(), Address: "10.0.0.1", SshPort: 2222, GrpcPort: 7443, Reach: "in"},
		{Name: hostile, Cluster: "prod", Address: "10.0.0.2", SshPort: 2222, Reach: "out", TunnelSince: timestamppb.New(now.Add(-90 * time.Second))},
	}}, b.failing
}

func (b bastion) Sessions(context.Context, *halliganv1.SessionsRequest) (*halliganv1.SessionsResponse, error) {
	return &halliganv1.SessionsResponse{Sessions: []*halliganv1.Session{{Person: hostile, Credential: "person", Door: "ssh", Source: "192.0.2.1:5", Target: "cp-1.prod", Bastion: "bastion-b",
		Started: timestamppb.New(now.Add(time.Hour))}}, Incomplete: hostile}, b.failing
}

func (b bastion) ListPlans(_ context.Context, req *halliganv1.ListPlansRequest) (*halliganv1.ListPlansResponse, error) {
	if req.GetPlanId() == "none" {
		return &halliganv1.ListPlansResponse{}, b.failing
	}
	return &halliganv1.ListPlansResponse{Plans: []*halliganv1.WaitingPlan{{PlanId: "7f", Requester: hostile, Cluster: "prod", Node: "cp-1", Summary: hostile, Reason: strings.Repeat("why ", 1000),
		ApprovalsNeeded: 2, Approvers: []string{"bob"}, Expires: timestamppb.New(now.Add(time.Minute))}}}, b.failing
}

// roles are those that the guest's credential is for.
var roles []trust.Role

// guest is a session without a client.
type guest struct {
	io.Reader
	bytes.Buffer
	errs    bytes.Buffer
	command string
	status  int
}

func (g *guest) Read(p []byte) (int, error) { return g.Reader.Read(p) }
func (g *guest) Stderr() io.Writer          { return &g.errs }
func (g *guest) Identity() trust.Identity {
	return trust.Identity{Person: "ada", Kind: trust.Person, Roles: roles}
}
func (g *guest) Held() context.Context            { return context.Background() }
func (g *guest) Context() context.Context         { return context.Background() }
func (g *guest) Command() string                  { return g.command }
func (g *guest) Pty() (sshserver.Pty, bool)       { return sshserver.Pty{}, false }
func (g *guest) Windows() <-chan sshserver.Window { return nil }
func (g *guest) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (g *guest) Exit(status int) error            { g.status = status; return nil }

// visits runs a line, or what comes on standard input.
func visits(t *testing.T, b bastion, line, in string) *guest {
	t.Helper()
	return recordedVisit(t, nil, b, line, in)
}

func recordedVisit(t *testing.T, r *cast.Recorder, b bastion, line, in string) *guest {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	server := grpc.NewServer()
	halliganv1.RegisterBastionServer(server, b)
	go func() { _ = server.Serve(l) }()
	defer server.Stop()
	g := &guest{Reader: strings.NewReader(in), command: line}
	serve(Options{Bastion: "bastion-a", Recorder: r, Now: func() time.Time { return now }, Log: zerolog.Nop(), Dial: func(trust.Identity, context.Context) (*grpc.ClientConn, error) {
		return grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	}}, g)
	return g
}

func TestCommands(t *testing.T) {
	for line, want := range map[string][]string{
		"nodes":          {"NODE", "cp-1", "10.0.0.1", "2222", "7443", "in", "1m30s", `a\x1b[2J\x1b]0;x\x07b\tc\nd\u202ee`},
		"nodes prod":     {"cp-1", "prod"},
		"sessions":       {"bastion-b", "cp-1.prod", "0s", "note: sessions may be missing"},
		"approvals":      {"7f", "cp-1.prod", "bob", "1m0s", "halligan approve PLAN"},
		"approvals 7f":   {"7f"},
		"approvals none": {"PLAN"},
		"status":         {"bastion-a", "degraded: the store is a", "warning: beware of a", "12 events, 11 signed, 10 witnessed by a", "cp-1.prod: 7 events, all of them 1m30s ago", "it forked: a", "never known to be all"},
		"whoami":         {"ada", "prod, staging", "responder", "ends in", "at 2026-06-01T13:00:00Z", "halligan ca renew"},
		"help":           {"nodes [CLUSTER]", "ssh -J BASTION responder@NODE"},
		"--help":         {"nodes [CLUSTER]"},
		"  # nothing":    nil,
	} {
		g := visits(t, bastion{}, line, "")
		out := g.String() + g.errs.String()
		for _, text := range want {
			if !strings.Contains(out, text) {
				t.Errorf("%s lacks %q:\n%s", line, text, out)
			}
		}
		if g.status != 0 || strings.ContainsAny(out, "\x1b\x07\u202e\t") {
			t.Errorf("%s: status %d\n%q", line, g.status, out)
		}
		for _, l := range strings.Split(out, "\n") {
			if len(l) > 2100 {
				t.Errorf("%s: a line of %d bytes", line, len(l))
			}
		}
	}
	for _, c := range commands {
		if c.name == "" || c.what == "" || c.run == nil || (c.most > 0) != (c.argument != "") {
			t.Errorf("an incomplete row: %+v", c)
		}
	}
}

// TestFailing has the API refuse, and lines that nobody should send.
func TestFailing(t *testing.T) {
	g := visits(t, bastion{failing: api.ToStatus(fault.New(fault.Refused, "ask a responder", "not for you"))}, "sessions", "")
	if g.status != fault.Refused.Exit() || g.errs.String() != "halligan: not for you; ask a responder\n" || g.String() != "" {
		t.Errorf("%d %q %q", g.status, g.String(), g.errs.String())
	}
	for _, line := range []string{"scale ds/c --to 0", "nodes;id", "nodes $(id)", "a\x1b[2J", "\xff", strings.Repeat("x ", execline.MaxLine), "nodes a b", "whoami -o json", "sh", "NODES"} {
		g := visits(t, bastion{}, line, "")
		if text := g.errs.String(); g.status != 2 || g.String() != "" || strings.Count(text, "\n") != 1 || len(text) > 1100 || strings.Contains(text, "\x1b") {
			t.Errorf("%.40q: %d %q %q", line, g.status, g.String(), text)
		}
	}
}

func TestScript(t *testing.T) {
	g := visits(t, bastion{}, "", "whoami\r\n\n# x\nnope\nsessions\nexit\nnodes\n")
	if out := g.String(); g.status != 2 || !strings.Contains(out, "ada") || !strings.Contains(out, "bastion-b") || strings.Contains(out, "10.0.0.1") {
		t.Errorf("%d %q", g.status, out)
	}
	g = visits(t, bastion{}, "", strings.Repeat("x", 1<<20))
	if g.status != 2 || !strings.Contains(g.errs.String(), "a line has more than") {
		t.Errorf("%d %q", g.status, g.errs.String())
	}
}

// notes is a log that takes everything.
type notes struct {
	audit.Log
	mu     sync.Mutex
	events []audit.Event
}

func (n *notes) Append(_ context.Context, e audit.Event) (audit.Receipt, error) {
	n.Note(e)
	return audit.Receipt{}, nil
}

func (n *notes) Note(e audit.Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.events = append(n.events, e)
}

// TestRecorded: what is shown is in a recording. Nobody has taken a role here, so
// that without room for one whoever may act at a node goes on.
func TestRecorded(t *testing.T) {
	dir, log := filepath.Join(t.TempDir(), "recordings"), &notes{}
	open := func(bytes int64) *cast.Recorder {
		r, err := cast.Open(cast.Options{Dir: dir, Log: log, MaxBytes: bytes, Logger: zerolog.Nop()})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := open(0)
	g := recordedVisit(t, r, bastion{}, "", "whoami\nnope\n")
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, log.events[0].Target+".cast"))
	if err != nil {
		t.Fatal(err)
	}
	head, events, err := cast.Read(bytes.NewReader(data))
	if err != nil || head.Title != "ada at bastion bastion-a" {
		t.Fatalf("%+v, %v", head, err)
	}
	text := ""
	for e, err := range events {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == cast.Output {
			text += e.Text
		}
	}
	for _, part := range []string{g.String(), g.errs.String()} {
		for line := range strings.Lines(part) {
			if !strings.Contains(text, strings.TrimSuffix(line, "\n")+"\r\n") {
				t.Errorf("%q is not in %q", line, text)
			}
		}
	}
	if !strings.HasPrefix(text, "> whoami\r\n") || log.events[0].Action != cast.Script || log.events[1].Kind != audit.SessionEnd || log.events[1].Text[:13] != "exit status 2" {
		t.Errorf("%q %+v", text, log.events)
	}
	r = open(8)
	defer r.Close()
	if g := recordedVisit(t, r, bastion{}, "whoami", ""); g.status != 7 || g.String() != "" || !strings.Contains(g.errs.String(), "cannot be recorded") {
		t.Errorf("%d %q %q", g.status, g.String(), g.errs.String())
	}
	roles = []trust.Role{trust.Observer, trust.Responder}
	defer func() { roles = nil }()
	if g := recordedVisit(t, r, bastion{}, "whoami", ""); g.status != 0 || !strings.Contains(g.String(), "ada") || !strings.Contains(g.errs.String(), "warning: this session is not recorded") {
		t.Errorf("%d %q %q", g.status, g.String(), g.errs.String())
	}
}

func TestComplete(t *testing.T) {
	for line, want := range map[string]string{"n": "nodes ", "wh": "whoami ", "s": "", "se": "sessions ", "": "", "x": "", "nodes ": ""} {
		got, pos, ok := complete(line, len(line), '\t')
		if got != want || ok != (want != "") || pos != len(want) {
			t.Errorf("%q: %q, %d, %v", line, got, pos, ok)
		}
	}
	if _, _, ok := complete("n", 0, '\t'); ok {
		t.Error("completes before what is there")
	}
	if _, _, ok := complete("n", 1, 'n'); ok {
		t.Error("completes without being asked")
	}
}
