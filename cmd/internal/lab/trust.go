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

	"github.com/halligan-io/halligan/cmd/internal/ca"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/issuer"
)

// The lab's own fleet: one cluster, and the ports of an agent's doors.
const (
	clusterName   = "lab"
	sshPort       = 2222
	grpcPort      = 7443
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
	bundle, err := os.ReadFile(a.Bundle())
	if err != nil {
		return err
	}
	if err := durable.Dir(l.file("ids")); err != nil {
		return err
	}
	if err := durable.Write(l.file("bundle"), bundle); err != nil {
		return err
	}
	for i := range controlNodes {
		if err := l.equipNode(a, i, bundle); err != nil {
			return fmt.Errorf("certificates of %s: %w", nodeName(i), err)
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
	return b.String()
}

// equipNode gives an agent its bundle and its two names.
func (l *Lab) equipNode(a *ca.Folder, i int, bundle []byte) error {
	dir := l.file(nodeName(i))
	if err := durable.Dir(dir); err != nil {
		return err
	}
	if err := durable.Write(filepath.Join(dir, "bundle"), bundle); err != nil {
		return err
	}
	key := filepath.Join(dir, "ssh_host_ed25519_key")
	if err := a.Host(key, serverName(i), nodeLife); err != nil {
		return err
	}
	return a.Server(filepath.Join(dir, "tls"), serverName(i), nodeLife)
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
	known := "@cert-authority *." + clusterName + " " + string(issuer.PublicLine(hosts, "host authority of the lab"))
	if err := durable.Write(l.file("known_hosts"), []byte(known)); err != nil {
		return err
	}
	var b strings.Builder
	all := make([]string, controlNodes)
	for i := range controlNodes {
		all[i] = nodeName(i) + " " + serverName(i)
		fmt.Fprintf(&b, "Host %s\n  HostName %s\n  HostKeyAlias %s\n\n", all[i], l.ip(i), serverName(i))
	}
	fmt.Fprintf(&b, `Host %s
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
  ClearAllForwardings yes
  PermitLocalCommand no
`, strings.Join(all, " "), sshPort, quoted(l.file("known_hosts")), ssh.CertAlgoED25519v01)
	for _, who := range identities {
		key := l.file("ids", who.name)
		fmt.Fprintf(&b, "\nMatch originalhost cp-* user %s\n  IdentityFile %s\n  CertificateFile %s\n", who.name, quoted(key), quoted(key+"-cert.pub"))
	}
	return durable.Write(l.file("ssh_config"), []byte(b.String()))
}

// quoted writes a path so that ssh takes it as it is.
func quoted(path string) string {
	return `"` + strings.NewReplacer("%", "%%", `\`, `\\`, `"`, `\"`).Replace(path) + `"`
}

// trustConfig is the part of an agent's configuration that opens its doors.
func (l *Lab) trustConfig(i int) (map[string]any, error) {
	dir := l.file(nodeName(i))
	roots := make([]string, rootKeys)
	for n := range roots {
		line, err := os.ReadFile(l.file("ca", fmt.Sprintf("root-%d.pub", n+1)))
		if err != nil {
			return nil, err
		}
		roots[n] = strings.TrimSpace(string(line))
	}
	at := func(port int) []string { return []string{l.ip(i) + ":" + strconv.Itoa(port)} }
	return map[string]any{
		"cluster": clusterName,
		"trust":   map[string]any{"bundle": filepath.Join(dir, "bundle"), "roots": roots, "threshold": rootThreshold},
		"ssh": map[string]any{"listen": at(sshPort), "hostKey": filepath.Join(dir, "ssh_host_ed25519_key"),
			"hostCertificate": filepath.Join(dir, "ssh_host_ed25519_key-cert.pub")},
		"grpc": map[string]any{"listen": at(grpcPort), "certFile": filepath.Join(dir, "tls.crt"), "keyFile": filepath.Join(dir, "tls.key")},
	}, nil
}
