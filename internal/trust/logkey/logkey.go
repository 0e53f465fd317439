// Package logkey ties the keys of a daemon's evidence to the daemon: a statement
// with the key of its log, signed by its SSH host key, for which the fleet's host
// authority vouches. Whoever has the bundle can so tell whose log lies before them,
// with no network and long after. It also has the names under which logs and
// witnesses sign (C2SP signed-note, tlog-checkpoint and tlog-cosignature).
//
// It must never take a key for that of a server which did not sign for it, and
// never see a private key but the signer that it is handed. It stands on floor 0.
package logkey

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"time"

	"filippo.io/torchwood"
	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/mod/sumdb/note"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
)

const (
	// Namespace is the SSHSIG namespace of statements.
	Namespace = "log@halligan.io"
	// MaxSize bounds a statement in bytes.
	MaxSize = 16 << 10
	// ahead is how far a statement may lie in the future: as a bundle's parts.
	ahead = 24 * time.Hour

	heading = "halligan log identity 1"
	// logs and witnesses begin the names of keys.
	logs, witnesses = "halligan.io/log/", "halligan.io/witness/"
)

// Statement is what a daemon says of its evidence.
type Statement struct {
	// Server is NODE.CLUSTER, or NAME.bastion.
	Server string
	// Log is the key that signs checkpoints, of all lineages and generations;
	// Witness, at a bastion, the one of its countersignatures.
	Log, Witness ed25519.PublicKey
	// Age is what before-images are sealed to, at an agent.
	Age string
	// Signed is when it was made, in whole seconds of UTC.
	Signed time.Time
}

var (
	ageForm     = regexp.MustCompile(`^age1[0-9a-z]+$`)
	lineageForm = regexp.MustCompile(`^[0-9a-f]{8}$`)
)

// text is what is signed: a line for each field that is set.
func (s Statement) text() ([]byte, error) {
	switch {
	case !trust.ValidServer(s.Server):
		return nil, fmt.Errorf("%.80q is not the name of a server", s.Server)
	case len(s.Log) != ed25519.PublicKeySize, s.Witness != nil && len(s.Witness) != ed25519.PublicKeySize:
		return nil, errors.New("it has no Ed25519 key of the log, or a malformed one of the witness")
	case s.Age != "" && !ageForm.MatchString(s.Age):
		return nil, errors.New("its age recipient is malformed")
	case s.Signed.Unix() <= 0 || s.Signed.Nanosecond() != 0:
		return nil, errors.New("it does not say when it was signed")
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s\nserver %s\nlog %s\n", heading, s.Server, base64.StdEncoding.EncodeToString(s.Log))
	if s.Witness != nil {
		fmt.Fprintf(&b, "witness %s\n", base64.StdEncoding.EncodeToString(s.Witness))
	}
	if s.Age != "" {
		fmt.Fprintf(&b, "age %s\n", s.Age)
	}
	fmt.Fprintf(&b, "signed %s\n", s.Signed.UTC().Format(time.RFC3339))
	return b.Bytes(), nil
}

// parse is the reverse of text, and takes nothing that text would not write.
func parse(text []byte) (s Statement, err error) {
	lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	if len(lines) < 4 || len(lines) > 6 || lines[0] != heading {
		return s, errors.New("not a statement that this build knows")
	}
	for _, line := range lines[1:] {
		name, value, _ := strings.Cut(line, " ")
		var bad error
		switch name {
		case "server":
			s.Server = value
		case "log":
			s.Log, bad = base64.StdEncoding.DecodeString(value)
		case "witness":
			s.Witness, bad = base64.StdEncoding.DecodeString(value)
		case "age":
			s.Age = value
		case "signed":
			s.Signed, bad = time.Parse(time.RFC3339, value)
		default:
			bad = errors.New("unknown")
		}
		if bad != nil {
			return Statement{}, fmt.Errorf("its line %.20q: %w", name, bad)
		}
	}
	again, err := s.text()
	if err != nil {
		return Statement{}, err
	}
	if !bytes.Equal(again, text) {
		return Statement{}, errors.New("not in its canonical form")
	}
	return s, nil
}

// Sign returns the statement with the host key's signature and the certificate for
// that key. Of a signer that shows a certificate its key signs.
func Sign(s Statement, host gossh.Signer, cert *gossh.Certificate) ([]byte, error) {
	s.Signed = s.Signed.UTC().Truncate(time.Second)
	text, err := s.text()
	if err != nil {
		return nil, fmt.Errorf("the statement of the log's key: %w", err)
	}
	signature, err := bundle.Sign(text, Namespace, host)
	if err != nil {
		return nil, fmt.Errorf("the statement of the log's key: %w", err)
	}
	by, err := bundle.VerifySignature(text, Namespace, signature)
	if err != nil || !bytes.Equal(by.Marshal(), cert.Key.Marshal()) {
		return nil, errors.New("the statement of the log's key: the host's certificate is for another key")
	}
	return bytes.Join([][]byte{text, signature, gossh.MarshalAuthorizedKey(cert)}, nil), nil
}

// Verify returns what the server says, where the bundle's host authority vouched
// for that server when it said it: what lapsed since does not matter, what was
// revoked does. A statement of tomorrow is refused. Whether it is the server that
// is meant is for the caller. Errors are fault.Unauthenticated.
func Verify(data []byte, b *bundle.Bundle, now time.Time) (Statement, error) {
	s, err := verify(data, b, now)
	if err != nil {
		return Statement{}, fault.New(fault.Unauthenticated, "do not believe what this log says, or give the bundle of its time", "the statement of a log's key does not hold: %w", err)
	}
	return s, nil
}

// Parse returns what a statement says, and nothing of whether that holds: for one
// that was verified before it was stored.
func Parse(data []byte) (Statement, error) {
	text, _, _, err := split(data)
	if err != nil {
		return Statement{}, err
	}
	return parse(text)
}

// split returns the text, the signature under it and the certificate.
func split(data []byte) (text, signature, certificate []byte, err error) {
	if len(data) > MaxSize {
		return nil, nil, nil, fmt.Errorf("more than %d bytes", MaxSize)
	}
	begin := bytes.Index(data, []byte("-----BEGIN "))
	end := bytes.LastIndex(data, []byte("-----\n"))
	if begin < 0 || end < begin {
		return nil, nil, nil, errors.New("it has no signature")
	}
	end += len("-----\n")
	return data[:begin], data[begin:end], data[end:], nil
}

func verify(data []byte, b *bundle.Bundle, now time.Time) (Statement, error) {
	text, signature, certificate, err := split(data)
	if err != nil {
		return Statement{}, err
	}
	s, err := parse(text)
	if err != nil {
		return Statement{}, err
	}
	by, err := bundle.VerifySignature(text, Namespace, signature)
	if err != nil {
		return Statement{}, err
	}
	key, _, options, rest, err := gossh.ParseAuthorizedKey(certificate)
	if err != nil || len(options) > 0 || len(rest) > 0 {
		return Statement{}, errors.New("no certificate follows its signature")
	}
	cert, ok := key.(*gossh.Certificate)
	switch {
	case !ok || !bytes.Equal(by.Marshal(), cert.Key.Marshal()):
		return Statement{}, errors.New("its certificate is for another key than the one that signed")
	case s.Signed.After(now.Add(ahead)):
		return Statement{}, fmt.Errorf("it was signed at %s, and here it is %s", s.Signed.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	servers := &credential.Servers{Bundle: fixed{b}, Clock: moment(s.Signed)}
	if err := servers.HostKey(s.Server)("", nil, cert); err != nil {
		return Statement{}, err
	}
	return s, nil
}

type fixed struct{ b *bundle.Bundle }

func (f fixed) Current() *bundle.Bundle { return f.b }

type moment time.Time

func (m moment) Now() time.Time { return time.Time(m) }

// ValidLineage reports whether the text can name a lineage: 8 hexadecimal digits.
func ValidLineage(lineage string) bool { return lineageForm.MatchString(lineage) }

// Tree returns the name of one generation of a log: the origin line of its
// checkpoints, and the name of the key that signs them.
func Tree(origin, lineage string, generation uint64) string {
	return logs + origin + "/" + lineage + "/" + strconv.FormatUint(generation, 10)
}

// ParseTree is the reverse of Tree.
func ParseTree(name string) (origin, lineage string, generation uint64, err error) {
	parts := strings.Split(strings.TrimPrefix(name, logs), "/")
	if len(parts) == 3 {
		origin, lineage = parts[0], parts[1]
		generation, err = strconv.ParseUint(parts[2], 10, 64)
	}
	if err != nil || generation == 0 || !trust.ValidNode(origin) || !ValidLineage(lineage) || Tree(origin, lineage, generation) != name {
		return "", "", 0, fmt.Errorf("%.120q is not the name of a log", name)
	}
	return origin, lineage, generation, nil
}

// WitnessName is the name under which a server countersigns.
func WitnessName(server string) string { return witnesses + server }

// VKey returns the verifier key of a tree, as outside tools take it.
func VKey(tree string, key ed25519.PublicKey) (string, error) {
	return note.NewEd25519VerifierKey(tree, key)
}

// WitnessVKey returns the verifier key of a server's countersignatures.
func WitnessVKey(server string, key ed25519.PublicKey) (string, error) {
	v, err := witnessVerifier(server, key)
	if err != nil {
		return "", err
	}
	return v.String(), nil
}

// Verifier verifies the checkpoints of a tree.
func Verifier(tree string, key ed25519.PublicKey) (note.Verifier, error) {
	vkey, err := VKey(tree, key)
	if err != nil {
		return nil, err
	}
	return note.NewVerifier(vkey)
}

// WitnessVerifier verifies the countersignatures of a server.
func WitnessVerifier(server string, key ed25519.PublicKey) (note.Verifier, error) {
	return witnessVerifier(server, key)
}

func witnessVerifier(server string, key ed25519.PublicKey) (*torchwood.CosignatureVerifier, error) {
	if len(key) != ed25519.PublicKeySize {
		return nil, errors.New("no Ed25519 key of a witness")
	}
	// The library makes the verifier of a bare public key only beside a signer.
	signer, err := torchwood.NewCosignatureSigner(WitnessName(server), publicOnly(key))
	if err != nil {
		return nil, err
	}
	return signer.Verifier(), nil
}

// publicOnly is the public half of a key, where a signer is asked for.
type publicOnly ed25519.PublicKey

func (p publicOnly) Public() crypto.PublicKey { return ed25519.PublicKey(p) }

func (publicOnly) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("only the public half of the key is here")
}
