package report

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/halligan-io/halligan/audit/cast"
	"github.com/halligan-io/halligan/internal/neutral"
)

// Bounds of what a page holds of recordings: of each, and of all, in bytes of text;
// and of a terminal, in characters. A recording is as hostile as whoever was
// recorded, and a player makes room for every cell that it is told of.
const (
	maxRecording, maxRecordings = 4 << 20, 24 << 20
	maxColumns, maxRows         = 400, 120
	maxTranscript               = 2000 // lines
	maxLabel                    = 200  // of a line that is run, in bytes
)

// pause is what a longer one is shortened to, in seconds: nobody watches a prompt.
const pause = 2.0

// tape is a recording as a page plays it, and as plain text.
type tape struct {
	Columns, Rows int
	// Events are [seconds, kind, text], with pauses shortened, and at is when each
	// was: the first is as long after the beginning as it was.
	Events []any
	at     []float64
	// Seconds is how long it took, Shown how long it plays, and Begun when it began,
	// in seconds since 1970.
	Seconds    float64
	Shown      float64
	Begun      int64
	Transcript []string
	// Cut says what was left out.
	Cut string
}

// readTape takes of a recording what a terminal would show and which lines were run,
// and nothing else of it: no input, no header but the size, no resizing beyond bounds.
func readTape(data []byte) (tape, error) {
	h, events, err := cast.Read(bytes.NewReader(data))
	if err != nil {
		return tape{}, err
	}
	t := tape{Columns: clamp(h.Width, 80, maxColumns), Rows: clamp(h.Height, 24, maxRows), Begun: h.Timestamp, Events: []any{}}
	size := 0
	var resizing resizes
	for e, err := range events {
		if errors.Is(err, cast.ErrTorn) {
			t.Cut = "It ends in the middle of a line, as it does when a machine loses power."
			break
		}
		if err != nil {
			return t, err
		}
		if size += len(e.Text); size > maxRecording {
			t.Cut = fmt.Sprintf("It is longer than %d MiB, and its end is not shown here: halligan audit replay has it.", maxRecording>>20)
			break
		}
		switch e.Kind {
		case cast.Output:
			if text := resizing.drop(e.Text); text != "" {
				t.add(e.At.Seconds(), "o", text)
			}
		case cast.Marker:
			t.add(e.At.Seconds(), "m", neutral.LineMax(e.Text, maxLabel))
		case cast.Resize:
			var columns, rows int
			if n, err := fmt.Sscanf(e.Text, "%dx%d", &columns, &rows); err == nil && n == 2 {
				t.add(e.At.Seconds(), "r", fmt.Sprintf("%dx%d", clamp(columns, 80, maxColumns), clamp(rows, 24, maxRows)))
			}
		}
	}
	if _, events, err = cast.Read(bytes.NewReader(data)); err != nil {
		return t, err
	}
	for l, err := range cast.Lines(events) {
		if err != nil {
			break // said above
		}
		if len(t.Transcript) == maxTranscript {
			t.Transcript = append(t.Transcript, "… and more, which halligan audit replay has")
			break
		}
		if l.Kind == cast.Output {
			t.Transcript = append(t.Transcript, l.Text)
		}
	}
	return t, nil
}

// add adds an event. A recording whose times go back stands still meanwhile.
func (t *tape) add(at float64, kind, text string) {
	at = max(at, t.Seconds)
	t.Shown += min(at-t.Seconds, pause)
	t.Seconds = at
	t.at = append(t.at, at)
	t.Events = append(t.Events, []any{math.Round(t.Shown*1000) / 1000, kind, text})
}

// shown is when the player shows a moment of the recording.
func (t *tape) shown(at float64) float64 {
	i, exact := slices.BinarySearch(t.at, at)
	if !exact {
		i--
	}
	if i < 0 {
		return min(at, pause)
	}
	return t.Events[i].([]any)[0].(float64) + min(at-t.at[i], pause)
}

func clamp(n, otherwise, most int) int {
	if n <= 0 {
		return otherwise
	}
	return min(n, most)
}

// resizes removes from a stream of output the sequences with which a program asks
// the terminal to change its size (XTWINOPS: CSI … t), which may come in pieces.
type resizes struct{ held string }

func (r *resizes) drop(text string) string {
	text = r.held + text
	r.held = ""
	var b strings.Builder
	for {
		i := strings.IndexAny(text, "\x1b\u009b")
		if i < 0 {
			return b.String() + text
		}
		b.WriteString(text[:i])
		text = text[i:]
		rest, isCSI := strings.CutPrefix(text, "\u009b")
		if !isCSI {
			rest, isCSI = strings.CutPrefix(text, "\x1b[")
		}
		if !isCSI {
			if text == "\x1b" {
				r.held = text
				return b.String()
			}
			b.WriteByte(text[0])
			text = text[1:]
			continue
		}
		n := strings.IndexFunc(rest, func(c rune) bool { return c < 0x20 || c > 0x3f })
		switch {
		case n < 0 && len(rest) < 64:
			r.held = text
			return b.String()
		case n >= 0 && rest[n] == 't':
			text = rest[n+1:]
		default:
			skip := len(text) - len(rest)
			b.WriteString(text[:skip])
			text = rest
		}
	}
}
