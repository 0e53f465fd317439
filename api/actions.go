package api

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"

	"google.golang.org/protobuf/encoding/protojson"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
)

//go:embed actions.json
var actionsJSON []byte

// Actions returns the table of actions as it was when this binary was built, so
// that a command line can explain and parse its verbs with no agent at hand. It
// is no statement about what an agent can do; Describe is.
func Actions() ([]*halliganv1.Action, error) {
	var all halliganv1.DescribeResponse
	if err := protojson.Unmarshal(actionsJSON, &all); err != nil {
		return nil, fmt.Errorf("the built-in table of actions: %w", err)
	}
	return all.GetActions(), nil
}

// FormatActions returns the content of actions.json for a table: its canonical
// JSON, indented so that a review sees what changed.
func FormatActions(actions []*halliganv1.Action) ([]byte, error) {
	text, err := CanonicalJSON(&halliganv1.DescribeResponse{Actions: actions})
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := json.Indent(&out, text, "", "  "); err != nil {
		return nil, err
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}
