package audit

import (
	"encoding/json"
	"time"
)

// Version of the event schema. A reader refuses what it does not know; a field is
// only ever added together with a new version.
const Version = 1

// MaxEvent bounds an encoded event in bytes: the length of an entry in a bundle of
// a tiled log is 16 bits wide (C2SP tlog-tiles).
const MaxEvent = 60 << 10

// Kind is what an event is about.
type Kind string

// Kinds are all of them.
var Kinds = []Kind{Start, Stop, Seam, Login, Logout, Session, SessionEnd, Relay, RelayEnd, Read, Secret, Intent, Objects, Outcome, Refusal, Alarm, Recording, Held, Adopted, Lost}

// The kinds. README's table of them is the schema's documentation.
const (
	// Start is the first event of a process, Stop the last one of an orderly end.
	// Start tells what the process found: version, events taken over, torn bytes.
	Start Kind = "start"
	Stop  Kind = "stop"
	// Seam is the first event of each generation but the first: it holds the last
	// checkpoint of the one before.
	Seam Kind = "seam"
	// Login and Logout are a connection that somebody authenticated; Session and
	// SessionEnd one shell, exec line or subsystem in it; Relay and RelayEnd a
	// connection that a bastion passed on.
	Login      Kind = "login"
	Logout     Kind = "logout"
	Session    Kind = "session"
	SessionEnd Kind = "session-end"
	Relay      Kind = "relay"
	RelayEnd   Kind = "relay-end"
	// Read is a question that was answered; Secret one whose answer holds secrets
	// or a recording, which is durable before the answer.
	Read   Kind = "read"
	Secret Kind = "secret"
	// Intent is an effect that is about to be tried, Objects more of its objects,
	// Outcome what became of it. Do writes them.
	Intent  Kind = "intent"
	Objects Kind = "objects"
	Outcome Kind = "outcome"
	// Refusal is something that somebody was refused.
	Refusal Kind = "refusal"
	// Alarm is what the daemon told people of beside all this.
	Alarm Kind = "alarm"
	// Recording is a piece of a recording of a session, as it was written.
	Recording Kind = "recording"
	// Held is an event of another log that this one keeps, since that one could
	// not; Adopted is the same event when its own log works again.
	Held    Kind = "held"
	Adopted Kind = "adopted"
	// Lost counts events of kinds that nobody waits for, which had no room.
	Lost Kind = "lost"
)

// Event is one entry of a log, as JSON. It never holds the value of a secret:
// parameters that are secret are hashed with a key (see Log.Hash).
type Event struct {
	Version int `json:"v"`
	// ID is unique and sorts by time. Seq counts the events of a log from 0,
	// without a gap, over all generations.
	ID  string `json:"id"`
	Seq uint64 `json:"seq"`
	// Time is the daemon's clock, which never goes back below what it has seen;
	// Uptime is CLOCK_BOOTTIME in nanoseconds, and Boot names the boot that it
	// counts from.
	Time   time.Time `json:"time"`
	Uptime int64     `json:"uptimeNs"`
	Boot   string    `json:"boot,omitempty"`
	// Origin is NODE.CLUSTER, or NAME.bastion.
	Origin string `json:"origin"`
	Kind   Kind   `json:"kind"`

	Actor    *Actor `json:"actor,omitempty"`
	Incident string `json:"incident,omitempty"`
	Reason   string `json:"reason,omitempty"`
	// Session joins the events of one connection, Of those of one intent: it is the
	// Intent's ID.
	Session string `json:"session,omitempty"`
	Of      string `json:"of,omitempty"`

	// Action is the row of the action table, or the API's method; PlanID and
	// PlanSHA256 are the plan's, which covers every object.
	Action     string          `json:"action,omitempty"`
	Parameters json.RawMessage `json:"parameters,omitempty"`
	PlanID     string          `json:"planId,omitempty"`
	PlanSHA256 string          `json:"planSha256,omitempty"`
	Undoes     string          `json:"undoes,omitempty"`
	// ApprovedBy are those who signed the plan; Alone says that nobody did although
	// somebody had to.
	ApprovedBy []Approval `json:"approvedBy,omitempty"`
	Alone      bool       `json:"alone,omitempty"`
	// Images is the SHA-256 of the sealed before-images, in hex.
	Images string `json:"imagesSha256,omitempty"`
	// Objects are what is or was changed; ObjectCount is how many there are, of
	// which an event may list only the first, the rest following as kind Objects.
	Objects     []Object `json:"objects,omitempty"`
	ObjectCount int      `json:"objectCount,omitempty"`
	// Via is etcd or api.
	Via string `json:"via,omitempty"`
	// Outcome is the result of an action (applied, partial, …), ok, failed or
	// refused; ErrorCode is that of internal/fault.
	Outcome   string `json:"outcome,omitempty"`
	ErrorCode string `json:"errorCode,omitempty"`
	Error     string `json:"error,omitempty"`
	// Settled says that a later process found the outcome out.
	Settled bool `json:"settled,omitempty"`
	// Chunk is of kind Recording.
	Chunk *Chunk `json:"chunk,omitempty"`
	// Count is how many like this one it stands for, where that is more than one.
	Count int `json:"count,omitempty"`
	// Text is one line more for people.
	Text string `json:"text,omitempty"`
	// Target is where a relayed connection goes, or whose log or recording is meant.
	Target string `json:"target,omitempty"`
	// Previous is the last checkpoint of the generation before, of kind Seam, with
	// its signatures; Payload an event of another log, of kinds Held and Adopted,
	// byte for byte; Receipts are what bastions signed for it.
	Previous string   `json:"previous,omitempty"`
	Payload  string   `json:"payload,omitempty"`
	Receipts []string `json:"receipts,omitempty"`
	// Drill is set by the credential of whoever acts, never by what they say.
	Drill bool `json:"drill,omitempty"`
	// Cut names fields that were shortened to fit.
	Cut []string `json:"cut,omitempty"`
}

// Actor is who did it.
type Actor struct {
	Person string `json:"person"`
	Role   string `json:"role,omitempty"`
	// Credential is the kind of what vouches for the person.
	Credential  string `json:"credential,omitempty"`
	Fingerprint string `json:"fingerprint,omitempty"`
	Serial      string `json:"serial,omitempty"`
	// CA is the fingerprint of the authority's key.
	CA     string `json:"ca,omitempty"`
	Door   string `json:"door,omitempty"`
	Source string `json:"source,omitempty"`
	// Late says that the credential was past an edge of its validity.
	Late bool `json:"late,omitempty"`
}

// Approval is one signature under a plan.
type Approval struct {
	Person      string `json:"person"`
	Fingerprint string `json:"fingerprint,omitempty"`
	Serial      string `json:"serial,omitempty"`
}

// Object is one key that is or was changed.
type Object struct {
	Key            string `json:"key"`
	UID            string `json:"uid,omitempty"`
	RevisionBefore int64  `json:"revisionBefore,omitempty"`
	RevisionAfter  int64  `json:"revisionAfter,omitempty"`
	Operation      string `json:"operation,omitempty"`
	Outcome        string `json:"outcome,omitempty"`
	Error          string `json:"error,omitempty"`
	// Changes are the lines of the redacted diff, as far as they fit.
	Changes []Change `json:"changes,omitempty"`
}

// Change is one line of a redacted diff.
type Change struct {
	Path   string `json:"path"`
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
}

// Chunk is a piece of a recording.
type Chunk struct {
	// Session is the recording's name, Offset and Length its bytes in the file.
	Session string `json:"session"`
	Offset  int64  `json:"offset"`
	Length  int64  `json:"length"`
	SHA256  string `json:"sha256"`
	// Last says that the recording is whole with it.
	Last bool `json:"last,omitempty"`
}
