package issuer_test

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/sshclient/testagent"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/issuer"
)

func generate(t *testing.T) *issuer.Key {
	t.Helper()
	k, err := issuer.Generate(filepath.Join(t.TempDir(), "key"), "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func refused(t *testing.T, what string, err error, code fault.Code, text string) {
	t.Helper()
	if f := fault.Of(err); err == nil || f.Code != code || !strings.Contains(f.Error(), text) || f.Next == "" || strings.Contains(f.Error(), "\n") {
		t.Errorf("%s: got %v, want %s and %q in one line with a next step", what, err, code, text)
	}
}

func TestGenerateReplacesNothing(t *testing.T) {
	for _, there := range []string{"key", "key.pub"} {
		dir := t.TempDir()
		if err := os.Symlink("nowhere", filepath.Join(dir, there)); err != nil {
			t.Fatal(err)
		}
		_, err := issuer.Generate(filepath.Join(dir, "key"), "", nil)
		refused(t, there, err, fault.Refused, "is there already")
	}
}

func TestLoadEveryFormat(t *testing.T) {
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	for i, args := range []string{"-t ed25519", "-t ecdsa -b 384", "-t rsa -b 2048", "-t rsa -b 2048 -m PEM", "-t ecdsa -m PKCS8"} {
		for _, phrase := range []string{"", "correct horse"} {
			file := filepath.Join(dir, fmt.Sprint(i, phrase == ""))
			if out, err := exec.Command("ssh-keygen", append(strings.Fields(args), "-q", "-N", phrase, "-f", file)...).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if strings.Contains(args, "PKCS8") && phrase != "" { // which x/crypto does not read
				_, err := issuer.Load(file, func(string) ([]byte, error) { return []byte(phrase), nil })
				refused(t, args, err, fault.Usage, "ssh-keygen -p")
				continue
			}
			asked := 0
			k, err := issuer.Load(file, func(name string) ([]byte, error) { asked++; return []byte(phrase), nil })
			if err != nil || asked != min(len(phrase), 1) {
				t.Errorf("%s with %q: %v, asked %d times", args, phrase, err, asked)
				continue
			}
			public, _, err := issuer.ReadPublic(file + ".pub")
			if err != nil || ssh.FingerprintSHA256(public) != ssh.FingerprintSHA256(k.Public()) {
				t.Errorf("%s: another key: %v", args, err)
			}
			if phrase != "" {
				_, err = issuer.Load(file, nil)
				refused(t, args, err, fault.Usage, "nobody to ask")
				_, err = issuer.Load(file, func(string) ([]byte, error) { return []byte("wrong"), nil })
				refused(t, args, err, fault.Usage, "right passphrase")
			}
		}
	}
}

func TestLaxKeyFiles(t *testing.T) {
	k := generate(t)
	for _, mode := range []os.FileMode{0o640, 0o604, 0o644, 0o620} {
		if err := os.Chmod(k.Where, mode); err != nil {
			t.Fatal(err)
		}
		_, err := issuer.Load(k.Where, nil)
		refused(t, mode.String(), err, fault.Usage, "chmod 600")
	}
	if err := os.Chmod(k.Where, 0o600); err != nil {
		t.Fatal(err)
	}
	link := k.Where + ".link"
	if err := os.Symlink(k.Where, link); err != nil {
		t.Fatal(err)
	}
	_, err := issuer.Load(link, nil)
	refused(t, "a link", err, fault.Usage, "not a plain file")
	_, err = issuer.Load(k.Where+".pub", nil)
	refused(t, "a public key", err, fault.Usage, "cannot be read")
}

// TestAgents: keys that this process never sees, of every type.
func TestAgents(t *testing.T) {
	ring := agent.NewKeyring()
	socket := testagent.Serve(t, ring)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, _ := ed25519.GenerateKey(rand.Reader)
	leaf := generate(t).Public()
	for _, private := range []crypto.Signer{rsaKey, edKey} {
		if err := ring.Add(agent.AddedKey{PrivateKey: private}); err != nil {
			t.Fatal(err)
		}
		public, err := ssh.NewPublicKey(private.Public())
		if err != nil {
			t.Fatal(err)
		}
		k, err := issuer.FromAgent(socket, public)
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		v, _ := issuer.From(time.Now(), time.Hour, issuer.MaxLife)
		cert, err := k.User(leaf, holder(), 1, v)
		if err != nil {
			t.Fatalf("%s: %v", public.Type(), err)
		}
		if err := k.CheckSSH(cert); err != nil {
			t.Errorf("%s: %v", public.Type(), err)
		}
		if format := cert.Signature.Format; format == ssh.KeyAlgoRSA {
			t.Errorf("signed with SHA-1")
		}
	}
	other := generate(t).Public()
	_, err = issuer.FromAgent(socket, other)
	refused(t, "a key that it does not have", err, fault.NotFound, "ssh-add")
	_, err = issuer.FromAgent(socket+".none", other)
	refused(t, "nobody", err, fault.Unreachable, "does not answer")
	_, err = issuer.FromAgent("", other)
	refused(t, "no agent", err, fault.Usage, "SSH_AUTH_SOCK")
}

// TestToken: a FIDO2 key signs parts of a bundle and people's certificates, but
// no X.509.
func TestToken(t *testing.T) {
	_, private, _ := ed25519.GenerateKey(rand.Reader)
	token := &testagent.Token{Private: private}
	k, err := issuer.FromAgent(testagent.Serve(t, token), token.Public())
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	sig, err := bundle.Sign([]byte("part\n"), bundle.PolicyNamespace, k.SSH())
	if err != nil {
		t.Fatal(err)
	}
	if by, err := bundle.VerifySignature([]byte("part\n"), bundle.PolicyNamespace, sig); err != nil || ssh.FingerprintSHA256(by) != ssh.FingerprintSHA256(token.Public()) {
		t.Errorf("%v", err)
	}
	v, _ := issuer.From(time.Now(), time.Hour, issuer.MaxLife)
	cert, err := k.User(generate(t).Public(), holder(), 1, v)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.CheckSSH(cert); err != nil {
		t.Error(err)
	}
	_, err = k.Crypto()
	refused(t, "X.509 by a token", err, fault.Usage, "ed25519")
	h := holder()
	h.VerifyRequired = true
	_, err = generate(t).User(token.Public(), h, 1, v)
	refused(t, "verify-required at logins", err, fault.Usage, "an approver's signatures alone")
	h.Roles = []trust.Role{trust.Approver}
	if cert, err = generate(t).User(token.Public(), h, 1, v); err != nil || cert.CriticalOptions["verify-required"] != "" {
		t.Errorf("verify-required of a token: %v", err)
	}
	if _, there := cert.CriticalOptions["verify-required"]; !there {
		t.Error("verify-required is lost")
	}
}

// TestTokenFile: the file of a FIDO2 key only says which token to ask.
func TestTokenFile(t *testing.T) {
	inner := ssh.Marshal(struct {
		Check1, Check2   uint32
		Type             string
		Key, Application []byte
		Pad              [7]byte
	}{1, 1, ssh.KeyAlgoSKED25519, make([]byte, 32), []byte("ssh:"), [7]byte{1, 2, 3, 4, 5, 6, 7}})
	inner = inner[:len(inner)-len(inner)%8]
	blob := append([]byte("openssh-key-v1\x00"), ssh.Marshal(struct {
		Cipher, KDF, Options string
		Keys                 uint32
		Public, Private      []byte
	}{"none", "none", "", 1, (&testagent.Token{Private: make(ed25519.PrivateKey, 64)}).Public().Marshal(), inner})...)
	file := filepath.Join(t.TempDir(), "sk")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "OPENSSH PRIVATE KEY", Bytes: blob}), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := issuer.Load(file, nil)
	refused(t, "a token's file", err, fault.Usage, "ssh-add "+file)
}

func holder() issuer.Holder {
	return issuer.Holder{Person: "alice", Roles: []trust.Role{trust.Responder}, Clusters: []string{"prod"}}
}

func TestValidity(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	for _, c := range []struct {
		life, most time.Duration
		ok         bool
	}{
		{time.Minute, issuer.MaxLife, true}, {time.Minute - 1, issuer.MaxLife, false}, {-time.Hour, issuer.MaxLife, false},
		{issuer.DefaultLife, issuer.MaxLife, true}, {issuer.MaxLife - time.Minute, issuer.MaxLife, true},
		{issuer.MaxLife, issuer.MaxLife, true}, {issuer.MaxLife + 1, issuer.MaxLife, false},
		{issuer.MaxNodeLife, issuer.MaxNodeLife, true}, {issuer.MaxNodeLife + 1, issuer.MaxNodeLife, false},
	} {
		v, err := issuer.From(now, c.life, c.most)
		if (err == nil) != c.ok {
			t.Errorf("%v: %v", c.life, err)
		}
		if err != nil {
			continue
		}
		if v.NotBefore.After(now) || v.NotAfter.Sub(v.NotBefore) > c.most || !v.NotAfter.Equal(now.Truncate(time.Second).Add(c.life)) {
			t.Errorf("%v: %v", c.life, v)
		}
		// Renewing again and again neither shortens nor lengthens it.
		if life := v.Life(); life != c.life && life != c.most {
			t.Errorf("%v is renewed for %v", c.life, life)
		}
	}
}

func TestNoSoundCertificate(t *testing.T) {
	k, leaf := generate(t), generate(t).Public()
	v, _ := issuer.From(time.Now(), time.Hour, issuer.MaxLife)
	cert, err := k.User(leaf, holder(), 7, v)
	if err != nil {
		t.Fatal(err)
	}
	long := issuer.Validity{NotBefore: v.NotBefore, NotAfter: v.NotBefore.Add(issuer.MaxLife + time.Second)}
	_, err = k.User(leaf, holder(), 1, long)
	refused(t, "too long", err, fault.Usage, "168h")
	_, err = k.Again(cert, 1, long)
	refused(t, "too long again", err, fault.Usage, "168h")
	_, err = k.User(leaf, holder(), 1, issuer.Validity{NotBefore: v.NotAfter, NotAfter: v.NotBefore})
	refused(t, "backwards", err, fault.Usage, "never valid")
	_, err = k.User(cert, holder(), 1, v)
	refused(t, "of a certificate", err, fault.Usage, "cannot be certified again")
	_, err = k.User(k.Public(), holder(), 1, v)
	refused(t, "of itself", err, fault.Usage, "own key")
	if _, err = k.User(leaf, holder(), 0, v); err == nil {
		t.Error("serial 0")
	}
	refused(t, "another's", generate(t).CheckSSH(cert), fault.Usage, "signed by another key")
	changed := *cert
	changed.ValidPrincipals = []string{"commander"}
	refused(t, "changed", k.CheckSSH(&changed), fault.Usage, "not sound")
	changed.ValidPrincipals = nil
	refused(t, "for everybody", k.CheckSSH(&changed), fault.Usage, "names nobody")
	again, err := k.Again(cert, 8, v)
	if err != nil || again.Serial != 8 || cert.Serial != 7 || again.KeyId != cert.KeyId || fmt.Sprint(again.CriticalOptions) != fmt.Sprint(cert.CriticalOptions) {
		t.Errorf("again: %v, %v", again, err)
	}
}

func TestAuthorities(t *testing.T) {
	now := time.Now()
	open := func(usage issuer.Usage) (*issuer.Authority, *issuer.Key) {
		k := generate(t)
		cert, err := issuer.NewAuthority(k, "ca", usage, now)
		if err != nil {
			t.Fatal(err)
		}
		a, err := issuer.OpenAuthority(cert, k)
		if err != nil {
			t.Fatal(err)
		}
		return a, k
	}
	clients, key := open(issuer.ClientAuth)
	servers, _ := open(issuer.ServerAuth)
	v, _ := issuer.From(now, time.Hour, issuer.MaxLife)
	leaf := issuer.CryptoPublic(generate(t).Public())
	client, err := clients.Client(leaf, holder(), 5, v)
	if err != nil {
		t.Fatal(err)
	}
	server, err := servers.Server(leaf, "cp-1.prod", 5, v)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		cert  *x509.Certificate
		by    *issuer.Authority
		usage x509.ExtKeyUsage
		ok    bool
	}{
		{client, clients, x509.ExtKeyUsageClientAuth, true}, {client, clients, x509.ExtKeyUsageServerAuth, false}, {client, servers, x509.ExtKeyUsageClientAuth, false},
		{server, servers, x509.ExtKeyUsageServerAuth, true}, {server, servers, x509.ExtKeyUsageClientAuth, false}, {server, clients, x509.ExtKeyUsageServerAuth, false},
	} {
		pool := x509.NewCertPool()
		pool.AddCert(c.by.Certificate)
		if _, err := c.cert.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{c.usage}}); (err == nil) != c.ok {
			t.Errorf("%s for %v: %v", c.cert.Subject, c.usage, err)
		}
	}
	_, err = clients.Server(leaf, "cp-1.prod", 5, v)
	refused(t, "a server by the clients' authority", err, fault.Usage, "signs no servers")
	_, err = servers.Client(leaf, holder(), 5, v)
	refused(t, "a client by the servers' authority", err, fault.Usage, "signs no clients")
	_, err = servers.Again(client, 6, v)
	refused(t, "another's", err, fault.Usage, "not of the authority")
	two := holder()
	two.Roles = []trust.Role{trust.Observer, trust.Responder}
	_, err = clients.Client(leaf, two, 5, v)
	refused(t, "two roles", err, fault.Usage, "exactly one role")
	approver := holder()
	approver.Roles = []trust.Role{trust.Approver}
	_, err = clients.Client(leaf, approver, 5, v)
	refused(t, "an approving program", err, fault.Usage, "approves nothing")
	_, err = issuer.OpenAuthority(servers.Certificate, key)
	refused(t, "the wrong key", err, fault.Usage, "is not that of the authority")
	signer, err := key.Crypto()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(nil)
	if _, err := signer.Sign(rand.Reader, sum[:], crypto.SHA256); err == nil {
		t.Error("a hash was signed as if it were a message")
	}
}
