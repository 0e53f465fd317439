package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// stormKind is one kind of storm.
type stormKind struct {
	name, summary string
	// rules are what the offender's ServiceAccount may do.
	rules []rbacv1.PolicyRule
	// call is one round of one client; nil: the pods do no harm.
	call func(context.Context, *caller) error
	// prepare, if any, puts in place what only this kind needs.
	prepare func(context.Context, *Storm) error
	// writes: the victim's question is a write, because that is what suffers.
	writes bool
}

var reading = []rbacv1.PolicyRule{{Verbs: []string{"get", "list", "watch"}, APIGroups: []string{"", "apps", "batch"}, Resources: []string{"*"}}}

var stormKinds = []stormKind{
	{name: "list", summary: "every pod LISTs whole resources of the cluster, again and again", rules: reading, call: listAll},
	{name: "etcd-reads", summary: "as list, but every LIST is read from etcd itself, as API servers up to 1.30 did without resourceVersion",
		rules: reading, call: listEtcd},
	{name: "writes", summary: "every pod patches its own status, again and again",
		rules: []rbacv1.PolicyRule{{Verbs: []string{"get", "patch"}, APIGroups: []string{""}, Resources: []string{"pods", "pods/status"}}},
		call:  patchStatus, writes: true},
	{name: "objects", summary: "every pod creates ConfigMaps, Events and custom resources and deletes none",
		rules: []rbacv1.PolicyRule{{Verbs: []string{"create"}, APIGroups: []string{"", reportGroup}, Resources: []string{"configmaps", "events", "reports"}}},
		call:  createObjects, prepare: prepareReports, writes: true},
	{name: "webhook", summary: "an admission webhook that must answer has no backend, and no write passes", prepare: prepareWebhook, writes: true},
	{name: "herd", summary: "every client holds watches, and all drop them and LIST anew at the same moment", rules: reading, call: herd},
}

// stormKindsHelp describes the kinds for the help, one a line.
func stormKindsHelp() string {
	var b strings.Builder
	for _, k := range stormKinds {
		fmt.Fprintf(&b, "  %-11s %s\n", k.name, k.summary)
	}
	return b.String()
}

// listed are the resources that the telemetry service wants to know all about.
var listed = []string{"/api/v1/configmaps", "/api/v1/pods", "/api/v1/configmaps", "/apis/apps/v1/daemonsets"}

// listAll lists a whole resource from the API server's watch cache, without a
// limit, as informers do.
func listAll(ctx context.Context, c *caller) error {
	return c.get(ctx, listed[(c.round+c.number)%len(listed)], map[string]string{"resourceVersion": "0"})
}

// listEtcd asks the API server for little, and if it is allowed that, reads from
// etcd what an API server up to 1.30 would have read for a LIST without
// resourceVersion (apiserver/pkg/storage/cacher/cacher.go of that release).
func listEtcd(ctx context.Context, c *caller) error {
	if err := c.get(ctx, "/api/v1/configmaps", map[string]string{"limit": "1"}); err != nil {
		return err
	}
	return c.storm.readEtcd(ctx, "/registry/configmaps/")
}

func patchStatus(ctx context.Context, c *caller) error {
	patch := fmt.Appendf(nil, `{"status":{"conditions":[{"type":"telemetry.example.com/client-%d","status":"True","message":"report %d"}]}}`, c.number, c.round)
	return c.do(ctx, c.api.Patch(types.StrategicMergePatchType).
		AbsPath("/api/v1/namespaces", offenderNamespace, "pods", c.pod.name, "status").Body(patch))
}

const reportGroup = "telemetry.example.com"

// createObjects creates one object, of three kinds in turn.
func createObjects(ctx context.Context, c *caller) error {
	meta := metav1.ObjectMeta{Namespace: offenderNamespace, Labels: labelled(runawayApp),
		Name: fmt.Sprintf("%s-%s-%d-%d", runawayApp, c.pod.name, c.number, time.Now().UnixNano())}
	payload := strings.Repeat("x", c.storm.opts.ObjectBytes)
	path, obj := "/api/v1/namespaces/"+offenderNamespace+"/configmaps", any(&corev1.ConfigMap{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"}, ObjectMeta: meta, Data: map[string]string{"checkpoint": payload}})
	switch (c.round + c.number) % 3 {
	case 1:
		path, obj = "/api/v1/namespaces/"+offenderNamespace+"/events", &corev1.Event{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Event"}, ObjectMeta: meta, Reason: "Collected", Type: corev1.EventTypeNormal,
			Message:        payload[:min(len(payload), 1024)], // the longest that validation allows
			InvolvedObject: corev1.ObjectReference{Kind: "Pod", Namespace: offenderNamespace, Name: c.pod.name}}
	case 2:
		path, obj = "/apis/"+reportGroup+"/v1/namespaces/"+offenderNamespace+"/reports", map[string]any{
			"apiVersion": reportGroup + "/v1", "kind": "Report", "metadata": meta, "spec": map[string]string{"node": c.pod.node, "data": payload}}
	}
	body, err := json.Marshal(obj)
	if err != nil {
		return err
	}
	err = c.do(ctx, c.api.Post().AbsPath(path).SetHeader("Content-Type", "application/json").Body(body))
	if err != nil && strings.Contains(err.Error(), "database space exceeded") {
		c.storm.load.full.Add(1)
	}
	return err
}

func prepareReports(ctx context.Context, s *Storm) error {
	crd := &apiextensionsv1.CustomResourceDefinition{
		TypeMeta:   metav1.TypeMeta{APIVersion: "apiextensions.k8s.io/v1", Kind: "CustomResourceDefinition"},
		ObjectMeta: metav1.ObjectMeta{Name: "reports." + reportGroup},
		Spec: apiextensionsv1.CustomResourceDefinitionSpec{Group: reportGroup, Scope: apiextensionsv1.NamespaceScoped,
			Names: apiextensionsv1.CustomResourceDefinitionNames{Plural: "reports", Singular: "report", Kind: "Report", ListKind: "ReportList"},
			Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{Name: "v1", Served: true, Storage: true,
				Schema: &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &apiextensionsv1.JSONSchemaProps{Type: "object", XPreserveUnknownFields: new(true)}}}}},
	}
	if err := s.apply(ctx, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd); err != nil {
		return err
	}
	for began := time.Now(); ; pause(ctx, 100*time.Millisecond) {
		err := s.api.Get().AbsPath("/apis", reportGroup, "v1", "reports").Param("limit", "1").Do(ctx).Error()
		if err == nil || time.Since(began) > attemptTimeout || ctx.Err() != nil {
			return err
		}
	}
}

// webhookName is the configuration that the webhook storm leaves.
const webhookName = "telemetry-guard"

// prepareWebhook has every write of workloads and their configuration ask a
// service that does not exist. Leases stay out of it, as most such
// configurations leave them: the control plane goes on electing leaders.
func prepareWebhook(ctx context.Context, s *Storm) error {
	fail, none := admissionv1.Fail, admissionv1.SideEffectClassNone
	config := &admissionv1.ValidatingWebhookConfiguration{
		TypeMeta:   metav1.TypeMeta{APIVersion: "admissionregistration.k8s.io/v1", Kind: "ValidatingWebhookConfiguration"},
		ObjectMeta: metav1.ObjectMeta{Name: webhookName},
		Webhooks: []admissionv1.ValidatingWebhook{{Name: "guard.telemetry.example.com", FailurePolicy: &fail, SideEffects: &none,
			AdmissionReviewVersions: []string{"v1"}, TimeoutSeconds: new(int32(5)),
			ClientConfig: admissionv1.WebhookClientConfig{Service: &admissionv1.ServiceReference{Namespace: offenderNamespace, Name: "guard", Path: new("/validate")}},
			Rules: []admissionv1.RuleWithOperations{{
				Operations: []admissionv1.OperationType{admissionv1.Create, admissionv1.Update, admissionv1.Delete},
				Rule:       admissionv1.Rule{APIGroups: []string{"", "apps", "batch"}, APIVersions: []string{"*"}, Resources: []string{"pods", "configmaps", "secrets", "services", "deployments", "daemonsets", "jobs"}},
			}}}},
	}
	return s.apply(ctx, "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations", config)
}

// herdEach is how long a herd grazes on its watches between two stampedes.
const herdEach = 10 * time.Second

// herd lists a resource and watches it until the next stampede, whose moment
// all clients take from the clock.
func herd(ctx context.Context, c *caller) error {
	path := listed[c.number%len(listed)]
	if err := c.get(ctx, path, map[string]string{"resourceVersion": "0"}); err != nil {
		return err
	}
	until := time.Now().Truncate(herdEach).Add(herdEach)
	watch, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	// resourceVersion 0 starts a watch with all that is there, without asking
	// etcd.
	err := c.get(watch, path, map[string]string{"watch": "true", "resourceVersion": "0", "allowWatchBookmarks": "true"})
	if refused(err) || apierrors.IsInternalError(err) {
		return err
	}
	pause(ctx, time.Until(until))
	return nil
}
