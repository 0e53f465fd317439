package trust

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
)

// Differs says, in one line each, how the rules differ from the shipped table, what is
// struck first. roles are the shipped least roles by the name of an action. Rules
// count by what they match, not by their words or order; one that was changed is
// struck, and another added.
func (r Rules) Differs(roles map[string]string) (all []string) {
	say := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	now, shipped := r.complete(), ShippedRules()
	struck := func(one, other []Rule) (only []Rule) {
		for _, rule := range one {
			if !slices.ContainsFunc(other, func(o Rule) bool { return rule.matchesLike(o) }) {
				only = append(only, rule)
			}
		}
		return only
	}
	for _, rule := range struck(shipped.Protect, now.Protect) {
		say("struck from protect: %s: %s", rule.what(), rule.Why)
	}
	var before, kept []string
	why := map[string]string{}
	for _, rule := range shipped.KeepSubjects {
		before = append(before, rule.Subjects...)
		for _, s := range rule.Subjects {
			why[s] = rule.Why
		}
	}
	for _, rule := range now.KeepSubjects {
		kept = append(kept, rule.Subjects...)
	}
	gone := map[string][]string{} // by reason
	for _, s := range before {
		if !slices.Contains(kept, s) {
			gone[why[s]] = append(gone[why[s]], s)
		}
	}
	for _, reason := range slices.Sorted(maps.Keys(gone)) {
		say("struck from keepSubjects: %s: %s", some(gone[reason]), reason)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Actions)) {
		if was := roles[name]; was != r.Actions[name].Role {
			if was == "" {
				was = "none that this release knows"
			}
			say("role of %s: %s, shipped %s", name, r.Actions[name].Role, was)
		}
	}
	for _, c := range []struct {
		name string
		a, b Caps
	}{{"caps", now.Caps, shipped.Caps}, {"aloneCaps", now.AloneCaps, shipped.AloneCaps}} {
		if c.a != c.b {
			say("%s: %d objects per action and %d per hour, shipped %d and %d", c.name, c.a.ObjectsPerAction, c.a.ObjectsPerHour, c.b.ObjectsPerAction, c.b.ObjectsPerHour)
		}
	}
	for _, rule := range struck(now.Protect, shipped.Protect) {
		say("added to protect: %s: %s", rule.what(), rule.Why)
	}
	added := slices.DeleteFunc(kept, func(s string) bool { return slices.Contains(before, s) })
	if len(added) > 0 {
		say("added to keepSubjects: %s", some(added))
	}
	if !reflect.DeepEqual(now.Approvals, shipped.Approvals) {
		alone := 0
		for _, a := range now.Approvals {
			if a.Alone {
				alone++
			}
		}
		say("approvals: %d rules, of which %d let one person go alone; shipped %d", len(now.Approvals), alone, len(shipped.Approvals))
	}
	return all
}

// matchesLike reports whether two rules match the same, as far as their lists show.
func (r Rule) matchesLike(o Rule) bool {
	same := func(a, b []string) bool {
		a, b = slices.Clone(a), slices.Clone(b)
		slices.Sort(a)
		slices.Sort(b)
		return slices.Equal(a, b)
	}
	return same(r.Actions, o.Actions) && same(r.Resources, o.Resources) && same(r.Except, o.Except) && same(r.Namespaces, o.Namespaces) && same(r.Names, o.Names)
}

// what says what a rule matches.
func (r Rule) what() string {
	text := "every action"
	if len(r.Actions) > 0 {
		text = some(r.Actions)
	}
	for _, l := range []struct {
		word string
		list []string
	}{{" of ", r.Resources}, {" named ", r.Names}, {" in ", r.Namespaces}, {" except ", r.Except}} {
		if len(l.list) > 0 {
			text += l.word + some(l.list)
		}
	}
	return text
}

// some names the first of a list.
func some(list []string) string {
	const most = 4
	if len(list) <= most {
		return strings.Join(list, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), len(list)-most)
}
