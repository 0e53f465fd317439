// Package credential turns what somebody has proven to hold into a
// [trust.Identity]: an SSH user certificate, a sealed FIDO2 key that the policy
// lists, or an X.509 client certificate. It also ends live sessions when that
// ceases to hold, and lets clients verify the servers they reach.
//
// It decides by the bundle in force, a clock and nothing else. It must never
// accept a credential with an option that it does not understand or cannot
// enforce, never trust a server on first use, and never look at what is asked
// for: that is [trust.Policy]'s. The signature checks are x/crypto's and the
// standard library's; the strict rules around them are here. It stands on
// floor 0.
package credential

import (
	"context"
	"net"
	"path"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/pubkey"
)

// Bundles is where the bundle in force comes from: a *bundle.Store.
type Bundles interface {
	// Current returns the bundle in force, never nil.
	Current() *bundle.Bundle
	// Subscribe returns a channel that gets a value whenever another bundle is
	// in force, until cancel is called.
	Subscribe() (changed <-chan struct{}, cancel func())
}

// Clock tells the time that every check uses: a *trust.Clock. It must not run
// backwards.
type Clock interface{ Now() time.Time }

// Options are what an Authority works with. All but Alarm are required.
type Options struct {
	Bundle Bundles
	Clock  Clock
	// Cluster and Node are the names that this daemon has in the bundle. An
	// Authority without a cluster admits nobody, unless it is a relay's.
	Cluster, Node string
	// Relay makes it a bastion's: a credential is as good as its signature, its
	// time and the revocations say, whatever its clusters and nodes, which the
	// identity names for whoever picks what to reach. SSH user names mean
	// nothing, and nobody takes a role.
	Relay bool
	// Alarm, if any, is told of sessions that are allowed but must not go
	// unnoticed: a sealed credential, or one past an edge of its validity. It is
	// called once for each session, by Hold, and must not block.
	Alarm func(who trust.Identity, why string)
	// Panicked, if any, is told of a fault of the daemon that ended a session.
	Panicked func(who trust.Identity, what any, stack []byte)
}

// Authority authenticates for one daemon. It is safe for concurrent use.
type Authority struct {
	Options
	cached atomic.Pointer[rules]
}

// New returns an Authority.
func New(o Options) *Authority { return &Authority{Options: o} }

func (a *Authority) rules() *rules { return rulesOf(&a.cached, a.Bundle.Current()) }

// refuse says in one line why somebody is not let in.
func refuse(format string, args ...any) *fault.Error {
	return fault.New(fault.Unauthenticated, "", format, args...)
}

// refuseNext is refuse with what to do about it.
func refuseNext(next, format string, args ...any) *fault.Error {
	return fault.New(fault.Unauthenticated, next, format, args...)
}

const renew = "renew it: halligan ca renew"

// User authenticates the holder of an SSH key who logs in with the SSH user
// name, which is the role to take. The key must be one whose private half was
// proven, or the answer says nothing of who is there (it may be asked before
// that to refuse early). source is the peer's address. Nothing is remembered
// and nobody is alarmed: call Hold for the session.
//
// Errors are fault.Unauthenticated with the reason, which is for the log: a
// stranger should not read it.
func (a *Authority) User(key gossh.PublicKey, user string, source net.Addr) (trust.Identity, error) {
	role, err := trust.ParseRole(user)
	switch {
	case a.Relay:
		role, err = trust.None, nil
	case err != nil:
		return trust.Identity{}, refuseNext("log in as the role to take", "%w", err)
	}
	var id trust.Identity
	switch cert, ok := key.(*gossh.Certificate); {
	case key == nil:
		return trust.Identity{}, refuse("no key")
	case ok:
		id, err = a.certified(cert, role, source)
	default:
		id, err = a.sealed(key, role)
	}
	if err != nil {
		return trust.Identity{}, err
	}
	if source != nil {
		id.Source = source.String()
	}
	return id, nil
}

// Offered says cheaply whether a key that somebody merely offers could be let
// in: a certificate that names an authority of the policy, or a sealed key. It
// proves nothing, and checks no signature.
func (a *Authority) Offered(key gossh.PublicKey) bool {
	r := a.rules()
	if cert, ok := key.(*gossh.Certificate); ok {
		return cert.CertType == gossh.UserCert && r.isUserCA(gossh.FingerprintSHA256(cert.SignatureKey))
	}
	return pubkey.Security(key) && slices.ContainsFunc(r.sealed, func(s sealedKey) bool { return s.fingerprint == gossh.FingerprintSHA256(key) })
}

// admit applies the clock rule, and says whether the identity is late.
func (r *rules) admit(id trust.Identity, now time.Time) (late bool, err *fault.Error) {
	early, over := now.Before(id.NotBefore), !now.Before(id.NotAfter)
	if !early && !over {
		return false, nil
	}
	grace := r.grace
	if id.Kind != trust.Person && id.Kind != trust.Node { // people come through a node's tunnel
		grace = 0
	}
	switch {
	case early && !now.Before(id.NotBefore.Add(-grace)), over && now.Before(id.NotAfter.Add(grace)):
		return true, nil
	case early:
		return false, refuseNext("compare the clocks", "the credential of %s is not valid before %s, and here it is %s", id.Person, stamp(id.NotBefore), stamp(now))
	}
	return false, refuseNext(renew, "the credential of %s ended at %s, and here it is %s", id.Person, stamp(id.NotAfter), stamp(now))
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// here refuses credentials for other clusters or nodes.
func (a *Authority) here(id trust.Identity, clusters []string) *fault.Error {
	if a.Relay {
		return nil
	}
	if a.Cluster == "" || !slices.Contains(clusters, a.Cluster) {
		return refuse("the credential of %s is for %q, and this is cluster %q", id.Person, clusters, a.Cluster)
	}
	if len(id.Scope.Nodes) > 0 && !slices.ContainsFunc(id.Scope.Nodes, func(pattern string) bool {
		ok, _ := path.Match(pattern, a.Node)
		return ok
	}) {
		return refuse("the credential of %s is for nodes %q, and this is %q", id.Person, id.Scope.Nodes, a.Node)
	}
	return nil
}

// Check says whether the identity, which this Authority or one before a restart
// has let in, would still stand: not over, not revoked, its authority still in
// the policy, a sealed key still listed. Who was let in within the validity is
// over at its end; who was let in late, at the end of the grace. The kernel
// vouches for a local identity for as long as it is connected. What was taken
// back has [trust.ErrRevoked] in its chain; what merely lapsed has not.
func (a *Authority) Check(id trust.Identity) error {
	if id.Kind == trust.Local {
		return nil
	}
	if err := a.check(id, a.rules(), a.Clock.Now()); err != nil {
		return err
	}
	return nil
}

func (a *Authority) check(id trust.Identity, r *rules, now time.Time) *fault.Error {
	late, err := r.admit(id, now)
	if err != nil {
		return err
	}
	if late && !id.Late {
		return refuseNext(renew+", or connect again within the grace", "the credential of %s ended at %s", id.Person, stamp(id.NotAfter))
	}
	if err := a.standing(id, r); err != nil {
		err.Cause = trust.ErrRevoked // unlike one that lapsed
		return err
	}
	return nil
}

// standing is check without the time.
func (a *Authority) standing(id trust.Identity, r *rules) *fault.Error {
	if id.Kind == trust.Bastion || id.Kind == trust.Node {
		return r.server(id)
	}
	if life := id.NotAfter.Sub(id.NotBefore); id.Kind != trust.Sealed && life > r.maxCertificate {
		return refuse("the certificate of %s lives %v; the policy allows %v", id.Person, life, r.maxCertificate)
	}
	switch {
	case id.Kind == trust.Sealed:
		return a.checkSealed(id, r)
	case id.CA == "":
		return refuse("nothing vouches for %s", id.Person)
	case !r.isUserCA(id.CA) && !r.isClientCA(id.CA):
		return refuse("the authority that vouched for %s is no longer in the policy", id.Person)
	}
	return r.revoked(id)
}

// checkEvery is how often a live session is checked against the wall clock. A
// revocation ends a session at once; the ticks are for clocks that jump, and
// for a subscription that fails to tell.
const checkEvery = 500 * time.Millisecond

// Hold returns a context for the identity's session. It ends, with the
// *fault.Error as its cause, within a second of Check no longer holding, and in
// any case when the credential's time is over by the monotonic clock: setting
// the wall clock back prolongs nothing. The caller must call cancel, which
// waits until the watch has ended. A fault of the watch ends the session, since
// then nobody knows whether the identity still holds.
func (a *Authority) Hold(ctx context.Context, id trust.Identity) (context.Context, context.CancelFunc) {
	ctx, end := context.WithCancelCause(ctx)
	if id.Kind == trust.Local {
		return ctx, func() { end(nil) }
	}
	changed, unsubscribe := a.Bundle.Subscribe()
	r, now := a.rules(), a.Clock.Now()
	if err := a.check(id, r, now); err != nil {
		unsubscribe()
		end(err)
		return ctx, func() {}
	}
	if a.Alarm != nil {
		switch {
		case id.Kind == trust.Sealed:
			a.Alarm(id, "a sealed credential is in use; rotate it afterwards")
		case id.Late:
			a.Alarm(id, "admitted past an edge of the certificate's validity ("+stamp(id.NotBefore)+" to "+stamp(id.NotAfter)+")")
		}
	}
	left := id.NotAfter.Sub(now)
	if id.Late {
		left += r.grace
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer unsubscribe()
		defer func() {
			if p := recover(); p != nil {
				end(refuseNext("log in again, and report it with the daemon's log of this moment", "a fault of the daemon: whether the credential of %s still holds is not known", id.Person))
				if a.Panicked != nil {
					a.Panicked(id, p, debug.Stack())
				}
			}
		}()
		over := time.NewTimer(left)
		defer over.Stop()
		tick := time.NewTicker(checkEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-over.C:
				end(refuseNext(renew, "the credential of %s ended at %s", id.Person, stamp(id.NotAfter)))
				return
			case <-changed:
			case <-tick.C:
			}
			if err := a.Check(id); err != nil {
				end(err)
				return
			}
		}
	}()
	return ctx, func() { end(nil); <-done }
}

// Approver returns who stands behind a certificate under which an approval was
// signed. It must be a person's, name the role approver, and be valid now to the
// second: the grace is for people at a door. An option that only a door could
// enforce refuses. needsPIN says that the signature must prove that the key has
// verified its user.
func (a *Authority) Approver(cert *gossh.Certificate) (who trust.Identity, needsPIN bool, err error) {
	id, err := a.vouched(cert, trust.Approver, true)
	if err != nil {
		return trust.Identity{}, false, err
	}
	if _, bound := cert.CriticalOptions[optionSourceAddress]; bound {
		return trust.Identity{}, false, refuse("an approver's certificate cannot be bound to an address, since the approval is carried by another")
	}
	if id.Kind != trust.Person || id.Scope.Drill {
		return trust.Identity{}, false, refuse("%s is not a person who approves", id.Person)
	}
	if id.Late {
		return trust.Identity{}, false, refuseNext("ask for a renewed certificate and another approval", "the certificate of approver %s is not valid now", id.Person)
	}
	_, needsPIN = cert.CriticalOptions[optionVerifyRequired]
	return id, needsPIN, nil
}
