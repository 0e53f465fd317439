package sshclient

import (
	"context"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/term"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
)

// lost is the exit status of a session that ended without one, as ssh has it.
const lost = 255

// Terminal is what a shell is shown on.
type Terminal struct {
	In       io.Reader
	Out, Err io.Writer
	// TTY is the terminal that In reads from; nil: In is none, and the shell gets
	// no pty.
	TTY *os.File
	// Name is its type, as TERM has it.
	Name string
}

// Shell runs the agent's shell until it or the context ends, and returns its
// exit status; the end of the context ends the whole connection. The terminal is
// raw meanwhile, so that every key is the shell's. Reading In goes on until the next key after the end.
func (c *Client) Shell(ctx context.Context, t Terminal) (status int, err error) {
	channel, requests, err := c.open(ctx)
	if err != nil {
		return lost, err
	}
	defer channel.Close()
	defer context.AfterFunc(ctx, func() { c.conn.Close() })()
	if t.TTY != nil {
		restore, err := c.pty(channel, t)
		if err != nil {
			return lost, err
		}
		defer restore()
	}
	if ok, err := channel.SendRequest("shell", true, nil); err != nil {
		return lost, c.broken(err)
	} else if !ok {
		return lost, fault.New(fault.Unreachable, "see whether another SSH server answers there", "%s gives no shell", c.target.Name)
	}
	go func() {
		_, _ = io.Copy(channel, t.In)
		_ = channel.CloseWrite()
	}()
	var output sync.WaitGroup
	output.Go(func() { _, _ = io.Copy(t.Out, channel) })
	output.Go(func() { _, _ = io.Copy(t.Err, channel.Stderr()) })
	status, known := lost, false
	for r := range requests { // closed with the channel
		if r.Type == "exit-status" {
			var exit struct{ Status uint32 }
			if gossh.Unmarshal(r.Payload, &exit) == nil {
				status, known = int(exit.Status&0xff), true
			}
		}
		if r.WantReply {
			_ = r.Reply(false, nil)
		}
	}
	output.Wait()
	switch {
	case ctx.Err() != nil:
		return lost, ctx.Err()
	case !known:
		return lost, fault.New(fault.Unreachable, "open another; what was begun goes on, see: halligan history", "the session at %s ended without a word", c.target.Name)
	}
	return status, nil
}

// pty asks for a terminal like the person's, and follows its size.
func (c *Client) pty(channel gossh.Channel, t Terminal) (restore func(), err error) {
	fd := int(t.TTY.Fd())
	columns, rows, err := term.GetSize(fd)
	if err != nil {
		columns, rows = 80, 24
	}
	ok, err := channel.SendRequest("pty-req", true, gossh.Marshal(struct {
		Term                         string
		Columns, Rows, Width, Height uint32
		Modes                        string
	}{t.Name, size(columns), size(rows), 0, 0, "\x00"})) // no modes: TTY_OP_END
	if err != nil {
		return nil, c.broken(err)
	}
	if !ok {
		return nil, fault.New(fault.Unreachable, "use single commands: halligan --node NODE VERB", "%s gives no terminal", c.target.Name)
	}
	before, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fault.New(fault.Failed, "", "making the terminal raw: %w", err)
	}
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	done := make(chan struct{})
	var follow sync.WaitGroup
	follow.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-resized:
			}
			columns, rows, err := term.GetSize(fd)
			if err != nil {
				continue
			}
			_, _ = channel.SendRequest("window-change", false, gossh.Marshal(struct{ Columns, Rows, Width, Height uint32 }{size(columns), size(rows), 0, 0}))
		}
	})
	return func() {
		signal.Stop(resized)
		close(done)
		follow.Wait()
		_ = term.Restore(fd, before)
	}, nil
}

// size bounds a terminal's size to what makes sense. A serial console has none:
// 0 leaves it to the agent.
func size(n int) uint32 { return uint32(min(max(n, 0), 1<<12)) } // #nosec G115 -- bounded
