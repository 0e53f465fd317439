package evidence

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/internal/fault"
)

func (t *tool) verify() *cobra.Command {
	var proof, event string
	c := &cobra.Command{
		Use: "verify [FOLDER]", Short: "Verify evidence offline, and name the first entry that does not hold", Args: arguments(0, 1, "at most one folder, or archive"),
		Long: "Verifies a folder of evidence, or a tar archive of one: as halligan audit fetch made it, or as it lies at a daemon.\n" +
			"Without one, what the daemons have now is fetched first. Nothing is believed but the bundle (--bundle), whose host\n" +
			"authority vouches for servers and they for their logs, or the keys that are named (--key). With --proof, a proof\n" +
			"is verified for the event that it was made of.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if proof != "" || event != "" {
				if proof == "" || event == "" || len(args) > 0 {
					return usage(cmd, "a proof needs its event: --proof FILE --event FILE, and no folder")
				}
				return t.verifyProof(proof, event)
			}
			e, r, err := t.open(cmd.Context(), argument(args, 0))
			if err != nil {
				return err
			}
			defer e.Close()
			if t.table() {
				t.report(r)
			} else if err := t.print(r); err != nil {
				return err
			}
			return verdict(r)
		},
	}
	c.Flags().StringVar(&proof, "proof", "", "`file` of a proof, as halligan audit prove writes it")
	c.Flags().StringVar(&event, "event", "", "`file` of the event that it is a proof for")
	c.Flags().StringArrayVar(&t.identities, "identity-file", nil, "`file` identity of the folder of a log or a witness, for which the bundle vouches; may be repeated")
	return c
}

// print prints a value in the form that -o asks for.
func (t *tool) print(v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return t.PrintJSON(text)
}

// report tells what was found.
func (t *tool) report(r *evidence.Report) {
	var events, open uint64
	for _, l := range r.Logs {
		events, open = events+l.Events, open+l.Unwitnessed
		name := l.Origin
		if l.Folder != "" && l.Folder != l.Origin {
			name += " in " + l.Folder
		}
		if len(l.Generations) == 0 {
			t.say("%s", name)
		} else {
			t.say("%s  log %s, %s: %d events, %d to %d, %s to %s", name, l.Lineage, plural(len(l.Generations), "generation"), l.Events, l.FirstSeq, l.FirstSeq+max(l.Events, 1)-1, stamp(l.Begin), stamp(l.End))
			t.say("  signed by its key, for which the %s vouches", l.VouchedBy)
		}
		if l.FirstSeq > 0 {
			t.say("  begins with event %d: what was before has made room", l.FirstSeq)
		}
		for _, w := range l.Witnessed {
			if w.Known {
				t.say("  countersigned by %s: the events before %d, at %s", w.By, w.Events, stamp(w.At))
			} else {
				t.say("  countersigned by %s, whose key is not known here: it counts for nothing", w.By)
			}
		}
		if l.Unwitnessed > 0 && len(l.Generations) > 0 {
			last := l.Generations[len(l.Generations)-1]
			end := last.FirstSeq + last.Size
			t.say("  no witness has seen the last %d events, from %d on", l.Unwitnessed, end-l.Unwitnessed)
		}
		if l.Recordings+l.Absent > 0 {
			t.say("  recordings: %d whole, %d not here", l.Recordings, l.Absent)
		}
		for _, text := range l.Notes {
			t.say("  note: %s", text)
		}
		for _, p := range l.Problems {
			t.say("  BAD  %s", p)
		}
	}
	if r.OK() {
		t.say("verified: %s, %d events, of which no witness has seen %d", plural(len(r.Logs), "log"), events, open)
	}
}

func plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

func stamp(at time.Time) string { return at.UTC().Format("2006-01-02T15:04:05Z") }

// proven is what a proof says, for a script.
type proven struct {
	Tree      string      `json:"tree"`
	Witnessed []string    `json:"witnessed,omitempty"`
	Event     audit.Event `json:"event"`
}

func (t *tool) verifyProof(proofFile, eventFile string) error {
	proof, err := readFile(proofFile, evidence.MaxProof)
	if err != nil {
		return err
	}
	event, err := readFile(eventFile, audit.MaxEvent)
	if err != nil {
		return err
	}
	trust, err := t.trust()
	if err != nil {
		return err
	}
	p, err := evidence.VerifyProof(trust, nil, proof, event)
	if err != nil {
		return err
	}
	if !t.table() {
		return t.print(proven{p.Tree, p.Witnessed, p.Event})
	}
	t.say("%s", line(p.Event))
	by := "no witness whose key is known here"
	if len(p.Witnessed) > 0 {
		by = strings.Join(p.Witnessed, ", ")
	}
	t.say("verified: it is event %d of %s, countersigned by %s", p.Event.Seq, p.Tree, by)
	return nil
}

// readFile reads a file that the person names.
func readFile(name string, most int64) ([]byte, error) {
	f, err := os.Open(name) // #nosec G304 -- as above
	if err != nil {
		return nil, fault.New(fault.Usage, "name a readable file", "%w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = errors.New(name + ": the file is too large")
	}
	if err != nil {
		return nil, fault.New(fault.Usage, "name a readable file", "%w", err)
	}
	return data, nil
}
