package bundle

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"io"
	"math/big"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/tools/txtar"

	"github.com/halligan-io/halligan/internal/trust/pubkey"
)

var day = time.Date(2026, 3, 1, 9, 0, 0, 0, time.UTC)

func seed(name string) []byte {
	sum := sha256.Sum256([]byte(name))
	return sum[:]
}

// signer returns the same key for the same name.
func signer(name string) ssh.Signer {
	s, err := ssh.NewSignerFromKey(ed25519.NewKeyFromSeed(seed(name)))
	if err != nil {
		panic(err)
	}
	return s
}

func key(name string) Key { return Key{PublicKey: signer(name).PublicKey(), Comment: name} }

// token is a FIDO2 key in software: PROTOCOL.u2f of openssh-portable.
type token struct {
	name, application string
	flags             byte // 1: the user was present
}

func (t token) PublicKey() ssh.PublicKey {
	pub, err := ssh.ParsePublicKey(ssh.Marshal(struct {
		Type        string
		Key         []byte
		Application string
	}{ssh.KeyAlgoSKED25519, ed25519.NewKeyFromSeed(seed(t.name)).Public().(ed25519.PublicKey), t.application}))
	if err != nil {
		panic(err)
	}
	return pub
}

func (t token) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	app, message := sha256.Sum256([]byte(t.application)), sha256.Sum256(data)
	rest := binary.BigEndian.AppendUint32([]byte{t.flags}, 7)
	signed := append(append(app[:], rest...), message[:]...)
	return &ssh.Signature{Format: ssh.KeyAlgoSKED25519, Blob: ed25519.Sign(ed25519.NewKeyFromSeed(seed(t.name)), signed), Rest: rest}, nil
}

func sealed(name string) Key {
	return Key{PublicKey: token{name: name, application: "ssh:"}.PublicKey(), Comment: name}
}

// certified returns a signer that presents a certificate around its key.
func certified(t testing.TB, name string) ssh.Signer {
	t.Helper()
	c := &ssh.Certificate{Key: signer(name).PublicKey(), CertType: ssh.UserCert, KeyId: name, Serial: 1, ValidPrincipals: []string{"observer"}, ValidBefore: ssh.CertTimeInfinity}
	if err := c.SignCert(rand.Reader, signer("user-ca")); err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewCertSigner(c, signer(name))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func tlsCA(t testing.TB, key *ecdsa.PrivateKey, change func(*x509.Certificate)) string {
	t.Helper()
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: day, NotAfter: day.Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	if change != nil {
		change(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

var tlsKeys = sync.OnceValue(func() (keys [2]*ecdsa.PrivateKey) {
	for i := range keys {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			panic(err)
		}
		keys[i] = k
	}
	return keys
})

var rsaKey = sync.OnceValue(func() *rsa.PrivateKey { return must(rsa.GenerateKey(rand.Reader, pubkey.MinRSA)) })

// fleet is a whole bundle before it is signed, of two roots in three.
type fleet struct {
	t   testing.TB
	pol *Policy
	inv *Inventory
	rev *Revocations
}

func newFleet(t testing.TB) *fleet {
	t.Helper()
	cas := func(k *ecdsa.PrivateKey) CAs {
		c, err := ParseCAs(tlsCA(t, k, nil))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	f := &fleet{t: t, pol: &Policy{Header: First(PolicyPart, "acme", day), FreshFor: Duration(DefaultFreshFor), Grace: Duration(DefaultGrace), MaxCertificate: Duration(MaxCertificate)}}
	f.pol.Roots = Roots{Threshold: 2, Keys: []Key{key("root-1"), key("root-2"), key("root-3")}}
	f.pol.Delegates = []Key{key("delegate")}
	f.pol.Authorities = Authorities{User: []Key{key("user-ca")}, Host: []Key{key("host-ca")}, TLSClient: cas(tlsKeys()[0]), TLSServer: cas(tlsKeys()[1])}
	for _, name := range []string{"alice", "bob"} {
		f.pol.Sealed = append(f.pol.Sealed, Sealed{Person: name, Key: sealed(name), Role: "commander", Clusters: []string{"prod"}, NotBefore: day, NotAfter: day.Add(MaxSealed)})
	}
	host := func(name, ip string) Host {
		return Host{Name: name, Address: IP{netip.MustParseAddr(ip)}, SSHPort: 2222, GRPCPort: 2223}
	}
	f.inv = &Inventory{Header: First(InventoryPart, "acme", day), PolicyVersion: 1, Clusters: []Cluster{
		{Name: "prod", EtcdClusterID: "cdf818194e3a8c32", Nodes: []Host{host("cp-1", "10.0.0.11"), host("cp-2", "10.0.0.12"), host("only", "fd00::5")}},
		{Name: "staging", Nodes: []Host{host("cp-1", "10.0.0.11"), host("cp-2", "10.0.9.12")}},
	}, Bastions: []Host{host("a", "192.0.2.1"), host("b", "192.0.2.2")}}
	f.rev = &Revocations{Header: First(RevocationsPart, "acme", day), PolicyVersion: 1}
	return f
}

func (f *fleet) encode(part any) []byte {
	f.t.Helper()
	data, err := Encode(part)
	if err != nil {
		f.t.Fatalf("%v\n%s", err, data)
	}
	return data
}

func sign(t testing.TB, part []byte, namespace string, by ...string) []byte {
	t.Helper()
	var all []byte
	for _, name := range by {
		sig, err := Sign(part, namespace, signer(name))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, sig...)
	}
	return all
}

// policy returns the two entries of the policy, signed.
func (f *fleet) policy(by ...string) []byte { f.t.Helper(); return f.entry(f.pol, PolicyPart, by) }

func (f *fleet) inventory(by ...string) []byte {
	f.t.Helper()
	return f.entry(f.inv, InventoryPart, by)
}

func (f *fleet) revocations(by ...string) []byte {
	f.t.Helper()
	return f.entry(f.rev, RevocationsPart, by)
}

func (f *fleet) entry(part any, name string, by []string) []byte {
	f.t.Helper()
	data := f.encode(part)
	return entry(name, data, sign(f.t, data, name+"@halligan.io", by...))
}

func entry(name string, part, sig []byte) []byte {
	return txtar.Format(&txtar.Archive{Files: []txtar.File{{Name: name + ".yaml", Data: part}, {Name: name + ".yaml.sig", Data: sig}}})
}

// file returns the whole bundle, signed by those who should.
func (f *fleet) file() []byte {
	f.t.Helper()
	return join(f.policy("root-1", "root-2"), f.inventory("delegate"), f.revocations("delegate"))
}

func join(entries ...[]byte) []byte { return bytes.Join(entries, nil) }

// next raises a header by one version, as if the part had just been signed.
func next(h *Header, data []byte) {
	h.bytes = data
	*h = h.Next(h.Signed.Add(time.Hour))
}

// rename makes an entry of a policy an earlier one.
func rename(data []byte, name string) []byte {
	return bytes.ReplaceAll(bytes.ReplaceAll(data, []byte("-- policy.yaml --"), []byte("-- "+name+".yaml --")), []byte("-- policy.yaml.sig --"), []byte("-- "+name+".yaml.sig --"))
}

func mustParse(t testing.TB, data []byte) *File {
	t.Helper()
	f, err := Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func mustVerify(t testing.TB, data []byte, a *Anchor) *Bundle {
	t.Helper()
	b, err := Verify(mustParse(t, data), a)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// load is what a machine without a bundle does with a file.
func load(data []byte, a *Anchor) (*Bundle, error) { return open(data, a) }

func anchor(t testing.TB, threshold int, least uint64, names ...string) *Anchor {
	t.Helper()
	var lines []string
	for _, n := range names {
		lines = append(lines, key(n).Line())
	}
	a, err := NewAnchor(lines, threshold, least)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func wantError(t testing.TB, err error, part string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), part) {
		t.Errorf("error %v, want one with %q", err, part)
	}
}
