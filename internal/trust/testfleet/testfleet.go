// Package testfleet is a fleet for tests: root, authorities and a bundle with
// one cluster, prod, whose node is cp-1, made anew in a folder of the test's. It
// signs whatever a test asks for.
//
// It must never be linked into a program: its keys lie in the clear. It stands on
// floor 0.
package testfleet

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/issuer"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// Names of the fleet, its cluster and its node.
const (
	Name    = "acme"
	Cluster = "prod"
	Node    = "cp-1"
	Server  = Node + "." + Cluster
)

// Fleet is the keys of a fleet and its newest bundle.
type Fleet struct {
	t   testing.TB
	Dir string
	// Root is the only root, User and Host are the SSH authorities.
	Root, User, Host *issuer.Key
	// Clients and Servers are the X.509 authorities.
	Clients, Servers *issuer.Authority
	file             bundle.File
	serial           uint64
}

// New makes a fleet whose first bundle is in force now.
func New(t testing.TB) *Fleet {
	t.Helper()
	f := &Fleet{t: t, Dir: t.TempDir()}
	key := func(name string) *issuer.Key {
		k, err := issuer.Generate(filepath.Join(f.Dir, name), name, nil)
		f.must(err)
		return k
	}
	f.Root, f.User, f.Host = key("root"), key("user-ca"), key("host-ca")
	authority := func(name string, usage issuer.Usage) (*issuer.Authority, bundle.CAs) {
		k := key(name)
		cert, err := issuer.NewAuthority(k, name, usage, time.Now())
		f.must(err)
		a, err := issuer.OpenAuthority(cert, k)
		f.must(err)
		cas, err := bundle.ParseCAs(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})))
		f.must(err)
		return a, cas
	}
	var clients, servers bundle.CAs
	f.Clients, clients = authority("tls-client-ca", issuer.ClientAuth)
	f.Servers, servers = authority("tls-server-ca", issuer.ServerAuth)
	signed := time.Now().Add(-time.Minute).UTC().Truncate(time.Second)
	f.add(&bundle.Policy{
		Header:      bundle.First(bundle.PolicyPart, Name, signed),
		Roots:       bundle.Roots{Threshold: 1, Keys: []bundle.Key{{PublicKey: f.Root.Public()}}},
		Authorities: bundle.Authorities{User: []bundle.Key{{PublicKey: f.User.Public()}}, Host: []bundle.Key{{PublicKey: f.Host.Public()}}, TLSClient: clients, TLSServer: servers},
		FreshFor:    bundle.Duration(bundle.DefaultFreshFor), Grace: bundle.Duration(bundle.DefaultGrace), MaxCertificate: bundle.Duration(bundle.MaxCertificate),
	}, bundle.PolicyNamespace)
	f.add(&bundle.Inventory{Header: bundle.First(bundle.InventoryPart, Name, signed), PolicyVersion: 1, Clusters: []bundle.Cluster{{Name: Cluster,
		Nodes: []bundle.Host{{Name: Node, Address: bundle.IP{Addr: netip.MustParseAddr("127.0.0.1")}, SSHPort: 2222, GRPCPort: 2223}}}}}, bundle.InventoryNamespace)
	f.add(&bundle.Revocations{Header: bundle.First(bundle.RevocationsPart, Name, signed), PolicyVersion: 1}, bundle.RevocationsNamespace)
	return f
}

func (f *Fleet) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *Fleet) add(part any, namespace string) {
	f.t.Helper()
	text, err := bundle.Encode(part)
	f.must(err)
	sig, err := bundle.Sign(text, namespace, f.Root.SSH())
	f.must(err)
	f.must(f.file.Add(text, sig))
}

// Bundle returns the newest bundle.
func (f *Fleet) Bundle() []byte { return f.file.Format() }

// RootLine returns the root as a line of authorized_keys.
func (f *Fleet) RootLine() string {
	return strings.TrimSpace(string(issuer.PublicLine(f.Root.Public(), "root")))
}

// Policy signs the next policy and returns the bundle with it.
func (f *Fleet) Policy(change func(*bundle.Policy)) []byte {
	f.t.Helper()
	next := *f.file.Policy
	next.Header = next.Next(time.Now().UTC().Truncate(time.Second))
	change(&next)
	f.add(&next, bundle.PolicyNamespace)
	return f.Bundle()
}

// Inventory signs the next inventory and returns the bundle with it.
func (f *Fleet) Inventory(change func(*bundle.Inventory)) []byte {
	f.t.Helper()
	next := *f.file.Inventory
	next.Header = next.Next(time.Now().UTC().Truncate(time.Second))
	change(&next)
	f.add(&next, bundle.InventoryNamespace)
	return f.Bundle()
}

// HostFiles writes an SSH host's key and its certificate for a name.
func (f *Fleet) HostFiles(name string, v issuer.Validity) (keyFile, certFile string) {
	f.t.Helper()
	_, private := f.key()
	signer, err := gossh.NewSignerFromKey(private)
	f.must(err)
	block, err := gossh.MarshalPrivateKey(private, "")
	f.must(err)
	cert, err := f.Host.Host(signer.PublicKey(), name, f.next(), v)
	f.must(err)
	keyFile = filepath.Join(f.Dir, name+".hostkey")
	certFile = keyFile + "-cert.pub"
	f.must(os.WriteFile(keyFile, pem.EncodeToMemory(block), 0o600))
	f.must(os.WriteFile(certFile, gossh.MarshalAuthorizedKey(cert), 0o600))
	return keyFile, certFile
}

// PersonFiles writes an SSH key and its user certificate, which lies beside it
// as ssh looks for it.
func (f *Fleet) PersonFiles(h issuer.Holder, v issuer.Validity) (keyFile string) {
	f.t.Helper()
	_, private := f.key()
	signer, err := gossh.NewSignerFromKey(private)
	f.must(err)
	block, err := gossh.MarshalPrivateKey(private, "")
	f.must(err)
	cert, err := f.User.User(signer.PublicKey(), h, f.next(), v)
	f.must(err)
	keyFile = filepath.Join(f.Dir, fmt.Sprintf("%s-%d", h.Person, cert.Serial))
	f.must(os.WriteFile(keyFile, pem.EncodeToMemory(block), 0o600))
	f.must(os.WriteFile(keyFile+"-cert.pub", gossh.MarshalAuthorizedKey(cert), 0o600))
	return keyFile
}

// KnownHosts writes a file of known hosts by which every server of the fleet
// that shows a certificate is known, and no other.
func (f *Fleet) KnownHosts() (file string) {
	f.t.Helper()
	file = filepath.Join(f.Dir, "known_hosts")
	f.must(os.WriteFile(file, []byte("@cert-authority * "+strings.TrimSpace(string(issuer.PublicLine(f.Host.Public(), "host")))+"\n"), 0o600))
	return file
}

// Revoke signs the next revocations and returns the bundle with them.
func (f *Fleet) Revoke(change func(*bundle.Revocations)) []byte {
	f.t.Helper()
	next := *f.file.Revocations
	next.Header = next.Next(time.Now().UTC().Truncate(time.Second))
	change(&next)
	f.add(&next, bundle.RevocationsNamespace)
	return f.Bundle()
}

// Opened returns the newest bundle as a daemon has it in force.
func (f *Fleet) Opened() *bundle.Bundle {
	f.t.Helper()
	file := filepath.Join(f.t.TempDir(), "bundle")
	f.must(os.WriteFile(file, f.Bundle(), 0o600))
	anchor, err := bundle.NewAnchor(nil, 0, 0)
	f.must(err)
	s, err := bundle.Open(bundle.Options{Path: file, Anchor: anchor, Now: time.Now, Log: func(string) {}, Alarm: func(error) {}})
	f.must(err)
	return s.Current()
}

// Statement signs what a server says of its evidence, with a new host key that has a
// certificate of that time.
func (f *Fleet) Statement(s logkey.Statement) []byte {
	f.t.Helper()
	public, private := f.key()
	key, err := gossh.NewPublicKey(public)
	f.must(err)
	at := s.Signed.Truncate(time.Second)
	cert, err := f.Host.Host(key, s.Server, f.next(), issuer.Validity{NotBefore: at.Add(-time.Minute), NotAfter: at.Add(time.Hour)})
	f.must(err)
	signer, err := gossh.NewSignerFromKey(private)
	f.must(err)
	data, err := logkey.Sign(s, signer, cert)
	f.must(err)
	return data
}

// Now returns a validity that began a minute ago and lasts for an hour.
func Now() issuer.Validity {
	now := time.Now().Truncate(time.Second)
	return issuer.Validity{NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour)}
}

// Holder returns somebody with one role in the cluster.
func Holder(person string, role trust.Role) issuer.Holder {
	return issuer.Holder{Person: person, Roles: []trust.Role{role}, Clusters: []string{Cluster}}
}

func (f *Fleet) next() uint64 {
	f.serial++
	return f.serial
}

// Client returns a TLS client certificate that an authority, by default
// Clients, has signed.
func (f *Fleet) Client(by *issuer.Authority, h issuer.Holder, v issuer.Validity) tls.Certificate {
	f.t.Helper()
	if by == nil {
		by = f.Clients
	}
	public, private := f.key()
	cert, err := by.Client(public, h, f.next(), v)
	f.must(err)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: private, Leaf: cert}
}

// ServerFiles writes a TLS server certificate for a name and its key.
func (f *Fleet) ServerFiles(name string, v issuer.Validity) (certFile, keyFile string) {
	f.t.Helper()
	public, private := f.key()
	cert, err := f.Servers.Server(public, name, f.next(), v)
	f.must(err)
	der, err := x509.MarshalPKCS8PrivateKey(private)
	f.must(err)
	certFile, keyFile = filepath.Join(f.Dir, name+".crt"), filepath.Join(f.Dir, name+".key")
	f.must(os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	f.must(os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600))
	return certFile, keyFile
}

// Person returns an SSH key and its user certificate.
func (f *Fleet) Person(h issuer.Holder, v issuer.Validity) (gossh.Signer, *gossh.Certificate) {
	f.t.Helper()
	_, private := f.key()
	signer, err := gossh.NewSignerFromKey(private)
	f.must(err)
	cert, err := f.User.User(signer.PublicKey(), h, f.next(), v)
	f.must(err)
	return signer, cert
}

func (f *Fleet) key() (ed25519.PublicKey, ed25519.PrivateKey) {
	f.t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	f.must(err)
	return public, private
}
