package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"k8s.io/klog/v2"

	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// evidence is what somebody fetched of one daemon.
type evidence struct {
	dir    string // of its log
	bundle string
}

// demoIncident is what everything in a demo is done for.
const demoIncident = "demo"

// proven ends a story: what was recorded of it is fetched and verifies, by halligan
// and by a verifier that others wrote; one changed byte is named by both; and the
// report of it is written, where one is wanted.
func (d *demo) proven(ctx context.Context, report string) {
	folder, forged := d.lab.file("evidence"), d.lab.file("forged")
	node := evidence{dir: filepath.Join(folder, serverName(0)), bundle: d.lab.file("bundle")}
	audit := func(ctx context.Context, args ...string) error {
		args = append([]string{"audit"}, args...)
		_, _, err := d.exec(ctx, "halligan "+strings.Join(args, " "), append(slices.Clone(d.halligan), args...),
			"HALLIGAN_BUNDLE="+node.bundle, "HALLIGAN_IDENTITY="+d.lab.file("ids", "responder"))
		return err
	}
	d.title("What was recorded cannot be rewritten unnoticed")
	d.step(ctx, "the evidence verifies", func(ctx context.Context) error {
		if err := audit(ctx, "fetch", folder); err != nil {
			return err
		}
		if err := audit(ctx, "verify", folder); err != nil {
			return err
		}
		n, err := node.outside(ctx)
		if err != nil {
			return err
		}
		d.say("seen with the fsck of transparency-dev/tessera: the %d entries of %s are what its checkpoint says that they are", n, serverName(0))
		return nil
	})
	d.step(ctx, "a changed byte is found", func(ctx context.Context) error {
		copied := evidence{dir: filepath.Join(forged, serverName(0)), bundle: node.bundle}
		defer os.RemoveAll(forged)
		if err := os.CopyFS(forged, os.DirFS(folder)); err != nil {
			return err
		}
		if err := copied.forge(); err != nil {
			return err
		}
		d.say("another name is written over that of a person, in the copy %s", forged)
		if err := audit(ctx, "verify", forged); err == nil {
			return errors.New("halligan audit verify takes it for good")
		}
		_, err := copied.outside(ctx)
		if err == nil {
			return errors.New("the other verifier takes it for good")
		}
		what, _, _ := strings.Cut(err.Error(), ": log has") // and then the hashes
		d.say("seen with the fsck of transparency-dev/tessera: %s", what)
		return nil
	})
	if report == "" {
		return
	}
	d.step(ctx, "the report is written", func(ctx context.Context) error {
		if err := audit(ctx, "report", demoIncident, folder, "--html", report); err != nil {
			return err
		}
		d.say("open %s in a browser", report)
		return nil
	})
}

// tree is the folder of the log's newest generation.
func (e evidence) tree() (string, error) {
	all, err := filepath.Glob(filepath.Join(e.dir, "logs", "*"))
	if err != nil || len(all) == 0 {
		return "", fmt.Errorf("%s has no log (%w)", e.dir, err)
	}
	return all[len(all)-1], nil
}

// outside verifies the newest generation with tessera's fsck, which knows nothing
// of ours but the key, and returns how many entries there are.
func (e evidence) outside(ctx context.Context) (int64, error) {
	klog.SetLogger(logr.Discard()) // which tells every step
	dir, err := e.tree()
	if err != nil {
		return 0, err
	}
	_, checkpoint, err := tiles.Of(os.DirFS(dir)).Checkpoint()
	if err != nil {
		return 0, err
	}
	verifier, err := e.verifier(checkpoint.Origin)
	if err != nil {
		return 0, err
	}
	hashes := func(data []byte) (all [][]byte, err error) {
		var b api.EntryBundle
		err = b.UnmarshalText(data)
		for _, entry := range b.Entries {
			h := tlog.RecordHash(entry)
			all = append(all, h[:])
		}
		return all, err
	}
	return checkpoint.N, fsck.New(checkpoint.Origin, verifier, client.FileFetcher{Root: dir}, hashes, fsck.Opts{N: 1}).Check(ctx)
}

// verifier has the key for which the host certificate of the agent vouches.
func (e evidence) verifier(origin string) (note.Verifier, error) {
	data, err := os.ReadFile(e.bundle)
	if err != nil {
		return nil, err
	}
	file, err := bundle.Parse(data)
	if err != nil {
		return nil, err
	}
	b, err := bundle.Verify(file, nil)
	if err != nil {
		return nil, err
	}
	statement, err := os.ReadFile(filepath.Join(e.dir, "identity"))
	if err != nil {
		return nil, err
	}
	s, err := logkey.Verify(statement, b, time.Now())
	if err != nil {
		return nil, err
	}
	return logkey.Verifier(origin, s.Log)
}

// forge makes somebody else of a person in the middle of the newest bundle of
// entries.
func (e evidence) forge() error {
	dir, err := e.tree()
	if err != nil {
		return err
	}
	_, checkpoint, err := tiles.Of(os.DirFS(dir)).Checkpoint()
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "tile", "entries", "000")
	if checkpoint.N < 256 { // the first bundle is not whole yet (C2SP tlog-tiles)
		path = filepath.Join(path+".p", fmt.Sprint(checkpoint.N))
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before := []byte(`"person":"console/0"`)
	if !bytes.Contains(data, before) {
		return fmt.Errorf("%s does not name whom the demo acts as", path)
	}
	return os.WriteFile(path, bytes.Replace(data, before, []byte(`"person":"nobody/00"`), 1), 0o600)
}
