package bundle

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"filippo.io/age"
	"github.com/hiddeco/sshsig"
	yamlv3 "go.yaml.in/yaml/v3"
	"golang.org/x/crypto/ssh"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/pubkey"
)

// Header is what every part begins with, and the part's bytes and signatures.
type Header struct {
	Format int    `json:"format"`
	Part   string `json:"part"`
	Fleet  string `json:"fleet"`
	// Version only goes up, from 1.
	Version uint64 `json:"version"`
	// Previous is the Hash of the version before; empty at version 1.
	Previous string    `json:"previous,omitempty"`
	Signed   time.Time `json:"signed"`

	bytes, armored []byte
	signatures     []*sshsig.Signature
}

// Bytes returns the exact bytes that are signed. They must not be changed.
func (h *Header) Bytes() []byte { return h.bytes }

// Signatures returns the armored signatures. They must not be changed.
func (h *Header) Signatures() []byte { return h.armored }

// Hash returns the SHA-256 of the part's bytes in hex, which the next version
// names as its previous.
func (h *Header) Hash() string {
	sum := sha256.Sum256(h.bytes)
	return hex.EncodeToString(sum[:])
}

// Next returns the header of the version after this one.
func (h *Header) Next(signed time.Time) Header {
	return Header{Format: 1, Part: h.Part, Fleet: h.Fleet, Version: h.Version + 1, Previous: h.Hash(), Signed: signed.UTC().Truncate(time.Second)}
}

// First returns the header of a part's version 1.
func First(part, fleet string, signed time.Time) Header {
	return Header{Format: 1, Part: part, Fleet: fleet, Version: 1, Signed: signed.UTC().Truncate(time.Second)}
}

var (
	hashForm = regexp.MustCompile(`^[0-9a-f]{64}$`)
	etcdForm = regexp.MustCompile(`^[0-9a-f]{1,16}$`)
)

func (h *Header) check(part string) error {
	switch {
	case h.Format != 1:
		return fmt.Errorf("format %d is not known to this build, which knows 1", h.Format)
	case h.Part != part:
		return fmt.Errorf("says that it is part %.64q", h.Part)
	case !trust.ValidCluster(h.Fleet):
		return fmt.Errorf("fleet %.64q is not a name of a-z, 0-9 and -", h.Fleet)
	case h.Version == 0:
		return errors.New("version: from 1")
	case h.Version == 1 && h.Previous != "":
		return errors.New("version 1 has no previous")
	case h.Version > 1 && !hashForm.MatchString(h.Previous):
		return errors.New("previous: want the SHA-256 of the version before, in hex")
	case h.Signed.IsZero():
		return errors.New("signed: want the time")
	}
	return nil
}

// legible refuses what looks otherwise to whoever reads a part before signing it
// than to what parses it: YAML also ends a line, and so a comment, at a carriage
// return and at three characters of Unicode that most editors show as nothing.
func legible(data []byte) error {
	for number, line := range bytes.Split(data, []byte("\n")) {
		i := bytes.IndexFunc(line, func(r rune) bool {
			return r == utf8.RuneError || r != '\t' && unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp)
		})
		if i >= 0 {
			r, _ := utf8.DecodeRune(line[i:])
			return fmt.Errorf("line %d has the character %U, which a reader does not see as it is", number+1, r)
		}
	}
	return nil
}

// decode reads one YAML document strictly: names are case-sensitive, and what
// is unknown or doubled refuses it.
func decode(data []byte, into any) error {
	if len(data) == 0 || data[len(data)-1] != '\n' {
		return errors.New("cut off: no newline at the end")
	}
	for line := range bytes.Lines(data) {
		// A second document would be signed and read by nobody.
		if bytes.HasPrefix(line, []byte("---")) || bytes.HasPrefix(line, []byte("...")) {
			return errors.New("more than one YAML document: want one, without lines of three dashes or dots")
		}
	}
	if err := legible(data); err != nil {
		return err
	}
	text, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		// It lists every mistake, and a file can have as many as it has lines.
		const most = 256
		if all := err.Error(); len(all) > most {
			return errors.New(strings.ToValidUTF8(all[:most], "") + "…")
		}
		return err
	}
	strict, err := kjson.UnmarshalStrict(text, into)
	if err != nil {
		return err
	}
	if len(strict) > 0 {
		return strict[0]
	}
	return nil
}

// Encode returns a part as YAML, in the order of its documentation, ready to be
// reviewed and signed. It refuses what [Parse] would refuse.
func Encode(part any) ([]byte, error) {
	text, err := json.Marshal(part)
	if err != nil {
		return nil, err
	}
	var node yamlv3.Node
	if err := yamlv3.Unmarshal(text, &node); err != nil {
		return nil, err
	}
	block(&node)
	var out bytes.Buffer
	enc := yamlv3.NewEncoder(&out)
	enc.SetIndent(2)
	if err := enc.Encode(&node); err != nil {
		return nil, err
	}
	switch part.(type) {
	case *Policy:
		_, err = decodePolicy(out.Bytes())
	case *Inventory:
		_, err = decodeInventory(out.Bytes())
	case *Revocations:
		_, err = decodeRevocations(out.Bytes())
	default:
		err = fmt.Errorf("%T is no part", part)
	}
	return out.Bytes(), err
}

// block takes the JSON's style from the nodes, so that YAML's own is used.
func block(n *yamlv3.Node) {
	n.Style = 0
	for _, c := range n.Content {
		block(c)
	}
}

// ReadHeader reads what every part begins with, and ignores the rest.
func ReadHeader(part []byte) (Header, error) {
	var h Header
	if err := yaml.Unmarshal(part, &h); err != nil {
		return h, err
	}
	if !slices.Contains([]string{PolicyPart, InventoryPart, RevocationsPart}, h.Part) {
		return h, fmt.Errorf("part %.64q is none of policy, inventory and revocations", h.Part)
	}
	return h, h.check(h.Part)
}

// attach gives a decoded part its bytes and signatures.
func (h *Header) attach(data, sig []byte) (err error) {
	h.bytes, h.armored = bytes.Clone(data), bytes.Clone(sig)
	if h.signatures, err = parseSignatures(sig); err != nil {
		return fmt.Errorf("signatures: %w", err)
	}
	return nil
}

// Key is a public key with the comment that names its owner.
type Key struct {
	ssh.PublicKey
	Comment string
}

// ParseKey reads a line of authorized_keys without options: TYPE BASE64
// [COMMENT]. Certificates and weak keys are refused.
func ParseKey(line string) (Key, error) {
	words := strings.Fields(line)
	if len(words) < 2 || strings.ContainsAny(line, "\n\r") {
		return Key{}, fmt.Errorf("key %.32q is not one line TYPE BASE64 COMMENT", line)
	}
	if err := pubkey.CheckType(words[0]); err != nil {
		return Key{}, err
	}
	blob, err := base64.StdEncoding.Strict().DecodeString(words[1])
	if err != nil {
		return Key{}, fmt.Errorf("key %.64q: %w", words[1], err)
	}
	pub, err := ssh.ParsePublicKey(blob)
	if err != nil {
		return Key{}, fmt.Errorf("key %.64q: %w", words[1], err)
	}
	k := Key{PublicKey: pub, Comment: strings.Join(words[2:], " ")}
	if pub.Type() != words[0] || !bytes.Equal(pub.Marshal(), blob) {
		return Key{}, fmt.Errorf("key %s is not of type %s", k, words[0])
	}
	if strings.ContainsFunc(k.Comment, func(r rune) bool { return r < ' ' || r > '~' }) || len(k.Comment) > 128 {
		return Key{}, fmt.Errorf("the comment of key %s is not at most 128 characters of plain ASCII", ssh.FingerprintSHA256(pub))
	}
	if err := pubkey.Check(pub); err != nil {
		return Key{}, fmt.Errorf("key %s: %w", k, err)
	}
	return k, nil
}

// Fingerprint returns SHA256:..., as ssh-keygen -l prints it.
func (k Key) Fingerprint() string { return ssh.FingerprintSHA256(k.PublicKey) }

// Line returns the line of authorized_keys.
func (k Key) Line() string {
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k.PublicKey)))
	if k.Comment != "" {
		line += " " + k.Comment
	}
	return line
}

// String returns the comment and the fingerprint.
func (k Key) String() string { return strings.TrimSpace(k.Comment + " " + k.Fingerprint()) }

// UnmarshalJSON reads a string as [ParseKey] does.
func (k *Key) UnmarshalJSON(data []byte) error {
	var line string
	err := json.Unmarshal(data, &line)
	if err == nil {
		*k, err = ParseKey(line)
	}
	return err
}

// MarshalJSON writes the line.
func (k Key) MarshalJSON() ([]byte, error) { return json.Marshal(k.Line()) }

func cryptoKey(pub ssh.PublicKey) any {
	if k, ok := pub.(Key); ok {
		pub = k.PublicKey
	}
	if c, ok := pub.(ssh.CryptoPublicKey); ok {
		return c.CryptoPublicKey()
	}
	return nil
}

// identity is the same for every form that the key itself can be wrapped in: a
// FIDO key under two applications is one key.
func identity(pub ssh.PublicKey) string {
	if plain, err := ssh.NewPublicKey(cryptoKey(pub)); err == nil {
		return string(plain.Marshal())
	}
	return string(pub.Marshal())
}

// CAs are X.509 authorities; the zero value is none.
type CAs struct {
	Certificates []*x509.Certificate
	text         string
}

const maxCAs = 8

// ParseCAs reads PEM blocks of CA certificates, at least one.
func ParseCAs(text string) (CAs, error) {
	c := CAs{text: text}
	for rest := []byte(text); len(bytes.TrimSpace(rest)) > 0; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil || b.Type != "CERTIFICATE" {
			return CAs{}, errors.New("want PEM blocks CERTIFICATE and nothing else")
		}
		cert, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return CAs{}, err
		}
		if !cert.BasicConstraintsValid || !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0 {
			return CAs{}, errors.New("a certificate that may not sign others is no authority")
		}
		c.Certificates = append(c.Certificates, cert)
	}
	if len(c.Certificates) == 0 || len(c.Certificates) > maxCAs {
		return CAs{}, fmt.Errorf("want 1 to %d certificates", maxCAs)
	}
	return c, nil
}

// Pool returns the authorities as the roots of a verification.
func (c CAs) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, cert := range c.Certificates {
		pool.AddCert(cert)
	}
	return pool
}

// IsZero tells encoding/json that there is nothing to write.
func (c CAs) IsZero() bool { return len(c.Certificates) == 0 }

// UnmarshalJSON reads a string as [ParseCAs] does.
func (c *CAs) UnmarshalJSON(data []byte) error {
	var text string
	err := json.Unmarshal(data, &text)
	if err == nil {
		*c, err = ParseCAs(text)
	}
	return err
}

// MarshalJSON writes the PEM text.
func (c CAs) MarshalJSON() ([]byte, error) { return json.Marshal(c.text) }

// Duration is written like 168h.
type Duration time.Duration

// UnmarshalJSON reads a string of time.ParseDuration.
func (d *Duration) UnmarshalJSON(data []byte) error {
	var text string
	if err := json.Unmarshal(data, &text); err != nil {
		return errors.New("want a duration such as 168h")
	}
	v, err := time.ParseDuration(text)
	*d = Duration(v)
	return err
}

// MarshalJSON writes the shortest form, such as 168h.
func (d Duration) MarshalJSON() ([]byte, error) {
	s := time.Duration(d).String()
	if cut, ok := strings.CutSuffix(s, "m0s"); ok {
		s = cut + "m"
	}
	if cut, ok := strings.CutSuffix(s, "h0m"); ok {
		s = cut + "h"
	}
	return json.Marshal(s)
}

// Roots are the offline keys under which a policy stands.
type Roots struct {
	// Threshold is how many of them must sign.
	Threshold int   `json:"threshold"`
	Keys      []Key `json:"keys"`
}

const maxKeys = 64 // in one list

func (r Roots) check() error {
	if r.Threshold < 1 || r.Threshold > len(r.Keys) {
		return fmt.Errorf("roots.threshold: %d is outside 1 to %d, the number of keys", r.Threshold, len(r.Keys))
	}
	return nil
}

func (r Roots) equal(o Roots) bool {
	return r.Threshold == o.Threshold && len(r.Keys) == len(o.Keys) && len(distinct(r.Keys, o.Keys)) == len(distinct(r.Keys))
}

func distinct(lists ...[]Key) map[string]bool {
	set := map[string]bool{}
	for _, list := range lists {
		for _, k := range list {
			set[identity(k)] = true
		}
	}
	return set
}

// Authorities are the keys that vouch for people and servers, each for one use.
type Authorities struct {
	User      []Key `json:"user"`
	Host      []Key `json:"host"`
	TLSClient CAs   `json:"tlsClient,omitzero"`
	TLSServer CAs   `json:"tlsServer,omitzero"`
}

func (a Authorities) fingerprints() (list []string) {
	for _, k := range slices.Concat(a.User, a.Host) {
		list = append(list, k.Fingerprint())
	}
	for _, c := range slices.Concat(a.TLSClient.Certificates, a.TLSServer.Certificates) {
		if pub, err := ssh.NewPublicKey(c.PublicKey); err == nil {
			list = append(list, ssh.FingerprintSHA256(pub))
		}
	}
	return list
}

// Sealed is a FIDO2 key that needs no certificate: for the night on which the
// certificates have lapsed.
type Sealed struct {
	Person    string    `json:"person"`
	Key       Key       `json:"key"`
	Role      string    `json:"role"`
	Clusters  []string  `json:"clusters"`
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
}

// The bounds of a policy's times.
const (
	DefaultFreshFor = 168 * time.Hour
	minFreshFor     = time.Hour
	maxFreshFor     = 720 * time.Hour
	DefaultGrace    = 2 * time.Hour
	maxGrace        = 24 * time.Hour
	// MaxCertificate is the longest lifetime that any policy can allow.
	MaxCertificate = 168 * time.Hour
	// MaxSealed is the longest time for which a sealed credential is valid.
	MaxSealed = 90 * 24 * time.Hour
	// DefaultKeepImages is how long before-images are kept; never less than an
	// action can be taken back without anybody's approval.
	DefaultKeepImages = 720 * time.Hour
	minKeepImages     = 48 * time.Hour
	maxKeepImages     = 8760 * time.Hour
)

// Policy is the part policy.yaml.
type Policy struct {
	Header
	Roots       Roots       `json:"roots"`
	Delegates   []Key       `json:"delegates,omitempty"`
	Authorities Authorities `json:"authorities"`
	// FreshFor is how long after the revocations were signed the bundle counts
	// as fresh.
	FreshFor Duration `json:"freshFor"`
	// Grace is how far past an edge of their validity people are admitted.
	Grace          Duration `json:"grace"`
	MaxCertificate Duration `json:"maxCertificate"`
	Sealed         []Sealed `json:"sealed,omitempty"`
	// Recovery are offline keys that can open the before-images of every node, and
	// KeepImages how long those are kept.
	Recovery   []Recipient `json:"recovery,omitempty"`
	KeepImages Duration    `json:"keepImages,omitempty"`
	trust.Rules
}

// Recipient is a public key of age: age1… (X25519).
type Recipient struct{ *age.X25519Recipient }

const maxRecovery = 8

// UnmarshalJSON reads a string.
func (r *Recipient) UnmarshalJSON(data []byte) error {
	var text string
	err := json.Unmarshal(data, &text)
	if err == nil {
		if r.X25519Recipient, err = age.ParseX25519Recipient(text); err != nil {
			err = fmt.Errorf("recovery: %.80q is no X25519 recipient of age (age1…)", text)
		}
	}
	return err
}

// MarshalJSON writes the string.
func (r Recipient) MarshalJSON() ([]byte, error) { return json.Marshal(r.String()) }

func parsePolicy(data, sig []byte) (*Policy, error) {
	p, err := decodePolicy(data)
	if err != nil {
		return nil, err
	}
	return p, p.attach(data, sig)
}

func decodePolicy(data []byte) (*Policy, error) {
	p := &Policy{FreshFor: Duration(DefaultFreshFor), Grace: Duration(DefaultGrace), MaxCertificate: Duration(MaxCertificate), KeepImages: Duration(DefaultKeepImages)}
	if err := decode(data, p); err != nil {
		return nil, err
	}
	if err := p.check(PolicyPart); err != nil {
		return nil, err
	}
	return p, p.checkRules()
}

func (p *Policy) checkRules() error {
	if err := p.Roots.check(); err != nil {
		return err
	}
	if len(p.Authorities.User) == 0 || len(p.Authorities.Host) == 0 {
		return errors.New("authorities: want at least one user key and one host key")
	}
	for _, d := range []struct {
		name           string
		value          Duration
		least, longest time.Duration
	}{
		{"freshFor", p.FreshFor, minFreshFor, maxFreshFor},
		{"grace", p.Grace, 0, maxGrace},
		{"maxCertificate", p.MaxCertificate, time.Minute, MaxCertificate},
		{"keepImages", p.KeepImages, minKeepImages, maxKeepImages},
	} {
		if v := time.Duration(d.value); v < d.least || v > d.longest {
			return fmt.Errorf("%s: %v is outside %v to %v", d.name, v, d.least, d.longest)
		}
	}
	for i, s := range p.Sealed {
		if err := s.check(); err != nil {
			return fmt.Errorf("sealed[%d]: %w", i, err)
		}
	}
	if len(p.Recovery) > maxRecovery {
		return fmt.Errorf("recovery: more than %d keys", maxRecovery)
	}
	for i, r := range p.Recovery {
		if r.X25519Recipient == nil || slices.ContainsFunc(p.Recovery[:i], func(o Recipient) bool { return o.String() == r.String() }) {
			return fmt.Errorf("recovery[%d]: want keys, each once", i)
		}
	}
	if err := p.oneUse(); err != nil {
		return err
	}
	return p.Rules.Check()
}

func (s Sealed) check() error {
	if !pubkey.Security(s.Key) {
		return fmt.Errorf("key %s is no FIDO2 key (sk-)", s.Key)
	}
	if !trust.ValidPerson(s.Person) {
		return fmt.Errorf("person %.64q is not a name of a-z, 0-9 and . _ @ -", s.Person)
	}
	if _, err := trust.ParseRole(s.Role); err != nil {
		return err
	}
	if len(s.Clusters) == 0 {
		return errors.New("clusters: want at least one")
	}
	for _, c := range s.Clusters {
		if !trust.ValidCluster(c) {
			return fmt.Errorf("cluster %.64q is not a name of a-z, 0-9 and -", c)
		}
	}
	if !s.NotAfter.After(s.NotBefore) || s.NotBefore.IsZero() || s.NotAfter.Sub(s.NotBefore) > MaxSealed {
		return errors.New("notAfter: want at most 90 days after notBefore")
	}
	return nil
}

// oneUse refuses a key that is listed twice, be it for one use or for two.
func (p *Policy) oneUse() error {
	uses := map[string]string{}
	add := func(pub ssh.PublicKey, use string) error {
		id := identity(pub)
		if was, ok := uses[id]; ok {
			return fmt.Errorf("key %s is in %s and in %s: every key has one use and is listed once", ssh.FingerprintSHA256(pub), was, use)
		}
		uses[id] = use
		return nil
	}
	for _, list := range []struct {
		use  string
		keys []Key
	}{
		{"roots.keys", p.Roots.Keys}, {"delegates", p.Delegates},
		{"authorities.user", p.Authorities.User}, {"authorities.host", p.Authorities.Host},
	} {
		if len(list.keys) > maxKeys {
			return fmt.Errorf("%s: more than %d keys", list.use, maxKeys)
		}
		for _, k := range list.keys {
			if k.PublicKey == nil {
				return fmt.Errorf("%s: want keys", list.use)
			}
			if err := add(k, list.use); err != nil {
				return err
			}
		}
	}
	for i, s := range p.Sealed {
		if err := add(s.Key, fmt.Sprintf("sealed[%d]", i)); err != nil {
			return err
		}
	}
	for _, list := range []struct {
		use string
		cas CAs
	}{{"authorities.tlsClient", p.Authorities.TLSClient}, {"authorities.tlsServer", p.Authorities.TLSServer}} {
		for _, c := range list.cas.Certificates {
			pub, err := ssh.NewPublicKey(c.PublicKey)
			if err != nil {
				return fmt.Errorf("%s: %w", list.use, err)
			}
			if err := add(pub, list.use); err != nil {
				return err
			}
		}
	}
	return nil
}

// Serial revokes SSH certificates by number.
type Serial struct {
	Serial uint64 `json:"serial"`
	// CA is the fingerprint of the key that signed it; empty: of any.
	CA    string    `json:"ca,omitempty"`
	Until time.Time `json:"until,omitzero"`
}

// X509Serial revokes X.509 client certificates by number, of any authority.
type X509Serial struct {
	// Serial is in decimal, or in hex after 0x.
	Serial string    `json:"serial"`
	Until  time.Time `json:"until,omitzero"`
}

// Number returns the serial; nil where it is malformed.
func (s X509Serial) Number() *big.Int {
	text, base := s.Serial, 10
	if hexText, ok := strings.CutPrefix(text, "0x"); ok {
		text, base = hexText, 16
	}
	if len(text) > 64 || strings.ContainsAny(text, "+-_") {
		return nil
	}
	n, ok := new(big.Int).SetString(text, base)
	if !ok {
		return nil
	}
	return n
}

// Revocations is the part revocations.yaml.
type Revocations struct {
	Header
	PolicyVersion uint64       `json:"policyVersion"`
	Serials       []Serial     `json:"serials,omitempty"`
	KeyIDs        []string     `json:"keyIDs,omitempty"`
	Keys          []string     `json:"keys,omitempty"`
	X509Serials   []X509Serial `json:"x509Serials,omitempty"`

	// all has every entry in one form, with its until.
	all map[string]time.Time
}

func parseRevocations(data, sig []byte) (*Revocations, error) {
	r, err := decodeRevocations(data)
	if err != nil {
		return nil, err
	}
	return r, r.attach(data, sig)
}

func decodeRevocations(data []byte) (*Revocations, error) {
	r := &Revocations{all: map[string]time.Time{}}
	if err := decode(data, r); err != nil {
		return nil, err
	}
	if err := r.check(RevocationsPart); err != nil {
		return nil, err
	}
	if r.PolicyVersion == 0 {
		return nil, errors.New("policyVersion: from 1")
	}
	for i, s := range r.Serials {
		if s.Serial == 0 {
			return nil, fmt.Errorf("serials[%d]: 0 is no serial", i)
		}
		if s.CA != "" && !isFingerprint(s.CA) {
			return nil, fmt.Errorf("serials[%d]: ca %.64q is no fingerprint SHA256:BASE64", i, s.CA)
		}
		if err := r.add(serialEntry(s.CA, s.Serial), s.Until); err != nil {
			return nil, err
		}
	}
	for i, id := range r.KeyIDs {
		if !trust.ValidPerson(id) {
			return nil, fmt.Errorf("keyIDs[%d]: %.64q is not a name of a-z, 0-9 and . _ @ -", i, id)
		}
		if err := r.add(idEntry(id), time.Time{}); err != nil {
			return nil, err
		}
	}
	for i, k := range r.Keys {
		if !isFingerprint(k) {
			return nil, fmt.Errorf("keys[%d]: %.64q is no fingerprint SHA256:BASE64", i, k)
		}
		if err := r.add(keyEntry(k), time.Time{}); err != nil {
			return nil, err
		}
	}
	for i, s := range r.X509Serials {
		n := s.Number()
		if n == nil || n.Sign() == 0 {
			return nil, fmt.Errorf("x509Serials[%d]: %.64q is no number in decimal, or in hex after 0x", i, s.Serial)
		}
		if err := r.add(x509Entry(n), s.Until); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (r *Revocations) add(entry string, until time.Time) error {
	if _, ok := r.all[entry]; ok {
		return fmt.Errorf("%s is listed twice", entry)
	}
	r.all[entry] = until
	return nil
}

func isFingerprint(s string) bool {
	text, ok := strings.CutPrefix(s, "SHA256:")
	sum, err := base64.RawStdEncoding.Strict().DecodeString(text)
	return ok && err == nil && len(sum) == sha256.Size
}

func serialEntry(ca string, serial uint64) string { return fmt.Sprintf("serial %d %s", serial, ca) }
func idEntry(id string) string                    { return "key ID " + id }
func keyEntry(fingerprint string) string          { return "key " + fingerprint }
func x509Entry(n *big.Int) string                 { return "X.509 serial " + n.String() }

func (r *Revocations) first(entries ...string) (string, bool) {
	for _, e := range entries {
		if _, ok := r.all[e]; ok {
			return e, true
		}
	}
	return "", false
}

// Certificate reports whether an SSH certificate is revoked, and by what: its
// serial, its key ID, its key or its authority's.
func (r *Revocations) Certificate(c *ssh.Certificate) (by string, revoked bool) {
	ca := ssh.FingerprintSHA256(c.SignatureKey)
	return r.first(serialEntry(ca, c.Serial), serialEntry("", c.Serial), idEntry(c.KeyId), keyEntry(ssh.FingerprintSHA256(c.Key)), keyEntry(ca))
}

// Key reports whether a key, or the person who holds it, is revoked.
func (r *Revocations) Key(pub ssh.PublicKey, person string) (by string, revoked bool) {
	return r.first(keyEntry(ssh.FingerprintSHA256(pub)), idEntry(person))
}

// X509 reports whether a client certificate is revoked: by its serial, by the
// person in its common name, or by a key's fingerprint in SSH's form, its own or
// that of one of the authorities above it.
func (r *Revocations) X509(c *x509.Certificate, authorities ...*x509.Certificate) (by string, revoked bool) {
	entries := []string{x509Entry(c.SerialNumber), idEntry(c.Subject.CommonName)}
	for _, cert := range append([]*x509.Certificate{c}, authorities...) {
		if pub, err := ssh.NewPublicKey(cert.PublicKey); err == nil {
			entries = append(entries, keyEntry(ssh.FingerprintSHA256(pub)))
		}
	}
	return r.first(entries...)
}

// Identity reports whether somebody who came in earlier is revoked by now.
func (r *Revocations) Identity(id trust.Identity) (by string, revoked bool) {
	entries := []string{idEntry(id.Person), keyEntry(id.Fingerprint), keyEntry(id.CA)}
	if n, ok := new(big.Int).SetString(id.Serial, 10); ok {
		if id.Door == trust.GRPC {
			entries = append(entries, x509Entry(n))
		} else if n.IsUint64() {
			entries = append(entries, serialEntry(id.CA, n.Uint64()), serialEntry("", n.Uint64()))
		}
	}
	return r.first(entries...)
}
