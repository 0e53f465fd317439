package service

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

const (
	// bastionsNeeded is how many bastions must hold an event that the daemon's own
	// log cannot take: of one alone nobody could say later that it has not lost it.
	bastionsNeeded = 2
	// holdWithin is how long they may take.
	holdWithin = 10 * time.Second
	// maxPending bounds the events that wait for it.
	maxPending = 64
	// heldEnvelope is what an event of kind Held takes beside its payload.
	heldEnvelope = 4 << 10
)

// Holder has two bastions keep an event that the daemon's own log cannot take,
// through the streams by which they witness that log. It is the ledger's, which is
// there before any stream. Its methods may be called concurrently.
type Holder struct {
	within time.Duration

	mu       sync.Mutex // guards all below
	pending  map[string]*pending
	bastions map[string]*keeper // that have a stream, by server
}

// pending is an event that waits for receipts.
type pending struct {
	id       string
	event    []byte
	receipts map[string]string // by server
	keys     map[string]bool   // of those who gave them
	refused  map[string]string
	enough   chan struct{} // closed when the outcome is known, and so is over
	over     bool
}

// keeper is one bastion's stream.
type keeper struct {
	server string
	key    ed25519.PublicKey
	asked  map[string]bool
	wake   chan struct{}
}

// NewHolder returns a Holder without bastions.
func NewHolder() *Holder {
	return &Holder{within: holdWithin, pending: map[string]*pending{}, bastions: map[string]*keeper{}}
}

// fits reports whether an event can be held: as the payload of another event, it
// has to fit into that.
func fits(event []byte) bool {
	quoted, err := json.Marshal(string(event))
	return err == nil && len(quoted) <= audit.MaxEvent-heldEnvelope
}

// Hold returns the receipts of two bastions for an event, each a signed note. Errors
// are fault.AuditUnavailable: then nothing may be done on the strength of it,
// though one of them may hold it.
func (h *Holder) Hold(ctx context.Context, id string, event []byte) (receipts []string, err error) {
	refuse := func(format string, args ...any) ([]string, error) {
		return nil, fault.New(fault.AuditUnavailable, "make room on the disk, or see why bastions are not connected: halligan status", format, args...)
	}
	if !fits(event) {
		return refuse("an event of %d bytes is too long for bastions to hold", len(event))
	}
	p := &pending{id: id, event: event, receipts: map[string]string{}, keys: map[string]bool{}, refused: map[string]string{}, enough: make(chan struct{})}
	h.mu.Lock()
	n := len(h.bastions)
	if n < bastionsNeeded || len(h.pending) >= maxPending {
		waiting := len(h.pending)
		h.mu.Unlock()
		return refuse("the log takes nothing, and of the %d bastions that must hold an event then %d are connected (%d events wait)", bastionsNeeded, n, waiting)
	}
	h.pending[id] = p
	for _, k := range h.bastions {
		k.awake()
	}
	h.mu.Unlock()
	timer := time.NewTimer(h.within)
	defer timer.Stop()
	select {
	case <-p.enough:
	case <-timer.C:
	case <-ctx.Done():
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.pending, id)
	for _, k := range h.bastions {
		delete(k.asked, id)
	}
	if len(p.receipts) >= bastionsNeeded {
		return slices.Sorted(maps.Values(p.receipts)), nil
	}
	why := ""
	for _, server := range slices.Sorted(maps.Keys(p.refused)) {
		why += fmt.Sprintf("; %s: %s", server, p.refused[server])
	}
	return refuse("the log takes nothing, and %d of the %d bastions needed hold the event%s", len(p.receipts), bastionsNeeded, why)
}

// Bastions returns how many are connected.
func (h *Holder) Bastions() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.bastions)
}

// join adds a bastion's stream; leave removes it.
func (h *Holder) join(server string, key ed25519.PublicKey) (k *keeper, leave func()) {
	k = &keeper{server: server, key: key, asked: map[string]bool{}, wake: make(chan struct{}, 1)}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.bastions[server] = k
	k.awake()
	return k, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.bastions[server] == k {
			delete(h.bastions, server)
		}
	}
}

func (k *keeper) awake() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// ask returns what that bastion was not asked yet.
func (h *Holder) ask(k *keeper) (list []*halliganv1.WitnessHold) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(h.pending)) {
		if !k.asked[id] {
			k.asked[id] = true
			list = append(list, &halliganv1.WitnessHold{Id: id, Event: h.pending[id].event})
		}
	}
	return list
}

// receipt takes a bastion's answer. It counts only with that bastion's signature
// over the very event, and each key once.
func (h *Holder) receipt(k *keeper, r *halliganv1.WitnessReceipt) error {
	h.mu.Lock()
	p := h.pending[r.GetId()]
	asked := k.asked[r.GetId()]
	h.mu.Unlock()
	if p == nil || !asked {
		return nil // nobody waits for it any more
	}
	why := r.GetRefused()
	if why == "" {
		if err := logkey.VerifyReceipt(r.GetNote(), k.server, k.key, p.id, p.event); err != nil {
			return fault.New(fault.Refused, "", "a receipt that does not hold: %w", err)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case why != "":
		p.refused[k.server] = neutral.LineMax(why, 160)
	case !p.keys[string(k.key)]:
		p.receipts[k.server], p.keys[string(k.key)] = string(r.GetNote()), true
	}
	// Another bastion may have come since the outcome was known.
	if !p.over && p.known(len(h.bastions)) {
		p.over = true
		close(p.enough)
	}
	return nil
}

// known reports whether more answers change nothing, of so many bastions.
func (p *pending) known(bastions int) bool {
	return len(p.receipts) >= bastionsNeeded || bastions-len(p.refused) < bastionsNeeded
}
