package node

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/halligan-io/halligan/internal/fault"
)

// tree makes files below a fresh root; a name that ends in / is a folder.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		p := filepath.Join(root, name)
		dir := filepath.Dir(p)
		if strings.HasSuffix(name, "/") {
			dir = p
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if dir == p {
			continue
		}
		if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// detect returns the layout with the root taken off every path again.
func detect(t *testing.T, files map[string]string) (*Layout, error) {
	t.Helper()
	root := tree(t, files)
	l, err := Detect(root, "")
	if err != nil {
		return nil, err
	}
	for _, p := range []*string{&l.CAFile, &l.CertFile, &l.KeyFile, &l.EncryptionConfig} {
		*p = strings.TrimPrefix(*p, root)
	}
	for i := range l.Kubeconfigs {
		l.Kubeconfigs[i] = strings.TrimPrefix(l.Kubeconfigs[i], root)
	}
	for i := range l.Notes {
		l.Notes[i] = strings.ReplaceAll(l.Notes[i], root, "")
	}
	return l, nil
}

func with(maps ...map[string]string) map[string]string {
	out := map[string]string{}
	for _, m := range maps {
		for k, v := range m {
			if out[k] = v; v == "-" {
				delete(out, k)
			}
		}
	}
	return out
}

const kubeadmAPI = `apiVersion: v1
kind: Pod
metadata: {name: kube-apiserver, namespace: kube-system}
spec:
  containers:
  - name: kube-apiserver
    command:
    - kube-apiserver
    - --advertise-address=10.0.0.5
    - --etcd-cafile=/etc/kubernetes/pki/etcd/ca.crt
    - --etcd-certfile=/etc/kubernetes/pki/apiserver-etcd-client.crt
    - --etcd-keyfile=/etc/kubernetes/pki/apiserver-etcd-client.key
    - --etcd-servers=https://127.0.0.1:2379
    volumeMounts:
    - {mountPath: /etc/kubernetes/pki, name: k8s-certs, readOnly: true}
  hostNetwork: true
  volumes:
  - hostPath: {path: /etc/kubernetes/pki, type: DirectoryOrCreate}
    name: k8s-certs
`

const kubeadmEtcd = `apiVersion: v1
kind: Pod
spec:
  containers:
  - name: etcd
    command:
    - etcd
    - --advertise-client-urls=https://10.0.0.5:2379
    - --listen-client-urls=https://10.0.0.5:2379,https://127.0.0.1:2379
`

var kubeadm = map[string]string{
	"/etc/kubernetes/manifests/kube-apiserver.yaml":       kubeadmAPI,
	"/etc/kubernetes/manifests/etcd.yaml":                 kubeadmEtcd,
	"/etc/kubernetes/pki/etcd/ca.crt":                     "",
	"/etc/kubernetes/pki/etcd/healthcheck-client.crt":     "",
	"/etc/kubernetes/pki/etcd/healthcheck-client.key":     "",
	"/etc/kubernetes/pki/apiserver-etcd-client.crt":       "",
	"/etc/kubernetes/pki/apiserver-etcd-client.key":       "",
	"/etc/kubernetes/super-admin.conf":                    "",
	"/etc/kubernetes/admin.conf":                          "",
	"/etc/kubernetes/manifests/kube-scheduler.yaml":       "",
	"/var/lib/rancher/k3s/agent/":                         "",
	"/etc/kubernetes/kubelet.conf":                        "",
	"/etc/kubernetes/manifests/.kube-apiserver.yaml.swp":  "\x00",
	"/etc/kubernetes/manifests/kube-apiserver.yaml.saved": "",
}

// api returns kubeadm's static pod with more flags, and with more volumes.
func api(flags ...string) map[string]string {
	var b strings.Builder
	for _, f := range flags {
		b.WriteString("    - " + f + "\n")
	}
	s := strings.Replace(kubeadmAPI, "    volumeMounts:\n", b.String()+"    volumeMounts:\n    - {mountPath: /etc/enc, name: enc}\n", 1)
	return map[string]string{"/etc/kubernetes/manifests/kube-apiserver.yaml": s + "  - {name: enc, hostPath: {path: /srv/encryption}}\n"}
}

var k3s = map[string]string{
	"/var/lib/rancher/k3s/server/db/etcd/config":              "",
	"/var/lib/rancher/k3s/server/tls/etcd/server-ca.crt":      "",
	"/var/lib/rancher/k3s/server/tls/etcd/client.crt":         "",
	"/var/lib/rancher/k3s/server/tls/etcd/client.key":         "",
	"/var/lib/rancher/k3s/server/cred/encryption-config.json": "",
	"/etc/rancher/k3s/k3s.yaml":                               "",
}

// elsewhere is k3s without a local member.
var elsewhere = map[string]string{"/var/lib/rancher/k3s/server/db/etcd/config": "-", "/var/lib/rancher/k3s/server/cred/encryption-config.json": "-"}

var rke2 = map[string]string{
	"/var/lib/rancher/rke2/server/db/etcd/config":              "",
	"/var/lib/rancher/rke2/server/tls/etcd/server-ca.crt":      "",
	"/var/lib/rancher/rke2/server/tls/etcd/client.crt":         "",
	"/var/lib/rancher/rke2/server/tls/etcd/client.key":         "",
	"/var/lib/rancher/rke2/server/cred/encryption-config.json": "",
	"/etc/rancher/rke2/rke2.yaml":                              "",
	"/var/lib/rancher/rke2/agent/pod-manifests/kube-apiserver.yaml": `kind: Pod
spec:
  containers:
  - name: kube-apiserver
    command: [kube-apiserver]
    args:
    - --encryption-provider-config=/var/lib/rancher/rke2/server/cred/encryption-config.json
    - --etcd-servers=https://127.0.0.1:2379
    - --etcd-servers-overrides=/events#https://10.0.0.7:2382
    volumeMounts: [{mountPath: /var/lib/rancher/rke2/server/cred, name: dir0}]
  volumes: [{name: dir0, hostPath: {path: /var/lib/rancher/rke2/server/cred}}]
`,
}

var openshift = map[string]string{
	"/etc/kubernetes/manifests/kube-apiserver-pod.yaml": `{"kind":"Pod","spec":{
"containers":[{"name":"setup"},{"name":"kube-apiserver","command":["/bin/bash","-ec"],
 "args":["exec watch-termination -- hyperkube kube-apiserver --openshift-config=/etc/kubernetes/static-pod-resources/configmaps/config/config.yaml -v=2\n"],
 "volumeMounts":[{"name":"resource-dir","mountPath":"/etc/kubernetes/static-pod-resources"},{"name":"cert-dir","mountPath":"/etc/kubernetes/static-pod-certs"}]}],
"volumes":[{"name":"resource-dir","hostPath":{"path":"/etc/kubernetes/static-pod-resources/kube-apiserver-pod-12"}},
 {"name":"cert-dir","hostPath":{"path":"/etc/kubernetes/static-pod-resources/kube-apiserver-certs"}}]}}`,
	"/etc/kubernetes/static-pod-resources/kube-apiserver-pod-12/configmaps/config/config.yaml": `{"apiServerArguments":{
"etcd-prefix":["kubernetes.io"],"etcd-servers":["https://10.0.0.5:2379","https://localhost:2379"],
"encryption-provider-config":["/etc/kubernetes/static-pod-resources/secrets/encryption-config/encryption-config"]}}`,
	"/etc/kubernetes/static-pod-resources/kube-apiserver-pod-12/secrets/encryption-config/encryption-config": "",
	"/etc/kubernetes/manifests/etcd-pod.yaml": `kind: Pod
spec:
  containers:
  - name: etcd
    command: [/bin/sh, -c, "exec etcd --listen-client-urls=https://0.0.0.0:2379,unixs:///var/run/etcd/x:0 --listen-peer-urls=https://0.0.0.0:2380"]
`,
	"/etc/kubernetes/static-pod-resources/etcd-certs/configmaps/etcd-all-bundles/server-ca-bundle.crt":                 "",
	"/etc/kubernetes/static-pod-resources/etcd-certs/secrets/etcd-all-certs/etcd-peer-cp-1.crt":                        "",
	"/etc/kubernetes/static-pod-resources/etcd-certs/secrets/etcd-all-certs/etcd-peer-cp-1.key":                        "",
	"/etc/kubernetes/static-pod-resources/etcd-certs/secrets/etcd-all-certs/etcd-peer-cp-2.crt":                        "",
	"/etc/kubernetes/static-pod-resources/etcd-certs/secrets/etcd-all-certs/etcd-peer-cp-2.key":                        "",
	"/etc/kubernetes/static-pod-resources/kube-apiserver-certs/secrets/node-kubeconfigs/localhost-recovery.kubeconfig": "",
	"/etc/kubernetes/static-pod-resources/kube-apiserver-certs/secrets/node-kubeconfigs/localhost.kubeconfig":          "",
	"/etc/kubernetes/static-pod-resources/etcd-certs/secrets/etcd-all-certs/etcd-serving-cp-1.crt":                     "",
	"/etc/kubernetes/static-pod-resources/etcd-certs/secrets/etcd-all-certs/etcd-serving-cp-1.key":                     "",
	"/etc/kubernetes/static-pod-resources/kube-apiserver-pod-11/configmaps/config/config.yaml":                         "not read",
	"/etc/kubernetes/static-pod-resources/kube-apiserver-pod-12/kube-apiserver-pod.yaml":                               "not read",
	"/etc/kubernetes/static-pod-resources/kube-apiserver-pod-12/secrets/etcd-client/tls.crt":                           "",
}

var talos = map[string]string{
	"/system/secrets/etcd/ca.crt":                                     "",
	"/system/secrets/etcd/admin.crt":                                  "",
	"/system/secrets/etcd/admin.key":                                  "",
	"/system/secrets/kubernetes/kube-apiserver/encryptionconfig.yaml": "",
}

func TestRows(t *testing.T) {
	marks := map[string]string{}
	for _, r := range Rows() {
		if r.Distribution == "" || len(r.Marks) == 0 || len(r.Member) == 0 || len(r.Credentials) == 0 || r.APIServerName == "" {
			t.Errorf("row %q is not complete", r.Distribution)
		}
		if len(r.Manifest) == 0 && r.Config == "" && len(r.Notes) == 0 {
			t.Errorf("%s: flags are neither read nor said to be unread", r.Distribution)
		}
		if (r.DataDir == "") != (r.Config == "") {
			t.Errorf("%s: a data folder needs the file that moves it", r.Distribution)
		}
		for _, m := range r.Marks {
			m = inBase(r.DataDir, m)
			if other := marks[m]; other != "" {
				t.Errorf("%s is a mark of %s and of %s", m, other, r.Distribution)
			}
			marks[m] = r.Distribution
		}
		paths := slices.Concat(r.Marks, r.Member, r.Manifest, r.Kine, r.EncryptionConfig, r.Kubeconfigs)
		for _, c := range r.Credentials {
			paths = append(paths, c.CA, c.Cert, c.Key)
		}
		for _, p := range paths {
			if !strings.HasPrefix(inBase(r.DataDir, p), "/") || strings.Contains(p, dataDir) && r.DataDir == "" {
				t.Errorf("%s: %q is not absolute", r.Distribution, p)
			}
		}
	}
}

func TestDetect(t *testing.T) {
	const (
		pki  = "/etc/kubernetes/pki/"
		k3sd = "/var/lib/rancher/k3s/server/"
		rked = "/var/lib/rancher/rke2/server/"
		ocp  = "/etc/kubernetes/static-pod-resources/"
	)
	local := []string{"127.0.0.1:2379"}
	kubeadmLayout := func(change func(*Layout)) *Layout {
		l := &Layout{
			Distribution: "kubeadm", Endpoints: local, Prefix: "/registry",
			CAFile: pki + "etcd/ca.crt", CertFile: pki + "etcd/healthcheck-client.crt", KeyFile: pki + "etcd/healthcheck-client.key",
			Kubeconfigs: []string{"/etc/kubernetes/super-admin.conf", "/etc/kubernetes/admin.conf"},
			APIServer:   "127.0.0.1:6443", APIServerName: "kubernetes",
		}
		change(l)
		return l
	}
	k3sLayout := func(change func(*Layout)) *Layout {
		l := &Layout{
			Distribution: "k3s", Endpoints: local, Prefix: "/registry", EncryptionConfig: k3sd + "cred/encryption-config.json",
			CAFile: k3sd + "tls/etcd/server-ca.crt", CertFile: k3sd + "tls/etcd/client.crt", KeyFile: k3sd + "tls/etcd/client.key",
			Kubeconfigs: []string{"/etc/rancher/k3s/k3s.yaml"},
			APIServer:   "127.0.0.1:6443", APIServerName: "kubernetes",
		}
		change(l)
		return l
	}
	external := func(servers string) map[string]string {
		m := api("--etcd-servers=" + servers)
		f := "/etc/kubernetes/manifests/kube-apiserver.yaml"
		m[f] = strings.Replace(m[f], "    - --etcd-servers=https://127.0.0.1:2379\n", "", 1)
		m["/etc/kubernetes/manifests/etcd.yaml"] = "-"
		return m
	}
	viaFlags := func(l *Layout) {
		l.CertFile, l.KeyFile = pki+"apiserver-etcd-client.crt", pki+"apiserver-etcd-client.key"
	}
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  *Layout
	}{
		{"kubeadm", kubeadm, kubeadmLayout(func(*Layout) {})},
		{"kubeadm, only the API server's credentials", with(kubeadm, map[string]string{pki + "etcd/healthcheck-client.key": "-"}), kubeadmLayout(viaFlags)},
		{"kubeadm, etcd not on loopback", with(kubeadm, map[string]string{"/etc/kubernetes/manifests/etcd.yaml": strings.Replace(kubeadmEtcd, ",https://127.0.0.1:2379", "", 1)}),
			kubeadmLayout(func(l *Layout) { l.Endpoints = []string{"10.0.0.5:2379"} })},
		{"kubeadm, everything changed", with(kubeadm, map[string]string{"/srv/encryption/config.yaml": ""}, api(
			"--etcd-prefix=tenant/a/", "--encryption-provider-config=/etc/enc/config.yaml",
			"--etcd-servers-overrides=/events#https://10.0.0.8:2379;https://localhost:2382,apps/deployments#https://[fd00::1]:2379,/pods#https://etcd.example:2379,nonsense")),
			kubeadmLayout(func(l *Layout) {
				l.Prefix, l.EncryptionConfig = "/tenant/a", "/srv/encryption/config.yaml"
				l.Overrides = []EtcdOverride{
					{"events", []string{"10.0.0.8:2379", "127.0.0.1:2382"}}, {"deployments.apps", []string{"[fd00::1]:2379"}}, {"pods", nil},
				}
				l.Notes = []string{
					"etcd at https://etcd.example:2379 is left out: it is a host name, and names need DNS, which may be what failed",
					`the API server's --etcd-servers-overrides entry "nonsense" is not group/resource#servers: ignored`,
				}
			})},
		{"kubeadm, flag and value apart", with(kubeadm, api("--etcd-prefix", "/other")), kubeadmLayout(func(l *Layout) { l.Prefix = "/other" })},
		{"kubeadm, encryption off the host", with(kubeadm, api("--encryption-provider-config=/etc/encryption/x.yaml")), kubeadmLayout(func(l *Layout) {
			l.Notes = []string{"the API server's encryption configuration /etc/encryption/x.yaml is on no volume of the host: encrypted values cannot be read"}
		})},
		{"kubeadm, encryption not there", with(kubeadm, api("--encryption-provider-config=/etc/enc/x.yaml")), kubeadmLayout(func(l *Layout) {
			l.EncryptionConfig = "/srv/encryption/x.yaml"
			l.Notes = []string{"the encryption configuration /srv/encryption/x.yaml is not there: encrypted values cannot be read"}
		})},
		{"kubeadm, external etcd", with(kubeadm, external("https://10.1.0.1:2379,https://etcd-2.example:2379,https://10.1.0.3:2379")), kubeadmLayout(func(l *Layout) {
			viaFlags(l)
			l.Endpoints = []string{"10.1.0.1:2379", "10.1.0.3:2379"}
			l.Notes = []string{"etcd at https://etcd-2.example:2379 is left out: it is a host name, and names need DNS, which may be what failed"}
		})},
		{"kubeadm, external etcd without TLS", with(kubeadm, external("http://10.1.0.1:2379")), kubeadmLayout(func(l *Layout) {
			l.Endpoints, l.Insecure, l.CAFile, l.CertFile, l.KeyFile = []string{"10.1.0.1:2379"}, true, "", "", ""
			l.Notes = []string{"the API server speaks to etcd without TLS"}
		})},
		{"kubeadm, etcd host", with(kubeadm, map[string]string{
			"/etc/kubernetes/manifests/kube-apiserver.yaml": "-", "/etc/kubernetes/super-admin.conf": "-", "/etc/kubernetes/admin.conf": "-"}),
			kubeadmLayout(func(l *Layout) {
				l.APIServer, l.APIServerName = "", ""
				l.Notes = []string{"no API server's static pod is here: the default key prefix is assumed"}
			})},
		{"k3s", k3s, k3sLayout(func(*Layout) {})},
		{"k3s, flags", with(k3s, map[string]string{
			"/etc/rancher/k3s/config.yaml":            "cluster-init: true\nkube-apiserver-arg:\n- etcd-prefix=/lost\n",
			"/etc/rancher/k3s/config.yaml.d/10.yaml":  "kube-apiserver-arg: [etcd-prefix=/first]\n",
			"/etc/rancher/k3s/config.yaml.d/20.yaml":  "kube-apiserver-arg+: [--etcd-prefix=/second]\n",
			"/etc/rancher/k3s/config.yaml.d/30.saved": "{",
		}), k3sLayout(func(l *Layout) { l.Prefix = "/second" })},
		{"kubeadm, another port", with(kubeadm, api("--secure-port=8443", "'--bind-address=::'")), kubeadmLayout(func(l *Layout) { l.APIServer = "[::1]:8443" })},
		{"kubeadm, one address", with(kubeadm, api("--bind-address=10.0.0.5")), kubeadmLayout(func(l *Layout) { l.APIServer = "10.0.0.5:6443" })},
		{"k3s, another port", with(k3s, map[string]string{"/etc/rancher/k3s/config.yaml": "https-listen-port: 7443\n"}), k3sLayout(func(l *Layout) { l.APIServer = "127.0.0.1:7443" })},
		{"k3s, no API server here", with(k3s, map[string]string{"/etc/rancher/k3s/config.yaml": "disable-apiserver: true\n"}), k3sLayout(func(l *Layout) { l.APIServer, l.APIServerName = "", "" })},
		{"k3s, unit", with(k3s, map[string]string{"/etc/systemd/system/k3s.service": "[Service]\nExecStart=/usr/local/bin/k3s \\\n    server \\\n\t'--cluster-init' \\\n\t'--kube-apiserver-arg=etcd-prefix=/unit' \\\n"}),
			k3sLayout(func(l *Layout) { l.Prefix = "/unit" })},
		{"k3s, external etcd", with(k3s, elsewhere, map[string]string{
			"/etc/rancher/k3s/config.yaml": "datastore-endpoint: https://10.1.0.1:2379,https://10.1.0.2:2379\ndatastore-cafile: /pki/ca\ndatastore-certfile: /pki/crt\ndatastore-keyfile: /pki/key\n",
			"/pki/ca":                      "", "/pki/crt": "", "/pki/key": "",
		}), k3sLayout(func(l *Layout) {
			l.Endpoints, l.CAFile, l.CertFile, l.KeyFile, l.EncryptionConfig = []string{"10.1.0.1:2379", "10.1.0.2:2379"}, "/pki/ca", "/pki/crt", "/pki/key", ""
		})},
		{"k3s, no member here", with(k3s, elsewhere, map[string]string{"/etc/rancher/k3s/config.yaml": "disable-etcd: true\n"}), k3sLayout(func(l *Layout) { l.EncryptionConfig = "" })},
		{"rke2", rke2, &Layout{
			Distribution: "rke2", Endpoints: local, Prefix: "/registry", EncryptionConfig: rked + "cred/encryption-config.json",
			CAFile: rked + "tls/etcd/server-ca.crt", CertFile: rked + "tls/etcd/client.crt", KeyFile: rked + "tls/etcd/client.key",
			Overrides: []EtcdOverride{{"events", []string{"10.0.0.7:2382"}}}, Kubeconfigs: []string{"/etc/rancher/rke2/rke2.yaml"},
			APIServer: "127.0.0.1:6443", APIServerName: "kubernetes",
		}},
		{"openshift", openshift, &Layout{
			Distribution: "openshift", Endpoints: local, Prefix: "/kubernetes.io",
			EncryptionConfig: ocp + "kube-apiserver-pod-12/secrets/encryption-config/encryption-config",
			CAFile:           ocp + "etcd-certs/configmaps/etcd-all-bundles/server-ca-bundle.crt",
			CertFile:         ocp + "etcd-certs/secrets/etcd-all-certs/etcd-peer-cp-2.crt", KeyFile: ocp + "etcd-certs/secrets/etcd-all-certs/etcd-peer-cp-2.key",
			Kubeconfigs: []string{ocp + "kube-apiserver-certs/secrets/node-kubeconfigs/localhost-recovery.kubeconfig"},
			APIServer:   "127.0.0.1:6443", APIServerName: "localhost-recovery",
		}},
		{"talos", talos, &Layout{
			Distribution: "talos", Endpoints: local, Prefix: "/registry", EncryptionConfig: "/system/secrets/kubernetes/kube-apiserver/encryptionconfig.yaml",
			CAFile: "/system/secrets/etcd/ca.crt", CertFile: "/system/secrets/etcd/admin.crt", KeyFile: "/system/secrets/etcd/admin.key",
			APIServer: "127.0.0.1:6443", APIServerName: "kubernetes",
			Notes: []string{"Talos keeps the API server's flags in its machine configuration: a changed etcd-prefix must be configured here"},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := detect(t, tt.files)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestDetectMovedData(t *testing.T) {
	files := map[string]string{"/etc/rancher/k3s/config.yaml": "data-dir: /data/k3s\n"}
	for k, v := range k3s {
		files[strings.Replace(k, "/var/lib/rancher/k3s", "/data/k3s", 1)] = v
	}
	l, err := detect(t, files)
	if err != nil || l.CertFile != "/data/k3s/server/tls/etcd/client.crt" || l.EncryptionConfig != "/data/k3s/server/cred/encryption-config.json" {
		t.Fatal(l, err)
	}
}

func TestDetectRefuses(t *testing.T) {
	manifest := "/etc/kubernetes/manifests/kube-apiserver.yaml"
	for _, tt := range []struct {
		name  string
		files map[string]string
		words []string
	}{
		{"nothing here", nil, []string{"kubeadm, k3s, rke2, openshift, talos", "control-plane node"}},
		{"a worker", map[string]string{"/etc/kubernetes/kubelet.conf": "", "/var/lib/rancher/rke2/agent/kubelet.kubeconfig": ""}, []string{"no control plane"}},
		{"two of them", with(kubeadm, rke2), []string{"more than one", "kubeadm and rke2"}},
		{"bad YAML", with(kubeadm, map[string]string{manifest: "kind: Pod\n\tspec"}), []string{manifest}},
		{"not a pod", with(kubeadm, map[string]string{manifest: "kind: Pod\n"}), []string{manifest, "no container kube-apiserver"}},
		{"binary", with(kubeadm, map[string]string{manifest: "\x00\x01\xff"}), []string{manifest}},
		{"bad etcd YAML", with(kubeadm, map[string]string{"/etc/kubernetes/manifests/etcd.yaml": "{"}), []string{"manifests/etcd.yaml"}},
		{"a folder for a file", with(kubeadm, map[string]string{manifest: "-", manifest + "/x": ""}), []string{"reading"}},
		{"no credentials", with(kubeadm, map[string]string{"/etc/kubernetes/pki/etcd/ca.crt": "-"}), []string{"no complete set", "healthcheck-client.crt"}},
		{"host names only", with(kubeadm, map[string]string{"/etc/kubernetes/manifests/etcd.yaml": "-", manifest: strings.Replace(kubeadmAPI, "127.0.0.1:2379", "etcd.example:2379", 1)}),
			[]string{"host names only", "etcd.example"}},
		{"no etcd named", with(kubeadm, map[string]string{"/etc/kubernetes/manifests/etcd.yaml": "-", manifest: strings.Replace(kubeadmAPI, "    - --etcd-servers=https://127.0.0.1:2379\n", "", 1)}),
			[]string{"no etcd member"}},
		{"k3s on SQLite", with(k3s, elsewhere, map[string]string{"/var/lib/rancher/k3s/server/db/state.db": ""}), []string{"another database", "sqlite", "--via api"}},
		{"k3s on kine's socket", with(k3s, elsewhere, map[string]string{"/var/lib/rancher/k3s/server/kine.sock": ""}), []string{"another database"}},
		{"k3s on MySQL", with(k3s, elsewhere, map[string]string{"/etc/systemd/system/k3s.service.env": "K3S_DATASTORE_ENDPOINT='mysql://u:hunter2@tcp(10.0.0.1:3306)/k3s'\n"}),
			[]string{"another database", "(mysql)"}},
		{"k3s on PostgreSQL", with(k3s, elsewhere, map[string]string{"/etc/systemd/system/k3s.service": "ExecStart=/usr/local/bin/k3s server --datastore-endpoint postgres://u:hunter2@10.0.0.1/k3s\n"}),
			[]string{"another database", "(postgres)"}},
		{"bad k3s configuration", with(k3s, map[string]string{"/etc/rancher/k3s/config.yaml": "a: ["}), []string{"/etc/rancher/k3s/config.yaml"}},
		{"bad OpenShift configuration", with(openshift, map[string]string{"/etc/kubernetes/static-pod-resources/kube-apiserver-pod-12/configmaps/config/config.yaml": "["}), []string{"config.yaml"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := detect(t, tt.files)
			if err == nil {
				t.Fatalf("%+v", l)
			}
			if f := fault.Of(err); f.Code != fault.Failed || f.Next == "" || strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%+v", f)
			}
			for _, w := range tt.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
		})
	}
}

func TestKeyMode(t *testing.T) {
	root := tree(t, kubeadm)
	key := filepath.Join(root, "/etc/kubernetes/pki/etcd/healthcheck-client.key")
	for mode, notes := range map[os.FileMode]int{0o600: 0, 0o640: 0, 0o400: 0, 0o644: 1, 0o660: 1} {
		if err := os.Chmod(key, mode); err != nil {
			t.Fatal(err)
		}
		if l, err := Detect(root, ""); err != nil || len(l.Notes) != notes {
			t.Errorf("%04o: %v %v", mode, l, err)
		}
	}
}

// TestDetectNamed: on a node with the files of two, the one that is named counts,
// and what is wrong with the other's does not matter.
func TestDetectNamed(t *testing.T) {
	root := tree(t, with(kubeadm, rke2, map[string]string{"/etc/rancher/rke2/config.yaml": "["}))
	if l, err := Detect(root, "kubeadm"); err != nil || l.Distribution != "kubeadm" {
		t.Errorf("%+v, %v", l, err)
	}
	for _, name := range []string{"talos", "k8s"} {
		if l, err := Detect(root, name); !fault.Is(err, fault.Failed) || !strings.Contains(err.Error(), "no control plane of "+name) {
			t.Errorf("%s: %+v, %v", name, l, err)
		}
	}
}
