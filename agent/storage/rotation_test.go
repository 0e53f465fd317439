package storage

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/halligan-io/halligan/internal/fault"
)

// store puts another content in a configuration's place at once, as an operator's
// tool does.
func store(t testing.TB, path string, rules ...string) {
	t.Helper()
	if err := os.Rename(writeConfig(t, rules...), path); err != nil {
		t.Fatal(err)
	}
}

// TestRotatedMeanwhile: keys are rotated while a process runs. It writes with the
// key that the file names first now.
func TestRotatedMeanwhile(t *testing.T) {
	k := kindNamed(t, "secrets")
	path := writeConfig(t, rule("secrets", "aesgcm:key1:a"))
	open := func() *Transformers {
		tr, err := LoadEncryption(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(tr.Close)
		return tr
	}
	tr, reader := open(), open()
	old := seal(t, tr, "secrets", secretKey, secretPlain)
	check := func(tr *Transformers, stored []byte) {
		t.Helper()
		if got, err := tr.Open(t.Context(), k, secretKey, stored); err != nil || !bytes.Equal(got, secretPlain) {
			t.Errorf("%q, %v", got, err)
		}
	}

	store(t, path, rule("secrets", "aesgcm:key1:a", "secretbox:key2:b"))
	if got := seal(t, tr, "secrets", secretKey, secretPlain); !bytes.HasPrefix(got, []byte("k8s:enc:aesgcm:v1:key1:")) {
		t.Errorf("sealed as %.30q", got)
	}
	store(t, path, rule("secrets", "secretbox:key2:b", "aesgcm:key1:a"))
	renewed := seal(t, tr, "secrets", secretKey, secretPlain)
	if !bytes.HasPrefix(renewed, []byte("k8s:enc:secretbox:v1:key2:")) || tr.Providers()["secrets"] != "secretbox:key2" {
		t.Errorf("sealed as %.30q; %v", renewed, tr.Providers())
	}
	check(tr, old)
	check(reader, renewed) // which has not looked at the file since

	// The old key is retired, and what it wrote is told to be lost.
	store(t, path, rule("secrets", "secretbox:key2:b"))
	if _, err := tr.Open(t.Context(), k, secretKey, old); err != nil {
		t.Errorf("nobody has looked at the file, and what could be read no longer can: %v", err)
	}
	check(tr, seal(t, tr, "secrets", secretKey, secretPlain))
	_, err := tr.Open(t.Context(), k, secretKey, old)
	checkSealed(t, err, fault.Encrypted, "aesgcm key1", "does not have")

	// A key of the same name is another one now.
	store(t, path, rule("secrets", "secretbox:key2:c"))
	other := seal(t, tr, "secrets", secretKey, secretPlain)
	check(reader, other)
	// Encryption is turned off, and the value in the clear may be read.
	store(t, path, rule("secrets", "identity"))
	check(reader, secretPlain)
}

// TestUnusableMeanwhile: while the file is missing or broken nothing is written,
// and what could be read goes on to be.
func TestUnusableMeanwhile(t *testing.T) {
	k := kindNamed(t, "secrets")
	good := rule("secrets", "aesgcm:key1:a", "identity")
	path := writeConfig(t, good)
	tr, err := LoadEncryption(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tr.Close)
	late := OpenEncryption(path) // of a process that starts in such a moment
	t.Cleanup(late.Close)
	stored := seal(t, tr, "secrets", secretKey, secretPlain)
	for name, breakIt := range map[string]func() error{
		"missing":   func() error { return os.Remove(path) },
		"empty":     func() error { return os.Truncate(path, 0) },
		"torn":      func() error { return os.Truncate(path, int64(len(stored))) },
		"not YAML":  func() error { return os.WriteFile(path, []byte("}swordfish{"), 0o600) },
		"short key": func() error { store(t, path, strings.Replace(good, aesSecret('a'), "c3dvcmRmaXNo", 1)); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			if err := breakIt(); err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second time the content is known
				_, err := tr.Seal(t.Context(), k, secretKey, secretPlain)
				checkSealed(t, err, fault.Encrypted, path, "the encryption configuration", "mend the file")
				if err := tr.Usable(t.Context()); err == nil || fault.Of(err).Next == "" {
					t.Errorf("usable: %v", err)
				}
				for _, value := range [][]byte{stored, secretPlain} {
					if got, err := tr.Open(t.Context(), k, secretKey, value); err != nil || !bytes.Equal(got, secretPlain) {
						t.Errorf("%q, %v", got, err)
					}
				}
				late := OpenEncryption(path)
				defer late.Close()
				if got, err := late.Open(t.Context(), k, secretKey, secretPlain); err != nil || !bytes.Equal(got, secretPlain) {
					t.Errorf("what is in the clear: %q, %v", got, err)
				}
				_, err = late.Open(t.Context(), k, secretKey, stored)
				checkSealed(t, err, fault.Encrypted, "aesgcm key1", path, "mend the file")
				_, err = late.Seal(t.Context(), k, secretKey, secretPlain)
				checkSealed(t, err, fault.Encrypted, path)
				if len(late.Providers()) != 0 {
					t.Errorf("%v", late.Providers())
				}
			}
			store(t, path, good)
			for _, tr := range []*Transformers{tr, late} {
				if got := seal(t, tr, "secrets", secretKey, secretPlain); !bytes.HasPrefix(got, []byte("k8s:enc:aesgcm:v1:key1:")) {
					t.Errorf("mended, and sealed as %.30q", got)
				}
				if err := tr.Usable(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestRotationUnderLoad: values are sealed and opened while the file changes; what
// one content started is ended after its last use, and once.
func TestRotationUnderLoad(t *testing.T) {
	k := kindNamed(t, "secrets")
	dir := t.TempDir()
	path := filepath.Join(dir, "encryption.yaml")
	contents := [][]string{{"aesgcm:key1:a", "secretbox:key2:b"}, {"secretbox:key2:b", "aesgcm:key1:a"}}
	store(t, path, rule("secrets", contents[0]...))
	tr, err := LoadEncryption(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	var stopped atomic.Int32
	watch := func() {
		tr.mu.Lock()
		defer tr.mu.Unlock()
		c, stop := tr.now, tr.now.stop
		c.stop = func() {
			if stopped.Add(1); c.uses != 0 {
				t.Errorf("stopped with %d uses", c.uses)
			}
			stop()
		}
	}
	var workers sync.WaitGroup
	rotated := make(chan struct{})
	for range 4 {
		workers.Go(func() {
			for {
				stored, err := tr.Seal(t.Context(), k, secretKey, secretPlain)
				if err == nil {
					_, err = tr.Open(t.Context(), k, secretKey, stored)
				}
				if err != nil {
					t.Errorf("while the file changes: %v", err)
				}
				select {
				case <-rotated:
					return
				default:
				}
			}
		})
	}
	const rotations = 40
	for i := range rotations {
		watch()
		store(t, path, rule("secrets", contents[(i+1)%2]...))
		if err := tr.Usable(t.Context()); err != nil {
			t.Error(err)
		}
	}
	close(rotated)
	workers.Wait()
	if n := stopped.Load(); n != rotations {
		t.Errorf("%d of %d contents were ended", n, rotations)
	}
	tr.Close()
	tr.Close()
	store(t, path, rule("secrets", contents[1]...))
	if _, err := tr.Seal(t.Context(), k, secretKey, secretPlain); err != nil {
		t.Errorf("after Close: %v", err)
	}
}
