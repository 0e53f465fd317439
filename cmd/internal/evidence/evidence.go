// Package evidence is halligan audit: it fetches what daemons have recorded,
// verifies it offline, and shows, proves, exports and tells what holds of it.
//
// It must never show an event that was not verified, write into a folder that it
// was asked to look at, or change anything at a daemon but by what the daemon puts
// on record of the questions. It stands on floor 5.
package evidence

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// Surroundings are what a command is run in.
type Surroundings struct {
	Out, Err       io.Writer
	OutTTY, ErrTTY bool
	Env            func(string) string
	Now            func() time.Time
	// PrintJSON prints JSON in the form that -o asks for.
	PrintJSON func(text []byte) error
	// Bundle returns the bundle that the line names, nil where it names none.
	Bundle func() (*bundle.Bundle, error)
	// State returns the user's own folder for what is fetched by the way.
	State func() (string, error)
	// Nodes logs in at each node of the cluster, or at the one that --node names,
	// and Bastions at each bastion; both call do for each that answers, some at a
	// time, and return when all calls have, with why the others do not. The error
	// is that there is nobody to ask.
	Nodes, Bastions func(ctx context.Context, do func(context.Context, Daemon)) (failed map[string]error, err error)
}

// Daemon is a connection to one.
type Daemon struct {
	// Name is NODE.CLUSTER or NAME.bastion; empty: it says itself.
	Name string
	halliganv1.EvidenceClient
	// VKey is the key of its log where the connection itself vouches for it: at the
	// console of this machine.
	VKey string
}

// rows are the verbs, in the order of the help text.
var rows = []func(*tool) *cobra.Command{
	(*tool).fetch, (*tool).verify, (*tool).show, (*tool).prove, (*tool).replay, (*tool).export, (*tool).story, (*tool).recover,
}

// tool is one run of a command below audit.
type tool struct {
	Surroundings
	// keys and identities are what --key and --identity-file say.
	keys, identities []string
	cmd              *cobra.Command // that runs
	// vouched are keys that the console of this machine vouches for.
	vouched []string
}

// Command returns halligan audit with all below it.
func Command(s Surroundings) *cobra.Command {
	t := &tool{Surroundings: s}
	c := &cobra.Command{
		Use: "audit", Short: "Fetch, verify and read the evidence that agents and bastions keep",
		Long: "Reads what agents and bastions have recorded: who did what, when, why, and what came of it. Each keeps a\n" +
			"transparency log (C2SP tlog-tiles) that bastions countersign; nothing is believed that does not verify, and\n" +
			"outside tools verify the same files.\n\n" +
			"  halligan audit show --incident INC-7           fetch, verify, and show what belongs to it\n" +
			"  halligan audit fetch DIR                       all of it, to keep or to carry away\n" +
			"  halligan audit verify DIR --bundle FILE        offline; names the first entry that does not hold\n" +
			"  halligan audit prove ID                        a proof that an event is in its log\n" +
			"  halligan audit replay SESSION                  what somebody saw\n" +
			"  halligan audit report INC-7 --html FILE        its story, for who was not there\n\n" +
			"Exit status: 0 it holds, 1 it does not, 2 wrong usage, 8 nobody could be reached.",
		Args: cobra.ArbitraryArgs, RunE: group,
		// In place of the root's: nothing here changes a cluster.
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			t.cmd = cmd
			for _, name := range []string{"yes", "dry-run", "approval", "alone"} {
				if cmd.Flags().Changed(name) {
					return usage(cmd, "%s changes nothing: --%s does not apply", cmd.CommandPath(), name)
				}
			}
			for _, name := range []string{"reason", "incident"} {
				if cmd.Flags().Changed(name) && cmd.Annotations[name] == "" {
					return usage(cmd, "--%s does not apply to %s", name, cmd.CommandPath())
				}
			}
			return nil
		},
	}
	c.PersistentFlags().StringArrayVar(&t.keys, "key", nil, "verifier `key` of a log or a witness that is believed, beside what --bundle vouches for; may be repeated")
	for _, row := range rows {
		c.AddCommand(row(t))
	}
	return c
}

// uses says that a verb has a meaning for flags of the root, such as incident.
func uses(c *cobra.Command, flags ...string) *cobra.Command {
	c.Annotations = map[string]string{}
	for _, name := range flags {
		c.Annotations[name] = "used"
	}
	return c
}

// group is a command that only has others below it.
func group(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(cmd, "unknown command %q", args[0])
	}
	return cmd.Help()
}

func usage(cmd *cobra.Command, text string, args ...any) error {
	return fault.New(fault.Usage, "see: "+cmd.CommandPath()+" --help", text, args...)
}

// arguments demands some number of them.
func arguments(least, most int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < least || len(args) > most {
			return usage(cmd, "%s needs %s", cmd.CommandPath(), what)
		}
		return nil
	}
}

// argument returns one that may be left out.
func argument(args []string, i int) string {
	if i < len(args) {
		return args[i]
	}
	return ""
}

// flag returns the value of a flag of the root.
func (t *tool) flag(name string) string {
	if f := t.cmd.Flag(name); f != nil {
		return f.Value.String()
	}
	return ""
}

// table reports whether people read the answer, and not scripts.
func (t *tool) table() bool { return t.flag("output") == "table" }

// trust is whom to believe.
func (t *tool) trust() (evidence.Trust, error) {
	b, err := t.Bundle()
	out := evidence.Trust{Bundle: b, Keys: slices.Concat(t.keys, t.vouched), Now: t.Now()}
	for _, name := range t.identities {
		if err != nil {
			break
		}
		var data []byte
		data, err = readFile(name, logkey.MaxSize)
		out.Identities = append(out.Identities, data)
	}
	return out, err
}

// open returns verified evidence: of the folder or archive, or, where none is
// named, fetched by the way. What does not hold is said, and verdict tells of it
// at the end; only what holds is read.
func (t *tool) open(ctx context.Context, name string) (*evidence.Evidence, *evidence.Report, error) {
	if name == "" {
		dir, err := t.State()
		if err != nil {
			return nil, nil, err
		}
		if err := t.fetchInto(ctx, dir); err != nil {
			return nil, nil, err
		}
		name = dir
	}
	e, err := evidence.Open(name)
	if err != nil {
		return nil, nil, err
	}
	trust, err := t.trust()
	if err != nil {
		e.Close()
		return nil, nil, err
	}
	r, err := e.Verify(ctx, trust)
	if err != nil {
		e.Close()
		return nil, nil, err
	}
	said := 0
	for _, l := range r.Logs {
		for _, p := range l.Problems {
			if said++; said <= maxSaid {
				t.note("not verified: %s", p)
			}
		}
	}
	if said > maxSaid {
		t.note("and %d more", said-maxSaid)
	}
	return e, r, nil
}

// maxSaid is how many problems are told beside an answer.
const maxSaid = 4

// verdict is the error of evidence that does not hold.
func verdict(r *evidence.Report) error {
	if r.OK() {
		return nil
	}
	for _, l := range r.Logs {
		if len(l.Problems) > 0 {
			return fault.New(fault.Failed, "keep it as it is, and compare it with what bastions and other nodes have: halligan audit fetch NEW-FOLDER", "the evidence does not hold: %s", l.Problems[0])
		}
	}
	return nil
}

// note says something beside the answer.
func (t *tool) note(text string, args ...any) {
	fmt.Fprintf(t.Err, "note: %s\n", neutral.LineMax(fmt.Sprintf(text, args...), 400))
}

// say prints a line of an answer.
func (t *tool) say(text string, args ...any) {
	fmt.Fprintln(t.Out, neutral.Line(fmt.Sprintf(text, args...)))
}

// filters are the flags that choose events.
type filters struct {
	evidence.Filter
	kinds        []string
	since, until string
}

// add defines them. The node is a flag of the root, and so is the incident, which
// there is that of a change, and not offered elsewhere.
func (f *filters) add(set *pflag.FlagSet) {
	set.StringVar(&f.Incident, "incident", "", "only what belongs to this `incident`")
	set.StringVar(&f.Person, "person", "", "only what this `person` did or approved")
	set.StringVar(&f.Object, "object", "", "only what changed objects with this `text` in their keys")
	set.StringVar(&f.Action, "action", "", "only this `action`, such as scale")
	set.StringVar(&f.Session, "session", "", "only this `session`")
	set.StringSliceVar(&f.kinds, "kind", nil, "only events of this `kind`, such as intent, outcome, login; may be repeated")
	set.StringVar(&f.since, "since", "", "only from this `time` on: 2026-01-31T09:00:00Z, or 2h for that long ago")
	set.StringVar(&f.until, "until", "", "only before this `time`")
}

// filter returns what they say.
func (t *tool) filter(f *filters) (evidence.Filter, error) {
	if t.cmd.Flags().Changed("node") {
		f.Origin = t.flag("node")
	}
	for _, kind := range f.kinds {
		if !slices.Contains(audit.Kinds, audit.Kind(kind)) {
			return f.Filter, fault.New(fault.Usage, "use one of "+strings.Trim(fmt.Sprint(audit.Kinds), "[]"), "--kind: there are no events of the kind %.40q", kind)
		}
		f.Kinds = append(f.Kinds, audit.Kind(kind))
	}
	var err error
	if f.Since, err = t.time("since", f.since); err != nil {
		return f.Filter, err
	}
	f.Until, err = t.time("until", f.until)
	return f.Filter, err
}

// time reads a time, or how long ago it was.
func (t *tool) time(flag, text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if ago, err := time.ParseDuration(text); err == nil && ago >= 0 {
		return t.Now().Add(-ago), nil
	}
	for _, form := range []string{time.RFC3339, time.DateOnly} {
		if at, err := time.Parse(form, text); err == nil {
			return at, nil
		}
	}
	return time.Time{}, usage(t.cmd, "--%s: %q is neither a time nor a duration", flag, text)
}
