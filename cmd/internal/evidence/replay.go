package evidence

import (
	"context"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/cast"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// maxPause bounds the waits of a replay, like those of people who think.
const maxPause = 2 * time.Second

func (t *tool) replay() *cobra.Command {
	var speed float64
	var input bool
	var out string
	c := uses(&cobra.Command{
		Use: "replay [SESSION [FOLDER]]", Short: "Show what somebody saw in a session, or which sessions there are", Args: arguments(0, 2, "at most a session and a folder"),
		Long: "Shows the recording of a session line by line, at the pace of the session on a terminal and at once elsewhere.\n" +
			"It is fetched from the agent or bastion that the session was at, which takes a commander there (--as commander)\n" +
			"and has it on record, and compared with the log before any of it is shown. A connection may have several sessions: its name, as in\n" +
			"halligan audit show, replays all of them. Without a session, lists what was recorded.\n\n" +
			"Nothing in a recording acts on this terminal. To see one as it looked, colours and cursor included, write the\n" +
			"verified file with --out and play that with asciinema.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if speed < 0 || len(args) == 0 && out != "" {
				return usage(cmd, "--speed must not be negative, and --out needs a session")
			}
			e, r, err := t.open(cmd.Context(), argument(args, 1))
			if err != nil {
				return err
			}
			defer e.Close()
			all, err := t.recordings(cmd.Context(), e, argument(args, 0))
			if err != nil {
				return err
			}
			if len(args) == 0 {
				if err := t.list(all); err != nil {
					return err
				}
				return verdict(r)
			}
			if len(all) == 0 {
				return fault.New(fault.NotFound, "list them: halligan audit replay", "no session %.80q is on record", args[0])
			}
			if out != "" && len(all) > 1 {
				return usage(cmd, "connection %s had %d sessions: name one for --out; halligan audit replay lists them", args[0], len(all))
			}
			if !t.OutTTY || !t.table() {
				speed = 0
			}
			for _, s := range all {
				if err := t.replayOne(cmd.Context(), e, s, len(args) < 2, speed, input, out); err != nil {
					return err
				}
			}
			return verdict(r)
		},
	}, "reason", "incident")
	c.Flags().Float64Var(&speed, "speed", 1, "how many `times` as fast as it was; 0: at once")
	c.Flags().BoolVar(&input, "input", false, "show what was typed, too, where that was recorded")
	c.Flags().StringVar(&out, "out", "", "`file` to write the verified recording to, asciicast v2, instead of showing it")
	return c
}

// recorded is a session as its log tells of it.
type recorded struct {
	evidence.Entry
	// end is how it ended, missing why there is no recording of it, or not of all.
	end, missing string
	// whole says that the log vouches for its end.
	whole bool
}

// recordings returns the sessions that the text names, or all.
func (t *tool) recordings(ctx context.Context, e *evidence.Evidence, name string) ([]*recorded, error) {
	var all []*recorded
	by := map[string]*recorded{}
	f := evidence.Filter{Kinds: []audit.Kind{audit.Session, audit.SessionEnd, audit.Recording}}
	if node := t.flag("node"); t.cmd.Flags().Changed("node") {
		f.Origin = node
	}
	for entry, err := range e.Events(ctx, f) {
		if err != nil {
			return nil, err
		}
		if entry.Target == "" || name != "" && entry.Target != name && entry.Session != name {
			continue
		}
		// Two daemons may not speak of the same recording.
		key := entry.Log.Origin + " " + entry.Target
		s := by[key]
		if s == nil {
			s = &recorded{Entry: entry}
			all, by[key] = append(all, s), s
		}
		switch {
		case entry.Kind == audit.SessionEnd:
			s.end = entry.Text
		case entry.Outcome == cast.Removed:
			s.missing = "removed to make room"
		case entry.Outcome == cast.Unrecorded:
			s.missing = "not all of it was recorded: " + entry.Error
		case entry.Chunk != nil:
			s.whole = s.whole || entry.Chunk.Last
		}
	}
	return all, nil
}

// list shows sessions.
func (t *tool) list(all []*recorded) error {
	for _, s := range all {
		if !t.table() {
			if err := t.print(s.Event); err != nil {
				return err
			}
			continue
		}
		t.say("%s", s)
	}
	return nil
}

func (s *recorded) String() string {
	words := []string{stamp(s.Time), s.Target, s.Log.Origin}
	if a := s.Actor; a != nil {
		words = append(words, strings.TrimSpace(a.Person+" "+a.Role))
	}
	words = append(words, s.Action)
	if s.Kind == audit.Session && s.Text != "" {
		words = append(words, fmt.Sprintf("%.200q", s.Text))
	}
	for _, word := range []string{s.end, s.missing} {
		if word != "" {
			words = append(words, word)
		}
	}
	return strings.Join(words, "  ")
}

// replayOne shows one recording, fetched before where that may be done.
func (t *tool) replayOne(ctx context.Context, e *evidence.Evidence, s *recorded, fetch bool, speed float64, input bool, out string) error {
	data, log, err := e.Recording(ctx, s.Target)
	if fault.Is(err, fault.NotFound) && log != nil && fetch {
		var file string
		if file, err = t.bring(ctx, log, s.Target); err != nil {
			return err
		}
		if !s.whole { // else it would be too short for what the log has by tomorrow
			defer os.Remove(file)
		}
		data, _, err = e.Recording(ctx, s.Target)
	}
	if err != nil {
		if s.missing != "" {
			err = fault.New(fault.CodeOf(err), "", "%w (%s)", err, s.missing)
		}
		return err
	}
	defer data.Close()
	if out != "" {
		text, err := io.ReadAll(data) // no longer than recordings are
		if err == nil {
			err = durable.Write(out, text)
		}
		if err != nil {
			return fault.New(fault.Failed, "name another file with --out", "%w", err)
		}
		t.note("play it with: asciinema play %s", out)
		return nil
	}
	if t.table() {
		t.say("%s", s)
	}
	if !s.whole {
		t.note("the session is still going on, or its daemon has not settled it: this is what the log vouches for")
	}
	return t.play(ctx, data, speed, input)
}

// bring fetches a recording from where it was made, and returns where it is then.
func (t *tool) bring(ctx context.Context, log *evidence.Log, name string) (string, error) {
	dir, err := t.State()
	if err != nil {
		return "", err
	}
	waiting, cancel := context.WithTimeout(ctx, maxWait)
	store, err := evidence.OpenStore(waiting, dir)
	cancel()
	if err != nil {
		return "", err
	}
	defer store.Close()
	ask := t.Nodes
	if strings.HasSuffix(log.Origin, "."+bundle.BastionDomain) {
		ask = t.Bastions
	}
	why := error(fault.New(fault.Unreachable, "choose its cluster with --cluster", "%s cannot be reached, which has the recording", log.Origin))
	reason := t.flag("reason")
	if reason == "" && t.Env != nil {
		reason = t.Env("HALLIGAN_REASON")
	}
	file := path.Join("recordings", name+".cast")
	req := &halliganv1.ReadRecordingRequest{Session: name, Reason: reason, Incident: t.flag("incident")}
	failed, err := ask(ctx, func(ctx context.Context, d Daemon) {
		if d.Name != "" && d.Name != log.Origin {
			return
		}
		stream, err := d.ReadRecording(ctx, req)
		if err == nil {
			err = store.TakeFile(log.Folder, file, parts(stream))
		}
		if why = err; err != nil {
			why = received(err)
		}
	})
	if err != nil {
		return "", err
	}
	if err := failed[log.Origin]; err != nil {
		why = err
	}
	if fault.Is(why, fault.Refused) {
		why = fault.New(fault.Refused, "read it as a commander, --as commander, or ask one", "%s: %s", log.Origin, fault.Of(why).Message)
	}
	return filepath.Join(dir, log.Folder, file), why
}

// play shows a recording, line by line.
func (t *tool) play(ctx context.Context, data io.Reader, speed float64, input bool) error {
	_, events, err := cast.Read(data)
	if err != nil {
		return fault.New(fault.Failed, "look at the file: halligan audit replay --out", "%w", err)
	}
	at := time.Duration(0)
	for l, err := range cast.Lines(events) {
		if err != nil {
			return fault.New(fault.Failed, "look at the file: halligan audit replay --out", "%w", err)
		}
		if l.Kind == cast.Input && !input {
			continue
		}
		if speed > 0 && l.At > at && !pause(ctx, min(time.Duration(float64(l.At-at)/speed), maxPause)) {
			return nil // interrupted
		}
		at = l.At
		if !t.table() {
			if err := t.print(replayed{l.At.Milliseconds(), l.Kind, l.Text}); err != nil {
				return err
			}
			continue
		}
		mark := " "
		if l.Kind == cast.Input {
			mark = "<"
		}
		if _, err := fmt.Fprintf(t.Out, "%9s %s %s\n", clock(l.At), mark, l.Text); err != nil {
			return err
		}
	}
	return nil
}

// replayed is a line for scripts.
type replayed struct {
	AtMs int64  `json:"atMs"`
	Kind string `json:"kind"`
	Text string `json:"text"`
}

// clock tells a time since the beginning, MINUTES:SECONDS.
func clock(d time.Duration) string {
	return fmt.Sprintf("%d:%04.1f", int(d.Minutes()), (d % time.Minute).Seconds())
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
