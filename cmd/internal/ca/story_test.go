package ca_test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/halligan-io/halligan/cmd/internal/cli"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"halligan": func() { os.Exit(cli.Main()) }})
}

// TestStories runs the real command beside stock OpenSSH, which sees whether
// what was made is what was said.
func TestStories(t *testing.T) {
	for _, program := range []string{"ssh-keygen", "ssh-agent", "ssh-add", "openssl"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/story",
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("HALLIGAN_UPDATE") != "",
		Setup: func(env *testscript.Env) error {
			// A folder that others may look into has no place for keys.
			return os.Chmod(env.WorkDir, 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// exits STATUS COMMAND... demands the exit status.
			"exits": func(ts *testscript.TestScript, _ bool, args []string) {
				status := 0
				if err := ts.Exec(args[1], args[2:]...); err != nil {
					var exit *exec.ExitError
					if !errors.As(err, &exit) {
						ts.Fatalf("running %v: %v", args[1:], err)
					}
					status = exit.ExitCode()
				}
				if strconv.Itoa(status) != args[0] {
					ts.Fatalf("exit status %d, want %s", status, args[0])
				}
			},
			// mode OCTAL FILE... demands the mode.
			"mode": func(ts *testscript.TestScript, _ bool, args []string) {
				for _, file := range args[1:] {
					st, err := os.Stat(ts.MkAbs(file))
					ts.Check(err)
					if got := strconv.FormatUint(uint64(st.Mode().Perm()), 8); got != args[0] {
						ts.Fatalf("%s has mode %s, want %s", file, got, args[0])
					}
				}
			},
			// answers SOCKET waits for it.
			"answers": func(ts *testscript.TestScript, _ bool, args []string) {
				for range 500 {
					if c, err := net.Dial("unix", ts.MkAbs(args[0])); err == nil {
						ts.Check(c.Close())
						return
					}
					time.Sleep(10 * time.Millisecond)
				}
				ts.Fatalf("nobody answers at %s", args[0])
			},
			// set NAME PATTERN [FILE] takes what the pattern's group finds in the
			// output before, or in the file.
			"set": func(ts *testscript.TestScript, _ bool, args []string) {
				m := regexp.MustCompile("(?m)" + args[1]).FindStringSubmatch(ts.ReadFile(append(args, "stdout")[2]))
				if m == nil {
					ts.Fatalf("%s is not there", args[1])
				}
				ts.Setenv(args[0], m[1])
			},
			// edit FILE OLD NEW replaces text, once and exactly; NEW ends its line
			// with \n.
			"edit": func(ts *testscript.TestScript, _ bool, args []string) {
				text := ts.ReadFile(args[0])
				old, next := strings.ReplaceAll(args[1], `\n`, "\n"), strings.ReplaceAll(args[2], `\n`, "\n")
				if strings.Count(text, old) != 1 {
					ts.Fatalf("%q is %d times in %s", old, strings.Count(text, old), args[0])
				}
				ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(strings.Replace(text, old, next, 1)), 0o600))
			},
		},
	})
}
