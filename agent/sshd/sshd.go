// Package sshd is what people get who come to an agent with ssh: the verbs of
// the command halligan as an exec line and as an interactive shell, and the
// subsystem halligan-grpc, which is the agent's API inside an SSH channel.
//
// It is a door and nothing more: every verb goes through agent/door as the
// identity that internal/sshserver has authenticated. What is shown in a session is
// recorded (audit/cast), but for what is revealed of a Secret. It must never start
// a process, read or write a file of its own, expand anything in a line, or decide
// what somebody may do. It stands on floor 4.
package sshd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/verb"
	"github.com/halligan-io/halligan/audit/cast"
	"github.com/halligan-io/halligan/internal/execline"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
)

// Door is the agent's API: a *grpcdoor.Server.
type Door interface {
	// Dial returns a client that is taken for who, as long as held lasts.
	Dial(who trust.Identity, held context.Context) (*grpc.ClientConn, error)
	// ServeSession serves a session until it has ended.
	ServeSession(grpcdoor.Session)
}

// Options say what is behind the SSH server, and what the prompt calls it.
type Options struct {
	Door Door
	// Node and Cluster are the agent's names in the bundle.
	Node, Cluster string
	// Recorder records sessions. Nil records none.
	Recorder *cast.Recorder
	// Now is the agent's clock.
	Now func() time.Time
	Log zerolog.Logger
}

// Handlers are what an SSH server offers to those it has let in.
func Handlers(o Options) sshserver.Handlers {
	h := &handler{o}
	return sshserver.Handlers{
		Session: func(s *sshserver.Session) { h.session(s) },
		Subsystems: map[string]func(*sshserver.Session){grpcdoor.Subsystem: func(s *sshserver.Session) {
			rec, err := o.Recorder.Begin(s.Context(), cast.About{Who: s.Identity(), What: cast.Subsystem, Command: grpcdoor.Subsystem})
			if err == nil { // as always, since nothing of it is recorded
				defer func() { rec.End(0, context.Cause(s.Held())) }()
			}
			o.Door.ServeSession(s)
		}},
	}
}

type handler struct{ Options }

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
	Env() map[string]string
	LocalAddr() net.Addr
	RemoteAddr() net.Addr
	Exit(status int) error
}

// settle is how long to ask what became of an application whose connection
// broke. Inside the agent that is when the agent or the login ends.
const settle = 2 * time.Second

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

// session runs a line, or a shell until it ends.
func (h *handler) session(s session) {
	sh := &shell{handler: h, variables: s.Env(),
		// Nobody fills the log by typing; what is done has a record of its own.
		lines: h.Log.Sample(&zerolog.BurstSampler{Burst: linesLogged, Period: 5 * time.Second})}
	pty, onTerminal := s.Pty()
	about := cast.About{Who: s.Identity(), What: cast.Script, Command: s.Command(), At: h.Node + "." + h.Cluster,
		Columns: pty.Window.Columns, Rows: pty.Window.Rows, Term: pty.Term, Reason: sh.variables["HALLIGAN_REASON"], Incident: sh.variables["HALLIGAN_INCIDENT"]}
	if s.Command() != "" {
		about.What = cast.Exec
	} else if onTerminal {
		about.What = cast.Shell
	}
	defer func() {
		if sh.keyboard != nil {
			sh.keyboard.wait() // for the session to be closed
		}
	}()
	h.Recorder.Serve(s, about, func(rec *cast.Session) (status int) {
		sh.rec, sh.session = rec, recorded{s, rec, rec.Reader(s), rec.Writer(s)}
		if onTerminal {
			sh.sit(pty.Window)
		}
		sh.warn()
		switch {
		case s.Command() != "":
			status = sh.line(s.Command())
		case onTerminal:
			status = sh.interact()
			if s.Held().Err() != nil {
				sh.keyboard.wait() // for the server to say why, and to hang up
			}
		default:
			status = sh.script()
		}
		return status
	})
}

// agent is a connection to the API that ends with a verb.
type agent struct {
	halliganv1.AgentClient
	io.Closer
	rec *cast.Session
}

// Get has nothing recorded of what the values of a Secret are shown in.
func (a agent) Get(ctx context.Context, req *halliganv1.GetRequest, o ...grpc.CallOption) (grpc.ServerStreamingClient[halliganv1.GetEvent], error) {
	if req.GetParameters().GetFields()["reveal"] != nil {
		a.rec.Hide()
	}
	return a.AgentClient.Get(ctx, req, o...)
}

// shell is one session of verbs, on a terminal or not.
type shell struct {
	*handler
	session
	// variables are what the client has sent, and what was set since.
	variables map[string]string
	keyboard  *keyboard // nil where there is no terminal
	editor    *editor   // as keyboard
	left      bool      // by exit
	lines     zerolog.Logger
	rec       *cast.Session
	refused   string // why nothing can be changed, as the person was told
}

// linesLogged is how many lines of one session are logged in 5 s.
const linesLogged = 50

func (sh *shell) connect(context.Context) (verb.Agent, error) {
	conn, err := sh.Door.Dial(sh.Identity(), sh.Held())
	if err != nil {
		return nil, err
	}
	return agent{halliganv1.NewAgentClient(conn), conn, sh.rec}, nil
}

// verbs returns a command line.
func (sh *shell) verbs() *verb.Verbs {
	t := verb.Terminal{In: strings.NewReader(""), Out: sh.session, Err: sh.Stderr(),
		Env: func(name string) string { return sh.variables[name] }, Now: sh.Now, Settle: settle, Reprobe: 100 * time.Millisecond}
	o := verb.Options{Connect: sh.connect, Within: true, Self: sh.self}
	if sh.keyboard != nil {
		t.Out, t.Err, t.InTTY, t.OutTTY, t.ErrTTY = sh.editor, sh.editor, true, true, true
		t.Ask, o.Again = sh.editor.ask, sh.keyboard.again
	}
	if sh.Command() == "" {
		o.Commands = sh.own
	}
	return verb.New(t, o)
}

func (sh *shell) self() *halliganv1.StatusResponse {
	who := sh.Identity()
	s := &halliganv1.StatusResponse{Node: sh.Node, Cluster: sh.Cluster, Actor: who.Person, Role: who.Role.String(), Door: string(who.Door)}
	if !who.NotAfter.IsZero() {
		s.CredentialExpires = timestamppb.New(who.NotAfter)
	}
	return s
}

// line runs one line and returns its exit status.
func (sh *shell) line(text string) int {
	sh.rec.Next(text, sh.Command() == "" && sh.keyboard == nil)
	defer sh.rec.Next("", false)
	words, err := execline.Words(text)
	if err != nil {
		sh.say("halligan: %s", fault.Of(err).Error())
		return fault.CodeOf(err).Exit()
	}
	// What is copied from a README or a plan runs as it is.
	if len(words) > 0 && words[0] == "halligan" {
		words = words[1:]
	} else if len(words) == 0 {
		return 0
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(sh.Context()))
	defer cancel(nil)
	defer context.AfterFunc(sh.Context(), func() { cancel(errors.Join(verb.ErrGone, context.Cause(sh.Context()))) })()
	if sh.keyboard != nil {
		defer sh.keyboard.interrupts(func() { cancel(context.Canceled) })()
	}
	status := sh.verbs().Run(ctx, words)
	if len(words) > 0 {
		sh.lines.Info().Str("person", neutral.Line(sh.Identity().Person)).Str("source", sh.RemoteAddr().String()).
			Str("verb", neutral.LineMax(words[0], 40)).Int("status", status).Msg("a line came in by SSH")
	}
	return status
}

// say tells the person something that is no verb's.
func (sh *shell) say(text string, args ...any) {
	w := sh.Stderr()
	if sh.keyboard != nil {
		w = sh.editor
	}
	_, _ = fmt.Fprintln(w, neutral.LineMax(fmt.Sprintf(text, args...), 1024))
}

// warn says what has changed since the last line.
func (sh *shell) warn() {
	if text := sh.rec.Warning(); text != "" {
		sh.say("%s", text)
	}
	switch refused := sh.Recorder.Refused(); {
	case (refused == "") == (sh.refused == ""):
	case refused != "":
		sh.say("warning: nothing can be recorded (%s), so this session is read-only until it can", refused)
		sh.refused = refused
	default:
		sh.say("note: what is done can be recorded again; this session is not read-only any more")
		sh.refused = ""
	}
}

// script runs the lines of a client without a terminal, all of them, and returns
// the status of the first that failed.
func (sh *shell) script() (status int) {
	lines := bufio.NewScanner(sh.session)
	lines.Buffer(nil, execline.MaxLine+2)
	for !sh.left && sh.Context().Err() == nil && lines.Scan() {
		if s := sh.line(lines.Text()); status == 0 {
			status = s
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		sh.say("halligan: %s", execline.TooLong().Error())
		return fault.Usage.Exit()
	}
	return status
}

// own are the verbs that only a shell has.
func (sh *shell) own(*verb.Verbs) []*cobra.Command {
	set := func(name, variable, what string) *cobra.Command {
		return &cobra.Command{
			Use: name + " [TEXT...]", Short: "Set the " + what + " for the rest of this shell, or show it", Args: cobra.ArbitraryArgs,
			RunE: func(cmd *cobra.Command, args []string) error {
				if len(args) > 0 {
					sh.variables[variable] = strings.Join(args, " ")
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", name, neutral.Line(sh.variables[variable]))
				return err
			},
		}
	}
	return []*cobra.Command{
		set("reason", "HALLIGAN_REASON", "reason of what is done"),
		set("incident", "HALLIGAN_INCIDENT", "incident that things are done for"),
		{Use: "exit", Aliases: []string{"quit", "logout"}, Short: "Leave this shell", Args: verb.NoArguments,
			RunE: func(*cobra.Command, []string) error { sh.left = true; return nil }},
	}
}
