// Package alarm tells people what they should hear of while it happens: logins,
// refusals, and whatever was done around the usual rules. Sinks are a webhook
// by IP address, syslog and a local command.
//
// It must never delay or stop what it tells of: raising an event does not
// block, and what cannot be sent in time is dropped and counted. It never
// resolves a name and never carries object contents. It stands on floor 0.
package alarm

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
)

// Kind is what happened. Receivers decide on it.
type Kind string

// The kinds.
const (
	Login   Kind = "login"   // somebody came in
	Refusal Kind = "refusal" // somebody was refused
	Relay   Kind = "relay"   // a bastion was asked for what it does not relay to
	Alone   Kind = "alone"   // an action is applied without the approvals that it needs
	Sealed  Kind = "sealed"  // a sealed credential was used
	Late    Kind = "late"    // a credential was admitted past an edge of its validity
	Bundle  Kind = "bundle"  // something is wrong with the bundle
	Closed  Kind = "closed"  // a door of the daemon could not be opened
	Clock   Kind = "clock"   // this machine's clock was or is wrong
	Panic   Kind = "panic"   // a fault of the daemon ended something
	Audit   Kind = "audit"   // something is wrong with the record of what is done
)

// Loud reports whether the event must come through even where others flood.
func (k Kind) Loud() bool { return k != Login && k != Refusal && k != Relay }

// Event is one alarm, as it is sent in JSON.
type Event struct {
	Time    time.Time `json:"time"`
	Kind    Kind      `json:"kind"`
	Loud    bool      `json:"loud"`
	Node    string    `json:"node"`
	Cluster string    `json:"cluster,omitempty"`
	// Who it is about, where it is about somebody.
	Person      string `json:"person,omitempty"`
	Role        string `json:"role,omitempty"`
	Door        string `json:"door,omitempty"`
	Credential  string `json:"credential,omitempty"`
	Fingerprint string `json:"fingerprint,omitempty"`
	Serial      string `json:"serial,omitempty"`
	Source      string `json:"source,omitempty"`
	// Text is one line for people, without control characters.
	Text string `json:"text"`
	// Unsaid is how many more of this kind were held back before this one,
	// since they were the same or too many.
	Unsaid uint64 `json:"unsaid,omitempty"`
}

// maxText bounds each text of an event in bytes.
const maxText = 512

// Of returns an event about somebody.
func Of(kind Kind, who trust.Identity, text string) Event {
	e := Event{Kind: kind, Person: who.Person, Door: string(who.Door), Credential: string(who.Kind), Fingerprint: who.Fingerprint, Serial: who.Serial, Source: who.Source, Text: text}
	if who.Role != trust.None {
		e.Role = who.Role.String()
	}
	return e
}

// neutralised returns the event with texts that are safe for every sink.
func (e Event) neutralised() Event {
	for _, s := range []*string{&e.Node, &e.Cluster, &e.Person, &e.Role, &e.Door, &e.Credential, &e.Fingerprint, &e.Serial, &e.Source, &e.Text} {
		*s = neutral.LineMax(*s, maxText)
	}
	return e
}

// Line returns the event as one line for people.
func (e Event) Line() string {
	var b strings.Builder
	if e.Loud {
		b.WriteString("ALARM ")
	}
	b.WriteString(string(e.Kind))
	var who []string
	if e.Person != "" {
		who = append(who, fmt.Sprintf("%s (%s)", e.Person, cmp.Or(e.Role, "no role")))
	}
	if e.Door != "" {
		who = append(who, "at "+e.Door)
	}
	if e.Source != "" {
		who = append(who, "from "+e.Source)
	}
	if len(who) > 0 {
		b.WriteString(": " + strings.Join(who, " "))
	}
	b.WriteString(": " + e.Text)
	if e.Unsaid > 0 {
		fmt.Fprintf(&b, " (and %d before it that were held back)", e.Unsaid)
	}
	return b.String()
}
