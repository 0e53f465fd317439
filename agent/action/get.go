package action

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

var getRow = row{
	name:    "get",
	summary: "Show objects, decoded from etcd",
	role:    trust.Observer, effect: read, timeout: 2 * time.Minute,
	parameters: []*halliganv1.Parameter{
		{Name: "target", Type: "string", Required: true, Positional: true, Placeholder: "KIND[/NAME]", Description: "a kind, or one object"},
		namespaceParameter, allNamespacesParameter, selectorParameter,
		{Name: "full", Type: "bool", Description: "whole objects, not only the columns of a table"},
		{Name: "reveal", Type: "bool", Description: "show the values of one Secret (commander; recorded, with its --reason)"},
	},
	examples: []string{"get pods -n telemetry", "get ds/collector -n telemetry -o yaml", "get crd"},
}

type getParameters struct {
	Target        string `json:"target"`
	Namespace     string `json:"namespace"`
	AllNamespaces bool   `json:"allNamespaces"`
	Selector      string `json:"selector"`
	Full          bool   `json:"full"`
	Reveal        bool   `json:"reveal"`
}

// Get sends objects decoded from etcd, in the order of their keys, all of one
// revision. Values of Secrets are replaced unless a commander asked to reveal
// one by name.
func (e *Engine) Get(ctx context.Context, who trust.Identity, req *halliganv1.GetRequest, send func(*halliganv1.Object) error) (*halliganv1.GetSummary, error) {
	r, err := e.authorize(who, getRow.name)
	if err != nil {
		return nil, err
	}
	raw := req.GetParameters()
	if err := r.checkParameters(raw); err != nil {
		return nil, err
	}
	if err := checkReason(req.GetReason(), req.GetIncident()); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	par, err := decode[getParameters](raw)
	if err != nil {
		return nil, err
	}
	p := &planner{engine: e, who: who, policy: e.policy(), request: e.request(r), plan: &halliganv1.Plan{}}
	kind, name, err := p.target(ctx, par.Target)
	if err != nil {
		return nil, err
	}
	if par.Reveal && (!isSecret(kind) || name == "") {
		return nil, fault.New(fault.Usage, "name one: secret/NAME", "--reveal takes one Secret by name")
	}
	if par.Reveal {
		p.request.Floor = trust.Commander
	}
	if err := p.allow(kind, par.Namespace, name); err != nil {
		return nil, err
	}
	if par.Reveal && !says(req.GetReason()) {
		return nil, fault.New(fault.Usage, "say why with --reason TEXT", "showing a Secret needs a reason for the record")
	}
	if par.Reveal {
		// Seeing a Secret is a deed: no value leaves before it is on record.
		key, err := kind.Key(e.prefix, par.Namespace, name)
		if err != nil {
			return nil, err
		}
		if err := e.recordReveal(ctx, who, req, par, key); err != nil {
			return nil, err
		}
	}
	summary := &halliganv1.GetSummary{}
	if name != "" {
		if par.Selector != "" || par.AllNamespaces {
			return nil, fault.New(fault.Usage, "give a name, or a kind with a selector", "a name and a selection of many exclude each other")
		}
		obj, err := p.load(ctx, kind, par.Namespace, name)
		if err != nil {
			return nil, err
		}
		out := objectOf(obj)
		if err := whole(out, obj, par.Reveal); err != nil {
			return nil, err
		}
		summary.Objects, summary.Revision, summary.Stale = 1, p.plan.Revision, p.stale
		return summary, send(out)
	}
	selector, err := parseSelector(par.Selector)
	if err != nil {
		return nil, err
	}
	if err := scope(kind, par.Namespace, par.AllNamespaces); err != nil {
		return nil, err
	}
	view, err := p.walk(ctx, kind, par.Namespace, func(obj *object, problem error) error {
		if problem != nil {
			summary.Undecodable++
			if par.Selector != "" {
				return nil
			}
			return send(&halliganv1.Object{Key: obj.key, Resource: kind.Resource(), Namespace: obj.namespace, Name: obj.name,
				Revision: obj.revision, Note: fault.Of(problem).Message})
		}
		if !selector.Matches(labels.Set(obj.Meta.Labels)) {
			return nil
		}
		out := objectOf(obj)
		if par.Full {
			if err := whole(out, obj, false); err != nil {
				out.Note = fault.Of(err).Message
			}
		}
		summary.Objects++
		return send(out)
	})
	if err != nil {
		return nil, err
	}
	if summary.Objects+summary.Undecodable == 0 && par.Namespace != "" && view.Stale == "" {
		if err := p.namespaceExists(ctx, par.Namespace); err != nil {
			return nil, err
		}
	}
	summary.Revision, summary.Stale = view.Revision, view.Stale
	return summary, nil
}

func objectOf(o *object) *halliganv1.Object {
	out := &halliganv1.Object{Key: o.key, Resource: o.kind.Resource(), Namespace: o.namespace, Name: o.name, Uid: string(o.Meta.UID),
		Revision: o.revision, State: o.State()}
	if !o.Meta.CreationTimestamp.IsZero() {
		out.Created = timestamppb.New(o.Meta.CreationTimestamp.Time)
	}
	return out
}

// whole adds the object's JSON.
func whole(out *halliganv1.Object, o *object, reveal bool) error {
	data, note, err := o.JSON()
	if err != nil {
		return err
	}
	if isSecret(o.kind) && !reveal {
		if data, err = storage.Redact(data); err != nil {
			return err
		}
	}
	out.Json, out.Note = string(data), note
	return nil
}

func isSecret(k *storage.Kind) bool { return k.Group == "" && k.Kind == "Secret" }
