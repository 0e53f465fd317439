package credential_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
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

func mustURL(t testing.TB, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// client is a template of a client certificate without a fault.
func client(t testing.TB) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(31), Subject: pkix.Name{CommonName: "deploy-bot"}, NotBefore: t0.Add(-time.Hour), NotAfter: t0.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
		URIs: []*url.URL{mustURL(t, "halligan://staging,prod/responder?actions=scale,delete&namespaces=web-*&nodes=cp-1&drill")},
	}
}

func newECDSA(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestClient(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	key := newECDSA(t)
	leaf := create(t, client(t), f.clients.cert, key.Public(), f.clients.key)
	id, err := a.Client([]*x509.Certificate{leaf, f.clients.cert}, from)
	if err != nil {
		t.Fatal(err)
	}
	public, err := gossh.NewPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	want := trust.Identity{
		Person: "deploy-bot", Role: trust.Responder, Door: trust.GRPC, Kind: trust.Automation, Fingerprint: gossh.FingerprintSHA256(public), Serial: "31",
		Source: from.String(), NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, CA: id.CA,
		Scope: trust.Scope{Actions: []string{"scale", "delete"}, Namespaces: []string{"web-*"}, Nodes: []string{"cp-1"}, Drill: true},
	}
	if !reflect.DeepEqual(id, want) || !strings.HasPrefix(id.CA, "SHA256:") {
		t.Errorf("got  %+v\nwant %+v", id, want)
	}
	for at, wants := range map[time.Duration]string{ // no grace
		-time.Hour: "", -time.Hour - time.Second: "not valid before", time.Hour - time.Second: "", time.Hour: "ended at",
	} {
		f.clock.set(t0.Add(at))
		got, err := a.Client([]*x509.Certificate{leaf}, from)
		if wants != "" {
			refused(t, got, err, wants)
		} else if err != nil {
			t.Errorf("at %v: %v", at, err)
		}
	}
	f.clock.set(t0)
	if err := a.Check(id); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(){
		"serial":        func() { f.revocations.X509Serials = []bundle.X509Serial{{Serial: "0x1f"}} },
		"common name":   func() { f.revocations.KeyIDs = []string{"deploy-bot"} },
		"key":           func() { f.revocations.Keys = []string{id.Fingerprint} },
		"authority":     func() { f.revocations.Keys = []string{id.CA} },
		"no authority":  func() { f.policy.Authorities.TLSClient = bundle.CAs{} },
		"shorter lives": func() { f.policy.MaxCertificate = bundle.Duration(time.Hour) },
	} {
		revocations, policy := *f.revocations, *f.policy
		change()
		f.sign()
		got, err := a.Client([]*x509.Certificate{leaf}, from)
		t.Run(name, func(t *testing.T) { refused(t, got, err, "") })
		if err := a.Check(id); !isRevoked(err) {
			t.Errorf("%s: the session: %v", name, err)
		}
		*f.revocations, *f.policy = revocations, policy
	}
}

func TestClientRefuses(t *testing.T) {
	f := newFleet(t)
	a, key, stranger := f.authority(), newECDSA(t), newX509CA(t)
	small, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Client([]*x509.Certificate{create(t, client(t), f.clients.cert, ed, f.clients.key)}, from); err != nil {
		t.Error("Ed25519:", err)
	}
	uri := func(text string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.URIs = []*url.URL{mustURL(t, text)} }
	}
	for _, c := range []struct {
		name   string
		change func(*x509.Certificate)
		ca     *x509CA
		key    any
		wants  string
	}{
		{name: "a stranger's", ca: stranger, wants: "unknown authority"},
		{name: "of the servers' authority", ca: f.servers, wants: "unknown authority"},
		{name: "a server's", change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, wants: "usage"},
		{name: "for client and server", change: func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) }, wants: "usage"},
		{name: "for anything", change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }, wants: "usage"},
		{name: "for nothing named", change: func(c *x509.Certificate) { c.ExtKeyUsage = nil }, wants: "usage"},
		{name: "an authority", change: func(c *x509.Certificate) { c.IsCA = true }, wants: "authority's"},
		{name: "that may sign", change: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign; c.IsCA = true }, wants: "authority's"},
		{name: "too long by a second", change: func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(bundle.MaxCertificate + time.Second) }, wants: "is the most"},
		{name: "no URI", change: func(c *x509.Certificate) { c.URIs = nil }, wants: "exactly one URI"},
		{name: "two URIs", change: func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }, wants: "exactly one URI"},
		{name: "a DNS name too", change: func(c *x509.Certificate) { c.DNSNames = []string{"cp-1.prod"} }, wants: "exactly one URI"},
		{name: "an address too", change: func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} }, wants: "exactly one URI"},
		{name: "no name", change: func(c *x509.Certificate) { c.Subject.CommonName = "" }, wants: "common name"},
		{name: "a system name", change: func(c *x509.Certificate) { c.Subject.CommonName = "system:masters" }, wants: "common name"},
		{name: "a weak key", key: small.Public(), wants: "2048 bits"},
		{name: "an unknown critical extension", change: func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}, wants: "unhandled critical extension"},
		{name: "an approver", change: uri("halligan://prod/approver"), wants: "only people approve"},
		{name: "no role", change: uri("halligan://prod"), wants: "no role"},
		{name: "an unknown role", change: uri("halligan://prod/root"), wants: "no role"},
		{name: "two roles", change: uri("halligan://prod/observer/commander"), wants: "no role"},
		{name: "another scheme", change: uri("spiffe://prod/observer"), wants: "form"},
		{name: "another cluster", change: uri("halligan://staging/observer"), wants: "this is cluster"},
		{name: "another node", change: uri("halligan://prod/observer?nodes=cp-2"), wants: "for nodes"},
		{name: "a pattern of clusters", change: uri("halligan://*/observer"), wants: "not a cluster's name"},
		{name: "a port", change: uri("halligan://prod:1/observer"), wants: ""},
		{name: "an unknown parameter", change: uri("halligan://prod/observer?all"), wants: "unknown parameter"},
		{name: "a parameter twice", change: uri("halligan://prod/observer?actions=get&actions=scale"), wants: "more than once"},
		{name: "an empty list", change: uri("halligan://prod/observer?actions="), wants: "empty"},
		{name: "a flag with a value", change: uri("halligan://prod/observer?drill=0"), wants: "takes no value"},
		{name: "a fragment", change: uri("halligan://prod/observer#x"), wants: "form"},
		{name: "a user", change: uri("halligan://eve@prod/observer"), wants: ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.ca == nil {
				c.ca = f.clients
			}
			if c.key == nil {
				c.key = key.Public()
			}
			template := client(t)
			if c.change != nil {
				c.change(template)
			}
			der, err := x509.CreateCertificate(rand.Reader, template, c.ca.cert, c.key, c.ca.key)
			if err != nil {
				t.Fatal(err)
			}
			leaf, err := x509.ParseCertificate(der)
			if err != nil {
				t.Skip("the standard library does not even read it:", err)
			}
			id, err := a.Client([]*x509.Certificate{leaf, c.ca.cert}, from)
			refused(t, id, err, c.wants)
		})
	}
	id, err := a.Client(nil, from)
	refused(t, id, err, "no client certificate")
	// One link away: an authority that the policy's own has signed.
	between := &x509CA{key: newECDSA(t)}
	between.cert = create(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "between"}, NotBefore: t0.Add(-time.Hour), NotAfter: t0.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, f.clients.cert, between.key.Public(), f.clients.key)
	id, err = a.Client([]*x509.Certificate{create(t, client(t), between.cert, key.Public(), between.key), between.cert, f.clients.cert}, from)
	refused(t, id, err, "unknown authority")
}

func TestClientURI(t *testing.T) {
	for _, c := range []struct {
		clusters []string
		role     trust.Role
		scope    trust.Scope
		want     string
	}{
		{[]string{"prod"}, trust.Observer, trust.Scope{}, "halligan://prod/observer"},
		{[]string{"prod", "staging"}, trust.Responder, trust.Scope{Actions: []string{"scale", "de*"}, Nodes: []string{"cp-[12]"}}, "halligan://prod,staging/responder?actions=scale%2Cde%2A&nodes=cp-%5B12%5D"},
		{[]string{"prod"}, trust.Responder, trust.Scope{Drill: true}, "halligan://prod/responder?drill"},
		{[]string{"prod"}, trust.Responder, trust.Scope{Namespaces: []string{"web"}, Drill: true}, "halligan://prod/responder?namespaces=web&drill"},
		{nil, trust.Observer, trust.Scope{}, ""},
		{[]string{"prod"}, trust.None, trust.Scope{}, ""},
		{[]string{"*"}, trust.Observer, trust.Scope{}, ""},
		{[]string{"prod"}, trust.Observer, trust.Scope{Actions: []string{"a,b", "b"}}, ""}, // would read as a, b, b
	} {
		u, err := credential.ClientURI(c.clusters, c.role, c.scope)
		if c.want == "" {
			if err == nil {
				t.Errorf("%v made %s", c, u)
			}
			continue
		}
		if err != nil || u.String() != c.want {
			t.Errorf("got %v, %v; want %s", u, err, c.want)
			continue
		}
		clusters, role, scope, err := credential.ParseClientURI(mustURL(t, u.String()))
		if err != nil || !reflect.DeepEqual(clusters, c.clusters) || role != c.role || !reflect.DeepEqual(scope, c.scope) {
			t.Errorf("%s reads as %v %v %+v, %v", u, clusters, role, scope, err)
		}
	}
}

func FuzzParseClientURI(f *testing.F) {
	for _, s := range []string{
		"halligan://prod,staging/responder?actions=scale,delete&namespaces=web-*&nodes=cp-1&drill", "halligan://prod/observer", "halligan:prod/observer",
		"halligan://prod/observer?drill=1", "halligan://prod/%6fbserver", "halligan://prod/observer?actions=%00",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		u, err := url.Parse(text)
		if err != nil {
			return
		}
		clusters, role, scope, err := credential.ParseClientURI(u)
		if err != nil {
			return
		}
		again, err := credential.ClientURI(clusters, role, scope)
		if err != nil {
			t.Fatalf("%q reads, and cannot be written: %v", text, err)
		}
		c, r, s, err := credential.ParseClientURI(again)
		if err != nil || r != role || !reflect.DeepEqual(c, clusters) || !reflect.DeepEqual(s, scope) {
			t.Errorf("%q became %q: %v", text, again, err)
		}
	})
}

func TestHostKey(t *testing.T) {
	f := newFleet(t)
	var warned []string
	s := &credential.Servers{Bundle: f.store, Clock: f.clock, Warn: func(text string) { warned = append(warned, text) }}
	check := s.HostKey("cp-1.prod")
	cert := f.certify(order{host: true, to: t0.AddDate(0, 11, 0)})
	if err := check("192.0.2.1:2222", from, cert); err != nil || len(warned) != 0 {
		t.Fatal(err, warned)
	}
	for _, c := range []struct {
		name  string
		order order
		wants string
	}{
		{"another node", order{id: "cp-2.prod", principals: "cp-2.prod"}, "is for"},
		{"the node of that name in another cluster", order{id: "cp-1.staging", principals: "cp-1.staging"}, "is for"},
		{"several names", order{principals: "cp-1.prod,cp-2.prod"}, "is for"},
		{"any name", order{principals: "-"}, "is for"},
		{"a pattern", order{principals: "*.prod"}, "is for"},
		{"another key ID", order{id: "cp-2.prod"}, "is for"},
		{"serial 0", order{serial: "0"}, "serial 0"},
		{"endless", order{validity: "always:forever"}, "no end"},
		{"more than a year", order{to: t0.AddDate(0, 13, 0)}, "is the most"},
		{"by the user authority", order{ca: "user-ca"}, "no host authority"},
		{"by a stranger", order{ca: "other-ca"}, "no host authority"},
		{"a critical option", order{options: []string{"critical:colour@acme.test=red"}}, "critical option"},
		{"an unknown extension of ours", order{options: []string{"extension:new@halligan.io"}}, "unknown extension"},
		{"over", order{from: t0.AddDate(0, -1, 0), to: t0.Add(-2 * time.Hour)}, "ended at"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.order.host = true
			err := check("192.0.2.1:2222", from, f.certify(c.order))
			if !fault.Is(err, fault.Unauthenticated) || !strings.Contains(err.Error(), c.wants) {
				t.Errorf("got %v; want %q", err, c.wants)
			}
		})
	}
	user := f.certify(order{})
	user.ValidPrincipals = []string{"cp-1.prod"}
	for name, key := range map[string]gossh.PublicKey{"a plain key": f.public("cp-1"), "a user's certificate": user} {
		if err := check("192.0.2.1:2222", from, key); err == nil {
			t.Errorf("%s passes", name)
		}
	}
	if err := s.HostKey("")("192.0.2.1:2222", from, cert); err == nil {
		t.Error("a server without a name passes")
	}
	// A lying clock locks nobody out.
	if f.clock.set(t0.Add(-3 * time.Hour)); check("", from, cert) != nil || len(warned) != 1 {
		t.Error("within the grace:", check("", from, cert), warned)
	}
	f.clock.set(t0)
	for name, change := range map[string]func(){
		"serial":    func() { f.revocations.Serials = []bundle.Serial{{Serial: 7}} },
		"key":       func() { f.revocations.Keys = []string{gossh.FingerprintSHA256(f.public("cp-1"))} },
		"authority": func() { f.revocations.Keys = []string{gossh.FingerprintSHA256(f.public("host-ca"))} },
	} {
		revocations := *f.revocations
		change()
		f.sign()
		if err := check("", from, cert); err == nil || !strings.Contains(err.Error(), "revoked") {
			t.Errorf("%s: %v", name, err)
		}
		*f.revocations = revocations
	}
}

func TestServerCertificate(t *testing.T) {
	f := newFleet(t)
	key, stranger := newECDSA(t), newX509CA(t)
	var warned []string
	s := &credential.Servers{Bundle: f.store, Clock: f.clock, Warn: func(text string) { warned = append(warned, text) }}
	for _, c := range []struct {
		name   string
		change func(*x509.Certificate)
		ca     *x509CA
		wants  string
	}{
		{name: "sound"},
		{name: "another node's", change: func(c *x509.Certificate) { c.DNSNames = []string{"cp-2.prod"} }, wants: "is for"},
		{name: "a wildcard", change: func(c *x509.Certificate) { c.DNSNames = []string{"*.prod"} }, wants: "is for"},
		{name: "two names", change: func(c *x509.Certificate) { c.DNSNames = append(c.DNSNames, "cp-2.prod") }, wants: "is for"},
		{name: "the name in its subject only", change: func(c *x509.Certificate) { c.DNSNames = nil }, wants: "is for"},
		{name: "a client's", change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }, wants: "usage"},
		{name: "of the clients' authority", ca: f.clients, wants: "unknown authority"},
		{name: "a stranger's", ca: stranger, wants: "unknown authority"},
		{name: "more than a year", change: func(c *x509.Certificate) { c.NotAfter = c.NotBefore.AddDate(1, 1, 0) }, wants: "is the most"},
		{name: "over", change: func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = t0.Add(-24*time.Hour), t0.Add(-2*time.Hour)
		}, wants: "ended at"},
	} {
		t.Run(c.name, func(t *testing.T) {
			template := &x509.Certificate{
				SerialNumber: big.NewInt(41), Subject: pkix.Name{CommonName: "cp-1.prod"}, DNSNames: []string{"cp-1.prod"}, NotBefore: t0.Add(-time.Hour), NotAfter: t0.AddDate(0, 11, 0),
				KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
			}
			if c.change != nil {
				c.change(template)
			}
			if c.ca == nil {
				c.ca = f.servers
			}
			leaf := create(t, template, c.ca.cert, key.Public(), c.ca.key)
			err := handshake(t, s.TLS("cp-1.prod"), tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key})
			if c.wants == "" && err != nil || c.wants != "" && (!fault.Is(err, fault.Unauthenticated) || !strings.Contains(err.Error(), c.wants)) {
				t.Errorf("got %v; want %q", err, c.wants)
			}
			if c.wants != "" || len(warned) != 0 {
				return
			}
			f.revocations.X509Serials = []bundle.X509Serial{{Serial: "41"}}
			f.sign()
			if err := s.ServerCertificate("cp-1.prod", []*x509.Certificate{leaf}); err == nil || !strings.Contains(err.Error(), "revoked") {
				t.Error(err)
			}
			f.revocations.X509Serials = nil
			f.sign()
			f.clock.set(leaf.NotAfter)
			if err := s.ServerCertificate("cp-1.prod", []*x509.Certificate{leaf}); err != nil || len(warned) != 1 {
				t.Error("within the grace:", err, warned)
			}
			f.clock.set(t0)
			warned = nil
		})
	}
	if err := s.ServerCertificate("cp-1.prod", nil); err == nil {
		t.Error("a server without a certificate passes")
	}
}

// handshake returns the client's error.
func handshake(t *testing.T, config *tls.Config, server tls.Certificate) error {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	served := make(chan error, 1)
	go func() {
		there, err := listener.Accept()
		if err == nil {
			err = tls.Server(there, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{server}}).HandshakeContext(t.Context())
			_ = there.Close()
		}
		served <- err
	}()
	here, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	err = tls.Client(here, config).HandshakeContext(t.Context())
	_ = here.Close()
	<-served
	return err
}
