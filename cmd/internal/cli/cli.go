// Package cli is the command line halligan: the verbs of api/verb with what
// only a process of its own has, which is where to find an agent.
//
// It decides nothing about a cluster. It must not link Kubernetes or etcd, so
// that it starts in milliseconds. It stands on floor 5.
package cli

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/verb"
	"github.com/halligan-io/halligan/cmd/internal/ca"
)

// settle is how long to ask what became of an application whose connection
// broke: an agent that is restarted settles what it left open within about ten
// seconds.
const settle = 20 * time.Second

// Main runs the command of this process and returns its exit status.
func Main() int { return process(settle) }

func process(settle time.Duration) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process
	isTTY := func(f *os.File) bool { return isatty.IsTerminal(f.Fd()) }
	return run(ctx, os.Args[1:], verb.Terminal{
		In: os.Stdin, Out: os.Stdout, Err: os.Stderr,
		InTTY: isTTY(os.Stdin), OutTTY: isTTY(os.Stdout), ErrTTY: isTTY(os.Stderr),
		Env: os.Getenv, Now: time.Now,
		Settle: settle, Reprobe: 300 * time.Millisecond,
	})
}

// app is one run of the command.
type app struct {
	env    func(string) string
	socket string
}

func run(ctx context.Context, args []string, t verb.Terminal) int {
	a := &app{env: t.Env}
	return verb.New(t, verb.Options{
		Connect: a.connect, Flags: a.flags, ReadFile: os.ReadFile,
		Commands: func(v *verb.Verbs) []*cobra.Command {
			return []*cobra.Command{ca.Command(ca.Surroundings{Out: v.Out, Env: v.Env, Now: v.Now})}
		},
		Again: func(ctx context.Context) (context.Context, context.CancelFunc) {
			return signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
		},
	}).Run(ctx, args)
}

// flags say where to find an agent.
func (a *app) flags(set *pflag.FlagSet) {
	socket := a.env("HALLIGAN_SOCKET")
	if socket == "" {
		socket = api.DefaultSocket
	}
	set.StringVar(&a.socket, "socket", socket, "console `socket` of the agent (HALLIGAN_SOCKET)")
	if a.env("HALLIGAN_SOCKET") != "" {
		set.Lookup("socket").DefValue = "" // what the shell has set is no default of the help text
	}
}

// agent is a connection to one agent.
type agent struct {
	halliganv1.AgentClient
	io.Closer
}

// connect reaches the agent that the flags name.
func (a *app) connect(ctx context.Context) (verb.Agent, error) {
	conn, err := dialConsole(ctx, a.socket)
	if err != nil {
		return nil, err
	}
	return agent{halliganv1.NewAgentClient(conn), conn}, nil
}
