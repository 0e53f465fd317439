package bastion

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFullDisk: a bastion without room for its store starts, relays and says
// what is degraded and how to mend it; when there is room, all is well again.
func TestFullDisk(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("halligan-test", disk, "tmpfs", 0, "size=48m,mode=0700"); err != nil {
		t.Fatalf("mounting a tmpfs (the tests run as root): %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	ballast := filepath.Join(disk, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 64<<20), 0o600); err == nil {
		t.Fatal("the disk is not full")
	}
	w := newWorld(t, func(c *Config) { c.StateDir = disk }).ready()
	config := w.sshConfig()
	relays := func() {
		t.Helper()
		if stdout, stderr, status := w.shell(config, "", "by-name", "whoami"); stdout != "ada responder\n" || status != 0 {
			t.Errorf("%d %q %q", status, stdout, stderr)
		}
	}
	relays()
	eventually(t, "what is wrong to be told", func() bool {
		_, body := w.get("/readyz")
		return strings.Contains(body, "no space left on device; relaying goes on") && strings.Contains(body, "make room on the disk of "+disk)
	})
	if _, stderr, status := w.shell(config, "", "bastion-a", "approvals"); status == 0 || !strings.Contains(stderr, "make room on the disk") {
		t.Errorf("%d %q", status, stderr)
	}
	relays()
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the store to work", func() bool { return w.value("store_up") == 1 })
	if stdout, stderr, status := w.shell(config, "", "bastion-a", "approvals"); status != 0 {
		t.Errorf("%d %q %q", status, stdout, stderr)
	}
	relays()
}

// TestDamagedStore: the same for a store that cannot be read.
func TestDamagedStore(t *testing.T) {
	data := ""
	w := newWorld(t, func(c *Config) {
		data = filepath.Join(c.StateDir, "store", "data")
		db := filepath.Join(data, "member", "snap", "db")
		if err := os.MkdirAll(filepath.Dir(db), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(db, make([]byte, 20_000), 0o600); err != nil {
			t.Fatal(err)
		}
	}).ready()
	config := w.sshConfig()
	eventually(t, "what is wrong to be told", func() bool { _, body := w.get("/readyz"); return strings.Contains(body, "move "+data+" away") })
	if stdout, stderr, status := w.shell(config, "", "by-name", "whoami"); stdout != "ada responder\n" || status != 0 {
		t.Errorf("%d %q %q", status, stdout, stderr)
	}
	if err := os.Rename(data, data+".damaged"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the store to work", func() bool { return w.value("store_up") == 1 })
}
