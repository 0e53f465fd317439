package cli

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/term"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/sshclient"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/version"
)

// fleet is what the bundle says, and what to log in with.
type fleet struct {
	app     *app
	bundles interface{ Current() *bundle.Bundle }
	store   *bundle.Store // nil: nothing newer can be kept
	clock   *trust.Clock
	servers *credential.Servers
	ring    *sshclient.Keyring
	login   sshclient.Login
	way     *way
	loose   sync.WaitGroup // connections that are being given up
}

// fixed is a bundle that nothing replaces.
type fixed struct{ b *bundle.Bundle }

func (f fixed) Current() *bundle.Bundle { return f.b }

// Subscribe returns a channel that nothing comes from.
func (f fixed) Subscribe() (<-chan struct{}, func()) { return nil, func() {} }

// bundleOf reads the bundle and the newer one that an agent has handed over
// since, if there is one. The file that the person names is never written.
func (a *app) bundleOf() (*fleet, error) {
	const next = "name it with --bundle or HALLIGAN_BUNDLE"
	path, err := filepath.EvalSymlinks(a.bundle)
	if err != nil {
		return nil, fault.New(fault.Usage, next, "the bundle cannot be read: %w", err)
	}
	data, err := readFile(path, bundle.MaxSize)
	if err != nil {
		return nil, fault.New(fault.Usage, next, "the bundle cannot be read: %w", err)
	}
	file, err := bundle.Parse(data)
	if err != nil {
		return nil, err
	}
	f := &fleet{app: a, clock: trust.NewClock(version.Built())}
	if state := a.state(file); state != "" {
		f.store, err = bundle.Open(bundle.Options{Path: path, State: state, Now: a.Now, Alarm: func(err error) { a.note("%s", fault.Of(err).Error()) }})
		if err == nil {
			f.bundles = f.store
		} else {
			f.store = nil
		}
	}
	if f.store == nil {
		// A folder that cannot be written, or a copy that somebody else may have
		// written, keeps nobody out; a bundle that others may write does.
		only, oerr := bundle.Open(bundle.Options{Path: path, Now: a.Now})
		if oerr != nil {
			return nil, oerr
		}
		if err != nil {
			a.note("newer bundles cannot be kept: %s", fault.Of(err).Message)
		}
		f.bundles = fixed{only.Current()}
	}
	f.clock.Raise(f.bundles.Current().Signed())
	f.servers = &credential.Servers{Bundle: f.bundles, Clock: f.clock, Warn: func(text string) { a.note("%s", text) }}
	return f, nil
}

// state returns where the newest bundle of a fleet is kept, "" without a home.
// It goes by the roots too: another fleet of the same name is another fleet.
func (a *app) state(file *bundle.File) string {
	base := a.stateHome()
	if file.Policy == nil || base == "" {
		return ""
	}
	var keys []string
	for _, k := range file.Policy.Roots.Keys {
		keys = append(keys, k.Fingerprint())
	}
	slices.Sort(keys)
	sum := sha256.Sum256([]byte(fmt.Sprint(file.Policy.Roots.Threshold, keys)))
	return filepath.Join(base, "halligan", file.Policy.Fleet+"-"+hex.EncodeToString(sum[:6]), "bundle")
}

// stateHome is where the user's programs keep what they need again, "" without a
// home.
func (a *app) stateHome() string {
	base := a.Env("XDG_STATE_HOME")
	if filepath.IsAbs(base) {
		return base
	}
	if base = a.Env("HOME"); base == "" {
		return ""
	}
	return filepath.Join(base, ".local", "state")
}

// open reads the bundle and finds what to log in with, once.
func (a *app) open() (*fleet, error) {
	if a.fleet != nil {
		return a.fleet, nil
	}
	f, err := a.bundleOf()
	if err != nil {
		return nil, err
	}
	if err = f.identify(); err == nil {
		f.way, err = f.newWay()
	}
	if err != nil {
		f.close()
		return nil, err
	}
	a.fleet = f
	return f, nil
}

func (f *fleet) close() {
	if f != nil {
		f.way.carry()
		f.loose.Wait()
		f.way.carry() // what agents have handed over
		f.loose.Wait()
		f.way.close()
		_ = f.ring.Close()
	}
}

// identify chooses what to log in with, and in which cluster.
func (f *fleet) identify() error {
	a, b := f.app, f.bundles.Current()
	role, err := a.role()
	if err != nil {
		return err
	}
	cluster := a.cluster
	if a.node != "" {
		host, err := f.find(a.node, a.cluster)
		if err != nil && !fault.Is(err, fault.Usage) {
			return err
		}
		cluster = host.Cluster // if one is meant; else what to log in with decides
	}
	if cluster != "" {
		if _, known := b.Inventory.Cluster(cluster); !known {
			return fault.New(fault.NotFound, "known are: "+strings.Join(clusters(b), ", "), "the bundle's inventory has no cluster %q", cluster)
		}
	}
	if f.ring, err = sshclient.Open(sshclient.Sources{File: a.identity, Agent: a.Env("SSH_AUTH_SOCK"), Passphrase: a.passphrase()}); err != nil {
		return err
	}
	f.login, err = f.ring.Choose(sshclient.Want{
		Role: role, Cluster: cluster, Now: f.clock.Now(), Grace: time.Duration(b.Policy.Grace),
		Authority: func(k gossh.PublicKey) bool {
			return slices.ContainsFunc(b.Policy.Authorities.User, func(ca bundle.Key) bool { return ca.Fingerprint() == gossh.FingerprintSHA256(k) })
		},
		Sealed: func(k gossh.PublicKey) (sshclient.Sealed, bool) {
			for _, s := range b.Policy.Sealed {
				if role, err := trust.ParseRole(s.Role); err == nil && s.Key.Fingerprint() == gossh.FingerprintSHA256(k) {
					return sshclient.Sealed{Person: s.Person, Role: role, Clusters: s.Clusters, NotBefore: s.NotBefore, NotAfter: s.NotAfter}, true
				}
			}
			return sshclient.Sealed{}, false
		},
	})
	if err != nil {
		return err
	}
	if f.login.Late {
		a.note("%s is valid from %s to %s; agents admit it for %s beyond that; renew it now: %s", f.login.Name(), stamp(f.login.NotBefore), stamp(f.login.NotAfter), time.Duration(b.Policy.Grace), f.renewal())
	}
	return nil
}

// renewal is the command that renews the certificate.
func (f *fleet) renewal() string {
	file := "KEY"
	if !strings.HasPrefix(f.login.From, "ssh-agent") {
		file = f.login.From
	}
	return "halligan ca renew " + file + "-cert.pub"
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func clusters(b *bundle.Bundle) (names []string) {
	for _, c := range b.Inventory.Clusters {
		names = append(names, c.Name)
	}
	return names
}

// find returns the node of that name. Where several clusters have one, those
// count that the credential is good for.
func (f *fleet) find(node, cluster string) (bundle.Host, error) {
	inv := f.bundles.Current().Inventory
	host, err := inv.Find(node, cluster)
	if cluster != "" || !fault.Is(err, fault.Usage) {
		return host, err
	}
	var fit []bundle.Host
	for _, c := range f.login.Clusters {
		if h, err := inv.Find(node, c); err == nil {
			fit = append(fit, h)
		}
	}
	if len(fit) == 1 {
		return fit[0], nil
	}
	return host, err
}

// clusterOf returns the cluster that a line without --cluster means: the only
// one of the bundle that the credential is good for.
func (f *fleet) clusterOf() (string, error) {
	if f.app.cluster != "" {
		return f.app.cluster, nil
	}
	var may []string
	for _, name := range clusters(f.bundles.Current()) {
		if slices.Contains(f.login.Clusters, name) {
			may = append(may, name)
		}
	}
	switch len(may) {
	case 0:
		return "", fault.New(fault.Unauthenticated, "name another key with --identity, or take the fleet's bundle with --bundle",
			"%s is for clusters %s, of which the bundle's inventory has none", f.login.Name(), strings.Join(f.login.Clusters, ", "))
	case 1:
		return may[0], nil
	}
	return "", fault.New(fault.Usage, "say which with --cluster: "+strings.Join(may, ", "), "%s is for %d clusters of the bundle", f.login.Name(), len(may))
}

// passphrase returns what asks for one: on the terminal of this process,
// wherever its input comes from; nil where nobody watches.
func (a *app) passphrase() func(file string) ([]byte, error) {
	if !a.InTTY && !a.ErrTTY {
		return nil
	}
	return func(file string) ([]byte, error) {
		tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
		if err != nil {
			return nil, errors.New("there is no terminal")
		}
		defer tty.Close()
		fmt.Fprintf(tty, "Passphrase of %s: ", neutral.Line(file))
		answer, err := term.ReadPassword(int(tty.Fd()))
		fmt.Fprintln(tty)
		return answer, err
	}
}
