package evidence

import (
	"bytes"
	"context"
	"io"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/audit/report"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

func (t *tool) story() *cobra.Command {
	var markdown, page string
	var bring bool
	c := uses(&cobra.Command{
		Use: "report INCIDENT [FOLDER]", Short: "Tell the story of an incident, with its proofs and recordings", Args: arguments(1, 2, "the name of an incident, and at most one folder"),
		Long: "Writes the appendix of a post-mortem: who came in, what was done and why, what came of it, how long it took, and what\n" +
			"proves it. The page of --html is one file that needs no network, and plays the recordings that are in the folder.\n" +
			"Without a folder, what the daemons have now is fetched and verified first, and with --recordings the recordings too,\n" +
			"which takes a commander (--as commander) and is on record. What does not hold is said in the report, and the exit\n" +
			"status then is 1.\n\n" +
			"  halligan audit report INC-7 --html INC-7.html --markdown INC-7.md",
		RunE: func(cmd *cobra.Command, args []string) error {
			if markdown == "" && page == "" {
				markdown = "-"
			}
			if markdown == page {
				return usage(cmd, "--markdown and --html need a file each")
			}
			if bring && len(args) > 1 {
				return usage(cmd, "--recordings fetches from the daemons, not from a folder")
			}
			story, r, err := t.tell(cmd.Context(), args, bring)
			if err != nil {
				return err
			}
			for name, render := range map[string]func(io.Writer) error{markdown: story.Markdown, page: story.HTML} {
				if err := t.put(name, render); err != nil {
					return err
				}
			}
			return verdict(r)
		},
	}, "reason")
	c.Flags().StringVar(&markdown, "markdown", "", "`file` to write it to as Markdown; - is standard output, which is the default")
	c.Flags().StringVar(&page, "html", "", "`file` to write it to as one page for a browser")
	c.Flags().BoolVar(&bring, "recordings", false, "fetch the recordings of its sessions, too, where they are not here")
	return c
}

// settling is how long after an action it is to be found under a signed checkpoint.
const settling = 2 * time.Second

// tell makes the story. Where an action has only just been done, it looks again
// when its outcome has been signed.
func (t *tool) tell(ctx context.Context, args []string, bring bool) (*report.Story, *evidence.Report, error) {
	for again := len(args) == 1; ; again = false {
		e, r, err := t.open(ctx, argument(args, 1))
		if err != nil {
			return nil, nil, err
		}
		in, err := t.incident(ctx, e, r, args[0], bring)
		e.Close()
		if err != nil {
			return nil, nil, err
		}
		story := report.New(in)
		fresh := slices.ContainsFunc(story.Actions, func(a report.Action) bool { return a.Done.IsZero() && t.Now().Sub(a.Asked).Abs() < settling })
		if !again || !fresh || !pause(ctx, settling) {
			return story, r, nil
		}
	}
}

func (t *tool) put(name string, render func(io.Writer) error) error {
	switch name {
	case "":
		return nil
	case "-":
		return render(t.Out)
	}
	var b bytes.Buffer
	if err := render(&b); err != nil {
		return err
	}
	if err := durable.Write(name, b.Bytes()); err != nil {
		return fault.New(fault.Failed, "name another file", "%w", err)
	}
	t.note("%s is written", name)
	return nil
}

// incident collects what belongs to one.
func (t *tool) incident(ctx context.Context, e *evidence.Evidence, r *evidence.Report, name string, bring bool) (report.Evidence, error) {
	in := report.Evidence{Incident: name, Made: t.Now()}
	g := report.NewGatherer(name)
	for entry, err := range e.Events(ctx, evidence.Filter{}) {
		if err != nil {
			return in, err
		}
		g.Look(entry.Event)
	}
	if !g.Found() {
		return in, fault.New(fault.NotFound, "list what there is with halligan audit show", "no event names the incident %s", name)
	}
	logs := map[*evidence.Log]bool{}
	casts := map[string]*castOf{}
	var order []*castOf
	for entry, err := range e.Events(ctx, evidence.Filter{}) {
		if err != nil {
			return in, err
		}
		if !g.Wants(entry.Event) {
			continue
		}
		if len(in.Events) == report.MaxEvents {
			in.LeftOut++
			continue
		}
		logs[entry.Log] = true
		one := report.Event{Event: entry.Event, Raw: entry.Raw, Witnessed: witnessed(entry)}
		if entry.Kind == audit.Intent || entry.Kind == audit.Outcome {
			if one.Proof, err = e.Prove(entry); err != nil {
				return in, err
			}
		}
		in.Events = append(in.Events, one)
		if c := entry.Chunk; c != nil {
			if casts[c.Session] == nil {
				casts[c.Session] = &castOf{name: c.Session, log: entry.Log}
				order = append(order, casts[c.Session])
			}
			casts[c.Session].whole = casts[c.Session].whole || c.Last
		}
	}
	for _, l := range r.Logs {
		if logs[l] || len(l.Problems) > 0 {
			in.Logs = append(in.Logs, logOf(l))
		}
	}
	if bring {
		// What is read is read for this.
		if err := t.cmd.Flag("incident").Value.Set(name); err != nil {
			return in, err
		}
	}
	budget := int64(maxRecordings)
	for _, c := range order {
		one, err := t.cast(ctx, e, c, bring, &budget)
		if err != nil {
			return in, err
		}
		in.Recordings = append(in.Recordings, one)
	}
	return in, nil
}

// castOf is a recording that a log speaks of; whole says that the session is over.
type castOf struct {
	name  string
	log   *evidence.Log
	whole bool
}

// maxRecordings bounds what is read of recordings, in bytes. A report holds less.
const maxRecordings = 64 << 20

// cast reads a recording as far as the budget goes.
func (t *tool) cast(ctx context.Context, e *evidence.Evidence, c *castOf, bring bool, budget *int64) (report.Recording, error) {
	one := report.Recording{Name: c.name, Origin: c.log.Origin}
	file, _, err := e.Recording(ctx, c.name)
	if bring && fault.Is(err, fault.NotFound) {
		var brought string
		if brought, err = t.bring(ctx, c.log, c.name); err == nil {
			if !c.whole { // it would be too short for what the log has by tomorrow
				defer os.Remove(brought)
			}
			file, _, err = e.Recording(ctx, c.name)
		}
	}
	if ctx.Err() != nil {
		return one, ctx.Err()
	}
	if err != nil {
		one.Problem = fault.Of(err).Error()
		return one, nil
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, *budget+1))
	if int64(len(data)) > *budget {
		one.Problem = "there is more of recordings than a report takes; see: halligan audit replay " + c.name
		return one, nil
	}
	*budget -= int64(len(data))
	one.Data = data
	return one, err
}

// witnessed reports whether somebody whose key is known has countersigned a tree
// that has the entry.
func witnessed(entry evidence.Entry) bool {
	for _, w := range entry.Log.Witnessed {
		if w.Known && entry.Seq < w.Events {
			return true
		}
	}
	return false
}

func logOf(l *evidence.Log) report.Log {
	out := report.Log{Origin: l.Origin, Lineage: l.Lineage, Events: l.Events, VouchedBy: l.VouchedBy, Unwitnessed: l.Unwitnessed}
	for _, w := range l.Witnessed {
		if w.Known {
			out.Witnesses = append(out.Witnesses, report.Witness{By: w.By, Events: w.Events})
		}
	}
	for _, g := range l.Generations {
		out.VKeys = append(out.VKeys, g.VKey)
	}
	for _, p := range l.Problems {
		out.Problems = append(out.Problems, p.String())
	}
	return out
}
