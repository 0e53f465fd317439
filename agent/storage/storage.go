// Package storage reads and edits objects as Kubernetes stores them in etcd:
// which key a kind's objects have, what the bytes of a value are, and how one
// field of it is changed without touching any other byte.
//
// Values are edited on the wire. They are never decoded into a typed object and
// encoded again, since that loses every field that this build does not know.
// Decoding into types serves display, and the check after an edit that exactly
// the intended fields changed.
//
// This package must never talk to etcd or write a file; it only turns bytes
// into bytes. It stands on floor 4, below agent/action.
package storage

import "google.golang.org/protobuf/encoding/protowire"

// DefaultPrefix is the key prefix of a stock API server (--etcd-prefix).
const DefaultPrefix = "/registry"

// MaxRequestBytes is etcd's default limit of a request (--max-request-bytes,
// server/embed/config.go: DefaultMaxRequestBytes, 1.5 MiB). An edit that makes a
// value larger than this less some room for the key is refused before etcd is
// asked.
const MaxRequestBytes = 1536 * 1024

// StopLabel is the node selector entry that no node matches: how a DaemonSet is
// brought to nothing.
const StopLabel = "halligan.io/stopped"

// FieldName names a field that Halligan can change, the same for all kinds.
type FieldName string

// The fields that have edit rows.
const (
	Replicas      FieldName = "replicas"      // int
	Suspend       FieldName = "suspend"       // bool: Job, CronJob
	Parallelism   FieldName = "parallelism"   // int: Job
	NodeSelector  FieldName = "nodeSelector"  // map of strings in a DaemonSet's pod template
	Subjects      FieldName = "subjects"      // list of messages: RoleBinding, ClusterRoleBinding
	Generation    FieldName = "generation"    // int: metadata.generation
	Paused        FieldName = "paused"        // bool: Deployment; custom kinds with spec.paused or spec.suspend
	Unschedulable FieldName = "unschedulable" // bool: Node
	MinReplicas   FieldName = "minReplicas"   // int: HorizontalPodAutoscaler
	MaxReplicas   FieldName = "maxReplicas"   // int: HorizontalPodAutoscaler
	FailurePolicy FieldName = "failurePolicy" // of each webhook by its name: webhook configurations
	Labels        FieldName = "labels"        // map of strings: metadata.labels, in every kind
	Annotations   FieldName = "annotations"   // map of strings: metadata.annotations, in every kind
)

// FieldType says how a field is encoded.
type FieldType int

// The types of fields.
const (
	Int   FieldType = iota + 1 // varint; JSON number
	Bool                       // varint; JSON true, false
	Map                        // map<string,string> entries
	List                       // repeated messages
	Named                      // a string in each of repeated messages, which their name tells apart
)

// Field is the place of a field inside an object.
type Field struct {
	Type FieldType
	// JSON is the path in the JSON form, such as spec, replicas.
	JSON []string
	// Wire is the same path as protobuf field numbers inside runtime.Unknown's
	// raw; nil for kinds that are stored as JSON. Of what is Named, both begin
	// with the list, which lies at the top, and their elements have their name as
	// "name", field 1.
	Wire []protowire.Number
}

// Who carries a change out.
const (
	ControllerManager = "kube-controller-manager"
	Kubelet           = "kubelet"
	Operator          = "operator" // of a custom kind, if there is one
)

// Kind is a row of the kind table: how one kind is named, where its objects lie
// and which fields can be edited.
type Kind struct {
	Group, Version, Kind string
	Plural, Singular     string
	ShortNames           []string
	Namespaced           bool
	// Dir is the part of the key between prefix and namespace or name, such as
	// deployments or services/specs.
	Dir string
	// Custom says that a CustomResourceDefinition defines the kind: objects are
	// JSON.
	Custom bool
	// Generation says that the API server counts metadata.generation up when
	// the spec changes.
	Generation bool
	// annotated says that it does so when the annotations changed, too
	// (pkg/registry/apps/deployment/strategy.go).
	annotated bool
	// youngGeneration says that it does so only since one of the releases 1.28
	// to 1.37: an object without a generation is left without.
	youngGeneration bool
	// Authority says that objects of the kind give rights, vouch for identities
	// or decide what the API server admits or where it sends requests. To put
	// one back adds authority.
	Authority bool
	// Forbids says that objects of the kind refuse or limit what others do: with
	// one less more is allowed. That is no adding of authority, since taking such
	// an object away can be the rescue; it is told to who does it.
	Forbids bool
	// PodTemplate says that objects of the kind hold what pods are made of, or
	// are pods. Of custom kinds it is not known, and so false.
	PodTemplate bool
	// Carrier is who makes or ends pods when an object of the kind changes:
	// ControllerManager, Kubelet, Operator, or "" where a change has its effect
	// by being seen.
	Carrier string
	// Fields holds the edit rows; of a custom kind, those of the version that
	// it is stored as now. An edit asks Kind.Field, which goes by the version
	// that the object at hand has.
	Fields map[FieldName]Field

	state *state // nil for kinds whose lists show none

	// versions holds the edit rows by apiVersion: of a custom kind its own for
	// each version, of a native kind nil for each further one that Fields fits.
	versions map[string]map[FieldName]Field
}
