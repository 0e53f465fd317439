package verb

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
)

// reads is what this client can show of the actions that only read: they have
// calls of their own, unlike mutations, which are all alike.
var reads = map[string]func(*Verbs, *cobra.Command, *halliganv1.Action, *structpb.Struct) error{
	"get":     (*Verbs).get,
	"history": (*Verbs).history,
}

// maxNotes bounds how many remarks on single objects are shown.
const maxNotes = 10

func (v *Verbs) status(ctx context.Context) error {
	s, err := v.fetchStatus(ctx)
	if err != nil {
		return err
	}
	if v.output == "table" {
		v.showStatus(s)
		return nil
	}
	return v.PrintMessage(s)
}

func (v *Verbs) fetchStatus(ctx context.Context) (*halliganv1.StatusResponse, error) {
	if err := v.connect(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, v.limit(nil))
	defer cancel()
	s, err := v.agent.Status(ctx, &halliganv1.StatusRequest{})
	if err != nil {
		return nil, api.FromStatus(err)
	}
	return s, nil
}

// whoamiCommand shows whom the agent takes the caller for.
func (v *Verbs) whoamiCommand() *cobra.Command {
	return &cobra.Command{
		Use: "whoami", Short: "Show whom the agent takes you for", Args: NoArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var s *halliganv1.StatusResponse
			var err error
			if v.with.Self != nil {
				s = v.with.Self()
			} else if s, err = v.fetchStatus(cmd.Context()); err != nil {
				return err
			}
			you := &halliganv1.StatusResponse{Node: s.GetNode(), Cluster: s.GetCluster(), Actor: s.GetActor(), Role: s.GetRole(),
				Door: s.GetDoor(), CredentialExpires: s.GetCredentialExpires()}
			if v.output == "table" {
				v.showWhoami(you)
				return nil
			}
			return v.PrintMessage(you)
		},
	}
}

func (v *Verbs) get(cmd *cobra.Command, action *halliganv1.Action, parameters *structpb.Struct) error {
	target := parameters.GetFields()["target"].GetStringValue()
	managed := parameters.GetFields()["full"].GetBoolValue()
	if v.output != "table" {
		// Rows need no whole objects, which are what makes a list slow.
		for _, p := range action.GetParameters() {
			if p.GetName() == "full" {
				parameters.Fields["full"] = structpb.NewBoolValue(true)
			}
		}
	}
	ctx := cmd.Context()
	if err := v.connect(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, v.limit(action))
	defer cancel()
	stream, err := v.agent.Get(ctx, &halliganv1.GetRequest{Parameters: parameters, Reason: v.reason, Incident: v.incident})
	if err != nil {
		return api.FromStatus(err)
	}
	var show objectWriter
	switch {
	case v.output == "table":
		_, narrowed := parameters.GetFields()["namespace"]
		show = &tableWriter{Verbs: v, namespaces: !narrowed}
	case v.output == "yaml":
		show = &yamlWriter{Verbs: v}
	case strings.Contains(target, "/"):
		show = &jsonWriter{Verbs: v}
	default:
		show = &jsonListWriter{Verbs: v}
	}
	if strings.Contains(target, "/") && !managed && v.output != "table" {
		show = withoutManaged{show}
	}
	notes := 0
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			err = fault.New(fault.Failed, "ask again", "the answer ended too early")
		}
		if err != nil {
			// What was shown may be a part, and must not look like the whole.
			return errors.Join(show.flush(), api.FromStatus(err))
		}
		if s := event.GetSummary(); s != nil {
			if err := show.end(); err != nil {
				return err
			}
			if notes > maxNotes {
				v.Note("and %d more remarks", notes-maxNotes)
			}
			if s.GetUndecodable() > 0 {
				v.Note("%d objects could not be decoded", s.GetUndecodable())
			}
			if s.GetStale() != "" {
				v.Note("the answer may lag behind: %s", s.GetStale())
			}
			if v.output == "table" && s.GetObjects() == 0 && s.GetUndecodable() == 0 {
				v.Note("nothing found")
			}
			return nil
		}
		for _, o := range event.GetObjects() {
			if o.GetNote() != "" {
				if notes++; notes <= maxNotes {
					v.Note("%s", remark(o))
				}
			}
			if err := show.object(o); err != nil {
				return err
			}
		}
	}
}

func (v *Verbs) history(cmd *cobra.Command, action *halliganv1.Action, parameters *structpb.Struct) error {
	req := &halliganv1.HistoryRequest{
		ActionId: parameters.GetFields()["action"].GetStringValue(),
		Limit:    int64(parameters.GetFields()["limit"].GetNumberValue()),
	}
	ctx := cmd.Context()
	if err := v.connect(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, v.limit(action))
	defer cancel()
	stream, err := v.agent.History(ctx, req)
	if err != nil {
		return api.FromStatus(err)
	}
	var entries []*halliganv1.HistoryEntry
	for {
		entry, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return api.FromStatus(err)
		}
		entries = append(entries, entry)
	}
	switch {
	case v.output == "table" && req.ActionId != "":
		for _, e := range entries {
			v.showEntry(e)
		}
		return nil
	case v.output == "table" && len(entries) == 0:
		node := "this node"
		if s, err := v.agent.Status(ctx, &halliganv1.StatusRequest{}); err == nil && s.GetNode() != "" {
			node = s.GetNode()
		}
		v.Note("nothing was done from %s; each node keeps its own history", node)
		return nil
	case v.output == "table":
		return v.showHistory(entries)
	case req.ActionId != "" && len(entries) == 1:
		return v.PrintMessage(entries[0])
	}
	list := make([]json.RawMessage, 0, len(entries))
	for _, e := range entries {
		text, err := api.CanonicalJSON(e)
		if err != nil {
			return err
		}
		list = append(list, text)
	}
	text, err := json.Marshal(list)
	if err != nil {
		return err
	}
	return v.PrintJSON(text)
}

// remark is what the agent says about an object, which it may have named.
func remark(o *halliganv1.Object) string {
	if strings.Contains(o.GetNote(), o.GetName()) {
		return o.GetNote()
	}
	return objectName(line, o.GetResource(), o.GetNamespace(), o.GetName()) + ": " + o.GetNote()
}

// Note says something beside the answer.
func (v *Verbs) Note(text string, args ...any) {
	fmt.Fprintf(v.Err, "note: %s\n", line(fmt.Sprintf(text, args...)))
}

// age returns how long ago something was, as kubectl does: the largest unit,
// and below it the next where the first has one digit.
func age(d time.Duration) string {
	if d < 0 {
		d = 0
	}
	units := []struct {
		name string
		size time.Duration
	}{{"y", 365 * 24 * time.Hour}, {"d", 24 * time.Hour}, {"h", time.Hour}, {"m", time.Minute}, {"s", time.Second}}
	for i, u := range units {
		n := d / u.size
		if n == 0 {
			continue
		}
		out := fmt.Sprintf("%d%s", n, u.name)
		if rest := d % u.size; n < 10 && i+1 < len(units) && rest/units[i+1].size > 0 {
			out += fmt.Sprintf("%d%s", rest/units[i+1].size, units[i+1].name)
		}
		return out
	}
	return "0s"
}
