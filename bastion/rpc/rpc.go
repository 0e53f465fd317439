// Package rpc is the bastion's API: who is in, which nodes there are, the
// mailbox for plans and approvals, and the newest bundle. It is one gRPC server
// for automation, which comes over mTLS, and for people, who come through SSH or
// the lobby.
//
// It must never change anything at a node, show anybody a cluster that their
// credential is not for, or take what it hands on for true: agents verify
// bundles and approvals themselves. Nobody takes a role here; who may do what
// follows from the roles that the credential is for. It stands on floor 4.
package rpc

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/bastion/relay"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/approval"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/version"
)

// Store is what bastions share: a *store.Store, whose comments hold.
type Store interface {
	Degraded() string
	Sessions(ctx context.Context) (list []*halliganv1.Session, incomplete string)
	PostPlan(ctx context.Context, requester string, plan *halliganv1.Plan) error
	Plans(ctx context.Context, requester string) ([]*halliganv1.WaitingPlan, error)
	Plan(ctx context.Context, requester, id string) (*halliganv1.WaitingPlan, error)
	PostApproval(ctx context.Context, requester, id, approver, token string) error
	WatchApprovals(ctx context.Context, requester, id string, send func(*halliganv1.WatchPlanEvent) error) error
}

// Bundles is the bundle that the bastion trusts: a *bundle.Store.
type Bundles interface {
	// Offer takes a bundle over where it is verified and newer.
	Offer(data []byte) (changed bool, err error)
	// Current returns what is in force, never nil.
	Current() *bundle.Bundle
}

// Options of the API. All but Tunnels, Warnings, Audit, Mirrors,
// Evidence and Record are required.
type Options struct {
	// Bastion is its name in the inventory.
	Bastion string
	Store   Store
	Bundles Bundles
	// Relays returns how many connections are relayed now.
	Relays func() int64
	// Tunnels returns since when nodes, by their ID, have tunnels open.
	Tunnels func() map[string]time.Time
	// Warnings tells what is degraded, each in one line.
	Warnings func() []string
	// Now is the bastion's clock.
	Now func() time.Time
	// Audit tells how the bastion's own evidence is, Mirrors how its copies of
	// others' are.
	Audit   func() *halliganv1.AuditStatus
	Mirrors func() []*halliganv1.MirrorStatus
	// Evidence hands both out; nil where there is none.
	Evidence halliganv1.EvidenceServer
	// Record is as that of grpcdoor.Options.
	Record grpcdoor.Record
	Alarms grpcdoor.Alarms
	Log    zerolog.Logger
}

// methods is the inventory of what is offered, to whom, and what is recorded of it.
var methods = map[string]grpcdoor.Row{
	halliganv1.Bastion_Status_FullMethodName:         {May: anybody, Record: grpcdoor.Routine},
	halliganv1.Bastion_Nodes_FullMethodName:          {May: anybody, Record: grpcdoor.Routine},
	halliganv1.Bastion_Sessions_FullMethodName:       {May: responds, Record: grpcdoor.Noted},
	halliganv1.Bastion_ListPlans_FullMethodName:      {May: anybody, Record: grpcdoor.Noted}, // their own
	halliganv1.Bastion_PostPlan_FullMethodName:       {May: responds, Record: grpcdoor.Noted},
	halliganv1.Bastion_PostApproval_FullMethodName:   {May: approves, Record: grpcdoor.Noted},
	halliganv1.Bastion_WatchPlan_FullMethodName:      {May: anybody, Record: grpcdoor.Noted}, // their own
	halliganv1.Bastion_ExchangeBundle_FullMethodName: {May: anybody, Record: grpcdoor.Routine},

	halliganv1.Evidence_ListLogs_FullMethodName:      {May: observes, Record: grpcdoor.Routine},
	halliganv1.Evidence_ReadLog_FullMethodName:       {May: whole(observes), Record: grpcdoor.Routine},
	halliganv1.Evidence_ReadRecording_FullMethodName: {May: whole(commands), Record: grpcdoor.Deed},
	halliganv1.Evidence_ReadSealed_FullMethodName:    {May: whole(responds), Record: grpcdoor.Noted},
	halliganv1.Evidence_Witness_FullMethodName:       {May: witnesses, Record: grpcdoor.Routine},
	grpcdoor.Reflection[0]:                           {May: anybody, Record: grpcdoor.Routine},
	grpcdoor.Reflection[1]:                           {May: anybody, Record: grpcdoor.Routine},
}

// anybody who has been let in, which the server asks for, but other bastions: they
// come to witness the log, and for nothing else.
func anybody(who trust.Identity) bool { return who.Kind != trust.Bastion }

// observes, responds and commands hold for who may take such a role.
func observes(who trust.Identity) bool { return takes(who, trust.Observer) }
func responds(who trust.Identity) bool { return takes(who, trust.Responder) }
func commands(who trust.Identity) bool { return takes(who, trust.Commander) }

func takes(who trust.Identity, least trust.Role) bool {
	return slices.ContainsFunc(who.Roles, func(r trust.Role) bool { return r.Has(least) })
}

// whole leaves out credentials that are narrowed to some objects, actions or drills:
// what they ask for shows what others did.
func whole(may func(trust.Identity) bool) func(trust.Identity) bool {
	return func(who trust.Identity) bool {
		return may(who) && !who.Scope.Drill && len(who.Scope.Actions)+len(who.Scope.Namespaces) == 0
	}
}

// witnesses holds for other bastions.
func witnesses(who trust.Identity) bool { return who.Kind == trust.Bastion }

// approves holds for people only, as at agents.
func approves(who trust.Identity) bool {
	return who.Kind == trust.Person && !who.Scope.Drill && slices.Contains(who.Roles, trust.Approver)
}

// Server is the API.
type Server struct {
	*grpcdoor.Server
	halliganv1.UnimplementedBastionServer
	o Options
}

// New returns a server that takes connections at once.
func New(o Options) (*Server, error) {
	if o.Tunnels == nil {
		o.Tunnels = func() map[string]time.Time { return nil }
	}
	if o.Warnings == nil {
		o.Warnings = func() []string { return nil }
	}
	if o.Audit == nil {
		o.Audit = func() *halliganv1.AuditStatus { return nil }
	}
	if o.Mirrors == nil {
		o.Mirrors = func() []*halliganv1.MirrorStatus { return nil }
	}
	if o.Evidence == nil {
		o.Evidence = halliganv1.UnimplementedEvidenceServer{}
	}
	s := &Server{o: o}
	var err error
	s.Server, err = grpcdoor.New(grpcdoor.Options{Methods: methods, Record: o.Record, Alarms: o.Alarms, Log: o.Log,
		Register: func(r grpc.ServiceRegistrar) {
			halliganv1.RegisterBastionServer(r, s)
			halliganv1.RegisterEvidenceServer(r, o.Evidence)
		}})
	return s, err
}

// Status tells what works, for this caller.
func (s *Server) Status(ctx context.Context, _ *halliganv1.BastionStatusRequest) (*halliganv1.BastionStatusResponse, error) {
	c, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	out := &halliganv1.BastionStatusResponse{Bastion: s.o.Bastion, Version: version.String(), Time: timestamppb.New(s.o.Now()), Person: c.Who.Person, Clusters: c.Who.Clusters,
		Bundle: api.BundleStatus(s.o.Bundles.Current()), StoreDegraded: s.o.Store.Degraded(), Relays: s.o.Relays(), Tunnels: int64(len(s.o.Tunnels())), Warnings: s.o.Warnings(), Door: string(c.Who.Door), Audit: s.o.Audit()}
	for _, m := range s.o.Mirrors() {
		if _, cluster, _ := trust.CutServer(m.GetOrigin()); cluster == bundle.BastionDomain || slices.Contains(c.Who.Clusters, cluster) {
			out.Mirrors = append(out.Mirrors, m)
		}
	}
	for _, r := range c.Who.Roles {
		out.Roles = append(out.Roles, r.String())
	}
	if !c.Who.NotAfter.IsZero() {
		out.CredentialExpires = timestamppb.New(c.Who.NotAfter)
	}
	if c.Who.Late {
		out.Warnings = append(out.Warnings, "your credential is past an edge of its validity: you are admitted since clocks may lie; renew it (halligan ca renew)")
	}
	return out, nil
}

// Nodes lists what is relayed to for this caller.
func (s *Server) Nodes(ctx context.Context, req *halliganv1.NodesRequest) (*halliganv1.NodesResponse, error) {
	c, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	out, tunnels := &halliganv1.NodesResponse{}, s.o.Tunnels()
	for _, h := range s.o.Bundles.Current().Inventory.Nodes(req.GetCluster()) {
		if !relay.InScope(c.Who, h) {
			continue
		}
		n := &halliganv1.Node{Name: h.Name, Cluster: h.Cluster, Address: h.Address.String(), SshPort: uint32(h.SSHPort), GrpcPort: uint32(h.GRPCPort), Reach: cmp.Or(h.Reach, bundle.ReachIn)}
		if since, ok := tunnels[h.ID()]; ok {
			n.Reach, n.TunnelSince = bundle.ReachOut, timestamppb.New(since)
		}
		out.Nodes = append(out.Nodes, n)
	}
	return out, nil
}

// Sessions lists who is in, as far as that concerns the caller's clusters.
func (s *Server) Sessions(ctx context.Context, _ *halliganv1.SessionsRequest) (*halliganv1.SessionsResponse, error) {
	c, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	out := &halliganv1.SessionsResponse{}
	list, incomplete := s.o.Store.Sessions(ctx)
	for _, x := range list {
		_, cluster, _ := trust.CutServer(x.GetTarget())
		if x.GetTarget() == "" || x.GetPerson() == c.Who.Person || slices.Contains(c.Who.Clusters, cluster) {
			out.Sessions = append(out.Sessions, x)
		}
	}
	out.Incomplete = incomplete
	return out, nil
}

// node returns the node of the inventory that a plan is for.
func (s *Server) node(name, cluster string) (bundle.Host, bool) {
	for _, h := range s.o.Bundles.Current().Inventory.Nodes(cluster) {
		if cluster != "" && (h.Name == name || h.ID() == name) {
			return h, true
		}
	}
	return bundle.Host{}, false
}

// visible returns the plans that the caller may see: their own, and to approvers
// those for nodes that their credential is for.
func (s *Server) visible(ctx context.Context, who trust.Identity, id string) ([]*halliganv1.WaitingPlan, error) {
	of := who.Person
	if approves(who) {
		of = ""
	}
	list, err := s.o.Store.Plans(ctx, of)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(list, func(p *halliganv1.WaitingPlan) bool {
		h, known := s.node(p.GetNode(), p.GetCluster())
		return !strings.HasPrefix(p.GetPlanId(), id) || !known || !relay.InScope(who, h)
	}), nil
}

// one returns the only plan that the caller may see under an identifier, or a
// beginning of it.
func (s *Server) one(ctx context.Context, who trust.Identity, id string) (*halliganv1.WaitingPlan, error) {
	list, err := s.visible(ctx, who, id)
	switch {
	case err != nil:
		return nil, err
	case len(list) == 0 || id == "":
		return nil, fault.New(fault.NotFound, "it may have expired, or never been put there: approvals can be pasted by hand", "the mailbox has no plan %.80q for you", id)
	case len(list) > 1:
		return nil, fault.New(fault.Usage, "give more of its identifier", "%d plans begin with %.80q", len(list), id)
	}
	return list[0], nil
}

// ListPlans lists what waits, or shows one plan.
func (s *Server) ListPlans(ctx context.Context, req *halliganv1.ListPlansRequest) (*halliganv1.ListPlansResponse, error) {
	c, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	if req.GetPlanId() == "" {
		list, err := s.visible(ctx, c.Who, "")
		return &halliganv1.ListPlansResponse{Plans: list}, err
	}
	found, err := s.one(ctx, c.Who, req.GetPlanId())
	if err != nil {
		return nil, err
	}
	whole, err := s.o.Store.Plan(ctx, found.GetRequester(), found.GetPlanId())
	if err != nil {
		return nil, err
	}
	return &halliganv1.ListPlansResponse{Plans: []*halliganv1.WaitingPlan{whole}}, nil
}

// PostPlan puts the caller's plan into the mailbox. Approvers read it as it is,
// so it must say of itself what is true as far as that can be known here.
func (s *Server) PostPlan(ctx context.Context, req *halliganv1.PostPlanRequest) (*halliganv1.PostPlanResponse, error) {
	c, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	p := req.GetPlan()
	h, known := s.node(p.GetNode(), p.GetClusterName())
	switch sum, err := api.PlanSHA256(p); {
	case p.GetActor() != c.Who.Person:
		return nil, fault.New(fault.Refused, "whoever made it posts it", "the plan is not one of %s", c.Who.Person)
	case !known || !relay.InScope(c.Who, h):
		return nil, fault.New(fault.Refused, "use a bastion of its fleet, and a credential for it", "the plan is for no node that %s may reach here", c.Who.Person)
	case p.GetApprovalsNeeded() == 0:
		return nil, fault.New(fault.Usage, "apply it: halligan apply "+p.GetId(), "the plan needs no approval")
	case err == nil && sum != p.GetSha256(): // with an error a newer agent says more than this build knows
		return nil, fault.New(fault.Usage, "post the plan as the agent gave it", "the plan does not have the hash that it names")
	}
	return &halliganv1.PostPlanResponse{}, s.o.Store.PostPlan(ctx, c.Who.Person, p)
}

// PostApproval hands in the caller's approval.
func (s *Server) PostApproval(ctx context.Context, req *halliganv1.PostApprovalRequest) (*halliganv1.PostApprovalResponse, error) {
	c, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	t, err := approval.Parse(req.GetApproval())
	if err != nil {
		return nil, err
	}
	_, cluster, _ := trust.CutServer(t.Statement.Node)
	h, known := s.node(t.Statement.Node, cluster)
	switch {
	case t.Statement.Approver != c.Who.Person || t.Certificate.KeyId != c.Who.Person:
		return nil, fault.New(fault.Refused, "whoever signed it hands it in", "the approval is not one of %s", c.Who.Person)
	case !known || !relay.InScope(c.Who, h):
		return nil, fault.New(fault.Refused, "use a bastion of its fleet, and a credential for it", "the approval is for no node that %s may reach here", c.Who.Person)
	case !trust.ValidPerson(t.Statement.Requester):
		return nil, fault.New(fault.Usage, "hand the line to the requester yourself", "the mailbox is not for %.80q", t.Statement.Requester)
	}
	// Only for the plan that it names of itself, so that nobody stands among those
	// who approved what is not for them.
	waiting, err := s.o.Store.Plans(ctx, t.Statement.Requester)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(waiting, func(p *halliganv1.WaitingPlan) bool {
		at, known := s.node(p.GetNode(), p.GetCluster())
		return known && at.ID() == h.ID() && p.GetPlanId() == t.Statement.Plan && p.GetPlanSha256() == t.Statement.PlanSHA256
	}) {
		return nil, fault.New(fault.NotFound, "hand the line to the requester yourself", "the mailbox has no plan %.80q of %s that this approves", t.Statement.Plan, t.Statement.Requester)
	}
	return &halliganv1.PostApprovalResponse{}, s.o.Store.PostApproval(ctx, t.Statement.Requester, t.Statement.Plan, c.Who.Person, t.String())
}

// WatchPlan streams approvals as they come.
func (s *Server) WatchPlan(req *halliganv1.WatchPlanRequest, stream grpc.ServerStreamingServer[halliganv1.WatchPlanEvent]) error {
	c, err := grpcdoor.CallerOf(stream.Context())
	if err != nil {
		return err
	}
	found, err := s.one(stream.Context(), c.Who, req.GetPlanId())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	defer context.AfterFunc(s.Stopping(), func() { cancel(fault.New(fault.Unreachable, "watch at another bastion", "the bastion stops")) })()
	return s.o.Store.WatchApprovals(ctx, found.GetRequester(), found.GetPlanId(), stream.Send)
}

// ExchangeBundle takes over what is newer of the caller's bundle, and returns the
// bastion's own where the caller's is another.
func (s *Server) ExchangeBundle(ctx context.Context, req *halliganv1.ExchangeBundleRequest) (*halliganv1.ExchangeBundleResponse, error) {
	c, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	out := &halliganv1.ExchangeBundleResponse{}
	if len(req.GetBundle()) > 0 {
		// An older one is what people who were away have, and what was taken over is
		// in force even where the disk is full.
		changed, err := s.o.Bundles.Offer(req.GetBundle())
		if changed {
			s.Noted(c.Who, halliganv1.Bastion_ExchangeBundle_FullMethodName, api.BundleStatus(s.o.Bundles.Current()))
		}
		if err != nil && !changed && !errors.Is(err, bundle.ErrOlder) {
			out.Refused = api.ErrorOf(err)
			s.Refused(c.Who, halliganv1.Bastion_ExchangeBundle_FullMethodName, nil, fmt.Errorf("the bundle that was brought: %w", err))
		}
	}
	if raw := s.o.Bundles.Current().Raw(); !bytes.Equal(raw, req.GetBundle()) {
		out.Bundle = raw
	}
	out.Status = api.BundleStatus(s.o.Bundles.Current())
	return out, nil
}
