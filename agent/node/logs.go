package node

import (
	"slices"
)

// Logs are where one component logs. All that is there of Pods and Files counts,
// then Links where there is none, then the units where nothing is.
type Logs struct {
	// Pods are folders of containers with logs as kubelets keep them.
	Pods []string
	// Links lead to such logs by other names.
	Links []string
	// Files are plain text; what was rotated lies beside them.
	Files []string
	// Units are those of the systemd journal.
	Units []string
	// Note tells what else is in them, or where else to look.
	Note string
}

// Components are what Row.Logs names, as people call them.
func Components() []string {
	return []string{"apiserver", "etcd", "controller-manager", "scheduler", "kubelet"}
}

// staticPods are the logs of the static pods that kubeadm and RKE2 name alike
// (kubernetes pkg/kubelet/kuberuntime/helpers.go: BuildPodLogsDirectory, and
// legacy.go of it).
func staticPods(kubelet Logs) map[string]Logs {
	return map[string]Logs{
		"apiserver":          staticPod("kube-system", "kube-apiserver", "kube-apiserver"),
		"etcd":               staticPod("kube-system", "etcd", "etcd"),
		"controller-manager": staticPod("kube-system", "kube-controller-manager", "kube-controller-manager"),
		"scheduler":          staticPod("kube-system", "kube-scheduler", "kube-scheduler"),
		"kubelet":            kubelet,
	}
}

func staticPod(namespace, pod, container string) Logs {
	return Logs{Pods: []string{"/var/log/pods/" + namespace + "_" + pod + "-*_*/" + container},
		Links: []string{"/var/log/containers/" + pod + "-*_" + namespace + "_" + container + "-*.log"}}
}

// oneProcess are the logs of a distribution whose components are one process.
func oneProcess(l Logs) map[string]Logs {
	all := map[string]Logs{}
	for _, component := range Components() {
		all[component] = l
	}
	return all
}

// talosLogs has no kubelet and no etcd: they are services, not pods.
var talosLogs = func() map[string]Logs {
	all := staticPods(Logs{Files: []string{"/var/log/kubelet.log"}, Note: "Talos may keep the logs of its services in memory: talosctl logs"})
	all["etcd"] = Logs{Files: []string{"/var/log/etcd.log"}, Note: all["kubelet"].Note}
	return all
}()

// LogsOf returns where the components log, per component: of the distributions
// whose files are on this node, or of the one that is named, and of all where there
// are none. root and distribution are as those of Detect. Nothing is guessed by
// looking in several places, since each names its own.
func LogsOf(root, distribution string) map[string][]Logs {
	h := host{root}
	var marked, all []Row
	bases := map[string]string{}
	for _, r := range rows {
		base, err := h.base(r)
		if err != nil {
			base = r.DataDir // a configuration that is broken says nothing
		}
		bases[r.Distribution] = base
		all = append(all, r)
		if r.Distribution == distribution || distribution == "" && h.first(base, r.Marks) != "" {
			marked = append(marked, r)
		}
	}
	if len(marked) == 0 {
		marked = all
	}
	out := map[string][]Logs{}
	for _, r := range marked {
		for component, l := range r.Logs {
			for _, patterns := range []*[]string{&l.Pods, &l.Links, &l.Files} {
				*patterns = slices.Clone(*patterns)
				for i, p := range *patterns {
					(*patterns)[i] = h.path(inBase(bases[r.Distribution], p))
				}
			}
			out[component] = append(out[component], l)
		}
	}
	return out
}
