// Package sshclient is the caller's side of an SSH door: it finds something to
// log in with, dials an address out of the bundle, or goes through a bastion that
// it is logged in at, and lets in nobody's word but that of the bundle's host
// authority for who answers there.
//
// It must never look up a name, never trust a server on first use, never offer a
// key that was not chosen, never believe a bastion for who is behind it, and never
// send a private key anywhere: what signs is the key's own file or an ssh-agent,
// which is not forwarded. It stands on floor 0.
package sshclient

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// Subsystem carries the gRPC API of an agent, or of a bastion.
const Subsystem = "halligan-grpc"

const (
	// handshake bounds a login with a key that signs by itself; touch is what a
	// person has for finding the FIDO2 key and touching it.
	handshake = 10 * time.Second
	touch     = 60 * time.Second
	// keepalive is the time between two signs of life that are asked for, and
	// silence after how long without one a connection counts as dead. A node may
	// be slow in an outage; a bastion is none of the cluster's, and there is
	// another one.
	keepalive        = 5 * time.Second
	silence          = 3 * keepalive
	bastionKeepalive = 2 * time.Second
	bastionSilence   = 4 * time.Second
	// maxBanner bounds what a server may say before the login, in bytes.
	maxBanner = 400
)

// The algorithms that both ends of a Halligan connection accept, best first:
// key exchange with the post-quantum hybrid before plain X25519, and AEAD
// ciphers only, which need no MAC and which Terrapin (CVE-2023-48795) does not
// harm together with strict key exchange.
var (
	keyExchanges = []string{gossh.KeyExchangeMLKEM768X25519, gossh.KeyExchangeCurve25519}
	ciphers      = []string{gossh.CipherAES128GCM, gossh.CipherAES256GCM, gossh.CipherChaCha20Poly1305}
	// macs is what the library demands in the offer; no AEAD cipher uses one.
	macs = []string{gossh.HMACSHA256ETM, gossh.HMACSHA512ETM}
	// hostAlgorithms are those of certificates only: a plain host key vouches
	// for nobody.
	hostAlgorithms = []string{
		gossh.CertAlgoED25519v01, gossh.CertAlgoECDSA256v01, gossh.CertAlgoECDSA384v01, gossh.CertAlgoECDSA521v01,
		gossh.CertAlgoRSASHA512v01, gossh.CertAlgoRSASHA256v01,
	}
)

// Target is an SSH door.
type Target struct {
	// Name is what the host certificate must name: NODE.CLUSTER, or NAME.bastion.
	Name string
	// Address is IP:PORT.
	Address string
	// HostKey checks that a host certificate is that of the server named; it is
	// called with the name and the port, and must refuse plain keys.
	HostKey gossh.HostKeyCallback
	// Through is a bastion that is asked for the target by its name and port; nil:
	// the address is dialled.
	Through *Client
	// Bastion says that the target is one itself.
	Bastion bool
	// Touch, if set, is called when somebody has to touch a FIDO2 key for the
	// login to go on.
	Touch func()

	turns chan struct{} // has room for the one who may ask for a touch; nil: anybody may
}

// Client is a connection to an SSH door. Its methods may be called concurrently.
type Client struct {
	conn   gossh.Conn
	raw    net.Conn // below conn
	target Target
	done   chan struct{} // closed when the connection has ended
	once   sync.Once
	alive  sync.WaitGroup
}

// Dial logs in. It takes as long as the context allows, and no longer than a
// handshake may, or a person needs to touch a key. Errors are
// fault.Unreachable where nobody answers, fault.Unauthenticated where the other
// side is not who it should be or does not let the login in.
func Dial(ctx context.Context, t Target, login Login) (*Client, error) {
	address, err := netip.ParseAddrPort(t.Address)
	if err != nil || !address.IsValid() || address.Port() == 0 {
		return nil, fault.New(fault.Usage, "correct the inventory of the bundle", "%s has the address %q, which is no IP:PORT", t.Name, t.Address)
	}
	raw, err := t.connect(ctx, address)
	if err != nil {
		return nil, err
	}
	client, err := t.login(ctx, raw, login)
	if err != nil {
		raw.Close()
		if errors.Is(ctx.Err(), context.Canceled) {
			return nil, ctx.Err()
		}
		return nil, err
	}
	return client, nil
}

// connect reaches the target's address.
func (t Target) connect(ctx context.Context, at netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshake)
	defer cancel()
	if t.Through != nil {
		return t.Through.relay(ctx, t, at.Port())
	}
	var dialer net.Dialer
	raw, err := dialer.DialContext(ctx, "tcp", at.String())
	if err != nil {
		return nil, t.undialled(ctx, err)
	}
	return raw, nil
}

// login runs the handshake and leaves when the context ends, even where the
// signer hangs.
func (t Target) login(ctx context.Context, raw net.Conn, login Login) (*Client, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	limit := time.AfterFunc(handshake, func() { cancel(context.DeadlineExceeded) })
	defer limit.Stop()
	in := false
	if login.SecurityKey() {
		key := &touched{Signer: login.signer, ctx: ctx, target: t, limit: limit}
		defer func() { key.release(in) }()
		login.signer = key
	}
	signer, err := login.certified()
	if err != nil {
		return nil, err
	}
	h := &hello{target: t}
	config := &gossh.ClientConfig{
		Config:            gossh.Config{KeyExchanges: keyExchanges, Ciphers: ciphers, MACs: macs},
		User:              login.Role.String(),
		Auth:              []gossh.AuthMethod{gossh.PublicKeys(signer)},
		HostKeyAlgorithms: hostAlgorithms,
		HostKeyCallback:   h.check,
		BannerCallback:    h.banner,
		ClientVersion:     "SSH-2.0-Halligan",
	}
	// The port does not matter: certificates name hosts.
	_, port, _ := net.SplitHostPort(t.Address)
	type result struct {
		conn gossh.Conn
		err  error
	}
	ready := make(chan result, 1)
	go func() {
		conn, channels, requests, err := gossh.NewClientConn(raw, net.JoinHostPort(t.Name, port), config)
		if err == nil {
			go refuseChannels(channels)
			go gossh.DiscardRequests(requests)
		}
		ready <- result{conn, err}
	}()
	select {
	case <-ctx.Done():
		raw.Close()
		return nil, h.failed(ctx, login, ctx.Err())
	case r := <-ready:
		if r.err != nil {
			return nil, h.failed(ctx, login, r.err)
		}
		in = true
		c := &Client{conn: r.conn, raw: raw, target: t, done: make(chan struct{})}
		c.alive.Go(func() { _ = r.conn.Wait(); close(c.done) })
		c.alive.Go(c.keepAlive)
		return c, nil
	}
}

// touched is a FIDO2 key that is used for one login. Whoever holds it can touch
// it for one at a time, and needs to find it first.
type touched struct {
	gossh.Signer
	ctx    context.Context // of the login
	target Target
	limit  *time.Timer // ends the login

	mu   sync.Mutex // guards both below
	mine bool       // it is this login's turn
	gone bool       // the login is over
}

// SignWithAlgorithm is Sign: such a key has one algorithm.
func (k *touched) SignWithAlgorithm(random io.Reader, data []byte, _ string) (*gossh.Signature, error) {
	return k.Sign(random, data)
}

// Sign waits for its turn, and for the touch.
func (k *touched) Sign(random io.Reader, data []byte) (*gossh.Signature, error) {
	k.limit.Stop()
	if err := k.turn(); err != nil {
		return nil, err
	}
	k.limit.Reset(touch)
	if k.target.Touch != nil {
		k.target.Touch()
	}
	return k.Signer.Sign(random, data)
}

// turn waits until nobody else asks for a touch.
func (k *touched) turn() error {
	if k.target.turns == nil {
		return k.ctx.Err()
	}
	k.mu.Lock()
	mine := k.mine
	k.mu.Unlock()
	if mine {
		return k.ctx.Err()
	}
	select {
	case k.target.turns <- struct{}{}:
	case <-k.ctx.Done():
		return k.ctx.Err()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.gone {
		<-k.target.turns
		return context.Canceled
	}
	k.mine = true
	return k.ctx.Err()
}

// release ends the turn with the login. Who was let in keeps it: nobody else is
// to ask for a touch then.
func (k *touched) release(in bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.gone = true
	if k.mine && !in {
		<-k.target.turns
	}
}

// certified returns what signs for the login.
func (l Login) certified() (gossh.Signer, error) {
	if l.Certificate == nil {
		return l.signer, nil
	}
	signer, err := gossh.NewCertSigner(l.Certificate, l.signer)
	if err != nil {
		return nil, fault.New(fault.Unauthenticated, "put the certificate that was made for this key beside it", "%s: %w", l.Name(), err)
	}
	return signer, nil
}

// refuseChannels refuses what a server has no reason to open.
func refuseChannels(channels <-chan gossh.NewChannel) {
	for c := range channels {
		_ = c.Reject(gossh.Prohibited, "a client takes no channels")
	}
}

// hello is what one handshake has brought.
type hello struct {
	target Target

	mu   sync.Mutex // guards all below, since a handshake may be abandoned
	host error      // why the host certificate was refused
	met  bool       // the host certificate was accepted
	said string     // first line of the banner
}

func (h *hello) check(name string, remote net.Addr, key gossh.PublicKey) error {
	err := error(nil)
	switch {
	case h.target.HostKey == nil:
		err = errors.New("nothing says whom to trust")
	default:
		err = h.target.HostKey(name, remote, key)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.host, h.met = err, err == nil
	return err
}

func (h *hello) banner(text string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.said == "" {
		h.said = neutral.LineMax(strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(text), "halligan: ")), maxBanner)
	}
	return nil
}

// failed says why the handshake came to nothing.
func (h *hello) failed(ctx context.Context, login Login, err error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := h.target
	var negotiation *gossh.AlgorithmNegotiationError
	switch {
	case h.host != nil:
		next := "do not go on: another machine answers at this address, or its host certificate must be renewed; " + t.orElse()
		if t.Through != nil {
			next = "do not go on: that bastion leads to another machine, or the node's host certificate must be renewed; try another bastion with --bastion"
		}
		return fault.New(fault.Unauthenticated, next, "%s is not who answers %s: %s", t.Name, t.at(), fault.Of(h.host).Message)
	case errors.As(err, &negotiation) && strings.Contains(negotiation.What, "host key"):
		return fault.New(fault.Unauthenticated, "do not go on: another machine answers there, or it has no host certificate",
			"what answers %s shows no host certificate, so it may not be %s", t.at(), t.Name)
	case errors.As(err, &negotiation):
		return fault.New(fault.Unreachable, "see whether another SSH server answers there", "%s %s speaks no algorithm that is safe here: %s", t.Name, t.at(), negotiation.What)
	case ctx.Err() != nil && h.met && login.SecurityKey():
		return fault.New(fault.Unauthenticated, "touch the FIDO2 key when it blinks, and try again", "nobody touched %s in time", login.Name())
	case ctx.Err() != nil:
		return fault.New(fault.Unreachable, "look at the load there, or "+t.orElse(), "%s %s did not finish the login in time", t.Name, t.at())
	case h.met && strings.Contains(err.Error(), "unable to authenticate"):
		why := h.said
		if why == "" {
			why = "it does not say why; its log does"
		}
		as := " as " + login.Role.String()
		if t.Bastion { // which gives no roles
			as = ""
		}
		return fault.New(fault.Unauthenticated, "see what the certificate is for: ssh-keygen -L -f KEY-cert.pub", "%s does not let %s in%s: %s", t.Name, orKey(login.Person), as, why)
	case h.met && (strings.Contains(err.Error(), "agent:") || strings.Contains(err.Error(), "sign")):
		return fault.New(fault.Unauthenticated, "see what the ssh-agent holds: ssh-add -l", "%s does not sign: %w", login.Name(), err)
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return fault.New(fault.Unreachable, "it may have as many connections as it takes: try again, or "+t.orElse(), "%s %s closed the connection during the login", t.Name, t.at())
	}
	return fault.New(fault.Unreachable, "see whether the SSH door of "+t.daemon()+" is there", "the login at %s (%s) failed: %s", t.Name, t.at(), strings.TrimPrefix(err.Error(), "ssh: handshake failed: "))
}

// at says in a message where the target is.
func (t Target) at() string {
	if t.Through != nil {
		return "through " + t.Through.target.Name
	}
	return "at " + t.Address
}

func (t Target) daemon() string {
	if t.Bastion {
		return "halligan-bastion"
	}
	return "halligan-agent"
}

// orElse is the way around a target that does not work.
func (t Target) orElse() string {
	if t.Bastion {
		return "choose another bastion with --bastion"
	}
	return "choose another node with --node"
}

func orKey(person string) string {
	if person == "" {
		return "this key"
	}
	return person
}

func (t Target) undialled(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return ctx.Err()
	case errors.Is(err, syscall.ECONNREFUSED):
		return fault.New(fault.Unreachable, "see whether "+t.daemon()+" runs there, or "+t.orElse(), "nothing listens at %s, the SSH door of %s", t.Address, t.Name)
	case errors.Is(err, context.DeadlineExceeded) || isTimeout(err):
		return fault.New(fault.Unreachable, "see whether it is up and this network reaches it, or "+t.orElse(), "%s at %s does not answer", t.Name, t.Address)
	}
	return fault.New(fault.Unreachable, "see whether this network reaches it, or "+t.orElse(), "%s at %s cannot be reached: %w", t.Name, t.Address, err)
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// keepAlive notices a connection that died without a word.
func (c *Client) keepAlive() {
	every, most := keepalive, silence
	if c.target.Bastion {
		every, most = bastionKeepalive, bastionSilence
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-c.done:
			return
		case <-tick.C:
		}
		answered := make(chan error, 1)
		// Ends with the connection at the latest.
		go func() {
			_, _, err := c.conn.SendRequest("keepalive@openssh.com", true, nil)
			answered <- err
		}()
		late := time.NewTimer(most)
		select {
		case <-c.done:
		case <-answered:
		case <-late.C:
			c.conn.Close()
		}
		late.Stop()
	}
}

// Close ends the connection and waits until nothing of it runs.
func (c *Client) Close() error {
	var err error
	c.once.Do(func() { err = c.conn.Close() })
	c.alive.Wait()
	return err
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// open opens a session channel; the server's requests on it are the caller's.
func (c *Client) open(ctx context.Context) (gossh.Channel, <-chan *gossh.Request, error) {
	channel, requests, err := c.channel(ctx, "session", nil)
	var refused *gossh.OpenChannelError
	switch {
	case err == nil:
		return channel, requests, nil
	case errors.As(err, &refused):
		return nil, nil, fault.New(fault.Unreachable, "it may have as many sessions as it takes: try again, or "+c.target.orElse(), "%s refuses a session: %s", c.target.Name, neutral.LineMax(refused.Message, maxBanner))
	case errors.Is(err, context.Canceled):
		return nil, nil, err
	}
	return nil, nil, c.broken(err)
}

// channel opens a channel, as long as the context allows.
func (c *Client) channel(ctx context.Context, kind string, data []byte) (gossh.Channel, <-chan *gossh.Request, error) {
	type opened struct {
		channel  gossh.Channel
		requests <-chan *gossh.Request
		err      error
	}
	ready := make(chan opened, 1)
	// It ends with the connection at the latest.
	go func() {
		channel, requests, err := c.conn.OpenChannel(kind, data)
		ready <- opened{channel, requests, err}
	}()
	select {
	case o := <-ready:
		return o.channel, o.requests, o.err
	case <-ctx.Done():
		go func() {
			if o := <-ready; o.err == nil {
				go gossh.DiscardRequests(o.requests)
				o.channel.Close()
			}
		}()
		return nil, nil, ctx.Err()
	}
}

func (c *Client) broken(err error) error {
	return fault.New(fault.Unreachable, "try again, or "+c.target.orElse(), "the connection to %s broke: %w", c.target.Name, err)
}

// API opens the gRPC API of the daemon there as a connection. Closing the
// connection leaves the client open.
func (c *Client) API(ctx context.Context) (net.Conn, error) {
	channel, requests, err := c.open(ctx)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { channel.Close() })()
	ok, err := channel.SendRequest("subsystem", true, gossh.Marshal(struct{ Name string }{Subsystem}))
	if err != nil {
		channel.Close()
		if errors.Is(ctx.Err(), context.Canceled) {
			return nil, ctx.Err()
		}
		return nil, c.broken(err)
	}
	if !ok {
		channel.Close()
		return nil, fault.New(fault.Unreachable, "see whether another SSH server answers there", "%s %s has no %s", c.target.Name, c.target.at(), Subsystem)
	}
	return c.stream(channel, requests), nil
}

// stream makes a connection of a channel.
func (c *Client) stream(channel gossh.Channel, requests <-chan *gossh.Request) net.Conn {
	go gossh.DiscardRequests(requests)
	go func() { _, _ = io.Copy(io.Discard, channel.Stderr()) }() // what is not read would fill the window
	return &stream{Channel: channel, client: c}
}

// stream is a channel as a net.Conn. It has no deadlines: gRPC sets one only
// while it closes.
type stream struct {
	gossh.Channel
	client *Client
}

func (s *stream) LocalAddr() net.Addr              { return s.client.raw.LocalAddr() }
func (s *stream) RemoteAddr() net.Addr             { return s.client.raw.RemoteAddr() }
func (s *stream) SetDeadline(time.Time) error      { return nil }
func (s *stream) SetReadDeadline(time.Time) error  { return nil }
func (s *stream) SetWriteDeadline(time.Time) error { return nil }
