// Command halligan-lab runs a whole control plane on loopback addresses, for
// demonstrations and tests. Its logic is in cmd/internal/lab.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
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
	var k kube
	c := &cobra.Command{
		Use:   "up --dir DIR",
		Short: "Run a lab in the foreground until it is interrupted",
		Long: "Runs three etcd members and three agents, seeds Kubernetes objects into an empty etcd, prints one line\n" +
			"\"ready DIR\" and stays in the foreground. SIGINT, SIGTERM or SIGHUP stops everything that it started.\n" +
			"DIR/env and DIR/env.console are there to be sourced. With --kube a real Kubernetes control plane runs on the\n" +
			"etcd, with simulated nodes; then --objects counts runaway ConfigMaps, by default none.",
		Args: lab.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir := o.Dir
			if dir == "" {
				return fault.New(fault.Usage, "say where with --dir DIR", "the lab needs a folder")
			}
			if err := k.into(cmd, &o); err != nil {
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
	k.flags(c)
	return c
}

// kube are the flags of a lab with a real control plane.
type kube struct {
	wanted bool
	lab.KubeOptions
}

func (k *kube) flags(c *cobra.Command) {
	c.Flags().BoolVar(&k.wanted, "kube", false, "run a real kube-apiserver, kube-controller-manager and kube-scheduler, and kwok (build them with make kube)")
	c.Flags().IntVar(&k.APIServers, "apiservers", 1, "how many API servers, one a node")
	c.Flags().IntVar(&k.Procs, "apiserver-procs", 0, "GOMAXPROCS of each API server; 0: all cores")
	c.Flags().IntVar(&k.MaxInFlight, "max-inflight", 0, "most reads in flight in an API server, and half of it writes; 0: its default")
	c.Flags().BoolVar(&k.NoFlowControl, "no-flow-control", false, "turn API priority and fairness off")
	c.Flags().BoolVar(&k.Encrypt, "encrypt", false, "with --kube, encrypt Secrets at rest; without it they always are")
	c.Flags().BoolVar(&k.Audit, "audit", false, "write the API servers' audit logs, DIR/log/audit-NODE.log")
}

// into sets the options of the lab.
func (k *kube) into(c *cobra.Command, o *lab.Options) error {
	if k.wanted {
		o.Kube = &k.KubeOptions
		if !c.Flags().Changed("objects") {
			o.Objects = 0
		}
		return nil
	}
	for _, name := range []string{"apiservers", "apiserver-procs", "max-inflight", "no-flow-control", "encrypt", "audit"} {
		if c.Flags().Changed(name) {
			return fault.New(fault.Usage, "give --kube too", "--%s is for a lab with a real control plane", name)
		}
	}
	return nil
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
	c.Flags().StringVar(&o.Shape, "shape", "b", "with --kube, a: flow control on, the victim a deploy job; b: flow control off, the victim a person")
	return c
}

func flags(c *cobra.Command, o *lab.Options) {
	c.Flags().StringVar(&o.Net, "net", lab.DefaultNet, "first three numbers of the nodes' loopback addresses; the nodes are .11 to .13")
	c.Flags().IntVar(&o.Objects, "objects", 2000, "how many Kubernetes objects to seed, about; 0: none")
	c.Flags().Int64Var(&o.QuotaBytes, "etcd-quota", 0, "bytes that each etcd member may hold before NOSPACE; 0: what the objects need, at least 2 GiB")
	c.Flags().IntVar(&o.Nodes, "nodes", 20, "how many worker nodes the seeded cluster has")
}
