package storage

import (
	"bytes"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/scheme"
)

// notStored are the kinds of client-go's scheme that no API server persists
// under a key of their own, beside lists and options.
var notStored = map[string]string{
	"/APIGroup":                     "discovery",
	"/APIVersions":                  "discovery",
	"/Status":                       "an answer",
	"/Binding":                      "a request only",
	"/ComponentStatus":              "computed",
	"/RangeAllocation":              "the API server's own bookkeeping, under ranges/",
	"/SerializedReference":          "an annotation's format",
	"apps/DeploymentRollback":       "a request only",
	"apps/Scale":                    "a subresource",
	"autoscaling/Scale":             "a subresource",
	"extensions/DeploymentRollback": "a request only",
	"extensions/Scale":              "a subresource",
	"policy/Eviction":               "a subresource",
	"authentication.k8s.io/SelfSubjectReview":       "a request only",
	"authentication.k8s.io/TokenRequest":            "a request only",
	"authentication.k8s.io/TokenReview":             "a request only",
	"authorization.k8s.io/LocalSubjectAccessReview": "a request only",
	"authorization.k8s.io/SelfSubjectAccessReview":  "a request only",
	"authorization.k8s.io/SelfSubjectRulesReview":   "a request only",
	"authorization.k8s.io/SubjectAccessReview":      "a request only",
}

// leftGroups are groups that no release from 1.28 on serves; what they held is
// stored under another group.
var leftGroups = map[string]string{
	"extensions/Ingress":       "networking.k8s.io",
	"extensions/NetworkPolicy": "networking.k8s.io",
}

func TestEveryStoredKindHasARow(t *testing.T) {
	c := NewCatalogue()
	used := map[string]bool{}
	for gvk := range scheme.Scheme.AllKnownTypes() {
		id := gvk.Group + "/" + gvk.Kind
		switch {
		case gvk.Version == "__internal", strings.HasSuffix(gvk.Kind, "List"), strings.HasSuffix(gvk.Kind, "Options"), gvk.Kind == "WatchEvent":
			continue
		case notStored[id] != "":
			used[id] = true
			if c.ByGroupKind(gvk.Group, gvk.Kind) != nil {
				t.Errorf("%s has a row, but is excepted", id)
			}
			continue
		}
		group := gvk.Group
		if to := leftGroups[id]; to != "" {
			group = to
		}
		if c.ByGroupKind(group, gvk.Kind) == nil {
			t.Errorf("no row for %v", gvk)
		}
	}
	for id := range notStored {
		if !used[id] {
			t.Errorf("exception %s is of no use", id)
		}
	}
}

func TestKindRowsAreComplete(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range NewCatalogue().native {
		id := k.Resource()
		if seen[id] {
			t.Errorf("%s: two rows", id)
		}
		seen[id] = true
		if k.Version == "" || k.Kind == "" || k.Plural == "" || k.Singular == "" || k.Dir == "" || k.Custom {
			t.Errorf("%s: incomplete: %+v", id, k)
		}
		if k.Plural != strings.ToLower(k.Plural) || !versionWord.MatchString(k.Version) {
			t.Errorf("%s: plural or version misspelt", id)
		}
		for name, f := range k.Fields {
			if f.Type == 0 || len(f.JSON) == 0 || len(f.Wire) == 0 {
				t.Errorf("%s: incomplete field %s: %+v", id, name, f)
			}
		}
	}
}

// TestFieldRowsFitTheGeneratedTypes compares each edit row with the protobuf
// tags of every version of the kind that k8s.io/api has, and demands that the
// row lists all those versions.
func TestFieldRowsFitTheGeneratedTypes(t *testing.T) {
	c := NewCatalogue()
	checked := 0
	for gvk := range scheme.Scheme.AllKnownTypes() {
		k := c.ByGroupKind(gvk.Group, gvk.Kind)
		if k == nil || gvk.Version == "__internal" {
			continue
		}
		object, err := scheme.Scheme.New(gvk)
		if err != nil {
			t.Fatal(err)
		}
		names := []FieldName{Labels, Annotations}
		for name := range k.Fields {
			names = append(names, name)
		}
		if k.Generation {
			names = append(names, Generation)
		}
		for _, name := range names {
			f, ok := k.Field(name, gvk.GroupVersion().String())
			if !ok {
				t.Errorf("%v: field %s is not known for this version", gvk, name)
				continue
			}
			numbers, last := walkTags(t, reflect.TypeOf(object).Elem(), f.JSON)
			if !slices.Equal(numbers, f.Wire) {
				t.Errorf("%v: field %s has numbers %v, the row says %v", gvk, name, numbers, f.Wire)
			}
			fits := map[FieldType]bool{
				Int:  last.Kind() == reflect.Int32 || last.Kind() == reflect.Int64,
				Bool: last.Kind() == reflect.Bool,
				Map:  last == reflect.TypeFor[map[string]string](),
				List: last.Kind() == reflect.Slice && last.Elem().Kind() == reflect.Struct,

				Named: last.Kind() == reflect.String,
			}
			if !fits[f.Type] {
				t.Errorf("%v: field %s is a %v, the row says type %d", gvk, name, last, f.Type)
			}
			checked++
		}
	}
	if checked < 40 {
		t.Errorf("only %d fields were compared", checked)
	}
}

// TestPodTemplateFollowsTheTypes looks for pod templates and pod specs in every
// Go type that client-go knows.
func TestPodTemplateFollowsTheTypes(t *testing.T) {
	// Its data is raw: a DaemonSet's or StatefulSet's template, from which their
	// controller makes pods during an update.
	want := map[string]bool{"apps/ControllerRevision": true}
	c := NewCatalogue()
	for gvk := range scheme.Scheme.AllKnownTypes() {
		k := c.ByGroupKind(gvk.Group, gvk.Kind)
		if k == nil || gvk.Version == "__internal" {
			continue
		}
		object, err := scheme.Scheme.New(gvk)
		if err != nil {
			t.Fatal(err)
		}
		if holdsType(reflect.TypeOf(object), reflect.TypeFor[corev1.PodSpec](), map[reflect.Type]bool{}) {
			want[k.Group+"/"+k.Kind] = true
		}
	}
	carriers := map[string]int{}
	for _, k := range c.native {
		if k.PodTemplate != want[k.Group+"/"+k.Kind] {
			t.Errorf("%s: PodTemplate is %v", k.Resource(), k.PodTemplate)
		}
		if carriers[k.Carrier]++; k.Carrier != "" && !k.PodTemplate {
			t.Errorf("%s: %s can make no pods of it", k.Resource(), k.Carrier)
		}
	}
	// What has a template but no carrier is only read by others.
	if !maps.Equal(carriers, map[string]int{"": len(c.native) - 8, Kubelet: 1, ControllerManager: 7}) {
		t.Errorf("carriers: %v", carriers)
	}
	if err := c.AddCRD(definition("example.com", "widgets", "Widget", "Namespaced")); err != nil {
		t.Fatal(err)
	}
	if k := c.ByGroupKind("example.com", "Widget"); k.Carrier != Operator || k.PodTemplate || k.Authority {
		t.Errorf("custom kind: %+v", k)
	}
}

func holdsType(in, want reflect.Type, seen map[reflect.Type]bool) bool {
	if in == want || seen[in] {
		return in == want
	}
	seen[in] = true
	switch in.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		return holdsType(in.Elem(), want, seen)
	case reflect.Struct:
		for i := range in.NumField() {
			if holdsType(in.Field(i).Type, want, seen) {
				return true
			}
		}
	}
	return false
}

// counted are the kinds whose generation the API server counts up when their
// spec changes: in kubernetes v1.37.2 those whose pkg/registry/*/*/strategy.go
// does so in PrepareForUpdate, in apiextensions-apiserver v0.37.2
// pkg/registry/customresourcedefinition/strategy.go; kube-aggregator's apiservice
// does not. Read, not only searched: priorityclass only begins with 1,
// volumeattachment says why it does not count, horizontalpodautoscaler counts
// behind the gate HPAGeneration, which 1.37 has and turns on, and pod does since
// PodObservedGenerationTracking, on since 1.34.
var counted = []string{
	"cronjob", "csidriver", "customresourcedefinition", "daemonset", "deployment", "deviceclass", "devicetaintrule", "endpointslice",
	"eviction", "evictionrequest", "flowschema", "horizontalpodautoscaler", "ingress", "ingressclass", "job",
	"mutatingadmissionpolicy", "mutatingadmissionpolicybinding", "mutatingwebhookconfiguration", "networkpolicy", "pod",
	"poddisruptionbudget", "podtemplate", "prioritylevelconfiguration", "replicaset", "replicationcontroller", "resourceslice",
	"statefulset", "validatingadmissionpolicy", "validatingadmissionpolicybinding", "validatingwebhookconfiguration",
}

func TestGenerationRows(t *testing.T) {
	var rows []string
	for _, k := range NewCatalogue().native {
		if k.Generation {
			rows = append(rows, k.Singular)
		}
	}
	slices.Sort(rows)
	if diff := cmp.Diff(counted, rows); diff != "" {
		t.Errorf("rows with a generation: %s", diff)
	}

	// Where the sources are at hand they are asked again.
	list := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	list.Dir, list.Env = "../../internal/kube", append(os.Environ(), "GOPROXY=off", "GOFLAGS=-mod=readonly")
	dir, err := list.Output()
	if err != nil || len(bytes.TrimSpace(dir)) == 0 {
		t.Skip("the sources of k8s.io/kubernetes are not in the module cache")
	}
	strategies, err := filepath.Glob(filepath.Join(string(bytes.TrimSpace(dir)), "pkg/registry/*/*/strategy.go"))
	if err != nil || len(strategies) < 50 {
		t.Fatalf("%d strategies, %v", len(strategies), err)
	}
	counts := regexp.MustCompile(`\.Generation = \w+\.Generation \+ 1|\.Generation\+\+`)
	found := []string{"customresourcedefinition"}
	for _, name := range strategies {
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if counts.Match(source) {
			found = append(found, filepath.Base(filepath.Dir(name)))
		}
	}
	slices.Sort(found)
	if diff := cmp.Diff(counted, found); diff != "" {
		t.Errorf("strategies that count: %s", diff)
	}
}

// TestYoungGeneration: what an API server stored that does not count yet stays
// without a generation.
func TestYoungGeneration(t *testing.T) {
	four := int32(4)
	for _, test := range []struct {
		obj          runtime.Object
		edit         Edit
		before, want int64
	}{
		{&autoscalingv2.HorizontalPodAutoscaler{Spec: autoscalingv2.HorizontalPodAutoscalerSpec{MinReplicas: &four}}, Edit{Field: MinReplicas, Value: int64(1)}, 0, 0},
		{&autoscalingv2.HorizontalPodAutoscaler{Spec: autoscalingv2.HorizontalPodAutoscalerSpec{MinReplicas: &four}}, Edit{Field: MinReplicas, Value: int64(1)}, 7, 8},
		{&appsv1.Deployment{Spec: appsv1.DeploymentSpec{Replicas: &four}}, Edit{Field: Replicas, Value: int64(1)}, 0, 1},
	} {
		plain := setGeneration(t, encode(t, test.obj), test.before)
		o := mustDecode(t, plain)
		k := NewCatalogue().ByGroupKind(o.GroupVersionKind().Group, o.Kind)
		out, changes, err := k.Apply(plain, test.edit)
		if err != nil {
			t.Fatal(err)
		}
		if got := mustDecode(t, out).Meta.Generation; got != test.want {
			t.Errorf("%s of generation %d has %d, want %d", o.Kind, test.before, got, test.want)
		}
		checkRevert(t, o.Kind, k, o, plain, out, changes)
	}
}

// TestAuthorityRows demands that whoever adds a group decides whether its kinds
// give authority.
func TestAuthorityRows(t *testing.T) {
	whole := map[string]bool{
		"rbac.authorization.k8s.io": true, "admissionregistration.k8s.io": true,
		"apiregistration.k8s.io": true, "apiextensions.k8s.io": true, "certificates.k8s.io": true,
	}
	none := []string{
		"", "apps", "autoscaling", "batch", "coordination.k8s.io", "discovery.k8s.io", "events.k8s.io",
		"flowcontrol.apiserver.k8s.io", "internal.apiserver.k8s.io", "lifecycle.k8s.io", "networking.k8s.io", "node.k8s.io",
		"policy", "resource.k8s.io", "scheduling.k8s.io", "storage.k8s.io", "storagemigration.k8s.io",
	}
	for _, k := range NewCatalogue().native {
		if !whole[k.Group] && !slices.Contains(none, k.Group) {
			t.Errorf("%s: decide whether the group gives authority", k.Resource())
		}
		if want := whole[k.Group] || k.Resource() == "serviceaccounts"; k.Authority != want {
			t.Errorf("%s: Authority is %v", k.Resource(), k.Authority)
		}
		limits := []string{"limitranges", "resourcequotas", "networkpolicies.networking.k8s.io", "poddisruptionbudgets.policy"}
		if want := k.Group == "admissionregistration.k8s.io" || slices.Contains(limits, k.Resource()); k.Forbids != want {
			t.Errorf("%s: Forbids is %v", k.Resource(), k.Forbids)
		}
	}
}

// walkTags follows JSON names through struct tags and returns the protobuf
// numbers on the way and the type at the end, pointers taken off.
func walkTags(t *testing.T, typ reflect.Type, path []string) (numbers []protowire.Number, last reflect.Type) {
	t.Helper()
	for _, name := range path {
		if typ.Kind() == reflect.Slice { // of what is named
			typ = typ.Elem()
		}
		found := false
		for i := range typ.NumField() {
			f := typ.Field(i)
			if json, _, _ := strings.Cut(f.Tag.Get("json"), ","); json != name {
				continue
			}
			parts := strings.Split(f.Tag.Get("protobuf"), ",")
			if len(parts) < 2 {
				t.Fatalf("%v.%s has no protobuf tag", typ, f.Name)
			}
			n, err := strconv.Atoi(parts[1])
			if err != nil {
				t.Fatal(err)
			}
			numbers, typ, found = append(numbers, protowire.Number(n)), f.Type, true
			if typ.Kind() == reflect.Pointer {
				typ = typ.Elem()
			}
			break
		}
		if !found {
			t.Fatalf("%v has no field %s", typ, name)
		}
	}
	return numbers, typ
}

func TestFieldGoesByVersion(t *testing.T) {
	c := NewCatalogue()
	deployments := c.ByGroupKind("apps", "Deployment")
	for _, test := range []struct {
		name       FieldName
		apiVersion string
		want       bool
	}{
		{Replicas, "apps/v1", true},
		{Replicas, "extensions/v1beta1", true},
		{Replicas, "apps/v2", false}, // not known yet: its numbers could be others
		{Replicas, "", false},
		{Suspend, "apps/v1", false},
		{Generation, "apps/v1", true},
	} {
		if _, ok := deployments.Field(test.name, test.apiVersion); ok != test.want {
			t.Errorf("Field(%s, %q) = %v, want %v", test.name, test.apiVersion, ok, test.want)
		}
	}
	if _, ok := c.ByGroupKind("", "Node").Field(Generation, "v1"); ok {
		t.Error("nodes have no generation")
	}
	if f, ok := c.ByGroupKind("apiextensions.k8s.io", "CustomResourceDefinition").Field(Generation, "apiextensions.k8s.io/v1beta1"); !ok || f.Wire != nil {
		t.Errorf("definitions are JSON with a generation: %+v, %v", f, ok)
	}
}

func TestEventsAreOneLocation(t *testing.T) {
	c := NewCatalogue()
	var events []*Kind
	for _, k := range c.Kinds() {
		if k.Dir == "events" {
			events = append(events, k)
		}
	}
	if len(events) != 1 || events[0].Group != "" {
		t.Errorf("Kinds lists %d rows for events", len(events))
	}
	want := schema.GroupResource{Resource: "events"}
	if got := c.ByGroupKind("events.k8s.io", "Event").StoredAs(); got != want {
		t.Errorf("events.k8s.io is encrypted as %v", got)
	}
}
