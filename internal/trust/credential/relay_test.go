package credential_test

import (
	"context"
	"crypto/x509"
	"slices"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
)

// relay is the authority of a bastion.
func (f *fleet) relay() *credential.Authority {
	return credential.New(credential.Options{Bundle: f.store, Clock: f.clock, Node: "bastion-a", Relay: true, Alarm: f.alarm})
}

// A bastion lets in whoever has a valid credential, under any name, and gives
// nobody a role; all that makes a credential invalid at an agent does so here.
func TestRelay(t *testing.T) {
	f := newFleet(t)
	a := f.relay()
	cert := f.certify(order{options: []string{"extension:" + credential.ExtensionNodes + "=cp-9"}})
	for _, user := range []string{"responder", "commander", "root", "alice", "", "\x1b[2J"} {
		id, err := a.User(cert, user, from)
		if err != nil || id.Person != "alice@acme.test" || id.Role != trust.None || id.Kind != trust.Person ||
			!slices.Equal(id.Clusters, []string{"staging", "prod"}) || !slices.Equal(id.Scope.Nodes, []string{"cp-9"}) ||
			!slices.Equal(id.Roles, []trust.Role{trust.Observer, trust.Responder}) {
			t.Errorf("as %q: %+v, %v", user, id, err)
		}
		if err := a.Check(id); err != nil {
			t.Error(err)
		}
	}
	elsewhere := f.certify(order{bare: true, options: []string{"critical:" + credential.OptionClusters + "=nowhere"}})
	if id, err := a.User(elsewhere, "x", from); err != nil || !slices.Equal(id.Clusters, []string{"nowhere"}) {
		t.Errorf("a cluster that the bundle lacks: %+v, %v", id, err)
	}
	if id, err := f.authority().User(cert, "responder", from); err == nil || id.Clusters != nil {
		t.Errorf("the agent: %+v, %v", id, err)
	}
	for name, bad := range map[string]gossh.PublicKey{
		"plain key":        f.public("alice"),
		"another CA":       f.certify(order{ca: "other-ca"}),
		"host certificate": f.certify(order{host: true}),
		"no scope":         f.certify(order{bare: true}),
		"no principals":    f.certify(order{principals: "-"}),
		"unknown role":     f.certify(order{principals: "responder,root"}),
		"serial 0":         f.certify(order{serial: "0"}),
		"endless":          f.certify(order{validity: "always:forever"}),
		"too long":         f.certify(order{to: t0.Add(200 * time.Hour)}),
		"over":             f.certify(order{from: t0.Add(-12 * time.Hour), to: t0.Add(-3 * time.Hour)}),
		"bound elsewhere":  f.certify(order{options: []string{"source-address=198.51.100.0/24"}}),
		"unknown option":   f.certify(order{options: []string{"critical:x@halligan.io=1"}}),
		"forced command":   f.certify(order{options: []string{"force-command=status"}}),
		"wants a PIN":      f.certify(order{options: []string{"verify-required"}}),
	} {
		id, err := a.User(bad, "responder", from)
		t.Run(name, func(t *testing.T) { refused(t, id, err, "") })
	}
	t.Run("forged", func(t *testing.T) {
		forged := *cert
		forged.KeyId = "mallory"
		id, err := a.User(&forged, "responder", from)
		refused(t, id, err, "")
	})

	late := f.certify(order{from: t0.Add(-12 * time.Hour), to: t0.Add(-time.Hour)})
	if id, err := a.User(late, "x", from); err != nil || !id.Late {
		t.Errorf("within the grace: %+v, %v", id, err)
	}
	id, err := a.User(cert, "x", from)
	if err != nil {
		t.Fatal(err)
	}
	held, cancel := a.Hold(t.Context(), id)
	defer cancel()
	f.revocations.KeyIDs = []string{"alice@acme.test"}
	f.sign()
	select {
	case <-held.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("a relayed session outlives its revocation")
	}
	if !isRevoked(context.Cause(held)) {
		t.Error(context.Cause(held))
	}
	got, err := a.User(cert, "x", from)
	refused(t, got, err, "revoked")
}

func TestRelayAutomation(t *testing.T) {
	f := newFleet(t)
	key := newECDSA(t)
	leaf := create(t, client(t), f.clients.cert, key.Public(), f.clients.key)
	id, err := f.relay().Client([]*x509.Certificate{leaf}, from)
	if err != nil || id.Role != trust.None || !slices.Equal(id.Roles, []trust.Role{trust.Responder}) || id.Kind != trust.Automation || !slices.Equal(id.Clusters, []string{"staging", "prod"}) || !id.Scope.Drill {
		t.Errorf("%+v, %v", id, err)
	}
	if err := f.relay().Check(id); err != nil {
		t.Error(err)
	}
}

func TestRelaySealed(t *testing.T) {
	f := newFleet(t)
	a, key := f.relay(), securityKey(t)
	f.policy.Sealed = []bundle.Sealed{{
		Person: "carol", Key: bundle.Key{PublicKey: key}, Role: "responder", Clusters: []string{"prod", "staging"}, NotBefore: t0, NotAfter: t0.Add(bundle.MaxSealed),
	}}
	f.sign()
	id, err := a.User(key, "whoever", from)
	if err != nil || id.Person != "carol" || id.Kind != trust.Sealed || id.Role != trust.None || !slices.Equal(id.Roles, []trust.Role{trust.Responder}) || !slices.Equal(id.Clusters, []string{"prod", "staging"}) {
		t.Fatalf("%+v, %v", id, err)
	}
	if err := a.Check(id); err != nil {
		t.Error(err)
	}
	f.policy.Sealed[0].Clusters = []string{"prod"}
	f.sign()
	if err := a.Check(id); !isRevoked(err) {
		t.Errorf("its clusters became fewer: %v", err)
	}
	f.policy.Sealed = nil
	f.sign()
	got, err := a.User(key, "whoever", from)
	refused(t, got, err, "")
}
