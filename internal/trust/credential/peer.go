package credential

import (
	"crypto/x509"
	"net"
	"slices"
	"strings"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// Tunnel authenticates a node that keeps a tunnel to this bastion: it shows what it
// shows its own clients, the TLS server certificate NODE.CLUSTER, and must be in
// the inventory. It is trust.Node, and may be past an edge of its validity by the
// grace, so that a lying clock keeps nobody from it. Errors are as User's.
func (a *Authority) Tunnel(certs []*x509.Certificate, source net.Addr) (trust.Identity, error) {
	if len(certs) == 0 {
		return trust.Identity{}, refuse("no certificate of a node")
	}
	return a.server(certs[0], trust.Node, source)
}

// isBastion reports whether a certificate says that it is a bastion's, and not
// whether that is true.
func isBastion(leaf *x509.Certificate) bool {
	return slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}) && len(leaf.DNSNames) == 1 && strings.HasSuffix(leaf.DNSNames[0], "."+bundle.BastionDomain)
}

// server authenticates a bastion or a node as itself. It has no role, so that
// whatever it may do must say so by its kind.
func (a *Authority) server(leaf *x509.Certificate, kind trust.Kind, source net.Addr) (trust.Identity, error) {
	if len(leaf.DNSNames) != 1 {
		return trust.Identity{}, refuse("certificate of a %s: it is for %q", kind, leaf.DNSNames)
	}
	r, now := a.rules(), a.Clock.Now()
	id, err := serverIdentity(leaf, leaf.DNSNames[0], r, now)
	if err != nil {
		return trust.Identity{}, refuse("certificate of a %s: %w", kind, err)
	}
	id.Kind = kind
	late, unfit := r.admit(id, now)
	if unfit == nil {
		unfit = r.server(id)
	}
	if unfit != nil {
		return trust.Identity{}, unfit
	}
	if id.Late = late; source != nil {
		id.Source = source.String()
	}
	return id, nil
}

// server says whether a bastion or a node still stands, but for its time.
func (r *rules) server(id trust.Identity) *fault.Error {
	hosts := r.of.Inventory.Bastions
	if id.Kind == trust.Node {
		hosts = r.of.Inventory.Nodes("")
	}
	switch {
	case !slices.ContainsFunc(hosts, func(h bundle.Host) bool { return h.ID() == id.Person }):
		return refuse("the bundle's inventory has no %s %s", id.Kind, id.Person)
	case !r.isServerCA(id.CA):
		return refuse("the authority that vouched for %s is no longer in the policy", id.Person)
	}
	return r.revoked(id)
}
