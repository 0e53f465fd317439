package storage

import (
	"encoding/json"
	"strings"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/install"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"

	"github.com/halligan-io/halligan/internal/fault"
)

// widgets is a definition as its author wrote it.
const widgets = `{"apiVersion":"apiextensions.k8s.io/v1","kind":"CustomResourceDefinition",
"metadata":{"name":"widgets.example.org"},
"spec":{"group":"example.org","scope":"Namespaced","names":{"plural":"widgets","singular":"widget","kind":"Widget","shortNames":["wd"]},
"versions":[
{"name":"v1","served":true,"storage":true,"subresources":{"scale":{"specReplicasPath":".spec.pool.size","statusReplicasPath":".status.size"}}},
{"name":"v1alpha1","served":true,"storage":false,"subresources":{"scale":{"specReplicasPath":".spec.size","statusReplicasPath":".status.size"}}}]}}`

// definition makes a small one for tests of names.
func definition(group, plural, kind, scope string, short ...string) []byte {
	crd := apiextensionsv1.CustomResourceDefinition{
		TypeMeta:   metav1.TypeMeta{APIVersion: "apiextensions.k8s.io/v1", Kind: "CustomResourceDefinition"},
		ObjectMeta: metav1.ObjectMeta{Name: plural + "." + group},
		Spec: apiextensionsv1.CustomResourceDefinitionSpec{
			Group: group, Scope: apiextensionsv1.ResourceScope(scope),
			Names:    apiextensionsv1.CustomResourceDefinitionNames{Plural: plural, Singular: strings.ToLower(kind), Kind: kind, ShortNames: short},
			Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{Name: "v1", Served: true, Storage: true}},
		},
	}
	raw, err := json.Marshal(crd)
	if err != nil {
		panic(err)
	}
	return raw
}

func TestAddCRD(t *testing.T) {
	c := NewCatalogue()
	if err := c.AddCRD([]byte(widgets)); err != nil {
		t.Fatal(err)
	}
	k := c.ByGroupKind("example.org", "Widget")
	if k == nil || k.Version != "v1" || !k.Namespaced || !k.Custom || !k.Generation || k.Dir != "example.org/widgets" || k.Resource() != "widgets.example.org" {
		t.Fatalf("%+v", k)
	}
	checkReplicas(t, k, "example.org/v1", "spec.pool.size")
	checkReplicas(t, k, "example.org/v1alpha1", "spec.size")
	checkReplicas(t, k, "example.org/v2", "")
	if f, ok := k.Field(Generation, "example.org/v1"); !ok || f.Wire != nil {
		t.Errorf("generation: %+v, %v", f, ok)
	}
	if got := strings.Join(k.Fields[Replicas].JSON, "."); got != "spec.pool.size" {
		t.Errorf("Fields has %s, not the stored version's path", got)
	}
}

func checkReplicas(t *testing.T, k *Kind, apiVersion, want string) {
	t.Helper()
	f, ok := k.Field(Replicas, apiVersion)
	if got := strings.Join(f.JSON, "."); got != want || ok != (want != "") || f.Wire != nil || ok && f.Type != Int {
		t.Errorf("replicas of %s: %+v, %v, want %s", apiVersion, f, ok, want)
	}
}

// The API server stores definitions as v1beta1, in which what all versions have
// in common stands once. This takes its own codec for the way there.
func TestAddCRDAsTheAPIServerStoresIt(t *testing.T) {
	s := runtime.NewScheme()
	install.Install(s)
	codec := serializer.NewCodecFactory(s).LegacyCodec(v1beta1.SchemeGroupVersion)
	scale := func(path string) *apiextensionsv1.CustomResourceSubresources {
		return &apiextensionsv1.CustomResourceSubresources{Scale: &apiextensionsv1.CustomResourceSubresourceScale{SpecReplicasPath: path, StatusReplicasPath: ".status.replicas"}}
	}
	boolean := func(field string) *apiextensionsv1.CustomResourceValidation {
		flag := map[string]apiextensionsv1.JSONSchemaProps{field: {Type: "boolean"}, "odd": {Type: "string"}}
		return &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &apiextensionsv1.JSONSchemaProps{Type: "object",
			Properties: map[string]apiextensionsv1.JSONSchemaProps{"spec": {Type: "object", Properties: flag}}}}
	}
	for name, test := range map[string]struct {
		first, second  *apiextensionsv1.CustomResourceSubresources
		wantV1, wantV2 string
		hoisted        bool
	}{
		"the same in both": {scale(".spec.replicas"), scale(".spec.replicas"), "spec.replicas", "spec.replicas", true},
		"one each":         {scale(".spec.replicas"), scale(".spec.count"), "spec.replicas", "spec.count", false},
		"only the first":   {scale(".spec.replicas"), nil, "spec.replicas", "", false},
		"none":             {nil, nil, "", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			crd := &apiextensionsv1.CustomResourceDefinition{}
			if err := json.Unmarshal(definition("example.org", "gadgets", "Gadget", "Cluster", "gd"), crd); err != nil {
				t.Fatal(err)
			}
			crd.Spec.Versions = []apiextensionsv1.CustomResourceDefinitionVersion{
				{Name: "v1", Served: true, Storage: true, Subresources: test.first, Schema: boolean("paused")},
				{Name: "v2", Served: true, Subresources: test.second, Schema: boolean("suspend")},
			}
			if test.hoisted {
				crd.Spec.Versions[1].Schema = boolean("paused")
			}
			internal, err := s.UnsafeConvertToVersion(crd, schema.GroupVersion{Group: v1beta1.GroupName, Version: runtime.APIVersionInternal})
			if err != nil {
				t.Fatal(err)
			}
			stored, err := runtime.Encode(codec, internal)
			if err != nil {
				t.Fatal(err)
			}
			var head struct {
				APIVersion string
				Spec       struct{ Subresources *json.RawMessage }
			}
			if err := json.Unmarshal(stored, &head); err != nil {
				t.Fatal(err)
			}
			if head.APIVersion != "apiextensions.k8s.io/v1beta1" || (head.Spec.Subresources != nil) != test.hoisted {
				t.Fatalf("not the form that this test is for: %s", stored)
			}
			c := NewCatalogue()
			if err := c.AddCRD(stored); err != nil {
				t.Fatal(err)
			}
			k, err := c.Resolve("gd")
			if err != nil {
				t.Fatal(err)
			}
			if k.Namespaced {
				t.Error("the scope is lost")
			}
			checkReplicas(t, k, "example.org/v1", test.wantV1)
			checkReplicas(t, k, "example.org/v2", test.wantV2)
			for version, want := range map[string]string{"v1": "paused", "v2": map[bool]string{true: "paused", false: "suspend"}[test.hoisted]} {
				if f, ok := k.Field(Paused, "example.org/"+version); !ok || f.Type != Bool || strings.Join(f.JSON, ".") != "spec."+want {
					t.Errorf("%s is paused by %+v, want spec.%s", version, f, want)
				}
			}
		})
	}
}

func TestAddCRDReplaces(t *testing.T) {
	c := NewCatalogue()
	before := len(c.Kinds())
	for _, crd := range [][]byte{[]byte(widgets), definition("example.org", "widgets", "Widget", "Cluster"), definition("example.net", "widgets", "Widget", "Cluster")} {
		if err := c.AddCRD(crd); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(c.Kinds()) - before; got != 2 {
		t.Errorf("%d kinds were added, want 2", got)
	}
	k, err := c.Resolve("widgets.example.org")
	if err != nil || k.Namespaced {
		t.Errorf("the newer definition does not count: %+v, %v", k, err)
	}
}

func TestAddCRDTakesAcceptedNames(t *testing.T) {
	var crd map[string]any
	if err := json.Unmarshal([]byte(widgets), &crd); err != nil {
		t.Fatal(err)
	}
	crd["status"] = map[string]any{"acceptedNames": map[string]any{"plural": "widgets", "singular": "widget", "kind": "Widget"}}
	raw, err := json.Marshal(crd)
	if err != nil {
		t.Fatal(err)
	}
	c := NewCatalogue()
	if err := c.AddCRD(raw); err != nil {
		t.Fatal(err)
	}
	if k, err := c.Resolve("wd"); err == nil {
		t.Errorf("a short name that was not accepted resolves to %s", k.Resource())
	}
	if _, err := c.Resolve("widget"); err != nil {
		t.Error(err)
	}
}

func TestAddCRDRefuses(t *testing.T) {
	const hostile = "\x1b[2J"
	for name, plain := range map[string][]byte{
		"nothing":          nil,
		"garbage":          []byte("\x00\xff{"),
		"protobuf":         []byte("k8s\x00\n\x00"),
		"an array":         []byte("[]"),
		"another kind":     []byte(`{"apiVersion":"v1","kind":"ConfigMap"}`),
		"no names":         []byte(`{"apiVersion":"apiextensions.k8s.io/v1","kind":"CustomResourceDefinition","spec":{"scope":"Cluster"}}`),
		"no version":       []byte(`{"apiVersion":"apiextensions.k8s.io/v1","kind":"CustomResourceDefinition","spec":{"group":"example.org","scope":"Cluster","names":{"plural":"as","kind":"A"}}}`),
		"scope":            definition("example.org", "as", "A", hostile),
		"plural with path": definition("example.org", "../pods", "A", "Cluster"),
		"plural with text": definition("example.org", hostile, "A", "Cluster"),
		"group of one":     definition("services", "specs", "A", "Namespaced"),
		"group with path":  definition("a.b/c", "as", "A", "Namespaced"),
		"a native place":   definition("apiregistration.k8s.io", "apiservices", "APIService", "Cluster"),
	} {
		c := NewCatalogue()
		before := len(c.Kinds())
		err := c.AddCRD(plain)
		if !fault.Is(err, fault.Undecodable) || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("%s: %v, want undecodable and plain text", name, err)
		}
		if len(c.Kinds()) != before {
			t.Errorf("%s: something was added", name)
		}
	}
}

func TestAddCRDIgnoresOddReplicasPaths(t *testing.T) {
	for path, want := range map[string]bool{
		".spec.replicas": true, ".spec.a.b.c": true,
		"": false, ".": false, ".spec": false, ".spec.": false, "spec.replicas": false, ".status.replicas": false,
		".spec.a[0]": false, ".spec..a": false, ".metadata.generation": false,
	} {
		if _, ok := replicasPath(path); ok != want {
			t.Errorf("%q: %v, want %v", path, ok, want)
		}
	}
}

func FuzzAddCRD(f *testing.F) {
	f.Add([]byte(widgets))
	f.Add(definition("example.org", "gadgets", "Gadget", "Cluster", "gd"))
	f.Add([]byte(`{"apiVersion":"apiextensions.k8s.io/v1beta1","kind":"CustomResourceDefinition","spec":{"group":"example.org","version":"v1","scope":"Cluster","names":{"plural":"as","kind":"A"},"subresources":{"scale":{"specReplicasPath":".spec.n"}}}}`))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, plain []byte) {
		c := NewCatalogue()
		if err := c.AddCRD(plain); err != nil {
			if len(c.custom) != 0 {
				t.Fatal("refused and added")
			}
			return
		}
		k := c.custom[0]
		if c.dirs[k.Dir] != k || strings.Count(k.Dir, "/") != 1 || k.Version == "" {
			t.Fatalf("%+v", k)
		}
		if found, err := c.Resolve(k.Resource()); err != nil || found.Resource() != k.Resource() {
			t.Fatalf("%s does not resolve: %v", k.Resource(), err)
		}
		if _, err := schema.ParseGroupVersion(k.Group + "/" + k.Version); err != nil {
			t.Skip("version with a slash")
		}
	})
}
