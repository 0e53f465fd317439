package report

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"strings"
	"time"

	"github.com/halligan-io/halligan/audit"
)

//go:embed page.html
var pageText string

//go:embed page.css
var pageCSS string

//go:embed page.js
var pageJS string

//go:embed player/asciinema-player.min.js
var playerJS string

//go:embed player/asciinema-player.css
var playerCSS string

var page = template.Must(template.New("page.html").Funcs(template.FuncMap{
	"clock":   func(t time.Time) string { return t.UTC().Format("15:04:05") },
	"millis":  func(t time.Time) string { return t.UTC().Format("15:04:05.000") },
	"day":     func(t time.Time) string { return t.UTC().Format("2 January 2006") },
	"instant": func(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) },
	"join":    strings.Join,
	"more":    func(count int, list []audit.Object) int { return count - len(list) },
	"plural":  plural,
	"seconds": func(s float64) string { return span(time.Duration(s * float64(time.Second))) },
}).Parse(pageText))

// HTML writes the story as one page that needs no network and no other file. Its
// policy lets nothing run or be fetched but the scripts and styles that are in it,
// by their hashes; where there are recordings, also the player's own WebAssembly.
func (s *Story) HTML(w io.Writer) error {
	styles, scripts := []string{pageCSS}, []string{pageJS}
	compile := ""
	tapes := map[int]template.JS{}
	for _, one := range s.Sessions {
		if one.Tape == nil {
			continue
		}
		if compile == "" {
			compile = " 'wasm-unsafe-eval'"
			styles, scripts = append(styles, playerCSS), append([]string{playerJS}, scripts...)
		}
		data, err := tapeData(one.Tape)
		if err != nil {
			return err
		}
		tapes[one.N] = data
	}
	policy := "default-src 'none'; base-uri 'none'; form-action 'none'; script-src" + hashes(scripts) + compile + "; style-src" + hashes(styles)
	var b bytes.Buffer
	err := page.Execute(&b, struct {
		*Story
		Policy          string
		Styles, Scripts template.HTML
		Tapes           map[int]template.JS
		Strip           *strip
	}{s, policy, elements("style", styles), elements("script", scripts), tapes, s.strip()})
	if err != nil {
		return err
	}
	_, err = w.Write(b.Bytes())
	return err
}

// elements puts our own texts into the page as they are, so that their hashes hold.
func elements(name string, texts []string) template.HTML {
	var b strings.Builder
	for _, t := range texts {
		b.WriteString("<" + name + ">" + t + "</" + name + ">\n")
	}
	return template.HTML(b.String())
}

func hashes(texts []string) string {
	var b strings.Builder
	for _, t := range texts {
		sum := sha256.Sum256([]byte(t))
		b.WriteString(" 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'")
	}
	return b.String()
}

// tapeData is a recording as a block of data, whose text cannot end the block:
// json.Marshal escapes what HTML could mean something by.
func tapeData(t *tape) (template.JS, error) {
	header := map[string]any{"version": 2, "width": t.Columns, "height": t.Rows}
	data, err := json.Marshal(append([]any{header}, t.Events...))
	return template.JS(data), err
}

// strip is a picture of the timeline: a lane for each person, a mark for each
// moment that matters.
type strip struct {
	Lanes  []lane
	Height int
}

type lane struct {
	Name     string
	Y, Below int
	Marks    []mark
}

type mark struct {
	X        float64
	Tone     string
	Title    string
	Href     string
	IsAction bool
}

// Sizes in the units of the picture, which is 1,000 wide.
const (
	laneHeight = 44
	maxLanes   = 8
	maxMarks   = 400
)

func (s *Story) strip() *strip {
	total := s.Last.Sub(s.First).Seconds()
	if total <= 0 {
		return nil
	}
	p := &strip{}
	at := map[string]int{}
	marks := 0
	for _, m := range s.Timeline {
		if m.Minor || m.Who == "" || marks == maxMarks {
			continue
		}
		i, known := at[m.Who]
		if !known {
			if len(p.Lanes) == maxLanes {
				continue
			}
			i = len(p.Lanes)
			at[m.Who] = i
			p.Lanes = append(p.Lanes, lane{Name: m.Who, Y: i*laneHeight + 30, Below: i*laneHeight + 14})
		}
		marks++
		tone := m.Tone
		if m.What == labels[audit.Intent] {
			continue // its outcome has a mark
		}
		p.Lanes[i].Marks = append(p.Lanes[i].Marks, mark{X: 8 + 984*m.At.Sub(s.First).Seconds()/total, Tone: tone,
			Title: fmt.Sprintf("%s %s %s", m.At.Format("15:04:05"), m.Who, m.Text), IsAction: m.What == labels[audit.Outcome]})
	}
	p.Height = len(p.Lanes)*laneHeight + 6
	return p
}
