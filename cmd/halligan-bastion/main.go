// Command halligan-bastion is the relay between people and nodes.
package main

import (
	"context"
	"os"

	"github.com/halligan-io/halligan/bastion"
	"github.com/halligan-io/halligan/bastion/store"
	"github.com/halligan-io/halligan/cmd/internal/daemon"
	"github.com/halligan-io/halligan/internal/daemonlog"
)

func main() {
	store.Child()
	daemon.Main("halligan-bastion", "Relay people to the nodes of the inventory, and nowhere else", bastion.DefaultConfigFile, run)
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
