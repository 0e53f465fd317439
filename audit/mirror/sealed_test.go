package mirror

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// parts are a file in pieces.
func parts(action string, data []byte, each int) (list []*halliganv1.WitnessSealed) {
	for at := 0; ; {
		n := min(each, len(data)-at)
		list = append(list, &halliganv1.WitnessSealed{ActionId: action, Offset: int64(at), Data: data[at : at+n], Last: at+n == len(data)})
		if at += n; at == len(data) {
			return list
		}
	}
}

func bring(i *Images, list []*halliganv1.WitnessSealed) (stored *halliganv1.WitnessStored, err error) {
	for _, p := range list {
		if stored, err = i.Part(p); err != nil {
			return nil, err
		}
	}
	return stored, nil
}

// TestImages: sealed before-images are there when that is said, whatever is sent
// later under the same name is kept beside them, and it has bounds.
func TestImages(t *testing.T) {
	f := newFleet(t)
	c := f.copy(64 << 10)
	i := c.Images()
	dir := filepath.Join(f.dir, origin, "sealed")
	has := func(name string, data []byte) bool {
		got, err := os.ReadFile(filepath.Join(dir, name))
		return err == nil && bytes.Equal(got, data)
	}
	sum := func(data []byte) string { h := sha256.Sum256(data); return hex.EncodeToString(h[:]) }
	first, second := bytes.Repeat([]byte("a"), 3000), bytes.Repeat([]byte("b"), 2000)
	for range 2 { // again, since who sent it may not have heard
		stored, err := bring(i, parts("act-1", first, 1000))
		if err != nil || stored.GetActionId() != "act-1" || stored.GetSha256() != sum(first) || !has("act-1.age", first) {
			t.Fatalf("%v, %v", stored, err)
		}
	}
	if stored, err := bring(i, parts("act-1", second, 1000)); err != nil || stored.GetSha256() != sum(second) || !has("act-1.age", second) || !has("act-1-"+sum(first)[:8]+".age", first) {
		t.Fatalf("%v, %v", stored, err)
	}
	refused := 0
	for n := range 5 {
		if _, err := bring(i, parts("act-1", []byte(fmt.Sprint(n)), 10)); err != nil {
			refused++
		}
	}
	if refused != 3 || !has("act-1-"+sum(first)[:8]+".age", first) {
		t.Errorf("%d of 5 more versions were refused", refused)
	}
	// What does not come in order, or under no name, is not taken.
	for name, list := range map[string][]*halliganv1.WitnessSealed{
		"no beginning": parts("act-2", first, 1000)[1:], "a gap": slices.Delete(parts("act-2", first, 1000), 1, 2), "another": append(parts("act-2", first, 1000)[:1], parts("act-3", first, 1000)[1:]...),
		"a path": parts("../../x", first, 1000), "no name": parts("", first, 1000), "hidden": parts(".x", first, 1000),
	} {
		if stored, err := bring(i, list); err == nil || stored != nil {
			t.Errorf("%s: %v", name, stored)
		}
	}
	// All of it has a bound, and what is not whole leaves nothing.
	for n := range 10 {
		_, _ = bring(i, parts(fmt.Sprintf("act-%d", n+10), bytes.Repeat([]byte{byte(n)}, 10_000), 4000))
	}
	if taken := size(dir); taken > 32<<10 {
		t.Errorf("%d bytes of %d", taken, 64<<10)
	}
	if _, err := bring(c.Images(), parts("act-99", nil, 1)); err == nil {
		t.Error("there is still room")
	}
	i.Close()
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if strings.HasSuffix(n.Name(), ".tmp") {
			t.Errorf("%s is left", n.Name())
		}
	}
	// What is too old makes room.
	old := time.Now().Add(-60 * 24 * time.Hour)
	for _, n := range names {
		if err := os.Chtimes(filepath.Join(dir, n.Name()), old, old); err != nil {
			t.Fatal(err)
		}
	}
	if stored, err := bring(c.Images(), parts("act-99", first, 1000)); err != nil || stored == nil || !has("act-99.age", first) || has("act-1.age", second) {
		t.Errorf("two months later: %v", err)
	}
}

// TestExpire: before-images end by policy where no more come, too, and what a process
// was taking when it was killed takes no room.
func TestExpire(t *testing.T) {
	f := newFleet(t)
	c := f.copy(0)
	for _, action := range []string{"act-1", "act-2"} {
		if _, err := bring(c.Images(), parts(action, []byte("x"), 10)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := bring(c.Images(), parts("act-3", []byte("xx"), 1)[:1]); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(f.dir, origin, "sealed")
	old := f.now.Add(-60 * 24 * time.Hour)
	if err := os.Chtimes(filepath.Join(dir, "act-1.age"), old, old); err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	f.open(0).Expire(over)
	if names, err := os.ReadDir(dir); err != nil || len(names) != 1 || names[0].Name() != "act-2.age" {
		t.Errorf("%v, %v", names, err)
	}
}

// TestPeers: agents are told of those of their own cluster only.
func TestPeers(t *testing.T) {
	f := newFleet(t)
	m := f.open(0)
	said := map[string][]byte{}
	for _, server := range []string{"cp-1.prod", "cp-2.prod", "cp-1.staging", "b.bastion"} {
		c, err := m.Copy(server)
		if err != nil {
			t.Fatal(err)
		}
		said[server] = f.statement(server, newKey(t))
		if err := c.Identify(said[server]); err != nil {
			t.Fatal(err)
		}
	}
	if got := m.Peers("cp-1.prod", "prod"); len(got) != 1 || !bytes.Equal(got[0], said["cp-2.prod"]) {
		t.Errorf("%d statements", len(got))
	}
	if got := m.Peers("b.bastion", "bastion"); got != nil {
		t.Errorf("a bastion is told of %d", len(got))
	}
	// An older statement of a server does not take the place of a newer one, and all
	// is there after a restart.
	c, err := m.Copy("cp-1.prod")
	if err != nil {
		t.Fatal(err)
	}
	f.now = f.now.Add(-time.Minute)
	if err := c.Identify(f.statement("cp-1.prod", newKey(t))); err != nil || !bytes.Equal(c.Identity(), said["cp-1.prod"]) {
		t.Errorf("an older statement: %v", err)
	}
	if got := f.open(0).Peers("cp-2.prod", "prod"); len(got) != 1 || !bytes.Equal(got[0], said["cp-1.prod"]) {
		t.Errorf("%d after a restart", len(got))
	}
}

// taker is a bastion's own log.
type taker struct {
	audit.Log
	where  string
	failed error
	events []audit.Event
}

func (l *taker) Append(_ context.Context, e audit.Event) (audit.Receipt, error) {
	if l.failed != nil {
		return audit.Receipt{}, l.failed
	}
	l.events = append(l.events, e)
	return audit.Receipt{Where: l.where}, nil
}

// TestHold: an event is signed for when it is in the bastion's own log, and nowhere
// else; one daemon cannot fill that.
func TestHold(t *testing.T) {
	f := newFleet(t)
	c := f.copy(0)
	event := []byte(`{"v":1,"id":"e-1","origin":"cp-1.prod","kind":"intent","drill":true}`)
	ask := &halliganv1.WitnessHold{Id: "e-1", Event: event}
	log := &taker{where: audit.Local}
	r := c.Hold(t.Context(), log, ask)
	if r.GetRefused() != "" || len(log.events) != 1 {
		t.Fatalf("%v", r)
	}
	if err := logkey.VerifyReceipt(r.GetNote(), "a.bastion", f.key.Public().(ed25519.PublicKey), "e-1", event); err != nil {
		t.Error(err)
	}
	if e := log.events[0]; e.Kind != audit.Held || e.Target != origin || e.Of != "e-1" || e.Payload != string(event) || !e.Drill {
		t.Errorf("%+v", e)
	}
	for name, log := range map[string]*taker{"held by others": {where: audit.Remote}, "a full disk": {failed: errors.New("no room")}} {
		if r := c.Hold(t.Context(), log, ask); r.GetNote() != nil || r.GetRefused() == "" {
			t.Errorf("%s: %v", name, r)
		}
	}
	long := &halliganv1.WitnessHold{Id: "e-1", Event: []byte(`{"v":1,"id":"e-1","origin":"cp-1.prod","kind":"intent","text":"` + strings.Repeat("x", maxHeld) + `"}`)}
	if r := c.Hold(t.Context(), log, long); r.GetNote() != nil || !strings.Contains(r.GetRefused(), "too long") {
		t.Errorf("%v", r)
	}
	held := 0
	for range 1000 {
		if c.Hold(t.Context(), log, ask).GetRefused() == "" {
			held++
		}
	}
	if held > holdBurst+50 {
		t.Errorf("%d events at once", held)
	}
	other, err := c.m.Copy("cp-2.prod")
	if err != nil {
		t.Fatal(err)
	}
	if r := other.Hold(t.Context(), log, &halliganv1.WitnessHold{Id: "e-1", Event: bytes.ReplaceAll(event, []byte("cp-1"), []byte("cp-2"))}); r.GetRefused() != "" {
		t.Errorf("another daemon: %v", r)
	}
}

// TestKey: a key is made once, and one that others may read is not used.
func TestKey(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit", "witness-key")
	first, err := Key(file)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := Key(file); err != nil || !again.Equal(first) {
		t.Errorf("read again: %v", err)
	}
	for name, spoil := range map[string]func() error{
		"open to all": func() error { return os.Chmod(file, 0o644) },
		"no key":      func() error { return errors.Join(os.Chmod(file, 0o600), os.WriteFile(file, []byte("x"), 0o600)) },
		"empty":       func() error { return os.WriteFile(file, nil, 0o600) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if name != "open to all" {
			if err := os.Chmod(file, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Key(file); err == nil {
			t.Errorf("%s: it is used", name)
		}
	}
}
