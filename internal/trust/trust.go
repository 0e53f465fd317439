// Package trust says who somebody is and what that person may do. Every door
// ends in one Identity value, and every decision uses only that: [Policy.Decide]
// is the one function that allows or refuses.
//
// Identities come from the kernel (console), from certificates under the signed
// bundle (trust/bundle, trust/credential), and from nowhere else. This package
// must never look at a request to find out who sent it, and must never need
// anything but files and a clock. It stands on floor 0.
package trust

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"slices"
	"time"
)

// Role is what somebody came as. Observer, Responder and Commander are a
// ladder: each has what the one before has. Approver is beside it.
type Role int

// The roles. The zero value is nobody: it may do nothing.
const (
	None Role = iota
	Observer
	Responder
	Commander
	// Approver reads plans and signs approvals, nothing else.
	Approver
)

var roleNames = [...]string{None: "none", Observer: "observer", Responder: "responder", Commander: "commander", Approver: "approver"}

// Roles returns every role that can be taken.
func Roles() []Role { return []Role{Observer, Responder, Commander, Approver} }

// String returns the role's name.
func (r Role) String() string {
	if r < None || int(r) >= len(roleNames) {
		return fmt.Sprintf("role(%d)", int(r))
	}
	return roleNames[r]
}

// ParseRole returns the role of that name; None is not one that can be named.
func ParseRole(name string) (Role, error) {
	if i := slices.Index(roleNames[:], name); i > int(None) {
		return Role(i), nil
	}
	return None, fmt.Errorf("unknown role %q: observer, responder, commander or approver", name)
}

// Has reports whether the role is on the ladder at or above the rung.
func (r Role) Has(rung Role) bool {
	return rung > None && rung <= Commander && r >= rung && r <= Commander
}

// Door is how somebody came in.
type Door string

// The doors of a daemon.
const (
	Console Door = "console" // Unix socket at the node itself
	SSH     Door = "ssh"     // exec, shell or subsystem of the SSH server
	GRPC    Door = "grpc"    // gRPC over mTLS
)

// Kind is what vouches for an identity.
type Kind string

// The kinds. Only Person and Sealed stand for somebody who is awake.
const (
	Local      Kind = "local"      // the kernel of this machine
	Person     Kind = "person"     // SSH user certificate
	Sealed     Kind = "sealed"     // FIDO2 key that the policy itself lists
	Automation Kind = "automation" // X.509 client certificate, or an SSH one marked so
	Bastion    Kind = "bastion"    // TLS server certificate NAME.bastion, at an agent
	Node       Kind = "node"       // TLS server certificate NODE.CLUSTER, at a bastion
)

// Scope narrows what an identity may do below its role; an empty list narrows
// nothing. Entries are patterns of path.Match.
type Scope struct {
	Actions, Namespaces, Nodes []string
	// Drill allows canary objects of the drill's own namespace only.
	Drill bool
}

// Identity is somebody whom a door has authenticated.
type Identity struct {
	// Person is the stable name that records and caps go by: the key ID of a
	// certificate, or console/0 for the login uid 0 at the node's console.
	Person string
	// Role is the one taken for this session; None at a bastion, where nobody
	// takes any, and for a bastion or a node, which have none.
	Role Role
	Door Door
	Kind Kind
	// Fingerprint is that of the key that was proven (SHA256:...), empty at the
	// console; Serial is the certificate's, in decimal.
	Fingerprint, Serial string
	// Source is the peer's address, IP:PORT, empty at the console.
	Source string
	// NotBefore and NotAfter are when the credential begins and ends by its own
	// word; zero: never.
	NotBefore, NotAfter time.Time
	// CA is the fingerprint of the authority's key that signed the certificate
	// (SHA256:...), empty at the console and for a sealed credential.
	CA string
	// Late is set when the credential is past an edge of its validity and was
	// admitted by the clock rule.
	Late  bool
	Scope Scope
	// Clusters and Roles are those that the credential is for. Only a bastion
	// notes them: an agent has one cluster, and takes people in one role.
	Clusters []string
	Roles    []Role
	// Session names the connection in records, see NewSession. The door makes it
	// up; it proves nothing.
	Session string
}

// NewSession returns a name for a connection that began now. It sorts by time and
// may be part of a file's name.
func NewSession(now time.Time) string {
	var random [5]byte
	_, _ = rand.Read(random[:]) // never fails: crypto/rand
	return now.UTC().Format("20060102-150405") + "-" + hex.EncodeToString(random[:])
}

// May reports whether the identity has at least the role.
func (i Identity) May(least Role) bool { return i.Person != "" && i.Role.Has(least) }
