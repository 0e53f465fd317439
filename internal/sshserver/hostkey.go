package sshserver

import (
	"errors"
	"fmt"
	"os"
	"slices"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

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
