package cast

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

const (
	// chunkBytes and chunkEvery say when a piece of a recording goes into the log:
	// when it is that long, or has waited for that long.
	chunkBytes = 64 << 10
	chunkEvery = 5 * time.Second
	// defaultBytes is what all recordings may take on disk.
	defaultBytes = 256 << 20
	// maxOfLine is how much output of one line is recorded: more is a bulk of
	// data, which nobody reads, and which would push others out.
	maxOfLine = 4 << 20
	// appendWithin bounds the wait for the log, of nobody but the Recorder.
	appendWithin = 10 * time.Second
	// maxWaiting is how many events, and how many recordings that have ended, wait
	// for a log that takes nothing. What is more is settled at the next start.
	maxWaiting = 512
)

// Options say where recordings go. Dir and Log are required.
type Options struct {
	// Dir is the folder of the recordings, private, made if need be.
	Dir string
	Log audit.Log
	// MaxBytes is what all recordings may take on disk; the oldest make room, of
	// whoever has most. One takes at most an eighth of it, and those of one person
	// that are being made a half. Zero means 256 MiB.
	MaxBytes int64
	// Input has what people type recorded, too.
	Input bool
	// Now is the daemon's clock; nil means the machine's.
	Now    func() time.Time
	Logger zerolog.Logger
}

// Recorder records sessions. A nil one lets them pass.
type Recorder struct {
	o    Options
	wake chan struct{}
	stop context.CancelFunc
	done sync.WaitGroup
	used atomic.Int64 // bytes of all recordings

	mu      sync.Mutex // guards what follows
	live    map[*Session]struct{}
	ended   []*Session    // whose last digest is not in the log yet
	waiting []audit.Event // for the log
	whole   []file        // recordings that may be removed, oldest first
	torn    []string      // those that an earlier process has left
	problem string

	shares sync.Mutex       // guards making; taken last
	making map[string]int64 // bytes of recordings that are being made, by whose
}

// file is a recording on disk.
type file struct {
	name string
	size int64
	// of is whose session it was; empty: that was not looked up yet.
	of string
}

// share reports whether there is room for so many bytes more of what somebody is
// making, and takes it; less than none gives it back.
func (r *Recorder) share(of string, n int64) bool {
	r.shares.Lock()
	defer r.shares.Unlock()
	if n > 0 && r.making[of]+n > r.o.MaxBytes/2 {
		return false
	}
	if r.making[of] += n; r.making[of] <= 0 {
		delete(r.making, of)
	}
	return true
}

// owner is whose session a recording is of, by its title.
func owner(title string) string {
	at := max(0, strings.LastIndex(title, " at "))
	of, _, _ := strings.Cut(title[:at], " as ")
	return of
}

// ownerOf looks that up.
func (r *Recorder) ownerOf(name string) string {
	const nobody = "?"
	f, err := os.Open(filepath.Join(r.o.Dir, name+suffix))
	if err != nil {
		return nobody
	}
	defer f.Close()
	text, err := line(bufio.NewReaderSize(f, 8<<10))
	if err != nil {
		return nobody
	}
	h, err := header(text)
	if err != nil {
		return nobody
	}
	return cmp.Or(owner(h.Title), nobody)
}

// Open returns a Recorder, which has to be closed before its log is. That nothing
// can be written there at present is no error, but that others may is.
func Open(o Options) (*Recorder, error) {
	o.MaxBytes = cmp.Or(o.MaxBytes, defaultBytes)
	if o.Now == nil {
		o.Now = time.Now
	}
	r := &Recorder{o: o, wake: make(chan struct{}, 1), live: map[*Session]struct{}{}, making: map[string]int64{}}
	var failed *fs.PathError
	if err := durable.Dir(o.Dir); err != nil && !errors.As(err, &failed) {
		return nil, err
	}
	if err := r.find(); err != nil {
		r.trouble("recordings", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r.stop = stop
	r.done.Go(func() { r.run(ctx) })
	return r, nil
}

// find lists what is there. Recordings that are whole, and vouched for in the log,
// can only be read.
func (r *Recorder) find() error {
	entries, err := os.ReadDir(r.o.Dir)
	for _, e := range entries { // by name, so by time
		name, ok := strings.CutSuffix(e.Name(), suffix)
		st, err := e.Info()
		if !ok || !Valid(name) || err != nil || !st.Mode().IsRegular() {
			continue
		}
		r.used.Add(st.Size())
		if st.Mode().Perm()&0o200 == 0 {
			r.whole = append(r.whole, file{name: name, size: st.Size()})
		} else {
			r.torn = append(r.torn, name)
		}
	}
	return err
}

// Close ends what is still recorded, and returns when all that the log takes is in
// it.
func (r *Recorder) Close() error {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	var live []*Session
	for s := range r.live {
		live = append(live, s)
	}
	r.mu.Unlock()
	for _, s := range live {
		s.End(0, errors.New("the daemon stops"))
	}
	r.stop()
	r.done.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.ended) > 0 {
		return fmt.Errorf("%d recordings are not vouched for yet: %s", len(r.ended), r.problem)
	}
	return nil
}

// Refused says why the log can record nothing at all, so that sessions can only
// read; empty: it can.
func (r *Recorder) Refused() string {
	if r == nil {
		return ""
	}
	return r.o.Log.State().Refused
}

// State tells what all recordings take on disk, and why they do not go on as they
// should; empty: they do.
func (r *Recorder) State() (bytes int64, problem string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.used.Load(), r.problem
}

// run does what has to wait for disk or log, in one goroutine for all sessions, so
// that a node's disk never has more than one of its syncs to do.
func (r *Recorder) run(ctx context.Context) {
	due := time.NewTicker(chunkEvery)
	defer due.Stop()
	for all := true; ; {
		r.trouble("recordings", r.pass(all))
		select {
		case <-r.wake:
			all = false
		case <-due.C:
			all = true
		case <-ctx.Done():
			r.trouble("recordings", r.pass(true))
			return
		}
	}
}

// poke has run make a pass.
func (r *Recorder) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// trouble notes what is wrong, nil: nothing.
func (r *Recorder) trouble(what string, err error) {
	text := ""
	if err != nil {
		text = what + ": " + err.Error()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if text != "" && text != r.problem {
		r.o.Logger.Warn().Str("problem", text).Msg("sessions cannot be recorded as they should")
	}
	r.problem = text
}

// later has an event recorded when the log takes it.
func (r *Recorder) later(e audit.Event) {
	r.mu.Lock()
	if len(r.waiting) < maxWaiting {
		r.waiting = append(r.waiting, e)
	} else {
		r.o.Log.Note(e) // which counts it, at least
	}
	r.mu.Unlock()
	r.poke()
}

func (r *Recorder) append(e audit.Event) error {
	ctx, cancel := context.WithTimeout(context.Background(), appendWithin)
	defer cancel()
	if _, err := r.o.Log.Append(ctx, e); err != nil {
		return fault.New(fault.AuditUnavailable, "", "%w", err)
	}
	return nil
}

// pass brings the log up to date: with what is long enough, or with all there is.
// What fails the next one tries again; it ends where that is the log.
func (r *Recorder) pass(all bool) error {
	var failed error
	for {
		r.mu.Lock()
		if len(r.waiting) == 0 {
			r.mu.Unlock()
			break
		}
		e := r.waiting[0]
		r.mu.Unlock()
		if err := r.append(e); err != nil {
			return err
		}
		r.mu.Lock()
		r.waiting = r.waiting[1:]
		r.mu.Unlock()
	}
	for _, name := range slices.Clone(r.torn) { // only find and this touch it
		err := r.settle(name)
		switch {
		case fault.Is(err, fault.AuditUnavailable):
			return err
		case err == nil || errors.Is(err, fs.ErrNotExist):
			r.torn = slices.DeleteFunc(r.torn, func(n string) bool { return n == name })
		default:
			failed = errors.Join(failed, fmt.Errorf("settling %s: %w", name, err))
		}
	}
	r.mu.Lock()
	var sessions []*Session
	for s := range r.live {
		sessions = append(sessions, s)
	}
	sessions = append(sessions, r.ended...)
	r.mu.Unlock()
	slices.SortFunc(sessions, func(a, b *Session) int { return strings.Compare(a.name, b.name) })
	for _, s := range sessions {
		for more := true; more; {
			var err error
			if more, err = s.vouch(all); fault.Is(err, fault.AuditUnavailable) {
				return err
			}
			failed = errors.Join(failed, err)
		}
	}
	return errors.Join(failed, r.prune())
}

// finished takes a recording over whose last digest is in the log.
func (r *Recorder) finished(s *Session, size int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = slices.DeleteFunc(r.ended, func(e *Session) bool { return e == s })
	r.share(s.of, -size)
	r.keep(file{s.name, size, s.of})
}

// keep adds to what may be removed; the lock is held.
func (r *Recorder) keep(f file) {
	at, _ := slices.BinarySearchFunc(r.whole, f, func(a, b file) int { return strings.Compare(a.name, b.name) })
	r.whole = slices.Insert(r.whole, at, f)
}

// prune removes recordings until there is room for those that are being made: the
// oldest of whoever has most, so that nobody can push out what others did. That one is
// removed is durable before it is.
func (r *Recorder) prune() error {
	for r.used.Load() > r.o.MaxBytes/8*7 {
		i := r.first()
		if i < 0 {
			return nil // what is live is bounded by itself
		}
		f := r.whole[i] // only this removes any, and only what calls it adds some
		if err := r.append(audit.Event{Kind: audit.Recording, Target: f.name, Outcome: Removed,
			Text: fmt.Sprintf("the oldest recording of %s, of %d bytes, was removed: all together may take %d", f.of, f.size, r.o.MaxBytes)}); err != nil {
			return err
		}
		if err := os.Remove(filepath.Join(r.o.Dir, f.name+suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		r.used.Add(-f.size)
		r.mu.Lock()
		r.whole = slices.Delete(r.whole, i, i+1)
		r.mu.Unlock()
	}
	return nil
}

// first returns the recording that goes first, -1: there is none. Nobody waits while
// it looks up whose they are.
func (r *Recorder) first() int {
	r.shares.Lock()
	has := maps.Clone(r.making)
	r.shares.Unlock()
	found := map[string]int{} // the oldest of each
	for i := range r.whole {
		f := &r.whole[i]
		if f.of == "" {
			f.of = r.ownerOf(f.name)
		}
		has[f.of] += f.size
		if _, older := found[f.of]; !older {
			found[f.of] = i
		}
	}
	first, most := -1, int64(0)
	for of, i := range found {
		if has[of] > most || has[of] == most && i < first {
			first, most = i, has[of]
		}
	}
	return first
}

// settle makes a recording whole that an earlier process was writing: players
// refuse one that ends within a line. Every digest that is in the log is of whole
// lines that were durable before, so nothing of them is cut.
func (r *Recorder) settle(name string) error {
	path := filepath.Join(r.o.Dir, name+suffix)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	good, total, err := intact(f)
	if err != nil {
		return err
	}
	if good == 0 {
		n, err := f.WriteAt([]byte(bare), 0)
		if err != nil {
			return err
		}
		good = int64(n)
	}
	if err := errors.Join(f.Truncate(good), f.Sync()); err != nil {
		return err
	}
	digest := sha256.New()
	if _, err := io.Copy(digest, io.NewSectionReader(f, 0, good)); err != nil {
		return err
	}
	for _, e := range []audit.Event{
		{Outcome: Settled, Text: fmt.Sprintf("the daemon ended while it wrote this recording; %d bytes of %d are whole lines", min(good, total), total)},
		{Chunk: &audit.Chunk{Session: name, Length: good, SHA256: hex.EncodeToString(digest.Sum(nil)), Last: true}},
	} {
		e.Kind, e.Target = audit.Recording, name
		if err := r.append(e); err != nil {
			return err
		}
	}
	r.used.Add(good - total)
	if err := f.Chmod(0o400); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keep(file{name: name, size: good})
	return nil
}

// bare is the header of a recording that has lost its own.
const bare = `{"version":2,"width":80,"height":24}` + "\n"

// intact returns how many bytes of a recording are whole lines of one, from its
// beginning, and how many there are.
func intact(f *os.File) (good, total int64, err error) {
	st, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	lines := bufio.NewReaderSize(io.NewSectionReader(f, 0, st.Size()), 64<<10)
	for {
		text, err := line(lines)
		if err == nil && good == 0 {
			_, err = header(text)
		} else if err == nil {
			_, err = event(text)
		}
		if err != nil {
			return good, st.Size(), nil
		}
		good += int64(len(text)) + 1
	}
}

// allowed reports whether somebody goes on where nothing can be recorded: people
// who may have to rescue a cluster. At a bastion nobody has taken a role, so what
// counts there is which they may take.
func allowed(who trust.Identity) bool {
	switch who.Kind {
	case trust.Person, trust.Local, trust.Sealed:
		return !who.Scope.Drill && (who.Role.Has(trust.Responder) || who.Role == trust.None && slices.ContainsFunc(who.Roles, func(r trust.Role) bool { return r.Has(trust.Responder) }))
	}
	return false
}
