package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

// KubeOptions says what real control plane a lab runs on its etcd.
type KubeOptions struct {
	// Binaries is the folder that make kube fills; default: the one that the
	// environment's HALLIGAN_KUBE names, or kube beside this process's executable.
	Binaries string
	// APIServers is how many there are, one a node from cp-1 on; default 1.
	APIServers int
	// Procs is each API server's GOMAXPROCS; 0: as many as there are cores.
	Procs int
	// MaxInFlight bounds the reads that an API server works on at a time, and
	// half of it the writes; 0: the API server's defaults of 400 and 200.
	MaxInFlight int
	// NoFlowControl turns API priority and fairness off.
	NoFlowControl bool
	// Encrypt has Secrets encrypted at rest. A folder in which they are keeps
	// them so.
	Encrypt bool
	// Audit has each API server write an audit log, log/audit-NODE.log.
	Audit bool
}

const (
	managerPort   = 10257 // kube-controller-manager's default --secure-port
	schedulerPort = 10259 // kube-scheduler's
	// serviceRange is where Services get addresses from, and serviceIP the one
	// that the API server itself has in there.
	serviceRange, serviceIP = "10.96.0.0/16", "10.96.0.1"
	// A leader that died is replaced after leaseTerm; 15 s is the default, which
	// tests would have to wait for.
	leaseTerm, leaseRenew, leaseRetry = "8s", "6s", "1s"
	kubeReadyWithin                   = 60 * time.Second
	kubePoll                          = 100 * time.Millisecond
)

// Names of the parts, of their logs and of the leases of two of them.
const (
	managerName   = "kube-controller-manager"
	schedulerName = "kube-scheduler"
	kwokName      = "kwok"
	kubectlName   = "kubectl"
)

func apiServerName(i int) string { return "kube-apiserver-" + nodeName(i) }

// Kube is the real Kubernetes control plane of a lab, with simulated nodes.
type Kube struct {
	lab    *Lab
	o      KubeOptions
	dir    string
	pki    kubePKI
	client *kubernetes.Clientset // the administrator's

	mu      sync.Mutex // guards running
	running map[string]*daemon
}

// Kube returns the real control plane, nil in a lab without one.
func (l *Lab) Kube() *Kube { return l.kube }

// Kubectl is the command line of a kubectl of the same release, which keeps its
// cache in the lab's folder.
func (k *Kube) Kubectl() []string {
	return []string{k.binary(kubectlName), "--cache-dir", filepath.Join(k.dir, "cache")}
}

// AdminKubeconfig is that of a system:masters, whom flow control exempts. It has
// a context for each API server, called as its node; the first is the current
// one. So has the ordinary user's.
func (k *Kube) AdminKubeconfig() string { return k.config("admin") }

// UserKubeconfig is that of alice, who may read and edit workloads and is
// subject to flow control, in the level global-default.
func (k *Kube) UserKubeconfig() string { return k.config("alice") }

// CAFile is the authority of the API servers' certificates.
func (k *Kube) CAFile() string { return k.pki.ca.CertFile() }

// Servers are the addresses IP:PORT of the API servers, running or not.
func (k *Kube) Servers() []string {
	all := make([]string, k.o.APIServers)
	for i := range all {
		all[i] = k.lab.API(i)
	}
	return all
}

// PodRange is where pods get their addresses from: loopback ones, so that a
// client that plays a pod can bind to the pod's own. Labs with different
// addresses have different ones.
func (k *Kube) PodRange() string {
	second := 100
	if k.lab.opts.Net != DefaultNet {
		sum := sha256.Sum256([]byte(k.lab.opts.Net))
		second = 1 + int(sum[0])%99
	}
	return fmt.Sprintf("127.%d.0.1/16", second)
}

func (k *Kube) config(who string) string  { return filepath.Join(k.dir, who+".kubeconfig") }
func (k *Kube) binary(name string) string { return filepath.Join(k.o.Binaries, name) }
func (k *Kube) ip() string                { return k.lab.ip(0) }
func (k *Kube) log(name string) string    { return filepath.Join(k.lab.opts.Dir, "log", name+".log") }
func (k *Kube) file(name string) string   { return filepath.Join(k.dir, name) }
func (l *Lab) kubeDir() string            { return filepath.Join(l.opts.Dir, "kube") }
func port(ip string, p int) string        { return net.JoinHostPort(ip, strconv.Itoa(p)) }
func flag(name string, value any) string  { return fmt.Sprintf("--%s=%v", name, value) }
func exists(path string) bool             { _, err := os.Stat(path); return err == nil }

// newKube checks what can be checked before anything runs.
func newKube(ctx context.Context, l *Lab) (*Kube, error) {
	k := &Kube{lab: l, o: *l.opts.Kube, dir: l.kubeDir(), running: map[string]*daemon{}}
	if k.o.APIServers == 0 {
		k.o.APIServers = 1
	}
	if k.o.APIServers < 0 || k.o.APIServers > controlNodes {
		return nil, fault.New(fault.Usage, "give --apiservers 1, 2 or 3", "%d API servers do not fit on %d nodes", k.o.APIServers, controlNodes)
	}
	for _, n := range []int{k.o.Procs, k.o.MaxInFlight} {
		if n < 0 {
			return nil, fault.New(fault.Usage, "give 0 for the default, or a positive number", "%d cannot be meant", n)
		}
	}
	if err := k.find(); err != nil {
		return nil, err
	}
	if exists(l.seededNote()) && !exists(k.dir) {
		return nil, fault.New(fault.Usage, "give another folder", "%s holds the objects of a lab without an API server, which a real one would not take", l.opts.Dir)
	}
	addresses := append(k.Servers(), port(k.ip(), managerPort), port(k.ip(), schedulerPort))
	for _, a := range addresses {
		if err := free(ctx, a); err != nil {
			return nil, fault.New(fault.Failed, "stop what listens there, or choose other addresses with --net 127.0.1", "%s is taken: %w", a, err)
		}
	}
	return k, nil
}

// free returns nil if nobody listens on the address. Those of a lab that was
// killed take a moment to end with it.
func free(ctx context.Context, address string) error {
	for began := time.Now(); ; {
		l, err := net.Listen("tcp", address)
		if err == nil {
			return l.Close()
		}
		if time.Since(began) > 2*time.Second {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(kubePoll):
		}
	}
}

// find finds the binaries.
func (k *Kube) find() error {
	if k.o.Binaries == "" {
		k.o.Binaries = os.Getenv("HALLIGAN_KUBE")
	}
	if k.o.Binaries == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		k.o.Binaries = filepath.Join(filepath.Dir(self), "kube")
	}
	var err error
	if k.o.Binaries, err = filepath.Abs(k.o.Binaries); err != nil {
		return err
	}
	for _, name := range []string{"kube-apiserver", managerName, schedulerName, kubectlName, kwokName, stagesName} {
		if _, err := os.Stat(k.binary(name)); err != nil {
			return fault.New(fault.Failed, "build Kubernetes with make kube, once; a lab without --kube needs none of it",
				"there is no real control plane to run: %w", err)
		}
	}
	return nil
}

// start starts the API servers, and the rest as soon as it may.
func (k *Kube) start() error {
	for _, dir := range []string{k.dir, filepath.Dir(k.log(""))} {
		if err := durable.Dir(dir); err != nil {
			return err
		}
	}
	if err := k.issue(); err != nil {
		return err
	}
	if err := k.writeStages(); err != nil {
		return err
	}
	if err := durable.Write(k.file("audit-policy.yaml"), []byte(auditPolicy)); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", k.AdminKubeconfig())
	if err != nil {
		return err
	}
	config.QPS = -1 // flow control is the server's business
	config.Timeout = 10 * time.Second
	if k.client, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	for i := range k.o.APIServers {
		if err := k.launch(k.apiServer(i)); err != nil {
			return err
		}
	}
	return nil
}

// bringUp makes a cluster of what start has started, and returns when a
// Deployment's pods run in it.
func (k *Kube) bringUp(ctx context.Context) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, kubeReadyWithin)
	defer cancel()
	for i := range k.o.APIServers {
		if err := k.apiServerReady(ctx, i); err != nil {
			return err
		}
	}
	k.lab.say("kube-apiserver: ready on %s after %s", strings.Join(k.Servers(), ", "), since(began))
	began = time.Now()
	// Whoever held a lease in an earlier run died with that, and nobody needs to
	// wait for it to lapse.
	for _, name := range []string{managerName, schedulerName} {
		if err := k.succeed(ctx, name); err != nil {
			return err
		}
	}
	for _, p := range []part{k.controllerManager(), k.scheduler()} {
		if err := k.launch(p); err != nil {
			return err
		}
	}
	if err := k.populate(ctx); err != nil {
		return fmt.Errorf("making the cluster's objects: %w", err)
	}
	// It may do nothing before its role is there.
	if err := k.StartKwok(ctx); err != nil {
		return err
	}
	var g errgroup.Group
	g.Go(func() error { return k.leads(ctx, managerName, began) })
	g.Go(func() error { return k.leads(ctx, schedulerName, began) })
	g.Go(func() error { return k.nodesReady(ctx) })
	if err := g.Wait(); err != nil {
		return err
	}
	if err := k.workloadRuns(ctx); err != nil {
		return err
	}
	k.lab.say("kubernetes: controllers lead, nodes are ready, pods run after %s", since(began))
	return nil
}

// part is one process of the control plane.
type part struct {
	name string
	argv []string
	env  []string
	// impatient: it would wait up to a minute for open watches to end
	// (apiserver/pkg/server/secure_serving.go).
	impatient bool
}

func (k *Kube) apiServer(i int) part {
	c := k.lab.cluster
	name := apiServerName(i)
	argv := []string{k.binary("kube-apiserver"),
		flag("bind-address", k.lab.ip(i)), flag("secure-port", apiPort), flag("advertise-address", k.lab.ip(i)),
		// Each on the member of its own node, as stacked control planes are.
		flag("etcd-servers", "https://"+c.Endpoints()[i]), flag("etcd-cafile", c.CAFile()), flag("etcd-certfile", c.CertFile()), flag("etcd-keyfile", c.KeyFile()),
		flag("tls-cert-file", k.pki.serving[i].CertFile), flag("tls-private-key-file", k.pki.serving[i].KeyFile),
		flag("client-ca-file", k.pki.ca.CertFile()),
		flag("requestheader-client-ca-file", k.pki.frontProxyCA.CertFile()), flag("requestheader-allowed-names", frontProxyClient),
		flag("requestheader-username-headers", "X-Remote-User"), flag("requestheader-group-headers", "X-Remote-Group"),
		flag("requestheader-extra-headers-prefix", "X-Remote-Extra-"),
		flag("proxy-client-cert-file", k.pki.frontProxy.CertFile), flag("proxy-client-key-file", k.pki.frontProxy.KeyFile),
		flag("service-account-issuer", "https://kubernetes.default.svc"),
		flag("service-account-key-file", k.pki.accounts), flag("service-account-signing-key-file", k.pki.accounts),
		flag("authorization-mode", "Node,RBAC"), flag("allow-privileged", true),
		flag("service-cluster-ip-range", serviceRange),
		// A loopback address cannot be an endpoint of the Service kubernetes.
		flag("endpoint-reconciler-type", "none"),
		flag("profiling", false), flag("enable-priority-and-fairness", !k.o.NoFlowControl),
	}
	if n := k.o.MaxInFlight; n > 0 {
		argv = append(argv, flag("max-requests-inflight", n), flag("max-mutating-requests-inflight", max(1, n/2)))
	}
	if k.lab.encryption != "" {
		argv = append(argv, flag("encryption-provider-config", k.lab.encryption))
	}
	if k.o.Audit {
		argv = append(argv, flag("audit-policy-file", k.file("audit-policy.yaml")), flag("audit-log-path", k.log("audit-"+nodeName(i))),
			flag("audit-log-maxsize", 100), flag("audit-log-maxbackup", 1))
	}
	env := []string{"GOMEMLIMIT=3GiB"}
	if k.o.Procs > 0 {
		env = append(env, "GOMAXPROCS="+strconv.Itoa(k.o.Procs))
	}
	return part{name, argv, env, true}
}

func (k *Kube) controllerManager() part {
	return part{managerName, append(k.elected(managerName, managerPort),
		flag("use-service-account-credentials", true), flag("service-account-private-key-file", k.pki.accounts),
		flag("root-ca-file", k.pki.ca.CertFile()), flag("requestheader-client-ca-file", k.pki.frontProxyCA.CertFile()),
		// Nothing here asks for volumes or signed certificates, and no endpoint may
		// have a loopback address, which all pods have here.
		flag("controllers", "*,-endpoints-controller,-endpointslice-controller,-endpointslice-mirroring-controller,"+
			"-persistentvolume-attach-detach-controller,-persistentvolume-binder-controller,-persistentvolume-expander-controller,-persistentvolume-protection-controller,"+
			"-persistentvolumeclaim-protection-controller,-ephemeral-volume-controller,"+
			"-certificatesigningrequest-signing-controller,-certificatesigningrequest-approving-controller,-certificatesigningrequest-cleaner-controller"),
		// 15 s is the default; an autoscaler that fights shows sooner.
		flag("horizontal-pod-autoscaler-sync-period", "5s"),
		flag("kube-api-qps", 50), flag("kube-api-burst", 100)), []string{"GOMEMLIMIT=1GiB"}, false}
}

func (k *Kube) scheduler() part {
	return part{schedulerName, k.elected(schedulerName, schedulerPort), []string{"GOMEMLIMIT=512MiB"}, false}
}

// elected are the flags that the two elected parts share.
func (k *Kube) elected(name string, p int) []string {
	config := k.config(name)
	return []string{k.binary(name), flag("kubeconfig", config), flag("authentication-kubeconfig", config), flag("authorization-kubeconfig", config),
		flag("bind-address", k.ip()), flag("secure-port", p), flag("profiling", false), flag("leader-elect", true),
		flag("leader-elect-lease-duration", leaseTerm), flag("leader-elect-renew-deadline", leaseRenew), flag("leader-elect-retry-period", leaseRetry)}
}

func (k *Kube) kwok() part {
	return part{kwokName, []string{k.binary(kwokName), flag("kubeconfig", k.config(kwokName)), flag("config", k.file(stagesName)),
		flag("manage-all-nodes", true), flag("cidr", k.PodRange()), flag("node-ip", k.ip()),
		flag("node-lease-duration-seconds", 40)}, []string{"GOMEMLIMIT=512MiB"}, false}
}

// launch starts a part that does not run. It is started again however often it
// ends: in a storm the elected ones lose their leases.
func (k *Kube) launch(p part) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.running[p.name] != nil {
		return fmt.Errorf("%s runs already", p.name)
	}
	d := &daemon{name: p.name, log: k.log(p.name), argv: p.argv, progress: k.lab.opts.Progress, failed: k.lab.failed, forever: true, impatient: p.impatient,
		// A home of its own: nobody's configuration matters.
		env: append([]string{"HOME=" + k.dir}, p.env...)}
	if err := d.start(); err != nil {
		return err
	}
	k.running[p.name] = d
	return nil
}

// stop ends a part and returns when it is gone; one that does not run stays so.
func (k *Kube) stop(name string) error {
	k.mu.Lock()
	d := k.running[name]
	delete(k.running, name)
	k.mu.Unlock()
	if d == nil {
		return nil
	}
	return d.stop()
}

// close ends all parts.
func (k *Kube) close() error {
	k.mu.Lock()
	var names []string
	for name := range k.running {
		names = append(names, name)
	}
	k.mu.Unlock()
	var g errgroup.Group
	for _, name := range names {
		g.Go(func() error { return k.stop(name) })
	}
	return g.Wait()
}

// StopAPIServer kills the API server of node i, counted from 0, and returns when
// it is gone. It stays so until it is started.
func (k *Kube) StopAPIServer(i int) error { return k.stop(apiServerName(i)) }

// StartAPIServer starts it again and returns when it is ready.
func (k *Kube) StartAPIServer(ctx context.Context, i int) error {
	if err := k.launch(k.apiServer(i)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, kubeReadyWithin)
	defer cancel()
	return k.apiServerReady(ctx, i)
}

// StopControllerManager ends it, and its lease runs out.
func (k *Kube) StopControllerManager() error { return k.stop(managerName) }

// StartControllerManager starts it again and returns when it leads.
func (k *Kube) StartControllerManager(ctx context.Context) error {
	return k.startElected(ctx, k.controllerManager())
}

// StopScheduler ends it: new pods stay Pending.
func (k *Kube) StopScheduler() error { return k.stop(schedulerName) }

// StartScheduler starts it again and returns when it leads.
func (k *Kube) StartScheduler(ctx context.Context) error { return k.startElected(ctx, k.scheduler()) }

// succeed removes the lease of a holder that is dead.
func (k *Kube) succeed(ctx context.Context, name string) error {
	err := k.client.CoordinationV1().Leases(metav1.NamespaceSystem).Delete(ctx, name, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("removing the lease of %s: %w", name, err)
	}
	return nil
}

func (k *Kube) startElected(ctx context.Context, p part) error {
	ctx, cancel := context.WithTimeout(ctx, kubeReadyWithin)
	defer cancel()
	if err := k.succeed(ctx, p.name); err != nil {
		return err
	}
	began := time.Now()
	if err := k.launch(p); err != nil {
		return err
	}
	return k.leads(ctx, p.name, began)
}

// StopKwok ends what plays the kubelets: pods neither start nor end any more,
// and nodes turn NotReady after 40 s.
func (k *Kube) StopKwok() error { return k.stop(kwokName) }

// StartKwok starts it again. It leaves a node alone whose lease another kwok
// holds, so those of the one that was stopped are removed.
func (k *Kube) StartKwok(ctx context.Context) error {
	err := k.client.CoordinationV1().Leases(corev1.NamespaceNodeLease).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("removing the nodes' leases: %w", err)
	}
	return k.launch(k.kwok())
}

// until polls a condition of the cluster. It fails early where one of the parts
// that the condition waits for has ended at its start.
func (k *Kube) until(ctx context.Context, what string, parts []string, holds func(context.Context) error) error {
	for {
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		last := holds(try)
		cancel()
		if last == nil {
			return nil
		}
		for _, name := range parts {
			k.mu.Lock()
			d := k.running[name]
			k.mu.Unlock()
			if d == nil {
				return fmt.Errorf("%s was stopped", name)
			}
			select {
			case <-d.first:
				return fmt.Errorf("%s ended at its start; its log %s ends: %s", d.name, d.log, lastLine(d.log))
			default:
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w; the logs are in %s", what, last, filepath.Dir(k.log("")))
		case <-time.After(kubePoll):
		}
	}
}

func (k *Kube) apiServerReady(ctx context.Context, i int) error {
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
		&clientcmd.ClientConfigLoadingRules{ExplicitPath: k.AdminKubeconfig()}, &clientcmd.ConfigOverrides{CurrentContext: nodeName(i)}).ClientConfig()
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	return k.until(ctx, apiServerName(i)+" is not ready", []string{apiServerName(i)}, func(ctx context.Context) error {
		return client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
}

// leads waits until somebody holds the lease and renewed it since the time.
func (k *Kube) leads(ctx context.Context, name string, since time.Time) error {
	return k.until(ctx, name+" does not lead", []string{name}, func(ctx context.Context) error {
		lease, err := k.client.CoordinationV1().Leases(metav1.NamespaceSystem).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if h := lease.Spec.HolderIdentity; h == nil || *h == "" || lease.Spec.RenewTime == nil || !lease.Spec.RenewTime.After(since) {
			return errors.New("its lease is an old one")
		}
		return nil
	})
}

func (k *Kube) nodesReady(ctx context.Context) error {
	return k.until(ctx, "the nodes are not ready", []string{kwokName}, func(ctx context.Context) error {
		// From the watch cache.
		nodes, err := k.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{ResourceVersion: "0"})
		if err != nil {
			return err
		}
		for _, n := range nodes.Items {
			ready := false
			for _, c := range n.Status.Conditions {
				ready = ready || c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
			}
			if !ready {
				return fmt.Errorf("%s is not", n.Name)
			}
		}
		return nil
	})
}

// workloadRuns waits for the Deployment of shop that everybody looks at, as far
// as it is there and wants pods.
func (k *Kube) workloadRuns(ctx context.Context) error {
	return k.until(ctx, "no pods run", []string{managerName, schedulerName, kwokName}, func(ctx context.Context) error {
		d, err := k.client.AppsV1().Deployments("shop").Get(ctx, "web", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if *d.Spec.Replicas > 0 && k.lab.opts.Nodes > 0 && (d.Status.ObservedGeneration < d.Generation || d.Status.AvailableReplicas < *d.Spec.Replicas) {
			return fmt.Errorf("%d of %d pods of deployment shop/web", d.Status.AvailableReplicas, *d.Spec.Replicas)
		}
		return nil
	})
}

// world is what a small cluster runs: namespaces, rights, and a workload of each
// kind.
//
//go:embed world.yaml
var world []byte

// populate makes the nodes and the objects of a new cluster, through the API
// server, but for the runaway ConfigMaps: those have nothing that it would fill
// in, and the way through etcd is faster. What an earlier run made is left as it
// is.
func (k *Kube) populate(ctx context.Context) error {
	note := k.lab.seededNote()
	if exists(note) {
		k.lab.say("objects: %s has those of an earlier run", k.lab.opts.Dir)
		return nil
	}
	var g errgroup.Group
	g.SetLimit(4)
	for i := range k.lab.opts.Nodes {
		g.Go(func() error {
			name := fmt.Sprintf("worker-%03d", i+1)
			_, err := k.client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
				"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": runtime.GOARCH, "node-role.kubernetes.io/worker": "",
			}}}, metav1.CreateOptions{})
			if apierrors.IsAlreadyExists(err) {
				return nil
			}
			return err
		})
	}
	if err := k.apply(ctx, world); err != nil {
		return errors.Join(err, g.Wait())
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if n := k.lab.opts.Objects; n > 0 {
		if err := k.lab.seedRunaway(ctx, n); err != nil {
			return err
		}
	}
	data, err := json.Marshal(Seeded{Objects: k.lab.opts.Objects, Nodes: k.lab.opts.Nodes, Runaway: k.lab.opts.Objects})
	if err != nil {
		return err
	}
	return durable.Write(note, data)
}

// seedRunaway writes so many ConfigMaps of the offender.
func (l *Lab) seedRunaway(ctx context.Context, n int) error {
	began := time.Now()
	cli, err := l.cluster.Client()
	if err != nil {
		return err
	}
	defer cli.Close()
	w := seedWriter{cli: cli, catalogue: storage.NewCatalogue()}
	var batch []item
	p := &people{nodes: []string{"worker-001"}, going: true, emit: func(i item) bool {
		if batch = append(batch, i); len(batch) == seedOps {
			err, batch = w.write(ctx, batch), nil
		}
		return err == nil
	}}
	for i := range n {
		p.runaway(i)
	}
	if err != nil {
		return err
	}
	if err := w.write(ctx, batch); err != nil {
		return err
	}
	l.say("objects: %d ConfigMaps in %s after %s", n, offenderNamespace, since(began))
	return nil
}

// apply applies a manifest as the administrator.
func (k *Kube) apply(ctx context.Context, manifest []byte) error {
	argv := append(k.Kubectl(), "--kubeconfig", k.AdminKubeconfig(), "apply", "--server-side", "--force-conflicts", "-f", "-")
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin = bytes.NewReader(manifest)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := runChild(cmd); err != nil {
		return fmt.Errorf("kubectl apply: %w: %s", err, bytes.TrimSpace(out.Bytes()))
	}
	return nil
}

// auditPolicy keeps who asked for what, of each request one line.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
`
