package cli

import (
	"context"
	"path/filepath"
	"sync"

	"github.com/spf13/cobra"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/verb"
	"github.com/halligan-io/halligan/cmd/internal/evidence"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// auditCommand reads the evidence.
func (a *app) auditCommand(v *verb.Verbs) *cobra.Command {
	return evidence.Command(a.surroundings(v))
}

// surroundings lend what reads evidence the connections of this run.
func (a *app) surroundings(v *verb.Verbs) evidence.Surroundings {
	return evidence.Surroundings{
		Out: v.Out, Err: v.Err, OutTTY: v.OutTTY, ErrTTY: v.ErrTTY, Env: v.Env, Now: v.Now,
		PrintJSON: v.PrintJSON, Bundle: a.current, State: a.evidenceFolder, Nodes: a.eachNode, Bastions: a.eachBastion,
	}
}

// current returns the bundle, nil where none is named. It asks nobody, and needs
// nothing to log in with.
func (a *app) current() (*bundle.Bundle, error) {
	if a.fleet != nil {
		return a.fleet.bundles.Current(), nil
	}
	if a.bundle == "" {
		return nil, nil
	}
	f, err := a.bundleOf()
	if err != nil {
		return nil, err
	}
	return f.bundles.Current(), nil
}

// here returns the cluster that the line means, "" at a console.
func (a *app) here() (string, error) {
	socket, err := a.console()
	if err != nil || socket != "" {
		return "", err
	}
	f, err := a.open()
	if err != nil {
		return "", err
	}
	if a.node != "" {
		host, err := f.find(a.node, a.cluster)
		return host.Cluster, err
	}
	return f.clusterOf()
}

// evidenceFolder is where what is fetched by the way is kept, for each cluster.
func (a *app) evidenceFolder() (string, error) {
	cluster, err := a.here()
	if err != nil {
		return "", err
	}
	base := a.stateHome()
	if base == "" {
		return "", fault.New(fault.Usage, "fetch into a folder that you name, and name it again: halligan audit fetch DIR", "there is no home for what is fetched")
	}
	if cluster == "" {
		return filepath.Join(base, "halligan", "console", "evidence"), nil
	}
	return filepath.Join(filepath.Dir(a.state(a.fleet.bundles.Current().File())), "evidence", cluster), nil
}

// eachNode logs in at the nodes of the cluster, or at the one that is named, and
// calls do for each that answers, at the same time.
func (a *app) eachNode(ctx context.Context, do func(context.Context, evidence.Daemon)) (map[string]error, error) {
	socket, err := a.console()
	if err != nil {
		return nil, err
	}
	if socket != "" {
		conn, err := dialConsole(ctx, socket)
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		// The kernel vouches for who answers there, and so for the key that it tells.
		s, err := halliganv1.NewAgentClient(conn).Status(ctx, &halliganv1.StatusRequest{})
		if err != nil {
			return nil, api.FromStatus(err)
		}
		do(ctx, evidence.Daemon{EvidenceClient: halliganv1.NewEvidenceClient(conn), VKey: s.GetAudit().GetVkey()})
		return nil, nil
	}
	f, err := a.open()
	if err != nil {
		return nil, err
	}
	var hosts []bundle.Host
	if a.node != "" {
		host, err := f.find(a.node, a.cluster)
		if err != nil {
			return nil, err
		}
		hosts = []bundle.Host{host}
	} else {
		cluster, err := f.clusterOf()
		if err != nil {
			return nil, err
		}
		hosts = f.bundles.Current().Inventory.Nodes(cluster)
	}
	if err := f.way.ready(ctx); err != nil {
		return nil, err
	}
	n, limit := f.limits()
	var mu sync.Mutex // guards failed
	failed := map[string]error{}
	turns := make(chan struct{}, n) // to log in, not for the whole call
	var asking sync.WaitGroup
	for _, host := range hosts {
		asking.Go(func() {
			turns <- struct{}{}
			within, cancel := context.WithTimeout(ctx, limit)
			k, err := f.connect(within, host)
			cancel()
			<-turns
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed[host.ID()] = err
				return
			}
			do(ctx, evidence.Daemon{Name: host.ID(), EvidenceClient: halliganv1.NewEvidenceClient(k.conn)})
			_ = k.close()
		})
	}
	asking.Wait()
	return failed, nil
}

// eachBastion calls do for each bastion that lets the caller in.
func (a *app) eachBastion(ctx context.Context, do func(context.Context, evidence.Daemon)) (map[string]error, error) {
	socket, err := a.console()
	if err != nil || socket != "" {
		return nil, err
	}
	f, err := a.open()
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex // guards broken
	broken := map[string]error{}
	failed := f.way.each(ctx, func(ctx context.Context, p *passage) {
		conn, err := p.conn(ctx)
		if err != nil {
			mu.Lock()
			defer mu.Unlock()
			broken[p.host.ID()] = err
			return
		}
		do(ctx, evidence.Daemon{Name: p.host.ID(), EvidenceClient: halliganv1.NewEvidenceClient(conn)})
	})
	for name, err := range broken {
		failed[name] = err
	}
	return failed, nil
}
