// Package labpki is a certificate authority for labs and tests only: its key
// lies in the clear beside the certificates that it signs, and whoever reads the
// folder is anybody. Real credentials of a cluster or of a fleet never come from
// here.
//
// It must never write outside its folder or sign for anything but IP addresses.
// It stands on floor 0.
package labpki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/halligan-io/halligan/internal/durable"
)

// lifetime of everything signed here: longer than any lab lives.
const lifetime = 5 * 365 * 24 * time.Hour

// Use says what a certificate is good for.
type Use int

// The uses. A Peer is both sides at once, as etcd's members are to one another.
const (
	Server Use = iota + 1
	Client
	Peer
)

var usages = map[Use][]x509.ExtKeyUsage{
	Server: {x509.ExtKeyUsageServerAuth},
	Client: {x509.ExtKeyUsageClientAuth},
	Peer:   {x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
}

// CA is an authority whose certificate and key are files of one folder.
type CA struct {
	dir  string
	name string
	cert *x509.Certificate
	key  crypto.Signer
}

// Pair names the files of one certificate.
type Pair struct{ CertFile, KeyFile string }

// Open returns the authority called name in dir, making folder, key and
// certificate where they are missing. The files are name.crt and name.key.
func Open(dir, name string) (*CA, error) {
	if err := durable.Dir(dir); err != nil {
		return nil, err
	}
	ca := &CA{dir: dir, name: name}
	if err := ca.load(); !errors.Is(err, fs.ErrNotExist) {
		return ca, err
	}
	tmpl := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	if err := ca.sign(name, tmpl); err != nil {
		return nil, fmt.Errorf("making the authority %s: %w", name, err)
	}
	return ca, ca.load()
}

// CertFile returns the file that trust in this authority is configured with.
func (ca *CA) CertFile() string { return filepath.Join(ca.dir, ca.name+".crt") }

// Certificate returns the authority's own certificate.
func (ca *CA) Certificate() *x509.Certificate { return ca.cert }

// Issue signs a fresh key for name (the common name and the files' base name),
// valid for the addresses, and replaces files of an earlier run. orgs become the
// subject's organizations, which Kubernetes takes for groups.
func (ca *CA) Issue(name string, use Use, ips []net.IP, orgs ...string) (Pair, error) {
	usage, ok := usages[use]
	if !ok {
		return Pair{}, fmt.Errorf("certificate %s: no such use %d", name, use)
	}
	tmpl := &x509.Certificate{
		Subject:     pkix.Name{CommonName: name, Organization: orgs},
		IPAddresses: ips,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: usage,
	}
	if err := ca.sign(name, tmpl); err != nil {
		return Pair{}, fmt.Errorf("issuing %s: %w", name, err)
	}
	return Pair{filepath.Join(ca.dir, name+".crt"), filepath.Join(ca.dir, name+".key")}, nil
}

// sign makes a key and a certificate from the template, signed by the authority
// or, while there is none yet, by itself. The certificate is written last, so
// that one which is there has its key.
func (ca *CA) sign(name string, tmpl *x509.Certificate) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if tmpl.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return err
	}
	// An hour of the past is valid too: clocks of a lab may be set back.
	tmpl.NotBefore = time.Now().Add(-time.Hour)
	tmpl.NotAfter = time.Now().Add(lifetime)
	parent, signer := ca.cert, ca.key
	if parent == nil {
		parent, signer = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		return err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	base := filepath.Join(ca.dir, name)
	if err := durable.Write(base+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})); err != nil {
		return err
	}
	return durable.Write(base+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func (ca *CA) load() error {
	cert, err := readPEM(ca.CertFile())
	if err != nil {
		return err
	}
	key, err := readPEM(filepath.Join(ca.dir, ca.name+".key"))
	if err != nil {
		return err
	}
	if ca.cert, err = x509.ParseCertificate(cert); err != nil {
		return fmt.Errorf("%s: %w", ca.CertFile(), err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("key of %s: %w", ca.CertFile(), err)
	}
	signer, ok := parsed.(crypto.Signer)
	if !ok {
		return fmt.Errorf("key of %s: cannot sign", ca.CertFile())
	}
	ca.key = signer
	return nil
}

// Key returns the file name.key in dir with a private key that certifies
// nothing, such as the one that signs tokens, and makes it where it is missing.
// Its form is the one of which Kubernetes also takes the public half
// (client-go/util/keyutil/key.go).
func Key(dir, name string) (string, error) {
	if err := durable.Dir(dir); err != nil {
		return "", err
	}
	file := filepath.Join(dir, name+".key")
	if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
		return file, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return "", err
	}
	return file, durable.Write(file, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1}))
}

func readPEM(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("%s: not a PEM file", path)
	}
	return block.Bytes, nil
}
