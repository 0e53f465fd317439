package bundle

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// BastionDomain is the last label of a bastion's identity, NAME.bastion; no
// cluster may have that name.
const BastionDomain = "bastion"

// Host is a node or a bastion: where to dial, and whom to expect there.
type Host struct {
	Name string `json:"name"`
	// Address is an IP address, never a host name.
	Address  IP     `json:"address"`
	SSHPort  uint16 `json:"sshPort"`
	GRPCPort uint16 `json:"grpcPort,omitempty"`
	// TunnelPort is where a bastion takes the tunnels of nodes, 0: nowhere. Nodes
	// have none.
	TunnelPort uint16 `json:"tunnelPort,omitempty"`
	// Reach is ReachOut for a node that bastions cannot dial, else ReachIn or
	// empty. Bastions have none.
	Reach string `json:"reach,omitempty"`
	// Cluster is the name of the node's, BastionDomain for a bastion.
	Cluster string `json:"-"`
}

// ID returns NODE.CLUSTER, which the host's certificates must have.
func (h Host) ID() string { return h.Name + "." + h.Cluster }

// SSH returns where its SSH door is.
func (h Host) SSH() netip.AddrPort { return netip.AddrPortFrom(h.Address.Addr, h.SSHPort) }

// GRPC returns where its gRPC door is; ok is false where it has none.
func (h Host) GRPC() (at netip.AddrPort, ok bool) {
	return netip.AddrPortFrom(h.Address.Addr, h.GRPCPort), h.GRPCPort != 0
}

// Tunnel returns where a bastion takes tunnels; ok is false where it takes none.
func (h Host) Tunnel() (at netip.AddrPort, ok bool) {
	return netip.AddrPortFrom(h.Address.Addr, h.TunnelPort), h.TunnelPort != 0
}

// How a node is reached.
const (
	ReachIn  = "in"  // bastions dial it
	ReachOut = "out" // it keeps tunnels to the bastions
)

// IP is an address that can be dialled, without a zone.
type IP struct{ netip.Addr }

// UnmarshalText refuses host names.
func (ip *IP) UnmarshalText(text []byte) error {
	a, err := netip.ParseAddr(string(text))
	if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
		return fmt.Errorf("address %.64q is not an IP address: names cannot be resolved when DNS is what failed", text)
	}
	ip.Addr = a.Unmap()
	return nil
}

// MarshalText writes the address.
func (ip IP) MarshalText() ([]byte, error) { return ip.Addr.MarshalText() }

// Cluster is one cluster of the fleet.
type Cluster struct {
	Name string `json:"name"`
	// EtcdClusterID is etcd's own, in hex; may be empty.
	EtcdClusterID string `json:"etcdClusterID,omitempty"`
	Nodes         []Host `json:"nodes"`
}

// Inventory is the part inventory.yaml.
type Inventory struct {
	Header
	PolicyVersion uint64    `json:"policyVersion"`
	Clusters      []Cluster `json:"clusters,omitempty"`
	Bastions      []Host    `json:"bastions,omitempty"`
}

func parseInventory(data, sig []byte) (*Inventory, error) {
	inv, err := decodeInventory(data)
	if err != nil {
		return nil, err
	}
	return inv, inv.attach(data, sig)
}

func decodeInventory(data []byte) (*Inventory, error) {
	inv := &Inventory{}
	if err := decode(data, inv); err != nil {
		return nil, err
	}
	if err := inv.check(InventoryPart); err != nil {
		return nil, err
	}
	if inv.PolicyVersion == 0 {
		return nil, errors.New("policyVersion: from 1")
	}
	names := map[string]bool{}
	for i := range inv.Clusters {
		c := &inv.Clusters[i]
		switch {
		case !trust.ValidCluster(c.Name) || c.Name == BastionDomain:
			return nil, fmt.Errorf("clusters[%d]: %.64q is not a name of a-z, 0-9 and -, other than %s", i, c.Name, BastionDomain)
		case names[c.Name]:
			return nil, fmt.Errorf("cluster %s is there twice", c.Name)
		case c.EtcdClusterID != "" && !etcdForm.MatchString(c.EtcdClusterID):
			return nil, fmt.Errorf("cluster %s: etcdClusterID %.64q is not a number in hex", c.Name, c.EtcdClusterID)
		}
		names[c.Name] = true
		if err := hosts(c.Nodes, c.Name); err != nil {
			return nil, err
		}
	}
	if err := hosts(inv.Bastions, BastionDomain); err != nil {
		return nil, err
	}
	// A node a.prod of staging beside a node a of prod: one name, two readings.
	ids := map[string]bool{}
	for _, h := range inv.all() {
		ids[h.ID()] = true
	}
	for _, h := range inv.all() {
		if ids[h.Name] {
			return nil, fmt.Errorf("node %s has the name that another one has with its cluster", h.ID())
		}
	}
	return inv, nil
}

func hosts(list []Host, cluster string) error {
	names, addresses := map[string]bool{}, map[netip.AddrPort]string{}
	for i := range list {
		h := &list[i]
		h.Cluster = cluster
		if !trust.ValidNode(h.Name) {
			return fmt.Errorf("%s: %.64q is not a name of a-z, 0-9, - and dots", cluster, h.Name)
		}
		if names[h.Name] {
			return fmt.Errorf("%s is there twice", h.ID())
		}
		if !h.Address.IsValid() || h.SSHPort == 0 || h.SSHPort == h.GRPCPort {
			return fmt.Errorf("%s: want an address, an sshPort and another grpcPort, if any", h.ID())
		}
		switch bastion := cluster == BastionDomain; {
		case bastion && h.Reach != "":
			return fmt.Errorf("%s: reach is a node's", h.ID())
		case !bastion && h.TunnelPort != 0:
			return fmt.Errorf("%s: tunnelPort is a bastion's", h.ID())
		case h.Reach != "" && h.Reach != ReachIn && h.Reach != ReachOut:
			return fmt.Errorf("%s: reach %.64q is neither %s nor %s", h.ID(), h.Reach, ReachIn, ReachOut)
		case h.TunnelPort != 0 && (h.TunnelPort == h.SSHPort || h.TunnelPort == h.GRPCPort):
			return fmt.Errorf("%s: want another tunnelPort than those of its doors", h.ID())
		}
		names[h.Name] = true
		for _, port := range []uint16{h.SSHPort, h.GRPCPort, h.TunnelPort} {
			at := netip.AddrPortFrom(h.Address.Addr, port)
			if was, ok := addresses[at]; ok && port != 0 {
				return fmt.Errorf("%s and %s have the same address %s", was, h.ID(), at)
			}
			addresses[at] = h.ID()
		}
	}
	return nil
}

// all returns the nodes, and after them the bastions.
func (inv *Inventory) all() (list []Host) {
	for _, c := range inv.Clusters {
		list = append(list, c.Nodes...)
	}
	return append(list, inv.Bastions...)
}

// Nodes returns the nodes of the cluster in the file's order, of all clusters
// for "".
func (inv *Inventory) Nodes(cluster string) (list []Host) {
	for _, c := range inv.Clusters {
		if cluster == "" || c.Name == cluster {
			list = append(list, c.Nodes...)
		}
	}
	return list
}

// Cluster returns the cluster of that name.
func (inv *Inventory) Cluster(name string) (Cluster, bool) {
	for _, c := range inv.Clusters {
		if c.Name == name {
			return c, true
		}
	}
	return Cluster{}, false
}

// Find returns the node that is called NODE, NODE.CLUSTER or by its IP address,
// in the cluster, or in any for "". A name that several nodes have is an error
// that lists them (fault.Usage); one that none has is fault.NotFound.
func (inv *Inventory) Find(name, cluster string) (Host, error) {
	return find(inv.Nodes(cluster), name, "node")
}

// Bastion returns the bastion that is called NAME, NAME.bastion or by its IP
// address.
func (inv *Inventory) Bastion(name string) (Host, error) { return find(inv.Bastions, name, "bastion") }

func find(list []Host, name, kind string) (Host, error) {
	var found []Host
	address, err := netip.ParseAddr(name)
	for _, h := range list {
		if h.ID() == name || h.Name == name || err == nil && h.Address.Addr == address.Unmap() {
			found = append(found, h)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		const most = 8
		var known []string
		for i, h := range list {
			if i == most {
				known = append(known, "...")
				break
			}
			known = append(known, h.ID())
		}
		return Host{}, fault.New(fault.NotFound, "known are: "+strings.Join(known, ", "), "the bundle's inventory has no %s %.128q", kind, name)
	}
	var ids []string
	for _, h := range found {
		ids = append(ids, h.ID())
	}
	return Host{}, fault.New(fault.Usage, "say which: "+strings.Join(ids, ", "), "%d hosts of the bundle's inventory are called %.128q", len(found), name)
}
