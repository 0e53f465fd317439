package lab

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/internal/fault"
)

// StormCommand is halligan-lab storm.
func StormCommand() *cobra.Command {
	o := DefaultStorm()
	o.Out = os.Stdout
	c := &cobra.Command{
		Use:   "storm --dir DIR",
		Short: "Make an outage in a lab that was started with up --kube",
		Long: "Puts a DaemonSet telemetry/collector into the lab and plays its pods: each with its own token, from its own\n" +
			"address, until the pod is gone and for no other reason. Tells once a second what was asked and answered, and how\n" +
			"long a victim and the administrator wait. SIGINT, SIGTERM or the end of --duration stops it; what it put into\n" +
			"the cluster stays. Kinds:\n\n" + stormKindsHelp(),
		Args: NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return RunStorm(cmd.Context(), o) },
	}
	f := c.Flags()
	f.StringVar(&o.Dir, "dir", "", "folder of the lab")
	f.StringVar(&o.Kind, "kind", o.Kind, "kind of storm")
	f.StringVar(&o.Shape, "shape", o.Shape, "a: flow control on, the victim another ServiceAccount; b: flow control off, the victim a person;\ndefault: what the lab was started as")
	f.IntVar(&o.ClientsPerPod, "clients-per-pod", o.ClientsPerPod, "clients in each pod of the offender")
	f.Float64Var(&o.BackoffShare, "backoff-share", o.BackoffShare, "share of the clients that back off as client-go does; the others hammer on")
	f.DurationVar(&o.Pace, "pace", o.Pace, "least time between two requests of a client that hammers on; 0: none")
	f.DurationVar(&o.Pause, "pause", o.Pause, "rest of a client that backs off after it was answered")
	f.IntVar(&o.Objects, "configmaps", o.Objects, "how many ConfigMaps there are to LIST")
	f.IntVar(&o.ObjectBytes, "object-bytes", o.ObjectBytes, "size of each object that the storm makes")
	f.DurationVar(&o.Duration, "duration", o.Duration, "how long it goes on")
	return c
}

// NoArgs refuses words that no command takes.
func NoArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fault.New(fault.Usage, "see halligan-lab --help", "%q is not understood here", args[0])
	}
	return nil
}
