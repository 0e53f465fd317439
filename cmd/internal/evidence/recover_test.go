package evidence

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit/sealed"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// TestRecover: whoever holds the policy's offline key gets the values back, with
// nothing but the file.
func TestRecover(t *testing.T) {
	offline, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	keyFile := filepath.Join(dir, "offline")
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(keyFile, "# public key: "+offline.Recipient().String()+"\n"+offline.String()+"\n")
	fleet := testfleet.New(t)
	file, err := bundle.Parse(fleet.Policy(func(p *bundle.Policy) { p.Recovery = []bundle.Recipient{{X25519Recipient: offline.Recipient()}} }))
	if err != nil {
		t.Fatal(err)
	}
	b, err := bundle.Verify(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	store, err := sealed.Open(sealed.Options{Dir: filepath.Join(dir, "audit"), Server: testfleet.Server, Bundle: func() *bundle.Bundle { return b }})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	const id, key, secret = "20261123-114502-k3xq7mab", "/registry/secrets/x/\x1b[31ms", "hunter2"
	sum := sha256.Sum256([]byte(secret))
	image := sealed.Image{Key: key, UID: "u", Revision: 7, Value: []byte(secret), ValueSHA256: sum[:], Delete: true}
	plan := &halliganv1.Plan{Id: id, Action: "delete", Actor: "alice", Role: "responder", Node: testfleet.Node, ClusterName: testfleet.Cluster, Summary: "delete\na secret", Objects: []*halliganv1.PlannedObject{{Key: key, Operation: "delete", Revision: 7}}}
	intent, err := api.CanonicalJSON(plan)
	if err != nil {
		t.Fatal(err)
	}
	img, err := json.Marshal(image)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Seal(id, strings.NewReader(fmt.Sprintf("{\"intent\":%s}\n{\"image\":%s}\n", intent, img))); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "audit", "sealed", id+".age")
	run := func(output string, args ...string) (string, error) {
		t.Helper()
		var out bytes.Buffer
		root := &cobra.Command{Use: "halligan", SilenceErrors: true, SilenceUsage: true}
		root.PersistentFlags().String("output", output, "")
		root.AddCommand(Command(Surroundings{Out: &out, Err: &out, PrintJSON: func(text []byte) error { _, err := out.Write(text); return err }}))
		root.SetArgs(append([]string{"audit", "recover"}, args...))
		err := root.Execute()
		return out.String(), err
	}
	values := filepath.Join(dir, "values")
	text, err := run("table", name, "--offline-key", keyFile, "--out", values)
	if err != nil || strings.Contains(text, secret) || strings.Contains(text, "\x1b") || !strings.Contains(text, "delete by alice as responder on "+testfleet.Server) || !strings.Contains(text, "00000.value") {
		t.Errorf("%v\n%s", err, text)
	}
	if got, err := os.ReadFile(filepath.Join(values, "00000.value")); err != nil || string(got) != secret {
		t.Errorf("%v %q", err, got)
	}
	var list []recovered
	data, err := os.ReadFile(filepath.Join(values, "index.json"))
	if err != nil || json.Unmarshal(data, &list) != nil || len(list) != 1 || list[0].Key != key || list[0].File != "00000.value" {
		t.Errorf("%v %s", err, data)
	}
	if st, err := os.Stat(filepath.Join(values, "00000.value")); err != nil || st.Mode().Perm() != 0o600 {
		t.Error(err, st.Mode())
	}
	var answer struct {
		Server string
		Images []recovered
	}
	if text, err = run("json", name, "--offline-key", keyFile); err != nil || strings.Contains(text, secret) || json.Unmarshal([]byte(text), &answer) != nil || answer.Server != testfleet.Server || len(answer.Images) != 1 {
		t.Errorf("%v\n%s", err, text)
	}

	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	wrong, open, broken := filepath.Join(dir, "wrong"), filepath.Join(dir, "open"), filepath.Join(dir, "broken")
	write(wrong, other.String()+"\n")
	write(open, offline.String()+"\n")
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	write(broken, strings.TrimSuffix(offline.String(), "A")+"x\n")
	for want, args := range map[string][]string{
		"needs --offline-key": {name},
		"needs one file":      {"--offline-key", keyFile},
		"is there already":    {name, "--offline-key", keyFile, "--out", values},
		"cannot be opened":    {name, "--offline-key", wrong},
		"chmod 600":           {name, "--offline-key", open},
		"holds no key of age": {name, "--offline-key", broken},
		"no such file":        {name + "x", "--offline-key", keyFile},
		"is no plain file":    {dir, "--offline-key", keyFile},
	} {
		if text, err := run("table", args...); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error()+text, "AGE-SECRET") {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}
