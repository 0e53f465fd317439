// Package neutral makes text of unknown origin safe to show: names of objects,
// reasons, error messages of other programs and everything else that a tenant
// of a cluster or a stranger could have chosen. It is the only neutraliser, for
// terminals and logs alike.
//
// What is not plainly visible becomes a visible escape: control characters (C0,
// C1 and DEL, so also every escape sequence), direction marks, zero-width and
// other format characters, line and paragraph separators, spaces other than
// U+0020, private and unassigned code points, and bytes that are not UTF-8.
//
// It must never be used to make text safe for a parser, such as a shell or
// HTML, but for JSON, which has escapes of its own. A backslash stays as it is, so that escaping twice changes nothing, and
// the original cannot be had back. It stands on floor 0.
package neutral

import (
	"bytes"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Line returns s as one line: line feeds and tabs are escaped too.
func Line(s string) string { return escape(s, false) }

// LineMax returns s as Line does, cut to at most max bytes, the mark of the cut
// included; max is at least 3.
func LineMax(s string, max int) string {
	const mark = "…"
	// Escapes only make text longer, so that the rest is not needed.
	cut := len(s) > max
	if cut {
		s = s[:floor(s, max)]
	}
	s = Line(s)
	if !cut && len(s) <= max {
		return s
	}
	return s[:floor(s, min(max-len(mark), len(s)))] + mark
}

// floor returns the last start of a character at or before n.
func floor(s string, n int) int {
	for i := n; i >= 0 && i > n-utf8.UTFMax && i < len(s); i-- {
		if utf8.RuneStart(s[i]) {
			return i
		}
	}
	return n
}

// Text returns s with its line feeds and tabs kept.
func Text(s string) string { return escape(s, true) }

func escape(s string, layout bool) string {
	keep := func(r rune) bool { return unicode.IsPrint(r) || layout && (r == '\n' || r == '\t') }
	clean := 0
	for clean < len(s) {
		r, n := utf8.DecodeRuneInString(s[clean:])
		if r == utf8.RuneError && n == 1 || !keep(r) {
			break
		}
		clean += n
	}
	if clean == len(s) {
		return s
	}
	var b strings.Builder
	b.WriteString(s[:clean])
	for i := clean; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case keep(r):
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\r':
			b.WriteString(`\r`)
		case r == '\t':
			b.WriteString(`\t`)
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r <= 0xFFFF:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
		i += n
	}
	return b.String()
}

// JSON returns a JSON text that means the same, with what its strings hold that
// is not plainly visible as escapes of JSON: it leaves C1 and direction marks as
// they are, which act on a terminal, and which parsers of YAML refuse.
func JSON(text []byte) []byte {
	hidden := func(r rune) bool { return r >= 0x7f && !unicode.IsPrint(r) || r == utf8.RuneError }
	if !bytes.ContainsFunc(text, hidden) {
		return text
	}
	var b bytes.Buffer
	for _, r := range string(text) {
		switch {
		case !hidden(r):
			b.WriteRune(r)
		case r <= 0xFFFF:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		}
	}
	return b.Bytes()
}
