package lab

import (
	"bytes"
	"crypto/sha256"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/internal/etcdcluster"
)

// TestSeedDecodes reads every seeded key back: each belongs to a known kind,
// and its value is of that kind, namespace and name.
func TestSeedDecodes(t *testing.T) {
	c := etcdcluster.ForTest(t, 1)
	cli, err := c.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	l := &Lab{opts: Options{Dir: t.TempDir()}}
	if err := l.writeEncryption(); err != nil {
		t.Fatal(err)
	}
	sealed, err := storage.LoadEncryption(t.Context(), l.encryption)
	if err != nil {
		t.Fatal(err)
	}
	defer sealed.Close()
	seeded, err := Seed(t.Context(), cli, Seeding{Objects: 1500, Workers: 5, Encryption: sealed})
	if err != nil {
		t.Fatal(err)
	}
	r, err := cli.Get(t.Context(), "/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Kvs) != seeded.Objects {
		t.Errorf("%d keys of %d objects: some share a key", len(r.Kvs), seeded.Objects)
	}
	if seeded.Objects < 1500 || seeded.Objects > 1550 {
		t.Errorf("%d objects, asked for 1500", seeded.Objects)
	}
	catalogue := storage.NewCatalogue()
	crd, err := storage.EncodeTyped(cacheCRD())
	if err != nil {
		t.Fatal(err)
	}
	if err := catalogue.AddCRD(crd); err != nil {
		t.Fatal(err)
	}
	kinds, uids, leases := map[string]int{}, map[string]string{}, 0
	for _, kv := range r.Kvs {
		key := string(kv.Key)
		kind, namespace, name, err := catalogue.ByKey(storage.DefaultPrefix, key)
		if err != nil {
			t.Error(err)
			continue
		}
		if bytes.HasPrefix(kv.Value, []byte("k8s:enc:secretbox:v1:lab:")) != (kind.Kind == "Secret") {
			t.Errorf("%s is encrypted, or should be", key)
		}
		plain, err := sealed.Open(t.Context(), kind, key, kv.Value)
		if err != nil {
			t.Error(err)
			continue
		}
		obj, err := storage.Decode(plain)
		if err != nil {
			t.Errorf("%s: %v", key, err)
			continue
		}
		if err := obj.Check(kind, namespace, name); err != nil {
			t.Errorf("%s: %v", key, err)
		}
		id := string(obj.Meta.UID)
		if other := uids[id]; id == "" || other != "" {
			t.Errorf("%s: uid %q is that of %q too", key, id, other)
		}
		uids[id] = key
		kinds[kind.Resource()]++
		if kv.Lease != 0 {
			leases++
		}
		if strings.Contains(key, "/events/") != (kv.Lease != 0) {
			t.Errorf("%s: lease %x", key, kv.Lease)
		}
	}
	t.Log(kinds)
	if len(kinds) < 30 || leases == 0 || kinds["configmaps"] < leastRunaway || kinds["caches.platform.example.com"] == 0 {
		t.Errorf("the mixture is poor: %v, %d leases", kinds, leases)
	}
}

// TestPopulationIsDeterministic encodes two runs and compares them.
func TestPopulationIsDeterministic(t *testing.T) {
	sum := func() [32]byte {
		h := sha256.New()
		population(1000, 3, func(i item) bool {
			value, err := storage.EncodeTyped(i.obj)
			if err != nil {
				t.Fatal(err)
			}
			h.Write(value)
			return true
		})
		return [32]byte(h.Sum(nil))
	}
	if first, second := sum(), sum(); first != second {
		t.Error("two seedings of the same size differ")
	}
}
