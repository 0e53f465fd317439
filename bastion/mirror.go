package bastion

import (
	"context"
	"crypto/ed25519"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit/mirror"
	"github.com/halligan-io/halligan/audit/record"
	"github.com/halligan-io/halligan/bastion/witness"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// copies are those of others' logs, once they are opened.
type copies struct {
	folder string
	opened atomic.Pointer[mirror.Mirrors]

	mu      sync.Mutex        // guards outside
	outside map[string]string // why a witness of somebody else does not sign, by its URL
}

// witness copies and countersigns the logs of all nodes and other bastions until the
// context ends. What shows the other side who asks is the certificate of gRPC.
func (b *bastion) witness(ctx context.Context) error {
	key, err := mirror.Key(filepath.Join(record.Folder(b.config.StateDir), "witness-key"))
	if err != nil {
		return err
	}
	mirrors, err := mirror.Open(mirror.Options{Dir: b.copies.folder, Server: b.config.origin(), Key: key, Bundle: b.trusted.Current, Now: b.trusted.clock.Now,
		Quota: b.config.Mirror.MaxBytes, Raise: b.evidence.Raise, Log: b.log})
	if err != nil {
		return err
	}
	b.copies.opened.Store(mirrors)
	b.doors.countersigns(key.Public().(ed25519.PublicKey))
	b.doors.Opened("mirrors")
	var beside sync.WaitGroup
	defer beside.Wait()
	beside.Go(func() { mirrors.Expire(ctx) })
	for _, to := range b.config.Mirror.Witnesses {
		beside.Go(func() {
			b.doors.Keep(ctx, "witness "+to.URL, func() error {
				return mirrors.Submit(ctx, b.evidence, to, func(problem string) { b.copies.told(to.URL, problem) })
			})
		})
	}
	witness.Run(ctx, witness.Options{Origin: b.config.origin(), Bundles: b.trusted.Store(), Connect: b.reach, Servers: b.trusted.Servers(), Certificate: b.doors.shows,
		Mirrors: mirrors, Identity: b.evidence.Identity, Held: b.evidence, Log: b.log})
	return nil
}

// reach connects to the gRPC door of a node, as people are relayed there, or of
// another bastion.
func (b *bastion) reach(ctx context.Context, to bundle.Host) (net.Conn, error) {
	if to.Cluster != bundle.BastionDomain {
		return b.relay.Reach(ctx, to, trust.GRPC)
	}
	at, _ := to.GRPC()
	return (&net.Dialer{}).DialContext(ctx, "tcp", at.String())
}

// told notes why a witness of somebody else does not sign, empty: it does.
func (c *copies) told(by, problem string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.outside == nil {
		c.outside = map[string]string{}
	}
	c.outside[by] = problem
}

// problem says what is wrong with the copy of a log, "" for nothing.
func (c *copies) problem(origin string) string {
	if m := c.opened.Load(); m != nil {
		return m.Problem(origin)
	}
	return ""
}

func (c *copies) list() []mirror.Status {
	if m := c.opened.Load(); m != nil {
		return m.Status()
	}
	return nil
}

// lag is how long ago a copy was known to be complete, in seconds, -1 for never.
func lag(s mirror.Status) float64 {
	if s.Lag < 0 {
		return -1
	}
	return s.Lag.Seconds()
}

// status tells of all copies, those that cannot be reached included.
func (c *copies) status() (all []*halliganv1.MirrorStatus) {
	for _, s := range c.list() {
		m := &halliganv1.MirrorStatus{Origin: s.Origin, Events: s.Events, LagSeconds: lag(s), Problem: strings.Join(slices.DeleteFunc([]string{s.Problem, s.Trouble}, func(why string) bool { return why == "" }), "; ")}
		all = append(all, m)
	}
	return all
}

// warnings tells which logs are not what they should be, each in one line.
func (c *copies) warnings() (all []string) {
	for _, s := range c.list() {
		if s.Problem != "" {
			all = append(all, "the copy of the log of "+s.Origin+": "+s.Problem)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, by := range slices.Sorted(maps.Keys(c.outside)) {
		if why := c.outside[by]; why != "" {
			all = append(all, why)
		}
	}
	return all
}

// The metrics of copies, by the server whose log it is.
var (
	mirrorLag     = prometheus.NewDesc("halligan_bastion_mirror_lag_seconds", "How long ago the copy of a log was last known to be complete; -1: it never was.", []string{"node"}, nil)
	mirrorEvents  = prometheus.NewDesc("halligan_bastion_mirror_events", "Events in the copy of a log.", []string{"node"}, nil)
	mirrorProblem = prometheus.NewDesc("halligan_bastion_mirror_problem", "Whether something is wrong with a log, such as a fork.", []string{"node"}, nil)
)

// Describe is for prometheus.
func (c *copies) Describe(to chan<- *prometheus.Desc) {
	to <- mirrorLag
	to <- mirrorEvents
	to <- mirrorProblem
}

// Collect is for prometheus.
func (c *copies) Collect(to chan<- prometheus.Metric) {
	for _, s := range c.list() {
		problem := 0.
		if s.Problem != "" {
			problem = 1
		}
		to <- prometheus.MustNewConstMetric(mirrorLag, prometheus.GaugeValue, lag(s), s.Origin)
		to <- prometheus.MustNewConstMetric(mirrorEvents, prometheus.GaugeValue, float64(s.Events), s.Origin)
		to <- prometheus.MustNewConstMetric(mirrorProblem, prometheus.GaugeValue, problem, s.Origin)
	}
}
