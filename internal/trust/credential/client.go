package credential

import (
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"net"
	"slices"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/pubkey"
)

// Client authenticates the holder of an X.509 client certificate, as a TLS
// handshake has proven it: the leaf is certs[0], and what comes after it is not
// looked at, since only the policy's authorities sign clients. They are always
// automation. An agent or a bastion also lets in a bastion that shows what it shows
// its own clients, as trust.Bastion and without any role. Errors are as User's.
func (a *Authority) Client(certs []*x509.Certificate, source net.Addr) (trust.Identity, error) {
	if len(certs) == 0 {
		return trust.Identity{}, refuse("no client certificate")
	}
	if (a.Relay || a.Cluster != "") && isBastion(certs[0]) {
		return a.server(certs[0], trust.Bastion, source)
	}
	r, now, leaf := a.rules(), a.Clock.Now(), certs[0]
	id, clusters, err := clientCertificate(leaf, r, now)
	if err != nil {
		return trust.Identity{}, refuse("client certificate: %w", err)
	}
	if err := a.here(id, clusters); err != nil {
		return trust.Identity{}, err
	}
	if _, err := r.admit(id, now); err != nil {
		return trust.Identity{}, err
	}
	if err := r.revoked(id); err != nil {
		return trust.Identity{}, err
	}
	if a.Relay {
		id.Role, id.Roles, id.Clusters = trust.None, []trust.Role{id.Role}, clusters
	}
	if source != nil {
		id.Source = source.String()
	}
	return id, nil
}

func clientCertificate(leaf *x509.Certificate, r *rules, now time.Time) (id trust.Identity, clusters []string, err error) {
	if err := leafCertificate(leaf, x509.ExtKeyUsageClientAuth, bundle.MaxCertificate); err != nil {
		return id, nil, err
	}
	if life := leaf.NotAfter.Sub(leaf.NotBefore); life > r.maxCertificate {
		return id, nil, fmt.Errorf("it lives %v; the policy allows %v", life, r.maxCertificate)
	}
	if len(leaf.URIs) != 1 || len(leaf.DNSNames)+len(leaf.EmailAddresses)+len(leaf.IPAddresses) > 0 {
		return id, nil, fmt.Errorf("it must name exactly one URI and nothing else")
	}
	if !trust.ValidPerson(leaf.Subject.CommonName) {
		return id, nil, fmt.Errorf("its common name %q is not a name: up to 64 of a-z 0-9 . _ @ -", leaf.Subject.CommonName)
	}
	id = trust.Identity{Person: leaf.Subject.CommonName, Door: trust.GRPC, Kind: trust.Automation, Serial: leaf.SerialNumber.String(), NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}
	if clusters, id.Role, id.Scope, err = ParseClientURI(leaf.URIs[0]); err != nil {
		return id, nil, err
	}
	if id.Role == trust.Approver {
		return id, nil, fmt.Errorf("only people approve")
	}
	key, err := sshKey(leaf.PublicKey)
	if err != nil {
		return id, nil, err
	}
	id.Fingerprint = gossh.FingerprintSHA256(key)
	id.CA, err = chain(leaf, r.tlsClient, x509.ExtKeyUsageClientAuth, now)
	return id, clusters, err
}

// leafCertificate checks what client and server certificates share.
func leafCertificate(leaf *x509.Certificate, usage x509.ExtKeyUsage, longest time.Duration) error {
	switch life := leaf.NotAfter.Sub(leaf.NotBefore); {
	case leaf.IsCA || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return fmt.Errorf("it is an authority's")
	case !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{usage}) || len(leaf.UnknownExtKeyUsage) > 0:
		return fmt.Errorf("its extended key usage must be this one only")
	case leaf.SerialNumber == nil || leaf.SerialNumber.Sign() <= 0:
		return fmt.Errorf("it has no serial number, so it cannot be revoked")
	case life <= 0 || life > longest:
		return fmt.Errorf("it lives %v; %v is the most", life, longest)
	}
	if key, ok := leaf.PublicKey.(*rsa.PublicKey); ok {
		return pubkey.CheckRSA(key)
	}
	return nil
}

// chain verifies that one of the authorities has signed the leaf itself, and
// returns the fingerprint of its key. The leaf's own span of validity is judged
// by the clock rule, not here; its authority must be valid now, or at the
// leaf's nearer edge where that is over.
func chain(leaf *x509.Certificate, authorities []authority, usage x509.ExtKeyUsage, now time.Time) (string, error) {
	if now.Before(leaf.NotBefore) {
		now = leaf.NotBefore
	} else if now.After(leaf.NotAfter) {
		now = leaf.NotAfter
	}
	err := fmt.Errorf("the policy names no authority for it")
	for _, ca := range authorities {
		roots := x509.NewCertPool()
		roots.AddCert(ca.cert)
		if _, err = leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}}); err == nil {
			return ca.fingerprint, nil
		}
	}
	return "", err
}
