package credential

import (
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/pubkey"
)

// certified authenticates the holder of an SSH user certificate at a door.
func (a *Authority) certified(cert *gossh.Certificate, role trust.Role, source net.Addr) (trust.Identity, error) {
	id, err := a.vouched(cert, role, false)
	if err != nil {
		return trust.Identity{}, err
	}
	if allowed, bound := cert.CriticalOptions[optionSourceAddress]; bound {
		if err := fromAllowed(source, allowed); err != nil {
			return trust.Identity{}, refuse("the certificate of %s: %w", id.Person, err)
		}
	}
	return id, nil
}

// vouched checks all of a user certificate but where its holder is. detached is
// for a certificate that comes beside a signature, which shows whether the key
// has verified its user; a login does not show that.
func (a *Authority) vouched(cert *gossh.Certificate, role trust.Role, detached bool) (trust.Identity, error) {
	r := a.rules()
	id, clusters, roles, err := userCertificate(cert, r, detached)
	if err != nil {
		return trust.Identity{}, err
	}
	principal := role.String()
	if a.Relay && role == trust.None {
		principal = cert.ValidPrincipals[0] // any will do, and there is one
		id.Clusters, id.Roles = clusters, roles
	}
	if !slices.Contains(cert.ValidPrincipals, principal) {
		return trust.Identity{}, refuse("the certificate of %s is for %q, not for %s", id.Person, cert.ValidPrincipals, role)
	}
	id.Role = role
	if err := a.here(id, clusters); err != nil {
		return trust.Identity{}, err
	}
	if id.Late, err = r.late(id, a.Clock.Now()); err != nil {
		return trust.Identity{}, err
	}
	// Last, since it costs most: the signature. The time was judged above.
	checker := gossh.CertChecker{
		SupportedCriticalOptions: []string{OptionClusters, optionSourceAddress, optionVerifyRequired},
		Clock:                    func() time.Time { return id.NotBefore },
	}
	if err := checker.CheckCert(principal, cert); err != nil {
		return trust.Identity{}, refuse("the certificate of %s: %w", id.Person, err)
	}
	return id, nil
}

// late is admit with a plain error.
func (r *rules) late(id trust.Identity, now time.Time) (bool, error) {
	late, err := r.admit(id, now)
	if err != nil {
		return false, err
	}
	return late, nil
}

// userCertificate checks what a certificate says of itself against the rules:
// everything but the role, the place, the time and the signature.
func userCertificate(cert *gossh.Certificate, r *rules, detached bool) (id trust.Identity, clusters []string, roles []trust.Role, err error) {
	if id, err = common(cert, gossh.UserCert, "user", r.isUserCA); err != nil {
		return id, nil, nil, err
	}
	if !trust.ValidPerson(id.Person) {
		return id, nil, nil, refuse("the certificate's key ID %q is not a person's name: up to 64 of a-z 0-9 . _ @ -", cert.KeyId)
	}
	fail := func(err error) (trust.Identity, []string, []trust.Role, error) {
		return trust.Identity{}, nil, nil, refuse("the certificate of %s: %w", id.Person, err)
	}
	if len(cert.ValidPrincipals) == 0 {
		return fail(fmt.Errorf("it names no principals, which would be anybody"))
	}
	for _, p := range cert.ValidPrincipals {
		role, err := trust.ParseRole(p)
		if err != nil {
			return fail(err)
		}
		roles = append(roles, role)
	}
	if life := id.NotAfter.Sub(id.NotBefore); life > r.maxCertificate {
		return fail(fmt.Errorf("it lives %v; the policy allows %v", life, r.maxCertificate))
	}
	for option, value := range cert.CriticalOptions {
		switch option {
		case OptionClusters:
			if clusters, err = clusterNames(value); err != nil {
				return fail(err)
			}
		case optionSourceAddress:
		case optionVerifyRequired:
			if !detached || !pubkey.Security(cert.Key) || value != "" {
				return fail(fmt.Errorf("%s cannot be enforced at a login; the key itself can ask for its PIN (ssh-keygen -O verify-required)", optionVerifyRequired))
			}
		default:
			return fail(fmt.Errorf("unknown critical option %q", option))
		}
	}
	if clusters == nil {
		return fail(fmt.Errorf("it has no cluster scope (critical option %s)", OptionClusters))
	}
	scope, automation, err := scopeOf(cert.Extensions)
	if err != nil {
		return fail(err)
	}
	id.Scope = scope
	if id.Kind = trust.Person; automation {
		id.Kind = trust.Automation
	}
	if err := r.revoked(id); err != nil {
		return trust.Identity{}, nil, nil, err
	}
	return id, clusters, roles, nil
}

// common checks what user and host certificates share: kind, keys, signature
// algorithm, authority, serial and a span of validity that makes sense.
func common(cert *gossh.Certificate, kind uint32, what string, isCA func(fingerprint string) bool) (trust.Identity, error) {
	if cert == nil || cert.Key == nil || cert.SignatureKey == nil || cert.Signature == nil {
		return trust.Identity{}, refuse("an incomplete certificate")
	}
	if cert.CertType != kind {
		return trust.Identity{}, refuse("a certificate of type %d where a %s certificate belongs", cert.CertType, what)
	}
	if err := pubkey.Check(cert.Key); err != nil {
		return trust.Identity{}, refuse("the certificate's key: %w", err)
	}
	if err := pubkey.Check(cert.SignatureKey); err != nil {
		return trust.Identity{}, refuse("the certificate's authority: %w", err)
	}
	if !pubkey.Signature(cert.Signature.Format) {
		return trust.Identity{}, refuse("the certificate is signed with %s, which is not accepted", cert.Signature.Format)
	}
	id := trust.Identity{
		Person:      cert.KeyId,
		Door:        trust.SSH,
		Fingerprint: gossh.FingerprintSHA256(cert.Key),
		Serial:      strconv.FormatUint(cert.Serial, 10),
		CA:          gossh.FingerprintSHA256(cert.SignatureKey),
	}
	if !isCA(id.CA) {
		return trust.Identity{}, refuse("the certificate is signed by %s, which is no %s authority of the policy", id.CA, what)
	}
	if cert.Serial == 0 {
		return trust.Identity{}, refuse("the certificate of %q has serial 0, which cannot be revoked", cert.KeyId)
	}
	// CertTimeInfinity is beyond MaxInt64.
	if cert.ValidBefore > math.MaxInt64/int64Second || cert.ValidAfter == 0 || cert.ValidAfter >= cert.ValidBefore {
		return trust.Identity{}, refuse("the certificate of %q has no end or no beginning", cert.KeyId)
	}
	id.NotBefore, id.NotAfter = time.Unix(int64(cert.ValidAfter), 0), time.Unix(int64(cert.ValidBefore), 0)
	return id, nil
}

// int64Second keeps times within what a time.Duration spans, some 292 years.
const int64Second = uint64(time.Second)

// fromAllowed enforces source-address: a list of addresses and CIDR blocks. All
// of it must make sense, and the source be known.
func fromAllowed(source net.Addr, allowed string) error {
	if source == nil {
		return fmt.Errorf("bound to an address, and the source is not known")
	}
	from, err := netip.ParseAddrPort(source.String())
	if err != nil {
		return fmt.Errorf("bound to an address, and the source %q is none", source)
	}
	addr, within := from.Addr().Unmap().WithZone(""), false
	for _, entry := range strings.Split(allowed, ",") {
		if one, err := netip.ParseAddr(entry); err == nil {
			within = within || one.Unmap() == addr
			continue
		}
		block, err := netip.ParsePrefix(entry)
		if err != nil {
			return fmt.Errorf("%s: %q is neither an address nor a block", optionSourceAddress, entry)
		}
		within = within || block.Contains(addr)
	}
	if !within {
		return fmt.Errorf("bound to %s, and the source is %s", allowed, addr)
	}
	return nil
}

// sealed authenticates the holder of a FIDO2 key that the policy lists itself.
func (a *Authority) sealed(key gossh.PublicKey, role trust.Role) (trust.Identity, error) {
	r, fingerprint := a.rules(), ""
	if pubkey.Security(key) {
		fingerprint = gossh.FingerprintSHA256(key)
	}
	reason := refuseNext("use a certificate", "a plain key of type %s, which the policy does not list as sealed", key.Type())
	for _, s := range r.sealed {
		if s.fingerprint != fingerprint {
			continue
		}
		id := trust.Identity{Person: s.person, Role: role, Door: trust.SSH, Kind: trust.Sealed, Fingerprint: fingerprint, NotBefore: s.notBefore, NotAfter: s.notAfter}
		if a.Relay {
			id.Clusters, id.Roles = s.clusters, []trust.Role{s.role}
		}
		err := a.checkSealed(id, r)
		if err == nil {
			_, err = r.admit(id, a.Clock.Now())
		}
		if err == nil {
			return id, nil
		}
		reason = err
	}
	return trust.Identity{}, reason
}

// checkSealed checks a sealed credential against the policy's list, but for the
// time: it must be listed with at least the role taken.
func (a *Authority) checkSealed(id trust.Identity, r *rules) *fault.Error {
	if !trust.ValidPerson(id.Person) {
		return refuse("the policy's sealed key %s names no person", id.Fingerprint)
	}
	i := slices.IndexFunc(r.sealed, func(s sealedKey) bool {
		return s.fingerprint == id.Fingerprint && s.person == id.Person && s.notBefore.Equal(id.NotBefore) && s.notAfter.Equal(id.NotAfter)
	})
	if i < 0 {
		return refuse("the policy no longer lists the sealed key of %s", id.Person)
	}
	s := r.sealed[i]
	if s.role != id.Role && !s.role.Has(id.Role) && !a.Relay {
		return refuse("the sealed key of %s is for %s at most, not for %s", id.Person, s.role, id.Role)
	}
	for _, c := range id.Clusters {
		if !slices.Contains(s.clusters, c) {
			return refuse("the sealed key of %s is no longer for cluster %s", id.Person, c)
		}
	}
	if !s.notAfter.After(s.notBefore) || s.notAfter.Sub(s.notBefore) > bundle.MaxSealed {
		return refuse("the sealed key of %s is not bounded to %v", id.Person, bundle.MaxSealed)
	}
	if err := a.here(id, s.clusters); err != nil {
		return err
	}
	return r.revoked(id)
}
