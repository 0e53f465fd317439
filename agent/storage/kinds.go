package storage

import (
	"google.golang.org/protobuf/encoding/protowire"
)

// nativeKinds is the inventory of what the API servers of releases 1.28 to 1.37
// persist, one row per kind. Left out of a row is what follows from the rest:
// Singular is the kind in lower case, Dir is the plural. Version is the newest
// one served; which version an object is stored as, only the object says.
//
// Sources, upstream: test/integration/etcd/data.go for keys,
// pkg/registry/*/*/storage/storage.go for short names, and strategy.go beside it
// for scope and generation.
var nativeKinds = []Kind{
	{Version: "v1", Kind: "ConfigMap", Plural: "configmaps", ShortNames: []string{"cm"}, Namespaced: true},
	{Version: "v1", Kind: "Endpoints", Plural: "endpoints", ShortNames: []string{"ep"}, Namespaced: true, Dir: "services/endpoints"},
	{Version: "v1", Kind: "Event", Plural: "events", ShortNames: []string{"ev"}, Namespaced: true},
	{Version: "v1", Kind: "LimitRange", Plural: "limitranges", ShortNames: []string{"limits"}, Namespaced: true, Forbids: true},
	{Version: "v1", Kind: "Namespace", Plural: "namespaces", ShortNames: []string{"ns"}, state: namespaceState},
	{Version: "v1", Kind: "Node", Plural: "nodes", ShortNames: []string{"no"}, Dir: "minions", state: nodeState,
		Fields: map[FieldName]Field{Unschedulable: specField(Bool, "unschedulable", 4)}},
	{Version: "v1", Kind: "PersistentVolume", Plural: "persistentvolumes", ShortNames: []string{"pv"}, state: persistentVolumeState},
	{Version: "v1", Kind: "PersistentVolumeClaim", Plural: "persistentvolumeclaims", ShortNames: []string{"pvc"}, Namespaced: true, state: persistentVolumeClaimState},
	{Version: "v1", Kind: "Pod", Plural: "pods", ShortNames: []string{"po"}, Namespaced: true, Generation: true, youngGeneration: true, PodTemplate: true, Carrier: Kubelet, state: podState},
	{Version: "v1", Kind: "PodTemplate", Plural: "podtemplates", Namespaced: true, Generation: true, PodTemplate: true},
	{Version: "v1", Kind: "ReplicationController", Plural: "replicationcontrollers", ShortNames: []string{"rc"}, Namespaced: true, Dir: "controllers", Generation: true, PodTemplate: true, Carrier: ControllerManager, state: replicationControllerState,
		Fields: map[FieldName]Field{Replicas: specField(Int, "replicas", 1)}},
	{Version: "v1", Kind: "ResourceQuota", Plural: "resourcequotas", ShortNames: []string{"quota"}, Namespaced: true, Forbids: true},
	{Version: "v1", Kind: "Secret", Plural: "secrets", Namespaced: true},
	{Version: "v1", Kind: "Service", Plural: "services", ShortNames: []string{"svc"}, Namespaced: true, Dir: "services/specs"},
	{Version: "v1", Kind: "ServiceAccount", Plural: "serviceaccounts", ShortNames: []string{"sa"}, Namespaced: true, Authority: true},

	{Group: "admissionregistration.k8s.io", Version: "v1", Kind: "MutatingAdmissionPolicy", Plural: "mutatingadmissionpolicies", Generation: true, Authority: true, Forbids: true},
	{Group: "admissionregistration.k8s.io", Version: "v1", Kind: "MutatingAdmissionPolicyBinding", Plural: "mutatingadmissionpolicybindings", Generation: true, Authority: true, Forbids: true},
	{Group: "admissionregistration.k8s.io", Version: "v1", Kind: "MutatingWebhookConfiguration", Plural: "mutatingwebhookconfigurations", Generation: true, Authority: true, Forbids: true,
		Fields: map[FieldName]Field{FailurePolicy: failurePolicyField}, versions: alsoAs("admissionregistration.k8s.io/v1beta1")},
	{Group: "admissionregistration.k8s.io", Version: "v1", Kind: "ValidatingAdmissionPolicy", Plural: "validatingadmissionpolicies", Generation: true, Authority: true, Forbids: true},
	{Group: "admissionregistration.k8s.io", Version: "v1", Kind: "ValidatingAdmissionPolicyBinding", Plural: "validatingadmissionpolicybindings", Generation: true, Authority: true, Forbids: true},
	{Group: "admissionregistration.k8s.io", Version: "v1", Kind: "ValidatingWebhookConfiguration", Plural: "validatingwebhookconfigurations", Generation: true, Authority: true, Forbids: true,
		Fields: map[FieldName]Field{FailurePolicy: failurePolicyField}, versions: alsoAs("admissionregistration.k8s.io/v1beta1")},

	// These two have storage of their own, which keeps the group in the key and
	// writes JSON.
	{Group: "apiextensions.k8s.io", Version: "v1", Kind: "CustomResourceDefinition", Plural: "customresourcedefinitions", ShortNames: []string{"crd", "crds"},
		Dir: "apiextensions.k8s.io/customresourcedefinitions", Generation: true, Authority: true},
	{Group: "apiregistration.k8s.io", Version: "v1", Kind: "APIService", Plural: "apiservices", Dir: "apiregistration.k8s.io/apiservices", Authority: true},

	{Group: "apps", Version: "v1", Kind: "ControllerRevision", Plural: "controllerrevisions", Namespaced: true, PodTemplate: true},
	{Group: "apps", Version: "v1", Kind: "DaemonSet", Plural: "daemonsets", ShortNames: []string{"ds"}, Namespaced: true, Generation: true, PodTemplate: true, Carrier: ControllerManager, state: daemonSetState,
		Fields: map[FieldName]Field{NodeSelector: {
			Type: Map,
			JSON: []string{"spec", "template", "spec", "nodeSelector"},
			Wire: []protowire.Number{2, 2, 2, 7},
		}},
		versions: alsoAs("apps/v1beta2", "extensions/v1beta1")},
	{Group: "apps", Version: "v1", Kind: "Deployment", Plural: "deployments", ShortNames: []string{"deploy"}, Namespaced: true, Generation: true, annotated: true, PodTemplate: true, Carrier: ControllerManager, state: deploymentState,
		Fields:   map[FieldName]Field{Replicas: specField(Int, "replicas", 1), Paused: specField(Bool, "paused", 7)},
		versions: alsoAs("apps/v1beta1", "apps/v1beta2", "extensions/v1beta1")},
	{Group: "apps", Version: "v1", Kind: "ReplicaSet", Plural: "replicasets", ShortNames: []string{"rs"}, Namespaced: true, Generation: true, PodTemplate: true, Carrier: ControllerManager, state: replicaSetState,
		Fields:   map[FieldName]Field{Replicas: specField(Int, "replicas", 1)},
		versions: alsoAs("apps/v1beta2", "extensions/v1beta1")},
	{Group: "apps", Version: "v1", Kind: "StatefulSet", Plural: "statefulsets", ShortNames: []string{"sts"}, Namespaced: true, Generation: true, PodTemplate: true, Carrier: ControllerManager, state: statefulSetState,
		Fields:   map[FieldName]Field{Replicas: specField(Int, "replicas", 1)},
		versions: alsoAs("apps/v1beta1", "apps/v1beta2")},

	{Group: "autoscaling", Version: "v2", Kind: "HorizontalPodAutoscaler", Plural: "horizontalpodautoscalers", ShortNames: []string{"hpa"}, Namespaced: true, Generation: true, youngGeneration: true, state: autoscalerState,
		Fields:   map[FieldName]Field{MinReplicas: specField(Int, "minReplicas", 2), MaxReplicas: specField(Int, "maxReplicas", 3)},
		versions: alsoAs("autoscaling/v1")},

	{Group: "batch", Version: "v1", Kind: "CronJob", Plural: "cronjobs", ShortNames: []string{"cj"}, Namespaced: true, Generation: true, PodTemplate: true, Carrier: ControllerManager, state: cronJobState,
		Fields:   map[FieldName]Field{Suspend: specField(Bool, "suspend", 4)},
		versions: alsoAs("batch/v1beta1")},
	{Group: "batch", Version: "v1", Kind: "Job", Plural: "jobs", Namespaced: true, Generation: true, PodTemplate: true, Carrier: ControllerManager, state: jobState,
		Fields: map[FieldName]Field{Parallelism: specField(Int, "parallelism", 1), Suspend: specField(Bool, "suspend", 10)}},

	{Group: "certificates.k8s.io", Version: "v1", Kind: "CertificateSigningRequest", Plural: "certificatesigningrequests", ShortNames: []string{"csr"}, Authority: true},
	{Group: "certificates.k8s.io", Version: "v1", Kind: "ClusterTrustBundle", Plural: "clustertrustbundles", Authority: true},
	{Group: "certificates.k8s.io", Version: "v1", Kind: "PodCertificateRequest", Plural: "podcertificaterequests", Namespaced: true, Authority: true},

	{Group: "coordination.k8s.io", Version: "v1", Kind: "Lease", Plural: "leases", Namespaced: true},
	{Group: "coordination.k8s.io", Version: "v1beta1", Kind: "LeaseCandidate", Plural: "leasecandidates", Namespaced: true},

	{Group: "discovery.k8s.io", Version: "v1", Kind: "EndpointSlice", Plural: "endpointslices", Namespaced: true, Generation: true},

	// The same objects as the core group's events, under the same keys.
	{Group: "events.k8s.io", Version: "v1", Kind: "Event", Plural: "events", ShortNames: []string{"ev"}, Namespaced: true},

	{Group: "flowcontrol.apiserver.k8s.io", Version: "v1", Kind: "FlowSchema", Plural: "flowschemas", Generation: true},
	{Group: "flowcontrol.apiserver.k8s.io", Version: "v1", Kind: "PriorityLevelConfiguration", Plural: "prioritylevelconfigurations", Generation: true},

	{Group: "internal.apiserver.k8s.io", Version: "v1alpha1", Kind: "StorageVersion", Plural: "storageversions"},

	{Group: "lifecycle.k8s.io", Version: "v1alpha1", Kind: "Eviction", Plural: "evictions", Namespaced: true, Generation: true},
	{Group: "lifecycle.k8s.io", Version: "v1alpha1", Kind: "EvictionRequest", Plural: "evictionrequests", Namespaced: true, Generation: true},

	{Group: "networking.k8s.io", Version: "v1alpha1", Kind: "ClusterCIDR", Plural: "clustercidrs", ShortNames: []string{"cc"}}, // until 1.28
	{Group: "networking.k8s.io", Version: "v1", Kind: "IPAddress", Plural: "ipaddresses", ShortNames: []string{"ip"}},
	{Group: "networking.k8s.io", Version: "v1", Kind: "Ingress", Plural: "ingresses", ShortNames: []string{"ing"}, Namespaced: true, Dir: "ingress", Generation: true},
	{Group: "networking.k8s.io", Version: "v1", Kind: "IngressClass", Plural: "ingressclasses", Generation: true},
	{Group: "networking.k8s.io", Version: "v1", Kind: "NetworkPolicy", Plural: "networkpolicies", ShortNames: []string{"netpol"}, Namespaced: true, Generation: true, Forbids: true},
	{Group: "networking.k8s.io", Version: "v1", Kind: "ServiceCIDR", Plural: "servicecidrs"},

	{Group: "node.k8s.io", Version: "v1", Kind: "RuntimeClass", Plural: "runtimeclasses"},

	{Group: "policy", Version: "v1", Kind: "PodDisruptionBudget", Plural: "poddisruptionbudgets", ShortNames: []string{"pdb"}, Namespaced: true, Generation: true, Forbids: true},

	{Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "ClusterRole", Plural: "clusterroles", Authority: true},
	{Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "ClusterRoleBinding", Plural: "clusterrolebindings", Authority: true,
		Fields:   map[FieldName]Field{Subjects: subjectsField},
		versions: alsoAs("rbac.authorization.k8s.io/v1alpha1", "rbac.authorization.k8s.io/v1beta1")},
	{Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "Role", Plural: "roles", Namespaced: true, Authority: true},
	{Group: "rbac.authorization.k8s.io", Version: "v1", Kind: "RoleBinding", Plural: "rolebindings", Namespaced: true, Authority: true,
		Fields:   map[FieldName]Field{Subjects: subjectsField},
		versions: alsoAs("rbac.authorization.k8s.io/v1alpha1", "rbac.authorization.k8s.io/v1beta1")},

	{Group: "resource.k8s.io", Version: "v1", Kind: "DeviceClass", Plural: "deviceclasses", Generation: true},
	{Group: "resource.k8s.io", Version: "v1", Kind: "DeviceTaintRule", Plural: "devicetaintrules", Generation: true},
	{Group: "resource.k8s.io", Version: "v1alpha3", Kind: "PodSchedulingContext", Plural: "podschedulingcontexts", Namespaced: true}, // until 1.31
	{Group: "resource.k8s.io", Version: "v1", Kind: "ResourceClaim", Plural: "resourceclaims", Namespaced: true},
	{Group: "resource.k8s.io", Version: "v1alpha2", Kind: "ResourceClaimParameters", Plural: "resourceclaimparameters", Namespaced: true}, // 1.30 only
	{Group: "resource.k8s.io", Version: "v1", Kind: "ResourceClaimTemplate", Plural: "resourceclaimtemplates", Namespaced: true},
	{Group: "resource.k8s.io", Version: "v1alpha2", Kind: "ResourceClass", Plural: "resourceclasses"},                                     // until 1.30
	{Group: "resource.k8s.io", Version: "v1alpha2", Kind: "ResourceClassParameters", Plural: "resourceclassparameters", Namespaced: true}, // 1.30 only
	{Group: "resource.k8s.io", Version: "v1alpha3", Kind: "ResourcePoolStatusRequest", Plural: "resourcepoolstatusrequests"},
	{Group: "resource.k8s.io", Version: "v1", Kind: "ResourceSlice", Plural: "resourceslices", Generation: true},

	{Group: "scheduling.k8s.io", Version: "v1alpha3", Kind: "CompositePodGroup", Plural: "compositepodgroups", Namespaced: true},
	{Group: "scheduling.k8s.io", Version: "v1beta1", Kind: "PodGroup", Plural: "podgroups", Namespaced: true},
	{Group: "scheduling.k8s.io", Version: "v1", Kind: "PriorityClass", Plural: "priorityclasses", ShortNames: []string{"pc"}},
	{Group: "scheduling.k8s.io", Version: "v1beta1", Kind: "Workload", Plural: "workloads", Namespaced: true},

	{Group: "storage.k8s.io", Version: "v1", Kind: "CSIDriver", Plural: "csidrivers", Generation: true},
	{Group: "storage.k8s.io", Version: "v1", Kind: "CSINode", Plural: "csinodes"},
	{Group: "storage.k8s.io", Version: "v1", Kind: "CSIStorageCapacity", Plural: "csistoragecapacities", Namespaced: true},
	{Group: "storage.k8s.io", Version: "v1", Kind: "StorageClass", Plural: "storageclasses", ShortNames: []string{"sc"}},
	{Group: "storage.k8s.io", Version: "v1", Kind: "VolumeAttachment", Plural: "volumeattachments"},
	{Group: "storage.k8s.io", Version: "v1", Kind: "VolumeAttributesClass", Plural: "volumeattributesclasses", ShortNames: []string{"vac"}},

	{Group: "storagemigration.k8s.io", Version: "v1", Kind: "StorageVersionMigration", Plural: "storageversionmigrations"},
}

// computedKinds are what people know as kinds but no API server stores.
var computedKinds = map[string]bool{
	"componentstatuses": true, "componentstatus": true, "cs": true, "bindings": true, "binding": true,
}

// subjectsField is the list of whom a role binding names, the same in both kinds.
var subjectsField = Field{Type: List, JSON: []string{"subjects"}, Wire: []protowire.Number{2}}

// failurePolicyField is what the API server does where a webhook does not answer,
// the same in both kinds.
var failurePolicyField = Field{Type: Named, JSON: []string{"webhooks", "failurePolicy"}, Wire: []protowire.Number{2, 4}}

// specField is the place of a field of spec, which is field 2 in every kind
// that has edit rows there.
func specField(t FieldType, name string, number protowire.Number) Field {
	return Field{Type: t, JSON: []string{"spec", name}, Wire: []protowire.Number{2, number}}
}

// counts reports whether the API server that stored the object counts its
// generation.
func (k *Kind) counts(o *Object) bool {
	return k.Generation && (o.Meta.Generation != 0 || !k.youngGeneration)
}

// alsoAs lists the older apiVersions whose field numbers are the row's own. An
// object that was never written again since an old release still has one.
func alsoAs(apiVersions ...string) map[string]map[FieldName]Field {
	m := make(map[string]map[FieldName]Field, len(apiVersions))
	for _, v := range apiVersions {
		m[v] = nil
	}
	return m
}

// Resource names the kind as an API server's configuration and RBAC do, such as
// deployments.apps or pods.
func (k *Kind) Resource() string {
	if k.Group == "" {
		return k.Plural
	}
	return k.Plural + "." + k.Group
}

// apiVersion is the row's group and version in the form that objects carry.
func (k *Kind) apiVersion() string {
	if k.Group == "" {
		return k.Version
	}
	return k.Group + "/" + k.Version
}

// metadataFields are those of ObjectMeta, which is field 1 of every kind and the same
// in every version (apimachinery pkg/apis/meta/v1/generated.proto).
var metadataFields = map[FieldName]Field{
	Generation:  generation,
	Labels:      {Type: Map, JSON: []string{"metadata", "labels"}, Wire: []protowire.Number{1, 11}},
	Annotations: {Type: Map, JSON: []string{"metadata", "annotations"}, Wire: []protowire.Number{1, 12}},
}

// Field returns where a field lies in an object that is stored with apiVersion,
// and false where the kind has no such field or the numbers of that version are
// not known for sure.
func (k *Kind) Field(name FieldName, apiVersion string) (Field, bool) {
	if f, ok := metadataFields[name]; ok {
		if k.storedAsJSON() {
			f.Wire = nil
		}
		return f, name != Generation || k.Generation
	}
	rows, known := k.versions[apiVersion]
	switch {
	case rows != nil:
		f, ok := rows[name]
		return f, ok
	case apiVersion == k.apiVersion(), known && !k.Custom:
		f, ok := k.Fields[name]
		return f, ok
	}
	return Field{}, false
}

// storedAsJSON reports whether the API server writes the kind as JSON rather
// than protobuf: custom kinds, and the two whose storage keeps the group in the
// key.
func (k *Kind) storedAsJSON() bool {
	return k.Custom || k.Group == "apiextensions.k8s.io" || k.Group == "apiregistration.k8s.io"
}
