package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/agent/hostlogs"
	"github.com/halligan-io/halligan/agent/node"
	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/audit/record"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/daemonlog"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// Config is the agent's configuration file, YAML with strict keys. All of it
// takes effect at start only. Whatever is left out is found by looking at the
// node.
type Config struct {
	// Node is this node's name in plans and records; default: the host name.
	Node string `json:"node,omitempty"`
	// Distribution names the row of agent/node's table by which etcd is looked
	// for; it is needed only on a node with the files of several. It excludes
	// etcd.endpoints, with which nothing is looked for.
	Distribution string `json:"distribution,omitempty"`
	// StateDir holds the records of actions, mode 0700; default
	// /var/lib/halligan. This and all other paths are absolute.
	StateDir string `json:"stateDir,omitempty"`
	// JournalMaxBytes bounds the records of actions; default 2 GiB.
	JournalMaxBytes int64 `json:"journalMaxBytes,omitempty"`
	// Socket is the console's Unix socket; default api.DefaultSocket, which is
	// where the command line looks.
	Socket string `json:"socket,omitempty"`
	// Etcd says how etcd is reached.
	Etcd EtcdConfig `json:"etcd,omitempty"`
	// LocalAPI says how the API server of this node is reached.
	LocalAPI LocalAPIConfig `json:"localAPI,omitzero"`
	// EncryptionConfig is the API server's --encryption-provider-config.
	EncryptionConfig string `json:"encryptionConfig,omitempty"`
	// PolicyFile tightens the shipped policy; see trust.LocalRules.
	PolicyFile string `json:"policyFile,omitempty"`
	// Cluster is this cluster's name in the bundle's inventory; required with
	// trust.
	Cluster string `json:"cluster,omitempty"`
	// Trust says whom the agent believes. Without it, only the console opens.
	Trust *TrustConfig `json:"trust,omitempty"`
	// SSH and GRPC are the doors to the network.
	SSH  *SSHConfig  `json:"ssh,omitempty"`
	GRPC *GRPCConfig `json:"grpc,omitempty"`
	// Reach is in, or left out, where bastions dial this node, and out where they
	// cannot: the agent then keeps a tunnel to each bastion of the inventory that
	// has a tunnelPort, and shows the certificate of GRPC there. Say the same of
	// the node in the inventory.
	Reach string `json:"reach,omitempty"`
	// Audit is the evidence, which is in the folder audit of StateDir.
	Audit record.Config `json:"audit,omitzero"`
	// Alarms are told of logins, refusals and what goes around the usual rules.
	Alarms []alarm.Config `json:"alarms,omitempty"`
	// Logs are files in which components of the control plane log, which are then
	// read instead of where the distribution has them: apiserver, etcd,
	// controller-manager, scheduler or kubelet, each with absolute paths, which may
	// be patterns. Audit logs are refused.
	Logs map[string][]string `json:"logs,omitempty"`
	// LogLevel is debug, info (default), warn or error.
	LogLevel string `json:"logLevel,omitempty"`
}

// EtcdConfig is how etcd is reached. Addresses are IP addresses, since names may
// be what failed.
type EtcdConfig struct {
	// Endpoints are IP:PORT; the first should be the node's own member. When
	// they are set, nothing about etcd is looked up on the node.
	Endpoints []string `json:"endpoints,omitempty"`
	// The client's credentials are taken as one: naming any of the three files
	// means that none is looked up.
	CAFile   string `json:"caFile,omitempty"`
	CertFile string `json:"certFile,omitempty"`
	KeyFile  string `json:"keyFile,omitempty"`
	// ServerName is expected in the server's certificate instead of the
	// address.
	ServerName string `json:"serverName,omitempty"`
	// Prefix of Kubernetes' keys (--etcd-prefix); default /registry.
	Prefix string `json:"prefix,omitempty"`
	// Overrides are resources that live in another etcd
	// (--etcd-servers-overrides) with its addresses, IP:PORT, if known: plural,
	// plural.group, or *.group for all of a group. The agent refuses to look
	// for them here.
	Overrides map[string][]string `json:"overrides,omitempty"`
}

// LocalAPIConfig is how the API server of this node is reached, which the agent asks
// every few seconds how it is. Where etcd.endpoints is set nothing is looked up on the
// node, and it is asked only if kubeconfig is set.
type LocalAPIConfig struct {
	// Disabled: it is not asked.
	Disabled bool `json:"disabled,omitempty"`
	// Kubeconfig is an administrator's. Of system:masters, flow control lets it pass;
	// what the file says of the server does not count. It is read again when it
	// changes.
	Kubeconfig string `json:"kubeconfig,omitempty"`
	// Endpoint is IP:PORT; default 127.0.0.1:6443, or where its flags say.
	Endpoint string `json:"endpoint,omitempty"`
	// ServerName is expected in its certificate; default kubernetes.
	ServerName string `json:"serverName,omitempty"`

	// Kubeconfigs are the files, the most powerful first: Kubeconfig, or what the
	// distribution has; nil where no API server is known of.
	Kubeconfigs []string `json:"-"`
}

// TrustConfig is the signed bundle, and what a fresh node starts from.
type TrustConfig struct {
	// Bundle is the file; default /etc/halligan/bundle. It is reloaded when it
	// changes, and replaced when somebody brings a newer one.
	Bundle string `json:"bundle,omitempty"`
	// Roots are public keys, as in an authorized_keys file, of which Threshold
	// must have signed the policy. Left out, the file that root put there is
	// believed as it is.
	Roots     []string `json:"roots,omitempty"`
	Threshold int      `json:"threshold,omitempty"`
	// MinPolicyVersion is the lowest version of the policy that is taken.
	MinPolicyVersion uint64 `json:"minPolicyVersion,omitempty"`
}

// SSHConfig is the SSH door.
type SSHConfig struct {
	// Listen are IP:PORT.
	Listen []string `json:"listen"`
	// HostKey is the private key, mode 0600 or stricter, and HostCertificate
	// its certificate for NODE.CLUSTER. Both are loaded again when they change.
	HostKey         string `json:"hostKey"`
	HostCertificate string `json:"hostCertificate"`
}

// GRPCConfig is the door of gRPC over mTLS.
type GRPCConfig struct {
	// Listen are IP:PORT.
	Listen []string `json:"listen"`
	// CertFile is the certificate for NODE.CLUSTER in PEM, signed by one of the
	// bundle's authorities itself; KeyFile its key, mode 0600 or stricter. Both
	// are loaded again when they change.
	CertFile string `json:"certFile"`
	KeyFile  string `json:"keyFile"`
}

// DefaultBundle is where the bundle lies.
const DefaultBundle = "/etc/halligan/bundle"

// DefaultConfigFile is read when no other is named; it may be missing.
const DefaultConfigFile = "/etc/halligan/agent.yaml"

// LoadConfig reads the file, fills in what the node tells and returns remarks
// for the operator and what was recognised: a distribution's name, or "manual"
// when the file says how etcd is reached. The default file may be missing; one
// that was named may not.
func LoadConfig(file string) (c Config, notes []string, distribution string, err error) {
	name := file
	if name == "" {
		name = DefaultConfigFile
	}
	return load(name, file != "", "/")
}

// load reads a configuration for the node whose files are below root.
func load(file string, required bool, root string) (c Config, notes []string, distribution string, err error) {
	data, err := os.ReadFile(file)
	switch {
	case !required && errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return c, nil, "", fault.New(fault.Usage, "name a readable file with --config", "configuration: %w", err)
	default:
		if err := yaml.UnmarshalStrict(data, &c); err != nil {
			// The error may have several lines.
			return c, nil, "", fault.New(fault.Usage, "mend the file", "configuration %s: %s", file, strings.Join(strings.Fields(err.Error()), " "))
		}
	}
	if c.Node == "" {
		if c.Node, err = os.Hostname(); err != nil {
			return c, nil, "", fault.New(fault.Usage, "set node in the configuration", "finding the node's name: %w", err)
		}
	}
	fill(&c.StateDir, "/var/lib/halligan")
	fill(&c.Socket, api.DefaultSocket)
	fill(&c.LogLevel, "info")
	if c.Trust != nil {
		fill(&c.Trust.Bundle, DefaultBundle)
	}
	if err := c.check(); err != nil {
		return c, nil, "", fault.New(fault.Usage, "mend the file", "configuration %s: %w", file, err)
	}
	distribution = "manual"
	if c.LocalAPI.Kubeconfig != "" {
		c.LocalAPI.Kubeconfigs = []string{c.LocalAPI.Kubeconfig}
	}
	keys := []string{c.Etcd.KeyFile} // node tells of those that it finds
	if len(c.Etcd.Endpoints) == 0 {
		layout, err := node.Detect(root, c.Distribution)
		if err != nil {
			return c, nil, "", fmt.Errorf("etcd.endpoints is not set, and looking at the node: %w", err)
		}
		distribution, notes = layout.Distribution, layout.Notes
		c.Etcd.Endpoints = layout.Endpoints
		if c.Etcd.CAFile+c.Etcd.CertFile+c.Etcd.KeyFile == "" {
			c.Etcd.CAFile, c.Etcd.CertFile, c.Etcd.KeyFile = layout.CAFile, layout.CertFile, layout.KeyFile
		}
		fill(&c.Etcd.Prefix, layout.Prefix)
		fill(&c.EncryptionConfig, layout.EncryptionConfig)
		c.LocalAPI.found(layout)
		if c.Etcd.Overrides == nil && len(layout.Overrides) > 0 {
			c.Etcd.Overrides = map[string][]string{}
			for _, o := range layout.Overrides {
				c.Etcd.Overrides[o.Resource] = o.Servers
			}
		}
		for _, o := range layout.Overrides {
			notes = append(notes, fmt.Sprintf("%s lives in another etcd (%v), which this agent does not reach", o.Resource, o.Servers))
		}
	}
	if c.LocalAPI.asked() {
		fill(&c.LocalAPI.Endpoint, "127.0.0.1:6443")
	}
	for _, f := range slices.Concat(keys, []string{c.EncryptionConfig}, c.LocalAPI.Kubeconfigs) {
		if st, err := os.Stat(f); f != "" && err == nil && st.Mode().Perm()&^0o640 != 0 {
			notes = append(notes, fmt.Sprintf("%s holds a key and has mode %04o: others may use it", f, st.Mode().Perm()))
		}
	}
	return c, notes, distribution, nil
}

// found takes over what the node tells, where an API server runs on it.
func (l *LocalAPIConfig) found(layout *node.Layout) {
	if layout.APIServer == "" {
		return
	}
	fill(&l.Endpoint, layout.APIServer)
	if len(l.Kubeconfigs) == 0 {
		fill(&l.ServerName, layout.APIServerName)
		if l.Kubeconfigs = layout.Kubeconfigs; l.Kubeconfigs == nil {
			l.Kubeconfigs = []string{} // it runs, and there is none
		}
	}
}

// asked reports whether there is an API server to ask.
func (l *LocalAPIConfig) asked() bool { return !l.Disabled && l.Kubeconfigs != nil }

// check refuses values that cannot be meant, and normalises the prefix.
func (c *Config) check() error {
	for _, p := range []struct{ key, path string }{
		{"stateDir", c.StateDir}, {"socket", c.Socket}, {"encryptionConfig", c.EncryptionConfig}, {"policyFile", c.PolicyFile},
		{"localAPI.kubeconfig", c.LocalAPI.Kubeconfig}, {"etcd.caFile", c.Etcd.CAFile}, {"etcd.certFile", c.Etcd.CertFile}, {"etcd.keyFile", c.Etcd.KeyFile},
		{"trust.bundle", c.trust().Bundle},
	} {
		if p.path != "" && !filepath.IsAbs(p.path) {
			return fmt.Errorf("%s: %q is not an absolute path", p.key, p.path)
		}
	}
	if c.JournalMaxBytes < 0 {
		return fmt.Errorf("journalMaxBytes: %d is negative", c.JournalMaxBytes)
	}
	for component, files := range c.Logs {
		if err := hostlogs.Check(component, files); err != nil {
			return fmt.Errorf("logs: %w", err)
		}
	}
	if err := c.Audit.Check(); err != nil {
		return err
	}
	if !slices.Contains(daemonlog.Levels, c.LogLevel) {
		return fmt.Errorf("logLevel: %q is none of %v", c.LogLevel, daemonlog.Levels)
	}
	if d := c.Distribution; d != "" && !slices.Contains(node.Distributions(), d) {
		return fmt.Errorf("distribution: %q is none of %v", d, node.Distributions())
	}
	if c.Distribution != "" && len(c.Etcd.Endpoints) > 0 {
		return errors.New("distribution says where etcd is looked for, and with etcd.endpoints it is not looked for: set one of them")
	}
	for _, e := range c.Etcd.Endpoints {
		if ap, err := netip.ParseAddrPort(e); err != nil || ap.Port() == 0 {
			return fmt.Errorf("etcd.endpoints: %q is not IP:PORT; a name would need DNS, which may be what failed", e)
		}
	}
	if e := c.LocalAPI.Endpoint; e != "" {
		if ap, err := netip.ParseAddrPort(e); err != nil || ap.Port() == 0 {
			return fmt.Errorf("localAPI.endpoint: %q is not IP:PORT; a name would need DNS, which may be what failed", e)
		}
	}
	for resource := range c.Etcd.Overrides {
		if resource == "" || strings.ContainsAny(resource, "/# ") {
			return fmt.Errorf("etcd.overrides: %q is not a resource such as events or deployments.apps", resource)
		}
	}
	if err := c.checkDoors(); err != nil {
		return err
	}
	if c.Etcd.Prefix != "" {
		// The API server does the same (apiserver/pkg/storage/etcd3/store.go).
		c.Etcd.Prefix = path.Join("/", c.Etcd.Prefix)
	}
	return nil
}

// origin is how the agent's evidence is called: NODE.CLUSTER, or the node alone where
// there is no bundle to be known by.
func (c *Config) origin() string {
	switch {
	case c.Cluster != "":
		return c.Node + "." + c.Cluster
	case trust.ValidNode(c.Node):
		return c.Node
	}
	return "node"
}

func (c *Config) trust() TrustConfig {
	if c.Trust == nil {
		return TrustConfig{}
	}
	return *c.Trust
}

// checkDoors refuses doors that could not know anybody, or be known.
func (c *Config) checkDoors() error {
	for i, a := range c.Alarms {
		if err := a.Check(); err != nil {
			return fmt.Errorf("alarms[%d]: %w", i, err)
		}
	}
	t := c.trust()
	switch {
	case c.Reach != "" && c.Reach != bundle.ReachIn && c.Reach != bundle.ReachOut:
		return fmt.Errorf("reach: %q is neither %s nor %s", c.Reach, bundle.ReachIn, bundle.ReachOut)
	case c.Reach == bundle.ReachOut && c.GRPC == nil:
		return errors.New("reach: tunnels show the certificate of grpc: set that, too")
	case c.Trust == nil && (c.SSH != nil || c.GRPC != nil):
		return errors.New("ssh and grpc let in whom the bundle knows: set trust, or leave them out")
	case c.Trust == nil && c.Cluster != "":
		return errors.New("cluster is a name in the bundle: set trust, or leave it out")
	case c.Trust == nil:
		return nil
	case !trust.ValidCluster(c.Cluster):
		return fmt.Errorf("cluster: %q is not the name of a cluster: lower-case letters, digits and dashes", c.Cluster)
	case !trust.ValidNode(c.Node):
		return fmt.Errorf("node: %q does not fit into a certificate's NODE.CLUSTER: lower-case letters, digits, dots and dashes", c.Node)
	case t.Threshold < 0 || t.Threshold > len(t.Roots):
		return fmt.Errorf("trust.threshold: %d of %d roots", t.Threshold, len(t.Roots))
	case len(t.Roots) > 0 && t.Threshold == 0:
		return errors.New("trust.threshold: say how many of trust.roots must have signed")
	}
	doors := map[string][]string{}
	files := map[string]string{}
	keys := map[string]string{}
	if s := c.SSH; s != nil {
		doors["ssh.listen"] = s.Listen
		files["ssh.hostKey"], files["ssh.hostCertificate"], keys["ssh.hostKey"] = s.HostKey, s.HostCertificate, s.HostKey
	}
	if g := c.GRPC; g != nil {
		doors["grpc.listen"] = g.Listen
		files["grpc.certFile"], files["grpc.keyFile"], keys["grpc.keyFile"] = g.CertFile, g.KeyFile, g.KeyFile
	}
	for key, addresses := range doors {
		if len(addresses) == 0 {
			return fmt.Errorf("%s: name at least one IP:PORT", key)
		}
		for _, a := range addresses {
			if ap, err := netip.ParseAddrPort(a); err != nil || ap.Port() == 0 {
				return fmt.Errorf("%s: %q is not IP:PORT; a name would need DNS, which may be what failed", key, a)
			}
		}
	}
	for key, file := range files {
		if !filepath.IsAbs(file) {
			return fmt.Errorf("%s: %q is not an absolute path", key, file)
		}
	}
	for key, file := range keys {
		if err := durable.CheckPrivate(file); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	return nil
}

func fill(field *string, found string) {
	if *field == "" {
		*field = found
	}
}
