package verb

import (
	"context"
	"encoding/json"
	"io"
	"strings"
	"testing"

	"google.golang.org/grpc"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
)

// looked plays what an agent found.
type looked struct {
	grpc.ClientStream
	events []*halliganv1.TopEvent
}

func (l *looked) Recv() (*halliganv1.TopEvent, error) {
	if len(l.events) == 0 {
		return nil, io.EOF
	}
	e := l.events[0]
	l.events = l.events[1:]
	return e, nil
}

func (f *fake) Top(_ context.Context, req *halliganv1.TopRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[halliganv1.TopEvent], error) {
	f.looks = append(f.looks, req)
	return &looked{events: f.found}, nil
}

func TestTop(t *testing.T) {
	s := newStand()
	writes := &halliganv1.Finding{Way: "writes", Title: "writes to etcd", Unit: "writes/s", Total: 12.5, TookMs: 5004, Blind: []string{"reads"}, Sampled: "half",
		Rows: []*halliganv1.FindingRow{{Subject: "pods", Namespace: "shop\x1b[2J", Owner: "Deployment/web", Detail: "written by what calls itself \u202eevil", Value: 3.25}, {Subject: "leases", Value: 1}}}
	for range 10 {
		writes.Rows = append(writes.Rows, &halliganv1.FindingRow{Subject: "small"})
	}
	s.found = []*halliganv1.TopEvent{
		{Finding: &halliganv1.Finding{Way: "requests", Title: "requests", Error: "this agent does not ask the API server"}},
		{Finding: &halliganv1.Finding{Way: "writes", Title: "before the connection broke"}},
		{Finding: writes},
		{Suspects: &halliganv1.Suspects{Final: true, Suspects: []*halliganv1.Suspect{{User: "system:serviceaccount:telemetry:collector", Workload: "DaemonSet/collector\n", Namespace: "telemetry", Score: 0.5,
			Evidence: []string{"20 connections"}, Remedies: []*halliganv1.Remedy{{Command: "halligan revoke system:serviceaccount:telemetry:collector", Effect: strings.Repeat("takes its rights ", 8)}}}}}},
	}
	s.options.Where = func(p *halliganv1.Plan) []string {
		return []string{"--cluster", p.GetClusterName(), "--node", p.GetNode()}
	}
	s.fake.status = &halliganv1.StatusResponse{Node: "cp-1", Cluster: "lab"}
	status, out, errs := s.run(t.Context(), "top", "--by", "writes,requests", "--seconds", "7", "--sample")
	if status != 0 || errs != "" {
		t.Fatalf("%d: %s", status, errs)
	}
	want(t, out, `1. DaemonSet/collector\n, system:serviceaccount:telemetry:collector in telemetry, score 0.50`, "   20 connections\n",
		"     halligan --cluster lab --node cp-1 revoke system:serviceaccount:telemetry:collector\n       takes its rights",
		"WRITES: writes to etcd (12 writes/s, 5004 ms)\n  3.2   pods", `shop\x1b[2J`, `\u202eevil`, "  sampled: half\n", "\nNOT SEEN:\n  reads\n",
		"REQUESTS: requests (0, 0 ms)\n  blind: this agent does not ask the API server\n")
	if strings.Contains(out, "before the connection") || strings.Count(out, "small") != topRows-2 || strings.Contains(out, "\x1b") {
		t.Error(out)
	}
	if r := s.looks[0]; strings.Join(r.GetBy(), " ") != "writes requests" || r.GetSeconds() != 7 || !r.GetSample() {
		t.Errorf("asked %v", r)
	}
	_, out, _ = s.run(t.Context(), "top", "-o", "json")
	var parsed struct {
		Findings []struct {
			Way  string
			Rows []any
		}
		Suspects []struct{ Workload string }
	}
	if err := json.Unmarshal([]byte(out), &parsed); err != nil || len(parsed.Findings) != 2 || len(parsed.Findings[1].Rows) != 12 || parsed.Suspects[0].Workload != "DaemonSet/collector\n" {
		t.Errorf("%v: %s", err, out)
	}
	if status, _, errs := s.run(t.Context(), "top", "-y"); status != 2 || !strings.Contains(errs, "top changes nothing") {
		t.Errorf("%d: %s", status, errs)
	}
	s.found = s.found[:2]
	if status, _, errs := s.run(t.Context(), "top"); status != 1 || !strings.Contains(errs, "ended too early") {
		t.Errorf("%d: %s", status, errs)
	}
	s.found = []*halliganv1.TopEvent{{Suspects: &halliganv1.Suspects{Final: true}}}
	if _, out, _ := s.run(t.Context(), "top"); out != "Nobody stands out.\n" {
		t.Error(out)
	}
}
