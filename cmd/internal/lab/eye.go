package lab

import (
	"bytes"
	"context"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
)

// eye looks into etcd as somebody would who has never heard of Halligan: with
// etcd's own client, keys written out, and values decoded by client-go. It
// shares no code with the agent on purpose.
type eye struct{ cli *clientv3.Client }

// eyePage is how many keys it reads at once.
const eyePage = 5000

// each calls do for every key and value below prefix, in order and at one
// revision.
func (e eye) each(ctx context.Context, prefix string, do func(key string, value []byte) error) error {
	opts := []clientv3.OpOption{clientv3.WithRange(clientv3.GetPrefixRangeEnd(prefix)), clientv3.WithLimit(eyePage)}
	for from, revision := prefix, int64(0); ; {
		r, err := e.cli.Get(ctx, from, append(opts, clientv3.WithRev(revision))...)
		if err != nil {
			return err
		}
		for _, kv := range r.Kvs {
			if err := do(string(kv.Key), kv.Value); err != nil {
				return fmt.Errorf("%s: %w", kv.Key, err)
			}
		}
		if !r.More {
			return nil
		}
		from, revision = string(r.Kvs[len(r.Kvs)-1].Key)+"\x00", r.Header.Revision
	}
}

// typed decodes every value below prefix into T.
func typed[T runtime.Object](ctx context.Context, e eye, prefix string, do func(T) error) error {
	return e.each(ctx, prefix, func(_ string, value []byte) error {
		obj, err := decodeValue(value)
		if err != nil {
			return err
		}
		t, ok := obj.(T)
		if !ok {
			return fmt.Errorf("a %T lies there", obj)
		}
		return do(t)
	})
}

// one reads one key into T.
func one[T runtime.Object](ctx context.Context, e eye, key string) (t T, err error) {
	r, err := e.cli.Get(ctx, key)
	if err != nil {
		return t, err
	}
	if len(r.Kvs) != 1 {
		return t, fmt.Errorf("no key %s", key)
	}
	obj, err := decodeValue(r.Kvs[0].Value)
	if err != nil {
		return t, err
	}
	t, ok := obj.(T)
	if !ok {
		return t, fmt.Errorf("a %T lies at %s", obj, key)
	}
	return t, nil
}

func decodeValue(value []byte) (runtime.Object, error) {
	return runtime.Decode(scheme.Codecs.UniversalDeserializer(), value)
}

// bindings counts the bindings that name the ServiceAccount, and the subjects
// of all bindings.
func (e eye) bindings(ctx context.Context, namespace, name string) (naming, subjects int, err error) {
	count := func(all []rbacv1.Subject) {
		subjects += len(all)
		for _, s := range all {
			if s.Kind == rbacv1.ServiceAccountKind && s.Namespace == namespace && s.Name == name {
				naming++
			}
		}
	}
	if err = typed(ctx, e, "/registry/rolebindings/", func(b *rbacv1.RoleBinding) error { count(b.Subjects); return nil }); err != nil {
		return 0, 0, err
	}
	err = typed(ctx, e, "/registry/clusterrolebindings/", func(b *rbacv1.ClusterRoleBinding) error { count(b.Subjects); return nil })
	return naming, subjects, err
}

// nodesFor counts the nodes that a node selector takes, and all.
func (e eye) nodesFor(ctx context.Context, selector map[string]string) (fit, all int, err error) {
	s := labels.SelectorFromSet(selector)
	err = typed(ctx, e, "/registry/minions/", func(n *corev1.Node) error {
		all++
		if s.Matches(labels.Set(n.Labels)) {
			fit++
		}
		return nil
	})
	return fit, all, err
}

// configMaps counts those of a namespace with the label app, and the others.
func (e eye) configMaps(ctx context.Context, namespace, app string) (with, without int, err error) {
	err = typed(ctx, e, "/registry/configmaps/"+namespace+"/", func(c *corev1.ConfigMap) error {
		if c.Labels["app"] == app {
			with++
		} else {
			without++
		}
		return nil
	})
	return with, without, err
}

// snapshot is every key with its value.
type snapshot map[string][]byte

func (e eye) snapshot(ctx context.Context) (snapshot, error) {
	s := snapshot{}
	err := e.each(ctx, "/", func(key string, value []byte) error { s[key] = value; return nil })
	return s, err
}

// since compares: how many values have other bytes but say the same apart from
// metadata.generation. Any other difference is an error. Modification revisions
// are etcd's own and always move on; they are not compared.
func (now snapshot) since(before snapshot) (regenerated int, err error) {
	for key := range now {
		if _, ok := before[key]; !ok {
			return 0, fmt.Errorf("%s was not there before", key)
		}
	}
	for key, old := range before {
		value, ok := now[key]
		if !ok {
			return 0, fmt.Errorf("%s is gone", key)
		}
		if bytes.Equal(old, value) {
			continue
		}
		a, err := ungenerated(old)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", key, err)
		}
		b, err := ungenerated(value)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", key, err)
		}
		if !equality.Semantic.DeepEqual(a, b) {
			return 0, fmt.Errorf("%s is not what it was", key)
		}
		regenerated++
	}
	return regenerated, nil
}

func ungenerated(value []byte) (runtime.Object, error) {
	obj, err := decodeValue(value)
	if err != nil {
		return nil, err
	}
	m, err := meta.Accessor(obj)
	if err != nil {
		return nil, err
	}
	m.SetGeneration(0)
	return obj, nil
}
