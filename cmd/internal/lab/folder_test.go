package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/halligan-io/halligan/internal/fault"
)

// disk is a folder on a file system of its own, of so many bytes.
func disk(t *testing.T, size int64) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("halligan-test", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", size)); err != nil {
		t.Fatalf("mounting a tmpfs (the tests run as root): %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestTooLittleDisk(t *testing.T) {
	dir := filepath.Join(disk(t, 64<<20), "lab")
	binaries := t.TempDir() // none of them is run
	for _, name := range []string{"kube-apiserver", managerName, schedulerName, kubectlName, kwokName, stagesName} {
		if err := os.WriteFile(filepath.Join(binaries, name), nil, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		kube *KubeOptions
		next string
	}{
		"objects only":         {nil, "--objects"},
		"a real control plane": {&KubeOptions{Binaries: binaries}, "--etcd-quota"},
	} {
		t.Run(name, func(t *testing.T) {
			o := options(dir, network())
			o.Kube = c.kube
			_, err := Up(t.Context(), o)
			if fault.CodeOf(err) != fault.Failed || !strings.Contains(err.Error(), "has 64 MiB for the lab, which may write ") || !strings.Contains(fault.Of(err).Next, c.next) {
				t.Errorf("got %v", err)
			}
			if exists(dir) {
				t.Error("a refused lab leaves its folder behind")
			}
		})
	}
}

// TestRoomOfAnEarlierRun: what an earlier run wrote takes no room from the next.
func TestRoomOfAnEarlierRun(t *testing.T) {
	const spare, file = 8 << 20, 16 << 20
	o := Options{}
	base := disk(t, o.room()+spare)
	o.Dir = filepath.Join(base, "lab")
	if err := os.Mkdir(o.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := hasRoom(&o); err != nil {
		t.Error(err)
	}
	foreign := filepath.Join(base, "foreign")
	if err := os.WriteFile(foreign, make([]byte, file), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := hasRoom(&o); err == nil {
		t.Error("it does not see what others wrote")
	}
	if err := os.Rename(foreign, filepath.Join(o.Dir, "db")); err != nil {
		t.Fatal(err)
	}
	if err := hasRoom(&o); err != nil {
		t.Error(err)
	}
}

func TestRoom(t *testing.T) {
	gib := func(o Options) float64 {
		if o.QuotaBytes == 0 {
			o.QuotaBytes = quota(o.Objects)
		}
		return float64(o.room()) / (1 << 30)
	}
	for name, c := range map[string]struct {
		o           Options
		least, most float64
	}{
		"small":                  {Options{Objects: 2000}, 0.4, 0.55},
		"a hundred thousand":     {Options{Objects: 100_000}, 2.6, 2.8},
		"control plane":          {Options{Kube: &KubeOptions{}}, 7.2, 7.4},
		"control plane of demos": {Options{QuotaBytes: demoQuota, Kube: &KubeOptions{}}, 2.7, 2.9},
		"audit logs":             {Options{QuotaBytes: demoQuota, Kube: &KubeOptions{Audit: true, APIServers: 3}}, 3.3, 3.5},
	} {
		if got := gib(c.o); got < c.least || got > c.most {
			t.Errorf("%s: %.2f GiB", name, got)
		}
	}
}

func TestOtherAddressesAreRefused(t *testing.T) {
	l := &Lab{opts: Options{Dir: t.TempDir(), Net: "127.0.3"}}
	for range 2 {
		if err := l.sameNet(); err != nil {
			t.Fatal(err)
		}
	}
	l.opts.Net = "127.0.4"
	if err := l.sameNet(); fault.CodeOf(err) != fault.Usage || !strings.Contains(err.Error(), "--net 127.0.3") {
		t.Errorf("got %v", err)
	}
}

// TestFolderOfSomebodyElse: a folder that lies ready in a place for everybody
// may lead anywhere.
func TestFolderOfSomebodyElse(t *testing.T) {
	theirs, mine := t.TempDir(), t.TempDir()
	if err := os.Chown(theirs, 12345, -1); err != nil {
		t.Fatalf("the tests run as root: %v", err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(mine, link); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{theirs, link, link + "/"} {
		if _, err := Up(t.Context(), options(dir, network())); fault.CodeOf(err) != fault.Usage || !strings.Contains(err.Error(), "no folder of yours") {
			t.Errorf("a lab in %s: %v", dir, err)
		}
		o := DefaultStorm()
		o.Dir = dir
		if err := RunStorm(t.Context(), o); fault.CodeOf(err) != fault.Usage || !strings.Contains(err.Error(), "no folder of yours") {
			t.Errorf("a storm in %s: %v", dir, err)
		}
	}
	kept := filepath.Join(theirs, "kept")
	if err := os.WriteFile(kept, []byte("years of work"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(kept, filepath.Join(mine, "lock")); err != nil {
		t.Fatal(err)
	}
	if _, err := Up(t.Context(), options(mine, network())); err == nil {
		t.Error("a lock that is a link is taken")
	}
	if text, err := os.ReadFile(kept); err != nil || string(text) != "years of work" {
		t.Errorf("behind the link: %q, %v", text, err)
	}
}

func TestNegativeSizes(t *testing.T) {
	for _, change := range []func(*Options){
		func(o *Options) { o.Objects = -1 }, func(o *Options) { o.Nodes = -1 }, func(o *Options) { o.QuotaBytes = -1 },
	} {
		o := options(t.TempDir(), network())
		change(&o)
		if _, err := Up(t.Context(), o); fault.CodeOf(err) != fault.Usage {
			t.Errorf("got %v", err)
		}
	}
}
