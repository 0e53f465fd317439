package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
)

const (
	stopGrace    = 5 * time.Second  // between SIGTERM and SIGKILL
	restartPause = time.Second      // before a daemon that ended is started again
	restartMost  = 5                // quick ends in a row before the lab gives up
	quickEnd     = 10 * time.Second // a run shorter than this counts as one
	readyWithin  = 30 * time.Second
)

// daemon keeps one child process running, as systemd would on a node, until it
// is stopped.
type daemon struct {
	name, log string
	argv      []string
	env       []string // besides this process's own
	progress  io.Writer
	failed    chan<- error // takes what a lab cannot go on after
	forever   bool         // never gives up
	impatient bool         // ends it at once, without any grace

	stopping context.Context // ends when stop is called
	cancel   context.CancelFunc
	first    chan struct{} // closed when the first run has ended
	done     chan struct{} // closed when nothing runs any more
}

func (d *daemon) start() error {
	d.first, d.done = make(chan struct{}), make(chan struct{})
	d.stopping, d.cancel = context.WithCancel(context.Background())
	f, err := os.OpenFile(d.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	go func() {
		defer close(d.done)
		defer f.Close()
		d.keep(f)
	}()
	return nil
}

// keep runs the child again and again.
func (d *daemon) keep(log *os.File) {
	// The kernel sends Pdeathsig when the thread that made the child ends, so
	// that thread must not be given back to the scheduler (prctl(2)).
	runtime.LockOSThread()
	var once sync.Once
	for quick := 1; ; quick++ {
		began := time.Now()
		err := d.run(log)
		once.Do(func() { close(d.first) })
		if d.stopping.Err() != nil {
			return
		}
		if time.Since(began) > quickEnd {
			quick = 1
		}
		if quick == restartMost && !d.forever {
			d.failed <- fmt.Errorf("%s does not stay up: %w; its log %s ends: %s", d.name, err, d.log, lastLine(d.log))
			return
		}
		fmt.Fprintf(d.progress, "%s ended (%v) and is started again\n", d.name, err)
		select {
		case <-d.stopping.Done():
			return
		case <-time.After(restartPause):
		}
	}
}

// dieWithParent has the kernel end a child with its parent, however that ends.
// Its own process group keeps a Ctrl-C at the terminal from reaching it before
// the lab decides the order.
func dieWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// runChild runs a command that ends with this process.
func runChild(cmd *exec.Cmd) error {
	runtime.LockOSThread() // see daemon.keep
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = dieWithParent()
	return cmd.Run()
}

// run runs the child once.
func (d *daemon) run(log *os.File) error {
	cmd := exec.CommandContext(d.stopping, d.argv[0], d.argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), d.env...)
	cmd.SysProcAttr = dieWithParent()
	if !d.impatient {
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	}
	cmd.WaitDelay = stopGrace
	if err := cmd.Run(); err != nil {
		return err
	}
	return errors.New("exit status 0")
}

func (d *daemon) stop() error {
	d.cancel()
	<-d.done
	return nil
}

// ready waits until the agent answers on its console and its etcd has a leader.
func (d *daemon) ready(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: time.Second}}))
	if err != nil {
		return err
	}
	defer conn.Close()
	agent := halliganv1.NewAgentClient(conn)
	return d.until(ctx, func(ctx context.Context) error {
		st, err := agent.Status(ctx, &halliganv1.StatusRequest{})
		if err == nil && !st.Etcd.GetQuorum() {
			err = fmt.Errorf("its etcd has no leader: %s", st.Etcd.GetError())
		}
		return err
	})
}

// open waits until the bastion says that people can come in.
func (d *daemon) open(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	return d.until(ctx, func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		got, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer got.Body.Close()
		said, err := io.ReadAll(io.LimitReader(got.Body, 4<<10))
		if err == nil && got.StatusCode != http.StatusOK {
			err = errors.New(strings.Join(strings.Fields(string(said)), " "))
		}
		return err
	})
}

// until asks again and again, until there is no error any more, or the daemon
// has ended.
func (d *daemon) until(ctx context.Context, ask func(context.Context) error) error {
	for {
		try, done := context.WithTimeout(ctx, time.Second)
		last := ask(try)
		done()
		if last == nil {
			return nil
		}
		select {
		case <-d.first:
			return fmt.Errorf("%s ended at its start; its log %s ends: %s", d.name, d.log, lastLine(d.log))
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w; its log is %s", d.name, last, d.log)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func lastLine(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	data = bytes.TrimSpace(data)
	return string(data[bytes.LastIndexByte(data, '\n')+1:])
}
