package cli

import (
	"bytes"
	"os"
	"testing"

	"github.com/halligan-io/halligan/agent/action"
	"github.com/halligan-io/halligan/api"
)

// The table that is built into the command line is the agent's, so that help
// and parsing need no agent. HALLIGAN_UPDATE=1 writes it anew.
func TestSnapshotIsTheAgentsTable(t *testing.T) {
	want, err := api.FormatActions(action.Describe())
	if err != nil {
		t.Fatal(err)
	}
	const file = "../../../api/actions.json"
	if os.Getenv("HALLIGAN_UPDATE") != "" {
		if err := os.WriteFile(file, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("api/actions.json is not the agent's table: run HALLIGAN_UPDATE=1 go test ./cmd/internal/cli -run Snapshot")
	}
}
