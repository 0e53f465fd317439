package credential

import (
	"crypto/ecdsa"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/pubkey"
)

// Critical options and extensions of our own in an SSH user certificate.
const (
	// OptionClusters is the critical option that every user certificate must
	// carry: a comma-separated list of cluster names.
	OptionClusters = "clusters" + ours
	// ExtensionActions, ExtensionNamespaces and ExtensionNodes narrow:
	// comma-separated patterns of path.Match.
	ExtensionActions    = "actions" + ours
	ExtensionNamespaces = "namespaces" + ours
	ExtensionNodes      = "nodes" + ours
	// ExtensionDrill and ExtensionAutomation are flags with an empty value.
	ExtensionDrill      = "drill" + ours
	ExtensionAutomation = "automation" + ours

	ours = "@halligan.io"
)

// Options and extensions that others defined (OpenSSH, PROTOCOL.certkeys).
const (
	optionSourceAddress  = "source-address"
	optionVerifyRequired = "verify-required"
	extensionNoTouch     = "no-touch-required"
)

// MaxServer is the longest life of a server's certificate; those of others are
// bounded by the policy, and what it may allow by trust/bundle.
const MaxServer = 366 * 24 * time.Hour

// URIScheme is the scheme of the one URI SAN of an X.509 client certificate:
// halligan://CLUSTER[,CLUSTER]/ROLE?actions=..&namespaces=..&nodes=..[&drill].
const URIScheme = "halligan"

// Most entries of a list in a certificate, and most bytes of each.
const maxEntries, maxEntry = 64, 253

// sshKey returns the key of an X.509 certificate as an SSH one, so that one
// list of revoked keys serves both.
func sshKey(key any) (gossh.PublicKey, error) {
	if k, ok := key.(*ecdsa.PublicKey); ok && k.Curve.Params().BitSize < 256 {
		return nil, fmt.Errorf("an ECDSA key of %d bits", k.Curve.Params().BitSize)
	}
	k, err := gossh.NewPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("a key of a kind that is not accepted")
	}
	return k, pubkey.Check(k)
}

// list splits a comma-separated list: never empty, no empty or doubled entry.
func list(what, value string, valid func(string) error) ([]string, error) {
	entries := strings.Split(value, ",")
	if len(entries) > maxEntries {
		return nil, fmt.Errorf("%s: more than %d entries", what, maxEntries)
	}
	for i, entry := range entries {
		if entry == "" || len(entry) > maxEntry {
			return nil, fmt.Errorf("%s: an entry is empty or longer than %d bytes", what, maxEntry)
		}
		if slices.Contains(entries[:i], entry) {
			return nil, fmt.Errorf("%s: %q stands twice", what, entry)
		}
		if err := valid(entry); err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
	}
	return entries, nil
}

func clusterNames(value string) ([]string, error) {
	return list(OptionClusters, value, func(name string) error {
		if !trust.ValidCluster(name) {
			return fmt.Errorf("%q is not a cluster's name; patterns are not accepted here", name)
		}
		return nil
	})
}

func patterns(what, value string) ([]string, error) {
	return list(what, value, func(p string) error {
		if strings.ContainsFunc(p, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return fmt.Errorf("%q is not printable ASCII", p)
		}
		if _, err := path.Match(p, ""); err != nil {
			return fmt.Errorf("%q is not a pattern", p)
		}
		return nil
	})
}

// scopeOf reads the extensions of a user certificate that only narrow. One of
// ours that this build does not know refuses: it would be left unheeded.
func scopeOf(extensions map[string]string) (scope trust.Scope, automation bool, err error) {
	for name, value := range extensions {
		switch name {
		case extensionNoTouch:
			return scope, false, fmt.Errorf("%s is not accepted", extensionNoTouch)
		case ExtensionActions:
			scope.Actions, err = patterns(name, value)
		case ExtensionNamespaces:
			scope.Namespaces, err = patterns(name, value)
		case ExtensionNodes:
			scope.Nodes, err = patterns(name, value)
		case ExtensionDrill, ExtensionAutomation:
			if value != "" {
				err = fmt.Errorf("%s takes no value", name)
			}
			scope.Drill = scope.Drill || name == ExtensionDrill
			automation = automation || name == ExtensionAutomation
		default:
			if strings.HasSuffix(strings.ToLower(name), ours) {
				err = fmt.Errorf("unknown extension %q", name)
			}
		}
		if err != nil {
			return trust.Scope{}, false, err
		}
	}
	return scope, automation, nil
}

// ClientURI returns the URI SAN of an X.509 client certificate.
func ClientURI(clusters []string, role trust.Role, scope trust.Scope) (*url.URL, error) {
	u := &url.URL{Scheme: URIScheme, Host: strings.Join(clusters, ","), Path: "/" + role.String()}
	q := url.Values{}
	for name, entries := range map[string][]string{"actions": scope.Actions, "namespaces": scope.Namespaces, "nodes": scope.Nodes} {
		if len(entries) > 0 {
			q.Set(name, strings.Join(entries, ","))
		}
	}
	u.RawQuery = q.Encode()
	if scope.Drill {
		u.RawQuery = strings.TrimPrefix(u.RawQuery+"&drill", "&")
	}
	again, err := url.Parse(u.String())
	if err != nil {
		return nil, err
	}
	if _, _, _, err := ParseClientURI(again); err != nil {
		return nil, err
	}
	return u, nil
}

// ParseClientURI reads the URI SAN of an X.509 client certificate. Whatever it
// does not know refuses.
func ParseClientURI(u *url.URL) (clusters []string, role trust.Role, scope trust.Scope, err error) {
	refuse := func(format string, args ...any) ([]string, trust.Role, trust.Scope, error) {
		return nil, trust.None, trust.Scope{}, fmt.Errorf("the URI "+format, args...)
	}
	if u.Scheme != URIScheme || u.Opaque != "" || u.User != nil || u.Fragment != "" || u.RawFragment != "" {
		return refuse("is not of the form %s://CLUSTER/ROLE", URIScheme)
	}
	if clusters, err = clusterNames(u.Host); err != nil {
		return refuse("names no clusters: %w", err)
	}
	if role, err = trust.ParseRole(strings.TrimPrefix(u.Path, "/")); err != nil || u.Path != "/"+role.String() || u.RawPath != "" {
		return refuse("names no role: %q", u.Path)
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return refuse("has a malformed query")
	}
	for name, values := range q {
		if len(values) != 1 {
			return refuse("has %q more than once", name)
		}
		switch name {
		case "actions":
			scope.Actions, err = patterns(name, values[0])
		case "namespaces":
			scope.Namespaces, err = patterns(name, values[0])
		case "nodes":
			scope.Nodes, err = patterns(name, values[0])
		case "drill":
			if scope.Drill = true; values[0] != "" {
				err = fmt.Errorf("drill takes no value")
			}
		default:
			err = fmt.Errorf("unknown parameter %q", name)
		}
		if err != nil {
			return refuse("is not understood: %w", err)
		}
	}
	return clusters, role, scope, nil
}
