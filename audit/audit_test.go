package audit_test

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// log is one that remembers, and fails where it is told to.
type log struct {
	mu       sync.Mutex // guards all below
	said     []string
	events   []audit.Event
	fails    map[string]error
	reserved int
}

func (l *log) say(what string, e audit.Event) (audit.Receipt, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.said = append(l.said, what+" "+string(e.Kind))
	if err := l.fails[what+" "+string(e.Kind)]; err != nil {
		return audit.Receipt{}, err
	}
	l.events = append(l.events, e)
	return audit.Receipt{ID: "id-" + string(e.Kind), Where: audit.Local}, nil
}

func (l *log) Append(ctx context.Context, e audit.Event) (audit.Receipt, error) {
	if err := ctx.Err(); err != nil {
		return audit.Receipt{}, err
	}
	return l.say("append", e)
}
func (l *log) Note(audit.Event)    {}
func (l *log) Hash([]byte) string  { return "" }
func (l *log) State() audit.State  { return audit.State{} }
func (l *log) story() string       { return strings.Join(l.said, ", ") }
func (l *log) effect(audit.Permit) { l.said = append(l.said, "effect") }

func (l *log) Reserve(e audit.Event) (audit.Room, error) {
	if _, err := l.say("reserve", e); err != nil {
		return nil, err
	}
	l.reserved++
	return &room{l: l}, nil
}

type room struct {
	l        *log
	released bool
}

func (r *room) Append(ctx context.Context, e audit.Event) (audit.Receipt, error) {
	if err := ctx.Err(); err != nil {
		return audit.Receipt{}, err
	}
	return r.l.say("room", e)
}

func (r *room) Release() {
	if !r.released {
		r.released = true
		r.l.reserved--
	}
}

var intent = audit.Event{Action: "scale", PlanID: "p", Session: "s", Drill: true, Actor: &audit.Actor{Person: "ann"}}

// TestDo: the intent is durable before the effect, the outcome is recorded after it,
// and the permit is valid in between and at no other time.
func TestDo(t *testing.T) {
	l := &log{}
	ctx, cancel := context.WithCancel(t.Context())
	var permit audit.Permit
	r, err := audit.Do(ctx, l, intent, func(ctx context.Context, p audit.Permit) []audit.Event {
		l.effect(p)
		permit = p
		if p.Check() != nil || p.Intent() != "id-intent" {
			t.Errorf("%v, %q", p.Check(), p.Intent())
		}
		cancel() // whoever asked has gone; what was done is recorded
		if ctx.Err() != nil {
			t.Error("the effect ends with its caller")
		}
		return []audit.Event{{Kind: audit.Objects}, {Outcome: "applied", Session: "forged"}}
	})
	if err != nil || r.ID != "id-intent" || l.story() != "reserve intent, append intent, effect, append objects, room outcome" || l.reserved != 0 {
		t.Fatalf("%+v, %v: %s", r, err, l.story())
	}
	for _, e := range l.events[2:] {
		if e.Of != "id-intent" || e.Session != "s" || !e.Drill || e.Actor == nil || e.Actor.Person != "ann" {
			t.Errorf("%+v", e)
		}
	}
	if err := permit.Check(); !fault.Is(err, fault.AuditUnavailable) || !strings.Contains(err.Error(), "is over") {
		t.Errorf("after the effect: %v", err)
	}
	if err := (audit.Permit{}).Check(); !fault.Is(err, fault.AuditUnavailable) || (audit.Permit{}).Intent() != "" {
		t.Errorf("a permit from nowhere: %v", err)
	}
}

// TestDoWithoutALog: what cannot be recorded does not happen.
func TestDoWithoutALog(t *testing.T) {
	refused := fault.New(fault.AuditUnavailable, "", "the disk is full")
	for _, at := range []string{"reserve intent", "append intent"} {
		l := &log{fails: map[string]error{at: refused}}
		_, err := audit.Do(t.Context(), l, intent, func(context.Context, audit.Permit) []audit.Event {
			t.Errorf("%s: the effect ran", at)
			return nil
		})
		if !fault.Is(err, fault.AuditUnavailable) || l.reserved != 0 {
			t.Errorf("%s: %v", at, err)
		}
	}
	// An outcome that was not recorded is told of; the others still are.
	for _, at := range []string{"append objects", "room outcome"} {
		l := &log{fails: map[string]error{at: refused}}
		_, err := audit.Do(t.Context(), l, intent, func(context.Context, audit.Permit) []audit.Event {
			return []audit.Event{{Kind: audit.Objects}, {}}
		})
		if !errors.Is(err, refused) || !slices.Equal(l.said[2:], []string{"append objects", "room outcome"}) {
			t.Errorf("%s: %v, %s", at, err, l.story())
		}
	}
}

// TestDoPanics: a fault in an effect is an outcome that nobody knows, and goes on.
func TestDoPanics(t *testing.T) {
	l := &log{}
	var permit audit.Permit
	func() {
		defer func() {
			if recover() != "ouch" {
				t.Error("the panic did not go on")
			}
		}()
		_, _ = audit.Do(t.Context(), l, intent, func(_ context.Context, p audit.Permit) []audit.Event {
			permit = p
			panic("ouch")
		})
	}()
	if e := l.events[len(l.events)-1]; e.Kind != audit.Outcome || e.Outcome != "unknown" || e.ErrorCode != string(fault.Unknown) || e.Of != "id-intent" || e.PlanID != "p" || permit.Check() == nil || l.reserved != 0 {
		t.Errorf("%+v", e)
	}
}

// TestBreakGlass: the reserve is for people who can act, not for machines, drills
// and questions.
func TestBreakGlass(t *testing.T) {
	for _, credential := range []trust.Kind{trust.Person, trust.Local, trust.Sealed, trust.Automation} {
		for _, role := range []trust.Role{trust.None, trust.Observer, trust.Responder, trust.Commander, trust.Approver} {
			actor := audit.ActorOf(trust.Identity{Person: "ann", Role: role, Kind: credential})
			want := credential != trust.Automation && (role == trust.Responder || role == trust.Commander)
			if e := (audit.Event{Kind: audit.Intent, Actor: actor}); e.BreakGlass() != want {
				t.Errorf("%s %s: %v", credential, role, e.BreakGlass())
			}
			for _, e := range []audit.Event{{Kind: audit.Read, Actor: actor}, {Kind: audit.Intent, Actor: actor, Drill: true}, {Kind: audit.Intent}} {
				if e.BreakGlass() {
					t.Errorf("%+v", e)
				}
			}
		}
	}
}

func TestNewID(t *testing.T) {
	at := time.Date(2026, 11, 23, 20, 5, 9, 7_000_000, time.FixedZone("", 3600))
	if id := audit.NewID(at, [8]byte{1, 2, 3}); id != "20261123T190509.007-0102030000000000" {
		t.Error(id)
	}
	if a, b := audit.NewID(at, [8]byte{255}), audit.NewID(at.Add(time.Millisecond), [8]byte{}); a >= b {
		t.Errorf("%s is not before %s", a, b)
	}
}

// TestSchema: README documents every field and every kind.
func TestSchema(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	events, err := os.ReadFile("event.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("json:\"(\\w+)|Kind = \"([a-z-]+)\"").FindAllSubmatch(events, -1) {
		if name := string(m[1]) + string(m[2]); !strings.Contains(string(readme), "`"+name+"`") {
			t.Errorf("README does not tell what %s is", name)
		}
	}
}

// TestKinds: whoever chooses events by their kind can name each.
func TestKinds(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "event.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	ast.Inspect(file, func(node ast.Node) bool {
		if spec, is := node.(*ast.ValueSpec); is && spec.Type != nil && fmt.Sprint(spec.Type) == "Kind" {
			n += len(spec.Names)
		}
		return true
	})
	if n == 0 || n != len(audit.Kinds) {
		t.Errorf("there are %d kinds, and %d are listed", n, len(audit.Kinds))
	}
}
