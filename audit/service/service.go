// Package service is how a daemon hands out its evidence: its own log, and at a
// bastion the copies of others', recordings and sealed before-images. Bastions
// witness a log through it: entries flow one way, countersignatures the other.
//
// Whoever asks was let in by the daemon's door, whose table says who may call what;
// which origins somebody sees at a bastion is decided here. A bastion is believed in
// nothing: it may read what is signed, and what it signs counts as its own word
// only. The package must never hand out a file by a name that leads elsewhere, nor
// a recording before that is itself recorded. It stands on floor 2.
package service

import (
	"context"
	"iter"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/audit/sealed"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// Ledger is the daemon's own log: a *ledger.Ledger, whose comments hold.
type Ledger interface {
	Append(ctx context.Context, e audit.Event) (audit.Receipt, error)
	State() audit.State
	SignedWithin(ctx context.Context, seq uint64) error
	Dir() string
	Heads() []ledger.Head
	Entries(ctx context.Context, lineage string, generation, from, to uint64) iter.Seq2[[]byte, error]
	Changed() (<-chan struct{}, func())
	Cosigned(lineage string, generation uint64, checkpoint []byte, witness string) error
}

// Options of the service. Ledger, Origin, Identity, Bundle, Now and Log are
// required.
type Options struct {
	Ledger Ledger
	// Origin is the daemon's own, NODE.CLUSTER or NAME.bastion.
	Origin string
	// Holder is that of the ledger; nil where no bastion holds anything for it.
	Holder *Holder
	// Identity returns the daemon's newest statement, nil while it has none.
	Identity func() []byte
	// Bundle returns the one in force, nil before there is any.
	Bundle func() *bundle.Bundle
	Now    func() time.Time
	// Copies is the folder of the copies at a bastion, and Problem tells what is
	// wrong with one of them; empty and nil at an agent.
	Copies  string
	Problem func(origin string) string
	// Stopping returns what ends when the daemon's door is told to stop; nil: nothing
	// does. It is asked when the door serves.
	Stopping func() context.Context
	// Sealed is what an agent seals for others; nil at a bastion.
	Sealed Sealed
	Log    zerolog.Logger
}

// Sealed is the sealed before-images of an agent: a *sealed.Store, whose comments
// hold.
type Sealed interface {
	Meet(statements [][]byte) int
	Unsent(witness string) []sealed.File
	Stored(witness, action, sum string)
	Changed() (<-chan struct{}, func())
}

// Service serves the Evidence API.
type Service struct {
	halliganv1.UnimplementedEvidenceServer
	o Options

	mu sync.Mutex // guards all below
	// streams are those of bastions, by server: of each the newest counts.
	streams map[string]*stream
}

// New returns a Service.
func New(o Options) *Service {
	if o.Holder == nil {
		o.Holder = NewHolder()
	}
	if o.Stopping == nil {
		o.Stopping = context.Background
	}
	if o.Problem == nil {
		o.Problem = func(string) string { return "" }
	}
	return &Service{o: o, streams: map[string]*stream{}}
}

// sees reports whether somebody may read the evidence of an origin. At an agent
// there is only its own. At a bastion everybody sees what bastions did, and of
// nodes those that their credential is for.
func (s *Service) sees(who trust.Identity, origin string) bool {
	if origin == s.o.Origin {
		return true
	}
	node, cluster, ok := trust.CutServer(origin)
	if s.o.Copies == "" || !ok {
		return false
	}
	return cluster == bundle.BastionDomain || slices.Contains(who.Clusters, cluster) && (len(who.Scope.Nodes) == 0 || slices.ContainsFunc(who.Scope.Nodes, func(pattern string) bool {
		ok, _ := path.Match(pattern, node)
		return ok
	}))
}

// copyOf returns the folder of a copy.
func (s *Service) copyOf(origin string) string { return filepath.Join(s.o.Copies, origin) }
