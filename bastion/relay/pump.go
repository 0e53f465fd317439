package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/sshserver"
)

// Buffers of one direction: small while little passes, so that who only waits
// costs little, and as much as an SSH packet holds while bulk does.
const smallBuffer, largeBuffer = 2 << 10, 32 << 10

var large = sync.Pool{New: func() any { return new([largeBuffer]byte) }}

var (
	errIdle  = errors.New("idle")
	errPanic = errors.New("a fault of the server")
)

// pump carries bytes both ways until both sides have ended, one of them has
// failed, nothing has passed for too long, or ctx has ended. What one side ends
// is ended towards the other, which may go on.
func (r *Relay) pump(ctx context.Context, client sshserver.Stream, node net.Conn) (up, down int64, why string) {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	shut := context.AfterFunc(ctx, func() {
		client.Close()
		node.Close()
	})
	var last atomic.Int64 // when a byte passed, since start
	start := time.Now()
	touch := func() { last.Store(int64(time.Since(start))) }
	way := func(n *int64, total *atomic.Int64, dst io.Writer, src io.Reader) {
		defer func() {
			if p := recover(); p != nil {
				r.o.Log.Error().Str("panic", neutral.LineMax(fmt.Sprint(p), 512)).Bytes("stack", debug.Stack()).Msg("panic in a relay")
				end(errPanic)
			}
		}()
		err := carry(dst, src, func(passed int) {
			*n += int64(passed)
			total.Add(int64(passed))
			touch()
		})
		if err == nil {
			err = closeWrite(dst)
		}
		if err != nil {
			end(err)
		}
	}
	var both sync.WaitGroup
	both.Go(func() { way(&up, &r.stats.up, node, client) })
	both.Go(func() { way(&down, &r.stats.down, client, node) })
	idle := make(chan struct{})
	go func() {
		defer close(idle)
		timer := time.NewTimer(r.o.Idle)
		defer timer.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
			}
			left := r.o.Idle - (time.Since(start) - time.Duration(last.Load()))
			if left <= 0 {
				end(errIdle)
				return
			}
			timer.Reset(left)
		}
	}()
	both.Wait()
	shut()
	switch cause := context.Cause(ctx); cause {
	case nil:
		why = "both sides ended"
	case context.Canceled:
		why = "the client closed it"
	default:
		why = neutral.LineMax(cause.Error(), 256)
	}
	end(nil)
	<-idle
	return up, down, why
}

// carry copies until src ends, which is no error. passed is told after each
// write.
func carry(dst io.Writer, src io.Reader, passed func(int)) error {
	small := make([]byte, smallBuffer)
	buf := small
	var pooled *[largeBuffer]byte
	release := func() {
		if pooled != nil {
			large.Put(pooled)
			pooled, buf = nil, small
		}
	}
	defer release()
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return err
			}
			passed(n)
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case n == smallBuffer && pooled == nil:
			pooled = large.Get().(*[largeBuffer]byte)
			buf = pooled[:]
		case n < smallBuffer:
			release()
		}
	}
}
