package diagnose

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	kjson "sigs.k8s.io/json"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
)

var connectionsRow = Row{
	Name: "connections", Title: "connections to this node's API server, by who is at the other end", Unit: "connections",
	Timeout: 30 * time.Second, Memory: "100 bytes for each of at most 100,000 peers",
	Blind: []string{
		"how many requests a connection carries: HTTP/2 sends hundreds over one",
		"pods on the host network share their node's address with its kubelet: they count as the node",
		"connections to the API servers of other nodes, and who is behind a load balancer or a gateway that hides addresses",
	},
	look: lookAtConnections,
}

// socket is one established connection.
type socket struct{ peer netip.Addr }

// maxPeers bounds the addresses that are told apart.
const maxPeers = 100_000

// peer is one address at the other end.
type peer struct {
	connections int
	pod         *podAt
	node        string
	shared      []string // host-network workloads that share the node's address
}

// podAt is who has an address.
type podAt struct {
	namespace, name, account string
	owner                    ownerRef
	several                  bool // more than one pod says that it has it
}

func lookAtConnections(ctx context.Context, s *scene) (*finding, error) {
	peers := map[netip.Addr]*peer{}
	over := 0
	served, err := s.d.sockets(ctx, s.d.o.APIPort, func(c socket) {
		p := peers[c.peer]
		switch {
		case p == nil && len(peers) >= maxPeers:
			over++
			return
		case p == nil:
			p = &peer{}
			peers[c.peer] = p
		}
		p.connections++
	})
	if err != nil {
		return nil, err
	}
	f := &finding{}
	if !served {
		f.blind = append(f.blind, fmt.Sprintf("nobody listens on port %d of this node: its API server is down, or has another port", s.d.o.APIPort))
	}
	if over > 0 {
		f.blind = append(f.blind, fmt.Sprintf("whose %d connections beyond %d addresses are", over, maxPeers))
	}
	if err := s.join(ctx, peers); err != nil {
		f.blind = append(f.blind, "which pods and nodes have these addresses, but for what was read before: "+err.Error())
	}
	type group struct {
		row      *halliganv1.FindingRow
		workload workload
		peers    int
		some     []string
		kind     string
	}
	groups := map[string]*group{}
	own := 0.0
	order := slices.SortedFunc(maps.Keys(peers), func(a, b netip.Addr) int {
		return cmp.Or(cmp.Compare(peers[b].connections, peers[a].connections), a.Compare(b))
	})
	for _, addr := range order {
		p := peers[addr]
		f.total += float64(p.connections)
		g := &group{row: &halliganv1.FindingRow{}, kind: "address"}
		id := "unknown"
		switch {
		case p.pod != nil && p.pod.several:
			id, g.kind = "several", "pod address"
			g.row.Detail = "claimed by more than one pod"
		case p.pod != nil:
			g.kind = "pod"
			g.row.Namespace = p.pod.namespace
			g.workload = s.root(ctx, p.pod.namespace, p.pod.owner)
			if g.workload.kind == nil {
				g.workload = workload{kind: s.kinds(ctx).ByGroupKind("", "Pod"), namespace: p.pod.namespace, name: p.pod.name}
			}
			g.workload.account = p.pod.account
			g.row.Owner = g.workload.String()
			id = "pod/" + p.pod.namespace + "/" + g.row.Owner + "/" + p.pod.account
		case p.node != "":
			g.kind = "node"
			slices.Sort(p.shared)
			if p.shared = slices.Compact(p.shared); len(p.shared) > 0 {
				g.row.Detail = "shared with " + strings.Join(p.shared[:min(len(p.shared), 3)], ", ")
			}
			id = "node/" + g.row.Detail
		case addr.IsLoopback():
			own += float64(p.connections)
			id, g.kind = "loopback", "loopback address"
			g.row.Detail = "this node itself"
		}
		if groups[id] == nil {
			groups[id] = g
		}
		g = groups[id]
		g.row.Value += float64(p.connections)
		g.peers++
		g.some = append(g.some, cmp.Or(p.node, addr.String()))
	}
	for _, g := range groups {
		some := strings.Join(g.some[:min(len(g.some), 3)], ", ")
		if len(g.some) > 3 {
			some += ", ..."
		}
		g.row.Subject = counted(g.peers, g.kind)
		g.row.Detail = strings.TrimSuffix(some+"; "+g.row.Detail, "; ")
		f.rows = append(f.rows, g.row)
		if g.workload.kind != nil {
			share := g.row.Value / (f.total - own) // the control plane's own are no storm
			f.leads = append(f.leads, lead{workload: g.workload, user: g.workload.user(), weight: 0.6 * share * min(1, g.row.Value/20),
				evidence: fmt.Sprintf("%s to the API server from %s, %s of all", counted(int(g.row.Value), "connection"), counted(g.peers, "pod"), percent(g.row.Value, f.total))})
		}
	}
	slices.SortFunc(f.rows, func(a, b *halliganv1.FindingRow) int {
		return cmp.Or(cmp.Compare(b.Value, a.Value), strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Owner, b.Owner), strings.Compare(a.Detail, b.Detail))
	})
	return f, nil
}

func counted(n int, what string) string {
	switch {
	case n == 1:
		return "1 " + what
	case strings.HasSuffix(what, "s"):
		what += "e"
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// join finds the pods and nodes of the peers' addresses.
func (s *scene) join(ctx context.Context, peers map[netip.Addr]*peer) error {
	if len(peers) == 0 {
		return nil
	}
	at := func(text string) *peer {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return nil
		}
		return peers[addr.Unmap().WithZone("")]
	}
	err := walk(ctx, s, "Node", func(n *corev1.Node) {
		for _, a := range n.Status.Addresses {
			if p := at(a.Address); p != nil && (a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP) {
				p.node = n.Name
			}
		}
	})
	if err != nil {
		return err
	}
	return walk(ctx, s, "Pod", func(pod *corev1.Pod) {
		if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
			return // its address may be another's by now
		}
		owner := controllerOf(&pod.ObjectMeta)
		if pod.Spec.HostNetwork {
			if p := at(pod.Status.HostIP); p != nil && len(p.shared) < 100 {
				p.shared = append(p.shared, pod.Namespace+"/"+cmp.Or(owner.name, pod.Name))
			}
			return
		}
		texts := []string{pod.Status.PodIP}
		for _, ip := range pod.Status.PodIPs {
			texts = append(texts, ip.IP)
		}
		for _, text := range texts {
			p := at(text)
			if p == nil {
				continue
			}
			if p.pod != nil && (p.pod.namespace != pod.Namespace || p.pod.name != pod.Name) {
				p.pod.several = true
				continue
			}
			p.pod = &podAt{namespace: pod.Namespace, name: pod.Name, account: cmp.Or(pod.Spec.ServiceAccountName, "default"), owner: owner}
		}
	})
}

// typed is what the generated types of k8s.io/api are.
type typed[T any] interface {
	*T
	Unmarshal([]byte) error
}

// walk calls fn for every object of a core kind that is what its key says.
func walk[T any, P typed[T]](ctx context.Context, s *scene, kind string, fn func(P)) error {
	k := s.kinds(ctx).ByGroupKind("", kind)
	at := k.Range(s.d.o.Prefix, "")
	_, err := s.d.o.Etcd.Walk(ctx, at, func(kv etcd.KV) error {
		ns, name := "", strings.TrimPrefix(kv.Key, at)
		if k.Namespaced {
			ns, name, _ = strings.Cut(name, "/")
		}
		plain, err := s.d.o.Encryption.Open(ctx, k, kv.Key, kv.Value)
		if err != nil {
			return nil
		}
		o, err := storage.Decode(plain)
		if err != nil || o.Check(k, ns, name) != nil {
			return nil
		}
		v := P(new(T))
		if o.Format == storage.JSON {
			err = kjson.UnmarshalCaseSensitivePreserveInts(plain, v)
		} else {
			var envelope runtime.Unknown
			if err = envelope.Unmarshal(plain[len("k8s\x00"):]); err == nil {
				err = v.Unmarshal(envelope.Raw)
			}
		}
		if err == nil {
			fn(v)
		}
		return nil
	})
	return err
}
