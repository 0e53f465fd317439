package mirror

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/time/rate"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

const (
	// maxCheckpoint bounds a signed checkpoint in bytes; one has some 300, and as
	// many again for every two witnesses.
	maxCheckpoint = 16 << 10
	// maxLineages bounds how often a log may begin anew, maxGeneration the number
	// of a generation: eight digits.
	maxLineages   = 16
	maxGeneration = 99_999_999
	// overhead is what an entry takes beside its bytes: hashes and lengths; of a
	// generation, what its folders and small files take.
	overhead, folders = 48, 64 << 10
	// pinned is the file with the statement of a lineage's key, followed by the
	// lineage; newest is that of the log as a whole. current names the lineage
	// that is written.
	newest, pinned, current         = "identity", "identity.", "lineage"
	cosignedFile, sealedDir, proofs = "cosigned", "sealed", "problems"
)

// Copy is what a bastion has of one log. Its methods may be called concurrently,
// but for Identify and Head, which one stream at a time may use.
type Copy struct {
	m           *Mirrors
	origin, dir string
	holds       *rate.Limiter

	work sync.Mutex // held by Identify, Head and what else writes

	mu sync.Mutex // guards all below
	// statement is the newest of the server; keys has those of the lineages.
	statement []byte
	keys      map[string]logkey.Statement
	lineage   string // that is written
	trees     []*generation
	bytes     int64
	// live: there is a stream. behind: a head has come whose entries have not all.
	// complete is when there was neither, last.
	live, behind bool
	complete     time.Time
	trouble      string // of reaching it
	damaged      error  // why the copy cannot be used

	found    sync.Mutex         // guards problems; taken last
	problems map[string]problem // by the name of the proof
}

// generation is one tree.
type generation struct {
	lineage  string
	number   uint64
	dir      string
	tree     *tiles.Tree
	raw      []byte // signed checkpoint
	head     torchwood.Checkpoint
	first    uint64 // seq of entry 0
	cosigned []byte
	// leftover are bytes on disk beyond its head.
	leftover int64
}

func (g *generation) name() string { return tiles.Folder(g.lineage, g.number) }

// open reads a copy from its folder.
func (m *Mirrors) open(origin string) (*Copy, error) {
	c := &Copy{m: m, origin: origin, dir: filepath.Join(m.o.Dir, origin), keys: map[string]logkey.Statement{}, holds: rate.NewLimiter(holdPace, holdBurst)}
	for _, folder := range []string{"logs", sealedDir, proofs} {
		if err := durable.Dir(filepath.Join(c.dir, folder)); err != nil {
			return nil, err
		}
	}
	var err error
	if c.problems, err = c.loadProblems(); err != nil {
		return nil, err
	}
	if err := c.loadLogs(filepath.Join(c.dir, "logs")); err != nil {
		c.damaged = fmt.Errorf("the copy here is damaged: %w; move its folder away, and it is fetched anew", err)
		m.raise(origin, c.damaged.Error())
	}
	c.bytes = size(c.dir)
	return c, nil
}

// loadLogs reads the generations.
func (c *Copy) loadLogs(logs string) error {
	c.statement, _ = os.ReadFile(filepath.Join(c.dir, newest)) // it is brought again
	lineage, _ := os.ReadFile(filepath.Join(c.dir, current))   // as above
	c.lineage = string(lineage)
	entries, err := os.ReadDir(logs)
	if err != nil {
		return err
	}
	for _, e := range entries {
		lineage, number, ok := tiles.ParseFolder(e.Name())
		if !e.IsDir() || !ok {
			continue
		}
		g := &generation{lineage: lineage, number: number, dir: filepath.Join(logs, e.Name())}
		if err := c.load(g); err != nil {
			if errors.Is(err, fs.ErrNotExist) { // begun, and no checkpoint came to be
				continue
			}
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
		c.trees = append(c.trees, g)
	}
	c.sort()
	return nil
}

// load reads a generation. What is stored was verified before; that it still is
// what was signed is seen here, and that it is whole when it grows.
func (c *Copy) load(g *generation) (err error) {
	if g.tree, err = tiles.Open(g.dir); err != nil {
		return err
	}
	if g.raw, g.head, err = g.tree.Checkpoint(); err != nil {
		return err
	}
	if g.head.Origin != logkey.Tree(c.origin, g.lineage, g.number) {
		return fmt.Errorf("its checkpoint is that of %q", neutral.LineMax(g.head.Origin, 160))
	}
	if _, known := c.keys[g.lineage]; !known {
		data, err := os.ReadFile(filepath.Join(c.dir, pinned+g.lineage))
		if err != nil {
			return fmt.Errorf("whose log it is: %w", err)
		}
		// Verified by the bundle of its time; revoked since or not, it is whom the
		// copy was taken from.
		s, err := logkey.Parse(data)
		if err != nil {
			return err
		}
		c.keys[g.lineage] = s
	}
	if _, err := c.verify(g.lineage, g.number, g.raw); err != nil {
		return err
	}
	for entry, err := range g.tree.Entries(context.Background(), 0, min(1, g.head.N)) {
		if err != nil {
			return err
		}
		e, err := decode(entry)
		if err != nil {
			return err
		}
		g.first = e.Seq
	}
	// One of before counts for nothing here: it was stored, and then not signed.
	if data, err := os.ReadFile(filepath.Join(g.dir, cosignedFile)); err == nil {
		if of, err := tiles.ParseCheckpoint(data); err == nil && of.Tree == g.head.Tree {
			g.cosigned = data
		}
	}
	return nil
}

func (c *Copy) sort() {
	slices.SortFunc(c.trees, func(a, b *generation) int {
		return cmp.Or(cmp.Compare(a.lineage, b.lineage), cmp.Compare(a.number, b.number))
	})
}

// decode reads what the copy needs of an event.
func decode(entry []byte) (e audit.Event, err error) {
	if len(entry) > audit.MaxEvent {
		return e, fmt.Errorf("an entry of %d bytes", len(entry))
	}
	if err := json.Unmarshal(entry, &e); err != nil {
		return e, fmt.Errorf("an entry that is no event: %w", err)
	}
	return e, nil
}

// verify returns a checkpoint of this log by the pinned key, with no signatures but
// those that were verified.
func (c *Copy) verify(lineage string, number uint64, signed []byte) (*note.Note, error) {
	tree := logkey.Tree(c.origin, lineage, number)
	v, err := logkey.Verifier(tree, c.keys[lineage].Log)
	if err != nil {
		return nil, err
	}
	_, n, err := torchwood.VerifyCheckpoint(signed, torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(tree), torchwood.SingleVerifierPolicy(v)))
	return n, err
}

// Have tells what is here, for the log's keeper to go on from.
func (c *Copy) Have() (list []*halliganv1.LogHave) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, g := range c.trees {
		list = append(list, &halliganv1.LogHave{Lineage: g.lineage, Generation: g.number, Size: uint64(g.head.N)})
	}
	return list
}

// Identity returns the newest statement of the server, nil before there is one.
func (c *Copy) Identity() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.statement
}

// Identify takes the statement of the server, which must hold by the bundle.
func (c *Copy) Identify(statement []byte) error {
	c.work.Lock()
	defer c.work.Unlock()
	s, err := c.believe(statement)
	if err != nil || bytes.Equal(statement, c.Identity()) {
		return err
	}
	if was, err := c.believe(c.Identity()); err == nil && s.Signed.Before(was.Signed) {
		return nil // an older one, which is true still
	}
	if err := durable.Write(filepath.Join(c.dir, newest), statement); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.statement = statement
	return nil
}

func (c *Copy) believe(statement []byte) (logkey.Statement, error) {
	b := c.m.o.Bundle()
	if b == nil {
		return logkey.Statement{}, fault.New(fault.Refused, "copy the bundle there", "this bastion has no bundle that it can use")
	}
	s, err := logkey.Verify(statement, b, c.m.o.Now())
	if err == nil && s.Server != c.origin {
		err = fault.New(fault.Unauthenticated, "do not believe what this log says", "%s shows the statement of %s", c.origin, s.Server)
	}
	return s, err
}

// Problem is that a log is not what its daemon has signed before. It stays until
// somebody removes its proof.
type Problem struct{ Origin, Text string }

func (p *Problem) Error() string { return "the log of " + p.Origin + ": " + p.Text }

// Head takes a signed checkpoint and the entries that are new in it, from the size
// that Have told, and returns the checkpoint countersigned, for the log's keeper.
// An error that is a *Problem says that the log is not what it was: nothing of it
// was stored or signed.
func (c *Copy) Head(ctx context.Context, h *halliganv1.WitnessHead, entries iter.Seq2[[]byte, error]) (signed []byte, err error) {
	c.work.Lock()
	defer c.work.Unlock()
	c.mu.Lock()
	c.behind = true
	damaged := c.damaged
	c.mu.Unlock()
	if damaged != nil {
		return nil, damaged
	}
	g, err := c.begin(h)
	if err != nil {
		return nil, err
	}
	n, err := c.signed(g, h.GetCheckpoint())
	if err != nil {
		return nil, err
	}
	to, err := torchwood.ParseCheckpoint(n.Text)
	if err != nil {
		return nil, err
	}
	if err := c.compare(g, to, h.GetCheckpoint()); err != nil {
		return nil, err
	}
	switch {
	case to.N == 0 || to.N == g.head.N && g.cosigned != nil:
		c.reached()
		return g.cosigned, nil
	case to.N > g.head.N:
		if err := c.extend(ctx, g, to, h.GetCheckpoint(), entries); err != nil {
			return nil, err
		}
	}
	if err := c.begins(g); err != nil {
		return nil, err
	}
	if signed, err = c.countersign(g, n); err == nil {
		c.reached()
		c.m.tell()
	}
	return signed, err
}

// begin returns the generation that a head is of, which may be a new one.
func (c *Copy) begin(h *halliganv1.WitnessHead) (*generation, error) {
	lineage, number := h.GetLineage(), h.GetGeneration()
	if !logkey.ValidLineage(lineage) || number == 0 || number > maxGeneration || len(h.GetCheckpoint()) > maxCheckpoint {
		return nil, fault.New(fault.Refused, "", "a malformed head of a log")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := slices.IndexFunc(c.trees, func(g *generation) bool { return g.lineage == lineage && g.number == number }); i >= 0 {
		return c.trees[i], nil
	}
	g := &generation{lineage: lineage, number: number}
	g.dir = filepath.Join(c.dir, "logs", g.name())
	return g, nil
}

// signed verifies who signed a head: the key that the lineage has had from its
// beginning, or, of a new lineage, that of the server's statement.
func (c *Copy) signed(g *generation, checkpoint []byte) (*note.Note, error) {
	c.mu.Lock()
	key, known := c.keys[g.lineage]
	lineages := len(c.keys)
	c.mu.Unlock()
	stated, err := c.believe(c.Identity())
	if err != nil {
		return nil, err
	}
	if !known {
		if lineages >= maxLineages {
			return nil, c.problem("quota", g, fmt.Sprintf("it has begun anew %d times; no more of it is stored", lineages-1), nil, checkpoint)
		}
		return c.adopt(g, stated, checkpoint)
	}
	n, err := c.verify(g.lineage, g.number, checkpoint)
	if err != nil {
		if !stated.Log.Equal(key.Log) {
			return nil, c.problem("key", g, "it goes on under another key than it began with", g.raw, checkpoint)
		}
		return nil, fault.New(fault.Unauthenticated, "do not believe what this log says", "the log of %s: its checkpoint is not signed by its key: %w", c.origin, err)
	}
	return n, nil
}

// adopt pins the key of a new lineage.
func (c *Copy) adopt(g *generation, stated logkey.Statement, checkpoint []byte) (*note.Note, error) {
	c.mu.Lock()
	statement := c.statement
	c.keys[g.lineage] = stated
	c.mu.Unlock()
	n, err := c.verify(g.lineage, g.number, checkpoint)
	if err == nil {
		err = durable.Write(filepath.Join(c.dir, pinned+g.lineage), statement)
	}
	if err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.keys, g.lineage)
	}
	return n, err
}

// begins makes a lineage the one that is written, once something of it is stored.
// Where there was another, it is countersigned all the same, since what happens from
// here on is as precious; that it began anew stands until somebody has looked at it.
func (c *Copy) begins(g *generation) error {
	c.mu.Lock()
	was := c.lineage
	before := c.last(was)
	c.mu.Unlock()
	if was == g.lineage {
		return nil
	}
	if was != "" {
		_ = c.problem("anew", g, fmt.Sprintf("it began anew as %s; what it held as %s is kept here", g.lineage, was), before, g.raw)
	}
	if err := durable.Write(filepath.Join(c.dir, current), []byte(g.lineage)); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lineage = g.lineage
	return nil
}

// last returns the newest checkpoint of a lineage. c.mu is held.
func (c *Copy) last(lineage string) (raw []byte) {
	for _, g := range c.trees {
		if g.lineage == lineage {
			raw = g.raw
		}
	}
	return raw
}

// compare finds what was rolled back or has forked.
func (c *Copy) compare(g *generation, to torchwood.Checkpoint, checkpoint []byte) error {
	if g.raw == nil {
		return nil
	}
	switch {
	case to.N < g.head.N:
		return c.problem("rollback", g, fmt.Sprintf("it was cut: it has %d entries, and its daemon has signed %d before", to.N, g.head.N), g.raw, checkpoint)
	case to.N == g.head.N && to.Hash != g.head.Hash:
		return c.problem("fork", g, fmt.Sprintf("it has forked: its daemon has signed two different logs of %d entries", to.N), g.raw, checkpoint)
	case to.N > g.head.N && c.follower(g) != nil:
		return c.problem("fork", g, fmt.Sprintf("it has forked: a generation that was closed at %d entries goes on", g.head.N), g.raw, checkpoint)
	}
	return nil
}

// follower returns the generation after g, if it is here.
func (c *Copy) follower(g *generation) *generation { return c.find(g.lineage, g.number+1) }

func (c *Copy) find(lineage string, number uint64) *generation {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, other := range c.trees {
		if other.lineage == lineage && other.number == number {
			return other
		}
	}
	return nil
}

// extend stores the entries up to a head.
func (c *Copy) extend(ctx context.Context, g *generation, to torchwood.Checkpoint, checkpoint []byte, entries iter.Seq2[[]byte, error]) error {
	room, err := c.room(g, (to.N-g.head.N)*overhead)
	if err != nil {
		return err
	}
	if err := durable.Dir(g.dir); err != nil {
		return err
	}
	tree := g.tree
	if tree == nil {
		if tree, err = tiles.Open(g.dir); err != nil {
			return err
		}
	}
	first, added, index := g.first, int64(0), g.head.N
	var failed error
	accepted := func(yield func([]byte) bool) {
		for entry, err := range entries {
			if err == nil && len(entry) > audit.MaxEvent {
				err = fault.New(fault.Refused, "", "the log of %s: entry %d has %d bytes", c.origin, index, len(entry))
			}
			if err == nil && index == 0 {
				first, err = c.opening(g, entry, checkpoint)
			}
			added += int64(len(entry)) + overhead
			if err == nil && added > room {
				err = c.full(g)
			}
			if err != nil {
				failed = err
				return
			}
			if index++; !yield(entry) || index == to.N {
				return
			}
		}
	}
	err = tree.Append(ctx, checkpoint, accepted)
	if err != nil {
		c.discard(g, added)
	}
	switch {
	case failed != nil:
		return failed
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, tiles.ErrInconsistent) && index < to.N:
		return fault.New(fault.Refused, "", "the log of %s ends at entry %d of the %d that its checkpoint covers", c.origin, index, to.N)
	case errors.Is(err, tiles.ErrInconsistent) && g.raw != nil:
		return c.problem("fork", g, fmt.Sprintf("it has forked: what it says now does not follow from the %d entries that its daemon has signed before", g.head.N), g.raw, checkpoint)
	case err != nil:
		// The checkpoint may be there although something after it failed.
		if raw, _, again := tree.Checkpoint(); again != nil || !bytes.Equal(raw, checkpoint) {
			return fmt.Errorf("storing the log of %s: %w", c.origin, err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if g.raw == nil {
		c.trees = append(c.trees, g)
		c.sort()
		added += folders
	}
	g.tree, g.raw, g.head, g.first, g.cosigned = tree, checkpoint, to, first, nil
	c.bytes += max(0, added-g.leftover)
	g.leftover = max(0, g.leftover-added)
	return nil
}

// discard sees to what was written of entries that count for nothing: of a generation
// that has no others it goes. Else it takes room until others take its place.
func (c *Copy) discard(g *generation, added int64) {
	if _, err := os.Lstat(filepath.Join(g.dir, "checkpoint")); errors.Is(err, fs.ErrNotExist) && os.RemoveAll(g.dir) == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bytes += max(0, added-g.leftover)
	g.leftover = max(g.leftover, added)
}

// opening checks the first entry of a generation: that it follows from the one
// before. It returns its sequence number.
func (c *Copy) opening(g *generation, entry, checkpoint []byte) (uint64, error) {
	e, err := decode(entry)
	if err != nil || e.Origin != c.origin {
		return 0, fault.New(fault.Refused, "", "the log of %s: its first entry is not one of its events", c.origin)
	}
	before := c.find(g.lineage, g.number-1)
	if g.number == 1 {
		if e.Seq != 0 {
			return 0, c.problem("gap", g, fmt.Sprintf("its first generation begins with event %d", e.Seq), nil, checkpoint)
		}
		return 0, nil
	}
	if e.Kind != audit.Seam {
		return 0, c.problem("seam", g, "a generation does not begin with the checkpoint of the one before", nil, checkpoint)
	}
	n, err := c.verify(g.lineage, g.number-1, []byte(e.Previous))
	if err != nil {
		return 0, c.problem("seam", g, "the checkpoint that a generation begins with is not by the log's key", nil, checkpoint)
	}
	was, err := torchwood.ParseCheckpoint(n.Text)
	if err != nil {
		return 0, err
	}
	if before == nil {
		if c.begun(g.lineage) {
			_ = c.problem("gap", g, fmt.Sprintf("generation %d was never here: whatever it held, nobody here has seen it", g.number-1), nil, checkpoint)
		}
		return e.Seq, nil
	}
	switch {
	case was.N < before.head.N:
		return 0, c.problem("rollback", g, fmt.Sprintf("it was cut: it was closed at %d entries, and its daemon has signed %d before", was.N, before.head.N), before.raw, []byte(e.Previous))
	case was.N == before.head.N && (was.Hash != before.head.Hash || e.Seq != before.first+uint64(was.N)):
		return 0, c.problem("fork", g, fmt.Sprintf("it has forked: two different logs of %d entries were closed", was.N), before.raw, []byte(e.Previous))
	case was.N > before.head.N:
		_ = c.problem("gap", g, fmt.Sprintf("entries %d to %d of generation %d were never here: whatever they held, nobody here has seen it", before.head.N, was.N-1, before.number), before.raw, []byte(e.Previous))
	}
	return e.Seq, nil
}

// begun reports whether anything of a lineage is here.
func (c *Copy) begun(lineage string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last(lineage) != nil
}

// countersign signs what is durable here, and keeps that.
func (c *Copy) countersign(g *generation, n *note.Note) ([]byte, error) {
	signed, err := note.Sign(&note.Note{Text: n.Text, Sigs: n.Sigs}, c.m.signer)
	if err != nil {
		return nil, err
	}
	if err := durable.Write(filepath.Join(g.dir, cosignedFile), signed); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	g.cosigned = signed
	return signed, nil
}

// room returns how many bytes may still be added, of which at least so many are
// needed. What is over the quota goes a whole generation at a time, the oldest
// first, if it has been here for long enough.
func (c *Copy) room(g *generation, needed int64) (int64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	needed -= g.leftover // which is replaced
	for c.bytes+needed > c.m.o.Quota*9/10 {
		i := c.oldest(g)
		if i < 0 {
			break
		}
		old := c.trees[i]
		taken := size(old.dir)
		if err := os.RemoveAll(old.dir); err != nil {
			return 0, err
		}
		c.m.o.Log.Info().Str("log", c.origin).Str("generation", old.name()).Msg("an old generation of a copy made room")
		c.trees = slices.Delete(c.trees, i, i+1)
		c.bytes -= taken
	}
	if left := c.m.o.Quota - c.bytes; left >= needed {
		return left + g.leftover, nil
	}
	return 0, c.full(g)
}

// oldest returns the generation that may go first, -1 for none: never the one that
// grows, nor the last of the lineage that is written. c.mu is held.
func (c *Copy) oldest(grows *generation) int {
	found, at := -1, c.m.o.Now().Add(-Retention)
	for i, g := range c.trees {
		last := i+1 == len(c.trees) || c.trees[i+1].lineage != g.lineage
		if g == grows || last && g.lineage == c.lineage {
			continue
		}
		if st, err := os.Stat(filepath.Join(g.dir, "checkpoint")); err == nil && st.ModTime().Before(at) {
			found, at = i, st.ModTime()
		}
	}
	return found
}

// full is why no more is stored.
func (c *Copy) full(g *generation) error {
	return c.problem("quota", g, fmt.Sprintf("its copy has reached %d MiB within %d days: no more of it is stored", c.m.o.Quota>>20, int(Retention.Hours()/24)), nil, nil)
}

// size returns what the files in a folder take.
func size(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error { // what is gone takes nothing
		if err != nil {
			return nil
		}
		if st, err := d.Info(); err == nil && st.Mode().IsRegular() {
			n += st.Size()
		}
		return nil
	})
	return n
}
