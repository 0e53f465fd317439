package agent

import (
	"context"
	"fmt"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/agent/console"
	"github.com/halligan-io/halligan/agent/door"
	"github.com/halligan-io/halligan/internal/alarm"
)

// serve opens the doors and serves until the context ends, then stops
// gracefully.
func serve(ctx context.Context, c Config, engine door.Engine, log zerolog.Logger) error {
	alarms, err := alarm.Open(alarm.Options{Node: c.Node, Cluster: c.Cluster, Sinks: c.Alarms, Log: log})
	if err != nil {
		return err
	}
	defer alarms.Close()
	socket, err := console.Listen(c.Socket)
	if err != nil {
		return err
	}
	server, err := door.New(door.Options{Engine: engine, Cluster: c.Cluster, Alarms: alarms, Log: log})
	if err != nil {
		socket.Close()
		return err
	}
	defer server.Shutdown()
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(socket) }()
	log.Info().Str("socket", c.Socket).Msg("console open")
	select {
	case err := <-ended:
		return fmt.Errorf("serving the console: %w", err)
	case <-ctx.Done():
	}
	server.Shutdown()
	return <-ended
}
