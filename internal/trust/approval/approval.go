// Package approval is how one person lets another's plan go ahead: a statement
// over the plan, signed by the approver's key as OpenSSH signs files (SSHSIG,
// so `ssh-keygen -Y verify` checks it too), carried to the agent as one line of
// text by whoever.
//
// It must never count one person or one key twice, never take a signature that
// was made for anything else, and never decide whether an approval is needed:
// that is [trust.Policy]'s. That one is used once is the journal's to hold. It
// needs no file and no network, and stands on floor 0.
package approval

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hiddeco/sshsig"
	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

const (
	// Namespace is the SSHSIG namespace of approvals: a signature made for
	// anything else does not verify here.
	Namespace = "approval@halligan.io"
	// Prefix begins every token.
	Prefix = "halligan-approval-1:"
	// MaxLife is how far ahead of the agent's clock a statement may expire.
	MaxLife = time.Hour
	// MaxToken bounds a token, in bytes. The largest that makes sense, with RSA
	// keys of 8192 bits, has some 8 KiB.
	MaxToken = 16 << 10
	// MaxTokens bounds how many one plan may bring.
	MaxTokens = 16

	format = 1
)

// Statement is what an approver signs. Every field is required.
type Statement struct {
	// Format is 1.
	Format int    `json:"format"`
	Fleet  string `json:"fleet"`
	// Cluster is etcd's cluster ID, in hexadecimal; ClusterName that of the
	// bundle.
	Cluster     string `json:"cluster"`
	ClusterName string `json:"clusterName"`
	// Node is the agent that is to act, NODE.CLUSTER.
	Node string `json:"node"`
	// Plan is the plan's ID, and PlanSHA256 the hash of the bytes of it that the
	// approver has seen, in hexadecimal.
	Plan       string `json:"plan"`
	PlanSHA256 string `json:"planSha256"`
	// Nonce is the plan's.
	Nonce     string `json:"nonce"`
	Requester string `json:"requester"`
	Approver  string `json:"approver"`
	// PolicyVersion is that of the policy which asked for the approval.
	PolicyVersion uint64 `json:"policyVersion"`
	// Expires is by the agent's clock, in whole seconds of UTC: the plan's own
	// end, or earlier.
	Expires time.Time `json:"expires"`
}

// Digest returns the hash of a plan's bytes as a statement carries it.
func Digest(plan []byte) string {
	sum := sha256.Sum256(plan)
	return hex.EncodeToString(sum[:])
}

var digestForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Canonical returns the bytes that are signed: JSON in the order of the fields,
// without spaces, with nothing escaped that need not be, and no newline.
func (s Statement) Canonical() ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(s); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

func (s Statement) check() error {
	if s.Format != format {
		return fmt.Errorf("the statement has format %d; this build knows %d", s.Format, format)
	}
	for name, value := range map[string]string{"fleet": s.Fleet, "cluster": s.Cluster, "clusterName": s.ClusterName, "node": s.Node,
		"plan": s.Plan, "nonce": s.Nonce, "requester": s.Requester, "approver": s.Approver} {
		if value == "" || len(value) > 256 || strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return fmt.Errorf("the statement's %s is not 1 to 256 printable ASCII characters", name)
		}
	}
	if !digestForm.MatchString(s.PlanSHA256) {
		return fmt.Errorf("the statement's planSha256 is not a SHA-256 in lower-case hexadecimal")
	}
	if s.PolicyVersion == 0 {
		return fmt.Errorf("the statement names no policyVersion")
	}
	if s.Expires.Unix() <= 0 || s.Expires.Nanosecond() != 0 || s.Expires.Location() != time.UTC {
		return fmt.Errorf("the statement's expires is not a whole second of UTC")
	}
	return nil
}

// parseStatement takes canonical bytes only, so that there is one way to read
// what was signed: no doubled, unknown or differently written key.
func parseStatement(data []byte) (Statement, error) {
	var s Statement
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return Statement{}, fmt.Errorf("the statement is not understood: %w", err)
	}
	again, err := s.Canonical()
	if err != nil {
		return Statement{}, err
	}
	if !bytes.Equal(again, data) {
		return Statement{}, fmt.Errorf("the statement is not in its canonical form")
	}
	return s, nil
}

// Token is a signed statement with the certificate of who signed it.
type Token struct {
	Statement Statement
	// Signature is armored SSHSIG over Statement.Canonical.
	Signature string
	// Certificate is the approver's SSH user certificate.
	Certificate *gossh.Certificate
}

// envelope is a token's JSON.
type envelope struct {
	Statement   string `json:"statement"`
	Signature   string `json:"signature"`
	Certificate string `json:"certificate"`
}

// Sign signs the statement with the key that the certificate is for, be it in a
// file, in an ssh-agent or on a FIDO2 token, which then asks for a touch. The
// statement's format is filled in, and its approver from the certificate.
func Sign(s Statement, signer gossh.Signer, cert *gossh.Certificate) (*Token, error) {
	s.Format, s.Approver = format, cert.KeyId
	s.Expires = s.Expires.UTC().Truncate(time.Second)
	data, err := s.Canonical()
	if err != nil {
		return nil, err
	}
	if !isKey(signer.PublicKey(), cert.Key) {
		return nil, fmt.Errorf("the certificate of %s is for another key than the one that signs", cert.KeyId)
	}
	sig, err := sshsig.Sign(bytes.NewReader(data), bare{signer, cert.Key}, sshsig.HashSHA512, Namespace)
	if err != nil {
		return nil, fmt.Errorf("signing the approval: %w", err)
	}
	return &Token{Statement: s, Signature: string(sshsig.Armor(sig)), Certificate: cert}, nil
}

// bare signs as the plain key, also where the signer shows a certificate: what
// stands in the signature is then the key itself.
type bare struct {
	gossh.Signer
	key gossh.PublicKey
}

func (b bare) PublicKey() gossh.PublicKey { return b.key }

func (b bare) SignWithAlgorithm(rand io.Reader, data []byte, algorithm string) (*gossh.Signature, error) {
	s, ok := b.Signer.(gossh.AlgorithmSigner)
	if !ok {
		return nil, fmt.Errorf("the key cannot sign with %s", algorithm)
	}
	return s.SignWithAlgorithm(rand, data, algorithm)
}

// isKey reports whether the signer's key is that one, or a certificate for it.
// What comes from an ssh-agent is only known by its bytes.
func isKey(signer, key gossh.PublicKey) bool {
	parsed, err := gossh.ParsePublicKey(signer.Marshal())
	if err != nil {
		return false
	}
	if cert, ok := parsed.(*gossh.Certificate); ok {
		parsed = cert.Key
	}
	return bytes.Equal(parsed.Marshal(), key.Marshal())
}

// String returns the token as one line, without a newline.
func (t *Token) String() string {
	data, err := t.Statement.Canonical()
	if err != nil {
		return ""
	}
	inner, err := json.Marshal(envelope{
		Statement:   string(data),
		Signature:   t.Signature,
		Certificate: strings.TrimSuffix(string(gossh.MarshalAuthorizedKey(t.Certificate)), "\n"),
	})
	if err != nil {
		return ""
	}
	return Prefix + base64.RawURLEncoding.EncodeToString(inner)
}

// Parse reads one token strictly; white space around it is ignored. It checks
// form only: nothing of it is true before Verify. Errors are fault.Usage.
func Parse(text string) (*Token, error) {
	t, err := parse(strings.TrimSpace(text))
	if err != nil {
		return nil, fault.New(fault.Usage, "ask for the whole line again that begins with "+Prefix, "the approval is malformed: %w", err)
	}
	return t, nil
}

func parse(text string) (*Token, error) {
	if len(text) > MaxToken {
		return nil, fmt.Errorf("more than %d bytes", MaxToken)
	}
	encoded, ok := strings.CutPrefix(text, Prefix)
	if !ok {
		return nil, fmt.Errorf("it does not begin with %s", Prefix)
	}
	if strings.ContainsAny(encoded, "\r\n") { // the decoder would skip them
		return nil, fmt.Errorf("it is not one line")
	}
	inner, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return nil, err
	}
	var e envelope
	d := json.NewDecoder(bytes.NewReader(inner))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		return nil, err
	}
	if again, err := json.Marshal(e); err != nil || !bytes.Equal(again, inner) {
		return nil, fmt.Errorf("it is not in its canonical form")
	}
	t := &Token{Signature: e.Signature}
	if t.Statement, err = parseStatement([]byte(e.Statement)); err != nil {
		return nil, err
	}
	if _, err := t.signature(); err != nil {
		return nil, err
	}
	key, _, options, rest, err := gossh.ParseAuthorizedKey([]byte(e.Certificate))
	if err != nil || len(options) > 0 || len(rest) > 0 {
		return nil, fmt.Errorf("its certificate is not one line of OpenSSH's form")
	}
	if t.Certificate, ok = key.(*gossh.Certificate); !ok {
		return nil, fmt.Errorf("it carries a key where a certificate belongs")
	}
	if string(gossh.MarshalAuthorizedKey(t.Certificate)) != e.Certificate+"\n" {
		return nil, fmt.Errorf("its certificate is not in its canonical form")
	}
	return t, nil
}

// signature decodes the armored signature: one block and nothing around it.
func (t *Token) signature() (*sshsig.Signature, error) {
	block, rest := pem.Decode([]byte(t.Signature))
	if block == nil || block.Type != sshsig.PEMType || len(block.Headers) > 0 || len(bytes.TrimSpace(rest)) > 0 ||
		!strings.HasPrefix(t.Signature, "-----BEGIN ") {
		return nil, fmt.Errorf("its signature is not one block %q", sshsig.PEMType)
	}
	sig, err := sshsig.ParseSignature(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("its signature: %w", err)
	}
	return sig, nil
}

// flagVerified is the bit of a FIDO2 signature that says that the token has
// verified its user, by a PIN or a finger (OpenSSH, PROTOCOL.u2f).
const flagVerified = 0x04

// verify checks the signature over the statement by the certificate's key. The
// user's presence at a FIDO2 key is x/crypto's to check.
func (t *Token) verify(needsPIN bool) error {
	sig, err := t.signature()
	if err != nil {
		return err
	}
	data, err := t.Statement.Canonical()
	if err != nil {
		return err
	}
	switch {
	case sig.Namespace != Namespace:
		return fmt.Errorf("the signature was made for %q, not for %s", sig.Namespace, Namespace)
	case sig.HashAlgorithm != sshsig.HashSHA512:
		return fmt.Errorf("the signature uses hash %q, not %s", sig.HashAlgorithm, sshsig.HashSHA512)
	}
	if err := sshsig.Verify(bytes.NewReader(data), sig, t.Certificate.Key, sshsig.HashSHA512, Namespace); err != nil {
		return fmt.Errorf("the signature does not verify: %w", err)
	}
	if needsPIN && (len(sig.Signature.Rest) == 0 || sig.Signature.Rest[0]&flagVerified == 0) {
		return fmt.Errorf("the certificate asks for the key's PIN, and the signature was made without")
	}
	return nil
}

// Plan is what the agent knows of a plan that is about to be applied, and holds
// every statement against.
type Plan struct {
	Fleet, Cluster, ClusterName, Node string
	// ID, SHA256 and Nonce are as in Statement.
	ID, SHA256, Nonce string
	// Requester is who applies it, and RequesterKey the fingerprint of that
	// person's key, empty at the console.
	Requester, RequesterKey string
	// PolicyVersion is that of the policy in force now.
	PolicyVersion uint64
	// Action and Namespaces are what the plan does, and where: an approver whose
	// certificate is narrowed approves only within it. No namespace, or an empty
	// one, stands for objects of the whole cluster.
	Action     string
	Namespaces []string
}

// Approval is one person's word, verified.
type Approval struct {
	Approver, Fingerprint, Serial, Nonce string
	Expires                              time.Time
}

// Authority vouches for approvers: a *credential.Authority.
type Authority interface {
	// Approver returns who a certificate, which is valid now for the role
	// approver on this agent, stands for, and whether a signature under it must
	// show that the key has verified its user.
	Approver(cert *gossh.Certificate) (who trust.Identity, needsPIN bool, err error)
}

// Verify checks the tokens against the plan at the moment now of the agent's
// clock, and returns the approvals that count: each person once and each key
// once, in the order of the tokens. Any token that does not hold refuses all of
// them, with fault.Refused or fault.Usage, so that nobody acts on less than was
// brought. The caller compares the number with what is needed, and records all
// of them with the action, whose ID is the plan's and is used once.
func Verify(tokens []string, plan Plan, authority Authority, now time.Time) ([]Approval, error) {
	if len(tokens) > MaxTokens {
		return nil, fault.New(fault.Usage, "bring those that are needed", "%d approvals; %d are the most", len(tokens), MaxTokens)
	}
	var counted []Approval
	for _, text := range tokens {
		t, err := Parse(text)
		if err != nil {
			return nil, err
		}
		a, err := t.holds(plan, authority, now)
		if err != nil {
			return nil, fault.New(fault.Refused, "ask for another approval of this very plan", "the approval of %s does not hold: %w", t.Statement.Approver, err)
		}
		if !slices.ContainsFunc(counted, func(c Approval) bool { return c.Approver == a.Approver || c.Fingerprint == a.Fingerprint }) {
			counted = append(counted, a)
		}
	}
	return counted, nil
}

func (t *Token) holds(plan Plan, authority Authority, now time.Time) (Approval, error) {
	s := t.Statement
	// An empty fact would match nothing, as a statement has no empty field.
	for _, f := range []struct{ what, signed, fact string }{
		{"fleet", s.Fleet, plan.Fleet}, {"etcd cluster", s.Cluster, plan.Cluster}, {"cluster", s.ClusterName, plan.ClusterName}, {"agent", s.Node, plan.Node},
		{"plan", s.Plan, plan.ID}, {"plan's content", s.PlanSHA256, plan.SHA256}, {"plan's nonce", s.Nonce, plan.Nonce}, {"requester", s.Requester, plan.Requester},
	} {
		if f.signed != f.fact {
			return Approval{}, fmt.Errorf("it is for another %s: %s, not %s", f.what, f.signed, f.fact)
		}
	}
	switch {
	case s.PolicyVersion != plan.PolicyVersion:
		return Approval{}, fmt.Errorf("it is for policy %d, and policy %d is in force", s.PolicyVersion, plan.PolicyVersion)
	case !now.Before(s.Expires):
		return Approval{}, fmt.Errorf("it expired at %s, and here it is %s", s.Expires.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case s.Expires.After(now.Add(MaxLife)):
		return Approval{}, fmt.Errorf("it lasts until %s, and %v from now is the most", s.Expires.Format(time.RFC3339), MaxLife)
	}
	who, needsPIN, err := authority.Approver(t.Certificate)
	if err != nil {
		return Approval{}, err
	}
	switch {
	case who.Person != s.Approver:
		return Approval{}, fmt.Errorf("it is signed under the certificate of %s", who.Person)
	case who.Person == plan.Requester:
		return Approval{}, fmt.Errorf("nobody approves their own plan")
	case who.Fingerprint == "" || who.Fingerprint == plan.RequesterKey:
		return Approval{}, fmt.Errorf("it is signed with the key of the requester %s", plan.Requester)
	}
	if err := within(who.Scope, plan); err != nil {
		return Approval{}, err
	}
	if err := t.verify(needsPIN); err != nil {
		return Approval{}, err
	}
	return Approval{Approver: who.Person, Fingerprint: who.Fingerprint, Serial: who.Serial, Nonce: s.Nonce, Expires: s.Expires}, nil
}

// within holds the plan against what the approver's certificate is narrowed to.
// Its nodes are the authority's to check.
func within(scope trust.Scope, plan Plan) error {
	if len(scope.Actions) > 0 && !matches(scope.Actions, plan.Action) {
		return fmt.Errorf("the approver's certificate is for actions %q, not for %q", scope.Actions, plan.Action)
	}
	if len(scope.Namespaces) == 0 {
		return nil
	}
	if len(plan.Namespaces) == 0 || slices.Contains(plan.Namespaces, "") { // * matches an empty name
		return fmt.Errorf("the approver's certificate is for namespaces %q, not for the whole cluster", scope.Namespaces)
	}
	for _, ns := range plan.Namespaces {
		if !matches(scope.Namespaces, ns) {
			return fmt.Errorf("the approver's certificate is for namespaces %q, not for %q", scope.Namespaces, ns)
		}
	}
	return nil
}

func matches(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { ok, _ := path.Match(p, name); return ok })
}
