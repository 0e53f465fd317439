package sshserver

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/pubkey"
)

// deaf is a connection whose owner can stop reading.
type deaf struct {
	net.Conn
	deaf atomic.Bool
}

func (d *deaf) Read(p []byte) (int, error) {
	if d.deaf.Load() {
		select {} // until the process ends; the server is what is tested
	}
	return d.Conn.Read(p)
}

// TestNew leaves out what a server needs.
func TestNew(t *testing.T) {
	good := func() Options {
		return Options{HostSigners: []gossh.Signer{newSigner(t)},
			Authenticate: func(gossh.PublicKey, string, net.Addr) (trust.Identity, error) { return trust.Identity{}, nil },
			Hold: func(ctx context.Context, _ trust.Identity) (context.Context, context.CancelFunc) {
				return context.WithCancel(ctx)
			}}
	}
	if _, err := New(good()); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Options){
		"no host key":           func(o *Options) { o.HostSigners = nil },
		"two host keys":         func(o *Options) { o.HostSigners = append(o.HostSigners, newSigner(t)) },
		"no authentication":     func(o *Options) { o.Authenticate = nil },
		"no end":                func(o *Options) { o.Hold = nil },
		"a session as channel":  func(o *Options) { o.Handlers.Channels = map[string]func(*Channel){"session": func(*Channel) {}} },
		"a limit below zero":    func(o *Options) { o.Limits.Channels = -1 },
		"a time below zero":     func(o *Options) { o.Limits.Login = -1 },
		"everything reserved":   func(o *Options) { o.Limits.Connections, o.Limits.ReservedConnections = 3, 3 },
		"endless keys accepted": func(o *Options) { o.Limits.AuthTries = -1 },
	} {
		o := good()
		if spoil(&o); true {
			if _, err := New(o); err == nil {
				t.Errorf("%s: taken", name)
			}
		}
	}
}

// TestNobody has Authenticate fail to say who it is.
func TestNobody(t *testing.T) {
	t.Run("a small RSA key", func(t *testing.T) {
		s := serve(t, nil)
		for bits, good := range map[int]bool{2048: false, pubkey.MinRSA: true} {
			key, err := rsa.GenerateKey(rand.Reader, bits)
			if err != nil {
				t.Fatal(err)
			}
			signer, err := gossh.NewSignerFromKey(key)
			if err != nil {
				t.Fatal(err)
			}
			s.enrol(signer.PublicKey(), trust.Identity{Person: "ada", Role: trust.Observer})
			if client, err := s.dial(t, signer); good != (err == nil) {
				t.Errorf("%d bits: %v", bits, err)
			} else if err == nil {
				client.Close()
			}
		}
	})
	for name, authenticate := range map[string]func(gossh.PublicKey, string, net.Addr) (trust.Identity, error){
		"nobody": func(gossh.PublicKey, string, net.Addr) (trust.Identity, error) { return trust.Identity{}, nil },
		"no role": func(gossh.PublicKey, string, net.Addr) (trust.Identity, error) {
			return trust.Identity{Person: "ada"}, nil
		},
		"an error": func(gossh.PublicKey, string, net.Addr) (trust.Identity, error) {
			return trust.Identity{Person: "ada", Role: trust.Commander}, errors.New("no")
		},
		"a panic": func(gossh.PublicKey, string, net.Addr) (trust.Identity, error) { panic("as asked") },
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, func(o *Options) { o.Authenticate = authenticate })
			if _, err := s.dial(t, newSigner(t)); err == nil {
				t.Error("came in")
			}
			if name == "a panic" {
				eventually(t, "the panic is told of", func() bool { return len(s.alarms.of(Panic)) == 1 })
			}
		})
	}
}

// TestOffer has a client offer a key that is not worth a signature.
func TestOffer(t *testing.T) {
	var s *served
	asked := atomic.Int32{}
	s = serve(t, func(o *Options) {
		o.Offer = func(key gossh.PublicKey) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			_, known := s.known[gossh.FingerprintSHA256(key)]
			return known
		}
		authenticate := o.Authenticate
		o.Authenticate = func(key gossh.PublicKey, user string, remote net.Addr) (trust.Identity, error) {
			asked.Add(1)
			return authenticate(key, user, remote)
		}
	})
	ada := s.person(t, "ada", nil)
	if out, err := run(s.mustDial(t, newSigner(t), newSigner(t), ada), "whoami"); out != "ada responder\n" {
		t.Errorf("%q, %v", out, err)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("asked about %d keys", n)
	}
	many := make([]gossh.Signer, 6)
	for i := range many {
		many[i] = newSigner(t)
	}
	if _, err := s.dial(t, append(many, ada)...); err == nil {
		t.Error("the seventh key was looked at")
	}
}

// TestPanics has each handler panic in turn.
func TestPanics(t *testing.T) {
	s := serve(t, func(o *Options) {
		o.Handlers.Subsystems = map[string]func(*Session){"panic": func(*Session) { panic("as asked") }}
		o.Handlers.Channels = map[string]func(*Channel){"panic": func(*Channel) { panic("as asked") }, "late": func(c *Channel) {
			if _, err := c.Accept(); err != nil {
				t.Error(err)
			}
			panic("as asked")
		}}
	})
	ada := s.person(t, "ada", nil)
	client := s.mustDial(t, ada)
	var exit *gossh.ExitError
	if out, err := run(client, "panic"); !errors.As(err, &exit) || exit.ExitStatus() != 1 || !strings.Contains(out, "a fault of the server") {
		t.Errorf("%q, %v", out, err)
	}
	if out, err := run(client, "whoami"); out != "ada responder\n" {
		t.Errorf("the connection did not outlive its session: %q, %v", out, err)
	}
	for _, kind := range []string{"panic", "late"} {
		_, _, _ = s.mustDial(t, ada).OpenChannel(kind, nil)
	}
	session, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := session.RequestSubsystem("panic"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "four panics are told of", func() bool { return len(s.alarms.of(Panic)) == 4 })
	if out, err := run(s.mustDial(t, ada), "whoami"); out != "ada responder\n" {
		t.Errorf("%q, %v", out, err)
	}
}

// TestEnds has a login end for each reason, with a session open.
func TestEnds(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		limits Limits
		end    func(*served)
		told   string
	}{
		{"credential", Limits{}, func(s *served) {
			s.end("ada", fault.New(fault.Unauthenticated, "ask for another", "the certificate was revoked"))
		},
			"halligan: this session ends: the certificate was revoked; ask for another"},
		{"session limit", Limits{Session: time.Second}, nil, "halligan: this session ends: no session lasts longer than 1s; log in again"},
		{"idle", Limits{Idle: time.Second, KeepAlive: 100 * time.Millisecond}, nil, "halligan: this session ends: nothing happened for 1s; log in again"},
		{"shutdown", Limits{}, func(s *served) { s.stop() }, "halligan: this session ends: the daemon is stopping; connect again when it is back"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var cause atomic.Value
			s := serve(t, func(o *Options) {
				o.Limits = c.limits
				o.Handlers.Session = func(s *Session) {
					_, _ = io.WriteString(s, "waiting\n")
					<-s.Context().Done()
					<-s.Held().Done()
					cause.Store(context.Cause(s.Held()))
				}
			})
			client := s.mustDial(t, s.person(t, "ada", nil))
			session, err := client.NewSession()
			if err != nil {
				t.Fatal(err)
			}
			var stdout, stderr syncBuffer
			session.Stdout, session.Stderr = &stdout, &stderr
			if err := session.Start("wait"); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the session runs", func() bool { return stdout.String() == "waiting\n" })
			if c.end != nil {
				c.end(s)
			}
			_ = session.Wait()
			if got := strings.TrimSpace(stderr.String()); got != c.told {
				t.Errorf("told %q", got)
			}
			eventually(t, "the login is over", func() bool { return s.logins.Taken() == 0 })
			var why *fault.Error
			if err, _ := cause.Load().(error); !errors.As(err, &why) {
				t.Errorf("the handler sees %v", err)
			}
			if _, _, err := client.OpenChannel("session", nil); err == nil {
				t.Error("a session after the end")
			}
		})
	}
	t.Run("a busy session is not idle", func(t *testing.T) {
		t.Parallel()
		s := serve(t, func(o *Options) { o.Limits = Limits{Idle: 2 * time.Second, KeepAlive: 200 * time.Millisecond} })
		ch, _, err := s.mustDial(t, s.person(t, "ada", nil)).OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := ch.SendRequest("exec", true, str("cat")); !ok || err != nil {
			t.Fatal(ok, err)
		}
		for range 25 {
			if _, err := ch.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := ch.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
	})
	t.Run("who does not hang up is cut off", func(t *testing.T) {
		t.Parallel()
		s := serve(t, nil)
		conn, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		stubborn := &deaf{Conn: conn}
		client, _, _, err := gossh.NewClientConn(stubborn, s.addr, &gossh.ClientConfig{User: "responder", Auth: []gossh.AuthMethod{gossh.PublicKeys(s.person(t, "ada", nil))}, HostKeyCallback: gossh.FixedHostKey(s.host.PublicKey())})
		if err != nil {
			t.Fatal(err)
		}
		ch, _, err := client.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := ch.SendRequest("exec", true, str("cat")); !ok || err != nil {
			t.Fatal(ok, err)
		}
		stubborn.deaf.Store(true)
		s.end("ada", fault.New(fault.Unauthenticated, "", "revoked"))
		eventually(t, "the login is over", func() bool { return s.logins.Taken() == 0 })
	})
	takesNothing := func(t *testing.T, write time.Duration, end func(*served)) {
		t.Parallel()
		var sent atomic.Int64
		s := serve(t, func(o *Options) {
			o.Limits.Write = write
			o.Handlers.Session = func(s *Session) {
				for chunk := make([]byte, 32<<10); ; {
					n, err := s.Write(chunk)
					if sent.Add(int64(n)); err != nil {
						return
					}
				}
			}
		})
		conn, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.(*net.TCPConn).SetReadBuffer(64 << 10); err != nil {
			t.Fatal(err)
		}
		stubborn := &deaf{Conn: conn}
		client, _, _, err := gossh.NewClientConn(stubborn, s.addr, &gossh.ClientConfig{User: "responder", Auth: []gossh.AuthMethod{gossh.PublicKeys(s.person(t, "ada", nil))}, HostKeyCallback: gossh.FixedHostKey(s.host.PublicKey())})
		if err != nil {
			t.Fatal(err)
		}
		var channels []gossh.Channel
		for range 8 { // the windows of all together are larger than what the kernel holds
			ch, _, err := client.OpenChannel("session", nil)
			if err != nil {
				t.Fatal(err)
			}
			channels = append(channels, ch)
		}
		stubborn.deaf.Store(true)
		for _, ch := range channels {
			if _, err := ch.SendRequest("exec", false, str("flood")); err != nil {
				t.Fatal(err)
			}
		}
		last := int64(0)
		eventually(t, "the network takes nothing any more", func() bool {
			time.Sleep(200 * time.Millisecond)
			before := last
			last = sent.Load()
			return last > 0 && last == before
		})
		end(s)
		eventually(t, "the login is over", func() bool { return s.logins.Taken() == 0 })
	}
	t.Run("who takes nothing any more is cut off at the end", func(t *testing.T) {
		takesNothing(t, time.Hour, func(s *served) { s.end("ada", fault.New(fault.Unauthenticated, "", "revoked")) })
	})
	t.Run("who takes nothing any more is cut off in time", func(t *testing.T) {
		takesNothing(t, time.Second, func(*served) {})
	})
	t.Run("held longer than the connection", func(t *testing.T) {
		t.Parallel()
		began, finish, ended := make(chan struct{}), make(chan struct{}), make(chan error, 2)
		s := serve(t, func(o *Options) {
			o.Handlers.Session = func(s *Session) {
				close(began)
				<-s.Context().Done()
				ended <- s.Held().Err()
				<-finish // an apply goes on
				ended <- s.Held().Err()
			}
		})
		client := s.mustDial(t, s.person(t, "ada", nil))
		session, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if err := session.Start("x"); err != nil {
			t.Fatal(err)
		}
		<-began
		client.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if n := s.logins.Taken(); n != 1 {
			t.Errorf("%d logins are counted while a handler runs", n)
		}
		close(finish)
		if err := <-ended; err != nil {
			t.Error(err)
		}
		eventually(t, "the login is over", func() bool { return s.logins.Taken() == 0 })
	})
}

// TestChannels opens a channel of a type that there is a handler for.
func TestChannels(t *testing.T) {
	s := serve(t, func(o *Options) {
		o.Handlers.Channels = map[string]func(*Channel){
			"upper": func(c *Channel) {
				st, err := c.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := c.Accept(); err == nil {
					t.Error("accepted twice")
				}
				_, _ = io.WriteString(st, c.Identity().Person+" "+string(c.Data())+" ")
				in, _ := io.ReadAll(st)
				_, _ = io.WriteString(st, strings.ToUpper(string(in)))
				_ = st.CloseWrite()
			},
			"refused": func(c *Channel) { _ = c.Refuse("for a reason") },
			"ignored": func(*Channel) {},
		}
	})
	client := s.mustDial(t, s.person(t, "ada", nil))
	ch, requests, err := client.OpenChannel("upper", []byte("data"))
	if err != nil {
		t.Fatal(err)
	}
	go gossh.DiscardRequests(requests)
	if ok, err := ch.SendRequest("exec", true, str("whoami")); ok || err != nil {
		t.Error("a request inside was granted", err)
	}
	_, _ = io.WriteString(ch, "shout")
	_ = ch.CloseWrite()
	if out, err := io.ReadAll(ch); string(out) != "ada data SHOUT" || err != nil {
		t.Errorf("%q, %v", out, err)
	}
	for kind, why := range map[string]string{"refused": "for a reason", "ignored": "not opened"} {
		var refused *gossh.OpenChannelError
		if _, _, err := client.OpenChannel(kind, nil); !errors.As(err, &refused) || refused.Message != why {
			t.Errorf("%s: %v", kind, err)
		}
	}
	eventually(t, "the channels are given back", func() bool { return s.channels.Taken() == 0 })
}
