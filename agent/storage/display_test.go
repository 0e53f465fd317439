package storage

import (
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"

	"github.com/halligan-io/halligan/internal/fault"
)

func TestDisplayUnknownType(t *testing.T) {
	plain := envelope("future.k8s.io/v3", "Gadget", message(1, text(1, "g"), text(5, "uid-1")), message(2, varint(1, 3)))
	o := mustDecode(t, plain)
	data, note, err := o.JSON()
	if err != nil || !strings.HasPrefix(string(data), `{"apiVersion":"future.k8s.io/v3","kind":"Gadget","metadata":{"name":"g","uid":"uid-1"`) {
		t.Errorf("%s, %v", data, err)
	}
	if !strings.Contains(note, "Gadget") {
		t.Errorf("note %q", note)
	}
	// It can be edited all the same; then bytes alone are compared.
	k := &Kind{Group: "future.k8s.io", Version: "v3", Kind: "Gadget", Generation: true, Fields: map[FieldName]Field{
		Replicas: {Type: Int, JSON: []string{"spec", "replicas"}, Wire: numbers(2, 1)}}}
	out, changes, err := k.Apply(plain, Edit{Field: Replicas, Value: int64(0)})
	if err != nil || len(changes) != 2 {
		t.Fatalf("%+v, %v", changes, err)
	}
	if v, present, err := mustDecode(t, out).Int(k.Fields[Replicas]); v != 0 || !present || err != nil {
		t.Errorf("reads %d, %v, %v", v, present, err)
	}
}

func TestDisplayOrder(t *testing.T) {
	o := mustDecode(t, []byte(`{ "spec": {"n": 1e400}, "kind": "W", "metadata": {"name": "w", "managedFields": [{"manager": "m"}]}, "apiVersion": "a.io/v1" }`))
	data, note, err := o.JSON()
	want := `{"apiVersion":"a.io/v1","kind":"W","spec": {"n": 1e400},"metadata": {"name": "w", "managedFields": [{"manager": "m"}]}}`
	if string(data) != want || note != "" || err != nil {
		t.Errorf("%s, %q, %v", data, note, err)
	}
	o = mustDecode(t, []byte(`{"apiVersion":"v1","kind":"Pod"}`))
	if data, _, err := o.JSON(); string(data) != `{"apiVersion":"v1","kind":"Pod"}` || err != nil {
		t.Errorf("%s, %v", data, err)
	}
}

func TestRedact(t *testing.T) {
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "s", Namespace: "n", Annotations: map[string]string{
			"kubectl.kubernetes.io/last-applied-configuration": `{"data":{"key":"aHVudGVyMg=="}}`,
			"objectset.rio.cattle.io/applied":                  "hunter2-packed",
			"kapp.k14s.io/whatever":                            ` {"stringData":{"key":"hunter2"}}`,
			"note":                                             "key: hunter2",
			"backup":                                           "aHVudGVyMg==",
			"kubernetes.io/service-account.name":               "robot",
			"kubernetes.io/service-account.uid":                "6fbd0d0e",
		}},
		Data: map[string][]byte{"key": []byte("hunter2"), "empty": nil},
		Type: corev1.SecretTypeOpaque,
	}
	data, _, err := mustDecode(t, encode(t, secret)).JSON()
	if err != nil {
		t.Fatal(err)
	}
	out, err := Redact(data)
	if err != nil {
		t.Fatal(err)
	}
	for _, gone := range []string{"hunter2", "aHVudGVyMg"} {
		if strings.Contains(string(out), gone) {
			t.Errorf("%q shows in %s", gone, out)
		}
	}
	for _, kept := range []string{`"key":"` + Redacted + `"`, `"empty":"` + Redacted + `"`, `"robot"`, `"6fbd0d0e"`, `"note":"` + Redacted + `"`, `"type":"Opaque"`, `"name":"s"`} {
		if !strings.Contains(string(out), kept) {
			t.Errorf("%s is missing in %s", kept, out)
		}
	}
	for name, object := range map[string]string{
		"data twice":          `{"data":{"a":"hunter2"},"data":{"a":"hunter2"}}`,
		"key twice":           `{"stringData":{"a":"hunter2","a":"hunter2"}}`,
		"escaped":             `{"d\u0061ta":{"a":"hunter2"}}`,
		"data is text":        `{"data":"hunter2"}`,
		"data is a list":      `{"data":["hunter2"]}`,
		"value is an object":  `{"data":{"a":{"b":"hunter2"}}}`,
		"annotations a text":  `{"metadata":{"annotations":"hunter2"}}`,
		"annotation an array": `{"metadata":{"annotations":{"a":["hunter2"]}}}`,
		"annotation known":    `{"metadata":{"annotations":{"kubernetes.io/service-account.name":["hunter2"]}}}`,
		"metadata twice":      `{"metadata":{"annotations":{"last-applied":"hunter2"}},"metadata":{"annotations":{"last-applied":"hunter2"}}}`,
	} {
		out, err := Redact([]byte(object))
		if err != nil || strings.Contains(string(out), "hunter2") {
			t.Errorf("%s: %s, %v", name, out, err)
		}
	}
	_, err = Redact([]byte(`{"data":{"a":"hunter2"}`))
	wantFault(t, err, fault.Undecodable)
}

func TestState(t *testing.T) {
	three, yes := int32(3), true
	condition := func(s corev1.ConditionStatus) corev1.NodeStatus {
		return corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: s}}}
	}
	for want, obj := range map[string]runtime.Object{
		"2/3":                 &appsv1.StatefulSet{Spec: appsv1.StatefulSetSpec{Replicas: &three}, Status: appsv1.StatefulSetStatus{ReadyReplicas: 2}},
		"0/1":                 &appsv1.Deployment{},
		"0/3 paused":          &appsv1.Deployment{Spec: appsv1.DeploymentSpec{Replicas: &three, Paused: true}},
		"4/5":                 &appsv1.DaemonSet{Status: appsv1.DaemonSetStatus{NumberReady: 4, DesiredNumberScheduled: 5}},
		"1/3 suspended":       &batchv1.Job{Spec: batchv1.JobSpec{Completions: &three, Suspend: &yes}, Status: batchv1.JobStatus{Succeeded: 1}},
		"suspended":           &batchv1.CronJob{Spec: batchv1.CronJobSpec{Suspend: &yes}},
		"@hourly":             &batchv1.CronJob{Spec: batchv1.CronJobSpec{Schedule: "@hourly"}},
		"2 in 1-9":            &autoscalingv2.HorizontalPodAutoscaler{Spec: autoscalingv2.HorizontalPodAutoscalerSpec{MaxReplicas: 9}, Status: autoscalingv2.HorizontalPodAutoscalerStatus{DesiredReplicas: 2}},
		"Running":             &corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodRunning}},
		"Ready":               &corev1.Node{Status: condition(corev1.ConditionTrue)},
		"NotReady":            &corev1.Node{Status: condition(corev1.ConditionFalse)},
		"Unknown":             &corev1.Node{},
		"Ready unschedulable": &corev1.Node{Spec: corev1.NodeSpec{Unschedulable: true}, Status: condition(corev1.ConditionTrue)},
		"":                    &corev1.ConfigMap{},
	} {
		if got := mustDecode(t, encode(t, obj)).State(); got != want {
			t.Errorf("state of %T is %q, want %q", obj, got, want)
		}
	}
	if got := mustDecode(t, []byte(`{"apiVersion":"apps/v1","kind":"ReplicaSet","spec":{"replicas":3},"status":{"readyReplicas":1}}`)).State(); got != "1/3" {
		t.Errorf("state of a ReplicaSet in JSON is %q", got)
	}
}

// TestPartsStandForTheWhole: what an inventory leaves undecoded changes nothing
// of what it shows.
func TestPartsStandForTheWhole(t *testing.T) {
	seen := map[string]bool{}
	for name, plain := range corpus(t, ".pb") {
		o, err := Decode(plain)
		if err != nil {
			continue // nothing that is stored, such as a Status
		}
		obj, err := o.typed()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		want := ""
		k := NewCatalogue().ByGroupKind(o.GroupVersionKind().Group, o.Kind)
		if k != nil && k.state != nil {
			want = k.state.text(obj)
		}
		if got := o.State(); got != want {
			t.Errorf("state of %s is %q, want %q", name, got, want)
		}
		seen[o.Kind] = seen[o.Kind] || want != ""

		var whole metav1.PartialObjectMetadata
		if err := whole.Unmarshal(o.raw); err != nil {
			t.Fatal(err)
		}
		if fields, err := o.ManagedFields(); err != nil || !reflect.DeepEqual(fields, whole.ManagedFields) {
			t.Errorf("managedFields of %s: %v, %v", name, fields, err)
		}
		whole.ManagedFields = nil
		if !reflect.DeepEqual(o.Meta, whole.ObjectMeta) {
			t.Errorf("metadata of %s:\n%s", name, cmp.Diff(whole.ObjectMeta, o.Meta))
		}
	}
	for _, k := range nativeKinds {
		if k.state != nil && !seen[k.Kind] {
			t.Errorf("the corpus has no %s with a state", k.Kind)
		}
		if (k.Carrier != "" || k.Fields[Replicas].Type != 0) && k.state == nil {
			t.Errorf("lists of %s show no state", k.Resource())
		}
	}
}

func TestEncodeTyped(t *testing.T) {
	stored := string(encode(t, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "c"}, Data: map[string]string{"a": "b"}}))
	if !strings.HasPrefix(stored, "k8s\x00\x0a\x0f\x0a\x02v1\x12\x09ConfigMap\x12") || !strings.HasSuffix(stored, "\x1a\x00\x22\x00") {
		t.Errorf("ConfigMap is stored as %q", stored)
	}
	for _, obj := range []runtime.Object{
		&apiextensionsv1.CustomResourceDefinition{ObjectMeta: metav1.ObjectMeta{Name: "c"}},
		&apiregistrationv1.APIService{ObjectMeta: metav1.ObjectMeta{Name: "c"}},
		&unstructured.Unstructured{Object: map[string]any{"apiVersion": "a.io/v1", "kind": "A", "metadata": map[string]any{"name": "c"}}},
	} {
		o := mustDecode(t, encode(t, obj))
		if o.Format != JSON || o.Kind == "" || o.APIVersion == "" || o.Meta.Name != "c" {
			t.Errorf("%T is stored as %s", obj, o.Plain())
		}
	}
	d := deployment(nil)
	encode(t, d)
	if d.Kind != "" {
		t.Error("the caller's object was changed")
	}
	_, err := EncodeTyped(unknownType{})
	wantFault(t, err, fault.Usage)
}

type unknownType struct{ runtime.Object }
