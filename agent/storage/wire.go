package storage

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	rbacv1 "k8s.io/api/rbac/v1"

	"github.com/halligan-io/halligan/internal/fault"
)

const (
	bytesType = protowire.BytesType
	// rawField is runtime.Unknown's raw (apimachinery pkg/runtime/generated.proto).
	rawField protowire.Number = 2
	// maxRepeats bounds how often one scalar or map key may be repeated in a
	// value that is edited. An API server never repeats one.
	maxRepeats = 16
)

// generation is metadata.generation, ObjectMeta's field 7
// (apimachinery pkg/apis/meta/v1/generated.proto). It is the only int64 among
// the integers that are edited; the others are int32.
var generation = Field{Type: Int, JSON: []string{"metadata", "generation"}, Wire: []protowire.Number{1, 7}}

// wireField is one field of a message by its offsets: the tag is at start, the
// length of a bytes field at length, the payload from value to end.
type wireField struct {
	num                       protowire.Number
	typ                       protowire.Type
	start, length, value, end int
}

// scan splits the message data[from:to] into its fields.
func scan(data []byte, from, to int) ([]wireField, error) {
	var fields []wireField
	err := each(data, from, to, func(f wireField) error {
		fields = append(fields, f)
		return nil
	})
	return fields, err
}

// each calls do for every field of the message data[from:to].
func each(data []byte, from, to int, do func(wireField) error) error {
	for at := from; at < to; {
		num, typ, n := protowire.ConsumeTag(data[at:to])
		if n < 0 {
			return fmt.Errorf("at byte %d: %w", at, protowire.ParseError(n))
		}
		f := wireField{num: num, typ: typ, start: at, length: at + n, value: at + n}
		size := protowire.ConsumeFieldValue(num, typ, data[f.value:to])
		if size < 0 {
			return fmt.Errorf("at byte %d: %w", at, protowire.ParseError(size))
		}
		f.end = f.value + size
		if typ == bytesType {
			_, n := protowire.ConsumeVarint(data[f.length:to])
			f.value += n
		}
		if err := do(f); err != nil {
			return err
		}
		at = f.end
	}
	return nil
}

// unmarshaler is what the generated types of k8s.io/api are. Unmarshal adds to
// what is there, so that a message can be decoded in pieces.
type unmarshaler interface{ Unmarshal([]byte) error }

// unmarshalBut decodes a message but for the field num, whose payloads instead
// gets.
func unmarshalBut(m unmarshaler, data []byte, num protowire.Number, instead func([]byte) error) error {
	done := 0
	err := each(data, 0, len(data), func(f wireField) error {
		if f.num != num || f.typ != bytesType {
			return nil
		}
		if err := m.Unmarshal(data[done:f.start]); err != nil {
			return err
		}
		done = f.end
		return instead(data[f.value:f.end])
	})
	if err != nil {
		return err
	}
	return m.Unmarshal(data[done:])
}

// part says which fields of a message to keep, and which fields of those; nil
// is the whole.
type part map[protowire.Number]part

// only returns a part of the message.
func (p part) only(data []byte) ([]byte, error) {
	if p == nil {
		return data, nil
	}
	var out []byte
	err := each(data, 0, len(data), func(f wireField) error {
		inner, keep := p[f.num]
		switch {
		case !keep:
		case inner == nil || f.typ != bytesType:
			out = append(out, data[f.start:f.end]...)
		default:
			message, err := inner.only(data[f.value:f.end])
			if err != nil {
				return err
			}
			out = protowire.AppendBytes(protowire.AppendTag(out, f.num, f.typ), message)
		}
		return nil
	})
	return out, err
}

// wireDocument edits a value in the protobuf envelope. The rules of reading are
// those of the generated decoders in k8s.io/api: of a repeated scalar the last
// occurrence counts, repeated embedded messages are merged in order, of equal
// map keys the last counts; of a repeated raw only the last counts.
type wireDocument struct{ data []byte }

// place is an occurrence of a field inside nested messages.
type place struct {
	wireField
	chain []wireField // the enclosing messages, outermost first
}

func (d *wireDocument) bytes() []byte { return d.data }

// places returns every occurrence of the field at path inside raw in the order
// in which a decoder meets them; for the empty path raw itself.
func (d *wireDocument) places(path []protowire.Number) ([]place, error) {
	fields, err := scan(d.data, len(protobufMagic), len(d.data))
	if err != nil {
		return nil, err
	}
	for _, f := range slices.Backward(fields) {
		if f.num == rawField && f.typ == bytesType {
			return d.walk(nil, place{wireField: f}, path)
		}
	}
	return nil, errors.New("the envelope is empty")
}

func (d *wireDocument) walk(found []place, in place, path []protowire.Number) ([]place, error) {
	if len(path) == 0 {
		return append(found, in), nil
	}
	if in.typ != bytesType {
		return nil, fmt.Errorf("field %d is not a message", in.num)
	}
	chain := append(slices.Clip(in.chain), in.wireField)
	err := each(d.data, in.value, in.end, func(f wireField) (err error) {
		if f.num == path[0] {
			found, err = d.walk(found, place{f, chain}, path[1:])
		}
		return err
	})
	return found, err
}

// splice replaces data[from:to], which lies in the messages of chain, and
// corrects the length of each of them.
func (d *wireDocument) splice(chain []wireField, from, to int, with []byte) {
	lengths := make([][]byte, len(chain))
	grown := len(with) - (to - from)
	for i, m := range slices.Backward(chain) {
		lengths[i] = protowire.AppendVarint(nil, uint64(m.end-m.value+grown))
		grown += len(lengths[i]) - (m.value - m.length)
	}
	out := make([]byte, 0, len(d.data)+grown)
	at := 0
	for i, m := range chain {
		out = append(append(out, d.data[at:m.length]...), lengths[i]...)
		at = m.value
	}
	out = append(append(out, d.data[at:from]...), with...)
	d.data = append(out, d.data[to:]...)
}

// add puts a new field into the message at parent, making the message where it
// is missing. It goes where a generated encoder would have put it, so that
// removing and adding again gives the same bytes.
func (d *wireDocument) add(parent []protowire.Number, num protowire.Number, field []byte) error {
	parents, err := d.places(parent)
	if err != nil {
		return err
	}
	if len(parents) == 0 {
		last := len(parent) - 1
		message := protowire.AppendTag(nil, parent[last], bytesType)
		return d.add(parent[:last], parent[last], protowire.AppendBytes(message, field))
	}
	return d.addTo(parents[len(parents)-1], num, field)
}

// addTo is add for a message that is there.
func (d *wireDocument) addTo(p place, num protowire.Number, field []byte) error {
	if p.typ != bytesType {
		return fmt.Errorf("field %d is not a message", p.num)
	}
	fields, err := scan(d.data, p.value, p.end)
	if err != nil {
		return err
	}
	at := p.value
	for _, f := range fields {
		if f.num < num {
			at = f.end
		}
	}
	d.splice(append(slices.Clip(p.chain), p.wireField), at, at, field)
	return nil
}

// occurrences returns every place of a field, and of those of a map only the
// ones with the key entry.
func (d *wireDocument) occurrences(f Field) ([]place, error) {
	if len(f.Wire) == 0 {
		return nil, undecodable("%s has no known place in protobuf", pathString(f.JSON, ""))
	}
	found, err := d.places(f.Wire)
	if err != nil {
		return nil, undecodable("the stored object is damaged: %v", err)
	}
	for _, p := range found {
		if p.typ != wireType(f) {
			return nil, undecodable("%s has wire type %d, not %d", pathString(f.JSON, ""), p.typ, wireType(f))
		}
	}
	return found, nil
}

func wireType(f Field) protowire.Type {
	if f.Type == Int || f.Type == Bool {
		return protowire.VarintType
	}
	return bytesType
}

// matching narrows the occurrences of a map to those with the key entry, and of
// what is named to those in the one element of that name.
func (d *wireDocument) matching(all []place, f Field, entry string) ([]place, error) {
	var found []place
	switch f.Type {
	case Map:
	case Named:
		element, err := d.element(f, entry)
		if err != nil || element == nil {
			return nil, err
		}
		for _, p := range all {
			if p.chain[len(p.chain)-1].start == element.start {
				found = append(found, p)
			}
		}
		return found, nil
	default:
		return all, nil
	}
	for _, p := range all {
		key, _, err := mapEntry(d.data[p.value:p.end])
		if err != nil {
			return nil, undecodable("%s is damaged: %v", pathString(f.JSON, ""), err)
		}
		if string(key) == entry {
			found = append(found, p)
		}
	}
	return found, nil
}

// named returns the elements of the list that a named field lies in, and their names.
func (d *wireDocument) named(f Field) (all []place, names []string, err error) {
	if len(f.Wire) < 2 {
		return nil, nil, undecodable("%s has no known place in protobuf", pathString(f.JSON, ""))
	}
	if all, err = d.places(f.Wire[:1]); err != nil {
		return nil, nil, undecodable("the stored object is damaged: %v", err)
	}
	for _, p := range all {
		if p.typ != bytesType {
			return nil, nil, undecodable("%s is not made of messages", pathString(f.JSON[:1], ""))
		}
		name, err := nameOf(d.data[p.value:p.end])
		if err != nil {
			return nil, nil, undecodable("%s is damaged: %v", pathString(f.JSON[:1], ""), err)
		}
		names = append(names, name)
	}
	return all, names, nil
}

// nameOf reads field 1 of an element, the last one of it.
func nameOf(message []byte) (name string, err error) {
	err = each(message, 0, len(message), func(f wireField) error {
		if f.num == 1 && f.typ != bytesType {
			return errors.New("a name is not a string")
		}
		if f.num == 1 {
			name = string(message[f.value:f.end])
		}
		return nil
	})
	return name, err
}

func (d *wireDocument) names(f Field) ([]string, error) {
	_, names, err := d.named(f)
	return names, err
}

// element returns the one element of that name; nil where there is none.
func (d *wireDocument) element(f Field, name string) (*place, error) {
	all, names, err := d.named(f)
	at := slices.Index(names, name)
	if err != nil || at < 0 {
		return nil, err
	}
	if slices.Contains(names[at+1:], name) {
		return nil, twice(f, name)
	}
	return &all[at], nil
}

// mapEntry reads an entry of a map of strings: key=1, value=2, absent is empty.
func mapEntry(message []byte) (key, value []byte, err error) {
	fields, err := scan(message, 0, len(message))
	if err != nil {
		return nil, nil, err
	}
	for _, f := range fields {
		if f.num > 2 {
			continue
		}
		if f.typ != bytesType {
			return nil, nil, errors.New("a map entry is not made of strings")
		}
		if f.num == 1 {
			key = message[f.value:f.end]
		} else {
			value = message[f.value:f.end]
		}
	}
	return key, value, nil
}

func twice(f Field, name string) error {
	return undecodable("%s has %q twice", pathString(f.JSON[:1], ""), name)
}

func missing(f Field, name string) error {
	return fault.New(fault.Usage, "look at the object again", "there is no %s", pathString(f.JSON[:1], name))
}

func (d *wireDocument) get(f Field, entry string) (json.RawMessage, error) {
	found, err := d.occurrences(f)
	if err != nil {
		return nil, err
	}
	if found, err = d.matching(found, f, entry); err != nil || len(found) == 0 {
		return nil, err
	}
	last := found[len(found)-1]
	if f.keyed() {
		value := d.data[last.value:last.end]
		if f.Type == Map {
			_, value, _ = mapEntry(value)
		}
		if !utf8.Valid(value) {
			return nil, undecodable("%s is not text", f.path(entry))
		}
		return json.Marshal(string(value))
	}
	v, _ := protowire.ConsumeVarint(d.data[last.value:last.end])
	switch {
	case f.Type == Bool:
		return strconv.AppendBool(nil, v != 0), nil
	case slices.Equal(f.Wire, generation.Wire):
		return strconv.AppendInt(nil, int64(v), 10), nil
	}
	return strconv.AppendInt(nil, int64(int32(v)), 10), nil
}

func (d *wireDocument) set(f Field, entry string, value json.RawMessage) error {
	all, err := d.occurrences(f)
	if err != nil {
		return err
	}
	found, err := d.matching(all, f, entry)
	if err != nil {
		return err
	}
	if len(found) > maxRepeats {
		return undecodable("%s is stored %d times over", pathString(f.JSON, entry), len(found))
	}
	if isNull(value) {
		return d.unset(f, entry, found)
	}
	payload, err := wireValue(f, entry, value)
	if err != nil {
		return err
	}
	if len(found) > 0 {
		last := found[len(found)-1]
		d.splice(last.chain, last.length, last.end, payload)
		return nil
	}
	field := protowire.AppendTag(nil, f.Wire[len(f.Wire)-1], wireType(f))
	if f.Type == Named {
		element, err := d.element(f, entry)
		if err == nil && element == nil {
			err = missing(f, entry)
		}
		if err != nil {
			return err
		}
		return d.addTo(*element, f.Wire[1], append(field, payload...))
	}
	before := slices.IndexFunc(all, func(p place) bool {
		key, _, _ := mapEntry(d.data[p.value:p.end])
		return f.Type == Map && string(key) > entry
	})
	return d.insertBefore(f, all, before, append(field, payload...))
}

// unset removes the places from the last to the first. Each removal moves the
// ends of the messages around, so the rest is looked up again.
func (d *wireDocument) unset(f Field, entry string, found []place) error {
	for len(found) > 0 {
		last := found[len(found)-1]
		d.splice(last.chain, last.start, last.end, nil)
		all, err := d.occurrences(f)
		if err != nil {
			return err
		}
		if found, err = d.matching(all, f, entry); err != nil {
			return err
		}
	}
	return nil
}

// wireValue encodes a value as what follows the tag on the wire.
func wireValue(f Field, entry string, value json.RawMessage) ([]byte, error) {
	switch f.Type {
	case Int:
		v, err := strconv.ParseInt(string(value), 10, 64)
		if err != nil || (v != int64(int32(v)) && !slices.Equal(f.Wire, generation.Wire)) {
			return nil, undecodable("%s is not an integer of 32 bits", pathString(f.JSON, ""))
		}
		return protowire.AppendVarint(nil, uint64(v)), nil
	case Bool:
		return protowire.AppendVarint(nil, protowire.EncodeBool(string(value) == "true")), nil
	}
	var text string
	if err := json.Unmarshal(value, &text); err != nil {
		return nil, undecodable("%s is not a string", f.path(entry))
	}
	if f.Type == Named {
		return protowire.AppendString(nil, text), nil
	}
	message := protowire.AppendString(protowire.AppendTag(nil, 1, bytesType), entry)
	message = protowire.AppendString(protowire.AppendTag(message, 2, bytesType), text)
	return protowire.AppendBytes(nil, message), nil
}

// insertBefore puts a field in front of the occurrence of that number, or
// behind the last one, or where an encoder would put the first.
func (d *wireDocument) insertBefore(f Field, all []place, before int, field []byte) error {
	switch {
	case len(all) == 0:
		last := len(f.Wire) - 1
		if err := d.add(f.Wire[:last], f.Wire[last], field); err != nil {
			return undecodable("%s has no place: %v", pathString(f.JSON, ""), err)
		}
	case before < 0 || before >= len(all):
		last := all[len(all)-1]
		d.splice(last.chain, last.end, last.end, field)
	default:
		d.splice(all[before].chain, all[before].start, all[before].start, field)
	}
	return nil
}

func (d *wireDocument) elements(f Field) ([][]byte, error) {
	found, err := d.occurrences(f)
	if err != nil {
		return nil, err
	}
	elements := make([][]byte, len(found))
	for i, p := range found {
		elements[i] = d.data[p.start:p.end:p.end]
	}
	return elements, nil
}

// show decodes an element, tag included. The only lists with an edit row are
// those of subjects.
func (d *wireDocument) show(element []byte) (shown json.RawMessage, key string, err error) {
	fields, err := scan(element, 0, len(element))
	if err != nil {
		return nil, "", err
	}
	if len(fields) != 1 || fields[0].typ != bytesType {
		return nil, "", errors.New("not one message")
	}
	var s rbacv1.Subject
	if err := s.Unmarshal(element[fields[0].value:fields[0].end]); err != nil {
		return nil, "", err
	}
	shown, err = json.Marshal(s)
	return shown, string(shown), err
}

func (d *wireDocument) relist(f Field, gone []bool, insert []insertion) error {
	all, err := d.occurrences(f)
	if err != nil {
		return err
	}
	for _, in := range insert {
		fields, err := scan(in.element, 0, len(in.element))
		if err != nil || len(fields) != 1 || fields[0].typ != bytesType || fields[0].num != f.Wire[len(f.Wire)-1] {
			return undecodable("an element of %s to put back is not whole", pathString(f.JSON, ""))
		}
	}
	var out []byte
	put := func(before int) {
		for ; len(insert) > 0 && insert[0].before <= before; insert = insert[1:] {
			out = append(out, insert[0].element...)
		}
	}
	if len(all) == 0 {
		put(0)
		return d.insertBefore(f, nil, 0, out)
	}
	first, last := all[0], all[len(all)-1]
	at := first.start
	for i, p := range all {
		// Lists lie directly in raw, of which there is one.
		if p.chain[len(p.chain)-1].start != first.chain[len(first.chain)-1].start {
			return undecodable("%s is stored in pieces", pathString(f.JSON, ""))
		}
		out = append(out, d.data[at:p.start]...)
		put(i)
		if !gone[i] {
			out = append(out, d.data[p.start:p.end]...)
		}
		at = p.end
	}
	put(len(all))
	d.splice(first.chain, first.start, last.end, out)
	return nil
}

// target is an edited field, by its path from the message that is compared.
type target struct {
	path  []protowire.Number
	field Field
	entry string
}

// sameBeside reports whether two messages have the same bytes in the same order
// apart from the targets. A message that was made to hold a target counts as
// empty before. Elements of an edited list are not compared.
func sameBeside(a, b []byte, targets []target) bool {
	restA, innerA, okA := setApart(a, targets)
	restB, innerB, okB := setApart(b, targets)
	if !okA || !okB || !bytes.Equal(restA, restB) {
		return false
	}
	for num, messages := range innerB {
		before := innerA[num]
		if before == nil && len(messages) == 1 {
			before = [][]byte{nil}
		}
		if len(before) != len(messages) {
			return false
		}
		delete(innerA, num)
		var below []target
		for _, t := range targets {
			if t.path[0] == num {
				below = append(below, target{t.path[1:], t.field, t.entry})
			}
		}
		for i := range messages {
			if !sameBeside(before[i], messages[i], below) {
				return false
			}
		}
	}
	return len(innerA) == 0
}

// setApart splits a message into the bytes that no target touches and the
// messages that hold targets.
func setApart(message []byte, targets []target) (rest []byte, inner map[protowire.Number][][]byte, ok bool) {
	inner = map[protowire.Number][][]byte{}
	err := each(message, 0, len(message), func(f wireField) error {
		touched := false
		for _, t := range targets {
			if t.path[0] != f.num {
				continue
			}
			if len(t.path) == 2 && t.field.Type == Named {
				// Only the element of that name holds the target.
				if name, err := nameOf(message[f.value:f.end]); err != nil || name != t.entry {
					continue
				}
			}
			if len(t.path) > 1 {
				inner[f.num] = append(inner[f.num], message[f.value:f.end])
				touched = true
				break
			}
			key, _, _ := mapEntry(message[f.value:f.end])
			touched = touched || t.field.Type != Map || string(key) == t.entry
		}
		if !touched {
			rest = append(rest, message[f.start:f.end]...)
		}
		return nil
	})
	return rest, inner, err == nil
}
