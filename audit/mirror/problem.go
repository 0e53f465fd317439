package mirror

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/neutral"
)

// maxProblems bounds the proofs that are kept of one log, and how often it is told.
const maxProblems = 64

// problem is what is wrong with a log, of which the proof is kept as a file. It
// stands until somebody removes that.
type problem struct {
	at   time.Time
	text string
	// unproven says that the proof could not be written.
	unproven bool
}

// loadProblems reads what was found before.
func (c *Copy) loadProblems() (map[string]problem, error) {
	found := map[string]problem{}
	entries, err := os.ReadDir(filepath.Join(c.dir, proofs))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(c.dir, proofs, e.Name()))
		if err != nil || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		text, _, _ := strings.Cut(string(txtar.Parse(data).Comment), "\n")
		p := problem{text: neutral.LineMax(text, 512)}
		if st, err := e.Info(); err == nil {
			p.at = st.ModTime()
		}
		found[e.Name()] = p
	}
	return found, nil
}

// problem keeps the proof that a log is not what it was, tells of it when it is
// new, and returns it. The proof is a txtar file of the two signed checkpoints that
// cannot both be of one log. Of each kind and generation the first one stays. c.work
// is held.
func (c *Copy) problem(kind string, g *generation, text string, ours, theirs []byte) error {
	name := kind + "-" + g.name()
	failed := &Problem{Origin: c.origin, Text: text}
	c.found.Lock()
	defer c.found.Unlock()
	if p, known := c.problems[name]; known && c.stands(name, p) {
		return failed
	}
	if len(c.problems) >= maxProblems {
		return failed // each of those was told
	}
	p := problem{at: c.m.o.Now(), text: text}
	a := &txtar.Archive{Comment: []byte(text + "\n" + p.at.UTC().Format(time.RFC3339) + ", seen by " + c.m.o.Server + "\n")}
	for name, data := range map[string][]byte{"before": ours, "now": theirs} {
		if len(data) > 0 {
			a.Files = append(a.Files, txtar.File{Name: name, Data: data})
		}
	}
	slices.SortFunc(a.Files, func(a, b txtar.File) int { return strings.Compare(a.Name, b.Name) })
	if err := durable.Write(filepath.Join(c.dir, proofs, name), txtar.Format(a)); err != nil {
		p.unproven = true
		c.m.o.Log.Error().Str("log", c.origin).Err(err).Msg("the proof could not be kept")
	}
	c.problems[name] = p
	c.m.raise(c.origin, text)
	return failed
}

// stands reports whether nobody has removed the proof.
func (c *Copy) stands(name string, p problem) bool {
	_, err := os.Lstat(filepath.Join(c.dir, proofs, name))
	return p.unproven || !errors.Is(err, fs.ErrNotExist)
}

// Status tells how the copy is.
func (c *Copy) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := Status{Origin: c.origin, Lag: -1}
	for _, g := range c.trees {
		if g.lineage == c.lineage {
			s.Events = g.first + uint64(g.head.N)
		}
	}
	switch {
	case c.live && !c.behind && !c.complete.IsZero():
		s.Lag = 0
	case !c.complete.IsZero():
		s.Lag = max(0, c.m.o.Now().Sub(c.complete))
	}
	c.found.Lock()
	defer c.found.Unlock()
	var all []string
	if c.damaged != nil {
		all = append(all, c.damaged.Error())
	}
	for _, name := range slices.SortedFunc(maps.Keys(c.problems), func(a, b string) int { return c.problems[b].at.Compare(c.problems[a].at) }) {
		if p := c.problems[name]; c.stands(name, p) {
			all = append(all, p.text)
		}
	}
	if len(all) > 1 {
		all = []string{fmt.Sprintf("%s (and %d more: see the files in %s)", all[0], len(all)-1, filepath.Join(c.dir, proofs))}
	}
	s.Problem, s.Trouble = neutral.LineMax(strings.Join(all, "; "), 512), c.trouble
	return s
}

// reached notes that all there is of the log is here.
func (c *Copy) reached() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.behind, c.complete = false, c.m.o.Now()
}

// Live notes that there is a stream to the log's keeper, or that it has ended, and
// why there is none.
func (c *Copy) Live(live bool, why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.live && !live && !c.behind && !c.complete.IsZero() {
		c.complete = c.m.o.Now()
	}
	c.live, c.trouble = live, ""
	if why != nil {
		c.trouble = neutral.LineMax(why.Error(), 256)
	}
}
