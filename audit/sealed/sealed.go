// Package sealed keeps before-images readable when the node that took them is gone.
// The record of an action is encrypted (age) to the agents of the cluster, and to
// the offline keys that the policy names; bastions keep the files and can read
// none. An agent that is handed such a file checks everything itself before it
// believes a byte of it: see [Store.Take].
//
// It must never write what it opened anywhere, open for a file whose hash no log of
// an agent of this cluster has, or stand in the way of the action that is sealed.
// It stands on floor 2, like all of audit.
//
// # The file
//
// sealed/ACTION.age is an age v1 file for X25519 recipients, which stock age opens
// too. In it, compressed (gzip, RFC 1952), is the record of the action as the agent's
// journal has it: lines of JSON, first the plan ("intent"), then an "image" of each
// object. Its SHA-256 is in the event of the action's outcome, which tells what became
// of each object.
package sealed

import (
	"bufio"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"filippo.io/age"
	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

const (
	keyName = "age-key"
	folder  = "sealed"
	suffix  = ".age"
	// peersName is the file of the other agents' statements, so that a restart
	// while no bastion answers forgets nobody.
	peersName = "peers"
	// sentName is the file of which witness has what.
	sentName = "sent"

	defaultMaxBytes = 256 << 20
	// expireEvery is how often what is too old is looked for.
	expireEvery = time.Hour
)

var validAction = regexp.MustCompile(`^[0-9a-z][0-9a-z-]{0,63}$`)

// Name returns the path of an action's file in an evidence folder, with slashes.
func Name(action string) (string, error) {
	if !validAction.MatchString(action) {
		return "", fault.New(fault.Usage, "see: halligan history", "%.80q is not the ID of an action", action)
	}
	return folder + "/" + action + suffix, nil
}

// Options of a store.
type Options struct {
	// Dir is the audit folder, which must be there.
	Dir string
	// Server is this agent's name, NODE.CLUSTER.
	Server string
	// Bundle is the one in force; it may return nil for as long as there is none.
	Bundle func() *bundle.Bundle
	// MaxBytes bounds the files, default 256 MiB; the oldest go first.
	MaxBytes int64
	// Again records that an action, which stands on an intent, is sealed once more,
	// and returns when that is durable; nil: files stay as they are.
	Again func(action, intent, sum string) error
	// Now defaults to time.Now.
	Now func() time.Time
	Log zerolog.Logger
}

// Store is what an agent has sealed. Its methods may be called concurrently.
type Store struct {
	o       Options
	dir     string
	key     *age.X25519Identity
	keeping sync.WaitGroup
	work    chan struct{} // for keeps
	stop    chan struct{}
	passed  zerolog.Logger // of statements, which others choose how often to bring

	mu sync.Mutex // guards all below
	// peers are the other agents of the cluster, by name.
	peers map[string]peer
	// under is the bundle that vouched for all of them.
	under *bundle.Bundle
	// sent says by action which witnesses have its file, and which file that was.
	sent     map[string]sent
	watchers map[chan struct{}]bool
	problem  string
}

type peer struct {
	recipient *age.X25519Recipient
	log       ed25519.PublicKey
	signed    time.Time
	statement []byte
}

type sent struct {
	SHA256 string   `json:"sha256"`
	To     []string `json:"to"`
	// For are the recipients that can open it.
	For []string `json:"for"`
}

// Open opens the folder and the agent's own key in it, which is made where there is
// none. Files that others may look into are an error.
func Open(o Options) (*Store, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = defaultMaxBytes
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	s := &Store{o: o, dir: filepath.Join(o.Dir, folder), peers: map[string]peer{}, sent: map[string]sent{}, watchers: map[chan struct{}]bool{}, work: make(chan struct{}, 1), stop: make(chan struct{}),
		passed: o.Log.Sample(&zerolog.BurstSampler{Burst: 10, Period: time.Minute})}
	for _, d := range []string{o.Dir, s.dir} {
		if err := durable.Dir(d); err != nil {
			return nil, fmt.Errorf("opening the folder of sealed before-images: %w", err)
		}
	}
	var err error
	if s.key, err = openKey(filepath.Join(o.Dir, keyName)); err != nil {
		return nil, fmt.Errorf("the key that opens sealed before-images: %w", err)
	}
	left, _ := filepath.Glob(filepath.Join(s.dir, ".*.tmp")) // of a process that was killed
	for _, name := range left {
		os.Remove(name)
	}
	s.recall()
	s.expire()
	s.keeping.Go(s.keeps)
	return s, nil
}

// keeps removes what is too old, and seals once more what others must be able to
// open, until the store is closed.
func (s *Store) keeps() {
	for {
		select {
		case <-s.stop:
			return
		case <-s.work:
		case <-time.After(expireEvery):
			s.expire()
		}
		if err := s.again(); err != nil {
			s.o.Log.Warn().Str("problem", neutral.Line(err.Error())).Msg("before-images could not be sealed once more for those who joined")
		}
	}
}

// soon has keeps look.
func (s *Store) soon() {
	select {
	case s.work <- struct{}{}:
	default:
	}
}

// Close ends what keeps the files.
func (s *Store) Close() {
	close(s.stop)
	s.keeping.Wait()
}

func openKey(path string) (*age.X25519Identity, error) {
	err := durable.CheckPrivate(path)
	if errors.Is(err, fs.ErrNotExist) {
		key, err := age.GenerateX25519Identity()
		if err != nil {
			return nil, err
		}
		return key, durable.Write(path, []byte(key.String()+"\n"))
	}
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	key, err := age.ParseX25519Identity(strings.TrimSpace(string(data)))
	if err != nil {
		return nil, fmt.Errorf("%s holds no key of age", path) // its error could quote the key
	}
	return key, nil
}

// Recipient is what others seal to for this agent: age1….
func (s *Store) Recipient() string { return s.key.Recipient().String() }

// Meet takes over the statements of other agents, and returns how many of the
// cluster's are known now. What does not hold is passed over: a statement is of a
// node of this cluster that the inventory names, and the newest of each counts.
func (s *Store) Meet(statements [][]byte) int {
	b := s.o.Bundle()
	if b == nil {
		return 0
	}
	cluster := clusterOf(s.o.Server)
	nodes := map[string]bool{}
	for _, host := range b.Inventory.Nodes(cluster) {
		nodes[host.ID()] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	changed, tried := false, map[string]bool{}
	for _, data := range statements {
		// Whoever brings them can bring very many: one of each node is verified, if it
		// would count.
		claims, err := logkey.Parse(data)
		if known := s.peers[claims.Server]; err == nil && (claims.Server == s.o.Server || tried[claims.Server] || !claims.Signed.After(known.signed)) {
			continue
		}
		var st logkey.Statement
		if err == nil && nodes[claims.Server] {
			tried[claims.Server] = true
			st, err = logkey.Verify(data, b, s.o.Now())
		}
		if err == nil && !nodes[claims.Server] {
			err = fmt.Errorf("the inventory has no node %s in cluster %s", claims.Server, cluster)
		}
		var recipient *age.X25519Recipient
		if err == nil {
			recipient, err = age.ParseX25519Recipient(st.Age)
		}
		if err != nil {
			s.passed.Warn().Str("problem", neutral.Line(err.Error())).Msg("the statement of another agent is passed over")
			continue
		}
		s.peers[st.Server], changed = peer{recipient, st.Log, st.Signed, slices.Clone(data)}, true
	}
	for server := range s.peers {
		if !nodes[server] { // it left the cluster
			delete(s.peers, server)
			changed = true
		}
	}
	if changed {
		s.soon()
		var all [][]byte
		for _, server := range slices.Sorted(maps.Keys(s.peers)) {
			all = append(all, s.peers[server].statement)
		}
		s.remember(peersName, all)
	}
	return len(s.peers)
}

// met reports whether a server's log has the key by which it was met.
func (s *Store) met(st logkey.Statement) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	known, ok := s.peers[st.Server]
	return ok && known.log.Equal(st.Log)
}

// Peers returns the names of the agents that are sealed to, beside this one.
func (s *Store) Peers() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.peers))
}

// recall reads what an earlier process knew. It is a cache: what cannot be read is
// learnt again.
func (s *Store) recall() {
	if data, err := os.ReadFile(filepath.Join(s.o.Dir, sentName)); err == nil {
		_ = json.Unmarshal(data, &s.sent)
	}
	if s.sent == nil {
		s.sent = map[string]sent{}
	}
	s.recallPeers()
}

func (s *Store) recallPeers() {
	var statements [][]byte
	if data, err := os.ReadFile(filepath.Join(s.o.Dir, peersName)); err == nil && json.Unmarshal(data, &statements) == nil {
		s.Meet(statements)
	}
}

func (s *Store) remember(name string, value any) {
	data, err := json.Marshal(value)
	if err == nil {
		err = durable.Write(filepath.Join(s.o.Dir, name), data)
	}
	if err != nil {
		s.o.Log.Warn().Str("problem", neutral.Line(err.Error())).Msg("what sealed before-images need to know could not be kept")
	}
}

// recipients are all that a file is sealed to: this agent, the others, and the
// policy's offline keys.
func (s *Store) recipients() (all []age.Recipient, names []string) {
	add := func(r *age.X25519Recipient) {
		if !slices.Contains(names, r.String()) {
			all, names = append(all, r), append(names, r.String())
		}
	}
	add(s.key.Recipient())
	b := s.o.Bundle()
	s.mu.Lock()
	forgotten := len(s.peers) == 0 && b != nil
	s.mu.Unlock()
	if forgotten {
		s.recallPeers() // there was no bundle yet when the process began
	}
	s.mu.Lock()
	s.doubt(b)
	for _, server := range slices.Sorted(maps.Keys(s.peers)) {
		add(s.peers[server].recipient)
	}
	s.mu.Unlock()
	if b != nil {
		for _, r := range b.Policy.Recovery {
			add(r.X25519Recipient)
		}
	}
	return all, names
}

// doubt forgets, under another bundle, whom that does not vouch for: nothing more is
// sealed to who was revoked since. s.mu is held.
func (s *Store) doubt(b *bundle.Bundle) {
	if b == nil || b == s.under {
		return
	}
	s.under = b
	for server, p := range s.peers {
		if _, err := logkey.Verify(p.statement, b, s.o.Now()); err != nil {
			s.o.Log.Warn().Str("problem", neutral.Line(err.Error())).Msg("before-images are not sealed for " + server + " any more")
			delete(s.peers, server)
		}
	}
}

// Seal seals the record of an action, up to its last before-image, and returns the
// SHA-256 of the file in hex when it is durable. Sealing again replaces the file.
func (s *Store) Seal(action string, record io.Reader) (sum string, err error) {
	to, names := s.recipients()
	tmp, sum, err := s.create(action, func(w io.Writer) error { return write(w, record, to) })
	if err == nil {
		err = s.store(tmp, action, sent{SHA256: sum, For: names})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.problem = ""
	if err != nil {
		err = fmt.Errorf("sealing before-images: %w", err)
		s.problem = neutral.Line(err.Error())
		return "", err
	}
	return sum, nil
}

// create writes a file beside its name, and returns its hash when it is durable.
func (s *Store) create(action string, fill func(io.Writer) error) (name, sum string, err error) {
	if _, err := Name(action); err != nil {
		return "", "", err
	}
	tmp, err := os.CreateTemp(s.dir, "."+action+".*.tmp")
	if err != nil {
		return "", "", err
	}
	hash := sha256.New()
	buffered := bufio.NewWriterSize(io.MultiWriter(tmp, hash), 64<<10)
	if err = fill(buffered); err == nil {
		err = errors.Join(buffered.Flush(), tmp.Sync())
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		os.Remove(tmp.Name())
	}
	return tmp.Name(), hex.EncodeToString(hash.Sum(nil)), err
}

// store gives a file its name, and tells those who carry it to others.
func (s *Store) store(tmp, action string, of sent) error {
	err := os.Rename(tmp, filepath.Join(s.dir, action+suffix))
	if err == nil {
		err = durable.SyncDir(s.dir)
	}
	if err != nil {
		os.Remove(tmp)
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent[action] = of
	s.bound()
	s.wake()
	return nil
}

// recent is how old what was sealed may be to be sealed once more.
const recent = 48 * time.Hour

// again seals once more what somebody could not open who now should: an agent that
// joined or has another key, a new offline key. The log has the new hash before the
// new file takes the place of the old one.
func (s *Store) again() error {
	if s.o.Again == nil || s.o.Bundle() == nil {
		return nil
	}
	files, err := list(s.dir)
	if err != nil {
		return err
	}
	changed := false
	for _, f := range files {
		action := strings.TrimSuffix(f.Name(), suffix)
		to, names := s.recipients()
		s.mu.Lock()
		was := s.sent[action].For
		s.mu.Unlock()
		missing := slices.ContainsFunc(names, func(name string) bool { return !slices.Contains(was, name) })
		select {
		case <-s.stop:
			return nil
		default:
		}
		if !missing || s.o.Now().Sub(f.ModTime()) > recent {
			continue
		}
		changed = true
		if err := s.resealed(f, action, to, names); err != nil {
			return err
		}
	}
	if changed {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.remember(sentName, s.sent)
	}
	return nil
}

func (s *Store) resealed(file fs.FileInfo, action string, to []age.Recipient, names []string) error {
	f, err := os.Open(filepath.Join(s.dir, action+suffix))
	if err != nil {
		return err
	}
	defer f.Close()
	packed, intent, err := unpack(f, s.key)
	if err != nil {
		return err
	}
	tmp, sum, err := s.create(action, func(w io.Writer) error { return encrypt(w, packed, to) })
	if err != nil {
		return err
	}
	// It expires when it would have.
	if err = os.Chtimes(tmp, time.Time{}, file.ModTime()); err == nil {
		err = s.o.Again(action, intent, sum)
	}
	if err != nil {
		os.Remove(tmp)
		return err
	}
	return s.store(tmp, action, sent{SHA256: sum, For: names})
}

// Problem says why the last file could not be stored; empty: it was.
func (s *Store) Problem() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.problem
}

// File is a sealed file that a witness does not have yet.
type File struct{ Action, SHA256, Path string }

// Unsent returns the files that the witness has not said to have, oldest first.
func (s *Store) Unsent(witness string) (files []File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, action := range slices.Sorted(maps.Keys(s.sent)) {
		if of := s.sent[action]; !slices.Contains(of.To, witness) {
			files = append(files, File{action, of.SHA256, filepath.Join(s.dir, action+suffix)})
		}
	}
	return files
}

// Stored notes that a witness has made a file durable.
func (s *Store) Stored(witness, action, sum string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	of, ok := s.sent[action]
	if !ok || of.SHA256 != sum || slices.Contains(of.To, witness) {
		return
	}
	of.To = append(slices.Clone(of.To), witness)
	s.sent[action] = of
	s.remember(sentName, s.sent)
}

// Changed returns a channel that is sent to when there is another file, and a
// function that ends that.
func (s *Store) Changed() (<-chan struct{}, func()) {
	c := make(chan struct{}, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watchers[c] = true
	return c, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, c)
	}
}

// wake tells all watchers; s.mu is held.
func (s *Store) wake() {
	for c := range s.watchers {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// Before is when what is too old by now was made. There is no such time, and ok is
// false, while the bundle is not fresh: then it is the clock that may be wrong, and
// before-images that are gone do not come back.
func Before(b *bundle.Bundle, now time.Time) (at time.Time, ok bool) {
	if b == nil || !b.Fresh(now) {
		return time.Time{}, false
	}
	return now.Add(-time.Duration(b.Policy.KeepImages)), true
}

// expire removes what is too old, or more than there is room for.
func (s *Store) expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	if at, ok := Before(s.o.Bundle(), s.o.Now()); ok {
		_, err = Expire(s.o.Dir, at)
	}
	if err != nil {
		s.o.Log.Warn().Str("problem", neutral.Line(err.Error())).Msg("before-images that are too old could not be removed")
	}
	s.bound()
}

// bound removes the oldest files beyond what may be kept, and forgets what is not
// there; s.mu is held.
func (s *Store) bound() {
	files, err := list(s.dir)
	if err != nil {
		return
	}
	var used int64
	for _, f := range files {
		used += f.Size()
	}
	for len(files) > 0 && used > s.o.MaxBytes {
		if os.Remove(filepath.Join(s.dir, files[0].Name())) != nil {
			break
		}
		used -= files[0].Size()
		files = files[1:]
	}
	there := map[string]bool{}
	for _, f := range files {
		action := strings.TrimSuffix(f.Name(), suffix)
		if there[action] = true; s.sent[action].SHA256 == "" { // the list of what was sent is lost
			if sum, err := hashOf(filepath.Join(s.dir, f.Name())); err == nil {
				s.sent[action] = sent{SHA256: sum}
			}
		}
	}
	maps.DeleteFunc(s.sent, func(action string, _ sent) bool { return !there[action] })
}

func hashOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	hash := sha256.New()
	_, err = io.Copy(hash, f)
	return hex.EncodeToString(hash.Sum(nil)), err
}

// Expire removes the sealed files of an evidence folder, be it a copy, that were
// last written before a time, and returns how many. It is no error that there are
// none.
func Expire(dir string, before time.Time) (removed int, err error) {
	dir = filepath.Join(dir, folder)
	files, err := list(dir)
	for _, f := range files {
		if !f.ModTime().Before(before) {
			break
		}
		if rerr := os.Remove(filepath.Join(dir, f.Name())); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
			continue
		}
		removed++
	}
	return removed, err
}

// list returns the sealed files, oldest first.
func list(dir string) (files []fs.FileInfo, err error) {
	names, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, n := range names {
		action, ok := strings.CutSuffix(n.Name(), suffix)
		if !ok || !validAction.MatchString(action) || !n.Type().IsRegular() {
			continue
		}
		if st, err := n.Info(); err == nil {
			files = append(files, st)
		}
	}
	slices.SortFunc(files, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	return files, err
}

func clusterOf(server string) string { return server[strings.LastIndexByte(server, '.')+1:] }
