package credential_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/issuer"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// servers is a fleet with a bastion and a node in each of two clusters, and both
// kinds of authorities under one bundle.
type servers struct {
	t             *testing.T
	fleet         *testfleet.Fleet
	store         *bundle.Store
	clock         *clock
	agent, relays *credential.Authority
}

func newServers(t *testing.T) *servers {
	t.Helper()
	s := &servers{t: t, fleet: testfleet.New(t), clock: &clock{now: time.Now()}}
	path := filepath.Join(s.fleet.Dir, "bundle")
	if err := durable.Write(path, s.fleet.Inventory(func(inv *bundle.Inventory) {
		loopback := bundle.IP{Addr: netip.MustParseAddr("127.0.0.1")}
		inv.Clusters = append(inv.Clusters, bundle.Cluster{Name: "staging", Nodes: []bundle.Host{{Name: "cp-1", Address: loopback, SSHPort: 3}}})
		inv.Bastions = []bundle.Host{{Name: "a", Address: loopback, SSHPort: 1}}
	})); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.store, err = bundle.Open(bundle.Options{Path: path}); err != nil {
		t.Fatal(err)
	}
	s.agent = credential.New(credential.Options{Bundle: s.store, Clock: s.clock, Cluster: testfleet.Cluster, Node: testfleet.Node})
	s.relays = credential.New(credential.Options{Bundle: s.store, Clock: s.clock, Node: "a", Relay: true})
	return s
}

func (s *servers) certificate(fleet *testfleet.Fleet, name string, v issuer.Validity) []*x509.Certificate {
	s.t.Helper()
	pair, err := tls.LoadX509KeyPair(fleet.ServerFiles(name, v))
	if err != nil {
		s.t.Fatal(err)
	}
	return []*x509.Certificate{pair.Leaf}
}

// TestServersAsThemselves: an agent knows a bastion, and a bastion a node, neither
// anybody else, and both without any role.
func TestServersAsThemselves(t *testing.T) {
	s := newServers(t)
	now := testfleet.Now()
	client := []*x509.Certificate{s.fleet.Client(nil, testfleet.Holder("bot", trust.Commander), now).Leaf}
	for name, c := range map[string]struct {
		certs          []*x509.Certificate
		agent, bastion string // whom each takes it for, or the reason after a !
	}{
		"bastion":                    {s.certificate(s.fleet, "a.bastion", now), "a.bastion", "!no node a.bastion"},
		"unknown bastion":            {s.certificate(s.fleet, "b.bastion", now), "!no bastion b.bastion", "!no node b.bastion"},
		"node":                       {s.certificate(s.fleet, "cp-1.prod", now), "!usage", "cp-1.prod"},
		"node of another cluster":    {s.certificate(s.fleet, "cp-1.staging", now), "!usage", "cp-1.staging"},
		"unknown node":               {s.certificate(s.fleet, "cp-9.prod", now), "!usage", "!no node cp-9.prod"},
		"bastion of another fleet":   {s.certificate(testfleet.New(t), "a.bastion", now), "!certificate of a bastion", "!certificate of a node"},
		"node of another fleet":      {s.certificate(testfleet.New(t), "cp-1.prod", now), "!usage", "!certificate of a node"},
		"nothing":                    {nil, "!no client certificate", "!no certificate of a node"},
		"client, of whatever role":   {client, "bot", "!it is for []"},
		"client, named as a bastion": {[]*x509.Certificate{s.fleet.Client(nil, testfleet.Holder("a.bastion", trust.Commander), now).Leaf}, "a.bastion", "!it is for []"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, x := range []struct {
				door, want string
				kind       trust.Kind
				ask        func([]*x509.Certificate, net.Addr) (trust.Identity, error)
			}{{"agent", c.agent, trust.Bastion, s.agent.Client}, {"bastion", c.bastion, trust.Node, s.relays.Tunnel}} {
				id, err := x.ask(c.certs, from)
				why, refused := strings.CutPrefix(x.want, "!")
				kind := x.kind
				if strings.HasPrefix(name, "client") {
					kind = trust.Automation
				}
				switch {
				case refused && (err == nil || !strings.Contains(err.Error(), why) || id.Person != ""):
					t.Errorf("at the %s: %+v, %v; want %q", x.door, id, err, why)
				case !refused && (err != nil || id.Person != x.want || id.Kind != kind || (id.Role == trust.None) != (kind != trust.Automation) || id.Roles != nil || id.Clusters != nil || id.Source == ""):
					t.Errorf("at the %s: %+v, %v", x.door, id, err)
				}
			}
		})
	}
	// Past its end a node is let in for as long as people are; a bastion is not.
	bastion, node := s.certificate(s.fleet, "a.bastion", now), s.certificate(s.fleet, "cp-1.prod", now)
	s.clock.set(now.NotAfter.Add(bundle.DefaultGrace - time.Minute))
	if id, err := s.relays.Tunnel(node, from); err != nil || !id.Late {
		t.Errorf("within the grace: %+v, %v", id, err)
	}
	if id, err := s.agent.Client(bastion, from); err == nil {
		t.Errorf("a bastion within the grace: %+v", id)
	}
	s.clock.set(now.NotAfter.Add(bundle.DefaultGrace + time.Minute))
	if id, err := s.relays.Tunnel(node, from); err == nil {
		t.Errorf("beyond the grace: %+v", id)
	}
	s.clock.set(time.Now())
	// A bastion knows another as one, which stands for nobody, and takes no node for a
	// client.
	if id, err := s.relays.Client(s.certificate(s.fleet, "a.bastion", now), from); err != nil || id.Kind != trust.Bastion || id.Role != trust.None || len(id.Roles)+len(id.Clusters) > 0 {
		t.Errorf("a bastion at a bastion: %+v, %v", id, err)
	}
	for _, name := range []string{"b.bastion", "cp-1.prod"} {
		if id, err := s.relays.Client(s.certificate(s.fleet, name, now), from); err == nil {
			t.Errorf("%s at a bastion: %+v", name, id)
		}
	}
	// An agent that knows no cluster lets nobody in.
	nowhere := credential.New(credential.Options{Bundle: s.store, Clock: s.clock})
	if id, err := nowhere.Client(s.certificate(s.fleet, "a.bastion", now), from); err == nil {
		t.Errorf("a bastion without a cluster: %+v", id)
	}
	if id, err := nowhere.Client(client, from); err == nil {
		t.Errorf("without a cluster: %+v", id)
	}
}

// TestServersHold: what a bastion or a node has opened ends with the inventory, the
// revocations and the authority that it stands on.
func TestServersHold(t *testing.T) {
	for name, change := range map[string]func(*testfleet.Fleet) []byte{
		"dropped": func(f *testfleet.Fleet) []byte {
			return f.Inventory(func(inv *bundle.Inventory) { inv.Bastions, inv.Clusters = nil, inv.Clusters[1:] })
		},
		"revoked": func(f *testfleet.Fleet) []byte {
			return f.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"a.bastion", "cp-1.prod"} })
		},
		"another authority": func(f *testfleet.Fleet) []byte {
			other, err := bundle.ParseCAs(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: testfleet.New(t).Servers.Certificate.Raw})))
			if err != nil {
				t.Fatal(err)
			}
			return f.Policy(func(p *bundle.Policy) { p.Authorities.TLSServer = other })
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServers(t)
			bastion, err := s.agent.Client(s.certificate(s.fleet, "a.bastion", testfleet.Now()), from)
			if err != nil {
				t.Fatal(err)
			}
			node, err := s.relays.Tunnel(s.certificate(s.fleet, "cp-1.prod", testfleet.Now()), from)
			if err != nil {
				t.Fatal(err)
			}
			first, cancel := s.agent.Hold(t.Context(), bastion)
			defer cancel()
			second, cancel := s.relays.Hold(t.Context(), node)
			defer cancel()
			if first.Err() != nil || second.Err() != nil {
				t.Fatal(first.Err(), second.Err())
			}
			if _, err := s.store.Offer(change(s.fleet)); err != nil {
				t.Fatal(err)
			}
			for who, err := range map[string]error{"bastion": s.agent.Check(bastion), "node": s.relays.Check(node)} {
				if !errors.Is(err, trust.ErrRevoked) {
					t.Errorf("the %s: %v", who, err)
				}
			}
			ended(t, first)
			ended(t, second)
		})
	}
}
