package action

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/journal"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// Recover settles what an earlier process, or an outage of etcd, left
// unfinished. Nothing is written to etcd: each object whose before-image is on
// record is looked up in etcd's history and ends as applied, failed (not done)
// or unknown; what came of it goes into the evidence log. It runs until the context
// ends, since an outcome can become unknown at any time.
func (e *Engine) Recover(ctx context.Context) {
	wait := 200 * time.Millisecond
	var early []string // settled before the log was looked through
	for {
		left := 0
		if err := e.journal.Refill(); err != nil {
			e.log.Warn().Str("problem", neutral.Line(err.Error())).Msg("records cannot be set aside for when the disk is full")
		}
		for _, id := range e.journal.Unfinished() {
			if err := e.settleOne(ctx, id); err != nil {
				left++
				e.log.Warn().Str("action", id).Str("problem", neutral.Line(err.Error())).Msg("unfinished action could not be settled yet")
			} else if !e.allClosed() {
				early = append(early, id)
			}
		}
		if !e.allClosed() {
			if err := e.closeIntents(ctx, early); err != nil && ctx.Err() == nil {
				left++
				e.log.Warn().Str("problem", neutral.Line(err.Error())).Msg("the evidence log could not be looked through for what was begun before this start")
			}
		}
		if err := e.pay(ctx); err != nil && ctx.Err() == nil {
			left++
			e.log.Warn().Str("problem", neutral.Line(err.Error())).Msg("outcomes of actions could not be put into the evidence log yet")
		}
		if left == 0 {
			wait = 200 * time.Millisecond
		} else {
			wait = min(wait*2, 30*time.Second)
		}
		// Actions whose outcome stayed unknown come here as well, while the
		// agent runs.
		idle := wait
		if left == 0 {
			idle = 5 * time.Second
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(idle):
		}
	}
}

// errTooEarly says that a write that is not seen may still be on its way.
var errTooEarly = errors.New("a write may still be on its way to etcd")

func (e *Engine) settleOne(ctx context.Context, id string) error {
	record, err := e.journal.Read(id)
	if err != nil {
		return err
	}
	cluster, err := e.etcd.ClusterID(ctx)
	if err != nil {
		return err
	}
	foreign := cluster != record.Plan.Cluster // restored since: its history is another one
	modified, err := e.journal.Modified(id)
	if err != nil {
		return err
	}
	known := map[int]string{}
	for _, n := range record.Notes {
		known[n.Index] = n.Outcome
	}
	// An object that was tried twice has two images; done is what either says.
	found := map[int]journal.Note{}
	for _, img := range record.Images {
		if known[img.Index] != "" || found[img.Index].Outcome == journal.Applied {
			continue
		}
		expect := etcd.Expect{Key: img.Key, ModRevision: img.Revision, Since: img.Since, Deleted: img.Delete}
		copy(expect.SHA256[:], img.AfterSHA256)
		fate, revision := etcd.Undetermined, int64(0)
		if !foreign {
			if fate, revision, err = e.etcd.Settle(ctx, expect); err != nil {
				return err
			}
		}
		if fate != etcd.Done && time.Since(modified) < e.settle {
			return errTooEarly
		}
		n := journal.Note{Index: img.Index, Revision: revision, Settled: img.Delete}
		switch fate {
		case etcd.Done:
			n.Outcome = journal.Applied
		case etcd.NotDone:
			n.Outcome, n.Error = outcomeFailed, "not done: the agent ended before it was written"
		default:
			n.Outcome, n.Error = outcomeUnknown, "etcd's history no longer tells whether it was written"
		}
		found[img.Index] = n
	}
	a, err := e.journal.Resume(id)
	if err != nil {
		return err
	}
	for index, n := range found {
		if err := a.Wrote(n); err != nil {
			a.Release()
			return err
		}
		known[index] = n.Outcome
	}
	count := map[string]int{}
	for _, outcome := range known {
		count[outcome]++
	}
	total := len(record.Plan.Objects)
	result := resultPartial
	switch {
	case count[outcomeUnknown] > 0:
		result = resultUnknown
	case count[journal.Applied] == total:
		result = resultApplied
	case count[journal.Applied] == 0:
		result = resultFailed
	}
	problem := fmt.Sprintf("settled after an interruption: %d of %d done, %d unknown", count[journal.Applied], total, count[outcomeUnknown])
	if err := a.Settle(result, problem); err != nil {
		return err
	}
	// A crash here leaves the intent without an outcome; closeIntents finds it, as it
	// does where it has not looked yet.
	e.mu.Lock()
	owe := (e.closed || e.told[id]) && !e.final[id]
	e.mu.Unlock()
	if owe {
		if record, err = e.journal.Read(id); err != nil {
			return err
		}
		e.oweSettled(record, actorOf(record))
	}
	e.log.Info().Str("action", id).Str("result", result).Msg("unfinished " + record.Plan.Action + " settled")
	return nil
}

// allClosed reports whether the intents of earlier processes have their outcomes,
// written or owed, but for actions that are unfinished.
func (e *Engine) allClosed() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.closed
}

// paid reports whether nothing is owed to the log.
func (e *Engine) paid() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.owed) == 0
}

// Settled waits until no action is unfinished and every intent has its outcome on
// record, or the context ends with fault.Unknown.
func (e *Engine) Settled(ctx context.Context) error {
	for len(e.journal.Unfinished()) > 0 || !e.allClosed() || !e.paid() {
		select {
		case <-ctx.Done():
			return fault.New(fault.Unknown, "see: halligan history", "%d actions are not settled", len(e.journal.Unfinished()))
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil
}
