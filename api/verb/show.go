package verb

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/neutral"
)

// maxShown is how many objects of a plan or result are shown; the rest is
// counted. -o json shows all.
const maxShown = 10

// maxText bounds one text of others on a line, in bytes.
const maxText = 400

func line(s string) string { return neutral.LineMax(s, maxText) }

// row prints one fact of a block.
func row(w io.Writer, name, text string) {
	if text != "" {
		fmt.Fprintf(w, "  %-9s %s\n", name, text)
	}
}

// ShowPlan prints the beginning of a plan: what whoever made it has to see.
func (v *Verbs) ShowPlan(w io.Writer, p *halliganv1.Plan) { showPlan(w, p, maxShown, line) }

// ShowWhole prints every object of a plan and every text in full: whoever signs
// that it may be applied has to have seen all of it.
func (v *Verbs) ShowWhole(w io.Writer, p *halliganv1.Plan) {
	showPlan(w, p, len(p.GetObjects()), neutral.Line)
}

func showPlan(w io.Writer, p *halliganv1.Plan, most int, line func(string) string) {
	var b bytes.Buffer // one write, so that a pipe has all of it or nothing
	fmt.Fprintf(&b, "Plan %s: %s\n", line(p.GetId()), line(p.GetSummary()))
	row(&b, "who", fmt.Sprintf("%s as %s", line(p.GetActor()), line(p.GetRole())))
	row(&b, "reason", reason(line, p.GetReason(), p.GetIncident()))
	where := fmt.Sprintf("%s, cluster %s", line(p.GetNode()), aside(line(orElse(p.GetClusterName(), p.GetCluster())), clusterID(p)))
	if p.GetRevision() != 0 { // the evidence of a lost node does not say
		where += fmt.Sprintf(", revision %d", p.GetRevision())
	}
	row(&b, "where", where)
	row(&b, "via", aside(line(p.GetVia()), line(p.GetViaReason())))
	row(&b, "undoes", line(p.GetUndoes()))
	if len(p.GetObjects()) > 0 {
		row(&b, "expires", moment(p.GetExpires()))
	}
	for _, o := range p.GetObjects()[:min(most, len(p.GetObjects()))] {
		fmt.Fprintf(&b, "%s %s\n", line(o.GetOperation()), objectName(line, o.GetResource(), o.GetNamespace(), o.GetName()))
		row(&b, "key", line(o.GetKey()))
		seen := "the key must not exist"
		if o.GetRevision() != 0 {
			seen = fmt.Sprintf("revision %d", o.GetRevision())
		}
		row(&b, "uid", orElse(o.GetUid(), "unknown")+", "+seen)
		for _, c := range o.GetChanges() {
			fmt.Fprintf(&b, "  %s: %s -> %s\n", line(c.GetPath()), side(line, c.GetBefore()), side(line, c.GetAfter()))
		}
		for _, t := range o.GetWarnings() {
			fmt.Fprintf(&b, "  warning: %s\n", line(t))
		}
	}
	if more := len(p.GetObjects()) - most; more > 0 {
		fmt.Fprintf(&b, "and %d more objects, %d in all; -o json shows each\n", more, len(p.GetObjects()))
	}
	for _, part := range []struct {
		name  string
		texts []string
	}{{"warning", p.GetWarnings()}, {"needs", p.GetNeeds()}} {
		for _, t := range part.texts {
			fmt.Fprintf(&b, "%s: %s\n", part.name, line(t))
		}
	}
	if p.GetApprovalsNeeded() > 0 {
		fmt.Fprintf(&b, "needs: %s\n", line(signatures(p)))
	}
	if len(p.GetBypassed()) > 0 {
		fmt.Fprintf(&b, "bypassed: %s\n", line(strings.Join(p.GetBypassed(), "; ")))
	}
	_, _ = b.WriteTo(w)
}

// clusterID is what stands beside the name of a plan's cluster.
func clusterID(p *halliganv1.Plan) string {
	if p.GetClusterName() == "" {
		return ""
	}
	return line(p.GetCluster())
}

// side is one side of a diff.
func side(line func(string) string, s string) string {
	if s == "" {
		return "(absent)"
	}
	return line(s)
}

func aside(s, more string) string {
	if more == "" {
		return s
	}
	return s + " (" + more + ")"
}

func reason(line func(string) string, why, incident string) string {
	why = line(why)
	if incident != "" {
		why += " [" + line(incident) + "]"
	}
	return strings.TrimSpace(why)
}

func objectName(line func(string) string, resource, namespace, name string) string {
	if namespace != "" {
		name = namespace + "/" + name
	}
	return line(resource + " " + name)
}

func moment(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().UTC().Format(time.RFC3339)
}

// nothingChanged is what came of a plan without any object.
const nothingChanged = "nothing was changed"

func (v *Verbs) showResult(w io.Writer, r *halliganv1.Result) {
	var b bytes.Buffer
	done := 0
	for _, o := range r.GetObjects() {
		if o.GetOutcome() == "applied" {
			done++
		}
	}
	if r.GetResult() == "applied" && len(r.GetPlan().GetObjects()) == 0 {
		fmt.Fprintln(w, nothingChanged)
		return
	}
	fmt.Fprintf(&b, "%s: %d of %d objects%s\n", line(r.GetResult()), done, max(len(r.GetPlan().GetObjects()), len(r.GetObjects())), timings(r.GetTimingsMs()))
	if len(r.GetObjects()) > 1 {
		showFailures(&b, r.GetObjects()) // what became of one is said by the error
	}
	if done > 0 && canUndo(r.GetPlan()) {
		fmt.Fprintf(&b, "undo with: halligan undo %s\n", line(r.GetAction()))
	}
	_, _ = b.WriteTo(w)
}

// canUndo reports whether to offer an undo. The agent decides; but it never
// creates Secrets, nor again what it could not read, which has no UID here.
func canUndo(p *halliganv1.Plan) bool {
	return !slices.ContainsFunc(p.GetObjects(), func(o *halliganv1.PlannedObject) bool {
		return o.GetOperation() == "delete" && (o.GetUid() == "" || o.GetResource() == "secrets")
	})
}

func showFailures(w io.Writer, objects []*halliganv1.ObjectResult) {
	bad, untried := 0, 0
	for _, o := range objects {
		switch {
		case o.GetOutcome() == "applied":
			continue
		case o.GetOutcome() == "skipped" && strings.HasPrefix(o.GetError(), "not tried"):
			untried++
			continue
		}
		if bad++; bad <= maxShown {
			fmt.Fprintf(w, "  %s: %s\n", aside(line(o.GetKey()), line(o.GetOutcome())), line(o.GetError()))
		}
	}
	if bad > maxShown {
		fmt.Fprintf(w, "  and %d more\n", bad-maxShown)
	}
	if untried > 0 {
		fmt.Fprintf(w, "  %d not tried\n", untried)
	}
}

// timings says how long an action and its plan took; -o json has every step.
func timings(ms map[string]float64) string {
	total, known := ms["total"]
	if !known {
		return ""
	}
	text := fmt.Sprintf(" in %.4g ms", total)
	if plan, known := ms["plan"]; known {
		text += fmt.Sprintf(" (planned in %.4g ms)", plan)
	}
	return text
}

// progress shows how far an action is, on a terminal only.
func (v *Verbs) progress(p *halliganv1.Progress) {
	if !v.ErrTTY || p.GetTotal() <= 1 {
		return
	}
	failed := ""
	if p.GetFailed() > 0 {
		failed = fmt.Sprintf(", %d failed", p.GetFailed())
	}
	// CSI K clears to the end of the line.
	fmt.Fprintf(v.Err, "\r%d of %d objects%s, %.0f/s\x1b[K", p.GetDone(), p.GetTotal(), failed, p.GetPerSecond())
}

func (v *Verbs) endProgress() {
	if v.ErrTTY {
		fmt.Fprint(v.Err, "\r\x1b[K")
	}
}

// printResult prints the one object that a mutation prints for a script.
func (v *Verbs) printResult(r *halliganv1.Result) error {
	v.reported = true
	return v.PrintMessage(r)
}

func (v *Verbs) PrintMessage(m proto.Message) error {
	text, err := api.CanonicalJSON(m)
	if err != nil {
		return err
	}
	return v.PrintJSON(text)
}

// PrintJSON prints JSON in the chosen form.
func (v *Verbs) PrintJSON(text []byte) error {
	text = neutral.JSON(text)
	if v.output == "yaml" {
		var err error
		if text, err = yaml.JSONToYAML(text); err != nil {
			return err
		}
	}
	return v.print(string(bytes.TrimSuffix(text, []byte("\n"))) + "\n")
}

// print writes an answer: as it is for a program, neutralised for a person.
func (v *Verbs) print(s string) error {
	if v.OutTTY {
		s = neutral.Text(s)
	}
	_, err := io.WriteString(v.Out, s)
	return err
}

// objectWriter shows objects as they come.
type objectWriter interface {
	object(*halliganv1.Object) error
	// flush shows what is held back, end also closes what is open.
	flush() error
	end() error
}

// tableWriter shows one line for each object, aligned in blocks.
type tableWriter struct {
	*Verbs
	namespaces bool // show the column
	block      []*halliganv1.Object
	headed     bool
}

// tableBlock is how many rows share their column widths; it bounds memory.
const tableBlock = 1000

func (t *tableWriter) object(o *halliganv1.Object) error {
	if t.block = append(t.block, o); len(t.block) < tableBlock {
		return nil
	}
	return t.flush()
}

func (t *tableWriter) flush() error {
	if len(t.block) == 0 {
		return nil
	}
	if !t.headed {
		t.namespaces = t.namespaces && slices.ContainsFunc(t.block, func(o *halliganv1.Object) bool { return o.GetNamespace() != "" })
	}
	var b bytes.Buffer // the writer writes each cell by itself
	w := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	put := func(namespace string, cells ...string) {
		if t.namespaces {
			cells = append([]string{namespace}, cells...)
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	if !t.headed {
		put("NAMESPACE", "NAME", "STATE", "AGE", "REVISION")
		t.headed = true
	}
	for _, o := range t.block {
		born := "-"
		if o.GetCreated() != nil {
			born = age(t.Now().Sub(o.GetCreated().AsTime()))
		}
		put(line(o.GetNamespace()), line(o.GetName()), orDash(o.GetState()), born, fmt.Sprint(o.GetRevision()))
	}
	t.block = t.block[:0]
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := b.WriteTo(t.Out)
	return err
}

func (t *tableWriter) end() error { return t.flush() }

func orDash(s string) string { return orElse(s, "-") }

func orElse(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return line(s)
}

// jsonWriter shows one object.
type jsonWriter struct{ *Verbs }

func (j *jsonWriter) object(o *halliganv1.Object) error {
	if o.GetJson() == "" {
		return nil // its note says why
	}
	var b bytes.Buffer
	if err := json.Indent(&b, []byte(o.GetJson()), "", "  "); err != nil {
		return noJSON(o, err)
	}
	return j.PrintJSON(b.Bytes())
}

func noJSON(o *halliganv1.Object, err error) error {
	return fmt.Errorf("the agent sent no JSON for %s: %w", o.GetKey(), err)
}

func (j *jsonWriter) flush() error { return nil }
func (j *jsonWriter) end() error   { return nil }

// withoutManaged leaves out who manages which field, as kubectl does.
type withoutManaged struct{ objectWriter }

func (w withoutManaged) object(o *halliganv1.Object) error {
	// What does not have the shape of an object is shown as it is.
	var whole, metadata map[string]json.RawMessage
	if json.Unmarshal([]byte(o.GetJson()), &whole) == nil && json.Unmarshal(whole["metadata"], &metadata) == nil && metadata["managedFields"] != nil {
		delete(metadata, "managedFields")
		var err error
		if whole["metadata"], err = json.Marshal(metadata); err != nil {
			return err
		}
		text, err := json.Marshal(whole)
		if err != nil {
			return err
		}
		o.Json = string(text)
	}
	return w.objectWriter.object(o)
}

// jsonListWriter shows objects as a List of the Kubernetes API, item by item.
type jsonListWriter struct {
	*Verbs
	open bool
}

func (j *jsonListWriter) object(o *halliganv1.Object) error {
	if o.GetJson() == "" {
		return nil
	}
	before := ",\n"
	if !j.open {
		before, j.open = listHead, true
	}
	item := bytes.NewBufferString(before)
	if err := json.Compact(item, []byte(o.GetJson())); err != nil {
		return noJSON(o, err)
	}
	return j.print(string(neutral.JSON(item.Bytes())))
}

const listHead = `{"apiVersion":"v1","kind":"List","items":[` + "\n"

// flush leaves the list open: nobody shall take a part for the whole.
func (j *jsonListWriter) flush() error { return nil }

func (j *jsonListWriter) end() error {
	if !j.open {
		return j.print(listHead + "]}\n")
	}
	return j.print("\n]}\n")
}

// yamlWriter shows each object as a document.
type yamlWriter struct {
	*Verbs
	documents int
}

func (y *yamlWriter) object(o *halliganv1.Object) error {
	if o.GetJson() == "" {
		return nil
	}
	if y.documents++; y.documents > 1 {
		if err := y.print("---\n"); err != nil {
			return err
		}
	}
	return y.PrintJSON([]byte(o.GetJson()))
}

func (y *yamlWriter) flush() error { return nil }
func (y *yamlWriter) end() error   { return nil }

func (v *Verbs) showHistory(entries []*halliganv1.HistoryEntry) error {
	w := tabwriter.NewWriter(v.Out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "TIME\tACTION-ID\tRESULT\tOBJECTS\tWHO\tSUMMARY")
	for _, e := range entries {
		result := line(e.GetResult())
		if e.GetUndoneBy() != "" {
			result += ", undone"
		}
		if e.GetAlone() {
			result += ", alone"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d/%d\t%s\t%s\n", moment(e.GetTime()), line(e.GetActionId()), result,
			e.GetApplied(), e.GetObjects(), line(e.GetActor()), line(e.GetSummary()))
	}
	return w.Flush()
}

func (v *Verbs) showEntry(e *halliganv1.HistoryEntry) {
	if e.GetPlan() != nil {
		v.ShowPlan(v.Out, e.GetPlan())
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s: %d of %d objects, by %s at %s\n", line(e.GetResult()), e.GetApplied(), e.GetObjects(), line(e.GetActor()), moment(e.GetTime()))
	showFailures(&b, e.GetResults())
	if e.GetDoor() != "" {
		fmt.Fprintf(&b, "came in: %s\n", line(strings.Join(nonEmpty("through "+e.GetDoor(), prefixed("from ", e.GetSource()), prefixed("with ", e.GetCredential())), " ")))
	}
	if len(e.GetApprovedBy()) > 0 {
		fmt.Fprintf(&b, "approved by: %s\n", line(strings.Join(e.GetApprovedBy(), ", ")))
	}
	if e.GetAlone() {
		fmt.Fprintf(&b, "applied alone: without the approval that it needed\n")
	}
	if e.GetUndoneBy() != "" {
		fmt.Fprintf(&b, "undone by: %s\n", line(e.GetUndoneBy()))
	} else if e.GetApplied() > 0 && canUndo(e.GetPlan()) {
		fmt.Fprintf(&b, "undo with: halligan undo %s\n", line(e.GetActionId()))
	}
	_, _ = b.WriteTo(v.Out)
}

func (v *Verbs) showStatus(s *halliganv1.StatusResponse) {
	var b bytes.Buffer
	e := s.GetEtcd()
	fmt.Fprintf(&b, "%s\n", line(s.GetNode()))
	row(&b, "agent", fmt.Sprintf("%s, %s", line(s.GetVersion()), moment(s.GetTime())))
	row(&b, "node", line(s.GetDistribution()))
	row(&b, "cluster", line(s.GetCluster()))
	row(&b, "you", v.you(s))
	showBundle(&b, s.GetBundle())
	if e.GetError() != "" && e.GetVersion() == "" {
		row(&b, "etcd", fmt.Sprintf("%s does not answer: %s", line(e.GetEndpoint()), line(e.GetError())))
	} else {
		showEtcd(&b, e)
	}
	row(&b, "local API", LocalAPI(s.GetLocalApi()))
	records := fmt.Sprintf("%s used, %s free", size(s.GetStateUsedBytes()), size(s.GetStateFreeBytes()))
	if n := s.GetStateSlots(); n > 0 {
		records += fmt.Sprintf(", room for %d more on a full disk", n)
	}
	row(&b, "records", records)
	row(&b, "evidence", Evidence(s.GetAudit()))
	for _, resource := range slices.Sorted(maps.Keys(s.GetEncryption())) {
		row(&b, "encrypts", line(resource)+" with "+line(s.GetEncryption()[resource]))
	}
	if s.GetReadOnly() != "" {
		row(&b, "mutations", "refused: "+line(s.GetReadOnly()))
	} else {
		row(&b, "mutations", "possible")
	}
	warnings := s.GetWarnings()
	if s.GetCredentialExpires() != nil {
		warnings = append(nonEmpty(Renew(s.GetCredentialExpires().AsTime(), v.Now())), warnings...)
	}
	for _, w := range warnings {
		fmt.Fprintf(&b, "warning: %s\n", line(w))
	}
	_, _ = b.WriteTo(v.Out)
}

// you says whom the agent takes the caller for.
func (v *Verbs) you(s *halliganv1.StatusResponse) string {
	text := fmt.Sprintf("%s as %s", line(s.GetActor()), line(s.GetRole()))
	if s.GetDoor() != "" && s.GetDoor() != "console" { // whose actors say so themselves
		text += " through " + line(s.GetDoor())
	}
	if s.GetCredentialExpires() != nil {
		text += ", " + Ends(s.GetCredentialExpires().AsTime(), v.Now())
	}
	return text
}

// Ends says when a credential does, in words.
func Ends(at, now time.Time) string {
	when := at.UTC().Format(time.RFC3339)
	if left := at.Sub(now); left > 0 {
		return fmt.Sprintf("credential ends in %s, at %s", age(left), when)
	}
	return fmt.Sprintf("credential ended %s ago, at %s", age(now.Sub(at)), when)
}

// renewBelow is how much time left is worth a warning: a weekend and some.
const renewBelow = 72 * time.Hour

// Renew returns the warning that a credential is due, "" where it is not.
func Renew(at, now time.Time) string {
	if at.Sub(now) >= renewBelow {
		return ""
	}
	return "your " + Ends(at, now) + "; have it renewed: halligan ca renew"
}

// Evidence says in one line how a log is, "" where nobody told. What is wrong with it
// stands among the warnings.
func Evidence(a *halliganv1.AuditStatus) string {
	if a == nil {
		return ""
	}
	text := fmt.Sprintf("%d events, %d signed", a.GetEvents(), a.GetSigned())
	for _, witness := range slices.Sorted(maps.Keys(a.GetWitnessed())) {
		text += fmt.Sprintf(", %d witnessed by %s", a.GetWitnessed()[witness], line(strings.TrimPrefix(witness, "halligan.io/witness/")))
	}
	return text + fmt.Sprintf("; %s, and room for %d events when the disk is full", size(a.GetBytes()), a.GetReserve())
}

// LocalAPI says in one line how the node's own API server is, "" where it is not
// asked. What is wrong with it stands among the warnings.
func LocalAPI(a *halliganv1.LocalAPIStatus) string {
	if a == nil {
		return ""
	}
	text := line(a.GetEndpoint()) + " "
	switch {
	case a.GetProbed() == nil:
		return text + "was not asked yet"
	case a.GetLatencyMs() == 0:
		return text + "cannot be used"
	case a.GetReady():
		text += "ready"
	default:
		text += "not ready"
	}
	text += fmt.Sprintf(", %.4g ms", a.GetLatencyMs())
	if a.GetFlowControl() != "" {
		text += ", flow control " + line(a.GetFlowControl())
		if a.GetExempt() {
			text += ", exempt"
		} else {
			text += ", not exempt"
		}
	}
	return text
}

// showBundle shows which signed bundle is in force.
func showBundle(w io.Writer, b *halliganv1.BundleStatus) {
	if b == nil {
		return
	}
	row(w, "bundle", fmt.Sprintf("policy %d, inventory %d, revocations %d, signed %s, fresh until %s",
		b.GetPolicyVersion(), b.GetInventoryVersion(), b.GetRevocationsVersion(), moment(b.GetSigned()), moment(b.GetFreshUntil())))
}

func (v *Verbs) showWhoami(s *halliganv1.StatusResponse) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s\n", line(s.GetActor()))
	row(&b, "role", line(s.GetRole()))
	row(&b, "door", line(s.GetDoor()))
	row(&b, "agent", aside(line(s.GetNode()), line(s.GetCluster())))
	if s.GetCredentialExpires() != nil {
		row(&b, "until", Ends(s.GetCredentialExpires().AsTime(), v.Now()))
	}
	_, _ = b.WriteTo(v.Out)
}

func nonEmpty(parts ...string) []string {
	return slices.DeleteFunc(parts, func(s string) bool { return s == "" })
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}

// showEtcd shows what a member of etcd has answered.
func showEtcd(w io.Writer, e *halliganv1.EtcdStatus) {
	quorum := "no quorum: reads only"
	if e.GetQuorum() {
		quorum = "quorum"
	}
	row(w, "etcd", fmt.Sprintf("%s %s, %s, %.3g ms", line(e.GetEndpoint()), line(e.GetVersion()), quorum, e.GetLatencyMs()))
	row(w, "member", fmt.Sprintf("%s, leader %s, revision %d", line(e.GetMemberId()), orDash(e.GetLeaderId()), e.GetRevision()))
	if e.GetDbQuotaBytes() > 0 {
		row(w, "database", fmt.Sprintf("%s of %s", size(e.GetDbSizeBytes()), size(e.GetDbQuotaBytes())))
	} else {
		row(w, "database", size(e.GetDbSizeBytes()))
	}
	row(w, "alarms", line(strings.Join(e.GetAlarms(), ", ")))
	row(w, "error", line(e.GetError()))
}

// size returns bytes in a binary unit.
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, u := float64(n)/1024, 0
	for ; f >= 1024 && u < len(units)-1; u++ {
		f /= 1024
	}
	return fmt.Sprintf("%.1f %ciB", f, units[u])
}
