package diagnose

import (
	"context"
	"encoding/json"

	"github.com/halligan-io/halligan/agent/storage"
)

// workload is an object of which etcd itself holds that it is there, under the UID
// that those it owns name. The zero value is none.
type workload struct {
	kind            *storage.Kind
	namespace, name string
	// account is the ServiceAccount of its pods, "" where it makes none.
	account string
}

func (w workload) String() string {
	if w.kind == nil {
		return ""
	}
	return w.kind.Kind + "/" + w.name
}

// user is how the API server authenticates its pods.
func (w workload) user() string {
	if w.account == "" {
		return ""
	}
	return "system:serviceaccount:" + w.namespace + ":" + w.account
}

// Bounds of following owners.
const (
	maxOwners = 5   // CronJob, Job, Pod; operators add one or two
	maxLooked = 400 // objects read for one look
)

// root follows an owner reference up to the workload at its end, as far as each
// owner is there in the same namespace, or the cluster, with the UID that is named.
func (s *scene) root(ctx context.Context, namespace string, ref ownerRef) workload {
	if ref.uid == "" {
		return workload{}
	}
	id := namespace + "/" + ref.uid + "/" + ref.kind + "/" + ref.name
	s.mu.Lock()
	w, done := s.known[id]
	full := len(s.known) >= maxLooked
	s.mu.Unlock()
	if done || full {
		return w
	}
	cat := s.kinds(ctx)
	for range maxOwners {
		kind := cat.ByGroupKind(ref.group, ref.kind)
		if kind == nil {
			break
		}
		in := namespace
		if !kind.Namespaced {
			in = ""
		}
		o := s.object(ctx, kind, in, ref.name)
		if o == nil || ref.uid == "" || string(o.Meta.UID) != ref.uid {
			break
		}
		w = workload{kind: kind, namespace: in, name: ref.name, account: accountOf(kind, o)}
		ref = controllerOf(&o.Meta)
		if ref.uid == "" {
			break
		}
	}
	s.mu.Lock()
	s.known[id] = w
	s.mu.Unlock()
	return w
}

// object reads one, nil where there is none that can be read and is what its key
// says.
func (s *scene) object(ctx context.Context, kind *storage.Kind, namespace, name string) *storage.Object {
	key, err := kind.Key(s.d.o.Prefix, namespace, name)
	if err != nil {
		return nil
	}
	kv, found, _, err := s.d.o.Etcd.Get(ctx, key)
	if err != nil || !found {
		return nil
	}
	plain, err := s.d.o.Encryption.Open(ctx, kind, kv.Key, kv.Value)
	if err != nil {
		return nil
	}
	o, err := storage.Decode(plain)
	if err != nil || o.Check(kind, namespace, name) != nil {
		return nil
	}
	return o
}

// accountOf returns the ServiceAccount of the pods that a native kind makes.
func accountOf(kind *storage.Kind, o *storage.Object) string {
	if !kind.PodTemplate {
		return ""
	}
	type podSpec struct {
		ServiceAccountName string `json:"serviceAccountName"`
	}
	type template struct {
		Spec *podSpec `json:"spec"`
	}
	var v struct {
		Spec struct {
			podSpec
			Containers  []json.RawMessage `json:"containers"` // of a pod
			Template    *template         `json:"template"`
			JobTemplate *struct {
				Spec struct {
					Template *template `json:"template"`
				} `json:"spec"`
			} `json:"jobTemplate"`
		} `json:"spec"`
	}
	text, _, err := o.JSON()
	if err != nil || json.Unmarshal(text, &v) != nil {
		return ""
	}
	t := v.Spec.Template
	if v.Spec.JobTemplate != nil {
		t = v.Spec.JobTemplate.Spec.Template
	}
	spec := &v.Spec.podSpec
	switch {
	case t != nil && t.Spec != nil:
		spec = t.Spec
	case len(v.Spec.Containers) == 0:
		return ""
	}
	if spec.ServiceAccountName == "" {
		return "default" // which admission fills in
	}
	return spec.ServiceAccountName
}
