package evidence

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/audit/export"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// again is the time between two looks of --follow; tests shorten it.
var again = 3 * time.Second

func (t *tool) show() *cobra.Command {
	var f filters
	var follow bool
	var last int
	c := uses(&cobra.Command{
		Use: "show [FOLDER]", Short: "Show verified events: who did what, when, why, and what came of it", Args: arguments(0, 1, "at most one folder, or archive"),
		Long: "Shows events in the order of their times. Without a folder, what the daemons have now is fetched and verified\n" +
			"first. What belongs to an intent that is chosen, such as its outcome, is shown with it. With --follow it goes on\n" +
			"until it is interrupted; only what bastions or nodes recorded of its own questions is left out then.",
		RunE: func(cmd *cobra.Command, args []string) error {
			filter, err := t.filter(&f)
			if err != nil {
				return err
			}
			if last < 0 || follow && len(args) > 0 {
				return usage(cmd, "--last must not be negative, and --follow goes on from the daemons, not from a folder")
			}
			e, r, err := t.open(cmd.Context(), argument(args, 0))
			if err != nil {
				return err
			}
			defer e.Close()
			seen := next{}
			if err := t.showAll(cmd.Context(), e, filter, last, seen); err != nil {
				return err
			}
			if follow {
				choice := filter.Choose()
				for entry, err := range e.Events(cmd.Context(), evidence.Filter{Kinds: []audit.Kind{audit.Intent}}) {
					if err != nil {
						return err
					}
					choice.Wants(&entry.Event) // its outcome may be yet to come
				}
				return t.follow(cmd.Context(), choice, seen)
			}
			return verdict(r)
		},
	}, "incident")
	f.add(c.Flags())
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what happens")
	c.Flags().IntVar(&last, "last", 0, "only the last `so many` of those that are chosen")
	return c
}

// next is the number of the event to go on with, by origin and lineage.
type next map[string]uint64

func (t *tool) showAll(ctx context.Context, e *evidence.Evidence, f evidence.Filter, last int, seen next) error {
	for _, l := range e.Logs() {
		seen[l.Origin+" "+l.Lineage] = l.FirstSeq + l.Events
	}
	var kept []evidence.Entry
	for entry, err := range e.Events(ctx, f) {
		if err != nil {
			return err
		}
		if last == 0 {
			if err := t.showOne(entry); err != nil {
				return err
			}
			continue
		}
		if kept = append(kept, entry); len(kept) > last {
			kept = kept[1:]
		}
	}
	for _, entry := range kept {
		if err := t.showOne(entry); err != nil {
			return err
		}
	}
	return nil
}

func (t *tool) showOne(entry evidence.Entry) error {
	if t.table() {
		_, err := fmt.Fprintln(t.Out, neutral.LineMax(line(entry.Event), maxLine))
		return err
	}
	if t.flag("output") == "yaml" {
		if _, err := fmt.Fprintln(t.Out, "---"); err != nil {
			return err
		}
	}
	return t.PrintJSON(entry.Raw)
}

// maxLine bounds a line of events, in bytes.
const maxLine = 2 << 10

// line tells an event in one line.
func line(e audit.Event) string {
	words := []string{stamp(e.Time), e.Origin, fmt.Sprintf("#%d", e.Seq), string(e.Kind), export.Summary(e)}
	if e.Incident != "" {
		words = append(words, "incident="+e.Incident)
	}
	if e.PlanID != "" && (e.Kind == audit.Intent || e.Kind == audit.Outcome) {
		words = append(words, "action="+e.PlanID)
	}
	switch e.Kind {
	case audit.Intent, audit.Secret:
		words = append(words, "id="+e.ID)
	}
	if e.Session != "" && (e.Kind == audit.Login || e.Kind == audit.Session) {
		words = append(words, "session="+e.Session)
	}
	return strings.Join(words, "  ")
}

// follow shows what is new until the context ends. Connections are kept, so that
// looking is not itself what there is to see.
func (t *tool) follow(ctx context.Context, choice *evidence.Choice, seen next) error {
	dir, err := t.State()
	if err != nil {
		return err
	}
	trust, err := t.trust()
	if err != nil {
		return err
	}
	turn := make(chan struct{}, 1) // one shows at a time
	failed, err := t.Nodes(ctx, func(ctx context.Context, d Daemon) {
		for {
			select {
			case <-time.After(again):
			case <-ctx.Done():
				return
			}
			turn <- struct{}{}
			err := t.once(ctx, dir, d, trust, choice, seen)
			<-turn
			if err != nil && ctx.Err() == nil {
				t.note("%s: %s; start it again to follow that one too", d.Name, fault.Of(err).Message)
				return
			}
		}
	})
	if err != nil {
		return err
	}
	for name, err := range failed {
		t.note("%s: %s", name, fault.Of(err).Message)
	}
	if ctx.Err() != nil {
		return nil // interrupted, as it is meant to be
	}
	return fault.New(fault.Unreachable, "start it again", "nobody answers any more")
}

// once fetches what is new from one daemon, and shows it.
func (t *tool) once(ctx context.Context, dir string, d Daemon, trust evidence.Trust, choice *evidence.Choice, seen next) error {
	store, err := evidence.OpenStore(ctx, dir)
	if err != nil {
		return err
	}
	defer store.Close()
	g := &fetching{tool: t, store: store, trust: trust, got: map[string]gotten{}, failed: map[string]error{}}
	g.node(ctx, d)
	for _, err := range g.failed {
		return err
	}
	for _, text := range g.conflicts {
		t.note("%s", text)
	}
	for origin := range g.got {
		for entry, err := range store.New(ctx, origin, seen) {
			if err != nil {
				return err
			}
			if entry.Kind == audit.Read && strings.Contains(entry.Action, "Log") || !choice.Wants(&entry.Event) {
				continue
			}
			if err := t.showOne(entry); err != nil {
				return err
			}
		}
	}
	return nil
}
