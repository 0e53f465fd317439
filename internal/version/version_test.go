package version

import (
	"runtime/debug"
	"testing"
	"time"
)

func TestBuilt(t *testing.T) {
	vcs := &debug.BuildInfo{Settings: []debug.BuildSetting{{Key: "vcs.time", Value: "2027-01-02T03:04:05Z"}}}
	for _, c := range []struct {
		linked string
		info   *debug.BuildInfo
		want   string
	}{
		{"2027-05-06T07:08:09Z", vcs, "2027-05-06T07:08:09Z"},
		{"", vcs, "2027-01-02T03:04:05Z"},
		{"yesterday", vcs, "2027-01-02T03:04:05Z"},
		{"", &debug.BuildInfo{}, oldest},
		{"", nil, oldest},
	} {
		if got := builtAt(c.linked, c.info).Format(time.RFC3339); got != c.want {
			t.Errorf("%q: %s, want %s", c.linked, got, c.want)
		}
	}
	if now := time.Now(); Built().After(now) {
		t.Errorf("built at %v, and it is %v", Built(), now)
	}
}

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
