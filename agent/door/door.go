// Package door is the agent's gRPC API over the surgical engine, the same for
// everybody who came in, whichever way. The packages that open the ways
// (agent/console, api/mtls, agent/sshd) hand their connections to it; see
// api/grpcdoor.
//
// It must never decide what a person may do to the cluster: that is the engine's
// one gate. It stands on floor 4.
package door

import (
	"context"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"

	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/trust"
)

// Engine is what stands behind the doors. Its methods are called concurrently
// and check the identity's right themselves; errors should be faults.
type Engine interface {
	// Describe returns the table of actions.
	Describe() []*halliganv1.Action
	Status(ctx context.Context, who trust.Identity) (*halliganv1.StatusResponse, error)
	// Plan changes nothing.
	Plan(ctx context.Context, who trust.Identity, req *halliganv1.PlanRequest) (*halliganv1.Plan, error)
	// Undo is Plan of an undo, with what proves an action of another node.
	Undo(ctx context.Context, who trust.Identity, req *halliganv1.UndoRequest) (*halliganv1.Plan, error)
	// ShowPlan returns a plan that waits, to whoever may see it.
	ShowPlan(ctx context.Context, who trust.Identity, id string) (*halliganv1.Plan, error)
	// Apply always returns a result. Its context does not end when the caller
	// goes away, only when the agent stops or the caller's credential was
	// revoked. progress never blocks, and is not called after Apply has
	// returned.
	Apply(ctx context.Context, who trust.Identity, req *halliganv1.ApplyRequest, progress func(*halliganv1.Progress)) *halliganv1.Result
	// Stop ends an action under way between two objects.
	Stop(who trust.Identity, id string) error
	// Get calls send from one goroutine, and stops when send fails.
	Get(ctx context.Context, who trust.Identity, req *halliganv1.GetRequest, send func(*halliganv1.Object) error) (*halliganv1.GetSummary, error)
	// History calls send from one goroutine, newest first, and stops when send
	// fails.
	History(ctx context.Context, who trust.Identity, req *halliganv1.HistoryRequest, send func(*halliganv1.HistoryEntry) error) error
}

// Look finds who overloads the control plane. It is called concurrently.
type Look interface {
	// Top calls send from one goroutine at a time, and stops when send fails.
	Top(ctx context.Context, who trust.Identity, req *halliganv1.TopRequest, send func(*halliganv1.TopEvent) error) error
}

// Logs reads those of this node's control plane. It is called concurrently.
type Logs interface {
	// Read calls send from one goroutine, and stops when send fails or the context
	// ends.
	Read(ctx context.Context, req *halliganv1.LogsRequest, send func(*halliganv1.LogLines) error) error
}

// Bundles is the bundle that the agent trusts. Its methods are called
// concurrently.
type Bundles interface {
	// Offer takes a bundle over where it is verified and newer.
	Offer(data []byte) (changed bool, err error)
	// Raw is the file in force.
	Raw() []byte
	Status() *halliganv1.BundleStatus
}

// Options of a server.
type Options struct {
	Engine Engine
	// Look is nil on an agent that does not look for offenders.
	Look Look
	// Logs is nil on an agent that reads none.
	Logs Logs
	// Bundles is nil on an agent without a bundle.
	Bundles Bundles
	// Cluster is the name of the cluster in the bundle; may be empty.
	Cluster string
	// Warnings tells what is degraded, each in one line; may be nil.
	Warnings func() []string
	// Audit tells how the evidence log is; may be nil.
	Audit func() *halliganv1.AuditStatus
	// Evidence hands it out; nil on an agent that keeps none.
	Evidence halliganv1.EvidenceServer
	// Record is as that of grpcdoor.Options.
	Record grpcdoor.Record
	Alarms grpcdoor.Alarms
	Log    zerolog.Logger
}

// Server is the API behind every door.
type Server struct {
	halliganv1.UnimplementedAgentServer
	*grpcdoor.Server
	engine   Engine
	look     Look
	logs     Logs
	bundles  Bundles
	cluster  string
	warnings func() []string
	audit    func() *halliganv1.AuditStatus
}

// New returns a server that takes connections at once. It refuses to start with
// a method that has no row in the table.
func New(o Options) (*Server, error) {
	if o.Warnings == nil {
		o.Warnings = func() []string { return nil }
	}
	if o.Audit == nil {
		o.Audit = func() *halliganv1.AuditStatus { return nil }
	}
	if o.Evidence == nil {
		o.Evidence = halliganv1.UnimplementedEvidenceServer{}
	}
	s := &Server{engine: o.Engine, look: o.Look, logs: o.Logs, bundles: o.Bundles, cluster: o.Cluster, warnings: o.Warnings, audit: o.Audit}
	rows := map[string]grpcdoor.Row{}
	for method, right := range methods {
		rows[method] = grpcdoor.Row{May: right.has, Record: right.record}
	}
	var err error
	s.Server, err = grpcdoor.New(grpcdoor.Options{Methods: rows, Record: o.Record, Alarms: o.Alarms, Log: o.Log,
		Register: func(r grpc.ServiceRegistrar) {
			halliganv1.RegisterAgentServer(r, s)
			halliganv1.RegisterEvidenceServer(r, o.Evidence)
		}})
	return s, err
}
