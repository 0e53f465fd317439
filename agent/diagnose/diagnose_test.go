package diagnose

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	kubescheme "k8s.io/client-go/kubernetes/scheme"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/execline"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// stage is a Diagnoser over a real etcd, with sockets that a test makes up.
type stage struct {
	*Diagnoser
	t       testing.TB
	raw     *clientv3.Client
	cluster *etcdcluster.Cluster
}

func newStage(t testing.TB) *stage {
	t.Helper()
	c := etcdcluster.ForTest(t, 1)
	client, err := etcd.Open(etcd.Config{Endpoints: c.Endpoints(), CAFile: c.CAFile(), CertFile: c.CertFile(), KeyFile: c.KeyFile()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	raw, err := c.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	encryption := storage.OpenEncryption("")
	t.Cleanup(encryption.Close)
	d := New(Options{Node: "cp-1", Etcd: client, Encryption: encryption, Policy: trust.Default})
	d.sockets = func(context.Context, uint16, func(socket)) (bool, error) { return true, nil }
	return &stage{Diagnoser: d, t: t, raw: raw, cluster: c}
}

// put stores an object as an API server does.
func (s *stage) put(key string, o runtime.Object) {
	s.t.Helper()
	s.bytes(key, stored(s.t, o))
}

func (s *stage) bytes(key, value string) {
	s.t.Helper()
	if _, err := s.raw.Put(s.t.Context(), key, value); err != nil {
		s.t.Fatal(err)
	}
}

func stored(t testing.TB, o runtime.Object) string {
	t.Helper()
	kinds, _, err := kubescheme.Scheme.ObjectKinds(o)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := o.(interface{ Marshal() ([]byte, error) }).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	u := runtime.Unknown{TypeMeta: runtime.TypeMeta{APIVersion: kinds[0].GroupVersion().String(), Kind: kinds[0].Kind}, Raw: raw}
	envelope, err := u.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return "k8s\x00" + string(envelope)
}

func controlled(m metav1.ObjectMeta, api, kind, name, uid string) metav1.ObjectMeta {
	yes := true
	m.OwnerReferences = []metav1.OwnerReference{{APIVersion: api, Kind: kind, Name: name, UID: types.UID(uid), Controller: &yes}}
	return m
}

func (s *stage) daemonSet(ns, name, uid, account string) {
	s.put("/registry/daemonsets/"+ns+"/"+name, &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID(uid)},
		Spec: appsv1.DaemonSetSpec{Template: corev1.PodTemplateSpec{Spec: corev1.PodSpec{ServiceAccountName: account}}}})
}

func pod(ns, name, account string, ips ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID(name)},
		Spec: corev1.PodSpec{ServiceAccountName: account, Containers: []corev1.Container{{Name: "c"}}}}
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	return p
}

// top looks and returns findings by way, and the suspects.
func (s *stage) top(req *halliganv1.TopRequest) (map[string]*halliganv1.Finding, []*halliganv1.Suspect) {
	s.t.Helper()
	findings := map[string]*halliganv1.Finding{}
	var suspects *halliganv1.Suspects
	err := s.Top(s.t.Context(), trust.Identity{Person: "anna", Role: trust.Observer, Door: trust.Console}, req, func(e *halliganv1.TopEvent) error {
		if f := e.GetFinding(); f != nil {
			findings[f.GetWay()] = f
		}
		suspects = e.GetSuspects()
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	if !suspects.GetFinal() {
		s.t.Fatal("no final suspects")
	}
	return findings, suspects.GetSuspects()
}

func text(r *halliganv1.FindingRow) string {
	return fmt.Sprintf("%v %s|%s|%s|%s", r.GetValue(), r.GetSubject(), r.GetNamespace(), r.GetOwner(), r.GetDetail())
}

func TestRowsAreComplete(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range table {
		if r.Name == "" || r.Title == "" || r.Unit == "" || r.Timeout <= 0 || r.Memory == "" || len(r.Blind) == 0 || r.look == nil || seen[r.Name] {
			t.Errorf("row %q is not complete", r.Name)
		}
		seen[r.Name] = true
	}
}

// TestCensus counts what piles up, whole and as a sample, beside everything that an
// etcd may hold that Kubernetes did not write.
func TestCensus(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.daemonSet("telemetry", "collector", "uid-1", "collector")
	const many = 5300
	var ops []clientv3.Op
	flush := func() {
		if _, err := s.raw.Txn(t.Context()).Then(ops...).Commit(); err != nil {
			t.Fatal(err)
		}
		ops = ops[:0]
	}
	for i := range many {
		m := metav1.ObjectMeta{Namespace: "telemetry", Name: fmt.Sprintf("report-%05d", i), ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "collector\x1b[31m"}}}
		uid := "uid-1"
		if i%10 == 0 { // by somebody who wants the victim's to be blamed
			uid = "forged"
		}
		m = controlled(m, "apps/v1", "DaemonSet", "collector", uid)
		key := "/registry/configmaps/telemetry/" + m.Name
		ops = append(ops, clientv3.OpPut(key, stored(t, &corev1.ConfigMap{ObjectMeta: m})))
		if len(ops) == 100 {
			flush()
		}
	}
	s.put("/registry/namespaces/telemetry", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "telemetry"}})
	s.put("/registry/namespaces/shop", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}})
	s.put("/registry/configmaps/shop/alone", &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "alone"}})
	s.bytes("/registry/configmaps/shop/garbage", "\x00\xff\x00")
	s.bytes("/registry/secrets/shop/sealed", "k8s:enc:aescbc:v1:key1:xxxx")
	s.bytes("/registry/what.example.com/evils/\x1b]0;x\a/y", "{}")
	s.bytes("/registry/configmaps/a/b/c/d", "deep")
	s.bytes("/registryX/other", "not ours")
	total := float64(many + 8)

	for _, sample := range []bool{false, true} {
		findings, suspects := s.top(&halliganv1.TopRequest{By: []string{"objects", "bytes"}, Sample: sample})
		f := findings["objects"]
		if f.GetError() != "" || f.GetTotal() < total-0.5 || f.GetTotal() > total+0.5 || len(f.GetRows()) < 5 {
			t.Fatalf("sample %v: %v", sample, f)
		}
		if got := text(f.GetRows()[0]); got != "4770 configmaps|telemetry|DaemonSet/collector|written by what calls itself collector\x1b[31m" {
			t.Errorf("sample %v: first is %q", sample, got)
		}
		if got := text(f.GetRows()[1]); !strings.Contains(got, "unverified owner") || !strings.Contains(got, "configmaps|telemetry|DaemonSet/collector") {
			t.Errorf("second is %q", got)
		}
		if (f.GetSampled() != "") != sample {
			t.Errorf("sampled: %q", f.GetSampled())
		}
		blind := strings.Join(f.GetBlind(), "\n")
		for _, want := range []string{"LISTs and watches leave no trace", "owners of 1 encrypted", "owners of 1 objects that cannot be read"} {
			if !strings.Contains(blind, want) {
				t.Errorf("%q is missing in %s", want, blind)
			}
		}
		if b := findings["bytes"]; b.GetTotal() < 100*many || b.GetRows()[0].GetSubject() != "configmaps" || b.GetUnit() != "bytes" {
			t.Errorf("%v", b)
		}
		if len(suspects) == 0 || suspects[0].GetWorkload() != "DaemonSet/collector" || suspects[0].GetUser() != "system:serviceaccount:telemetry:collector" || len(suspects[0].GetEvidence()) != 1 {
			t.Fatalf("%v", suspects)
		}
		for _, other := range suspects[1:] {
			if other.GetWorkload() != "" || other.GetUser() != "" {
				t.Errorf("what is forged names %v", other)
			}
		}
	}
}

// TestLadder holds the commands of a suspect and their order.
func TestLadder(t *testing.T) {
	k := storage.NewCatalogue().ByGroupKind("apps", "DaemonSet")
	l := lead{workload: workload{kind: k, namespace: "telemetry", name: "collector", account: "collector"}, user: "system:serviceaccount:telemetry:collector", weight: 0.4, evidence: "e"}
	commands := func(reasoned bool, leads ...lead) (all []string) {
		for _, s := range rank(leads, reasoned) {
			for _, r := range s.GetRemedies() {
				all = append(all, r.GetCommand())
			}
		}
		return all
	}
	want := []string{"halligan revoke system:serviceaccount:telemetry:collector --reason 'found by top'",
		"halligan revoke system:serviceaccount:telemetry:collector --hard --reason 'found by top'",
		"halligan scale daemonset/collector -n telemetry --to 0 --reason 'found by top'"}
	if got := commands(false, l); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if got := commands(true, l); strings.Contains(strings.Join(got, " "), "--reason") {
		t.Errorf("%q", got)
	}
	// A user's own lead is about the workload that has it.
	user := lead{user: l.user, weight: 0.5, evidence: "asks"}
	if got := rank([]lead{user, l}, true); len(got) != 1 || got[0].GetScore() < 0.69 || got[0].GetScore() > 0.71 || len(got[0].GetEvidence()) != 2 {
		t.Errorf("%v", got)
	}
	// Hostile names: one word each for a shell, or no command at all.
	for _, name := range []string{"$(reboot)", "a;b", "it's", "`x`", "-y", "--yes", "a b", `"`, `\`, "\x1b[2J", "\u202e", "a\nb"} {
		w := l
		w.workload.name, w.user = name, name
		for _, line := range commands(true, w) {
			words, err := execline.Words(line)
			if err != nil || len(words) != 3 || words[1] != "revoke" || words[2] != "user:"+name {
				t.Errorf("%q: %q is %q, %v", name, line, words, err)
			}
			out, err := exec.Command("sh", "-c", `printf '%s\n' `+line).Output()
			if err != nil || string(out) != strings.Join(words, "\n")+"\n" {
				t.Errorf("%q: a shell takes %s for %q, %v", name, line, out, err)
			}
		}
	}
	for _, system := range []string{"system:node:n", "system:kube-controller-manager", "system:masters"} {
		if got := commands(true, lead{user: system, weight: 1}); got != nil {
			t.Errorf("%q", got)
		}
	}
}

// TestConnections joins peers of both families to pods and nodes.
func TestConnections(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.daemonSet("telemetry", "collector", "uid-1", "collector")
	open := map[string]int{"10.1.0.1": 20, "fd00::1": 15, "10.1.0.2": 25, "10.0.0.1": 9, "fd00:1::1": 9, "127.0.0.1": 5, "10.1.0.9": 12, "192.0.2.7": 3, "10.1.0.8": 2, "10.1.0.7": 1}
	s.sockets = func(_ context.Context, port uint16, fn func(socket)) (bool, error) {
		if port != 6443 {
			t.Errorf("port %d", port)
		}
		for ip, n := range open {
			for range n {
				fn(socket{netip.MustParseAddr(ip)})
			}
		}
		return false, nil
	}
	for i, ips := range [][]string{{"10.1.0.1", "fd00::1"}, {"10.1.0.2"}} {
		p := pod("telemetry", fmt.Sprintf("collector-%d", i), "collector", ips...)
		p.ObjectMeta = controlled(p.ObjectMeta, "apps/v1", "DaemonSet", "collector", "uid-1")
		s.put("/registry/pods/telemetry/"+p.Name, p)
	}
	// One that frames the victim, by an owner that is another, and two that claim
	// one address.
	framer := pod("telemetry", "framer", "default", "10.1.0.8")
	framer.ObjectMeta = controlled(framer.ObjectMeta, "apps/v1", "DaemonSet", "collector", "uid-2")
	s.put("/registry/pods/telemetry/framer", framer)
	s.put("/registry/pods/shop/a", pod("shop", "a", "a", "10.1.0.9"))
	s.put("/registry/pods/shop/b", pod("shop", "b", "b", "10.1.0.9"))
	gone := pod("shop", "gone", "gone", "10.1.0.1")
	gone.Status.Phase = corev1.PodSucceeded
	s.put("/registry/pods/shop/gone", gone)
	host := pod("kube-system", "proxy", "proxy", "10.0.0.1")
	host.Spec.HostNetwork, host.Status.HostIP = true, "10.0.0.1"
	s.put("/registry/pods/kube-system/proxy", host)
	s.put("/registry/minions/node-1", &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "10.0.0.1"}, {Type: corev1.NodeInternalIP, Address: "fd00:1::1"}, {Type: corev1.NodeHostName, Address: "192.0.2.7"}}}})
	s.bytes("/registry/pods/shop/garbage", "k8s\x00\xff\xff")
	// What lies under another's key is nobody.
	s.put("/registry/pods/shop/liar", pod("telemetry", "other", "x", "10.1.0.7"))

	findings, suspects := s.top(&halliganv1.TopRequest{By: []string{"connections"}})
	f := findings["connections"]
	var rows []string
	for _, r := range f.GetRows() {
		rows = append(rows, text(r))
	}
	want := []string{
		"60 3 pods|telemetry|DaemonSet/collector|10.1.0.2, 10.1.0.1, fd00::1",
		"12 1 pod address|||10.1.0.9; claimed by more than one pod",
		"9 1 node|||node-1",
		"9 1 node|||node-1; shared with kube-system/proxy",
		"5 1 loopback address|||127.0.0.1; this node itself",
		"4 2 addresses|||192.0.2.7, 10.1.0.7",
		"2 1 pod|telemetry|Pod/framer|10.1.0.8",
	}
	if !slices.Equal(rows, want) || f.GetTotal() != 101 {
		t.Errorf("%v:\n%s", f.GetTotal(), strings.Join(rows, "\n"))
	}
	blind := strings.Join(f.GetBlind(), "\n")
	for _, part := range []string{"host network share their node's address", "nobody listens on port 6443"} {
		if !strings.Contains(blind, part) {
			t.Errorf("%q is missing in %s", part, blind)
		}
	}
	if len(suspects) == 0 || suspects[0].GetUser() != "system:serviceaccount:telemetry:collector" || suspects[0].GetWorkload() != "DaemonSet/collector" {
		t.Errorf("%v", suspects)
	}
}

// TestWrites watches churn, and what is no object beside it.
func TestWrites(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.put("/registry/deployments/shop/web", &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "d-1"}})
	rs := &appsv1.ReplicaSet{ObjectMeta: controlled(metav1.ObjectMeta{Namespace: "shop", Name: "web-abc", UID: "r-1"}, "apps/v1", "Deployment", "web", "d-1")}
	s.put("/registry/replicasets/shop/web-abc", rs)
	p := pod("shop", "web-abc-1", "", "10.1.0.1")
	p.ObjectMeta = controlled(p.ObjectMeta, "apps/v1", "ReplicaSet", "web-abc", "r-1")
	p.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kubelet", Time: &metav1.Time{Time: time.Unix(2, 0)}}, {Manager: "old", Time: &metav1.Time{Time: time.Unix(1, 0)}}}
	value := stored(t, p)
	ctx, stop := context.WithCancel(t.Context())
	var wrote int
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ctx.Err() == nil; i++ {
			_, err := s.raw.Put(ctx, "/registry/pods/shop/web-abc-1", value)
			if i%10 == 0 {
				_, _ = s.raw.Put(ctx, "/registry/configmaps/shop/garbage", "\xff")
				_, _ = s.raw.Delete(ctx, "/registry/configmaps/shop/garbage")
				_, _ = s.raw.Put(ctx, "/registry/nothing\x1b/known", "x")
				_, _ = s.raw.Put(ctx, "/elsewhere", "x")
			}
			if err == nil {
				wrote++
			}
			time.Sleep(time.Millisecond)
		}
	}()
	findings, suspects := s.top(&halliganv1.TopRequest{By: []string{"writes"}, Seconds: 1})
	stop()
	<-done
	f := findings["writes"]
	if f.GetError() != "" || f.GetTotal() <= 0 || len(f.GetRows()) < 3 || wrote == 0 {
		t.Fatalf("%v (%d writes)", f, wrote)
	}
	if r := f.GetRows()[0]; r.GetSubject() != "pods" || r.GetOwner() != "Deployment/web" || r.GetDetail() != "written by what calls itself kubelet" {
		t.Errorf("%s", text(r))
	}
	blind := strings.Join(f.GetBlind(), "\n")
	for _, part := range []string{"reads", "that cannot be read", "of no known kind"} {
		if !strings.Contains(blind, part) {
			t.Errorf("%q is missing in %s", part, blind)
		}
	}
	if len(suspects) == 0 || suspects[0].GetWorkload() != "Deployment/web" || suspects[0].GetUser() != "system:serviceaccount:shop:default" {
		t.Errorf("%v", suspects)
	}
}

// TestBlind: without etcd and the API server each way says why it sees nothing, and
// the look ends in time.
func TestBlind(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.sockets = func(context.Context, uint16, func(socket)) (bool, error) { panic("a mistake of ours") }
	s.cluster.Stop(0)
	findings, suspects := s.top(&halliganv1.TopRequest{})
	for _, way := range Names() {
		if findings[way].GetError() == "" {
			t.Errorf("%s says nothing: %v", way, findings[way])
		}
	}
	if len(suspects) > 0 || !strings.Contains(findings["connections"].GetError(), "failed in the agent itself") {
		t.Errorf("%v, %v", suspects, findings["connections"])
	}
}

func TestTopRefuses(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	anna := trust.Identity{Person: "anna", Role: trust.Observer, Door: trust.Console}
	for _, c := range []struct {
		who  trust.Identity
		req  *halliganv1.TopRequest
		code fault.Code
	}{
		{anna, &halliganv1.TopRequest{By: []string{"wri\x1btes"}}, fault.Usage},
		{anna, &halliganv1.TopRequest{Seconds: 61}, fault.Usage},
		{trust.Identity{Person: "anna", Role: trust.Approver, Door: trust.Console}, &halliganv1.TopRequest{}, fault.Refused},
		{trust.Identity{}, &halliganv1.TopRequest{}, fault.Refused},
	} {
		err := s.Top(t.Context(), c.who, c.req, func(*halliganv1.TopEvent) error { t.Error("sent"); return nil })
		if fault.CodeOf(err) != c.code || strings.ContainsRune(err.Error(), 0x1b) {
			t.Errorf("%v: %v", c.req, err)
		}
	}
	// Whoever goes away ends the looking, and no more than two look at a time.
	looking := make(chan struct{}, atOnce)
	s.sockets = func(ctx context.Context, _ uint16, _ func(socket)) (bool, error) {
		looking <- struct{}{}
		<-ctx.Done()
		return false, ctx.Err()
	}
	ctx, leave := context.WithCancel(t.Context())
	ended := make(chan error, atOnce)
	for range atOnce {
		go func() {
			ended <- s.Top(ctx, anna, &halliganv1.TopRequest{By: []string{"connections", "writes"}, Seconds: 60}, func(*halliganv1.TopEvent) error { return errors.New("gone") })
		}()
	}
	for range atOnce {
		<-looking
	}
	if err := s.Top(t.Context(), anna, &halliganv1.TopRequest{}, nil); fault.CodeOf(err) != fault.Failed || !strings.Contains(err.Error(), "others look already") {
		t.Errorf("a third: %v", err)
	}
	leave()
	for range atOnce {
		if err := <-ended; err == nil || err.Error() != "gone" {
			t.Error(err)
		}
	}
}

// TestTally stays within its bound and keeps what is large.
func TestTally(t *testing.T) {
	k := storage.NewCatalogue().ByGroupKind("", "Pod")
	ta := newTally()
	ta.max = 100
	for i := range 100_000 {
		ta.at(heap{kind: k, namespace: fmt.Sprint(i)}).count++
		if i%10 == 0 {
			ta.at(heap{kind: k, namespace: "large"}).count++
		}
	}
	if p := ta.sorted(func(p *pile) float64 { return p.count })[0]; len(ta.piles) > 100 || p.namespace != "large" || p.count < 9900 || ta.forgotten == 0 {
		t.Errorf("%d piles, first %q with %v", len(ta.piles), p.namespace, p.count)
	}
}

func TestSockets(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		f := filepath.Join(dir, name)
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	head := "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
	v4 := write("tcp", head+
		"   0: 0B00007F:192B 0100007F:D431 01 00000000:00000000\n"+ // 127.0.0.11:6443, 127.0.0.1
		"   1: 0B00007F:192B 0100007F:D432 06 00000000:00000000\n"+ // time-wait
		"   2: 0100007F:D431 0B00007F:192B 01 00000000:00000000\n"+ // the other end
		"   3: 0B00007F:192B 00000000:0000 0A 00000000:00000000\n"+
		"   4: 0B00007F:192B zz 01\n 5: 0B00007F:192B\n"+strings.Repeat("x", 200_000)+"\n"+
		"   6: 0B00007F:192B 0100007F:D433 01 00000000:00000000 unfinished")
	v6 := write("tcp6", head+
		"   0: 0000000000000000FFFF00000B00007F:192B 0000000000000000FFFF00000200007F:D431 01 0\n"+
		"   1: 000000000000000000000000010000FD:192B 000000000000000000000000020000FD:D431 01 0\n")
	for _, c := range []struct {
		files  []string
		served bool
		want   string
	}{
		{[]string{v4}, true, "127.0.0.1"},
		{[]string{v6, filepath.Join(dir, "missing")}, false, "127.0.0.2 ::fd00:2"},
		{[]string{v4, v6}, true, "127.0.0.1 127.0.0.2 ::fd00:2"},
	} {
		var got []string
		served, err := tables(t.Context(), c.files, 6443, func(s socket) { got = append(got, s.peer.String()) })
		if err != nil || served != c.served || strings.Join(got, " ") != c.want {
			t.Errorf("%v, %v, %q", served, err, got)
		}
	}
	if _, err := tables(t.Context(), []string{filepath.Join(dir, "missing")}, 6443, nil); err == nil {
		t.Error("no table at all is no error")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tables(ctx, []string{v4}, 6443, nil); err == nil {
		t.Error("it reads on")
	}
}

// TestManySockets reads 100,000 from a table like the kernel's.
func TestManySockets(t *testing.T) {
	var b strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&b, "%7d: 0B00007F:192B %08X:D431 01 00000000:00000000 00:00000000 00000000     0        0 6379622 2 00000000f78b972d 100 0 0 10 0\n", i, i)
	}
	f := filepath.Join(t.TempDir(), "tcp")
	if err := os.WriteFile(f, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	n := 0
	if _, err := tables(t.Context(), []string{f}, 6443, func(socket) { n++ }); err != nil || n != 100_000 {
		t.Error(n, err)
	}
}

func FuzzAddress(f *testing.F) {
	f.Add("0100007F:192B")
	f.Add("0000000000000000FFFF00000B00007F:192B")
	f.Fuzz(func(t *testing.T, s string) {
		if a, ok := address(s); ok && !a.IsValid() {
			t.Errorf("%q gives %v", s, a)
		}
	})
}

// accountOf reads what pods run as, of every kind that makes them.
func TestAccountOf(t *testing.T) {
	cat := storage.NewCatalogue()
	for _, c := range []struct{ group, kind, spec, want string }{
		{"", "Pod", `{"serviceAccountName":"a","containers":[{}]}`, "a"},
		{"apps", "Deployment", `{"template":{"spec":{"serviceAccountName":"a"}}}`, "a"},
		{"apps", "Deployment", `{"template":{"spec":{}}}`, "default"},
		{"batch", "CronJob", `{"jobTemplate":{"spec":{"template":{"spec":{"serviceAccountName":"a"}}}}}`, "a"},
		{"apps", "Deployment", `{"template":{"spec":7}}`, ""},
		{"apps", "Deployment", `7`, ""},
		{"", "ConfigMap", `{"template":{"spec":{"serviceAccountName":"a"}}}`, ""},
	} {
		text, _ := json.Marshal(map[string]any{"apiVersion": "v1", "kind": c.kind, "metadata": map[string]any{}, "spec": json.RawMessage(c.spec)})
		o, err := storage.Decode(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := accountOf(cat.ByGroupKind(c.group, c.kind), o); got != c.want {
			t.Errorf("%s %s: %q", c.kind, c.spec, got)
		}
	}
}
