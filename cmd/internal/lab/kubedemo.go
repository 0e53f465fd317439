package lab

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/halligan-io/halligan/internal/fault"
)

// KubeDemoOptions says which outage is told.
type KubeDemoOptions struct {
	Options
	// Shape is a or b, as in StormOptions; default b.
	Shape string

	pace pace // zero: unhurried
}

// pace is how long the parts of a demo are watched, and what each kubectl is
// given with --request-timeout.
type pace struct{ calm, storm, rung, kubectl time.Duration }

// unhurried gives a rung the 10 s for which the ladder asks.
var unhurried = pace{calm: 5 * time.Second, storm: 8 * time.Second, rung: 10 * time.Second, kubectl: 10 * time.Second}

// Figures of the demo.
const (
	// kubectlTries is how often the victim tries at most until one times out.
	kubectlTries = 4
	// reliefSpan is how long the victim must be served well without a break.
	reliefSpan = 3 * time.Second
	// reliefFloor is the p99 that counts as calm on a machine whose calm is
	// faster still: its own noise is of that size.
	reliefFloor = 100 * time.Millisecond
	// A rung of the ladder is given rungMost until the load is answered as the rung
	// promises, and is watched from then on. The API server remembers for 10 s that a
	// token was good (kubernetes, pkg/kubeapiserver/options/authentication.go:
	// TokenSuccessCacheTTL).
	rungMost      = 60 * time.Second
	demoProbeEach = 250 * time.Millisecond
	// demoQuota is far more than the demo writes, and no reason to refuse a small
	// disk.
	demoQuota = 512 << 20
	// phaseSpan is what a row of the measurements is about: the end of its part.
	phaseSpan = 5 * time.Second
)

// kubeDemo tells the outage with a real control plane.
type kubeDemo struct {
	demo
	pace   pace
	kube   *Kube
	storm  *Storm
	bar    time.Duration // what counts as calm
	calm   latency
	phases []phase
	loads  []loadAt // one each second that was told
	// firstCommand is when the rescue began; relieved, since when the victim was
	// served as in calm, and after which rung.
	firstCommand, relieved time.Time
	reliefBy               string
}

// phase is what was measured at the end of a part of the story.
type phase struct {
	name          string
	victim, admin latency
	load          counts
	span          time.Duration // that load is of
}

// rate is how many a second.
func (p phase) rate(n int64) int { return int(float64(n) / max(p.span.Seconds(), 0.1)) }

type loadAt struct {
	at   time.Time
	load counts
}

// shapes are how a lab is run for each shape of the outage, and the load that
// saturates it: found by experiment for an API server with one processor.
var shapes = map[string]struct {
	kube    KubeOptions
	clients int
	backoff float64       // share of the clients
	pace    time.Duration // of the others
	told    string
}{
	"a": {KubeOptions{Procs: 1}, 16, 1, 0, "flow control on; the victim is another ServiceAccount, a deploy job; the clients back off as client-go does"},
	"b": {KubeOptions{Procs: 1, NoFlowControl: true, MaxInFlight: 130}, 40, 0.25, 100 * time.Millisecond, "flow control off, 130 requests in flight at most; the victim is a person; most clients hammer on"},
}

// KubeDemo runs a lab with a real API server, makes the telemetry outage in it,
// measures that a person or a deploy job is locked out, climbs the rescue ladder
// with the real halligan command through etcd, measures what each rung brings,
// and takes everything back. kubectl is the eye. It returns an error if any step
// did not hold.
func KubeDemo(ctx context.Context, o KubeDemoOptions, out io.Writer) (err error) {
	if o.Shape == "" {
		o.Shape = "b"
	}
	shape, ok := shapes[o.Shape]
	if !ok {
		return fault.New(fault.Usage, "give --shape a or b", "there is no shape %q", o.Shape)
	}
	d := &kubeDemo{demo: demo{out: out, halligan: o.Halligan, report: o.Report}, pace: o.pace}
	if d.pace == (pace{}) {
		d.pace = unhurried
	}
	if len(d.halligan) == 0 {
		if d.halligan, err = beside("halligan"); err != nil {
			return err
		}
	}
	if o.Dir, err = os.MkdirTemp(o.Dir, "halligan-demo-"); err != nil {
		return err
	}
	defer os.RemoveAll(o.Dir)
	binaries := ""
	if o.Kube != nil {
		binaries = o.Kube.Binaries
	}
	kube := shape.kube
	kube.Binaries = binaries
	o.Kube, o.Objects, o.QuotaBytes = &kube, 0, cmp.Or(o.QuotaBytes, demoQuota)
	o.Progress = prefixed{out}
	began := time.Now()

	d.title("A real control plane comes up: kube-apiserver, controllers, scheduler, " + fmt.Sprint(o.Nodes) + " simulated nodes")
	d.say("shape %s: %s; the API server has one processor", o.Shape, shape.told)
	up := time.Now()
	if d.lab, err = Up(ctx, o.Options); err != nil {
		return interrupted(ctx, err)
	}
	defer d.lab.Close()
	d.kube = d.lab.Kube()
	d.rows = append(d.rows, score{"the cluster is up", time.Since(up), nil})
	cli, err := d.lab.cluster.Client()
	if err != nil {
		return err
	}
	defer cli.Close()
	d.eye = eye{cli}

	d.title("A telemetry service is rolled out to every node; it does nothing yet")
	so := DefaultStorm()
	so.Dir, so.Shape, so.ProbeEach, so.Out = o.Dir, o.Shape, demoProbeEach, o.Progress
	so.ClientsPerPod, so.BackoffShare, so.Pace = shape.clients, shape.backoff, shape.pace
	if d.storm, err = NewStorm(ctx, so); err != nil {
		return interrupted(ctx, err)
	}
	defer d.storm.Close()
	if err := d.story(ctx); err != nil {
		return interrupted(ctx, err)
	}
	d.measured()
	return d.total(time.Since(began))
}

// story is the demo step by step.
func (d *kubeDemo) story(ctx context.Context) error {
	before, err := d.offenderObjects(ctx)
	if err != nil {
		return err
	}
	victim := d.storm.VictimKubeconfig()
	d.title("Calm")
	d.step(ctx, "calm: kubectl answers", func(ctx context.Context) error {
		if _, _, err := d.kubectl(ctx, d.who(), victim, "get", "configmap", victimObject, "-n", victimNamespace); err != nil {
			return err
		}
		_, _, err := d.kubectl(ctx, "admin", d.kube.AdminKubeconfig(), "get", "daemonsets", "-n", offenderNamespace)
		return err
	})
	d.tell(ctx, d.pace.calm, func() bool { return false })
	d.calm = d.measure("calm").victim
	d.bar = max(2*d.calm.P99, reliefFloor)
	d.say("relief will mean: the victim's p99 is below %s again (twice calm, at least %s), for %s without a break", short(d.bar), short(reliefFloor), reliefSpan)

	d.title("The storm: every pod of " + offenderNamespace + "/" + offenderName + " LISTs whole resources, with its own token, from its own address")
	d.say("%s", d.storm.describe())
	if err := d.storm.Begin(ctx); err != nil {
		return err
	}
	running, _ := d.storm.pods.count()
	d.tell(ctx, d.pace.storm, func() bool { return false })
	d.title("The tools that everybody reaches for")
	d.step(ctx, "kubectl of the victim fails", func(ctx context.Context) error {
		for range kubectlTries {
			if _, _, err := d.kubectl(ctx, d.who(), victim, "get", "configmap", victimObject, "-n", victimNamespace); err != nil {
				return nil
			}
		}
		return errors.New("the victim's kubectl was answered each time")
	})
	if ctx.Err() == nil {
		if _, took, err := d.kubectl(ctx, "admin", d.kube.AdminKubeconfig(), "get", "daemonsets", "-n", offenderNamespace); err != nil {
			d.say("even the administrator, of system:masters, gets no answer (%s)", short(took))
		} else {
			d.say("the administrator, of system:masters, waits %s", short(took))
		}
	}

	storm := d.measure("storm")
	// What was asked before and is still open says more than what was asked just now.
	storm.victim, storm.admin = d.storm.victim.recent(time.Now().Add(-phaseSpan)), d.storm.ruler.recent(time.Now().Add(-phaseSpan))
	d.phases[len(d.phases)-1] = storm

	fmt.Fprintf(d.out, "\n$ export HALLIGAN_SOCKET=%s HALLIGAN_REASON='%s'\n", d.lab.Socket(0), demoReason)
	d.title("The offender, from etcd")
	d.step(ctx, "get the offender", func(ctx context.Context) error {
		_, err := d.run(ctx, offenderName, "get", "ds/"+offenderName, "-n", offenderNamespace)
		return err
	})
	d.step(ctx, "the API server's log, from its node's files", func(ctx context.Context) error {
		_, err := d.run(ctx, apiServerName(0)+".log", "logs", "apiserver", "--tail", "3")
		return err
	})

	var revoked, hard, scaled string
	d.title("Rung 1: its rights are taken away")
	d.firstCommand = time.Now()
	d.step(ctx, "revoke", func(ctx context.Context) (err error) {
		revoked, err = d.mutate(ctx, "revoke", offender, "--yes")
		return err
	})
	var soft, harder phase
	d.step(ctx, "revoke: its requests get 403", func(ctx context.Context) error {
		soft = d.rung(ctx, "revoke", func(c counts) bool { return c.Forbidden > 0 && c.Answered == 0 })
		return expect(soft.load.Forbidden > 0, "no request got 403")
	})
	if n := soft.rate(soft.load.Forbidden); n > 0 && n < running*d.storm.opts.ClientsPerPod { // less than one a second from each
		d.title("Rung 2, revoke --hard, is not needed")
		d.say("the clients back off: %d of them ask in a second, of %d", n, running*d.storm.opts.ClientsPerPod)
	} else {
		d.title(fmt.Sprintf("Rung 2: clients hammer on, %d requests a second get 403, and each passes flow control; so the ServiceAccount goes", n))
		d.step(ctx, "revoke --hard", func(ctx context.Context) (err error) {
			hard, err = d.mutate(ctx, "revoke", offender, "--hard", "--yes")
			return err
		})
		d.step(ctx, "revoke --hard: they get 401", func(ctx context.Context) error {
			harder = d.rung(ctx, "revoke --hard", func(c counts) bool { return c.Unauthorized > 0 && c.Forbidden == 0 })
			return expect(harder.load.Unauthorized > 0, "no request got 401")
		})
		d.say("the victim's p99: %s in the storm, %s with %d requests a second that get 403, %s with %d a second that get 401",
			short(storm.victim.P99), short(soft.victim.P99), n, short(harder.victim.P99), harder.rate(harder.load.Unauthorized))
		d.say("a 401 is not free: it costs a look-up in etcd and, on HTTP/2, the connection, so that each next request is a new TLS handshake")
	}
	d.title("Rung 3: it is stopped on every node")
	d.step(ctx, "scale to 0", func(ctx context.Context) (err error) {
		scaled, err = d.mutate(ctx, "scale", "ds/"+offenderName, "-n", offenderNamespace, "--to", "0", "--yes")
		return err
	})
	d.step(ctx, "scale to 0: its pods are gone", func(ctx context.Context) error {
		took, err := d.pods(ctx, 0)
		if err != nil {
			return err
		}
		d.say("the last of its pods was gone, and with it the last client, %s after the command", short(took))
		return nil
	})
	d.step(ctx, "relief", func(ctx context.Context) error {
		began := time.Now()
		took, l, err := d.storm.victim.calm(ctx, d.bar, reliefSpan, time.Minute)
		if err != nil {
			return err
		}
		if d.relieved.IsZero() {
			d.relieved, d.reliefBy = began.Add(took), "scale to 0"
		}
		d.measure("scale to 0")
		d.say("the victim: %s; in calm %s. Relief came with %s, %s after the first command", l, d.calm, d.reliefBy, short(d.relieved.Sub(d.firstCommand)))
		return nil
	})
	d.step(ctx, "kubectl of the victim answers again", func(ctx context.Context) error {
		_, _, err := d.kubectl(ctx, d.who(), victim, "get", "configmap", victimObject, "-n", victimNamespace)
		return err
	})

	d.title("A release that behaves is there: what was taken is given back, the rights last")
	d.storm.Retire()
	if hard != "" {
		d.step(ctx, "undo revoke --hard", func(ctx context.Context) error { return d.undo(ctx, hard) })
	}
	d.step(ctx, "undo scale", func(ctx context.Context) error {
		if err := d.undo(ctx, scaled); err != nil {
			return err
		}
		took, err := d.pods(ctx, running)
		if err == nil {
			d.say("its pods run on every node again after %s", short(took))
		}
		return err
	})
	d.step(ctx, "undo revoke", func(ctx context.Context) error { return d.undo(ctx, revoked) })

	d.title("The cluster is as before")
	d.step(ctx, "as before", func(ctx context.Context) error {
		if _, _, err := d.kubectl(ctx, "admin", d.kube.AdminKubeconfig(), "get", "daemonsets,pods", "-n", offenderNamespace); err != nil {
			return err
		}
		after, err := d.offenderObjects(ctx)
		if err != nil {
			return err
		}
		for name, was := range before {
			if after[name] != was {
				return fmt.Errorf("%s is not what it was:\n%s\n%s", name, was, after[name])
			}
		}
		d.say("seen with kubectl: its ServiceAccount, role, binding and DaemonSet have the same UIDs, labels, annotations and contents")
		return nil
	})
	d.step(ctx, "calm again", func(ctx context.Context) error {
		_, l, err := d.storm.victim.calm(ctx, d.bar, reliefSpan, time.Minute)
		if err == nil {
			d.say("the victim: %s", l)
		}
		d.measure("undone")
		return err
	})
	d.proven(ctx, d.report)
	return ctx.Err()
}

// who is the victim as a person reads it.
func (d *kubeDemo) who() string {
	if d.storm.opts.Shape == "a" {
		return victimAccount
	}
	return victimPerson
}

// kubectl runs the real one as a person would.
func (d *kubeDemo) kubectl(ctx context.Context, who, config string, args ...string) (string, time.Duration, error) {
	argv := append(append(d.kube.Kubectl(), "--kubeconfig", config, "--request-timeout", d.pace.kubectl.String()), args...)
	out, took, err := d.exec(ctx, fmt.Sprintf("kubectl --kubeconfig %s.kubeconfig --request-timeout %s %s", who, d.pace.kubectl, strings.Join(args, " ")), argv)
	if err != nil {
		err = fmt.Errorf("kubectl: %w", err)
	}
	return out, took, err
}

// tell tells the seconds as they pass, until enough says so of one or the span
// is over.
func (d *kubeDemo) tell(ctx context.Context, span time.Duration, enough func() bool) bool {
	d.loads = append(d.loads, loadAt{time.Now(), d.storm.load.read()})
	for began := time.Now(); time.Since(began) < span && ctx.Err() == nil; {
		pause(ctx, time.Second)
		now := loadAt{time.Now(), d.storm.load.read()}
		d.say("%s", d.storm.line(now.load.minus(d.loads[len(d.loads)-1].load)))
		d.loads = append(d.loads, now)
		if enough() {
			return true
		}
	}
	return false
}

// measure notes what the last seconds were like.
func (d *kubeDemo) measure(name string) phase {
	from := loadAt{time.Now(), d.storm.load.read()}
	now := from
	for i := len(d.loads) - 1; i >= 0 && now.at.Sub(from.at) < phaseSpan; i-- {
		from = d.loads[i]
	}
	p := phase{name: name, victim: d.storm.victim.began(now.at.Add(-phaseSpan), now.at), admin: d.storm.ruler.began(now.at.Add(-phaseSpan), now.at),
		load: now.load.minus(from.load), span: now.at.Sub(from.at)}
	d.phases = append(d.phases, p)
	return p
}

// rung waits until the load is answered as the rung promises, watches what that
// brings, and says so.
func (d *kubeDemo) rung(ctx context.Context, name string, answered func(counts) bool) phase {
	began := time.Now()
	var effect time.Time
	relief := false
	d.tell(ctx, rungMost+d.pace.rung, func() bool {
		last := d.loads[len(d.loads)-1].load.minus(d.loads[len(d.loads)-2].load)
		if effect.IsZero() && answered(last) {
			effect = time.Now()
		}
		to := time.Now().Add(-d.bar)
		from := to.Add(-reliefSpan)
		l := d.storm.victim.began(from, to)
		relief = from.After(began) && l.N > 0 && l.Failed == 0 && l.P99 <= d.bar
		if relief && d.relieved.IsZero() {
			d.relieved, d.reliefBy = from, name
		}
		return !effect.IsZero() && time.Since(effect) > d.pace.rung || effect.IsZero() && time.Since(began) > rungMost
	})
	p := d.measure(name)
	if !effect.IsZero() {
		d.say("all of the load is refused since %s after the command", short(effect.Sub(began)))
	}
	if relief {
		d.say("relief: the victim's p99 is below %s, while the clients go on", short(d.bar))
	} else {
		d.say("no relief %s after the command: the victim's p99 is %s, in calm %s", short(time.Since(began)), short(p.victim.P99), short(d.calm.P99))
	}
	return p
}

// pods waits until so many of the offender's pods run, seen in etcd.
func (d *kubeDemo) pods(ctx context.Context, want int) (time.Duration, error) {
	const patience = 90 * time.Second
	began := time.Now()
	for {
		n := 0
		err := typed(ctx, d.eye, "/registry/pods/"+offenderNamespace+"/", func(p *corev1.Pod) error {
			if p.Labels["app"] == offenderName && (want == 0 || p.Status.Phase == corev1.PodRunning) {
				n++
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
		if n == want {
			return time.Since(began), nil
		}
		if time.Since(began) > patience {
			return 0, fmt.Errorf("%d of its pods are there after %s, not %d", n, patience, want)
		}
		pause(ctx, 200*time.Millisecond)
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
	}
}

// offenderObjects are the offender's objects as kubectl sees them, without what
// counts up by itself.
func (d *kubeDemo) offenderObjects(ctx context.Context) (map[string]string, error) {
	argv := append(d.kube.Kubectl(), "--kubeconfig", d.kube.AdminKubeconfig(), "--request-timeout", "30s", "get", "-o", "json", "-n", offenderNamespace,
		"serviceaccount/"+offenderName, "daemonset/"+offenderName, "clusterrole/"+offenderRole, "clusterrolebinding/"+offenderRole)
	var out, complaint bytes.Buffer
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := runChild(cmd); err != nil {
		return nil, fmt.Errorf("kubectl: %w: %s", err, bytes.TrimSpace(complaint.Bytes()))
	}
	var list struct{ Items []map[string]any }
	if err := json.Unmarshal(out.Bytes(), &list); err != nil {
		return nil, err
	}
	objects := map[string]string{}
	for _, o := range list.Items {
		meta, _ := o["metadata"].(map[string]any)
		for _, counted := range []string{"resourceVersion", "generation", "managedFields"} {
			delete(meta, counted)
		}
		delete(o, "status")
		text, err := json.Marshal(o)
		if err != nil {
			return nil, err
		}
		objects[fmt.Sprint(o["kind"], "/", meta["name"])] = string(text)
	}
	if len(objects) != 4 {
		return nil, errors.New("kubectl does not show all of the offender's objects")
	}
	return objects, nil
}

// measured prints what was measured at the end of each part.
func (d *kubeDemo) measured() {
	fmt.Fprintln(d.out)
	w := tabwriter.NewWriter(d.out, 0, 4, 3, ' ', 0)
	fmt.Fprintln(w, "PART\tVICTIM P50\tP99\tFAILED\tADMIN P50\tP99\tANSWERED/S\t429/S\t403/S\t401/S")
	for _, p := range d.phases {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d of %d\t%s\t%s\t%d\t%d\t%d\t%d\n", p.name, short(p.victim.P50), short(p.victim.P99), p.victim.Failed, p.victim.N,
			short(p.admin.P50), short(p.admin.P99), p.rate(p.load.Answered), p.rate(p.load.Throttled), p.rate(p.load.Forbidden), p.rate(p.load.Unauthorized))
	}
	w.Flush()
	fmt.Fprintf(d.out, "Each row is the last %s of its part. A question that is still open counts with its age, and fails after %s.\n", phaseSpan, probeTimeout)
	if !d.relieved.IsZero() {
		fmt.Fprintf(d.out, "From the first command to relief: %s. It came with %s.\n", short(d.relieved.Sub(d.firstCommand)), d.reliefBy)
	}
}
