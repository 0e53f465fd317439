package version

import (
	"runtime/debug"
	"testing"
)

func TestDescribe(t *testing.T) {
	vcs := []debug.BuildSetting{{Key: "vcs.revision", Value: "0123456789abcdef"}, {Key: "vcs.modified", Value: "true"}}
	for _, c := range []struct {
		version  string
		settings []debug.BuildSetting
		want     string
	}{
		{"v1.2.3", vcs, "v1.2.3"},
		{"(devel)", vcs, "devel-0123456789ab+dirty"},
		{"", vcs[:1], "devel-0123456789ab"},
		{"(devel)", nil, "devel"},
	} {
		info := &debug.BuildInfo{Main: debug.Module{Version: c.version}, Settings: c.settings}
		if got := describe(info); got != c.want {
			t.Errorf("%s %v: %s, want %s", c.version, c.settings, got, c.want)
		}
	}
	if String() == "" {
		t.Error("a binary without a name")
	}
}
