package approval_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hiddeco/sshsig"
	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/approval"
)

var now = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// authority vouches for what it is told, as trust/credential does after its own
// checks, which have their tests there.
type authority struct {
	refuse map[string]error // by key ID
	scope  trust.Scope
	pin    bool
}

func (a authority) Approver(cert *gossh.Certificate) (trust.Identity, bool, error) {
	if err := a.refuse[cert.KeyId]; err != nil {
		return trust.Identity{}, false, err
	}
	return trust.Identity{Person: cert.KeyId, Role: trust.Approver, Kind: trust.Person, Scope: a.scope,
		Fingerprint: gossh.FingerprintSHA256(cert.Key), Serial: fmt.Sprint(cert.Serial)}, a.pin, nil
}

type person struct {
	gossh.Signer
	cert *gossh.Certificate
}

var ca = newSigner()

func newSigner() gossh.Signer {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	s, err := gossh.NewSignerFromSigner(key)
	if err != nil {
		panic(err)
	}
	return s
}

// certify gives the signer's key a certificate under that name.
func certify(t *testing.T, s gossh.Signer, name string) person {
	t.Helper()
	cert := &gossh.Certificate{Key: s.PublicKey(), CertType: gossh.UserCert, KeyId: name, Serial: 7, ValidPrincipals: []string{"approver"},
		ValidAfter: uint64(now.Unix()), ValidBefore: uint64(now.Add(time.Hour).Unix())}
	if err := cert.SignCert(rand.Reader, ca); err != nil {
		t.Fatal(err)
	}
	return person{s, cert}
}

var plan = approval.Plan{
	Fleet: "acme", Cluster: "cdf818194e3a8c32", ClusterName: "prod", Node: "cp-1.prod", ID: "a-1", SHA256: approval.Digest([]byte("the plan")), Nonce: "n-1",
	Requester: "alice", RequesterKey: "SHA256:alice", PolicyVersion: 4, Action: "scale", Namespaces: []string{"telemetry"},
}

func statement() approval.Statement {
	return approval.Statement{Fleet: plan.Fleet, Cluster: plan.Cluster, ClusterName: plan.ClusterName, Node: plan.Node, Plan: plan.ID, PlanSHA256: plan.SHA256,
		Nonce: plan.Nonce, Requester: plan.Requester, PolicyVersion: plan.PolicyVersion, Expires: now.Add(time.Hour)}
}

func (p person) sign(t *testing.T, s approval.Statement) *approval.Token {
	t.Helper()
	token, err := approval.Sign(s, p.Signer, p.cert)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestVerify(t *testing.T) {
	bob, carol := certify(t, newSigner(), "bob"), certify(t, newSigner(), "carol")
	tokens := []string{bob.sign(t, statement()).String(), carol.sign(t, statement()).String() + "\n"}
	got, err := approval.Verify(tokens, plan, authority{}, now)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0].Approver != "bob" || got[1].Approver != "carol" || got[0].Nonce != plan.Nonce ||
		got[0].Fingerprint != gossh.FingerprintSHA256(bob.cert.Key) || got[0].Serial != "7" || !got[0].Expires.Equal(now.Add(time.Hour)) {
		t.Errorf("approvals: %+v", got)
	}
	for _, token := range tokens {
		if strings.ContainsAny(strings.TrimSpace(token), " \r\n") {
			t.Errorf("not one line: %q", token)
		}
	}
	if got, err := approval.Verify(nil, plan, authority{}, now); err != nil || len(got) != 0 {
		t.Errorf("no token: %v, %v", got, err)
	}
}

// Every way to make one person, or somebody else, count for the plan.
func TestVerifyRefuses(t *testing.T) {
	bob, requester := certify(t, newSigner(), "bob"), newSigner()
	change := func(f func(*approval.Statement)) approval.Statement {
		s := statement()
		f(&s)
		return s
	}
	own := plan
	own.RequesterKey = gossh.FingerprintSHA256(requester.PublicKey())
	for _, c := range []struct {
		name  string
		by    person
		what  approval.Statement
		plan  approval.Plan
		at    time.Duration
		with  authority
		wants string
	}{
		{name: "another agent", what: change(func(s *approval.Statement) { s.Node = "cp-2.prod" }), wants: "another agent"},
		{name: "another cluster's name", what: change(func(s *approval.Statement) { s.ClusterName = "staging" }), wants: "another cluster"},
		{name: "another etcd", what: change(func(s *approval.Statement) { s.Cluster = "1" }), wants: "another etcd cluster"},
		{name: "another fleet", what: change(func(s *approval.Statement) { s.Fleet = "ecma" }), wants: "another fleet"},
		{name: "another plan", what: change(func(s *approval.Statement) { s.Plan = "a-2" }), wants: "another plan"},
		{name: "the plan with other content", what: change(func(s *approval.Statement) { s.PlanSHA256 = approval.Digest(nil) }), wants: "another plan's content"},
		{name: "another nonce", what: change(func(s *approval.Statement) { s.Nonce = "n-0" }), wants: "another plan's nonce"},
		{name: "another requester", what: change(func(s *approval.Statement) { s.Requester = "mallory" }), wants: "another requester"},
		{name: "an older policy", what: change(func(s *approval.Statement) { s.PolicyVersion = 3 }), wants: "policy 3"},
		{name: "a newer policy", what: change(func(s *approval.Statement) { s.PolicyVersion = 5 }), wants: "policy 5"},
		{name: "expired", what: statement(), at: time.Hour, wants: "expired"},
		{name: "expires too late", what: change(func(s *approval.Statement) { s.Expires = now.Add(time.Hour + time.Second) }), wants: "is the most"},
		{name: "the requester", by: certify(t, newSigner(), "alice"), what: statement(), wants: "their own plan"},
		{name: "the requester with the same key under a second name", by: certify(t, requester, "alice2"), what: statement(), plan: own, wants: "key of the requester"},
		{name: "a lapsed certificate", what: statement(), with: authority{refuse: map[string]error{"bob": errors.New("not valid now")}}, wants: "not valid now"},
		{name: "narrowed to another action", what: statement(), with: authority{scope: trust.Scope{Actions: []string{"delete"}}}, wants: "for actions"},
		{name: "narrowed to another namespace", what: statement(), with: authority{scope: trust.Scope{Namespaces: []string{"web-*"}}}, wants: "for namespaces"},
		{name: "a PIN was due", what: statement(), with: authority{pin: true}, wants: "PIN"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.by.cert == nil {
				c.by = bob
			}
			if c.plan.ID == "" {
				c.plan = plan
			}
			got, err := approval.Verify([]string{c.by.sign(t, c.what).String()}, c.plan, c.with, now.Add(c.at))
			if !fault.Is(err, fault.Refused) || !strings.Contains(err.Error(), c.wants) {
				t.Errorf("got %v, %v; want refused with %q", got, err, c.wants)
			}
		})
	}
	whole := plan
	for _, whole.Namespaces = range [][]string{nil, {""}, {"telemetry", ""}} {
		if _, err := approval.Verify([]string{bob.sign(t, statement()).String()}, whole, authority{scope: trust.Scope{Namespaces: []string{"*"}}}, now); err == nil {
			t.Errorf("a narrowed approver approves for the whole cluster: %q", whole.Namespaces)
		}
	}
	// Facts that the agent lacks match nothing.
	if _, err := approval.Verify([]string{bob.sign(t, statement()).String()}, approval.Plan{}, authority{}, now); err == nil {
		t.Error("an empty plan is approved")
	}
}

func TestVerifyCountsOnce(t *testing.T) {
	one, two := newSigner(), newSigner()
	bob, bobs, carol := certify(t, one, "bob"), certify(t, two, "bob"), certify(t, one, "carol")
	for name, by := range map[string][]person{
		"the same token twice":        {bob, bob},
		"one person with two keys":    {bob, bobs},
		"two persons with one key":    {bob, carol},
		"two persons, all in a chain": {bob, bobs, carol},
	} {
		var tokens []string
		for _, p := range by {
			tokens = append(tokens, p.sign(t, statement()).String())
		}
		if got, err := approval.Verify(tokens, plan, authority{}, now); err != nil || len(got) != 1 {
			t.Errorf("%s: %d counted (%v)", name, len(got), err)
		}
	}
	good := bob.sign(t, statement()).String()
	other := statement()
	other.Plan = "a-2"
	if got, err := approval.Verify([]string{good, carol.sign(t, other).String()}, plan, authority{}, now); err == nil {
		t.Errorf("one of two does not hold, and %v count", got)
	}
	many := make([]string, approval.MaxTokens+1)
	if _, err := approval.Verify(many, plan, authority{}, now); !fault.Is(err, fault.Usage) {
		t.Errorf("too many: %v", err)
	}
}

// forge puts a token together that Sign would not make.
func forge(t *testing.T, statement, signature, certificate string) string {
	t.Helper()
	data, err := json.Marshal(struct {
		Statement   string `json:"statement"`
		Signature   string `json:"signature"`
		Certificate string `json:"certificate"`
	}{statement, signature, certificate})
	if err != nil {
		t.Fatal(err)
	}
	return approval.Prefix + base64.RawURLEncoding.EncodeToString(data)
}

func armored(t *testing.T, s gossh.Signer, data []byte, hash sshsig.HashAlgorithm, namespace string) string {
	t.Helper()
	sig, err := sshsig.Sign(bytes.NewReader(data), s, hash, namespace)
	if err != nil {
		t.Fatal(err)
	}
	return string(sshsig.Armor(sig))
}

func TestForgedTokens(t *testing.T) {
	bob, mallory := certify(t, newSigner(), "bob"), newSigner()
	token := bob.sign(t, statement())
	data, err := token.Statement.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	text, cert := string(data), strings.TrimSpace(string(gossh.MarshalAuthorizedKey(bob.cert)))
	plainKey := strings.TrimSpace(string(gossh.MarshalAuthorizedKey(bob.cert.Key)))
	sign := func(s string) string { return armored(t, bob, []byte(s), sshsig.HashSHA512, approval.Namespace) }
	for _, c := range []struct {
		name, token string
		code        fault.Code
		wants       string
	}{
		{"sound", forge(t, text, sign(text), cert), "", ""},
		{"the signature of another key", forge(t, text, armored(t, mallory, data, sshsig.HashSHA512, approval.Namespace), cert), fault.Refused, "does not verify"},
		{"a signature of something else", forge(t, text, sign(text+" "), cert), fault.Refused, "does not verify"},
		{"a signature for files", forge(t, text, armored(t, bob, data, sshsig.HashSHA512, "file"), cert), fault.Refused, "made for"},
		{"a signature for a policy", forge(t, text, armored(t, bob, data, sshsig.HashSHA512, "policy@halligan.io"), cert), fault.Refused, "made for"},
		{"another hash", forge(t, text, armored(t, bob, data, sshsig.HashSHA256, approval.Namespace), cert), fault.Refused, "hash"},
		{"another's name", forge(t, strings.Replace(text, `"bob"`, `"carol"`, 1), sign(strings.Replace(text, `"bob"`, `"carol"`, 1)), cert), fault.Refused, "under the certificate of bob"},
		{"a space", forge(t, text+" ", sign(text+" "), cert), fault.Usage, "canonical"},
		{"a doubled key", forge(t, `{"format":1,`+text[1:], sign(text), cert), fault.Usage, "canonical"},
		{"an unknown key", forge(t, `{"fiat":1,`+text[1:], sign(text), cert), fault.Usage, "not understood"},
		{"a key in other letters", forge(t, strings.Replace(text, `"plan"`, `"Plan"`, 1), sign(text), cert), fault.Usage, "canonical"},
		{"another format", forge(t, strings.Replace(text, `"format":1`, `"format":2`, 1), sign(text), cert), fault.Usage, "format 2"},
		{"a zone", forge(t, strings.Replace(text, "Z\"", "+00:00\"", 1), sign(text), cert), fault.Usage, "expires"},
		{"a fraction of a second", forge(t, strings.Replace(text, "Z\"", ".5Z\"", 1), sign(text), cert), fault.Usage, "expires"},
		{"an escape sequence", forge(t, strings.Replace(text, `"a-1"`, `"a\u001b-1"`, 1), sign(text), cert), fault.Usage, "printable"},
		{"no certificate", forge(t, text, sign(text), plainKey), fault.Usage, "a key where a certificate belongs"},
		{"two certificates", forge(t, text, sign(text), cert+"\n"+cert), fault.Usage, "one line"},
		{"a certificate with options", forge(t, text, sign(text), "cert-authority "+cert), fault.Usage, "one line"},
		{"a certificate with a comment", forge(t, text, sign(text), cert+" bob"), fault.Usage, "canonical"},
		{"two signatures", forge(t, text, sign(text)+sign(text), cert), fault.Usage, "one block"},
		{"a lead before the signature", forge(t, text, "x\n"+sign(text), cert), fault.Usage, "one block"},
		{"no signature", forge(t, text, "", cert), fault.Usage, "one block"},
		{"two lines", token.String()[:60] + "\n" + token.String()[60:], fault.Usage, "one line"},
		{"padding", token.String() + "=", fault.Usage, "illegal base64"},
		{"another version", strings.Replace(token.String(), "-1:", "-2:", 1), fault.Usage, "begin with"},
		{"too long", approval.Prefix + strings.Repeat("A", approval.MaxToken), fault.Usage, "bytes"},
		{"nothing", "", fault.Usage, "begin with"},
		{"no JSON", approval.Prefix + "AAAA", fault.Usage, "invalid character"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := approval.Verify([]string{c.token}, plan, authority{}, now)
			if fault.CodeOf(err) != c.code || err != nil && !strings.Contains(err.Error(), c.wants) {
				t.Errorf("got %v, %v; want %s with %q", got, err, c.code, c.wants)
			}
		})
	}
}

func TestSignRefuses(t *testing.T) {
	bob := certify(t, newSigner(), "bob")
	if _, err := approval.Sign(statement(), newSigner(), bob.cert); err == nil {
		t.Error("signed with a key that the certificate is not for")
	}
	for name, f := range map[string]func(*approval.Statement){
		"no plan":           func(s *approval.Statement) { s.Plan = "" },
		"no hash":           func(s *approval.Statement) { s.PlanSHA256 = "" },
		"no policy version": func(s *approval.Statement) { s.PolicyVersion = 0 },
		"no end":            func(s *approval.Statement) { s.Expires = time.Time{} },
		"a line break":      func(s *approval.Statement) { s.Node = "cp-1\n.prod" },
	} {
		s := statement()
		f(&s)
		if _, err := approval.Sign(s, bob.Signer, bob.cert); err == nil {
			t.Errorf("%s: signed", name)
		}
	}
}

// Whoever keeps the key, the signature is one of the plain key, which stock
// ssh-keygen verifies.
func TestSshKeygenVerifies(t *testing.T) {
	keygen, err := exec.LookPath("ssh-keygen")
	if err != nil {
		t.Skip("no ssh-keygen")
	}
	dir := t.TempDir()
	run := func(stdin []byte, args ...string) ([]byte, error) {
		cmd := exec.CommandContext(t.Context(), keygen, args...)
		cmd.Dir, cmd.Stdin = dir, bytes.NewReader(stdin)
		return cmd.CombinedOutput()
	}
	write := func(name string, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, kind := range [][]string{{"-t", "ed25519"}, {"-t", "ecdsa"}, {"-t", "rsa", "-b", "3072"}} {
		name := kind[1]
		if out, err := run(nil, append([]string{"-q", "-N", "", "-C", "", "-f", name}, kind...)...); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		pem, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		key, err := gossh.ParsePrivateKey(pem)
		if err != nil {
			t.Fatal(err)
		}
		bob := certify(t, key, "bob")
		withCert, err := gossh.NewCertSigner(bob.cert, key)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := gossh.ParseRawPrivateKey(pem)
		if err != nil {
			t.Fatal(err)
		}
		for who, signer := range map[string]gossh.Signer{"key": key, "certificate": withCert, "agent": inAgent(t, agent.AddedKey{PrivateKey: raw, Certificate: bob.cert})} {
			t.Run(name+"/"+who, func(t *testing.T) {
				token, err := approval.Sign(statement(), signer, bob.cert)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := approval.Verify([]string{token.String()}, plan, authority{}, now); err != nil || len(got) != 1 {
					t.Fatalf("got %v, %v", got, err)
				}
				data, err := token.Statement.Canonical()
				if err != nil {
					t.Fatal(err)
				}
				write("sig", []byte(token.Signature))
				write("allowed", []byte(`bob namespaces="`+approval.Namespace+`" `+string(gossh.MarshalAuthorizedKey(bob.cert.Key))))
				if out, err := run(data, "-Y", "verify", "-f", "allowed", "-I", "bob", "-n", approval.Namespace, "-s", "sig"); err != nil {
					t.Errorf("ssh-keygen: %v\n%s", err, out)
				}
				if out, err := run(append(data, ' '), "-Y", "verify", "-f", "allowed", "-I", "bob", "-n", approval.Namespace, "-s", "sig"); err == nil {
					t.Errorf("ssh-keygen takes other bytes\n%s", out)
				}
			})
		}
	}
	// And the other way round: what ssh-keygen signed is taken.
	pem, err := os.ReadFile(filepath.Join(dir, "ed25519"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := gossh.ParsePrivateKey(pem)
	if err != nil {
		t.Fatal(err)
	}
	bob := certify(t, key, "bob")
	data, err := bob.sign(t, statement()).Statement.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	write("statement", data)
	if out, err := run(nil, "-Y", "sign", "-f", "ed25519", "-n", approval.Namespace, "statement"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	sig, err := os.ReadFile(filepath.Join(dir, "statement.sig"))
	if err != nil {
		t.Fatal(err)
	}
	token := forge(t, string(data), string(sig), strings.TrimSpace(string(gossh.MarshalAuthorizedKey(bob.cert))))
	if got, err := approval.Verify([]string{token}, plan, authority{}, now); err != nil || len(got) != 1 {
		t.Errorf("signed by ssh-keygen: %v, %v", got, err)
	}
}

// inAgent returns the signer of a key that only an ssh-agent has, under its
// certificate.
func inAgent(t *testing.T, key agent.AddedKey) gossh.Signer {
	t.Helper()
	keyring := agent.NewKeyring()
	if err := keyring.Add(key); err != nil {
		t.Fatal(err)
	}
	here, there := net.Pipe()
	t.Cleanup(func() { _ = here.Close() })
	go func() { _ = agent.ServeAgent(keyring, there) }()
	signers, err := agent.NewClient(here).Signers()
	if err != nil || len(signers) != 1 {
		t.Fatalf("%d signers, %v", len(signers), err)
	}
	return signers[0]
}

// securityKey signs as a FIDO2 token does, with these flags
// (OpenSSH, PROTOCOL.u2f).
type securityKey struct {
	private ed25519.PrivateKey
	flags   byte
}

func (k securityKey) PublicKey() gossh.PublicKey {
	key, err := gossh.ParsePublicKey(gossh.Marshal(struct{ Type, Key, Application string }{
		gossh.KeyAlgoSKED25519, string(k.private.Public().(ed25519.PublicKey)), "ssh:",
	}))
	if err != nil {
		panic(err)
	}
	return key
}

func (k securityKey) Sign(_ io.Reader, data []byte) (*gossh.Signature, error) {
	application, message := sha256.Sum256([]byte("ssh:")), sha256.Sum256(data)
	rest := binary.BigEndian.AppendUint32([]byte{k.flags}, 1)
	blob := ed25519.Sign(k.private, bytes.Join([][]byte{application[:], rest, message[:]}, nil))
	return &gossh.Signature{Format: gossh.KeyAlgoSKED25519, Blob: blob, Rest: rest}, nil
}

func TestSecurityKeys(t *testing.T) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		flags byte
		pin   bool
		wants string
	}{
		{"touched", 1, false, ""},
		{"not touched", 0, false, "does not verify"},
		{"touched, and a PIN is due", 1, true, "PIN"},
		{"touched with a PIN", 5, true, ""},
		{"a PIN without a touch", 4, true, "does not verify"},
	} {
		token := certify(t, securityKey{private, c.flags}, "bob").sign(t, statement()).String()
		_, err := approval.Verify([]string{token}, plan, authority{pin: c.pin}, now)
		if c.wants == "" && err != nil || c.wants != "" && (err == nil || !strings.Contains(err.Error(), c.wants)) {
			t.Errorf("%s: %v; want %q", c.name, err, c.wants)
		}
	}
}

func FuzzParse(f *testing.F) {
	signer := newSigner()
	cert := &gossh.Certificate{Key: signer.PublicKey(), CertType: gossh.UserCert, KeyId: "bob", Serial: 7, ValidPrincipals: []string{"approver"}, ValidBefore: 1}
	if err := cert.SignCert(rand.Reader, ca); err != nil {
		f.Fatal(err)
	}
	token, err := approval.Sign(statement(), signer, cert)
	if err != nil {
		f.Fatal(err)
	}
	inner, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(token.String(), approval.Prefix))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(inner)
	f.Add([]byte(`{"statement":"{}","signature":"","certificate":""}`))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, inner []byte) {
		text := approval.Prefix + base64.RawURLEncoding.EncodeToString(inner)
		token, err := approval.Parse(text)
		if err != nil {
			if !fault.Is(err, fault.Usage) {
				t.Errorf("%T %v", err, err)
			}
			return
		}
		if again := token.String(); again != text {
			t.Errorf("%q reads as %q", text, again)
		}
	})
}
