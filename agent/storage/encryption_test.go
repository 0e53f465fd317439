package storage

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	kmsv2api "k8s.io/kms/apis/v2"
	kmsservice "k8s.io/kms/pkg/service"

	"github.com/halligan-io/halligan/internal/fault"
)

const secretKey = "/registry/secrets/shop/db"

var secretPlain = []byte("k8s\x00 pretend that this is protobuf, with swordfish inside")

// aesSecret returns the base64 of a 32-byte key.
func aesSecret(seed byte) string {
	return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{seed}, 32))
}

// rule is one entry of an EncryptionConfiguration: resources, and providers
// written as aescbc:NAME:SEED, identity, or kms-v2:NAME:SOCKET.
func rule(resources string, providers ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "- resources: [%s]\n  providers:\n", resources)
	for _, p := range providers {
		parts := strings.SplitN(p, ":", 3)
		switch parts[0] {
		case "identity":
			b.WriteString("  - identity: {}\n")
		case "kms-v1", "kms-v2":
			fmt.Fprintf(&b, "  - kms: {apiVersion: %s, name: %s, endpoint: \"unix://%s\", timeout: 3s}\n", parts[0][4:], parts[1], parts[2])
		default:
			fmt.Fprintf(&b, "  - %s: {keys: [{name: %s, secret: %s}]}\n", parts[0], parts[1], aesSecret(parts[2][0]))
		}
	}
	return b.String()
}

func writeConfig(t testing.TB, rules ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "encryption.yaml")
	text := "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n" + strings.Join(rules, "")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func load(t testing.TB, rules ...string) *Transformers {
	t.Helper()
	tr, err := LoadEncryption(t.Context(), writeConfig(t, rules...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tr.Close)
	return tr
}

func kindNamed(t testing.TB, name string) *Kind {
	t.Helper()
	k, err := customised(t).Resolve(name)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func seal(t testing.TB, tr *Transformers, kind, key string, plain []byte) []byte {
	t.Helper()
	stored, err := tr.Seal(t.Context(), kindNamed(t, kind), key, plain)
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

// checkSealed demands an error with the code and the words, and without any
// byte of what was inside.
func checkSealed(t testing.TB, err error, code fault.Code, words ...string) {
	t.Helper()
	if !fault.Is(err, code) {
		t.Fatalf("%v, want %s", err, code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
	if strings.Contains(err.Error(), "swordfish") || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r > '~' }) {
		t.Errorf("the error is not fit to show: %q", err)
	}
}

func TestWithoutEncryption(t *testing.T) {
	tr, err := LoadEncryption(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	k := kindNamed(t, "secrets")
	if got, err := tr.Open(t.Context(), k, secretKey, secretPlain); err != nil || !bytes.Equal(got, secretPlain) {
		t.Errorf("%q, %v", got, err)
	}
	if got := seal(t, tr, "secrets", secretKey, secretPlain); !bytes.Equal(got, secretPlain) {
		t.Errorf("%q", got)
	}
	if len(tr.Providers()) != 0 {
		t.Errorf("%v", tr.Providers())
	}
	// The configuration is lost, or was not given.
	_, err = tr.Open(t.Context(), k, secretKey, []byte("k8s:enc:aescbc:v1:key1:swordfish"))
	checkSealed(t, err, fault.Encrypted, "aescbc key1", "--encryption-provider-config")
}

// The API server's side of these tests is its own package, used as it uses it.
func TestProvidersAgainstTheAPIServersOwn(t *testing.T) {
	for _, provider := range []string{"aescbc:key1:a", "aesgcm:key1:b", "secretbox:key1:c", "identity"} {
		t.Run(provider, func(t *testing.T) {
			path := writeConfig(t, rule("secrets", provider, "identity"))
			config, err := encryptionconfig.LoadEncryptionConfig(t.Context(), path, false, "")
			if err != nil {
				t.Fatal(err)
			}
			k := kindNamed(t, "secrets")
			theirs := encryptionconfig.StaticTransformers(config.Transformers).TransformerForResource(k.StoredAs())
			tr, err := LoadEncryption(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			defer tr.Close()

			stored, err := theirs.TransformToStorage(t.Context(), secretPlain, value.DefaultContext(secretKey))
			if err != nil {
				t.Fatal(err)
			}
			if got, err := tr.Open(t.Context(), k, secretKey, stored); err != nil || !bytes.Equal(got, secretPlain) {
				t.Errorf("theirs opens here as %q, %v", got, err)
			}
			stored = seal(t, tr, "secrets", secretKey, secretPlain)
			if got, _, err := theirs.TransformFromStorage(t.Context(), stored, value.DefaultContext(secretKey)); err != nil || !bytes.Equal(got, secretPlain) {
				t.Errorf("ours opens there as %q, %v", got, err)
			}
			if name, _, _ := strings.Cut(provider, ":"); name != "identity" && !bytes.HasPrefix(stored, []byte("k8s:enc:"+name+":v1:key1:")) {
				t.Errorf("sealed as %q", stored[:20])
			}
			// A value from before encryption was turned on.
			if got, err := tr.Open(t.Context(), k, secretKey, secretPlain); err != nil || !bytes.Equal(got, secretPlain) {
				t.Errorf("a plain value opens as %q, %v", got, err)
			}
		})
	}
}

func TestKeyRotation(t *testing.T) {
	k := kindNamed(t, "secrets")
	before := load(t, rule("secrets", "aesgcm:key1:a"))
	during := load(t, rule("secrets", "aesgcm:key2:b", "aesgcm:key1:a"))
	after := load(t, rule("secrets", "aesgcm:key2:b"))
	old := seal(t, before, "secrets", secretKey, secretPlain)
	if got, err := during.Open(t.Context(), k, secretKey, old); err != nil || !bytes.Equal(got, secretPlain) {
		t.Fatalf("%q, %v", got, err)
	}
	renewed := seal(t, during, "secrets", secretKey, secretPlain)
	if !bytes.HasPrefix(renewed, []byte("k8s:enc:aesgcm:v1:key2:")) {
		t.Errorf("not sealed with the first key: %q", renewed[:24])
	}
	if _, err := after.Open(t.Context(), k, secretKey, renewed); err != nil {
		t.Error(err)
	}
	_, err := after.Open(t.Context(), k, secretKey, old)
	checkSealed(t, err, fault.Encrypted, "aesgcm key1", "does not have")
	_, err = before.Open(t.Context(), k, secretKey, renewed)
	checkSealed(t, err, fault.Encrypted, "aesgcm key2")

	// Encryption is being turned off: identity writes, the key still reads.
	off := load(t, rule("secrets", "identity", "aesgcm:key1:a"))
	if got, err := off.Open(t.Context(), k, secretKey, old); err != nil || !bytes.Equal(got, secretPlain) {
		t.Errorf("%q, %v", got, err)
	}
	if got := seal(t, off, "secrets", secretKey, secretPlain); !bytes.Equal(got, secretPlain) {
		t.Errorf("identity comes first, yet it wrote %q", got)
	}
}

func TestAnotherKeyOfTheSameName(t *testing.T) {
	k := kindNamed(t, "secrets")
	for _, provider := range []string{"aesgcm", "secretbox"} {
		stored := seal(t, load(t, rule("secrets", provider+":key1:a")), "secrets", secretKey, secretPlain)
		_, err := load(t, rule("secrets", provider+":key1:b")).Open(t.Context(), k, secretKey, stored)
		checkSealed(t, err, fault.Encrypted, provider+" key1", "does not open")
	}
	// GCM also ties a value to its etcd key.
	tr := load(t, rule("secrets", "aesgcm:key1:a"))
	stored := seal(t, tr, "secrets", secretKey, secretPlain)
	_, err := tr.Open(t.Context(), k, "/registry/secrets/shop/other", stored)
	checkSealed(t, err, fault.Encrypted, "another etcd key")
}

func TestProviderOfAResource(t *testing.T) {
	tr := load(t,
		rule("secrets, widgets.example.org, events", "aescbc:one:a", "identity"),
		rule("\"*.\"", "aescbc:core:b"),
		rule("\"*.apps\"", "aescbc:apps:c"),
		rule("customresourcedefinitions.apiextensions.k8s.io", "identity"),
		rule("\"*.*\"", "aescbc:all:d"))
	for kind, want := range map[string]string{
		"secrets": "one", "widgets": "one", "configmaps": "core", "pods": "core", "deploy": "apps", "ds": "apps",
		"events": "one", "events.events.k8s.io": "one", // one storage, and that is the core group's
		"jobs": "all", "crd": "", "backups.a.example.com": "all", "apiservices": "all", "leases": "all",
	} {
		stored := seal(t, tr, kind, "/registry/x", secretPlain)
		if want == "" {
			if !bytes.Equal(stored, secretPlain) {
				t.Errorf("%s was encrypted", kind)
			}
		} else if !bytes.HasPrefix(stored, []byte("k8s:enc:aescbc:v1:"+want+":")) {
			t.Errorf("%s: sealed as %q, want key %s", kind, stored[:30], want)
		}
		if got, err := tr.Open(t.Context(), kindNamed(t, kind), "/registry/x", stored); err != nil || !bytes.Equal(got, secretPlain) {
			t.Errorf("%s: %q, %v", kind, got, err)
		}
	}
	want := map[string]string{
		"secrets": "aescbc:one", "widgets.example.org": "aescbc:one", "events": "aescbc:one", "*.": "aescbc:core", "*.apps": "aescbc:apps",
		"customresourcedefinitions.apiextensions.k8s.io": "identity", "*.*": "aescbc:all",
	}
	if got := tr.Providers(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("Providers = %v", got)
	}
	// As the API server, no plain value where identity is not listed.
	_, err := tr.Open(t.Context(), kindNamed(t, "pods"), "/registry/pods/shop/web", secretPlain)
	checkSealed(t, err, fault.Undecodable, "in the clear", "pods")
	if _, err := tr.Open(t.Context(), kindNamed(t, "secrets"), secretKey, secretPlain); err != nil {
		t.Error(err)
	}
	// Secrets have their own entry, which hides the wildcards' keys from them.
	_, err = tr.Open(t.Context(), kindNamed(t, "secrets"), secretKey, seal(t, tr, "pods", secretKey, secretPlain))
	checkSealed(t, err, fault.Encrypted, "aescbc core")
}

func TestHostilePrefixes(t *testing.T) {
	tr := load(t, rule("secrets", "aesgcm:key1:a"))
	for _, stored := range []string{
		"k8s:enc:", "k8s:enc:x", "k8s:enc:aescbc:v1:swordfish", "k8s:enc:aescbc:v1:\x1b[2J:x", "k8s:enc:swordfish:v1:k:x",
		"k8s:enc:aescbc:swordfish:k:x", "k8s:enc:aesgcm:v1:key1:", "k8s:enc:aesgcm:v1:key1:swordfish", "k8s:enc:aesgcm:v1::x",
		"k8s:enc:kms:v2:" + strings.Repeat("n", 5000) + ":x",
	} {
		_, err := tr.Open(t.Context(), kindNamed(t, "secrets"), secretKey, []byte(stored))
		checkSealed(t, err, fault.Encrypted)
		if len(err.Error()) > 700 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	}
	// A plain value must not pass for an encrypted one later.
	off := load(t, rule("secrets", "identity"))
	if _, err := off.Seal(t.Context(), kindNamed(t, "secrets"), secretKey, []byte("k8s:enc:aesgcm:v1:key1:x")); err == nil {
		t.Error("identity wrote what looks encrypted")
	}
}

func TestLoadEncryptionRefuses(t *testing.T) {
	good := rule("secrets", "aescbc:key1:a")
	for name, path := range map[string]string{
		"missing":       filepath.Join(t.TempDir(), "nothing.yaml"),
		"a folder":      t.TempDir(),
		"no rules":      writeConfig(t),
		"not YAML":      writeConfig(t, "}swordfish{"),
		"unknown field": writeConfig(t, good+"  swordfish: 1\n"),
		"short key":     writeConfig(t, strings.Replace(good, aesSecret('a'), "c3dvcmRmaXNo", 1)),
		"no base64":     writeConfig(t, strings.Replace(good, aesSecret('a'), "swordfish!", 1)),
		"no provider":   writeConfig(t, "- resources: [secrets]\n  providers: []\n"),
		"masked":        writeConfig(t, rule("\"*.*\"", "identity"), rule("secrets", "aescbc:key1:a")),
		"kms endpoint":  writeConfig(t, strings.Replace(rule("secrets", "kms-v2:vault:/x"), "unix:", "http:", 1)),
	} {
		tr, err := LoadEncryption(t.Context(), path)
		if err == nil {
			tr.Close()
			t.Errorf("%s: loaded", name)
			continue
		}
		checkSealedText := err.Error()
		if name != "unknown field" && strings.Contains(checkSealedText, "swordfish") || strings.Contains(checkSealedText, "c3dvcmRmaXNo") {
			t.Errorf("%s: the error shows a key: %q", name, err)
		}
		if !fault.Is(err, fault.Failed) || fault.Of(err).Next == "" {
			t.Errorf("%s: %v, want a fault with a next step", name, err)
		}
	}
	empty := filepath.Join(t.TempDir(), "empty.yaml")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadEncryption(t.Context(), empty); err == nil {
		t.Error("an empty file was taken for a configuration")
	}
}

// kmsKeys is a KMS v2 plugin's key store, so small that it only turns bits over.
type kmsKeys struct{ asked atomic.Int32 }

func flip(b []byte) []byte {
	out := make([]byte, len(b))
	for i := range b {
		out[i] = ^b[i]
	}
	return out
}

func (k *kmsKeys) Status(context.Context) (*kmsservice.StatusResponse, error) {
	return &kmsservice.StatusResponse{Version: "v2", Healthz: "ok", KeyID: "remote-1"}, nil
}

func (k *kmsKeys) Encrypt(_ context.Context, _ string, data []byte) (*kmsservice.EncryptResponse, error) {
	return &kmsservice.EncryptResponse{Ciphertext: flip(data), KeyID: "remote-1"}, nil
}

func (k *kmsKeys) Decrypt(_ context.Context, _ string, req *kmsservice.DecryptRequest) ([]byte, error) {
	k.asked.Add(1)
	if req.KeyID != "remote-1" {
		return nil, errors.New("no such key \x1b[2J")
	}
	return flip(req.Ciphertext), nil
}

// startKMS serves a KMS v2 plugin on the socket and returns what stops it.
func startKMS(t testing.TB, socket string, keys *kmsKeys) (stop func()) {
	t.Helper()
	return serveKMS(t, socket, func(s *grpc.Server) {
		kmsv2api.RegisterKeyManagementServiceServer(s, kmsservice.NewGRPCService(socket, time.Second, keys))
	})
}

func serveKMS(t testing.TB, socket string, register func(*grpc.Server)) (stop func()) {
	t.Helper()
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	register(server)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(listener) // ends by Stop only
	}()
	stop = func() { server.Stop(); <-done }
	t.Cleanup(stop)
	return stop
}

func TestKMSv2(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "kms.sock")
	keys := &kmsKeys{}
	stop := startKMS(t, socket, keys)
	config := rule("secrets", "kms-v2:vault:"+socket, "identity")
	tr, k := load(t, config), kindNamed(t, "secrets")
	if got := tr.Providers()["secrets"]; got != "kms:vault" {
		t.Errorf("Providers names %q", got)
	}
	stored := seal(t, tr, "secrets", secretKey, secretPlain)
	if !bytes.HasPrefix(stored, []byte("k8s:enc:kms:v2:vault:")) || bytes.Contains(stored, []byte("swordfish")) {
		t.Fatalf("sealed as %q", stored)
	}
	// Another process must ask the plugin for the data key.
	other := load(t, config)
	if got, err := other.Open(t.Context(), k, secretKey, stored); err != nil || !bytes.Equal(got, secretPlain) {
		t.Fatalf("%q, %v", got, err)
	}
	if keys.asked.Load() == 0 {
		t.Error("the plugin was not asked")
	}
	_, err := other.Open(t.Context(), k, "/registry/secrets/shop/other", stored)
	checkSealed(t, err, fault.Encrypted, "vault")

	stop()
	// What is known is still known: no plugin is needed for that data key.
	if _, err := other.Open(t.Context(), k, secretKey, stored); err != nil {
		t.Errorf("the plugin is down, but its data key was there: %v", err)
	}
	// A process that starts now knows nothing.
	began := time.Now()
	late := load(t, config, rule("configmaps", "aesgcm:key1:a", "identity"))
	_, err = late.Open(t.Context(), k, secretKey, stored)
	checkSealed(t, err, fault.Encrypted, "KMS plugin", "vault", socket, "nobody listens", "start the KMS plugin")
	_, err = late.Seal(t.Context(), k, secretKey, secretPlain)
	checkSealed(t, err, fault.Encrypted, "vault", socket)
	if took := time.Since(began); took > 8*time.Second { // the library's own client waits 3 s each of three times
		t.Errorf("it took %v to say that the socket is dead", took)
	}
	// All else goes on.
	if got, err := late.Open(t.Context(), k, secretKey, secretPlain); err != nil || !bytes.Equal(got, secretPlain) {
		t.Errorf("%q, %v", got, err)
	}
	cm := seal(t, late, "configmaps", "/registry/configmaps/shop/c", secretPlain)
	if _, err := late.Open(t.Context(), kindNamed(t, "configmaps"), "/registry/configmaps/shop/c", cm); err != nil {
		t.Error(err)
	}

	// The plugin comes back, on a new socket of the same name.
	startKMS(t, socket, keys)
	if got, err := late.Open(t.Context(), k, secretKey, stored); err != nil || !bytes.Equal(got, secretPlain) {
		t.Errorf("after the plugin came back: %q, %v", got, err)
	}
	again := seal(t, late, "secrets", secretKey, secretPlain)
	if got, err := other.Open(t.Context(), k, secretKey, again); err != nil || !bytes.Equal(got, secretPlain) {
		t.Errorf("%q, %v", got, err)
	}
}

func TestKMSv2KeyIsGone(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "kms.sock")
	startKMS(t, socket, &kmsKeys{})
	tr := load(t, rule("secrets", "kms-v2:vault:"+socket))
	stored := seal(t, tr, "secrets", secretKey, secretPlain)
	changed := bytes.Replace(stored, []byte("remote-1"), []byte("remote-2"), 1)
	if bytes.Equal(stored, changed) {
		t.Fatal("the key's name is not in the value")
	}
	_, err := tr.Open(t.Context(), kindNamed(t, "secrets"), secretKey, changed)
	checkSealed(t, err, fault.Encrypted, "vault", "no such key")
}

// A plugin that takes connections and says nothing is worse than a dead one.
func TestKMSv2Hangs(t *testing.T) {
	dir := t.TempDir()
	good, mute := filepath.Join(dir, "good.sock"), filepath.Join(dir, "mute.sock")
	startKMS(t, good, &kmsKeys{})
	stored := seal(t, load(t, rule("secrets", "kms-v2:vault:"+good)), "secrets", secretKey, secretPlain)

	listener, err := net.Listen("unix", mute)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	began := time.Now()
	tr, k := load(t, rule("secrets", "kms-v2:vault:"+mute)), kindNamed(t, "secrets")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = tr.Open(ctx, k, secretKey, stored)
	checkSealed(t, err, fault.Encrypted, "vault")
	ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = tr.Seal(ctx, k, secretKey, secretPlain)
	checkSealed(t, err, fault.Encrypted, "vault")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("loading and two tries of 0.3 s took %v", took)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, err = tr.Open(ctx, k, secretKey, stored); !fault.Is(err, fault.Cancelled) {
		t.Errorf("%v, want cancelled", err)
	}
}
