package credential_test

import (
	"crypto/rand"
	"fmt"
	"net"
	"reflect"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
)

var from = &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 51515}

// refused holds that nobody was let in, with a reason that has the words.
func refused(t *testing.T, id trust.Identity, err error, wants string) {
	t.Helper()
	if !fault.Is(err, fault.Unauthenticated) || !strings.Contains(err.Error(), wants) {
		t.Errorf("got %v; want unauthenticated with %q", err, wants)
	}
	if !reflect.DeepEqual(id, trust.Identity{}) {
		t.Errorf("refused, and yet it is %+v", id)
	}
}

func TestUser(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	cert := f.certify(order{options: []string{
		"extension:" + credential.ExtensionActions + "=scale,delete", "extension:" + credential.ExtensionNamespaces + "=web-*",
		"extension:" + credential.ExtensionNodes + "=cp-*", "extension:" + credential.ExtensionDrill, "permit-x11-forwarding",
	}})
	id, err := a.User(cert, "responder", from)
	if err != nil {
		t.Fatal(err)
	}
	want := trust.Identity{
		Person: "alice@acme.test", Role: trust.Responder, Door: trust.SSH, Kind: trust.Person,
		Fingerprint: gossh.FingerprintSHA256(f.public("alice")), CA: gossh.FingerprintSHA256(f.public("user-ca")), Serial: "7", Source: "192.0.2.7:51515",
		NotBefore: t0.Add(-time.Hour), NotAfter: t0.Add(23 * time.Hour),
		Scope: trust.Scope{Actions: []string{"scale", "delete"}, Namespaces: []string{"web-*"}, Nodes: []string{"cp-*"}, Drill: true},
	}
	id.NotBefore, id.NotAfter = id.NotBefore.UTC(), id.NotAfter.UTC()
	if !reflect.DeepEqual(id, want) {
		t.Errorf("got  %+v\nwant %+v", id, want)
	}
	if err := a.Check(id); err != nil {
		t.Error(err)
	}
	if !a.Offered(cert) || a.Offered(f.public("alice")) || a.Offered(f.certify(order{ca: "other-ca"})) || a.Offered(f.certify(order{host: true})) {
		t.Error("the wrong keys are worth a signature")
	}
	for _, user := range []string{"commander", "approver", "none", "root", "", "Responder", "responder "} {
		id, err := a.User(cert, user, from)
		refused(t, id, err, "")
	}
	id, err = a.User(f.certify(order{options: []string{"extension:" + credential.ExtensionAutomation}}), "observer", from)
	if err != nil || id.Kind != trust.Automation {
		t.Errorf("automation: %+v, %v", id, err)
	}
	// A daemon that does not know its cluster lets nobody in.
	id, err = credential.New(credential.Options{Bundle: f.store, Clock: f.clock}).User(cert, "responder", from)
	refused(t, id, err, "cluster")
}

func TestUserKeyTypes(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	for _, c := range []struct {
		kind  []string
		wants string
	}{
		{[]string{"ecdsa", "-b", "256"}, ""},
		{[]string{"ecdsa", "-b", "384"}, ""},
		{[]string{"ecdsa", "-b", "521"}, ""},
		{[]string{"rsa", "-b", "3072"}, ""},
		{[]string{"rsa", "-b", "2048"}, "2048 bits"},
	} {
		name := strings.Join(c.kind, "")
		f.key(name, c.kind...)
		id, err := a.User(f.certify(order{key: name}), "observer", from)
		if c.wants != "" {
			refused(t, id, err, c.wants)
		} else if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, key := range map[string]gossh.PublicKey{"sk": securityKey(t)} {
		cert := sound(f, key)
		if err := cert.SignCert(rand.Reader, f.signer("user-ca")); err != nil {
			t.Fatal(err)
		}
		if _, err := a.User(cert, "observer", from); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The authority's key and signature.
	f.policy.Authorities.User = append(f.policy.Authorities.User, bundle.Key{PublicKey: f.public("rsa-b3072")}, bundle.Key{PublicKey: f.public("ecdsa-b256")})
	f.sign()
	for _, o := range []order{{ca: "rsa-b3072"}, {ca: "ecdsa-b256"}, {ca: "rsa-b3072", more: []string{"-t", "rsa-sha2-256"}}} {
		if _, err := a.User(f.certify(o), "observer", from); err != nil {
			t.Errorf("%+v: %v", o, err)
		}
	}
	sha1 := sound(f, f.public("alice"))
	weak, err := gossh.NewSignerWithAlgorithms(f.signer("rsa-b3072").(gossh.AlgorithmSigner), []string{gossh.KeyAlgoRSA})
	if err != nil {
		t.Fatal(err)
	}
	if err := sha1.SignCert(rand.Reader, weak); err != nil {
		t.Fatal(err)
	}
	id, err := a.User(sha1, "observer", from)
	refused(t, id, err, "signed with ssh-rsa")
}

// sound is an unsigned certificate without a fault.
func sound(_ *fleet, key gossh.PublicKey) *gossh.Certificate {
	return &gossh.Certificate{
		Key: key, CertType: gossh.UserCert, KeyId: "alice@acme.test", Serial: 7, ValidPrincipals: []string{"observer"},
		ValidAfter: uint64(t0.Add(-time.Hour).Unix()), ValidBefore: uint64(t0.Add(time.Hour).Unix()),
		Permissions: gossh.Permissions{CriticalOptions: map[string]string{credential.OptionClusters: "prod"}},
	}
}

// What ssh-keygen will make for whoever asks, and no agent may take.
func TestUserRefuses(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	scope := "critical:" + credential.OptionClusters
	for _, c := range []struct {
		name  string
		order order
		wants string
	}{
		{"no principals", order{principals: "-"}, "no principals"},
		{"endless", order{validity: "always:forever"}, "no end"},
		{"endless from now", order{validity: t0.Format("20060102150405") + ":forever"}, "no end"},
		{"without a beginning", order{validity: "always:" + t0.Add(time.Hour).Format("20060102150405")}, "no beginning"},
		{"too long by a second", order{from: t0.Add(-time.Hour), to: t0.Add(167*time.Hour + time.Second)}, "the policy allows"},
		{"serial 0", order{serial: "0"}, "serial 0"},
		{"unknown critical option", order{options: []string{"critical:colour@acme.test=red"}}, "unknown critical option"},
		{"an extension of ours as a critical option", order{options: []string{"critical:" + credential.ExtensionActions + "=scale"}}, "unknown critical option"},
		{"force-command", order{options: []string{"force-command=true"}}, "unknown critical option"},
		{"verify-required", order{options: []string{"verify-required"}}, "cannot be enforced"},
		{"without cluster scope", order{bare: true}, "no cluster scope"},
		{"cluster scope as an extension", order{bare: true, options: []string{"extension:" + credential.OptionClusters + "=prod"}}, "no cluster scope"},
		{"an empty cluster scope", order{bare: true, options: []string{scope + "="}}, "empty"},
		{"another cluster", order{bare: true, options: []string{scope + "=staging,prod-2"}}, "this is cluster"},
		{"a pattern of clusters", order{bare: true, options: []string{scope + "=*"}}, "not a cluster's name"},
		{"an empty cluster", order{bare: true, options: []string{scope + "=prod,"}}, "empty"},
		{"a cluster twice", order{bare: true, options: []string{scope + "=prod,prod"}}, "twice"},
		{"spaces in the cluster scope", order{bare: true, options: []string{scope + "=staging, prod"}}, "not a cluster's name"},
		{"no-touch-required", order{options: []string{"no-touch-required"}}, "no-touch-required"},
		{"unknown extension of ours", order{options: []string{"extension:all@halligan.io"}}, "unknown extension"},
		{"in other letters", order{options: []string{"extension:All@Halligan.IO"}}, "unknown extension"},
		{"a flag with a value", order{options: []string{"extension:" + credential.ExtensionDrill + "=no"}}, "takes no value"},
		{"a list without entries", order{options: []string{"extension:" + credential.ExtensionActions}}, "empty"},
		{"a malformed pattern", order{options: []string{"extension:" + credential.ExtensionNamespaces + "=web-["}}, "not a pattern"},
		{"another node", order{options: []string{"extension:" + credential.ExtensionNodes + "=cp-2,cp-3"}}, "for nodes"},
		{"a key ID in capitals", order{id: "Alice"}, "key ID"},
		{"a key ID of two words", order{id: "alice bob"}, "key ID"},
		{"an escape sequence as key ID", order{id: "alice\x1b[2J"}, "key ID"},
		{"an empty key ID", order{more: []string{"-I", ""}}, "key ID"},
		{"a key ID that is too long", order{id: strings.Repeat("a", 65)}, "key ID"},
		{"a principal that is no role", order{principals: "observer,root"}, "unknown role"},
		{"a pattern as principal", order{principals: "observer,*"}, "unknown role"},
		{"a host certificate as user", order{host: true, principals: "observer"}, "type 2"},
		{"a host certificate by the user authority", order{host: true, ca: "user-ca", principals: "observer"}, "type 2"},
		{"signed by the host authority", order{ca: "host-ca"}, "no user authority"},
		{"signed by a stranger", order{ca: "other-ca"}, "no user authority"},
		{"signed by another user's key", order{ca: "alice", key: "bob"}, "no user authority"},
		{"signed with its own key", order{ca: "alice"}, "no user authority"},
		{"bound to another address", order{options: []string{"source-address=198.51.100.0/24"}}, "the source is"},
	} {
		t.Run(c.name, func(t *testing.T) {
			id, err := a.User(f.certify(c.order), "observer", from)
			refused(t, id, err, c.wants)
		})
	}
	id, err := a.User(f.public("alice"), "observer", from)
	refused(t, id, err, "plain key")
	id, err = a.User(nil, "observer", from)
	refused(t, id, err, "no key")
}

// What ssh-keygen will not make.
func TestUserRefusesForged(t *testing.T) {
	f := newFleet(t)
	a, ca, alice := f.authority(), f.signer("user-ca"), f.public("alice")
	signed := func(change func(*gossh.Certificate)) *gossh.Certificate {
		c := sound(f, alice)
		if err := c.SignCert(rand.Reader, ca); err != nil {
			t.Fatal(err)
		}
		change(c)
		return c
	}
	if _, err := a.User(signed(func(*gossh.Certificate) {}), "observer", from); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(*gossh.Certificate)
		wants  string
	}{
		{"more principals", func(c *gossh.Certificate) { c.ValidPrincipals = []string{"observer", "commander"} }, "signature does not verify"},
		{"another person", func(c *gossh.Certificate) { c.KeyId = "bob" }, "signature does not verify"},
		{"another key", func(c *gossh.Certificate) { c.Key = f.public("bob") }, "signature does not verify"},
		{"a longer life", func(c *gossh.Certificate) { c.ValidBefore++ }, "signature does not verify"},
		{"no signature", func(c *gossh.Certificate) { c.Signature = nil }, "incomplete"},
		{"no authority", func(c *gossh.Certificate) { c.SignatureKey = nil }, "incomplete"},
		{"no key", func(c *gossh.Certificate) { c.Key = nil }, "incomplete"},
		{"an end before its beginning", func(c *gossh.Certificate) { c.ValidBefore = c.ValidAfter - 1 }, "no end"},
		{"an end beyond all time", func(c *gossh.Certificate) { c.ValidBefore = 1 << 63 }, "no end"},
		{"signed by a certificate", func(c *gossh.Certificate) { c.SignatureKey = signed(func(*gossh.Certificate) {}) }, "authority: keys of type \"ssh-ed25519-cert"},
		{"for a certificate", func(c *gossh.Certificate) { c.Key = signed(func(*gossh.Certificate) {}) }, "key: keys of type \"ssh-ed25519-cert"},
	} {
		t.Run(c.name, func(t *testing.T) {
			id, err := a.User(signed(c.change), "observer", from)
			refused(t, id, err, c.wants)
		})
	}
	// On the wire a certificate signed by a certificate is not even one.
	inner := signed(func(*gossh.Certificate) {})
	if _, err := gossh.ParsePublicKey(signed(func(c *gossh.Certificate) { c.SignatureKey = inner }).Marshal()); err == nil {
		t.Error("x/crypto reads a certificate signed by a certificate")
	}
}

func TestSourceAddress(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	for _, c := range []struct {
		allowed string
		source  net.Addr
		ok      bool
	}{
		{"192.0.2.7", from, true},
		{"192.0.2.0/24", from, true},
		{"198.51.100.1,192.0.2.0/24", from, true},
		{"192.0.2.8", from, false},
		{"192.0.2.7", &net.TCPAddr{IP: net.ParseIP("::ffff:192.0.2.7"), Port: 1}, true},
		{"2001:db8::/32", &net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 1}, true},
		{"2001:db8::/32", from, false},
		{"192.0.2.7", nil, false},
		{"192.0.2.7", &net.UnixAddr{Name: "@"}, false},
	} {
		_, err := a.User(f.certify(order{options: []string{"source-address=" + c.allowed}}), "observer", c.source)
		if (err == nil) != c.ok {
			t.Errorf("%s from %v: %v", c.allowed, c.source, err)
		}
	}
	// ssh-keygen refuses to write these.
	for _, allowed := range []string{"", "192.0.2.7,", "192.0.2.7, 192.0.2.8", "!192.0.2.8,192.0.2.7", "192.0.2.*"} {
		cert := sound(f, f.public("alice"))
		cert.CriticalOptions["source-address"] = allowed
		if err := cert.SignCert(rand.Reader, f.signer("user-ca")); err != nil {
			t.Fatal(err)
		}
		id, err := a.User(cert, "observer", from)
		refused(t, id, err, "neither an address nor a block")
	}
}

// Every edge of the clock rule.
func TestClockRule(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	begin, end := t0, t0.Add(24*time.Hour)
	person := f.certify(order{from: begin, to: end})
	machine := f.certify(order{from: begin, to: end, key: "bob", options: []string{"extension:" + credential.ExtensionAutomation}})
	const grace, tick = 2 * time.Hour, time.Nanosecond
	for _, c := range []struct {
		name          string
		at            time.Time
		person, robot string // "in", "late" or why not
	}{
		{"before the grace", begin.Add(-grace - tick), "not valid before", "not valid before"},
		{"the grace begins", begin.Add(-grace), "late", "not valid before"},
		{"a moment early", begin.Add(-tick), "late", "not valid before"},
		{"it begins", begin, "in", "in"},
		{"a moment after", begin.Add(tick), "in", "in"},
		{"the last moment", end.Add(-tick), "in", "in"},
		{"it ends", end, "late", "ended at"},
		{"the grace's last moment", end.Add(grace - tick), "late", "ended at"},
		{"the grace ends", end.Add(grace), "ended at", "ended at"},
		{"long after", end.AddDate(1, 0, 0), "ended at", "ended at"},
		{"1970", time.Unix(0, 0), "not valid before", "not valid before"},
	} {
		f.clock.set(c.at)
		for cert, wants := range map[*gossh.Certificate]string{person: c.person, machine: c.robot} {
			id, err := a.User(cert, "observer", from)
			switch wants {
			case "in", "late":
				if err != nil || id.Late != (wants == "late") {
					t.Errorf("%s: %+v, %v; want %s", c.name, id, err, wants)
				} else if err := a.Check(id); err != nil {
					t.Errorf("%s: let in, and then %v", c.name, err)
				}
			default:
				refused(t, id, err, wants)
			}
		}
	}
	// The policy can take the grace away.
	f.policy.Grace = 0
	f.sign()
	f.clock.set(end)
	id, err := a.User(person, "observer", from)
	refused(t, id, err, "ended at")
	// And it can demand shorter lives.
	f.policy.MaxCertificate = bundle.Duration(24*time.Hour - time.Second)
	f.sign()
	f.clock.set(t0)
	id, err = a.User(person, "observer", from)
	refused(t, id, err, "the policy allows")
}

func TestRevocation(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	cert := f.certify(order{})
	id, err := a.User(cert, "observer", from)
	if err != nil {
		t.Fatal(err)
	}
	none := *f.revocations
	policy := *f.policy
	userCA := gossh.FingerprintSHA256(f.public("user-ca"))
	for name, change := range map[string]func(){
		"serial":             func() { f.revocations.Serials = []bundle.Serial{{Serial: 7}} },
		"serial of that CA":  func() { f.revocations.Serials = []bundle.Serial{{Serial: 7, CA: userCA}} },
		"key ID":             func() { f.revocations.KeyIDs = []string{"alice@acme.test"} },
		"key":                func() { f.revocations.Keys = []string{gossh.FingerprintSHA256(f.public("alice"))} },
		"authority":          func() { f.revocations.Keys = []string{userCA} },
		"authority replaced": func() { f.policy.Authorities.User = []bundle.Key{{PublicKey: f.public("other-ca")}} },
		"shorter lives":      func() { f.policy.MaxCertificate = bundle.Duration(time.Hour) },
	} {
		t.Run(name, func(t *testing.T) {
			change()
			f.sign()
			now, err := a.User(cert, "observer", from)
			refused(t, now, err, "")
			err = a.Check(id)
			if !fault.Is(err, fault.Unauthenticated) || !isRevoked(err) {
				t.Errorf("the session: %v", err)
			}
			*f.revocations, *f.policy = none, policy
		})
	}
	for name, change := range map[string]func(){
		"another serial": func() { f.revocations.Serials = []bundle.Serial{{Serial: 8}} },
		"serial of another CA": func() {
			f.revocations.Serials = []bundle.Serial{{Serial: 7, CA: gossh.FingerprintSHA256(f.public("host-ca"))}}
		},
		"an X.509 serial": func() { f.revocations.X509Serials = []bundle.X509Serial{{Serial: "7"}} },
	} {
		change()
		f.sign()
		if _, err := a.User(cert, "observer", from); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := a.Check(id); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		*f.revocations, *f.policy = none, policy
	}
	// Who is late is not let in when revoked.
	f.revocations.Serials = []bundle.Serial{{Serial: 7}}
	f.sign()
	f.clock.set(t0.Add(23*time.Hour + time.Minute))
	late, err := a.User(cert, "observer", from)
	refused(t, late, err, "revoked")
}

func TestCheckOfLapsed(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	id, err := a.User(f.certify(order{}), "observer", from)
	if err != nil {
		t.Fatal(err)
	}
	f.clock.set(id.NotAfter)
	if err := a.Check(id); err == nil || isRevoked(err) {
		t.Errorf("lapsed: %v", err)
	}
	if err := a.Check(trust.Identity{Person: "eve", Role: trust.Commander, Kind: trust.Person, NotBefore: t0, NotAfter: t0.Add(100 * time.Hour)}); err == nil {
		t.Error("somebody for whom nothing vouches stands")
	}
	if err := a.Check(trust.Identity{Person: "console/0", Kind: trust.Local}); err != nil {
		t.Error(err)
	}
}

func TestSealed(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	key := securityKey(t)
	f.policy.Sealed = []bundle.Sealed{{
		Person: "carol", Key: bundle.Key{PublicKey: key}, Role: "responder", Clusters: []string{"prod"}, NotBefore: t0, NotAfter: t0.Add(bundle.MaxSealed),
	}}
	f.sign()
	id, err := a.User(key, "responder", from)
	if err != nil {
		t.Fatal(err)
	}
	if id.Person != "carol" || id.Kind != trust.Sealed || id.Role != trust.Responder || id.CA != "" || id.Late || id.Source != from.String() || !a.Offered(key) {
		t.Errorf("%+v", id)
	}
	if _, err := a.User(key, "observer", from); err != nil {
		t.Error("below its role:", err)
	}
	for user, wants := range map[string]string{"commander": "at most", "approver": "at most"} {
		got, err := a.User(key, user, from)
		refused(t, got, err, wants)
	}
	got, err := a.User(securityKey(t), "observer", from)
	refused(t, got, err, "does not list")
	for at, wants := range map[time.Duration]string{-time.Nanosecond: "not valid before", bundle.MaxSealed: "ended at"} { // no grace
		f.clock.set(t0.Add(at))
		got, err := a.User(key, "observer", from)
		refused(t, got, err, wants)
	}
	f.clock.set(t0.Add(bundle.MaxSealed - time.Nanosecond))
	if _, err := a.User(key, "observer", from); err != nil {
		t.Error(err)
	}
	f.clock.set(t0)
	sealed := f.policy.Sealed[0]
	for name, change := range map[string]func(){
		"no longer listed": func() { f.policy.Sealed = nil },
		"another person's": func() { f.policy.Sealed[0].Person = "dave" },
		"a lower role":     func() { f.policy.Sealed[0].Role = "observer" },
		"another cluster":  func() { f.policy.Sealed[0].Clusters = []string{"staging"} },
		"its key revoked":  func() { f.revocations.Keys = []string{gossh.FingerprintSHA256(key)} },
		"its person":       func() { f.revocations.KeyIDs = []string{"carol"} },
	} {
		change()
		f.sign()
		if err := a.Check(id); !isRevoked(err) {
			t.Errorf("%s: %v", name, err)
		}
		f.policy.Sealed = []bundle.Sealed{sealed}
		f.revocations.Keys, f.revocations.KeyIDs = nil, nil
	}
}

func TestApprover(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	id, pin, err := a.Approver(f.certify(order{principals: "approver"}))
	if err != nil || pin || id.Role != trust.Approver || id.Person != "alice@acme.test" {
		t.Fatalf("%+v, %v, %v", id, pin, err)
	}
	for _, c := range []struct {
		name  string
		order order
		at    time.Duration
		wants string
	}{
		{"no approver", order{principals: "commander"}, 0, "not for approver"},
		{"lapsed by a moment", order{principals: "approver"}, 23 * time.Hour, "not valid now"},
		{"early by a moment", order{principals: "approver"}, -time.Hour - time.Nanosecond, "not valid now"},
		{"long lapsed", order{principals: "approver"}, 26 * time.Hour, "ended at"},
		{"a machine", order{principals: "approver", options: []string{"extension:" + credential.ExtensionAutomation}}, 0, "not a person"},
		{"a drill", order{principals: "approver", options: []string{"extension:" + credential.ExtensionDrill}}, 0, "not a person"},
		{"of another cluster", order{principals: "approver", bare: true, options: []string{"critical:" + credential.OptionClusters + "=staging"}}, 0, "this is cluster"},
		{"of another node", order{principals: "approver", options: []string{"extension:" + credential.ExtensionNodes + "=cp-2"}}, 0, "for nodes"},
		{"bound to an address", order{principals: "approver", options: []string{"source-address=192.0.2.7"}}, 0, "bound to an address"},
		{"a PIN that the key has not", order{principals: "approver", options: []string{"verify-required"}}, 0, "cannot be enforced"},
		{"of a stranger", order{principals: "approver", ca: "other-ca"}, 0, "no user authority"},
		{"a host's", order{principals: "approver", host: true}, 0, "type 2"},
	} {
		f.clock.set(t0.Add(c.at))
		id, _, err := a.Approver(f.certify(c.order))
		t.Run(c.name, func(t *testing.T) { refused(t, id, err, c.wants) })
	}
	f.clock.set(t0)
	cert := sound(f, securityKey(t))
	cert.ValidPrincipals = []string{"approver"}
	cert.CriticalOptions["verify-required"] = ""
	if err := cert.SignCert(rand.Reader, f.signer("user-ca")); err != nil {
		t.Fatal(err)
	}
	if _, pin, err := a.Approver(cert); err != nil || !pin {
		t.Errorf("a PIN is not asked for: %v", err)
	}
	if _, _, err := a.Approver(nil); err == nil {
		t.Error("nobody approves")
	}
	f.revocations.KeyIDs = []string{"alice@acme.test"}
	f.sign()
	id, _, err = a.Approver(f.certify(order{principals: "approver"}))
	refused(t, id, err, "revoked")
}

// Whatever stands in a certificate that the authority has signed: if it is let
// in, it had one of the options that are known, and nothing widened.
func FuzzOptions(f *testing.F) {
	fl := newFleet(f)
	a, ca, key := fl.authority(), fl.signer("user-ca"), fl.public("alice")
	for _, s := range [][3]string{
		{"prod", credential.ExtensionActions, "scale,delete"}, {"prod,staging", "permit-pty", ""}, {"*", credential.ExtensionNodes, "cp-[1-3]"},
		{"prod", credential.ExtensionDrill, ""}, {"prod", "no-touch-required", ""}, {"prod", "new@halligan.io", "x"},
	} {
		f.Add(s[0], s[1], s[2], true)
		f.Add(s[0], s[1], s[2], false)
	}
	f.Fuzz(func(t *testing.T, clusters, name, value string, extension bool) {
		cert := sound(fl, key)
		cert.CriticalOptions[credential.OptionClusters] = clusters
		if extension {
			cert.Extensions = map[string]string{name: value}
		} else {
			cert.CriticalOptions[name] = value
		}
		if err := cert.SignCert(rand.Reader, ca); err != nil {
			t.Fatal(err)
		}
		wire, err := gossh.ParsePublicKey(cert.Marshal())
		if err != nil {
			return
		}
		id, err := a.User(wire, "observer", from)
		if err != nil {
			if !fault.Is(err, fault.Unauthenticated) {
				t.Errorf("%T: %v", err, err)
			}
			return
		}
		if id.Person != "alice@acme.test" || id.Role != trust.Observer {
			t.Errorf("let in as %+v", id)
		}
		known := []string{credential.ExtensionActions, credential.ExtensionNamespaces, credential.ExtensionNodes, credential.ExtensionDrill, credential.ExtensionAutomation}
		if extension && strings.HasSuffix(name, "@halligan.io") && !strings.Contains(strings.Join(known, " "), name) {
			t.Errorf("let in with the unknown extension %q", name)
		}
		if !extension && name != credential.OptionClusters && name != "source-address" {
			t.Errorf("let in with the critical option %q", name)
		}
		if _, bare := cert.Extensions[name]; bare && name != credential.ExtensionAutomation && strings.HasSuffix(name, "@halligan.io") && reflect.DeepEqual(id.Scope, trust.Scope{}) {
			t.Errorf("%s=%q does not narrow", name, value)
		}
	})
}

// Bytes that claim to be a key or a certificate.
func FuzzUser(f *testing.F) {
	fl := newFleet(f)
	a := fl.authority()
	f.Add(fl.certify(order{}).Marshal())
	f.Add(fl.certify(order{host: true}).Marshal())
	f.Add(fl.public("alice").Marshal())
	f.Add(securityKey(f).Marshal())
	f.Fuzz(func(t *testing.T, wire []byte) {
		key, err := gossh.ParsePublicKey(wire)
		if err != nil {
			return
		}
		a.Offered(key)
		if id, err := a.User(key, "observer", from); err == nil && fmt.Sprint(id.Role) != "observer" {
			t.Errorf("let in as %+v", id)
		}
	})
}
