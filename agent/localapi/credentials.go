package localapi

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/version"
)

// masters is the group that the mandatory FlowSchema exempt has, and that is not
// counted where flow control is off (kubernetes
// staging/src/k8s.io/apiserver/pkg/apis/flowcontrol/bootstrap/default.go,
// pkg/server/filters/maxinflight.go: user.SystemPrivilegedGroup).
const masters = "system:masters"

// credentials are those of one kubeconfig, and the connections under them.
type credentials struct {
	file      string
	config    *rest.Config
	client    *http.Client
	transport *http.Transport
	expires   time.Time // zero: not known
	masters   bool      // the certificate says so
	reads     []string  // files that were read

	exemptUID string    // of the priority level of that name, once it is known
	asked     time.Time // when it was asked for
}

func (c *credentials) close() {
	if c != nil {
		c.transport.CloseIdleConnections()
	}
}

// stamp is what changes with a file.
type stamp struct {
	changed time.Time
	size    int64
}

// file is a kubeconfig, as it was read last.
type file struct {
	path   string
	stamps []stamp
	creds  *credentials // nil: missing, or never usable
	err    error
}

// refresh reads the file again if it has changed. One that cannot be used, since it is
// half written, does not replace what was read before; one that is gone is.
func (f *file) refresh(o Options) {
	if _, err := os.Stat(f.path); errors.Is(err, fs.ErrNotExist) {
		f.creds, f.err, f.stamps = nil, nil, nil
		return
	}
	files := []string{f.path}
	if f.creds != nil {
		files = f.creds.reads
	}
	if now := stampsOf(files); f.stamps != nil && slices.Equal(now, f.stamps) {
		return
	}
	creds, err := load(f.path, o)
	switch {
	case err == nil:
		if f.creds != nil {
			o.Log.Info().Str("kubeconfig", f.path).Msg("the local API server's credentials were read again")
		}
		f.creds, f.err, files = creds, nil, creds.reads
	case f.creds != nil:
		o.Log.Error().Msg(neutral.Line(fault.Of(err).Message) + "; what was read before stays in use")
	default:
		f.err = err
	}
	f.stamps = stampsOf(files)
}

func stampsOf(files []string) []stamp {
	all := make([]stamp, len(files))
	for i, f := range files {
		if st, err := os.Stat(f); err == nil {
			all[i] = stamp{st.ModTime(), st.Size()}
		}
	}
	return all
}

// load takes from a kubeconfig who the caller is and whom to trust.
func load(path string, o Options) (*credentials, error) {
	fail := func(format string, args ...any) (*credentials, error) {
		return nil, fault.New(fault.Failed, "mend the file, or name another one with localAPI.kubeconfig", path+": "+format, args...)
	}
	raw, err := clientcmd.LoadFromFile(path)
	if err != nil {
		return fail("%w", err)
	}
	if err := clientcmd.ResolveLocalPaths(raw); err != nil {
		return fail("%w", err)
	}
	config, err := clientcmd.NewDefaultClientConfig(*raw, &clientcmd.ConfigOverrides{}).ClientConfig()
	if err != nil {
		return fail("%w", err)
	}
	if config.ExecProvider != nil || config.AuthProvider != nil {
		return fail("its credentials come from a plugin, and nothing is started here")
	}
	if len(config.CertData)+len(config.CertFile)+len(config.BearerToken)+len(config.BearerTokenFile)+len(config.Username) == 0 {
		return fail("it names no credentials")
	}
	c := &credentials{file: path, config: config, reads: []string{path}}
	for _, f := range []string{config.CAFile, config.CertFile, config.KeyFile, config.BearerTokenFile} {
		if f != "" {
			c.reads = append(c.reads, f)
		}
	}
	if err := rest.LoadTLSFiles(config); err != nil {
		return fail("%w", err)
	}
	config.CAFile, config.CertFile, config.KeyFile = "", "", ""
	config.Host, config.APIPath, config.Proxy, config.Dial = "https://"+o.Address, "", nil, nil
	// A server that proves nothing is nobody's to trust, whatever the file says.
	config.Insecure = false
	switch {
	case o.ServerName != "":
		config.ServerName = o.ServerName
	case config.ServerName == "":
		config.ServerName = "kubernetes"
	}
	config.UserAgent = "halligan-agent/" + version.String()
	config.QPS, config.Timeout = -1, 0
	if len(config.CertData) > 0 {
		pair, err := tls.X509KeyPair(config.CertData, config.KeyData)
		if err != nil {
			return fail("its client certificate: %w", err)
		}
		leaf, err := x509.ParseCertificate(pair.Certificate[0])
		if err != nil {
			return fail("its client certificate: %w", err)
		}
		c.expires, c.masters = leaf.NotAfter, slices.Contains(leaf.Subject.Organization, masters)
	}
	trusts, err := rest.TLSConfigFor(config)
	if err != nil {
		return fail("%w", err)
	}
	// HTTP/1.1: with it a request that ran out of time takes its connection along, so
	// that the next one does not wait on a connection that is half open.
	trusts.NextProtos = []string{"http/1.1"}
	c.transport = &http.Transport{
		DialContext:         (&net.Dialer{Timeout: o.within, KeepAlive: 15 * time.Second}).DialContext,
		TLSClientConfig:     trusts,
		TLSHandshakeTimeout: o.within, MaxIdleConnsPerHost: 1, IdleConnTimeout: 6 * every,
		MaxResponseHeaderBytes: 64 << 10, TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{},
	}
	wrapped, err := rest.HTTPWrappersForConfig(config, c.transport)
	if err != nil {
		return fail("%w", err)
	}
	c.client = &http.Client{Transport: wrapped, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return c, nil
}
