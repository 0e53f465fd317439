package door

import (
	"sync"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// Room of all doors together, and of each person in it.
const (
	maxConnections     = 256
	maxConnectionsEach = 20 // SSH lets one have 12 sessions, each with one
	maxCalls           = 128
	maxCallsEach       = 16
)

// slots bounds what is in use at once, in total and by holder, and keeps the
// last ones free: automation and drills may take half of them, people who come
// over the network all but an eighth, and somebody at the node's console all.
type slots struct {
	total, each int

	mu    sync.Mutex // guards all below
	used  int
	lower int // of used, those of automation and drills
	by    map[holder]int
}

// holder is whose slots are counted together. Whoever has a person's stolen
// laptop does not keep out the same person's sealed key.
type holder struct {
	person string
	kind   trust.Kind
	drill  bool
}

func newSlots(total, each int) *slots {
	return &slots{total: total, each: each, by: map[holder]int{}}
}

// take returns what gives the slot back, or an error where none is free for who.
func (s *slots) take(who trust.Identity) (release func(), err error) {
	lower := who.Kind == trust.Automation || who.Scope.Drill
	h := holder{who.Person, who.Kind, who.Scope.Drill}
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.total
	if who.Door != trust.Console {
		room -= s.total / 8
	}
	switch {
	case s.by[h] >= s.each:
		return nil, fault.New(fault.Unreachable, "end some of them first", "%s has %d of them under way already, the most that one person may have", who.Person, s.each)
	case lower && s.lower >= s.total/2:
		return nil, fault.New(fault.Unreachable, "try again later: the rest is kept for people", "automation and drills have %d under way already", s.lower)
	case s.used >= room:
		return nil, fault.New(fault.Unreachable, "try again, another agent, or the console at the node", "the agent is busy with %d others", s.used)
	}
	s.used++
	s.by[h]++
	if lower {
		s.lower++
	}
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.used--
		if s.by[h]--; s.by[h] == 0 {
			delete(s.by, h)
		}
		if lower {
			s.lower--
		}
	}), nil
}
