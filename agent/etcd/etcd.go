// Package etcd is Halligan's way to the cluster's etcd: bounded reads, writes
// that compare and swap one key at a time, and an honest answer when the
// outcome of a write is not known.
//
// It must never write without a comparison, never delete more than one key in a
// transaction, never write without the permit of an intent that is on record, never
// repeat a write whose outcome is unknown without a comparison that makes the
// repetition harmless, and never ask DNS. It knows nothing of Kubernetes. It stands
// on floor 4, below agent/action.
//
// Retries are all made here and none below: clientv3's own interceptor
// (client/v3 retry_interceptor.go, retry.go) would repeat reads up to a hundred
// times and writes only where no connection was there; it is limited to one
// attempt, so that this package knows what was sent. gRPC itself repeats a
// request that the server provably never looked at, which is harmless.
package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/peer"

	"github.com/halligan-io/halligan/internal/fault"
)

// Config says which etcd, with which credentials. There is no reload: the CA is
// read by Open, the client certificate at every handshake, so that a renewed
// one is used without a restart.
type Config struct {
	// Endpoints are IP:port, TLS unless no TLS file is named. The members must
	// belong to one cluster; the node's own is best, and then the only one.
	Endpoints []string
	// CAFile, CertFile and KeyFile are PEM files.
	CAFile, CertFile, KeyFile string
	// ServerName replaces the IP address as the name that the server's
	// certificate must have.
	ServerName string
	// DialTimeout bounds one connection attempt; default 2 s.
	DialTimeout time.Duration
	// RequestTimeout bounds every call but Walk, where it bounds the wait for
	// the next piece; default 5 s.
	RequestTimeout time.Duration
	// ReadChunk is the size in bytes that a page of a paged read aims at;
	// default 1 MiB.
	ReadChunk int
}

// Client is a connection to one cluster. It is safe for concurrent use.
type Client struct {
	cfg     Config
	cl      *clientv3.Client // for its balancer and its watches
	kv      pb.KVClient
	attempt time.Duration // the part of RequestTimeout that one try may take

	noStream atomic.Bool                // the server has no RangeStream (before etcd 3.7)
	lost     atomic.Pointer[quorumLoss] // nil while linearizable reads work
}

// maxMessage bounds one piece of a bulk read in this process's memory. A piece
// of a stream aims at the server's request limit (1.5 MiB) and can exceed it
// where small values are followed by large ones.
const maxMessage = 64 << 20

// window is how many bytes the server may send ahead of what was read here.
const window = 256 << 10

// Open returns a client. etcd need not be alive, but the files must be there.
func Open(cfg Config) (*Client, error) {
	if cfg.DialTimeout <= 0 {
		cfg.DialTimeout = 2 * time.Second
	}
	if cfg.RequestTimeout <= 0 {
		cfg.RequestTimeout = 5 * time.Second
	}
	if cfg.ReadChunk <= 0 {
		cfg.ReadChunk = 1 << 20
	}
	if len(cfg.Endpoints) == 0 {
		return nil, fault.New(fault.Usage, "name etcd's endpoint as IP:port", "no etcd endpoint is configured")
	}
	for _, e := range cfg.Endpoints {
		if ap, err := netip.ParseAddrPort(e); err != nil || ap.Port() == 0 {
			return nil, fault.New(fault.Usage, "use the member's address, such as 127.0.0.1:2379; names need DNS, which may be what failed",
				"etcd endpoint %q is not IP:port", e)
		}
	}
	tc, err := cfg.tls()
	if err != nil {
		return nil, err
	}
	scheme := "http://"
	if tc != nil {
		scheme = "https://"
	}
	urls := make([]string, len(cfg.Endpoints))
	for i, e := range cfg.Endpoints {
		urls[i] = scheme + e
	}
	var named []grpc.DialOption
	if cfg.ServerName != "" {
		// gRPC takes the name to verify from the address, whatever the TLS
		// configuration says (credentials/tls.go: ClientHandshake).
		named = append(named, grpc.WithAuthority(cfg.ServerName))
	}
	dialer := &net.Dialer{Timeout: cfg.DialTimeout, Resolver: &net.Resolver{PreferGo: true, Dial: noDNS}}
	cl, err := clientv3.New(clientv3.Config{
		Endpoints:       urls,
		TLS:             tc,
		Logger:          zap.NewNop(),
		MaxUnaryRetries: 1,
		// Pings only while calls are in flight; etcd refuses more than one in
		// 5 s (server/embed/config.go: DefaultGRPCKeepAliveMinTime).
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		DialOptions: append(named,
			// A dialer of our own also keeps HTTPS_PROXY out.
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
				return dialer.DialContext(ctx, "tcp", addr)
			}),
			// Otherwise gRPC buffers up to 16 MiB of a stream that it finds fast
			// (internal/transport/bdp_estimator.go).
			grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window),
			grpc.WithConnectParams(grpc.ConnectParams{
				MinConnectTimeout: cfg.DialTimeout,
				Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			}),
		),
	})
	if err != nil {
		return nil, fault.New(fault.Failed, "", "opening the etcd client: %w", err)
	}
	return &Client{cfg: cfg, cl: cl, kv: pb.NewKVClient(cl.ActiveConnection()), attempt: cfg.RequestTimeout * 2 / 5}, nil
}

// Close ends all calls.
func (c *Client) Close() error {
	if err := c.cl.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

func noDNS(context.Context, string, string) (net.Conn, error) {
	return nil, errors.New("etcd addresses are never looked up")
}

// tls returns nil where no TLS file is named.
func (cfg *Config) tls() (*tls.Config, error) {
	if cfg.CAFile == "" && cfg.CertFile == "" && cfg.KeyFile == "" {
		return nil, nil
	}
	if cfg.CAFile == "" || (cfg.CertFile == "") != (cfg.KeyFile == "") {
		return nil, fault.New(fault.Usage, "name the CA, and certificate and key together", "etcd's TLS files are incomplete")
	}
	pem, err := os.ReadFile(cfg.CAFile)
	if err != nil {
		return nil, fault.New(fault.Usage, "check etcd's CA file", "reading etcd's CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fault.New(fault.Usage, "check etcd's CA file", "no certificate in %s", cfg.CAFile)
	}
	tc := &tls.Config{RootCAs: pool, ServerName: cfg.ServerName, MinVersion: tls.VersionTLS12}
	if cfg.CertFile == "" {
		return tc, nil
	}
	load := func() (*tls.Certificate, error) {
		cert, err := tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("reading etcd's client certificate: %w", err)
		}
		return &cert, nil
	}
	if _, err := load(); err != nil {
		return nil, fault.New(fault.Usage, "check the certificate and key files", "%w", err)
	}
	tc.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	return tc, nil
}

// opts are the options of one call; p tells afterwards whether the request was
// ever given to a connection.
func opts(p *peer.Peer, maxRecv int) []grpc.CallOption {
	return []grpc.CallOption{
		// An endpoint that refuses connections is said at once, not when the
		// deadline is over.
		grpc.WaitForReady(false),
		grpc.MaxCallSendMsgSize(math.MaxInt32), // etcd knows its own limit
		grpc.MaxCallRecvMsgSize(maxRecv),
		grpc.Peer(p),
	}
}

// pause waits before try number n+1: 25 ms doubled to at most 400 ms, with full
// jitter over the upper half. It returns false when ctx ends first.
func pause(ctx context.Context, n int) bool {
	d := 25 * time.Millisecond << min(n, 4)
	return sleep(ctx, d/2+rand.N(d/2))
}

func sleep(ctx context.Context, d time.Duration) bool {
	if dl, ok := ctx.Deadline(); ok && time.Until(dl) <= d {
		return false
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
