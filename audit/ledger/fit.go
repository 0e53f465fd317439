package ledger

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"unicode/utf8"

	"github.com/halligan-io/halligan/audit"
)

// Bounds of what callers put into an event, in bytes as they are encoded. What is
// longer is shortened even where it would fit: people read it, and the room is
// everybody's.
const (
	maxText      = 4 << 10
	maxName      = 512
	maxParameter = 16 << 10
	maxApprovals = 16
)

// fit encodes an event in at most limit bytes, of which 2 KiB are always enough for
// one without a payload. It shortens what tells least first, and names in Cut what
// it shortened.
func fit(e audit.Event, limit int) ([]byte, error) {
	c := cutter{cut: slices.Clone(e.Cut)}
	if e.Actor != nil {
		a := *e.Actor
		e.Actor = &a
	}
	if len(e.Parameters) > 0 && (len(e.Parameters) > maxParameter || !json.Valid(e.Parameters)) {
		e.Parameters = nil
		c.note("parameters")
	}
	e.ApprovedBy, e.Objects = slices.Clone(e.ApprovedBy), slices.Clone(e.Objects)
	for i := range e.Objects {
		e.Objects[i].Changes = slices.Clone(e.Objects[i].Changes)
	}
	c.names(&e, maxName, maxApprovals)
	for step := 0; ; step++ {
		switch {
		case step < 4:
			c.texts(&e, maxText>>(2*step))
		case step == 4 && e.Parameters != nil:
			e.Parameters = nil
			c.note("parameters")
		case step == 5:
			for i := range e.Objects {
				if len(e.Objects[i].Changes) > 0 {
					e.Objects[i].Changes = nil
					c.note("objects.changes")
				}
			}
		case step > 5 && len(e.Objects) > 0:
			e.ObjectCount = max(e.ObjectCount, len(e.Objects))
			e.Objects = e.Objects[:len(e.Objects)/2]
			c.note("objects")
		case step > 5 && !c.least:
			c.names(&e, 32, 1)
			c.texts(&e, 32)
			c.least = true
		case step > 5:
			return nil, fmt.Errorf("an event of kind %q does not fit into %d bytes", e.Kind, limit)
		}
		e.Cut = c.cut
		if c.least {
			e.Cut = []string{"*"}
		}
		if data, err := encode(e); err != nil || len(data) <= limit {
			return data, err
		}
	}
}

type text struct {
	name string
	s    *string
}

type cutter struct {
	cut []string
	// least says that nearly everything was.
	least bool
}

func (c *cutter) note(field string) {
	if !slices.Contains(c.cut, field) {
		c.cut = append(c.cut, field)
	}
}

func (c *cutter) shorten(field string, s *string, max int) {
	for i, r := range *s {
		switch {
		case r == '"' || r == '\\':
			max -= 2
		case r < ' ' || r == '<' || r == '>' || r == '&' || r == utf8.RuneError || r == '\u2028' || r == '\u2029':
			max -= 6
		default:
			max -= utf8.RuneLen(r)
		}
		if max < 0 {
			*s = (*s)[:i]
			c.note(field)
			return
		}
	}
}

// names bounds what is not meant to be prose.
func (c *cutter) names(e *audit.Event, max, approvals int) {
	kind := string(e.Kind)
	all := []text{
		{"id", &e.ID}, {"kind", &kind}, {"incident", &e.Incident}, {"session", &e.Session}, {"of", &e.Of}, {"action", &e.Action}, {"planId", &e.PlanID}, {"planSha256", &e.PlanSHA256},
		{"undoes", &e.Undoes}, {"imagesSha256", &e.Images}, {"via", &e.Via}, {"outcome", &e.Outcome}, {"errorCode", &e.ErrorCode}, {"target", &e.Target},
	}
	if a := e.Actor; a != nil {
		all = append(all, text{"actor.person", &a.Person}, text{"actor.role", &a.Role}, text{"actor.credential", &a.Credential}, text{"actor.fingerprint", &a.Fingerprint},
			text{"actor.serial", &a.Serial}, text{"actor.ca", &a.CA}, text{"actor.door", &a.Door}, text{"actor.source", &a.Source})
	}
	if len(e.ApprovedBy) > approvals {
		e.ApprovedBy = e.ApprovedBy[:approvals]
		c.note("approvedBy")
	}
	for i := range e.ApprovedBy {
		a := &e.ApprovedBy[i]
		all = append(all, text{"approvedBy", &a.Person}, text{"approvedBy", &a.Fingerprint}, text{"approvedBy", &a.Serial})
	}
	for i := range e.Objects {
		o := &e.Objects[i]
		all = append(all, text{"objects", &o.UID}, text{"objects", &o.Operation}, text{"objects", &o.Outcome})
		c.shorten("objects", &o.Key, maxText)
	}
	if e.Chunk != nil {
		chunk := *e.Chunk
		e.Chunk = &chunk
		all = append(all, text{"chunk", &chunk.Session}, text{"chunk", &chunk.SHA256})
	}
	for _, f := range all {
		c.shorten(f.name, f.s, max)
	}
	e.Kind = audit.Kind(kind)
}

func (c *cutter) texts(e *audit.Event, max int) {
	c.shorten("reason", &e.Reason, max)
	c.shorten("text", &e.Text, max)
	c.shorten("error", &e.Error, max)
	for i := range e.Objects {
		o := &e.Objects[i]
		c.shorten("objects.error", &o.Error, max)
		for j := range o.Changes {
			change := &o.Changes[j]
			for _, s := range []*string{&change.Path, &change.Before, &change.After} {
				c.shorten("objects.changes", s, max)
			}
		}
	}
}

func encode(e audit.Event) ([]byte, error) {
	var b bytes.Buffer
	if err := json.NewEncoder(&b).Encode(e); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
