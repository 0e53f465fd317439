package console

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/halligan-io/halligan/agent/door"
	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// idle is an engine with nothing to do.
type idle struct{ door.Engine }

func (idle) Describe() []*halliganv1.Action { return nil }

func (idle) Status(_ context.Context, who trust.Identity) (*halliganv1.StatusResponse, error) {
	return &halliganv1.StatusResponse{Actor: who.Person, Role: who.Role.String()}, nil
}

type silent struct{}

func (silent) Raise(alarm.Event) {}

// serve opens the door and returns the socket and a function that ends it.
func serve(t *testing.T) (socket string, stop func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "console") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "agent", "agent.sock")
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	server, err := door.New(door.Options{Engine: idle{}, Alarms: silent{}, Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	stop = sync.OnceFunc(func() {
		server.Shutdown()
		if err := <-done; err != nil {
			t.Errorf("serving: %v", err)
		}
	})
	t.Cleanup(stop)
	return socket, stop
}

func dial(t *testing.T, socket string, options ...grpc.DialOption) halliganv1.AgentClient {
	t.Helper()
	c, err := grpc.NewClient("unix://"+socket, append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return halliganv1.NewAgentClient(c)
}

func TestSocketIsPrivateAndSingle(t *testing.T) {
	socket, stop := serve(t)
	if st, err := os.Stat(filepath.Dir(socket)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("folder: %v, %v", st.Mode(), err)
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	_, err := Listen(socket)
	if err == nil || !strings.Contains(err.Error(), "another agent is listening") {
		t.Errorf("a second agent: %v", err)
	}
	st, err := dial(t, socket).Status(t.Context(), &halliganv1.StatusRequest{})
	if err != nil || !strings.HasPrefix(st.GetActor(), "console/") || st.GetRole() != "responder" || st.GetDoor() != "console" {
		t.Errorf("the first agent after that: %v, %v", st, err)
	}
	stop()
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}

	// What a killed agent leaves.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if _, err := Listen(socket); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a live listener without the lock: %v", err)
	}
	l.Close()
	again, err := Listen(socket)
	if err != nil {
		t.Fatalf("a dead agent's socket: %v", err)
	}
	again.Close()

	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(socket); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("a file in the way: %v", err)
	}
	if err := os.Chmod(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(socket); err == nil || !strings.Contains(err.Error(), "0755") {
		t.Errorf("a folder open to others: %v", err)
	}
	if _, err := Listen(strings.Repeat("/x", 60)); !fault.Is(err, fault.Usage) {
		t.Errorf("a long path: %v", err)
	}
}

func TestAdmit(t *testing.T) {
	says := func(text string) func() (string, error) {
		return func() (string, error) { return text, nil }
	}
	for _, c := range []struct {
		uid, own uint32
		login    func() (string, error)
		person   string
	}{
		{0, 0, says("1000"), "console/1000"},
		{0, 0, says("1000\n"), "console/1000"},
		{0, 0, says("4294967295"), "console/0"},
		{0, 0, says("nonsense"), "console/0"},
		{0, 0, func() (string, error) { return "", os.ErrNotExist }, "console/0"},
		{0, 990, says("0"), "console/0"},
		{990, 990, says("4294967295"), "console/990"},
		{1000, 0, says("1000"), ""},
		{1000, 990, says("0"), ""},
	} {
		who, err := admit(c.uid, c.own, c.login)
		if c.person == "" {
			if !fault.Is(err, fault.Unauthenticated) || who.Role != trust.None {
				t.Errorf("uid %d, agent %d: %v, %v", c.uid, c.own, who, err)
			}
			continue
		}
		want := trust.Identity{Person: c.person, Role: trust.Responder, Door: trust.Console, Kind: trust.Local}
		if d := cmp.Diff(want, who); err != nil || d != "" {
			t.Errorf("uid %d, agent %d: %v, %s", c.uid, c.own, err, d)
		}
	}
}

// asNobody runs f with another effective uid. The thread is thrown away.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to become somebody else")
	}
	var done sync.WaitGroup
	done.Go(func() {
		runtime.LockOSThread() // and never unlock
		const keep, nobody = ^uintptr(0), 65534
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, nobody, keep); errno != 0 {
			t.Errorf("setresuid: %v", errno)
			return
		}
		f()
	})
	done.Wait()
}

func TestStrangersAreRefusedAndTakeNobodysPlace(t *testing.T) {
	socket, _ := serve(t)
	// Even where the file modes fail to keep strangers out.
	for path, mode := range map[string]os.FileMode{filepath.Dir(filepath.Dir(socket)): 0o755, filepath.Dir(socket): 0o755, socket: 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	var stranger net.Conn
	asNobody(t, func() {
		var err error
		if stranger, err = net.Dial("unix", socket); err != nil {
			t.Error(err)
		}
		for range maxConnections {
			c, err := net.Dial("unix", socket)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { c.Close() })
		}
	})
	if stranger == nil {
		return
	}
	c := dial(t, socket, grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return stranger, nil }))
	_, err := c.Describe(t.Context(), &halliganv1.DescribeRequest{})
	if f := api.FromStatus(err); f == nil || f.Code != fault.Unauthenticated || !strings.Contains(f.Message, "65534") {
		t.Errorf("a unary call of a stranger: %v", err)
	}
	history, err := c.History(t.Context(), &halliganv1.HistoryRequest{})
	if err == nil {
		_, err = history.Recv()
	}
	if f := api.FromStatus(err); f == nil || f.Code != fault.Unauthenticated {
		t.Errorf("a stream of a stranger: %v", err)
	}
	if _, err := dial(t, socket).Status(t.Context(), &halliganv1.StatusRequest{}); err != nil {
		t.Errorf("root, with strangers at the door: %v", err)
	}
}
