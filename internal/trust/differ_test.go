package trust

import (
	"reflect"
	"slices"
	"testing"
)

func TestDiffers(t *testing.T) {
	roles := map[string]string{"scale": "responder", "delete": "responder"}
	for name, r := range map[string]Rules{"absent": {}, "in full": ShippedRules(),
		"a role as shipped": {Actions: map[string]ActionRule{"scale": {Role: "responder"}}}} {
		if got := r.Differs(roles); len(got) != 0 {
			t.Errorf("%s: %q", name, got)
		}
	}
	// The order and the words are nobody's loss.
	r := ShippedRules()
	slices.Reverse(r.Protect)
	slices.Reverse(r.KeepSubjects)
	r.Protect[0].Why = "other words"
	if got := r.Differs(roles); len(got) != 0 {
		t.Errorf("%q", got)
	}

	r = ShippedRules()
	namespaces := slices.IndexFunc(r.Protect, func(p Rule) bool { return slices.Equal(p.Resources, []string{"namespaces"}) })
	r.Protect = slices.Delete(r.Protect, namespaces, namespaces+1)
	nodes := slices.IndexFunc(r.Protect, func(p Rule) bool { return slices.Equal(p.Resources, []string{"nodes"}) })
	r.Protect[nodes].Names = []string{"cp-*"}
	r.KeepSubjects[0].Subjects = []string{"system:masters", "ops"}
	r.Actions = map[string]ActionRule{"scale": {Role: "commander"}, "delete": {Role: "responder"}, "later": {Role: "observer"}}
	r.Caps.ObjectsPerHour = 7
	r.Approvals = []ApprovalRule{{Count: 1, Alone: true, Why: "two"}, {Count: 2, Why: "three"}}
	want := []string{
		"struck from protect: delete of namespaces: etcd would orphan everything in the namespace; only the API server can empty one",
		"struck from protect: delete of nodes: the pods of the node would be evicted; cordon it instead",
		"struck from keepSubjects: kubeadm:cluster-admins, cluster-admins, system:cluster-admins: it is how administrators get in",
		"role of later: observer, shipped none that this release knows",
		"role of scale: commander, shipped responder",
		"caps: 10000 objects per action and 7 per hour, shipped 10000 and 50000",
		"added to protect: delete of nodes named cp-*: the pods of the node would be evicted; cordon it instead",
		"added to keepSubjects: ops",
		"approvals: 2 rules, of which 1 let one person go alone; shipped 0",
	}
	if got := r.Differs(roles); !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
	// Nothing protected at all.
	if got := (Rules{Protect: []Rule{}, KeepSubjects: []SubjectRule{}}).Differs(roles); len(got) < len(ShippedRules().Protect) {
		t.Errorf("%q", got)
	}
}
