package journal

import (
	"bufio"
	"io"
)

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
