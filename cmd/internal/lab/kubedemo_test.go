package lab

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/halligan-io/halligan/internal/fault"
)

// TestKubeDemoHolds heals both shapes of the outage end to end. It does not run
// beside other tests: it measures.
func TestKubeDemoHolds(t *testing.T) {
	for _, shape := range []string{"a", "b"} {
		t.Run(shape, func(t *testing.T) {
			needKube(t)
			dir, err := os.MkdirTemp("", "storm") // sockets have short names only
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			o := KubeDemoOptions{Options: options(dir, network()), Shape: shape,
				pace: pace{calm: 2 * time.Second, storm: 4 * time.Second, rung: 4 * time.Second, kubectl: 5 * time.Second}}
			o.Nodes, o.Kube = 20, &KubeOptions{Binaries: kubeBinaries()}
			var out bytes.Buffer
			if err := KubeDemo(t.Context(), o, &out); err != nil {
				t.Fatalf("%v\n%s", err, out.String())
			}
			text := out.String()
			if !strings.Contains(text, "From the first command to relief: ") || strings.Contains(text, "NOT HELD") {
				t.Errorf("the story is not whole:\n%s", text)
			}
			t.Log(text[strings.Index(text, "\nPART"):])
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

func TestKubeDemoShape(t *testing.T) {
	err := KubeDemo(t.Context(), KubeDemoOptions{Shape: "c"}, &bytes.Buffer{})
	if fault.CodeOf(err) != fault.Usage {
		t.Errorf("got %v", err)
	}
}
