package sshclient

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/sshclient/testagent"
	"github.com/halligan-io/halligan/internal/trust"
)

var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func newKey(t *testing.T) (ed25519.PrivateKey, gossh.Signer) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := gossh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return private, signer
}

// certify signs a user certificate of alice for an hour on both sides of noon,
// changed as the function wants.
func certify(t *testing.T, ca gossh.Signer, key gossh.PublicKey, change func(*gossh.Certificate)) *gossh.Certificate {
	t.Helper()
	c := &gossh.Certificate{
		Key: key, CertType: gossh.UserCert, KeyId: "alice", Serial: 7, ValidPrincipals: []string{"observer", "responder"},
		ValidAfter: uint64(noon.Add(-time.Hour).Unix()), ValidBefore: uint64(noon.Add(time.Hour).Unix()),
		Permissions: gossh.Permissions{CriticalOptions: map[string]string{optionClusters: "prod,staging"}},
	}
	if change != nil {
		change(c)
	}
	if err := c.SignCert(rand.Reader, ca); err != nil {
		t.Fatal(err)
	}
	return c
}

func write(t *testing.T, file string, data []byte, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(file, data, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, mode); err != nil {
		t.Fatal(err)
	}
	return file
}

func writeKey(t *testing.T, file string, private ed25519.PrivateKey, passphrase string) string {
	t.Helper()
	var block *pem.Block
	var err error
	if passphrase == "" {
		block, err = gossh.MarshalPrivateKey(private, "")
	} else {
		block, err = gossh.MarshalPrivateKeyWithPassphrase(private, "", []byte(passphrase))
	}
	if err != nil {
		t.Fatal(err)
	}
	return write(t, file, pem.EncodeToMemory(block), 0o600)
}

func wantFault(t *testing.T, err error, code fault.Code, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if !fault.Is(err, code) {
		t.Errorf("%v has the code %s, want %s", err, fault.CodeOf(err), code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q lacks %q", err, w)
		}
	}
	if strings.ContainsAny(err.Error(), "\n") {
		t.Errorf("%q is not one line", err)
	}
}

func TestKeyFiles(t *testing.T) {
	dir := t.TempDir()
	_, ca := newKey(t)
	private, signer := newKey(t)
	cert := certify(t, ca, signer.PublicKey(), nil)
	line := gossh.MarshalAuthorizedKey(cert)
	file := writeKey(t, filepath.Join(dir, "id"), private, "")
	write(t, file+"-cert.pub", line, 0o644)

	for _, name := range []string{file, file + ".pub", file + "-cert.pub"} {
		r, err := Open(Sources{File: name})
		if err != nil {
			t.Fatal(err)
		}
		if k := r.Keys[0]; len(r.Keys) != 1 || k.Certificate.KeyId != "alice" || !same(k.Public, signer.PublicKey()) || k.SecurityKey() {
			t.Errorf("%s: %+v", name, k)
		}
	}

	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	write(t, link+"-cert.pub", line, 0o644)
	if _, err := Open(Sources{File: link}); err != nil {
		t.Errorf("a link to a private file: %v", err)
	}

	for _, mode := range []os.FileMode{0o640, 0o604, 0o666, 0o620, 0o644} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		_, err := Open(Sources{File: link})
		wantFault(t, err, fault.Unauthenticated, fmt.Sprintf("has mode %04o", mode), "chmod 600")
	}
	if err := os.Chmod(file, 0o400); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Sources{File: file}); err != nil {
		t.Errorf("mode 0400: %v", err)
	}

	_, other := newKey(t)
	write(t, file+"-cert.pub", gossh.MarshalAuthorizedKey(certify(t, ca, other.PublicKey(), nil)), 0o644)
	_, err := Open(Sources{File: file})
	wantFault(t, err, fault.Unauthenticated, "the certificate of another key")
	write(t, file+"-cert.pub", gossh.MarshalAuthorizedKey(signer.PublicKey()), 0o644)
	_, err = Open(Sources{File: file})
	wantFault(t, err, fault.Unauthenticated, "is no certificate")

	_, err = Open(Sources{File: filepath.Join(dir, "none")})
	wantFault(t, err, fault.Unauthenticated, "there is no key")
	_, err = Open(Sources{File: dir})
	wantFault(t, err, fault.Unauthenticated, "is not a file")
	_, err = Open(Sources{File: write(t, filepath.Join(dir, "junk"), []byte("junk"), 0o600)})
	wantFault(t, err, fault.Unauthenticated, "is no private key")
	_, err = Open(Sources{File: write(t, filepath.Join(dir, "large"), make([]byte, maxKeyFile+1), 0o600)})
	wantFault(t, err, fault.Unauthenticated, "too large")
	_, err = Open(Sources{})
	wantFault(t, err, fault.Unauthenticated, "SSH_AUTH_SOCK")
	_, err = Open(Sources{Agent: filepath.Join(dir, "no.sock")})
	wantFault(t, err, fault.Unauthenticated, "does not answer")
}

func TestPassphrase(t *testing.T) {
	_, ca := newKey(t)
	private, signer := newKey(t)
	file := writeKey(t, filepath.Join(t.TempDir(), "id"), private, "open sesame")
	cert := certify(t, ca, signer.PublicKey(), nil)
	write(t, file+"-cert.pub", gossh.MarshalAuthorizedKey(cert), 0o644)

	_, err := Open(Sources{File: file})
	wantFault(t, err, fault.Unauthenticated, "has a passphrase", "ssh-add")
	asked := 0
	ask := func(answers ...string) func(string) ([]byte, error) {
		asked = 0
		return func(string) ([]byte, error) {
			asked++
			return []byte(answers[min(asked, len(answers))-1]), nil
		}
	}
	if r, err := Open(Sources{File: file, Passphrase: ask("wrong", "open sesame")}); err != nil || asked != 2 || !same(r.Keys[0].Signer().PublicKey(), signer.PublicKey()) {
		t.Errorf("asked %d times: %v", asked, err)
	}
	_, err = Open(Sources{File: file, Passphrase: ask("wrong")})
	wantFault(t, err, fault.Unauthenticated, "not the passphrase")
	if asked != maxPassphrases {
		t.Errorf("asked %d times", asked)
	}
	_, err = Open(Sources{File: file, Passphrase: func(string) ([]byte, error) { return nil, errors.New("no terminal") }})
	wantFault(t, err, fault.Unauthenticated, "no terminal")

	// An agent that holds the key spares the question, also where only the
	// public files are at hand, and its certificate serves where none is beside.
	held := agent.NewKeyring()
	if err := held.Add(agent.AddedKey{PrivateKey: private, Certificate: cert}); err != nil {
		t.Fatal(err)
	}
	if err := held.Add(agent.AddedKey{PrivateKey: private}); err != nil {
		t.Fatal(err)
	}
	socket := testagent.Serve(t, held)
	for _, remove := range []string{"", file, file + "-cert.pub"} {
		if remove == file+"-cert.pub" {
			write(t, file+".pub", gossh.MarshalAuthorizedKey(signer.PublicKey()), 0o644)
		}
		_ = os.Remove(remove)
		r, err := Open(Sources{File: file, Agent: socket, Passphrase: ask("wrong")})
		if err != nil || asked != 0 {
			t.Fatalf("without %q: asked %d times: %v", remove, asked, err)
		}
		if r.Keys[0].Certificate == nil || r.Keys[0].Certificate.Serial != 7 {
			t.Errorf("without %q: no certificate", remove)
		}
		r.Close()
	}
}

func TestAgent(t *testing.T) {
	_, ca := newKey(t)
	held := agent.NewKeyring()
	socket := testagent.Serve(t, held)
	private, signer := newKey(t)
	if err := held.Add(agent.AddedKey{PrivateKey: private}); err != nil {
		t.Fatal(err)
	}
	_, err := Open(Sources{Agent: socket})
	wantFault(t, err, fault.Unauthenticated, "holds no certificate")
	if err := held.Add(agent.AddedKey{PrivateKey: private, Certificate: certify(t, ca, signer.PublicKey(), nil), Comment: "laptop"}); err != nil {
		t.Fatal(err)
	}
	r, err := Open(Sources{Agent: socket})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if len(r.Keys) != 1 || r.Keys[0].From != "ssh-agent, laptop" || !same(r.Keys[0].Public, signer.PublicKey()) {
		t.Errorf("%+v", r.Keys)
	}
	sig, err := r.Keys[0].Signer().Sign(rand.Reader, []byte("data"))
	if err != nil || signer.PublicKey().Verify([]byte("data"), sig) != nil {
		t.Errorf("signing: %v", err)
	}
}

func TestSecurityKeyFile(t *testing.T) {
	private, _ := newKey(t)
	k := &testagent.Token{Private: private}
	// What ssh-keygen -t ed25519-sk leaves: a stub with the public half.
	stub := append([]byte("openssh-key-v1\x00"), gossh.Marshal(struct {
		Cipher, KDF, Options string
		Keys                 uint32
		Public, Private      []byte
	}{"none", "none", "", 1, k.Public().Marshal(), gossh.Marshal(struct {
		A, B uint32
		Type string
		Rest []byte `ssh:"rest"`
	}{1, 1, gossh.KeyAlgoSKED25519, make([]byte, 64)})})...)
	file := write(t, filepath.Join(t.TempDir(), "id_sk"), pem.EncodeToMemory(&pem.Block{Type: "OPENSSH PRIVATE KEY", Bytes: stub}), 0o600)
	_, err := Open(Sources{File: file})
	wantFault(t, err, fault.Unauthenticated, "is a FIDO2 key", "ssh-add")
	r, err := Open(Sources{File: file, Agent: testagent.Serve(t, k)})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if !r.Keys[0].SecurityKey() || r.Keys[0].Certificate != nil {
		t.Errorf("%+v", r.Keys[0])
	}
}

func TestChoose(t *testing.T) {
	_, ca := newKey(t)
	_, stranger := newKey(t)
	_, signer := newKey(t)
	private, _ := newKey(t)
	sk := &testagent.Token{Private: private}
	sealed := Sealed{Person: "bob", Role: trust.Responder, Clusters: []string{"prod"}, NotBefore: noon.Add(-time.Hour), NotAfter: noon.Add(time.Hour)}
	want := Want{
		Now: noon, Grace: 30 * time.Minute, Cluster: "prod",
		Authority: func(k gossh.PublicKey) bool { return same(k, ca.PublicKey()) },
		Sealed:    func(k gossh.PublicKey) (Sealed, bool) { return sealed, same(k, sk.Public()) },
	}
	key := func(change func(*gossh.Certificate)) Key {
		return Key{Public: signer.PublicKey(), Certificate: certify(t, ca, signer.PublicKey(), change), From: "id"}
	}
	principals := func(p ...string) func(*gossh.Certificate) {
		return func(c *gossh.Certificate) { c.ValidPrincipals = p }
	}
	good := key(nil)
	foreign := Key{Public: signer.PublicKey(), Certificate: certify(t, stranger, signer.PublicKey(), nil), From: "id"}
	for name, c := range map[string]struct {
		keys  []Key
		alter func(*Want)
		role  trust.Role
		late  bool
		fails string
	}{
		"default":             {keys: []Key{good}, role: trust.Responder},
		"asked":               {keys: []Key{good}, alter: func(w *Want) { w.Role = trust.Observer }, role: trust.Observer},
		"not there":           {keys: []Key{good}, alter: func(w *Want) { w.Role = trust.Commander }, fails: "not for commander; take one of these with --as"},
		"only one":            {keys: []Key{key(principals("commander"))}, role: trust.Commander},
		"two":                 {keys: []Key{key(principals("commander", "approver"))}, fails: "choose one with --as"},
		"none":                {keys: []Key{key(principals())}, fails: "names no role"},
		"unknown names":       {keys: []Key{key(principals("root", "observer"))}, role: trust.Observer},
		"other cluster":       {keys: []Key{good}, alter: func(w *Want) { w.Cluster = "dev" }, fails: "for prod, staging, not for cluster dev"},
		"any cluster":         {keys: []Key{good}, alter: func(w *Want) { w.Cluster = "" }, role: trust.Responder},
		"no scope":            {keys: []Key{key(func(c *gossh.Certificate) { c.CriticalOptions = nil })}, fails: "is for none"},
		"other authority":     {keys: []Key{foreign}, fails: "no user authority of the bundle"},
		"host":                {keys: []Key{key(func(c *gossh.Certificate) { c.CertType = gossh.HostCert })}, fails: "no user certificate"},
		"last second":         {keys: []Key{good}, alter: func(w *Want) { w.Now = noon.Add(time.Hour - time.Second) }, role: trust.Responder},
		"ended":               {keys: []Key{good}, alter: func(w *Want) { w.Now = noon.Add(time.Hour) }, role: trust.Responder, late: true},
		"ended, program":      {keys: []Key{key(func(c *gossh.Certificate) { c.Extensions = map[string]string{automation: ""} })}, alter: func(w *Want) { w.Now = noon.Add(time.Hour) }, fails: "ended at"},
		"end of grace":        {keys: []Key{good}, alter: func(w *Want) { w.Now = noon.Add(90*time.Minute - time.Second) }, role: trust.Responder, late: true},
		"beyond":              {keys: []Key{good}, alter: func(w *Want) { w.Now = noon.Add(90 * time.Minute) }, fails: "ended at 2026-11-23T13:00:00Z, 30 minutes ago by this machine's clock; renew it: halligan ca renew id-cert.pub"},
		"early":               {keys: []Key{good}, alter: func(w *Want) { w.Now = noon.Add(-90 * time.Minute) }, role: trust.Responder, late: true},
		"too early":           {keys: []Key{good}, alter: func(w *Want) { w.Now = noon.Add(-91 * time.Minute) }, fails: "begins only at 2026-11-23T11:00:00Z; set this machine's clock"},
		"endless":             {keys: []Key{key(func(c *gossh.Certificate) { c.ValidBefore = gossh.CertTimeInfinity })}, role: trust.Responder},
		"plain":               {keys: []Key{{Public: signer.PublicKey(), From: "id"}}, fails: "has no certificate"},
		"sealed":              {keys: []Key{{Public: sk.Public(), From: "ssh-agent"}}, role: trust.Responder},
		"sealed, lower":       {keys: []Key{{Public: sk.Public()}}, alter: func(w *Want) { w.Role = trust.Observer }, role: trust.Observer},
		"sealed, higher":      {keys: []Key{{Public: sk.Public()}}, alter: func(w *Want) { w.Role = trust.Commander }, fails: "not for commander"},
		"sealed, over":        {keys: []Key{{Public: sk.Public()}}, alter: func(w *Want) { w.Now = noon.Add(time.Hour) }, fails: "have the policy list it anew"},
		"sealed, elsewhere":   {keys: []Key{{Public: sk.Public()}}, alter: func(w *Want) { w.Cluster = "staging" }, fails: "not for cluster staging"},
		"second fits":         {keys: []Key{foreign, good}, role: trust.Responder},
		"says the nearer one": {keys: []Key{{Public: signer.PublicKey(), From: "id"}, foreign}, fails: "no user authority of the bundle"},
		"says how many":       {keys: []Key{foreign, foreign, foreign}, fails: "none of 2 other keys does either"},
		"nothing":             {fails: "nothing to log in with"},
	} {
		w := want
		if c.alter != nil {
			c.alter(&w)
		}
		login, err := (&Keyring{Keys: c.keys}).Choose(w)
		switch {
		case c.fails != "":
			if err == nil || !strings.Contains(err.Error(), c.fails) || fault.Of(err).Code.Exit() < 2 {
				t.Errorf("%s: %v, want %q", name, err, c.fails)
			}
		case err != nil || login.Role != c.role || login.Late != c.late:
			t.Errorf("%s: %s, late %v, %v", name, login.Role, login.Late, err)
		}
	}
}

// server is an SSH door of cp-1.prod made of nothing but x/crypto.
type server struct {
	target Target
	ca     gossh.Signer // of users
	logins chan string  // user and fingerprint of each login
	config *gossh.ServerConfig
	handle func(gossh.Channel, <-chan *gossh.Request)
	relay  func(gossh.NewChannel)
	asked  chan string // what is to be relayed to
	stall  bool        // never says a word
	plain  bool        // has no host certificate
}

func startServer(t *testing.T, change func(*server, gossh.Signer, *gossh.Certificate)) *server {
	t.Helper()
	_, hostCA := newKey(t)
	_, hostKey := newKey(t)
	cert := &gossh.Certificate{Key: hostKey.PublicKey(), CertType: gossh.HostCert, KeyId: "cp-1.prod", Serial: 1, ValidPrincipals: []string{"cp-1.prod"}, ValidBefore: gossh.CertTimeInfinity}
	s := &server{logins: make(chan string, 8), asked: make(chan string, 8)}
	_, s.ca = newKey(t)
	checker := &gossh.CertChecker{IsHostAuthority: func(k gossh.PublicKey, _ string) bool { return same(k, hostCA.PublicKey()) }}
	s.target = Target{Name: "cp-1.prod", HostKey: checker.CheckHostKey}
	s.config = &gossh.ServerConfig{PublicKeyCallback: func(c gossh.ConnMetadata, key gossh.PublicKey) (*gossh.Permissions, error) {
		if cert, ok := key.(*gossh.Certificate); ok && !same(cert.SignatureKey, s.ca.PublicKey()) {
			return nil, &gossh.BannerError{Err: errors.New("no"), Message: "halligan: the certificate is revoked\x1b[2J\r\nmore\r\n"}
		}
		return &gossh.Permissions{Extensions: map[string]string{"login": c.User() + " " + gossh.FingerprintSHA256(key)}}, nil
	}}
	if change != nil {
		change(s, hostKey, cert)
	}
	if cert != nil && len(cert.Nonce) == 0 {
		if err := cert.SignCert(rand.Reader, hostCA); err != nil {
			t.Fatal(err)
		}
	}
	signer, err := gossh.NewCertSigner(cert, hostKey)
	if err != nil {
		t.Fatal(err)
	}
	if !s.plain {
		s.config.AddHostKey(signer)
	}
	s.config.AddHostKey(hostKey) // a plain one too, as sshd would have
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.target.Address = l.Addr().String()
	var serving sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	serving.Go(func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer raw.Close()
				defer context.AfterFunc(ctx, func() { raw.Close() })()
				s.serve(raw)
			})
		}
	})
	t.Cleanup(func() { cancel(); l.Close(); serving.Wait() })
	return s
}

func (s *server) serve(raw net.Conn) {
	if s.stall {
		_, _ = io.Copy(io.Discard, raw)
		return
	}
	conn, channels, requests, err := gossh.NewServerConn(raw, s.config)
	if err != nil {
		return
	}
	s.logins <- conn.Permissions.Extensions["login"]
	go gossh.DiscardRequests(requests)
	var handling sync.WaitGroup
	defer handling.Wait()
	for c := range channels {
		if s.relay != nil && c.ChannelType() == "direct-tcpip" {
			var m struct {
				Host       string
				Port       uint32
				OriginHost string
				OriginPort uint32
			}
			if gossh.Unmarshal(c.ExtraData(), &m) == nil {
				s.asked <- fmt.Sprintf("%s:%d", m.Host, m.Port)
			}
			handling.Go(func() { s.relay(c) })
			continue
		}
		if s.handle == nil {
			_ = c.Reject(gossh.ResourceShortage, "full\x1b[2J")
			continue
		}
		channel, requests, err := c.Accept()
		if err != nil {
			return
		}
		handling.Go(func() { s.handle(channel, requests) })
	}
}

func (s *server) login(t *testing.T) (Login, gossh.Signer) {
	t.Helper()
	_, signer := newKey(t)
	cert := certify(t, s.ca, signer.PublicKey(), nil)
	return Login{Key: Key{Public: signer.PublicKey(), Certificate: cert, From: "id", signer: signer}, Role: trust.Responder, Person: "alice"}, signer
}

func TestDial(t *testing.T) {
	s := startServer(t, nil)
	login, _ := s.login(t)
	c, err := Dial(t.Context(), s.target, login)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := <-s.logins, "responder "+gossh.FingerprintSHA256(login.Certificate); got != want {
		t.Errorf("login %q, want %q", got, want)
	}
	_, err = c.API(t.Context())
	wantFault(t, err, fault.Unreachable, `refuses a session: full\x1b[2J`)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	<-c.Done()
	_, err = c.API(t.Context())
	wantFault(t, err, fault.Unreachable, "broke")
	if c.Close() != nil {
		t.Error("closing again fails")
	}
}

func TestDialSecurityKey(t *testing.T) {
	s := startServer(t, nil)
	private, _ := newKey(t)
	k := &testagent.Token{Private: private, Touch: make(chan struct{})}
	k.Certificate = certify(t, s.ca, k.Public(), nil)
	socket := testagent.Serve(t, k)
	r, err := Open(Sources{Agent: socket})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if len(r.Keys) != 2 {
		t.Fatalf("%d keys", len(r.Keys))
	}
	login, err := r.Choose(Want{Now: noon})
	if err != nil {
		t.Fatal(err)
	}
	// Nobody touches it: the dial leaves the signer behind.
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = Dial(ctx, s.target, login)
	wantFault(t, err, fault.Unauthenticated, "nobody touched")
	close(k.Touch)
	c, err := Dial(t.Context(), s.target, login)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	// The key alone, as a sealed credential has it.
	c, err = Dial(t.Context(), s.target, Login{Key: r.Keys[0], Role: trust.Commander})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestDialRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		server func(*server, gossh.Signer, *gossh.Certificate)
		target func(*Target)
		login  func(*testing.T, *Login)
		code   fault.Code
		words  string
	}{
		"host certificate of another node": {server: func(_ *server, _ gossh.Signer, c *gossh.Certificate) { c.ValidPrincipals = []string{"cp-1.staging"} },
			code: fault.Unauthenticated, words: "cp-1.prod is not who answers at 127.0.0.1:"},
		"host certificate of another authority": {server: func(_ *server, _ gossh.Signer, c *gossh.Certificate) {
			_, stranger := newKey(t)
			if err := c.SignCert(rand.Reader, stranger); err != nil {
				panic(err)
			}
		}, code: fault.Unauthenticated, words: "is not who answers"},
		"expired host certificate": {server: func(_ *server, _ gossh.Signer, c *gossh.Certificate) { c.ValidBefore = 1000 },
			code: fault.Unauthenticated, words: "is not who answers"},
		"user certificate as host": {server: func(_ *server, _ gossh.Signer, c *gossh.Certificate) { c.CertType = gossh.UserCert },
			code: fault.Unauthenticated, words: "is not who answers"},
		"nobody to trust": {target: func(t *Target) { t.HostKey = nil }, code: fault.Unauthenticated, words: "nothing says whom to trust"},
		"name":            {target: func(t *Target) { t.Address = "localhost:22" }, code: fault.Usage, words: "no IP:PORT"},
		"no port":         {target: func(t *Target) { t.Address = "127.0.0.1" }, code: fault.Usage, words: "no IP:PORT"},
		"nobody there":    {target: func(t *Target) { t.Address = "127.0.0.1:1" }, code: fault.Unreachable, words: "nothing listens at 127.0.0.1:1"},
		"not admitted": {login: func(t *testing.T, l *Login) {
			_, stranger := newKey(t)
			l.Certificate = certify(t, stranger, l.Public, nil)
		}, code: fault.Unauthenticated, words: `cp-1.prod does not let alice in as responder: the certificate is revoked\x1b[2J`},
		"certificate of another key": {login: func(t *testing.T, l *Login) { _, l.signer = newKey(t) }, code: fault.Unauthenticated, words: "put the certificate"},
		"weak ciphers only": {server: func(s *server, _ gossh.Signer, _ *gossh.Certificate) {
			s.config.Ciphers = []string{gossh.CipherAES128CTR}
		}, code: fault.Unreachable, words: "no algorithm that is safe"},
		"weak key exchanges only": {server: func(s *server, _ gossh.Signer, _ *gossh.Certificate) {
			s.config.KeyExchanges = []string{gossh.KeyExchangeDH14SHA256}
		}, code: fault.Unreachable, words: "no algorithm that is safe"},
	} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, c.server)
			login, _ := s.login(t)
			if c.target != nil {
				c.target(&s.target)
			}
			if c.login != nil {
				c.login(t, &login)
			}
			_, err := Dial(t.Context(), s.target, login)
			wantFault(t, err, c.code, c.words)
			select {
			case who := <-s.logins:
				t.Errorf("%s was logged in", who)
			default:
			}
		})
	}
}

// A server with nothing but a plain host key is refused, also where it is the
// key of the certificate.
func TestPlainHostKey(t *testing.T) {
	s := startServer(t, func(s *server, _ gossh.Signer, _ *gossh.Certificate) { s.plain = true })
	login, _ := s.login(t)
	_, err := Dial(t.Context(), s.target, login)
	wantFault(t, err, fault.Unauthenticated, "shows no host certificate")
}

func TestSilentServer(t *testing.T) {
	s := startServer(t, func(s *server, _ gossh.Signer, _ *gossh.Certificate) { s.stall = true })
	login, _ := s.login(t)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := Dial(ctx, s.target, login)
	wantFault(t, err, fault.Unreachable, "did not finish the login in time")
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if _, err := Dial(ctx, s.target, login); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestAgentConn(t *testing.T) {
	s := startServer(t, func(s *server, _ gossh.Signer, _ *gossh.Certificate) {
		s.handle = func(c gossh.Channel, requests <-chan *gossh.Request) {
			defer c.Close()
			r := <-requests
			go gossh.DiscardRequests(requests)
			known := r.Type == "subsystem" && bytes.Equal(r.Payload, gossh.Marshal(struct{ N string }{Subsystem}))
			if _ = r.Reply(known, nil); known {
				_, _ = c.Stderr().Write(make([]byte, 4<<20)) // must not fill the window
				_, _ = io.Copy(c, c)
			}
		}
	})
	login, _ := s.login(t)
	c, err := Dial(t.Context(), s.target, login)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	conn, err := c.API(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if conn.RemoteAddr().String() != s.target.Address {
		t.Errorf("remote %s", conn.RemoteAddr())
	}
	sent := bytes.Repeat([]byte("halligan"), 1<<17)
	go func() { _, _ = conn.Write(sent) }()
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("echo: %v", err)
	}
	if conn.Close() != nil {
		t.Error("closing fails")
	}
	if _, err := conn.Read(got); err == nil {
		t.Error("a closed connection reads")
	}
}

func TestShell(t *testing.T) {
	var seen []string
	s := startServer(t, func(s *server, _ gossh.Signer, _ *gossh.Certificate) {
		s.handle = func(c gossh.Channel, requests <-chan *gossh.Request) {
			for r := range requests {
				seen = append(seen, r.Type)
				_ = r.Reply(r.Type == "shell", nil)
				if r.Type == "shell" {
					break
				}
			}
			go gossh.DiscardRequests(requests)
			typed, _ := io.ReadAll(c)
			fmt.Fprintf(c, "got %s", typed)
			fmt.Fprint(c.Stderr(), "noise")
			if string(typed) != "vanish" {
				_, _ = c.SendRequest("exit-status", false, gossh.Marshal(struct{ N uint32 }{4}))
			}
			c.Close()
		}
	})
	login, _ := s.login(t)
	c, err := Dial(t.Context(), s.target, login)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var out, errs bytes.Buffer
	status, err := c.Shell(t.Context(), Terminal{In: strings.NewReader("status\n"), Out: &out, Err: &errs})
	if err != nil || status != 4 || out.String() != "got status\n" || errs.String() != "noise" {
		t.Errorf("%d, %v: %q %q", status, err, out.String(), errs.String())
	}
	if strings.Join(seen, " ") != "shell" {
		t.Errorf("requests: %v", seen)
	}
	_, err = c.Shell(t.Context(), Terminal{In: strings.NewReader("vanish"), Out: &out, Err: &errs})
	wantFault(t, err, fault.Unreachable, "ended without a word")
	// The end of the context ends a shell that goes on.
	ctx, cancel := context.WithCancel(t.Context())
	r, _ := io.Pipe()
	time.AfterFunc(100*time.Millisecond, cancel)
	if _, err := c.Shell(ctx, Terminal{In: r, Out: io.Discard, Err: io.Discard}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// OpenSSH's own agent and files.
func TestOpenSSH(t *testing.T) {
	for _, tool := range []string{"ssh-keygen", "ssh-agent", "ssh-add"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(err)
		}
	}
	dir := t.TempDir()
	run := func(name string, args ...string) {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "SSH_AUTH_SOCK="+filepath.Join(dir, "agent"), "SSH_ASKPASS_REQUIRE=never")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	daemon := exec.Command("ssh-agent", "-D", "-a", filepath.Join(dir, "agent"))
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = daemon.Process.Kill(); _ = daemon.Wait() })
	for i := 0; ; i++ {
		if _, err := os.Stat(filepath.Join(dir, "agent")); err == nil {
			break
		} else if i == 200 {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "ca")
	ca, err := readPublic(filepath.Join(dir, "ca.pub"))
	if err != nil {
		t.Fatal(err)
	}
	s := startServer(t, func(s *server, _ gossh.Signer, _ *gossh.Certificate) {
		s.config.PublicKeyCallback = func(c gossh.ConnMetadata, key gossh.PublicKey) (*gossh.Permissions, error) {
			if cert, ok := key.(*gossh.Certificate); !ok || !same(cert.SignatureKey, ca) {
				return nil, errors.New("no")
			}
			return &gossh.Permissions{Extensions: map[string]string{"login": c.User()}}, nil
		}
	})
	for _, kind := range [][]string{{"ed25519"}, {"ecdsa", "-b", "384"}, {"rsa", "-b", "3072", "-m", "PEM"}} {
		name := kind[0]
		run("ssh-keygen", append([]string{"-q", "-N", "", "-f", name, "-t"}, kind...)...)
		run("ssh-keygen", "-q", "-s", "ca", "-I", "alice", "-n", "responder", "-z", "7", "-V", "-5m:+1h", "-O", "critical:"+optionClusters+"=prod", name+".pub")
		run("ssh-add", "-q", "-D")
		run("ssh-add", "-q", name) // with its certificate
		for _, from := range []Sources{{File: filepath.Join(dir, name)}, {Agent: filepath.Join(dir, "agent")}} {
			r, err := Open(from)
			if err != nil {
				t.Fatalf("%s %+v: %v", name, from, err)
			}
			login, err := r.Choose(Want{Now: time.Now(), Cluster: "prod", Authority: func(k gossh.PublicKey) bool { return same(k, ca) }})
			if err != nil {
				t.Fatalf("%s %+v: %v", name, from, err)
			}
			c, err := Dial(t.Context(), s.target, login)
			if err != nil {
				t.Fatalf("%s %+v: %v", name, from, err)
			}
			if who := <-s.logins; who != "responder" {
				t.Errorf("logged in as %s", who)
			}
			c.Close()
			r.Close()
		}
	}
}

// A serial console has no size: the agent takes its own, not one column.
func TestSize(t *testing.T) {
	for n, want := range map[int]uint32{-1: 0, 0: 0, 1: 1, 80: 80, 1 << 20: 1 << 12} {
		if got := size(n); got != want {
			t.Errorf("size(%d) is %d, not %d", n, got, want)
		}
	}
}
