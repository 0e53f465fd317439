package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/agent/node"
	"github.com/halligan-io/halligan/internal/fault"
)

// Config is the agent's configuration file, YAML with strict keys. All of it
// takes effect at start only. Whatever is left out is found by looking at the
// node.
type Config struct {
	// Node is this node's name in plans and records; default: the host name.
	Node string `json:"node,omitempty"`
	// StateDir holds the records of actions, mode 0700; default
	// /var/lib/halligan.
	StateDir string `json:"stateDir,omitempty"`
	// JournalMaxBytes bounds the records of actions; default 2 GiB.
	JournalMaxBytes int64 `json:"journalMaxBytes,omitempty"`
	// Socket is the console's Unix socket; default /run/halligan/console.sock.
	Socket string `json:"socket,omitempty"`
	// Etcd says how etcd is reached.
	Etcd EtcdConfig `json:"etcd,omitempty"`
	// EncryptionConfig is the API server's --encryption-provider-config.
	EncryptionConfig string `json:"encryptionConfig,omitempty"`
	// PolicyFile tightens the shipped policy; see agent/policy.
	PolicyFile string `json:"policyFile,omitempty"`
	// LogLevel is trace, debug, info (default), warn or error.
	LogLevel string `json:"logLevel,omitempty"`
}

// EtcdConfig is how etcd is reached. Addresses are IP addresses, since names may
// be what failed.
type EtcdConfig struct {
	// Endpoints are IP:PORT; the first should be the node's own member.
	Endpoints []string `json:"endpoints,omitempty"`
	CAFile    string   `json:"caFile,omitempty"`
	CertFile  string   `json:"certFile,omitempty"`
	KeyFile   string   `json:"keyFile,omitempty"`
	// ServerName is expected in the server's certificate instead of the
	// address.
	ServerName string `json:"serverName,omitempty"`
	// Prefix of Kubernetes' keys (--etcd-prefix); default /registry.
	Prefix string `json:"prefix,omitempty"`
}

// DefaultConfigFile is read when no other is named; it may be missing.
const DefaultConfigFile = "/etc/halligan/agent.yaml"

// LoadConfig reads the file, fills in what the node tells and returns what was
// recognised: a distribution's name, or "manual" when the file says how etcd is
// reached. The default file may be missing; one that was named may not.
func LoadConfig(file string) (Config, []string, string, error) {
	var c Config
	named := file != ""
	if !named {
		file = DefaultConfigFile
	}
	data, err := os.ReadFile(file)
	switch {
	case !named && errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return c, nil, "", fault.New(fault.Usage, "name a readable file with --config", "configuration: %w", err)
	default:
		if err := yaml.UnmarshalStrict(data, &c); err != nil {
			return c, nil, "", fault.New(fault.Usage, "mend the file", "configuration %s: %w", file, err)
		}
	}
	if c.Node == "" {
		if c.Node, err = os.Hostname(); err != nil {
			return c, nil, "", fault.New(fault.Usage, "set node in the configuration", "finding the node's name: %w", err)
		}
	}
	if c.StateDir == "" {
		c.StateDir = "/var/lib/halligan"
	}
	if c.Socket == "" {
		c.Socket = "/run/halligan/console.sock"
	}
	if !filepath.IsAbs(c.StateDir) || !filepath.IsAbs(c.Socket) {
		return c, nil, "", fault.New(fault.Usage, "write paths from the root", "configuration %s: stateDir and socket must be absolute", file)
	}
	distribution := "manual"
	var notes []string
	if len(c.Etcd.Endpoints) == 0 {
		layout, err := node.Detect("/")
		if err != nil {
			return c, nil, "", fmt.Errorf("etcd.endpoints is not set, and looking at the node: %w", err)
		}
		distribution, notes = layout.Distribution, layout.Notes
		c.Etcd.Endpoints = layout.Endpoints
		fill(&c.Etcd.CAFile, layout.CAFile)
		fill(&c.Etcd.CertFile, layout.CertFile)
		fill(&c.Etcd.KeyFile, layout.KeyFile)
		fill(&c.Etcd.Prefix, layout.Prefix)
		fill(&c.EncryptionConfig, layout.EncryptionConfig)
		for _, o := range layout.Overrides {
			notes = append(notes, fmt.Sprintf("%s lives in another etcd (%v), which this agent does not reach", o.Resource, o.Servers))
		}
	}
	for _, e := range c.Etcd.Endpoints {
		host, _, err := net.SplitHostPort(e)
		if err != nil || net.ParseIP(host) == nil {
			return c, nil, "", fault.New(fault.Usage, "give IP:PORT; names may be what failed", "etcd endpoint %q is no address", e)
		}
	}
	return c, notes, distribution, nil
}

func fill(field *string, found string) {
	if *field == "" {
		*field = found
	}
}
