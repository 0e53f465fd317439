package lab

import (
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
)

// topFindsIt: under the storm, who is connected to the API server tells whose storm it
// is, and what stops it.
func topFindsIt(t *testing.T, l *Lab) {
	s, err := NewStorm(t.Context(), smallStorm(l, io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the storm asks", func() bool { return s.load.answered.Load() > 20 })
	argv := append(as("halligan"), "top", "--by", "connections", "-o", "json")
	cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "HALLIGAN_SOCKET="+l.Socket(0))
	cmd.Stderr = t.Output()
	began := time.Now()
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("top took %v", time.Since(began).Round(time.Millisecond))
	var found struct{ Suspects []*halliganv1.Suspect }
	if err := json.Unmarshal(out, &found); err != nil || len(found.Suspects) == 0 {
		t.Fatalf("%v: %s", err, out)
	}
	first := found.Suspects[0]
	if first.Workload != "DaemonSet/"+offenderName || first.User != "system:serviceaccount:"+offenderNamespace+":"+offenderName || len(first.Remedies) != 3 {
		t.Errorf("the first is %v in\n%s", first, out)
	}
}
