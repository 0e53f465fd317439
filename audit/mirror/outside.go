package mirror

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/neutral"
)

// Outside is a witness that somebody else runs (C2SP tlog-witness), which makes what
// all bastions of one operator could agree on visible to others. It must have been
// told the keys of the logs: each generation of a log is one of its own there.
type Outside struct {
	// URL is where it answers, with an IP address: names may be what failed.
	URL string `json:"url"`
	// VKey is its verifier key, as it publishes it.
	VKey string `json:"vkey"`
}

// Check says what is wrong with it.
func (o Outside) Check() error {
	u, err := url.Parse(o.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("url: %.120q is not http(s)://IP:PORT/…", o.URL)
	}
	if _, err := netip.ParseAddr(u.Hostname()); err != nil {
		return fmt.Errorf("url: %.120q has no IP address; a name would need DNS, which may be what failed", o.URL)
	}
	if _, err := torchwood.NewCosignatureVerifier(o.VKey); err != nil {
		return fmt.Errorf("vkey: %w", err)
	}
	return nil
}

// Ledger is the bastion's own log: a *ledger.Ledger, whose comments hold.
type Ledger interface {
	Dir() string
	Heads() []ledger.Head
	Changed() (<-chan struct{}, func())
	Cosigned(lineage string, generation uint64, checkpoint []byte, witness string) error
}

const (
	// submitEvery is how often a witness is asked at most, and submitAgain when it
	// failed; unknownAgain when it does not know a log.
	submitEvery  = time.Second
	submitAgain  = 15 * time.Second
	unknownAgain = 10 * time.Minute
	submitWithin = 10 * time.Second
	maxAnswer    = 16 << 10
)

// submitter brings checkpoints to one witness.
type submitter struct {
	m        *Mirrors
	own      Ledger
	to       Outside
	verifier *torchwood.CosignatureVerifier
	client   *http.Client
	// known is how many entries of each tree the witness has signed, not before when
	// a tree that it refused is brought again.
	known     map[string]int64
	notBefore map[string]time.Time
}

// submission is the head of one tree.
type submission struct {
	raw   []byte // signed by the log
	head  torchwood.Checkpoint
	tree  *tiles.Tree
	store func(cosigned []byte) error
}

// Submit brings the bastion's own log and its copies to a witness until the context
// ends. told hears why it does not sign, empty: it does.
func (m *Mirrors) Submit(ctx context.Context, own Ledger, to Outside, told func(problem string)) error {
	verifier, err := torchwood.NewCosignatureVerifier(to.VKey)
	if err != nil {
		return err
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 1, TLSHandshakeTimeout: submitWithin, ResponseHeaderTimeout: submitWithin}
	defer transport.CloseIdleConnections()
	s := &submitter{m: m, own: own, to: to, verifier: verifier, known: map[string]int64{}, notBefore: map[string]time.Time{},
		client: &http.Client{Transport: transport, Timeout: submitWithin, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
	copies, cancel := m.Changed()
	defer cancel()
	grown, stop := own.Changed()
	defer stop()
	for {
		wait, problem := submitEvery, ""
		if err := s.round(ctx); err != nil {
			problem = neutral.LineMax(err.Error(), 256)
			wait = submitAgain
		}
		told(problem)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		if problem != "" {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-copies:
		case <-grown:
		case <-time.After(unknownAgain):
		}
	}
}

// round brings what has grown, and returns the first error.
func (s *submitter) round(ctx context.Context) (failed error) {
	for _, sub := range s.all() {
		if s.known[sub.head.Origin] >= sub.head.N || time.Now().Before(s.notBefore[sub.head.Origin]) {
			continue
		}
		if err := s.bring(ctx, sub); err != nil {
			if failed == nil {
				failed = fmt.Errorf("the witness %s does not sign for %s: %w", s.verifier.Name(), neutral.LineMax(sub.head.Origin, 160), err)
			}
			var refused *refusal
			if !errors.As(err, &refused) { // it is not there at all
				return failed
			}
		}
	}
	return failed
}

// all returns the heads of the bastion's own log, and of the lineages of the copies
// that are written.
func (s *submitter) all() (list []submission) {
	for _, h := range s.own.Heads() {
		head, err := tiles.ParseCheckpoint(h.Checkpoint)
		if err != nil {
			continue
		}
		tree, err := tiles.Open(filepath.Join(s.own.Dir(), "logs", tiles.Folder(h.Lineage, h.Generation)))
		if err != nil {
			continue
		}
		list = append(list, submission{h.Checkpoint, head, tree, func(cosigned []byte) error {
			return s.own.Cosigned(h.Lineage, h.Generation, cosigned, s.verifier.Name())
		}})
	}
	for _, c := range s.m.all() {
		c.mu.Lock()
		for _, g := range c.trees {
			if g.lineage == c.lineage && g.cosigned != nil {
				list = append(list, submission{g.raw, g.head, g.tree, func(cosigned []byte) error { return c.attach(g, cosigned) }})
			}
		}
		c.mu.Unlock()
	}
	return list
}

// refusal is what a witness that answers says.
type refusal struct{ status, text string }

func (r *refusal) Error() string {
	return "it answers " + r.status + ": " + neutral.LineMax(r.text, 120)
}

// bring submits one head. A witness that has another size than was thought says so,
// once: others may bring the same log to it.
func (s *submitter) bring(ctx context.Context, sub submission) error {
	origin := sub.head.Origin
	for range 2 {
		code, answer, err := s.post(ctx, sub, s.known[origin])
		if err != nil {
			return err
		}
		text := strings.TrimSpace(string(answer))
		if code == http.StatusConflict {
			size, err := strconv.ParseInt(text, 10, 64)
			if err != nil || size < 0 {
				return &refusal{"409", text}
			}
			if s.known[origin] = size; size >= sub.head.N {
				return nil // another bastion was faster
			}
			continue
		}
		if code != http.StatusOK {
			s.notBefore[origin] = time.Now().Add(unknownAgain)
			if code == http.StatusUnprocessableEntity { // unlike what the witness has
				s.m.raise(origin, "what is here does not follow from what the witness "+s.verifier.Name()+" has signed")
			}
			return &refusal{strconv.Itoa(code), text}
		}
		cosigned := append(bytes.Clone(sub.raw), answer...)
		n, err := note.Open(cosigned, note.VerifierList(s.verifier))
		if err != nil {
			return &refusal{"200", "a countersignature that does not verify: " + err.Error()}
		}
		s.known[origin] = sub.head.N
		n.UnverifiedSigs = logOnly(n.UnverifiedSigs, origin)
		if cosigned, err = note.Sign(n); err != nil {
			return err
		}
		return sub.store(cosigned)
	}
	return &refusal{"409", "twice"}
}

// logOnly returns the signatures of the log itself.
func logOnly(sigs []note.Signature, origin string) (kept []note.Signature) {
	for _, sig := range sigs {
		if sig.Name == origin {
			kept = append(kept, sig)
		}
	}
	return kept
}

// post makes the request of add-checkpoint (C2SP tlog-witness).
func (s *submitter) post(ctx context.Context, sub submission, old int64) (code int, answer []byte, err error) {
	var body bytes.Buffer
	fmt.Fprintf(&body, "old %d\n", old)
	if old > 0 {
		proof, err := tlog.ProveTree(sub.head.N, old, sub.tree.HashReader(sub.head.Tree))
		if err != nil {
			return 0, nil, err
		}
		for _, h := range proof {
			fmt.Fprintln(&body, base64.StdEncoding.EncodeToString(h[:]))
		}
	}
	body.WriteByte('\n')
	body.Write(sub.raw)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(s.to.URL, "/")+"/add-checkpoint", &body)
	if err != nil {
		return 0, nil, err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	return resp.StatusCode, answer, err
}

// attach adds the countersignatures of another witness to a copy's, where the log
// has not grown since.
func (c *Copy) attach(g *generation, by []byte) error {
	c.work.Lock()
	defer c.work.Unlock()
	theirs, err := open(by)
	if err != nil {
		return err
	}
	c.mu.Lock()
	mine := g.cosigned
	c.mu.Unlock()
	ours, err := open(mine)
	if err != nil || ours.Text != theirs.Text {
		return nil //nolint:nilerr // it has grown, and is brought again
	}
	for _, sig := range theirs.UnverifiedSigs {
		if !hasSignature(ours, sig) {
			ours.UnverifiedSigs = append(ours.UnverifiedSigs, sig)
		}
	}
	signed, err := note.Sign(ours)
	if err != nil {
		return err
	}
	if err := durable.Write(filepath.Join(g.dir, cosignedFile), signed); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	g.cosigned = signed
	return nil
}

// open reads a note whose signatures were verified before.
func open(signed []byte) (*note.Note, error) {
	_, err := note.Open(signed, note.VerifierList())
	var unverified *note.UnverifiedNoteError
	if !errors.As(err, &unverified) {
		return nil, fmt.Errorf("not a signed note: %w", err)
	}
	return unverified.Note, nil
}

func hasSignature(n *note.Note, sig note.Signature) bool {
	for _, other := range n.UnverifiedSigs {
		if other.Name == sig.Name && other.Hash == sig.Hash {
			return true
		}
	}
	return false
}
