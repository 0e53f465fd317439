package evidence

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

func (t *tool) prove() *cobra.Command {
	var into, event string
	c := &cobra.Command{
		Use: "prove ID [FOLDER]", Short: "Write a proof that an event is in its log, which any C2SP tool verifies", Args: arguments(1, 2, "the ID of an event, and at most one folder"),
		Long: "Writes a proof (C2SP tlog-proof) that the event with the ID is in its log, under a checkpoint that bastions have\n" +
			"countersigned where there is one. It is verified with the event, byte for byte; the identities are in the folder\n" +
			"that halligan audit fetch makes, that of the log and those of the bastions whose signatures are to count:\n\n" +
			"  halligan audit prove ID --out ID.proof --event ID.json\n" +
			"  halligan audit verify --proof ID.proof --event ID.json --identity-file cp-1.prod/identity \\\n" +
			"      --identity-file bastion-a.bastion/identity",
		RunE: func(cmd *cobra.Command, args []string) error {
			e, r, err := t.open(cmd.Context(), argument(args, 1))
			if err != nil {
				return err
			}
			defer e.Close()
			entry, err := e.Find(cmd.Context(), args[0])
			if fault.Is(err, fault.NotFound) {
				err = isAction(cmd.Context(), e, args[0], err)
			}
			if err != nil {
				return err
			}
			proof, err := e.Prove(entry)
			if err != nil {
				return err
			}
			if event != "" {
				if err := durable.Write(event, entry.Raw); err != nil {
					return fault.New(fault.Failed, "name another file with --event", "%w", err)
				}
			}
			if into == "" || into == "-" {
				_, err = t.Out.Write(proof)
			} else if err = durable.Write(into, proof); err != nil {
				err = fault.New(fault.Failed, "name another file with --out", "%w", err)
			}
			if err != nil {
				return err
			}
			return verdict(r)
		},
	}
	c.Flags().StringVar(&into, "out", "", "`file` to write the proof to (default: standard output)")
	c.Flags().StringVar(&event, "event", "", "`file` to write the event to, byte for byte")
	return c
}

// isAction says which events an action has, where its ID was given for that of one.
func isAction(ctx context.Context, e *evidence.Evidence, id string, none error) error {
	var events []string
	for entry, err := range e.Events(ctx, evidence.Filter{Kinds: []audit.Kind{audit.Intent, audit.Outcome}}) {
		if err != nil {
			return err
		}
		if entry.PlanID == id && len(events) < 4 {
			events = append(events, fmt.Sprintf("%s (%s)", entry.ID, entry.Kind))
		}
	}
	if len(events) == 0 {
		return none
	}
	return fault.New(fault.Usage, "name one of its events: "+strings.Join(events, ", "), "%s is an action, which has several events", id)
}
