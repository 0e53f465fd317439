package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/issuer"
)

// The keys of an authority's folder, each a file with its .pub beside it. Roots
// are root-1, root-2 and so on. The two of TLS have a certificate .crt too.
const (
	userCA      = "user-ca"
	hostCA      = "host-ca"
	tlsClientCA = "tls-client-ca"
	tlsServerCA = "tls-server-ca"
	delegate    = "delegate"
)

// Folder is an authority's folder: the keys that are kept here, the parts of the
// bundle, the serials given out and the record of what was issued.
type Folder struct {
	dir string
	// ask returns the passphrase of a key; nil: there is nobody to ask.
	ask issuer.Passphrase
	// socket is that of the ssh-agent, "" for none.
	socket string
	now    func() time.Time
	out    io.Writer // takes what was done, for people
}

// Open returns the folder that Init made, for keys without a passphrase.
func Open(dir string) (*Folder, error) {
	f := &Folder{dir: dir, now: time.Now, out: io.Discard}
	return f, f.check()
}

// check refuses a folder that Init has not made, or that others may look into.
func (f *Folder) check() error {
	dir := f.dir
	if _, err := os.Lstat(filepath.Join(dir, "serial")); errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.Usage, "name it with --dir or HALLIGAN_CA, or make one: halligan ca init DIR", "%s is no folder of an authority", dir)
	}
	if err := durable.Dir(dir); err != nil {
		return fault.New(fault.Refused, "", "%w", err)
	}
	return nil
}

func (f *Folder) path(name string) string { return filepath.Join(f.dir, name) }

// Key returns the key to sign with: the one of a file, or where that is a .pub
// file the one in the ssh-agent. Without a file it is the folder's own of that
// name, or if only its .pub is here the one in the ssh-agent.
func (f *Folder) Key(name, file string) (*issuer.Key, error) {
	if file == "" {
		file = f.path(name)
		if _, err := os.Lstat(file); errors.Is(err, fs.ErrNotExist) {
			file += ".pub"
		}
	}
	return loadKey(file, f.ask, f.socket)
}

func loadKey(file string, ask issuer.Passphrase, socket string) (*issuer.Key, error) {
	if !strings.HasSuffix(file, ".pub") {
		return issuer.Load(file, ask)
	}
	public, _, err := issuer.ReadPublic(file)
	if err != nil {
		return nil, err
	}
	return issuer.FromAgent(socket, public)
}

// authority joins the certificate of a TLS authority with its key.
func (f *Folder) authority(name, signer string) (*issuer.Authority, *issuer.Key, error) {
	cert, err := readCertificate(f.path(name + ".crt"))
	if err != nil {
		return nil, nil, err
	}
	key, err := f.Key(name, signer)
	if err != nil {
		return nil, nil, err
	}
	a, err := issuer.OpenAuthority(cert, key)
	if err != nil {
		key.Close()
		return nil, nil, err
	}
	return a, key, nil
}

func readCertificate(file string) (*x509.Certificate, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fault.New(fault.Usage, "name a readable certificate", "certificate: %w", err)
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fault.New(fault.Usage, "name a PEM file of one certificate", "%s is none", file)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fault.New(fault.Usage, "name a PEM file of one certificate", "%s: %w", file, err)
	}
	return cert, nil
}

func certificatePEM(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

// serial gives out a number that was never given out here, durably before it is
// used. It is at least the time in seconds, so that a folder taken back from a
// copy does not give out again what was given out since.
func (f *Folder) serial() (uint64, error) {
	// The file is replaced each time, so the lock is on its folder.
	dir, err := os.Open(f.dir)
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX); err != nil {
		return 0, err
	}
	data, err := os.ReadFile(f.path("serial"))
	if err != nil {
		return 0, err
	}
	last, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 63)
	if err != nil {
		return 0, fault.New(fault.Failed, "write a number into it that is above every serial in "+f.path("issued.log"), "%s holds no serial", f.path("serial"))
	}
	next := max(last+1, uint64(max(1, f.now().Unix()))) // #nosec G115 -- not negative
	return next, durable.Write(f.path("serial"), []byte(strconv.FormatUint(next, 10)+"\n"))
}

// issued is one line of the record.
type issued struct {
	Time     time.Time `json:"time"`
	Kind     string    `json:"kind"`
	Name     string    `json:"name"`
	Roles    []string  `json:"roles,omitempty"`
	Clusters []string  `json:"clusters,omitempty"`
	Serial   uint64    `json:"serial"`
	NotAfter time.Time `json:"notAfter"`
	Key      string    `json:"key,omitempty"` // fingerprint
}

// record adds a line, durable before the certificate leaves this folder: what
// was issued can be found again to revoke it.
func (f *Folder) record(line issued) error {
	data, err := json.Marshal(line)
	if err != nil {
		return err
	}
	file, err := os.OpenFile(f.path("issued.log"), os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	if _, err = file.Write(append(data, '\n')); err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("recording what is issued: %w", err)
	}
	return durable.SyncDir(f.dir)
}

// newFile refuses a file that is there.
func newFile(path, next string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.Refused, next, "%s is there already", path)
	}
	return nil
}

func (f *Folder) say(format string, args ...any) { fmt.Fprintf(f.out, format+"\n", args...) }
