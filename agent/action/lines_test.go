package action

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
)

// lines is a log in one file, a line each event, which fails when a test says so.
// What was written survives a kill.
type lines struct {
	mu     sync.Mutex
	file   *os.File
	events []audit.Event
	// refuse is asked before each event is taken.
	refuse func(audit.Event) error
}

func readLines(path string) (*lines, error) {
	l := &lines{}
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		var e audit.Event
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			return nil, err
		}
		l.events = append(l.events, e)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	l.file, err = os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	return l, err
}

func openLines(t testing.TB, path string) *lines {
	t.Helper()
	l, err := readLines(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.file.Close() })
	return l
}

func (l *lines) Append(_ context.Context, e audit.Event) (audit.Receipt, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refuse != nil {
		if err := l.refuse(e); err != nil {
			return audit.Receipt{}, err
		}
	}
	e.Version, e.Seq, e.Time = audit.Version, uint64(len(l.events)), time.Now()
	e.ID = fmt.Sprint("event-", e.Seq)
	data, err := json.Marshal(e)
	if err == nil {
		_, err = l.file.Write(append(data, '\n'))
	}
	if err != nil || len(data) > audit.MaxEvent {
		return audit.Receipt{}, fault.New(fault.AuditUnavailable, "", "%d bytes: %v", len(data), err)
	}
	l.events = append(l.events, e)
	return audit.Receipt{ID: e.ID, Seq: e.Seq, Where: audit.Local}, nil
}

func (l *lines) Note(e audit.Event)                      { _, _ = l.Append(context.Background(), e) }
func (l *lines) Reserve(audit.Event) (audit.Room, error) { return l, nil }
func (l *lines) Release()                                {}
func (l *lines) Hash(secret []byte) string               { return fmt.Sprint(len(secret)) }
func (l *lines) State() audit.State                      { return audit.State{} }

// past is what the log holds now.
func (l *lines) past() Past {
	before := l.all()
	return func(context.Context) iter.Seq2[[]byte, error] {
		return func(yield func([]byte, error) bool) {
			for _, e := range before {
				if data, err := json.Marshal(e); !yield(data, err) {
					return
				}
			}
		}
	}
}

func (l *lines) all() []audit.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.events)
}

// of returns the events of an action.
func (l *lines) of(plan string) (all []audit.Event) {
	for _, e := range l.all() {
		if e.PlanID == plan {
			all = append(all, e)
		}
	}
	return all
}
