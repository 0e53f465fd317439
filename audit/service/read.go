package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/grpc"

	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/sealed"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
)

// maxPart is the most that one message of a file carries, in bytes.
const maxPart = 256 << 10

// maxSmall bounds the files of an evidence folder that are read as a whole:
// statements, checkpoints, proofs of problems.
const maxSmall = 256 << 10

var sessionForm = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z._-]{0,127}$`)

// parts is a stream of files.
type parts interface {
	Send(*halliganv1.FilePart) error
	Context() context.Context
}

// ListLogs tells of the daemon's own log and, at a bastion, of the copies that the
// caller may read.
func (s *Service) ListLogs(ctx context.Context, _ *halliganv1.ListLogsRequest) (*halliganv1.ListLogsResponse, error) {
	c, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	out := &halliganv1.ListLogsResponse{}
	for _, h := range s.o.Ledger.Heads() {
		out.Logs = append(out.Logs, &halliganv1.LogInfo{Origin: s.o.Origin, Lineage: h.Lineage, Generation: h.Generation, Size: h.Size, FirstSeq: h.FirstSeq,
			Checkpoint: string(h.Checkpoint), Cosigned: string(h.Cosigned), Bytes: h.Bytes})
	}
	for _, origin := range s.origins(c.Who) {
		root, err := os.OpenRoot(s.copyOf(origin))
		if err != nil {
			continue // its first entries are on the way
		}
		problem := s.o.Problem(origin)
		for _, g := range generations(root) {
			head, err := small(root, path.Join(g.dir, "checkpoint"))
			if err != nil {
				continue
			}
			info := &halliganv1.LogInfo{Origin: origin, Lineage: g.lineage, Generation: g.number, Checkpoint: string(head), Copy: true, Problem: problem}
			if cp, err := tiles.ParseCheckpoint(head); err == nil {
				info.Size = uint64(max(0, cp.N))
			}
			if cosigned, err := small(root, path.Join(g.dir, "cosigned")); err == nil {
				info.Cosigned = string(cosigned)
			}
			out.Logs = append(out.Logs, info)
		}
		root.Close()
	}
	return out, nil
}

// ReadLog streams what is new of one log. The checkpoint of a generation comes
// after all that it covers: a stream that breaks leaves the caller with a folder
// that verifies as the older state.
func (s *Service) ReadLog(req *halliganv1.ReadLogRequest, stream grpc.ServerStreamingServer[halliganv1.FilePart]) error {
	root, _, err := s.root(stream.Context(), req.GetOrigin())
	if err != nil {
		return err
	}
	defer root.Close()
	mine := req.GetOrigin() == "" || req.GetOrigin() == s.o.Origin
	if mine {
		s.settle(stream.Context())
	}
	if own := s.o.Identity(); own != nil && mine {
		if err := send(stream, "identity", own); err != nil {
			return err
		}
	} else if err := sendSmall(stream, root, "identity"); err != nil {
		return err
	}
	for _, g := range generations(root) {
		if err := sendSmall(stream, root, "identity."+g.lineage); err != nil {
			return err
		}
		if err := s.sendGeneration(stream, root, g, req.GetHave()[path.Base(g.dir)]); err != nil {
			return err
		}
	}
	return eachFile(root, "problems", func(name string) error { return sendSmall(stream, root, name) })
}

// settled is how long to wait for a checkpoint over what was acknowledged: twice what
// one takes at most.
const settled = 2 * time.Second

// settle waits until what is in the log is signed, so that whoever has done something
// and asks next is told of it. A log that is in trouble hands out what it has.
func (s *Service) settle(ctx context.Context) {
	state := s.o.Ledger.State()
	if state.Events == state.Signed || state.Refused != "" || state.Problem != "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, settled)
	defer cancel()
	_ = s.o.Ledger.SignedWithin(ctx, state.Events-1) // as above
}

// sendGeneration streams the tiles of a generation that hold more than the entries
// that the caller has.
func (s *Service) sendGeneration(stream parts, root *os.Root, g generation, have uint64) error {
	checkpoint, err := small(root, path.Join(g.dir, "checkpoint"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nothing was signed yet
	}
	if err != nil {
		return err
	}
	cosigned, err := small(root, path.Join(g.dir, "cosigned"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	head, err := tiles.ParseCheckpoint(checkpoint)
	if err != nil {
		return err
	}
	for tile := range newTiles(int64(min(have, uint64(head.N))), head.N) { // #nosec G115 -- at most head.N
		data, err := readTile(root, g.dir, tile)
		if err != nil {
			return fmt.Errorf("the log %s: %w", path.Base(g.dir), err)
		}
		if err := send(stream, path.Join(g.dir, torchwood.TilePath(tile)), data); err != nil {
			return err
		}
	}
	if cosigned != nil {
		if err := send(stream, path.Join(g.dir, "cosigned"), cosigned); err != nil {
			return err
		}
	}
	return send(stream, path.Join(g.dir, "checkpoint"), checkpoint)
}

// newTiles yields the tiles and bundles of a tree of a size that one of another size,
// at most that, does not have.
func newTiles(from, to int64) iter.Seq[tlog.Tile] {
	return func(yield func(tlog.Tile) bool) {
		for level := -1; ; level++ {
			shift := torchwood.TileHeight * max(level, 0)
			first, last := from>>shift, to>>shift
			if last == 0 {
				return
			}
			for n := first / torchwood.TileWidth; n*torchwood.TileWidth < last; n++ {
				end := min((n+1)*torchwood.TileWidth, last)
				if end > first && !yield(tlog.Tile{H: torchwood.TileHeight, L: level, N: n, W: int(end - n*torchwood.TileWidth)}) {
					return
				}
			}
		}
	}
}

// readTile reads a tile or, where a wider one has taken its place, the part of that
// which it is.
func readTile(root *os.Root, dir string, tile tlog.Tile) ([]byte, error) {
	const most = torchwood.TileWidth * (2 + 0xffff)
	name := path.Join(dir, torchwood.TilePath(tile))
	data, err := whole(root, name, most)
	if err == nil || !errors.Is(err, fs.ErrNotExist) || tile.W == torchwood.TileWidth {
		return data, err
	}
	full := tile
	full.W = torchwood.TileWidth
	wider := []string{path.Join(dir, torchwood.TilePath(full))}
	if d, derr := root.Open(path.Dir(name)); derr == nil {
		names, _ := d.Readdirnames(-1)
		d.Close()
		for _, n := range names {
			if w, werr := strconv.Atoi(n); werr == nil && w > tile.W {
				wider = append(wider, path.Join(path.Dir(name), n))
			}
		}
	}
	for _, other := range wider {
		if data, oerr := whole(root, other, most); oerr == nil {
			return narrow(data, tile)
		}
	}
	return nil, err
}

// narrow cuts a wider tile down.
func narrow(data []byte, tile tlog.Tile) ([]byte, error) {
	if tile.L >= 0 {
		if len(data) < tile.W*tlog.HashSize {
			return nil, io.ErrUnexpectedEOF
		}
		return data[:tile.W*tlog.HashSize], nil
	}
	rest := data
	for range tile.W {
		var err error
		if _, rest, err = torchwood.ReadTileEntry(rest); err != nil {
			return nil, err
		}
	}
	return data[:len(data)-len(rest)], nil
}

// ReadRecording streams a recording, once it is in the log who reads it.
func (s *Service) ReadRecording(req *halliganv1.ReadRecordingRequest, stream grpc.ServerStreamingServer[halliganv1.FilePart]) error {
	c, err := grpcdoor.CallerOf(stream.Context())
	if err != nil {
		return err
	}
	root, origin, err := s.root(stream.Context(), req.GetOrigin())
	if err != nil {
		return err
	}
	defer root.Close()
	name := "recordings/" + req.GetSession() + ".cast"
	if !sessionForm.MatchString(req.GetSession()) {
		return fault.New(fault.Usage, "see: halligan audit show", "%.80q is not the name of a session", req.GetSession())
	}
	f, size, err := open(root, name)
	if err != nil {
		return fault.New(fault.NotFound, "ask the daemon that the session was at, before its recordings make room for newer ones", "%s has no recording of session %s", origin, req.GetSession())
	}
	defer f.Close()
	if _, err := s.o.Ledger.Append(stream.Context(), audit.Event{Kind: audit.Secret, Actor: audit.ActorOf(c.Who), Session: c.Who.Session, Action: "ReadRecording",
		Target: origin + " " + req.GetSession(), Reason: req.GetReason(), Incident: req.GetIncident(), Drill: c.Who.Scope.Drill}); err != nil {
		return err
	}
	return sendFile(stream, name, f, size)
}

// ReadSealed streams sealed before-images.
func (s *Service) ReadSealed(req *halliganv1.ReadSealedRequest, stream grpc.ServerStreamingServer[halliganv1.FilePart]) error {
	root, origin, err := s.root(stream.Context(), req.GetOrigin())
	if err != nil {
		return err
	}
	defer root.Close()
	name, err := sealed.Name(req.GetActionId())
	if err != nil {
		return err
	}
	f, size, err := open(root, name)
	if err != nil {
		return fault.New(fault.NotFound, "ask another bastion, or the agent that took them", "%s has no sealed before-images of %s", origin, req.GetActionId())
	}
	defer f.Close()
	return sendFile(stream, name, f, size)
}

// root opens the folder of an origin that the caller may read. Nothing outside of it
// can be reached through it.
func (s *Service) root(ctx context.Context, asked string) (root *os.Root, origin string, err error) {
	c, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, "", err
	}
	dir := s.o.Ledger.Dir()
	if origin = s.o.Origin; asked != "" && asked != origin {
		if !trust.ValidServer(asked) || !s.sees(c.Who, asked) {
			return nil, "", fault.New(fault.Refused, "name one that your credential is for; see: halligan status", "%s may not read the log of %s here", c.Who.Person, neutral.LineMax(asked, 80))
		}
		dir, origin = s.copyOf(asked), asked
	}
	if root, err = os.OpenRoot(dir); err != nil {
		return nil, "", fault.New(fault.NotFound, "ask another bastion, or the daemon itself", "there is no copy of the log of %s here", origin)
	}
	return root, origin, nil
}

// origins returns those copies that somebody may read.
func (s *Service) origins(who trust.Identity) (list []string) {
	if s.o.Copies == "" {
		return nil
	}
	entries, _ := os.ReadDir(s.o.Copies) // none before the first
	for _, e := range entries {
		if e.IsDir() && trust.ValidServer(e.Name()) && e.Name() != s.o.Origin && s.sees(who, e.Name()) {
			list = append(list, e.Name())
		}
	}
	return list
}

// generation is the folder of one tree.
type generation struct {
	dir, lineage string
	number       uint64
}

// generations lists those of an evidence folder, in order.
func generations(root *os.Root) (list []generation) {
	_ = eachFile(root, "logs", func(name string) error {
		if lineage, number, ok := tiles.ParseFolder(path.Base(name)); ok {
			list = append(list, generation{name, lineage, number})
		}
		return nil
	})
	return list
}

// eachFile tells of what is in a folder, in the order of the names.
func eachFile(root *os.Root, dir string, each func(name string) error) error {
	d, err := root.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	names, err := d.Readdirnames(-1)
	d.Close()
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, n := range names {
		if n[0] == '.' { // being written
			continue
		}
		if err := each(path.Join(dir, n)); err != nil {
			return err
		}
	}
	return nil
}

// open opens a plain file.
func open(root *os.Root, name string) (f *os.File, size int64, err error) {
	st, err := root.Lstat(name)
	if err != nil {
		return nil, 0, err
	}
	if !st.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%s is no plain file", name)
	}
	f, err = root.Open(name)
	return f, st.Size(), err
}

func whole(root *os.Root, name string, most int64) ([]byte, error) {
	f, size, err := open(root, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > most {
		return nil, fmt.Errorf("%s has more than %d bytes", name, most)
	}
	return io.ReadAll(io.LimitReader(f, most))
}

func small(root *os.Root, name string) ([]byte, error) { return whole(root, name, maxSmall) }

// sendSmall sends a file that need not be there.
func sendSmall(stream parts, root *os.Root, name string) error {
	data, err := small(root, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return send(stream, name, data)
}

// send sends a file that is in memory.
func send(stream parts, name string, data []byte) error {
	for offset := 0; ; {
		n := min(maxPart, len(data)-offset)
		part := &halliganv1.FilePart{Path: name, Offset: int64(offset), Data: data[offset : offset+n], Last: offset+n == len(data)}
		if err := stream.Send(part); err != nil || part.Last {
			return err
		}
		offset += n
	}
}

// sendFile sends a file as long as it was when it was opened.
func sendFile(stream parts, name string, f io.Reader, size int64) error {
	for offset := int64(0); ; {
		data := make([]byte, min(maxPart, size-offset))
		if _, err := io.ReadFull(f, data); err != nil {
			return fmt.Errorf("reading %s: %w", name, err)
		}
		part := &halliganv1.FilePart{Path: name, Offset: offset, Data: data, Last: offset+int64(len(data)) == size}
		if err := stream.Send(part); err != nil || part.Last {
			return err
		}
		offset += int64(len(data))
	}
}
