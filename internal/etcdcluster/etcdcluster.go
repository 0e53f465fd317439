// Package etcdcluster runs the members of an etcd cluster inside this process,
// with TLS for clients and peers and everything below one folder. It gives labs,
// tests and benchmarks a real etcd to work against.
//
// It must never listen on an address that is not loopback, and never write to
// this process's standard streams: the members log to files. Stopping is meant
// to be repeatable, and a folder left behind by a killed process is started on
// again. It stands on floor 0.
package etcdcluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/labpki"
)

// Member is one member of the cluster.
type Member struct {
	// Name is also the name of its folder; default m1, m2, ...
	Name string
	// IP is a loopback address; default 127.0.0.1.
	IP string
	// Ports; 0: a free one, chosen by Start.
	ClientPort, PeerPort int
}

// Options says what to start.
type Options struct {
	// Dir holds all state: pki/, one folder and one log per member. Made 0700
	// where it is missing.
	Dir     string
	Members []Member
	// QuotaBytes bounds each member's database; 0: etcd's default of 2 GiB.
	QuotaBytes int64
	// ElectionMs and HeartbeatMs; 0: 500 and 50, half of etcd's defaults, so
	// that a cluster is ready in about a second. A member that is alone elects
	// itself after the election timeout.
	ElectionMs, HeartbeatMs uint
	// UnsafeNoFsync skips fsync: for tests, never for measurements.
	UnsafeNoFsync bool
	// MaxRequestBytes; 0: etcd's default of 1.5 MiB.
	MaxRequestBytes uint
}

// startTimeout bounds Start and Restart where the context has no deadline.
const startTimeout = time.Minute

// Cluster is a running cluster.
type Cluster struct {
	opts    Options
	ca      *labpki.CA
	client  labpki.Pair
	clients *tls.Config

	mu      sync.Mutex // guards running
	running []*embed.Etcd
}

// Start starts every member and returns when each serves linearizable reads.
// On an error everything is stopped again. A port that is taken is an error that
// names the address, unless Start chose the port.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	if len(o.Members) == 0 {
		return nil, errors.New("etcd cluster: no members")
	}
	if o.ElectionMs == 0 {
		o.ElectionMs = 500
	}
	if o.HeartbeatMs == 0 {
		o.HeartbeatMs = o.ElectionMs / 10
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	o.Dir = dir
	o.Members = append([]Member(nil), o.Members...)
	for i := range o.Members {
		m := &o.Members[i]
		if m.Name == "" {
			m.Name = "m" + strconv.Itoa(i+1)
		}
		if m.IP == "" {
			m.IP = "127.0.0.1"
		}
		if ip := net.ParseIP(m.IP); ip == nil || !ip.IsLoopback() {
			return nil, fmt.Errorf("etcd member %s: %q is not a loopback address", m.Name, m.IP)
		}
		for _, port := range []*int{&m.ClientPort, &m.PeerPort} {
			if *port == 0 {
				if *port, err = freePort(m.IP); err != nil {
					return nil, fmt.Errorf("etcd member %s: no free port: %w", m.Name, err)
				}
			}
		}
	}
	c := &Cluster{opts: o, running: make([]*embed.Etcd, len(o.Members))}
	if err := c.issue(); err != nil {
		return nil, fmt.Errorf("etcd cluster: certificates: %w", err)
	}
	ctx, cancel := bounded(ctx)
	defer cancel()
	// One after the other: a new member asks the others whether it is new, and
	// waits a second for each that listens already and does not serve yet.
	for i := range o.Members {
		if err = c.start(i); err != nil {
			break
		}
	}
	if err == nil {
		err = c.ready(ctx)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, startTimeout)
}

// issue makes the certificates anew: a member's is valid for its own address
// and for 127.0.0.1, which loopback connections come from.
func (c *Cluster) issue() (err error) {
	pki := filepath.Join(c.opts.Dir, "pki")
	if c.ca, err = labpki.Open(pki, "etcd-ca"); err != nil {
		return err
	}
	for _, m := range c.opts.Members {
		ips := []net.IP{net.ParseIP(m.IP), net.IPv4(127, 0, 0, 1)}
		if _, err := c.ca.Issue("member-"+m.Name, labpki.Peer, ips); err != nil {
			return err
		}
	}
	if c.client, err = c.ca.Issue("client", labpki.Client, nil); err != nil {
		return err
	}
	info := transport.TLSInfo{CertFile: c.client.CertFile, KeyFile: c.client.KeyFile, TrustedCAFile: c.ca.CertFile()}
	c.clients, err = info.ClientConfig()
	return err
}

// start starts member i and waits until it has joined or failed to.
func (c *Cluster) start(i int) error {
	m := c.opts.Members[i]
	cfg := embed.NewConfig()
	cfg.Name = m.Name
	cfg.Dir = filepath.Join(c.opts.Dir, m.Name)
	cfg.Logger = "zap"
	cfg.LogLevel = "warn"
	cfg.LogOutputs = []string{filepath.Join(c.opts.Dir, m.Name+".log")}
	cfg.ListenClientUrls = []url.URL{https(m.IP, m.ClientPort)}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	cfg.ListenPeerUrls = []url.URL{https(m.IP, m.PeerPort)}
	cfg.AdvertisePeerUrls = cfg.ListenPeerUrls
	tlsInfo := transport.TLSInfo{
		CertFile:       filepath.Join(c.opts.Dir, "pki", "member-"+m.Name+".crt"),
		KeyFile:        filepath.Join(c.opts.Dir, "pki", "member-"+m.Name+".key"),
		TrustedCAFile:  c.ca.CertFile(),
		ClientCertAuth: true,
	}
	cfg.ClientTLSInfo, cfg.PeerTLSInfo = tlsInfo, tlsInfo
	var initial []string
	for _, m := range c.opts.Members {
		u := https(m.IP, m.PeerPort)
		initial = append(initial, m.Name+"="+u.String())
	}
	cfg.InitialCluster = strings.Join(initial, ",")
	cfg.InitialClusterToken = "halligan-lab"
	cfg.TickMs, cfg.ElectionMs = c.opts.HeartbeatMs, c.opts.ElectionMs
	cfg.QuotaBackendBytes = c.opts.QuotaBytes
	if c.opts.MaxRequestBytes != 0 {
		cfg.MaxRequestBytes = c.opts.MaxRequestBytes
	}
	cfg.UnsafeNoFsync = c.opts.UnsafeNoFsync
	cfg.EnableGRPCGateway = false
	if err := durable.Dir(cfg.Dir); err != nil {
		return err
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		var op *net.OpError
		if errors.Is(err, syscall.EADDRINUSE) && errors.As(err, &op) && op.Addr != nil {
			return fault.New(fault.Failed, "stop whatever listens there, or choose other addresses",
				"etcd member %s: %s is taken: %w", m.Name, op.Addr, syscall.EADDRINUSE)
		}
		return fmt.Errorf("starting etcd member %s: %w", m.Name, err)
	}
	c.mu.Lock()
	c.running[i] = e
	c.mu.Unlock()
	return nil
}

// ready waits until each running member answers a linearizable read.
func (c *Cluster) ready(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for i, m := range c.opts.Members {
		if c.etcd(i) == nil {
			continue
		}
		g.Go(func() error {
			cli, err := c.Client(i)
			if err != nil {
				return err
			}
			defer cli.Close()
			select {
			case <-c.etcd(i).Server.ReadyNotify():
			case <-ctx.Done():
			}
			for {
				try, cancel := context.WithTimeout(ctx, time.Second)
				_, err := cli.Get(try, "ready")
				cancel()
				if err == nil {
					return nil
				}
				select {
				case <-ctx.Done():
					return fmt.Errorf("etcd member %s is not ready: %w (its log: %s)", m.Name, err,
						filepath.Join(c.opts.Dir, m.Name+".log"))
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
	}
	return g.Wait()
}

// Client returns a client of the members given by index, of all without an
// index. The caller closes it.
func (c *Cluster) Client(members ...int) (*clientv3.Client, error) {
	endpoints := c.Endpoints()
	if len(members) > 0 {
		some := make([]string, len(members))
		for n, i := range members {
			some[n] = endpoints[i]
		}
		endpoints = some
	}
	for i := range endpoints {
		endpoints[i] = "https://" + endpoints[i]
	}
	return clientv3.New(clientv3.Config{
		Endpoints: endpoints, TLS: c.clients.Clone(), DialTimeout: 5 * time.Second, Logger: zap.NewNop(),
	})
}

// Endpoints returns IP:port of every member's client door, running or not.
func (c *Cluster) Endpoints() []string {
	all := make([]string, len(c.opts.Members))
	for i, m := range c.opts.Members {
		all[i] = net.JoinHostPort(m.IP, strconv.Itoa(m.ClientPort))
	}
	return all
}

// CAFile, CertFile and KeyFile name what a client needs.
func (c *Cluster) CAFile() string { return c.ca.CertFile() }

// CertFile names the client certificate.
func (c *Cluster) CertFile() string { return c.client.CertFile }

// KeyFile names the client certificate's key; its mode is 0600.
func (c *Cluster) KeyFile() string { return c.client.KeyFile }

// Member returns member i with the ports that were chosen for it; Start with
// these starts on the same folder again.
func (c *Cluster) Member(i int) Member { return c.opts.Members[i] }

// Len returns the number of members.
func (c *Cluster) Len() int { return len(c.opts.Members) }

// Stop stops member i, if it runs, in about a second, as a crash would: a
// leader hands nothing over. Streams that a client holds open may make that take
// some seconds more.
func (c *Cluster) Stop(i int) {
	c.mu.Lock()
	e := c.running[i]
	c.running[i] = nil
	c.mu.Unlock()
	if e == nil {
		return
	}
	// etcd's own Close waits seconds for clients that connect again meanwhile and
	// for a leadership that nobody is left to take, and forever for a member that
	// never got ready.
	for _, l := range e.Clients {
		l.Close()
	}
	e.Server.HardStop()
	e.Close()
}

// Restart stops member i, starts it on its folder again and returns when every
// running member serves. Where quorum is still lacking it fails once the context
// ends; the member keeps running.
func (c *Cluster) Restart(ctx context.Context, i int) error {
	c.Stop(i)
	if err := c.start(i); err != nil {
		return err
	}
	ctx, cancel := bounded(ctx)
	defer cancel()
	return c.ready(ctx)
}

// StartMember starts member i without waiting for quorum, for tests that bring
// members back one at a time.
func (c *Cluster) StartMember(i int) error { return c.start(i) }

// Leader returns the index of the member that a running member takes for the
// leader, -1 if there is none.
func (c *Cluster) Leader() int {
	for i := range c.opts.Members {
		e := c.etcd(i)
		if e == nil || e.Server.Lead() == 0 {
			continue
		}
		for j := range c.opts.Members {
			if l := c.etcd(j); l != nil && uint64(l.Server.MemberID()) == e.Server.Lead() {
				return j
			}
		}
	}
	return -1
}

// MoveLeader makes member i the leader.
func (c *Cluster) MoveLeader(ctx context.Context, i int) error {
	lead, to := c.Leader(), c.etcd(i)
	if lead < 0 || to == nil {
		return fmt.Errorf("etcd cluster: no leader, or member %d is stopped", i)
	}
	if lead == i {
		return nil
	}
	from := c.etcd(lead)
	if from == nil {
		return errors.New("etcd cluster: the leader has just stopped")
	}
	return from.Server.MoveLeader(ctx, uint64(from.Server.MemberID()), uint64(to.Server.MemberID()))
}

// Close stops every member. It is safe to call again.
func (c *Cluster) Close() error {
	var g errgroup.Group
	for i := range c.opts.Members {
		g.Go(func() error { c.Stop(i); return nil })
	}
	return g.Wait()
}

func (c *Cluster) etcd(i int) *embed.Etcd {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.running[i]
}

func https(ip string, port int) url.URL {
	return url.URL{Scheme: "https", Host: net.JoinHostPort(ip, strconv.Itoa(port))}
}

// freePort returns a port that nobody listens on at this moment.
func freePort(ip string) (int, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(ip, "0"))
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
