package ca

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	yaml "go.yaml.in/yaml/v3"
	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/issuer"
)

// InitOptions say what authority to make.
type InitOptions struct {
	// Fleet is the name of all that trusts this authority.
	Fleet string
	// Roots is how many root keys to make, where Public names none; Threshold is
	// how many of them sign a policy, 0: more than half.
	Roots, Threshold int
	// RootKeys are .pub files of root keys that are kept elsewhere.
	RootKeys []string
	// Public names the .pub files of other keys that are kept elsewhere, by the
	// names of the folder's keys. Those of TLS have to be in the ssh-agent now.
	Public map[string]string
	// Passphrase protects the keys that are made; empty: in the clear.
	Passphrase []byte
	// Inventory, if any, is the inventory part below its heading.
	Inventory string
	Socket    string // of the ssh-agent
	Now       time.Time
}

func (t *tool) initialise() *cobra.Command {
	o := InitOptions{Public: map[string]string{}}
	var clear bool
	others := map[string]*string{}
	c := &cobra.Command{
		Use: "init DIR --fleet NAME", Short: "Make the keys of a fleet and the first bundle's parts, to be reviewed and signed", Args: words(1, "one new folder"),
		Long: "Makes a folder that only its owner can read, with the root keys, the user and the host authority, the two of\n" +
			"TLS, the delegate's key, a policy with the whole shipped table to review, and skeletons of the inventory and\n" +
			"the revocations. A key that another machine or a token keeps is named by its .pub file instead of being made.",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			for name, file := range others {
				if *file != "" {
					o.Public[name] = *file
				}
			}
			if len(o.RootKeys) > 0 && cmd.Flags().Changed("roots") {
				return usage(cmd, "--roots makes keys, and --root names those that are there: give one of them")
			}
			o.Socket, o.Now = t.Env("SSH_AUTH_SOCK"), t.Now()
			if err := o.check(args[0]); err != nil {
				return err
			}
			if makes := len(o.RootKeys) == 0 || len(o.Public) < len(others); makes && !clear {
				if o.Passphrase, err = t.newPassphrase(); err != nil {
					return err
				}
			}
			if err := Init(args[0], o); err != nil {
				return err
			}
			return t.introduce(args[0])
		},
	}
	f := c.Flags()
	f.StringVar(&o.Fleet, "fleet", "", "`name` of all clusters that will trust these keys together")
	f.IntVar(&o.Roots, "roots", 3, "how `many` root keys to make")
	f.IntVar(&o.Threshold, "threshold", 0, "how `many` root keys have to sign a policy (default: more than half)")
	f.StringArrayVar(&o.RootKeys, "root", nil, "`file` NAME.pub of a root key that is kept elsewhere; once for each")
	for name, what := range map[string]string{userCA: "signs certificates of people", hostCA: "signs host certificates",
		tlsClientCA: "signs TLS clients (ed25519, in the ssh-agent)", tlsServerCA: "signs TLS servers (ed25519, in the ssh-agent)", delegate: "signs inventory and revocations"} {
		others[name] = f.String(name, "", "`file` NAME.pub of the key that "+what+", kept elsewhere")
	}
	f.BoolVar(&clear, "no-passphrase", false, "leave the keys that are made in the clear")
	return c
}

func (t *tool) introduce(dir string) error {
	t.say("%s: the authority is made. Nothing trusts it yet.", dir)
	for _, name := range []string{"root-*", userCA, hostCA, tlsClientCA, tlsServerCA, delegate} {
		files, err := filepath.Glob(filepath.Join(dir, name+".pub"))
		if err != nil {
			return err
		}
		for _, file := range files {
			key, _, err := issuer.ReadPublic(file)
			if err != nil {
				return err
			}
			where := "key kept elsewhere"
			if _, err := os.Lstat(strings.TrimSuffix(file, ".pub")); err == nil {
				where = "key in " + strings.TrimSuffix(file, ".pub")
			}
			t.say("  %-14s %s  %s", strings.TrimSuffix(filepath.Base(file), ".pub"), ssh.FingerprintSHA256(key), where)
		}
	}
	t.say("next: read %s, write the clusters into %s, then", filepath.Join(dir, "policy.yaml"), filepath.Join(dir, "inventory.yaml"))
	for _, part := range parts {
		by, more := "root-1", "   (and further roots, until enough have signed)"
		if part != "policy" {
			by, more = "delegate", ""
		}
		signer := filepath.Join(dir, by)
		if _, err := os.Lstat(signer); err != nil { // kept elsewhere: the .pub file names a key in the ssh-agent
			signer += ".pub"
		}
		t.say("  halligan ca --dir %s bundle sign %s --signer %s%s", dir, part, signer, more)
	}
	return nil
}

func (o *InitOptions) check(dir string) error {
	n := cmp.Or(len(o.RootKeys), o.Roots)
	o.Threshold = cmp.Or(o.Threshold, n/2+1)
	switch {
	case !trust.ValidCluster(o.Fleet):
		return fault.New(fault.Usage, "give --fleet NAME of a-z, 0-9 and -", "%q is not a fleet's name", o.Fleet)
	case n < 1 || n > maxRoots:
		return fault.New(fault.Usage, fmt.Sprintf("give --roots 1 to %d; 3 is a good number", maxRoots), "%d root keys cannot be", n)
	case o.Threshold < 1 || o.Threshold > n:
		return fault.New(fault.Usage, fmt.Sprintf("give --threshold 1 to %d", n), "%d of %d root keys can never sign", o.Threshold, n)
	}
	entries, err := os.ReadDir(dir)
	if err == nil && len(entries) > 0 {
		return fault.New(fault.Refused, "name a new folder; keys are never replaced", "%s is not empty", dir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.Usage, "name a new folder", "%w", err)
	}
	return nil
}

// maxRoots is more than any ceremony gathers.
const maxRoots = 16

// Init makes the folder, whole or not at all. It replaces nothing.
func Init(dir string, o InitOptions) (err error) {
	if err := o.check(dir); err != nil {
		return err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	// What is made here is moved in one step, so that a ceremony that was broken off
	// leaves no folder that looks like one.
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".halligan-ca-*.tmp")
	if err != nil {
		return fault.New(fault.Usage, "name a folder in one that is there", "%w", err)
	}
	defer func() {
		if err != nil {
			os.RemoveAll(tmp)
		}
	}()
	if err := o.fill(tmp); err != nil {
		return err
	}
	if err := durable.SyncDir(tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return fault.New(fault.Refused, "name a new folder", "%w", err)
	}
	return durable.SyncDir(filepath.Dir(dir))
}

// fill makes everything in the folder.
func (o *InitOptions) fill(dir string) error {
	f := &Folder{dir: dir, socket: o.Socket, now: func() time.Time { return o.Now }}
	lines := map[string]string{}
	var roots []string
	keep := func(name, public string) (*issuer.Key, error) {
		comment := name + "@" + o.Fleet
		if public == "" {
			k, err := issuer.Generate(f.path(name), comment, o.Passphrase)
			if err == nil {
				lines[name] = strings.TrimSpace(string(issuer.PublicLine(k.Public(), comment)))
			}
			return k, err
		}
		key, was, err := issuer.ReadPublic(public)
		if err != nil {
			return nil, err
		}
		if _, ok := key.(*ssh.Certificate); ok {
			return nil, fault.New(fault.Usage, "name the .pub file of the key itself", "%s is a certificate", public)
		}
		line := issuer.PublicLine(key, plain(cmp.Or(was, comment)))
		lines[name] = strings.TrimSpace(string(line))
		return nil, durable.Write(f.path(name+".pub"), line)
	}
	for i := range cmp.Or(len(o.RootKeys), o.Roots) {
		name, public := fmt.Sprintf("root-%d", i+1), ""
		if len(o.RootKeys) > 0 {
			public = o.RootKeys[i]
		}
		if _, err := keep(name, public); err != nil {
			return err
		}
		roots = append(roots, lines[name])
	}
	for _, name := range []string{userCA, hostCA, delegate} {
		if _, err := keep(name, o.Public[name]); err != nil {
			return err
		}
	}
	authorities := map[string]any{"user": []string{lines[userCA]}, "host": []string{lines[hostCA]}} // written in the order of names
	for name, a := range map[string]struct {
		key   string
		usage issuer.Usage
	}{tlsClientCA: {"tlsClient", issuer.ClientAuth}, tlsServerCA: {"tlsServer", issuer.ServerAuth}} {
		k, err := keep(name, o.Public[name])
		if err == nil && k == nil {
			k, err = f.Key(name, "") // in the ssh-agent
		}
		if err != nil {
			return err
		}
		cert, err := issuer.NewAuthority(k, o.Fleet+" "+name, a.usage, o.Now)
		k.Close()
		if err != nil {
			return err
		}
		if err := durable.Write(f.path(name+".crt"), certificatePEM(cert)); err != nil {
			return err
		}
		authorities[a.key] = string(certificatePEM(cert))
	}
	policy, err := o.policy(roots, lines[delegate], authorities)
	if err != nil {
		return err
	}
	inventory := o.Inventory
	if inventory == "" {
		inventory = inventorySkeleton
	}
	for name, text := range map[string]string{
		"policy.yaml":      policy,
		"inventory.yaml":   o.heading("inventory") + "policyVersion: 1\n" + inventory,
		"revocations.yaml": o.heading("revocations") + "policyVersion: 1\n" + revocationsSkeleton,
		"serial":           "0\n",
	} {
		if err := durable.Write(f.path(name), []byte(text)); err != nil {
			return err
		}
	}
	for _, part := range parts {
		d, err := f.readDraft(part)
		if err == nil {
			_, err = d.typed()
		}
		if err != nil { // a key that was brought, which no agent would take
			e := fault.Of(err)
			return fault.New(e.Code, "bring other keys", "%s", strings.TrimPrefix(e.Message, dir+"/"))
		}
	}
	return nil
}

// heading is what every part begins with.
func (o *InitOptions) heading(part string) string {
	return fmt.Sprintf("format: 1\npart: %s\nfleet: %s\nversion: 1\nsigned: %s\n", part, o.Fleet, o.Now.UTC().Format(time.RFC3339))
}

// policy writes the first policy, with the whole shipped table.
func (o *InitOptions) policy(roots []string, delegated string, authorities map[string]any) (string, error) {
	var b strings.Builder
	b.WriteString("# Who may do what in this fleet. Read all of it before you sign it.\n")
	b.WriteString(o.heading("policy"))
	add := func(comment string, v any) error {
		text, err := plainYAML(v)
		fmt.Fprintf(&b, "\n# %s\n%s", strings.ReplaceAll(comment, "\n", "\n# "), text)
		return err
	}
	rules := trust.ShippedRules()
	// An empty list is a decision too.
	approvals := any(rules.Approvals)
	if len(rules.Approvals) == 0 {
		approvals = []any{}
	}
	err := errors.Join(
		add("So many of these keys sign the next policy.", map[string]any{"roots": map[string]any{"threshold": o.Threshold, "keys": roots}}),
		add("These sign inventories and revocations.", map[string]any{"delegates": []string{delegated}}),
		add("What signs certificates of people, of servers, and of TLS clients and servers. No key is in two places.", map[string]any{"authorities": authorities}),
		add("When the revocations were signed longer ago, mutations need an approval or --alone. Nobody is locked out.", map[string]any{"freshFor": "168h"}),
		add("People whose certificate ended, or begins, within this time are let in with an alarm.", map[string]any{"grace": "2h"}),
		add("Longer certificates of people and automation are refused.", map[string]any{"maxCertificate": "168h"}),
		add("How long before-images are kept, on nodes and, encrypted, on bastions. What they hold is as secret as etcd.", map[string]any{"keepImages": "720h"}),
		add("What no action may touch, whoever asks; every list holds shell patterns, an empty one stands for everything.\nThis is the whole shipped table: what is struck here is no longer protected.", map[string]any{"protect": rules.Protect}),
		add("Subjects who never lose their rights.", map[string]any{"keepSubjects": rules.KeepSubjects}),
		add("The most that one action, and one person in an hour, may change, on each agent by itself: agents know nothing of one another.", map[string]any{"caps": rules.Caps}),
		add("What needs the approval of others, beside adding authority, which always does. overObjects counts what a person changes on one agent in an hour, unapproved. For example:\n- {actions: [delete], overObjects: 1000, count: 1, alone: true, why: a mass deletion wants a second pair of eyes}", map[string]any{"approvals": approvals}),
		add("The caps of what one person does with --alone, without the approval that it needs.", map[string]any{"aloneCaps": rules.AloneCaps}),
	)
	if err != nil {
		return "", err
	}
	b.WriteString("\n# FIDO2 keys that work without a certificate, for at most 90 days, with an alarm at every use:\n" +
		"# - {person: alice, key: sk-ssh-ed25519@openssh.com AAAA..., role: responder, clusters: [prod], notBefore: \"2026-01-01T00:00:00Z\", notAfter: \"2026-03-31T00:00:00Z\"}\n" +
		"sealed: []\n" +
		"\n# Keys of age (age-keygen), kept offline: with one, halligan audit recover opens the before-images of a\n# cluster of which no node is left. At most 8.\n" +
		"recovery: []\n")
	return b.String(), nil
}

const inventorySkeleton = `
# Where the agents and bastions are: IP addresses, since names may be what failed. For example:
# - name: prod
#   nodes:
#   - {name: cp-1, address: 192.0.2.11, sshPort: 2222, grpcPort: 7443}
# and - {name: bastion-a, address: 198.51.100.21, sshPort: 2222, grpcPort: 7443} among the bastions. A node with reach: out is not
# dialled: it keeps tunnels to the bastions that have a tunnelPort: 7444.
clusters: []
bastions: []
`

const revocationsSkeleton = `
# What no longer opens anything; halligan ca revoke writes it.
serials: []
keyIDs: []
keys: []
x509Serials: []
`

const maxLine = 110

// plainYAML writes a value with its JSON names in their order, and no line folded:
// a key is one line.
func plainYAML(v any) ([]byte, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	var node yaml.Node
	if err := yaml.Unmarshal(text, &node); err != nil {
		return nil, err
	}
	var block func(*yaml.Node)
	block = func(n *yaml.Node) {
		n.Style = 0 // not JSON's
		width := 0
		for _, c := range n.Content {
			block(c)
			if width += len(c.Value) + 2; c.Kind != yaml.ScalarNode {
				width = maxLine
			}
		}
		if n.Kind == yaml.SequenceNode && width < maxLine {
			n.Style = yaml.FlowStyle // a short list on one line
		}
	}
	block(&node)
	var out bytes.Buffer
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(2)
	err = enc.Encode(&node)
	return out.Bytes(), err
}

// plain leaves of a comment what a line of YAML and a terminal can take.
func plain(comment string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, comment)
}
