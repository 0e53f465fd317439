package service_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/audit/service"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

type silent struct{}

func (silent) Raise(alarm.Event) {}

// served is the service of a daemon behind a real server.
type served struct {
	t      *testing.T
	ledger *ledger.Ledger
	dir    string
	door   *grpcdoor.Server
}

// serve starts one over a new log, of a bastion where copies are in a folder.
func serve(t *testing.T, origin, copies string) *served {
	t.Helper()
	s := &served{t: t, dir: filepath.Join(t.TempDir(), "audit")}
	var err error
	if s.ledger, err = ledger.Open(ledger.Options{Dir: s.dir, Origin: origin, GenerationBytes: generationBytes, SpoolBytes: 1 << 20, Log: zerolog.Nop()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.ledger.Close() })
	o := service.Options{Ledger: s.ledger, Origin: origin, Identity: func() []byte { return []byte("who") }, Bundle: func() *bundle.Bundle { return nil }, Now: time.Now, Copies: copies, Log: zerolog.Nop(),
		Problem: func(of string) string { return "of " + of }}
	anybody := grpcdoor.Row{May: func(trust.Identity) bool { return true }, Record: grpcdoor.Routine}
	methods := map[string]grpcdoor.Row{grpcdoor.Reflection[0]: anybody, grpcdoor.Reflection[1]: anybody}
	for _, m := range slices.Concat(halliganv1.Evidence_ServiceDesc.Methods) {
		methods["/"+halliganv1.Evidence_ServiceDesc.ServiceName+"/"+m.MethodName] = anybody
	}
	for _, m := range halliganv1.Evidence_ServiceDesc.Streams {
		methods["/"+halliganv1.Evidence_ServiceDesc.ServiceName+"/"+m.StreamName] = anybody
	}
	if s.door, err = grpcdoor.New(grpcdoor.Options{Methods: methods, Alarms: silent{}, Log: zerolog.Nop(), Register: func(r grpc.ServiceRegistrar) { halliganv1.RegisterEvidenceServer(r, service.New(o)) }}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.door.Shutdown)
	return s
}

func (s *served) as(who trust.Identity) halliganv1.EvidenceClient {
	s.t.Helper()
	c, err := s.door.Dial(who, s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return halliganv1.NewEvidenceClient(c)
}

const generationBytes = 64 << 10

// record appends events and waits until they are signed, and the generation that
// they may have filled is followed by the next.
func (s *served) record(n int, text string) {
	s.t.Helper()
	var last audit.Receipt
	for range n {
		var err error
		if last, err = s.ledger.Append(s.t.Context(), audit.Event{Kind: audit.Login, Text: text}); err != nil {
			s.t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	if err := s.ledger.SignedWithin(ctx, last.Seq); err != nil {
		s.t.Fatal(err)
	}
	for heads := s.ledger.Heads(); heads[len(heads)-1].Bytes >= generationBytes; heads = s.ledger.Heads() {
		if ctx.Err() != nil {
			s.t.Fatal("no generation follows a full one")
		}
		time.Sleep(time.Millisecond)
	}
}

// files reads a stream of files into memory, and their names in order.
func files(stream grpc.ServerStreamingClient[halliganv1.FilePart], err error) (map[string][]byte, []string, error) {
	if err != nil {
		return nil, nil, err
	}
	got, names := map[string][]byte{}, []string{}
	whole := true
	for {
		p, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			if !whole {
				return nil, nil, errors.New("the last file is cut off")
			}
			return got, names, nil
		}
		if err != nil {
			return nil, nil, api.FromStatus(err)
		}
		if whole {
			names = append(names, p.GetPath())
		}
		if p.GetPath() != names[len(names)-1] || p.GetOffset() != int64(len(got[p.GetPath()])) || len(p.GetData()) > 256<<10 {
			return nil, nil, fmt.Errorf("a part of %s at %d", p.GetPath(), p.GetOffset())
		}
		got[p.GetPath()] = append(got[p.GetPath()], p.GetData()...)
		whole = p.GetLast()
	}
}

func write(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, data := range files {
		path := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

var ada = trust.Identity{Person: "ada", Role: trust.Commander, Kind: trust.Person, Door: trust.SSH, Clusters: []string{"prod"}, Roles: []trust.Role{trust.Commander}}

// TestReadLog: what was fetched verifies as it lies, after each time that more was
// fetched, and no more comes than what is new.
func TestReadLog(t *testing.T) {
	s := serve(t, "cp-1.prod", "")
	client := s.as(ada)
	to := t.TempDir()
	have := map[string]uint64{}
	total := 0
	for round, n := range []int{3, 1, 300, 0, 40} {
		if n > 0 {
			s.record(n, strings.Repeat("x", 400))
		}
		total += n
		got, names, err := files(client.ReadLog(t.Context(), &halliganv1.ReadLogRequest{Have: have}))
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			for _, name := range names {
				if strings.Contains(name, "/tile/") {
					t.Errorf("nothing is new, and %s comes", name)
				}
			}
		}
		if string(got["identity"]) != "who" {
			t.Errorf("identity: %q", got["identity"])
		}
		write(t, to, got)
		dirs, err := os.ReadDir(filepath.Join(to, "logs"))
		if err != nil {
			t.Fatal(err)
		}
		seen := 0
		for _, d := range dirs {
			if !slices.Contains(names, "logs/"+d.Name()+"/checkpoint") {
				t.Errorf("round %d: no checkpoint of %s", round, d.Name())
			}
			tree, err := tiles.Open(filepath.Join(to, "logs", d.Name()))
			if err != nil {
				t.Fatal(err)
			}
			_, head, err := tree.Checkpoint()
			if err != nil {
				t.Fatal(err)
			}
			if err := tree.Verify(t.Context(), head.Tree, func(int64, []byte) error { return nil }); err != nil {
				t.Errorf("round %d, %s: %v", round, d.Name(), err)
			}
			have[d.Name()] = uint64(head.N)
			seen += int(head.N)
		}
		if seams := len(dirs) - 1; seen != total+seams {
			t.Errorf("round %d: %d events and %d seams of %d", round, seen-seams, seams, total)
		}
	}
	list, err := client.ListLogs(t.Context(), &halliganv1.ListLogsRequest{})
	if err != nil || len(list.GetLogs()) < 2 {
		t.Fatalf("%v, %v", list, err)
	}
	for _, l := range list.GetLogs() {
		if l.GetOrigin() != "cp-1.prod" || l.GetCopy() || l.GetCheckpoint() == "" || l.GetBytes() == 0 || have[fmt.Sprintf("%s.%08d", l.GetLineage(), l.GetGeneration())] != l.GetSize() {
			t.Errorf("%v", l)
		}
	}
	// Who says to have more than there is gets no tiles, and sees by the checkpoint.
	for name := range maps.Keys(have) {
		have[name] = 1 << 62
	}
	if _, names, err := files(client.ReadLog(t.Context(), &halliganv1.ReadLogRequest{Have: have})); err != nil || slices.ContainsFunc(names, func(n string) bool { return strings.Contains(n, "/tile/") }) {
		t.Errorf("%q, %v", names, err)
	}
}

// TestScope: at a bastion somebody reads what bastions did, and of nodes those that
// their credential is for; nobody reads what is in no folder of evidence.
func TestScope(t *testing.T) {
	copies := t.TempDir()
	node := serve(t, "cp-1.prod", "")
	node.record(2, "of the node")
	for _, origin := range []string{"cp-1.prod", "cp-2.prod", "cp-1.staging", "b.bastion"} {
		if err := os.CopyFS(filepath.Join(copies, origin), os.DirFS(node.dir)); err != nil {
			t.Fatal(err)
		}
	}
	s := serve(t, "a.bastion", copies)
	s.record(1, "of the bastion")
	narrow := ada
	narrow.Scope.Nodes = []string{"cp-2*"}
	stranger := ada
	stranger.Clusters = nil
	for name, c := range map[string]struct {
		who  trust.Identity
		sees string
	}{"ada": {ada, "a.bastion b.bastion cp-1.prod cp-2.prod"}, "narrow": {narrow, "a.bastion b.bastion cp-2.prod"}, "stranger": {stranger, "a.bastion b.bastion"}} {
		client := s.as(c.who)
		list, err := client.ListLogs(t.Context(), &halliganv1.ListLogsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var sees []string
		for _, l := range list.GetLogs() {
			sees = append(sees, l.GetOrigin())
			if l.GetCopy() != (l.GetOrigin() != "a.bastion") || l.GetCopy() && l.GetProblem() != "of "+l.GetOrigin() {
				t.Errorf("%v", l)
			}
		}
		if slices.Sort(sees); strings.Join(sees, " ") != c.sees {
			t.Errorf("%s sees %q, want %q", name, sees, c.sees)
		}
		for _, origin := range []string{"a.bastion", "b.bastion", "cp-1.prod", "cp-2.prod", "cp-1.staging"} {
			got, _, err := files(client.ReadLog(t.Context(), &halliganv1.ReadLogRequest{Origin: origin}))
			if may := slices.Contains(sees, origin); may != (err == nil) || !may && !fault.Is(err, fault.Refused) {
				t.Errorf("%s reads %s: %v", name, origin, err)
			}
			for file := range got {
				if strings.Contains(file, "key") || strings.Contains(file, "spool") || strings.Contains(file, ".state") {
					t.Errorf("%s of %s leaves it", file, origin)
				}
			}
		}
		for _, origin := range []string{"../../etc", "cp-1.prod/..", "nobody.prod", ".", strings.Repeat("x", 5000)} {
			if _, _, err := files(client.ReadLog(t.Context(), &halliganv1.ReadLogRequest{Origin: origin})); err == nil {
				t.Errorf("%s reads %.40q", name, origin)
			}
			if _, _, err := files(client.ReadSealed(t.Context(), &halliganv1.ReadSealedRequest{Origin: origin, ActionId: "x"})); err == nil {
				t.Errorf("%s reads sealed images of %.40q", name, origin)
			}
		}
	}
	// An agent has nothing but its own.
	if _, _, err := files(node.as(ada).ReadLog(t.Context(), &halliganv1.ReadLogRequest{Origin: "a.bastion"})); !fault.Is(err, fault.Refused) {
		t.Errorf("another's log at an agent: %v", err)
	}
}

// TestReadRecording: that a recording is read is on record before the first byte of
// it leaves, and nothing that is none can be read so.
func TestReadRecording(t *testing.T) {
	s := serve(t, "cp-1.prod", "")
	body := bytes.Repeat([]byte("0123456789abcdef"), 40_000) // more than two parts
	secret := filepath.Join(s.dir, "recordings", "outside.cast")
	write(t, s.dir, map[string][]byte{"recordings/s-1.cast": body, "recordings/empty.cast": nil, "sealed/a-1.age": []byte("sealed")})
	if err := os.Symlink("/etc/passwd", secret); err != nil {
		t.Fatal(err)
	}
	client := s.as(ada)
	before := s.ledger.State().Events
	got, _, err := files(client.ReadRecording(t.Context(), &halliganv1.ReadRecordingRequest{Session: "s-1", Reason: "why", Incident: "INC-1"}))
	if err != nil || !bytes.Equal(got["recordings/s-1.cast"], body) {
		t.Fatalf("%d bytes, %v", len(got["recordings/s-1.cast"]), err)
	}
	if got, _, err := files(client.ReadRecording(t.Context(), &halliganv1.ReadRecordingRequest{Session: "empty"})); err != nil || len(got) != 1 {
		t.Errorf("an empty one: %v, %v", got, err)
	}
	if n := s.ledger.State().Events; n != before+2 {
		t.Errorf("%d events after %d", n, before)
	}
	for _, session := range []string{"", "none", "../key", "../../audit/key", "outside", ".", "s-1.cast", "s-1\x00"} {
		if got, _, err := files(client.ReadRecording(t.Context(), &halliganv1.ReadRecordingRequest{Session: session})); err == nil {
			t.Errorf("session %q: %v", session, got)
		}
	}
	for action, want := range map[string]bool{"a-1": true, "": false, "../key": false, "none": false} {
		got, _, err := files(client.ReadSealed(t.Context(), &halliganv1.ReadSealedRequest{ActionId: action}))
		if (err == nil) != want || want && string(got["sealed/a-1.age"]) != "sealed" {
			t.Errorf("action %q: %v, %v", action, got, err)
		}
	}
	s.record(1, "")
	h := s.ledger.Heads()[0]
	found := 0
	for e, err := range s.ledger.Entries(t.Context(), h.Lineage, h.Generation, 0, h.Size) {
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(e, []byte(`"kind":"secret"`)) && bytes.Contains(e, []byte(`"person":"ada"`)) && bytes.Contains(e, []byte(`cp-1.prod s-1`)) && bytes.Contains(e, []byte(`"incident":"INC-1"`)) {
			found++
		}
	}
	if found != 1 {
		t.Errorf("%d events tell of it", found)
	}
	// What cannot be recorded is not read.
	s.ledger.Close()
	if got, _, err := files(client.ReadRecording(t.Context(), &halliganv1.ReadRecordingRequest{Session: "s-1"})); !fault.Is(err, fault.AuditUnavailable) {
		t.Errorf("without a log: %d files, %v", len(got), err)
	}
	if _, _, err := files(client.ReadLog(t.Context(), &halliganv1.ReadLogRequest{})); err != nil {
		t.Errorf("the log itself: %v", err)
	}
}
