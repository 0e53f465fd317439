package bundle

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

func TestWhole(t *testing.T) {
	f := newFleet(t)
	f.pol.Rules = trust.ShippedRules() // as a new fleet writes it out
	data := f.file()
	file := mustParse(t, data)
	if !bytes.Equal(file.Format(), data) {
		t.Error("the file is not written as it was read")
	}
	for _, a := range []*Anchor{nil, {}, anchor(t, 2, 1, "root-1", "root-2"), anchor(t, 1, 0, "root-2")} {
		b, err := Verify(file, a)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b.Raw(), data) || len(b.Hash) != 64 {
			t.Errorf("raw or hash %q", b.Hash)
		}
		if got := b.String(); got != "bundle of fleet acme: policy 1, inventory 1, revocations 1" {
			t.Error(got)
		}
	}
	p := file.Policy
	if p.Roots.Threshold != 2 || len(p.Roots.Keys) != 3 || p.Roots.Keys[1].Comment != "root-2" || time.Duration(p.Grace) != 2*time.Hour || len(p.Protect) == 0 ||
		p.Sealed[1].Person != "bob" || len(p.Authorities.TLSClient.Certificates) != 1 || !p.Signed.Equal(day) {
		t.Errorf("policy %+v", p)
	}
	if !strings.HasPrefix(string(p.Bytes()), "format: 1\npart: policy\nfleet: acme\nversion: 1\nsigned: \"2026-03-01T09:00:00Z\"\nroots:\n") || strings.Contains(string(p.Bytes()), "ssh-ed25519 \n") {
		t.Errorf("not for a reader:\n%s", p.Bytes()[:300])
	}
}

// TestPolicyDefaults: what may be absent, is.
func TestPolicyDefaults(t *testing.T) {
	text := fmt.Sprintf("format: 1\npart: policy\nfleet: acme\nversion: 1\nsigned: 2026-03-01T09:00:00Z\nroots: {threshold: 1, keys: [%q]}\nauthorities: {user: [%q], host: [%q]}\n",
		key("root-1").Line(), key("user-ca").Line(), key("host-ca").Line())
	p, err := decodePolicy([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if time.Duration(p.FreshFor) != 168*time.Hour || time.Duration(p.Grace) != 2*time.Hour || time.Duration(p.MaxCertificate) != 168*time.Hour {
		t.Errorf("%v %v %v", p.FreshFor, p.Grace, p.MaxCertificate)
	}
	again, err := Encode(p)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"freshFor: 168h\n", "grace: 2h\n"} {
		if !bytes.Contains(again, []byte(line)) {
			t.Errorf("no %q in\n%s", line, again)
		}
	}
	if p, err = decodePolicy([]byte(text + "grace: 0s\n")); err != nil || p.Grace != 0 {
		t.Errorf("no grace at all: %v, %v", p, err)
	}
}

// TestForm is about what nobody's signature can make good.
func TestForm(t *testing.T) {
	f := newFleet(t)
	pol, inv, rev := f.policy("root-1", "root-2"), f.inventory("delegate"), f.revocations("delegate")
	whole := join(pol, inv, rev)
	replace := func(old, new string) []byte {
		out := bytes.Replace(whole, []byte(old), []byte(new), 1)
		if bytes.Equal(out, whole) {
			t.Fatalf("%q is not there", old)
		}
		return out
	}
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"empty":            {nil, "no entries"},
		"huge":             {append(bytes.Clone(whole), make([]byte, MaxSize)...), "more than 1048576 bytes"},
		"text before":      {append([]byte("hello\n"), whole...), "signed by nobody"},
		"binary":           {bytes.Repeat([]byte{0, 255}, 1000), "no entries"},
		"cut in a line":    {whole[:len(whole)-1], "cut off"},
		"cut in half":      {whole[:len(whole)/2], ""},
		"cut after a part": {whole[:bytes.Index(whole, []byte("-- policy.yaml.sig --"))], "needs its .sig"},
		"cut in armor":     {whole[:bytes.Index(whole, []byte("-----END SSH"))], "armored"},
		"twice":            {join(pol, inv, inv, rev), "twice"},
		"twice, apart":     {join(pol, inv, rev, pol), "twice, or not in the order"},
		"order":            {join(pol, rev, inv), "order"},
		"unknown entry":    {bytes.ReplaceAll(whole, []byte("-- inventory.yaml"), []byte("-- inventori.yaml")), "none of"},
		"path":             {bytes.ReplaceAll(whole, []byte("-- inventory.yaml"), []byte("-- ../inventory.yaml")), "none of"},
		"marker":           {replace("-- inventory.yaml --", "--  inventory.yaml --"), "exactly"},
		"CRLF":             {bytes.ReplaceAll(whole, []byte("\n"), []byte("\r\n")), ""},
		"no signature":     {entry("policy", f.encode(f.pol), nil), "signatures: none"},
		"not armored":      {entry("policy", f.encode(f.pol), []byte("hello\n")), "armored"},
		"text in armor":    {replace("-----BEGIN SSH SIGNATURE", "so\n-----BEGIN SSH SIGNATURE"), "armored"},
		"other part":       {bytes.ReplaceAll(inv, []byte("inventory"), []byte("revocations")), ""},
		"other fleet":      {replace("part: inventory\nfleet: acme", "part: inventory\nfleet: acmf"), "fleets acme and acmf"},
		"earlier alone":    {rename(pol, "policy.1"), "earlier policy without a later"},
		"earlier, wrong":   {join(rename(pol, "policy.2"), whole), "holds version 1"},
		"earlier, same":    {join(rename(pol, "policy.1"), whole), "without a later"},
		"earlier, twice":   {join(rename(pol, "policy.1"), rename(pol, "policy.1"), whole), "ascending"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse(c.data)
			wantError(t, err, c.want)
			if err != nil && !fault.Is(err, fault.Usage) {
				t.Errorf("code %s", fault.CodeOf(err))
			}
		})
	}
}

// TestSchema is about fields, each as it stands in the file.
func TestSchema(t *testing.T) {
	f := newFleet(t)
	f.rev.Serials, f.rev.X509Serials = []Serial{{Serial: 7, CA: key("user-ca").Fingerprint(), Until: day}}, []X509Serial{{Serial: "0x1f"}}
	f.rev.KeyIDs, f.rev.Keys = []string{"mallory"}, []string{key("x").Fingerprint()}
	texts := map[string]string{PolicyPart: string(f.encode(f.pol)), InventoryPart: string(f.encode(f.inv)), RevocationsPart: string(f.encode(f.rev))}
	decoders := map[string]func(string) error{
		PolicyPart:      func(s string) error { _, err := decodePolicy([]byte(s)); return err },
		InventoryPart:   func(s string) error { _, err := decodeInventory([]byte(s)); return err },
		RevocationsPart: func(s string) error { _, err := decodeRevocations([]byte(s)); return err },
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	weakPub, err := ssh.NewPublicKey(weak.Public())
	if err != nil {
		t.Fatal(err)
	}
	cert := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(certified(t, "root-1").PublicKey())))
	line := func(name string) string { return key(name).Line() }
	asToken := token{name: "root-1", application: "ssh:"}.PublicKey()
	indent := func(pem string) string { return strings.ReplaceAll(strings.TrimSpace(pem), "\n", "\n    ") }
	client, server := indent(f.pol.Authorities.TLSClient.text), indent(f.pol.Authorities.TLSServer.text)
	notCA := indent(tlsCA(t, tlsKeys()[0], func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }))

	if err := decoders[PolicyPart](strings.Replace(texts[PolicyPart], "grace: 2h", "#\tpour l'été\ngrace: 2h", 1)); err != nil {
		t.Error(err)
	}
	for i, c := range []struct{ part, old, new, want string }{
		{PolicyPart, "grace: 2h", "graze: 2h", `unknown field "graze"`},
		{PolicyPart, "grace: 2h", "Grace: 2h", `unknown field "Grace"`},
		{PolicyPart, "grace: 2h", "grace: 2h\ngrace: 3h", "already set"},
		{PolicyPart, "threshold: 2", "threshold: 2\n  quorum: 1", `unknown field "roots.quorum"`},
		{InventoryPart, "- name: cp-2", "- name: cp-2\n        host: x", "unknown field"},
		{RevocationsPart, "serial: 7", "serial: 7\n    reason: x", "unknown field"},
		{PolicyPart, "format: 1", "format: 2", "format 2 is not known"},
		{PolicyPart, "part: policy", "part: inventory", "says that it is part"},
		{PolicyPart, "fleet: acme", "fleet: Acme Inc", "fleet"},
		{PolicyPart, "version: 1", "version: 0", "from 1"},
		{PolicyPart, "version: 1", "version: -1", ""},
		{PolicyPart, "version: 1", "version: 1\nprevious: aa", "version 1 has no previous"},
		{PolicyPart, "version: 1", "version: 2", "previous"},
		{PolicyPart, `signed: "2026-03-01T09:00:00Z"`, "", "signed"},
		{PolicyPart, "signed: ", "---\nsigned: ", "more than one YAML document"},
		// What an editor shows as one comment is more to YAML.
		{PolicyPart, "grace: 2h", "# grace: 2h\u0085grace: 24h", "the character U+0085"},
		{PolicyPart, "grace: 2h", "# \rgrace: 24h", "the character U+000D"},
		{PolicyPart, "grace: 2h", "# \u2028grace: 24h", "the character U+2028"},
		{PolicyPart, "grace: 2h", "# \u202e\ngrace: 2h", "the character U+202E"},
		{PolicyPart, "grace: 2h", "# \x1b[1A\ngrace: 2h", "the character U+001B"},
		{PolicyPart, "grace: 2h", "# \xff\ngrace: 2h", "the character U+FFFD"},
		{PolicyPart, "threshold: 2", "threshold: 0", "outside 1 to 3"},
		{PolicyPart, "threshold: 2", "threshold: 4", "outside 1 to 3"},
		{PolicyPart, "grace: 2h", "grace: 25h", "outside"},
		{PolicyPart, "grace: 2h", "grace: -1h", "outside"},
		{PolicyPart, "grace: 2h", "grace: 7200", "want a duration"},
		{PolicyPart, "freshFor: 168h", "freshFor: 1000h", "outside"},
		{PolicyPart, "maxCertificate: 168h", "maxCertificate: 169h", "outside"},
		{PolicyPart, "maxCertificate: 168h", "maxCertificate: 0s", "outside"},
		// One key, one use.
		{PolicyPart, line("root-2"), line("root-1"), "roots.keys and in roots.keys"},
		{PolicyPart, line("root-2"), strings.TrimSuffix(line("root-1"), "root-1") + "somebody-else", "roots.keys and in roots.keys"},
		{PolicyPart, line("root-2"), strings.TrimSpace(string(ssh.MarshalAuthorizedKey(asToken))), "roots.keys and in roots.keys"},
		{PolicyPart, line("delegate"), line("root-1"), "roots.keys and in delegates"},
		{PolicyPart, line("host-ca"), line("user-ca"), "authorities.user and in authorities.host"},
		{PolicyPart, line("user-ca"), line("delegate"), "delegates and in authorities.user"},
		{PolicyPart, server, client, "authorities.tlsClient and in authorities.tlsServer"},
		{PolicyPart, line("host-ca"), strings.TrimSpace(string(ssh.MarshalAuthorizedKey(must(ssh.NewPublicKey(tlsKeys()[0].Public()))))), "authorities.host and in authorities.tlsClient"},
		{PolicyPart, sealed("bob").Line(), sealed("alice").Line(), "sealed[0] and in sealed[1]"},
		// Keys.
		{PolicyPart, line("root-2"), cert, "are not accepted"},
		{PolicyPart, line("root-2"), strings.TrimSpace(string(ssh.MarshalAuthorizedKey(weakPub))), "1024 bits"},
		{PolicyPart, line("root-2"), "no-touch-required " + line("root-2"), "are not accepted"},
		{PolicyPart, line("root-2"), `"` + line("root-2") + `\u202e"`, "plain ASCII"},
		{PolicyPart, line("root-2"), `"` + line("root-2") + `\n"`, "one line"},
		{PolicyPart, "- " + line("user-ca"), "[]", "at least one user key"},
		{PolicyPart, "- " + line("user-ca"), "- null", ""},
		{PolicyPart, "ssh-ed25519 ", "ssh-rsa ", "is not of type"},
		{PolicyPart, client, notCA, "no authority"},
		{PolicyPart, client, "hello", "PEM blocks CERTIFICATE"},
		{PolicyPart, client, client + "\n    hello", "PEM blocks CERTIFICATE"},
		// Sealed.
		{PolicyPart, sealed("bob").Line(), line("bob"), "no FIDO2 key"},
		{PolicyPart, "person: bob", "person: Bob", "person"},
		{PolicyPart, "role: commander", "role: admin", "unknown role"},
		{PolicyPart, "- prod\n", "- '*'\n", "cluster"},
		{PolicyPart, "2026-05-30T09:00:00Z", "2026-05-30T09:00:01Z", "90 days"},
		{PolicyPart, "2026-05-30T09:00:00Z", "2026-03-01T09:00:00Z", "90 days"},
		{PolicyPart, "grace: 2h", "grace: 2h\nactions: {scale: {role: approver}}", "none of observer"},
		// Inventory.
		{InventoryPart, "address: 10.0.0.12", "address: cp-2.prod.example.com", "is not an IP address"},
		{InventoryPart, "address: 10.0.0.12", "address: localhost", "is not an IP address"},
		{InventoryPart, "address: 10.0.0.12", "address: 10.0.0.12:22", "is not an IP address"},
		{InventoryPart, "address: 10.0.0.12", "address: 10.0.0.012", "is not an IP address"},
		{InventoryPart, "address: 10.0.0.12", "address: 0.0.0.0", "is not an IP address"},
		{InventoryPart, "address: 10.0.0.12", "address: fe80::1%eth0", "is not an IP address"},
		{InventoryPart, "address: 192.0.2.2", "address: bastion-b", "is not an IP address"},
		{InventoryPart, "address: 10.0.0.12", "address: ''", "is not an IP address"},
		{InventoryPart, "        address: 10.0.0.12\n", "", "want an address"},
		{InventoryPart, "address: 10.0.0.12", "address: 10.0.0.11", "same address"},
		{InventoryPart, "sshPort: 2222", "sshPort: 0", "sshPort"},
		{InventoryPart, "sshPort: 2222", "sshPort: 65536", ""},
		{InventoryPart, "grpcPort: 2223", "grpcPort: 2222", "another grpcPort"},
		{InventoryPart, "name: cp-2", "reach: In\n        name: cp-2", "neither in nor out"},
		{InventoryPart, "name: cp-2", "tunnelPort: 7444\n        name: cp-2", "tunnelPort is a bastion's"},
		{InventoryPart, "name: cp-2", "name: cp-1", "cp-1.staging is there twice"},
		{InventoryPart, "name: cp-2", "name: CP_2", "is not a name"},
		{InventoryPart, "name: cp-2", "name: cp-1.staging", "the name that another one has"},
		{InventoryPart, "name: staging", "name: prod", "prod is there twice"},
		{InventoryPart, "name: staging", "name: bastion", "other than bastion"},
		{InventoryPart, "name: staging", "name: st.aging", "is not a name"},
		{InventoryPart, "cdf818194e3a8c32", "prod-etcd", "in hex"},
		{InventoryPart, "policyVersion: 1", "policyVersion: 0", "from 1"},
		// Revocations.
		{RevocationsPart, "policyVersion: 1", "policyVersion: 0", "from 1"},
		{RevocationsPart, "serial: 7", "serial: 0", "0 is no serial"},
		{RevocationsPart, key("user-ca").Fingerprint(), "SHA256:abc", "is no fingerprint"},
		{RevocationsPart, "- mallory", "- Mallory*", "is not a name"},
		{RevocationsPart, "- mallory", "- mallory\n  - mallory", "listed twice"},
		{RevocationsPart, "- " + key("x").Fingerprint(), "- MD5:00", "is no fingerprint"},
		{RevocationsPart, `"0x1f"`, `"1f"`, "no number"},
		{RevocationsPart, `"0x1f"`, `"-1"`, "no number"},
		{RevocationsPart, `"0x1f"`, `17`, ""},
	} {
		t.Run(fmt.Sprintf("%02d %s %.20s", i, c.part, c.new), func(t *testing.T) {
			text := texts[c.part]
			i := strings.LastIndex(text, c.old)
			if i < 0 {
				t.Fatalf("%q is not in\n%s", c.old, text)
			}
			if err := decoders[c.part](text); err != nil {
				t.Fatal(err)
			}
			wantError(t, decoders[c.part](text[:i]+c.new+text[i+len(c.old):]), c.want)
		})
	}
	t.Run("no newline", func(t *testing.T) {
		wantError(t, decoders[PolicyPart](strings.TrimSpace(texts[PolicyPart])), "cut off")
	})
	t.Run("many mistakes", func(t *testing.T) {
		err := decoders[PolicyPart](texts[PolicyPart] + strings.Repeat("grace: 2h\n", 10_000))
		if wantError(t, err, "already set"); err != nil && len(err.Error()) > 400 {
			t.Errorf("%d bytes of error", len(err.Error()))
		}
	})
	t.Run("aliases", func(t *testing.T) {
		bomb := "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
		for i := 1; i < 9; i++ {
			bomb += fmt.Sprintf("a%d: &a%d [%s]\n", i, i, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d,", i-1), 9), ","))
		}
		wantError(t, decoders[PolicyPart](bomb), "aliasing")
	})
	t.Run("no part", func(t *testing.T) {
		if _, err := Encode(f.pol.Roots); err == nil {
			t.Error("encoded")
		}
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestSigners: who has to sign what, and what counts.
func TestSigners(t *testing.T) {
	f := newFleet(t)
	pol, inv, rev := f.encode(f.pol), f.encode(f.inv), f.encode(f.rev)
	sig := func(data []byte, part string, by ...string) []byte { return sign(t, data, part+"@halligan.io", by...) }
	goodInv, goodRev := entry(InventoryPart, inv, sig(inv, InventoryPart, "delegate")), entry(RevocationsPart, rev, sig(rev, RevocationsPart, "root-3"))
	policyBy := func(by ...string) []byte {
		return join(entry(PolicyPart, pol, sig(pol, PolicyPart, by...)), goodInv, goodRev)
	}
	goodPol := entry(PolicyPart, pol, sig(pol, PolicyPart, "root-1", "root-2"))
	invBy := func(by ...string) []byte {
		return join(goodPol, entry(InventoryPart, inv, sig(inv, InventoryPart, by...)), goodRev)
	}
	tampered := func(data []byte, old, new string) []byte { return bytes.Replace(data, []byte(old), []byte(new), 1) }
	withCertificate := func() []byte {
		s := must(sshsig.Sign(bytes.NewReader(pol), certified(t, "root-1"), sshsig.HashSHA512, PolicyNamespace))
		return sshsig.Armor(s)
	}()
	sha256 := sshsig.Armor(must(sshsig.Sign(bytes.NewReader(pol), signer("root-1"), sshsig.HashSHA256, PolicyNamespace)))
	later := *f.inv
	later.PolicyVersion = 2
	laterInv, laterRev := f.entry(&later, InventoryPart, []string{"delegate"}), *f.rev
	laterRev.PolicyVersion = 2

	for name, c := range map[string]struct {
		data []byte
		want string // empty: good
	}{
		"two roots":                 {policyBy("root-1", "root-3"), ""},
		"and strangers":             {policyBy("stranger", "root-1", "root-3"), ""},
		"one root":                  {policyBy("root-1"), "is signed by 1 of its own roots, and needs 2"},
		"one root twice":            {policyBy("root-1", "root-1"), "is signed by 1 of"},
		"one root and a stranger":   {policyBy("root-1", "stranger"), "is signed by 1 of"},
		"one root and the delegate": {policyBy("root-1", "delegate"), "is signed by 1 of"},
		"a root's certificate": {join(entry(PolicyPart, pol, join(sig(pol, PolicyPart, "root-1"), withCertificate)), goodInv, goodRev),
			"signed with a certificate"},
		"sha256":                 {join(entry(PolicyPart, pol, join(sig(pol, PolicyPart, "root-2"), sha256)), goodInv, goodRev), "want sha512"},
		"other namespace":        {join(entry(PolicyPart, pol, sig(pol, InventoryPart, "root-1", "root-2")), goodInv, goodRev), "namespace"},
		"tampered policy":        {tampered(policyBy("root-1", "root-2"), "grace: 2h", "grace: 3h"), "was changed after root-1"},
		"tampered inventory":     {tampered(policyBy("root-1", "root-2"), "10.0.0.12", "10.0.0.13"), "was changed after delegate"},
		"tampered revocations":   {tampered(policyBy("root-1", "root-2"), "policyVersion: 1\n-- revocations", "policyVersion: 1\nkeyIDs: [alice]\n-- revocations"), "was changed after root-3"},
		"one bad, enough others": {join(entry(PolicyPart, pol, join(sig(pol, PolicyPart, "root-1", "root-2"), sig(inv, PolicyPart, "root-3"))), goodInv, goodRev), "was changed after root-3"},
		"inventory by a root":    {invBy("root-2"), ""},
		"by an unknown delegate": {invBy("other-delegate"), "signed by no delegate and no root of policy 1"},
		"by an authority":        {invBy("user-ca"), "signed by no delegate"},
		"later inventory":        {join(goodPol, laterInv, goodRev), "goes with policy 2 and later, and policy 1 is there"},
		"later revocations":      {join(goodPol, goodInv, f.entry(&laterRev, RevocationsPart, []string{"root-1"})), "goes with policy 2 and later"},
		"no inventory":           {join(goodPol, goodRev), "missing"},
		"no revocations":         {join(goodPol, goodInv), "missing"},
		"no policy":              {join(goodInv, goodRev), "missing"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(c.data, nil)
			if c.want == "" && err != nil {
				t.Error(err)
			} else if c.want != "" {
				wantError(t, err, c.want)
			}
		})
	}
}

// TestPresence: a FIDO key counts only with its user's touch.
func TestPresence(t *testing.T) {
	message := []byte("part\n")
	for flags, good := range map[byte]bool{0: false, 1: true, 4: false, 5: true} {
		s := must(sshsig.Sign(bytes.NewReader(message), token{"fido", "ssh:", flags}, sshsig.HashSHA512, PolicyNamespace))
		pub, err := VerifySignature(message, PolicyNamespace, sshsig.Armor(s))
		if (err == nil) != good || err == nil && pub.Type() != ssh.KeyAlgoSKED25519 {
			t.Errorf("flags %d: %v", flags, err)
		}
		// It is noticed where it is made, too.
		if _, err := Sign(message, PolicyNamespace, token{"fido", "ssh:", flags}); (err == nil) != good {
			t.Errorf("flags %d, made: %v", flags, err)
		}
		if good {
			_, err := VerifySignature(append(message, '\n'), PolicyNamespace, sshsig.Armor(s))
			wantError(t, err, "did not verify")
		}
		// Who sets the flag afterwards is found out.
		s.Signature.Rest[0] ^= 1
		if _, err := VerifySignature(message, PolicyNamespace, sshsig.Armor(s)); err == nil {
			t.Errorf("flags %d, changed", flags)
		}
	}
	f := newFleet(t)
	f.pol.Roots = Roots{Threshold: 1, Keys: []Key{sealed("fido")}}
	pol := f.encode(f.pol)
	for flags, good := range map[byte]bool{0: false, 1: true} {
		s := must(sshsig.Sign(bytes.NewReader(pol), token{"fido", "ssh:", flags}, sshsig.HashSHA512, PolicyNamespace))
		_, err := load(join(entry(PolicyPart, pol, sshsig.Armor(s)), f.inventory("delegate"), f.revocations("delegate")), nil)
		if (err == nil) != good {
			t.Errorf("a policy, flags %d: %v", flags, err)
		}
	}
}

// TestSignWithCertificate: of a certificate, its key signs.
func TestSignWithCertificate(t *testing.T) {
	sig, err := Sign([]byte("x"), PolicyNamespace, certified(t, "root-1"))
	if err != nil {
		t.Fatal(err)
	}
	pub, err := VerifySignature([]byte("x"), PolicyNamespace, sig)
	if err != nil || !bytes.Equal(pub.Marshal(), key("root-1").Marshal()) {
		t.Errorf("%v, %v", pub, err)
	}
	_, err = VerifySignature([]byte("x"), PolicyNamespace, join(sig, sig))
	wantError(t, err, "2 signatures")
	for _, k := range []any{rsaKey(), tlsKeys()[0]} {
		s := must(ssh.NewSignerFromKey(k))
		if _, err := Sign([]byte("x"), PolicyNamespace, s); err != nil {
			t.Error(s.PublicKey().Type(), err)
		}
	}
	_, err = Sign([]byte("x"), "", signer("root-1"))
	wantError(t, err, "namespace")
}

// TestChain: roots are rotated twice, from 1-3 over 3-5 to 5-7.
func TestChain(t *testing.T) {
	f := newFleet(t)
	rest := join(f.inventory("root-3"), f.revocations("root-3"))
	v1 := f.policy("root-1", "root-2")
	rotate := func(names ...string) {
		next(&f.pol.Header, f.encode(f.pol))
		f.pol.Roots.Keys = nil
		for _, n := range names {
			f.pol.Roots.Keys = append(f.pol.Roots.Keys, key(n))
		}
	}
	rotate("root-3", "root-4", "root-5")
	v2 := f.policy("root-1", "root-2", "root-4", "root-5")
	v2half := f.policy("root-1", "root-2", "root-4")
	v2self := f.policy("root-3", "root-4", "root-5")
	rotate("root-3", "root-4", "root-5")
	v3 := f.policy("root-3", "root-5")
	rotate("root-5", "root-6", "root-7")
	f.inv.Signed, f.rev.Signed = day.Add(time.Hour), day.Add(time.Hour)
	v4 := f.policy("root-3", "root-5", "root-6")
	rest4 := join(f.inventory("root-5"), f.revocations("root-5"))
	old := anchor(t, 2, 0, "root-1", "root-2", "root-3")
	start := mustVerify(t, join(v1, rest), old)

	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"all":             {join(rename(v1, "policy.1"), rename(v2, "policy.2"), rename(v3, "policy.3"), v4, rest4), ""},
		"what is needed":  {join(rename(v2, "policy.2"), v4, rest4), ""},
		"one missing":     {join(rename(v3, "policy.3"), v4, rest4), "policy 4 is signed by 1 of the roots of"},
		"all missing":     {join(v4, rest4), "policy 4 is signed by 1 of the roots of"},
		"only its own":    {join(v2self, rest), "policy 2 is signed by 1 of the roots of"},
		"only the old":    {join(v2half, rest), "policy 2 is signed by 1 of its own roots"},
		"the next":        {join(v2, rest), ""},
		"cheat, then all": {join(rename(v2self, "policy.2"), v4, rest4), "policy 4 is signed by 1 of the roots of"},
	} {
		t.Run(name, func(t *testing.T) {
			fresh, err := load(c.data, old)
			merged, merr := start.merge(must(Parse(c.data)))
			if c.want != "" {
				wantError(t, err, c.want)
				wantError(t, merr, c.want)
				return
			}
			if err != nil || merr != nil {
				t.Fatal(err, merr)
			}
			if fresh.Policy.Version != merged.Policy.Version || fresh.Hash != merged.Hash {
				t.Errorf("%s, %s", fresh, merged)
			}
			// What is kept leads others there, too.
			for _, b := range []*Bundle{fresh, merged} {
				again, err := load(b.Raw(), old)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := start.merge(b.File()); err != nil || !bytes.Equal(again.Raw(), b.Raw()) {
					t.Errorf("%v", err)
				}
			}
		})
	}

	t.Run("in steps", func(t *testing.T) {
		b := start
		for _, step := range [][]byte{v2, v3, join(v4, rest4)} {
			data := step
			if bytes.Equal(step, v2) { // v1's delegate and roots sign for v2 as well
				data = join(step, rest)
			}
			n, err := b.merge(must(Parse(data)))
			if err != nil {
				t.Fatal(err)
			}
			b = n
		}
		if len(b.earlier) == 0 || b.earlier[0].Version != 2 || b.Policy.Version != 4 {
			t.Errorf("%s with %d earlier", b, len(b.earlier))
		}
		if _, err := load(b.Raw(), old); err != nil {
			t.Error(err)
		}
	})
	t.Run("without an anchor", func(t *testing.T) {
		whole := join(rename(v2, "policy.2"), rename(v3, "policy.3"), v4, rest4)
		b := mustVerify(t, whole, nil)
		if _, err := load(b.Raw(), old); err != nil {
			t.Error("the chain was lost:", err)
		}
		_, err := load(join(rename(v2half, "policy.2"), v4, rest4), nil)
		wantError(t, err, "policy 2 is signed by 1 of its own roots")
	})
	t.Run("another predecessor", func(t *testing.T) {
		other := newFleet(t)
		other.pol.Grace = Duration(time.Hour)
		b := mustVerify(t, other.file(), old)
		_, err := b.merge(must(Parse(join(v2, rest))))
		if !errors.Is(err, ErrForked) {
			t.Error(err)
		}
	})
	t.Run("floor", func(t *testing.T) {
		_, err := load(join(v2, rest), anchor(t, 2, 3, "root-1", "root-2", "root-3"))
		wantError(t, err, "policy 2 is below 3")
		_, err = load(join(v2, rest), &Anchor{MinPolicyVersion: 3})
		wantError(t, err, "policy 2 is below 3")
	})
	t.Run("newest anchor", func(t *testing.T) {
		if _, err := load(join(rename(v1, "policy.1"), rename(v2, "policy.2"), rename(v3, "policy.3"), v4, rest4), anchor(t, 2, 4, "root-5", "root-6")); err != nil {
			t.Error(err)
		}
	})
	t.Run("added", func(t *testing.T) {
		f := mustParse(t, join(v1, rest))
		for _, step := range [][]byte{v2, v3, v4} {
			p := mustParse(t, step).Policy
			if err := f.Add(p.Bytes(), p.Signatures()); err != nil {
				t.Fatal(err)
			}
		}
		n := mustParse(t, rest4)
		if err := errors.Join(f.Add(n.Inventory.Bytes(), n.Inventory.Signatures()), f.Add(n.Revocations.Bytes(), n.Revocations.Signatures())); err != nil {
			t.Fatal(err)
		}
		if len(f.Earlier) != 1 || f.Earlier[0].Version != 2 {
			t.Errorf("%d earlier", len(f.Earlier))
		}
		if _, err := load(f.Format(), old); err != nil {
			t.Error(err)
		}
		was := f.Format()
		wantError(t, f.Add([]byte("part: policy\n"), nil), "format 0")
		wantError(t, f.Add(f.Policy.Bytes(), nil), "signatures: none")
		if !bytes.Equal(f.Format(), was) {
			t.Error("changed by what was refused")
		}
	})
}

func TestAnchor(t *testing.T) {
	line := key("root-1").Line()
	for _, c := range []struct {
		lines     []string
		threshold int
		want      string
	}{
		{[]string{line}, 0, "outside 1 to 1"}, {[]string{line}, 2, "outside 1 to 1"}, {nil, 1, "outside"},
		{[]string{line, line + "-again"}, 2, "twice"}, {[]string{"hello"}, 1, "one line"},
	} {
		_, err := NewAnchor(c.lines, c.threshold, 0)
		wantError(t, err, c.want)
	}
	if _, err := NewAnchor(nil, 0, 7); err != nil {
		t.Error(err)
	}
	f := newFleet(t)
	_, err := load(f.file(), anchor(t, 1, 0, "root-3"))
	wantError(t, err, "is signed by 0 of the roots of this machine's configuration")
}

// TestLastCommander: nobody alone locks out all others.
func TestLastCommander(t *testing.T) {
	tlsPub := ssh.FingerprintSHA256(must(ssh.NewPublicKey(tlsKeys()[0].Public())))
	for name, c := range map[string]struct {
		change      func(*Revocations)
		alone, most string // what the delegate or one root, and what two roots are told
	}{
		"nothing":             {func(*Revocations) {}, "", ""},
		"one sealed":          {func(r *Revocations) { r.Keys = []string{sealed("bob").Fingerprint()} }, "", ""},
		"one person":          {func(r *Revocations) { r.KeyIDs = []string{"alice"} }, "", ""},
		"both":                {func(r *Revocations) { r.Keys, r.KeyIDs = []string{sealed("bob").Fingerprint()}, []string{"alice"} }, "leave no sealed commander", ""},
		"user authority":      {func(r *Revocations) { r.Keys = []string{key("user-ca").Fingerprint()} }, "an authority's key", ""},
		"host authority":      {func(r *Revocations) { r.Keys = []string{key("host-ca").Fingerprint()} }, "an authority's key", ""},
		"TLS authority":       {func(r *Revocations) { r.Keys = []string{tlsPub} }, "an authority's key", ""},
		"root":                {func(r *Revocations) { r.Keys = []string{key("root-2").Fingerprint()} }, "a new policy drops it", "a new policy drops it"},
		"delegate":            {func(r *Revocations) { r.Keys = []string{key("delegate").Fingerprint()} }, "a new policy drops it", "a new policy drops it"},
		"everybody's serials": {func(r *Revocations) { r.Serials = []Serial{{Serial: 1}, {Serial: 2}} }, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t)
			c.change(f.rev)
			for _, by := range [][]string{{"delegate"}, {"root-1"}, {"root-1", "root-1", "delegate"}, {"root-1", "root-3"}} {
				want := c.alone
				if len(by) == 2 {
					want = c.most
				}
				_, err := load(join(f.policy("root-1", "root-2"), f.inventory("delegate"), f.revocations(by...)), nil)
				if want == "" && err != nil {
					t.Errorf("%v: %v", by, err)
				} else if want != "" {
					wantError(t, err, want)
				}
			}
		})
	}
}

// TestMerge: the newest verified part of each.
func TestMerge(t *testing.T) {
	f := newFleet(t)
	b1 := mustVerify(t, f.file(), nil)
	merge := func(b *Bundle, data ...[]byte) (*Bundle, error) { return b.merge(must(Parse(join(data...)))) }
	good := func(n *Bundle, err error) func(want string) *Bundle {
		return func(want string) *Bundle {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
			if got := n.String(); got != "bundle of fleet acme: "+want {
				t.Fatalf("%s, want %s", got, want)
			}
			if _, err := load(n.Raw(), nil); err != nil {
				t.Fatal("what was merged does not verify by itself:", err)
			}
			return n
		}
	}
	bad := func(n *Bundle, err error) func(want string) {
		return func(want string) { t.Helper(); wantError(t, err, want) }
	}
	pol1, inv1, rev1 := f.policy("root-1", "root-2"), f.inventory("delegate"), f.revocations("delegate")
	if n, err := merge(b1, pol1, inv1, rev1); n != b1 || err != nil {
		t.Error("the same is a change:", err)
	}
	if n, err := merge(b1, f.policy("root-2", "root-3")); n != b1 || err != nil {
		t.Error("other signatures of the same are a change:", err)
	}

	// One part at a time, and a newer one with an older policy.
	next(&f.rev.Header, f.encode(f.rev))
	f.rev.KeyIDs = []string{"mallory"}
	f.rev.Serials = []Serial{{Serial: 7, Until: day.Add(24 * time.Hour)}}
	rev2 := f.revocations("delegate")
	b2 := good(merge(b1, rev2))("policy 1, inventory 1, revocations 2")
	next(&f.pol.Header, f.encode(f.pol))
	pol2 := f.policy("root-1", "root-3")
	b3 := good(merge(b2, pol2, inv1, rev1))("policy 2, inventory 1, revocations 2")
	good(merge(b1, pol2, inv1, rev2))("policy 2, inventory 1, revocations 2")
	if b3.Hash == b2.Hash || !b3.Signed().Equal(day.Add(time.Hour)) {
		t.Error(b3.Hash, b3.Signed())
	}

	// Older.
	for _, old := range [][]byte{join(pol1, inv1, rev1), rev1, pol1, join(pol2, rev1)} {
		if n, err := merge(b3, old); n != nil || !errors.Is(err, ErrOlder) {
			t.Errorf("older: %v, %v", n, err)
		}
	}
	// Equal, with other bytes: signed is a fork, unsigned is nothing.
	forked := *f.rev
	forked.KeyIDs = []string{"alice"}
	if _, err := merge(b3, f.entry(&forked, RevocationsPart, []string{"delegate"})); !errors.Is(err, ErrForked) {
		t.Error(err)
	}
	if _, err := merge(b3, f.entry(&forked, RevocationsPart, []string{"stranger"})); errors.Is(err, ErrForked) || err == nil {
		t.Error(err)
	}
	forkedPol := *f.pol
	forkedPol.Grace = 0
	if _, err := merge(b3, f.entry(&forkedPol, PolicyPart, []string{"root-1", "root-2"})); !errors.Is(err, ErrForked) {
		t.Error(err)
	}
	if _, err := merge(b3, f.entry(&forkedPol, PolicyPart, []string{"root-1"})); errors.Is(err, ErrForked) || err == nil {
		t.Error(err)
	}
	// Another fleet.
	other := newFleet(t)
	other.pol.Fleet, other.inv.Fleet, other.rev.Fleet = "emca", "emca", "emca"
	bad(merge(b3, other.file()))("it is of fleet emca")
	bad(merge(b3, f.entry(other.rev, RevocationsPart, []string{"delegate"})))("it is of fleet emca")

	// The next, but of another predecessor; or over a gap.
	stray := *f.rev
	next(&stray.Header, []byte("something else\n"))
	if _, err := merge(b3, f.entry(&stray, RevocationsPart, []string{"root-1"})); !errors.Is(err, ErrForked) {
		t.Error(err)
	}
	stray.Version++
	good(merge(b3, f.entry(&stray, RevocationsPart, []string{"delegate"})))("policy 2, inventory 1, revocations 4")

	// A delegate cannot take back, nor in two steps; a root can.
	back := *f.rev
	next(&back.Header, f.encode(f.rev))
	back.KeyIDs = nil
	bad(merge(b3, f.entry(&back, RevocationsPart, []string{"delegate"})))("leave out or shorten key ID mallory")
	good(merge(b3, f.entry(&back, RevocationsPart, []string{"root-2"})))("policy 2, inventory 1, revocations 3")
	back.KeyIDs, back.Serials = f.rev.KeyIDs, []Serial{{Serial: 7, Until: day.Add(23 * time.Hour)}}
	bad(merge(b3, f.entry(&back, RevocationsPart, []string{"delegate"})))("shorten serial 7")
	back.Serials = []Serial{{Serial: 7}}
	good(merge(b3, f.entry(&back, RevocationsPart, []string{"delegate"})))("policy 2, inventory 1, revocations 3")
	back.Serials = nil
	back.Signed = day.Add(72 * time.Hour)
	bad(merge(b3, f.entry(&back, RevocationsPart, []string{"delegate"})))("leave out or shorten serial 7")
	back.Signed = day.Add(73 * time.Hour)
	good(merge(b3, f.entry(&back, RevocationsPart, []string{"delegate"})))("policy 2, inventory 1, revocations 3")

	// A policy drops the delegate, who had signed the highest version there is.
	evil := *f.rev
	evil.Version = ^uint64(0)
	b4 := good(merge(b3, f.entry(&evil, RevocationsPart, []string{"delegate"})))("policy 2, inventory 1, revocations 18446744073709551615")
	next(&f.pol.Header, f.encode(f.pol))
	f.pol.Delegates = []Key{key("delegate-2")}
	pol3 := f.policy("root-1", "root-2")
	bad(merge(b4, pol3))("signed by no delegate and no root of policy 3")
	bad(merge(b4, pol3, inv1, rev2))("signed by no delegate and no root of policy 3")
	good(merge(b4, pol3, f.inventory("delegate-2"), f.revocations("delegate-2")))("policy 3, inventory 1, revocations 2")

	// Nor does that bring back what a root had signed long before, for whom it
	// gave trust to.
	f.pol.Signed = f.rev.Signed.Add(25 * time.Hour)
	pol3 = f.policy("root-1", "root-2")
	bad(merge(b4, pol3, f.inventory("root-1"), f.revocations("root-1")))("revocations 2 was signed before policy 3")
	f.rev.Signed = f.pol.Signed.Add(-24 * time.Hour)
	bad(merge(b4, pol3, inv1, f.revocations("root-1")))("signed by no delegate and no root of policy 3")
	good(merge(b4, pol3, f.inventory("root-1"), f.revocations("root-1")))("policy 3, inventory 1, revocations 2")
}

func TestFresh(t *testing.T) {
	f := newFleet(t)
	f.pol.FreshFor = Duration(24 * time.Hour)
	f.inv.Signed = day.Add(48 * time.Hour) // who holds back revocations carries this
	b := mustVerify(t, f.file(), nil)
	if !b.Fresh(day.Add(24*time.Hour)) || b.Fresh(day.Add(24*time.Hour+time.Second)) || !b.Fresh(day.Add(-time.Hour)) {
		t.Error(b.FreshUntil())
	}
	if !b.Signed().Equal(f.inv.Signed) {
		t.Error(b.Signed())
	}
}

func TestFind(t *testing.T) {
	inv := mustParse(t, newFleet(t).file()).Inventory
	for _, c := range []struct{ name, cluster, want string }{
		{"cp-1.prod", "", "cp-1.prod 10.0.0.11:2222"}, {"cp-1", "prod", "cp-1.prod 10.0.0.11:2222"}, {"cp-1", "staging", "cp-1.staging 10.0.0.11:2222"},
		{"only", "", "only.prod [fd00::5]:2222"}, {"fd00::5", "", "only.prod [fd00::5]:2222"}, {"fd00:0::5", "", "only.prod [fd00::5]:2222"},
		{"10.0.9.12", "", "cp-2.staging 10.0.9.12:2222"}, {"::ffff:10.0.9.12", "", "cp-2.staging 10.0.9.12:2222"}, {"10.0.0.11", "prod", "cp-1.prod 10.0.0.11:2222"},
		{"cp-1", "", "! say which: cp-1.prod, cp-1.staging"}, {"10.0.0.11", "", "! say which: cp-1.prod, cp-1.staging"},
		{"cp-9", "", "! no node"}, {"cp-1.prod", "staging", "! no node"}, {"", "", "! no node"}, {"a", "", "! no node"}, {"cp-1.", "", "! no node"}, {"CP-1", "prod", "! no node"},
	} {
		h, err := inv.Find(c.name, c.cluster)
		if want, bad := strings.CutPrefix(c.want, "! "); bad {
			wantError(t, err, want)
		} else if got := h.ID() + " " + h.SSH().String(); err != nil || got != c.want {
			t.Errorf("%+v: %s, %v", c, got, err)
		}
	}
	if h, err := inv.Bastion("b"); err != nil || h.ID() != "b.bastion" {
		t.Error(h, err)
	}
	if at, ok := inv.Bastions[0].GRPC(); !ok || at.String() != "192.0.2.1:2223" {
		t.Error(at, ok)
	}
	if _, ok := (Host{}).GRPC(); ok {
		t.Error("a door that is not there")
	}
	_, err := inv.Bastion("cp-1")
	wantError(t, err, "known are: a.bastion, b.bastion")
	if c, ok := inv.Cluster("prod"); !ok || len(c.Nodes) != 3 || c.EtcdClusterID == "" {
		t.Error(c, ok)
	}
	if _, ok := inv.Cluster("none"); ok || len(inv.Nodes("none")) != 0 || len(inv.Nodes("")) != 5 {
		t.Error("clusters")
	}
}

func TestRevoked(t *testing.T) {
	f := newFleet(t)
	ca, other := key("user-ca").Fingerprint(), key("other-ca").Fingerprint()
	f.rev.Serials = []Serial{{Serial: 7, CA: ca}, {Serial: 8, CA: other}, {Serial: 9}}
	f.rev.KeyIDs, f.rev.Keys = []string{"mallory"}, []string{key("lost").Fingerprint(), sealed("bob").Fingerprint()}
	f.rev.X509Serials = []X509Serial{{Serial: "0x1f"}, {Serial: "32"}}
	r := mustParse(t, f.revocations("delegate")).Revocations
	check := func(what string, want bool) func(by string, revoked bool) {
		return func(by string, revoked bool) {
			t.Helper()
			if revoked != want || (by == "") == revoked {
				t.Errorf("%s: %v by %q", what, revoked, by)
			}
		}
	}
	cert := func(serial uint64, id, keyName string) *ssh.Certificate {
		return &ssh.Certificate{Serial: serial, KeyId: id, Key: key(keyName), SignatureKey: key("user-ca")}
	}
	for _, c := range []struct {
		serial   uint64
		id, name string
		want     bool
	}{{7, "alice", "a", true}, {8, "alice", "a", false}, {9, "alice", "a", true}, {10, "alice", "a", false}, {10, "mallory", "a", true}, {10, "alice", "lost", true}} {
		check(fmt.Sprint(c), c.want)(r.Certificate(cert(c.serial, c.id, c.name)))
		id := trust.Identity{Person: c.id, Fingerprint: key(c.name).Fingerprint(), Serial: fmt.Sprint(c.serial), CA: ca, Door: trust.SSH}
		check(fmt.Sprint(c, " identity"), c.want)(r.Identity(id))
	}
	check("sealed", true)(r.Key(sealed("bob"), "bob"))
	check("sealed", false)(r.Key(sealed("alice"), "alice"))
	check("sealed, by person", true)(r.Key(sealed("alice"), "mallory"))
	check("console", false)(r.Identity(trust.Identity{Person: "console/0", Door: trust.Console}))
	x := func(serial int64, cn string) *x509.Certificate {
		return &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: cn}, PublicKey: tlsKeys()[0].Public()}
	}
	check("31", true)(r.X509(x(31, "ci")))
	check("32", true)(r.X509(x(32, "ci")))
	check("9", false)(r.X509(x(9, "ci")))
	check("mallory", true)(r.X509(x(9, "mallory")))
	check("31, later", true)(r.Identity(trust.Identity{Person: "ci", Serial: "31", Door: trust.GRPC}))
	check("9, later", false)(r.Identity(trust.Identity{Person: "ci", Serial: "9", Door: trust.GRPC}))
	f.rev.Keys = []string{ssh.FingerprintSHA256(must(ssh.NewPublicKey(tlsKeys()[1].Public())))}
	r = mustParse(t, f.revocations("delegate")).Revocations
	check("key", false)(r.X509(x(9, "ci")))
	check("authority", true)(r.X509(x(9, "ci"), &x509.Certificate{PublicKey: tlsKeys()[1].Public()}))
	f.rev.Keys = []string{ca}
	r = mustParse(t, f.revocations("delegate")).Revocations
	check("SSH authority", true)(r.Certificate(cert(10, "alice", "a")))
	check("SSH authority, later", true)(r.Identity(trust.Identity{Person: "alice", CA: ca, Door: trust.SSH}))
}

// FuzzParse: whatever is in a file, it is refused or comes out as it went in,
// and what verifies does so again.
func FuzzParse(f *testing.F) {
	fl := newFleet(f)
	f.Add(fl.file())
	f.Add(fl.revocations("root-1"))
	f.Add(join(rename(fl.policy("root-1"), "policy.1"), fl.inventory("delegate")))
	f.Add([]byte("-- policy.yaml --\n{}\n-- policy.yaml.sig --\n-----BEGIN SSH SIGNATURE-----\n-----END SSH SIGNATURE-----\n"))
	f.Add([]byte("-- revocations.yaml --\na: &a [*a]\n-- revocations.yaml.sig --\n"))
	base, err := load(fl.file(), nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := Parse(data)
		if err != nil {
			return
		}
		if !bytes.Equal(file.Format(), data) {
			t.Fatal("not written as it was read")
		}
		if b, err := Verify(file, nil); err == nil {
			if _, err := load(b.Raw(), nil); err != nil {
				t.Fatal("verified once only:", err)
			}
		}
		if b, err := base.merge(file); err == nil {
			if _, err := load(b.Raw(), nil); err != nil {
				t.Fatal("merged to what does not verify:", err)
			}
		}
	})
}

func TestRecovery(t *testing.T) {
	const one, other = "age1lvyvwawkr0mcnnnncaghunadrqkmuf9e6507x9y920xxpp866cnql7dp2z", "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"
	text := fmt.Sprintf("format: 1\npart: policy\nfleet: acme\nversion: 1\nsigned: 2026-03-01T09:00:00Z\nroots: {threshold: 1, keys: [%q]}\nauthorities: {user: [%q], host: [%q]}\n",
		key("root-1").Line(), key("user-ca").Line(), key("host-ca").Line())
	p, err := decodePolicy([]byte(text + "recovery: [" + one + ", " + other + "]\nkeepImages: 48h\n"))
	if err != nil {
		t.Fatal(err)
	}
	again, err := Encode(p)
	if err != nil || !bytes.Contains(again, []byte("recovery:\n  - "+one+"\n  - "+other+"\nkeepImages: 48h\n")) {
		t.Errorf("%v\n%s", err, again)
	}
	for more, want := range map[string]string{
		"recovery: [" + one + ", " + one + "]":            "recovery[1]: want keys, each once",
		"recovery: [" + key("root-1").Line() + "]":        "is no X25519 recipient of age",
		"recovery: [AGE-SECRET-KEY-1]":                    "is no X25519 recipient of age",
		"recovery: [" + strings.Repeat(one+", ", 9) + "]": "more than 8",
		"keepImages: 24h":                                 "keepImages: 24h0m0s is outside",
		"recovery: [null]":                                "recovery",
	} {
		if _, err := decodePolicy([]byte(text + more + "\n")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40s: %v, want %q", more, err, want)
		}
	}
}
