package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/structpb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/agent"
	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/etcdcluster"
)

// binary is the program as it is delivered.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "halligan-agent")
	if err != nil {
		panic(err)
	}
	binary = filepath.Join(dir, "halligan-agent")
	code := 1
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building the agent: %v\n%s", err, out)
	} else {
		code = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

// secret is in every object, and must be in no log.
const secret = "c0ntent-nobody-logs"

// process is the program, running.
type process struct {
	t      *testing.T
	config agent.Config
	file   string
	log    bytes.Buffer // to be read after the process has ended
	cmd    *exec.Cmd
	client halliganv1.AgentClient
}

func newAgent(t *testing.T, c *etcdcluster.Cluster) *process {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a := &process{t: t, file: dir + "/agent.yaml", config: agent.Config{Node: "cp-1", StateDir: dir + "/state", Socket: dir + "/run/s", LogLevel: "debug",
		Etcd: agent.EtcdConfig{Endpoints: c.Endpoints(), CAFile: c.CAFile(), CertFile: c.CertFile(), KeyFile: c.KeyFile()}}}
	data, err := yaml.Marshal(a.config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	a.start()
	t.Cleanup(func() { a.end(syscall.SIGKILL) })
	return a
}

// start starts the program and waits until it serves and has a leader.
func (a *process) start() {
	a.t.Helper()
	a.cmd = exec.Command(binary, "--config", a.file)
	a.cmd.Stderr = &a.log
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := a.cmd.Start(); err != nil {
		a.t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix:"+a.config.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { conn.Close() })
	a.client = halliganv1.NewAgentClient(conn)
	within(a.t, "the agent is ready", func() bool {
		st, err := a.client.Status(a.t.Context(), &halliganv1.StatusRequest{}, grpc.WaitForReady(true))
		return err == nil && st.Etcd.Quorum
	})
}

// end sends the signal and returns the exit status, -1 for a killed process.
func (a *process) end(sig syscall.Signal) int {
	a.t.Helper()
	if a.cmd == nil {
		return 0
	}
	if err := a.cmd.Process.Signal(sig); err != nil {
		a.t.Error(err)
	}
	_ = a.cmd.Wait() // the status says it
	code := a.cmd.ProcessState.ExitCode()
	a.cmd = nil
	for _, line := range strings.Split(strings.TrimSpace(a.log.String()), "\n") {
		var v map[string]any
		if err := json.Unmarshal([]byte(line), &v); err != nil || v["node"] != "cp-1" || v["time"] == nil || v["level"] == nil {
			a.t.Errorf("not a line of a log: %q", line)
		}
	}
	if strings.Contains(a.log.String(), secret) {
		a.t.Error("the log holds an object's content")
	}
	return code
}

func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 400 {
		if ok() {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("not within 40 s: %s", what)
}

// begin plans and starts an action.
func (a *process) begin(ctx context.Context, p *halliganv1.Plan, err error) grpc.ServerStreamingClient[halliganv1.ApplyEvent] {
	a.t.Helper()
	if err != nil {
		a.t.Fatal(err)
	}
	stream, err := a.client.Apply(ctx, &halliganv1.ApplyRequest{PlanId: p.Id, PlanSha256: p.Sha256})
	if err != nil {
		a.t.Fatal(err)
	}
	return stream
}

// result waits for the end of an action.
func (a *process) result(stream grpc.ServerStreamingClient[halliganv1.ApplyEvent]) *halliganv1.Result {
	a.t.Helper()
	for {
		event, err := stream.Recv()
		if err != nil {
			a.t.Fatalf("the action ended without a result: %v", err)
		}
		if r := event.GetResult(); r != nil {
			return r
		}
	}
}

// history returns what is recorded of one action, settled.
func (a *process) history(id string) *halliganv1.HistoryEntry {
	a.t.Helper()
	var entry *halliganv1.HistoryEntry
	within(a.t, "the action is settled", func() bool {
		stream, err := a.client.History(a.t.Context(), &halliganv1.HistoryRequest{ActionId: id})
		if err == nil {
			entry, err = stream.Recv()
		}
		if err != nil {
			a.t.Fatal(err)
		}
		return entry.Result != "unfinished" && entry.Result != ""
	})
	return entry
}

const many = 3000

// runaways stores many objects in a namespace and returns their values by key.
func runaways(t *testing.T, raw *clientv3.Client, namespace string) map[string]string {
	t.Helper()
	space, err := storage.EncodeTyped(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace, UID: types.UID(namespace)}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := raw.Put(t.Context(), "/registry/namespaces/"+namespace, string(space)); err != nil {
		t.Fatal(err)
	}
	values := map[string]string{}
	var ops []clientv3.Op
	for i := range many {
		name := fmt.Sprintf("run-%05d", i)
		v, err := storage.EncodeTyped(&corev1.ConfigMap{Data: map[string]string{"k": secret, "n": name},
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(namespace + "-" + name), Labels: map[string]string{"app": "runaway"}}})
		if err != nil {
			t.Fatal(err)
		}
		key := "/registry/configmaps/" + namespace + "/" + name
		values[key] = string(v)
		if ops = append(ops, clientv3.OpPut(key, string(v))); len(ops) == 100 {
			if _, err := raw.Txn(t.Context()).Then(ops...).Commit(); err != nil {
				t.Fatal(err)
			}
			ops = nil
		}
	}
	return values
}

func stored(t *testing.T, raw *clientv3.Client, namespace string) map[string]string {
	t.Helper()
	r, err := raw.Get(t.Context(), "/registry/configmaps/"+namespace+"/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]string{}
	for _, kv := range r.Kvs {
		values[string(kv.Key)] = string(kv.Value)
	}
	return values
}

// TestInterrupted ends the agent in the middle of a long deletion, by the two
// ways in which that happens, and starts it again: its history must say of each
// object what etcd says, and undo must put back what is gone.
func TestInterrupted(t *testing.T) {
	cluster := etcdcluster.ForTest(t, 1)
	raw, err := cluster.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	for _, c := range []struct {
		namespace string
		signal    syscall.Signal
	}{{"stopped", syscall.SIGTERM}, {"killed", syscall.SIGKILL}} {
		t.Run(c.namespace, func(t *testing.T) {
			t.Parallel()
			a := newAgent(t, cluster)
			before := runaways(t, raw, c.namespace)
			parameters, err := structpb.NewStruct(map[string]any{"target": "cm", "namespace": c.namespace, "selector": "app=runaway"})
			if err != nil {
				t.Fatal(err)
			}
			p, err := a.client.Plan(t.Context(), &halliganv1.PlanRequest{Action: "delete", Parameters: parameters, Reason: "runaways"})
			stream := a.begin(t.Context(), p, err)
			for done := int64(0); done < many/10; {
				event, err := stream.Recv()
				if err != nil || event.GetResult() != nil {
					t.Fatalf("it ended before it could be interrupted: %v, %v", event, err)
				}
				done = event.GetProgress().GetDone()
			}
			if c.signal == syscall.SIGKILL {
				a.end(c.signal)
				if _, err := drain(stream); err == nil {
					t.Error("a killed agent sent a result")
				}
			} else {
				told := make(chan *halliganv1.Result, 1)
				go func() {
					r, err := drain(stream)
					if err != nil {
						t.Errorf("a stopped agent sent no result: %v", err)
					}
					told <- r
				}()
				began := time.Now()
				if code := a.end(c.signal); code != 0 {
					t.Errorf("exit status %d", code)
				}
				r := <-told
				count := map[string]int{}
				for _, o := range r.GetObjects() {
					count[o.Outcome]++
				}
				t.Logf("stopped after %v: %s %v: %v", time.Since(began).Round(time.Millisecond), r.GetResult(), count, r.GetError())
				if len(r.GetObjects()) != many || r.GetResult() != "partial" && r.GetResult() != "unknown" || r.GetError() == nil || count["skipped"] == 0 {
					t.Errorf("what is left is not reported: %s %v", r.GetResult(), count)
				}
				left := stored(t, raw, c.namespace)
				for _, o := range r.GetObjects() {
					_, is := left[o.Key]
					if is && (o.Outcome == "applied" || o.Outcome == "unverified") || !is && (o.Outcome == "skipped" || o.Outcome == "failed") {
						t.Errorf("%s: in etcd %v, reported as %s", o.Key, is, o.Outcome)
					}
				}
			}
			after := stored(t, raw, c.namespace)
			if gone := len(before) - len(after); gone < many/20 || gone == many {
				t.Fatalf("%d of %d are gone: it was not interrupted in the middle", gone, many)
			}
			if c.signal == syscall.SIGKILL { // what a crash leaves behind does not stop the next start
				if _, err := os.Lstat(a.config.Socket); err != nil {
					t.Error(err)
				}
				// etcd has answered everything by now: the next agent need not
				// wait for writes that may still be on their way.
				long := time.Now().Add(-time.Minute)
				if err := os.Chtimes(filepath.Join(a.config.StateDir, "actions", p.Id+".jsonl"), long, long); err != nil {
					t.Error(err)
				}
			}

			a.start()
			h := a.history(p.Id)
			applied := 0
			for _, r := range h.Results {
				if _, is := after[r.Key]; is == (r.Outcome == "applied") {
					t.Errorf("%s: in etcd %v, recorded as %s", r.Key, is, r.Outcome)
				}
				if r.Outcome == "applied" {
					applied++
				}
			}
			t.Logf("%s: %d of %d gone, settled as %s", c.signal, applied, many, h.Result)
			if h.Result != "partial" || applied != len(before)-len(after) || h.Applied != int64(applied) || len(stored(t, raw, c.namespace)) != len(after) {
				t.Errorf("%d are gone, %d recorded; settled as %s with %d", len(before)-len(after), applied, h.Result, h.Applied)
			}
			p, err = a.client.Undo(t.Context(), &halliganv1.UndoRequest{ActionId: p.Id, Reason: "back"})
			if r := a.result(a.begin(t.Context(), p, err)); r.Result != "applied" {
				t.Errorf("undo: %s, %v", r.Result, r.Error)
			}
			back := stored(t, raw, c.namespace)
			for key, v := range before {
				if back[key] != v {
					t.Fatalf("%s is not as it was", key)
				}
			}
			if code := a.end(syscall.SIGTERM); code != 0 {
				t.Errorf("exit status %d", code)
			}
			if _, err := os.Lstat(a.config.Socket); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the socket was left: %v", err)
			}
		})
	}
}

// drain reads to the result.
func drain(stream grpc.ServerStreamingClient[halliganv1.ApplyEvent]) (*halliganv1.Result, error) {
	for {
		event, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if r := event.GetResult(); r != nil {
			return r, nil
		}
	}
}

// TestRest tells what the program weighs while nothing happens.
func TestRest(t *testing.T) {
	a := newAgent(t, etcdcluster.ForTest(t, 1))
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
	if err != nil {
		t.Skip(err)
	}
	for _, line := range strings.Split(string(status), "\n") {
		if strings.HasPrefix(line, "RssAnon:") || strings.HasPrefix(line, "VmRSS:") || strings.HasPrefix(line, "Threads:") {
			t.Log(line)
		}
	}
	if code := a.end(syscall.SIGINT); code != 0 {
		t.Errorf("exit status %d", code)
	}
}

// TestCommandLine: what is wrong is said in one line on stderr, with the exit
// status of its class.
func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	files := 0
	file := func(text string) string {
		files++
		f := filepath.Join(dir, fmt.Sprint("agent", files, ".yaml"))
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	lax := filepath.Join(dir, "key")
	if err := os.WriteFile(lax, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--config", dir + "/none"}, 2, "name a readable file"},
		{[]string{"--config", file("etcd: {endpoints: ['etcd.local:2379']}")}, 2, `"etcd.local:2379" is not IP:PORT`},
		{[]string{"--config", file("{node: cp-1, cluster: prod, trust: {}, grpc: {listen: ['0.0.0.0:2223'], certFile: /c, keyFile: " + lax + "}, etcd: {endpoints: ['127.0.0.1:2379']}}")}, 2, "0644"},
		{[]string{"--config", file("{ssh: {listen: ['0.0.0.0:2222'], hostKey: /k, hostCertificate: /c}, etcd: {endpoints: ['127.0.0.1:2379']}}")}, 2, "set trust"},
		{[]string{"--no-such-flag"}, 2, "halligan-agent --help"},
		{[]string{"argument"}, 2, "argument"},
	} {
		cmd := exec.Command(binary, c.args...)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		_ = cmd.Run() // the status says it
		if cmd.ProcessState.ExitCode() != c.code || !strings.Contains(stderr.String(), c.want) || strings.Count(stderr.String(), "\n") != 1 || stdout.Len() != 0 {
			t.Errorf("%v: exit %d, %q", c.args, cmd.ProcessState.ExitCode(), stderr.String())
		}
	}
	for _, arg := range []string{"--help", "--version"} {
		out, err := exec.Command(binary, arg).Output()
		if err != nil || len(out) == 0 {
			t.Errorf("%s: %q, %v", arg, out, err)
		}
	}
}
