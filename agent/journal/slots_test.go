package journal

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/halligan-io/halligan/internal/fault"
)

var rescuer = Access{Door: "ssh", BreakGlass: true}

// full returns a journal with all its slots on a disk that takes nothing more.
func full(t *testing.T) (*Journal, string) {
	t.Helper()
	dir := filepath.Join(disk(t, "20m"), "state")
	j := open(t, dir, Options{})
	check(t, j.Refill())
	if j.Slots() != slotCount {
		t.Fatalf("%d slots", j.Slots())
	}
	fill(t, dir)
	return j, dir
}

// TestFullDisk: whoever may break glass goes on with small actions, a stated number
// of them; all others are refused.
func TestFullDisk(t *testing.T) {
	j, dir := full(t)
	if _, err := j.Begin(Access{}, planOf("other", 1, 0), 0); !fault.Is(err, fault.AuditUnavailable) {
		t.Errorf("recorded on a full disk: %v", err)
	}
	if _, err := j.Begin(rescuer, planOf("large", 1, 0), slotBytes); !fault.Is(err, fault.AuditUnavailable) {
		t.Errorf("more than a slot takes: %v", err)
	}
	if err := j.CheckFor(rescuer, 0); err != nil || j.CheckFor(Access{}, 0) == nil {
		t.Errorf("check: %v", err)
	}
	value := bytes.Repeat([]byte{0, '\n'}, 20<<10)
	for i := range slotCount {
		id := fmt.Sprintf("a%02d", i)
		// One whose action does nothing takes nothing away.
		a, err := j.Begin(rescuer, planOf("none", 1, 0), 0)
		check(t, err)
		check(t, a.Images(imageOf(0, value)))
		check(t, a.Abandon())
		a, err = j.Begin(rescuer, planOf(id, 2, 0), int64(len(value)))
		check(t, err)
		check(t, a.Images(imageOf(0, value)))
		check(t, a.Wrote(Note{Index: 0, Revision: 100, Outcome: Applied}))
		switch {
		case i == 3: // the agent ends here
			a.Release()
		default:
			check(t, a.Images(imageOf(1, value)))
			check(t, a.Finish("partial", "why"))
		}
		if left := slotCount - i - 1; j.Slots() != left {
			t.Fatalf("%d slots left, want %d", j.Slots(), left)
		}
		fill(t, dir) // others take what the record did not need
	}
	if _, err := j.Begin(rescuer, planOf("one-more", 1, 0), 0); !fault.Is(err, fault.AuditUnavailable) || j.CheckFor(rescuer, 0) == nil {
		t.Errorf("there is no end of slots: %v", err)
	}
	check(t, j.Close())

	j = open(t, dir, Options{})
	if got := j.Unfinished(); len(got) != 1 || got[0] != "a03" {
		t.Fatalf("unfinished: %v", got)
	}
	a, err := j.Resume("a03")
	check(t, err)
	check(t, a.Wrote(Note{Index: 1, Outcome: "failed"}))
	check(t, a.Settle("partial", "settled"))
	for _, e := range j.Entries() {
		r, err := j.Read(e.ID)
		check(t, err)
		if e.Result != "partial" || r.Applied != 1 || len(r.Images) == 0 || r.Door != "ssh" {
			t.Errorf("%s: %+v", e.ID, r)
		}
		for _, ref := range r.Images {
			if got, err := j.Value(e.ID, ref); err != nil || !bytes.Equal(got, value) {
				t.Errorf("%s: image %d: %v", e.ID, ref.Index, err)
			}
		}
	}
	if len(j.Entries()) != slotCount {
		t.Errorf("%d records", len(j.Entries()))
	}
	// Full still: no slots are made. With room they are.
	check(t, j.Refill())
	if j.Slots() != 0 {
		t.Errorf("%d slots on a full disk", j.Slots())
	}
	fillers, err := filepath.Glob(filepath.Join(dir, "fill*"))
	check(t, err)
	for _, f := range fillers {
		check(t, os.Remove(f))
	}
	check(t, j.Refill())
	if j.Slots() != slotCount {
		t.Errorf("%d slots when there is room again", j.Slots())
	}
	check(t, j.Close())
	if j = open(t, dir, Options{}); j.Slots() != slotCount || len(j.Entries()) != slotCount {
		t.Errorf("%d slots, %d records after a restart", j.Slots(), len(j.Entries()))
	}
}

// TestTornSlot: of a line that was not made durable any part may be on disk; what was
// before it counts, and damage there is no torn line.
func TestTornSlot(t *testing.T) {
	j, dir := full(t)
	a, err := j.Begin(rescuer, planOf("a", 2, 0), 0)
	check(t, err)
	check(t, a.Images(imageOf(0, bytes.Repeat([]byte("v"), 9000))))
	whole := a.written
	check(t, a.Images(imageOf(1, bytes.Repeat([]byte("v"), 9000))))
	end := a.written
	a.Release()
	check(t, j.Close())
	path := filepath.Join(dir, "actions", "a"+suffix)
	good, err := os.ReadFile(path)
	check(t, err)
	for name, c := range map[string]struct {
		from, to int64 // what is still zero on disk
		images   int
		damaged  bool
	}{
		"whole": {end, end, 2, false}, "nothing of it": {whole, end, 1, false}, "its beginning": {whole + 5000, end, 1, false},
		"its end": {whole, whole + 5000, 1, false}, "its middle": {whole + 2000, whole + 5000, 1, false}, "all but its newline": {end - 1, end, 1, false},
		"the line before": {whole - 4000, whole - 3000, 0, true},
	} {
		bad := bytes.Clone(good)
		clear(bad[c.from:c.to])
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		check(t, err)
		_, err = f.WriteAt(bad, 0) // in place: the disk is full
		check(t, err)
		check(t, f.Close())
		j := open(t, dir, Options{})
		r, err := j.Read("a")
		if c.damaged {
			if e := j.Entries(); err == nil || len(e) != 1 || e[0].Result != Damaged {
				t.Errorf("%s: %+v, %v", name, e, err)
			}
		} else if err != nil || len(r.Images) != c.images || r.Result != "" {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
		check(t, j.Close())
	}
}
