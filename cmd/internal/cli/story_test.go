package cli

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	clientv3 "go.etcd.io/etcd/client/v3"

	daemon "github.com/halligan-io/halligan/agent"
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

// TestStories runs the real command against real agents on a real etcd, with
// etcd's own client as the independent eye. The stories share one lab, so each
// has objects of its own.
func TestStories(t *testing.T) {
	dir, err := os.MkdirTemp("", "story")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	pid := os.Getpid()
	l, err := lab.Up(t.Context(), lab.Options{
		Dir: filepath.Join(dir, "lab"), Net: fmt.Sprintf("127.%d.%d", 30+pid/250%60, pid%250), Objects: 800, Nodes: 2,
		Agent: []string{"/usr/bin/env", "CLI_TEST_AS=agent", os.Args[0]}, Progress: t.Output(),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	eye, err := l.Cluster().Client()
	if err != nil {
		t.Fatal(err)
	}
	defer eye.Close()
	t.Run("told", func(t *testing.T) {
		testscript.Run(t, testscript.Params{
			Dir:                 "testdata/story",
			RequireExplicitExec: true,
			Setup: func(env *testscript.Env) error {
				for i := range 3 {
					env.Setenv(fmt.Sprintf("CP%d", i+1), l.Socket(i))
				}
				env.Setenv("HALLIGAN_SOCKET", l.Socket(0))
				return nil
			},
			Cmds: map[string]func(*testscript.TestScript, bool, []string){
				"exits": exits,
				// etcd writes the raw value of a key, or how many keys a
				// prefix has, into a file.
				"etcd": func(ts *testscript.TestScript, _ bool, args []string) {
					ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
					defer cancel()
					var options []clientv3.OpOption
					if args[0] == "count" {
						options = []clientv3.OpOption{clientv3.WithPrefix(), clientv3.WithCountOnly()}
					}
					answer, err := eye.Get(ctx, args[1], options...)
					ts.Check(err)
					text := fmt.Appendln(nil, answer.Count)
					if args[0] == "get" && answer.Count > 0 {
						text = answer.Kvs[0].Value
					}
					ts.Check(os.WriteFile(ts.MkAbs(args[2]), text, 0o600))
				},
				// id writes the action's identifier, as the output before
				// names it, into a variable.
				"id": func(ts *testscript.TestScript, _ bool, args []string) {
					_, rest, found := bytes.Cut([]byte(ts.ReadFile("stdout")), []byte("undo with: halligan undo "))
					if !found {
						ts.Fatalf("the output names no action")
					}
					ts.Setenv(args[0], string(bytes.TrimSpace(rest)))
				},
			},
		})
	})
}
