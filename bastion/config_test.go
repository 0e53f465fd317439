package bastion

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/halligan-io/halligan/internal/fault"
)

// sample is a complete configuration whose files are in a folder.
const sample = `name: bastion-a
stateDir: /var/lib/x
trust: {bundle: /etc/halligan/bundle, roots: ["ssh-ed25519 AAAA root"], threshold: 1, minPolicyVersion: 3}
ssh: {listen: ["10.0.0.9:2222", "[fd00::9]:2222"], hostKey: DIR/key, hostCertificate: DIR/cert}
grpc: {listen: ["10.0.0.9:7443"], certFile: DIR/crt, keyFile: DIR/key}
tunnel: {listen: ["10.0.0.9:7444"]}
store: {endpoints: ["10.0.0.5:2379"], caFile: DIR/ca, certFile: DIR/crt, keyFile: DIR/key}
metrics: {listen: "127.0.0.1:9644"}
alarms: [{webhook: "https://10.0.0.7/hook"}]
logLevel: debug
`

func TestConfig(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return file
	}
	write("key", "", 0o600)
	write("lax", "", 0o644)
	load := func(text string) (Config, error) {
		return LoadConfig(write("bastion.yaml", strings.ReplaceAll(text, "DIR", dir), 0o600))
	}
	c, err := load(sample)
	if err != nil || c.Trust.MinPolicyVersion != 3 || len(c.SSH.Listen) != 2 || c.Store.Endpoints[0] != "10.0.0.5:2379" {
		t.Fatalf("%+v, %v", c, err)
	}
	least := "name: b\ntrust: {}\nssh: {listen: [\"10.0.0.9:2222\"], hostKey: DIR/key, hostCertificate: DIR/cert}\n"
	if c, err := load(least); err != nil || c.StateDir != DefaultStateDir || c.Trust.Bundle != DefaultBundle || c.Metrics.Listen != DefaultMetrics || c.LogLevel != "info" {
		t.Fatalf("%+v, %v", c, err)
	}
	for _, bad := range []struct{ from, to, want string }{
		{"name: bastion-a", "name: bastion-a\nnode: x", "unknown field"},
		{"name: bastion-a", "name: Bastion A", "not the name of a bastion"},
		{"name: bastion-a\n", "", "not the name of a bastion"},
		{"stateDir: /var", "stateDir: var", "not an absolute path"},
		{"bundle: /etc", "bundle: etc", "not an absolute path"},
		{"threshold: 1", "threshold: 2", "2 of 1 roots"},
		{"threshold: 1", "threshold: 0", "say how many"},
		{`"10.0.0.9:2222"`, `"bastion-a:2222"`, "would need DNS"},
		{`"10.0.0.9:2222"`, `"10.0.0.9"`, "not IP:PORT"},
		{`"10.0.0.9:2222"`, `"10.0.0.9:0"`, "not IP:PORT"},
		{`["10.0.0.9:2222", "[fd00::9]:2222"]`, "[]", "at least one"},
		{`"10.0.0.9:7443"`, `"10.0.0.9:2222"`, "grpc.listen and ssh.listen are both"},
		{`"10.0.0.9:7444"`, `"localhost:7444"`, "would need DNS"},
		{`"10.0.0.5:2379"`, `"etcd.example:2379"`, "would need DNS"},
		{"caFile: DIR/ca, ", "", "store.caFile"},
		{`endpoints: ["10.0.0.5:2379"], `, "", "has no need of certificates"},
		{"hostKey: DIR/key", "hostKey: DIR/lax", "ssh.hostKey"},
		{"hostKey: DIR/key", "hostKey: DIR/missing", "ssh.hostKey"},
		{"hostCertificate: DIR/cert", "hostCertificate: cert", "not an absolute path"},
		{"grpc: {listen: [\"10.0.0.9:7443\"], certFile: DIR/crt, keyFile: DIR/key}\n", "", "set that, too"},
		{"127.0.0.1:9644", "0.0.0.0:9644", "every address"},
		{"127.0.0.1:9644", "localhost:9644", "would need DNS"},
		{"https://10.0.0.7/hook", "https://hooks.example/x", "alarms[0]"},
		{"logLevel: debug", "logLevel: loud", "none of"},
	} {
		text := strings.Replace(sample, bad.from, bad.to, 1)
		if text == sample {
			t.Fatalf("%q is not there", bad.from)
		}
		if _, err := load(text); !fault.Is(err, fault.Usage) || !strings.Contains(fmt.Sprint(err), bad.want) {
			t.Errorf("%q: %v; want %q", bad.to, err, bad.want)
		}
	}
	for name, text := range map[string]string{"no trust": "name: b\nssh: {listen: [\"10.0.0.9:2222\"], hostKey: DIR/key, hostCertificate: DIR/cert}\n", "no ssh": "name: b\ntrust: {}\n", "nothing": "", "no YAML": "\t{"} {
		if _, err := load(text); !fault.Is(err, fault.Usage) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := LoadConfig(filepath.Join(dir, "missing")); !fault.Is(err, fault.Usage) {
		t.Error(err)
	}
}

// TestOwn finds every address that nobody is to be relayed to.
func TestOwn(t *testing.T) {
	c := Config{SSH: &SSHConfig{Listen: []string{"0.0.0.0:2222"}}, GRPC: &GRPCConfig{Listen: []string{"[::ffff:10.0.0.9]:7443"}}, Tunnel: &TunnelConfig{Listen: []string{"10.0.0.9:7444"}},
		Metrics: MetricsConfig{Listen: "127.0.0.1:9644"}}
	own, loopback, err := c.own()
	if err != nil || loopback {
		t.Fatal(own, loopback, err)
	}
	for _, want := range []string{"127.0.0.1:2222", "10.0.0.9:7443", "10.0.0.9:7444", "127.0.0.1:9644"} {
		if !slices.Contains(own, netip.MustParseAddrPort(want)) {
			t.Errorf("%v lacks %s", own, want)
		}
	}
	c.SSH.Listen, c.Metrics.Listen = []string{"127.0.0.21:2222"}, "off"
	if own, loopback, err := c.own(); err != nil || !loopback || len(own) != 3 {
		t.Error(own, loopback, err)
	}
	// Who also listens there for somebody at the machine is no lab.
	c.SSH.Listen = []string{"127.0.0.1:2222", "10.0.0.9:2222"}
	if own, loopback, err := c.own(); err != nil || loopback {
		t.Error(own, loopback, err)
	}
}
