// Package mirror keeps a bastion's copies of the logs of other daemons, and
// witnesses them: what it has once stored of a log it never lets another version
// of that log replace. A checkpoint is countersigned (C2SP tlog-cosignature) when
// all that it covers is durable here and follows from what was here before. A log
// that was cut, rolled back, forked or begun anew is told of at once, and both
// signed checkpoints are kept as the proof.
//
// Whoever keeps the log may be hostile, and so may be all that comes from there:
// copies have a quota each, and nothing of theirs is let go to make room for more
// while it is young. Of all there is it dials only the witnesses of others that the
// configuration names. It must never countersign what it does not have, nor overwrite
// what it has. It stands on floor 2.
package mirror

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"filippo.io/torchwood"
	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// Alarm is that of a log which is not what its daemon has signed before.
const Alarm alarm.Kind = "mirror"

const (
	// DefaultQuota bounds the copy of one log with its sealed before-images, in
	// bytes: eight times what a daemon keeps of its own.
	DefaultQuota = 2 << 30
	// Retention is how long a generation stays at least, by when it was last
	// added to: whoever floods a log to have its beginning forgotten must keep
	// that up, against the alarm, for as long.
	Retention = 30 * 24 * time.Hour
)

// Options of the copies. All but Quota are required.
type Options struct {
	// Dir holds a folder for each log, STATEDIR/mirror.
	Dir string
	// Server is NAME.bastion, as which it countersigns with Key.
	Server string
	Key    ed25519.PrivateKey
	// Bundle returns the one in force, nil before there is any.
	Bundle func() *bundle.Bundle
	Now    func() time.Time
	// Quota is in place of DefaultQuota, where it is not 0.
	Quota int64
	// Raise takes alarms. It must not block.
	Raise func(alarm.Event)
	Log   zerolog.Logger
}

// Mirrors are the copies of one bastion. Their methods may be called concurrently.
type Mirrors struct {
	o      Options
	signer *torchwood.CosignatureSigner

	mu     sync.Mutex // guards all below
	copies map[string]*Copy
	// told are those who want to know when a copy has grown.
	told map[chan struct{}]struct{}
}

// Open reads the copies that are there. One that is damaged is told of, and does not
// keep the others from being used.
func Open(o Options) (*Mirrors, error) {
	if o.Quota == 0 {
		o.Quota = DefaultQuota
	}
	signer, err := torchwood.NewCosignatureSigner(logkey.WitnessName(o.Server), o.Key)
	if err != nil {
		return nil, err
	}
	m := &Mirrors{o: o, signer: signer, copies: map[string]*Copy{}, told: map[chan struct{}]struct{}{}}
	if err := durable.Dir(o.Dir); err != nil {
		return nil, fault.New(fault.Usage, "mend it, or name another stateDir", "copies of other logs: %w", err)
	}
	left, _ := filepath.Glob(filepath.Join(o.Dir, "*", sealedDir, onItsWay)) // of a process that was killed
	for _, name := range left {
		os.Remove(name)
	}
	entries, err := os.ReadDir(o.Dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.IsDir() && trust.ValidServer(e.Name()) {
			if _, err := m.Copy(e.Name()); err != nil {
				m.o.Log.Error().Str("log", e.Name()).Err(err).Msg("a copy of a log cannot be used")
			}
		}
	}
	return m, nil
}

// Copy returns the copy of a server's log, which may be empty.
func (m *Mirrors) Copy(origin string) (*Copy, error) {
	if !trust.ValidServer(origin) {
		return nil, fault.New(fault.Usage, "", "%.80q is not the name of a server", origin)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.copies[origin]; c != nil {
		return c, nil
	}
	c, err := m.open(origin)
	if err != nil {
		return nil, err
	}
	m.copies[origin] = c
	return c, nil
}

// Status is how a copy is.
type Status struct {
	Origin string
	// Events is how many the log had, as far as it is here.
	Events uint64
	// Lag is how long ago the copy was last known to be complete, 0: it is; -1: it
	// never was.
	Lag time.Duration
	// Problem says in one line what is wrong with the log, such as a fork; Trouble,
	// why it cannot be reached.
	Problem, Trouble string
}

// Status tells of all copies, in the order of their names.
func (m *Mirrors) Status() []Status {
	all := m.all()
	list := make([]Status, len(all))
	for i, c := range all {
		list[i] = c.Status()
	}
	return list
}

func (m *Mirrors) all() []*Copy {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.SortedFunc(maps.Values(m.copies), func(a, b *Copy) int { return strings.Compare(a.origin, b.origin) })
}

// Problem says what is wrong with the copy of a log, empty: nothing.
func (m *Mirrors) Problem(origin string) string {
	m.mu.Lock()
	c := m.copies[origin]
	m.mu.Unlock()
	if c == nil {
		return ""
	}
	return c.Status().Problem
}

// Changed returns a channel that gets a value when a copy has grown, until cancel
// is called.
func (m *Mirrors) Changed() (changed <-chan struct{}, cancel func()) {
	c := make(chan struct{}, 1)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.told[c] = struct{}{}
	return c, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.told, c)
	}
}

func (m *Mirrors) tell() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := range m.told {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// raise tells of a log in one line.
func (m *Mirrors) raise(origin, text string) {
	m.o.Raise(alarm.Event{Kind: Alarm, Text: neutral.LineMax("the log of "+origin+": "+text, 512)})
	m.o.Log.Error().Str("log", origin).Str("why", neutral.LineMax(text, 512)).Msg("a log is not what it was")
}

// Key reads the witness key in a file, and makes one where there is none.
func Key(file string) (ed25519.PrivateKey, error) {
	const kind = "PRIVATE KEY"
	mend := func(err error) (ed25519.PrivateKey, error) {
		return nil, fault.New(fault.Usage, "put it back, or remove it: countersignatures are then by a new key", "the witness key: %w", err)
	}
	if err := durable.CheckPrivate(file); errors.Is(err, fs.ErrNotExist) {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, err
		}
		if err := durable.Dir(filepath.Dir(file)); err != nil {
			return mend(err)
		}
		return key, durable.Write(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	} else if err != nil {
		return mend(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return mend(err)
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != kind || len(rest) > 0 {
		return mend(fmt.Errorf("%s is not one PEM block %s", file, kind))
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return mend(err)
	}
	private, ok := key.(ed25519.PrivateKey)
	if !ok {
		return mend(fmt.Errorf("%s holds no Ed25519 key", file))
	}
	return private, nil
}
