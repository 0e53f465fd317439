package verb

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/halligan-io/halligan/api"
)

// Complete returns what may stand where the beginning of a word stands after
// others, in order. It is for a line editor; shells of a person's own machine
// are served by cobra.
func (v *Verbs) Complete(words []string, beginning string) []string {
	actions, err := api.Actions()
	if err != nil {
		return nil
	}
	root := v.Root(actions)
	root.InitDefaultHelpCmd()
	cmd, rest, err := root.Find(words)
	if err != nil {
		return nil
	}
	var all []string
	pending := pendingFlag(cmd, words)
	switch {
	case pending != nil && pending.Name == "output":
		all = []string{"table", "json", "yaml"}
	case pending != nil: // a value that only the person knows
	case strings.HasPrefix(beginning, "-"):
		cmd.InitDefaultHelpFlag()
		offer := func(f *pflag.Flag) {
			if !f.Hidden && (mutates(cmd) || !slices.Contains(mutationFlags, f.Name)) {
				all = append(all, "--"+f.Name)
			}
		}
		cmd.LocalFlags().VisitAll(offer)
		cmd.InheritedFlags().VisitAll(offer)
	case len(cmd.ValidArgs) > 0:
		if !slices.ContainsFunc(rest, func(w string) bool { return slices.Contains(cmd.ValidArgs, w) }) {
			all = slices.Clone(cmd.ValidArgs)
		}
	case cmd == root || cmd.Name() == "help":
		for _, c := range root.Commands() {
			if c.IsAvailableCommand() || c.Name() == "help" {
				all = append(all, c.Name())
			}
		}
	}
	all = slices.DeleteFunc(all, func(s string) bool { return !strings.HasPrefix(s, beginning) })
	slices.Sort(all)
	return slices.Compact(all)
}

// pendingFlag returns the flag whose value comes next, if any.
func pendingFlag(cmd *cobra.Command, words []string) *pflag.Flag {
	if len(words) == 0 {
		return nil
	}
	last := words[len(words)-1]
	var f *pflag.Flag
	switch name, long := strings.CutPrefix(last, "--"); {
	case long:
		f = cmd.Flag(name)
	case len(last) == 2 && last[0] == '-':
		if f = cmd.Flags().ShorthandLookup(last[1:]); f == nil {
			f = cmd.InheritedFlags().ShorthandLookup(last[1:])
		}
	}
	if f == nil || f.NoOptDefVal != "" {
		return nil
	}
	return f
}
