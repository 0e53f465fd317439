package credential

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"slices"
	"sync/atomic"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// Servers verifies agents and bastions for a client, under the bundle that it
// has: each is pinned by its name NODE.CLUSTER, and none is trusted on first
// use. A server's certificate may be past an edge of its validity by the
// policy's grace, so that a lying clock locks nobody out; Warn is told.
//
// It is safe for concurrent use.
type Servers struct {
	Bundle interface{ Current() *bundle.Bundle }
	Clock  Clock
	// Warn, if any, is told in one line of a server that is let pass within the
	// grace.
	Warn func(text string)

	cached atomic.Pointer[rules]
}

func (s *Servers) rules() *rules { return rulesOf(&s.cached, s.Bundle.Current()) }

func unverified(name string, err error) error {
	return fault.New(fault.Unauthenticated, "do not go around this: the server there is not who it should be, or its certificate must be renewed",
		"the server is not %s by this bundle: %w", name, err)
}

// HostKey verifies the host certificate of the one server of that name,
// whatever the address dialled. Errors are fault.Unauthenticated.
func (s *Servers) HostKey(name string) gossh.HostKeyCallback {
	return func(_ string, _ net.Addr, key gossh.PublicKey) error {
		cert, ok := key.(*gossh.Certificate)
		if !ok {
			return unverified(name, fmt.Errorf("it shows a plain key and no certificate"))
		}
		if err := s.hostCertificate(cert, name); err != nil {
			return unverified(name, err)
		}
		return nil
	}
}

func (s *Servers) hostCertificate(cert *gossh.Certificate, name string) error {
	r := s.rules()
	id, err := common(cert, gossh.HostCert, "host", r.isHostCA)
	if err != nil {
		return err
	}
	switch life := id.NotAfter.Sub(id.NotBefore); {
	case name == "" || cert.KeyId != name || !slices.Equal(cert.ValidPrincipals, []string{name}):
		return fmt.Errorf("its certificate is for %q (key ID %q)", cert.ValidPrincipals, cert.KeyId)
	case life > MaxServer:
		return fmt.Errorf("its certificate lives %v; %v is the most", life, MaxServer)
	}
	if _, _, err := scopeOf(cert.Extensions); err != nil {
		return err
	}
	if err := r.revoked(id); err != nil {
		return err
	}
	if err := s.admit(r, id); err != nil {
		return err
	}
	checker := gossh.CertChecker{Clock: func() time.Time { return id.NotBefore }} // no critical option is known
	return checker.CheckCert(name, cert)
}

// admit applies the clock rule to a server.
func (s *Servers) admit(r *rules, id trust.Identity) error {
	id.Kind = trust.Person // who has the grace
	late, err := r.admit(id, s.Clock.Now())
	if err != nil {
		return fmt.Errorf("%s", err.Message)
	}
	if late && s.Warn != nil {
		s.Warn(fmt.Sprintf("the certificate of %s is valid from %s to %s, and here it is %s", id.Person, stamp(id.NotBefore), stamp(id.NotAfter), stamp(s.Clock.Now())))
	}
	return nil
}

// TLS returns the settings of a client's connection to the one server of that
// name. The standard library's verification is replaced, not left out: names
// and roots come from the bundle, and the time from the clock rule.
func (s *Servers) TLS(name string) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		ServerName:         name,
		InsecureSkipVerify: true, // #nosec G402 -- VerifyConnection verifies, resumed sessions too
		VerifyConnection: func(c tls.ConnectionState) error {
			return s.ServerCertificate(name, c.PeerCertificates)
		},
	}
}

// ServerCertificate verifies the certificate of the one TLS server of that
// name. Errors are fault.Unauthenticated.
func (s *Servers) ServerCertificate(name string, certs []*x509.Certificate) error {
	if len(certs) == 0 {
		return unverified(name, fmt.Errorf("it shows no certificate"))
	}
	if err := s.serverCertificate(certs[0], name); err != nil {
		return unverified(name, err)
	}
	return nil
}

func (s *Servers) serverCertificate(leaf *x509.Certificate, name string) error {
	r := s.rules()
	id, err := serverIdentity(leaf, name, r, s.Clock.Now())
	if err != nil {
		return err
	}
	if err := r.revoked(id); err != nil {
		return err
	}
	return s.admit(r, id)
}

// serverIdentity returns the server of that name, whose certificate it is by one of
// the policy's authorities. Its time and the revocations are for the caller.
func serverIdentity(leaf *x509.Certificate, name string, r *rules, now time.Time) (id trust.Identity, err error) {
	if err := leafCertificate(leaf, x509.ExtKeyUsageServerAuth, MaxServer); err != nil {
		return id, err
	}
	if name == "" || !slices.Equal(leaf.DNSNames, []string{name}) || len(leaf.URIs)+len(leaf.EmailAddresses)+len(leaf.IPAddresses) > 0 {
		return id, fmt.Errorf("its certificate is for %q", leaf.DNSNames)
	}
	key, err := sshKey(leaf.PublicKey)
	if err != nil {
		return id, err
	}
	ca, err := chain(leaf, r.tlsServer, x509.ExtKeyUsageServerAuth, now)
	if err != nil {
		return id, err
	}
	return trust.Identity{Person: name, Door: trust.GRPC, Serial: leaf.SerialNumber.String(), Fingerprint: gossh.FingerprintSHA256(key), CA: ca, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}, nil
}
