// Package store is what bastions share: who is in, a mailbox for plans and
// approvals, and the newest bundle, in etcd. By default a bastion keeps an etcd
// of its own, in a process of its own; several bastions share an etcd of
// somebody else's, whose members they reach by IP address.
//
// It must never be needed: nothing waits for it longer than a moment, while it
// is down every call says so at once, and it is tried again for as long as the
// bastion runs. And nothing that is read from it has authority: whoever writes
// into it can lie about sessions, hide plans and hand out bad approvals, which
// those who read them verify. What one person can put into it is bounded. It
// stands on floor 4.
package store

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// root is below what every key is.
const root = "/halligan/bastion/v1/"

const (
	// tryTimeout bounds one try of a call, and there are two: one of several
	// members may hang.
	tryTimeout = time.Second
	tries      = 2
	// probeEvery is how often the store is looked at.
	probeEvery = time.Second
	// membersEvery is how often each member is, over a connection of its own.
	membersEvery = 5 * time.Second
	// maxAnswer bounds what the store may send in one answer, in bytes.
	maxAnswer = 8 << 20
	// maxRetry bounds how long a broken connection is left alone.
	maxRetry = 2 * time.Second
)

// Options of a store.
type Options struct {
	// Bastion is this bastion's name in the inventory.
	Bastion string
	// Dir is the folder of the embedded store, made 0700; used where Endpoints
	// is empty. It takes at most some 400 MiB.
	Dir string
	// Endpoints are the members of an etcd of somebody else's, reached over TLS
	// with the three files, all of which are then required. The certificate is
	// read again for every connection.
	Endpoints                 []netip.AddrPort
	CAFile, CertFile, KeyFile string
	Log                       zerolog.Logger
}

// Store is what bastions share. Its methods may be called concurrently, and end
// within about two seconds unless they say otherwise. While the store is down
// they fail at once, with fault.Unreachable.
type Store struct {
	o      Options
	server *embedded // nil with external endpoints
	client atomic.Pointer[clientv3.Client]
	look   chan struct{} // asks for a probe now
	// leastWait is the constant, but in tests.
	leastWait time.Duration

	mu      sync.Mutex // guards what follows
	down    string     // why calls fail; empty: they do not
	warning string     // what else is wrong
	own     map[string]*halliganv1.Session

	ctx     context.Context // ends with the store
	end     context.CancelFunc
	running sync.WaitGroup
}

// Open starts to reach the store, and returns without waiting for it. Errors are
// those of the options (fault.Usage).
func Open(o Options) (*Store, error) {
	s := &Store{o: o, look: make(chan struct{}, 1), own: map[string]*halliganv1.Session{}, down: "it has not answered yet", leastWait: leastWait}
	s.ctx, s.end = context.WithCancel(context.Background())
	if len(o.Endpoints) == 0 {
		if !filepath.IsAbs(o.Dir) {
			return nil, fault.New(fault.Usage, "name a folder for it, or endpoints", "the bastion's store: %q is no absolute path", o.Dir)
		}
		s.server = &embedded{dir: o.Dir, log: o.Log}
		s.running.Go(func() { s.server.keep(s.ctx) })
	} else {
		for _, e := range o.Endpoints {
			if !e.IsValid() || e.Port() == 0 || e.Addr().IsUnspecified() {
				return nil, fault.New(fault.Usage, "give every one as IP:PORT", "the bastion's store: %s is no endpoint", e)
			}
		}
		if o.CAFile == "" || o.CertFile == "" || o.KeyFile == "" {
			return nil, fault.New(fault.Usage, "name all three of caFile, certFile and keyFile", "the bastion's store: its endpoints are reached over TLS only")
		}
	}
	s.running.Go(s.watch)
	s.running.Go(s.publish)
	return s, nil
}

// Close takes this bastion's sessions out of the store, and ends an embedded one.
func (s *Store) Close() {
	s.end()
	s.running.Wait()
	if c := s.client.Load(); c != nil {
		c.Close()
	}
}

// Works reports whether calls are answered.
func (s *Store) Works() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.down == ""
}

// Degraded says in one line what is wrong with the store and how to mend it;
// empty: nothing is.
func (s *Store) Degraded() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.down != "":
		return fault.Of(s.isDown(s.down)).Error()
	case s.warning != "":
		return "the bastion's store works, but " + s.warning
	}
	return ""
}

// isDown is the error of every call while the store is down.
func (s *Store) isDown(why string) error {
	next := "mend the etcd that store.endpoints names"
	if s.server != nil {
		if ended := s.server.reason(); ended != "" {
			why = ended
		}
		next = s.server.mend(why)
	}
	return fault.New(fault.Unreachable, "relaying goes on without it, and approvals can be pasted by hand; "+next, "the bastion's store does not work: %s", why)
}

// call carries out one step with the store. It may be carried out twice.
func (s *Store) call(ctx context.Context, step func(context.Context, *clientv3.Client) error) error {
	s.mu.Lock()
	down := s.down
	s.mu.Unlock()
	c := s.client.Load()
	if down != "" || c == nil {
		return s.isDown(down)
	}
	var err error
	for range tries {
		try, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), tryTimeout)
		err = s.try(try, c, step)
		cancel()
		var f *fault.Error
		switch {
		case err == nil || errors.As(err, &f):
			if s.server != nil {
				s.server.ended("") // before the next probe, too: what comes next is something else
			}
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, rpctypes.ErrNoSpace):
			s.probeNow()
			return fault.New(fault.NoSpace, s.full(), "the bastion's store is full")
		case status.Code(err) == codes.ResourceExhausted: // it answers, and all else is taken
			return fault.New(fault.TooLarge, "approvals can be pasted by hand; see who else writes into the etcd of the bastions", "the bastion's store has more of this than is taken: %s", reason(err))
		}
	}
	why := reason(err)
	s.set(&s.down, why)
	s.probeNow()
	return s.isDown(why)
}

// try carries out a step once. One that panics, on what somebody has written
// there, fails.
func (s *Store) try(ctx context.Context, c *clientv3.Client, step func(context.Context, *clientv3.Client) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.o.Log.Error().Str("panic", neutral.LineMax(fmt.Sprint(p), 512)).Bytes("stack", debug.Stack()).Msg("panic with what is in the bastion's store")
			err = fault.New(fault.Failed, "approvals can be pasted by hand; report it with the bastion's log of this moment", "a fault of the bastion with what is in its store")
		}
	}()
	return step(ctx, c)
}

func (s *Store) full() string {
	if s.server != nil {
		return "try again in a minute: it is being compacted"
	}
	return "compact and defragment the etcd that store.endpoints names, and disarm its NOSPACE alarm"
}

// reason says why a call failed, for people.
func reason(err error) string {
	if st, ok := status.FromError(err); ok && st.Code() == codes.DeadlineExceeded || errors.Is(err, context.DeadlineExceeded) {
		return "it does not answer in time"
	}
	return neutral.LineMax(err.Error(), 256)
}

// fromStore decodes what anybody may have written, and reports whether it can be
// handed on: with no more than this build knows, and times that can be shown.
func fromStore(value []byte, x proto.Message, times func() []*timestamppb.Timestamp) bool {
	if (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(value, x) != nil {
		return false
	}
	return !slices.ContainsFunc(times(), func(t *timestamppb.Timestamp) bool { return t != nil && !t.IsValid() })
}

func (s *Store) set(what *string, to string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*what = to
}

func (s *Store) probeNow() {
	select {
	case s.look <- struct{}{}:
	default:
	}
}

// watch looks at the store until it is closed: calls find out that it is down,
// but only watch finds out that it works.
func (s *Store) watch() {
	every := time.NewTicker(probeEvery)
	defer every.Stop()
	said := s.Degraded() // so that the first good answer is told, too
	var asked time.Time
	for {
		down := s.probe()
		if down == "" && time.Since(asked) > membersEvery {
			s.set(&s.warning, s.members())
			asked = time.Now()
		}
		if s.ctx.Err() != nil {
			return
		}
		s.set(&s.down, down)
		switch now := s.Degraded(); {
		case now == said:
		case now == "":
			s.o.Log.Info().Msg("the bastion's store works")
		default:
			s.o.Log.Warn().Msg(now)
		}
		said = s.Degraded()
		select {
		case <-s.ctx.Done():
			return
		case <-every.C:
		case <-s.look:
			asked = time.Time{}
		}
	}
}

// probe asks whether a quorum answers.
func (s *Store) probe() (down string) {
	c, err := s.connected()
	if err != nil {
		return neutral.LineMax(err.Error(), 256)
	}
	for range tries { // the next one asks another member
		ctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(s.ctx), tryTimeout)
		_, err = c.Get(ctx, root, clientv3.WithCountOnly())
		cancel()
		if err == nil {
			break
		}
	}
	if err != nil {
		return reason(err)
	}
	if s.server != nil {
		s.server.ended("")
	}
	return ""
}

// members asks every member how it is.
func (s *Store) members() (warning string) {
	c := s.client.Load()
	type answer struct {
		endpoint string
		status   *clientv3.StatusResponse
		err      error
	}
	answers := make(chan answer, len(c.Endpoints()))
	for _, e := range c.Endpoints() {
		go func() {
			ctx, cancel := context.WithTimeout(s.ctx, tryTimeout)
			defer cancel()
			st, err := c.Status(ctx, e)
			answers <- answer{e, st, err}
		}()
	}
	var silent, alarms []string
	for range c.Endpoints() {
		if a := <-answers; a.err != nil {
			silent = append(silent, strings.TrimPrefix(a.endpoint, "https://"))
		} else {
			alarms = append(alarms, a.status.Errors...)
		}
	}
	slices.Sort(silent)
	switch {
	case slices.ContainsFunc(alarms, func(a string) bool { return strings.Contains(a, "NOSPACE") }):
		if s.server != nil {
			s.server.makeRoom(s.ctx, c)
		}
		return "it is full and takes nothing new; " + s.full()
	case len(silent) > 0:
		return "without its members " + strings.Join(silent, ", ") + ", which do not answer"
	}
	return ""
}

// connected returns the client, which connects by itself and again.
func (s *Store) connected() (*clientv3.Client, error) {
	if c := s.client.Load(); c != nil {
		return c, nil
	}
	config := clientv3.Config{Logger: zap.NewNop(), MaxCallRecvMsgSize: maxAnswer, MaxCallSendMsgSize: maxAnswer, DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: tryTimeout,
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: tryTimeout,
			Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxRetry}})}}
	if s.server != nil {
		config.Endpoints = []string{"unix:" + socket}
		config.DialOptions = append(config.DialOptions, grpc.WithContextDialer(s.server.dial))
	} else {
		for _, e := range s.o.Endpoints {
			config.Endpoints = append(config.Endpoints, "https://"+e.String())
		}
		var err error
		if config.TLS, err = s.tls(); err != nil {
			return nil, err
		}
	}
	c, err := clientv3.New(config)
	if err == nil {
		s.client.Store(c)
	}
	return c, err
}

func (s *Store) tls() (*tls.Config, error) {
	pem, err := os.ReadFile(s.o.CAFile)
	if err != nil {
		return nil, fmt.Errorf("its caFile: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("its caFile %s has no certificate", s.o.CAFile)
	}
	pair := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if err := durable.CheckPrivate(s.o.KeyFile); err != nil {
			return nil, err
		}
		p, err := tls.LoadX509KeyPair(s.o.CertFile, s.o.KeyFile)
		return &p, err
	}
	if _, err := pair(nil); err != nil {
		return nil, fmt.Errorf("its certFile and keyFile: %w", err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, GetClientCertificate: pair}, nil
}

// dial reaches the embedded store.
func (e *embedded) dial(ctx context.Context, _ string) (net.Conn, error) {
	// Through the folder, since the path of a Unix socket may have 107 bytes only.
	dir, err := os.Open(e.dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), socket))
}
