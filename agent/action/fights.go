package action

import (
	"context"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	coordinationv1 "k8s.io/api/coordination/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// What a direct write goes around.
var (
	bypassUpdate = []string{"admission and validation", "quota", "the API server's audit log"}
	bypassDelete = []string{"finalizers", "disruption budgets", "grace periods", "the API server's audit log"}
)

// needsOf says what must be alive for the effect to follow the write.
func needsOf(k *storage.Kind) string {
	switch k.Carrier {
	case storage.Operator:
		return "the operator of " + k.Resource() + ", and the API server that it watches"
	case storage.Kubelet:
		return "the pod's kubelet, which stops it when its watch of the API server shows the deletion"
	case storage.ControllerManager:
		return "kube-controller-manager (removes or makes the pods), kubelets (stop them), and an API server that answers both"
	}
	return "the API server's watch of etcd, which shows the change to everybody else"
}

// gitOps are labels and annotations by which tools that put their own state
// back mark what they manage.
var gitOps = map[string]string{
	"argocd.argoproj.io/instance":             "Argo CD",
	"argocd.argoproj.io/tracking-id":          "Argo CD",
	"kustomize.toolkit.fluxcd.io/name":        "Flux (kustomize-controller)",
	"helm.toolkit.fluxcd.io/name":             "Flux (helm-controller)",
	"fleet.cattle.io/bundle-id":               "Rancher Fleet",
	"objectset.rio.cattle.io/id":              "Rancher Fleet",
	"configsync.gke.io/declared-version":      "Config Sync",
	"configmanagement.gke.io/managed":         "Config Sync",
	"olm.owner":                               "Operator Lifecycle Manager",
	"addonmanager.kubernetes.io/mode":         "the addon manager",
	"kapp.k14s.io/app":                        "kapp",
	"operator.tigera.io/provider":             "the Tigera operator",
	"app.kubernetes.io/managed-by=argocd":     "Argo CD",
	"app.kubernetes.io/managed-by=eks":        "EKS add-ons",
	"app.kubernetes.io/managed-by=configsync": "Config Sync",
}

// surroundings is what fights has to know beside the object itself. It is read
// while the object is, since every round trip counts when etcd is slow.
type surroundings struct {
	group       errgroup.Group
	autoscalers []*autoscalingv2.HorizontalPodAutoscaler
	budgets     []*policyv1.PodDisruptionBudget
}

// look reads something beside the plan. A tenant of the cluster wrote what is
// read: where it meets a fault of this program, the plan fails and the agent does
// not.
func (s *surroundings) look(log zerolog.Logger, read func() error) {
	s.group.Go(func() (err error) {
		defer func() {
			if r := recover(); r != nil {
				log.Error().Str("panic", neutral.LineMax(fmt.Sprint(r), 512)).Bytes("stack", debug.Stack()).Msg("looking around an object panicked")
				err = fault.New(fault.Failed, "report it with the agent's log of this moment", "looking around the object met a bug in the agent")
			}
		}()
		return read()
	})
}

// maxAround is how many autoscalers or budgets of a namespace are looked at.
const maxAround = 2000

// lookAround starts reading the surroundings of an object of the kind that is
// to be scaled to that many replicas, or deleted (0).
func (p *planner) lookAround(ctx context.Context, kind *storage.Kind, namespace string, to int64) *surroundings {
	around := &surroundings{}
	p.around = around
	if kind.Namespaced && validNamespace(namespace) {
		if p.plan.Action == scaleName && (kind.Fields[storage.Replicas].Type != 0 || kind.Custom) {
			around.look(p.engine.log, func() (err error) {
				around.autoscalers, err = listTyped(ctx, p, "horizontalpodautoscalers.autoscaling", namespace, func(h *autoscalingv2.HorizontalPodAutoscaler) *autoscalingv2.HorizontalPodAutoscaler {
					return &autoscalingv2.HorizontalPodAutoscaler{ObjectMeta: metav1.ObjectMeta{Name: h.Name}, Spec: h.Spec}
				})
				return err
			})
		}
		if to == 0 {
			around.look(p.engine.log, func() (err error) {
				around.budgets, err = listTyped(ctx, p, "poddisruptionbudgets.policy", namespace, func(b *policyv1.PodDisruptionBudget) *policyv1.PodDisruptionBudget {
					return &policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Name: b.Name}, Spec: b.Spec}
				})
				return err
			})
		}
	}
	around.look(p.engine.log, func() error { return p.controllersAlive(ctx, kind) })
	return around
}

// listTyped reads the objects of a kind in a namespace and keeps of each what
// part returns; one that cannot be read is a warning.
func listTyped[T any](ctx context.Context, p *planner, kindName, namespace string, part func(*T) *T) ([]*T, error) {
	kind, err := p.engine.resolve(ctx, kindName)
	if err != nil {
		return nil, p.unseen(err)
	}
	var out []*T
	_, err = p.walk(ctx, kind, namespace, func(o *object, problem error) error {
		v := new(T)
		if problem == nil {
			problem = typed(o, v)
		}
		if problem != nil {
			p.warn("%s could not be read: whether it matters here is not known", o.title())
			return nil
		}
		if len(out) == maxAround {
			p.warn("more than %d %s in namespace %s: the rest is not looked at", maxAround, kindName, namespace)
			return nil
		}
		out = append(out, part(v))
		return nil
	})
	return out, err
}

// fights names what would work against the change of an object, and whether
// those who have to carry it out seem alive.
func (p *planner) fights(o *object, to int64, around *surroundings) error {
	if owner := controllerOf(o); owner != "" && !slices.Contains([]string{deleteName, labelName, annotateName}, p.plan.Action) {
		p.warn("%s owns it and may put it back: change the owner instead", owner)
	}
	for _, m := range managers(o) {
		p.warn("%s manages it and may put it back: suspend that first", m)
	}
	p.fieldManagers(o)
	if o.Meta.DeletionTimestamp != nil {
		p.warn("it is being deleted since %s", o.Meta.DeletionTimestamp.UTC().Format(time.RFC3339))
	}
	if err := around.group.Wait(); err != nil {
		return err
	}
	for _, hpa := range around.autoscalers {
		p.autoscaler(o, to, hpa)
	}
	pods := podLabels(o)
	for _, pdb := range around.budgets {
		if s, err := metav1.LabelSelectorAsSelector(pdb.Spec.Selector); err == nil && !s.Empty() && len(pods) > 0 && s.Matches(pods) {
			p.warn("PodDisruptionBudget %s is bypassed", pdb.Name)
		}
	}
	slices.Sort(p.plan.Warnings)
	return nil
}

// managers names the tools whose marks an object bears, each once.
func managers(o *object) []string {
	found := map[string]bool{}
	for _, marks := range []map[string]string{o.Meta.Labels, o.Meta.Annotations} {
		for key, value := range marks {
			if tool := gitOps[key]; tool != "" {
				found[tool+" ("+key+")"] = true
			}
			if tool := gitOps[key+"="+value]; tool != "" {
				found[tool+" ("+key+")"] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// fieldManagers warns of whoever applied a field that the plan changes: an
// operator, most likely, that compares it with what it wants.
func (p *planner) fieldManagers(o *object) {
	var whole struct {
		Metadata metav1.ObjectMeta `json:"metadata"`
	}
	if len(p.steps) == 0 || typed(o, &whole) != nil {
		return
	}
	for _, c := range p.steps[len(p.steps)-1].changes {
		f, ok := o.kind.Field(c.Field, o.APIVersion)
		if !ok || c.Field == storage.Generation {
			continue
		}
		name := f.JSON[len(f.JSON)-1]
		if f.JSON[0] == "metadata" { // of labels and annotations everybody has some
			name = c.Entry
		}
		for _, m := range whole.Metadata.ManagedFields {
			if m.Subresource != "" || m.FieldsV1 == nil || strings.HasPrefix(m.Manager, "kubectl") || m.Manager == "kube-controller-manager" {
				continue
			}
			if strings.Contains(m.FieldsV1.GetRawString(), `"f:`+name+`":`) {
				p.warn("field manager %s set its %s and may set it again", m.Manager, name)
			}
		}
	}
}

// autoscaler warns of a HorizontalPodAutoscaler whose target the object is.
func (p *planner) autoscaler(o *object, to int64, hpa *autoscalingv2.HorizontalPodAutoscaler) {
	ref := hpa.Spec.ScaleTargetRef
	group, _, grouped := strings.Cut(ref.APIVersion, "/")
	if !grouped {
		group = ""
	}
	if ref.Kind != o.kind.Kind || ref.Name != o.name || group != o.kind.Group {
		return
	}
	least := int32(1)
	if hpa.Spec.MinReplicas != nil {
		least = *hpa.Spec.MinReplicas
	}
	most := hpa.Spec.MaxReplicas
	switch {
	case to == 0:
		p.warn("HorizontalPodAutoscaler %s (%d to %d) rests while replicas is 0, and takes over again after", hpa.Name, least, most)
	case to < int64(least) || to > int64(most):
		p.warn("HorizontalPodAutoscaler %s (%d to %d) will put the replicas back within its bounds", hpa.Name, least, most)
	default:
		p.warn("HorizontalPodAutoscaler %s (%d to %d) goes on deciding the replicas", hpa.Name, least, most)
	}
}

// podLabels returns the labels of a pod, or of the pods that a workload makes.
func podLabels(o *object) labels.Set {
	if o.kind.Kind == "Pod" {
		return o.Meta.Labels
	}
	var w struct {
		Spec struct {
			Template struct {
				Metadata metav1.ObjectMeta `json:"metadata"`
			} `json:"template"`
		} `json:"spec"`
	}
	if typed(o, &w) != nil {
		return nil
	}
	return w.Spec.Template.Metadata.Labels
}

// controllersAlive looks at the lease that kube-controller-manager renews every
// 2 s (--leader-elect-retry-period) while it leads.
func (p *planner) controllersAlive(ctx context.Context, kind *storage.Kind) error {
	if kind.Carrier != storage.ControllerManager {
		return nil
	}
	leases, err := p.engine.resolve(ctx, "leases.coordination.k8s.io")
	if err != nil {
		return p.unseen(err)
	}
	key, err := leases.Key(p.engine.prefix, "kube-system", "kube-controller-manager")
	if err != nil {
		return err
	}
	kv, found, _, err := p.engine.etcd.Get(ctx, key)
	if err != nil {
		return err
	}
	if !found {
		p.warn("no kube-controller-manager has ever taken its lease here: the effect waits for one")
		return nil
	}
	o, err := p.open(ctx, leases, "kube-system", "kube-controller-manager", kv)
	var lease coordinationv1.Lease
	if err == nil {
		err = typed(o, &lease)
	}
	if err != nil || lease.Spec.RenewTime == nil {
		p.warn("kube-controller-manager's lease could not be read: whether it lives is not known")
		return nil
	}
	term := 15 * time.Second
	if lease.Spec.LeaseDurationSeconds != nil {
		term = time.Duration(*lease.Spec.LeaseDurationSeconds) * time.Second
	}
	if age := time.Since(lease.Spec.RenewTime.Time); age > term {
		p.warn("kube-controller-manager has not renewed its lease for %s: the effect waits until it is back", roundAge(age))
	}
	return nil
}

func roundAge(d time.Duration) string {
	switch {
	case d > 48*time.Hour:
		return fmt.Sprintf("%d days", int(d/(24*time.Hour)))
	case d > time.Hour:
		return d.Round(time.Minute).String()
	}
	return d.Round(time.Second).String()
}
