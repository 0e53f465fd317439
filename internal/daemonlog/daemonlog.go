// Package daemonlog makes the logger of every daemon, so that all of them log
// alike: JSON lines with the time in UTC, the level and the node, or text for
// people where stderr is a terminal.
//
// Names, reasons and errors of others are untrusted: callers pass them through
// internal/neutral. A log must never hold object contents or secrets, and is
// never the record of who did what. It stands on floor 0.
package daemonlog

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/rs/zerolog"
)

// Levels are the names that New takes, from the most talkative.
var Levels = []string{"debug", "info", "warn", "error"}

// New returns a logger that writes to w, a daemon's stderr, what is at least of
// the level. Every line has the field node.
func New(w io.Writer, level, node string) (zerolog.Logger, error) {
	least, err := zerolog.ParseLevel(level)
	if err != nil || !slices.Contains(Levels, level) {
		return zerolog.Nop(), fmt.Errorf("unknown log level %q: one of %s", level, strings.Join(Levels, ", "))
	}
	if f, ok := w.(*os.File); ok {
		w = newPatient(f)
		if isatty.IsTerminal(f.Fd()) {
			w = zerolog.ConsoleWriter{Out: w, TimeFormat: "15:04:05.000", TimeLocation: time.UTC}
		}
	}
	// A hook instead of zerolog's own timestamp, whose format and zone are
	// global variables.
	return zerolog.New(w).Level(least).With().Str("node", node).Logger().Hook(zerolog.HookFunc(stamp)), nil
}

func stamp(e *zerolog.Event, _ zerolog.Level, _ string) {
	e.Str(zerolog.TimestampFieldName, time.Now().UTC().Format(time.RFC3339Nano))
}
