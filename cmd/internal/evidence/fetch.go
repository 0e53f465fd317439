package evidence

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

func (t *tool) fetch() *cobra.Command {
	return &cobra.Command{
		Use: "fetch DIR", Short: "Fetch what the nodes of a cluster and the bastions have recorded, or what is new of it", Args: arguments(1, 1, "the folder to fetch into"),
		Long: "Fetches the logs of all nodes of the cluster and of the bastions that answer; of a node that does not, the copy\n" +
			"that a bastion keeps. The folder only ever grows: what a daemon rewrites or forgets is still in it, and is said.\n" +
			"Recordings come one by one, with halligan audit replay: that somebody reads one is on record.",
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := t.gather(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			for _, origin := range slices.Sorted(maps.Keys(f.got)) {
				g := f.got[origin]
				t.say("%s  %d new events%s", origin, g.added, from(g.from, origin))
			}
			if len(f.conflicts) > 0 {
				return fault.New(fault.Failed, "see: halligan audit verify "+args[0], "%s", f.conflicts[0])
			}
			return nil
		},
	}
}

func from(by, origin string) string {
	if by == origin {
		return ""
	}
	return ", from the copy of " + by
}

// fetchInto fetches beside what was asked for. That somebody could not be reached
// is said; it is an error where nobody was.
func (t *tool) fetchInto(ctx context.Context, dir string) error {
	_, err := t.gather(ctx, dir)
	return err
}

// fetching is one round.
type fetching struct {
	*tool
	store *evidence.Store
	trust evidence.Trust

	copying sync.Mutex // held while a copy is fetched, which several may have

	mu        sync.Mutex // guards all below
	got       map[string]gotten
	copies    []copied
	failed    map[string]error
	conflicts []string
}

type gotten struct {
	from  string
	added uint64
}

// copied is a copy of a log that a bastion says it has.
type copied struct {
	by string
	*halliganv1.LogInfo
}

// gather asks everybody: bastions first, so that what they say of a node's log is
// never newer than what the node then shows.
func (t *tool) gather(ctx context.Context, dir string) (*fetching, error) {
	waiting, cancel := context.WithTimeout(ctx, maxWait)
	store, err := evidence.OpenStore(waiting, dir)
	cancel()
	if err != nil {
		return nil, err
	}
	defer store.Close()
	f := &fetching{tool: t, store: store, got: map[string]gotten{}, failed: map[string]error{}}
	if f.trust, err = t.trust(); err != nil {
		return nil, err
	}
	failed, err := t.Bastions(ctx, f.bastion)
	if err != nil {
		return nil, err
	}
	maps.Copy(f.failed, failed)
	if failed, err = t.Nodes(ctx, f.node); err != nil {
		return nil, err
	}
	maps.Copy(f.failed, failed)
	if err := f.compare(ctx); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	for _, text := range f.conflicts {
		t.note("%s", text)
	}
	var why error
	for _, name := range slices.Sorted(maps.Keys(f.failed)) {
		if g, ok := f.got[name]; ok && g.from != name {
			t.note("%s: %s; its log is from the copy of %s", name, fault.Of(f.failed[name]).Message, g.from)
		} else if !ok {
			t.note("%s: %s", name, fault.Of(f.failed[name]).Message)
		}
		if why == nil || fault.Is(f.failed[name], fault.Unauthenticated) {
			why = f.failed[name]
		}
	}
	if len(f.got) == 0 {
		if why == nil {
			return nil, fault.New(fault.Unreachable, "choose another cluster with --cluster", "nobody has any evidence")
		}
		e := fault.Of(why)
		code := fault.Unreachable
		if e.Code == fault.Unauthenticated {
			code = e.Code
		}
		return nil, fault.New(code, e.Next, "no evidence could be fetched: %s", e.Message)
	}
	return f, nil
}

// maxWait is how long to wait for another process that fetches into the folder.
const maxWait = 30 * time.Second

// bastion asks a bastion for its own log, and what copies it has.
func (f *fetching) bastion(ctx context.Context, d Daemon) {
	list, err := d.ListLogs(ctx, &halliganv1.ListLogsRequest{})
	if err != nil {
		f.fail(d.Name, err)
		return
	}
	f.mu.Lock()
	for _, info := range list.GetLogs() {
		if info.GetCopy() {
			f.copies = append(f.copies, copied{d.Name, info})
		}
	}
	f.mu.Unlock()
	f.take(ctx, d, "", d.Name)
}

// node asks a node for its log.
func (f *fetching) node(ctx context.Context, d Daemon) {
	if d.Name == "" {
		list, err := d.ListLogs(ctx, &halliganv1.ListLogsRequest{})
		if err != nil {
			f.fail("this node", err)
			return
		}
		for _, info := range list.GetLogs() {
			if !info.GetCopy() {
				d.Name = info.GetOrigin()
			}
		}
		if d.Name == "" {
			return // nothing was recorded yet
		}
	}
	if d.VKey != "" && !slices.Contains(f.tool.vouched, d.VKey) { // there is one console
		f.tool.vouched, f.trust.Keys = append(f.tool.vouched, d.VKey), append(f.trust.Keys, d.VKey)
	}
	f.take(ctx, d, "", d.Name)
}

// take fetches a log: a daemon's own, or one that it has a copy of.
func (f *fetching) take(ctx context.Context, d Daemon, origin, into string) {
	added, err := f.pull(ctx, d, origin, into)
	var conflict *evidence.Conflict
	if errors.As(err, &conflict) {
		// The other one is kept too: both are signed.
		f.conflict("the log that %s shows is not the one that was here: %s", d.Name, conflict.Text)
		more, aerr := f.pull(ctx, d, origin, evidence.Apart(into, d.Name))
		if added += more; aerr != nil && !errors.As(aerr, &conflict) {
			f.fail(into, aerr)
		}
		err = nil
	}
	if err != nil {
		f.fail(into, err)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.got[into] = gotten{d.Name, f.got[into].added + added}
}

func (f *fetching) pull(ctx context.Context, d Daemon, origin, into string) (uint64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := d.ReadLog(ctx, &halliganv1.ReadLogRequest{Origin: origin, Have: f.store.Have(into)})
	if err != nil {
		return 0, api.FromStatus(err)
	}
	return f.store.Take(ctx, into, f.trust, parts(stream))
}

// parts reads files as they come.
func parts(stream grpc.ServerStreamingClient[halliganv1.FilePart]) func() (evidence.Part, error) {
	return func() (evidence.Part, error) {
		p, err := stream.Recv()
		if err != nil {
			return evidence.Part{}, received(err)
		}
		return evidence.Part{Path: p.GetPath(), Offset: p.GetOffset(), Data: p.GetData()}, nil
	}
}

// received is the error of a stream; its end is one too.
func received(err error) error {
	if errors.Is(err, io.EOF) {
		return err
	}
	if _, ok := status.FromError(err); ok {
		return api.FromStatus(err)
	}
	return err
}

func (f *fetching) fail(name string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failed[name] = received(err)
}

func (f *fetching) conflict(text string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	// A bastion says the same of each lineage of a log.
	if said := fmt.Sprintf(text, args...); !slices.Contains(f.conflicts, said) {
		f.conflicts = append(f.conflicts, said)
	}
}

// compare holds what nodes have shown against what bastions have seen of it, and
// fetches the copies that have more, or something else.
func (f *fetching) compare(ctx context.Context) error {
	cluster, asked := "", slices.Sorted(maps.Keys(f.got))
	for _, origin := range append(asked, slices.Sorted(maps.Keys(f.failed))...) {
		if _, of, ok := trust.CutServer(origin); ok && of != bundle.BastionDomain {
			cluster = of
		}
	}
	// meant reports whether a log is one of those: of a node that somebody has named,
	// or of any that the cluster has, or had.
	meant := func(origin string) bool {
		_, got := f.got[origin]
		_, failed := f.failed[origin]
		_, of, ok := trust.CutServer(origin)
		return got || failed || ok && (of == bundle.BastionDomain || f.flag("node") == "" && (cluster == "" || of == cluster))
	}
	wanted := map[string]map[string]bool{} // origins by bastion
	apart := map[string]map[string]bool{}
	add := func(to map[string]map[string]bool, c copied) {
		if to[c.by] == nil {
			to[c.by] = map[string]bool{}
		}
		to[c.by][c.GetOrigin()] = true
	}
	f.mu.Lock()
	copies := f.copies
	f.mu.Unlock()
	for _, c := range copies {
		origin := c.GetOrigin()
		if !meant(origin) {
			continue
		}
		if c.GetProblem() != "" {
			f.conflict("%s says of the log of %s: %s", c.by, origin, c.GetProblem())
		}
		own, reached := f.got[origin]
		text := f.store.Contradicts(origin, c.GetLineage(), c.GetGeneration(), []byte(c.GetCheckpoint()))
		switch {
		case text == "" && (reached && own.from == origin && f.store.Checkpoint(origin, c.GetLineage(), c.GetGeneration()) != nil):
		case text != "" && reached && own.from == origin:
			f.conflict("the log of %s is not the one that %s has seen: %s", origin, c.by, text)
			add(apart, c)
		default:
			add(wanted, c)
		}
	}
	if len(wanted)+len(apart) == 0 {
		return nil
	}
	_, err := f.Bastions(ctx, func(ctx context.Context, d Daemon) {
		for _, origin := range slices.Sorted(maps.Keys(wanted[d.Name])) {
			f.copying.Lock()
			f.take(ctx, d, origin, origin)
			f.copying.Unlock()
		}
		for _, origin := range slices.Sorted(maps.Keys(apart[d.Name])) {
			if _, err := f.pull(ctx, d, origin, evidence.Apart(origin, d.Name)); err != nil {
				f.fail(evidence.Apart(origin, d.Name), err)
			}
		}
	})
	return err
}
