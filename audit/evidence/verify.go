package evidence

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sync/errgroup"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// Trust says whom to believe. Without any of it nothing can be verified.
type Trust struct {
	// Bundle has the authority that vouches for servers, which vouch for the keys
	// of their logs and witnesses.
	Bundle *bundle.Bundle
	// Keys are verifier keys (C2SP signed-note): of logs, and of witnesses whose
	// type is cosignature/v1. That of a log holds for all its generations.
	Keys []string
	// Identities are statements of servers besides those in the folders, such as a
	// bastion's, whose countersignatures count then.
	Identities [][]byte
	Now        time.Time
}

// Report is what Verify found, log by log.
type Report struct {
	Logs []*Log `json:"logs"`
}

// OK reports whether all of it holds.
func (r *Report) OK() bool {
	return !slices.ContainsFunc(r.Logs, func(l *Log) bool { return len(l.Problems) > 0 })
}

// Log is one lineage of one daemon's events.
type Log struct {
	// Folder is its folder's name, Origin whose it is, which the signatures say.
	Folder  string `json:"folder,omitempty"`
	Origin  string `json:"origin"`
	Lineage string `json:"lineage"`
	// VouchedBy says what the log's key is believed for.
	VouchedBy string `json:"vouchedBy,omitempty"`
	// Generations are those that are here.
	Generations []Generation `json:"generations"`
	// Events is how many hold. FirstSeq is the first one's number: what was before
	// it has been removed for age, and the seam vouches for that.
	Events   uint64 `json:"events"`
	FirstSeq uint64 `json:"firstSeq"`
	// Begin and End are the times of the first and the last event.
	Begin time.Time `json:"begin,omitzero"`
	End   time.Time `json:"end,omitzero"`
	// Witnessed says how far others have countersigned, Unwitnessed how many events
	// at the end nobody has whose key is known here.
	Witnessed   []Witnessed `json:"witnessed,omitempty"`
	Unwitnessed uint64      `json:"unwitnessed"`
	// Recordings are files of which every byte is vouched for, Absent those of
	// which the log speaks that are not here.
	Recordings int `json:"recordings"`
	Absent     int `json:"absentRecordings,omitempty"`
	// Problems are what does not hold, the first one in the log first.
	Problems []Problem `json:"problems,omitempty"`
	// Notes are what is worth knowing and breaks nothing.
	Notes []string `json:"notes,omitempty"`
}

// Generation is one tree of a log.
type Generation struct {
	Number   uint64 `json:"number"`
	FirstSeq uint64 `json:"firstSeq"`
	// Size is how many entries its signed checkpoint covers.
	Size uint64 `json:"size"`
	// VKey verifies it with any tool that knows the formats.
	VKey string `json:"vkey"`
}

// Witnessed is how far one witness has countersigned.
type Witnessed struct {
	// By is the server; Known says that its key is, so that the signature counts.
	By    string `json:"by"`
	Known bool   `json:"known"`
	// Events is how many it covers, from the first of the lineage on.
	Events uint64    `json:"events"`
	At     time.Time `json:"at,omitzero"`
}

// Problem is what does not hold.
type Problem struct {
	// File is relative to what was opened, with slashes.
	File string `json:"file"`
	// Seq is the number of the first event concerned; nil: none by itself.
	Seq  *uint64 `json:"seq,omitempty"`
	Text string  `json:"text"`
}

func (p Problem) String() string {
	if p.Seq != nil {
		return fmt.Sprintf("%s: event %d: %s", p.File, *p.Seq, p.Text)
	}
	return p.File + ": " + p.Text
}

// held is a log whose events may be read.
type held struct {
	*Log
	folder *folder
	key    ed25519.PublicKey
	trees  []heldTree
	others []another
}

// another is an event of another log: one that a bastion keeps for it, or one that
// it has taken back with the receipts of who kept it.
type another struct {
	audit.Event
	of audit.Event
}

// heldTree is one generation, of which the first good entries hold.
type heldTree struct {
	*tiles.Tree
	Generation
	raw      []byte // the signed checkpoint
	cosigned []byte // nil: none
	at       torchwood.Checkpoint
	signed   int64 // entries under the checkpoint file, where the countersigned one has more
	good     int64
}

// keyring is what Trust comes to.
type keyring struct {
	trust     Trust
	logs      map[string]ed25519.PublicKey // by origin, as the person named them
	stated    map[string]statement         // by origin
	receipts  map[string]ed25519.PublicKey // keys of witnesses, by server
	witnesses []note.Verifier
}

func newKeyring(t Trust) (*keyring, error) {
	if t.Bundle == nil && len(t.Keys) == 0 {
		return nil, fault.New(fault.Usage, "name the fleet's bundle with --bundle, or a log's key with --key", "nothing says whom to believe")
	}
	k := &keyring{trust: t, logs: map[string]ed25519.PublicKey{}, stated: map[string]statement{}, receipts: map[string]ed25519.PublicKey{}}
	for _, vkey := range t.Keys {
		if w, err := torchwood.NewCosignatureVerifier(vkey); err == nil {
			k.witness(w)
			continue
		}
		origin, key, err := parseVKey(vkey)
		if err != nil {
			return nil, fault.New(fault.Usage, "take it from halligan status, or from halligan audit verify -o json", "%.200q is not the key of a log or of a witness: %w", vkey, err)
		}
		k.logs[origin] = key
	}
	for _, data := range t.Identities {
		if t.Bundle == nil {
			return nil, fault.New(fault.Usage, "name the fleet's bundle with --bundle", "nothing vouches for a server's statement of its keys")
		}
		s, err := logkey.Verify(data, t.Bundle, t.Now)
		if err != nil {
			return nil, err
		}
		k.stated[s.Server] = statement{Statement: s}
		k.vouch(s)
	}
	return k, nil
}

// vouch adds the witness that a server says it is.
func (k *keyring) vouch(s logkey.Statement) {
	if v, err := logkey.WitnessVerifier(s.Server, s.Witness); err == nil {
		k.witness(v)
		k.receipts[s.Server] = s.Witness
	}
}

// witness adds one that is believed. Twice the same one would verify nothing.
func (k *keyring) witness(w note.Verifier) {
	if !slices.ContainsFunc(k.witnesses, func(v note.Verifier) bool { return v.Name() == w.Name() && v.KeyHash() == w.KeyHash() }) {
		k.witnesses = append(k.witnesses, w)
	}
}

// parseVKey takes the key of a log apart (C2SP signed-note: NAME+HASH+base64 of
// the type and the key).
func parseVKey(vkey string) (origin string, key ed25519.PublicKey, err error) {
	if _, err := note.NewVerifier(vkey); err != nil {
		return "", nil, err
	}
	parts := strings.SplitN(vkey, "+", 3)
	if origin, _, _, err = logkey.ParseTree(parts[0]); err != nil {
		return "", nil, err
	}
	data, err := base64.StdEncoding.DecodeString(parts[2])
	if err != nil || len(data) != 1+ed25519.PublicKeySize {
		return "", nil, errors.New("malformed key")
	}
	return origin, data[1:], nil
}

// Verify checks all of it. The error is that it could not be looked at; what does
// not hold is in the report.
func (e *Evidence) Verify(ctx context.Context, t Trust) (*Report, error) {
	keys, err := newKeyring(t)
	if err != nil {
		return nil, err
	}
	// Servers vouch for their keys first, since witnesses are among them.
	for _, f := range e.folders {
		f.statements = map[string]statement{}
		entries, _ := fs.ReadDir(f.fs, ".")
		for _, entry := range entries {
			lineage, own := strings.CutPrefix(entry.Name(), lineageFile)
			if t.Bundle == nil || entry.Name() != identityFile && !(own && logkey.ValidLineage(lineage)) {
				continue
			}
			if !own {
				lineage = ""
			}
			var s statement
			data, err := f.read(entry.Name(), logkey.MaxSize)
			if err == nil {
				s.Statement, err = logkey.Verify(data, t.Bundle, t.Now)
			}
			s.err = err
			f.statements[lineage] = s
			if err == nil {
				keys.vouch(s.Statement)
			}
		}
	}
	e.report, e.held = &Report{Logs: []*Log{}}, nil
	found := make([][]*held, len(e.folders))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, f := range e.folders {
		g.Go(func() (err error) {
			found[i], err = f.verify(ctx, keys)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for _, logs := range found {
		e.held = append(e.held, logs...)
		for _, h := range logs {
			e.report.Logs = append(e.report.Logs, h.Log)
		}
	}
	e.compare()
	e.kept(keys)
	return e.report, nil
}

// verify verifies one daemon's.
func (f *folder) verify(ctx context.Context, keys *keyring) (order []*held, err error) {
	lineages := map[string]*held{}
	for _, name := range f.generations() {
		h := lineages[name[:8]]
		if h == nil {
			h = &held{Log: &Log{Folder: f.name, Origin: f.origin(), Lineage: name[:8], Generations: []Generation{}}, folder: f}
			lineages[name[:8]], order = h, append(order, h)
		}
		h.find(name, keys)
	}
	if len(order) == 0 {
		log := &Log{Folder: f.name, Origin: f.origin(), Generations: []Generation{}}
		log.problem(f.file(logsFolder), nil, "there is no log in it")
		return []*held{{Log: log, folder: f}}, nil
	}
	casts := newCasts()
	for _, h := range order {
		if err := h.verify(ctx, casts, keys); err != nil {
			return nil, err
		}
	}
	casts.check(f, order)
	f.problems(order[len(order)-1].Log)
	slices.SortStableFunc(order, func(x, y *held) int { return x.Begin.Compare(y.Begin) })
	for i, h := range order {
		if i > 0 {
			h.note("the log began anew: before it there is lineage %s", order[i-1].Lineage)
		}
	}
	return order, nil
}

func (l *Log) problem(file string, seq *uint64, text string, args ...any) {
	l.Problems = append(l.Problems, Problem{File: file, Seq: seq, Text: fmt.Sprintf(text, args...)})
}

func (l *Log) note(text string, args ...any) { l.Notes = append(l.Notes, fmt.Sprintf(text, args...)) }

// find reads the checkpoint of a generation, and verifies who has signed it.
func (h *held) find(name string, keys *keyring) {
	f := h.folder
	below, err := fs.Sub(f.fs, path.Join(logsFolder, name))
	if err != nil {
		h.problem(f.file(logsFolder, name), nil, "it cannot be read: %v", err)
		return
	}
	file := f.file(logsFolder, name, checkpointFile)
	tree := heldTree{Tree: tiles.Of(below)}
	raw, claims, err := tree.Checkpoint()
	if errors.Is(err, fs.ErrNotExist) {
		h.problem(file, nil, "there is no checkpoint: nothing of this generation is signed")
		return
	}
	if err != nil {
		h.problem(file, nil, "%v", err)
		return
	}
	origin, lineage, generation, err := logkey.ParseTree(claims.Origin)
	switch {
	case err != nil:
		h.problem(file, nil, "%v", err)
		return
	case tiles.Folder(lineage, generation) != name:
		h.problem(file, nil, "it is of lineage %s, generation %d: not what the folder's name says", lineage, generation)
		return
	case f.origin() != "" && f.origin() != origin:
		h.problem(file, nil, "it is of %s: not what the folder's name says", origin)
		return
	}
	key, by := keys.logs[origin], "key"
	if key == nil {
		s := f.statement(lineage)
		if given, ok := keys.stated[origin]; ok && errors.Is(s.err, fs.ErrNotExist) {
			s = given
		}
		switch {
		case keys.trust.Bundle == nil:
			h.problem(file, nil, "none of the keys that are trusted is of %s", origin)
			return
		case errors.Is(s.err, fs.ErrNotExist):
			h.problem(f.file(identityFile), nil, "it is missing: no server vouches for the key of %s", origin)
			return
		case s.err != nil:
			h.problem(f.file(identityFile), nil, "%s", fault.Of(s.err).Message)
			return
		case s.Server != origin:
			h.problem(file, nil, "it is of %s, and the key that is vouched for is of %s", origin, s.Server)
			return
		}
		key, by = s.Log, "host certificate"
	}
	v, err := logkey.Verifier(claims.Origin, key)
	if err != nil {
		h.problem(file, nil, "%v", err)
		return
	}
	if tree.at, _, err = torchwood.VerifyCheckpoint(raw, policy(claims.Origin, v)); err == nil {
		err = canonical(raw)
	}
	if err != nil {
		h.problem(file, nil, "its signature does not hold: %v", err)
		return
	}
	tree.signed = tree.at.N
	// A log that grew while it was copied has a newer one there; one that was rolled
	// back does not have its entries.
	if newer, err := f.read(path.Join(logsFolder, name, cosignedFile), maxNote); err == nil {
		if c, _, err := torchwood.VerifyCheckpoint(newer, policy(claims.Origin, v)); err == nil && c.N > tree.at.N {
			tree.at, raw = c, newer
		}
	}
	vkey, err := logkey.VKey(claims.Origin, key)
	if err != nil {
		h.problem(file, nil, "%v", err)
		return
	}
	h.Origin, h.VouchedBy, h.key, tree.raw = origin, by, key, raw
	tree.Generation = Generation{Number: generation, Size: uint64(tree.at.N), VKey: vkey}
	h.trees = append(h.trees, tree)
}

// problems tells of the proofs that the keeper of a copy has put beside it: two
// checkpoints that cannot both be of one log, under a line that says so.
func (f *folder) problems(l *Log) {
	entries, _ := fs.ReadDir(f.fs, problemsFolder)
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), ".") {
			continue
		}
		name := path.Join(problemsFolder, entry.Name())
		data, err := f.read(name, maxNote)
		if err != nil {
			l.problem(f.file(name), nil, "%v", err)
			continue
		}
		text, _, _ := bytes.Cut(data, []byte("\n"))
		if strings.HasPrefix(entry.Name(), "quota-") {
			l.note("%s: whoever kept this copy says: %s", f.file(name), text)
		} else {
			l.problem(f.file(name), nil, "whoever kept this copy has a proof: %s", text)
		}
	}
}

// policy demands the log's own signature on a checkpoint of its own name.
func policy(tree string, v note.Verifier) torchwood.Policy {
	return torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(tree), torchwood.SingleVerifierPolicy(v))
}

// canonical refuses a note whose signatures are written in another way than the
// only one: bits of base64 that count for nothing.
func canonical(signed []byte) error {
	i := bytes.LastIndex(signed, []byte("\n\n"))
	if i < 0 {
		return errors.New("it has no signature")
	}
	for line := range bytes.Lines(signed[i+2:]) {
		text := line[bytes.LastIndexByte(line, ' ')+1:]
		if _, err := base64.StdEncoding.Strict().DecodeString(string(bytes.TrimSuffix(text, []byte("\n")))); err != nil {
			return fmt.Errorf("it is not written as it has to be: %w", err)
		}
	}
	return nil
}

// name is the folder of a generation.
func (h *held) name(t *heldTree) string { return tiles.Folder(h.Lineage, t.Number) }

// verify checks the trees of a lineage, and how each follows the one before.
func (h *held) verify(ctx context.Context, casts *casts, keys *keyring) error {
	var covered uint64 // events that somebody has countersigned
	for i := range h.trees {
		t := &h.trees[i]
		if i > 0 && t.Number != h.trees[i-1].Number+1 {
			h.problem(h.folder.file(logsFolder, h.name(t)), nil, "generation %d is missing before it", t.Number-1)
		}
		if err := h.entries(ctx, i, casts); err != nil {
			return err
		}
		h.Generations = append(h.Generations, t.Generation)
		h.Events += uint64(t.good)
		if i == 0 {
			h.FirstSeq = t.FirstSeq
		}
		covered = max(covered, h.witnesses(t, keys))
	}
	if n := len(h.trees); n > 0 {
		if end := h.trees[n-1].FirstSeq + h.trees[n-1].Size; end > max(covered, h.FirstSeq) {
			h.Unwitnessed = end - max(covered, h.FirstSeq)
		}
	}
	return nil
}

// entries checks every entry of a generation. What an entry says counts only once
// the tree hash is known to cover it.
func (h *held) entries(ctx context.Context, i int, casts *casts) error {
	t := &h.trees[i]
	var odd *Problem // the first event that is none
	var index int64  // of the event above
	var last time.Time
	var chunks []chunk
	var images []string
	var others []another
	var begin, end time.Time
	back := 0
	err := t.Verify(ctx, t.at.Tree, func(n int64, entry []byte) error {
		if odd != nil {
			return nil
		}
		index = n
		event, err := Decode(entry)
		wrong := ""
		switch {
		case err != nil:
			wrong = err.Error()
		case n == 0:
			t.FirstSeq, begin = event.Seq, event.Time
			wrong = h.seam(i, event)
		case event.Seq != t.FirstSeq+uint64(n):
			wrong = fmt.Sprintf("it says that it is event %d", event.Seq)
		}
		if wrong == "" && event.Origin != h.Origin {
			wrong = fmt.Sprintf("it says that it is of %q", event.Origin)
		}
		if wrong != "" {
			odd = &Problem{Text: wrong}
			return nil
		}
		if event.Time.Before(last) {
			back++
		}
		last, end = event.Time, event.Time
		if event.Kind == audit.Held || event.Kind == audit.Adopted {
			// What is in it is another's word: it cannot make this log a bad one.
			if of, err := Decode([]byte(event.Payload)); err == nil {
				others = append(others, another{event, of})
			}
		}
		if event.Chunk != nil && event.Kind == audit.Recording {
			chunks = append(chunks, chunk{*event.Chunk, n})
		}
		if event.Images != "" {
			images = append(images, event.Images)
		}
		return nil
	})
	t.good = t.at.N
	var damage *tiles.Damage
	switch {
	case errors.As(err, &damage):
		t.good = max(damage.Index, 0)
		if damage.File == checkpointFile {
			t.good = 0
		}
		if damage.Index >= t.signed {
			damage.Reason = fmt.Sprintf("the log was rolled back: witnesses have seen %d entries, and its checkpoint tells of %d", t.at.N, t.signed)
		}
		h.problem(h.folder.file(logsFolder, h.name(t), damage.File), t.seq(damage.Index), "%s", damage.Reason)
	case err != nil:
		return err
	}
	if odd != nil && index < t.good {
		t.good = index
		bundle := torchwood.TilePath(tlog.Tile{H: torchwood.TileHeight, L: -1, N: index / torchwood.TileWidth,
			W: int(min(torchwood.TileWidth, t.at.N-index/torchwood.TileWidth*torchwood.TileWidth))})
		h.problem(h.folder.file(logsFolder, h.name(t), bundle), t.seq(index), "%s", odd.Text)
	}
	if back > 0 {
		h.note("generation %d: the clock went back %d times", t.Number, back)
	}
	if h.Begin.IsZero() {
		h.Begin = begin
	}
	if !end.IsZero() {
		h.End = end
	}
	for _, c := range chunks {
		if c.index < t.good {
			casts.add(h, t, c)
		}
	}
	for _, image := range images {
		casts.images[image] = true
	}
	for _, other := range others {
		if int64(other.Seq-t.FirstSeq) < t.good { // #nosec G115 -- less than the size of the log
			h.others = append(h.others, other)
		}
	}
	return nil
}

// seq returns the number of an entry.
func (t *heldTree) seq(index int64) *uint64 {
	if index < 0 {
		return nil
	}
	seq := t.FirstSeq + uint64(index)
	return &seq
}

// seam says what is wrong with the first event of a generation.
func (h *held) seam(i int, event audit.Event) string {
	t := &h.trees[i]
	if t.Number == 1 {
		if event.Seq != 0 || event.Kind == audit.Seam {
			return fmt.Sprintf("the first event of a log has number %d and kind %s", event.Seq, event.Kind)
		}
		return ""
	}
	if event.Kind != audit.Seam {
		return "a generation begins with a seam, and this is of kind " + string(event.Kind)
	}
	name := logkey.Tree(h.Origin, h.Lineage, t.Number-1)
	v, err := logkey.Verifier(name, h.key)
	if err != nil {
		return err.Error()
	}
	before, _, err := torchwood.VerifyCheckpoint([]byte(event.Previous), policy(name, v))
	if err != nil {
		return fmt.Sprintf("the checkpoint of generation %d in it does not hold: %v", t.Number-1, err)
	}
	if i == 0 || h.trees[i-1].Number != t.Number-1 {
		return "" // it is not here
	}
	p := &h.trees[i-1]
	switch {
	case before.N != p.at.N:
		return fmt.Sprintf("generation %d ended with %d entries, and here it has %d", p.Number, before.N, p.at.N)
	case before.Hash != p.at.Hash:
		return fmt.Sprintf("generation %d ended with other entries than are here", p.Number)
	case event.Seq != p.FirstSeq+p.Size:
		return fmt.Sprintf("generation %d ended with event %d, and this says that it is event %d", p.Number, p.FirstSeq+p.Size-1, event.Seq)
	}
	return ""
}

// witnesses checks the countersigned checkpoint, and returns how many events of
// the lineage it covers that somebody known has countersigned.
func (h *held) witnesses(t *heldTree, keys *keyring) (covered uint64) {
	file := path.Join(logsFolder, h.name(t), cosignedFile)
	// A checkpoint can carry countersignatures itself.
	for _, from := range []string{path.Join(logsFolder, h.name(t), checkpointFile), file} {
		raw, err := h.folder.read(from, maxNote)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			h.problem(h.folder.file(from), nil, "%v", err)
			continue
		}
		own, err := logkey.Verifier(t.at.Origin, h.key)
		if err != nil {
			h.problem(h.folder.file(from), nil, "%v", err)
			continue
		}
		known := note.VerifierList(append([]note.Verifier{own}, keys.witnesses...)...)
		c, _, err := torchwood.VerifyCheckpoint(raw, &with{policy(t.at.Origin, own), known})
		if err == nil {
			err = canonical(raw)
		}
		if err != nil {
			h.problem(h.folder.file(from), nil, "its signature does not hold: %v", err)
			continue
		}
		n, err := note.Open(raw, known)
		if err != nil {
			h.problem(h.folder.file(from), nil, "%v", err)
			continue
		}
		if c.N > 0 && t.good == t.at.N {
			root, err := tlog.TreeHash(c.N, t.HashReader(t.at.Tree))
			if err != nil {
				h.problem(h.folder.file(from), nil, "%v", err)
				continue
			}
			if root != c.Hash {
				h.problem(h.folder.file(from), t.seq(0), "witnesses have seen other entries among the first %d: the log was forked", c.N)
				continue
			}
		}
		if from == file && len(n.Sigs)+len(n.UnverifiedSigs) > 1 {
			t.cosigned = raw
		}
		for i, sig := range slices.Concat(n.Sigs, n.UnverifiedSigs) {
			if sig.Name == t.at.Origin {
				continue
			}
			w := Witnessed{By: strings.TrimPrefix(sig.Name, logkey.WitnessName("")), Known: i < len(n.Sigs), Events: t.FirstSeq + uint64(c.N)}
			if at, err := torchwood.CosignatureTimestamp(sig); err == nil && w.Known {
				w.At = time.Unix(at, 0).UTC()
			}
			if w.Known {
				covered = max(covered, w.Events)
			}
			h.witnessed(w)
		}
	}
	return covered
}

// with verifies more signatures than a policy demands.
type with struct {
	torchwood.Policy
	verifiers note.Verifiers
}

func (w *with) Verifier(name string, hash uint32) (note.Verifier, error) {
	return w.verifiers.Verifier(name, hash)
}

func (h *held) witnessed(w Witnessed) {
	for i, other := range h.Witnessed {
		if other.By == w.By && other.Known == w.Known {
			if w.Events >= other.Events {
				h.Witnessed[i] = w
			}
			return
		}
	}
	h.Witnessed = append(h.Witnessed, w)
}

// compare holds logs of the same name against one another: copies of the same log
// have to agree.
func (e *Evidence) compare() {
	for i, x := range e.held {
		for _, y := range e.held[i+1:] {
			if x.Origin != y.Origin || x.Lineage != y.Lineage {
				continue
			}
			for j := range x.trees {
				for k := range y.trees {
					if x.trees[j].Number == y.trees[k].Number {
						agree(x, &x.trees[j], y, &y.trees[k])
					}
				}
			}
		}
	}
}

// kept holds what bastions keep for others against what those have taken back since.
func (e *Evidence) kept(keys *keyring) {
	adopted := map[string]bool{}
	for _, h := range e.held {
		for _, o := range h.others {
			if o.Kind != audit.Adopted {
				continue
			}
			adopted[h.Origin+" "+o.of.ID] = true
			by := 0
			for server, key := range keys.receipts {
				if slices.ContainsFunc(o.Receipts, func(r string) bool {
					return logkey.VerifyReceipt([]byte(r), server, key, o.of.ID, []byte(o.Payload)) == nil
				}) {
					by++
				}
			}
			if by < 2 {
				h.note("event %d was kept elsewhere before it got here: the receipts of %d of two bastions are known to hold", o.Seq, by)
			}
		}
	}
	for _, h := range e.held {
		missing := map[string]int{}
		for _, o := range h.others {
			if o.Kind == audit.Held && !adopted[o.Target+" "+o.of.ID] {
				missing[o.Target]++
			}
		}
		for _, origin := range slices.Sorted(maps.Keys(missing)) {
			h.note("%s keeps %d events of %s that are not in the log of that one, as far as it is here", h.Origin, missing[origin], origin)
		}
	}
}

func agree(x *held, one *heldTree, y *held, other *heldTree) {
	if one.at.N > other.at.N {
		x, one, y, other = y, other, x, one
	}
	if one.at.N == 0 || other.good < other.at.N {
		return
	}
	root, err := tlog.TreeHash(one.at.N, other.HashReader(other.at.Tree))
	if err == nil && root == one.at.Hash {
		if one.at.N < other.at.N && x.folder.name == x.Origin && y.folder.name != y.Origin {
			x.problem(x.folder.file(logsFolder, x.name(one), checkpointFile), one.seq(one.at.N), "the log was rolled back: %s has %d entries, and here there are %d",
				y.folder.file(logsFolder, y.name(other)), other.at.N, one.at.N)
		}
		return
	}
	text := "it contradicts %s: both are signed, and they differ among the first %d entries: the log was forked"
	x.problem(x.folder.file(logsFolder, x.name(one), checkpointFile), one.seq(0), text, y.folder.file(logsFolder, y.name(other)), one.at.N)
	y.problem(y.folder.file(logsFolder, y.name(other), checkpointFile), one.seq(0), text, x.folder.file(logsFolder, x.name(one)), one.at.N)
}

// casts are the recordings that a folder's logs speak of.
type casts struct {
	bySession map[string][]vouched
	images    map[string]bool
}

type chunk struct {
	audit.Chunk
	index int64
}

// vouched is a piece of a recording with the event that vouches for it.
type vouched struct {
	audit.Chunk
	log *held
	seq uint64
}

func newCasts() *casts { return &casts{bySession: map[string][]vouched{}, images: map[string]bool{}} }

func (c *casts) add(h *held, t *heldTree, piece chunk) {
	c.bySession[piece.Session] = append(c.bySession[piece.Session], vouched{piece.Chunk, h, t.FirstSeq + uint64(piece.index)})
}

// sessionForm is what a recording may be called.
var sessionForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// check compares the files with what the events say of them.
func (c *casts) check(f *folder, logs []*held) {
	for _, session := range slices.Sorted(maps.Keys(c.bySession)) {
		pieces := c.bySession[session]
		log, name := pieces[0].log, path.Join(castsFolder, session+castSuffix)
		if !sessionForm.MatchString(session) {
			log.problem(f.file(castsFolder), &pieces[0].seq, "a recording cannot be called %.140q", session)
			continue
		}
		file, err := openPlain(f.fs, name)
		if errors.Is(err, fs.ErrNotExist) {
			log.Absent++
			continue
		}
		if err != nil {
			log.problem(f.file(name), nil, "%v", err)
			continue
		}
		bad, _, more := compareCast(file, pieces)
		_ = file.Close()
		switch {
		case bad != nil:
			log.problem(f.file(name), &bad.seq, "bytes %d to %d are not what was recorded", bad.Offset, bad.Offset+bad.Length-1)
		case more > 0 && slices.ContainsFunc(pieces, func(p vouched) bool { return p.Last }):
			log.problem(f.file(name), &pieces[len(pieces)-1].seq, "%d bytes follow the end of the recording", more)
		case more > 0:
			log.note("%s: the last %d bytes are not in the log yet", f.file(name), more)
			log.Recordings++
		default:
			log.Recordings++
		}
	}
	entries, _ := fs.ReadDir(f.fs, castsFolder)
	for _, entry := range entries {
		session, is := strings.CutSuffix(entry.Name(), castSuffix)
		if _, known := c.bySession[session]; is && !known {
			logs[len(logs)-1].note("%s: no event speaks of it", f.file(castsFolder, entry.Name()))
		}
	}
	entries, _ = fs.ReadDir(f.fs, sealedFolder)
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), sealedSuffix) {
			continue
		}
		name := path.Join(sealedFolder, entry.Name())
		file, err := openPlain(f.fs, name)
		if err != nil {
			logs[len(logs)-1].problem(f.file(name), nil, "%v", err)
			continue
		}
		sum := sha256.New()
		_, err = io.Copy(sum, io.LimitReader(file, maxSealed))
		_ = file.Close()
		if err != nil || !c.images[hex.EncodeToString(sum.Sum(nil))] {
			logs[len(logs)-1].note("%s: no event speaks of these bytes", f.file(name))
		}
	}
}

// compareCast returns the first piece that is not as it was recorded, how far the
// file is vouched for, and how many bytes follow. Each piece is true by itself: one
// may come again, and that of a recording whose daemon was killed is all of it.
func compareCast(file fs.File, pieces []vouched) (bad *vouched, covered, more int64) {
	st, err := file.Stat()
	at, ok := file.(io.ReaderAt)
	if err != nil || !ok {
		return &pieces[0], 0, 0
	}
	pieces = slices.Clone(pieces)
	slices.SortStableFunc(pieces, func(a, b vouched) int { return cmp.Compare(a.Offset, b.Offset) })
	if pieces[0].log.trees[0].FirstSeq > 0 {
		covered = pieces[0].Offset // what was before may have gone with the log's beginning
	}
	room := 4*st.Size() + 1<<20 // nobody repeats more
	for i, piece := range pieces {
		sum := sha256.New()
		if room -= piece.Length; piece.Offset < 0 || piece.Offset > covered || piece.Length < 0 || room < 0 {
			return &pieces[i], covered, 0
		}
		if n, err := io.Copy(sum, io.NewSectionReader(at, piece.Offset, piece.Length)); err != nil || n != piece.Length || hex.EncodeToString(sum.Sum(nil)) != piece.SHA256 {
			return &pieces[i], covered, 0
		}
		covered = max(covered, piece.Offset+piece.Length)
	}
	return nil, covered, st.Size() - covered
}

// openPlain opens what is a plain file.
func openPlain(f fs.FS, name string) (fs.File, error) {
	st, err := fs.Lstat(f, name)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a plain file", name)
	}
	return f.Open(name)
}

// Decode returns the event that an entry is. It takes nothing that this build's
// version of the schema does not have.
func Decode(entry []byte) (event audit.Event, err error) {
	if len(entry) > audit.MaxEvent {
		return event, fmt.Errorf("an event of %d bytes is too long", len(entry))
	}
	d := json.NewDecoder(bytes.NewReader(entry))
	d.DisallowUnknownFields()
	if err := d.Decode(&event); err != nil {
		var version struct {
			Version int `json:"v"`
		}
		if json.Unmarshal(entry, &version) == nil && version.Version > audit.Version {
			return audit.Event{}, fmt.Errorf("it is of version %d of the schema, which a later release knows", version.Version)
		}
		return audit.Event{}, fmt.Errorf("it is not an event: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return audit.Event{}, errors.New("it is not an event: something follows it")
	}
	if event.Version != audit.Version {
		return audit.Event{}, fmt.Errorf("it is of version %d of the schema, which this release does not know", event.Version)
	}
	return event, nil
}
