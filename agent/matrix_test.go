package agent

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/types/known/structpb"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/halligan-io/halligan/agent/action"
	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/record"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/issuer"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// columns are who asks, in the order of the letters in [ask.want]. All but the
// console's are one person, so that doors can differ in nothing but themselves.
var columns = []struct {
	name string
	issuer.Holder
}{
	{"observer", as(trust.Observer, trust.Scope{})},
	{"responder", as(trust.Responder, trust.Scope{})},
	{"commander", as(trust.Commander, trust.Scope{})},
	{"approver", as(trust.Approver, trust.Scope{})},
	{"automation", issuer.Holder{Person: "alice", Roles: []trust.Role{trust.Commander}, Clusters: []string{testfleet.Cluster}, Automation: true}},
	{"drill", as(trust.Commander, trust.Scope{Drill: true})},
	{"fenced in", as(trust.Commander, trust.Scope{Namespaces: []string{"other"}})},
	{"for get", as(trust.Commander, trust.Scope{Actions: []string{"get"}})},
}

func as(role trust.Role, scope trust.Scope) issuer.Holder {
	h := testfleet.Holder("alice", role)
	h.Scope = scope
	return h
}

// codes are the letters of [ask.want].
var codes = map[byte]fault.Code{'y': "", 'r': fault.Refused, 'a': fault.AwaitingApproval, 'n': fault.NotFound}

// ask is one thing that somebody may ask for.
type ask struct {
	// action is the row of the table, "" for what has none.
	action, name string
	// prepare makes what is asked about, and returns its name, which stands for
	// $ID below.
	prepare func(way) string
	// line asks in words; "": no words ask for it.
	line string
	call func(c caller, id string) error
	want string
	// leaves says what stands in the evidence log after it and what prepares it, by a
	// letter of want or by a column: an answer as the method's name, one that failed
	// behind a !, a refusal behind a -, and intent, outcome and secret.
	leaves map[string]string
}

// caller is a client, whatever the door.
type caller struct {
	halliganv1.AgentClient
	conn grpc.ClientConnInterface
}

func (c caller) evidence() halliganv1.EvidenceClient { return halliganv1.NewEvidenceClient(c.conn) }

// way is one door, or a form of one, for one column.
type way struct {
	name string
	// person is whom the agent takes the caller for.
	person string
	caller
	// say asks in words, and returns the exit status and what was said of an
	// error; nil where calls are made.
	say func(line string) (exit int, text string)
}

// stage is what the asking is about.
type stage struct {
	*network
	put func(key string, object runtime.Object)
	// felix is another person, a commander; deed is an action of his, plan a
	// plan of his that waits.
	felix caller
	deed  string
	plan  *halliganv1.Plan
}

const (
	roleBinding = "/registry/rolebindings/shop/readers"
	someMap     = "/registry/configmaps/shop/c"
)

func (s *stage) workload(namespace, name string) {
	three := int32(3)
	s.put("/registry/deployments/"+namespace+"/"+name, &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: "u1"}, Spec: appsv1.DeploymentSpec{Replicas: &three}})
}

// asks is the table. The order of the letters is that of columns: observer,
// responder, commander, approver; then commanders that are automation, for
// drills, for another namespace and for get only.
func (s *stage) asks() []ask {
	scaled := func(namespace, name string) func(way) string {
		return func(way) string { s.workload(namespace, name); return name }
	}
	worker := func(cordoned bool) func(way) string {
		return func(way) string {
			s.put("/registry/minions/worker", &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "worker", UID: "u1"}, Spec: corev1.NodeSpec{Unschedulable: cordoned}})
			return ""
		}
	}
	bare := func(way) string {
		s.put(someMap, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "c", UID: "u1"}})
		return ""
	}
	webhook := func(way) string {
		s.put("/registry/validatingwebhookconfigurations/guard", &admissionv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "guard", UID: "u1"},
			Webhooks: []admissionv1.ValidatingWebhook{{Name: "guard.example.com"}}})
		return ""
	}
	// own returns what becomes of a caller's own plan, and of felix's where the
	// caller has none.
	own := func(of string, become func(caller, *halliganv1.Plan) string) func(way) string {
		return func(w way) string {
			s.workload(trust.DrillNamespace, "canary-1")
			p, err := planAs(w, "scale", map[string]any{"target": "deploy/canary-1", "namespace": trust.DrillNamespace, "to": 1})
			if err != nil {
				return of
			}
			return become(w.caller, p)
		}
	}
	did := map[string]string{"y": "Plan intent outcome", "r": "-Plan"}
	answered := func(method string) map[string]string { return map[string]string{"y": method, "r": "-" + method} }
	return []ask{
		{"get", "get", nil, "get deploy -n shop", getting(map[string]any{"target": "deploy", "namespace": "shop"}), "yyyryrry", answered("Get")},
		{"get", "get one", nil, "get deploy/web -n shop", getting(map[string]any{"target": "deploy/web", "namespace": "shop"}), "yyyryrry", answered("Get")},
		{"get", "get a Secret", nil, "get secret/token -n shop", getting(map[string]any{"target": "secret/token", "namespace": "shop"}), "yyyryrry", answered("Get")},
		{"get", "reveal", nil, "get secret/token -n shop --reveal --reason because", getting(map[string]any{"target": "secret/token", "namespace": "shop", "reveal": true}), "rryryrry", map[string]string{"y": "secret Get", "r": "-Get"}},
		{"history", "history", nil, "history", remembering, "yyyryyyr", answered("History")},
		{"history", "what another did", func(way) string { return s.deed }, "history $ID", remembering, "yyyryrrr", answered("History")},
		{"scale", "scale", scaled("shop", "web"), "scale deploy/web -n shop --to 1 -y --reason because", doing("scale", map[string]any{"target": "deploy/web", "namespace": "shop", "to": 1}), "ryyryrrr", did},
		{"scale", "scale a canary", scaled(trust.DrillNamespace, "canary-1"), "scale deploy/canary-1 -n halligan-drill --to 1 -y --reason because",
			doing("scale", map[string]any{"target": "deploy/canary-1", "namespace": trust.DrillNamespace, "to": 1}), "ryyryyrr", did},
		{"scale", "scale what is protected", nil, "scale deploy/coredns -n kube-system --to 0 -y --reason because",
			doing("scale", map[string]any{"target": "deploy/coredns", "namespace": "kube-system", "to": 0}), "rrrrrrrr", did},
		{"scale", "scale what is not there", nil, "scale deploy/nothing -n shop --to 0 -y --reason because",
			doing("scale", map[string]any{"target": "deploy/nothing", "namespace": "shop", "to": 0}), "rnnrnrrr", map[string]string{"n": "!Plan", "r": "-Plan"}},
		{"pause", "pause", scaled("shop", "web"), "pause deploy/web -n shop -y --reason because", doing("pause", map[string]any{"target": "deploy/web", "namespace": "shop"}), "ryyryrrr", did},
		{"resume", "resume", func(way) string {
			s.put("/registry/deployments/shop/web", &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "u1"}, Spec: appsv1.DeploymentSpec{Paused: true}})
			return ""
		}, "resume deploy/web -n shop -y --reason because", doing("resume", map[string]any{"target": "deploy/web", "namespace": "shop"}), "ryyryrrr", did},
		{"webhook", "open a webhook", webhook, "webhook open guard -y --reason because", doing("webhook", map[string]any{"operation": "open", "target": "guard"}), "ryyryrrr", did},
		{"webhook", "delete a webhook", webhook, "webhook delete guard -y --reason because", doing("webhook", map[string]any{"operation": "delete", "target": "guard"}), "ryyryrrr", did},
		{"label", "label", bare, "label cm/c -n shop tier=web -y --reason because", doing("label", map[string]any{"target": "cm/c", "namespace": "shop", "changes": []any{"tier=web"}}), "ryyryrrr", did},
		{"label", "label what adds authority", worker(false), "label node/worker node-role.kubernetes.io/infra= -y --reason because",
			doing("label", map[string]any{"target": "node/worker", "changes": []any{"node-role.kubernetes.io/infra="}}), "rrararrr", map[string]string{"a": "Plan", "r": "-Plan"}},
		{"annotate", "annotate", bare, "annotate cm c -n shop note=x -y --reason because", doing("annotate", map[string]any{"target": "cm/c", "namespace": "shop", "changes": []any{"note=x"}}), "ryyryrrr", did},
		{"cordon", "cordon", worker(false), "cordon worker -y --reason because", doing("cordon", map[string]any{"target": "worker"}), "ryyryrrr", did},
		{"uncordon", "uncordon", worker(true), "uncordon worker -y --reason because", doing("uncordon", map[string]any{"target": "worker"}), "ryyryrrr", did},
		{"delete", "delete", func(way) string {
			s.put(someMap, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "c", UID: "u1"}})
			return ""
		}, "delete cm/c -n shop -y --reason because", doing("delete", map[string]any{"target": "cm/c", "namespace": "shop"}), "ryyryrrr", did},
		{"revoke", "revoke", func(way) string {
			s.put(roleBinding, &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "readers", UID: "u1"},
				RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "reader"},
				Subjects: []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "mallory"}}})
			return ""
		}, "revoke mallory -y --reason because", doing("revoke", map[string]any{"subject": "mallory"}), "ryyryrrr", did},
		{"revoke", "revoke what is protected", nil, "revoke group:system:masters -y --reason because", doing("revoke", map[string]any{"subject": "group:system:masters"}), "rrrrrrrr", did},
		{"undo", "undo one's own", own(s.deed, func(c caller, p *halliganv1.Plan) string {
			if err := applyAs(c, p); err != nil {
				s.t.Error(err)
			}
			return p.GetId()
		}), "undo $ID -y --reason because", undoing(""), "ryyryyrr", map[string]string{"y": "Plan intent outcome Plan intent outcome", "r": "-Plan -Plan"}},
		{"undo", "undo another's", nil, "undo " + s.deed + " -y --reason because", undoing(s.deed), "rrararrr", map[string]string{"a": "Plan", "r": "-Plan"}},
		{"undo", "undo another's by its own call", nil, "", func(c caller, _ string) error {
			p, err := c.Undo(context.Background(), &halliganv1.UndoRequest{ActionId: s.deed, Reason: "because"})
			if err != nil {
				return err
			}
			return applyAs(c, p)
		}, "rrararrr", map[string]string{"a": "Undo", "r": "-Undo"}},
		{"", "status", nil, "status", func(c caller, _ string) error {
			_, err := c.Status(context.Background(), &halliganv1.StatusRequest{})
			return err
		}, "yyyyyyyy", nil},
		{"", "describe", nil, "", func(c caller, _ string) error {
			_, err := c.Describe(context.Background(), &halliganv1.DescribeRequest{})
			return err
		}, "yyyyyyyy", nil},
		{"", "the plan of another", nil, "plan " + s.plan.GetId(), showing(s.plan.GetId()), "nnnynnnn", map[string]string{"y": "ShowPlan", "n": "!ShowPlan"}},
		{"", "one's own plan", own(s.plan.GetId(), func(_ caller, p *halliganv1.Plan) string { return p.GetId() }), "plan $ID", showing(""), "nyyyyynn", map[string]string{"y": "Plan ShowPlan", "n": "-Plan !ShowPlan", "approver": "-Plan ShowPlan"}},
		{"", "apply the plan of another, after a look", nil, "apply " + s.plan.GetId() + " -y", func(c caller, _ string) error {
			if err := showing(s.plan.GetId())(c, ""); err != nil {
				return err
			}
			return applyAs(c, s.plan)
		}, "nnnrnnnn", map[string]string{"n": "!ShowPlan", "r": "ShowPlan -Apply"}},
		{"", "apply the plan of another", nil, "", func(c caller, _ string) error { return applyAs(c, s.plan) }, "rrrrrrrr", map[string]string{"r": "-Apply"}},
		{"", "stop", nil, "", func(c caller, _ string) error {
			_, err := c.Stop(context.Background(), &halliganv1.StopRequest{ActionId: s.deed})
			return err
		}, "rnnrnnnr", map[string]string{"r": "-Stop"}},
		{"", "exchange bundles", nil, "", func(c caller, _ string) error {
			_, err := c.ExchangeBundle(context.Background(), &halliganv1.ExchangeBundleRequest{})
			return err
		}, "yyyyyyyy", nil},
		{"", "read a component's log", nil, "logs etcd", func(c caller, _ string) error {
			stream, err := c.Logs(context.Background(), &halliganv1.LogsRequest{Component: "etcd"})
			return drain(stream, err)
		}, "ryyryrrr", answered("Logs")},
		{"", "top", nil, "top --by objects", func(c caller, _ string) error {
			stream, err := c.Top(context.Background(), &halliganv1.TopRequest{By: []string{"objects"}})
			return drain(stream, err)
		}, "yyyryrrr", answered("Top")},
		{"", "list logs", nil, "", func(c caller, _ string) error {
			_, err := c.evidence().ListLogs(context.Background(), &halliganv1.ListLogsRequest{})
			return err
		}, "yyyryyyy", map[string]string{"r": "-ListLogs"}},
		{"", "read the log", nil, "", func(c caller, _ string) error {
			stream, err := c.evidence().ReadLog(context.Background(), &halliganv1.ReadLogRequest{})
			return drain(stream, err)
		}, "yyyryrrr", map[string]string{"r": "-ReadLog"}},
		{"", "read a recording", func(way) string { return s.recording() }, "", func(c caller, session string) error {
			stream, err := c.evidence().ReadRecording(context.Background(), &halliganv1.ReadRecordingRequest{Session: session, Reason: "because"})
			return drain(stream, err)
		}, "rryryrrr", map[string]string{"y": "secret", "r": "-ReadRecording"}},
		{"", "read sealed images", nil, "", func(c caller, _ string) error {
			stream, err := c.evidence().ReadSealed(context.Background(), &halliganv1.ReadSealedRequest{ActionId: "20300101-000000-aaaaaaaa"})
			return drain(stream, err)
		}, "rnnrnrrr", map[string]string{"n": "!ReadSealed", "r": "-ReadSealed"}},
		{"", "witness", nil, "", func(c caller, _ string) error {
			stream, err := c.evidence().Witness(context.Background())
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		}, "rrrrrrrr", map[string]string{"r": "-Witness"}},
		{"", "reflection", nil, "", func(c caller, _ string) error {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			stream, err := reflectionv1.NewServerReflectionClient(c.conn).ServerReflectionInfo(ctx)
			if err != nil {
				return err
			}
			if err := stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}); err != nil {
				return err
			}
			_, err = stream.Recv()
			return err
		}, "yyyyyyyy", nil},
	}
}

func structOf(parameters map[string]any) *structpb.Struct {
	s, err := structpb.NewStruct(parameters)
	if err != nil {
		panic(err)
	}
	return s
}

func getting(parameters map[string]any) func(caller, string) error {
	return func(c caller, _ string) error {
		stream, err := c.Get(context.Background(), &halliganv1.GetRequest{Parameters: structOf(parameters), Reason: "because"})
		return drain(stream, err)
	}
}

func remembering(c caller, id string) error {
	stream, err := c.History(context.Background(), &halliganv1.HistoryRequest{ActionId: id})
	return drain(stream, err)
}

func drain[T any](stream grpc.ServerStreamingClient[T], err error) error {
	for err == nil {
		_, err = stream.Recv()
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func planAs(c halliganv1.AgentClient, action string, parameters map[string]any) (*halliganv1.Plan, error) {
	return c.Plan(context.Background(), &halliganv1.PlanRequest{Action: action, Parameters: structOf(parameters), Reason: "because"})
}

func applyAs(c halliganv1.AgentClient, p *halliganv1.Plan) error {
	stream, err := c.Apply(context.Background(), &halliganv1.ApplyRequest{PlanId: p.GetId(), PlanSha256: p.GetSha256()})
	for err == nil {
		var event *halliganv1.ApplyEvent
		if event, err = stream.Recv(); err != nil || event.GetResult() == nil {
			continue
		}
		if e := event.GetResult().GetError(); e != nil {
			return fault.New(fault.Code(e.GetCode()), e.GetNext(), "%s", e.GetMessage())
		}
		return nil
	}
	return err
}

func doing(action string, parameters map[string]any) func(caller, string) error {
	return func(c caller, _ string) error {
		p, err := planAs(c, action, parameters)
		if err != nil {
			return err
		}
		if len(p.GetObjects()) == 0 {
			return fmt.Errorf("%s would do nothing", action)
		}
		return applyAs(c, p)
	}
}

// undoing takes back the action of that ID, or the prepared one.
func undoing(named string) func(caller, string) error {
	return func(c caller, id string) error {
		return doing("undo", map[string]any{"action": cmp.Or(named, id)})(c, id)
	}
}

// showing shows the plan of that ID, or of the prepared one.
func showing(named string) func(caller, string) error {
	return func(c caller, id string) error {
		_, err := c.ShowPlan(context.Background(), &halliganv1.ShowPlanRequest{PlanId: cmp.Or(named, id)})
		return err
	}
}

// TestEveryActionRoleAndDoor asks one agent for everything, as everybody, at
// every door and in every form, and wants one answer: what one refuses, all
// refuse in the same words. The table above says who gets what; it is not
// derived from the policy, so that neither can be wrong alone.
func TestEveryActionRoleAndDoor(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	asks := s.asks()
	described := map[string]bool{}
	for _, a := range asks {
		if len(a.want) != len(columns) {
			t.Fatalf("%s: %d expectations for %d columns", a.name, len(a.want), len(columns))
		}
		described[a.action] = true
	}
	for _, row := range action.Describe() {
		if !described[row.GetName()] {
			t.Errorf("no expectation for the action %s", row.GetName())
		}
	}
	called := map[string]bool{}
	var left []trail
	rounds := 0
	for i, column := range columns {
		t.Run(column.name, func(t *testing.T) {
			ways := s.ways(t, column.Holder, called)
			if column.name == "responder" { // what everybody is at the console
				ways = append(ways, s.console(t))
			}
			for _, a := range asks {
				want, known := codes[a.want[i]]
				if !known {
					t.Fatalf("%s: no code %q", a.name, a.want[i])
				}
				first := ""
				for _, w := range ways {
					if w.say != nil && a.line == "" {
						continue
					}
					id := ""
					if a.prepare != nil {
						id = a.prepare(w)
					}
					rounds++
					left = append(left, trail{column.name, a.name, w, strings.Fields(cmp.Or(a.leaves[column.name], a.leaves[a.want[i:i+1]]))})
					exit, text := 0, ""
					if w.say != nil {
						exit, text = w.say(strings.ReplaceAll(a.line, "$ID", id))
						if exit != want.Exit()*min(len(want), 1) {
							t.Errorf("%s by %s: exit status %d (%s), want %q", a.name, w.name, exit, text, want)
						}
					} else {
						var code fault.Code
						if err := a.call(w.caller, id); err != nil {
							f := api.FromStatus(err)
							code, text = f.Code, neutral.Line(f.Error())
						}
						if code != want {
							t.Errorf("%s by %s: %q (%s), want %q", a.name, w.name, code, text, want)
						}
					}
					// A command line says by itself that a plan waits, with the lines to send on.
					if want == fault.AwaitingApproval {
						continue
					}
					if id != "" {
						text = strings.ReplaceAll(text, id, "$ID")
					}
					text = strings.ReplaceAll(text, w.person, "alice")
					if first == "" {
						first = text
					}
					if text != first {
						t.Errorf("%s by %s: %q; another door said %q", a.name, w.name, text, first)
					}
				}
			}
		})
	}
	for _, service := range []grpc.ServiceDesc{halliganv1.Agent_ServiceDesc, halliganv1.Evidence_ServiceDesc} {
		var names []string
		for _, m := range service.Methods {
			names = append(names, m.MethodName)
		}
		for _, m := range service.Streams {
			names = append(names, m.StreamName)
		}
		for _, name := range names {
			if !called["/"+service.ServiceName+"/"+name] {
				t.Errorf("no expectation for the method %s", name)
			}
		}
	}
	t.Logf("%d answers", rounds)
	t.Run("evidence", func(t *testing.T) { s.recorded(t, left) })

	t.Run("nobody", func(t *testing.T) {
		s.nobody(t)
		doors := map[string]int{}
		s.log(t, func(events []audit.Event) bool {
			clear(doors)
			for _, e := range events {
				if e.Kind == audit.Refusal && e.Actor.Person == "" {
					doors[e.Actor.Door]++
				}
			}
			return doors["ssh"] > 0 && doors["grpc"] > 0
		})
	})
}

// trail is what one thing that was asked for has to leave in the evidence log.
type trail struct {
	column, ask string
	by          way
	want        []string
}

// recorded holds the log against what was asked: all of it is there, once, in its
// order, and as whoever asked.
func (s *stage) recorded(t *testing.T, left []trail) {
	t.Helper()
	if err := remembering(s.felix, s.deed); err != nil { // the last that is asked
		t.Fatal(err)
	}
	events := s.log(t, func(events []audit.Event) bool {
		open, last := 0, false
		for _, e := range events {
			switch e.Kind {
			case audit.Session:
				open++
			case audit.SessionEnd:
				open--
			}
			last = last || e.Kind == audit.Read && e.Action == "History" && e.Actor.Person == "felix"
		}
		return last && open == 0
	})
	var asked []audit.Event
	sessions := map[string]bool{}
	for _, e := range events {
		switch e.Kind {
		case audit.Login:
			sessions[e.Session] = true
		case audit.Read, audit.Refusal, audit.Secret, audit.Intent, audit.Outcome:
			if e.Actor.Person != "felix" {
				asked = append(asked, e)
			}
		}
		if a := e.Actor; a != nil && (a.Role == "" || a.Credential == "" || a.Door == "" || a.Door != "console" && (a.Fingerprint == "" || a.Serial == "" || a.CA == "" || a.Source == "") || !sessions[e.Session]) {
			t.Errorf("%s %s by %+v in session %q, which nobody began", e.Kind, e.Action, *a, e.Session)
		}
	}
	var intent audit.Event
	for _, l := range left {
		column := columns[slices.IndexFunc(columns, func(c struct {
			name string
			issuer.Holder
		}) bool {
			return c.name == l.column
		})]
		for i, want := range l.want {
			if len(asked) == 0 {
				t.Fatalf("%s of %s by %s: the log ends before %s", l.ask, l.column, l.by.name, want)
			}
			e := asked[0]
			got := e.Action
			switch {
			case e.Kind == audit.Refusal && e.Outcome == "refused" && e.ErrorCode == string(fault.Refused):
				got = "-" + got
			case e.Kind == audit.Read && e.Outcome == "failed" && e.ErrorCode != "":
				got = "!" + got
			case e.Kind == audit.Intent:
				got, intent = "intent", e
			case e.Kind == audit.Outcome && e.Of == intent.ID && e.PlanID == intent.PlanID && e.Outcome == "applied":
				got = "outcome"
			case e.Kind == audit.Secret:
				got = "secret"
			case e.Kind != audit.Read || e.Outcome != "ok":
				got = fmt.Sprintf("%s %s %s", e.Kind, e.Action, e.Outcome)
			}
			if l.by.say != nil { // words have the call made that is for it
				got = strings.Replace(got, "Undo", "Plan", 1)
			}
			role := column.Roles[0].String()
			if l.by.person != "alice" {
				role = "responder" // which everybody is at the console
			}
			if got != want || e.Actor.Person != l.by.person || e.Actor.Role != role || e.Drill != column.Scope.Drill {
				t.Fatalf("%s of %s by %s: %s by %+v (%s), want %q of %q", l.ask, l.column, l.by.name, got, *e.Actor, e.Error, want, l.want[i:])
			}
			asked = asked[1:]
		}
	}
	if len(asked) > 0 {
		t.Errorf("%d events that nobody asked for: %s %s", len(asked), asked[0].Kind, asked[0].Action)
	}
}

// recording names one of a session.
func (s *stage) recording() string {
	files, err := filepath.Glob(filepath.Join(record.Folder(s.config.StateDir), "recordings", "*.cast"))
	if err != nil || len(files) == 0 {
		s.t.Fatalf("no recordings: %v", err)
	}
	return strings.TrimSuffix(filepath.Base(files[0]), ".cast")
}

// log returns the agent's whole evidence log, verified, once it is all that done asks
// for: what nobody waits for is written some time later.
func (s *stage) log(t *testing.T, done func([]audit.Event) bool) (events []audit.Event) {
	t.Helper()
	folders, err := filepath.Glob(filepath.Join(record.Folder(s.config.StateDir), "logs", "*"))
	if err != nil || len(folders) != 1 {
		t.Fatalf("%q, %v", folders, err)
	}
	tree, err := tiles.Open(folders[0])
	if err != nil {
		t.Fatal(err)
	}
	within(t, "the log has it all", func() bool {
		_, head, err := tree.Checkpoint()
		if err != nil {
			t.Fatal(err)
		}
		for data, err := range tree.Entries(t.Context(), int64(len(events)), head.N) {
			var e audit.Event
			if err == nil {
				err = json.Unmarshal(data, &e)
			}
			if err != nil {
				t.Fatal(err)
			}
			events = append(events, e)
		}
		return done(events)
	})
	return events
}

// newStage runs the agent, with what is asked about in its etcd.
func newStage(t *testing.T) *stage {
	t.Helper()
	cluster := etcdcluster.ForTest(t, 1)
	raw, err := cluster.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	s := &stage{put: func(key string, object runtime.Object) {
		value, err := storage.EncodeTyped(object)
		if err == nil {
			_, err = raw.Put(context.Background(), key, string(value))
		}
		if err != nil {
			t.Fatal(err)
		}
	}}
	for _, name := range []string{"shop", "other", "kube-system", trust.DrillNamespace} {
		s.put("/registry/namespaces/"+name, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "u0"}})
	}
	s.workload("kube-system", "coredns")
	s.workload("shop", "felixs")
	s.workload("shop", "web")
	s.put("/registry/secrets/shop/token", &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "token", UID: "u1"}})
	s.network = newNetwork(t, cluster)
	write(t, s.config.Trust.Bundle, string(s.fleet.Bundle()), 0o644)

	felix := s.fleet.Client(nil, testfleet.Holder("felix", trust.Commander), testfleet.Now())
	s.felix = caller{AgentClient: s.dial(felix)}
	within(t, "the doors open", func() bool {
		_, err := s.felix.Status(t.Context(), &halliganv1.StatusRequest{})
		return err == nil
	})
	within(t, "SSH opens", func() bool {
		conn, err := net.Dial("tcp", s.config.SSH.Listen[0])
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	felixs := map[string]any{"target": "deploy/felixs", "namespace": "shop", "to": 1}
	p, err := planAs(s.felix, "scale", felixs)
	if err == nil {
		err = applyAs(s.felix, p)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.deed, felixs["to"] = p.GetId(), 2
	if s.plan, err = planAs(s.felix, "scale", felixs); err != nil {
		t.Fatal(err)
	}
	return s
}

// console is the door at the node, where everybody is a responder.
func (s *stage) console(t *testing.T) way {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+s.config.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	w := way{name: "the console", caller: caller{halliganv1.NewAgentClient(conn), conn}}
	st, err := w.Status(t.Context(), &halliganv1.StatusRequest{})
	if err != nil || st.GetRole() != "responder" || st.GetDoor() != "console" {
		t.Fatalf("%v, %v", st, err)
	}
	w.person = st.GetActor()
	return w
}

// ways come in through every door of the network. called takes the methods that
// are called.
func (s *stage) ways(t *testing.T, h issuer.Holder, called map[string]bool) []way {
	t.Helper()
	noting := []grpc.DialOption{
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, c *grpc.ClientConn, invoke grpc.UnaryInvoker, o ...grpc.CallOption) error {
			called[method] = true
			return invoke(ctx, method, req, reply, c, o...)
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, d *grpc.StreamDesc, c *grpc.ClientConn, method string, open grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
			called[method] = true
			return open(ctx, d, c, method, o...)
		}),
	}
	client, err := s.enter(h, testfleet.Now(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	inside, err := grpc.NewClient("passthrough:///agent", append(noting, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return subsystem(client) }))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { inside.Close() })
	over := caller{halliganv1.NewAgentClient(inside), inside}
	ways := []way{
		{"the SSH subsystem", h.Person, over, nil},
		{"an SSH exec line", h.Person, over, func(line string) (int, string) { return words(t, client, line, "") }},
		{"a line in an SSH shell", h.Person, over, func(line string) (int, string) { return words(t, client, "", line+"\nexit\n") }},
	}
	if h.Roles[0] != trust.Approver { // which no client certificate can name
		secure := s.secure(s.fleet.Client(nil, h, testfleet.Now()), noting...)
		ways = append(ways, way{"mTLS", h.Person, caller{halliganv1.NewAgentClient(secure), secure}, nil})
	}
	return ways
}

// enter logs in by SSH; by is the user authority, by default the fleet's.
func (s *stage) enter(h issuer.Holder, v issuer.Validity, by *issuer.Key) (*ssh.Client, error) {
	s.t.Helper()
	key, cert := s.fleet.Person(h, v)
	if by != nil {
		var err error
		if cert, err = by.User(key.PublicKey(), h, cert.Serial, v); err != nil {
			s.t.Fatal(err)
		}
	}
	signer, err := ssh.NewCertSigner(cert, key)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.show(signer, h.Roles[0].String())
}

// show logs in with a key.
func (s *stage) show(signer ssh.Signer, user string) (*ssh.Client, error) {
	checker := &ssh.CertChecker{IsHostAuthority: func(k ssh.PublicKey, _ string) bool { return bytes.Equal(k.Marshal(), s.fleet.Host.Public().Marshal()) }}
	raw, err := net.DialTimeout("tcp", s.config.SSH.Listen[0], 20*time.Second)
	if err != nil {
		return nil, err
	}
	conn, channels, requests, err := ssh.NewClientConn(raw, testfleet.Server+":22", &ssh.ClientConfig{User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)},
		HostKeyCallback: checker.CheckHostKey, HostKeyAlgorithms: []string{ssh.CertAlgoED25519v01}, Timeout: 20 * time.Second})
	if err != nil {
		raw.Close()
		return nil, err
	}
	return ssh.NewClient(conn, channels, requests), nil
}

// subsystem opens the API inside an SSH connection.
func subsystem(client *ssh.Client) (net.Conn, error) {
	channel, requests, err := client.OpenChannel("session", nil)
	if err != nil {
		return nil, err
	}
	go ssh.DiscardRequests(requests) // until the channel is closed
	ok, err := channel.SendRequest("subsystem", true, ssh.Marshal(struct{ Name string }{grpcdoor.Subsystem}))
	if err != nil || !ok {
		return nil, errors.Join(errors.New("no subsystem"), err, channel.Close())
	}
	near, far := net.Pipe()
	go func() { _, _ = io.Copy(channel, far); channel.Close() }()
	go func() { _, _ = io.Copy(far, channel); far.Close() }()
	return near, nil
}

// words runs a line, or a shell that reads the input.
func words(t *testing.T, client *ssh.Client, line, input string) (exit int, text string) {
	t.Helper()
	session, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	var stderr bytes.Buffer
	session.Stdin, session.Stderr = strings.NewReader(input), &stderr
	if line != "" {
		err = session.Run(line)
	} else if err = session.Shell(); err == nil {
		err = session.Wait()
	}
	var status *ssh.ExitError
	if errors.As(err, &status) {
		exit = status.ExitStatus()
	} else if err != nil {
		t.Fatalf("%q: %v", line+input, err)
	}
	for said := range strings.Lines(stderr.String()) {
		if rest, ok := strings.CutPrefix(said, "halligan: "); ok {
			text = strings.TrimSuffix(rest, "\n")
		}
	}
	return exit, text
}

// secure comes to the gRPC door.
func (s *stage) secure(cert tls.Certificate, o ...grpc.DialOption) *grpc.ClientConn {
	s.t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(s.fleet.Servers.Certificate)
	config := &tls.Config{RootCAs: pool, ServerName: testfleet.Server}
	if len(cert.Certificate) > 0 {
		config.Certificates = []tls.Certificate{cert}
	}
	c, err := grpc.NewClient("passthrough:///"+s.config.GRPC.Listen[0], append(o, grpc.WithTransportCredentials(credentials.NewTLS(config)))...)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

// nobody tries whoever nobody vouches for here.
func (s *stage) nobody(t *testing.T) {
	stranger := testfleet.New(t)
	life := func(from, to time.Duration) issuer.Validity {
		now := time.Now().Truncate(time.Second)
		return issuer.Validity{NotBefore: now.Add(from), NotAfter: now.Add(to)}
	}
	abroad := as(trust.Commander, trust.Scope{})
	abroad.Clusters = []string{"staging"}
	mallory := testfleet.Holder("mallory", trust.Commander)
	if _, err := s.felix.ExchangeBundle(t.Context(), &halliganv1.ExchangeBundleRequest{Bundle: s.fleet.Revoke(func(r *bundle.Revocations) { r.KeyIDs = []string{"mallory"} })}); err != nil {
		t.Fatal(err)
	}
	refused := func(name string, client *ssh.Client, err error, cert tls.Certificate) {
		t.Helper()
		if err == nil {
			client.Close()
			t.Errorf("%s gets in by SSH", name)
		}
		st, err := halliganv1.NewAgentClient(s.secure(cert)).Status(t.Context(), &halliganv1.StatusRequest{})
		if f := api.FromStatus(err); err == nil || f.Code != fault.Unauthenticated && f.Code != fault.Unreachable {
			t.Errorf("%s by mTLS: %v, %v", name, st, err)
		}
	}
	for _, c := range []struct {
		name    string
		who     issuer.Holder
		life    issuer.Validity
		user    *issuer.Key
		clients *issuer.Authority
	}{
		{"a stranger", as(trust.Commander, trust.Scope{}), testfleet.Now(), stranger.User, stranger.Clients},
		{"one whom the wrong authority signed", as(trust.Commander, trust.Scope{}), testfleet.Now(), s.fleet.Host, stranger.Clients},
		{"somebody of another cluster", abroad, testfleet.Now(), nil, nil},
		{"somebody for another node", as(trust.Commander, trust.Scope{Nodes: []string{"cp-9"}}), testfleet.Now(), nil, nil},
		{"one who comes too late", as(trust.Commander, trust.Scope{}), life(-24*time.Hour, -3*time.Hour), nil, nil},
		{"one who comes too early", as(trust.Commander, trust.Scope{}), life(3*time.Hour, 24*time.Hour), nil, nil},
		{"somebody revoked", mallory, testfleet.Now(), nil, nil},
	} {
		client, err := s.enter(c.who, c.life, c.user)
		refused(c.name, client, err, s.fleet.Client(c.clients, c.who, c.life))
	}
	bare, _ := s.fleet.Person(as(trust.Commander, trust.Scope{}), testfleet.Now())
	client, err := s.show(bare, "commander")
	refused("who has no certificate", client, err, tls.Certificate{})
	key, cert := s.fleet.Person(as(trust.Observer, trust.Scope{}), testfleet.Now())
	signer, err := ssh.NewCertSigner(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	for _, user := range []string{"commander", "root", "", "alice", "none", "observer,commander"} {
		if client, err := s.show(signer, user); err == nil {
			client.Close()
			t.Errorf("an observer gets in as %q", user)
		}
	}
}

// TestDoorsThatDoNotExist asks a real agent with stock OpenSSH for what an SSH
// server usually has.
func TestDoorsThatDoNotExist(t *testing.T) {
	t.Parallel()
	for _, program := range []string{"ssh", "sftp", "scp", "ssh-agent"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	s := newStage(t)
	// What somebody would want to reach from the node: etcd, say.
	var reached atomic.Int32
	target, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { target.Close() })
	go func() {
		for {
			c, err := target.Accept()
			if err != nil {
				return
			}
			reached.Add(1)
			c.Close()
		}
	}()
	dir := t.TempDir()
	private, config := filepath.Join(dir, "id"), filepath.Join(dir, "config")
	host, port, err := net.SplitHostPort(s.config.SSH.Listen[0])
	if err != nil {
		t.Fatal(err)
	}
	_, raw, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := ssh.NewPublicKey(raw.Public())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := s.fleet.User.User(public, as(trust.Commander, trust.Scope{}), 1000, testfleet.Now())
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(raw, "")
	if err != nil {
		t.Fatal(err)
	}
	write(t, private, string(pem.EncodeToMemory(block)), 0o600)
	write(t, private+"-cert.pub", string(ssh.MarshalAuthorizedKey(cert)), 0o600)
	known := write(t, filepath.Join(dir, "known"), "@cert-authority "+testfleet.Server+" "+string(ssh.MarshalAuthorizedKey(s.fleet.Host.Public())), 0o600)
	write(t, config, fmt.Sprintf("Host cp-1\nHostName %s\nPort %s\nHostKeyAlias %s\nUser commander\nIdentityFile %s\nIdentitiesOnly yes\nBatchMode yes\nUserKnownHostsFile %s\nGlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\n",
		host, port, testfleet.Server, private, known), 0o600)
	stock := func(program string, args ...string) (int, string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, program, append([]string{"-F", config}, args...)...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "DISPLAY=127.0.0.1:77"}
		out, err := cmd.CombinedOutput()
		if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), string(out)
	}
	if status, out := stock("ssh", "cp-1", "whoami"); status != 0 || !strings.HasPrefix(out, "alice\n") {
		t.Fatalf("%d, %s", status, out)
	}
	secret, stolen := write(t, filepath.Join(dir, "secret"), "hunter2", 0o600), filepath.Join(dir, "stolen")
	for _, c := range []struct {
		program string
		args    []string
		status  int
		want    string
	}{
		{"ssh", []string{"cp-1", "sh"}, 2, `unknown verb "sh"`},
		{"ssh", []string{"cp-1", "/bin/sh -c id"}, 2, "unknown verb"},
		{"ssh", []string{"cp-1", "whoami; id"}, 2, "plain words"},
		{"ssh", []string{"cp-1", "status > " + stolen}, 2, "plain words"},
		{"ssh", []string{"-s", "cp-1", "sftp"}, 255, "subsystem request failed"},
		{"ssh", []string{"-s", "cp-1", "netconf"}, 255, "subsystem request failed"},
		{"sftp", []string{"cp-1:" + secret, stolen}, 255, ""},
		{"scp", []string{"cp-1:" + secret, stolen}, 255, ""},
		{"scp", []string{"-O", "cp-1:" + secret, stolen}, 2, `unknown verb "scp"`},
		{"scp", []string{"-O", secret, "cp-1:" + stolen}, 2, ""},
		{"ssh", []string{"-W", target.Addr().String(), "cp-1"}, 255, "administratively prohibited"},
		{"ssh", []string{"-R", "0:" + target.Addr().String(), "-oExitOnForwardFailure=yes", "cp-1", "whoami"}, 255, "remote port forwarding failed"},
		{"ssh", []string{"-R", "0", "-oExitOnForwardFailure=yes", "cp-1", "whoami"}, 255, "remote port forwarding failed"},
		{"ssh", []string{"-X", "-oXAuthLocation=/bin/false", "cp-1", "whoami"}, 0, "X11 forwarding request failed"},
		{"ssh", []string{"-oTunnel=yes", "-w", "7:7", "cp-1", "whoami"}, -1, ""},
	} {
		status, out := stock(c.program, c.args...)
		if c.status >= 0 && status != c.status && (c.status != 2 || c.program != "scp" || status == 0) || !strings.Contains(out, c.want) || strings.Contains(out, "hunter2") || strings.Contains(out, "uid=") {
			t.Errorf("%s %q: status %d, want %d, and %q of\n%s", c.program, c.args, status, c.status, c.want, out)
		}
		if _, err := os.Stat(stolen); err == nil {
			t.Fatalf("%s %q wrote a file", c.program, c.args)
		}
	}
	if n := reached.Load(); n > 0 {
		t.Errorf("%d connections were forwarded", n)
	}
}
