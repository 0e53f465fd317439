package evidence

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/audit/report"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

func (t *tool) story() *cobra.Command {
	var markdown, page string
	c := &cobra.Command{
		Use: "report INCIDENT [FOLDER]", Short: "Tell the story of an incident, with its proofs and recordings", Args: arguments(1, 2, "the name of an incident, and at most one folder"),
		Long: "Writes the appendix of a post-mortem: who came in, what was done and why, what came of it, how long it took, and what\n" +
			"proves it. The page of --html is one file that needs no network, and plays the recordings that are in the folder\n" +
			"(halligan audit replay fetches one). Without a folder, what the daemons have now is fetched and verified first.\n" +
			"What does not hold is said in the report, and the exit status then is 1.\n\n" +
			"  halligan audit report INC-7 --html INC-7.html --markdown INC-7.md",
		RunE: func(cmd *cobra.Command, args []string) error {
			if markdown == "" && page == "" {
				markdown = "-"
			}
			if markdown == page {
				return usage(cmd, "--markdown and --html need a file each")
			}
			e, r, err := t.open(cmd.Context(), argument(args, 1))
			if err != nil {
				return err
			}
			defer e.Close()
			in, err := t.incident(cmd.Context(), e, r, args[0])
			if err != nil {
				return err
			}
			story := report.New(in)
			for name, render := range map[string]func(io.Writer) error{markdown: story.Markdown, page: story.HTML} {
				if err := t.put(name, render); err != nil {
					return err
				}
			}
			return verdict(r)
		},
	}
	c.Flags().StringVar(&markdown, "markdown", "", "`file` to write it to as Markdown; - is standard output, which is the default")
	c.Flags().StringVar(&page, "html", "", "`file` to write it to as one page for a browser")
	return c
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
func (t *tool) incident(ctx context.Context, e *evidence.Evidence, r *evidence.Report, name string) (report.Evidence, error) {
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
	recorded := map[string]string{}
	var sessions []string
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
		if entry.Chunk != nil && recorded[entry.Chunk.Session] == "" {
			recorded[entry.Chunk.Session] = entry.Origin
			sessions = append(sessions, entry.Chunk.Session)
		}
	}
	for _, l := range r.Logs {
		if logs[l] || len(l.Problems) > 0 {
			in.Logs = append(in.Logs, logOf(l))
		}
	}
	budget := int64(maxRecordings)
	for _, session := range sessions {
		one, err := recording(ctx, e, session, &budget)
		if err != nil {
			return in, err
		}
		one.Origin = recorded[session]
		in.Recordings = append(in.Recordings, one)
	}
	return in, nil
}

// maxRecordings bounds what is read of recordings, in bytes. A report holds less.
const maxRecordings = 64 << 20

// recording reads one as far as the budget goes.
func recording(ctx context.Context, e *evidence.Evidence, session string, budget *int64) (report.Recording, error) {
	one := report.Recording{Name: session}
	file, _, err := e.Recording(ctx, session)
	if err != nil {
		if ctx.Err() != nil {
			return one, err
		}
		f := fault.Of(err)
		one.Problem = f.Error()
		return one, nil
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, *budget+1))
	if int64(len(data)) > *budget {
		one.Problem = "there is more of recordings than a report takes; see: halligan audit replay " + session
		return one, nil
	}
	*budget -= int64(len(data))
	if one.Data = data; err != nil {
		return one, errors.Join(fmt.Errorf("recording %s", session), err)
	}
	return one, nil
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
