package ledger

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/durable"
)

// The spool is a file of a fixed size that was written in full when it was made, so
// that a full disk cannot keep an event out of it: a header, and a ring of records.
// An event is acknowledged when its record is synced; the tree takes it from there.
// What is in the tree may be overwritten.
const (
	spoolHeader = 4096
	// block is where records begin, so that one can be found without the one
	// before it; it is the smallest piece that disks write as a whole.
	block      = 512
	recordHead = 48
	// unit is what the stated reserve counts in.
	unit = 2 << 10
	// minSpool holds some events of the greatest length.
	minSpool = 512 << 10
	markAt   = block
)

// Marks begin what they name. They hold control characters, which no JSON does, so
// that no event can pass for a record.
var (
	spoolMagic  = [8]byte{1, 's', 'p', 'o', 'o', 'l', 2, '1'}
	recordMagic = [8]byte{1, 'e', 'v', 'e', 'n', 't', 2, '\n'}
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
)

// damage is an error that stays: what was acknowledged is lost or was changed.
type damage struct{ reason string }

func (d *damage) Error() string { return d.reason }

// record is an event in the ring.
type record struct {
	seq uint64
	// at is where it begins, counted over all laps; n is the length of the event.
	at uint64
	n  int
	// durable is how many events were acknowledged when it was written, and epoch
	// grows whenever records before it may have been written in vain.
	durable uint64
	epoch   uint32
	seam    bool
}

func (r record) end() uint64 { return r.at + recordSize(r.n) }

// recordSize is what an event of n bytes takes in the ring.
func recordSize(n int) uint64 { return (uint64(recordHead+n) + block - 1) / block * block }

type spool struct {
	f    *os.File
	ring uint64 // bytes
	// lineage names the log; base is the first event that this file was made for.
	lineage string
	base    uint64
	steps   func(string)
}

// newSpool makes the file, with all its blocks.
func newSpool(path, lineage string, size int64, base uint64, steps func(string)) error {
	tmp := path + ".tmp"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	steps("spool make")
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, spoolHeader)
	copy(head, spoolMagic[:])
	id, err := hex.DecodeString(lineage)
	if err != nil || len(id) != 4 {
		return fmt.Errorf("no lineage: %q", lineage)
	}
	copy(head[8:], id)
	binary.LittleEndian.PutUint64(head[16:], uint64(size))
	binary.LittleEndian.PutUint64(head[24:], base)
	binary.LittleEndian.PutUint32(head[32:], crc32.Checksum(head[:32], castagnoli))
	zeros := make([]byte, 64<<10)
	_, err = f.Write(head)
	for left := size; left > 0 && err == nil; left -= int64(len(zeros)) {
		_, err = f.Write(zeros[:min(left, int64(len(zeros)))])
	}
	if err == nil {
		steps("spool make sync")
		err = f.Sync()
	}
	if err == nil {
		steps("spool make rename")
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp) // it holds the room that is missing
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

// errLocked is that another process keeps the log.
var errLocked = errors.New("another process keeps this log")

// openSpool opens the file and holds it against other processes.
func openSpool(path string, steps func(string)) (*spool, error) {
	if err := durable.CheckPrivate(path); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: %w", path, errLocked)
		}
		return nil, err
	}
	s, err := readSpool(f, steps)
	if err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

func readSpool(f *os.File, steps func(string)) (*spool, error) {
	head := make([]byte, 36)
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if _, err := f.ReadAt(head, 0); err != nil && st.Size() >= spoolHeader {
		return nil, err
	}
	size := binary.LittleEndian.Uint64(head[16:])
	if [8]byte(head) != spoolMagic || binary.LittleEndian.Uint32(head[32:]) != crc32.Checksum(head[:32], castagnoli) ||
		uint64(st.Size()) != size+spoolHeader || size%block != 0 || size < minSpool {
		return nil, &damage{"the header of the spool is damaged"}
	}
	return &spool{f: f, ring: size, lineage: hex.EncodeToString(head[8:12]), base: binary.LittleEndian.Uint64(head[24:]), steps: steps}, nil
}

func (s *spool) sum(head, data []byte) uint32 {
	sum := crc32.Checksum([]byte(s.lineage), castagnoli)
	return crc32.Update(crc32.Update(sum, castagnoli, head), castagnoli, data)
}

// encode appends a record to what is written with it.
func (s *spool) encode(b []byte, r record, data []byte) []byte {
	start := len(b)
	b = append(b, make([]byte, recordSize(r.n))...)
	head := b[start : start+recordHead]
	copy(head, recordMagic[:])
	binary.LittleEndian.PutUint32(head[12:], uint32(r.n))
	binary.LittleEndian.PutUint64(head[16:], r.seq)
	binary.LittleEndian.PutUint64(head[24:], r.at)
	binary.LittleEndian.PutUint64(head[32:], r.durable)
	binary.LittleEndian.PutUint32(head[40:], r.epoch)
	if r.seam {
		head[44] = 1
	}
	copy(b[start+recordHead:], data)
	binary.LittleEndian.PutUint32(head[8:], s.sum(head[12:], data))
	return b
}

// parse returns the record that begins here, as far as its head can be believed.
func (s *spool) parse(b []byte) (record, bool) {
	if len(b) < recordHead || [8]byte(b) != recordMagic {
		return record{}, false
	}
	return record{seq: binary.LittleEndian.Uint64(b[16:]), at: binary.LittleEndian.Uint64(b[24:]), n: int(binary.LittleEndian.Uint32(b[12:])),
		durable: binary.LittleEndian.Uint64(b[32:]), epoch: binary.LittleEndian.Uint32(b[40:]), seam: b[44] == 1}, true
}

// decode returns the record that begins here, and its event, if they are whole.
func (s *spool) decode(b []byte) (r record, data []byte, ok bool) {
	if r, ok = s.parse(b); !ok || r.n > len(b)-recordHead {
		return r, nil, false
	}
	data = b[recordHead : recordHead+r.n]
	return r, data, binary.LittleEndian.Uint32(b[8:]) == s.sum(b[12:recordHead], data)
}

// place says where a record goes that begins at head or behind it: it never lies
// across the ring's end.
func (s *spool) place(head uint64, n int) uint64 {
	if off := head % s.ring; off+recordSize(n) > s.ring {
		return head + s.ring - off
	}
	return head
}

// write makes pieces durable, each at its place.
func (s *spool) write(pieces []piece) error {
	for _, p := range pieces {
		s.steps("spool write")
		if _, err := s.f.WriteAt(p.data, int64(spoolHeader+p.at%s.ring)); err != nil {
			return err
		}
	}
	s.steps("spool sync")
	return s.sync()
}

func (s *spool) sync() error {
	for {
		if err := unix.Fdatasync(int(s.f.Fd())); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

type piece struct {
	at   uint64
	data []byte
}

// mark notes how many events are acknowledged. It is not synced: a process that is
// killed leaves it right, and after a power cut it is at most as old as the kernel
// lets a page be.
func (s *spool) mark(acknowledged uint64) error {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], acknowledged)
	binary.LittleEndian.PutUint32(b[8:], s.sum(nil, b[:8]))
	s.steps("spool mark")
	_, err := s.f.WriteAt(b[:], markAt)
	return err
}

// read returns the event of a record, which must be as it was written.
func (s *spool) read(want record) ([]byte, error) {
	b := make([]byte, recordHead+want.n)
	if _, err := s.f.ReadAt(b, int64(spoolHeader+want.at%s.ring)); err != nil {
		return nil, err
	}
	r, data, ok := s.decode(b)
	if !ok || r.seq != want.seq || r.at != want.at {
		return nil, &damage{fmt.Sprintf("event %d was acknowledged and is damaged in the spool", want.seq)}
	}
	return data, nil
}

// found is what a spool holds at start-up.
type found struct {
	// pending are the events that the tree does not have, last the newest event of
	// all, if it is still there.
	pending []record
	last    *record
	// next is the sequence number, and head the place, of what comes next.
	next, head uint64
	epoch      uint32
	// torn is how many bytes were cut that nobody was told were durable.
	torn int64
}

// scan finds out what the spool holds beyond the first events, which the tree has.
// It cuts what was being written when the process ended, and refuses when an
// acknowledged event is missing. A tree that has more than ever went through the
// spool is not its tree.
func (s *spool) scan(inTree uint64) (found, error) {
	acknowledged := s.base
	var b [16]byte
	if _, err := s.f.ReadAt(b[:], markAt); err != nil {
		return found{}, err
	}
	if binary.LittleEndian.Uint32(b[8:]) == s.sum(nil, b[:8]) {
		acknowledged = max(acknowledged, binary.LittleEndian.Uint64(b[:]))
	}
	all, broken, err := s.records()
	if err != nil {
		return found{}, err
	}
	// Of records that were given up after a failed write, those that came later
	// take the place.
	slices.SortFunc(all, func(a, b record) int {
		return cmp.Or(cmp.Compare(a.seq, b.seq), cmp.Compare(b.epoch, a.epoch))
	})
	f := found{next: inTree}
	seen, any := uint64(0), false
	live := map[uint64]record{}
	for _, r := range all {
		if r.epoch < f.epoch || any && r.seq == seen {
			continue
		}
		f.epoch, seen, any = r.epoch, r.seq, true
		acknowledged = max(acknowledged, r.durable)
		live[r.seq] = r
	}
	if any && inTree > max(acknowledged, seen+1) || !any && inTree > acknowledged {
		return f, &damage{fmt.Sprintf("the log has %d events, and the spool knows of %d", inTree, max(acknowledged, seen+1))}
	}
	for {
		r, ok := live[f.next]
		if !ok {
			break
		}
		f.pending = append(f.pending, r)
		f.next++
	}
	if f.next < acknowledged {
		return f, &damage{fmt.Sprintf("event %d was acknowledged and is damaged or missing in the spool", f.next)}
	}
	if f.next > 0 {
		if r, ok := live[f.next-1]; ok {
			f.last, f.head = &r, r.end()
		} else if any {
			f.head = all[len(all)-1].end()
		}
	}
	for _, r := range slices.Concat(all, broken) {
		if r.at >= f.head {
			f.torn += int64(recordSize(r.n))
		}
	}
	return f, nil
}

// records returns all that are whole, and those of which only a part can be what it
// was. It reads piece by piece, since at rest a daemon has little memory.
func (s *spool) records() (all, broken []record, err error) {
	const window = 256 << 10
	buf := make([]byte, window+recordSize(audit.MaxEvent))
	for from := uint64(0); from < s.ring; from += window {
		b := buf[:min(uint64(len(buf)), s.ring-from)]
		if _, err := s.f.ReadAt(b, int64(spoolHeader+from)); err != nil {
			return nil, nil, err
		}
		for off := uint64(0); off < window && off < uint64(len(b)); off += block {
			r, ok := s.parse(b[off:])
			switch _, _, whole := s.decode(b[off:]); {
			case !ok || r.at%s.ring != from+off:
			case whole:
				all = append(all, r)
			case r.n <= audit.MaxEvent:
				broken = append(broken, r)
			}
		}
	}
	return all, broken, nil
}
