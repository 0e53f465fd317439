package ledger

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"filippo.io/torchwood"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/durable"
)

// generation is one tree of the log, in a folder of its own.
type generation struct {
	dir             string
	lineage, origin string
	number          uint64
	// first is the sequence number of entry 0; size is how many entries the tree
	// has, and signed how many its checkpoint covers.
	first, size, signed uint64
	checkpoint          []byte
	// cosigned is the newest checkpoint that a witness signed too, and witnessed
	// what it covers.
	cosigned  []byte
	witnessed uint64
	bytes     int64
	// grown is what was added since bytes was counted.
	grown int64
	// stale says that size and signed may be more than was seen.
	stale bool
	// tail is the last entry as it was read, and last its time.
	tail []byte
	last time.Time
}

const (
	logs         = "logs"
	cosignedFile = "cosigned"
	// checkpointEvery is the most between two looks of the driver whether there is
	// something to sign.
	checkpointEvery = 100 * time.Millisecond
)

// publishing is how long a new checkpoint may take, which comes with the entries or
// at the driver's next look. It is less in tests that make the driver fail.
var publishing = 3 * time.Second

// readGenerations lists what lies in a folder, by lineage and number.
func readGenerations(dir string) ([]*generation, error) {
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []*generation
	for _, n := range names {
		if lineage, number, ok := tiles.ParseFolder(n.Name()); ok && n.IsDir() {
			all = append(all, &generation{dir: filepath.Join(dir, n.Name()), lineage: lineage, number: number})
		}
	}
	return all, nil
}

// read fills in what the folder says, and checks that the tree hangs together: the
// right edge of what is in it leads to its root.
func (g *generation) read(ctx context.Context, v note.Verifier) error {
	size, root, err := g.state()
	if err != nil {
		return err
	}
	g.size = size
	if err := g.readCheckpoint(v); err != nil {
		return err
	}
	if g.signed > g.size {
		return &damage{fmt.Sprintf("generation %d was signed with %d entries and has %d", g.number, g.signed, g.size)}
	}
	if g.size == 0 {
		return nil
	}
	t, err := tiles.Open(g.dir)
	if err != nil {
		return err
	}
	tree := tlog.Tree{N: int64(g.size), Hash: root}
	for _, index := range []int64{0, tree.N - 1} {
		for entry, err := range t.EntriesUnder(ctx, tree, index, index+1) {
			if err != nil {
				if errno := syscall.Errno(0); errors.As(err, &errno) && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				return &damage{fmt.Sprintf("generation %d is damaged: %v", g.number, err)}
			}
			var e struct {
				Seq  uint64
				Time time.Time
			}
			if err := json.Unmarshal(entry, &e); err != nil || index > 0 && e.Seq != g.first+uint64(index) {
				return &damage{fmt.Sprintf("generation %d is damaged: entry %d is not the event of its place", g.number, index)}
			}
			if index == 0 {
				g.first = e.Seq
			}
			g.tail, g.last = entry, e.Time
		}
	}
	g.measure()
	return nil
}

// state returns what has been integrated.
func (g *generation) state() (size uint64, root tlog.Hash, err error) {
	data, err := os.ReadFile(filepath.Join(g.dir, ".state", "treeState"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, root, nil
	}
	if err != nil {
		return 0, root, err
	}
	var s struct {
		Size uint64 `json:"size"`
		Root []byte `json:"root"`
	}
	if err := json.Unmarshal(data, &s); err != nil || len(s.Root) != len(root) {
		return 0, root, &damage{fmt.Sprintf("the state of generation %d is damaged", g.number)}
	}
	return s.Size, tlog.Hash(s.Root), nil
}

// readCheckpoint reads both checkpoints, which the log's own key must have signed.
func (g *generation) readCheckpoint(v note.Verifier) error {
	data, err := os.ReadFile(filepath.Join(g.dir, layout.CheckpointPath))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	c, _, err := torchwood.VerifyCheckpoint(data, torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(v.Name()), torchwood.SingleVerifierPolicy(v)))
	if err != nil {
		return &damage{fmt.Sprintf("the checkpoint of generation %d is not one that this log's key signed: %v", g.number, err)}
	}
	g.checkpoint, g.signed = data, uint64(c.N)
	return nil
}

// measure counts what the generation takes on disk.
func (g *generation) measure() {
	g.bytes, g.grown = 0, 0
	_ = filepath.WalkDir(g.dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if info, err := d.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				g.bytes += st.Blocks * 512
			}
		}
		return nil
	})
}

// tidy removes partial tiles that no checkpoint needs any more that somebody may be
// reading by: the newest one, the one before it and the countersigned one.
func (g *generation) tidy(sizes ...uint64) {
	keep := map[string]bool{}
	for _, size := range append(sizes, g.size, g.signed, g.witnessed) {
		for level := uint64(0); size>>(8*level) > 0; level++ {
			index := size >> (8 * (level + 1))
			p := layout.PartialTileSize(level, index, size)
			if p == 0 {
				continue
			}
			keep[filepath.Join(g.dir, layout.TilePath(level, index, p))] = true
			if level == 0 {
				keep[filepath.Join(g.dir, layout.EntriesPath(index, p))] = true
			}
		}
	}
	_ = filepath.WalkDir(filepath.Join(g.dir, "tile"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() || !strings.HasSuffix(path, ".p") {
			return nil
		}
		names, err := os.ReadDir(path)
		if err != nil {
			return fs.SkipDir
		}
		left := 0
		for _, n := range names {
			if file := filepath.Join(path, n.Name()); keep[file] || os.Remove(file) != nil {
				left++
			}
		}
		if left == 0 {
			_ = os.Remove(path)
		}
		return fs.SkipDir
	})
}

// signer signs the checkpoints of one opening of a tree. The driver's goroutines
// may outlive it by a moment: nothing is signed then, and never fewer entries than
// before.
type signer struct {
	note.Verifier
	key   ed25519.PrivateKey
	steps func(string)

	mu      sync.Mutex // guards all below
	retired bool
	signed  uint64
}

func (s *signer) Sign(msg []byte) ([]byte, error) {
	c, err := torchwood.ParseCheckpoint(string(msg))
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired || uint64(c.N) < s.signed {
		return nil, errors.New("the tree has been closed")
	}
	s.signed = uint64(c.N)
	s.steps("checkpoint sign")
	return ed25519.Sign(s.key, msg), nil
}

func (s *signer) retire() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retired = true
	return s.signed
}

// extend adds entries to the tree and waits for the checkpoint that covers them.
// With none it only waits. It leaves in size and signed how far it got.
//
// The driver is opened for this alone: at rest it has no goroutines that look for
// work, and coming back after a crash is what always happens. It collects as many
// entries as there are and no more, since its timer could change their order.
func (g *generation) extend(ctx context.Context, key ed25519.PrivateKey, v note.Verifier, entries [][]byte, steps func(string)) (err error) {
	steps("tree add")
	if err := g.ready(); err != nil {
		return err
	}
	before := g.signed
	defer func() {
		if p := recover(); p != nil { // the driver's, where it cannot lock its files
			err = fmt.Errorf("opening the tree: %v", p)
		}
	}()
	s := &signer{Verifier: v, key: key, steps: steps, signed: g.signed}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	driver, err := posix.New(ctx, posix.Config{Path: g.dir})
	if err != nil {
		return err
	}
	opts := tessera.NewAppendOptions().WithCheckpointSigner(s).WithCheckpointInterval(checkpointEvery).WithCheckpointRepublishInterval(0).
		WithGarbageCollectionInterval(0).WithBatching(uint(max(1, len(entries))), time.Hour)
	appender, _, reader, err := tessera.NewAppender(ctx, driver, opts)
	if err != nil {
		return err
	}
	defer func() {
		// A checkpoint that was signed is written before anybody else may be.
		last := s.retire()
		for range 1000 {
			if data, readErr := reader.ReadCheckpoint(ctx); readErr != nil || g.covers(data) >= last {
				break
			}
			time.Sleep(2 * time.Millisecond)
		}
		err = errors.Join(err, g.reread(v))
		if g.signed > before {
			g.tidyAfter(before)
		}
	}()
	if at, err := reader.IntegratedSize(ctx); err != nil || at != g.size {
		return &damage{fmt.Sprintf("generation %d has %d entries where %d were: something else writes to it", g.number, at, g.size)}
	}
	futures := make([]tessera.IndexFuture, len(entries))
	for i, entry := range entries {
		futures[i] = appender.Add(ctx, tessera.NewEntry(entry))
		g.grown += int64(len(entry))
	}
	for i, f := range futures {
		at, err := f()
		if err != nil {
			return err
		}
		if at.Index != g.size+uint64(i) {
			return &damage{fmt.Sprintf("generation %d took event %d as its entry %d", g.number, g.first+g.size+uint64(i), at.Index)}
		}
	}
	steps("tree added")
	want := g.size + uint64(len(entries))
	for wait, end := time.Millisecond, time.Now().Add(publishing); ; wait = min(2*wait, 20*time.Millisecond) {
		data, err := reader.ReadCheckpoint(ctx)
		if err == nil && g.covers(data) >= want {
			steps("checkpoint written")
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("no checkpoint of %d entries was written in %v", want, publishing)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// ready makes sure that the driver will not fall over: it panics, in a goroutine of
// its own, where it cannot open its lock, be it that the file system is read-only
// or that there are no file descriptors left. And it writes no checkpoint while the
// last one is from the future, or younger than its interval.
func (g *generation) ready() error {
	if err := os.MkdirAll(filepath.Join(g.dir, ".state"), 0o755); err != nil {
		return err
	}
	var open []*os.File
	defer func() {
		for _, f := range open {
			f.Close()
		}
	}()
	for range 8 {
		f, err := os.OpenFile(filepath.Join(g.dir, ".state", "treeState.lock"), os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			return err
		}
		open = append(open, f)
	}
	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(filepath.Join(g.dir, layout.CheckpointPath), past, past); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// covers returns how many entries a checkpoint is over; it is one of this log's.
func (g *generation) covers(checkpoint []byte) uint64 {
	c, err := tiles.ParseCheckpoint(checkpoint)
	if err != nil {
		return 0
	}
	return uint64(c.N)
}

// reread finds out how far the tree is. Until it succeeds the generation is stale.
func (g *generation) reread(v note.Verifier) error {
	g.stale = true
	size, _, err := g.state()
	if err != nil {
		return err
	}
	g.size = size
	if err := g.readCheckpoint(v); err != nil {
		return err
	}
	g.stale = false
	return nil
}

// tidyEvery is after how many bytes on disk partial tiles are removed: the driver
// writes a bundle anew with each entry, so of up to 256 times its length.
const tidyEvery = 1 << 20

func (g *generation) tidyAfter(before uint64) {
	index, p := g.size/layout.EntryBundleWidth, layout.PartialTileSize(0, g.size/layout.EntryBundleWidth, g.size)
	if st, err := os.Stat(filepath.Join(g.dir, layout.EntriesPath(index, p))); err == nil {
		g.grown += st.Size()
	}
	if g.grown < tidyEvery {
		return
	}
	g.tidy(before)
	g.measure()
}

// cosign stores a checkpoint with signatures of witnesses: the greatest, and of one
// size all signatures. It returns whether it is new.
func (g *generation) cosign(checkpoint []byte, v note.Verifier, steps func(string)) (size uint64, err error) {
	n, err := note.Open(checkpoint, note.VerifierList(v))
	if err != nil {
		return 0, fmt.Errorf("no checkpoint of this log: %w", err)
	}
	c, err := torchwood.ParseCheckpoint(n.Text)
	if err != nil || c.Origin != v.Name() {
		return 0, fmt.Errorf("no checkpoint of this log: %q", v.Name())
	}
	size = uint64(c.N)
	if size > g.signed {
		return 0, fmt.Errorf("a checkpoint of %d entries, and the log has signed %d", size, g.signed)
	}
	if size < g.witnessed {
		return size, nil
	}
	if g.cosigned != nil && size == g.witnessed {
		old, err := note.Open(g.cosigned, note.VerifierList(v))
		if err == nil && old.Text == n.Text {
			for _, sig := range old.UnverifiedSigs {
				if !slices.ContainsFunc(n.UnverifiedSigs, func(s note.Signature) bool { return s.Name == sig.Name && s.Hash == sig.Hash }) {
					n.UnverifiedSigs = append(n.UnverifiedSigs, sig)
				}
			}
		}
	}
	data, err := note.Sign(n)
	if err != nil {
		return 0, err
	}
	if len(data) > maxCosigned {
		return 0, errors.New("too many signatures")
	}
	steps("cosigned write")
	if err := durable.Write(filepath.Join(g.dir, cosignedFile), data); err != nil {
		return 0, err
	}
	g.cosigned, g.witnessed = data, size
	return size, nil
}

// maxCosigned bounds a countersigned checkpoint, which has to fit into a Seam.
const maxCosigned = 16 << 10

// readCosigned returns the names of the witnesses that signed.
func (g *generation) readCosigned(v note.Verifier) ([]string, error) {
	data, err := os.ReadFile(filepath.Join(g.dir, cosignedFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	n, err := note.Open(data, note.VerifierList(v))
	if err != nil {
		return nil, &damage{fmt.Sprintf("the countersigned checkpoint of generation %d is damaged: %v", g.number, err)}
	}
	c, err := torchwood.ParseCheckpoint(n.Text)
	if err != nil || uint64(c.N) > g.size {
		return nil, &damage{fmt.Sprintf("generation %d has %d entries, and a witness has signed more", g.number, g.size)}
	}
	g.cosigned, g.witnessed = data, uint64(c.N)
	var names []string
	for _, sig := range n.UnverifiedSigs {
		names = append(names, sig.Name)
	}
	return names, nil
}

// seam fills in the last checkpoint of the generation before.
func seam(event []byte, before *generation) ([]byte, error) {
	var e audit.Event
	if err := json.Unmarshal(event, &e); err != nil {
		return nil, err
	}
	e.Previous = string(before.checkpoint)
	if before.witnessed == before.signed && before.cosigned != nil {
		e.Previous = string(before.cosigned)
	}
	return encode(e)
}
