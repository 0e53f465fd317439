// Package version says which release a binary is. It must never be used to
// decide what the other side can do: that is what Describe is for. It stands on
// floor 0.
package version

import (
	"runtime/debug"
	"time"
)

// release is set with -ldflags "-X …/internal/version.release=v1.2.3".
var release string

// built is set with -ldflags "-X …/internal/version.built=2026-11-23T12:00:00Z",
// the time of the commit, so that two builds of it are the same.
var built string

// oldest is before every build of this code: what Built falls back to. Raise it
// with a release.
const oldest = "2026-03-01T00:00:00Z"

// Built returns a time that had passed when this binary was built: the one that
// the linker was given, else that of the commit, else a constant of the source.
// A clock that shows less is wrong.
func Built() time.Time {
	info, _ := debug.ReadBuildInfo()
	return builtAt(built, info)
}

func builtAt(linked string, info *debug.BuildInfo) time.Time {
	candidates := []string{linked}
	if info != nil {
		for _, s := range info.Settings {
			if s.Key == "vcs.time" {
				candidates = append(candidates, s.Value)
			}
		}
	}
	for _, text := range candidates {
		if t, err := time.Parse(time.RFC3339, text); err == nil {
			return t
		}
	}
	t, _ := time.Parse(time.RFC3339, oldest) // a test parses it
	return t
}

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
