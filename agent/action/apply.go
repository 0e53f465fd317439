package action

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/journal"
	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
)

// Results of an action.
const (
	resultApplied    = "applied"
	resultPartial    = "partial"
	resultUnverified = "unverified"
	resultUnknown    = "unknown"
	resultStale      = "stale"
	resultRefused    = "refused"
	resultAwaiting   = "awaiting-approval"
	resultFailed     = "failed"
)

// Outcomes of an object, beside journal.Applied.
const (
	outcomeStale      = "stale"
	outcomeFailed     = "failed"
	outcomeUnknown    = "unknown"
	outcomeUnverified = "unverified"
	// outcomeGone: somebody else had deleted it already.
	outcomeGone = "gone"
	// outcomeSkipped: nothing was tried.
	outcomeSkipped = "skipped"
)

// Apply carries out a plan and returns what came of it, whatever that is.
// progress may be nil. A plan that needs approvals goes on waiting where they
// are missing or not enough. A cancelled context stops it between two objects; what
// was written by then is recorded.
func (e *Engine) Apply(ctx context.Context, who trust.Identity, req *halliganv1.ApplyRequest, progress func(*halliganv1.Progress)) *halliganv1.Result {
	id, sha := req.PlanId, req.PlanSha256
	result := &halliganv1.Result{Action: id, Result: resultFailed, Via: "etcd", TimingsMs: map[string]float64{}}
	refuse := func(err error) *halliganv1.Result {
		result.Error = api.ErrorOf(err)
		switch fault.CodeOf(err) {
		case fault.Stale:
			result.Result = resultStale
		case fault.Refused:
			result.Result = resultRefused
		case fault.AwaitingApproval:
			result.Result = resultAwaiting
		}
		return result
	}
	var access journal.Access
	ready := func(p *prepared, changed tally) (func(tally) (bool, error), error) {
		policy := e.policy()
		if policy.Version != p.plan.PolicyVersion {
			return nil, fault.New(fault.Stale, "plan again", "policy %d is in force since plan %s was made under policy %d", policy.Version, id, p.plan.PolicyVersion)
		}
		// Everything is decided again: the credential may be another one now, and
		// the bundle may have grown stale.
		request := p.request
		request.Stale = !e.fresh()
		decided := func(changed tally) (verdict, error) {
			v, err := decide(policy, who, request, p.steps, e.before(p.plan, changed))
			if err == nil && v.approvals > int(p.plan.ApprovalsNeeded) {
				err = fault.New(fault.Stale, "plan again, for a plan that can be approved", "plan %s needs approvals by now: %s", id, v.why)
			}
			return v, err
		}
		v, err := decided(changed)
		if err != nil {
			return nil, err
		}
		if access, err = e.leave(policy, who, v, p.plan, req); err != nil {
			return nil, err
		}
		most := policy.Caps().ObjectsPerHour
		if access.Alone {
			most = policy.AloneCaps().ObjectsPerHour
		}
		cluster, err := e.clusterID(ctx)
		if err != nil {
			return nil, err
		}
		if cluster != p.plan.Cluster {
			return nil, fault.New(fault.Stale, "plan again", "etcd is not the cluster that the plan was made for")
		}
		last := func(now tally) (bool, error) {
			if now.unapproved > changed.unapproved {
				v, err := decided(now)
				if err == nil && access.Alone && v.approvals > 0 && !v.alone {
					err = fault.New(fault.Stale, "plan again", "plan %s needs approvals by now: %s", id, v.why)
				}
				if err != nil {
					return false, err
				}
			}
			return len(access.ApprovedBy) > 0, e.hourly(who.Person, p.plan, now, most)
		}
		return last, e.journal.CheckFor(access, 0)
	}
	p, reserved, err := e.take(who, id, sha, ready)
	if err != nil {
		if p != nil {
			result.Plan = proto.CloneOf(p.plan)
		}
		return refuse(err)
	}
	defer e.release(who.Person, reserved)
	result.Plan = proto.CloneOf(p.plan)
	r, err := rowOf(p.plan.Action)
	if err != nil {
		return refuse(err)
	}
	if len(p.steps) == 0 {
		result.Result = resultApplied
		return result
	}
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	e.mu.Lock()
	e.running[id] = running{action: p.plan.Action, actor: who.Person, stop: stop}
	if !e.closed {
		e.told[id] = true
	}
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.running, id)
	}()

	run := &application{engine: e, plan: p, access: access, result: result, outcomes: make([]outcome, len(p.steps)), progress: progress, began: time.Now(), phases: map[string]time.Duration{}}
	if len(access.ApprovedBy) > 0 {
		run.again = func() error { _, err := e.leave(e.policy(), who, verdict{}, p.plan, req); return err }
	}
	intent, err := e.intent(who, access, p.plan)
	if err != nil {
		return refuse(err)
	}
	lap, over := run.lap(), func(string) {}
	if len(p.steps) <= smallAction { // beside the intent: reading is no effect
		first := make(chan reading, 1)
		go func() { first <- e.readNow(ctx, p.steps[0].key) }()
		run.first = first
	}
	e.steps("intent")
	receipt, audited := audit.Do(ctx, owing{e.audit, e}, intent, func(_ context.Context, permit audit.Permit) []audit.Event {
		lap("intent")
		if access.Alone {
			e.tellAlone(who, p.plan) // before the effect: nobody may be left to tell of it after
		}
		run.permit, run.access.Intent = permit, permit.Intent()
		err = run.all(ctx)
		over = run.lap()
		return outcomes(p.plan, len(intent.Objects), run.outcome(ctx, err), run.resultOf)
	})
	if run.permit == (audit.Permit{}) { // nothing was begun: the plan can be applied once this is mended
		e.keep(p)
		return refuse(audited)
	}
	over("audit")
	if cerr := <-run.closed; cerr != nil {
		// What was done is done and can be settled from etcd; say that the
		// record of its end is missing.
		e.log.Error().Str("action", id).Err(cerr).Msg("outcome of an action could not be recorded")
		if err == nil {
			err = fmt.Errorf("done, but its outcome could not be recorded: %w", cerr)
			result.Error = api.ErrorOf(err)
		}
	}
	e.steps("end")
	if audited != nil {
		e.log.Error().Str("action", id).Err(audited).Msg("outcome of an action could not be put into the evidence log; tried again until it can")
		if err == nil {
			err = fmt.Errorf("done, but its outcome could not be recorded yet: %w", audited)
			result.Error = api.ErrorOf(err)
		}
	}
	for phase, took := range run.phases {
		result.TimingsMs[phase] = ms(took)
	}
	result.TimingsMs["plan"] = ms(p.took)
	result.TimingsMs["total"] = ms(time.Since(run.began))
	line := e.log.Info().Str("action", id).Str("verb", p.plan.Action).Str("actor", who.Person).Str("result", result.Result).
		Str("door", access.Door).Str("source", access.Source).Bool("alone", access.Alone).Int("approvals", len(access.ApprovedBy)).
		Str("intent", receipt.ID).Str("evidence", receipt.Where).
		Int("objects", len(p.steps)).Dur("took", time.Since(run.began))
	if err != nil {
		line = line.Str("problem", neutral.Line(err.Error()))
	}
	line.Msg("action applied")
	return result
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// outcome is what became of one object.
type outcome struct {
	what     string
	revision int64
	err      error
}

// reading is what etcd said of one key.
type reading struct {
	kv    etcd.KV
	found bool
	view  etcd.View
	err   error
}

// application is one plan being applied.
type application struct {
	engine *Engine
	plan   *prepared
	access journal.Access
	// again, where others approved, looks whether their word still holds.
	again    func() error
	result   *halliganv1.Result
	progress func(*halliganv1.Progress)
	began    time.Time
	// permit lets the objects be written.
	permit audit.Permit
	// first is what the first object is, read beside the intent; nil where it is not.
	first <-chan reading
	// closed says that the record is, beside the event of the outcome.
	closed chan error
	// sealing gives the hash of the sealed before-images; nil until they are begun.
	sealing <-chan string

	mu sync.Mutex // guards all below
	// record is made with the first object that may be written; unrecorded
	// says that a note of it was lost.
	record     *journal.Action
	begun      bool
	refuse     error
	unrecorded bool
	outcomes   []outcome
	done       int
	failed     int
	told       time.Time
	phases     map[string]time.Duration
	// stop is the error after which no more objects are tried.
	stop error
}

// all writes every object and settles the result. The error is the first one
// that an object met.
func (a *application) all(ctx context.Context) error {
	steps := a.plan.steps
	if len(steps) <= smallAction {
		for i := range steps {
			a.one(ctx, i)
		}
	} else {
		a.many(ctx)
	}
	return a.finish()
}

// Bounds of a chunk of an action on many objects: its objects are read in one
// round trip and recorded with one fsync.
const (
	chunkObjects = 64
	chunkBytes   = 4 << 20
	chunksAtOnce = 3
)

func (a *application) many(ctx context.Context) {
	pace := a.engine.pace.start()
	var workers sync.WaitGroup
	chunks := make(chan []int)
	for range chunksAtOnce {
		workers.Go(func() {
			for c := range chunks {
				func() {
					defer a.rescue(c...)
					a.chunk(ctx, pace, c)
				}()
			}
		})
	}
	var chunk []int
	size := 0
	for i, s := range a.plan.steps {
		if len(chunk) == chunkObjects || len(chunk) > 0 && size+s.size > chunkBytes {
			chunks <- chunk
			chunk, size = nil, 0
		}
		chunk, size = append(chunk, i), size+s.size
	}
	chunks <- chunk
	close(chunks)
	workers.Wait()
	a.seal()
	verify, cancel := context.WithTimeout(context.WithoutCancel(ctx), verifyTimeout)
	defer cancel()
	a.verifyMany(verify)
}

// verifyTimeout bounds the look at what an action on many objects left. It is
// less than what a door waits for when the agent is told to stop (5 s).
const verifyTimeout = 4 * time.Second

// chunk carries out some steps. Where there is no leader it waits for the next
// one: a long action outlives an election; a short one is quicker typed again.
func (a *application) chunk(ctx context.Context, pace *pacer, chunk []int) {
	for began := time.Now(); len(chunk) > 0; {
		chunk = a.tryChunk(ctx, pace, chunk, func() bool { return time.Since(began) < electionPatience })
		if len(chunk) > 0 {
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
}

// electionPatience is how long an action on many objects waits for a leader; a
// variable for tests.
var electionPatience = 15 * time.Second

// tryChunk returns the steps that should be tried again.
func (a *application) tryChunk(ctx context.Context, pace *pacer, chunk []int, patient func() bool) (again []int) {
	e := a.engine
	var mu sync.Mutex // guards again and lost
	var lost error    // there was no leader: the rest of this try is not sent
	settle := func(i int, out outcome) {
		mu.Lock()
		if fault.Is(out.err, fault.NoQuorum) || out.what == outcomeUnknown {
			lost = fault.New(fault.NoQuorum, "reads work; bring etcd's members back first", "not tried, since etcd lost its leader")
		}
		mu.Unlock()
		if patient() && out.what != outcomeSkipped && fault.Is(out.err, fault.NoQuorum) && ctx.Err() == nil {
			mu.Lock()
			defer mu.Unlock()
			again = append(again, i)
			return
		}
		a.settle(i, out)
	}
	all := func(out outcome) {
		for _, i := range chunk {
			settle(i, out)
		}
	}
	if err := a.stopped(ctx); err != nil {
		all(outcome{what: outcomeSkipped, err: fmt.Errorf("not tried: %w", err)})
		return nil
	}
	e.steps("read")
	keys := make([]string, len(chunk))
	for n, i := range chunk {
		keys[n] = a.plan.steps[i].key
	}
	kvs, view, err := e.etcd.GetMany(ctx, keys)
	if err != nil {
		all(failed(err))
		return again
	}
	type pending struct {
		index int
		write etcd.Write
	}
	var writes []pending
	var images []journal.Image
	for _, i := range chunk {
		s := a.plan.steps[i]
		kv, found := kvs[s.key]
		if s.op == opDelete && !found {
			settle(i, outcome{what: outcomeGone})
			continue
		}
		write, image, out := a.prepare(ctx, i, kv, found, view)
		if out != nil {
			settle(i, *out)
			continue
		}
		writes, images = append(writes, pending{i, write}), append(images, image)
	}
	if len(writes) == 0 {
		return again
	}
	e.steps("record")
	record, err := a.begin()
	if err == nil {
		e.steps("image")
		err = record.Images(images...)
	}
	if err != nil {
		for _, w := range writes {
			settle(w.index, failed(err))
		}
		return again
	}
	e.steps("write")
	var workers sync.WaitGroup
	for _, w := range writes {
		err := a.stopped(ctx)
		if err == nil {
			err = pace.begin(ctx)
		}
		mu.Lock()
		leaderless := lost
		mu.Unlock()
		if err == nil && leaderless != nil {
			pace.end(0)
			settle(w.index, failed(leaderless))
			continue
		}
		if err != nil {
			settle(w.index, outcome{what: outcomeSkipped, err: fmt.Errorf("not tried: %w", err)})
			continue
		}
		workers.Go(func() {
			defer a.rescue(w.index)
			began := time.Now()
			revision, err := func() (int64, error) {
				defer func() { pace.end(time.Since(began)) }()
				return e.etcd.Commit(context.WithoutCancel(ctx), a.permit, w.write)
			}()
			e.steps("written")
			settle(w.index, written(revision, err))
		})
	}
	workers.Wait()
	return again
}

// verifyMany reads back what was written, many keys in one round trip. What was
// deleted costs nothing to read, and what was written since is looked into.
func (a *application) verifyMany(ctx context.Context) {
	defer a.lap()("verify")
	var wrote []int
	for i, out := range a.outcomes {
		if out.what == journal.Applied {
			wrote = append(wrote, i)
		}
	}
	for chunk := range slices.Chunk(wrote, chunkObjects) {
		keys := make([]string, len(chunk))
		for n, i := range chunk {
			keys[n] = a.plan.steps[i].key
		}
		kvs, _, err := a.engine.etcd.GetMany(ctx, keys)
		for _, i := range chunk {
			s, out := a.plan.steps[i], &a.outcomes[i]
			kv, found := kvs[s.key]
			switch {
			case err != nil:
				out.what, out.err = outcomeUnverified, fault.New(fault.Unverified, "look with: halligan get", "written, but reading back failed: %w", err)
			case s.op == opDelete && found:
				out.what, out.err = outcomeUnverified, fault.New(fault.Unverified, "find out who makes it, and stop that first",
					"%s was made again at revision %d", s.key, kv.ModRevision)
			case s.op != opDelete && (!found || kv.ModRevision != out.revision && !a.engine.holds(ctx, s, kv)):
				out.what, out.err = outcomeUnverified, fault.New(fault.Unverified, "find out who changes it, and stop that first",
					"%s does not hold what was written at revision %d", s.key, out.revision)
			}
		}
	}
}

// stopped returns why no more objects are to be tried.
func (a *application) stopped(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.stop != nil {
		return a.stop
	}
	return context.Cause(ctx)
}

// one carries out one step: read again, check, compute, record, write, read
// back.
func (a *application) one(ctx context.Context, i int) {
	if err := a.stopped(ctx); err != nil {
		a.settle(i, outcome{what: outcomeSkipped, err: fmt.Errorf("not tried: %w", err)})
		return
	}
	a.settle(i, a.step(ctx, i))
}

func (a *application) step(ctx context.Context, i int) outcome {
	e, s := a.engine, a.plan.steps[i]
	lap := a.lap()

	// Read again: a linearizable read answers only where there is a leader.
	e.steps("read")
	now := a.read(ctx, i)
	if now.err != nil {
		return failed(now.err)
	}
	if s.op == opDelete && !now.found && len(a.plan.steps) > 1 {
		return outcome{what: outcomeGone}
	}
	lap("read")

	write, image, out := a.prepare(ctx, i, now.kv, now.found, now.view)
	if out != nil {
		return *out
	}
	lap("compute")

	// Intent and before-image are on disk before anything is written.
	e.steps("record")
	record, err := a.begin()
	if err != nil {
		return failed(err)
	}
	e.steps("image")
	if err := record.Images(image); err != nil {
		return failed(err)
	}
	lap("record")
	if i == len(a.plan.steps)-1 {
		a.seal()
	}

	e.steps("write")
	// What was begun is brought to its end; the client bounds each call itself.
	ctx = context.WithoutCancel(ctx)
	revision, err := e.etcd.Commit(ctx, a.permit, write)
	if err != nil {
		return written(0, err)
	}
	lap("write")
	e.steps("written")
	if err := a.verify(ctx, s, write, revision); err != nil {
		return outcome{what: outcomeUnverified, revision: revision, err: err}
	}
	lap("verify")
	return outcome{what: journal.Applied, revision: revision}
}

// read returns what the object of a step is now.
func (a *application) read(ctx context.Context, i int) reading {
	if i == 0 && a.first != nil {
		return <-a.first
	}
	return a.engine.readNow(ctx, a.plan.steps[i].key)
}

func (e *Engine) readNow(ctx context.Context, key string) (r reading) {
	r.kv, r.found, r.view, r.err = e.etcd.Get(ctx, key)
	return r
}

// prepare demands that the key is what the plan saw, computes what is to be
// stored and proves that it reads back. An outcome ends the step.
func (a *application) prepare(ctx context.Context, i int, kv etcd.KV, found bool, view etcd.View) (etcd.Write, journal.Image, *outcome) {
	s := a.plan.steps[i]
	end := func(out outcome) (etcd.Write, journal.Image, *outcome) { return etcd.Write{}, journal.Image{}, &out }
	if view.Stale != "" {
		return end(failed(fault.New(fault.NoQuorum, "reads work; bring etcd's members back first", "nothing can be changed: %s", view.Stale)))
	}
	if err := s.fits(kv, found); err != nil {
		return end(outcome{what: outcomeStale, err: err})
	}
	write, image, err := a.compute(ctx, s, kv, view.Revision)
	if err != nil {
		if fault.Is(err, fault.Stale) {
			return end(outcome{what: outcomeStale, err: err})
		}
		return end(failed(err))
	}
	image.Index = i
	return write, image, nil
}

// written is the outcome of a write.
func written(revision int64, err error) outcome {
	switch fault.CodeOf(err) {
	case "":
		return outcome{what: journal.Applied, revision: revision}
	case fault.Stale:
		return outcome{what: outcomeStale, err: err}
	case fault.Unknown:
		return outcome{what: outcomeUnknown, err: err}
	}
	return failed(err)
}

func failed(err error) outcome { return outcome{what: outcomeFailed, err: err} }

// lap measures the phases of a step.
func (a *application) lap() func(string) {
	last := time.Now()
	return func(phase string) {
		now := time.Now()
		a.mu.Lock()
		a.phases[phase] += now.Sub(last)
		a.mu.Unlock()
		last = now
	}
}

// fits demands that the key is what the plan saw.
func (s *step) fits(kv etcd.KV, found bool) error {
	what := s.kind.Resource() + "/" + s.name
	switch {
	case s.op == opCreate && found:
		return fault.New(fault.Stale, "plan again", "%s was made again since the plan", what)
	case s.op != opCreate && !found:
		return fault.New(fault.Stale, "nothing is left to change", "%s was deleted since the plan", what)
	case kv.ModRevision != s.revision:
		return fault.New(fault.Stale, "plan again; where its status changes all the time, --yes leaves no time for that", "%s was changed since the plan (revision %d, now %d)",
			what, s.revision, kv.ModRevision)
	}
	return nil
}

// compute makes the write and the before-image of a step.
func (a *application) compute(ctx context.Context, s *step, kv etcd.KV, now int64) (etcd.Write, journal.Image, error) {
	write := etcd.Write{Key: s.key, ModRevision: s.revision, Since: now}
	image := journal.Image{Key: s.key, UID: s.uid, Revision: s.revision, Since: now, Lease: kv.Lease, Value: kv.Value}
	if s.op == opCreate {
		// With an approval, that somebody made it again meanwhile is no longer
		// what the leave rests on.
		if s.since > 0 && len(a.access.ApprovedBy) == 0 {
			quiet, err := a.engine.quietSince(ctx, a.plan.plan.Cluster, s.key, s.since)
			switch {
			case err != nil || quiet == etcd.Untouched:
			case quiet == etcd.Touched:
				err = fault.New(fault.Stale, "plan again", "%s/%s was made again and deleted since the plan", s.kind.Resource(), s.name)
			default:
				err = fault.New(fault.Stale, "plan again", "etcd's history no longer tells whether %s/%s was made again and deleted", s.kind.Resource(), s.name)
			}
			if err != nil {
				return write, image, err
			}
		}
		value, err := a.stored(ctx, s)
		if err != nil {
			return write, image, err
		}
		write.Value, write.Lease = value, s.lease
		image.AfterSHA256 = sum256(value)
		return write, image, nil
	}
	if s.blind {
		image.Delete = true
		return write, image, nil
	}
	e := a.engine
	plain, err := e.encryption.Open(ctx, s.kind, s.key, kv.Value)
	if err != nil {
		return write, image, err
	}
	obj, err := storage.Decode(plain)
	if err != nil {
		return write, image, err
	}
	if err := obj.Check(s.kind, s.namespace, s.name); err != nil {
		return write, image, err
	}
	if string(obj.Meta.UID) != s.uid {
		return write, image, fault.New(fault.Stale, "plan again", "%s/%s is another object than the planned one (UID)", s.kind.Resource(), s.name)
	}
	if s.op == opDelete {
		image.Delete = true
		return write, image, nil
	}
	var changes []storage.Change
	if s.revert != nil {
		plain, changes, err = s.kind.Revert(obj.Plain(), s.revert)
	} else {
		plain, changes, err = s.kind.Apply(obj.Plain(), s.edits...)
	}
	if err != nil {
		return write, image, err
	}
	if !slices.EqualFunc(changes, s.changes, equalChange) {
		return write, image, fault.New(fault.Stale, "plan again", "the change of %s/%s would not be the planned one", s.kind.Resource(), s.name)
	}
	value, err := e.seal(ctx, s.kind, s.key, plain)
	if err != nil {
		return write, image, err
	}
	write.Value, write.KeepLease = value, kv.Lease != 0
	image.AfterSHA256, image.Changes = sum256(value), changes
	return write, image, nil
}

func equalChange(a, b storage.Change) bool {
	return a.Path == b.Path && bytes.Equal(a.Before, b.Before) && bytes.Equal(a.After, b.After)
}

// seal encrypts as the cluster's configuration says, and decrypts again to be
// sure that the API server will.
func (e *Engine) seal(ctx context.Context, kind *storage.Kind, key string, plain []byte) ([]byte, error) {
	value, err := e.encryption.Seal(ctx, kind, key, plain)
	if err != nil {
		return nil, err
	}
	again, err := e.encryption.Open(ctx, kind, key, value)
	if err != nil {
		return nil, fmt.Errorf("checking the encrypted value: %w", err)
	}
	if !bytes.Equal(again, plain) {
		return nil, fault.New(fault.Encrypted, "report this", "the encrypted value of %s does not decrypt to itself", key)
	}
	return value, nil
}

// stored returns the value that puts a deleted object back, encrypted anew
// since the key that it was encrypted with may be gone tomorrow.
func (a *application) stored(ctx context.Context, s *step) ([]byte, error) {
	e := a.engine
	raw, err := s.image.value()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(sum256(raw), s.image.ref.ValueSHA256) {
		return nil, fault.New(fault.Failed, "restore the object from a backup", "the before-image of %s does not have its hash", s.key)
	}
	plain, err := e.encryption.Open(ctx, s.kind, s.key, raw)
	if err != nil {
		return nil, err
	}
	obj, err := storage.Decode(plain)
	if err != nil {
		return nil, err
	}
	if err := obj.Check(s.kind, s.namespace, s.name); err != nil {
		return nil, err
	}
	return e.seal(ctx, s.kind, s.key, plain)
}

// begin makes the record, once, before the first object that may be written, and
// notes what became of objects before.
func (a *application) begin() (*journal.Action, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.begun {
		return a.record, a.refuse
	}
	a.begun = true
	var bytes int64
	for _, s := range a.plan.steps {
		bytes += int64(s.size)
	}
	if a.again != nil {
		if a.refuse = a.again(); a.refuse != nil {
			return nil, a.refuse
		}
	}
	if a.record, a.refuse = a.engine.journal.Begin(a.access, a.plan.plan, bytes); a.refuse != nil {
		return nil, a.refuse
	}
	for i, out := range a.outcomes {
		if out.what != "" {
			a.note(i, out)
		}
	}
	return a.record, nil
}

// note records what became of an object; a.mu is held. An unknown outcome is not
// noted: without a note the engine settles it later.
func (a *application) note(i int, out outcome) {
	if a.record == nil || out.what == outcomeUnknown || out.what == outcomeSkipped {
		return
	}
	n := journal.Note{Index: i, Revision: out.revision, Outcome: out.what}
	if n.Outcome == outcomeUnverified {
		n.Outcome = journal.Applied // it was written; undo must know
	}
	if out.err != nil {
		n.Error = short(fault.Of(out.err).Message, maxShown)
	}
	if err := a.record.Wrote(n); err != nil {
		a.unrecorded = true
		a.engine.log.Error().Str("action", a.plan.plan.Id).Err(err).Msg("outcome of an object could not be recorded")
	}
}

// verify reads the key back. Somebody may have written it since, a controller
// its status for one: then the planned fields have to hold all the same.
func (a *application) verify(ctx context.Context, s *step, w etcd.Write, revision int64) error {
	kv, found, view, err := a.engine.etcd.Get(ctx, s.key)
	switch {
	case err != nil:
		return fault.New(fault.Unverified, "look with: halligan get", "written at revision %d, but reading it back failed: %w", revision, err)
	case view.Stale != "":
		return fault.New(fault.Unverified, "look again when etcd has a quorum", "written at revision %d, but not read back: %s", revision, view.Stale)
	case s.op == opDelete && !found:
		return nil
	case s.op == opDelete:
		return fault.New(fault.Unverified, "find out who makes it, and stop that first", "%s was made again at revision %d", s.key, kv.ModRevision)
	case found && kv.ModRevision == revision:
		if bytes.Equal(kv.Value, w.Value) {
			return nil
		}
	case found && a.engine.holds(ctx, s, kv):
		return nil
	}
	return fault.New(fault.Unverified, "find out who writes it, and stop that first", "%s does not hold what was written at revision %d", s.key, revision)
}

// holds reports whether an object that somebody wrote after us still is what the
// step made of it: the same object, with the changed fields as they were left.
func (e *Engine) holds(ctx context.Context, s *step, kv etcd.KV) bool {
	o, err := (&planner{engine: e}).open(ctx, s.kind, s.namespace, s.name, kv)
	if err != nil || string(o.Meta.UID) != s.uid {
		return false
	}
	if s.op == opCreate {
		return true
	}
	ok, err := s.kind.Holds(o.Plain(), s.changes)
	return ok && err == nil
}

// settle notes what became of one object.
func (a *application) settle(i int, out outcome) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.note(i, out)
	a.outcomes[i] = out
	a.done++
	if out.what != journal.Applied && out.what != outcomeGone {
		a.failed++
	}
	// Errors that will meet every other object too end the action.
	switch fault.CodeOf(out.err) {
	case fault.AuditUnavailable, fault.NoQuorum, fault.NoSpace, fault.Unreachable, fault.Unauthenticated:
		if a.stop == nil && out.what != outcomeSkipped {
			a.stop = out.err
		}
	}
	if now := time.Now(); a.progress != nil && (now.Sub(a.told) > 200*time.Millisecond || a.done == len(a.outcomes)) {
		a.told = now
		a.progress(&halliganv1.Progress{Done: int64(a.done), Total: int64(len(a.outcomes)), Failed: int64(a.failed),
			PerSecond: float64(a.done) / max(now.Sub(a.began).Seconds(), 1e-6)})
	}
}

// rescue is deferred in goroutines that no door's recover reaches. A panic costs
// the objects in hand: what became of each is not known, and no more are tried.
func (a *application) rescue(indexes ...int) {
	r := recover()
	if r == nil {
		return
	}
	a.engine.log.Error().Str("action", a.plan.plan.Id).Str("panic", neutral.LineMax(fmt.Sprint(r), 512)).Bytes("stack", debug.Stack()).Msg("applying panicked")
	err := fault.New(fault.Unknown, "report it with the agent's log of this moment", "applying met a bug in the agent")
	for _, i := range indexes {
		a.mu.Lock()
		settled := a.outcomes[i].what != ""
		if a.stop == nil {
			a.stop = err
		}
		a.mu.Unlock()
		if !settled {
			a.settle(i, outcome{what: outcomeUnknown, err: err})
		}
	}
}

// finish sums the outcomes up and closes the record.
func (a *application) finish() error {
	count := map[string]int{}
	var first error
	touched := false
	for i, out := range a.outcomes {
		count[out.what]++
		if out.err != nil && first == nil && out.what != outcomeSkipped {
			first = out.err
		}
		touched = touched || out.what == journal.Applied || out.what == outcomeUnknown || out.what == outcomeUnverified
		s := a.plan.steps[i]
		o := &halliganv1.ObjectResult{Key: short(s.key, maxShown), Uid: s.uid, RevisionBefore: s.revision, RevisionAfter: out.revision, Outcome: out.what}
		if out.err != nil {
			o.Error = short(fault.Of(out.err).Message, maxShown)
		}
		a.result.Objects = append(a.result.Objects, o)
	}
	total, good := len(a.outcomes), count[journal.Applied]+count[outcomeGone]
	switch {
	case good == total:
		a.result.Result, first = resultApplied, nil
	case count[outcomeUnknown] > 0:
		a.result.Result = resultUnknown
	case good+count[outcomeUnverified] == total:
		a.result.Result = resultUnverified
	case count[journal.Applied]+count[outcomeUnverified] > 0:
		a.result.Result = resultPartial
	case count[outcomeStale] > 0 && count[outcomeFailed] == 0:
		a.result.Result = resultStale
	case fault.Is(a.refuse, fault.Refused) && !touched:
		a.result.Result = resultRefused
	default:
		a.result.Result = resultFailed
	}
	if first == nil && good != total {
		first = fault.New(fault.Cancelled, "what was changed can be undone, the rest planned again", "stopped before all was done")
	}
	if first != nil && total > 1 {
		f := fault.Of(first)
		first = fault.New(f.Code, f.Next, "%d of %d objects changed: %w", count[journal.Applied]+count[outcomeUnverified], total, errors.New(f.Message))
	}
	a.engine.steps("outcome")
	if touched {
		a.seal()
	}
	a.closed = make(chan error, 1)
	go func() { a.closed <- a.close(touched, first) }()
	if first != nil {
		a.result.Error = api.ErrorOf(first)
	}
	return first
}

// resultOf is what the log says of the outcome of an object.
func (a *application) resultOf(i int) (what string, revision int64, problem string) {
	out := a.result.Objects[i]
	return out.Outcome, out.RevisionAfter, out.Error
}

// outcome is the event of what became of the action.
func (a *application) outcome(ctx context.Context, err error) audit.Event {
	out := audit.Event{Outcome: a.result.Result, Images: a.images()}
	if err != nil {
		f := fault.Of(err)
		out.ErrorCode, out.Error = string(f.Code), f.Message
	}
	if cause := fault.Of(context.Cause(ctx)); cause != nil && fault.Is(cause, fault.Cancelled) {
		out.Text = cause.Message
	}
	return out
}

// seal begins, once, to keep the action's before-images elsewhere, beside the
// effect; all of them are durable.
func (a *application) seal() {
	e, id := a.engine, a.plan.plan.Id
	if e.sealed == nil || a.sealing != nil || a.record == nil {
		return
	}
	record, err := a.record.Durable()
	if err != nil {
		e.log.Error().Str("action", id).Err(err).Msg("before-images could not be kept elsewhere")
		return
	}
	done := make(chan string, 1)
	a.sealing = done
	go func() {
		defer close(done)
		defer record.Close()
		defer func() {
			if r := recover(); r != nil {
				e.log.Error().Str("action", id).Str("panic", neutral.LineMax(fmt.Sprint(r), 512)).Bytes("stack", debug.Stack()).Msg("sealing before-images panicked")
			}
		}()
		sum, err := e.sealed(id, record)
		if err != nil {
			e.log.Error().Str("action", id).Err(err).Msg("before-images could not be kept elsewhere")
			return
		}
		done <- sum
	}()
}

// images waits for the sealed before-images and returns their hash, "" where there
// are none.
func (a *application) images() string {
	if a.sealing == nil {
		return ""
	}
	select {
	case sum := <-a.sealing:
		return sum
	case <-time.After(sealPatience):
		return ""
	}
}

// close ends the record. One whose action touched nothing is removed, so that
// the history shows deeds; one with an unknown outcome, or whose notes are not
// whole, stays unfinished, so that the engine settles it later.
func (a *application) close(touched bool, first error) error {
	defer a.lap()("outcome")
	switch {
	case a.record == nil:
		return nil
	case !touched && len(a.access.ApprovedBy) == 0 && !a.access.Alone:
		return a.record.Abandon() // else it stays: approvals are used up
	case a.result.Result == resultUnknown || a.unrecorded:
		a.record.Release()
		return nil
	}
	problem := ""
	if first != nil {
		problem = fault.Of(first).Message
	}
	return a.record.Finish(a.result.Result, problem)
}
