package action

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/structpb"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/validate/content"

	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

var revokeRow = row{
	name:    "revoke",
	summary: "Take a user's, group's or service account's rights away",
	description: "SUBJECT is system:serviceaccount:NAMESPACE:NAME, or the name of a user or group; user:NAME and group:NAME where both exist. Finds every RoleBinding and ClusterRoleBinding that names the subject, removes just that subject, and deletes a binding left empty. " +
		"Requests get 403 as soon as the API server has seen it (at once in calm, seconds or more when it starves), without any controller or kubelet. --hard also deletes the ServiceAccount, so that its tokens get 401 once the API " +
		"server's token cache (10 s) forgot them. Rights that come through groups are reported, not taken.",
	role: trust.Responder, effect: mutate, timeout: 2 * time.Minute,
	parameters: []*halliganv1.Parameter{
		{Name: "subject", Type: "string", Required: true, Positional: true, Placeholder: "SUBJECT",
			Description: "system:serviceaccount:NAMESPACE:NAME, or a user's or group's name; user:NAME or group:NAME where both exist"},
		{Name: "hard", Type: "bool", Description: "also delete the ServiceAccount itself"},
	},
	examples: []string{"revoke system:serviceaccount:telemetry:collector", "revoke group:contractors"},
	plan:     planRevoke,
}

type revokeParameters struct {
	Subject string `json:"subject"`
	Hard    bool   `json:"hard"`
}

// subject is who loses rights.
type subject struct {
	// text is the name as authentication gives it.
	text string
	// namespace and name are those of a ServiceAccount.
	namespace, name string
	user, group     bool
}

const serviceAccountPrefix = "system:serviceaccount:"

func parseSubject(text string) (subject, error) {
	bad := func(why string) (subject, error) {
		return subject{}, fault.New(fault.Usage, "give system:serviceaccount:NAMESPACE:NAME, user:NAME, group:NAME or a plain name", "subject %.200q %s", text, why)
	}
	if text == "" || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return bad("is empty or has control characters")
	}
	if rest, ok := strings.CutPrefix(text, serviceAccountPrefix); ok {
		ns, name, ok := strings.Cut(rest, ":")
		if !ok || ns == "" || len(content.IsPathSegmentName(ns)) > 0 || len(content.IsPathSegmentName(name)) > 0 || name == "" || strings.Contains(name, ":") {
			return bad("is no service account")
		}
		return subject{text: text, namespace: ns, name: name, user: true}, nil
	}
	for _, kubectl := range []string{"sa/", "serviceaccount/", "serviceaccounts/", "serviceaccount:"} {
		if strings.HasPrefix(text, kubectl) {
			return bad("is not how the API server names a service account")
		}
	}
	if name, ok := strings.CutPrefix(text, "user:"); ok && name != "" {
		if strings.HasPrefix(name, serviceAccountPrefix) {
			return parseSubject(name)
		}
		return subject{text: name, user: true}, nil
	}
	if name, ok := strings.CutPrefix(text, "group:"); ok && name != "" {
		return subject{text: name, group: true}, nil
	}
	return subject{text: text, user: true, group: true}, nil
}

// is reports whether a binding's subject is the one meant. A ServiceAccount
// without a namespace is one of the RoleBinding's own namespace
// (pkg/registry/rbac/validation/rule.go, appliesToUser).
func (s subject) is(r rbacv1.Subject, binding *object) bool {
	switch r.Kind {
	case rbacv1.ServiceAccountKind:
		namespace := r.Namespace
		if namespace == "" {
			namespace = binding.namespace
		}
		return s.name != "" && r.Name == s.name && namespace == s.namespace
	case rbacv1.UserKind:
		return s.user && r.Name == s.text
	case rbacv1.GroupKind:
		return s.group && r.Name == s.text
	}
	return false
}

// groups returns the groups that authentication puts a service account in:
// staging/src/k8s.io/apiserver/pkg/authentication/serviceaccount/util.go.
func (s subject) groups() []string {
	if s.name == "" {
		return []string{"system:authenticated"}
	}
	return []string{"system:serviceaccounts", "system:serviceaccounts:" + s.namespace, "system:authenticated"}
}

// discovery are the roles that the API server itself binds to everybody; they
// let nobody do harm: plugin/pkg/auth/authorizer/rbac/bootstrappolicy/policy.go.
var discovery = []string{"system:discovery", "system:basic-user", "system:public-info-viewer", "system:service-account-issuer-discovery"}

// harmless reports whether a binding gives one of the discovery roles.
func harmless(binding *object) bool {
	var b rbacv1.ClusterRoleBinding // a RoleBinding has its role in the same place
	return typed(binding, &b) == nil && b.RoleRef.Kind == "ClusterRole" && slices.Contains(discovery, b.RoleRef.Name)
}

func planRevoke(ctx context.Context, p *planner, raw *structpb.Struct) error {
	par, err := decode[revokeParameters](raw)
	if err != nil {
		return err
	}
	who, err := parseSubject(par.Subject)
	if err != nil {
		return err
	}
	request := p.request
	request.Subject = who.text
	if err := p.policy.Decide(p.who, request); err != nil {
		return err
	}
	if par.Hard && who.name == "" {
		return fault.New(fault.Usage, "leave --hard out", "--hard deletes a ServiceAccount, and %.200q is none", par.Subject)
	}
	var users, groups int
	var remain []string
	for _, kindName := range []string{"clusterrolebindings.rbac.authorization.k8s.io", "rolebindings.rbac.authorization.k8s.io"} {
		kind, err := p.engine.resolve(ctx, kindName)
		if err != nil {
			return err
		}
		_, err = p.walk(ctx, kind, "", func(obj *object, problem error) error {
			if problem != nil {
				p.warn("%s could not be read (%s): rights that it gives remain", obj.key, fault.Of(problem).Message)
				return nil
			}
			subjects, err := obj.subjects()
			if err != nil {
				p.warn("%s could not be read (%s): rights that it gives remain", obj.key, fault.Of(err).Message)
				return nil
			}
			var hit []int
			for i, s := range subjects {
				if who.is(s, obj) {
					hit = append(hit, i)
					if s.Kind == rbacv1.GroupKind {
						groups++
					} else {
						users++
					}
				} else if s.Kind == rbacv1.GroupKind && slices.Contains(who.groups(), s.Name) && !harmless(obj) {
					remain = append(remain, fmt.Sprintf("group %s through %s", s.Name, obj.title()))
				}
			}
			if len(hit) == 0 {
				return nil
			}
			// A binding that nobody may delete stays, without subjects.
			protected := p.policy.Protected(deleteName, kind.Resource(), obj.namespace, obj.name) != nil
			if len(hit) == len(subjects) && !protected {
				p.remove(obj)
				return nil
			}
			var edits []storage.Edit
			// From the end, so that an index stays what it was.
			for _, i := range slices.Backward(hit) {
				edits = append(edits, storage.Edit{Field: storage.Subjects, Index: i})
			}
			return p.update(obj, edits)
		})
		if err != nil {
			return err
		}
	}
	if users > 0 && groups > 0 {
		return fault.New(fault.Usage, "say user:"+who.text+" or group:"+who.text, "%.200q names a user in %d places and a group in %d", who.text, users, groups)
	}
	if par.Hard {
		if err := p.removeServiceAccount(ctx, who); err != nil {
			return err
		}
	}
	for _, r := range remain {
		p.warn("rights remain: %s", r)
	}
	if who.name == "" && who.user {
		p.warn("a user's groups come from certificates or the identity provider and are not known here: rights through them remain")
	}
	if len(p.steps) == 0 {
		p.summary("nothing to do: no binding names %s", who.text)
		return p.doubt(ctx, who)
	}
	p.summary("take the rights of %s away (%d bindings)", who.text, users+groups)
	p.needs("nothing but etcd and the API server's watch of it: requests get 403 once it has seen the change")
	p.bypass("escalation checks", "the API server's audit log")
	p.warn("the API server's default roles (after its restart), GitOps or an operator may put a binding back")
	if !par.Hard {
		p.warn("a client that ignores 403 goes on costing; measure before --hard: its 401s can cost as much, each a new connection")
	}
	return nil
}

func (p *planner) removeServiceAccount(ctx context.Context, who subject) error {
	kind, err := p.engine.resolve(ctx, "serviceaccounts")
	if err != nil {
		return err
	}
	obj, err := p.load(ctx, kind, who.namespace, who.name)
	if fault.Is(err, fault.NotFound) {
		p.warn("the ServiceAccount is gone already")
		return nil
	}
	if err != nil {
		return err
	}
	p.remove(obj)
	p.warn("its tokens work until the API server's token cache (10 s) forgot them; open watches go on; new pods that use it fail to start")
	return nil
}

// doubt warns where a subject without rights may be a slip of the pen, and
// refuses where it must be one.
func (p *planner) doubt(ctx context.Context, who subject) error {
	kind, err := p.engine.resolve(ctx, "serviceaccounts")
	if err != nil {
		return err
	}
	if who.name == "" {
		if who.user {
			p.warn("a service account is named %sNAMESPACE:NAME", serviceAccountPrefix)
		}
		if spaces := p.elsewhere(ctx, kind, who.text); who.user && len(spaces) > 0 {
			return fault.New(fault.Usage, "say "+serviceAccountPrefix+spaces[0]+":"+who.text, "no binding names a user or group %s, but there is a ServiceAccount of that name", who.text)
		}
		return nil
	}
	if _, err = p.load(ctx, kind, who.namespace, who.name); fault.Is(err, fault.NotFound) {
		return fault.New(fault.NotFound, "is the name right? see: halligan get serviceaccounts -A", "no binding names %s, and there is no ServiceAccount %s in namespace %s",
			who.text, who.name, who.namespace)
	}
	return err
}
