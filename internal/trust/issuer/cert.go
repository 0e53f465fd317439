package issuer

import (
	"cmp"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/pubkey"
)

// How long certificates last. A person's is over within a week whatever the
// issuer wants, since agents refuse longer ones; what a node shows lasts over a
// long outage of whoever renews it.
const (
	DefaultLife     = 24 * time.Hour
	MaxLife         = bundle.MaxCertificate
	DefaultNodeLife = 90 * 24 * time.Hour
	MaxNodeLife     = credential.MaxServer
	// caLife is how long an X.509 authority's own certificate lasts; the policy
	// that names it is what gives and takes its authority.
	caLife = 10 * 365 * 24 * time.Hour
	// skew is how far before now a certificate begins, for clocks that are behind.
	skew = 5 * time.Minute
)

// Validity is when a certificate holds.
type Validity struct{ NotBefore, NotAfter time.Time }

// From returns a validity of this length, which begins a little before now
// unless that would make it longer than most.
func From(now time.Time, life, most time.Duration) (Validity, error) {
	if life < time.Minute || life > most {
		return Validity{}, fault.New(fault.Usage, "give --for a time within that", "a certificate for %s is outside 1m to %s", short(life), short(most))
	}
	now = now.Truncate(time.Second)
	end := now.Add(life)
	begin := now.Add(-skew)
	if earliest := end.Add(-most); begin.Before(earliest) {
		begin = earliest
	}
	return Validity{begin, end}, nil
}

// short writes a time without zero minutes and seconds.
func short(d time.Duration) string {
	s := d.String()
	if cut, ok := strings.CutSuffix(s, "m0s"); ok {
		s = cut + "m"
	}
	if cut, ok := strings.CutSuffix(s, "h0m"); ok {
		s = cut + "h"
	}
	return s
}

// Life is how long a certificate of this validity was asked for.
func (v Validity) Life() time.Duration {
	if d := v.NotAfter.Sub(v.NotBefore); d != MaxLife && d != MaxNodeLife {
		return max(d-skew, time.Minute)
	} else {
		return d
	}
}

// Of returns the validity of an SSH certificate. One that never ends ends
// beyond every life.
func Of(cert *ssh.Certificate) Validity {
	const end = 1 << 40
	return Validity{time.Unix(int64(min(cert.ValidAfter, end)), 0), time.Unix(int64(min(cert.ValidBefore, end)), 0)} // #nosec G115 -- bounded
}

// Holder is whom a certificate of a person or of automation is for, and what it
// is good for.
type Holder struct {
	Person   string
	Roles    []trust.Role
	Clusters []string
	Scope    trust.Scope
	// Automation marks an SSH certificate as that of a program.
	Automation bool
	// SourceAddresses are addresses or CIDR ranges outside of which an SSH
	// certificate is not accepted; empty: everywhere.
	SourceAddresses []string
	// VerifyRequired asks for the PIN of an sk- key with every signature. It is for
	// approvers who sign and do not log in: a server cannot tell whether a login had
	// one, and refuses it.
	VerifyRequired bool
}

// Check refuses what no agent would accept, or what cannot be meant.
func (h Holder) Check() error {
	switch {
	case !trust.ValidPerson(h.Person):
		return mistake("take 1 to 64 of a-z 0-9 . _ @ -, and always the same for one person", "%q is not a person's name here", h.Person)
	case len(h.Roles) == 0:
		return mistake("give --roles, some of observer, responder, commander, approver", "a certificate without a role opens nothing")
	case len(h.Clusters) == 0:
		return mistake("give --clusters, the name of each", "a certificate without a cluster opens nothing")
	}
	for i, r := range h.Roles {
		if !slices.Contains(trust.Roles(), r) || slices.Contains(h.Roles[:i], r) {
			return mistake("name each of observer, responder, commander, approver at most once", "role %s makes no sense here", r)
		}
	}
	for _, c := range h.Clusters {
		if !trust.ValidCluster(c) {
			return mistake("take a name of a-z, 0-9 and -; a pattern is not accepted", "%q is not a cluster's name", c)
		}
	}
	for name, list := range map[string][]string{"action": h.Scope.Actions, "namespace": h.Scope.Namespaces, "node": h.Scope.Nodes} {
		for _, p := range list {
			if _, err := path.Match(p, ""); err != nil || p == "" || strings.ContainsAny(p, ", \t\n&") {
				return mistake("write it as a shell pattern without spaces and commas, such as telemetry-*", "%q is no pattern of %ss", p, name)
			}
		}
	}
	for _, a := range h.SourceAddresses {
		if _, err := netip.ParsePrefix(a); err != nil {
			if _, err := netip.ParseAddr(a); err != nil {
				return mistake("write 192.0.2.7 or 192.0.2.0/24", "%q is neither an IP address nor a range", a)
			}
		}
	}
	return nil
}

// User signs an OpenSSH user certificate for the key.
func (k *Key) User(key ssh.PublicKey, h Holder, serial uint64, v Validity) (*ssh.Certificate, error) {
	if err := h.Check(); err != nil {
		return nil, err
	}
	if h.VerifyRequired && !pubkey.Security(key) {
		return nil, mistake("leave out --verify-required, or make the key with ssh-keygen -t ed25519-sk", "a key of type %s has no PIN", key.Type())
	}
	if h.VerifyRequired && !slices.Equal(h.Roles, []trust.Role{trust.Approver}) {
		return nil, mistake("have the key itself ask for its PIN: ssh-keygen -t ed25519-sk -O verify-required",
			"no agent sees at a login whether the PIN was given, so --verify-required is for an approver's signatures alone")
	}
	if v.NotAfter.Sub(v.NotBefore) > MaxLife {
		return nil, mistake("give --for 168h or less", "agents refuse certificates that last longer than %s", short(MaxLife))
	}
	critical := map[string]string{credential.OptionClusters: strings.Join(h.Clusters, ",")}
	if len(h.SourceAddresses) > 0 {
		critical["source-address"] = strings.Join(h.SourceAddresses, ",")
	}
	if h.VerifyRequired {
		critical["verify-required"] = ""
	}
	extensions := map[string]string{"permit-pty": ""}
	for name, list := range map[string][]string{credential.ExtensionActions: h.Scope.Actions, credential.ExtensionNamespaces: h.Scope.Namespaces, credential.ExtensionNodes: h.Scope.Nodes} {
		if len(list) > 0 {
			extensions[name] = strings.Join(list, ",")
		}
	}
	if h.Scope.Drill {
		extensions[credential.ExtensionDrill] = ""
	}
	if h.Automation {
		extensions[credential.ExtensionAutomation] = ""
	}
	roles := make([]string, len(h.Roles))
	for i, r := range h.Roles {
		roles[i] = r.String()
	}
	return k.certify(&ssh.Certificate{
		Key: key, CertType: ssh.UserCert, KeyId: h.Person, Serial: serial, ValidPrincipals: roles,
		Permissions: ssh.Permissions{CriticalOptions: critical, Extensions: extensions},
	}, v)
}

// Host signs an OpenSSH host certificate for the key of a server, whose name is
// NODE.CLUSTER.
func (k *Key) Host(key ssh.PublicKey, name string, serial uint64, v Validity) (*ssh.Certificate, error) {
	if err := CheckServer(name); err != nil {
		return nil, err
	}
	if t := key.Type(); t != ssh.KeyAlgoED25519 && t != ssh.CertAlgoED25519v01 {
		return nil, mistake("make one: ssh-keygen -t ed25519", "agents have ed25519 host keys, not %s", t)
	}
	return k.certify(&ssh.Certificate{Key: key, CertType: ssh.HostCert, KeyId: name, Serial: serial, ValidPrincipals: []string{name}}, v)
}

// Again signs a certificate anew that this key has signed: all as it was but the
// serial and the validity.
func (k *Key) Again(old *ssh.Certificate, serial uint64, v Validity) (*ssh.Certificate, error) {
	cert := *old
	cert.Serial, cert.Nonce, cert.Signature = serial, nil, nil
	if cert.CertType == ssh.UserCert && v.NotAfter.Sub(v.NotBefore) > MaxLife {
		return nil, mistake("give --for 168h or less", "agents refuse certificates that last longer than %s", short(MaxLife))
	}
	return k.certify(&cert, v)
}

// CheckSSH refuses a certificate that this key has not signed, or that somebody
// changed since.
func (k *Key) CheckSSH(cert *ssh.Certificate) error {
	if ssh.FingerprintSHA256(cert.SignatureKey) != ssh.FingerprintSHA256(k.Public()) {
		return mistake("name the key that signed it", "the certificate was signed by another key, %s", ssh.FingerprintSHA256(cert.SignatureKey))
	}
	checker := ssh.CertChecker{SupportedCriticalOptions: []string{credential.OptionClusters, "source-address", "verify-required"},
		Clock: func() time.Time { return time.Unix(int64(cert.ValidAfter), 0) }} // #nosec G115 -- only a moment within its validity
	if len(cert.ValidPrincipals) == 0 {
		return mistake("issue a new one", "the certificate names nobody, so it would stand for everybody")
	}
	if err := checker.CheckCert(cert.ValidPrincipals[0], cert); err != nil {
		return mistake("issue a new one", "the certificate is not sound: %s", strings.TrimPrefix(err.Error(), "ssh: "))
	}
	return nil
}

func (k *Key) certify(cert *ssh.Certificate, v Validity) (*ssh.Certificate, error) {
	if cert.Serial == 0 {
		return nil, fmt.Errorf("certificate of %s: serial 0 cannot be revoked", cert.KeyId)
	}
	switch cert.Key.(type) {
	case nil, *ssh.Certificate:
		return nil, mistake("give the .pub file of the key itself", "a certificate cannot be certified again")
	}
	if err := pubkey.Check(cert.Key); err != nil {
		return nil, mistake("make one with ssh-keygen -t ed25519", "%w", err)
	}
	if slices.Equal(cert.Key.Marshal(), k.Public().Marshal()) {
		return nil, mistake("make one with ssh-keygen -t ed25519", "%s is the authority's own key", ssh.FingerprintSHA256(cert.Key))
	}
	if !v.NotBefore.Before(v.NotAfter) || v.NotBefore.Unix() < 0 {
		return nil, mistake("look at this machine's clock", "a certificate from %v to %v is never valid", v.NotBefore, v.NotAfter)
	}
	cert.ValidAfter, cert.ValidBefore = uint64(v.NotBefore.Unix()), uint64(v.NotAfter.Unix()) // #nosec G115 -- checked above
	if err := cert.SignCert(rand.Reader, k.signer); err != nil {
		return nil, fmt.Errorf("signing with the key of %s: %w", k.Where, err)
	}
	return cert, nil
}

// CheckServer refuses what is not a name NODE.CLUSTER.
func CheckServer(name string) error {
	if !trust.ValidServer(name) {
		return mistake("write NODE.CLUSTER, such as cp-1.prod", "%q is not a server's name", name)
	}
	return nil
}

// Usage is what an X.509 authority is for.
type Usage int

// The two authorities of a policy.
const (
	ClientAuth Usage = iota + 1
	ServerAuth
)

var usages = map[Usage]x509.ExtKeyUsage{ClientAuth: x509.ExtKeyUsageClientAuth, ServerAuth: x509.ExtKeyUsageServerAuth}

// Authority signs X.509 certificates of one usage.
type Authority struct {
	Certificate *x509.Certificate
	signer      crypto.Signer
	usage       x509.ExtKeyUsage
}

// NewAuthority signs the authority's own certificate with its key.
func NewAuthority(k *Key, name string, usage Usage, now time.Time) (*x509.Certificate, error) {
	signer, err := k.Crypto()
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-skew), NotAfter: now.Add(caLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{usages[usage]},
	}
	return create(t, t, signer.Public(), signer)
}

// OpenAuthority joins an authority's certificate and its key.
func OpenAuthority(cert *x509.Certificate, k *Key) (*Authority, error) {
	signer, err := k.Crypto()
	if err != nil {
		return nil, err
	}
	if public, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(signer.Public()) {
		return nil, mistake("name the key that belongs to it", "the key of %s is not that of the authority %s", k.Where, cert.Subject.CommonName)
	}
	if !cert.IsCA || len(cert.ExtKeyUsage) != 1 {
		return nil, mistake("make one with halligan ca init", "the certificate of %s is no authority of ours", cert.Subject.CommonName)
	}
	return &Authority{cert, signer, cert.ExtKeyUsage[0]}, nil
}

// Client signs a TLS client certificate of automation, which takes one role.
func (a *Authority) Client(key crypto.PublicKey, h Holder, serial uint64, v Validity) (*x509.Certificate, error) {
	if err := h.Check(); err != nil {
		return nil, err
	}
	switch {
	case a.usage != x509.ExtKeyUsageClientAuth:
		return nil, mistake("use the TLS client authority", "%s signs no clients", a.Certificate.Subject.CommonName)
	case len(h.Roles) != 1 || h.Roles[0] == trust.Approver:
		return nil, mistake("give one of observer, responder, commander", "a client certificate takes exactly one role, and approves nothing")
	case len(h.SourceAddresses) > 0 || h.VerifyRequired:
		return nil, mistake("leave it out, or issue an SSH certificate", "a client certificate has no source address and no PIN")
	case v.NotAfter.Sub(v.NotBefore) > MaxLife:
		return nil, mistake("give --for 168h or less", "agents refuse certificates that last longer than %s", short(MaxLife))
	}
	uri, err := credential.ClientURI(h.Clusters, h.Roles[0], h.Scope)
	if err != nil {
		return nil, mistake("", "%w", err)
	}
	return a.sign(&x509.Certificate{Subject: pkix.Name{CommonName: h.Person}, URIs: []*url.URL{uri}}, key, serial, v)
}

// Server signs the TLS certificate of a server, whose name is NODE.CLUSTER.
func (a *Authority) Server(key crypto.PublicKey, name string, serial uint64, v Validity) (*x509.Certificate, error) {
	if err := CheckServer(name); err != nil {
		return nil, err
	}
	if a.usage != x509.ExtKeyUsageServerAuth {
		return nil, mistake("use the TLS server authority", "%s signs no servers", a.Certificate.Subject.CommonName)
	}
	return a.sign(&x509.Certificate{Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}}, key, serial, v)
}

// Again signs a certificate anew that this authority has signed: all as it was
// but the serial and the validity.
func (a *Authority) Again(old *x509.Certificate, serial uint64, v Validity) (*x509.Certificate, error) {
	if err := old.CheckSignatureFrom(a.Certificate); err != nil {
		return nil, mistake("name a certificate that this authority signed", "%s is not of the authority %s", old.Subject.CommonName, a.Certificate.Subject.CommonName)
	}
	if a.usage == x509.ExtKeyUsageClientAuth && v.NotAfter.Sub(v.NotBefore) > MaxLife {
		return nil, mistake("give --for 168h or less", "agents refuse certificates that last longer than %s", short(MaxLife))
	}
	return a.sign(&x509.Certificate{Subject: pkix.Name{CommonName: old.Subject.CommonName}, DNSNames: old.DNSNames, URIs: old.URIs}, old.PublicKey, serial, v)
}

func (a *Authority) sign(t *x509.Certificate, key crypto.PublicKey, serial uint64, v Validity) (*x509.Certificate, error) {
	if serial == 0 {
		return nil, fmt.Errorf("certificate of %s: serial 0 cannot be revoked", t.Subject.CommonName)
	}
	t.SerialNumber = new(big.Int).SetUint64(serial)
	t.NotBefore, t.NotAfter = v.NotBefore, v.NotAfter
	t.BasicConstraintsValid = true
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtKeyUsage = []x509.ExtKeyUsage{a.usage}
	return create(t, a.Certificate, key, a.signer)
}

func create(t, parent *x509.Certificate, key crypto.PublicKey, signer crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key, signer)
	if err != nil {
		return nil, fmt.Errorf("signing the certificate of %s: %w", t.Subject.CommonName, err)
	}
	return x509.ParseCertificate(der)
}

// mistake is an error of whoever asked for the certificate.
func mistake(next, format string, args ...any) error {
	return fault.New(fault.Usage, cmp.Or(next, "see: halligan ca issue --help"), format, args...)
}
