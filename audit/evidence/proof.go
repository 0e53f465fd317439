package evidence

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"slices"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// MaxProof bounds a proof in bytes.
const MaxProof = 256 << 10

// Prove returns a proof that an event is in its log (C2SP tlog-proof), under the
// countersigned checkpoint where that covers it.
func (e *Evidence) Prove(entry Entry) ([]byte, error) {
	for _, h := range e.held {
		if h.Log != entry.Log {
			continue
		}
		for i := range h.trees {
			t := &h.trees[i]
			if t.Number != entry.Generation {
				continue
			}
			checkpoint, tree := t.raw, t.at.Tree
			if t.cosigned != nil {
				if c, err := tiles.ParseCheckpoint(t.cosigned); err == nil && c.N > entry.Index {
					checkpoint, tree = t.cosigned, c.Tree
				}
			}
			proof, err := tlog.ProveRecord(tree.N, entry.Index, t.HashReader(t.at.Tree))
			if err != nil {
				return nil, fmt.Errorf("proving event %d: %w", entry.Seq, err)
			}
			return torchwood.FormatProof(entry.Index, proof, checkpoint), nil
		}
	}
	return nil, fault.New(fault.NotFound, "", "the event is not of this evidence")
}

// Proven is what a proof says.
type Proven struct {
	Event audit.Event
	Tree  string
	// Witnessed are the known witnesses that have countersigned.
	Witnessed []string
}

// VerifyProof checks a proof for an event, byte for byte, and that the log is of
// the origin that the event says. Identities are the statements of servers that
// may vouch for it: the log's own, and those of witnesses.
func VerifyProof(t Trust, identities [][]byte, proof, event []byte) (p Proven, err error) {
	t.Identities = slices.Concat(t.Identities, identities)
	keys, err := newKeyring(t)
	if err != nil {
		return p, err
	}
	bad := func(text string, args ...any) error {
		return fault.New(fault.Failed, "do not rely on it", text, args...)
	}
	if len(proof) > MaxProof {
		return p, bad("a proof of %d bytes is too long", len(proof))
	}
	lines, signed, ok := bytes.Cut(proof, []byte("\n\n"))
	if !ok {
		return p, bad("it is no proof (C2SP tlog-proof)")
	}
	for i, line := range bytes.Split(lines, []byte("\n")) {
		if i < 2 { // what it is, and the index
			continue
		}
		if _, err := base64.StdEncoding.Strict().DecodeString(string(line)); err != nil {
			return p, bad("it is no proof (C2SP tlog-proof): %w", err)
		}
	}
	if err := canonical(signed); err != nil {
		return p, bad("%w", err)
	}
	claims, err := tiles.ParseCheckpoint(signed)
	if err != nil {
		return p, bad("%w", err)
	}
	origin, _, _, err := logkey.ParseTree(claims.Origin)
	if err != nil {
		return p, bad("%w", err)
	}
	key := keys.logs[origin]
	if key == nil {
		key = keys.stated[origin].Log
	}
	if key == nil {
		return p, fault.New(fault.Usage, "give its key with --key, or its identity file with --identity-file", "nothing vouches for the key of %s", origin)
	}
	own, err := logkey.Verifier(claims.Origin, key)
	if err != nil {
		return p, bad("%w", err)
	}
	known := note.VerifierList(append([]note.Verifier{own}, keys.witnesses...)...)
	if err := torchwood.VerifyProof(&with{policy(claims.Origin, own), known}, tlog.RecordHash(event), proof); err != nil {
		return p, bad("the proof does not hold for this event: %w", err)
	}
	if p.Event, err = Decode(event); err != nil {
		return p, bad("%w", err)
	}
	if p.Event.Origin != origin {
		return p, bad("the event says that it is of %q, and the log is of %s", p.Event.Origin, origin)
	}
	n, err := note.Open(signed, known)
	if err != nil {
		return p, bad("%w", err)
	}
	for _, sig := range n.Sigs {
		if sig.Name != claims.Origin && !slices.Contains(p.Witnessed, sig.Name) {
			p.Witnessed = append(p.Witnessed, sig.Name)
		}
	}
	p.Tree = claims.Origin
	return p, nil
}
