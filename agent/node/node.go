// Package node knows where the distributions of Kubernetes keep what an agent
// needs on a control-plane node: etcd's credentials and address, the API
// server's flags, the encryption configuration, administrators' kubeconfigs.
//
// A new distribution is one row of the table. The package only reads files. It
// must never ask DNS or a running component, since those may be what failed,
// and never guess between two distributions. It stands on floor 4, below
// agent/action.
package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/halligan-io/halligan/internal/fault"
)

// Layout is what was found on this node. Paths are absolute.
type Layout struct {
	// Distribution is the name of the row.
	Distribution string
	// Endpoints are IP:port of etcd: the local member alone where one runs
	// here, else those of the API server's flags.
	Endpoints []string
	// CAFile, CertFile and KeyFile are etcd client credentials. Insecure says
	// that the API server itself speaks to etcd without TLS; then they are
	// empty.
	CAFile, CertFile, KeyFile string
	Insecure                  bool
	// Prefix is that of every key (--etcd-prefix), with a leading slash.
	Prefix string
	// EncryptionConfig is the file of --encryption-provider-config on the host;
	// empty where nothing is encrypted.
	EncryptionConfig string
	// Overrides are resources that live in another etcd.
	Overrides []EtcdOverride
	// Kubeconfigs are administrators', the most powerful first, where the
	// distribution keeps them: they need not be there yet.
	Kubeconfigs []string
	// APIServer is IP:port of the API server on this node, and APIServerName a name
	// in its certificate; both are empty where none runs here.
	APIServer, APIServerName string
	// Notes are remarks for the operator: what was dropped, assumed or is odd.
	Notes []string
}

// EtcdOverride is one entry of --etcd-servers-overrides.
type EtcdOverride struct {
	// Resource is plural.group, or plural alone for the core group.
	Resource string
	Servers  []string // IP:port
}

// defaultPrefix is --etcd-prefix's
// (kubernetes pkg/kubeapiserver/options/options.go: DefaultEtcdPathPrefix).
const defaultPrefix = "/registry"

// configure is what all errors of Detect say next.
const configure = "set etcd's endpoints and credential files in the agent's configuration"

// Detect finds the distribution whose control plane runs on this node and
// returns its layout. root is "/", or a folder that stands for it; distribution
// names the only row that is looked at, for a node with the files of several,
// and is "" otherwise. It fails when no row or more than one fits, when the
// database is not etcd, and when a file that decides something cannot be read.
func Detect(root, distribution string) (*Layout, error) {
	h := host{root}
	var found []Row
	var bases []string
	for _, r := range rows {
		if distribution != "" && r.Distribution != distribution {
			continue
		}
		base, err := h.base(r)
		if err != nil {
			return nil, err
		}
		if h.first(base, r.Marks) != "" {
			found, bases = append(found, r), append(bases, base)
		}
	}
	switch len(found) {
	case 0:
		looked := distribution
		if looked == "" {
			looked = strings.Join(Distributions(), ", ")
		}
		return nil, fault.New(fault.Failed, "run the agent on a control-plane node, or "+configure, "this node has no control plane of %s", looked)
	case 1:
		return h.layout(found[0], bases[0])
	}
	names := make([]string, len(found))
	for i, r := range found {
		names[i] = r.Distribution
	}
	return nil, fault.New(fault.Failed, "name the one that runs with distribution in the agent's configuration",
		"this node has the files of more than one distribution: %s", strings.Join(names, " and "))
}

// Distributions returns the names of the table's rows.
func Distributions() []string {
	names := make([]string, len(rows))
	for i, r := range rows {
		names[i] = r.Distribution
	}
	return names
}

func (h host) layout(r Row, base string) (*Layout, error) {
	l := &Layout{Distribution: r.Distribution, Prefix: defaultPrefix}
	l.note(r.Notes...)
	s, err := h.settings(r, base, l)
	if err != nil {
		return nil, err
	}
	if p := s.flag("etcd-prefix"); p != "" {
		// The API server does the same (apiserver/pkg/storage/etcd3/store.go).
		l.Prefix = path.Join("/", p)
	}
	if err := h.endpoints(r, base, s, l); err != nil {
		return nil, err
	}
	if err := h.credentials(r, base, s, l); err != nil {
		return nil, err
	}
	for _, o := range s.list("etcd-servers-overrides") {
		l.override(o)
	}
	enc := s.flag("encryption-provider-config")
	switch file := s.host(enc); {
	case enc == "":
		l.EncryptionConfig = h.first(base, r.EncryptionConfig)
	case file == "":
		l.note(fmt.Sprintf("the API server's encryption configuration %s is on no volume of the host: encrypted values cannot be read", enc))
	default:
		l.EncryptionConfig = h.path(file)
		if !h.exists(file) {
			l.note(fmt.Sprintf("the encryption configuration %s is not there: encrypted values cannot be read", l.EncryptionConfig))
		}
	}
	for _, k := range r.Kubeconfigs {
		l.Kubeconfigs = append(l.Kubeconfigs, h.path(inBase(base, k)))
	}
	if len(r.Manifest) == 0 && !s.without || h.first(base, r.Manifest) != "" {
		l.APIServer, l.APIServerName = s.serves(), r.APIServerName
	}
	return l, nil
}

// endpoints settles where etcd is.
func (h host) endpoints(r Row, base string, s *settings, l *Layout) error {
	local := h.first(base, r.Member)
	if local != "" {
		e, err := h.listens(local)
		if err != nil {
			return err
		}
		l.Endpoints = []string{e}
		return nil
	}
	servers := s.list("etcd-servers")
	if len(servers) == 0 {
		return fault.New(fault.Failed, configure, "no etcd member runs on this %s node, and no API server here names one", r.Distribution)
	}
	for _, u := range servers {
		l.Insecure = l.Insecure || strings.HasPrefix(u, "http://")
		if e := l.address(u); e != "" {
			l.Endpoints = append(l.Endpoints, e)
		}
	}
	if len(l.Endpoints) == 0 {
		return fault.New(fault.Failed, configure, "etcd is named by host names only (%s); they need DNS, which may be what failed", strings.Join(servers, ", "))
	}
	return nil
}

// credentials prefers the row's own files beside a local member: on OpenShift
// those of the API server lie in a folder that the next revision replaces.
func (h host) credentials(r Row, base string, s *settings, l *Layout) error {
	if l.Insecure {
		l.note("the API server speaks to etcd without TLS")
		return nil
	}
	row := func() bool {
		for _, t := range r.Credentials {
			ca, cert, key := h.first(base, []string{t.CA}), h.first(base, []string{t.Cert}), h.first(base, []string{t.Key})
			if ca != "" && cert != "" && key != "" {
				l.CAFile, l.CertFile, l.KeyFile = ca, cert, key
				return true
			}
		}
		return false
	}
	flags := func() bool {
		ca, cert, key := s.host(s.flag("etcd-cafile")), s.host(s.flag("etcd-certfile")), s.host(s.flag("etcd-keyfile"))
		if ca == "" || cert == "" || key == "" || !h.exists(ca) || !h.exists(cert) || !h.exists(key) {
			return false
		}
		l.CAFile, l.CertFile, l.KeyFile = h.path(ca), h.path(cert), h.path(key)
		return true
	}
	ok := false
	if h.first(base, r.Member) != "" {
		ok = row() || flags()
	} else {
		ok = flags() || row()
	}
	if !ok {
		var tried []string
		for _, t := range r.Credentials {
			tried = append(tried, inBase(base, t.Cert))
		}
		return fault.New(fault.Failed, configure, "no complete set of etcd client credentials on this %s node: looked at the API server's flags and at %s",
			r.Distribution, strings.Join(tried, ", "))
	}
	if st, err := os.Stat(l.KeyFile); err == nil && st.Mode().Perm()&^0o640 != 0 {
		l.note(fmt.Sprintf("etcd's client key %s has mode %04o: whoever reads it owns the cluster", l.KeyFile, st.Mode().Perm()))
	}
	return nil
}

// override takes one group/resource#server;server of --etcd-servers-overrides
// (apiserver/pkg/server/options/etcd.go).
func (l *Layout) override(entry string) {
	resource, servers, ok := strings.Cut(entry, "#")
	group, plural, ok2 := strings.Cut(resource, "/")
	if !ok || !ok2 || plural == "" {
		l.note(fmt.Sprintf("the API server's --etcd-servers-overrides entry %q is not group/resource#servers: ignored", entry))
		return
	}
	if group != "" {
		plural += "." + group
	}
	o := EtcdOverride{Resource: plural}
	for _, u := range strings.Split(servers, ";") {
		if e := l.address(u); e != "" {
			o.Servers = append(o.Servers, e)
		}
	}
	l.Overrides = append(l.Overrides, o)
}

// address returns IP:port of a URL of etcd, "" and a note for one by name.
func (l *Layout) address(u string) string {
	e, err := ipPort(u)
	if err != nil {
		l.note(fmt.Sprintf("etcd at %s is left out: %v", u, err))
		return ""
	}
	return e
}

func (l *Layout) note(notes ...string) { l.Notes = append(l.Notes, notes...) }

// host is the tree of files that is looked at.
type host struct{ root string }

// path returns where a file of the host is; "" stays "".
func (h host) path(p string) string {
	if p == "" {
		return ""
	}
	return filepath.Join(h.root, p)
}

func (h host) exists(p string) bool {
	_, err := os.Stat(h.path(p))
	return err == nil
}

// first returns a file that the first of the patterns that matches any matches:
// the last one, so that a certificate and its key, of several pairs, belong
// together.
func (h host) first(base string, patterns []string) string {
	for _, p := range patterns {
		if m, err := filepath.Glob(h.path(inBase(base, p))); err == nil && len(m) > 0 {
			return m[len(m)-1]
		}
	}
	return ""
}

// read returns nil for a file that is not there.
func (h host) read(p string) ([]byte, error) {
	data, err := os.ReadFile(h.path(p))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.New(fault.Failed, configure, "reading the control plane's configuration: %w", err)
	}
	return data, nil
}

func inBase(base, p string) string { return strings.Replace(p, dataDir, base, 1) }
