package trust

import (
	"testing"
	"time"
)

// TestClockRule walks the edges of the clock rule with clocks of its own.
func TestClockRule(t *testing.T) {
	day := func(d int) time.Time { return time.Date(2026, 11, d, 12, 0, 0, 0, time.UTC) }
	wall, mono := day(10), time.Duration(0)
	c := newClock(day(1), func() time.Time { return wall }, func() time.Duration { return mono })
	is := func(what string, want time.Time, ahead time.Duration) {
		t.Helper()
		if got := c.Now(); !got.Equal(want) || c.Ahead() != ahead {
			t.Errorf("%s: %v, %v ahead; want %v, %v", what, got, c.Ahead(), want, ahead)
		}
	}
	is("the wall clock is above the build", day(10), 0)
	wall, mono = day(10).Add(time.Hour), mono+time.Hour
	is("it goes on", day(10).Add(time.Hour), 0)
	c.Raise(day(9))
	is("an old bundle changes nothing", day(10).Add(time.Hour), 0)
	c.Raise(day(12))
	is("never below the bundle", day(12), 47*time.Hour)
	c.Raise(day(12).Add(time.Nanosecond))
	is("nor below the last record by a nanosecond", day(12).Add(1), 47*time.Hour+1)
	mono += time.Minute
	is("the monotonic clock carries it on", day(12).Add(time.Minute+1), 47*time.Hour+time.Minute+1)
	wall = time.Unix(0, 0)
	is("never backwards, whatever the wall clock does", day(12).Add(time.Minute+1), day(12).Add(time.Minute+1).Sub(wall))
	wall = day(13)
	is("the wall clock caught up", day(13), 0)
	wall, mono = day(12), mono+2*time.Hour
	is("a session goes on by the monotonic clock", day(13).Add(2*time.Hour), 26*time.Hour)

	wall = time.Unix(0, 0)
	c = newClock(day(1), func() time.Time { return wall }, func() time.Duration { return mono })
	is("a board that wakes in 1970 is at the build", day(1), day(1).Sub(wall))
	c = newClock(time.Time{}, func() time.Time { return wall }, func() time.Duration { return mono })
	is("without a floor the wall clock is all there is", wall, 0)

	real := NewClock(day(1))
	if a, b := real.Now(), real.Now(); b.Before(a) || a.Location() != time.UTC {
		t.Errorf("%v, then %v", a, b)
	}
}
