// Package lobby is what people get who come to a bastion with ssh and want
// nothing relayed: a few commands that look around, as an exec line or in a small
// shell. Each asks the bastion's own API as the identity that internal/sshserver
// has authenticated, so that nothing is said here that is not said there. What is
// shown in a session is recorded (audit/cast).
//
// It must never change anything, here or at a node, start a process, read or write
// a file of its own, or decide what somebody may see. It stands on floor 4.
package lobby

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/term"
	"google.golang.org/grpc"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit/cast"
	"github.com/halligan-io/halligan/internal/execline"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
)

// Options say what is behind the lobby. Dial and Now are required.
type Options struct {
	// Dial returns a client of the bastion's API that is taken for who, as long
	// as held lasts.
	Dial func(who trust.Identity, held context.Context) (*grpc.ClientConn, error)
	// Bastion is its name, for the prompt.
	Bastion string
	// Recorder records sessions. Nil records none.
	Recorder *cast.Recorder
	// Now is the bastion's clock.
	Now func() time.Time
	Log zerolog.Logger
}

// linesLogged is how many lines of one session are logged in 5 s.
const linesLogged = 50

// callTimeout bounds one command: all it asks for is at hand, or in a store that
// fails sooner.
const callTimeout = 10 * time.Second

// Handler returns the handler of shells and exec lines.
func Handler(o Options) func(*sshserver.Session) {
	return func(s *sshserver.Session) { serve(o, s) }
}

// session is what this package needs of a *sshserver.Session, whose comments
// hold.
type session interface {
	io.ReadWriter
	Stderr() io.Writer
	Identity() trust.Identity
	Held() context.Context
	Context() context.Context
	Command() string
	Pty() (sshserver.Pty, bool)
	Windows() <-chan sshserver.Window
	RemoteAddr() net.Addr
	Exit(status int) error
}

// visit is one session in the lobby.
type visit struct {
	Options
	session
	rec      *cast.Session
	out, err io.Writer
	left     bool // by exit
}

// recorded is a session whose output is recorded, and its input where that is
// wanted.
type recorded struct {
	session
	rec *cast.Session
	io.Reader
	io.Writer
}

func (r recorded) Context() context.Context    { return r.rec.Context() }
func (r recorded) Read(p []byte) (int, error)  { return r.Reader.Read(p) }
func (r recorded) Write(p []byte) (int, error) { return r.Writer.Write(p) }
func (r recorded) Stderr() io.Writer           { return r.rec.Writer(r.session.Stderr()) }

func serve(o Options, s session) {
	pty, onTerminal := s.Pty()
	about := cast.About{Who: s.Identity(), What: cast.Script, Command: s.Command(), At: "bastion " + o.Bastion, Columns: pty.Window.Columns, Rows: pty.Window.Rows, Term: pty.Term}
	if s.Command() != "" {
		about.What = cast.Exec
	} else if onTerminal {
		about.What = cast.Shell
	}
	o.Recorder.Serve(s, about, func(rec *cast.Session) int {
		v := &visit{Options: o, session: recorded{s, rec, rec.Reader(s), rec.Writer(s)}, rec: rec}
		v.out, v.err = v.session, v.session.Stderr()
		// Nobody fills the log by typing; who does what is the agents' to record.
		v.Log = o.Log.Sample(zerolog.LevelSampler{InfoSampler: &zerolog.BurstSampler{Burst: linesLogged, Period: 5 * time.Second}})
		v.warn()
		switch {
		case s.Command() != "":
			return v.line(s.Command())
		case onTerminal:
			return v.interact(pty.Window)
		}
		return v.script()
	})
}

// warn says what the person is to know about the recording.
func (v *visit) warn() {
	if text := v.rec.Warning(); text != "" {
		v.say("%s", text)
	}
}

// line runs one line and returns its exit status.
func (v *visit) line(text string) int {
	_, onTerminal := v.Pty()
	v.rec.Next(text, v.Command() == "" && !onTerminal)
	defer v.rec.Next("", false)
	words, err := execline.Words(text)
	if err == nil && len(words) > 0 {
		err = v.run(words)
	}
	if err != nil {
		v.say("halligan: %s", fault.Of(err).Error())
	}
	if len(words) > 0 {
		v.Log.Info().Str("person", neutral.Line(v.Identity().Person)).Str("source", v.RemoteAddr().String()).
			Str("command", neutral.LineMax(words[0], 40)).Bool("failed", err != nil).Msg("a line came in by SSH")
	}
	if err == nil {
		return 0
	}
	return fault.CodeOf(err).Exit()
}

// run finds the command and lets it ask the API.
func (v *visit) run(words []string) error {
	name, args := words[0], words[1:]
	switch {
	case name == "exit" && v.Command() == "" && len(args) == 0:
		v.left = true
		return nil
	case name == "help" || name == "-h" || name == "--help":
		return v.help()
	}
	for _, c := range commands {
		if c.name != name {
			continue
		}
		if len(args) > c.most {
			return fault.New(fault.Usage, "see: help", "%s takes %s", name, c.takes())
		}
		ctx, cancel := context.WithTimeout(v.Context(), callTimeout)
		defer cancel()
		conn, err := v.Dial(v.Identity(), v.Held())
		if err != nil {
			return err
		}
		defer conn.Close()
		// Long lists are written at once, and not by a table's every cell.
		w := bufio.NewWriterSize(v.out, 32<<10)
		if err := c.run(ctx, &asked{halliganv1.NewBastionClient(conn), w, v.Now(), v.say}, args); err != nil {
			return api.FromStatus(err)
		}
		_ = w.Flush() // who is gone has not to be told
		return nil
	}
	return fault.New(fault.Usage, "see: help; what acts on a cluster is asked of a node: ssh -J BASTION responder@NODE", "this is a bastion's lobby, which has no command %q", neutral.LineMax(name, 40))
}

// say writes a line that is no command's output.
func (v *visit) say(text string, args ...any) {
	_, _ = fmt.Fprintln(v.err, neutral.LineMax(fmt.Sprintf(text, args...), 1024)) // as above
}

// script runs the lines of a client without a terminal, all of them, and returns
// the status of the first that failed.
func (v *visit) script() (status int) {
	lines := bufio.NewScanner(v.session)
	lines.Buffer(nil, execline.MaxLine+2)
	for !v.left && v.Context().Err() == nil && lines.Scan() {
		if s := v.line(lines.Text()); status == 0 {
			status = s
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		v.say("halligan: %s", execline.TooLong().Error())
		return fault.Usage.Exit()
	}
	return status
}

// interact is the shell on a terminal. Its status is that of the last line.
func (v *visit) interact(size sshserver.Window) (status int) {
	terminal := term.NewTerminal(struct {
		io.Reader
		io.Writer
	}{v.session, v.session}, "halligan "+v.Bastion+"> ")
	resize := func(w sshserver.Window) { _ = terminal.SetSize(w.Columns, w.Rows) } // it fails where the client is gone
	resize(size)
	terminal.AutoCompleteCallback = complete
	v.out, v.err = terminal, terminal
	ctx, stop := context.WithCancel(v.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer func() {
			if p := recover(); p != nil {
				v.Log.Error().Str("panic", neutral.LineMax(fmt.Sprint(p), 512)).Bytes("stack", debug.Stack()).Msg("panic in a lobby")
			}
		}()
		for {
			select {
			case w := <-v.Windows():
				resize(w)
				v.rec.Resize(w.Columns, w.Rows)
			case <-ctx.Done():
				return
			}
		}
	}()
	defer func() { stop(); <-ended }()
	v.say("%s at bastion %s, which relays and does nothing else; help lists what there is", v.Identity().Person, v.Bastion)
	for !v.left && v.Context().Err() == nil {
		v.warn()
		line, err := terminal.ReadLine() // ends with Ctrl-C and Ctrl-D
		if err != nil && !errors.Is(err, term.ErrPasteIndicator) {
			_, _ = io.WriteString(v.session, "\n") // as above
			break
		}
		if strings.TrimSpace(line) != "" {
			status = v.line(line)
		}
	}
	return status
}

// complete completes a command's name.
func complete(line string, pos int, key rune) (string, int, bool) {
	if key != '\t' || pos != len(line) || line == "" {
		return "", 0, false
	}
	var found string
	for _, c := range commands {
		if strings.HasPrefix(c.name, line) {
			if found != "" {
				return "", 0, false
			}
			found = c.name + " "
		}
	}
	return found, len(found), found != ""
}
