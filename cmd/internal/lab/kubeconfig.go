package lab

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/labpki"
)

// frontProxyClient is who may say in headers for whom a request is.
const frontProxyClient = "front-proxy-client"

// kubePKI is what the parts of the control plane trust each other by.
type kubePKI struct {
	ca, frontProxyCA *labpki.CA
	serving          []labpki.Pair // of the API servers
	frontProxy       labpki.Pair
	accounts         string // file of the key that signs service accounts' tokens
}

// kubeUsers are who has a kubeconfig: name of the file, name and groups in the
// certificate.
var kubeUsers = []struct {
	file, name string
	groups     []string
}{
	{"admin", "kubernetes-admin", []string{"system:masters"}},
	{"alice", "alice", []string{"developers"}},
	{managerName, "system:" + managerName, nil},
	{schedulerName, "system:" + schedulerName, nil},
	// In the kubelets' group, so that flow control treats it as them; what it
	// may do says a role of its own.
	{kwokName, kwokName, []string{"system:nodes"}},
}

// issue makes keys, certificates and kubeconfigs. The authorities and the key of
// the tokens are those of an earlier run.
func (k *Kube) issue() (err error) {
	dir := filepath.Join(k.dir, "pki")
	if k.pki.ca, err = labpki.Open(dir, "ca"); err != nil {
		return err
	}
	if k.pki.frontProxyCA, err = labpki.Open(dir, "front-proxy-ca"); err != nil {
		return err
	}
	if k.pki.frontProxy, err = k.pki.frontProxyCA.Issue(frontProxyClient, labpki.Client, nil); err != nil {
		return err
	}
	if k.pki.accounts, err = labpki.Key(dir, "service-accounts"); err != nil {
		return err
	}
	for i := range k.o.APIServers {
		pair, err := k.pki.ca.Issue(apiServerName(i), labpki.Server, []net.IP{net.ParseIP(k.lab.ip(i)), net.IPv4(127, 0, 0, 1), net.ParseIP(serviceIP)})
		if err != nil {
			return err
		}
		k.pki.serving = append(k.pki.serving, pair)
	}
	for _, u := range kubeUsers {
		pair, err := k.pki.ca.Issue(u.name, labpki.Client, nil, u.groups...)
		if err != nil {
			return err
		}
		if err := k.writeKubeconfig(u.file, u.name, pair); err != nil {
			return fmt.Errorf("kubeconfig of %s: %w", u.name, err)
		}
	}
	return nil
}

// writeKubeconfig writes one that needs no other file, with a context for each
// API server.
func (k *Kube) writeKubeconfig(file, user string, pair labpki.Pair) error {
	config := clientcmdapi.NewConfig()
	auth := clientcmdapi.NewAuthInfo()
	var ca []byte
	for _, f := range []struct {
		path string
		data *[]byte
	}{{k.CAFile(), &ca}, {pair.CertFile, &auth.ClientCertificateData}, {pair.KeyFile, &auth.ClientKeyData}} {
		data, err := os.ReadFile(f.path)
		if err != nil {
			return err
		}
		*f.data = data
	}
	config.AuthInfos[user] = auth
	for i, address := range k.Servers() {
		cluster := clientcmdapi.NewCluster()
		cluster.Server, cluster.CertificateAuthorityData = "https://"+address, ca
		to := clientcmdapi.NewContext()
		to.Cluster, to.AuthInfo = nodeName(i), user
		config.Clusters[nodeName(i)], config.Contexts[nodeName(i)] = cluster, to
	}
	config.CurrentContext = nodeName(0)
	data, err := clientcmd.Write(*config)
	if err != nil {
		return err
	}
	return durable.Write(k.config(file), data)
}

// stagesName is the file that tells kwok how nodes and pods live.
const stagesName = "stages.yaml"

// writeStages takes kwok's fast stages and lets a Job's pod run for the time
// that it asks for, instead of ending it at once.
func (k *Kube) writeStages() error {
	data, err := os.ReadFile(k.binary(stagesName))
	if err != nil {
		return err
	}
	var out strings.Builder
	patched := false
	for _, text := range strings.Split(string(data), "\n---\n") {
		var stage map[string]any
		if err := yaml.Unmarshal([]byte(text), &stage); err != nil {
			return fmt.Errorf("%s: %w", k.binary(stagesName), err)
		}
		if stage == nil {
			continue
		}
		meta, _ := stage["metadata"].(map[string]any)
		if spec, ok := stage["spec"].(map[string]any); ok && meta["name"] == "pod-complete" {
			patched = true
			spec["delay"] = map[string]any{"durationMilliseconds": 0,
				"durationFrom": map[string]any{"expressionFrom": `.metadata.annotations["pod-complete.stage.kwok.x-k8s.io/delay"]`}}
		}
		text, err := yaml.Marshal(stage)
		if err != nil {
			return err
		}
		fmt.Fprintf(&out, "---\n%s", text)
	}
	if !patched {
		return fmt.Errorf("%s has no stage pod-complete", k.binary(stagesName))
	}
	return durable.Write(k.file(stagesName), []byte(out.String()))
}
