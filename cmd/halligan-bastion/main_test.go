package main

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// asProgram makes the test's own binary the program.
const asProgram = "HALLIGAN_BASTION_TEST_MAIN"

func TestMain(m *testing.M) {
	// The embedded store's process has another name, and main sees to that.
	if os.Getenv(asProgram) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func program(t *testing.T, args ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	var said bytes.Buffer // to be read after the process has ended
	cmd.Stderr = &said
	return cmd, &said
}

func TestUsage(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bastion.yaml")
	if err := os.WriteFile(bad, []byte("name: b\ntrust: {}\nssh: {listen: [\"bastion.example:2222\"], hostKey: /k, hostCertificate: /c}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"serve"}, `unexpected argument "serve"`},
		{[]string{"--verbose"}, "unknown flag: --verbose"},
		{[]string{"--config", bad + "x"}, "no such file"},
		{[]string{"--config", bad}, "would need DNS"},
	} {
		cmd, said := program(t, c.args...)
		_ = cmd.Run()
		if text := said.String(); cmd.ProcessState.ExitCode() != 2 || !strings.HasPrefix(text, "halligan-bastion: ") || !strings.Contains(text, c.want) || strings.Count(text, "\n") != 1 {
			t.Errorf("%q: status %d, %q", c.args, cmd.ProcessState.ExitCode(), text)
		}
	}
}

// TestDaemon starts it as systemd would, and ends it.
func TestDaemon(t *testing.T) {
	f := testfleet.New(t)
	free := func() string {
		l, err := net.Listen("tcp", "127.0.0.21:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().String()
	}
	key, cert := f.HostFiles("bastion-a.bastion", testfleet.Now())
	metrics, config := free(), filepath.Join(f.Dir, "bastion.yaml")
	text := fmt.Sprintf("name: bastion-a\nstateDir: %[1]s/state\ntrust: {bundle: %[1]s/bundle}\nssh: {listen: [%[2]q], hostKey: %[3]s, hostCertificate: %[4]s}\nmetrics: {listen: %[5]q}\n",
		f.Dir, free(), key, cert, metrics)
	for file, data := range map[string][]byte{config: []byte(text), filepath.Join(f.Dir, "bundle"): f.Bundle()} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd, said := program(t, "--config", config)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := func() bool {
		r, err := http.Get("http://" + metrics + "/readyz")
		if err != nil {
			return false
		}
		defer r.Body.Close()
		return r.StatusCode == http.StatusOK
	}
	for end := time.Now().Add(30 * time.Second); !ready(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			t.Fatalf("not ready:\n%s", said)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(said.String(), `"node":"bastion-a"`) || !strings.Contains(said.String(), "bastion ends") {
		t.Errorf("%v\n%s", err, said)
	}
}
