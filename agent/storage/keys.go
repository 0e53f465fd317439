package storage

import (
	"path"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/validate/content"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/halligan-io/halligan/internal/fault"
)

// keyRoot brings a key prefix into the form that the API server uses, with a
// slash at both ends (apiserver, pkg/storage/etcd3/store.go).
func keyRoot(prefix string) string {
	if root := path.Join("/", prefix); root != "/" {
		return root + "/"
	}
	return "/"
}

// Key returns the etcd key of one object. It returns fault.Usage for a name or
// namespace that no object can have, a namespace of a cluster-scoped kind, and
// a namespaced kind without one.
func (k *Kind) Key(prefix, namespace, name string) (string, error) {
	const next = "name one object, as kubectl does"
	switch {
	case name == "":
		return "", fault.New(fault.Usage, next, "the %s to act on has no name", k.word())
	case len(content.IsPathSegmentName(name)) > 0:
		return "", fault.New(fault.Usage, next, "%s is no name that a %s can have: %s",
			strconv.QuoteToASCII(name), k.word(), strings.Join(content.IsPathSegmentName(name), ", "))
	case k.Namespaced && namespace == "":
		return "", fault.New(fault.Usage, "add -n NAMESPACE", "%s is namespaced, and no namespace was given", k.Resource())
	case !k.Namespaced && namespace != "":
		return "", fault.New(fault.Usage, "leave the namespace out", "%s is not namespaced, and namespace %s was given",
			k.Resource(), strconv.QuoteToASCII(namespace))
	case k.Namespaced && len(validation.IsDNS1123Label(namespace)) > 0:
		return "", fault.New(fault.Usage, "give the namespace as kubectl get namespaces lists it", "%s is no namespace's name",
			strconv.QuoteToASCII(namespace))
	}
	return k.Range(prefix, namespace) + name, nil
}

// Range returns the key prefix, ending in a slash, under which the kind's
// objects lie: those of one namespace, or all for "". Names are not checked:
// what it returns is for reading only.
func (k *Kind) Range(prefix, namespace string) string {
	r := keyRoot(prefix) + k.Dir + "/"
	if k.Namespaced && namespace != "" {
		r += namespace + "/"
	}
	return r
}

// word names the kind inside a sentence.
func (k *Kind) word() string { return strings.ToLower(k.Kind) }

// ByKey tells which object a key belongs to. The names are as the key has them
// and must be escaped before they are shown: an RBAC object's name may hold any
// character but a slash and a per cent sign. It returns fault.NotFound for a key
// outside prefix, of a kind that is not known, or that does not have the parts
// that an object of its kind has.
func (c *Catalogue) ByKey(prefix, key string) (k *Kind, namespace, name string, err error) {
	const next = "read it with etcdctl if it matters; nothing is changed that Halligan cannot name"
	rest, ok := strings.CutPrefix(key, keyRoot(prefix))
	if !ok {
		return nil, "", "", fault.New(fault.NotFound, "check the prefix (--etcd-prefix of the API server)",
			"key %s does not lie under %s", strconv.QuoteToASCII(key), strconv.QuoteToASCII(keyRoot(prefix)))
	}
	parts := strings.Split(rest, "/")
	for n := min(2, len(parts)-1); n > 0; n-- { // services/specs before a kind with the directory services
		k = c.dirs[strings.Join(parts[:n], "/")]
		if k == nil {
			continue
		}
		parts = parts[n:]
		if k.Namespaced && len(parts) == 2 && parts[0] != "" && parts[1] != "" {
			return k, parts[0], parts[1], nil
		}
		if !k.Namespaced && len(parts) == 1 && parts[0] != "" {
			return k, "", parts[0], nil
		}
		return nil, "", "", fault.New(fault.NotFound, next, "key %s is not that of one %s", strconv.QuoteToASCII(key), k.word())
	}
	return nil, "", "", fault.New(fault.NotFound, next, "key %s is of no kind that is known here", strconv.QuoteToASCII(key))
}
