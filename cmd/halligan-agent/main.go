// Command halligan-agent is the daemon on a control-plane node.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/agent"
	"github.com/halligan-io/halligan/internal/daemonlog"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var file string
	cmd := &cobra.Command{
		Use:     "halligan-agent [--config FILE]",
		Short:   "Serve break-glass access to this control-plane node",
		Version: version.String(),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fault.New(fault.Usage, "see: halligan-agent --help", "unexpected argument %q", args[0])
			}
			return nil
		},
		SilenceErrors: true, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), file) },
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return fault.New(fault.Usage, "see: halligan-agent --help", "%w", err)
	})
	cmd.Flags().StringVar(&file, "config", "", "configuration file (default "+agent.DefaultConfigFile+", which may be missing)")
	if err := cmd.ExecuteContext(ctx); err != nil {
		f := fault.Of(err)
		fmt.Fprintln(os.Stderr, "halligan-agent:", neutral.Line(f.Error()))
		os.Exit(f.Code.Exit())
	}
}

func run(ctx context.Context, file string) error {
	c, notes, distribution, err := agent.LoadConfig(file)
	if err != nil {
		return err
	}
	log, err := daemonlog.New(os.Stderr, c.LogLevel, c.Node)
	if err != nil {
		return err
	}
	for _, n := range notes {
		log.Warn().Msg(neutral.Line(n))
	}
	return agent.Run(ctx, c, distribution, log)
}
