package lab

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/internal/fault"
)

func TestDemoHolds(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var out bytes.Buffer
	err := Demo(t.Context(), options(dir, network()), &out)
	if err != nil || !strings.Contains(out.String(), "13 of 13 steps held") {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestDemoSeesThroughALie drives a command that says what the demo wants to
// read and does nothing.
func TestDemoSeesThroughALie(t *testing.T) {
	t.Parallel()
	o := options(t.TempDir(), network())
	o.Halligan = []string{"/bin/sh", "-c", "echo collector applied; echo undo with: halligan undo x", "halligan"}
	var out bytes.Buffer
	err := Demo(t.Context(), o, &out)
	if fault.CodeOf(err) != fault.Failed {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, row := range []string{"revoke", "scale to 0", "delete 300 objects", "history"} {
		i := strings.Index(out.String(), "\n"+row+"  ")
		if i < 0 || !strings.Contains(strings.SplitN(out.String()[i+1:], "\n", 2)[0], "NO: ") {
			t.Errorf("%s was believed:\n%s", row, out.String())
		}
	}
}

func TestDemoInterrupted(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o := options(dir, network())
	// Interrupted while the tool hangs.
	o.Halligan = []string{"/bin/sh", "-c", "echo $$ >" + filepath.Join(dir, "hangs") + "; exec sleep 600", "halligan"}
	ended := make(chan error, 1)
	var out bytes.Buffer
	go func() { ended <- Demo(ctx, o, &out) }()
	tool := 0
	eventually(t, "the tool runs", func() bool {
		text, err := os.ReadFile(filepath.Join(dir, "hangs"))
		if err == nil {
			tool, err = strconv.Atoi(strings.TrimSpace(string(text)))
		}
		return err == nil
	})
	cancel()
	select {
	case err := <-ended:
		if !fault.Is(err, fault.Cancelled) || err.Error() != "interrupted: everything was stopped" {
			t.Errorf("got %v", err)
		}
		if strings.Contains(out.String(), "NOT HELD") {
			t.Errorf("a step is said not to hold:\n%s", out.String())
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
	}
	if err := syscall.Kill(tool, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the tool goes on: %v", err)
	}
	if left := children(t, dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestDemoWithoutAudience has the reader leave after the first lines.
func TestDemoWithoutAudience(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r.Close()
	ctx, out := Audience(t.Context(), w)
	if err := Demo(ctx, options(dir, network()), out); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("got %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestSnapshotSince(t *testing.T) {
	value := func(generation int64, data string) []byte {
		b, err := storage.EncodeTyped(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "a", Generation: generation}, Data: map[string]string{"k": data}})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	before := snapshot{"/a": value(1, "x"), "/b": value(1, "y")}
	for _, c := range []struct {
		name string
		now  snapshot
		n    int
		err  string
	}{
		{"same", snapshot{"/a": value(1, "x"), "/b": value(1, "y")}, 0, ""},
		{"generation", snapshot{"/a": value(3, "x"), "/b": value(1, "y")}, 1, ""},
		{"data", snapshot{"/a": value(1, "z"), "/b": value(1, "y")}, 0, "/a is not what it was"},
		{"gone", snapshot{"/a": value(1, "x")}, 0, "/b is gone"},
		{"new", snapshot{"/a": value(1, "x"), "/b": value(1, "y"), "/c": nil}, 0, "/c was not there"},
		{"garbage", snapshot{"/a": []byte("x"), "/b": value(1, "y")}, 0, "/a: "},
	} {
		n, err := c.now.since(before)
		if n != c.n || (c.err == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %d, %v", c.name, n, err)
		}
	}
}
