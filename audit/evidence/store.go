package evidence

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// maxTaken bounds what one daemon is let send at a time, in bytes. Each piece counts
// for minPart at least: a file of nothing takes room, too.
const (
	maxTaken = 4 << 30
	minPart  = 64 << 10
)

// Store is an auditor's own folder of evidence, one folder for each daemon. It
// takes only what goes on from what it has: what a daemon forgets or rewrites is
// still here. One process at a time has it.
type Store struct {
	dir  string
	lock *os.File
}

// Part is a piece of a file of a daemon's evidence, in order of offset.
type Part struct {
	Path   string
	Offset int64
	Data   []byte
}

// Conflict is that a daemon's log is not the one that it was.
type Conflict struct {
	Folder, Text string
}

func (c *Conflict) Error() string { return c.Folder + ": " + c.Text }

// OpenStore makes the folder, or waits for it until the context ends.
func OpenStore(ctx context.Context, dir string) (*Store, error) {
	if err := durable.Dir(dir); err != nil {
		return nil, fault.New(fault.Failed, "name another folder", "the folder for evidence: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fault.New(fault.Failed, "name another folder", "the folder for evidence: %w", err)
	}
	s := &Store{dir: dir, lock: lock}
	for {
		err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			_ = lock.Close()
			return nil, fault.New(fault.Failed, "name another folder", "the folder for evidence: %w", err)
		}
		if !pause(ctx) {
			_ = lock.Close()
			return nil, fault.New(fault.Failed, "wait for it, or name another folder", "another halligan audit is writing to this folder")
		}
	}
	// What a killed process was taking.
	left, _ := filepath.Glob(filepath.Join(dir, ".taking-*"))
	for _, name := range left {
		_ = os.RemoveAll(name)
	}
	return s, nil
}

// Close lets others have it.
func (s *Store) Close() { _ = s.lock.Close() }

// Dir is its folder.
func (s *Store) Dir() string { return s.dir }

// Apart names the folder for a copy that contradicts the one of the origin, by
// whom it comes from.
func Apart(origin, from string) string { return origin + apart + from }

// valid refuses a name of a folder that could be another's.
func valid(name string) error {
	origin, from, split := strings.Cut(name, apart)
	if !trust.ValidNode(origin) || split && !trust.ValidNode(from) {
		return fault.New(fault.Refused, "", "%.140q is not the name of a daemon", name)
	}
	return nil
}

// Have tells how many entries there are of each generation, by LINEAGE.GENERATION
// as in a log's folder.
func (s *Store) Have(name string) map[string]uint64 {
	have := map[string]uint64{}
	if valid(name) != nil {
		return have
	}
	dir := filepath.Join(s.dir, name)
	f := &folder{fs: os.DirFS(dir)}
	for _, generation := range f.generations() {
		tree, err := tiles.Open(filepath.Join(dir, logsFolder, generation))
		if err != nil {
			continue
		}
		if _, c, err := tree.Checkpoint(); err == nil {
			have[generation] = uint64(c.N)
		}
	}
	return have
}

// Checkpoint returns the stored checkpoint of a generation, nil where there is none.
func (s *Store) Checkpoint(name, lineage string, generation uint64) []byte {
	tree, err := s.tree(name, lineage, generation)
	if err != nil {
		return nil
	}
	raw, _, err := tree.Checkpoint()
	if err != nil {
		return nil
	}
	return raw
}

func (s *Store) tree(name, lineage string, generation uint64) (*tiles.Tree, error) {
	if err := valid(name); err != nil || !logkey.ValidLineage(lineage) {
		return nil, fault.New(fault.Refused, "", "%.140q is not the name of a log", name+"/"+lineage)
	}
	return tiles.Open(filepath.Join(s.dir, name, logsFolder, tiles.Folder(lineage, generation)))
}

// Contradicts says what is wrong with what is here where a checkpoint of the same
// tree, which somebody else has, is taken for true; empty: they agree.
func (s *Store) Contradicts(name, lineage string, generation uint64, checkpoint []byte) string {
	other, err := tiles.ParseCheckpoint(checkpoint)
	if err != nil || other.N == 0 || other.Origin != logkey.Tree(name, lineage, generation) {
		return "" // it says nothing of this log
	}
	tree, err := s.tree(name, lineage, generation)
	if err != nil {
		return ""
	}
	_, own, err := tree.Checkpoint()
	switch {
	case err != nil:
		return ""
	case own.N < other.N:
		return fmt.Sprintf("it has %d entries, and there were %d", own.N, other.N)
	}
	root, err := tlog.TreeHash(other.N, tree.HashReader(own.Tree))
	if err != nil || root != other.Hash {
		return fmt.Sprintf("it has other entries among the first %d", other.N)
	}
	return ""
}

// wanted are the files of a log that are taken; the hashes are computed.
var wanted = regexp.MustCompile(`^(identity(\.[0-9a-f]{8})?|problems/[a-z0-9][a-z0-9.-]{0,120}|logs/[0-9a-f]{8}\.[0-9]{8,12}/(checkpoint|cosigned|tile/entries/.*))$`)

// Take takes the files of a log from where Have told, until parts returns io.EOF.
// Nothing of it counts that is not signed by who the trust vouches for. It returns
// how many entries are new. An error that is a *Conflict says that the log is not
// the one that is here, of which nothing is changed.
func (s *Store) Take(ctx context.Context, name string, t Trust, parts func() (Part, error)) (added uint64, err error) {
	if err := valid(name); err != nil {
		return 0, err
	}
	keys, err := newKeyring(t)
	if err != nil {
		return 0, err
	}
	from, err := os.MkdirTemp(s.dir, ".taking-")
	if err != nil {
		return 0, err
	}
	defer func() { _ = os.RemoveAll(from) }()
	if err := receive(from, parts); err != nil {
		return 0, err
	}
	in := &folder{fs: os.DirFS(from)}
	dir := filepath.Join(s.dir, name)
	if err := durable.Dir(filepath.Join(dir, logsFolder)); err != nil {
		return 0, err
	}
	origin, _, _ := strings.Cut(name, apart)
	k := &keeper{origin: origin, name: name, dir: dir, in: in, keys: keys}
	if err := k.identities(); err != nil {
		return 0, err
	}
	for _, generation := range in.generations() {
		n, err := k.generation(ctx, generation)
		if added += n; err != nil {
			return added, err
		}
	}
	found, _ := fs.ReadDir(in.fs, problemsFolder)
	for _, entry := range found {
		data, err := in.read(path.Join(problemsFolder, entry.Name()), maxNote)
		if err == nil {
			err = k.write(data, problemsFolder, entry.Name())
		}
		if err != nil {
			return added, err
		}
	}
	return added, nil
}

// receive writes what is wanted of the parts into a folder of its own.
func receive(dir string, parts func() (Part, error)) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	sizes, total := map[string]int64{}, int64(0)
	for {
		p, err := parts()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if !wanted.MatchString(p.Path) || !fs.ValidPath(p.Path) {
			continue
		}
		if total += max(int64(len(p.Data)), minPart); total > maxTaken || p.Offset != sizes[p.Path] {
			return fault.New(fault.Failed, "report it: this is a bug, or the daemon is not to be trusted", "%.140q: pieces that do not follow one another, or too many", p.Path)
		}
		sizes[p.Path] += int64(len(p.Data))
		if err := root.MkdirAll(path.Dir(p.Path), 0o700); err != nil {
			return err
		}
		f, err := root.OpenFile(p.Path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		_, err = f.Write(p.Data)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
}

// keeper moves what was received to where it is kept.
type keeper struct {
	origin, name, dir string
	in                *folder
	keys              *keyring
	stated            map[string]stated // that hold, by lineage; "": the newest
}

// stated is a statement that was verified.
type stated struct {
	logkey.Statement
	data []byte
}

// identities verifies the statements.
func (k *keeper) identities() error {
	k.stated = map[string]stated{}
	if k.keys.trust.Bundle == nil {
		return nil
	}
	for _, f := range []*folder{{fs: os.DirFS(k.dir)}, k.in} {
		entries, _ := fs.ReadDir(f.fs, ".")
		for _, entry := range entries {
			lineage, own := strings.CutPrefix(entry.Name(), lineageFile)
			if entry.Name() == identityFile {
				lineage = ""
			} else if !own {
				continue
			}
			data, err := f.read(entry.Name(), logkey.MaxSize)
			if err != nil {
				return err
			}
			s, err := logkey.Verify(data, k.keys.trust.Bundle, k.keys.trust.Now)
			if err == nil && s.Server != k.origin {
				err = fault.New(fault.Unauthenticated, "do not believe what this log says", "%s shows the statement of %s", k.origin, s.Server)
			}
			if err != nil && f == k.in {
				return err
			}
			// What is pinned here stays.
			if was, known := k.stated[lineage]; err == nil && (!known || lineage == "" && !s.Signed.Before(was.Signed)) {
				k.stated[lineage] = stated{s, data}
			}
		}
	}
	if newest, ok := k.stated[""]; ok {
		return k.write(newest.data, identityFile)
	}
	return nil
}

func (k *keeper) write(data []byte, name ...string) error {
	to := filepath.Join(append([]string{k.dir}, name...)...)
	if was, err := os.ReadFile(to); err == nil && bytes.Equal(was, data) {
		return nil
	}
	if err := durable.Dir(filepath.Dir(to)); err != nil {
		return err
	}
	return durable.Write(to, data)
}

// key returns the key of a lineage.
func (k *keeper) key(lineage string) (ed25519.PublicKey, error) {
	if key := k.keys.logs[k.origin]; key != nil {
		return key, nil
	}
	own, ok := k.stated[lineage]
	if !ok {
		own, ok = k.stated[""]
	}
	if !ok {
		return nil, fault.New(fault.Unauthenticated, "do not believe what this log says", "nothing vouches for the key of %s", k.origin)
	}
	k.stated[lineage] = own
	return own.Log, nil
}

// generation takes the entries of one generation.
func (k *keeper) generation(ctx context.Context, name string) (added uint64, err error) {
	lineage, number, _ := strings.Cut(name, ".")
	tree := logkey.Tree(k.origin, lineage, parseNumber(number))
	key, err := k.key(lineage)
	if err != nil {
		return 0, err
	}
	v, err := logkey.Verifier(tree, key)
	if err != nil {
		return 0, err
	}
	raw, err := k.in.read(path.Join(logsFolder, name, checkpointFile), maxNote)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	to, _, err := torchwood.VerifyCheckpoint(raw, policy(tree, v))
	if err != nil {
		return 0, fault.New(fault.Unauthenticated, "do not believe what this log says", "%s: the checkpoint of %s: %w", k.name, name, err)
	}
	dir := filepath.Join(k.dir, logsFolder, name)
	if err := durable.Dir(dir); err != nil {
		return 0, err
	}
	own, err := tiles.Open(dir)
	if err != nil {
		return 0, err
	}
	_, have, err := own.Checkpoint()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	below, err := fs.Sub(k.in.fs, path.Join(logsFolder, name))
	if err != nil {
		return 0, err
	}
	if to.N < have.N {
		return 0, &Conflict{k.name, fmt.Sprintf("%s has %d entries, and had %d: it was rolled back", name, to.N, have.N)}
	}
	var missing error
	if to.N > have.N || to.Hash != have.Hash {
		err = own.Append(ctx, raw, func(yield func([]byte) bool) {
			for entry, err := range tiles.Of(below).Unverified(ctx, to.N, have.N, to.N) {
				if missing = err; err != nil || !yield(entry) {
					return
				}
			}
		})
		switch {
		case missing != nil:
			return 0, fmt.Errorf("%s: %w", name, missing)
		case errors.Is(err, tiles.ErrInconsistent):
			return 0, &Conflict{k.name, fmt.Sprintf("%s: %v: it was forked", name, err)}
		case err != nil:
			return 0, err
		}
	}
	if pin, ok := k.stated[lineage]; ok {
		if err := k.write(pin.data, lineageFile+lineage); err != nil {
			return 0, err
		}
	}
	return uint64(to.N - have.N), k.cosigned(own, to, tree, dir, below)
}

// cosigned takes the countersigned checkpoint where it covers as much as the one
// that is here.
func (k *keeper) cosigned(own *tiles.Tree, at torchwood.Checkpoint, tree, dir string, below fs.FS) error {
	raw, err := (&folder{fs: below}).read(cosignedFile, maxNote)
	if err != nil {
		return nil // there is none
	}
	c, err := tiles.ParseCheckpoint(raw)
	if err != nil || c.Origin != tree || c.N > at.N || c.N == 0 {
		return nil
	}
	if root, err := tlog.TreeHash(c.N, own.HashReader(at.Tree)); err != nil || root != c.Hash {
		return &Conflict{k.name, fmt.Sprintf("witnesses have seen other entries among the first %d: it was forked", c.N)}
	}
	if was, err := os.ReadFile(filepath.Join(dir, cosignedFile)); err == nil {
		if before, err := tiles.ParseCheckpoint(was); err == nil && before.N > c.N {
			return nil
		}
	}
	return k.write(raw, logsFolder, filepath.Base(dir), cosignedFile)
}

// TakeFile takes a recording, or sealed before-images, which Verify compares with
// what the log says of them.
func (s *Store) TakeFile(name, file string, parts func() (Part, error)) error {
	folder, base := path.Split(file)
	if err := valid(name); err != nil {
		return err
	}
	if !slices.Contains([]string{castsFolder + "/", sealedFolder + "/"}, folder) || !sessionForm.MatchString(base) {
		return fault.New(fault.Refused, "", "%.140q is not a file that is kept", file)
	}
	dir := filepath.Join(s.dir, name, strings.TrimSuffix(folder, "/"))
	if err := durable.Dir(dir); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, ".taking-")
	if err != nil {
		return err
	}
	defer func() {
		_ = tmp.Close()
		_ = os.Remove(tmp.Name()) // it is renamed by then, or of no use
	}()
	for at := int64(0); ; {
		p, err := parts()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if p.Offset != at || at+int64(len(p.Data)) > maxTaken {
			return fault.New(fault.Failed, "report it: this is a bug, or the daemon is not to be trusted", "%.140q: pieces that do not follow one another, or too many", p.Path)
		}
		if _, err := tmp.Write(p.Data); err != nil {
			return err
		}
		at += int64(len(p.Data))
	}
	return os.Rename(tmp.Name(), filepath.Join(dir, base))
}

// Folders are the names of what is here.
func (s *Store) Folders() (names []string) {
	entries, _ := os.ReadDir(s.dir)
	for _, entry := range entries {
		if entry.IsDir() && valid(entry.Name()) == nil {
			names = append(names, entry.Name())
		}
	}
	return names
}

// parseNumber reads the number of a generation in the name of its folder.
func parseNumber(text string) (n uint64) {
	for _, digit := range text {
		n = n*10 + uint64(digit-'0')
	}
	return n
}

// pause waits a moment for a lock, and reports whether there is still time.
func pause(ctx context.Context) bool {
	select {
	case <-time.After(50 * time.Millisecond):
		return true
	case <-ctx.Done():
		return false
	}
}

// New yields the events of an origin that are new since the numbers in seen, by
// origin and lineage with a space between, which it moves on. What Take stored was
// verified by it: signed, and a continuation of what was there.
func (s *Store) New(ctx context.Context, origin string, seen map[string]uint64) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		if err := valid(origin); err != nil {
			yield(Entry{}, err)
			return
		}
		f := &folder{fs: os.DirFS(filepath.Join(s.dir, origin))}
		for _, name := range f.generations() {
			lineage, number, _ := strings.Cut(name, ".")
			log := &Log{Folder: origin, Origin: origin, Lineage: lineage}
			tree, err := tiles.Open(filepath.Join(s.dir, origin, logsFolder, name))
			if err != nil {
				yield(Entry{}, err)
				return
			}
			_, c, err := tree.Checkpoint()
			if errors.Is(err, fs.ErrNotExist) || err == nil && c.N == 0 {
				continue
			}
			var first uint64
			for raw, err := range tree.EntriesUnder(ctx, c.Tree, 0, 1) {
				var event audit.Event
				if err == nil {
					event, err = Decode(raw)
				}
				if first = event.Seq; err != nil {
					yield(Entry{}, err)
					return
				}
			}
			key := origin + " " + lineage
			index := from(seen[key], first, c.N)
			for raw, err := range tree.EntriesUnder(ctx, c.Tree, index, c.N) {
				e := Entry{Raw: raw, Log: log, Generation: parseNumber(number), Index: index}
				if err == nil {
					e.Event, err = Decode(raw)
				}
				if err == nil && (e.Seq != first+uint64(index) || e.Origin != origin) {
					err = fmt.Errorf("%s: event %d says that it is %d of %.140q", name, first+uint64(index), e.Seq, e.Origin)
				}
				if !yield(e, err) || err != nil {
					return
				}
				index++
				seen[key] = first + uint64(index)
			}
		}
	}
}
