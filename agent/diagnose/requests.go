package diagnose

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/rest"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

var requestsRow = Row{
	Name: "requests", Title: "requests in this node's API server, under way and waiting, by user", Unit: "requests at a time",
	Timeout: 10 * time.Second, Memory: "8192 sums; at most 32 MiB of an answer are read, a line at a time",
	Blind: []string{"requests that are over between two looks, those that were refused, and watches",
		"the API servers of other nodes; the audit log, which has who asked before"},
	look: lookAtRequests,
}

// API is the way to the API server of this node.
type API interface {
	// Config is what a client is made of, with credentials that flow control lets
	// pass at best.
	Config() (*rest.Config, error)
}

// Looks at flow control: their number, how far apart they are, and the bounds of each.
const (
	dumps       = 3
	dumpEvery   = 300 * time.Millisecond
	dumpWithin  = 2 * time.Second
	dumpBytes   = 32 << 20
	dumpLine    = 64 << 10
	dumpPath    = "/debug/api_priority_and_fairness/dump_requests?includeRequestDetails=1"
	dumpColumns = 18
)

// asked is one sum of requests.
type asked struct{ user, verb, resource, level string }

// asking is what the dumps tell.
type asking struct {
	sums      map[asked]float64
	waiting   map[asked]float64
	odd, over int
}

func lookAtRequests(ctx context.Context, s *scene) (*finding, error) {
	if s.d.o.API == nil {
		return nil, fault.New(fault.Failed, "name a kubeconfig with localAPI.kubeconfig in the agent's configuration", "this agent does not ask the API server")
	}
	config, err := s.d.o.API.Config()
	if err != nil {
		return nil, err
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fault.New(fault.Failed, "look at the kubeconfig that halligan status names", "no client of the local API server: %w", err)
	}
	defer client.CloseIdleConnections()
	a := &asking{sums: map[asked]float64{}, waiting: map[asked]float64{}}
	done := 0
	for ; done < dumps; done++ {
		if done > 0 {
			select {
			case <-ctx.Done():
			case <-time.After(dumpEvery):
			}
		}
		if err = dump(ctx, client, config.Host, a); err != nil {
			break
		}
	}
	if done == 0 {
		return nil, err
	}
	return a.finding(float64(done)), nil
}

// dump adds the requests of one moment.
func dump(ctx context.Context, client *http.Client, host string, a *asking) error {
	ctx, cancel := context.WithTimeout(ctx, dumpWithin)
	defer cancel()
	const next = "look by connections and writes"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, host+dumpPath, nil)
	if err != nil {
		return err
	}
	r, err := client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return fault.New(fault.Unreachable, next, "the local API server did not tell of its requests within %v", dumpWithin)
		}
		return fault.New(fault.Unreachable, next, "asking the local API server for its requests: %w", err)
	}
	defer r.Body.Close()
	switch {
	case r.StatusCode == http.StatusNotFound:
		return fault.New(fault.Failed, next, "flow control is off in the local API server, so that it does not know its requests by user")
	case r.StatusCode != http.StatusOK:
		return fault.New(fault.Failed, next, "the local API server does not tell of its requests: status %d", r.StatusCode)
	}
	return a.read(io.LimitReader(r.Body, dumpBytes))
}

// columns are the titles of what is read of a dump (apiserver,
// pkg/util/flowcontrol/apf_controller_debug.go: dumpRequests).
var columns = map[int]string{0: "PriorityLevelName", 2: "QueueIndex", 3: "RequestIndexInQueue", 10: "UserName", 11: "Verb", 12: "APIPath", 16: "Resource", 17: "SubResource"}

// read adds the lines of a dump. Its values are not quoted: a line with more commas
// than columns has one in a name, which its owner chose, and is nobody's.
func (a *asking) read(r io.Reader) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 4096), dumpLine)
	for n := 0; lines.Scan(); n++ {
		cells := strings.Split(lines.Text(), ",")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if n == 0 {
			for i, title := range columns {
				if len(cells) != dumpColumns || cells[i] != title {
					return fault.New(fault.Failed, "look by connections and writes", "this API server tells of its requests in a form that this build does not know")
				}
			}
			continue
		}
		if len(cells) != dumpColumns {
			a.odd++
			continue
		}
		if strings.HasPrefix(cells[12], "/debug/api_priority_and_fairness/") || cells[11] == "watch" {
			continue
		}
		resource := cells[16]
		if cells[17] != "" {
			resource += "/" + cells[17]
		}
		is := asked{strings.Clone(cells[10]), cells[11], cmp.Or(resource, cells[12]), cells[0]}
		if _, known := a.sums[is]; !known && len(a.sums) >= maxPiles {
			a.over++
			continue
		}
		a.sums[is]++
		if cells[2] != "-1" && cells[3] != "-1" { // in a queue, and not picked from it
			a.waiting[is]++
		}
	}
	if err := lines.Err(); err != nil && !errors.Is(err, io.EOF) {
		return fault.New(fault.Failed, "look again", "the local API server's answer broke off: %s", neutral.Line(err.Error()))
	}
	return nil
}

func (a *asking) finding(times float64) *finding {
	f := &finding{}
	if a.odd > 0 {
		f.blind = append(f.blind, fmt.Sprintf("whose %d requests with commas in a name are", a.odd))
	}
	if a.over > 0 {
		f.blind = append(f.blind, fmt.Sprintf("%d requests beyond %d sums", a.over, maxPiles))
	}
	users := map[string]float64{}
	for is, n := range a.sums {
		r := &halliganv1.FindingRow{Subject: is.user, Value: n / times, Detail: is.verb + " " + is.resource + " in level " + is.level}
		if w := a.waiting[is]; w > 0 {
			r.Detail += ", " + percent(w, n) + " of them waiting"
		}
		f.rows = append(f.rows, r)
		f.total += n / times
		users[is.user] += n / times
	}
	slices.SortFunc(f.rows, func(a, b *halliganv1.FindingRow) int {
		return cmp.Or(cmp.Compare(b.Value, a.Value), strings.Compare(a.Subject, b.Subject), strings.Compare(a.Detail, b.Detail))
	})
	for user, n := range users {
		if share := n / f.total; share >= 0.1 && user != "" {
			f.leads = append(f.leads, lead{user: user, weight: 0.9 * share * min(1, n/10),
				evidence: fmt.Sprintf("%.1f requests at a time in the API server, under way or waiting, %s of all", n, percent(n, f.total))})
		}
	}
	return f
}
