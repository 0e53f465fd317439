package execline

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/halligan-io/halligan/internal/fault"
)

func TestWords(t *testing.T) {
	for line, want := range map[string][]string{
		"":                                   nil,
		"  \t ":                              nil,
		"# only a comment":                   nil,
		"status":                             {"status"},
		"status\r\n":                         {"status"},
		"status # now":                       {"status"},
		"scale ds/c  -n t --to 0":            {"scale", "ds/c", "-n", "t", "--to", "0"},
		`a 'b c' "d e" f\ g`:                 {"a", "b c", "d e", "f g"},
		`a '' ""`:                            {"a", "", ""},
		`a 'it'\''s' "\"\\\$\a"`:             {"a", "it's", `"\$\a`},
		`a'b'"c"d`:                           {"abcd"},
		`get pods/* [a-z] ? ~ ~/x {a,b} a=b`: {"get", "pods/*", "[a-z]", "?", "~", "~/x", "{a,b}", "a=b"},
		"if while done ! { }":                {"if", "while", "done", "!", "{", "}"},
		`--reason 'why $(not) | ; & > '`:     {"--reason", "why $(not) | ; & > "},
		"--reason größe":                     {"--reason", "größe"},
		`a \$HOME \;`:                        {"a", "$HOME", ";"},
		"2>x"[:1] + " a":                     {"2", "a"},
	} {
		got, err := Words(line)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v; want %q", line, got, err, want)
		}
	}
}

var refusedLines = []string{
	"a | b", "a; b", "a && b", "a || b", "a &", "a > f", "a 2>&1", "a < f", "a << f", "$(id)", "a `id`", "a $HOME", `a "$HOME"`, `a "$(id)"`, "a $((1+1))", "a ${x:-y}",
	"(a)", "a b)", "f() { a; }", "a 'b", `a "b`, "a\nb", "a\x00b", "a \x1b[31m", "a \u009b31m", "a \xff", "a <(b)", "a\rb", "!(a|b)",
	strings.Repeat("a ", MaxLine), strings.Repeat("$((", 1000), strings.Repeat("(", MaxLine-1), strings.Repeat(`"$(`, 1000), strings.Repeat("`", 1000), "$((" + strings.Repeat("(", MaxLine-3),
}

func TestWordsRefuses(t *testing.T) {
	for _, line := range refusedLines {
		got, err := Words(line)
		short := line[:min(len(line), 40)]
		if !fault.Is(err, fault.Usage) {
			t.Errorf("%q: %q, %v", short, got, err)
			continue
		}
		if text := fault.Of(err).Error(); len(text) > 400 || strings.ContainsAny(text, "\x1b\n\x00\r\u009b") {
			t.Errorf("%q: %q", short, text)
		}
	}
}

// FuzzLine compares what is taken with what sh makes of it: never more, and
// never something else.
func FuzzLine(f *testing.F) {
	for _, line := range refusedLines {
		if len(line) < 100 {
			f.Add(line)
		}
	}
	for _, line := range []string{"scale ds/c -n t --to 0", `a 'b c' "d\"" f\ g`, "a # b", "a#b", `\`, `a\`, "a =b c=d", "x ~ *"} {
		f.Add(line)
	}
	sh, err := exec.LookPath("sh")
	if err != nil {
		f.Skip("no sh to compare with")
	}
	f.Fuzz(func(t *testing.T, line string) {
		words, err := Words(line)
		if err != nil {
			if !fault.Is(err, fault.Usage) {
				t.Fatalf("%q: %v", line, err)
			}
			return
		}
		if len(words) == 0 {
			return
		}
		// Without -f the shell would look for files, and ~ is its own.
		if strings.Contains(line, "~") {
			return
		}
		// printf has a first word of its own, so that none of the line's is a
		// reserved one.
		out, err := exec.Command(sh, "-fc", `printf '%s\0' `+strings.TrimRight(line, "\r\n")).Output()
		if err != nil {
			t.Fatalf("%q: %q, and sh says %v", line, words, err)
		}
		if want := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00"); !slices.Equal(words, want) {
			t.Fatalf("%q: %q, and sh has %q", line, words, want)
		}
	})
}
