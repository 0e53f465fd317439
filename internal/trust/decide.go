package trust

import (
	"fmt"
	"slices"
	"strings"

	"github.com/halligan-io/halligan/internal/fault"
)

// Names of what can be asked for without being a row of the action table.
const (
	ActionStatus   = "status"
	ActionDescribe = "describe"
	ActionShowPlan = "show-plan"
	ActionStop     = "stop"
)

// beside are the names above.
var beside = []string{ActionStatus, ActionDescribe, ActionShowPlan, ActionStop}

// approverMay is all that the role approver is for, beside the signing itself.
var approverMay = []string{ActionStatus, ActionDescribe, ActionShowPlan}

// The objects that a drill may touch.
const (
	DrillNamespace = "halligan-drill"
	// DrillPrefix begins the names of its canaries.
	DrillPrefix = "canary"
)

// deleteAction is the name that rules about removing an object go by.
const deleteAction = "delete"

// Request is what somebody wants to do, as far as it is known yet: an action, to
// one object, to one subject. What is empty is not decided on.
type Request struct {
	// Action is the name in the action table, or one of those above.
	Action string
	// Rung is the least role that the table gives the action. The policy can
	// move it, never below Floor.
	Rung, Floor Role
	// Mutates: the action changes the cluster.
	Mutates bool
	// AddsAuthority: it gives rights to somebody or something.
	AddsAuthority bool
	// Again is the action that is done once more, by taking back that it was taken
	// back; "" for none. What holds for it holds for that.
	Again string
	// Deletes: the object is removed, whatever the action is called.
	Deletes bool
	// Stale: the bundle is older than it may be without a second thought.
	Stale bool
	// Node is this agent's.
	Node string
	// Resource is the plural with its group, such as deployments.apps; with a
	// Name it is one object, without all of the namespace, or of the cluster.
	Resource, Namespace, Name string
	// Subject is who would lose rights: system:serviceaccount:NAMESPACE:NAME, a
	// user or a group.
	Subject string
}

func (r Request) object() string {
	where := r.Resource
	if r.Name != "" {
		where += "/" + r.Name
	}
	if r.Namespace != "" {
		where += " in namespace " + r.Namespace
	}
	return where
}

// besides are the names of actions whose rules hold too. A deletion is one whatever
// its verb.
func (r Request) besides() (names []string) {
	if r.Again != "" {
		names = append(names, r.Again)
	}
	if r.Deletes && r.Again != deleteAction {
		names = append(names, deleteAction)
	}
	return names
}

// Decide is the one decision: nil allows, anything else is fault.Refused with
// the reason. It is the same for every door.
func (p *Policy) Decide(who Identity, r Request) error {
	if err := p.role(who, r); err != nil {
		return err
	}
	if err := who.Scope.decide(who, r); err != nil {
		return err
	}
	if !r.Mutates {
		return nil
	}
	if r.Resource != "" {
		if err := p.Protected(r.Action, r.Resource, r.Namespace, r.Name); err != nil {
			return err
		}
		for _, name := range r.besides() {
			if err := p.Protected(name, r.Resource, r.Namespace, r.Name); err != nil {
				return err
			}
		}
	}
	for _, rule := range p.rules.KeepSubjects {
		if r.Subject != "" && matches(rule.Subjects, r.Subject) {
			return fault.New(fault.Refused, "no role can override this rule here; choose another subject",
				"policy protects the rights of %s: %s", r.Subject, rule.Why)
		}
	}
	return nil
}

// Rung returns the least role that may do what is asked.
func (p *Policy) Rung(r Request) Role {
	rung := r.Rung
	if moved, ok := p.actions[r.Action]; ok {
		rung = moved
	}
	if moved, ok := p.actions[r.Again]; ok && r.Again != "" {
		rung = max(rung, moved)
	}
	rung = max(rung, r.Floor)
	if r.Mutates {
		rung = max(rung, Responder)
	}
	if r.AddsAuthority {
		rung = max(rung, Commander)
	}
	return rung
}

func (p *Policy) role(who Identity, r Request) error {
	switch {
	case who.Person == "":
		return fault.New(fault.Refused, "come through a door of this agent", "nobody is not somebody")
	case !slices.Contains([]Door{Console, SSH, GRPC}, who.Door):
		return fault.New(fault.Refused, "come through a door of this agent", "%.64q is not a door of this agent", string(who.Door))
	case (who.Door == Console || who.Kind == Local) && who.Role > Responder:
		// Whoever is root at the node is not known to be anybody else than the
		// one who asks.
		return fault.New(fault.Refused, "come with a certificate, by SSH", "at the console nobody is more than a responder")
	case who.Role == Approver:
		if slices.Contains(approverMay, r.Action) && !r.Mutates {
			return nil
		}
		return fault.New(fault.Refused, "take another role: observer, responder or commander", "%s is not for an approver, who reads plans and signs", r.Action)
	}
	if rung := p.Rung(r); !who.Role.Has(rung) {
		what := r.Action
		if r.AddsAuthority {
			what += ", which adds authority here,"
		}
		return fault.New(fault.Refused, "take the role "+rung.String()+", or ask somebody who has it",
			"%s needs the role %s; %s came as %s", what, rung, who.Person, who.Role)
	}
	return nil
}

// decide holds what is asked against the limits that came with the credential.
func (s Scope) decide(who Identity, r Request) error {
	refuse := func(format string, args ...any) error {
		return fault.New(fault.Refused, "ask somebody whose credential has it in scope", "%s: the credential of %s is for %s", fmt.Sprintf(format, args...), who.Person, s)
	}
	cluster := func() bool { return r.Resource != "" && r.Namespace == "" }
	switch {
	case len(s.Actions) > 0 && !among(s.Actions, r.Action) && !slices.Contains(approverMay, r.Action):
		return refuse("%s is out of scope", r.Action)
	case len(s.Nodes) > 0 && !among(s.Nodes, r.Node):
		return refuse("node %s is out of scope", r.Node)
	case len(s.Namespaces) > 0 && cluster():
		return refuse("%s is not in one namespace", r.object())
	case len(s.Namespaces) > 0 && r.Resource != "" && !among(s.Namespaces, r.Namespace):
		return refuse("%s is out of scope", r.object())
	case s.Drill && r.Resource != "" && (r.Namespace != DrillNamespace || r.Name != "" && !strings.HasPrefix(r.Name, DrillPrefix)):
		return refuse("%s is no canary", r.object())
	}
	return nil
}

// String says what is left, in one line.
func (s Scope) String() string {
	var parts []string
	for _, l := range []struct {
		name string
		list []string
	}{{"actions", s.Actions}, {"namespaces", s.Namespaces}, {"nodes", s.Nodes}} {
		if len(l.list) > 0 {
			parts = append(parts, l.name+" "+strings.Join(l.list, ","))
		}
	}
	if s.Drill {
		parts = append(parts, "drills ("+DrillPrefix+"* in namespace "+DrillNamespace+")")
	}
	if len(parts) == 0 {
		return "everything of its role"
	}
	return strings.Join(parts, ", ")
}

// Protected refuses an action on a protected object, whoever asks. Decide calls
// it; others may ask what would be refused.
func (p *Policy) Protected(action, resource, namespace, name string) error {
	hit := func(r Rule) bool {
		return matches(r.Actions, action) && matches(r.Resources, resource) && (len(r.Except) == 0 || !matches(r.Except, resource)) &&
			matches(r.Namespaces, namespace) && matches(r.Names, name)
	}
	for _, rules := range [...][]Rule{fixedRules, p.rules.Protect} {
		if i := slices.IndexFunc(rules, hit); i >= 0 {
			next := "no role can override this rule here; choose another target"
			if action == "undo" {
				next = "no role can override this rule here; only the API server can put it back"
			}
			return fault.New(fault.Refused, next, "policy protects %s against %s: %s",
				Request{Resource: resource, Namespace: namespace, Name: name}.object(), action, rules[i].Why)
		}
	}
	return nil
}

// Approvals returns how many other people have to sign before one object of a
// plan is touched, objects being those that count for OverObjects; whether one person may go without them,
// and why. What adds authority always needs one and is never done alone.
func (p *Policy) Approvals(who Identity, r Request, objects int) (count int, alone bool, why string) {
	if !r.Mutates {
		return 0, false, ""
	}
	alone = true
	demand := func(n int, may bool, reason string) {
		alone = alone && may
		if n > count {
			count, why = n, reason
		}
	}
	if r.AddsAuthority {
		demand(1, false, "it adds authority")
	}
	if r.Stale {
		demand(1, true, "the agent's bundle is stale, so that a revocation may be missing")
	}
	names := append(r.besides(), r.Action)
	for _, rule := range p.rules.Approvals {
		named := slices.ContainsFunc(names, func(name string) bool { return matches(rule.Actions, name) })
		if objects > rule.OverObjects && named && matches(rule.Resources, r.Resource) && matches(rule.Namespaces, r.Namespace) {
			demand(rule.Count, rule.Alone, rule.Why)
		}
	}
	// "Alone" is for somebody who is awake and answers for it.
	return count, count > 0 && alone && who.Kind != Automation && !who.Scope.Drill, why
}
