package cli

import (
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// completions tells a shell what flags may be followed by.
func (a *app) completions(set *pflag.FlagSet) {
	// Cobra keeps completions by flag, whatever the command.
	holder := &cobra.Command{}
	offer := func(name string, values func() []string) {
		holder.Flags().AddFlag(set.Lookup(name))
		_ = holder.RegisterFlagCompletionFunc(name, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return values(), cobra.ShellCompDirectiveNoFileComp
		})
	}
	offer("node", a.nodes)
	offer("cluster", func() []string {
		if b := a.untrusted(); b != nil {
			return clusters(b)
		}
		return nil
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
