package localapi

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// certificates returns a client's, which no server here verifies.
func certificates(t *testing.T, name, group string, ends time.Time) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name, Organization: []string{group}}, NotBefore: ends.Add(-time.Hour), NotAfter: ends}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

// kubeconfig returns a file's contents. Its server is a name that nobody resolves.
func kubeconfig(t *testing.T, ca []byte, change func(*clientcmdapi.Config)) []byte {
	t.Helper()
	c := clientcmdapi.NewConfig()
	c.Clusters["c"] = &clientcmdapi.Cluster{Server: "https://api.invalid:6443", CertificateAuthorityData: ca}
	c.AuthInfos["u"] = &clientcmdapi.AuthInfo{Token: "t"}
	c.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	c.CurrentContext = "x"
	change(c)
	data, err := clientcmd.Write(*c)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// server plays an API server.
type server struct {
	*httptest.Server
	mu      sync.Mutex                                          // guards what follows
	answers map[string]func(http.ResponseWriter, *http.Request) // by path, before the usual ones
	seen    string                                              // the client of the last request
	first   string                                              // address of the first connection
	served  atomic.Int32
}

func newServer(t *testing.T, answers map[string]func(http.ResponseWriter, *http.Request)) *server {
	t.Helper()
	return newServerAt(t, "127.0.0.1:0", answers)
}

func newServerAt(t *testing.T, address string, answers map[string]func(http.ResponseWriter, *http.Request)) *server {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{answers: answers}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.served.Add(1)
		s.mu.Lock()
		if s.seen = ""; len(r.TLS.PeerCertificates) > 0 {
			s.seen = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		if s.first == "" {
			s.first = r.RemoteAddr
		}
		answer := s.answers[r.URL.Path]
		s.mu.Unlock()
		if answer != nil {
			answer(w, r)
			return
		}
		w.Header().Set("X-Kubernetes-PF-PriorityLevel-UID", "level-exempt")
		switch r.URL.Path {
		case flowAPIs[0] + exempt:
			fmt.Fprint(w, `{"metadata":{"name":"exempt","uid":"level-exempt"}}`)
		case cheap:
			fmt.Fprint(w, `{"kind":"Namespace"}`)
		case "/readyz":
			fmt.Fprint(w, "ok")
		default:
			http.NotFound(w, r)
		}
	}))
	s.Listener.Close()
	s.Listener = listener
	s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func (s *server) ca() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

func (s *server) address() string { return s.Listener.Addr().String() }

func (s *server) client() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen
}

// admin returns the kubeconfig of one whose certificate says so much.
func (s *server) admin(t *testing.T, name, group string, ends time.Time) []byte {
	cert, key := certificates(t, name, group, ends)
	return kubeconfig(t, s.ca(), func(c *clientcmdapi.Config) {
		c.AuthInfos["u"].ClientCertificateData, c.AuthInfos["u"].ClientKeyData = cert, key
	})
}

func put(t *testing.T, file string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// open returns an endpoint for the server, whose certificate is for example.com.
func open(t *testing.T, address string, files ...string) (*Endpoint, *strings.Builder) {
	t.Helper()
	var said strings.Builder
	e := Open(Options{Kubeconfigs: files, Address: address, ServerName: "example.com", Log: zerolog.New(&said), within: 5 * time.Second})
	t.Cleanup(func() { e.creds.close() })
	return e, &said
}

const year = 365 * 24 * time.Hour

func code(n int, header ...string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(n)
		fmt.Fprint(w, "[+]ping ok\n[-]etcd failed: reason withheld\n[-]poststarthook/x failed: reason withheld\nreadyz check failed\n")
	}
}

func TestProbe(t *testing.T) {
	const level = "X-Kubernetes-PF-PriorityLevel-UID"
	type answers = map[string]func(http.ResponseWriter, *http.Request)
	for name, c := range map[string]struct {
		group   string
		ends    time.Duration
		answers answers
		want    string // of the state
		warns   []string
	}{
		"exempt":                     {masters, year, nil, "answered ready on exempt", nil},
		"older API":                  {masters, year, answers{flowAPIs[0] + exempt: code(404), flowAPIs[1] + exempt: func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"metadata":{"uid":"level-exempt"}}`) }}, "answered ready on exempt", nil},
		"not exempt":                 {"admins", year, answers{cheap: code(200, level, "level-global")}, "answered ready on", []string{"not exempt from flow control"}},
		"forbidden":                  {"people", year, answers{cheap: code(403, level, "level-global"), flowAPIs[0] + exempt: code(403)}, "answered ready on", []string{"not exempt"}},
		"no flow control":            {masters, year, answers{cheap: code(200)}, "answered ready off exempt", nil},
		"no flow control, anybody":   {"people", year, answers{cheap: code(200)}, "answered ready off", []string{"not exempt"}},
		"not ready":                  {masters, year, answers{"/readyz": code(500)}, "answered on exempt", []string{"it is not ready: etcd, poststarthook/x"}},
		"unknown":                    {masters, year, answers{cheap: code(401)}, "answered", []string{"does not accept the credentials in "}},
		"ended":                      {masters, -time.Minute, answers{cheap: code(401)}, "answered", []string{"does not accept", "ended, at "}},
		"ends soon":                  {masters, 50 * time.Hour, nil, "answered ready on exempt", []string{"end in 50h0m0s, at "}},
		"too many":                   {masters, year, answers{cheap: code(429)}, "answered ready", []string{"turns requests away"}},
		"broken":                     {masters, year, answers{cheap: code(503, level, "level-exempt")}, "answered ready on exempt", []string{"503 Service Unavailable"}},
		"redirected to another host": {masters, year, answers{cheap: code(302, "Location", "https://api.invalid/")}, "answered ready off exempt", []string{"302 Found"}},
		"closed at once":             {masters, year, answers{cheap: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }}, "", []string{"closes connections without an answer; actions go through etcd"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t, c.answers)
			e, _ := open(t, s.address(), put(t, filepath.Join(t.TempDir(), "admin.conf"), s.admin(t, "boss", c.group, time.Now().Add(c.ends))))
			e.probe(t.Context())
			if got := words(e.State()); got != c.want {
				t.Errorf("%q, want %q: %v", got, c.want, e.State().Err)
			}
			warnings := e.Warnings()
			if len(warnings) != len(c.warns) {
				t.Errorf("warns %q", warnings)
			}
			for i, w := range c.warns {
				if i < len(warnings) && !strings.Contains(warnings[i], w) {
					t.Errorf("%q, want %q", warnings[i], w)
				}
			}
			if st := e.Status(); st.Probed == nil || st.CredentialExpires == nil || st.Endpoint != s.address() || !strings.HasSuffix(st.Kubeconfig, "admin.conf") {
				t.Errorf("%v", st)
			}
		})
	}
}

// words are what a state says, for a table.
func words(s State) string {
	var all []string
	for word, is := range map[string]bool{"1answered": s.Answered && s.Latency > 0, "2ready": s.Ready, "3" + s.FlowControl: s.FlowControl != "", "4exempt": s.Exempt} {
		if is {
			all = append(all, word)
		}
	}
	for i := range all {
		for j := range i {
			if all[i] < all[j] {
				all[i], all[j] = all[j], all[i]
			}
		}
	}
	for i := range all {
		all[i] = all[i][1:]
	}
	return strings.Join(all, " ")
}

// TestSilent: what takes connections or requests and says nothing is told apart, and
// bounded.
func TestSilent(t *testing.T) {
	t.Parallel()
	quiet, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	released := make(chan struct{})
	s := newServer(t, map[string]func(http.ResponseWriter, *http.Request){cheap: func(http.ResponseWriter, *http.Request) { <-released }})
	defer close(released)
	admin := put(t, filepath.Join(t.TempDir(), "admin.conf"), s.admin(t, "boss", masters, time.Now().Add(year)))
	for name, c := range map[string]struct {
		within        time.Duration
		probes        int
		address, want string
	}{
		"connection": {300 * time.Millisecond, 2, quiet.Addr().String(), "takes connections and never answers: no TLS handshake, within 300ms"},
		"request":    {time.Second, 1, s.address(), "takes requests and never answers them, within 1s"},
		"nobody":     {time.Second, 2, nobody.Addr().String(), "nothing listens at " + nobody.Addr().String()},
	} {
		e, log := open(t, c.address, admin)
		e.o.within = c.within
		for range c.probes {
			e.probe(t.Context())
		}
		if got := e.Status(); !strings.Contains(got.Error, c.want) || got.Ready || got.LatencyMs != 0 || len(e.Warnings()) != 1 {
			t.Errorf("%s: %v; %q", name, got, e.Warnings())
		}
		if strings.Count(log.String(), c.want) != 1 {
			t.Errorf("%s: the log: %s", name, log)
		}
		if _, err := e.Config(); err != nil {
			t.Errorf("%s: whoever wants to try gets nothing: %v", name, err)
		}
	}
}

// TestHalfOpen: a connection that was fine and is dead costs one time limit, not the
// probe.
func TestHalfOpen(t *testing.T) {
	t.Parallel()
	var s *server
	var dead atomic.Bool
	released := make(chan struct{})
	s = newServer(t, map[string]func(http.ResponseWriter, *http.Request){cheap: func(w http.ResponseWriter, r *http.Request) {
		if dead.Load() && r.RemoteAddr == s.first {
			<-released
			return
		}
		w.Header().Set("X-Kubernetes-PF-PriorityLevel-UID", "level-exempt")
	}})
	defer close(released)
	e, _ := open(t, s.address(), put(t, filepath.Join(t.TempDir(), "admin.conf"), s.admin(t, "boss", masters, time.Now().Add(year))))
	e.probe(t.Context())
	e.probe(t.Context())
	if got := words(e.State()); got != "answered ready on exempt" || s.served.Load() != 5 { // the level is asked for once
		t.Fatalf("%s after %d requests: %v", got, s.served.Load(), e.State().Err)
	}
	dead.Store(true)
	e.o.within = 2 * time.Second
	e.probe(t.Context())
	if got := words(e.State()); got != "answered ready on exempt" {
		t.Errorf("%s: %v", got, e.State().Err)
	}
}

// TestCredentials: files come, change, break, end and go while the agent runs.
func TestCredentials(t *testing.T) {
	t.Parallel()
	s := newServer(t, nil)
	dir := t.TempDir()
	super, admin := filepath.Join(dir, "super-admin.conf"), filepath.Join(dir, "admin.conf")
	e, log := open(t, s.address(), super, admin)
	if st := e.Status(); st.Probed != nil || st.Error != "" {
		t.Errorf("before the first probe: %v", st)
	}
	if _, err := e.Config(); err == nil {
		t.Error("a configuration of nothing")
	}
	now := func(file, client, warns string) {
		t.Helper()
		s.mu.Lock()
		s.seen = ""
		s.mu.Unlock()
		e.probe(t.Context())
		if e.State().Kubeconfig != file || s.client() != client {
			t.Errorf("%s as %q, want %s as %q: %v", e.State().Kubeconfig, s.client(), file, client, e.State().Err)
		}
		if w := strings.Join(e.Warnings(), "\n"); (warns == "") != (w == "") || !strings.Contains(w, warns) {
			t.Errorf("warns %q, want %q", w, warns)
		}
	}
	in := func(d time.Duration) time.Time { return time.Now().Add(d) }
	now("", "", "there is no administrator's kubeconfig: looked for "+super+", "+admin+"; name one of system:masters with localAPI.kubeconfig")
	put(t, super, []byte("kind: Config\n"))
	now("", "", super+": invalid configuration")
	put(t, admin, s.admin(t, "admin", "kubeadm:cluster-admins", in(year)))
	now(admin, "admin", "")
	put(t, super, s.admin(t, "super", masters, in(year)))
	now(super, "super", "")
	put(t, super, s.admin(t, "renewed-and-longer", masters, in(year)))
	now(super, "renewed-and-longer", "")
	put(t, super, []byte("{half"))
	now(super, "renewed-and-longer", "")
	if !strings.Contains(log.String(), "what was read before stays in use") {
		t.Errorf("the log: %s", log)
	}
	put(t, super, s.admin(t, "over", masters, in(-time.Hour)))
	now(admin, "admin", "")
	if err := os.Remove(admin); err != nil {
		t.Fatal(err)
	}
	now(super, "over", "ended, at ")
	if err := os.Remove(super); err != nil {
		t.Fatal(err)
	}
	now("", "", "there is no administrator's kubeconfig")
	if _, err := e.Config(); err == nil {
		t.Error("files that are gone are used")
	}

	// Credentials in files of their own, named from the kubeconfig's folder.
	cert, key := certificates(t, "apart", masters, in(year))
	put(t, filepath.Join(dir, "c.crt"), cert)
	put(t, filepath.Join(dir, "c.key"), key)
	put(t, super, kubeconfig(t, s.ca(), func(c *clientcmdapi.Config) {
		c.AuthInfos["u"].ClientCertificate, c.AuthInfos["u"].ClientKey = "c.crt", "c.key"
	}))
	now(super, "apart", "")
	cert, key = certificates(t, "apart-and-renewed", masters, in(year))
	put(t, filepath.Join(dir, "c.crt"), cert)
	put(t, filepath.Join(dir, "c.key"), key)
	now(super, "apart-and-renewed", "")

	config, err := e.Config()
	if err != nil || config.Host != "https://"+s.address() || config.ServerName != "example.com" || config.Insecure {
		t.Errorf("%v, %v", config, err)
	}
}

// TestRefused: what a kubeconfig may not make the agent do.
func TestRefused(t *testing.T) {
	s := newServer(t, nil)
	ran := filepath.Join(t.TempDir(), "ran")
	for name, c := range map[string]struct {
		ca     []byte
		change func(*clientcmdapi.Config)
		server string
		want   string
	}{
		"a program": {s.ca(), func(c *clientcmdapi.Config) {
			c.AuthInfos["u"].Exec = &clientcmdapi.ExecConfig{Command: "touch", Args: []string{ran}, APIVersion: "client.authentication.k8s.io/v1", InteractiveMode: clientcmdapi.NeverExecInteractiveMode}
		}, "example.com", "come from a plugin"},
		"any server": {nil, func(c *clientcmdapi.Config) { c.Clusters["c"].InsecureSkipTLSVerify = true }, "example.com", "is not signed by whom"},
		"a name":     {s.ca(), func(*clientcmdapi.Config) {}, "", "is not for kubernetes; set localAPI.serverName"},
		"no user":    {s.ca(), func(c *clientcmdapi.Config) { delete(c.AuthInfos, "u") }, "example.com", "it names no credentials"},
		"a proxy, another server and a path": {s.ca(), func(c *clientcmdapi.Config) {
			c.Clusters["c"].ProxyURL, c.Clusters["c"].Server = "http://proxy.invalid", "https://api.invalid/path"
		}, "example.com", ""},
	} {
		e, _ := open(t, s.address(), put(t, filepath.Join(t.TempDir(), "f"), kubeconfig(t, c.ca, c.change)))
		e.o.ServerName = c.server
		e.probe(t.Context())
		if got := e.Status(); !strings.Contains(got.Error, c.want) || (c.want == "") != got.Ready {
			t.Errorf("%s: %v", name, got)
		}
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("it was run")
	}
}

// TestRun: it asks at once, and ends with the context; nothing is asked of a nil one.
func TestRun(t *testing.T) {
	s := newServerAt(t, "[::1]:0", nil)
	e, log := open(t, s.address(), put(t, filepath.Join(t.TempDir(), "admin.conf"), s.admin(t, "boss", masters, time.Now().Add(year))))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { e.Run(ctx); close(ended) }()
	for range 500 {
		if e.State().Ready {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	<-ended
	if !e.State().Ready || !strings.Contains(log.String(), "local API server answers") {
		t.Errorf("%v; %s", e.State(), log)
	}
	var none *Endpoint
	none.Run(t.Context())
	if _, err := none.Config(); err == nil || none.Status() != nil || none.Warnings() != nil || none.State().Answered {
		t.Error("there is none")
	}
}
