package bastion

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"

	"github.com/halligan-io/halligan/audit/mirror"
	"github.com/halligan-io/halligan/internal/admission"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/version"
)

// maxScrapers bounds the connections of those who watch.
const maxScrapers = 32

// serveHealth serves metrics and health until the context ends. Labels hold
// nothing that a client has chosen, and nobody's name.
func (b *bastion) serveHealth(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(b.metrics(), promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	// Alive: somebody answers. Restarting helps against nothing else.
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "ok") })
	// Ready: people can come in, though something may be degraded.
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		state, code := "ready", http.StatusOK
		if !b.doors.ready() {
			state, code = "not ready", http.StatusServiceUnavailable
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(code)
		lines := []string{state}
		for _, warning := range b.degraded() {
			lines = append(lines, neutral.LineMax(warning, 512))
		}
		_, _ = fmt.Fprintln(w, strings.Join(lines, "\n")) // who is gone need not know
	})
	l = netutil.LimitListener(l, maxScrapers)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// metrics are gathered when somebody asks.
func (b *bastion) metrics() *prometheus.Registry {
	registry := prometheus.NewRegistry()
	name := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "halligan", Subsystem: "bastion", Name: name, Help: help}
	}
	gauge := func(n, help string, value func() float64) {
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts(name(n, help)), value))
	}
	counter := func(n, help string, labels prometheus.Labels, value func() uint64) {
		o := prometheus.CounterOpts(name(n, help))
		o.ConstLabels = labels
		registry.MustRegister(prometheus.NewCounterFunc(o, func() float64 { return float64(value()) }))
	}
	yes := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	relay := b.relay
	gauge("relays", "Connections that are relayed now.", func() float64 { return float64(relay.Stats().Open) })
	gauge("tunnels", "Tunnels of nodes that are open.", func() float64 { return float64(len(b.tunnels.Since())) })
	counter("relays_total", "Connections that were relayed.", nil, func() uint64 { return uint64(relay.Stats().Begun) })
	counter("relays_refused_total", "Connections that were asked for and are not relayed.", nil, func() uint64 { return uint64(relay.Stats().Refused) })
	counter("relays_failed_total", "Connections to nodes that could not be reached.", nil, func() uint64 { return uint64(relay.Stats().Failed) })
	counter("relayed_bytes_total", "Bytes that were relayed.", prometheus.Labels{"direction": "up"}, func() uint64 { return uint64(relay.Stats().BytesUp) })
	counter("relayed_bytes_total", "Bytes that were relayed.", prometheus.Labels{"direction": "down"}, func() uint64 { return uint64(relay.Stats().BytesDown) })
	counter("alarms_dropped_total", "Alarms that a sink did not get.", nil, b.alarms.Dropped)
	gauge("ready", "Whether people can come in.", func() float64 { return yes(b.doors.ready()) })
	for _, door := range []string{"ssh", "grpc", "tunnel"} {
		counter("connections_total", "Connections that came, whoever they were.", prometheus.Labels{"door": door}, func() uint64 { return b.doors.Came(door) })
	}
	for _, kind := range []alarm.Kind{alarm.Login, alarm.Refusal, alarm.Relay, alarm.Sealed, alarm.Late, alarm.Bundle, alarm.Closed, alarm.Audit, mirror.Alarm, admission.Flood, sshserver.Panic} {
		counter("events_total", "What happened, as alarms tell it.", prometheus.Labels{"kind": string(kind)}, func() uint64 { return b.alarms.Raised(kind) })
	}
	gauge("store_up", "Whether the store that bastions share answers.", func() float64 { return yes(b.store.Works()) })
	state := b.evidence.State
	counter("audit_events_total", "Events in the bastion's own evidence log.", nil, func() uint64 { return state().Events })
	counter("audit_signed_total", "Those that a signed checkpoint covers.", nil, func() uint64 { return state().Signed })
	counter("audit_witnessed_total", "Those that another bastion has countersigned.", nil, func() uint64 { return b.evidence.Countersigned() })
	counter("audit_lost_total", "Events that nobody waited for and that had no room.", nil, func() uint64 { return state().Lost })
	gauge("audit_bytes", "What the evidence log takes on disk.", func() float64 { return float64(state().Bytes) })
	gauge("audit_reserve", "Events that still fit when the disk takes nothing.", func() float64 { return float64(state().Reserve) })
	gauge("audit_up", "Whether events can be recorded.", func() float64 { return yes(state().Refused == "") })
	gauge("warnings", "How many things are degraded; the readiness page names them.", func() float64 { return float64(len(b.degraded())) })
	gauge("bundle_signed_seconds", "When the newest part of the bundle in force was signed, in Unix time; 0: there is none.", func() float64 {
		if s := b.trusted.Status(); s != nil {
			return float64(s.GetSigned().GetSeconds())
		}
		return 0
	})
	gauge("bundle_fresh_until_seconds", "When the bundle in force becomes stale, in Unix time; 0: there is none.", func() float64 {
		if s := b.trusted.Status(); s != nil {
			return float64(s.GetFreshUntil().GetSeconds())
		}
		return 0
	})
	for part, get := range map[string]func() uint64{
		"policy":      func() uint64 { return b.trusted.Status().GetPolicyVersion() },
		"inventory":   func() uint64 { return b.trusted.Status().GetInventoryVersion() },
		"revocations": func() uint64 { return b.trusted.Status().GetRevocationsVersion() },
	} {
		o := prometheus.GaugeOpts(name("bundle_version", "Versions of the bundle's parts in force; 0: there is none."))
		o.ConstLabels = prometheus.Labels{"part": part}
		registry.MustRegister(prometheus.NewGaugeFunc(o, func() float64 { return float64(get()) }))
	}
	o := prometheus.GaugeOpts(name("build_info", "Always 1."))
	o.ConstLabels = prometheus.Labels{"version": version.String()}
	registry.MustRegister(prometheus.NewGaugeFunc(o, func() float64 { return 1 }))
	registry.MustRegister(&b.copies)
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return registry
}
