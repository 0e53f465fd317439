// Package daemon is the command line of a daemon: one flag, and an error that
// tells what to do next. What the daemon does is its own package's; it must never
// know which one it runs. It stands on floor 5.
package daemon

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/version"
)

// Main runs a daemon until it ends or the process is told to, and exits. config
// says which file is read by default; run gets the one that was named, or "".
func Main(name, short, config string, run func(ctx context.Context, file string) error) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	help := "see: " + name + " --help"
	var file string
	cmd := &cobra.Command{
		Use:     name + " [--config FILE]",
		Short:   short,
		Version: version.String(),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fault.New(fault.Usage, help, "unexpected argument %q", args[0])
			}
			return nil
		},
		SilenceErrors: true, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), file) },
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fault.New(fault.Usage, help, "%w", err) })
	cmd.Flags().StringVar(&file, "config", "", "configuration file (default "+config+")")
	if err := cmd.ExecuteContext(ctx); err != nil {
		f := fault.Of(err)
		fmt.Fprintln(os.Stderr, name+":", neutral.Line(f.Error()))
		os.Exit(f.Code.Exit())
	}
}
