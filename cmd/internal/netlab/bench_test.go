package netlab

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

const (
	coldRounds  = 40
	askRounds   = 5
	fleetNodes  = 1000
	stream      = 256 << 20 // bytes through a relay
	pourRounds  = 5
	people      = 10
	eachPerson  = 5 // relayed sessions, each over a connection of its own
	settle      = 2 * time.Second
	sinkAddress = "203.0.113.40"
	fleetPort   = 2223
	stockPort   = 22 // of the stock sshd beside the second bastion
)

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// timed runs a command to its end, started right in the responder's namespace.
func (w *world) timed(in io.Reader, argv []string) (took time.Duration, out string, usage *syscall.Rusage) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 2*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), w.environment()...)
	var said, complaint bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &said, &complaint
	err := w.inside("resp", func() error {
		began := time.Now()
		err := cmd.Run()
		took = time.Since(began)
		return err
	})
	if err != nil {
		w.t.Fatalf("%s: %v: %s%s", argv, err, said.String(), complaint.String())
	}
	return took, said.String(), cmd.ProcessState.SysUsage().(*syscall.Rusage)
}

func cpuOf(u *syscall.Rusage) time.Duration {
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkBastion measures the way through a bastion: a cold command beside stock
// ssh over the same two hops, and a bastion beside stock sshd as the jump host.
// Times count only beside the reference of the same run.
func BenchmarkBastion(b *testing.B) {
	w := newWorld(b, host("sink", sinkAddress))
	b.Run("ColdScale", w.coldScale)
	w.ip("cp-3", "addr", "add", sinkAddress+"/24", "dev", "in")
	w.startSSHD(b)
	b.Run("Throughput", w.throughput)
	b.Run("Memory", w.memory)
}

// coldScale: whole processes, ours with a mutation and its proof, stock ssh with
// a question. Bar: half of the reference.
func (w *world) coldScale(b *testing.B) {
	w.deployment("web")
	stock := []string{"ssh", "-F", w.file("ssh_config"), "-J", bastionAddress(0), "cp-1", "whoami"}
	var ours, reads, theirs []time.Duration
	for i := range coldRounds {
		took, _, _ := w.timed(nil, []string{w.bin + "/halligan", "--bastion", bastionNames[0], "--node", "cp-1", "scale", "deploy/web", "-n", "shop", "--to", strconv.Itoa(4 + i%2), "--yes"})
		ours = append(ours, took)
		took, _, _ = w.timed(nil, []string{w.bin + "/halligan", "--bastion", bastionNames[0], "--node", "cp-1", "whoami"})
		reads = append(reads, took)
		took, _, _ = w.timed(nil, stock)
		theirs = append(theirs, took)
	}
	o, q, r := median(ours), median(reads), median(theirs)
	p99 := func(d []time.Duration) float64 { return ms(d[len(d)*99/100]) }
	fmt.Printf("\ncold, through bastion and agent, %d each in turn, p50: halligan scale %.1f ms, ssh -J whoami %.1f ms: ratio %.2f, bar 0.50; halligan whoami %.1f ms: ratio %.2f; p99 %.1f, %.1f and %.1f ms\n",
		coldRounds, ms(o), ms(r), ms(o)/ms(r), ms(q), ms(q)/ms(r), p99(ours), p99(theirs), p99(reads))
	b.ReportMetric(ms(o)/ms(r), "ratio")
	b.ReportMetric(0, "ns/op")
}

// one is somebody of a crowd, who has a key and a certificate.
type one struct{ key, certified gossh.Signer }

// as is what they show at a jump host.
func (o one) as(j jump) gossh.Signer {
	if j.name == "sshd" {
		return o.key
	}
	return o.certified
}

// keys makes the crowd, and returns their keys.
func (w *world) keys() (public []gossh.PublicKey) {
	for i := range people {
		key, cert := w.fleet.Person(testfleet.Holder("person-"+strconv.Itoa(i), trust.Responder), testfleet.Now())
		w.crowd = append(w.crowd, one{key, must(gossh.NewCertSigner(cert, key))})
		public = append(public, key.PublicKey())
	}
	return public
}

// startSSHD starts OpenSSH's server beside the second bastion, with nothing but
// what a jump host needs.
func (w *world) startSSHD(b *testing.B) {
	b.Helper()
	sshd := "/usr/sbin/sshd"
	if _, err := os.Stat(sshd); err != nil {
		b.Skip("no sshd to compare with: install openssh-server")
	}
	// Where it wants to be locked up before a login.
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
		b.Fatal(err)
	}
	key := w.file(bastionNames[1] + ".bastion.hostkey")
	// It knows no certificates that name clusters, so people come with their keys.
	var known []byte
	for _, k := range append([]gossh.PublicKey{must(gossh.ParsePrivateKey(must(os.ReadFile(w.identity)))).PublicKey()}, w.keys()...) {
		known = append(known, gossh.MarshalAuthorizedKey(k)...)
	}
	w.write("authorized_keys", known)
	w.write("sshd_config", fmt.Appendf(nil, `ListenAddress %s:%d
HostKey %s
HostCertificate %s-cert.pub
AuthorizedKeysFile %s
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowAgentForwarding no
X11Forwarding no
PidFile none
UseDNS no
MaxStartups 100
`, bastionAddress(1), stockPort, key, key, w.file("authorized_keys")))
	w.sshd = w.daemon(bastionNames[1], "sshd", sshd, "-D", "-e", "-f", w.file("sshd_config"))
	w.opens("resp", bastionAddress(1), stockPort)
}

// jumps are the two ways, by name: what stock ssh is told, and its user.
func (w *world) jumps() (all []jump) {
	return []jump{{"halligan-bastion", bastionAddress(0), sshPort, "responder", bastionNames[0]}, {"sshd", bastionAddress(1), stockPort, "root", bastionNames[1]}}
}

type jump struct {
	name, address string
	port          int
	user, bastion string
}

// throughput: stock ssh pours bytes through either.
func (w *world) throughput(b *testing.B) {
	var got atomic.Int64
	l := w.listen("cp-3", fmt.Sprintf("%s:%d", sinkAddress, sshPort))
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				n, _ := io.Copy(io.Discard, c)
				got.Add(n)
				c.Close()
			}()
		}
	}()
	rates, used := map[string][]time.Duration{}, map[string]time.Duration{}
	for range pourRounds {
		for _, j := range w.jumps() {
			got.Store(0)
			pid := w.bastions[0].cmd.Process.Pid
			if j.name == "sshd" {
				pid = w.sshd.cmd.Process.Pid
			}
			before := cpu(b, pid)
			took, _, _ := w.timed(io.LimitReader(zeros{}, stream), []string{"ssh", "-F", w.file("ssh_config"), "-p", strconv.Itoa(j.port), "-l", j.user, "-c", "aes128-gcm@openssh.com",
				"-W", fmt.Sprintf("%s:%d", sinkAddress, sshPort), j.address})
			eventually(b, "all has arrived", func() bool { return got.Load() == stream })
			rates[j.name] = append(rates[j.name], took)
			used[j.name] += cpu(b, pid) - before
		}
	}
	o, r := median(rates["halligan-bastion"]), median(rates["sshd"])
	rate := func(d time.Duration) float64 { return float64(stream) / (1 << 20) / d.Seconds() }
	fmt.Printf("\nrelay of %d MiB from stock ssh, median of %d: halligan-bastion %.0f MiB/s, sshd %.0f MiB/s: ratio of the rates %.2f, no bar; halligan-bastion's CPU %.2f s per GiB\n",
		stream>>20, pourRounds, rate(o), rate(r), rate(o)/rate(r), used["halligan-bastion"].Seconds()/(float64(pourRounds)*stream/(1<<30)))
	b.ReportMetric(rate(o)/rate(r), "ratio")
	b.ReportMetric(0, "ns/op")
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// memory: sessions that are relayed and idle, each of an engineer's own ssh.
func (w *world) memory(b *testing.B) {
	l := w.listen("cp-3", fmt.Sprintf("%s:%d", sinkAddress, sshPort))
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			_, _ = c.Write([]byte("here\n"))
		}
	}()
	each := map[string]float64{}
	for _, j := range w.jumps() {
		pid := w.bastions[0].cmd.Process.Pid
		if j.name == "sshd" {
			pid = w.sshd.cmd.Process.Pid
		}
		time.Sleep(settle)
		before := anonymous(b, pid)
		var open []io.Closer
		for i := range people * eachPerson {
			raw := must(w.dial("resp", fmt.Sprintf("%s:%d", j.address, j.port)))
			conn, channels, requests, err := gossh.NewClientConn(raw, j.bastion+".bastion:22", &gossh.ClientConfig{User: j.user, Auth: []gossh.AuthMethod{gossh.PublicKeys(w.crowd[i%people].as(j))},
				HostKeyCallback: gossh.InsecureIgnoreHostKey()}) // #nosec G106 -- measured, not trusted
			if err != nil {
				b.Fatalf("%s: %v", j.name, err)
			}
			client := gossh.NewClient(conn, channels, requests)
			open = append(open, client)
			c, err := client.Dial("tcp", fmt.Sprintf("%s:%d", sinkAddress, sshPort))
			if err != nil {
				b.Fatalf("%s: %v", j.name, err)
			}
			if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
				b.Fatalf("%s: %v", j.name, err)
			}
		}
		time.Sleep(settle)
		each[j.name] = (anonymous(b, pid) - before) / float64(len(open))
		for _, c := range open {
			c.Close()
		}
	}
	o, r := each["halligan-bastion"], each["sshd"]
	fmt.Printf("\n%d idle relayed sessions: %.0f KiB anonymous memory each in halligan-bastion, %.0f KiB in sshd's processes: ratio %.2f, no bar\n", people*eachPerson, o, r, o/r)
	b.ReportMetric(o/r, "ratio")
	b.ReportMetric(0, "ns/op")
}

// family returns a process and those below it.
func family(pid int) (all []int) {
	parents := map[int][]int{}
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(text), ") ") // proc_pid_stat(5)
		fields := strings.Fields(rest)
		child, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if len(fields) > 1 {
			parent, _ := strconv.Atoi(fields[1])
			parents[parent] = append(parents[parent], child)
		}
	}
	all = []int{pid}
	for i := 0; i < len(all); i++ {
		all = append(all, parents[all[i]]...)
	}
	return all
}

// anonymous returns the memory of a process and those below it that they share
// with nobody, in KiB. The bastion's store, which holds nothing of relayed
// sessions but a line each, counts too.
func anonymous(b *testing.B, pid int) (kib float64) {
	b.Helper()
	for _, p := range family(pid) {
		// What children share with their parents since the fork counts once.
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "Pss_Anon:" {
				n, err := strconv.ParseFloat(f[1], 64)
				if err != nil {
					b.Fatal(err)
				}
				kib += n
			}
		}
	}
	return kib
}

// cpu returns how long a process has run.
func cpu(b *testing.B, pid int) time.Duration {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	// utime and stime are the fields 12 and 13 behind the name, in ticks of 10 ms
	// (proc_pid_stat(5)).
	_, rest, _ := strings.Cut(string(text), ") ")
	var sum time.Duration
	for _, field := range strings.Fields(rest)[11:13] {
		n, err := strconv.Atoi(field)
		if err != nil {
			b.Fatal(err)
		}
		sum += time.Duration(n) * 10 * time.Millisecond
	}
	return sum
}

// BenchmarkFleet asks 1,000 nodes for their status through one bastion. They are
// played by this process, on the machine of the bastion and the responder: each
// has its own address, name and host certificate, and does nothing.
func BenchmarkFleet(b *testing.B) {
	var more []bundle.Host
	for i := range fleetNodes {
		h := host(fmt.Sprintf("n-%04d", i), fleetAddress(i))
		h.SSHPort = fleetPort
		more = append(more, h)
	}
	w := newWorld(b, more...)
	w.playNodes(b)
	for _, bastion := range bastionNames {
		w.ip(bastion, "route", "add", "10.9.0.0/16", "via", nodeAddress(0))
	}
	var took, own, relaying, playing []time.Duration
	for range askRounds {
		pid := w.bastions[0].cmd.Process.Pid
		before, self := cpu(b, pid), cpu(b, os.Getpid())
		t, out, usage := w.timed(nil, []string{w.bin + "/halligan", "--bastion", bastionNames[0], "--cluster", testfleet.Cluster, "status"})
		if n := strings.Count(out, "leader "); n < fleetNodes {
			b.Fatalf("%d nodes are well: %.2000s", n, out)
		}
		took, own = append(took, t), append(own, cpuOf(usage))
		relaying, playing = append(relaying, cpu(b, pid)-before), append(playing, cpu(b, os.Getpid())-self)
	}
	t := median(took)
	fmt.Printf("\nstatus of %d nodes through one bastion, median of %d: %.2f s, bar 2.00; of CPU, the command took %.2f s, the bastion %.2f s, and the nodes, which share its cores here, %.2f s\n",
		fleetNodes, askRounds, t.Seconds(), median(own).Seconds(), median(relaying).Seconds(), median(playing).Seconds())
	b.ReportMetric(t.Seconds(), "s")
	b.ReportMetric(0, "ns/op")
}

func fleetAddress(i int) string { return fmt.Sprintf("10.9.%d.%d", i/250, 1+i%250) }

// playNodes plays agents at all of their addresses.
func (w *world) playNodes(b *testing.B) {
	b.Helper()
	w.ip("cp-1", "route", "add", "local", "10.9.0.0/16", "dev", "lo")
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	key := must(gossh.NewSignerFromKey(private))
	configs := map[string]*gossh.ServerConfig{}
	for i := range fleetNodes {
		c := &gossh.ServerConfig{PublicKeyCallback: func(gossh.ConnMetadata, gossh.PublicKey) (*gossh.Permissions, error) { return nil, nil }}
		cert := must(w.fleet.Host.Host(key.PublicKey(), fmt.Sprintf("n-%04d.%s", i, testfleet.Cluster), uint64(1000+i), testfleet.Now()))
		c.AddHostKey(must(gossh.NewCertSigner(cert, key)))
		configs[fleetAddress(i)] = c
	}
	// Every address of the network is this machine's; the agent's port is taken.
	l := w.listen("cp-1", fmt.Sprintf("0.0.0.0:%d", fleetPort))
	file := must(bundle.Parse(w.fleet.Bundle()))
	server := grpc.NewServer()
	halliganv1.RegisterAgentServer(server, played{bundle: &halliganv1.BundleStatus{PolicyVersion: file.Policy.Version, InventoryVersion: file.Inventory.Version, RevocationsVersion: file.Revocations.Version}})
	b.Cleanup(server.Stop)
	calls := &queue{conns: make(chan net.Conn), closed: make(chan struct{})}
	go func() { _ = server.Serve(calls) }()
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			go play(raw, configs[raw.LocalAddr().(*net.TCPAddr).IP.String()], calls)
		}
	}()
}

// play serves one connection.
func play(raw net.Conn, config *gossh.ServerConfig, calls *queue) {
	defer raw.Close()
	if config == nil {
		return
	}
	_, channels, requests, err := gossh.NewServerConn(raw, config)
	if err != nil {
		return
	}
	go gossh.DiscardRequests(requests)
	for c := range channels {
		channel, requests, err := c.Accept()
		if err != nil {
			return
		}
		go func() {
			for r := range requests {
				_ = r.Reply(r.Type == "subsystem", nil)
				if r.Type == "subsystem" {
					calls.conns <- inner{channel, raw}
				}
			}
		}()
	}
}

// inner is a channel as a connection.
type inner struct {
	gossh.Channel
	net.Conn
}

func (i inner) Read(p []byte) (int, error)  { return i.Channel.Read(p) }
func (i inner) Write(p []byte) (int, error) { return i.Channel.Write(p) }
func (i inner) Close() error                { return i.Channel.Close() }

// queue hands connections to a server.
type queue struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.closed:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error {
	q.once.Do(func() { close(q.closed) })
	return nil
}

func (q *queue) Addr() net.Addr { return &net.TCPAddr{} }

// played answers for its status as a healthy agent does.
type played struct {
	halliganv1.UnimplementedAgentServer
	bundle *halliganv1.BundleStatus
}

// Status says that all is well.
func (p played) Status(context.Context, *halliganv1.StatusRequest) (*halliganv1.StatusResponse, error) {
	return &halliganv1.StatusResponse{Node: "played", Version: "devel", Time: timestamppb.Now(), Cluster: testfleet.Cluster, Door: "ssh", Bundle: p.bundle,
		Etcd: &halliganv1.EtcdStatus{Endpoint: "127.0.0.1:2379", Version: "3.6.0", MemberId: "1", LeaderId: "1", Quorum: true}}, nil
}
