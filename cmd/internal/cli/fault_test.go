package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	daemon "github.com/halligan-io/halligan/agent"
	"github.com/halligan-io/halligan/cmd/internal/lab"
	"github.com/halligan-io/halligan/internal/etcdcluster"
)

// TestFaults tells what a person meets while parts of a cluster are broken. Each
// story has a cluster and an agent of its own to break.
func TestFaults(t *testing.T) {
	t.Parallel()
	eye := etcdctl(t)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/fault",
		RequireExplicitExec: true,
		Setup:               func(env *testscript.Env) error { return furnish(env, eye) },
		Cmds: storyCommands(map[string]func(*testscript.TestScript, bool, []string){
			// site MEMBERS [QUOTA] starts the cluster and an agent at its first
			// member.
			"site": func(ts *testscript.TestScript, _ bool, args []string) {
				s := &site{}
				ts.Defer(func() { ts.Check(s.close()) })
				quota := 0
				if len(args) > 1 {
					quota = number(ts, args[1])
				}
				ts.Check(s.open(number(ts, args[0]), int64(quota)))
				ts.Value("scene").(*scene).site = s
				ts.Setenv("HALLIGAN_SOCKET", s.config.Socket)
				endpoints := s.cluster.Endpoints()
				for i, e := range endpoints {
					endpoints[i] = "https://" + e
				}
				ts.Setenv("ETCDCTL_ENDPOINTS", strings.Join(endpoints, ","))
				ts.Setenv("ETCDCTL_CACERT", s.cluster.CAFile())
				ts.Setenv("ETCDCTL_CERT", s.cluster.CertFile())
				ts.Setenv("ETCDCTL_KEY", s.cluster.KeyFile())
			},
			// member stop|start N...
			"member": func(ts *testscript.TestScript, _ bool, args []string) {
				c := siteOf(ts).cluster
				for _, n := range args[1:] {
					if args[0] == "stop" {
						c.Stop(number(ts, n))
						continue
					}
					ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
					defer cancel()
					ts.Check(c.Restart(ctx, number(ts, n)))
				}
			},
			// until COMMAND... repeats a command until it ends well: for some
			// seconds an agent believes in the loss of quorum that it has seen.
			"until": func(ts *testscript.TestScript, _ bool, args []string) {
				for began := time.Now(); ts.Exec(args[0], args[1:]...) != nil; time.Sleep(200 * time.Millisecond) {
					if time.Since(began) > time.Minute {
						ts.Fatalf("it still fails after a minute")
					}
				}
			},
			// agent kill|start
			"agent": func(ts *testscript.TestScript, _ bool, args []string) {
				if args[0] == "kill" {
					siteOf(ts).kill()
					return
				}
				ts.Check(siteOf(ts).start())
			},
			// state full|free|readonly|writable
			"state": func(ts *testscript.TestScript, _ bool, args []string) { ts.Check(siteOf(ts).state(args[0])) },
			// nospace fills etcd's quota.
			"nospace": func(ts *testscript.TestScript, _ bool, _ []string) { ts.Check(siteOf(ts).nospace()) },
			// bulk N stores that many ConfigMaps app=bulk in namespace bulk.
			"bulk": func(ts *testscript.TestScript, _ bool, args []string) { ts.Check(siteOf(ts).bulk(number(ts, args[0]))) },
			// killamid COMMAND... runs a command in the background and kills the
			// agent once it has deleted some of the bulk.
			"killamid": func(ts *testscript.TestScript, _ bool, args []string) {
				s := siteOf(ts)
				ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
				defer cancel()
				deleted := s.eye.Watch(ctx, bulkKeys, clientv3.WithPrefix(), clientv3.WithFilterPut())
				cmd := exec.Command(look(ts, args[0]), args[1:]...)
				var out, errs bytes.Buffer
				cmd.Env, cmd.Stdout, cmd.Stderr = environment(ts), &out, &errs
				ts.Check(cmd.Start())
				events, open := <-deleted
				s.kill()
				_ = cmd.Wait()
				ts.Logf("%s%s", out.String(), errs.String())
				if !open || events.Err() != nil {
					ts.Fatalf("nothing was deleted: %v", events.Err())
				}
				ts.Check(os.WriteFile(ts.MkAbs("out"), out.Bytes(), 0o600))
				ts.Check(os.WriteFile(ts.MkAbs("err"), errs.Bytes(), 0o600))
				ts.Check(os.WriteFile(ts.MkAbs("status"), fmt.Appendln(nil, cmd.ProcessState.ExitCode()), 0o600))
			},
			// settled ID waits until the action is, and compares what the record
			// says with how much of the bulk is left, of N.
			"settled": func(ts *testscript.TestScript, _ bool, args []string) {
				var entry struct {
					Result  string
					Applied int
				}
				for began := time.Now(); entry.Result == "" || entry.Result == "unfinished"; time.Sleep(200 * time.Millisecond) {
					history := exec.Command(look(ts, "halligan"), "history", args[0], "-o", "json")
					history.Env = environment(ts)
					out, err := history.Output()
					ts.Check(err)
					ts.Check(json.Unmarshal(out, &entry))
					if time.Since(began) > time.Minute {
						ts.Fatalf("it is %q after a minute", entry.Result)
					}
				}
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				left, err := siteOf(ts).eye.Get(ctx, bulkKeys, clientv3.WithPrefix(), clientv3.WithCountOnly())
				ts.Check(err)
				if all := number(ts, args[1]); entry.Applied != all-int(left.Count) || left.Count == 0 {
					ts.Fatalf("%s: %d of %d done, and %d are left", entry.Result, entry.Applied, all, left.Count)
				}
			},
		}),
	})
}

func siteOf(ts *testscript.TestScript) *site { return ts.Value("scene").(*scene).site }

func number(ts *testscript.TestScript, text string) int {
	n, err := strconv.Atoi(text)
	ts.Check(err)
	return n
}

const bulkKeys = "/registry/configmaps/bulk/"

// site is an etcd cluster and one agent, on a file system of its own.
type site struct {
	dir     string
	cluster *etcdcluster.Cluster
	eye     *clientv3.Client
	config  daemon.Config
	agent   *exec.Cmd
	mounted bool
}

func (s *site) open(members int, quota int64) (err error) {
	if s.dir, err = os.MkdirTemp("", "site"); err != nil {
		return err
	}
	// Somebody else may take a free port before etcd does.
	for try := 0; ; try++ {
		s.cluster, err = etcdcluster.Start(context.Background(), etcdcluster.Options{Dir: filepath.Join(s.dir, "etcd"+strconv.Itoa(try)),
			Members: make([]etcdcluster.Member, members), QuotaBytes: quota, UnsafeNoFsync: true})
		if err == nil {
			break
		}
		if !errors.Is(err, syscall.EADDRINUSE) || try == 4 {
			return err
		}
	}
	if s.eye, err = s.cluster.Client(); err != nil {
		return err
	}
	if _, err := lab.Seed(context.Background(), s.eye, lab.Seeding{Objects: 1, Workers: 1}); err != nil {
		return err
	}
	place := filepath.Join(s.dir, "place")
	if err := os.Mkdir(place, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("halligan-test", place, "tmpfs", 0, "size=32m,mode=0700"); err != nil {
		return fmt.Errorf("mounting a tmpfs (the tests run as root): %w", err)
	}
	s.mounted = true
	s.config = daemon.Config{Node: "cp-1", StateDir: filepath.Join(place, "state"), Socket: filepath.Join(s.dir, "console.sock"),
		Etcd: daemon.EtcdConfig{Endpoints: s.cluster.Endpoints()[:1], CAFile: s.cluster.CAFile(), CertFile: s.cluster.CertFile(), KeyFile: s.cluster.KeyFile()}}
	text, err := yaml.Marshal(s.config)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.dir, "agent.yaml"), text, 0o600); err != nil {
		return err
	}
	return s.start()
}

// start starts the agent and waits for its console.
func (s *site) start() error {
	argv := append(agentCommand(), "--config", filepath.Join(s.dir, "agent.yaml"))
	s.agent = exec.Command(argv[0], argv[1:]...)
	// No agent outlives its test, however that ends.
	s.agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var log bytes.Buffer
	s.agent.Stdout, s.agent.Stderr = &log, &log
	if err := s.agent.Start(); err != nil {
		return err
	}
	for range 1000 {
		if conn, err := net.Dial("unix", s.config.Socket); err == nil {
			return conn.Close()
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.kill()
	return fmt.Errorf("the agent does not answer: %s", log.String())
}

func (s *site) kill() {
	if s.agent != nil {
		_ = s.agent.Process.Kill()
		_ = s.agent.Wait()
		s.agent = nil
	}
}

func (s *site) close() error {
	s.kill()
	var err error
	if s.mounted {
		err = unix.Unmount(filepath.Join(s.dir, "place"), 0)
	}
	if s.eye != nil {
		s.eye.Close()
	}
	if s.cluster != nil {
		s.cluster.Close()
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

func (s *site) state(how string) error {
	place := filepath.Join(s.dir, "place")
	fill := filepath.Join(place, "fill")
	switch how {
	case "full":
		err := os.WriteFile(fill, make([]byte, 40<<20), 0o600)
		if !errors.Is(err, syscall.ENOSPC) {
			return fmt.Errorf("filling the state folder: %w", err)
		}
		return nil
	case "free":
		return os.Remove(fill)
	case "readonly":
		return unix.Mount("", place, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
	case "writable":
		return unix.Mount("", place, "", unix.MS_REMOUNT, "size=32m")
	}
	return fmt.Errorf("no such state: %s", how)
}

func (s *site) nospace() error {
	pad := string(bytes.Repeat([]byte("x"), 512<<10))
	for i := range 256 {
		if _, err := s.eye.Put(context.Background(), fmt.Sprint("pad", i), pad); err != nil {
			return nil
		}
	}
	return errors.New("etcd takes it all")
}

func (s *site) bulk(n int) error {
	const most = 100 // operations of a transaction; etcd's default is 128
	// Nothing is put back into a namespace that does not exist.
	ops := []clientv3.Op{clientv3.OpPut("/registry/namespaces/bulk", `{"kind":"Namespace","apiVersion":"v1","metadata":{"name":"bulk","uid":"uid-bulk"}}`)}
	for i := range n {
		name := fmt.Sprintf("bulk-%05d", i)
		ops = append(ops, clientv3.OpPut(bulkKeys+name, fmt.Sprintf(
			`{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":%q,"namespace":"bulk","uid":"uid-%d","labels":{"app":"bulk"}}}`, name, i)))
		if len(ops) == most || i == n-1 {
			if _, err := s.eye.Txn(context.Background()).Then(ops...).Commit(); err != nil {
				return err
			}
			ops = nil
		}
	}
	return nil
}
