package cli

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"

	daemon "github.com/halligan-io/halligan/agent"
	"github.com/halligan-io/halligan/bastion"
	"github.com/halligan-io/halligan/cmd/internal/lab"
	"github.com/halligan-io/halligan/internal/daemonlog"
)

// beAgent makes this test's own binary an agent of the lab.
func beAgent() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	c, _, distribution, err := daemon.LoadConfig(os.Args[len(os.Args)-1])
	if err != nil {
		return err
	}
	log, err := daemonlog.New(os.Stderr, c.LogLevel, c.Node)
	if err != nil {
		return err
	}
	return daemon.Run(ctx, c, distribution, log)
}

// beBastion makes it a bastion of the lab.
func beBastion() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	c, err := bastion.LoadConfig(os.Args[len(os.Args)-1])
	if err != nil {
		return err
	}
	log, err := daemonlog.New(os.Stderr, c.LogLevel, c.Name)
	if err != nil {
		return err
	}
	return bastion.Run(ctx, c, log)
}

// agentCommand is the command line of an agent, bastionCommand that of a bastion.
func agentCommand() []string   { return []string{"/usr/bin/env", "CLI_TEST_AS=agent", os.Args[0]} }
func bastionCommand() []string { return []string{"/usr/bin/env", "CLI_TEST_AS=bastion", os.Args[0]} }

// TestStories runs the real command against real agents on a real etcd, with
// etcdctl as the independent eye, as a person types both who has sourced the
// lab's files. The stories share one lab and run at the same time, so each has
// objects of its own.
func TestStories(t *testing.T) {
	t.Parallel()
	eye := etcdctl(t)
	// Sockets have short names only.
	dir, err := os.MkdirTemp("", "story")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	pid := os.Getpid()
	l, err := lab.Up(t.Context(), lab.Options{
		Dir: filepath.Join(dir, "lab"), Net: fmt.Sprintf("127.%d.%d", 30+pid/250%60, pid%250), Objects: 800, Nodes: 2,
		Agent: agentCommand(), Bastion: bastionCommand(), Progress: t.Output(),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Run("told", func(t *testing.T) {
		testscript.Run(t, testscript.Params{
			Dir:                 "testdata/story",
			RequireExplicitExec: true,
			Setup: func(env *testscript.Env) error {
				for i := range 3 {
					env.Setenv(fmt.Sprintf("CP%d", i+1), l.Socket(i))
				}
				for _, name := range []string{"env", "env.console"} {
					if err := source(env, filepath.Join(dir, "lab", name)); err != nil {
						return err
					}
				}
				return furnish(env, eye)
			},
			Cmds: storyCommands(nil),
		})
	})
}

// etcdctl returns the folder of the program, which HALLIGAN_ETCDCTL names; where
// it does not, it is built from the module of tools.
func etcdctl(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if named := os.Getenv("HALLIGAN_ETCDCTL"); named != "" {
		if err := os.Symlink(named, filepath.Join(dir, "etcdctl")); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	out, err := exec.Command("go", "build", "-C", "../../../internal/tools", "-buildvcs=false", "-o", dir+"/", "go.etcd.io/etcd/etcdctl/v3").CombinedOutput()
	if err != nil {
		t.Fatalf("building etcdctl: %v\n%s", err, out)
	}
	return dir
}

// source takes variables from a file of lines export NAME='VALUE'.
func source(env *testscript.Env, file string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	for _, m := range regexp.MustCompile(`(?m)^export ([A-Z_]+)='(.*)'$`).FindAllSubmatch(data, -1) {
		env.Setenv(string(m[1]), string(m[2]))
	}
	return nil
}

// furnish is what every story has.
func furnish(env *testscript.Env, eye string) error {
	env.Setenv("PATH", eye+string(filepath.ListSeparator)+env.Getenv("PATH"))
	env.Setenv("ESC", "\x1b")
	env.Setenv("HALLIGAN_REASON", "a story")
	s := &scene{people: map[string]*person{}}
	env.Values["scene"] = s
	env.Defer(s.leave)
	return nil
}

// scene is who sits before a question, and in a story of faults what there is
// to break.
type scene struct {
	people map[string]*person
	site   *site
}

func (s *scene) leave() {
	for _, p := range s.people {
		p.terminal.Close()
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
}

// person runs one command on a terminal.
type person struct {
	cmd      *exec.Cmd
	terminal *os.File
	asked    chan struct{} // closed at the question
	ended    chan struct{} // closed when the command has ended
	mu       sync.Mutex    // guards seen
	seen     bytes.Buffer
}

// storyCommands are the commands of a story, and others.
func storyCommands(others map[string]func(*testscript.TestScript, bool, []string)) map[string]func(*testscript.TestScript, bool, []string) {
	cmds := map[string]func(*testscript.TestScript, bool, []string){
		"exits": exits,
		// value KEY FILE writes the bytes of a key, as etcdctl prints them.
		"value": func(ts *testscript.TestScript, _ bool, args []string) {
			ts.Check(os.WriteFile(ts.MkAbs(args[1]), stored(ts, args[0]), 0o600))
		},
		// object KEY FILE writes what client-go makes of it, as YAML. The
		// generation counts writes and is left out.
		"object": func(ts *testscript.TestScript, _ bool, args []string) {
			data := stored(ts, args[0])
			var object any
			if bytes.HasPrefix(data, []byte("{")) {
				ts.Check(yaml.Unmarshal(data, &object))
			} else {
				decoded, err := runtime.Decode(scheme.Codecs.UniversalDeserializer(), data)
				ts.Check(err)
				object = decoded
			}
			text, err := yaml.Marshal(object)
			ts.Check(err)
			text = regexp.MustCompile(`(?m)^  generation: \d+\n`).ReplaceAll(text, nil)
			ts.Check(os.WriteFile(ts.MkAbs(args[1]), text, 0o600))
		},
		// put KEY FILE stores the file's bytes.
		"put": func(ts *testscript.TestScript, _ bool, args []string) {
			cmd := exec.Command(look(ts, "etcdctl"), "put", args[0])
			cmd.Env, cmd.Stdin = environment(ts), strings.NewReader(ts.ReadFile(args[1]))
			out, err := cmd.CombinedOutput()
			ts.Logf("%s", out)
			ts.Check(err)
		},
		// first NAME PREFIX writes the last part of the prefix' first key into
		// a variable.
		"first": func(ts *testscript.TestScript, _ bool, args []string) {
			ts.Check(ts.Exec("etcdctl", "get", args[1], "--prefix", "--keys-only", "--limit", "1"))
			key := strings.TrimSpace(ts.ReadFile("stdout"))
			ts.Setenv(args[0], key[strings.LastIndexByte(key, '/')+1:])
		},
		// id NAME [FILE] writes the action's identifier, as the output before
		// or the file names it, into a variable.
		"id": func(ts *testscript.TestScript, _ bool, args []string) {
			m := regexp.MustCompile(`(?m)^Plan ([^ :]+): `).FindStringSubmatch(ts.ReadFile(append(args, "stdout")[1]))
			if m == nil {
				ts.Fatalf("the output names no action")
			}
			ts.Setenv(args[0], m[1])
		},
		// asked NAME COMMAND... runs a command on a terminal until it asks.
		"asked": func(ts *testscript.TestScript, _ bool, args []string) {
			p, err := sitDown(look(ts, args[1]), args[2:], environment(ts))
			ts.Check(err)
			ts.Value("scene").(*scene).people[args[0]] = p
			select {
			case <-p.asked:
			case <-p.ended:
				ts.Fatalf("it ended without a question:\n%s", p.screen())
			case <-time.After(20 * time.Second):
				ts.Fatalf("no question:\n%s", p.screen())
			}
		},
		// answer 'WORD' 'STATUS ...' NAME... has all of them type the word at
		// once; sorted, they end with these exit statuses. What each has seen
		// is in a file of the name.
		"answer": func(ts *testscript.TestScript, _ bool, args []string) {
			people := ts.Value("scene").(*scene).people
			for _, name := range args[2:] {
				_, err := people[name].terminal.WriteString(args[0] + "\n")
				ts.Check(err)
			}
			var got []string
			for _, name := range args[2:] {
				p := people[name]
				select {
				case <-p.ended:
				case <-time.After(60 * time.Second):
					ts.Fatalf("%s does not end:\n%s", name, p.screen())
				}
				ts.Logf("%s sees:\n%s", name, p.screen())
				ts.Check(os.WriteFile(ts.MkAbs(name), []byte(p.screen()), 0o600))
				got = append(got, fmt.Sprint(p.cmd.ProcessState.ExitCode()))
				delete(people, name)
				p.terminal.Close()
			}
			slices.Sort(got)
			if strings.Join(got, " ") != args[1] {
				ts.Fatalf("exit status %v, want %s", got, args[1])
			}
		},
	}
	for name, cmd := range others {
		cmds[name] = cmd
	}
	return cmds
}

// look finds a program in the story's path.
func look(ts *testscript.TestScript, name string) string {
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	ts.Fatalf("no %s", name)
	return ""
}

// environment is what the story's programs need of its variables.
func environment(ts *testscript.TestScript) []string {
	var env []string
	for _, name := range []string{"PATH", "HOME", "HALLIGAN_SOCKET", "HALLIGAN_REASON", "ETCDCTL_ENDPOINTS", "ETCDCTL_CACERT", "ETCDCTL_CERT", "ETCDCTL_KEY"} {
		env = append(env, name+"="+ts.Getenv(name))
	}
	return env
}

// stored returns the value of a key that must be there.
func stored(ts *testscript.TestScript, key string) []byte {
	cmd := exec.Command(look(ts, "etcdctl"), "get", key, "--print-value-only")
	cmd.Env = environment(ts)
	out, err := cmd.Output()
	ts.Check(err)
	if len(out) == 0 {
		ts.Fatalf("no key %s", key)
	}
	return bytes.TrimSuffix(out, []byte("\n")) // etcdctl's own
}

// sitDown runs a command whose three streams are a terminal.
func sitDown(path string, args, env []string) (*person, error) {
	near, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err = unix.IoctlSetPointerInt(int(near.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		near.Close()
		return nil, err
	}
	n, err := unix.IoctlGetInt(int(near.Fd()), unix.TIOCGPTN)
	if err != nil {
		near.Close()
		return nil, err
	}
	far, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		near.Close()
		return nil, err
	}
	defer far.Close()
	p := &person{cmd: exec.Command(path, args...), terminal: near, asked: make(chan struct{}), ended: make(chan struct{})}
	p.cmd.Env = env
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = far, far, far
	if err := p.cmd.Start(); err != nil {
		near.Close()
		return nil, err
	}
	read := make(chan struct{})
	go func() { // ends when the command has closed the terminal
		defer close(read)
		r := bufio.NewReader(near)
		asked := sync.OnceFunc(func() { close(p.asked) })
		for {
			b, err := r.ReadByte()
			if err != nil {
				return
			}
			p.mu.Lock()
			p.seen.WriteByte(b)
			question := bytes.HasSuffix(p.seen.Bytes(), []byte("[y/N] "))
			p.mu.Unlock()
			if question {
				asked()
			}
		}
	}()
	go func() {
		<-read
		_ = p.cmd.Wait()
		close(p.ended)
	}()
	return p, nil
}

// screen returns what was shown, line by line, those that were overwritten too.
func (p *person) screen() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.NewReplacer("\r\n", "\n", "\r", "\n", "\x1b[K", "").Replace(p.seen.String())
}
