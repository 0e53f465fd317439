package daemonlog

import (
	"bytes"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

const (
	// patience is how long one line may keep the daemon waiting; while the lines
	// of others are not taken either, none does.
	patience = 200 * time.Millisecond
	// waiting is how many lines are kept for a reader that may come back.
	waiting = 1024
)

// patient writes to a pipe or socket whose reader may hang, such as that of a
// journal whose disk does: a login must not wait for it. In calm times a line is
// written before Write returns.
type patient struct {
	w     io.Writer
	lines chan line
	hangs atomic.Bool
	lost  atomic.Uint64
}

type line struct {
	text    []byte
	written chan struct{}
}

// newPatient returns a writer that lasts as long as the process.
func newPatient(w io.Writer) *patient {
	p := &patient{w: w, lines: make(chan line, waiting)}
	go p.run()
	return p
}

func (p *patient) run() {
	for l := range p.lines {
		_, _ = p.w.Write(l.text) // there is no other place to tell of it
		p.hangs.Store(false)
		close(l.written)
		if n := p.lost.Swap(0); n > 0 {
			_, _ = fmt.Fprintf(p.w, `{"level":"warn","message":"%d lines were lost, since nobody took them"}`+"\n", n) // as above
		}
	}
}

// Write never fails: who logs could do nothing about it.
func (p *patient) Write(text []byte) (int, error) {
	l := line{bytes.Clone(text), make(chan struct{})}
	select {
	case p.lines <- l:
	default:
		p.lost.Add(1)
		return len(text), nil
	}
	if p.hangs.Load() {
		return len(text), nil
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-l.written:
	case <-t.C:
		p.hangs.Store(true)
	}
	return len(text), nil
}
