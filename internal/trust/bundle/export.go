package bundle

import (
	"bytes"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hiddeco/sshsig"

	"github.com/halligan-io/halligan/internal/durable"
)

// ExportedFile is one file that stock ssh-keygen reads.
type ExportedFile struct {
	Name string
	Data []byte
}

// Export returns the bundle as single files, so that stock ssh-keygen can check
// it. With NAME one of policy, policy.N, inventory and revocations:
//
//   - NAME.yaml, the part, and NAME.yaml.1.sig and so on, its signatures;
//
//   - allowed_signers, with the principals root, delegate, and former-root for
//     roots of earlier policies, each for the namespaces that it may sign:
//
//     ssh-keygen -Y verify -f allowed_signers -I root -n policy@halligan.io -s policy.yaml.1.sig <policy.yaml
//
//   - krl.spec, and for revocations of one authority only krl.N.spec with its
//     key ca.N.pub, of which ssh-keygen makes a key revocation list:
//
//     ssh-keygen -k -f krl -s none krl.spec
//     ssh-keygen -k -u -f krl -s ca.1.pub krl.1.spec
//     ssh-keygen -Q -f krl someone-cert.pub
//
// Serials of an authority that the policy does not have are in none of them, nor
// are those of X.509 certificates. That enough distinct keys have signed is for
// the reader to count.
func (b *Bundle) Export() (files []ExportedFile) {
	for _, p := range b.earlier {
		files = append(files, exportPart(fmt.Sprintf("policy.%d.yaml", p.Version), &p.Header)...)
	}
	for _, h := range []*Header{&b.Policy.Header, &b.Inventory.Header, &b.Revocations.Header} {
		files = append(files, exportPart(h.Part+".yaml", h)...)
	}
	files = append(files, ExportedFile{"allowed_signers", b.allowedSigners()})
	return append(files, b.krl()...)
}

// ExportTo writes the files into a folder, which is made (0700), and returns
// their names.
func (b *Bundle) ExportTo(dir string) (names []string, err error) {
	if err := durable.Dir(dir); err != nil {
		return nil, err
	}
	for _, f := range b.Export() {
		if err := durable.Write(filepath.Join(dir, f.Name), f.Data); err != nil {
			return nil, err
		}
		names = append(names, f.Name)
	}
	return names, nil
}

func exportPart(name string, h *Header) []ExportedFile {
	files := []ExportedFile{{name, h.bytes}}
	for i, s := range h.signatures {
		files = append(files, ExportedFile{fmt.Sprintf("%s.%d.sig", name, i+1), sshsig.Armor(s)})
	}
	return files
}

func (b *Bundle) allowedSigners() []byte {
	var out bytes.Buffer
	line := func(principal string, k Key, namespaces ...string) {
		fmt.Fprintf(&out, "%s namespaces=%q %s\n", principal, strings.Join(namespaces, ","), k.Line())
	}
	for _, k := range b.Policy.Roots.Keys {
		line("root", k, PolicyNamespace, InventoryNamespace, RevocationsNamespace)
	}
	for _, k := range b.Policy.Delegates {
		line("delegate", k, InventoryNamespace, RevocationsNamespace)
	}
	seen := distinct(b.Policy.Roots.Keys)
	for _, p := range slices.Backward(b.earlier) {
		for _, k := range p.Roots.Keys {
			if id := identity(k); !seen[id] {
				seen[id] = true
				line("former-root", k, PolicyNamespace)
			}
		}
	}
	return out.Bytes()
}

// krl writes specifications for ssh-keygen -k, see KEY REVOCATION LISTS in
// ssh-keygen(1).
func (b *Bundle) krl() []ExportedFile {
	r := b.Revocations
	var wild bytes.Buffer
	fmt.Fprintf(&wild, "# %s, revocations %d: ssh-keygen -k -f krl -s none krl.spec\n", r.Fleet, r.Version)
	serials := map[string]*bytes.Buffer{}
	for _, s := range r.Serials {
		out := &wild
		if s.CA != "" {
			if serials[s.CA] == nil {
				serials[s.CA] = &bytes.Buffer{}
			}
			out = serials[s.CA]
		}
		fmt.Fprintf(out, "serial: %d\n", s.Serial)
	}
	for _, id := range r.KeyIDs {
		fmt.Fprintf(&wild, "id: %s\n", id)
	}
	for _, k := range r.Keys {
		fmt.Fprintf(&wild, "hash: %s\n", k)
	}
	files := []ExportedFile{{"krl.spec", wild.Bytes()}}
	n := 0
	for _, k := range slices.Concat(b.Policy.Authorities.User, b.Policy.Authorities.Host) {
		if spec := serials[k.Fingerprint()]; spec != nil {
			n++
			files = append(files, ExportedFile{fmt.Sprintf("ca.%d.pub", n), []byte(k.Line() + "\n")}, ExportedFile{fmt.Sprintf("krl.%d.spec", n), spec.Bytes()})
		}
	}
	return files
}
