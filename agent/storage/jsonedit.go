package storage

import (
	"bytes"
	"encoding/json"
	"slices"
)

// jsonNode is a JSON value by its offsets: data[start:end].
type jsonNode struct {
	start, end int
	kind       byte // '{', '[' or 0
	members    []jsonMember
	items      []jsonNode
}

// jsonMember is a member of an object; its key's quote is at start.
type jsonMember struct {
	start int
	key   string
	value jsonNode
}

// member returns the index of the last member with the key, the one that Go's
// decoders and so the API server see; -1 for none.
func (n *jsonNode) member(key string) int {
	for i, m := range slices.Backward(n.members) {
		if m.key == key {
			return i
		}
	}
	return -1
}

// unique reports whether no object in n has a key twice.
func (n *jsonNode) unique() bool {
	seen := make(map[string]bool, len(n.members))
	for i := range n.members {
		m := &n.members[i]
		if seen[m.key] || !m.value.unique() {
			return false
		}
		seen[m.key] = true
	}
	for i := range n.items {
		if !n.items[i].unique() {
			return false
		}
	}
	return true
}

// jsonDocument edits JSON by replacing byte ranges, so that the order of keys,
// the spelling of numbers and everything else stay as they are. The offsets
// come from encoding/json's own tokenizer. github.com/tidwall/sjson v1.2.7 was
// tried and does not hold: of a repeated key it changes the first where
// decoders see the last, it edits what is not JSON, it puts an object in the
// place of a string, makes arrays of keys that are digits, and leaves keys such
// as a|b unchanged without an error.
type jsonDocument struct {
	data []byte
	root jsonNode
}

func openJSON(data []byte) (*jsonDocument, error) {
	// Valid also bounds the depth that parseJSON recurses to, at 10,000.
	if !json.Valid(data) {
		return nil, undecodable("the stored value is not valid JSON")
	}
	p := jsonParser{data: data, tokens: json.NewDecoder(bytes.NewReader(data))}
	p.tokens.UseNumber()
	root, err := p.value()
	if err != nil || root.kind != '{' {
		return nil, undecodable("the stored value is not a JSON object")
	}
	return &jsonDocument{data, root}, nil
}

type jsonParser struct {
	data   []byte
	tokens *json.Decoder
}

// next returns the offset at which the next token begins.
func (p *jsonParser) next() int {
	at := int(p.tokens.InputOffset())
	for at < len(p.data) && bytes.IndexByte([]byte(" \t\r\n,:"), p.data[at]) >= 0 {
		at++
	}
	return at
}

func (p *jsonParser) value() (jsonNode, error) {
	n := jsonNode{start: p.next()}
	token, err := p.tokens.Token()
	if err != nil {
		return n, err
	}
	if open, ok := token.(json.Delim); ok {
		n.kind = byte(open)
		for p.tokens.More() {
			m := jsonMember{start: p.next()}
			if n.kind == '{' {
				token, err := p.tokens.Token()
				if err != nil {
					return n, err
				}
				m.key, _ = token.(string)
			}
			if m.value, err = p.value(); err != nil {
				return n, err
			}
			if n.kind == '{' {
				n.members = append(n.members, m)
			} else {
				n.items = append(n.items, m.value)
			}
		}
		if _, err := p.tokens.Token(); err != nil {
			return n, err
		}
	}
	n.end = int(p.tokens.InputOffset())
	return n, nil
}

func (d *jsonDocument) bytes() []byte { return d.data }

func (d *jsonDocument) text(n *jsonNode) json.RawMessage { return d.data[n.start:n.end] }

// find goes down the path as far as objects reach. It returns the last node
// reached and how many steps of the path remain below it. A null on the way is
// reached, but nothing is below it.
func (d *jsonDocument) find(path []string) (n *jsonNode, rest []string, err error) {
	return d.findIn(&d.root, path)
}

func (d *jsonDocument) findIn(n *jsonNode, path []string) (_ *jsonNode, rest []string, err error) {
	for i, key := range path {
		if n.kind != '{' {
			if isNull(d.text(n)) {
				return n, path[i:], nil
			}
			return nil, nil, undecodable("%s is not an object", pathString(path[:i], ""))
		}
		j := n.member(key)
		if j < 0 {
			return n, path[i:], nil
		}
		n = &n.members[j].value
	}
	return n, nil, nil
}

func jsonPath(f Field, entry string) []string {
	if f.Type == Map {
		return append(slices.Clone(f.JSON), entry)
	}
	return f.JSON
}

// place returns the node that a field's path begins at, and that path. The node is
// nil where there is no element of the name.
func (d *jsonDocument) place(f Field, entry string) (*jsonNode, []string, error) {
	if f.Type != Named {
		return &d.root, jsonPath(f, entry), nil
	}
	names, err := d.names(f)
	at := slices.Index(names, entry)
	if err != nil || at < 0 {
		return nil, nil, err
	}
	if slices.Contains(names[at+1:], entry) {
		return nil, nil, twice(f, entry)
	}
	list, err := d.list(Field{Type: List, JSON: f.JSON[:1]})
	if err != nil {
		return nil, nil, err
	}
	return &list.items[at], f.JSON[1:], nil
}

func (d *jsonDocument) names(f Field) (names []string, err error) {
	list, err := d.list(Field{Type: List, JSON: f.JSON[:1]})
	if list == nil {
		return nil, err
	}
	for i := range list.items {
		n, name := &list.items[i], ""
		if at := n.member("name"); n.kind == '{' && at >= 0 {
			if json.Unmarshal(d.text(&n.members[at].value), &name) != nil {
				return nil, undecodable("a name in %s is not a string", pathString(f.JSON[:1], ""))
			}
		}
		names = append(names, name)
	}
	return names, nil
}

func (d *jsonDocument) get(f Field, entry string) (json.RawMessage, error) {
	in, path, err := d.place(f, entry)
	if in == nil || err != nil {
		return nil, err
	}
	n, rest, err := d.findIn(in, path)
	if err != nil || len(rest) > 0 {
		return nil, err
	}
	text := bytes.Clone(d.text(n))
	if isNull(text) {
		return text, nil
	}
	var value any
	switch f.Type {
	case Int:
		value = new(int64)
	case Bool:
		value = new(bool)
	default:
		value = new(string)
	}
	if err := json.Unmarshal(text, value); err != nil {
		return nil, undecodable("%s has the wrong JSON type", pathString(f.JSON, entry))
	}
	return text, nil
}

func (d *jsonDocument) replace(from, to int, with []byte) error {
	edited, err := openJSON(slices.Concat(d.data[:from], with, d.data[to:]))
	if err != nil {
		return err
	}
	*d = *edited
	return nil
}

func (d *jsonDocument) set(f Field, entry string, value json.RawMessage) error {
	in, path, err := d.place(f, entry)
	if err == nil && in == nil {
		err = missing(f, entry)
	}
	if err != nil {
		return err
	}
	n, rest, err := d.findIn(in, path)
	if err != nil {
		return err
	}
	switch {
	case value == nil && len(rest) > 0:
		return nil
	case value == nil:
		parent, _, err := d.findIn(in, path[:len(path)-1])
		if err != nil {
			return err
		}
		i := parent.member(path[len(path)-1])
		from, to := cut(i, len(parent.members), func(i int) (int, int) {
			return parent.members[i].start, parent.members[i].value.end
		})
		return d.replace(from, to, nil)
	case len(rest) == 0:
		return d.replace(n.start, n.end, value)
	}
	for _, key := range slices.Backward(rest[1:]) {
		value = slices.Concat([]byte("{"), quote(key), []byte(":"), value, []byte("}"))
	}
	member := slices.Concat(quote(rest[0]), []byte(":"), value)
	if n.kind != '{' {
		return d.replace(n.start, n.end, slices.Concat([]byte("{"), member, []byte("}")))
	}
	// Keys that are sorted, as those of all custom resources are, stay sorted.
	at := len(n.members)
	if slices.IsSortedFunc(n.members, func(a, b jsonMember) int { return bytes.Compare([]byte(a.key), []byte(b.key)) }) {
		at = slices.IndexFunc(n.members, func(m jsonMember) bool { return m.key > rest[0] })
	}
	return d.put(n, at, len(n.members), member, func(i int) (int, int) {
		return n.members[i].start, n.members[i].value.end
	})
}

// put inserts a member or item before the one with index at, at the end if
// there is none.
func (d *jsonDocument) put(in *jsonNode, at, count int, text []byte, span func(int) (from, to int)) error {
	switch {
	case count == 0:
		return d.replace(in.start+1, in.start+1, text)
	case at < 0 || at >= count:
		_, end := span(count - 1)
		return d.replace(end, end, append([]byte(","), text...))
	}
	start, _ := span(at)
	return d.replace(start, start, append(text, ','))
}

// cut returns the bytes to remove with member or item i, one comma included.
func cut(i, count int, span func(int) (from, to int)) (from, to int) {
	from, to = span(i)
	switch {
	case i+1 < count:
		to, _ = span(i + 1)
	case i > 0:
		_, from = span(i - 1)
	}
	return from, to
}

// quote never fails: a string always has a JSON form.
func quote(s string) []byte {
	text, _ := json.Marshal(s)
	return text
}

// list returns the array at the field; nil where it is absent or null.
func (d *jsonDocument) list(f Field) (*jsonNode, error) {
	n, rest, err := d.find(f.JSON)
	switch {
	case err != nil:
		return nil, err
	case len(rest) > 0 || isNull(d.text(n)):
		return nil, nil
	case n.kind != '[':
		return nil, undecodable("%s is not a list", pathString(f.JSON, ""))
	}
	return n, nil
}

func (d *jsonDocument) elements(f Field) ([][]byte, error) {
	n, err := d.list(f)
	if n == nil {
		return nil, err
	}
	elements := make([][]byte, len(n.items))
	for i := range n.items {
		elements[i] = d.text(&n.items[i])
	}
	return elements, nil
}

func (d *jsonDocument) show(element []byte) (shown json.RawMessage, key string, err error) {
	v, err := generic(element)
	if err != nil {
		return nil, "", err
	}
	text, err := json.Marshal(v) // with the members of objects sorted
	return element, string(text), err
}

func (d *jsonDocument) relist(f Field, gone []bool, insert []insertion) error {
	for _, in := range insert {
		if !json.Valid(in.element) {
			return undecodable("an element of %s to put back is not whole", pathString(f.JSON, ""))
		}
	}
	n, err := d.list(f)
	if err != nil {
		return err
	}
	if n == nil {
		elements := make([][]byte, len(insert))
		for i, in := range insert {
			elements[i] = in.element
		}
		list := slices.Concat([]byte("["), bytes.Join(elements, []byte(",")), []byte("]"))
		return d.set(Field{Type: List, JSON: f.JSON}, "", list)
	}

	// What is between two elements goes with the first of them. Where that is
	// none of the old ones, or the last, a comma is put.
	head, tail := n.start+1, n.start+1
	if len(n.items) > 0 {
		head, tail = n.items[0].start, n.items[len(n.items)-1].end
	}
	out := bytes.Clone(d.data[n.start:head])
	between := []byte(nil)
	put := func(text, after []byte) {
		out = append(append(out, between...), text...)
		between = after
	}
	comma := []byte(",")
	kept := 0
	for _, g := range gone {
		if !g {
			kept++
		}
	}
	for i := 0; i <= len(n.items); i++ {
		for ; len(insert) > 0 && insert[0].before <= i; insert = insert[1:] {
			if kept == 0 && between != nil {
				between = comma
			}
			put(insert[0].element, comma)
		}
		if i == len(n.items) || gone[i] {
			continue
		}
		kept--
		after := comma
		if i+1 < len(n.items) {
			after = d.data[n.items[i].end:n.items[i+1].start]
		}
		put(d.text(&n.items[i]), after)
	}
	return d.replace(n.start, n.end, append(out, d.data[tail:n.end]...))
}
