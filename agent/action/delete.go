package action

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/structpb"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

var deleteRow = row{
	name:    deleteName,
	summary: "Remove objects from etcd, one key at a time",
	description: "Removes one object by name, or all of a kind that a label selector takes. Each is kept before it is removed, so that undo can put it back; Secrets are the exception. " +
		"Nothing of the API server's deletion runs: no finalizers, no grace period; dependents are collected by the garbage collector.",
	role: trust.Responder, effect: mutate, timeout: 30 * time.Minute,
	parameters: []*halliganv1.Parameter{
		{Name: "target", Type: "string", Required: true, Positional: true, Placeholder: "KIND[/NAME]", Description: "one object, or a kind with a selector"},
		namespaceParameter, allNamespacesParameter, selectorParameter,
	},
	examples: []string{"delete job/report-27 -n batch", "delete configmaps -n telemetry -l app=runaway"},
	plan:     planDelete,
}

type deleteParameters struct {
	Target        string `json:"target"`
	Namespace     string `json:"namespace"`
	AllNamespaces bool   `json:"allNamespaces"`
	Selector      string `json:"selector"`
}

func planDelete(ctx context.Context, p *planner, raw *structpb.Struct) error {
	par, err := decode[deleteParameters](raw)
	if err != nil {
		return err
	}
	kind, name, err := p.target(ctx, par.Target)
	if err != nil {
		return err
	}
	if name != "" {
		if par.Selector != "" || par.AllNamespaces {
			return fault.New(fault.Usage, "give a name, or a kind with a selector", "a name and a selection of many exclude each other")
		}
		if err := p.allow(kind, par.Namespace, name); err != nil {
			return err
		}
		around := p.lookAround(ctx, kind, par.Namespace, 0)
		obj, err := p.load(ctx, kind, par.Namespace, name)
		if obj != nil && fault.Is(err, fault.Undecodable) {
			p.summary("delete %s, which cannot be read", obj.title())
			p.removeBlind(obj, err)
			p.bypass(bypassDelete...)
			return nil
		}
		if err != nil {
			return err
		}
		p.summary("delete %s", obj.title())
		p.remove(obj)
		p.needs(needsOf(kind))
		p.bypass(bypassDelete...)
		return p.fights(obj, 0, around)
	}

	if par.Selector == "" {
		return fault.New(fault.Usage, "name one object ("+kind.Plural+"/NAME) or select some with -l LABELS", "deleting every object of a kind is not offered")
	}
	selector, err := parseSelector(par.Selector)
	if err != nil {
		return err
	}
	if requirements, _ := selector.Requirements(); !slices.ContainsFunc(requirements, func(r labels.Requirement) bool {
		return slices.Contains([]selection.Operator{selection.Equals, selection.DoubleEquals, selection.In, selection.Exists}, r.Operator())
	}) {
		return fault.New(fault.Usage, "say which label they have: app=web, or just app", "the selector takes everything that lacks a label")
	}
	if err := scope(kind, par.Namespace, par.AllNamespaces); err != nil {
		return err
	}
	most := p.policy.Caps().ObjectsPerAction
	var odd int
	managed := map[string]int{}
	_, err = p.walk(ctx, kind, par.Namespace, func(obj *object, problem error) error {
		if problem != nil {
			odd++
			return nil
		}
		if !selector.Matches(labels.Set(obj.Meta.Labels)) {
			return nil
		}
		if len(p.steps) == most {
			return fault.New(fault.Refused, "narrow the selector; what is left can be taken in a second go",
				"the selector takes more than %d objects, the most that policy lets one action change", most)
		}
		p.remove(obj)
		for _, m := range managers(obj) {
			managed[m]++
		}
		return nil
	})
	if err != nil {
		return err
	}
	where := "all namespaces"
	if !kind.Namespaced {
		where = "the cluster"
	} else if par.Namespace != "" {
		where = "namespace " + par.Namespace
	}
	if len(p.steps) == 0 && par.Namespace != "" {
		if err := p.namespaceExists(ctx, par.Namespace); err != nil {
			return err
		}
	}
	if len(p.steps) == 0 {
		p.summary("nothing to do: no %s in %s have the labels %s", kind.Resource(), where, par.Selector)
		return nil
	}
	p.summary("delete %d %s with the labels %s in %s", len(p.steps), kind.Resource(), par.Selector, where)
	for _, m := range slices.Sorted(maps.Keys(managed)) {
		p.warn("%s manages %d of them and may make them again: suspend that first", m, managed[m])
	}
	if odd > 0 {
		p.warn("%d %s could not be read and are left alone", odd, kind.Resource())
	}
	p.needs(needsOf(kind))
	p.bypass(bypassDelete...)
	return nil
}

func parseSelector(text string) (labels.Selector, error) {
	s, err := labels.Parse(text)
	if err != nil {
		return nil, fault.New(fault.Usage, "write it as kubectl takes it: app=web,tier!=db", "selector %.200q: %s", text, fmt.Sprint(err))
	}
	return s, nil
}
