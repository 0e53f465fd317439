package action

import (
	"context"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

var cordonRow = row{
	name:        "cordon",
	summary:     "Let no new pods onto a node",
	description: "Marks a node unschedulable. The pods that it runs stay; those of DaemonSets, and pods that name their node themselves, still come.",
	role:        trust.Responder, effect: mutate, timeout: time.Minute,
	parameters: []*halliganv1.Parameter{nodeParameter},
	examples:   []string{"cordon worker-17"},
	plan: func(ctx context.Context, p *planner, raw *structpb.Struct) error {
		return planCordon(ctx, p, raw, true)
	},
}

var uncordonRow = row{
	name:        "uncordon",
	summary:     "Let new pods onto a node again",
	description: "Takes the mark away that cordon made, whoever made it.",
	role:        trust.Responder, effect: mutate, timeout: time.Minute,
	parameters: []*halliganv1.Parameter{nodeParameter},
	examples:   []string{"uncordon worker-17"},
	plan: func(ctx context.Context, p *planner, raw *structpb.Struct) error {
		return planCordon(ctx, p, raw, false)
	},
}

// The parameter is not called node: that is the flag that says which agent to ask.
var nodeParameter = &halliganv1.Parameter{Name: "target", Type: "string", Required: true, Positional: true, Placeholder: "NODE", Description: "the node's name in Kubernetes"}

type cordonParameters struct {
	Target string `json:"target"`
}

func planCordon(ctx context.Context, p *planner, raw *structpb.Struct, to bool) error {
	par, err := decode[cordonParameters](raw)
	if err != nil {
		return err
	}
	kind, name, err := p.target(ctx, named("nodes", par.Target))
	if err != nil {
		return err
	}
	if kind.Resource() != "nodes" || name == "" {
		return fault.New(fault.Usage, "give the name of one node; see: halligan get nodes", "%.200q is no node", par.Target)
	}
	if err := p.allow(kind, "", name); err != nil {
		return err
	}
	around := p.lookAround(ctx, kind, "", 1)
	obj, err := p.load(ctx, kind, "", name)
	if err != nil {
		return err
	}
	if err := p.flip(obj, storage.Unschedulable, to); err != nil {
		return err
	}
	what := map[bool]string{true: "cordoned", false: "open to new pods"}[to]
	if len(p.steps) == 0 {
		p.summary("nothing to do: %s is %s already", obj.title(), what)
		return nil
	}
	p.summary("%s %s", p.plan.Action, obj.title())
	if to {
		p.needs("kube-scheduler, and the API server's watch that shows it the node")
		p.warn("the pods that run there stay, and a DaemonSet's still come")
	} else {
		p.needs("kube-controller-manager (takes the taint node.kubernetes.io/unschedulable away), kube-scheduler, and an API server that answers both")
	}
	p.bypass(bypassUpdate...)
	return p.fights(obj, 1, around)
}

// named makes KIND/NAME of a plain NAME.
func named(plural, text string) string {
	if text != "" && !strings.Contains(text, "/") {
		return plural + "/" + text
	}
	return text
}

// flip plans to set a field that is true or false, and false where it is absent.
func (p *planner) flip(o *object, name storage.FieldName, to bool) error {
	if f, ok := o.kind.Field(name, o.APIVersion); ok {
		if now, _, err := o.Bool(f); err != nil || now == to {
			return err
		}
	}
	return p.update(o, []storage.Edit{{Field: name, Value: to}})
}
