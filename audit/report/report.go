// Package report tells the story of an incident from verified evidence, to people
// who were not there: who came in, what they did and saw, what came of it, how long
// it took, and what proves all this. A Story is written as Markdown, for the
// post-mortem, or as one page of HTML, which needs nothing but a browser and plays
// the recorded sessions.
//
// It must never ask for anything over a network, run anything but its own scripts,
// or let a text of the evidence be more than text: all of it was chosen by whoever
// was recorded. It says what does not hold as loudly as what does. It stands on
// floor 2.
package report

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/export"
	"github.com/halligan-io/halligan/internal/neutral"
)

// Evidence is what is known of an incident.
type Evidence struct {
	Incident string
	// Made is when the report is made.
	Made time.Time
	// Events are those that a Gatherer wants, and LeftOut how many there were no
	// room for.
	Events  []Event
	LeftOut int
	// Recordings are of the sessions, Logs of where the events are from.
	Recordings []Recording
	Logs       []Log
	// Problems are what verification found beside what a log has.
	Problems []string
}

// Event is an event that holds, and what proves it.
type Event struct {
	audit.Event
	// Raw is the entry, byte for byte.
	Raw []byte
	// Proof is a C2SP tlog-proof; nil: none was made.
	Proof []byte
	// Witnessed says that a witness has countersigned a tree that has it.
	Witnessed bool
}

// Recording is one of a session. Data is nil where it is not at hand, and Problem
// says why, or what does not hold of it.
type Recording struct {
	Name, Origin, Problem string
	Data                  []byte
}

// Log is where events come from.
type Log struct {
	Origin, Lineage string
	Events          uint64
	VouchedBy       string
	// Witnesses are who has countersigned how many events; Unwitnessed is how many
	// at the end nobody has.
	Witnesses   []Witness
	Unwitnessed uint64
	VKeys       []string
	Problems    []string
}

// Witness has countersigned the first events of a log.
type Witness struct {
	By     string
	Events uint64
}

// MaxEvents is how many events a report has at most.
const MaxEvents = 20000

// Tones say how something is meant to be taken.
const (
	Plain = "plain"
	Good  = "good"
	Warn  = "warn"
	Bad   = "bad"
)

// Story is an incident as it is told. No text in it acts on a terminal or has more
// than one line, but for Proof, Raw and the transcripts.
type Story struct {
	Incident    string
	Made        time.Time
	First, Last time.Time
	Drill       bool
	// Lead tells it in a few sentences, Problems are what the reader must know
	// before believing any of it.
	Lead, Problems []string
	Steps          []Step
	Facts          []Fact
	People         []Person
	Actions        []Action
	Timeline       []Moment
	Sessions       []Session
	Logs           []Log
	Minor          int // moments that are so
}

// Step is a sentence of the story.
type Step struct {
	At                     time.Time
	Who, Title, Rest, Tone string
	Action                 int
}

// Fact is one figure.
type Fact struct{ Label, Value, Note, Tone string }

// Person is somebody who took part.
type Person struct {
	Name                                string
	Roles, Credentials, Sources, Places []string
	First, Last                         time.Time
	Actions, Refusals                   int
	Late                                bool
}

// Action is what somebody tried to change, and what became of it.
type Action struct {
	N                                    int
	ID, PlanID, PlanSHA256, Title, About string
	By, Role, At, Session                string
	Asked, Done                          time.Time
	Outcome, Tone, Via, Error, Note      string
	Reason                               string
	ApprovedBy                           []string
	Alone, Drill, Settled                bool
	Undoes, UndoneBy                     string
	Objects                              []audit.Object
	ObjectCount                          int
	Proofs                               []Proof
	CameIn                               time.Time // when whoever did it came in first
	Cast                                 int       // of Sessions, from 1; 0: none
	Seconds                              float64
}

// Took is how long it took, as text.
func (a Action) Took() string {
	if a.Done.IsZero() {
		return ""
	}
	return span(a.Done.Sub(a.Asked))
}

// Since is how long after coming in the effect was there, as text.
func (a Action) Since() string {
	if a.CameIn.IsZero() || a.Done.IsZero() || a.Done.Before(a.CameIn) {
		return ""
	}
	return span(a.Done.Sub(a.CameIn))
}

// Proof proves one event.
type Proof struct {
	What, ID, Origin string
	Seq              uint64
	Text, Raw        string
	Witnessed        bool
}

// Moment is a line of the timeline.
type Moment struct {
	ID                            string
	At                            time.Time
	Since                         string
	Origin, Who, What, Text, Tone string
	Minor                         bool
	Count                         int
	Action                        int // from 1; 0: none
	Cast                          int // as in Action
	Seconds                       float64
}

// Session is one that was recorded, or ought to have been.
type Session struct {
	N                                int
	Name, Origin, Who, What, Problem string
	Begun, Ended                     time.Time
	Tape                             *tape
}

// Took is how long it took, as text.
func (s Session) Took() string {
	if s.Ended.IsZero() || s.Begun.IsZero() {
		return ""
	}
	return span(s.Ended.Sub(s.Begun))
}

// New makes a story of evidence.
func New(in Evidence) *Story {
	s := &Story{Incident: line(in.Incident), Made: in.Made.UTC()}
	events := s.take(in)
	s.sessions(in, events)
	s.actions(events)
	s.people(events)
	s.timeline(events)
	s.logs(in)
	s.conclude(in, events)
	return s
}

// told is an event that is made safe, and where it came from.
type told struct {
	Event
	note       string
	parameters string
	// held says that only another log has it, whose word it is.
	held bool
}

// of joins what one daemon says of an intent: an ID is only its own log's.
func (e told) of(id string) string { return e.Origin + " " + id }

// take puts the events in order, once each. The same are only those that are so byte
// for byte: no log says what another's event was.
func (s *Story) take(in Evidence) []told {
	var list []told
	at := map[string]int{}
	for _, e := range in.Events {
		inner, note := unwrap(e.Event)
		parameters := line(arguments(inner.Parameters))
		inner.Parameters, inner.Payload, inner.Previous = nil, "", ""
		tidy(reflect.ValueOf(&inner).Elem())
		inner.Time = inner.Time.UTC()
		bytes, held := string(e.Raw), false
		if note != "" {
			bytes, held = e.Payload, e.Kind == audit.Held
		}
		e.Event = inner
		t := told{Event: e, note: line(note), parameters: parameters, held: held}
		// What two bastions keep, and its own log has too, is one event.
		if i, seen := at[bytes]; seen && bytes != "" {
			if !held {
				list[i] = t
			}
			continue
		}
		at[bytes] = len(list)
		list = append(list, t)
	}
	slices.SortStableFunc(list, func(a, b told) int {
		return cmp.Or(a.Time.Compare(b.Time), strings.Compare(a.Origin, b.Origin), cmp.Compare(a.Seq, b.Seq))
	})
	list = passedOn(list)
	for _, e := range list {
		if reviews(e.Event.Event) {
			continue
		}
		if s.First.IsZero() {
			s.First = e.Time
		}
		if e.Kind != audit.Objects || s.Last.IsZero() { // they can be told of days later
			s.Last = e.Time
		}
	}
	return list
}

// passedOn leaves out the connections through bastions that belong to other logins
// than those of the incident: of a person and a node, only the one that is nearest to
// a login there does. Where no login is known, as of a lost node, all stay.
func passedOn(list []told) []told {
	key := func(who, node string) string { return who + " " + node }
	through := func(e told) string { return e.Origin + " " + e.Session + " " + e.Target }
	relays := map[string][]told{} // in order
	for _, e := range list {
		if e.Kind == audit.Relay {
			relays[key(e.who(), e.Target)] = append(relays[key(e.who(), e.Target)], e)
		}
	}
	logins, kept := map[string]bool{}, map[string]bool{}
	for _, e := range list {
		if e.Kind != audit.Login {
			continue
		}
		known := key(e.who(), e.Origin)
		logins[known] = true
		all := relays[known]
		i, _ := slices.BinarySearchFunc(all, e.Time, func(r told, at time.Time) int { return r.Time.Compare(at) })
		if i == len(all) || i > 0 && e.Time.Sub(all[i-1].Time) <= all[i].Time.Sub(e.Time) {
			i--
		}
		if i >= 0 {
			kept[through(all[i])] = true
		}
	}
	var out []told
	for _, e := range list {
		if (e.Kind == audit.Relay || e.Kind == audit.RelayEnd) && e.Incident == "" && logins[key(e.who(), e.Target)] && !kept[through(e)] {
			continue
		}
		out = append(out, e)
	}
	return out
}

// maxText bounds each text in bytes.
const maxText = 2000

func line(text string) string { return neutral.LineMax(text, maxText) }

// tidy makes every text of a value safe to show as one line.
func tidy(v reflect.Value) {
	switch v.Kind() {
	case reflect.String:
		v.SetString(line(v.String()))
	case reflect.Pointer:
		if !v.IsNil() {
			// The evidence stays as it is.
			c := reflect.New(v.Type().Elem())
			c.Elem().Set(v.Elem())
			tidy(c.Elem())
			v.Set(c)
		}
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return
		}
		for i := range v.NumField() {
			tidy(v.Field(i))
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 || v.Len() == 0 {
			return
		}
		c := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
		reflect.Copy(c, v)
		for i := range c.Len() {
			tidy(c.Index(i))
		}
		v.Set(c)
	}
}

// arguments writes parameters as on the command line.
func arguments(raw json.RawMessage) string {
	var set map[string]any
	if len(raw) == 0 || json.Unmarshal(raw, &set) != nil {
		return string(raw)
	}
	var words, flags []string
	inner, nested := set["parameters"].(map[string]any)
	if nested { // a call of the API
		delete(set, "parameters")
	}
	for _, name := range slices.Sorted(func(yield func(string) bool) {
		for name := range set {
			if !yield(name) {
				return
			}
		}
	}) {
		text, isText := set[name].(string)
		if !isText {
			data, _ := json.Marshal(set[name])
			text = string(data)
		}
		switch {
		case name == "target" || name == "subject" || name == "action" || name == "actionId":
			words = append(words, text)
		case name == "namespace":
			words = append(words, "-n "+text)
		case name == "allNamespaces" && text == "true":
			words = append(words, "-A")
		case text == "true":
			flags = append(flags, "--"+name)
		case text == "false" || text == "" || text == "null":
		default:
			flags = append(flags, "--"+name+" "+text)
		}
	}
	// The target before its namespace.
	slices.SortStableFunc(words, func(a, b string) int {
		return cmp.Compare(boolInt(strings.HasPrefix(a, "-")), boolInt(strings.HasPrefix(b, "-")))
	})
	if nested {
		data, _ := json.Marshal(inner)
		flags = append(flags, arguments(data))
	}
	return strings.TrimSpace(strings.Join(append(words, flags...), " "))
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (e told) who() string {
	if e.Actor == nil {
		return ""
	}
	return e.Actor.Person
}

// title is what was asked as on the command line: methods of the API are in capitals.
func (e told) title() string {
	return strings.TrimSpace(strings.ToLower(e.Action) + " " + e.parameters)
}

// sessions are the recordings, by when they began.
func (s *Story) sessions(in Evidence, events []told) {
	size := 0
	byName := map[string]*Session{}
	var list []*Session
	session := func(name, origin string) *Session {
		key := origin + " " + name
		if byName[key] == nil {
			byName[key] = &Session{Name: name, Origin: origin}
			list = append(list, byName[key])
		}
		return byName[key]
	}
	for _, e := range events {
		if e.Kind != audit.Session && e.Kind != audit.SessionEnd || e.Target == "" {
			continue
		}
		one := session(e.Target, e.Origin)
		one.Who, one.What = cmp.Or(one.Who, e.who()), cmp.Or(one.What, e.Action)
		if e.Kind == audit.Session {
			one.Begun = e.Time
		} else {
			one.Ended = e.Time
		}
	}
	for _, r := range in.Recordings {
		one := session(line(r.Name), line(r.Origin))
		one.Problem = line(r.Problem)
		if r.Data == nil {
			continue
		}
		if size += len(r.Data); size > maxRecordings {
			one.Problem = cmp.Or(one.Problem, fmt.Sprintf("the report holds %d MiB of recordings already; halligan audit replay %s shows this one", maxRecordings>>20, one.Name))
			continue
		}
		t, err := readTape(r.Data)
		if err != nil {
			one.Problem = cmp.Or(one.Problem, line("it cannot be read: "+err.Error()))
			continue
		}
		one.Tape = &t
		if one.Begun.IsZero() && t.Begun > 0 {
			one.Begun = time.Unix(t.Begun, 0).UTC()
		}
	}
	slices.SortStableFunc(list, func(a, b *Session) int { return a.Begun.Compare(b.Begun) })
	for i, one := range list {
		one.N = i + 1
		if one.Tape == nil && one.Problem == "" {
			one.Problem = "no recording of it is at hand"
		}
		s.Sessions = append(s.Sessions, *one)
	}
}

// moment returns the recorded session that shows a moment, and how far into it.
func (s *Story) moment(e told) (int, float64) {
	for _, one := range s.Sessions {
		if one.Tape == nil || one.Tape.Seconds == 0 || one.Origin != e.Origin || one.Who != e.who() || one.Begun.IsZero() {
			continue
		}
		// Just before it, so that the line that was typed is seen.
		if at := e.Time.Sub(one.Begun).Seconds(); at >= 0 && at <= one.Tape.Seconds+1 {
			return one.N, max(0, one.Tape.shown(at)-lead)
		}
	}
	return 0, 0
}

// lead is how much of a recording is played before a moment, in seconds.
const lead = 1.5

func (s *Story) actions(events []told) {
	index := map[string]int{}  // of intents
	byPlan := map[string]int{} // of actions
	cameIn := map[string]time.Time{}
	for _, e := range events {
		if _, seen := cameIn[e.who()]; !seen && (e.Kind == audit.Login || e.Kind == audit.Relay) {
			cameIn[e.who()] = e.Time
		}
		if e.Kind != audit.Intent {
			continue
		}
		a := Action{N: len(s.Actions) + 1, ID: e.ID, PlanID: e.PlanID, PlanSHA256: e.PlanSHA256, Title: e.title(), About: e.Text, By: e.who(), At: e.Origin, Session: e.Session,
			Asked: e.Time, Reason: e.Reason, Alone: e.Alone, Drill: e.Drill, Undoes: e.Undoes, Objects: e.Objects, ObjectCount: max(e.ObjectCount, len(e.Objects)),
			Via: e.Via, Note: e.note, CameIn: cameIn[e.who()], Outcome: "outcome not recorded", Tone: Bad}
		if e.Actor != nil {
			a.Role = e.Actor.Role
		}
		for _, by := range e.ApprovedBy {
			a.ApprovedBy = append(a.ApprovedBy, by.Person)
		}
		a.Cast, a.Seconds = s.moment(e)
		a.Proofs = append(a.Proofs, proof("intent", e))
		if n := index[e.of(e.ID)]; n == 0 || !e.held {
			index[e.of(e.ID)] = a.N
		}
		byPlan[e.PlanID] = a.N
		s.Actions = append(s.Actions, a)
		s.Drill = s.Drill || e.Drill
	}
	own := map[string]bool{} // of which the daemon's own log tells
	for _, e := range events {
		if e.Kind == audit.Outcome && !e.held {
			own[e.of(e.Of)] = true
		}
	}
	for _, e := range events {
		n := index[e.of(e.Of)]
		if n == 0 || e.Kind != audit.Outcome && e.Kind != audit.Objects || e.held && own[e.of(e.Of)] {
			continue
		}
		a := &s.Actions[n-1]
		a.Objects = merge(a.Objects, e.Objects)
		a.ObjectCount = max(a.ObjectCount, e.ObjectCount, len(a.Objects))
		if e.Kind == audit.Objects {
			continue
		}
		a.Done, a.Outcome, a.Tone, a.Settled = e.Time, e.Outcome, toneOf(e.Outcome), e.Settled
		a.Via, a.Error = cmp.Or(e.Via, a.Via), e.Error
		a.Proofs = append(a.Proofs, proof("outcome", e))
	}
	for i, a := range s.Actions {
		n := byPlan[a.Undoes]
		if a.Undoes == "" || n == 0 {
			continue
		}
		if a.Tone == Good {
			s.Actions[n-1].UndoneBy = fmt.Sprintf("action %d", a.N)
		}
		s.Actions[i].Undoes = fmt.Sprintf("action %d, %s", n, s.Actions[n-1].Title)
	}
}

// merge adds what came of objects to what was known of them.
func merge(known, more []audit.Object) []audit.Object {
	for _, o := range more {
		i := slices.IndexFunc(known, func(k audit.Object) bool { return k.Key == o.Key })
		if i < 0 {
			known = append(known, o)
			continue
		}
		k := &known[i]
		k.UID, k.Operation, k.Outcome, k.Error = cmp.Or(o.UID, k.UID), cmp.Or(o.Operation, k.Operation), cmp.Or(o.Outcome, k.Outcome), cmp.Or(o.Error, k.Error)
		k.RevisionBefore, k.RevisionAfter = cmp.Or(o.RevisionBefore, k.RevisionBefore), cmp.Or(o.RevisionAfter, k.RevisionAfter)
		if len(k.Changes) == 0 {
			k.Changes = o.Changes
		}
	}
	return known
}

func proof(what string, e told) Proof {
	return Proof{What: what, ID: e.ID, Origin: e.Origin, Seq: e.Seq, Text: neutral.Text(string(e.Event.Proof)), Raw: string(neutral.JSON(e.Raw)), Witnessed: e.Witnessed}
}

func toneOf(outcome string) string {
	switch outcome {
	case "applied", "ok":
		return Good
	case "partial", "unverified", "planned", "awaiting-approval", "stale", "not-applied":
		return Warn
	}
	return Bad
}

// effective reports whether an outcome says that something was changed.
func effective(outcome string) bool {
	return outcome == "applied" || outcome == "partial" || outcome == "unverified"
}

func (s *Story) people(events []told) {
	byName := map[string]*Person{}
	var list []*Person
	add := func(to *[]string, text string) {
		if text != "" && !slices.Contains(*to, text) {
			*to = append(*to, text)
		}
	}
	for _, e := range events {
		if e.who() == "" || reviews(e.Event.Event) {
			continue
		}
		p := byName[e.who()]
		if p == nil {
			p = &Person{Name: e.who(), First: e.Time}
			byName[p.Name] = p
			list = append(list, p)
		}
		p.Last = e.Time
		add(&p.Roles, e.Actor.Role)
		add(&p.Places, e.Origin)
		add(&p.Sources, host(e.Actor.Source))
		if e.Actor.Credential != "" || e.Actor.Fingerprint != "" {
			text := credentials[e.Actor.Credential]
			text = cmp.Or(text, e.Actor.Credential)
			if e.Actor.Serial != "" {
				text += ", serial " + e.Actor.Serial
			}
			if e.Actor.Fingerprint != "" {
				text += ", " + e.Actor.Fingerprint
			}
			add(&p.Credentials, text)
		}
		p.Late = p.Late || e.Actor.Late
		switch e.Kind {
		case audit.Intent:
			p.Actions++
		case audit.Refusal:
			p.Refusals += max(e.Count, 1)
		}
	}
	for _, p := range list {
		s.People = append(s.People, *p)
	}
}

// host is an address without its port.
func host(source string) string {
	if ap, err := netip.ParseAddrPort(source); err == nil {
		return ap.Addr().String()
	}
	return source
}

// credentials are the kinds of them, in words.
var credentials = map[string]string{"person": "SSH certificate", "local": "root at the node itself", "sealed": "sealed emergency key", "automation": "automation certificate",
	"bastion": "bastion certificate", "node": "node certificate"}

// labels say what a kind of event is called in a timeline.
var labels = map[audit.Kind]string{audit.Start: "log starts", audit.Stop: "log stops", audit.Seam: "log goes on", audit.Login: "login", audit.Logout: "logout", audit.Session: "session", audit.SessionEnd: "session ends",
	audit.Relay: "relay", audit.RelayEnd: "relay ends", audit.Read: "read", audit.Secret: "secrets", audit.Intent: "action", audit.Outcome: "outcome", audit.Refusal: "refused",
	audit.Alarm: "alarm", audit.Lost: "lost", audit.Recording: "recording"}

func (s *Story) timeline(events []told) {
	index := map[string]int{}
	for _, a := range s.Actions {
		index[a.At+" "+a.ID] = a.N
	}
	pieces := map[string]int{} // of a recording: the moment
	seen := map[string]bool{}  // who came in where: each command of halligan does
	again := func(e told) bool {
		key := string(e.Kind) + e.who()
		if e.Kind == audit.Login {
			key += " " + e.Origin
		}
		was := seen[key]
		seen[key] = true
		return was
	}
	for _, e := range events {
		m := Moment{ID: e.ID, At: e.Time, Since: "+" + span(e.Time.Sub(s.First)), Origin: e.Origin, Who: e.who(), What: cmp.Or(labels[e.Kind], string(e.Kind)), Tone: Plain, Count: e.Count}
		a := (*Action)(nil)
		if n := cmp.Or(index[e.of(e.ID)], index[e.of(e.Of)]); n > 0 {
			a, m.Action = &s.Actions[n-1], n
		}
		switch e.Kind {
		case audit.Login:
			m.Minor = again(e)
			m.Text = "came in" + after(" by ", e.Actor.Door) + after(" from ", host(e.Actor.Source)) + after(" as ", e.Actor.Role)
			if e.Actor.Late {
				m.Minor = false
				m.Text, m.Tone = m.Text+", with a credential past an edge of its validity", Warn
			}
		case audit.Session:
			m.Text, m.Minor = "opened a "+cmp.Or(e.Action, "session"), e.Target == ""
		case audit.SessionEnd:
			m.Text, m.Minor = "closed the "+cmp.Or(e.Action, "session")+after(": ", e.Text), true
		case audit.Relay:
			m.Text, m.Minor = "was let through to "+e.Target, again(e)
		case audit.Logout, audit.RelayEnd:
			m.Text, m.Minor = "left"+after(": ", e.Text), true
		case audit.Read:
			m.Text, m.Minor = "looked: "+e.title(), true
		case audit.Secret:
			if reviews(e.Event.Event) {
				m.What, m.Text, m.Minor = "review", "read a recording"+after(" of ", e.Target)+after("; reason: ", e.Reason), true
				break
			}
			m.Text, m.Tone = "was shown secrets: "+e.title()+after(" of ", e.Target)+after("; reason: ", e.Reason), Warn
		case audit.Intent:
			m.Text = e.title() + after(", because: ", e.Reason)
			if e.Alone {
				m.Text, m.Tone = m.Text+" (alone, with nobody's approval)", Warn
			}
			m.Cast, m.Seconds = s.moment(e)
		case audit.Outcome:
			m.Text, m.Tone = e.title()+": "+cmp.Or(e.Outcome, "nothing said"), toneOf(e.Outcome)
			if a != nil {
				m.Text = a.Title + ": " + cmp.Or(e.Outcome, "nothing said")
				m.Text += after(", ", a.Took()) + after(" after it was begun, through ", a.Via)
			}
			m.Text += after("; ", e.Error)
			if e.Settled {
				m.Text += " (found out later)"
			}
		case audit.Objects:
			m.Text, m.Minor = fmt.Sprintf("%d more objects of action %d", len(e.Objects), m.Action), true
		case audit.Refusal:
			m.Text, m.Tone = "was refused: "+cmp.Or(e.title(), "entry")+after("; ", e.Error)+after("; ", e.Text), Warn
		case audit.Alarm:
			m.Text, m.Tone = cmp.Or(e.Text, "an alarm was raised"), Bad
		case audit.Recording:
			if e.Chunk == nil {
				m.Text, m.Tone = "the recording "+e.Target+" "+e.Outcome+after(": ", e.Error), Warn
				break
			}
			if i, begun := pieces[e.Chunk.Session]; begun {
				s.Timeline[i].Count++
				continue
			}
			pieces[e.Chunk.Session] = len(s.Timeline)
			m.Text, m.Minor, m.Count = "recorded "+e.Chunk.Session+", each piece with its digest", true, 1
		case audit.Lost:
			m.Text, m.Tone = fmt.Sprintf("%d events had no room in the log", max(e.Count, 1)), Bad
		default:
			m.Text, m.Minor = line(export.Summary(e.Event.Event)), true
		}
		m.Text = line(m.Text + after(" (", e.note) + closing(e.note))
		if m.Minor {
			s.Minor++
		}
		s.Timeline = append(s.Timeline, m)
	}
}

func after(before, text string) string {
	if text == "" {
		return ""
	}
	return before + text
}

func closing(note string) string {
	if note == "" {
		return ""
	}
	return ")"
}

func (s *Story) logs(in Evidence) {
	for _, l := range in.Logs {
		l.Witnesses, l.VKeys, l.Problems = slices.Clone(l.Witnesses), slices.Clone(l.VKeys), slices.Clone(l.Problems)
		tidy(reflect.ValueOf(&l).Elem())
		s.Logs = append(s.Logs, l)
		for _, p := range l.Problems {
			s.Problems = append(s.Problems, "Log of "+l.Origin+": "+p)
		}
	}
	for _, p := range in.Problems {
		s.Problems = append(s.Problems, line(p))
	}
}

// conclude writes what comes first and is known last.
func (s *Story) conclude(in Evidence, events []told) {
	if in.LeftOut > 0 {
		s.Problems = append(s.Problems, fmt.Sprintf("%d further events of this incident are not in this report, which holds %d at most.", in.LeftOut, MaxEvents))
	}
	var in1, change time.Time
	var who, from, what string
	unwitnessed, alone, secrets, refusals := 0, 0, 0, 0
	for _, e := range events {
		if in1.IsZero() && (e.Kind == audit.Login || e.Kind == audit.Relay) && e.Actor != nil {
			in1, who, from = e.Time, e.who(), host(e.Actor.Source)
		}
		if change.IsZero() && e.Kind == audit.Outcome && effective(e.Outcome) {
			change = e.Time
		}
		if !e.Witnessed {
			unwitnessed++
		}
		switch e.Kind {
		case audit.Secret:
			if !reviews(e.Event.Event) {
				secrets++
			}
		case audit.Refusal:
			refusals += max(e.Count, 1)
		}
	}
	counts := map[string]int{}
	for _, a := range s.Actions {
		counts[a.Outcome]++
		if a.Alone {
			alone++
		}
		if what == "" && effective(a.Outcome) {
			what = a.Title
		}
		if a.Done.IsZero() {
			s.Problems = append(s.Problems, fmt.Sprintf("Action %d (%s) was begun, and no outcome of it is in the evidence.", a.N, a.Title))
		}
	}
	if len(events) == 0 {
		s.Lead = []string{"No event of this incident is in the evidence."}
		return
	}
	var places, names []string
	for _, p := range s.People {
		names = append(names, p.Name)
		for _, place := range p.Places {
			if !slices.Contains(places, place) {
				places = append(places, place)
			}
		}
	}
	slices.Sort(places)
	s.Lead = append(s.Lead, fmt.Sprintf("On %s, between %s and %s UTC, %s used break-glass access at %s.", s.First.Format("2 January 2006"), s.First.Format("15:04:05"), s.Last.Format("15:04:05"),
		cmp.Or(listing(names), "nobody"), cmp.Or(listing(places), "no place")))
	if !in1.IsZero() {
		text := fmt.Sprintf("%s came in first, at %s", who, in1.Format("15:04:05")) + after(" from ", from)
		if !change.IsZero() && !change.Before(in1) {
			text += fmt.Sprintf("; the first change took effect %s later: %s", span(change.Sub(in1)), what)
		}
		s.Lead = append(s.Lead, text+".")
	}
	if n := len(s.Actions); n > 0 {
		var parts []string
		for _, outcome := range slices.Sorted(func(yield func(string) bool) {
			for o := range counts {
				if !yield(o) {
					return
				}
			}
		}) {
			parts = append(parts, fmt.Sprintf("%d %s", counts[outcome], outcome))
		}
		undone := 0
		for _, a := range s.Actions {
			if a.UndoneBy != "" {
				undone++
			}
		}
		for _, a := range s.Actions[:min(n, maxSteps)] {
			s.Steps = append(s.Steps, a.step())
		}
		text := fmt.Sprintf("%s was begun: %s", plural(n, "action", "actions"), strings.Join(parts, ", "))
		if n > 1 {
			text = strings.Replace(text, " was begun", " were begun", 1)
		}
		if undone > 0 {
			text += fmt.Sprintf("; %d undone again", undone)
		}
		s.Lead = append(s.Lead, text+".")
	} else {
		s.Lead = append(s.Lead, "Nothing was changed: people only looked.")
	}
	fact := func(label, value, note, tone string) { s.Facts = append(s.Facts, Fact{label, value, note, tone}) }
	if !in1.IsZero() {
		if !change.IsZero() && !change.Before(in1) {
			fact("From first login to first effect", span(change.Sub(in1)), in1.Format("15:04:05")+" → "+change.Format("15:04:05"), Good)
		}
		fact("First login", in1.Format("15:04:05"), who, Plain)
	}
	if !change.IsZero() {
		fact("First effect", change.Format("15:04:05"), what, Plain)
	}
	fact("Actions", fmt.Sprint(len(s.Actions)), "", Plain)
	if refusals > 0 {
		fact("Refusals", fmt.Sprint(refusals), "asked for, and not allowed", Warn)
	}
	if alone > 0 {
		fact("Done alone", fmt.Sprint(alone), "with nobody's approval", Warn)
	}
	if secrets > 0 {
		fact("Secrets shown", fmt.Sprint(secrets), "each one is in the timeline", Warn)
	}
	switch {
	case len(s.Problems) > 0:
		fact("Evidence", "does not hold in full", "see above", Bad)
	case unwitnessed > 0:
		fact("Evidence", "holds", fmt.Sprintf("%d of %d events have no witness yet", unwitnessed, len(events)), Warn)
	default:
		fact("Evidence", "holds", "every event signed and witnessed", Good)
	}
}

// maxSteps bounds what is told of actions at the beginning.
const maxSteps = 12

// step tells in a sentence what was done.
func (a Action) step() Step {
	who := a.By + after(" (", a.Role) + closing(a.Role) + " at " + a.At
	if a.Alone {
		who += ", alone"
	}
	who += after(", approved by ", strings.Join(a.ApprovedBy, " and "))
	rest := ""
	if a.Reason != "" {
		rest += ", because: “" + a.Reason + "”"
	}
	rest += ". Result: " + a.Outcome
	if a.ObjectCount > 0 {
		rest += " on " + plural(a.ObjectCount, "object", "objects")
	}
	rest += after(", after ", a.Took()) + after("; ", a.Error) + "."
	if a.UndoneBy != "" {
		rest += " Taken back by " + a.UndoneBy + "."
	}
	if a.Undoes != "" {
		rest += " It took back " + a.Undoes + "."
	}
	return Step{a.Asked, who, a.Title, rest, a.Tone, a.N}
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func listing(list []string) string {
	if len(list) > 5 {
		list = append(slices.Clone(list[:5]), fmt.Sprintf("%d more", len(list)-5))
	}
	if n := len(list); n > 1 {
		return strings.Join(list[:n-1], ", ") + " and " + list[n-1]
	}
	return strings.Join(list, "")
}

// span writes a time that passed, in the two units that matter.
func span(d time.Duration) string {
	switch {
	case d < 0:
		return "-" + span(-d)
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min %02d s", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%d h %02d min", int(d.Hours()), int(d.Minutes())%60)
}
