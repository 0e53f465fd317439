package reload

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

func TestFiles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	strict := false
	read := func() (string, error) {
		data, err := os.ReadFile(file)
		if st, serr := os.Stat(file); strict && serr == nil && st.Mode().Perm() != 0o400 {
			err = errors.New("others may read it")
		}
		if err == nil && strings.Contains(string(data), "bad") {
			err = errors.New("it is bad")
		}
		return string(data), err
	}
	var said bytes.Buffer
	s := &source[string]{what: "it", files: []string{file, file + ".other"}, read: read, log: zerolog.New(&said)}
	if _, err := Files("it", s.files, read, zerolog.Nop()); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("of no file: %v", err)
	}
	now := func(want string) {
		t.Helper()
		s.looked = time.Time{}
		if got := s.get(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	write("first")
	if get, err := Files("it", s.files, read, zerolog.Nop()); err != nil || get() != "first" {
		t.Fatal(err)
	}
	now("first")
	write("another")
	if got := s.get(); got != "first" {
		t.Errorf("looked at again at once: %q", got)
	}
	now("another")
	write("bad one")
	now("another")
	now("another")
	if n := strings.Count(said.String(), "it is bad"); n != 1 {
		t.Errorf("said %d times: %s", n, said.String())
	}
	strict = true
	write("fourth, and too open")
	now("another")
	if err := os.Chmod(file, 0o400); err != nil {
		t.Fatal(err)
	}
	now("fourth, and too open")
	strict = false
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	now("fourth, and too open")
	write("the last")
	now("the last")
}
