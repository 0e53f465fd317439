package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

// own refuses a folder of somebody else, who could have its files lead
// anywhere. One that is not there is nobody's.
func own(dir string) error {
	st, err := os.Lstat(filepath.Clean(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !st.IsDir() || ok && int(sys.Uid) != os.Geteuid() {
		return fault.New(fault.Usage, "give a folder that is new or your own", "%s is no folder of yours", dir)
	}
	return nil
}

// What a lab writes.
const (
	// objectRoom is for each object, in the database and in the write-ahead log of
	// a member: etcd keeps old revisions too.
	objectRoom = 8 << 10
	// A member allocates two segments of its write-ahead log at its start, and keeps
	// five besides the next when much is written (etcd, server/storage/wal/wal.go:
	// SegmentSizeBytes; server/embed/config.go: DefaultMaxWALs).
	segmentRoom               = 64_000_000
	fewSegments, manySegments = 2, 6
	// bastionRoom is for the store of a bastion, which holds little.
	bastionRoom = 32 << 20
	// logRoom is for the logs of daemons and etcd, kubeLogRoom for those of a
	// control plane under a storm, auditRoom for each API server's audit log and
	// the one before it, of 100 MB.
	logRoom, kubeLogRoom, auditRoom = 64 << 20, 256 << 20, 200 << 20
)

// room is how many bytes the lab may come to write. A control plane under a
// storm may fill etcd to its quota; without one nothing is written but the
// objects and what people do to them.
func (o *Options) room() int64 {
	if o.Kube == nil {
		return controlNodes*(int64(o.Objects)*objectRoom+fewSegments*segmentRoom) + bastionHosts*bastionRoom + logRoom
	}
	room := controlNodes*(o.QuotaBytes+manySegments*segmentRoom) + bastionHosts*bastionRoom + kubeLogRoom
	if o.Kube.Audit {
		room += int64(max(1, o.Kube.APIServers)) * auditRoom
	}
	return room
}

// hasRoom refuses a disk that the lab might fill: etcd ends the process that it
// cannot write in. What an earlier run wrote there counts as free, since this one
// writes it anew or not at all.
func hasRoom(o *Options) error {
	need := o.room()
	var disk unix.Statfs_t
	if err := unix.Statfs(o.Dir, &disk); err != nil {
		return fmt.Errorf("%s: how much is free: %w", o.Dir, err)
	}
	free := int64(disk.Bavail) * disk.Bsize
	if free >= need {
		return nil
	}
	err := filepath.WalkDir(o.Dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			free += sys.Blocks * 512 // stat(2)
		}
		return nil
	})
	if err != nil || free >= need {
		return err
	}
	less := "seed fewer --objects"
	if o.Kube != nil {
		less = "give a smaller --etcd-quota"
	}
	return fault.New(fault.Failed, "free some, choose a folder on another disk (--dir, or TMPDIR for a demo), or "+less,
		"%s has %d MiB for the lab, which may write %d MiB", o.Dir, free>>20, need>>20)
}

// sameNet refuses other addresses than those of an earlier run: etcd's members
// would go on looking for each other there.
func (l *Lab) sameNet() error {
	file := filepath.Join(l.opts.Dir, "net")
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return durable.Write(file, []byte(l.opts.Net+"\n"))
	}
	if was := strings.TrimSpace(string(data)); err == nil && was != l.opts.Net {
		return fault.New(fault.Usage, "give --net "+was+", or another folder", "the lab in %s has its addresses in %s, not in %s", l.opts.Dir, was, l.opts.Net)
	}
	return err
}
