package sshserver

import (
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/admission"
	"github.com/halligan-io/halligan/internal/trust/pubkey"
)

// flood keeps opening connections without a login until stop is called, some
// hundred a second, from so many addresses, and holds on to them.
func flood(t testing.TB, addr string, sources int, greeting string) (stop func() (connections int64)) {
	t.Helper()
	var n atomic.Int64
	done := make(chan struct{})
	var wg sync.WaitGroup
	for worker := range 2 {
		wg.Go(func() {
			var open []net.Conn
			defer func() {
				for _, c := range open {
					c.Close()
				}
			}()
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for i := worker; ; i += 2 {
				select {
				case <-done:
					return
				case <-tick.C:
				}
				// All of 127/8 is loopback: so many sources does one machine have.
				dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i%sources))}, Timeout: patience}
				c, err := dialer.Dial("tcp", addr)
				if err != nil {
					continue // reset while connecting: dropped already
				}
				n.Add(1)
				_, _ = c.Write([]byte(greeting))
				if open = append(open, c); len(open) > 300 { // held as long as files last
					open[0].Close()
					open = open[1:]
				}
			}
		})
	}
	return sync.OnceValue(func() int64 {
		close(done)
		wg.Wait()
		return n.Load()
	})
}

// TestFlood has a responder log in, with a key that wants a touch, while others
// take all the connections that they can get.
func TestFlood(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name     string
		sources  int
		greeting string
		relay    bool // the responder comes through a bastion
	}{
		{name: "of one address, silent", sources: 1},
		{name: "of many addresses, silent", sources: 200},
		{name: "of many addresses, greeting", sources: 200, greeting: "SSH-2.0-flood\r\n"},
		{name: "of many addresses, beside a bastion", sources: 200, greeting: "SSH-2.0-flood\r\n", relay: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, func(o *Options) {
				o.Limits = Limits{Unauthenticated: 32, UnauthenticatedEach: 6, Relayed: 8}
				o.Relay = func(a netip.Addr) bool { return c.relay && a == netip.MustParseAddr("127.0.0.1") }
			})
			signer := s.person(t, "ada", nil)
			stop := flood(t, s.addr, c.sources, c.greeting)
			full := min(32, 6*c.sources)
			eventually(t, "the room is full", func() bool { return s.waiting.Count() >= full })
			refused := 0
			for range 5 {
				began := time.Now()
				client, err := gossh.Dial("tcp", s.addr, &gossh.ClientConfig{User: "responder", Auth: []gossh.AuthMethod{gossh.PublicKeys(slow{signer})},
					HostKeyCallback: gossh.FixedHostKey(s.host.PublicKey()), Timeout: patience})
				if err != nil {
					refused++
					continue
				}
				if out, err := run(client, "whoami"); out != "ada responder\n" {
					t.Errorf("%q, %v", out, err)
				}
				client.Close()
				t.Logf("in after %v, of which 200 ms for a touch", time.Since(began))
			}
			if refused > 1 { // one that is dropped before its first bytes are read tries again
				t.Errorf("%d of 5 logins failed", refused)
			}
			if most := s.waiting.Count(); most > 32+8 {
				t.Errorf("%d connections without a login", most)
			}
			t.Logf("%d connections flooded", stop())
			if len(s.alarms.of(admission.Flood)) == 0 {
				t.Error("nobody was told")
			}
		})
	}
}

// slow is a key that wants to be touched.
type slow struct{ gossh.Signer }

func (s slow) PublicKey() gossh.PublicKey { return s.Signer.PublicKey() }

func (s slow) SignWithAlgorithm(_ io.Reader, data []byte, algorithm string) (*gossh.Signature, error) {
	time.Sleep(200 * time.Millisecond)
	return s.Signer.(gossh.AlgorithmSigner).SignWithAlgorithm(rand.Reader, data, algorithm)
}

// TestShutdown ends a server with everything open, and looks for what is left.
func TestShutdown(t *testing.T) {
	before := runtime.NumGoroutine()
	var clients []*gossh.Client
	var silent []net.Conn
	s := serve(t, nil)
	for i := range 4 {
		client := s.mustDial(t, s.person(t, fmt.Sprint("person ", i), nil))
		clients = append(clients, client)
		for range 3 {
			ch, _, err := client.OpenChannel("session", nil)
			if err != nil {
				t.Fatal(err)
			}
			if ok, err := ch.SendRequest("exec", true, str("wait")); !ok || err != nil {
				t.Fatal(ok, err)
			}
		}
		conn, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		silent = append(silent, conn)
	}
	eventually(t, "all is open", func() bool { return s.waiting.Count() == len(silent) && s.channels.Taken() == 12 })
	s.stop()
	for i := range silent {
		silent[i].Close()
		clients[i].Close()
	}
	eventually(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before })
	if _, err := net.Dial("tcp", s.addr); err == nil {
		t.Error("it still listens")
	}
}

// TestAudit has ssh-audit look at what is negotiated.
func TestAudit(t *testing.T) {
	s := serve(t, nil)
	host, port, err := net.SplitHostPort(s.addr)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tool(t, "ssh-audit"), "--no-colors", "--batch", "--timeout=10", "--port="+port, host)
	out, _ := cmd.CombinedOutput() // its status tells of the unknown lines too
	if !strings.Contains(string(out), "(kex) curve25519-sha256") || !strings.Contains(string(out), "(enc) aes128-gcm@openssh.com") {
		t.Fatalf("nothing was audited:\n%s", out)
	}
	for line := range strings.Lines(string(out)) {
		switch {
		case !strings.Contains(line, "[warn]") && !strings.Contains(line, "[fail]"):
		case strings.Contains(line, "unknown algorithm") && (strings.Contains(line, "mlkem768x25519-sha256") || strings.Contains(line, "kex-strict-s-v00@openssh.com")):
			// Debian 12's ssh-audit is older than both, which are the post-quantum
			// exchange and the mark of the measure against Terrapin.
		default:
			t.Errorf("weak: %s", line)
		}
	}
}

// TestAlgorithms has clients that know only what is weak.
func TestAlgorithms(t *testing.T) {
	s := serve(t, nil)
	signer := s.person(t, "ada", nil)
	dial := func(c gossh.Config) error {
		client, err := gossh.Dial("tcp", s.addr, &gossh.ClientConfig{Config: c, User: "responder", Auth: []gossh.AuthMethod{gossh.PublicKeys(signer)}, HostKeyCallback: gossh.FixedHostKey(s.host.PublicKey()), Timeout: patience})
		if err == nil {
			client.Close()
		}
		return err
	}
	for _, kex := range keyExchanges {
		if err := dial(gossh.Config{KeyExchanges: []string{kex}}); err != nil {
			t.Errorf("%s: %v", kex, err)
		}
	}
	all, weak := gossh.SupportedAlgorithms(), gossh.InsecureAlgorithms()
	for _, kex := range append(all.KeyExchanges, weak.KeyExchanges...) {
		if kex != keyExchanges[0] && kex != keyExchanges[1] && dial(gossh.Config{KeyExchanges: []string{kex}}) == nil {
			t.Errorf("%s was taken", kex)
		}
	}
	for _, cipher := range append(all.Ciphers, weak.Ciphers...) {
		if good := strings.Contains(cipher, "gcm"); good != (dial(gossh.Config{Ciphers: []string{cipher}}) == nil) {
			t.Errorf("%s: taken where it should not be, or not where it should", cipher)
		}
	}
	for _, key := range pubkey.Algorithms() {
		if slices.Contains(weak.PublicKeyAuths, key) {
			t.Errorf("%s is taken", key)
		}
	}
}

// FuzzRequest holds the parsers of channel requests to what x/crypto's makes of
// the same bytes.
func FuzzRequest(f *testing.F) {
	f.Add(ptyRequest("xterm", 80, 24, "\x00"))
	f.Add([]byte{0xff, 0xff, 0xff, 0xfc, 'x', 'x', 'x', 'x'})
	f.Add(append(str("HALLIGAN_REASON"), str("the API is down")...))
	f.Fuzz(func(t *testing.T, in []byte) {
		var asked struct {
			Term       string
			W, H, X, Y uint32
			Modes      string
		}
		whole := gossh.Unmarshal(in, &asked) == nil
		p, ok := parsePty(in)
		if ok && (!whole || p.Term != asked.Term) || p.Window.Columns < 0 || p.Window.Columns > maxSide || p.Window.Rows > maxSide {
			t.Errorf("%+v of %+v", p, asked)
		}
		if whole && !ok && len(asked.Term) <= maxTerm && len(asked.Modes) <= maxModes && strings.Trim(asked.Term, termLetters) == "" {
			t.Errorf("refused %+v", asked)
		}
		var pair struct{ Name, Value string }
		whole = gossh.Unmarshal(in, &pair) == nil
		if name, value, ok := parseEnv(in, 4<<10); ok && (!whole || name != pair.Name || value != pair.Value || strings.ContainsAny(value, "\n\r\x00\x1b")) {
			t.Errorf("%q=%q of %+v", name, value, pair)
		}
		var one struct{ S string }
		whole = gossh.Unmarshal(in, &one) == nil
		if s, ok := onlyString(in); ok != whole || ok && s != one.S {
			t.Errorf("%q, %v of %+v", s, ok, one)
		}
	})
}

// BenchmarkHandshake logs in again and again.
func BenchmarkHandshake(b *testing.B) {
	s := serve(b, nil)
	signer := s.person(b, "ada", nil)
	for b.Loop() {
		client, err := s.dial(b, signer)
		for ; err != nil && strings.Contains(err.Error(), "unable to authenticate"); client, err = s.dial(b, signer) {
			time.Sleep(time.Millisecond) // the ones before are just ending
		}
		if err != nil {
			b.Fatal(err)
		}
		client.Close()
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "handshakes/s") // of both sides, in one process
}

// BenchmarkIdle holds sessions that do nothing.
func BenchmarkIdle(b *testing.B) {
	const sessions = 100
	memory := func() float64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapInuse + m.StackInuse)
	}
	sum := 0.0
	for b.Loop() {
		s := serve(b, func(o *Options) {
			o.Limits = Limits{Connections: sessions + 1, Channels: sessions + 1, ReservedConnections: 1, ReservedChannels: 1}
		})
		var signers []gossh.Signer
		for i := range sessions {
			signers = append(signers, s.person(b, fmt.Sprint("person ", i), nil))
		}
		before := memory()
		var clients []*gossh.Client
		for _, signer := range signers {
			client := s.mustDial(b, signer)
			clients = append(clients, client)
			ch, _, err := client.OpenChannel("session", nil)
			if err != nil {
				b.Fatal(err)
			}
			if ok, err := ch.SendRequest("exec", true, str("wait")); !ok || err != nil {
				b.Fatal(ok, err)
			}
		}
		sum += memory() - before
		for _, client := range clients {
			client.Close()
		}
		s.stop()
	}
	b.ReportMetric(sum/float64(b.N)/sessions/1024, "KiB/session") // of both sides, in one process
}

// BenchmarkLoginInFlood compares a login during a flood with a calm one.
func BenchmarkLoginInFlood(b *testing.B) {
	s := serve(b, nil)
	signer := s.person(b, "ada", nil)
	const logins = 20
	mean := func() time.Duration {
		began := time.Now()
		for n := 0; n < logins; {
			if client, err := s.dial(b, signer); err == nil { // who is dropped tries again
				client.Close()
				n++
			}
		}
		return time.Since(began) / logins
	}
	var calm, flooded time.Duration
	for b.Loop() {
		calm += mean()
		stop := flood(b, s.addr, 200, "SSH-2.0-flood\r\n")
		eventually(b, "the room is full", func() bool { return s.waiting.Count() >= 90 })
		flooded += mean()
		stop()
	}
	b.ReportMetric(float64(flooded)/float64(calm), "×calm")
	b.ReportMetric(float64(calm.Microseconds())/1000/float64(b.N), "calm-ms")
	b.ReportMetric(float64(flooded.Microseconds())/1000/float64(b.N), "flooded-ms")
}
