package mirror

import (
	"context"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// holdPace and holdBurst are how many events a second, and at once, one daemon may
// have kept for it, and maxHeld is how long each may be, in bytes (a daemon asks for
// no longer ones: ledger.maxHeldBytes): people in an emergency make some in a minute.
// The bastion's own log is not for others to fill.
const (
	holdPace, holdBurst = 0.2, 128
	maxHeld             = 20 << 10
)

// Hold keeps an event of the copy's origin in the bastion's own log, and returns the
// receipt for it: signed, or why there is none.
func (c *Copy) Hold(ctx context.Context, log audit.Log, h *halliganv1.WitnessHold) *halliganv1.WitnessReceipt {
	note, err := c.hold(ctx, log, h)
	if err != nil {
		return &halliganv1.WitnessReceipt{Id: h.GetId(), Refused: neutral.LineMax(fault.Of(err).Message, 160)}
	}
	return &halliganv1.WitnessReceipt{Id: h.GetId(), Note: note}
}

func (c *Copy) hold(ctx context.Context, log audit.Log, h *halliganv1.WitnessHold) ([]byte, error) {
	e, err := decode(h.GetEvent())
	switch {
	case err != nil:
		return nil, fault.New(fault.Usage, "", "%w", err)
	case e.Origin != c.origin || e.ID == "" || e.ID != h.GetId():
		return nil, fault.New(fault.Refused, "", "it is no event of %s", c.origin)
	case e.Kind == audit.Held || e.Kind == audit.Adopted:
		return nil, fault.New(fault.Refused, "", "what is held for others is not held again")
	case len(h.GetEvent()) > maxHeld:
		return nil, fault.New(fault.Refused, "", "an event of %d bytes is too long to be held", len(h.GetEvent()))
	case !c.holds.Allow():
		return nil, fault.New(fault.Refused, "", "too many events of %s are held", c.origin)
	}
	kept, err := log.Append(ctx, audit.Event{Kind: audit.Held, Target: c.origin, Of: e.ID, Payload: string(h.GetEvent()), Drill: e.Drill})
	if err != nil {
		return nil, err
	}
	if kept.Where != audit.Local {
		return nil, fault.New(fault.Refused, "", "this bastion's own log takes nothing")
	}
	return logkey.SignReceipt(c.m.o.Server, c.m.o.Key, e.ID, h.GetEvent())
}
