package credential_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
)

// t0 is when the tests happen.
var t0 = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

type clock struct {
	sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.Lock()
	defer c.Unlock()
	return c.now
}

func (c *clock) set(now time.Time) {
	c.Lock()
	defer c.Unlock()
	c.now = now
}

// store stands for bundle.Store: what is in force, and who wants to know.
type store struct {
	sync.Mutex
	now  *bundle.Bundle
	subs map[chan struct{}]bool
	// deaf stores tell nobody of a change.
	deaf bool
}

func (s *store) Current() *bundle.Bundle {
	s.Lock()
	defer s.Unlock()
	return s.now
}

func (s *store) Subscribe() (<-chan struct{}, func()) {
	s.Lock()
	defer s.Unlock()
	ch := make(chan struct{}, 1)
	s.subs[ch] = true
	return ch, func() {
		s.Lock()
		defer s.Unlock()
		delete(s.subs, ch)
	}
}

func (s *store) subscribers() int {
	s.Lock()
	defer s.Unlock()
	return len(s.subs)
}

func (s *store) put(b *bundle.Bundle) {
	s.Lock()
	defer s.Unlock()
	s.now = b
	for ch := range s.subs {
		if s.deaf {
			continue
		}
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}

// fleet is a fleet's keys, as files for ssh-keygen, and its bundle.
type fleet struct {
	t     testing.TB
	dir   string
	root  gossh.Signer
	store *store
	clock *clock
	// The X.509 authorities.
	clients, servers *x509CA
	// policy and revocations are the parts in force, to be changed and put in
	// force anew by sign.
	policy      *bundle.Policy
	revocations *bundle.Revocations
	alarms      chan string
}

// newFleet makes the keys user-ca, host-ca, other-ca, alice, bob and cp-1 in a
// directory, and a bundle without anything but authorities.
func newFleet(t testing.TB) *fleet {
	t.Helper()
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		t.Skip("no ssh-keygen")
	}
	f := &fleet{t: t, dir: t.TempDir(), store: &store{subs: map[chan struct{}]bool{}}, clock: &clock{now: t0}, alarms: make(chan string, 16)}
	for _, name := range []string{"user-ca", "host-ca", "other-ca", "alice", "bob", "cp-1"} {
		f.key(name, "ed25519")
	}
	f.root = softKey(t)
	f.clients, f.servers = newX509CA(t), newX509CA(t)
	f.policy = &bundle.Policy{
		Header: bundle.First(bundle.PolicyPart, "acme", t0.Add(-time.Hour)),
		Roots:  bundle.Roots{Threshold: 1, Keys: []bundle.Key{{PublicKey: f.root.PublicKey()}}},
		Authorities: bundle.Authorities{
			User: []bundle.Key{{PublicKey: f.public("user-ca")}}, Host: []bundle.Key{{PublicKey: f.public("host-ca")}},
			TLSClient: f.clients.bundled(t), TLSServer: f.servers.bundled(t),
		},
		FreshFor: bundle.Duration(bundle.DefaultFreshFor), Grace: bundle.Duration(2 * time.Hour), MaxCertificate: bundle.Duration(bundle.MaxCertificate),
	}
	f.revocations = &bundle.Revocations{Header: bundle.First(bundle.RevocationsPart, "acme", t0.Add(-time.Hour)), PolicyVersion: 1}
	f.sign()
	return f
}

// sign puts the policy and the revocations in force.
func (f *fleet) sign() {
	f.t.Helper()
	file := &bundle.File{}
	for _, p := range []struct {
		part      any
		namespace string
	}{
		{f.policy, bundle.PolicyNamespace},
		{&bundle.Inventory{Header: bundle.First(bundle.InventoryPart, "acme", t0.Add(-time.Hour)), PolicyVersion: 1}, bundle.InventoryNamespace},
		{f.revocations, bundle.RevocationsNamespace},
	} {
		text, err := bundle.Encode(p.part)
		if err != nil {
			f.t.Fatal(err)
		}
		sig, err := bundle.Sign(text, p.namespace, f.root)
		if err != nil {
			f.t.Fatal(err)
		}
		if err := file.Add(text, sig); err != nil {
			f.t.Fatal(err)
		}
	}
	b, err := bundle.Verify(file, nil)
	if err != nil {
		f.t.Fatal(err)
	}
	f.store.put(b)
}

// authority is that of the node cp-1 in cluster prod.
func (f *fleet) authority() *credential.Authority {
	return credential.New(credential.Options{Bundle: f.store, Clock: f.clock, Cluster: "prod", Node: "cp-1", Alarm: f.alarm})
}

func (f *fleet) path(name string) string { return filepath.Join(f.dir, name) }

func (f *fleet) keygen(args ...string) error {
	cmd := exec.CommandContext(f.t.Context(), "ssh-keygen", append([]string{"-q"}, args...)...)
	cmd.Dir, cmd.Env = f.dir, append(os.Environ(), "TZ=UTC")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ssh-keygen %q: %w\n%s", args, err, out)
	}
	return nil
}

func (f *fleet) key(name string, kind ...string) {
	f.t.Helper()
	if err := f.keygen(append([]string{"-N", "", "-C", name, "-f", name, "-t"}, kind...)...); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fleet) read(name string) []byte {
	f.t.Helper()
	data, err := os.ReadFile(f.path(name))
	if err != nil {
		f.t.Fatal(err)
	}
	return data
}

// public returns the public key, or the certificate, of the file NAME.pub.
func (f *fleet) public(name string) gossh.PublicKey {
	f.t.Helper()
	key, _, _, _, err := gossh.ParseAuthorizedKey(f.read(name + ".pub"))
	if err != nil {
		f.t.Fatal(err)
	}
	return key
}

func (f *fleet) signer(name string) gossh.Signer {
	f.t.Helper()
	s, err := gossh.ParsePrivateKey(f.read(name))
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

// order is what ssh-keygen is to certify. What is left out is as it should be.
type order struct {
	ca, key, id, principals string
	serial                  string
	from, to                time.Time
	validity                string // in place of from and to
	host                    bool
	options                 []string // -O; "" for the scope of cluster prod is there unless bare
	bare                    bool
	more                    []string
}

func (f *fleet) certify(o order) *gossh.Certificate {
	f.t.Helper()
	or := func(s *string, value string) {
		if *s == "" {
			*s = value
		}
	}
	or(&o.serial, "7")
	if o.host {
		or(&o.ca, "host-ca")
		or(&o.key, "cp-1")
		or(&o.id, "cp-1.prod")
		or(&o.principals, "cp-1.prod")
	} else {
		or(&o.ca, "user-ca")
		or(&o.key, "alice")
		or(&o.id, "alice@acme.test")
		or(&o.principals, "observer,responder")
		if !o.bare {
			o.options = append([]string{"critical:" + credential.OptionClusters + "=staging,prod"}, o.options...)
		}
	}
	if o.from.IsZero() {
		o.from = t0.Add(-time.Hour)
	}
	if o.to.IsZero() {
		o.to = o.from.Add(24 * time.Hour)
	}
	const form = "20060102150405"
	or(&o.validity, o.from.Format(form)+":"+o.to.Format(form))
	args := []string{"-s", o.ca, "-I", o.id, "-z", o.serial, "-V", o.validity}
	if o.principals != "-" {
		args = append(args, "-n", o.principals)
	}
	if o.host {
		args = append(args, "-h")
	}
	for _, option := range o.options {
		args = append(args, "-O", option)
	}
	if err := f.keygen(append(append(args, o.more...), o.key+".pub")...); err != nil {
		f.t.Fatal(err)
	}
	return f.public(o.key + "-cert").(*gossh.Certificate)
}

func softKey(t testing.TB) gossh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := gossh.NewSignerFromSigner(private)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// securityKey returns the public half of a FIDO2 key (OpenSSH, PROTOCOL.u2f).
func securityKey(t testing.TB) gossh.PublicKey {
	t.Helper()
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := gossh.ParsePublicKey(gossh.Marshal(struct{ Type, Key, Application string }{gossh.KeyAlgoSKED25519, string(public), "ssh:"}))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

type x509CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newX509CA(t testing.TB) *x509CA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "acme"}, NotBefore: t0.AddDate(-1, 0, 0), NotAfter: t0.AddDate(9, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	return &x509CA{create(t, template, template, key.Public(), key), key}
}

func create(t testing.TB, template, parent *x509.Certificate, public any, signer *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (ca *x509CA) bundled(t testing.TB) bundle.CAs {
	t.Helper()
	var text bytes.Buffer
	if err := pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw}); err != nil {
		t.Fatal(err)
	}
	cas, err := bundle.ParseCAs(text.String())
	if err != nil {
		t.Fatal(err)
	}
	return cas
}

func (f *fleet) alarm(who trust.Identity, why string) { f.alarms <- who.Person + ": " + why }
