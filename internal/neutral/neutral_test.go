package neutral

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestEscapes(t *testing.T) {
	for _, c := range []struct{ name, in, line, text string }{
		{"plain", "deployments/web (3 → 0)", "deployments/web (3 → 0)", ""},
		{"empty", "", "", ""},
		{"other scripts", "名前 имя naïve", "名前 имя naïve", ""},
		{"backslash stays", `a\nb`, `a\nb`, ""},
		{"lines", "a\nb\tc", `a\nb\tc`, "a\nb\tc"},
		{"carriage return", "safe\revil", `safe\revil`, ""},
		{"colour", "\x1b[31mred\x1b[0m", `\x1b[31mred\x1b[0m`, ""},
		{"OSC 52, clipboard", "\x1b]52;c;AAAA\a", `\x1b]52;c;AAAA\x07`, ""},
		{"C1 CSI", "\u009b31m", `\u009b31m`, ""},
		{"C1 as a lone byte", "\x9b31m", `\x9b31m`, ""},
		{"NUL and DEL", "a\x00b\x7f", `a\x00b\x7f`, ""},
		{"bidi override", "user\u202egpj.exe", `user\u202egpj.exe`, ""},
		{"bidi isolate", "\u2066x\u2069", `\u2066x\u2069`, ""},
		{"zero width", "ad\u200bmin\ufeff", `ad\u200bmin\ufeff`, ""},
		{"separators", "a\u2028b\u2029c", `a\u2028b\u2029c`, ""},
		{"no-break space", "a\u00a0b", `a\u00a0b`, ""},
		{"tag characters", "a\U000e0041", `a\U000e0041`, ""},
		{"truncated UTF-8", "a\xe2\x82", `a\xe2\x82`, ""},
		{"replacement character", "a\ufffd", "a\ufffd", ""},
	} {
		if c.text == "" {
			c.text = c.line
		}
		if got := Line(c.in); got != c.line {
			t.Errorf("%s: Line(%q) = %q, want %q", c.name, c.in, got, c.line)
		}
		if got := Text(c.in); got != c.text {
			t.Errorf("%s: Text(%q) = %q, want %q", c.name, c.in, got, c.text)
		}
	}
}

func TestLineMax(t *testing.T) {
	for _, c := range []struct {
		in   string
		max  int
		want string
	}{
		{"short", 5, "short"},
		{"longer", 5, "lo…"},
		{"ééééé", 8, "éé…"},
		{"\n\n\n\n", 8, `\n\n\n\n`},
		{"\n\n\n\n\n", 8, `\n\n\…`},
		{"", 3, ""},
		{"abcd", 3, "…"},
	} {
		if got := LineMax(c.in, c.max); got != c.want || len(got) > c.max {
			t.Errorf("LineMax(%q, %d) = %q, want %q", c.in, c.max, got, c.want)
		}
	}
}

func TestJSON(t *testing.T) {
	for in, want := range map[string]string{
		"{\n \"a\": \"naïve 名前\"}":      "{\n \"a\": \"naïve 名前\"}",
		"[\"\u009b31m \u202e \x7f\"]":   `["\u009b31m \u202e \u007f"]`,
		"[\"\U000e0041\", \"\\u0007\"]": `["\udb40\udc41", "\u0007"]`,
		"[\"\xff\"]":                    `["\ufffd"]`,
	} {
		got := JSON([]byte(in))
		if string(got) != want {
			t.Errorf("%q: %s", in, got)
		}
		var before, after any
		if err := errors.Join(json.Unmarshal([]byte(in), &before), json.Unmarshal(got, &after)); err != nil || !reflect.DeepEqual(before, after) {
			t.Errorf("%q means %v, and was %v (%v)", got, after, before, err)
		}
	}
}

func FuzzEscape(f *testing.F) {
	for _, s := range []string{"a\x1b]0;x\a", "\xff\xfe", "\u202e\u2028", "日本\r\n", "\U000e0001\u00ad"} {
		f.Add(s, 10)
	}
	f.Fuzz(func(t *testing.T, s string, max int) {
		visible := func(got, allowed string) {
			if !utf8.ValidString(got) {
				t.Fatalf("%q is not UTF-8", got)
			}
			for _, r := range got {
				if !unicode.IsPrint(r) && !strings.ContainsRune(allowed, r) {
					t.Fatalf("%q holds %U", got, r)
				}
			}
		}
		line, text := Line(s), Text(s)
		visible(line, "")
		visible(text, "\n\t")
		if Line(line) != line || Text(text) != text || Line(text) != line {
			t.Fatalf("not idempotent: %q", s)
		}
		if max = 3 + max&0xff; max >= 3 {
			cut := LineMax(s, max)
			visible(cut, "")
			if len(cut) > max {
				t.Fatalf("LineMax(%q, %d) has %d bytes", s, max, len(cut))
			}
		}
	})
}
