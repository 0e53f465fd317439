package console

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/halligan-io/halligan/api/grpcdoor"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// noLogin is the login uid of a process that nobody logged in for: (uid_t)-1
// (Linux, audit(7), /proc/PID/loginuid).
const noLogin = 1<<32 - 1

// A Listener accepts connections and bounds them. Those of peers that may not
// enter have slots of their own, so that they cannot keep out those that may.
type Listener struct {
	*net.UnixListener
	known, strangers chan struct{}
	unlock           func()
}

// Close closes and removes the socket, then gives up the claim to it.
func (l *Listener) Close() error {
	defer l.unlock()
	return l.UnixListener.Close()
}

// Accept returns the next connection that has a slot; others are closed.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		who, refusal := identify(c)
		slots := l.known
		if refusal != nil {
			slots = l.strangers
		}
		select {
		case slots <- struct{}{}:
			return &conn{UnixConn: c, who: who, refusal: refusal, release: sync.OnceFunc(func() { <-slots })}, nil
		default:
			c.Close()
		}
	}
}

// A conn knows who is at its other end, or why that peer may not enter.
type conn struct {
	*net.UnixConn
	who     trust.Identity
	refusal error
	release func()
}

var _ grpcdoor.Conn = (*conn)(nil)

func (c *conn) Identity() (trust.Identity, error) { return c.who, c.refusal }

// Held never ends: the kernel takes nobody's uid back.
func (c *conn) Held() context.Context { return context.Background() }

func (c *conn) Close() error {
	defer c.release()
	return c.UnixConn.Close()
}

// identify asks the kernel who opened the connection (SO_PEERCRED, unix(7)):
// the credentials are those of the moment of connect(2).
func identify(c *net.UnixConn) (trust.Identity, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return trust.Identity{}, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, credErr); err != nil {
		return trust.Identity{}, fault.New(fault.Unauthenticated, "", "the kernel does not say who calls: %w", err)
	}
	return admit(cred.Uid, uint32(os.Geteuid()), func() (string, error) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/loginuid", cred.Pid))
		return string(text), err
	})
}

// admit decides who may enter: root, and where the agent itself is not root,
// its own user. The login uid survives su and sudo; where it is unset or cannot
// be read, the uid stands for it.
func admit(uid, own uint32, loginUID func() (string, error)) (trust.Identity, error) {
	if uid != 0 && uid != own {
		return trust.Identity{}, fault.New(fault.Unauthenticated, "become root, for example with sudo", "uid %d may not use the console of this agent", uid)
	}
	person := uid
	if text, err := loginUID(); err == nil {
		if n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 32); err == nil && n != noLogin {
			person = uint32(n)
		}
	}
	return trust.Identity{Person: fmt.Sprintf("console/%d", person), Role: trust.Responder, Door: trust.Console, Kind: trust.Local}, nil
}
