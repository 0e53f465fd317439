package mtls

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// A daemon's connection to another shows within this that its other end is gone.
// Doors take a ping every 10 s.
const pingEvery, pingWithin = 20 * time.Second, 10 * time.Second

// Client returns a gRPC client over the one connection, which is closed with it: to
// the server that config verifies, as who holds the certificate. A broken connection
// is not made anew. Answers have at most maxAnswer bytes each.
func Client(raw net.Conn, name string, config *tls.Config, certificate *tls.Certificate, maxAnswer int) (*grpc.ClientConn, error) {
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate, nil }
	once := make(chan net.Conn, 1)
	once <- raw
	return grpc.NewClient("passthrough:///"+name, grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingEvery, Timeout: pingWithin}),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-once:
				return c, nil
			default:
				return nil, errors.New("the connection has broken")
			}
		}))
}
