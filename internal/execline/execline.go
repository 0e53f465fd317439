// Package execline reads the lines that people send to a daemon by SSH, as words
// and nothing else: both daemons' exec form and their shells.
//
// It must never expand, run, redirect or look up anything that a line names. The
// grammar is that of a POSIX shell, so that quoting works as people expect. It
// stands on floor 0.
package execline

import (
	"strings"
	"unicode"
	"unicode/utf8"

	"mvdan.cc/sh/v3/syntax"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// MaxLine bounds a line in bytes; approvals by others are what is long.
const MaxLine = 64 << 10

// maxNested bounds what could open something nested. The parser recurses for
// each, and 64 KiB of "$((" would cost it a quarter of a GiB.
const maxNested = 200

// Words takes a line apart as a POSIX shell would, where it is one simple
// command of literal words; whatever a shell would expand, run or redirect is
// refused (fault.Usage), and patterns stay as they are. An empty line and one that
// is a comment have no words.
func Words(line string) ([]string, error) {
	line = strings.TrimRight(line, "\r\n")
	switch {
	case len(line) > MaxLine:
		return nil, malformed("the line has %d bytes; %d are the most", len(line), MaxLine)
	case !utf8.ValidString(line):
		return nil, malformed("the line is not UTF-8")
	case strings.ContainsFunc(line, func(r rune) bool { return unicode.IsControl(r) && r != '\t' }):
		return nil, malformed("the line holds control characters")
	case strings.Count(line, "(")+strings.Count(line, "$")+strings.Count(line, "`") > maxNested:
		return nil, malformed("the line has more than %d of ( $ and `", maxNested)
	}
	var words []string
	for word, err := range syntax.NewParser(syntax.Variant(syntax.LangPOSIX)).WordsSeq(strings.NewReader(line)) {
		if err != nil {
			return nil, malformed("one command of plain words is all that is understood here: %s", neutral.LineMax(err.Error(), 100))
		}
		text, refused := literal(word.Parts, false)
		if refused != "" {
			return nil, malformed("one command of plain words is all that is understood here, and %s", refused)
		}
		words = append(words, text)
	}
	return words, nil
}

// TooLong is the error of a line that is longer than MaxLine.
func TooLong() *fault.Error { return malformed("a line has more than %d bytes", MaxLine) }

func malformed(text string, args ...any) *fault.Error {
	return fault.New(fault.Usage, "write VERB ARGUMENT --flag VALUE, with 'single quotes' around what holds blanks or other signs", text, args...)
}

// literal returns what the parts of a word stand for, or why there is a part
// that is more than text.
func literal(parts []syntax.WordPart, quoted bool) (text, refused string) {
	var b strings.Builder
	for _, part := range parts {
		switch part := part.(type) {
		case *syntax.Lit:
			b.WriteString(unescape(part.Value, quoted))
		case *syntax.SglQuoted:
			b.WriteString(part.Value)
		case *syntax.DblQuoted:
			inner, refused := literal(part.Parts, true)
			if refused != "" {
				return "", refused
			}
			b.WriteString(inner)
		case *syntax.ParamExp:
			return "", "there are no variables"
		case *syntax.CmdSubst:
			return "", "nothing is run to make a word"
		case *syntax.ArithmExp:
			return "", "nothing is calculated"
		default:
			return "", "this is more than a word"
		}
	}
	return b.String(), ""
}

// unescape takes the backslashes away. In double quotes they quote four signs,
// and a newline, which no line has.
func unescape(s string, quoted bool) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) && (!quoted || strings.IndexByte("$`\"\\", s[i+1]) >= 0) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
