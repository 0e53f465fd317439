package action

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/structpb"
	apivalidation "k8s.io/apimachinery/pkg/api/validation"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

const labelName, annotateName = "label", "annotate"

var labelRow = row{
	name:    labelName,
	summary: "Set or remove labels of one object",
	description: "KEY=VALUE sets a label, whatever it was, and KEY- removes it. Labels by which the control plane, a cloud or a tenancy tool gives rights, those of kinds that give rights, " +
		"and those of Kubernetes' own domains but for a few harmless ones, add authority: they need a commander and an approval. Those of Secrets cannot be changed through etcd.",
	role: trust.Responder, effect: mutate, timeout: time.Minute,
	parameters: []*halliganv1.Parameter{markedParameter, marksParameter("the labels to set (KEY=VALUE) and to remove (KEY-)"), namespaceParameter},
	examples:   []string{"label node/worker-17 topology.kubernetes.io/zone=b", "label deploy/web -n shop tier-"},
	plan: func(ctx context.Context, p *planner, raw *structpb.Struct) error {
		return planMark(ctx, p, raw, storage.Labels)
	},
}

var annotateRow = row{
	name:    annotateName,
	summary: "Set or remove annotations of one object",
	description: "KEY=VALUE sets an annotation, whatever it was, and KEY- removes it, such as those that make Argo CD, Flux or an operator leave an object alone. " +
		"What adds authority is the same as for label.",
	role: trust.Responder, effect: mutate, timeout: time.Minute,
	parameters: []*halliganv1.Parameter{markedParameter, marksParameter("the annotations to set (KEY=VALUE) and to remove (KEY-)"), namespaceParameter},
	examples:   []string{"annotate deploy/web -n shop argocd.argoproj.io/skip-reconcile=true", "annotate ks/apps -n flux-system kustomize.toolkit.fluxcd.io/reconcile-"},
	plan: func(ctx context.Context, p *planner, raw *structpb.Struct) error {
		return planMark(ctx, p, raw, storage.Annotations)
	},
}

var markedParameter = &halliganv1.Parameter{Name: "target", Type: "string", Required: true, Positional: true, Placeholder: "KIND/NAME", Description: "the object, such as node/worker-17"}

func marksParameter(what string) *halliganv1.Parameter {
	return &halliganv1.Parameter{Name: "changes", Type: "strings", Required: true, Positional: true, Placeholder: "KEY=VALUE|KEY-...", Description: what}
}

type markParameters struct {
	Target    string   `json:"target"`
	Changes   []string `json:"changes"`
	Namespace string   `json:"namespace"`
}

// maxMarks is how many labels or annotations one action changes.
const maxMarks = 32

// ours are the domains in which Kubernetes and OpenShift keep what their own
// components go by; most of it decides what somebody may do or where it runs.
var ours = []string{"kubernetes.io", "k8s.io", "openshift.io"}

// harmless are the exceptions: descriptions, and what only says where to place
// something. A key that ends in / stands for all that begin so.
var harmlessMarks = []string{
	"app.kubernetes.io/", "kubernetes.io/change-cause", "kubernetes.io/description",
	"topology.kubernetes.io/zone", "topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/region",
	"kubernetes.io/arch", "kubernetes.io/os", "kubernetes.io/hostname", "beta.kubernetes.io/arch", "beta.kubernetes.io/os",
	"node.kubernetes.io/instance-type", "beta.kubernetes.io/instance-type", "node.kubernetes.io/exclude-from-external-load-balancers",
	"cluster-autoscaler.kubernetes.io/safe-to-evict", "cluster-autoscaler.kubernetes.io/scale-down-disabled",
}

// grantors are domains of others by whose labels and annotations somebody gets
// rights: of a cloud, of a project or tenant, or a certificate.
var grantors = map[string]string{
	"amazonaws.com": "a role of the cloud", "iam.gke.io": "an identity of the cloud", "azure.workload.identity": "an identity of the cloud", "aadpodidbinding": "an identity of the cloud",
	"cattle.io": "rights in a Rancher project", "hnc.x-k8s.io": "rights of a parent namespace", "capsule.clastix.io": "rights of a tenant", "projectcapsule.dev": "rights of a tenant",
	"cert-manager.io": "a certificate", "spiffe.io": "an identity", "security.istio.io": "what a mesh lets through",
}

// within reports whether a key lies in a domain or below it.
func within(key, domain string) bool {
	prefix, _, ok := strings.Cut(key, "/")
	return prefix == domain || ok && strings.HasSuffix(prefix, "."+domain)
}

// grants says why to set or remove a label or annotation adds authority; "" where it
// does not.
func grants(kind *storage.Kind, key string) string {
	if kind.Authority {
		return kind.Resource() + " give rights or decide about requests, and may do so by it"
	}
	for _, h := range harmlessMarks {
		if key == h || strings.HasSuffix(h, "/") && strings.HasPrefix(key, h) {
			return ""
		}
	}
	for _, domain := range ours {
		if within(key, domain) {
			return "the control plane goes by what is in " + domain
		}
	}
	for domain, what := range grantors {
		if within(key, domain) {
			return "it can give " + what
		}
	}
	return ""
}

func planMark(ctx context.Context, p *planner, raw *structpb.Struct, field storage.FieldName) error {
	par, err := decode[markParameters](raw)
	if err != nil {
		return err
	}
	edits, err := parseMarks(par.Changes, field)
	if err != nil {
		return err
	}
	kind, name, err := p.one(ctx, par.Target)
	if err != nil {
		return err
	}
	if kind.Resource() == "secrets" {
		return fault.New(fault.Refused, "use the API server", "%s of Secrets can hold secrets or make something take them for its own: they are not changed through etcd", field)
	}
	for _, e := range edits {
		if why := grants(kind, e.Entry); why != "" {
			if err := p.addAuthority(fmt.Sprintf("changing %s, since %s,", e.Entry, why)); err != nil {
				return err
			}
		}
	}
	if err := p.allow(kind, par.Namespace, name); err != nil {
		return err
	}
	around := p.lookAround(ctx, kind, par.Namespace, 1)
	obj, err := p.load(ctx, kind, par.Namespace, name)
	if err != nil {
		return err
	}
	if err := p.update(obj, edits); err != nil {
		return err
	}
	if len(p.steps) == 0 {
		p.summary("nothing to do: %s has exactly these %s", obj.title(), field)
		return nil
	}
	if field == storage.Annotations {
		if err := fitsAnnotations(obj, edits); err != nil {
			return err
		}
	}
	p.summary("%s %s with %s", p.plan.Action, obj.title(), strings.Join(par.Changes, " "))
	p.needs("whoever goes by the " + string(field) + ", and the API server's watch of etcd that shows them")
	p.bypass(bypassUpdate...)
	switch {
	case field == storage.Labels && kind.Resource() == "namespaces":
		p.warn("network policies, admission webhooks and quotas may choose namespaces by their labels")
	case field == storage.Labels && (kind.Resource() == "pods" || kind.Resource() == "nodes"):
		p.warn("services, network policies, workloads and the scheduler may choose %s by their labels", kind.Plural)
	}
	return p.fights(obj, 1, around)
}

// parseMarks reads KEY=VALUE and KEY-.
func parseMarks(changes []string, field storage.FieldName) (edits []storage.Edit, err error) {
	bad := func(change, why string) ([]storage.Edit, error) {
		return nil, fault.New(fault.Usage, "write KEY=VALUE to set and KEY- to remove", "%.200q: %s", change, why)
	}
	switch {
	case len(changes) == 0:
		return nil, fault.New(fault.Usage, "write KEY=VALUE to set and KEY- to remove", "no %s to change", field)
	case len(changes) > maxMarks:
		return nil, fault.New(fault.Usage, "change them in several goes", "%d changes are more than %d", len(changes), maxMarks)
	}
	for _, change := range changes {
		key, value, set := strings.Cut(change, "=")
		if !set {
			var removes bool
			if key, removes = strings.CutSuffix(change, "-"); !removes {
				return bad(change, "neither sets nor removes anything")
			}
		}
		if slices.ContainsFunc(edits, func(e storage.Edit) bool { return e.Entry == key }) {
			return bad(change, "its key is there twice")
		}
		// Annotations' keys are checked in lower case, as the API server does
		// (pkg/api/validation/objectmeta.go, ValidateAnnotations).
		checked := key
		if field == storage.Annotations {
			checked = strings.ToLower(key)
		}
		if wrong := validation.IsQualifiedName(checked); len(wrong) > 0 {
			return bad(change, "the key cannot be: "+wrong[0])
		}
		edit := storage.Edit{Field: field, Entry: key}
		if set {
			if field == storage.Labels {
				if wrong := validation.IsValidLabelValue(value); len(wrong) > 0 {
					return bad(change, "the value cannot be: "+wrong[0])
				}
			}
			edit.Value = value
		}
		edits = append(edits, edit)
	}
	return edits, nil
}

// fitsAnnotations refuses what the API server would refuse ever after: more than
// 256 KiB of annotations.
func fitsAnnotations(o *object, edits []storage.Edit) error {
	all := map[string]string{}
	for key, value := range o.Meta.Annotations {
		all[key] = value
	}
	for _, e := range edits {
		delete(all, e.Entry)
		if value, ok := e.Value.(string); ok {
			all[e.Entry] = value
		}
	}
	if err := apivalidation.ValidateAnnotationsSize(all); err != nil {
		return fault.New(fault.TooLarge, "remove some first", "%s would have more annotations than an API server takes: %w", o.title(), err)
	}
	return nil
}
