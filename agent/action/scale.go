package action

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// maxReplicas is more pods than any cluster runs: Kubernetes supports up to
// 150,000 in all (kubernetes.io, "Considerations for large clusters").
const maxReplicas = 100_000

var scaleRow = row{
	name:    scaleName,
	summary: "Set how many pods a workload runs",
	description: "Sets the replicas of a Deployment, StatefulSet, ReplicaSet, ReplicationController or a custom resource with a scale subresource. " +
		"A DaemonSet takes --to 0 (a node selector that no node matches), a Job and a CronJob take --to 0 (suspended); --to 1 takes back exactly that.",
	role: trust.Responder, effect: mutate, timeout: time.Minute,
	parameters: []*halliganv1.Parameter{
		{Name: "target", Type: "string", Required: true, Positional: true, Placeholder: "KIND/NAME", Description: "the workload, such as ds/collector"},
		namespaceParameter,
		{Name: "to", Type: "int", Required: true, Placeholder: "N", Description: "replicas wanted; DaemonSet, Job and CronJob: 0 or 1"},
	},
	examples: []string{"scale ds/collector -n telemetry --to 0", "scale deploy/web -n shop --to 3"},
	plan:     planScale,
}

type scaleParameters struct {
	Target    string `json:"target"`
	Namespace string `json:"namespace"`
	To        *int64 `json:"to"`
}

func planScale(ctx context.Context, p *planner, raw *structpb.Struct) error {
	par, err := decode[scaleParameters](raw)
	if err != nil {
		return err
	}
	if par.To == nil {
		return fault.New(fault.Usage, "say --to N", "how many replicas is missing")
	}
	if *par.To < 0 || *par.To > maxReplicas {
		return fault.New(fault.Usage, "choose from 0 to 100000", "%d replicas cannot be meant", *par.To)
	}
	kind, name, err := p.one(ctx, par.Target)
	if err != nil {
		return err
	}
	if err := p.allow(kind, par.Namespace, name); err != nil {
		return err
	}
	around := p.lookAround(ctx, kind, par.Namespace, *par.To)
	obj, err := p.load(ctx, kind, par.Namespace, name)
	if err != nil {
		return err
	}
	edits, what, err := scaleEdits(obj, *par.To)
	if err != nil {
		return err
	}
	if err := p.update(obj, edits); err != nil {
		return err
	}
	if len(p.steps) == 0 {
		p.summary("nothing to do: %s is %s already", obj.title(), what)
		return nil
	}
	from := ""
	for _, c := range p.steps[0].changes {
		if c.Field == storage.Replicas {
			from, what = " from "+cmp.Or(string(c.Before), "1")+" replicas", ""
		}
	}
	if what != "" {
		what = " (" + what + ")"
	}
	p.summary("scale %s%s to %d%s", obj.title(), from, *par.To, what)
	p.needs(needsOf(kind))
	p.bypass(bypassUpdate...)
	return p.fights(obj, *par.To, around)
}

// scaleEdits says what scaling means for the kind.
func scaleEdits(obj *object, to int64) ([]storage.Edit, string, error) {
	has := func(f storage.FieldName) bool { _, ok := obj.kind.Field(f, obj.APIVersion); return ok }
	onOff := func(off string) error {
		if to > 1 {
			return fault.New(fault.Usage, "say --to 0 to stop it or --to 1 to let it run again",
				"a %s has no replicas: it can only be %s or not", obj.kind.Kind, off)
		}
		return nil
	}
	// What is absent has a default: one replica, not suspended. To write it out
	// would change nothing.
	absent := func(name storage.FieldName) bool {
		f, _ := obj.kind.Field(name, obj.APIVersion)
		if name == storage.Replicas {
			_, present, err := obj.Int(f)
			return err == nil && !present
		}
		_, present, err := obj.Bool(f)
		return err == nil && !present
	}
	switch {
	case has(storage.Replicas) && to == 1 && !obj.kind.Custom && absent(storage.Replicas):
		return nil, "at 1 replica", nil
	case has(storage.Suspend) && to == 1 && absent(storage.Suspend):
		return nil, "not suspended", nil
	case has(storage.Replicas):
		return []storage.Edit{{Field: storage.Replicas, Value: to}}, fmt.Sprintf("at %d replicas", to), nil
	case has(storage.NodeSelector):
		edit, what := storage.Edit{Field: storage.NodeSelector, Entry: storage.StopLabel}, "on all nodes that its own selector takes"
		if to == 0 {
			edit.Value, what = "true", "kept off every node by a node selector"
		}
		return []storage.Edit{edit}, what, onOff("stopped")
	case has(storage.Suspend):
		what := "not suspended"
		if to == 0 {
			what = "suspended"
		}
		return []storage.Edit{{Field: storage.Suspend, Value: to == 0}}, what, onOff("suspended")
	}
	return nil, "", fault.New(fault.Usage, "scale its owner, or a kind that has replicas", "%s cannot be scaled", obj.kind.Resource())
}
