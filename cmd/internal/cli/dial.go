package cli

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/halligan-io/halligan/internal/fault"
)

// maxMessage bounds what is taken from an agent, in bytes; no door sends larger
// messages.
const maxMessage = 16 << 20

// dialConsole reaches the console socket of an agent on this machine. The
// kernel vouches for both ends.
func dialConsole(ctx context.Context, socket string) (*grpc.ClientConn, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var dialer net.Dialer
	first, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, unreachable(socket, err)
	}
	return overConn(first, "console", func(ctx context.Context) (net.Conn, error) { return dialer.DialContext(ctx, "unix", socket) })
}

// overConn speaks gRPC over a connection that needs no credentials any more,
// and over those that again makes when it is lost.
func overConn(first net.Conn, name string, again func(context.Context) (net.Conn, error)) (*grpc.ClientConn, error) {
	// gRPC connects when it likes; hand it what is open already.
	ready := make(chan net.Conn, 1)
	ready <- first
	conn, err := grpc.NewClient("passthrough:///"+name,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			select {
			case c := <-ready:
				return c, nil
			default:
				return again(ctx)
			}
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		// Nothing is ever sent twice by itself, whatever a name service says.
		grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: 5 * time.Second}),
	)
	if err != nil {
		first.Close()
		return nil, fault.New(fault.Failed, "", "preparing the connection: %w", err)
	}
	conn.Connect()
	return conn, nil
}

func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err != nil || info.Mode()&os.ModeSocket != 0
}

func unreachable(socket string, err error) error {
	const other = "name a bundle with HALLIGAN_BUNDLE to go over the network, or a socket with HALLIGAN_SOCKET"
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, os.ErrNotExist):
		return fault.New(fault.Unreachable, "start halligan-agent on this node, "+other, "no agent has a socket at %s", socket)
	case errors.Is(err, syscall.ECONNREFUSED) && !isSocket(socket):
		return fault.New(fault.Unreachable, other, "%s is no socket", socket)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fault.New(fault.Unreachable, "start halligan-agent again; its log says why it ended", "the agent of %s is not running", socket)
	case errors.Is(err, os.ErrPermission):
		return fault.New(fault.Unreachable, "become root, for example with sudo", "the socket %s is for root only", socket)
	}
	return fault.New(fault.Unreachable, other, "cannot reach an agent at %q: %w", socket, err)
}
