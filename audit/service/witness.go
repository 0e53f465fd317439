package service

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/audit/sealed"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

const (
	// maxBatch bounds the entries of one message in bytes, but for a single one.
	maxBatch = 256 << 10
	// maxCosigned bounds a countersigned checkpoint in bytes, maxPeers how many
	// agents a bastion may tell of.
	maxCosigned = 16 << 10
	maxPeers    = 512
	// patience is how long a caller may take to say who it is.
	patience = 15 * time.Second
	// pace is how many messages a bastion may send a second, and at once: it
	// answers each checkpoint, of which there are a few a second.
	pace, burst = 20, 100
)

// stream is a bastion that witnesses this log.
type stream struct {
	*Service
	grpc   grpc.BidiStreamingServer[halliganv1.WitnessRequest, halliganv1.WitnessResponse]
	server string
	key    ed25519.PublicKey
	end    context.CancelCauseFunc
	// identity is what this daemon has said of itself.
	identity []byte
	// sent is how much of each generation the bastion has, by lineage and number.
	sent map[generationID]uint64
	// offered are the sealed files that were sent.
	offered map[string]bool
}

type generationID struct {
	lineage string
	number  uint64
}

// Witness lets a bastion witness the daemon's own log. All that it sends back must be
// signed by it, and says nothing but that it has what this daemon signed before. Of
// one bastion the newest stream counts.
func (s *Service) Witness(g grpc.BidiStreamingServer[halliganv1.WitnessRequest, halliganv1.WitnessResponse]) error {
	c, err := grpcdoor.CallerOf(g.Context())
	if err != nil {
		return err
	}
	if c.Who.Kind != trust.Bastion {
		return fault.New(fault.Refused, "bastions do that by themselves", "%s is no bastion", c.Who.Person)
	}
	ctx, end := context.WithCancelCause(g.Context())
	defer end(nil)
	defer context.AfterFunc(s.o.Stopping(), func() { end(fault.New(fault.Unreachable, "", "%s stops", s.o.Origin)) })()
	st := &stream{Service: s, grpc: g, server: c.Who.Person, end: end, sent: map[generationID]uint64{}, offered: map[string]bool{}}
	if err := st.begin(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	if before := s.streams[st.server]; before != nil {
		before.end(fault.New(fault.Cancelled, "", "%s has another stream", st.server))
	}
	s.streams[st.server] = st
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.streams[st.server] == st {
			delete(s.streams, st.server)
		}
	}()
	return st.serve(ctx)
}

// begin hears who the bastion is and what it has, and answers who this is.
func (st *stream) begin(ctx context.Context) error {
	within := time.AfterFunc(patience, func() { st.end(fault.New(fault.Cancelled, "", "%s says nothing", st.server)) })
	defer within.Stop()
	first := make(chan *halliganv1.WitnessRequest, 1)
	failed := make(chan error, 1)
	go func() {
		req, err := st.grpc.Recv() // ends with the stream, which ends when this returns
		if err != nil {
			failed <- err
			return
		}
		first <- req
	}()
	var have *halliganv1.WitnessHave
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case err := <-failed:
		return err
	case req := <-first:
		if have = req.GetHave(); have == nil {
			return fault.New(fault.Usage, "", "a witness begins with what it has")
		}
	}
	b := st.o.Bundle()
	if b == nil {
		return fault.New(fault.Refused, "copy the bundle there", "%s has no bundle that it can use", st.o.Origin)
	}
	said, err := logkey.Verify(have.GetIdentity(), b, st.o.Now())
	switch {
	case err != nil:
		return err
	case said.Server != st.server || said.Witness == nil:
		return fault.New(fault.Unauthenticated, "", "%s shows the statement of %s", st.server, said.Server)
	}
	st.key = said.Witness
	for _, h := range have.GetLogs() {
		st.sent[generationID{h.GetLineage(), h.GetGeneration()}] = h.GetSize()
	}
	return st.identify()
}

// identify says who this is, where that was not said yet.
func (st *stream) identify() error {
	own := st.o.Identity()
	if own == nil {
		return fault.New(fault.Failed, "see why its SSH door is not open", "%s has no statement of its log's key yet", st.o.Origin)
	}
	if bytes.Equal(own, st.identity) {
		return nil
	}
	st.identity = own
	return st.grpc.Send(&halliganv1.WitnessResponse{Message: &halliganv1.WitnessResponse_Identity{Identity: own}})
}

// serve sends what is new, and hears what the bastion answers.
func (st *stream) serve(ctx context.Context) error {
	changed, cancel := st.o.Ledger.Changed()
	defer cancel()
	var more <-chan struct{}
	if st.o.Sealed != nil {
		files, cancel := st.o.Sealed.Changed()
		defer cancel()
		more = files
	}
	keeper, leave := st.o.Holder.join(st.server, st.key)
	defer leave()
	heard := make(chan error, 1)
	go func() { heard <- st.hear(ctx, keeper) }()
	first := true
	for {
		if err := st.holds(keeper); err != nil {
			return err
		}
		if err := st.identify(); err != nil {
			return err
		}
		if err := st.logs(ctx, keeper, first); err != nil {
			return err
		}
		if err := st.images(keeper); err != nil {
			return err
		}
		first = false
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case err := <-heard:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-changed:
		case <-more:
		case <-keeper.wake:
		}
	}
}

// holds asks for what the ledger cannot take.
func (st *stream) holds(k *keeper) error {
	for _, h := range st.o.Holder.ask(k) {
		if err := st.grpc.Send(&halliganv1.WitnessResponse{Message: &halliganv1.WitnessResponse_Hold{Hold: h}}); err != nil {
			return err
		}
	}
	return nil
}

// logs sends the heads that the bastion does not have, each with what is new under
// it, and at first the newest one in any case: a bastion that has more of a log than
// there is finds out by it.
func (st *stream) logs(ctx context.Context, k *keeper, first bool) error {
	heads := st.o.Ledger.Heads() // the newest last
	for i, h := range heads {
		id := generationID{h.Lineage, h.Generation}
		have, known := st.sent[id]
		if cp, err := tiles.ParseCheckpoint(h.Checkpoint); err != nil || cp.Origin != logkey.Tree(st.o.Origin, h.Lineage, h.Generation) {
			continue // this daemon had another name then
		}
		if h.Size == 0 || known && have == h.Size && (!first || i+1 < len(heads)) {
			continue
		}
		head := &halliganv1.WitnessHead{Lineage: h.Lineage, Generation: h.Generation, FirstSeq: h.FirstSeq, Checkpoint: h.Checkpoint}
		if err := st.grpc.Send(&halliganv1.WitnessResponse{Message: &halliganv1.WitnessResponse_Head{Head: head}}); err != nil {
			return err
		}
		if err := st.entries(ctx, k, h, have); err != nil {
			return err
		}
		st.sent[id] = max(have, h.Size)
	}
	return nil
}

// entries sends those from an index on up to a head.
func (st *stream) entries(ctx context.Context, k *keeper, h ledger.Head, from uint64) error {
	if from >= h.Size {
		return nil
	}
	batch := &halliganv1.WitnessEntries{First: from}
	bytes := 0
	flush := func() error {
		if len(batch.Entries) == 0 {
			return nil
		}
		if err := st.grpc.Send(&halliganv1.WitnessResponse{Message: &halliganv1.WitnessResponse_Entries{Entries: batch}}); err != nil {
			return err
		}
		batch = &halliganv1.WitnessEntries{First: batch.First + uint64(len(batch.Entries))}
		bytes = 0
		return st.holds(k) // which wait for nothing
	}
	for entry, err := range st.o.Ledger.Entries(ctx, h.Lineage, h.Generation, from, h.Size) {
		if err != nil {
			return fmt.Errorf("reading the log: %w", err)
		}
		if bytes+len(entry) > maxBatch {
			if err := flush(); err != nil {
				return err
			}
		}
		batch.Entries = append(batch.Entries, entry)
		bytes += len(entry)
	}
	return flush()
}

// images sends sealed before-images that the bastion has not said to have.
func (st *stream) images(k *keeper) error {
	if st.o.Sealed == nil {
		return nil
	}
	for _, f := range st.o.Sealed.Unsent(st.server) {
		if st.offered[f.SHA256] {
			continue
		}
		st.offered[f.SHA256] = true
		if err := st.image(k, f); err != nil {
			return err
		}
	}
	return nil
}

func (st *stream) image(k *keeper, f sealed.File) error {
	file, err := os.Open(f.Path)
	if errors.Is(err, os.ErrNotExist) {
		return nil // it made room for a newer one
	}
	if err != nil {
		return err
	}
	defer file.Close()
	data := make([]byte, maxPart)
	for offset := int64(0); ; {
		n, err := io.ReadFull(file, data)
		last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !last {
			return err
		}
		part := &halliganv1.WitnessSealed{ActionId: f.Action, Offset: offset, Data: data[:n], Last: last}
		if err := st.grpc.Send(&halliganv1.WitnessResponse{Message: &halliganv1.WitnessResponse_Sealed{Sealed: part}}); err != nil || last {
			return err
		}
		offset += int64(n)
		if err := st.holds(k); err != nil {
			return err
		}
	}
}

// hear takes what the bastion sends until its stream ends. What does not hold ends
// it: a bastion that is one of ours sends nothing of the kind.
func (st *stream) hear(ctx context.Context, k *keeper) error {
	limit := rate.NewLimiter(pace, burst)
	for {
		req, err := st.grpc.Recv()
		if err != nil {
			return err
		}
		if err := limit.Wait(ctx); err != nil {
			return context.Cause(ctx)
		}
		switch m := req.GetMessage().(type) {
		case *halliganv1.WitnessRequest_Cosigned:
			err = st.cosigned(m.Cosigned)
		case *halliganv1.WitnessRequest_Receipt:
			err = st.o.Holder.receipt(k, m.Receipt)
		case *halliganv1.WitnessRequest_Peers:
			if st.o.Sealed != nil && len(m.Peers.GetIdentities()) <= maxPeers {
				st.o.Sealed.Meet(m.Peers.GetIdentities())
			}
		case *halliganv1.WitnessRequest_Stored:
			if st.o.Sealed != nil {
				st.o.Sealed.Stored(st.server, m.Stored.GetActionId(), m.Stored.GetSha256())
			}
		default:
			err = fault.New(fault.Usage, "", "a message that a witness does not send")
		}
		if err != nil {
			return err
		}
	}
}

// cosigned takes a countersigned checkpoint. It must be one that this daemon has
// signed, and nothing of it is kept but that signature and the bastion's.
func (st *stream) cosigned(c *halliganv1.WitnessCosigned) error {
	refuse := func(err error) error {
		return fault.New(fault.Refused, "", "a countersignature of %s that does not hold: %w", st.server, err)
	}
	if len(c.GetCheckpoint()) > maxCosigned {
		return refuse(errors.New("it is too long"))
	}
	own, err := logkey.Parse(st.o.Identity())
	if err != nil {
		return err
	}
	tree := logkey.Tree(st.o.Origin, c.GetLineage(), c.GetGeneration())
	log, err := logkey.Verifier(tree, own.Log)
	if err != nil {
		return refuse(err)
	}
	witness, err := logkey.WitnessVerifier(st.server, st.key)
	if err != nil {
		return refuse(err)
	}
	_, n, err := torchwood.VerifyCheckpoint(c.GetCheckpoint(), torchwood.ThresholdPolicy(3, torchwood.OriginPolicy(tree), torchwood.SingleVerifierPolicy(log), torchwood.SingleVerifierPolicy(witness)))
	if err != nil {
		return refuse(err)
	}
	kept, err := note.Sign(&note.Note{Text: n.Text, Sigs: n.Sigs})
	if err != nil {
		return refuse(err)
	}
	return st.o.Ledger.Cosigned(c.GetLineage(), c.GetGeneration(), kept, witness.Name())
}
