package storage

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	kjson "sigs.k8s.io/json"

	"github.com/halligan-io/halligan/internal/fault"
)

// Format is how the bytes of a stored value are encoded.
type Format int

// The formats that an API server writes.
const (
	// Protobuf is the envelope of built-in kinds: a magic number, then
	// runtime.Unknown (apimachinery pkg/runtime/serializer/protobuf).
	Protobuf Format = iota + 1
	// JSON is the form of custom resources, of CustomResourceDefinitions and of
	// APIServices, and of everything under --storage-media-type=application/json.
	JSON
	// CBOR begins with its self-described tag (RFC 8949, 3.4.6). It is alpha in
	// Kubernetes; Halligan recognises it to refuse it.
	CBOR
)

// String returns the format's name.
func (f Format) String() string {
	switch f {
	case Protobuf:
		return "protobuf"
	case JSON:
		return "JSON"
	case CBOR:
		return "CBOR"
	}
	return "unknown"
}

var (
	protobufMagic = []byte("k8s\x00")
	cborMagic     = []byte{0xd9, 0xd9, 0xf7}
	// encryptedPrefix begins every value written by an encryption provider
	// other than identity (apiserver pkg/server/options/encryptionconfig).
	encryptedPrefix = []byte("k8s:enc:")
)

// formatOf recognises the format by the first bytes, 0 for none.
func formatOf(plain []byte) Format {
	switch {
	case bytes.HasPrefix(plain, protobufMagic):
		return Protobuf
	case bytes.HasPrefix(plain, cborMagic):
		return CBOR
	case bytes.HasPrefix(bytes.TrimLeft(plain, " \t\r\n"), []byte("{")):
		return JSON
	}
	return 0
}

// Object is a stored value of which the envelope and the metadata are decoded.
// It keeps the bytes that it was decoded from; they must not be changed.
type Object struct {
	Format           Format
	APIVersion, Kind string
	// Meta is the object's metadata. Field 1 is ObjectMeta in every kind that an
	// API server stores, so kinds that this build does not know have it too. It
	// has no managedFields: they are a good part of a usual value, and an
	// inventory needs none.
	Meta metav1.ObjectMeta

	plain []byte
	// raw is the message inside the protobuf envelope; nil for JSON.
	raw []byte
}

const nextUndecodable = "look at the stored bytes with etcdctl get --print-value-only; nothing was changed"

func undecodable(format string, args ...any) error {
	return fault.New(fault.Undecodable, nextUndecodable, format, args...)
}

// Decode reads the envelope and the metadata of a decrypted value. It decodes
// nothing else, so that an inventory of all objects is cheap, and it never
// panics, whatever the bytes are. Every error is fault.Undecodable.
func Decode(plain []byte) (*Object, error) {
	o := &Object{Format: formatOf(plain), plain: plain}
	switch o.Format {
	case Protobuf:
		if err := o.decodeProtobuf(); err != nil {
			return nil, err
		}
	case JSON:
		var head struct {
			APIVersion string            `json:"apiVersion"`
			Kind       string            `json:"kind"`
			Metadata   metav1.ObjectMeta `json:"metadata"`
		}
		if err := kjson.UnmarshalCaseSensitivePreserveInts(plain, &head); err != nil {
			return nil, undecodable("the stored value is not a readable JSON object")
		}
		head.Metadata.ManagedFields = nil
		o.APIVersion, o.Kind, o.Meta = head.APIVersion, head.Kind, head.Metadata
	case CBOR:
		return nil, fault.New(fault.Undecodable, "read and change it through the API server, or turn off the alpha feature CBORServingAndStorage",
			"the value is stored as CBOR, which Halligan does not edit")
	default:
		if bytes.HasPrefix(plain, encryptedPrefix) {
			return nil, fault.New(fault.Undecodable, "give the agent the cluster's EncryptionConfiguration",
				"the stored value is still encrypted")
		}
		return nil, undecodable("the stored value (%d bytes) has no envelope that Kubernetes writes", len(plain))
	}
	if o.APIVersion == "" || o.Kind == "" {
		return nil, undecodable("the stored value does not say its apiVersion and kind")
	}
	return o, nil
}

// decodeProtobuf reads runtime.Unknown (apimachinery pkg/runtime/generated.proto)
// as its generated decoder does: embedded messages merge, else the last wins.
func (o *Object) decodeProtobuf() error {
	var typeMeta runtime.TypeMeta
	var encoding, contentType []byte
	whole := false
	err := each(o.plain, len(protobufMagic), len(o.plain), func(f wireField) error {
		if f.num <= 4 && f.typ != bytesType {
			return fmt.Errorf("field %d has wire type %d", f.num, f.typ)
		}
		payload := o.plain[f.value:f.end]
		switch f.num {
		case 1:
			return typeMeta.Unmarshal(payload)
		case rawField:
			o.raw, whole = payload, true
		case 3:
			encoding = payload
		case 4:
			contentType = payload
		}
		return nil
	})
	if err != nil {
		return undecodable("the protobuf envelope is damaged: %v", err)
	}
	if !whole {
		return undecodable("the protobuf envelope is empty")
	}
	if len(encoding) > 0 || (len(contentType) > 0 && string(contentType) != runtime.ContentTypeProtobuf) {
		return undecodable("the protobuf envelope has content encoding %q and type %q, which no API server writes", encoding, contentType)
	}
	o.APIVersion, o.Kind = typeMeta.APIVersion, typeMeta.Kind
	err = each(o.raw, 0, len(o.raw), func(f wireField) error {
		switch {
		case f.num != 1:
			return nil
		case f.typ != bytesType:
			return errors.New("it has no metadata")
		}
		return o.decodeMeta(o.raw[f.value:f.end])
	})
	if err != nil {
		return undecodable("the stored object is damaged: %v", err)
	}
	return nil
}

// managedFields is a field of ObjectMeta (apimachinery
// pkg/apis/meta/v1/generated.proto).
const managedFields protowire.Number = 17

func (o *Object) decodeMeta(data []byte) error {
	return unmarshalBut(&o.Meta, data, managedFields, func([]byte) error { return nil })
}

// wholeMeta decodes the metadata with its managedFields.
func (o *Object) wholeMeta() (metav1.ObjectMeta, error) {
	var whole metav1.PartialObjectMetadata
	var err error
	if o.Format == JSON {
		err = kjson.UnmarshalCaseSensitivePreserveInts(o.plain, &whole)
	} else {
		err = whole.Unmarshal(o.raw)
	}
	if err != nil {
		return metav1.ObjectMeta{}, undecodable("the metadata is damaged")
	}
	return whole.ObjectMeta, nil
}

// ManagedFields returns metadata.managedFields, which Meta does not have.
func (o *Object) ManagedFields() ([]metav1.ManagedFieldsEntry, error) {
	m, err := o.wholeMeta()
	return m.ManagedFields, err
}

// Plain returns the bytes that the object was decoded from.
func (o *Object) Plain() []byte { return o.plain }

// GroupVersionKind returns the type that the value says it has.
func (o *Object) GroupVersionKind() schema.GroupVersionKind {
	return schema.FromAPIVersionAndKind(o.APIVersion, o.Kind)
}

// Check compares what the value says of itself with the key that it was read
// from. A difference is fault.Undecodable: whoever wrote the value did not
// follow Kubernetes' rules, and an edit would be a guess.
func (o *Object) Check(k *Kind, namespace, name string) error {
	if err := o.checkKind(k); err != nil {
		return err
	}
	if o.Meta.Namespace != namespace || o.Meta.Name != name {
		return undecodable("the key belongs to %q in namespace %q, but the value under it is %q in namespace %q",
			name, namespace, o.Meta.Name, o.Meta.Namespace)
	}
	return nil
}

// cohabitant names, for a group, another whose objects lie under the same keys
// (kubernetes pkg/kubeapiserver/default_storage_factory_builder.go). An object
// that was never written again since the move still has the old group.
var cohabitant = map[string]string{
	"apps": "extensions", "networking.k8s.io": "extensions", "events.k8s.io": corev1.GroupName,
}

func cohabit(group, other string) bool {
	former, ok := cohabitant[group]
	return ok && former == other
}

func (o *Object) checkKind(k *Kind) error {
	gvk := o.GroupVersionKind()
	if gvk.Kind != k.Kind || !(gvk.Group == k.Group || cohabit(k.Group, gvk.Group) || cohabit(gvk.Group, k.Group)) {
		return undecodable("the key belongs to %q, but the value under it is %q",
			schema.GroupKind{Group: k.Group, Kind: k.Kind}, gvk.GroupKind())
	}
	return nil
}

// document opens the object for reading or editing single fields.
func (o *Object) document() (document, error) {
	if o.Format == Protobuf {
		return &wireDocument{data: o.plain}, nil
	}
	return openJSON(o.plain)
}

func (o *Object) get(f Field, entry string) (json.RawMessage, error) {
	d, err := o.document()
	if err != nil {
		return nil, err
	}
	raw, err := d.get(f, entry)
	if isNull(raw) {
		raw = nil
	}
	return raw, err
}

// Int returns the value of an integer field. An absent field has present false
// and value 0, whatever default the API server would put in its place.
func (o *Object) Int(f Field) (v int64, present bool, err error) {
	raw, err := o.get(f, "")
	if raw == nil || err != nil {
		return 0, false, err
	}
	if v, err = strconv.ParseInt(string(raw), 10, 64); err != nil {
		return 0, false, undecodable("%s is not an integer", pathString(f.JSON, ""))
	}
	return v, true, nil
}

// Bool returns the value of a boolean field; absent is present false.
func (o *Object) Bool(f Field) (v, present bool, err error) {
	raw, err := o.get(f, "")
	if raw == nil || err != nil {
		return false, false, err
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return false, false, undecodable("%s is neither true nor false", pathString(f.JSON, ""))
	}
	return v, true, nil
}

// Entry returns the value under key in a map of strings.
func (o *Object) Entry(f Field, key string) (v string, present bool, err error) {
	raw, err := o.get(f, key)
	if raw == nil || err != nil {
		return "", false, err
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return "", false, undecodable("%s is not a string", pathString(f.JSON, key))
	}
	return v, true, nil
}

// Subjects returns the subjects of a binding in the order in which they are
// stored, which is the order that Edit.Index counts in.
func (o *Object) Subjects(f Field) ([]rbacv1.Subject, error) {
	d, err := o.document()
	if err != nil {
		return nil, err
	}
	elements, err := d.elements(f)
	if err != nil {
		return nil, err
	}
	subjects := make([]rbacv1.Subject, len(elements))
	for i, e := range elements {
		text, _, err := d.show(e)
		if err == nil {
			err = kjson.UnmarshalCaseSensitivePreserveInts(text, &subjects[i])
		}
		if err != nil {
			return nil, undecodable("%s[%d] cannot be read", pathString(f.JSON, ""), i)
		}
	}
	return subjects, nil
}

// Names returns the names of a list's elements, of which each has a Named field, in
// the order in which they are stored.
func (o *Object) Names(f Field) ([]string, error) {
	d, err := o.document()
	if err != nil {
		return nil, err
	}
	return d.names(f)
}
