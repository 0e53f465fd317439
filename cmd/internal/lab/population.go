package lab

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	storagev1 "k8s.io/api/storage/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
)

// The workload that does the damage in the demo, and what it left behind.
const (
	offenderNamespace = "telemetry"
	offenderName      = "collector"
	runawayApp        = "runaway"
	// leastRunaway ConfigMaps are there in the smallest cluster.
	leastRunaway = 300
)

// born is when every seeded cluster was set up; later objects count up from it.
var born = time.Date(2026, 9, 1, 8, 0, 0, 0, time.UTC)

// uidSpace makes UIDs a function of kind, namespace and name.
var uidSpace = uuid.MustParse("6f1b7d2e-3f0c-5b57-9a55-0d6c3f1a2b4c")

// object is what both typed and unstructured Kubernetes objects are.
type object interface {
	runtime.Object
	metav1.Object
}

// item is one object with the kind that its key is made from.
type item struct {
	group, kind string
	obj         object
}

// population emits the objects of a cluster with so many workers: everything a
// small cluster has, then applications until there are about so many objects.
// It ends early when emit returns false.
func population(objects, workers int, emit func(item) bool) Seeded {
	p := &people{
		// Fixed seeds: the same sizes give the same objects.
		rng: rand.New(rand.NewPCG(0x68616c6c, 0x6967616e)), emit: emit, going: true,
	}
	for i := range controlNodes {
		p.node(nodeName(i), true)
	}
	for i := range workers {
		p.node(fmt.Sprintf("worker-%03d", i+1), false)
	}
	p.cluster()
	p.offender()
	p.fixtures()
	runaway := max(leastRunaway, objects/20)
	for i := range runaway {
		p.runaway(i)
	}
	teams := min(60, 2+objects/1000)
	for i := range teams {
		p.namespace(team(i))
	}
	for i := 0; p.n < objects && p.going; i++ {
		p.application(team(i%teams), fmt.Sprintf("%s-%d", words[i%len(words)], i/len(words)+1))
	}
	return Seeded{Objects: p.n, Nodes: len(p.nodes), Runaway: runaway}
}

func team(i int) string { return fmt.Sprintf("team-%02d", i+1) }

var words = []string{"api", "web", "worker", "billing", "search", "cart", "mailer", "ledger", "gateway", "reports", "images", "auth"}

type people struct {
	rng   *rand.Rand
	emit  func(item) bool
	going bool
	n     int
	nodes []string
	// Pods and services so far; they give them their addresses.
	pods, services int
}

func (p *people) put(group, kind string, obj object) {
	if p.going {
		p.n++
		p.going = p.emit(item{group, kind, obj})
	}
}

// meta is the metadata that an API server and its clients leave on an object.
func (p *people) meta(kind, namespace, name, manager string, labels map[string]string) metav1.ObjectMeta {
	created := metav1.NewTime(born.Add(time.Duration(p.n) * 7 * time.Second))
	return metav1.ObjectMeta{
		Name: name, Namespace: namespace, UID: uid(kind, namespace, name), CreationTimestamp: created, Labels: labels,
		ManagedFields: []metav1.ManagedFieldsEntry{{
			Manager: manager, Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: "v1", Time: &created,
			FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(`{"f:metadata":{"f:labels":{".":{},"f:app":{}}}}`),
		}},
	}
}

func (p *people) specMeta(kind, namespace, name, manager string, labels map[string]string) metav1.ObjectMeta {
	m := p.meta(kind, namespace, name, manager, labels)
	m.Generation = 1
	m.ManagedFields[0].FieldsV1 = metav1.NewFieldsV1(specFields)
	return m
}

// specFields is as long as what server-side apply keeps about a pod template,
// which is a good part of such an object's size.
const specFields = `{"f:metadata":{"f:generateName":{},"f:labels":{".":{},"f:app":{},"f:pod-template-hash":{}},"f:ownerReferences":{}},` +
	`"f:spec":{"f:containers":{"k:{\"name\":\"main\"}":{".":{},"f:env":{".":{},"k:{\"name\":\"LOG_LEVEL\"}":{".":{},"f:name":{},"f:value":{}},` +
	`"k:{\"name\":\"POD_NAME\"}":{".":{},"f:name":{},"f:valueFrom":{".":{},"f:fieldRef":{}}}},"f:image":{},"f:imagePullPolicy":{},` +
	`"f:livenessProbe":{".":{},"f:failureThreshold":{},"f:httpGet":{".":{},"f:path":{},"f:port":{},"f:scheme":{}},"f:periodSeconds":{},"f:successThreshold":{},"f:timeoutSeconds":{}},` +
	`"f:name":{},"f:ports":{".":{},"k:{\"containerPort\":8080,\"protocol\":\"TCP\"}":{".":{},"f:containerPort":{},"f:name":{},"f:protocol":{}}},` +
	`"f:resources":{".":{},"f:limits":{".":{},"f:memory":{}},"f:requests":{".":{},"f:cpu":{},"f:memory":{}}},"f:terminationMessagePath":{},"f:terminationMessagePolicy":{}}},` +
	`"f:dnsPolicy":{},"f:enableServiceLinks":{},"f:restartPolicy":{},"f:schedulerName":{},"f:securityContext":{},"f:serviceAccount":{},"f:serviceAccountName":{},"f:terminationGracePeriodSeconds":{}}}`

func uid(kind, namespace, name string) types.UID {
	return types.UID(uuid.NewSHA1(uidSpace, []byte(kind+"/"+namespace+"/"+name)).String())
}

func owned(m metav1.ObjectMeta, apiVersion, kind, name string) metav1.ObjectMeta {
	m.OwnerReferences = []metav1.OwnerReference{{
		APIVersion: apiVersion, Kind: kind, Name: name, UID: uid(kind, m.Namespace, name), Controller: new(true), BlockOwnerDeletion: new(true),
	}}
	return m
}

// suffix is five characters as controllers append them to names.
func (p *people) suffix(n int) string {
	const letters = "bcdfghjklmnpqrstvwxz2456789" // apimachinery, util/rand
	var b strings.Builder
	for range n {
		b.WriteByte(letters[p.rng.IntN(len(letters))])
	}
	return b.String()
}

func labelled(app string) map[string]string { return map[string]string{"app": app} }

func (p *people) namespace(name string) {
	m := p.meta("Namespace", "", name, "kubectl-create", map[string]string{"kubernetes.io/metadata.name": name})
	p.put("", "Namespace", &corev1.Namespace{ObjectMeta: m,
		Spec: corev1.NamespaceSpec{Finalizers: []corev1.FinalizerName{corev1.FinalizerKubernetes}}, Status: corev1.NamespaceStatus{Phase: corev1.NamespaceActive}})
	p.account(name, "default")
	p.put("", "ConfigMap", &corev1.ConfigMap{ObjectMeta: p.meta("ConfigMap", name, "kube-root-ca.crt", "kube-controller-manager", nil),
		Data: map[string]string{"ca.crt": "-----BEGIN CERTIFICATE-----\nMIIBlab\n-----END CERTIFICATE-----\n"}})
}

func (p *people) account(namespace, name string) {
	p.put("", "ServiceAccount", &corev1.ServiceAccount{ObjectMeta: p.meta("ServiceAccount", namespace, name, "kube-controller-manager", nil)})
}

func (p *people) node(name string, control bool) {
	i := len(p.nodes)
	p.nodes = append(p.nodes, name)
	labels := map[string]string{
		"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
		"topology.kubernetes.io/zone": "zone-" + string(rune('a'+i%3)),
	}
	spec := corev1.NodeSpec{PodCIDR: fmt.Sprintf("10.%d.%d.0/24", 224+i/256%32, i%256), ProviderID: "lab://" + name}
	spec.PodCIDRs = []string{spec.PodCIDR}
	if control {
		labels["node-role.kubernetes.io/control-plane"] = ""
		spec.Taints = []corev1.Taint{{Key: "node-role.kubernetes.io/control-plane", Effect: corev1.TaintEffectNoSchedule}}
	}
	size := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("16"), corev1.ResourceMemory: resource.MustParse("64Gi"), corev1.ResourcePods: resource.MustParse("110")}
	p.put("", "Node", &corev1.Node{ObjectMeta: p.meta("Node", "", name, "kubelet", labels), Spec: spec, Status: corev1.NodeStatus{
		Capacity: size, Allocatable: size,
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady", LastHeartbeatTime: metav1.NewTime(born)}},
		Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: p.nodeIP(i)}, {Type: corev1.NodeHostName, Address: name}},
		NodeInfo:   corev1.NodeSystemInfo{KubeletVersion: "v1.37.2", ContainerRuntimeVersion: "containerd://2.3.0", OperatingSystem: "linux", Architecture: "amd64"},
	}})
	p.put("coordination.k8s.io", "Lease", &coordinationv1.Lease{ObjectMeta: p.meta("Lease", "kube-node-lease", name, "kubelet", nil),
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &name, LeaseDurationSeconds: new(int32(40)), RenewTime: &metav1.MicroTime{Time: born}}})
	p.put("storage.k8s.io", "CSINode", &storagev1.CSINode{ObjectMeta: p.meta("CSINode", "", name, "kubelet", nil)})
}

func (p *people) podIP(i int) string {
	return fmt.Sprintf("10.%d.%d.%d", 128+i/(250*250)%96, i/250%250, i%250+1)
}

func (p *people) nodeIP(i int) string { return fmt.Sprintf("172.20.%d.%d", i/250, i%250+1) }

// template is a pod template with what templates usually have.
func template(app, account, image string, labels map[string]string) corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: labels},
		Spec: corev1.PodSpec{
			ServiceAccountName: account, DeprecatedServiceAccount: account,
			RestartPolicy: corev1.RestartPolicyAlways, DNSPolicy: corev1.DNSClusterFirst, SchedulerName: "default-scheduler",
			TerminationGracePeriodSeconds: new(int64(30)), SecurityContext: &corev1.PodSecurityContext{},
			Containers: []corev1.Container{{
				Name: app, Image: image, ImagePullPolicy: corev1.PullIfNotPresent,
				Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}},
				Env:   []corev1.EnvVar{{Name: "LOG_LEVEL", Value: "info"}, {Name: "POD_NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.name"}}}},
				Resources: corev1.ResourceRequirements{
					Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("128Mi")},
					Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("256Mi")},
				},
				LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromString("http"), Scheme: corev1.URISchemeHTTP}},
					PeriodSeconds: 10, TimeoutSeconds: 1, SuccessThreshold: 1, FailureThreshold: 3},
				TerminationMessagePath: corev1.TerminationMessagePathDefault, TerminationMessagePolicy: corev1.TerminationMessageReadFile,
			}},
		},
	}
}

// pod is a running pod of a controller; node -1 lets chance choose.
func (p *people) pod(namespace, name, ownerAPI, ownerKind, owner string, t corev1.PodTemplateSpec, node int) {
	if node < 0 {
		node = controlNodes + p.rng.IntN(max(1, len(p.nodes)-controlNodes))
		node = min(node, len(p.nodes)-1)
	}
	m := p.specMeta("Pod", namespace, name, "kubelet", t.Labels)
	if owner != "" {
		m = owned(m, ownerAPI, ownerKind, owner)
	}
	spec := *t.Spec.DeepCopy()
	spec.NodeName = p.nodes[node]
	spec.EnableServiceLinks = new(true)
	const token = "kube-api-access"
	spec.Volumes = []corev1.Volume{{Name: token, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		DefaultMode: new(int32(0o644)), Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{ExpirationSeconds: new(int64(3607)), Path: "token"}},
			{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "kube-root-ca.crt"}, Items: []corev1.KeyToPath{{Key: "ca.crt", Path: "ca.crt"}}}},
		}}}}}
	spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: token, ReadOnly: true, MountPath: "/var/run/secrets/kubernetes.io/serviceaccount"}}
	spec.Tolerations = append(spec.Tolerations, corev1.Toleration{Key: "node.kubernetes.io/not-ready", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: new(int64(300))})
	p.pods++
	ip := p.podIP(p.pods)
	if spec.HostNetwork {
		ip = p.nodeIP(node)
	}
	started := m.CreationTimestamp
	p.put("", "Pod", &corev1.Pod{ObjectMeta: m, Spec: spec, Status: corev1.PodStatus{
		Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}, HostIP: p.nodeIP(node), StartTime: &started, QOSClass: corev1.PodQOSBurstable,
		Conditions: []corev1.PodCondition{
			{Type: corev1.PodScheduled, Status: corev1.ConditionTrue, LastTransitionTime: started},
			{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: started},
		},
		ContainerStatuses: []corev1.ContainerStatus{{
			Name: spec.Containers[0].Name, Image: spec.Containers[0].Image, Ready: true, Started: new(true),
			ContainerID: "containerd://" + string(m.UID), State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: started}},
		}},
	}})
}

// deployment is a Deployment, its current and its former ReplicaSet, and pods.
func (p *people) deployment(namespace, app, account, image string, replicas int32, labels map[string]string) {
	t := template(app, account, image, labelled(app))
	selector := &metav1.LabelSelector{MatchLabels: labelled(app)}
	m := p.specMeta("Deployment", namespace, app, "kubectl-client-side-apply", labels)
	m.Annotations = map[string]string{"deployment.kubernetes.io/revision": "2"}
	p.put("apps", "Deployment", &appsv1.Deployment{ObjectMeta: m,
		Spec: appsv1.DeploymentSpec{Replicas: &replicas, Selector: selector, Template: t, RevisionHistoryLimit: new(int32(10)), ProgressDeadlineSeconds: new(int32(600)),
			Strategy: appsv1.DeploymentStrategy{Type: appsv1.RollingUpdateDeploymentStrategyType}},
		Status: appsv1.DeploymentStatus{ObservedGeneration: 1, Replicas: replicas, UpdatedReplicas: replicas, ReadyReplicas: replicas, AvailableReplicas: replicas,
			Conditions: []appsv1.DeploymentCondition{{Type: appsv1.DeploymentAvailable, Status: corev1.ConditionTrue, Reason: "MinimumReplicasAvailable"}}},
	})
	for revision, want := range []int32{0, replicas} {
		hash := p.suffix(10)
		name := app + "-" + hash
		t := *t.DeepCopy()
		t.Labels["pod-template-hash"] = hash
		m := owned(p.specMeta("ReplicaSet", namespace, name, "kube-controller-manager", t.Labels), "apps/v1", "Deployment", app)
		m.Annotations = map[string]string{"deployment.kubernetes.io/revision": strconv.Itoa(revision + 1)}
		p.put("apps", "ReplicaSet", &appsv1.ReplicaSet{ObjectMeta: m,
			Spec:   appsv1.ReplicaSetSpec{Replicas: &want, Selector: &metav1.LabelSelector{MatchLabels: t.Labels}, Template: t},
			Status: appsv1.ReplicaSetStatus{ObservedGeneration: 1, Replicas: want, ReadyReplicas: want, AvailableReplicas: want}})
		for range want {
			p.pod(namespace, name+"-"+p.suffix(5), "apps/v1", "ReplicaSet", name, t, -1)
		}
	}
}

// daemonSet runs a pod on every node.
func (p *people) daemonSet(namespace, app, image string, hostNetwork bool) {
	t := template(app, app, image, labelled(app))
	t.Spec.HostNetwork = hostNetwork
	t.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}}
	n := int32(len(p.nodes))
	p.account(namespace, app)
	p.put("apps", "DaemonSet", &appsv1.DaemonSet{ObjectMeta: p.specMeta("DaemonSet", namespace, app, "kubectl-client-side-apply", labelled(app)),
		Spec: appsv1.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchLabels: labelled(app)}, Template: t, RevisionHistoryLimit: new(int32(10)),
			UpdateStrategy: appsv1.DaemonSetUpdateStrategy{Type: appsv1.RollingUpdateDaemonSetStrategyType}},
		Status: appsv1.DaemonSetStatus{ObservedGeneration: 1, CurrentNumberScheduled: n, DesiredNumberScheduled: n, NumberReady: n, NumberAvailable: n, UpdatedNumberScheduled: n}})
	hash := p.suffix(10)
	p.put("apps", "ControllerRevision", &appsv1.ControllerRevision{Revision: 1, Data: runtime.RawExtension{Raw: []byte(`{"spec":{"template":{"$patch":"replace"}}}`)},
		ObjectMeta: owned(p.meta("ControllerRevision", namespace, app+"-"+hash, "kube-controller-manager", labelled(app)), "apps/v1", "DaemonSet", app)})
	t.Labels["controller-revision-hash"] = hash
	for i := range p.nodes {
		p.pod(namespace, app+"-"+p.suffix(5), "apps/v1", "DaemonSet", app, t, i)
	}
}

func (p *people) statefulSet(namespace, app, image string, replicas int32) {
	t := template(app, "default", image, labelled(app))
	p.put("apps", "StatefulSet", &appsv1.StatefulSet{ObjectMeta: p.specMeta("StatefulSet", namespace, app, "helm", labelled(app)),
		Spec: appsv1.StatefulSetSpec{Replicas: &replicas, ServiceName: app, Selector: &metav1.LabelSelector{MatchLabels: labelled(app)}, Template: t,
			PodManagementPolicy: appsv1.OrderedReadyPodManagement, UpdateStrategy: appsv1.StatefulSetUpdateStrategy{Type: appsv1.RollingUpdateStatefulSetStrategyType}},
		Status: appsv1.StatefulSetStatus{ObservedGeneration: 1, Replicas: replicas, ReadyReplicas: replicas, CurrentReplicas: replicas}})
	for i := range replicas {
		name := fmt.Sprintf("%s-%d", app, i)
		claim, volume := "data-"+name, "pvc-"+string(uid("PersistentVolumeClaim", namespace, "data-"+name))
		size := corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("10Gi")}
		p.put("", "PersistentVolumeClaim", &corev1.PersistentVolumeClaim{ObjectMeta: p.meta("PersistentVolumeClaim", namespace, claim, "kube-controller-manager", labelled(app)),
			Spec: corev1.PersistentVolumeClaimSpec{AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, VolumeName: volume, StorageClassName: new("standard"),
				Resources: corev1.VolumeResourceRequirements{Requests: size}},
			Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound, Capacity: size}})
		p.put("", "PersistentVolume", &corev1.PersistentVolume{ObjectMeta: p.meta("PersistentVolume", "", volume, "csi-provisioner", nil),
			Spec: corev1.PersistentVolumeSpec{Capacity: size, StorageClassName: "standard", ClaimRef: &corev1.ObjectReference{Kind: "PersistentVolumeClaim", Namespace: namespace, Name: claim},
				PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "csi.example.com", VolumeHandle: volume}}},
			Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeBound}})
		p.pod(namespace, name, "apps/v1", "StatefulSet", app, t, -1)
	}
}

// service is a Service with its endpoints in both forms.
func (p *people) service(namespace, app string) {
	labels := labelled(app)
	p.services++
	ip := fmt.Sprintf("10.%d.%d.%d", 96+p.services/(250*250)%16, p.services/250%250, p.services%250+1)
	p.put("", "Service", &corev1.Service{ObjectMeta: p.meta("Service", namespace, app, "kubectl-client-side-apply", labels), Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, Selector: labels, SessionAffinity: corev1.ServiceAffinityNone,
		Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080), Protocol: corev1.ProtocolTCP}}}})
	address := p.podIP(p.pods + 1) // of the pod that comes next
	//lint:ignore SA1019 every cluster of today still holds them
	p.put("", "Endpoints", &corev1.Endpoints{ObjectMeta: p.meta("Endpoints", namespace, app, "kube-controller-manager", labels),
		//lint:ignore SA1019 as above
		Subsets: []corev1.EndpointSubset{{Addresses: []corev1.EndpointAddress{{IP: address}}, Ports: []corev1.EndpointPort{{Name: "http", Port: 8080, Protocol: corev1.ProtocolTCP}}}}})
	slice := owned(p.specMeta("EndpointSlice", namespace, app+"-"+p.suffix(5), "kube-controller-manager", map[string]string{discoveryv1.LabelServiceName: app}), "v1", "Service", app)
	p.put("discovery.k8s.io", "EndpointSlice", &discoveryv1.EndpointSlice{ObjectMeta: slice, AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints: []discoveryv1.Endpoint{{Addresses: []string{address}, Conditions: discoveryv1.EndpointConditions{Ready: new(true)}}},
		Ports:     []discoveryv1.EndpointPort{{Name: new("http"), Port: new(int32(8080)), Protocol: new(corev1.ProtocolTCP)}}})
}

func (p *people) event(namespace, kind, name, reason, message string) {
	m := p.meta("Event", namespace, name+"."+p.suffix(16), "kubelet", nil)
	p.put("", "Event", &corev1.Event{ObjectMeta: m, InvolvedObject: corev1.ObjectReference{Kind: kind, Namespace: namespace, Name: name, UID: uid(kind, namespace, name)},
		Reason: reason, Message: message, Type: corev1.EventTypeNormal, Source: corev1.EventSource{Component: "kubelet"},
		FirstTimestamp: m.CreationTimestamp, LastTimestamp: m.CreationTimestamp, Count: 1})
}

func (p *people) autoscaler(namespace, app string, least, most int32) {
	p.put("autoscaling", "HorizontalPodAutoscaler", &autoscalingv2.HorizontalPodAutoscaler{
		ObjectMeta: p.meta("HorizontalPodAutoscaler", namespace, app, "kubectl-client-side-apply", labelled(app)),
		Spec: autoscalingv2.HorizontalPodAutoscalerSpec{MinReplicas: &least, MaxReplicas: most,
			ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{APIVersion: "apps/v1", Kind: "Deployment", Name: app},
			Metrics: []autoscalingv2.MetricSpec{{Type: autoscalingv2.ResourceMetricSourceType, Resource: &autoscalingv2.ResourceMetricSource{
				Name: corev1.ResourceCPU, Target: autoscalingv2.MetricTarget{Type: autoscalingv2.UtilizationMetricType, AverageUtilization: new(int32(70))}}}}},
		Status: autoscalingv2.HorizontalPodAutoscalerStatus{CurrentReplicas: least, DesiredReplicas: least},
	})
}

func (p *people) binding(namespace, name, role string, subjects ...rbacv1.Subject) {
	p.put(rbacv1.GroupName, "RoleBinding", &rbacv1.RoleBinding{ObjectMeta: p.meta("RoleBinding", namespace, name, "kubectl-client-side-apply", nil),
		Subjects: subjects, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role}})
}

func (p *people) clusterBinding(name, role string, subjects ...rbacv1.Subject) {
	p.put(rbacv1.GroupName, "ClusterRoleBinding", &rbacv1.ClusterRoleBinding{ObjectMeta: p.meta("ClusterRoleBinding", "", name, "kubectl-client-side-apply", nil),
		Subjects: subjects, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role}})
}

func (p *people) clusterRole(name string, rules ...rbacv1.PolicyRule) {
	p.put(rbacv1.GroupName, "ClusterRole", &rbacv1.ClusterRole{ObjectMeta: p.meta("ClusterRole", "", name, "kubectl-client-side-apply", nil), Rules: rules})
}

func account(namespace, name string) rbacv1.Subject {
	return rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: namespace, Name: name}
}

func group(name string) rbacv1.Subject {
	return rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: name}
}

// cluster is what every cluster has.
func (p *people) cluster() {
	for _, ns := range []string{"default", "kube-system", "kube-public", "kube-node-lease", offenderNamespace, "shop", "batch"} {
		p.namespace(ns)
	}
	for _, leader := range []string{"kube-controller-manager", "kube-scheduler"} {
		p.put("coordination.k8s.io", "Lease", &coordinationv1.Lease{ObjectMeta: p.meta("Lease", "kube-system", leader, leader, nil),
			Spec: coordinationv1.LeaseSpec{HolderIdentity: new("cp-1_" + string(uid("Lease", "kube-system", leader))), LeaseDurationSeconds: new(int32(15)),
				RenewTime: &metav1.MicroTime{Time: born}}})
	}
	all := rbacv1.PolicyRule{Verbs: []string{"*"}, APIGroups: []string{"*"}, Resources: []string{"*"}}
	read := rbacv1.PolicyRule{Verbs: []string{"get", "list", "watch"}, APIGroups: []string{""}, Resources: []string{"pods", "services", "configmaps"}}
	p.clusterRole("cluster-admin", all)
	p.clusterRole("view", read)
	p.clusterBinding("cluster-admin", "cluster-admin", group("system:masters"))
	p.clusterBinding("system:node-proxier", "system:node-proxier", account("kube-system", "kube-proxy"))
	p.deployment("kube-system", "coredns", "coredns", "registry.example.com/coredns:v1.14.0", 2, labelled("coredns"))
	p.account("kube-system", "coredns")
	p.service("kube-system", "kube-dns")
	p.daemonSet("kube-system", "kube-proxy", "registry.example.com/kube-proxy:v1.37.2", true)
	p.daemonSet("kube-system", "cilium", "registry.example.com/cilium:v1.20.0", true)
	p.service("default", "kubernetes")
	for _, level := range []string{"system-cluster-critical", "system-node-critical"} {
		p.put("scheduling.k8s.io", "PriorityClass", &schedulingv1.PriorityClass{ObjectMeta: p.meta("PriorityClass", "", level, "kube-apiserver", nil), Value: 2_000_000_000})
	}
	p.put("storage.k8s.io", "StorageClass", &storagev1.StorageClass{ObjectMeta: p.meta("StorageClass", "", "standard", "kubectl-client-side-apply", nil), Provisioner: "csi.example.com"})
	for _, v := range []string{"v1.", "v1.apps", "v1.batch"} {
		version, group, _ := strings.Cut(v, ".")
		p.put("apiregistration.k8s.io", "APIService", &apiregistrationv1.APIService{ObjectMeta: p.meta("APIService", "", v, "kube-apiserver", map[string]string{"kube-aggregator.kubernetes.io/automanaged": "onstart"}),
			Spec: apiregistrationv1.APIServiceSpec{Group: group, Version: version, GroupPriorityMinimum: 17800, VersionPriority: 15}})
	}
	fail := admissionv1.Fail
	none := admissionv1.SideEffectClassNone
	p.put("admissionregistration.k8s.io", "ValidatingWebhookConfiguration", &admissionv1.ValidatingWebhookConfiguration{
		ObjectMeta: p.specMeta("ValidatingWebhookConfiguration", "", "policy-guard", "helm", nil),
		Webhooks: []admissionv1.ValidatingWebhook{{Name: "guard.example.com", FailurePolicy: &fail, SideEffects: &none, AdmissionReviewVersions: []string{"v1"}, TimeoutSeconds: new(int32(10)),
			ClientConfig: admissionv1.WebhookClientConfig{Service: &admissionv1.ServiceReference{Namespace: "shop", Name: "guard", Path: new("/validate")}}}},
	})
}

// offender is the telemetry service whose agents run expensive calls on every
// node, with rights from three bindings.
func (p *people) offender() {
	p.daemonSet(offenderNamespace, offenderName, "registry.example.com/telemetry/collector:v2.4.0", false)
	p.clusterRole("telemetry-collector", rbacv1.PolicyRule{Verbs: []string{"list", "watch"}, APIGroups: []string{"", "apps", "batch"}, Resources: []string{"*"}})
	p.clusterBinding("telemetry-collector", "telemetry-collector", account(offenderNamespace, offenderName))
	p.binding(offenderNamespace, "collector-config", "view", account(offenderNamespace, offenderName))
	p.binding("shop", "telemetry-readers", "view",
		group("shop-operators"), account(offenderNamespace, offenderName), account("shop", "web"))
	for _, name := range []string{"collector-config", "collector-dashboards"} {
		p.put("", "ConfigMap", &corev1.ConfigMap{ObjectMeta: p.meta("ConfigMap", offenderNamespace, name, "kubectl-client-side-apply", labelled(offenderName)),
			Data: map[string]string{"config.yaml": "interval: 10s\nresources: [pods, nodes, events]\n"}})
	}
}

// runaway is one of the ConfigMaps that the offender piles up.
func (p *people) runaway(i int) {
	name := fmt.Sprintf("collector-checkpoint-%05d", i)
	p.put("", "ConfigMap", &corev1.ConfigMap{ObjectMeta: p.meta("ConfigMap", offenderNamespace, name, "collector", labelled(runawayApp)),
		Data: map[string]string{"offset": strconv.Itoa(i * 4096), "node": p.nodes[i%len(p.nodes)]}})
}

// fixtures are workloads with names of their own: one of each kind that can be
// scaled, and what fights a change.
func (p *people) fixtures() {
	p.account("shop", "web")
	p.deployment("shop", "web", "web", "registry.example.com/shop/web:v7", 3, map[string]string{"app": "web", "app.kubernetes.io/managed-by": "Helm"})
	p.autoscaler("shop", "web", 2, 10)
	p.service("shop", "web")
	p.deployment("shop", "checkout", "default", "registry.example.com/shop/checkout:v3", 2, map[string]string{"app": "checkout", "argocd.argoproj.io/instance": "shop"})
	p.statefulSet("shop", "orders-db", "registry.example.com/postgres:18", 3)
	p.put("policy", "PodDisruptionBudget", &policyv1.PodDisruptionBudget{ObjectMeta: p.specMeta("PodDisruptionBudget", "shop", "web", "kubectl-client-side-apply", nil),
		Spec: policyv1.PodDisruptionBudgetSpec{MinAvailable: new(intstr.FromInt32(2)), Selector: &metav1.LabelSelector{MatchLabels: labelled("web")}}})
	p.put("networking.k8s.io", "Ingress", &networkingv1.Ingress{ObjectMeta: p.specMeta("Ingress", "shop", "web", "kubectl-client-side-apply", nil),
		Spec: networkingv1.IngressSpec{IngressClassName: new("public"), DefaultBackend: &networkingv1.IngressBackend{
			Service: &networkingv1.IngressServiceBackend{Name: "web", Port: networkingv1.ServiceBackendPort{Name: "http"}}}}})
	p.put("networking.k8s.io", "NetworkPolicy", &networkingv1.NetworkPolicy{ObjectMeta: p.specMeta("NetworkPolicy", "shop", "default-deny", "kubectl-client-side-apply", nil),
		Spec: networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}}})
	p.put("", "ResourceQuota", &corev1.ResourceQuota{ObjectMeta: p.meta("ResourceQuota", "shop", "compute", "kubectl-create", nil),
		Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourcePods: resource.MustParse("200")}}})
	p.put("", "ReplicationController", &corev1.ReplicationController{ObjectMeta: p.specMeta("ReplicationController", "shop", "legacy", "kubectl-create", labelled("legacy")),
		Spec: corev1.ReplicationControllerSpec{Replicas: new(int32(1)), Selector: labelled("legacy"), Template: new(template("legacy", "default", "registry.example.com/shop/legacy:v1", labelled("legacy")))}})

	job := template("import", "default", "registry.example.com/batch/import:v1", map[string]string{"job-name": "import"})
	job.Spec.RestartPolicy = corev1.RestartPolicyNever
	p.put("batch", "CronJob", &batchv1.CronJob{ObjectMeta: p.specMeta("CronJob", "batch", "nightly", "kubectl-client-side-apply", nil),
		Spec: batchv1.CronJobSpec{Schedule: "0 3 * * *", ConcurrencyPolicy: batchv1.ForbidConcurrent, Suspend: new(false),
			JobTemplate: batchv1.JobTemplateSpec{Spec: batchv1.JobSpec{Template: job}}}})
	p.put("batch", "Job", &batchv1.Job{ObjectMeta: p.specMeta("Job", "batch", "import", "kubectl-create", nil),
		Spec:   batchv1.JobSpec{Parallelism: new(int32(4)), Completions: new(int32(100)), BackoffLimit: new(int32(6)), Suspend: new(false), Template: job},
		Status: batchv1.JobStatus{Active: 1}})
	p.pod("batch", "import-"+p.suffix(5), "batch/v1", "Job", "import", job, -1)

	p.put("apiextensions.k8s.io", "CustomResourceDefinition", cacheCRD())
	for _, name := range []string{"sessions", "prices", "images"} {
		c := &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "platform.example.com/v1", "kind": "Cache",
			"metadata": map[string]any{"name": name, "namespace": "shop", "uid": string(uid("Cache", "shop", name)), "generation": int64(1),
				"creationTimestamp": born.Format(time.RFC3339), "labels": map[string]any{"app": name}},
			"spec":   map[string]any{"replicas": int64(3), "memory": "4Gi", "evictionPolicy": map[string]any{"kind": "lru", "ratio": 0.25}},
			"status": map[string]any{"replicas": int64(3)},
		}}
		p.put("platform.example.com", "Cache", c)
	}
}

// cacheCRD defines a custom kind that can be scaled.
func cacheCRD() *apiextensionsv1.CustomResourceDefinition {
	names := apiextensionsv1.CustomResourceDefinitionNames{Plural: "caches", Singular: "cache", Kind: "Cache", ListKind: "CacheList", ShortNames: []string{"ca"}}
	return &apiextensionsv1.CustomResourceDefinition{
		ObjectMeta: metav1.ObjectMeta{Name: "caches.platform.example.com", UID: uid("CustomResourceDefinition", "", "caches.platform.example.com"), Generation: 1, CreationTimestamp: metav1.NewTime(born)},
		Spec: apiextensionsv1.CustomResourceDefinitionSpec{Group: "platform.example.com", Names: names, Scope: apiextensionsv1.NamespaceScoped,
			Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{Name: "v1", Served: true, Storage: true,
				Schema: &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &apiextensionsv1.JSONSchemaProps{Type: "object", XPreserveUnknownFields: new(true)}},
				Subresources: &apiextensionsv1.CustomResourceSubresources{Status: &apiextensionsv1.CustomResourceSubresourceStatus{},
					Scale: &apiextensionsv1.CustomResourceSubresourceScale{SpecReplicasPath: ".spec.replicas", StatusReplicasPath: ".status.replicas"}}}}},
		Status: apiextensionsv1.CustomResourceDefinitionStatus{AcceptedNames: names, StoredVersions: []string{"v1"},
			Conditions: []apiextensionsv1.CustomResourceDefinitionCondition{{Type: apiextensionsv1.Established, Status: apiextensionsv1.ConditionTrue, Reason: "InitialNamesAccepted"}}},
	}
}

// application is what a team deploys: about a dozen objects and its pods.
func (p *people) application(namespace, app string) {
	p.account(namespace, app)
	p.put("", "ConfigMap", &corev1.ConfigMap{ObjectMeta: p.meta("ConfigMap", namespace, app, "helm", labelled(app)),
		Data: map[string]string{"config.yaml": "listen: :8080\nlogLevel: info\nfeatures:\n" + strings.Repeat("  - feature-flag\n", p.rng.IntN(40))}})
	p.put("", "Secret", &corev1.Secret{ObjectMeta: p.meta("Secret", namespace, app, "helm", labelled(app)), Type: corev1.SecretTypeOpaque,
		Data: map[string][]byte{"password": []byte(p.suffix(24))}})
	p.service(namespace, app)
	replicas := 1 + p.rng.Int32N(6)
	p.deployment(namespace, app, app, "registry.example.com/"+namespace+"/"+app+":v"+strconv.Itoa(1+p.rng.IntN(40)), replicas, labelled(app))
	p.event(namespace, "Deployment", app, "ScalingReplicaSet", "Scaled up replica set")
	if p.rng.IntN(3) == 0 {
		p.autoscaler(namespace, app, replicas, replicas*3)
	}
	if p.rng.IntN(4) == 0 {
		p.put("policy", "PodDisruptionBudget", &policyv1.PodDisruptionBudget{ObjectMeta: p.specMeta("PodDisruptionBudget", namespace, app, "helm", labelled(app)),
			Spec: policyv1.PodDisruptionBudgetSpec{MaxUnavailable: new(intstr.FromInt32(1)), Selector: &metav1.LabelSelector{MatchLabels: labelled(app)}}})
	}
	p.binding(namespace, app, "view", account(namespace, app), group(namespace+"-developers"))
}
