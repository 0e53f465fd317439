package storage

import (
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/halligan-io/halligan/internal/fault"
)

// customised returns a catalogue with custom kinds that share names with each
// other and with native ones.
func customised(t testing.TB) *Catalogue {
	t.Helper()
	c := NewCatalogue()
	for _, crd := range [][]byte{
		[]byte(widgets),
		definition("serving.knative.dev", "services", "Service", "Namespaced", "kservice", "ksvc"),
		definition("a.example.com", "backups", "Backup", "Namespaced", "bk"),
		definition("b.example.com", "backups", "Backup", "Namespaced", "bk"),
		definition("c.example.com", "pods", "PodLike", "Namespaced", "po"),
		definition("d.example.com", "cm", "Cm", "Namespaced"), // its plural is a native short name
		definition("v1.example.com", "things", "Thing", "Cluster"),
		definition("UPPER.example.com", "x", "X", "Cluster"),
	} {
		if err := c.AddCRD(crd); err != nil && !strings.Contains(string(crd), "UPPER") {
			t.Fatal(err)
		}
	}
	return c
}

func TestResolve(t *testing.T) {
	c := customised(t)
	for arg, want := range map[string]string{
		"deployments": "deployments.apps", "deployment": "deployments.apps", "deploy": "deployments.apps", "Deployment": "deployments.apps",
		"DEPLOY": "deployments.apps", "deployment.apps": "deployments.apps", "deployments.apps": "deployments.apps",
		"deployments.v1.apps": "deployments.apps", "Deployment.v1.apps": "deployments.apps", "deploy.apps": "deployments.apps",
		"deployments.app": "deployments.apps", // kubectl takes the beginning of a group
		"ds":              "daemonsets.apps", "sts": "statefulsets.apps", "rs": "replicasets.apps", "rc": "replicationcontrollers",
		"po": "pods", "pod": "pods", "pods": "pods", "pods.": "pods", "pods.v1.": "pods",
		"no": "nodes", "svc": "services", "service": "services", "ep": "endpoints", "endpoint": "",
		"hpa": "horizontalpodautoscalers.autoscaling", "HorizontalPodAutoscaler.v1.autoscaling": "horizontalpodautoscalers.autoscaling",
		"crd": "customresourcedefinitions.apiextensions.k8s.io", "crds": "customresourcedefinitions.apiextensions.k8s.io",
		"ing": "ingresses.networking.k8s.io", "ingress.networking": "ingresses.networking.k8s.io",
		"ev": "events", "events": "events", "events.events.k8s.io": "events.events.k8s.io", "event.v1.events.k8s.io": "events.events.k8s.io",
		"quota": "resourcequotas", "limits": "limitranges", "netpol": "networkpolicies.networking.k8s.io", "csr": "certificatesigningrequests.certificates.k8s.io",
		"rolebinding": "rolebindings.rbac.authorization.k8s.io", "clusterrolebinding.rbac.authorization.k8s.io": "clusterrolebindings.rbac.authorization.k8s.io",
		"eviction": "evictions.lifecycle.k8s.io", "pc": "priorityclasses.scheduling.k8s.io", "vac": "volumeattributesclasses.storage.k8s.io",
		"services.serving.knative.dev": "services.serving.knative.dev", "ksvc": "services.serving.knative.dev", "service.serving": "services.serving.knative.dev",
		"wd": "widgets.example.org", "Widget": "widgets.example.org", "widgets.v1alpha1.example.org": "widgets.example.org", "widgets.v9.example.org": "",
		"backups.a.example.com": "backups.a.example.com", "bk.b.example.com": "backups.b.example.com", "backups.a": "backups.a.example.com",
		"podlike": "pods.c.example.com", "pods.c.example.com": "pods.c.example.com",
		"cm": "configmaps", "cm.d.example.com": "cm.d.example.com", "cm.d": "cm.d.example.com", "configmap": "configmaps",
		"things.v1.example.com": "things.v1.example.com",
		// and what is nothing
		"": "", "deploymnts": "", "pods/web": "", "pods,svc": "", "all": "", "cs": "", "componentstatuses": "", "masterleases": "",
		"deployments.extensions": "", "deployments.v1.": "", "pods.vX.": "", ".": "", "..": "", ".apps": "", "pod\x00": "", "pod\u202e": "", "\xff": "", strings.Repeat("p", 2000): "",
	} {
		k, err := c.Resolve(arg)
		switch {
		case want == "" && (err == nil || !fault.Is(err, fault.Usage)):
			t.Errorf("Resolve(%q) = %v, %v, want a usage error", arg, k, err)
		case want == "":
			if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r > '~' }) || len(err.Error()) > 400 {
				t.Errorf("Resolve(%q): the error is not one plain line: %q", arg, err)
			}
		case err != nil || k.Resource() != want:
			t.Errorf("Resolve(%q) = %v, %v, want %s", arg, k, err, want)
		}
	}
}

// kubectl's own shortcut table is not at hand offline, so the short names of a
// running cluster are given here again, by hand from kubectl api-resources.
func TestShortNames(t *testing.T) {
	c := NewCatalogue()
	for short, want := range map[string]string{
		"cm": "configmaps", "ep": "endpoints", "ev": "events", "limits": "limitranges", "ns": "namespaces", "no": "nodes",
		"pvc": "persistentvolumeclaims", "pv": "persistentvolumes", "po": "pods", "rc": "replicationcontrollers",
		"quota": "resourcequotas", "sa": "serviceaccounts", "svc": "services",
		"crd": "customresourcedefinitions.apiextensions.k8s.io", "ds": "daemonsets.apps", "deploy": "deployments.apps",
		"rs": "replicasets.apps", "sts": "statefulsets.apps", "hpa": "horizontalpodautoscalers.autoscaling",
		"cj": "cronjobs.batch", "csr": "certificatesigningrequests.certificates.k8s.io", "ing": "ingresses.networking.k8s.io",
		"netpol": "networkpolicies.networking.k8s.io", "pdb": "poddisruptionbudgets.policy", "pc": "priorityclasses.scheduling.k8s.io",
		"sc": "storageclasses.storage.k8s.io", "ip": "ipaddresses.networking.k8s.io", "vac": "volumeattributesclasses.storage.k8s.io",
	} {
		if k, err := c.Resolve(short); err != nil || k.Resource() != want {
			t.Errorf("%s: %v, %v, want %s", short, k, err, want)
		}
	}
}

// TestNativeWordsStayNative makes custom kinds of every word for a native one,
// in every form, and demands that none of these words means anything else.
func TestNativeWordsStayNative(t *testing.T) {
	fresh, full := NewCatalogue(), NewCatalogue()
	var words []string
	for _, k := range fresh.native {
		words = append(words, append(slices.Clone(k.ShortNames), k.Plural, k.Singular, k.Kind)...)
	}
	for i, word := range words {
		word = strings.ToLower(word)
		for j, crd := range [][]byte{
			definition("plural.example.com", word, "Decoy"+strconv.Itoa(i), "Namespaced"),
			definition("short.example.com", "decoys"+strconv.Itoa(i), "Short"+strconv.Itoa(i), "Namespaced", word),
			definition("kind.example.com", "kinds"+strconv.Itoa(i), word, "Namespaced"),
		} {
			if err := full.AddCRD(crd); err != nil {
				t.Fatalf("%s, %d: %v", word, j, err)
			}
		}
	}
	for _, word := range words {
		want, err := fresh.Resolve(word)
		if err != nil {
			t.Fatal(err)
		}
		for _, form := range []string{word, strings.ToUpper(word)} {
			if got, err := full.Resolve(form); err != nil || got.Resource() != want.Resource() {
				t.Errorf("%s is %v, %v beside custom kinds, and %s without", form, got, err, want.Resource())
			}
		}
		word = strings.ToLower(word)
		if got, err := full.Resolve(word + ".plural.example.com"); err != nil || !got.Custom {
			t.Errorf("%s with its group is %v, %v", word, got, err)
		}
		if want.Group != "" {
			if got, err := full.Resolve(word + "." + want.Group); err != nil || got.Custom {
				t.Errorf("%s with its group is %v, %v", word, got, err)
			}
		}
	}
}

func TestResolveNamesTheCandidates(t *testing.T) {
	c := customised(t)
	for _, arg := range []string{"bk", "backups", "Backup"} {
		_, err := c.Resolve(arg)
		if !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), "backups.a.example.com, backups.b.example.com") {
			t.Errorf("Resolve(%q): %v", arg, err)
		}
	}
}

func TestResolveSuggests(t *testing.T) {
	c := customised(t)
	for arg, want := range map[string]string{
		"deploymnts": "deployments.apps", "deamonset": "daemonsets.apps", "widgt": "widgets.example.org",
		"deploymnt.apps": "deployments.apps", "endpoint": "endpoints",
	} {
		if _, err := c.Resolve(arg); err == nil || !strings.Contains(err.Error(), "did you mean "+want) {
			t.Errorf("Resolve(%q): %v, want the suggestion %s", arg, err, want)
		}
	}
	if _, err := c.Resolve("zzzzzzzzzzzz"); err == nil || strings.Contains(err.Error(), "did you mean") {
		t.Errorf("a suggestion out of nothing: %v", err)
	}
}

func TestParseTarget(t *testing.T) {
	c := customised(t)
	for arg, want := range map[string][2]string{
		"ds/collector":                   {"daemonsets.apps", "collector"},
		"ds":                             {"daemonsets.apps", ""},
		"Deployment.v1.apps/web":         {"deployments.apps", "web"},
		"clusterrole/system:node":        {"clusterroles.rbac.authorization.k8s.io", "system:node"},
		"widgets.example.org/w":          {"widgets.example.org", "w"},
		"role/with a space":              {"roles.rbac.authorization.k8s.io", "with a space"},
		"ip/2001:db8::1":                 {"ipaddresses.networking.k8s.io", "2001:db8::1"},
		"rolebinding/Grüße":              {"rolebindings.rbac.authorization.k8s.io", "Grüße"},
		"apiservice/v1.metrics.k8s.io":   {"apiservices.apiregistration.k8s.io", "v1.metrics.k8s.io"},
		"crd/widgets.example.org":        {"customresourcedefinitions.apiextensions.k8s.io", "widgets.example.org"},
		"pods.v1./kube-apiserver-cp-1":   {"pods", "kube-apiserver-cp-1"},
		"events.events.k8s.io/web.17abc": {"events.events.k8s.io", "web.17abc"},
	} {
		k, name, err := c.ParseTarget(arg)
		if err != nil || k.Resource() != want[0] || name != want[1] {
			t.Errorf("ParseTarget(%q) = %v, %q, %v, want %v", arg, k, name, err, want)
		}
	}
	for _, arg := range []string{
		"", "/", "ds/", "/collector", "ds//collector", "ds/a/b", "ds/a/", "nothing/x", "ds/.", "ds/..", "ds/a%2fb",
		"ds/a\nb", "ds/\x1b[2J", "ds/a\x00", "ds/\u202egnp.exe", "ds/\u200b", "ds/\xff\xfe", "d\ts/a", "ds/" + strings.Repeat("a", 2000),
		"bk/x", "ds,deploy/x", "ds collector",
	} {
		k, name, err := c.ParseTarget(arg)
		if !fault.Is(err, fault.Usage) || k != nil || name != "" {
			t.Errorf("ParseTarget(%q) = %v, %q, %v, want a usage error", arg, k, name, err)
			continue
		}
		if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r > '~' }) || len(err.Error()) > 400 {
			t.Errorf("ParseTarget(%q): the error is not one plain line: %q", arg, err)
		}
	}
}

func TestByGroupKind(t *testing.T) {
	c := customised(t)
	for in, want := range map[[2]string]string{
		{"apps", "Deployment"}: "deployments.apps", {"", "Pod"}: "pods", {"events.k8s.io", "Event"}: "events.events.k8s.io", {"", "Event"}: "events",
		{"extensions", "Deployment"}: "deployments.apps", {"serving.knative.dev", "Service"}: "services.serving.knative.dev",
		{"apps", "deployment"}: "", {"", "Deployment"}: "", {"example.com", "Widget"}: "", {"", ""}: "",
	} {
		k := c.ByGroupKind(in[0], in[1])
		if k == nil && want != "" || k != nil && k.Resource() != want {
			t.Errorf("ByGroupKind%v = %v, want %q", in, k, want)
		}
	}
}

func TestKindsAreSorted(t *testing.T) {
	kinds := customised(t).Kinds()
	if !slices.IsSortedFunc(kinds, func(a, b *Kind) int { return strings.Compare(a.Dir, b.Dir) }) {
		t.Error("not sorted by directory")
	}
	for i := 1; i < len(kinds); i++ {
		if kinds[i].Dir == kinds[i-1].Dir {
			t.Errorf("%s is there twice", kinds[i].Dir)
		}
	}
}

// Catalogues are of one cluster each: what one learns must not show in another.
func TestCataloguesShareNothing(t *testing.T) {
	customised(t)
	if k, err := NewCatalogue().Resolve("widgets"); err == nil {
		t.Errorf("%v", k)
	}
}

func FuzzResolve(f *testing.F) {
	c := customised(f)
	for _, arg := range []string{"deploy", "Deployment.v1.apps", "pods.v1.", "bk", "events.events.k8s.io", "", ".", "..", "a.b.c.d", "widgets.v1.example.org", "po\x00d", "\xff"} {
		f.Add(arg)
	}
	f.Fuzz(func(t *testing.T, arg string) {
		k, err := c.Resolve(arg)
		if (k == nil) == (err == nil) {
			t.Fatalf("Resolve(%q) = %v, %v", arg, k, err)
		}
		if err != nil {
			checkUsage(t, err)
		} else if again, err := c.Resolve(k.Resource()); err != nil || again != k {
			t.Fatalf("%s does not resolve to itself: %v, %v", k.Resource(), again, err)
		}
	})
}

func FuzzParseTarget(f *testing.F) {
	c := customised(f)
	for _, arg := range []string{"ds/collector", "ds", "clusterrole/system:node", "ds//a", "/", "", "ds/a/b", "ds/..", "ds/\x1b[2J", "ip/::1"} {
		f.Add(arg)
	}
	f.Fuzz(func(t *testing.T, arg string) {
		k, name, err := c.ParseTarget(arg)
		if err != nil {
			checkUsage(t, err)
			return
		}
		namespace := ""
		if k.Namespaced {
			namespace = "shop"
		}
		if name == "" {
			return
		}
		key, err := k.Key("/registry", namespace, name)
		if err != nil {
			t.Fatalf("%q parses, but has no key: %v", arg, err)
		}
		if _, _, back, err := c.ByKey("/registry", key); err != nil || back != name {
			t.Fatalf("%q: %q, %v", key, back, err)
		}
	})
}

func checkUsage(t *testing.T, err error) {
	t.Helper()
	if !fault.Is(err, fault.Usage) {
		t.Fatalf("not a usage error: %v", err)
	}
	if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r > '~' }) {
		t.Fatalf("not one plain line: %q", err)
	}
}
