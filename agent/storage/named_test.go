package storage

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/halligan-io/halligan/internal/fault"
)

var webhookKind = &Kind{Group: "admissionregistration.k8s.io", Version: "v1", Kind: "ValidatingWebhookConfiguration", Generation: true,
	Fields: map[FieldName]Field{FailurePolicy: {Type: Named, JSON: []string{"webhooks", "failurePolicy"}, Wire: numbers(2, 4)}}}

func guards(t *testing.T, names ...string) []byte {
	fail := admissionv1.Fail
	c := &admissionv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "guard", Generation: 4}}
	for _, n := range names {
		c.Webhooks = append(c.Webhooks, admissionv1.ValidatingWebhook{Name: n, FailurePolicy: &fail, ClientConfig: admissionv1.WebhookClientConfig{CABundle: []byte(n)}})
	}
	return encode(t, c)
}

func policyOf(t *testing.T, plain []byte, name string) string {
	t.Helper()
	o := mustDecode(t, plain)
	v, present, err := o.Entry(webhookKind.Fields[FailurePolicy], name)
	if err != nil {
		t.Fatal(err)
	}
	if !present {
		return "-"
	}
	return v
}

func TestNamedElements(t *testing.T) {
	open := func(name string) Edit { return Edit{Field: FailurePolicy, Entry: name, Value: "Ignore"} }
	plain := guards(t, "a", "b", "c")
	asJSON := []byte(`{"apiVersion":"admissionregistration.k8s.io/v1","kind":"ValidatingWebhookConfiguration","metadata":{"name":"guard","generation":4},
 "webhooks":[{"name":"a","failurePolicy":"Fail","z":1.50},{"failurePolicy" : "Fail","name":"b"},{"name":"c","failurePolicy":"Fail"}]}`)
	for form, plain := range map[string][]byte{"protobuf": plain, "JSON": asJSON} {
		t.Run(form, func(t *testing.T) {
			out, changes, err := webhookKind.Apply(plain, open("c"), open("b"))
			if err != nil || len(changes) != 3 || changes[0].Path != "webhooks[c].failurePolicy" || changes[2].Path != "metadata.generation" {
				t.Fatalf("%+v, %v", changes, err)
			}
			if got := policyOf(t, out, "a") + policyOf(t, out, "b") + policyOf(t, out, "c"); got != "FailIgnoreIgnore" {
				t.Fatalf("policies %s of %q", got, out)
			}
			if held, err := webhookKind.Holds(out, changes); !held || err != nil {
				t.Errorf("does not hold: %v", err)
			}
			if held, _ := webhookKind.Holds(plain, changes); held {
				t.Error("holds before")
			}
			back, _, err := webhookKind.Revert(out, changes)
			if err != nil || !bytes.Equal(setGeneration(t, back, 4), plain) {
				t.Errorf("reverted %q, %v", back, err)
			}
			// Absent: it is put where it belongs, and taken away again.
			none, _, err := webhookKind.Apply(plain, Edit{Field: FailurePolicy, Entry: "b"})
			if err != nil || policyOf(t, none, "b") != "-" || policyOf(t, none, "c") != "Fail" {
				t.Fatalf("%q, %v", none, err)
			}
			some, changes, err := webhookKind.Apply(none, open("b"))
			if err != nil || policyOf(t, some, "b") != "Ignore" {
				t.Fatalf("%q, %v", some, err)
			}
			if back, _, err := webhookKind.Revert(some, changes); err != nil || policyOf(t, back, "b") != "-" {
				t.Errorf("reverted %q, %v", back, err)
			}
			for _, bad := range []Edit{open("d"), open(""), {Field: FailurePolicy, Value: "Ignore"}, {Field: FailurePolicy, Entry: "a", Value: true}, {Field: FailurePolicy, Entry: "a", Value: "\xff"}, {Field: FailurePolicy, Entry: "a", Index: 1, Value: "Ignore"}} {
				if _, _, err := webhookKind.Apply(plain, bad); !fault.Is(err, fault.Usage) {
					t.Errorf("%+v: %v", bad, err)
				}
			}
			if _, _, err := webhookKind.Apply(plain, open("a"), open("a")); !fault.Is(err, fault.Usage) {
				t.Errorf("twice: %v", err)
			}
		})
	}

	// It is the name that counts, not the place: another order is no change, and one
	// that is gone is.
	out, changes, err := webhookKind.Apply(plain, open("b"))
	if err != nil {
		t.Fatal(err)
	}
	moved, _, err := webhookKind.Apply(guards(t, "c", "b"), open("b"))
	if err != nil {
		t.Fatal(err)
	}
	if back, _, err := webhookKind.Revert(moved, changes); err != nil || policyOf(t, back, "b")+policyOf(t, back, "c") != "FailFail" {
		t.Errorf("moved: %q, %v", back, err)
	}
	_, _, err = webhookKind.Revert(guards(t, "a", "c"), changes)
	wantFault(t, err, fault.Stale)
	closed, _, err := webhookKind.Apply(out, Edit{Field: FailurePolicy, Entry: "b", Value: "Fail"})
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = webhookKind.Revert(closed, changes)
	wantFault(t, err, fault.Stale)

	for what, damaged := range map[string][]byte{
		"a name twice":           guards(t, "a", "b", "a"),
		"a name twice in JSON":   bytes.Replace(asJSON, []byte(`"name":"c"`), []byte(`"name":"a"`), 1),
		"a number for a name":    bytes.Replace(asJSON, []byte(`"name":"c"`), []byte(`"name":3`), 1),
		"no list":                []byte(`{"apiVersion":"admissionregistration.k8s.io/v1","kind":"ValidatingWebhookConfiguration","metadata":{"name":"guard"},"webhooks":{"name":"a"}}`),
		"a number for a policy":  bytes.Replace(asJSON, []byte(`"failurePolicy":"Fail","z"`), []byte(`"failurePolicy":3,"z"`), 1),
		"a number in the list":   envelope("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration", varint(2, 7)),
		"a number for a name, p": envelope("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration", message(2, varint(1, 7))),
		"cut off":                envelope("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration", protowire.AppendBytes(protowire.AppendTag(nil, 2, bytesType), []byte{0x0a, 0x7f})),
		"a policy of two forms":  envelope("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration", message(2, text(1, "a"), varint(4, 1))),
	} {
		if out, _, err := webhookKind.Apply(damaged, open("a")); !fault.Is(err, fault.Undecodable) {
			t.Errorf("%s: %q, %v", what, out, err)
		}
	}
}
