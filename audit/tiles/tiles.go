// Package tiles keeps and reads a transparency log as C2SP's tlog-tiles lays it out
// in a folder: a checkpoint, tile/entries/ with the entries and tile/N/ with their
// hashes. audit/mirror writes its copies with it, and audit/evidence reads with it
// what auditors have fetched.
//
// It knows nothing of keys: whoever uses a checkpoint verifies its signatures
// first. It must never give out an entry that the tree hash does not cover, nor
// let anything count that comes before its checkpoint is durable. It stands on
// floor 2.
package tiles

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Bounds of files in bytes (C2SP tlog-tiles): a bundle has at most 256 entries
// with a length of 16 bits each. A checkpoint has a line for each witness.
const (
	maxBundle     = torchwood.TileWidth * (2 + 0xffff)
	maxTile       = torchwood.TileWidth * tlog.HashSize
	maxCheckpoint = 64 << 10
)

// ErrInconsistent is that entries do not lead from the tree that is there to the
// one that a checkpoint tells of: one of the two is not the log that it says.
var ErrInconsistent = errors.New("the checkpoint does not agree with the entries")

// Tree is a log in a folder. Its methods may be called concurrently, but for
// Append, which one caller at a time may use while others read.
type Tree struct {
	fs  fs.FS
	dir string // "" where it cannot be written
}

// Open returns the log in a folder, which Append fills where it is empty.
func Open(dir string) (*Tree, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("%s is not a folder", dir)
	}
	return &Tree{fs: os.DirFS(dir), dir: dir}, nil
}

// Of returns a log that can only be read.
func Of(f fs.FS) *Tree { return &Tree{fs: f} }

// Checkpoint returns the log's checkpoint as it is stored and what it says. Its
// signatures are not verified. The error is fs.ErrNotExist for a log that has
// none yet.
func (t *Tree) Checkpoint() (raw []byte, c torchwood.Checkpoint, err error) {
	if raw, err = t.read("checkpoint", maxCheckpoint); err != nil {
		return nil, c, err
	}
	if c, err = ParseCheckpoint(raw); err != nil {
		return nil, c, err
	}
	return raw, c, nil
}

// ParseCheckpoint returns what a signed checkpoint says, without asking who
// signed it.
func ParseCheckpoint(signed []byte) (torchwood.Checkpoint, error) {
	if len(signed) > maxCheckpoint {
		return torchwood.Checkpoint{}, fmt.Errorf("a checkpoint of %d bytes is too long", len(signed))
	}
	_, err := note.Open(signed, note.VerifierList())
	var unverified *note.UnverifiedNoteError
	if !errors.As(err, &unverified) {
		return torchwood.Checkpoint{}, fmt.Errorf("no checkpoint: %w", err)
	}
	c, err := torchwood.ParseCheckpoint(unverified.Note.Text)
	if err == nil && c.String() != unverified.Note.Text {
		err = errors.New("no checkpoint: it is not written as it has to be")
	}
	return c, err
}

// Entries yields the entries from the one with index from up to, without it, the
// one with index to, each checked against the tree hash of the stored checkpoint.
// It ends with the first error.
func (t *Tree) Entries(ctx context.Context, from, to int64) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		_, c, err := t.Checkpoint()
		if err != nil {
			yield(nil, err)
			return
		}
		for entry, err := range t.EntriesUnder(ctx, c.Tree, from, to) {
			if !yield(entry, err) {
				return
			}
		}
	}
}

// EntriesUnder is Entries under the hash of a tree that the caller trusts.
func (t *Tree) EntriesUnder(ctx context.Context, tree tlog.Tree, from, to int64) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		if from < 0 || to < from || to > tree.N {
			yield(nil, fmt.Errorf("no entries %d to %d in a tree of %d", from, to, tree.N))
			return
		}
		hashes := t.HashReader(tree)
		for n := from / torchwood.TileWidth; n*torchwood.TileWidth < to; n++ {
			if err := ctx.Err(); err != nil {
				yield(nil, err)
				return
			}
			tile := bundleOf(n, tree.N)
			entries, cut := t.bundle(tile)
			indexes := make([]int64, tile.W)
			for i := range indexes {
				indexes[i] = tlog.StoredHashIndex(0, n*torchwood.TileWidth+int64(i))
			}
			want, err := hashes.ReadHashes(indexes)
			if err != nil {
				yield(nil, &Damage{File: torchwood.TilePath(tlog.Tile{H: tile.H, N: n, W: tile.W}), Index: n * torchwood.TileWidth, Reason: "the hashes above it do not lead to the tree hash: " + err.Error()})
				return
			}
			for i, entry := range entries {
				index := n*torchwood.TileWidth + int64(i)
				if index < from || index >= to {
					continue
				}
				if tlog.RecordHash(entry) != want[i] {
					yield(nil, &Damage{File: torchwood.TilePath(tile), Index: index, Reason: "it is not what the tree hash covers"})
					return
				}
				if !yield(entry, nil) {
					return
				}
			}
			if cut != nil {
				yield(nil, cut)
				return
			}
		}
	}
}

// Unverified yields entries of a tree of that size as they lie there, for Append,
// which finds out whether they are what their checkpoint says.
func (t *Tree) Unverified(ctx context.Context, size, from, to int64) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for n := from / torchwood.TileWidth; n*torchwood.TileWidth < to; n++ {
			err := ctx.Err()
			var entries [][]byte
			if err == nil {
				entries, err = t.bundle(bundleOf(n, size))
			}
			for i, entry := range entries {
				if index := n*torchwood.TileWidth + int64(i); index >= from && index < to && !yield(entry, nil) {
					return
				}
			}
			if err != nil {
				yield(nil, err)
				return
			}
		}
	}
}

// HashReader gives hashes of a tree that the caller trusts, for tlog.ProveRecord
// and tlog.ProveTree. What it gives is proven to be in the tree.
func (t *Tree) HashReader(tree tlog.Tree) tlog.HashReader {
	return tlog.TileHashReader(tree, &tileReader{tree: t, kept: map[tlog.Tile][]byte{}})
}

// Damage is what is not as the checkpoint says.
type Damage struct {
	// File is relative to the log's folder, with slashes.
	File string
	// Index is that of the first entry concerned, -1 where it is all of them.
	Index  int64
	Reason string
}

func (d *Damage) Error() string {
	if d.Index < 0 {
		return fmt.Sprintf("%s: %s", d.File, d.Reason)
	}
	return fmt.Sprintf("%s: entry %d: %s", d.File, d.Index, d.Reason)
}

// tileReader reads tiles for a tlog.HashReader, and keeps those on top, which are
// asked for again and again. It is used by one goroutine.
type tileReader struct {
	tree *Tree
	kept map[tlog.Tile][]byte
}

// maxKept bounds the tiles that are kept: 8 KiB each, over 65,536 entries each.
const maxKept = 256

func (r *tileReader) Height() int { return torchwood.TileHeight }

func (r *tileReader) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	data := make([][]byte, len(tiles))
	for i, tile := range tiles {
		if kept, ok := r.kept[tile]; ok {
			data[i] = kept
			continue
		}
		var err error
		if data[i], err = r.tree.tile(tile); err != nil {
			return nil, err
		}
	}
	return data, nil
}

// SaveTiles is told what has been verified.
func (r *tileReader) SaveTiles(tiles []tlog.Tile, data [][]byte) {
	for i, tile := range tiles {
		if tile.L == 0 && tile.W == torchwood.TileWidth {
			continue
		}
		if len(r.kept) >= maxKept {
			clear(r.kept)
		}
		r.kept[tile] = data[i]
	}
}

// bundleOf returns the n-th bundle of a tree of this size.
func bundleOf(n, size int64) tlog.Tile {
	return tlog.Tile{H: torchwood.TileHeight, L: -1, N: n, W: int(min(torchwood.TileWidth, size-n*torchwood.TileWidth))}
}

// tile reads the hashes of a tile.
func (t *Tree) tile(tile tlog.Tile) ([]byte, error) {
	data, name, err := t.widest(tile, maxTile)
	if err != nil {
		return nil, err
	}
	if len(data) < tile.W*tlog.HashSize || len(data)%tlog.HashSize != 0 {
		return nil, fmt.Errorf("%s: has %d bytes, which is not %d hashes", name, len(data), tile.W)
	}
	return data[:tile.W*tlog.HashSize], nil
}

// bundle reads the entries of a bundle. With an error it returns those before.
func (t *Tree) bundle(tile tlog.Tile) ([][]byte, error) {
	first := tile.N * torchwood.TileWidth
	data, name, err := t.widest(tile, maxBundle)
	if err != nil {
		return nil, &Damage{File: name, Index: first, Reason: "its bundle cannot be read: " + err.Error()}
	}
	entries := make([][]byte, 0, tile.W)
	for len(entries) < tile.W {
		entry, rest, err := torchwood.ReadTileEntry(data)
		if err != nil {
			return entries, &Damage{File: name, Index: first + int64(len(entries)), Reason: "it is cut off"}
		}
		entries, data = append(entries, entry), rest
	}
	if len(data) > 0 && name == torchwood.TilePath(tile) {
		return entries, &Damage{File: name, Index: first + int64(len(entries)) - 1, Reason: "something follows it that is no entry"}
	}
	return entries, nil
}

// widest reads a tile or, where it has been replaced by a wider one since, that.
// Where there is none, it is the widest of those that are.
func (t *Tree) widest(tile tlog.Tile, max int64) (data []byte, name string, err error) {
	name = torchwood.TilePath(tile)
	data, err = t.read(name, max)
	if !errors.Is(err, fs.ErrNotExist) {
		return data, name, err
	}
	full := tile
	full.W = torchwood.TileWidth
	whole := torchwood.TilePath(full)
	partial, _ := fs.ReadDir(t.fs, whole+".p")
	widths := []int{}
	for _, e := range partial {
		if w, err := strconv.Atoi(e.Name()); err == nil && w > 0 && w < torchwood.TileWidth {
			widths = append(widths, w)
		}
	}
	slices.Sort(widths)
	names := []string{whole}
	for _, w := range slices.Backward(widths) {
		full.W = w
		names = append(names, torchwood.TilePath(full))
	}
	for _, other := range names {
		if data, err := t.read(other, max); err == nil {
			return data, other, nil
		}
	}
	return nil, name, err
}

// read reads a plain file of at most max bytes.
func (t *Tree) read(name string, max int64) ([]byte, error) {
	st, err := fs.Lstat(t.fs, name)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a plain file", name)
	}
	f, err := t.fs.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > max {
		return nil, fmt.Errorf("%s has more than %d bytes", name, max)
	}
	return data, nil
}

func (t *Tree) path(name string) string { return filepath.Join(t.dir, filepath.FromSlash(name)) }
