package cast

import (
	"errors"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/halligan-io/halligan/internal/neutral"
)

// Line is a line of a recording, as it was seen last.
type Line struct {
	// At is when it was complete.
	At time.Duration
	// Kind is Output, or Input for what was typed.
	Kind string
	// Text holds nothing that acts on a terminal.
	Text string
}

const (
	// maxRow bounds a line in characters; a longer one goes on in the next.
	maxRow = 4096
	// rowsKept is how far a line editor can go back up in what it has written.
	rowsKept = 16
	// maxGrowth is how many bytes of lines one of a recording may become. An escape
	// becomes six; by moving the cursor a few could become thousands.
	maxGrowth = 16
)

var errMore = errors.New("what follows moves the cursor far more than it shows")

// Lines turns events into lines of plain text. It follows what the line editors of
// shells do with the cursor. Any other escape sequence becomes visible, and a line
// that is changed after another followed comes again, so that none that was
// complete can be hidden.
func Lines(events iter.Seq2[Event, error]) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		p := page{rows: []row{{}}}
		room := 64 << 10
		give := func() bool {
			for _, l := range p.lines {
				if room -= len(l.Text); room < 0 {
					yield(Line{}, errMore)
					return false
				}
				if !yield(l, nil) {
					return false
				}
			}
			p.lines = p.lines[:0]
			return true
		}
		for e, err := range events {
			if err != nil {
				yield(Line{}, err)
				return
			}
			p.at = e.At
			room += maxGrowth * (len(e.Text) + 1)
			switch e.Kind {
			case Output:
				p.write(e.Text)
			case Input:
				p.lines = append(p.lines, Line{e.At, e.Kind, neutral.Line(e.Text)})
			}
			if !give() {
				return
			}
		}
		if p.leave(); p.rows[p.line].text != nil {
			give()
		}
	}
}

// page is the end of what a terminal shows.
type page struct {
	rows     []row
	line     int // of the cursor, in rows
	column   int
	sequence []rune // an escape sequence that is not complete
	at       time.Duration
	lines    []Line // those that are complete
}

type row struct {
	text    []rune
	changed bool // since it was given away
}

func (p *page) write(s string) {
	for _, r := range s {
		switch {
		case len(p.sequence) > 0:
			p.escape(r)
		case r == '\x1b':
			p.sequence = append(p.sequence, r)
		case r == '\n':
			p.feed()
		case r == '\r':
			p.column = 0
		case r == '\b':
			p.column = max(p.column-1, 0)
		case r == '\a':
		case r == '\t':
			for p.show(' '); p.column%8 != 0; {
				p.show(' ')
			}
		default:
			p.show(r)
		}
	}
}

// show writes a character that is visible, or the escape for it.
func (p *page) show(r rune) {
	if text := neutral.Line(string(r)); text != string(r) {
		for _, r := range text {
			p.set(r)
		}
		return
	}
	p.set(r)
}

func (p *page) set(r rune) {
	if p.column >= maxRow {
		p.feed()
		p.column = 0
	}
	row := &p.rows[p.line]
	for len(row.text) <= p.column {
		row.text = append(row.text, ' ')
	}
	row.text[p.column], row.changed = r, true
	p.column++
}

// feed goes to the next line.
func (p *page) feed() {
	p.leave()
	if p.line++; p.line == len(p.rows) {
		p.rows = append(p.rows, row{})
	}
	if len(p.rows) > rowsKept {
		p.rows = slices.Delete(p.rows, 0, 1)
		p.line--
	}
}

// leave gives the cursor's line away, unless it was as it is.
func (p *page) leave() {
	row := &p.rows[p.line]
	last := p.line == len(p.rows)-1
	if row.changed || last && len(row.text) == 0 {
		p.lines = append(p.lines, Line{p.at, Output, strings.TrimRight(string(row.text), " ")})
	}
	row.changed = false
}

// escape takes one more character of a sequence.
func (p *page) escape(r rune) {
	p.sequence = append(p.sequence, r)
	s := p.sequence
	switch {
	case len(s) == 2 && r == '[', len(s) > 2 && len(s) < 16 && (r >= '0' && r <= '9' || r == ';' || r == '?'):
		return // more follows
	}
	p.sequence = nil
	n := 0
	for _, r := range s[min(2, len(s)):] {
		if r >= '0' && r <= '9' {
			n = n*10 + int(r-'0')
		}
	}
	n = min(max(n, 1), maxRow)
	plain := len(s) > 2 && s[1] == '[' && !slices.Contains(s, '?') && !slices.Contains(s, ';')
	switch {
	case plain && r == 'A':
		if p.line > 0 {
			p.leave()
		}
		p.line = max(p.line-n, 0)
	case plain && r == 'B':
		p.line = min(p.line+n, len(p.rows)-1)
	case plain && r == 'C':
		p.column = min(p.column+n, maxRow)
	case plain && r == 'D':
		p.column = max(p.column-n, 0)
	case plain && (r == 'K' || r == 'J') && (len(s) == 3 || s[2] == '0'):
		row := &p.rows[p.line]
		row.text = row.text[:min(p.column, len(row.text))]
	case len(s) > 2 && s[1] == '[' && (r == 'm' || (r == 'h' || r == 'l') && string(s[2:len(s)-1]) == "?2004"):
		// Colours, and how what is pasted arrives.
	default:
		for _, r := range s {
			p.show(r)
		}
	}
}
