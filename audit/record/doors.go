// Package record is what both daemons do with their evidence: the section of their
// configuration, the log that they open, what their doors write into it, and what
// they tell people about it. What is done to a cluster is recorded by what does it;
// see audit.Do.
//
// It must never block a door, let strangers push events out of the log, or write
// down the value of a secret. It stands on floor 2.
package record

import (
	"encoding/json"
	"fmt"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"golang.org/x/time/rate"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/halligan-io/halligan/api/grpcdoor"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
)

// Bounds of what a door writes down, in bytes. Whoever is let in chooses the texts.
const (
	maxText       = 1 << 10
	maxParameters = 4 << 10
)

// What strangers can make a daemon write down: whoever finds a door can have
// themselves refused, as often as they like and with a new key each time, and would
// push the oldest events out of the log. At one a minute they would need years.
const (
	strangersBurst = 30
	strangersEvery = time.Minute
)

// What one person asks or is refused is written down one by one up to so many at once
// and a second, and counted beyond: whoever may only look would push what others did
// out of the log within minutes. Effects, secrets and sessions are not meant by it.
const (
	questionsBurst = 2000
	questionsEvery = time.Second / 2
	// maxPeople bounds those that are remembered.
	maxPeople = 1024
)

// asker is somebody's room for questions, and how many had none.
type asker struct {
	*rate.Limiter
	unsaid int
}

// Doors writes down what happens at them. Its methods never block, and may be
// called concurrently.
type Doors struct {
	log       audit.Log
	strangers *rate.Limiter
	unsaid    atomic.Int64 // of strangers

	mu     sync.Mutex // guards askers
	askers map[string]*asker
}

var (
	_ grpcdoor.Record  = (*Doors)(nil)
	_ sshserver.Record = (*Doors)(nil)
)

// NewDoors returns Doors that writes into the log.
func NewDoors(log audit.Log) *Doors {
	return &Doors{log: log, strangers: rate.NewLimiter(rate.Every(strangersEvery), strangersBurst), askers: map[string]*asker{}}
}

func event(kind audit.Kind, who trust.Identity) audit.Event {
	return audit.Event{Kind: kind, Actor: audit.ActorOf(who), Session: who.Session, Drill: who.Scope.Drill}
}

// failed completes an event with an error.
func failed(e audit.Event, outcome string, err error) audit.Event {
	f := fault.Of(err)
	e.Outcome, e.ErrorCode, e.Error = outcome, string(f.Code), clip(f.Message, maxText)
	return e
}

// Login writes down that somebody came in.
func (d *Doors) Login(who trust.Identity) (logout func(why error)) {
	began := time.Now()
	d.log.Note(event(audit.Login, who))
	return func(why error) {
		e := ended(event(audit.Logout, who), began, why)
		d.unasked(&e)
		d.log.Note(e)
	}
}

func ended(e audit.Event, began time.Time, why error) audit.Event {
	e.Text = join("after "+time.Since(began).Round(time.Millisecond).String(), e.Text)
	if why != nil {
		return failed(e, "ended", why)
	}
	return e
}

// Refused writes down that somebody was refused.
func (d *Doors) Refused(who trust.Identity, err error) {
	d.refused(event(audit.Refusal, who), err)
}

func (d *Doors) refused(e audit.Event, err error) {
	if e.Actor.Person == "" && !d.stranger(&e) || e.Actor.Person != "" && !d.question(&e) {
		return
	}
	d.log.Note(failed(e, "refused", err))
}

// question reports whether there is room for what somebody asks, and counts it where
// there is not.
func (d *Doors) question(e *audit.Event) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	who := askerOf(e)
	a := d.askers[who]
	if a == nil {
		for other := range d.askers {
			if len(d.askers) < maxPeople {
				break
			}
			delete(d.askers, other)
		}
		a = &asker{Limiter: rate.NewLimiter(rate.Every(questionsEvery), questionsBurst)}
		d.askers[who] = a
	}
	if !a.Allow() {
		a.unsaid++
		return false
	}
	a.tell(e)
	return true
}

// unasked adds to somebody's event what there was no room for.
func (d *Doors) unasked(e *audit.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if a := d.askers[askerOf(e)]; a != nil {
		a.tell(e)
	}
}

// askerOf tells automation from the person whose name it happens to have.
func askerOf(e *audit.Event) string { return e.Actor.Credential + " " + e.Actor.Person }

func (a *asker) tell(e *audit.Event) {
	if a.unsaid > 0 {
		e.Text = join(e.Text, fmt.Sprintf("%d more questions before it were too many to be told one by one", a.unsaid))
		a.unsaid = 0
	}
}

// stranger reports whether there is room for an event about one, and counts it where
// there is not.
func (d *Doors) stranger(e *audit.Event) bool {
	if !d.strangers.Allow() {
		d.unsaid.Add(1)
		return false
	}
	if n := d.unsaid.Swap(0); n > 0 {
		e.Count, e.Text = int(n)+1, fmt.Sprintf("and %d more of strangers before it", n)
	}
	return true
}

// Called writes down what somebody asked for, and what became of it.
func (d *Doors) Called(who trust.Identity, method string, request proto.Message, err error) {
	e := event(audit.Read, who)
	e.Action, e.Outcome = path.Base(method), "ok"
	asked(&e, request)
	switch code := fault.CodeOf(err); {
	case err == nil:
	case code == fault.Refused || code == fault.Unauthenticated:
		e.Kind = audit.Refusal
		d.refused(e, err)
		return
	default:
		e = failed(e, "failed", err)
	}
	if d.question(&e) {
		d.log.Note(e)
	}
}

// Relayed writes down a connection to a door of a node that a bastion passes on.
func (d *Doors) Relayed(who trust.Identity, node string, door trust.Door, tunnel bool) (end func(up, down int64, why string)) {
	began, e := time.Now(), event(audit.Relay, who)
	e.Action, e.Target = string(door), node
	if tunnel {
		e.Text = "through the tunnel that the node keeps"
	}
	d.log.Note(e)
	return func(up, down int64, why string) {
		e := event(audit.RelayEnd, who)
		e.Action, e.Target, e.Text = string(door), node, fmt.Sprintf("%d bytes up, %d down; %s", up, down, clip(why, maxText))
		d.log.Note(ended(e, began, nil))
	}
}

// Unrelayed writes down that a node could not be reached for somebody.
func (d *Doors) Unrelayed(who trust.Identity, node string, door trust.Door, err error) {
	e := failed(event(audit.Relay, who), "failed", err)
	e.Action, e.Target = string(door), node
	d.log.Note(e)
}

// Alarm writes down what people were told of, where nothing else does.
func (d *Doors) Alarm(a alarm.Event) {
	switch a.Kind {
	case alarm.Login, alarm.Refusal, alarm.Relay, // events of their own
		alarm.Alone, alarm.Sealed, alarm.Late: // said by the event of the deed and by its actor
		return
	}
	e := audit.Event{Kind: audit.Alarm, Action: string(a.Kind), Text: clip(a.Text, maxText),
		Actor: &audit.Actor{Person: a.Person, Role: a.Role, Credential: a.Credential, Fingerprint: a.Fingerprint, Serial: a.Serial, Door: a.Door, Source: a.Source}}
	if *e.Actor == (audit.Actor{}) {
		e.Actor = nil
	} else if a.Person == "" && !d.stranger(&e) {
		return
	}
	d.log.Note(e)
}

// asked copies the words of a request: its strings, numbers and parameters. No
// request holds a secret. What is long or large, such as a plan, a bundle or an
// approval, is named in Cut.
func asked(e *audit.Event, request proto.Message) {
	if request == nil {
		return
	}
	words := map[string]json.RawMessage{}
	request.ProtoReflect().Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		name := field.JSONName()
		switch {
		case field.IsList() || field.IsMap() || field.Kind() == protoreflect.BytesKind:
			e.Cut = append(e.Cut, name)
		case field.Kind() == protoreflect.MessageKind:
			if s, ok := value.Message().Interface().(*structpb.Struct); ok {
				if data, err := protojson.Marshal(s); err == nil && len(data) <= maxParameters {
					words[name] = data
					return true
				}
			}
			e.Cut = append(e.Cut, name)
		case field.Kind() == protoreflect.StringKind:
			text := clip(value.String(), maxText)
			if text != value.String() {
				e.Cut = append(e.Cut, name)
			}
			switch name {
			case "reason":
				e.Reason = text
			case "incident":
				e.Incident = text
			case "planId":
				e.PlanID = text
			case "planSha256":
				e.PlanSHA256 = text
			default:
				words[name] = quoted(text)
			}
		default:
			words[name], _ = json.Marshal(value.Interface()) // numbers and truths always are JSON
		}
		return true
	})
	if len(words) == 0 {
		return
	}
	data, err := json.Marshal(words)
	if err != nil || len(data) > 2*maxParameters {
		e.Cut = append(e.Cut, "parameters")
		return
	}
	e.Parameters = data
}

func quoted(text string) json.RawMessage {
	data, _ := json.Marshal(text) // a string always is JSON
	return data
}

// clip returns valid text of at most so many bytes.
func clip(text string, most int) string {
	text = strings.ToValidUTF8(text, string(utf8.RuneError))
	if len(text) <= most {
		return text
	}
	for most > 0 && !utf8.RuneStart(text[most]) {
		most--
	}
	return text[:most]
}

func join(a, b string) string {
	if b == "" {
		return a
	}
	return a + ": " + b
}
