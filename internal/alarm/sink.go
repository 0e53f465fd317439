package alarm

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/rs/zerolog"
)

// Config is one sink; exactly one of webhook, syslog and command is set.
type Config struct {
	// Webhook is an http or https URL with an IP address for its host. It gets
	// one POST with a JSON object for each event, and answers 2xx.
	Webhook string `json:"webhook,omitempty"`
	// CAFile is what vouches for an https webhook, in PEM; default: the
	// system's.
	CAFile string `json:"caFile,omitempty"`
	// Syslog is "local" (/dev/log), the path of another socket, or IP:PORT,
	// which gets UDP datagrams of RFC 5424.
	Syslog string `json:"syslog,omitempty"`
	// Command is a program by its absolute path, and its arguments. It gets the
	// event as JSON on its standard input, and 10 s of time.
	Command []string `json:"command,omitempty"`
}

// Check refuses what cannot be meant. It looks at no file.
func (c Config) Check() error {
	set := 0
	for _, is := range []bool{c.Webhook != "", c.Syslog != "", len(c.Command) > 0} {
		if is {
			set++
		}
	}
	switch {
	case set != 1:
		return errors.New("set one of webhook, syslog and command")
	case c.CAFile != "" && !strings.HasPrefix(c.Webhook, "https:"):
		return errors.New("caFile goes with a webhook of https")
	case c.CAFile != "" && !filepath.IsAbs(c.CAFile):
		return fmt.Errorf("caFile: %q is not an absolute path", c.CAFile)
	case len(c.Command) > 0 && !filepath.IsAbs(c.Command[0]):
		return fmt.Errorf("command: %q is not an absolute path", c.Command[0])
	}
	if c.Webhook != "" {
		u, err := url.Parse(c.Webhook)
		switch {
		case err != nil:
			return errors.New("webhook: not a URL")
		case u.Scheme != "https" && u.Scheme != "http", u.User != nil, u.Fragment != "":
			return errors.New("webhook: not a URL of http or https, without a user")
		}
		if _, err := netip.ParseAddr(u.Hostname()); err != nil {
			return fmt.Errorf("webhook: %q is not an IP address; a name would need DNS, which may be what failed", u.Hostname())
		}
	}
	if s := c.Syslog; s != "" && s != "local" && !filepath.IsAbs(s) {
		if ap, err := netip.ParseAddrPort(s); err != nil || ap.Port() == 0 {
			return fmt.Errorf("syslog: %q is not local, a path or IP:PORT; a name would need DNS, which may be what failed", s)
		}
	}
	return nil
}

// sink sends one event. It is called from one goroutine.
type sink interface {
	send(ctx context.Context, e Event) error
	String() string // for the log; no secrets, such as the path of a URL may be
}

func (c Config) open() (sink, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	switch {
	case c.Webhook != "":
		return newWebhook(c.Webhook, c.CAFile)
	case c.Syslog == "local":
		return syslog{address: "/dev/log"}, nil
	case c.Syslog != "":
		return syslog{address: c.Syslog}, nil
	}
	return newCommand(c.Command)
}

// logSink is the daemon's own log.
type logSink struct{ log zerolog.Logger }

func (logSink) String() string { return "log" }

func (s logSink) send(_ context.Context, e Event) error {
	level := zerolog.WarnLevel
	if e.Kind == Login {
		level = zerolog.InfoLevel
	}
	l := s.log.WithLevel(level).Str("alarm", string(e.Kind)).Str("person", e.Person).Str("role", e.Role).Str("door", e.Door).Str("source", e.Source).
		Str("credential", e.Credential).Str("fingerprint", e.Fingerprint).Str("serial", e.Serial)
	if e.Unsaid > 0 {
		l = l.Uint64("unsaid", e.Unsaid)
	}
	l.Msg(e.Text)
	return nil
}

// webhookTimeout bounds one attempt, connecting included.
const webhookTimeout = 5 * time.Second

type webhook struct {
	url, host string
	client    http.Client
}

func newWebhook(address, caFile string) (*webhook, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		data, err := os.ReadFile(caFile)
		if err != nil {
			return nil, fmt.Errorf("caFile: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(data) {
			return nil, fmt.Errorf("caFile: %s holds no certificate in PEM", caFile)
		}
	}
	return &webhook{url: address, host: u.Host, client: http.Client{
		Timeout: webhookTimeout,
		// No proxy of the environment, and no redirect to a name.
		Transport:     &http.Transport{TLSClientConfig: config, MaxIdleConns: 1, IdleConnTimeout: 30 * time.Second},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

func (w *webhook) String() string { return "webhook " + w.host }

func (w *webhook) send(ctx context.Context, e Event) error {
	body, err := json.Marshal(e)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "halligan-agent")
	resp, err := w.client.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			return u.Err // without the URL
		}
		return err
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, 4<<10) // so that the connection can be used again
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("it answered %d", resp.StatusCode)
	}
	return nil
}

// syslogTimeout bounds one attempt: the local daemon may hang with its socket
// full.
const syslogTimeout = 2 * time.Second

type syslog struct{ address string }

func (s syslog) String() string { return "syslog " + s.address }

func (s syslog) send(ctx context.Context, e Event) error {
	ctx, cancel := context.WithTimeout(ctx, syslogTimeout)
	defer cancel()
	var d net.Dialer
	message, networks := s.rfc5424(e), []string{"udp"}
	if filepath.IsAbs(s.address) {
		message, networks = s.local(e), []string{"unixgram", "unix"}
	}
	var last error
	for _, network := range networks {
		conn, err := d.DialContext(ctx, network, s.address)
		if err != nil {
			last = err
			continue
		}
		defer conn.Close()
		deadline, _ := ctx.Deadline()
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
		if network == "unix" {
			message += "\n"
		}
		_, err = io.WriteString(conn, message)
		return err
	}
	return last
}

// priority is the facility authpriv with a severity (RFC 5424, section 6.2.1).
func priority(e Event) int {
	const authpriv, alert, warning, informational = 10, 1, 4, 6
	switch {
	case e.Loud:
		return authpriv*8 + alert
	case e.Kind == Login:
		return authpriv*8 + informational
	}
	return authpriv*8 + warning
}

// tag is the name by which logs know the agent.
const tag = "halligan-agent"

// rfc5424 is a message of RFC 5424, section 6.
func (syslog) rfc5424(e Event) string {
	host := strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return -1
		}
		return r
	}, e.Node)
	if host == "" || len(host) > 255 {
		host = "-"
	}
	return fmt.Sprintf("<%d>1 %s %s %s %d %s - %s", priority(e), e.Time.UTC().Format("2006-01-02T15:04:05.000000Z"), host, tag, os.Getpid(), e.Kind, e.Line())
}

// local is what daemons expect on the socket of the machine, which is the older
// form without a host name (RFC 3164, and glibc's syslog(3)).
func (syslog) local(e Event) string {
	return fmt.Sprintf("<%d>%s %s[%d]: %s", priority(e), e.Time.Local().Format(time.Stamp), tag, os.Getpid(), e.Line())
}

// commandTimeout bounds one run.
const commandTimeout = 10 * time.Second

type command struct {
	argv    []string
	timeout time.Duration
}

// newCommand refuses a program that somebody else could have put there, since
// it runs with the agent's rights.
func newCommand(argv []string) (sink, error) {
	st, err := os.Stat(argv[0])
	switch {
	case err != nil:
		return nil, fmt.Errorf("command: %w", err)
	case !st.Mode().IsRegular() || st.Mode().Perm()&0o111 == 0:
		return nil, fmt.Errorf("command: %s is no program", argv[0])
	case st.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("command: %s has mode %04o; others may change it: chmod go-w it", argv[0], st.Mode().Perm())
	}
	if s, ok := st.Sys().(*syscall.Stat_t); ok && s.Uid != 0 && int(s.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("command: %s belongs to user %d; chown it to root", argv[0], s.Uid)
	}
	return command{argv, commandTimeout}, nil
}

func (c command) String() string { return "command " + c.argv[0] }

func (c command) send(ctx context.Context, e Event) error {
	body, err := json.Marshal(e)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.argv[0], c.argv[1:]...) // #nosec G204 -- the node's administrator names it
	cmd.Stdin = bytes.NewReader(append(body, '\n'))
	cmd.Dir, cmd.Env = "/", []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	// What it starts ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	if ctx.Err() != nil {
		return fmt.Errorf("it did not end within %v", c.timeout)
	}
	return err
}
