package lab

import (
	"context"
	"errors"
	"io"
)

// Demo is replaced below.
func Demo(ctx context.Context, o Options, out io.Writer) error { return errors.New("later") }
