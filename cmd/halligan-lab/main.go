// Command halligan-lab runs a whole control plane on loopback addresses, for
// demonstrations and tests. Its logic is in cmd/internal/lab.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/cmd/internal/lab"
	"github.com/halligan-io/halligan/internal/fault"
)

func main() {
	ends := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // by nohup
		ends = append(ends, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	// A second signal ends the process at once; its children go with it.
	context.AfterFunc(ctx, stop)
	if err := execute(ctx, command(), os.Args[1:]); err != nil {
		e := fault.Of(err)
		fmt.Fprintln(os.Stderr, "halligan-lab:", e)
		os.Exit(e.Code.Exit())
	}
}

// execute refuses an unknown command also where --help follows, which cobra
// would take for a question about the root.
func execute(ctx context.Context, root *cobra.Command, args []string) error {
	root.InitDefaultHelpCmd()
	if cmd, rest, err := root.Find(args); err == nil && cmd == root && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") && !strings.HasPrefix(rest[0], cobra.ShellCompRequestCmd) {
		return lab.NoArgs(root, rest)
	}
	root.SetArgs(args)
	return root.ExecuteContext(ctx)
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "halligan-lab",
		Short:         "A whole control plane on loopback, for demonstrations and tests",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          lab.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(up(), demo(), lab.StormCommand())
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return fault.New(fault.Usage, "see halligan-lab --help", "%w", err)
	})
	return root
}

func up() *cobra.Command {
	o := lab.Options{Progress: os.Stderr}
	var k lab.KubeFlags
	c := &cobra.Command{
		Use:   "up --dir DIR",
		Short: "Run a lab in the foreground until it is interrupted",
		Long: "Runs three etcd members, three agents and two bastions, seeds Kubernetes objects into an empty etcd, prints one line\n" +
			"\"ready DIR\" and stays in the foreground. SIGINT, SIGTERM or SIGHUP stops everything that it started.\n" +
			"DIR/env and DIR/env.console are there to be sourced, and DIR/ssh_config is for stock ssh:\n" +
			"  ssh -F DIR/ssh_config responder@cp-1 status\n" +
			"  ssh -F DIR/ssh_config -J bastion-b responder@cp-1 status\n" +
			"with an identity for each role in DIR/ids. All keys below DIR are in the clear: it is a lab.\n" +
			"With --kube a real Kubernetes control plane runs on the etcd, with simulated nodes; then --objects counts runaway\n" +
			"ConfigMaps, by default none.\n" +
			"It refuses a disk that it might fill: it takes half a gigabyte and three times 8 KiB for each object; with --kube,\n" +
			"where a storm may fill etcd, three times --etcd-quota and 1.4 GB, by default 7.4 GiB.",
		Args: lab.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir := o.Dir
			if dir == "" {
				return fault.New(fault.Usage, "say where with --dir DIR", "the lab needs a folder")
			}
			if err := k.Into(cmd, &o); err != nil {
				return err
			}
			context.AfterFunc(cmd.Context(), func() { fmt.Fprintln(os.Stderr, "stopping...") })
			l, err := lab.Up(cmd.Context(), o)
			if err != nil {
				return err
			}
			fmt.Println("ready", dir)
			err = errors.Join(l.Wait(cmd.Context()), l.Close())
			fmt.Fprintln(os.Stderr, "stopped; the state stays in", dir)
			return err
		},
	}
	c.Flags().StringVar(&o.Dir, "dir", "", "folder for all of the lab's state")
	flags(c, &o)
	k.Add(c)
	return c
}

func demo() *cobra.Command {
	o := lab.KubeDemoOptions{Options: lab.Options{Progress: os.Stderr}}
	var kube bool
	c := &cobra.Command{
		Use:   "demo",
		Short: "Stage an outage and heal it: without any API server, or with --kube a real one under a storm",
		Long: "Runs a lab in a temporary folder and drives the real halligan command through it, each effect seen again\n" +
			"with an independent etcd client, or with --kube through kubectl. Exits 0 if every step held.",
		Args: lab.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// A caught SIGPIPE turns into a failed write; an ignored one would be
			// inherited by the commands that the demo runs.
			signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
			ctx, out := lab.Audience(cmd.Context(), os.Stdout)
			var err error
			if o.Report != "" {
				if o.Report, err = filepath.Abs(o.Report); err != nil {
					return err
				}
			}
			if kube && cmd.Flags().Changed("objects") {
				return fault.New(fault.Usage, "leave it out", "--objects is for a demo without a real control plane")
			}
			if kube {
				return lab.KubeDemo(ctx, o, out)
			}
			if cmd.Flags().Changed("shape") {
				return fault.New(fault.Usage, "give --kube too", "--shape is for a demo with a real control plane")
			}
			return lab.Demo(ctx, o.Options, out)
		},
	}
	flags(c, &o.Options)
	c.Flags().BoolVar(&kube, "kube", false, "a real control plane under a storm (build it with make kube)")
	c.Flags().StringVar(&o.Report, "report", "", "file for the incident's report, a page for a browser (default none)")
	c.Flags().StringVar(&o.Shape, "shape", "b", "with --kube, a: flow control on, the victim a deploy job; b: flow control off, the victim a person")
	return c
}

func flags(c *cobra.Command, o *lab.Options) {
	c.Flags().StringVar(&o.Net, "net", lab.DefaultNet, "first three numbers of the nodes' loopback addresses; the nodes are .11 to .13, the bastions .21 and .22")
	c.Flags().IntVar(&o.Objects, "objects", 2000, "how many Kubernetes objects to seed, about; 0: none")
	c.Flags().Int64Var(&o.QuotaBytes, "etcd-quota", 0, "bytes that each etcd member may hold before NOSPACE; 0: what the objects need, at least 2 GiB; for a demo with --kube 512 MiB")
	c.Flags().IntVar(&o.Nodes, "nodes", 20, "how many worker nodes the seeded cluster has")
}
