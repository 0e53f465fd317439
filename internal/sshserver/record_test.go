package sshserver

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// notes is a Record that keeps a line of each thing, with $S for the connection's
// name.
type notes struct {
	mu    sync.Mutex // guards lines
	lines []string
}

func (n *notes) add(who trust.Identity, format string, args ...any) {
	text := who.Person + " " + fmt.Sprintf(format, args...)
	if who.Session != "" {
		text = strings.ReplaceAll(text, who.Session, "$S")
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lines = append(n.lines, text)
}

func (n *notes) all() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.lines)
}

func (n *notes) Login(who trust.Identity) func(error) {
	n.add(who, "in as %s", who.Session)
	return func(why error) { n.add(who, "out: %v", why) }
}

func (n *notes) Refused(who trust.Identity, err error) { n.add(who, "refused: %v", err) }

func (n *notes) Session(who trust.Identity, s Opened) func(int, error) {
	n.add(who, "begins %s: %s %q %v", s.ID, s.Form, s.Line, s.Terminal)
	return func(status int, why error) { n.add(who, "ends %s: %d, %v", s.ID, status, why) }
}

// TestRecord: who came, what they opened, what they were refused and how it ended.
func TestRecord(t *testing.T) {
	n := &notes{}
	s := serve(t, func(o *Options) { o.Record = n })
	client := s.mustDial(t, s.person(t, "ada", nil))
	for _, line := range []string{"fail", "panic"} {
		if _, err := run(client, line); err == nil {
			t.Errorf("%s went well", line)
		}
	}
	if _, _, err := client.OpenChannel("direct-tcpip", nil); err == nil {
		t.Error("a channel that does not exist was opened")
	}
	session, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := session.RequestSubsystem("sftp"); err == nil {
		t.Error("a subsystem that does not exist was started")
	}
	if err := session.RequestSubsystem("echo"); err != nil {
		t.Error(err)
	}
	s.end("ada", fault.New(fault.Unauthenticated, "", "taken back"))
	eventually(t, "the end", func() bool { return slices.Contains(n.all(), "ada out: taken back") })
	want := []string{
		"ada in as $S",
		`ada begins $S-1: exec "fail" false`, "ada ends $S-1: 7, <nil>",
		`ada begins $S-2: exec "panic" false`, "ada ends $S-2: 1, <nil>",
		`ada refused: a channel of the type "direct-tcpip"`,
		`ada refused: "subsystem" "sftp" in an SSH session`,
		`ada begins $S-3: subsystem "echo" false`, "ada ends $S-3: 8, taken back",
		"ada out: taken back",
	}
	if got := n.all(); !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
	s.mustDial(t, s.person(t, "bob", nil)).Close()
	eventually(t, "who hangs up is out", func() bool { return slices.Contains(n.all(), "bob out: <nil>") })
	if _, err := s.dial(t, newSigner(t)); err == nil {
		t.Error("a stranger is in")
	}
	eventually(t, "the refusal", func() bool {
		return slices.ContainsFunc(n.all(), func(l string) bool { return strings.HasPrefix(l, " refused: unknown key") })
	})
}

// TestSessionNames: sessions of connections have names of their own.
func TestSessionNames(t *testing.T) {
	got := make(chan string, 2)
	s := serve(t, func(o *Options) {
		o.Handlers.Session = func(s *Session) {
			if s.Identity().Session == "" || !strings.HasPrefix(s.ID(), s.Identity().Session+"-") {
				t.Errorf("%q in %q", s.ID(), s.Identity().Session)
			}
			got <- s.ID()
		}
	})
	key := s.person(t, "ada", nil)
	for range 2 {
		if _, err := run(s.mustDial(t, key), "x"); err != nil {
			t.Error(errors.Unwrap(err))
		}
	}
	if a, b := <-got, <-got; a == b {
		t.Errorf("two sessions are called %s", a)
	}
}
