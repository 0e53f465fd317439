package journal

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// A line is a JSON object whose first member is the CRC-32C, in hexadecimal, of
// all that follows that member: {"sum":"89abcdef","note":{...}}. It finds rot,
// not forgery: who can write here is root.
const (
	sumStart  = `{"sum":"`
	sumEnd    = `",`
	sumPrefix = len(sumStart) + 8 + len(sumEnd)
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// seal returns the line with its checksum and its newline.
func seal(l line) ([]byte, error) {
	data, err := json.Marshal(l)
	if err != nil {
		return nil, err
	}
	rest := data[1:] // without the opening brace
	return fmt.Appendf(make([]byte, 0, sumPrefix+len(data)), "%s%08x%s%s\n", sumStart, crc32.Checksum(rest, castagnoli), sumEnd, rest), nil
}

// unseal reads a line without its newline, and uses it up.
func unseal(raw []byte) (line, error) {
	var l line
	if len(raw) <= sumPrefix {
		return l, errors.New("no checksum")
	}
	rest := raw[sumPrefix:]
	if want := fmt.Sprintf("%s%08x%s", sumStart, crc32.Checksum(rest, castagnoli), sumEnd); string(raw[:sumPrefix]) != want {
		return l, errors.New("the line does not have its checksum")
	}
	raw[sumPrefix-1] = '{'
	return l, json.Unmarshal(raw[sumPrefix-1:], &l)
}

// lineReader hands out whole lines of any length with their offsets. Lines are
// as long as the values in them, which etcd bounds, or as a plan, which the
// policy's caps bound.
type lineReader struct {
	r      *bufio.Reader
	offset int64
}

func newLineReader(r io.Reader) *lineReader { return &lineReader{r: bufio.NewReaderSize(r, 64<<10)} }

// next returns the next line without its newline; io.EOF when only a torn line
// or nothing is left.
func (l *lineReader) next() ([]byte, error) {
	data, err := l.r.ReadBytes('\n')
	if err != nil {
		return nil, err
	}
	l.offset += int64(len(data))
	return data[:len(data)-1], nil
}
