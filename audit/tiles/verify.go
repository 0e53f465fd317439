package tiles

import (
	"bytes"
	"context"
	"errors"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"
)

// Verify computes the tree hash from nothing but the entries, compares it with the
// one that the caller trusts, and then every tile with what the entries make of
// it. It tells each of the entries, in order, before it is known whether the tree
// hash covers it: what is made of them counts when Verify returns nil, or up to
// the Index of a *Damage. An error of each ends it.
func (t *Tree) Verify(ctx context.Context, tree tlog.Tree, each func(index int64, entry []byte) error) error {
	var worst *Damage // the first tile that is wrong
	compare := func(tile tlog.Tile, data []byte) error {
		if tile.L < 0 || worst != nil {
			return nil
		}
		index := tile.N << (torchwood.TileHeight * (tile.L + 1))
		switch stored, err := t.tile(tile); {
		case err != nil:
			worst = &Damage{File: torchwood.TilePath(tile), Index: index, Reason: "the hashes above it cannot be read: " + err.Error()}
		case !bytes.Equal(stored, data):
			for bytes.Equal(stored[:tlog.HashSize], data[:tlog.HashSize]) {
				stored, data = stored[tlog.HashSize:], data[tlog.HashSize:]
				index += 1 << (torchwood.TileHeight * tile.L)
			}
			worst = &Damage{File: torchwood.TilePath(tile), Index: index, Reason: "the hash above it is not its own"}
		}
		return nil
	}
	e := &edge{}
	for n := int64(0); n*torchwood.TileWidth < tree.N; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		entries, err := t.bundle(bundleOf(n, tree.N))
		for i, entry := range entries {
			if err := each(n*torchwood.TileWidth+int64(i), entry); err != nil {
				return err
			}
			if err := e.add(entry, compare); err != nil {
				return err
			}
		}
		if err != nil {
			if found := t.locate(ctx, tree, n+1); found != nil {
				return found
			}
			return err
		}
	}
	root, err := e.root()
	if err != nil {
		return err
	}
	if root != tree.Hash {
		if found := t.locate(ctx, tree, (tree.N+torchwood.TileWidth-1)/torchwood.TileWidth); found != nil {
			return found
		}
		return &Damage{File: "checkpoint", Index: -1, Reason: "the entries that are here are not those that it tells of"}
	}
	if err := e.partial(compare); err != nil {
		return err
	}
	if worst != nil {
		return worst
	}
	return nil
}

// locate finds the first entry of the first bundles that the tree hash does not
// cover, as far as there are tiles that it does cover. It returns nil where there
// is nothing to compare with.
func (t *Tree) locate(ctx context.Context, tree tlog.Tree, bundles int64) error {
	if _, err := t.HashReader(tree).ReadHashes(nil); err != nil {
		return nil
	}
	for _, err := range t.EntriesUnder(ctx, tree, 0, min(bundles*torchwood.TileWidth, tree.N)) {
		var damage *Damage
		if errors.As(err, &damage) {
			return damage
		}
		if err != nil {
			return nil
		}
	}
	return nil
}
