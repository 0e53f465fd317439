package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/cmd/internal/ca"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/issuer"
)

// BenchmarkDoors measures the network doors of a real agent: the command beside
// stock ssh, logins a second beside mTLS, what an idle shell costs, and a
// responder's login while strangers flood the door.
func BenchmarkDoors(b *testing.B) {
	if _, err := exec.LookPath("ssh"); err != nil {
		b.Fatal(err)
	}
	b.Setenv("HALLIGAN_CONFIG", "/dev/null") // what the person has set up is not measured
	b.Setenv("SSH_AUTH_SOCK", "")
	x := &doorBench{bench: startBench(b)}
	l := x.lab
	x.direct = []string{l.opts.Halligan[0], "--bundle", l.file("bundle"), "--identity", l.file("ids", "responder"), "--direct", "--node", nodeName(0), "whoami"}
	x.stock = []string{"ssh", "-F", l.file("ssh_config"), "-o", "BatchMode=yes", "responder@" + nodeName(0), "whoami"}
	x.equip(b)
	b.Run("ColdStart", x.coldStart)
	b.Run("Handshakes", x.handshakes)
	b.Run("IdleSession", x.idle)
	b.Run("Flood", x.flooded)
}

const (
	doorTries = 100
	// doorPeople with doorEach shells each stay below what a door admits: 64
	// logins, 8 of one person.
	doorPeople, doorEach = 10, 6
	handshakeClients     = 4
	handshakeSpan        = 5 * time.Second
	floodLogins          = 40
)

type doorBench struct {
	*bench
	direct, stock []string // commands that ask cp-1 who they are
	people        []*ssh.ClientConfig
}

// equip makes people, because one cannot have many sessions.
func (x *doorBench) equip(b *testing.B) {
	a, err := ca.Open(x.lab.file("ca"))
	if err != nil {
		b.Fatal(err)
	}
	hosts, err := a.HostAuthority()
	if err != nil {
		b.Fatal(err)
	}
	check := ssh.CertChecker{IsHostAuthority: func(key ssh.PublicKey, _ string) bool { return bytes.Equal(key.Marshal(), hosts.Marshal()) }}
	for i := range doorPeople {
		file := filepath.Join(b.TempDir(), "id")
		holder := issuer.Holder{Person: fmt.Sprint("person", i), Roles: []trust.Role{trust.Responder}, Clusters: []string{clusterName}}
		if err := a.User(file, holder, personLife); err != nil {
			b.Fatal(err)
		}
		key, err := issuer.Load(file, nil)
		if err != nil {
			b.Fatal(err)
		}
		certificate, _, err := issuer.ReadPublic(file + "-cert.pub")
		if err != nil {
			b.Fatal(err)
		}
		signer, err := ssh.NewCertSigner(certificate.(*ssh.Certificate), key.SSH())
		if err != nil {
			b.Fatal(err)
		}
		x.people = append(x.people, &ssh.ClientConfig{User: trust.Responder.String(), Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)},
			HostKeyAlgorithms: []string{ssh.CertAlgoED25519v01}, HostKeyCallback: check.CheckHostKey})
	}
}

// login is one of a person, from TCP to the word that it is let in.
func (x *doorBench) login(ctx context.Context, who *ssh.ClientConfig) (*ssh.Client, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", x.lab.ip(0), sshPort))
	if err != nil {
		return nil, err
	}
	c, channels, requests, err := ssh.NewClientConn(conn, fmt.Sprintf("%s:%d", serverName(0), sshPort), who)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return ssh.NewClient(c, channels, requests), nil
}

// coldStart: two whole processes, each from its start to the same answer of the
// same agent through the same door.
func (x *doorBench) coldStart(b *testing.B) {
	var ours, stock []time.Duration
	for range doorTries {
		ours, stock = append(ours, timed(b, x.direct)), append(stock, timed(b, x.stock))
	}
	slices.Sort(ours)
	slices.Sort(stock)
	at := func(p int) string {
		o, s := ms(percentile(ours, p)), ms(percentile(stock, p))
		return fmt.Sprintf("p%d: halligan --direct %.1f ms, ssh %.1f ms: ratio %.2f", p, o, s, o/s)
	}
	fmt.Printf("\ncold whoami over SSH, %d each in turn, %s; %s; no bar\n", doorTries, at(50), at(99))
	b.ReportMetric(ms(percentile(ours, 50))/ms(percentile(stock, 50)), "ratio")
	b.ReportMetric(0, "ns/op")
}

// handshakes: clients that log in again and again, all on the machine of the
// agent, beside clients that do the same at the door with mTLS.
func (x *doorBench) handshakes(b *testing.B) {
	perSecond := func(login func(client int) error) (rate float64, each time.Duration) {
		var n atomic.Int64
		var all sync.WaitGroup
		cpu, began := x.cpu(b), time.Now()
		for client := range handshakeClients {
			all.Go(func() {
				for time.Since(began) < handshakeSpan {
					if err := login(client); err != nil {
						b.Error(err)
						return
					}
					n.Add(1)
				}
			})
		}
		all.Wait()
		return float64(n.Load()) / time.Since(began).Seconds(), (x.cpu(b) - cpu) / time.Duration(max(n.Load(), 1))
	}
	rate, each := perSecond(func(client int) error {
		c, err := x.login(b.Context(), x.people[client])
		if err != nil {
			return err
		}
		return c.Close()
	})
	config := x.automation(b)
	reference, eachReference := perSecond(func(int) error {
		c, err := tls.Dial("tcp", fmt.Sprintf("%s:%d", x.lab.ip(0), grpcPort), config)
		if err != nil {
			return err
		}
		_, err = c.Read(make([]byte, 1)) // the server speaks once it knows the client
		return errors.Join(err, c.Close())
	})
	if b.Failed() {
		return
	}
	fmt.Printf("\nlogins of %d clients on the agent's machine: SSH %.0f/s, %.2f ms of the agent's CPU each; mTLS %.0f/s, %.2f ms: ratio of the rates %.2f, no bar\n",
		handshakeClients, rate, ms(each), reference, ms(eachReference), rate/reference)
	b.ReportMetric(rate, "logins/s")
	b.ReportMetric(0, "ns/op")
}

// automation is how the lab's program comes to cp-1.
func (x *doorBench) automation(b *testing.B) *tls.Config {
	base := x.lab.file("ids", automation)
	pair, err := tls.LoadX509KeyPair(base+".crt", base+".key")
	if err != nil {
		b.Fatal(err)
	}
	pem, err := os.ReadFile(x.lab.file("ca.crt"))
	if err != nil {
		b.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	return &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots, ServerName: serverName(0), NextProtos: []string{"h2"}}
}

// idle: shells that wait for a line, on terminals, as many as a door lets in.
func (x *doorBench) idle(b *testing.B) {
	const settle = 2 * time.Second
	time.Sleep(settle)
	anonymous, resident := x.memory(b, "RssAnon"), x.memory(b, "VmRSS")
	for i := range doorPeople * doorEach {
		c, err := x.login(b.Context(), x.people[i%doorPeople])
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Close() })
		s, err := c.NewSession()
		if err != nil {
			b.Fatal(err)
		}
		s.Stdin = neverEnding{b.Context()}
		prompt := &waitFor{seen: make(chan struct{})}
		s.Stdout = prompt
		if err := errors.Join(s.RequestPty("xterm", 24, 80, nil), s.Shell()); err != nil {
			b.Fatal(err)
		}
		select {
		case <-prompt.seen:
		case <-time.After(10 * time.Second):
			b.Fatal("no prompt")
		}
	}
	time.Sleep(settle)
	const n = doorPeople * doorEach
	each := func(what string, before float64) float64 { return (x.memory(b, what) - before) * 1024 / n }
	fmt.Printf("\n%d idle shells: %.0f KiB anonymous and %.0f KiB resident in the agent for each, which then has %.1f MiB anonymous, %.1f MiB resident; no bar\n",
		n, each("RssAnon", anonymous), each("VmRSS", resident), x.memory(b, "RssAnon"), x.memory(b, "VmRSS"))
	b.ReportMetric(each("RssAnon", anonymous), "KiB/session")
	b.ReportMetric(0, "ns/op")
}

// neverEnding is a keyboard that nobody touches.
type neverEnding struct{ context.Context }

func (n neverEnding) Read([]byte) (int, error) {
	<-n.Done()
	return 0, n.Err()
}

// waitFor closes seen once anything was written.
type waitFor struct {
	once sync.Once
	seen chan struct{}
}

func (w *waitFor) Write(p []byte) (int, error) {
	w.once.Do(func() { close(w.seen) })
	return len(p), nil
}

// flooded: a responder with stock ssh while strangers, who have more addresses
// than the door lets wait, take what they can get. The time of a login is until
// it is in, however often it was dropped before.
func (x *doorBench) flooded(b *testing.B) {
	logins := func() (took []time.Duration, dropped int) {
		for range floodLogins {
			began := time.Now()
			for {
				out, err := exec.CommandContext(b.Context(), x.stock[0], x.stock[1:]...).CombinedOutput()
				if err == nil {
					break
				}
				if dropped++; dropped > 10*floodLogins {
					b.Fatalf("%d logins of %d failed: %v: %s", dropped, dropped+len(took), err, out)
				}
			}
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		return took, dropped
	}
	calm, dropped := logins()
	if dropped > 0 {
		b.Fatalf("%d logins failed in the calm", dropped)
	}
	for _, f := range []struct{ name, greeting string }{{"silent", ""}, {"greeting", "SSH-2.0-stranger\r\n"}} {
		x.forgetPeak(b)
		stop := x.flood(b, f.greeting)
		time.Sleep(time.Second) // the room is full by then
		during, dropped := logins()
		n, span := stop()
		at := func(p int) string {
			d, c := ms(percentile(during, p)), ms(percentile(calm, p))
			return fmt.Sprintf("p%d %.1f ms, calm %.1f ms: ratio %.2f", p, d, c, d/c)
		}
		fmt.Printf("\nssh whoami while %s strangers open %.0f connections/s: %s; %s; %d logins, %d dropped before; the agent's peak meanwhile %.1f MiB resident; no bar\n",
			f.name, float64(n)/span.Seconds(), at(50), at(99), floodLogins, dropped, x.memory(b, "VmHWM"))
		b.ReportMetric(ms(percentile(during, 50))/ms(percentile(calm, 50)), f.name+"/calm")
	}
	b.ReportMetric(0, "ns/op")
}

// flood opens connections to cp-1's SSH door, some 400 a second, which greet and
// then wait, until the returned function is called, which tells how many there
// were.
func (x *doorBench) flood(b *testing.B, greeting string) (stop func() (int, time.Duration)) {
	const held, sources = 500, 200
	ctx, cancel := context.WithCancel(b.Context())
	var all sync.WaitGroup
	n, began := 0, time.Now()
	all.Go(func() {
		var open []net.Conn
		defer func() {
			for _, c := range open {
				c.Close()
			}
		}()
		tick := time.NewTicker(2500 * time.Microsecond)
		defer tick.Stop()
		for ; ctx.Err() == nil; <-tick.C {
			// All of 127/8 is loopback, so that one machine has many addresses.
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 2, byte(1+n%sources))}, Timeout: time.Second}
			c, err := dialer.DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", x.lab.ip(0), sshPort))
			if err != nil {
				continue
			}
			n++
			_, _ = c.Write([]byte(greeting))
			if open = append(open, c); len(open) > held {
				open[0].Close()
				open = open[1:]
			}
		}
	})
	b.Cleanup(cancel)
	return func() (int, time.Duration) {
		cancel()
		all.Wait()
		return n, time.Since(began)
	}
}
