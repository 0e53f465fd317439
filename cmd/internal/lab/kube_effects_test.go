package lab

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// TestKubeEffects does what people do with halligan to a running cluster, and
// looks with kubectl at what the cluster makes of it. Each scene has a namespace
// of its own.
func TestKubeEffects(t *testing.T) {
	l := sharedKube(t)
	type act struct {
		name string
		run  func(scene)
	}
	// Those that mostly wait come first.
	acts := []act{
		{"cronjob is suspended", cronJobSuspended},
		{"undecodable value is deleted", undecodableDeleted},
		{"rights revoked, account deleted", rightsRevoked},
		{"autoscaler fights", autoscalerFights},
	}
	for _, w := range workloads {
		acts = append(acts, act{w.kind, w.stoppedAndDeleted})
	}
	acts = append(acts,
		act{"cronjob is deleted", cronJobDeleted},
		act{"pod is deleted", podDeleted},
		act{"webhook is opened and deleted", webhookOpenedAndDeleted},
		act{"node is cordoned", nodeCordoned},
		act{"rollout is paused", rolloutPaused},
		act{"custom resource is scaled", customScaled},
		act{"writes race", writesRace},
		act{"plan gets stale", planGetsStale},
		act{"watches see it", watchesSee},
		act{"many are deleted", manyDeleted},
	)
	queue := make(chan act)
	var g sync.WaitGroup
	for range 6 {
		g.Go(func() {
			for a := range queue {
				t.Run(a.name, func(t *testing.T) { a.run(newScene(t, l)) })
			}
		})
	}
	for _, a := range acts {
		queue <- a
	}
	close(queue)
	g.Wait()
	// What these stop, the others need.
	t.Run("controllers are dead", func(t *testing.T) { controllersDead(newScene(t, l)) })
	t.Run("API server is dead", func(t *testing.T) { apiServerDead(newScene(t, l)) })
	t.Run("encryption key is rotated", func(t *testing.T) { keyRotated(newScene(t, l)) })
}

// scene is a namespace, with people who act in it and look at it.
type scene struct {
	*testing.T
	l  *Lab
	k  *Kube
	ns string
}

// sceneSettles bounds every wait: everything here takes a few seconds on a
// machine that does nothing else.
const sceneSettles = 40 * time.Second

func newScene(t *testing.T, l *Lab) scene {
	name := t.Name()[strings.LastIndexByte(t.Name(), '/')+1:]
	s := scene{t, l, l.Kube(), "scene-" + strings.NewReplacer("_", "-", ",", "").Replace(strings.ToLower(name))}
	s.kubectl("create", "namespace", s.ns)
	return s
}

// kubectl runs it as the administrator in the scene's namespace.
func (s scene) kubectl(args ...string) string {
	s.Helper()
	out, err := s.try(args...)
	if err != nil {
		s.Fatal(err)
	}
	return out
}

func (s scene) try(args ...string) (string, error) {
	return s.k.kubectl(s.Context(), s.k.AdminKubeconfig(), "", append([]string{"-n", s.ns}, args...)...)
}

func (s scene) apply(manifest string) {
	s.Helper()
	if _, err := s.k.kubectl(s.Context(), s.k.AdminKubeconfig(), manifest, "-n", s.ns, "apply", "-f", "-"); err != nil {
		s.Fatal(err)
	}
}

// halligan runs the real command at cp-1, which must exit with the status, and
// returns what it printed.
func (s scene) halligan(status int, args ...string) string {
	s.Helper()
	out, got := s.run(args...)
	if got != status {
		s.Fatalf("halligan %s: exit status %d, want %d: %s", strings.Join(args, " "), got, status, out)
	}
	return out
}

func (s scene) command(args ...string) *exec.Cmd {
	argv := append(as("halligan"), args...)
	cmd := exec.CommandContext(s.Context(), argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "HALLIGAN_SOCKET="+s.l.Socket(0), "HALLIGAN_REASON=test")
	return cmd
}

func (s scene) run(args ...string) (string, int) {
	s.Helper()
	cmd := s.command(args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		s.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// insist runs a mutation as a person would: again when the plan was stale, since
// controllers write the status of what they work on all the time.
func (s scene) insist(args ...string) string {
	s.Helper()
	for try := 1; ; try++ {
		out, status := s.run(append(args, "--yes")...)
		if status == 3 && try < 20 {
			continue
		}
		if status != 0 {
			s.Fatalf("halligan %s: exit status %d in try %d: %s", strings.Join(args, " "), status, try, out)
		}
		return out
	}
}

// act does it in the scene's namespace and returns the action's ID.
func (s scene) act(args ...string) string {
	s.Helper()
	return s.idIn(s.insist(append(args, "-n", s.ns)...))
}

func (s scene) idIn(out string) string {
	s.Helper()
	m := undoWith.FindStringSubmatch(out)
	if m == nil {
		s.Fatalf("no action in: %s", out)
	}
	return m[1]
}

func (s scene) undo(action string) {
	s.Helper()
	s.insist("undo", action)
}

// until waits for what kubectl shows, and returns how long that took.
func (s scene) until(what string, holds func() bool) time.Duration {
	s.Helper()
	began := time.Now()
	for !holds() {
		if time.Since(began) > sceneSettles {
			s.Fatalf("not seen: %s; there is: %s", what, s.kubectl("get", "all", "-o", "wide"))
		}
		time.Sleep(50 * time.Millisecond)
	}
	return time.Since(began).Round(10 * time.Millisecond)
}

// pods returns the UIDs of all pods, and whether each runs and is to go on.
func (s scene) pods() (running map[types.UID]bool) {
	s.Helper()
	var list corev1.PodList
	if err := json.Unmarshal([]byte(s.kubectl("get", "pods", "-o", "json")), &list); err != nil {
		s.Fatal(err)
	}
	running = map[types.UID]bool{}
	for _, p := range list.Items {
		running[p.UID] = p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil
	}
	return running
}

// untilPods waits for so many pods, all of which run.
func (s scene) untilPods(n int) time.Duration {
	s.Helper()
	return s.until(fmt.Sprintf("%d pods that run", n), func() bool {
		pods := s.pods()
		for _, runs := range pods {
			if !runs {
				return false
			}
		}
		return len(pods) == n
	})
}

func (s scene) field(object, path string) string {
	s.Helper()
	return s.kubectl("get", object, "-o", "jsonpath={"+path+"}")
}

// workload is a kind that has pods.
type workload struct {
	kind, version, spec string
	pods                int
	// stopped is the field that says that it was scaled to 0.
	stopped, value string
}

// podTemplate is one whose pods do not complete, not even those of a Job.
const podTemplate = `{metadata: {labels: {app: it}, annotations: {pod-complete.stage.kwok.x-k8s.io/delay: 720h}},
    spec: {%s containers: [{name: main, image: registry.example.com/it}]}}`

var (
	anyTemplate = fmt.Sprintf(podTemplate, "")
	jobTemplate = fmt.Sprintf(podTemplate, "restartPolicy: Never,")
	selected    = `, selector: {matchLabels: {app: it}}, template: ` + anyTemplate
)

var workloads = []workload{
	{"Deployment", "apps/v1", `replicas: 2` + selected, 2, ".spec.replicas", "0"},
	{"StatefulSet", "apps/v1", `replicas: 2, serviceName: it` + selected, 2, ".spec.replicas", "0"},
	{"ReplicaSet", "apps/v1", `replicas: 2` + selected, 2, ".spec.replicas", "0"},
	{"ReplicationController", "v1", `replicas: 2, selector: {app: it}, template: ` + anyTemplate, 2, ".spec.replicas", "0"},
	{"DaemonSet", "apps/v1", `minReadySeconds: 0` + selected, 3, `.spec.template.spec.nodeSelector.halligan\.io/stopped`, "true"},
	{"Job", "batch/v1", `parallelism: 2, completions: 2, template: ` + jobTemplate, 2, ".spec.suspend", "true"},
}

func (w workload) stoppedAndDeleted(s scene) {
	it := strings.ToLower(w.kind) + "/it"
	s.apply(fmt.Sprintf("{apiVersion: %s, kind: %s, metadata: {name: it}, spec: {%s}}", w.version, w.kind, w.spec))
	s.untilPods(w.pods)

	scaled := s.act("scale", it, "--to", "0")
	gone := s.untilPods(0)
	if got := s.field(it, w.stopped); got != w.value {
		s.Errorf("%s is %q", w.stopped, got)
	}
	s.undo(scaled)
	s.Logf("pods gone %s after scale --to 0, back %s after undo", gone, s.untilPods(w.pods))
	// The controller has seen the last change.
	s.until("the controller's status", func() bool {
		return s.field(it, ".metadata.generation") == s.field(it, ".status.observedGeneration") || w.kind == "Job"
	})

	before := s.pods()
	deleted := s.act("delete", it)
	gone = s.untilPods(0)
	if left := s.kubectl("get", "all", "-o", "name"); left != "" {
		s.Errorf("the garbage collector left %s", left)
	}
	s.undo(deleted)
	s.Logf("pods collected %s after the owner's deletion, other ones there %s after undo", gone, s.untilPods(w.pods))
	for uid := range s.pods() {
		if _, ok := before[uid]; ok {
			s.Errorf("pod %s came back", uid)
		}
	}
}

const cronJob = `{apiVersion: batch/v1, kind: CronJob, metadata: {name: it}, spec: {schedule: "%s", jobTemplate: {spec: {template: %s}}}}`

// cronJobSuspended has the CronJob believe that a run is overdue: it is made up
// for as soon as the suspension is taken back, and not before.
func cronJobSuspended(s scene) {
	s.apply(fmt.Sprintf(cronJob, "0 0 1 1 *", jobTemplate))
	suspended := s.act("scale", "cronjob/it", "--to", "0")
	if got := s.field("cronjob/it", ".spec.suspend"); got != "true" {
		s.Errorf("suspend is %q", got)
	}
	longAgo := time.Now().AddDate(-1, -1, 0).UTC().Format(time.RFC3339)
	s.kubectl("patch", "cronjob", "it", "--subresource=status", "--type=merge", "-p", `{"status":{"lastScheduleTime":"`+longAgo+`"}}`)
	time.Sleep(2 * time.Second)
	if jobs := s.kubectl("get", "jobs", "-o", "name"); jobs != "" {
		s.Errorf("it ran: %s", jobs)
	}
	s.undo(suspended)
	s.Logf("made up for %s after undo", s.until("a Job", func() bool { return s.kubectl("get", "jobs", "-o", "name") != "" }))
}

func cronJobDeleted(s scene) {
	s.apply(fmt.Sprintf(cronJob, "0 0 1 1 *", jobTemplate))
	s.kubectl("create", "job", "once", "--from=cronjob/it")
	s.untilPods(1)
	deleted := s.act("delete", "cronjob/it")
	gone := s.untilPods(0)
	if left := s.kubectl("get", "all", "-o", "name"); left != "" {
		s.Errorf("the garbage collector left %s", left)
	}
	s.Logf("Job and pod collected %s after the owner's deletion", gone)
	s.undo(deleted)
	// What was collected does not come back with its owner.
	if got := s.kubectl("get", "all", "-o", "name"); strings.TrimSpace(got) != "cronjob.batch/it" {
		s.Errorf("after undo: %s", got)
	}
}

func podDeleted(s scene) {
	s.apply("{apiVersion: apps/v1, kind: ReplicaSet, metadata: {name: it}, spec: {replicas: 1" + selected + "}}")
	s.untilPods(1)
	before := s.pods()
	s.act("delete", strings.TrimSpace(s.kubectl("get", "pods", "-o", "name")))
	took := s.until("another pod", func() bool {
		now := s.pods()
		for uid, runs := range now {
			if _, old := before[uid]; old || !runs {
				return false
			}
		}
		return len(now) == 1
	})
	s.Logf("its ReplicaSet had made another after %s", took)
}

// ask asks for the ConfigMaps of the scene with a token. The caller closes the
// body.
func (s scene) ask(token, query string) *http.Response {
	s.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", s.k.AdminKubeconfig())
	if err != nil {
		s.Fatal(err)
	}
	config = rest.AnonymousClientConfig(config)
	config.BearerToken = token
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		s.Fatal(err)
	}
	r, err := client.Get(config.Host + "/api/v1/namespaces/" + s.ns + "/configmaps" + query)
	if err != nil {
		s.Fatal(err)
	}
	return r
}

func (s scene) status(token string) int {
	s.Helper()
	r := s.ask(token, "")
	r.Body.Close()
	return r.StatusCode
}

func rightsRevoked(s scene) {
	s.kubectl("create", "serviceaccount", "collector")
	s.kubectl("create", "clusterrolebinding", s.ns, "--clusterrole=view", "--serviceaccount="+s.ns+":collector")
	token := strings.TrimSpace(s.kubectl("create", "token", "collector"))
	answers := func(want int) time.Duration {
		s.Helper()
		return s.until(http.StatusText(want), func() bool { return s.status(token) == want })
	}
	answers(http.StatusOK)
	account := "system:serviceaccount:" + s.ns + ":collector"
	revoked := s.idIn(s.insist("revoke", account))
	forbidden := answers(http.StatusForbidden)
	s.undo(revoked)
	s.Logf("403 after %s, 200 again %s after undo", forbidden, answers(http.StatusOK))

	watch := s.ask(token, "?watch=1&timeoutSeconds=60")
	defer watch.Body.Close()
	revoked = s.idIn(s.insist("revoke", account, "--hard"))
	forbidden = answers(http.StatusForbidden)
	out, err := s.try("get", "serviceaccount", "collector")
	if err == nil {
		s.Errorf("it is there: %s", out)
	}
	unauthorized := answers(http.StatusUnauthorized)
	// Who has a watch open keeps it: rights are asked for once.
	s.kubectl("create", "configmap", "after")
	events := bufio.NewReader(watch.Body)
	for line := ""; !strings.Contains(line, `"name":"after"`); {
		if line, err = events.ReadString('\n'); err != nil {
			s.Fatalf("the open watch ended: %v", err)
		}
	}
	s.undo(revoked)
	s.Logf("--hard: 403 after %s, 401 after another %s, the old token good again %s after undo", forbidden, unauthorized, answers(http.StatusOK))
}

// autoscalerFights has no source of metrics: what an autoscaler does about its
// bounds needs none.
func autoscalerFights(s scene) {
	s.apply("{apiVersion: apps/v1, kind: Deployment, metadata: {name: it}, spec: {replicas: 2" + selected + "}}")
	s.kubectl("autoscale", "deployment", "it", "--min=2", "--max=4", "--cpu=50%")
	s.untilPods(2)
	out := s.insist("scale", "deployment/it", "-n", s.ns, "--to", "1")
	if !strings.Contains(out, "HorizontalPodAutoscaler") && !strings.Contains(out, "horizontalpodautoscaler") {
		s.Errorf("the plan does not name the autoscaler: %s", out)
	}
	s.Logf("the autoscaler put 2 replicas back after %s", s.until("2 replicas", func() bool { return s.field("deployment/it", ".spec.replicas") == "2" }))
	s.act("scale", "deployment/it", "--to", "0")
	s.untilPods(0)
	took := s.until("ScalingDisabled", func() bool {
		return s.field("hpa/it", `.status.conditions[?(@.type=="ScalingActive")].reason`) == "ScalingDisabled"
	})
	if got := s.field("deployment/it", ".spec.replicas"); got != "0" {
		s.Errorf("0 replicas did not stick: %s", got)
	}
	s.Logf("0 replicas stuck: ScalingDisabled after %s", took)
}

// nodeCordoned has a pod that can only run on one node.
func nodeCordoned(s scene) {
	cordoned := s.idIn(s.insist("cordon", "worker-002"))
	s.apply(`{apiVersion: v1, kind: Pod, metadata: {name: it}, spec: {nodeSelector: {kubernetes.io/hostname: worker-002}, containers: [{name: main, image: registry.example.com/it}]}}`)
	s.until("the scheduler leaves it", func() bool {
		return s.field("pod/it", ".status.conditions[?(@.type=='PodScheduled')].reason") == "Unschedulable"
	})
	s.undo(cordoned)
	s.Logf("the pod ran %s after undo", s.untilPods(1))
}

func rolloutPaused(s scene) {
	s.apply("{apiVersion: apps/v1, kind: Deployment, metadata: {name: it}, spec: {replicas: 2" + selected + "}}")
	s.untilPods(2)
	paused := s.act("pause", "deploy/it")
	s.kubectl("patch", "deployment", "it", "-p", `{"spec":{"template":{"metadata":{"annotations":{"release":"2"}}}}}`)
	s.until("the controller has seen the new template", func() bool {
		return s.field("deploy/it", ".metadata.generation") == s.field("deploy/it", ".status.observedGeneration") && s.field("deploy/it", ".spec.paused") == "true"
	})
	sets := func() int { return len(strings.Fields(s.kubectl("get", "replicasets", "-o", "name"))) }
	if n := sets(); n != 1 {
		s.Errorf("it went on: %d ReplicaSets", n)
	}
	s.undo(paused)
	s.Logf("the rollout went on %s after undo", s.until("a new ReplicaSet", func() bool { return sets() == 2 }))
}

func webhookOpenedAndDeleted(s scene) {
	s.apply(fmt.Sprintf(`{apiVersion: admissionregistration.k8s.io/v1, kind: ValidatingWebhookConfiguration, metadata: {name: %[1]s}, webhooks: [
  {name: dead.example.com, failurePolicy: Fail, sideEffects: None, admissionReviewVersions: [v1], timeoutSeconds: 1,
   clientConfig: {url: "https://%[2]s:1/"}, namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[1]s}},
   rules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]}]}`, s.ns, s.k.ip()))
	blocked := func() bool {
		_, err := s.try("create", "configmap", "it", "--dry-run=server")
		if err != nil && !strings.Contains(err.Error(), "dead.example.com") {
			s.Fatal(err)
		}
		return err != nil
	}
	s.until("the webhook refuses", blocked)
	for _, verb := range []string{"open", "delete"} {
		done := s.idIn(s.insist("webhook", verb, s.ns))
		opened := s.until("a create succeeds", func() bool { return !blocked() })
		s.undo(done)
		s.Logf("creates succeeded %s after webhook %s, failed again %s after undo", opened, verb, s.until("the webhook refuses again", blocked))
	}
	s.kubectl("delete", "validatingwebhookconfiguration", s.ns)
}

func customScaled(s scene) {
	s.apply(`{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: fleets.lab.example.com}, spec: {
  group: lab.example.com, scope: Namespaced, names: {plural: fleets, singular: fleet, kind: Fleet}, versions: [{name: v1, served: true, storage: true,
  subresources: {scale: {specReplicasPath: .spec.size, statusReplicasPath: .status.size}},
  schema: {openAPIV3Schema: {type: object, properties: {spec: {type: object, properties: {size: {type: integer}, note: {type: string}}},
  status: {type: object, properties: {size: {type: integer}}}}}}}]}}`)
	s.kubectl("wait", "--for=condition=Established", "crd/fleets.lab.example.com")
	s.until("the new kind", func() bool {
		_, err := s.k.kubectl(s.Context(), s.k.AdminKubeconfig(), "{apiVersion: lab.example.com/v1, kind: Fleet, metadata: {name: it}, spec: {size: 5, note: kept}}",
			"-n", s.ns, "apply", "-f", "-")
		return err == nil
	})
	scaled := s.act("scale", "fleet/it", "--to", "0")
	s.until("size 0", func() bool { return s.field("fleet/it", ".spec") == `{"note":"kept","size":0}` })
	s.undo(scaled)
	s.until("size 5", func() bool { return s.field("fleet/it", ".spec") == `{"note":"kept","size":5}` })
	// The API server's own way still works on what was written.
	s.kubectl("scale", "fleet/it", "--replicas=3")
	if got := s.field("fleet/it", ".spec.size"); got != "3" {
		s.Errorf("size %s", got)
	}
}

// undecodableDeleted has an object that nobody can read stop a whole resource,
// one that nothing else here uses.
func undecodableDeleted(s scene) {
	cli, err := s.l.Cluster().Client()
	if err != nil {
		s.Fatal(err)
	}
	defer cli.Close()
	s.apply("{apiVersion: v1, kind: PodTemplate, metadata: {name: good}, template: " + anyTemplate + "}")
	s.kubectl("get", "podtemplates")
	if _, err := cli.Put(s.Context(), "/registry/podtemplates/"+s.ns+"/bad", "k8s\x00garbage"); err != nil {
		s.Fatal(err)
	}
	var refused error
	failed := s.until("LIST fails", func() bool {
		_, refused = s.try("get", "podtemplates")
		return refused != nil
	})
	if out := s.kubectl("get", "--raw", "/readyz"); out != "ok" {
		s.Errorf("readyz: %s", out)
	}
	s.insist("delete", "podtemplate/bad", "-n", s.ns)
	healed := s.until("LIST works", func() bool {
		out, err := s.try("get", "podtemplates", "-o", "name")
		return err == nil && strings.TrimSpace(out) == "podtemplate/good"
	})
	s.Logf("LIST failed after %s (%v), and worked %s after the deletion", failed, refused, healed)
}

// writesRace has both sides write one object without pause.
func writesRace(s scene) {
	s.apply("{apiVersion: apps/v1, kind: Deployment, metadata: {name: it}, spec: {replicas: 1, paused: true" + selected + "}}")
	deployments := s.k.client.AppsV1().Deployments(s.ns)
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	var g sync.WaitGroup
	// Each writer notes what it was told succeeded.
	noted := make([][]string, 3)
	for i := range noted {
		g.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				name := fmt.Sprintf("race-%d-%d", i, n)
				patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:"x"}}}`, name)
				var err error
				if i == 0 {
					_, err = s.try("patch", "deployment", "it", "--type=merge", "-p", patch)
				} else {
					_, err = deployments.Patch(context.WithoutCancel(ctx), "it", types.MergePatchType, []byte(patch), metav1.PatchOptions{})
				}
				if err == nil {
					noted[i] = append(noted[i], name)
				}
				// Ever slower: on a busy machine, too, some scales get between.
				time.Sleep(time.Duration(n) * time.Millisecond)
			}
		})
	}
	applied, stale, last := 0, 0, ""
	for n, began := 0, time.Now(); (n < 30 || applied < 3) && time.Since(began) < sceneSettles; n++ {
		to := strconv.Itoa(2 + n%5)
		switch out, status := s.run("scale", "deployment/it", "-n", s.ns, "--to", to, "--yes"); status {
		case 0:
			applied, last = applied+1, to
		case 3:
			stale++
		default:
			s.Errorf("exit status %d: %s", status, out)
		}
	}
	cancel()
	g.Wait()
	var d appsv1.Deployment
	if err := json.Unmarshal([]byte(s.kubectl("get", "deployment", "it", "-o", "json")), &d); err != nil {
		s.Fatal(err)
	}
	patched := 0
	for _, names := range noted {
		for _, name := range names {
			if patched++; d.Annotations[name] == "" {
				s.Errorf("%s is lost", name)
			}
		}
	}
	if got := strconv.Itoa(int(*d.Spec.Replicas)); got != last {
		s.Errorf("%s replicas, the last that halligan wrote is %s", got, last)
	}
	if applied == 0 || len(noted[0]) == 0 {
		s.Errorf("%d scales, %d patches with kubectl: no race", applied, len(noted[0]))
	}
	s.Logf("%d patches through the API server, %d scales applied and %d stale: nothing is lost", patched, applied, stale)
}

// planGetsStale has somebody else change the object while a person looks at the
// plan.
func planGetsStale(s scene) {
	s.apply("{apiVersion: apps/v1, kind: Deployment, metadata: {name: it}, spec: {replicas: 2" + selected + "}}")
	s.untilPods(2)
	person, terminal := openTerminal(s.T)
	cmd := s.command("scale", "deployment/it", "-n", s.ns, "--to", "0")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	terminal.Close()
	var said bytes.Buffer
	b := make([]byte, 4096)
	for !strings.Contains(said.String(), "[y/N]") {
		n, err := person.Read(b)
		if err != nil {
			s.Fatalf("%v: %s", err, said.String())
		}
		said.Write(b[:n])
	}
	s.kubectl("scale", "deployment/it", "--replicas=1")
	if _, err := person.WriteString("y\n"); err != nil {
		s.Fatal(err)
	}
	io.Copy(&said, person) // ends with an error when the command closes its side
	cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != 3 {
		s.Errorf("exit status %d: %s", got, said.String())
	}
	if got := s.field("deployment/it", ".spec.replicas"); got != "1" {
		s.Errorf("%s replicas", got)
	}
	// The other way round: what kubectl looked at is not what is there any more.
	s.untilPods(1)
	seen := s.kubectl("get", "deployment", "it", "-o", "json")
	s.act("scale", "deployment/it", "--to", "0")
	if _, err := s.k.kubectl(s.Context(), s.k.AdminKubeconfig(), seen, "replace", "-f", "-"); err == nil || !strings.Contains(err.Error(), "Conflict") {
		s.Errorf("kubectl replace: %v", err)
	}
}

// openTerminal returns the two sides of a new terminal (pty(7)).
func openTerminal(t *testing.T) (person, terminal *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	return person, terminal
}

// watch is an open kubectl get --watch of the ordinary user.
type watch struct {
	scene
	out  io.Reader
	said strings.Builder
}

// watching opens one that prints a template for each event.
func (s scene) watching(template string, what ...string) *watch {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), sceneSettles)
	argv := append(append(s.k.Kubectl(), "--kubeconfig", s.k.UserKubeconfig(), "-n", s.ns, "get", "--watch", "--output-watch-events", "-o", "jsonpath="+template), what...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { cancel(); cmd.Wait() })
	return &watch{scene: s, out: out}
}

// sees reads on until the text was printed so many times.
func (w *watch) sees(text string, times int) {
	w.Helper()
	b := make([]byte, 4096)
	for strings.Count(w.said.String(), text) < times {
		n, err := w.out.Read(b)
		w.said.Write(b[:n])
		if err != nil {
			w.Fatalf("%v: %s is there %d times in %s", err, text, strings.Count(w.said.String(), text), w.said.String())
		}
	}
}

// watchesSee has a watch open over writes of both sides.
func watchesSee(s scene) {
	s.apply("{apiVersion: apps/v1, kind: ReplicaSet, metadata: {name: it}, spec: {replicas: 0" + selected + "}}")
	w := s.watching(`{.type}/{.object.metadata.annotations.n}/{.object.metadata.labels.n}/{.object.spec.replicas}{" "}`, "rs", "it")
	w.sees("ADDED///0 ", 1)
	s.act("scale", "rs/it", "--to", "1")
	w.sees("MODIFIED///1 ", 1)
	s.kubectl("annotate", "rs", "it", "n=1")
	w.sees("MODIFIED/1//1 ", 1)
	s.act("scale", "rs/it", "--to", "2")
	w.sees("MODIFIED/1//2 ", 1)
	deleted := s.act("delete", "rs/it")
	w.sees("DELETED/1//2 ", 1)
	s.undo(deleted)
	s.kubectl("label", "rs", "it", "n=2")
	w.sees("/1/2/2 ", 1)
}

// manyDeleted has a watch count: no deletion is lost, each has a revision of its
// own, and undo brings everything back.
func manyDeleted(s scene) {
	const many = 60
	var manifest strings.Builder
	for i := range many {
		fmt.Fprintf(&manifest, "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: it-%d, labels: {app: runaway}}}\n", i)
	}
	s.apply(manifest.String())
	w := s.watching(`{.type}/{.object.metadata.resourceVersion}{" "}`, "configmaps", "-l", "app=runaway")
	w.sees("ADDED/", many)
	deleted := s.act("delete", "configmaps", "-l", "app=runaway")
	w.sees("DELETED/", many)
	revisions := map[string]bool{}
	for _, event := range strings.Fields(w.said.String()) {
		if revision, ok := strings.CutPrefix(event, "DELETED/"); ok {
			revisions[revision] = true
		}
	}
	if len(revisions) != many {
		s.Errorf("%d deletions have %d revisions", many, len(revisions))
	}
	s.undo(deleted)
	w.sees("ADDED/", 2*many)
}

func controllersDead(s scene) {
	s.apply("{apiVersion: apps/v1, kind: Deployment, metadata: {name: it}, spec: {replicas: 2" + selected + "}}")
	s.untilPods(2)
	if err := s.k.StopControllerManager(); err != nil {
		s.Fatal(err)
	}
	var out string
	s.until("the plan warns", func() bool {
		out = s.halligan(0, "scale", "deployment/it", "-n", s.ns, "--to", "0", "--dry-run")
		return strings.Contains(out, "has not renewed its lease")
	})
	s.act("scale", "deployment/it", "--to", "0")
	if pods := s.pods(); len(pods) != 2 {
		s.Errorf("%d pods without controllers", len(pods))
	}
	if got := s.field("deployment/it", ".spec.replicas"); got != "0" {
		s.Errorf("%s replicas", got)
	}
	began := time.Now()
	if err := s.k.StartControllerManager(s.Context()); err != nil {
		s.Fatal(err)
	}
	leads := since(began)
	s.Logf("controllers led after %s, pods were gone %s later", leads, s.untilPods(0))
}

// apiServerDead writes while the API server is down, and looks into its watch
// cache when it is back.
func apiServerDead(s scene) {
	s.apply("{apiVersion: apps/v1, kind: Deployment, metadata: {name: it}, spec: {replicas: 2" + selected + "}}")
	s.kubectl("create", "configmap", "runaway")
	s.untilPods(2)
	if err := s.k.StopAPIServer(0); err != nil {
		s.Fatal(err)
	}
	if _, err := s.try("get", "pods", "--request-timeout=2s"); err == nil {
		s.Error("the API server answers")
	}
	scaled := s.act("scale", "deployment/it", "--to", "0")
	s.insist("delete", "configmap/runaway", "-n", s.ns)
	if err := s.k.StartAPIServer(s.Context(), 0); err != nil {
		s.Fatal(err)
	}
	began := time.Now()
	var list appsv1.DeploymentList
	if err := json.Unmarshal([]byte(s.kubectl("get", "--raw", "/apis/apps/v1/namespaces/"+s.ns+"/deployments?resourceVersion=0")), &list); err != nil {
		s.Fatal(err)
	}
	if len(list.Items) != 1 || *list.Items[0].Spec.Replicas != 0 {
		s.Errorf("the watch cache has %+v", list.Items)
	}
	if cached := s.kubectl("get", "--raw", "/api/v1/namespaces/"+s.ns+"/configmaps?resourceVersion=0"); strings.Contains(cached, "runaway") {
		s.Errorf("the watch cache has %s", cached)
	}
	s.untilPods(0)
	gone := since(began)
	s.undo(scaled)
	s.untilPods(2)
	s.Logf("pods gone %s after the API server was back", gone)
	s.kubectl("annotate", "deployment", "it", "after=1")
}

// keyRotated encrypts more than before and with a new key, as operators do: the
// API server and the agents are restarted, and objects are written again.
func keyRotated(s scene) {
	cli, err := s.l.Cluster().Client()
	if err != nil {
		s.Fatal(err)
	}
	defer cli.Close()
	stored := func(key string) string {
		s.Helper()
		r, err := cli.Get(s.Context(), "/registry/"+key)
		if err != nil || len(r.Kvs) != 1 {
			s.Fatalf("%s: %v, %v", key, r, err)
		}
		return string(r.Kvs[0].Value)
	}
	secret, deployment := "secrets/"+s.ns+"/it", "deployments/"+s.ns+"/it"
	s.kubectl("create", "secret", "generic", "it", "--from-literal=a=b")
	s.apply("{apiVersion: apps/v1, kind: Deployment, metadata: {name: it}, spec: {replicas: 2" + selected + "}}")
	s.untilPods(2)
	if !strings.HasPrefix(stored(secret), "k8s:enc:secretbox:v1:lab:") {
		s.Error("the Secret is not encrypted")
	}
	if out := s.halligan(0, "get", "secret/it", "-n", s.ns, "-o", "yaml"); !strings.Contains(out, "name: it") {
		s.Errorf("the agent reads %s", out)
	}

	old, err := os.ReadFile(s.l.encryption)
	if err != nil {
		s.Fatal(err)
	}
	key := make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		s.Fatal(err)
	}
	rotated := strings.NewReplacer("[secrets]", "[secrets, deployments.apps]",
		"      keys:\n", "      keys:\n      - {name: rotated, secret: "+base64.StdEncoding.EncodeToString(key)+"}\n").Replace(string(old))
	if err := os.WriteFile(s.l.encryption, []byte(rotated), 0o600); err != nil {
		s.Fatal(err)
	}
	restart := func() {
		s.Helper()
		if err := s.k.StopAPIServer(0); err != nil {
			s.Fatal(err)
		}
		if err := s.k.StartAPIServer(s.Context(), 0); err != nil {
			s.Fatal(err)
		}
	}
	restart()
	s.kubectl("annotate", "secret", "it", "written=again")
	s.kubectl("annotate", "deployment", "it", "written=again")
	for _, name := range []string{secret, deployment} {
		if !strings.HasPrefix(stored(name), "k8s:enc:secretbox:v1:rotated:") {
			s.Errorf("%s: %.40q", name, stored(name))
		}
	}
	// The agent has seen by itself that the file is another one.
	scaled := s.act("scale", "deployment/it", "--to", "0")
	if !strings.HasPrefix(stored(deployment), "k8s:enc:secretbox:v1:rotated:") {
		s.Errorf("halligan wrote %.40q", stored(deployment))
	}
	s.untilPods(0)
	s.undo(scaled)
	s.untilPods(2)
	s.insist("delete", "secret/it", "-n", s.ns)
	s.until("the Secret is gone", func() bool { _, err := s.try("get", "secret", "it"); return err != nil })
}
