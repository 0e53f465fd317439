package ledger

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
)

// disk mounts a small file system.
func disk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size+",mode=0700"); err != nil {
		if errors.Is(err, unix.EPERM) {
			t.Skip("needs the right to mount")
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fillUp takes all room, and returns how to give it back.
func fillUp(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for data := make([]byte, 4096); err == nil; {
		_, err = f.Write(data)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// size of an event of the stated reserve: with what the log adds it fills a unit.
func sized(e audit.Event) audit.Event {
	e.Parameters = []byte(`"` + strings.Repeat("p", 1400) + `"`)
	return e
}

// TestFullDisk: the reserve carries at least the number of events that was stated,
// whatever others did before, and every outcome; then it is exit 7, for a mutation
// and not for a read; with room again everything is in the tree, in order.
func TestFullDisk(t *testing.T) {
	dir := disk(t, "5m")
	h := &heard{}
	l := opened(t, Options{Dir: filepath.Join(dir, "audit"), SpoolBytes: 1 << 20, Raise: h.raise})
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start}).Seq)
	free := fillUp(t, dir)
	add(t, l, audit.Event{Kind: audit.Login})
	eventually(t, "the tree takes nothing", func() bool { return l.State().Problem != "" })
	stated := l.State().Reserve
	if stated != 256 || !h.of("no space left") {
		t.Fatalf("a reserve of %d: %q", stated, h.texts)
	}
	var want []string
	ack := func(e audit.Event) error {
		r, err := l.Append(within(t, minute), sized(e))
		if err == nil {
			want = append(want, r.ID)
		}
		return err
	}
	// Automation, and reads, leave the reserve alone.
	robot := audit.Event{Kind: audit.Intent, Actor: &audit.Actor{Person: "robot", Role: "commander", Credential: "automation"}}
	for range 2000 {
		l.Note(sized(audit.Event{Kind: audit.Recording}))
	}
	taken := 0
	for ; ack(robot) == nil; taken++ {
	}
	if s := l.State(); taken < 50 || s.Lost == 0 || s.Reserve != stated {
		t.Errorf("%d of automation's: %+v", taken, s)
	}
	if _, err := l.Reserve(robot); !fault.Is(err, fault.AuditUnavailable) {
		t.Errorf("%v", err)
	}
	// People in an emergency have what was stated: intents, and their outcomes.
	intent := audit.Event{Kind: audit.Intent, Actor: ann}
	done := 0
	var rooms []audit.Room
	for ; ; done += 2 {
		room, err := l.Reserve(intent)
		if err != nil {
			if !fault.Is(err, fault.AuditUnavailable) || fault.CodeOf(err).Exit() != 7 {
				t.Errorf("%v", err)
			}
			break
		}
		if err := ack(intent); err != nil {
			t.Fatalf("after %d: %v", done, err)
		}
		rooms = append(rooms, room)
	}
	if done < stated-2 {
		t.Errorf("%d events of %d that were stated", done, stated)
	}
	for ack(intent) == nil { // even when others use up what is left
	}
	for i, room := range rooms {
		r, err := room.Append(within(t, minute), audit.Event{Kind: audit.Outcome, Actor: ann, Error: strings.Repeat("e", 4000), Objects: many(20 << 10)})
		if err != nil {
			t.Fatalf("outcome %d of %d: %v", i, len(rooms), err)
		}
		want = append(want, r.ID)
		room.Release()
		room.Release()
	}
	if s := l.State(); s.Reserve > 1 || s.Refused != "" {
		t.Errorf("%+v", s)
	}
	if n := len(read(t, l)); n != 1 {
		t.Errorf("%d events can be read", n)
	}
	// The process is killed, more or less, and starts on the full disk.
	l.Close()
	l = opened(t, Options{Dir: filepath.Join(dir, "audit"), SpoolBytes: 1 << 20})
	eventually(t, "the tree still takes nothing", func() bool { return l.State().Problem != "" })
	if err := ack(intent); !fault.Is(err, fault.AuditUnavailable) {
		t.Errorf("after a restart: %v", err)
	}
	free()
	eventually(t, "all is signed", func() bool { s := l.State(); return s.Problem == "" && s.Signed == s.Events })
	if err := ack(intent); err != nil {
		t.Fatal(err)
	}
	signed(t, l, l.State().Events-1)
	at := map[string]uint64{}
	for _, e := range read(t, l) {
		at[e.ID] = e.Seq
	}
	for i, id := range want {
		if at[id] == 0 || i > 0 && at[id] < at[want[i-1]] {
			t.Fatalf("event %d of %d is missing or stands elsewhere", i, len(want))
		}
	}
}

// TestFullFromTheStart: a log that cannot even begin refuses, and begins when there
// is room, with the key that it has said.
func TestFullFromTheStart(t *testing.T) {
	dir := disk(t, "3m")
	free := fillUp(t, dir)
	l := opened(t, Options{Dir: filepath.Join(dir, "audit"), SpoolBytes: minSpool})
	key := l.Key()
	if s := l.State(); s.Refused == "" || s.Reserve != 0 {
		t.Fatalf("%+v", s)
	}
	if _, err := l.Append(t.Context(), audit.Event{}); !fault.Is(err, fault.AuditUnavailable) {
		t.Error(err)
	}
	l.Note(audit.Event{Kind: audit.Read})
	free()
	eventually(t, "it begins", func() bool { return l.State().Refused == "" })
	signed(t, l, add(t, l, audit.Event{Kind: audit.Intent}).Seq)
	if all := read(t, l); !key.Equal(l.Key()) || all[0].Kind != audit.Intent && all[0].Kind != audit.Lost {
		t.Errorf("%+v", all)
	}
}

// TestReadOnlyDisk: nothing can be recorded, all can be read, and it goes on when it
// can be written again.
func TestReadOnlyDisk(t *testing.T) {
	dir := disk(t, "8m")
	o := Options{Dir: filepath.Join(dir, "audit"), SpoolBytes: minSpool}
	l := opened(t, o)
	for i := range 3 {
		add(t, l, audit.Event{Kind: audit.Start, Text: fmt.Sprint(i)})
	}
	l.Close()
	remount := func(flags uintptr) {
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT|flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	remount(unix.MS_RDONLY)
	l = opened(t, o)
	if s := l.State(); !strings.Contains(s.Refused, "read-only") || len(read(t, l)) != 3 {
		t.Errorf("%+v", s)
	}
	if _, err := l.Append(t.Context(), audit.Event{Kind: audit.Intent, Actor: ann}); !fault.Is(err, fault.AuditUnavailable) {
		t.Error(err)
	}
	remount(0)
	eventually(t, "it goes on", func() bool { return l.State().Refused == "" })
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start}).Seq)
	if n := len(read(t, l)); n != 4 {
		t.Errorf("%d events", n)
	}
}
