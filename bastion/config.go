package bastion

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/audit/mirror"
	"github.com/halligan-io/halligan/audit/record"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/daemonlog"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// Config is the bastion's configuration file, YAML with strict keys. All of it
// takes effect at start only. All paths are absolute, and all addresses are IP
// addresses: names may be what failed.
type Config struct {
	// Name is this bastion's in the bundle's inventory; required. Its
	// certificates are for NAME.bastion.
	Name string `json:"name"`
	// StateDir holds the last good bundle and the embedded store, mode 0700;
	// default /var/lib/halligan-bastion.
	StateDir string `json:"stateDir,omitempty"`
	// Trust says whom the bastion believes; required.
	Trust *TrustConfig `json:"trust"`
	// SSH is the door that people come through; required.
	SSH *SSHConfig `json:"ssh"`
	// GRPC is the door of automation to the bastion's own API. Its certificate is
	// also what nodes know the bastion by: without it they are brought no bundles.
	GRPC *GRPCConfig `json:"grpc,omitempty"`
	// Tunnel is where nodes that cannot be dialled keep tunnels to. It shows the
	// certificate of GRPC, which it needs.
	Tunnel *TunnelConfig `json:"tunnel,omitempty"`
	// Store is what bastions share.
	Store StoreConfig `json:"store,omitempty"`
	// Metrics is for whoever watches over the bastion.
	Metrics MetricsConfig `json:"metrics,omitempty"`
	// Audit is the bastion's own evidence, which is in the folder audit of StateDir.
	Audit record.Config `json:"audit,omitzero"`
	// Mirror are the bastion's copies of others' evidence, in the folder mirror of
	// StateDir. Without grpc there are none.
	Mirror MirrorConfig `json:"mirror,omitzero"`
	// Alarms are told of logins, refusals and what goes around the usual rules.
	Alarms []alarm.Config `json:"alarms,omitempty"`
	// LogLevel is debug, info (default), warn or error.
	LogLevel string `json:"logLevel,omitempty"`
}

// TrustConfig is the signed bundle, and what a fresh bastion starts from.
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
	// its certificate for NAME.bastion. Both are loaded again when they change.
	HostKey         string `json:"hostKey"`
	HostCertificate string `json:"hostCertificate"`
}

// GRPCConfig is the door of gRPC over mTLS.
type GRPCConfig struct {
	// Listen are IP:PORT.
	Listen []string `json:"listen"`
	// CertFile is the certificate for NAME.bastion in PEM, with what lies
	// between it and the CA; KeyFile its key, mode 0600 or stricter. Both are
	// loaded again when they change.
	CertFile string `json:"certFile"`
	KeyFile  string `json:"keyFile"`
}

// TunnelConfig is where nodes keep tunnels to.
type TunnelConfig struct {
	// Listen are IP:PORT.
	Listen []string `json:"listen"`
}

// StoreConfig is the etcd that bastions share. Without endpoints the bastion
// keeps one of its own, in StateDir/store, which nobody else reaches.
type StoreConfig struct {
	// Endpoints are IP:PORT of its members.
	Endpoints []string `json:"endpoints,omitempty"`
	CAFile    string   `json:"caFile,omitempty"`
	CertFile  string   `json:"certFile,omitempty"`
	KeyFile   string   `json:"keyFile,omitempty"`
}

// MirrorConfig is what becomes of copies.
type MirrorConfig struct {
	// MaxBytes bounds the copy of each node's and bastion's evidence on disk; default
	// 2 GiB.
	MaxBytes int64 `json:"maxBytes,omitempty"`
	// Witnesses are run by others, and countersign what this bastion has.
	Witnesses []mirror.Outside `json:"witnesses,omitempty"`
}

// MetricsConfig is an HTTP server with /metrics, /healthz and /readyz.
type MetricsConfig struct {
	// Listen is IP:PORT, on loopback or an address that only the management
	// network reaches: whoever gets there is not asked who they are. Default
	// 127.0.0.1:9644; "off" for none.
	Listen string `json:"listen,omitempty"`
}

// Defaults of the configuration.
const (
	DefaultConfigFile = "/etc/halligan/bastion.yaml"
	DefaultStateDir   = "/var/lib/halligan-bastion"
	DefaultBundle     = "/etc/halligan/bundle"
	DefaultMetrics    = "127.0.0.1:9644"
)

// leastMirror is what a daemon keeps of its own evidence by default.
const leastMirror = 256 << 20

// LoadConfig reads the file, by default DefaultConfigFile. Errors are
// fault.Usage.
func LoadConfig(file string) (c Config, err error) {
	if file == "" {
		file = DefaultConfigFile
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return c, fault.New(fault.Usage, "name a readable file with --config", "configuration: %w", err)
	}
	if err := yaml.UnmarshalStrict(data, &c); err != nil {
		// The error may have several lines.
		return c, fault.New(fault.Usage, "mend the file", "configuration %s: %s", file, strings.Join(strings.Fields(err.Error()), " "))
	}
	for _, f := range []struct {
		field *string
		value string
	}{{&c.StateDir, DefaultStateDir}, {&c.Metrics.Listen, DefaultMetrics}, {&c.LogLevel, "info"}} {
		if *f.field == "" {
			*f.field = f.value
		}
	}
	if c.Trust != nil && c.Trust.Bundle == "" {
		c.Trust.Bundle = DefaultBundle
	}
	if err := c.check(); err != nil {
		return c, fault.New(fault.Usage, "mend the file", "configuration %s: %w", file, err)
	}
	return c, nil
}

// check refuses values that cannot be meant.
func (c *Config) check() error {
	switch t := c.Trust; {
	case !trust.ValidNode(c.Name):
		return fmt.Errorf("name: %q is not the name of a bastion: lower-case letters, digits, dots and dashes", c.Name)
	case t == nil:
		return errors.New("trust: say where the signed bundle is, which says whom to let in")
	case t.Threshold < 0 || t.Threshold > len(t.Roots):
		return fmt.Errorf("trust.threshold: %d of %d roots", t.Threshold, len(t.Roots))
	case len(t.Roots) > 0 && t.Threshold == 0:
		return errors.New("trust.threshold: say how many of trust.roots must have signed")
	case c.SSH == nil:
		return errors.New("ssh: without this door nobody is relayed")
	case c.Tunnel != nil && c.GRPC == nil:
		return errors.New("tunnel shows the certificate of grpc: set that, too")
	case !slices.Contains(daemonlog.Levels, c.LogLevel):
		return fmt.Errorf("logLevel: %q is none of %v", c.LogLevel, daemonlog.Levels)
	}
	if err := c.Audit.Check(); err != nil {
		return err
	}
	for i, w := range c.Mirror.Witnesses {
		if err := w.Check(); err != nil {
			return fmt.Errorf("mirror.witnesses[%d].%w", i, err)
		}
	}
	if m := c.Mirror.MaxBytes; m != 0 && m < leastMirror {
		return fmt.Errorf("mirror.maxBytes: %d is less than the %d bytes that a copy takes", m, int64(leastMirror))
	}
	paths := map[string]string{"stateDir": c.StateDir, "trust.bundle": c.Trust.Bundle, "ssh.hostKey": c.SSH.HostKey, "ssh.hostCertificate": c.SSH.HostCertificate}
	keys := map[string]string{"ssh.hostKey": c.SSH.HostKey}
	doors := map[string][]string{"ssh.listen": c.SSH.Listen}
	if g := c.GRPC; g != nil {
		doors["grpc.listen"] = g.Listen
		paths["grpc.certFile"], paths["grpc.keyFile"], keys["grpc.keyFile"] = g.CertFile, g.KeyFile, g.KeyFile
	}
	if c.Tunnel != nil {
		doors["tunnel.listen"] = c.Tunnel.Listen
	}
	if s := c.Store; len(s.Endpoints) > 0 {
		doors["store.endpoints"] = s.Endpoints
		paths["store.caFile"], paths["store.certFile"], paths["store.keyFile"], keys["store.keyFile"] = s.CAFile, s.CertFile, s.KeyFile, s.KeyFile
	} else if s.CAFile+s.CertFile+s.KeyFile != "" {
		return errors.New("store: the embedded one has no need of certificates; name endpoints, or leave them out")
	}
	if c.Metrics.Listen != "off" {
		doors["metrics.listen"] = []string{c.Metrics.Listen}
	}
	if err := checkAddresses(doors); err != nil {
		return err
	}
	for key, file := range paths {
		if !filepath.IsAbs(file) {
			return fmt.Errorf("%s: %q is not an absolute path", key, file)
		}
	}
	for key, file := range keys {
		if err := durable.CheckPrivate(file); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	for i, a := range c.Alarms {
		if err := a.Check(); err != nil {
			return fmt.Errorf("alarms[%d]: %w", i, err)
		}
	}
	return nil
}

// checkAddresses refuses host names, and two doors at one address.
func checkAddresses(doors map[string][]string) error {
	taken := map[netip.AddrPort]string{}
	for _, key := range slices.Sorted(maps.Keys(doors)) {
		if len(doors[key]) == 0 {
			return fmt.Errorf("%s: name at least one IP:PORT", key)
		}
		for _, a := range doors[key] {
			at, err := netip.ParseAddrPort(a)
			at = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
			switch {
			case err != nil || at.Port() == 0:
				return fmt.Errorf("%s: %q is not IP:PORT; a name would need DNS, which may be what failed", key, a)
			case key == "metrics.listen" && at.Addr().IsUnspecified():
				return fmt.Errorf("%s: %s is every address; name one that only the management network reaches", key, a)
			case taken[at] != "":
				return fmt.Errorf("%s and %s are both %s", taken[at], key, a)
			}
			taken[at] = key
		}
	}
	return nil
}

// origin is how the bastion's evidence is called.
func (c *Config) origin() string { return c.Name + "." + bundle.BastionDomain }

// own returns the addresses at which this bastion listens, and whether people
// only come by loopback, as in a lab. An address that stands for all is there as
// each of them.
func (c *Config) own() (list []netip.AddrPort, loopback bool, err error) {
	all := slices.Clone(c.SSH.Listen)
	if c.GRPC != nil {
		all = append(all, c.GRPC.Listen...)
	}
	if c.Tunnel != nil {
		all = append(all, c.Tunnel.Listen...)
	}
	if c.Metrics.Listen != "off" {
		all = append(all, c.Metrics.Listen)
	}
	loopback = true
	for i, a := range all {
		at, err := netip.ParseAddrPort(a)
		if err != nil {
			return nil, false, err
		}
		loopback = loopback && (at.Addr().IsLoopback() || i >= len(c.SSH.Listen))
		if !at.Addr().IsUnspecified() {
			list = append(list, netip.AddrPortFrom(at.Addr().Unmap(), at.Port()))
			continue
		}
		addresses, err := net.InterfaceAddrs()
		if err != nil {
			return nil, false, fmt.Errorf("finding the addresses of this machine: %w", err)
		}
		for _, address := range addresses {
			if prefix, err := netip.ParsePrefix(address.String()); err == nil {
				list = append(list, netip.AddrPortFrom(prefix.Addr().Unmap(), at.Port()))
			}
		}
	}
	return list, loopback, nil
}
