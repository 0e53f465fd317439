package verb

import (
	"strings"
	"testing"
)

// TestCompleteChoices: words that an argument is one of come from its placeholder.
func TestCompleteChoices(t *testing.T) {
	for before, want := range map[string]string{"webhook": "delete open", "webhook open": "", "webhook delete guard": "", "scale": ""} {
		got := New(Terminal{Env: func(string) string { return "" }}, Options{Within: true}).Complete(strings.Fields(before), "")
		if strings.Join(got, " ") != want {
			t.Errorf("after %q: %q, want %q", before, got, want)
		}
	}
}
