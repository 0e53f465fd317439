package sshserver

import (
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

// TestRecord: who came, what they were refused and how it ended.
func TestRecord(t *testing.T) {
	n := &notes{}
	s := serve(t, func(o *Options) { o.Record = n })
	client := s.mustDial(t, s.person(t, "ada", nil))
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
		`ada refused: a channel of the type "direct-tcpip"`,
		`ada refused: "subsystem" "sftp" in an SSH session`,
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
