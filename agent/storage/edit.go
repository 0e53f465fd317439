package storage

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/halligan-io/halligan/internal/fault"
)

// maxValueBytes leaves room in etcd's request for the key, the comparison and
// the transaction around the value.
const maxValueBytes = MaxRequestBytes - 2048

// Edit asks for one field to be changed.
type Edit struct {
	Field FieldName
	// Entry is the key of the entry, for a Map, or the name of the element.
	Entry string
	// Index is the element to remove, for a List; it counts in the object as it
	// is before any of the edits.
	Index int
	// Value is an int64, a bool or a string; nil removes the field, the entry
	// or the element. Elements can only be removed.
	Value any
}

// Change is one change that was made. It is serialised to JSON and is enough to
// revert what was done.
type Change struct {
	// Path is for people: spec.replicas, subjects[2],
	// spec.template.spec.nodeSelector[halligan.io/stopped].
	Path  string    `json:"path"`
	Field FieldName `json:"field"`
	Entry string    `json:"entry,omitempty"`
	// Index is where the element was, or was put, at the time of the change.
	Index int `json:"index,omitempty"`
	// Before and After are the value as JSON; nil where the field was absent.
	Before json.RawMessage `json:"before,omitempty"`
	After  json.RawMessage `json:"after,omitempty"`
	// Raw is a list's element as it is stored, wire bytes or JSON text.
	Raw []byte `json:"raw,omitempty"`
	// Others is how many equal elements a list has beside those that were
	// removed or put back with this one.
	Others int `json:"others,omitempty"`
}

// keyed reports whether there is a value for each entry.
func (f Field) keyed() bool { return f.Type == Map || f.Type == Named }

// document is a value opened for edits of single fields. Values go in and out
// as JSON; nil is an absent value. Errors are faults.
type document interface {
	bytes() []byte
	get(f Field, entry string) (json.RawMessage, error)
	set(f Field, entry string, value json.RawMessage) error
	// names returns the names of the elements that have a field.
	names(f Field) ([]string, error)
	// elements returns a list's elements as they are stored, show one as JSON
	// and with a key that elements of equal meaning share.
	elements(f Field) ([][]byte, error)
	show(element []byte) (shown json.RawMessage, key string, err error)
	// relist removes the elements for which gone is true, of which there is one
	// for each element, and inserts others, all in one pass.
	relist(f Field, gone []bool, insert []insertion) error
}

// insertion is an element to put in front of the one with that index in the
// list as it is before anything is removed or inserted; the length is the end.
type insertion struct {
	before  int
	element []byte
}

// path writes where a field is; of what is Named, with the name where it belongs.
func (f Field) path(entry string) string {
	if f.Type == Named && entry != "" {
		return pathString(f.JSON[:1], entry) + "." + pathString(f.JSON[1:], "")
	}
	return pathString(f.JSON, entry)
}

// bumping are what, besides spec, an API server counts a generation up for: the
// webhooks of a configuration (pkg/registry/admissionregistration/
// {mutating,validating}webhookconfiguration/strategy.go).
var bumping = []string{"spec", "webhooks"}

// pathString writes a path, and in brackets an entry or index if there is one.
func pathString(path []string, entry string) string {
	s := strings.Join(path, ".")
	if entry != "" {
		s += "[" + entry + "]"
	}
	return s
}

func noElement(f Field, index int) error {
	return fault.New(fault.Usage, "look at the object again", "there is no %s", pathString(f.JSON, strconv.Itoa(index)))
}

// isNull reports whether a value is absent or JSON's null.
func isNull(value json.RawMessage) bool {
	return value == nil || string(value) == "null"
}

// same compares two JSON values by meaning; absent and null differ.
func same(a, b json.RawMessage) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	va, errA := generic(a)
	vb, errB := generic(b)
	return errA == nil && errB == nil && reflect.DeepEqual(va, vb)
}

// generic decodes JSON with numbers as they are spelled.
func generic(text []byte) (v any, err error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	err = d.Decode(&v)
	return v, err
}

// editor is one run of Apply or Revert.
type editor struct {
	kind    *Kind
	before  *Object
	doc     document
	changes []Change
	fields  []Field // of the changes
}

func (k *Kind) edit(plain []byte) (*editor, error) {
	o, err := Decode(plain)
	if err != nil {
		return nil, err
	}
	if err := o.checkKind(k); err != nil {
		return nil, err
	}
	doc, err := o.document()
	if err != nil {
		return nil, err
	}
	if j, ok := doc.(*jsonDocument); ok && !j.root.unique() {
		return nil, undecodable("the stored JSON has a key twice in one object")
	}
	return &editor{kind: k, before: o, doc: doc}, nil
}

func (e *editor) field(name FieldName) (Field, error) {
	f, ok := e.kind.Field(name, e.before.APIVersion)
	if !ok || name == Generation {
		return Field{}, fault.New(fault.Usage, "use a field that the kind has, or the API server",
			"%s of a %s that is stored as %s cannot be edited", name, e.kind.Kind, e.before.APIVersion)
	}
	return f, nil
}

func (e *editor) record(f Field, c Change) {
	e.changes, e.fields = append(e.changes, c), append(e.fields, f)
}

// set changes a scalar or a map's entry, if that changes anything.
func (e *editor) set(name FieldName, f Field, entry string, value json.RawMessage) error {
	current, err := e.doc.get(f, entry)
	if err != nil || same(current, value) {
		return err
	}
	if err := e.doc.set(f, entry, value); err != nil {
		return err
	}
	e.record(f, Change{Path: f.path(entry), Field: name, Entry: entry, Before: current, After: value})
	return nil
}

// listing is what a list holds. An element that cannot be read has no key.
type listing struct {
	elements [][]byte
	keys     []string
	count    map[string]int // by key
}

func (e *editor) list(f Field) (*listing, error) {
	elements, err := e.doc.elements(f)
	if err != nil {
		return nil, err
	}
	l := &listing{elements, make([]string, len(elements)), make(map[string]int)}
	for i, element := range elements {
		if _, l.keys[i], err = e.doc.show(element); err == nil {
			l.count[l.keys[i]]++
		}
	}
	return l, nil
}

// grow makes room for as many changes as there are elements gone.
func (e *editor) grow(gone []bool) {
	n := 0
	for _, g := range gone {
		if g {
			n++
		}
	}
	e.changes, e.fields = slices.Grow(e.changes, n), slices.Grow(e.fields, n)
}

// remove takes elements out, the last one first, so that indexes hold.
func (e *editor) remove(name FieldName, f Field, l *listing, gone []bool) error {
	first := len(e.changes)
	e.grow(gone)
	for i, element := range slices.Backward(l.elements) {
		if !gone[i] {
			continue
		}
		path := pathString(f.JSON, strconv.Itoa(i))
		shown, _, err := e.doc.show(element)
		if err != nil {
			return undecodable("%s cannot be read", path)
		}
		l.count[l.keys[i]]--
		e.record(f, Change{Path: path, Field: name, Index: i, Before: shown, Raw: bytes.Clone(element)})
	}
	for n := range e.changes[first:] {
		c := &e.changes[first+n]
		c.Others = l.count[l.keys[c.Index]]
	}
	return nil
}

// removeAll removes the elements with the indexes, which differ.
func (e *editor) removeAll(name FieldName, f Field, indexes []int) error {
	l, err := e.list(f)
	if err != nil {
		return err
	}
	gone := make([]bool, len(l.elements))
	for _, i := range indexes {
		if i < 0 || i >= len(gone) {
			return noElement(f, i)
		}
		gone[i] = true
	}
	if err := e.remove(name, f, l, gone); err != nil {
		return err
	}
	return e.doc.relist(f, gone, nil)
}

// Apply makes the edits in a decrypted value and returns the new value with the
// changes made; an edit that changes nothing makes none. Where the kind has a
// generation and the spec changed, metadata.generation is counted up and is
// among the changes.
//
// The result is decoded again, and unless exactly the intended fields differ,
// everything else being the same bytes, nothing is returned. Errors are
// fault.Undecodable for a value that cannot be edited safely, fault.Usage for
// edits that the kind does not have or that contradict each other, and
// fault.TooLarge if etcd would refuse the result.
func (k *Kind) Apply(plain []byte, edits ...Edit) (out []byte, changes []Change, err error) {
	e, err := k.edit(plain)
	if err != nil {
		return nil, nil, err
	}
	type target struct {
		field FieldName
		entry string
		index int
	}
	seen := make(map[target]bool, len(edits))
	lists := map[FieldName][]int{}
	for _, edit := range edits {
		f, err := e.field(edit.Field)
		if err != nil {
			return nil, nil, err
		}
		value, err := edit.value(f)
		if err != nil {
			return nil, nil, err
		}
		id := target{edit.Field, edit.Entry, edit.Index}
		if seen[id] {
			return nil, nil, fault.New(fault.Usage, "ask for each change once", "%s is to be changed twice", f.path(edit.Entry))
		}
		seen[id] = true
		if f.Type == List {
			lists[edit.Field] = append(lists[edit.Field], edit.Index)
		} else if err := e.set(edit.Field, f, edit.Entry, value); err != nil {
			return nil, nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(lists)) {
		f, err := e.field(name)
		if err == nil {
			err = e.removeAll(name, f, lists[name])
		}
		if err != nil {
			return nil, nil, err
		}
	}
	return e.finish()
}

// value checks an edit against the field's type and returns its value as JSON.
func (edit Edit) value(f Field) (json.RawMessage, error) {
	ok := false
	switch v := edit.Value.(type) {
	case nil:
		ok = true
	case int64:
		ok = f.Type == Int && (len(f.Wire) == 0 || v == int64(int32(v)))
	case bool:
		ok = f.Type == Bool
	case string:
		ok = f.keyed() && utf8.ValidString(v)
	}
	if f.keyed() != (edit.Entry != "") || (f.Type != List && edit.Index != 0) || !utf8.ValidString(edit.Entry) {
		ok = false
	}
	if !ok {
		return nil, fault.New(fault.Usage, "see what kind of value the field takes",
			"%s cannot be set to %v", f.path(edit.Entry), edit.Value)
	}
	if edit.Value == nil {
		return nil, nil
	}
	return json.Marshal(edit.Value)
}

// Revert takes changes back, the last one first, in a value that may have
// changed elsewhere since. Each field must still be as the change left it, else
// the error is fault.Stale and names the field. Fields that were absent become
// absent. Removed elements go back to their indexes, as many of equal ones as
// are missing: none after an earlier Revert. Elements that a Revert put back are
// removed again. The generation is never lowered but counted up once more.
func (k *Kind) Revert(plain []byte, changes []Change) (out []byte, reverted []Change, err error) {
	e, err := k.edit(plain)
	if err != nil {
		return nil, nil, err
	}
	changes = slices.Clone(changes)
	slices.Reverse(changes)
	lists, err := e.eachValue(changes, e.revertValue)
	if err != nil {
		return nil, nil, err
	}
	for _, l := range lists {
		slices.Reverse(l.changes)
		if err := e.revertList(l); err != nil {
			return nil, nil, err
		}
	}
	return e.finish()
}

// listChanges are the changes of one list.
type listChanges struct {
	name    FieldName
	field   Field
	changes []*Change
}

// eachValue calls do for each change but those of the generation and of lists,
// and returns the latter by list.
func (e *editor) eachValue(changes []Change, do func(Field, Change) error) (lists []*listChanges, err error) {
	for i := range changes {
		c := &changes[i]
		if c.Field == Generation {
			continue
		}
		f, err := e.field(c.Field)
		if err != nil {
			return nil, err
		}
		if f.Type != List {
			if err := do(f, *c); err != nil {
				return nil, err
			}
			continue
		}
		at := slices.IndexFunc(lists, func(l *listChanges) bool { return l.name == c.Field })
		if at < 0 {
			at = len(lists)
			lists = append(lists, &listChanges{name: c.Field, field: f})
		}
		lists[at].changes = append(lists[at].changes, c)
	}
	return lists, nil
}

func changedSince(path string) error {
	return fault.New(fault.Stale, "look at what it is now and decide by hand", "%s was changed since", path)
}

func (e *editor) revertValue(f Field, c Change) error {
	current, err := e.doc.get(f, c.Entry)
	if err != nil {
		return err
	}
	if !same(current, c.After) {
		return changedSince(c.Path)
	}
	return e.set(c.Field, f, c.Entry, c.Before)
}

// elementChange is a change of a list with the key of its element.
type elementChange struct {
	*Change
	shown json.RawMessage
	key   string
}

// tally is how many equal elements some changes have, and how many others there
// were.
type tally struct{ n, others int }

func tallied(changes []elementChange) map[string]tally {
	all := make(map[string]tally)
	for _, c := range changes {
		t := all[c.key]
		all[c.key] = tally{t.n + 1, max(t.others, c.Others)}
	}
	return all
}

// read splits changes into those that removed an element and those that put one
// back.
func (e *editor) read(changes []*Change) (removed, added []elementChange, err error) {
	for _, c := range changes {
		read := elementChange{Change: c}
		if read.shown, read.key, err = e.doc.show(c.Raw); err != nil {
			return nil, nil, undecodable("the stored element %s is damaged", c.Path)
		}
		if c.After == nil {
			removed = append(removed, read)
		} else {
			added = append(added, read)
		}
	}
	return removed, added, nil
}

// revertList removes again what an earlier Revert put back, and puts back what
// was removed. The work is linear in the list and the changes.
func (e *editor) revertList(changes *listChanges) error {
	f := changes.field
	removed, added, err := e.read(changes.changes)
	if err != nil {
		return err
	}
	l, err := e.list(f)
	if err != nil {
		return err
	}

	// Of equal elements those at their own index go, then the last ones.
	gone := make([]bool, len(l.elements))
	tallies := tallied(added)
	elsewhere := map[string]int{}
	for _, c := range added {
		if t := tallies[c.key]; l.count[c.key] < t.n+t.others {
			return changedSince(c.Path)
		}
		if i := c.Index; i >= 0 && i < len(gone) && !gone[i] && l.keys[i] == c.key {
			gone[i] = true
		} else {
			elsewhere[c.key]++
		}
	}
	for i, key := range slices.Backward(l.keys) {
		if !gone[i] && elsewhere[key] > 0 {
			gone[i] = true
			elsewhere[key]--
		}
	}
	if err := e.remove(changes.name, f, l, gone); err != nil {
		return err
	}

	missing := map[string]int{}
	for key, t := range tallied(removed) {
		missing[key] = min(t.n, t.n+t.others-l.count[key])
	}
	slices.SortStableFunc(removed, func(a, b elementChange) int { return cmp.Compare(a.Index, b.Index) })
	var insert []insertion
	size, next := 0, 0 // of the new list up to here; in the list as it is
	for _, c := range removed {
		if missing[c.key] <= 0 {
			continue
		}
		missing[c.key]--
		for ; next < len(gone) && (size < c.Index || gone[next]); next++ {
			if !gone[next] {
				size++
			}
		}
		insert = append(insert, insertion{next, c.Raw})
		e.record(f, Change{Path: pathString(f.JSON, strconv.Itoa(size)), Field: changes.name, Index: size, After: c.shown, Raw: c.Raw, Others: l.count[c.key]})
		size++
	}
	if insert == nil && !slices.Contains(gone, true) {
		return nil
	}
	return e.doc.relist(f, gone, insert)
}

// errOther says that a value is not as a change left it.
var errOther = errors.New("another value")

// Holds reports whether an object still is what the changes made of it,
// whatever else was changed: of removed elements no more than were left, of
// those put back no fewer. The generation does not count.
func (k *Kind) Holds(plain []byte, changes []Change) (bool, error) {
	e, err := k.edit(plain)
	if err != nil {
		return false, err
	}
	lists, err := e.eachValue(changes, func(f Field, c Change) error {
		current, err := e.doc.get(f, c.Entry)
		if err == nil && !same(current, c.After) {
			err = errOther
		}
		return err
	})
	if errors.Is(err, errOther) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, changed := range lists {
		removed, added, err := e.read(changed.changes)
		if err != nil {
			return false, err
		}
		l, err := e.list(changed.field)
		if err != nil {
			return false, err
		}
		for key, t := range tallied(removed) {
			if l.count[key] > t.others {
				return false, nil
			}
		}
		for key, t := range tallied(added) {
			if l.count[key] < t.n+t.others {
				return false, nil
			}
		}
	}
	return true, nil
}

// finish counts the generation up and checks the result.
func (e *editor) finish() ([]byte, []Change, error) {
	if len(e.changes) == 0 {
		return e.before.plain, nil, nil
	}
	inSpec := slices.ContainsFunc(e.fields, func(f Field) bool {
		return slices.Contains(bumping, f.JSON[0]) || e.kind.annotated && slices.Equal(f.JSON, metadataFields[Annotations].JSON)
	})
	if inSpec && e.kind.counts(e.before) {
		current := e.before.Meta.Generation
		if current < 0 || current == math.MaxInt64 {
			return nil, nil, undecodable("metadata.generation is %d", current)
		}
		if err := e.set(Generation, generation, "", strconv.AppendInt(nil, current+1, 10)); err != nil {
			return nil, nil, err
		}
	}
	out := e.doc.bytes()
	if len(out) > maxValueBytes {
		return nil, nil, fault.New(fault.TooLarge, "delete the object or make it smaller through the API server",
			"the object would have %d bytes, and etcd takes %d", len(out), maxValueBytes)
	}
	if err := e.verify(out); err != nil {
		return nil, nil, err
	}
	return out, e.changes, nil
}

// verify decodes the result anew and compares it with what was there before:
// every change must be seen, and nothing else may differ. It uses none of the
// editing code but the reading of single fields: the bytes beside the edited
// fields are compared, and the changes are made once more in a generic form of
// what the API server's own decoders read.
func (e *editor) verify(out []byte) error {
	after, err := Decode(out)
	if err != nil {
		return err
	}
	if err := after.checkKind(e.kind); err != nil {
		return err
	}
	doc, err := after.document()
	if err != nil {
		return err
	}
	for i, c := range e.changes {
		if e.fields[i].Type == List {
			continue
		}
		if value, err := doc.get(e.fields[i], c.Entry); err != nil || !same(value, c.After) {
			return undecodable("%s did not take the edit", c.Path)
		}
	}
	if err := e.verifyLists(doc); err != nil {
		return err
	}
	if e.before.Format == Protobuf {
		var targets []target
		seen := map[FieldName]bool{}
		for i, c := range e.changes {
			if list := e.fields[i].Type == List; !list || !seen[c.Field] {
				targets = append(targets, target{append([]protowire.Number{rawField}, e.fields[i].Wire...), e.fields[i], c.Entry})
				seen[c.Field] = list
			}
		}
		if !sameBeside(e.before.plain[len(protobufMagic):], out[len(protobufMagic):], targets) {
			return undecodable("the edit would change other bytes than those of its fields")
		}
	} else if j := doc.(*jsonDocument); !j.root.unique() {
		return undecodable("the edit would make a JSON key twice")
	}
	return e.verifyDecoded(after)
}

// verifyLists repeats the changes of lists on their elements: first removals
// from the last to the first, then insertions from the first to the last.
func (e *editor) verifyLists(doc document) error {
	lists := map[FieldName][]int{} // the changes of each
	for i, c := range e.changes {
		if e.fields[i].Type == List {
			lists[c.Field] = append(lists[c.Field], i)
		}
	}
	if len(lists) == 0 {
		return nil
	}
	before, err := e.before.document()
	if err != nil {
		return err
	}
	for name, changes := range lists {
		f := e.fields[changes[0]]
		wrong := undecodable("%s did not take the edit", name)
		list, err := before.elements(f)
		if err != nil {
			return err
		}
		now, err := doc.elements(f)
		if err != nil {
			return err
		}
		last, at := len(list), 0
		for len(changes) > 0 && e.changes[changes[0]].After == nil {
			c := e.changes[changes[0]]
			if c.Index < 0 || c.Index >= last || !bytes.Equal(list[c.Index], c.Raw) {
				return wrong
			}
			last, list[c.Index], changes = c.Index, nil, changes[1:]
		}
		list = slices.DeleteFunc(list, func(element []byte) bool { return element == nil })
		for i, element := range now {
			switch {
			case len(changes) > 0 && e.changes[changes[0]].Index == i:
				c := e.changes[changes[0]]
				if c.After == nil || !bytes.Equal(element, c.Raw) {
					return wrong
				}
				changes = changes[1:]
			case at == len(list) || !bytes.Equal(element, list[at]):
				return wrong
			default:
				at++
			}
		}
		if at != len(list) || len(changes) > 0 {
			return wrong
		}
	}
	return nil
}

// verifyDecoded compares both values as the decoders of the API server see
// them. For protobuf of a type that this build does not know there is no such
// view, and the comparison of bytes stands alone.
func (e *editor) verifyDecoded(after *Object) error {
	want, known, err := e.before.decoded()
	if err != nil {
		return undecodable("the stored object does not decode as %s: %v", e.before.GroupVersionKind(), err)
	}
	got, _, err := after.decoded()
	if err != nil {
		return undecodable("the edited object does not decode as %s: %v", e.before.GroupVersionKind(), err)
	}
	if !known {
		return nil
	}
	for i, c := range e.changes {
		path := jsonPath(e.fields[i], c.Entry)
		want, got := want, got
		if e.fields[i].Type == Named {
			want, got, path = elementOf(want, path[0], c.Entry), elementOf(got, path[0], c.Entry), path[1:]
			if want == nil || got == nil {
				return undecodable("%s cannot be checked", c.Path)
			}
		}
		if e.fields[i].Type == List {
			// The elements were compared byte by byte.
			unset(want, path)
			unset(got, path)
			continue
		}
		if err := redo(want, path, c.After); err != nil {
			return undecodable("%s cannot be checked: %v", c.Path, err)
		}
		if e.before.Format == Protobuf {
			// Zero and absent are the same in Go's types for some fields; which
			// it is on the wire was compared before.
			prune(want, path)
			prune(got, path)
		}
	}
	if at, ok := difference(want, got, ""); ok {
		return undecodable("the edit would change %s too", at)
	}
	return nil
}

// elementOf returns the one element of a list of that name; nil where there is none
// or more.
func elementOf(object map[string]any, list, name string) (found map[string]any) {
	all, _ := object[list].([]any)
	for _, one := range all {
		if element, ok := one.(map[string]any); ok && element["name"] == name {
			if found != nil {
				return nil
			}
			found = element
		}
	}
	return found
}

// redo sets the value at path in the generic form of an object; nil removes it.
func redo(object map[string]any, path []string, after json.RawMessage) error {
	if after == nil {
		unset(object, path)
		return nil
	}
	for ; len(path) > 1; path = path[1:] {
		inner, ok := object[path[0]].(map[string]any)
		if !ok && object[path[0]] != nil {
			return fmt.Errorf("%s is not an object", path[0])
		}
		if !ok {
			inner = map[string]any{}
			object[path[0]] = inner
		}
		object = inner
	}
	value, err := generic(after)
	object[path[0]] = value
	return err
}

// unset removes what is at path.
func unset(object map[string]any, path []string) {
	for ; len(path) > 1 && object != nil; path = path[1:] {
		object, _ = object[path[0]].(map[string]any)
	}
	delete(object, path[0])
}

// prune removes the value at path if it is a zero, and what it leaves empty.
func prune(object map[string]any, path []string) {
	if inner, ok := object[path[0]].(map[string]any); ok && len(path) > 1 {
		prune(inner, path[1:])
	}
	switch v := object[path[0]].(type) {
	case map[string]any:
		if len(v) > 0 {
			return
		}
	case []any:
		if len(v) > 0 {
			return
		}
	case nil, bool, string, json.Number:
		if v != nil && v != false && v != "" && v != json.Number("0") {
			return
		}
	}
	delete(object, path[0])
}

// difference returns the path of the first difference found.
func difference(a, b any, path string) (string, bool) {
	ma, okA := a.(map[string]any)
	mb, okB := b.(map[string]any)
	if !okA || !okB {
		return strings.TrimPrefix(path, "."), !reflect.DeepEqual(a, b)
	}
	for key := range mb {
		if _, ok := ma[key]; !ok {
			return strings.TrimPrefix(path+"."+key, "."), true
		}
	}
	for key := range ma {
		v, ok := mb[key]
		if !ok {
			return strings.TrimPrefix(path+"."+key, "."), true
		}
		if at, differs := difference(ma[key], v, path+"."+key); differs {
			return at, true
		}
	}
	return "", false
}
