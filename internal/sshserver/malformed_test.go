package sshserver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/admission"
	"github.com/halligan-io/halligan/internal/trust"
)

func str(s string) []byte { return gossh.Marshal(struct{ S string }{s}) }

// TestRequests sends channel requests of every kind, right and wrong, and after
// each wrong one lets the same session run a command.
func TestRequests(t *testing.T) {
	t.Parallel()
	s := serve(t, func(o *Options) { o.Limits.Command, o.Limits.Requests = 1<<10, 1000 })
	signer := s.person(t, "ada", nil)
	endless := []byte{0xff, 0xff, 0xff, 0xff}
	wraps := []byte{0xff, 0xff, 0xff, 0xfc, 'x', 'x', 'x', 'x'} // 4 + length is 0 in 32 bits
	type request struct {
		kind    string
		payload []byte
	}
	terminal := request{"pty-req", ptyRequest("xterm", 80, 24, "\x00")}
	for _, c := range []struct {
		name  string
		first []request // granted
		request
		granted bool
	}{
		{"pty", nil, terminal, true},
		{"pty without a size", nil, request{"pty-req", ptyRequest("", 0, 0, "")}, true},
		{"pty of an enormous size", nil, request{"pty-req", ptyRequest("xterm", 1<<32-1, 1<<31, "")}, true},
		{"pty twice", []request{terminal}, terminal, false},
		{"pty of nothing", nil, request{"pty-req", nil}, false},
		{"pty with an endless name", nil, request{"pty-req", endless}, false},
		{"pty with a name that wraps around", nil, request{"pty-req", wraps}, false},
		{"pty with a short size", nil, request{"pty-req", ptyRequest("xterm", 80, 24, "")[:17]}, false},
		{"pty without modes", nil, request{"pty-req", ptyRequest("xterm", 80, 24, "")[:25]}, false},
		{"pty with endless modes", nil, request{"pty-req", append(ptyRequest("xterm", 80, 24, "")[:25], endless...)}, false},
		{"pty with more modes than there are", nil, request{"pty-req", ptyRequest("xterm", 80, 24, strings.Repeat("x", maxModes+1))}, false},
		{"pty and more", nil, request{"pty-req", append(ptyRequest("xterm", 80, 24, ""), 0)}, false},
		{"pty with a long name", nil, request{"pty-req", ptyRequest(strings.Repeat("x", maxTerm+1), 80, 24, "")}, false},
		{"pty with an escape in its name", nil, request{"pty-req", ptyRequest("x\x1b[2J", 80, 24, "")}, false},
		{"pty with a path for a name", nil, request{"pty-req", ptyRequest("../../etc/passwd", 80, 24, "")}, false},
		{"window", []request{terminal}, request{"window-change", make([]byte, 16)}, true},
		{"window without a pty", nil, request{"window-change", make([]byte, 16)}, false},
		{"window cut short", []request{terminal}, request{"window-change", make([]byte, 15)}, false},
		{"window of nothing", []request{terminal}, request{"window-change", nil}, false},
		{"window and more", []request{terminal}, request{"window-change", make([]byte, 17)}, false},
		{"env", nil, request{"env", slices.Concat(str("LANG"), str("C"))}, true},
		{"env unknown", nil, request{"env", slices.Concat(str("LD_PRELOAD"), str("x"))}, false},
		{"env of two names", nil, request{"env", slices.Concat(str("LANG TERM"), str("x"))}, false},
		{"env without a name", nil, request{"env", slices.Concat(str(""), str("x"))}, false},
		{"env without a value", nil, request{"env", str("LANG")}, false},
		{"env with an endless name", nil, request{"env", endless}, false},
		{"env with an endless value", nil, request{"env", append(str("LANG"), endless...)}, false},
		{"env and more", nil, request{"env", slices.Concat(str("LANG"), str("C"), []byte{0})}, false},
		{"env too long", nil, request{"env", slices.Concat(str("LANG"), str(strings.Repeat("x", 4<<10+1)))}, false},
		{"env with a line feed", nil, request{"env", slices.Concat(str("HALLIGAN_REASON"), str("x\ny"))}, false},
		{"env not UTF-8", nil, request{"env", slices.Concat(str("HALLIGAN_REASON"), str("\xff"))}, false},
		{"exec of nothing", nil, request{"exec", nil}, false},
		{"exec of no word", nil, request{"exec", str("")}, false},
		{"exec endless", nil, request{"exec", endless}, false},
		{"exec that wraps around", nil, request{"exec", wraps}, false},
		{"exec and more", nil, request{"exec", append(str("whoami"), 0)}, false},
		{"exec too long", nil, request{"exec", str(strings.Repeat("x", 1<<10+1))}, false},
		{"exec much too long", nil, request{"exec", str(strings.Repeat("x", 200<<10))}, false},
		{"shell and more", nil, request{"shell", []byte{0}}, false},
		{"subsystem unknown", nil, request{"subsystem", str("sftp")}, false},
		{"subsystem of nothing", nil, request{"subsystem", nil}, false},
		{"subsystem default", nil, request{"subsystem", str("default")}, false},
		{"subsystem and more", nil, request{"subsystem", append(str("echo"), 0)}, false},
		{"agent", nil, request{"auth-agent-req@openssh.com", nil}, false},
		{"x11", nil, request{"x11-req", gossh.Marshal(struct {
			Single         bool
			Protocol, Data string
			Screen         uint32
		}{false, "MIT-MAGIC-COOKIE-1", "00", 0})}, false},
		{"signal", nil, request{"signal", str("KILL")}, false},
		{"break", nil, request{"break", make([]byte, 4)}, false},
		{"exit-status", nil, request{"exit-status", make([]byte, 4)}, false},
		{"unknown", nil, request{"rm -rf\x1b[2J", endless}, false},
		{"no type", nil, request{"", nil}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			client, err := s.dial(t, signer)
			for end := time.Now().Add(patience); err != nil && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
				client, err = s.dial(t, signer) // as many have a login at a time as one may have
			}
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			ch, requests, err := client.OpenChannel("session", nil)
			if err != nil {
				t.Fatal(err)
			}
			go gossh.DiscardRequests(requests)
			for _, req := range c.first {
				if ok, err := ch.SendRequest(req.kind, true, req.payload); !ok || err != nil {
					t.Fatal(req.kind, ok, err)
				}
			}
			if ok, err := ch.SendRequest(c.kind, true, c.payload); ok != c.granted || err != nil {
				t.Fatalf("granted: %v, want %v; %v", ok, c.granted, err)
			}
			if _, err := ch.SendRequest(c.kind, false, c.payload); err != nil { // a second time, without an answer
				t.Fatal(err)
			}
			if ok, err := ch.SendRequest("exec", true, str("whoami")); !ok || err != nil {
				t.Fatal("exec", ok, err)
			}
			if out, err := io.ReadAll(ch); strings.TrimSpace(string(out)) != "ada responder" || err != nil {
				t.Errorf("%q, %v", out, err)
			}
		})
	}
}

// TestStartedOnce starts a second program in a session.
func TestStartedOnce(t *testing.T) {
	s := serve(t, nil)
	ch, _, err := s.mustDial(t, s.person(t, "ada", nil)).OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := ch.SendRequest("exec", true, str("cat")); !ok || err != nil {
		t.Fatal(ok, err)
	}
	for kind, payload := range map[string][]byte{"exec": str("whoami"), "shell": nil, "subsystem": str("echo"), "env": slices.Concat(str("LANG"), str("C")), "pty-req": ptyRequest("xterm", 80, 24, "")} {
		if ok, err := ch.SendRequest(kind, true, payload); ok || err != nil {
			t.Errorf("%s was granted to a session that runs already; %v", kind, err)
		}
	}
}

// TestPayloads sends packets that no client in order makes.
func TestPayloads(t *testing.T) {
	t.Parallel()
	s := serve(t, func(o *Options) { o.Limits.KeyExchange = 3 * time.Second })
	signer := s.person(t, "ada", nil)
	alive := func(t *testing.T) {
		t.Helper()
		if out, err := run(s.mustDial(t, signer), "whoami"); out != "ada responder\n" {
			t.Errorf("afterwards: %q, %v", out, err)
		}
	}
	t.Run("exec of 1 MiB", func(t *testing.T) {
		// Past what SSH packets may be: the connection ends, nothing else.
		ch, _, err := s.mustDial(t, signer).OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := ch.SendRequest("exec", true, str(strings.Repeat("x", 1<<20))); ok || err == nil {
			t.Errorf("%v, %v", ok, err)
		}
		alive(t)
	})
	t.Run("channels", func(t *testing.T) {
		client := s.mustDial(t, signer)
		forward := gossh.Marshal(struct {
			Host string
			Port uint32
			From string
			At   uint32
		}{"127.0.0.1", 22, "127.0.0.1", 1})
		for kind, data := range map[string][]byte{"direct-tcpip": forward, "forwarded-tcpip": forward, "direct-streamlocal@openssh.com": str("/etc/passwd"), "tun@openssh.com": make([]byte, 8),
			"x11": forward, "auth-agent@openssh.com": nil, "default": nil, "": nil, "\x1b[2J": {0xff, 0xff, 0xff, 0xff}} {
			var refused *gossh.OpenChannelError
			if _, _, err := client.OpenChannel(kind, data); !errors.As(err, &refused) || refused.Reason != gossh.Prohibited {
				t.Errorf("%q: %v", kind, err)
			}
		}
		for kind, data := range map[string][]byte{"tcpip-forward": gossh.Marshal(struct {
			Host string
			Port uint32
		}{"", 0}), "cancel-tcpip-forward": nil, "streamlocal-forward@openssh.com": str("/tmp/x"), "hostkeys-prove-00@openssh.com": {0xff, 0xff, 0xff, 0xff}, "keepalive@openssh.com": nil, "": nil} {
			if ok, _, err := client.SendRequest(kind, true, data); ok || err != nil {
				t.Errorf("%q: granted %v, %v", kind, ok, err)
			}
		}
		if out, err := run(client, "whoami"); out != "ada responder\n" {
			t.Errorf("%q, %v", out, err)
		}
	})
	for name, bytes := range map[string][]byte{
		"before the login: not SSH":               []byte("GET / HTTP/1.1\r\n\r\n"),
		"before the login: an endless greeting":   []byte(strings.Repeat("x", 1<<20)),
		"before the login: many greetings":        []byte(strings.Repeat("hello\r\n", 1<<17)),
		"before the login: an endless packet":     append([]byte("SSH-2.0-x\r\n"), 0xff, 0xff, 0xff, 0xff, 0, 0),
		"before the login: a packet of 1 MiB":     append(binary.BigEndian.AppendUint32([]byte("SSH-2.0-x\r\n"), 1<<20), make([]byte, 1<<20)...),
		"before the login: a packet of nothing":   append([]byte("SSH-2.0-x\r\n"), make([]byte, 64)...),
		"before the login: packets to be ignored": append([]byte("SSH-2.0-x\r\n"), []byte(strings.Repeat(string(ignored), 1<<16))...),
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", s.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetWriteDeadline(time.Now().Add(patience))
			_, _ = conn.Write(bytes) // the server may hang up before it has all
			if !closed(conn, patience) {
				t.Error("still open")
			}
			alive(t)
		})
	}
}

// ignored is a packet before the key exchange: SSH_MSG_IGNORE, RFC 4253 section
// 11.2, of no data.
var ignored = []byte{0, 0, 0, 12, 6, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

// TestFloodOfRequests has somebody with a login ask for too much.
func TestFloodOfRequests(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		flood func(*gossh.Client) error
	}{
		{"global requests", func(client *gossh.Client) error {
			_, _, err := client.SendRequest("x", false, make([]byte, 1<<10))
			return err
		}},
		{"global requests with answers", func(client *gossh.Client) error {
			_, _, err := client.SendRequest("x", true, nil)
			return err
		}},
		{"channels", func(client *gossh.Client) error {
			_, _, err := client.OpenChannel("direct-tcpip", nil)
			if refused := (*gossh.OpenChannelError)(nil); errors.As(err, &refused) {
				return nil
			}
			return err
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, nil)
			signer := s.person(t, "ada", nil)
			client := s.mustDial(t, signer)
			var err error
			n := 0
			for end := time.Now().Add(patience); err == nil && time.Now().Before(end); n++ {
				err = c.flood(client)
			}
			if err == nil {
				t.Fatalf("%d were taken", n)
			}
			eventually(t, "the flood is told of", func() bool { return len(s.alarms.of(admission.Flood)) == 1 })
			if e := s.alarms.of(admission.Flood)[0]; e.Person != "ada" {
				t.Errorf("told of %+v", e)
			}
			if out, err := run(s.mustDial(t, signer), "whoami"); out != "ada responder\n" {
				t.Errorf("afterwards: %q, %v", out, err)
			}
		})
	}
	t.Run("in a session it waits", func(t *testing.T) {
		t.Parallel()
		s := serve(t, func(o *Options) { o.Limits.Requests = 200 })
		ch, _, err := s.mustDial(t, s.person(t, "ada", nil)).OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := ch.SendRequest("pty-req", true, ptyRequest("xterm", 80, 24, "")); !ok || err != nil {
			t.Fatal(ok, err)
		}
		for i := range 1000 { // a window torn about
			if _, err := ch.SendRequest("window-change", false, gossh.Marshal(struct{ W, H, X, Y uint32 }{uint32(i), 24, 0, 0})); err != nil {
				t.Fatal(err)
			}
		}
		if ok, err := ch.SendRequest("exec", true, str("whoami")); !ok || err != nil {
			t.Fatal(ok, err)
		}
		if out, _ := io.ReadAll(ch); string(out) != "ada responder\r\n" {
			t.Errorf("%q", out)
		}
	})
}

// TestDeadlines has the network take nothing, and the library set deadlines.
func TestDeadlines(t *testing.T) {
	s := serve(t, func(o *Options) { o.Limits.Write = 50 * time.Millisecond })
	near, far := net.Pipe() // takes a byte only when the other side reads one
	defer near.Close()
	defer far.Close()
	c := newConn(s.Server, t.Context(), near)
	c.loggedIn.Store(true)
	for _, set := range []func(time.Time) error{c.SetDeadline, c.SetReadDeadline, c.SetWriteDeadline} {
		if err := set(time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	ended := make(chan error, 1)
	go func() {
		_, err := c.Write([]byte("x"))
		ended <- err
	}()
	select {
	case err := <-ended:
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("it still writes")
	}
}

// TestSlots has logins and channels run out.
func TestSlots(t *testing.T) {
	s := serve(t, func(o *Options) {
		o.Limits = Limits{Connections: 4, ConnectionsEach: 2, ReservedConnections: 1, Channels: 6, ChannelsEach: 4, ReservedChannels: 2, ChannelsOfConnection: 3}
	})
	ada, bob := s.person(t, "ada", nil), s.person(t, "bob", nil)
	robot := s.person(t, "robot", func(i *trust.Identity) { i.Kind = trust.Automation })
	drill := s.person(t, "ada", func(i *trust.Identity) { i.Scope.Drill = true })

	one, two := s.mustDial(t, robot), s.mustDial(t, robot)
	if _, err := s.dial(t, robot); err == nil {
		t.Error("a third login of one identity")
	}
	s.mustDial(t, drill)
	if _, err := s.dial(t, s.person(t, "robot 2", func(i *trust.Identity) { i.Kind = trust.Automation })); err == nil {
		t.Error("automation took the place of people")
	}
	if out, err := run(s.mustDial(t, ada), "whoami"); out != "ada responder\n" {
		t.Fatalf("no place for a person: %q, %v", out, err)
	}
	if _, err := s.dial(t, bob); err == nil {
		t.Error("more logins than there are places")
	}

	open := func(client *gossh.Client, want int) {
		t.Helper()
		for n := 0; ; n++ {
			_, _, err := client.OpenChannel("session", nil)
			if err == nil {
				continue
			}
			var refused *gossh.OpenChannelError
			if n != want || !errors.As(err, &refused) || refused.Reason != gossh.ResourceShortage {
				t.Errorf("%d channels, want %d; %v", n, want, err)
			}
			return
		}
	}
	eventually(t, "the command's channel is given back", func() bool { return s.channels.Taken() == 0 })
	open(one, 3) // of one connection
	open(two, 1) // of one identity
	_ = one.Close()
	_ = two.Close()
	eventually(t, "places come back", func() bool { return s.logins.Taken() == 2 && s.channels.Taken() == 0 })
	s.mustDial(t, bob)
}

// TestReservedChannels has automation take all channels that it may.
func TestReservedChannels(t *testing.T) {
	s := serve(t, func(o *Options) { o.Limits = Limits{Channels: 4, ReservedChannels: 1, ChannelsEach: 2} })
	for i := range 2 {
		robot := s.mustDial(t, s.person(t, fmt.Sprint("robot", i), func(who *trust.Identity) { who.Kind = trust.Automation }))
		for range 2 {
			if _, _, err := robot.OpenChannel("session", nil); err != nil && i == 0 {
				t.Fatal(err)
			}
		}
	}
	if n := s.channels.Taken(); n != 3 {
		t.Errorf("automation has %d channels", n)
	}
	if out, err := run(s.mustDial(t, s.person(t, "ada", nil)), "whoami"); out != "ada responder\n" {
		t.Errorf("no channel for a person: %q, %v", out, err)
	}
}
