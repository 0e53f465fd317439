package localapi

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	flowcontrolv1 "k8s.io/api/flowcontrol/v1"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

const (
	// cheap is a read of one small object that every cluster has, through
	// authentication, flow control, authorization and etcd.
	cheap = "/api/v1/namespaces/default"
	// exempt is the only priority level that lets everything pass at once (kubernetes
	// pkg/apis/flowcontrol/validation/validation.go: no other may be of that type).
	exempt = "/prioritylevelconfigurations/exempt"
	// asksAgain is how often the UID of that level is asked for, where it does not fit.
	asksAgain = time.Minute
	// maxAnswer is how much of an answer is read, in bytes.
	maxAnswer = 64 << 10
	// besides is what to do without the API server.
	besides = "actions go through etcd and do not need it"
)

// flowAPIs are where it was over the releases, the newest first.
var flowAPIs = []string{"/apis/flowcontrol.apiserver.k8s.io/v1", "/apis/flowcontrol.apiserver.k8s.io/v1beta3", "/apis/flowcontrol.apiserver.k8s.io/v1beta2"}

// How far a request came.
const (
	connecting = iota
	shaking    // the connection stands
	waiting    // so does TLS: the answer is missing
)

type answer struct {
	code   int
	header http.Header
	body   []byte
	took   time.Duration
}

// ask probes once. Each request has the time.
func (c *credentials) ask(ctx context.Context, within time.Duration) (s State) {
	a, err := c.get(ctx, cheap, within)
	if err != nil {
		s.Err = err
		return s
	}
	s.Answered, s.Latency = true, a.took
	level := a.header.Get(flowcontrolv1.ResponseHeaderMatchedPriorityLevelConfigurationUID)
	switch {
	case level != "":
		s.FlowControl, s.Exempt = "on", c.passes(ctx, level, within)
	case a.code != http.StatusUnauthorized && a.code != http.StatusTooManyRequests: // which come before it, or instead
		s.FlowControl, s.Exempt = "off", c.masters
	}
	switch {
	case a.code == http.StatusUnauthorized:
		s.Err = fault.New(fault.Unauthenticated, "have the file renewed", "it does not accept the credentials in %s", c.file)
		return s
	case a.code == http.StatusTooManyRequests:
		s.Err = fault.New(fault.Failed, besides, "it turns requests away (429 Too Many Requests)")
	case a.code >= 300 && a.code != http.StatusForbidden && a.code != http.StatusNotFound:
		s.Err = fault.New(fault.Failed, besides, "it answers a small read with %d %s", a.code, http.StatusText(a.code))
	}
	a, err = c.get(ctx, "/readyz", within)
	switch {
	case err != nil:
		s.Err = err
	case a.code == http.StatusOK:
		s.Ready = true
	case s.Err == nil:
		s.Err = fault.New(fault.Failed, "see its log", "it is not ready%s", failing(a.body))
	}
	return s
}

// failing names the checks that /readyz tells of.
func failing(body []byte) string {
	var names []string
	for line := range bytes.Lines(body) {
		if rest, ok := bytes.CutPrefix(line, []byte("[-]")); ok {
			name, _, _ := bytes.Cut(rest, []byte(" "))
			names = append(names, string(name))
		}
	}
	if len(names) == 0 {
		return ""
	}
	return ": " + neutral.LineMax(strings.Join(names, ", "), 200)
}

// passes says whether the priority level is the exempt one.
func (c *credentials) passes(ctx context.Context, level string, within time.Duration) bool {
	if level == c.exemptUID {
		return true
	}
	if time.Since(c.asked) < asksAgain {
		return false
	}
	for _, api := range flowAPIs {
		a, err := c.get(ctx, api+exempt, within)
		if err != nil {
			return false
		}
		c.asked = time.Now()
		if a.code == http.StatusNotFound {
			continue
		}
		// Whoever may not read it is nobody whom it lets pass: system:masters may.
		var object struct {
			Metadata struct{ UID string }
		}
		if a.code == http.StatusOK && json.Unmarshal(a.body, &object) == nil {
			c.exemptUID = object.Metadata.UID
		}
		break
	}
	return level == c.exemptUID
}

// get asks within the time, once more on a new connection where the one that was kept
// turns out to be dead.
func (c *credentials) get(ctx context.Context, path string, within time.Duration) (*answer, error) {
	a, reused, err := c.try(ctx, path, within)
	if err != nil && reused && ctx.Err() == nil {
		c.transport.CloseIdleConnections()
		a, _, err = c.try(ctx, path, within)
	}
	return a, err
}

func (c *credentials) try(ctx context.Context, path string, within time.Duration) (_ *answer, reused bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var stage atomic.Int32 // dialling goes on in a goroutine of its own
	var kept atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) { stage.Store(waiting); kept.Store(i.Reused) },
		ConnectDone: func(_, _ string, err error) {
			if err == nil {
				stage.Store(shaking)
			}
		},
	})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.config.Host+path, nil)
	if err != nil {
		return nil, false, err
	}
	req.Header.Set("Accept", "application/json")
	begun := time.Now()
	r, err := c.client.Do(req)
	if err != nil {
		return nil, kept.Load(), c.explain(err, stage.Load(), within)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(io.LimitReader(r.Body, maxAnswer))
	if err != nil {
		return nil, kept.Load(), c.explain(err, waiting, within)
	}
	return &answer{r.StatusCode, r.Header, body, time.Since(begun)}, kept.Load(), nil
}

// explain says for people why there is no answer.
func (c *credentials) explain(err error, stage int32, within time.Duration) error {
	address := strings.TrimPrefix(c.config.Host, "https://")
	fail := func(format string, args ...any) error { return fault.New(fault.Unreachable, besides, format, args...) }
	var (
		timeout net.Error
		invalid *tls.CertificateVerificationError
		name    x509.HostnameError
		alert   *net.OpError // as crypto/tls has what the other side complains of
	)
	switch {
	case errors.As(err, &name):
		return fault.New(fault.Unauthenticated, "set localAPI.serverName", "the certificate of %s is not for %s", address, c.config.ServerName)
	case errors.As(err, &invalid):
		return fault.New(fault.Unauthenticated, "see whose kubeconfig "+c.file+" is", "the certificate of %s is not signed by whom %s trusts, or has ended: %w", address, c.file, invalid.Err)
	case errors.As(err, &alert) && alert.Op == "remote error":
		return fault.New(fault.Unauthenticated, "have the file renewed", "%s refuses the client certificate in %s: %w", address, c.file, alert.Err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fail("nothing listens at %s", address)
	case errors.As(err, &timeout) && timeout.Timeout() || errors.Is(err, context.DeadlineExceeded):
		return fail("%s %s, within %v", address, [...]string{
			connecting: "does not take connections", shaking: "takes connections and never answers: no TLS handshake", waiting: "takes requests and never answers them",
		}[stage], within)
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET):
		return fail("%s closes connections without an answer", address)
	}
	return fail("asking %s: %w", address, err)
}
