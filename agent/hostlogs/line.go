package hostlogs

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// assembler makes lines out of pieces, and bounds them.
type assembler struct {
	max  int // bytes that are kept of a line
	buf  []byte
	cut  bool // more was left out
	skip bool // up to the next line feed
}

// feed calls emit for each line that ends in the piece. The line is valid until emit
// returns.
func (a *assembler) feed(piece []byte, emit func(line []byte, cut bool) error) error {
	for len(piece) > 0 {
		part, rest, ends := bytes.Cut(piece, []byte("\n"))
		if room := a.max - len(a.buf); len(part) > room {
			part, a.cut = part[:room], true
		}
		if !a.skip {
			a.buf = append(a.buf, part...)
		}
		if piece = rest; !ends {
			return nil
		}
		if err := a.end(emit); err != nil {
			return err
		}
	}
	return nil
}

// end ends the line that has begun.
func (a *assembler) end(emit func(line []byte, cut bool) error) error {
	line, cut, skip := a.buf, a.cut, a.skip
	a.buf, a.cut, a.skip = a.buf[:0], false, false
	if skip {
		return nil
	}
	return emit(line, cut)
}

// flush emits a last line without an end.
func (a *assembler) flush(emit func(line []byte, cut bool) error) error {
	if len(a.buf) == 0 {
		return nil
	}
	return a.end(emit)
}

// parser takes the lines of one file. Lines of a container runtime have a head, or
// are JSON; others may tell their time.
type parser struct {
	runtime bool
	year    int // of lines that tell none
	last    time.Time
	parts   map[string]*assembler // by stream: lines that the runtime has split
}

// parse calls emit with what a line says, once it is whole, and when it was written.
func (p *parser) parse(line []byte, cut bool, emit func(text []byte, cut bool, at time.Time) error) error {
	if !p.runtime {
		p.when(line)
		return emit(line, cut, p.last)
	}
	stream, text, partial, ok := p.head(line)
	if !ok {
		return emit(line, cut, p.last)
	}
	a := p.parts[stream]
	if a == nil {
		if p.parts == nil {
			p.parts = map[string]*assembler{}
		}
		a = &assembler{max: maxRaw}
		p.parts[stream] = a
	}
	whole := func(text []byte, more bool) error { return emit(text, cut || more, p.last) }
	if err := a.feed(text, whole); err != nil || partial {
		return err
	}
	return a.end(whole)
}

// head takes the head off a line: of the CRI, TIME STREAM TAGS TEXT
// (kubernetes pkg/kubelet/kuberuntime/logs/logs.go), or the JSON of Docker.
func (p *parser) head(line []byte) (stream string, text []byte, partial, ok bool) {
	if bytes.HasPrefix(line, []byte("{")) {
		var d struct{ Log, Stream, Time string }
		if json.Unmarshal(line, &d) != nil || d.Time == "" {
			return "", nil, false, false
		}
		at, err := time.Parse(time.RFC3339Nano, d.Time)
		if err != nil || d.Stream != "stdout" && d.Stream != "stderr" {
			return "", nil, false, false
		}
		p.last = at
		text, whole := strings.CutSuffix(d.Log, "\n")
		return d.Stream, []byte(text), !whole, true
	}
	f := bytes.SplitN(line, []byte(" "), 4)
	if len(f) < 3 {
		return "", nil, false, false
	}
	at, err := time.Parse(time.RFC3339Nano, string(f[0]))
	if stream = string(f[1]); err != nil || stream != "stdout" && stream != "stderr" {
		return "", nil, false, false
	}
	p.last = at
	if len(f) == 4 {
		text = f[3]
	}
	tag, _, _ := bytes.Cut(f[2], []byte(":"))
	return stream, text, string(tag) == "P", true
}

// Heads of lines that tell the time: klog's, without a year and in local time, and
// what zap (etcd) and logrus (k3s) write.
var (
	klogHead = regexp.MustCompile(`^[IWEF](\d{4} \d\d:\d\d:\d\d\.\d{6}) `)
	fields   = regexp.MustCompile(`^(?:\{.{0,40}"ts":|time=)"([0-9T:.+Z-]{19,40})"`)
)

// when notes a line's time, if it tells one; it has that of the one before else.
func (p *parser) when(line []byte) {
	if m := klogHead.FindSubmatch(line); m != nil {
		if at, err := time.ParseInLocation("0102 15:04:05.000000", string(m[1]), time.Local); err == nil {
			p.last = at.AddDate(p.year, 0, 0)
		}
		return
	}
	if m := fields.FindSubmatch(line); m != nil {
		for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999Z0700"} {
			if at, err := time.Parse(layout, string(m[1])); err == nil {
				p.last = at
				return
			}
		}
	}
}

var (
	bearer = regexp.MustCompile(`(?i)(bearer(?:\s|%20|\+)+)[A-Za-z0-9._~+/=-]{4,}`)
	jwt    = regexp.MustCompile(`eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?`)
)

// mask takes out what is a token by its looks: what follows Bearer, and JSON web
// tokens. Other secrets cannot be told from text.
func mask(line []byte) []byte {
	if bytes.Contains(line, []byte("earer")) || bytes.Contains(line, []byte("EARER")) {
		line = bearer.ReplaceAll(line, []byte("${1}[masked]"))
	}
	if bytes.Contains(line, []byte("eyJ")) {
		line = jwt.ReplaceAll(line, []byte("[masked]"))
	}
	return line
}

// isAudit reports whether a file is an audit log by its name.
func isAudit(file string) bool {
	return strings.Contains(strings.ToLower(filepath.Base(file)), "audit")
}

// isAuditEvent reports whether a line is of the API server's audit log, which goes
// to standard output where --audit-log-path is -, as JSON or in the older format
// (apiserver/plugin/pkg/audit/log/backend.go).
func isAuditEvent(line []byte) bool {
	return bytes.Contains(line, []byte(`"apiVersion":"audit.k8s.io/`)) || bytes.Contains(line, []byte(` AUDIT: id="`))
}
