package sshserver

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/rs/zerolog"
	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/reload"
)

// HostFiles is HostKey for Options.HostRenewed: what it returns reads both files
// again when they change, and keeps what it had where they cannot be used.
func HostFiles(keyFile, certFile, name string, log zerolog.Logger) (func() []gossh.Signer, error) {
	return reload.Files("the SSH host's certificate", []string{certFile, keyFile}, func() ([]gossh.Signer, error) {
		signers, _, err := HostKey(keyFile, certFile, name)
		if err == nil {
			err = checkSigners(signers)
		}
		return signers, err
	}, log)
}

// checkSigners refuses host keys that not all clients take.
func checkSigners(signers []gossh.Signer) error {
	if len(signers) == 0 {
		return errors.New("an SSH server needs a host key; none is made up")
	}
	seen := map[string]bool{}
	for _, signer := range signers {
		algorithm := signer.PublicKey().Type()
		if algorithm != gossh.KeyAlgoED25519 && algorithm != gossh.CertAlgoED25519v01 {
			return fmt.Errorf("host key of type %s: only Ed25519 keys and certificates are taken", algorithm)
		}
		if seen[algorithm] {
			return fmt.Errorf("two host keys of type %s", algorithm)
		}
		seen[algorithm] = true
	}
	return nil
}

// HostKey reads a host's key and its certificate, which must be for that one
// name, for Options.HostSigners. The key is not shown without the certificate,
// so that nobody can trust it at first use. Errors are fault.Usage.
func HostKey(keyFile, certFile, name string) ([]gossh.Signer, *gossh.Certificate, error) {
	mend := func(file string, err error) ([]gossh.Signer, *gossh.Certificate, error) {
		return nil, nil, fault.New(fault.Usage, "make both with halligan ca issue", "the SSH host's %s: %w", file, err)
	}
	if err := durable.CheckPrivate(keyFile); err != nil {
		return mend(keyFile, err)
	}
	data, err := os.ReadFile(keyFile)
	if err != nil {
		return mend(keyFile, err)
	}
	key, err := gossh.ParsePrivateKey(data)
	if err != nil {
		return mend(keyFile, err)
	}
	if data, err = os.ReadFile(certFile); err != nil {
		return mend(certFile, err)
	}
	public, _, _, _, err := gossh.ParseAuthorizedKey(data)
	if err != nil {
		return mend(certFile, err)
	}
	cert, ok := public.(*gossh.Certificate)
	switch {
	case !ok || cert.CertType != gossh.HostCert:
		return mend(certFile, errors.New("it is no host certificate"))
	case !slices.Equal(cert.ValidPrincipals, []string{name}):
		return mend(certFile, fmt.Errorf("it is for %q, and this is %s", cert.ValidPrincipals, name))
	}
	signer, err := gossh.NewCertSigner(cert, key)
	if err != nil {
		return mend(certFile, err)
	}
	return []gossh.Signer{signer}, cert, nil
}
