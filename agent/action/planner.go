package action

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/journal"
	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
)

// operation is what a step does to its key.
type operation string

const (
	opUpdate operation = "update"
	opDelete operation = "delete"
	opCreate operation = "create"
)

// step is one compare-and-swap of a plan.
type step struct {
	kind                 *storage.Kind
	namespace, name, key string
	uid                  string
	op                   operation
	// revision to compare with; 0: must not exist.
	revision int64
	lease    int64
	// blind: the value cannot be read, so that only its revision says which
	// object it is. Such an object can be deleted, nothing else.
	blind bool
	// size of the stored value in bytes, for the room that the record needs.
	size int
	// edits or revert say how an update is computed from the value.
	edits  []storage.Edit
	revert []storage.Change
	// changes are what the computation gave when it was planned.
	changes []storage.Change
	// image is what a creation stores, and since the revision after which nothing
	// may have happened to the key until then, 0 for no such.
	image *imageOf
	since int64
}

type imageOf struct {
	from   records
	action string
	ref    journal.ImageRef
}

// value returns the stored bytes, checked against their hash.
func (i *imageOf) value() ([]byte, error) { return i.from.Value(i.action, i.ref) }

// object is one stored object with its place.
type object struct {
	*storage.Object
	kind                 *storage.Kind
	key, namespace, name string
	revision, lease      int64
	size                 int
}

func (o *object) title() string {
	t := o.kind.Resource() + "/" + o.name
	if o.namespace != "" {
		t += " in namespace " + o.namespace
	}
	return t
}

func (o *object) subjects() ([]rbacv1.Subject, error) {
	f, ok := o.kind.Field(storage.Subjects, o.APIVersion)
	if !ok {
		return nil, fmt.Errorf("%s has no subjects", o.kind.Resource())
	}
	return o.Subjects(f)
}

// planner collects what a plan would do.
type planner struct {
	engine *Engine
	who    trust.Identity
	// policy is one and the same for the whole plan, and request is what it is
	// asked about, without an object.
	policy  *trust.Policy
	request trust.Request
	// mu guards plan's warnings and revision, and stale, while fights looks
	// several ways at once.
	mu    sync.Mutex
	plan  *halliganv1.Plan
	steps []*step
	// around is being read; the plan is not made before it is.
	around *surroundings
	// warned holds what was warned of; unsaid counts what was too much.
	warned map[string]bool
	unsaid int
	// stale is set when something was read without a quorum: why.
	stale string
	// evidence came with the request; lost is the other node's action that an undo
	// takes from it. An undo reads the images that it puts back from there.
	evidence *halliganv1.SealedEvidence
	lost     *taken
	from     records
	// gone holds which namespaces an undo found gone.
	gone map[string]bool
	// expired counts objects whose lease ran out.
	expired int
	// given is how many bytes are shown of what an undo puts back.
	given int
}

func (p *planner) summary(format string, args ...any) { p.plan.Summary = fmt.Sprintf(format, args...) }
func (p *planner) warn(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w := short(fmt.Sprintf(format, args...), 2*maxShown)
	switch {
	case p.warned[w]:
	case len(p.plan.Warnings) < maxWarnings:
		if p.warned == nil {
			p.warned = map[string]bool{}
		}
		p.warned[w] = true
		p.plan.Warnings = append(p.plan.Warnings, w)
	default:
		p.unsaid++
	}
}

// Bounds of what a plan shows, so that no object can make it too large to be
// sent: names of some kinds have no limit of their own.
const (
	maxShown    = 512
	maxWarnings = 200
)

// short cuts a text that is longer than most bytes, leaving what tells it from
// others.
func short(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return fmt.Sprintf("%s... (%d bytes, sha256 %x)", strings.ToValidUTF8(s[:most-64], ""), len(s), sha256.Sum256([]byte(s)))
}
func (p *planner) needs(what ...string)  { p.plan.Needs = append(p.plan.Needs, what...) }
func (p *planner) bypass(what ...string) { p.plan.Bypassed = append(p.plan.Bypassed, what...) }

// see notes from which view of etcd the plan is made.
func (p *planner) see(v etcd.View) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.plan.Revision = max(p.plan.Revision, v.Revision)
	if v.Stale != "" {
		p.stale = v.Stale
	}
}

// target resolves KIND or KIND/NAME.
func (p *planner) target(ctx context.Context, text string) (*storage.Kind, string, error) {
	kindName, _, _ := strings.Cut(text, "/")
	if _, err := p.engine.resolve(ctx, kindName); err != nil {
		return nil, "", err
	}
	// With custom kinds loaded where they are needed, the catalogue judges the
	// whole of it, so that every door refuses the same names.
	return p.engine.parseTarget(text)
}

// allow asks the policy about an object that was named, before it is looked for,
// so that a protected name gets the reason and not "no such object".
func (p *planner) allow(kind *storage.Kind, namespace, name string) error {
	return p.policy.Decide(p.who, on(p.request, kind, namespace, name))
}

// load reads one object, decrypted and checked against its key.
func (p *planner) load(ctx context.Context, kind *storage.Kind, namespace, name string) (*object, error) {
	key, err := kind.Key(p.engine.prefix, namespace, name)
	if err != nil {
		return nil, err
	}
	kv, found, view, err := p.engine.etcd.Get(ctx, key)
	if err != nil {
		return nil, err
	}
	p.see(view)
	if !found {
		next := "see: halligan get " + kind.Plural
		if kind.Namespaced {
			next += " -n " + namespace
			if others := p.elsewhere(ctx, kind, name); len(others) > 0 {
				next = "there is one in namespace " + strings.Join(others, ", ")
			}
		}
		where := ""
		if namespace != "" {
			where = " in namespace " + namespace
		}
		return nil, fault.New(fault.NotFound, next, "no %s/%s%s", kind.Resource(), name, where)
	}
	return p.open(ctx, kind, namespace, name, kv)
}

// elsewhere looks for objects of that name in other namespaces, briefly.
func (p *planner) elsewhere(ctx context.Context, kind *storage.Kind, name string) []string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	namespaces, err := p.engine.resolve(ctx, "namespaces")
	if err != nil {
		return nil
	}
	var keys, found []string
	root := namespaces.Range(p.engine.prefix, "")
	_, _ = p.engine.etcd.Walk(ctx, root, func(kv etcd.KV) error {
		if key, err := kind.Key(p.engine.prefix, strings.TrimPrefix(kv.Key, root), name); err == nil {
			keys = append(keys, key)
		}
		return nil
	})
	for chunk := range slices.Chunk(keys, etcd.MaxMany) {
		kvs, _, err := p.engine.etcd.GetMany(ctx, chunk)
		if err != nil {
			return found
		}
		for _, key := range chunk {
			if _, ok := kvs[key]; ok && len(found) < 3 {
				_, ns, _, _ := p.engine.byKey(key)
				found = append(found, ns)
			}
		}
	}
	return found
}

func (p *planner) open(ctx context.Context, kind *storage.Kind, namespace, name string, kv etcd.KV) (*object, error) {
	o := &object{kind: kind, key: kv.Key, namespace: namespace, name: name, revision: kv.ModRevision, lease: kv.Lease, size: len(kv.Value)}
	plain, err := p.engine.encryption.Open(ctx, kind, kv.Key, kv.Value)
	if err != nil {
		return o, err
	}
	if o.Object, err = storage.Decode(plain); err != nil {
		return o, fmt.Errorf("%s: %w", o.title(), err)
	}
	return o, o.Check(kind, namespace, name)
}

// walk visits every object of a kind; fn gets the place of an object that could
// not be opened with the problem.
func (p *planner) walk(ctx context.Context, kind *storage.Kind, namespace string, fn func(*object, error) error) (etcd.View, error) {
	root := kind.Range(p.engine.prefix, "")
	view, err := p.engine.etcd.Walk(ctx, kind.Range(p.engine.prefix, namespace), func(kv etcd.KV) error {
		ns, name := "", strings.TrimPrefix(kv.Key, root)
		if kind.Namespaced {
			ns, name, _ = strings.Cut(name, "/")
		}
		if strings.Contains(name, "/") || name == "" {
			return nil // a longer key below: another resource, such as services/specs
		}
		obj, err := p.open(ctx, kind, ns, name, kv)
		return fn(obj, err)
	})
	p.see(view)
	return view, err
}

// namespaceExists is asked where a selection found nothing: a mistyped namespace
// must not look like an empty one.
func (p *planner) namespaceExists(ctx context.Context, namespace string) error {
	gone, err := p.namespaceGone(ctx, namespace)
	if err == nil && gone {
		err = fault.New(fault.NotFound, "see: halligan get namespaces", "namespace %s does not exist", namespace)
	}
	return err
}

// scope demands that a selection of many says where.
func scope(kind *storage.Kind, namespace string, all bool) error {
	switch {
	case kind.Namespaced && namespace == "" && !all:
		return fault.New(fault.Usage, "add -n NAMESPACE or -A", "%s live in namespaces", kind.Resource())
	case !kind.Namespaced && namespace != "":
		return fault.New(fault.Usage, "leave -n out", "%s are not in namespaces", kind.Resource())
	case namespace != "" && all:
		return fault.New(fault.Usage, "give one of them", "-n and -A exclude each other")
	case namespace != "" && !validNamespace(namespace):
		return fault.New(fault.Usage, "give a namespace's name", "namespace %.100q cannot exist", namespace)
	}
	return nil
}

func validNamespace(name string) bool { return len(validation.IsDNS1123Label(name)) == 0 }

// kindOfKey is the way back from a key.
func (p *planner) kindOfKey(ctx context.Context, key string) (*storage.Kind, string, string, error) {
	k, ns, name, err := p.engine.byKey(key)
	if err != nil {
		if lerr := p.engine.loadCRDs(ctx); lerr != nil {
			return nil, "", "", lerr
		}
		k, ns, name, err = p.engine.byKey(key)
	}
	return k, ns, name, err
}

// update plans edits of one object; none that change something plan nothing.
func (p *planner) update(o *object, edits []storage.Edit) error {
	_, changes, err := o.kind.Apply(o.Plain(), edits...)
	if err != nil || len(changes) == 0 {
		return err
	}
	p.addUpdate(o, &step{edits: edits, changes: changes})
	return nil
}

// revert plans to take changes back.
func (p *planner) revert(o *object, was []storage.Change) error {
	_, changes, err := o.kind.Revert(o.Plain(), was)
	if err != nil || len(changes) == 0 {
		return err
	}
	p.addUpdate(o, &step{revert: was, changes: changes})
	return nil
}

func (p *planner) addUpdate(o *object, s *step) {
	s.kind, s.namespace, s.name, s.key, s.uid = o.kind, o.namespace, o.name, o.key, string(o.Meta.UID)
	s.op, s.revision, s.lease, s.size = opUpdate, o.revision, o.lease, o.size
	var fields []*halliganv1.FieldChange
	for _, c := range s.changes {
		fields = append(fields, &halliganv1.FieldChange{Path: c.Path, Before: string(c.Before), After: string(c.After)})
	}
	p.add(s, fields)
}

// removeBlind plans the deletion of an object whose value cannot be read, which
// is what makes every LIST of its kind fail.
func (p *planner) removeBlind(o *object, problem error) {
	s := &step{kind: o.kind, namespace: o.namespace, name: o.name, key: o.key, op: opDelete, revision: o.revision, size: o.size, blind: true}
	planned := p.add(s, nil)
	planned.Warnings = append(planned.Warnings, "its value cannot be read ("+fault.Of(problem).Message+"): only its revision says which object it is, "+
		"and undo will not put it back; the bytes stay in the record")
}

// remove plans the deletion of one object.
func (p *planner) remove(o *object) {
	s := &step{kind: o.kind, namespace: o.namespace, name: o.name, key: o.key, uid: string(o.Meta.UID), op: opDelete, revision: o.revision, size: o.size}
	planned := p.add(s, nil)
	warn := func(format string, args ...any) {
		planned.Warnings = append(planned.Warnings, short(fmt.Sprintf(format, args...), maxShown))
	}
	if len(o.Meta.Finalizers) > 0 {
		warn("finalizers are bypassed: %s", strings.Join(o.Meta.Finalizers, ", "))
	}
	if o.kind.Forbids {
		warn("what it refuses or limits is allowed once it is gone")
	}
	if owner := controllerOf(o); owner != "" {
		warn("its controller %s may make another", owner)
	}
	if _, mirror := o.Meta.Annotations["kubernetes.io/config.mirror"]; mirror {
		warn("it mirrors a static pod, which goes on running: its manifest lies on the node")
	}
	if o.kind.Group == "" && o.kind.Kind == "Service" {
		warn("its cluster IP and node ports stay taken until the API server's repair loop frees them (3 min)")
	}
}

// add appends a step and what of it is shown.
func (p *planner) add(s *step, changes []*halliganv1.FieldChange) *halliganv1.PlannedObject {
	p.steps = append(p.steps, s)
	for _, c := range changes {
		c.Path, c.Before, c.After = short(c.Path, maxShown), short(c.Before, 2*maxShown), short(c.After, 2*maxShown)
	}
	o := &halliganv1.PlannedObject{Key: short(s.key, maxShown), Resource: s.kind.Resource(), Namespace: s.namespace, Name: short(s.name, maxShown), Uid: s.uid,
		Revision: s.revision, Operation: string(s.op), Changes: changes}
	p.plan.Objects = append(p.plan.Objects, o)
	return o
}

func controllerOf(o *object) string {
	for _, r := range o.Meta.OwnerReferences {
		if r.Controller != nil && *r.Controller {
			return r.Kind + "/" + r.Name
		}
	}
	return ""
}

// catalogue is the kinds that the engine knows: the native ones, and those of
// the cluster's CustomResourceDefinitions, read from etcd when they are needed.
type catalogue struct {
	mu sync.Mutex // guards all below
	*storage.Catalogue
	loaded time.Time
}

// crdAge is how old the list of custom kinds may be when a name is not found in
// it.
const crdAge = 5 * time.Second

// resolve finds a kind by any of its names. One whose objects are not in this
// etcd is an error, since "none found" would be a lie.
func (e *Engine) resolve(ctx context.Context, name string) (*storage.Kind, error) {
	k, err := e.lookup(ctx, name)
	if err != nil {
		return nil, err
	}
	return k, e.here(k)
}

// errElsewhere is the cause of resolve's error for a kind in another etcd.
var errElsewhere = errors.New("in another etcd")

// here returns an error for a kind whose objects live in another etcd. A
// resource counts before all of its group, as for the API server
// (apiserver/pkg/server/storage/storage_factory.go).
func (e *Engine) here(k *storage.Kind) error {
	gr := k.StoredAs()
	servers, other := e.elsewhere[gr.String()]
	if !other {
		servers, other = e.elsewhere[schema.GroupResource{Group: gr.Group, Resource: "*"}.String()]
	}
	if !other {
		return nil
	}
	where := ""
	if len(servers) > 0 {
		where = " (" + strings.Join(servers, ", ") + ")"
	}
	return &fault.Error{Code: fault.Failed, Message: k.Resource() + " live in another etcd" + where + ", which this agent does not reach",
		Next: "use the API server, or an agent that is configured for that etcd", Cause: errElsewhere}
}

// unseen makes a warning of what a plan would only have looked at, where it is
// in another etcd.
func (p *planner) unseen(err error) error {
	if !errors.Is(err, errElsewhere) {
		return err
	}
	p.warn("%s: whether that matters here is not known", fault.Of(err).Message)
	return nil
}

func (e *Engine) lookup(ctx context.Context, name string) (*storage.Kind, error) {
	e.kinds.mu.Lock()
	k, err := e.kinds.Resolve(name)
	fresh := time.Since(e.kinds.loaded) < crdAge
	e.kinds.mu.Unlock()
	if err == nil && !k.Custom || err != nil && fresh {
		return k, err
	}
	if fresh {
		return k, nil
	}
	if lerr := e.loadCRDs(ctx); lerr != nil {
		return nil, fmt.Errorf("reading the cluster's custom kinds: %w", lerr)
	}
	e.kinds.mu.Lock()
	defer e.kinds.mu.Unlock()
	return e.kinds.Resolve(name)
}

func (e *Engine) parseTarget(text string) (*storage.Kind, string, error) {
	e.kinds.mu.Lock()
	defer e.kinds.mu.Unlock()
	return e.kinds.ParseTarget(text)
}

func (e *Engine) byKey(key string) (*storage.Kind, string, string, error) {
	e.kinds.mu.Lock()
	defer e.kinds.mu.Unlock()
	return e.kinds.ByKey(e.prefix, key)
}

// loadCRDs reads the custom kinds anew. One that cannot be read is left out.
func (e *Engine) loadCRDs(ctx context.Context) error {
	fresh := storage.NewCatalogue()
	crd, err := fresh.Resolve("customresourcedefinitions.apiextensions.k8s.io")
	if err == nil {
		err = e.here(crd)
	}
	if err != nil {
		return err
	}
	_, err = e.etcd.Walk(ctx, crd.Range(e.prefix, ""), func(kv etcd.KV) error {
		plain, err := e.encryption.Open(ctx, crd, kv.Key, kv.Value)
		if err == nil {
			err = fresh.AddCRD(plain)
		}
		if err != nil {
			e.log.Warn().Str("key", neutral.Line(kv.Key)).Str("problem", neutral.Line(err.Error())).Msg("custom kind left out")
		}
		return nil
	})
	if err != nil {
		return err
	}
	e.kinds.mu.Lock()
	defer e.kinds.mu.Unlock()
	e.kinds.Catalogue, e.kinds.loaded = fresh, time.Now()
	return nil
}

// typed reads the JSON of an object into v, for the few fields that fights
// looks at.
func typed(o *object, v any) error {
	data, _, err := o.JSON()
	if err != nil {
		return err
	}
	return json.Unmarshal(data, v)
}
