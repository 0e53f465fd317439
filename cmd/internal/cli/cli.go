// Package cli is the command line halligan: it turns the rows of an agent's
// table of actions into verbs, shows plans, asks, applies, and says what came of
// it, for people on a terminal and for scripts on a pipe.
//
// It decides nothing about a cluster: kinds, rights and plans are the agent's.
// It must never apply what it has not shown, never send an application twice,
// and never show text of others without internal/neutral. It must not link
// Kubernetes or etcd, so that it starts in milliseconds. It stands on floor 5.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/version"
)

const about = `Halligan finds the workload that brings a Kubernetes control plane down, and
stops it, through etcd, while the API server is overloaded or gone.

Mutations show their plan and ask. --yes answers, --dry-run stops after the
plan. What is done is recorded with its reason (--reason) and can be undone.

Exit status: 0 done, 1 error, 2 wrong usage, 3 plan is stale, 4 refused by
policy or guard, 5 not verified in time, 6 awaiting approval, 7 audit
unavailable, 8 cannot reach or authenticate.`

// terminal is what surrounds a command: where it reads and writes, and which of
// that a person sees.
type terminal struct {
	in                    io.Reader
	out, err              io.Writer
	inTTY, outTTY, errTTY bool
	env                   func(string) string
	now                   func() time.Time
	// settle is how long to ask what became of an application whose
	// connection broke, reprobe the time between two questions.
	settle, reprobe time.Duration
}

// options are the flags that every verb has.
type options struct {
	socket, output, reason, incident string
	yes, dryRun                      bool
	timeout                          time.Duration
}

// app is one run of the command.
type app struct {
	terminal
	options
	agent *agent // after connect
	// reported says that a mutation has printed its one object.
	reported bool
}

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
	return run(ctx, os.Args[1:], terminal{
		in: os.Stdin, out: os.Stdout, err: os.Stderr,
		inTTY: isTTY(os.Stdin), outTTY: isTTY(os.Stdout), errTTY: isTTY(os.Stderr),
		env: os.Getenv, now: time.Now,
		settle: settle, reprobe: 300 * time.Millisecond,
	})
}

func run(ctx context.Context, args []string, t terminal) int {
	a := &app{terminal: t}
	defer a.close()
	cmd, err := a.execute(ctx, args)
	if err == nil {
		return 0
	}
	f := fault.Of(err)
	if cmd != nil && mutates(cmd) && a.output != "table" && !a.reported {
		a.printResult(failedResult(f))
	}
	fmt.Fprintf(a.err, "halligan: %s\n", neutral.Line(f.Error()))
	return f.Code.Exit()
}

// execute runs the verb and returns its command, where there is one.
func (a *app) execute(ctx context.Context, args []string) (*cobra.Command, error) {
	actions, err := api.Actions()
	if err != nil {
		return nil, err
	}
	root := a.root(actions)
	if verb := unknownVerb(root, args); verb != "" {
		// A newer agent may know it.
		actions, err := a.ask(ctx, args, verb)
		if err != nil {
			hint := "see: halligan help"
			if s := root.SuggestionsFor(verb); len(s) > 0 {
				hint = "did you mean " + strings.Join(s, " or ") + "?"
			}
			return nil, fault.New(fault.Usage, hint, "unknown verb %q (%s)", verb, fault.Of(err).Message)
		}
		root = a.root(actions)
	}
	root.SetArgs(args)
	// What a script wants to read is needed before the flags are known good.
	a.scan(args)
	cmd, err := root.ExecuteContextC(ctx)
	return cmd, err
}

// unknownVerb returns the first word that is neither a flag nor known.
func unknownVerb(root *cobra.Command, args []string) string {
	cmd, rest, err := root.Find(args)
	if err != nil || cmd != root {
		return ""
	}
	loose := looseFlags(&options{}, func(string) string { return "" })
	if loose.Parse(rest) != nil || loose.NArg() == 0 {
		return ""
	}
	switch verb := loose.Arg(0); verb {
	case "help", "completion", cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd:
		return "" // cobra adds these when it executes
	default:
		return verb
	}
}

// ask returns the agent's own table if it has the verb.
func (a *app) ask(ctx context.Context, args []string, verb string) ([]*halliganv1.Action, error) {
	a.scan(args)
	if err := a.connect(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	table, err := a.agent.client.Describe(ctx, &halliganv1.DescribeRequest{})
	if err != nil {
		return nil, api.FromStatus(err)
	}
	for _, action := range table.GetActions() {
		if action.GetName() == verb {
			return table.GetActions(), nil
		}
	}
	return nil, errors.New("neither this client nor the agent has it")
}

// addFlags defines the flags that every verb has.
func (o *options) addFlags(flags *pflag.FlagSet, env func(string) string) {
	socket := env("HALLIGAN_SOCKET")
	if socket == "" {
		socket = api.DefaultSocket
	}
	o.output = "table"
	flags.StringVar(&o.socket, "socket", socket, "console `socket` of the agent (HALLIGAN_SOCKET)")
	flags.VarP((*format)(&o.output), "output", "o", "`form` of the output: table, json or yaml")
	flags.StringVar(&o.reason, "reason", env("HALLIGAN_REASON"), "`text` that says why, for the record (HALLIGAN_REASON)")
	flags.StringVar(&o.incident, "incident", env("HALLIGAN_INCIDENT"), "`id` of the incident, for the record (HALLIGAN_INCIDENT)")
	flags.BoolVarP(&o.yes, "yes", "y", false, "apply the plan without asking")
	flags.BoolVar(&o.dryRun, "dry-run", false, "stop after the plan")
	flags.DurationVar(&o.timeout, "timeout", 0, "longest `time` to wait for the agent, such as 30s (default: what the action may take)")
	for flag, variable := range map[string]string{"socket": "HALLIGAN_SOCKET", "reason": "HALLIGAN_REASON", "incident": "HALLIGAN_INCIDENT"} {
		// What the shell has set is no default of the help text.
		if env(variable) != "" {
			flags.Lookup(flag).DefValue = ""
		}
	}
}

// looseFlags parse the common flags and pass over all others.
func looseFlags(o *options, env func(string) string) *pflag.FlagSet {
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.ParseErrorsAllowlist.UnknownFlags = true
	flags.Usage = func() {}
	o.addFlags(flags, env)
	return flags
}

// scan takes socket and output from arguments that may be wrong elsewhere.
func (a *app) scan(args []string) {
	var o options
	_ = looseFlags(&o, a.env).Parse(args)
	a.socket, a.output = o.socket, o.output
}

// root builds the commands; flags take their values from the environment.
func (a *app) root(actions []*halliganv1.Action) *cobra.Command {
	root := &cobra.Command{
		Use: "halligan", Short: "Break-glass access to Kubernetes control planes", Long: about,
		SilenceErrors: true, SilenceUsage: true, Args: cobra.ArbitraryArgs, Version: version.String(),
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if a.timeout < 0 {
				return usage(cmd, "--timeout must not be negative")
			}
			return onlyMutations(cmd)
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SuggestionsMinimumDistance = 2 // cobra's own, which it sets too late
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var unknown *pflag.NotExistError
		if errors.As(err, &unknown) {
			if meant := kubectlFlags[unknown.GetSpecifiedName()]; meant != "" && cmd.Flags().Lookup(meant) != nil {
				return fault.New(fault.Usage, "did you mean --"+meant+"?", "unknown flag: --%s", unknown.GetSpecifiedName())
			}
		}
		return usage(cmd, "%s", strings.TrimSuffix(err.Error(), "."))
	})
	a.addFlags(root.PersistentFlags(), a.env)
	help := root.HelpFunc()
	root.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		if cmd.HasParent() && !mutates(cmd) {
			for _, name := range mutationFlags {
				root.PersistentFlags().Lookup(name).Hidden = true
			}
		}
		help(cmd, args)
	})
	for _, action := range actions {
		root.AddCommand(a.verb(action))
	}
	root.AddCommand(
		&cobra.Command{
			Use: "status", Short: "Show what the agent can do at this moment", Args: noArguments,
			RunE: func(cmd *cobra.Command, _ []string) error { return a.status(cmd.Context()) },
		},
		&cobra.Command{
			Use: "version", Short: "Show the release of this command", Args: noArguments,
			RunE: func(*cobra.Command, []string) error {
				_, err := fmt.Fprintf(a.out, "halligan %s %s/%s %s\n", version.String(), runtime.GOOS, runtime.GOARCH, runtime.Version())
				return err
			},
		})
	return root
}

// mutationFlags may stand before the verb, so all verbs parse them.
var mutationFlags = []string{"yes", "dry-run", "reason", "incident"}

func mutates(cmd *cobra.Command) bool { return cmd.Annotations["effect"] == "mutate" }

// onlyMutations refuses the flags that say something about a change where
// there is none.
func onlyMutations(cmd *cobra.Command) error {
	for _, name := range mutationFlags {
		if !mutates(cmd) && cmd.Flags().Changed(name) {
			return usage(cmd, "%s changes nothing: --%s does not apply", cmd.Name(), name)
		}
	}
	return nil
}

func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(cmd, "%s takes no arguments", cmd.Name())
	}
	return nil
}

// usage returns the error of a mistaken command line.
func usage(cmd *cobra.Command, text string, args ...any) *fault.Error {
	return fault.New(fault.Usage, "see: "+cmd.CommandPath()+" --help", text, args...)
}

// format is a form of output.
type format string

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "form" }
func (f *format) Set(s string) error {
	switch s {
	case "table", "json", "yaml":
		*f = format(s)
		return nil
	}
	return errors.New("must be table, json or yaml")
}
