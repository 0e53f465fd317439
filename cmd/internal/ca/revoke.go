package ca

import (
	"bufio"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/issuer"
)

// revocations reads the draft of what is revoked, signed or not: whoever was
// just revoked is not to get a certificate before that is signed.
func (f *Folder) revocations() (*draft, *bundle.Revocations, error) {
	d, err := f.readDraft(bundle.RevocationsPart)
	if err != nil {
		return nil, nil, err
	}
	b, err := d.typed()
	if err != nil {
		return nil, nil, err
	}
	return d, b.Revocations, nil
}

// refuse refuses to sign for whom no agent would let in: revoked asks the
// revocations.
func (f *Folder) refuse(revoked func(*bundle.Revocations) (by string, listed bool)) error {
	_, r, err := f.revocations()
	if err != nil {
		return err
	}
	if by, listed := revoked(r); listed {
		return fault.New(fault.Refused, "issue one for a new key, or under a new name", "revocations.yaml lists %s", by)
	}
	return nil
}

func (f *Folder) refuseRevoked(name string, key ssh.PublicKey) error {
	return f.refuse(func(r *bundle.Revocations) (string, bool) { return r.Key(key, name) })
}

func (t *tool) revoke() *cobra.Command {
	var persons, keys, x509 []string
	var serials []uint
	var signer string
	var sign bool
	c := &cobra.Command{
		Use: "revoke", Short: "Add to the revocations, and sign them", Args: words(0, "flags that say what, and nothing else"),
		Long: "Adds to revocations.yaml and gives it the next version. Once it is signed, by the delegate's key or any root's, and\n" +
			"handed out in the bundle, what it lists opens nothing any more, and sessions that it opened end. Without --sign it asks.\n" +
			"What was issued, with its serials, is in DIR/issued.log.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := t.folder()
			if err != nil {
				return err
			}
			d, r, err := f.revocations()
			if err != nil {
				return err
			}
			before := len(r.Serials) + len(r.KeyIDs) + len(r.Keys) + len(r.X509Serials)
			for _, n := range serials {
				if s := (bundle.Serial{Serial: uint64(n)}); !slices.Contains(r.Serials, s) {
					r.Serials = append(r.Serials, s)
				}
			}
			for _, p := range persons {
				if !trust.ValidPerson(p) {
					return usage(cmd, "%q is nobody's name", p)
				}
				r.KeyIDs = with(r.KeyIDs, p)
			}
			for _, k := range keys {
				print, err := fingerprint(k)
				if err != nil {
					return err
				}
				r.Keys = with(r.Keys, print)
			}
			for _, s := range x509 {
				if n := (bundle.X509Serial{Serial: s}); !slices.Contains(r.X509Serials, n) {
					r.X509Serials = append(r.X509Serials, n)
				}
			}
			switch after := len(r.Serials) + len(r.KeyIDs) + len(r.Keys) + len(r.X509Serials); {
			case len(serials)+len(persons)+len(keys)+len(x509) == 0:
				return usage(cmd, "there is nothing to revoke")
			case after == before:
				t.say("%s: lists all of it already", d.file)
			default:
				if err := f.rewrite(d, r); err != nil {
					return err
				}
				t.say("%s: version %d, %d more", d.file, d.Version, after-before)
			}
			if !sign {
				if sign, err = t.ask("Sign it now with the delegate's key? [y/N] "); err != nil {
					return err
				}
			}
			if !sign {
				t.say("next, since nobody is locked out before: halligan ca --dir %s bundle sign revocations", f.dir)
				return nil
			}
			return f.sign(bundle.RevocationsPart, signer)
		},
	}
	fl := c.Flags()
	fl.StringSliceVar(&persons, "person", nil, "a person or automation, under `NAME` (the key ID), with all that they have")
	fl.StringSliceVar(&persons, "key-id", nil, "the same as --person")
	fl.UintSliceVar(&serials, "serial", nil, "an SSH certificate by its `serial`")
	fl.StringSliceVar(&keys, "key", nil, "a key, as a `file` NAME.pub or as SHA256:..., with all its certificates")
	fl.StringSliceVar(&x509, "x509-serial", nil, "a TLS client certificate by its `serial`")
	fl.BoolVar(&sign, "sign", false, "sign without asking")
	fl.StringVar(&signer, "signer", "", "`file` of the key that signs; a .pub file means the one in the ssh-agent (default: the delegate's)")
	return c
}

func with(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

// fingerprint takes one as it is, and that of a key or of a certificate's key
// from a file.
func fingerprint(s string) (string, error) {
	if strings.HasPrefix(s, "SHA256:") {
		return s, nil
	}
	key, _, err := issuer.ReadPublic(s)
	if err != nil {
		return "", err
	}
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	return ssh.FingerprintSHA256(key), nil
}

// rewrite writes the revocations as the version after the bundle's.
func (f *Folder) rewrite(d *draft, r *bundle.Revocations) error {
	data, err := bundle.Encode(r)
	if err != nil {
		return d.malformed(err)
	}
	d.data = data
	if err := durable.Write(d.file, d.data); err != nil {
		return err
	}
	return f.advance(d)
}

// ask puts a question on the terminal of this process; without one the answer is
// no.
func (t *tool) ask(question string) (bool, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return false, nil
	}
	defer tty.Close()
	if _, err := tty.WriteString(question); err != nil {
		return false, err
	}
	answer, _ := bufio.NewReader(tty).ReadString('\n')
	answer = strings.ToLower(strings.TrimSpace(answer))
	return answer == "y" || answer == "yes", nil
}
