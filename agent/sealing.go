package agent

import (
	"errors"
	"syscall"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/agent/action"
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

func openSealed(c Config, dir string, t *trusted, clock *trust.Clock, log zerolog.Logger) (s sealing, err error) {
	if c.Trust == nil {
		return s, nil
	}
	s.store, err = sealed.Open(sealed.Options{Dir: dir, Server: c.origin(), Bundle: t.Current, Now: clock.Now, Log: log})
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
