package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
)

// mutate plans, shows, asks, applies and reports.
func (a *app) mutate(cmd *cobra.Command, action *halliganv1.Action, parameters *structpb.Struct) error {
	willApply := !a.dryRun && (a.yes || a.inTTY)
	if willApply && strings.TrimSpace(a.reason) == "" {
		return fault.New(fault.Usage, "say why with --reason TEXT or HALLIGAN_REASON, or look first with --dry-run",
			"%s needs a reason for the record", action.GetName())
	}
	ctx := cmd.Context()
	if err := a.connect(ctx); err != nil {
		return err
	}
	plan, err := a.plan(ctx, action, parameters)
	if err != nil {
		return err
	}
	machine := a.output != "table"
	if !machine {
		a.showPlan(a.out, plan)
	}
	if a.dryRun {
		return a.report(&halliganv1.Result{Action: plan.GetId(), Result: "planned", Via: plan.GetVia(), Plan: plan})
	}
	empty := len(plan.GetObjects()) == 0
	if empty && !willApply {
		// It is neither applied nor refused: there is nothing to agree to.
		if !machine {
			fmt.Fprintln(a.out, nothingChanged)
		}
		return a.report(&halliganv1.Result{Action: plan.GetId(), Result: "planned", Via: plan.GetVia(), Plan: plan})
	}
	// A plan of nothing is nothing to ask a person about.
	if !a.yes && !empty {
		if err := a.confirm(ctx, plan, machine); err != nil {
			return a.report(&halliganv1.Result{Action: plan.GetId(), Result: "planned", Via: plan.GetVia(), Plan: plan, Error: api.ErrorOf(err)})
		}
	}
	return a.report(a.apply(ctx, action, plan))
}

func (a *app) plan(ctx context.Context, action *halliganv1.Action, parameters *structpb.Struct) (*halliganv1.Plan, error) {
	ctx, cancel := context.WithTimeout(ctx, a.limit(action))
	defer cancel()
	plan, err := a.agent.client.Plan(ctx, &halliganv1.PlanRequest{
		Action: action.GetName(), Parameters: parameters, Reason: a.reason, Incident: a.incident,
	})
	if err != nil {
		return nil, api.FromStatus(err)
	}
	// What is shown must be what is applied. A newer agent may say more in its
	// plan than this client can show.
	if sum, err := api.PlanSHA256(plan); err != nil {
		a.note("this client is older than the agent and cannot show all of the plan")
	} else if sum != plan.GetSha256() {
		return nil, fault.New(fault.Failed, "nothing was changed; report it", "the agent's plan %s does not have the hash that it names", plan.GetId())
	}
	return plan, nil
}

// confirm returns nil when a person agrees.
func (a *app) confirm(ctx context.Context, plan *halliganv1.Plan, machine bool) error {
	if !a.inTTY {
		next := "run it again with --yes"
		if strings.TrimSpace(a.reason) == "" {
			next += " and --reason TEXT"
		}
		return fault.New(fault.Usage, next, "nothing was changed, since there is no terminal to ask on")
	}
	if machine {
		a.showPlan(a.err, plan)
	}
	fmt.Fprint(a.err, "Apply this plan? [y/N] ")
	answer := make(chan string, 1)
	// It ends with the process at the latest: a read of a terminal cannot be
	// called off.
	go func() {
		line, _ := bufio.NewReader(a.in).ReadString('\n')
		answer <- strings.ToLower(strings.TrimSpace(line))
	}()
	declined := fault.New(fault.Cancelled, "nothing was changed", "the plan was not confirmed")
	select {
	case <-ctx.Done():
		fmt.Fprintln(a.err)
		return declined
	case s := <-answer:
		if s == "y" || s == "yes" {
			return nil
		}
		return declined
	}
}

// apply sends the plan once, and finds out what became of it whatever happens
// to the connection.
func (a *app) apply(ctx context.Context, action *halliganv1.Action, plan *halliganv1.Plan) *halliganv1.Result {
	limit := a.limit(action)
	callCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	callCtx, leave := context.WithCancelCause(callCtx)
	defer a.interruptible(ctx, callCtx, leave, plan.GetId())()
	outcome := func(err error) *halliganv1.Result {
		r := failedResult(api.FromStatus(err))
		r.Action, r.Via, r.Plan = plan.GetId(), plan.GetVia(), plan
		return r
	}
	unknown := func(code fault.Code, text string, args ...any) *halliganv1.Result {
		r := outcome(fault.New(code, "see: halligan history "+plan.GetId(), text, args...))
		r.Result = "unknown"
		return r
	}
	stream, err := a.agent.client.Apply(callCtx, &halliganv1.ApplyRequest{PlanId: plan.GetId(), PlanSha256: plan.GetSha256()})
	began := false
	for err == nil {
		var event *halliganv1.ApplyEvent
		if event, err = stream.Recv(); err != nil {
			break
		}
		if r := event.GetResult(); r != nil {
			a.endProgress()
			return r
		}
		began = true
		a.progress(event.GetProgress())
	}
	a.endProgress()
	switch {
	case errors.Is(context.Cause(callCtx), errLeft):
		return unknown(fault.Cancelled, "stopped watching; the agent goes on with %s", plan.GetId())
	case !began && answered(err):
		return outcome(err)
	// The agent's clock of the same deadline may strike first.
	case callCtx.Err() != nil || status.Code(err) == codes.DeadlineExceeded:
		return unknown(fault.Unknown, "no result within %s; the agent goes on with %s", limit, plan.GetId())
	}
	a.note("the connection broke; asking the agent what became of %s", plan.GetId())
	entry := a.ascertain(ctx, plan.GetId())
	switch {
	case entry == nil:
		return unknown(fault.Unknown, "the connection broke and nobody could say what became of %s", plan.GetId())
	case entry.GetResult() == "unfinished":
		return unknown(fault.Unknown, "the connection broke and %s is not finished", plan.GetId())
	}
	return &halliganv1.Result{Action: plan.GetId(), Result: entry.GetResult(), Via: plan.GetVia(), Plan: plan, Objects: entry.GetResults()}
}

// errLeft is why nobody watches an action any more.
var errLeft = errors.New("stopped watching")

// interruptible makes the first Ctrl-C stop the action between two objects, and
// the second one, or a first that the agent does not take, stop watching it.
// The function that it returns ends this.
func (a *app) interruptible(interrupted, call context.Context, leave context.CancelCauseFunc, id string) (end func()) {
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-call.Done():
			return
		case <-interrupted.Done():
		}
		again := make(chan os.Signal, 1)
		signal.Notify(again, os.Interrupt, syscall.SIGTERM)
		defer signal.Stop(again)
		ctx, cancel := context.WithTimeout(call, 2*time.Second)
		defer cancel()
		if _, err := a.agent.client.Stop(ctx, &halliganv1.StopRequest{ActionId: id}); err != nil {
			leave(errLeft)
			return
		}
		a.note("stopping %s between two objects; Ctrl-C again stops watching", id)
		select {
		case <-call.Done():
		case <-again:
			leave(errLeft)
		}
	})
	return func() { leave(nil); watch.Wait() }
}

// answered reports whether an agent refused the call itself, so that nothing
// was begun.
func answered(err error) bool {
	s, ok := status.FromError(err)
	if !ok {
		return false
	}
	return len(s.Details()) > 0 || s.Code() == codes.Unimplemented || s.Code() == codes.Unauthenticated
}

// ascertain asks for the record of an action until it is finished, nil when
// there is none or nobody answers in time.
func (a *app) ascertain(ctx context.Context, id string) (last *halliganv1.HistoryEntry) {
	ctx, cancel := context.WithTimeout(ctx, a.settle)
	defer cancel()
	for {
		if entry := a.record(ctx, id); entry != nil {
			if last = entry; entry.GetResult() != "unfinished" {
				return last
			}
		}
		select {
		case <-ctx.Done():
			return last
		case <-time.After(a.reprobe):
		}
	}
}

func (a *app) record(ctx context.Context, id string) *halliganv1.HistoryEntry {
	if a.connect(ctx) != nil {
		return nil
	}
	stream, err := a.agent.client.History(ctx, &halliganv1.HistoryRequest{ActionId: id})
	if err != nil {
		return nil
	}
	entry, err := stream.Recv()
	if err != nil || entry.GetActionId() != id {
		return nil
	}
	return entry
}

// failedResult is what a mutation ends with that came to nothing.
func failedResult(f *fault.Error) *halliganv1.Result {
	r := &halliganv1.Result{Result: "failed", Error: api.ErrorOf(f)}
	switch f.Code {
	case fault.Stale, fault.Refused, fault.Unverified, fault.AwaitingApproval, fault.Unknown:
		r.Result = string(f.Code)
	}
	return r
}

// report prints a result and returns the error that it stands for, if any.
func (a *app) report(r *halliganv1.Result) error {
	err := resultError(r)
	if r.GetError() == nil && err != nil {
		r.Error = api.ErrorOf(err)
	}
	if a.output != "table" {
		if perr := a.printResult(r); perr != nil {
			return errors.Join(perr, err)
		}
	} else if len(r.GetObjects()) > 0 || r.GetResult() == "applied" {
		a.showResult(a.out, r)
	}
	return err
}

// resultError gives every result but success its class: that of its error,
// unless the result says more.
func resultError(r *halliganv1.Result) error {
	f := &fault.Error{Code: fault.Code(r.GetError().GetCode()), Message: r.GetError().GetMessage(), Next: r.GetError().GetNext()}
	look := "see: halligan history " + r.GetAction()
	done := 0
	for _, o := range r.GetObjects() {
		if o.GetOutcome() == "applied" {
			done++
		}
	}
	fallback := func(code fault.Code, next, text string, args ...any) {
		if f.Message == "" {
			f = fault.New(code, next, text, args...)
		}
	}
	switch r.GetResult() {
	case "applied", "planned":
		if f.Message == "" {
			return nil
		}
	case "partial":
		fallback(fault.Failed, look, "%d of %d objects were changed", done, len(r.GetPlan().GetObjects()))
		f.Code = fault.Failed
	case "unknown":
		fallback(fault.Unknown, look, "what became of %s is not known", r.GetAction())
		if f.Code.Exit() != 1 {
			f.Code = fault.Unknown
		}
	case string(fault.Stale), string(fault.Refused), string(fault.Unverified), string(fault.AwaitingApproval):
		fallback(fault.Code(r.GetResult()), look, "%s ended as %s", r.GetAction(), r.GetResult())
		f.Code = fault.Code(r.GetResult())
	default:
		fallback(fault.Failed, look, "%s failed", r.GetAction())
	}
	if f.Code == "" {
		f.Code = fault.Failed
	}
	return f
}
