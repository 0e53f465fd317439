package report

import (
	"bytes"
	"fmt"
	"io"
	"strings"
)

// Markdown writes the story for a post-mortem, in CommonMark with tables. No text of
// the evidence means anything in it.
func (s *Story) Markdown(w io.Writer) error {
	var b bytes.Buffer
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	say("# Incident %s\n", md(s.Incident))
	if s.Drill {
		say("**This was a drill.**\n")
	}
	if len(s.Problems) > 0 {
		say("## Before you rely on this\n")
		for _, p := range s.Problems {
			say("- **%s**", md(p))
		}
		say("")
	}
	say("## In short\n")
	for _, l := range s.Lead {
		say("%s\n", beginning(l))
	}
	for _, step := range s.Steps {
		say("- %s: %s", step.At.Format("15:04:05"), md(step.Who+": ")+md(step.Title)+md(step.Rest))
	}
	say("\n| | | |\n|---|---|---|")
	for _, f := range s.Facts {
		say("| %s | **%s** | %s |", md(f.Label), md(f.Value), md(f.Note))
	}
	if len(s.Actions) > 0 {
		say("\n## What was done")
	}
	for _, a := range s.Actions {
		say("\n### %d. %s\n", a.N, md(a.Title))
		if a.About != "" {
			say("%s\n", beginning(a.About))
		}
		if a.Reason != "" {
			say("> %s\n", beginning(a.Reason))
		}
		item := func(name, text string) {
			if text != "" {
				say("- %s: %s", name, md(text))
			}
		}
		say("- Outcome: **%s**", md(a.Outcome))
		item("Error", a.Error)
		item("By", a.By+after(", as ", a.Role))
		item("At", a.At+after(", through ", a.Via))
		item("Begun", a.Asked.Format("15:04:05.000")+" UTC"+after(", took ", a.Took()))
		item("After coming in", a.Since())
		item("Approved by", strings.Join(a.ApprovedBy, ", "))
		if a.Alone {
			say("- **Alone, with nobody's approval**")
		}
		item("Takes back", a.Undoes)
		item("Undone by", a.UndoneBy)
		item("Recorded", a.Note)
		for _, o := range a.Objects {
			say("\n%s%s\n", code(o.Key), md(after(" ", o.Outcome)+after("; ", o.Error)))
			if len(o.Changes) == 0 {
				continue
			}
			say("| field | before | after |\n|---|---|---|")
			for _, c := range o.Changes {
				say("| %s | %s | %s |", md(c.Path), md(c.Before), md(c.After))
			}
		}
		if n := a.ObjectCount - len(a.Objects); n > 0 {
			say("\nand %d more objects, which the log has", n)
		}
		say("")
		for _, p := range a.Proofs {
			witnessed := "no witness yet"
			if p.Witnessed {
				witnessed = "witnessed"
			}
			say("- Proof of the %s: event %d of %s (%s), %s", p.What, p.Seq, md(p.Origin), witnessed, code("halligan audit prove "+p.ID))
		}
	}
	say("\n## Timeline\n\n| time (UTC) | after | who | where | what |\n|---|---|---|---|---|")
	for _, m := range s.Timeline {
		if m.Minor {
			continue
		}
		text := md(m.Text)
		if m.Count > 1 {
			text += fmt.Sprintf(" (%d times)", m.Count)
		}
		say("| %s | %s | %s | %s | **%s** %s |", m.At.Format("15:04:05.000"), m.Since, md(m.Who), md(m.Origin), md(m.What), text)
	}
	if s.Minor > 0 {
		say("\nNot listed: %s, of further logins, of what people only looked at, and of how sessions ended.", plural(s.Minor, "event", "events"))
	}
	if len(s.People) > 0 {
		say("\n## Who took part\n\n| who | as | seen | actions | refusals | from | with |\n|---|---|---|---|---|---|---|")
		for _, p := range s.People {
			say("| %s | %s | %s to %s | %d | %d | %s | %s |", md(p.Name), md(strings.Join(p.Roles, ", ")), p.First.Format("15:04:05"), p.Last.Format("15:04:05"),
				p.Actions, p.Refusals, md(strings.Join(p.Sources, ", ")), md(strings.Join(p.Credentials, "; ")))
		}
	}
	if len(s.Sessions) > 0 {
		say("\n## Recorded sessions\n")
		for _, one := range s.Sessions {
			say("- %s: %s%s%s", code("halligan audit replay "+one.Name), md(one.Who), md(after(" ", one.What)+" at "+one.Origin+after(", ", one.Took())), md(after("; ", one.Problem)))
		}
	}
	say("\n## What proves this\n\nEach daemon writes down what it is about to do before it does it, in a transparency log that it signs, and\nothers countersign. All events above were checked against these logs on %s UTC.\n", s.Made.Format("2 January 2006 at 15:04:05"))
	for _, l := range s.Logs {
		say("- **%s**: %d events in log %s%s", md(l.Origin), l.Events, md(l.Lineage), md(after("; its key: ", l.VouchedBy)))
		for _, by := range l.Witnesses {
			say("  - witness %s, through event %d", md(by.By), by.Events)
		}
		if l.Unwitnessed > 0 {
			say("  - **the last %d are not yet witnessed**", l.Unwitnessed)
		}
	}
	say("\nTo check it yourself, offline: `halligan audit fetch evidence`, then `halligan audit verify evidence`.")
	_, err := w.Write(b.Bytes())
	return err
}

// md escapes everything that Markdown, HTML in it, tables, or automatic links could
// mean something by in the middle of a line, and no more, since people read the source
// too. Text was made one visible line before.
func md(s string) string {
	var b strings.Builder
	for i, r := range s {
		rest := s[i:]
		switch {
		case r == '<':
			b.WriteString("&lt;")
		case r == '>':
			b.WriteString("&gt;")
		case r == '&':
			b.WriteString("&amp;")
		case len(rest) >= 4 && strings.EqualFold(rest[:4], "www."):
			// GitHub's Markdown makes links of these; an entity means only its character.
			fmt.Fprintf(&b, "&#%d;", r)
		case strings.ContainsRune("\\`*_[]|~", r), strings.HasPrefix(rest, "://"):
			b.WriteByte('\\')
			b.WriteRune(r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// beginning is md for the beginning of a line, where more is a sign: of a heading, a
// list, a rule.
func beginning(s string) string {
	n := len(s) - len(strings.TrimLeft(s, "0123456789"))
	if n < len(s) && (n == 0 && strings.IndexByte("#+-=", s[0]) >= 0 || n > 0 && (s[n] == '.' || s[n] == ')')) {
		return s[:n] + "\\" + s[n:n+1] + md(s[n+1:])
	}
	return md(s)
}

// code is text as code, for a place outside of tables.
func code(s string) string {
	longest, run := 0, 0
	for _, r := range s {
		if r != '`' {
			run = 0
			continue
		}
		run++
		longest = max(longest, run)
	}
	fence := strings.Repeat("`", longest+1)
	return fence + " " + s + " " + fence
}
