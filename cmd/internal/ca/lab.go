package ca

import (
	"crypto"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/issuer"
)

// What follows does for a lab, with keys in the clear and nobody to ask, what
// people do with the commands.

// Bundle is the file of the signed bundle.
func (f *Folder) Bundle() string { return f.path(bundleFile) }

// ServerAuthority is the file of the certificate by which TLS servers are known.
func (f *Folder) ServerAuthority() string { return f.path(tlsServerCA + ".crt") }

// HostAuthority is the key by which SSH servers are known.
func (f *Folder) HostAuthority() (ssh.PublicKey, error) {
	key, _, err := issuer.ReadPublic(f.path(hostCA + ".pub"))
	return key, err
}

// SignAll gives every part that was signed before its next version and has it
// signed by the named keys of the folder.
func (f *Folder) SignAll(signers map[string][]string) error {
	_, err := os.Lstat(f.path(bundleFile))
	again := !errors.Is(err, fs.ErrNotExist)
	for _, part := range parts {
		if again {
			d, err := f.readDraft(part)
			if err != nil {
				return err
			}
			if err := f.advance(d); err != nil {
				return err
			}
		}
		for _, key := range signers[part] {
			if err := f.sign(part, f.path(key)); err != nil {
				return err
			}
		}
		// It is in the bundle now, unless others are still to be signed for the first.
		d, err := f.readDraft(part)
		if err != nil {
			return err
		}
		current, err := f.current()
		if err != nil {
			return err
		}
		if h := header(current, part); (again || part == parts[len(parts)-1]) && (h == nil || h.Version != d.Version) {
			return fault.New(fault.Failed, "remove the folder "+f.dir, "the %s is not signed by enough keys", part)
		}
	}
	return nil
}

// User certifies the SSH key of the file, which is made where it is missing.
func (f *Folder) User(file string, h issuer.Holder, life time.Duration) error {
	if err := ownKey(file, h.Person); err != nil {
		return err
	}
	return f.ssh(userCA, signFlags{life: life}, file+".pub", "", "user", h.Person, issuer.MaxLife, func(k *issuer.Key, public ssh.PublicKey, serial uint64, v issuer.Validity) (*ssh.Certificate, error) {
		return k.User(public, h, serial, v)
	})
}

// Host certifies the SSH host key of the file, which is made where it is missing.
func (f *Folder) Host(file, name string, life time.Duration) error {
	if err := ownKey(file, name); err != nil {
		return err
	}
	return f.ssh(hostCA, signFlags{life: life}, file+".pub", "", "host", name, issuer.MaxNodeLife, func(k *issuer.Key, public ssh.PublicKey, serial uint64, v issuer.Validity) (*ssh.Certificate, error) {
		return k.Host(public, name, serial, v)
	})
}

func ownKey(file, comment string) error {
	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	_, err := issuer.Generate(file, comment, nil)
	return err
}

// Client makes BASE.key and BASE.crt of automation, in place of those of before.
func (f *Folder) Client(base string, h issuer.Holder, life time.Duration) error {
	if err := old(base); err != nil {
		return err
	}
	return f.tls(tlsClientCA, signFlags{life: life}, "", base, "client", h.Person, issuer.MaxLife, func(a *issuer.Authority, public crypto.PublicKey, serial uint64, v issuer.Validity) (*x509.Certificate, error) {
		return a.Client(public, h, serial, v)
	})
}

// Server makes BASE.key and BASE.crt of an agent, in place of those of before.
func (f *Folder) Server(base, name string, life time.Duration) error {
	if err := old(base); err != nil {
		return err
	}
	return f.tls(tlsServerCA, signFlags{life: life}, "", base, "server", name, issuer.MaxNodeLife, func(a *issuer.Authority, public crypto.PublicKey, serial uint64, v issuer.Validity) (*x509.Certificate, error) {
		return a.Server(public, name, serial, v)
	})
}

func old(base string) error {
	if err := os.Remove(base + ".key"); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
