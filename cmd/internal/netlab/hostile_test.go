package netlab

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// change is what an attacker does with a piece of what passes, of which at bytes
// passed before; nil: nothing passes any more.
type change func(at int, data []byte) []byte

func untouched(_ int, data []byte) []byte { return data }

// hostile is a bastion in the hands of an attacker, who has its address and its
// keys: whoever comes sees the right host certificate. It lets everybody in and
// connects them to what the attacker likes.
type hostile struct {
	w      *world
	config *gossh.ServerConfig

	mu       sync.Mutex // guards all below
	lead     func(host string, port uint32) (address string)
	up, down func() change // for each relayed connection
	relayed  int
	taken    []string // channels that a client let it open
}

// hostSigner reads a host's key and its certificate.
func hostSigner(key, cert string) gossh.Signer {
	signer := must(gossh.ParsePrivateKey(must(os.ReadFile(key))))
	public, _, _, _, err := gossh.ParseAuthorizedKey(must(os.ReadFile(cert)))
	if err != nil {
		panic(err)
	}
	return must(gossh.NewCertSigner(public.(*gossh.Certificate), signer))
}

// takeOver ends the first bastion and puts the attacker in its place.
func (w *world) takeOver() *hostile {
	w.t.Helper()
	w.bastions[0].kill()
	key := w.file(bastionNames[0] + ".bastion.hostkey")
	h := &hostile{w: w, config: &gossh.ServerConfig{PublicKeyCallback: func(gossh.ConnMetadata, gossh.PublicKey) (*gossh.Permissions, error) { return nil, nil }}}
	h.config.AddHostKey(hostSigner(key, key+"-cert.pub"))
	h.honest()
	l := w.listen(bastionNames[0], fmt.Sprintf("%s:%d", bastionAddress(0), sshPort))
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go h.serve(conn)
		}
	}()
	return h
}

// honest makes it behave.
func (h *hostile) honest() {
	h.plot(func(host string, port uint32) string {
		name, _, _ := strings.Cut(host, ".")
		return fmt.Sprintf("%s:%d", nodeAddress(slices.Index(nodeNames, name)), port)
	}, func() change { return untouched }, func() change { return untouched })
}

// plot says what it does from now on; nil: as before.
func (h *hostile) plot(lead func(string, uint32) string, up, down func() change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.relayed = 0
	if lead != nil {
		h.lead = lead
	}
	if up != nil {
		h.up = up
	}
	if down != nil {
		h.down = down
	}
}

func (h *hostile) serve(raw net.Conn) {
	defer raw.Close()
	conn, channels, requests, err := gossh.NewServerConn(raw, h.config)
	if err != nil {
		return
	}
	defer conn.Close()
	go func() {
		for r := range requests {
			_ = r.Reply(true, nil)
		}
	}()
	go func() {
		// What a client that forwards something would let it have.
		for _, kind := range []string{"auth-agent@openssh.com", "forwarded-tcpip", "forwarded-streamlocal@openssh.com", "x11", "session", "direct-tcpip"} {
			if _, _, err := conn.OpenChannel(kind, nil); err == nil {
				h.mu.Lock()
				h.taken = append(h.taken, kind)
				h.mu.Unlock()
			}
		}
	}()
	for c := range channels {
		var to struct {
			Host       string
			Port       uint32
			OriginHost string
			OriginPort uint32
		}
		if c.ChannelType() != "direct-tcpip" || gossh.Unmarshal(c.ExtraData(), &to) != nil {
			_ = c.Reject(gossh.Prohibited, "no")
			continue
		}
		go h.relay(c, to.Host, to.Port)
	}
}

func (h *hostile) relay(c gossh.NewChannel, host string, port uint32) {
	h.mu.Lock()
	address, up, down := h.lead(host, port), h.up(), h.down()
	h.relayed++
	h.mu.Unlock()
	node, err := h.w.dial(bastionNames[0], address)
	if err != nil {
		_ = c.Reject(gossh.ConnectionFailed, "no")
		return
	}
	defer node.Close()
	channel, requests, err := c.Accept()
	if err != nil {
		return
	}
	defer channel.Close()
	go gossh.DiscardRequests(requests)
	ended := make(chan struct{}, 2)
	go func() { pass(node, channel, up); ended <- struct{}{} }()
	go func() { pass(channel, node, down); ended <- struct{}{} }()
	<-ended
}

// pass copies with changes.
func pass(to io.Writer, from io.Reader, with change) {
	data := make([]byte, 16<<10)
	for at, held := 0, false; ; {
		k, err := from.Read(data)
		if err != nil {
			return
		}
		if held {
			continue
		}
		out := with(at, slices.Clone(data[:k]))
		at += k
		if held = out == nil; held {
			continue
		}
		if _, err := to.Write(out); err != nil {
			return
		}
	}
}

// flip changes one bit of the byte at an offset.
func flip(offset int) func() change {
	return func() change {
		return func(at int, data []byte) []byte {
			if i := offset - at; i >= 0 && i < len(data) {
				data[i] ^= 1
			}
			return data
		}
	}
}

// insert puts bytes in where the piece with the offset begins.
func insert(offset int, what []byte) func() change {
	return func() change {
		return func(at int, data []byte) []byte {
			if at <= offset && offset < at+len(data) {
				return append(slices.Clone(what), data...)
			}
			return data
		}
	}
}

// withhold lets nothing pass from an offset on.
func withhold(offset int) func() change {
	return func() change {
		return func(at int, data []byte) []byte {
			if at+len(data) > offset {
				return nil
			}
			return data
		}
	}
}

// once leaves all connections but the first alone.
func once(with func() change) func() change {
	var first sync.Once
	return func() change {
		c := change(untouched)
		first.Do(func() { c = with() })
		return c
	}
}

// tape records what passes on the first connection.
type tape struct {
	mu   sync.Mutex
	data []byte
	used bool
}

func (r *tape) record() change {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.used {
		return untouched
	}
	r.used = true
	return func(_ int, data []byte) []byte {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.data = append(r.data, data...)
		return data
	}
}

func (r *tape) recorded() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.data)
}

// TestHostileBastion: what an attacker in a bastion can do is to keep people
// waiting.
func TestHostileBastion(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	h := w.takeOver()
	acts := func() (n int) {
		for _, a := range w.agents {
			n += strings.Count(a.log.String(), `"message":"action applied"`)
		}
		return n
	}
	logins := func() (n int) {
		for _, a := range w.agents {
			n += strings.Count(a.log.String(), `"message":"login"`)
		}
		return n
	}
	scale := func(name string, more ...string) run {
		return w.halligan(append([]string{"--bastion", bastionNames[0], "--node", "cp-1", "scale", "deploy/" + name, "-n", "shop", "--to", "0", "--yes"}, more...)...)
	}

	// What the attacker hears of a command that goes well is worth nothing later.
	var up, down tape
	h.plot(nil, up.record, down.record)
	key := w.deployment("heard")
	scale("heard").ok(t)
	if n := w.written(key); n != 2 || acts() != 1 {
		t.Fatalf("written %d times, acts %d", n, acts())
	}

	t.Run("replay to the agent", func(t *testing.T) {
		key := w.deployment("heard") // as it was before
		before, wrote := logins(), w.written(key)
		for _, chunk := range []int{1 << 20, 64} {
			conn := must(w.dial(bastionNames[0], fmt.Sprintf("%s:%d", nodeAddress(0), sshPort)))
			_ = conn.SetDeadline(time.Now().Add(patience))
			for piece := range slices.Chunk(up.recorded(), chunk) {
				if _, err := conn.Write(piece); err != nil {
					break
				}
			}
			_ = conn.(*net.TCPConn).CloseWrite()
			_, _ = io.Copy(io.Discard, conn)
			conn.Close()
		}
		if logins() != before || acts() != 1 || w.written(key) != wrote {
			t.Errorf("logins %d to %d, acts %d, written %d to %d", before, logins(), acts(), wrote, w.written(key))
		}
	})
	t.Run("replay to the client", func(t *testing.T) {
		heard := down.recorded()
		defer h.honest()
		h.plot(nil, func() change { return func(int, []byte) []byte { return []byte{} } }, func() change {
			// The node's own greeting is what makes the first piece pass.
			return func(at int, data []byte) []byte {
				if at == 0 {
					return heard
				}
				return []byte{}
			}
		})
		if r := scale("heard", "--timeout", "5s"); r.status != 8 || acts() != 1 {
			t.Errorf("acts %d: %v", acts(), r)
		}
	})
	t.Run("alter and insert", func(t *testing.T) {
		defer h.honest()
		packet := append([]byte{0, 0, 0, 12, 10, 50}, make([]byte, 10)...)
		sent, got := len(up.recorded()), len(down.recorded())
		for _, c := range []struct {
			what     string
			up, down func() change
			login    bool // it is the login that fails
		}{
			{"greeting up", flip(9), nil, true}, {"greeting down", nil, flip(9), true},
			{"algorithms up", flip(120), nil, true}, {"algorithms down", nil, flip(120), true},
			{"keys up", flip(1200), nil, true}, {"keys down", nil, flip(900), true},
			{"login up", flip(2000), nil, true}, {"request up", once(flip(sent * 5 / 8)), nil, false}, {"answer down", nil, once(flip(got * 3 / 4)), false},
			{"insert up", insert(600, packet), nil, true}, {"insert down", nil, insert(600, packet), true}, {"insert request", once(insert(sent*5/8, packet)), nil, false},
		} {
			t.Run(c.what, func(t *testing.T) {
				name := "altered-" + strings.ReplaceAll(c.what, " ", "-")
				key := w.deployment(name)
				before := acts()
				h.honest()
				h.plot(nil, c.up, c.down)
				r := scale(name, "--timeout", "5s")
				did, wrote := acts()-before, w.written(key)-1
				switch {
				// It was done over another connection, or what became of it was asked there.
				case r.status == 0 && did == 1 && wrote == 1 && !c.login:
				case r.status == 0 || c.login && (r.status != 8 || did+int(wrote) > 0) || did > 1 || wrote > 1:
					t.Errorf("done %d times, written %d times: %v", did, wrote, r)
				}
				if !c.login {
					t.Logf("status %d after %v, done %d times: %s", r.status, r.took, did, r.errs)
				}
				if c.login && !strings.Contains(r.errs, "cp-1.prod") {
					t.Errorf("it does not say where: %v", r)
				}
			})
		}
	})
	t.Run("withhold", func(t *testing.T) {
		defer h.honest()
		before := acts()
		for _, offset := range []int{0, 700} {
			h.plot(nil, nil, withhold(offset))
			if r := scale("heard", "--timeout", "2s"); r.status != 8 || r.took > lossBound || acts() != before {
				t.Errorf("acts %d: %v", acts(), r)
			}
		}
		// The other bastion is an honest one.
		name := "withheld"
		key := w.deployment(name)
		r := w.halligan("--node", "cp-1", "scale", "deploy/"+name, "-n", "shop", "--to", "0", "--yes").ok(t)
		if n := w.written(key); n != 2 {
			t.Errorf("written %d times: %v", n, r)
		}
		t.Logf("through the other one after %v", r.took)
	})
	t.Run("another machine", func(t *testing.T) {
		defer h.honest()
		before := logins()
		st := w.fakeAgent(hostSigner(w.fleet.HostFiles("st-1.staging", testfleet.Now())))
		bastion := w.file(bastionNames[0] + ".bastion.hostkey")
		itself := w.fakeAgent(hostSigner(bastion, bastion+"-cert.pub"))
		plain := w.fakeAgent(must(gossh.ParsePrivateKey(must(os.ReadFile(bastion)))))
		for what, to := range map[string]string{"another node": fmt.Sprintf("%s:%d", nodeAddress(1), sshPort), "another cluster": st, "the bastion": itself, "a plain key": plain} {
			h.plot(func(string, uint32) string { return to }, nil, nil)
			if r := scale("heard"); r.status != 8 || !strings.Contains(r.errs, "cp-1.prod") || !strings.Contains(r.errs, "do not go on") {
				t.Errorf("%s: %v", what, r)
			}
			if r := w.ssh("-J", bastionAddress(0), "cp-1", "whoami"); r.status != 255 || strings.Contains(r.out, "ada") {
				t.Errorf("%s: %v", what, r)
			}
		}
		if logins() != before {
			t.Error("somebody logged in at the wrong node")
		}
	})
	t.Run("with its own keys", w.bastionKeys)
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.taken) > 0 {
		t.Errorf("clients let a bastion open %v", h.taken)
	}
}

// fakeAgent is an SSH server that lets everybody in and says yes to everything,
// beside the hostile bastion.
func (w *world) fakeAgent(host gossh.Signer) (address string) {
	w.t.Helper()
	config := &gossh.ServerConfig{NoClientAuth: true, PublicKeyCallback: func(gossh.ConnMetadata, gossh.PublicKey) (*gossh.Permissions, error) { return nil, nil }}
	config.AddHostKey(host)
	l := w.listen(bastionNames[0], "127.0.0.1:0")
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer raw.Close()
				conn, channels, requests, err := gossh.NewServerConn(raw, config)
				if err != nil {
					return
				}
				defer conn.Close()
				w.t.Errorf("a client talks to a machine that shows %s", host.PublicKey().Type())
				go gossh.DiscardRequests(requests)
				for c := range channels {
					_ = c.Reject(gossh.Prohibited, "no")
				}
			}()
		}
	}()
	return l.Addr().String()
}

// bastionKeys: what a bastion holds lets nobody do anything at an agent, nor pass
// for a node or a person.
func (w *world) bastionKeys(t *testing.T) {
	base := w.file(bastionNames[0] + ".bastion")
	at := func(port int) string { return fmt.Sprintf("%s:%d", nodeAddress(0), port) }
	host := hostSigner(base+".hostkey", base+".hostkey-cert.pub")
	for _, user := range []string{"responder", "commander", "root", bastionNames[0]} {
		raw := must(w.dial(bastionNames[0], at(sshPort)))
		_ = raw.SetDeadline(time.Now().Add(patience))
		conn, _, _, err := gossh.NewClientConn(raw, "cp-1.prod:2222", &gossh.ClientConfig{User: user, Auth: []gossh.AuthMethod{gossh.PublicKeys(host, must(gossh.ParsePrivateKey(must(os.ReadFile(base+".hostkey")))))},
			HostKeyCallback: gossh.InsecureIgnoreHostKey()}) // #nosec G106 -- an attacker does not care
		if err == nil {
			conn.Close()
			t.Errorf("an agent lets a bastion in as %s", user)
		}
		raw.Close()
	}
	pair := must(tls.LoadX509KeyPair(base+".crt", base+".key"))
	for _, config := range []*tls.Config{{Certificates: []tls.Certificate{pair}}, {}} {
		config.InsecureSkipVerify = true // #nosec G402 -- an attacker does not care
		conn, err := grpc.NewClient("passthrough:///"+at(grpcPort), grpc.WithTransportCredentials(credentials.NewTLS(config)),
			grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return w.dial(bastionNames[0], at(grpcPort)) }))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		desc := halliganv1.Agent_ServiceDesc
		refused := func(method string, err error) {
			switch code := status.Code(err); {
			case err == nil || errors.Is(err, io.EOF):
				t.Errorf("an agent answers a bastion's %s", method)
			case code != codes.PermissionDenied && code != codes.Unauthenticated && code != codes.Unavailable:
				t.Errorf("%s: %v", method, err)
			}
		}
		for _, m := range desc.Methods {
			if m.MethodName == "ExchangeBundle" && len(config.Certificates) > 0 {
				continue // which it may
			}
			refused(m.MethodName, conn.Invoke(ctx, "/"+desc.ServiceName+"/"+m.MethodName, &emptypb.Empty{}, &emptypb.Empty{}))
		}
		for _, s := range desc.Streams {
			stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/"+desc.ServiceName+"/"+s.StreamName)
			if err == nil {
				_ = stream.SendMsg(&emptypb.Empty{})
				_ = stream.CloseSend()
				err = stream.RecvMsg(&emptypb.Empty{})
			}
			refused(s.StreamName, err)
		}
	}
	// Agents know it for what it is, so refusals name it.
	for line := range strings.Lines(w.agents[0].log.String()) {
		if strings.Contains(line, `"person":"`+bastionNames[0]) && !strings.Contains(line, `"credential":"bastion"`) {
			t.Errorf("a bastion passes for a person: %s", line)
		}
	}
}
