package ca

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// parts of a bundle, in their order.
var parts = []string{bundle.PolicyPart, bundle.InventoryPart, bundle.RevocationsPart}

// bundleFile is the signed bundle in the folder: what agents and people get.
const bundleFile = "bundle"

func (t *tool) bundle() *cobra.Command {
	c := &cobra.Command{
		Use: "bundle", Short: "Sign and verify the bundle that every agent and person has", Args: cobra.ArbitraryArgs, RunE: group,
		Long: "A bundle has three parts: policy, inventory and revocations. To change one: edit DIR/PART.yaml, run bundle next\n" +
			"PART, and have it signed: a policy by as many roots as it and the one before demand, the others by a delegate. With\n" +
			"the last signature it is put into DIR/bundle, which is the file to hand out.",
	}
	c.AddCommand(t.next(), t.sign(), t.verify())
	return c
}

// draft is a part as it lies in a file, with its signatures beside it.
type draft struct {
	bundle.Header
	file  string
	data  []byte
	sigs  [][]byte // armored, each of these very bytes
	stale int      // how many others there were
}

// readDraft reads a part that is named, in the folder, or the file of one.
func (f *Folder) readDraft(name string) (*draft, error) {
	d := &draft{file: f.path(name + ".yaml")}
	if !slices.Contains(parts, name) {
		if !strings.ContainsAny(name, "/.") {
			return nil, fault.New(fault.Usage, "name policy, inventory, revocations, or the file of one of them", "there is no part %q", name)
		}
		d.file = name
	}
	var err error
	if d.data, err = os.ReadFile(d.file); err != nil {
		return nil, fault.New(fault.Usage, "name the folder with --dir, or the part's file", "%w", err)
	}
	if d.Header, err = bundle.ReadHeader(d.data); err == nil && slices.Contains(parts, name) && d.Part != name {
		err = fmt.Errorf("says that it is part %s", d.Part)
	}
	if err != nil {
		return nil, d.malformed(err)
	}
	old, err := os.ReadFile(d.file + ".sig")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, armored := range split(old) {
		// One of other bytes is of an earlier draft.
		if _, err := bundle.VerifySignature(d.data, bundle.Namespace(d.Part), armored); err == nil {
			d.sigs = append(d.sigs, armored)
		} else {
			d.stale++
		}
	}
	return d, nil
}

func (d *draft) malformed(err error) error {
	return fault.New(fault.Usage, "mend the file", "%s: %s", d.file, strings.Join(strings.Fields(err.Error()), " "))
}

// typed reads the draft as agents do. What reads a part wants it signed, so
// somebody signs it who counts for nothing.
func (d *draft) typed() (*bundle.File, error) {
	_, nobody, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	signer, err := ssh.NewSignerFromKey(nobody)
	if err != nil {
		return nil, err
	}
	sig, err := bundle.Sign(d.data, bundle.Namespace(d.Part), signer)
	if err != nil {
		return nil, err
	}
	f := &bundle.File{}
	if err := f.Add(d.data, sig); err != nil {
		return nil, d.malformed(errors.New(strings.TrimPrefix(fault.Of(err).Message, d.Part+": ")))
	}
	return f, nil
}

// unknown returns what a policy names that nothing is called here.
func unknown(p *bundle.Policy) ([]string, error) {
	if p == nil {
		return nil, nil
	}
	actions, err := api.Actions()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, a := range actions {
		names = append(names, a.GetName())
	}
	return p.Unknown(names), nil
}

// known refuses a policy with a rule that would never match.
func (d *draft) known(p *bundle.Policy) error {
	all, err := unknown(p)
	if err == nil && len(all) > 0 {
		err = fault.New(fault.Usage, "mend it, or take the halligan of the release that knows it; a rule that matches nothing protects nothing", "%s: %s", d.file, strings.Join(all, "; "))
	}
	return err
}

const armorEnd = "-----END SSH SIGNATURE-----"

// split cuts a file of concatenated signatures.
func split(data []byte) (armored [][]byte) {
	for {
		i := bytes.Index(data, []byte(armorEnd))
		if i < 0 {
			return armored
		}
		i += len(armorEnd)
		armored = append(armored, append(bytes.TrimSpace(data[:i:i]), '\n'))
		data = data[i:]
	}
}

// signedBy reports whether the key is one of those that signed.
func (d *draft) signedBy(key ssh.PublicKey) bool {
	return slices.ContainsFunc(d.sigs, func(armored []byte) bool {
		by, err := bundle.VerifySignature(d.data, bundle.Namespace(d.Part), armored)
		return err == nil && same(by, key)
	})
}

func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func same(a, b ssh.PublicKey) bool { return bytes.Equal(a.Marshal(), b.Marshal()) }

func (t *tool) sign() *cobra.Command {
	var signer string
	c := &cobra.Command{
		Use: "sign PART", Short: "Add the signature of one key to a part", Args: words(1, "policy, inventory, revocations, or the file of one of them"),
		Long: "Adds one signature to PART.yaml.sig. Where several keys have to sign, each holder does this on a machine of\n" +
			"their own, with the two files PART.yaml and PART.yaml.sig, which are then handed on; several .sig files can also be\n" +
			"joined with cat. What is signed are the bytes of the file: read it first. With the last signature DIR/bundle is\n" +
			"written; where others have signed it all, run this in DIR without --signer.",
		RunE: func(cmd *cobra.Command, args []string) error { return t.anyFolder().sign(args[0], signer) },
	}
	c.Flags().StringVar(&signer, "signer", "", "`file` of the key that signs; a .pub file means the one in the ssh-agent (default for all but the policy: the delegate's)")
	return c
}

func (f *Folder) sign(name, signer string) error {
	d, err := f.readDraft(name)
	if err != nil {
		return err
	}
	typed, err := d.typed()
	if err != nil {
		return err
	}
	if err := d.known(typed.Policy); err != nil {
		return err
	}
	// A root's holder has the part's two files, and no authority.
	_, err = os.Lstat(f.path("serial"))
	home := err == nil && filepath.Clean(filepath.Dir(d.file)) == filepath.Clean(f.dir)
	current := &bundle.File{}
	if home {
		if current, err = f.current(); err != nil {
			return err
		}
		if err := d.follows(current); err != nil {
			return err
		}
	}
	if d.stale > 0 {
		f.say("%s: %d signature(s) of another version of it are left out", d.file, d.stale)
	}
	if signer, err = f.defaultSigner(d, signer); err != nil {
		return err
	}
	if signer != "" {
		if err := f.addSignature(d, signer, current); err != nil {
			return err
		}
	}
	f.say("  %s %d of fleet %s, sha256 %s, signatures: %d", d.Part, d.Version, d.Fleet, hash(d.data), len(d.sigs))
	if !home {
		f.say("next: hand on %s and %s.sig", d.file, d.file)
		return nil
	}
	return f.pack(d, current)
}

// defaultSigner is the delegate's key, where it may sign. "": nobody signs here,
// since others have done it.
func (f *Folder) defaultSigner(d *draft, signer string) (string, error) {
	if signer != "" {
		return signer, nil
	}
	if d.Part != bundle.PolicyPart {
		for _, file := range []string{f.path(delegate), f.path(delegate + ".pub")} {
			if _, err := os.Lstat(file); err == nil {
				return file, nil
			}
		}
	}
	if len(d.sigs) > 0 {
		return "", nil
	}
	if d.Part == bundle.PolicyPart {
		return "", fault.New(fault.Usage, "name the root key with --signer FILE", "a policy is signed by root keys")
	}
	return "", fault.New(fault.Usage, "name the delegate's key with --signer FILE", "there is no key of a delegate here")
}

func (f *Folder) addSignature(d *draft, signer string, current *bundle.File) error {
	k, err := loadKey(signer, f.ask, f.socket)
	if err != nil {
		return err
	}
	defer k.Close()
	if err := f.maySign(k.Public(), d, current); err != nil {
		return err
	}
	print := ssh.FingerprintSHA256(k.Public())
	if d.signedBy(k.Public()) {
		f.say("%s: %s has signed it before", d.file, print)
		return nil
	}
	sig, err := bundle.Sign(d.data, bundle.Namespace(d.Part), k.SSH())
	if err != nil {
		return err
	}
	d.sigs = append(d.sigs, sig)
	if err := durable.Write(d.file+".sig", bytes.Join(d.sigs, nil)); err != nil {
		return err
	}
	f.say("%s: signed by %s", d.file, print)
	return nil
}

// current is the bundle in the folder; an empty one: there is none yet.
func (f *Folder) current() (*bundle.File, error) {
	data, err := os.ReadFile(f.path(bundleFile))
	if errors.Is(err, fs.ErrNotExist) {
		return &bundle.File{}, nil
	}
	if err != nil {
		return nil, err
	}
	return bundle.Parse(data)
}

// header returns that of the bundle's part, nil where it has none.
func header(b *bundle.File, part string) *bundle.Header {
	switch {
	case part == bundle.PolicyPart && b.Policy != nil:
		return &b.Policy.Header
	case part == bundle.InventoryPart && b.Inventory != nil:
		return &b.Inventory.Header
	case part == bundle.RevocationsPart && b.Revocations != nil:
		return &b.Revocations.Header
	}
	return nil
}

// follows refuses a draft that is neither the bundle's own part nor the next.
func (d *draft) follows(current *bundle.File) error {
	was := header(current, d.Part)
	next := "run: halligan ca bundle next " + d.Part
	switch {
	case was == nil && d.Version != 1:
		return fault.New(fault.Usage, "bring the bundle that has the version before it, as the file bundle beside it", "%s has version %d, and there is no bundle here", d.file, d.Version)
	case was == nil || bytes.Equal(was.Bytes(), d.data):
		return nil
	case d.Version == was.Version:
		return fault.New(fault.Refused, next, "%s was changed after its version %d was signed", d.file, was.Version)
	case d.Version != was.Version+1 || d.Previous != was.Hash():
		return fault.New(fault.Refused, next, "%s does not follow version %d, which is in the bundle", d.file, was.Version)
	}
	return nil
}

// maySign refuses a key whose signature would count for nothing, as far as the
// policy that says so is here.
func (f *Folder) maySign(key ssh.PublicKey, d *draft, current *bundle.File) error {
	var keys []bundle.Key
	if d.Part == bundle.PolicyPart {
		own, err := d.typed()
		if err != nil {
			return err
		}
		keys = own.Policy.Roots.Keys
		if current.Policy != nil {
			keys = append(keys, current.Policy.Roots.Keys...)
		}
	} else {
		p := current.Policy
		if p == nil {
			first, err := f.readDraft(bundle.PolicyPart)
			if err != nil {
				return nil // another machine than the authority's
			}
			own, err := first.typed()
			if err != nil {
				return err
			}
			p = own.Policy
		}
		keys = append(append(keys, p.Delegates...), p.Roots.Keys...)
	}
	if !slices.ContainsFunc(keys, func(k bundle.Key) bool { return same(k, key) }) {
		who := map[bool]string{true: "root of this or of the policy in force", false: "delegate and no root"}[d.Part == bundle.PolicyPart]
		return fault.New(fault.Refused, "sign with one that is; see the .pub files", "%s is no %s, so its signature would count for nothing", ssh.FingerprintSHA256(key), who)
	}
	return nil
}

// pack puts the part into the bundle once enough have signed, which is when
// agents would take it: it is offered to the bundle here as it would be to theirs.
func (f *Folder) pack(d *draft, current *bundle.File) error {
	next := &bundle.File{}
	if err := next.Add(d.data, bytes.Join(d.sigs, nil)); err != nil {
		return err
	}
	if current.Policy == nil {
		return f.first(d, next)
	}
	store, err := bundle.Open(bundle.Options{Path: f.Bundle(), Now: f.now})
	if err != nil {
		return err
	}
	changed, err := store.Offer(next.Format())
	switch {
	case changed:
		return cmp.Or(err, f.complete(store.Current()))
	case err != nil:
		f.say("not in the bundle: %s", strings.TrimPrefix(fault.Of(err).Message, "bundle: "))
		if orphan := orphaned(next.Policy, current); orphan != "" {
			f.say("the new policy drops who signed the %s; let a root of both policies sign the next version of it first", orphan)
			f.say("next: halligan ca --dir %[1]s bundle next %[2]s; halligan ca --dir %[1]s bundle sign %[2]s --signer ROOT-KEY", f.dir, orphan)
			return nil
		}
		return f.missing(d.Part)
	}
	f.say("%s: has it already", f.Bundle())
	return nil
}

// orphaned returns the part of the bundle that nobody has signed whom the policy
// knows, "" for none.
func orphaned(p *bundle.Policy, current *bundle.File) string {
	if p == nil {
		return ""
	}
	keys := slices.Concat(p.Delegates, p.Roots.Keys)
	for _, h := range []*bundle.Header{&current.Inventory.Header, &current.Revocations.Header} {
		if !slices.ContainsFunc(h.SignedBy(), func(by ssh.PublicKey) bool {
			return by != nil && slices.ContainsFunc(keys, func(k bundle.Key) bool { return same(k, by) })
		}) {
			return h.Part
		}
	}
	return ""
}

// first makes the first bundle, once every part is signed.
func (f *Folder) first(d *draft, next *bundle.File) error {
	if p := next.Policy; p != nil {
		n := 0
		for _, k := range p.Roots.Keys {
			if d.signedBy(k) {
				n++
			}
		}
		if n < p.Roots.Threshold {
			f.say("  %d of %d roots have signed, %d have to", n, len(p.Roots.Keys), p.Roots.Threshold)
			return f.missing(d.Part)
		}
	}
	for _, part := range parts {
		if part == d.Part {
			continue
		}
		other, err := f.readDraft(part)
		if err != nil {
			return err
		}
		if len(other.sigs) == 0 {
			return f.missing(part)
		}
		if err := next.Add(other.data, bytes.Join(other.sigs, nil)); err != nil {
			return err
		}
	}
	b, err := bundle.Verify(next, nil)
	if err != nil {
		f.say("no bundle yet: %s", strings.TrimPrefix(fault.Of(err).Message, "bundle: "))
		return f.missing(bundle.PolicyPart)
	}
	if err := durable.Write(f.Bundle(), b.Raw()); err != nil {
		return err
	}
	return f.complete(b)
}

func (f *Folder) complete(b *bundle.Bundle) error {
	f.say("%s: complete, to be handed out: policy %d, inventory %d, revocations %d", f.Bundle(), b.Policy.Version, b.Inventory.Version, b.Revocations.Version)
	return nil
}

// missing says what the bundle waits for.
func (f *Folder) missing(part string) error {
	by := ""
	if part == bundle.PolicyPart {
		by = " --signer ROOT-KEY, on the machine of another root"
	}
	f.say("next: halligan ca --dir %s bundle sign %s%s", f.dir, part, by)
	return nil
}

func (t *tool) next() *cobra.Command {
	return &cobra.Command{
		Use: "next PART", Short: "Give an edited part the next version, ready to be signed", Args: words(1, "policy, inventory or revocations"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !slices.Contains(parts, args[0]) {
				return usage(cmd, "there is no part %q", args[0])
			}
			f, err := t.folder()
			if err != nil {
				return err
			}
			d, err := f.readDraft(args[0])
			if err != nil {
				return err
			}
			if err := f.advance(d); err != nil {
				return err
			}
			t.say("%s: version %d", d.file, d.Version)
			return f.missing(d.Part)
		},
	}
}

var (
	versionLine  = regexp.MustCompile(`(?m)^version:.*\n`)
	previousLine = regexp.MustCompile(`(?m)^previous:.*\n`)
	signedLine   = regexp.MustCompile(`(?m)^signed:.*\n`)
)

// advance writes the heading of the version that follows the bundle's. All else
// in the file stays as it is, comments too; signatures of an earlier draft go.
func (f *Folder) advance(d *draft) error {
	current, err := f.current()
	if err != nil {
		return err
	}
	h := bundle.First(d.Part, d.Fleet, f.now())
	if was := header(current, d.Part); was != nil {
		h = was.Next(f.now())
	}
	if len(versionLine.FindAll(d.data, -1)) != 1 || len(signedLine.FindAll(d.data, -1)) != 1 {
		return fault.New(fault.Usage, "write both as lines of their own at the top", "%s has no line version: or no line signed:", d.file)
	}
	previous := ""
	if h.Previous != "" {
		previous = "previous: " + h.Previous + "\n"
	}
	data := previousLine.ReplaceAllLiteral(d.data, nil)
	data = versionLine.ReplaceAllLiteral(data, fmt.Appendf(nil, "version: %d\n%s", h.Version, previous))
	d.data, d.sigs, d.Header = signedLine.ReplaceAllLiteral(data, fmt.Appendf(nil, "signed: %s\n", h.Signed.Format(time.RFC3339))), nil, h
	typed, err := d.typed()
	if err != nil {
		return err
	}
	if err := d.known(typed.Policy); err != nil {
		return err
	}
	if err := os.Remove(d.file + ".sig"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.Write(d.file, d.data)
}
