package hostlogs

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/halligan-io/halligan/agent/node"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// maxEntry bounds an entry of the journal as JSON, in which a byte can take four.
const maxEntry = 1 << 20

// searched is how many entries of the journal are searched for a text.
const searched = 50_000

// journalctl returns the program, "" where there is none. What PATH says does not
// count.
func (q *query) journalctl() string {
	for _, program := range []string{q.Journalctl, "/usr/bin/journalctl", "/bin/journalctl"} {
		if st, err := os.Stat(program); program != "" && err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return program
		}
	}
	return ""
}

// journal reads units' entries. found is false where there are none and nothing but
// the units narrowed it.
func (q *query) journal(ctx context.Context, program string, l node.Logs) (found bool, err error) {
	// --all: else what is long or not text would be left out.
	args := []string{"--no-pager", "--quiet", "--all", "--output=json", "--output-fields=MESSAGE"}
	for _, u := range l.Units {
		args = append(args, "--unit="+u)
	}
	entries := q.tail
	if q.req.GetGrep() != "" {
		entries = searched
	}
	args = append(args, "--lines="+strconv.Itoa(entries))
	if !q.since.IsZero() {
		args = append(args, fmt.Sprintf("--since=@%d", q.since.Unix()))
	}
	if q.req.GetFollow() {
		args = append(args, "--follow")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env, cmd.WaitDelay = []string{"LC_ALL=C", "TZ=UTC"}, time.Second
	var said limited
	cmd.Stderr = &said
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return false, fault.New(fault.Failed, "look at the node itself", "running %s: %w", program, err)
	}
	if err := q.out.from("journal of " + strings.Join(l.Units, ", ")); err != nil {
		return true, err
	}
	entriesSeen := 0
	sink := q.out.line
	var past *ring
	if !q.req.GetFollow() {
		past = &ring{max: q.tail, room: maxHeld}
		sink = past.push
	}
	asm := &assembler{max: maxEntry}
	err = pieces(stdout, func(piece []byte, idle bool) error {
		if q.read += int64(len(piece)); past != nil && q.read > maxRead {
			q.out.note("the journal was read up to %d MiB only: narrow it with --since", maxRead>>20)
			return io.EOF
		}
		if err := asm.feed(piece, func(entry []byte, cut bool) error {
			entriesSeen++
			return q.entry(entry, cut, sink)
		}); err != nil || !idle {
			return err
		}
		return q.out.flush()
	})
	stopped := err != nil
	if err == io.EOF {
		err = nil
	}
	gone := ctx.Err() != nil
	if stopped {
		cancel()
	}
	ended := cmd.Wait()
	if past != nil {
		for _, s := range past.lines {
			if serr := q.out.line(s); err == nil {
				err = serr
			}
		}
	}
	switch {
	case err != nil:
		return true, err
	case gone:
		return true, ctx.Err()
	case ended != nil && !stopped:
		return true, fault.New(fault.Failed, "look at the node itself", "%s: %w: %s", program, ended, neutral.LineMax(said.String(), 256))
	case entriesSeen == 0 && q.since.IsZero():
		return false, nil
	case entriesSeen == 0:
		q.out.note("no lines that new in the journal of %s", strings.Join(l.Units, ", "))
	}
	if l.Note != "" {
		q.out.note("%s", l.Note)
	}
	return true, nil
}

// entry passes on the lines of one entry.
func (q *query) entry(entry []byte, cut bool, sink func(string) error) error {
	var e struct {
		Message json.RawMessage `json:"MESSAGE"`
		Time    string          `json:"__REALTIME_TIMESTAMP"` // microseconds
	}
	if cut || json.Unmarshal(entry, &e) != nil {
		q.out.note("an entry of the journal is left out: it is too large or no JSON")
		return nil
	}
	var at time.Time
	if us, err := strconv.ParseInt(e.Time, 10, 64); err == nil {
		at = time.UnixMicro(us)
	}
	var text string
	if json.Unmarshal(e.Message, &text) != nil {
		var numbers []int // what is no text comes as its bytes
		if json.Unmarshal(e.Message, &numbers) != nil {
			return nil
		}
		raw := make([]byte, len(numbers))
		for i, n := range numbers {
			raw[i] = byte(n)
		}
		text = string(raw)
	}
	lines := &assembler{max: maxRaw}
	emit := func(line []byte, cut bool) error { return q.line(line, cut, at, sink) }
	if err := lines.feed([]byte(text), emit); err != nil {
		return err
	}
	return lines.flush(emit)
}

// pieces reads to the end, and says after each piece whether nothing more was there
// at that moment.
func pieces(r io.Reader, take func(piece []byte, idle bool) error) error {
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if terr := take(buf[:n], n < len(buf)); terr != nil {
				return terr
			}
		}
		if err != nil {
			return nil
		}
	}
}

// limited keeps the beginning of what is written.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	l.Buffer.Write(p[:min(len(p), max(0, 1024-l.Len()))])
	return len(p), nil
}
