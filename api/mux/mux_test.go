package mux

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/internal/trust"
)

const patience = 30 * time.Second

// pair returns both ends of a TCP connection.
func pair(t *testing.T) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if near, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if far, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

// tunnel returns a bastion's end, and a node's streams; only ssh is open there.
func tunnel(t *testing.T) (*Session, <-chan *Stream) {
	t.Helper()
	near, far := pair(t)
	streams := make(chan *Stream, 2*MaxStreams)
	var serving sync.WaitGroup
	serving.Go(func() {
		_ = Node(far, zerolog.Nop(), func(*Session) {}, func(door trust.Door, take func() (*Stream, error)) error {
			if door != trust.SSH {
				return fmt.Errorf("the door %q is not open", door)
			}
			s, err := take()
			if err == nil {
				streams <- s
			}
			return err
		})
	})
	s, err := Bastion(near, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(); serving.Wait() })
	return s, streams
}

func open(t *testing.T, s *Session, streams <-chan *Stream) (bastion, node *Stream) {
	t.Helper()
	bastion, err := s.Open(trust.SSH)
	if err != nil {
		t.Fatal(err)
	}
	return bastion, <-streams
}

// TestStreams: each is a connection of its own, in both directions.
func TestStreams(t *testing.T) {
	s, streams := tunnel(t)
	if !s.Answers() {
		t.Error("it does not answer")
	}
	a, nodeA := open(t, s, streams)
	b, nodeB := open(t, s, streams)
	for _, x := range []struct{ from, to *Stream }{{a, nodeA}, {nodeA, a}, {b, nodeB}, {nodeB, b}} {
		if _, err := io.WriteString(x.from, "hello"); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 5)
		if _, err := io.ReadFull(x.to, got); err != nil || string(got) != "hello" {
			t.Fatalf("%q, %v", got, err)
		}
	}
	if _, ok := nodeA.RemoteAddr().(*net.TCPAddr); !ok || nodeA.RemoteAddr().String() != s.s.LocalAddr().String() {
		t.Errorf("the peer of a stream is %v", nodeA.RemoteAddr())
	}
	// One whose reader takes nothing holds up no other.
	stuck := make(chan error, 1)
	go func() { _, err := a.Write(make([]byte, 1<<20)); stuck <- err }()
	for range 100 {
		if _, err := b.Write(make([]byte, 10_000)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(nodeB, make([]byte, 10_000)); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-stuck:
		t.Errorf("1 MiB went into a window of 256 KiB: %v", err)
	default:
	}
	// Closing wakes whoever writes.
	a.Close()
	if err := <-stuck; err == nil {
		t.Error("written to a stream that is closed")
	}
}

// TestHalfClose: what one side ends, the other hears, and may go on.
func TestHalfClose(t *testing.T) {
	s, streams := tunnel(t)
	a, node := open(t, s, streams)
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("%v", err)
	}
	if _, err := io.WriteString(node, "late"); err != nil {
		t.Fatal(err)
	}
	node.Close()
	if got, err := io.ReadAll(a); err != nil || string(got) != "late" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestClose: both directions end, also for who reads already, and whatever
// deadline is set afterwards.
func TestClose(t *testing.T) {
	s, streams := tunnel(t)
	a, node := open(t, s, streams)
	ended := make(chan error, 1)
	go func() { _, err := a.Read(make([]byte, 1)); ended <- err }()
	time.Sleep(10 * time.Millisecond) // so that it most likely reads; either way it must end
	a.Close()
	if err := a.SetDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a deadline: %v", err)
	}
	select {
	case err := <-ended:
		if !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("it reads on")
	}
	if _, err := node.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the node: %v", err)
	}
	// A deadline is a timeout, as callers of a net.Conn know it.
	b, _ := open(t, s, streams)
	if err := b.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	var timeout net.Error
	if _, err := b.Read(make([]byte, 1)); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("%v", err)
	}
}

// TestDoors: only what is open is opened, and the bastion hears why not.
func TestDoors(t *testing.T) {
	s, _ := tunnel(t)
	for _, door := range []trust.Door{trust.GRPC, "console", "", "127.0.0.1:22", trust.Door(strings.Repeat("x", 1000))} {
		if _, err := s.Open(door); err == nil {
			t.Errorf("%.20q is open", door)
		} else if len(door) < 100 && !strings.Contains(err.Error(), "is not open") {
			t.Errorf("%q: %v", door, err)
		}
	}
	if _, err := s.Open(trust.SSH); err != nil {
		t.Error("after all that:", err)
	}
}

// TestBounds: neither end has more streams than are agreed.
func TestBounds(t *testing.T) {
	s, streams := tunnel(t)
	var all []*Stream
	for range MaxStreams {
		a, _ := open(t, s, streams)
		all = append(all, a)
	}
	if _, err := s.Open(trust.SSH); !errors.Is(err, ErrFull) {
		t.Errorf("one more: %v", err)
	}
	for _, a := range all {
		a.Close()
	}

	// A bastion that keeps to nothing is cut off.
	near, far := pair(t)
	ended := make(chan error, 1)
	go func() {
		ended <- Node(far, zerolog.Nop(), func(*Session) {}, func(_ trust.Door, take func() (*Stream, error)) error { _, err := take(); return err })
	}()
	greedy, err := yamux.Client(near, config(zerolog.Nop()))
	if err != nil {
		t.Fatal(err)
	}
	defer greedy.Close()
	for range 3 * MaxStreams {
		c, err := greedy.OpenStream()
		if err != nil {
			break
		}
		_, _ = io.WriteString(c, "ssh\n")
	}
	select {
	case err := <-ended:
		if !strings.Contains(err.Error(), "streams") {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("it may have any number")
	}

	// So is a node that opens streams to the bastion.
	near, far = pair(t)
	b, err := Bastion(near, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	node, err := yamux.Server(far, config(zerolog.Nop()))
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	_, _ = node.OpenStream() // it may hear of its end at once
	select {
	case <-b.Ended():
	case <-time.After(patience):
		t.Error("a node opens streams")
	}
}

// FuzzNode: whatever a bastion sends, a node's end neither panics nor hangs.
func FuzzNode(f *testing.F) {
	f.Add([]byte("\x00\x01\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x04ssh\n"))
	f.Add([]byte("\x00\x02\x00\x01\x00\x00\x00\x07"))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		near, far := net.Pipe()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = Node(far, zerolog.Nop(), func(*Session) {}, func(_ trust.Door, take func() (*Stream, error)) error {
				s, err := take()
				if err == nil {
					s.Close()
				}
				return err
			})
		}()
		go func() { _, _ = io.Copy(io.Discard, near) }()
		_, _ = near.Write(data)
		near.Close()
		select {
		case <-ended:
		case <-time.After(patience):
			t.Fatal("it hangs")
		}
	})
}
