// Package journal keeps one durable file per action: the plan, the stored bytes
// of every object before it is changed, what was written, and the outcome. It is
// what undo works from and what tells, after a crash, what was under way.
//
// The order of calls is the order of safety: Begin writes the intent; Images
// returns when the intent and those objects' bytes are on disk, and only then may
// the object be written; Wrote notes a write; Finish makes the outcome durable.
// Whatever lies between an image and the end of a file without an outcome may or
// may not have happened, and only etcd can tell: see Unfinished.
//
// Files are JSON lines, readable with nothing but a pager, each with a checksum.
// A last line without its newline was never acknowledged and is ignored: at
// worst, if it is rot, the action is settled once more. Any other damage is an
// error, met where the line is read; it takes that one record, not the journal,
// since nobody must be locked out by an old file. Values are the raw bytes of
// etcd, so what was encrypted stays so.
//
// A full disk does not end it: some small records are set aside for people who may
// break glass, see Refill.
//
// It must never talk to etcd, and never remove a file whose action is not
// settled. It stands on floor 4, below agent/action.
package journal

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

const (
	suffix = ".jsonl"
	// headroom stays free on the file system beyond what an action reserves,
	// so that outcomes of actions under way can still be written.
	headroom = 4 << 20
	// smallRecord is the most that an action on a few objects reserves.
	smallRecord = 1 << 20
	// lineOverhead is what an image or a note takes beside its value.
	lineOverhead = 512
)

// Options bound the journal.
type Options struct {
	// MaxBytes is the most that records of actions may take on disk; beyond
	// it the oldest settled ones are removed. Default 2 GiB.
	MaxBytes int64
	// Keep is how long a settled action is kept at least, whatever MaxBytes
	// says; it should not be less than the time in which an undo is allowed.
	// Default 48 h.
	Keep time.Duration
}

// Journal is the folder of actions. Its methods may be called concurrently.
type Journal struct {
	dir  string
	opts Options

	mu sync.Mutex // guards all below
	// lock holds the folder; while it is nil problem says why the folder could
	// not be opened.
	lock    *os.File
	problem error
	// entries is the index, oldest first: by time, then by identifier.
	entries []*Entry
	// undone names for each action that was taken back the one that did it.
	undone map[string]string
	open   map[string]*Action
	// slots are the files that are kept for a full disk.
	slots []string
}

// Entry is the index line of one action.
type Entry struct {
	ID, Action, Actor, Reason, Incident, Summary string
	Undoes                                       string
	Time                                         time.Time
	// Result is empty while the action is not settled, and Damaged where the
	// record cannot be read; Summary then says why, and most is missing.
	Result  string
	Objects int
	Applied int
	Bytes   int64
	Access
}

// Access is how the actor came in, and by whose leave where the actor's own role
// is not enough. It stands on the line of the intent and is durable with it, so
// that an approval cannot be used twice.
type Access struct {
	// Door is console, ssh or grpc; Source the peer's IP:PORT.
	Door   string `json:"door,omitempty"`
	Source string `json:"source,omitempty"`
	// Credential is what vouched for the actor: its kind, the fingerprint of
	// the key and the serial of the certificate.
	Credential string `json:"credential,omitempty"`
	// ApprovedBy are those who signed the plan, and Nonce is what they signed it
	// with.
	ApprovedBy []Approval `json:"approvedBy,omitempty"`
	Nonce      string     `json:"nonce,omitempty"`
	// Alone says that it was done without the approvals that it needs.
	Alone bool `json:"alone,omitempty"`
	// Intent is the event of the evidence log that the action stands on, Session the
	// connection that it came by; Drill is set by the actor's credential.
	Intent  string `json:"intent,omitempty"`
	Session string `json:"session,omitempty"`
	Drill   bool   `json:"drill,omitempty"`
	// BreakGlass lets the record take what is kept for a full disk. It is not
	// recorded.
	BreakGlass bool `json:"-"`
}

// Approval is one signature that let an action happen.
type Approval struct {
	Person string `json:"person"`
	// Fingerprint is that of the key (SHA256:...), Serial the certificate's.
	Fingerprint string `json:"fingerprint"`
	Serial      string `json:"serial,omitempty"`
}

// Damaged is the result of a record that cannot be read. It is never removed.
const Damaged = "damaged"

// Image is what an object was before it is changed, and how to recognise the
// change afterwards.
type Image struct {
	// Index of the object in the plan.
	Index int    `json:"index"`
	Key   string `json:"key"`
	UID   string `json:"uid,omitempty"`
	// Revision that the write compares with; 0: the key does not exist yet.
	Revision int64 `json:"revision"`
	// Since is a revision of etcd at which the write had not happened.
	Since int64 `json:"since"`
	Lease int64 `json:"lease,omitempty"`
	// Value holds the stored bytes; nil where the key does not exist yet.
	Value []byte `json:"value,omitempty"`
	// ValueSHA256 tells whether Value is what etcd held; Images fills it in.
	ValueSHA256 []byte `json:"valueSHA256,omitempty"`
	// Delete says that the write removes the key; else AfterSHA256 is the hash
	// of the stored bytes that it leaves.
	Delete      bool             `json:"delete,omitempty"`
	AfterSHA256 []byte           `json:"afterSHA256,omitempty"`
	Changes     []storage.Change `json:"changes,omitempty"`
}

// Note says what became of one object.
type Note struct {
	Index    int    `json:"index"`
	Revision int64  `json:"revision,omitempty"`
	Outcome  string `json:"outcome"`
	Error    string `json:"error,omitempty"`
	// Settled says that a deletion was found out afterwards from etcd's
	// history, which does not tell whose it was. (Bytes that were written can
	// be recognised.)
	Settled bool `json:"settled,omitempty"`
}

// line is one line of a file; exactly one member is set, but for Access, which
// stands beside an intent.
type line struct {
	Intent  json.RawMessage `json:"intent,omitempty"`
	Access  *Access         `json:"access,omitempty"`
	Image   *Image          `json:"image,omitempty"`
	Note    *Note           `json:"note,omitempty"`
	Outcome *outcome        `json:"outcome,omitempty"`
}

type outcome struct {
	Result  string    `json:"result"`
	Time    time.Time `json:"time"`
	Applied int       `json:"applied"`
	Error   string    `json:"error,omitempty"`
	Settled bool      `json:"settledAfterRestart,omitempty"`
}

// fits reports whether the outcome can be one of the plan.
func (o *outcome) fits(plan *halliganv1.Plan) bool {
	return o.Result != "" && o.Applied >= 0 && o.Applied <= len(plan.Objects)
}

// Open makes or opens the journal in dir/actions. One process at a time may
// hold it. Folders and records that others may look into are an error. A file
// system that is full, read-only or failing is none, since reading the cluster
// needs no records: see Ready.
func Open(dir string, o Options) (*Journal, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = 2 << 30
	}
	if o.Keep == 0 {
		o.Keep = 48 * time.Hour
	}
	j := &Journal{dir: filepath.Join(dir, "actions"), opts: o, undone: map[string]string{}, open: map[string]*Action{}}
	if j.problem = j.attach(); j.problem != nil && !slices.ContainsFunc(ailing, func(e error) bool { return errors.Is(j.problem, e) }) {
		return nil, j.problem
	}
	return j, nil
}

// ailing are the errors of a file system, not of what somebody put there.
var ailing = []error{unix.EROFS, unix.ENOSPC, unix.EDQUOT, unix.EIO, unix.EUCLEAN, unix.ESTALE, unix.ENODEV, unix.ENXIO, unix.ETIMEDOUT}

// Ready opens the folder if that failed before, and returns why it cannot be
// opened now. Until it can there are no entries, and nothing can be begun.
func (j *Journal) Ready() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.problem != nil {
		j.problem = j.attach()
	}
	return j.problem
}

// attach opens the folder and reads the index; j.mu is held.
func (j *Journal) attach() error {
	dir := filepath.Dir(j.dir)
	for _, d := range []string{dir, j.dir} {
		if err := durable.Dir(d); err != nil {
			return unavailable("opening the state folder", err)
		}
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDONLY|os.O_CREATE, 0o600)
	if err != nil {
		return unavailable("locking the state folder", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return fault.New(fault.Failed, "stop the other agent first", "state folder %s is held by another process: %w", dir, err)
	}
	if err := j.load(); err != nil {
		lock.Close()
		j.entries, j.slots = nil, nil
		clear(j.undone)
		return err
	}
	j.lock = lock
	return nil
}

// Close releases the folder. Actions under way stay unfinished.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.lock == nil {
		return nil
	}
	for _, a := range j.open {
		a.file.Close()
	}
	return j.lock.Close()
}

func (j *Journal) load() error {
	names, err := os.ReadDir(j.dir)
	if err != nil {
		return unavailable("reading the state folder", err)
	}
	for _, n := range names {
		if isSlot(n.Name()) {
			j.found(n)
			continue
		}
		id, ok := strings.CutSuffix(n.Name(), suffix)
		if !ok || !validID.MatchString(id) || !n.Type().IsRegular() {
			continue // not the journal's
		}
		if err := durable.CheckPrivate(j.path(id)); err != nil {
			return fault.New(fault.AuditUnavailable, "mend or move the file away", "record: %w", err)
		}
		e, err := j.index(id)
		if err != nil {
			e = &Entry{ID: id, Result: Damaged, Summary: fault.Of(err).Message}
			if st, err := n.Info(); err == nil {
				e.Time, e.Bytes = st.ModTime(), st.Size()
			}
		}
		if e == nil {
			// Cut off before its intent was whole: nothing was acknowledged,
			// so nothing happened. It may stay where nothing can be removed.
			_ = os.Remove(j.path(id))
			continue
		}
		j.entries = append(j.entries, e)
	}
	slices.SortFunc(j.entries, byTime)
	for _, e := range j.entries {
		j.settled(e)
	}
	return nil
}

// byTime orders entries. Identifiers begin with the time, but tell seconds only.
func byTime(a, b *Entry) int {
	return cmp.Or(a.Time.Compare(b.Time), strings.Compare(a.ID, b.ID))
}

// settled takes an entry that has its result into the index of undos.
func (j *Journal) settled(e *Entry) {
	if e.Undoes != "" && e.Result == Applied {
		j.undone[e.Undoes] = e.ID
	}
}

// UndoneBy returns the action that took the given one back, "" where none did.
func (j *Journal) UndoneBy(id string) string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.undone[id]
}

// index makes the index line of one file; nil when nothing in it was ever
// acknowledged. A settled file is read at its two ends only, so that starting
// stays fast however much the images weigh; an unfinished one is read whole.
func (j *Journal) index(id string) (*Entry, error) {
	if e, err := j.ends(id); e != nil || err != nil {
		return e, err
	}
	r, err := j.scan(id, func(line, int64) error { return nil })
	if err != nil || r.Plan == nil {
		return nil, err
	}
	e := entryOf(r.Plan, r.Access)
	e.Result, e.Applied, e.Bytes = r.Result, r.Applied, r.bytes
	return e, nil
}

// ends returns the entry of a file whose last line is an outcome, else nil.
func (j *Journal) ends(id string) (*Entry, error) {
	f, err := os.Open(j.path(id))
	if err != nil {
		return nil, unavailable("reading a record", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, unavailable("reading a record", err)
	}
	tail := make([]byte, min(st.Size(), 8<<10))
	if _, err := f.ReadAt(tail, st.Size()-int64(len(tail))); err != nil || len(tail) == 0 || tail[len(tail)-1] != '\n' {
		return nil, nil
	}
	tail = tail[:len(tail)-1]
	start := bytes.LastIndexByte(tail, '\n') + 1
	if start == 0 {
		return nil, nil
	}
	last, err := unseal(tail[start:])
	if err != nil || last.Outcome == nil {
		return nil, nil
	}
	raw, err := newLineReader(f).next()
	if err != nil {
		return nil, nil
	}
	first, err := unseal(raw)
	plan := &halliganv1.Plan{}
	if err != nil || protojson.Unmarshal(first.Intent, plan) != nil || plan.Id != id || !last.Outcome.fits(plan) {
		return nil, nil // damaged: the whole scan says how
	}
	e := entryOf(plan, first.access())
	e.Result, e.Applied, e.Bytes = last.Outcome.Result, last.Outcome.Applied, st.Size()
	return e, nil
}

func entryOf(p *halliganv1.Plan, access Access) *Entry {
	return &Entry{ID: p.Id, Action: p.Action, Actor: p.Actor, Reason: p.Reason, Incident: p.Incident, Summary: p.Summary,
		Undoes: p.Undoes, Time: p.Created.AsTime(), Objects: len(p.Objects), Access: access}
}

func (a Access) empty() bool {
	return reflect.DeepEqual(a, Access{})
}

func (l line) access() Access {
	if l.Access == nil {
		return Access{}
	}
	return *l.Access
}

func (j *Journal) path(id string) string { return filepath.Join(j.dir, id+suffix) }

var validID = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)

// Check reports whether an action that needs that many bytes could be recorded
// now, without recording anything.
func (j *Journal) Check(bytes int64) error {
	if err := j.Ready(); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(j.dir, &st); err != nil {
		return unavailable("looking at the state folder", err)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return unavailable("looking at the state folder", unix.EROFS)
	}
	if err := unix.Access(j.dir, unix.W_OK|unix.X_OK); err != nil {
		return unavailable("looking at the state folder", err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < bytes+headroom {
		return fault.New(fault.AuditUnavailable, "free space below "+filepath.Dir(j.dir)+" or choose fewer objects",
			"state folder has %d MiB free; recording this action needs %d MiB", free>>20, (bytes+headroom)>>20+1)
	}
	return nil
}

// Space returns the free bytes of the file system and the bytes taken.
func (j *Journal) Space() (free, used int64) {
	var st unix.Statfs_t
	if unix.Statfs(j.dir, &st) == nil {
		free = int64(st.Bavail) * st.Bsize
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, e := range j.entries {
		used += e.Bytes
	}
	return free, used
}

// Action is a record being written. Its methods may be called concurrently.
type Action struct {
	j     *Journal
	entry *Entry
	file  *os.File
	// reserved: blocks beyond what is written are set aside, as those of a slot are.
	reserved, slot bool

	mu      sync.Mutex // guards all below
	written int64      // bytes appended
	synced  int64      // bytes known to be on disk
	syncing bool
	named   bool // the folder holds the file's name durably
	failed  error
	done    sync.Cond
}

// Begin starts the record of a plan, with room for the values of its objects
// set aside so that it can be brought to its end. It is durable with the first
// Images. Any error is fault.AuditUnavailable, or fault.Refused where the
// approvals were used before, and leaves nothing behind.
func (j *Journal) Begin(access Access, plan *halliganv1.Plan, valueBytes int64) (_ *Action, err error) {
	if !validID.MatchString(plan.Id) {
		return nil, fmt.Errorf("action id %q is malformed", plan.Id)
	}
	intent, err := api.CanonicalJSON(plan)
	if err != nil {
		return nil, err
	}
	// Base64 makes four bytes of three; every object has an image and a note.
	reserve := int64(len(intent)) + valueBytes*4/3 + int64(len(plan.Objects))*2*lineOverhead + 4096
	if err := j.Ready(); err != nil {
		return nil, err
	}
	if used := j.approvedBefore(access.Nonce); used != "" {
		return nil, fault.New(fault.Refused, "plan again, and have that approved", "these approvals were used already, by %s", used)
	}
	if err := j.makeRoom(reserve); err != nil {
		return nil, err
	}
	f, slot, err := j.create(access, plan.Id, reserve)
	if err != nil {
		return nil, err
	}
	access.BreakGlass = false
	a := &Action{j: j, entry: entryOf(plan, access), file: f, slot: slot, named: slot}
	a.entry.Bytes = reserve // until it is known what it takes
	a.done.L = &a.mu
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(j.path(plan.Id))
		}
	}()
	// Blocks set aside now cannot run out later. Where the file system cannot
	// do it, the check above has to be enough.
	// What a small one needs is within the headroom that the check leaves.
	if a.reserved = slot || reserve > headroom/16; a.reserved && !slot {
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, reserve); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return nil, unavailable("setting room aside for the record", err)
		}
	}
	first := line{Intent: intent}
	if !access.empty() {
		first.Access = &access
	}
	if err := a.append(first); err != nil {
		return nil, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.open[plan.Id] = a
	i, _ := slices.BinarySearchFunc(j.entries, a.entry, byTime)
	j.entries = slices.Insert(j.entries, i, a.entry)
	return a, nil
}

// create makes the file of a record, or takes a slot for it.
func (j *Journal) create(access Access, id string, reserve int64) (f *os.File, slot bool, err error) {
	if err = j.Check(reserve); err == nil {
		if f, err = os.OpenFile(j.path(id), os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600); err == nil {
			return f, false, nil
		}
		err = unavailable("recording the intent", err)
	}
	if f, serr := j.slot(access, id, reserve); serr == nil {
		return f, true, nil
	}
	return nil, false, err
}

// approvedBefore returns the action that used the approvals of the nonce, "" where
// none did.
func (j *Journal) approvedBefore(nonce string) string {
	j.mu.Lock()
	defer j.mu.Unlock()
	if i := slices.IndexFunc(j.entries, func(e *Entry) bool { return nonce != "" && e.Nonce == nonce }); i >= 0 {
		return j.entries[i].ID
	}
	return ""
}

// Images makes the intent and these images durable. Only after it returned nil
// may the objects be written.
func (a *Action) Images(images ...Image) error {
	for _, img := range images {
		if img.Value != nil {
			sum := sha256.Sum256(img.Value)
			img.ValueSHA256 = sum[:]
		}
		if err := a.append(line{Image: &img}); err != nil {
			return err
		}
	}
	return a.sync()
}

// Wrote notes what became of an object. It is durable with the next Images or
// with Finish; lost to a crash, it is found out again from etcd.
func (a *Action) Wrote(n Note) error {
	if err := a.append(line{Note: &n}); err != nil {
		return err
	}
	if n.Outcome == Applied {
		a.j.mu.Lock()
		a.entry.Applied++
		a.j.mu.Unlock()
	}
	return nil
}

// Applied is the outcome of an object that was changed as planned, and the result
// of an action whose objects all were.
const Applied = "applied"

// Finish makes the outcome durable and closes the record.
func (a *Action) Finish(result, problem string) error { return a.finish(result, problem, false) }

func (a *Action) finish(result, problem string, settled bool) error {
	a.j.mu.Lock()
	applied := a.entry.Applied
	a.j.mu.Unlock()
	err := a.append(line{Outcome: &outcome{Result: result, Time: time.Now().UTC(), Applied: applied, Error: problem, Settled: settled}})
	if err == nil {
		err = a.sync()
	}
	if a.reserved { // give back what was not used
		if cerr := a.file.Truncate(a.written); err == nil && cerr != nil {
			err = unavailable("closing the record", cerr)
		}
	}
	a.file.Close()
	a.j.mu.Lock()
	defer a.j.mu.Unlock()
	delete(a.j.open, a.entry.ID)
	a.entry.Bytes = a.written
	if err == nil {
		a.entry.Result = result
		a.j.settled(a.entry)
	}
	return err
}

// Abandon removes a record whose action did nothing at all: its intent was
// written, but no object was touched.
func (a *Action) Abandon() error {
	a.j.mu.Lock()
	defer a.j.mu.Unlock()
	err := errNoSlot
	if a.slot {
		err = a.giveBack()
	}
	a.file.Close()
	if err != nil {
		err = os.Remove(a.j.path(a.entry.ID))
	}
	delete(a.j.open, a.entry.ID)
	a.j.entries = slices.DeleteFunc(a.j.entries, func(e *Entry) bool { return e == a.entry })
	return err
}

func (a *Action) append(l line) error {
	data, err := seal(l)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.failed != nil {
		return a.failed
	}
	if a.slot {
		return a.appendSlot(data)
	}
	n, err := a.file.Write(data)
	if err != nil {
		// Cut what was written of the line, so that the next one is whole.
		if n > 0 {
			if terr := a.file.Truncate(a.written); terr != nil {
				a.failed = unavailable("recording", terr)
			}
		}
		return unavailable("recording", err)
	}
	a.written += int64(n)
	return nil
}

// sync brings everything appended so far to disk. Callers that wait at the same
// time share one fsync. After a failed fsync nothing can be known of what is on
// disk, so the record takes no more.
func (a *Action) sync() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	want := a.written
	for {
		switch {
		case a.failed != nil:
			return a.failed
		case a.synced >= want:
			return nil
		case a.syncing:
			a.done.Wait()
			continue
		}
		a.syncing = true
		target, named := a.written, a.named
		a.mu.Unlock()
		name := make(chan error, 1)
		if named {
			name <- nil
		} else { // both at once: they end in the same commit of the file system
			go func() { name <- durable.SyncDir(a.j.dir) }()
		}
		err := errors.Join(unix.Fdatasync(int(a.file.Fd())), <-name)
		a.mu.Lock()
		a.syncing = false
		if err != nil {
			a.failed = unavailable("making the record durable", err)
		} else {
			a.synced, a.named = target, true
		}
		a.done.Broadcast()
	}
}

// makeRoom removes the oldest settled records beyond what may be kept.
func (j *Journal) makeRoom(reserve int64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	// Large actions leave a sixteenth to small ones, so that a clean-up of
	// thousands of objects cannot close the door to what comes after it.
	most := j.opts.MaxBytes
	if reserve > smallRecord {
		most -= most / 16
	}
	used := reserve
	for _, e := range j.entries {
		used += e.Bytes
	}
	for i := 0; used > most && i < len(j.entries); {
		e := j.entries[i]
		if e.Result == "" || e.Result == Damaged || time.Since(e.Time) < j.opts.Keep {
			i++
			continue
		}
		if err := j.drop(i); err != nil {
			return err
		}
		used -= e.Bytes
	}
	if used > most {
		return fault.New(fault.AuditUnavailable, "choose fewer objects, or raise journalMaxBytes in the agent's configuration",
			"records of actions may take %d MiB and none is old enough to be removed", j.opts.MaxBytes>>20)
	}
	return nil
}

// drop removes a settled record; j.mu is held.
func (j *Journal) drop(i int) error {
	e := j.entries[i]
	if err := os.Remove(j.path(e.ID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return unavailable("removing the oldest record", err)
	}
	if j.undone[e.Undoes] == e.ID {
		delete(j.undone, e.Undoes)
	}
	j.entries = slices.Delete(j.entries, i, i+1)
	return nil
}

// Expire removes the settled records of actions before a time, whose before-images
// are kept no longer, and returns how many. What was done is in the evidence log.
func (j *Journal) Expire(before time.Time) (removed int, err error) {
	if before = earlier(before, time.Now().Add(-j.opts.Keep)); j.Ready() != nil {
		return 0, nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for i := 0; i < len(j.entries) && j.entries[i].Time.Before(before); {
		if e := j.entries[i]; e.Result == "" || e.Result == Damaged {
			i++
			continue
		}
		if err := j.drop(i); err != nil {
			return removed, err
		}
		removed++
	}
	return removed, nil
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// Settled opens the whole record of a settled action.
func (j *Journal) Settled(id string) (io.ReadCloser, error) {
	j.mu.Lock()
	i := slices.IndexFunc(j.entries, func(e *Entry) bool { return e.ID == id })
	settled, size := false, int64(0)
	if i >= 0 {
		settled, size = j.entries[i].Result != "" && j.entries[i].Result != Damaged, j.entries[i].Bytes
	}
	j.mu.Unlock()
	if !settled {
		return nil, fmt.Errorf("action %s is not settled", id)
	}
	return j.upTo(id, size)
}

// upTo opens the beginning of a record.
func (j *Journal) upTo(id string, n int64) (io.ReadCloser, error) {
	f, err := os.Open(j.path(id))
	if err != nil {
		return nil, unavailable("reading a record", err)
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(f, n), f}, nil
}

// Entries returns the index, newest first.
func (j *Journal) Entries() []Entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	out := make([]Entry, 0, len(j.entries))
	for _, e := range slices.Backward(j.entries) {
		out = append(out, *e)
	}
	return out
}

// Last returns the time of the newest record that can be read, zero without
// one. It had passed when that was written.
func (j *Journal) Last() time.Time {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, e := range slices.Backward(j.entries) {
		if e.Result != Damaged { // whose time is only that of the file
			return e.Time
		}
	}
	return time.Time{}
}

// Find returns the entry whose identifier begins with the text. It is
// fault.NotFound when there is none and fault.Usage when there are several.
func (j *Journal) Find(prefix string) (Entry, error) {
	if err := j.Ready(); err != nil {
		return Entry{}, err
	}
	var found []Entry
	for _, e := range j.Entries() {
		if e.ID == prefix {
			return e, nil
		}
		if prefix != "" && strings.HasPrefix(e.ID, prefix) {
			found = append(found, e)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return Entry{}, fault.New(fault.NotFound, "see: halligan history; each node keeps the record of its own", "no action %q is recorded on this node", prefix)
	}
	return Entry{}, fault.New(fault.Usage, "give more of it", "%d actions begin with %q", len(found), prefix)
}

// Record is a file read back.
type Record struct {
	Plan *halliganv1.Plan
	Access
	// Images are without their values; Value reads one.
	Images []ImageRef
	Notes  []Note
	// Result is empty when the action was cut off.
	Result  string
	Error   string
	Applied int
	bytes   int64
}

// ImageRef is an image without its value.
type ImageRef struct {
	Image
	// Size of the value in bytes.
	Size   int
	offset int64
}

// Read returns the record of an action.
func (j *Journal) Read(id string) (*Record, error) {
	r := &Record{}
	scanned, err := j.scan(id, func(l line, at int64) error {
		switch {
		case l.Image != nil:
			ref := ImageRef{Image: *l.Image, Size: len(l.Image.Value), offset: at}
			ref.Value = nil
			r.Images = append(r.Images, ref)
		case l.Note != nil:
			r.Notes = append(r.Notes, *l.Note)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	scanned.Images, scanned.Notes = r.Images, r.Notes
	if scanned.Plan == nil {
		return nil, damaged(j.path(id), 0, errors.New("no intent"))
	}
	return scanned, nil
}

// Value returns the stored bytes of an image, checked against their hash.
func (j *Journal) Value(id string, ref ImageRef) ([]byte, error) {
	f, err := os.Open(j.path(id))
	if err != nil {
		return nil, fault.New(fault.NotFound, "see: halligan history", "the record of %s is gone: %w", id, err)
	}
	defer f.Close()
	if _, err := f.Seek(ref.offset, io.SeekStart); err != nil {
		return nil, unavailable("reading a record", err)
	}
	raw, err := newLineReader(f).next()
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, unavailable("reading a record", err)
	}
	l, err := unseal(raw)
	if err != nil {
		return nil, damaged(f.Name(), ref.offset, err)
	}
	if l.Image == nil || l.Image.Key != ref.Key {
		return nil, damaged(f.Name(), ref.offset, errors.New("no image of the object here"))
	}
	if sum := sha256.Sum256(l.Image.Value); l.Image.Value != nil && !bytes.Equal(sum[:], l.Image.ValueSHA256) {
		return nil, damaged(f.Name(), ref.offset, fmt.Errorf("the image of %s does not have its hash", l.Image.Key))
	}
	return l.Image.Value, nil
}

// Durable opens what is on disk of the record at this moment, in whole lines.
func (a *Action) Durable() (io.ReadCloser, error) {
	a.mu.Lock()
	n := a.synced
	a.mu.Unlock()
	return a.j.upTo(a.entry.ID, n)
}

// Keeps is how long a settled record is kept at least.
func (j *Journal) Keeps() time.Duration { return j.opts.Keep }

// scan reads a file and calls fn for each whole line with its offset.
func (j *Journal) scan(id string, fn func(l line, offset int64) error) (*Record, error) {
	path := j.path(id)
	f, err := os.Open(path)
	if err != nil {
		return nil, unavailable("reading a record", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, unavailable("reading a record", err)
	}
	slot := st.Size() == slotBytes
	r := &Record{}
	rd := newLineReader(f)
	for {
		at := rd.offset
		raw, err := rd.next()
		if errors.Is(err, io.EOF) {
			break // a line without its newline was never acknowledged
		}
		if err != nil {
			return nil, unavailable("reading a record", err)
		}
		l, err := unseal(raw)
		if err != nil && slot && torn(rd) {
			rd.offset = at
			break
		}
		if err != nil {
			return nil, damaged(path, at, err)
		}
		switch {
		case l.Intent != nil && at == 0:
			r.Plan, r.Access = &halliganv1.Plan{}, l.access()
			if err := protojson.Unmarshal(l.Intent, r.Plan); err != nil {
				return nil, damaged(path, at, err)
			}
			if r.Plan.Id != id {
				return nil, damaged(path, at, fmt.Errorf("it is the record of %q", r.Plan.Id))
			}
		case r.Plan == nil:
			return nil, damaged(path, at, errors.New("no intent at the start"))
		case l.Image != nil:
			if l.Image.Index < 0 || l.Image.Index >= len(r.Plan.Objects) {
				return nil, damaged(path, at, errors.New("an image of no planned object"))
			}
		case l.Note != nil:
			if l.Note.Index < 0 || l.Note.Index >= len(r.Plan.Objects) {
				return nil, damaged(path, at, errors.New("a note of no planned object"))
			}
			if l.Note.Outcome == Applied {
				r.Applied++
			}
		case l.Outcome != nil:
			if !l.Outcome.fits(r.Plan) {
				return nil, damaged(path, at, errors.New("an outcome that the plan cannot have"))
			}
			r.Result, r.Error, r.Applied = l.Outcome.Result, l.Outcome.Error, l.Outcome.Applied
		}
		if err := fn(l, at); err != nil {
			return nil, err
		}
	}
	r.bytes = rd.offset
	return r, nil
}

// Writing reports whether the action is being recorded at this moment.
func (j *Journal) Writing(id string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.open[id] != nil
}

// Unfinished returns the identifiers of actions without an outcome that nobody
// is writing, oldest first.
func (j *Journal) Unfinished() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	var ids []string
	for _, e := range j.entries {
		if e.Result == "" && j.open[e.ID] == nil {
			ids = append(ids, e.ID)
		}
	}
	return ids
}

// Resume opens an unfinished record to settle it, cutting off a torn last line.
func (j *Journal) Resume(id string) (*Action, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	i := slices.IndexFunc(j.entries, func(e *Entry) bool { return e.ID == id })
	if i < 0 || j.entries[i].Result != "" || j.open[id] != nil {
		return nil, fmt.Errorf("action %s is not unfinished", id)
	}
	e := j.entries[i]
	st, err := os.Stat(j.path(id))
	if err != nil {
		return nil, unavailable("opening a record", err)
	}
	slot, flags := st.Size() == slotBytes && e.Bytes < slotBytes, os.O_WRONLY|os.O_APPEND
	if slot {
		flags = os.O_WRONLY
	}
	f, err := os.OpenFile(j.path(id), flags, 0)
	if err != nil {
		return nil, unavailable("opening a record", err)
	}
	if slot {
		err = wipe(f, e.Bytes)
	} else {
		err = f.Truncate(e.Bytes)
	}
	if err != nil {
		f.Close()
		return nil, unavailable("opening a record", err)
	}
	a := &Action{j: j, entry: e, file: f, slot: slot, reserved: slot, written: e.Bytes, synced: e.Bytes}
	a.done.L = &a.mu
	j.open[id] = a
	return a, nil
}

// Settle ends a record that a crash had cut off.
func (a *Action) Settle(result, problem string) error { return a.finish(result, problem, true) }

// Release closes a resumed record that could not be settled yet.
func (a *Action) Release() {
	a.file.Close()
	a.j.mu.Lock()
	defer a.j.mu.Unlock()
	a.entry.Bytes = a.written
	delete(a.j.open, a.entry.ID)
}

func unavailable(doing string, err error) error {
	next := "see that the agent's state folder can be written"
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		next = "free space on the file system of the agent's state folder"
	case errors.Is(err, unix.EROFS):
		next = "the state folder is read-only: remount it, or point stateDir elsewhere"
	}
	return fault.New(fault.AuditUnavailable, next, "%s: %w", doing, err)
}

func damaged(path string, at int64, err error) error {
	return fault.New(fault.AuditUnavailable, "keep the file for whoever investigates and move it out of the folder",
		"record %s is damaged at byte %d: %w", path, at, err)
}

// Modified returns when the record was last written.
func (j *Journal) Modified(id string) (time.Time, error) {
	st, err := os.Stat(j.path(id))
	if err != nil {
		return time.Time{}, unavailable("looking at a record", err)
	}
	return st.ModTime(), nil
}
