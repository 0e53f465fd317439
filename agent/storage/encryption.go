package storage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"k8s.io/apiserver/pkg/server/healthz"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	kmsservice "k8s.io/kms/pkg/service"
	kmsutil "k8s.io/kms/pkg/util"
	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/internal/fault"
)

// sealedPrefix begins every value that is encrypted at rest, whatever the
// provider (apiserver, pkg/storage/value/encrypt/identity).
const sealedPrefix = "k8s:enc:"

const (
	// transformTimeout bounds Open and Seal where the caller's context does not.
	transformTimeout = 5 * time.Second
	// loadTimeout bounds each question that loading asks a KMS plugin.
	loadTimeout = 500 * time.Millisecond
	// askInterval is the time between questions to a plugin that is there, but
	// is not known to be yet.
	askInterval = 500 * time.Millisecond
)

const nextConfig = "give Halligan the file that the API server's --encryption-provider-config names now"

const mendConfig = "mend the file, or " + nextConfig

// Transformers opens and seals values as the cluster's EncryptionConfiguration
// says. It follows the file: a key that was rotated meanwhile must not write,
// and only the file says so. It is safe for concurrent use.
type Transformers struct {
	path string // of the file; "": the cluster has none

	reading sync.Mutex // guards the next two; held while the file is read and loaded
	sum     [sha256.Size]byte
	problem error // why the content of that sum cannot be used

	mu     sync.Mutex     // guards all below, and every configuration's uses
	now    *configuration // the last good one
	closed bool
}

// configuration is one content of the file, loaded.
type configuration struct {
	byResource encryptionconfig.StaticTransformers
	rules      map[schema.GroupResource]encryptionRule
	names      map[string]string // as Providers returns it
	checks     []healthz.HealthChecker
	stop       context.CancelFunc
	// uses counts the calls under way and, while it is the last good one, one
	// more; with none left it is stopped.
	uses int
}

// encryptionRule is what the configuration says of a resource, for messages and
// for the cases that need no transformer: the providers, one for each key. The
// first one writes.
type encryptionRule []encryptionProvider

type encryptionProvider struct {
	name   string // as Providers names it
	prefix string // of the values that it can open; of identity's, ""
	socket string // of a KMS plugin
	v1     bool   // KMS v1
}

var identityRule = encryptionRule{{name: "identity"}}

// opens returns the provider for a stored value; for one in the clear that is
// identity, if it is allowed.
func (r encryptionRule) opens(stored []byte) (encryptionProvider, bool) {
	sealed := bytes.HasPrefix(stored, []byte(sealedPrefix))
	for _, p := range r {
		if sealed == (p.prefix != "") && bytes.HasPrefix(stored, []byte(p.prefix)) {
			return p, true
		}
	}
	return encryptionProvider{}, false
}

// LoadEncryption is OpenEncryption for those who need the file to be there and
// valid. A KMS plugin that does not answer is no error, only what needs it will
// fail.
func LoadEncryption(ctx context.Context, path string) (*Transformers, error) {
	t := OpenEncryption(path)
	if err := t.Usable(ctx); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// OpenEncryption returns the transformers of the cluster's
// EncryptionConfiguration. An empty path means that the cluster has none. The
// file is read when it is needed, and again when it has changed. While it cannot
// be read or is not valid nothing is sealed, and what the last good content
// opens goes on to be opened; before there was one, that is what is in the
// clear. Close ends what runs in the background.
func OpenEncryption(path string) *Transformers {
	return &Transformers{path: path, now: &configuration{stop: func() {}, uses: 1}}
}

// Usable reads the file if it has changed, and says why it cannot be used now:
// then Seal refuses.
func (t *Transformers) Usable(ctx context.Context) error {
	if t.path == "" {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	t.reading.Lock()
	defer t.reading.Unlock()
	// Its size and time do not tell for certain whether it changed, and it is
	// small.
	raw, err := os.ReadFile(t.path)
	if err != nil {
		return fault.New(fault.Failed, nextConfig, "the encryption configuration cannot be read: %w", err)
	}
	sum := sha256.Sum256(raw)
	if sum == t.sum {
		return t.problem
	}
	loaded, err := loadConfiguration(t.path, raw, sum)
	if errors.Is(err, errChanging) {
		return err // what it holds by then is looked at the next time
	}
	t.sum, t.problem = sum, err
	if err == nil {
		t.replace(loaded)
	}
	return err
}

var errChanging = fault.New(fault.Failed, "try again", "the encryption configuration is being written at this moment")

// loadConfiguration loads what the file at path holds, which is raw.
func loadConfiguration(path string, raw []byte, sum [sha256.Size]byte) (*configuration, error) {
	// This is read for what the transformers do not tell: the names of providers
	// and keys. Validation is left to the library.
	var config apiserverv1.EncryptionConfiguration
	if err := yaml.Unmarshal(raw, &config); err != nil {
		return nil, fault.New(fault.Failed, nextConfig, "the encryption configuration %s is not readable YAML", quoteASCII(path))
	}
	c := &configuration{uses: 1}
	if err := c.describe(&config); err != nil {
		return nil, err
	}
	loading := new(atomic.Bool)
	loading.Store(true)
	defer loading.Store(false)
	background, stop := context.WithCancel(context.WithValue(context.Background(), loadingKey{}, loading))
	useOwnKMSClient()
	loaded, err := encryptionconfig.LoadEncryptionConfig(background, path, false, "")
	switch {
	case err != nil:
		err = fault.New(fault.Failed, nextConfig, "the encryption configuration %s is not valid: %w", quoteASCII(path), err)
	case loaded.EncryptionFileContentHash != fmt.Sprintf("sha256:%x", sum): // the library reads the file itself
		err = errChanging
	}
	if err != nil {
		stop()
		return nil, err
	}
	c.byResource, c.checks, c.stop = loaded.Transformers, loaded.HealthChecks, stop
	return c, nil
}

// replace makes c the last good one; the one before ends with its last use.
func (t *Transformers) replace(c *configuration) {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		c.stop()
		return
	}
	old := t.now
	t.now = c
	t.mu.Unlock()
	t.done(old)
}

// use returns the last good configuration; done must follow.
func (t *Transformers) use() *configuration {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.now.uses++
	return t.now
}

func (t *Transformers) done(c *configuration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.uses--; c.uses == 0 {
		c.stop()
	}
}

// describe fills names and rules.
func (c *configuration) describe(config *apiserverv1.EncryptionConfiguration) error {
	c.names = make(map[string]string)
	c.rules = make(map[schema.GroupResource]encryptionRule)
	for _, entry := range config.Resources {
		var rule encryptionRule
		for _, p := range entry.Providers {
			described, err := describeProvider(p)
			if err != nil {
				return err
			}
			rule = append(rule, described...)
		}
		for _, resource := range entry.Resources {
			gr := schema.ParseGroupResource(resource)
			c.rules[gr] = append(c.rules[gr], rule...) // as the library joins entries of one resource
			if len(c.rules[gr]) > 0 {
				c.names[resource] = c.rules[gr][0].name
			}
		}
	}
	return nil
}

func describeProvider(p apiserverv1.ProviderConfiguration) (rule encryptionRule, err error) {
	keys := func(provider string, keys []apiserverv1.Key) {
		for _, k := range keys {
			rule = append(rule, encryptionProvider{name: provider + ":" + k.Name, prefix: sealedPrefix + provider + ":v1:" + k.Name + ":"})
		}
	}
	switch {
	case p.AESGCM != nil:
		keys("aesgcm", p.AESGCM.Keys)
	case p.AESCBC != nil:
		keys("aescbc", p.AESCBC.Keys)
	case p.Secretbox != nil:
		keys("secretbox", p.Secretbox.Keys)
	case p.Identity != nil:
		rule = identityRule
	case p.KMS != nil:
		version := "v2"
		if p.KMS.APIVersion != version { // v1 is the format's default
			version = "v1"
			if err := allowKMSv1(); err != nil {
				return nil, fault.New(fault.Failed, "", "enabling KMS v1: %w", err)
			}
		}
		socket, err := kmsutil.ParseEndpoint(p.KMS.Endpoint)
		if err != nil {
			return nil, fault.New(fault.Failed, nextConfig, "the KMS provider %s cannot be reached: %w", quoteASCII(p.KMS.Name), err)
		}
		rule = encryptionRule{{name: "kms:" + p.KMS.Name, prefix: sealedPrefix + "kms:" + version + ":" + p.KMS.Name + ":",
			socket: socket, v1: version == "v1"}}
	}
	return rule, nil
}

// allowKMSv1 lets what a cluster of 1.28 wrote with KMS v1 stay readable, which
// the library has off by default now.
var allowKMSv1 = sync.OnceValue(func() error { return utilfeature.DefaultMutableFeatureGate.Set("KMSv1=true") })

// Providers returns for each resource of the configuration, written as there,
// the provider and key that write it, such as aescbc:key1 or kms:vault, by
// the last good content of the file.
func (t *Transformers) Providers() map[string]string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.now.names
}

// Close ends the background work. Values of KMS providers cannot be opened
// afterwards, and changes of the file are not followed.
func (t *Transformers) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.closed = true
		t.now.stop()
	}
}

// StoredAs is the resource by which the API server finds the kind's provider and
// etcd: events of both groups have the core group's storage.
func (k *Kind) StoredAs() schema.GroupResource {
	if k.Group == "events.k8s.io" {
		return schema.GroupResource{Resource: k.Plural}
	}
	return schema.GroupResource{Group: k.Group, Resource: k.Plural}
}

// rule finds the rule of a resource in the order in which the library finds its
// transformer: itself, its group, everything.
func (c *configuration) rule(gr schema.GroupResource) encryptionRule {
	for _, try := range []schema.GroupResource{gr, {Group: gr.Group, Resource: "*"}, {Group: "*", Resource: "*"}} {
		if r := c.rules[try]; r != nil {
			return r
		}
	}
	return identityRule
}

// Open decrypts a stored value. key is the full etcd key, which the providers
// authenticate along with the value. It returns fault.Encrypted where no
// configured key fits or the KMS plugin does not answer, and fault.Undecodable
// for a value in the clear where the configuration allows none, since the API
// server does not take it either. Where it fails, the file may have changed: then
// it is tried with what the file holds now. Without a deadline of ctx's own it
// waits 5 s at most for a plugin.
func (t *Transformers) Open(ctx context.Context, k *Kind, key string, stored []byte) ([]byte, error) {
	c := t.use()
	defer t.done(c)
	plain, err := c.open(ctx, k, key, stored)
	if err == nil || ctx.Err() != nil {
		return plain, err
	}
	problem := t.Usable(ctx)
	again := t.use()
	defer t.done(again)
	if again != c {
		return again.open(ctx, k, key, stored)
	}
	if problem != nil {
		f := fault.Of(err)
		return nil, &fault.Error{Code: f.Code, Message: f.Message + "; " + fault.Of(problem).Message, Next: mendConfig, Cause: err}
	}
	return nil, err
}

func (c *configuration) open(ctx context.Context, k *Kind, key string, stored []byte) ([]byte, error) {
	gr := k.StoredAs()
	provider, ok := c.rule(gr).opens(stored)
	switch {
	case !ok && !bytes.HasPrefix(stored, []byte(sealedPrefix)):
		return nil, fault.New(fault.Undecodable, "add the identity provider to the API server's configuration, or delete the object",
			"%s is stored in the clear, which the encryption configuration does not allow for %s", quoteASCII(key), gr)
	case !ok:
		return nil, fault.New(fault.Encrypted, nextConfig,
			"%s is encrypted with %s, which the encryption configuration does not have for %s", quoteASCII(key), sealedBy(stored), gr)
	case provider.prefix == "":
		return stored, nil
	}
	transformer := c.byResource.TransformerForResource(gr)
	plain, err := c.transform(ctx, provider, func(ctx context.Context) ([]byte, error) {
		plain, _, err := transformer.TransformFromStorage(ctx, stored, value.DefaultContext(key))
		return plain, err
	})
	switch {
	case err == nil:
		return plain, nil
	case errors.Is(err, context.Canceled):
		return nil, fmt.Errorf("decrypting %s: %w", quoteASCII(key), err)
	case provider.socket != "":
		return nil, kmsFault(key, provider, err)
	}
	return nil, fault.New(fault.Encrypted, nextConfig,
		"%s does not open with %s: the key of that name is another one, or the value belongs to another etcd key", quoteASCII(key), sealedBy(stored))
}

// Seal encrypts a value with the provider that the configuration names first
// for the kind's resource at this moment: the file is looked at each time. It
// returns fault.Encrypted where the file cannot be used, and where the provider
// is a KMS plugin that does not answer. Without a deadline of ctx's own it waits
// 5 s at most for a plugin.
func (t *Transformers) Seal(ctx context.Context, k *Kind, key string, plain []byte) ([]byte, error) {
	if bytes.HasPrefix(plain, []byte(sealedPrefix)) {
		return nil, fault.New(fault.Undecodable, "report this as a bug", "%s is encrypted already and must not be again", quoteASCII(key))
	}
	if err := t.Usable(ctx); ctx.Err() != nil {
		return nil, fmt.Errorf("encrypting %s: %w", quoteASCII(key), ctx.Err())
	} else if err != nil {
		return nil, &fault.Error{Code: fault.Encrypted, Message: quoteASCII(key) + " cannot be written: " + fault.Of(err).Message, Next: mendConfig, Cause: err}
	}
	c := t.use()
	defer t.done(c)
	gr := k.StoredAs()
	provider := c.rule(gr)[0]
	transformer := c.byResource.TransformerForResource(gr)
	stored, err := c.transform(ctx, provider, func(ctx context.Context) ([]byte, error) {
		return transformer.TransformToStorage(ctx, plain, value.DefaultContext(key))
	})
	switch {
	case err == nil:
		return stored, nil
	case errors.Is(err, context.Canceled):
		return nil, fmt.Errorf("encrypting %s: %w", quoteASCII(key), err)
	case provider.socket != "":
		return nil, kmsFault(key, provider, err)
	}
	return nil, fault.New(fault.Failed, "", "%s cannot be encrypted with %s: %w", quoteASCII(key), quoteASCII(provider.name), err)
}

// transform runs one transformation within its time. Where a KMS plugin is
// needed it sees to it that the library has asked it for a data key, which it
// does by itself when loading and then every 10 s; without one it neither seals
// nor opens anything.
func (c *configuration) transform(ctx context.Context, p encryptionProvider, do func(context.Context) ([]byte, error)) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, transformTimeout)
	defer cancel()
	if p.v1 { // its client obeys no context and would wait out its timeout
		if err := dialKMS(ctx, p.socket); err != nil {
			return nil, err
		}
	}
	out, err := do(ctx)
	for err != nil && p.socket != "" && !p.v1 && ctx.Err() == nil {
		if err = dialKMS(ctx, p.socket); err != nil {
			break
		}
		asked := c.askPlugins(ctx)
		if out, err = do(ctx); err == nil || asked == nil {
			break
		}
		err = asked
		select { // within 3 s of a failure the library repeats it without asking again
		case <-ctx.Done():
		case <-time.After(askInterval):
		}
	}
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		return nil, context.Canceled
	}
	return out, err
}

// sealedBy says with what a value was encrypted, such as aescbc key1, by its
// prefix; no byte behind that is ever part of it.
func sealedBy(stored []byte) string {
	parts := strings.SplitN(string(stored[len(sealedPrefix):min(len(stored), 300)]), ":", 4)
	if len(parts) < 4 || !slices.Contains([]string{"aescbc", "aesgcm", "secretbox", "kms"}, parts[0]) || !versionWord.MatchString(parts[1]) {
		return "a provider that is not known here"
	}
	if name := parts[2]; name != "" && typable(name) {
		return parts[0] + " " + name
	}
	return parts[0] + " and a key of an unusual name"
}

// kmsFault is the error for a value that needs a KMS plugin.
func kmsFault(key string, p encryptionProvider, err error) error {
	why := err.Error()
	var down *kmsDown
	if errors.As(err, &down) {
		why = down.Error()
	} else if s, ok := status.FromError(err); ok {
		why = s.Message() // the plugin's own words
	}
	return fault.New(fault.Encrypted, "start the KMS plugin again (its static pod or unit on this node), or act on what is not encrypted",
		"%s needs the KMS plugin %s on %s, which failed: %s", quoteASCII(key), quoteASCII(strings.TrimPrefix(p.name, "kms:")), quoteASCII(p.socket), quoteASCII(why))
}

// askPlugins makes the library ask its KMS v2 plugins for a data key.
func (c *configuration) askPlugins(ctx context.Context) error {
	done := make(chan error, len(c.checks))
	for _, check := range c.checks {
		// The library holds a lock while it asks, which does not obey ctx; the
		// call that it waits for does.
		go func() { done <- check.Check((&http.Request{}).WithContext(ctx)) }()
	}
	for range c.checks {
		select {
		case err := <-done:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// kmsDown says that a KMS plugin's socket takes no connection.
type kmsDown struct{ cause error }

func (e *kmsDown) Error() string { return fmt.Sprintf("nobody listens there: %v", e.cause) }

func (e *kmsDown) Unwrap() error { return e.cause }

// dialKMS finds out at once whether a KMS plugin is there.
func dialKMS(ctx context.Context, socket string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return &kmsDown{cause: errors.Unwrap(err)}
	}
	return conn.Close()
}

// loadingKey is the context key under which loadConfiguration hands the KMS client
// the flag that says whether it is still loading.
type loadingKey struct{}

// useOwnKMSClient puts kmsPlugin in the place of the library's KMS v2 client.
// The variable is exported for tests, but it is also the only way to one
// connection per call: the library's keeps one, and when the plugin comes back
// it may still wait minutes in gRPC's backoff.
var useOwnKMSClient = sync.OnceFunc(func() {
	encryptionconfig.EnvelopeKMSv2ServiceFactory = func(ctx context.Context, endpoint, name string, timeout time.Duration) (kmsservice.Service, error) {
		socket, err := kmsutil.ParseEndpoint(endpoint)
		if err != nil {
			return nil, err
		}
		loading, _ := ctx.Value(loadingKey{}).(*atomic.Bool)
		return &kmsPlugin{endpoint: endpoint, socket: socket, name: name, timeout: timeout, loading: loading}, nil
	}
})

// kmsPlugin asks a KMS v2 plugin with a new connection each time. Calls are
// rare, since the library keeps the data keys that it was told.
type kmsPlugin struct {
	endpoint, socket, name string
	timeout                time.Duration
	loading                *atomic.Bool
}

func (p *kmsPlugin) call(ctx context.Context, do func(context.Context, kmsservice.Service) error) error {
	limit := transformTimeout
	if p.loading != nil && p.loading.Load() {
		limit = loadTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel() // closes the connection too
	if err := dialKMS(ctx, p.socket); err != nil {
		return err
	}
	service, err := kmsv2.NewGRPCService(ctx, p.endpoint, p.name, p.timeout)
	if err != nil {
		return err
	}
	return do(ctx, service)
}

// Decrypt implements kmsservice.Service.
func (p *kmsPlugin) Decrypt(ctx context.Context, uid string, req *kmsservice.DecryptRequest) (plain []byte, err error) {
	err = p.call(ctx, func(ctx context.Context, s kmsservice.Service) (err error) {
		plain, err = s.Decrypt(ctx, uid, req)
		return err
	})
	return plain, err
}

// Encrypt implements kmsservice.Service.
func (p *kmsPlugin) Encrypt(ctx context.Context, uid string, data []byte) (response *kmsservice.EncryptResponse, err error) {
	err = p.call(ctx, func(ctx context.Context, s kmsservice.Service) (err error) {
		response, err = s.Encrypt(ctx, uid, data)
		return err
	})
	return response, err
}

// Status implements kmsservice.Service.
func (p *kmsPlugin) Status(ctx context.Context) (response *kmsservice.StatusResponse, err error) {
	err = p.call(ctx, func(ctx context.Context, s kmsservice.Service) (err error) {
		response, err = s.Status(ctx)
		return err
	})
	return response, err
}
