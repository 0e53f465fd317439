// Package verb turns the rows of an agent's table of actions into verbs of a
// command line: it parses words, shows plans, asks, applies, and says what came
// of it. The command halligan and the agent's SSH shell are both made of it, so
// that a line does the same wherever it is typed.
//
// It decides nothing about a cluster: kinds, rights and plans are the agent's.
// It must never apply what it has not shown, never send an application twice,
// and never show text of others without internal/neutral. Many shells run in
// one process, so it must not touch the process: no standard streams, variables,
// files or signals but those that it is handed. It must not link Kubernetes or
// etcd, so that the command starts in milliseconds. It stands on floor 1.
package verb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"time"

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

// Terminal is what surrounds a command: where it reads and writes, and which of
// that a person sees.
type Terminal struct {
	In                    io.Reader
	Out, Err              io.Writer
	InTTY, OutTTY, ErrTTY bool
	// Env returns a variable of the environment, "" where it is not set.
	Env func(string) string
	Now func() time.Time
	// Ask shows a question and returns the line that answers it; nil: the
	// question goes to Err and the answer is a line of In, which reads on when
	// the command is interrupted.
	Ask func(ctx context.Context, question string) (string, error)
	// Settle is how long to ask what became of an application whose
	// connection broke, Reprobe the time between two questions.
	Settle, Reprobe time.Duration
}

// Agent is a connection to one agent, whatever the door.
type Agent interface {
	halliganv1.AgentClient
	io.Closer
}

// Options are what a command line has of its own. The zero value of each but
// Connect adds nothing.
type Options struct {
	// Connect reaches the agent, at first and again after the connection broke.
	// It is called after the flags are parsed, and never twice at a time.
	Connect func(context.Context) (Agent, error)
	// Flags defines flags that every verb has. It is called for each tree of
	// commands, and binds the same variables each time.
	Flags func(*pflag.FlagSet)
	// Commands returns verbs of its own; they replace others of the same name.
	Commands func(*Verbs) []*cobra.Command
	// ReadFile, if set, makes --approval take files.
	ReadFile func(name string) ([]byte, error)
	// Again returns a context that ends with the next interrupt after the one
	// that ended the command's own; nil: there is none to come.
	Again func(context.Context) (context.Context, context.CancelFunc)
	// Within is set where the command line is inside the agent: there is no
	// shell to complete in, and no agent that knows more verbs.
	Within bool
	// Self, if set, says whom the agent takes the caller for, so that whoami need
	// not ask.
	Self func() *halliganv1.StatusResponse
	// Await, if set, is handed a plan that others have to approve first, and returns
	// the approvals that it finds, if any. It waits for them where wait says that
	// a person does, until the context ends.
	Await func(ctx context.Context, plan *halliganv1.Plan, wait bool) (approvals []string)
	// Where returns the flags that lead back to the agent of a plan, for the
	// lines that are to be typed later.
	Where func(*halliganv1.Plan) []string
}

// ErrGone is the cause of a context that ends because nobody is there to watch
// any more. It leaves an action under way alone; any other cause stops it. A
// fault in the same chain says that the login ended, at which the agent stops it
// by itself.
var ErrGone = errors.New("nobody watches any more")

// Verbs is one run of a command line.
type Verbs struct {
	Terminal
	with  Options
	flags // what the line says
	agent Agent
	// reported says that a mutation has printed its one object, asked that the
	// lines for approvers were.
	reported, asked bool
}

// flags are what every verb has.
type flags struct {
	output, reason, incident string
	approvals                []string
	yes, dryRun, alone       bool
	timeout                  time.Duration
}

// New returns verbs for one command line.
func New(t Terminal, with Options) *Verbs {
	return &Verbs{Terminal: t, with: with, flags: flags{output: "table"}}
}

// Run runs the verb that the words name and returns its exit status.
func (v *Verbs) Run(ctx context.Context, args []string) int {
	defer v.Close()
	cmd, err := v.execute(ctx, args)
	if err == nil {
		return 0
	}
	f := fault.Of(err)
	if cmd != nil && mutates(cmd) && v.output != "table" && !v.reported {
		_ = v.printResult(failedResult(f))
	}
	fmt.Fprintf(v.Err, "halligan: %s\n", neutral.Line(f.Error()))
	return f.Code.Exit()
}

// Connect reaches the agent anew.
func (v *Verbs) Connect(ctx context.Context) (Agent, error) {
	v.Close()
	agent, err := v.with.Connect(ctx)
	if err != nil {
		return nil, err
	}
	v.agent = agent
	return agent, nil
}

// Close ends the connection, if there is one.
func (v *Verbs) Close() {
	if v.agent != nil {
		_ = v.agent.Close()
		v.agent = nil
	}
}

func (v *Verbs) connect(ctx context.Context) error {
	_, err := v.Connect(ctx)
	return err
}

// execute runs the verb and returns its command, where there is one.
func (v *Verbs) execute(ctx context.Context, args []string) (*cobra.Command, error) {
	actions, err := api.Actions()
	if err != nil {
		return nil, err
	}
	root := v.Root(actions)
	ahead := lookAhead(root, args)
	if verb := v.unknownVerb(root, args, ahead); verb != "" {
		// A newer agent may know it.
		actions, err := v.ask(ctx, root, ahead, verb)
		if err != nil {
			hint := "see: halligan help"
			if s := root.SuggestionsFor(verb); len(s) > 0 {
				hint = "did you mean " + strings.Join(s, " or ") + "?"
			}
			return nil, fault.New(fault.Usage, hint, "unknown verb %q (%s)", neutral.LineMax(verb, maxText), fault.Of(err).Message)
		}
		root = v.Root(actions)
	}
	root.SetArgs(append([]string{}, args...)) // not nil, which would be the words of the process
	// What a script wants to read is needed before the flags are known good.
	if f := ahead.Lookup("output"); f.Changed {
		_ = (*format)(&v.output).Set(f.Value.String())
	}
	cmd, err := root.ExecuteContextC(ctx)
	return cmd, err
}

// lookAhead parses the flags that every verb has out of words that may be wrong
// elsewhere, and passes over all others. It sets nothing but its result.
func lookAhead(root *cobra.Command, args []string) *pflag.FlagSet {
	ahead := pflag.NewFlagSet("", pflag.ContinueOnError)
	ahead.ParseErrorsAllowlist.UnknownFlags = true
	ahead.Usage = func() {}
	root.PersistentFlags().VisitAll(func(f *pflag.Flag) {
		seen := *f
		seen.Value, seen.Changed = new(word), false
		ahead.AddFlag(&seen)
	})
	_ = ahead.Parse(args)
	return ahead
}

// word is a value as it was typed.
type word string

func (w *word) String() string     { return string(*w) }
func (w *word) Type() string       { return "word" }
func (w *word) Set(s string) error { *w = word(s); return nil }

// unknownVerb returns the first word that is neither a flag nor known.
func (v *Verbs) unknownVerb(root *cobra.Command, args []string, ahead *pflag.FlagSet) string {
	if cmd, _, err := root.Find(args); err != nil || cmd != root || ahead.NArg() == 0 {
		return ""
	}
	verb := ahead.Arg(0)
	added := []string{"help"} // by cobra, when it executes
	if !v.with.Within {
		added = append(added, "completion", cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd)
	}
	if slices.Contains(added, verb) {
		return ""
	}
	return verb
}

// ask returns the agent's own table if it has the verb.
func (v *Verbs) ask(ctx context.Context, root *cobra.Command, ahead *pflag.FlagSet, verb string) ([]*halliganv1.Action, error) {
	if v.with.Within {
		return nil, errors.New("this agent has no such verb")
	}
	ahead.Visit(func(f *pflag.Flag) { _ = root.PersistentFlags().Set(f.Name, f.Value.String()) })
	if err := v.connect(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	table, err := v.agent.Describe(ctx, &halliganv1.DescribeRequest{})
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
func (v *Verbs) addFlags(set *pflag.FlagSet) {
	v.output = "table"
	approvalHelp := "`token` of an approval by somebody else, as halligan approve prints it; may be repeated"
	if v.with.ReadFile != nil {
		approvalHelp = strings.Replace(approvalHelp, "; may", ", or a file of it; may", 1)
	}
	set.VarP((*format)(&v.output), "output", "o", "`form` of the output: table, json or yaml")
	set.StringVar(&v.reason, "reason", v.Env("HALLIGAN_REASON"), "`text` that says why, for the record (HALLIGAN_REASON)")
	set.StringVar(&v.incident, "incident", v.Env("HALLIGAN_INCIDENT"), "`id` of the incident, for the record (HALLIGAN_INCIDENT)")
	set.BoolVarP(&v.yes, "yes", "y", false, "apply the plan without asking")
	set.BoolVar(&v.dryRun, "dry-run", false, "stop after the plan")
	set.StringArrayVar(&v.approvals, "approval", nil, approvalHelp)
	set.BoolVar(&v.alone, "alone", false, "apply without the approvals of others, where the policy allows it; raises the loudest alarm")
	set.DurationVar(&v.timeout, "timeout", 0, "longest `time` to wait for the agent, such as 30s (default: what the action may take)")
	for _, name := range []string{"reason", "incident"} {
		// What the shell has set is no default of the help text.
		set.Lookup(name).DefValue = ""
	}
	if v.with.Flags != nil {
		v.with.Flags(set)
	}
}

// Root builds the commands; flags take their values from the environment.
func (v *Verbs) Root(actions []*halliganv1.Action) *cobra.Command {
	root := &cobra.Command{
		Use: "halligan", Short: "Break-glass access to Kubernetes control planes", Long: about,
		SilenceErrors: true, SilenceUsage: true, Args: cobra.ArbitraryArgs, Version: version.String(),
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if v.timeout < 0 {
				return Usage(cmd, "--timeout must not be negative")
			}
			return onlyMutations(cmd)
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SuggestionsMinimumDistance = 2 // cobra's own, which it sets too late
	root.CompletionOptions.DisableDefaultCmd = v.with.Within
	root.SetIn(v.In)
	root.SetOut(v.Out)
	root.SetErr(v.Err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var unknown *pflag.NotExistError
		if errors.As(err, &unknown) {
			if meant := kubectlFlags[unknown.GetSpecifiedName()]; meant != "" && cmd.Flags().Lookup(meant) != nil {
				return fault.New(fault.Usage, "did you mean --"+meant+"?", "unknown flag: --%s", unknown.GetSpecifiedName())
			}
		}
		return Usage(cmd, "%s", strings.TrimSuffix(err.Error(), "."))
	})
	v.addFlags(root.PersistentFlags())
	root.SetHelpCommand(helpCommand(root))
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
		root.AddCommand(v.verb(action))
	}
	root.AddCommand(v.logsCommand())
	root.AddCommand(v.planCommand(), v.applyCommand(actions), v.whoamiCommand(), v.topCommand(),
		&cobra.Command{
			Use: "status", Short: "Show what the agent can do at this moment", Args: NoArguments,
			RunE: func(cmd *cobra.Command, _ []string) error { return v.status(cmd.Context()) },
		},
		&cobra.Command{
			Use: "version", Short: "Show the release of this command", Args: NoArguments,
			RunE: func(*cobra.Command, []string) error {
				_, err := fmt.Fprintf(v.Out, "halligan %s %s/%s %s\n", version.String(), runtime.GOOS, runtime.GOARCH, runtime.Version())
				return err
			},
		})
	if v.with.Commands != nil {
		for _, own := range v.with.Commands(v) {
			for _, cmd := range root.Commands() {
				if cmd.Name() == own.Name() {
					root.RemoveCommand(cmd)
				}
			}
			root.AddCommand(own)
		}
	}
	return root
}

// helpCommand is cobra's, which would end the process where it cannot write.
func helpCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use: "help [VERB]", Short: "Help about any verb",
		ValidArgsFunction: func(*cobra.Command, []string, string) (verbs []cobra.Completion, _ cobra.ShellCompDirective) {
			for _, c := range root.Commands() {
				if c.IsAvailableCommand() {
					verbs = append(verbs, cobra.CompletionWithDesc(c.Name(), c.Short))
				}
			}
			return verbs, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			about, _, err := root.Find(args)
			if err != nil || about == root && len(args) > 0 {
				return Usage(root, "there is no verb %q", args[0])
			}
			about.InitDefaultHelpFlag()
			about.InitDefaultVersionFlag()
			return about.Help()
		},
	}
}

// mutationFlags may stand before the verb, so all verbs parse them.
var mutationFlags = []string{"yes", "dry-run", "reason", "incident", "approval", "alone"}

func mutates(cmd *cobra.Command) bool { return cmd.Annotations["effect"] == "mutate" }

// onlyMutations refuses the flags that say something about a change where
// there is none.
func onlyMutations(cmd *cobra.Command) error {
	// Showing a Secret is on record too.
	reveal := cmd.Flags().Lookup("reveal")
	for _, name := range mutationFlags {
		if reveal != nil && reveal.Changed && (name == "reason" || name == "incident") {
			continue
		}
		if !mutates(cmd) && cmd.Flags().Changed(name) {
			return Usage(cmd, "%s changes nothing: --%s does not apply", cmd.Name(), name)
		}
	}
	return nil
}

// NoArguments refuses any argument.
func NoArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return Usage(cmd, "%s takes no arguments", cmd.Name())
	}
	return nil
}

// Usage returns the error of a mistaken command line.
func Usage(cmd *cobra.Command, text string, args ...any) *fault.Error {
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
