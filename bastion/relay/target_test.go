package relay

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

func host(name, cluster, address string, ssh, grpc uint16) bundle.Host {
	return bundle.Host{Name: name, Cluster: cluster, Address: bundle.IP{Addr: netip.MustParseAddr(address)}, SSHPort: ssh, GRPCPort: grpc}
}

// inventory has a name and an address twice over.
func inventory() *bundle.Inventory {
	return &bundle.Inventory{
		Clusters: []bundle.Cluster{
			{Name: "prod", Nodes: []bundle.Host{host("cp-1", "prod", "10.0.0.1", 2222, 7443), host("cp-2", "prod", "fd00::2", 2222, 0), host("lo", "prod", "127.0.0.11", 2222, 7443),
				host("trap", "prod", "10.0.0.9", 2222, 7443), host("me", "prod", "10.0.0.8", 22, 9644)}},
			{Name: "staging", Nodes: []bundle.Host{host("cp-1", "staging", "10.1.0.1", 2222, 7443), host("far", "staging", "10.0.0.1", 22, 443)}},
			{Name: "dev", Nodes: []bundle.Host{host("other", "dev", "10.9.0.1", 2222, 7443)}},
		},
		Bastions: []bundle.Host{host("bastion-a", "bastion", "10.0.0.9", 2222, 7000), host("bastion-b", "bastion", "10.0.0.10", 2222, 0)},
	}
}

func relayOf(inv *bundle.Inventory, change func(*Options)) *Relay {
	o := Options{Inventory: func() *bundle.Inventory { return inv }, Never: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.8:9644")}}
	if change != nil {
		change(&o)
	}
	return New(o)
}

// data is what a client sends that wants to be connected.
func data(name string, port uint32) []byte {
	return gossh.Marshal(struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}{name, port, "127.0.0.1", 50000})
}

func TestTarget(t *testing.T) {
	inv := inventory()
	both := trust.Identity{Person: "alice", Clusters: []string{"prod", "staging"}}
	prod := trust.Identity{Person: "bob", Clusters: []string{"prod"}}
	narrow := trust.Identity{Person: "carol", Clusters: []string{"prod"}, Scope: trust.Scope{Nodes: []string{"cp-[2-9]"}}}
	for _, c := range []struct {
		who  trust.Identity
		host string
		port uint32
		want string // the target, or the reason after a !
	}{
		{prod, "cp-1", 2222, "ssh of cp-1.prod (10.0.0.1:2222)"},
		{prod, "cp-1", 7443, "grpc of cp-1.prod (10.0.0.1:7443)"},
		{prod, "cp-1.prod", 2222, "ssh of cp-1.prod (10.0.0.1:2222)"},
		{prod, "10.0.0.1", 2222, "ssh of cp-1.prod (10.0.0.1:2222)"},
		{prod, "fd00::2", 2222, "ssh of cp-2.prod ([fd00::2]:2222)"},
		{both, "cp-1.staging", 2222, "ssh of cp-1.staging (10.1.0.1:2222)"},
		{both, "10.0.0.1", 22, "ssh of far.staging (10.0.0.1:22)"},
		{narrow, "cp-2", 2222, "ssh of cp-2.prod ([fd00::2]:2222)"},

		{both, "cp-1", 2222, "!say which: cp-1.prod, cp-1.staging"},
		{prod, "cp-1.staging", 2222, "!the credential of bob is not for cp-1.staging"},
		{prod, "10.0.0.1", 22, "!no door of cp-1.prod"},
		{narrow, "cp-1", 2222, "!the credential of carol is not for cp-1.prod"},
		{trust.Identity{Person: "dave"}, "cp-1", 2222, "!the credential of dave is not for cp-1.prod"},
		{prod, "other", 2222, "!the credential of bob is not for other.dev"},

		{prod, "cp-1", 22, "!ssh 2222, grpc 7443"},
		{prod, "cp-1", 2379, "!no door of cp-1.prod"},
		{prod, "cp-1", 0, "!no door"},
		{prod, "cp-1", 2222 + 1<<16, "!no door"},
		{prod, "cp-2", 0, "!no door"},

		{prod, "::ffff:10.0.0.1", 2222, "!write 10.0.0.1"},
		{prod, "::ffff:a00:1", 2222, "!write 10.0.0.1"},
		{prod, "0:0:0:0:0:ffff:10.0.0.1", 2222, "!write 10.0.0.1"},
		{prod, "fd00:0::2", 2222, "!write fd00::2"},
		{prod, "FD00::2", 2222, "!write fd00::2"},
		{prod, "fd00::2%eth0", 2222, "!write fd00::2"},
		{prod, "[fd00::2]", 2222, "!no node called"},
		{prod, "::10.0.0.1", 2222, "!no node of the bundle's inventory has the address"},
		{prod, "64:ff9b::10.0.0.1", 2222, "!no node of the bundle's inventory has the address"},
		{prod, "10.0.0.01", 2222, "!no node called"},
		{prod, "10.1", 2222, "!no node called"},
		{prod, "167772161", 2222, "!no node called"},
		{prod, "0x0a000001", 2222, "!no node called"},

		{prod, "10.0.0.2", 2222, "!no node of the bundle's inventory has the address"},
		{prod, "169.254.169.254", 80, "!no node of the bundle's inventory has the address"},
		{prod, "127.0.0.1", 2222, "!the bastion itself"},
		{prod, "::1", 2222, "!the bastion itself"},
		{prod, "0.0.0.0", 2222, "!the bastion itself"},
		{prod, "::ffff:127.0.0.1", 2222, "!the bastion itself"},
		{prod, "localhost", 2222, "!no node called localhost"},
		{prod, "cp-1.prod.", 2222, "!no node called"},
		{prod, "CP-1", 2222, "!no node called"},
		{prod, " cp-1", 2222, "!no node called"},
		{prod, "cp-1\x00.evil.example", 2222, "!no node called"},
		{prod, "kubernetes.default.svc", 443, "!no node called"},
		{prod, "\x1b]0;x\x07", 2222, `!no node called \x1b`},
		{prod, "*", 2222, "!no node called"},

		{prod, "bastion-a", 2222, "!the bastion bastion-a"},
		{prod, "bastion-b.bastion", 2222, "!the bastion bastion-b"},
		{prod, "10.0.0.10", 2222, "!the bastion bastion-b"},
		{prod, "::ffff:10.0.0.10", 2222, "!the bastion bastion-b"},
		// An inventory that makes doors of bastions, or of their machines, nodes'.
		{prod, "trap", 2222, "!the bastion bastion-a"},
		{prod, "trap", 7443, "!the bastion bastion-a"},
		{prod, "me", 22, "!the bastion itself"},
		{prod, "me", 9644, "!the bastion itself"},
		{prod, "lo", 2222, "!the bastion's own machine"},
	} {
		got, err := relayOf(inv, nil).Target(c.who, data(c.host, c.port))
		if want, bad := strings.CutPrefix(c.want, "!"); bad {
			if err == nil || !strings.Contains(fault.Of(err).Error(), want) || got != (Target{}) {
				t.Errorf("%s %q %d: %v, %v; want %q", c.who.Person, c.host, c.port, got, err, want)
			}
		} else if err != nil || got.String() != want {
			t.Errorf("%s %q %d: %v, %v; want %q", c.who.Person, c.host, c.port, got, err, want)
		}
	}
	lab := relayOf(inv, func(o *Options) { o.Loopback = true })
	if got, err := lab.Target(prod, data("127.0.0.11", 2222)); err != nil || got.Node.Name != "lo" {
		t.Errorf("a lab: %v, %v", got, err)
	}
	if got, err := lab.Target(prod, data("trap", 7443)); err != nil || got.Door != trust.GRPC {
		t.Errorf("a lab, whose bastions share addresses: %v, %v", got, err)
	}
	for name, port := range map[string]uint32{"trap": 2222, "me": 9644} {
		if got, err := lab.Target(prod, data(name, port)); err == nil {
			t.Errorf("a lab relays to %v", got)
		}
	}
	for _, host := range []string{"127.0.0.1", "localhost", "127.0.0.12"} {
		if got, err := lab.Target(prod, data(host, 2222)); err == nil {
			t.Errorf("a lab relays to %q: %v", host, got)
		}
	}
	for _, bad := range [][]byte{nil, {1}, data("", 22), data(strings.Repeat("a", 254), 22), append(data("cp-1", 2222), 0), data("cp-1", 2222)[:10]} {
		if got, err := lab.Target(prod, bad); !fault.Is(err, fault.Usage) {
			t.Errorf("%q: %v, %v", bad, got, err)
		}
	}
}

// FuzzTarget holds that whatever is asked for, what is dialled is a door of a
// node in the inventory that the credential is for, named exactly.
func FuzzTarget(f *testing.F) {
	for _, host := range []string{"cp-1", "cp-1.prod", "10.0.0.1", "::ffff:10.0.0.1", "fd00::2", "fd00::2%1", "bastion-a", "127.0.0.11", "localhost", "", "\xff", "far"} {
		for _, port := range []uint32{0, 22, 2222, 7443, 9644, 67758} {
			f.Add(data(host, port), true)
		}
	}
	f.Add([]byte{}, false)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff}, false)
	inv := inventory()
	f.Fuzz(func(t *testing.T, asked []byte, wide bool) {
		who := trust.Identity{Person: "alice", Clusters: []string{"prod"}}
		if wide {
			who.Clusters = append(who.Clusters, "staging")
		}
		r := relayOf(inv, nil)
		target, err := r.Target(who, asked)
		if err != nil {
			text := fault.Of(err).Error()
			if target != (Target{}) || len(text) > 1024 || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }) {
				t.Fatalf("%q: %v, %q", asked, target, text)
			}
			return
		}
		request, err := ParseRequest(asked)
		if err != nil {
			t.Fatal(err)
		}
		n, at := target.Node, target.At()
		switch {
		case !slices.Contains(inv.Nodes(""), n) || !slices.Contains(who.Clusters, n.Cluster):
			t.Fatalf("%v is no node for this", n)
		case request.Host != n.Name && request.Host != n.ID() && request.Host != n.Address.String():
			t.Fatalf("%q became %v", request.Host, n)
		case at.Addr() != n.Address.Addr || uint32(at.Port()) != request.Port || at.Port() != n.SSHPort && at.Port() != n.GRPCPort || at.Port() == 0:
			t.Fatalf("%+v became %v", request, at)
		case at.Addr().IsLoopback() || at.Addr().String() == "10.0.0.9" || at.Addr().String() == "10.0.0.8":
			t.Fatalf("%v is the bastion's own", at)
		}
	})
}
