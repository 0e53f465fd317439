// Package ledger is the evidence log of one daemon: what is appended is durable
// before the call returns, and is then moved, strictly in order, into a transparency
// log (C2SP tlog-tiles, signed checkpoints) that anybody can verify with tools that
// are not ours.
//
// An event is acknowledged when it is in the spool, a file of a fixed size with room
// of its own, so that neither a full disk nor the driver of the tree, which needs
// many small files, stands between an emergency and its record. From there each
// event gets into the tree exactly once, since its place there is known beforehand:
// its sequence number less the one of the tree's first entry.
//
// It must never acknowledge what a power cut can take back, sign fewer entries than
// before, cut what was acknowledged, go on beyond damage as if nothing was, or wait
// for the network while the local disk works. It stands on floor 2.
package ledger

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// Options say where the log is and how much it may take.
type Options struct {
	// Dir is the folder of the log, 0700, made where it is missing.
	Dir string
	// Origin is NODE.CLUSTER, or NAME.bastion. A log of another origin in Dir is
	// ended, and a new one begun.
	Origin string
	// Now is the clock of events; nil: time.Now. It is not relied on to go forward.
	Now func() time.Time
	// MaxBytes is the most that all generations take on disk; beyond it the oldest
	// go, never the newest. Default 256 MiB.
	MaxBytes int64
	// GenerationBytes is where a generation ends. Default 32 MiB.
	GenerationBytes int64
	// SpoolBytes is the size of the spool, half of which is the reserve of
	// break-glass roles for a full disk; at least 512 KiB. Default 8 MiB: a reserve
	// of 2,048 events of 2 KiB.
	SpoolBytes int64
	// Hold keeps events elsewhere that this log cannot take; nil: nowhere.
	Hold Holder
	// Raise is told what people should hear of; nil: nobody.
	Raise func(alarm.Event)
	Log   zerolog.Logger
	// Steps is told what is about to be done to the disk, for tests that make it
	// fail there.
	Steps func(string)
}

// Holder keeps an event outside of this machine: it returns the receipts of two
// bastions or an error. It may be called concurrently.
type Holder interface {
	Hold(ctx context.Context, id string, event []byte) (receipts []string, err error)
}

const (
	// again is when something that failed is tried next.
	again = 5 * time.Second
	// patience is how long an event waits for room or for the disk.
	patience = 5 * time.Second
	// unhurried is the least between two checkpoints: what comes between them is
	// signed with the next.
	unhurried = 200 * time.Millisecond
	// gather is how long an event that nobody waits for may lie in memory.
	gather = 200 * time.Millisecond
	// A round moves at most this much at a time into the tree.
	maxRoundEvents, maxRoundBytes = 256, 1 << 20
	// maxUnwritten bounds the events in memory that are about to be written.
	maxUnwritten = 1 << 20
)

// Ledger is the log of one daemon. Its methods may be called concurrently.
type Ledger struct {
	o    Options
	boot string
	// key and hashKey change where they could not be read at first: under trees and
	// mu, so that either is enough to read them.
	key     ed25519.PrivateKey
	hashKey []byte
	// retry is again, and pace unhurried, but in tests.
	retry, pace time.Duration

	ctx        context.Context
	cancel     context.CancelFunc
	goroutines sync.WaitGroup
	// commitWake and keepWake have room for one; committed is closed when nothing
	// more is written to the spool.
	commitWake, keepWake, committed chan struct{}

	// trees guards the generations and their folders, and the loading of the log. It
	// is taken before mu.
	trees sync.Mutex
	// gens are all generations in the folder, oldest first. The newest of lineage
	// is last.
	gens []*generation

	mu      sync.Mutex // guards all below
	closed  bool
	spool   *spool // nil while it could not be opened
	lineage string
	// origin is that of the lineage.
	origin string
	// refused says why nothing can be recorded; for good where it is damage, or until the next try.
	refused, problem string
	damaged          bool
	tryAt, roundAt   time.Time
	// next is the sequence number to come, acknowledged what is durable, and
	// pending those of it that are not in the tree. head and tail bound the ring.
	next, acknowledged uint64
	pending            []record
	head, tail         uint64
	reserved           uint64
	epoch              uint32
	unwritten          *batch // not being written yet
	// writing is since when a batch is being written; zero: none is.
	writing        time.Time
	seamed         bool // a seam is on its way
	last           time.Time
	heads          []Head
	signed         uint64
	witnessed      map[string]uint64
	bytes          int64
	lost, lostSaid uint64
	held           []held
	bursts         map[burstKey]*burst
	taken, torn    int64 // over from the process before
	// changed is closed, and made anew, when there is room or something was signed.
	changed     chan struct{}
	subscribers map[chan struct{}]struct{}
}

var _ audit.Log = (*Ledger)(nil)

// batch is what is made durable with one sync.
type batch struct {
	pieces  []piece
	records []record
	// head is that of the ring before it.
	head  uint64
	bytes int
	done  chan struct{}
	err   error // set before done is closed
}

// Head is one generation of a log.
type Head struct {
	Lineage    string
	Generation uint64
	// FirstSeq is the sequence number of its first entry, Size the number of
	// entries under its checkpoint.
	FirstSeq, Size uint64
	// Checkpoint is the newest, a signed note, and Cosigned the newest that
	// witnesses signed too; nil: none has.
	Checkpoint, Cosigned []byte
	// Bytes is what it takes on disk.
	Bytes int64
}

// Open opens the log of a folder, or begins one, and starts to keep it. A disk that
// takes nothing is no error: State says so, and it is tried again every 5 s. What
// is owned by somebody else, open to others or held by another process is one.
func Open(o Options) (*Ledger, error) { return open(o, again, unhurried) }

func open(o Options, retry, pace time.Duration) (*Ledger, error) {
	o.MaxBytes, o.GenerationBytes = cmp.Or(o.MaxBytes, 256<<20), cmp.Or(o.GenerationBytes, 32<<20)
	o.SpoolBytes = max(cmp.Or(o.SpoolBytes, 8<<20), minSpool) / unit * unit
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Raise == nil {
		o.Raise = func(alarm.Event) {}
	}
	if o.Steps == nil {
		o.Steps = func(string) {}
	}
	if !trust.ValidNode(o.Origin) {
		return nil, fmt.Errorf("no name for a log: %q", o.Origin)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		o.Log.Warn().Err(err).Msg("events will not say which boot they are of")
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := &Ledger{o: o, retry: retry, pace: pace, boot: strings.TrimSpace(string(boot)), ctx: ctx, cancel: cancel, commitWake: make(chan struct{}, 1), keepWake: make(chan struct{}, 1), committed: make(chan struct{}),
		witnessed: map[string]uint64{}, bursts: map[burstKey]*burst{}, changed: make(chan struct{}), subscribers: map[chan struct{}]struct{}{}, origin: o.Origin}
	if err := l.load(); err != nil && !l.ails(err) {
		cancel()
		return nil, fault.New(fault.Failed, "look at the folder", "opening the log of what is done in %s: %w", o.Dir, err)
	}
	l.goroutines.Go(l.commit)
	l.goroutines.Go(l.keep)
	wake(l.keepWake)
	return l, nil
}

// Close makes durable what has been noted, moves it into the tree as far as that
// takes no longer than a few seconds, and stops.
func (l *Ledger) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.settleBursts(time.Time{})
	l.closed = true
	l.broadcast()
	l.mu.Unlock()
	l.cancel()
	l.goroutines.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.spool == nil {
		return nil
	}
	return l.spool.f.Close()
}

// Dir is the folder of the log.
func (l *Ledger) Dir() string { return l.o.Dir }

// Key is the public half of the key that signs checkpoints. It is another one once
// the disk is mended, where that could not be read at first.
func (l *Ledger) Key() ed25519.PublicKey {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.public()
}

// public is Key. trees or mu is held.
func (l *Ledger) public() ed25519.PublicKey { return l.key.Public().(ed25519.PublicKey) }

// LastTime is the time of the newest event; zero: there is none.
func (l *Ledger) LastTime() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// Found tells what was there at the start: events that were taken over from the
// spool, and bytes of it that were being written when the last process ended.
func (l *Ledger) Found() (events, torn int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.taken, l.torn
}

// Hash returns a keyed hash of a secret value: hmac-sha256:HEX.
func (l *Ledger) Hash(secret []byte) string {
	l.mu.Lock()
	m := hmac.New(sha256.New, l.hashKey)
	l.mu.Unlock()
	m.Write(secret)
	return "hmac-sha256:" + hex.EncodeToString(m.Sum(nil))
}

// class says how much of the spool an event may use.
type class int

const (
	noted class = iota // nobody waits for it
	usual
	emergency
	outcome
)

func classOf(e audit.Event) class {
	if e.BreakGlass() {
		return emergency
	}
	return usual
}

// limit is how many bytes of the ring a class may fill. What people do in an
// emergency may use all of it; once the tree takes nothing, others leave it half.
func (l *Ledger) limit(c class) uint64 {
	switch ring := l.spool.ring; {
	case c == outcome:
		return ring
	case c == emergency, c == usual && l.problem == "":
		return ring - slack
	case c == usual, l.problem == "":
		return ring/2 - slack
	default:
		return ring / 4
	}
}

// slack is what may stay unused at the end of the ring.
var slack = recordSize(audit.MaxEvent)

// errFull is that there is no room; while the tree takes events there soon is.
var errFull = errors.New("its spool is full")

// errStuck is that a write does not end.
var errStuck = errors.New("the disk does not answer")

func (l *Ledger) stuck() bool { return !l.writing.IsZero() && time.Since(l.writing) > patience }

func (l *Ledger) refusal(cause error) error {
	next := "make room on the disk of " + l.o.Dir + "; what reads still works"
	if l.damaged {
		next = "keep a copy of " + l.o.Dir + " for the auditor; without its file spool the daemon begins a new log when it is started again"
	}
	return fault.New(fault.AuditUnavailable, next, "what is done cannot be recorded: %w", cause)
}

// stamp fills in what only the log knows. mu is held.
func (l *Ledger) stamp(e *audit.Event) {
	e.Version, e.Seq, e.Boot, e.Origin = audit.Version, l.next, l.boot, l.origin
	e.Time = l.o.Now().UTC().Round(0)
	if e.Time.Before(l.last) || e.Time.Year() > 9999 {
		e.Time = l.last
	}
	var up unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &up) == nil {
		e.Uptime = up.Nano()
	}
	if e.ID == "" {
		var random [8]byte
		_, _ = rand.Read(random[:])
		e.ID = audit.NewID(e.Time, random)
	}
}

// put gives an event its place in the spool, to be written with the next batch. mu
// is held.
func (l *Ledger) put(e *audit.Event, c class) (*batch, error) {
	switch {
	case l.closed:
		return nil, errors.New("the daemon is stopping")
	case l.refused != "":
		return nil, errors.New(l.refused)
	case l.stuck():
		return nil, errStuck
	}
	l.stamp(e)
	data, err := fit(*e, audit.MaxEvent)
	if err != nil {
		return nil, err
	}
	fits := func() (at uint64, ok bool) {
		at = l.spool.place(l.head, len(data))
		return at, at+recordSize(len(data))-l.tail+l.reserved <= l.limit(c)
	}
	at, ok := fits()
	if !ok && c == outcome {
		if data, err = fit(*e, unit-recordHead); err != nil {
			return nil, err
		}
		at, ok = fits()
	}
	if !ok {
		return nil, errFull
	}
	r := record{seq: e.Seq, at: at, n: len(data), durable: l.acknowledged, epoch: l.epoch, seam: e.Kind == audit.Seam}
	if l.unwritten == nil {
		l.unwritten = &batch{head: l.head, done: make(chan struct{})}
	}
	b := l.unwritten
	if n := len(b.pieces); n > 0 && at%l.spool.ring != 0 && b.pieces[n-1].at+uint64(len(b.pieces[n-1].data)) == at {
		b.pieces[n-1].data = l.spool.encode(b.pieces[n-1].data, r, data)
	} else {
		b.pieces = append(b.pieces, piece{at: at, data: l.spool.encode(nil, r, data)})
	}
	b.records = append(b.records, r)
	b.bytes += len(data)
	l.head, l.next, l.last = r.end(), l.next+1, e.Time
	return b, nil
}

// Append is audit.Log's.
func (l *Ledger) Append(ctx context.Context, e audit.Event) (audit.Receipt, error) {
	return l.append(ctx, e, func(e *audit.Event) (*batch, error) { return l.put(e, classOf(*e)) })
}

// append waits until the event is durable, here or elsewhere.
func (l *Ledger) append(ctx context.Context, e audit.Event, put func(*audit.Event) (*batch, error)) (audit.Receipt, error) {
	late := time.NewTimer(patience)
	defer late.Stop()
	for {
		l.mu.Lock()
		b, err := put(&e)
		changed, soon := l.changed, l.problem == "" && !l.closed
		l.mu.Unlock()
		var wait <-chan struct{}
		switch {
		case err == nil:
			wake(l.commitWake)
			wait = b.done
		case errors.Is(err, errFull) && soon:
			wait = changed
		default:
			return l.elsewhere(ctx, e, err)
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return audit.Receipt{}, l.refusal(ctx.Err())
		case <-late.C:
			return l.elsewhere(ctx, e, cmp.Or(err, errStuck))
		}
		switch {
		case err != nil:
		case b.err != nil:
			return l.elsewhere(ctx, e, b.err)
		default:
			l.mu.Lock()
			defer l.mu.Unlock()
			return audit.Receipt{ID: e.ID, Seq: e.Seq, Where: audit.Local, Signed: e.Seq < l.signed}, nil
		}
	}
}

// Reserve is audit.Log's.
func (l *Ledger) Reserve(e audit.Event) (audit.Room, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return nil, l.refusal(errors.New("the daemon is stopping"))
	case l.refused != "":
		if l.o.Hold == nil {
			return nil, l.refusal(errors.New(l.refused))
		}
		return &room{l: l}, nil
	}
	used := l.head - l.tail
	if l.problem == "" {
		used = 0 // what is there is about to go
	}
	// The intent itself has to fit too.
	if used+l.reserved+2*unit > l.limit(classOf(e)) {
		if l.o.Hold == nil {
			return nil, l.refusal(errFull)
		}
		return &room{l: l}, nil
	}
	l.reserved += unit
	return &room{l: l, bytes: unit}, nil
}

// room is set aside for an outcome.
type room struct {
	l     *Ledger
	bytes uint64 // guarded by l.mu
}

func (r *room) Append(ctx context.Context, e audit.Event) (audit.Receipt, error) {
	return r.l.append(ctx, e, func(e *audit.Event) (*batch, error) {
		bytes := r.bytes
		r.l.reserved, r.bytes = r.l.reserved-bytes, 0
		b, err := r.l.put(e, outcome)
		if err != nil {
			r.l.reserved, r.bytes = r.l.reserved+bytes, bytes
		}
		return b, err
	})
}

func (r *room) Release() {
	r.l.mu.Lock()
	defer r.l.mu.Unlock()
	if r.bytes > 0 {
		r.l.reserved, r.bytes = r.l.reserved-r.bytes, 0
		r.l.broadcast()
	}
}

// State is audit.Log's.
func (l *Ledger) State() audit.State {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := audit.State{Events: l.acknowledged, Signed: l.signed, Witnessed: maps.Clone(l.witnessed), Origin: l.origin, Bytes: l.bytes, Problem: l.problem, Refused: l.refused, Lost: l.lost, Generation: 1}
	for _, h := range l.heads {
		if h.Lineage == l.lineage {
			s.Generation = int(h.Generation)
		}
	}
	if l.refused == "" && l.stuck() {
		s.Refused = errStuck.Error()
	}
	if l.lineage != "" {
		s.VKey, _ = logkey.VKey(logkey.Tree(l.origin, l.lineage, uint64(s.Generation)), l.public())
	}
	if l.spool != nil && s.Refused == "" {
		// The other half may be taken by anybody's events before these come.
		taken := l.head - l.tail + l.reserved + slack
		s.Reserve = int(min(l.spool.ring/2, l.spool.ring-min(l.spool.ring, taken)) / unit)
	}
	return s
}

// Heads returns all generations in the folder that have a checkpoint, oldest first.
func (l *Ledger) Heads() []Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.heads[:len(l.heads):len(l.heads)]
}

// Entries yields the entries of a generation from the one with index from up to,
// without it, the one with index to, all of which its checkpoint covers. It ends
// with the first error.
func (l *Ledger) Entries(ctx context.Context, lineage string, generation, from, to uint64) iter.Seq2[[]byte, error] {
	t, err := tiles.Open(filepath.Join(l.o.Dir, logs, tiles.Folder(lineage, generation)))
	if !logkey.ValidLineage(lineage) {
		err = fmt.Errorf("no name of a log: %q", lineage)
	}
	if err != nil {
		return func(yield func([]byte, error) bool) { yield(nil, err) }
	}
	return t.Entries(ctx, int64(from), int64(to))
}

// Changed returns a channel that has something in it whenever there is a new
// checkpoint or something is being held, and a function that ends this.
func (l *Ledger) Changed() (<-chan struct{}, func()) {
	c := make(chan struct{}, 1)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.subscribers[c] = struct{}{}
	return c, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.subscribers, c)
	}
}

// broadcast wakes whoever waits for room or a checkpoint. mu is held.
func (l *Ledger) broadcast() {
	close(l.changed)
	l.changed = make(chan struct{})
	for c := range l.subscribers {
		wake(c)
	}
}

// Cosigned stores a checkpoint of this log that a witness has signed too; whoever
// calls has verified the witness's signature.
func (l *Ledger) Cosigned(lineage string, generation uint64, checkpoint []byte, witness string) error {
	l.trees.Lock()
	defer l.trees.Unlock()
	for _, g := range l.gens {
		if g.lineage != lineage || g.number != generation {
			continue
		}
		size, err := g.cosign(checkpoint, l.verifier(g), l.o.Steps)
		if err != nil {
			return err
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if lineage == l.lineage {
			l.witnessed[witness] = max(l.witnessed[witness], g.first+size)
		}
		l.tell()
		return nil
	}
	return fmt.Errorf("no generation %d of %s is here", generation, lineage)
}

// SignedWithin waits until a signed checkpoint covers an event.
func (l *Ledger) SignedWithin(ctx context.Context, seq uint64) error {
	for {
		l.mu.Lock()
		signed, changed, closed := l.signed, l.changed, l.closed
		l.mu.Unlock()
		switch {
		case seq < signed:
			return nil
		case closed:
			return errors.New("the log has been closed")
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// wake leaves word in a channel with room for one.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// commit makes batches durable, one after the other.
func (l *Ledger) commit() {
	defer close(l.committed)
	for stopping := false; ; {
		select {
		case <-l.commitWake:
		case <-l.ctx.Done():
			stopping = true
		}
		l.mu.Lock()
		b, s := l.unwritten, l.spool
		if l.unwritten = nil; b != nil {
			l.writing = time.Now()
		}
		l.mu.Unlock()
		if b != nil {
			err := s.write(b.pieces)
			if err == nil {
				err = s.mark(b.records[len(b.records)-1].seq + 1)
			}
			l.mu.Lock()
			l.writing = time.Time{}
			l.settle(b, err)
			l.mu.Unlock()
			wake(l.keepWake)
		}
		if stopping && b == nil {
			return
		}
	}
}

// settle tells those who wait for a batch. After a failed write nobody knows what
// is on disk: its events and those that were to follow get no place, and a later
// epoch overrules them should they be found. mu is held.
func (l *Ledger) settle(b *batch, err error) {
	if err == nil {
		l.acknowledged += uint64(len(b.records))
		l.pending = append(l.pending, b.records...)
		close(b.done)
		return
	}
	l.refuse("the spool cannot be written: "+line(err), false)
	l.epoch++
	l.head, l.next = b.head, b.records[0].seq
	for _, b := range []*batch{b, l.unwritten} {
		if b == nil {
			continue
		}
		l.seamed = l.seamed && !slices.ContainsFunc(b.records, func(r record) bool { return r.seam })
		b.err = err
		close(b.done)
	}
	l.unwritten = nil
}

// refuse ends the recording, for good or until the next try. mu is held.
func (l *Ledger) refuse(why string, damaged bool) {
	if l.refused != why {
		l.o.Log.Error().Str("dir", l.o.Dir).Msg("what is done cannot be recorded: " + why)
		l.raise("what is done cannot be recorded, so nothing may be changed: " + why)
	}
	l.refused, l.damaged, l.tryAt = why, l.damaged || damaged, time.Now().Add(l.retry)
	l.broadcast()
	wake(l.keepWake)
}

// raise tells people of what happened while mu is held: whoever listens may want to
// note it here.
func (l *Ledger) raise(text string) {
	l.goroutines.Go(func() { l.o.Raise(alarm.Event{Kind: alarm.Audit, Text: text}) })
}

// line returns an error in one line; those of the driver have file names in them.
func line(err error) string { return neutral.Line(strings.ReplaceAll(err.Error(), "\n", "; ")) }

// ails reports whether an error is one that the disk may get over; damage is told
// too, and stays.
func (l *Ledger) ails(err error) bool {
	var d *damage
	var errno unix.Errno
	switch {
	case errors.As(err, &d):
	case errors.As(err, &errno):
		switch errno {
		case unix.ENOSPC, unix.EDQUOT, unix.EROFS, unix.EIO, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ESTALE, unix.ETIMEDOUT, unix.ENODEV:
		default:
			return false
		}
	default:
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refuse(line(err), d != nil)
	return true
}
