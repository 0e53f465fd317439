package api

import (
	_ "embed"
	"fmt"

	"google.golang.org/protobuf/encoding/protojson"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
)

// The content is the canonical JSON of a DescribeResponse, indented for reviews;
// a test of agent/action writes it and holds it to the table.
//
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
