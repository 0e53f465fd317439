package sshclient

import (
	"fmt"
	"slices"
	"strings"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// Options of a user certificate that decide where it is good; trust/credential
// has what they mean.
const (
	optionClusters = "clusters@halligan.io"
	automation     = "automation@halligan.io"
)

// Sealed is a key that the policy lists itself, without a certificate.
type Sealed struct {
	Person              string
	Role                trust.Role
	Clusters            []string
	NotBefore, NotAfter time.Time
}

// Want says what somebody wants to log in for, and what the bundle says of who
// may.
type Want struct {
	// Role to take; None: responder where the credential has it, else its only
	// role.
	Role trust.Role
	// Cluster to enter; empty: whichever.
	Cluster string
	// Now is this machine's time. Grace is how far beyond an edge of its
	// validity agents still admit a person.
	Now   time.Time
	Grace time.Duration
	// Authority reports whether the key signs user certificates of this fleet.
	Authority func(gossh.PublicKey) bool
	// Sealed returns what the policy says of a key without a certificate, if it
	// lists it.
	Sealed func(gossh.PublicKey) (Sealed, bool)
}

// Login is a key and the role that it is to take.
type Login struct {
	Key
	Role trust.Role
	// Person is who the credential says this is.
	Person              string
	NotBefore, NotAfter time.Time
	// Clusters are those that the credential is good for.
	Clusters []string
	// Late is set where the time is past an edge of the validity, but within the
	// grace.
	Late bool
}

// Choose returns the first key that agents would admit, as far as can be known
// here. Its error says what is wrong with the first that comes close, so that
// a person hears of an expired certificate before anything is dialled.
func (r *Keyring) Choose(w Want) (Login, error) {
	var why *fault.Error
	for _, k := range r.Keys {
		login, err := k.fit(w)
		if err == nil {
			return login, nil
		}
		if why == nil || k.Certificate != nil && why.Code == fault.NotFound {
			why = err
		}
	}
	if why == nil {
		why = fault.New(fault.Unauthenticated, "name a key with --identity or HALLIGAN_IDENTITY", "there is nothing to log in with")
	}
	if n := len(r.Keys) - 1; n > 0 {
		why = fault.New(why.Code, why.Next, "%s; none of %d other keys does either", why.Message, n)
	}
	if why.Code == fault.NotFound {
		why.Code = fault.Unauthenticated
	}
	return Login{}, why
}

func unfit(next, format string, args ...any) *fault.Error {
	return fault.New(fault.Unauthenticated, next, format, args...)
}

func (k Key) fit(w Want) (Login, *fault.Error) {
	login := Login{Key: k}
	var roles []trust.Role
	const another = "name another key with --identity"
	if c := k.Certificate; c != nil {
		switch {
		case c.CertType != gossh.UserCert:
			return login, unfit(another, "%s is no user certificate", k.Name())
		case w.Authority != nil && !w.Authority(c.SignatureKey):
			return login, unfit("take the fleet's bundle with --bundle, or a certificate of this fleet", "%s is signed by %s, which is no user authority of the bundle", k.Name(), gossh.FingerprintSHA256(c.SignatureKey))
		}
		for _, p := range c.ValidPrincipals {
			if role, err := trust.ParseRole(p); err == nil {
				roles = append(roles, role)
			}
		}
		login.Person, login.NotBefore, login.NotAfter = c.KeyId, unix(c.ValidAfter), unix(c.ValidBefore)
		login.Clusters = strings.Split(c.CriticalOptions[optionClusters], ",")
		if _, program := c.Extensions[automation]; program {
			w.Grace = 0
		}
	} else {
		sealed, listed := Sealed{}, false
		if w.Sealed != nil && k.SecurityKey() {
			sealed, listed = w.Sealed(k.Public)
		}
		if !listed {
			return login, fault.New(fault.NotFound, "put its certificate beside it as KEY-cert.pub; `halligan ca issue` makes one", "%s has no certificate", k.Name())
		}
		for _, role := range trust.Roles() {
			if sealed.Role == role || sealed.Role.Has(role) {
				roles = append(roles, role)
			}
		}
		login.Person, login.NotBefore, login.NotAfter, login.Clusters = sealed.Person, sealed.NotBefore, sealed.NotAfter, sealed.Clusters
		w.Grace = 0
	}
	var err *fault.Error
	if login.Role, err = choose(k, roles, w.Role); err != nil {
		return login, err
	}
	if w.Cluster != "" && !slices.Contains(login.Clusters, w.Cluster) {
		return login, unfit("name one of these with --cluster, or another key with --identity", "%s is for %s, not for cluster %s", k.Name(), list(login.Clusters), w.Cluster)
	}
	now := stamp(w.Now)
	early, over := w.Now.Before(login.NotBefore), !w.Now.Before(login.NotAfter)
	switch {
	case !early && !over:
	case !w.Now.Before(login.NotBefore.Add(-w.Grace)) && w.Now.Before(login.NotAfter.Add(w.Grace)):
		login.Late = true
	case early:
		return login, unfit("set this machine's clock, which says "+now, "%s begins only at %s", k.Name(), stamp(login.NotBefore))
	default:
		next := "renew it: halligan ca renew " + orFile(k.From) + "-cert.pub"
		if k.Certificate == nil {
			next = "have the policy list it anew, or use a certificate"
		}
		return login, unfit(next, "%s ended at %s, %s ago by this machine's clock", k.Name(), stamp(login.NotAfter), roughly(w.Now.Sub(login.NotAfter)))
	}
	return login, nil
}

// choose picks the role to take.
func choose(k Key, roles []trust.Role, want trust.Role) (trust.Role, *fault.Error) {
	names := make([]string, len(roles))
	for i, r := range roles {
		names[i] = r.String()
	}
	switch {
	case len(roles) == 0:
		return trust.None, unfit("name another key with --identity", "%s names no role", k.Name())
	case want != trust.None && slices.Contains(roles, want):
		return want, nil
	case want != trust.None:
		return trust.None, unfit("take one of these with --as, or another key with --identity", "%s is for %s, not for %s", k.Name(), list(names), want)
	case slices.Contains(roles, trust.Responder):
		return trust.Responder, nil
	case len(roles) == 1:
		return roles[0], nil
	}
	return trust.None, fault.New(fault.Usage, "choose one with --as", "%s is for %s", k.Name(), list(names))
}

func list(names []string) string {
	if len(names) == 0 || len(names) == 1 && names[0] == "" {
		return "none"
	}
	return strings.Join(names, ", ")
}

func orFile(from string) string {
	if strings.HasPrefix(from, "ssh-agent") {
		return "KEY"
	}
	return from
}

// unix reads a time of a certificate, which may be "forever"; agents refuse that.
func unix(t uint64) time.Time {
	return time.Unix(int64(min(t, 1<<40)), 0) // #nosec G115 -- bounded
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// roughly returns how long ago something was, in one unit.
func roughly(d time.Duration) string {
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	case d >= 2*time.Hour:
		return fmt.Sprintf("%d hours", int(d.Hours()))
	}
	return fmt.Sprintf("%d minutes", int(d.Minutes()))
}
