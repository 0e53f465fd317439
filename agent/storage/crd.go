package storage

import (
	"encoding/json"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/halligan-io/halligan/internal/fault"
)

// storedCRD is the part of a CustomResourceDefinition that says where its
// objects lie. It reads both forms that etcd may hold: API servers accept
// v1 but store v1beta1 (kubernetes, pkg/controlplane/apiserver/apiextensions.go),
// and in v1beta1 what is the same in all versions stands once, in spec itself.
type storedCRD struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Spec       struct {
		Group        string           `json:"group"`
		Scope        string           `json:"scope"`
		Names        crdNames         `json:"names"`
		Version      string           `json:"version"`
		Subresources *crdSubresources `json:"subresources"`
		Validation   *crdSchema       `json:"validation"`
		Versions     []struct {
			Name         string           `json:"name"`
			Storage      bool             `json:"storage"`
			Subresources *crdSubresources `json:"subresources"`
			Schema       *crdSchema       `json:"schema"`
		} `json:"versions"`
	} `json:"spec"`
	Status struct {
		AcceptedNames crdNames `json:"acceptedNames"`
	} `json:"status"`
}

type crdNames struct {
	Plural     string   `json:"plural"`
	Singular   string   `json:"singular"`
	Kind       string   `json:"kind"`
	ShortNames []string `json:"shortNames"`
}

type crdSubresources struct {
	Scale *struct {
		SpecReplicasPath string `json:"specReplicasPath"`
	} `json:"scale"`
}

// crdSchema is what of a schema says whether objects can be paused.
type crdSchema struct {
	OpenAPIV3Schema struct {
		Properties struct {
			Spec struct {
				Properties struct {
					Paused  struct{ Type any } `json:"paused"`
					Suspend struct{ Type any } `json:"suspend"`
				} `json:"properties"`
			} `json:"spec"`
		} `json:"properties"`
	} `json:"openAPIV3Schema"`
}

// AddCRD adds the custom kind that a CustomResourceDefinition defines, or puts
// it in place of what an earlier one for the same resource said. plain is the
// stored JSON. Names that the API server did not accept, because another
// definition has them, do not count. It returns fault.Undecodable for a
// definition that cannot be one, or whose objects would lie among a native
// kind's.
func (c *Catalogue) AddCRD(plain []byte) error {
	const next = "its objects cannot be named until it is repaired; all other kinds can"
	var crd storedCRD
	if err := json.Unmarshal(plain, &crd); err != nil {
		// The decoder's own text may quote the value.
		return fault.New(fault.Undecodable, next, "a CustomResourceDefinition is not readable JSON")
	}
	spec, names := &crd.Spec, crd.Spec.Names
	if accepted := crd.Status.AcceptedNames; accepted.Plural == names.Plural && accepted.Kind != "" {
		names = accepted
	}
	id := quoteASCII(names.Plural + "." + spec.Group)
	switch {
	case crd.Kind != "CustomResourceDefinition" || !strings.HasPrefix(crd.APIVersion, "apiextensions.k8s.io/"):
		return fault.New(fault.Undecodable, next, "what is stored as CustomResourceDefinition %s is something else", id)
	case len(validation.IsDNS1035Label(names.Plural)) > 0, names.Kind == "",
		len(validation.IsDNS1123Subdomain(spec.Group)) > 0, !strings.Contains(spec.Group, "."):
		return fault.New(fault.Undecodable, next, "CustomResourceDefinition %s has names that no API server accepts", id)
	case spec.Scope != "Namespaced" && spec.Scope != "Cluster":
		return fault.New(fault.Undecodable, next, "CustomResourceDefinition %s has the scope %s", id, quoteASCII(spec.Scope))
	}
	k := &Kind{
		Group: spec.Group, Kind: names.Kind, Plural: names.Plural,
		Singular:   strings.ToLower(names.Singular),
		ShortNames: names.ShortNames,
		Namespaced: spec.Scope == "Namespaced",
		Dir:        spec.Group + "/" + names.Plural,
		Custom:     true,
		Carrier:    Operator,
		Generation: true, // apiextensions-apiserver, pkg/registry/customresource/strategy.go
		versions:   make(map[string]map[FieldName]Field),
	}
	if k.Singular == "" {
		k.Singular = strings.ToLower(names.Kind)
	}
	for _, v := range spec.Versions {
		sub := v.Subresources
		if spec.Subresources != nil {
			sub = spec.Subresources
		}
		schema := v.Schema
		if spec.Validation != nil {
			schema = spec.Validation
		}
		k.addVersion(v.Name, v.Storage, sub, schema)
	}
	if len(spec.Versions) == 0 {
		k.addVersion(spec.Version, true, spec.Subresources, spec.Validation)
	}
	if k.Version == "" {
		return fault.New(fault.Undecodable, next, "CustomResourceDefinition %s names no version to store", id)
	}
	if old := c.dirs[k.Dir]; old != nil && !old.Custom {
		return fault.New(fault.Undecodable, next, "CustomResourceDefinition %s claims the keys of a native kind", id)
	}
	c.dirs[k.Dir] = k
	i, there := slices.BinarySearchFunc(c.custom, k.Resource(), func(k *Kind, r string) int { return strings.Compare(k.Resource(), r) })
	if there {
		c.custom[i] = k
	} else {
		c.custom = slices.Insert(c.custom, i, k)
	}
	return nil
}

// addVersion adds the edit rows of one version of a custom kind.
func (k *Kind) addVersion(name string, stored bool, sub *crdSubresources, schema *crdSchema) {
	if name == "" {
		return
	}
	rows := map[FieldName]Field{}
	if sub != nil && sub.Scale != nil {
		if p, ok := replicasPath(sub.Scale.SpecReplicasPath); ok {
			rows[Replicas] = Field{Type: Int, JSON: p}
		}
	}
	if schema != nil {
		switch spec := schema.OpenAPIV3Schema.Properties.Spec.Properties; "boolean" {
		case spec.Paused.Type:
			rows[Paused] = Field{Type: Bool, JSON: []string{"spec", "paused"}}
		case spec.Suspend.Type:
			rows[Paused] = Field{Type: Bool, JSON: []string{"spec", "suspend"}}
		}
	}
	k.versions[k.Group+"/"+name] = rows
	if stored {
		k.Version, k.Fields = name, rows
	}
}

// replicasPath splits a path such as .spec.replicas. The API server takes
// simple paths under .spec only (apiextensions-apiserver,
// pkg/apis/apiextensions/validation/validation.go).
func replicasPath(p string) ([]string, bool) {
	parts := strings.Split(strings.TrimPrefix(p, "."), ".")
	ok := strings.HasPrefix(p, ".spec.") && !strings.ContainsAny(p, "[]*") && !slices.Contains(parts, "")
	return parts, ok
}
