package rpc

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/mtls"
	"github.com/halligan-io/halligan/bastion/store"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/approval"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

func TestMain(m *testing.M) {
	store.Child()
	os.Exit(m.Run())
}

// heard are alarms.
type heard struct {
	mu    sync.Mutex // guards texts
	texts []string
}

func (h *heard) Raise(e alarm.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if e.Kind == alarm.Refusal {
		h.texts = append(h.texts, e.Person+": "+e.Text)
	}
}

func (h *heard) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.texts)
}

// world is a bastion with its API and its store only.
type world struct {
	t       *testing.T
	fleet   *testfleet.Fleet
	bundles *bundle.Store
	store   *store.Store
	server  *Server
	heard   *heard
}

const other = "staging" // another cluster of the fleet

// newWorld starts it; the store works unless it lives in a folder of no use.
func newWorld(t *testing.T, dir string) *world {
	t.Helper()
	w := &world{t: t, fleet: testfleet.New(t), heard: &heard{}}
	w.fleet.Inventory(func(inv *bundle.Inventory) {
		h := inv.Clusters[0].Nodes[0]
		h.Name, h.Address = "cp-2", bundle.IP{Addr: netip.MustParseAddr("127.0.0.2")}
		inv.Clusters = []bundle.Cluster{{Name: testfleet.Cluster, Nodes: append(inv.Clusters[0].Nodes, h)}}
		h.Address = bundle.IP{Addr: netip.MustParseAddr("127.0.0.3")}
		inv.Clusters = append(inv.Clusters, bundle.Cluster{Name: other, Nodes: []bundle.Host{h}})
	})
	file := filepath.Join(w.fleet.Dir, "bundle")
	w.must(os.WriteFile(file, w.fleet.Bundle(), 0o600))
	var err error
	w.bundles, err = bundle.Open(bundle.Options{Path: file})
	w.must(err)
	w.store, err = store.Open(store.Options{Bastion: "a", Dir: dir, Log: zerolog.Nop()})
	w.must(err)
	t.Cleanup(w.store.Close)
	w.server, err = New(Options{Bastion: "a", Store: w.store, Bundles: w.bundles, Relays: func() int64 { return 7 },
		Tunnels:  func() map[string]time.Time { return map[string]time.Time{"cp-2.prod": time.Unix(1e9, 0)} },
		Warnings: func() []string { return []string{"something else"} }, Now: time.Now, Alarms: w.heard, Log: zerolog.Nop()})
	w.must(err)
	t.Cleanup(w.server.Shutdown)
	return w
}

// working starts one whose store works.
func working(t *testing.T) *world {
	t.Helper()
	w := newWorld(t, filepath.Join(t.TempDir(), "store"))
	for began := time.Now(); w.store.Degraded() != ""; time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > 30*time.Second {
			t.Fatal(w.store.Degraded())
		}
	}
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// as comes in as somebody.
func (w *world) as(who trust.Identity) halliganv1.BastionClient {
	w.t.Helper()
	c, err := w.server.Dial(who, w.t.Context())
	w.must(err)
	w.t.Cleanup(func() { c.Close() })
	return halliganv1.NewBastionClient(c)
}

// person is somebody whose credential is for prod.
func person(name string, roles ...trust.Role) trust.Identity {
	return trust.Identity{Person: name, Roles: roles, Door: trust.SSH, Kind: trust.Person, Clusters: []string{testfleet.Cluster}, Fingerprint: "SHA256:" + name,
		Source: "192.0.2.9:5000", NotAfter: time.Unix(2e9, 0)}
}

var (
	alice = person("alice", trust.Observer, trust.Responder)
	bob   = person("bob", trust.Approver)
	carol = person("carol", trust.Observer)
)

// of returns a plan of somebody's, as an agent would have made it.
func of(requester string) *halliganv1.Plan {
	now := time.Now()
	p := &halliganv1.Plan{Id: "0198a7c2-1111-7000-8000-" + fmt.Sprintf("%012d", len(requester)), Actor: requester, Action: "scale", Node: testfleet.Node, ClusterName: testfleet.Cluster, Cluster: "cdf8", Nonce: "n",
		PolicyVersion: 1, Summary: "scale ds/collector to 0", Reason: "it melts", ApprovalsNeeded: 1, Created: timestamppb.New(now), Expires: timestamppb.New(now.Add(time.Hour))}
	return hashed(p)
}

func hashed(p *halliganv1.Plan) *halliganv1.Plan {
	sum, err := api.PlanSHA256(p)
	if err != nil {
		panic(err)
	}
	p.Sha256 = sum
	return p
}

// approve signs a plan as somebody.
func (w *world) approve(approver string, p *halliganv1.Plan) string {
	w.t.Helper()
	signer, cert := w.fleet.Person(testfleet.Holder(approver, trust.Approver), testfleet.Now())
	t, err := approval.Sign(approval.Statement{Fleet: testfleet.Name, Cluster: p.GetCluster(), ClusterName: p.GetClusterName(), Node: p.GetNode() + "." + p.GetClusterName(), Plan: p.GetId(),
		PlanSHA256: p.GetSha256(), Nonce: p.GetNonce(), Requester: p.GetActor(), PolicyVersion: p.GetPolicyVersion(), Expires: time.Now().Add(30 * time.Minute)}, signer, cert)
	w.must(err)
	return t.String()
}

func code(err error) fault.Code { return fault.CodeOf(api.FromStatus(err)) }

func TestApproval(t *testing.T) {
	t.Parallel()
	w := working(t)
	ctx := t.Context()
	plan := of("alice")
	ask := &halliganv1.ListPlansRequest{PlanId: plan.GetId()[:10]}
	if _, err := w.as(alice).PostPlan(ctx, &halliganv1.PostPlanRequest{Plan: plan}); err != nil {
		t.Fatal(err)
	}
	list, err := w.as(bob).ListPlans(ctx, &halliganv1.ListPlansRequest{})
	if err != nil || len(list.GetPlans()) != 1 || list.GetPlans()[0].GetReason() != "it melts" || list.GetPlans()[0].GetPlan() != nil {
		t.Fatalf("bob sees %v, %v", list, err)
	}
	shown, err := w.as(bob).ListPlans(ctx, ask)
	if err != nil || len(shown.GetPlans()) != 1 {
		t.Fatal(shown, err)
	}
	if sum, err := api.PlanSHA256(shown.GetPlans()[0].GetPlan()); err != nil || sum != plan.GetSha256() {
		t.Errorf("what bob is shown: %v, %v", sum, err)
	}
	watch, err := w.as(alice).WatchPlan(ctx, &halliganv1.WatchPlanRequest{PlanId: plan.GetId()})
	w.must(err)
	token := w.approve("bob", plan)
	if _, err := w.as(bob).PostApproval(ctx, &halliganv1.PostApprovalRequest{Approval: "\n" + token + "\n"}); err != nil {
		t.Fatal(err)
	}
	if e, err := watch.Recv(); err != nil || e.GetApprover() != "bob" || e.GetApproval() != token {
		t.Errorf("alice hears %v, %v", e, err)
	}
	if list, err := w.as(alice).ListPlans(ctx, &halliganv1.ListPlansRequest{}); err != nil || len(list.GetPlans()) != 1 || !slices.Equal(list.GetPlans()[0].GetApprovers(), []string{"bob"}) {
		t.Errorf("alice sees %v, %v", list, err)
	}

	// Others neither see it nor hear of it.
	elsewhere := bob
	elsewhere.Clusters = []string{other}
	narrowed := bob
	narrowed.Scope.Nodes = []string{"cp-2"}
	program := bob
	program.Kind = trust.Automation
	drill := bob
	drill.Scope.Drill = true
	for name, who := range map[string]trust.Identity{"carol": carol, "an approver of another cluster": elsewhere, "an approver of another node": narrowed, "a program": program, "a drill": drill} {
		c := w.as(who)
		if list, err := c.ListPlans(ctx, &halliganv1.ListPlansRequest{}); err != nil || len(list.GetPlans()) != 0 {
			t.Errorf("%s sees %v, %v", name, list, err)
		}
		if _, err := c.ListPlans(ctx, ask); code(err) != fault.NotFound {
			t.Errorf("%s is shown it: %v", name, err)
		}
		watch, err := c.WatchPlan(ctx, &halliganv1.WatchPlanRequest{PlanId: plan.GetId()})
		if err == nil {
			_, err = watch.Recv()
		}
		if code(err) != fault.NotFound {
			t.Errorf("%s watches it: %v", name, err)
		}
		if _, err := c.PostApproval(ctx, &halliganv1.PostApprovalRequest{Approval: token}); code(err) != fault.Refused {
			t.Errorf("%s hands in bob's approval: %v", name, err)
		}
	}
	// An approver of another cluster, or of another node, cannot stand among those
	// who approved it, nor fill the room that its approvals have.
	misdirected := func(change func(*halliganv1.Plan)) string {
		p := of("alice")
		p.Id, p.Nonce = plan.GetId(), plan.GetNonce()
		change(p)
		return w.approve("dave", p)
	}
	dave := elsewhere
	dave.Person, dave.Clusters = "dave", []string{other, testfleet.Cluster}
	for name, token := range map[string]string{
		"node of another cluster": misdirected(func(p *halliganv1.Plan) { p.Node, p.ClusterName, p.Sha256 = "cp-2", other, plan.GetSha256() }),
		"other node":              misdirected(func(p *halliganv1.Plan) { p.Node, p.Sha256 = "cp-2", plan.GetSha256() }),
		"other plan of that name": misdirected(func(p *halliganv1.Plan) { p.Summary = "harmless"; hashed(p) }),
	} {
		if _, err := w.as(dave).PostApproval(ctx, &halliganv1.PostApprovalRequest{Approval: token}); code(err) != fault.NotFound {
			t.Errorf("an approval for the %s: %v", name, err)
		}
	}
	if list, err := w.as(alice).ListPlans(ctx, &halliganv1.ListPlansRequest{}); err != nil || !slices.Equal(list.GetPlans()[0].GetApprovers(), []string{"bob"}) {
		t.Errorf("then alice sees %v, %v", list, err)
	}
	// A watch ends when the bastion stops.
	w.server.Shutdown()
	if _, err := watch.Recv(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("a watch on a bastion that stops: %v", err)
	}
}

func TestBadPosts(t *testing.T) {
	t.Parallel()
	w := working(t)
	ctx := t.Context()
	changed := func(change func(*halliganv1.Plan)) *halliganv1.Plan {
		p := of("alice")
		change(p)
		return hashed(p)
	}
	unhashed := of("alice")
	unhashed.Summary = "harmless"
	for name, c := range map[string]struct {
		plan *halliganv1.Plan
		want fault.Code
	}{
		"none":                 {nil, fault.Refused},
		"another's":            {of("bob"), fault.Refused},
		"of another cluster":   {changed(func(p *halliganv1.Plan) { p.ClusterName, p.Node = other, "cp-2" }), fault.Refused},
		"of no cluster":        {changed(func(p *halliganv1.Plan) { p.ClusterName = "" }), fault.Refused},
		"of no node":           {changed(func(p *halliganv1.Plan) { p.Node = "cp-9" }), fault.Refused},
		"that needs none":      {changed(func(p *halliganv1.Plan) { p.ApprovalsNeeded = 0 }), fault.Usage},
		"with another hash":    {unhashed, fault.Usage},
		"with a path for a ID": {changed(func(p *halliganv1.Plan) { p.Id = "../bundle" }), fault.Usage},
	} {
		if _, err := w.as(alice).PostPlan(ctx, &halliganv1.PostPlanRequest{Plan: c.plan}); code(err) != c.want {
			t.Errorf("a plan %s: %v", name, err)
		}
	}
	if _, err := w.as(carol).PostPlan(ctx, &halliganv1.PostPlanRequest{Plan: of("carol")}); code(err) != fault.Refused {
		t.Errorf("a plan of an observer: %v", err)
	}
	forged := of("alice")
	for name, c := range map[string]struct {
		token string
		want  fault.Code
	}{
		"nothing":                 {"", fault.Usage},
		"garbage":                 {approval.Prefix + "AAAA", fault.Usage},
		"another's":               {w.approve("dave", forged), fault.Refused},
		"for what is not there":   {w.approve("bob", forged), fault.NotFound},
		"for another cluster":     {w.approve("bob", changed(func(p *halliganv1.Plan) { p.ClusterName, p.Node = other, "cp-2" })), fault.Refused},
		"for a requester outside": {w.approve("bob", changed(func(p *halliganv1.Plan) { p.Actor = "../../x" })), fault.Usage},
	} {
		if _, err := w.as(bob).PostApproval(ctx, &halliganv1.PostApprovalRequest{Approval: c.token}); code(err) != c.want {
			t.Errorf("an approval, %s: %v", name, err)
		}
	}
	// Two plans that begin alike.
	for _, end := range []string{"a", "b"} {
		if _, err := w.as(alice).PostPlan(ctx, &halliganv1.PostPlanRequest{Plan: changed(func(p *halliganv1.Plan) { p.Id += end })}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.as(alice).ListPlans(ctx, &halliganv1.ListPlansRequest{PlanId: "0198"}); code(err) != fault.Usage {
		t.Errorf("an ambiguous beginning: %v", err)
	}
}

// TestMethods: every method, for everybody.
func TestMethods(t *testing.T) {
	t.Parallel()
	program := alice
	program.Kind = trust.Automation
	drill := bob
	drill.Scope.Drill = true
	sealed, narrow := person("dave", trust.Commander), person("dora", trust.Commander)
	narrow.Scope.Namespaces = []string{"shop"}
	sealed.Kind = trust.Sealed
	approver := bob
	approver.Kind = trust.Automation
	all := "alice bob carol program drill sealed approver narrow nobody"
	for method, want := range map[string]string{
		"Status": all, "Nodes": all, "ListPlans": all, "WatchPlan": all, "ExchangeBundle": all, "ServerReflectionInfo": all,
		"Sessions": "alice program sealed narrow", "PostPlan": "alice program sealed narrow", "PostApproval": "bob",
		"ListLogs": "alice carol program sealed narrow", "ReadLog": "alice carol program sealed", "ReadRecording": "sealed", "ReadSealed": "alice program sealed", "Witness": "bastion",
	} {
		found := false
		for name, row := range methods {
			if name[strings.LastIndexByte(name, '/')+1:] != method {
				continue
			}
			found = true
			for who, id := range map[string]trust.Identity{"alice": alice, "bob": bob, "carol": carol, "program": program, "drill": drill, "sealed": sealed, "approver": approver, "narrow": narrow, "nobody": {}, "bastion": {Person: "b.bastion", Kind: trust.Bastion}} {
				if row.May(id) != slices.Contains(strings.Fields(want), who) {
					t.Errorf("%s for %s: %v", method, who, row.May(id))
				}
			}
		}
		if !found {
			t.Errorf("%s has no row", method)
		}
	}
	if len(methods) != len(halliganv1.Bastion_ServiceDesc.Methods)+len(halliganv1.Bastion_ServiceDesc.Streams)+len(halliganv1.Evidence_ServiceDesc.Methods)+len(halliganv1.Evidence_ServiceDesc.Streams)+2 {
		t.Errorf("%d rows", len(methods))
	}
}

func TestLooking(t *testing.T) {
	t.Parallel()
	w := working(t)
	ctx := t.Context()
	defer w.store.Enter(&halliganv1.Session{Person: "erin", Target: "cp-2." + other, Started: timestamppb.New(time.Unix(1, 0))})()
	defer w.store.Enter(&halliganv1.Session{Person: "frank", Target: "a.b." + testfleet.Cluster, Started: timestamppb.New(time.Unix(2, 0))})()
	defer w.store.Enter(&halliganv1.Session{Person: "grace", Started: timestamppb.New(time.Unix(3, 0))})()
	got, err := w.as(alice).Sessions(ctx, &halliganv1.SessionsRequest{})
	if err != nil || len(got.GetSessions()) != 2 || got.GetSessions()[0].GetPerson() != "frank" || got.GetSessions()[1].GetPerson() != "grace" || got.GetIncomplete() != "" {
		t.Errorf("sessions: %v, %v", got, err)
	}
	erin := alice
	erin.Person = "erin"
	if got, err := w.as(erin).Sessions(ctx, &halliganv1.SessionsRequest{}); err != nil || len(got.GetSessions()) != 3 {
		t.Errorf("erin's own: %v, %v", got, err)
	}
	if _, err := w.as(carol).Sessions(ctx, &halliganv1.SessionsRequest{}); code(err) != fault.Refused || !strings.Contains(err.Error(), "carol may not call") {
		t.Errorf("sessions for an observer: %v", err)
	}

	nodes := func(who trust.Identity, cluster string) (ids []string) {
		t.Helper()
		got, err := w.as(who).Nodes(ctx, &halliganv1.NodesRequest{Cluster: cluster})
		w.must(err)
		for _, n := range got.GetNodes() {
			id := n.GetName() + "." + n.GetCluster() + " " + n.GetReach()
			if n.GetTunnelSince() != nil {
				id += " " + n.GetTunnelSince().AsTime().Format("2006")
			}
			ids = append(ids, id)
		}
		return ids
	}
	if got := nodes(carol, ""); !slices.Equal(got, []string{"cp-1.prod in", "cp-2.prod out 2001"}) {
		t.Errorf("nodes: %q", got)
	}
	everywhere := carol
	everywhere.Clusters = []string{other, testfleet.Cluster}
	if got := nodes(everywhere, other); !slices.Equal(got, []string{"cp-2.staging in"}) {
		t.Errorf("nodes of another cluster: %q", got)
	}
	everywhere.Scope.Nodes = []string{"cp-1"}
	if got := nodes(everywhere, ""); !slices.Equal(got, []string{"cp-1.prod in"}) {
		t.Errorf("one node: %q", got)
	}

	late := alice
	late.Late = true
	s, err := w.as(late).Status(ctx, &halliganv1.BastionStatusRequest{})
	if err != nil || s.GetBastion() != "a" || s.GetPerson() != "alice" || !slices.Equal(s.GetRoles(), []string{"observer", "responder"}) || !slices.Equal(s.GetClusters(), []string{"prod"}) || s.GetDoor() != "ssh" ||
		s.GetRelays() != 7 || s.GetTunnels() != 1 || s.GetBundle().GetInventoryVersion() != 2 || s.GetStoreDegraded() != "" || s.GetCredentialExpires().AsTime().Unix() != 2e9 ||
		len(s.GetWarnings()) != 2 || !strings.Contains(s.GetWarnings()[1], "past an edge") || s.GetVersion() == "" {
		t.Errorf("status: %v, %v", s, err)
	}
}

func TestExchangeBundle(t *testing.T) {
	t.Parallel()
	w := working(t)
	old := w.bundles.Current().Raw()
	newer := w.fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"mallory"} })
	forged := testfleet.New(t).Revoke(func(r *bundle.Revocations) { r.Version = 99 })
	for _, step := range []struct {
		name                 string
		offer                []byte
		back, refused, alarm bool
	}{
		{"asking", nil, true, false, false}, {"the same", old, false, false, false}, {"a forged one", forged, true, true, true}, {"a newer one", newer, false, false, false},
		{"an older one", old, true, false, false}, {"garbage", []byte("x"), true, true, true},
	} {
		before := w.heard.count()
		got, err := w.as(carol).ExchangeBundle(t.Context(), &halliganv1.ExchangeBundleRequest{Bundle: step.offer})
		if err != nil || (len(got.GetBundle()) > 0) != step.back || (got.GetRefused() != nil) != step.refused || (w.heard.count() > before) != step.alarm || got.GetStatus().GetPolicyVersion() != 1 {
			t.Errorf("%s: %v, %v", step.name, got, err)
		}
	}
	if string(w.bundles.Current().Raw()) != string(newer) {
		t.Error("the newer one is not in force")
	}
}

// TestWithoutStore: what needs no store works, and the rest says why not at once.
func TestWithoutStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "/proc/none")
	ctx := t.Context()
	c := w.as(alice)
	if s, err := c.Status(ctx, &halliganv1.BastionStatusRequest{}); err != nil || !strings.Contains(s.GetStoreDegraded(), "relaying goes on") {
		t.Errorf("%v, %v", s, err)
	}
	if n, err := c.Nodes(ctx, &halliganv1.NodesRequest{}); err != nil || len(n.GetNodes()) != 2 {
		t.Errorf("%v, %v", n, err)
	}
	if _, err := c.ExchangeBundle(ctx, &halliganv1.ExchangeBundleRequest{}); err != nil {
		t.Error(err)
	}
	w.store.Enter(&halliganv1.Session{Person: "grace"})
	if s, err := c.Sessions(ctx, &halliganv1.SessionsRequest{}); err != nil || len(s.GetSessions()) != 1 || s.GetIncomplete() == "" {
		t.Errorf("%v, %v", s, err)
	}
	_, post := c.PostPlan(ctx, &halliganv1.PostPlanRequest{Plan: of("alice")})
	_, list := c.ListPlans(ctx, &halliganv1.ListPlansRequest{})
	_, approve := w.as(bob).PostApproval(ctx, &halliganv1.PostApprovalRequest{Approval: w.approve("bob", of("alice"))})
	for _, err := range []error{post, list, approve} {
		if code(err) != fault.Unreachable || !strings.Contains(api.FromStatus(err).Error(), "pasted by hand") {
			t.Errorf("%v", err)
		}
	}
}

// TestMutualTLS: automation comes with a certificate, grpcurl too, and a
// revocation ends it.
func TestMutualTLS(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "/proc/none")
	const name = "a." + bundle.BastionDomain
	certFile, keyFile := w.fleet.ServerFiles(name, testfleet.Now())
	certificate, err := mtls.Load(certFile, keyFile, name, zerolog.Nop())
	w.must(err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	w.must(err)
	authority := credential.New(credential.Options{Bundle: w.bundles, Clock: trust.NewClock(time.Time{}), Node: "a", Relay: true})
	secure := mtls.NewListener(l, mtls.Options{Certificate: certificate, Authority: authority, Log: zerolog.Nop(), Alarm: w.heard.Raise})
	served := make(chan error, 1)
	go func() { served <- w.server.Serve(secure) }()
	t.Cleanup(func() {
		w.server.Shutdown()
		w.must(<-served)
	})
	dial := func(cert tls.Certificate) halliganv1.BastionClient {
		config := &tls.Config{RootCAs: w.bundles.Current().Policy.Authorities.TLSServer.Pool(), ServerName: name, Certificates: []tls.Certificate{cert}}
		c, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(config)))
		w.must(err)
		t.Cleanup(func() { c.Close() })
		return halliganv1.NewBastionClient(c)
	}
	robot := testfleet.Holder("robot", trust.Responder)
	c := dial(w.fleet.Client(nil, robot, testfleet.Now()))
	s, err := c.Status(t.Context(), &halliganv1.BastionStatusRequest{})
	if err != nil || s.GetPerson() != "robot" || s.GetDoor() != "grpc" || !slices.Equal(s.GetRoles(), []string{"responder"}) {
		t.Fatalf("%v, %v", s, err)
	}
	stranger := testfleet.New(t)
	if _, err := dial(stranger.Client(nil, robot, testfleet.Now())).Status(t.Context(), &halliganv1.BastionStatusRequest{}); err == nil {
		t.Error("a certificate of another fleet is taken")
	}

	if grpcurl := os.Getenv("HALLIGAN_GRPCURL"); grpcurl != "" { // make test has it
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		certFile, keyFile, caFile := files(t, w.fleet.Client(nil, robot, testfleet.Now()), w.bundles.Current().Policy.Authorities.TLSServer)
		out, err := exec.CommandContext(ctx, grpcurl, "-cacert", caFile, "-cert", certFile, "-key", keyFile, "-servername", name, l.Addr().String(), "halligan.v1.Bastion/Nodes").CombinedOutput()
		if err != nil || !strings.Contains(string(out), `"name": "cp-1"`) {
			t.Errorf("grpcurl: %s, %v", out, err)
		}
	}

	_, err = w.bundles.Offer(w.fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"robot"} }))
	w.must(err)
	for began := time.Now(); err == nil; time.Sleep(10 * time.Millisecond) {
		if _, err = c.Status(t.Context(), &halliganv1.BastionStatusRequest{}); time.Since(began) > 20*time.Second {
			t.Fatal("a revoked program still calls")
		}
	}
}

// files writes what grpcurl needs.
func files(t *testing.T, client tls.Certificate, servers bundle.CAs) (certFile, keyFile, caFile string) {
	t.Helper()
	write := func(name, kind string, ders ...[]byte) string {
		var text []byte
		for _, der := range ders {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
		}
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	key, err := x509.MarshalPKCS8PrivateKey(client.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	var cas [][]byte
	for _, ca := range servers.Certificates {
		cas = append(cas, ca.Raw)
	}
	return write("client.crt", "CERTIFICATE", client.Certificate...), write("client.key", "PRIVATE KEY", key), write("ca.crt", "CERTIFICATE", cas...)
}
