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
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// noLogin is the login uid of a process that nobody logged in for: (uid_t)-1
// (Linux, audit(7), /proc/PID/loginuid).
const noLogin = 1<<32 - 1

// A listener accepts connections and bounds them. Those of peers that may not
// enter have slots of their own, so that they cannot keep out those that may.
type listener struct {
	*net.UnixListener
	known, strangers chan struct{}
}

// Accept returns the next connection that has a slot; others are closed.
func (l *listener) Accept() (net.Conn, error) {
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
	return trust.Identity{Person: fmt.Sprintf("console/%d", person), Role: trust.Responder, Door: "console"}, nil
}

// peerCredentials hands the identity of a connection to gRPC.
type peerCredentials struct{}

// authInfo is what a call finds out about its connection.
type authInfo struct {
	credentials.CommonAuthInfo
	who     trust.Identity
	refusal error
}

func (authInfo) AuthType() string { return "peercred" }

func (peerCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return nil, nil, errors.Join(errors.New("the console serves its own socket only"), raw.Close())
	}
	// The bytes never leave the kernel.
	common := credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}
	return c, authInfo{common, c.who, c.refusal}, nil
}

func (peerCredentials) ClientHandshake(_ context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.Join(errors.New("these are credentials of a server"), raw.Close())
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}

func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

func (peerCredentials) OverrideServerName(string) error { return nil }

// caller returns who makes the call.
func caller(ctx context.Context) (trust.Identity, error) {
	p, _ := peer.FromContext(ctx)
	if p == nil {
		return trust.Identity{}, fault.New(fault.Unauthenticated, "", "a call without a connection")
	}
	info, ok := p.AuthInfo.(authInfo)
	if !ok {
		return trust.Identity{}, fault.New(fault.Unauthenticated, "", "a call without credentials")
	}
	return info.who, info.refusal
}
