package verb

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// lookWithin is how long to wait for an agent that looks: the longest of its ways
// takes 90 s (agent/diagnose).
const lookWithin = 100 * time.Second

// Of a look for people: rows of each way, and suspects with their command lines.
// -o json has all.
const (
	topRows     = 5
	topRemedied = 3
)

func (v *Verbs) topCommand() *cobra.Command {
	req := &halliganv1.TopRequest{}
	cmd := &cobra.Command{
		Use: "top", Short: "Find who overloads the control plane, without the API server", Args: NoArguments,
		Long: fold("Looks in several ways at once: the objects and bytes in etcd, what is written to it, and who is connected to the API server of the agent's node. " +
			"Then names suspects, the worst first, with the evidence and with the commands that would stop each, the gentlest first. It changes nothing. " +
			"Owners are told only where etcd confirms them; text that a tenant can forge never gets into a command."),
		Example: "  halligan top\n  halligan top --by connections\n  halligan top --by writes --seconds 30\n  halligan top --by objects --by bytes --sample",
		RunE:    func(cmd *cobra.Command, _ []string) error { return v.top(cmd.Context(), req) },
	}
	cmd.Flags().StringSliceVar(&req.By, "by", nil, "`way` to look: objects, bytes, writes, connections or requests; may be repeated (default: all)")
	cmd.Flags().Uint32Var(&req.Seconds, "seconds", 0, "how long to watch writes, in `seconds` (default 5)")
	cmd.Flags().BoolVar(&req.Sample, "sample", false, "count all objects, but read only some of each kind and namespace")
	return cmd
}

func (v *Verbs) top(ctx context.Context, req *halliganv1.TopRequest) error {
	if err := v.connect(ctx); err != nil {
		return err
	}
	limit := lookWithin
	if v.timeout > 0 {
		limit = v.timeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	req.Reason, req.Incident = v.reason, v.incident
	stream, err := v.agent.Top(ctx, req)
	if err != nil {
		return api.FromStatus(err)
	}
	var findings []*halliganv1.Finding
	var suspects *halliganv1.Suspects
	for !suspects.GetFinal() {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			err = fault.New(fault.Failed, "look again", "the answer ended too early")
		}
		if err != nil {
			return api.FromStatus(err)
		}
		if f := event.GetFinding(); f != nil {
			// One way more than once is a connection that broke.
			findings = slices.DeleteFunc(findings, func(old *halliganv1.Finding) bool { return old.GetWay() == f.GetWay() })
			findings = append(findings, f)
		}
		if event.GetSuspects() != nil {
			suspects = event.GetSuspects()
		}
	}
	v.leadBack(ctx, suspects)
	if v.output != "table" {
		return v.printTop(findings, suspects)
	}
	var b bytes.Buffer
	showSuspects(&b, suspects.GetSuspects())
	slices.SortStableFunc(findings, func(a, b *halliganv1.Finding) int {
		return cmp.Or(min(len(b.GetRows()), 1)-min(len(a.GetRows()), 1), strings.Compare(a.GetWay(), b.GetWay()))
	})
	var blind []string
	for _, f := range findings {
		showFinding(&b, f)
		for _, text := range f.GetBlind() {
			if f.GetError() == "" && !slices.Contains(blind, text) {
				blind = append(blind, text)
			}
		}
	}
	if len(blind) > 0 {
		fmt.Fprint(&b, "\nNOT SEEN:\n")
	}
	for _, text := range blind {
		fmt.Fprintf(&b, "  %s\n", line(text))
	}
	return v.print(b.String())
}

// leadBack puts the flags that lead back to the agent into the commands.
func (v *Verbs) leadBack(ctx context.Context, suspects *halliganv1.Suspects) {
	if v.with.Where == nil || len(suspects.GetSuspects()) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	s, err := v.agent.Status(ctx, &halliganv1.StatusRequest{})
	if err != nil {
		return // any agent of the cluster will do
	}
	back := strings.Join(v.with.Where(&halliganv1.Plan{Node: s.GetNode(), ClusterName: s.GetCluster()}), " ")
	if back == "" {
		return
	}
	for _, one := range suspects.GetSuspects() {
		for _, r := range one.GetRemedies() {
			if rest, ok := strings.CutPrefix(r.GetCommand(), "halligan "); ok {
				r.Command = "halligan " + back + " " + rest
			}
		}
	}
}

func (v *Verbs) printTop(findings []*halliganv1.Finding, suspects *halliganv1.Suspects) error {
	var out struct {
		Findings []json.RawMessage `json:"findings"`
		Suspects []json.RawMessage `json:"suspects"`
	}
	out.Findings, out.Suspects = []json.RawMessage{}, []json.RawMessage{}
	for _, f := range findings {
		text, err := api.CanonicalJSON(f)
		if err != nil {
			return err
		}
		out.Findings = append(out.Findings, text)
	}
	for _, s := range suspects.GetSuspects() {
		text, err := api.CanonicalJSON(s)
		if err != nil {
			return err
		}
		out.Suspects = append(out.Suspects, text)
	}
	text, err := json.Marshal(out)
	if err != nil {
		return err
	}
	return v.PrintJSON(text)
}

func showSuspects(w io.Writer, suspects []*halliganv1.Suspect) {
	if len(suspects) == 0 {
		fmt.Fprint(w, "Nobody stands out.\n")
	}
	for i, s := range suspects {
		who := strings.Join(nonEmpty(s.GetWorkload(), s.GetUser()), ", ")
		if who == "" {
			who = "nobody known"
		}
		fmt.Fprintf(w, "%d. %s%s, score %.2f\n", i+1, line(who), line(prefixed(" in ", s.GetNamespace())), s.GetScore())
		for _, e := range s.GetEvidence() {
			fmt.Fprintf(w, "   %s\n", line(e))
		}
		if i >= topRemedied {
			continue
		}
		for _, r := range s.GetRemedies() {
			fmt.Fprintf(w, "     %s\n", neutral.Line(r.GetCommand()))
			for text := range strings.Lines(fold(line(r.GetEffect()))) {
				fmt.Fprintf(w, "       %s\n", strings.TrimSuffix(text, "\n"))
			}
		}
	}
}

func showFinding(w io.Writer, f *halliganv1.Finding) {
	fmt.Fprintf(w, "\n%s: %s (%s, %.0f ms)\n", strings.ToUpper(line(f.GetWay())), line(f.GetTitle()), quantity(f.GetTotal(), f.GetUnit()), f.GetTookMs())
	if f.GetError() != "" {
		fmt.Fprintf(w, "  blind: %s\n", line(f.GetError()))
	}
	if len(f.GetRows()) > 0 {
		t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		for _, r := range f.GetRows()[:min(topRows, len(f.GetRows()))] {
			fmt.Fprintf(t, "  %s\t%s\t%s\t%s\t%s\n", quantity(r.GetValue(), ""), cell(r.GetSubject()), cell(r.GetNamespace()), cell(r.GetOwner()), cell(r.GetDetail()))
		}
		_ = t.Flush()
	}
	if f.GetSampled() != "" {
		fmt.Fprintf(w, "  sampled: %s\n", line(f.GetSampled()))
	}
}

// cell is a text in a table.
func cell(s string) string {
	if s == "" {
		return "-"
	}
	return line(s)
}

// quantity is a number for people, with its unit.
func quantity(n float64, unit string) string {
	text := fmt.Sprintf("%.0f", n)
	if n != 0 && n < 10 && n != float64(int64(n)) {
		text = fmt.Sprintf("%.1f", n)
	}
	return strings.TrimSpace(text + " " + line(unit))
}
