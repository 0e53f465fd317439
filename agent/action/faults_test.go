package action

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/structpb"
	corev1 "k8s.io/api/core/v1"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/journal"
	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

var stopCollector = map[string]any{"target": "ds/collector", "namespace": "telemetry", "to": 0}

func TestNoSpace(t *testing.T) {
	l := newLab(t, 1, func(o *etcdcluster.Options) { o.QuotaBytes = 4 << 20 })
	key := l.put(collector())
	l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", "victim")})
	pad := bytes.Repeat([]byte("x"), 512<<10)
	for i := range 64 {
		if _, err := l.raw.Put(l.ctx(), fmt.Sprint("pad", i), string(pad)); err != nil {
			break
		}
	}
	before := l.value(key)
	p, err := l.plan("scale", stopCollector)
	if err != nil {
		t.Fatal(err)
	}
	r := l.engine.Apply(l.ctx(), responder, toApply(p), nil)
	if r.Result != resultFailed || r.Error.Code != string(fault.NoSpace) || r.Error.Next == "" || !bytes.Equal(before, l.value(key)) || l.records() != 0 {
		t.Fatalf("scale without space: %v, %d records", r, l.records())
	}
	l.do(resultApplied, "delete", map[string]any{"target": "cm/victim", "namespace": "telemetry"})
	st, err := l.engine.Status(l.ctx(), responder)
	if err != nil || !strings.Contains(fmt.Sprint(st.Etcd.Alarms), "NOSPACE") {
		t.Errorf("status: %v, %v", st, err)
	}
}

func TestQuorumLost(t *testing.T) {
	l := newLab(t, 3)
	key := l.put(collector())
	p, err := l.plan("scale", stopCollector)
	if err != nil {
		t.Fatal(err)
	}
	l.cluster.Stop(1)
	l.cluster.Stop(2)
	r := l.engine.Apply(l.ctx(), responder, toApply(p), nil)
	if r.Result != resultFailed || r.Error.Code != string(fault.NoQuorum) {
		t.Fatalf("a write without quorum: %v", r)
	}
	l.refuses(fault.NoQuorum, "", "scale", stopCollector)
	var objects []*halliganv1.Object
	sum, err := l.engine.Get(l.ctx(), responder, &halliganv1.GetRequest{Parameters: parameters(t, map[string]any{"target": "ds/collector", "namespace": "telemetry"}), Reason: "test"}, func(o *halliganv1.Object) error {
		objects = append(objects, o)
		return nil
	})
	if err != nil || len(objects) != 1 || sum.Stale == "" {
		t.Errorf("a read without quorum: %v, %v", sum, err)
	}
	st, err := l.engine.Status(l.ctx(), responder)
	if err != nil || st.Etcd.Quorum || st.ReadOnly == "" {
		t.Errorf("status: %v, %v", st, err)
	}
	for _, i := range []int{1, 2} {
		if err := l.cluster.StartMember(i); err != nil {
			t.Fatal(err)
		}
	}
	// Back again, without a restart of the agent.
	deadline := time.Now().Add(30 * time.Second)
	for {
		p, err = l.plan("scale", stopCollector)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	if r := l.engine.Apply(l.ctx(), responder, toApply(p), nil); r.Result != resultApplied || !bytes.Contains(l.value(key), []byte(storage.StopLabel)) {
		t.Errorf("after the quorum is back: %v", r)
	}
}

// TestLeaderLostMidAction stops the leader in the middle of a long deletion: it
// goes on with the next leader, and no object is lost track of.
func TestLeaderLostMidAction(t *testing.T) {
	l := newLab(t, 3)
	const many = 400
	for i := range many {
		l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", fmt.Sprintf("run-%04d", i), "app", "runaway")})
	}
	l.engine.pace = Pace{PerSecond: 200, Most: 8}
	p, err := l.plan("delete", map[string]any{"target": "cm", "namespace": "telemetry", "selector": "app=runaway"})
	if err != nil {
		t.Fatal(err)
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		time.Sleep(500 * time.Millisecond)
		l.cluster.Stop(l.cluster.Leader())
	}()
	r := l.engine.Apply(l.ctx(), responder, toApply(p), nil)
	<-stopped
	applied, unknown := 0, 0
	for _, o := range r.Objects {
		gone := l.value(o.Key) == nil
		switch o.Outcome {
		case journal.Applied, outcomeUnverified:
			applied++
			if !gone {
				t.Errorf("%s is said to be deleted and is there", o.Key)
			}
		case outcomeUnknown:
			unknown++
		default:
			if gone {
				t.Errorf("%s is said to be %s and is gone", o.Key, o.Outcome)
			}
		}
	}
	if applied == 0 {
		t.Fatalf("nothing done: %v", r.Error)
	}
	t.Logf("%s: %d done, %d unknown of %d (%v)", r.Result, applied, unknown, many, r.Error)
	if unknown > 0 {
		l.engine.settle = 0
		ctx, cancel := context.WithTimeout(l.ctx(), 20*time.Second)
		defer cancel()
		go l.engine.Recover(ctx)
		if err := l.engine.Settled(ctx); err != nil {
			t.Fatal(err)
		}
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if n, err := l.raw.Get(l.ctx(), "/registry/configmaps/", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil || n.Count != many {
		t.Errorf("after undo: %v, %v", n, err)
	}
}

// TestQuorumLostMidAction stops two of three members amid a long deletion: it ends
// soon, every object has an outcome, and none is a lie.
func TestQuorumLostMidAction(t *testing.T) {
	l := newLab(t, 3)
	const many = 300
	for i := range many {
		l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", fmt.Sprintf("run-%04d", i), "app", "runaway")})
	}
	patience := electionPatience
	electionPatience = time.Second
	defer func() { electionPatience = patience }()
	var once sync.Once
	writes := atomic.Int64{}
	stopped := make(chan struct{})
	l.engine.steps = func(step string) {
		if step == "written" && writes.Add(1) > 50 {
			once.Do(func() {
				go func() {
					defer close(stopped)
					l.cluster.Stop(1)
					l.cluster.Stop(2)
				}()
			})
		}
	}
	l.engine.pace = Pace{PerSecond: 200, Most: 8}
	p, err := l.plan("delete", map[string]any{"target": "cm", "namespace": "telemetry", "selector": "app=runaway"})
	if err != nil {
		t.Fatal(err)
	}
	last := int64(0)
	began := time.Now()
	r := l.engine.Apply(l.ctx(), responder, toApply(p), func(g *halliganv1.Progress) { last = g.Done })
	t.Logf("it took %s", time.Since(began))
	<-stopped
	if r.Result == resultApplied || r.Error == nil || last != many {
		t.Errorf("%s, %v, progress ended at %d", r.Result, r.Error, last)
	}
	for _, i := range []int{1, 2} {
		if err := l.cluster.StartMember(i); err != nil {
			t.Fatal(err)
		}
	}
	count := map[string]int{}
	for _, o := range r.Objects {
		count[o.Outcome]++
		switch gone := l.value(o.Key) == nil; o.Outcome {
		case journal.Applied, outcomeUnverified:
			if !gone {
				t.Errorf("%s is said to be %s and is there", o.Key, o.Outcome)
			}
		case outcomeSkipped, outcomeFailed:
			if gone {
				t.Errorf("%s is said to be %s and is gone", o.Key, o.Outcome)
			}
		case outcomeUnknown:
		default:
			t.Errorf("%s has the outcome %q", o.Key, o.Outcome)
		}
	}
	t.Logf("%s: %v, %v", r.Result, count, r.Error)
}

// TestStateFolder: without a place for the record nothing is written at all.
func TestStateFolder(t *testing.T) {
	l := newLab(t, 1)
	key := l.put(collector())
	refused := func(code fault.Code) {
		t.Helper()
		p, err := l.plan("scale", stopCollector)
		if err != nil {
			t.Fatal(err) // a plan writes nothing, so it works
		}
		r := l.engine.Apply(l.ctx(), responder, toApply(p), nil)
		if r.Error.GetCode() != string(code) || bytes.Contains(l.value(key), []byte(storage.StopLabel)) {
			t.Errorf("%v, want %s", r, code)
		}
		if l.records() != 0 {
			t.Error("half a record was left")
		}
		st, err := l.engine.Status(l.ctx(), responder)
		if err != nil || st.ReadOnly == "" {
			t.Errorf("status does not say so: %v, %v", st, err)
		}
	}
	mount := func(size string) {
		t.Helper()
		l.engine.journal.Close()
		dir := t.TempDir()
		if err := unix.Mount("halligan-test", dir, "tmpfs", 0, "size="+size+",mode=0700"); err != nil {
			t.Fatalf("mounting a tmpfs (the tests run as root): %v", err)
		}
		l.dir = filepath.Join(dir, "state")
		l.start(nil)
		records := l.engine.journal
		t.Cleanup(func() {
			records.Close()
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		})
	}
	mount("8m")
	fill := filepath.Join(filepath.Dir(l.dir), "fill")
	if err := os.WriteFile(fill, make([]byte, 6<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(fault.AuditUnavailable)
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	// Room again, and the same agent goes on.
	r := l.do(resultApplied, "scale", stopCollector)
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})

	mount("16m")
	if err := unix.Mount("", filepath.Dir(l.dir), "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	refused(fault.AuditUnavailable)
	// A folder that others may look into, or that is no folder, is refused at
	// the start.
	for _, make := range []func(string) error{
		func(p string) error { return os.Mkdir(p, 0o755) },
		func(p string) error { return os.WriteFile(p, nil, 0o600) },
	} {
		dir := filepath.Join(t.TempDir(), "state")
		if err := make(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := journal.Open(dir, journal.Options{}); !fault.Is(err, fault.AuditUnavailable) {
			t.Errorf("opened: %v", err)
		}
	}
	if _, err := journal.Open(l.dir, journal.Options{}); err == nil {
		t.Error("two agents hold one state folder")
	}
}

func TestEncryptionAtRest(t *testing.T) {
	l := newLab(t, 1)
	key1 := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("1"), 32))
	key2 := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("2"), 32))
	config := func(providers string) string {
		return "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: ['*.*']\n  providers:\n" + providers
	}
	load := func(providers string) {
		t.Helper()
		l.engine.journal.Close()
		tr, err := storage.LoadEncryption(context.Background(), write(t, config(providers)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(tr.Close)
		l.start(func(o *Options) { o.Encryption = tr })
	}
	old := "  - aescbc: {keys: [{name: one, secret: " + key1 + "}]}\n  - identity: {}\n"
	both := "  - secretbox: {keys: [{name: two, secret: " + key2 + "}]}\n" + old
	load(old)
	key := l.put(collector())
	if !bytes.HasPrefix(l.value(key), []byte("k8s:enc:aescbc:v1:one:")) {
		t.Fatalf("seeded as %.30q", l.value(key))
	}
	load(both)
	r := l.do(resultApplied, "scale", stopCollector)
	if !bytes.HasPrefix(l.value(key), []byte("k8s:enc:secretbox:v1:two:")) {
		t.Errorf("written as %.30q, want the first provider", l.value(key))
	}
	record, err := os.ReadFile(filepath.Join(l.dir, "actions", r.Action+".jsonl"))
	if err != nil || bytes.Contains(record, []byte("telemetry:1")) {
		t.Errorf("the before-image is not encrypted, or %v", err)
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	r = l.do(resultApplied, "delete", map[string]any{"target": "ds/collector", "namespace": "telemetry"})
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})

	// Keys are rotated while the agent runs: the next write has the key that is
	// first by then, and while the file is broken there is none.
	file := write(t, config(old))
	tr, err := storage.LoadEncryption(context.Background(), file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tr.Close)
	l.engine.journal.Close()
	l.start(func(o *Options) { o.Encryption = tr })
	rewrite := func(text string) {
		t.Helper()
		if err := os.Rename(write(t, text), file); err != nil {
			t.Fatal(err)
		}
	}
	key = l.put(collector())
	p, err := l.plan("scale", stopCollector)
	if err != nil {
		t.Fatal(err)
	}
	rewrite(config(both))
	if r = l.engine.Apply(l.ctx(), responder, toApply(p), nil); r.Result != resultApplied || !bytes.HasPrefix(l.value(key), []byte("k8s:enc:secretbox:v1:two:")) {
		t.Errorf("%s, %v: written as %.30q by an agent that started before the rotation", r.Result, r.Error, l.value(key))
	}
	before := l.value(key)
	rewrite("}")
	l.refuses(fault.Encrypted, file, "undo", map[string]any{"action": r.Action})
	if st, err := l.engine.Status(l.ctx(), responder); err != nil || !strings.Contains(st.ReadOnly, file) || !strings.Contains(st.ReadOnly, "deletions") {
		t.Errorf("status: %v, %v", st, err)
	}
	if !bytes.Equal(l.value(key), before) {
		t.Error("it was written")
	}
	rewrite(config(both))
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})

	// The key is lost: nothing can be changed, and the reason names the key.
	load("  - identity: {}\n")
	l.refuses(fault.Encrypted, "two", "scale", stopCollector)
	before = l.value(key)
	load("  - kms: {apiVersion: v2, name: vault, endpoint: 'unix:///nonexistent/kms.sock', timeout: 1s}\n  - identity: {}\n")
	l.refuses(fault.Encrypted, "", "scale", stopCollector)
	l.putRaw(key, []byte("k8s:enc:kms:v2:vault:xxxx"))
	l.refuses(fault.Encrypted, "", "scale", stopCollector)
	l.putRaw(key, before)
}

// TestKill ends the agent with SIGKILL before each step of an action in turn. The
// next agent must find out what happened from etcd, and be right.
func TestKill(t *testing.T) {
	for _, c := range []struct {
		verb       string
		parameters string
		keys       []string
	}{
		{"scale", `{"target":"ds/collector","namespace":"telemetry","to":0}`, []string{"/registry/daemonsets/telemetry/collector"}},
		{"revoke", `{"subject":"system:serviceaccount:telemetry:collector","hard":true}`,
			[]string{"/registry/clusterrolebindings/collector", "/registry/clusterrolebindings/shared", "/registry/serviceaccounts/telemetry/collector"}},
	} {
		t.Run(c.verb, func(t *testing.T) {
			l := newLab(t, 1)
			reset := func() {
				l.put(collector())
				l.put(binding("collector", account("telemetry", "collector")))
				l.put(binding("shared", account("telemetry", "collector"), user("alice")))
				l.put(&corev1.ServiceAccount{ObjectMeta: labelled("telemetry", "collector")})
			}
			seen := map[string]int{}
			for crash := 1; ; crash++ {
				reset()
				before := map[string]string{}
				for _, k := range c.keys {
					before[k] = string(l.value(k))
				}
				l.engine.journal.Close()
				l.dir = filepath.Join(t.TempDir(), "state")
				killed := l.child(t, c.verb, c.parameters, crash)
				result := l.settleAndCheck(t, before)
				seen[result]++
				if !killed {
					if crash < 6 || result != resultApplied {
						t.Fatalf("ended after %d steps with %q", crash, result)
					}
					break
				}
			}
			t.Logf("outcomes: %v", seen)
			// The journal must have seen each kind of ending.
			for _, want := range []string{"", resultFailed, resultApplied} {
				if seen[want] == 0 {
					t.Errorf("no crash ended as %q: %v", want, seen)
				}
			}
		})
	}
}

// TestKillBulk ends the agent in the middle of a long deletion.
func TestKillBulk(t *testing.T) {
	l := newLab(t, 1)
	for round := range 3 {
		before := map[string]string{}
		for i := range 300 {
			k := l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", fmt.Sprintf("run-%04d", i), "app", "runaway"), Data: map[string]string{"round": fmt.Sprint(round)}})
			before[k] = string(l.value(k))
		}
		l.engine.journal.Close()
		l.dir = filepath.Join(t.TempDir(), "state")
		if !l.child(t, "delete", `{"target":"cm","namespace":"telemetry","selector":"app=runaway"}`, 60+round*90) {
			t.Fatal("was not killed")
		}
		if result := l.settleAndCheck(t, before); result != resultPartial {
			t.Errorf("settled as %q", result)
		}
	}
}

// TestKillOnLedger kills the agent with the ledger in force: what was acknowledged is
// in the log, once, and what became of it is found out.
func TestKillOnLedger(t *testing.T) {
	l := newLab(t, 1)
	dir := filepath.Join(t.TempDir(), "audit")
	before := uint64(0)
	for _, c := range []struct {
		step, outcome string
		settled       bool
	}{{"read", notApplied, true}, {"write", resultFailed, true}, {"written", resultApplied, true}, {"end", resultApplied, false}} {
		l.put(collector())
		l.engine.journal.Close()
		if !l.childUntil(t, "scale", `{"target":"ds/collector","namespace":"telemetry","to":0}`, c.step, dir) {
			t.Fatalf("was not killed at %q", c.step)
		}
		l.start(func(o *Options) { o.SettleAfter = 100 * time.Millisecond })
		log, err := openLedger(dir)
		if err != nil {
			t.Fatal(err)
		}
		l.ledger, l.engine.audit, l.engine.past, l.engine.closed = log, log, PastOf(log), false
		l.recover(100 * time.Millisecond)
		all := l.events("")
		paired(t, all)
		for i, e := range all {
			if e.Seq != uint64(i) {
				t.Fatalf("event %d has the number %d", i, e.Seq)
			}
		}
		last := all[len(all)-1]
		if in := all[len(all)-2]; uint64(len(all)) != before+2 || in.Kind != audit.Intent || last.Of != in.ID || last.Outcome != c.outcome || last.Settled != c.settled {
			t.Errorf("killed at %q: %d events more, the last %+v", c.step, uint64(len(all))-before, last)
		}
		before = uint64(len(all))
		if err := log.Close(); err != nil {
			t.Error(err)
		}
	}
}

// settleAndCheck starts the next agent, lets it settle, and compares what its
// history says with what etcd holds. It returns the result, "" when there is no
// record because nothing was begun; afterwards all is as before.
func (l *lab) settleAndCheck(t *testing.T, before map[string]string) string {
	t.Helper()
	l.start(func(o *Options) { o.SettleAfter = 300 * time.Millisecond })
	ctx, cancel := context.WithTimeout(l.ctx(), 20*time.Second)
	done := make(chan struct{})
	go func() { defer close(done); l.engine.Recover(ctx) }()
	err := l.engine.Settled(ctx)
	cancel()
	<-done
	if err != nil {
		t.Fatal(err)
	}
	paired(t, l.events(""))
	changed := map[string]bool{}
	for k, v := range before {
		changed[k] = string(l.value(k)) != v
	}
	var entries []*halliganv1.HistoryEntry
	if err := l.engine.History(l.ctx(), responder, &halliganv1.HistoryRequest{}, func(h *halliganv1.HistoryEntry) error { entries = append(entries, h); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(entries) == 0 {
		for k := range changed {
			if changed[k] {
				t.Errorf("%s was changed without any record", k)
			}
		}
		if all := l.events(""); len(all) > 0 && all[len(all)-1].Outcome != notApplied && all[len(all)-1].Outcome != resultApplied {
			t.Errorf("nothing was done, and the log ends with %+v", all[len(all)-1])
		}
		return ""
	}
	if len(entries) != 1 {
		t.Fatalf("%d records", len(entries))
	}
	if err := l.engine.History(l.ctx(), responder, &halliganv1.HistoryRequest{ActionId: entries[0].ActionId}, func(h *halliganv1.HistoryEntry) error { entries[0] = h; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, e := range l.events(entries[0].ActionId) {
		for _, o := range e.Objects {
			if e.Kind != audit.Intent && changed[o.Key] != (o.Outcome == journal.Applied) {
				t.Errorf("%s: changed %v, the log says %s", o.Key, changed[o.Key], o.Outcome)
			}
		}
	}
	said := map[string]bool{}
	for _, r := range entries[0].Results {
		said[r.Key] = r.Outcome == journal.Applied
	}
	applied := 0
	for k := range before {
		if changed[k] != said[k] {
			t.Errorf("%s: changed %v, the record says %v (%s)", k, changed[k], said[k], entries[0].Result)
		}
		if changed[k] {
			applied++
		}
	}
	if applied > 0 {
		// Rights that were found deleted after the interruption come back only
		// by somebody who may add authority.
		_, err := l.plan("undo", map[string]any{"action": entries[0].ActionId})
		if fault.Is(err, fault.Refused) && entries[0].Action == "revoke" && strings.Contains(err.Error(), "not certain") {
			return entries[0].Result
		}
		l.do(resultApplied, "undo", map[string]any{"action": entries[0].ActionId[:len(entries[0].ActionId)-2]})
		for k, v := range before {
			if strings.Contains(k, "daemonsets") {
				v, k = sansGeneration(t, []byte(v)), sansGeneration(t, l.value(k))
			} else {
				k = string(l.value(k))
			}
			if k != v {
				t.Errorf("undo did not put back %q", v)
			}
		}
	}
	return entries[0].Result
}

// child runs the action in another process that kills itself before the given
// step, counted from 1. It reports whether it was killed.
func (l *lab) child(t *testing.T, verb, parameters string, crash int) bool {
	return l.childUntil(t, verb, parameters, strconv.Itoa(crash), l.logFile)
}

// childUntil is child with the name of the step, and then with the ledger in a folder.
func (l *lab) childUntil(t *testing.T, verb, parameters, crash, log string) bool {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "HALLIGAN_TEST_CHILD="+strings.Join([]string{strings.Join(l.cluster.Endpoints(), ","), l.cluster.CAFile(), l.cluster.CertFile(),
		l.cluster.KeyFile(), l.dir, verb, parameters, crash, log}, "|"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err == nil {
		return false
	}
	if state, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || state.Signal() != syscall.SIGKILL {
		t.Fatalf("%v\n%s", err, out)
	}
	return true
}

// TestMain is also the other process of child.
func TestMain(m *testing.M) {
	spec := strings.Split(os.Getenv("HALLIGAN_TEST_CHILD"), "|")
	if len(spec) != 9 {
		os.Exit(m.Run())
	}
	if err := runChild(spec); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func runChild(spec []string) error {
	client, err := etcd.Open(etcd.Config{Endpoints: strings.Split(spec[0], ","), CAFile: spec[1], CertFile: spec[2], KeyFile: spec[3]})
	if err != nil {
		return err
	}
	records, err := journal.Open(spec[4], journal.Options{})
	if err != nil {
		return err
	}
	none, err := storage.LoadEncryption(context.Background(), "")
	if err != nil {
		return err
	}
	crash, _ := strconv.Atoi(spec[7]) // else the name of a step
	steps := make(chan int, 1)
	steps <- 0
	step := func(name string) {
		n := <-steps + 1
		if n == crash || name == spec[7] {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		steps <- n
	}
	var events audit.Log
	if crash == 0 {
		if events, err = openLedger(spec[8]); err != nil {
			return err
		}
	} else {
		log, err := readLines(spec[8])
		if err != nil {
			return err
		}
		log.refuse = func(e audit.Event) error { step(string(e.Kind)); return nil }
		events = log
	}
	engine := New(Options{Node: "cp-1", Etcd: client, Encryption: none, Journal: records, Audit: events, Policy: trust.Default, Log: zerolog.Nop(),
		Steps: step})
	var par map[string]any
	if err := json.Unmarshal([]byte(spec[6]), &par); err != nil {
		return err
	}
	s, err := structpb.NewStruct(par)
	if err != nil {
		return err
	}
	p, err := engine.Plan(context.Background(), responder, &halliganv1.PlanRequest{Action: spec[5], Parameters: s, Reason: "test"})
	if err != nil {
		return err
	}
	if r := engine.Apply(context.Background(), responder, toApply(p), nil); r.Result != resultApplied {
		return fmt.Errorf("%s: %v", r.Result, r.Error)
	}
	return nil
}

// TestPanicMidAction: a bug that one object brings out costs what is in hand, not
// the agent, and nothing is said of an object that is not so.
func TestPanicMidAction(t *testing.T) {
	for _, at := range []string{"read", "image", "written"} {
		l := newLab(t, 1)
		const many = 200
		for i := range many {
			l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", fmt.Sprintf("run-%04d", i), "app", "runaway")})
		}
		var once sync.Once
		l.engine.steps = func(step string) {
			if step == at {
				once.Do(func() { panic("an object that nobody expected") })
			}
		}
		p, err := l.plan("delete", map[string]any{"target": "cm", "namespace": "telemetry", "selector": "app=runaway"})
		if err != nil {
			t.Fatal(err)
		}
		r := l.engine.Apply(l.ctx(), responder, toApply(p), nil)
		count := map[string]int{}
		for _, o := range r.Objects {
			count[o.Outcome]++
			gone := l.value(o.Key) == nil
			if o.Outcome == journal.Applied && !gone || (o.Outcome == outcomeSkipped || o.Outcome == outcomeFailed) && gone {
				t.Errorf("panic at %s: %s is said to be %s; gone is %v", at, o.Key, o.Outcome, gone)
			}
		}
		t.Logf("panic at %s: %s, %v", at, r.Result, count)
		if r.Result == resultApplied || r.Error == nil || len(r.Objects) != many {
			t.Errorf("panic at %s: %s of %d objects, %v", at, r.Result, len(r.Objects), r.Error)
		}
		l.engine.steps = func(string) {}
		if _, err := l.plan("delete", map[string]any{"target": "cm", "namespace": "telemetry", "selector": "app=runaway"}); err != nil {
			t.Errorf("after the panic: %v", err)
		}
	}
}
