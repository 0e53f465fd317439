package cli

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/api/verb"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/sshclient"
)

// sshCommand opens an agent's shell.
func (a *app) sshCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ssh NODE", Short: "Open the break-glass shell of a node's agent",
		Long:    "Open the break-glass shell of a node's agent: the same verbs, with line editing,\nhistory and completion. It is no shell of the machine.",
		Example: "  halligan ssh cp-1\n  halligan ssh cp-1.prod --as observer",
		ValidArgsFunction: func(_ *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return beginning(word, a.nodes()), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) > 1:
				return fault.New(fault.Usage, "for a single verb: halligan VERB --node NODE", "ssh opens a shell and takes one NODE")
			case len(args) == 0:
				return verb.Usage(cmd, "ssh needs one NODE")
			case strings.Contains(args[0], "@"):
				role, node, _ := strings.Cut(args[0], "@")
				return fault.New(fault.Usage, fmt.Sprintf("say halligan ssh %s --as %s", neutral.LineMax(node, 64), neutral.LineMax(role, 64)), "ssh takes a NODE, and the role apart from it")
			case a.given("socket") || a.given("node"):
				return verb.Usage(cmd, "the argument says where to go: --socket and --node do not apply")
			case a.bundle == "":
				return fault.New(fault.Usage, "name it with --bundle or HALLIGAN_BUNDLE", "ssh needs a bundle, which says where agents are")
			}
			a.node = args[0]
			f, err := a.open()
			if err != nil {
				return err
			}
			host, err := f.find(a.node, a.cluster)
			if err != nil {
				return err
			}
			client, err := f.enter(cmd.Context(), host)
			if err != nil {
				return err
			}
			defer client.Close()
			t := sshclient.Terminal{In: a.In, Out: a.Out, Err: a.Err, Name: a.Env("TERM")}
			if file, ok := a.In.(*os.File); ok && a.InTTY {
				t.TTY = file
			}
			a.status, err = client.Shell(cmd.Context(), t)
			return err
		},
	}
}
