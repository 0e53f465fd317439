// Package action is the surgical engine: the table of what Halligan can do, and
// the one path on which each of it is authorized, planned, recorded, written,
// verified and taken back.
//
// An action is one row of the table and one file: its name, parameters, least
// role, effect, time limit, and a function that plans it. Everything
// else (recording before the effect, compare-and-swap, reading back, undo,
// settling after a crash) is the engine's and the same for all.
//
// It must never write to etcd anything that a plan did not show, nor before the
// intent and the before-image are on disk; and it must never be reached around
// its gate, whatever the door. It stands on floor 4, on top of agent/storage,
// agent/etcd and agent/journal; what may be done is decided by internal/trust.
package action

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// effect is what an action may do to the cluster.
type effect string

const (
	read   effect = "read"
	mutate effect = "mutate"
)

// Names of actions that others than their own file look at.
const (
	scaleName  = "scale"
	deleteName = "delete"
	undoName   = "undo"
)

// row is one action.
type row struct {
	name, summary, description string
	// role is the least one that may take it, unless the policy moves it.
	role   trust.Role
	effect effect
	// timeout bounds planning and, apart from it, applying.
	timeout    time.Duration
	parameters []*halliganv1.Parameter
	examples   []string
	// plan fills in what a mutation would do; nil for reads, which have calls
	// of their own.
	plan func(ctx context.Context, p *planner, parameters *structpb.Struct) error
}

// table is the inventory of actions, in the order of a help text.
var table = []row{getRow, scaleRow, pauseRow, resumeRow, deleteRow, revokeRow, webhookRow, cordonRow, uncordonRow, labelRow, annotateRow, undoRow, historyRow}

func rowOf(name string) (*row, error) {
	for i := range table {
		if table[i].name == name {
			return &table[i], nil
		}
	}
	names := make([]string, len(table))
	for i, r := range table {
		names[i] = r.name
	}
	return nil, fault.New(fault.Usage, "this agent knows "+strings.Join(names, ", "), "unknown action %.64q", name)
}

// Describe returns the table as doors and command lines see it.
func Describe() []*halliganv1.Action {
	var out []*halliganv1.Action
	for _, r := range table {
		out = append(out, &halliganv1.Action{
			Name: r.name, Summary: r.summary, Description: r.description, Role: r.role.String(), Effect: string(r.effect),
			TimeoutSeconds: uint32(r.timeout / time.Second),
			Parameters:     r.parameters, Examples: r.examples,
		})
	}
	return out
}

// maxParameters bounds the parameters of one call in bytes: names and selectors,
// nothing larger.
const maxParameters = 16 << 10

// checkParameters refuses what the row does not describe, by exact name, since
// the decoder would take other spellings for the same.
func (r *row) checkParameters(s *structpb.Struct) error {
	for name := range s.GetFields() {
		if !slices.ContainsFunc(r.parameters, func(p *halliganv1.Parameter) bool { return p.Name == name }) {
			return fault.New(fault.Usage, "see the action's help", "parameters: unknown field %.64q", name)
		}
	}
	if n := proto.Size(s); n > maxParameters {
		return fault.New(fault.Usage, "give names, not contents", "parameters of %d bytes are more than %d", n, maxParameters)
	}
	return nil
}

// decode turns parameters into T, whose JSON members they must be: an unknown
// one, one of another type or a number out of range is fault.Usage.
func decode[T any](s *structpb.Struct) (v T, err error) {
	data := []byte("{}")
	if s != nil {
		if data, err = protojson.Marshal(s); err != nil {
			return v, fault.New(fault.Usage, "send plain JSON values", "parameters: %w", err)
		}
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err = d.Decode(&v); err == nil {
		if _, terr := d.Token(); !errors.Is(terr, io.EOF) {
			err = errors.New("trailing data")
		}
	}
	if err != nil {
		var typ *json.UnmarshalTypeError
		if errors.As(err, &typ) {
			return v, fault.New(fault.Usage, "see the action's help", "parameter %s: a %s does not fit", typ.Field, typ.Value)
		}
		return v, fault.New(fault.Usage, "see the action's help", "parameters: %s", strings.TrimPrefix(err.Error(), "json: "))
	}
	return v, nil
}

// Parameters that several rows share.
var (
	namespaceParameter = &halliganv1.Parameter{Name: "namespace", Type: "string", Shorthand: "n", Placeholder: "NAMESPACE",
		Description: "namespace of the object"}
	allNamespacesParameter = &halliganv1.Parameter{Name: "allNamespaces", Type: "bool", Shorthand: "A",
		Description: "objects of every namespace"}
	selectorParameter = &halliganv1.Parameter{Name: "selector", Type: "string", Shorthand: "l", Placeholder: "LABELS",
		Description: "only objects with these labels, as kubectl takes them: app=web,tier!=db"}
)
