package export

import (
	"crypto/sha256"
	"encoding/hex"
	"strconv"
	"strings"
	"time"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/neutral"
)

// element is the SD-ID. Names that are not registered hold a private enterprise
// number, and this project has none: 32473 is for use in documentation (RFC 5612).
const element = "halligan@32473"

// Facility log audit (RFC 5424, table 1), and severities (table 2).
const (
	facility = 13

	sevAlert   = 1
	sevError   = 3
	sevWarning = 4
	sevNotice  = 5
	sevInfo    = 6
)

// Lengths, in bytes: a receiver should take messages of 8,192 (RFC 5425, 4.3.1),
// and no host name, application name or identifier may be longer than its field
// (RFC 5424, 6).
const (
	maxHost, maxApp, maxID = 255, 48, 32
	maxParam, maxParams    = 400, 6000
	maxText                = 1200
)

// Syslog writes an event as an RFC 5424 message: a sentence for people, and in
// structured data what a machine filters by. sha256 is that of the whole entry,
// which the log has.
func Syslog(e Entry) ([]byte, error) {
	var b strings.Builder
	b.WriteString("<" + strconv.Itoa(facility*8+severity(e.Event)) + ">1 ")
	b.WriteString(e.Event.Time.UTC().Format("2006-01-02T15:04:05.000000Z") + " ")
	b.WriteString(token(e.Event.Origin, maxHost) + " " + token("halligan", maxApp) + " - " + token(string(e.Event.Kind), maxID) + " ")
	b.WriteString("[" + element)
	room := maxParams
	param := func(name, value string) {
		if value == "" {
			return
		}
		text := " " + name + `="` + paramValue(value, maxParam) + `"`
		if room -= len(text); room >= 0 {
			b.WriteString(text)
		}
	}
	sum := sha256.Sum256(e.Raw)
	param("id", e.Event.ID)
	param("seq", strconv.FormatUint(e.Event.Seq, 10))
	param("sha256", hex.EncodeToString(sum[:]))
	for _, f := range fields(e.Event) {
		param(f[0], f[1])
	}
	for _, o := range e.Event.Objects {
		param("object", o.Key)
	}
	// The mark says that the text is UTF-8 (RFC 5424, 6.4).
	b.WriteString("] \ufeff" + neutral.LineMax(Summary(e.Event), maxText))
	return []byte(b.String()), nil
}

// fields are what an event has beside its objects, by name.
func fields(e audit.Event) [][2]string {
	yes := func(b bool) string {
		if b {
			return "true"
		}
		return ""
	}
	var list [][2]string
	if a := e.Actor; a != nil {
		list = append(list, [2]string{"person", a.Person}, [2]string{"role", a.Role}, [2]string{"credential", a.Credential}, [2]string{"fingerprint", a.Fingerprint},
			[2]string{"serial", a.Serial}, [2]string{"door", a.Door}, [2]string{"source", a.Source}, [2]string{"late", yes(a.Late)})
	}
	return append(list, [2]string{"incident", e.Incident}, [2]string{"session", e.Session}, [2]string{"of", e.Of}, [2]string{"action", e.Action}, [2]string{"planId", e.PlanID},
		[2]string{"planSha256", e.PlanSHA256}, [2]string{"via", e.Via}, [2]string{"outcome", e.Outcome}, [2]string{"errorCode", e.ErrorCode}, [2]string{"target", e.Target},
		[2]string{"alone", yes(e.Alone)}, [2]string{"drill", yes(e.Drill)}, [2]string{"reason", e.Reason})
}

// token is a field of a header: printable US-ASCII without spaces.
func token(s string, most int) string {
	var b strings.Builder
	for _, r := range s {
		if b.Len() == most {
			break
		}
		if r <= ' ' || r > '~' {
			r = '?'
		}
		b.WriteRune(r)
	}
	if b.Len() == 0 {
		return "-"
	}
	return b.String()
}

var paramEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `]`, `\]`)

// paramValue escapes what ends a value (RFC 5424, 6.3.3), and before that what a
// line must not hold.
func paramValue(s string, most int) string { return paramEscapes.Replace(neutral.LineMax(s, most)) }

func severity(e audit.Event) int {
	switch {
	case e.Kind == audit.Alarm || e.Kind == audit.Lost:
		return sevAlert
	case e.Kind == audit.Outcome && failed(e):
		return sevError
	case e.Kind == audit.Refusal || e.Alone || e.Actor != nil && e.Actor.Late:
		return sevWarning
	case e.Kind == audit.Intent || e.Kind == audit.Outcome || e.Kind == audit.Objects || e.Kind == audit.Secret || e.Kind == audit.Held || e.Kind == audit.Adopted:
		return sevNotice
	}
	return sevInfo
}

// failed reports whether an outcome is not what was asked for.
func failed(e audit.Event) bool {
	switch e.Outcome {
	case "", "applied", "ok":
		return e.ErrorCode != ""
	}
	return true
}

// stamp is a time as OCSF wants it: milliseconds since 1970.
func stamp(t time.Time) int64 { return t.UnixMilli() }
