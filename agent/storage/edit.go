package storage

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
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
	// Entry is the key of the entry, for a Map.
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
}

// document is a value opened for edits of single fields. Values go in and out
// as JSON; nil is an absent value. Errors are faults.
type document interface {
	bytes() []byte
	get(f Field, entry string) (json.RawMessage, error)
	set(f Field, entry string, value json.RawMessage) error
	// elements returns a list's elements as they are stored, show one as JSON.
	elements(f Field) ([][]byte, error)
	show(element []byte) (json.RawMessage, error)
	remove(f Field, index int) error
	// insert puts an element before the one with index, or at the end.
	insert(f Field, index int, element []byte) error
}

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
	e.record(f, Change{Path: pathString(f.JSON, entry), Field: name, Entry: entry, Before: current, After: value})
	return nil
}

func (e *editor) remove(name FieldName, f Field, index int) error {
	elements, err := e.doc.elements(f)
	if err != nil {
		return err
	}
	if index < 0 || index >= len(elements) {
		return noElement(f, index)
	}
	shown, err := e.doc.show(elements[index])
	if err != nil {
		return undecodable("%s cannot be read", pathString(f.JSON, strconv.Itoa(index)))
	}
	if err := e.doc.remove(f, index); err != nil {
		return err
	}
	e.record(f, Change{Path: pathString(f.JSON, strconv.Itoa(index)), Field: name, Index: index, Before: shown, Raw: elements[index]})
	return nil
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
	// The last element of a list goes first, so that indexes hold.
	edits = slices.Clone(edits)
	slices.SortStableFunc(edits, func(a, b Edit) int { return cmp.Compare(b.Index, a.Index) })
	seen := map[string]bool{}
	for _, edit := range edits {
		f, err := e.field(edit.Field)
		if err != nil {
			return nil, nil, err
		}
		value, err := edit.value(f)
		if err != nil {
			return nil, nil, err
		}
		id := fmt.Sprintf("%s %q %d", edit.Field, edit.Entry, edit.Index)
		if seen[id] {
			return nil, nil, fault.New(fault.Usage, "ask for each change once", "%s is to be changed twice", pathString(f.JSON, edit.Entry))
		}
		seen[id] = true
		if f.Type == List {
			err = e.remove(edit.Field, f, edit.Index)
		} else {
			err = e.set(edit.Field, f, edit.Entry, value)
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
		ok = f.Type == Map && utf8.ValidString(v)
	}
	if (f.Type == Map) != (edit.Entry != "") || (f.Type != List && edit.Index != 0) || !utf8.ValidString(edit.Entry) {
		ok = false
	}
	if !ok {
		return nil, fault.New(fault.Usage, "see what kind of value the field takes",
			"%s cannot be set to %v", pathString(f.JSON, edit.Entry), edit.Value)
	}
	if edit.Value == nil {
		return nil, nil
	}
	return json.Marshal(edit.Value)
}

// Revert takes changes back, the last one first, in a value that may have
// changed elsewhere since. Each field must still be as the change left it, else
// the error is fault.Stale and names the field. Fields that were absent become
// absent, and a removed element goes back to its index, unless an equal one is
// there already. The generation is never lowered but counted up once more.
func (k *Kind) Revert(plain []byte, changes []Change) (out []byte, reverted []Change, err error) {
	e, err := k.edit(plain)
	if err != nil {
		return nil, nil, err
	}
	for _, c := range slices.Backward(changes) {
		if c.Field == Generation {
			continue
		}
		f, err := e.field(c.Field)
		if err != nil {
			return nil, nil, err
		}
		if f.Type == List {
			err = e.revertElement(f, c)
		} else {
			err = e.revertValue(f, c)
		}
		if err != nil {
			return nil, nil, err
		}
	}
	return e.finish()
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

// revertElement puts a removed element back. Of an element that an earlier
// Revert put back it takes it away again.
func (e *editor) revertElement(f Field, c Change) error {
	elements, at, want, err := e.find(f, c)
	if err != nil {
		return err
	}
	switch {
	case c.After != nil && at < 0:
		return changedSince(c.Path)
	case c.After != nil:
		return e.remove(c.Field, f, at)
	case at >= 0:
		return nil
	}
	at = max(0, min(c.Index, len(elements)))
	if err := e.doc.insert(f, at, c.Raw); err != nil {
		return err
	}
	e.record(f, Change{Path: pathString(f.JSON, strconv.Itoa(at)), Field: c.Field, Index: at, After: want, Raw: c.Raw})
	return nil
}

// find looks for the element of a change among those that are there; at is -1
// where it is not.
func (e *editor) find(f Field, c Change) (elements [][]byte, at int, want json.RawMessage, err error) {
	if elements, err = e.doc.elements(f); err != nil {
		return nil, -1, nil, err
	}
	if want, err = e.doc.show(c.Raw); err != nil {
		return nil, -1, nil, undecodable("the stored element %s is damaged", c.Path)
	}
	at = slices.IndexFunc(elements, func(element []byte) bool {
		shown, err := e.doc.show(element)
		return err == nil && same(shown, want)
	})
	return elements, at, want, nil
}

// Holds reports whether an object still is what the changes made of it,
// whatever else was changed. The generation does not count.
func (k *Kind) Holds(plain []byte, changes []Change) (bool, error) {
	e, err := k.edit(plain)
	if err != nil {
		return false, err
	}
	for _, c := range changes {
		if c.Field == Generation {
			continue
		}
		f, err := e.field(c.Field)
		if err != nil {
			return false, err
		}
		if f.Type == List {
			_, at, _, err := e.find(f, c)
			if err != nil || (at >= 0) != (c.After != nil) {
				return false, err
			}
			continue
		}
		current, err := e.doc.get(f, c.Entry)
		if err != nil || !same(current, c.After) {
			return false, err
		}
	}
	return true, nil
}

// finish counts the generation up and checks the result.
func (e *editor) finish() ([]byte, []Change, error) {
	if len(e.changes) == 0 {
		return e.before.plain, nil, nil
	}
	inSpec := slices.ContainsFunc(e.fields, func(f Field) bool { return f.JSON[0] == "spec" })
	if e.kind.Generation && inSpec {
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
		targets := make([]target, len(e.changes))
		for i, c := range e.changes {
			targets[i] = target{append([]protowire.Number{rawField}, e.fields[i].Wire...), e.fields[i], c.Entry}
		}
		if !sameBeside(e.before.plain[len(protobufMagic):], out[len(protobufMagic):], targets) {
			return undecodable("the edit would change other bytes than those of its fields")
		}
	} else if j := doc.(*jsonDocument); !j.root.unique() {
		return undecodable("the edit would make a JSON key twice")
	}
	return e.verifyDecoded(after)
}

// verifyLists repeats the changes of lists on their elements.
func (e *editor) verifyLists(doc document) error {
	if !slices.ContainsFunc(e.fields, func(f Field) bool { return f.Type == List }) {
		return nil
	}
	before, err := e.before.document()
	if err != nil {
		return err
	}
	lists := map[FieldName][][]byte{}
	for i, c := range e.changes {
		if e.fields[i].Type != List {
			continue
		}
		list, ok := lists[c.Field]
		if !ok {
			if list, err = before.elements(e.fields[i]); err != nil {
				return err
			}
		}
		if c.After == nil {
			list = slices.Delete(list, c.Index, c.Index+1)
		} else {
			list = slices.Insert(list, c.Index, c.Raw)
		}
		lists[c.Field] = list
	}
	for i, c := range e.changes {
		list, ok := lists[c.Field]
		if !ok {
			continue
		}
		now, err := doc.elements(e.fields[i])
		if err != nil || !slices.EqualFunc(list, now, bytes.Equal) {
			return undecodable("%s did not take the edit", c.Path)
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
