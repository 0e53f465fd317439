package record

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// kept is a log in memory.
type kept struct {
	audit.Log
	mu     sync.Mutex // guards events
	events []audit.Event
}

func (k *kept) Note(e audit.Event) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.events = append(k.events, e)
}

func (k *kept) Append(_ context.Context, e audit.Event) (audit.Receipt, error) {
	k.Note(e)
	return audit.Receipt{}, nil
}

// take returns what came since it was last called.
func (k *kept) take() []audit.Event {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := k.events
	k.events = nil
	return all
}

var alice = trust.Identity{Person: "alice", Role: trust.Responder, Door: trust.SSH, Kind: trust.Person, Fingerprint: "SHA256:x", Serial: "7", Source: "192.0.2.1:5", Session: "s1",
	Scope: trust.Scope{Drill: true}}

func TestDoors(t *testing.T) {
	log := &kept{}
	r := NewDoors(log)
	lapsed := fault.New(fault.Unauthenticated, "renew it", "the credential of alice ended")
	get := &halliganv1.GetRequest{Reason: "because", Incident: "INC-1", Parameters: &structpb.Struct{Fields: map[string]*structpb.Value{"target": structpb.NewStringValue("pods")}}}
	for _, c := range []struct {
		name string
		do   func()
		want string // kind action outcome code target | text, as far as they matter
	}{
		{"login", func() { r.Login(alice)(nil) }, "login|logout"},
		{"login that ends", func() { r.Login(alice)(lapsed) }, "login|logout ended unauthenticated"},
		{"answered", func() { r.Called(alice, "/halligan.v1.Agent/Get", get, nil) }, "read Get ok"},
		{"failed", func() { r.Called(alice, "/halligan.v1.Agent/Get", get, errors.New("x")) }, "read Get failed failed"},
		{"refused", func() { r.Called(alice, "/halligan.v1.Agent/Get", get, fault.New(fault.Refused, "", "no")) }, "refusal Get refused refused"},
		{"turned away", func() { r.Refused(alice, lapsed) }, "refusal refused unauthenticated"},
		{"relayed", func() { r.Relayed(alice, "cp-1.prod", trust.GRPC, true)(1, 2, "the client hung up") }, "relay grpc cp-1.prod|relay-end grpc cp-1.prod"},
		{"not relayed", func() { r.Unrelayed(alice, "cp-1.prod", trust.SSH, fault.New(fault.Unreachable, "", "x")) }, "relay ssh failed unreachable cp-1.prod"},
		{"alarm", func() { r.Alarm(alarm.Event{Kind: alarm.Clock, Text: "x"}) }, "alarm clock"},
		{"alarms that are events of their own", func() {
			for _, k := range []alarm.Kind{alarm.Login, alarm.Refusal, alarm.Relay, alarm.Alone, alarm.Sealed, alarm.Late} {
				r.Alarm(alarm.Event{Kind: k})
			}
		}, ""},
	} {
		c.do()
		var got []string
		for _, e := range log.take() {
			got = append(got, strings.Join(strings.Fields(strings.Join([]string{string(e.Kind), e.Action, e.Outcome, e.ErrorCode, e.Target}, " ")), " "))
			if e.Kind == audit.Alarm {
				continue
			}
			if a := *e.Actor; a != *audit.ActorOf(alice) || e.Session != "s1" || !e.Drill {
				t.Errorf("%s: %+v", c.name, e)
			}
			if (e.Kind == audit.Read || e.Action == "Get") && (e.Reason != "because" || e.Incident != "INC-1" || string(e.Parameters) != `{"parameters":{"target":"pods"}}`) {
				t.Errorf("%s: %+v", c.name, e)
			}
		}
		if text := strings.Join(got, "|"); text != c.want {
			t.Errorf("%s: %q, want %q", c.name, text, c.want)
		}
	}
}

// TestStrangers: whoever is nobody cannot fill the log.
func TestStrangers(t *testing.T) {
	log := &kept{}
	r := NewDoors(log)
	for i := range 10_000 {
		r.Refused(trust.Identity{Fingerprint: fmt.Sprint(i), Source: "192.0.2.9:1"}, fault.New(fault.Unauthenticated, "", "unknown"))
		r.Alarm(alarm.Event{Kind: "flood", Source: "192.0.2.9:1"})
	}
	if n := len(log.take()); n < strangersBurst || n > strangersBurst+5 {
		t.Errorf("%d events", n)
	}
	r.Refused(alice, errors.New("x"))
	if n := len(log.take()); n != 1 {
		t.Errorf("who is known has %d events", n)
	}
	r.strangers.SetLimit(rate.Inf)
	r.Refused(trust.Identity{}, errors.New("x"))
	if e := log.take(); len(e) != 1 || e[0].Count < 10_000 {
		t.Errorf("the next one does not stand for those before: %+v", e)
	}
}

// TestAskers: whoever may look cannot fill the log, and how much was asked is on record.
func TestAskers(t *testing.T) {
	log := &kept{}
	r := NewDoors(log)
	logout := r.Login(alice)
	bob := alice
	bob.Person = "bob"
	const more = 1000
	for i := range questionsBurst + more {
		req := &halliganv1.GetRequest{Parameters: &structpb.Struct{Fields: map[string]*structpb.Value{"target": structpb.NewStringValue(fmt.Sprint("pods/", i))}}}
		r.Called(alice, "/x/Get", req, []error{nil, errors.New("x"), fault.New(fault.Refused, "", "no")}[i%3])
	}
	r.Called(bob, "/x/Get", nil, nil)
	logout(nil)
	events := log.take()
	if n := len(events); n < questionsBurst+3 || n > questionsBurst+100 || events[n-2].Actor.Person != "bob" {
		t.Errorf("%d events", n)
	}
	told := 0
	for _, e := range events {
		var n int
		if _, text, ok := strings.Cut(e.Text, ": "); ok && e.Kind == audit.Logout {
			e.Text = text
		}
		if _, err := fmt.Sscanf(e.Text, "%d more questions", &n); err == nil {
			told += n
		}
	}
	if told+len(events)-3 != questionsBurst+more {
		t.Errorf("%d events tell of %d more", len(events), told)
	}
}

// TestHostile: whatever is asked for, what is written down is bounded, valid and
// says what it leaves out.
func TestHostile(t *testing.T) {
	log := &kept{}
	r := NewDoors(log)
	long := strings.Repeat("\x1b]0;é\xff", 1<<20)
	valid := strings.Repeat("\x1b]0;é", 1<<20)
	many := &structpb.Struct{Fields: map[string]*structpb.Value{"target": structpb.NewStringValue(valid)}}
	for _, request := range []proto.Message{
		&halliganv1.GetRequest{Parameters: many, Reason: valid, Incident: valid},
		&halliganv1.PlanRequest{Action: valid, Parameters: many},
		&halliganv1.ApplyRequest{PlanId: valid, PlanSha256: valid, Approvals: []string{valid}, Alone: true},
		&halliganv1.ExchangeBundleRequest{Bundle: []byte(long)},
		&halliganv1.PostPlanRequest{Plan: &halliganv1.Plan{Reason: valid}},
		nil, (*halliganv1.GetRequest)(nil),
	} {
		r.Called(alice, "/x/"+"Y", request, fault.New(fault.Failed, "", "%s", long))
	}
	r.Relayed(alice, "n", trust.SSH, false)(0, 0, long)
	r.Refused(alice, errors.New(long))
	r.Alarm(alarm.Event{Kind: "x", Text: long, Person: "p"})
	events := log.take()
	if len(events) != 11 {
		t.Errorf("%d events", len(events))
	}
	for _, e := range events {
		data, err := json.Marshal(e)
		if err != nil || len(data) > 32<<10 || !utf8.Valid([]byte(e.Text+e.Error+e.Reason)) {
			t.Errorf("%d bytes, %v: %.200s", len(data), err, data)
		}
	}
	if got := strings.Join(events[0].Cut, " "); !strings.Contains(got, "parameters") || !strings.Contains(got, "reason") || !strings.Contains(got, "incident") {
		t.Errorf("cut: %q", got)
	}
	if e := events[2]; string(e.Parameters) != `{"alone":true}` || !strings.Contains(strings.Join(e.Cut, " "), "approvals") {
		t.Errorf("%+v", e)
	}
}
