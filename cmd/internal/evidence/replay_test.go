package evidence

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/cast"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// daemon hands out a folder of evidence as it lies.
type daemon struct {
	halliganv1.EvidenceClient
	dir  string
	asks []*halliganv1.ReadRecordingRequest
}

// pieces are a stream of files.
type pieces struct {
	grpc.ClientStream
	parts []*halliganv1.FilePart
}

func (p *pieces) Recv() (*halliganv1.FilePart, error) {
	if len(p.parts) == 0 {
		return nil, io.EOF
	}
	part := p.parts[0]
	p.parts = p.parts[1:]
	return part, nil
}

func (d *daemon) ReadLog(context.Context, *halliganv1.ReadLogRequest, ...grpc.CallOption) (grpc.ServerStreamingClient[halliganv1.FilePart], error) {
	p := &pieces{}
	return p, filepath.WalkDir(filepath.Join(d.dir, "logs"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, _ := filepath.Rel(d.dir, path)
		data, err := os.ReadFile(path)
		p.parts = append(p.parts, &halliganv1.FilePart{Path: name, Data: data})
		return err
	})
}

func (d *daemon) ReadRecording(_ context.Context, req *halliganv1.ReadRecordingRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[halliganv1.FilePart], error) {
	d.asks = append(d.asks, req)
	name := "recordings/" + req.GetSession() + ".cast"
	data, err := os.ReadFile(filepath.Join(d.dir, name))
	if err != nil {
		return nil, api.ToStatus(fault.New(fault.NotFound, "", "no such recording"))
	}
	return &pieces{parts: []*halliganv1.FilePart{{Path: name, Data: data}}}, nil
}

// TestReplay: a session is fetched, compared with the log, and shown inert; what
// somebody has changed is not shown.
func TestReplay(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	log, err := ledger.Open(ledger.Options{Dir: dir, Origin: "cp-1.lab", Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	casts := filepath.Join(dir, "recordings")
	r, err := cast.Open(cast.Options{Dir: casts, Log: log, Input: true, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ada := trust.Identity{Person: "ada", Role: trust.Responder, Kind: trust.Person, Session: trust.NewSession(time.Now())}
	begin := func(command, text string) *cast.Session {
		t.Helper()
		s, err := r.Begin(t.Context(), cast.About{Who: ada, What: cast.Exec, Command: command, At: "cp-1.lab"})
		if err != nil {
			t.Fatal(err)
		}
		s.Input([]byte("typed\r"))
		if err := s.Output([]byte(text)); err != nil {
			t.Fatal(err)
		}
		return s
	}
	begin("status", "all is \x1b]0;owned\a\x1b[2Jwell\nso far\n").End(0, nil)
	begin("whoami", "ada\n").End(0, nil)
	live := begin("top", strings.Repeat("a line of a live session\n", 4000))
	defer live.End(0, nil)
	// The log gets all that is due, and what it has is signed.
	var names []string
	d := &daemon{dir: dir}
	state := filepath.Join(t.TempDir(), "state")
	run := func(output string, args ...string) (string, error) {
		t.Helper()
		var out bytes.Buffer
		s := Surroundings{Out: &out, Err: &out, Now: time.Now, Env: func(string) string { return "by env" },
			PrintJSON: func(text []byte) error { _, err := out.Write(append(text, '\n')); return err },
			Bundle:    func() (*bundle.Bundle, error) { return nil, nil },
			State:     func() (string, error) { return state, nil },
			Nodes: func(ctx context.Context, do func(context.Context, Daemon)) (map[string]error, error) {
				do(ctx, Daemon{Name: "cp-1.lab", EvidenceClient: d, VKey: log.State().VKey})
				return nil, nil
			},
			Bastions: func(context.Context, func(context.Context, Daemon)) (map[string]error, error) { return nil, nil }}
		root := &cobra.Command{Use: "halligan", SilenceErrors: true, SilenceUsage: true}
		for name, value := range map[string]string{"output": output, "reason": "", "incident": "", "node": ""} {
			root.PersistentFlags().String(name, value, "")
		}
		root.AddCommand(Command(s))
		root.SetArgs(append([]string{"audit", "replay"}, args...))
		err := root.Execute()
		return out.String(), err
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		names = nil
		chunks := 0
		for _, g := range log.Heads() {
			for entry, err := range log.Entries(t.Context(), g.Lineage, g.Generation, 0, g.Size) {
				var e audit.Event
				if err != nil || json.Unmarshal(entry, &e) != nil {
					t.Fatal(err)
				}
				if e.Kind == audit.Session {
					names = append(names, e.Target)
				}
				if e.Chunk != nil {
					chunks++
				}
			}
		}
		if len(names) == 3 && chunks >= 3 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d chunks of %q", chunks, names)
		}
	}
	list, err := run("table")
	if err != nil || !strings.Contains(list, names[0]+"  cp-1.lab  ada responder  exec  \"status\"  exit status 0 after ") {
		t.Errorf("%q, %v", list, err)
	}
	text, err := run("table", names[0], "--reason", "to learn", "--incident", "INC-7")
	if err != nil || !strings.Contains(text, `0:00.0   all is \x1b]0;owned\x1b[2Jwell`+"\n   0:00.0   so far\n") || strings.Contains(text, "typed") || strings.ContainsAny(text, "\x1b\a") {
		t.Errorf("%q, %v", text, err)
	}
	if len(d.asks) != 1 || d.asks[0].GetReason() != "to learn" || d.asks[0].GetIncident() != "INC-7" {
		t.Errorf("%v", d.asks)
	}
	// All of a connection; what is here already is not fetched again.
	if text, err = run("table", ada.Session, "--input"); err != nil || !strings.Contains(text, "so far") || !strings.Contains(text, "< typed") || !strings.Contains(text, "   ada\n") ||
		!strings.Contains(text, "still going on") || strings.Count(text, "a line of a live session\n") < 2000 || strings.Count(text, "live session") > 4001 {
		t.Errorf("%.4000q, %v", text, err)
	}
	if len(d.asks) != 3 || d.asks[2].GetReason() != "by env" {
		t.Errorf("%v", d.asks)
	}
	if _, err := os.Stat(filepath.Join(state, "cp-1.lab", "recordings", names[2]+".cast")); err == nil {
		t.Error("a part is kept that the log will have more of")
	}
	if text, err = run("json", names[1]); err != nil || !strings.Contains(text, `"kind":"o","text":"ada"}`) {
		t.Errorf("%q, %v", text, err)
	}
	file := filepath.Join(t.TempDir(), "out.cast")
	original, err := os.ReadFile(filepath.Join(casts, names[0]+".cast"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := run("table", names[0], "--out", file); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, original) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	// From a folder that somebody carried here, with the key; and changed.
	if text, err = run("table", names[0], dir, "--key", log.State().VKey); err != nil || !strings.Contains(text, "so far") {
		t.Errorf("%q, %v", text, err)
	}
	path := filepath.Join(state, "cp-1.lab", "recordings", names[0]+".cast")
	if err := os.WriteFile(path, bytes.Replace(original, []byte("so far"), []byte("as ever"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if text, err = run("table", names[0]); !fault.Is(err, fault.Failed) || strings.Contains(text, "ever") || !strings.Contains(err.Error(), "not what event") {
		t.Errorf("%q, %v", text, err)
	}
	for _, args := range [][]string{{"x", "y", "z"}, {"--out", "x"}, {names[0], "--speed", "-1"}, {ada.Session, "--out", "x"}, {names[0], "--yes"}} {
		if _, err := run("table", args...); err == nil {
			t.Errorf("%q passed", args)
		}
	}
	if _, err := run("table", "20261123-000000-0123456789"); !fault.Is(err, fault.NotFound) {
		t.Error(err)
	}
}
