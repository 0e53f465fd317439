package diagnose

import (
	"cmp"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/halligan-io/halligan/agent/storage"
)

// ownerRef names a controller as an object's ownerReferences do. Anybody who may
// write the object may write them.
type ownerRef struct{ group, kind, name, uid string }

// controllerOf returns the reference that is marked as the controller, else the first.
func controllerOf(m *metav1.ObjectMeta) (ref ownerRef) {
	if len(m.OwnerReferences) == 0 {
		return ref
	}
	o := &m.OwnerReferences[0]
	if i := slices.IndexFunc(m.OwnerReferences, func(o metav1.OwnerReference) bool { return o.Controller != nil && *o.Controller }); i > 0 {
		o = &m.OwnerReferences[i]
	}
	gv, _ := schema.ParseGroupVersion(o.APIVersion)
	return ownerRef{gv.Group, o.Kind, o.Name, string(o.UID)}
}

// heap is where objects or writes pile up.
type heap struct {
	kind      *storage.Kind
	namespace string
	owner     ownerRef
}

type pile struct {
	heap
	count, bytes float64
	manager      string // as it calls itself
}

// tally counts by heap in bounded memory. When it is full it forgets the smaller
// half, so that a heap that comes back is counted from there on: what is large
// stays, and short by no more than what was forgotten.
type tally struct {
	piles     map[heap]*pile
	max       int
	forgotten int
}

// maxPiles bounds a tally: some 250 bytes each.
const maxPiles = 8192

func newTally() *tally { return &tally{piles: make(map[heap]*pile), max: maxPiles} }

// at returns the pile of a heap, for the caller to add to.
func (t *tally) at(h heap) *pile {
	if p := t.piles[h]; p != nil {
		return p
	}
	if len(t.piles) >= t.max {
		all := t.sorted(func(p *pile) float64 { return p.count })
		for _, p := range all[len(all)/2:] {
			delete(t.piles, p.heap)
		}
		t.forgotten += len(all) - len(all)/2
	}
	// The parts of a key and of a value would keep all of it.
	h.namespace = strings.Clone(h.namespace)
	p := &pile{heap: h}
	t.piles[h] = p
	return p
}

// sorted returns the piles, the largest first, equal ones in a stable order.
func (t *tally) sorted(by func(*pile) float64) []*pile {
	all := make([]*pile, 0, len(t.piles))
	for _, p := range t.piles {
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b *pile) int {
		return cmp.Or(cmp.Compare(by(b), by(a)), strings.Compare(a.kind.Dir, b.kind.Dir), strings.Compare(a.namespace, b.namespace),
			strings.Compare(a.owner.kind, b.owner.kind), strings.Compare(a.owner.name, b.owner.name), strings.Compare(a.owner.uid, b.owner.uid))
	})
	return all
}

// managerOf returns who wrote an object last, as it calls itself.
func managerOf(o *storage.Object) string {
	fields, err := o.ManagedFields()
	if err != nil || len(fields) == 0 {
		return ""
	}
	last := fields[0]
	for _, f := range fields[1:] {
		if f.Time != nil && (last.Time == nil || !f.Time.Before(last.Time)) {
			last = f
		}
	}
	return last.Manager
}
