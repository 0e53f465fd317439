package action

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/types/known/structpb"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/journal"
	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

var responder = by("alice", trust.Responder)

func by(person string, role trust.Role) trust.Identity {
	return trust.Identity{Person: person, Role: role, Door: trust.SSH, Kind: trust.Person, Fingerprint: "SHA256:" + person, Serial: "7", Source: "192.0.2.7:4242"}
}

func toApply(p *halliganv1.Plan) *halliganv1.ApplyRequest {
	return &halliganv1.ApplyRequest{PlanId: p.Id, PlanSha256: p.Sha256}
}

// lab is an engine on a real etcd.
type lab struct {
	t       testing.TB
	cluster *etcdcluster.Cluster
	// raw is the independent eye: etcd's own client.
	raw     *clientv3.Client
	engine  *Engine
	options Options
	log     *lines
	ledger  *ledger.Ledger // instead, after real
	dir     string
	logFile string
	// spaces are the namespaces that exist.
	spaces map[string]bool
}

func newLab(t testing.TB, members int, opts ...func(*etcdcluster.Options)) *lab {
	t.Helper()
	l := &lab{t: t, cluster: etcdcluster.ForTest(t, members, opts...), dir: filepath.Join(t.TempDir(), "state"), logFile: filepath.Join(t.TempDir(), "log")}
	raw, err := l.cluster.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	l.raw = raw
	l.start(nil)
	return l
}

// start makes the engine, with its options changed first.
func (l *lab) start(change func(*Options)) {
	l.t.Helper()
	client, err := etcd.Open(etcd.Config{Endpoints: l.cluster.Endpoints(), CAFile: l.cluster.CAFile(), CertFile: l.cluster.CertFile(), KeyFile: l.cluster.KeyFile()})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { client.Close() })
	records, err := journal.Open(l.dir, journal.Options{})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { records.Close() })
	none, err := storage.LoadEncryption(context.Background(), "")
	if err != nil {
		l.t.Fatal(err)
	}
	l.options = Options{Node: "cp-1", Version: "test", Etcd: client, Encryption: none, Journal: records, Policy: trust.Default, Log: zerolog.Nop()}
	l.log = openLines(l.t, l.logFile)
	l.options.Audit, l.options.Past = l.log, l.log.past()
	if change != nil {
		change(&l.options)
	}
	l.engine = New(l.options)
}

// real puts the ledger in force, instead of the log that tests look into and break.
func (l *lab) real() *ledger.Ledger {
	l.t.Helper()
	log, err := openLedger(filepath.Join(l.t.TempDir(), "audit"))
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { log.Close() })
	l.ledger, l.engine.audit, l.engine.past = log, log, PastOf(log)
	return log
}

func openLedger(dir string) (*ledger.Ledger, error) {
	return ledger.Open(ledger.Options{Dir: dir, Origin: "cp-1", SpoolBytes: 512 << 10})
}

// events returns the evidence of an action, "" for all.
func (l *lab) events(plan string) (all []audit.Event) {
	l.t.Helper()
	if l.ledger == nil {
		all = l.log.all()
	} else {
		for raw, err := range PastOf(l.ledger)(l.ctx()) {
			var e audit.Event
			if err == nil {
				err = json.Unmarshal(raw, &e)
			}
			if err != nil {
				l.t.Fatal(err)
			}
			all = append(all, e)
		}
	}
	return slices.DeleteFunc(all, func(e audit.Event) bool { return plan != "" && e.PlanID != plan })
}

func (l *lab) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	l.t.Cleanup(cancel)
	return ctx
}

// put stores a typed object and returns its key.
func (l *lab) put(obj runtime.Object, options ...clientv3.OpOption) string {
	l.t.Helper()
	m, err := meta.Accessor(obj)
	if err != nil {
		l.t.Fatal(err)
	}
	if m.GetUID() == "" {
		m.SetUID(types.UID("uid-" + m.GetNamespace() + "-" + m.GetName()))
	}
	if m.GetGeneration() == 0 {
		m.SetGeneration(1)
	}
	plain, err := storage.EncodeTyped(obj)
	if err != nil {
		l.t.Fatal(err)
	}
	if ns := m.GetNamespace(); ns != "" && !l.spaces[ns] {
		if l.spaces == nil {
			l.spaces = map[string]bool{}
		}
		l.spaces[ns] = true
		l.put(&corev1.Namespace{ObjectMeta: labelled("", ns)})
	}
	key := l.key(obj, m)
	stored, err := l.options.Encryption.Seal(l.ctx(), l.kind(obj), key, plain)
	if err != nil {
		l.t.Fatal(err)
	}
	l.putRaw(key, stored, options...)
	return key
}

func (l *lab) putRaw(key string, value []byte, options ...clientv3.OpOption) {
	l.t.Helper()
	if _, err := l.raw.Put(l.ctx(), key, string(value), options...); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) kind(obj runtime.Object) *storage.Kind {
	l.t.Helper()
	kinds, _, err := scheme.Scheme.ObjectKinds(obj)
	if err != nil {
		l.t.Fatal(err)
	}
	k := storage.NewCatalogue().ByGroupKind(kinds[0].Group, kinds[0].Kind)
	if k == nil {
		l.t.Fatalf("no kind %v", kinds[0])
	}
	return k
}

func (l *lab) key(obj runtime.Object, m metav1.Object) string {
	l.t.Helper()
	key, err := l.kind(obj).Key(storage.DefaultPrefix, m.GetNamespace(), m.GetName())
	if err != nil {
		l.t.Fatal(err)
	}
	return key
}

// value reads a key with etcd's own client; nil when it is gone.
func (l *lab) value(key string) []byte {
	l.t.Helper()
	r, err := l.raw.Get(l.ctx(), key)
	if err != nil {
		l.t.Fatal(err)
	}
	if len(r.Kvs) == 0 {
		return nil
	}
	return r.Kvs[0].Value
}

// typedAt decodes a key with client-go's own decoder into obj.
func typedAt[T any](l *lab, key string) *T {
	l.t.Helper()
	obj, _, err := scheme.Codecs.UniversalDeserializer().Decode(l.value(key), nil, nil)
	if err != nil {
		l.t.Fatalf("%s: %v", key, err)
	}
	out, ok := obj.(any).(*T)
	if !ok {
		l.t.Fatalf("%s is a %T", key, obj)
	}
	return out
}

func (l *lab) plan(verb string, parameters map[string]any) (*halliganv1.Plan, error) {
	s, err := structpb.NewStruct(parameters)
	if err != nil {
		l.t.Fatal(err)
	}
	return l.engine.Plan(l.ctx(), responder, &halliganv1.PlanRequest{Action: verb, Parameters: s, Reason: "test", Incident: "INC-1"})
}

// do plans and applies, and demands the result.
func (l *lab) do(want, verb string, parameters map[string]any) *halliganv1.Result {
	l.t.Helper()
	p, err := l.plan(verb, parameters)
	if err != nil {
		l.t.Fatalf("plan %s %v: %v", verb, parameters, err)
	}
	r := l.engine.Apply(l.ctx(), responder, toApply(p), nil)
	if r.Result != want {
		l.t.Fatalf("%s %v: %s, want %s: %v", verb, parameters, r.Result, want, r.Error)
	}
	return r
}

// refuses demands that planning fails with the code and with the text.
func (l *lab) refuses(code fault.Code, text, verb string, parameters map[string]any) {
	l.t.Helper()
	_, err := l.plan(verb, parameters)
	if fault.CodeOf(err) != code || !strings.Contains(fmt.Sprint(err), text) {
		l.t.Errorf("%s %q: got %v (%s), want %s with %q", verb, parameters, err, fault.CodeOf(err), code, text)
	}
}

// records returns the number of files in the journal.
func (l *lab) records() int {
	files, err := os.ReadDir(filepath.Join(l.dir, "actions"))
	if err != nil {
		l.t.Fatal(err)
	}
	return len(files)
}

func labelled(namespace, name string, kv ...string) metav1.ObjectMeta {
	m := metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{}}
	for i := 0; i+1 < len(kv); i += 2 {
		m.Labels[kv[i]] = kv[i+1]
	}
	return m
}

func ptr[T any](v T) *T { return &v }

func collector() *appsv1.DaemonSet {
	return &appsv1.DaemonSet{ObjectMeta: labelled("telemetry", "collector", "app", "collector"), Spec: appsv1.DaemonSetSpec{
		Template: corev1.PodTemplateSpec{ObjectMeta: labelled("", "", "app", "collector"), Spec: corev1.PodSpec{
			NodeSelector: map[string]string{"kubernetes.io/os": "linux"}, Containers: []corev1.Container{{Name: "c", Image: "telemetry:1"}}}}}}
}

func binding(name string, subjects ...rbacv1.Subject) *rbacv1.ClusterRoleBinding {
	return &rbacv1.ClusterRoleBinding{ObjectMeta: labelled("", name), Subjects: subjects,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "collector"}}
}

func account(namespace, name string) rbacv1.Subject {
	return rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: namespace, Name: name}
}

func user(name string) rbacv1.Subject {
	return rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: name}
}

func group(name string) rbacv1.Subject {
	return rbacv1.Subject{Kind: rbacv1.GroupKind, APIGroup: rbacv1.GroupName, Name: name}
}

// write makes a file with the text.
func write(t testing.TB, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func parameters(t testing.TB, m map[string]any) *structpb.Struct {
	t.Helper()
	s, err := structpb.NewStruct(m)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// tighten puts the shipped policy with a local file in force.
func (l *lab) tighten(file string) {
	l.t.Helper()
	local, err := trust.ReadLocal(write(l.t, file))
	if err != nil {
		l.t.Fatal(err)
	}
	l.engine.policy = func() *trust.Policy { return trust.Default().Tighten(local) }
}
