package report

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode"

	"golang.org/x/net/html"

	"github.com/halligan-io/halligan/audit"
)

var keep = flag.String("keep", "", "`folder` to leave reports and pictures of them in")

var begin = time.Date(2026, 11, 23, 3, 12, 7, 0, time.UTC)

// incident is a telemetry outage as it could have been.
type incident struct {
	t      testing.TB
	events []Event
	seqs   map[string]uint64
}

func (i *incident) add(seconds float64, origin string, e audit.Event) string {
	i.t.Helper()
	if i.seqs == nil {
		i.seqs = map[string]uint64{}
	}
	e.Version, e.Origin, e.Time, e.Seq = audit.Version, origin, begin.Add(time.Duration(seconds*float64(time.Second))), i.seqs[origin]
	i.seqs[origin]++
	e.ID = audit.NewID(e.Time, [8]byte{0: origin[0], 1: origin[3], 7: byte(e.Seq)})
	raw, err := json.Marshal(e)
	if err != nil {
		i.t.Fatal(err)
	}
	i.events = append(i.events, Event{Event: e, Raw: raw, Witnessed: seconds < 300,
		Proof: fmt.Appendf(nil, "c2sp.org/tlog-proof@v1\nindex %d\n8H2s…\n\nhalligan.io/log/%s/5f0c6a1e/1\n%d\nc1Jk…=\n\n— halligan.io/log/%s/5f0c6a1e/1 fXr0…\n", e.Seq, origin, e.Seq+1, origin)})
	return e.ID
}

const cp1, cp2, gate = "cp-1.prod", "cp-2.prod", "bastion-a.bastion"

func outage(t testing.TB) Evidence {
	i := &incident{t: t}
	const inc = "INC-2041"
	anna := &audit.Actor{Person: "anna@example.com", Role: "responder", Credential: "person", Fingerprint: "SHA256:3hTqJXoVq8mYp4d0sQmU1oZ5mJ7uJ1c6gk0xw3u1yA0", Serial: "1841", CA: "SHA256:ca", Door: "ssh", Source: "192.0.2.41:50122"}
	bo := &audit.Actor{Person: "bo@example.com", Role: "commander", Credential: "person", Fingerprint: "SHA256:9ZpWb0", Serial: "1777", Door: "ssh", Source: "192.0.2.77:41200", Late: true}
	robot := &audit.Actor{Person: "nightly-robot", Role: "responder", Credential: "automation", Door: "grpc", Source: "198.51.100.9:40000"}
	i.add(0, gate, audit.Event{Kind: audit.Login, Actor: anna, Session: "b-1", Incident: inc})
	i.add(0.4, gate, audit.Event{Kind: audit.Relay, Actor: anna, Session: "b-1", Target: cp1, Incident: inc})
	i.add(1.1, cp1, audit.Event{Kind: audit.Login, Actor: anna, Session: "a-1"})
	i.add(1.3, cp1, audit.Event{Kind: audit.Session, Actor: anna, Session: "a-1", Action: "shell", Target: "20261123-031208-0a1b2c3d4e"})
	i.add(6, cp1, audit.Event{Kind: audit.Read, Actor: anna, Session: "a-1", Action: "status"})
	i.add(14, cp1, audit.Event{Kind: audit.Read, Actor: anna, Session: "a-1", Action: "top", Count: 3})
	refused := i.add(21, cp1, audit.Event{Kind: audit.Refusal, Actor: anna, Session: "a-1", Incident: inc, Action: "delete", Parameters: json.RawMessage(`{"target":"ns/telemetry"}`), ErrorCode: "refused", Error: "namespaces are protected by the policy"})
	_ = refused
	key := "/registry/daemonsets/telemetry/collector"
	scale := i.add(37, cp1, audit.Event{Kind: audit.Intent, Actor: anna, Session: "a-1", Incident: inc, Reason: "collector lists every pod each second and starves the API servers", Action: "scale",
		Parameters: json.RawMessage(`{"target":"ds/collector","namespace":"telemetry","to":0}`), PlanID: "p-7f3a", PlanSHA256: strings.Repeat("ab", 32),
		Objects: []audit.Object{{Key: key, UID: "0a6e", RevisionBefore: 918233, Operation: "update", Changes: []audit.Change{{Path: "spec.template.spec.nodeSelector", After: `{"halligan.io/scaled-to-zero":"true"}`}}}}})
	i.add(37.4, cp1, audit.Event{Kind: audit.Outcome, Actor: anna, Session: "a-1", Of: scale, Action: "scale", Outcome: "applied", Via: "etcd", Objects: []audit.Object{{Key: key, UID: "0a6e", RevisionBefore: 918233, RevisionAfter: 918240, Outcome: "applied"}}})
	i.add(52, cp2, audit.Event{Kind: audit.Login, Actor: bo, Session: "a-2"})
	i.add(58, cp2, audit.Event{Kind: audit.Secret, Actor: bo, Session: "a-2", Incident: inc, Action: "get", Parameters: json.RawMessage(`{"target":"secret/collector-token","namespace":"telemetry","reveal":true}`), Reason: "is it the leaked one?"})
	var objects []audit.Object
	for n := range 4 {
		objects = append(objects, audit.Object{Key: fmt.Sprintf("/registry/clusterrolebindings/collector-%d", n), Operation: "delete", RevisionBefore: int64(900 + n), Changes: []audit.Change{{Path: "(object)", Before: "ClusterRoleBinding to telemetry:collector"}}})
	}
	revoke := i.add(80, cp2, audit.Event{Kind: audit.Intent, Actor: bo, Session: "a-2", Incident: inc, Reason: "it must not come back", Action: "revoke", Parameters: json.RawMessage(`{"subject":"sa/collector","namespace":"telemetry","hard":true}`),
		PlanID: "p-9911", PlanSHA256: strings.Repeat("cd", 32), Alone: true, ApprovedBy: nil, Objects: objects, ObjectCount: 7})
	i.add(81.9, cp2, audit.Event{Kind: audit.Outcome, Actor: bo, Session: "a-2", Of: revoke, Action: "revoke", Outcome: "partial", Via: "etcd", ErrorCode: "stale", Error: "1 of 7 bindings was changed meanwhile, and left as it is",
		Objects: []audit.Object{{Key: "/registry/clusterrolebindings/collector-3", Outcome: "stale", Error: "it is not what was planned"}}})
	i.add(82, cp2, audit.Event{Kind: audit.Alarm, Text: "bo@example.com acted alone: revoke --hard"})
	i.add(95, cp1, audit.Event{Kind: audit.Refusal, Actor: robot, Incident: inc, Action: "scale", Parameters: json.RawMessage(`{"target":"ds/collector","namespace":"telemetry","to":1}`), ErrorCode: "refused", Error: "automation may not undo what a person did"})
	undo := i.add(290, cp1, audit.Event{Kind: audit.Intent, Actor: anna, Session: "a-1", Incident: inc, Reason: "fixed release 4.2.1 is out", Action: "undo", Parameters: json.RawMessage(`{"action":"p-7f3a"}`), Undoes: "p-7f3a", PlanID: "p-aa01",
		ApprovedBy: []audit.Approval{{Person: "bo@example.com"}}, Objects: []audit.Object{{Key: key, UID: "0a6e", RevisionBefore: 918240, Changes: []audit.Change{{Path: "spec.template.spec.nodeSelector", Before: `{"halligan.io/scaled-to-zero":"true"}`}}}}})
	i.add(290.6, cp1, audit.Event{Kind: audit.Outcome, Actor: anna, Session: "a-1", Of: undo, Action: "undo", Outcome: "applied", Via: "api"})
	i.add(320, cp1, audit.Event{Kind: audit.SessionEnd, Actor: anna, Session: "a-1", Action: "shell", Target: "20261123-031208-0a1b2c3d4e", Text: "exit status 0 after 5m19s"})
	i.add(320.2, cp1, audit.Event{Kind: audit.Logout, Actor: anna, Session: "a-1"})
	return Evidence{Incident: inc, Made: begin.Add(9 * time.Hour), Events: i.events,
		Recordings: []Recording{{Name: "20261123-031208-0a1b2c3d4e", Origin: cp1, Data: shell()}},
		Logs: []Log{
			{Origin: cp1, Lineage: "5f0c6a1e", Events: 1204, VouchedBy: "the host certificate of cp-1.prod", Witnesses: []Witness{{"bastion-a.bastion", 1202}, {"bastion-b.bastion", 1202}}, Unwitnessed: 2, VKeys: []string{"halligan.io/log/cp-1.prod/5f0c6a1e/1+3c1f0a7e+AbcdEfgh"}},
			{Origin: cp2, Lineage: "77aa0102", Events: 310, VouchedBy: "the host certificate of cp-2.prod", Witnesses: []Witness{{"bastion-a.bastion", 310}}},
		}}
}

// TestPassedOn: that somebody was at a node a minute earlier is not when they came in
// for this incident.
func TestPassedOn(t *testing.T) {
	i := &incident{t: t}
	anna := &audit.Actor{Person: "anna", Role: "responder", Door: "ssh", Source: "192.0.2.41:1"}
	i.add(0, gate, audit.Event{Kind: audit.Relay, Actor: anna, Session: "b-1", Target: cp1})
	i.add(1, gate, audit.Event{Kind: audit.RelayEnd, Actor: anna, Session: "b-1", Target: cp1})
	i.add(44, gate, audit.Event{Kind: audit.Relay, Actor: anna, Session: "b-2", Target: cp1})
	i.add(44.1, cp1, audit.Event{Kind: audit.Login, Actor: anna, Session: "a-1"})
	i.add(45, gate, audit.Event{Kind: audit.Relay, Actor: anna, Session: "b-3", Target: cp2}) // of which no login is known
	done := i.add(46, cp1, audit.Event{Kind: audit.Intent, Actor: anna, Session: "a-1", Incident: "INC-1", Action: "scale", PlanID: "p"})
	i.add(46.5, cp1, audit.Event{Kind: audit.Outcome, Actor: anna, Session: "a-1", Of: done, Action: "scale", Outcome: "applied"})
	i.add(60, gate, audit.Event{Kind: audit.RelayEnd, Actor: anna, Session: "b-2", Target: cp1})
	i.add(5000, cp1, audit.Event{Kind: audit.Objects, Of: done, Text: "its before-images were sealed once more"})
	s := New(Evidence{Incident: "INC-1", Made: begin, Events: i.events})
	if want := begin.Add(44 * time.Second); !s.First.Equal(want) || !s.Actions[0].CameIn.Equal(want) {
		t.Errorf("the story begins at %s, and they came in at %s, want %s", s.First, s.Actions[0].CameIn, want)
	}
	if want := begin.Add(time.Minute); !s.Last.Equal(want) {
		t.Errorf("the story ends at %s, want %s", s.Last, want)
	}
	if n := len(s.take(Evidence{Events: i.events})); n != len(i.events)-2 {
		t.Errorf("%d events are left, want all but the earlier connection", n)
	}
}

func shell() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"version":2,"width":90,"height":18,"timestamp":%d,"env":{"TERM":"xterm"}}`+"\n", begin.Unix()+1)
	at := 0.0
	out := func(pause float64, text string) {
		at += pause
		data, _ := json.Marshal(text)
		fmt.Fprintf(&b, "[%.3f,\"o\",%s]\n", at, data)
	}
	out(0, "Welcome to cp-1.prod. What you do here is recorded.\r\n\x1b[1mresponder@cp-1.prod>\x1b[0m ")
	for _, c := range "top" {
		out(0.2, string(c))
	}
	fmt.Fprintf(&b, "[%.3f,\"m\",\"top\"]\n", at)
	out(0.5, "\r\n\x1b[33mds/collector -n telemetry\x1b[0m   9,412 requests/s   lists all pods\r\n\r\nsuggested: scale ds/collector -n telemetry --to 0\r\n\x1b[1mresponder@cp-1.prod>\x1b[0m ")
	out(33, "scale ds/collector -n telemetry --to 0\r\n")
	out(0.6, "\x1b[32mapplied\x1b[0m through etcd in 0.4 s\r\n\x1b[1mresponder@cp-1.prod>\x1b[0m ")
	return b.Bytes()
}

func render(t testing.TB, in Evidence) (markdown, page string) {
	t.Helper()
	s := New(in)
	var m, h strings.Builder
	if err := s.Markdown(&m); err != nil {
		t.Fatal(err)
	}
	if err := s.HTML(&h); err != nil {
		t.Fatal(err)
	}
	return m.String(), h.String()
}

func leave(t testing.TB, name, text string) {
	if *keep == "" {
		return
	}
	if err := os.WriteFile(filepath.Join(*keep, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestStory: whoever was not there can tell from it what happened.
func TestStory(t *testing.T) {
	in := outage(t)
	s := New(in)
	m, page := render(t, in)
	leave(t, "report.md", m)
	leave(t, "report.html", page)
	if len(s.Actions) != 3 || len(s.People) != 3 || len(s.Sessions) != 1 {
		t.Fatalf("%d actions, %d people, %d sessions", len(s.Actions), len(s.People), len(s.Sessions))
	}
	scale, revoke := s.Actions[0], s.Actions[1]
	if scale.Title != "scale ds/collector -n telemetry --to 0" || scale.Outcome != "applied" || scale.Tone != Good || scale.Via != "etcd" || scale.Took() != "400 ms" ||
		scale.UndoneBy != "action 3" || len(scale.Proofs) != 2 || scale.Objects[0].RevisionAfter != 918240 || len(scale.Objects[0].Changes) != 1 || scale.Cast != 1 {
		t.Errorf("scale: %+v", scale)
	}
	if revoke.Tone != Warn || !revoke.Alone || revoke.ObjectCount != 7 || revoke.Objects[3].Error == "" {
		t.Errorf("revoke: %+v", revoke)
	}
	for _, part := range []string{"anna@example.com came in first, at 03:12:07 from 192.0.2.41; the first change took effect 37 s later: scale ds/collector -n telemetry --to 0.",
		"3 actions were begun: 2 applied, 1 partial; 1 undone again."} {
		if !strings.Contains(strings.Join(s.Lead, "\n"), part) {
			t.Errorf("%q is not in %q", part, s.Lead)
		}
		if !strings.Contains(page, part) {
			t.Errorf("%q is not in the page", part)
		}
	}
	for _, part := range []string{"| From first login to first effect | **37 s** |", "the last 2 are not yet witnessed", "| spec.template.spec.nodeSelector |  | {\"halligan.io/scaled-to-zero\":\"true\"} |"} {
		if !strings.Contains(m, part) {
			t.Errorf("%q is not in %s", part, m)
		}
	}
	// Nothing of what is not known is passed over.
	in.Events = in.Events[:8]
	in.Problems = []string{"the log of cp-3.prod was forked"}
	if s := New(in); len(s.Problems) != 2 || !strings.Contains(s.Problems[0]+s.Problems[1], "no outcome of it is in the evidence") {
		t.Errorf("problems: %q", s.Problems)
	}
	if s := New(Evidence{Incident: "INC-0", Made: begin}); len(s.Lead) != 1 || !strings.Contains(s.Lead[0], "No event") {
		t.Errorf("nothing: %q", s.Lead)
	}
}

// TestGather: an incident takes the logins of its sessions with it, and not what
// else somebody did.
func TestGather(t *testing.T) {
	in := outage(t)
	other := audit.Event{Kind: audit.Intent, Incident: "INC-9", Session: "a-1", Origin: cp1, Time: begin}
	alarm := audit.Event{Kind: audit.Alarm, Origin: "cp-9.test", Time: begin}
	held, err := json.Marshal(in.Events[8].Event)
	if err != nil {
		t.Fatal(err)
	}
	all := append([]Event{{Event: other}, {Event: alarm}, {Event: audit.Event{Kind: audit.Held, Origin: gate, Target: in.Events[8].Origin, Payload: string(held), Time: begin}}}, in.Events...)
	g := NewGatherer("inc-2041")
	for _, e := range all {
		g.Look(e.Event)
	}
	if !g.Found() {
		t.Fatal("not found")
	}
	var got []Event
	for _, e := range all {
		if g.Wants(e.Event) {
			got = append(got, e)
		}
	}
	// Whoever reads a recording later has no part in it.
	late := audit.Event{Kind: audit.Secret, Action: "ReadRecording", Incident: "INC-2041", Session: "late", Origin: cp1, Time: begin.Add(time.Hour), Actor: &audit.Actor{Person: "auditor"}}
	g.Look(late)
	if g.Wants(audit.Event{Kind: audit.Login, Session: "late"}) || !g.Wants(late) {
		t.Error("a review is taken for what happened")
	}
	if s := New(Evidence{Incident: "INC-2041", Made: begin, Events: append(in.Events, Event{Event: late})}); len(s.People) != 3 || !s.Last.Equal(New(in).Last) {
		t.Errorf("a review is taken for what happened: %v", s.People)
	}
	// bo's login at cp-2 is of a session that names the incident.
	if len(got) != len(in.Events)+1 || got[0].Kind != audit.Held {
		t.Errorf("%d events of %d", len(got), len(all))
	}
	if s := New(Evidence{Incident: "INC-2041", Made: begin, Events: got}); len(s.Timeline) != len(New(in).Timeline) {
		t.Errorf("an event that was held is told twice: %d moments", len(s.Timeline))
	}
}

// TestOthersWord: what one log says of another daemon's deeds changes nothing of what
// that daemon's own log says.
func TestOthersWord(t *testing.T) {
	in := outage(t)
	want := New(in)
	intent := in.Events[7].Event
	event := func(e audit.Event) Event {
		raw, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		return Event{Event: e, Raw: raw}
	}
	lie := func(kind audit.Kind, of audit.Event) Event {
		return event(audit.Event{Version: 1, ID: "lie-" + string(kind) + string(of.Kind), Kind: kind, Origin: gate, Target: of.Origin, Payload: string(event(of).Raw), Time: of.Time})
	}
	denied := audit.Event{Version: 1, ID: "x", Kind: audit.Outcome, Origin: cp1, Of: intent.ID, Time: intent.Time.Add(time.Hour), Outcome: "refused"}
	elsewhere, other := denied, intent
	elsewhere.Origin, other.Reason = gate, "none"
	same := intent
	same.Kind, same.Origin = audit.Read, gate
	for name, more := range map[string]Event{
		"an event with the ID of another's": event(same), "an outcome of another's intent": event(elsewhere), "an outcome that is said to be held": lie(audit.Held, denied),
		"an outcome that is said to be taken back": lie(audit.Adopted, denied), "an intent that is said to be held": lie(audit.Held, other),
	} {
		got := New(Evidence{Incident: in.Incident, Made: in.Made, Events: append([]Event{more}, in.Events...)})
		found := false
		for _, a := range got.Actions {
			w := want.Actions[0]
			found = found || a.ID == w.ID && a.Reason == w.Reason && a.Outcome == w.Outcome && len(a.Proofs) == len(w.Proofs) && a.Done.Equal(w.Done)
		}
		if !found || len(got.Timeline) != len(want.Timeline)+1 {
			t.Errorf("%s: %d moments, %+v", name, len(got.Timeline), got.Actions)
		}
	}
}

var nasty = "\x1b]0;owned\a\x1b[2J\r\n# Heading\n| a | b |\n[x](javascript:alert(1)) ![y](http://evil.example/p.png) <img src=x onerror=alert(1)></script><script>alert(2)</script> https://evil.example www.evil.example {{.}} `code` \u202e\u009b31m\x00\u2028 ]]> --> \"'=" + "\xff"

// TestHostile: no text is more than text, in any field of anything.
func TestHostile(t *testing.T) {
	like := outage(t)
	like.Problems = []string{"one"}
	_, calm := render(t, like)
	m, page := render(t, hostile(t))
	leave(t, "hostile.md", m)
	leave(t, "hostile.html", page)
	want, got := elementsOf(t, calm), elementsOf(t, page)
	for name := range got {
		if want[name] == 0 {
			t.Errorf("the page has an element %s", name)
		}
	}
	if n := strings.Count(page, "<script"); n != 3 { // player, page and one recording
		t.Errorf("%d scripts", n)
	}
	for name, text := range map[string]string{"page": page, "Markdown": m} {
		for i, r := range text {
			if !unicode.IsPrint(r) && r != '\n' && r != '\t' && !strings.Contains(playerJS, string(r)) {
				t.Errorf("%s: %q at %d: %.60q", name, r, i, text[max(0, i-20):])
				break
			}
		}
	}
	if hits := regexp.MustCompile("(?m)<[a-z!/]|^# Heading|[^\\\\]\\[x\\]|[^\\\\]!\\[|[^\\\\]://|[^;]www\\.|[^\\\\]`code`").FindAllString(regexp.MustCompile("``[^\n]*?``").ReplaceAllString(m, ""), 3); hits != nil {
		t.Errorf("Markdown has %q", hits)
	}
	if n := len(page) - len(playerJS) - len(playerCSS); n > 4<<20 {
		t.Errorf("%d bytes", n)
	}
}

// hostile has nasty text in every field.
func hostile(t testing.TB) Evidence {
	in := outage(t)
	long := nasty + strings.Repeat("A", 1<<20)
	for i := range in.Events {
		e := &in.Events[i].Event
		kind, at, id, of, target := e.Kind, e.Time, e.ID, e.Of, e.Target
		tainted := audit.Event{Version: 1, Kind: kind, Time: at, ID: id + nasty, Of: of + nasty, Target: nasty, Reason: long, Origin: nasty, Incident: nasty, Action: nasty, Error: nasty, ErrorCode: nasty, Outcome: nasty, Text: nasty, Session: nasty,
			PlanID: nasty, PlanSHA256: nasty, Undoes: nasty, Via: nasty, Parameters: e.Parameters, ApprovedBy: []audit.Approval{{Person: nasty}},
			Actor:   &audit.Actor{Person: nasty, Role: nasty, Credential: nasty, Fingerprint: nasty, Serial: nasty, Door: nasty, Source: nasty},
			Objects: []audit.Object{{Key: nasty, UID: nasty, Operation: nasty, Outcome: nasty, Error: nasty, Changes: []audit.Change{{Path: nasty, Before: nasty, After: nasty}}}}}
		if kind == audit.Session {
			tainted.Target = target
		}
		if tainted.Parameters != nil {
			tainted.Parameters, _ = json.Marshal(map[string]string{"target": nasty, nasty: nasty})
		}
		*e = tainted
		in.Events[i].Raw, in.Events[i].Proof = []byte(`{"x":"\u001b`+"\u202e</script>"+`"}`), []byte(nasty)
	}
	in.Incident, in.Problems = nasty, []string{nasty}
	in.Recordings[0].Problem, in.Recordings[0].Origin, in.Recordings[0].Data = nasty, nasty, hostileCast()
	in.Recordings = append(in.Recordings, Recording{Name: nasty, Origin: nasty, Problem: nasty})
	for i := range in.Logs {
		in.Logs[i] = Log{Origin: nasty, Lineage: nasty, VouchedBy: nasty, Witnesses: []Witness{{By: nasty}}, VKeys: []string{nasty}, Problems: []string{nasty}}
	}
	return in
}

// hostileCast wants a terminal without end, and to be HTML.
func hostileCast() []byte {
	var b bytes.Buffer
	b.WriteString(`{"version":2,"width":1000000000,"height":1000000000,"title":"</script><script>alert(3)</script>","theme":{"fg":"url(http://evil.example)","bg":"x","palette":"y"},"idle_time_limit":-1}` + "\n")
	for i, text := range []string{"</script><script>alert(4)</script><img src=x onerror=alert(5)>", "\x1b[8;999999;", "999999t\x1b[8;65535;65535t", "\x1b]52;c;AAAA\a\x1b]8;;javascript:alert(6)\a link \x1b]8;;\a", "\x1b[999999999;999999999H x", "\u009b8;99999;99999t done"} {
		data, _ := json.Marshal(text)
		fmt.Fprintf(&b, "[%d.0,\"o\",%s]\n[%d.1,\"r\",\"99999999x99999999\"]\n[%d.2,\"i\",\"typed secret\"]\n[%d.3,\"m\",\"</script>\"]\n", i, data, i, i, i)
	}
	return b.Bytes()
}

func elementsOf(t testing.TB, page string) map[string]int {
	t.Helper()
	root, err := html.Parse(strings.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for n := range root.Descendants() {
		if n.Type != html.ElementNode {
			continue
		}
		count[n.Data]++
		for _, a := range n.Attr {
			if strings.HasPrefix(a.Key, "on") || a.Key == "style" || a.Key == "src" || a.Key == "href" && !strings.HasPrefix(a.Val, "#") {
				t.Errorf("<%s %s=%q>", n.Data, a.Key, a.Val)
			}
		}
	}
	return count
}

// TestTape: a page gets of a recording what a terminal shows, within bounds.
func TestTape(t *testing.T) {
	tape, err := readTape(hostileCast())
	if err != nil {
		t.Fatal(err)
	}
	if tape.Columns != maxColumns || tape.Rows != maxRows {
		t.Errorf("%d×%d", tape.Columns, tape.Rows)
	}
	data, err := tapeData(&tape)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"<", "typed secret", "evil.example", "9999t", "65535", "99999999"} {
		if strings.Contains(string(data), part) && part != "99999999" {
			t.Errorf("%q is in %s", part, data)
		}
	}
	if !strings.Contains(string(data), "400x120") || !strings.Contains(string(data), " done") {
		t.Errorf("%s", data)
	}
	// Killed while it wrote.
	torn := shell()
	if tape, err := readTape(torn[:len(torn)-5]); err != nil || tape.Cut == "" || len(tape.Events) != 7 {
		t.Errorf("%+v %v", tape, err)
	}
	if _, err := readTape([]byte("{}\n")); err == nil {
		t.Error("no recording, and no error")
	}
}

func TestMarkdown(t *testing.T) {
	for in, want := range map[string]string{"1. one": `1\. one`, "# x": `\# x`, "- x": `\- x`, "=== ": `\=== `, "12) x": `12\) x`, "2026 was": "2026 was", "a_b*c": `a\_b\*c`, "https://x": `https\://x`, "": "", "7": "7",
		"WWW.x": "&#87;WW.x", "<b>&": "&lt;b&gt;&amp;", "10.0.0.1": `10\.0.0.1`} {
		if got := beginning(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if got := md("10.0.0.1 - #"); got != "10.0.0.1 - #" {
		t.Error(got)
	}
}

func FuzzTape(f *testing.F) {
	f.Add(shell())
	f.Add(hostileCast())
	f.Fuzz(func(t *testing.T, data []byte) {
		tape, err := readTape(data)
		if err != nil {
			return
		}
		block, err := tapeData(&tape)
		if err != nil || strings.ContainsAny(string(block), "<>") || tape.Columns > maxColumns || tape.Rows > maxRows {
			t.Fatalf("%v %q", err, block)
		}
	})
}

// TestPlayer: what is embedded as it is cannot end its own element.
func TestPlayer(t *testing.T) {
	for name, text := range map[string]string{"player": playerJS, "page.js": pageJS, "player.css": playerCSS, "page.css": pageCSS} {
		for _, part := range []string{"</script", "</style", "<!--", "\r"} {
			if strings.Contains(strings.ToLower(text), part) {
				t.Errorf("%s has %q", name, part)
			}
		}
		if strings.HasSuffix(name, ".css") && regexp.MustCompile(`(?i)url\(|@import`).MatchString(text) {
			t.Errorf("%s loads something", name)
		}
	}
}
