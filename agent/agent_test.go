package agent

import (
	"bytes"
	"context"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/structpb"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/fault"
)

// log is what an agent logs, for a test to look at while it runs.
type logged struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// configOf returns a configuration for the cluster; paths of sockets are short.
func configOf(t *testing.T, c *etcdcluster.Cluster) Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return Config{Node: "cp-1", StateDir: dir + "/state", Socket: dir + "/run/console.sock",
		Etcd: EtcdConfig{Endpoints: c.Endpoints(), CAFile: c.CAFile(), CertFile: c.CertFile(), KeyFile: c.KeyFile()}}
}

// running runs an agent until stop is called, or the test ends.
func running(t *testing.T, c Config) (client halliganv1.AgentClient, log *logged, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	log = &logged{}
	go func() { ended <- Run(ctx, c, "manual", zerolog.New(log).Level(zerolog.DebugLevel)) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	})
	t.Cleanup(stop)
	conn, err := grpc.NewClient("unix:"+c.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	client = halliganv1.NewAgentClient(conn)
	within(t, "the console answers", func() bool {
		_, err := client.Describe(t.Context(), &halliganv1.DescribeRequest{}, grpc.WaitForReady(true))
		return err == nil
	})
	return client, log, stop
}

func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 300 {
		if ok() {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("not within 30 s: %s", what)
}

// TestRunWithoutEtcd: the agent starts while etcd is down, says so, and works as
// soon as it is back.
func TestRunWithoutEtcd(t *testing.T) {
	const secret = "s3cr3t-content"
	cluster := etcdcluster.ForTest(t, 1)
	raw, err := cluster.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	meta := metav1.ObjectMeta{Namespace: "shop", Name: "token", UID: "u1"}
	value, err := storage.EncodeTyped(&corev1.ConfigMap{ObjectMeta: meta, Data: map[string]string{"k": secret}})
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := storage.EncodeTyped(&corev1.Secret{ObjectMeta: meta, Data: map[string][]byte{"k": []byte(secret)}})
	if err != nil {
		t.Fatal(err)
	}
	const key = "/registry/configmaps/shop/token"
	space, err := storage.EncodeTyped(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", UID: "u0"}})
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string][]byte{key: value, "/registry/secrets/shop/token": sealed, "/registry/namespaces/shop": space} {
		if _, err := raw.Put(t.Context(), k, string(v)); err != nil {
			t.Fatal(err)
		}
	}
	cluster.Stop(0)

	c := configOf(t, cluster)
	client, log, stop := running(t, c)
	st, err := client.Status(t.Context(), &halliganv1.StatusRequest{})
	if err != nil || st.ReadOnly == "" || st.Etcd.Quorum || st.Etcd.Error == "" || st.Node != "cp-1" || st.Distribution != "manual" {
		t.Errorf("status without etcd: %v, %v", st, err)
	}
	parameters, err := structpb.NewStruct(map[string]any{"target": "cm/token", "namespace": "shop"})
	if err != nil {
		t.Fatal(err)
	}
	plan := func() (*halliganv1.Plan, error) {
		return client.Plan(t.Context(), &halliganv1.PlanRequest{Action: "delete", Parameters: parameters, Reason: "it leaked"})
	}
	if _, err := plan(); fault.CodeOf(api.FromStatus(err)) != fault.Unreachable && fault.CodeOf(api.FromStatus(err)) != fault.NoQuorum {
		t.Errorf("plan without etcd: %v", err)
	}
	if _, err := client.History(t.Context(), &halliganv1.HistoryRequest{}); err != nil {
		t.Errorf("history needs no etcd: %v", err)
	}

	if err := cluster.Restart(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	var p *halliganv1.Plan
	within(t, "the agent plans after etcd is back", func() bool { p, err = plan(); return err == nil })
	stream, err := client.Apply(t.Context(), &halliganv1.ApplyRequest{PlanId: p.Id, PlanSha256: p.Sha256})
	if err != nil {
		t.Fatal(err)
	}
	var result *halliganv1.Result
	for result == nil {
		event, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		result = event.GetResult()
	}
	got, err := raw.Get(t.Context(), key)
	if result.Result != "applied" || err != nil || got.Count != 0 {
		t.Errorf("%v, %v, %v", result, got, err)
	}

	// The console's role does not see what a Secret holds.
	parameters, err = structpb.NewStruct(map[string]any{"target": "secret/token", "namespace": "shop"})
	if err != nil {
		t.Fatal(err)
	}
	get, err := client.Get(t.Context(), &halliganv1.GetRequest{Parameters: parameters})
	if err != nil {
		t.Fatal(err)
	}
	if event, err := get.Recv(); err != nil || !strings.Contains(event.String(), "token") || strings.Contains(event.String(), base64.StdEncoding.EncodeToString([]byte(secret))) {
		t.Errorf("get of a Secret: %v, %v", event, err)
	}

	// One agent per state folder and per socket; the first is unharmed.
	if err := Run(t.Context(), c, "manual", zerolog.Nop()); err == nil || !strings.Contains(err.Error(), "stop the other agent first") {
		t.Errorf("a second agent on the state folder: %v", err)
	}
	other := c
	other.StateDir += "2"
	if err := Run(t.Context(), other, "manual", zerolog.Nop()); err == nil || !strings.Contains(err.Error(), "another agent is listening") {
		t.Errorf("a second agent on the socket: %v", err)
	}
	if _, err := client.Status(t.Context(), &halliganv1.StatusRequest{}); err != nil {
		t.Error(err)
	}
	stop()
	if _, err := os.Lstat(c.Socket); err == nil {
		t.Error("the socket was left")
	}
	if text := log.String(); strings.Contains(text, secret) || strings.Contains(text, base64.StdEncoding.EncodeToString([]byte(secret))) || !strings.Contains(text, "agent starts") {
		t.Errorf("the log: %s", text)
	}

	// The next one has the history and takes the deed back, from the record. A
	// record that rotted meanwhile does not keep it from starting.
	write(t, c.StateDir+"/actions/20260101-000000-aa.jsonl", "rotten\n", 0o600)
	client, log, _ = running(t, c)
	if text := log.String(); !strings.Contains(text, "20260101-000000-aa.jsonl is damaged at byte 0") {
		t.Errorf("the log: %s", text)
	}
	p, err = client.Undo(t.Context(), &halliganv1.UndoRequest{ActionId: result.Action, Reason: "wrong one"})
	if err != nil {
		t.Fatal(err)
	}
	if stream, err = client.Apply(t.Context(), &halliganv1.ApplyRequest{PlanId: p.Id, PlanSha256: p.Sha256}); err != nil {
		t.Fatal(err)
	}
	for {
		event, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if r := event.GetResult(); r != nil {
			if r.Result != "applied" {
				t.Errorf("undo: %v", r)
			}
			break
		}
	}
	if got, err = raw.Get(t.Context(), key); err != nil || got.Count != 1 || !bytes.Equal(got.Kvs[0].Value, value) {
		t.Errorf("undo put back %v, %v", got, err)
	}
	if strings.Contains(log.String(), secret) {
		t.Error("the log holds a secret")
	}
}

// TestRunWithoutEncryptionConfig: an agent whose encryption configuration is
// missing starts, shows and deletes what is in the clear, says why it writes
// nothing, and writes as soon as the file is there.
func TestRunWithoutEncryptionConfig(t *testing.T) {
	cluster := etcdcluster.ForTest(t, 1)
	raw, err := cluster.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	value, err := storage.EncodeTyped(&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "u1"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := raw.Put(t.Context(), "/registry/deployments/shop/web", string(value)); err != nil {
		t.Fatal(err)
	}
	c := configOf(t, cluster)
	c.EncryptionConfig = filepath.Join(t.TempDir(), "encryption.yaml")
	client, log, _ := running(t, c)
	if text := log.String(); !strings.Contains(text, `"level":"error"`) || !strings.Contains(text, c.EncryptionConfig) {
		t.Errorf("the log: %s", text)
	}
	within(t, "etcd is there", func() bool {
		st, err := client.Status(t.Context(), &halliganv1.StatusRequest{})
		return err == nil && st.Etcd.Quorum && strings.Contains(st.ReadOnly, c.EncryptionConfig)
	})
	plan := func(action string, parameters map[string]any) error {
		s, err := structpb.NewStruct(parameters)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = client.Plan(t.Context(), &halliganv1.PlanRequest{Action: action, Parameters: s, Reason: "test"}); err != nil {
			return api.FromStatus(err)
		}
		return nil
	}
	target := map[string]any{"target": "deploy/web", "namespace": "shop"}
	scale := map[string]any{"target": "deploy/web", "namespace": "shop", "to": 0}
	s, err := structpb.NewStruct(target)
	if err != nil {
		t.Fatal(err)
	}
	get, err := client.Get(t.Context(), &halliganv1.GetRequest{Parameters: s})
	if err != nil {
		t.Fatal(err)
	}
	if event, err := get.Recv(); err != nil || len(event.Objects) != 1 {
		t.Errorf("get: %v, %v", event, err)
	}
	if err := plan("scale", scale); !fault.Is(err, fault.Encrypted) || !strings.Contains(err.Error(), c.EncryptionConfig) {
		t.Errorf("scale: %v", err)
	}
	if err := plan("delete", target); err != nil {
		t.Errorf("delete: %v", err)
	}
	write(t, c.EncryptionConfig, "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: [secrets]\n  providers: [{identity: {}}]\n", 0o600)
	if err := plan("scale", scale); err != nil {
		t.Errorf("the file is there, and yet: %v", err)
	}
	if st, err := client.Status(t.Context(), &halliganv1.StatusRequest{}); err != nil || st.ReadOnly != "" || st.Encryption["secrets"] != "identity" {
		t.Errorf("%v, %v", st, err)
	}
}

// TestRunOnReadOnlyDisk: an agent whose state folder cannot be made starts and
// reads; it changes nothing, and does as soon as the disk is mended.
func TestRunOnReadOnlyDisk(t *testing.T) {
	cluster := etcdcluster.ForTest(t, 1)
	raw, err := cluster.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	value, err := storage.EncodeTyped(&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "u1"}})
	if err != nil {
		t.Fatal(err)
	}
	const key = "/registry/deployments/shop/web"
	if _, err := raw.Put(t.Context(), key, string(value)); err != nil {
		t.Fatal(err)
	}
	disk := t.TempDir()
	if err := unix.Mount("halligan-test", disk, "tmpfs", unix.MS_RDONLY, "size=16m,mode=0700"); err != nil {
		t.Fatalf("mounting a tmpfs (the tests run as root): %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	c := configOf(t, cluster)
	c.StateDir = disk + "/state"
	client, log, stop := running(t, c)
	target, err := structpb.NewStruct(map[string]any{"target": "deploy/web", "namespace": "shop"})
	if err != nil {
		t.Fatal(err)
	}
	within(t, "etcd is there", func() bool {
		get, err := client.Get(t.Context(), &halliganv1.GetRequest{Parameters: target})
		if err == nil {
			_, err = get.Recv()
		}
		return err == nil
	})
	if st, err := client.Status(t.Context(), &halliganv1.StatusRequest{}); err != nil || !strings.Contains(st.ReadOnly, "read-only") {
		t.Errorf("status: %v, %v", st, err)
	}
	history, err := client.History(t.Context(), &halliganv1.HistoryRequest{})
	if err == nil {
		_, err = history.Recv()
	}
	if !fault.Is(api.FromStatus(err), fault.AuditUnavailable) {
		t.Errorf("history: %v", err)
	}
	apply := func() *halliganv1.Result {
		t.Helper()
		p, err := client.Plan(t.Context(), &halliganv1.PlanRequest{Action: "delete", Parameters: target, Reason: "test"})
		if err != nil {
			t.Fatal(err)
		}
		stream, err := client.Apply(t.Context(), &halliganv1.ApplyRequest{PlanId: p.Id, PlanSha256: p.Sha256})
		if err != nil {
			t.Fatal(err)
		}
		for {
			event, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if r := event.GetResult(); r != nil {
				return r
			}
		}
	}
	r := apply()
	if got, err := raw.Get(t.Context(), key); r.GetError().GetCode() != string(fault.AuditUnavailable) || err != nil || got.Count != 1 {
		t.Errorf("%v; %v, %v", r, got, err)
	}
	if err := unix.Mount("", disk, "", unix.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	// The evidence log tries every few seconds.
	within(t, "something is changed on the disk that is mended", func() bool { return apply().Result == "applied" })
	within(t, "the log tells of both", func() bool {
		return strings.Contains(log.String(), "nothing can be changed: ") && strings.Contains(log.String(), "actions can be recorded again")
	})
	stop()
}

// TestRunRefuses: what cannot be served says so at the start, and leaves nothing
// running or held.
func TestRunRefuses(t *testing.T) {
	dir := t.TempDir()
	lax := filepath.Join(dir, "lax")
	if err := os.Mkdir(lax, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(lax, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"policy": {func(c *Config) { c.PolicyFile = dir + "/none" }, "local policy"},
		"ca":     {func(c *Config) { c.Etcd.CAFile = dir + "/none" }, dir + "/none"},
		"state":  {func(c *Config) { c.StateDir = lax }, "chmod 700"},
		"socket": {func(c *Config) { c.Socket = lax + "/s" }, "mode 0700"},
		"record": {func(c *Config) { write(t, c.StateDir+"/actions/20260101-000000-aa.jsonl", "", 0o640) }, "20260101-000000-aa.jsonl has mode 0640"},
	} {
		config := Config{StateDir: filepath.Join(dir, name, "state"), Socket: filepath.Join(dir, name, "run", "s"), Etcd: EtcdConfig{Endpoints: []string{"127.0.0.1:1"}}}
		c.change(&config)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		err := Run(ctx, config, "manual", zerolog.Nop())
		if err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		cancel()
	}
}
