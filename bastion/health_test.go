package bastion

import (
	"fmt"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/issuer"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// TestScrape reads what a bastion tells whoever watches over it, as a scraper
// does, and finds everything there but people.
func TestScrape(t *testing.T) {
	w := newWorld(t, nil).ready()
	ada := w.login(t, "lovelace", nil)
	relayed, err := ada.Dial("tcp", w.ssh.String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ada.Dial("tcp", "198.51.100.7:22"); err == nil {
		t.Fatal("an address that the inventory lacks is relayed to")
	}
	if _, err := ada.Dial("tcp", w.down.String()); err == nil {
		t.Fatal("a node that is down answers")
	}
	long := time.Now().Add(-48 * time.Hour)
	key, cert := w.fleet.Person(testfleet.Holder("mallory", trust.Commander), issuer.Validity{NotBefore: long, NotAfter: long.Add(time.Hour)})
	signer, err := gossh.NewCertSigner(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.dial(signer, nil); err == nil {
		t.Fatal("a certificate that has lapsed lets in")
	}
	at := func(name string) func() bool {
		return func() bool {
			_, body := w.get("/metrics")
			return strings.Contains(body, "\nhalligan_bastion_"+name+"\n")
		}
	}
	for _, line := range []string{
		"relays 1", "relays_total 1", "relays_refused_total 1", "relays_failed_total 1", `connections_total{door="ssh"} 2`, `connections_total{door="grpc"} 0`,
		`events_total{kind="login"} 1`, `events_total{kind="refusal"} 1`, `events_total{kind="relay"} 1`, `events_total{kind="flood"} 0`, `events_total{kind="sealed"} 0`,
		"ready 1", "store_up 1", "audit_up 1", "audit_lost_total 0", "alarms_dropped_total 0", `bundle_version{part="inventory"} 2`, `bundle_version{part="policy"} 1`,
	} {
		eventually(t, line, at(line))
	}
	signed := w.value("bundle_signed_seconds")
	if age := time.Since(time.Unix(int64(signed), 0)); age < 0 || age > time.Hour || w.value("bundle_fresh_until_seconds") <= signed {
		t.Errorf("the bundle's age is %v", age)
	}
	if w.value("relayed_bytes_total{direction=\"down\"}") == 0 {
		buffer := make([]byte, 8) // the node's version
		if _, err := relayed.Read(buffer); err != nil {
			t.Error(err)
		}
		eventually(t, "bytes to be counted", func() bool { return w.value("relayed_bytes_total{direction=\"down\"}") > 0 })
	}
	_, body := w.get("/metrics")
	for _, secret := range []string{"lovelace", "mallory", "SHA256", "198.51.100.7", w.ssh.Addr().String(), "-----BEGIN", "responder"} {
		if strings.Contains(body, secret) {
			t.Errorf("the metrics tell of %q", secret)
		}
	}
	if labels := regexp.MustCompile(`(?m)^halligan_bastion_\w+\{([a-z]+)=`).FindAllStringSubmatch(body, -1); len(labels) == 0 {
		t.Error("no labels")
	} else {
		for _, l := range labels {
			if !strings.Contains(" direction door kind node part version ", " "+l[1]+" ") {
				t.Errorf("the label %s is none of ours", l[1])
			}
		}
	}
	problems, err := promlint.New(strings.NewReader(body)).Lint()
	if err != nil {
		t.Error(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "halligan_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}

	// What else is asked is refused.
	if status, body := w.get("/healthz"); status != http.StatusOK || body != "ok\n" {
		t.Errorf("%d %q", status, body)
	}
	if status, body := w.get("/readyz"); status != http.StatusOK || !strings.HasPrefix(body, "ready\n") {
		t.Errorf("%d %q", status, body)
	}
	if status, _ := w.get("/debug/pprof/"); status != http.StatusNotFound {
		t.Errorf("%d for a profile", status)
	}
	r, err := http.Post("http://"+w.config.Metrics.Listen+"/metrics", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("%d for a POST", r.StatusCode)
	}

	// Whoever opens connections and says nothing does not keep out the scraper for
	// long, nor people at all.
	for range maxScrapers {
		c, err := net.Dial("tcp", w.config.Metrics.Listen)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	w.login(t, "grace", nil)
	eventually(t, "a scrape behind silent connections", func() bool { status, _ := w.get("/metrics"); return status == http.StatusOK })
}

// value returns what a metric has, 0 where there is none.
func (w *world) value(name string) (v float64) {
	_, body := w.get("/metrics")
	for line := range strings.Lines(body) {
		if rest, ok := strings.CutPrefix(line, "halligan_bastion_"+name+" "); ok {
			_, _ = fmt.Sscan(rest, &v)
		}
	}
	return v
}
