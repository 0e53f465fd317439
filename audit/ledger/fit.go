package ledger

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"unicode/utf8"

	"github.com/halligan-io/halligan/audit"
)

// Bounds of what callers put into an event, in bytes. What is longer is shortened
// even where it would fit: people read it, and the room is everybody's.
const (
	maxText      = 4 << 10
	maxName      = 512
	maxParameter = 16 << 10
	maxApprovals = 16
)

// fit encodes an event in at most limit bytes. It shortens what tells least first,
// and names in Cut what it shortened.
func fit(e audit.Event, limit int) ([]byte, error) {
	c := cutter{cut: slices.Clone(e.Cut)}
	if e.Actor != nil {
		a := *e.Actor
		e.Actor = &a
		for _, f := range []text{{"person", &a.Person}, {"role", &a.Role}, {"credential", &a.Credential}, {"fingerprint", &a.Fingerprint}, {"serial", &a.Serial}, {"ca", &a.CA}, {"door", &a.Door}, {"source", &a.Source}} {
			c.shorten("actor."+f.name, f.s, maxName)
		}
	}
	for _, f := range []text{
		{"incident", &e.Incident}, {"session", &e.Session}, {"of", &e.Of}, {"action", &e.Action}, {"planId", &e.PlanID}, {"planSha256", &e.PlanSHA256}, {"undoes", &e.Undoes},
		{"imagesSha256", &e.Images}, {"via", &e.Via}, {"outcome", &e.Outcome}, {"errorCode", &e.ErrorCode}, {"target", &e.Target},
	} {
		c.shorten(f.name, f.s, maxName)
	}
	if len(e.ApprovedBy) > maxApprovals {
		e.ApprovedBy = e.ApprovedBy[:maxApprovals]
		c.note("approvedBy")
	}
	if len(e.Parameters) > 0 && (len(e.Parameters) > maxParameter || !json.Valid(e.Parameters)) {
		e.Parameters = nil
		c.note("parameters")
	}
	e.Objects = slices.Clone(e.Objects)
	for i := range e.Objects {
		o := &e.Objects[i]
		o.Changes = slices.Clone(o.Changes)
		for _, f := range []text{{"uid", &o.UID}, {"operation", &o.Operation}, {"outcome", &o.Outcome}} {
			c.shorten("objects."+f.name, f.s, maxName)
		}
		c.shorten("objects.key", &o.Key, maxText)
	}
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
		case step > 5:
			return nil, fmt.Errorf("an event of kind %q does not fit into %d bytes", e.Kind, limit)
		}
		e.Cut = c.cut
		if data, err := encode(e); err != nil || len(data) <= limit {
			return data, err
		}
	}
}

type text struct {
	name string
	s    *string
}

type cutter struct{ cut []string }

func (c *cutter) note(field string) {
	if !slices.Contains(c.cut, field) {
		c.cut = append(c.cut, field)
	}
}

func (c *cutter) shorten(field string, s *string, max int) {
	if len(*s) <= max {
		return
	}
	for max > 0 && !utf8.RuneStart((*s)[max]) {
		max--
	}
	*s = (*s)[:max]
	c.note(field)
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
