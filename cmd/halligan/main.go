// Command halligan is what a person types: one verb for each action of an
// agent. Everything it does is in cmd/internal/cli; it must never hold logic of
// its own. It stands on floor 5.
package main

import (
	"os"

	"github.com/halligan-io/halligan/cmd/internal/cli"
)

func main() { os.Exit(cli.Main()) }
