package store

import (
	"slices"
	"strings"
	"testing"
)

// TestLastWords: of all that a process says, what ended it counts.
func TestLastWords(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ said, want string }{
		{"", ""},
		{`{"level":"error","msg":"it goes on","error":"x"}` + "\n", ""},
		{`{"level":"fatal","msg":"failed to save","error":"no space left on device"}` + "\n" + `{"level":"error","msg":"closing"}` + "\n", "failed to save: no space left on device"},
		{`{"level":"panic","msg":"failed to open","error":"no space"}` + "\npanic: failed to open\n\ngoroutine 1 [running]:\nmain.main()\n", "failed to open: no space"},
		{"panic: runtime error: nil\n\ngoroutine 1 [running]:\n" + strings.Repeat("x\n", maxSaid), "etcd crashed: runtime error: nil"},
		{"unexpected fault address 0x7f\nfatal error: fault\n[signal SIGBUS: bus error]\n", "etcd crashed: fatal error: fault"},
		{ownWords + "data is \x1b[2J not a folder\n", `data is \x1b[2J not a folder`},
		{strings.Repeat("noise\n", maxSaid) + ownWords + "at last\n", "at last"},
	} {
		said := &tail{}
		for chunk := range slices.Chunk([]byte(c.said), 1000) {
			_, _ = said.Write(chunk)
		}
		if got := said.reason(); got != c.want {
			t.Errorf("%.80q: %q, want %q", c.said, got, c.want)
		}
	}
}
