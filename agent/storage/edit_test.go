package storage

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	kubescheme "k8s.io/client-go/kubernetes/scheme"
	kjson "sigs.k8s.io/json"

	"github.com/google/go-cmp/cmp"

	"github.com/halligan-io/halligan/internal/fault"
)

func numbers(n ...protowire.Number) []protowire.Number { return n }

// typedOracle is the independent eye: Kubernetes' own serializer.
func typedOracle(t testing.TB, plain []byte) runtime.Object {
	t.Helper()
	obj, _, err := protobuf.NewSerializer(kubescheme.Scheme, kubescheme.Scheme).Decode(plain, nil, nil)
	if err != nil {
		t.Fatalf("Kubernetes cannot decode it: %v", err)
	}
	return obj
}

// expected makes the edit by Kubernetes' own means: typed object to JSON, the
// path set there, back to a typed object with one generation more.
func expected(t testing.TB, plain []byte, f Field, edit Edit, bump bool) runtime.Object {
	t.Helper()
	obj := typedOracle(t, plain)
	text, err := json.Marshal(obj)
	if err != nil {
		t.Fatal(err)
	}
	content := map[string]any{}
	if err := kjson.UnmarshalCaseSensitivePreserveInts(text, &content); err != nil {
		t.Fatal(err)
	}
	path := f.JSON
	if f.Type == Map {
		path = append(append([]string(nil), path...), edit.Entry)
	}
	switch {
	case f.Type == Named:
		list, _, _ := unstructured.NestedSlice(content, path[0])
		for _, one := range list {
			if element := one.(map[string]any); element["name"] == edit.Entry && edit.Value == nil {
				delete(element, path[1])
			} else if element["name"] == edit.Entry {
				element[path[1]] = edit.Value
			}
		}
		err = unstructured.SetNestedSlice(content, list, path[0])
	case f.Type == List:
		list, _, _ := unstructured.NestedSlice(content, path...)
		list = append(append([]any{}, list[:edit.Index]...), list[edit.Index+1:]...)
		err = unstructured.SetNestedSlice(content, list, path...)
	case edit.Value == nil:
		unstructured.RemoveNestedField(content, path...)
	default:
		err = unstructured.SetNestedField(content, edit.Value, path...)
	}
	if err != nil {
		t.Fatal(err)
	}
	if bump {
		generation, _, _ := unstructured.NestedInt64(content, "metadata", "generation")
		if err := unstructured.SetNestedField(content, generation+1, "metadata", "generation"); err != nil {
			t.Fatal(err)
		}
	}
	if text, err = json.Marshal(content); err != nil {
		t.Fatal(err)
	}
	want := reflect.New(reflect.TypeOf(obj).Elem()).Interface().(runtime.Object)
	if err := kjson.UnmarshalCaseSensitivePreserveInts(text, want); err != nil {
		t.Fatal(err)
	}
	return want
}

func reencoded(t testing.TB, obj runtime.Object) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := protobuf.NewSerializer(kubescheme.Scheme, kubescheme.Scheme).Encode(obj, &out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// someEdits are edits that a field's type allows, for an object of the corpus.
func someEdits(t testing.TB, o *Object, name FieldName, f Field) []Edit {
	t.Helper()
	var edits []Edit
	switch f.Type {
	case Int:
		for _, v := range []any{int64(0), int64(300), int64(-1), nil} {
			edits = append(edits, Edit{Field: name, Value: v})
		}
	case Bool:
		edits = []Edit{{Field: name, Value: true}, {Field: name, Value: false}, {Field: name}}
	case Map:
		object, _, err := o.decoded()
		if err != nil {
			t.Fatal(err)
		}
		stored, _, _ := unstructured.NestedStringMap(object, f.JSON...)
		for key := range stored {
			edits = append(edits, Edit{Field: name, Entry: key, Value: "changed"}, Edit{Field: name, Entry: key})
		}
		for _, key := range []string{"!", "halligan.io/stopped", "~"} {
			edits = append(edits, Edit{Field: name, Entry: key, Value: "true"}, Edit{Field: name, Entry: key, Value: ""}, Edit{Field: name, Entry: key})
		}
	case List:
		subjects, err := o.Subjects(f)
		if err != nil {
			t.Fatal(err)
		}
		for i := range subjects {
			edits = append(edits, Edit{Field: name, Index: i})
		}
	case Named:
		names, err := o.Names(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			edits = append(edits, Edit{Field: name, Entry: n, Value: "Ignore"}, Edit{Field: name, Entry: n, Value: "Fail"}, Edit{Field: name, Entry: n, Value: ""}, Edit{Field: name, Entry: n})
		}
	}
	return edits
}

// setGeneration puts the generation of an object to v, for comparisons that
// leave it out.
func setGeneration(t testing.TB, plain []byte, v int64) []byte {
	t.Helper()
	o, err := Decode(plain)
	if err != nil {
		t.Fatal(err)
	}
	d, err := o.document()
	if err == nil {
		err = d.set(generation, "", json.RawMessage(fmt.Sprint(v)))
	}
	if err != nil {
		t.Fatal(err)
	}
	return d.bytes()
}

// TestCorpusEdits makes every edit in every object of the corpus that has edit
// rows: the bytes must be those that Kubernetes itself would have written, and
// Revert must give the original bytes back but for the generation.
func TestCorpusEdits(t *testing.T) {
	t.Parallel()
	versions, edits, exactly := map[string]bool{}, 0, 0
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
			versions[strings.SplitN(name, "/", 2)[0]] = true
			// Some objects of earlier releases lack a field that is written now.
			exact := bytes.Equal(reencoded(t, typedOracle(t, plain)), plain)
			for _, edit := range someEdits(t, o, field, f) {
				edits++
				exactly += map[bool]int{true: 1}[exact]
				at := fmt.Sprintf("%s %+v", name, edit)
				out, changes, err := k.Apply(plain, edit)
				if err != nil {
					t.Fatalf("%s: %v", at, err)
				}
				bump := k.counts(o) && (f.JSON[0] == "spec" || f.Type == Named) && len(changes) > 0
				want := expected(t, plain, f, edit, bump)
				if got := typedOracle(t, out); !reflect.DeepEqual(reencoded(t, got), reencoded(t, want)) {
					t.Fatalf("%s: %s", at, cmp.Diff(want, got))
				}
				if exact && (edit.Value != nil || f.Type == Map || f.Type == List) {
					if !bytes.Equal(out, reencoded(t, want)) {
						t.Fatalf("%s: the bytes differ from Kubernetes' own", at)
					}
				}
				if (len(changes) == 0) != bytes.Equal(out, plain) || len(changes) != map[bool]int{true: 2, false: min(1, len(changes))}[bump] {
					t.Fatalf("%s: changes %+v", at, changes)
				}
				checkRevert(t, at, k, o, plain, out, changes)
			}
		}
	}
	if len(versions) < 5 || edits < 400 || exactly < 400 {
		t.Errorf("the corpus has %d releases and %d edits only, %d to compare to the byte", len(versions), edits, exactly)
	}
}

// TestCorpusMarks changes a label and an annotation of objects of every kind, and more
// of them in two small kinds of every release.
func TestCorpusMarks(t *testing.T) {
	t.Parallel()
	edits := 0
	for name, plain := range corpus(t, ".pb") {
		o, err := Decode(plain)
		if err != nil {
			continue
		}
		k := nativeRow(o)
		if k == nil || !strings.HasPrefix(name, "HEAD/") && !slices.Contains([]string{"Namespace", "Deployment"}, k.Kind) {
			continue
		}
		for _, field := range []FieldName{Labels, Annotations} {
			f, ok := k.Field(field, o.APIVersion)
			if !ok {
				t.Fatalf("%s has no %s", name, field)
			}
			here := someEdits(t, o, field, f)
			if strings.HasPrefix(name, "HEAD/") {
				here = here[:1]
			}
			for _, edit := range here[:min(3, len(here))] {
				edits++
				at := fmt.Sprintf("%s %+v", name, edit)
				out, changes, err := k.Apply(plain, edit)
				if err != nil {
					t.Fatalf("%s: %v", at, err)
				}
				bump := k.Kind == "Deployment" && field == Annotations && len(changes) > 0
				if f.Wire != nil {
					want := expected(t, plain, f, edit, bump)
					if !bytes.Equal(reencoded(t, typedOracle(t, out)), reencoded(t, want)) {
						t.Fatalf("%s: %s", at, cmp.Diff(want, typedOracle(t, out)))
					}
				}
				if len(changes) != map[bool]int{true: 2, false: 1}[bump] {
					t.Fatalf("%s: changes %+v", at, changes)
				}
				checkRevert(t, at, k, o, plain, out, changes)
			}
		}
	}
	if edits < 150 {
		t.Errorf("only %d edits", edits)
	}
}

// checkRevert reverts changes, sent through JSON as the agent stores them.
func checkRevert(t testing.TB, at string, k *Kind, o *Object, plain, out []byte, changes []Change) {
	t.Helper()
	text, err := json.Marshal(changes)
	if err != nil {
		t.Fatal(err)
	}
	var stored []Change
	if err := json.Unmarshal(text, &stored); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(changes, stored); diff != "" && len(changes) > 0 {
		t.Fatalf("%s: changes do not survive JSON: %s", at, diff)
	}
	back, reverted, err := k.Revert(out, stored)
	if err != nil {
		t.Fatalf("%s: revert: %v", at, err)
	}
	if len(reverted) != len(changes) {
		t.Fatalf("%s: reverted %+v of %+v", at, reverted, changes)
	}
	bumped := slices.ContainsFunc(changes, func(c Change) bool { return c.Field == Generation })
	if bumped {
		b, err := Decode(back)
		if err != nil {
			t.Fatal(err)
		}
		if b.Meta.Generation != o.Meta.Generation+2 {
			t.Fatalf("%s: generation %d, then %d", at, o.Meta.Generation, b.Meta.Generation)
		}
		back = setGeneration(t, back, o.Meta.Generation)
	}
	if !bytes.Equal(back, plain) {
		t.Fatalf("%s: revert does not give the same bytes\n%q\n%q", at, plain, back)
	}
}

// inject adds unknown fields at the end of the message at path, where encoders
// put them, or also at the start; the envelope itself for nil.
func inject(t testing.TB, plain []byte, path []protowire.Number, marker string, atStart bool) []byte {
	t.Helper()
	unknown := protowire.AppendString(protowire.AppendTag(nil, 900, bytesType), marker)
	unknown = protowire.AppendFixed32(protowire.AppendTag(unknown, 901, protowire.Fixed32Type), 7)
	unknown = protowire.AppendTag(unknown, 902, protowire.StartGroupType)
	unknown = protowire.AppendVarint(protowire.AppendTag(unknown, 1, protowire.VarintType), 5)
	unknown = protowire.AppendTag(unknown, 902, protowire.EndGroupType)
	before := []byte(nil)
	if atStart {
		before = unknown
	}
	if path == nil {
		return bytes.Join([][]byte{plain[:4], before, plain[4:], unknown}, nil)
	}
	d := &wireDocument{data: plain}
	places, err := d.places(path[1:])
	if err != nil || len(places) == 0 {
		t.Fatalf("no message at %v: %v", path, err)
	}
	p := places[len(places)-1]
	d.splice(append(p.chain, p.wireField), p.value, p.end, bytes.Join([][]byte{before, plain[p.value:p.end], unknown}, nil))
	return d.data
}

func TestUnknownFieldsSurvive(t *testing.T) {
	t.Parallel()
	levels := map[string][]protowire.Number{
		"envelope": nil, "raw": {rawField}, "metadata": {rawField, 1}, "spec": {rawField, 2},
	}
	for name, plain := range corpus(t, ".pb") {
		o, err := Decode(plain)
		if err != nil {
			continue
		}
		k := nativeRow(o)
		if k == nil || len(editable(k, o)) == 0 || !(strings.HasPrefix(name, "HEAD/") || strings.HasPrefix(name, "v1.33")) {
			continue
		}
		here := map[string][]protowire.Number{}
		for level, path := range levels {
			here[level] = path
		}
		if k.Kind == "DaemonSet" {
			here["template"], here["pod spec"] = numbers(rawField, 2, 2), numbers(rawField, 2, 2, 2)
		}
		if strings.HasSuffix(k.Kind, "WebhookConfiguration") {
			here["spec"] = nil // its field 2 is the list, whose last element this is
			here["webhook"] = numbers(rawField, 2)
		}
		if strings.HasSuffix(k.Kind, "Binding") {
			here["spec"] = nil // its field 2 is the list
			here["roleRef"] = numbers(rawField, 3)
		}
		for _, atStart := range []bool{false, true} {
			injected := plain
			for level, path := range here {
				injected = inject(t, injected, path, "unknown-in-"+level, atStart)
			}
			markers := bytes.Count(injected, []byte("unknown-in-"))
			for field, f := range editable(k, o) {
				edits := someEdits(t, o, field, f)
				for _, edit := range edits[:min(2, len(edits))] {
					at := fmt.Sprintf("%s %+v", name, edit)
					out, changes, err := k.Apply(injected, edit)
					if err != nil {
						t.Fatalf("%s: %v", at, err)
					}
					if n := bytes.Count(out, []byte("unknown-in-")); n != markers {
						t.Fatalf("%s: %d of %d unknown fields survive", at, n, markers)
					}
					// Without the injected fields it is the edit of the plain object.
					clean, _, err := k.Apply(plain, edit)
					if err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(reencoded(t, typedOracle(t, out)), reencoded(t, typedOracle(t, clean))) {
						t.Fatalf("%s: the edit is not that of the object without unknown fields", at)
					}
					if atStart {
						_, _, err = k.Revert(out, changes)
						if err != nil {
							t.Fatalf("%s: revert: %v", at, err)
						}
						continue
					}
					checkRevert(t, at, k, o, injected, out, changes)
				}
			}
		}
	}
}

var deploymentKind = &Kind{Group: "apps", Version: "v1", Kind: "Deployment", Generation: true, Fields: map[FieldName]Field{
	Replicas: {Type: Int, JSON: []string{"spec", "replicas"}, Wire: numbers(2, 1)},
	Paused:   {Type: Bool, JSON: []string{"spec", "paused"}, Wire: numbers(2, 7)},
}}

var daemonSetKind = &Kind{Group: "apps", Version: "v1", Kind: "DaemonSet", Generation: true, Fields: map[FieldName]Field{
	NodeSelector: {Type: Map, JSON: []string{"spec", "template", "spec", "nodeSelector"}, Wire: numbers(2, 2, 2, 7)},
}}

var bindingKind = &Kind{Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "ClusterRoleBinding", Fields: map[FieldName]Field{
	Subjects: {Type: List, JSON: []string{"subjects"}, Wire: numbers(2)},
}}

// wire builds messages for tests.
func message(num protowire.Number, fields ...[]byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, num, bytesType), bytes.Join(fields, nil))
}

func varint(num protowire.Number, v int64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, num, protowire.VarintType), uint64(v))
}

func text(num protowire.Number, s string) []byte { return message(num, []byte(s)) }

// envelope wraps fields of raw as an API server does.
func envelope(apiVersion, kind string, raw ...[]byte) []byte {
	return bytes.Join([][]byte{protobufMagic, message(1, text(1, apiVersion), text(2, kind)), message(2, raw...), text(3, ""), text(4, "")}, nil)
}

// TestRepeatedFields holds the reading and setting of what no encoder writes
// but every decoder accepts against the generated decoders.
func TestRepeatedFields(t *testing.T) {
	meta := message(1, text(1, "web"), text(3, "shop"), varint(7, 4))
	f := deploymentKind.Fields[Replicas]
	for name, raw := range map[string][][]byte{
		"scalar twice":            {meta, message(2, varint(1, 3), varint(1, 5))},
		"spec twice":              {meta, message(2, varint(1, 3)), message(2, varint(1, 5))},
		"last spec without it":    {meta, message(2, varint(1, 3)), message(2, varint(5, 9))},
		"metadata twice":          {meta, message(2, varint(1, 3)), message(1, varint(7, 40))},
		"spec before metadata":    {message(2, varint(1, 3)), meta},
		"no replicas":             {meta, message(2, varint(5, 9))},
		"no spec":                 {meta},
		"negative":                {meta, message(2, varint(1, -7))},
		"32 bits of a wide one":   {meta, message(2, varint(1, 1<<32|6))},
		"negative in five bytes":  {meta, message(2, varint(1, math.MaxUint32))},
		"long length of the spec": {meta, {0x12, 0x84, 0x80, 0x00, 0x08, 0x03, 0x28, 0x09}},
	} {
		t.Run(name, func(t *testing.T) {
			plain := envelope("apps/v1", "Deployment", raw...)
			o, err := Decode(plain)
			if err != nil {
				t.Fatal(err)
			}
			typed := typedOracle(t, plain).(*appsv1.Deployment)
			got, present, err := o.Int(f)
			if err != nil || present != (typed.Spec.Replicas != nil) || (present && got != int64(*typed.Spec.Replicas)) {
				t.Errorf("replicas read as %d, %v, %v, but Kubernetes reads %v", got, present, err, typed.Spec.Replicas)
			}
			for _, value := range []any{int64(0), int64(-2), nil} {
				out, changes, err := deploymentKind.Apply(plain, Edit{Field: Replicas, Value: value})
				if err != nil {
					t.Fatal(err)
				}
				now := typedOracle(t, out).(*appsv1.Deployment)
				if (value == nil) != (now.Spec.Replicas == nil) || (value != nil && int64(*now.Spec.Replicas) != value) {
					t.Errorf("set to %v it is %v", value, now.Spec.Replicas)
				}
				if len(changes) > 0 && now.Generation != typed.Generation+1 {
					t.Errorf("generation went from %d to %d", typed.Generation, now.Generation)
				}
				back, _, err := deploymentKind.Revert(out, changes)
				if err != nil {
					t.Fatal(err)
				}
				again := typedOracle(t, back).(*appsv1.Deployment)
				again.Generation = typed.Generation
				if diff := cmp.Diff(typed, again); diff != "" {
					t.Errorf("reverted from %v: %s", value, diff)
				}
			}
		})
	}

	plain := envelope("apps/v1", "Deployment", meta, message(2, bytes.Repeat(varint(1, 3), maxRepeats+1)))
	_, _, err := deploymentKind.Apply(plain, Edit{Field: Replicas, Value: int64(0)})
	wantFault(t, err, fault.Undecodable)
	plain = envelope("apps/v1", "Deployment", meta, message(2, text(1, "three")))
	_, _, err = deploymentKind.Apply(plain, Edit{Field: Replicas, Value: int64(0)})
	wantFault(t, err, fault.Undecodable)

	// Two raws: the last one counts, and the first is left alone.
	first, second := message(2, meta, message(2, varint(1, 3))), message(2, meta, message(2, varint(1, 5)))
	plain = bytes.Join([][]byte{protobufMagic, message(1, text(1, "apps/v1"), text(2, "Deployment")), first, second}, nil)
	out, _, err := deploymentKind.Apply(plain, Edit{Field: Replicas, Value: int64(9)})
	if err != nil {
		t.Fatal(err)
	}
	if n := typedOracle(t, out).(*appsv1.Deployment).Spec.Replicas; n == nil || *n != 9 || !bytes.Contains(out, first) {
		t.Errorf("of two raws the last was not edited: %v", n)
	}
}

func TestMapEntries(t *testing.T) {
	meta := message(1, text(1, "agent"), text(3, "telemetry"), varint(7, 1))
	entry := func(fields ...[]byte) []byte { return message(7, fields...) }
	pod := func(entries ...[]byte) []byte {
		return envelope("apps/v1", "DaemonSet", meta, message(2, message(2, message(2, entries...))))
	}
	f := daemonSetKind.Fields[NodeSelector]
	const key = "halligan.io/stopped"
	for name, plain := range map[string][]byte{
		"no entry":          pod(text(8, "account")),
		"no template":       envelope("apps/v1", "DaemonSet", meta, message(2)),
		"nothing":           envelope("apps/v1", "DaemonSet", meta),
		"others":            pod(entry(text(1, "a"), text(2, "1")), entry(text(1, "z"), text(2, "2"))),
		"key twice":         pod(entry(text(1, key), text(2, "1")), entry(text(1, "z"), text(2, "2")), entry(text(1, key), text(2, "3"))),
		"value before key":  pod(entry(text(2, "1"), text(1, key))),
		"value absent":      pod(entry(text(1, key))),
		"value twice":       pod(entry(text(1, key), text(2, "1"), text(2, "2"))),
		"unknown in entry":  pod(entry(text(1, key), text(2, "1"), text(3, "x"))),
		"spread over specs": envelope("apps/v1", "DaemonSet", meta, message(2, message(2, message(2, entry(text(1, key), text(2, "1"))))), message(2, message(2, message(2, entry(text(1, key), text(2, "5")))))),
	} {
		t.Run(name, func(t *testing.T) {
			o, err := Decode(plain)
			if err != nil {
				t.Fatal(err)
			}
			typed := typedOracle(t, plain).(*appsv1.DaemonSet)
			want, wantPresent := typed.Spec.Template.Spec.NodeSelector[key]
			if got, present, err := o.Entry(f, key); got != want || present != wantPresent || err != nil {
				t.Errorf("read %q, %v, %v; want %q, %v", got, present, err, want, wantPresent)
			}
			for _, value := range []any{"true", "", nil} {
				out, changes, err := daemonSetKind.Apply(plain, Edit{Field: NodeSelector, Entry: key, Value: value})
				if err != nil {
					t.Fatal(err)
				}
				now := typedOracle(t, out).(*appsv1.DaemonSet)
				if v, present := now.Spec.Template.Spec.NodeSelector[key]; present != (value != nil) || (present && v != value) {
					t.Errorf("set to %v it is %q, %v", value, v, present)
				}
				back, _, err := daemonSetKind.Revert(out, changes)
				if err != nil {
					t.Fatal(err)
				}
				again := typedOracle(t, back).(*appsv1.DaemonSet)
				if v, present := again.Spec.Template.Spec.NodeSelector[key]; v != want || present != wantPresent {
					t.Errorf("reverted it is %q, %v", v, present)
				}
			}
		})
	}
	// The generated decoders read a key or value across the end of its entry;
	// that is no value to edit.
	overrun := append(entry(), 0x3a, 0x02, 0x0a, 0x05, 'a', 'b', 'c', 'd', 'e')
	_, _, err := daemonSetKind.Apply(pod(overrun), Edit{Field: NodeSelector, Entry: key, Value: "x"})
	wantFault(t, err, fault.Undecodable)
	_, _, err = daemonSetKind.Apply(pod(entry(text(1, key), text(2, "\xff"))), Edit{Field: NodeSelector, Entry: key, Value: "x"})
	wantFault(t, err, fault.Undecodable)
}

func encode(t testing.TB, obj runtime.Object) []byte {
	t.Helper()
	plain, err := EncodeTyped(obj)
	if err != nil {
		t.Fatal(err)
	}
	return plain
}

func binding(names ...string) *rbacv1.ClusterRoleBinding {
	b := &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "b"}, RoleRef: rbacv1.RoleRef{Kind: "ClusterRole", Name: "admin"}}
	for _, name := range names {
		b.Subjects = append(b.Subjects, rbacv1.Subject{Kind: "User", APIGroup: rbacv1.GroupName, Name: name})
	}
	return b
}

func subjectNames(t testing.TB, plain []byte) string {
	t.Helper()
	o, err := Decode(plain)
	if err != nil {
		t.Fatal(err)
	}
	subjects, err := o.Subjects(bindingKind.Fields[Subjects])
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range subjects {
		names = append(names, s.Name)
	}
	return strings.Join(names, " ")
}

func TestSubjects(t *testing.T) {
	asJSON := func(names ...string) []byte {
		b := binding(names...)
		b.APIVersion, b.Kind = "rbac.authorization.k8s.io/v1", "ClusterRoleBinding"
		out, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for format, make := range map[string]func(...string) []byte{
		"protobuf": func(names ...string) []byte { return encode(t, binding(names...)) },
		"JSON":     asJSON,
	} {
		t.Run(format, func(t *testing.T) {
			plain := make("a", "b", "c", "d")
			// Indexes count in the object as it is, in whatever order.
			out, changes, err := bindingKind.Apply(plain, Edit{Field: Subjects, Index: 0}, Edit{Field: Subjects, Index: 3}, Edit{Field: Subjects, Index: 1})
			if err != nil {
				t.Fatal(err)
			}
			if got := subjectNames(t, out); got != "c" {
				t.Errorf("left are %q", got)
			}
			if changes[0].Path != "subjects[3]" || !strings.Contains(string(changes[0].Before), `"d"`) || changes[0].After != nil {
				t.Errorf("first change %+v", changes[0])
			}
			back, reverted, err := bindingKind.Revert(out, changes)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(back, plain) {
				t.Errorf("reverted are %q", subjectNames(t, back))
			}
			// To undo the undo is to remove them again.
			again, _, err := bindingKind.Revert(back, reverted)
			if err != nil || !bytes.Equal(again, out) {
				t.Errorf("undone the undo are %q, %v", subjectNames(t, again), err)
			}

			// Others came and went meanwhile.
			meanwhile := make("b", "x")
			back, reverted, err = bindingKind.Revert(meanwhile, changes)
			if err != nil {
				t.Fatal(err)
			}
			if got := subjectNames(t, back); got != "a b x d" || len(reverted) != 2 {
				t.Errorf("put back into b x: %q by %+v", got, reverted)
			}
			back, reverted, err = bindingKind.Revert(plain, changes)
			if err != nil || len(reverted) != 0 || !bytes.Equal(back, plain) {
				t.Errorf("with all of them there again: %+v, %v", reverted, err)
			}

			// The last one out and in again.
			only := make("a")
			out, changes, err = bindingKind.Apply(only, Edit{Field: Subjects})
			if err != nil || subjectNames(t, out) != "" {
				t.Fatalf("left are %q, %v", subjectNames(t, out), err)
			}
			back, _, err = bindingKind.Revert(out, changes)
			if err != nil || !bytes.Equal(back, only) {
				t.Errorf("put back are %q, %v", subjectNames(t, back), err)
			}
			if _, _, err = bindingKind.Revert(make(), changes); err != nil {
				t.Error(err)
			}

			for _, index := range []int{-1, 4} {
				_, _, err = bindingKind.Apply(plain, Edit{Field: Subjects, Index: index})
				wantFault(t, err, fault.Usage)
			}
			damaged := []Change{{Path: "subjects[0]", Field: Subjects, Raw: []byte("\x12\xff")}}
			_, _, err = bindingKind.Revert(plain, damaged)
			wantFault(t, err, fault.Undecodable)
		})
	}
}

func TestIndexesAmongOtherEdits(t *testing.T) {
	k := customKind("spec", "replicas")
	k.Fields[Subjects] = Field{Type: List, JSON: []string{"subjects"}}
	plain := []byte(head + `,"spec":{"replicas":3},"subjects":[{"name":"a"},{"name":"b"},{"name":"c"}]}`)
	out, changes, err := k.Apply(plain, Edit{Field: Subjects}, Edit{Field: Replicas, Value: int64(0)}, Edit{Field: Subjects, Index: 2})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasSuffix(out, []byte(`,"spec":{"replicas":0},"subjects":[{"name":"b"}]}`)) {
		t.Errorf("%s", out)
	}
	checkRevert(t, "list and scalar", k, mustDecode(t, plain), plain, out, changes)
}

func deployment(replicas *int32) *appsv1.Deployment {
	return &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", Generation: 3},
		Spec: appsv1.DeploymentSpec{Replicas: replicas, Template: corev1.PodTemplateSpec{
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}},
		}},
	}
}

func TestApplyRefuses(t *testing.T) {
	three := int32(3)
	plain := encode(t, deployment(&three))
	for name, c := range map[string]struct {
		code  fault.Code
		plain []byte
		edits []Edit
	}{
		"wrong kind":        {fault.Undecodable, encode(t, binding("a")), []Edit{{Field: Replicas, Value: int64(0)}}},
		"CBOR":              {fault.Undecodable, []byte("\xd9\xd9\xf7\xa0"), []Edit{{Field: Replicas, Value: int64(0)}}},
		"no such field":     {fault.Usage, plain, []Edit{{Field: Suspend, Value: true}}},
		"generation":        {fault.Usage, plain, []Edit{{Field: Generation, Value: int64(1)}}},
		"wrong type":        {fault.Usage, plain, []Edit{{Field: Replicas, Value: "three"}}},
		"int instead of 64": {fault.Usage, plain, []Edit{{Field: Replicas, Value: 3}}},
		"too wide":          {fault.Usage, plain, []Edit{{Field: Replicas, Value: int64(math.MaxInt32 + 1)}}},
		"entry of a scalar": {fault.Usage, plain, []Edit{{Field: Replicas, Entry: "x", Value: int64(0)}}},
		"twice":             {fault.Usage, plain, []Edit{{Field: Replicas, Value: int64(0)}, {Field: Replicas, Value: int64(1)}}},
		"value of an element": {fault.Usage, plain,
			[]Edit{{Field: Subjects, Value: "x"}}},
		"unknown version": {fault.Usage, envelope("apps/v9", "Deployment", message(1, text(1, "a"))), []Edit{{Field: Replicas, Value: int64(0)}}},
		"generation at its end": {fault.Undecodable, envelope("apps/v1", "Deployment", message(1, text(1, "a"), varint(7, math.MaxInt64))),
			[]Edit{{Field: Replicas, Value: int64(0)}}},
		"not decodable as its type": {fault.Undecodable, envelope("apps/v1", "Deployment", message(1, text(1, "a")), message(2, text(5, "x"))),
			[]Edit{{Field: Replicas, Value: int64(0)}}},
	} {
		t.Run(name, func(t *testing.T) {
			out, changes, err := deploymentKind.Apply(c.plain, c.edits...)
			wantFault(t, err, c.code)
			if out != nil || changes != nil {
				t.Error("something was returned with the error")
			}
		})
	}
	for name, edit := range map[string]Edit{
		"no entry": {Field: NodeSelector, Value: "x"}, "no text": {Field: NodeSelector, Entry: "a", Value: "\xff"}, "no text key": {Field: NodeSelector, Entry: "\xff", Value: "a"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := daemonSetKind.Apply(envelope("apps/v1", "DaemonSet"), edit)
			wantFault(t, err, fault.Usage)
		})
	}
}

func TestSeveralEditsOneGeneration(t *testing.T) {
	plain := encode(t, deployment(nil))
	out, changes, err := deploymentKind.Apply(plain, Edit{Field: Replicas, Value: int64(0)}, Edit{Field: Paused, Value: true})
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, c := range changes {
		paths = append(paths, c.Path+" "+string(c.Before)+"->"+string(c.After))
	}
	want := []string{"spec.replicas ->0", "spec.paused false->true", "metadata.generation 3->4"}
	if diff := cmp.Diff(want, paths); diff != "" {
		t.Error(diff)
	}
	if out, changes, err = deploymentKind.Apply(out, Edit{Field: Replicas, Value: int64(0)}, Edit{Field: Paused, Value: true}); err != nil || len(changes) > 0 {
		t.Errorf("the same again: %+v, %v", changes, err)
	}
	if d := typedOracle(t, out).(*appsv1.Deployment); d.Generation != 4 || *d.Spec.Replicas != 0 || !d.Spec.Paused {
		t.Errorf("it is %+v", d.Spec)
	}
}

func TestRevertStale(t *testing.T) {
	three, seven := int32(3), int32(7)
	plain := encode(t, deployment(&three))
	out, changes, err := deploymentKind.Apply(plain, Edit{Field: Replicas, Value: int64(0)})
	if err != nil {
		t.Fatal(err)
	}
	// A controller wrote the status and somebody else a label: no hindrance.
	d := typedOracle(t, out).(*appsv1.Deployment)
	d.Status.ObservedGeneration, d.Labels, d.Generation = 4, map[string]string{"a": "b"}, 9
	back, _, err := deploymentKind.Revert(encode(t, d), changes)
	if err != nil {
		t.Fatal(err)
	}
	d.Spec.Replicas, d.Generation = &three, 10
	if diff := cmp.Diff(encode(t, d), back); diff != "" {
		t.Error(diff)
	}
	for name, replicas := range map[string]*int32{"other value": &seven, "value from before": &three, "absent": nil} {
		d.Spec.Replicas = replicas
		out, reverted, err := deploymentKind.Revert(encode(t, d), changes)
		wantFault(t, err, fault.Stale)
		if out != nil || reverted != nil || !strings.Contains(err.Error(), "spec.replicas") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The storage version may have changed, the field not.
	if _, _, err := deploymentKind.Revert(encode(t, binding("a")), changes); !fault.Is(err, fault.Undecodable) {
		t.Error(err)
	}
}

func TestNearRequestLimit(t *testing.T) {
	three := int32(3)
	d := deployment(&three)
	d.Annotations = map[string]string{"pad": ""}
	room := maxValueBytes - len(encode(t, d)) - 16
	d.Annotations["pad"] = strings.Repeat("x", room)
	for len(encode(t, d)) < maxValueBytes {
		d.Annotations["pad"] += "x"
	}
	plain := encode(t, d)
	if len(plain) != maxValueBytes {
		t.Fatalf("%d bytes, want %d", len(plain), maxValueBytes)
	}
	out, changes, err := deploymentKind.Apply(plain, Edit{Field: Replicas, Value: int64(0)})
	if err != nil || len(out) != maxValueBytes {
		t.Fatalf("%d bytes, %v", len(out), err)
	}
	checkRevert(t, "near the limit", deploymentKind, mustDecode(t, plain), plain, out, changes)
	_, _, err = deploymentKind.Apply(plain, Edit{Field: Replicas, Value: int64(1000)})
	wantFault(t, err, fault.TooLarge)
}

func mustDecode(t testing.TB, plain []byte) *Object {
	t.Helper()
	o, err := Decode(plain)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// TestVerifyCatches breaks results on purpose: the check after an edit must see
// whatever an error in the editing code could do.
func TestVerifyCatches(t *testing.T) {
	three := int32(3)
	plain := encode(t, deployment(&three))
	f := deploymentKind.Fields[Replicas]
	for name, damage := range map[string]func(d *wireDocument) error{
		"nothing done":   func(d *wireDocument) error { return nil },
		"other value":    func(d *wireDocument) error { return d.set(f, "", json.RawMessage("5")) },
		"another field":  func(d *wireDocument) error { return d.set(deploymentKind.Fields[Paused], "", json.RawMessage("true")) },
		"unknown field":  func(d *wireDocument) error { return d.add(numbers(2), 900, varint(900, 1)) },
		"envelope field": func(d *wireDocument) error { d.data = append(d.data, varint(900, 1)...); return nil },
		"status":         func(d *wireDocument) error { return d.add(nil, 3, message(3, varint(1, 1))) },
		"another name": func(d *wireDocument) error {
			d.data = bytes.Replace(d.data, []byte("web"), []byte("wob"), 1)
			return nil
		},
		"cut off": func(d *wireDocument) error { d.data = d.data[:len(d.data)-8]; return nil },
		"container's bit": func(d *wireDocument) error {
			d.data = bytes.Replace(d.data, []byte("\x0a\x01c"), []byte("\x0a\x01d"), 1)
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			e, err := deploymentKind.edit(plain)
			if err != nil {
				t.Fatal(err)
			}
			d := e.doc.(*wireDocument)
			if name != "nothing done" && name != "other value" {
				if err := e.set(Replicas, f, "", json.RawMessage("0")); err != nil {
					t.Fatal(err)
				}
			} else {
				e.record(f, Change{Path: "spec.replicas", Field: Replicas, Before: json.RawMessage("3"), After: json.RawMessage("0")})
			}
			if err := damage(d); err != nil {
				t.Fatal(err)
			}
			_, _, err = e.finish()
			wantFault(t, err, fault.Undecodable)
		})
	}
}
