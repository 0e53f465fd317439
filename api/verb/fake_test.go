package verb

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/approval"
)

// fake is an agent that has one plan, which needs an approval.
type fake struct {
	halliganv1.AgentClient // nil: what is not played panics
	plan                   *halliganv1.Plan
	applied                []*halliganv1.ApplyRequest
	status                 *halliganv1.StatusResponse
	stopped                chan string
	hang                   chan struct{} // if set, applications last until it is closed
	opened, closed         int
	looks                  []*halliganv1.TopRequest
	found                  []*halliganv1.TopEvent
}

func newFake() *fake {
	return &fake{stopped: make(chan string, 1), plan: &halliganv1.Plan{Id: "p-1", Action: "scale", Node: "cp-1", ClusterName: "lab", Cluster: "c0ffee",
		Summary: "scale deploy/web", ApprovalsNeeded: 1, ApprovalReason: "scale of many",
		Objects: []*halliganv1.PlannedObject{{Key: "/registry/deployments/shop/web", Resource: "deployments.apps", Name: "web", Operation: "update"}}}}
}

func (f *fake) Close() error { f.closed++; return nil }

func (f *fake) seal() *halliganv1.Plan {
	p := proto.CloneOf(f.plan)
	sum, err := api.PlanSHA256(p)
	if err != nil {
		panic(err)
	}
	p.Sha256 = sum
	return p
}

func (f *fake) Plan(_ context.Context, req *halliganv1.PlanRequest, _ ...grpc.CallOption) (*halliganv1.Plan, error) {
	f.plan.Parameters, f.plan.Reason, f.plan.Incident = req.GetParameters(), req.GetReason(), req.GetIncident()
	return f.seal(), nil
}

func (f *fake) ShowPlan(_ context.Context, req *halliganv1.ShowPlanRequest, _ ...grpc.CallOption) (*halliganv1.Plan, error) {
	if req.GetPlanId() != f.plan.GetId() {
		return nil, api.ToStatus(fault.New(fault.NotFound, "plan again", "no plan %s waits", req.GetPlanId()))
	}
	return f.seal(), nil
}

func (f *fake) Stop(_ context.Context, req *halliganv1.StopRequest, _ ...grpc.CallOption) (*halliganv1.StopResponse, error) {
	f.stopped <- req.GetActionId()
	close(f.hang)
	return &halliganv1.StopResponse{}, nil
}

func (f *fake) Describe(context.Context, *halliganv1.DescribeRequest, ...grpc.CallOption) (*halliganv1.DescribeResponse, error) {
	return &halliganv1.DescribeResponse{}, nil
}

func (f *fake) Status(context.Context, *halliganv1.StatusRequest, ...grpc.CallOption) (*halliganv1.StatusResponse, error) {
	return f.status, nil
}

func (f *fake) Apply(ctx context.Context, req *halliganv1.ApplyRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[halliganv1.ApplyEvent], error) {
	f.applied = append(f.applied, req)
	return &played{ctx: ctx, fake: f}, nil
}

type played struct {
	grpc.ClientStream
	ctx  context.Context
	fake *fake
}

func (p *played) Recv() (*halliganv1.ApplyEvent, error) {
	if p.fake.hang != nil {
		select {
		case <-p.fake.hang:
		case <-p.ctx.Done():
			return nil, p.ctx.Err()
		}
	}
	return &halliganv1.ApplyEvent{Event: &halliganv1.ApplyEvent_Result{Result: &halliganv1.Result{Action: "p-1", Result: "applied", Plan: p.fake.plan,
		Objects: []*halliganv1.ObjectResult{{Outcome: "applied"}}}}}, nil
}

// stand is a command line before a fake agent.
type stand struct {
	*fake
	env     map[string]string
	tty     bool
	answer  string
	asked   string
	options Options
}

func newStand() *stand {
	return &stand{fake: newFake(), env: map[string]string{}}
}

var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func (s *stand) run(ctx context.Context, args ...string) (status int, out, errs string) {
	var stdout, stderr bytes.Buffer
	o := s.options
	o.Connect = func(context.Context) (Agent, error) { s.opened++; return s.fake, nil }
	status = New(Terminal{In: strings.NewReader(""), Out: &stdout, Err: &stderr, InTTY: s.tty, Env: func(k string) string { return s.env[k] },
		Now: func() time.Time { return noon }, Settle: time.Second, Reprobe: time.Millisecond,
		Ask: func(_ context.Context, question string) (string, error) { s.asked = question; return s.answer, nil },
	}, o).Run(ctx, args)
	return status, stdout.String(), stderr.String()
}

func want(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("no %q in:\n%s", part, text)
		}
	}
}

func TestWhoami(t *testing.T) {
	s := newStand()
	s.fake.status = &halliganv1.StatusResponse{Node: "cp-1", Cluster: "lab", Actor: "anna", Role: "responder", Door: "ssh", Version: "v0.1.0",
		CredentialExpires: timestamppb.New(noon.Add(50 * time.Hour)), Warnings: []string{"the bundle is \x1b[31mstale"}, Etcd: &halliganv1.EtcdStatus{Version: "3.7.3"},
		LocalApi: &halliganv1.LocalAPIStatus{Endpoint: "127.0.0.1:6443\x1b", Probed: timestamppb.New(noon), LatencyMs: 3.14159, Ready: true, FlowControl: "on", Exempt: true},
		Audit:    &halliganv1.AuditStatus{Events: 12, Signed: 11, Witnessed: map[string]uint64{"halligan.io/witness/b.bastion": 9, "a.bastion\x1b": 10}, Bytes: 2048, Reserve: 2048},
		Bundle:   &halliganv1.BundleStatus{PolicyVersion: 3, InventoryVersion: 4, RevocationsVersion: 5, Signed: timestamppb.New(noon), FreshUntil: timestamppb.New(noon.Add(time.Hour))}}
	status, out, _ := s.run(t.Context(), "whoami")
	if status != 0 || out != "anna\n  role      responder\n  door      ssh\n  agent     cp-1 (lab)\n  until     credential ends in 2d2h, at 2026-11-25T14:00:00Z\n" {
		t.Errorf("%d: %s", status, out)
	}
	if _, out, _ := s.run(t.Context(), "whoami", "-o", "json"); out != `{"actor":"anna","cluster":"lab","credentialExpires":"2026-11-25T14:00:00Z","door":"ssh","node":"cp-1","role":"responder"}`+"\n" {
		t.Error(out)
	}
	_, out, _ = s.run(t.Context(), "status")
	want(t, out, "cluster   lab\n", "anna as responder through ssh, credential ends in 2d2h", "policy 3, inventory 4, revocations 5", "warning: the bundle is \\x1b[31mstale\n",
		"  local API 127.0.0.1:6443\\x1b ready, 3.142 ms, flow control on, exempt\n",
		"  evidence  12 events, 11 signed, 10 witnessed by a.bastion\\x1b, 9 witnessed by b.bastion; 2.0 KiB, and room for 2048 events when the disk is full\n",
		"warning: your credential ends in 2d2h, at 2026-11-25T14:00:00Z; have it renewed: halligan ca renew\n")
	if s.opened != s.closed {
		t.Errorf("%d connections, %d closed", s.opened, s.closed)
	}
	for want, a := range map[string]*halliganv1.LocalAPIStatus{
		"":                                 nil,
		"127.0.0.1:6443 was not asked yet": {},
		"127.0.0.1:6443 cannot be used":    {Probed: timestamppb.New(noon), Error: "nothing listens"},
		"127.0.0.1:6443 not ready, 2000 ms, flow control off, not exempt": {Probed: timestamppb.New(noon), LatencyMs: 2000, FlowControl: "off"},
		"127.0.0.1:6443 not ready, 5 ms":                                  {Probed: timestamppb.New(noon), LatencyMs: 5},
	} {
		if a != nil {
			a.Endpoint = "127.0.0.1:6443"
		}
		if got := LocalAPI(a); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestAwaiting(t *testing.T) {
	s := newStand()
	s.env["HALLIGAN_REASON"] = "storm"
	status, out, errs := s.run(t.Context(), "scale", "deploy/web", "--to", "0")
	if status != 6 || len(s.applied) != 0 {
		t.Fatalf("%d, applied %v", status, s.applied)
	}
	if !strings.HasSuffix(out, "\nhalligan approve --cluster lab --node cp-1 p-1\nhalligan apply p-1 --approval FILE-OR-TOKEN\n") {
		t.Errorf("the two lines: %s", out)
	}
	want(t, out, "needs: the approval of another person: scale of many\n", "cluster lab (c0ffee)")
	want(t, errs, "halligan: plan p-1 awaits the approval of another person: scale of many; send the first line")
	if strings.Contains(errs, "--alone") {
		t.Error("it speaks of --alone where that is not allowed")
	}
	s.plan.AloneAllowed, s.plan.ApprovalsNeeded = true, 2
	s.options.Where = func(*halliganv1.Plan) []string { return []string{"--node", "cp-1"} }
	status, out, _ = s.run(t.Context(), "scale", "deploy/web", "--to", "0", "-o", "json", "--yes")
	if status != 6 || strings.Count(out, "\n") != 1 {
		t.Errorf("%d: %s", status, out)
	}
	want(t, out, `"result":"awaiting-approval"`, "the approvals of 2 other people", "halligan approve --cluster lab --node cp-1 p-1", "halligan apply --node cp-1 p-1 --approval", "--alone")
	// Nothing of it concerns a dry run, and without a reason there is nothing to
	// approve.
	if status, _, _ := s.run(t.Context(), "scale", "deploy/web", "--to", "0", "--dry-run"); status != 0 {
		t.Error(status)
	}
	delete(s.env, "HALLIGAN_REASON")
	if status, _, errs := s.run(t.Context(), "scale", "deploy/web", "--to", "0"); status != 2 || !strings.Contains(errs, "--reason") {
		t.Errorf("%d: %s", status, errs)
	}
}

func TestApply(t *testing.T) {
	s := newStand()
	s.plan.Reason = "storm"
	if status, out, _ := s.run(t.Context(), "plan", "p-1"); status != 0 || !strings.HasPrefix(out, "Plan p-1: scale deploy/web\n") {
		t.Errorf("%d: %s", status, out)
	}
	if status, out, _ := s.run(t.Context(), "show", "p-1", "-o", "json"); status != 0 || !strings.Contains(out, `"result":"planned"`) || !strings.Contains(out, `"sha256"`) {
		t.Errorf("%d: %s", status, out)
	}
	for _, args := range [][]string{{"apply"}, {"apply", "p-1", "p-2"}, {"plan"}, {"apply", "p-1", "--reason", "x"}, {"plan", "p-1", "--alone"}, {"apply", "p-1", "--approval", "/etc/hosts"},
		{"apply", "p-1", "--approval", "halligan-approval-1:!"}, {"status", "--approval", "x"}} {
		if status, _, errs := s.run(t.Context(), args...); status != 2 {
			t.Errorf("%v: %d, %s", args, status, errs)
		}
	}
	if status, _, _ := s.run(t.Context(), "apply", "p-2"); status != 1 {
		t.Errorf("no such plan: %d", status)
	}
	if status, _, _ := s.run(t.Context(), "apply", "p-1"); status != 6 || len(s.applied) != 0 {
		t.Errorf("%d, %v", status, s.applied)
	}
	if status, _, errs := s.run(t.Context(), "apply", "p-1", "--alone"); status != 2 || len(s.applied) != 0 {
		t.Errorf("it did not ask: %d, %s", status, errs)
	}
	s.tty, s.answer = true, "no\n"
	if status, _, _ := s.run(t.Context(), "apply", "p-1", "--alone"); status != 1 || !strings.Contains(s.asked, "alone, without the approval of another person") || len(s.applied) != 0 {
		t.Errorf("%d, %q", status, s.asked)
	}
	s.answer = "y\n"
	if status, _, _ := s.run(t.Context(), "apply", "p-1", "--alone"); status != 0 || len(s.applied) != 1 || !s.applied[0].GetAlone() {
		t.Errorf("%d, %v", status, s.applied)
	}
}

func TestApprovals(t *testing.T) {
	token := approvalOf(t, "p-1")
	for _, as := range []string{"itself", "a file"} {
		s := newStand()
		given := token
		if as == "a file" {
			given = "F"
			s.options.ReadFile = func(name string) ([]byte, error) {
				if name != "F" {
					return nil, io.ErrUnexpectedEOF
				}
				return []byte(token + "\n"), nil
			}
		}
		s.env["HALLIGAN_REASON"] = "storm"
		line := []string{"scale", "deploy/web", "--to", "0", "--yes"}
		if status, _, _ := s.run(t.Context(), line...); status != 6 {
			t.Fatalf("%s: %d", as, status)
		}
		// Another line than was approved, or one with another reason.
		for _, other := range [][]string{{"scale", "deploy/web", "--to", "1", "--yes"}, {"delete", "deploy/web", "--yes"}, append(line, "--reason", "other")} {
			if status, _, errs := s.run(t.Context(), append(other, "--approval", given)...); status != 2 || len(s.applied) > 0 {
				t.Errorf("%s, %v: %d, %s", as, other, status, errs)
			}
		}
		if status, _, errs := s.run(t.Context(), append(line, "--approval", given)...); status != 0 || len(s.applied) != 1 || s.applied[0].GetApprovals()[0] != token {
			t.Errorf("%s: %d, %s", as, status, errs)
		}
		if status, _, _ := s.run(t.Context(), "apply", "p-1", "--yes", "--approval", given); status != 0 || len(s.applied) != 2 {
			t.Errorf("%s: %d", as, status)
		}
		if status, _, _ := s.run(t.Context(), append(line, "--approval", given, "--approval", approvalOf(t, "p-2"))...); status != 2 {
			t.Errorf("%s: two plans: %d", as, status)
		}
	}
}

// approvalOf returns a token of the right form; whether it holds is the agent's
// to say.
func approvalOf(t *testing.T, plan string) string {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := gossh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := &gossh.Certificate{Key: signer.PublicKey(), KeyId: "otto", CertType: gossh.UserCert, Serial: 1}
	if err := cert.SignCert(rand.Reader, signer); err != nil {
		t.Fatal(err)
	}
	token, err := approval.Sign(approval.Statement{Fleet: "f", Cluster: "c0ffee", ClusterName: "lab", Node: "cp-1.lab", Plan: plan, PlanSHA256: strings.Repeat("0", 64),
		Nonce: "n", Requester: "anna", PolicyVersion: 1, Expires: noon}, signer, cert)
	if err != nil {
		t.Fatal(err)
	}
	return token.String()
}

// TestInterrupts: the first stops the action, the second the watching; somebody
// who went away does neither.
func TestInterrupts(t *testing.T) {
	s := newStand()
	s.plan.ApprovalsNeeded, s.hang = 0, make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	go cancel()
	if status, _, errs := s.run(ctx, "scale", "deploy/web", "--to", "0", "-y", "--reason", "x"); status != 0 || <-s.stopped != "p-1" {
		t.Errorf("%d, %s", status, errs)
	}
	s.hang = make(chan struct{})
	gone, leave := context.WithCancelCause(t.Context())
	go leave(ErrGone)
	if status, _, errs := s.run(gone, "scale", "deploy/web", "--to", "0", "-y", "--reason", "x"); status != 1 || !strings.Contains(errs, "the agent goes on") || len(s.stopped) > 0 {
		t.Errorf("%d, %s", status, errs)
	}
	ended, end := context.WithCancelCause(t.Context())
	go end(errors.Join(ErrGone, fault.New(fault.Unauthenticated, "", "the certificate was revoked")))
	if status, _, errs := s.run(ended, "scale", "deploy/web", "--to", "0", "-y", "--reason", "x"); status != 1 || !strings.Contains(errs, "revoked; the agent stops p-1") || len(s.stopped) > 0 {
		t.Errorf("%d, %s", status, errs)
	}
}

// TestWithin: a command line inside another program has nothing of the process.
func TestWithin(t *testing.T) {
	s := newStand()
	s.options.Within = true
	for _, args := range [][]string{{"completion", "bash"}, {"__complete", "sc"}, {"--yes", "__complete"}, {"get", "--socket", "/x"}} {
		if status, out, _ := s.run(t.Context(), args...); status != 2 || out != "" {
			t.Errorf("%v: %d, %s", args, status, out)
		}
	}
	if status, out, _ := s.run(t.Context()); status != 0 || !strings.Contains(out, "whoami") || strings.Contains(out, "completion") {
		t.Errorf("%d, %s", status, out)
	}
}

func TestHelp(t *testing.T) {
	s := newStand()
	for args, part := range map[string]string{"help": "whoami", "help scale": "scale KIND/NAME", "scale -h": "--alone", "help plan": "show", "plan --help": "PLAN-ID"} {
		if status, out, errs := s.run(t.Context(), strings.Fields(args)...); status != 0 || !strings.Contains(out, part) || errs != "" {
			t.Errorf("%s: %d, %s%s", args, status, out, errs)
		}
	}
	if status, out, errs := s.run(t.Context(), "help", "nothing"); status != 2 || out != "" || !strings.Contains(errs, `there is no verb "nothing"`) {
		t.Errorf("%d, %s%s", status, out, errs)
	}
}

func TestComplete(t *testing.T) {
	for _, c := range []struct{ before, beginning, want string }{
		{"", "sc", "scale"}, {"", "h", "help history"}, {"help", "who", "whoami"}, {"webhook", "", "delete open"}, {"webhook open", "", ""}, {"scale ds/x", "--t", "--timeout --to"}, {"scale", "--al", "--alone"}, {"get", "--al", "--all-namespaces"},
		{"get -o", "", "json table yaml"}, {"get --output", "j", "json"}, {"scale --reason", "", ""}, {"scale", "", ""}, {"nothing", "x", ""}, {"--yes", "undo", "undo"},
	} {
		got := New(Terminal{Env: func(string) string { return "" }}, Options{Within: true}).Complete(strings.Fields(c.before), c.beginning)
		if strings.Join(got, " ") != c.want {
			t.Errorf("%q and %q: %q, want %q", c.before, c.beginning, got, c.want)
		}
	}
}

// TestManyShells runs command lines at the same time, for the race detector.
func TestManyShells(t *testing.T) {
	for i := range 8 {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			for range 3 {
				s := newStand()
				s.env["HALLIGAN_REASON"], s.options.Within = strings.Repeat("x", i), i%2 == 0
				s.run(t.Context(), "help", "scale")
				s.run(t.Context(), "nothing", "--at-all")
				if status, out, _ := s.run(t.Context(), "scale", "deploy/web", "--to", "0", "--dry-run"); status != 0 || i > 0 && !strings.Contains(out, "reason    "+s.env["HALLIGAN_REASON"]+"\n") {
					t.Errorf("%d, %s", status, out)
				}
			}
		})
	}
}
