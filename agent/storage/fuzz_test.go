package storage

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	kubescheme "k8s.io/client-go/kubernetes/scheme"
	kjson "sigs.k8s.io/json"

	"github.com/halligan-io/halligan/internal/fault"
)

// seeds are small objects of all kinds that have edit rows, with the odd
// layouts that the tests hold against the generated decoders.
func seeds(t testing.TB) [][]byte {
	t.Helper()
	three := int32(3)
	meta := message(1, text(1, "web"), text(3, "shop"), varint(7, 4))
	entry := message(7, text(1, "halligan.io/stopped"), text(2, "1"))
	all := [][]byte{
		encode(t, deployment(&three)), encode(t, binding("a", "b")),
		envelope("apps/v1", "Deployment", meta, message(2, varint(1, 3)), message(2, varint(1, 5))),
		envelope("apps/v1", "DaemonSet", meta, message(2, message(2, message(2, entry, entry)))),
		envelope("apps/v1", "DaemonSet"),
		[]byte(head + `,"spec":{"replicas":3,"nodeSelector":{"a":"b"}}}`),
		[]byte(`{"apiVersion":"apps/v1","kind":"Deployment","spec":{"replicas":1}}`),
		[]byte("k8s:enc:aescbc:v1:key:"), []byte("\xd9\xd9\xf7\xa0"),
	}
	for name, plain := range corpus(t, ".pb") {
		if o, err := Decode(plain); err == nil && strings.HasPrefix(name, "HEAD/") && len(plain) < 2500 {
			if k := nativeRow(o); k != nil && len(k.Fields) > 0 {
				all = append(all, plain)
			}
		}
	}
	return all
}

func FuzzDecode(f *testing.F) {
	for _, plain := range seeds(f) {
		f.Add(plain)
	}
	f.Fuzz(func(t *testing.T, plain []byte) {
		o, err := Decode(plain)
		if err != nil {
			if o != nil || !fault.Is(err, fault.Undecodable) {
				t.Fatalf("%v, %v", o, err)
			}
			return
		}
		o.State()
		text, _, err := o.JSON()
		if err == nil {
			if !json.Valid(text) {
				t.Fatalf("not JSON: %q", text)
			}
			if _, err := Redact(text); err != nil {
				t.Fatalf("%q: %v", text, err)
			}
		}
		k := nativeRow(o)
		if k == nil {
			return
		}
		obj, _, typedErr := protobuf.NewSerializer(kubescheme.Scheme, kubescheme.Scheme).Decode(plain, nil, nil)
		for _, field := range editable(k, o) {
			switch field.Type {
			case Int:
				_, _, _ = o.Int(field)
			case Bool:
				_, _, _ = o.Bool(field)
			case Map:
				_, _, _ = o.Entry(field, "a")
			case List:
				_, _ = o.Subjects(field)
			}
			if o.Format == Protobuf && typedErr == nil && obj != nil {
				readAgrees(t, o, field)
			}
		}
	})
}

// readAgrees fails where a field is read as other than its typed value. Not to
// read it at all is allowed: the generated decoders take more than they should.
func readAgrees(t *testing.T, o *Object, f Field) {
	t.Helper()
	object, known, err := o.decoded()
	if err != nil || !known {
		return
	}
	if f.Type == Named {
		names, err := o.Names(f)
		if err != nil {
			return
		}
		for _, name := range names {
			got, present, err := o.Entry(f, name)
			element := elementOf(object, f.JSON[0], name)
			if w, _ := element[f.JSON[1]].(string); err == nil && present && element != nil && got != w {
				t.Fatalf("%v of %q is %q, want %q", f.JSON, name, got, w)
			}
		}
		return
	}
	for _, step := range f.JSON[:len(f.JSON)-1] {
		object, _ = object[step].(map[string]any)
	}
	want := object[f.JSON[len(f.JSON)-1]]
	switch f.Type {
	case Int:
		got, _, err := o.Int(f)
		n, _ := want.(json.Number)
		if w, _ := n.Int64(); err == nil && got != w {
			t.Fatalf("%v is %d, want %v", f.JSON, got, want)
		}
	case Bool:
		got, _, err := o.Bool(f)
		if w, _ := want.(bool); err == nil && got != w {
			t.Fatalf("%v is %v, want %v", f.JSON, got, want)
		}
	case Map:
		entries, _ := want.(map[string]any)
		for key, w := range entries {
			if got, present, err := o.Entry(f, key); err == nil && present && got != w {
				t.Fatalf("%v[%s] is %q, want %q", f.JSON, key, got, w)
			}
		}
	case List:
		subjects, err := o.Subjects(f)
		if list, _ := want.([]any); err == nil && len(subjects) != len(list) {
			t.Fatalf("%v are %v, want %v", f.JSON, subjects, want)
		}
	}
}

// fuzzedEdit picks an edit of a field by two fuzzed numbers.
func fuzzedEdit(name FieldName, f Field, value int64, index uint8) Edit {
	edit := Edit{Field: name}
	switch f.Type {
	case Int:
		edit.Value = int64(int32(value))
	case Bool:
		edit.Value = value > 0
	case Map:
		edit.Entry = "halligan.io/stopped"
		edit.Value = "true"
	case List:
		edit.Index = int(index)
	case Named:
		edit.Entry, edit.Value = "nameValue", "Ignore"
	}
	if value == -7 {
		edit.Value = nil
	}
	return edit
}

func FuzzApplyProtobuf(f *testing.F) {
	for i, plain := range seeds(f) {
		f.Add(plain, int64(i)-7, uint8(i))
	}
	f.Fuzz(func(t *testing.T, plain []byte, value int64, index uint8) {
		o, err := Decode(plain)
		if err != nil || o.Format != Protobuf {
			return
		}
		k := nativeRow(o)
		if k == nil {
			return
		}
		for name, field := range editable(k, o) {
			edit := fuzzedEdit(name, field, value, index)
			out, changes, err := k.Apply(plain, edit)
			if err != nil {
				continue
			}
			if len(changes) == 0 {
				// Nothing was to be done, so nothing was checked.
				if string(out) != string(plain) {
					t.Fatalf("%+v: changed without a change", edit)
				}
				continue
			}
			want := expected(t, plain, field, edit, k.counts(o) && (field.JSON[0] == "spec" || field.Type == Named))
			// As JSON, since text that is not UTF-8 does not survive in want.
			got, _ := json.Marshal(typedOracle(t, out))
			if want, _ := json.Marshal(want); !same(got, want) {
				t.Fatalf("%+v: got\n%s\nwant\n%s", edit, got, want)
			}
			back, _, err := k.Revert(out, changes)
			if err != nil {
				t.Fatalf("%+v: revert: %v", edit, err)
			}
			if string(reencoded(t, typedOracle(t, setGeneration(t, back, o.Meta.Generation)))) != string(reencoded(t, typedOracle(t, setGeneration(t, plain, o.Meta.Generation)))) {
				t.Fatalf("%+v: revert gives another object", edit)
			}
		}
	})
}

func FuzzApplyJSON(f *testing.F) {
	for i, plain := range seeds(f) {
		f.Add(plain, int64(i)-7)
	}
	for i, spec := range []string{`{"replicas":1e400}`, `{"z":9007199254740993,"a":[1,{"b":null}]}`, `null`, `{"\u0072eplicas":3,"replicas":4}`, `{"nodeSelector":{"a":"\ud800"}}`} {
		f.Add([]byte(head+`,"spec":`+spec+`}`), int64(i))
	}
	k := customKind("spec", "replicas")
	f.Fuzz(func(t *testing.T, plain []byte, value int64) {
		for name, field := range k.Fields {
			edit := fuzzedEdit(name, field, value, 0)
			out, changes, err := k.Apply(plain, edit)
			if err != nil {
				continue
			}
			var before, after map[string]any
			if err := kjson.UnmarshalCaseSensitivePreserveInts(plain, &before); err != nil {
				// Such as a number beyond float64, which only a decoder into
				// raw numbers takes.
				v, _ := generic(plain)
				before = v.(map[string]any)
				v, _ = generic(out)
				after = v.(map[string]any)
			} else if strict, err := kjson.UnmarshalStrict(out, &after); err != nil || len(strict) > 0 {
				t.Fatalf("%+v: %v, %v", edit, strict, err)
			}
			back, _, err := k.Revert(out, changes)
			if err != nil {
				t.Fatalf("%+v: revert: %v", edit, err)
			}
			restored, err := generic(back)
			if err != nil {
				t.Fatal(err)
			}
			original, _ := generic(plain)
			forget(before, field, edit.Entry)
			forget(after, field, edit.Entry)
			if !reflect.DeepEqual(before, after) {
				t.Fatalf("%+v: %q became %q", edit, plain, out)
			}
			if len(changes) == 0 {
				continue
			}
			forget(restored, Field{JSON: nil}, "")
			forget(original, Field{JSON: nil}, "")
			if !reflect.DeepEqual(restored, original) {
				t.Fatalf("%+v: %q reverted is %q", edit, plain, back)
			}
		}
	})
}

// forget removes the generation, the field, and what is empty without it.
func forget(object any, f Field, entry string) {
	root, _ := object.(map[string]any)
	unset(root, generation.JSON)
	prune(root, []string{"metadata"})
	if f.JSON != nil {
		unset(root, jsonPath(f, entry))
	}
	prune(root, []string{"spec", "nodeSelector"})
}
