package storage

import (
	"bytes"
	"encoding/json"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"

	"github.com/google/go-cmp/cmp"

	"github.com/halligan-io/halligan/internal/fault"
)

// corpusDir holds one serialized object of every type in k8s.io/api, for the
// current and several earlier releases.
var corpusDir = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/api").Output()
	return filepath.Join(strings.TrimSpace(string(out)), "testdata"), err
})

// corpus returns the files with the suffix of all releases, by release/name.
func corpus(t testing.TB, suffix string) map[string][]byte {
	t.Helper()
	dir, err := corpusDir()
	if err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(filepath.Join(dir, "*", "*"+suffix))
	if err != nil || len(names) == 0 {
		t.Fatalf("no corpus in the module k8s.io/api: %v", err)
	}
	files := map[string][]byte{}
	for _, name := range names {
		// What an object of an earlier release looks like to today's types goes
		// by a name of its own, which the suffix asks for.
		if strings.Contains(name, ".after_roundtrip.") != strings.HasPrefix(suffix, ".after_roundtrip.") {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		short, _ := filepath.Rel(dir, name)
		files[strings.TrimSuffix(short, suffix)] = text
	}
	return files
}

// nativeRow finds the row of an object among the built-in kinds.
func nativeRow(o *Object) *Kind {
	for i := range nativeKinds {
		if k := &nativeKinds[i]; o.checkKind(k) == nil {
			return k
		}
	}
	return nil
}

// editable are the names of the fields that o has edit rows for.
func editable(k *Kind, o *Object) map[FieldName]Field {
	fields := map[FieldName]Field{}
	for name := range k.Fields {
		if f, ok := k.Field(name, o.APIVersion); ok {
			fields[name] = f
		}
	}
	return fields
}

func wantFault(t *testing.T, err error, code fault.Code) {
	t.Helper()
	if !fault.Is(err, code) {
		t.Fatalf("error %v has code %q, want %q", err, fault.CodeOf(err), code)
	}
}

func TestCorpusDecodes(t *testing.T) {
	t.Parallel()
	texts, today := corpus(t, ".json"), corpus(t, ".after_roundtrip.json")
	decoded := 0
	for name, stored := range corpus(t, ".pb") {
		want, err := generic(texts[name])
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		object := want.(map[string]any)
		meta, ok := object["metadata"].(map[string]any)
		if !ok || meta["name"] == nil {
			continue // options and reviews, which are never stored
		}
		for format, plain := range map[Format][]byte{Protobuf: stored, JSON: texts[name]} {
			o, err := Decode(plain)
			if err != nil {
				t.Errorf("%s as %s: %v", name, format, err)
				continue
			}
			decoded++
			if o.Format != format || o.APIVersion != object["apiVersion"] || o.Kind != object["kind"] || o.Meta.Name != meta["name"] {
				t.Errorf("%s as %s is %s %s %q", name, format, o.APIVersion, o.Kind, o.Meta.Name)
			}
			text, note, err := o.JSON()
			if err != nil {
				t.Errorf("%s as %s: %v", name, format, err)
				continue
			}
			if !strings.HasPrefix(string(text), `{"apiVersion":`) {
				t.Errorf("%s as %s begins with %.40s", name, format, text)
			}
			if note != "" {
				if strings.HasPrefix(name, "HEAD/") && nativeRow(o) != nil {
					t.Errorf("%s: %s", name, note)
				}
				continue
			}
			got, err := generic(text)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			want := want
			if text, ok := today[name]; ok && format == Protobuf {
				if want, err = generic(text); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
			if !reflect.DeepEqual(want, got) {
				t.Errorf("%s as %s, -want +got:\n%s", name, format, cmp.Diff(want, got))
			}
			o.State()
		}
	}
	if decoded < 2*5*80 {
		t.Errorf("only %d objects of the corpus were decoded", decoded)
	}
}

// TestFieldsReadAsTyped compares each field that has an edit row with what the
// typed decoders make of the same bytes.
func TestFieldsReadAsTyped(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for name, plain := range corpus(t, ".pb") {
		o, err := Decode(plain)
		if err != nil {
			continue
		}
		k := nativeRow(o)
		if k == nil {
			continue
		}
		for field, f := range editable(k, o) {
			seen[k.Kind+"."+string(field)] = true
			checkRead(t, o, f, name)
		}
	}
	for i := range nativeKinds {
		for field := range nativeKinds[i].Fields {
			if id := nativeKinds[i].Kind + "." + string(field); !seen[id] {
				t.Errorf("no object of the corpus has %s", id)
			}
		}
	}
}

// checkRead reads a field and compares it with the object's generic form.
func checkRead(t *testing.T, o *Object, f Field, name string) {
	t.Helper()
	object, known, err := o.decoded()
	if err != nil || !known {
		t.Fatalf("%s: known %v, %v", name, known, err)
	}
	for _, step := range f.JSON[:len(f.JSON)-1] {
		object, _ = object[step].(map[string]any)
	}
	want := object[f.JSON[len(f.JSON)-1]]
	switch f.Type {
	case Int:
		got, present, err := o.Int(f)
		n, _ := want.(json.Number)
		w, _ := n.Int64()
		// Go's types leave some zeros out.
		if err != nil || got != w || (want != nil && !present) {
			t.Errorf("%s: %v is %d, %v, %v; want %v", name, f.JSON, got, present, err, want)
		}
	case Bool:
		got, present, err := o.Bool(f)
		w, _ := want.(bool)
		if err != nil || got != w || (want != nil && !present) {
			t.Errorf("%s: %v is %v, %v, %v; want %v", name, f.JSON, got, present, err, want)
		}
	case Map:
		entries, _ := want.(map[string]any)
		for key, w := range entries {
			if got, present, err := o.Entry(f, key); err != nil || !present || got != w {
				t.Errorf("%s: %v[%s] is %q, %v, %v; want %q", name, f.JSON, key, got, present, err, w)
			}
		}
		if got, present, err := o.Entry(f, "not there"); err != nil || present || got != "" {
			t.Errorf("%s: absent entry is %q, %v, %v", name, got, present, err)
		}
	case List:
		got, err := o.Subjects(f)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var typed []rbacv1.Subject
		text, _ := json.Marshal(want)
		if err := json.Unmarshal(text, &typed); err != nil {
			t.Fatal(err)
		}
		for i := range typed {
			// v1alpha1 has apiVersion where the others have apiGroup.
			if i >= len(got) || got[i].Kind != typed[i].Kind || got[i].Name != typed[i].Name || got[i].Namespace != typed[i].Namespace {
				t.Errorf("%s: subjects are %v, want %v", name, got, typed)
				break
			}
		}
		if len(got) != len(typed) {
			t.Errorf("%s: subjects are %v, want %v", name, got, typed)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	for name, plain := range map[string]string{
		"nothing":               "",
		"a digit":               "0",
		"a list":                "[]",
		"an empty object":       "{}",
		"no kind":               `{"apiVersion":"v1","metadata":{"name":"a"}}`,
		"half an object":        `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}`,
		"wrong metadata":        `{"apiVersion":"v1","kind":"Pod","metadata":[]}`,
		"magic only":            "k8s\x00",
		"magic cut":             "k8s",
		"encrypted":             "k8s:enc:aescbc:v1:key1:xxxxxxxxxxxxxxxx",
		"CBOR":                  "\xd9\xd9\xf7\xa1\x61a\x01",
		"raw is a number":       "k8s\x00\x0a\x0e\x0a\x02v1\x12\x03Pod\x10\x01",
		"field number 0":        "k8s\x00\x00\x00",
		"end of no group":       "k8s\x00\x0c",
		"length beyond the end": "k8s\x00\x12\xff\xff\xff\xff\x0f",
		"length overflows":      "k8s\x00\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
		"content encoding":      "k8s\x00\x0a\x09\x0a\x02v1\x12\x03Pod\x12\x02\x0a\x00\x1a\x04gzip",
		"content type":          "k8s\x00\x0a\x09\x0a\x02v1\x12\x03Pod\x12\x02\x0a\x00\x22\x10application/json",
		"metadata is a number":  "k8s\x00\x0a\x09\x0a\x02v1\x12\x03Pod\x12\x02\x08\x00",
	} {
		t.Run(name, func(t *testing.T) {
			o, err := Decode([]byte(plain))
			if o != nil {
				t.Errorf("decoded as %s %s", o.APIVersion, o.Kind)
			}
			wantFault(t, err, fault.Undecodable)
		})
	}
	_, err := Decode([]byte("\xd9\xd9\xf7\xa0"))
	if !strings.Contains(err.Error(), "CBOR") {
		t.Errorf("CBOR is refused with %q", err)
	}
}

func TestCheck(t *testing.T) {
	plain := []byte(`{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"web","namespace":"shop"}}`)
	o, err := Decode(plain)
	if err != nil {
		t.Fatal(err)
	}
	deployment := &Kind{Group: "apps", Kind: "Deployment"}
	if err := o.Check(deployment, "shop", "web"); err != nil {
		t.Error(err)
	}
	wantFault(t, o.Check(deployment, "shop", "other"), fault.Undecodable)
	wantFault(t, o.Check(deployment, "other", "web"), fault.Undecodable)
	wantFault(t, o.Check(&Kind{Group: "apps", Kind: "StatefulSet"}, "shop", "web"), fault.Undecodable)
	wantFault(t, o.Check(&Kind{Group: "batch", Kind: "Deployment"}, "shop", "web"), fault.Undecodable)
	wantFault(t, o.Check(&Kind{Kind: "Deployment"}, "shop", "web"), fault.Undecodable)

	// Objects that kept the group of an old release, and events, which two
	// groups share.
	for stored, group := range map[string]string{
		`{"apiVersion":"extensions/v1beta1","kind":"Deployment"}`: "apps",
		`{"apiVersion":"v1","kind":"Event"}`:                      "events.k8s.io",
		`{"apiVersion":"events.k8s.io/v1","kind":"Event"}`:        "",
	} {
		o, err := Decode([]byte(stored))
		if err != nil {
			t.Fatal(err)
		}
		if err := o.Check(&Kind{Group: group, Kind: o.Kind}, "", ""); err != nil {
			t.Error(err)
		}
	}
}

// TestTruncated cuts one object of every kind at every byte.
func TestTruncated(t *testing.T) {
	t.Parallel()
	for name, plain := range corpus(t, ".pb") {
		o, err := Decode(plain)
		if !strings.HasPrefix(name, "HEAD/") || err != nil {
			continue
		}
		k := nativeRow(o)
		if k == nil {
			continue
		}
		// Behind raw only the two empty fields of the envelope follow, whose
		// absence means the same.
		for n := range len(plain) - 4 {
			if _, err := Decode(plain[:n:n]); !fault.Is(err, fault.Undecodable) {
				t.Fatalf("%s cut to %d of %d bytes: %v", name, n, len(plain), err)
			}
		}
	}
	text := []byte(`{"apiVersion":"a.io/v1","kind":"A","metadata":{"name":"a"},"spec":{"replicas":1}}`)
	for n := range text {
		if _, err := Decode(text[:n:n]); !fault.Is(err, fault.Undecodable) {
			t.Fatalf("cut to %s: %v", text[:n], err)
		}
	}
}

func TestGarbage(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewSource(1))
	objects := corpus(t, ".pb")
	k := &Kind{Group: "apps", Version: "v1", Kind: "Deployment", Generation: true,
		Fields: map[FieldName]Field{Replicas: {Type: Int, JSON: []string{"spec", "replicas"}, Wire: numbers(2, 1)}}}
	for range 2000 {
		junk := make([]byte, random.Intn(64))
		random.Read(junk)
		for _, head := range []string{"", "k8s\x00", "{", "k8s\x00\x0a\x14\x0a\x07apps/v1\x12\x0aDeployment\x12"} {
			exercise(append([]byte(head), junk...), k)
		}
	}
	// A real object with random bytes overwritten.
	plain := objects["HEAD/apps.v1.Deployment"]
	for range 200 {
		broken := bytes.Clone(plain)
		for range 1 + random.Intn(4) {
			broken[random.Intn(len(broken))] = byte(random.Intn(256))
		}
		exercise(broken, k)
	}
}

// exercise calls everything that takes stored bytes; it must not panic.
func exercise(plain []byte, k *Kind) {
	o, err := Decode(plain)
	if err == nil {
		text, _, err := o.JSON()
		if err == nil {
			_, _ = Redact(text)
		}
		o.State()
	}
	out, changes, err := k.Apply(plain, Edit{Field: Replicas, Value: int64(3)})
	if err == nil {
		_, _, _ = k.Revert(out, changes)
	}
}
