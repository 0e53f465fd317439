package daemonlog

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

func TestJSONLines(t *testing.T) {
	var out bytes.Buffer
	log, err := New(&out, "info", "cp-1")
	if err != nil {
		t.Fatal(err)
	}
	log.Debug().Msg("not shown")
	log.Warn().Str("object", "web").Msg("stale")
	log.Info().Msg("")
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 {
		t.Fatalf("got %q", lines)
	}
	var line struct{ Level, Node, Object, Message, Time string }
	if err := json.Unmarshal([]byte(lines[0]), &line); err != nil {
		t.Fatal(err)
	}
	if line.Level != "warn" || line.Node != "cp-1" || line.Object != "web" || line.Message != "stale" {
		t.Errorf("got %+v", line)
	}
	if at, err := time.Parse(time.RFC3339Nano, line.Time); err != nil || !strings.HasSuffix(line.Time, "Z") || time.Since(at) > time.Hour {
		t.Errorf("time %q: %v", line.Time, err)
	}
}

func TestLevels(t *testing.T) {
	for _, level := range Levels {
		if _, err := New(&bytes.Buffer{}, level, "n"); err != nil {
			t.Errorf("%s: %v", level, err)
		}
	}
	for _, level := range []string{"", "loud", "1", "disabled", "INFO"} {
		if _, err := New(&bytes.Buffer{}, level, "n"); err == nil {
			t.Errorf("%q was taken", level)
		}
	}
}
