package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/internal/fault"
)

func write(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil { // whatever the umask is
		t.Fatal(err)
	}
	return path
}

func TestLoadConfigManual(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		text string
		want Config
	}{
		"defaults": {"etcd: {endpoints: ['127.0.0.1:2379']}",
			Config{Node: host, StateDir: "/var/lib/halligan", Socket: api.DefaultSocket, LogLevel: "info", Etcd: EtcdConfig{Endpoints: []string{"127.0.0.1:2379"}}}},
		"everything": {`
node: cp-1
stateDir: /state
journalMaxBytes: 1000000
socket: /s/console.sock
encryptionConfig: /e.yaml
policyFile: /p.yaml
logLevel: debug
etcd:
  endpoints: ["10.0.0.1:2379", "[fd00::1]:2379"]
  caFile: /ca
  certFile: /cert
  keyFile: /key
  serverName: etcd
  prefix: other/
  overrides: {events: ["10.0.0.9:2379"], "*.apps": []}
localAPI: {kubeconfig: /admin.conf, endpoint: "[::1]:8443", serverName: api}
`, Config{LocalAPI: LocalAPIConfig{Kubeconfig: "/admin.conf", Endpoint: "[::1]:8443", ServerName: "api", Kubeconfigs: []string{"/admin.conf"}}, Node: "cp-1", StateDir: "/state", JournalMaxBytes: 1000000, Socket: "/s/console.sock", EncryptionConfig: "/e.yaml", PolicyFile: "/p.yaml", LogLevel: "debug",
			Etcd: EtcdConfig{Endpoints: []string{"10.0.0.1:2379", "[fd00::1]:2379"}, CAFile: "/ca", CertFile: "/cert", KeyFile: "/key", ServerName: "etcd", Prefix: "/other",
				Overrides: map[string][]string{"events": {"10.0.0.9:2379"}, "*.apps": {}}}}},
	} {
		got, notes, distribution, err := LoadConfig(write(t, filepath.Join(t.TempDir(), "agent.yaml"), c.text, 0o600))
		if err != nil || distribution != "manual" || len(notes) != 0 {
			t.Errorf("%s: %q, %v, %v", name, distribution, notes, err)
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

// TestDefaultSocket: an agent and a command line that are told nothing meet, where
// the README says.
func TestDefaultSocket(t *testing.T) {
	c, _, _, err := load(filepath.Join(t.TempDir(), "none.yaml"), false, kubeadmNode(t, ""))
	if err != nil || c.Socket != api.DefaultSocket {
		t.Errorf("%q, want %q; %v", c.Socket, api.DefaultSocket, err)
	}
	readme, err := os.ReadFile("../README.md")
	if err != nil || !strings.Contains(string(readme), "socket: "+api.DefaultSocket+"\n") {
		t.Errorf("the README does not have %s, or %v", api.DefaultSocket, err)
	}
}

func TestLoadConfigRefused(t *testing.T) {
	for text, want := range map[string]string{
		"nodee: cp-1":                        `unknown field "nodee"`,
		"etcd: {endpoint: ['127.0.0.1:1']}":  `unknown field "endpoint"`,
		"node: a\nnode: b":                   "already set",
		"node: [a]":                          "cannot unmarshal",
		"- a":                                "cannot unmarshal",
		"node: \"a":                          "yaml",
		"stateDir: state":                    "stateDir",
		"socket: ./s":                        "socket",
		"policyFile: p.yaml":                 "policyFile",
		"encryptionConfig: e.yaml":           "encryptionConfig",
		"etcd: {keyFile: key}":               "etcd.keyFile",
		"localAPI: {kubeconfig: a.conf}":     "localAPI.kubeconfig",
		"localAPI: {endpoint: 'api:6443'}":   `localAPI.endpoint: "api:6443" is not IP:PORT; a name would need DNS`,
		"journalMaxBytes: -1":                "journalMaxBytes",
		"journalMaxBytes: 2Gi":               "cannot unmarshal",
		"logs: {etcd: [/var/log/audit.log]}": "audit log by its name",
		"logs: {kubelet: [kubelet.log]}":     `"kubelet.log" is not an absolute path`,
		"logs: {proxy: [/p.log]}":            `"proxy" is none of apiserver`,
		"logLevel: loud":                     "logLevel",
		"etcd: {overrides: {/events: []}}":   `"/events" is not a resource`,
		"distribution: k8s":                  `"k8s" is none of [kubeadm k3s`,
		"{distribution: kubeadm, etcd: {endpoints: ['127.0.0.1:2379']}}": "set one of them",
		"etcd: {endpoints: ['localhost:2379']}":                          `"localhost:2379" is not IP:PORT; a name would need DNS`,
		"etcd: {endpoints: ['https://10.0.0.1:2379']}":                   "is not IP:PORT",
		"etcd: {endpoints: ['10.0.0.1']}":                                "is not IP:PORT",
		"etcd: {endpoints: ['10.0.0.1:']}":                               "is not IP:PORT",
		"etcd: {endpoints: ['10.0.0.1:0']}":                              "is not IP:PORT",
		"etcd: {endpoints: ['10.0.0.1:70000']}":                          "is not IP:PORT",
		"etcd: {endpoints: ['fd00::1:2379']}":                            "is not IP:PORT",
		"etcd: {endpoints: ['127.0.0.1:2379', 'e:2379']}":                `"e:2379" is not IP:PORT`,
	} {
		file := write(t, filepath.Join(t.TempDir(), "agent.yaml"), text, 0o600)
		_, _, _, err := LoadConfig(file)
		f := fault.Of(err)
		if !fault.Is(err, fault.Usage) || !strings.Contains(f.Message, want) || !strings.Contains(f.Message, file) || f.Next == "" || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	missing := filepath.Join(t.TempDir(), "none.yaml")
	if _, _, _, err := LoadConfig(missing); !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), missing) {
		t.Errorf("a named file that is missing: %v", err)
	}
	if _, _, _, err := LoadConfig(t.TempDir()); !fault.Is(err, fault.Usage) {
		t.Errorf("a folder: %v", err)
	}
}

// TestLoadConfigDoors: the doors to the network, with everything that would leave
// one open to nobody, to anybody, or dependent on a name.
func TestLoadConfigDoors(t *testing.T) {
	dir := t.TempDir()
	key := write(t, filepath.Join(dir, "key"), "k", 0o600)
	lax := write(t, filepath.Join(dir, "lax"), "k", 0o640)
	load := func(text string) (Config, error) {
		text = strings.NewReplacer("KEY", key, "LAX", lax, "DIR", dir).Replace("node: cp-1\netcd: {endpoints: ['127.0.0.1:2379']}\n" + text)
		c, _, _, err := LoadConfig(write(t, filepath.Join(dir, "agent.yaml"), text, 0o600))
		return c, err
	}
	const trusting = "cluster: prod\ntrust: {}\n"
	c, err := load(trusting + `
ssh: {listen: ["0.0.0.0:2222", "[::]:2222"], hostKey: KEY, hostCertificate: /h-cert.pub}
grpc: {listen: ["10.0.0.1:2223"], certFile: /c.crt, keyFile: KEY}
alarms: [{webhook: "https://10.0.0.9/hook", caFile: /ca.crt}, {syslog: local}, {syslog: "10.0.0.9:514"}, {command: [/bin/true, now]}]
`)
	if err != nil || c.Trust.Bundle != DefaultBundle || len(c.Alarms) != 4 || c.SSH.HostKey != key || c.GRPC.CertFile != "/c.crt" {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err = load("cluster: prod\ntrust: {bundle: /b, roots: [ssh-ed25519 AAAA a], threshold: 1, minPolicyVersion: 7}"); err != nil || c.Trust.Bundle != "/b" || c.Trust.MinPolicyVersion != 7 {
		t.Errorf("%+v, %v", c.Trust, err)
	}
	const ssh, grpc = "ssh: {listen: ['127.0.0.1:2222'], hostKey: KEY, hostCertificate: /h}", "grpc: {listen: ['127.0.0.1:2223'], certFile: /c, keyFile: KEY}"
	for text, want := range map[string]string{
		ssh:                                                          "set trust",
		grpc:                                                         "set trust",
		"cluster: prod":                                              "set trust",
		"trust: {}":                                                  "is not the name of a cluster",
		"cluster: Prod\ntrust: {}":                                   "is not the name of a cluster",
		"cluster: a.b\ntrust: {}":                                    "is not the name of a cluster",
		trusting + "trust2: {}":                                      "unknown field",
		"cluster: prod\ntrust: {bundel: /b}":                         "unknown field",
		"cluster: prod\ntrust: {bundle: b}":                          "trust.bundle",
		"cluster: prod\ntrust: {threshold: 1}":                       "trust.threshold",
		"cluster: prod\ntrust: {threshold: -1}":                      "trust.threshold",
		"cluster: prod\ntrust: {roots: [a]}":                         "trust.threshold",
		"cluster: prod\ntrust: {minPolicyVersion: -1}":               "cannot unmarshal",
		trusting + strings.Replace(ssh, "KEY", "LAX", 1):             "ssh.hostKey: " + lax + " has mode 0640",
		trusting + strings.Replace(grpc, "KEY", "LAX", 1):            "grpc.keyFile: " + lax + " has mode 0640",
		trusting + strings.Replace(grpc, "KEY", "DIR/none", 1):       "grpc.keyFile",
		trusting + strings.Replace(ssh, "KEY", "key", 1):             "ssh.hostKey",
		trusting + strings.Replace(ssh, "/h", "h", 1):                "ssh.hostCertificate",
		trusting + strings.Replace(grpc, "/c", "c", 1):               "grpc.certFile",
		trusting + strings.Replace(ssh, "127.0.0.1", "localhost", 1): `ssh.listen: "localhost:2222" is not IP:PORT; a name would need DNS`,
		trusting + strings.Replace(grpc, "2223", "0", 1):             "grpc.listen",
		trusting + strings.Replace(grpc, "'127.0.0.1:2223'", "", 1):  "grpc.listen: name at least one",
		"alarms: [{}]":                                               "alarms[0]: set one of",
		"alarms: [{syslog: local}, {webhook: https://hooks/x}]":      `alarms[1]: webhook: "hooks" is not an IP address`,
		"alarms: [{email: a@b}]":                                     "unknown field",
	} {
		_, err := load(text)
		f := fault.Of(err)
		if !fault.Is(err, fault.Usage) || !strings.Contains(f.Message, strings.ReplaceAll(want, "LAX", lax)) || f.Next == "" || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	if _, err := load("node: CP 1\n"); err == nil {
		t.Error("a doubled key is taken")
	}
	_, _, _, err = LoadConfig(write(t, filepath.Join(dir, "name.yaml"), "node: cp_1\netcd: {endpoints: ['127.0.0.1:2379']}\n"+trusting, 0o600))
	if !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), "NODE.CLUSTER") {
		t.Errorf("a node's name that no certificate can have: %v", err)
	}
}

// kubeadmNode makes the files of a node on which kubeadm has put etcd.
func kubeadmNode(t *testing.T, apiserver string) string {
	t.Helper()
	root := t.TempDir()
	write(t, root+"/etc/kubernetes/manifests/kube-apiserver.yaml", "apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - name: kube-apiserver\n    command:\n    - kube-apiserver\n"+apiserver, 0o600)
	write(t, root+"/etc/kubernetes/manifests/etcd.yaml",
		"apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - name: etcd\n    command: [etcd, '--listen-client-urls=https://127.0.0.1:2379,https://10.0.0.5:2379']\n", 0o600)
	for _, f := range []string{"ca.crt", "healthcheck-client.crt", "healthcheck-client.key"} {
		write(t, root+"/etc/kubernetes/pki/etcd/"+f, "", 0o600)
	}
	return root
}

func TestLoadConfigDetects(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none.yaml")
	root := kubeadmNode(t, "    - --etcd-prefix=/k8s\n    - --etcd-servers-overrides=/events#https://10.0.0.9:2379\n")
	c, notes, distribution, err := load(none, false, root)
	if err != nil || distribution != "kubeadm" {
		t.Fatalf("%q, %v", distribution, err)
	}
	pki := root + "/etc/kubernetes/pki/etcd/"
	want := EtcdConfig{Endpoints: []string{"127.0.0.1:2379"}, CAFile: pki + "ca.crt", CertFile: pki + "healthcheck-client.crt", KeyFile: pki + "healthcheck-client.key", Prefix: "/k8s",
		Overrides: map[string][]string{"events": {"10.0.0.9:2379"}}}
	if d := cmp.Diff(want, c.Etcd); d != "" {
		t.Error(d)
	}
	if !strings.Contains(strings.Join(notes, "\n"), "events lives in another etcd ([10.0.0.9:2379])") {
		t.Errorf("notes: %q", notes)
	}

	// What the file says wins, and credentials are not mixed.
	file := write(t, filepath.Join(t.TempDir(), "agent.yaml"), "etcd: {caFile: /my/ca, prefix: mine, overrides: {pods: []}}\nencryptionConfig: /my/encryption.yaml\n", 0o600)
	c, _, distribution, err = load(file, true, root)
	want = EtcdConfig{Endpoints: []string{"127.0.0.1:2379"}, CAFile: "/my/ca", Prefix: "/mine", Overrides: map[string][]string{"pods": {}}}
	if d := cmp.Diff(want, c.Etcd); d != "" || err != nil || distribution != "kubeadm" || c.EncryptionConfig != "/my/encryption.yaml" {
		t.Errorf("%v, %q, %s", err, distribution, d)
	}

	// The API server: where its flags say, with the kubeconfigs that the distribution
	// has, there or not, or the one that is named.
	other := kubeadmNode(t, "    - --secure-port=8443\n")
	for text, want := range map[string]LocalAPIConfig{
		"": {Endpoint: "127.0.0.1:8443", ServerName: "kubernetes", Kubeconfigs: []string{other + "/etc/kubernetes/super-admin.conf", other + "/etc/kubernetes/admin.conf"}},
		"localAPI: {kubeconfig: /a.conf, endpoint: '10.0.0.5:6443'}": {Kubeconfig: "/a.conf", Endpoint: "10.0.0.5:6443", Kubeconfigs: []string{"/a.conf"}},
	} {
		c, _, _, err := load(write(t, filepath.Join(t.TempDir(), "agent.yaml"), text, 0o600), true, other)
		if d := cmp.Diff(want, c.LocalAPI); d != "" || err != nil || !c.LocalAPI.asked() {
			t.Errorf("%q: %v, %s", text, err, d)
		}
	}
	for _, text := range []string{"localAPI: {disabled: true}", "etcd: {endpoints: ['127.0.0.1:2379']}"} {
		if c, _, _, err := load(write(t, filepath.Join(t.TempDir(), "agent.yaml"), text, 0o600), true, other); err != nil || c.LocalAPI.asked() {
			t.Errorf("%q: %v, %+v", text, err, c.LocalAPI)
		}
	}

	// Nothing to be found: the default file may be missing, and the error says
	// what would help.
	_, _, _, err = load(none, false, t.TempDir())
	if f := fault.Of(err); f == nil || !strings.Contains(f.Message, "etcd.endpoints is not set") || !strings.Contains(f.Message, "kubeadm") || f.Next == "" {
		t.Errorf("on no control plane: %v", err)
	}
	// Two distributions: nothing is guessed.
	write(t, root+"/var/lib/rancher/k3s/server/tls/x", "", 0o600)
	if _, _, _, err = load(none, false, root); err == nil || !strings.Contains(err.Error(), "kubeadm and k3s") {
		t.Errorf("on two control planes: %v", err)
	}
	if f := fault.Of(err); !strings.Contains(f.Next, "distribution") {
		t.Errorf("no way out: %v", err)
	}
	// The file says which.
	file = write(t, filepath.Join(t.TempDir(), "agent.yaml"), "distribution: kubeadm\n", 0o600)
	if c, _, distribution, err = load(file, true, root); err != nil || distribution != "kubeadm" || c.Etcd.KeyFile != pki+"healthcheck-client.key" {
		t.Errorf("%q, %+v, %v", distribution, c.Etcd, err)
	}
	file = write(t, filepath.Join(t.TempDir(), "agent.yaml"), "distribution: rke2\n", 0o600)
	if _, _, _, err = load(file, true, root); err == nil || !strings.Contains(err.Error(), "no control plane of rke2") {
		t.Errorf("another than is there: %v", err)
	}
}

func TestLoadConfigTellsOfLaxKeys(t *testing.T) {
	dir := t.TempDir()
	key, encryption := write(t, dir+"/key", "", 0o644), write(t, dir+"/encryption.yaml", "", 0o604)
	file := write(t, dir+"/agent.yaml", "etcd: {endpoints: ['127.0.0.1:2379'], keyFile: "+key+"}\nencryptionConfig: "+encryption+"\n", 0o600)
	_, notes, _, err := LoadConfig(file)
	if all := strings.Join(notes, "\n"); err != nil || len(notes) != 2 || !strings.Contains(all, key+" holds a key and has mode 0644") || !strings.Contains(all, encryption) {
		t.Errorf("%q, %v", notes, err)
	}
	for _, f := range []string{key, encryption} {
		if err := os.Chmod(f, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if _, notes, _, err = LoadConfig(file); err != nil || len(notes) != 0 {
		t.Errorf("%q, %v", notes, err)
	}
	// A key that node finds is told of once.
	root := kubeadmNode(t, "")
	if err := os.Chmod(root+"/etc/kubernetes/pki/etcd/healthcheck-client.key", 0o644); err != nil {
		t.Fatal(err)
	}
	if _, notes, _, err = load(filepath.Join(t.TempDir(), "none.yaml"), false, root); err != nil || len(notes) != 1 {
		t.Errorf("%q, %v", notes, err)
	}
}
