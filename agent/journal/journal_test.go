package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
)

func open(t *testing.T, dir string, o Options) *Journal {
	t.Helper()
	j, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// planOf returns a plan of so many objects, made so long ago.
func planOf(id string, objects int, age time.Duration) *halliganv1.Plan {
	p := &halliganv1.Plan{Id: id, Action: "delete", Actor: "console/1000", Reason: "test \u2028 <reason>", Incident: "INC-1",
		Created: timestamppb.New(time.Now().Add(-age)), Summary: "delete things"}
	for i := range objects {
		p.Objects = append(p.Objects, &halliganv1.PlannedObject{Key: key(i), Uid: fmt.Sprint("uid-", i), Revision: int64(10 + i)})
	}
	return p
}

func key(i int) string { return fmt.Sprint("/registry/configmaps/a/", i) }

func imageOf(i int, value []byte) Image {
	return Image{Index: i, Key: key(i), UID: fmt.Sprint("uid-", i), Revision: int64(10 + i), Since: 99, Value: value, Delete: true}
}

// settled records a whole action.
func settled(t *testing.T, j *Journal, id string, age time.Duration, size int) {
	t.Helper()
	a, err := j.Begin(Access{}, planOf(id, 1, age), int64(size))
	check(t, err)
	check(t, a.Images(imageOf(0, bytes.Repeat([]byte{7}, size))))
	check(t, a.Wrote(Note{Index: 0, Revision: 100, Outcome: Applied}))
	check(t, a.Finish("applied", ""))
}

func ids(entries []Entry) []string {
	var out []string
	for _, e := range entries {
		out = append(out, e.ID)
	}
	return out
}

func TestRoundTrip(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "state")
	j := open(t, dir, Options{})
	plan := planOf("20260102-030405-abcd", 3, 0)
	values := [][]byte{[]byte("k8s\x00\x0a\xff\n\"binary"), nil, bytes.Repeat([]byte{0, '\n'}, 700<<10)}
	a, err := j.Begin(Access{}, plan, 1500<<10)
	check(t, err)
	if got := j.Unfinished(); len(got) != 0 {
		t.Errorf("unfinished while it is being written: %v", got)
	}
	for i, v := range values {
		check(t, a.Images(imageOf(i, v)))
	}
	check(t, a.Wrote(Note{Index: 0, Revision: 100, Outcome: Applied}))
	check(t, a.Wrote(Note{Index: 1, Outcome: "failed", Error: "why"}))
	check(t, a.Finish("partial", "stopped"))
	if err := a.Wrote(Note{Index: 2}); err == nil {
		t.Error("a closed record takes more")
	}
	verify := func(j *Journal) {
		t.Helper()
		entries := j.Entries()
		if len(entries) != 1 {
			t.Fatalf("%d entries", len(entries))
		}
		st, err := os.Stat(j.path(plan.Id))
		check(t, err)
		want := Entry{ID: plan.Id, Action: "delete", Actor: "console/1000", Reason: plan.Reason, Incident: "INC-1", Summary: "delete things",
			Time: plan.Created.AsTime(), Result: "partial", Objects: 3, Applied: 1, Bytes: st.Size()}
		if !reflect.DeepEqual(entries[0], want) {
			t.Errorf("entry %+v, want %+v", entries[0], want)
		}
		if _, used := j.Space(); used != st.Size() {
			t.Errorf("%d bytes used, want %d", used, st.Size())
		}
		r, err := j.Read(plan.Id)
		check(t, err)
		if !proto.Equal(r.Plan, plan) || r.Result != "partial" || r.Error != "stopped" || r.Applied != 1 || len(r.Notes) != 2 || len(r.Images) != 3 {
			t.Fatalf("read back: %+v", r)
		}
		for i, ref := range r.Images {
			got, err := j.Value(plan.Id, ref)
			if err != nil || !bytes.Equal(got, values[i]) || (got == nil) != (values[i] == nil) || ref.Size != len(values[i]) || ref.Key != key(i) || !ref.Delete {
				t.Errorf("image %d: %+v, %v", i, ref, err)
			}
		}
		if r.Notes[0] != (Note{Index: 0, Revision: 100, Outcome: Applied}) || r.Notes[1].Error != "why" {
			t.Errorf("notes: %+v", r.Notes)
		}
		if st.Mode().Perm() != 0o600 {
			t.Errorf("mode %o", st.Mode().Perm())
		}
	}
	verify(j)
	check(t, j.Close())
	verify(open(t, dir, Options{}))
	for _, d := range []string{filepath.Dir(dir), dir, filepath.Join(dir, "actions")} {
		if st, err := os.Stat(d); err != nil || (d != filepath.Dir(filepath.Dir(dir)) && st.Mode().Perm() != 0o700) {
			t.Errorf("%s: %v, %v", d, st.Mode(), err)
		}
	}
	// Each line is JSON of its own, as jq and a pager want it.
	data, err := os.ReadFile(j.path(plan.Id))
	check(t, err)
	lines := bytes.Split(bytes.TrimSuffix(data, []byte("\n")), []byte("\n"))
	for i, l := range lines {
		var v map[string]any
		if err := json.Unmarshal(l, &v); err != nil || len(v) != 2 || len(v["sum"].(string)) != 8 {
			t.Errorf("line %d: %.80s: %v", i, l, err)
		}
	}
	if len(lines) != 1+3+2+1 {
		t.Errorf("%d lines", len(lines))
	}
	// What a settled record set aside is given back.
	var st unix.Stat_t
	check(t, unix.Stat(j.path(plan.Id), &st))
	if st.Blocks*512 > st.Size+(64<<10) {
		t.Errorf("%d bytes of disk for %d", st.Blocks*512, st.Size)
	}
}

// TestDurableBeforeWrite: when Images returns, the file holds the intent and the
// images, synced, under a name that is synced too.
func TestDurableBeforeWrite(t *testing.T) {
	j := open(t, t.TempDir()+"/state", Options{})
	a, err := j.Begin(Access{}, planOf("a", 2, 0), 0)
	check(t, err)
	for i := range 2 {
		if a.synced == a.written {
			t.Error("synced before it was asked for: the test is void")
		}
		check(t, a.Images(imageOf(i, []byte("v"))))
		if st, err := os.Stat(j.path("a")); err != nil || a.synced != a.written || !a.named || st.Size() != a.synced {
			t.Errorf("synced %d of %d, named %v, %v", a.synced, a.written, a.named, err)
		}
		r, err := j.Read("a")
		if err != nil || len(r.Images) != i+1 || r.Result != "" {
			t.Errorf("%+v, %v", r, err)
		}
		check(t, a.Wrote(Note{Index: i, Outcome: Applied}))
	}
	check(t, a.Finish("applied", ""))
	if a.synced != a.written {
		t.Error("the outcome is not synced")
	}
}

// small writes one whole record and returns its bytes.
func small(t *testing.T) []byte {
	t.Helper()
	j := open(t, t.TempDir()+"/state", Options{})
	a, err := j.Begin(Access{}, planOf("a", 2, time.Hour), 0)
	check(t, err)
	check(t, a.Images(imageOf(0, []byte("first")), imageOf(1, []byte("second"))))
	check(t, a.Wrote(Note{Index: 0, Revision: 100, Outcome: Applied}))
	check(t, a.Wrote(Note{Index: 1, Revision: 101, Outcome: Applied}))
	check(t, a.Finish("applied", ""))
	data, err := os.ReadFile(j.path("a"))
	check(t, err)
	check(t, j.Close())
	return data
}

// place opens a journal whose only record has these bytes.
func place(t *testing.T, dir string, data []byte) (*Journal, error) {
	t.Helper()
	check(t, os.MkdirAll(filepath.Join(dir, "actions"), 0o700))
	check(t, os.WriteFile(filepath.Join(dir, "actions", "a.jsonl"), data, 0o600))
	return Open(dir, Options{})
}

// TestTorn cuts a record off at every byte.
func TestTorn(t *testing.T) {
	data := small(t)
	lines := bytes.SplitAfter(data, []byte("\n"))
	dir := t.TempDir()
	check(t, os.Chmod(dir, 0o700))
	for n := range len(data) + 1 {
		whole := bytes.Count(data[:n], []byte("\n"))
		j, err := place(t, dir, data[:n])
		if err != nil {
			t.Fatalf("cut at %d: %v", n, err)
		}
		entries := j.Entries()
		switch {
		case whole == 0: // nothing was acknowledged, nothing is left
			if _, err := os.Stat(j.path("a")); len(entries) != 0 || !errors.Is(err, os.ErrNotExist) {
				t.Fatalf("cut at %d: %v, %v", n, entries, err)
			}
			check(t, j.Close())
			continue
		case whole == len(lines)-1:
			if entries[0].Result != "applied" || len(j.Unfinished()) != 0 {
				t.Fatalf("whole: %+v", entries)
			}
		default:
			if entries[0].Result != "" || !slices.Equal(j.Unfinished(), []string{"a"}) {
				t.Fatalf("cut at %d: %+v", n, entries)
			}
		}
		r, err := j.Read("a")
		if err != nil || len(r.Images) != min(whole-1, 2) || len(r.Notes) != min(max(whole-3, 0), 2) || len(r.Plan.Objects) != 2 {
			t.Fatalf("cut at %d: %+v, %v", n, r, err)
		}
		for i, ref := range r.Images {
			if v, err := j.Value("a", ref); err != nil || string(v) != []string{"first", "second"}[i] {
				t.Fatalf("cut at %d: image %d is %q, %v", n, i, v, err)
			}
		}
		// Settling goes on behind the last whole line.
		if r.Result == "" {
			a, err := j.Resume("a")
			check(t, err)
			if _, err := j.Resume("a"); err == nil {
				t.Fatal("resumed twice")
			}
			check(t, a.Wrote(Note{Index: 1, Outcome: "failed"}))
			check(t, a.Settle("partial", "settled"))
			check(t, j.Close())
			if j, err = Open(dir, Options{}); err != nil {
				t.Fatalf("cut at %d, settled, opened again: %v", n, err)
			}
			again, err := j.Read("a")
			if err != nil || again.Result != "partial" || len(again.Notes) != len(r.Notes)+1 || len(again.Images) != len(r.Images) {
				t.Fatalf("cut at %d, settled: %+v, %v", n, again, err)
			}
		}
		check(t, j.Close())
	}
}

// TestRot flips every byte of a record. All but the last newline, without which
// the outcome was never acknowledged, must be noticed wherever it is read.
func TestRot(t *testing.T) {
	data := small(t)
	dir := t.TempDir()
	check(t, os.Chmod(dir, 0o700))
	var starts []int
	for at := 0; at < len(data); at += bytes.IndexByte(data[at:], '\n') + 1 {
		starts = append(starts, at)
	}
	unharmed := map[string]int{}
	for n := range len(data) {
		for _, bit := range []byte{0x01, 0x20, 0x80, data[n] ^ '\n'} {
			if bit == 0 {
				continue
			}
			harmed := slices.Clone(data)
			harmed[n] ^= bit
			j, err := place(t, dir, harmed)
			check(t, err) // one record never keeps the agent from starting
			r, err := j.Read("a")
			check(t, j.Close())
			if n == len(data)-1 {
				if err != nil || r.Result != "" || len(r.Notes) != 2 {
					t.Fatalf("without the last newline: %+v, %v", r, err)
				}
				continue
			}
			line := starts[0]
			for _, s := range starts {
				if s <= n {
					line = s
				}
			}
			if err == nil {
				unharmed[fmt.Sprintf("%d^%02x", n, bit)]++
			} else if !fault.Is(err, fault.AuditUnavailable) || !strings.Contains(err.Error(), "a.jsonl") ||
				!strings.Contains(err.Error(), fmt.Sprintf("byte %d:", line)) {
				t.Fatalf("byte %d (line at %d) flipped by %02x: %v", n, line, bit, err)
			}
		}
	}
	if len(unharmed) > 0 {
		t.Errorf("not noticed: %v", unharmed)
	}
	// An image that is damaged after the record was read.
	j, err := place(t, dir, data)
	check(t, err)
	defer j.Close()
	r, err := j.Read("a")
	check(t, err)
	at := r.Images[1].offset
	harmed := slices.Clone(data)
	harmed[at+60] ^= 1
	check(t, os.WriteFile(j.path("a"), harmed, 0o600))
	if _, err := j.Value("a", r.Images[1]); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("a.jsonl is damaged at byte %d", at)) {
		t.Errorf("a damaged image was read: %v", err)
	}
	check(t, os.WriteFile(j.path("a"), data[:at+60], 0o600))
	if _, err := j.Value("a", r.Images[1]); err == nil {
		t.Error("half an image was read")
	}
	if _, err := j.Value("a", ImageRef{Image: Image{Key: "/other"}, offset: r.Images[0].offset}); err == nil {
		t.Error("another object's image was read")
	}
	check(t, os.Remove(j.path("a")))
	if _, err := j.Value("a", r.Images[0]); !fault.Is(err, fault.NotFound) {
		t.Errorf("the file is gone: %v", err)
	}
}

// TestMisplaced: records that are whole, and yet not what their name or order
// says.
func TestMisplaced(t *testing.T) {
	data := small(t)
	lines := bytes.SplitAfter(data, []byte("\n"))
	seal := func(l line) []byte {
		data, err := seal(l)
		check(t, err)
		return data
	}
	far := imageOf(7, nil)
	for name, content := range map[string][]byte{
		"the name of another":   bytes.Join([][]byte{seal(line{Intent: json.RawMessage(`{"id":"b"}`)}), lines[5]}, nil),
		"no intent":             bytes.Join(lines[1:], nil),
		"an image out of range": bytes.Join([][]byte{lines[0], seal(line{Image: &far})}, nil),
		"no plan":               seal(line{Intent: json.RawMessage(`[1]`)}),
		"an empty line":         append(slices.Clone(lines[0]), '\n'),
		"no checksum":           append(slices.Clone(lines[0]), `{"note":{"index":0,"outcome":"applied"}}`+"\n"...),
	} {
		dir := t.TempDir()
		check(t, os.Chmod(dir, 0o700))
		j, err := place(t, dir, content)
		check(t, err)
		if _, err := j.Read("a"); !fault.Is(err, fault.AuditUnavailable) || !strings.Contains(err.Error(), "a.jsonl is damaged at byte") {
			t.Errorf("%s: %v", name, err)
		}
		// The history shows it, nobody settles it, and the journal works.
		e, err := j.Find("a")
		if err != nil || e.Result != Damaged || !strings.Contains(e.Summary, "damaged at byte") || e.Time.IsZero() || e.Bytes != int64(len(content)) || len(j.Unfinished()) != 0 {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
		if _, err := j.Resume("a"); err == nil {
			t.Errorf("%s: resumed", name)
		}
		settled(t, j, "b", 0, 1)
		check(t, j.Close())
	}
}

// TestEnds: what the two ends of a settled file tell is what all of it tells.
func TestEnds(t *testing.T) {
	dir := t.TempDir() + "/state"
	j := open(t, dir, Options{})
	record := func(id, problem string, value, objects int) {
		a, err := j.Begin(Access{}, planOf(id, objects, 0), int64(value))
		check(t, err)
		check(t, a.Images(imageOf(0, bytes.Repeat([]byte("x"), value))))
		check(t, a.Wrote(Note{Index: 0, Outcome: Applied}))
		check(t, a.Finish("partial", problem))
	}
	record("big-image", "", 3<<20, 1)
	record("big-plan", "", 10, 5000)
	record("long-outcome", strings.Repeat("why ", 4000), 10, 1) // beyond the tail that is read
	// An outcome line that begins just before, at and after the tail's start.
	for d := -3; d <= 3; d++ {
		record(fmt.Sprintf("edge-%d", d+3), strings.Repeat("w", 8<<10-len(`{"sum":"00000000","outcome":{"result":"partial","time":"2026-11-23T12:00:00.123456789Z","applied":1,"error":""}}`+"\n")+d), 10, 1)
	}
	want := j.Entries()
	check(t, j.Close())
	j = open(t, dir, Options{})
	got := j.Entries()
	if len(got) != len(want) {
		t.Fatalf("%d entries, want %d", len(got), len(want))
	}
	for i := range want {
		if want[i].Time = got[i].Time; !reflect.DeepEqual(got[i], want[i]) || got[i].Result != "partial" || got[i].Applied != 1 {
			t.Errorf("%+v, want %+v", got[i], want[i])
		}
	}
	for id, fast := range map[string]bool{"big-image": true, "big-plan": true, "long-outcome": false} {
		if e, err := j.ends(id); (e != nil) != fast || err != nil {
			t.Errorf("%s: by its ends %v, %v", id, e, err)
		}
	}
	// Damage in the middle of a settled record does not keep the agent from
	// starting, and is met where the record is read.
	check(t, j.Close())
	f, err := os.OpenFile(j.path("big-image"), os.O_WRONLY, 0)
	check(t, err)
	_, err = f.WriteAt([]byte{'!'}, 1<<20)
	check(t, errors.Join(err, f.Close()))
	j = open(t, dir, Options{})
	if _, err := j.Read("big-image"); !fault.Is(err, fault.AuditUnavailable) {
		t.Errorf("read: %v", err)
	}
}

func TestRetention(t *testing.T) {
	dir := t.TempDir() + "/state"
	limits := Options{MaxBytes: 1 << 20, Keep: time.Hour}
	j := open(t, dir, limits)
	const size = 200 << 10 // about 270 KiB in base64
	cut, err := j.Begin(Access{}, planOf("0-unfinished", 1, 100*time.Hour), size)
	check(t, err)
	check(t, cut.Images(imageOf(0, make([]byte, size))))
	settled(t, j, "1-old", 9*time.Hour, size)
	settled(t, j, "2-old", 8*time.Hour, size)
	settled(t, j, "3-new", time.Minute, size) // takes the place of the oldest
	if got := ids(j.Entries()); !slices.Equal(got, []string{"3-new", "2-old", "0-unfinished"}) {
		t.Errorf("kept %v", got)
	}
	settled(t, j, "4-new", time.Minute, size)
	if got := ids(j.Entries()); !slices.Equal(got, []string{"4-new", "3-new", "0-unfinished"}) {
		t.Errorf("kept %v", got)
	}
	refused := func() {
		t.Helper()
		if _, err := j.Begin(Access{}, planOf("5-new", 1, 0), size); !fault.Is(err, fault.AuditUnavailable) || !strings.Contains(err.Error(), "journalMaxBytes") {
			t.Errorf("nothing is old enough, and yet: %v", err)
		}
		if got := ids(j.Entries()); !slices.Equal(got, []string{"4-new", "3-new", "0-unfinished"}) {
			t.Errorf("kept %v", got)
		}
	}
	refused()
	check(t, j.Close())
	j = open(t, dir, limits)
	refused()
	if files, err := os.ReadDir(j.dir); err != nil || len(files) != 3 {
		t.Errorf("%v, %v", files, err)
	}
	// A person may remove a record by hand; that is no error later.
	check(t, j.Close())
	j = open(t, dir, Options{MaxBytes: 1 << 20, Keep: time.Nanosecond})
	check(t, os.Remove(j.path("3-new")))
	settled(t, j, "5-new", 0, size)
	if got := ids(j.Entries()); !slices.Equal(got, []string{"5-new", "4-new", "0-unfinished"}) {
		t.Errorf("kept %v", got)
	}
	if _, err := j.Read("3-new"); err == nil {
		t.Error("read what is gone")
	}
	// What is damaged is kept, however old, for whoever investigates.
	check(t, j.Close())
	check(t, os.WriteFile(j.path("4-new"), []byte("rot\n"), 0o600))
	check(t, os.Chtimes(j.path("4-new"), time.Time{}, time.Now().Add(-1000*time.Hour)))
	j = open(t, dir, Options{MaxBytes: 270 << 10, Keep: time.Nanosecond})
	if _, err := j.Begin(Access{}, planOf("6-new", 1, 0), 0); !fault.Is(err, fault.AuditUnavailable) {
		t.Errorf("began: %v", err)
	}
	if got := ids(j.Entries()); !slices.Equal(got, []string{"0-unfinished", "4-new"}) {
		t.Errorf("kept %v", got)
	}
}

func TestFind(t *testing.T) {
	j := open(t, t.TempDir()+"/state", Options{})
	for _, id := range []string{"20260101-000000-ab", "20260101-000000-abc", "20260102-000000-xyz"} {
		settled(t, j, id, 0, 1)
	}
	for _, c := range []struct {
		prefix, id string
		code       fault.Code
	}{
		{"20260102", "20260102-000000-xyz", ""},
		{"20260101-000000-ab", "20260101-000000-ab", ""}, // exact, though another begins with it
		{"20260101-000000-abc", "20260101-000000-abc", ""},
		{"20260101", "", fault.Usage},
		{"2026", "", fault.Usage},
		{"", "", fault.NotFound},
		{"xyz", "", fault.NotFound},
		{"../../etc/passwd\x1b", "", fault.NotFound},
	} {
		e, err := j.Find(c.prefix)
		if e.ID != c.id || fault.CodeOf(err) != c.code || err != nil && fault.Of(err).Next == "" {
			t.Errorf("%q: %q, %v", c.prefix, e.ID, err)
		}
	}
}

// TestCrafted: lines with good checksums that no action writes. Readers index the
// plan's objects with what they say.
func TestCrafted(t *testing.T) {
	for name, l := range map[string]line{
		"note behind":     {Note: &Note{Index: 2, Outcome: Applied}},
		"note before":     {Note: &Note{Index: -1, Outcome: Applied}},
		"image behind":    {Image: &Image{Index: 1 << 40}},
		"outcome beyond":  {Outcome: &outcome{Result: "applied", Applied: 3}},
		"outcome below":   {Outcome: &outcome{Result: "applied", Applied: -1}},
		"outcome without": {Outcome: &outcome{Applied: 1}},
	} {
		crafted, err := seal(l)
		check(t, err)
		data := small(t)
		at := bytes.LastIndexByte(data[:len(data)-1], '\n') + 1
		for where, text := range map[string][]byte{
			"at the end":        slices.Concat(data, crafted),
			"before the end":    slices.Concat(data[:at], crafted, data[at:]),
			"instead of an end": slices.Concat(data[:at], crafted),
		} {
			dir := t.TempDir()
			check(t, os.Chmod(dir, 0o700))
			j, err := place(t, dir, text)
			check(t, err)
			if _, err := j.Read("a"); !fault.Is(err, fault.AuditUnavailable) {
				t.Errorf("%s %s: %v", name, where, err)
			}
			if e := j.Entries(); where != "before the end" && e[0].Result != Damaged {
				t.Errorf("%s %s: %+v", name, where, e)
			}
			check(t, j.Close())
		}
	}
}

func TestUndoneBy(t *testing.T) {
	dir := t.TempDir() + "/state"
	j := open(t, dir, Options{MaxBytes: 1 << 20, Keep: time.Nanosecond})
	undo := func(id, of, result string, age time.Duration) {
		t.Helper()
		p := planOf(id, 1, age)
		p.Undoes = of
		a, err := j.Begin(Access{}, p, 0)
		check(t, err)
		if by := j.UndoneBy(of); by == id {
			t.Error("taken back before it was")
		}
		check(t, a.Finish(result, ""))
	}
	expect := func(want map[string]string) {
		t.Helper()
		for id, by := range want {
			if got := j.UndoneBy(id); got != by {
				t.Errorf("%q was undone by %q, want %q", id, got, by)
			}
		}
	}
	for _, id := range []string{"a", "b", "c"} {
		settled(t, j, id, 3*time.Hour, 1)
	}
	undo("u1", "a", "failed", 2*time.Hour)
	undo("u2", "a", "applied", 2*time.Hour)
	undo("u3", "b", "partial", 2*time.Hour)
	undo("u4", "u2", "applied", time.Hour)
	want := map[string]string{"a": "u2", "b": "", "c": "", "u2": "u4", "none": "", "": ""}
	expect(want)
	check(t, j.Close())
	j = open(t, dir, Options{MaxBytes: 1 << 20, Keep: time.Nanosecond})
	expect(want)
	// What is removed is forgotten.
	settled(t, j, "big", 0, 700<<10)
	settled(t, j, "more", 0, 200<<10)
	expect(map[string]string{"a": "", "u2": "", "b": ""})
}

func TestBadIDs(t *testing.T) {
	j := open(t, t.TempDir()+"/state", Options{})
	for _, id := range []string{"", "../x", "a/b", ".a", "a.b", "A", "a\x00", "-a", strings.Repeat("a", 300)} {
		if _, err := j.Begin(Access{}, planOf(id, 1, 0), 0); err == nil {
			t.Errorf("%q: began", id)
		}
	}
	a, err := j.Begin(Access{}, planOf("a", 1, 0), 0)
	check(t, err)
	check(t, a.Images(imageOf(0, nil)))
	if _, err := j.Begin(Access{}, planOf("a", 1, 0), 0); !fault.Is(err, fault.AuditUnavailable) {
		t.Errorf("one identifier twice: %v", err)
	}
	if r, err := j.Read("a"); err != nil || len(r.Images) != 1 {
		t.Errorf("the first is harmed: %v", err)
	}
	if len(j.Entries()) != 1 {
		t.Error("left something behind")
	}
}

func TestAbandon(t *testing.T) {
	j := open(t, t.TempDir()+"/state", Options{})
	a, err := j.Begin(Access{}, planOf("a", 1, 0), 0)
	check(t, err)
	check(t, a.Images(imageOf(0, nil)))
	check(t, a.Abandon())
	if _, err := os.Stat(j.path("a")); !errors.Is(err, os.ErrNotExist) || len(j.Entries()) != 0 || len(j.Unfinished()) != 0 {
		t.Errorf("left: %v", err)
	}
	settled(t, j, "a", 0, 1)
}

// TestRelease: an action whose end is unknown is settled by the same process.
func TestRelease(t *testing.T) {
	j := open(t, t.TempDir()+"/state", Options{})
	a, err := j.Begin(Access{}, planOf("a", 2, 0), 1<<20)
	check(t, err)
	check(t, a.Images(imageOf(0, []byte("v")), imageOf(1, []byte("w"))))
	check(t, a.Wrote(Note{Index: 0, Outcome: Applied}))
	a.Release()
	for range 2 {
		if got := j.Unfinished(); !slices.Equal(got, []string{"a"}) {
			t.Fatalf("unfinished: %v", got)
		}
		a, err = j.Resume("a")
		check(t, err)
		if got := j.Unfinished(); len(got) != 0 {
			t.Fatalf("unfinished while it is being settled: %v", got)
		}
		a.Release()
	}
	a, err = j.Resume("a")
	check(t, err)
	check(t, a.Wrote(Note{Index: 1, Outcome: Applied}))
	check(t, a.Settle("applied", "settled"))
	r, err := j.Read("a")
	if err != nil || r.Applied != 2 || r.Result != "applied" || j.Entries()[0].Applied != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	for _, id := range []string{"a", "b"} {
		if _, err := j.Resume(id); err == nil {
			t.Errorf("resumed %s", id)
		}
	}
}

// TestConcurrent: many writers of one record and of several.
func TestConcurrent(t *testing.T) {
	dir := t.TempDir() + "/state"
	j := open(t, dir, Options{})
	const workers, each = 8, 20
	var all sync.WaitGroup
	for _, id := range []string{"a", "b"} {
		a, err := j.Begin(Access{}, planOf(id, workers*each, 0), workers*each*100)
		check(t, err)
		all.Go(func() {
			var writers sync.WaitGroup
			for w := range workers {
				writers.Go(func() {
					for n := range each {
						i := w*each + n
						if err := a.Images(imageOf(i, bytes.Repeat([]byte{byte(i)}, 100))); err != nil {
							t.Error(err)
						}
						if err := a.Wrote(Note{Index: i, Outcome: Applied}); err != nil {
							t.Error(err)
						}
						j.Entries()
						j.Space()
					}
				})
			}
			writers.Wait()
			if err := a.Finish("applied", ""); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	check(t, j.Close())
	j = open(t, dir, Options{})
	for _, id := range []string{"a", "b"} {
		r, err := j.Read(id)
		if err != nil || r.Applied != workers*each || len(r.Images) != workers*each {
			t.Fatalf("%+v, %v", r, err)
		}
		for _, ref := range r.Images {
			if v, err := j.Value(id, ref); err != nil || !bytes.Equal(v, bytes.Repeat([]byte{byte(ref.Index)}, 100)) {
				t.Fatalf("image %d: %q, %v", ref.Index, v, err)
			}
		}
	}
}

// disk is a folder on a file system of its own, so small that it runs full.
func disk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("halligan-test", dir, "tmpfs", 0, "size="+size+",mode=0700"); err != nil {
		t.Fatalf("mounting a tmpfs (the tests run as root): %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill takes what is free on the disk of the folder.
func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "fill"))
	check(t, err)
	defer f.Close()
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
			size /= 2
		}
	}
}

// TestFullWhileWriting: the disk runs full in the middle of an action.
func TestFullWhileWriting(t *testing.T) {
	t.Run("with blocks set aside", func(t *testing.T) {
		dir := disk(t, "16m")
		j := open(t, dir, Options{})
		const n = 40
		value := bytes.Repeat([]byte("x"), 32<<10)
		a, err := j.Begin(Access{}, planOf("a", n, 0), int64(n*len(value)))
		check(t, err)
		check(t, a.Images(imageOf(0, value)))
		fill(t, dir)
		// A second action is refused at once, and leaves nothing behind.
		if _, err := j.Begin(Access{}, planOf("b", 1, 0), 0); !fault.Is(err, fault.AuditUnavailable) || !strings.Contains(err.Error(), "free space") {
			t.Errorf("began on a full disk: %v", err)
		}
		for i := 1; i < n; i++ {
			check(t, a.Images(imageOf(i, value)))
		}
		for i := range n {
			check(t, a.Wrote(Note{Index: i, Revision: 1 << 40, Outcome: Applied}))
		}
		check(t, a.Finish("applied", ""))
		check(t, j.Close())
		r, err := open(t, dir, Options{}).Read("a")
		if err != nil || len(r.Images) != n || r.Applied != n || r.Result != "applied" {
			t.Errorf("%+v, %v", r, err)
		}
	})
	t.Run("beyond them", func(t *testing.T) {
		dir := disk(t, "16m")
		j := open(t, dir, Options{})
		a, err := j.Begin(Access{}, planOf("a", 100, 0), 0)
		check(t, err)
		fill(t, dir)
		kept := 0
		for ; kept < 100; kept++ {
			if err = a.Images(imageOf(kept, bytes.Repeat([]byte("y"), 3000))); err != nil {
				break
			}
		}
		if !fault.Is(err, fault.AuditUnavailable) || !strings.Contains(fault.Of(err).Next, "free space") || !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("the disk is full, and yet: %v", err)
		}
		// What is there is whole lines, and the record goes on when there is
		// room again.
		data, err := os.ReadFile(j.path("a"))
		if err != nil || len(data) == 0 || data[len(data)-1] != '\n' {
			t.Errorf("half a line was left: %v", err)
		}
		check(t, os.Remove(filepath.Join(dir, "fill")))
		check(t, a.Images(imageOf(kept, []byte("later"))))
		check(t, a.Finish("partial", "disk full"))
		check(t, j.Close())
		r, err := open(t, dir, Options{}).Read("a")
		if err != nil || len(r.Images) != kept+1 || r.Result != "partial" {
			t.Errorf("%d kept: %+v, %v", kept, r, err)
		}
	})
	t.Run("at the outcome", func(t *testing.T) {
		dir := disk(t, "16m")
		j := open(t, dir, Options{})
		a, err := j.Begin(Access{}, planOf("a", 1, 0), 0)
		check(t, err)
		check(t, a.Images(imageOf(0, []byte("v"))))
		fill(t, dir)
		if err := a.Finish("applied", strings.Repeat("p", 8<<10)); !fault.Is(err, fault.AuditUnavailable) {
			t.Fatalf("finished on a full disk: %v", err)
		}
		// It counts as unfinished, and is settled when there is room.
		if got := j.Unfinished(); !slices.Equal(got, []string{"a"}) {
			t.Fatalf("unfinished: %v", got)
		}
		check(t, os.Remove(filepath.Join(dir, "fill")))
		a, err = j.Resume("a")
		check(t, err)
		check(t, a.Settle("applied", ""))
		check(t, j.Close())
		if e := open(t, dir, Options{}).Entries(); e[0].Result != "applied" {
			t.Errorf("%+v", e)
		}
	})
}

// TestSyncFails: after a failed fsync nothing is known of what is on disk.
func TestSyncFails(t *testing.T) {
	j := open(t, t.TempDir()+"/state", Options{})
	a, err := j.Begin(Access{}, planOf("a", 3, 0), 0)
	check(t, err)
	check(t, a.Images(imageOf(0, []byte("v"))))
	// A pipe takes writes and cannot be synced.
	r, w, err := os.Pipe()
	check(t, err)
	defer r.Close()
	file := a.file
	a.file = w
	if err := a.Images(imageOf(1, []byte("v"))); !fault.Is(err, fault.AuditUnavailable) {
		t.Fatalf("made durable on a pipe: %v", err)
	}
	a.file = file
	w.Close()
	for name, err := range map[string]error{"image": a.Images(imageOf(2, nil)), "note": a.Wrote(Note{}), "outcome": a.Finish("applied", "")} {
		if !fault.Is(err, fault.AuditUnavailable) {
			t.Errorf("%s taken after a failed fsync: %v", name, err)
		}
	}
	if got := j.Unfinished(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("unfinished: %v", got)
	}
}

// TestAiling: a file system that takes nothing does not keep the agent from
// starting; it is asked again, and then all is there.
func TestAiling(t *testing.T) {
	refuses := func(t *testing.T, j *Journal, why error) {
		t.Helper()
		_, begun := j.Begin(Access{}, planOf("b", 1, 0), 0)
		_, found := j.Find("a")
		for name, err := range map[string]error{"ready": j.Ready(), "check": j.Check(0), "begin": begun, "find": found} {
			if !fault.Is(err, fault.AuditUnavailable) || !errors.Is(err, why) || fault.Of(err).Next == "" {
				t.Errorf("%s: %v", name, err)
			}
		}
		if len(j.Entries()) != 0 || len(j.Unfinished()) != 0 || j.UndoneBy("a") != "" {
			t.Error("it has entries")
		}
	}
	works := func(t *testing.T, j *Journal, want ...string) {
		t.Helper()
		if err := j.Ready(); err != nil {
			t.Fatal(err)
		}
		settled(t, j, "z", 0, 1)
		if got := ids(j.Entries()); !slices.Equal(got, append([]string{"z"}, want...)) {
			t.Errorf("entries: %v", got)
		}
	}
	remount := func(t *testing.T, dir string, flags uintptr) {
		t.Helper()
		check(t, unix.Mount("", dir, "", unix.MS_REMOUNT|flags, ""))
	}
	t.Run("read-only, nothing there", func(t *testing.T) {
		dir := disk(t, "16m")
		remount(t, dir, unix.MS_RDONLY)
		j := open(t, filepath.Join(dir, "state"), Options{})
		refuses(t, j, unix.EROFS)
		remount(t, dir, 0)
		works(t, j)
		if _, err := Open(filepath.Join(dir, "state"), Options{}); err == nil || !strings.Contains(err.Error(), "stop the other agent") {
			t.Errorf("two holders: %v", err)
		}
		check(t, j.Close())
	})
	t.Run("read-only, records there", func(t *testing.T) {
		dir := disk(t, "16m")
		j := open(t, dir, Options{})
		settled(t, j, "a", time.Hour, 1)
		check(t, os.WriteFile(j.path("empty"), []byte("{"), 0o600)) // cut off before anything was acknowledged
		check(t, j.Close())
		remount(t, dir, unix.MS_RDONLY)
		j = open(t, dir, Options{})
		if _, err := j.Read("a"); err != nil || !slices.Equal(ids(j.Entries()), []string{"a"}) {
			t.Errorf("%v, %v", ids(j.Entries()), err)
		}
		if err := j.Check(0); !fault.Is(err, fault.AuditUnavailable) || j.Ready() != nil {
			t.Errorf("check: %v, ready: %v", err, j.Ready())
		}
		remount(t, dir, 0)
		works(t, j, "a")
		check(t, j.Close())
	})
	t.Run("full", func(t *testing.T) {
		dir := t.TempDir()
		check(t, unix.Mount("halligan-test", dir, "tmpfs", 0, "nr_inodes=3,mode=0700")) // the root and two folders
		t.Cleanup(func() { check(t, unix.Unmount(dir, unix.MNT_DETACH)) })
		j := open(t, filepath.Join(dir, "state"), Options{})
		refuses(t, j, unix.ENOSPC)
		check(t, unix.Mount("", dir, "", unix.MS_REMOUNT, "nr_inodes=100"))
		works(t, j)
		check(t, j.Close())
	})
	t.Run("lax when it is mended", func(t *testing.T) {
		dir := disk(t, "16m")
		remount(t, dir, unix.MS_RDONLY)
		state := filepath.Join(dir, "state")
		j := open(t, state, Options{})
		remount(t, dir, 0)
		check(t, os.Mkdir(state, 0o755))
		check(t, os.Chmod(state, 0o755))
		if _, err := j.Begin(Access{}, planOf("b", 1, 0), 0); !fault.Is(err, fault.AuditUnavailable) || !strings.Contains(err.Error(), "chmod") {
			t.Errorf("began: %v", err)
		}
		check(t, os.Chmod(state, 0o700))
		works(t, j)
		check(t, j.Close())
	})
}

func TestFolder(t *testing.T) {
	t.Run("one holder", func(t *testing.T) {
		dir := t.TempDir() + "/state"
		j := open(t, dir, Options{})
		if _, err := Open(dir, Options{}); err == nil || !strings.Contains(err.Error(), "stop the other agent") {
			t.Errorf("two holders: %v", err)
		}
		check(t, j.Close())
		check(t, open(t, dir, Options{}).Close())
	})
	t.Run("modes", func(t *testing.T) {
		dir := t.TempDir() + "/state"
		j := open(t, dir, Options{})
		settled(t, j, "a", 0, 1)
		check(t, j.Close())
		for path, mode := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "actions"): 0o700, filepath.Join(dir, "actions", "a.jsonl"): 0o600} {
			for _, lax := range []os.FileMode{0o040, 0o004, 0o020, 0o011} {
				check(t, os.Chmod(path, mode|lax))
				if _, err := Open(dir, Options{}); !fault.Is(err, fault.AuditUnavailable) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "chmod") {
					t.Errorf("%s with %o: %v", path, mode|lax, err)
				}
			}
			check(t, os.Chmod(path, mode))
		}
		check(t, open(t, dir, Options{}).Close())
	})
	t.Run("foreign files", func(t *testing.T) {
		dir := t.TempDir() + "/state"
		j := open(t, dir, Options{})
		settled(t, j, "a", 0, 1)
		check(t, j.Close())
		foreign := []string{"README", ".a.jsonl", "a.jsonl.bak", "Copy of a.jsonl", "a.jsonl~", ".jsonl"}
		for _, name := range foreign {
			check(t, os.WriteFile(filepath.Join(j.dir, name), nil, 0o644))
		}
		check(t, os.Mkdir(filepath.Join(j.dir, "b.jsonl"), 0o755))
		check(t, os.Symlink("a.jsonl", filepath.Join(j.dir, "c.jsonl")))
		j = open(t, dir, Options{})
		if got := ids(j.Entries()); !slices.Equal(got, []string{"a"}) {
			t.Errorf("entries: %v", got)
		}
		for _, name := range append(foreign, "b.jsonl", "c.jsonl") {
			if _, err := os.Lstat(filepath.Join(j.dir, name)); err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("read-only", func(t *testing.T) {
		dir := disk(t, "16m")
		j := open(t, dir, Options{})
		settled(t, j, "a", 0, 1)
		check(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		if err := j.Check(0); !fault.Is(err, fault.AuditUnavailable) || !strings.Contains(err.Error(), "read-only") {
			t.Errorf("%v", err)
		}
		if _, err := j.Begin(Access{}, planOf("b", 1, 0), 0); !fault.Is(err, fault.AuditUnavailable) {
			t.Errorf("began: %v", err)
		}
		if _, err := j.Read("a"); err != nil {
			t.Errorf("reading does not work: %v", err)
		}
	})
	t.Run("order", func(t *testing.T) {
		dir := t.TempDir() + "/state"
		j := open(t, dir, Options{})
		at := time.Now()
		for _, e := range []struct {
			id    string
			after time.Duration // all within one second, which is all that identifiers tell
		}{{"20260101-000000-b", 1}, {"20260101-000000-a", 2}, {"20260101-000000-d", 0}, {"20260101-000000-c", 2}} {
			p := planOf(e.id, 1, 0)
			p.Created = timestamppb.New(at.Add(e.after * time.Millisecond))
			a, err := j.Begin(Access{}, p, 0)
			check(t, err)
			check(t, a.Finish("failed", ""))
		}
		want := []string{"20260101-000000-c", "20260101-000000-a", "20260101-000000-b", "20260101-000000-d"}
		for range 2 {
			if got := ids(j.Entries()); !slices.Equal(got, want) {
				t.Errorf("entries: %v", got)
			}
			check(t, j.Close())
			j = open(t, dir, Options{})
		}
	})
}

// TestAccess: how an action was allowed is read back from either end, and its
// approvals serve once, whatever happens to the agent in between.
func TestAccess(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	j, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if last := j.Last(); !last.IsZero() {
		t.Errorf("a journal without records ends at %v", last)
	}
	access := Access{Door: "ssh", Source: "192.0.2.1:5", Credential: "person SHA256:a serial 7", Nonce: "n1", ApprovedBy: []Approval{{Person: "bob", Fingerprint: "SHA256:b", Serial: "8"}}}
	settled, cut := planOf("a", 1, time.Hour), planOf("b", 1, time.Minute)
	a, err := j.Begin(access, settled, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(a.Images(Image{Key: "k"}), a.Finish("failed", "no")); err != nil {
		t.Fatal(err)
	}
	alone := Access{Door: "console", Alone: true, Nonce: "n2"}
	if a, err = j.Begin(alone, cut, 0); err != nil {
		t.Fatal(err)
	}
	if err := a.Images(Image{Key: "k"}); err != nil {
		t.Fatal(err)
	}
	for _, when := range []string{"at once", "after a restart"} {
		entries := j.Entries()
		if len(entries) != 2 || !reflect.DeepEqual(entries[1].Access, access) || !reflect.DeepEqual(entries[0].Access, alone) {
			t.Errorf("%s: %+v", when, entries)
		}
		if r, err := j.Read("a"); err != nil || !reflect.DeepEqual(r.Access, access) {
			t.Errorf("%s: %+v, %v", when, r, err)
		}
		if last := j.Last(); !last.Equal(cut.Created.AsTime()) {
			t.Errorf("%s: the last record is of %v", when, last)
		}
		for _, nonce := range []string{"n1", "n2"} {
			if _, err := j.Begin(Access{Nonce: nonce}, planOf("c", 1, 0), 0); !fault.Is(err, fault.Refused) || !strings.Contains(err.Error(), "used already") {
				t.Errorf("%s: approvals of %s used twice: %v", when, nonce, err)
			}
		}
		j.Close()
		if j, err = Open(dir, Options{}); err != nil {
			t.Fatal(err)
		}
		defer j.Close()
	}
}

// TestExpire: what policy keeps no longer goes, and nothing that is unsettled, or
// that can still be taken back.
func TestExpire(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	j := open(t, dir, Options{})
	settled(t, j, "20260101-000000-old", 72*time.Hour, 10)
	settled(t, j, "20260102-000000-mid", 60*time.Hour, 10)
	a, err := j.Begin(Access{}, planOf("20260101-000001-open", 1, 71*time.Hour), 10)
	check(t, err)
	check(t, a.Images(imageOf(0, []byte("x"))))
	settled(t, j, "20260103-000000-new", time.Hour, 10)
	if n, err := j.Expire(time.Now().Add(-65 * time.Hour)); n != 1 || err != nil {
		t.Error(n, err)
	}
	if n, err := j.Expire(time.Now()); n != 1 || err != nil {
		t.Error(n, err)
	}
	if left := strings.Join(ids(j.Entries()), " "); left != "20260103-000000-new 20260101-000001-open" {
		t.Error(left)
	}
	r, err := j.Settled("20260103-000000-new")
	check(t, err)
	whole, err := io.ReadAll(r)
	check(t, errors.Join(err, r.Close()))
	if file, err := os.ReadFile(filepath.Join(dir, "actions", "20260103-000000-new.jsonl")); err != nil || !bytes.Equal(file, whole) {
		t.Errorf("%d bytes, %v", len(whole), err)
	}
	for _, id := range []string{"20260101-000001-open", "20260101-000000-old"} {
		if _, err := j.Settled(id); err == nil {
			t.Errorf("%s is settled", id)
		}
	}
}
