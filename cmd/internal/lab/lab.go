// Package lab runs a control plane's worth of processes on loopback addresses,
// for demonstrations and tests: three etcd members with TLS, one agent for each,
// two bastions, and, if asked for, a real Kubernetes control plane on them. Everything it
// knows lies in one folder, and nothing of it outlives the process.
//
// It must never listen on anything but loopback, never touch a folder that is
// not a lab's, and never leave a process behind, however it ends. It stands on
// floor 5.
package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/fault"
)

// Ports and host numbers of a lab: the ones that a stacked control plane has.
const (
	clientPort   = 2379
	peerPort     = 2380
	apiPort      = 6443
	controlNodes = 3
	firstHost    = 11 // cp-1 is NET.11
	bastionHosts = 2
	firstBastion = 21 // bastion-a is NET.21
)

// DefaultNet is the part of the addresses that all nodes share.
const DefaultNet = "127.0.0"

// Options says what lab to run.
type Options struct {
	// Dir is the lab's folder. It is made, or an empty one or that of an earlier
	// lab is taken. A demo makes its own in there, or in the system's folder for
	// temporary files, and removes it.
	Dir string
	// Net is the first three numbers of the nodes' addresses, such as 127.0.0;
	// labs with different ones do not collide.
	Net string
	// Objects is about how many Kubernetes objects are seeded into an empty
	// etcd; 0: none.
	Objects int
	// Nodes is how many Node objects, besides the three of the control plane, the
	// seeded cluster has.
	Nodes int
	// QuotaBytes is what each etcd member may hold before it raises NOSPACE; 0: what
	// the objects need, at least 2 GiB.
	QuotaBytes int64
	// Kube has a real Kubernetes control plane run on the lab's etcd. Then Nodes
	// simulated nodes carry real workloads, and Objects is how many runaway
	// ConfigMaps there are besides.
	Kube *KubeOptions
	// Agent is the command line of an agent, to which --config FILE is added;
	// default: halligan-agent beside this process's executable.
	Agent []string
	// Bastion is the command line of a bastion, as Agent is of an agent; default:
	// halligan-bastion beside this process's executable.
	Bastion []string
	// Halligan is the command line of the tool that a demo drives; default:
	// halligan beside this process's executable.
	Halligan []string
	// Report is the file for the page that tells a demo's story from its evidence;
	// empty: none is written.
	Report string
	// Progress takes lines for people.
	Progress io.Writer
}

// Lab is a running lab.
type Lab struct {
	opts    Options
	lock    *os.File
	cluster *etcdcluster.Cluster
	// encryption is the file of the EncryptionConfiguration, if there is any.
	encryption string
	kube       *Kube // nil without a real control plane
	agents     []*daemon
	bastions   []*daemon
	failed     chan error // first daemon that cannot be kept up
}

// Up starts a lab and returns when every agent answers and sees a leader. On an
// error everything is stopped again.
func Up(ctx context.Context, o Options) (_ *Lab, err error) {
	if o.Net == "" {
		o.Net = DefaultNet
	}
	if ip := net.ParseIP(o.Net + ".1"); ip == nil || !ip.IsLoopback() {
		return nil, fault.New(fault.Usage, "give three numbers such as 127.0.1", "%q is not the beginning of loopback addresses", o.Net)
	}
	if o.Objects < 0 || o.Nodes < 0 || o.QuotaBytes < 0 {
		return nil, fault.New(fault.Usage, "give 0 or more", "%d objects, %d nodes and a quota of %d bytes cannot be", o.Objects, o.Nodes, o.QuotaBytes)
	}
	o.QuotaBytes = cmp.Or(o.QuotaBytes, quota(o.Objects))
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	if len(o.Agent) == 0 {
		if o.Agent, err = beside("halligan-agent"); err != nil {
			return nil, err
		}
	}
	if len(o.Bastion) == 0 {
		if o.Bastion, err = beside("halligan-bastion"); err != nil {
			return nil, err
		}
	}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return nil, err
	}
	l := &Lab{opts: o, failed: make(chan error, controlNodes+bastionHosts)}
	_, missing := os.Lstat(o.Dir)
	if l.lock, err = claim(o.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if err == nil {
			return
		}
		// What came no further than this has nothing to look at later.
		if l.cluster == nil && errors.Is(missing, fs.ErrNotExist) {
			os.RemoveAll(o.Dir)
		}
		l.Close()
		err = interrupted(ctx, err)
	}()
	// sun_path of a Unix socket holds 108 bytes, a zero among them (unix(7)).
	if s := l.Socket(0); len(s) > 107 {
		return nil, fault.New(fault.Usage, "choose a folder with a shorter name", "%s is too long for a socket's name", s)
	}
	if o.Kube != nil {
		if l.kube, err = newKube(ctx, l); err != nil {
			return nil, err
		}
	}

	if err := hasRoom(&o); err != nil {
		return nil, err
	}
	if err := l.sameNet(); err != nil {
		return nil, err
	}
	// Nobody is to take those of an earlier run for this one's.
	for _, name := range envFiles {
		if err := os.Remove(filepath.Join(o.Dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}

	began := time.Now()
	members := make([]etcdcluster.Member, controlNodes)
	for i := range members {
		members[i] = etcdcluster.Member{Name: nodeName(i), IP: l.ip(i), ClientPort: clientPort, PeerPort: peerPort}
	}
	l.cluster, err = etcdcluster.Start(ctx, etcdcluster.Options{Dir: filepath.Join(o.Dir, "etcd"), Members: members, QuotaBytes: o.QuotaBytes})
	if err != nil {
		if errors.Is(err, syscall.EADDRINUSE) {
			return nil, fault.New(fault.Failed, "stop the other lab, or choose other addresses with --net 127.0.1", "%s", strings.SplitN(err.Error(), ";", 2)[0])
		}
		return nil, err
	}
	l.say("etcd: three members on %s after %s", strings.Join(l.cluster.Endpoints(), ", "), since(began))
	if err := l.writeEncryption(); err != nil {
		return nil, err
	}
	if l.kube != nil {
		if err := l.kube.start(); err != nil {
			return nil, fmt.Errorf("starting kubernetes: %w", err)
		}
	} else if err := l.seed(ctx); err != nil {
		return nil, fmt.Errorf("seeding: %w", err)
	}
	began = time.Now()
	if err := l.makeTrust(); err != nil {
		return nil, fmt.Errorf("making keys and certificates: %w", err)
	}
	if err := l.startDaemons(ctx); err != nil {
		return nil, err
	}
	l.say("agents: %d answer on their consoles, and %d bastions let people in, after %s", len(l.agents), len(l.bastions), since(began))
	if l.kube != nil {
		if err := l.kube.bringUp(ctx); err != nil {
			return nil, err
		}
	}
	return l, l.writeEnv()
}

// Wait returns nil when the context ends, or the error of the first part of the
// lab that could not be kept running.
func (l *Lab) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-l.failed:
		return err
	}
}

// Close stops everything and gives the folder free. It is safe to call again.
func (l *Lab) Close() error {
	var g errgroup.Group
	for _, d := range append(l.agents, l.bastions...) {
		g.Go(d.stop)
	}
	if l.kube != nil {
		g.Go(l.kube.close)
	}
	err := g.Wait()
	l.agents, l.bastions = nil, nil
	if l.cluster != nil {
		err = errors.Join(err, l.cluster.Close())
		l.cluster = nil
	}
	if l.lock != nil {
		err = errors.Join(err, l.lock.Close())
		l.lock = nil
	}
	return err
}

// Cluster is the lab's etcd, for looking at it without an agent.
func (l *Lab) Cluster() *etcdcluster.Cluster { return l.cluster }

// Socket is the console of the agent on node i, counted from 0.
func (l *Lab) Socket(i int) string { return filepath.Join(l.opts.Dir, nodeName(i), "console.sock") }

// API is where node i's API server would listen.
func (l *Lab) API(i int) string { return net.JoinHostPort(l.ip(i), strconv.Itoa(apiPort)) }

func (l *Lab) ip(i int) string { return l.opts.Net + "." + strconv.Itoa(firstHost+i) }

func nodeName(i int) string { return "cp-" + strconv.Itoa(i+1) }

func (l *Lab) bastionIP(i int) string { return l.opts.Net + "." + strconv.Itoa(firstBastion+i) }

func bastionName(i int) string { return "bastion-" + string(rune('a'+i)) }

func (l *Lab) say(format string, args ...any) { fmt.Fprintf(l.opts.Progress, format+"\n", args...) }

func since(t time.Time) time.Duration { return time.Since(t).Round(10 * time.Millisecond) }

// claim makes the folder and takes its lock, which the kernel gives back when
// the process ends in whatever way. It refuses a folder with other things in it.
func claim(dir string) (*os.File, error) {
	lock := filepath.Join(dir, "lock")
	if err := own(dir); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err == nil {
		if _, lerr := os.Lstat(lock); lerr != nil && len(entries) > 0 {
			return nil, fault.New(fault.Usage, "give a folder that is new, empty or an earlier lab's", "%s holds things that are not a lab's", dir)
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			return nil, err
		}
	} else if err := durable.Dir(dir); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(lock, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 32))
		f.Close()
		return nil, fault.New(fault.Failed, "stop it, or give another folder", "a lab runs in %s (process %s)", dir, strings.TrimSpace(string(pid)))
	}
	if err := f.Truncate(0); err != nil {
		f.Close()
		return nil, err
	}
	if _, err := fmt.Fprintln(f, os.Getpid()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// envFiles are what a shell sources, once the lab is ready.
var envFiles = []string{"env", "env.console"}

// writeEnv writes them.
func (l *Lab) writeEnv() error {
	c := l.cluster
	endpoints := make([]string, c.Len())
	for i, e := range c.Endpoints() {
		endpoints[i] = "https://" + e
	}
	env := []string{
		"HALLIGAN_BUNDLE", l.file("bundle"),
		"HALLIGAN_IDENTITY", l.file("ids", "responder"),
		"ETCDCTL_ENDPOINTS", strings.Join(endpoints, ","),
		"ETCDCTL_CACERT", c.CAFile(),
		"ETCDCTL_CERT", c.CertFile(),
		"ETCDCTL_KEY", c.KeyFile(),
	}
	if l.kube != nil {
		env = append(env, "KUBECONFIG", l.kube.UserKubeconfig(), "KUBECONFIG_ADMIN", l.kube.AdminKubeconfig())
	}
	if err := durable.Write(filepath.Join(l.opts.Dir, envFiles[0]), exports(env...)); err != nil {
		return err
	}
	return durable.Write(filepath.Join(l.opts.Dir, envFiles[1]), exports("HALLIGAN_SOCKET", l.Socket(0)))
}

// exports writes name, value, name, value ... as lines for a POSIX shell.
func exports(pairs ...string) []byte {
	var b strings.Builder
	for i := 0; i < len(pairs); i += 2 {
		fmt.Fprintf(&b, "export %s='%s'\n", pairs[i], strings.ReplaceAll(pairs[i+1], "'", `'\''`))
	}
	return []byte(b.String())
}

// logs are where what runs on a node logs. All are named, so that an agent reads
// none of the machine's own.
func (l *Lab) logs(i int) map[string][]string {
	kube := func(name string) []string { return []string{filepath.Join(l.opts.Dir, "log", name+".log")} }
	own := map[string][]string{
		"etcd":      {filepath.Join(l.opts.Dir, "etcd", nodeName(i)+".log")},
		"apiserver": kube(apiServerName(i)),
		"kubelet":   kube("kubelet-" + nodeName(i)), // kwok's nodes have none
	}
	for component, name := range map[string]string{"controller-manager": managerName, "scheduler": schedulerName} {
		if i > 0 { // they run on the first
			name += "-" + nodeName(i)
		}
		own[component] = kube(name)
	}
	return own
}

// agentConfig is the part of an agent's configuration that a lab writes.
func (l *Lab) agentConfig(i int) ([]byte, error) {
	c := l.cluster
	dir := filepath.Join(l.opts.Dir, nodeName(i))
	config := map[string]any{
		"node":     nodeName(i),
		"stateDir": filepath.Join(dir, "state"),
		"socket":   l.Socket(i),
		"logLevel": "info",
		"etcd": map[string]any{
			"endpoints": []string{c.Endpoints()[i]},
			"caFile":    c.CAFile(),
			"certFile":  c.CertFile(),
			"keyFile":   c.KeyFile(),
		},
		"logs": l.logs(i),
	}
	if l.encryption != "" {
		config["encryptionConfig"] = l.encryption
	}
	if l.kube != nil && i < l.kube.o.APIServers {
		config["localAPI"] = map[string]any{"kubeconfig": l.kube.AdminKubeconfig(), "endpoint": l.API(i), "serverName": l.ip(i)}
	}
	doors, err := l.trustConfig(i)
	if err != nil {
		return nil, err
	}
	maps.Copy(config, doors)
	return yaml.Marshal(config)
}

// startDaemons starts the agents and the bastions.
func (l *Lab) startDaemons(ctx context.Context) error {
	var g errgroup.Group
	for i := range controlNodes {
		config, err := l.agentConfig(i)
		if err != nil {
			return err
		}
		d, err := l.startDaemon("agent", nodeName(i), l.opts.Agent, config)
		if err != nil {
			return err
		}
		l.agents = append(l.agents, d)
		g.Go(func() error { return d.ready(ctx, l.Socket(i)) })
	}
	for i := range bastionHosts {
		config, err := l.bastionConfig(i)
		if err != nil {
			return err
		}
		d, err := l.startDaemon("bastion", bastionName(i), l.opts.Bastion, config)
		if err != nil {
			return err
		}
		l.bastions = append(l.bastions, d)
		g.Go(func() error { return d.open(ctx, "http://"+l.bastionIP(i)+":"+strconv.Itoa(metricsPort)+"/readyz") })
	}
	return g.Wait()
}

// startDaemon starts an agent or a bastion in a folder of its own.
func (l *Lab) startDaemon(what, name string, command []string, config []byte) (*daemon, error) {
	dir := l.file(name)
	if err := durable.Dir(dir); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, what+".yaml")
	if err := durable.Write(file, config); err != nil {
		return nil, err
	}
	argv := append(append([]string(nil), command...), "--config", file)
	d := &daemon{name: what + " " + name, log: filepath.Join(dir, what+".log"), argv: argv, progress: l.opts.Progress, failed: l.failed}
	return d, d.start()
}

// beside finds one of our programs next to this process's executable, where the
// build puts them all.
func beside(name string) ([]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(filepath.Dir(self), name)
	if _, err := os.Stat(path); err != nil {
		return nil, fault.New(fault.Failed, "build it with make build", "%s is missing: %w", path, err)
	}
	return []string{path}, nil
}

// quota leaves room for the objects; at least etcd's own default of 2 GiB.
func quota(objects int) int64 { return max(2<<30, int64(objects)*objectRoom) }
