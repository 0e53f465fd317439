package relay

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// Request is what a client asks to be connected to, as it wrote it.
type Request struct {
	Host string
	Port uint32
}

// maxHost is the longest name that DNS has, in bytes (RFC 1035 section 2.3.4);
// no node's is longer.
const maxHost = 253

// ParseRequest reads what comes with a channel of the type direct-tcpip (RFC
// 4254 section 7.2). Where the client says that it comes from is not looked at.
func ParseRequest(data []byte) (Request, error) {
	var m struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}
	if err := gossh.Unmarshal(data, &m); err != nil {
		return Request{}, fault.New(fault.Usage, "", "a malformed request")
	}
	if m.Host == "" || len(m.Host) > maxHost {
		return Request{}, fault.New(fault.Usage, "", "a host of %d bytes", len(m.Host))
	}
	return Request{m.Host, m.Port}, nil
}

// String returns the request as one line that is safe to show.
func (r Request) String() string {
	return fmt.Sprintf("%s port %d", neutral.LineMax(r.Host, 128), r.Port)
}

// Target is one door of one node of the inventory.
type Target struct {
	Node bundle.Host
	Door trust.Door
}

// At returns where the target is.
func (t Target) At() netip.AddrPort {
	if t.Door == trust.GRPC {
		at, _ := t.Node.GRPC()
		return at
	}
	return t.Node.SSH()
}

// String returns the target for people.
func (t Target) String() string { return fmt.Sprintf("%s of %s (%s)", t.Door, t.Node.ID(), t.At()) }

// Resolve returns the target that the request names exactly: NODE,
// NODE.CLUSTER or the IP address as the inventory has it, and the port of one of
// its doors. It compares text, so that no other form of an address, and no name
// that something else would have to resolve, can mean anything. What may not be
// reached is fault.Refused, what is not there fault.NotFound, and what is
// ambiguous fault.Usage.
func Resolve(inv *bundle.Inventory, who trust.Identity, r Request) (Target, error) {
	var named, reachable []bundle.Host
	var found []Target
	for _, h := range inv.Nodes("") {
		if r.Host != h.Name && r.Host != h.ID() && r.Host != h.Address.String() {
			continue
		}
		named = append(named, h)
		if !InScope(who, h) {
			continue
		}
		reachable = append(reachable, h)
		if r.Port == uint32(h.SSHPort) {
			found = append(found, Target{h, trust.SSH})
		}
		if r.Port == uint32(h.GRPCPort) && h.GRPCPort != 0 {
			found = append(found, Target{h, trust.GRPC})
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		var ids []string
		for _, t := range found {
			ids = append(ids, t.Node.ID())
		}
		return Target{}, fault.New(fault.Usage, "say which: "+neutral.LineMax(strings.Join(ids, ", "), 256), "%d nodes are called %s", len(found), r)
	case len(reachable) > 0:
		return Target{}, fault.New(fault.Refused, "use a port of "+doors(reachable[0]), "%s is no door of %s", r, reachable[0].ID())
	case len(named) > 0:
		return Target{}, fault.New(fault.Refused, "ask for a credential for it", "the credential of %s is not for %s", who.Person, named[0].ID())
	}
	return Target{}, unknown(inv, r)
}

// InScope reports whether a credential is for the node. The node itself decides
// that again.
func InScope(who trust.Identity, h bundle.Host) bool {
	return slices.Contains(who.Clusters, h.Cluster) && (len(who.Scope.Nodes) == 0 || slices.ContainsFunc(who.Scope.Nodes, func(pattern string) bool {
		ok, _ := path.Match(pattern, h.Name)
		return ok
	}))
}

func doors(h bundle.Host) string {
	text := fmt.Sprintf("%s: ssh %d", h.ID(), h.SSHPort)
	if h.GRPCPort != 0 {
		text += fmt.Sprintf(", grpc %d", h.GRPCPort)
	}
	return text
}

// unknown says why no node has the name.
func unknown(inv *bundle.Inventory, r Request) error {
	const nodesOnly = "only nodes of the inventory are relayed to"
	a, err := netip.ParseAddr(r.Host)
	plain := a.Unmap().WithZone("")
	is := func(h bundle.Host) bool {
		return h.Name == r.Host || h.ID() == r.Host || err == nil && h.Address.Addr == plain
	}
	if i := slices.IndexFunc(inv.Bastions, is); i >= 0 {
		return fault.New(fault.Refused, nodesOnly, "%s is the bastion %s", r, inv.Bastions[i].Name)
	}
	nodes := inv.Nodes("")
	i := slices.IndexFunc(nodes, is)
	switch {
	case i >= 0:
		return fault.New(fault.Refused, "write "+nodes[i].Address.String(), "%s is not how the inventory writes an address", r)
	case err == nil && (plain.IsLoopback() || plain.IsUnspecified()):
		return fault.New(fault.Refused, nodesOnly, "%s would be the bastion itself", r)
	case err == nil:
		return fault.New(fault.Refused, nodesOnly, "no node of the bundle's inventory has the address of %s", r)
	}
	return fault.New(fault.NotFound, "names are not looked up anywhere else; see: ssh BASTION nodes", "the bundle's inventory has no node called %s", r)
}

// own refuses what an inventory must not make of a bastion: a way to its own
// doors, and to what else listens on its machine. Only where bastions and nodes
// share a machine, as in a lab, may they share an address.
func (r *Relay) own(inv *bundle.Inventory, t Target) error {
	at := t.At()
	refuse := func(why string) error {
		return fault.New(fault.Refused, "mend the inventory", "%s is %s", t, why)
	}
	if at.Addr().IsLoopback() && !r.o.Loopback {
		return refuse("on the bastion's own machine")
	}
	is := func(other netip.AddrPort) bool { return at == other || !r.o.Loopback && at.Addr() == other.Addr() }
	if slices.ContainsFunc(r.o.Never, is) {
		return refuse("the bastion itself")
	}
	for _, b := range inv.Bastions {
		grpc, served := b.GRPC()
		tunnel, taken := b.Tunnel()
		if is(b.SSH()) || served && is(grpc) || taken && is(tunnel) {
			return refuse("the bastion " + b.Name)
		}
	}
	return nil
}
