package inforce

import (
	"fmt"
	"time"

	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/version"
)

// Moment is a time that had passed when it was written down here.
type Moment struct {
	// What was written down then, for people.
	What string
	At   time.Time
}

// maxBeyond is how far a moment may lie beyond every other clock and still count.
const maxBeyond = 24 * time.Hour

// Recall lets the clock start no earlier than what was written down last: who sets
// this machine's clock back brings no ended certificate to life. Moments far beyond
// the wall clock, the build and the bundle are left out, or a clock that jumped
// ahead once would keep the network doors shut for good after its repair. Where the
// wall clock is dead, showing less than is known to be past, a moment may be as much
// later than the bundle as the bundle is fresh. tell alarms, once. It is to be called
// again when there is a bundle, which may know better.
func (t *Trust) Recall(past []Moment, tell bool) {
	clock := t.o.Clock
	wall, known, most := clock.Now().Add(-clock.Ahead()), version.Built(), maxBeyond
	if b := t.Current(); b != nil {
		if b.Signed().After(known) {
			known = b.Signed()
		}
		if wall.Before(known) {
			most = max(most, time.Duration(b.Policy.FreshFor))
		}
	}
	if wall.After(known) {
		known = wall
	}
	n, text := 0, ""
	var last Moment
	for _, m := range past {
		if !m.At.After(known.Add(most)) {
			clock.Raise(m.At)
			continue
		}
		if n++; m.At.After(last.At) {
			last = m
		}
	}
	if n > 0 {
		text = fmt.Sprintf("%d records are dated over %v after all else that is known here, the last, %s, %s: they do not count for the clock, which shows %s. It was ahead then, or is wrong now",
			n, most, last.What, last.At.UTC().Format(time.RFC3339), wall.Format(time.RFC3339))
	}
	t.mu.Lock()
	t.beyond = text
	tell = tell && n > 0 && !t.told
	t.told = t.told || tell
	t.mu.Unlock()
	if tell {
		t.o.Raise(alarm.Event{Kind: alarm.Clock, Text: text})
	}
}
