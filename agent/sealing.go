package agent

import (
	"context"
	"errors"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/agent/action"
	"github.com/halligan-io/halligan/agent/journal"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/record"
	"github.com/halligan-io/halligan/audit/sealed"
	"github.com/halligan-io/halligan/audit/service"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
)

// sealing is what keeps before-images for when this node is lost. Without a bundle
// there is nobody to seal them to, and where the disk ails nothing to seal them on:
// it has no store then, and actions go on.
type sealing struct {
	store   *sealed.Store
	problem string
}

func openSealed(c Config, evidence *record.Evidence, t *trusted, clock *trust.Clock, log zerolog.Logger) (s sealing, err error) {
	if c.Trust == nil {
		return s, nil
	}
	again := func(action, intent, sum string) error {
		_, err := evidence.Append(context.Background(), audit.Event{Kind: audit.Objects, Of: intent, PlanID: action, Images: sum,
			Text: "its before-images were sealed once more, for an agent or a key that was not there before"})
		return err
	}
	s.store, err = sealed.Open(sealed.Options{Dir: evidence.Dir(), Server: c.origin(), Bundle: t.Current, Again: again, Now: clock.Now, Log: log})
	var ailing syscall.Errno
	if errors.As(err, &ailing) {
		s.problem = "before-images are not kept for other nodes until the agent is started again: " + neutral.Line(err.Error())
		log.Error().Msg(s.problem)
		err = nil
	}
	return s, err
}

// Close ends it.
func (s sealing) Close() {
	if s.store != nil {
		s.store.Close()
	}
}

func (s sealing) seal() action.Sealed {
	if s.store == nil {
		return nil
	}
	return s.store.Seal
}

func (s sealing) take() action.Take {
	if s.store == nil {
		return nil
	}
	return s.store.Take
}

func (s sealing) service() service.Sealed {
	if s.store == nil {
		return nil
	}
	return s.store
}

// recipient is what others seal to for this agent; "" without a key.
func (s sealing) recipient() string {
	if s.store == nil {
		return ""
	}
	return s.store.Recipient()
}

func (s sealing) warnings() []string {
	problem := s.problem
	if s.store != nil {
		problem = s.store.Problem()
	}
	if problem == "" {
		return nil
	}
	return []string{problem}
}

// expireEvery is how often is looked for records that are too old.
const expireEvery = time.Hour

// expire removes records of actions whose before-images the policy keeps no longer,
// until the context ends.
func expire(ctx context.Context, records *journal.Journal, t *trusted, now func() time.Time, log zerolog.Logger) {
	for {
		if at, ok := sealed.Before(t.Current(), now()); ok {
			if _, err := records.Expire(at); err != nil {
				log.Warn().Str("problem", neutral.Line(err.Error())).Msg("records of actions that are too old could not be removed")
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(expireEvery):
		}
	}
}
