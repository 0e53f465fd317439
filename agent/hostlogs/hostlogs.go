// Package hostlogs reads the logs of a node's own control plane: from the files of
// its kubelet, from other files that the distribution or the operator names, and
// from the systemd journal. It is for the hour in which `kubectl logs` has nobody to
// ask.
//
// The journal is read by journalctl, which is run with fixed arguments: no
// pure-Go reader of its files is kept well enough to be trusted with them as root.
// Without journalctl, what is only in the journal is said to be out of reach.
//
// It must never hand out the API server's audit log, nor a token that it can tell
// from other text, nor follow a link out of the folders of logs: containers with a
// share in /var/log can lay those. It must never take more memory, time or disk
// reads than its bounds, whatever is in the files, and it stops nobody from writing
// them. It stands on floor 4, above agent/node.
package hostlogs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/halligan-io/halligan/agent/node"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// Bounds of one call.
const (
	defaultTail = 1000     // lines
	maxTail     = 10_000   // lines
	maxHeld     = 8 << 20  // bytes of lines of the past
	maxRead     = 64 << 20 // bytes of files, as they are when unpacked
	maxRaw      = 64 << 10 // bytes of a line that are looked at
	maxLine     = 8 << 10  // bytes of a line that are shown
	maxGrep     = 1 << 10  // bytes
	maxNotes    = 32
	maxPast     = 30 * time.Second // without following
	maxFollow   = time.Hour
	maxTracked  = 32 // files that are followed
	batchLines  = 100
	batchBytes  = 64 << 10
)

// maxReaders bounds how many read at a time, each within the bounds above.
const maxReaders = 4

// Options of a reader.
type Options struct {
	// Root is "/", or a folder that stands for it; Distribution names the row of
	// agent/node, if it is configured.
	Root, Distribution string
	// Files are read instead of what the row says, by component. They are absolute
	// and may be patterns.
	Files map[string][]string
	// Journalctl is the program; "": wherever the system has it.
	Journalctl string
	Now        func() time.Time
	// Poll is how often what is followed is looked at; 0: twice a second.
	Poll time.Duration
}

// Reader reads logs. Its methods may be called concurrently.
type Reader struct {
	Options
	places chan struct{}
}

// New returns a reader. It looks at nothing before it is asked.
func New(o Options) *Reader {
	if o.Poll == 0 {
		o.Poll = 500 * time.Millisecond
	}
	return &Reader{Options: o, places: make(chan struct{}, maxReaders)}
}

// Check returns what is wrong with files that an operator names for a component.
func Check(component string, files []string) error {
	if !slices.Contains(node.Components(), component) {
		return fmt.Errorf("%q is none of %s", component, strings.Join(node.Components(), ", "))
	}
	for _, f := range files {
		switch {
		case !strings.HasPrefix(f, "/"):
			return fmt.Errorf("%q is not an absolute path", f)
		case isAudit(f):
			return fmt.Errorf("%q is an audit log by its name: those are not handed out", f)
		}
	}
	return nil
}

// query is one call.
type query struct {
	*Reader
	req   *halliganv1.LogsRequest
	since time.Time // zero: from the beginning
	tail  int
	out   *batch
	read  int64 // bytes so far
	// audit counts lines of the API server's audit log, which were left out.
	audit int
}

// Read sends what the request asks for: the past in its order, then, if it follows,
// what comes, until the context or its time ends.
func (r *Reader) Read(ctx context.Context, req *halliganv1.LogsRequest, send func(*halliganv1.LogLines) error) error {
	component := req.GetComponent()
	if !slices.Contains(node.Components(), component) {
		return fault.New(fault.Usage, "name one of "+strings.Join(node.Components(), ", "), "there is no component %q", neutral.LineMax(component, 64))
	}
	tail := int(req.GetTail())
	if tail == 0 {
		tail = defaultTail
	}
	if tail > maxTail {
		return fault.New(fault.Usage, "narrow it with since or grep", "at most the last %d lines are handed out", maxTail)
	}
	if len(req.GetGrep()) > maxGrep {
		return fault.New(fault.Usage, "look for less", "the text that is looked for has more than %d bytes", maxGrep)
	}
	select {
	case r.places <- struct{}{}:
		defer func() { <-r.places }()
	default:
		return fault.New(fault.Unreachable, "try again, or end one that follows", "%d others read logs on this node", maxReaders)
	}
	within := maxPast
	if req.GetFollow() {
		within = maxFollow
	}
	late := errors.New("late")
	ctx, cancel := context.WithTimeoutCause(ctx, within, late)
	defer cancel()
	q := &query{Reader: r, req: req, tail: tail, out: &batch{send: send}}
	if s := req.GetSinceSeconds(); s > 0 {
		q.since = r.Now().Add(-time.Duration(s) * time.Second)
	}
	err := q.run(ctx)
	if ctx.Err() != nil && context.Cause(ctx) == late {
		q.out.note("ended after %s: ask again for more", within)
		err = nil
	}
	if q.audit > 0 {
		q.out.note("%d lines of the API server's audit log are left out", q.audit)
	}
	return errors.Join(err, q.out.flush())
}

func (q *query) run(ctx context.Context) error {
	where := q.where()
	if files := q.list(where); len(files) > 0 {
		return q.files(ctx, where, files)
	}
	var looked []string
	for _, l := range where {
		looked = slices.Concat(looked, l.Pods, l.Links, l.Files)
		if len(l.Units) == 0 {
			continue
		}
		program := q.journalctl()
		if program == "" {
			looked = append(looked, "the journal of "+strings.Join(l.Units, ", ")+", for which there is no journalctl here")
			continue
		}
		found, err := q.journal(ctx, program, l)
		if found || err != nil {
			return err
		}
		looked = append(looked, "the journal of "+strings.Join(l.Units, ", "))
	}
	for _, l := range where {
		if l.Note != "" {
			q.out.note("%s", l.Note)
		}
	}
	return fault.New(fault.NotFound, "name its files in the agent's configuration (logs), or look at another node", "no log of the %s on this node: looked at %s",
		q.req.GetComponent(), strings.Join(looked, ", "))
}

// where returns the places of the component's logs.
func (q *query) where() []node.Logs {
	if files := q.Files[q.req.GetComponent()]; len(files) > 0 {
		return []node.Logs{{Files: files}}
	}
	return node.LogsOf(q.Root, q.Distribution)[q.req.GetComponent()]
}

// line passes a line on that is asked for, made safe, to a sink. at is when it was
// written, zero where that is not known.
func (q *query) line(text []byte, cut bool, at time.Time, sink func(string) error) error {
	if !at.IsZero() && at.Before(q.since) {
		return nil
	}
	if isAuditEvent(text) {
		q.audit++
		return nil
	}
	s := string(mask(text))
	if !strings.Contains(s, q.req.GetGrep()) {
		return nil
	}
	s = strings.ReplaceAll(strings.TrimRight(s, "\r"), "\t", "    ")
	if cut {
		s += "…"
	}
	return sink(neutral.LineMax(s, maxLine))
}

// batch sends lines some at a time.
type batch struct {
	send   func(*halliganv1.LogLines) error
	source string
	lines  []string
	bytes  int
	notes  int
}

// from says where the next lines are from.
func (b *batch) from(source string) error {
	if source = neutral.LineMax(source, 1024); source == b.source {
		return nil
	}
	err := b.flush()
	b.source = source
	return err
}

func (b *batch) line(s string) error {
	b.lines = append(b.lines, s)
	if b.bytes += len(s); len(b.lines) < batchLines && b.bytes < batchBytes {
		return nil
	}
	return b.flush()
}

func (b *batch) flush() error {
	if len(b.lines) == 0 {
		return nil
	}
	err := b.send(&halliganv1.LogLines{Lines: b.lines, Source: b.source})
	b.lines, b.bytes = nil, 0
	return err
}

// note sends a remark; what keeps it from being sent keeps the lines, too.
func (b *batch) note(text string, args ...any) {
	if b.notes++; b.notes <= maxNotes {
		_ = b.flush()
		_ = b.send(&halliganv1.LogLines{Note: neutral.LineMax(fmt.Sprintf(text, args...), 1024)})
	}
}

// ring keeps the last lines.
type ring struct {
	lines            []string
	max, bytes, room int
	// full says that lines were dropped for their bytes.
	full bool
}

func (r *ring) push(s string) error {
	r.lines = append(r.lines, s)
	r.bytes += len(s)
	drop := 0
	for len(r.lines)-drop > r.max || r.bytes > r.room {
		r.full = r.full || len(r.lines)-drop <= r.max
		r.bytes -= len(r.lines[drop])
		r.lines[drop] = ""
		drop++
	}
	r.lines = r.lines[drop:]
	return nil
}
