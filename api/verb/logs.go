package verb

import (
	"context"
	"errors"
	"io"
	"math"
	"time"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
)

// How long to wait for logs: the agent ends before, and says so.
const (
	logsWithin   = 40 * time.Second
	followWithin = time.Hour + time.Minute
)

// components are whose logs an agent may have; it decides.
var components = []cobra.Completion{"apiserver", "etcd", "controller-manager", "scheduler", "kubelet"}

func (v *Verbs) logsCommand() *cobra.Command {
	req := &halliganv1.LogsRequest{}
	var since time.Duration
	cmd := &cobra.Command{
		Use: "logs COMPONENT", Short: "Show the log of a component of the control plane, from the node's own files",
		Long: `Shows what the apiserver, etcd, controller-manager, scheduler or kubelet of the
agent's node has logged, from the files there, rotated ones too, or from the
systemd journal. It needs no API server, and the role responder: logs can hold
what clients sent. What looks like a token is masked; other secrets cannot be
told from text. The API server's audit log is not shown.`,
		Example: `  halligan logs apiserver
  halligan logs etcd --since 15m --grep "took too long"
  halligan logs kubelet --follow --tail 20`,
		ValidArgs: components,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) != 1:
				return Usage(cmd, "logs takes one component: apiserver, etcd, controller-manager, scheduler or kubelet")
			case since < 0 || since > math.MaxUint32*time.Second:
				return Usage(cmd, "--since must be a time such as 15m")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Component, req.SinceSeconds = args[0], uint32((since+time.Second-1)/time.Second)
			return v.logs(cmd.Context(), req)
		},
	}
	cmd.Flags().BoolVarP(&req.Follow, "follow", "f", false, "go on with what is written from now on")
	cmd.Flags().DurationVar(&since, "since", 0, "only lines of the last `time`, such as 15m")
	cmd.Flags().StringVar(&req.Grep, "grep", "", "only lines that hold this `text`")
	cmd.Flags().Uint32Var(&req.Tail, "tail", 0, "at most this `number` of lines from the end (default 1000)")
	return cmd
}

func (v *Verbs) logs(ctx context.Context, req *halliganv1.LogsRequest) error {
	if err := v.connect(ctx); err != nil {
		return err
	}
	limit := logsWithin
	switch {
	case v.timeout > 0:
		limit = v.timeout
	case req.GetFollow():
		limit = followWithin
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	stream, err := v.agent.Logs(ctx, req)
	source := ""
	for err == nil {
		var some *halliganv1.LogLines
		if some, err = stream.Recv(); err == nil {
			if werr := v.showLines(some, &source); werr != nil {
				return werr
			}
		}
	}
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case req.GetFollow() && ctx.Err() != nil:
		// Whoever follows ends it so, but a login that ended is told.
		var f *fault.Error
		if errors.As(context.Cause(ctx), &f) {
			return f
		}
		return nil
	}
	return api.FromStatus(err)
}

// showLines shows some lines, and before them where they are from, where that is not
// the source of those before.
func (v *Verbs) showLines(some *halliganv1.LogLines, source *string) error {
	if v.output != "table" {
		if v.output == "yaml" {
			if err := v.print("---\n"); err != nil {
				return err
			}
		}
		return v.PrintMessage(some)
	}
	if s := some.GetSource(); s != "" && s != *source {
		v.Note("from %s", s)
		*source = s
	}
	for _, l := range some.GetLines() {
		// The agent has made them safe, and is not believed.
		if err := v.print(line(l) + "\n"); err != nil {
			return err
		}
	}
	if some.GetNote() != "" {
		v.Note("%s", some.GetNote())
	}
	return nil
}
