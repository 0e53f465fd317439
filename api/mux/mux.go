// Package mux is the form of a tunnel on the wire, which both of its ends share: a
// node that cannot be dialled connects to a bastion by TLS 1.3, and the bastion
// opens streams to the node's doors inside, by yamux. Each stream begins with the
// name of a door in a line, which the node answers with a line; what follows is
// the same as on a connection that the node had accepted.
//
// It must never look at what passes, let one stream hold up another, or hold more
// of a stream than its window. Who is at the other end its caller knows before. It
// stands on floor 1.
package mux

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
)

// Protocol is the name of all this in ALPN, so that nothing that is meant for
// another port works here, nor the other way round.
const Protocol = "halligan-tunnel/1"

// MaxStreams is how many streams a tunnel may have: several times as many as one
// person may have relayed. Each holds at most a window of 256 KiB at either end,
// and that only while its reader takes nothing.
const MaxStreams = 256

const (
	backlog = 32 // streams that the node has not taken yet
	// alive is how often each end asks whether the other is there, and stuck is
	// when one that does not answer, or takes nothing, is given up.
	alive, stuck = 10 * time.Second, 10 * time.Second
	// halfClosed is how long a stream may be that only one end has closed.
	halfClosed = time.Minute
	greeting   = 5 * time.Second // until a door is named and has answered
	maxLine    = 256             // bytes of a line
	granted    = "ok"
)

func config(log zerolog.Logger) *yamux.Config {
	return &yamux.Config{AcceptBacklog: backlog, EnableKeepAlive: true, KeepAliveInterval: alive, ConnectionWriteTimeout: stuck, MaxStreamWindowSize: 256 << 10,
		StreamOpenTimeout: stuck, StreamCloseTimeout: halfClosed, LogOutput: lines{log}}
}

// lines are what yamux tells of a connection that breaks; whoever has the tunnel
// tells of that, too.
type lines struct{ log zerolog.Logger }

func (l lines) Write(p []byte) (int, error) {
	l.log.Debug().Msg(neutral.LineMax(strings.TrimSpace(string(p)), 512))
	return len(p), nil
}

// Session is one tunnel.
type Session struct{ s *yamux.Session }

// Ended is closed when the tunnel has ended.
func (s *Session) Ended() <-chan struct{} { return s.s.CloseChan() }

// Answers reports whether the other end has taken the tunnel and answers in it. It
// returns within seconds.
func (s *Session) Answers() bool {
	_, err := s.s.Ping()
	return err == nil
}

// Close ends the tunnel and all of its streams.
func (s *Session) Close() error { return s.s.Close() }

// Bastion is the bastion's end of a tunnel. A node that opens a stream itself is
// cut off.
func Bastion(conn net.Conn, log zerolog.Logger) (*Session, error) {
	s, err := yamux.Client(conn, config(log))
	if err != nil {
		return nil, err
	}
	go func() { // ends with the tunnel
		if _, err := s.AcceptStream(); err == nil {
			log.Warn().Msg("a node opens streams in its tunnel, which only a bastion does: cut off")
			s.Close()
		}
	}()
	return &Session{s}, nil
}

// ErrFull is the error of Open where a tunnel has as many streams as it may.
var ErrFull = fmt.Errorf("all %d of its streams are in use", MaxStreams)

// Open opens a stream to a door of the node. It returns within seconds.
func (s *Session) Open(door trust.Door) (*Stream, error) {
	if s.s.NumStreams() >= MaxStreams {
		return nil, ErrFull
	}
	raw, err := s.s.OpenStream()
	if err != nil {
		return nil, err
	}
	stream := &Stream{Stream: raw}
	if err := stream.ask(door); err != nil {
		stream.Close()
		return nil, err
	}
	return stream, nil
}

// ask names the door, and waits for the answer.
func (s *Stream) ask(door trust.Door) error {
	_ = s.SetDeadline(time.Now().Add(greeting)) // fails only where the stream has ended, as the next does
	if _, err := io.WriteString(s, string(door)+"\n"); err != nil {
		return err
	}
	answer, err := s.line()
	if err != nil {
		return err
	}
	if answer != granted {
		return errors.New(neutral.LineMax(answer, maxLine))
	}
	return s.SetDeadline(time.Time{})
}

// line reads one line, and nothing behind it.
func (s *Stream) line() (string, error) {
	line := make([]byte, 0, 16)
	for b := [1]byte{}; len(line) < maxLine; line = append(line, b[0]) {
		if _, err := io.ReadFull(s, b[:]); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
	}
	return "", errors.New("a line that does not end")
}

// Hand is called for each stream that a bastion opens, in a goroutine of its own.
// It decides whether the door is open: take, which it may call once, tells the
// bastion that it is, and returns the stream. An error is told to the bastion.
type Hand func(door trust.Door, take func() (*Stream, error)) error

// Node serves the node's end of a tunnel until it has ended, and returns why, when
// every hand has returned. started is called once before that.
func Node(conn net.Conn, log zerolog.Logger, started func(*Session), hand Hand) error {
	s, err := yamux.Server(conn, config(log))
	if err != nil {
		return err
	}
	var serving sync.WaitGroup
	defer serving.Wait()
	defer s.Close()
	started(&Session{s})
	for {
		raw, err := s.AcceptStream()
		if err != nil {
			return err
		}
		// Those that one end has closed already count, here as there. A few more
		// may be asked for at the same time.
		if s.NumStreams() > MaxStreams+backlog {
			return fmt.Errorf("the bastion has more than %d streams", MaxStreams)
		}
		serving.Go(func() { serve(&Stream{Stream: raw}, hand) })
	}
}

func serve(s *Stream, hand Hand) {
	_ = s.SetDeadline(time.Now().Add(greeting)) // fails only where the stream has ended, as the next does
	name, err := s.line()
	if err == nil {
		err = hand(trust.Door(name), func() (*Stream, error) {
			if _, err := io.WriteString(s, granted+"\n"); err != nil {
				return nil, err
			}
			return s, s.SetDeadline(time.Time{})
		})
		if err != nil {
			_, _ = io.WriteString(s, neutral.LineMax(err.Error(), maxLine/2)+"\n") // who is gone need not know
		}
	}
	if err != nil {
		s.Close()
	}
}

// Stream is a connection inside a tunnel. Its addresses are those of the tunnel.
type Stream struct {
	*yamux.Stream
	closed atomic.Bool
}

// Ended is closed when the stream's tunnel has ended.
func (s *Stream) Ended() <-chan struct{} { return s.Session().CloseChan() }

// CloseWrite says that nothing more will be written. The other end may go on for
// a minute.
func (s *Stream) CloseWrite() error { return s.Stream.Close() }

// Close closes both directions; yamux only closes the one.
func (s *Stream) Close() error {
	s.closed.Store(true)
	err := s.Stream.Close()
	return errors.Join(err, s.Stream.SetDeadline(time.Unix(1, 0))) // wakes who reads or writes
}

func (s *Stream) Read(p []byte) (int, error) {
	if s.closed.Load() {
		return 0, net.ErrClosed
	}
	n, err := s.Stream.Read(p)
	if err != nil && s.closed.Load() {
		err = net.ErrClosed
	}
	return n, err
}

// SetDeadline is as a connection's.
func (s *Stream) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

// SetReadDeadline is as a connection's.
func (s *Stream) SetReadDeadline(t time.Time) error { return s.until(t, s.Stream.SetReadDeadline) }

// SetWriteDeadline is as a connection's.
func (s *Stream) SetWriteDeadline(t time.Time) error { return s.until(t, s.Stream.SetWriteDeadline) }

// until sets a deadline, unless the stream is closed, which keeps the one of Close.
func (s *Stream) until(t time.Time, set func(time.Time) error) error {
	err := set(t)
	if s.closed.Load() {
		return errors.Join(net.ErrClosed, set(time.Unix(1, 0)))
	}
	return err
}
