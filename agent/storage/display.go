package storage

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
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

// plainAnnotations are the annotations of Secrets that only name what they
// belong to. Of all others nobody knows: kubectl, Rancher, kapp and their like
// keep copies of the whole object in annotations, as JSON, YAML or packed.
var plainAnnotations = map[string]bool{
	corev1.ServiceAccountNameKey:       true,
	corev1.ServiceAccountUIDKey:        true,
	"meta.helm.sh/release-name":        true,
	"meta.helm.sh/release-namespace":   true,
	"cert-manager.io/certificate-name": true,
	"cert-manager.io/issuer-name":      true,
}

// Redact removes from a Secret's JSON what is or may be secret: the values of
// data and stringData, and of all annotations but those of plainAnnotations. The
// keys stay.
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
					if !plainAnnotations[a.key] || d.data[a.value.start] != '"' {
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

// state is how a kind shows its state: what of a protobuf value makes it, a
// field of the object and fields of that (k8s.io/api, generated.proto of each
// group), and the text of that. Decoding whole objects would make most of the
// cost of a list.
type state struct {
	keep part
	text func(runtime.Object) string
}

// stateOf makes the state of a kind of one Go type; objects that are stored as
// an older version have none.
func stateOf[T runtime.Object](keep part, text func(T) string) *state {
	return &state{keep, func(o runtime.Object) string {
		if t, ok := o.(T); ok {
			return text(t)
		}
		return ""
	}}
}

// The states that the kind table names.
var (
	deploymentState = stateOf(part{2: {1: nil, 7: nil}, 3: {7: nil}}, func(d *appsv1.Deployment) string {
		return replicas(d.Status.ReadyReplicas, d.Spec.Replicas, d.Spec.Paused, "paused")
	})
	statefulSetState = stateOf(part{2: {1: nil}, 3: {3: nil}}, func(s *appsv1.StatefulSet) string {
		return replicas(s.Status.ReadyReplicas, s.Spec.Replicas, false, "")
	})
	replicaSetState = stateOf(part{2: {1: nil}, 3: {4: nil}}, func(r *appsv1.ReplicaSet) string {
		return replicas(r.Status.ReadyReplicas, r.Spec.Replicas, false, "")
	})
	replicationControllerState = stateOf(part{2: {1: nil}, 3: {4: nil}}, func(r *corev1.ReplicationController) string {
		return replicas(r.Status.ReadyReplicas, r.Spec.Replicas, false, "")
	})
	daemonSetState = stateOf(part{2: {2: {2: {7: nil}}}, 3: {3: nil, 4: nil}}, func(d *appsv1.DaemonSet) string {
		_, stopped := d.Spec.Template.Spec.NodeSelector[StopLabel]
		return replicas(d.Status.NumberReady, &d.Status.DesiredNumberScheduled, stopped, "stopped")
	})
	jobState = stateOf(part{2: {2: nil, 10: nil}, 3: {5: nil}}, func(j *batchv1.Job) string {
		return replicas(j.Status.Succeeded, j.Spec.Completions, j.Spec.Suspend != nil && *j.Spec.Suspend, "suspended")
	})
	cronJobState = stateOf(part{2: {1: nil, 4: nil}}, func(c *batchv1.CronJob) string {
		if c.Spec.Suspend != nil && *c.Spec.Suspend {
			return "suspended"
		}
		return c.Spec.Schedule
	})
	autoscalerState = stateOf(part{2: {2: nil, 3: nil}, 3: {4: nil}}, func(h *autoscalingv2.HorizontalPodAutoscaler) string {
		least := int32(1)
		if h.Spec.MinReplicas != nil {
			least = *h.Spec.MinReplicas
		}
		return fmt.Sprintf("%d in %d-%d", h.Status.DesiredReplicas, least, h.Spec.MaxReplicas)
	})
	phase                      = part{3: {1: nil}}
	podState                   = stateOf(phase, func(p *corev1.Pod) string { return string(p.Status.Phase) })
	namespaceState             = stateOf(phase, func(n *corev1.Namespace) string { return string(n.Status.Phase) })
	persistentVolumeClaimState = stateOf(phase, func(c *corev1.PersistentVolumeClaim) string { return string(c.Status.Phase) })
	persistentVolumeState      = stateOf(phase, func(v *corev1.PersistentVolume) string { return string(v.Status.Phase) })
	nodeState                  = stateOf(part{2: {4: nil}, 3: {4: nil}}, readiness)
)

// states has the states of the kind table.
var states = sync.OnceValue(func() map[schema.GroupKind]*state {
	all := map[schema.GroupKind]*state{}
	for _, k := range nativeKinds {
		if k.state != nil {
			all[schema.GroupKind{Group: k.Group, Kind: k.Kind}] = k.state
		}
	}
	return all
})

// State returns the object's state in a few characters for a column of a table:
// ready of desired replicas, suspended, a phase; "" where the kind has none or
// the object cannot be decoded.
func (o *Object) State() string {
	s := states()[o.GroupVersionKind().GroupKind()]
	if s == nil {
		return ""
	}
	obj, err := o.typedOf(s.keep)
	if err != nil {
		return ""
	}
	return s.text(obj)
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

func readiness(n *corev1.Node) string {
	ready := "Unknown"
	for _, c := range n.Status.Conditions {
		if c.Type != corev1.NodeReady {
			continue
		}
		switch c.Status {
		case corev1.ConditionTrue:
			ready = "Ready"
		case corev1.ConditionFalse:
			ready = "NotReady"
		}
	}
	if n.Spec.Unschedulable {
		ready += " unschedulable"
	}
	return ready
}
