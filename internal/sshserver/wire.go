package sshserver

import (
	"encoding/binary"
	"strings"
	"unicode/utf8"
)

// What clients put into channel requests, RFC 4254. The library's own parser of
// pty-req panics on a length that wraps around 32 bits; these take what is
// exactly right and nothing else.

// Sizes of a terminal that are believed; others are brought to the nearest.
const (
	maxSide             = 1000
	defaultColumns      = 80
	defaultRows         = 24
	maxTerm             = 64
	maxModes            = 4 << 10 // OpenSSH sends some 250 bytes
	termLetters         = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-._"
	environmentOfClient = "HALLIGAN_REASON HALLIGAN_INCIDENT LANG TERM"
)

// Window is the size of a terminal in characters.
type Window struct{ Columns, Rows int }

// Pty is a terminal on the client's side.
type Pty struct {
	Term   string
	Window Window
}

// takeString splits an SSH string off.
func takeString(in []byte) (s string, rest []byte, ok bool) {
	if len(in) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(in)
	in = in[4:]
	if uint64(n) > uint64(len(in)) {
		return "", nil, false
	}
	return string(in[:n]), in[n:], true
}

// onlyString parses a payload that is one string.
func onlyString(in []byte) (string, bool) {
	s, rest, ok := takeString(in)
	return s, ok && len(rest) == 0
}

// takeWindow splits four numbers off, of which two matter.
func takeWindow(in []byte) (w Window, rest []byte, ok bool) {
	if len(in) < 16 {
		return Window{}, nil, false
	}
	side := func(n uint32, unset int) int {
		if n == 0 {
			return unset
		}
		return int(min(n, maxSide))
	}
	return Window{Columns: side(binary.BigEndian.Uint32(in), defaultColumns), Rows: side(binary.BigEndian.Uint32(in[4:]), defaultRows)}, in[16:], true
}

// parsePty parses the payload of pty-req. Terminal modes are not looked at.
func parsePty(in []byte) (Pty, bool) {
	term, in, ok := takeString(in)
	if !ok || len(term) > maxTerm || strings.Trim(term, termLetters) != "" {
		return Pty{}, false
	}
	w, in, ok := takeWindow(in)
	if !ok {
		return Pty{}, false
	}
	modes, ok := onlyString(in)
	return Pty{Term: term, Window: w}, ok && len(modes) <= maxModes
}

// parseEnv parses the payload of env: one of the few variables that are taken,
// with a value of one line.
func parseEnv(in []byte, most int) (name, value string, ok bool) {
	name, in, ok = takeString(in)
	if !ok {
		return "", "", false
	}
	value, ok = onlyString(in)
	if !ok || len(value) > most || !utf8.ValidString(value) || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return "", "", false
	}
	for known := range strings.FieldsSeq(environmentOfClient) {
		if name == known {
			return name, value, true
		}
	}
	return "", "", false
}
