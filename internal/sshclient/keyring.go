package sshclient

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/halligan-io/halligan/internal/fault"
)

const (
	// maxKeyFile bounds what is read of a key or certificate, in bytes.
	maxKeyFile = 64 << 10
	// agentPatience is how long an ssh-agent may take to list its keys.
	agentPatience = 3 * time.Second
	// maxPassphrases is how often a passphrase is asked for.
	maxPassphrases = 3
)

// Sources says where to look for something to log in with.
type Sources struct {
	// File is a private key of OpenSSH's or a PEM format, its certificate beside
	// it in File-cert.pub. Where the key itself is in the ssh-agent, as every
	// FIDO2 key has to be, File may be the stub that ssh-keygen made, or only its
	// .pub and -cert.pub may be there. Empty: all that the ssh-agent holds.
	File string
	// Agent is the socket of an ssh-agent, as SSH_AUTH_SOCK names it.
	Agent string
	// Passphrase asks a person for the passphrase of the file, again when the
	// one before was wrong; nil: there is nobody to ask.
	Passphrase func(file string) ([]byte, error)
}

// Key is something to log in with.
type Key struct {
	// Public is the key itself, never a certificate.
	Public gossh.PublicKey
	// Certificate is the user certificate of the key; nil: the key alone.
	Certificate *gossh.Certificate
	// From is the file, or "ssh-agent" and its comment, for messages.
	From string

	signer gossh.Signer
}

// SecurityKey reports whether the key is a FIDO2 one, whose every use asks its
// holder to touch it.
func (k Key) SecurityKey() bool { return strings.HasPrefix(k.Public.Type(), "sk-") }

// Signer signs with the key itself.
func (k Key) Signer() gossh.Signer { return k.signer }

// Name says in a message which key it is.
func (k Key) Name() string {
	if k.Certificate != nil {
		return fmt.Sprintf("the certificate of %s (%s)", k.Certificate.KeyId, k.From)
	}
	return fmt.Sprintf("the key %s", k.From)
}

// Keyring holds the keys that were found, and the ssh-agent that signs with
// some of them.
type Keyring struct {
	Keys  []Key
	agent io.Closer
}

// Close lets go of the ssh-agent. The keys sign no more then.
func (r *Keyring) Close() error {
	if r == nil || r.agent == nil {
		return nil
	}
	return r.agent.Close()
}

// Open finds the keys. A key file that others may read is refused, as is one
// whose certificate is of another key.
func Open(from Sources) (*Keyring, error) {
	if from.File == "" {
		return fromAgent(from.Agent)
	}
	r := &Keyring{}
	key, err := r.fromFile(from)
	if err != nil {
		r.Close()
		return nil, err
	}
	r.Keys = []Key{key}
	return r, nil
}

func fromAgent(socket string) (*Keyring, error) {
	r := &Keyring{}
	held, err := r.held(socket)
	if err != nil {
		return nil, err
	}
	for _, k := range held {
		if k.Certificate != nil || k.SecurityKey() {
			r.Keys = append(r.Keys, k)
		}
	}
	if len(r.Keys) == 0 {
		r.Close()
		return nil, fault.New(fault.Unauthenticated, "name a key with --identity or HALLIGAN_IDENTITY, or add one that has its certificate beside it: ssh-add KEY",
			"the ssh-agent holds no certificate")
	}
	return r, nil
}

// held lists what the ssh-agent can sign with.
func (r *Keyring) held(socket string) ([]Key, error) {
	if socket == "" {
		return nil, fault.New(fault.Unauthenticated, "name a key with --identity or HALLIGAN_IDENTITY, or start an ssh-agent and add one with ssh-add",
			"there is nothing to log in with: no key is named, and SSH_AUTH_SOCK names no ssh-agent")
	}
	conn, err := net.DialTimeout("unix", socket, agentPatience)
	if err != nil {
		return nil, fault.New(fault.Unauthenticated, "name a key with --identity or HALLIGAN_IDENTITY, or start an ssh-agent", "the ssh-agent at %s does not answer: %w", socket, err)
	}
	_ = conn.SetDeadline(time.Now().Add(agentPatience))
	signers, err := agent.NewClient(conn).Signers()
	if err != nil {
		conn.Close()
		return nil, fault.New(fault.Unauthenticated, "see what it holds: ssh-add -l", "the ssh-agent at %s does not list its keys: %w", socket, err)
	}
	// From here on a signature may wait for a person's touch.
	_ = conn.SetDeadline(time.Time{})
	r.agent = conn
	var keys []Key
	for _, s := range signers {
		where := "ssh-agent"
		if k, ok := s.PublicKey().(*agent.Key); ok && k.Comment != "" {
			where += ", " + k.Comment
		}
		// What the agent calls a key may be a certificate.
		public, err := gossh.ParsePublicKey(s.PublicKey().Marshal())
		if err != nil {
			continue // of a type that no agent of ours would admit either
		}
		cert, certified := public.(*gossh.Certificate)
		if !certified {
			keys = append(keys, Key{Public: public, From: where, signer: s})
			continue
		}
		// It signs for the certificate with the key inside.
		keys = append(keys, Key{Public: cert.Key, Certificate: cert, From: where, signer: as{s, cert.Key}})
	}
	return keys, nil
}

// as is a signer that shows the key in place of its certificate.
type as struct {
	gossh.Signer
	public gossh.PublicKey
}

func (a as) PublicKey() gossh.PublicKey { return a.public }

// SignWithAlgorithm lets an RSA key sign with SHA-2.
func (a as) SignWithAlgorithm(random io.Reader, data []byte, algorithm string) (*gossh.Signature, error) {
	if s, ok := a.Signer.(gossh.AlgorithmSigner); ok && strings.HasPrefix(algorithm, "rsa-sha2-") {
		return s.SignWithAlgorithm(random, data, algorithm)
	}
	return a.Sign(random, data)
}

func (r *Keyring) fromFile(from Sources) (Key, error) {
	file := strings.TrimSuffix(strings.TrimSuffix(from.File, ".pub"), "-cert")
	cert, err := readCertificate(file + "-cert.pub")
	if err != nil {
		return Key{}, err
	}
	key := Key{Certificate: cert, From: file}
	private, err := readPrivate(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if key.Public, err = publicBeside(file, cert); err != nil {
			return Key{}, err
		}
	case err != nil:
		return Key{}, err
	default:
		defer clear(private)
		key.signer, err = gossh.ParsePrivateKey(private)
		var locked *gossh.PassphraseMissingError
		switch {
		case err == nil:
			key.Public = key.signer.PublicKey()
		case errors.As(err, &locked):
			if key.Public = locked.PublicKey; key.Public == nil && cert != nil {
				key.Public = cert.Key
			}
		default:
			if key.Public = publicOf(private); key.Public == nil || !key.SecurityKey() {
				return Key{}, fault.New(fault.Unauthenticated, "name a private key that ssh-keygen made with --identity", "%s is no private key: %s", file, strings.TrimPrefix(err.Error(), "ssh: "))
			}
		}
	}
	if key.signer == nil || key.Certificate == nil {
		if err := r.complete(&key, from, private); err != nil {
			return Key{}, err
		}
	}
	if key.Certificate != nil && !same(key.Certificate.Key, key.Public) {
		return Key{}, fault.New(fault.Unauthenticated, "put the certificate that was made for this key beside it", "%s-cert.pub is the certificate of another key than %s", file, file)
	}
	return key, nil
}

// complete takes from the ssh-agent, or from a person's memory, what the files
// lack.
func (r *Keyring) complete(key *Key, from Sources, private []byte) error {
	var held []Key
	if from.Agent != "" {
		held, _ = r.held(from.Agent) // an agent that is not there has nothing
	}
	for _, k := range held {
		if key.Public == nil || !same(k.Public, key.Public) {
			continue
		}
		if key.signer == nil {
			key.signer = k.signer
		}
		if key.Certificate == nil {
			key.Certificate = k.Certificate
		}
	}
	switch {
	case key.signer != nil:
		return nil
	case private == nil:
		return fault.New(fault.Unauthenticated, "add the key to the ssh-agent, or name another with --identity", "there is no private key %s, and no ssh-agent holds it", key.From)
	case key.Public != nil && key.SecurityKey():
		return fault.New(fault.Unauthenticated, "plug the key in and run: ssh-add "+key.From, "%s is a FIDO2 key, which is used through an ssh-agent, and none holds it", key.From)
	case from.Passphrase == nil:
		return fault.New(fault.Unauthenticated, "run this on a terminal, or add the key to an ssh-agent: ssh-add "+key.From, "%s has a passphrase, and there is nobody to ask for it", key.From)
	}
	for range maxPassphrases {
		phrase, err := from.Passphrase(key.From)
		if err != nil {
			return fault.New(fault.Unauthenticated, "run this on a terminal, or add the key to an ssh-agent: ssh-add "+key.From, "asking for the passphrase of %s: %w", key.From, err)
		}
		key.signer, err = gossh.ParsePrivateKeyWithPassphrase(private, phrase)
		clear(phrase)
		if err == nil {
			key.Public = key.signer.PublicKey()
			return nil
		}
	}
	return fault.New(fault.Unauthenticated, "try again with the right one", "that is not the passphrase of %s", key.From)
}

// readPrivate reads a private key, which must be nobody else's to read.
func readPrivate(file string) ([]byte, error) {
	f, err := os.Open(file) // #nosec G304 -- the person names it
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		return nil, fault.New(fault.Unauthenticated, "name a key of your own with --identity", "the key cannot be read: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fault.New(fault.Unauthenticated, "name a private key with --identity", "%s is not a file", file)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fault.New(fault.Unauthenticated, "if nobody else has read it: chmod 600 "+file+"; otherwise have its certificate revoked", "%s has mode %04o: others may read this private key", file, mode)
	}
	return readAll(f, file)
}

func readAll(f io.Reader, file string) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err == nil && len(data) > maxKeyFile {
		err = fault.New(fault.Unauthenticated, "name a private key with --identity", "%s is too large for a key", file)
	}
	return data, err
}

// readCertificate returns the certificate in the file, nil where there is none.
func readCertificate(file string) (*gossh.Certificate, error) {
	public, err := readPublic(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	cert, ok := public.(*gossh.Certificate)
	if err != nil || !ok {
		return nil, fault.New(fault.Unauthenticated, "put the certificate that was made for the key there", "%s is no certificate", file)
	}
	return cert, nil
}

func readPublic(file string) (gossh.PublicKey, error) {
	f, err := os.Open(file) // #nosec G304 -- beside the key that the person names
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := readAll(f, file)
	if err != nil {
		return nil, err
	}
	public, _, _, _, err := gossh.ParseAuthorizedKey(data)
	return public, err
}

// publicBeside finds out which key is meant where its private half is not there.
func publicBeside(file string, cert *gossh.Certificate) (gossh.PublicKey, error) {
	if cert != nil {
		return cert.Key, nil
	}
	public, err := readPublic(file + ".pub")
	if err != nil {
		return nil, fault.New(fault.Unauthenticated, "name a private key with --identity or HALLIGAN_IDENTITY", "there is no key %s", file)
	}
	return public, nil
}

// publicOf returns the public half of a private key of OpenSSH's format, which
// it has in the clear even where the private half is hardware's (PROTOCOL.key in
// OpenSSH's sources); nil where there is none.
func publicOf(private []byte) gossh.PublicKey {
	const magic = "openssh-key-v1\x00"
	block, _ := pem.Decode(private)
	if block == nil || !bytes.HasPrefix(block.Bytes, []byte(magic)) {
		return nil
	}
	var head struct {
		Cipher, KDF, KDFOptions string
		Keys                    uint32
		Public                  []byte
		Rest                    []byte `ssh:"rest"`
	}
	if gossh.Unmarshal(block.Bytes[len(magic):], &head) != nil || head.Keys != 1 {
		return nil
	}
	public, err := gossh.ParsePublicKey(head.Public)
	if err != nil {
		return nil
	}
	return public
}

func same(a, b gossh.PublicKey) bool { return bytes.Equal(a.Marshal(), b.Marshal()) }
