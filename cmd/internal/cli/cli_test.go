package cli

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/halligan-io/halligan/api/verb"
)

// onTerminal runs a command whose three streams a person sees.
func onTerminal(t *testing.T, s *stage, input string, args ...string) (status int, out, errs string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	env := map[string]string{"HALLIGAN_SOCKET": s.socket, "HALLIGAN_REASON": "storm"}
	status = run(t.Context(), args, verb.Terminal{
		In: strings.NewReader(input), Out: &stdout, Err: &stderr, InTTY: true, OutTTY: true, ErrTTY: true,
		Env: func(k string) string { return env[k] }, Now: time.Now, Settle: time.Second, Reprobe: 50 * time.Millisecond,
	})
	return status, stdout.String(), stderr.String()
}

func TestTerminal(t *testing.T) {
	s, err := startStage()
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	status, _, errs := onTerminal(t, s, "y\n", "scale", "deploy/many", "--to", "0")
	if status != 1 || !strings.Contains(errs, "\r25 of 25 objects, 100/s\x1b[K\r\x1b[K") {
		t.Errorf("progress: %d, %q", status, errs)
	}
	// The end of the input is no yes.
	if status, out, _ := onTerminal(t, s, "", "scale", "deploy/web", "--to", "0"); status != 1 || strings.Contains(out, "applied") {
		t.Errorf("no answer: %d, %q", status, out)
	}
	for _, form := range []string{"table", "json", "yaml"} {
		_, out, errs := onTerminal(t, s, "", "get", "odd", "-o", form)
		if strings.ContainsAny(out+errs, "\x1b\u202e\u009b\a") || !strings.Contains(out, "web") {
			t.Errorf("%s lets control characters through: %q %q", form, out, errs)
		}
	}
}
