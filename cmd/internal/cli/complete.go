package cli

import (
	"context"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/api/verb"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// completions tells a shell what flags may be followed by.
func (a *app) completions(set *pflag.FlagSet) {
	// Cobra keeps completions by flag, whatever the command.
	holder := &cobra.Command{}
	offer := func(name string, values func() []string) {
		holder.Flags().AddFlag(set.Lookup(name))
		_ = holder.RegisterFlagCompletionFunc(name, func(_ *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
			return beginning(word, values()), cobra.ShellCompDirectiveNoFileComp
		})
	}
	offer("node", a.nodes)
	offer("cluster", func() []string {
		if b := a.untrusted(); b != nil {
			return clusters(b)
		}
		return nil
	})
	offer("bastion", func() (names []string) {
		if b := a.untrusted(); b != nil {
			for _, h := range b.Inventory.Bastions {
				names = append(names, h.Name)
			}
		}
		return names
	})
	offer("as", func() []string {
		var names []string
		for _, r := range trust.Roles() {
			names = append(names, r.String())
		}
		return names
	})
	offer("output", func() []string { return []string{"table", "json", "yaml"} })
}

// workloads are the kinds that can be scaled, kinds the others that one is
// likely to look for in an outage; an agent knows more.
var (
	workloads = []string{"cronjobs", "daemonsets", "deployments", "jobs", "replicasets", "replicationcontrollers", "statefulsets"}
	kinds     = []string{"apiservices", "clusterrolebindings", "clusterroles", "configmaps", "customresourcedefinitions", "events", "horizontalpodautoscalers", "leases",
		"mutatingwebhookconfigurations", "namespaces", "nodes", "persistentvolumeclaims", "poddisruptionbudgets", "pods", "rolebindings", "roles", "secrets",
		"serviceaccounts", "services", "validatingwebhookconfigurations"}
)

// complete answers a shell that asks what may follow, about verbs out of the
// table of actions. It asks no agent: somebody is typing.
func (a *app) complete(ctx context.Context, v *verb.Verbs, args []string) int {
	actions, err := api.Actions()
	if err != nil {
		return 1
	}
	root := v.Root(actions)
	for _, action := range actions {
		cmd, _, err := root.Find([]string{action.GetName()})
		if err != nil || cmd == root {
			continue
		}
		var offer []string
		directive := cobra.ShellCompDirectiveNoFileComp
		for _, p := range action.GetParameters() {
			if !p.GetPositional() || !strings.HasPrefix(p.GetPlaceholder(), "KIND") {
				continue
			}
			if offer = workloads; action.GetName() != "scale" {
				offer = slices.Concat(workloads, kinds)
			}
			if strings.HasPrefix(p.GetPlaceholder(), "KIND/") {
				offer = slices.Clone(offer)
				for i := range offer {
					offer[i] += "/"
				}
				directive |= cobra.ShellCompDirectiveNoSpace
			}
		}
		cmd.ValidArgsFunction = func(_ *cobra.Command, before []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(before) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return beginning(word, offer), directive
		}
	}
	root.SetArgs(args)
	if err := root.ExecuteContext(ctx); err != nil {
		return 1
	}
	return 0
}

// beginning returns the words that begin so.
func beginning(with string, words []string) (fit []string) {
	for _, w := range words {
		if strings.HasPrefix(w, with) {
			fit = append(fit, w)
		}
	}
	return fit
}

// nodes returns the names to offer: NODE where it is unique, else NODE.CLUSTER.
func (a *app) nodes() []string {
	b := a.untrusted()
	if b == nil {
		return nil
	}
	all := b.Inventory.Nodes(a.cluster)
	names := make([]string, 0, len(all))
	for _, h := range all {
		name := h.Name
		if slices.ContainsFunc(all, func(o bundle.Host) bool { return o.Name == h.Name && o.Cluster != h.Cluster }) {
			name = h.ID()
		}
		names = append(names, name)
	}
	return names
}

// untrusted returns the bundle for names to offer, nil without one. Nothing is
// kept and nothing is said, since somebody is typing.
func (a *app) untrusted() *bundle.Bundle {
	path, err := filepath.EvalSymlinks(a.bundle)
	if err != nil {
		return nil
	}
	data, err := readFile(path, bundle.MaxSize)
	if err != nil {
		return nil
	}
	file, err := bundle.Parse(data)
	if err != nil || file.Inventory == nil {
		return nil
	}
	return &bundle.Bundle{Inventory: file.Inventory}
}
