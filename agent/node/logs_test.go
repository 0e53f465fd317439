package node

import (
	"slices"
	"strings"
	"testing"
)

// TestLogsOfEveryDistribution: each row says where each component logs.
func TestLogsOfEveryDistribution(t *testing.T) {
	for _, r := range Rows() {
		for _, component := range Components() {
			l, ok := r.Logs[component]
			if !ok || len(l.Pods)+len(l.Files)+len(l.Units) == 0 || len(l.Pods) > 0 && len(l.Links) == 0 {
				t.Errorf("%s: %s: %+v", r.Distribution, component, l)
			}
			for _, p := range slices.Concat(l.Pods, l.Links, l.Files) {
				if !strings.HasPrefix(p, "/") && !strings.HasPrefix(p, dataDir) || strings.Contains(p, "audit") {
					t.Errorf("%s: %s: %s", r.Distribution, component, p)
				}
			}
		}
		if len(r.Logs) != len(Components()) {
			t.Errorf("%s: %d components", r.Distribution, len(r.Logs))
		}
	}
	// Of what is on the node, or is named; of all where nothing is.
	for _, c := range []struct {
		files        map[string]string
		distribution string
		want         int
	}{
		{map[string]string{"/etc/kubernetes/manifests/kube-apiserver.yaml": ""}, "", 1},
		{map[string]string{"/etc/kubernetes/manifests/kube-apiserver.yaml": ""}, "k3s", 1},
		{map[string]string{"/etc/kubernetes/manifests/kube-apiserver.yaml": "", "/var/lib/rancher/k3s/server/tls/x": ""}, "", 2},
		{map[string]string{"/etc/rancher/k3s/config.yaml": "{broken"}, "", len(Rows())},
	} {
		if got := LogsOf(tree(t, c.files), c.distribution)["etcd"]; len(got) != c.want {
			t.Errorf("%v, %q: %d places", c.files, c.distribution, len(got))
		}
	}
}
