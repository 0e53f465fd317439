package verb

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
)

func TestResultError(t *testing.T) {
	for _, c := range []struct {
		result string
		code   fault.Code
		want   int
	}{
		{"applied", "", 0}, {"planned", "", 0}, {"planned", fault.Usage, 2}, {"partial", "", 1}, {"partial", fault.Stale, 1},
		{"unverified", "", 5}, {"unknown", "", 1}, {"unknown", fault.Unreachable, 1}, {"stale", "", 3}, {"refused", "", 4},
		{"awaiting-approval", "", 6}, {"failed", "", 1}, {"failed", fault.AuditUnavailable, 7}, {"", "", 1}, {"of a later release", "", 1},
		{"failed", "of a later release", 1},
	} {
		r := &halliganv1.Result{Action: "id", Result: c.result}
		if c.code != "" {
			r.Error = &halliganv1.Error{Code: string(c.code), Message: "m"}
		}
		err, got := resultError(r), 0
		if err != nil {
			got = fault.Of(err).Code.Exit()
		}
		if got != c.want {
			t.Errorf("%s with %q: exit status %d (%v), want %d", c.result, c.code, got, err, c.want)
		}
	}
}

func TestSmallForms(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 59 * time.Second: "59s", 90 * time.Second: "1m30s", 10 * time.Minute: "10m", 90 * time.Minute: "1h30m",
		26 * time.Hour: "1d2h", 40 * 24 * time.Hour: "40d", 800 * 24 * time.Hour: "2y70d",
	} {
		if got := age(d); got != want {
			t.Errorf("age(%s) = %s, want %s", d, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1 << 62: "4.0 EiB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %s, want %s", n, got, want)
		}
	}
	if got, want := fold(strings.Repeat("1234567 ", 11)), strings.Repeat("1234567 ", 9)+"1234567\n1234567"; got != want {
		t.Errorf("fold: %q", got)
	}
	steps := map[string]float64{"verify": 3, "total": 9, "plan": 2}
	if got, want := timings(steps), " in 9 ms (planned in 2 ms)"; got != want {
		t.Errorf("timings: %q, want %q", got, want)
	}
	if got := flagName(&halliganv1.Parameter{Name: "allNamespaces"}); got != "all-namespaces" {
		t.Errorf("flag %s", got)
	}
}

// TestShowWhole: what an approver signs cannot stand behind "and more", nor
// behind the first bytes of a text.
func TestShowWhole(t *testing.T) {
	plan := &halliganv1.Plan{Id: "p", ClusterName: "prod\x1b[2J", Reason: strings.Repeat("r", 2*maxText) + "why"}
	for i := range 2 * maxShown {
		plan.Objects = append(plan.Objects, &halliganv1.PlannedObject{Resource: "pods", Name: fmt.Sprint("pod-", i),
			Changes: []*halliganv1.FieldChange{{Path: "subjects", After: strings.Repeat("x", 2*maxText) + "evil"}}})
	}
	var part, whole bytes.Buffer
	v := &Verbs{}
	v.ShowPlan(&part, plan)
	v.ShowWhole(&whole, plan)
	for _, text := range []string{"pod-19", "xevil\n", "rwhy\n"} {
		if strings.Contains(part.String(), text) || !strings.Contains(whole.String(), text) {
			t.Errorf("%q: in part %v, in whole %v", text, strings.Contains(part.String(), text), strings.Contains(whole.String(), text))
		}
	}
	if strings.Contains(whole.String(), "more objects") || strings.Contains(part.String()+whole.String(), "\x1b") {
		t.Error(whole.String())
	}
}

// TestHiddenText: what a tenant or a colleague wrote acts on no terminal behind a
// pipe of ssh, keeps its meaning, and no form fails on it.
func TestHiddenText(t *testing.T) {
	const hidden = "\u009b31m \u202e \x7f \x1b[2J"
	object, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{"a": hidden}}})
	if err != nil {
		t.Fatal(err)
	}
	shows := map[string]func(*Verbs) error{
		"a message": func(v *Verbs) error {
			return v.PrintMessage(&halliganv1.HistoryEntry{Plan: &halliganv1.Plan{Reason: hidden}})
		},
		"an object": func(v *Verbs) error { return (&jsonWriter{v}).object(&halliganv1.Object{Json: string(object)}) },
		"a list": func(v *Verbs) error {
			list := &jsonListWriter{Verbs: v}
			return errors.Join(list.object(&halliganv1.Object{Json: string(object)}), list.end())
		},
		"documents": func(v *Verbs) error { return (&yamlWriter{Verbs: v}).object(&halliganv1.Object{Json: string(object)}) },
	}
	for name, show := range shows {
		for _, form := range []string{"json", "yaml"} {
			var out bytes.Buffer
			v := &Verbs{flags: flags{output: form}}
			v.Out = &out
			if err := show(v); err != nil {
				t.Errorf("%s as %s: %v", name, form, err)
			}
			acts := "\u009b\x7f\x1b"
			if form == "json" {
				acts += "\u202e"
			}
			if strings.ContainsAny(out.String(), acts) {
				t.Errorf("%s as %s: %q", name, form, &out)
			}
			var back any
			if err := yaml.Unmarshal(out.Bytes(), &back); err != nil || !strings.Contains(fmt.Sprint(back), hidden) {
				t.Errorf("%s as %s: %q means %v (%v)", name, form, &out, back, err)
			}
		}
	}
}
