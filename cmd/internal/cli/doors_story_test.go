package cli

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/halligan-io/halligan/cmd/internal/lab"
)

// TestDoorStories comes to the agents of a lab through every door, with what
// people and programs have: stock ssh, ssh-agent, grpcurl and this command.
// etcdctl is the independent eye. The stories share one lab, whose bundle they
// change, and run one after another.
func TestDoorStories(t *testing.T) {
	t.Parallel()
	for _, program := range []string{"ssh", "ssh-agent", "ssh-add", "ssh-keygen"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	eye := etcdctl(t)
	hand(t, eye, "HALLIGAN_GRPCURL", "github.com/fullstorydev/grpcurl/cmd/grpcurl")
	dir, err := os.MkdirTemp("", "door") // sockets have short names only
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	pid := os.Getpid()
	network := fmt.Sprintf("127.%d.%d", 2+pid/250%28, pid%250) // as of no other lab of a test
	l, err := lab.Up(t.Context(), lab.Options{Dir: filepath.Join(dir, "lab"), Net: network, Objects: 300, Agent: agentCommand(), Bastion: bastionCommand(), Progress: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	testscript.RunT(inTurn{t}, testscript.Params{
		Dir:                 "testdata/doors",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("DIR", filepath.Join(dir, "lab"))
			for i := range 3 {
				env.Setenv(fmt.Sprintf("CP%d", i+1), fmt.Sprintf("%s.%d", network, 11+i))
			}
			if err := source(env, filepath.Join(dir, "lab", "env")); err != nil {
				return err
			}
			env.Setenv("HALLIGAN_SOCKET", "")
			env.Setenv("SSH_AUTH_SOCK", "")
			env.Setenv("HOME", filepath.Join(env.WorkDir, "home"))
			if err := os.Mkdir(filepath.Join(env.WorkDir, "home"), 0o700); err != nil {
				return err
			}
			return furnish(env, eye)
		},
		Cmds: storyCommands(map[string]func(*testscript.TestScript, bool, []string){
			// until COMMAND... repeats a command until it ends well: doors open, and
			// bundles are noticed, a moment later.
			"until": func(ts *testscript.TestScript, _ bool, args []string) {
				for began := time.Now(); ts.Exec(args[0], args[1:]...) != nil; time.Sleep(100 * time.Millisecond) {
					if time.Since(began) > 30*time.Second {
						ts.Fatalf("it still fails")
					}
				}
			},
			// call NODE METHOD JSON calls an agent with grpcurl, as automation.
			"call": func(ts *testscript.TestScript, neg bool, args []string) {
				at := func(name string) string { return filepath.Join(ts.Getenv("DIR"), name) }
				err := ts.Exec("grpcurl", "-cacert", at("ca.crt"), "-cert", at("ids/automation.crt"), "-key", at("ids/automation.key"), "-servername", args[0]+".lab",
					"-d", args[2], ts.Getenv("CP"+strings.TrimPrefix(args[0], "cp-"))+":7443", "halligan.v1.Agent/"+args[1])
				if (err != nil) != neg {
					ts.Fatalf("%s: %v", args[1], err)
				}
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
			// replace FILE OLD NEW does that once and exactly.
			"replace": func(ts *testscript.TestScript, _ bool, args []string) {
				text := ts.ReadFile(args[0])
				if n := strings.Count(text, args[1]); n != 1 {
					ts.Fatalf("%q is %d times in %s", args[1], n, args[0])
				}
				ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(strings.Replace(text, args[1], args[2], 1)), 0o600))
			},
			// same FILE... compares what commands, and calls by grpcurl, say of an
			// error.
			"same": func(ts *testscript.TestScript, _ bool, args []string) {
				var said []string
				for _, file := range args {
					text := ts.ReadFile(file)
					if m := regexp.MustCompile(`(?m)^halligan: (.+)$`).FindStringSubmatch(text); m != nil {
						said = append(said, m[1])
					} else if m := regexp.MustCompile(`(?s)"message": "(.+?)",\s+"next": "(.+?)"`).FindStringSubmatch(text); m != nil {
						said = append(said, m[1]+"; "+m[2])
					} else {
						ts.Fatalf("%s tells of no error", file)
					}
				}
				if len(slices.Compact(said)) != 1 {
					ts.Fatalf("these differ:\n%s", strings.Join(said, "\n"))
				}
			},
			// lose NODE kills its agent, as whoever listens at its console.
			"lose": func(ts *testscript.TestScript, _ bool, args []string) {
				c, err := net.Dial("unix", filepath.Join(ts.Getenv("DIR"), args[0], "console.sock"))
				ts.Check(err)
				defer c.Close()
				raw, err := c.(*net.UnixConn).SyscallConn()
				ts.Check(err)
				var peer *unix.Ucred
				ts.Check(raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }))
				ts.Check(err)
				ts.Check(unix.Kill(int(peer.Pid), unix.SIGKILL))
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
			// sits NAME TEXT COMMAND... runs a command on a terminal until it shows
			// the text.
			"sits": func(ts *testscript.TestScript, _ bool, args []string) {
				p, err := sitDown(look(ts, args[2]), args[3:], environment(ts))
				ts.Check(err)
				ts.Value("scene").(*scene).people[args[0]] = p
				sees(ts, p, args[1])
			},
			// sees NAME TEXT waits until somebody's command shows the text.
			"sees": func(ts *testscript.TestScript, _ bool, args []string) {
				sees(ts, ts.Value("scene").(*scene).people[args[0]], args[1])
			},
			// types NAME LINE TEXT types a line until the text is shown.
			"types": func(ts *testscript.TestScript, _ bool, args []string) {
				p := ts.Value("scene").(*scene).people[args[0]]
				_, err := p.terminal.WriteString(args[1] + "\r")
				ts.Check(err)
				sees(ts, p, args[2])
			},
			// leaves NAME waits until the command has ended by itself; what was
			// seen is in a file of the name.
			"leaves": func(ts *testscript.TestScript, _ bool, args []string) {
				p := ts.Value("scene").(*scene).people[args[0]]
				select {
				case <-p.ended:
				case <-time.After(20 * time.Second): // in fact 2 s
					ts.Fatalf("%s goes on:\n%s", args[0], p.screen())
				}
				ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(p.screen()), 0o600))
			},
		}),
	})
}

// sees waits until a terminal shows a text.
func sees(ts *testscript.TestScript, p *person, text string) {
	for began := time.Now(); !strings.Contains(p.screen(), text); time.Sleep(50 * time.Millisecond) {
		if time.Since(began) > 20*time.Second {
			ts.Fatalf("no %q:\n%s", text, p.screen())
		}
	}
}

// hand puts a program into the folder: the one that the variable names or, where
// it names none, one built from the module of tools.
func hand(t *testing.T, dir, variable, path string) {
	t.Helper()
	if named := os.Getenv(variable); named != "" {
		if err := os.Symlink(named, filepath.Join(dir, filepath.Base(path))); err != nil {
			t.Fatal(err)
		}
		return
	}
	if out, err := exec.Command("go", "build", "-C", "../../../internal/tools", "-buildvcs=false", "-o", dir+"/", path).CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", path, err, out)
	}
}

// inTurn runs stories one after another.
type inTurn struct{ *testing.T }

func (inTurn) Parallel()     {}
func (inTurn) Verbose() bool { return testing.Verbose() }

func (t inTurn) Run(name string, story func(testscript.T)) {
	t.T.Run(name, func(t *testing.T) { story(inTurn{t}) })
}
