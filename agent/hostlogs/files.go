package hostlogs

import (
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/halligan-io/halligan/agent/node"
	"github.com/halligan-io/halligan/internal/fault"
)

// file is one of a component's, not yet opened.
type file struct {
	path string
	// runtime: it has the format of a container runtime.
	runtime bool
	// rotated: nobody writes it any more.
	rotated bool
	// within, if set, are the folders that a link may lead to.
	within []string
	// group and order sort: the last is the one that is written.
	group time.Time
	order string
}

// kubelets name logs RESTARTS.log, and what they rotated RESTARTS.log.TIME, .gz from
// the second on (kubernetes pkg/kubelet/logs/container_log_manager.go).
var kubeletName = regexp.MustCompile(`^(\d{1,10})\.log(?:\.(\d{8}-\d{6})(?:\.gz)?)?$`)

// What others put behind a name when they rotate: a number or a date (logrotate), and
// before its end a time (lumberjack, which RKE2's kubelet.log goes through).
var rotatedEnd = regexp.MustCompile(`^[.-]\d{1,14}(?:\.gz)?$`)
var rotatedTime = regexp.MustCompile(`^-\d{4}-\d\d-\d\dT[0-9.-]+$`)

// maxFiles bounds how many are looked at, the newest.
const maxFiles = 256

// list returns the files there are, oldest first.
func (q *query) list(where []node.Logs) []file {
	var all []file
	within := []string{filepath.Join(q.Root, "/var/log"), filepath.Join(q.Root, "/var/lib/docker/containers")}
	for _, l := range where {
		found := len(all)
		for _, dir := range globs(l.Pods) {
			all = append(all, kubeletFiles(dir, within)...)
		}
		if len(all) == found {
			seen := map[string]bool{}
			for _, link := range globs(l.Links) {
				target, err := filepath.EvalSymlinks(link)
				switch dir := filepath.Dir(target); {
				case err != nil || isAudit(target):
				case !kubeletName.MatchString(filepath.Base(target)):
					all = append(all, file{path: link, runtime: true, within: within, group: written(target)})
				case !seen[dir]:
					seen[dir] = true
					all = append(all, kubeletFiles(dir, within)...)
				}
			}
		}
		for _, path := range globs(l.Files) {
			all = append(all, plainFiles(path)...)
		}
	}
	slices.SortStableFunc(all, func(a, b file) int {
		return cmp.Or(a.group.Compare(b.group), strings.Compare(a.order, b.order))
	})
	all = slices.CompactFunc(all, func(a, b file) bool { return a.path == b.path })
	return all[max(0, len(all)-maxFiles):]
}

func globs(patterns []string) (all []string) {
	for _, p := range patterns {
		found, _ := filepath.Glob(p) // its only error is a bad pattern
		all = append(all, found...)
	}
	return all
}

func written(path string) time.Time {
	st, err := os.Stat(path)
	if err != nil {
		return time.Time{}
	}
	return st.ModTime()
}

// kubeletFiles are those of one container.
func kubeletFiles(dir string, within []string) (all []file) {
	entries, _ := os.ReadDir(dir)
	var newest time.Time
	for _, e := range entries {
		m := kubeletName.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		path := filepath.Join(dir, e.Name())
		all = append(all, file{path: path, runtime: true, rotated: m[2] != "", within: within, order: fmt.Sprintf("%10s %s", m[1], cmp.Or(m[2], "~"))})
		if at := written(path); at.After(newest) {
			newest = at
		}
	}
	for i := range all {
		all[i].group = newest
	}
	return all
}

// plainFiles are a file and what was rotated of it.
func plainFiles(path string) (all []file) {
	if isAudit(path) {
		return nil
	}
	name := filepath.Base(path)
	ext := filepath.Ext(name)
	stem := strings.TrimSuffix(name, ext)
	entries, _ := os.ReadDir(filepath.Dir(path))
	for _, e := range entries {
		other := filepath.Join(filepath.Dir(path), e.Name())
		end, longer := strings.CutPrefix(e.Name(), name)
		middle, before := strings.CutPrefix(e.Name(), stem)
		if before {
			middle, before = strings.CutSuffix(strings.TrimSuffix(middle, ".gz"), ext)
		}
		if longer && rotatedEnd.MatchString(end) || before && rotatedTime.MatchString(middle) {
			all = append(all, file{path: other, rotated: true, order: fmt.Sprintf("%20d", written(other).UnixNano())})
		}
	}
	group := written(path)
	for i := range all {
		all[i].group = group
	}
	return append(all, file{path: path, group: group, order: "~"})
}

// open opens a file that is one, and lies where logs do.
func (f file) open() (*os.File, os.FileInfo, error) {
	path, err := filepath.EvalSymlinks(f.path)
	if err != nil {
		return nil, nil, err
	}
	if isAudit(path) {
		return nil, nil, errors.New("it is an audit log")
	}
	if len(f.within) > 0 && !slices.ContainsFunc(f.within, func(dir string) bool {
		dir, err := filepath.EvalSymlinks(dir)
		return err == nil && strings.HasPrefix(path, dir+"/")
	}) {
		return nil, nil, errors.New("it leads out of the folders of logs")
	}
	// A pipe would wait for a writer, and a link laid since then is none of logs.
	opened, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, nil, err
	}
	st, err := opened.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("it is no file")
	}
	if err != nil {
		opened.Close()
		return nil, nil, err
	}
	return opened, st, nil
}

// tracked is an open file.
type tracked struct {
	file
	*os.File
	info   os.FileInfo
	offset int64
	asm    assembler
	parser parser
}

func (q *query) track(f file) (*tracked, error) {
	opened, st, err := f.open()
	if err != nil {
		return nil, err
	}
	return &tracked{file: f, File: opened, info: st, asm: assembler{max: maxRaw + 256}, parser: parser{runtime: f.runtime, year: st.ModTime().Year()}}, nil
}

// lines returns what takes the file's lines, for a sink.
func (q *query) lines(t *tracked, sink func(string) error) func([]byte, bool) error {
	return func(line []byte, cut bool) error {
		return t.parser.parse(line, cut, func(text []byte, cut bool, at time.Time) error { return q.line(text, cut, at, sink) })
	}
}

// files sends the past, and what comes.
func (q *query) files(ctx context.Context, where []node.Logs, all []file) error {
	var open []*tracked
	defer func() {
		for _, t := range open {
			t.Close()
		}
	}()
	type part struct {
		path  string
		lines []string
	}
	var parts []part
	left, room, opened := q.tail, maxHeld, false
	var last error
	for _, f := range slices.Backward(all) {
		wanted := left > 0 && room > 0 && q.read < maxRead
		follows := q.req.GetFollow() && !f.rotated && len(open) < maxTracked
		if !wanted && !follows {
			continue
		}
		t, err := q.track(f)
		if errors.Is(err, fs.ErrNotExist) {
			continue // rotated away since
		}
		if err != nil {
			last = err
			q.out.note("%s is left out: %v", f.path, err)
			continue
		}
		opened = true
		if !wanted || t.info.ModTime().Before(q.since) {
			t.offset = t.info.Size()
		} else {
			past := &ring{max: left, room: room}
			if err := q.past(ctx, t, past); err != nil {
				t.Close()
				return err
			}
			if past.full {
				q.out.note("the lines asked for have more than %d MiB: older ones are left out", maxHeld>>20)
				room = 0
			}
			left, room = left-len(past.lines), room-past.bytes
			parts = append(parts, part{f.path, past.lines})
		}
		if follows {
			open = append(open, t)
		} else {
			t.Close()
		}
	}
	if !opened && last != nil {
		return fault.New(fault.Failed, "look at the node itself", "none of the log's files can be read: %w", last)
	}
	slices.Reverse(open)
	none := true
	for _, p := range slices.Backward(parts) {
		if len(p.lines) == 0 {
			continue
		}
		none = false
		if err := q.out.from(p.path); err != nil {
			return err
		}
		for _, l := range p.lines {
			if err := q.out.line(l); err != nil {
				return err
			}
		}
	}
	if none && !q.req.GetFollow() {
		q.out.note("no such lines in %d files, the newest %s", len(all), all[len(all)-1].path)
	}
	for _, l := range where {
		if l.Note != "" {
			q.out.note("%s", l.Note)
		}
	}
	if err := q.out.flush(); err != nil || !q.req.GetFollow() {
		return err
	}
	return q.follow(ctx, where, &open)
}

// past reads a file as it is now, at most what is left of the bytes: the end of one
// that is longer.
func (q *query) past(ctx context.Context, t *tracked, keep *ring) error {
	emit := q.lines(t, keep.push)
	var from io.Reader
	budget := maxRead - q.read
	if strings.HasSuffix(t.path, ".gz") {
		packed, err := gzip.NewReader(t.File)
		if err != nil {
			q.out.note("%s cannot be unpacked: %v", t.path, err)
			return nil
		}
		from = packed
	} else {
		size := t.info.Size()
		if t.offset = max(0, size-budget); t.offset > 0 {
			q.out.note("only the last %d MiB of %s are read", budget>>20, t.path)
			t.asm.skip = true
		}
		from = io.NewSectionReader(t.File, t.offset, size-t.offset)
	}
	buf := make([]byte, 64<<10)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := from.Read(buf)
		q.read += int64(n)
		t.offset += int64(n)
		if ferr := t.asm.feed(buf[:n], emit); ferr != nil {
			return ferr
		}
		if q.read >= maxRead && err == nil && strings.HasSuffix(t.path, ".gz") {
			// Its end, which would be asked for, is behind what may be read.
			keep.lines, keep.bytes = nil, 0
			q.out.note("%s is left out: unpacked, it has more than is left of %d MiB", t.path, maxRead>>20)
			return nil
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			q.out.note("%s is read up to where it cannot be: %v", t.path, err)
			break
		}
	}
	if q.req.GetFollow() && !t.rotated {
		return nil // its last line may not be whole
	}
	return t.asm.flush(emit)
}

// follow sends what is written from now on, whatever becomes of the files' names:
// what is renamed is read to its end, and what takes the name from its beginning.
func (q *query) follow(ctx context.Context, where []node.Logs, open *[]*tracked) error {
	tick := time.NewTicker(q.Poll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		grown := map[*tracked]bool{}
		again := func() error {
			for _, t := range *open {
				n, err := q.more(ctx, t)
				if err != nil {
					return err
				}
				grown[t] = grown[t] || n > 0
			}
			return nil
		}
		if err := again(); err != nil {
			return err
		}
		var fresh []*tracked
		there := map[*tracked]bool{}
		for _, f := range q.list(where) {
			st, err := os.Stat(f.path)
			if err != nil {
				continue
			}
			i := slices.IndexFunc(*open, func(t *tracked) bool { return os.SameFile(st, t.info) })
			if i >= 0 {
				there[(*open)[i]] = true
			} else if !f.rotated && len(*open)+len(fresh) < maxTracked {
				if t, err := q.track(f); err == nil {
					fresh = append(fresh, t)
				}
			}
		}
		if len(fresh) > 0 {
			// What the writer still put into the old ones comes first.
			err := again()
			*open = append(*open, fresh...)
			for _, t := range fresh {
				there[t] = true
				if err == nil {
					_, err = q.more(ctx, t)
				}
			}
			if err != nil {
				return err
			}
		}
		*open = slices.DeleteFunc(*open, func(t *tracked) bool {
			if there[t] || grown[t] {
				return false
			}
			_ = t.asm.flush(q.lines(t, q.out.line))
			t.Close()
			return true
		})
		if err := q.out.flush(); err != nil {
			return err
		}
	}
}

// more sends what was added to a file, and returns how many bytes that is.
func (q *query) more(ctx context.Context, t *tracked) (n int64, err error) {
	st, err := t.Stat()
	if err != nil {
		return 0, nil
	}
	if st.Size() < t.offset {
		q.out.note("%s was cut: it goes on from its beginning", t.path)
		t.offset, t.asm = 0, assembler{max: t.asm.max}
	}
	if st.Size() == t.offset {
		return 0, nil
	}
	if err := q.out.from(t.path); err != nil {
		return 0, err
	}
	t.parser.year = st.ModTime().Year()
	emit := q.lines(t, q.out.line)
	buf := make([]byte, 64<<10)
	for {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		got, rerr := t.ReadAt(buf, t.offset)
		t.offset += int64(got)
		n += int64(got)
		if err := t.asm.feed(buf[:got], emit); err != nil {
			return n, err
		}
		if rerr != nil || got == 0 {
			return n, nil
		}
	}
}
