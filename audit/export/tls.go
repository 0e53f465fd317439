package export

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/halligan-io/halligan/internal/fault"
)

// Receiver is a sink of syslog messages over TLS (RFC 5425). That transport has no
// acknowledgements, so each batch has a connection of its own, whose orderly end
// says that the receiver has read it all: one that goes away with messages unread
// resets it, or has ended it first.
type Receiver struct {
	ctx     context.Context
	address netip.AddrPort
	config  *tls.Config
	conn    *tls.Conn
	w       *bufio.Writer
	patient time.Duration // for each step
}

// ReceiverOptions say who the receiver is.
type ReceiverOptions struct {
	// Address is IP:PORT; the port registered for it is 6514.
	Address string
	// CA is PEM of the authorities that may vouch for it. Nothing else may.
	CA []byte
	// Name is what its certificate has to be for; empty: its IP address.
	Name string
	// Certificate is what to log in with, where it asks for one.
	Certificate *tls.Certificate
}

// NewReceiver dials nothing yet. The context ends what waits for the receiver.
func NewReceiver(ctx context.Context, o ReceiverOptions) (*Receiver, error) {
	address, err := netip.ParseAddrPort(o.Address)
	if err != nil {
		return nil, fault.New(fault.Usage, "name it as IP:PORT, such as 192.0.2.10:6514; names are not looked up", "receiver: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(o.CA) {
		return nil, fault.New(fault.Usage, "name a file with the PEM certificate of the receiver's authority", "there is no certificate in the CA file")
	}
	config := &tls.Config{RootCAs: roots, ServerName: o.Name, MinVersion: tls.VersionTLS12}
	if config.ServerName == "" {
		config.ServerName = address.Addr().WithZone("").String()
	}
	if o.Certificate != nil {
		config.Certificates = []tls.Certificate{*o.Certificate}
	}
	return &Receiver{ctx: ctx, address: address, config: config, patient: 10 * time.Second}, nil
}

// Name is the receiver's address.
func (r *Receiver) Name() string { return "tls:" + r.address.String() }

func (r *Receiver) dial() error {
	ctx, cancel := context.WithTimeout(r.ctx, r.patient)
	defer cancel()
	d := tls.Dialer{NetDialer: &net.Dialer{}, Config: r.config}
	conn, err := d.DialContext(ctx, "tcp", r.address.String())
	if err != nil {
		return fault.New(fault.Unreachable, "see whether it listens there, with a certificate of that CA", "receiver %s: %w", r.address, err)
	}
	r.conn = conn.(*tls.Conn)
	r.w = bufio.NewWriterSize(r.conn, 64<<10)
	return nil
}

// Write sends a message, counted in octets (RFC 5425, 4.3.1).
func (r *Receiver) Write(record []byte) error {
	if r.conn == nil {
		if err := r.dial(); err != nil {
			return err
		}
	}
	_ = r.conn.SetDeadline(time.Now().Add(r.patient))
	_, err := r.w.WriteString(strconv.Itoa(len(record)) + " ")
	if err == nil {
		_, err = r.w.Write(record)
	}
	if err != nil {
		return r.broken(err)
	}
	return nil
}

// Commit ends the connection in order, and waits for the other side's end.
func (r *Receiver) Commit() error {
	if r.conn == nil {
		return nil
	}
	_ = r.conn.SetDeadline(time.Now().Add(r.patient))
	err := r.w.Flush()
	if err == nil {
		err = r.stays()
	}
	if err == nil {
		err = r.conn.CloseWrite()
	}
	if err == nil {
		// A receiver has nothing to say.
		if _, err = io.Copy(io.Discard, io.LimitReader(r.conn, 1<<20)); errors.Is(err, io.ErrUnexpectedEOF) {
			err = nil
		}
	}
	if err != nil {
		return r.broken(err)
	}
	return r.Close()
}

// settle is how long a receiver that reads nothing gets to be known by its end.
const settle = 100 * time.Millisecond

// stays refuses a receiver that has ended the connection although it was not at its
// end: one that reads all of it waits for that.
func (r *Receiver) stays() error {
	if err := r.conn.SetReadDeadline(time.Now().Add(settle)); err != nil {
		return err
	}
	_, err := io.CopyN(io.Discard, r.conn, 1<<20)
	if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
		return r.conn.SetDeadline(time.Now().Add(r.patient))
	}
	if err == nil || errors.Is(err, io.EOF) {
		return errors.New("it ended the connection before the messages did")
	}
	return err
}

func (r *Receiver) broken(err error) error {
	_ = r.Close()
	return fault.New(fault.Unreachable, "run it again: what this batch had goes out once more", "receiver %s did not take a batch to its end: %w", r.address, err)
}

// Close drops the connection, if there is one.
func (r *Receiver) Close() error {
	if r.conn == nil {
		return nil
	}
	err := r.conn.Close()
	r.conn, r.w = nil, nil
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("receiver %s: %w", r.address, err)
	}
	return nil
}
