package export

import (
	"encoding/json"
	"fmt"
	"sort"
	"strings"

	"github.com/halligan-io/halligan/audit"
)

// Summary tells an event as one sentence. It holds text of unknown origin as it is:
// whoever shows it makes it safe for where it is shown.
func Summary(e audit.Event) string {
	var b strings.Builder
	who := "somebody"
	if e.Actor != nil && e.Actor.Person != "" {
		who = e.Actor.Person
		if e.Actor.Role != "" {
			who += " (" + e.Actor.Role + ")"
		}
	}
	what := strings.TrimSpace(e.Action + " " + Parameters(e.Parameters))
	say := func(format string, args ...any) { fmt.Fprintf(&b, format, args...) }
	switch e.Kind {
	case audit.Start:
		say("%s began to record", e.Origin)
	case audit.Stop:
		say("%s stopped in order", e.Origin)
	case audit.Seam:
		say("a new generation of the log begins")
	case audit.Login:
		say("%s logged in", who)
		if e.Actor != nil {
			say("%s%s", word(" from ", e.Actor.Source), word(" by ", e.Actor.Door))
		}
	case audit.Logout:
		say("%s logged out", who)
	case audit.Session:
		say("%s opened a session%s", who, word(": ", e.Action))
	case audit.SessionEnd:
		say("the session of %s ended", who)
	case audit.Relay:
		say("%s was passed on%s", who, word(" to ", e.Target))
	case audit.RelayEnd:
		say("the passed-on connection of %s%s ended", who, word(" to ", e.Target))
	case audit.Read:
		say("%s asked %s", who, what)
	case audit.Secret:
		say("%s was shown secrets: %s%s", who, what, word(" of ", e.Target))
	case audit.Intent:
		say("%s is about to %s", who, what)
	case audit.Objects:
		if len(e.Objects) > 0 {
			say("%d more objects ", len(e.Objects))
		}
		say("of %s", e.Of)
	case audit.Outcome:
		say("%s of %s: %s", strings.TrimSpace("outcome of "+e.Action), who, e.Outcome)
		if e.Settled {
			say(", found out later")
		}
	case audit.Refusal:
		say("%s was refused%s", who, word(" ", what))
	case audit.Alarm:
		say("alarm")
	case audit.Recording:
		if e.Chunk != nil {
			say("recording of session %s: %d bytes at %d", e.Chunk.Session, e.Chunk.Length, e.Chunk.Offset)
		}
	case audit.Held:
		say("kept an event for %s, whose log could not take it", e.Target)
	case audit.Adopted:
		say("took back an event that bastions had kept")
	case audit.Lost:
		say("%d events had no room", max(e.Count, 1))
	default:
		say("%s", e.Kind)
	}
	if objects := objectList(e); objects != "" {
		say(" on %s", objects)
	}
	say("%s%s%s", word(": ", e.Text), word("; error: ", e.Error), word("; reason: ", e.Reason))
	if e.Count > 1 && e.Kind != audit.Lost {
		say(" (%d times)", e.Count)
	}
	if e.Drill {
		say(" [drill]")
	}
	return b.String()
}

func word(before, text string) string {
	if text == "" {
		return ""
	}
	return before + text
}

func objectList(e audit.Event) string {
	if len(e.Objects) == 0 || e.Kind == audit.Objects {
		return ""
	}
	text := e.Objects[0].Key
	if n := max(e.ObjectCount, len(e.Objects)); n > 1 {
		text += fmt.Sprintf(" and %d more", n-1)
	}
	return text
}

// Parameters writes an action's parameters as NAME=VALUE, in order of their names.
func Parameters(raw json.RawMessage) string {
	var set map[string]any
	if len(raw) == 0 || json.Unmarshal(raw, &set) != nil {
		return string(raw)
	}
	if inner, nested := set["parameters"].(map[string]any); nested { // a call of the API
		delete(set, "parameters")
		for name, value := range inner {
			if _, taken := set[name]; !taken {
				set[name] = value
			}
		}
	}
	var words []string
	for name, value := range set {
		text, isText := value.(string)
		if !isText {
			data, _ := json.Marshal(value)
			text = string(data)
		}
		words = append(words, name+"="+text)
	}
	sort.Strings(words)
	return strings.Join(words, " ")
}
