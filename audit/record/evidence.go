package record

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"github.com/rs/zerolog"
	gossh "golang.org/x/crypto/ssh"
	"k8s.io/klog/v2"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/cast"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust/logkey"
	"github.com/halligan-io/halligan/internal/version"
)

// Options of a daemon's evidence. All but Hold and Witnesses are required.
type Options struct {
	// StateDir is the daemon's; the evidence is in its folder audit.
	StateDir string
	// Origin is NODE.CLUSTER or NAME.bastion.
	Origin string
	Config Config
	// Now is the daemon's clock.
	Now func() time.Time
	// Hold keeps what the log cannot take.
	Hold ledger.Holder
	// Witnesses returns how many bastions there are to countersign; nil: none.
	Witnesses func() int
	// Raise takes alarms. It must not block.
	Raise func(alarm.Event)
	Log   zerolog.Logger
}

// Evidence is a daemon's own log with what belongs to it. Its methods may be called
// concurrently.
type Evidence struct {
	*ledger.Ledger
	*Doors
	// Recordings are those of sessions.
	Recordings *cast.Recorder

	o       Options
	ticking sync.WaitGroup
	stop    context.CancelFunc

	mu sync.Mutex // guards mark and since
	// mark are the events that were signed at since; they are countersigned, or
	// nobody has since then.
	mark  uint64
	since time.Time

	known sync.Mutex // guards all below; whoever has it may wait for the disk
	// host, with witness and recipient, is what the statement is made of.
	host      func() []gossh.Signer
	witness   ed25519.PublicKey
	recipient string
	certified []byte // the certificate under statement, and the log's key in it
	statement []byte
	unwritten bool // statement is not on disk yet
}

const (
	// tickEvery is how often is looked whether the host has another certificate,
	// and whether witnesses keep up.
	tickEvery = 5 * time.Second
	// lateAfter is when a tail that nobody countersigned is told of.
	lateAfter = time.Minute
	// stopWithin bounds the wait for the last event.
	stopWithin = 2 * time.Second
)

// Folder is where a daemon keeps its evidence below its state folder.
func Folder(stateDir string) string { return filepath.Join(stateDir, "audit") }

// silence keeps off standard error, which belongs to the daemon's own log, what the
// driver of the log and Kubernetes' encryption code tell klog: what matters of it
// comes back as an error.
var silence = sync.OnceFunc(func() { klog.SetLogger(logr.Discard()) })

// Open opens the log and records that the daemon starts. A disk that takes nothing is
// no error: the log's State tells.
func Open(o Options) (*Evidence, error) {
	if o.Witnesses == nil {
		o.Witnesses = func() int { return 0 }
	}
	silence()
	log, err := ledger.Open(ledger.Options{Dir: Folder(o.StateDir), Origin: o.Origin, Now: o.Now, MaxBytes: o.Config.MaxBytes, GenerationBytes: o.Config.GenerationBytes,
		SpoolBytes: o.Config.ReserveBytes, Hold: o.Hold, Raise: o.Raise, Log: o.Log})
	if err != nil {
		return nil, fmt.Errorf("opening the evidence log: %w", err)
	}
	recordings, err := cast.Open(cast.Options{Dir: filepath.Join(Folder(o.StateDir), "recordings"), Log: log, MaxBytes: o.Config.Recordings.MaxBytes, Input: o.Config.Recordings.Input,
		Now: o.Now, Logger: o.Log})
	if err != nil {
		_ = log.Close() // the first error tells
		return nil, fmt.Errorf("opening the recordings of sessions: %w", err)
	}
	e := &Evidence{Ledger: log, Doors: NewDoors(log), Recordings: recordings, o: o, since: time.Now()}
	text := fmt.Sprintf("version %s; %d events before", version.String(), log.State().Events)
	if taken, torn := log.Found(); taken > 0 || torn > 0 {
		text += fmt.Sprintf(", %d of them from the spool; %d bytes were torn and cut", taken, torn)
	}
	log.Note(audit.Event{Kind: audit.Start, Text: text})
	ctx, stop := context.WithCancel(context.Background())
	e.stop = stop
	e.ticking.Go(func() { e.tick(ctx) })
	return e, nil
}

// Close ends recordings, records the end and closes the log.
func (e *Evidence) Close() {
	e.stop()
	e.ticking.Wait()
	if err := e.Recordings.Close(); err != nil {
		e.o.Log.Warn().Msg("recordings: " + neutral.Line(err.Error()))
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopWithin)
	defer cancel()
	if _, err := e.Append(ctx, audit.Event{Kind: audit.Stop}); err != nil {
		e.o.Log.Warn().Msg("that the daemon ends is not in the evidence log: " + neutral.Line(err.Error()))
	}
	if err := e.Ledger.Close(); err != nil {
		e.o.Log.Warn().Msg("closing the evidence log: " + neutral.Line(err.Error()))
	}
}

// Raise tells people of an alarm, and writes it down where nothing else does.
func (e *Evidence) Raise(a alarm.Event) {
	e.o.Raise(a)
	e.Alarm(a)
}

// Believe writes down that a bundle came in force, whoever brought it.
func (e *Evidence) Believe(text string) {
	e.Note(audit.Event{Kind: audit.Alarm, Action: string(alarm.Bundle), Text: text})
}

// tick looks after what changes by itself.
func (e *Evidence) tick(ctx context.Context) {
	every := time.NewTicker(tickEvery)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-every.C:
			e.watch(e.State(), time.Now())
			e.Identity()
		}
	}
}

// watch notes how far the witnesses are.
func (e *Evidence) watch(s audit.State, now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if most(s.Witnessed) >= e.mark {
		e.mark, e.since = s.Signed, now
	}
}

func most(witnessed map[string]uint64) (n uint64) {
	for _, m := range witnessed {
		n = max(n, m)
	}
	return n
}

// Countersigned returns how many events the witness that is farthest has countersigned.
func (e *Evidence) Countersigned() uint64 { return most(e.State().Witnessed) }

// Warnings tells what is degraded, each in one line.
func (e *Evidence) Warnings() []string { return e.warnings(e.State(), time.Now()) }

func (e *Evidence) warnings(s audit.State, now time.Time) (all []string) {
	if s.Refused != "" {
		all = append(all, "nothing can be changed, since nothing can be recorded: "+s.Refused)
	}
	if s.Problem != "" {
		all = append(all, "the evidence log: "+s.Problem)
	}
	if _, problem := e.Recordings.State(); problem != "" {
		all = append(all, "recordings of sessions: "+problem)
	}
	if s.Lost > 0 {
		all = append(all, fmt.Sprintf("%d events that nobody waited for had no room in the evidence log", s.Lost))
	}
	e.watch(s, now)
	e.mu.Lock()
	late := now.Sub(e.since)
	e.mu.Unlock()
	if n := most(s.Witnessed); late > lateAfter && e.o.Witnesses() > 0 && n < s.Events {
		all = append(all, fmt.Sprintf("no bastion has countersigned the evidence for %v: nobody else has its last %d events", late.Round(time.Second), s.Events-n))
	}
	return all
}

// Status tells how the log is.
func (e *Evidence) Status() *halliganv1.AuditStatus {
	s := e.State()
	return &halliganv1.AuditStatus{Events: s.Events, Signed: s.Signed, Witnessed: s.Witnessed, Vkey: s.VKey, Generation: uint64(max(0, s.Generation)), Bytes: s.Bytes, //nolint:gosec // not negative
		Reserve: int64(s.Reserve), Problem: s.Problem, Refused: s.Refused, Lost: s.Lost}
}

// Certified says whose keys the statement is to name: those of the SSH host, which
// also signs it, of countersignatures at a bastion, and of before-images at an
// agent. The statement is made at once, and again when the host has another
// certificate, or the log another key.
func (e *Evidence) Certified(host func() []gossh.Signer, witness ed25519.PublicKey, recipient string) {
	e.known.Lock()
	e.host, e.witness, e.recipient, e.certified = host, witness, recipient, nil
	e.known.Unlock()
	e.Identity()
}

// Identity returns the newest statement, nil while there is none.
func (e *Evidence) Identity() []byte {
	e.known.Lock()
	defer e.known.Unlock()
	if e.host == nil {
		return nil
	}
	for _, signer := range e.host() {
		cert, ok := signer.PublicKey().(*gossh.Certificate)
		if !ok {
			continue
		}
		key := e.Key()
		certified := append(cert.Marshal(), key...)
		if bytes.Equal(certified, e.certified) {
			continue
		}
		statement, err := logkey.Sign(logkey.Statement{Server: e.o.Origin, Log: key, Witness: e.witness, Age: e.recipient, Signed: e.o.Now()}, signer, cert)
		if err != nil {
			e.o.Log.Error().Msg(neutral.Line(err.Error()))
			continue
		}
		e.certified, e.statement, e.unwritten = certified, statement, true
	}
	if e.unwritten {
		if err := durable.Write(filepath.Join(e.Dir(), "identity"), e.statement); err == nil {
			e.unwritten = false
		}
	}
	return bytes.Clone(e.statement)
}
