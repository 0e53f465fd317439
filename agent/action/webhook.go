package action

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/structpb"
	admissionv1 "k8s.io/api/admissionregistration/v1"

	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

var webhookRow = row{
	name:    "webhook",
	summary: "Let requests past an admission webhook that does not answer",
	description: "open sets failurePolicy Ignore for every webhook of a configuration: one that answers goes on deciding, one that does not no longer blocks. delete removes the configuration. " +
		"NAME is that of a ValidatingWebhookConfiguration or a MutatingWebhookConfiguration, and means both where both have it; validating/NAME and mutating/NAME mean one.",
	role: trust.Responder, effect: mutate, timeout: time.Minute,
	parameters: []*halliganv1.Parameter{
		{Name: "operation", Type: "string", Required: true, Positional: true, Placeholder: "open|delete", Description: "what to do with it"},
		{Name: "target", Type: "string", Required: true, Positional: true, Placeholder: "NAME", Description: "name of the webhook configuration; validating/NAME or mutating/NAME for one of two"},
	},
	examples: []string{"webhook open policy-guard", "webhook delete mutating/sidecar-injector"},
	plan:     planWebhook,
}

type webhookParameters struct {
	Operation string `json:"operation"`
	Target    string `json:"target"`
}

const (
	validating = "validatingwebhookconfigurations"
	mutating   = "mutatingwebhookconfigurations"
)

// maxWebhooks is more than a configuration ever has; each costs a search of the
// stored object.
const maxWebhooks = 500

func planWebhook(ctx context.Context, p *planner, raw *structpb.Struct) error {
	par, err := decode[webhookParameters](raw)
	if err != nil {
		return err
	}
	kinds, name, err := p.webhooks(ctx, par.Target)
	if err != nil {
		return err
	}
	request := p.request
	switch par.Operation {
	case "open":
	case "delete":
		// Whoever may not delete may not do so by another verb.
		p.request.Floor = p.policy.Rung(trust.Request{Action: deleteName, Rung: deleteRow.role, Mutates: true})
		request = p.request
		request.Deletes = true
	default:
		return fault.New(fault.Usage, "say webhook open NAME, or webhook delete NAME", "%.64q is not what can be done with a webhook", par.Operation)
	}
	around := p.lookAround(ctx, kinds[0], "", 1)
	var found, webhooks int
	for _, kind := range kinds {
		if err := p.policy.Decide(p.who, on(request, kind, "", name)); err != nil {
			return err
		}
		obj, err := p.load(ctx, kind, "", name)
		switch {
		case fault.Is(err, fault.NotFound):
			continue
		case request.Deletes && obj != nil && fault.Is(err, fault.Undecodable):
			p.removeBlind(obj, err)
			err = nil
		case err != nil:
			return err
		case request.Deletes:
			p.remove(obj)
			err = p.fights(obj, 1, around)
		default:
			var n int
			n, err = p.openWebhooks(obj)
			if webhooks += n; err == nil && n > 0 {
				err = p.fights(obj, 1, around)
			}
		}
		if err != nil {
			return err
		}
		found++
	}
	switch {
	case found == 0:
		return fault.New(fault.NotFound, "see: halligan get "+validating+", and: halligan get "+mutating, "no webhook configuration is called %.200q", name)
	case len(p.steps) == 0:
		p.summary("nothing to do: no webhook of %s blocks when it does not answer", name)
		return nil
	case request.Deletes:
		p.summary("delete the webhook configuration %s", name)
		p.bypass(bypassDelete...)
	default:
		p.summary("let requests past %d %s of %s that block when they do not answer", webhooks, plural(webhooks, "webhook"), name)
		p.bypass(bypassUpdate...)
		p.warn("what they refuse or change is let through unseen whenever they do not answer")
	}
	p.needs("nothing but the API server's watch of etcd: the next request goes past it once it has seen the change")
	return nil
}

// webhooks resolves NAME to both kinds and KIND/NAME to that one.
func (p *planner) webhooks(ctx context.Context, text string) (kinds []*storage.Kind, name string, err error) {
	plurals := []string{validating, mutating}
	if word, rest, ok := strings.Cut(text, "/"); ok {
		if full, short := map[string]string{"validating": validating, "mutating": mutating}[word]; short {
			word = full
		}
		plurals, text = []string{word}, rest
	}
	for _, plural := range plurals {
		kind, n, err := p.target(ctx, plural+"/"+text)
		if err != nil {
			return nil, "", err
		}
		if r := kind.Resource(); r != validating+"."+kind.Group && r != mutating+"."+kind.Group || n == "" {
			return nil, "", fault.New(fault.Usage, "give the name of a webhook configuration; see: halligan get "+validating, "%.200q is no webhook configuration", plural+"/"+text)
		}
		kinds, name = append(kinds, kind), n
	}
	return kinds, name, nil
}

// openWebhooks plans that none of an object's webhooks blocks, and returns how many
// did.
func (p *planner) openWebhooks(o *object) (int, error) {
	f, ok := o.kind.Field(storage.FailurePolicy, o.APIVersion)
	if !ok {
		return 0, fault.New(fault.Usage, "delete it: halligan webhook delete "+o.name, "%s is stored as %s, which this build does not edit", o.title(), o.APIVersion)
	}
	names, err := o.Names(f)
	if err != nil {
		return 0, err
	}
	if len(names) > maxWebhooks {
		return 0, fault.New(fault.Refused, "delete it: halligan webhook delete "+o.name, "%s has %d webhooks, more than the %d that are edited at once", o.title(), len(names), maxWebhooks)
	}
	var edits []storage.Edit
	for _, n := range names {
		policy, _, err := o.Entry(f, n)
		if err != nil {
			return 0, err
		}
		if policy != string(admissionv1.Ignore) {
			edits = append(edits, storage.Edit{Field: storage.FailurePolicy, Entry: n, Value: string(admissionv1.Ignore)})
		}
	}
	if len(edits) == 0 {
		return 0, nil
	}
	if err := p.update(o, edits); err != nil {
		return 0, err
	}
	p.warnOfPatience(o)
	return len(edits), nil
}

// warnOfPatience tells how long a backend that hangs goes on holding up requests.
func (p *planner) warnOfPatience(o *object) {
	var c admissionv1.ValidatingWebhookConfiguration // a mutating one has it in the same place
	if typed(o, &c) != nil {
		return
	}
	longest := int32(0)
	for _, w := range c.Webhooks {
		seconds := int32(10) // where nothing is said: pkg/apis/admissionregistration/v1/defaults.go
		if w.TimeoutSeconds != nil {
			seconds = *w.TimeoutSeconds
		}
		longest = max(longest, seconds)
	}
	p.warn("%s", fmt.Sprintf("a backend that hangs instead of refusing still holds each request for up to %d s; halligan webhook delete %s ends that", longest, o.name))
}
