package mtls

import (
	"crypto/tls"
	"os"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// lookEvery is how often the files are looked at, while connections come.
const lookEvery = time.Second

// pair is a certificate and its key in files.
type pair struct {
	certFile, keyFile, name string
	log                     zerolog.Logger

	mu     sync.Mutex // guards all below
	cert   *tls.Certificate
	stamps [2]time.Time
	looked time.Time
}

func (p *pair) get() (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := time.Now(); now.Sub(p.looked) >= lookEvery {
		if err := p.load(now); err != nil {
			p.log.Error().Msg("the certificate before stays in force: " + neutral.Line(fault.Of(err).Error()))
		}
	}
	return p.cert, nil
}

// load loads the files if they have changed; p.mu is held, or nobody else has p.
func (p *pair) load(now time.Time) error {
	p.looked = now
	var stamps [2]time.Time
	for i, f := range []string{p.certFile, p.keyFile} {
		st, err := os.Stat(f)
		if err != nil {
			return mend(p.certFile, err)
		}
		stamps[i] = st.ModTime()
	}
	if p.cert != nil && stamps == p.stamps {
		return nil
	}
	p.stamps = stamps // also where they are bad, so that it is said once
	if err := durable.CheckPrivate(p.keyFile); err != nil {
		return fault.New(fault.Usage, "", "the key of %s: %w", p.certFile, err)
	}
	cert, err := tls.LoadX509KeyPair(p.certFile, p.keyFile)
	if err == nil {
		err = checkFor(p.name, &cert)
	}
	if err != nil {
		return mend(p.certFile, err)
	}
	p.cert = &cert
	return nil
}
