package diagnose

import (
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"k8s.io/client-go/rest"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
)

// local is an API server that tells of its requests.
type local struct {
	*httptest.Server
	status int
	body   string
}

func (l *local) Config() (*rest.Config, error) {
	return &rest.Config{Host: l.URL, TLSClientConfig: rest.TLSClientConfig{CAData: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: l.Certificate().Raw})}}, nil
}

const dumpHead = "PriorityLevelName, FlowSchemaName, QueueIndex, RequestIndexInQueue, FlowDistingsher, ArriveTime, InitialSeats, FinalSeats, AdditionalLatency, StartTime, UserName, Verb, APIPath, Namespace, Name, APIVersion, Resource, SubResource\n"

func dumped(level, queue, index, user, verb, path, resource string) string {
	return fmt.Sprintf("%s,      fs, %s, %s, %s, 2026-11-23T00:00:00Z, 1, 0, 0s, 0001-01-01T00:00:00Z, %s, %s, %s, , , v1, %s,\n", level, queue, index, user, user, verb, path, resource)
}

// TestRequests reads dumps, hostile ones too.
func TestRequests(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	l := &local{status: 200}
	l.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/debug/api_priority_and_fairness/dump_requests" || r.URL.Query().Get("includeRequestDetails") == "" {
			t.Errorf("asked for %s", r.URL)
		}
		w.WriteHeader(l.status)
		fmt.Fprint(w, l.body)
	}))
	defer l.Close()
	ask := func() (*halliganv1.Finding, []*halliganv1.Suspect) {
		found, suspects := s.top(&halliganv1.TopRequest{By: []string{"requests"}})
		return found["requests"], suspects
	}
	if f, _ := ask(); !strings.Contains(f.GetError(), "localAPI.kubeconfig") {
		t.Errorf("no API: %v", f)
	}
	s.o.API = l
	const collector = "system:serviceaccount:telemetry:collector"
	l.body = dumpHead + strings.Repeat(dumped("workload-low", "3", "0", collector, "list", "/api/v1/configmaps", "configmaps"), 30) +
		strings.Repeat(dumped("workload-low", "3", "-1", collector, "list", "/api/v1/configmaps", "configmaps"), 10) +
		dumped("exempt", "-1", "-1", "system:admin", "get", "/debug/api_priority_and_fairness/dump_requests", "") +
		dumped("global-default", "-1", "-1", "al\x1b[2Jice", "get", "/api/v1/namespaces/shop", "namespaces") +
		dumped("global-default", "-1", "-1", "alice", "watch", "/api/v1/pods", "pods") +
		dumped("global-default", "-1", "-1", "mallory,x,y", "get", "/api", "") + "short, line\n"
	f, suspects := ask()
	if f.GetError() != "" || f.GetTotal() != 41 || len(f.GetRows()) != 2 ||
		text(f.GetRows()[0]) != "40 "+collector+"|||list configmaps in level workload-low, 75 % of them waiting" {
		t.Fatal(f)
	}
	if !strings.Contains(strings.Join(f.GetBlind(), "\n"), "6 requests with commas") {
		t.Error(f.GetBlind())
	}
	if len(suspects) == 0 || suspects[0].GetUser() != collector || suspects[0].GetScore() < 0.8 || len(suspects[0].GetRemedies()) != 2 {
		t.Error(suspects)
	}
	for _, c := range []struct {
		status     int
		body, want string
	}{
		{404, "", "flow control is off"},
		{403, "", "status 403"},
		{200, "A, B\nx, y\n", "does not know"},
		{200, strings.Replace(dumpHead, "UserName", "Verb", 1), "does not know"},
		{200, dumpHead + strings.Repeat("x", 2*dumpLine), "broke off"},
	} {
		l.status, l.body = c.status, c.body
		if f, suspects := ask(); !strings.Contains(f.GetError(), c.want) || len(suspects) > 0 {
			t.Errorf("%d %.20q: %v", c.status, c.body, f)
		}
	}
	l.Close()
	if f, _ := ask(); f.GetError() == "" {
		t.Error("a server that is gone gives no error")
	}
}
