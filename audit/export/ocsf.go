package export

import (
	"encoding/json"
	"net/netip"
	"strconv"
	"strings"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
)

// OCSFVersion is the version of the Open Cybersecurity Schema Framework that OCSF
// follows.
const OCSFVersion = "1.9.0"

// The classes (uid in the schema) that events become.
const (
	baseEvent        = 0
	authentication   = 3002
	entityManagement = 3004
	apiActivity      = 6003
)

// classes says which class a kind of event becomes, and which of its activities.
// What is in no row is a base event.
var classes = map[audit.Kind]struct {
	class, activity int
	name            string
}{
	audit.Login:      {authentication, 1, "Logon"},
	audit.Logout:     {authentication, 2, "Logoff"},
	audit.Session:    {apiActivity, other, "Session"},
	audit.SessionEnd: {apiActivity, other, "Session End"},
	audit.Relay:      {apiActivity, other, "Relay"},
	audit.RelayEnd:   {apiActivity, other, "Relay End"},
	audit.Read:       {apiActivity, 2, "Read"},
	audit.Secret:     {apiActivity, 2, "Read"},
	audit.Intent:     {apiActivity, other, "Intent"},
	audit.Refusal:    {apiActivity, other, "Refusal"},
	audit.Objects:    {entityManagement, 3, "Update"},
	audit.Outcome:    {entityManagement, 3, "Update"},
}

var classNames = map[int]string{baseEvent: "Base Event", authentication: "Authentication", entityManagement: "Entity Management", apiActivity: "API Activity"}

// other is the schema's number for what it has none for.
const other = 99

type object = map[string]any

// OCSF writes an event as one OCSF event: logins as Authentication, what was asked
// as API Activity, what became of objects as Entity Management, the rest as base
// events. raw_data is the entry of the log, byte for byte.
func OCSF(e Entry) ([]byte, error) {
	ev := e.Event
	row, known := classes[ev.Kind]
	if !known {
		row.activity, row.name = other, string(ev.Kind)
	}
	if row.class == entityManagement && len(ev.Objects) > 0 {
		row.activity, row.name = operation(ev.Objects[0].Operation)
	}
	o := object{
		"activity_id": row.activity, "activity_name": row.name,
		"category_uid": row.class / 1000, "class_uid": row.class, "class_name": classNames[row.class],
		"type_uid": row.class*100 + row.activity, "type_name": classNames[row.class] + ": " + row.name,
		"time": stamp(ev.Time), "message": neutral.LineMax(Summary(ev), 4096), "raw_data": string(e.Raw),
	}
	o["severity_id"], o["severity"] = ocsfSeverity(ev)
	o["status_id"], o["status"] = status(ev)
	set(o, "status_code", ev.ErrorCode)
	set(o, "status_detail", ev.Error)
	meta := object{"version": OCSFVersion, "uid": ev.ID, "original_event_uid": ev.ID, "sequence": ev.Seq, "log_name": ev.Origin, "event_code": string(ev.Kind),
		"product": object{"name": "Halligan", "vendor_name": "Halligan"}}
	set(meta, "correlation_uid", first(ev.Incident, ev.Of, ev.Session))
	if len(ev.Cut) > 0 {
		meta["is_truncated"] = true
	}
	if ev.Drill {
		meta["labels"] = []string{"drill"}
	}
	o["metadata"] = meta
	rest := object{}
	set(rest, "incident", ev.Incident)
	set(rest, "session", ev.Session)
	set(rest, "intent", ev.Of)
	set(rest, "plan_sha256", ev.PlanSHA256)
	set(rest, "outcome", ev.Outcome)
	set(rest, "via", ev.Via)
	switch row.class {
	case authentication:
		o["user"], o["dst_endpoint"], o["is_remote"] = user(ev.Actor), object{"hostname": ev.Origin}, ev.Actor != nil && ev.Actor.Source != ""
		o["src_endpoint"] = endpoint(ev.Actor)
		set(o, "auth_protocol", certificate(o, ev.Actor))
		if o["auth_protocol"] != nil {
			o["auth_protocol_id"] = other
		}
		if ev.Session != "" {
			o["session"] = object{"uid": ev.Session}
		}
	case apiActivity:
		o["actor"], o["src_endpoint"], o["dst_endpoint"] = actor(ev), endpoint(ev.Actor), object{"hostname": ev.Origin}
		api := object{"operation": first(ev.Action, string(ev.Kind)), "service": object{"name": "halligan"}}
		if ev.PlanID != "" {
			api["request"] = object{"uid": ev.PlanID}
		}
		o["api"] = api
		if resources := resources(ev); len(resources) > 0 {
			o["resources"] = resources
		}
		set(rest, "reason", ev.Reason)
	case entityManagement:
		o["actor"] = actor(ev)
		set(o, "comment", first(ev.Reason, ev.Text))
		if len(ev.Objects) > 0 {
			o["entity"] = entity(ev.Objects[0])
		} else {
			o["entity"] = object{"uid": first(ev.PlanID, ev.Of, ev.ID), "type": "plan"}
		}
		if len(ev.Objects) > 1 {
			rest["objects"] = resources(ev)
		}
	default:
		if ev.Actor != nil {
			rest["actor"] = actor(ev)
		}
	}
	if len(rest) > 0 {
		o["unmapped"] = rest
	}
	data, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	return neutral.JSON(data), nil
}

func set(o object, name, value string) {
	if value != "" {
		o[name] = value
	}
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

func operation(name string) (int, string) {
	switch name {
	case "create":
		return 1, "Create"
	case "delete":
		return 4, "Delete"
	}
	return 3, "Update"
}

func ocsfSeverity(e audit.Event) (int, string) {
	switch severity(e) {
	case sevAlert:
		return 4, "High"
	case sevError, sevWarning:
		return 3, "Medium"
	case sevNotice:
		return 2, "Low"
	}
	return 1, "Informational"
}

// status is what came of it; an intent has come to nothing yet.
func status(e audit.Event) (int, string) {
	switch {
	case e.Kind == audit.Intent:
		return 0, "Unknown"
	case e.Kind == audit.Refusal || e.ErrorCode != "" && e.Outcome == "":
		return 2, "Failure"
	case e.Outcome == "partial" || e.Outcome == "unverified" || e.Outcome == "unknown":
		return other, e.Outcome
	case failed(e):
		return 2, "Failure"
	}
	return 1, "Success"
}

func user(a *audit.Actor) object {
	if a == nil || a.Person == "" {
		return object{"name": "unknown", "type_id": 0, "type": "Unknown"}
	}
	o := object{"name": a.Person}
	switch a.Credential {
	case string(trust.Automation), string(trust.Bastion), string(trust.Node):
		o["type_id"], o["type"] = 4, "Service"
	default:
		o["type_id"], o["type"] = 1, "User"
	}
	if a.Role != "" {
		o["groups"] = []object{{"name": a.Role, "type": "role"}}
	}
	set(o, "uid", a.Fingerprint)
	return o
}

func actor(e audit.Event) object {
	o := object{"user": user(e.Actor)}
	if e.Session != "" {
		o["session"] = object{"uid": e.Session}
	}
	return o
}

// endpoint is where somebody came from: an address, or a door of this machine.
func endpoint(a *audit.Actor) object {
	if a == nil {
		return object{"name": "unknown"}
	}
	if ap, err := netip.ParseAddrPort(a.Source); err == nil {
		return object{"ip": ap.Addr().Unmap().String(), "port": ap.Port()}
	}
	if ip, err := netip.ParseAddr(a.Source); err == nil {
		return object{"ip": ip.Unmap().String()}
	}
	return object{"name": first(a.Source, a.Door, "local")}
}

// certificate adds the certificate that somebody logged in with, and returns how.
func certificate(o object, a *audit.Actor) string {
	if a == nil {
		return ""
	}
	if a.Serial != "" && a.CA != "" {
		const sha256 = 3
		c := object{"serial_number": a.Serial, "issuer": a.CA, "subject": a.Person}
		if a.Fingerprint != "" {
			c["fingerprints"] = []object{{"algorithm_id": sha256, "algorithm": "SHA-256", "value": strings.TrimPrefix(a.Fingerprint, "SHA256:")}}
		}
		o["certificate"] = c
	}
	return first(a.Door, a.Credential)
}

// resources are the objects of an event.
func resources(e audit.Event) []object {
	var list []object
	for _, x := range e.Objects {
		o := entity(x)
		if len(x.Changes) > 0 {
			o["data"] = object{"changes": x.Changes}
		}
		list = append(list, o)
	}
	return list
}

// entity is an object of the cluster: what etcd calls it, its UID, and its revision.
func entity(x audit.Object) object {
	o := object{"name": x.Key, "type": "kubernetes object"}
	set(o, "uid", x.UID)
	if v := max(x.RevisionAfter, x.RevisionBefore); v != 0 {
		o["version"] = strconv.FormatInt(v, 10)
	}
	return o
}
