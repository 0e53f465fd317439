package action

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/rs/zerolog"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/journal"
	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// Options of an engine.
type Options struct {
	Node    string
	Version string
	// Prefix of Kubernetes' keys; default /registry.
	Prefix       string
	Distribution string
	Etcd         *etcd.Client
	// LocalAPI tells how the node's own API server is; nil where the agent does not
	// ask it.
	LocalAPI func() *halliganv1.LocalAPIStatus
	// Elsewhere are resources that live in another etcd, with its addresses:
	// plural.group, or plural alone for the core group; plural may be *.
	Elsewhere  map[string][]string
	Encryption *storage.Transformers
	Journal    *journal.Journal
	// Audit takes the intent of every action before its effect, and what became of
	// it. Past are its events of before this start; nil: there are none.
	Audit audit.Log
	Past  Past
	// Sealed keeps before-images elsewhere, and Take opens those of another node that
	// somebody brings, so that this one takes its actions back; both may be nil.
	Sealed Sealed
	Take   Take
	// Gone is the file that WatchGone keeps, in the private folder of the
	// journal; "" keeps it in memory only.
	Gone string
	// Policy returns the policy in force, which changes with the bundle.
	Policy func() *trust.Policy
	// Cluster is the name that the bundle has for this cluster; empty without a
	// bundle.
	Cluster string
	// Fresh reports whether the bundle is recent enough for mutations without an
	// approval; nil: always.
	Fresh func() bool
	// Approvals verifies approvals; nil: nobody can approve.
	Approvals Approvals
	// Alarm is told of every action that is applied alone, before its effect;
	// it never blocks. Refusals are the doors' to tell. May be nil.
	Alarm func(alarm.Event)
	// Now is the time that plans and records are dated with, and that decides
	// how old they are; default time.Now. It never goes backwards.
	Now func() time.Time
	Log zerolog.Logger
	// PlanTTL is how long a plan may be applied; default 10 min. One that needs
	// approvals waits ApprovalTTL, default 1 h.
	PlanTTL, ApprovalTTL time.Duration
	// SettleAfter is how long after a crash a write that is not seen in etcd
	// counts as never made; default 16 s, which is more than etcd lets a
	// request live: 5 s and two election timeouts (server/config/config.go,
	// ReqTimeout), which is 7 s by default and 15 s on k3s and RKE2, whose
	// election timeout is 5 s (k3s, pkg/etcd/etcd.go).
	SettleAfter time.Duration
	// Pace bounds actions on many objects; the zero value is the default.
	Pace Pace
	// Steps, when set, is told of every step of an application before it is
	// taken. Tests crash the process there.
	Steps func(step string)
}

// Engine plans, applies and takes back actions. Its methods may be called
// concurrently.
type Engine struct {
	node, version, prefix, distribution string

	etcd       *etcd.Client
	localAPI   func() *halliganv1.LocalAPIStatus
	elsewhere  map[string][]string
	encryption *storage.Transformers
	journal    *journal.Journal
	audit      audit.Log
	past       Past
	sealed     Sealed
	opens      Take
	policy     func() *trust.Policy
	name       string // of the cluster
	fresh      func() bool
	approvals  Approvals
	alarm      func(alarm.Event)
	now        func() time.Time
	log        zerolog.Logger
	kinds      catalogue
	gone       gone
	planTTL    time.Duration
	approveTTL time.Duration
	settle     time.Duration
	pace       Pace
	steps      func(string)

	mu      sync.Mutex // guards all below
	plans   []*prepared
	cluster string
	asked   time.Time
	// doing counts objects of actions under way, by person, so that two
	// actions at once cannot pass together what one may not.
	doing map[string]tally
	// running are the actions under way.
	running map[string]running
	// owed are outcomes that the log did not take yet.
	owed []audit.Event
	// closed says that no intent of an earlier process is without an outcome, unless
	// it is owed or the action unfinished; final are, from then on, the unfinished
	// actions whose outcome is on record all the same. told are, until then, the
	// actions of this process.
	closed      bool
	told, final map[string]bool
}

// running is an action under way.
type running struct {
	action, actor string
	stop          context.CancelCauseFunc
}

// prepared is a plan that waits to be applied.
type prepared struct {
	plan    *halliganv1.Plan
	request trust.Request
	steps   []*step
	took    time.Duration
	// lost is how many bytes it holds of another node's record.
	lost int
}

// stamp is how a time is told to people.
const stamp = time.RFC3339

// Plans are kept in memory only: bounded for each person in number and in
// objects, the oldest go first.
const (
	maxPlans       = 64
	maxPlanObjects = 20_000
	maxPlanLost    = 16 << 20 // bytes of other nodes' records
)

// New returns an engine. Recover must run beside it, which settles what an earlier
// process left unfinished, and WatchGone.
func New(o Options) *Engine {
	if o.Prefix == "" {
		o.Prefix = storage.DefaultPrefix
	}
	if o.PlanTTL == 0 {
		o.PlanTTL = 10 * time.Minute
	}
	if o.ApprovalTTL == 0 {
		o.ApprovalTTL = time.Hour
	}
	if o.Fresh == nil {
		o.Fresh = func() bool { return true }
	}
	if o.Alarm == nil {
		o.Alarm = func(alarm.Event) {}
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.SettleAfter == 0 {
		o.SettleAfter = 16 * time.Second
	}
	if o.LocalAPI == nil {
		o.LocalAPI = func() *halliganv1.LocalAPIStatus { return nil }
	}
	if o.Steps == nil {
		o.Steps = func(string) {}
	}
	return &Engine{audit: o.Audit, past: o.Past, closed: o.Past == nil, sealed: o.Sealed, opens: o.Take, node: o.Node, version: o.Version, prefix: o.Prefix, distribution: o.Distribution, etcd: o.Etcd, localAPI: o.LocalAPI, elsewhere: o.Elsewhere, encryption: o.Encryption,
		journal: o.Journal, policy: o.Policy, name: o.Cluster, fresh: o.Fresh, approvals: o.Approvals, alarm: o.Alarm, now: o.Now,
		log: o.Log, planTTL: o.PlanTTL, approveTTL: o.ApprovalTTL, settle: o.SettleAfter, pace: o.Pace, steps: o.Steps,
		gone: gone{path: o.Gone}, kinds: catalogue{Catalogue: storage.NewCatalogue()}, doing: map[string]tally{}, running: map[string]running{}, told: map[string]bool{}}
}

// Describe returns the actions, with the roles that the policy in force asks for.
func (e *Engine) Describe() []*halliganv1.Action {
	all, policy := Describe(), e.policy()
	for i := range table {
		all[i].Role = policy.Rung(e.request(&table[i])).String()
	}
	return all
}

// Plan computes what an action would do. It writes nothing anywhere.
func (e *Engine) Plan(ctx context.Context, who trust.Identity, req *halliganv1.PlanRequest) (*halliganv1.Plan, error) {
	return e.prepare(ctx, who, req, nil)
}

// Undo is Plan of an undo, which may bring the evidence of another node's action.
func (e *Engine) Undo(ctx context.Context, who trust.Identity, req *halliganv1.UndoRequest) (*halliganv1.Plan, error) {
	return e.prepare(ctx, who, &halliganv1.PlanRequest{Action: undoName, Reason: req.GetReason(), Incident: req.GetIncident(),
		Parameters: &structpb.Struct{Fields: map[string]*structpb.Value{"action": structpb.NewStringValue(req.GetActionId())}}}, req.GetEvidence())
}

func (e *Engine) prepare(ctx context.Context, who trust.Identity, req *halliganv1.PlanRequest, evidence *halliganv1.SealedEvidence) (*halliganv1.Plan, error) {
	began := time.Now()
	r, err := e.authorize(who, req.Action)
	if err != nil {
		return nil, err
	}
	if r.plan == nil {
		return nil, fault.New(fault.Usage, "it needs no plan: call it by its own name", "%s only reads", r.name)
	}
	if err := r.checkParameters(req.Parameters); err != nil {
		return nil, err
	}
	if err := checkReason(req.Reason, req.Incident); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	cluster, err := e.clusterID(ctx)
	if err != nil {
		return nil, err
	}
	created := e.now()
	p := &planner{engine: e, who: who, evidence: evidence, policy: e.policy(), request: e.request(r), plan: &halliganv1.Plan{
		Id: newID(created), Action: r.name, Parameters: req.Parameters, Actor: who.Person, Role: who.Role.String(), Reason: req.Reason, Incident: req.Incident,
		Node: e.node, Cluster: cluster, Via: "etcd", ViaReason: "the only way that this agent has",
		Created: timestamppb.New(created), Nonce: newNonce(), ClusterName: e.name,
	}}
	p.plan.PolicyVersion = p.policy.Version
	err = r.plan(ctx, p, req.Parameters)
	if p.around != nil {
		if err != nil {
			cancel()
		}
		_ = p.around.group.Wait() // its error is fights' to judge
	}
	if err != nil {
		return nil, err
	}
	if p.stale != "" {
		return nil, fault.New(fault.NoQuorum, "reads work (halligan get); bring etcd's members back first", "nothing can be changed: %s", p.stale)
	}
	if p.unsaid > 0 {
		p.plan.Warnings = append(p.plan.Warnings, fmt.Sprintf("and %d more warnings", p.unsaid))
	}
	p.plan.Summary = short(p.plan.Summary, 2*maxShown)
	if p.expired > 0 {
		p.warn("%d objects are left out: their lease ran out, so that they would be gone by now anyway", p.expired)
	}
	e.mu.Lock()
	changed := e.changed(who.Person)
	e.mu.Unlock()
	v, err := decide(p.policy, who, p.request, p.steps, e.before(p.plan, changed))
	if err != nil {
		return nil, err
	}
	ttl := e.planTTL
	if v.approvals > 0 {
		ttl = e.approveTTL
	}
	p.plan.Expires = timestamppb.New(created.Add(ttl))
	p.plan.ApprovalsNeeded, p.plan.ApprovalReason, p.plan.AddsAuthority = uint32(v.approvals), v.why, p.request.AddsAuthority
	p.plan.AloneAllowed = v.alone && len(p.steps) <= p.policy.AloneCaps().ObjectsPerAction
	final := 0
	for _, s := range p.steps {
		if s.op == opDelete && (s.blind || p.policy.Protected(undoName, s.kind.Resource(), s.namespace, s.name) != nil) {
			final++
		}
	}
	if final > 0 {
		p.plan.Warnings = slices.Insert(p.plan.Warnings, 0, fmt.Sprintf("CANNOT BE UNDONE: %d of %d objects; what puts them back is the API server or a backup", final, len(p.steps)))
	}
	if slices.ContainsFunc(p.steps, func(s *step) bool { return s.op != opDelete }) {
		if err := e.encryption.Usable(ctx); err != nil {
			f := fault.Of(err)
			return nil, fault.New(fault.Encrypted, f.Next, "objects can only be deleted now: %s", f.Message)
		}
	}
	if most := p.policy.Caps().ObjectsPerAction; len(p.steps) > most {
		return nil, fault.New(fault.Refused, "take fewer objects at a time", "%d objects are more than the %d that policy lets one action change", len(p.steps), most)
	}
	if err := e.hourly(who.Person, p.plan, changed, p.policy.Caps().ObjectsPerHour); err != nil {
		return nil, err
	}
	if p.plan.Sha256, err = api.PlanSHA256(p.plan); err != nil {
		return nil, err
	}
	e.keep(&prepared{plan: p.plan, request: p.request, steps: p.steps, took: time.Since(began), lost: p.lost.size()})
	return proto.CloneOf(p.plan), nil
}

// checkReason bounds what a person says for the record.
func checkReason(reason, incident string) error {
	if len(reason) > 1024 || len(incident) > 128 {
		return fault.New(fault.Usage, "say it in at most 1024 bytes (reason) and 128 bytes (incident)", "reason or incident is too long")
	}
	return nil
}

// says reports whether a reason has anything in it.
func says(reason string) bool {
	return strings.ContainsFunc(reason, func(r rune) bool { return unicode.IsLetter(r) || unicode.IsDigit(r) })
}

// clusterID asks etcd which cluster it is, at most every 10 s: the same address
// only becomes another cluster when somebody restores one.
func (e *Engine) clusterID(ctx context.Context) (string, error) {
	e.mu.Lock()
	id, fresh := e.cluster, time.Since(e.asked) < 10*time.Second
	e.mu.Unlock()
	if fresh {
		return id, nil
	}
	id, err := e.etcd.ClusterID(ctx)
	if err == nil {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.cluster, e.asked = id, time.Now()
	}
	return id, err
}

// before returns how many objects count beside a plan's own where a rule demands
// approvals from some number on, so that it cannot be passed in parts.
func (e *Engine) before(plan *halliganv1.Plan, changed tally) int {
	if !e.counts(plan.Undoes) {
		return 0
	}
	return changed.unapproved
}

// tally counts the objects that one person changed within the hour: all, and those
// that nobody else approved.
type tally struct{ all, unapproved int }

func (t tally) plus(objects int, approved bool) tally {
	t.all += objects
	if !approved {
		t.unapproved += objects
	}
	return t
}

// counts reports whether what an action changes counts. Taking something back,
// here an action with the ID, does not, since what counts bounds harm; doing it once
// more by taking that back does.
func (e *Engine) counts(undoes string) bool {
	if undoes == "" {
		return true
	}
	entry, err := e.journal.Find(undoes)
	if err != nil {
		return true
	}
	again, err := e.again(entry)
	return err != nil || again != ""
}

// changed returns what a person changed within the hour; e.mu is held. Actions
// count by their objects, done or still under way, and for an hour after they began.
func (e *Engine) changed(person string) tally {
	sum := e.doing[person]
	since := e.now().Add(-time.Hour - max(e.planTTL, e.approveTTL)) // Time is that of the plan
	for _, j := range e.journal.Entries() {
		if j.Time.Before(since) {
			break
		}
		if j.Actor != person || e.journal.Writing(j.ID) || !e.counts(j.Undoes) {
			continue
		}
		objects := j.Applied
		if j.Result == "" { // cut off: how much was done is not settled yet
			objects = j.Objects
		}
		sum = sum.plus(objects, len(j.ApprovedBy) > 0)
	}
	return sum
}

// hourly refuses what would take a person over the hourly cap.
func (e *Engine) hourly(person string, plan *halliganv1.Plan, changed tally, most int) error {
	objects := len(plan.Objects)
	if changed.all+objects > most && e.counts(plan.Undoes) {
		return fault.New(fault.Refused, "wait, or ask another person", "%s changed %d objects within the hour; with %d more it would pass the cap of %d",
			person, changed.all, objects, most)
	}
	return nil
}

// release gives back what take reserved of the hour.
func (e *Engine) release(person string, reserved tally) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.doing[person]
	if now = (tally{now.all - reserved.all, now.unapproved - reserved.unapproved}); now == (tally{}) {
		delete(e.doing, person)
		return
	}
	e.doing[person] = now
}

// keep holds a plan until it is applied or too old. One person's plans push out
// that person's oldest, never anybody else's.
func (e *Engine) keep(p *prepared) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.plans = append(e.plans, p)
	plans, objects, lost := map[string]int{}, map[string]int{}, map[string]int{}
	now := e.now()
	kept := make([]*prepared, 0, len(e.plans))
	for _, q := range slices.Backward(e.plans) {
		who := q.plan.Actor
		plans[who]++
		objects[who] += len(q.steps)
		lost[who] += q.lost
		// An expired plan stays a while, so that whoever applies it is told.
		if q == p || plans[who] <= maxPlans && objects[who] <= maxPlanObjects && lost[who] <= maxPlanLost && now.Before(q.plan.Expires.AsTime().Add(e.planTTL)) {
			kept = append(kept, q)
		}
	}
	slices.Reverse(kept)
	e.plans = kept
}

// take hands out a plan once, with its objects reserved of the hour, if ready
// agrees, and then, with nobody else at it, the function that ready returns, which
// must not take e.mu. The plan comes with an error where there is one.
func (e *Engine) take(who trust.Identity, id, sha string, ready func(*prepared, tally) (last func(tally) (approved bool, err error), err error)) (*prepared, tally, error) {
	e.mu.Lock()
	i := slices.IndexFunc(e.plans, func(p *prepared) bool { return p.plan.Id == id })
	var p *prepared
	if i >= 0 {
		p = e.plans[i]
	}
	changed := e.changed(who.Person)
	e.mu.Unlock()
	if p == nil {
		if entry, err := e.journal.Find(id); err == nil && entry.ID == id {
			return nil, tally{}, fault.New(fault.Stale, "see: halligan history "+id, "plan %s was applied already", id)
		}
		return nil, tally{}, fault.New(fault.Stale, "plan again", "this agent has no plan %.64q: it was restarted, or the plan is too old", id)
	}
	switch {
	case p.plan.Actor != who.Person || p.plan.Role != who.Role.String():
		return nil, tally{}, fault.New(fault.Refused, "make a plan of your own", "plan %s was made by %s as %s", id, p.plan.Actor, p.plan.Role)
	case p.plan.Sha256 != sha:
		return nil, tally{}, fault.New(fault.Stale, "plan again", "plan %s is not the one with the hash %.16q", id, sha)
	case e.now().After(p.plan.Expires.AsTime()):
		return p, tally{}, fault.New(fault.Stale, "plan again", "plan %s expired at %s", id, p.plan.Expires.AsTime().Format(stamp))
	case !says(p.plan.Reason):
		return p, tally{}, fault.New(fault.Usage, "plan again with a reason (--reason TEXT)", "plan %s has no reason, which the record needs", id)
	}
	last, err := ready(p, changed)
	if err != nil {
		return p, tally{}, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if i = slices.Index(e.plans, p); i < 0 {
		return p, tally{}, fault.New(fault.Stale, "see: halligan history "+id, "plan %s was applied already", id)
	}
	approved, err := last(e.changed(who.Person))
	if err != nil {
		return p, tally{}, err
	}
	e.plans = slices.Delete(e.plans, i, i+1)
	reserved := tally{}
	if e.counts(p.plan.Undoes) {
		reserved = reserved.plus(len(p.steps), approved)
	}
	now := e.doing[who.Person]
	e.doing[who.Person] = tally{now.all + reserved.all, now.unapproved + reserved.unapproved}
	return p, reserved, nil
}

// Stop ends an action under way between two objects. Who began it may, and a
// commander. A credential that is narrowed to some actions stops those only. It goes
// on record first, where that is possible: what does no more harm does not wait for
// it.
func (e *Engine) Stop(who trust.Identity, id string) error {
	e.mu.Lock()
	r, ok := e.running[id]
	e.mu.Unlock()
	request := trust.Request{Action: trust.ActionStop, Rung: trust.Responder, Mutates: true, Node: e.node}
	if ok {
		request.Action = r.action
	}
	if ok && r.actor != who.Person {
		request.Floor = trust.Commander
	}
	if err := e.policy().Decide(who, request); err != nil {
		return err
	}
	if !ok {
		return fault.New(fault.NotFound, "see: halligan history", "no action %.64q is under way", id)
	}
	if !mayRecall(who, r.actor) { // it may be at work where the credential does not reach
		return fault.New(fault.Refused, "ask somebody with the whole role", "the credential of %s is narrowed, and action %s is %s's", who.Person, id, r.actor)
	}
	stop := func() {
		r.stop(fault.New(fault.Cancelled, "what was changed can be undone, the rest planned again", "stopped by %s", who.Person))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_, err := audit.Do(ctx, owing{e.audit, e}, audit.Event{Actor: audit.ActorOf(who), Session: who.Session, Drill: who.Scope.Drill, Action: trust.ActionStop, PlanID: id},
		func(context.Context, audit.Permit) []audit.Event {
			stop()
			return []audit.Event{{Action: trust.ActionStop, PlanID: id, Outcome: "ok"}}
		})
	if err != nil {
		stop()
		e.log.Error().Str("action", id).Str("actor", who.Person).Err(err).Msg("action stopped, which could not be recorded")
	}
	return nil
}

// Status tells what works now. It never fails because something is broken.
func (e *Engine) Status(ctx context.Context, who trust.Identity) (*halliganv1.StatusResponse, error) {
	if err := e.policy().Decide(who, trust.Request{Action: trust.ActionStatus, Rung: trust.Observer, Node: e.node}); err != nil {
		return nil, err
	}
	st := e.etcd.Status(ctx)
	out := &halliganv1.StatusResponse{
		Node: e.node, Version: e.version, Time: timestamppb.New(e.now()), Cluster: e.name, Actor: who.Person, Role: who.Role.String(), Distribution: e.distribution,
		Encryption: e.encryption.Providers(), LocalApi: e.localAPI(),
		Etcd: &halliganv1.EtcdStatus{Endpoint: st.Endpoint, Version: st.Version, MemberId: hexID(st.MemberID), LeaderId: hexID(st.LeaderID),
			Revision: st.Revision, DbSizeBytes: st.DBSize, DbQuotaBytes: st.DBQuota, Alarms: st.Alarms, Quorum: st.Quorum,
			LatencyMs: float64(st.Latency) / float64(time.Millisecond)},
	}
	if st.Err != nil {
		out.Etcd.Error = fault.Of(st.Err).Error()
	}
	if kind, err := e.resolve(ctx, "namespaces"); err == nil && st.Quorum && st.Err == nil {
		if n, _, err := e.etcd.Count(ctx, kind.Range(e.prefix, "")); err == nil && n == 0 {
			out.Etcd.Error = fmt.Sprintf("there is no namespace below the key prefix %s: is it the API server's --etcd-prefix?", e.prefix)
		}
	}
	out.StateFreeBytes, out.StateUsedBytes = e.journal.Space()
	out.StateSlots = int32(e.journal.Slots())
	switch err := e.journal.Check(0); {
	case err != nil && e.journal.CheckFor(journal.Access{BreakGlass: true}, 0) == nil:
		out.ReadOnly = fmt.Sprintf("all but %d small actions of responders and commanders: %s", e.journal.Slots(), fault.Of(err).Error())
	case err != nil:
		out.ReadOnly = fault.Of(err).Error()
	case st.Version == "":
		out.ReadOnly = "etcd cannot be reached; reads of objects fail too"
	case !st.Quorum:
		out.ReadOnly = "etcd has no quorum: only reads work"
	default:
		if err := e.encryption.Usable(ctx); err != nil {
			out.ReadOnly = "all but deletions: " + fault.Of(err).Error()
		}
	}
	return out, nil
}

func hexID(id uint64) string {
	if id == 0 {
		return ""
	}
	return strconv.FormatUint(id, 16)
}

// recordReveal makes durable that somebody is about to see a Secret: in the evidence
// log, and for the history here, which does not stand in its way.
func (e *Engine) recordReveal(ctx context.Context, who trust.Identity, req *halliganv1.GetRequest, par getParameters, key string) error {
	cluster, err := e.etcd.ClusterID(ctx)
	if err != nil {
		return err
	}
	now := e.now()
	plan := &halliganv1.Plan{Id: newID(now), Action: getRow.name, ClusterName: e.name, Actor: who.Person, Role: who.Role.String(), Node: e.node, Cluster: cluster,
		Reason: req.GetReason(), Incident: req.GetIncident(), Summary: fmt.Sprintf("reveal %s in namespace %s", par.Target, par.Namespace), Created: timestamppb.New(now)}
	plan.Parameters, err = structpb.NewStruct(map[string]any{"target": par.Target, "namespace": par.Namespace, "reveal": true})
	if err != nil {
		return fault.New(fault.Usage, "see the action's help", "parameters: %w", err)
	}
	parameters, err := api.CanonicalJSON(plan.Parameters)
	if err != nil {
		return err
	}
	receipt, err := e.audit.Append(ctx, audit.Event{Kind: audit.Secret, Actor: audit.ActorOf(who), Session: who.Session, Drill: who.Scope.Drill, Incident: plan.Incident, Reason: plan.Reason,
		Action: plan.Action, PlanID: plan.Id, Parameters: parameters, Objects: []audit.Object{{Key: key, Operation: "reveal"}}, ObjectCount: 1, Text: plan.Summary})
	if err != nil {
		return err
	}
	access := accessOf(who)
	access.Intent = receipt.ID
	a, err := e.journal.Begin(access, plan, 0)
	if err == nil {
		err = a.Finish(resultApplied, "")
	}
	if err != nil {
		e.log.Warn().Str("action", plan.Id).Err(err).Msg("that a Secret was shown is in the evidence log, but not in the history of this node")
	}
	return nil
}

// newID returns an identifier that sorts by time and that a person can read out
// on a phone.
func newID(at time.Time) string {
	var random [5]byte
	_, _ = rand.Read(random[:]) // never fails: crypto/rand
	return at.UTC().Format("20060102-150405") + "-" + strings.ToLower(base32.StdEncoding.EncodeToString(random[:]))
}

func sum256(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}
