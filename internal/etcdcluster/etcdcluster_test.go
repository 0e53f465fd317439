package etcdcluster

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func put(t *testing.T, c *Cluster, key, value string) {
	t.Helper()
	cli := client(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := cli.Put(ctx, key, value); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, c *Cluster, key string, members ...int) string {
	t.Helper()
	cli := client(t, c, members...)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	r, err := cli.Get(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

func client(t *testing.T, c *Cluster, members ...int) *clientv3.Client {
	t.Helper()
	cli, err := c.Client(members...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cli.Close() })
	return cli
}

func TestThreeMembersStopRestartAndMoveLeader(t *testing.T) {
	began := time.Now()
	c := ForTest(t, 3)
	t.Logf("ready after %v", time.Since(began))
	put(t, c, "/a", "1")
	for i := range 3 {
		if got := get(t, c, "/a", i); got != "1" {
			t.Errorf("member %d: got %q", i, got)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	lead := c.Leader()
	if lead < 0 {
		t.Fatal("no leader")
	}
	to := (lead + 1) % 3
	if err := c.MoveLeader(ctx, to); err != nil {
		t.Fatal(err)
	}
	if got := c.Leader(); got != to {
		t.Errorf("leader %d, want %d", got, to)
	}
	c.Stop(to)
	rest := []int{lead, (lead + 2) % 3}
	cli := client(t, c, rest...)
	if _, err := cli.Put(ctx, "/a", "2"); err != nil {
		t.Fatalf("two of three: %v", err)
	}
	if err := c.Restart(ctx, to); err != nil {
		t.Fatal(err)
	}
	if got := get(t, c, "/a", to); got != "2" {
		t.Errorf("restarted member: got %q", got)
	}
}

func TestQuorumLostAndBack(t *testing.T) {
	c := ForTest(t, 3)
	put(t, c, "/a", "1")
	c.Stop(1)
	c.Stop(2)
	cli := client(t, c, 0)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := cli.Get(ctx, "/a"); err == nil {
		t.Error("a linearizable read worked without quorum")
	}
	ctx, cancel = context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if r, err := cli.Get(ctx, "/a", clientv3.WithSerializable()); err != nil || len(r.Kvs) != 1 {
		t.Errorf("serializable read: %v, %v", r, err)
	}
	if err := c.Restart(ctx, 1); err != nil {
		t.Fatal(err)
	}
	put(t, c, "/a", "2")
}

func TestStartsAgainOnItsFolder(t *testing.T) {
	c := ForTest(t, 1)
	put(t, c, "/a", "1")
	o := c.opts
	c.Close()
	c.Close()
	again, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if got := get(t, again, "/a"); got != "1" {
		t.Errorf("got %q", got)
	}
}

func TestTakenPortIsNamed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	for _, members := range [][]Member{
		{{ClientPort: port}},
		// The first member starts, has no quorum, and must be stopped again.
		{{}, {PeerPort: port}, {}},
	} {
		_, err = Start(t.Context(), Options{Dir: t.TempDir(), Members: members})
		if err == nil || !strings.Contains(err.Error(), l.Addr().String()+" is taken") {
			t.Errorf("got %v", err)
		}
	}
}

func TestOnlyLoopback(t *testing.T) {
	for _, ip := range []string{"0.0.0.0", "192.0.2.1", "localhost"} {
		if _, err := Start(t.Context(), Options{Dir: t.TempDir(), Members: []Member{{IP: ip}}}); err == nil {
			t.Errorf("%s was accepted", ip)
		}
	}
}

func TestStrangersAreRefusedAndKeysArePrivate(t *testing.T) {
	c := ForTest(t, 1)
	cfg := c.clients.Clone()
	cfg.Certificates, cfg.GetClientCertificate = nil, nil
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{"https://" + c.Endpoints()[0]}, TLS: cfg, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := cli.Get(ctx, "/a"); err == nil {
		t.Error("a client without a certificate was served")
	}
	keys, err := filepath.Glob(filepath.Join(c.opts.Dir, "pki", "*.key"))
	if err != nil || len(keys) != 3 {
		t.Fatalf("keys: %v, %v", keys, err)
	}
	for _, key := range keys {
		if st, err := os.Stat(key); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", key, st.Mode(), err)
		}
	}
}
