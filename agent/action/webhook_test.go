package action

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// hooks is a configuration with a webhook for each policy; "" is one that says
// nothing.
func hooks(name string, policies ...admissionv1.FailurePolicyType) *admissionv1.ValidatingWebhookConfiguration {
	c := &admissionv1.ValidatingWebhookConfiguration{ObjectMeta: labelled("", name)}
	for i, policy := range policies {
		w := admissionv1.ValidatingWebhook{Name: fmt.Sprintf("w%d.example.com", i), ClientConfig: admissionv1.WebhookClientConfig{CABundle: []byte("kept")}, TimeoutSeconds: ptr(int32(7 + i))}
		if policy != "" {
			w.FailurePolicy = &policy
		}
		c.Webhooks = append(c.Webhooks, w)
	}
	return c
}

func mutatingHooks(name string, policy admissionv1.FailurePolicyType) *admissionv1.MutatingWebhookConfiguration {
	return &admissionv1.MutatingWebhookConfiguration{ObjectMeta: labelled("", name), Webhooks: []admissionv1.MutatingWebhook{{Name: "m.example.com", FailurePolicy: &policy}}}
}

func TestWebhookOpen(t *testing.T) {
	l := newLab(t, 1)
	key := l.put(hooks("guard", admissionv1.Fail, admissionv1.Ignore, "", admissionv1.Fail))
	other := l.put(mutatingHooks("guard", admissionv1.Fail))
	l.put(hooks("calm", admissionv1.Ignore))
	before := l.value(key)
	policies := func() (all []string) {
		for _, w := range typedAt[admissionv1.ValidatingWebhookConfiguration](l, key).Webhooks {
			if w.FailurePolicy == nil {
				all = append(all, "")
			} else {
				all = append(all, string(*w.FailurePolicy))
			}
			if string(w.ClientConfig.CABundle) != "kept" {
				t.Errorf("%s lost its CA", w.Name)
			}
		}
		return all
	}

	r := l.do(resultApplied, "webhook", map[string]any{"operation": "open", "target": "validating/guard"})
	if got := policies(); slices.ContainsFunc(got, func(p string) bool { return p != "Ignore" }) || len(got) != 4 {
		t.Fatalf("policies %q", got)
	}
	var paths []string
	for _, c := range r.Plan.Objects[0].Changes {
		paths = append(paths, c.Path+" "+c.Before)
	}
	if want := `webhooks[w0.example.com].failurePolicy "Fail",webhooks[w2.example.com].failurePolicy ,webhooks[w3.example.com].failurePolicy "Fail",metadata.generation 1`; strings.Join(paths, ",") != want {
		t.Errorf("diff %q, want %q", paths, want)
	}
	if text := strings.Join(r.Plan.Warnings, "\n"); !strings.Contains(text, "up to 10 s") || !strings.Contains(text, "let through unseen") {
		t.Errorf("warnings:\n%s", text)
	}
	if string(*typedAt[admissionv1.MutatingWebhookConfiguration](l, other).Webhooks[0].FailurePolicy) != "Fail" {
		t.Error("the other kind was opened, too")
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if after := l.value(key); sansGeneration(t, before) != sansGeneration(t, after) {
		t.Errorf("undo left\n%q, was\n%q", after, before)
	}

	// A plain name is both.
	if r = l.do(resultApplied, "webhook", map[string]any{"operation": "open", "target": "guard"}); len(r.Objects) != 2 || !strings.Contains(r.Plan.Summary, "4 webhooks of guard") {
		t.Errorf("both: %v", r.Plan)
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if p := l.do(resultApplied, "webhook", map[string]any{"operation": "open", "target": "calm"}).Plan; len(p.Objects) != 0 || !strings.Contains(p.Summary, "nothing to do") {
		t.Errorf("opened what was open: %v", p)
	}

	twice := hooks("twice", admissionv1.Fail, admissionv1.Fail)
	twice.Webhooks[1].Name = twice.Webhooks[0].Name
	l.put(twice)
	l.refuses(fault.Undecodable, "twice", "webhook", map[string]any{"operation": "open", "target": "twice"})
	l.put(hooks("many", slices.Repeat([]admissionv1.FailurePolicyType{admissionv1.Fail}, maxWebhooks+1)...))
	l.refuses(fault.Refused, "webhook", "webhook", map[string]any{"operation": "open", "target": "many"})
	l.putRaw("/registry/validatingwebhookconfigurations/broken", []byte("k8s\x00\xff\xff"))
	l.refuses(fault.Undecodable, "", "webhook", map[string]any{"operation": "open", "target": "broken"})
	for _, c := range []struct {
		code                    fault.Code
		text, operation, target string
	}{
		{fault.Usage, "not what can be done", "close", "guard"},
		{fault.Usage, "not what can be done", "", "guard"},
		{fault.Usage, "", "open", ""},
		{fault.Usage, "", "open", "validating/"},
		{fault.Usage, "", "open", "deploy/guard"},
		{fault.Usage, "", "open", "validating/guard/w0"},
		{fault.Usage, "", "open", "../guard"},
		{fault.NotFound, "no webhook configuration", "open", "gaurd"},
		{fault.NotFound, "no webhook configuration", "delete", "mutating/calm"},
	} {
		l.refuses(c.code, c.text, "webhook", map[string]any{"operation": c.operation, "target": c.target})
	}
	if _, err := l.planAs(by("olga", trust.Observer), "webhook", map[string]any{"operation": "open", "target": "guard"}); !fault.Is(err, fault.Refused) {
		t.Errorf("an observer opens: %v", err)
	}
}

func TestWebhookDelete(t *testing.T) {
	l := newLab(t, 1)
	key := l.put(hooks("guard", admissionv1.Fail))
	other := l.put(mutatingHooks("guard", admissionv1.Fail))
	before := l.value(key)
	r := l.do(resultApplied, "webhook", map[string]any{"operation": "delete", "target": "guard"})
	if len(r.Objects) != 2 || l.value(key) != nil || l.value(other) != nil {
		t.Fatalf("deleted %v", r.Objects)
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if string(l.value(key)) != string(before) || l.value(other) == nil {
		t.Error("undo did not put them back")
	}
	// One that nobody can read, and that so stops every request.
	l.putRaw("/registry/mutatingwebhookconfigurations/broken", []byte("k8s\x00\xff\xff"))
	if r = l.do(resultApplied, "webhook", map[string]any{"operation": "delete", "target": "broken"}); !strings.Contains(strings.Join(r.Plan.Warnings, ""), "CANNOT BE UNDONE") {
		t.Errorf("warnings %q", r.Plan.Warnings)
	}
	// What holds for delete holds here.
	l.tighten(`{version: 1, protect: [{actions: [delete], resources: [validatingwebhookconfigurations.*], names: [guard], why: security needs it}]}`)
	l.refuses(fault.Refused, "security needs it", "webhook", map[string]any{"operation": "delete", "target": "guard"})
	if _, err := l.plan("webhook", map[string]any{"operation": "open", "target": "guard"}); err != nil {
		t.Errorf("opening is refused, too: %v", err)
	}
	l.under(7, trust.Rules{Actions: map[string]trust.ActionRule{"delete": {Role: "commander"}}})
	l.refuses(fault.Refused, "needs the role commander", "webhook", map[string]any{"operation": "delete", "target": "guard"})
}
