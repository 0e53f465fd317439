package bundle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// DefaultPoll is how often [Store.Watch] looks at the file, unless told
// otherwise.
const DefaultPoll = 500 * time.Millisecond

// maxAhead is how far a part's signing time may be ahead of the clock of whoever
// takes it over: the time of signing is a floor of every clock of the fleet, and
// a wrong year in it would end every certificate.
const maxAhead = 24 * time.Hour

// Options of a store.
type Options struct {
	// Path of the bundle as somebody copies it by hand. It must be a plain file
	// of root's or of this process's user, in a folder of theirs, and writable by
	// nobody else; it may be missing where State has one.
	Path string
	// State is the path of the store's own copy of the last good bundle, 0600 in
	// a folder 0700. Empty: what is offered is written to Path, and a bad copy
	// there is survived only as long as the process runs.
	State  string
	Anchor *Anchor
	// Now is the clock that freshness goes by; nil: time.Now.
	Now func() time.Time
	// Wall is the clock that the signing time of a new part is held against;
	// nil: time.Now. It must not be one that bundles move, or each could move it
	// a little further. Where it is set back while the store is open, the store
	// goes on from where it was, or whoever sets clocks could keep out revocations.
	Wall func() time.Time
	// Floor is a time that is known to be past, such as that of the build. A wall
	// clock below it is dead.
	Floor time.Time
	// Log is told, in one line, what is in force; Alarm what somebody must look
	// at: a fork, a bad file, a stale bundle. Either may be nil. They must not
	// block.
	Log   func(string)
	Alarm func(error)
	// Poll is how often Watch looks; 0: DefaultPoll.
	Poll time.Duration
}

// Store holds the bundle in force. What is offered is in force, and then
// durable, before Offer returns; where the disk refuses, it is in force all the
// same, and Watch tries again. All methods may be used concurrently.
type Store struct {
	o       Options
	wall    *trust.Clock // Options.Wall, which never goes back
	current atomic.Pointer[Bundle]

	// offering is held while the current bundle is being replaced, and guards
	// unsaved.
	offering sync.Mutex
	unsaved  bool

	last string // what lookAt saw at Path; Watch's own

	// mu guards subscribers.
	mu          sync.Mutex
	subscribers map[chan struct{}]struct{}
}

// Open reads the last good bundle and the one at the path, and puts the newest
// verified parts in force. It fails only where neither can be used (fault.Usage
// or fault.Refused).
func Open(o Options) (*Store, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Wall == nil {
		o.Wall = time.Now
	}
	if o.Log == nil {
		o.Log = func(string) {}
	}
	if o.Alarm == nil {
		o.Alarm = func(error) {}
	}
	if o.Poll <= 0 {
		o.Poll = DefaultPoll
	}
	s := &Store{o: o, wall: trust.Steady(time.Time{}, o.Wall), subscribers: map[chan struct{}]struct{}{}}
	s.wall.Now() // from here on it cannot be set back
	if err := s.readState(); err != nil {
		return nil, err
	}
	s.last = lookAt(o.Path)
	data, err := s.read()
	switch {
	case err != nil:
	case s.Current() == nil:
		var b *Bundle
		if b, err = open(data, o.Anchor); err == nil {
			s.current.Store(b)
			if o.State != "" { // else it was read from where it would be written
				_ = s.keep(b) // it has alarmed
			}
		}
	default:
		changed, oerr := s.offer(data, false)
		// It may be older: others have pushed newer ones since it was copied.
		if !changed && !errors.Is(oerr, ErrOlder) && !errors.Is(oerr, ErrForked) {
			err = oerr
		}
	}
	if s.Current() == nil {
		return nil, err
	}
	if err != nil && (o.State == "" || !errors.Is(err, fs.ErrNotExist)) {
		o.Alarm(err)
	}
	o.Log(s.Current().String())
	return s, nil
}

func open(data []byte, anchor *Anchor) (*Bundle, error) {
	f, err := Parse(data)
	if err != nil {
		return nil, err
	}
	return Verify(f, anchor)
}

// readState puts the last good bundle in force. One that does not verify is told
// of and left out: the anchor may have been changed, or the disk.
func (s *Store) readState() error {
	if s.o.State == "" {
		return nil
	}
	err := durable.Dir(filepath.Dir(s.o.State))
	if err == nil {
		if err = durable.CheckPrivate(s.o.State); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
	if err != nil {
		return fault.New(fault.Usage, "mend its owner and mode; if somebody else may have written it, remove it and copy the bundle again", "last good bundle: %w", err)
	}
	data, err := readBounded(s.o.State)
	var b *Bundle
	if err == nil {
		b, err = open(data, s.o.Anchor)
	}
	if err != nil {
		s.o.Alarm(fault.New(fault.Refused, "the one at "+s.o.Path+" is used instead", "the last good bundle, %s, cannot be used: %w", s.o.State, err))
		return nil
	}
	s.current.Store(b)
	return nil
}

// Current returns the bundle in force, never nil.
func (s *Store) Current() *Bundle { return s.current.Load() }

// Raw returns the file in force. It must not be changed.
func (s *Store) Raw() []byte { return s.Current().Raw() }

// Offer takes over what is newer and verified of a file that somebody brings, be
// it whole or some of its parts. An error leaves everything as it was, and says
// whether the file is only older (ErrOlder) or forked (ErrForked, which is also
// alarmed); but with changed it only says that the disk refused the copy.
func (s *Store) Offer(data []byte) (changed bool, err error) { return s.offer(data, true) }

func (s *Store) offer(data []byte, durably bool) (changed bool, err error) {
	f, err := Parse(data)
	if err != nil {
		return false, err
	}
	s.offering.Lock()
	defer s.offering.Unlock()
	now := s.Current()
	var unjudged error
	next, err := now.merge(f)
	if err == nil {
		unjudged, err = s.ahead(now, next)
	}
	if err != nil {
		err = refused(err)
		if errors.Is(err, ErrForked) {
			s.o.Alarm(err)
		}
		return false, err
	}
	if next == now {
		return false, nil
	}
	// In force first: a disk that hangs must not hold up a revocation.
	s.current.Store(next)
	s.announce()
	s.o.Log(next.String())
	if unjudged != nil {
		s.o.Alarm(unjudged)
	}
	if durably || s.o.State != "" {
		err = s.keep(next)
	}
	return true, err
}

// ahead refuses new parts that are signed in the future. Where the clock of this
// machine is dead, showing less than is known to be past (Options.Floor, and the
// signing of the policy), it cannot judge: then what the threshold of the roots
// signed is taken as it is, and what a delegate signed up to freshFor after what is
// known. The latter does not become known: delegates could push the clocks of such
// machines on bit by bit. alarm is what to tell of such a part that was taken.
func (s *Store) ahead(now, next *Bundle) (alarm, err error) {
	wall, known := s.wall.Now(), s.o.Floor
	if now.Policy.Signed.After(known) {
		known = now.Policy.Signed
	}
	dead := wall.Before(known)
	most := wall.Add(maxAhead)
	if dead {
		most = known.Add(maxAhead)
		if next.Policy.Signed.After(known) {
			known = next.Policy.Signed
		}
	}
	stamp := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	old := now.File().headers()
	for _, h := range next.File().headers() {
		if slices.Contains(old, h) || !h.Signed.After(most) {
			continue
		}
		if !dead {
			return nil, fmt.Errorf("%s %d was signed at %s, which is over %v ahead of this machine's clock; one of the two clocks is wrong",
				h.Part, h.Version, stamp(h.Signed), maxAhead)
		}
		roots, err := h.signers(next.Policy.Roots.Keys)
		if err != nil {
			return nil, err
		}
		trusted := h.Part == PolicyPart || roots >= next.Policy.Roots.Threshold
		if fresh := time.Duration(next.Policy.FreshFor); !trusted && h.Signed.After(known.Add(fresh)) {
			return nil, fmt.Errorf("%s %d was signed at %s, which is over %v after %s, the last time that is known here: this machine's clock shows %s. Set it, or have that part signed by %d roots",
				h.Part, h.Version, stamp(h.Signed), fresh, stamp(known), stamp(wall), next.Policy.Roots.Threshold)
		}
		alarm = fault.New(fault.Stale, "set this machine's clock", "this machine's clock shows %s, which is past: %s %d, signed at %s, was taken over without it",
			stamp(wall), h.Part, h.Version, stamp(h.Signed))
	}
	return alarm, nil
}

// keep makes the bundle in force durable.
func (s *Store) keep(b *Bundle) error {
	err := durable.Write(s.kept(), b.Raw())
	s.unsaved = err != nil
	if err != nil {
		err = fault.New(fault.Failed, "it is in force until a restart; make room on the disk, it is tried again", "the bundle could not be kept: %w", err)
		s.o.Alarm(err)
	}
	return err
}

// Subscribe returns a channel that has an element after the bundle changed.
// Changes in quick succession may be one element.
func (s *Store) Subscribe() (changes <-chan struct{}, cancel func()) {
	c := make(chan struct{}, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.subscribers[c] = struct{}{}
	return c, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.subscribers, c)
	}
}

func (s *Store) announce() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.subscribers {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// Watch takes over what somebody copies to the path, until the context ends. A
// file that is still being copied is looked at again; a bad one that stays is
// alarmed once, and the last good bundle kept. Watch also tells once when the
// bundle becomes stale.
func (s *Store) Watch(ctx context.Context) {
	t := time.NewTicker(s.o.Poll)
	defer t.Stop()
	stale := false
	var bad error // why the file, as it was last seen, is not in force
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		s.retry()
		s.wall.Now()
		if b := s.Current(); b.Fresh(s.o.Now()) {
			stale = false
		} else if !stale {
			stale = true
			s.o.Alarm(fault.New(fault.Stale, "have the revocations signed anew and pushed; nobody is locked out",
				"the bundle is stale: its revocations were signed at %s", b.Revocations.Signed.UTC().Format(time.RFC3339)))
		}
		switch now := lookAt(s.o.Path); {
		case now != s.last:
			s.last = now
			bad = s.reread()
		case bad != nil: // seen twice: it is not being copied any more
			s.o.Alarm(bad)
			bad = nil
		}
	}
}

func (s *Store) reread() error {
	data, err := s.read()
	if errors.Is(err, fs.ErrNotExist) && s.o.State != "" {
		return nil
	}
	changed := false
	if err == nil {
		changed, err = s.offer(data, false)
	}
	if changed || errors.Is(err, ErrForked) {
		return nil // alarmed already
	}
	return err
}

// retry writes what the disk refused.
func (s *Store) retry() {
	s.offering.Lock()
	defer s.offering.Unlock()
	if !s.unsaved {
		return
	}
	if durable.Write(s.kept(), s.Raw()) == nil {
		s.unsaved = false
		s.o.Log("kept after all: " + s.Current().String())
	}
}

// kept is the path of the store's own copy.
func (s *Store) kept() string {
	if s.o.State != "" {
		return s.o.State
	}
	return s.o.Path
}

// lookAt returns what a change of the file, or of who may change it, changes.
func lookAt(path string) string {
	var all string
	for _, p := range []string{path, filepath.Dir(path)} {
		st, err := os.Lstat(p)
		if err != nil {
			continue
		}
		all += fmt.Sprint(p, st.Mode())
		if o, ok := st.Sys().(*syscall.Stat_t); ok {
			all += fmt.Sprint(" ", o.Uid, " ", o.Ino)
		}
		if p == path {
			all += fmt.Sprint(" ", st.Size(), " ", st.ModTime().UnixNano(), " ")
		}
	}
	return all
}

// read reads the file at Path, if nobody else can have written it.
func (s *Store) read() ([]byte, error) {
	path := s.o.Path
	next := "copy the bundle there, as root, with mode 0644 or 0600"
	st, err := os.Lstat(path)
	if err != nil {
		return nil, fault.New(fault.Usage, next, "reading the bundle: %w", err)
	}
	dir, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return nil, fault.New(fault.Usage, next, "reading the bundle: %w", err)
	}
	if !st.Mode().IsRegular() {
		return nil, fault.New(fault.Usage, next, "%s is not a plain file", path)
	}
	if err := onlyOurs(path, st); err != nil {
		return nil, err
	}
	if err := onlyOurs(filepath.Dir(path), dir); err != nil && dir.Mode()&fs.ModeSticky == 0 {
		return nil, err
	}
	data, err := readBounded(path)
	if err != nil {
		return nil, fault.New(fault.Usage, next, "reading the bundle: %w", err)
	}
	return data, nil
}

func onlyOurs(path string, st fs.FileInfo) error {
	if st.Mode().Perm()&0o022 != 0 {
		return fault.New(fault.Usage, "chmod go-w "+path, "%s has mode %04o: others than its owner may write it", path, st.Mode().Perm())
	}
	if o, ok := st.Sys().(*syscall.Stat_t); ok && o.Uid != 0 && int(o.Uid) != os.Geteuid() {
		return fault.New(fault.Usage, "chown root "+path, "%s belongs to user %d, neither root nor who runs this", path, o.Uid)
	}
	return nil
}

// readBounded reads a plain file, and at most one byte over the limit. A pipe
// put in its place does not block.
func readBounded(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, MaxSize+1))
}
