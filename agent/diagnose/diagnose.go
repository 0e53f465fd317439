// Package diagnose finds who overloads a control plane, without needing the API
// server: from etcd's keys and writes, from the sockets of this node, and, while it still
// answers, from what the local API server tells of its requests.
//
// A way to look is one file and one row of the table: a time limit, what it keeps in
// memory, what it cannot see, and a function that looks. Ranking puts what they
// found together.
//
// It must never change anything, never decrypt what it only counts, and never let
// text that a tenant can choose name a suspect: only owners whose UID is that of the
// object in etcd, and users that the API server authenticated, get as far as a
// command line. Each way works when all others fail. It stands on floor 4, on top of
// agent/storage and agent/etcd.
package diagnose

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// Row is one way to look.
type Row struct {
	// Name is what --by takes.
	Name, Title, Unit string
	// Timeout bounds it; one that has found something by then tells that.
	Timeout time.Duration
	// Memory is the bound of what it keeps, in words.
	Memory string
	// Blind are what it cannot see, each in one line.
	Blind []string
	look  func(context.Context, *scene) (*finding, error)
}

// table is the inventory, in the order in which people read it.
var table = []Row{requestsRow, connectionsRow, writesRow, objectsRow, bytesRow}

// finding is what one way found. Rows come sorted, the largest first.
type finding struct {
	rows    []*halliganv1.FindingRow
	total   float64
	sampled string
	unit    string   // where it is not the row's
	blind   []string // beside the row's
	leads   []lead
}

// lead points to a suspect.
type lead struct {
	workload workload
	// user is as the API server authenticates it, or as the verified workload's pods
	// are authenticated; may be empty.
	user string
	// weight is how much speaks for it, 0 to 1.
	weight   float64
	evidence string
	// objects is what piled up where, for a lead without a workload.
	objects   *storage.Kind
	namespace string
}

// Store is the part of an etcd client that looking needs.
type Store interface {
	Get(ctx context.Context, key string) (kv etcd.KV, found bool, view etcd.View, err error)
	Count(ctx context.Context, prefix string) (int64, etcd.View, error)
	Walk(ctx context.Context, prefix string, fn func(etcd.KV) error) (etcd.View, error)
	Watch(ctx context.Context, prefix string, ready func(), fn func(etcd.Change)) error
}

// Options of a Diagnoser. Etcd, Encryption and Policy are required.
type Options struct {
	Node string
	// Prefix of Kubernetes' keys; default /registry.
	Prefix     string
	Etcd       Store
	Encryption *storage.Transformers
	// Elsewhere are resources that live in another etcd, which is not looked at.
	Elsewhere map[string][]string
	// API is the way to this node's API server, where there is one; nil: none.
	API API
	// APIPort is that of the API server on this node; default 6443.
	APIPort uint16
	// Policy returns the policy in force.
	Policy func() *trust.Policy
	Log    zerolog.Logger
}

// Diagnoser looks. It is safe for concurrent use.
type Diagnoser struct {
	o    Options
	busy chan struct{}
	// sockets calls fn for every established connection to the port on this node, and
	// tells whether anybody listens there.
	sockets func(ctx context.Context, port uint16, fn func(socket)) (served bool, err error)
}

// Bounds.
const (
	// atOnce is how many calls of Top may look at a time: each reads all of etcd.
	atOnce = 2
	// overall bounds a look in all ways.
	overall = 9 * time.Second
	// defaultSeconds and maxSeconds are how long a way that watches does.
	defaultSeconds, maxSeconds = 5, 60
	maxRows                    = 20
	maxSuspects                = 8
)

// New returns a Diagnoser.
func New(o Options) *Diagnoser {
	o.Prefix = cmp.Or(o.Prefix, storage.DefaultPrefix)
	o.APIPort = cmp.Or(o.APIPort, 6443)
	return &Diagnoser{o: o, busy: make(chan struct{}, atOnce), sockets: sockets}
}

// Names returns the ways to look.
func Names() []string {
	var names []string
	for _, r := range table {
		names = append(names, r.Name)
	}
	return names
}

// Top looks in the ways that are asked for, all at once, and sends each finding when
// it is there, and who is suspected by all of them. It calls send from one goroutine.
func (d *Diagnoser) Top(ctx context.Context, who trust.Identity, req *halliganv1.TopRequest, send func(*halliganv1.TopEvent) error) error {
	if err := d.o.Policy().Decide(who, trust.Request{Action: "top", Rung: trust.Observer, Node: d.o.Node}); err != nil {
		return err
	}
	rows, err := choose(req.GetBy())
	if err != nil {
		return err
	}
	if req.GetSeconds() > maxSeconds {
		return fault.New(fault.Usage, fmt.Sprintf("give at most %d", maxSeconds), "%d seconds are more than a look may take", req.GetSeconds())
	}
	select {
	case d.busy <- struct{}{}:
		defer func() { <-d.busy }()
	default:
		return fault.New(fault.Failed, "try again in some seconds", "%d others look already, and each look reads all of etcd", atOnce)
	}
	s := &scene{d: d, sample: req.GetSample(), watch: time.Duration(cmp.Or(req.GetSeconds(), defaultSeconds)) * time.Second, known: map[string]workload{}}
	if len(req.GetBy()) == 0 {
		s.everything = true
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, overall+time.Duration(req.GetSeconds())*time.Second)
		defer cancel()
	}
	// Whoever goes away ends the looking; what is under way then is waited for.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type found struct {
		row Row
		f   *finding
		err error
		dur time.Duration
	}
	all := make(chan found, len(rows))
	var looking sync.WaitGroup
	defer looking.Wait()
	defer cancel()
	for _, r := range rows {
		looking.Go(func() {
			start := time.Now()
			f, err := d.look(ctx, r, s)
			all <- found{r, f, err, time.Since(start)}
		})
	}
	var leads []lead
	for range rows {
		is := <-all
		leads = append(leads, is.f.leads...)
		if err := send(&halliganv1.TopEvent{Finding: is.f.message(is.row, is.err, is.dur)}); err != nil {
			return err
		}
	}
	return send(&halliganv1.TopEvent{Suspects: &halliganv1.Suspects{Suspects: rank(leads, req.GetReason() != ""), Final: true}})
}

// look runs one row within its bounds. What a row found before it failed counts.
func (d *Diagnoser) look(ctx context.Context, r Row, s *scene) (f *finding, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			d.o.Log.Error().Str("way", r.Name).Interface("panic", p).Bytes("stack", debug.Stack()).Msg("a way to look failed")
			err = fault.New(fault.Failed, "tell whoever keeps halligan; the log of the agent has more", "looking by %s failed in the agent itself", r.Name)
		}
		if f == nil {
			f = &finding{}
		}
	}()
	return r.look(ctx, s)
}

func (f *finding) message(r Row, err error, took time.Duration) *halliganv1.Finding {
	out := &halliganv1.Finding{Way: r.Name, Title: r.Title, Unit: cmp.Or(f.unit, r.Unit), Rows: f.rows[:min(len(f.rows), maxRows)],
		Blind: append(slices.Clone(r.Blind), f.blind...), Sampled: f.sampled, Total: f.total, TookMs: float64(took.Microseconds()) / 1000}
	if err != nil {
		out.Error = fault.Of(err).Error()
	}
	return out
}

// choose returns the rows of the names, all for none.
func choose(names []string) ([]Row, error) {
	if len(names) == 0 {
		return table, nil
	}
	var rows []Row
	for _, r := range table {
		if slices.Contains(names, r.Name) {
			rows = append(rows, r)
		}
	}
	for _, n := range names {
		if !slices.Contains(Names(), n) {
			return nil, fault.New(fault.Usage, "give "+strings.Join(Names(), ", "), "there is no way to look called %.40q", n)
		}
	}
	return rows, nil
}

// scene is one look: what its ways share.
type scene struct {
	d          *Diagnoser
	sample     bool
	everything bool
	watch      time.Duration

	counting sync.Mutex // guards counted, of which there is one for two ways
	counted  *inventory

	mu    sync.Mutex // guards all below
	cat   *storage.Catalogue
	known map[string]workload
}

// kinds returns the kinds of the cluster. Where the custom ones cannot be read there
// are the native ones.
func (s *scene) kinds(ctx context.Context) *storage.Catalogue {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cat != nil {
		return s.cat
	}
	s.cat = storage.NewCatalogue()
	crd := s.cat.ByGroupKind("apiextensions.k8s.io", "CustomResourceDefinition")
	// One that cannot be read leaves its objects among those of no known kind.
	_, _ = s.d.o.Etcd.Walk(ctx, crd.Range(s.d.o.Prefix, ""), func(kv etcd.KV) error {
		if plain, err := s.d.o.Encryption.Open(ctx, crd, kv.Key, kv.Value); err == nil {
			_ = s.cat.AddCRD(plain)
		}
		return nil
	})
	return s.cat
}

// elsewhere says what is not in this etcd.
func (s *scene) elsewhere() []string {
	if len(s.d.o.Elsewhere) == 0 {
		return nil
	}
	return []string{"lives in another etcd: " + strings.Join(slices.Sorted(maps.Keys(s.d.o.Elsewhere)), ", ")}
}

// percent is a share for people.
func percent(part, whole float64) string {
	if whole <= 0 {
		return "0 %"
	}
	return fmt.Sprintf("%.0f %%", 100*part/whole)
}
