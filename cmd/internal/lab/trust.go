package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/cmd/internal/ca"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/issuer"
)

// The lab's own fleet: one cluster, and the ports of an agent's doors.
const (
	clusterName   = "lab"
	sshPort       = 2222
	grpcPort      = 7443
	tunnelPort    = 7444
	metricsPort   = 9644
	rootKeys      = 3
	rootThreshold = 2
	// Certificates last as long as an agent accepts; each run makes new ones.
	personLife = issuer.MaxLife
	nodeLife   = issuer.DefaultNodeLife
)

// roles of each identity: somebody who may take a rung may take those below.
var identities = []struct {
	name  string
	roles []trust.Role
}{
	{"observer", []trust.Role{trust.Observer}},
	{"responder", []trust.Role{trust.Observer, trust.Responder}},
	{"commander", []trust.Role{trust.Observer, trust.Responder, trust.Commander}},
	{"approver", []trust.Role{trust.Approver}},
}

// automation is the program that a lab knows.
const automation = "automation"

func (l *Lab) file(names ...string) string {
	return filepath.Join(append([]string{l.opts.Dir}, names...)...)
}

func serverName(i int) string { return nodeName(i) + "." + clusterName }

// makeTrust holds the key ceremony of the lab's fleet, with all keys in the clear
// below DIR/ca, and issues what its nodes and people need. The keys of an earlier
// run stay, and everything is signed anew.
func (l *Lab) makeTrust() error {
	folder := l.file("ca")
	_, err := os.Lstat(folder)
	if errors.Is(err, fs.ErrNotExist) {
		err = ca.Init(folder, ca.InitOptions{Fleet: clusterName, Roots: rootKeys, Threshold: rootThreshold, Inventory: l.inventory(), Now: time.Now()})
	}
	if err != nil {
		return err
	}
	a, err := ca.Open(folder)
	if err != nil {
		return err
	}
	signers := map[string][]string{"inventory": {"delegate"}, "revocations": {"delegate"}}
	for i := range rootThreshold {
		signers["policy"] = append(signers["policy"], fmt.Sprintf("root-%d", i+1))
	}
	if err := a.SignAll(signers); err != nil {
		return fmt.Errorf("signing the bundle: %w", err)
	}
	signed, err := os.ReadFile(a.Bundle())
	if err != nil {
		return err
	}
	if err := durable.Dir(l.file("ids")); err != nil {
		return err
	}
	if err := durable.Write(l.file("bundle"), signed); err != nil {
		return err
	}
	for i := range controlNodes {
		if err := l.equip(a, nodeName(i), clusterName, signed); err != nil {
			return fmt.Errorf("certificates of %s: %w", nodeName(i), err)
		}
	}
	for i := range bastionHosts {
		if err := l.equip(a, bastionName(i), bundle.BastionDomain, signed); err != nil {
			return fmt.Errorf("certificates of %s: %w", bastionName(i), err)
		}
	}
	for _, who := range identities {
		if err := l.equipPerson(a, who.name, who.roles); err != nil {
			return fmt.Errorf("certificate of the %s: %w", who.name, err)
		}
	}
	holder := issuer.Holder{Person: automation, Roles: []trust.Role{trust.Responder}, Clusters: []string{clusterName}}
	if err := a.Client(l.file("ids", automation), holder, personLife); err != nil {
		return err
	}
	server, err := os.ReadFile(a.ServerAuthority())
	if err != nil {
		return err
	}
	if err := durable.Write(l.file("ca.crt"), server); err != nil {
		return err
	}
	return l.writeSSH(a)
}

// inventory is the inventory part below its heading.
func (l *Lab) inventory() string {
	var b strings.Builder
	fmt.Fprintf(&b, "clusters:\n- name: %s\n  nodes:\n", clusterName)
	for i := range controlNodes {
		fmt.Fprintf(&b, "  - {name: %s, address: %s, sshPort: %d, grpcPort: %d}\n", nodeName(i), l.ip(i), sshPort, grpcPort)
	}
	b.WriteString("bastions:\n")
	for i := range bastionHosts {
		fmt.Fprintf(&b, "- {name: %s, address: %s, sshPort: %d, grpcPort: %d, tunnelPort: %d}\n", bastionName(i), l.bastionIP(i), sshPort, grpcPort, tunnelPort)
	}
	return b.String()
}

// equip gives a daemon its bundle, and its name in two certificates.
func (l *Lab) equip(a *ca.Folder, name, domain string, signed []byte) error {
	dir := l.file(name)
	if err := durable.Dir(dir); err != nil {
		return err
	}
	if err := durable.Write(filepath.Join(dir, "bundle"), signed); err != nil {
		return err
	}
	key := filepath.Join(dir, "ssh_host_ed25519_key")
	if err := a.Host(key, name+"."+domain, nodeLife); err != nil {
		return err
	}
	return a.Server(filepath.Join(dir, "tls"), name+"."+domain, nodeLife)
}

func (l *Lab) equipPerson(a *ca.Folder, name string, roles []trust.Role) error {
	return a.User(l.file("ids", name), issuer.Holder{Person: name + "@" + clusterName, Roles: roles, Clusters: []string{clusterName}}, personLife)
}

// writeSSH writes what stock ssh needs: whom to dial, whom to believe and who to
// be. Nothing of the user's own configuration counts where -F names this file.
func (l *Lab) writeSSH(a *ca.Folder) error {
	hosts, err := a.HostAuthority()
	if err != nil {
		return err
	}
	known := "@cert-authority *." + clusterName + ",*." + bundle.BastionDomain + " " + string(issuer.PublicLine(hosts, "host authority of the lab"))
	if err := durable.Write(l.file("known_hosts"), []byte(known)); err != nil {
		return err
	}
	var b strings.Builder
	var nodes, bastions []string
	host := func(list *[]string, name, id, ip string) {
		*list = append(*list, name, id)
		fmt.Fprintf(&b, "Host %s %s\n  HostName %s\n  HostKeyAlias %s\n\n", name, id, ip, id)
	}
	for i := range bastionHosts {
		host(&bastions, bastionName(i), bastionName(i)+"."+bundle.BastionDomain, l.bastionIP(i))
	}
	for i := range controlNodes {
		host(&nodes, nodeName(i), serverName(i), l.ip(i))
	}
	fmt.Fprintf(&b, `Host %s %s
  Port %d
  User responder
  StrictHostKeyChecking yes
  UserKnownHostsFile %s
  GlobalKnownHostsFile /dev/null
  KnownHostsCommand none
  HostKeyAlgorithms %s
  UpdateHostKeys no
  CheckHostIP no
  IdentitiesOnly yes
  PreferredAuthentications publickey
  ForwardAgent no
  ForwardX11 no
  PermitLocalCommand no

# A bastion forwards connections to nodes, for -L too; a node forwards nothing.
Host %s
  ClearAllForwardings yes
`, strings.Join(bastions, " "), strings.Join(nodes, " "), sshPort, quoted(l.file("known_hosts")), ssh.CertAlgoED25519v01, strings.Join(nodes, " "))
	for _, who := range identities {
		key := l.file("ids", who.name)
		fmt.Fprintf(&b, "\nMatch originalhost cp-* user %[1]s\n  ProxyJump %[1]s@%[2]s\nMatch originalhost cp-*,bastion-* user %[1]s\n  IdentityFile %[3]s\n  CertificateFile %[4]s\n",
			who.name, bastionName(0), quoted(key), quoted(key+"-cert.pub"))
	}
	fmt.Fprintf(&b, "\nMatch originalhost cp-*\n  ProxyJump %s\n", bastionName(0))
	return durable.Write(l.file("ssh_config"), []byte(b.String()))
}

// quoted writes a path so that ssh takes it as it is.
func quoted(path string) string {
	return `"` + strings.NewReplacer("%", "%%", `\`, `\\`, `"`, `\"`).Replace(path) + `"`
}

// trustConfig is the part of an agent's configuration that opens its doors.
func (l *Lab) trustConfig(i int) (map[string]any, error) {
	c, err := l.doors(nodeName(i), l.ip(i))
	if err == nil {
		c["cluster"] = clusterName
	}
	return c, err
}

// bastionConfig is a bastion's configuration.
func (l *Lab) bastionConfig(i int) ([]byte, error) {
	c, err := l.doors(bastionName(i), l.bastionIP(i))
	if err != nil {
		return nil, err
	}
	c["name"], c["stateDir"] = bastionName(i), l.file(bastionName(i), "state")
	c["tunnel"] = map[string]any{"listen": []string{l.bastionIP(i) + ":" + strconv.Itoa(tunnelPort)}}
	c["metrics"] = map[string]any{"listen": l.bastionIP(i) + ":" + strconv.Itoa(metricsPort)}
	return yaml.Marshal(c)
}

// doors is what a daemon needs to know whom to let in, and where.
func (l *Lab) doors(name, ip string) (map[string]any, error) {
	dir := l.file(name)
	roots := make([]string, rootKeys)
	for n := range roots {
		line, err := os.ReadFile(l.file("ca", fmt.Sprintf("root-%d.pub", n+1)))
		if err != nil {
			return nil, err
		}
		roots[n] = strings.TrimSpace(string(line))
	}
	at := func(port int) []string { return []string{ip + ":" + strconv.Itoa(port)} }
	return map[string]any{
		"trust": map[string]any{"bundle": filepath.Join(dir, "bundle"), "roots": roots, "threshold": rootThreshold},
		"ssh": map[string]any{"listen": at(sshPort), "hostKey": filepath.Join(dir, "ssh_host_ed25519_key"),
			"hostCertificate": filepath.Join(dir, "ssh_host_ed25519_key-cert.pub")},
		"grpc": map[string]any{"listen": at(grpcPort), "certFile": filepath.Join(dir, "tls.crt"), "keyFile": filepath.Join(dir, "tls.key")},
	}, nil
}
