package storage

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/halligan-io/halligan/internal/fault"
)

func customKind(path ...string) *Kind {
	return &Kind{Group: "example.io", Version: "v1", Kind: "Widget", Custom: true, Generation: true, Fields: map[FieldName]Field{
		Replicas:     {Type: Int, JSON: path},
		Suspend:      {Type: Bool, JSON: []string{"spec", "suspend"}},
		NodeSelector: {Type: Map, JSON: []string{"spec", "nodeSelector"}},
	}}
}

const head = `{"apiVersion":"example.io/v1","kind":"Widget","metadata":{"generation":7,"name":"w"}`

func TestJSONEdits(t *testing.T) {
	replicas := func(v any) Edit { return Edit{Field: Replicas, Value: v} }
	entry := func(v any) Edit { return Edit{Field: NodeSelector, Entry: "halligan.io/stopped", Value: v} }
	for name, c := range map[string]struct {
		path      string
		edit      Edit
		spec, out string // what follows the metadata
		changes   int
	}{
		"set":                 {"spec.replicas", replicas(int64(0)), `,"spec":{"replicas":3}}`, `,"spec":{"replicas":0}}`, 2},
		"same":                {"spec.replicas", replicas(int64(3)), `,"spec":{"replicas":3}}`, `,"spec":{"replicas":3}}`, 0},
		"white space":         {"spec.replicas", replicas(int64(0)), ",\n \"spec\" : {\t\"replicas\" : 3 }\r\n}\n", ",\n \"spec\" : {\t\"replicas\" : 0 }\r\n}\n", 2},
		"add sorted":          {"spec.replicas", replicas(int64(0)), `,"spec":{"a":1,"z":2}}`, `,"spec":{"a":1,"replicas":0,"z":2}}`, 2},
		"add unsorted":        {"spec.replicas", replicas(int64(0)), `,"spec":{"z":1,"a":2}}`, `,"spec":{"z":1,"a":2,"replicas":0}}`, 2},
		"add first":           {"spec.replicas", replicas(int64(0)), `,"spec":{"z":2}}`, `,"spec":{"replicas":0,"z":2}}`, 2},
		"add to nothing":      {"spec.replicas", replicas(int64(0)), `,"spec":{}}`, `,"spec":{"replicas":0}}`, 2},
		"no spec":             {"spec.replicas", replicas(int64(0)), `,"status":{}}`, `,"spec":{"replicas":0},"status":{}}`, 2},
		"null spec":           {"spec.replicas", replicas(int64(0)), `,"spec":null}`, `,"spec":{"replicas":0}}`, 2},
		"null":                {"spec.replicas", replicas(int64(0)), `,"spec":{"replicas":null}}`, `,"spec":{"replicas":0}}`, 2},
		"remove first":        {"spec.a", replicas(nil), `,"spec":{"a":1,"b":2}}`, `,"spec":{"b":2}}`, 2},
		"remove middle":       {"spec.b", replicas(nil), `,"spec":{"a":1,"b":2,"c":3}}`, `,"spec":{"a":1,"c":3}}`, 2},
		"remove last":         {"spec.b", replicas(nil), `,"spec":{"a":1, "b":2}}`, `,"spec":{"a":1}}`, 2},
		"remove only":         {"spec.b", replicas(nil), `,"spec":{"b":2}}`, `,"spec":{}}`, 2},
		"remove what is not":  {"spec.b", replicas(nil), `,"spec":{"a":1}}`, `,"spec":{"a":1}}`, 0},
		"remove below no one": {"spec.a.b", replicas(nil), `,"spec":null}`, `,"spec":null}`, 0},
		"nested":              {"spec.a.b", replicas(int64(4)), `,"spec":{"a":{"b":2},"b":2}}`, `,"spec":{"a":{"b":4},"b":2}}`, 2},
		"nested and missing":  {"spec.a.b.c", replicas(int64(4)), `,"spec":{}}`, `,"spec":{"a":{"b":{"c":4}}}}`, 2},
		"beyond 32 bits":      {"spec.replicas", replicas(int64(math.MaxInt64)), `,"spec":{"replicas":9007199254740993}}`, `,"spec":{"replicas":9223372036854775807}}`, 2},
		"numbers keep their spelling": {"spec.replicas", replicas(int64(0)),
			`,"spec":{"a":1e400,"b":9007199254740993,"c":1.0,"d":-0,"e":1E+2,"replicas":3,"z":0.10}}`,
			`,"spec":{"a":1e400,"b":9007199254740993,"c":1.0,"d":-0,"e":1E+2,"replicas":0,"z":0.10}}`, 2},
		"text keeps its escapes": {"spec.replicas", replicas(int64(0)),
			`,"spec":{"a":"\u00e9\/<>&\ud83d\ude00","replicas":3,"\u007a":"\u2028"}}`,
			`,"spec":{"a":"\u00e9\/<>&\ud83d\ude00","replicas":0,"\u007a":"\u2028"}}`, 2},
		"escaped key":            {"spec.replicas", replicas(int64(0)), `,"spec":{"\u0072eplicas":3}}`, `,"spec":{"\u0072eplicas":0}}`, 2},
		"case matters":           {"spec.replicas", replicas(int64(0)), `,"spec":{"Replicas":3}}`, `,"spec":{"Replicas":3,"replicas":0}}`, 2},
		"digits are a key":       {"spec.0", replicas(int64(1)), `,"spec":{}}`, `,"spec":{"0":1}}`, 2},
		"new entry":              {"spec.replicas", entry("true"), `,"spec":{"nodeSelector":{"a.b/c":"d"}}}`, `,"spec":{"nodeSelector":{"a.b/c":"d","halligan.io/stopped":"true"}}}`, 2},
		"new map":                {"spec.replicas", entry("true"), `,"spec":{}}`, `,"spec":{"nodeSelector":{"halligan.io/stopped":"true"}}}`, 2},
		"slash escaped":          {"spec.replicas", entry("<no>"), `,"spec":{"nodeSelector":{"halligan.io\/stopped":"d"}}}`, `,"spec":{"nodeSelector":{"halligan.io\/stopped":"\u003cno\u003e"}}}`, 2},
		"entry away":             {"spec.replicas", entry(nil), `,"spec":{"nodeSelector":{"halligan.io/stopped":"d"}}}`, `,"spec":{"nodeSelector":{}}}`, 2},
		"bool":                   {"spec.replicas", Edit{Field: Suspend, Value: true}, `,"spec":{"suspend":false}}`, `,"spec":{"suspend":true}}`, 2},
		"not confused by values": {"spec.replicas", replicas(int64(0)), `,"spec":{"a":"replicas\":1","b":["replicas",{"replicas":9}],"replicas":3}}`, `,"spec":{"a":"replicas\":1","b":["replicas",{"replicas":9}],"replicas":0}}`, 2},
	} {
		t.Run(name, func(t *testing.T) {
			k := customKind(strings.Split(c.path, ".")...)
			plain := []byte(head + c.spec)
			out, changes, err := k.Apply(plain, c.edit)
			if err != nil {
				t.Fatal(err)
			}
			want := head + c.out
			if c.changes > 0 {
				want = strings.Replace(want, `"generation":7`, `"generation":8`, 1)
			}
			if string(out) != want || len(changes) != c.changes {
				t.Fatalf("got  %s\nwant %s\n%+v", out, want, changes)
			}
			o := mustDecode(t, out)
			if v, present, err := o.Int(k.Fields[Replicas]); c.edit.Field == Replicas && (err != nil || present != (c.edit.Value != nil) || (present && v != c.edit.Value)) {
				t.Errorf("reads %d, %v, %v", v, present, err)
			}
			back, _, err := k.Revert(out, changes)
			if err != nil {
				t.Fatal(err)
			}
			wantBack := head + c.spec
			if c.changes > 0 {
				wantBack = strings.Replace(wantBack, `"generation":7`, `"generation":9`, 1)
			}
			// An object or map made to hold the value stays, empty. A member
			// that was not sorted in comes back at the end.
			if !strings.Contains(name, "no spec") && !strings.Contains(name, "null spec") && !strings.Contains(name, "missing") &&
				!strings.Contains(name, "new map") && name != "remove last" && string(back) != wantBack {
				t.Errorf("reverted %s\nwant     %s", back, wantBack)
			}
		})
	}
}

func TestJSONRefused(t *testing.T) {
	k := customKind("spec", "replicas")
	for name, spec := range map[string]string{
		"key twice":             `,"spec":{"replicas":3,"replicas":4}}`,
		"key twice, escaped":    `,"spec":{"replicas":3,"\u0072eplicas":4}}`,
		"key twice elsewhere":   `,"spec":{"replicas":3},"status":{"a":[{"b":1,"b":1}]}}`,
		"spec twice":            `,"spec":{"replicas":3},"spec":{"replicas":4}}`,
		"not an object":         `,"spec":"replicas"}`,
		"a list":                `,"spec":[3]}`,
		"text":                  `,"spec":{"replicas":"3"}}`,
		"fraction":              `,"spec":{"replicas":3.5}}`,
		"exponent":              `,"spec":{"replicas":1e400}}`,
		"beyond 64 bits":        `,"spec":{"replicas":9223372036854775808}}`,
		"an object":             `,"spec":{"replicas":{}}}`,
		"something behind":      `,"spec":{"replicas":3}}{}`,
		"leading zero":          `,"spec":{"replicas":03}}`,
		"deeper than 10,000":    `,"spec":{"replicas":3,"a":` + strings.Repeat("[", 10001) + strings.Repeat("]", 10001) + `}}`,
		"generation as text":    `,"spec":{"replicas":3},"metadata":{"generation":"7"}}`,
		"metadata of no object": `,"metadata":3}`,
	} {
		t.Run(name, func(t *testing.T) {
			out, _, err := k.Apply([]byte(head+spec), Edit{Field: Replicas, Value: int64(0)})
			wantFault(t, err, fault.Undecodable)
			if out != nil {
				t.Error("something was returned with the error")
			}
		})
	}
	o := mustDecode(t, []byte(head+`,"spec":{"replicas":"3","suspend":1,"nodeSelector":{"a":1}},"subjects":{}}`))
	if _, _, err := o.Int(k.Fields[Replicas]); err == nil {
		t.Error("text was read as an integer")
	}
	if _, _, err := o.Bool(k.Fields[Suspend]); err == nil {
		t.Error("a number was read as a boolean")
	}
	if _, _, err := o.Entry(k.Fields[NodeSelector], "a"); err == nil {
		t.Error("a number was read as text")
	}
	if _, err := o.Subjects(bindingKind.Fields[Subjects]); err == nil {
		t.Error("an object was read as a list")
	}
}

// TestNativeKindsAsJSON edits built-in kinds as --storage-media-type stores
// them.
func TestNativeKindsAsJSON(t *testing.T) {
	t.Parallel()
	for name, plain := range corpus(t, ".json") {
		o, err := Decode(plain)
		if err != nil || !strings.HasPrefix(name, "HEAD/") {
			continue
		}
		k := nativeRow(o)
		if k == nil {
			continue
		}
		for field, f := range editable(k, o) {
			checkRead(t, o, f, name)
			edits := someEdits(t, o, field, f)
			for _, edit := range edits[:min(3, len(edits))] {
				at := fmt.Sprintf("%s %+v", name, edit)
				out, changes, err := k.Apply(plain, edit)
				if err != nil {
					t.Fatalf("%s: %v", at, err)
				}
				lost := len(bytes.Split(plain, []byte("\n"))) - len(bytes.Split(out, []byte("\n")))
				if f.Type != List && (lost < -1 || lost > 1) {
					t.Fatalf("%s: %d lines changed", at, lost)
				}
				back, _, err := k.Revert(out, changes)
				if err != nil {
					t.Fatalf("%s: %v", at, err)
				}
				was, _ := generic(setGeneration(t, back, o.Meta.Generation))
				is, _ := generic(plain)
				if at, differs := difference(was, is, ""); differs {
					t.Fatalf("%s reverted differs at %s", name, at)
				}
			}
		}
	}
	// What Kubernetes' types would not take is not edited.
	_, _, err := deploymentKind.Apply([]byte(`{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"a"},"spec":{"replicas":1,"paused":"no"}}`),
		Edit{Field: Replicas, Value: int64(0)})
	wantFault(t, err, fault.Undecodable)
	_, _, err = deploymentKind.Apply([]byte(`{"apiVersion":"apps/v1","kind":"Deployment"}`), Edit{Field: Replicas, Value: int64(math.MaxInt32 + 1)})
	wantFault(t, err, fault.Usage)
}

func TestJSONNearRequestLimit(t *testing.T) {
	k := customKind("spec", "replicas")
	spec := `,"spec":{"pad":"` + strings.Repeat("x", maxValueBytes) + `","replicas":3}}`
	plain := []byte(head + spec[:16] + spec[16+len(head)+len(spec)-maxValueBytes:])
	if len(plain) != maxValueBytes || !json.Valid(plain) {
		t.Fatalf("%d bytes", len(plain))
	}
	out, _, err := k.Apply(plain, Edit{Field: Replicas, Value: int64(0)})
	if err != nil || len(out) != len(plain) {
		t.Fatalf("%d bytes, %v", len(out), err)
	}
	_, _, err = k.Apply(plain, Edit{Field: Replicas, Value: int64(10)})
	wantFault(t, err, fault.TooLarge)
}
