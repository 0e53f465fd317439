package labpki

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestIssueAndReopen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	ca, err := Open(dir, "ca")
	if err != nil {
		t.Fatal(err)
	}
	again, err := Open(dir, "ca")
	if err != nil || !bytes.Equal(ca.Certificate().Raw, again.Certificate().Raw) {
		t.Fatalf("the authority changed: %v", err)
	}
	server, err := again.Issue("server", Server, []net.IP{net.IPv4(127, 0, 0, 9)})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.Certificate())
	pair, err := tls.LoadX509KeyPair(server.CertFile, server.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	verify := func(name string, use x509.ExtKeyUsage) error {
		_, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, KeyUsages: []x509.ExtKeyUsage{use}})
		return err
	}
	if err := verify("127.0.0.9", x509.ExtKeyUsageServerAuth); err != nil {
		t.Error(err)
	}
	if verify("127.0.0.8", x509.ExtKeyUsageServerAuth) == nil {
		t.Error("valid for another address")
	}
	if verify("127.0.0.9", x509.ExtKeyUsageClientAuth) == nil {
		t.Error("a server's certificate makes a client")
	}
	for _, file := range []string{"ca.crt", "ca.key", "server.crt", "server.key"} {
		if st, err := os.Stat(filepath.Join(dir, file)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", file, st, err)
		}
	}
}

func TestBrokenAuthorityIsNotReplaced(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	if _, err := Open(dir, "ca"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, "ca"); err == nil {
		t.Error("opened")
	}
}

func TestKeyIsKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	file, err := Key(dir, "tokens")
	if err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(file)
	if err != nil || !bytes.HasPrefix(first, []byte("-----BEGIN EC PRIVATE KEY-----")) {
		t.Fatalf("%v: %s", err, first)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if _, err := Key(dir, "tokens"); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(file); err != nil || !bytes.Equal(first, again) {
		t.Errorf("the key changed: %v", err)
	}
}
