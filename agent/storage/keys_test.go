package storage

import (
	"strings"
	"testing"

	"github.com/halligan-io/halligan/internal/fault"
)

// goldenKeys is where the API servers of releases 1.28 to 1.37 put each native
// resource under the prefix, after upstream's test/integration/etcd/data.go.
var goldenKeys = map[string]string{
	"apiservices.apiregistration.k8s.io":                             "apiregistration.k8s.io/apiservices/{name}",
	"certificatesigningrequests.certificates.k8s.io":                 "certificatesigningrequests/{name}",
	"clustercidrs.networking.k8s.io":                                 "clustercidrs/{name}",
	"clusterrolebindings.rbac.authorization.k8s.io":                  "clusterrolebindings/{name}",
	"clusterroles.rbac.authorization.k8s.io":                         "clusterroles/{name}",
	"clustertrustbundles.certificates.k8s.io":                        "clustertrustbundles/{name}",
	"compositepodgroups.scheduling.k8s.io":                           "compositepodgroups/{ns}/{name}",
	"configmaps":                                                     "configmaps/{ns}/{name}",
	"controllerrevisions.apps":                                       "controllerrevisions/{ns}/{name}",
	"cronjobs.batch":                                                 "cronjobs/{ns}/{name}",
	"csidrivers.storage.k8s.io":                                      "csidrivers/{name}",
	"csinodes.storage.k8s.io":                                        "csinodes/{name}",
	"csistoragecapacities.storage.k8s.io":                            "csistoragecapacities/{ns}/{name}",
	"customresourcedefinitions.apiextensions.k8s.io":                 "apiextensions.k8s.io/customresourcedefinitions/{name}",
	"daemonsets.apps":                                                "daemonsets/{ns}/{name}",
	"deployments.apps":                                               "deployments/{ns}/{name}",
	"deviceclasses.resource.k8s.io":                                  "deviceclasses/{name}",
	"devicetaintrules.resource.k8s.io":                               "devicetaintrules/{name}",
	"endpoints":                                                      "services/endpoints/{ns}/{name}",
	"endpointslices.discovery.k8s.io":                                "endpointslices/{ns}/{name}",
	"events":                                                         "events/{ns}/{name}",
	"events.events.k8s.io":                                           "events/{ns}/{name}",
	"evictionrequests.lifecycle.k8s.io":                              "evictionrequests/{ns}/{name}",
	"evictions.lifecycle.k8s.io":                                     "evictions/{ns}/{name}",
	"flowschemas.flowcontrol.apiserver.k8s.io":                       "flowschemas/{name}",
	"horizontalpodautoscalers.autoscaling":                           "horizontalpodautoscalers/{ns}/{name}",
	"ingressclasses.networking.k8s.io":                               "ingressclasses/{name}",
	"ingresses.networking.k8s.io":                                    "ingress/{ns}/{name}",
	"ipaddresses.networking.k8s.io":                                  "ipaddresses/{name}",
	"jobs.batch":                                                     "jobs/{ns}/{name}",
	"leasecandidates.coordination.k8s.io":                            "leasecandidates/{ns}/{name}",
	"leases.coordination.k8s.io":                                     "leases/{ns}/{name}",
	"limitranges":                                                    "limitranges/{ns}/{name}",
	"mutatingadmissionpolicies.admissionregistration.k8s.io":         "mutatingadmissionpolicies/{name}",
	"mutatingadmissionpolicybindings.admissionregistration.k8s.io":   "mutatingadmissionpolicybindings/{name}",
	"mutatingwebhookconfigurations.admissionregistration.k8s.io":     "mutatingwebhookconfigurations/{name}",
	"namespaces":                                                     "namespaces/{name}",
	"networkpolicies.networking.k8s.io":                              "networkpolicies/{ns}/{name}",
	"nodes":                                                          "minions/{name}",
	"persistentvolumeclaims":                                         "persistentvolumeclaims/{ns}/{name}",
	"persistentvolumes":                                              "persistentvolumes/{name}",
	"podcertificaterequests.certificates.k8s.io":                     "podcertificaterequests/{ns}/{name}",
	"poddisruptionbudgets.policy":                                    "poddisruptionbudgets/{ns}/{name}",
	"podgroups.scheduling.k8s.io":                                    "podgroups/{ns}/{name}",
	"pods":                                                           "pods/{ns}/{name}",
	"podschedulingcontexts.resource.k8s.io":                          "podschedulingcontexts/{ns}/{name}",
	"podtemplates":                                                   "podtemplates/{ns}/{name}",
	"priorityclasses.scheduling.k8s.io":                              "priorityclasses/{name}",
	"prioritylevelconfigurations.flowcontrol.apiserver.k8s.io":       "prioritylevelconfigurations/{name}",
	"replicasets.apps":                                               "replicasets/{ns}/{name}",
	"replicationcontrollers":                                         "controllers/{ns}/{name}",
	"resourceclaimparameters.resource.k8s.io":                        "resourceclaimparameters/{ns}/{name}",
	"resourceclaims.resource.k8s.io":                                 "resourceclaims/{ns}/{name}",
	"resourceclaimtemplates.resource.k8s.io":                         "resourceclaimtemplates/{ns}/{name}",
	"resourceclasses.resource.k8s.io":                                "resourceclasses/{name}",
	"resourceclassparameters.resource.k8s.io":                        "resourceclassparameters/{ns}/{name}",
	"resourcepoolstatusrequests.resource.k8s.io":                     "resourcepoolstatusrequests/{name}",
	"resourcequotas":                                                 "resourcequotas/{ns}/{name}",
	"resourceslices.resource.k8s.io":                                 "resourceslices/{name}",
	"rolebindings.rbac.authorization.k8s.io":                         "rolebindings/{ns}/{name}",
	"roles.rbac.authorization.k8s.io":                                "roles/{ns}/{name}",
	"runtimeclasses.node.k8s.io":                                     "runtimeclasses/{name}",
	"secrets":                                                        "secrets/{ns}/{name}",
	"serviceaccounts":                                                "serviceaccounts/{ns}/{name}",
	"servicecidrs.networking.k8s.io":                                 "servicecidrs/{name}",
	"services":                                                       "services/specs/{ns}/{name}",
	"statefulsets.apps":                                              "statefulsets/{ns}/{name}",
	"storageclasses.storage.k8s.io":                                  "storageclasses/{name}",
	"storageversionmigrations.storagemigration.k8s.io":               "storageversionmigrations/{name}",
	"storageversions.internal.apiserver.k8s.io":                      "storageversions/{name}",
	"validatingadmissionpolicies.admissionregistration.k8s.io":       "validatingadmissionpolicies/{name}",
	"validatingadmissionpolicybindings.admissionregistration.k8s.io": "validatingadmissionpolicybindings/{name}",
	"validatingwebhookconfigurations.admissionregistration.k8s.io":   "validatingwebhookconfigurations/{name}",
	"volumeattachments.storage.k8s.io":                               "volumeattachments/{name}",
	"volumeattributesclasses.storage.k8s.io":                         "volumeattributesclasses/{name}",
	"workloads.scheduling.k8s.io":                                    "workloads/{ns}/{name}",
}

func TestGoldenKeys(t *testing.T) {
	c := NewCatalogue()
	for _, k := range c.native {
		want, ok := goldenKeys[k.Resource()]
		if !ok {
			t.Errorf("%s is not in the golden table", k.Resource())
			continue
		}
		namespace := ""
		if k.Namespaced {
			namespace = "{ns}"
		}
		if got := k.Range("/registry", namespace) + "{name}"; got != "/registry/"+want {
			t.Errorf("%s: key %s, want /registry/%s", k.Resource(), got, want)
		}
	}
	if len(goldenKeys) != len(c.native) {
		t.Errorf("%d golden keys, %d rows", len(goldenKeys), len(c.native))
	}
}

func TestKey(t *testing.T) {
	c := NewCatalogue()
	if err := c.AddCRD([]byte(widgets)); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ kind, prefix, namespace, name, want string }{
		{"deploy", "/registry", "shop", "web", "/registry/deployments/shop/web"},
		{"deploy", "registry/", "shop", "web", "/registry/deployments/shop/web"},
		{"svc", "/kubernetes.io", "shop", "web", "/kubernetes.io/services/specs/shop/web"},
		{"no", "", "", "cp-1", "/minions/cp-1"},
		{"clusterrole", "/registry", "", "system:node", "/registry/clusterroles/system:node"},
		{"role", "/registry", "shop", "system:controller:a b", "/registry/roles/shop/system:controller:a b"},
		{"ip", "/registry", "", "2001:db8::1", "/registry/ipaddresses/2001:db8::1"},
		{"apiservice", "/registry", "", "v1.apps", "/registry/apiregistration.k8s.io/apiservices/v1.apps"},
		{"widget", "/registry", "shop", "w", "/registry/example.org/widgets/shop/w"},
	} {
		k, err := c.Resolve(test.kind)
		if err != nil {
			t.Fatal(err)
		}
		key, err := k.Key(test.prefix, test.namespace, test.name)
		if err != nil || key != test.want {
			t.Errorf("%s: key %q, %v, want %q", test.kind, key, err, test.want)
			continue
		}
		back, namespace, name, err := c.ByKey(test.prefix, key)
		if err != nil || back != k || namespace != test.namespace || name != test.name {
			t.Errorf("%s: back from the key: %v %q %q %v", test.kind, back, namespace, name, err)
		}
	}
	for _, test := range []struct{ kind, namespace, name string }{
		{"deploy", "shop", ""},
		{"deploy", "", "web"},
		{"node", "shop", "cp-1"},
		{"deploy", "shop", ".."},
		{"deploy", "shop", "."},
		{"deploy", "shop", "a/b"},
		{"deploy", "shop", "a%2fb"},
		{"deploy", "shop/..", "web"},
		{"deploy", "../x", "web"},
		{"deploy", "Shop", "web"},
		{"deploy", strings.Repeat("n", 64), "web"},
	} {
		k, err := c.Resolve(test.kind)
		if err != nil {
			t.Fatal(err)
		}
		if key, err := k.Key("/registry", test.namespace, test.name); !fault.Is(err, fault.Usage) {
			t.Errorf("Key(%q, %q) of %s = %q, %v, want a usage error", test.namespace, test.name, test.kind, key, err)
		}
	}
}

func TestRange(t *testing.T) {
	c := NewCatalogue()
	for _, test := range []struct{ kind, namespace, want string }{
		{"pods", "", "/registry/pods/"},
		{"pods", "shop", "/registry/pods/shop/"},
		{"nodes", "", "/registry/minions/"},
		{"nodes", "shop", "/registry/minions/"},
	} {
		k, err := c.Resolve(test.kind)
		if err != nil {
			t.Fatal(err)
		}
		if got := k.Range("/registry", test.namespace); got != test.want {
			t.Errorf("Range of %s in %q = %q, want %q", test.kind, test.namespace, got, test.want)
		}
	}
}

func TestByKeyOfWhatIsNoObject(t *testing.T) {
	c := NewCatalogue()
	for _, key := range []string{
		"", "/", "/registry", "/registry/", "/registry/pods", "/registry/pods/", "/registry/pods/shop", "/registry/pods/shop/",
		"/registry/pods//web", "/registry/pods/shop/web/more", "/registry/minions/a/b", "/registry/services/specs/shop",
		"/registry/services/other/a/b", "/registry/masterleases/10.0.0.1", "/registry/ranges/serviceips",
		"/registry/example.org/widgets/shop/w", "/registryx/pods/shop/web", "compact_rev_key", "/registry/pods\x00/a/b",
	} {
		if k, _, _, err := c.ByKey("/registry", key); !fault.Is(err, fault.NotFound) || k != nil {
			t.Errorf("ByKey(%q) = %v, %v, want not-found", key, k, err)
		}
	}
}

// An RBAC object may have a name that no terminal should see. It must still be
// found, or it would be the way to hide a binding from revoke.
func TestByKeyTakesHostileNames(t *testing.T) {
	k, _, name, err := NewCatalogue().ByKey("/registry", "/registry/clusterrolebindings/a\x1b[2Jb\nc")
	if err != nil || name != "a\x1b[2Jb\nc" {
		t.Fatalf("%q, %v", name, err)
	}
	if key, err := k.Key("/registry", "", name); err != nil || key != "/registry/clusterrolebindings/"+name {
		t.Errorf("%q, %v", key, err)
	}
}

func FuzzByKey(f *testing.F) {
	c := NewCatalogue()
	if err := c.AddCRD([]byte(widgets)); err != nil {
		f.Fatal(err)
	}
	for _, key := range []string{"/registry/pods/shop/web", "/registry/minions/cp-1", "/registry/services/specs/shop/web",
		"/registry/example.org/widgets/shop/w", "/registry/clusterroles/system:node", "/registry/ranges/serviceips", "", "//", "/registry/pods/../x"} {
		f.Add("/registry", key)
	}
	f.Fuzz(func(t *testing.T, prefix, key string) {
		k, namespace, name, err := c.ByKey(prefix, key)
		if err != nil {
			if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r > '~' }) {
				t.Fatalf("the error is not plain text: %q", err)
			}
			return
		}
		if name == "" || k.Namespaced == (namespace == "") {
			t.Fatalf("%q: parts missing", key)
		}
		if back := k.Range(prefix, namespace) + name; back != key {
			t.Fatalf("%q came back as %q", key, back)
		}
	})
}
