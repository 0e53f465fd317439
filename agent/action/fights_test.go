package action

import (
	"bytes"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/internal/fault"
)

// TestSurroundingsPanic: what stands beside an object ends its plan at worst,
// never the agent.
func TestSurroundingsPanic(t *testing.T) {
	var log bytes.Buffer
	around := &surroundings{}
	around.look(zerolog.New(&log), func() error { panic("a budget\x1b[2J that nobody expected") })
	around.look(zerolog.New(&log), func() error { return nil })
	if err := around.group.Wait(); !fault.Is(err, fault.Failed) {
		t.Errorf("%v", err)
	}
	if text := log.String(); !strings.Contains(text, "that nobody expected") || !strings.Contains(text, "fights_test.go") || strings.Contains(text, "u001b") {
		t.Error(text)
	}
}
