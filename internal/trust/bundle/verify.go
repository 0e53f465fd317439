package bundle

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// Anchor is what a machine trusts before it has seen any bundle.
type Anchor struct {
	// Roots verify the first policy; without keys that policy is trusted as it
	// is: whoever may write the file has installed it.
	Roots Roots
	// MinPolicyVersion is the lowest policy that is accepted.
	MinPolicyVersion uint64
}

// NewAnchor reads roots as lines of authorized_keys. Without lines the threshold
// is 0.
func NewAnchor(lines []string, threshold int, minPolicyVersion uint64) (*Anchor, error) {
	a := &Anchor{Roots: Roots{Threshold: threshold}, MinPolicyVersion: minPolicyVersion}
	for _, line := range lines {
		k, err := ParseKey(line)
		if err != nil {
			return nil, fault.New(fault.Usage, "write them as ssh-keygen does in a .pub file", "trust.roots: %w", err)
		}
		a.Roots.Keys = append(a.Roots.Keys, k)
	}
	switch {
	case len(distinct(a.Roots.Keys)) != len(lines):
		return nil, fault.New(fault.Usage, "list it once", "trust.roots has one key twice")
	case len(lines) == 0 && threshold == 0:
		return a, nil
	}
	if err := a.Roots.check(); err != nil {
		return nil, fault.New(fault.Usage, "give trust.threshold and that many trust.roots, or neither", "trust: %w", err)
	}
	return a, nil
}

// Bundle is what a fleet trusts: three parts that are verified and belong
// together. It is never changed.
type Bundle struct {
	Policy      *Policy
	Inventory   *Inventory
	Revocations *Revocations
	// Hash is the SHA-256, in hex, over the hashes of the three parts.
	Hash string

	raw     []byte
	earlier []*Policy
}

// Raw returns the whole file. It must not be changed.
func (b *Bundle) Raw() []byte { return b.raw }

// File returns the file, for a next version of a part to be added to.
func (b *Bundle) File() *File {
	return &File{Earlier: b.earlier, Policy: b.Policy, Inventory: b.Inventory, Revocations: b.Revocations}
}

// Signed returns when the newest part was signed: no clock can be before it.
func (b *Bundle) Signed() time.Time {
	return slices.MaxFunc([]time.Time{b.Policy.Signed, b.Inventory.Signed, b.Revocations.Signed}, time.Time.Compare)
}

// FreshUntil returns until when the bundle counts as fresh. That goes by the
// revocations: who holds them back must not be able to hide it by carrying
// other parts.
func (b *Bundle) FreshUntil() time.Time {
	return b.Revocations.Signed.Add(time.Duration(b.Policy.FreshFor))
}

// Fresh reports whether the revocations are recent enough to be relied upon. A
// stale bundle locks nobody out.
func (b *Bundle) Fresh(now time.Time) bool { return !now.After(b.FreshUntil()) }

// String names the versions in one line.
func (b *Bundle) String() string {
	return fmt.Sprintf("bundle of fleet %s: policy %d, inventory %d, revocations %d", b.Policy.Fleet, b.Policy.Version, b.Inventory.Version, b.Revocations.Version)
}

// What errors of a bundle are caused by, for errors.Is.
var (
	// ErrOlder: the file has nothing newer, and something older, than what is in
	// force.
	ErrOlder = errors.New("older than the bundle in force")
	// ErrForked: a verified part has the version of the one in force, and other
	// bytes; or it follows another predecessor. Somebody has signed two.
	ErrForked = errors.New("forked")
)

func refused(err error) error {
	next := "nothing was changed; get the bundle from whoever signs it, or have it signed again"
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrForked):
		next = "find out who has signed two; one of them can be superseded only by a version that is higher by two"
	case errors.Is(err, ErrOlder):
		return fault.New(fault.Stale, "nothing was changed; the one in force stays", "bundle: %w", err)
	}
	return fault.New(fault.Refused, next, "bundle: %w", err)
}

// Verify returns the file as a bundle, if it has all parts, they belong
// together, and they are signed as the package documentation says, beginning
// with the anchor's roots. A nil anchor is one without roots.
func Verify(f *File, anchor *Anchor) (*Bundle, error) {
	b, err := verifyFile(f, anchor)
	if err != nil {
		return nil, refused(err)
	}
	return b, nil
}

func verifyFile(f *File, anchor *Anchor) (*Bundle, error) {
	if f.Policy == nil || f.Inventory == nil || f.Revocations == nil {
		return nil, errors.New("one of policy, inventory and revocations is missing")
	}
	if anchor == nil {
		anchor = &Anchor{}
	}
	if f.Policy.Version < anchor.MinPolicyVersion {
		return nil, fmt.Errorf("policy %d is below %d, the lowest that this machine accepts", f.Policy.Version, anchor.MinPolicyVersion)
	}
	var accepted []*Policy
	var err error
	if len(anchor.Roots.Keys) > 0 {
		accepted, err = walk(anchor.Roots, nil, f.policies())
	} else {
		accepted, err = trace(f.policies())
	}
	if err != nil {
		return nil, err
	}
	b := assemble(accepted, f.Inventory, f.Revocations)
	if err := verifyInventory(b.Inventory, b.Policy); err != nil {
		return nil, err
	}
	return b, verifyRevocations(b.Revocations, b.Policy)
}

func assemble(policies []*Policy, inv *Inventory, rev *Revocations) *Bundle {
	last := len(policies) - 1
	b := &Bundle{Policy: policies[last], Inventory: inv, Revocations: rev, earlier: chain(policies[:last])}
	sum := sha256.Sum256([]byte(b.Policy.Hash() + inv.Hash() + rev.Hash()))
	b.Hash, b.raw = hex.EncodeToString(sum[:]), b.File().Format()
	return b
}

// signedUnder demands the threshold of the roots.
func (p *Policy) signedUnder(roots Roots, whose string) error {
	n, err := p.signers(roots.Keys)
	if err == nil && n < roots.Threshold {
		err = fmt.Errorf("policy %d is signed by %d of %s, and needs %d distinct ones", p.Version, n, whose, roots.Threshold)
	}
	return err
}

// follows demands that the policy names the one before it, where it is the
// very next.
func follows(h, before *Header) error {
	if h.Version == before.Version+1 && h.Previous != before.Hash() {
		return fmt.Errorf("%w: %s %d does not follow the %s %d that is in force or beside it", ErrForked, h.Part, h.Version, h.Part, before.Version)
	}
	return nil
}

// walk goes up from trusted roots over ascending policies: each that is signed
// under the roots in force puts its own in force. Those that are not are passed
// over, but the last must be reached. It returns the ones that were accepted.
func walk(roots Roots, from *Policy, policies []*Policy) (accepted []*Policy, err error) {
	whose, before := "the roots of this machine's configuration", from
	if from != nil {
		whose = fmt.Sprintf("the roots of policy %d", from.Version)
	}
	for i, p := range policies {
		if err := p.signedUnder(roots, whose); err != nil {
			if i == len(policies)-1 {
				return nil, err
			}
			continue
		}
		if err := p.signedUnder(p.Roots, "its own roots"); err != nil {
			return nil, err
		}
		if before != nil {
			if err := follows(&p.Header, &before.Header); err != nil {
				return nil, err
			}
		}
		accepted, roots, before, whose = append(accepted, p), p.Roots, p, fmt.Sprintf("the roots of policy %d", p.Version)
	}
	return accepted, nil
}

// trace trusts the last policy and goes down from it, as long as each is
// followed by the one after it.
func trace(policies []*Policy) ([]*Policy, error) {
	i := len(policies) - 1
	if err := policies[i].signedUnder(policies[i].Roots, "its own roots"); err != nil {
		return nil, err
	}
	for ; i > 0; i-- {
		p, next := policies[i-1], policies[i]
		if err := p.signedUnder(p.Roots, "its own roots"); err != nil {
			return nil, err
		}
		if next.signedUnder(p.Roots, "") != nil {
			break
		}
		if err := follows(&next.Header, &p.Header); err != nil {
			return nil, err
		}
	}
	return policies[i:], nil
}

func belongs(h *Header, policyVersion uint64, p *Policy) error {
	if h.Fleet != p.Fleet {
		return fmt.Errorf("parts that do not belong together: %s of fleet %s, policy of fleet %s", h.Part, h.Fleet, p.Fleet)
	}
	if policyVersion > p.Version {
		return fmt.Errorf("parts that do not belong together: %s %d goes with policy %d and later, and policy %d is there", h.Part, h.Version, policyVersion, p.Version)
	}
	n, err := h.signers(slices.Concat(p.Delegates, p.Roots.Keys))
	if err == nil && n == 0 {
		err = fmt.Errorf("%s %d is signed by no delegate and no root of policy %d", h.Part, h.Version, p.Version)
	}
	return err
}

func verifyInventory(inv *Inventory, p *Policy) error {
	return belongs(&inv.Header, inv.PolicyVersion, p)
}

// verifyRevocations also holds that nobody alone can lock out all others.
func verifyRevocations(r *Revocations, p *Policy) error {
	if err := belongs(&r.Header, r.PolicyVersion, p); err != nil {
		return err
	}
	for _, k := range slices.Concat(p.Roots.Keys, p.Delegates) {
		if by, listed := r.first(keyEntry(k.Fingerprint())); listed {
			return fmt.Errorf("revocations %d list the root or delegate %s; a new policy drops it", r.Version, by)
		}
	}
	roots, err := r.signers(p.Roots.Keys)
	if err != nil || roots >= p.Roots.Threshold {
		return err
	}
	for _, fingerprint := range p.Authorities.fingerprints() {
		if by, listed := r.first(keyEntry(fingerprint)); listed {
			return fmt.Errorf("revocations %d list an authority's %s; that takes %d roots' signatures", r.Version, by, p.Roots.Threshold)
		}
	}
	commanders, left := 0, 0
	for _, s := range p.Sealed {
		if s.Role != trust.Commander.String() {
			continue
		}
		commanders++
		if _, gone := r.Key(s.Key, s.Person); !gone {
			left++
		}
	}
	if commanders > 0 && left == 0 {
		return fmt.Errorf("revocations %d leave no sealed commander; that takes %d roots' signatures", r.Version, p.Roots.Threshold)
	}
	return nil
}

// merge returns the newest verified part of each of the bundle and the file.
// The result verifies by itself. It is the bundle itself where nothing is newer.
func (b *Bundle) merge(f *File) (*Bundle, error) {
	if fleet := f.headers()[0].Fleet; fleet != b.Policy.Fleet {
		return nil, fmt.Errorf("it is of fleet %s, the one in force of %s", fleet, b.Policy.Fleet)
	}
	older := false
	var newer []*Policy
	for _, p := range f.policies() {
		switch {
		case p.Version > b.Policy.Version:
			newer = append(newer, p)
		case p.Version < b.Policy.Version:
			older = older || p == f.Policy
		case p.Hash() != b.Policy.Hash():
			if err := p.signedUnder(b.Policy.Roots, "the roots in force"); err != nil {
				return nil, err
			}
			return nil, fmt.Errorf("%w: policy %d is in force with other bytes", ErrForked, p.Version)
		}
	}
	policies := append(slices.Clone(b.earlier), b.Policy)
	if len(newer) > 0 {
		accepted, err := walk(b.Policy.Roots, b.Policy, newer)
		if err != nil {
			return nil, err
		}
		policies = append(policies, accepted...)
	}
	p := policies[len(policies)-1]

	inv, invOlder, err := newest(b.Inventory, f.Inventory, p, func(i *Inventory) error { return verifyInventory(i, p) },
		func(old, next *Inventory) error { return follows(&next.Header, &old.Header) })
	if err != nil {
		return nil, err
	}
	rev, revOlder, err := newest(b.Revocations, f.Revocations, p, func(r *Revocations) error { return verifyRevocations(r, p) },
		func(old, next *Revocations) error {
			if err := follows(&next.Header, &old.Header); err != nil {
				return err
			}
			return next.keeps(old, p)
		})
	if err != nil {
		return nil, err
	}
	if p == b.Policy && inv == b.Inventory && rev == b.Revocations {
		if older || invOlder || revOlder {
			return nil, fmt.Errorf("%w: %s", ErrOlder, b)
		}
		return b, nil
	}
	return assemble(policies, inv, rev), nil
}

// part is an inventory or revocations.
type part interface {
	comparable
	header() *Header
}

func (h *Header) header() *Header { return h }

// newest returns the one of the highest version among those that verify under
// the policy. So what a delegate signed whom the policy has dropped does not
// stand in the way, however high its version; but what takes its place without a
// higher one must have been signed along with that policy, or whoever brings the
// policy first could bring old revocations with it. A verified offer that is newer
// must also be a successor.
func newest[P part](now, offered P, p *Policy, verify func(P) error, successor func(old, next P) error) (chosen P, older bool, err error) {
	var none P
	stands := verify(now)
	if offered == none {
		return now, false, stands
	}
	h, o := now.header(), offered.header()
	if o.Version <= h.Version && stands == nil {
		if o.Version < h.Version || o.Hash() == h.Hash() {
			return now, o.Version < h.Version, nil
		}
		if err := verify(offered); err != nil {
			return none, false, err
		}
		return none, false, fmt.Errorf("%w: %s %d is in force with other bytes", ErrForked, o.Part, o.Version)
	}
	if err := verify(offered); err != nil {
		return none, false, err
	}
	switch {
	case stands == nil:
	case o.Version <= h.Version && o.Hash() != h.Hash() && o.Signed.Before(p.Signed.Add(-maxAhead)):
		return none, false, fmt.Errorf("%s %d was signed before policy %d, and cannot take the place of version %d, which that policy does not accept",
			o.Part, o.Version, p.Version, h.Version)
	default:
		return offered, false, nil
	}
	return offered, false, successor(now, offered)
}

// keeps demands of revocations that no root has signed that they leave out
// nothing that may still be of use, nor say of anything that it is of less.
func (r *Revocations) keeps(old *Revocations, p *Policy) error {
	if n, err := r.signers(p.Roots.Keys); err != nil || n > 0 {
		return err
	}
	for entry, until := range old.all {
		// Who signs may be a day ahead, and people are admitted for a while after.
		if !until.IsZero() && r.Signed.After(until.Add(maxAhead+maxGrace)) {
			continue
		}
		if now, kept := r.all[entry]; !kept || !now.IsZero() && (until.IsZero() || now.Before(until)) {
			return fmt.Errorf("revocations %d leave out or shorten %s of revocations %d; only a root can take that back", r.Version, entry, old.Version)
		}
	}
	return nil
}
