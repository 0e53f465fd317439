package bundle

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// keygen runs stock ssh-keygen, the oracle of this file.
func keygen(t *testing.T, dir string, stdin []byte, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command("ssh-keygen", args...)
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func needKeygen(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		t.Skip("needs ssh-keygen")
	}
}

// keyFile writes the private key for stock tools and returns its path.
func keyFile(t *testing.T, dir, name string) string {
	t.Helper()
	block, err := ssh.MarshalPrivateKey(ed25519.NewKeyFromSeed(seed(name)), name)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestExport lets stock ssh-keygen verify every part of a bundle whose roots
// were rotated, one of them a FIDO key.
func TestExport(t *testing.T) {
	needKeygen(t)
	f := newFleet(t)
	f.pol.Roots.Keys[2] = sealed("fido-root")
	rest := join(f.inventory("delegate"), f.revocations("root-1"))
	v1 := f.policy("root-1", "root-2")
	rotate := func(to string) []byte {
		next(&f.pol.Header, f.encode(f.pol))
		f.pol.Roots.Keys[1] = key(to)
		data := f.encode(f.pol)
		sig, err := Sign(data, PolicyNamespace, token{"fido-root", "ssh:", 1})
		if err != nil {
			t.Fatal(err)
		}
		return entry(PolicyPart, data, join(sign(t, data, PolicyNamespace, "root-1", "root-2", "root-4"), sig))
	}
	v2 := rotate("root-4")
	next(&f.pol.Header, f.encode(f.pol))
	f.pol.Roots.Keys[1] = key("root-5")
	v3 := f.policy("root-1", "root-4", "root-5")
	b := mustVerify(t, join(rename(v1, "policy.1"), rename(v2, "policy.2"), v3, rest), anchor(t, 2, 0, "root-1", "root-2"))

	dir := filepath.Join(t.TempDir(), "export")
	names, err := b.ExportTo(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := "policy.2.yaml policy.2.yaml.1.sig policy.2.yaml.2.sig policy.2.yaml.3.sig policy.2.yaml.4.sig policy.yaml policy.yaml.1.sig policy.yaml.2.sig policy.yaml.3.sig " +
		"inventory.yaml inventory.yaml.1.sig revocations.yaml revocations.yaml.1.sig allowed_signers krl.spec"
	if got := strings.Join(names, " "); got != want {
		t.Fatalf("%s\nwant\n%s", got, want)
	}
	for _, c := range []struct {
		file      string
		n         int
		principal string
		namespace string
		good      bool
	}{
		{"policy.yaml", 1, "root", PolicyNamespace, true},
		{"policy.yaml", 2, "former-root", PolicyNamespace, true},
		{"policy.yaml", 2, "root", PolicyNamespace, false},
		{"policy.yaml", 3, "root", PolicyNamespace, true},
		{"policy.yaml", 1, "root", InventoryNamespace, false},
		{"policy.2.yaml", 1, "root", PolicyNamespace, true},
		{"policy.2.yaml", 3, "former-root", PolicyNamespace, true},
		{"policy.2.yaml", 4, "root", PolicyNamespace, true}, // the FIDO key
		{"inventory.yaml", 1, "delegate", InventoryNamespace, true},
		{"inventory.yaml", 1, "delegate", PolicyNamespace, false},
		{"inventory.yaml", 1, "root", InventoryNamespace, false},
		{"revocations.yaml", 1, "root", RevocationsNamespace, true},
	} {
		data, err := os.ReadFile(filepath.Join(dir, c.file))
		if err != nil {
			t.Fatal(err)
		}
		sig := fmt.Sprintf("%s.%d.sig", c.file, c.n)
		out, err := keygen(t, dir, data, "-Y", "verify", "-f", "allowed_signers", "-I", c.principal, "-n", c.namespace, "-s", sig)
		if (err == nil) != c.good {
			t.Errorf("%s by %s as %s: %s", sig, c.principal, c.namespace, out)
		}
		if _, err := keygen(t, dir, append(data, ' '), "-Y", "verify", "-f", "allowed_signers", "-I", c.principal, "-n", c.namespace, "-s", sig); err == nil {
			t.Errorf("%s: changed, and verified", sig)
		}
	}
}

// TestStockSignatures takes what stock ssh-keygen signs, from key files.
func TestStockSignatures(t *testing.T) {
	needKeygen(t)
	f, dir := newFleet(t), t.TempDir()
	stock := func(part any, name string, by ...string) []byte {
		data := f.encode(part)
		path := filepath.Join(dir, name+".yaml")
		var sigs []byte
		for _, k := range by {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			_ = os.Remove(path + ".sig") // of the key before
			if out, err := keygen(t, dir, nil, "-Y", "sign", "-n", name+"@halligan.io", "-f", keyFile(t, dir, k), path); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			sigs = append(sigs, must(os.ReadFile(path+".sig"))...)
		}
		return entry(name, data, sigs)
	}
	mustVerify(t, join(stock(f.pol, PolicyPart, "root-1", "root-2"), stock(f.inv, InventoryPart, "delegate"), stock(f.rev, RevocationsPart, "delegate")),
		anchor(t, 2, 0, "root-1", "root-2"))
}

// TestAgent signs with keys that only a stock ssh-agent has, one of them under a
// certificate.
func TestAgent(t *testing.T) {
	if _, err := exec.LookPath("ssh-agent"); err != nil {
		t.Skip("needs ssh-agent")
	}
	dir, err := os.MkdirTemp("", "agent") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	cmd := exec.Command("ssh-agent", "-D", "-a", socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	var conn net.Conn
	for range 200 {
		if conn, err = net.Dial("unix", socket); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	a := agent.NewClient(conn)
	cert, ok := certified(t, "root-2").PublicKey().(*ssh.Certificate)
	if !ok {
		t.Fatal("no certificate")
	}
	hard := rsaKey()
	for _, k := range []agent.AddedKey{{PrivateKey: ed25519.NewKeyFromSeed(seed("root-1"))}, {PrivateKey: ed25519.NewKeyFromSeed(seed("root-2")), Certificate: cert}, {PrivateKey: hard}} {
		if err := a.Add(k); err != nil {
			t.Fatal(err)
		}
	}
	signers, err := a.Signers()
	if err != nil || len(signers) != 3 {
		t.Fatal(signers, err)
	}
	f := newFleet(t)
	f.pol.Roots = Roots{Threshold: 3, Keys: []Key{key("root-1"), key("root-2"), {PublicKey: must(ssh.NewPublicKey(hard.Public())), Comment: "rsa"}}}
	pol := f.encode(f.pol)
	var sigs []byte
	for _, s := range signers {
		sig, err := Sign(pol, PolicyNamespace, s)
		if err != nil {
			t.Fatal(err)
		}
		sigs = append(sigs, sig...)
	}
	mustVerify(t, join(entry(PolicyPart, pol, sigs), f.inventory("delegate"), f.revocations("delegate")), nil)
}

// TestKRL makes a revocation list of the export and asks stock ssh-keygen about
// the same certificates that Certificate is asked about.
func TestKRL(t *testing.T) {
	needKeygen(t)
	f := newFleet(t)
	f.pol.Authorities.User = append(f.pol.Authorities.User, key("user-ca-2"))
	f.rev.Serials = []Serial{{Serial: 7, CA: key("user-ca").Fingerprint()}, {Serial: 8, CA: key("user-ca-2").Fingerprint()}, {Serial: 9}, {Serial: 5, CA: key("gone-ca").Fingerprint()}}
	f.rev.KeyIDs, f.rev.Keys = []string{"mallory"}, []string{key("lost").Fingerprint(), sealed("bob").Fingerprint()}
	f.rev.X509Serials = []X509Serial{{Serial: "31"}}
	b := mustVerify(t, f.file(), nil)
	dir := filepath.Join(t.TempDir(), "export")
	names, err := b.ExportTo(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(strings.Join(names, " "), "krl.spec ca.1.pub krl.1.spec ca.2.pub krl.2.spec") {
		t.Error(names)
	}
	for _, args := range [][]string{{"-k", "-f", "krl", "-s", "none", "krl.spec"}, {"-k", "-u", "-f", "krl", "-s", "ca.1.pub", "krl.1.spec"}, {"-k", "-u", "-f", "krl", "-s", "ca.2.pub", "krl.2.spec"}} {
		if out, err := keygen(t, dir, nil, args...); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	ask := func(name string, pub ssh.PublicKey) bool {
		t.Helper()
		path := filepath.Join(dir, name+".pub")
		if err := os.WriteFile(path, ssh.MarshalAuthorizedKey(pub), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := keygen(t, dir, nil, "-Q", "-f", "krl", path)
		if revoked := strings.Contains(out, "REVOKED"); revoked == (err == nil) {
			t.Fatalf("%v: %s", err, out)
		}
		return err != nil
	}
	revoked := 0
	for i, c := range []struct {
		serial          uint64
		id, holder, cas string
	}{
		{7, "alice", "a", "user-ca"}, {7, "alice", "a", "user-ca-2"}, {8, "alice", "a", "user-ca"}, {8, "alice", "a", "user-ca-2"},
		{9, "alice", "a", "user-ca"}, {9, "alice", "a", "user-ca-2"}, {10, "alice", "a", "user-ca"}, {10, "mallory", "a", "user-ca"}, {10, "alice", "lost", "user-ca"},
	} {
		cert := &ssh.Certificate{Key: key(c.holder).PublicKey, CertType: ssh.UserCert, KeyId: c.id, Serial: c.serial, ValidPrincipals: []string{"observer"}, ValidBefore: ssh.CertTimeInfinity}
		if err := cert.SignCert(rand.Reader, signer(c.cas)); err != nil {
			t.Fatal(err)
		}
		by, ours := b.Revocations.Certificate(cert)
		if stock := ask(fmt.Sprintf("%d-cert", i), cert); stock != ours {
			t.Errorf("%+v: stock says %v, ours %v %s", c, stock, ours, by)
		}
		if ours {
			revoked++
		}
	}
	if revoked != 6 {
		t.Errorf("%d revoked", revoked)
	}
	for name, want := range map[string]bool{"bob": true, "alice": false} {
		if got := ask("sealed-"+name, sealed(name).PublicKey); got != want {
			t.Errorf("sealed %s: %v", name, got)
		}
	}
}
