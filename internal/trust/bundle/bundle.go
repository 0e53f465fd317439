// Package bundle reads, signs, verifies, keeps and exports the one file that
// says whom a fleet trusts. Agents, bastions and command lines all load the same
// file. It must never need anything but that file, a clock and the keys that are
// trusted already; it must never let go of the last good bundle because a worse
// one came; and it must never hold or ask for a private key. It stands on floor
// 0.
//
// # The file
//
// A bundle is one text file of at most 1 MiB in the txtar form (a line
// "-- NAME --" begins an entry, all up to the next such line belongs to it),
// without text before the first entry. Entries, in this order, each at most once:
//
//	policy.N.yaml       an earlier policy, ascending N, under which roots were
//	policy.N.yaml.sig   rotated, for who has missed it to walk over
//	policy.yaml         who may do what
//	policy.yaml.sig
//	inventory.yaml      where clusters, nodes and bastions are
//	inventory.yaml.sig
//	revocations.yaml    what is trusted no more
//	revocations.yaml.sig
//
// A whole bundle has all three parts. A file with some of them can be offered to
// a [Store], which has the others.
//
// # Signatures
//
// A .sig entry holds one or more armored signatures of OpenSSH's SSHSIG form
// (PROTOCOL.sshsig of openssh-portable), one after the other, over the exact
// bytes of its part, hash sha512, in the namespace of the part:
// policy@halligan.io, inventory@halligan.io or revocations@halligan.io. They are
// what this makes, and [Export] writes what stock ssh-keygen verifies:
//
//	ssh-keygen -Y sign -n policy@halligan.io -f root-key policy.yaml
//
// Signatures count by distinct key: one key twice counts once, whatever its
// comment. A signature by a certificate is refused, whatever key is in it, and so
// is one by a FIDO key whose user was not present (touch). A signature by a key
// that is unknown counts for nothing; one by a known key that does not verify
// refuses the file.
//
// # Every part
//
// YAML, one document. Unknown and doubled fields are refused, and characters that
// whoever reads the file before signing it does not see.
//
//	format: 1
//	part: policy                       # or inventory, revocations
//	fleet: acme                        # all parts name the same
//	version: 4                         # from 1, only goes up
//	previous: 5f0c…                    # SHA-256 in hex of version 3's bytes; absent at version 1
//	signed: 2026-01-31T09:00:00Z       # not over 24 h ahead of whoever takes it over; see below
//
// A machine whose clock shows less than is known to be past (the time of its build,
// the signing of its policy) takes over, with an alarm, what the threshold of the
// roots signed whenever that was, and what a delegate signed up to freshFor after
// what is known.
//
// # Policy
//
// Signed by the threshold of its own roots and, where it follows another, by the
// threshold of the roots of the one in force: so roots change only with the old
// ones' word, and never to keys that nobody has. A version may be left out by
// who signs nothing else; where version N+1 meets N, its "previous" is N's hash.
//
//	roots: {threshold: 2, keys: [authorized_keys lines]}
//	delegates: [authorized_keys lines] # may sign inventory and revocations
//	authorities:                       # at least one user and one host key
//	  user: [authorized_keys lines]    # sign people's SSH certificates
//	  host: [authorized_keys lines]    # sign NODE.CLUSTER
//	  tlsClient: PEM                   # sign X.509 client certificates; may be absent
//	  tlsServer: PEM                   # sign X.509 NODE.CLUSTER; may be absent
//	freshFor: 168h                     # default 168h, 1h to 720h; see [Bundle.Fresh]
//	grace: 2h                          # default 2h, 0s to 24h; the clock rule
//	maxCertificate: 168h               # default and most 168h
//	sealed:                            # FIDO2 keys that need no certificate
//	- {person: alice, key: sk-ssh-ed25519@openssh.com …, role: commander, clusters: [prod],
//	   notBefore: 2026-01-31T09:00:00Z, notAfter: 2026-05-01T09:00:00Z}   # at most 90 days apart
//	recovery: [age1…]                  # at most 8; age keys, kept offline, that open sealed before-images
//	keepImages: 720h                   # default 720h, 48h to 8760h; how long before-images are kept
//	actions, protect, keepSubjects, caps, approvals, aloneCaps            # trust.Rules
//
// No key has two uses: roots, delegates, authorities (SSH and X.509 alike) and
// sealed keys are all distinct. Keys are Ed25519, ECDSA, RSA of at least 3072
// bits, or the sk- forms of the first two; a line has no options.
//
// # Inventory
//
// Signed by one delegate or root: it only says where to dial, the host
// certificate proves who answers. Addresses are IP addresses, since a resolver may
// be what failed.
//
//	policyVersion: 4                   # the least policy that it goes with
//	clusters:
//	- name: prod                       # a DNS label, unique; not "bastion"
//	  etcdClusterID: cdf818194e3a8c32  # in hex; may be absent
//	  nodes: [{name: cp-1, address: 10.0.0.11, sshPort: 2222, grpcPort: 2223}]   # grpcPort may be absent
//	bastions: [{name: a, address: 192.0.2.1, sshPort: 2222, grpcPort: 2223, tunnelPort: 7444}]
//
// A node with "reach: out" is never dialled by bastions: it keeps a tunnel to the
// tunnelPort of each that has one. Left out, or "in", bastions dial it. Server
// identities are NODE.CLUSTER, and NAME.bastion for bastions.
//
// # Revocations
//
// Signed by one delegate or root, since they only narrow. What a delegate or a
// single root signs must not list a key of an authority, nor every sealed
// commander: that takes the threshold of the roots, so nobody alone can lock all
// others out. Roots and delegates cannot be listed at all; a new policy drops
// them. What no root signs may leave out nothing that the one in force lists,
// except what is 48 h past its "until", nor set that earlier: a delegate cannot
// give trust back.
//
//	policyVersion: 4
//	serials: [{serial: 17, ca: "SHA256:…", until: 2026-02-07T00:00:00Z}]  # SSH; without ca: of any
//	keyIDs: [mallory]                  # the person in every kind of credential
//	keys: ["SHA256:…"]                 # fingerprints: certified, sealed or CA keys
//	x509Serials: [{serial: "0x1f", until: 2026-02-07T00:00:00Z}]          # decimal, or hex after 0x
//
// An entry counts as long as it is listed; "until" says from when on it need
// not be, because the certificate has lapsed by itself.
package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strconv"

	"golang.org/x/tools/txtar"

	"github.com/halligan-io/halligan/internal/fault"
)

// MaxSize is the largest file that is read, in bytes.
const MaxSize = 1 << 20

const maxEarlier = 64 // earlier policies in one file

// The names of the parts, as the field "part" has them.
const (
	PolicyPart      = "policy"
	InventoryPart   = "inventory"
	RevocationsPart = "revocations"
)

// The SSHSIG namespaces of the parts.
const (
	PolicyNamespace      = PolicyPart + "@halligan.io"
	InventoryNamespace   = InventoryPart + "@halligan.io"
	RevocationsNamespace = RevocationsPart + "@halligan.io"
)

// Namespace returns the SSHSIG namespace of a part.
func Namespace(part string) string { return part + "@halligan.io" }

// File is a file whose form is right; nothing in it is verified. Parts that it
// does not have are nil.
type File struct {
	// Earlier policies, ascending by version and all below Policy's.
	Earlier     []*Policy
	Policy      *Policy
	Inventory   *Inventory
	Revocations *Revocations
}

var earlierName = regexp.MustCompile(`^policy\.([1-9][0-9]{0,19})\.yaml$`)

// Parse reads a file. It checks the form of everything and trusts nothing. The
// error says what to mend (fault.Usage).
func Parse(data []byte) (*File, error) {
	f, err := parse(data)
	if err != nil {
		return nil, fault.New(fault.Usage, "fetch the bundle again, or make it with halligan ca bundle sign", "bundle: %w", err)
	}
	return f, nil
}

func parse(data []byte) (*File, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("more than %d bytes", MaxSize)
	}
	a := txtar.Parse(data)
	switch {
	case len(a.Files) == 0:
		return nil, errors.New("no entries: this is no bundle")
	case len(a.Comment) > 0:
		return nil, errors.New("text before the first entry is signed by nobody")
	case !bytes.Equal(txtar.Format(a), data):
		return nil, errors.New("cut off, or an entry's line is not exactly -- NAME --")
	case len(a.Files)%2 != 0 || len(a.Files) > 2*(maxEarlier+3):
		return nil, errors.New("every part needs its .sig entry right after it, and is there once")
	}
	f, rank := &File{}, -1
	for i := 0; i < len(a.Files); i += 2 {
		part, sig := a.Files[i], a.Files[i+1]
		if sig.Name != part.Name+".sig" {
			return nil, fmt.Errorf("entry %.64q follows %.64q, want its .sig", sig.Name, part.Name)
		}
		var err error
		n := 0
		switch m := earlierName.FindStringSubmatch(part.Name); {
		case m != nil:
			var p *Policy
			if p, err = parsePolicy(part.Data, sig.Data); err == nil {
				err = f.addEarlier(p, m[1])
			}
		case part.Name == "policy.yaml":
			n = 1
			f.Policy, err = parsePolicy(part.Data, sig.Data)
		case part.Name == "inventory.yaml":
			n = 2
			f.Inventory, err = parseInventory(part.Data, sig.Data)
		case part.Name == "revocations.yaml":
			n = 3
			f.Revocations, err = parseRevocations(part.Data, sig.Data)
		default:
			return nil, fmt.Errorf("entry %.64q is none of a bundle's", part.Name)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", part.Name, err)
		}
		if n < rank || n == rank && n > 0 {
			return nil, fmt.Errorf("entry %s is there twice, or not in the order policy.N, policy, inventory, revocations", part.Name)
		}
		rank = n
	}
	if n := len(f.Earlier); n > 0 && (f.Policy == nil || f.Policy.Version <= f.Earlier[n-1].Version) {
		return nil, errors.New("an earlier policy without a later one")
	}
	return f, f.sameFleet()
}

func (f *File) addEarlier(p *Policy, name string) error {
	if v, err := strconv.ParseUint(name, 10, 64); err != nil || v != p.Version {
		return fmt.Errorf("holds version %d", p.Version)
	}
	if n := len(f.Earlier); n > 0 && f.Earlier[n-1].Version >= p.Version {
		return errors.New("is there twice, or not in ascending order")
	}
	f.Earlier = append(f.Earlier, p)
	return nil
}

func (f *File) headers() (all []*Header) {
	for _, p := range f.Earlier {
		all = append(all, &p.Header)
	}
	if f.Policy != nil {
		all = append(all, &f.Policy.Header)
	}
	if f.Inventory != nil {
		all = append(all, &f.Inventory.Header)
	}
	if f.Revocations != nil {
		all = append(all, &f.Revocations.Header)
	}
	return all
}

func (f *File) sameFleet() error {
	all := f.headers()
	for _, h := range all[1:] {
		if h.Fleet != all[0].Fleet {
			return fmt.Errorf("parts that do not belong together: fleets %s and %s", all[0].Fleet, h.Fleet)
		}
	}
	return nil
}

// policies returns all of the file's, ascending.
func (f *File) policies() []*Policy {
	if f.Policy == nil {
		return nil
	}
	return append(append([]*Policy(nil), f.Earlier...), f.Policy)
}

// Format returns the file's bytes; Parse of them returns the same file.
func (f *File) Format() []byte {
	a := &txtar.Archive{}
	for _, h := range f.headers() {
		name := h.Part + ".yaml"
		if h.Part == PolicyPart && h != &f.Policy.Header {
			name = fmt.Sprintf("policy.%d.yaml", h.Version)
		}
		a.Files = append(a.Files, txtar.File{Name: name, Data: h.bytes}, txtar.File{Name: name + ".sig", Data: h.armored})
	}
	return txtar.Format(a)
}

// Add puts a part with its signatures (see [Sign]) into the file, in place of
// the one it had. A policy that replaces another keeps that one as an earlier
// one, where its roots differ.
func (f *File) Add(part, signatures []byte) error {
	h, err := ReadHeader(part)
	if err != nil {
		return err
	}
	next := *f
	switch h.Part {
	case PolicyPart:
		if next.Policy, err = parsePolicy(part, signatures); err == nil && f.Policy != nil && f.Policy.Version < next.Policy.Version {
			next.Earlier = chain(append(append([]*Policy(nil), f.Earlier...), f.Policy))
		}
	case InventoryPart:
		next.Inventory, err = parseInventory(part, signatures)
	default:
		next.Revocations, err = parseRevocations(part, signatures)
	}
	if err == nil {
		_, err = parse(next.Format())
	}
	if err != nil {
		return fault.New(fault.Usage, "mend the part and sign it again", "%s: %w", h.Part, err)
	}
	*f = next
	return nil
}

// chain returns those of some policies in ascending order that somebody who
// knows older roots only has to see: the first one under each set of roots.
// Nobody needs version 1 of them, which follows none.
func chain(policies []*Policy) (kept []*Policy) {
	for i, p := range policies {
		if p.Version > 1 && (i == 0 || !p.Roots.equal(policies[i-1].Roots)) {
			kept = append(kept, p)
		}
	}
	return kept
}
