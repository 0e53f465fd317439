package diagnose

import (
	"cmp"
	"regexp"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
)

// suspect is whom leads point to.
type suspect struct {
	workload workload
	user     string
	// objects and namespace are where something piles up that nobody owns.
	objects   *storage.Kind
	namespace string
	leads     []lead
	clear     float64 // what speaks against it: the product of what each lead leaves open
}

// rank puts leads together, the worst suspect first. Leads that speak of different
// things add up. reasoned says that the caller's command lines have a reason already.
func rank(leads []lead, reasoned bool) (out []*halliganv1.Suspect) {
	type id struct{ workload, user, objects string }
	all := map[id]*suspect{}
	var order []*suspect
	// Those with a workload first, so that a user's own lead finds it.
	slices.SortStableFunc(leads, func(a, b lead) int {
		return cmp.Or(boolOrder(a.workload.kind == nil, b.workload.kind == nil), cmp.Compare(b.weight, a.weight))
	})
	for _, l := range leads {
		i := id{user: l.user}
		switch {
		case l.weight < 0.01: // as every cluster has of everybody
			continue
		case l.workload.kind != nil:
			i = id{workload: l.workload.kind.Resource() + "/" + l.workload.namespace + "/" + l.workload.name}
		case l.user == "" && l.objects != nil:
			i = id{objects: l.objects.Resource() + "/" + l.namespace}
		case l.user == "":
			continue
		}
		s := all[i]
		if s == nil && l.workload.kind == nil && l.user != "" {
			if at := slices.IndexFunc(order, func(s *suspect) bool { return s.user == l.user }); at >= 0 {
				s = order[at]
			}
		}
		if s == nil {
			s = &suspect{workload: l.workload, user: l.user, objects: l.objects, namespace: l.namespace, clear: 1}
			all[i] = s
			order = append(order, s)
		}
		s.user = cmp.Or(s.user, l.user)
		s.leads = append(s.leads, l)
		s.clear *= 1 - min(max(l.weight, 0), 1)
	}
	slices.SortStableFunc(order, func(a, b *suspect) int { return cmp.Compare(a.clear, b.clear) })
	for _, s := range order[:min(len(order), maxSuspects)] {
		if 1-s.clear < worthTelling {
			break
		}
		out = append(out, s.message(reasoned))
	}
	return out
}

// worthTelling is the least score: below it are those whom every calm cluster has.
const worthTelling = 0.05

func boolOrder(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// maxEvidence bounds what is told of one suspect.
const maxEvidence = 6

func (s *suspect) message(reasoned bool) *halliganv1.Suspect {
	m := &halliganv1.Suspect{User: s.user, Workload: s.workload.String(), Namespace: cmp.Or(s.workload.namespace, s.namespace), Score: 1 - s.clear, Remedies: s.remedies(reasoned)}
	for _, l := range s.leads[:min(len(s.leads), maxEvidence)] {
		m.Evidence = append(m.Evidence, l.evidence)
	}
	if s.workload.kind == nil && s.user == "" {
		m.Evidence = append(m.Evidence, "nobody is known to own them")
	}
	return m
}

// remedies are the rungs of the rescue ladder that fit, in their order.
func (s *suspect) remedies(reasoned bool) (out []*halliganv1.Remedy) {
	add := func(effect string, words ...string) {
		words = append([]string{"halligan"}, words...)
		if !reasoned && words[1] != "get" {
			words = append(words, "--reason", "found by top")
		}
		if line, ok := shell(words); ok {
			out = append(out, &halliganv1.Remedy{Command: line, Effect: effect})
		}
	}
	subject := s.user
	account := strings.HasPrefix(subject, "system:serviceaccount:")
	switch {
	case account:
	case strings.HasPrefix(subject, "system:"):
		subject = "" // of the control plane itself, and of its nodes
	case subject != "":
		subject = "user:" + subject
	}
	if subject != "" {
		add("takes its rights: requests get 403 once the API server has seen it; needs etcd and an API server that still watches. Then see for 10 s whether the API answers", "revoke", subject)
	}
	if account {
		add("if its clients hammer on: deletes the ServiceAccount, so that requests get 401, before flow control, once a cache of 10 s is over; its new pods cannot start", "revoke", subject, "--hard")
	}
	if k := s.workload.kind; k != nil && scalable(k) && nameable(s.workload) {
		target := k.Singular
		if k.Custom {
			target = k.Resource()
		}
		add("ends its pods; needs kube-controller-manager and kubelets that reach the API server. The plan names what would undo it. When calm, take all back with halligan undo, the rights last",
			"scale", target+"/"+s.workload.name, "-n", s.workload.namespace, "--to", "0")
	}
	if k := s.workload.kind; k != nil && k.Resource() == "pods" && nameable(s.workload) {
		add("ends it; needs its kubelet, which must reach the API server; what made it may make another", "delete", "pod/"+s.workload.name, "-n", s.workload.namespace)
	}
	if s.workload.kind == nil && s.user == "" && s.objects != nil && s.objects != unknownKind {
		where := []string{"get", s.objects.Resource()}
		if s.namespace != "" {
			where = append(where, "-n", s.namespace)
		}
		add("shows them: find a label that only they have, and delete by it", where...)
	}
	return out
}

func scalable(k *storage.Kind) bool {
	for _, f := range []storage.FieldName{storage.Replicas, storage.Suspend, storage.NodeSelector} {
		if _, ok := k.Fields[f]; ok {
			return true
		}
	}
	return false
}

// nameable reports whether an object has a name and namespace that an API server
// lets one have.
func nameable(w workload) bool {
	return len(validation.IsDNS1123Label(w.namespace)) == 0 && len(validation.IsDNS1123Subdomain(w.name)) == 0
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_%+=:,./@-]+$`)

// shell quotes words for a POSIX shell. Text with characters that no terminal shows
// as they are has no command line.
func shell(words []string) (string, bool) {
	for i, w := range words {
		switch {
		case strings.ContainsFunc(w, func(r rune) bool { return !printable(r) }) || len(w) > 512:
			return "", false
		case !plainWord.MatchString(w):
			words[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
	}
	return strings.Join(words, " "), true
}

// printable is ASCII: what looks like another letter must not be pasted.
func printable(r rune) bool { return r >= ' ' && r <= '~' }
