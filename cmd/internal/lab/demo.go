package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"

	appsv1 "k8s.io/api/apps/v1"

	"github.com/halligan-io/halligan/internal/fault"
)

const (
	offender     = "system:serviceaccount:" + offenderNamespace + ":" + offenderName
	offenderKey  = "/registry/daemonsets/" + offenderNamespace + "/" + offenderName
	demoReason   = "demo: the collector overloads the API servers"
	dialPatience = 2 * time.Second
	// shownLines of a command's output are told, the rest is counted.
	shownLines = 24
)

// demo tells one story and keeps the score.
type demo struct {
	out      io.Writer
	lab      *Lab
	eye      eye
	halligan []string
	report   string
	rows     []score
}

// score is one step of the story. An err says why it did not hold.
type score struct {
	name string
	took time.Duration
	err  error
}

// Demo runs a lab without any API server in a temporary folder, stops the
// offender with the real halligan command, looks at every effect with an
// independent client, and takes everything back. It returns an error if any step
// did not hold.
func Demo(ctx context.Context, o Options, out io.Writer) (err error) {
	if o.Objects <= 0 {
		return fault.New(fault.Usage, "give --objects a positive number", "a demo needs objects")
	}
	d := &demo{out: out, halligan: o.Halligan, report: o.Report}
	if len(d.halligan) == 0 {
		if d.halligan, err = beside("halligan"); err != nil {
			return err
		}
	}
	if o.Dir, err = os.MkdirTemp(o.Dir, "halligan-demo-"); err != nil {
		return err
	}
	defer os.RemoveAll(o.Dir)
	o.Progress = prefixed{out}
	began := time.Now()

	d.title("A control plane comes up: etcd, agents and workloads, but no API server")
	up := time.Now()
	d.lab, err = Up(ctx, o)
	if err != nil {
		return interrupted(ctx, err)
	}
	defer d.lab.Close()
	d.rows = append(d.rows, score{"objects are there", time.Since(up), nil})
	cli, err := d.lab.cluster.Client()
	if err != nil {
		return err
	}
	defer cli.Close()
	d.eye = eye{cli}
	if err := d.story(ctx); err != nil {
		return interrupted(ctx, err)
	}
	return d.total(time.Since(began))
}

// interrupted prefers the plain fact that somebody stopped it.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		if broken := new(outputError); errors.As(context.Cause(ctx), &broken) {
			return fault.New(fault.Failed, "", "the story cannot be told: %w; everything was stopped", broken.error)
		}
		return fault.New(fault.Cancelled, "", "interrupted: everything was stopped")
	}
	return err
}

// outputError is why a story ends that nobody can hear.
type outputError struct{ error }

// Audience returns the output of a demo, and a context that ends with it: who
// has left, as head does, must not leave a lab and its keys behind.
func Audience(ctx context.Context, out io.Writer) (context.Context, io.Writer) {
	ctx, end := context.WithCancelCause(ctx)
	return ctx, audience{out, end}
}

type audience struct {
	io.Writer
	end context.CancelCauseFunc
}

func (a audience) Write(b []byte) (int, error) {
	n, err := a.Writer.Write(b)
	if err != nil {
		a.end(&outputError{err})
	}
	return n, err
}

// story is the demo step by step. An error is one of the demo itself; a step
// that does not hold is only noted.
func (d *demo) story(ctx context.Context) error {
	before, err := d.eye.snapshot(ctx)
	if err != nil {
		return err
	}
	naming, subjects, err := d.eye.bindings(ctx, offenderNamespace, offenderName)
	if err != nil {
		return err
	}
	runaway, kept, err := d.eye.configMaps(ctx, offenderNamespace, runawayApp)
	if err != nil {
		return err
	}
	d.say("etcd holds %d keys; %d bindings name the offender, which runs on every node and left %d ConfigMaps", len(before), naming, runaway)

	d.title("The API server answers nothing: kubectl would hang or fail here")
	d.step(ctx, "the API port is silent", d.silent)

	fmt.Fprintf(d.out, "\n$ export HALLIGAN_SOCKET=%s HALLIGAN_REASON='%s'\n", d.lab.Socket(0), demoReason)
	d.title("The offender is found in etcd")
	d.step(ctx, "get the offender", func(ctx context.Context) error {
		_, err := d.run(ctx, offenderName, "get", "ds/"+offenderName, "-n", offenderNamespace)
		return err
	})

	var revoked, scaled, deleted string
	d.title("Its rights are taken away")
	d.step(ctx, "revoke", func(ctx context.Context) (err error) {
		if revoked, err = d.mutate(ctx, "revoke", offender, "--yes"); err != nil {
			return err
		}
		n, rest, err := d.eye.bindings(ctx, offenderNamespace, offenderName)
		if err != nil {
			return err
		}
		d.seen("%d bindings name the offender, %d did; %d other subjects have what they had", n, naming, rest)
		return expect(n == 0 && rest == subjects-naming, "the bindings are not right")
	})
	d.title("It is stopped on every node")
	d.step(ctx, "scale to 0", func(ctx context.Context) (err error) {
		if scaled, err = d.mutate(ctx, "scale", "ds/"+offenderName, "-n", offenderNamespace, "--to", "0", "--yes"); err != nil {
			return err
		}
		fit, all, selector, err := d.placement(ctx)
		if err != nil {
			return err
		}
		d.seen("its node selector %v takes %d of %d nodes", selector, fit, all)
		return expect(fit == 0 && all > 0, "nodes are left that it may run on")
	})
	d.title("What it left behind is deleted")
	d.step(ctx, fmt.Sprintf("delete %d objects", runaway), func(ctx context.Context) (err error) {
		if deleted, err = d.mutate(ctx, "delete", "cm", "-n", offenderNamespace, "-l", "app="+runawayApp, "--yes"); err != nil {
			return err
		}
		with, without, err := d.eye.configMaps(ctx, offenderNamespace, runawayApp)
		if err != nil {
			return err
		}
		d.seen("%d of its ConfigMaps are left, %d that are not its are untouched", with, without)
		return expect(with == 0 && without == kept, "the ConfigMaps are not right")
	})

	d.title("Who did what, and why, is on record")
	d.step(ctx, "history", func(ctx context.Context) error {
		out, err := d.run(ctx, revoked, "history")
		if err != nil {
			return err
		}
		return expect(strings.Contains(out, scaled) && strings.Contains(out, deleted) && revoked != scaled && scaled != deleted, "an action is missing")
	})

	d.title("Everything is taken back, last first")
	d.step(ctx, "undo delete", func(ctx context.Context) error {
		if err := d.undo(ctx, deleted); err != nil {
			return err
		}
		with, without, err := d.eye.configMaps(ctx, offenderNamespace, runawayApp)
		if err != nil {
			return err
		}
		d.seen("%d of its ConfigMaps are back", with)
		return expect(with == runaway && without == kept, "the ConfigMaps are not right")
	})
	d.step(ctx, "undo scale", func(ctx context.Context) error {
		if err := d.undo(ctx, scaled); err != nil {
			return err
		}
		fit, all, selector, err := d.placement(ctx)
		if err != nil {
			return err
		}
		d.seen("its node selector %v takes %d of %d nodes", selector, fit, all)
		return expect(fit == all, "it does not run everywhere again")
	})
	d.step(ctx, "undo revoke", func(ctx context.Context) error {
		if err := d.undo(ctx, revoked); err != nil {
			return err
		}
		n, all, err := d.eye.bindings(ctx, offenderNamespace, offenderName)
		if err != nil {
			return err
		}
		d.seen("%d bindings name the offender", n)
		return expect(n == naming && all == subjects, "the bindings are not right")
	})

	d.title("The cluster is as before")
	d.step(ctx, "as before", func(ctx context.Context) error {
		now, err := d.eye.snapshot(ctx)
		if err != nil {
			return err
		}
		regenerated, err := now.since(before)
		if err != nil {
			return err
		}
		d.seen("the same %d keys; %d values have the same bytes, and in %d nothing but metadata.generation differs, which counts up by design.\n"+
			"Their modification revisions are new, as after any write.", len(now), len(now)-regenerated, regenerated)
		return nil
	})
	d.proven(ctx, d.report)
	return ctx.Err()
}

// silent holds if nothing answers where every node's API server would.
func (d *demo) silent(ctx context.Context) error {
	for i := range controlNodes {
		dialer := net.Dialer{Timeout: dialPatience}
		conn, err := dialer.DialContext(ctx, "tcp", d.lab.API(i))
		if err == nil {
			conn.Close()
			return fmt.Errorf("something listens on %s", d.lab.API(i))
		}
		d.say("%v", err)
	}
	return nil
}

// placement says which nodes the offender may run on.
func (d *demo) placement(ctx context.Context) (fit, all int, selector map[string]string, err error) {
	ds, err := one[*appsv1.DaemonSet](ctx, d.eye, offenderKey)
	if err != nil {
		return 0, 0, nil, err
	}
	selector = ds.Spec.Template.Spec.NodeSelector
	fit, all, err = d.eye.nodesFor(ctx, selector)
	return fit, all, selector, err
}

func (d *demo) undo(ctx context.Context, action string) error {
	if action == "" {
		return errors.New("there is nothing to undo")
	}
	_, err := d.mutate(ctx, "undo", action, "--yes")
	return err
}

// undoWith is how the command names the action that it has just done.
var undoWith = regexp.MustCompile(`halligan undo (\S+)`)

// mutate runs a mutation and returns the action's ID as a person would read it.
func (d *demo) mutate(ctx context.Context, args ...string) (string, error) {
	out, err := d.run(ctx, "applied", args...)
	if err != nil {
		return "", err
	}
	m := undoWith.FindStringSubmatch(out)
	if m == nil {
		return "", errors.New("the command does not say how to undo it")
	}
	return m[1], nil
}

// run runs halligan as a person would and shows what it says; its output must
// contain a text.
func (d *demo) run(ctx context.Context, text string, args ...string) (string, error) {
	argv := append(append([]string(nil), d.halligan...), args...)
	out, _, err := d.exec(ctx, "halligan "+strings.Join(args, " "), argv, "HALLIGAN_SOCKET="+d.lab.Socket(0), "HALLIGAN_REASON="+demoReason, "HALLIGAN_INCIDENT="+demoIncident)
	if err != nil {
		return "", fmt.Errorf("halligan %s: %w", args[0], err)
	}
	if !strings.Contains(out, text) {
		return "", fmt.Errorf("halligan %s does not say %q", args[0], text)
	}
	return out, nil
}

// exec runs a command, shows it and what it says, and how long it took.
func (d *demo) exec(ctx context.Context, shown string, argv []string, env ...string) (string, time.Duration, error) {
	fmt.Fprintf(d.out, "$ %s\n", shown)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "HALLIGAN_") && !strings.HasPrefix(v, "KUBECONFIG=") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = stopGrace
	began := time.Now()
	err := runChild(cmd)
	took := time.Since(began)
	if ctx.Err() != nil {
		return out.String(), took, ctx.Err() // half an answer tells nothing
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if cut := len(lines) - shownLines; cut > 0 {
		tail := lines[len(lines)-shownLines/3:]
		lines = append(append(lines[:shownLines-shownLines/3:shownLines-shownLines/3], fmt.Sprintf("... %d more lines ...", cut)), tail...)
	}
	for _, l := range lines {
		fmt.Fprintln(d.out, "    "+l)
	}
	fmt.Fprintf(d.out, "  the command took %s\n", took.Round(time.Millisecond))
	return out.String(), took, err
}

// step does one step and notes whether it held.
func (d *demo) step(ctx context.Context, name string, do func(context.Context) error) {
	if ctx.Err() != nil {
		return
	}
	began := time.Now()
	err := do(ctx)
	if ctx.Err() != nil {
		return // whether it would have held nobody knows
	}
	d.rows = append(d.rows, score{name, time.Since(began), err})
	if err != nil {
		d.say("NOT HELD: %v", err)
	}
}

// total prints the table and returns an error if a step did not hold.
func (d *demo) total(took time.Duration) error {
	fmt.Fprintln(d.out)
	w := tabwriter.NewWriter(d.out, 0, 4, 3, ' ', 0)
	fmt.Fprintln(w, "STEP\tTIME\tHELD")
	failed := 0
	for _, r := range d.rows {
		held := "yes"
		if r.err != nil {
			held = "NO: " + r.err.Error()
			failed++
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", r.name, r.took.Round(100*time.Microsecond), held)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "\n%d of %d steps held, in %s altogether.\n", len(d.rows)-failed, len(d.rows), took.Round(100*time.Millisecond))
	if failed > 0 {
		return fault.New(fault.Failed, "see NOT HELD above", "%d steps did not hold", failed)
	}
	return nil
}

func (d *demo) title(text string) { fmt.Fprintf(d.out, "\n== %s\n", text) }

func (d *demo) say(format string, args ...any) { fmt.Fprintf(prefixed{d.out}, format+"\n", args...) }

func (d *demo) seen(format string, args ...any) {
	d.say("seen with a plain etcd client: "+format, args...)
}

func expect(holds bool, otherwise string) error {
	if !holds {
		return errors.New(otherwise)
	}
	return nil
}

// prefixed indents lines of the story below their title.
type prefixed struct{ w io.Writer }

func (p prefixed) Write(b []byte) (int, error) {
	text := strings.ReplaceAll(strings.TrimSuffix(string(b), "\n"), "\n", "\n  ")
	_, err := fmt.Fprintf(p.w, "  %s\n", text)
	return len(b), err
}
