package trust

import (
	"reflect"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/internal/fault"
)

// asked is one row of what can be asked for, and which roles get it: observer,
// responder, commander and approver in this order, by a network door.
var asked = []struct {
	name string
	Request
	may string
}{
	{"get", Request{Action: "get", Rung: Observer, Resource: "pods", Namespace: "shop"}, "yyy-"},
	{"reveal", Request{Action: "get", Rung: Observer, Floor: Commander, Resource: "secrets", Namespace: "shop", Name: "s"}, "--y-"},
	{"history", Request{Action: "history", Rung: Observer}, "yyy-"},
	{"status", Request{Action: ActionStatus, Rung: Observer}, "yyyy"},
	{"describe", Request{Action: ActionDescribe, Rung: Observer}, "yyyy"},
	{"show-plan", Request{Action: ActionShowPlan, Rung: Observer}, "yyyy"},
	{"scale", Request{Action: "scale", Rung: Responder, Mutates: true, Resource: "deployments.apps", Namespace: "shop", Name: "web"}, "-yy-"},
	{"delete", Request{Action: "delete", Rung: Responder, Mutates: true, Deletes: true, Resource: "configmaps", Namespace: "shop", Name: "c"}, "-yy-"},
	{"revoke", Request{Action: "revoke", Rung: Responder, Mutates: true, Subject: "mallory"}, "-yy-"},
	{"undo own", Request{Action: "undo", Rung: Responder, Mutates: true}, "-yy-"},
	{"undo", Request{Action: "undo", Rung: Responder, Mutates: true, AddsAuthority: true}, "--y-"},
	{"stop own", Request{Action: ActionStop, Rung: Responder, Mutates: true}, "-yy-"},
	{"stop", Request{Action: ActionStop, Rung: Responder, Floor: Commander, Mutates: true}, "--y-"},
	{"a row without a rung", Request{Action: "odd"}, "----"},
	{"a mutation for observers", Request{Action: "slip", Rung: Observer, Mutates: true}, "-yy-"},
	{"a mutation for approvers", Request{Action: ActionStatus, Rung: Observer, Mutates: true}, "-yy-"},
}

// TestEveryRoleActionAndDoor asks for everything in every role through every
// door, and through what is none.
func TestEveryRoleActionAndDoor(t *testing.T) {
	p, rounds := Default(), 0
	for _, a := range asked {
		for _, door := range []Door{Console, SSH, GRPC, "", "web"} {
			for role := Role(-1); role <= Approver+1; role++ {
				want := role >= Observer && role <= Approver && a.may[role-Observer] == 'y'
				switch door {
				case SSH, GRPC:
				case Console:
					want = want && role <= Responder
				default:
					want = false
				}
				for _, person := range []string{"alice", ""} {
					rounds++
					err := p.Decide(Identity{Person: person, Role: role, Door: door, Kind: Person}, a.Request)
					if allowed := err == nil; allowed != (want && person != "") {
						t.Errorf("%s as %s by %q, person %q: %v", a.name, role, door, person, err)
					}
					if err != nil && (!fault.Is(err, fault.Refused) || fault.Of(err).Next == "" || strings.Contains(err.Error(), "\n")) {
						t.Errorf("%s as %s by %q: not one refusal with a next step: %v", a.name, role, door, err)
					}
				}
			}
		}
	}
	if least := len(asked) * 5 * 6 * 2; rounds < least {
		t.Errorf("%d rounds, not %d", rounds, least)
	}
}

func TestScopeNarrows(t *testing.T) {
	scale := func(namespace, name string) Request {
		return Request{Action: "scale", Rung: Responder, Mutates: true, Node: "cp-1", Resource: "deployments.apps", Namespace: namespace, Name: name}
	}
	get := func(resource, namespace string) Request {
		return Request{Action: "get", Rung: Observer, Node: "cp-1", Resource: resource, Namespace: namespace}
	}
	shop, tele := Scope{Namespaces: []string{"shop*"}}, Scope{Namespaces: []string{"telemetry"}}
	for i, c := range []struct {
		scope Scope
		r     Request
		want  string // "" is allowed
	}{
		{Scope{}, scale("shop", "web"), ""},
		{shop, scale("shop", "web"), ""},
		{shop, scale("shop-2", "web"), ""},
		{shop, scale("telemetry", "web"), "out of scope"},
		{tele, get("pods", "telemetry"), ""},
		{tele, get("pods", ""), "not in one namespace"},
		{tele, get("nodes", ""), "not in one namespace"},
		{tele, Request{Action: "delete", Rung: Responder, Mutates: true, Resource: "clusterrolebindings.rbac.authorization.k8s.io", Name: "x"}, "not in one namespace"},
		{tele, Request{Action: "history", Rung: Observer, Node: "cp-1"}, ""},
		{Scope{Actions: []string{"scale", "get"}}, scale("shop", "web"), ""},
		{Scope{Actions: []string{"get"}}, scale("shop", "web"), "scale is out of scope"},
		{Scope{Actions: []string{"get"}}, Request{Action: ActionStatus, Rung: Observer, Node: "cp-1"}, ""},
		{Scope{Actions: []string{"["}}, scale("shop", "web"), "out of scope"}, // a malformed pattern takes nothing
		{Scope{Nodes: []string{"cp-1", "cp-2"}}, scale("shop", "web"), ""},
		{Scope{Nodes: []string{"cp-2"}}, scale("shop", "web"), "node cp-1 is out of scope"},
		{Scope{Nodes: []string{"cp-2"}}, Request{Action: ActionStatus, Rung: Observer}, "out of scope"},
		{Scope{Drill: true}, scale(DrillNamespace, "canary-1"), ""},
		{Scope{Drill: true}, scale(DrillNamespace, "web"), "no canary"},
		{Scope{Drill: true}, scale("shop", "canary-1"), "no canary"},
		{Scope{Drill: true}, get("pods", DrillNamespace), ""},
		{Scope{Drill: true}, get("pods", "shop"), "no canary"},
		{Scope{Drill: true}, get("nodes", ""), "no canary"},
		{Scope{Drill: true, Namespaces: []string{"shop"}}, scale(DrillNamespace, "canary-1"), "out of scope"},
		// What is in scope is protected all the same.
		{Scope{Namespaces: []string{"*"}}, scale("kube-system", "coredns"), "policy protects"},
	} {
		for _, door := range []Door{SSH, GRPC} {
			err := Default().Decide(Identity{Person: "alice", Role: Commander, Door: door, Scope: c.scope}, c.r)
			if c.want == "" && err != nil || c.want != "" && (!fault.Is(err, fault.Refused) || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%d: %+v with %s: %v, want %q", i, c.r, c.scope, err, c.want)
			}
		}
	}
	if all := (Scope{Actions: []string{"a"}, Namespaces: []string{"b"}, Nodes: []string{"c"}, Drill: true}).String(); all != "actions a, namespaces b, nodes c, drills (canary* in namespace halligan-drill)" {
		t.Error(all)
	}
}

func policy(t *testing.T, text string) *Policy {
	t.Helper()
	var r Rules
	if err := yaml.UnmarshalStrict([]byte(text), &r); err != nil {
		t.Fatal(err)
	}
	p, err := NewPolicy(r)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestPolicyMovesRungs: a bundle may ask for more or less, within limits that it
// cannot move.
func TestPolicyMovesRungs(t *testing.T) {
	p := policy(t, "actions: {scale: {role: commander}, delete: {role: observer}, get: {role: responder}, undo: {role: responder}, status: {role: commander}}")
	for _, c := range []struct {
		r    Request
		want Role
	}{
		{Request{Action: "scale", Rung: Responder, Mutates: true}, Commander},
		{Request{Action: "delete", Rung: Responder, Mutates: true}, Responder}, // nobody changes anything as an observer
		{Request{Action: "get", Rung: Observer}, Responder},
		{Request{Action: "get", Rung: Observer, Floor: Commander}, Commander},
		{Request{Action: "undo", Rung: Responder, Mutates: true, AddsAuthority: true}, Commander},
		{Request{Action: "revoke", Rung: Responder, Mutates: true}, Responder},
	} {
		for role := Observer; role <= Commander; role++ {
			if err := p.Decide(Identity{Person: "a", Role: role, Door: SSH}, c.r); (err == nil) != (role >= c.want) {
				t.Errorf("%+v as %s: %v", c.r, role, err)
			}
		}
	}
}

func TestApprovals(t *testing.T) {
	p := policy(t, `
approvals:
- {actions: [delete], overObjects: 100, count: 1, alone: true, why: many}
- {actions: [delete], resources: [persistentvolumes], count: 2, why: data}
- {namespaces: [payments], count: 1, alone: true, why: money}
`)
	person, robot := Identity{Person: "alice", Kind: Person}, Identity{Person: "ci", Kind: Automation}
	drill := Identity{Person: "d", Kind: Person, Scope: Scope{Drill: true}}
	del := func(resource, namespace string) Request {
		return Request{Action: "delete", Mutates: true, Resource: resource, Namespace: namespace}
	}
	for i, c := range []struct {
		who     Identity
		r       Request
		objects int
		count   int
		alone   bool
		why     string
	}{
		{person, del("pods", "shop"), 100, 0, false, ""},
		{person, del("pods", "shop"), 101, 1, true, "many"},
		{robot, del("pods", "shop"), 101, 1, false, "many"},
		{drill, del("pods", "shop"), 101, 1, false, "many"},
		{person, del("persistentvolumes", ""), 1, 2, false, "data"},
		{person, del("persistentvolumes", ""), 101, 2, false, "data"}, // one that forbids it is enough
		{person, del("pods", "payments"), 1, 1, true, "money"},
		{person, Request{Action: "scale", Mutates: true, Resource: "deployments.apps", Namespace: "payments"}, 1, 1, true, "money"},
		{person, Request{Action: "get", Resource: "pods", Namespace: "payments"}, 1, 0, false, ""},
		{person, Request{Action: "undo", Mutates: true, AddsAuthority: true, Resource: "pods", Namespace: "shop"}, 1, 1, false, "adds authority"},
		{person, Request{Action: "undo", Mutates: true, AddsAuthority: true, Stale: true, Resource: "pods", Namespace: "payments"}, 1, 1, false, "adds authority"},
		{person, Request{Action: "scale", Mutates: true, Stale: true, Resource: "pods", Namespace: "shop"}, 1, 1, true, "stale"},
		{robot, Request{Action: "scale", Mutates: true, Stale: true, Resource: "pods", Namespace: "shop"}, 1, 1, false, "stale"},
		{person, Request{Action: "get", Stale: true, Resource: "pods", Namespace: "shop"}, 1, 0, false, ""},
	} {
		count, alone, why := p.Approvals(c.who, c.r, c.objects)
		if count != c.count || alone != c.alone || !strings.Contains(why, c.why) || (why == "") != (c.why == "") {
			t.Errorf("%d: %d, %v, %q; want %d, %v, %q", i, count, alone, why, c.count, c.alone, c.why)
		}
	}
	if n, alone, _ := Default().Approvals(person, Request{Action: "undo", Mutates: true, AddsAuthority: true}, 1); n != 1 || alone {
		t.Errorf("the shipped policy lets one person add authority: %d, %v", n, alone)
	}
}

func TestRules(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"{}", ""},
		{"actions: {scale: {role: commander}}\ncaps: {objectsPerAction: 20000}\naloneCaps: {objectsPerHour: 1}", ""},
		{"actions: {scale: {role: approver}}", "role \"approver\""},
		{"actions: {scale: {role: none}}", "role \"none\""},
		{"actions: {scale: {}}", "role \"\""},
		{"actions: {'Scale it': {role: observer}}", "not a name of an action"},
		{"actions: {scale: {role: observer, roles: x}}", "unknown field"},
		{"allow: [everything]", "unknown field"},
		{"protect: [{namespaces: [a]}]", "no why"},
		{"protect: [{namespaces: ['['], why: x}]", "malformed"},
		{"keepSubjects: [{why: x}]", "needs subjects"},
		{"approvals: [{count: 1}]", "no why"},
		{"approvals: [{count: 0, why: x}]", "outside 1 to 8"},
		{"approvals: [{count: 9, why: x}]", "outside 1 to 8"},
		{"approvals: [{count: 1, overObjects: -1, why: x}]", "negative"},
		{"approvals: [{count: 1, resources: ['[a'], why: x}]", "malformed"},
		{"caps: {objectsPerAction: -1}", "caps.objectsPerAction"},
		{"aloneCaps: {objectsPerHour: 1000001}", "aloneCaps.objectsPerHour"},
	} {
		var r Rules
		err := yaml.UnmarshalStrict([]byte(c.text), &r)
		if err == nil {
			_, err = NewPolicy(r)
		}
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.text, err, c.want)
		}
	}
	// What is there replaces the shipped table, what is absent is the table; a
	// round trip through the file of a review changes nothing.
	p := policy(t, "protect: []")
	if err := p.Protected("delete", "namespaces", "", "x"); err != nil {
		t.Errorf("a table that was replaced still holds: %v", err)
	}
	if p.Protected("undo", "secrets", "shop", "s") == nil {
		t.Error("a bundle lets Secrets be created through etcd")
	}
	if subject(p, "system:masters") == nil {
		t.Error("a table that was not replaced does not hold")
	}
	data, err := yaml.Marshal(ShippedRules())
	if err != nil {
		t.Fatal(err)
	}
	var again Rules
	if err := yaml.UnmarshalStrict(data, &again); err != nil || !reflect.DeepEqual(again.complete(), ShippedRules()) {
		t.Errorf("the shipped table does not survive its file: %v", err)
	}
}

func TestCaps(t *testing.T) {
	if c, a := Default().Caps(), Default().AloneCaps(); c.ObjectsPerAction != 10_000 || a.ObjectsPerAction != 100 || a.ObjectsPerHour > c.ObjectsPerHour {
		t.Errorf("shipped caps %+v, alone %+v", c, a)
	}
	p := policy(t, "caps: {objectsPerAction: 50}\naloneCaps: {objectsPerAction: 80}")
	if c, a := p.Caps(), p.AloneCaps(); c.ObjectsPerAction != 50 || c.ObjectsPerHour != 50_000 || a.ObjectsPerAction != 50 {
		t.Errorf("caps %+v, alone %+v: alone is never more", c, a)
	}
	p = p.Tighten(&LocalRules{Caps: Caps{ObjectsPerAction: 5, ObjectsPerHour: 7}})
	if c, a := p.Caps(), p.AloneCaps(); c != (Caps{5, 7}) || a != (Caps{5, 7}) {
		t.Errorf("tightened: caps %+v, alone %+v", c, a)
	}
}
