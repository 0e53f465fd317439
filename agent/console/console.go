// Package console is the agent's door for somebody at the node itself: a Unix
// socket that only root can open. It needs nothing but the kernel, so it is the
// door that works when every other is gone.
//
// Who calls is what the kernel says about the other end of the socket, never
// what a request says; the person is the login uid, so that a shared root shell
// still has a name. It must never know what is served: agent/door does that, for
// every door alike. It stands on floor 4.
package console

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

// The bounds of this door.
const (
	maxConnections = 32
	maxStrangers   = 4 // connections of peers that are only told "no"
)

// Listen opens the socket, so that this process is the only one that does.
// Its folder is made with mode 0700, and refused if it is laxer. A socket that
// a dead agent left is replaced; that of a live one is an error.
func Listen(socket string) (*Listener, error) {
	l, err := listen(socket)
	if err != nil {
		return nil, fmt.Errorf("opening the console socket: %w", err)
	}
	return l, nil
}

func listen(socket string) (*Listener, error) {
	// sun_path of unix(7) has 108 bytes with the final NUL.
	if len(socket) > 107 {
		return nil, fault.New(fault.Usage, "give a shorter path", "%s is longer than the 107 bytes that a socket's path may have", socket)
	}
	if err := durable.Dir(filepath.Dir(socket)); err != nil {
		return nil, fault.New(fault.Failed, "give the socket a folder of its own with mode 0700", "%w", err)
	}
	// The lock decides between two agents that start at once; the kernel drops
	// it with the process, however that ends.
	lock, err := os.OpenFile(socket+".lock", os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	unlock := sync.OnceFunc(func() { lock.Close() })
	taken := fault.New(fault.Failed, "stop it, or give this one another socket", "another agent is listening on %s", socket)
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		unlock()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, taken
		}
		return nil, fmt.Errorf("locking %s: %w", lock.Name(), err)
	}
	l, err := bind(socket, taken)
	if err != nil {
		unlock()
		return nil, err
	}
	return &Listener{UnixListener: l, unlock: unlock, known: make(chan struct{}, maxConnections), strangers: make(chan struct{}, maxStrangers)}, nil
}

func bind(socket string, taken error) (*net.UnixListener, error) {
	switch st, err := os.Lstat(socket); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case st.Mode().Type() != os.ModeSocket:
		return nil, fault.New(fault.Failed, "move it away, or give another path", "%s is there and is no socket", socket)
	default:
		// The lock is ours, so only a program that does not take it can answer.
		if c, err := net.DialTimeout("unix", socket, time.Second); err == nil {
			c.Close()
			return nil, taken
		}
		if err := os.Remove(socket); err != nil {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
