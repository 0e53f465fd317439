package verb

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
)

// logger is an agent that has logs.
type logger struct {
	halliganv1.AgentClient
	asked *halliganv1.LogsRequest
	lines []*halliganv1.LogLines
	err   error // at the end; nil: the stream lasts until its context ends
}

func (*logger) Close() error { return nil }

func (l *logger) Logs(ctx context.Context, req *halliganv1.LogsRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[halliganv1.LogLines], error) {
	l.asked = req
	return &logged{ctx: ctx, logger: l}, nil
}

type logged struct {
	grpc.ClientStream
	ctx    context.Context
	logger *logger
}

func (l *logged) Recv() (*halliganv1.LogLines, error) {
	if some := l.logger.lines; len(some) > 0 {
		l.logger.lines = some[1:]
		return some[0], nil
	}
	if l.logger.err != nil {
		return nil, api.ToStatus(l.logger.err)
	}
	<-l.ctx.Done()
	return nil, l.ctx.Err()
}

func (l *logger) run(t *testing.T, words string) (status int, out, errs string) {
	t.Helper()
	var stdout, stderr strings.Builder
	status = New(Terminal{In: strings.NewReader(""), Out: &stdout, Err: &stderr, Env: func(string) string { return "" }},
		Options{Connect: func(context.Context) (Agent, error) { return l, nil }}).Run(t.Context(), strings.Fields(words))
	return status, stdout.String(), stderr.String()
}

func TestLogs(t *testing.T) {
	lines := func() []*halliganv1.LogLines {
		return []*halliganv1.LogLines{{Lines: []string{"one", "\x1b[31mtwo\u202e"}, Source: "/var/log/a.log"}, {Lines: []string{"three"}, Source: "/var/log/a.log"}, {Note: "that is all"}}
	}
	l := &logger{lines: lines()}
	status, out, errs := l.run(t, "logs etcd -f --since 90s --grep x --tail 7 --timeout 50ms")
	if status != 0 || out != "one\n\\x1b[31mtwo\\u202e\nthree\n" || errs != "note: from /var/log/a.log\nnote: that is all\n" {
		t.Errorf("%d %q %q", status, out, errs)
	}
	if a := l.asked; a.GetComponent() != "etcd" || !a.GetFollow() || a.GetSinceSeconds() != 90 || a.GetGrep() != "x" || a.GetTail() != 7 {
		t.Errorf("asked for %v", a)
	}
	l = &logger{lines: lines(), err: fault.New(fault.NotFound, "look elsewhere", "no log")}
	status, out, errs = l.run(t, "logs kubelet -o json")
	if status != fault.NotFound.Exit() || !strings.HasPrefix(out, `{"lines":["one","\u001b[31mtwo\u202e"],"source":"/var/log/a.log"}`+"\n") || errs != "halligan: no log: look elsewhere\n" && !strings.Contains(errs, "no log") {
		t.Errorf("%d %q %q", status, out, errs)
	}
	for words, want := range map[string]string{
		"logs":                       "one component",
		"logs etcd kubelet":          "one component",
		"logs etcd --since -5s":      "--since",
		"logs etcd --tail x":         "tail",
		"logs etcd --reason because": "changes nothing",
	} {
		if status, _, errs := (&logger{}).run(t, words); status != fault.Usage.Exit() || !strings.Contains(errs, want) {
			t.Errorf("%s: %d %q", words, status, errs)
		}
	}
	// Without following, a time that runs out is an error.
	if status, _, _ := (&logger{}).run(t, "logs etcd --timeout 20ms"); status == 0 {
		t.Error("no error")
	}
}
