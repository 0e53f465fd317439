package report

import (
	"encoding/json"
	"strings"
	"time"

	"github.com/halligan-io/halligan/audit"
)

// Gatherer picks the events of an incident out of many: those that name it, and
// what belongs to them without saying so, such as the logins of their sessions.
// Every event is shown to Look, and then every one to Wants.
type Gatherer struct {
	incident string
	sessions map[string]bool
	// intents are IDs of events and plans that others refer to.
	intents, origins map[string]bool
	// people is when each acted first and last.
	people      map[string][2]time.Time
	first, last time.Time
}

// NewGatherer returns one for an incident, which is compared without regard to case.
func NewGatherer(incident string) *Gatherer {
	return &Gatherer{incident: incident, sessions: map[string]bool{}, intents: map[string]bool{}, origins: map[string]bool{}, people: map[string][2]time.Time{}}
}

// around is how far before and after what somebody did a connection through a
// bastion, or an alarm, is taken to belong to it.
const around = 2 * time.Minute

func (g *Gatherer) names(e audit.Event) bool { return strings.EqualFold(e.Incident, g.incident) }

// Look takes note of an event. An error of its payload makes it one of its own.
func (g *Gatherer) Look(e audit.Event) {
	e, _ = unwrap(e)
	if !g.names(e) || reviews(e) {
		return
	}
	for set, key := range map[*map[string]bool]string{&g.sessions: e.Session, &g.intents: e.ID, &g.origins: e.Origin} {
		if key != "" {
			(*set)[key] = true
		}
	}
	if e.PlanID != "" {
		g.intents[e.PlanID] = true
	}
	if g.first.IsZero() || e.Time.Before(g.first) {
		g.first = e.Time
	}
	if e.Time.After(g.last) {
		g.last = e.Time
	}
	if e.Actor != nil && e.Actor.Person != "" {
		span, known := g.people[e.Actor.Person]
		if !known || e.Time.Before(span[0]) {
			span[0] = e.Time
		}
		if e.Time.After(span[1]) {
			span[1] = e.Time
		}
		g.people[e.Actor.Person] = span
	}
}

// Wants reports whether an event belongs to the incident, after all were looked at.
func (g *Gatherer) Wants(e audit.Event) bool {
	e, _ = unwrap(e)
	switch {
	case g.names(e):
		return true
	case e.Incident != "" || g.first.IsZero():
		return false
	case e.Session != "" && g.sessions[e.Session], e.Of != "" && g.intents[e.Of], e.Undoes != "" && g.intents[e.Undoes]:
		return true
	}
	switch e.Kind {
	case audit.Relay, audit.RelayEnd:
		// A bastion sees a connection of its own, whose session has another name.
		if e.Actor == nil || !g.origins[e.Target] {
			return false
		}
		span, known := g.people[e.Actor.Person]
		return known && within(e.Time, span[0], span[1])
	case audit.Alarm:
		return g.origins[e.Origin] && within(e.Time, g.first, g.last)
	}
	return false
}

// Found reports whether any event names the incident.
func (g *Gatherer) Found() bool { return !g.first.IsZero() }

// reviews reports whether somebody only read the recording of a session, as whoever
// makes a report does: that is no part of what happened.
func reviews(e audit.Event) bool { return e.Kind == audit.Secret && e.Action == "ReadRecording" }

func within(t, from, until time.Time) bool {
	return !t.Before(from.Add(-around)) && !t.After(until.Add(around))
}

// unwrap returns the event that another one holds, with the word for that.
func unwrap(e audit.Event) (audit.Event, string) {
	var inner audit.Event
	if e.Payload == "" || e.Kind != audit.Held && e.Kind != audit.Adopted || json.Unmarshal([]byte(e.Payload), &inner) != nil || inner.Kind == "" {
		return e, ""
	}
	switch {
	case e.Kind == audit.Adopted && inner.Origin != e.Origin, e.Kind == audit.Held && inner.Origin != e.Target:
		return e, "" // a daemon takes back its own only, and keeps what another has sent
	case e.Kind == audit.Held:
		return inner, "kept by " + e.Origin + ", since the node's own log could not take it"
	}
	return inner, "kept by bastions at first, since the node's own log could not take it"
}
