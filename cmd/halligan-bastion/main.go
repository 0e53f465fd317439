// Command halligan-bastion is the relay between people and nodes.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/bastion"
	"github.com/halligan-io/halligan/bastion/store"
	"github.com/halligan-io/halligan/internal/daemonlog"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/version"
)

func main() {
	store.Child()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var file string
	cmd := &cobra.Command{
		Use:     "halligan-bastion [--config FILE]",
		Short:   "Relay people to the nodes of the inventory, and nowhere else",
		Version: version.String(),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fault.New(fault.Usage, "see: halligan-bastion --help", "unexpected argument %q", args[0])
			}
			return nil
		},
		SilenceErrors: true, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), file) },
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return fault.New(fault.Usage, "see: halligan-bastion --help", "%w", err)
	})
	cmd.Flags().StringVar(&file, "config", "", "configuration file (default "+bastion.DefaultConfigFile+")")
	if err := cmd.ExecuteContext(ctx); err != nil {
		f := fault.Of(err)
		fmt.Fprintln(os.Stderr, "halligan-bastion:", neutral.Line(f.Error()))
		os.Exit(f.Code.Exit())
	}
}

func run(ctx context.Context, file string) error {
	c, err := bastion.LoadConfig(file)
	if err != nil {
		return err
	}
	log, err := daemonlog.New(os.Stderr, c.LogLevel, c.Name)
	if err != nil {
		return err
	}
	return bastion.Run(ctx, c, log)
}
