package action

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	autoscalingv2 "k8s.io/api/autoscaling/v2"
	coordinationv1 "k8s.io/api/coordination/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/halligan-io/halligan/agent/storage"
)

// What a direct write goes around.
var (
	bypassUpdate = []string{"admission and validation", "quota", "the API server's audit log"}
	bypassDelete = []string{"finalizers", "disruption budgets", "grace periods", "the API server's audit log"}
)

// needsOf says what must be alive for the effect to follow the write.
func needsOf(k *storage.Kind) string {
	switch {
	case k.Custom:
		return "the operator of " + k.Resource() + ", and the API server that it watches"
	case k.Group == "" && k.Kind == "Pod":
		return "the pod's kubelet, which stops it when its watch of the API server shows the deletion"
	case slices.Contains([]string{"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "ReplicationController", "Job", "CronJob"}, k.Kind):
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

// fights names what would work against the change of an object, and whether
// those who have to carry it out seem alive.
func (p *planner) fights(ctx context.Context, o *object, to int64) error {
	if owner := controllerOf(o); owner != "" && p.plan.Action == scaleName {
		p.warn("%s owns it and may put it back: change the owner instead", owner)
	}
	for key, value := range merged(o.Meta.Labels, o.Meta.Annotations) {
		for mark, tool := range gitOps {
			if key == mark || key+"="+value == mark {
				p.warn("%s manages it (%s) and may put it back: suspend that first", tool, key)
			}
		}
	}
	slices.Sort(p.plan.Warnings)
	if p.plan.Action == scaleName {
		for _, m := range o.Meta.ManagedFields {
			if m.Subresource == "scale" || m.FieldsV1 == nil || strings.HasPrefix(m.Manager, "kubectl") {
				continue
			}
			if strings.Contains(m.FieldsV1.GetRawString(), `"f:replicas":{}`) && m.Manager != "kube-controller-manager" && m.Subresource == "" {
				p.warn("field manager %s set its replicas and may set them again", m.Manager)
			}
		}
		if err := p.autoscalers(ctx, o, to); err != nil {
			return err
		}
	}
	if len(o.Meta.Finalizers) > 0 && p.plan.Action == deleteName {
		p.warn("finalizers do not run: %s", strings.Join(o.Meta.Finalizers, ", "))
	}
	if o.Meta.DeletionTimestamp != nil {
		p.warn("it is being deleted since %s", o.Meta.DeletionTimestamp.UTC().Format(time.RFC3339))
	}
	if p.plan.Action == deleteName || to == 0 {
		if err := p.budgets(ctx, o); err != nil {
			return err
		}
	}
	return p.controllersAlive(ctx, o.kind)
}

func merged(a, b map[string]string) map[string]string {
	out := make(map[string]string, len(a)+len(b))
	for _, m := range []map[string]string{a, b} {
		for k, v := range m {
			out[k] = v
		}
	}
	return out
}

func (p *planner) autoscalers(ctx context.Context, o *object, to int64) error {
	if o.namespace == "" {
		return nil
	}
	kind, err := p.engine.resolve(ctx, "horizontalpodautoscalers.autoscaling")
	if err != nil {
		return err
	}
	_, err = p.walk(ctx, kind, o.namespace, func(h *object, problem error) error {
		var hpa autoscalingv2.HorizontalPodAutoscaler
		if problem == nil {
			problem = typed(h, &hpa)
		}
		if problem != nil {
			p.warn("%s could not be read: it may put the replicas back", h.title())
			return nil
		}
		ref := hpa.Spec.ScaleTargetRef
		group, _, _ := strings.Cut(ref.APIVersion, "/")
		if !strings.Contains(ref.APIVersion, "/") {
			group = ""
		}
		if ref.Kind != o.kind.Kind || ref.Name != o.name || group != o.kind.Group {
			return nil
		}
		least := int32(1)
		if hpa.Spec.MinReplicas != nil {
			least = *hpa.Spec.MinReplicas
		}
		most := hpa.Spec.MaxReplicas
		switch {
		case to == 0:
			p.warn("HorizontalPodAutoscaler %s (%d to %d) rests while replicas is 0, and takes over again after", h.name, least, most)
		case to < int64(least) || to > int64(most):
			p.warn("HorizontalPodAutoscaler %s (%d to %d) will put the replicas back within its bounds", h.name, least, most)
		default:
			p.warn("HorizontalPodAutoscaler %s (%d to %d) goes on deciding the replicas", h.name, least, most)
		}
		return nil
	})
	return err
}

// budgets names the disruption budgets that the change goes around.
func (p *planner) budgets(ctx context.Context, o *object) error {
	if o.namespace == "" {
		return nil
	}
	pods := labels.Set(o.Meta.Labels)
	if o.kind.Kind != "Pod" {
		var w struct {
			Spec struct {
				Template struct {
					Metadata metav1.ObjectMeta `json:"metadata"`
				} `json:"template"`
			} `json:"spec"`
		}
		if err := typed(o, &w); err != nil || len(w.Spec.Template.Metadata.Labels) == 0 {
			return nil // not a workload
		}
		pods = w.Spec.Template.Metadata.Labels
	}
	kind, err := p.engine.resolve(ctx, "poddisruptionbudgets.policy")
	if err != nil {
		return err
	}
	_, err = p.walk(ctx, kind, o.namespace, func(b *object, problem error) error {
		var pdb policyv1.PodDisruptionBudget
		if problem != nil || typed(b, &pdb) != nil {
			return nil
		}
		if s, err := metav1.LabelSelectorAsSelector(pdb.Spec.Selector); err == nil && !s.Empty() && s.Matches(pods) {
			p.warn("PodDisruptionBudget %s is bypassed", b.name)
		}
		return nil
	})
	return err
}

// controllersAlive looks at the lease that kube-controller-manager renews every
// 2 s (--leader-elect-retry-period) while it leads.
func (p *planner) controllersAlive(ctx context.Context, kind *storage.Kind) error {
	if kind.Custom || !strings.Contains(needsOf(kind), "kube-controller-manager") {
		return nil
	}
	leases, err := p.engine.resolve(ctx, "leases.coordination.k8s.io")
	if err != nil {
		return err
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
