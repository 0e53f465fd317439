package diagnose

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
)

var censusBlind = []string{"who reads: LISTs and watches leave no trace in etcd", "who piled up what has no owner: a field manager is only what a client calls itself"}

var objectsRow = Row{
	Name: "objects", Title: "objects in etcd, by kind, namespace and owner", Unit: "objects",
	Timeout: 90 * time.Second, Memory: "one piece of an answer of etcd (up to 1.5 MiB as a rule) and 8192 sums", Blind: censusBlind,
	look: measure{
		by: func(p *pile) float64 { return p.count }, all: func(i *inventory) float64 { return i.count },
		much: 10_000, say: func(v float64) string { return fmt.Sprintf("%.0f objects", v) },
	}.look,
}

var bytesRow = Row{
	Name: "bytes", Title: "bytes in etcd, by kind, namespace and owner", Unit: "bytes",
	Timeout: 90 * time.Second, Memory: objectsRow.Memory, Blind: censusBlind,
	look: measure{
		by: func(p *pile) float64 { return p.bytes }, all: func(i *inventory) float64 { return i.bytes },
		much: 256 << 20, say: func(v float64) string { return fmt.Sprintf("%.1f MiB", v/(1<<20)) },
	}.look,
}

// measure is what an inventory is looked at by.
type measure struct {
	by  func(*pile) float64
	all func(*inventory) float64
	// much is the size of a pile for which nothing more has to speak.
	much float64
	say  func(float64) string
}

// inventory is what is in etcd.
type inventory struct {
	*tally
	count, bytes float64
	sealed, odd  int // values that are encrypted, or cannot be read
	sampled      string
	err          error
}

// Sampling: a kind of more objects than sampleOver is read in part, the first
// samplePart objects of each of up to sampleNamespaces namespaces.
const (
	sampleOver       = 5000
	samplePart       = 200
	sampleNamespaces = 1000
	// alwaysSample is how many objects are too many for the few seconds of a look
	// in all ways.
	alwaysSample = 300_000
)

func (m measure) look(ctx context.Context, s *scene) (*finding, error) {
	s.counting.Lock()
	if s.counted == nil {
		s.counted = s.takeInventory(ctx)
	}
	inv := s.counted
	s.counting.Unlock()
	total := m.all(inv)
	f := &finding{total: total, sampled: inv.sampled, blind: s.elsewhere()}
	if inv.sealed > 0 {
		f.blind = append(f.blind, fmt.Sprintf("the owners of %d encrypted objects, which are not opened to be counted", inv.sealed))
	}
	if inv.odd > 0 {
		f.blind = append(f.blind, fmt.Sprintf("the owners of %d objects that cannot be read", inv.odd))
	}
	if inv.forgotten > 0 {
		f.blind = append(f.blind, "small owners: there are too many to keep a sum of each")
	}
	for _, is := range s.merge(ctx, inv.sorted(m.by), m.by) {
		f.rows = append(f.rows, is.row())
		if share := is.value / max(total, 1); share >= 0.05 || is.value > m.much {
			f.leads = append(f.leads, is.lead(0.5*share*min(1, is.value/m.much), fmt.Sprintf("%s are %s, %s of all", m.say(is.value), is.where(), percent(is.value, total))))
		}
	}
	return f, inv.err
}

// merged is what several piles of one kind have in common: their workload.
type merged struct {
	kind      *storage.Kind
	namespace string
	workload  workload
	owner     ownerRef
	manager   string
	value     float64
	piles     int
}

// merge joins the largest piles whose owners belong to the same workload.
func (s *scene) merge(ctx context.Context, piles []*pile, by func(*pile) float64) (out []*merged) {
	type id struct {
		kind      *storage.Kind
		namespace string
		workload  workload
		owner     ownerRef
	}
	at := map[id]*merged{}
	for _, p := range piles[:min(len(piles), 8*maxRows)] {
		if by(p) <= 0 {
			break
		}
		i := id{p.kind, p.namespace, s.root(ctx, p.namespace, p.owner), p.owner}
		if i.workload.kind != nil {
			i.owner = ownerRef{}
		}
		m := at[i]
		if m == nil {
			m = &merged{kind: p.kind, namespace: p.namespace, workload: i.workload, owner: p.owner, manager: p.manager}
			at[i] = m
			out = append(out, m)
		}
		m.value += by(p)
		m.piles++
	}
	slices.SortStableFunc(out, func(a, b *merged) int {
		switch {
		case a.value > b.value:
			return -1
		case a.value < b.value:
			return 1
		}
		return 0
	})
	return out[:min(len(out), maxRows)]
}

func (m *merged) row() *halliganv1.FindingRow {
	r := &halliganv1.FindingRow{Subject: m.kind.Resource(), Namespace: m.namespace, Owner: m.workload.String(), Value: m.value}
	var notes []string
	if m.owner.kind != "" && m.workload.kind == nil {
		r.Owner = m.owner.kind + "/" + m.owner.name
		notes = append(notes, "unverified owner")
	}
	if m.piles > 1 {
		notes = append(notes, fmt.Sprintf("through %d owners", m.piles))
	}
	if m.manager != "" {
		notes = append(notes, "written by what calls itself "+m.manager)
	}
	r.Detail = strings.Join(notes, ", ")
	return r
}

// where names the objects.
func (m *merged) where() string {
	if m.namespace == "" {
		return m.kind.Resource()
	}
	return m.kind.Resource() + " in namespace " + m.namespace
}

func (m *merged) lead(weight float64, evidence string) lead {
	return lead{workload: m.workload, user: m.workload.user(), weight: weight, evidence: evidence, objects: m.kind, namespace: m.namespace}
}

var errEnough = errors.New("enough")

// takeInventory reads all kinds one after the other, in full or in part. When time is
// up it is of what was seen until then.
func (s *scene) takeInventory(ctx context.Context) *inventory {
	inv := &inventory{tally: newTally()}
	o := &s.d.o
	all, _, err := o.Etcd.Count(ctx, root(o.Prefix))
	if err != nil {
		inv.err = err
		return inv
	}
	sample := s.sample || s.everything && all > alwaysSample
	for _, k := range s.kinds(ctx).Kinds() {
		if err := s.countKind(ctx, inv, k, sample); err != nil {
			inv.err = err
			if ctx.Err() != nil {
				inv.err = nil
				inv.sampled = fmt.Sprintf("time was up at %s: %.0f of %d objects were seen", k.Resource(), inv.count, all)
				if inv.count == 0 {
					inv.err = fault.New(fault.Unreachable, "look at etcd with: halligan status", "etcd gave nothing in time")
				}
			}
			return inv
		}
	}
	if rest := float64(all) - inv.count; rest > 0 {
		p := inv.at(heap{kind: unknownKind})
		p.count += rest
		inv.count += rest
	}
	return inv
}

// unknownKind stands for what is under the prefix and of no kind that is known.
var unknownKind = &storage.Kind{Plural: "(no kind known)", Dir: "(no kind known)"}

func root(prefix string) string { return "/" + strings.Trim(prefix, "/") + "/" }

func (s *scene) countKind(ctx context.Context, inv *inventory, k *storage.Kind, sample bool) error {
	o := &s.d.o
	if !sample {
		_, err := s.countRange(ctx, inv, k, "", 0, 1)
		return err
	}
	n, _, err := o.Etcd.Count(ctx, k.Range(o.Prefix, ""))
	if err != nil {
		return err
	}
	if n <= sampleOver {
		_, err := s.countRange(ctx, inv, k, "", 0, 1)
		return err
	}
	inv.sampled = fmt.Sprintf("kinds of more than %d objects: all counted, %d read in each namespace", sampleOver, samplePart)
	spaces := []string{""}
	if k.Namespaced {
		if spaces, err = s.namespaces(ctx); err != nil {
			return err
		}
	}
	seen := int64(0)
	for _, ns := range spaces {
		n := n
		if ns != "" {
			if n, _, err = o.Etcd.Count(ctx, k.Range(o.Prefix, ns)); err != nil {
				return err
			}
		}
		if seen += n; n > 0 {
			if _, err := s.countRange(ctx, inv, k, ns, samplePart, n); err != nil {
				return err
			}
		}
	}
	if rest := float64(n - seen); rest > 0 { // in namespaces that nobody lists
		inv.at(heap{kind: k}).count += rest
		inv.count += rest
	}
	return nil
}

func (s *scene) namespaces(ctx context.Context) (names []string, err error) {
	k := s.kinds(ctx).ByGroupKind("", "Namespace")
	at := k.Range(s.d.o.Prefix, "")
	_, err = s.d.o.Etcd.Walk(ctx, at, func(kv etcd.KV) error {
		if names = append(names, strings.TrimPrefix(kv.Key, at)); len(names) >= sampleNamespaces {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return names, err
}

// countRange adds the objects of a kind, at most most of them, which stand for all.
func (s *scene) countRange(ctx context.Context, inv *inventory, k *storage.Kind, namespace string, most, all int64) (seen int64, err error) {
	at := k.Range(s.d.o.Prefix, "")
	type sum struct{ count, bytes float64 }
	var part map[*pile]sum // what this sample added, to be scaled
	if most > 0 {
		part = map[*pile]sum{}
	}
	_, err = s.d.o.Etcd.Walk(ctx, k.Range(s.d.o.Prefix, namespace), func(kv etcd.KV) error {
		name := strings.TrimPrefix(kv.Key, at)
		h := heap{kind: k}
		if k.Namespaced {
			h.namespace, name, _ = strings.Cut(name, "/")
		}
		if name == "" || strings.Contains(name, "/") {
			return nil // a longer key below: another resource, such as services/specs
		}
		obj := inv.read(kv.Value)
		if obj != nil {
			h.owner = controllerOf(&obj.Meta)
		}
		p := inv.at(h)
		size := float64(len(kv.Key) + len(kv.Value))
		p.count++
		p.bytes += size
		inv.count++
		inv.bytes += size
		if n := int(p.count); obj != nil && n&(n-1) == 0 { // at 1, 2, 4 and so on: a few of each pile
			p.manager = managerOf(obj)
		}
		if part != nil {
			was := part[p]
			part[p] = sum{was.count + 1, was.bytes + size}
		}
		if seen++; seen == most {
			return errEnough
		}
		return nil
	})
	if !errors.Is(err, errEnough) {
		return seen, err
	}
	for p, was := range part {
		more := float64(all)/float64(seen) - 1
		p.count += more * was.count
		p.bytes += more * was.bytes
		inv.count += more * was.count
		inv.bytes += more * was.bytes
	}
	return seen, nil
}

var sealedPrefix = []byte("k8s:enc:")

// read decodes what is not encrypted; else it counts why not.
func (inv *inventory) read(value []byte) *storage.Object {
	if bytes.HasPrefix(value, sealedPrefix) {
		inv.sealed++
		return nil
	}
	obj, err := storage.Decode(value)
	if err != nil {
		inv.odd++
		return nil
	}
	return obj
}
