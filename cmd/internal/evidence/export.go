package evidence

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"iter"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/audit/export"
	"github.com/halligan-io/halligan/internal/fault"
)

// exporting is where events go.
type exporting struct {
	format, out, to, cursor    string
	ca, name, certificate, key string
}

func (t *tool) export() *cobra.Command {
	var x exporting
	c := &cobra.Command{
		Use: "export [FOLDER]", Short: "Hand verified events to other systems, going on where the last run ended", Args: arguments(0, 1, "at most one folder, or archive"),
		Long: "Writes verified events to a file, to standard output, or to a syslog receiver over TLS (RFC 5425), which is named\n" +
			"by its IP address. Without a folder, what the daemons have now is fetched and verified first. Formats:\n\n" +
			formats() +
			"\nThe file of --cursor remembers what went out: after an orderly end nothing is sent twice, and after a crash nothing\n" +
			"is left out. What does not verify is not sent, and the exit status then is 1.\n\n" +
			"  halligan audit export --format ocsf --out events.json\n" +
			"  halligan audit export --format rfc5424 --to 192.0.2.10:6514 --ca siem-ca.pem",
		RunE: func(cmd *cobra.Command, args []string) error {
			format, err := export.FormatOf(x.format)
			if err != nil {
				return err
			}
			if err := x.check(cmd); err != nil {
				return err
			}
			if x.to != "" && x.cursor == "" {
				if x.cursor, err = t.cursorOf(x); err != nil {
					return err
				}
			}
			e, r, err := t.open(cmd.Context(), argument(args, 0))
			if err != nil {
				return err
			}
			defer e.Close()
			if err := t.send(cmd.Context(), e, format, x); err != nil {
				return err
			}
			return verdict(r)
		},
	}
	f := c.Flags()
	f.StringVar(&x.format, "format", "jsonl", "`format` of the events")
	f.StringVar(&x.out, "out", "", "`file` to append to (default: standard output)")
	f.StringVar(&x.to, "to", "", "`IP:PORT` of a syslog receiver over TLS, in place of a file")
	f.StringVar(&x.cursor, "cursor", "", "`file` that remembers what went out (default: beside the file of --out, or with what is fetched for the cluster)")
	f.StringVar(&x.ca, "ca", "", "`file` with the certificate of the receiver's authority, in PEM")
	f.StringVar(&x.name, "receiver-name", "", "`name` that the receiver's certificate is for (default: its IP address)")
	f.StringVar(&x.certificate, "cert", "", "`file` with the certificate to show the receiver, where it wants one")
	f.StringVar(&x.key, "cert-key", "", "`file` with the key of that certificate")
	return c
}

func formats() string {
	text := ""
	for _, f := range export.Formats {
		text += fmt.Sprintf("  %-8s  %s\n", f.Name, f.About)
	}
	return text
}

func (x *exporting) check(cmd *cobra.Command) error {
	switch {
	case x.to != "" && x.out != "":
		return usage(cmd, "--to and --out do not go together")
	case x.to != "" && x.format != "rfc5424":
		return usage(cmd, "a syslog receiver takes --format rfc5424")
	case x.to != "" && x.ca == "":
		return usage(cmd, "--to needs --ca, the authority of the receiver")
	case x.to == "" && x.ca+x.name+x.certificate+x.key != "":
		return usage(cmd, "--ca, --receiver-name, --cert and --cert-key go with --to")
	case (x.certificate == "") != (x.key == ""):
		return usage(cmd, "--cert and --cert-key go together")
	}
	if x.out != "" && x.out != "-" && x.cursor == "" {
		x.cursor = x.out + ".cursor"
	}
	return nil
}

// cursorOf names a cursor for a receiver, beside what is fetched for the cluster.
func (t *tool) cursorOf(x exporting) (string, error) {
	dir, err := t.State()
	if err != nil {
		return "", fault.New(fault.Usage, "name one with --cursor", "there is no place for a cursor: %w", err)
	}
	to, err := netip.ParseAddrPort(x.to)
	if err != nil {
		return "", fault.New(fault.Usage, "name it as IP:PORT, such as 192.0.2.10:6514; names are not looked up", "--to: %.80q is no IP address with a port", x.to)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s.%s-%s-%d.cursor", dir, x.format, strings.ReplaceAll(to.Addr().String(), ":", "_"), to.Port()), nil
}

// send sends what the cursor has not passed.
func (t *tool) send(ctx context.Context, e *evidence.Evidence, format export.Format, x exporting) (err error) {
	// A receiver is closed in order although the run was interrupted.
	sink, err := t.sink(context.WithoutCancel(ctx), x)
	if err != nil {
		return err
	}
	if c, is := sink.(io.Closer); is {
		defer func() {
			if closed := c.Close(); err == nil {
				err = closed
			}
		}()
	}
	cursor := &export.Cursor{}
	if x.cursor != "" {
		if cursor, err = export.OpenCursor(x.cursor, format.Name, sink.Name()); err != nil {
			return err
		}
		defer cursor.Close()
	}
	r, err := export.Run(ctx, fresh(ctx, e, cursor), format, sink, cursor)
	for _, g := range r.Gaps {
		t.note("%s: events %d to %d had been removed for age before they went out", g.Log.Origin, g.From, g.Until-1)
	}
	if x.to != "" || x.out != "" && x.out != "-" {
		t.note("%d events went out to %s", r.Sent, sink.Name())
	}
	return err
}

// fresh yields the events of each log from where its cursor is.
func fresh(ctx context.Context, e *evidence.Evidence, cursor *export.Cursor) iter.Seq2[export.Entry, error] {
	return func(yield func(export.Entry, error) bool) {
		for _, l := range e.Logs() {
			log := export.Log{Origin: l.Origin, Lineage: l.Lineage}
			for entry, err := range e.Of(ctx, l, cursor.Next(log)) {
				if !yield(export.Entry{Log: log, Event: entry.Event, Raw: entry.Raw}, err) {
					return
				}
			}
		}
	}
}

func (t *tool) sink(ctx context.Context, x exporting) (export.Sink, error) {
	switch {
	case x.to != "":
		ca, err := os.ReadFile(x.ca)
		if err != nil {
			return nil, fault.New(fault.Usage, "name a readable file with --ca", "%w", err)
		}
		o := export.ReceiverOptions{Address: x.to, CA: ca, Name: x.name}
		if x.certificate != "" {
			pair, err := tls.LoadX509KeyPair(x.certificate, x.key)
			if err != nil {
				return nil, fault.New(fault.Usage, "name a certificate and its key, in PEM", "--cert: %w", err)
			}
			o.Certificate = &pair
		}
		return export.NewReceiver(ctx, o)
	case x.out != "" && x.out != "-":
		name, err := filepath.Abs(x.out)
		if err != nil {
			return nil, err
		}
		_, err = os.Lstat(x.cursor)
		return export.OpenFile(name, err == nil)
	}
	return export.Writer{W: t.Out}, nil
}
