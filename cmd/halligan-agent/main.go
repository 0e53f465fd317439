// Command halligan-agent is the daemon on a control-plane node.
package main

import (
	"context"
	"os"

	"github.com/halligan-io/halligan/agent"
	"github.com/halligan-io/halligan/cmd/internal/daemon"
	"github.com/halligan-io/halligan/internal/daemonlog"
	"github.com/halligan-io/halligan/internal/neutral"
)

func main() {
	daemon.Main("halligan-agent", "Serve break-glass access to this control-plane node", agent.DefaultConfigFile+", which may be missing", run)
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
