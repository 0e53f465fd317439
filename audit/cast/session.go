package cast

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
)

// What a session is.
const (
	Shell     = "shell"     // on a terminal
	Exec      = "exec"      // one line, the client's command
	Script    = "script"    // lines from a client without a terminal
	Subsystem = "subsystem" // an API in it: what is called is on record, and not as text
)

// About says what is to be recorded.
type About struct {
	Who trust.Identity
	// What is Shell, Exec, Script or Subsystem.
	What string
	// Command is the exec line, or the subsystem's name.
	Command string
	// At is where, for people.
	At string
	// Term, Columns and Rows are the terminal's, if there is one.
	Term             string
	Columns, Rows    int
	Reason, Incident string
}

// maxCommand bounds the command line in events and headers, in bytes.
const maxCommand = 4096

// Session is one that is being recorded. That of a nil Recorder records nothing.
// Its methods may be called concurrently.
type Session struct {
	r      *Recorder
	name   string
	of     string // whose it is
	about  About
	begun  time.Time // of the monotonic clock
	at     time.Time // of the daemon's
	ctx    context.Context
	cancel context.CancelCauseFunc

	mu      sync.Mutex // guards what follows
	file    *os.File   // nil where there is none (yet)
	line    bytes.Buffer
	out, in text
	// size is the length of the file, all of it whole lines. digest is of what
	// follows from, and unsaid the chunk before that, if the log has not got it.
	size, from int64
	digest     hash.Hash
	unsaid     *audit.Chunk
	named      bool // the file's name is durable
	// ofLine is how much output the line that runs has had, hidden that what it
	// shows is nobody else's to see.
	ofLine int64
	hidden bool
	// failing says why nothing is recorded at present; the next try is due at
	// again, and lost bytes were not recorded.
	failing error
	again   time.Time
	lost    int64
	// warning is what the person has not been told.
	warning string
	over    bool
}

// errFull is why recordings stop at their bounds.
var errFull = errors.New("recordings take all the room that they may")

// Begin records that a session begins, and then the session, until End, which must
// be called. Where it cannot be recorded, responders and commanders get a Session
// all the same, which tries again, and others an error.
func (r *Recorder) Begin(ctx context.Context, about About) (*Session, error) {
	s := &Session{r: r, about: about, begun: time.Now(), digest: sha256.New()}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	if r == nil {
		return s, nil
	}
	s.at = r.o.Now()
	e := s.event(audit.Session)
	e.Reason, e.Incident = about.Reason, about.Incident
	e.Text = neutral.LineMax(about.Command, maxCommand)
	if about.What == Subsystem {
		r.o.Log.Note(e)
		return s, nil
	}
	s.name, s.of = trust.NewSession(s.at), owner(s.title())
	e.Target = s.name
	s.mu.Lock()
	err := s.open()
	s.mu.Unlock()
	if err == nil {
		r.mu.Lock()
		r.live[s] = struct{}{}
		r.mu.Unlock()
		r.o.Log.Note(e)
		return s, nil
	}
	e.Outcome, e.Error = Unrecorded, err.Error()
	if !allowed(about.Who) {
		e.Kind = audit.Refusal
		r.o.Log.Note(e)
		s.cancel(nil)
		return nil, refused(err)
	}
	r.later(e)
	s.mu.Lock()
	s.failed(err)
	s.mu.Unlock()
	r.mu.Lock()
	r.live[s] = struct{}{}
	r.mu.Unlock()
	return s, nil
}

// Channel is where a session goes on: what Serve needs of a *sshserver.Session,
// whose comments hold.
type Channel interface {
	Stderr() io.Writer
	Held() context.Context
	Context() context.Context
	Exit(status int) error
}

// Serve begins a session, has it served and ends it, on record and for the client.
// What serve returns is its exit status.
func (r *Recorder) Serve(c Channel, about About, serve func(*Session) int) {
	tell := func(err error) int {
		_, _ = fmt.Fprintln(c.Stderr(), "halligan: "+neutral.LineMax(err.Error(), 1024)) // who is gone need not be told
		return fault.CodeOf(err).Exit()
	}
	s, err := r.Begin(c.Context(), about)
	if err != nil {
		_ = c.Exit(tell(err)) // as above
		return
	}
	status := fault.Failed.Exit() // of a panic
	defer func() { s.End(status, cmp.Or(context.Cause(c.Held()), s.Refused())) }()
	if status = serve(s); s.Refused() != nil {
		status = tell(s.Refused())
	}
	_ = c.Exit(status) // as above
}

func refused(why error) *fault.Error {
	return fault.New(fault.AuditUnavailable, "only responders and commanders go on unrecorded; have one make room there", "this session cannot be recorded: %v", why)
}

// event returns one about the session.
func (s *Session) event(kind audit.Kind) audit.Event {
	return audit.Event{Kind: kind, Actor: audit.ActorOf(s.about.Who), Session: s.about.Who.Session, Action: s.about.What, Target: s.name, Drill: s.about.Who.Scope.Drill}
}

// Context is that of Begin, which ends too when the session may not go on
// unrecorded; its cause is then a *fault.Error.
func (s *Session) Context() context.Context { return s.ctx }

// Refused is why the session may not go on, nil: it may. Errors that only say that
// somebody has gone are not meant.
func (s *Session) Refused() error {
	if err := context.Cause(s.ctx); fault.Is(err, fault.AuditUnavailable) {
		return err
	}
	return nil
}

// Warning returns once what the person is to be told, empty: nothing.
func (s *Session) Warning() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.warning
	s.warning = ""
	return w
}

// Output records what is about to be shown. An error says that the session must
// not go on; it is Context's, too.
func (s *Session) Output(p []byte) error {
	if s.r == nil || s.name == "" {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || s.hidden {
		return nil
	}
	before := s.ofLine
	if s.ofLine += int64(len(p)); s.ofLine > maxOfLine {
		if before <= maxOfLine {
			return s.put(Output, fmt.Appendf(nil, "\r\n[what one line shows beyond %d MiB is not recorded]\r\n", maxOfLine>>20))
		}
		return nil
	}
	return s.put(Output, s.out.take(p, true))
}

// Input records what was typed, where that is wanted.
func (s *Session) Input(p []byte) {
	if s.r == nil || s.name == "" || !s.r.o.Input {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over {
		_ = s.put(Input, s.in.take(p, false)) // Context tells
	}
}

// Resize records a new size of the terminal.
func (s *Session) Resize(columns, rows int) {
	if s.r == nil || s.name == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over {
		_ = s.put(Resize, fmt.Appendf(nil, "%dx%d", columns, rows)) // as above
	}
}

// Writer returns w with what is written to it recorded as output, before it is
// shown. It fails where the session must not go on.
func (s *Session) Writer(w io.Writer) io.Writer { return shown{s, w} }

// Reader returns r with what is read from it recorded as input.
func (s *Session) Reader(r io.Reader) io.Reader { return typed{s, r} }

type shown struct {
	*Session
	w io.Writer
}

func (t shown) Write(p []byte) (int, error) {
	if err := t.Output(p); err != nil {
		return 0, err
	}
	return t.w.Write(p)
}

type typed struct {
	*Session
	r io.Reader
}

func (t typed) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.Input(p[:n])
	return n, err
}

// Next says that a line begins, or "" that one has ended. Nothing of it is hidden.
// One that no terminal has shown is seen in the recording all the same.
func (s *Session) Next(line string, unseen bool) {
	if s.r == nil || s.name == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ofLine, s.hidden = 0, false
	if line == "" || s.over {
		return
	}
	line = neutral.LineMax(line, maxCommand)
	_ = s.put(Marker, []byte(line)) // as above
	if unseen {
		_ = s.put(Output, []byte("> "+line+"\r\n")) // as above
	}
}

// Hide has nothing recorded of what is shown until Next.
func (s *Session) Hide() {
	if s.r == nil || s.name == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.hidden && !s.over {
		_ = s.put(Output, []byte("[what was revealed is not recorded]\r\n")) // as above
	}
	s.hidden = true
}

// End records that the session has ended, with the status that the client was
// told, or with why it had to end.
func (s *Session) End(status int, why error) {
	defer s.cancel(nil)
	if s.r == nil {
		return
	}
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		return
	}
	if s.file != nil && s.failing == nil {
		for kind, t := range map[string]*text{Output: &s.out, Input: &s.in} {
			if len(t.held) > 0 {
				_ = s.put(kind, t.held) // nothing goes on
			}
		}
	}
	s.over = true
	e := s.event(audit.SessionEnd)
	e.Outcome, e.Text = "ok", fmt.Sprintf("exit status %d after %v", status, time.Since(s.begun).Round(time.Millisecond))
	if status != 0 || why != nil {
		e.Outcome = "failed"
	}
	if why != nil {
		e.Error, e.ErrorCode = why.Error(), string(fault.CodeOf(why))
	}
	s.r.mu.Lock() // as long as s.mu, so that the last digest is recorded once
	delete(s.r.live, s)
	kept := s.file != nil && len(s.r.ended) < maxWaiting
	if kept {
		s.r.ended = append(s.r.ended, s)
	}
	s.r.mu.Unlock()
	if s.file != nil && !kept {
		s.r.share(s.of, -s.size)
		s.file.Close() // the next start settles it
	}
	s.mu.Unlock()
	s.r.o.Log.Note(e)
	if kept {
		s.r.poke()
	}
}

// put records an event, or notes that this is not possible. The lock is held, as
// for what follows.
func (s *Session) put(kind string, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	if s.failing != nil {
		if time.Now().Before(s.again) || !s.resumed() {
			s.lost += int64(len(p))
			return context.Cause(s.ctx)
		}
	}
	for len(p) > 0 {
		// A line of a recording is short enough for any reader.
		n := len(p)
		if n > 16<<10 {
			for n = 16 << 10; n > 1 && !utf8.RuneStart(p[n]); n-- {
			}
		}
		if err := s.write(kind, p[:n]); err != nil {
			s.lost += int64(len(p))
			if !allowed(s.about.Who) {
				s.cancel(refused(err))
			}
			e := s.event(audit.Recording)
			e.Outcome, e.Error = Unrecorded, err.Error()
			s.r.later(e)
			s.failed(err)
			return context.Cause(s.ctx)
		}
		p = p[n:]
	}
	return nil
}

// failed notes why nothing is recorded.
func (s *Session) failed(err error) {
	s.failing, s.again = err, time.Now().Add(chunkEvery)
	s.warning = fmt.Sprintf("warning: this session is not recorded (%s), which is itself on record", neutral.LineMax(err.Error(), 200))
}

// resumed reports whether the session can be recorded again.
func (s *Session) resumed() bool {
	err := s.open()
	if err == nil {
		err = s.write(Output, fmt.Appendf(nil, "\r\n[%d bytes were not recorded here]\r\n", s.lost))
	}
	if err != nil {
		s.failing, s.again = err, time.Now().Add(chunkEvery)
		return false
	}
	e := s.event(audit.Recording)
	e.Outcome, e.Text = Recorded, fmt.Sprintf("%d bytes of the session are missing", s.lost)
	s.r.later(e)
	s.failing, s.lost, s.warning = nil, 0, "note: this session is recorded again"
	return true
}

// open makes the file, if there is none.
func (s *Session) open() error {
	if s.file != nil {
		return nil
	}
	o := s.r.o
	if err := durable.Dir(o.Dir); err != nil {
		return err
	}
	path, err := File(o.Dir, s.name)
	if err != nil {
		return err
	}
	if s.file, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return err
	}
	h := Header{Version: 2, Width: s.about.Columns, Height: s.about.Rows, Timestamp: s.at.Unix(), Title: s.title()}
	if s.about.What == Exec {
		h.Command = neutral.LineMax(s.about.Command, maxCommand)
	}
	if h.Width <= 0 || h.Height <= 0 {
		h.Width, h.Height = 120, 32
	}
	if s.about.Term != "" {
		h.Env = map[string]string{"TERM": neutral.LineMax(s.about.Term, 64)}
	}
	text, err := json.Marshal(h)
	if err == nil {
		err = s.add(append(text, '\n'))
	}
	if err != nil {
		s.file.Close()
		os.Remove(path)
		s.file = nil
	}
	return err
}

func (s *Session) title() string {
	title := s.about.Who.Person
	if s.about.Who.Role != trust.None {
		title += " as " + s.about.Who.Role.String()
	}
	return neutral.LineMax(title+" at "+s.about.At, 256)
}

func (s *Session) write(kind string, p []byte) error {
	s.line.Reset()
	encode(&s.line, time.Since(s.begun), kind, string(p))
	return s.add(s.line.Bytes())
}

// add appends a whole line, in one write, so that a process that is killed leaves
// none torn but where the kernel does.
func (s *Session) add(line []byte) error {
	all := s.r.used.Add(int64(len(line)))
	err := errFull
	shared := s.r.share(s.of, int64(len(line)))
	if shared && all <= s.r.o.MaxBytes && s.size+int64(len(line)) <= s.r.o.MaxBytes/8 {
		_, err = s.file.Write(line)
	}
	if err != nil {
		s.r.used.Add(-int64(len(line)))
		if shared {
			s.r.share(s.of, -int64(len(line)))
		}
		// What of the line was written is taken back; that takes no room.
		if cut := s.file.Truncate(s.size); cut == nil {
			_, cut = s.file.Seek(s.size, 0)
			err = errors.Join(err, cut)
		}
		return err
	}
	s.size += int64(len(line))
	s.digest.Write(line)
	if s.size-s.from >= chunkBytes || all > s.r.o.MaxBytes/8*7 {
		s.r.poke()
	}
	return nil
}

// vouch puts the digest of what was recorded into the log, when that is durable:
// all of it, or only where it is long enough or the last. It reports whether there
// is more to vouch for at once. Only the Recorder calls it, never twice at a time.
func (s *Session) vouch(all bool) (more bool, err error) {
	s.mu.Lock()
	if s.unsaid == nil {
		length := s.size - s.from
		if s.file == nil || !s.over && (length == 0 || !all && length < chunkBytes) {
			s.mu.Unlock()
			return false, nil
		}
		s.unsaid = &audit.Chunk{Session: s.name, Offset: s.from, Length: length, SHA256: hex.EncodeToString(s.digest.Sum(nil)), Last: s.over}
		s.digest.Reset()
		s.from = s.size
	}
	c, f, named := s.unsaid, s.file, s.named
	s.mu.Unlock()
	if err := f.Sync(); err != nil {
		return false, err
	}
	if !named {
		if err := durable.SyncDir(s.r.o.Dir); err != nil {
			return false, err
		}
	}
	e := s.event(audit.Recording)
	e.Chunk = c
	if err := s.r.append(e); err != nil {
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unsaid, s.named = nil, true
	if !c.Last {
		return s.over, nil
	}
	s.r.finished(s, s.size)
	return false, errors.Join(f.Chmod(0o400), f.Close())
}

// text is a stream of bytes on their way into a recording, which is of whole
// characters.
type text struct {
	held []byte // the beginning of a character
	cr   bool   // the last was a carriage return
}

// take returns what can be recorded of p. Line feeds of a stream for a terminal get
// their carriage return, as a terminal's driver adds it.
func (t *text) take(p []byte, lines bool) []byte {
	all := p
	if len(t.held) > 0 {
		all = append(t.held, p...)
		t.held = nil
	}
	for i := 1; i < utf8.UTFMax && i <= len(all); i++ {
		if start := len(all) - i; utf8.RuneStart(all[start]) {
			if !utf8.FullRune(all[start:]) {
				t.held, all = bytes.Clone(all[start:]), all[:start]
			}
			break
		}
	}
	if !lines || len(all) == 0 {
		return all
	}
	cr := t.cr
	t.cr = all[len(all)-1] == '\r'
	if !cr && bytes.IndexByte(all, '\r') < 0 {
		return bytes.ReplaceAll(all, []byte("\n"), []byte("\r\n"))
	}
	done := make([]byte, 0, len(all)+bytes.Count(all, []byte{'\n'}))
	for _, b := range all {
		if b == '\n' && !cr {
			done = append(done, '\r')
		}
		cr = b == '\r'
		done = append(done, b)
	}
	return done
}
