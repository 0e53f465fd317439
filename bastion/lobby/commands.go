package lobby

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/verb"
	"github.com/halligan-io/halligan/internal/neutral"
)

// command is one row of what the lobby offers.
type command struct {
	name, argument, what string
	// most is how many arguments it takes.
	most int
	// run writes its output. It only reads.
	run func(ctx context.Context, a *asked, args []string) error
}

// asked is what a command works with.
type asked struct {
	halliganv1.BastionClient
	out io.Writer
	now time.Time
	// note tells what is no output: what is degraded.
	note func(text string, args ...any)
}

// commands are in the order of help.
var commands = []command{
	{"nodes", "[CLUSTER]", "the nodes that your credential is for, and how they are reached", 1, nodes},
	{"sessions", "", "who is in, on every bastion", 0, sessions},
	{"approvals", "[PLAN]", "plans that wait for approvals", 1, approvals},
	{"status", "", "what works here, and what is degraded", 0, status},
	{"whoami", "", "who you are here, and for how long", 0, whoami},
}

func (c command) takes() string {
	if c.argument == "" {
		return "no argument"
	}
	return "at most " + c.argument
}

func (v *visit) help() error {
	t := newTable(v.out)
	for _, c := range commands {
		t.row(strings.TrimSpace(c.name+" "+c.argument), c.what)
	}
	t.row("help", "this list")
	if v.Command() == "" {
		t.row("exit", "leave; so does Ctrl-D")
	}
	t.end()
	v.say("to get to a node: ssh -J BASTION responder@NODE, or halligan ssh NODE")
	return nil
}

// table writes aligned cells of text that anybody may have chosen.
type table struct{ *tabwriter.Writer }

func newTable(w io.Writer, head ...string) table {
	t := table{tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)}
	if len(head) > 0 {
		t.row(head...)
	}
	return t
}

// row writes to a buffer, so that nothing can fail before end.
func (t table) row(cells ...string) {
	for i, cell := range cells {
		if cell = neutral.LineMax(cell, 256); cell == "" {
			cell = "-"
		}
		if i > 0 {
			cell = "\t" + cell
		}
		_, _ = io.WriteString(t, cell)
	}
	_, _ = io.WriteString(t, "\n")
}

func (t table) end() { _ = t.Flush() } // who is gone has not to be told

// ago returns how long something has lasted, "" for what has no beginning.
func (a *asked) ago(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return max(a.now.Sub(t.AsTime()), 0).Round(time.Second).String()
}

func nodes(ctx context.Context, a *asked, args []string) error {
	req := &halliganv1.NodesRequest{}
	if len(args) > 0 {
		req.Cluster = args[0]
	}
	got, err := a.Nodes(ctx, req)
	if err != nil {
		return err
	}
	t := newTable(a.out, "NODE", "CLUSTER", "ADDRESS", "SSH", "GRPC", "REACH", "TUNNEL")
	for _, n := range got.GetNodes() {
		grpc := ""
		if n.GetGrpcPort() != 0 {
			grpc = fmt.Sprint(n.GetGrpcPort())
		}
		t.row(n.GetName(), n.GetCluster(), n.GetAddress(), fmt.Sprint(n.GetSshPort()), grpc, n.GetReach(), a.ago(n.GetTunnelSince()))
	}
	t.end()
	return nil
}

func sessions(ctx context.Context, a *asked, _ []string) error {
	got, err := a.Sessions(ctx, &halliganv1.SessionsRequest{})
	if err != nil {
		return err
	}
	t := newTable(a.out, "PERSON", "CREDENTIAL", "DOOR", "FROM", "TO", "BASTION", "FOR")
	for _, s := range got.GetSessions() {
		to := s.GetTarget()
		if to == "" {
			to = "here"
		}
		t.row(s.GetPerson(), s.GetCredential(), s.GetDoor(), s.GetSource(), to, s.GetBastion(), a.ago(s.GetStarted()))
	}
	t.end()
	if why := got.GetIncomplete(); why != "" {
		a.note("note: sessions may be missing: %s", why)
	}
	return nil
}

func approvals(ctx context.Context, a *asked, args []string) error {
	req := &halliganv1.ListPlansRequest{}
	if len(args) > 0 {
		req.PlanId = args[0]
	}
	got, err := a.ListPlans(ctx, req)
	if err != nil {
		return err
	}
	t := newTable(a.out, "PLAN", "NODE", "REQUESTER", "WHAT", "REASON", "APPROVED BY", "OF", "ENDS IN")
	for _, p := range got.GetPlans() {
		left := ""
		if p.GetExpires() != nil {
			left = max(p.GetExpires().AsTime().Sub(a.now), 0).Round(time.Second).String()
		}
		what := p.GetSummary()
		if what == "" {
			what = p.GetAction()
		}
		t.row(p.GetPlanId(), nodeOf(p), p.GetRequester(), what, p.GetReason(), strings.Join(p.GetApprovers(), ","), fmt.Sprint(p.GetApprovalsNeeded()), left)
	}
	t.end()
	if len(got.GetPlans()) > 0 {
		a.note("nothing of this is verified; look at the plan and approve it with: halligan approve PLAN")
	}
	return nil
}

// nodeOf returns NODE.CLUSTER of the node that is to act.
func nodeOf(p *halliganv1.WaitingPlan) string {
	if p.GetCluster() == "" || strings.HasSuffix(p.GetNode(), "."+p.GetCluster()) {
		return p.GetNode()
	}
	return p.GetNode() + "." + p.GetCluster()
}

func status(ctx context.Context, a *asked, _ []string) error {
	s, err := a.Status(ctx, &halliganv1.BastionStatusRequest{})
	if err != nil {
		return err
	}
	t := newTable(a.out)
	t.row("bastion", s.GetBastion()+", version "+s.GetVersion())
	t.row("time", s.GetTime().AsTime().UTC().Format(time.RFC3339))
	if b := s.GetBundle(); b != nil {
		t.row("bundle", fmt.Sprintf("policy %d, inventory %d, revocations %d, fresh until %s", b.GetPolicyVersion(), b.GetInventoryVersion(), b.GetRevocationsVersion(),
			b.GetFreshUntil().AsTime().UTC().Format(time.RFC3339)))
	}
	t.row("relays", fmt.Sprint(s.GetRelays()))
	t.row("tunnels", fmt.Sprint(s.GetTunnels()))
	if s.GetStoreDegraded() == "" {
		t.row("store", "works")
	}
	if text := verb.Evidence(s.GetAudit()); text != "" {
		t.row("audit", text)
	}
	for _, m := range s.GetMirrors() {
		t.row("copy of", mirror(m))
	}
	t.end()
	a.degraded(s)
	return nil
}

// mirror says how a copy of another's evidence is.
func mirror(m *halliganv1.MirrorStatus) string {
	text := fmt.Sprintf("%s: %d events", m.GetOrigin(), m.GetEvents())
	switch lag := time.Duration(m.GetLagSeconds() * float64(time.Second)).Round(time.Second); {
	case m.GetProblem() != "":
		text += "; " + m.GetProblem()
	case lag < 0:
		text += ", never known to be all"
	case lag > 0:
		text += fmt.Sprintf(", all of them %v ago", lag)
	default:
		text += ", all of them"
	}
	return text
}

func whoami(ctx context.Context, a *asked, _ []string) error {
	s, err := a.Status(ctx, &halliganv1.BastionStatusRequest{})
	if err != nil {
		return err
	}
	t := newTable(a.out)
	t.row("person", s.GetPerson())
	t.row("clusters", strings.Join(s.GetClusters(), ", "))
	t.row("roles", strings.Join(s.GetRoles(), ", "))
	t.row("door", s.GetDoor()+" of bastion "+s.GetBastion())
	if end := s.GetCredentialExpires(); end != nil {
		t.row("credential", strings.TrimPrefix(verb.Ends(end.AsTime(), a.now), "credential "))
	}
	t.end()
	if end := s.GetCredentialExpires(); end != nil {
		if due := verb.Renew(end.AsTime(), a.now); due != "" {
			a.note("warning: %s", due)
		}
	}
	a.degraded(s)
	return nil
}

func (a *asked) degraded(s *halliganv1.BastionStatusResponse) {
	if why := s.GetStoreDegraded(); why != "" {
		a.note("degraded: %s", why)
	}
	for _, w := range s.GetWarnings() {
		a.note("warning: %s", w)
	}
}
