package etcd

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/peer"
)

// Status is what a member of the cluster says about itself.
type Status struct {
	// Endpoint is the IP:port that answered, Version the server's.
	Endpoint, Version string
	// The IDs are those that etcdctl prints in hexadecimal. LeaderID is 0 while
	// there is no leader.
	MemberID, LeaderID, ClusterID uint64
	Revision                      int64
	// DBSize and DBQuota are in bytes; the quota is 0 where the server does not
	// say (before etcd 3.6).
	DBSize, DBQuota int64
	// Alarms are NOSPACE, CORRUPT.
	Alarms []string
	// Quorum says that a linearizable read was answered.
	Quorum bool
	// Latency is that of the linearizable read, else of the status call.
	Latency time.Duration
	Members []Member
	// Err is set when the member did not answer; then the rest is zero.
	Err error
}

// Member is one member of the cluster.
type Member struct {
	ID         uint64
	Name       string
	ClientURLs []string
	Learner    bool
}

// statusTimeout bounds Status, whatever is dead.
const statusTimeout = 2 * time.Second

// Status asks one member, within 2 s. It needs no quorum.
func (c *Client) Status(ctx context.Context) Status {
	ctx, cancel := context.WithTimeout(ctx, min(statusTimeout, c.cfg.RequestTimeout))
	defer cancel()
	conn := c.cl.ActiveConnection()
	var (
		st                    Status
		wg                    sync.WaitGroup
		pStatus, pList, pRead peer.Peer
		took                  time.Duration
	)
	wg.Go(func() {
		// A member answers this one from what it has. The alarms are in it,
		// while asking for them goes through Raft.
		start := time.Now()
		r, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{}, opts(&pStatus, maxMessage)...)
		if err != nil {
			st.Err = c.explain(ctx, "asking etcd for its status", err, pStatus.Addr != nil)
			return
		}
		took = time.Since(start)
		st.Endpoint, st.Version, st.LeaderID = pStatus.Addr.String(), r.Version, r.Leader
		st.MemberID, st.ClusterID, st.Revision = r.Header.MemberId, r.Header.ClusterId, r.Header.Revision
		st.DBSize, st.DBQuota = r.DbSize, r.DbSizeQuota
		for _, alarm := range []string{"NOSPACE", "CORRUPT"} {
			if slices.ContainsFunc(r.Errors, func(e string) bool { return strings.Contains(e, alarm) }) {
				st.Alarms = append(st.Alarms, alarm)
			}
		}
	})
	wg.Go(func() {
		r, err := pb.NewClusterClient(conn).MemberList(ctx, &pb.MemberListRequest{}, opts(&pList, maxMessage)...)
		if err != nil {
			return
		}
		for _, m := range r.Members {
			st.Members = append(st.Members, Member{ID: m.ID, Name: m.Name, ClientURLs: m.ClientURLs, Learner: m.IsLearner})
		}
	})
	var latency time.Duration
	wg.Go(func() {
		start := time.Now()
		_, err := c.kv.Range(clientv3.WithRequireLeader(ctx), &pb.RangeRequest{Key: []byte("health"), KeysOnly: true}, opts(&pRead, math.MaxInt32)...)
		// Permissions are looked at after the quorum, as etcdctl takes it too.
		if err == nil || rpctypes.Error(err) == rpctypes.ErrPermissionDenied {
			st.Quorum, latency = true, time.Since(start)
		}
	})
	wg.Wait()
	if st.Err != nil {
		return Status{Err: st.Err}
	}
	if st.Latency = took; st.Quorum {
		st.Latency = latency
	}
	return st
}

// ClusterID returns the cluster's ID as etcdctl prints it, in hexadecimal. It
// needs no quorum.
func (c *Client) ClusterID(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RequestTimeout)
	defer cancel()
	var p peer.Peer
	r, err := pb.NewMaintenanceClient(c.cl.ActiveConnection()).Status(ctx, &pb.StatusRequest{}, opts(&p, maxMessage)...)
	if err != nil {
		return "", c.explain(ctx, "asking etcd for the cluster's ID", err, p.Addr != nil)
	}
	return fmt.Sprintf("%x", r.Header.ClusterId), nil
}

// LeaseAlive reports whether the lease exists and has time left.
func (c *Client) LeaseAlive(ctx context.Context, id int64) (bool, error) {
	ctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), c.cfg.RequestTimeout)
	defer cancel()
	var p peer.Peer
	r, err := pb.NewLeaseClient(c.cl.ActiveConnection()).LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: id}, opts(&p, maxMessage)...)
	if rpctypes.Error(err) == rpctypes.ErrLeaseNotFound {
		return false, nil
	}
	if err != nil {
		return false, c.explain(ctx, "asking etcd for a lease", err, p.Addr != nil)
	}
	return r.TTL > 0, nil // -1: there is none
}
