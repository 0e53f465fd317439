// Package cli is the command line halligan: the verbs of api/verb with what
// only a process of its own has, which is where to find an agent and what to log
// in with there.
//
// It decides nothing about a cluster, and nothing about who may do what: that an
// expired certificate is said before dialling spares time and decides nothing. It
// must never overwrite the bundle that it was given, look up a name, or let what
// it does for the fleet (carrying bundles) delay a rescue. It must not link
// Kubernetes or etcd, so that it starts in milliseconds. It stands on floor 5.
package cli

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/verb"
	"github.com/halligan-io/halligan/cmd/internal/ca"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
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
	verb.Terminal
	config config
	set    *pflag.FlagSet // of the tree of commands that runs
	// What the line, the environment and the file say.
	socket, bundle, identity, cluster, node, bastion, as string
	direct                                               bool

	ctx    context.Context // of the run
	fleet  *fleet          // once it is needed
	host   *bundle.Host    // the node that this run has to do with, once it is known
	status int             // exit status of a shell
	// approver is set while the verb needs an approver.
	approver bool
	input    *bufio.Reader // of In, once something was asked

	mu        sync.Mutex      // guards all below
	exchanged map[string]bool // nodes that were shown the bundle
	noted     map[string]bool // what was said already
}

func run(ctx context.Context, args []string, t verb.Terminal) int {
	a := &app{Terminal: t, ctx: ctx, exchanged: map[string]bool{}, noted: map[string]bool{}}
	var err error
	if a.config, err = loadConfig(t.Env); err == nil && a.config.Output+a.config.Timeout != "" {
		err = a.config.defaults(scratch())
	}
	if err != nil {
		// What needs no agent still works, so that a person can read on.
		if len(args) == 0 || !needsNothing[args[0]] {
			f := fault.Of(err)
			fmt.Fprintf(t.Err, "halligan: %s\n", neutral.Line(f.Error()))
			return f.Code.Exit()
		}
		a.config = config{}
	}
	defer func() { a.fleet.close() }()
	v := verb.New(t, verb.Options{
		Connect: a.connect, Flags: a.flags, Commands: a.commands, ReadFile: a.readFile, Where: a.where, Await: a.await,
		Again: func(ctx context.Context) (context.Context, context.CancelFunc) {
			return signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
		},
	})
	if len(args) > 0 && (args[0] == cobra.ShellCompRequestCmd || args[0] == cobra.ShellCompNoDescRequestCmd) {
		return a.complete(ctx, v, args)
	}
	return max(v.Run(ctx, args), a.status)
}

var needsNothing = map[string]bool{"help": true, "--help": true, "-h": true, "version": true, "completion": true, "ca": true,
	cobra.ShellCompRequestCmd: true, cobra.ShellCompNoDescRequestCmd: true}

// maxApproval bounds a file of approvals, in bytes.
const maxApproval = 1 << 20

func (a *app) readFile(name string) ([]byte, error) { return readFile(name, maxApproval) }

// flags say where to find an agent, and what to log in with.
func (a *app) flags(set *pflag.FlagSet) {
	a.set = set
	text := func(value *string, name, env, file, usage string) {
		if env != "" && a.Env(env) != "" {
			file = a.Env(env)
		}
		set.StringVar(value, name, file, usage)
		set.Lookup(name).DefValue = "" // what the shell or the file has set is no default of the help text
	}
	text(&a.socket, "socket", "HALLIGAN_SOCKET", a.config.Socket, "console `socket` of an agent on this machine (HALLIGAN_SOCKET; default "+api.DefaultSocket+" where no bundle is named)")
	text(&a.bundle, "bundle", "HALLIGAN_BUNDLE", a.config.Bundle, "`file` that says where agents are and whom to trust (HALLIGAN_BUNDLE)")
	text(&a.identity, "identity", "HALLIGAN_IDENTITY", a.config.Identity, "private key `file` to log in with, its certificate beside it (HALLIGAN_IDENTITY; default: the certificates in the ssh-agent)")
	text(&a.cluster, "cluster", "HALLIGAN_CLUSTER", a.config.Cluster, "`name` of the cluster (HALLIGAN_CLUSTER)")
	text(&a.node, "node", "", a.config.Node, "`node` to act from: NODE, NODE.CLUSTER or its IP address (default: the first healthy one)")
	text(&a.as, "as", "", a.config.As, "`role` to take (default: responder, or the only one that the certificate names)")
	text(&a.bastion, "bastion", "", a.config.Bastion, "`bastion` to go through: NAME or its IP address (default: the first of the bundle's that lets you in)")
	set.BoolVar(&a.direct, "direct", a.config.Direct, "go to the agent without a bastion")
	set.Lookup("direct").DefValue = "false"
	_ = a.config.defaults(set) // checked already
	a.completions(set)
}

// scratch has the flags that the configuration file has values for.
func scratch() *pflag.FlagSet {
	set := pflag.NewFlagSet("", pflag.ContinueOnError)
	t := verb.New(verb.Terminal{Env: func(string) string { return "" }}, verb.Options{})
	set.AddFlagSet(t.Root(nil).PersistentFlags())
	return set
}

func (a *app) given(name string) bool {
	f := a.set.Lookup(name)
	return f != nil && f.Changed
}

// timeout returns what --timeout says, 0 for nothing.
func (a *app) timeout() time.Duration {
	f := a.set.Lookup("timeout")
	if f == nil {
		return 0
	}
	d, err := time.ParseDuration(f.Value.String())
	if err != nil {
		return 0
	}
	return d
}

// console returns the socket of the agent on this machine, "" where the bundle
// says where to go: a flag decides, then HALLIGAN_SOCKET, then whether there is
// a bundle.
func (a *app) console() (string, error) {
	remote := ""
	for _, name := range []string{"bundle", "identity", "cluster", "node", "as", "bastion", "direct"} {
		if a.given(name) {
			remote = name
		}
	}
	switch {
	case a.given("bastion") && a.given("direct") && a.direct:
		return "", fault.New(fault.Usage, "leave one of them out", "--direct goes past the bastions, and --bastion through one")
	case a.given("socket") && remote != "":
		return "", fault.New(fault.Usage, "leave one of them out", "--socket leads to this machine's agent, and --%s to one over the network", remote)
	case a.given("socket"):
		return a.socket, nil
	case remote != "" && a.bundle == "":
		return "", fault.New(fault.Usage, "name it with --bundle or HALLIGAN_BUNDLE", "--%s needs a bundle, which says where agents are", remote)
	case remote != "":
		return "", nil
	case a.Env("HALLIGAN_SOCKET") != "":
		return a.socket, nil
	case a.bundle != "":
		return "", nil
	case a.socket != "":
		return a.socket, nil
	}
	return api.DefaultSocket, nil
}

// where returns the flags that lead back to the agent of a plan.
func (a *app) where(plan *halliganv1.Plan) []string {
	if socket, err := a.console(); err == nil && socket != "" {
		if a.given("socket") {
			return []string{"--socket", socket}
		}
		return nil
	}
	var back []string
	for name, value := range map[string]string{"bundle": a.bundle, "identity": a.identity, "as": a.as, "bastion": a.bastion} {
		if a.given(name) {
			back = append(back, "--"+name, value)
		}
	}
	if a.given("direct") && a.direct {
		back = append(back, "--direct")
	}
	if plan.GetClusterName() != "" {
		back = append(back, "--cluster", plan.GetClusterName())
	}
	return append(back, "--node", plan.GetNode())
}

// connect reaches the agent that the line means, and after the first time the
// same one: only it knows what became of its plans.
func (a *app) connect(ctx context.Context) (verb.Agent, error) {
	socket, err := a.console()
	if err != nil {
		return nil, err
	}
	if socket != "" {
		conn, err := dialConsole(ctx, socket)
		if err != nil {
			return nil, err
		}
		return &agent{AgentClient: halliganv1.NewAgentClient(conn), conn: conn}, nil
	}
	f, err := a.open()
	if err != nil {
		return nil, err
	}
	if a.host == nil && a.node != "" {
		host, err := f.find(a.node, a.cluster)
		if err != nil {
			return nil, err
		}
		a.host = &host
	}
	if a.host != nil {
		return f.dial(ctx, *a.host)
	}
	one, err := f.first(ctx)
	if err != nil {
		return nil, err
	}
	a.host = &one.host
	return &roamer{agent: one}, nil
}

// role returns the role to take.
func (a *app) role() (trust.Role, error) {
	if a.as == "" && a.approver {
		return trust.Approver, nil
	}
	if a.as == "" {
		return trust.None, nil
	}
	role, err := trust.ParseRole(a.as)
	if err != nil {
		return trust.None, fault.New(fault.Usage, "choose one with --as", "%w", err)
	}
	return role, nil
}

// note says something beside the answer, once.
func (a *app) note(text string, args ...any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	said := fmt.Sprintf(text, args...)
	if a.noted[said] {
		return
	}
	a.noted[said] = true
	fmt.Fprintf(a.Err, "note: %s\n", neutral.LineMax(said, 400))
}

// commands are the verbs that only a process of its own has.
func (a *app) commands(v *verb.Verbs) []*cobra.Command {
	return []*cobra.Command{a.statusCommand(v), a.sshCommand(), a.approveCommand(v), a.auditCommand(v),
		ca.Command(ca.Surroundings{Out: v.Out, Env: v.Env, Now: v.Now})}
}
