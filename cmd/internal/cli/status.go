package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/verb"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

const (
	// renewBelow is how long a credential must last not to be spoken of.
	renewBelow = 72 * time.Hour
	// maxSkew is the difference of two clocks that is spoken of: certificates and
	// plans live by them.
	maxSkew = 5 * time.Second
	// maxDue is to how many nodes a bundle is carried at a time: they hold places at
	// the bastion meanwhile, and tell the others by way of it.
	maxDue = 16
	// maxCell bounds a text of others in a row, in bytes.
	maxCell = 160
)

// statusCommand shows all nodes side by side, or one of them in full.
func (a *app) statusCommand(v *verb.Verbs) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show what the agents can do at this moment", Args: verb.NoArguments,
		Long: "Show what the agents can do at this moment: all nodes of the bundle's inventory\nside by side, or with --node, or at a console, one in full. A node that does\n" +
			"not answer is shown as dead; the exit status is 8 if all are.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			socket, err := a.console()
			if err != nil {
				return err
			}
			if socket != "" || a.node != "" {
				return a.one(cmd)
			}
			return a.survey(cmd.Context(), v, cmd.Flag("output").Value.String() == "table")
		},
	}
}

// one shows a node in full, which is the verb of the same name that every door
// has.
func (a *app) one(cmd *cobra.Command) error {
	v := verb.New(a.Terminal, verb.Options{Connect: a.connect})
	defer v.Close()
	root := v.Root(nil)
	for _, name := range []string{"output", "timeout"} {
		if err := root.PersistentFlags().Set(name, cmd.Flag(name).Value.String()); err != nil {
			return err
		}
	}
	full, _, err := root.Find([]string{cmd.Name()})
	if err != nil {
		return err
	}
	full.SetContext(cmd.Context())
	return full.RunE(full, nil)
}

// survey asks all nodes.
func (a *app) survey(ctx context.Context, v *verb.Verbs, table bool) error {
	f, err := a.open()
	if err != nil {
		return err
	}
	b := f.bundles.Current()
	var hosts, beyond []bundle.Host
	for _, h := range b.Inventory.Nodes(a.cluster) {
		if slices.Contains(f.login.Clusters, h.Cluster) {
			hosts = append(hosts, h)
		} else {
			beyond = append(beyond, h)
		}
	}
	if len(hosts)+len(beyond) == 0 {
		return fault.New(fault.NotFound, "have the inventory completed", "the bundle's inventory has no nodes")
	}
	if err := f.way.ready(ctx); err != nil {
		return err
	}
	f.loose.Go(func() { f.way.lookAround(ctx) })
	var answers []answer
	for _, h := range beyond {
		answers = append(answers, answer{host: h, err: fault.New(fault.Unauthenticated, "ask for a certificate that names the cluster", "%s is not for cluster %s", f.login.Name(), h.Cluster)})
	}
	var due []*agent // whose bundle differs, for after the answer
	for r := range f.askAll(ctx, hosts) {
		if r.agent != nil && len(due) < maxDue && !sameBundle(r.status.GetBundle(), b) {
			due = append(due, r.agent)
		} else {
			r.agent.abandon()
		}
		answers = append(answers, r)
	}
	defer func() {
		for _, agent := range due {
			f.loose.Go(func() { _ = agent.Close() })
		}
	}()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	slices.SortFunc(answers, func(x, y answer) int {
		return cmp.Or(strings.Compare(x.host.Cluster, y.host.Cluster), naturally(x.host.Name, y.host.Name))
	})
	if table {
		err = a.showSurvey(f, answers)
	} else {
		err = printSurvey(v, answers)
	}
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(answers, func(r answer) bool { return r.err == nil }) {
		return allDead("no agent answers", answers)
	}
	return nil
}

// naturally orders cp-2 before cp-10.
func naturally(x, y string) int {
	return cmp.Or(cmp.Compare(len(x), len(y)), strings.Compare(x, y))
}

// skew returns how far the node's clock is ahead of this machine's.
func (r answer) skew() time.Duration {
	if r.status.GetTime() == nil {
		return 0
	}
	return r.status.GetTime().AsTime().Sub(r.begun.Add(r.took / 2))
}

// row is one node for a script.
type row struct {
	Node    string `json:"node"`
	Cluster string `json:"cluster"`
	Address string `json:"address"`
	// Alive: it let the caller in and answered.
	Alive       bool             `json:"alive"`
	LatencyMs   float64          `json:"latencyMs,omitempty"`
	ClockSkewMs float64          `json:"clockSkewMs,omitempty"`
	Status      json.RawMessage  `json:"status,omitempty"`
	Error       *json.RawMessage `json:"error,omitempty"`
}

func printSurvey(v *verb.Verbs, answers []answer) error {
	rows := make([]row, 0, len(answers))
	for _, r := range answers {
		one := row{Node: r.host.Name, Cluster: r.host.Cluster, Address: r.host.SSH().String(), Alive: r.err == nil}
		if r.err == nil {
			status, err := api.CanonicalJSON(r.status)
			if err != nil {
				return err
			}
			one.Status, one.LatencyMs, one.ClockSkewMs = status, ms(r.took), ms(r.skew())
		} else {
			text, err := api.CanonicalJSON(api.ErrorOf(api.FromStatus(r.err)))
			if err != nil {
				return err
			}
			one.Error = (*json.RawMessage)(&text)
		}
		rows = append(rows, one)
	}
	text, err := json.Marshal(rows)
	if err != nil {
		return err
	}
	return v.PrintJSON(text)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func (a *app) showSurvey(f *fleet, answers []answer) error {
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "NODE\tAGENT\tETCD\tAPI\tMUTATIONS\tANSWER\tCLOCK\tCREDENTIAL\tBUNDLE\tNOTE")
	var ends time.Time
	for _, r := range answers {
		if r.err != nil {
			e := api.FromStatus(r.err)
			state := "dead"
			if e.Code == fault.Unauthenticated {
				state = "no entry"
			}
			fmt.Fprintf(w, "%s\t%s\t-\t-\t-\t-\t-\t-\t-\t%s\n", r.host.ID(), state, cell(e.Message))
			continue
		}
		left := "-"
		if t := r.status.GetCredentialExpires(); t != nil {
			left = until(t.AsTime().Sub(a.Now()))
			if ends.IsZero() || t.AsTime().Before(ends) {
				ends = t.AsTime()
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%.3g ms\t%+.1fs\t%s\t%s\t%s\n", r.host.ID(), cell(r.status.GetVersion()), etcdCell(r.status.GetEtcd()), apiCell(r.status.GetLocalApi()), mutations(r.status),
			ms(r.took), math.Round(10*r.skew().Seconds())/10+0, left, bundleCell(r.status.GetBundle()), cell(strings.Join(remarks(r), "; ")))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	// A row without a note has no spaces at its end.
	for line := range strings.Lines(b.String()) {
		if _, err := fmt.Fprintln(a.Out, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	if ends.IsZero() {
		ends = f.login.NotAfter
	}
	if left := ends.Sub(a.Now()); left < renewBelow && f.login.Certificate != nil {
		a.note("your certificate ends in %s, at %s; renew it: %s", until(left), stamp(ends), f.renewal())
	}
	if mine := f.bundles.Current(); !mine.Fresh(f.clock.Now()) {
		a.note("this machine's bundle is stale since %s: its revocations may be out of date; fetch it anew", stamp(mine.FreshUntil()))
	}
	return nil
}

func cell(s string) string {
	if s == "" {
		return ""
	}
	return neutral.LineMax(s, maxCell)
}

// etcdCell says what the node's member of etcd can do.
func etcdCell(e *halliganv1.EtcdStatus) string {
	switch {
	case e.GetVersion() == "":
		return "no answer"
	case !e.GetQuorum():
		return "no quorum"
	case e.GetLeaderId() != "" && e.GetLeaderId() == e.GetMemberId():
		return "leader"
	}
	return "follower"
}

// apiCell says how the node's own API server is.
func apiCell(a *halliganv1.LocalAPIStatus) string {
	switch {
	case a.GetProbed() == nil: // nobody asks it, or nobody has yet
		return "-"
	case a.GetLatencyMs() == 0:
		return "no answer"
	case !a.GetReady():
		return "not ready"
	}
	return fmt.Sprintf("%.4g ms", a.GetLatencyMs())
}

func mutations(s *halliganv1.StatusResponse) string {
	if s.GetReadOnly() != "" {
		return "refused"
	}
	return "possible"
}

// bundleCell is policy.inventory.revocations.
func bundleCell(b *halliganv1.BundleStatus) string {
	if b == nil {
		return "-"
	}
	return fmt.Sprintf("%d.%d.%d", b.GetPolicyVersion(), b.GetInventoryVersion(), b.GetRevocationsVersion())
}

// remarks are what needs attention at a node, the most urgent first.
func remarks(r answer) []string {
	var all []string
	s := r.status
	if s.GetReadOnly() != "" {
		all = append(all, s.GetReadOnly())
	}
	if len(s.GetEtcd().GetAlarms()) > 0 {
		all = append(all, "etcd alarm "+strings.Join(s.GetEtcd().GetAlarms(), ", "))
	}
	if skew := r.skew(); skew.Abs() > maxSkew {
		all = append(all, "its clock differs from this machine's")
	}
	if e := s.GetEtcd().GetError(); e != "" {
		all = append(all, e)
	}
	return append(all, s.GetWarnings()...)
}

// until returns a time to come in days, or hours below two days.
func until(d time.Duration) string {
	switch {
	case d <= 0:
		return "over"
	case d >= 48*time.Hour:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	case d >= time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dm", int(d.Minutes()))
}
