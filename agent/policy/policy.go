// Package policy says what no action may touch and how much one person may
// change, whatever door the request came through. The shipped policy is a table
// in code, to be reviewed like code; a local file can add to it and lower its
// caps, never take anything away. The signed bundle of a fleet will feed the
// same decision.
//
// It must never look at who asks: roles are the business of the action table
// and its gate. It stands on floor 4, below agent/action.
package policy

import (
	"fmt"
	"os"
	"path"
	"slices"

	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/internal/fault"
)

// Rule protects objects. Every list holds patterns of path.Match; an empty list
// stands for everything. A rule matches an object that all its lists match.
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

// Caps bound what can be changed.
type Caps struct {
	// ObjectsPerAction is the largest number of objects in one plan.
	ObjectsPerAction int `json:"objectsPerAction,omitempty"`
	// ObjectsPerHour is how many objects one person may change in any 60
	// minutes, over all actions on this agent.
	ObjectsPerHour int `json:"objectsPerHour,omitempty"`
}

// Policy is the shipped table with whatever a local file added.
type Policy struct {
	rules    []Rule
	subjects []SubjectRule
	caps     Caps
}

// File is the form of the local policy file. Unknown keys are refused.
type File struct {
	// Version of the format: 1.
	Version int           `json:"version"`
	Protect []Rule        `json:"protect,omitempty"`
	Keep    []SubjectRule `json:"keepSubjects,omitempty"`
	Caps    Caps          `json:"caps,omitempty"`
}

// Default returns the shipped policy.
func Default() *Policy {
	return &Policy{rules: slices.Clone(defaultRules), subjects: slices.Clone(defaultSubjects), caps: defaultCaps}
}

// Load returns the shipped policy tightened by the file at the path; an empty
// path is no file. A file that cannot be read, has unknown keys, or would loosen
// anything is an error.
func Load(file string) (*Policy, error) {
	p := Default()
	if file == "" {
		return p, nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fault.New(fault.Usage, "give policyFile a readable file, or remove it", "reading the local policy: %w", err)
	}
	if err := p.tighten(data); err != nil {
		return nil, fault.New(fault.Usage, "mend the file; it can add protection and lower caps, nothing else", "local policy %s: %w", file, err)
	}
	return p, nil
}

func (p *Policy) tighten(data []byte) error {
	var f File
	if err := yaml.UnmarshalStrict(data, &f); err != nil {
		return err
	}
	if f.Version != 1 {
		return fmt.Errorf("version %d is not known to this build, which knows 1", f.Version)
	}
	for i, r := range f.Protect {
		if r.Why == "" {
			return fmt.Errorf("protect[%d] has no why: people who are refused need one", i)
		}
		for _, list := range [][]string{r.Actions, r.Resources, r.Except, r.Namespaces, r.Names} {
			if err := checkPatterns(list); err != nil {
				return fmt.Errorf("protect[%d]: %w", i, err)
			}
		}
	}
	for i, r := range f.Keep {
		if r.Why == "" || len(r.Subjects) == 0 {
			return fmt.Errorf("keepSubjects[%d] needs subjects and a why", i)
		}
		if err := checkPatterns(r.Subjects); err != nil {
			return fmt.Errorf("keepSubjects[%d]: %w", i, err)
		}
	}
	for _, c := range []struct {
		name     string
		was, now int
		set      *int
	}{
		{"objectsPerAction", p.caps.ObjectsPerAction, f.Caps.ObjectsPerAction, &p.caps.ObjectsPerAction},
		{"objectsPerHour", p.caps.ObjectsPerHour, f.Caps.ObjectsPerHour, &p.caps.ObjectsPerHour},
	} {
		switch {
		case c.now == 0:
		case c.now < 0 || c.now > c.was:
			return fmt.Errorf("caps.%s: %d is outside 1 to %d, the shipped cap", c.name, c.now, c.was)
		default:
			*c.set = c.now
		}
	}
	p.rules = append(p.rules, f.Protect...)
	p.subjects = append(p.subjects, f.Keep...)
	return nil
}

func checkPatterns(list []string) error {
	for _, pattern := range list {
		if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
			return fmt.Errorf("pattern %q is malformed", pattern)
		}
	}
	return nil
}

// Caps returns the caps in force.
func (p *Policy) Caps() Caps { return p.caps }

// Object refuses an action on a protected object.
func (p *Policy) Object(action, resource, namespace, name string) error {
	for _, r := range p.rules {
		if matches(r.Actions, action) && matches(r.Resources, resource) &&
			(len(r.Except) == 0 || !matches(r.Except, resource)) &&
			matches(r.Namespaces, namespace) && matches(r.Names, name) {
			where := resource + "/" + name
			if namespace != "" {
				where += " in namespace " + namespace
			}
			next := "no role can override this rule here; choose another target"
			if action == "undo" {
				next = "no role can override this rule here; only the API server can put it back"
			}
			return fault.New(fault.Refused, next,
				"policy protects %s against %s: %s", where, action, r.Why)
		}
	}
	return nil
}

// Subject refuses to take rights from a protected subject.
func (p *Policy) Subject(subject string) error {
	for _, r := range p.subjects {
		if matches(r.Subjects, subject) {
			return fault.New(fault.Refused, "no role can override this rule here; choose another subject",
				"policy protects the rights of %s: %s", subject, r.Why)
		}
	}
	return nil
}

func matches(patterns []string, s string) bool {
	if len(patterns) == 0 {
		return true
	}
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, s)
		return ok && err == nil
	})
}
