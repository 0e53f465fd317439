// Package reload takes over keys and certificates that are renewed in their files
// while a daemon runs.
//
// It must never put what cannot be used in the place of what can. It stands on
// floor 0.
package reload

import (
	"os"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// every is how often the files are looked at, while somebody asks.
const every = time.Second

// stamp is what changes with a file.
type stamp struct {
	changed time.Time
	size    int64
	mode    os.FileMode // a key is refused that others may read
}

// source is what read made of the files.
type source[T any] struct {
	what  string
	files []string
	read  func() (T, error)
	log   zerolog.Logger

	mu     sync.Mutex // guards what follows
	value  T
	stamps []stamp
	looked time.Time
}

// Files returns what read makes of the files now, and a function that returns
// what it makes of them when they have changed. Where that fails, the one before
// stays in force and the log says why, once. what names it for people; get may be
// called concurrently.
func Files[T any](what string, files []string, read func() (T, error), log zerolog.Logger) (get func() T, err error) {
	s := &source[T]{what: what, files: files, read: read, log: log, looked: time.Now()}
	s.changed()
	if s.value, err = read(); err != nil {
		return nil, err
	}
	return s.get, nil
}

func (s *source[T]) get() T {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); now.Sub(s.looked) >= every {
		s.looked = now
		if s.changed() {
			if value, err := s.read(); err == nil {
				s.value = value
				s.log.Info().Msg(s.what + " was read again")
			} else {
				s.log.Error().Msg(s.what + " cannot be used, and the one before stays in force: " + neutral.Line(fault.Of(err).Error()))
			}
		}
	}
	return s.value
}

// changed notes how the files are, and reports whether that was otherwise. One
// that is not there has no stamp.
func (s *source[T]) changed() bool {
	now := make([]stamp, len(s.files))
	for i, f := range s.files {
		if st, err := os.Stat(f); err == nil {
			now[i] = stamp{st.ModTime(), st.Size(), st.Mode()}
		}
	}
	was := s.stamps
	s.stamps = now
	return !slices.Equal(was, now)
}
