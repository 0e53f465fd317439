package tiles

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/halligan-io/halligan/internal/durable"
)

// Append makes the log the one that the checkpoint tells of, with the entries that
// are new in it, and no others. It computes the tree hash itself, from what is
// there and the entries: where the checkpoint's differs, is of another log or of
// a smaller tree, the error is ErrInconsistent, and the log stays as it was. It
// returns when all of it is durable. The signatures are the caller's to verify.
func (t *Tree) Append(ctx context.Context, checkpoint []byte, entries iter.Seq[[]byte]) error {
	if t.dir == "" {
		return errors.New("this log can only be read")
	}
	to, err := ParseCheckpoint(checkpoint)
	if err != nil {
		return err
	}
	e, from, err := t.edge()
	if err != nil {
		return err
	}
	if from.Origin != "" && from.Origin != to.Origin {
		return fmt.Errorf("%w: one is of %q, the other of %q", ErrInconsistent, from.Origin, to.Origin)
	}
	if to.N < from.N {
		return fmt.Errorf("%w: there are %d entries, and it tells of %d", ErrInconsistent, from.N, to.N)
	}
	w := &writer{tree: t, synced: map[string]bool{}}
	if e.bundle, err = t.open(ctx, from.Tree); err != nil {
		return err
	}
	for entry := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if e.n == to.N {
			return fmt.Errorf("%w: there are more entries than the %d that it tells of", ErrInconsistent, to.N)
		}
		if err := e.add(entry, w.write); err != nil {
			return err
		}
	}
	if e.n < to.N {
		return fmt.Errorf("%w: the entries end at %d of %d", ErrInconsistent, e.n, to.N)
	}
	if root, err := e.root(); err != nil {
		return err
	} else if root != to.Hash {
		return fmt.Errorf("%w: %d of them have the hash %s, and it says %s", ErrInconsistent, e.n, root, to.Hash)
	}
	if e.n > from.N {
		if err := e.partial(w.write); err != nil {
			return err
		}
	}
	if err := durable.Write(t.path("checkpoint"), checkpoint); err != nil {
		return err
	}
	return t.tidy(from.N, to.N)
}

// edge returns the right edge of the stored tree, checked against its checkpoint.
func (t *Tree) edge() (*edge, torchwood.Checkpoint, error) {
	e := &edge{}
	_, c, err := t.Checkpoint()
	if errors.Is(err, fs.ErrNotExist) {
		return e, c, nil
	}
	if err != nil {
		return nil, c, err
	}
	for level := 0; c.N>>(torchwood.TileHeight*level) > 0; level++ {
		n := c.N >> (torchwood.TileHeight * level)
		var data []byte
		if w := int(n % torchwood.TileWidth); w > 0 {
			if data, err = t.tile(tlog.Tile{H: torchwood.TileHeight, L: level, N: n / torchwood.TileWidth, W: w}); err != nil {
				return nil, c, err
			}
		}
		e.levels = append(e.levels, data)
	}
	e.n = c.N
	if root, err := e.root(); err != nil {
		return nil, c, err
	} else if root != c.Hash {
		return nil, c, &Damage{File: "tile", Index: -1, Reason: "the tiles do not lead to the checkpoint's hash"}
	}
	return e, c, nil
}

// open returns the unfinished bundle of the tree.
func (t *Tree) open(ctx context.Context, tree tlog.Tree) (data []byte, err error) {
	for entry, err := range t.EntriesUnder(ctx, tree, tree.N/torchwood.TileWidth*torchwood.TileWidth, tree.N) {
		if err != nil {
			return nil, err
		}
		if data, err = torchwood.AppendTileEntry(data, entry); err != nil {
			return nil, err
		}
	}
	return data, nil
}

// tidy removes the narrower tiles that a grown tree has replaced. What a crash
// leaves is removed with the next ones.
func (t *Tree) tidy(from, to int64) error {
	for level := -1; level < 0 || from>>(torchwood.TileHeight*level) > 0; level++ {
		shift := torchwood.TileHeight * max(level, 0)
		before, after := from>>shift, to>>shift
		if before == after || before%torchwood.TileWidth == 0 {
			continue
		}
		tile := tlog.Tile{H: torchwood.TileHeight, L: level, N: before / torchwood.TileWidth, W: int(before % torchwood.TileWidth)}
		folder := filepath.Dir(t.path(torchwood.TilePath(tile)))
		if after/torchwood.TileWidth > tile.N {
			if err := os.RemoveAll(folder); err != nil {
				return err
			}
			continue
		}
		files, err := os.ReadDir(folder)
		if err != nil {
			return err
		}
		tile.W = int(after % torchwood.TileWidth)
		for _, f := range files {
			if f.Name() != filepath.Base(torchwood.TilePath(tile)) {
				if err := os.Remove(filepath.Join(folder, f.Name())); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// writer writes tiles durably.
type writer struct {
	tree   *Tree
	synced map[string]bool // folders that are there
}

func (w *writer) write(tile tlog.Tile, data []byte) error {
	name := w.tree.path(torchwood.TilePath(tile))
	if folder := filepath.Dir(name); !w.synced[folder] {
		if err := durable.Dir(folder); err != nil {
			return err
		}
		w.synced[folder] = true
	}
	return durable.Write(name, data)
}

// edge is the right edge of a tree: of each level the hashes of the tile that is
// not full yet, and the bundle that is not.
type edge struct {
	n      int64
	levels [][]byte
	bundle []byte
}

// add adds an entry, and gives away each tile that is full with it.
func (e *edge) add(entry []byte, full func(tlog.Tile, []byte) error) (err error) {
	if e.bundle, err = torchwood.AppendTileEntry(e.bundle, entry); err != nil {
		return err
	}
	h := tlog.RecordHash(entry)
	e.n++
	if e.n%torchwood.TileWidth == 0 {
		if err := full(tlog.Tile{H: torchwood.TileHeight, L: -1, N: e.n/torchwood.TileWidth - 1, W: torchwood.TileWidth}, e.bundle); err != nil {
			return err
		}
		e.bundle = nil
	}
	for level := 0; ; level++ {
		if level == len(e.levels) {
			e.levels = append(e.levels, nil)
		}
		data := append(e.levels[level], h[:]...)
		e.levels[level] = data
		if len(data) < maxTile {
			return nil
		}
		tile := tlog.Tile{H: torchwood.TileHeight, L: level, N: e.n>>(torchwood.TileHeight*(level+1)) - 1, W: torchwood.TileWidth}
		if err := full(tile, data); err != nil {
			return err
		}
		if h, err = over(tile, data); err != nil {
			return err
		}
		e.levels[level] = nil
	}
}

// over returns the hash over a full tile.
func over(tile tlog.Tile, data []byte) (tlog.Hash, error) {
	half := torchwood.TileHeight*(tile.L+1) - 1
	left, err := tlog.HashFromTile(tile, data, tlog.StoredHashIndex(half, 2*tile.N))
	if err != nil {
		return left, err
	}
	right, err := tlog.HashFromTile(tile, data, tlog.StoredHashIndex(half, 2*tile.N+1))
	return tlog.NodeHash(left, right), err
}

// partial gives away the tiles that are not full.
func (e *edge) partial(give func(tlog.Tile, []byte) error) error {
	if w := e.n % torchwood.TileWidth; w > 0 {
		if err := give(bundleOf(e.n/torchwood.TileWidth, e.n), e.bundle); err != nil {
			return err
		}
	}
	for level, data := range e.levels {
		if len(data) == 0 {
			continue
		}
		n := e.n >> (torchwood.TileHeight * (level + 1))
		if err := give(tlog.Tile{H: torchwood.TileHeight, L: level, N: n, W: len(data) / tlog.HashSize}, data); err != nil {
			return err
		}
	}
	return nil
}

// root returns the tree hash.
func (e *edge) root() (tlog.Hash, error) {
	return tlog.TreeHash(e.n, tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		hashes := make([]tlog.Hash, len(indexes))
		for i, index := range indexes {
			tile := tlog.TileForIndex(torchwood.TileHeight, index)
			if tile.L >= len(e.levels) {
				return nil, fmt.Errorf("no level %d", tile.L)
			}
			var err error
			if hashes[i], err = tlog.HashFromTile(tile, e.levels[tile.L], index); err != nil {
				return nil, err
			}
		}
		return hashes, nil
	}))
}
