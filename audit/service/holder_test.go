package service

import (
	"testing"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
)

// TestAnswersAfterTheEnd: a bastion that comes when enough others have refused may
// answer, too, before the one who asked has gone.
func TestAnswersAfterTheEnd(t *testing.T) {
	h := NewHolder()
	p := &pending{id: "e", event: []byte("{}"), receipts: map[string]string{}, keys: map[string]bool{}, refused: map[string]string{}, enough: make(chan struct{})}
	h.pending["e"] = p
	refuses := func(k *keeper) {
		t.Helper()
		if asked := h.ask(k); len(asked) != 1 {
			t.Fatalf("%s is asked to hold %v", k.server, asked)
		}
		if err := h.receipt(k, &halliganv1.WitnessReceipt{Id: "e", Refused: "it takes nothing"}); err != nil {
			t.Fatal(err)
		}
	}
	a, _ := h.join("a.bastion", nil)
	b, _ := h.join("b.bastion", nil)
	refuses(a) // no two are left
	c, _ := h.join("c.bastion", nil)
	refuses(c)
	refuses(b)
	select {
	case <-p.enough:
	default:
		t.Error("whoever asked is not told")
	}
}
