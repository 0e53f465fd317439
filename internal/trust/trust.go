// Package trust says who somebody is and what the person's role may do. Every
// door ends in one Identity value, and every decision uses only that.
//
// Today the only door is the console socket, whose identity comes from the
// kernel; the signed bundle and certificates will produce the same value. This
// package must never look at a request to find out who sent it. It stands on
// floor 0.
package trust

import "fmt"

// Role is a rung of the ladder: each has what the one before has.
type Role int

// The ladder. The zero value is nobody: it may do nothing.
const (
	None Role = iota
	Observer
	Responder
	Commander
)

var roleNames = [...]string{None: "none", Observer: "observer", Responder: "responder", Commander: "commander"}

// String returns the role's name.
func (r Role) String() string {
	if r < None || int(r) >= len(roleNames) {
		return fmt.Sprintf("role(%d)", int(r))
	}
	return roleNames[r]
}

// ParseRole returns the role of that name; None is not one that can be named.
func ParseRole(name string) (Role, error) {
	for r := Observer; int(r) < len(roleNames); r++ {
		if roleNames[r] == name {
			return r, nil
		}
	}
	return None, fmt.Errorf("unknown role %q: observer, responder or commander", name)
}

// Identity is somebody whom a door has authenticated.
type Identity struct {
	// Person is the stable name that records and caps go by, such as
	// console/0 for the login uid 0 at the node's console.
	Person string
	// Role is the one taken for this session.
	Role Role
	// Door is how the person came in: "console".
	Door string
}

// May reports whether the identity has at least the role.
func (i Identity) May(least Role) bool { return i.Person != "" && least > None && i.Role >= least }
