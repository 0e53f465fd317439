package trust

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/halligan-io/halligan/internal/fault"
)

func TestShippedPolicy(t *testing.T) {
	p := Default()
	for _, c := range []struct {
		action, resource, ns, name string
		refused                    bool
	}{
		{"delete", "namespaces", "", "telemetry", true},
		{"scale", "deployments.apps", "kube-system", "coredns", true},
		{"delete", "daemonsets.apps", "kube-system", "kube-proxy", true},
		{"scale", "daemonsets.apps", "calico-system", "calico-node", true},
		{"scale", "deployments.apps", "kube-system", "metrics-agent", false},
		{"delete", "pods", "kube-system", "metrics-agent-x", false},
		{"delete", "pods", "kube-system", "etcd-cp-1", true},
		{"delete", "leases.coordination.k8s.io", "kube-node-lease", "n1", true},
		{"delete", "configmaps", "kube-system", "extension-apiserver-authentication", true},
		{"delete", "clusterrolebindings.rbac.authorization.k8s.io", "", "cluster-admin", true},
		{"delete", "clusterrolebindings.rbac.authorization.k8s.io", "", "collector", false},
		{"delete", "services", "default", "kubernetes", true},
		{"delete", "services", "default", "web", false},
		{"delete", "persistentvolumeclaims", "db", "data-0", true},
		{"undo", "secrets", "apps", "s", true},
		{"anything", "deployments.apps", "kube-system", "coredns", true},
		{"revoke", "serviceaccounts", "kube-system", "cilium", true},
		{"revoke", "rolebindings.rbac.authorization.k8s.io", "kube-system", "cilium-config-agent", false},
		{"revoke", "clusterrolebindings.rbac.authorization.k8s.io", "", "system:controller:job-controller", true},
		{"scale", "daemonsets.apps", "kube-system", "kube-multus-ds", true},
		{"delete", "ippools.crd.projectcalico.org", "", "default", true},
		{"delete", "priorityclasses.scheduling.k8s.io", "", "system-node-critical", true},
		{"undo", "configmaps", "apps", "s", false},
		{"scale", "daemonsets.apps", "telemetry", "collector", false},
		{"delete", "configmaps", "telemetry", "coredns", false},
	} {
		err := p.Decide(commander, Request{Action: c.action, Rung: Responder, Mutates: true, Resource: c.resource, Namespace: c.ns, Name: c.name})
		if refused := fault.Is(err, fault.Refused); refused != c.refused || (err != nil) != c.refused {
			t.Errorf("%v: got %v", c, err)
		}
	}
	for subject, refused := range map[string]bool{
		"system:masters": true, "system:nodes": true, "system:node:worker-7": true, "system:kube-scheduler": true,
		"system:serviceaccount:kube-system:coredns":               true,
		"system:serviceaccount:kube-system:deployment-controller": true,
		"system:serviceaccount:kube-system:telemetry":             false,
		"system:serviceaccount:telemetry:collector":               false,
		"alice": false, "developers": false,
	} {
		if err := p.Decide(commander, Request{Action: "revoke", Rung: Responder, Mutates: true, Subject: subject}); fault.Is(err, fault.Refused) != refused {
			t.Errorf("%s: got %v", subject, err)
		}
	}
}

func TestLocalFileOnlyTightens(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"tighter", "version: 1\nprotect:\n- {namespaces: [payments], why: money}\nkeepSubjects:\n- {subjects: [alice], why: on call}\ncaps: {objectsPerAction: 10}\n", ""},
		{"looser cap", "version: 1\ncaps: {objectsPerAction: 10001}\n", "outside 1 to 10000"},
		{"negative cap", "version: 1\ncaps: {objectsPerHour: -1}\n", "outside 1 to 50000"},
		{"unknown key", "version: 1\nallow: []\n", "unknown field"},
		{"no version", "protect: []\n", "version 0"},
		{"no reason", "version: 1\nprotect:\n- {namespaces: [a]}\n", "no why"},
		{"bad pattern", "version: 1\nprotect:\n- {names: ['[a'], why: x}\n", "malformed"},
		{"not yaml", "version: [", "yaml"},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "policy.yaml")
			if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			local, err := ReadLocal(file)
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) || fault.CodeOf(err) != fault.Usage {
					t.Fatalf("got %v, want %q", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			p := Default().Tighten(local)
			if p.Protected("scale", "deployments.apps", "payments", "x") == nil || subject(p, "alice") == nil {
				t.Error("the file's rules do not hold")
			}
			if p.Protected("delete", "namespaces", "", "x") == nil || subject(p, "system:masters") == nil {
				t.Error("the shipped rules were lost")
			}
			if got := p.Caps(); got.ObjectsPerAction != 10 || got.ObjectsPerHour != defaultCaps.ObjectsPerHour {
				t.Errorf("caps %+v", got)
			}
		})
	}
	if _, err := ReadLocal("/nonexistent/policy.yaml"); fault.CodeOf(err) != fault.Usage {
		t.Errorf("missing file: %v", err)
	}
	if l, err := ReadLocal(""); l != nil || err != nil || Default().Tighten(l).Caps() != defaultCaps {
		t.Errorf("no file: %v, %v", l, err)
	}
	// A local file must never change the table that later policies start from,
	// nor raise a cap.
	if subject(Default(), "alice") != nil {
		t.Error("a local file leaked into the shipped table")
	}
	if got := Default().Tighten(&LocalRules{Caps: Caps{ObjectsPerAction: 1_000_000, ObjectsPerHour: 1_000_000}}).Caps(); got != defaultCaps {
		t.Errorf("a local file raised the caps to %+v", got)
	}
}

var commander = Identity{Person: "carol", Role: Commander, Door: SSH, Kind: Person}

func subject(p *Policy, name string) error {
	return p.Decide(commander, Request{Action: "revoke", Rung: Responder, Mutates: true, Subject: name})
}

// TestSlashes: a subject with slashes in its name is protected like any other.
func TestSlashes(t *testing.T) {
	p, err := NewPolicy(Rules{KeepSubjects: []SubjectRule{{Subjects: []string{"oidc:*", "https://idp/on-call-?"}, Why: "on call"}}})
	if err != nil {
		t.Fatal(err)
	}
	for name, kept := range map[string]bool{"oidc:alice": true, "oidc:/admins": true, "oidc:a/b/c": true, "https://idp/on-call-1": true, "https://idp/on-call-12": false, "ldap:/admins": false} {
		if err := subject(p, name); fault.Is(err, fault.Refused) != kept {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestUnknown: a rule with a slip of the keyboard protects nothing.
func TestUnknown(t *testing.T) {
	actions := []string{"get", "scale", "delete", "revoke", "undo", "history"}
	for _, c := range []struct {
		name  string
		rules Rules
		want  string
	}{
		{"the shipped table", ShippedRules(), ""},
		{"nothing", Rules{}, ""},
		{"all forms", Rules{Actions: map[string]ActionRule{"scale": {}, "stop": {}, "status": {}},
			Protect:   []Rule{{Actions: []string{"del*", "scale"}, Resources: []string{"*", "pods", "jobs.batch", "*.apps", "widgets.example.com", "deploy*"}, Except: []string{"secrets"}}},
			Approvals: []ApprovalRule{{Actions: []string{"?ndo"}, Resources: []string{"poddisruptionbudgets.policy"}}}}, ""},
		{"an action", Rules{Actions: map[string]ActionRule{"scael": {}}}, `actions: there is no action "scael"`},
		{"an action in capitals", Rules{Approvals: []ApprovalRule{{}, {Actions: []string{"Delete"}}}}, `approvals[1]: there is no action "Delete"`},
		{"a pattern of actions", Rules{Protect: []Rule{{Actions: []string{"scale-*"}}}}, `protect[0]: there is no action "scale-*"`},
		{"no group", Rules{Approvals: []ApprovalRule{{Resources: []string{"deployments"}}}}, `approvals[0]: the core group has no resource "deployments"`},
		{"a kind", Rules{Protect: []Rule{{Resources: []string{"Deployment.apps"}}}}, `no resource is called "Deployment.apps"`},
		{"a group that cannot be", Rules{Protect: []Rule{{Except: []string{"deployments.app"}}}}, `no resource is called "deployments.app"`},
		{"a core group by name", Rules{Protect: []Rule{{Resources: []string{"pods.core"}}}}, `no resource is called "pods.core"`},
		{"a pattern in capitals", Rules{Protect: []Rule{{Resources: []string{"Pod*"}}}}, `the core group has no resource "Pod*"`},
	} {
		got := c.rules.Unknown(actions)
		if c.want == "" && len(got) > 0 || c.want != "" && (len(got) != 1 || !strings.Contains(got[0], c.want)) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	var none *LocalRules
	if none.Unknown(actions) != nil || len((&LocalRules{Protect: []Rule{{Actions: []string{"scael"}}}}).Unknown(actions)) != 1 {
		t.Error("a local file")
	}
}
