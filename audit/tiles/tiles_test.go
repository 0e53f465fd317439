package tiles_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/torchwood"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/halligan-io/halligan/audit/tiles"
)

const origin = "example.org/log/1"

// source makes checkpoints of a log that it knows all of: an oracle, since it
// computes its hashes with x/mod alone.
type source struct {
	t       *testing.T
	signer  note.Signer
	vkey    string
	entries [][]byte
	hashes  []tlog.Hash
}

func newSource(t *testing.T) *source {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, origin)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	return &source{t: t, signer: signer, vkey: vkey}
}

func (s *source) read(indexes []int64) ([]tlog.Hash, error) {
	var got []tlog.Hash
	for _, i := range indexes {
		got = append(got, s.hashes[i])
	}
	return got, nil
}

func (s *source) grow(to int) {
	for n := len(s.entries); n < to; n++ {
		entry := fmt.Appendf(nil, "entry %d %s", n, strings.Repeat("x", n%7))
		h, err := tlog.StoredHashes(int64(n), entry, tlog.HashReaderFunc(s.read))
		if err != nil {
			s.t.Fatal(err)
		}
		s.entries, s.hashes = append(s.entries, entry), append(s.hashes, h...)
	}
}

func (s *source) checkpoint(n int) []byte {
	s.t.Helper()
	s.grow(n)
	h, err := tlog.TreeHash(int64(n), tlog.HashReaderFunc(s.read))
	if err != nil {
		s.t.Fatal(err)
	}
	return s.sign(torchwood.Checkpoint{Origin: origin, Tree: tlog.Tree{N: int64(n), Hash: h}})
}

func (s *source) sign(c torchwood.Checkpoint) []byte {
	s.t.Helper()
	signed, err := note.Sign(&note.Note{Text: c.String()}, s.signer)
	if err != nil {
		s.t.Fatal(err)
	}
	return signed
}

// to appends what is missing up to n.
func (s *source) to(tree *tiles.Tree, n int) {
	s.t.Helper()
	checkpoint, from := s.checkpoint(n), int64(0)
	if _, c, err := tree.Checkpoint(); err == nil {
		from = c.N
	}
	if err := tree.Append(s.t.Context(), checkpoint, slices.Values(s.entries[from:n])); err != nil {
		s.t.Fatalf("to %d: %v", n, err)
	}
}

func open(t *testing.T) (*tiles.Tree, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "log")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	tree, err := tiles.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return tree, dir
}

// outsiders verify the log with tessera's fsck and with torchwood's client.
func (s *source) outsiders(dir string) error {
	verifier, err := note.NewVerifier(s.vkey)
	if err != nil {
		s.t.Fatal(err)
	}
	hasher := func(bundle []byte) ([][]byte, error) {
		var b api.EntryBundle
		if err := b.UnmarshalText(bundle); err != nil {
			return nil, err
		}
		var hashes [][]byte
		for _, e := range b.Entries {
			h := tlog.RecordHash(e)
			hashes = append(hashes, h[:])
		}
		return hashes, nil
	}
	if err := fsck.New(origin, verifier, client.FileFetcher{Root: dir}, hasher, fsck.Opts{}).Check(s.t.Context()); err != nil {
		return fmt.Errorf("fsck: %w", err)
	}
	f, err := torchwood.NewTileFS(os.DirFS(dir))
	if err != nil {
		s.t.Fatal(err)
	}
	raw, err := f.ReadEndpoint(s.t.Context(), "checkpoint")
	if err != nil {
		return err
	}
	c, _, err := torchwood.VerifyCheckpoint(raw, torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(origin), torchwood.SingleVerifierPolicy(verifier)))
	if err != nil {
		return fmt.Errorf("torchwood: %w", err)
	}
	reader, err := torchwood.NewClient(f)
	if err != nil {
		s.t.Fatal(err)
	}
	n := int64(0)
	for range reader.AllEntries(s.t.Context(), c.Tree, 0) {
		n++
	}
	if err := reader.Err(); err != nil || n != c.N {
		return fmt.Errorf("torchwood: %d entries of %d: %w", n, c.N, err)
	}
	return nil
}

func TestAppendGrowsWhatOutsidersVerify(t *testing.T) {
	s := newSource(t)
	tree, dir := open(t)
	if _, _, err := tree.Checkpoint(); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("an empty log has a checkpoint: %v", err)
	}
	for _, n := range []int{0, 1, 2, 2, 255, 256, 257, 511, 513, 800, 1024, 1025} {
		s.to(tree, n)
		if n > 0 {
			if err := s.outsiders(dir); err != nil {
				t.Fatalf("at %d: %v", n, err)
			}
		}
		_, c, err := tree.Checkpoint()
		if err != nil || c.N != int64(n) {
			t.Fatalf("at %d: %v %v", n, c, err)
		}
		seen := 0
		if err := tree.Verify(t.Context(), c.Tree, func(i int64, entry []byte) error {
			if int(i) != seen || !bytes.Equal(entry, s.entries[i]) {
				t.Fatalf("entry %d is %q", i, entry)
			}
			seen++
			return nil
		}); err != nil || seen != n {
			t.Fatalf("at %d: %d seen: %v", n, seen, err)
		}
	}
	files := 0
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files++
		}
		return err
	}); err != nil || files != 1+5+5+1 {
		t.Errorf("%d files, want no replaced ones among them: %v", files, err)
	}
}

func TestEntriesUnderAnEarlierTree(t *testing.T) {
	s := newSource(t)
	tree, _ := open(t)
	s.to(tree, 700)
	for _, size := range []int{1, 200, 256, 300, 600, 699, 700} {
		early, err := tiles.ParseCheckpoint(s.checkpoint(size))
		if err != nil {
			t.Fatal(err)
		}
		for _, from := range []int{0, 1, 255, 256, 500} {
			if from > size {
				continue
			}
			i := from
			for entry, err := range tree.EntriesUnder(t.Context(), early.Tree, int64(from), int64(size)) {
				if err != nil {
					t.Fatalf("%d of %d: %v", i, size, err)
				}
				if !bytes.Equal(entry, s.entries[i]) {
					t.Fatalf("%d of %d: %q", i, size, entry)
				}
				i++
			}
			if i != size {
				t.Fatalf("from %d: %d of %d", from, i, size)
			}
		}
		proof, err := tlog.ProveRecord(early.N, 0, tree.HashReader(early.Tree))
		if err != nil {
			t.Fatal(err)
		}
		if err := tlog.CheckRecord(proof, early.N, early.Hash, 0, tlog.RecordHash(s.entries[0])); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAppendRefusesWhatDoesNotFollow(t *testing.T) {
	s, other := newSource(t), newSource(t)
	tree, dir := open(t)
	s.to(tree, 300)
	before, _, err := tree.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	s.grow(310)
	forked := slices.Clone(s.entries)
	forked[305] = []byte("another")
	named, err := tiles.ParseCheckpoint(s.checkpoint(305))
	if err != nil {
		t.Fatal(err)
	}
	named.Origin = "example.org/log/2"
	wrong := named
	wrong.Origin, wrong.Hash = origin, tlog.Hash{1}
	for name, try := range map[string]struct {
		checkpoint []byte
		entries    [][]byte
	}{
		"a smaller tree":   {s.checkpoint(299), nil},
		"too few entries":  {s.checkpoint(310), s.entries[300:309]},
		"too many entries": {s.checkpoint(309), s.entries[300:310]},
		"other entries":    {s.checkpoint(310), forked[300:]},
		"another origin":   {other.sign(named), s.entries[300:305]},
		"another hash":     {s.sign(wrong), s.entries[300:305]},
		"no entries":       {s.checkpoint(310), nil},
		"same size, other": {s.sign(torchwood.Checkpoint{Origin: origin, Tree: tlog.Tree{N: 300, Hash: tlog.Hash{2}}}), nil},
	} {
		if err := tree.Append(t.Context(), try.checkpoint, slices.Values(try.entries)); !errors.Is(err, tiles.ErrInconsistent) {
			t.Errorf("%s: %v", name, err)
		}
		if after, _, err := tree.Checkpoint(); err != nil || !bytes.Equal(after, before) {
			t.Errorf("%s: the checkpoint is another: %v", name, err)
		}
		if err := s.outsiders(dir); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := tree.Append(t.Context(), []byte("nothing"), slices.Values([][]byte{})); err == nil {
		t.Error("what is no checkpoint was taken")
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := tree.Append(cancelled, s.checkpoint(310), slices.Values(s.entries[300:310])); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	s.to(tree, 310) // and it goes on
	if err := s.outsiders(dir); err != nil {
		t.Error(err)
	}
}

// TestEveryByte flips each byte of a log, one at a time: Verify says where.
func TestEveryByte(t *testing.T) {
	s := newSource(t)
	tree, dir := open(t)
	const size = 9
	s.to(tree, size)
	_, c, err := tree.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	where := map[string]func(offset int) int64{
		"tile/entries/000.p/9": func(offset int) int64 {
			for i, e := range s.entries {
				if offset -= 2 + len(e); offset < 0 {
					return int64(i)
				}
			}
			return size
		},
		"tile/0/000.p/9": func(offset int) int64 { return int64(offset / tlog.HashSize) },
	}
	for name, index := range where {
		path := filepath.Join(dir, filepath.FromSlash(name))
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for offset := range data {
			flipped := slices.Clone(data)
			flipped[offset] ^= 1
			if err := os.WriteFile(path, flipped, 0o600); err != nil {
				t.Fatal(err)
			}
			err := tree.Verify(t.Context(), c.Tree, func(int64, []byte) error { return nil })
			var damage *tiles.Damage
			if !errors.As(err, &damage) || damage.File != name || damage.Index != index(offset) {
				t.Fatalf("%s, byte %d, entry %d: %v", name, offset, index(offset), err)
			}
			if offset%20 == 0 && s.outsiders(dir) == nil {
				t.Fatalf("%s, byte %d: outsiders find nothing", name, offset)
			}
		}
		for _, cut := range []int{0, 1, len(data) / 2, len(data) - 1} {
			if err := os.WriteFile(path, data[:cut], 0o600); err != nil {
				t.Fatal(err)
			}
			var damage *tiles.Damage
			if err := tree.Verify(t.Context(), c.Tree, func(int64, []byte) error { return nil }); !errors.As(err, &damage) || damage.File != name {
				t.Fatalf("%s cut to %d: %v", name, cut, err)
			}
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDamageInALargerLog looks where there are several levels of tiles.
func TestDamageInALargerLog(t *testing.T) {
	s := newSource(t)
	tree, dir := open(t)
	s.to(tree, 1000)
	_, c, err := tree.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		offset int
		index  int64
	}{
		{"tile/entries/001", 3, 256},
		{"tile/entries/003.p/232", 3, 768},
		{"tile/0/002", 40, 513},
		{"tile/1/000.p/3", 33, 256},
	} {
		path := filepath.Join(dir, filepath.FromSlash(tt.name))
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		flipped := slices.Clone(data)
		flipped[tt.offset] ^= 0x80
		if err := os.WriteFile(path, flipped, 0o600); err != nil {
			t.Fatal(err)
		}
		var damage *tiles.Damage
		if err := tree.Verify(t.Context(), c.Tree, func(int64, []byte) error { return nil }); !errors.As(err, &damage) || damage.File != tt.name || damage.Index != tt.index {
			t.Errorf("%s: %v", tt.name, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := tree.Verify(t.Context(), c.Tree, func(int64, []byte) error { return nil }); !errors.As(err, &damage) || damage.File != tt.name {
			t.Errorf("%s removed: %v", tt.name, err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	forked := c.Tree
	forked.Hash[0] ^= 1
	var damage *tiles.Damage
	if err := tree.Verify(t.Context(), forked, func(int64, []byte) error { return nil }); !errors.As(err, &damage) || damage.File != "checkpoint" || damage.Index != -1 {
		t.Errorf("another tree: %v", err)
	}
}

func TestOddFilesAreRefused(t *testing.T) {
	s := newSource(t)
	tree, dir := open(t)
	s.to(tree, 3)
	_, c, err := tree.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	bundle := filepath.Join(dir, "tile", "entries", "000.p", "3")
	if err := os.Remove(bundle); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/zero", bundle); err != nil {
		t.Fatal(err)
	}
	if err := tree.Verify(t.Context(), c.Tree, func(int64, []byte) error { return nil }); err == nil {
		t.Error("a link was read")
	}
	if err := os.WriteFile(filepath.Join(dir, "checkpoint"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := tree.Checkpoint(); err == nil {
		t.Error("a checkpoint of 1 MiB was taken")
	}
}

func FuzzParseCheckpoint(f *testing.F) {
	f.Add([]byte("example.org/log/1\n1\n" + strings.Repeat("A", 43) + "=\n\n— example.org/log/1 AAAAAAAA\n"))
	f.Add([]byte(""))
	f.Add([]byte("\n0\n0000000000000000000000000000000000000000001=\n\n— 0 00000000\n")) // bits of base64 that count for nothing
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := tiles.ParseCheckpoint(data)
		if err == nil && !bytes.HasPrefix(data, []byte(c.String())) {
			t.Errorf("%q is not %q", data, c)
		}
	})
}
