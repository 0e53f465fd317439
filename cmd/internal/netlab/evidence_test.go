package netlab

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// rolledBack: while an agent is down, its log is put back to what it was before
// somebody acted, with all keys. Both bastions see it when it is up again, raise the
// alarm and keep what they have; so does whoever fetches the evidence.
func (w *world) rolledBack(t *testing.T) {
	const i, key = 2, "back"
	name := nodeNames[i]
	origin, evidence := name+".prod", w.file(name+"/state/audit")
	// copies are what the bastions have of it, by their files.
	copied := func(b string) (size int) {
		for _, file := range must(filepath.Glob(w.file(b + "/state/mirror/" + origin + "/logs/*/cosigned"))) {
			if data, err := os.ReadFile(file); err == nil { // it may just be replaced
				var n int
				_, line, _ := strings.Cut(string(data), "\n")
				if _, err := fmt.Sscan(line, &n); err == nil {
					size += n
				}
			}
		}
		return size
	}
	again := func() {
		w.agents[i] = w.daemon(name, name, w.bin+"/halligan-agent", "--config", w.file(name+"/agent.yaml"))
		w.opens(bastionNames[0], nodeAddress(i), grpcPort)
	}
	w.agents[i].kill()
	yesterday := filepath.Join(t.TempDir(), "audit")
	copyPrivate(t, yesterday, evidence)
	again()
	w.deployment(key)
	before := map[string]int{}
	for _, b := range bastionNames {
		eventually(t, b+" has its log", func() bool { return copied(b) > 0 })
		before[b] = copied(b)
	}
	w.halligan("--node", name, "scale", "deploy/"+key, "-n", "shop", "--to", "0", "--yes").ok(t)
	for _, b := range bastionNames {
		eventually(t, b+" has the action", func() bool { return copied(b) > before[b]+3 })
	}
	w.agents[i].kill()
	if err := os.RemoveAll(evidence); err != nil {
		t.Fatal(err)
	}
	copyPrivate(t, evidence, yesterday)
	have := map[string]int{}
	for _, b := range bastionNames {
		have[b] = copied(b)
	}
	again()
	for n, b := range bastionNames {
		eventually(t, b+" raises the alarm", func() bool {
			said := w.bastions[n].log.String()
			return strings.Contains(said, "the log of "+origin+": it was cut") || strings.Contains(said, "the log of "+origin+": it has forked")
		})
		if now := copied(b); now != have[b] {
			t.Errorf("%s has %d entries after %d", b, now, have[b])
		}
	}
	if r := w.halligan("audit", "fetch", t.TempDir()+"/evidence"); r.status == 0 || !strings.Contains(r.errs, origin) {
		t.Error(r)
	}
}

// copyPrivate is cp -a of a folder whose owner is at rest.
func copyPrivate(t *testing.T, to, from string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	if err := filepath.WalkDir(to, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return os.Chmod(path, 0o600)
	}); err != nil {
		t.Fatal(err)
	}
}
