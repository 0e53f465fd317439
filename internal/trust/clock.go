package trust

import (
	"sync"
	"time"
)

// Clock is the time that validity is judged by. Clocks lie in outages: a board
// without a battery wakes in 1970, and whoever controls the time server can
// bring back a certificate that lapsed. So its time is never below what is known
// to be past: the build, the newest signed part of the bundle, the last record
// of the journal unless that lies far beyond all else; and it never goes backwards while the process lives, but on
// with the monotonic clock where the wall clock was set back.
//
// A wall clock that jumped ahead and was set right again leaves it ahead until
// the agent is restarted: Ahead tells, and the console needs no clock.
//
// Its methods may be called concurrently.
type Clock struct {
	wall func() time.Time
	// mono is the monotonic clock, which nobody can set.
	mono func() time.Duration

	mu sync.Mutex // guards all below
	// last is the latest time known, as it was at mono's at.
	last time.Time
	at   time.Duration
}

// NewClock returns a clock that is never below the floor, such as the time of
// the build.
func NewClock(floor time.Time) *Clock { return Steady(floor, time.Now) }

// Steady is NewClock for another wall clock than this machine's.
func Steady(floor time.Time, wall func() time.Time) *Clock {
	began := time.Now()
	return newClock(floor, wall, func() time.Duration { return time.Since(began) })
}

func newClock(floor time.Time, wall func() time.Time, mono func() time.Duration) *Clock {
	return &Clock{wall: wall, mono: mono, last: floor.Round(0), at: mono()}
}

// Now returns the time, in UTC and without a monotonic reading.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now()
}

// now is Now with c.mu held.
func (c *Clock) now() time.Time {
	at := c.mono()
	c.last = c.last.Add(at - c.at)
	c.at = at
	if wall := c.wall().Round(0); wall.After(c.last) {
		c.last = wall
	}
	return c.last.UTC()
}

// Raise takes a time that is known to be past. Only what was signed or written
// by this node may be given.
func (c *Clock) Raise(past time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now()
	if past = past.Round(0); past.After(c.last) {
		c.last = past
	}
}

// Ahead returns how far the clock is ahead of the wall clock, which then is
// wrong or was.
func (c *Clock) Ahead() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return max(0, c.now().Sub(c.wall().Round(0)))
}
