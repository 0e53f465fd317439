package storage

import (
	"bytes"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	kubescheme "k8s.io/client-go/kubernetes/scheme"

	"github.com/halligan-io/halligan/internal/fault"
)

// EncodeTyped returns the bytes that an API server would store for an object:
// the protobuf envelope for built-in kinds, JSON for
// CustomResourceDefinitions, APIServices and unstructured objects. The version
// is that of the object's Go package; it is for seeding labs and tests, since a
// running API server chooses its storage version itself.
func EncodeTyped(obj runtime.Object) ([]byte, error) {
	var out bytes.Buffer
	if _, ok := obj.(runtime.Unstructured); ok {
		err := unstructured.UnstructuredJSONScheme.Encode(obj, &out)
		return out.Bytes(), err
	}
	var encoder runtime.Encoder = protobuf.NewSerializer(kubescheme.Scheme, kubescheme.Scheme)
	kinds, _, err := kubescheme.Scheme.ObjectKinds(obj)
	if err != nil {
		encoder = json.NewSerializerWithOptions(json.DefaultMetaFactory, aggregated(), aggregated(), json.SerializerOptions{})
		if kinds, _, err = aggregated().ObjectKinds(obj); err != nil {
			return nil, fault.New(fault.Usage, "use a type of k8s.io/api, or an unstructured object", "%T has no stored form: %w", obj, err)
		}
	}
	obj = obj.DeepCopyObject()
	obj.GetObjectKind().SetGroupVersionKind(kinds[0])
	err = encoder.Encode(obj, &out)
	return out.Bytes(), err
}
