package logkey_test

import (
	"bytes"
	"crypto/ed25519"
	"os"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/mod/sumdb/note"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/issuer"
	"github.com/halligan-io/halligan/internal/trust/logkey"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// host is a server's SSH host key and certificate.
func host(t *testing.T, f *testfleet.Fleet, name string, v issuer.Validity) (gossh.Signer, *gossh.Certificate) {
	t.Helper()
	keyFile, certFile := f.HostFiles(name, v)
	data, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := gossh.ParsePrivateKey(data)
	if err != nil {
		t.Fatal(err)
	}
	if data, err = os.ReadFile(certFile); err != nil {
		t.Fatal(err)
	}
	key, _, _, _, err := gossh.ParseAuthorizedKey(data)
	if err != nil {
		t.Fatal(err)
	}
	return signer, key.(*gossh.Certificate)
}

func key(t *testing.T) (ed25519.PublicKey, ed25519.PrivateKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return public, private
}

// TestStatement: what a server signed for itself holds, and nothing else does.
func TestStatement(t *testing.T) {
	f := testfleet.New(t)
	b := f.Opened()
	signer, cert := host(t, f, testfleet.Server, testfleet.Now())
	log, _ := key(t)
	witness, _ := key(t)
	said := logkey.Statement{Server: testfleet.Server, Log: log, Witness: witness, Age: "age1qqqq", Signed: time.Now()}
	data, err := logkey.Sign(said, signer, cert)
	if err != nil {
		t.Fatal(err)
	}
	got, err := logkey.Verify(data, b, time.Now())
	if err != nil || got.Server != said.Server || !got.Log.Equal(log) || !got.Witness.Equal(witness) || got.Age != said.Age || !got.Signed.Equal(said.Signed.UTC().Truncate(time.Second)) {
		t.Fatalf("%+v, %v", got, err)
	}
	// The key of a certificate's signer signs, as daemons have it.
	shown, err := gossh.NewCertSigner(cert, signer)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := logkey.Sign(said, shown, cert); err != nil || !bytes.Equal(again, data) {
		t.Errorf("with a signer that shows a certificate: %v", err)
	}

	refused := func(name string, data []byte, b *bundle.Bundle, now time.Time) {
		t.Helper()
		if _, err := logkey.Verify(data, b, now); !fault.Is(err, fault.Unauthenticated) {
			t.Errorf("%s: %v", name, err)
		}
	}
	other, otherCert := host(t, f, "cp-2.prod", testfleet.Now())
	if _, err := logkey.Sign(said, other, cert); err == nil {
		t.Error("signed with another key than the certificate's")
	}
	stolen, err := logkey.Sign(said, other, otherCert)
	if err != nil {
		t.Fatal(err)
	}
	refused("in the name of another server", stolen, b, time.Now())
	refused("another fleet", data, testfleet.New(t).Opened(), time.Now())
	refused("of tomorrow", data, b, time.Now().Add(-25*time.Hour))
	refused("nothing", nil, b, time.Now())
	refused("huge", bytes.Repeat([]byte("x"), logkey.MaxSize+1), b, time.Now())
	for i := range data {
		changed := bytes.Clone(data)
		changed[i] ^= 1
		if s, err := logkey.Verify(changed, b, time.Now()); err == nil && i < bytes.Index(data, []byte("-----BEGIN")) {
			t.Errorf("byte %d changed: %+v", i, s)
		}
	}

	// What has lapsed since was true when it was said; what was signed outside of
	// the validity was not.
	old := time.Now().Add(-48 * time.Hour)
	signer, cert = host(t, f, testfleet.Server, issuer.Validity{NotBefore: old.Truncate(time.Second), NotAfter: old.Add(time.Hour).Truncate(time.Second)})
	said.Signed = old.Add(time.Minute)
	lapsed, err := logkey.Sign(said, signer, cert)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := logkey.Verify(lapsed, b, time.Now()); err != nil {
		t.Errorf("lapsed since: %v", err)
	}
	said.Signed = time.Now()
	late, err := logkey.Sign(said, signer, cert)
	if err != nil {
		t.Fatal(err)
	}
	refused("signed after the certificate had lapsed", late, b, time.Now())
	f.Revoke(func(r *bundle.Revocations) { r.Keys = append(r.Keys, gossh.FingerprintSHA256(cert.Key)) })
	refused("revoked", lapsed, f.Opened(), time.Now())

	for name, bad := range map[string]logkey.Statement{
		"no server": {Log: log, Signed: old}, "hostile server": {Server: "cp-1.prod\nlog x", Log: log, Signed: old}, "no key": {Server: "cp-1.prod", Signed: old},
		"no time": {Server: "cp-1.prod", Log: log}, "hostile recipient": {Server: "cp-1.prod", Log: log, Age: "age1q\nwitness", Signed: old},
	} {
		if _, err := logkey.Sign(bad, signer, cert); err == nil {
			t.Errorf("%s: signed", name)
		}
	}
}

// TestNames: names of trees are read back as they are written, and nothing else is.
func TestNames(t *testing.T) {
	name := logkey.Tree("cp-1.prod", "00ff00ff", 12)
	if o, l, g, err := logkey.ParseTree(name); err != nil || o != "cp-1.prod" || l != "00ff00ff" || g != 12 {
		t.Errorf("%s: %s %s %d, %v", name, o, l, g, err)
	}
	for _, bad := range []string{"", "halligan.io/log/", name + "/", name + " ", strings.TrimPrefix(name, "halligan.io/log/"), "halligan.io/log/a b/00ff00ff/1", "halligan.io/log/a/00FF00ff/1",
		"halligan.io/log/a/00ff00ff/0", "halligan.io/log/a/00ff00ff/01", "halligan.io/log/a/00ff00ff/-1", "halligan.io/log/../00ff00ff/1", "halligan.io/log/a/b/00ff00ff/1"} {
		if _, _, _, err := logkey.ParseTree(bad); err == nil {
			t.Errorf("%q passes", bad)
		}
	}
}

// TestWitness: countersignatures by the witness key verify with the key made of the
// public half alone, and the text of it is what outside tools take.
func TestWitness(t *testing.T) {
	public, private := key(t)
	signer, err := torchwood.NewCosignatureSigner(logkey.WitnessName("a.bastion"), private)
	if err != nil {
		t.Fatal(err)
	}
	checkpoint := torchwood.Checkpoint{Origin: logkey.Tree("cp-1.prod", "00ff00ff", 1)}
	signed, err := note.Sign(&note.Note{Text: checkpoint.String()}, signer)
	if err != nil {
		t.Fatal(err)
	}
	v, err := logkey.WitnessVerifier("a.bastion", public)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := note.Open(signed, note.VerifierList(v)); err != nil {
		t.Error(err)
	}
	vkey, err := logkey.WitnessVKey("a.bastion", public)
	if err != nil {
		t.Fatal(err)
	}
	outside, err := torchwood.NewCosignatureVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := note.Open(signed, note.VerifierList(outside)); err != nil {
		t.Error(err)
	}
	if _, err := logkey.WitnessVerifier("a.bastion", nil); err == nil {
		t.Error("no key makes a verifier")
	}
}

// TestReceipt: a receipt is for one event, of one server.
func TestReceipt(t *testing.T) {
	public, private := key(t)
	other, _ := key(t)
	event := []byte(`{"v":1}`)
	signed, err := logkey.SignReceipt("a.bastion", private, "id-1", event)
	if err != nil {
		t.Fatal(err)
	}
	if err := logkey.VerifyReceipt(signed, "a.bastion", public, "id-1", event); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{
		"another event":  logkey.VerifyReceipt(signed, "a.bastion", public, "id-1", []byte(`{"v":2}`)),
		"another ID":     logkey.VerifyReceipt(signed, "a.bastion", public, "id-2", event),
		"another server": logkey.VerifyReceipt(signed, "b.bastion", public, "id-1", event),
		"another key":    logkey.VerifyReceipt(signed, "a.bastion", other, "id-1", event),
		"nothing":        logkey.VerifyReceipt(nil, "a.bastion", public, "id-1", event),
		"huge":           logkey.VerifyReceipt(bytes.Repeat(signed, 10), "a.bastion", public, "id-1", event),
	} {
		if err == nil {
			t.Errorf("%s passes", name)
		}
	}
	if _, err := logkey.SignReceipt("a.bastion", private, "id\nx", event); err == nil {
		t.Error("an ID of two lines is signed")
	}
}
