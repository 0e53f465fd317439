package durable

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func modeOf(t *testing.T, path string) fs.FileMode {
	t.Helper()
	st, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Mode()
}

func TestDir(t *testing.T) {
	base := t.TempDir()
	if err := os.Chmod(base, 0o755); err != nil { // a parent that was there may be open
		t.Fatal(err)
	}
	path := filepath.Join(base, "a", "b", "c")
	for range 2 {
		if err := Dir(path); err != nil {
			t.Fatal(err)
		}
	}
	for p := path; p != base; p = filepath.Dir(p) {
		if m := modeOf(t, p); m.Perm() != 0o700 {
			t.Errorf("%s was made with mode %v", p, m)
		}
	}
	if m := modeOf(t, base); m.Perm() != 0o755 {
		t.Errorf("the parent was changed to %v", m)
	}
	for _, mode := range []fs.FileMode{0o701, 0o710, 0o750, 0o755, 0o777 | fs.ModeSticky} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if err := Dir(path); err == nil || !strings.Contains(err.Error(), "chmod 700") {
			t.Errorf("mode %v: %v", mode, err)
		}
		if m := modeOf(t, path); m.Perm() != mode.Perm() {
			t.Errorf("the mode was changed to %v", m)
		}
	}
	link, file := filepath.Join(base, "link"), filepath.Join(base, "file")
	if err := errors.Join(os.Symlink("a", link), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{link, file} {
		if err := Dir(p); err == nil || !strings.Contains(err.Error(), "not a folder") {
			t.Errorf("%s: %v", p, err)
		}
	}
	if err := Dir(filepath.Join(file, "below")); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("below a file: %v", err)
	}
}

func TestCheckPrivate(t *testing.T) {
	base := t.TempDir()
	file, link := filepath.Join(base, "file"), filepath.Join(base, "link")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Symlink(file, link)); err != nil {
		t.Fatal(err)
	}
	for mode, ok := range map[fs.FileMode]bool{0o600: true, 0o400: true, 0o640: false, 0o604: false, 0o620: false} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		if err := CheckPrivate(file); (err == nil) != ok {
			t.Errorf("mode %v: %v", mode, err)
		}
	}
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{link, base} {
		if err := CheckPrivate(p); err == nil || !strings.Contains(err.Error(), "not a plain file") {
			t.Errorf("%s: %v", p, err)
		}
	}
	if err := CheckPrivate(filepath.Join(base, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

// TestOwner: only root can give files away.
func TestOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := filepath.Join(t.TempDir(), "dir")
	file := filepath.Join(dir, "file")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(file, nil, 0o600), os.Chown(file, 65534, -1), os.Chown(dir, 65534, -1)); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{Dir(dir), CheckPrivate(file)} {
		if err == nil || !strings.Contains(err.Error(), "belongs to user 65534") {
			t.Errorf("another user's: %v", err)
		}
	}
}

// TestLent: what the service manager gives to this service alone is private,
// whatever an access control list makes its mode look like.
func TestLent(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir, other := t.TempDir(), t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	for _, c := range []struct {
		dir  string
		mode fs.FileMode
		uid  int
		ok   bool
	}{
		{dir, 0o440, 0, true}, {dir, 0o400, 0, true}, {dir, 0o400, os.Geteuid(), true},
		{dir, 0o444, 0, false}, {dir, 0o460, 0, false}, {dir, 0o640, 0, false}, {dir, 0o440, 65534, false},
		{filepath.Join(dir, "deeper"), 0o440, 0, false}, {other, 0o440, 0, false},
	} {
		file := filepath.Join(c.dir, "key")
		if err := errors.Join(os.MkdirAll(c.dir, 0o700), os.WriteFile(file, nil, 0o600), os.Chown(file, c.uid, -1), os.Chmod(file, c.mode)); err != nil {
			t.Fatal(err)
		}
		if err := CheckPrivate(file); (err == nil) != c.ok {
			t.Errorf("%s, mode %v of user %d: %v", file, c.mode, c.uid, err)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	file := filepath.Join(dir, "key")
	if err := errors.Join(os.WriteFile(file, nil, 0o440), os.Chmod(file, 0o440)); err != nil {
		t.Fatal(err)
	}
	if err := CheckPrivate(file); err == nil {
		t.Error("a group may read a file that nobody lent")
	}
}

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	path, target, link := filepath.Join(dir, "file"), filepath.Join(dir, "target"), filepath.Join(dir, "link")
	for _, content := range []string{"one", "", strings.Repeat("two", 1<<20)} {
		if err := Write(path, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != content {
			t.Errorf("%d bytes read back, want %d: %v", len(got), len(content), err)
		}
		if m := modeOf(t, path); m != 0o600 {
			t.Errorf("mode %v", m)
		}
	}
	// A laxer file of that name ends private.
	if err := errors.Join(os.Chmod(path, 0o666), Write(path, nil)); err != nil || modeOf(t, path) != 0o600 {
		t.Errorf("mode %v, %v", modeOf(t, path), err)
	}
	if err := errors.Join(os.WriteFile(target, []byte("kept"), 0o600), os.Symlink(target, link), Write(link, []byte("new"))); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(target); err != nil || string(got) != "kept" || !modeOf(t, link).IsRegular() {
		t.Errorf("written through a link: %q, %v", got, err)
	}
	// What fails leaves nothing behind.
	taken := filepath.Join(dir, "taken")
	if err := os.MkdirAll(filepath.Join(taken, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	if Write(taken, nil) == nil || Write(filepath.Join(dir, "none", "file"), nil) == nil {
		t.Error("wrote over a folder, or into none")
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 4 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := SyncDir(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("synced a folder that is not there: %v", err)
	}
}

const (
	childEnv = "HALLIGAN_TEST_WRITE"
	size     = 256 << 10
)

// TestMain is also the process that TestKill ends while it writes.
func TestMain(m *testing.M) {
	path := os.Getenv(childEnv)
	if path == "" {
		os.Exit(m.Run())
	}
	for i := byte('a'); ; i = 'a' + (i+1-'a')%26 {
		if err := Write(path, bytes.Repeat([]byte{i}, size)); err != nil {
			panic(err)
		}
		_, _ = os.Stdout.Write([]byte{i})
	}
}

// TestKill ends a writer at any moment: what was acknowledged is there, or what
// was being written, and each whole.
func TestKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for round := range 25 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+path)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		first := make([]byte, 1)
		if _, err := io.ReadFull(out, first); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(round) * 311 * time.Microsecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		acknowledged, err := io.ReadAll(out)
		if err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it was killed
		last := append(first, acknowledged...)[len(acknowledged)]
		got, err := os.ReadFile(path)
		if err != nil || len(got) != size || !bytes.Equal(got, bytes.Repeat(got[:1], size)) {
			t.Fatalf("a part was left: %d bytes, %v", len(got), err)
		}
		if next := 'a' + (last+1-'a')%26; got[0] != last && got[0] != next {
			t.Fatalf("%c was acknowledged, %c is there", last, got[0])
		}
	}
}
