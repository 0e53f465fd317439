package sshd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/term"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/verb"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
)

const (
	// maxAhead is how many bytes may be typed before somebody reads them; then
	// the client has to wait.
	maxAhead = 64 << 10
	// maxEdited is how many characters the line editor takes; it drops the rest.
	maxEdited = 4096
	// maxHistory is how many lines can be had back.
	maxHistory = 200
	// greeting is how long the first look at the agent's state may delay the
	// prompt.
	greeting = time.Second

	ctrlC = 3
	// clearLine is End, Ctrl-U and Enter to the line editor.
	clearLine = "\x05\x15\r"
)

// keyboard is what a person types: bytes for the line editor, but for Ctrl-C,
// which is for whatever runs. It is read all the time.
type keyboard struct {
	session io.Reader
	ended   sync.WaitGroup

	mu   sync.Mutex // guards what follows
	more *sync.Cond // when something of it changes
	buf  []byte
	err  error
	// interrupt is what Ctrl-C does while something runs, nil at the prompt.
	interrupt func()
	// editing is set while a line is being read.
	editing bool
}

func newKeyboard(r io.Reader) *keyboard {
	k := &keyboard{session: r}
	k.more = sync.NewCond(&k.mu)
	k.ended.Go(k.run)
	return k
}

// wait returns when the session has been closed.
func (k *keyboard) wait() {
	k.mu.Lock()
	if k.err == nil {
		k.err = io.ErrClosedPipe
	}
	k.more.Broadcast()
	k.mu.Unlock()
	k.ended.Wait()
}

func (k *keyboard) run() {
	chunk := make([]byte, 1024)
	for {
		n, err := k.session.Read(chunk)
		k.mu.Lock()
		for _, b := range chunk[:n] {
			k.press(b)
		}
		for len(k.buf) > maxAhead && k.err == nil && err == nil {
			k.more.Wait()
		}
		if err != nil && k.err == nil {
			k.err = err
		}
		ended := k.err != nil
		k.more.Broadcast()
		k.mu.Unlock()
		if ended {
			return
		}
	}
}

// press takes one byte; the lock is held.
func (k *keyboard) press(b byte) {
	if b != ctrlC {
		k.buf = append(k.buf, b)
		return
	}
	k.buf = k.buf[:0] // what was typed before it is not meant any more
	switch {
	case k.interrupt != nil:
		k.interrupt()
	case k.editing:
		k.buf = append(k.buf, clearLine...)
	}
}

// abandon ends the line that is being read, if there is one.
func (k *keyboard) abandon() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.editing {
		k.buf = append(k.buf[:0], clearLine...)
		k.more.Broadcast()
	}
}

// Read gives at most one line at a time, so that nobody else than this has what
// was typed ahead.
func (k *keyboard) Read(p []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(k.buf) == 0 {
		if k.err != nil {
			return 0, k.err
		}
		k.more.Wait()
	}
	n := min(len(p), len(k.buf))
	if end := slices.IndexFunc(k.buf[:n], func(b byte) bool { return b == '\r' || b == '\n' }); end >= 0 {
		n = end + 1
	}
	copy(p, k.buf[:n])
	k.buf = append(k.buf[:0], k.buf[n:]...)
	k.more.Broadcast()
	return n, nil
}

// edit says that a line is being read, which Ctrl-C clears where nothing runs,
// until the function that it returns is called.
func (k *keyboard) edit() (end func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.editing = true
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.editing = false
	}
}

// forget throws away what was typed ahead, which answers no question that had
// not been asked.
func (k *keyboard) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.buf = k.buf[:0]
	k.more.Broadcast()
}

// interrupts has Ctrl-C call f, until the function that it returns is called.
func (k *keyboard) interrupts(f func()) (end func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.interrupt = f
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.interrupt = nil
	}
}

// again returns a context that ends with the next Ctrl-C.
func (k *keyboard) again(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	end := k.interrupts(cancel)
	return ctx, func() { end(); cancel() }
}

// editor is the terminal of a person: lines to edit, and a place to write that
// moves the line out of the way.
type editor struct {
	*term.Terminal
	keys   *keyboard
	lines  history
	prompt string
}

// sit gives the shell a terminal.
func (sh *shell) sit(size sshserver.Window) {
	sh.keyboard = newKeyboard(sh.session)
	e := &editor{keys: sh.keyboard, prompt: fmt.Sprintf("halligan %s@%s.%s> ", sh.Identity().Role, sh.Node, sh.Cluster)}
	e.Terminal = term.NewTerminal(struct {
		io.Reader
		io.Writer
	}{sh.keyboard, sh.session}, e.prompt)
	e.History = &e.lines
	e.AutoCompleteCallback = sh.complete
	sh.editor = e
	e.resize(size)
	sh.keyboard.ended.Go(func() {
		defer sh.recovered()
		for {
			select {
			case size := <-sh.Windows():
				e.resize(size)
				sh.rec.Resize(size.Columns, size.Rows)
			case <-sh.Context().Done():
				return
			}
		}
	})
}

// recovered keeps a fault in a goroutine of a shell from ending the agent.
func (sh *shell) recovered() {
	if p := recover(); p != nil {
		sh.Log.Error().Str("panic", neutral.LineMax(fmt.Sprint(p), 512)).Bytes("stack", debug.Stack()).Msg("panic in a shell")
	}
}

func (e *editor) resize(size sshserver.Window) {
	_ = e.SetSize(size.Columns, size.Rows) // it fails where the client is gone
}

// read returns the next line, an empty one when ctx has ended.
func (e *editor) read(ctx context.Context) (string, error) {
	defer e.keys.edit()()
	defer context.AfterFunc(ctx, e.keys.abandon)()
	line, err := e.ReadLine()
	if errors.Is(err, term.ErrPasteIndicator) {
		err = nil
	}
	return line, err
}

// ask is verb.Terminal.Ask.
func (e *editor) ask(ctx context.Context, question string) (string, error) {
	e.keys.forget()
	// What answers a question is no line to have back.
	e.lines.asking = true
	e.SetPrompt(question)
	complete := e.AutoCompleteCallback
	e.AutoCompleteCallback = nil
	defer func() {
		e.lines.asking, e.AutoCompleteCallback = false, complete
		e.SetPrompt(e.prompt)
	}()
	line, err := e.read(ctx)
	return line, errors.Join(err, ctx.Err())
}

// interact is the shell on a terminal. Its status is that of the last line.
func (sh *shell) interact() (status int) {
	sh.greet()
	for !sh.left && sh.Context().Err() == nil {
		sh.warn()
		line, err := sh.editor.read(sh.Context())
		if err != nil {
			_, _ = io.WriteString(sh.session, "\n")
			break
		}
		if strings.TrimSpace(line) == "" {
			continue
		}
		if utf8.RuneCountInString(line) >= maxEdited {
			sh.say("halligan: %s", fault.New(fault.Usage, "give it to ssh as a command", "a line typed here has at most %d characters", maxEdited).Error())
			status = fault.Usage.Exit()
			continue
		}
		status = sh.line(line)
	}
	return status
}

// greet says who is where, and what to know about that.
func (sh *shell) greet() {
	who := sh.Identity()
	text := fmt.Sprintf("%s as %s at %s.%s", who.Person, who.Role, sh.Node, sh.Cluster)
	if !who.NotAfter.IsZero() {
		text += ", " + verb.Ends(who.NotAfter, sh.Now())
	}
	sh.say("%s; help lists the verbs", text)
	if due := verb.Renew(who.NotAfter, sh.Now()); due != "" && !who.NotAfter.IsZero() {
		sh.say("warning: %s", due)
	}
	if who.Late {
		sh.say("warning: your credential is past an edge of its validity and was admitted all the same; the alarms were told")
	}
	if who.Kind == trust.Sealed {
		sh.say("warning: this is a sealed credential; the alarms were told, and it is to be rotated afterwards")
	}
	if !who.May(trust.Observer) {
		return // and may not ask
	}
	ctx, cancel := context.WithTimeout(sh.Context(), greeting)
	defer cancel()
	conn, err := sh.connect(ctx)
	if err != nil {
		sh.say("halligan: %s", fault.Of(err).Error())
		return
	}
	defer conn.Close()
	s, err := conn.Status(ctx, &halliganv1.StatusRequest{})
	if err != nil {
		sh.say("note: this agent does not say yet what it can do; see: status")
		return
	}
	if s.GetReadOnly() != "" {
		sh.say("warning: mutations are refused: %s", s.GetReadOnly())
	}
	for _, w := range s.GetWarnings() {
		sh.say("warning: %s", w)
	}
}

// complete is called by the line editor for each key.
func (sh *shell) complete(line string, pos int, key rune) (string, int, bool) {
	if key != '\t' {
		return "", 0, false
	}
	before := line[:pos]
	words := strings.Fields(before)
	beginning := ""
	if len(words) > 0 && strings.HasSuffix(before, words[len(words)-1]) {
		beginning, words = words[len(words)-1], words[:len(words)-1]
	}
	if len(words) > 0 && words[0] == "halligan" {
		words = words[1:]
	}
	all := sh.verbs().Complete(words, beginning)
	if len(all) == 0 {
		return line, pos, true
	}
	common := all[0]
	for _, s := range all[1:] {
		for !strings.HasPrefix(s, common) {
			common = common[:len(common)-1]
		}
	}
	if len(all) == 1 {
		common += " "
	} else if common == beginning {
		_, _ = fmt.Fprintln(sh.editor, neutral.Line(strings.Join(all, "  ")))
	}
	grown := before[:pos-len(beginning)] + common
	return grown + line[pos:], len(grown), true
}

// history holds the lines that can be had back, newest last. Only the line
// editor uses it, in one goroutine.
type history struct {
	lines  []string
	asking bool
}

func (h *history) Add(line string) {
	if h.asking || strings.TrimSpace(line) == "" || len(h.lines) > 0 && h.lines[len(h.lines)-1] == line {
		return
	}
	h.lines = append(h.lines, line)
	h.lines = h.lines[max(0, len(h.lines)-maxHistory):]
}

func (h *history) Len() int { return len(h.lines) }

func (h *history) At(i int) string { return h.lines[len(h.lines)-1-i] }
