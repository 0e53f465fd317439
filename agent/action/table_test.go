package action

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/trust"
)

var update = flag.Bool("update", false, "write api/actions.json anew")

// TestSnapshot holds the copy of the table from which command lines make their
// help and flags without asking an agent.
func TestSnapshot(t *testing.T) {
	const file = "../../api/actions.json"
	data, err := api.CanonicalJSON(&halliganv1.DescribeResponse{Actions: Describe()})
	if err != nil {
		t.Fatal(err)
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, data, "", "  "); err != nil {
		t.Fatal(err)
	}
	pretty.WriteByte('\n')
	if *update {
		if err := os.WriteFile(file, pretty.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(have, pretty.Bytes()) {
		t.Errorf("%s is not the table's (%v): run make generate", file, err)
	}
}

func TestRowsAreComplete(t *testing.T) {
	structs := map[string]any{"get": getParameters{}, "scale": scaleParameters{}, "delete": deleteParameters{}, "revoke": revokeParameters{},
		"pause": pauseParameters{}, "resume": pauseParameters{}, "webhook": webhookParameters{}, "cordon": cordonParameters{}, "uncordon": cordonParameters{}, "label": markParameters{}, "annotate": markParameters{}, "undo": undoParameters{}, "history": nil}
	seen := map[string]bool{}
	for _, r := range table {
		if seen[r.name] {
			t.Errorf("%s stands twice", r.name)
		}
		seen[r.name] = true
		if r.name == "" || r.summary == "" || len(r.examples) == 0 || r.timeout <= 0 || r.role < trust.Observer {
			t.Errorf("row %q lacks a name, summary, example, timeout or role", r.name)
		}
		if (r.effect == mutate) != (r.plan != nil) || r.effect != mutate && r.effect != read {
			t.Errorf("row %s: effect %q does not fit its plan", r.name, r.effect)
		}
		if r.effect == mutate && r.role < trust.Responder {
			t.Errorf("row %s: an observer could change the cluster", r.name)
		}
		want, ok := structs[r.name]
		if !ok {
			t.Errorf("row %s: name its parameters here", r.name)
		}
		if want == nil {
			continue
		}
		fields := map[string]string{}
		for f := range reflect.TypeOf(want).Fields() {
			typ := f.Type
			if typ.Kind() == reflect.Pointer {
				typ = typ.Elem()
			}
			fields[strings.Split(f.Tag.Get("json"), ",")[0]] = map[reflect.Kind]string{reflect.String: "string", reflect.Bool: "bool", reflect.Int64: "int", reflect.Slice: "strings"}[typ.Kind()]
		}
		for _, p := range r.parameters {
			if fields[p.Name] != p.Type || p.Description == "" {
				t.Errorf("row %s: parameter %s (%s) is decoded as %q", r.name, p.Name, p.Type, fields[p.Name])
			}
			if last := r.parameters[len(r.parameters)-1]; p.Type == "strings" && (!p.Positional || last != p && last.Positional) {
				t.Errorf("row %s: %s takes all further arguments and is not the last", r.name, p.Name)
			}
			delete(fields, p.Name)
		}
		for f := range fields {
			t.Errorf("row %s: %s is decoded but not described", r.name, f)
		}
	}
}
