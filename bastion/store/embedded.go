package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/storage/wal"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/neutral"
)

// The embedded store is this very program, started again under another name. etcd
// ends its process when its disk is full or its files are damaged, in a signal
// where a file that it has mapped is too short: none of that may end the bastion.

const (
	// childName is how the embedded store's process is called.
	childName = "halligan-bastion-store"
	// ownWords begin what it says of itself; all else is etcd's.
	ownWords = "halligan: "
	// socket is where it listens, in its folder, which only its owner may enter.
	socket = "store.sock"
	// quota bounds its database, and segment one of at most 7 files of its log, in
	// bytes.
	quota   = 256 << 20
	segment = 8 << 20
	// snapshotEvery bounds how many requests its log and its memory keep.
	snapshotEvery = 500
	// keepGone is how long it keeps what is no longer there.
	keepGone = 5 * time.Minute
	// memory is where its garbage collector begins to work hard.
	memory = "GOMEMLIMIT=192MiB"
	// badness makes the kernel end it before the bastion, when memory ends.
	badness = "700"
	// stopTimeout bounds how long it may take to end.
	stopTimeout = 3 * time.Second
	// maxSaid bounds how much of its last words is kept, in bytes.
	maxSaid = 16 << 10
	// It is started again after leastPause, twice as long each time, most
	// mostPause; it counts as mended when it has lived for wellAfter.
	leastPause = 500 * time.Millisecond
	mostPause  = 15 * time.Second
	wellAfter  = time.Minute
	// roomEvery is how often a full database is compacted.
	roomEvery = time.Minute
)

var child atomic.Bool

// Child must be called first by every program that may open an embedded store:
// in the process of that store it does not return.
func Child() {
	child.Store(true)
	if os.Args[0] != childName {
		return
	}
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, ownWords+err.Error())
		os.Exit(1)
	}
	os.Exit(0)
}

// serve runs etcd in the working folder until standard input ends, which it does
// with the bastion, however that ends.
func serve() error {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM) // meant for the bastion
	// It may not be allowed; then all is as before.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte(badness), 0)
	wal.SegmentSizeBytes = segment
	c := embed.NewConfig()
	c.Name = childName
	c.Dir = "data"
	c.LogLevel, c.LogOutputs = "error", []string{embed.StdErrLogOutput}
	at := url.URL{Scheme: "unix", Host: socket}
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{at}, []url.URL{at}
	c.ListenPeerUrls = nil // there is nobody
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.TickMs, c.ElectionMs = 50, 500
	c.QuotaBackendBytes = quota
	c.AutoCompactionMode, c.AutoCompactionRetention = embed.CompactorModePeriodic, keepGone.String()
	c.SnapshotCount, c.SnapshotCatchUpEntries = snapshotEvery, snapshotEvery/10
	c.EnableGRPCGateway = false
	if err := durable.Dir(c.Dir); err != nil {
		return err
	}
	e, err := embed.StartEtcd(c)
	if err != nil {
		return err
	}
	gone := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(gone)
	}()
	select {
	case err = <-e.Err():
		return err
	case <-e.Server.StopNotify():
		return errors.New("etcd stopped by itself")
	case <-gone:
	}
	// Whatever was acknowledged is on the disk.
	time.AfterFunc(stopTimeout/2, func() { os.Exit(0) })
	e.Server.HardStop()
	e.Close()
	return nil
}

// embedded keeps the process of the embedded store.
type embedded struct {
	dir string
	log zerolog.Logger

	mu   sync.Mutex // guards what follows
	why  string     // why it does not run; empty: it does, or starts
	pid  int        // of the process, 0 where there is none
	room time.Time  // when room was made last
}

// reason says why it does not run.
func (e *embedded) reason() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.why
}

// process returns the number of its process, 0 where there is none.
func (e *embedded) process() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.pid
}

// ended notes why it does not run, or that it does.
func (e *embedded) ended(why string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.why = why
}

// mend says what to do about it.
func (e *embedded) mend(why string) string {
	switch {
	case strings.Contains(why, syscall.ENOSPC.Error()), strings.Contains(why, syscall.EDQUOT.Error()):
		return "make room on the disk of " + e.dir + ": it is tried again"
	case e.reason() == "":
		return "it is tried again"
	}
	return "if it stays so, move " + filepath.Join(e.dir, "data") + " away: it is begun anew, and only sessions and what waits for approval were in it"
}

// keep runs the process until the context ends, and again whenever it ends.
func (e *embedded) keep(ctx context.Context) {
	pause := leastPause
	for ctx.Err() == nil {
		began := time.Now()
		err := e.run(ctx)
		if ctx.Err() != nil {
			return
		}
		e.ended(err.Error())
		if time.Since(began) > wellAfter {
			pause = leastPause
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, mostPause)
	}
}

// run runs the process once. It returns why it ended.
func (e *embedded) run(ctx context.Context) error {
	if !child.Load() {
		return errors.New("this program cannot start it")
	}
	if err := durable.Dir(e.dir); err != nil {
		return fmt.Errorf("%s", neutral.LineMax(err.Error(), 256))
	}
	said := &tail{}
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{childName}
	cmd.Dir, cmd.Env, cmd.Stderr = e.dir, []string{memory}, said
	alive, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	cmd.Cancel = alive.Close
	cmd.WaitDelay = stopTimeout
	if err := cmd.Start(); err != nil {
		return err
	}
	e.mu.Lock()
	e.pid = cmd.Process.Pid
	e.mu.Unlock()
	err = cmd.Wait()
	e.mu.Lock()
	e.pid = 0
	e.mu.Unlock()
	switch why := said.reason(); {
	case why != "":
		return errors.New(why)
	case err == nil:
		return errors.New("its process ended")
	}
	return fmt.Errorf("its process ended: %w", err)
}

// makeRoom compacts a full database, now and then.
func (e *embedded) makeRoom(ctx context.Context, c *clientv3.Client) {
	e.mu.Lock()
	now := time.Now()
	if now.Sub(e.room) < roomEvery {
		e.mu.Unlock()
		return
	}
	e.room = now
	e.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, roomEvery/2)
	defer cancel()
	at, err := c.Get(ctx, root, clientv3.WithCountOnly())
	if err == nil {
		// Nobody needs what was; it may be compacted already.
		_, _ = c.Compact(ctx, at.Header.Revision, clientv3.WithCompactPhysical())
		if _, err = c.Defragment(ctx, c.Endpoints()[0]); err == nil {
			_, err = c.AlarmDisarm(ctx, &clientv3.AlarmMember{})
		}
	}
	if err != nil {
		e.log.Warn().Msg("making room in the bastion's store: " + reason(err))
	}
}

// tail keeps the end of what a process says.
type tail struct {
	mu   sync.Mutex // guards said
	said []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.said = append(t.said, p...)
	// The first lines of a panic say what happened, those after them only where.
	if over := len(t.said) - maxSaid; over > 0 && !bytes.Contains(t.said[:maxSaid], []byte("panic: ")) {
		t.said = append(t.said[:0], t.said[over:]...)
	} else if over > 0 {
		t.said = t.said[:maxSaid]
	}
	return len(p), nil
}

// reason returns what the process said last of why it ends.
func (t *tail) reason() (why string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for line := range strings.Lines(string(t.said)) {
		var entry struct{ Level, Msg, Error string }
		line = strings.TrimSpace(line)
		text, panicked := strings.CutPrefix(line, "panic: ")
		switch own, is := strings.CutPrefix(line, ownWords); {
		case is:
			why = own
		case json.Unmarshal([]byte(line), &entry) == nil:
			if entry.Level != "fatal" && entry.Level != "panic" {
				continue // it goes on
			}
			if why = entry.Msg; entry.Error != "" {
				why += ": " + entry.Error
			}
		case panicked && strings.HasPrefix(why, text): // said before, with its error
		case panicked, strings.HasPrefix(line, "fatal error: "), strings.HasPrefix(line, "unexpected fault address"):
			why = "etcd crashed: " + text
		}
	}
	return neutral.LineMax(why, 256)
}
