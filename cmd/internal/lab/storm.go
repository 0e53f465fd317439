package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/klog/v2"

	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

// StormOptions says what storm to make in a lab that is up.
type StormOptions struct {
	// Dir is the folder of a lab that was started with --kube.
	Dir string
	// Kind is the name of one of stormKinds; default list.
	Kind string
	// Shape is what the lab must have been started as: "a" is flow control on,
	// and the victim another ServiceAccount; "b" is flow control off, and the
	// victim a person. Default: whichever it is.
	Shape string
	// ClientsPerPod is how many requests a pod has in flight; 1 to 100, the API
	// server's bound of streams on one connection (apiserver/pkg/server/secure_serving.go).
	ClientsPerPod int
	// BackoffShare of a pod's clients waits as client-go's informers do; the others
	// hammer on, whatever the answer.
	BackoffShare float64
	// Pace is how far apart the requests of a client that hammers are at least: it
	// retries at a fixed interval, or at once with 0.
	Pace time.Duration
	// Pause is how long a client that backs off rests after an answer.
	Pause time.Duration
	// Objects is how many ConfigMaps there are to LIST, at least, each of
	// ObjectBytes.
	Objects, ObjectBytes int
	// Duration bounds the storm once it has begun.
	Duration time.Duration
	// ProbeEach and ProbeTimeout are the pace and the patience of the victim's and
	// the administrator's questions; 0: 500 ms and 10 s.
	ProbeEach, ProbeTimeout time.Duration
	// Out takes the lines.
	Out io.Writer
}

// DefaultStorm is a storm that saturates an API server with one processor.
func DefaultStorm() StormOptions {
	return StormOptions{Kind: "list", ClientsPerPod: 40, BackoffShare: 0.25, Pace: 250 * time.Millisecond, Objects: 8000, ObjectBytes: 1024, Duration: 10 * time.Minute}
}

// The victim's namespace, account and the object that its deploy job is about.
const (
	victimNamespace = "shop"
	victimAccount   = "deploy"
	victimObject    = "release"
	// offenderRole is the ClusterRole of the offender, and its binding.
	offenderRole = "telemetry-collector"
	// victimPerson is the user of the lab's ordinary kubeconfig.
	victimPerson = "alice"
)

// Storm is an incident that goes on in a lab.
type Storm struct {
	opts   StormOptions
	kind   stormKind
	admin  *rest.Config
	api    *rest.RESTClient // the administrator's
	etcd   *clientv3.Client
	hosts  []string // of all API servers
	person string   // the ordinary user's kubeconfig
	reads  chan struct{}

	pods   pods
	load   tally
	victim *probe
	ruler  *probe // the administrator
	began  time.Time
	stop   context.CancelFunc
	retire context.CancelFunc
	group  *errgroup.Group
}

// NewStorm puts everything in place, waits until every pod of the offender runs
// and has its token, and has the victim and the administrator ask; the load
// begins with Begin. What it put in place stays when it ends, as an incident
// would leave it.
func NewStorm(ctx context.Context, o StormOptions) (_ *Storm, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	s := &Storm{opts: o, reads: make(chan struct{}, etcdReaders)}
	s.kind = stormKinds[slices.IndexFunc(stormKinds, func(k stormKind) bool { return k.name == o.Kind })]
	s.pods = pods{storm: s, begin: make(chan struct{}), running: map[string]*podClients{}}
	if err := s.connect(); err != nil {
		return nil, err
	}
	// client-go logs each answer that is cut short, as every pod's end does.
	klog.SetLogger(logr.Discard())
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	// The storm outlives the call, but not its context.
	ctx, s.stop = context.WithCancel(ctx)
	s.group, ctx = errgroup.WithContext(ctx)
	if err := s.shape(ctx); err != nil {
		return nil, err
	}
	if err := s.prepare(ctx); err != nil {
		if strings.Contains(err.Error(), "failed calling webhook") {
			return nil, fault.New(fault.Failed, "if it is that of an earlier storm: halligan delete validatingwebhookconfigurations/"+webhookName,
				"a webhook keeps the incident from being put in place: %w", err)
		}
		return nil, fmt.Errorf("putting the incident in place: %w", err)
	}
	if s.kind.call != nil {
		load, retire := context.WithCancel(ctx)
		s.retire = retire
		s.group.Go(func() error { s.follow(load); return nil })
		if err := s.rollout(ctx); err != nil {
			return nil, err
		}
	}
	s.group.Go(func() error { s.victim.run(ctx); return nil })
	s.group.Go(func() error { s.ruler.run(ctx); return nil })
	return s, nil
}

// Begin lets the clients loose. It is called once.
func (s *Storm) Begin(ctx context.Context) error {
	if s.kind.prepare != nil {
		if err := s.kind.prepare(ctx, s); err != nil {
			return err
		}
	}
	s.began = time.Now()
	close(s.pods.begin)
	return nil
}

// Retire ends the load, also that of pods to come: the offender's image does no
// harm from now on. Victim and administrator go on asking.
func (s *Storm) Retire() {
	if s.retire != nil {
		s.retire()
	}
}

func (o *StormOptions) check() error {
	if o.Out == nil {
		o.Out = io.Discard
	}
	if o.Kind == "" {
		o.Kind = stormKinds[0].name
	}
	if o.ProbeEach <= 0 {
		o.ProbeEach = probeEach
	}
	if o.ProbeTimeout <= 0 {
		o.ProbeTimeout = probeTimeout
	}
	usage := func(next, format string, args ...any) error { return fault.New(fault.Usage, next, format, args...) }
	switch {
	case o.Dir == "":
		return usage("say where with --dir DIR", "the storm needs the folder of a lab")
	case !slices.ContainsFunc(stormKinds, func(k stormKind) bool { return k.name == o.Kind }):
		return usage("see halligan-lab storm --help", "there is no kind of storm called %q", o.Kind)
	case o.Shape != "" && o.Shape != "a" && o.Shape != "b":
		return usage("give a or b", "there is no shape %q", o.Shape)
	case o.ClientsPerPod < 1 || o.ClientsPerPod > 100:
		return usage("choose from 1 to 100", "%d clients in a pod cannot be", o.ClientsPerPod)
	case !(o.BackoffShare >= 0 && o.BackoffShare <= 1):
		return usage("choose from 0 to 1", "a share of %v cannot be", o.BackoffShare)
	case o.Objects < 0 || o.ObjectBytes < 0 || o.ObjectBytes > 1<<20:
		return usage("choose at least 0 objects of 0 to 1048576 bytes", "%d objects of %d bytes cannot be", o.Objects, o.ObjectBytes)
	case o.Duration <= 0:
		return usage("give a time such as 10m", "a storm of %s cannot be", o.Duration)
	}
	return nil
}

// labRuns finds out whether a lab with an API server runs in the folder, and
// reads what it exports.
func labRuns(dir string) (map[string]string, error) {
	if err := own(dir); err != nil {
		return nil, err
	}
	next := "start one with: halligan-lab up --kube --dir " + dir
	lock, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fault.New(fault.Failed, next, "no lab is in %s", dir)
		}
		return nil, err
	}
	defer lock.Close()
	switch err := syscall.Flock(int(lock.Fd()), syscall.LOCK_SH|syscall.LOCK_NB); {
	case err == nil:
		return nil, fault.New(fault.Failed, next, "the lab in %s does not run", dir)
	case !errors.Is(err, syscall.EWOULDBLOCK):
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(dir, "env"))
	if err != nil {
		return nil, fault.New(fault.Failed, "wait until it says ready", "the lab in %s is not ready: %w", dir, err)
	}
	env := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "export "), "="); ok {
			env[name] = strings.ReplaceAll(strings.Trim(value, "'"), `'\''`, "'")
		}
	}
	if env["KUBECONFIG_ADMIN"] == "" {
		return nil, fault.New(fault.Failed, "stop it and start it again with --kube", "the lab in %s has no API server", dir)
	}
	return env, nil
}

// connect makes the clients and finds out which shape the lab has.
func (s *Storm) connect() error {
	env, err := labRuns(s.opts.Dir)
	if err != nil {
		return err
	}
	all, err := clientcmd.LoadFromFile(env["KUBECONFIG_ADMIN"])
	if err != nil {
		return err
	}
	for _, c := range all.Clusters {
		s.hosts = append(s.hosts, c.Server)
	}
	slices.Sort(s.hosts)
	admin, err := clientcmd.BuildConfigFromFlags("", env["KUBECONFIG_ADMIN"])
	if err != nil {
		return err
	}
	s.admin = person(admin, "halligan-lab")
	if s.api, err = rest.UnversionedRESTClientFor(s.admin); err != nil {
		return err
	}
	s.person = env["KUBECONFIG"]
	user, err := clientcmd.BuildConfigFromFlags("", s.person)
	if err != nil {
		return err
	}
	ask := askFor
	if s.kind.writes {
		ask = askToWrite
	}
	s.victim = &probe{name: "victim", config: person(user, "kubectl"), ask: ask, interval: s.opts.ProbeEach, timeout: s.opts.ProbeTimeout}
	s.ruler = &probe{name: "administrator", config: s.admin, ask: ask, interval: s.opts.ProbeEach, timeout: s.opts.ProbeTimeout}

	tls, err := transport.TLSInfo{TrustedCAFile: env["ETCDCTL_CACERT"], CertFile: env["ETCDCTL_CERT"], KeyFile: env["ETCDCTL_KEY"]}.ClientConfig()
	if err != nil {
		return err
	}
	s.etcd, err = clientv3.New(clientv3.Config{Endpoints: strings.Split(env["ETCDCTL_ENDPOINTS"], ","), TLS: tls,
		DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
	return err
}

// shape finds out whether flow control is on: only then the API server has the
// endpoint (apiserver/pkg/server/config.go: installAPI).
func (s *Storm) shape(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.opts.ProbeTimeout)
	defer cancel()
	shape := "a"
	err := s.api.Get().AbsPath("/debug/api_priority_and_fairness/dump_priority_levels").Do(ctx).Error()
	if apierrors.IsNotFound(err) {
		shape, err = "b", nil
	}
	if err != nil {
		return fault.New(fault.Unreachable, "see the logs in "+filepath.Join(s.opts.Dir, "log"), "the API server does not answer its administrator: %w", err)
	}
	if s.opts.Shape == "" {
		s.opts.Shape = shape
	}
	if s.opts.Shape != shape {
		return fault.New(fault.Usage, "start it with --apiserver-procs 1, for b also with --no-flow-control --max-inflight 130",
			"the lab in %s has shape %s, not %s", s.opts.Dir, shape, s.opts.Shape)
	}
	return nil
}

var victimPath = []string{"/api/v1/namespaces", victimNamespace, "configmaps", victimObject}

// askFor reads one small object.
func askFor(ctx context.Context, api *rest.RESTClient) error {
	return api.Get().AbsPath(victimPath...).Do(ctx).Error()
}

// askToWrite changes one small object.
func askToWrite(ctx context.Context, api *rest.RESTClient) error {
	return api.Patch(types.MergePatchType).AbsPath(victimPath...).
		Body(fmt.Appendf(nil, `{"data":{"deployed":"%d"}}`, time.Now().UnixNano())).Do(ctx).Error()
}

// hostFor spreads pods over the API servers, the same ones every time.
func (s *Storm) hostFor(id podID) string {
	sum := 0
	for _, b := range []byte(id.name) {
		sum += int(b)
	}
	return s.hosts[sum%len(s.hosts)]
}

// prepare makes all that the incident consists of, and what the victim works
// on.
func (s *Storm) prepare(ctx context.Context) error {
	const core, rbac = "/api/v1", "/apis/rbac.authorization.k8s.io/v1"
	meta := func(namespace, name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labelled(name)}
	}
	typed := func(api, kind string) metav1.TypeMeta { return metav1.TypeMeta{APIVersion: api, Kind: kind} }
	for _, n := range []string{offenderNamespace, victimNamespace} {
		if err := s.apply(ctx, core+"/namespaces", &corev1.Namespace{TypeMeta: typed("v1", "Namespace"), ObjectMeta: meta("", n)}); err != nil {
			return err
		}
	}
	edit := rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "edit"}
	if err := errors.Join(
		s.apply(ctx, core+"/namespaces/"+offenderNamespace+"/serviceaccounts",
			&corev1.ServiceAccount{TypeMeta: typed("v1", "ServiceAccount"), ObjectMeta: meta(offenderNamespace, offenderName)}),
		s.apply(ctx, rbac+"/clusterroles", &rbacv1.ClusterRole{TypeMeta: typed(rbacv1.SchemeGroupVersion.String(), "ClusterRole"), ObjectMeta: meta("", offenderRole), Rules: s.kind.rules}),
		s.apply(ctx, rbac+"/clusterrolebindings", &rbacv1.ClusterRoleBinding{TypeMeta: typed(rbacv1.SchemeGroupVersion.String(), "ClusterRoleBinding"), ObjectMeta: meta("", offenderRole),
			Subjects: []rbacv1.Subject{account(offenderNamespace, offenderName)}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: offenderRole}}),
		s.apply(ctx, core+"/namespaces/"+victimNamespace+"/serviceaccounts",
			&corev1.ServiceAccount{TypeMeta: typed("v1", "ServiceAccount"), ObjectMeta: meta(victimNamespace, victimAccount)}),
		s.apply(ctx, rbac+"/namespaces/"+victimNamespace+"/rolebindings", &rbacv1.RoleBinding{TypeMeta: typed(rbacv1.SchemeGroupVersion.String(), "RoleBinding"), ObjectMeta: meta(victimNamespace, "deployers"),
			Subjects: []rbacv1.Subject{account(victimNamespace, victimAccount), {APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: victimPerson}}, RoleRef: edit}),
		s.apply(ctx, core+"/namespaces/"+victimNamespace+"/configmaps",
			&corev1.ConfigMap{TypeMeta: typed("v1", "ConfigMap"), ObjectMeta: meta(victimNamespace, victimObject), Data: map[string]string{"version": "v8"}}),
	); err != nil {
		return err
	}
	if s.opts.Shape == "a" {
		if err := s.employ(ctx); err != nil {
			return err
		}
	}
	if s.kind.call != nil {
		if err := s.ballast(ctx); err != nil {
			return fmt.Errorf("ConfigMaps to list: %w", err)
		}
		ds := &appsv1.DaemonSet{TypeMeta: typed("apps/v1", "DaemonSet"), ObjectMeta: meta(offenderNamespace, offenderName),
			Spec: appsv1.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchLabels: labelled(offenderName)}, Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labelled(offenderName)},
				Spec: corev1.PodSpec{ServiceAccountName: offenderName, TerminationGracePeriodSeconds: new(int64(1)),
					Containers: []corev1.Container{{Name: offenderName, Image: "registry.example.com/telemetry/collector:v2.4.0"}}}}}}
		if err := s.apply(ctx, "/apis/apps/v1/namespaces/"+offenderNamespace+"/daemonsets", ds); err != nil {
			return err
		}
	}
	return nil
}

// apply creates an object or makes it what it should be, with the rights of the
// administrator.
func (s *Storm) apply(ctx context.Context, path string, obj object) error {
	data, err := json.Marshal(obj)
	if err != nil {
		return err
	}
	var bare map[string]any
	if err := json.Unmarshal(data, &bare); err != nil {
		return err
	}
	// Go's zero values say more than is meant.
	delete(bare, "status")
	maps.DeleteFunc(bare["metadata"].(map[string]any), func(_ string, v any) bool { return v == nil })
	if data, err = json.Marshal(bare); err != nil {
		return err
	}
	err = s.api.Patch(types.ApplyPatchType).AbsPath(path, obj.GetName()).Param("fieldManager", "halligan-lab").Param("force", "true").Body(data).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("%s/%s: %w", path, obj.GetName(), err)
	}
	return nil
}

// token asks for a ServiceAccount's token; with a pod's name it is bound to the
// pod, as the kubelet does it.
func (s *Storm) token(ctx context.Context, namespace, account, pod string, valid time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: new(int64(valid / time.Second))}}
	if pod != "" {
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod}
	}
	request.TypeMeta = metav1.TypeMeta{APIVersion: authenticationv1.SchemeGroupVersion.String(), Kind: "TokenRequest"}
	body, err := json.Marshal(request)
	if err != nil {
		return "", err
	}
	raw, err := s.api.Post().AbsPath("/api/v1/namespaces", namespace, "serviceaccounts", account, "token").
		SetHeader("Content-Type", "application/json").Body(body).Do(ctx).Raw()
	if err != nil {
		return "", err
	}
	if err := json.Unmarshal(raw, request); err != nil {
		return "", err
	}
	return request.Status.Token, nil
}

// VictimKubeconfig is the file with which the victim's kubectl works.
func (s *Storm) VictimKubeconfig() string {
	if s.opts.Shape == "a" {
		return filepath.Join(s.opts.Dir, "kube", "deploy.kubeconfig")
	}
	return s.person
}

// employ makes the deploy job the victim: with a token of its own.
func (s *Storm) employ(ctx context.Context) error {
	token, err := s.token(ctx, victimNamespace, victimAccount, "", s.opts.Duration+24*time.Hour)
	if err != nil {
		return err
	}
	config := rest.AnonymousClientConfig(s.admin)
	config.BearerToken = token
	s.victim.config = person(config, "kubectl")
	ca := config.CAData
	if len(ca) == 0 {
		if ca, err = os.ReadFile(config.CAFile); err != nil {
			return err
		}
	}
	data, err := clientcmd.Write(clientcmdapi.Config{CurrentContext: "lab",
		Clusters:  map[string]*clientcmdapi.Cluster{"lab": {Server: config.Host, CertificateAuthorityData: ca}},
		AuthInfos: map[string]*clientcmdapi.AuthInfo{victimAccount: {Token: token}},
		Contexts:  map[string]*clientcmdapi.Context{"lab": {Cluster: "lab", AuthInfo: victimAccount, Namespace: victimNamespace}}})
	if err != nil {
		return err
	}
	return durable.Write(s.VictimKubeconfig(), data)
}

// ballastWriters is how many keys of the ballast are on their way at once.
const ballastWriters = 64

// ballast makes the LISTs long. The ConfigMaps go straight into etcd, one key a
// transaction: the API servers' watches see them as they see any other write,
// and a slow API server does not delay the storm.
func (s *Storm) ballast(ctx context.Context) error {
	prefix := "/registry/configmaps/" + offenderNamespace + "/ballast-"
	has, err := s.etcd.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(ballastWriters)
	for i := int(has.Count); i < s.opts.Objects && ctx.Err() == nil; i++ {
		g.Go(func() error {
			name := fmt.Sprintf("ballast-%06d", i)
			value, err := storage.EncodeTyped(&corev1.ConfigMap{
				ObjectMeta: metav1.ObjectMeta{Namespace: offenderNamespace, Name: name, UID: uid("ConfigMap", offenderNamespace, name), CreationTimestamp: metav1.Now(), Labels: labelled("dashboards")},
				Data:       map[string]string{"series": strings.Repeat(name+" ", s.opts.ObjectBytes/len(name+" "))}})
			if err != nil {
				return err
			}
			_, err = s.etcd.Put(ctx, "/registry/configmaps/"+offenderNamespace+"/"+name, string(value))
			return err
		})
	}
	return g.Wait()
}

// etcdReaders bounds how many whole resources are read from etcd at the same
// time, for the sake of this process's memory.
const etcdReaders = 32

func (s *Storm) readEtcd(ctx context.Context, prefix string) error {
	select {
	case s.reads <- struct{}{}:
		defer func() { <-s.reads }()
	case <-ctx.Done():
		return ctx.Err()
	}
	s.load.offered.Add(1)
	_, err := s.etcd.Get(ctx, prefix, clientv3.WithPrefix())
	switch {
	case err == nil:
		s.load.answered.Add(1)
	case ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded):
		s.load.silent.Add(1)
	}
	return err
}

// follow keeps one client for every running pod, seen in etcd and not through
// the API server: a pod's process ends when its pod is gone, not when somebody
// hears of it.
func (s *Storm) follow(ctx context.Context) {
	defer s.pods.group.Wait()
	prefix := "/registry/pods/" + offenderNamespace + "/"
	for ctx.Err() == nil {
		if err := s.followFrom(ctx, prefix); err != nil && ctx.Err() == nil {
			s.say("watching the pods in etcd: %v", err)
		}
		pause(ctx, time.Second)
	}
}

// followFrom reads what is there and watches from then on.
func (s *Storm) followFrom(ctx context.Context, prefix string) error {
	// The clients' lives hang on ctx, and do not end with a watch.
	watch, cancel := context.WithCancel(ctx)
	defer cancel()
	all, err := s.etcd.Get(ctx, prefix, clientv3.WithPrefix())
	if err != nil {
		return err
	}
	there := map[string]bool{}
	for _, kv := range all.Kvs {
		there[string(kv.Key)] = true
		s.seen(ctx, string(kv.Key), kv.Value)
	}
	s.pods.mu.Lock()
	known := slices.Collect(maps.Keys(s.pods.running))
	s.pods.mu.Unlock()
	for _, key := range known {
		if !there[key] {
			s.pods.changed(ctx, key, nil)
		}
	}
	for r := range s.etcd.Watch(clientv3.WithRequireLeader(watch), prefix, clientv3.WithPrefix(), clientv3.WithRev(all.Header.Revision+1)) {
		if err := r.Err(); err != nil {
			return err
		}
		for _, e := range r.Events {
			if e.Type == clientv3.EventTypeDelete {
				s.pods.changed(ctx, string(e.Kv.Key), nil)
			} else {
				s.seen(ctx, string(e.Kv.Key), e.Kv.Value)
			}
		}
	}
	return ctx.Err()
}

// seen judges a pod's stored state. A pod that is only being deleted still runs.
func (s *Storm) seen(ctx context.Context, key string, value []byte) {
	obj, err := decodeValue(value)
	if err != nil {
		s.say("%s: %v", key, err)
		return
	}
	pod, ok := obj.(*corev1.Pod)
	if !ok || pod.Labels["app"] != offenderName {
		return
	}
	switch pod.Status.Phase {
	case corev1.PodRunning:
		if pod.Status.PodIP != "" {
			s.pods.changed(ctx, key, &podID{pod.Name, pod.Spec.NodeName, pod.Status.PodIP})
		}
	case corev1.PodSucceeded, corev1.PodFailed:
		s.pods.changed(ctx, key, nil)
	}
}

// rolloutWithin bounds how long the offender's pods take to run on every node.
const rolloutWithin = 90 * time.Second

// unwantedAfter is how long no node may be meant to run a pod of the offender.
const unwantedAfter = 10 * time.Second

// rollout waits until as many pods have a token as nodes should run one.
func (s *Storm) rollout(ctx context.Context) error {
	began := time.Now()
	for {
		ds := &appsv1.DaemonSet{}
		raw, err := s.api.Get().AbsPath("/apis/apps/v1/namespaces", offenderNamespace, "daemonsets", offenderName).Do(ctx).Raw()
		if err == nil {
			err = json.Unmarshal(raw, ds)
		}
		all, armed := s.pods.count()
		want, waited := int(ds.Status.DesiredNumberScheduled), time.Since(began)
		seen := err == nil && ds.Status.ObservedGeneration == ds.Generation
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case seen && want > 0 && armed >= want:
			s.say("%d pods of %s/%s run and have their tokens after %s", armed, offenderNamespace, offenderName, since(began))
			return nil
		case seen && want == 0 && waited > unwantedAfter:
			return fault.New(fault.Failed, "undo what stopped it: halligan history", "no node is to run %s/%s; its node selector is %v",
				offenderNamespace, offenderName, ds.Spec.Template.Spec.NodeSelector)
		case waited > rolloutWithin:
			return fault.New(fault.Failed, "see the logs in "+filepath.Join(s.opts.Dir, "log"), "%d of %d pods run after %s, %d of them with a token (%v)",
				all, want, rolloutWithin, armed, err)
		}
		pause(ctx, 200*time.Millisecond)
	}
}

// Close ends every client and waits for it. The cluster stays as it is.
func (s *Storm) Close() {
	if s.stop != nil {
		s.stop()
		s.group.Wait()
	}
	if s.etcd != nil {
		s.etcd.Close()
	}
}

func (s *Storm) say(format string, args ...any) { fmt.Fprintf(s.opts.Out, format+"\n", args...) }

// RunStorm makes a storm and tells of it each second, until the context or its
// duration ends.
func RunStorm(ctx context.Context, o StormOptions) error {
	s, err := NewStorm(ctx, o)
	if err != nil {
		return interrupted(ctx, err)
	}
	defer s.Close()
	if err := s.Begin(ctx); err != nil {
		return interrupted(ctx, err)
	}
	s.say("%s", s.describe())
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	end := time.NewTimer(s.opts.Duration)
	defer end.Stop()
	before := counts{}
	for {
		select {
		case <-ctx.Done():
		case <-end.C:
		case <-tick.C:
			now := s.load.read()
			s.say("%4.0f s  %s", time.Since(s.began).Seconds(), s.line(now.minus(before)))
			before = now
			continue
		}
		s.say("ended after %s: %s; the cluster stays as it is", since(s.began), s.load.read())
		return nil
	}
}

// describe says in a few lines what storm this is.
func (s *Storm) describe() string {
	victim := "flow control is on; the victim is the ServiceAccount " + victimNamespace + "/" + victimAccount
	if s.opts.Shape == "b" {
		victim = "flow control is off; the victim is a person, " + victimPerson
	}
	load := "no pods: it is there without any load"
	if s.kind.call != nil {
		hammering := 0
		for i := range s.opts.ClientsPerPod {
			if s.impatient(i) {
				hammering++
			}
		}
		pods, _ := s.pods.count()
		load = fmt.Sprintf("%d pods with %d clients each, of which %d hammer on and %d back off; %d ConfigMaps of %d bytes to list",
			pods, s.opts.ClientsPerPod, hammering, s.opts.ClientsPerPod-hammering, s.opts.Objects, s.opts.ObjectBytes)
	}
	return fmt.Sprintf("storm %s: %s\nshape %s: %s\n%s\n"+
		"the victim works with: kubectl --kubeconfig %s get configmap %s -n %s\n"+
		"each second: pods, then requests by their answer, then latencies of the last %s",
		s.kind.name, s.kind.summary, s.opts.Shape, victim, load,
		s.VictimKubeconfig(), victimObject, victimNamespace, lineWindow)
}

// lineWindow is what the latencies of a line are about.
const lineWindow = 10 * time.Second

func (s *Storm) line(c counts) string {
	all, _ := s.pods.count()
	from := time.Now().Add(-lineWindow)
	return fmt.Sprintf("pods %d, %s | victim %s | admin %s", all, c, s.victim.recent(from), s.ruler.recent(from))
}
