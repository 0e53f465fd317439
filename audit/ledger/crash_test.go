package ledger

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/halligan-io/halligan/audit"
)

// child keeps a log in a process of its own, says what it tries and what was
// acknowledged, and comes to harm at the step that it is told: it is killed, or
// gets no file descriptors, or can write no file, for a moment.
func child(dir string) {
	at, _ := strconv.Atoi(os.Getenv("LEDGER_STEP"))
	count, _ := strconv.Atoi(os.Getenv("LEDGER_EVENTS"))
	mode, run := os.Getenv("LEDGER_MODE"), os.Getenv("LEDGER_RUN")
	signal.Ignore(unix.SIGXFSZ)
	publishing = 300 * time.Millisecond // the driver fails often, and says nothing
	var steps atomic.Int64
	var harm sync.Mutex
	limit := func(resource int, max uint64) {
		harm.Lock()
		var r unix.Rlimit
		if err := unix.Getrlimit(resource, &r); err != nil {
			panic(err)
		}
		before := r.Cur
		r.Cur = max
		if err := unix.Setrlimit(resource, &r); err != nil {
			panic(err)
		}
		time.AfterFunc(5*time.Millisecond, func() {
			defer harm.Unlock()
			r.Cur = before
			if err := unix.Setrlimit(resource, &r); err != nil {
				panic(err)
			}
		})
	}
	var ready atomic.Bool
	o := Options{Dir: dir, Origin: "cp-1.prod", SpoolBytes: minSpool, GenerationBytes: 48 << 10, MaxBytes: 1 << 30, Steps: func(step string) {
		n := int(steps.Add(1))
		switch {
		case mode == "kill" && n == at:
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		case mode == "files" && ready.Load() && n%at == 0 && !strings.HasPrefix(step, "spool") && harm.TryLock():
			// Beside the driver, not under it: see ready.
			harm.Unlock()
			limit(unix.RLIMIT_NOFILE, 3)
		case mode == "writes" && ready.Load() && n%at == 0 && harm.TryLock():
			harm.Unlock()
			limit(unix.RLIMIT_FSIZE, 1)
		}
	}}
	l, err := open(o, 10*time.Millisecond, time.Millisecond)
	if err != nil {
		panic(err)
	}
	ready.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for i := range count {
		text := run + "/" + strconv.Itoa(i)
		fmt.Println("try", text)
		r, err := l.Append(ctx, audit.Event{Kind: audit.Intent, Actor: ann, Text: text, Reason: strings.Repeat("r", 2500)})
		if err != nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		fmt.Println("ack", text, r.Seq)
		if mode != "kill" || i == 0 {
			if err := l.SignedWithin(ctx, r.Seq); err != nil {
				panic(fmt.Sprintf("%v: %+v", err, l.State()))
			}
		}
	}
	harm.Lock() // the last harm is over
	ready.Store(false)
	harm.Unlock()
	if err := l.Close(); err != nil {
		panic(err)
	}
	os.Exit(0)
}

// story is what children said.
type story struct {
	tried map[string]bool
	acked map[string]uint64
}

// runChild runs one, and reports whether it came to its end. What started begins,
// which may kill it, is over when its own end is awaited.
func runChild(t *testing.T, s *story, dir, mode string, run, step, count int, started func(pid int) (end func())) bool {
	t.Helper()
	cmd := exec.CommandContext(within(t, 2*minute), os.Args[0])
	cmd.Env = append(os.Environ(), "LEDGER_CHILD="+dir, "LEDGER_MODE="+mode, fmt.Sprint("LEDGER_RUN=", run), fmt.Sprint("LEDGER_STEP=", step), fmt.Sprint("LEDGER_EVENTS=", count))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end := func() {}
	if started != nil {
		end = started(cmd.Process.Pid)
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		f := strings.Fields(lines.Text())
		switch {
		case len(f) == 2 && f[0] == "try":
			s.tried[f[1]] = true
		case len(f) == 3 && f[0] == "ack":
			seq, err := strconv.ParseUint(f[2], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			s.acked[f[1]] = seq
		}
	}
	end()
	err = cmd.Wait()
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); err != nil && (!ok || status.Signal() != syscall.SIGKILL) {
		t.Fatalf("run %d, step %d: %v\n%s", run, step, err, stderr.Bytes())
	}
	return err == nil
}

// check opens the log and compares it with what the children said: nothing that was
// acknowledged is missing or stands elsewhere, nothing is there twice, and nothing
// that nobody tried.
func (s *story) check(t *testing.T, dir string) {
	t.Helper()
	l := opened(t, Options{Dir: dir, SpoolBytes: minSpool, GenerationBytes: 48 << 10, MaxBytes: 1 << 30})
	eventually(t, "all is signed", func() bool { st := l.State(); return st.Refused != "" || st.Signed == st.Events })
	if st := l.State(); st.Refused != "" {
		t.Fatal(st.Refused)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	seen := map[string]uint64{}
	for _, e := range read(t, l) {
		if e.Kind == audit.Seam || e.Kind == audit.Lost {
			continue
		}
		if _, twice := seen[e.Text]; twice || !s.tried[e.Text] {
			t.Fatalf("event %d (%s) is there twice: %v, was tried: %v", e.Seq, e.Text, twice, s.tried[e.Text])
		}
		seen[e.Text] = e.Seq
	}
	for text, seq := range s.acked {
		if at, ok := seen[text]; !ok || at != seq {
			t.Fatalf("event %d (%s) was acknowledged, and is there: %v, as %d", seq, text, ok, at)
		}
	}
}

// TestKilledAtEachStep kills the process before each write, sync and rename: first
// in a new folder, then again and again in one, over several generations.
func TestKilledAtEachStep(t *testing.T) {
	t.Parallel() // it mostly waits for processes
	base := t.TempDir()
	for step := 1; step < 14; step++ {
		s := &story{map[string]bool{}, map[string]uint64{}}
		dir := filepath.Join(base, strconv.Itoa(step))
		runChild(t, s, dir, "kill", 0, step, 2, nil)
		s.check(t, dir)
	}
	s := &story{map[string]bool{}, map[string]uint64{}}
	dir := filepath.Join(base, "one")
	for step, whole := 1, 0; whole < 3; step++ {
		if runChild(t, s, dir, "kill", step, step, 5, nil) {
			whole++ // there are not that many steps
		}
		if step%8 == 0 || whole == 3 {
			s.check(t, dir)
		}
		if step > 200 {
			t.Fatal("no end")
		}
	}
	if len(s.acked) < 50 {
		t.Errorf("%d events", len(s.acked))
	}
}

// TestKilledInTheDriver kills the process while the tree's driver is at work on its
// files: after the N-th change of a name in its folders.
func TestKilledInTheDriver(t *testing.T) {
	t.Parallel() // it mostly waits for processes
	s := &story{map[string]bool{}, map[string]uint64{}}
	dir := filepath.Join(t.TempDir(), "audit")
	runChild(t, s, dir, "whole", 0, 0, 4, nil)
	for run := 1; run < 20; run++ {
		// What a killed process leaves is what the next one begins with.
		runChild(t, s, dir, "whole", run, 0, 6, func(pid int) func() { return killAfter(t, dir, pid, run) })
		if run%6 == 5 {
			s.check(t, dir)
		}
	}
}

// killAfter kills a process after so many names in the folders of trees were made or
// changed.
func killAfter(t *testing.T, dir string, pid, changes int) (end func()) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	in := os.NewFile(uintptr(fd), "inotify")
	err = filepath.WalkDir(filepath.Join(dir, logs), func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			_, err = unix.InotifyAddWatch(fd, path, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_CLOSE_WRITE)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	done.Go(func() {
		buf := make([]byte, 4096)
		for left := changes; left > 0; {
			n, err := in.Read(buf)
			if err != nil {
				return
			}
			for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; left-- {
				name := int(b[12]) | int(b[13])<<8
				b = b[unix.SizeofInotifyEvent+name:]
			}
		}
		_ = unix.Kill(pid, unix.SIGKILL)
	})
	return func() {
		in.Close()
		done.Wait()
	}
}

// TestFaultsAtEachStep takes file descriptors away, or the right to write files, for
// a moment at many different steps: the process lives, refuses what it cannot
// record, and goes on.
func TestFaultsAtEachStep(t *testing.T) {
	t.Parallel() // it mostly waits for processes
	for _, mode := range []string{"files", "writes"} {
		s := &story{map[string]bool{}, map[string]uint64{}}
		dir := filepath.Join(t.TempDir(), mode)
		for run, every := range []int{13, 17, 29} {
			if !runChild(t, s, dir, mode, run, every, 20, nil) {
				t.Fatal("killed")
			}
			s.check(t, dir)
		}
		if len(s.acked) < 10 {
			t.Errorf("%s: %d events of %d were acknowledged", mode, len(s.acked), len(s.tried))
		}
	}
}

// imaged returns copies of a log's folder as it is when the events are acknowledged
// and not in the tree yet.
func imaged(t *testing.T, events int) (image func() string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "audit")
	block := make(chan struct{})
	var blocking atomic.Bool
	l := opened(t, Options{Dir: dir, SpoolBytes: minSpool, Steps: func(step string) {
		if step == "tree add" && blocking.Load() {
			<-block
		}
	}})
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start}).Seq)
	blocking.Store(true)
	for i := range events {
		add(t, l, audit.Event{Kind: audit.Intent, Text: fmt.Sprint(i)})
	}
	first := filepath.Join(t.TempDir(), "image")
	if out, err := exec.Command("cp", "-a", dir, first).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	close(block)
	l.Close()
	return func() string {
		t.Helper()
		dir := filepath.Join(t.TempDir(), "image")
		if out, err := exec.Command("cp", "-a", first, dir).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return dir
	}
}

// change rewrites a file of an image.
func change(t *testing.T, path string, edit func([]byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, edit(data), 0o600); err != nil {
		t.Fatal(err)
	}
}

// records returns where those of a spool begin.
func records(spool []byte) (at []int) {
	for off := spoolHeader; off < len(spool); off += block {
		if [8]byte(spool[off:]) == recordMagic {
			at = append(at, off)
		}
	}
	return at
}

// TestTornTail: what was being written when the power went, and nobody was told was
// durable, is cut; the events before it are there, and new ones follow.
func TestTornTail(t *testing.T) {
	image := imaged(t, 4)
	dir := image()
	change(t, filepath.Join(dir, spoolFile), func(b []byte) []byte {
		at := records(b)
		clear(b[at[4]+100:])
		clear(b[markAt : markAt+16]) // the kernel had not written it either
		return b
	})
	l := opened(t, Options{Dir: dir, SpoolBytes: minSpool})
	if n, torn := l.Found(); n != 3 || torn == 0 {
		t.Errorf("%d events taken over, %d bytes torn", n, torn)
	}
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start, Text: "new"}).Seq)
	var texts []string
	for _, e := range read(t, l) {
		texts = append(texts, e.Text)
	}
	if got := strings.Join(texts, " "); got != " 0 1 2 new" {
		t.Errorf("%q", got)
	}
}

// TestDamage: whatever happened to what was acknowledged, the log stops loudly,
// stays readable, and is left as it is.
func TestDamage(t *testing.T) {
	image := imaged(t, 4)
	spool := func(edit func(b []byte, at []int) []byte) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			change(t, filepath.Join(dir, spoolFile), func(b []byte) []byte { return edit(b, records(b)) })
		}
	}
	tree := func(name string) string { return filepath.Join(logs, "*.00000001", name) }
	file := func(name string, edit func([]byte) []byte) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			found, err := filepath.Glob(filepath.Join(dir, name))
			if err != nil || len(found) != 1 {
				t.Fatalf("%s: %q", name, found)
			}
			change(t, found[0], edit)
		}
	}
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	for what, harm := range map[string]func(*testing.T, string){
		"first":         spool(func(b []byte, at []int) []byte { b[at[1]+60] ^= 1; return b }),
		"middle":        spool(func(b []byte, at []int) []byte { b[at[2]+60] ^= 1; return b }),
		"middle's head": spool(func(b []byte, at []int) []byte { b[at[2]] ^= 1; return b }),
		"last":          spool(func(b []byte, at []int) []byte { b[at[4]+60] ^= 1; return b }),
		"gone":          spool(func(b []byte, at []int) []byte { clear(b[at[1]:]); return b }),
		"cut":           spool(func(b []byte, _ []int) []byte { return b[:len(b)-1] }),
		"header":        spool(func(b []byte, _ []int) []byte { b[10] ^= 1; return b }),
		"tree state":    file(tree(".state/treeState"), func([]byte) []byte { return []byte(`{"size":9,"root":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`) }),
		"no state":      file(tree(".state/treeState"), func([]byte) []byte { return nil }),
		"checkpoint":    file(tree("checkpoint"), flip),
		"entry":         file(tree("tile/entries/000.p/1"), flip),
		"tile":          file(tree("tile/0/000.p/1"), flip),
		"key":           file(keyFile, flip),
		"other key": func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, keyFile)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(what, func(t *testing.T) {
			dir := image()
			harm(t, dir)
			before, err := os.ReadFile(filepath.Join(dir, spoolFile))
			if err != nil {
				t.Fatal(err)
			}
			h := &heard{}
			l := opened(t, Options{Dir: dir, SpoolBytes: minSpool, Raise: h.raise})
			s := l.State()
			if s.Refused == "" || s.Reserve != 0 || !h.of("cannot be recorded") {
				t.Fatalf("%+v, %q", s, h.texts)
			}
			if _, err := l.Append(t.Context(), audit.Event{Kind: audit.Intent, Actor: ann}); err == nil || !strings.Contains(err.Error(), s.Refused) || !strings.Contains(err.Error(), "for the auditor") {
				t.Errorf("%v", err)
			}
			if _, err := l.Reserve(audit.Event{Kind: audit.Intent, Actor: ann}); err == nil {
				t.Error("there is room")
			}
			l.Note(audit.Event{Kind: audit.Read})
			l.Close()
			if after, err := os.ReadFile(filepath.Join(dir, spoolFile)); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the spool was changed: %v", err)
			}
			if slices.Contains([]string{"first", "middle", "middle's head", "last", "gone"}, what) && len(read(t, l)) != 1 {
				t.Error("what is in the tree cannot be read")
			}
		})
	}
	// A tree that is gone is made again while the spool holds all of it, and is the
	// same then.
	dir := image()
	if err := os.Rename(filepath.Join(dir, logs), filepath.Join(dir, "away")); err != nil {
		t.Fatal(err)
	}
	again := opened(t, Options{Dir: dir, SpoolBytes: minSpool})
	signed(t, again, 4)
	if n := len(read(t, again)); n != 5 {
		t.Errorf("%d events", n)
	}
	// Without its spool a new log begins, and the old one stays for the auditor.
	dir = image()
	if err := os.Remove(filepath.Join(dir, spoolFile)); err != nil {
		t.Fatal(err)
	}
	h := &heard{}
	l := opened(t, Options{Dir: dir, SpoolBytes: minSpool, Raise: h.raise})
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start}).Seq)
	if heads := l.Heads(); len(heads) != 2 || l.State().Events != 1 || !h.of("begins anew") {
		t.Errorf("%+v", heads)
	}
}

// TestEachByteOfTheSpool: one that is changed is either of no meaning or refused.
func TestEachByteOfTheSpool(t *testing.T) {
	dir := imaged(t, 3)()
	steps := func(string) {}
	s, err := openSpool(filepath.Join(dir, spoolFile), steps)
	if err != nil {
		t.Fatal(err)
	}
	defer s.f.Close()
	data, err := os.ReadFile(filepath.Join(dir, spoolFile))
	if err != nil {
		t.Fatal(err)
	}
	whole, err := s.scan(1)
	if err != nil || len(whole.pending) != 3 {
		t.Fatalf("%v: %+v", err, whole)
	}
	at := records(data)
	refused, of := 0, 0
	for i := at[1]; i < at[3]+block; i += 3 {
		b := []byte{data[i] ^ 0x41}
		if _, err := s.f.WriteAt(b, int64(i)); err != nil {
			t.Fatal(err)
		}
		of++
		if got, err := s.scan(1); err != nil {
			refused++
		} else if len(got.pending) != 3 {
			t.Errorf("with byte %d changed there are %d events", i, len(got.pending))
		} else {
			for _, r := range got.pending {
				event, err := s.read(r)
				if err != nil || !json.Valid(event) {
					t.Errorf("byte %d: %v", i, err)
				}
			}
		}
		if _, err := s.f.WriteAt(data[i:i+1], int64(i)); err != nil {
			t.Fatal(err)
		}
	}
	if refused < of/3 {
		t.Errorf("%d of %d changes were noticed", refused, of)
	}
}
