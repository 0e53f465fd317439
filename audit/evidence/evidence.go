// Package evidence reads what daemons have recorded, offline and without believing
// any of it: folders of logs as agents and bastions keep them, as bastions keep
// copies of them, and as auditors fetch them. Verify says whose they are, whether
// they are whole, and who else has vouched for how much of them; only after that
// are there events to read, and only those that hold.
//
// It must never trust the name of a file or folder, take an entry for an event
// before its tree hash has vouched for it, or change what it reads. Store alone
// writes: an auditor's own copy, which only ever grows. It stands on floor 2.
package evidence

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

const (
	// identityFile and the others are the names in a folder of evidence. That of a
	// lineage follows the statement's name, where a log has begun anew since.
	identityFile   = "identity"
	lineageFile    = "identity."
	problemsFolder = "problems"
	logsFolder     = "logs"
	castsFolder    = "recordings"
	sealedFolder   = "sealed"
	castSuffix     = ".cast"
	sealedSuffix   = ".age"
	checkpointFile = "checkpoint"
	cosignedFile   = "cosigned"
	// maxNote bounds a signed note, in bytes.
	maxNote = 64 << 10
	// maxSealed bounds what is read of sealed before-images; bastions keep no more.
	maxSealed = 128 << 20
	// maxTar bounds what is unpacked of an archive: bytes and files.
	maxTar, maxTarFiles = 16 << 30, 4 << 20
	// apart begins what the name of a folder has behind the origin where it holds
	// a copy that contradicts the one under the origin's own name.
	apart = "~"
)

// generationForm is the name of a log's folder: LINEAGE.GENERATION.
var generationForm = regexp.MustCompile(`^[0-9a-f]{8}\.[0-9]{8,}$`)

// Evidence is a set of folders, each of which one daemon has filled. Verify comes
// before all else. It is used by one goroutine at a time.
type Evidence struct {
	folders []*folder
	temp    string // what Close removes
	report  *Report
	held    []*held
}

// folder is one daemon's.
type folder struct {
	name       string // "" where it is the only one
	dir        string
	fs         fs.FS
	statements map[string]statement // by lineage; "": the newest
}

// statement is what a server says of its keys, or why it is not believed.
type statement struct {
	logkey.Statement
	err error
}

// statement returns the one that holds for a lineage.
func (f *folder) statement(lineage string) statement {
	if s, own := f.statements[lineage]; own {
		return s
	}
	if s, ok := f.statements[""]; ok {
		return s
	}
	return statement{err: fs.ErrNotExist}
}

// Open finds the folders of evidence in a folder, which is one itself or has them
// in it, or in a tar archive of either.
func Open(name string) (*Evidence, error) {
	st, err := os.Stat(name)
	if err != nil {
		return nil, fault.New(fault.Usage, "name a folder of evidence, or a tar archive of one", "the evidence cannot be read: %w", err)
	}
	e := &Evidence{}
	if !st.IsDir() {
		if e.temp, err = unpack(name); err != nil {
			e.Close()
			return nil, fault.New(fault.Usage, "name a folder of evidence, or a tar archive of one", "%s: %w", filepath.Base(name), err)
		}
		name = e.temp
	}
	// An archive may have the folder in it under any name.
	for depth := 0; depth < 3; depth++ {
		if is(name) {
			e.folders = append(e.folders, &folder{dir: name, fs: os.DirFS(name)})
			return e, nil
		}
		entries, err := os.ReadDir(name)
		if err != nil {
			e.Close()
			return nil, fault.New(fault.Usage, "", "the evidence cannot be read: %w", err)
		}
		var below []string
		for _, entry := range entries {
			if strings.HasPrefix(entry.Name(), ".") || !entry.IsDir() {
				continue
			}
			below = append(below, entry.Name())
			if dir := filepath.Join(name, entry.Name()); is(dir) {
				e.folders = append(e.folders, &folder{name: entry.Name(), dir: dir, fs: os.DirFS(dir)})
			}
		}
		if len(e.folders) > 0 {
			return e, nil
		}
		if len(below) != 1 {
			break
		}
		name = filepath.Join(name, below[0])
	}
	e.Close()
	return nil, fault.New(fault.Usage, "name the folder that halligan audit fetch made, or a daemon's own", "there is no evidence in %s", filepath.Base(name))
}

func is(dir string) bool {
	st, err := os.Stat(filepath.Join(dir, logsFolder))
	return err == nil && st.IsDir()
}

// Close lets go of what Open has unpacked.
func (e *Evidence) Close() {
	if e.temp != "" {
		_ = os.RemoveAll(e.temp)
	}
}

// unpack writes what an archive has into a folder of its own.
func unpack(name string) (dir string, err error) {
	f, err := os.Open(name) // #nosec G304 -- the person names it
	if err != nil {
		return "", err
	}
	defer f.Close()
	if dir, err = os.MkdirTemp("", "halligan-evidence-"); err != nil {
		return "", err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return dir, err
	}
	defer root.Close()
	left := int64(maxTar)
	for r, n := tar.NewReader(f), 0; ; n++ {
		h, err := r.Next()
		if errors.Is(err, io.EOF) && n > 0 {
			return dir, nil
		}
		if err != nil {
			return dir, fmt.Errorf("not a tar archive that can be read: %w", err)
		}
		to := path.Clean(strings.TrimPrefix(h.Name, "/"))
		if n > maxTarFiles || left <= 0 {
			return dir, errors.New("the archive is too large")
		}
		if to == "." || h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir {
			continue
		}
		if slices.ContainsFunc(slices.Collect(maps.Keys(h.PAXRecords)), func(name string) bool { return strings.HasPrefix(name, "GNU.sparse.") }) {
			return dir, fmt.Errorf("the archive has a sparse file %q, which evidence is not", to) // a few bytes could fill the disk
		}
		if !fs.ValidPath(to) {
			return dir, fmt.Errorf("the archive has a file %q", to)
		}
		if h.Typeflag == tar.TypeDir {
			if err := root.MkdirAll(to, 0o700); err != nil {
				return dir, err
			}
			continue
		}
		if err := root.MkdirAll(path.Dir(to), 0o700); err != nil {
			return dir, err
		}
		w, err := root.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return dir, err
		}
		wrote, err := io.Copy(w, io.LimitReader(r, left))
		left -= wrote
		if err = errors.Join(err, w.Close()); err != nil {
			return dir, err
		}
	}
}

// read reads a plain file of the folder, of at most max bytes.
func (f *folder) read(name string, max int64) ([]byte, error) {
	st, err := fs.Lstat(f.fs, name)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > max {
		return nil, fmt.Errorf("%s is no plain file of at most %d bytes", name, max)
	}
	return fs.ReadFile(f.fs, name)
}

// generations returns the folders of logs, in the order of lineage and generation.
func (f *folder) generations() (names []string) {
	entries, _ := fs.ReadDir(f.fs, logsFolder)
	for _, entry := range entries {
		if entry.IsDir() && generationForm.MatchString(entry.Name()) {
			names = append(names, entry.Name())
		}
	}
	slices.SortFunc(names, func(x, y string) int {
		if x[:8] == y[:8] && len(x) != len(y) {
			return len(x) - len(y)
		}
		return strings.Compare(x, y)
	})
	return names
}

// file names a file of the folder for people.
func (f *folder) file(parts ...string) string {
	return path.Join(append([]string{f.name}, parts...)...)
}

// origin is whose evidence the folder's name says that it is, "" where it says
// nothing.
func (f *folder) origin() string {
	origin, _, _ := strings.Cut(f.name, apart)
	return origin
}
