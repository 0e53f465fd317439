package cli

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
var reads = map[string]func(*app, *cobra.Command, *halliganv1.Action, *structpb.Struct) error{
	"get":     (*app).get,
	"history": (*app).history,
}

// maxNotes bounds how many remarks on single objects are shown.
const maxNotes = 10

func (a *app) status(ctx context.Context) error {
	if err := a.connect(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, a.limit(nil))
	defer cancel()
	s, err := a.agent.client.Status(ctx, &halliganv1.StatusRequest{})
	if err != nil {
		return api.FromStatus(err)
	}
	if a.output == "table" {
		a.showStatus(s)
		return nil
	}
	return a.printMessage(s)
}

func (a *app) get(cmd *cobra.Command, action *halliganv1.Action, parameters *structpb.Struct) error {
	target := parameters.GetFields()["target"].GetStringValue()
	managed := parameters.GetFields()["full"].GetBoolValue()
	if a.output != "table" {
		// Rows need no whole objects, which are what makes a list slow.
		for _, p := range action.GetParameters() {
			if p.GetName() == "full" {
				parameters.Fields["full"] = structpb.NewBoolValue(true)
			}
		}
	}
	ctx := cmd.Context()
	if err := a.connect(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, a.limit(action))
	defer cancel()
	stream, err := a.agent.client.Get(ctx, &halliganv1.GetRequest{Parameters: parameters})
	if err != nil {
		return api.FromStatus(err)
	}
	var show objectWriter
	switch {
	case a.output == "table":
		_, narrowed := parameters.GetFields()["namespace"]
		show = &tableWriter{app: a, namespaces: !narrowed}
	case a.output == "yaml":
		show = &yamlWriter{app: a}
	case strings.Contains(target, "/"):
		show = &jsonWriter{app: a}
	default:
		show = &jsonListWriter{app: a}
	}
	if strings.Contains(target, "/") && !managed && a.output != "table" {
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
				a.note("and %d more remarks", notes-maxNotes)
			}
			if s.GetUndecodable() > 0 {
				a.note("%d objects could not be decoded", s.GetUndecodable())
			}
			if s.GetStale() != "" {
				a.note("the answer may lag behind: %s", s.GetStale())
			}
			if a.output == "table" && s.GetObjects() == 0 && s.GetUndecodable() == 0 {
				a.note("nothing found")
			}
			return nil
		}
		for _, o := range event.GetObjects() {
			if o.GetNote() != "" {
				if notes++; notes <= maxNotes {
					a.note("%s", remark(o))
				}
			}
			if err := show.object(o); err != nil {
				return err
			}
		}
	}
}

func (a *app) history(cmd *cobra.Command, action *halliganv1.Action, parameters *structpb.Struct) error {
	req := &halliganv1.HistoryRequest{
		ActionId: parameters.GetFields()["action"].GetStringValue(),
		Limit:    int64(parameters.GetFields()["limit"].GetNumberValue()),
	}
	ctx := cmd.Context()
	if err := a.connect(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, a.limit(action))
	defer cancel()
	stream, err := a.agent.client.History(ctx, req)
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
	case a.output == "table" && req.ActionId != "":
		for _, e := range entries {
			a.showEntry(e)
		}
		return nil
	case a.output == "table" && len(entries) == 0:
		node := "this node"
		if s, err := a.agent.client.Status(ctx, &halliganv1.StatusRequest{}); err == nil && s.GetNode() != "" {
			node = s.GetNode()
		}
		a.note("nothing was done from %s; each node keeps its own history", node)
		return nil
	case a.output == "table":
		return a.showHistory(entries)
	case req.ActionId != "" && len(entries) == 1:
		return a.printMessage(entries[0])
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
	return a.printJSON(text)
}

// remark is what the agent says about an object, which it may have named.
func remark(o *halliganv1.Object) string {
	if strings.Contains(o.GetNote(), o.GetName()) {
		return o.GetNote()
	}
	return objectName(o.GetResource(), o.GetNamespace(), o.GetName()) + ": " + o.GetNote()
}

// note says something beside the answer.
func (a *app) note(text string, args ...any) {
	fmt.Fprintf(a.err, "note: %s\n", line(fmt.Sprintf(text, args...)))
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
