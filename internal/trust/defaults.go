package trust

// The shipped policy. Order does not matter: one match refuses.

var (
	defaultCaps      = Caps{ObjectsPerAction: 10_000, ObjectsPerHour: 50_000}
	defaultAloneCaps = Caps{ObjectsPerAction: 100, ObjectsPerHour: 500}
)

// defaultApprovals is empty: beside adding authority, nothing that a responder
// does in the first minutes waits for anybody, unless a fleet decides so.
var defaultApprovals = []ApprovalRule{}

// networkAndDNS are the workloads without which nodes lose their network or
// their resolver: stopping one turns an incident into an outage.
var networkAndDNS = []string{
	"coredns*", "kube-dns*", "node-local-dns*", "nodelocaldns*",
	"kube-proxy*", "calico-*", "canal*", "cilium*", "kube-flannel*", "weave-net*", "antrea-*",
	"kube-router*", "kube-ovn*", "ovn*", "aws-node*", "azure-cni*", "azure-npm*", "kindnet*",
	"multus*", "kube-multus*", "ovs-*", "kube-vip*", "konnectivity-*", "rke2-coredns*", "rke2-canal*", "rke2-cilium*", "rke2-calico*",
}

var controlPlaneNames = []string{
	"etcd*", "kube-apiserver*", "kube-controller-manager*", "kube-scheduler*", "cloud-controller-manager*",
}

var bindings = []string{"rolebindings.rbac.authorization.k8s.io"}

var defaultRules = []Rule{
	{
		Actions: []string{"delete"}, Resources: []string{"namespaces"},
		Why: "etcd would orphan everything in the namespace; only the API server can empty one",
	}, {
		Actions: []string{"delete"}, Resources: []string{"customresourcedefinitions.apiextensions.k8s.io"},
		Why: "its custom resources would stay behind without a kind",
	}, {
		Actions: []string{"delete"}, Resources: []string{"nodes"},
		Why: "the pods of the node would be evicted; cordon it instead",
	}, {
		Actions: []string{"delete"}, Resources: []string{"installations.operator.tigera.io", "*.crd.projectcalico.org", "*.projectcalico.org", "*.cilium.io",
			"*.k8s.ovn.org", "*.kubeovn.io", "*.config.openshift.io", "*.operator.openshift.io", "*.machineconfiguration.openshift.io"},
		Why: "the cluster's network or its operators live by it",
	}, {
		Actions: []string{"delete"}, Resources: []string{"storageversions.internal.apiserver.k8s.io", "csinodes.storage.k8s.io", "controllerrevisions.apps"},
		Why: "the control plane or the nodes keep their own state in it",
	}, {
		Actions: []string{"delete"}, Resources: []string{"priorityclasses.scheduling.k8s.io"}, Names: []string{"system-*"},
		Why: "the control plane's own pods would be the first to go",
	}, {
		Actions: []string{"delete"}, Resources: []string{"persistentvolumes", "persistentvolumeclaims", "volumeattachments.storage.k8s.io"},
		Why: "finalizers that protect data in use would be bypassed",
	}, {
		Actions: []string{"delete"}, Resources: []string{"apiservices.apiregistration.k8s.io", "flowschemas.flowcontrol.apiserver.k8s.io",
			"prioritylevelconfigurations.flowcontrol.apiserver.k8s.io", "certificatesigningrequests.certificates.k8s.io"},
		Why: "it belongs to the API server itself",
	}, {
		Actions: []string{"delete"}, Resources: []string{"servicecidrs.networking.k8s.io", "ipaddresses.networking.k8s.io"},
		Why: "addresses of services in use could be given out twice",
	}, {
		Actions: []string{"delete"}, Resources: []string{"clusterroles.rbac.authorization.k8s.io", "clusterrolebindings.rbac.authorization.k8s.io"},
		Names: []string{"system:*", "cluster-admin", "kubeadm:*"},
		Why:   "the control plane, the nodes or the administrators stand on it; revoke takes one subject out of a binding",
	}, {
		Actions: []string{"revoke"}, Resources: []string{"clusterrolebindings.rbac.authorization.k8s.io"}, Names: []string{"system:controller:*", "system:node*"},
		Why: "a controller of the control plane, or the nodes, have their rights from it",
	}, {
		// This and the next three hold for every action, those of tomorrow too.
		// Taking a subject out of a binding that lies there is left possible.
		Namespaces: []string{"kube-system"}, Names: networkAndDNS, Except: bindings,
		Why: "it is the cluster's network or DNS",
	}, {
		Namespaces: []string{"kube-system"}, Names: controlPlaneNames, Except: bindings,
		Why: "it is the control plane's own",
	}, {
		Namespaces: []string{"calico-system", "tigera-operator", "kube-flannel", "cilium", "ovn-kubernetes", "openshift-dns", "openshift-dns-operator",
			"openshift-ovn-kubernetes", "openshift-sdn", "openshift-network-operator", "openshift-multus"},
		Except: bindings,
		Why:    "it is the cluster's network or DNS",
	}, {
		Except: bindings,
		Namespaces: []string{"openshift-etcd*", "openshift-kube-*", "openshift-apiserver*", "openshift-oauth-apiserver",
			"openshift-authentication*", "openshift-cluster-version", "openshift-machine-config-operator"},
		Why: "it is the control plane's own",
	}, {
		Actions: []string{"delete"}, Namespaces: []string{"kube-system", "kube-public", "kube-node-lease"},
		Except: []string{"pods", "events", "events.events.k8s.io", "jobs.batch"},
		Why:    "leader election, node heartbeats and the cluster's own configuration live in this namespace",
	}, {
		Actions: []string{"delete"}, Resources: []string{"services", "endpoints", "endpointslices.discovery.k8s.io"},
		Namespaces: []string{"default"}, Names: []string{"kubernetes", "kubernetes-*"},
		Why: "every pod finds the API server through it",
	},
}

// fixedRules hold beside those of every policy: no bundle can replace them.
var fixedRules = []Rule{
	{
		Actions: []string{"undo"}, Resources: []string{"secrets", "certificatesigningrequests.certificates.k8s.io",
			"podcertificaterequests.certificates.k8s.io", "clustertrustbundles.certificates.k8s.io"},
		Why: "Secrets and signing requests are never created through etcd; put it back through the API server",
	},
}

var defaultSubjects = []SubjectRule{
	{
		Subjects: []string{"system:masters", "kubeadm:cluster-admins", "cluster-admins", "system:cluster-admins"},
		Why:      "it is how administrators get in",
	}, {
		Subjects: []string{"system:kube-controller-manager", "system:kube-scheduler", "system:kube-proxy", "system:apiserver",
			"kube-apiserver-kubelet-client", "kube-apiserver", "system:k3s-controller", "system:rke2-controller", "system:konnectivity-server", "system:admin",
			"system:cloud-controller-manager", "system:cluster-policy-controller", "system:openshift-*"},
		Why: "it is the control plane's own",
	}, {
		Subjects: []string{"system:nodes", "system:node:*", "system:bootstrappers", "system:bootstrappers:*"},
		Why:      "the nodes would be lost",
	}, {
		Subjects: []string{"system:authenticated", "system:unauthenticated", "system:anonymous", "system:serviceaccounts",
			"system:serviceaccounts:kube-system", "system:serviceaccounts:calico-system", "system:serviceaccounts:openshift-*", "system:monitoring"},
		Why: "everybody, or the whole system namespace, is in it; revoke the one offender",
	}, {
		Subjects: serviceAccounts("kube-system", networkAndDNS),
		Why:      "it is the cluster's network or DNS",
	}, {
		Subjects: []string{"system:serviceaccount:calico-system:*", "system:serviceaccount:tigera-operator:*", "system:serviceaccount:kube-flannel:*",
			"system:serviceaccount:cilium:*", "system:serviceaccount:openshift-*:*"},
		Why: "it is the cluster's network, DNS or control plane",
	}, {
		// The identities that kube-controller-manager takes with
		// --use-service-account-credentials:
		// plugin/pkg/auth/authorizer/rbac/bootstrappolicy/controller_policy.go
		Subjects: serviceAccounts("kube-system", []string{
			"attachdetach-controller", "bootstrap-signer", "certificate-controller", "clusterrole-aggregation-controller",
			"cronjob-controller", "daemon-set-controller", "deployment-controller", "device-taint-eviction-controller",
			"disruption-controller", "endpoint-controller", "endpointslice-controller", "endpointslicemirroring-controller",
			"ephemeral-volume-controller", "expand-controller", "generic-garbage-collector", "horizontal-pod-autoscaler",
			"job-controller", "legacy-service-account-token-cleaner", "namespace-controller", "node-controller", "podcertificaterequestcleaner-controller", "kube-apiserver-serving-clustertrustbundle-publisher",
			"persistent-volume-binder", "pod-garbage-collector", "pv-protection-controller", "pvc-protection-controller",
			"replicaset-controller", "replication-controller", "resource-claim-controller", "resourcequota-controller",
			"root-ca-cert-publisher", "route-controller", "selinux-warning-controller", "service-account-controller",
			"service-cidrs-controller", "service-controller", "statefulset-controller", "storage-version-migrator-controller",
			"taint-eviction-controller", "token-cleaner", "ttl-after-finished-controller", "ttl-controller",
			"validatingadmissionpolicy-status-controller", "volumeattributesclass-protection-controller",
			"cloud-controller-manager", "kube-controller-manager", "kube-scheduler",
		}),
		Why: "it is the control plane's own",
	},
}

func serviceAccounts(namespace string, names []string) []string {
	out := make([]string, len(names))
	for i, n := range names {
		out[i] = "system:serviceaccount:" + namespace + ":" + n
	}
	return out
}
