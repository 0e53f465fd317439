package daemonlog

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
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

// TestHangingReader: a journal that hangs delays nothing for long, and gets what
// there was once it is back.
func TestHangingReader(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	log, err := New(w, "info", "cp-1")
	if err != nil {
		t.Fatal(err)
	}
	const lines = 4096 // of half a KiB: far more than a pipe and the queue hold
	logged := make(chan struct{})
	go func() {
		defer close(logged)
		for range lines {
			log.Info().Str("text", strings.Repeat("x", 512)).Msg("login")
		}
	}()
	select {
	case <-logged:
	case <-time.After(20 * time.Second):
		t.Fatal("logging waits for a reader")
	}
	defer r.Close()
	in := bufio.NewScanner(r)
	for read := 1; in.Scan(); read++ {
		var line struct{ Message string }
		if err := json.Unmarshal(in.Bytes(), &line); err != nil {
			t.Fatalf("%q: %v", in.Text(), err)
		}
		if strings.HasSuffix(line.Message, "lines were lost, since nobody took them") {
			return
		}
		if read == lines {
			t.Fatal("nothing tells of what was lost")
		}
	}
}
