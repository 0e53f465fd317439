package ca

import (
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

func (t *tool) verify() *cobra.Command {
	var roots []string
	var threshold int
	var least uint64
	var into string
	c := &cobra.Command{
		Use: "verify FILE", Short: "Verify a bundle and say who signed it and who may do what", Args: words(1, "the file of one bundle"),
		Long: "Verifies a bundle as an agent does. Without --root it is its own roots that vouch for it, as for an agent whose\n" +
			"configuration names none: compare their fingerprints with those that their holders know.\n" +
			"Exit status: 0 verified, 2 not a bundle, 4 not signed as it has to be.",
		RunE: func(cmd *cobra.Command, args []string) error {
			data, err := os.ReadFile(args[0])
			if err != nil {
				return fault.New(fault.Usage, "name a readable file", "bundle: %w", err)
			}
			file, err := bundle.Parse(data)
			if err != nil {
				return err
			}
			var lines []string
			for _, name := range roots {
				line, err := os.ReadFile(name)
				if err != nil {
					return fault.New(fault.Usage, "name the .pub file of a root", "%w", err)
				}
				lines = append(lines, string(trimNewline(line)))
			}
			if len(lines) > 0 && threshold == 0 {
				threshold = len(lines)/2 + 1
			}
			anchor, err := bundle.NewAnchor(lines, threshold, least)
			if err != nil {
				return err
			}
			b, err := bundle.Verify(file, anchor)
			if err != nil {
				return err
			}
			t.show(b, len(lines) > 0)
			if err := t.differs(b.Policy); err != nil {
				return err
			}
			odd, err := unknown(b.Policy)
			if err != nil {
				return err
			}
			for _, what := range odd {
				t.say("look at the policy, whose rule matches nothing that this release knows: %s", what)
			}
			if into != "" {
				return t.split(b, into)
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringArrayVar(&roots, "root", nil, "`file` NAME.pub of a root key that is trusted; once for each")
	f.IntVar(&threshold, "threshold", 0, "how `many` of them must have signed (default: more than half)")
	f.Uint64Var(&least, "min-policy-version", 0, "lowest `version` of the policy to accept")
	f.StringVar(&into, "split", "", "write the parts and signatures as single files into this `folder`, with the lines that check them with ssh-keygen")
	return c
}

func trimNewline(line []byte) []byte {
	for len(line) > 0 && (line[len(line)-1] == '\n' || line[len(line)-1] == '\r') {
		line = line[:len(line)-1]
	}
	return line
}

// show says what a verified bundle is, and what each key in it may do.
func (t *tool) show(b *bundle.Bundle, anchored bool) {
	p := b.Policy
	t.say("fleet %s, verified", p.Fleet)
	for _, h := range []*bundle.Header{&p.Header, &b.Inventory.Header, &b.Revocations.Header} {
		t.say("%s %d, %s, signed by", h.Part, h.Version, h.Signed.UTC().Format(time.RFC3339))
		for _, key := range h.SignedBy() {
			if key != nil { // else of a key that counts for nothing
				t.say("    %s", named(p, key))
			}
		}
	}
	if !anchored {
		t.say("nobody but itself vouches for its roots; compare them, or name those you trust with --root")
	}
	t.say("may sign the next policy, %d of them together, and alone inventories and revocations:", p.Roots.Threshold)
	t.keys(p.Roots.Keys)
	t.say("may sign inventories and revocations:")
	t.keys(p.Delegates)
	t.say("may certify people:")
	t.keys(p.Authorities.User)
	t.say("may certify SSH servers:")
	t.keys(p.Authorities.Host)
	for _, a := range []struct {
		what string
		cas  bundle.CAs
	}{{"TLS clients", p.Authorities.TLSClient}, {"TLS servers", p.Authorities.TLSServer}} {
		for _, cert := range a.cas.Certificates {
			t.say("may certify %s: %s, until %s", a.what, neutral.Line(cert.Subject.CommonName), cert.NotAfter.UTC().Format(time.DateOnly))
		}
	}
	for _, s := range p.Sealed {
		t.say("may come in without a certificate: %s as %s until %s, with %s", s.Person, s.Role, s.NotAfter.UTC().Format(time.RFC3339), s.Key.Fingerprint())
	}
	r := b.Revocations
	t.say("revoked: %d people, %d keys, %d SSH and %d TLS certificates", len(r.KeyIDs), len(r.Keys), len(r.Serials), len(r.X509Serials))
	nodes := 0
	for _, c := range b.Inventory.Clusters {
		nodes += len(c.Nodes)
	}
	t.say("inventory: %d clusters, %d nodes, %d bastions", len(b.Inventory.Clusters), nodes, len(b.Inventory.Bastions))
}

// maxDiffers is how many differences from the shipped table are listed.
const maxDiffers = 24

// differs says how the policy's rules differ from those that the release ships.
func (t *tool) differs(p *bundle.Policy) error {
	actions, err := api.Actions()
	if err != nil {
		return err
	}
	roles := map[string]string{}
	for _, a := range actions {
		roles[a.GetName()] = a.GetRole()
	}
	all := p.Differs(roles)
	if len(all) == 0 {
		t.say("rules: those that this release ships")
		return nil
	}
	t.say("rules, other than this release ships them:")
	for _, line := range all[:min(len(all), maxDiffers)] {
		t.say("    %s", neutral.LineMax(line, 256))
	}
	if n := len(all) - maxDiffers; n > 0 {
		t.say("    and %d more", n)
	}
	return nil
}

func (t *tool) keys(keys []bundle.Key) {
	for _, k := range keys {
		t.say("    %s", neutral.Line(k.String()))
	}
	if len(keys) == 0 {
		t.say("    nobody")
	}
}

// named says whose key it is, as far as the policy knows it.
func named(p *bundle.Policy, key ssh.PublicKey) string {
	for _, list := range [][]bundle.Key{p.Roots.Keys, p.Delegates} {
		for _, k := range list {
			if same(k, key) {
				return neutral.Line(k.String())
			}
		}
	}
	return ssh.FingerprintSHA256(key) + ", which counts for nothing here"
}

// split writes what stock ssh-keygen verifies, and says how.
func (t *tool) split(b *bundle.Bundle, dir string) error {
	if _, err := b.ExportTo(dir); err != nil {
		return err
	}
	t.say("\nto check it with OpenSSH:\n  cd %s", dir)
	for _, h := range []*bundle.Header{&b.Policy.Header, &b.Inventory.Header, &b.Revocations.Header} {
		for i, key := range h.SignedBy() {
			if key == nil {
				continue
			}
			if who := signer(b.Policy, h.Part, key); who != "" {
				t.say("  ssh-keygen -Y verify -f allowed_signers -I %s -n %s -s %s.yaml.%d.sig <%s.yaml", who, bundle.Namespace(h.Part), h.Part, i+1, h.Part)
			}
		}
	}
	t.say("  ssh-keygen -k -f krl -s none krl.spec && ssh-keygen -Q -l -f krl")
	return nil
}

// signer is what the key signs the part as, "" for nothing.
func signer(p *bundle.Policy, part string, key ssh.PublicKey) string {
	is := func(k bundle.Key) bool { return same(k, key) }
	switch {
	case slices.ContainsFunc(p.Roots.Keys, is):
		return "root"
	case part != bundle.PolicyPart && slices.ContainsFunc(p.Delegates, is):
		return "delegate"
	}
	return ""
}
