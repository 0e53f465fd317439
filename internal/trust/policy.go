package trust

import (
	"fmt"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/internal/fault"
)

// Rules is what the policy part of a bundle says about decisions; the zero value
// is the shipped table. Protect, KeepSubjects and Approvals replace the shipped
// ones where they are there, be it as empty lists; a cap that is 0 stays the
// shipped one.
//
// What no bundle can change is in the code: adding authority needs a commander
// and an approval, an approver does nothing but approve, and Secrets and signing
// requests are never created through etcd.
type Rules struct {
	// Actions changes the least role by the name of an action. A mutation never
	// gets below responder, and what adds authority never below commander.
	Actions      map[string]ActionRule `json:"actions,omitempty"`
	Protect      []Rule                `json:"protect,omitempty"`
	KeepSubjects []SubjectRule         `json:"keepSubjects,omitempty"`
	Caps         Caps                  `json:"caps,omitzero"`
	// Approvals name what needs the signatures of others, beside adding
	// authority, which always does.
	Approvals []ApprovalRule `json:"approvals,omitempty"`
	// AloneCaps bound what one person changes without the approvals that it
	// needs.
	AloneCaps Caps `json:"aloneCaps,omitzero"`
}

// ActionRule is the policy's word about one action.
type ActionRule struct {
	// Role is the least one: observer, responder or commander.
	Role string `json:"role"`
}

// Rule protects objects. Every list holds patterns of path.Match, of which * takes
// a slash too; an empty list stands for everything. A rule matches an object that
// all its lists match.
type Rule struct {
	// Actions are names of the action table. Undoing counts as the action
	// "undo".
	Actions []string `json:"actions,omitempty"`
	// Resources are plurals with their group, such as deployments.apps.
	Resources []string `json:"resources,omitempty"`
	// Except are resources that the rule leaves alone.
	Except     []string `json:"except,omitempty"`
	Namespaces []string `json:"namespaces,omitempty"`
	Names      []string `json:"names,omitempty"`
	// Why is told to whoever is refused.
	Why string `json:"why"`
}

// SubjectRule protects users, groups and service accounts against losing their
// rights. Service accounts are written system:serviceaccount:NAMESPACE:NAME.
type SubjectRule struct {
	Subjects []string `json:"subjects"`
	Why      string   `json:"why"`
}

// Caps bound what can be changed. They hold on each agent by itself, which know
// nothing of one another: a person who reaches three agents of a cluster can change
// three times as much in an hour. Taking something back does not count.
type Caps struct {
	// ObjectsPerAction is the largest number of objects in one plan.
	ObjectsPerAction int `json:"objectsPerAction,omitempty"`
	// ObjectsPerHour is how many objects one person may change in any 60
	// minutes, over all actions on this agent.
	ObjectsPerHour int `json:"objectsPerHour,omitempty"`
}

// ApprovalRule demands signatures of others. Its lists are patterns as in Rule;
// it matches a plan of which one object matches all of them.
type ApprovalRule struct {
	Actions    []string `json:"actions,omitempty"`
	Resources  []string `json:"resources,omitempty"`
	Namespaces []string `json:"namespaces,omitempty"`
	// OverObjects: only plans of more objects than this. To a plan's own count
	// those that the person changed on that agent within the hour and nobody
	// approved, so that a large plan cannot be made in parts; one that takes
	// something back counts by itself.
	OverObjects int `json:"overObjects,omitempty"`
	// Count of other people, 1 to 8.
	Count int `json:"count"`
	// Alone lets one person go without them, with an alarm and AloneCaps.
	Alone bool `json:"alone,omitempty"`
	// Why is told to whoever has to wait for them.
	Why string `json:"why"`
}

// Policy decides. It is never changed once it is in use, so that it may be used
// concurrently.
type Policy struct {
	// Version of the bundle's policy part that it was made of; 0: the shipped
	// table.
	Version uint64
	rules   Rules
	actions map[string]Role
}

// Default returns the shipped policy.
func Default() *Policy {
	p, err := NewPolicy(Rules{})
	if err != nil {
		panic(err) // a test holds that the shipped table has no mistake
	}
	return p
}

// NewPolicy returns the policy of the rules, with the shipped table for what
// they leave out.
func NewPolicy(r Rules) (*Policy, error) {
	if err := r.Check(); err != nil {
		return nil, err
	}
	p := &Policy{rules: r.complete(), actions: map[string]Role{}}
	for name, a := range r.Actions {
		p.actions[name], _ = ParseRole(a.Role) // Check has seen it
	}
	return p, nil
}

// ShippedRules returns the shipped table in full, for a review.
func ShippedRules() Rules { return Rules{}.complete() }

// complete fills in the shipped table. The lists are the result's own.
func (r Rules) complete() Rules {
	r.Protect = slices.Clone(orShipped(r.Protect, defaultRules))
	r.KeepSubjects = slices.Clone(orShipped(r.KeepSubjects, defaultSubjects))
	r.Approvals = slices.Clone(orShipped(r.Approvals, defaultApprovals))
	r.Caps, r.AloneCaps = r.Caps.or(defaultCaps), r.AloneCaps.or(defaultAloneCaps)
	return r
}

func orShipped[T any](list, shipped []T) []T {
	if list == nil {
		return shipped
	}
	return list
}

func (c Caps) or(d Caps) Caps {
	if c.ObjectsPerAction == 0 {
		c.ObjectsPerAction = d.ObjectsPerAction
	}
	if c.ObjectsPerHour == 0 {
		c.ObjectsPerHour = d.ObjectsPerHour
	}
	return c
}

// The most approvals that a rule may demand, and the largest caps: more is a
// slip of the keyboard.
const (
	maxApprovals = 8
	maxCap       = 1_000_000
)

var actionName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,63}$`)

// Check returns the first mistake.
func (r Rules) Check() error {
	for name, a := range r.Actions {
		if !actionName.MatchString(name) {
			return fmt.Errorf("actions: %.64q is not a name of an action", name)
		}
		role, err := ParseRole(a.Role)
		if err != nil || role == Approver {
			return fmt.Errorf("actions.%s: role %.64q is none of observer, responder and commander", name, a.Role)
		}
	}
	for i, p := range r.Protect {
		if p.Why == "" {
			return fmt.Errorf("protect[%d] has no why: people who are refused need one", i)
		}
		if err := checkPatterns(p.Actions, p.Resources, p.Except, p.Namespaces, p.Names); err != nil {
			return fmt.Errorf("protect[%d]: %w", i, err)
		}
	}
	for i, k := range r.KeepSubjects {
		if k.Why == "" || len(k.Subjects) == 0 {
			return fmt.Errorf("keepSubjects[%d] needs subjects and a why", i)
		}
		if err := checkPatterns(k.Subjects); err != nil {
			return fmt.Errorf("keepSubjects[%d]: %w", i, err)
		}
	}
	for i, a := range r.Approvals {
		switch {
		case a.Why == "":
			return fmt.Errorf("approvals[%d] has no why: people who have to wait need one", i)
		case a.Count < 1 || a.Count > maxApprovals:
			return fmt.Errorf("approvals[%d]: count %d is outside 1 to %d", i, a.Count, maxApprovals)
		case a.OverObjects < 0:
			return fmt.Errorf("approvals[%d]: overObjects %d is negative", i, a.OverObjects)
		}
		if err := checkPatterns(a.Actions, a.Resources, a.Namespaces); err != nil {
			return fmt.Errorf("approvals[%d]: %w", i, err)
		}
	}
	for _, c := range []struct {
		name string
		n    int
	}{
		{"caps.objectsPerAction", r.Caps.ObjectsPerAction}, {"caps.objectsPerHour", r.Caps.ObjectsPerHour},
		{"aloneCaps.objectsPerAction", r.AloneCaps.ObjectsPerAction}, {"aloneCaps.objectsPerHour", r.AloneCaps.ObjectsPerHour},
	} {
		if c.n < 0 || c.n > maxCap {
			return fmt.Errorf("%s: %d is outside 1 to %d", c.name, c.n, maxCap)
		}
	}
	return nil
}

// The core group's resources and the groups without a dot. Neither grows any
// more: new ones of Kubernetes' own end in .k8s.io, and a custom one needs a dot.
var (
	coreResources = []string{"configmaps", "endpoints", "events", "limitranges", "namespaces", "nodes", "persistentvolumeclaims", "persistentvolumes",
		"pods", "podtemplates", "replicationcontrollers", "resourcequotas", "secrets", "serviceaccounts", "services"}
	plainGroups = []string{"apps", "autoscaling", "batch", "extensions", "policy"}
)

// Unknown returns what the rules name and nothing is called: actions that are not
// among those given, and resources of no possible name. A rule with a slip of the
// keyboard never matches, and so lets through what it was written against; but a
// later release may know what this one does not, so that it is no mistake of form.
func (r Rules) Unknown(actions []string) (all []string) {
	act := func(where string, names ...string) {
		for _, n := range names {
			if !slices.ContainsFunc(actions, func(a string) bool { return among([]string{n}, a) }) {
				all = append(all, fmt.Sprintf("%s: there is no action %.64q", where, n))
			}
		}
	}
	resource := func(where string, names ...string) {
		for _, n := range names {
			_, group, grouped := strings.Cut(n, ".")
			switch {
			case strings.ToLower(n) == n && strings.ContainsAny(n, `*?[\`), slices.Contains(coreResources, n),
				strings.ToLower(n) == n && (strings.Contains(group, ".") || slices.Contains(plainGroups, group)):
			case !grouped:
				all = append(all, fmt.Sprintf("%s: the core group has no resource %.64q; others are written as deployments.apps", where, n))
			default:
				all = append(all, fmt.Sprintf("%s: no resource is called %.128q; it is the plural with its group, such as deployments.apps", where, n))
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Actions)) {
		if !slices.Contains(beside, name) {
			act("actions", name)
		}
	}
	for i, p := range r.Protect {
		where := fmt.Sprintf("protect[%d]", i)
		act(where, p.Actions...)
		resource(where, slices.Concat(p.Resources, p.Except)...)
	}
	for i, a := range r.Approvals {
		where := fmt.Sprintf("approvals[%d]", i)
		act(where, a.Actions...)
		resource(where, a.Resources...)
	}
	return all
}

func checkPatterns(lists ...[]string) error {
	for _, list := range lists {
		for _, pattern := range list {
			if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
				return fmt.Errorf("pattern %.64q is malformed", pattern)
			}
		}
	}
	return nil
}

// LocalRules is the file of a node's own policy. It adds protection and lowers caps,
// nothing else. Unknown keys are refused.
type LocalRules struct {
	// Version of the format: 1.
	Version int           `json:"version"`
	Protect []Rule        `json:"protect,omitempty"`
	Keep    []SubjectRule `json:"keepSubjects,omitempty"`
	Caps    Caps          `json:"caps,omitzero"`
}

// ReadLocal reads the file at the path; an empty path is no file, and nil.
func ReadLocal(file string) (*LocalRules, error) {
	if file == "" {
		return nil, nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fault.New(fault.Usage, "give policyFile a readable file, or remove it", "reading the local policy: %w", err)
	}
	l := &LocalRules{}
	if err = yaml.UnmarshalStrict(data, l); err == nil {
		err = l.check()
	}
	if err != nil {
		return nil, fault.New(fault.Usage, "mend the file; it can add protection and lower caps, nothing else", "local policy %s: %w", file, err)
	}
	return l, nil
}

// Unknown is that of the file's rules; nil has none.
func (l *LocalRules) Unknown(actions []string) []string {
	if l == nil {
		return nil
	}
	return Rules{Protect: l.Protect}.Unknown(actions)
}

func (l *LocalRules) check() error {
	if l.Version != 1 {
		return fmt.Errorf("version %d is not known to this build, which knows 1", l.Version)
	}
	for _, c := range []struct {
		name      string
		now, most int
	}{{"objectsPerAction", l.Caps.ObjectsPerAction, defaultCaps.ObjectsPerAction}, {"objectsPerHour", l.Caps.ObjectsPerHour, defaultCaps.ObjectsPerHour}} {
		if c.now < 0 || c.now > c.most {
			return fmt.Errorf("caps.%s: %d is outside 1 to %d, the shipped cap", c.name, c.now, c.most)
		}
	}
	return Rules{Protect: l.Protect, KeepSubjects: l.Keep}.Check()
}

// Tighten returns the policy with what the local file adds; nil adds nothing.
// Where the policy's own cap is lower, that one holds.
func (p *Policy) Tighten(l *LocalRules) *Policy {
	if l == nil {
		return p
	}
	q := &Policy{Version: p.Version, rules: p.rules, actions: p.actions}
	q.rules.Protect = slices.Concat(p.rules.Protect, l.Protect)
	q.rules.KeepSubjects = slices.Concat(p.rules.KeepSubjects, l.Keep)
	q.rules.Caps = p.rules.Caps.least(l.Caps)
	return q
}

// least returns the lower caps of both; 0 in other is no cap.
func (c Caps) least(other Caps) Caps {
	if other.ObjectsPerAction > 0 {
		c.ObjectsPerAction = min(c.ObjectsPerAction, other.ObjectsPerAction)
	}
	if other.ObjectsPerHour > 0 {
		c.ObjectsPerHour = min(c.ObjectsPerHour, other.ObjectsPerHour)
	}
	return c
}

// Caps returns the caps in force.
func (p *Policy) Caps() Caps { return p.rules.Caps }

// AloneCaps returns those for who goes without approvals, never above Caps.
func (p *Policy) AloneCaps() Caps { return p.rules.Caps.least(p.rules.AloneCaps) }

// matches is among for what a policy says, whose empty list stands for everything,
// and whose * takes a slash too: groups of OpenID Connect have some, and one of
// keepSubjects must not lose its rights for that.
func matches(patterns []string, s string) bool {
	if len(patterns) == 0 || among(patterns, s) {
		return true
	}
	flat := strings.NewReplacer("/", "\x00")
	return strings.Contains(s, "/") && slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(flat.Replace(p), flat.Replace(s))
		return ok && err == nil
	})
}

func among(patterns []string, s string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, s)
		return ok && err == nil
	})
}
