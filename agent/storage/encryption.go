package storage

import (
	"bytes"
	"context"
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
	// loadTimeout bounds each question that LoadEncryption asks a KMS plugin.
	loadTimeout = 500 * time.Millisecond
)

const nextConfig = "give Halligan the file that the API server's --encryption-provider-config names now"

// Transformers opens and seals values as the cluster's EncryptionConfiguration
// says. It is safe for concurrent use.
type Transformers struct {
	byResource encryptionconfig.StaticTransformers
	rules      map[schema.GroupResource]*encryptionRule
	names      map[string]string // as Providers returns it
	checks     []healthz.HealthChecker
	sockets    map[string]string // KMS v1 plugin to the socket's path
	stop       context.CancelFunc
}

// encryptionRule is what the configuration says of a resource, for messages and
// for the cases that need no transformer.
type encryptionRule struct {
	first    string   // the provider that writes, as Providers names it
	prefixes []string // of the values that some provider can open
	identity bool     // whether values in the clear are allowed
}

// LoadEncryption reads the cluster's EncryptionConfiguration. An empty path
// means that the cluster has none. A file that is not readable or not valid is
// an error; a KMS plugin that does not answer is not, only what needs it will
// fail. ctx bounds the loading; Close ends what runs in the background.
func LoadEncryption(ctx context.Context, path string) (*Transformers, error) {
	t := &Transformers{stop: func() {}}
	if path == "" {
		return t, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	config, err := readEncryption(path)
	if err != nil {
		return nil, err
	}
	loading := new(atomic.Bool)
	loading.Store(true)
	defer loading.Store(false)
	background, stop := context.WithCancel(context.WithValue(context.WithoutCancel(ctx), loadingKey{}, loading))
	useOwnKMSClient()
	if err := t.describe(config); err != nil {
		stop()
		return nil, err
	}
	loaded, err := encryptionconfig.LoadEncryptionConfig(background, path, false, "")
	if err != nil {
		stop()
		return nil, fault.New(fault.Failed, nextConfig, "the encryption configuration %s is not valid: %w", quoteASCII(path), err)
	}
	t.byResource, t.checks, t.stop = loaded.Transformers, loaded.HealthChecks, stop
	return t, nil
}

// readEncryption reads the configuration for what the transformers do not tell:
// the names of providers and keys. Validation is left to the library.
func readEncryption(path string) (*apiserverv1.EncryptionConfiguration, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fault.New(fault.Failed, nextConfig, "the encryption configuration cannot be read: %w", err)
	}
	var config apiserverv1.EncryptionConfiguration
	if err := yaml.Unmarshal(raw, &config); err != nil {
		return nil, fault.New(fault.Failed, nextConfig, "the encryption configuration %s is not readable YAML", quoteASCII(path))
	}
	return &config, nil
}

// describe fills names, rules and sockets.
func (t *Transformers) describe(config *apiserverv1.EncryptionConfiguration) error {
	t.names = make(map[string]string)
	t.rules = make(map[schema.GroupResource]*encryptionRule)
	t.sockets = make(map[string]string)
	for _, entry := range config.Resources {
		for _, resource := range entry.Resources {
			gr := schema.ParseGroupResource(resource)
			rule := t.rules[gr]
			if rule == nil {
				rule = new(encryptionRule)
				t.rules[gr] = rule
			}
			for _, p := range entry.Providers {
				if err := t.describeProvider(rule, p); err != nil {
					return err
				}
			}
			t.names[resource] = rule.first
		}
	}
	return nil
}

func (t *Transformers) describeProvider(rule *encryptionRule, p apiserverv1.ProviderConfiguration) error {
	var names []string
	keys := func(provider string, keys []apiserverv1.Key) {
		for _, k := range keys {
			names = append(names, provider+":"+k.Name)
			rule.prefixes = append(rule.prefixes, sealedPrefix+provider+":v1:"+k.Name+":")
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
		names, rule.identity = append(names, "identity"), true
	case p.KMS != nil:
		version := p.KMS.APIVersion
		if version != "v2" { // v1 is the default of the format
			version = "v1"
			if socket, err := kmsutil.ParseEndpoint(p.KMS.Endpoint); err == nil {
				t.sockets[p.KMS.Name] = socket
			}
			// What a cluster of 1.28 wrote with KMS v1 must stay readable,
			// though the library has it off by default now.
			if err := utilfeature.DefaultMutableFeatureGate.Set("KMSv1=true"); err != nil {
				return fault.New(fault.Failed, "", "enabling KMS v1: %w", err)
			}
		}
		names = append(names, "kms:"+p.KMS.Name)
		rule.prefixes = append(rule.prefixes, sealedPrefix+"kms:"+version+":"+p.KMS.Name+":")
	}
	if rule.first == "" && len(names) > 0 {
		rule.first = names[0]
	}
	return nil
}

// Providers returns for each resource of the configuration, written as there,
// the provider and key that write it, such as aescbc:key1 or kms:vault.
func (t *Transformers) Providers() map[string]string { return t.names }

// Close ends the background work. Values of KMS providers cannot be opened
// afterwards.
func (t *Transformers) Close() { t.stop() }

// encryptedAs is the resource by which the API server finds the kind's
// provider: events of both groups have the core group's storage.
func (k *Kind) encryptedAs() schema.GroupResource {
	if k.Group == "events.k8s.io" {
		return schema.GroupResource{Resource: k.Plural}
	}
	return schema.GroupResource{Group: k.Group, Resource: k.Plural}
}

// rule finds the rule of a resource in the order in which the library finds its
// transformer: itself, its group, everything.
func (t *Transformers) rule(gr schema.GroupResource) *encryptionRule {
	for _, try := range []schema.GroupResource{gr, {Group: gr.Group, Resource: "*"}, {Group: "*", Resource: "*"}} {
		if r := t.rules[try]; r != nil {
			return r
		}
	}
	return &encryptionRule{first: "identity", identity: true}
}

// Open decrypts a stored value. key is the full etcd key, which the providers
// authenticate along with the value. It returns fault.Encrypted where no
// configured key fits or the KMS plugin does not answer, and fault.Undecodable
// for a value in the clear where the configuration allows none, since the API
// server does not take it either. Without a deadline of ctx's own it waits 5 s
// at most.
func (t *Transformers) Open(ctx context.Context, k *Kind, key string, stored []byte) ([]byte, error) {
	gr := k.encryptedAs()
	rule := t.rule(gr)
	if !bytes.HasPrefix(stored, []byte(sealedPrefix)) {
		if rule.identity {
			return stored, nil
		}
		return nil, fault.New(fault.Undecodable, "add the identity provider to the API server's configuration, or delete the object",
			"%s is stored in the clear, which the encryption configuration does not allow for %s", quoteASCII(key), gr)
	}
	by := sealedBy(stored)
	if !slices.ContainsFunc(rule.prefixes, func(p string) bool { return bytes.HasPrefix(stored, []byte(p)) }) {
		return nil, fault.New(fault.Encrypted, nextConfig,
			"%s is encrypted with %s, which the encryption configuration does not have for %s", quoteASCII(key), by, gr)
	}
	ctx, cancel := context.WithTimeout(ctx, transformTimeout)
	defer cancel()
	if err := t.dialV1(ctx, by); err != nil {
		return nil, kmsFault(key, by, err)
	}
	plain, _, err := t.byResource.TransformerForResource(gr).TransformFromStorage(ctx, stored, value.DefaultContext(key))
	switch {
	case err == nil:
		return plain, nil
	case errors.Is(ctx.Err(), context.Canceled):
		return nil, fmt.Errorf("decrypting %s: %w", quoteASCII(key), context.Canceled)
	case strings.HasPrefix(by, "kms "):
		return nil, kmsFault(key, by, err)
	}
	return nil, fault.New(fault.Encrypted, nextConfig,
		"%s does not open with %s: the key of that name is another one, or the value belongs to another etcd key", quoteASCII(key), by)
}

// Seal encrypts a value with the provider that the configuration names first
// for the kind's resource. It returns fault.Encrypted where that is a KMS
// plugin that does not answer. Without a deadline of ctx's own it waits 5 s at
// most.
func (t *Transformers) Seal(ctx context.Context, k *Kind, key string, plain []byte) ([]byte, error) {
	gr := k.encryptedAs()
	by := strings.Replace(t.rule(gr).first, ":", " ", 1)
	ctx, cancel := context.WithTimeout(ctx, transformTimeout)
	defer cancel()
	if err := t.dialV1(ctx, by); err != nil {
		return nil, kmsFault(key, by, err)
	}
	transformer := t.byResource.TransformerForResource(gr)
	stored, err := transformer.TransformToStorage(ctx, plain, value.DefaultContext(key))
	if err != nil && strings.HasPrefix(by, "kms ") {
		// The plugin may have come up after the library last asked it, which it
		// does every 10 s.
		if err = t.askPlugins(ctx); err == nil {
			stored, err = transformer.TransformToStorage(ctx, plain, value.DefaultContext(key))
		}
	}
	switch {
	case err == nil:
		return stored, nil
	case errors.Is(ctx.Err(), context.Canceled):
		return nil, fmt.Errorf("encrypting %s: %w", quoteASCII(key), context.Canceled)
	case strings.HasPrefix(by, "kms "):
		return nil, kmsFault(key, by, err)
	}
	return nil, fault.New(fault.Failed, "", "%s cannot be encrypted with %s: %w", quoteASCII(key), by, err)
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
func kmsFault(key, by string, err error) error {
	why := err.Error()
	var down *kmsDown
	if errors.As(err, &down) {
		why = down.Error()
	} else if s, ok := status.FromError(err); ok {
		why = s.Message() // the plugin's own words
	}
	return fault.New(fault.Encrypted, "start the KMS plugin again (its static pod or unit on this node), or act on what is not encrypted",
		"%s needs %s, which failed: %s", quoteASCII(key), by, quoteASCII(why))
}

// askPlugins makes the library ask its KMS v2 plugins for a data key.
func (t *Transformers) askPlugins(ctx context.Context) error {
	done := make(chan error, len(t.checks))
	for _, check := range t.checks {
		// The library holds a lock while it asks, which does not obey ctx; the
		// call that it waits for does.
		go func() { done <- check.Check((&http.Request{}).WithContext(ctx)) }()
	}
	for range t.checks {
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

// dialV1 finds out fast whether a KMS v1 plugin is there, since the library's
// client of v1 obeys no context and waits out its timeout.
func (t *Transformers) dialV1(ctx context.Context, by string) error {
	name, isKMS := strings.CutPrefix(by, "kms ")
	if socket, ok := t.sockets[name]; ok && isKMS {
		return dialKMS(ctx, socket)
	}
	return nil
}

// kmsDown says that a KMS plugin's socket takes no connection.
type kmsDown struct {
	socket string
	cause  error
}

func (e *kmsDown) Error() string {
	return fmt.Sprintf("nobody listens on %s: %v", e.socket, e.cause)
}

func (e *kmsDown) Unwrap() error { return e.cause }

func dialKMS(ctx context.Context, socket string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return &kmsDown{socket: socket, cause: errors.Unwrap(err)}
	}
	return conn.Close()
}

// loadingKey is the context key under which LoadEncryption hands the KMS client
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
