package lab

import (
	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/internal/fault"
)

// KubeFlags are the flags of a lab with a real control plane.
type KubeFlags struct {
	wanted bool
	KubeOptions
}

// Add makes the command take them.
func (k *KubeFlags) Add(c *cobra.Command) {
	c.Flags().BoolVar(&k.wanted, "kube", false, "run a real kube-apiserver, kube-controller-manager and kube-scheduler, and kwok (build them with make kube)")
	c.Flags().IntVar(&k.APIServers, "apiservers", 1, "how many API servers, one a node")
	c.Flags().IntVar(&k.Procs, "apiserver-procs", 0, "GOMAXPROCS of each API server; 0: all cores")
	c.Flags().IntVar(&k.MaxInFlight, "max-inflight", 0, "most reads in flight in an API server, and half of it writes; 0: its default")
	c.Flags().BoolVar(&k.NoFlowControl, "no-flow-control", false, "turn API priority and fairness off")
	c.Flags().BoolVar(&k.Encrypt, "encrypt", false, "with --kube, encrypt Secrets at rest; without it they always are")
	c.Flags().BoolVar(&k.Audit, "audit", false, "write the API servers' audit logs, DIR/log/audit-NODE.log")
}

// Into sets the options of the lab; flags that need --kube are wrong usage
// without it.
func (k *KubeFlags) Into(c *cobra.Command, o *Options) error {
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
