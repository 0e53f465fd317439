// Package version says which release a binary is. It must never be used to
// decide what the other side can do: that is what Describe is for. It stands on
// floor 0.
package version

import "runtime/debug"

// release is set with -ldflags "-X …/internal/version.release=v1.2.3".
var release string

// String returns the release, or for a build without one the commit that it
// was built from, with +dirty where the tree had other changes, or "devel".
func String() string {
	if release != "" {
		return release
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	return describe(info)
}

func describe(info *debug.BuildInfo) string {
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	revision, dirty := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "+dirty"
		}
	}
	if revision == "" {
		return "devel"
	}
	return "devel-" + revision + dirty
}
