// Package console is the agent's door for somebody at the node itself: the gRPC
// API of api/ on a Unix socket that only root can open. It needs nothing but
// the kernel, so it is the door that works when every other is gone.
//
// Who calls is what the kernel says about the other end of the socket, never
// what a request says; the person is the login uid, so that a shared root shell
// still has a name. The door authenticates and relays; what a person may do,
// and its record, is the engine's. It must never hold a lock or a decision that
// another door would have to repeat. It stands on floor 4.
package console

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/types/known/structpb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// Engine is what stands behind the door. Its methods are called concurrently
// and check the identity's right themselves; errors should be faults.
type Engine interface {
	// Describe returns the table of actions.
	Describe() []*halliganv1.Action
	Status(ctx context.Context, who trust.Identity) (*halliganv1.StatusResponse, error)
	// Plan changes nothing.
	Plan(ctx context.Context, who trust.Identity, req *halliganv1.PlanRequest) (*halliganv1.Plan, error)
	// Apply always returns a result. Its context does not end when the caller
	// goes away, only when the agent stops. progress never blocks, and is not
	// called after Apply has returned.
	Apply(ctx context.Context, who trust.Identity, planID, planSHA256 string, progress func(*halliganv1.Progress)) *halliganv1.Result
	// Get calls send from one goroutine, and stops when send fails.
	// Stop ends an action under way between two objects.
	Stop(who trust.Identity, id string) error
	Get(ctx context.Context, who trust.Identity, params *structpb.Struct, send func(*halliganv1.Object) error) (*halliganv1.GetSummary, error)
	// History calls send from one goroutine, newest first, and stops when send
	// fails.
	History(ctx context.Context, who trust.Identity, req *halliganv1.HistoryRequest, send func(*halliganv1.HistoryEntry) error) error
}

// The bounds of this door. A person needs one connection and one or two
// streams; the rest is room for several people and their scripts.
const (
	maxConnections = 32
	maxStrangers   = 4 // connections of peers that are only told "no"
	maxStreams     = 16
	// maxMessage bounds an answer in bytes; a plan for 10,000 objects has about
	// 4 MiB, a stored object at most etcd's 1.5 MiB. A request is a few words.
	maxMessage       = 16 << 20
	maxRequest       = 1 << 20
	maxHeaders       = 32 << 10
	handshakeTimeout = 5 * time.Second
	// shutdownGrace is how long calls may take to end after the agent was told
	// to stop, before their connections are closed.
	shutdownGrace = 5 * time.Second
)

// Serve offers the engine on the socket until ctx ends, then stops gracefully
// and removes the socket. The socket's folder is made with mode 0700, and
// refused if it is laxer. A socket that a dead agent left is replaced; that of
// a live one is an error.
func Serve(ctx context.Context, socket string, e Engine, log zerolog.Logger) error {
	l, unlock, err := listen(socket)
	if err != nil {
		return fmt.Errorf("opening the console socket: %w", err)
	}
	defer unlock()
	door := &service{engine: e, log: log, stopping: ctx}
	server := grpc.NewServer(
		grpc.Creds(peerCredentials{}),
		grpc.UnaryInterceptor(door.unary),
		grpc.StreamInterceptor(door.stream),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.ConnectionTimeout(handshakeTimeout),
		// A peer that was stopped or hangs gives its slot back.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
	)
	halliganv1.RegisterAgentServer(server, door)
	reflection.Register(server)
	if err := checkMethods(server.GetServiceInfo()); err != nil {
		return errors.Join(err, l.Close())
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	log.Info().Str("socket", socket).Msg("console open")
	select {
	case err := <-ended:
		server.Stop()
		return fmt.Errorf("serving the console: %w", err)
	case <-ctx.Done():
	}
	hard := time.AfterFunc(shutdownGrace, server.Stop)
	server.GracefulStop()
	hard.Stop()
	<-ended
	log.Info().Msg("console closed")
	return nil
}

// listen opens the socket, so that this process is the only one that does, and
// returns what gives that claim back.
func listen(socket string) (net.Listener, func(), error) {
	// sun_path of unix(7) has 108 bytes with the final NUL.
	if len(socket) > 107 {
		return nil, nil, fault.New(fault.Usage, "give a shorter path", "%s is longer than the 107 bytes that a socket's path may have", socket)
	}
	if err := durable.Dir(filepath.Dir(socket)); err != nil {
		return nil, nil, fault.New(fault.Failed, "give the socket a folder of its own with mode 0700", "%w", err)
	}
	// The lock decides between two agents that start at once; the kernel drops
	// it with the process, however that ends.
	lock, err := os.OpenFile(socket+".lock", os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, nil, err
	}
	unlock := func() { lock.Close() }
	taken := fault.New(fault.Failed, "stop it, or give this one another socket", "another agent is listening on %s", socket)
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		unlock()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil, taken
		}
		return nil, nil, fmt.Errorf("locking %s: %w", lock.Name(), err)
	}
	l, err := bind(socket, taken)
	if err != nil {
		unlock()
		return nil, nil, err
	}
	return l, unlock, nil
}

func bind(socket string, taken error) (net.Listener, error) {
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
	return &listener{UnixListener: l, known: make(chan struct{}, maxConnections), strangers: make(chan struct{}, maxStrangers)}, nil
}
