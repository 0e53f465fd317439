package node

// Row is one distribution: where its files lie. Paths are of the host and may
// be glob patterns; the first that is there counts.
type Row struct {
	Distribution string
	// DataDir is the default of the folder that DATA stands for in the other
	// paths; Config the YAML file, with a folder of the same name and .d beside
	// it, whose key data-dir moves it.
	DataDir, Config string
	// Units are systemd units and environment files that flags can be in, too.
	Units []string
	// Marks are files of which one shows that a control plane of this
	// distribution is here. No file may be a mark of two rows.
	Marks []string
	// Member are files that show that an etcd member runs here; one that is a
	// static pod tells where it listens.
	Member []string
	// Manifest is the API server's static pod.
	Manifest []string
	// Kine are files of a database other than etcd; they count where no member
	// runs here.
	Kine []string
	// Credentials are etcd client credentials, each usable only as a whole.
	Credentials []TLSFiles
	// EncryptionConfig is where it lies when no flag says so.
	EncryptionConfig []string
	// Kubeconfigs are administrators', the most powerful first; no patterns.
	Kubeconfigs []string
	// APIServerName is a name in the API server's certificate, which stands for it
	// whatever its addresses are.
	APIServerName string
	// Logs are where the components log, by component; see Components.
	Logs  map[string]Logs
	Notes []string
}

// TLSFiles are a CA and a client certificate with its key.
type TLSFiles struct{ CA, Cert, Key string }

const dataDir = "DATA"

// rows is the table. Sources: kubeadm cmd/kubeadm/app/constants/constants.go;
// k3s pkg/daemons/control/deps/deps.go and RKE2 pkg/podtemplate; OpenShift
// cluster-etcd-operator bindata/etcd/pod.yaml and cluster-kube-apiserver-operator
// bindata/assets; Talos pkg/machinery/constants/constants.go.
var rows = []Row{
	{
		Distribution: "kubeadm",
		Marks:        []string{"/etc/kubernetes/manifests/kube-apiserver.yaml", "/etc/kubernetes/manifests/etcd.yaml"},
		Member:       []string{"/etc/kubernetes/manifests/etcd.yaml"},
		Manifest:     []string{"/etc/kubernetes/manifests/kube-apiserver.yaml"},
		Credentials: []TLSFiles{
			{"/etc/kubernetes/pki/etcd/ca.crt", "/etc/kubernetes/pki/etcd/healthcheck-client.crt", "/etc/kubernetes/pki/etcd/healthcheck-client.key"},
			{"/etc/kubernetes/pki/etcd/ca.crt", "/etc/kubernetes/pki/apiserver-etcd-client.crt", "/etc/kubernetes/pki/apiserver-etcd-client.key"},
		},
		// admin.conf is not exempt from flow control, super-admin.conf is.
		Kubeconfigs:   []string{"/etc/kubernetes/super-admin.conf", "/etc/kubernetes/admin.conf"},
		APIServerName: "kubernetes",
		Logs:          staticPods(Logs{Units: []string{"kubelet.service"}}),
	},
	{
		Distribution:     "k3s",
		DataDir:          "/var/lib/rancher/k3s",
		Config:           "/etc/rancher/k3s/config.yaml",
		Units:            []string{"/etc/systemd/system/k3s.service", "/etc/systemd/system/k3s.service.env", "/etc/default/k3s", "/etc/sysconfig/k3s"},
		Marks:            []string{"DATA/server/tls", "DATA/server/db"},
		Member:           []string{"DATA/server/db/etcd"},
		Kine:             []string{"DATA/server/db/state.db", "DATA/server/kine.sock"},
		Credentials:      []TLSFiles{{"DATA/server/tls/etcd/server-ca.crt", "DATA/server/tls/etcd/client.crt", "DATA/server/tls/etcd/client.key"}},
		EncryptionConfig: []string{"DATA/server/cred/encryption-config.json"},
		Kubeconfigs:      []string{"/etc/rancher/k3s/k3s.yaml"},
		// The file is that of OpenRC, or of the flag --log as its examples have it.
		Logs: oneProcess(Logs{Files: []string{"/var/log/k3s.log"}, Units: []string{"k3s.service"},
			Note: "k3s is one process: lines of all components are among these"}),
		APIServerName: "kubernetes",
	},
	{
		Distribution:     "rke2",
		DataDir:          "/var/lib/rancher/rke2",
		Config:           "/etc/rancher/rke2/config.yaml",
		Units:            []string{"/usr/local/lib/systemd/system/rke2-server.env", "/etc/default/rke2-server", "/etc/sysconfig/rke2-server"},
		Marks:            []string{"DATA/server/tls", "DATA/server/db"},
		Member:           []string{"DATA/server/db/etcd"},
		Manifest:         []string{"DATA/agent/pod-manifests/kube-apiserver.yaml"},
		Kine:             []string{"DATA/server/db/state.db", "DATA/server/kine.sock"},
		Credentials:      []TLSFiles{{"DATA/server/tls/etcd/server-ca.crt", "DATA/server/tls/etcd/client.crt", "DATA/server/tls/etcd/client.key"}},
		EncryptionConfig: []string{"DATA/server/cred/encryption-config.json"},
		Kubeconfigs:      []string{"/etc/rancher/rke2/rke2.yaml"},
		Logs:             staticPods(Logs{Files: []string{"DATA/agent/logs/kubelet.log"}, Units: []string{"rke2-server.service"}}),
		APIServerName:    "kubernetes",
	},
	{
		Distribution: "openshift",
		Marks:        []string{"/etc/kubernetes/manifests/kube-apiserver-pod.yaml", "/etc/kubernetes/static-pod-resources/etcd-certs"},
		Member:       []string{"/etc/kubernetes/manifests/etcd-pod.yaml"},
		Manifest:     []string{"/etc/kubernetes/manifests/kube-apiserver-pod.yaml"},
		Credentials: []TLSFiles{
			{
				"/etc/kubernetes/static-pod-resources/etcd-certs/configmaps/etcd-all-bundles/server-ca-bundle.crt",
				"/etc/kubernetes/static-pod-resources/etcd-certs/secrets/etcd-all-certs/etcd-peer-*.crt",
				"/etc/kubernetes/static-pod-resources/etcd-certs/secrets/etcd-all-certs/etcd-peer-*.key",
			},
			{
				"/etc/kubernetes/static-pod-resources/etcd-certs/configmaps/etcd-serving-ca/ca-bundle.crt",
				"/etc/kubernetes/static-pod-resources/etcd-certs/secrets/etcd-all-certs/etcd-peer-*.crt",
				"/etc/kubernetes/static-pod-resources/etcd-certs/secrets/etcd-all-certs/etcd-peer-*.key",
			},
		},
		Kubeconfigs: []string{"/etc/kubernetes/static-pod-resources/kube-apiserver-certs/secrets/node-kubeconfigs/localhost-recovery.kubeconfig"},
		Logs: map[string]Logs{
			"apiserver":          staticPod("openshift-kube-apiserver", "kube-apiserver", "kube-apiserver"),
			"etcd":               staticPod("openshift-etcd", "etcd", "etcd"),
			"controller-manager": staticPod("openshift-kube-controller-manager", "kube-controller-manager", "kube-controller-manager"),
			"scheduler":          staticPod("openshift-kube-scheduler", "openshift-kube-scheduler", "kube-scheduler"),
			"kubelet":            {Units: []string{"kubelet.service"}},
		},
		APIServerName: "localhost-recovery", // which the server chooses its certificate by
	},
	{
		Distribution: "talos",
		Marks:        []string{"/system/secrets/etcd"},
		Member:       []string{"/system/secrets/etcd/admin.crt"},
		Credentials:  []TLSFiles{{"/system/secrets/etcd/ca.crt", "/system/secrets/etcd/admin.crt", "/system/secrets/etcd/admin.key"}},
		// The API server is no file here: flags changed in the machine
		// configuration are not seen.
		EncryptionConfig: []string{"/system/secrets/kubernetes/kube-apiserver/encryptionconfig.yaml"},
		Logs:             talosLogs,
		APIServerName:    "kubernetes", // administrators' kubeconfigs are made by its own API, and not kept
		Notes:            []string{"Talos keeps the API server's flags in its machine configuration: a changed etcd-prefix must be configured here"},
	},
}

// Rows returns the table.
func Rows() []Row { return rows }
