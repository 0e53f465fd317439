package action

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

var pauseRow = row{
	name:    "pause",
	summary: "Hold a rollout, or whatever else can be paused",
	description: "A paused Deployment makes no more pods of a new template; it still keeps the number of those that it has. " +
		"A CronJob or Job is suspended, as by scale --to 0. A custom resource is paused by its boolean spec.paused or spec.suspend, if its definition has one: Argo Rollouts, Flux, Cluster API.",
	role: trust.Responder, effect: mutate, timeout: time.Minute,
	parameters: []*halliganv1.Parameter{rolloutParameter, namespaceParameter},
	examples:   []string{"pause deploy/web -n shop", "pause kustomization/apps -n flux-system"},
	plan: func(ctx context.Context, p *planner, raw *structpb.Struct) error {
		return planPause(ctx, p, raw, true)
	},
}

var resumeRow = row{
	name:        "resume",
	summary:     "Let go on what was paused",
	description: "Takes back exactly what pause does, whoever did it.",
	role:        trust.Responder, effect: mutate, timeout: time.Minute,
	parameters: []*halliganv1.Parameter{rolloutParameter, namespaceParameter},
	examples:   []string{"resume deploy/web -n shop"},
	plan: func(ctx context.Context, p *planner, raw *structpb.Struct) error {
		return planPause(ctx, p, raw, false)
	},
}

var rolloutParameter = &halliganv1.Parameter{Name: "target", Type: "string", Required: true, Positional: true, Placeholder: "KIND/NAME", Description: "what to hold, such as deploy/web"}

type pauseParameters struct {
	Target    string `json:"target"`
	Namespace string `json:"namespace"`
}

func planPause(ctx context.Context, p *planner, raw *structpb.Struct, to bool) error {
	par, err := decode[pauseParameters](raw)
	if err != nil {
		return err
	}
	kind, name, err := p.one(ctx, par.Target)
	if err != nil {
		return err
	}
	if err := p.allow(kind, par.Namespace, name); err != nil {
		return err
	}
	around := p.lookAround(ctx, kind, par.Namespace, 1)
	obj, err := p.load(ctx, kind, par.Namespace, name)
	if err != nil {
		return err
	}
	field := storage.Paused
	if _, ok := kind.Field(field, obj.APIVersion); !ok {
		field = storage.Suspend
	}
	if _, ok := kind.Field(field, obj.APIVersion); !ok {
		return fault.New(fault.Usage, "scale it, or pause what owns it: a Deployment, a CronJob or Job, or a custom resource with spec.paused or spec.suspend", "%s cannot be paused", kind.Resource())
	}
	if err := p.flip(obj, field, to); err != nil {
		return err
	}
	if len(p.steps) == 0 {
		p.summary("nothing to do: %s is %s already", obj.title(), map[bool]string{true: "paused", false: "not paused"}[to])
		return nil
	}
	p.summary("%s %s", p.plan.Action, obj.title())
	p.needs(needsOf(kind))
	p.bypass(bypassUpdate...)
	if kind.Kind == "Deployment" && to {
		p.warn("what it rolled out by now stays as it is; it still replaces pods that end, and can be scaled")
	}
	return p.fights(obj, 1, around)
}

// one resolves KIND/NAME and wants the name.
func (p *planner) one(ctx context.Context, text string) (*storage.Kind, string, error) {
	kind, name, err := p.target(ctx, text)
	if err == nil && name == "" {
		err = fault.New(fault.Usage, "name one object, such as "+kind.Plural+"/NAME", "%s works on one object at a time", p.plan.Action)
	}
	return kind, name, err
}
