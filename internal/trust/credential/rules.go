package credential

import (
	"crypto/x509"
	"slices"
	"sync/atomic"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// rules is what a bundle says about credentials, in the form that it is asked
// for. Keys go by their SHA-256 fingerprint.
type rules struct {
	of                    *bundle.Bundle
	userCAs, hostCAs      map[string]bool
	tlsClient, tlsServer  []authority
	grace, maxCertificate time.Duration
	sealed                []sealedKey
}

type authority struct {
	cert        *x509.Certificate
	fingerprint string
}

type sealedKey struct {
	person, fingerprint string
	role                trust.Role
	clusters            []string
	notBefore, notAfter time.Time
}

// rulesOf returns the rules of the bundle, made once for each.
func rulesOf(cached *atomic.Pointer[rules], b *bundle.Bundle) *rules {
	if r := cached.Load(); r != nil && r.of == b {
		return r
	}
	p := b.Policy
	r := &rules{
		of: b, userCAs: fingerprints(p.Authorities.User), hostCAs: fingerprints(p.Authorities.Host),
		tlsClient: authorities(p.Authorities.TLSClient), tlsServer: authorities(p.Authorities.TLSServer),
		grace: time.Duration(p.Grace), maxCertificate: min(time.Duration(p.MaxCertificate), bundle.MaxCertificate),
	}
	for _, s := range p.Sealed {
		role, err := trust.ParseRole(s.Role)
		if err != nil {
			continue // bundle.Parse refuses such a policy
		}
		r.sealed = append(r.sealed, sealedKey{s.Person, s.Key.Fingerprint(), role, s.Clusters, s.NotBefore, s.NotAfter})
	}
	cached.Store(r)
	return r
}

func fingerprints(keys []bundle.Key) map[string]bool {
	set := map[string]bool{}
	for _, k := range keys {
		set[k.Fingerprint()] = true
	}
	return set
}

// authorities leaves out those with a key that is not accepted.
func authorities(cas bundle.CAs) (list []authority) {
	for _, cert := range cas.Certificates {
		if key, err := sshKey(cert.PublicKey); err == nil {
			list = append(list, authority{cert, gossh.FingerprintSHA256(key)})
		}
	}
	return list
}

func (r *rules) isUserCA(fingerprint string) bool { return r.userCAs[fingerprint] }
func (r *rules) isHostCA(fingerprint string) bool { return r.hostCAs[fingerprint] }

func (r *rules) isClientCA(fingerprint string) bool {
	return slices.ContainsFunc(r.tlsClient, func(a authority) bool { return a.fingerprint == fingerprint })
}

func (r *rules) isServerCA(fingerprint string) bool {
	return slices.ContainsFunc(r.tlsServer, func(a authority) bool { return a.fingerprint == fingerprint })
}

// revoked says by what an identity is revoked: serial, key ID, key or authority.
func (r *rules) revoked(id trust.Identity) *fault.Error {
	if by, revoked := r.of.Revocations.Identity(id); revoked {
		return refuseNext("ask for another credential", "the credential of %s is revoked by its %s", id.Person, by)
	}
	return nil
}
