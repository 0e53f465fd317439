package node

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/internal/fault"
)

// settings are the flags of an API server, and how paths that it sees map to
// the host's.
type settings struct {
	flags  map[string][]string
	mounts []mount // nil: it runs on the host itself
	// without is of a server of k3s that only keeps etcd.
	without bool
}

type mount struct{ inside, outside string }

// flag returns the last value, as flags are.
func (s *settings) flag(name string) string {
	if v := s.flags[name]; len(v) > 0 {
		return v[len(v)-1]
	}
	return ""
}

// list returns the values of a flag that takes several, separated by commas.
func (s *settings) list(name string) (out []string) {
	for _, v := range s.flags[name] {
		for _, e := range strings.Split(v, ",") {
			if e = strings.TrimSpace(e); e != "" {
				out = append(out, e)
			}
		}
	}
	return out
}

// host returns the host's path of a path that the API server sees, "" where it
// is on no volume of the host.
func (s *settings) host(p string) string {
	if p == "" || s.mounts == nil {
		return p
	}
	best, out := -1, ""
	for _, m := range s.mounts {
		rest, ok := strings.CutPrefix(p, m.inside)
		if ok && (rest == "" || rest[0] == '/' || m.inside == "/") && len(m.inside) > best {
			best, out = len(m.inside), path.Join(m.outside, rest)
		}
	}
	return out
}

// add takes --name=value and --name value.
func (s *settings) add(args []string) {
	for i, a := range args {
		name, ok := strings.CutPrefix(a, "--")
		if !ok {
			continue
		}
		name, value, ok := strings.Cut(name, "=")
		if !ok && i+1 < len(args) && !strings.HasPrefix(args[i+1], "--") {
			value = args[i+1]
		}
		s.flags[name] = append(s.flags[name], value)
	}
}

// pod is what matters here of a static pod.
type pod struct {
	Kind string `json:"kind"`
	Spec struct {
		Containers []struct {
			Name         string   `json:"name"`
			Command      []string `json:"command"`
			Args         []string `json:"args"`
			VolumeMounts []struct {
				Name      string `json:"name"`
				MountPath string `json:"mountPath"`
				SubPath   string `json:"subPath"`
			} `json:"volumeMounts"`
		} `json:"containers"`
		Volumes []struct {
			Name     string `json:"name"`
			HostPath *struct {
				Path string `json:"path"`
			} `json:"hostPath"`
		} `json:"volumes"`
	} `json:"spec"`
}

// pod reads the container of a static pod; file is a path as first returns it.
func (h host) pod(file, container string) (*settings, error) {
	rel, err := filepath.Rel(h.root, file)
	if err != nil {
		return nil, err
	}
	data, err := h.read(rel)
	if err != nil {
		return nil, err
	}
	var p pod
	if err := yaml.Unmarshal(data, &p); err != nil {
		return nil, fault.New(fault.Failed, configure, "the static pod %s cannot be read: %w", file, err)
	}
	for _, c := range p.Spec.Containers {
		if c.Name != container {
			continue
		}
		s := &settings{flags: map[string][]string{}, mounts: []mount{}}
		var args []string
		for _, a := range append(slices.Clone(c.Command), c.Args...) {
			// OpenShift starts it from a shell script in one argument.
			for _, f := range strings.Fields(a) {
				args = append(args, strings.Trim(f, `'"`))
			}
		}
		s.add(args)
		for _, m := range c.VolumeMounts {
			for _, v := range p.Spec.Volumes {
				if v.Name == m.Name && v.HostPath != nil {
					s.mounts = append(s.mounts, mount{path.Clean(m.MountPath), path.Join(v.HostPath.Path, m.SubPath)})
				}
			}
		}
		return s, nil
	}
	return nil, fault.New(fault.Failed, configure, "the static pod %s has no container %s", file, container)
}

// settings collects the API server's flags from wherever the row keeps them.
func (h host) settings(r Row, base string, l *Layout) (*settings, error) {
	s := &settings{flags: map[string][]string{}}
	if m := h.first(base, r.Manifest); m != "" {
		var err error
		if s, err = h.pod(m, "kube-apiserver"); err != nil {
			return nil, err
		}
		if c := s.host(s.flag("openshift-config")); c != "" {
			if err := h.openshift(c, s); err != nil {
				return nil, err
			}
		}
		return s, h.kine(r, base, nil)
	}
	if len(r.Manifest) > 0 {
		l.note("no API server's static pod is here: the default key prefix is assumed")
	}
	if r.Config == "" {
		return s, nil
	}
	own, err := h.rancher(r)
	if err != nil {
		return nil, err
	}
	if err := h.kine(r, base, own); err != nil {
		return nil, err
	}
	for _, a := range own.flags["kube-apiserver-arg"] {
		s.add([]string{"--" + strings.TrimPrefix(a, "--")})
	}
	s.without = own.flag("disable-apiserver") == "true"
	if p := own.flag("https-listen-port"); p != "" {
		s.flags["secure-port"] = []string{p} // its supervisor passes on what is the API server's
	}
	for from, to := range map[string]string{"datastore-endpoint": "etcd-servers", "datastore-cafile": "etcd-cafile", "datastore-certfile": "etcd-certfile", "datastore-keyfile": "etcd-keyfile"} {
		if v := own.flag(from); v != "" {
			s.flags[to] = []string{v}
		}
	}
	if own.flag("disable-etcd") == "true" && len(s.flags["etcd-servers"]) == 0 {
		// Such a server reaches the members through a relay of its own.
		s.flags["etcd-servers"] = []string{"https://127.0.0.1:2379"}
	}
	return s, nil
}

// openshift adds the arguments in the configuration file that OpenShift's API
// server is started with.
func (h host) openshift(file string, s *settings) error {
	data, err := h.read(file)
	if err != nil || data == nil {
		return err
	}
	var cfg struct {
		APIServerArguments map[string][]string `json:"apiServerArguments"`
	}
	if err := yaml.Unmarshal(data, &cfg); err != nil {
		return fault.New(fault.Failed, configure, "the API server's configuration %s cannot be read: %w", file, err)
	}
	for k, v := range cfg.APIServerArguments {
		s.flags[k] = v
	}
	return nil
}

// kine refuses databases other than etcd. k3s writes etcd's client credentials
// even where it keeps its data in SQLite, so that they prove nothing.
func (h host) kine(r Row, base string, own *settings) error {
	other := ""
	if own != nil {
		if e := own.flag("datastore-endpoint"); e != "" {
			scheme, _, ok := strings.Cut(e, "://")
			if ok && (scheme == "http" || scheme == "https") {
				return nil // an external etcd
			}
			if !ok {
				scheme = "sqlite"
			}
			other = scheme // never the rest, which holds a password
		}
	}
	if other == "" && h.first(base, r.Member) == "" && h.first(base, r.Kine) != "" && (own == nil || own.flag("disable-etcd") != "true") {
		other = "sqlite"
	}
	if other == "" {
		return nil
	}
	return fault.New(fault.Failed, "use the local API server (--via api); reading and changing objects without it needs etcd",
		"this %s keeps its data in another database through kine (%s), not in etcd", r.Distribution, other)
}

// base returns the row's data folder.
func (h host) base(r Row) (string, error) {
	if r.Config == "" {
		return "", nil
	}
	own, err := h.rancher(r)
	if err != nil {
		return "", err
	}
	if d := own.flag("data-dir"); d != "" {
		return d, nil
	}
	return r.DataDir, nil
}

// rancher reads the configuration of k3s and RKE2: config.yaml, config.yaml.d in
// the order of names, a later file's value replacing an earlier one's and a key
// with + adding to it; then what the unit and its environment say.
func (h host) rancher(r Row) (*settings, error) {
	s := &settings{flags: map[string][]string{}}
	files, _ := filepath.Glob(h.path(r.Config + ".d/*.yaml"))
	for _, f := range append([]string{h.path(r.Config)}, files...) {
		rel, err := filepath.Rel(h.root, f)
		if err != nil {
			return nil, err
		}
		data, err := h.read(rel)
		if err != nil {
			return nil, err
		}
		var m map[string]any
		if err := yaml.Unmarshal(data, &m); err != nil {
			return nil, fault.New(fault.Failed, configure, "%s cannot be read: %w", f, err)
		}
		for k, v := range m {
			var values []string
			if list, ok := v.([]any); ok {
				for _, e := range list {
					values = append(values, fmt.Sprint(e))
				}
			} else {
				values = []string{fmt.Sprint(v)}
			}
			if key, adds := strings.CutSuffix(k, "+"); adds {
				s.flags[key] = append(s.flags[key], values...)
			} else {
				s.flags[k] = values
			}
		}
	}
	for _, u := range r.Units {
		data, err := h.read(u)
		if err != nil {
			return nil, err
		}
		text := strings.ReplaceAll(string(data), "\\\n", " ")
		for line := range strings.Lines(text) {
			line = strings.TrimSpace(line)
			if cmd, ok := strings.CutPrefix(line, "ExecStart="); ok {
				args := strings.Fields(cmd)
				for i := range args {
					args[i] = strings.Trim(args[i], `'"`)
				}
				s.add(args)
			}
			for env, flag := range map[string]string{"DATASTORE_ENDPOINT": "datastore-endpoint", "DATASTORE_CAFILE": "datastore-cafile", "DATASTORE_CERTFILE": "datastore-certfile", "DATASTORE_KEYFILE": "datastore-keyfile", "DATA_DIR": "data-dir"} {
				if v, ok := strings.CutPrefix(line, strings.ToUpper(r.Distribution)+"_"+env+"="); ok {
					s.flags[flag] = []string{strings.Trim(v, `'"`)}
				}
			}
		}
	}
	return s, nil
}

// serves returns where the API server of this node can be reached on it
// (apiserver/pkg/server/options/serving.go; k3s and RKE2 have the same default).
func (s *settings) serves() string {
	port := s.flag("secure-port")
	if port == "" {
		port = "6443"
	}
	name := s.flag("bind-address")
	if name == "" {
		name = "0.0.0.0"
	}
	if e, err := ipPort("https://" + net.JoinHostPort(name, port)); err == nil {
		return e
	}
	return "127.0.0.1:6443"
}

// listens returns where the local member can be reached: its loopback address
// if it listens there. file is a mark of the member; only a static pod can tell.
func (h host) listens(file string) (string, error) {
	const usual = "127.0.0.1:2379"
	if ext := filepath.Ext(file); ext != ".yaml" {
		return usual, nil
	}
	s, err := h.pod(file, "etcd")
	if err != nil {
		return "", err
	}
	first := ""
	for _, u := range s.list("listen-client-urls") {
		e, err := ipPort(u)
		if err != nil {
			continue
		}
		if a := netip.MustParseAddrPort(e); a.Addr().IsLoopback() {
			return e, nil
		}
		if first == "" {
			first = e
		}
	}
	if first == "" {
		return usual, nil
	}
	return first, nil
}

// ipPort returns IP:port of a URL. The unspecified address and localhost mean
// this node.
func ipPort(raw string) (string, error) {
	u, err := url.Parse(strings.TrimSpace(raw))
	if err != nil || u.Scheme != "http" && u.Scheme != "https" {
		return "", errors.New("not a http or https URL")
	}
	name, port := u.Hostname(), u.Port()
	if name == "localhost" {
		name = "127.0.0.1"
	}
	if port == "" {
		port = "2379"
	}
	ap, err := netip.ParseAddrPort("[" + name + "]:" + port)
	if ip, ierr := netip.ParseAddr(name); ierr == nil && ip.Is4() {
		ap, err = netip.ParseAddrPort(name + ":" + port)
	}
	if err != nil {
		return "", errors.New("it is a host name, and names need DNS, which may be what failed")
	}
	if ap.Addr().IsUnspecified() {
		ip := netip.MustParseAddr("127.0.0.1")
		if ap.Addr().Is6() {
			ip = netip.IPv6Loopback()
		}
		ap = netip.AddrPortFrom(ip, ap.Port())
	}
	return ap.String(), nil
}
