// Command halligan-lab runs a whole control plane on loopback addresses, for
// demonstrations and tests. Its logic is in cmd/internal/lab.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/cmd/internal/lab"
	"github.com/halligan-io/halligan/internal/fault"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends the process at once; its children go with it.
	context.AfterFunc(ctx, stop)
	err := command().ExecuteContext(ctx)
	if err != nil {
		e := fault.Of(err)
		fmt.Fprintln(os.Stderr, "halligan-lab:", e)
		os.Exit(e.Code.Exit())
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "halligan-lab",
		Short:         "A whole control plane on loopback, for demonstrations and tests",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(up(), demo())
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return fault.New(fault.Usage, "see halligan-lab --help", "%w", err)
	})
	return root
}

func up() *cobra.Command {
	o := lab.Options{Progress: os.Stderr}
	c := &cobra.Command{
		Use:   "up --dir DIR",
		Short: "Run a lab in the foreground until it is interrupted",
		Long: "Runs three etcd members and three agents, seeds Kubernetes objects into an empty etcd, prints one line\n" +
			"\"ready DIR\" and stays in the foreground. SIGINT or SIGTERM stops everything that it started.\n" +
			"DIR/env and DIR/env.console are there to be sourced.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir := o.Dir
			if dir == "" {
				return fault.New(fault.Usage, "say where with --dir DIR", "the lab needs a folder")
			}
			l, err := lab.Up(cmd.Context(), o)
			if err != nil {
				return err
			}
			defer l.Close()
			fmt.Println("ready", dir)
			return l.Wait(cmd.Context())
		},
	}
	c.Flags().StringVar(&o.Dir, "dir", "", "folder for all of the lab's state")
	flags(c, &o)
	return c
}

func demo() *cobra.Command {
	o := lab.Options{Progress: os.Stderr}
	c := &cobra.Command{
		Use:   "demo",
		Short: "Find, stop and put back workloads of a cluster that has no API server",
		Long: "Runs a lab in a temporary folder and drives the real halligan command through it, each effect seen again\n" +
			"with an independent etcd client. Exits 0 if every step held.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return lab.Demo(cmd.Context(), o, os.Stdout) },
	}
	flags(c, &o)
	return c
}

func flags(c *cobra.Command, o *lab.Options) {
	c.Flags().StringVar(&o.Net, "net", lab.DefaultNet, "first three numbers of the nodes' loopback addresses; the nodes are .11 to .13")
	c.Flags().IntVar(&o.Objects, "objects", 2000, "how many Kubernetes objects to seed, about; 0: none")
	c.Flags().IntVar(&o.Nodes, "nodes", 20, "how many worker nodes the seeded cluster has")
}

func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fault.New(fault.Usage, "see halligan-lab --help", "%q is not understood here", args[0])
	}
	return nil
}
