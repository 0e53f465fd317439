package ledger

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/transparency-dev/tessera/api/layout"
	"golang.org/x/mod/sumdb/note"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// The files of a log beside the folder of its generations.
const (
	keyFile     = "key"
	hashKeyFile = "hash-key"
	spoolFile   = "spool"
	// removed begins the name of a generation that is being removed: a part of one
	// must never be taken for it.
	removed = ".removed-"
)

func (l *Ledger) path(name string) string { return filepath.Join(l.o.Dir, name) }

// load reads what is in the folder. What comes out of it is what the log goes on
// from; nothing is changed but what is missing in a new log. What can be read is
// known afterwards, even where nothing can be recorded.
func (l *Ledger) load() error {
	l.trees.Lock()
	defer l.trees.Unlock()
	if l.key == nil { // kept over a disk that takes none
		_, key, _ := ed25519.GenerateKey(nil)
		hashKey := make([]byte, 32)
		_, _ = rand.Read(hashKey)
		l.mu.Lock()
		l.key, l.hashKey = key, hashKey
		l.mu.Unlock()
	}
	for _, dir := range []string{l.o.Dir, l.path(logs)} {
		if err := durable.Dir(dir); err != nil {
			return err
		}
	}
	_, err := os.Lstat(l.path(spoolFile))
	begun := err == nil
	if err := l.loadKeys(begun); err != nil {
		return err
	}
	var s *spool
	if begun {
		s, err = openSpool(l.path(spoolFile), l.o.Steps)
	} else {
		s, err = l.begin()
	}
	if err != nil {
		if _, _, failed := l.survey(lineageOf(l.path(spoolFile))); failed != nil {
			err = fmt.Errorf("%w; %w", err, failed)
		}
		return err
	}
	if err := l.resume(s); err != nil {
		_ = s.f.Close() // or another one's that took its place
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refused, l.problem, l.damaged = "", "", false
	l.broadcast()
	return nil
}

// loadKeys reads the keys. They are made where there is no log yet; one that lost
// its key cannot go on.
func (l *Ledger) loadKeys(begun bool) error {
	for _, k := range []struct {
		name string
		read func([]byte) error
		data func() ([]byte, error)
	}{
		{keyFile, func(data []byte) error {
			block, _ := pem.Decode(data)
			if block == nil {
				return &damage{"the log's key is damaged"}
			}
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			private, ok := key.(ed25519.PrivateKey)
			if err != nil || !ok {
				return &damage{"the log's key is damaged"}
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			l.key = private
			return nil
		}, func() ([]byte, error) {
			der, err := x509.MarshalPKCS8PrivateKey(l.key)
			return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), err
		}},
		{hashKeyFile, func(data []byte) error {
			if len(data) != 32 {
				return &damage{"the key of the log's hashes is damaged"}
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			l.hashKey = data
			return nil
		}, func() ([]byte, error) { return l.hashKey, nil }},
	} {
		path := l.path(k.name)
		err := durable.CheckPrivate(path)
		switch {
		case errors.Is(err, fs.ErrNotExist) && begun:
			return &damage{fmt.Sprintf("the log's file %s is gone", k.name)}
		case errors.Is(err, fs.ErrNotExist):
			data, err := k.data()
			if err != nil {
				return err
			}
			l.o.Steps("key write")
			if err := durable.Write(path, data); err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if err := k.read(data); err != nil {
				return err
			}
		}
	}
	return nil
}

// begin makes the spool of a new log. What other logs are in the folder stays.
func (l *Ledger) begin() (*spool, error) {
	var id [4]byte
	_, _ = rand.Read(id[:])
	if err := newSpool(l.path(spoolFile), hex.EncodeToString(id[:]), l.o.SpoolBytes, 0, l.o.Steps); err != nil {
		return nil, err
	}
	if old, err := readGenerations(l.path(logs)); err == nil && len(old) > 0 {
		l.alarm("the log begins anew: its spool was gone, or it got another name")
	}
	return openSpool(l.path(spoolFile), l.o.Steps)
}

// alarm tells people of something; mu is not held.
func (l *Ledger) alarm(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	l.o.Log.Warn().Str("dir", l.o.Dir).Msg(text)
	l.o.Raise(alarm.Event{Kind: alarm.Audit, Text: text})
}

// survey reads the generations, of which those of a lineage come last. It returns
// how many events its tree has and the time of the newest; the error is about its
// newest generation. Damage to an older one is told, and does not end the log.
func (l *Ledger) survey(lineage string) (inTree uint64, last time.Time, err error) {
	dir := l.path(logs)
	gens, err := readGenerations(dir)
	if err != nil {
		return 0, last, err
	}
	order(gens, lineage)
	origin, err := originOf(gens, lineage, l.o.Origin)
	if err != nil {
		return 0, last, err
	}
	witnessed := map[string]uint64{}
	for i, g := range gens {
		ours := g.lineage == lineage
		var names []string
		failed := g.read(l.ctx, l.verifier(g))
		if failed == nil {
			names, failed = g.readCosigned(l.verifier(g))
		}
		switch {
		case failed != nil && ours && i == len(gens)-1:
			err = failed
		case failed != nil:
			l.alarm("an older part of the log cannot be read: %v", failed)
		case ours:
			for _, name := range names {
				witnessed[name] = max(witnessed[name], g.first+g.witnessed)
			}
			if g.size == 0 { // a new one that got nothing yet
				g.first = inTree
			}
			if inTree > 0 && g.first != inTree {
				l.alarm("events %d to %d of the log are gone", inTree, g.first)
			}
			if inTree = g.first + g.size; g.size > 0 {
				last = g.last
			}
		}
		if failed != nil {
			g.checkpoint = nil
		}
	}
	l.gens = gens
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lineage, l.origin, l.witnessed = lineage, origin, witnessed
	if last.After(l.last) {
		l.last = last
	}
	l.tell()
	return inTree, last, err
}

// lineageOf reads the name of a log from a spool that cannot be written.
func lineageOf(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	s, err := readSpool(f, nil)
	if err != nil {
		return ""
	}
	return s.lineage
}

// resume takes up the log that a spool belongs to. trees is held.
func (l *Ledger) resume(s *spool) error {
	l.sweep(l.path(logs))
	inTree, last, err := l.survey(s.lineage)
	if err != nil {
		return err
	}
	origin, gens := l.origin, l.gens
	found, err := s.scan(inTree)
	if err != nil {
		return err
	}
	if found.last != nil {
		data, err := s.read(*found.last)
		if err != nil {
			return err
		}
		var e audit.Event
		if err := json.Unmarshal(data, &e); err != nil || e.Seq != found.last.seq {
			return &damage{fmt.Sprintf("event %d in the spool is no event of this log", found.last.seq)}
		}
		if last = e.Time; len(found.pending) > 0 && inTree == 0 {
			origin = e.Origin
		}
		if n := len(gens); len(found.pending) == 0 && n > 0 && gens[n-1].lineage == s.lineage && gens[n-1].size > 0 && !gens[n-1].ends(data) {
			return &damage{fmt.Sprintf("event %d of the log is not the one that was recorded", found.last.seq)}
		}
	}
	seamed := slices.ContainsFunc(found.pending, func(r record) bool { return r.seam })
	l.mu.Lock()
	l.spool, l.origin, l.taken, l.torn = s, origin, int64(len(found.pending)), found.torn
	l.next, l.acknowledged, l.pending = found.next, found.next, found.pending
	l.head, l.tail, l.epoch, l.seamed = found.head, found.head, found.epoch+1, seamed
	if len(found.pending) > 0 {
		l.tail = found.pending[0].at
	}
	if last.After(l.last) {
		l.last = last
	}
	l.tell()
	l.mu.Unlock()
	if err := s.mark(found.next); err != nil {
		return l.unload(err)
	}
	return l.renew()
}

// unload takes back what resume did. trees is held.
func (l *Ledger) unload(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spool = nil
	return err
}

// renew begins a new log where this one is of another origin, and gives the spool
// the size that is asked for, as soon as everything in it is in the tree. trees is
// held.
func (l *Ledger) renew() error {
	l.mu.Lock()
	s, other := l.spool, l.origin != l.o.Origin
	left := len(l.pending) > 0
	l.mu.Unlock()
	if !other && (left || s.ring == uint64(l.o.SpoolBytes)) {
		return nil
	}
	for left = true; other && left; {
		var err error
		if left, err = l.round(); err != nil {
			return l.unload(err)
		}
	}
	if other {
		next, err := l.begin()
		if err != nil {
			return l.unload(err)
		}
		return l.replace(next)
	}
	if err := newSpool(l.path(spoolFile), s.lineage, l.o.SpoolBytes, l.next, l.o.Steps); err != nil {
		l.o.Log.Warn().Err(err).Msg("the spool of the log keeps its size")
		return nil
	}
	next, err := openSpool(l.path(spoolFile), l.o.Steps)
	if err != nil {
		return l.unload(err)
	}
	return l.replace(next)
}

// replace goes on with another spool, in which nothing is yet. trees is held.
func (l *Ledger) replace(next *spool) error {
	_ = l.spool.f.Close()
	_ = l.unload(nil)
	err := l.resume(next)
	if err != nil {
		_ = next.f.Close()
	}
	return err
}

// temporary are the names of files that were being written when a process ended:
// the driver's are a name with a number behind it.
var temporary = regexp.MustCompile(`^(checkpoint|treeState|version)[0-9]+$|^[0-9]{4,}$|^\..*\.tmp$`)

// sweep removes what an earlier process did not get to.
func (l *Ledger) sweep(dir string) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
		case d.IsDir() && strings.HasPrefix(d.Name(), removed):
			_ = os.RemoveAll(path)
			return fs.SkipDir
		case d.Type().IsRegular() && temporary.MatchString(d.Name()):
			_ = os.Remove(path)
		}
		return nil
	})
}

// order sorts generations by age: of other lineages the folders tell.
func order(gens []*generation, lineage string) {
	began := map[string]time.Time{}
	for _, g := range gens {
		if st, err := os.Stat(g.dir); err == nil && (began[g.lineage].IsZero() || st.ModTime().Before(began[g.lineage])) {
			began[g.lineage] = st.ModTime()
		}
	}
	slices.SortFunc(gens, func(a, b *generation) int {
		if a.lineage != b.lineage {
			switch lineage {
			case a.lineage:
				return 1
			case b.lineage:
				return -1
			}
		}
		return cmp.Or(began[a.lineage].Compare(began[b.lineage]), cmp.Compare(a.lineage, b.lineage), cmp.Compare(a.number, b.number))
	})
}

// originOf returns the origin of a lineage, which its checkpoints name, else what
// it shall be. It learns on the way what each generation says of itself.
func originOf(gens []*generation, lineage, otherwise string) (string, error) {
	origin := otherwise
	for _, g := range gens {
		g.origin = otherwise
		data, err := os.ReadFile(filepath.Join(g.dir, layout.CheckpointPath))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		if c, err := tiles.ParseCheckpoint(data); err == nil {
			if name, _, _, err := logkey.ParseTree(c.Origin); err == nil {
				g.origin = name
			}
		}
		if g.lineage == lineage {
			origin = g.origin
		}
	}
	return origin, nil
}

// verifier returns the one for a generation's checkpoints. trees is held.
func (l *Ledger) verifier(g *generation) note.Verifier {
	v, err := logkey.Verifier(g.name(), l.public())
	if err != nil {
		panic(err) // of a name and a key that we made
	}
	return v
}

// name is the origin line of checkpoints and the name of the key.
func (g *generation) name() string { return logkey.Tree(g.origin, g.lineage, g.number) }

// tell makes known what the generations are. trees and mu are held.
func (l *Ledger) tell() {
	l.heads, l.signed, l.bytes = nil, 0, int64(0)
	if l.spool != nil {
		l.bytes = int64(l.spool.ring) + spoolHeader
	}
	for _, g := range l.gens {
		l.bytes += g.bytes + g.grown
		if g.lineage == l.lineage && g.signed > 0 {
			l.signed = g.first + g.signed
		}
		if g.checkpoint != nil && g.signed > 0 {
			l.heads = append(l.heads, Head{Lineage: g.lineage, Generation: g.number, FirstSeq: g.first, Size: g.signed, Checkpoint: g.checkpoint, Cosigned: g.cosigned, Bytes: g.bytes + g.grown})
		}
	}
	l.broadcast()
}

// keep moves events into the tree and does what else has to be done when nobody
// asks. At rest it sleeps.
func (l *Ledger) keep() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-l.keepWake:
		case <-timer.C:
		case <-l.ctx.Done():
			l.end()
			return
		}
		if wait := l.tend(); wait > 0 {
			timer.Reset(wait)
		} else {
			timer.Stop()
		}
	}
}

// end moves what is left into the tree.
func (l *Ledger) end() {
	<-l.committed
	l.mu.Lock()
	idle := l.spool == nil || l.damaged
	l.mu.Unlock()
	if idle {
		return
	}
	for end := time.Now().Add(publishing); time.Now().Before(end); {
		l.trees.Lock()
		left, err := l.round()
		l.trees.Unlock()
		if err != nil || !left {
			break
		}
	}
}

// tend does what is due, and returns after how long something will be; 0: when
// there is something new.
func (l *Ledger) tend() time.Duration {
	l.mu.Lock()
	now := time.Now()
	next := l.settleBursts(now)
	soonest := func(at time.Time) {
		if d := max(at.Sub(now), time.Millisecond); next == 0 || d < next {
			next = d
		}
	}
	if l.refused != "" && !l.damaged {
		if l.tryAt.After(now) {
			soonest(l.tryAt)
			l.mu.Unlock()
			return next
		}
		s := l.spool
		l.mu.Unlock()
		l.tryAgain(s)
		wake(l.keepWake)
		return next
	}
	if l.refused != "" {
		l.mu.Unlock()
		return next
	}
	if l.roundAt.After(now) {
		soonest(l.roundAt)
		l.mu.Unlock()
		return next
	}
	l.mu.Unlock()

	l.trees.Lock()
	left, err := l.round()
	if err == nil {
		l.prune()
	}
	l.trees.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	var d *damage
	switch {
	case errors.As(err, &d):
		l.refuse(line(d), true)
		return next
	case err != nil:
		text := "events cannot be moved from the spool into the log: " + line(err)
		if l.problem == "" {
			l.o.Log.Error().Str("dir", l.o.Dir).Msg(text)
			l.raise(text)
		}
		l.problem, l.roundAt = text, now.Add(l.retry)
		l.broadcast()
		soonest(l.roundAt)
		return next
	}
	l.problem = ""
	l.catchUp()
	if l.roundAt = now.Add(l.pace); len(l.pending) > maxRoundEvents/4 || left && l.pending[0].seam {
		l.roundAt = now
	}
	if len(l.pending) > 0 {
		soonest(l.roundAt)
	}
	return next
}

// tryAgain finds out whether the disk takes events again.
func (l *Ledger) tryAgain(s *spool) {
	if s == nil {
		if err := l.load(); err != nil && !l.ails(err) {
			l.mu.Lock()
			l.refuse(line(err), false)
			l.mu.Unlock()
		}
		return
	}
	l.mu.Lock()
	acknowledged := l.acknowledged
	l.mu.Unlock()
	err := s.mark(acknowledged)
	if err == nil {
		l.o.Steps("spool sync")
		err = s.sync()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.refuse("the spool cannot be written: "+line(err), false)
		return
	}
	l.o.Log.Info().Str("dir", l.o.Dir).Msg("what is done can be recorded again")
	l.refused = ""
	l.broadcast()
}

// catchUp records what had no room before: how much was lost, what others held
// meanwhile, and that a new generation begins. mu is held.
func (l *Ledger) catchUp() {
	if n := l.lost - l.lostSaid; n > 0 {
		if _, err := l.put(&audit.Event{Kind: audit.Lost, Count: int(n)}, usual); err == nil {
			l.lostSaid = l.lost
			wake(l.commitWake)
		}
	}
	l.adopt()
	if len(l.gens) == 0 || l.seamed {
		return
	}
	if g := l.gens[len(l.gens)-1]; g.lineage == l.lineage && g.bytes+g.grown >= l.o.GenerationBytes {
		if _, err := l.put(&audit.Event{Kind: audit.Seam}, emergency); err == nil {
			l.seamed = true
			wake(l.commitWake)
		}
	}
}

// round moves one batch of events from the spool into the tree, and returns whether
// any are left. trees is held.
func (l *Ledger) round() (left bool, err error) {
	if n := len(l.gens); n > 0 && l.gens[n-1].stale {
		g := l.gens[n-1]
		if err := g.reread(l.verifier(g)); err != nil {
			return false, err
		}
		l.advance(g)
	}
	l.mu.Lock()
	s, number := l.spool, 0
	for size := 0; number < min(len(l.pending), maxRoundEvents) && size < maxRoundBytes; number++ {
		if l.pending[number].seam && number > 0 {
			break
		}
		size += l.pending[number].n
		if l.pending[number].seam {
			number = 1
			break
		}
	}
	records := slices.Clone(l.pending[:number])
	l.mu.Unlock()
	var g *generation
	if n := len(l.gens); n > 0 && l.gens[n-1].lineage == s.lineage {
		g = l.gens[n-1]
	}
	ctx := context.WithoutCancel(l.ctx)
	if len(records) == 0 {
		if g != nil && g.signed < g.size {
			err = g.extend(ctx, l.key, l.verifier(g), nil, l.o.Steps)
			l.mu.Lock()
			l.tell()
			l.mu.Unlock()
		}
		return false, err
	}
	entries := make([][]byte, len(records))
	for i, r := range records {
		if entries[i], err = s.read(r); err != nil {
			return false, err
		}
	}
	if g, err = l.into(g, records[0]); err != nil {
		return false, err
	}
	if records[0].seam {
		if entries[0], err = seam(entries[0], l.gens[len(l.gens)-2]); err != nil {
			return false, &damage{err.Error()}
		}
	}
	if want := g.first + g.size; records[0].seq != want {
		return false, &damage{fmt.Sprintf("the log goes on with event %d, and the spool with %d", want, records[0].seq)}
	}
	err = g.extend(ctx, l.key, l.verifier(g), entries, l.o.Steps)
	return l.advance(g), err
}

// advance gives the room of what is in the tree back, and returns whether anything is
// left. trees is held.
func (l *Ledger) advance(g *generation) (left bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.pending) > 0 && l.pending[0].seq < g.first+g.size {
		l.tail, l.seamed = l.pending[0].end(), l.seamed && !l.pending[0].seam
		l.pending = l.pending[1:]
	}
	if len(l.pending) == 0 {
		l.pending = nil
	}
	l.tell()
	return len(l.pending) > 0
}

// into returns the generation that the next event goes into, which a Seam begins.
// The one before is complete then, and signed. trees is held.
func (l *Ledger) into(g *generation, next record) (*generation, error) {
	number := uint64(1)
	switch {
	case g == nil && next.seq > 0:
		return nil, &damage{fmt.Sprintf("the log's folder is gone, and the spool goes on with event %d", next.seq)}
	case g == nil:
	case !next.seam, g.size == 0 && g.number > 1:
		return g, nil
	default:
		if g.signed < g.size {
			if err := g.extend(context.WithoutCancel(l.ctx), l.key, l.verifier(g), nil, l.o.Steps); err != nil {
				return nil, err
			}
		}
		g.tidy()
		g.measure()
		number = g.number + 1
	}
	l.mu.Lock()
	n := &generation{dir: filepath.Join(l.o.Dir, logs, tiles.Folder(l.lineage, number)), lineage: l.lineage, number: number, origin: l.origin, first: next.seq}
	l.mu.Unlock()
	l.o.Steps("generation make")
	if err := durable.Dir(n.dir); err != nil {
		return nil, err
	}
	l.gens = append(l.gens, n)
	return n, nil
}

// prune removes the oldest generations until the rest is within the bound. trees is
// held.
func (l *Ledger) prune() {
	total := int64(0)
	for _, g := range l.gens {
		total += g.bytes + g.grown
	}
	for len(l.gens) > 1 && total > l.o.MaxBytes {
		g := l.gens[0]
		l.mu.Lock()
		current := g.lineage == l.lineage && l.gens[1].lineage != l.lineage
		l.mu.Unlock()
		if current {
			return
		}
		if g.witnessed < g.size {
			l.alarm("generation %d of the log goes, for want of room, although nobody else has seen all of it", g.number)
		}
		gone := filepath.Join(filepath.Dir(g.dir), removed+filepath.Base(g.dir))
		l.o.Steps("generation remove")
		if err := os.Rename(g.dir, gone); err != nil {
			l.o.Log.Warn().Err(err).Msg("an old part of the log cannot be removed")
			return
		}
		_ = durable.SyncDir(filepath.Dir(g.dir))
		_ = os.RemoveAll(gone)
		l.gens = l.gens[1:]
		total -= g.bytes + g.grown
		l.mu.Lock()
		l.tell()
		l.mu.Unlock()
	}
}
