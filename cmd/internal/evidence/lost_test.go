package evidence

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// keeper is a bastion with sealed files, which may not be those that it should have.
type keeper struct {
	*peer
	file []byte
	// older are files that it had before, by the name that they have now.
	older map[string][]byte
}

func (k keeper) ReadSealed(_ context.Context, req *halliganv1.ReadSealedRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[halliganv1.FilePart], error) {
	out, file := &pieces{}, k.file
	if older, ok := k.older[req.GetActionId()]; ok {
		file = older
	}
	for part := range slices.Chunk(file, 5) {
		out.parts = append(out.parts, &halliganv1.FilePart{Data: part})
	}
	return out, nil
}

// TestLost: of a node that cannot be asked bastions tell what it did, and have what
// takes it back; a bastion that has another file is not believed.
func TestLost(t *testing.T) {
	w := newWatch(t)
	node, honest, liar := w.peer("cp-9.prod"), w.peer("a.bastion"), w.peer("b.bastion")
	const first, second, third = "20261123-114502-aaaaaaaa", "20261123-114503-bbbbbbbb", "20261123-114504-cccccccc"
	file := []byte("the sealed before-images")
	sum := sha256.Sum256(file)
	alice := &audit.Actor{Person: "alice", Role: "responder", Credential: "person", Door: "ssh"}
	object := audit.Object{Key: "/registry/deployments/shop/web", RevisionBefore: 7, RevisionAfter: 9, Outcome: "applied"}
	do := func(id, undoes, outcome, images string) {
		in := node.record(audit.Event{Kind: audit.Intent, Actor: alice, Action: "scale", PlanID: id, Undoes: undoes, Reason: "storm", ObjectCount: 1, Objects: []audit.Object{{Key: object.Key}}})
		node.record(audit.Event{Kind: audit.Outcome, Of: in.ID, Actor: alice, PlanID: id, Undoes: undoes, Outcome: outcome, Images: images, Objects: []audit.Object{object}})
	}
	do(first, "", "applied", hex.EncodeToString(sum[:]))
	do(second, "", "applied", "")
	do(third, second, "applied", "")
	honest.copyOf(node)
	liar.copyOf(node)
	s := Surroundings{Err: t.Output(), Now: time.Now, Bundle: func() (*bundle.Bundle, error) { return w.bundle, nil }, State: func() (string, error) { return w.state, nil }}
	s.Bastions = func(ctx context.Context, each func(context.Context, Daemon)) (map[string]error, error) {
		each(ctx, Daemon{Name: liar.name, EvidenceClient: keeper{peer: liar, file: []byte("something else")}})
		each(ctx, Daemon{Name: honest.name, EvidenceClient: keeper{peer: honest, file: file}})
		return nil, nil
	}
	for _, named := range [][]string{{node.name}, nil} {
		lost, err := FetchLost(t.Context(), s, "prod", named)
		must(t, err)
		all, err := lost.History(t.Context(), "")
		must(t, err)
		if len(all) != 3 || all[2].GetActionId() != first || all[2].GetActor() != "alice" || all[2].GetApplied() != 1 || all[1].GetUndoneBy() != third {
			t.Errorf("%v", all)
		}
		one, err := lost.History(t.Context(), first[:20])
		must(t, err)
		if len(one) != 1 || one[0].GetPlan().GetId() != first || one[0].GetPlan().GetNode() != "cp-9" || one[0].GetPlan().GetClusterName() != "prod" || len(one[0].GetResults()) != 1 {
			t.Errorf("%v", one)
		}
		from, proof, err := lost.Evidence(t.Context(), first)
		must(t, err)
		if from != node.name || string(proof.GetSealed()) != string(file) || len(proof.GetEvents()) != 2 || len(proof.GetIdentity()) == 0 {
			t.Errorf("%s: %v", from, proof)
		}
		for id, want := range map[string]fault.Code{second: fault.Stale, third: fault.Refused, "2020": fault.NotFound, "20261123-1145": fault.Usage} {
			if _, _, err := lost.Evidence(t.Context(), id); !fault.Is(err, want) {
				t.Errorf("%s: %v, want %s", id, err, want)
			}
		}
	}
	if _, err := FetchLost(t.Context(), s, "stage", nil); !fault.Is(err, fault.NotFound) {
		t.Error(err)
	}
	s.Bastions = func(ctx context.Context, each func(context.Context, Daemon)) (map[string]error, error) {
		each(ctx, Daemon{Name: liar.name, EvidenceClient: keeper{peer: liar, file: []byte("something else")}})
		return nil, nil
	}
	lost, err := FetchLost(t.Context(), s, "prod", []string{node.name})
	must(t, err)
	if _, _, err := lost.Evidence(t.Context(), first); err == nil || !strings.Contains(err.Error(), "not the one that the log tells of") {
		t.Error(err)
	}
	// Who has taken the node sends other files than it had sealed: a bastion keeps both.
	s.Bastions = func(ctx context.Context, each func(context.Context, Daemon)) (map[string]error, error) {
		each(ctx, Daemon{Name: liar.name, EvidenceClient: keeper{liar, []byte("something else"), map[string][]byte{first + "-" + hex.EncodeToString(sum[:4]): file}}})
		return nil, nil
	}
	lost, err = FetchLost(t.Context(), s, "prod", []string{node.name})
	must(t, err)
	if _, proof, err := lost.Evidence(t.Context(), first); err != nil || string(proof.GetSealed()) != string(file) {
		t.Errorf("%v, %v", proof, err)
	}
}
