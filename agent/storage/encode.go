package storage

import (
	"bytes"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"

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
	kinds, _, err := types().ObjectKinds(obj)
	if err != nil {
		return nil, fault.New(fault.Usage, "use a type of k8s.io/api, or an unstructured object", "%T has no stored form: %w", obj, err)
	}
	obj = obj.DeepCopyObject()
	obj.GetObjectKind().SetGroupVersionKind(kinds[0])
	var encoder runtime.Encoder = protobuf.NewSerializer(types(), types())
	switch kinds[0].Group {
	case apiextensionsv1.GroupName, apiregistrationv1.GroupName:
		encoder = json.NewSerializerWithOptions(json.DefaultMetaFactory, types(), types(), json.SerializerOptions{})
	}
	err = encoder.Encode(obj, &out)
	return out.Bytes(), err
}
