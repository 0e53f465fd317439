package storage

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	kubescheme "k8s.io/client-go/kubernetes/scheme"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	kjson "sigs.k8s.io/json"
)

// aggregated has the types of the two other API servers that live in a
// kube-apiserver; client-go's scheme has all the rest.
var aggregated = sync.OnceValue(func() *runtime.Scheme {
	s := runtime.NewScheme()
	utilruntime.Must(apiextensionsv1.AddToScheme(s))
	utilruntime.Must(apiregistrationv1.AddToScheme(s))
	return s
})

// typed decodes the whole object into its Go type; nil if this build does not
// know the type.
func (o *Object) typed() (runtime.Object, error) { return o.typedOf(nil) }

// typedOf is typed for a part of a protobuf value.
func (o *Object) typedOf(keep part) (runtime.Object, error) {
	obj, err := kubescheme.Scheme.New(o.GroupVersionKind())
	if err != nil {
		if obj, err = aggregated().New(o.GroupVersionKind()); err != nil {
			return nil, nil
		}
	}
	if o.Format == JSON {
		if kjson.UnmarshalCaseSensitivePreserveInts(o.plain, obj) != nil {
			// The decoder's own words would quote what is stored.
			return nil, errors.New("a field has the wrong type")
		}
		return obj, nil
	}
	message, ok := obj.(unmarshaler)
	if !ok {
		return nil, nil
	}
	raw, err := keep.only(o.raw)
	if err != nil {
		return nil, err
	}
	return obj, message.Unmarshal(raw)
}

// decoded returns the object in generic form, numbers as they are spelled, and
// whether there is such a form: protobuf needs a type that this build knows.
// JSON stands for itself, but must decode as its type too.
func (o *Object) decoded() (object map[string]any, known bool, err error) {
	obj, err := o.typed()
	if err != nil || (obj == nil && o.Format == Protobuf) {
		return nil, false, err
	}
	text := o.plain
	if o.Format == Protobuf {
		if text, err = json.Marshal(obj); err != nil {
			return nil, false, err
		}
	}
	v, err := generic(text)
	object, known = v.(map[string]any)
	return object, known, err
}

// JSON returns the whole object as JSON for display, apiVersion and kind first.
// Of protobuf whose type this build does not know it returns the metadata only,
// and note says so.
func (o *Object) JSON() (data []byte, note string, err error) {
	if o.Format == JSON {
		d, err := openJSON(o.plain)
		if err != nil {
			return nil, "", err
		}
		var members [][]byte
		for _, m := range d.root.members {
			if m.key != "apiVersion" && m.key != "kind" {
				members = append(members, d.data[m.start:m.value.end])
			}
		}
		return o.headed(members), "", nil
	}
	obj, err := o.typed()
	if err != nil {
		return nil, "", undecodable("the stored object does not decode as %s: %v", o.GroupVersionKind(), err)
	}
	if obj == nil {
		meta, err := o.wholeMeta()
		if err != nil {
			return nil, "", err
		}
		text, err := json.Marshal(meta)
		if err != nil {
			return nil, "", undecodable("the metadata has no JSON form: %v", err)
		}
		note = fmt.Sprintf("this build does not know %s of %s: only its metadata is shown", o.Kind, o.APIVersion)
		return o.headed([][]byte{append([]byte(`"metadata":`), text...)}), note, nil
	}
	text, err := json.Marshal(obj)
	if err != nil {
		return nil, "", undecodable("the stored object has no JSON form: %v", err)
	}
	// The wire form has no TypeMeta, so the text has neither apiVersion nor kind.
	return o.headed([][]byte{text[1 : len(text)-1]}), "", nil
}

// headed makes an object of apiVersion, kind and the members.
func (o *Object) headed(members [][]byte) []byte {
	head := slices.Concat([]byte(`"apiVersion":`), quote(o.APIVersion), []byte(`,"kind":`), quote(o.Kind))
	all := bytes.Join(append([][]byte{head}, slices.DeleteFunc(members, func(m []byte) bool { return len(m) == 0 })...), []byte(","))
	return slices.Concat([]byte("{"), all, []byte("}"))
}

// Redacted stands in the place of every value that Redact removes.
const Redacted = "REDACTED"

// Redact removes from a Secret's JSON what is secret: the values of data and
// stringData, and annotations that tools use to keep a copy of the object, such
// as kubectl.kubernetes.io/last-applied-configuration. The keys stay.
func Redact(object []byte) ([]byte, error) {
	d, err := openJSON(object)
	if err != nil {
		return nil, err
	}
	var hide []jsonNode
	for _, m := range d.root.members {
		switch m.key {
		case "data", "stringData":
			hide = append(hide, values(m.value)...)
		case "metadata":
			for _, m := range m.value.members {
				if m.key != "annotations" {
					continue
				}
				if m.value.kind != '{' {
					hide = append(hide, m.value)
				}
				for _, a := range m.value.members {
					if holdsObject(a.key, d.text(&a.value)) {
						hide = append(hide, a.value)
					}
				}
			}
		}
	}
	out, at := []byte(nil), 0
	for _, n := range hide {
		out = append(append(out, d.data[at:n.start]...), quote(Redacted)...)
		at = n.end
	}
	return append(out, d.data[at:]...), nil
}

// values returns an object's values, or the whole of what should be one.
func values(n jsonNode) []jsonNode {
	if n.kind != '{' {
		return []jsonNode{n}
	}
	all := make([]jsonNode, len(n.members))
	for i, m := range n.members {
		all[i] = m.value
	}
	return all
}

// holdsObject tells the annotations in which kubectl, Rancher, kapp and their
// like keep what was applied: by their usual names, or since the value is JSON.
func holdsObject(key string, text []byte) bool {
	for _, suffix := range []string{"last-applied-configuration", "last-applied", "/applied", "/original"} {
		if strings.HasSuffix(key, suffix) {
			return true
		}
	}
	var value string
	if json.Unmarshal(text, &value) != nil {
		return true
	}
	value = strings.TrimSpace(value)
	return strings.HasPrefix(value, "{") || strings.HasPrefix(value, "[")
}

// stateful has the kinds that have a state, and what of a protobuf value makes
// it: a field of the object and fields of that (k8s.io/api, generated.proto of
// each group). Decoding whole objects would make most of the cost of a list.
var stateful = map[string]part{
	"Deployment":              {2: {1: nil, 7: nil}, 3: {7: nil}},
	"StatefulSet":             {2: {1: nil}, 3: {3: nil}},
	"ReplicaSet":              {2: {1: nil}, 3: {4: nil}},
	"ReplicationController":   {2: {1: nil}, 3: {4: nil}},
	"DaemonSet":               {3: {3: nil, 4: nil}},
	"Job":                     {2: {2: nil, 10: nil}, 3: {5: nil}},
	"CronJob":                 {2: {1: nil, 4: nil}},
	"HorizontalPodAutoscaler": {2: {2: nil, 3: nil}, 3: {4: nil}},
	"Pod":                     {3: {1: nil}},
	"Namespace":               {3: {1: nil}},
	"PersistentVolumeClaim":   {3: {1: nil}},
	"PersistentVolume":        {3: {1: nil}},
	"Node":                    {2: {4: nil}, 3: {4: nil}},
}

// State returns the object's state in a few characters for a column of a table:
// ready of desired replicas, suspended, a phase; "" where the kind has none or
// the object cannot be decoded.
func (o *Object) State() string {
	keep, has := stateful[o.Kind]
	if !has {
		return ""
	}
	if o.Format == Protobuf && o.APIVersion == "v1" {
		switch o.Kind {
		case "Pod", "Namespace", "PersistentVolumeClaim", "PersistentVolume":
			return o.phase()
		}
	}
	obj, err := o.typedOf(keep)
	if err != nil {
		return ""
	}
	return stateOf(obj)
}

// phase returns status.phase, field 3.1 of the core kinds that have one, without
// making their Go types: there may be 100,000 pods.
func (o *Object) phase() string {
	var phase []byte
	err := each(o.raw, 0, len(o.raw), func(status wireField) error {
		if status.num != 3 || status.typ != bytesType {
			return nil
		}
		return each(o.raw, status.value, status.end, func(f wireField) error {
			if f.num == 1 && f.typ == bytesType {
				phase = o.raw[f.value:f.end]
			}
			return nil
		})
	})
	if err != nil {
		return ""
	}
	return string(phase)
}

func stateOf(obj runtime.Object) string {
	switch t := obj.(type) {
	case *appsv1.Deployment:
		return replicas(t.Status.ReadyReplicas, t.Spec.Replicas, t.Spec.Paused, "paused")
	case *appsv1.StatefulSet:
		return replicas(t.Status.ReadyReplicas, t.Spec.Replicas, false, "")
	case *appsv1.ReplicaSet:
		return replicas(t.Status.ReadyReplicas, t.Spec.Replicas, false, "")
	case *corev1.ReplicationController:
		return replicas(t.Status.ReadyReplicas, t.Spec.Replicas, false, "")
	case *appsv1.DaemonSet:
		return replicas(t.Status.NumberReady, &t.Status.DesiredNumberScheduled, false, "")
	case *batchv1.Job:
		return replicas(t.Status.Succeeded, t.Spec.Completions, t.Spec.Suspend != nil && *t.Spec.Suspend, "suspended")
	case *batchv1.CronJob:
		if t.Spec.Suspend != nil && *t.Spec.Suspend {
			return "suspended"
		}
		return t.Spec.Schedule
	case *autoscalingv2.HorizontalPodAutoscaler:
		least := int32(1)
		if t.Spec.MinReplicas != nil {
			least = *t.Spec.MinReplicas
		}
		return fmt.Sprintf("%d in %d-%d", t.Status.DesiredReplicas, least, t.Spec.MaxReplicas)
	case *corev1.Pod:
		return string(t.Status.Phase)
	case *corev1.Namespace:
		return string(t.Status.Phase)
	case *corev1.PersistentVolumeClaim:
		return string(t.Status.Phase)
	case *corev1.PersistentVolume:
		return string(t.Status.Phase)
	case *corev1.Node:
		return nodeState(t)
	}
	return ""
}

// replicas writes ready/desired, as kubectl does, and a word if it applies.
// Kubernetes' default for absent is one.
func replicas(ready int32, desired *int32, flagged bool, flag string) string {
	want := int32(1)
	if desired != nil {
		want = *desired
	}
	s := fmt.Sprintf("%d/%d", ready, want)
	if flagged {
		s += " " + flag
	}
	return s
}

func nodeState(n *corev1.Node) string {
	state := "Unknown"
	for _, c := range n.Status.Conditions {
		if c.Type != corev1.NodeReady {
			continue
		}
		switch c.Status {
		case corev1.ConditionTrue:
			state = "Ready"
		case corev1.ConditionFalse:
			state = "NotReady"
		}
	}
	if n.Spec.Unschedulable {
		state += " unschedulable"
	}
	return state
}
