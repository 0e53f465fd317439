package sshclient

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/sshclient/testagent"
)

// bastion relays to one address, whatever is asked for; "" refuses.
func bastion(s *server, to string) {
	s.relay = func(c gossh.NewChannel) {
		far, err := net.Dial("tcp", to)
		if to == "" || err != nil {
			_ = c.Reject(gossh.ConnectionFailed, "halligan: nobody listens\x1b[2J there; try another node")
			return
		}
		defer far.Close()
		near, requests, err := c.Accept()
		if err != nil {
			return
		}
		go gossh.DiscardRequests(requests)
		go func() { _, _ = io.Copy(far, near); far.Close() }()
		_, _ = near.Stderr().Write(make([]byte, 4<<20)) // must not fill the window
		_, _ = io.Copy(near, far)
		near.Close()
	}
}

// TestThrough logs in at a node behind a bastion, which cannot stand in for it.
func TestThrough(t *testing.T) {
	node := startServer(t, nil)
	other := startServer(t, nil) // another authority's
	to := node.target.Address
	before := startServer(t, func(s *server, _ gossh.Signer, _ *gossh.Certificate) { bastion(s, to) })
	login, _ := node.login(t)
	entry, _ := before.login(t)
	through, err := Dial(t.Context(), before.target, entry)
	if err != nil {
		t.Fatal(err)
	}
	defer through.Close()
	target := node.target
	target.Address, target.Through = "192.0.2.1:2222", through // nobody dials that
	c, err := Dial(t.Context(), target, login)
	if err != nil {
		t.Fatal(err)
	}
	if got := <-node.logins; !strings.HasPrefix(got, "responder ") {
		t.Errorf("login %q", got)
	}
	if asked := <-before.asked; asked != "cp-1.prod:2222" {
		t.Errorf("asked for %s", asked)
	}
	c.Close()

	elsewhere := target
	elsewhere.HostKey = other.target.HostKey
	_, err = Dial(t.Context(), elsewhere, login)
	wantFault(t, err, fault.Unauthenticated, "cp-1.prod is not who answers through cp-1.prod", "do not go on: that bastion leads to another machine")

	// The end of the bastion is the end of what is behind it.
	if c, err = Dial(t.Context(), target, login); err != nil {
		t.Fatal(err)
	}
	through.Close()
	select {
	case <-c.Done():
	case <-time.After(10 * time.Second):
		t.Error("a node outlives its bastion")
	}
	_, err = Dial(t.Context(), target, login)
	wantFault(t, err, fault.Unreachable, "broke")
}

// TestRelayRefused tells what the bastion says, and that it says so.
func TestRelayRefused(t *testing.T) {
	before := startServer(t, func(s *server, _ gossh.Signer, _ *gossh.Certificate) { bastion(s, "") })
	login, _ := before.login(t)
	through, err := Dial(t.Context(), before.target, login)
	if err != nil {
		t.Fatal(err)
	}
	defer through.Close()
	_, err = Dial(t.Context(), Target{Name: "cp-2.prod", Address: "192.0.2.2:22", Through: through}, login)
	wantFault(t, err, fault.Unreachable, `cp-2.prod cannot be reached: cp-1.prod: nobody listens\x1b[2J there; try another node`)
	var refused *RelayError
	if !errors.As(err, &refused) || refused.Bastion != "cp-1.prod" {
		t.Errorf("%#v", refused)
	}
}

// TestRelayStalls leaves a bastion that does not answer.
func TestRelayStalls(t *testing.T) {
	before := startServer(t, func(s *server, _ gossh.Signer, _ *gossh.Certificate) {
		s.relay = func(gossh.NewChannel) {}
	})
	login, _ := before.login(t)
	through, err := Dial(t.Context(), before.target, login)
	if err != nil {
		t.Fatal(err)
	}
	defer through.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = Dial(ctx, Target{Name: "cp-2.prod", Address: "192.0.2.2:22", Through: through}, login)
	wantFault(t, err, fault.Unreachable, "cp-2.prod does not answer through cp-1.prod")
	ctx, stop := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, stop)
	if _, err = Dial(ctx, Target{Name: "cp-2.prod", Address: "192.0.2.2:22", Through: through}, login); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// TestFirst takes the first that lets in, past those that are silent, dead or
// somebody else.
func TestFirst(t *testing.T) {
	good := startServer(t, nil)
	login, _ := good.login(t)
	silent := startServer(t, func(s *server, _ gossh.Signer, _ *gossh.Certificate) { s.stall = true })
	stranger := startServer(t, nil)
	dead := good.target
	dead.Address = "127.0.0.1:1"
	lies := good.target
	lies.Address = stranger.target.Address
	for _, list := range [][]Target{{good.target}, {dead, good.target}, {silent.target, lies, dead, good.target}, {good.target, silent.target}} {
		c, i, errs := First(t.Context(), list, login)
		if c == nil {
			t.Fatalf("%v", errs)
		}
		if list[i].Address != good.target.Address {
			t.Errorf("took %d of %d", i, len(list))
		}
		<-good.logins
		c.Close()
	}
	c, _, errs := First(t.Context(), []Target{dead, lies}, login)
	if c != nil || len(errs) != 2 {
		t.Fatalf("%v", errs)
	}
	wantFault(t, errs[0], fault.Unreachable, "nothing listens at")
	wantFault(t, errs[1], fault.Unauthenticated, "is not who answers")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if c, _, errs := First(ctx, []Target{silent.target, silent.target}, login); c != nil || fault.CodeOf(errs[1]) != fault.Unreachable {
		t.Errorf("%v", errs)
	}
}

// TestFirstTouch asks for one touch where one is enough, and for another where
// the first was in vain.
func TestFirstTouch(t *testing.T) {
	private, _ := newKey(t)
	k := &testagent.Token{Private: private, Touch: make(chan struct{})}
	var servers []*server
	for i := range 3 {
		servers = append(servers, startServer(t, func(s *server, _ gossh.Signer, _ *gossh.Certificate) {
			if i == 0 { // says that the key will do, and hangs up when it has signed
				s.config.VerifiedPublicKeyCallback = func(gossh.ConnMetadata, gossh.PublicKey, *gossh.Permissions, string) (*gossh.Permissions, error) {
					return nil, errors.New("changed my mind")
				}
			}
		}))
	}
	r, err := Open(Sources{Agent: testagent.Serve(t, k)})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	login := Login{Key: r.Keys[0]}
	touches := make(chan int, 8)
	targets := make([]Target, len(servers))
	for i, s := range servers {
		targets[i] = s.target
		targets[i].Touch = func() { touches <- i }
	}
	time.AfterFunc(300*time.Millisecond, func() { close(k.Touch) }) // by then all have got as far
	c, i, errs := First(t.Context(), targets, login)
	if c == nil {
		t.Fatalf("%v", errs)
	}
	c.Close()
	var asked []string
	for len(touches) > 0 {
		asked = append(asked, strconv.Itoa(<-touches))
	}
	if i == 0 || len(asked) > 2 || asked[len(asked)-1] != strconv.Itoa(i) {
		t.Errorf("%d let in, after a touch was asked for by %v", i, asked)
	}
}
