package grpcdoor

import (
	"errors"
	"testing"
	"time"
)

// stalled is a session that nothing comes out of.
type stalled struct {
	Session
	exited chan int
}

func (s stalled) Exit(status int) error { s.exited <- status; return nil }

// TestSilentSession: what gRPC wants of a connection's deadlines ends a client
// that opens the subsystem and says nothing.
func TestSilentSession(t *testing.T) {
	s := stalled{exited: make(chan int, 1)}
	c := newSession(s)
	if err := c.SetDeadline(time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := c.SetDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	<-c.closed
	<-s.exited
	if err := errors.Join(c.Close(), c.Close()); err != nil {
		t.Error(err)
	}
}
