package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/issuer"
)

func (t *tool) issue() *cobra.Command {
	c := &cobra.Command{
		Use: "issue", Short: "Sign a certificate", Args: cobra.ArbitraryArgs, RunE: group,
		Long: "Signs a certificate, writes it beside its key and says what it is good for. What it is good for can be\n" +
			"narrowed below its role, never widened. Every serial is given out once and recorded in issued.log.",
	}
	c.AddCommand(t.issueUser(), t.issueHost(), t.issueClient(), t.issueServer())
	return c
}

// holderFlags are the flags that say whom a certificate is for.
type holderFlags struct {
	roles, clusters, actions, namespaces, nodes, sources []string
	drill, automation, verify                            bool
}

func (h *holderFlags) add(c *cobra.Command) {
	f := c.Flags()
	f.StringSliceVar(&h.clusters, "clusters", nil, "`names` of the clusters, each of them")
	f.StringSliceVar(&h.actions, "actions", nil, "only actions of these `patterns`, such as scale,get")
	f.StringSliceVar(&h.namespaces, "namespaces", nil, "only namespaces of these `patterns`, and nothing of the whole cluster")
	f.StringSliceVar(&h.nodes, "nodes", nil, "only agents on nodes of these `patterns`")
	f.BoolVar(&h.drill, "drill", false, "only canaries of a drill")
}

func (h *holderFlags) holder(person string) (issuer.Holder, error) {
	out := issuer.Holder{Person: person, Clusters: h.clusters, Automation: h.automation, VerifyRequired: h.verify, SourceAddresses: h.sources,
		Scope: trust.Scope{Actions: h.actions, Namespaces: h.namespaces, Nodes: h.nodes, Drill: h.drill}}
	for _, name := range h.roles {
		role, err := trust.ParseRole(name)
		if err != nil {
			return out, fault.New(fault.Usage, "see: halligan ca issue --help", "%w", err)
		}
		out.Roles = append(out.Roles, role)
	}
	return out, out.Check()
}

// signFlags are the flags of whatever signs a certificate.
type signFlags struct {
	life   time.Duration
	signer string
}

func (s *signFlags) add(c *cobra.Command, life time.Duration, most time.Duration) {
	c.Flags().DurationVar(&s.life, "for", life, "how `long` it is valid, at most "+hours(most))
	s.addSigner(c)
}

func (s *signFlags) addSigner(c *cobra.Command) {
	c.Flags().StringVar(&s.signer, "signer", "", "`file` of the key that signs; a .pub file means the one in the ssh-agent (default: the folder's own)")
}

func (t *tool) issueUser() *cobra.Command {
	var h holderFlags
	var s signFlags
	var key, out string
	c := &cobra.Command{
		Use: "user PERSON --key FILE.pub --roles ROLES --clusters CLUSTERS", Short: "Sign an SSH certificate of a person, or of automation", Args: words(1, "the name of one person"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := t.folder()
			if err != nil {
				return err
			}
			holder, err := h.holder(args[0])
			if err != nil {
				return err
			}
			return f.ssh(userCA, s, key, out, "user", args[0], issuer.MaxLife, func(k *issuer.Key, public ssh.PublicKey, serial uint64, v issuer.Validity) (*ssh.Certificate, error) {
				return k.User(public, holder, serial, v)
			})
		},
	}
	c.Flags().StringSliceVar(&h.roles, "roles", nil, "`roles` that may be taken: observer, responder, commander, approver")
	h.add(c)
	c.Flags().BoolVar(&h.automation, "automation", false, "the holder is a program, not a person")
	c.Flags().StringSliceVar(&h.sources, "source-address", nil, "only from these IP addresses or `ranges`")
	c.Flags().BoolVar(&h.verify, "verify-required", false, "for an approver who does not log in: the PIN of a FIDO2 key with every signature")
	keyFlags(c, &key, &out)
	s.add(c, issuer.DefaultLife, issuer.MaxLife)
	return c
}

func (t *tool) issueHost() *cobra.Command {
	var s signFlags
	var key, out string
	c := &cobra.Command{
		Use: "host NODE.CLUSTER --key FILE.pub", Short: "Sign the SSH certificate of an agent or a bastion", Args: words(1, "a name NODE.CLUSTER"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := t.folder()
			if err != nil {
				return err
			}
			if err := issuer.CheckServer(args[0]); err != nil {
				return err
			}
			return f.ssh(hostCA, s, key, out, "host", args[0], issuer.MaxNodeLife, func(k *issuer.Key, public ssh.PublicKey, serial uint64, v issuer.Validity) (*ssh.Certificate, error) {
				return k.Host(public, args[0], serial, v)
			})
		},
	}
	keyFlags(c, &key, &out)
	s.add(c, issuer.DefaultNodeLife, issuer.MaxNodeLife)
	return c
}

// longest returns how long a certificate of the kind may live: the policy in the
// bundle may say less than most, and agents refuse what lives longer.
func (f *Folder) longest(kind string, most time.Duration) (time.Duration, error) {
	current, err := f.current()
	if err == nil && current.Policy != nil && (kind == "user" || kind == "client") {
		most = min(most, time.Duration(current.Policy.MaxCertificate))
	}
	return most, err
}

// doubt says why agents would refuse a certificate under the bundle that is here.
func (f *Folder) doubt(kind string, clusters []string, by ssh.PublicKey) error {
	current, err := f.current()
	if err != nil || current.Policy == nil {
		return err
	}
	a := current.Policy.Authorities
	authorities := map[string][]bundle.Key{"user": a.User, "host": a.Host}[kind]
	for _, cert := range map[string]bundle.CAs{"client": a.TLSClient, "server": a.TLSServer}[kind].Certificates {
		if key, err := ssh.NewPublicKey(cert.PublicKey); err == nil {
			authorities = append(authorities, bundle.Key{PublicKey: key})
		}
	}
	if !slices.ContainsFunc(authorities, func(k bundle.Key) bool { return same(k, by) }) {
		f.say("  REFUSED by every agent until a policy in the bundle names %s as its authority", ssh.FingerprintSHA256(by))
	}
	for _, c := range clusters {
		if _, known := current.Inventory.Cluster(c); !known {
			f.say("  the inventory in the bundle has no cluster %s", c)
		}
	}
	return nil
}

func keyFlags(c *cobra.Command, key, out *string) {
	c.Flags().StringVar(key, "key", "", "public key to certify: a `file` such as ssh-keygen writes, NAME.pub")
	c.Flags().StringVar(out, "out", "", "`file` of the certificate (default: NAME-cert.pub beside the key)")
}

// ssh reads a public key, has it certified, and records and writes what came of it.
func (f *Folder) ssh(ca string, s signFlags, keyFile, out, kind, name string, most time.Duration,
	sign func(*issuer.Key, ssh.PublicKey, uint64, issuer.Validity) (*ssh.Certificate, error)) error {
	if keyFile == "" {
		return fault.New(fault.Usage, "give --key FILE.pub; make one with ssh-keygen -t ed25519", "there is no key to certify")
	}
	public, _, err := issuer.ReadPublic(keyFile)
	if err != nil {
		return err
	}
	if out == "" {
		out = strings.TrimSuffix(keyFile, ".pub") + "-cert.pub"
	}
	if err := f.refuseRevoked(name, public); err != nil {
		return err
	}
	if most, err = f.longest(kind, most); err != nil {
		return err
	}
	v, err := issuer.From(f.now(), s.life, most)
	if err != nil {
		return err
	}
	k, err := f.Key(ca, s.signer)
	if err != nil {
		return err
	}
	defer k.Close()
	serial, err := f.serial()
	if err != nil {
		return err
	}
	cert, err := sign(k, public, serial, v)
	if err != nil {
		return err
	}
	return f.hand(out, kind, cert)
}

// hand records an SSH certificate, writes it and says what it is.
func (f *Folder) hand(out, kind string, cert *ssh.Certificate) error {
	end := time.Unix(int64(cert.ValidBefore), 0).UTC() // #nosec G115 -- made from one
	line := issued{Time: f.now().UTC().Truncate(time.Second), Kind: kind, Name: cert.KeyId, Serial: cert.Serial, NotAfter: end, Key: ssh.FingerprintSHA256(cert.Key)}
	if kind == "user" {
		line.Roles, line.Clusters = cert.ValidPrincipals, strings.Split(cert.CriticalOptions[credential.OptionClusters], ",")
	}
	if err := f.record(line); err != nil {
		return err
	}
	if err := durable.Write(out, issuer.PublicLine(cert, cert.KeyId)); err != nil {
		return err
	}
	f.say("%s: %s certificate", out, kind)
	f.what(line)
	f.say("  signed by %s", ssh.FingerprintSHA256(cert.SignatureKey))
	if err := f.doubt(kind, line.Clusters, cert.SignatureKey); err != nil {
		return err
	}
	f.say("see all of it: ssh-keygen -L -f %s", out)
	return nil
}

func (f *Folder) what(line issued) {
	f.say("  name      %s", line.Name)
	if len(line.Roles) > 0 {
		f.say("  roles     %s", strings.Join(line.Roles, ", "))
		f.say("  clusters  %s", strings.Join(line.Clusters, ", "))
	}
	f.say("  key       %s", line.Key)
	f.say("  serial    %d", line.Serial)
	f.say("  valid     until %s, %s from now", line.NotAfter.Format(time.RFC3339), hours(line.NotAfter.Sub(f.now()).Round(time.Minute)))
}

func (t *tool) issueClient() *cobra.Command {
	var h holderFlags
	var s signFlags
	var role, csr, out string
	c := &cobra.Command{
		Use: "client NAME --role ROLE --clusters CLUSTERS", Short: "Sign a TLS client certificate of automation", Args: words(1, "the name of one automation"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := t.folder()
			if err != nil {
				return err
			}
			if role != "" {
				h.roles = []string{role}
			}
			holder, err := h.holder(args[0])
			if err != nil {
				return err
			}
			return f.tls(tlsClientCA, s, csr, out, "client", args[0], issuer.MaxLife, func(a *issuer.Authority, public crypto.PublicKey, serial uint64, v issuer.Validity) (*x509.Certificate, error) {
				return a.Client(public, holder, serial, v)
			})
		},
	}
	c.Flags().StringVar(&role, "role", "", "the one `role` that it takes: observer, responder or commander")
	h.add(c)
	requestFlags(c, &csr, &out)
	s.add(c, issuer.DefaultLife, issuer.MaxLife)
	return c
}

func (t *tool) issueServer() *cobra.Command {
	var s signFlags
	var csr, out string
	c := &cobra.Command{
		Use: "server NODE.CLUSTER", Short: "Sign the TLS certificate of an agent", Args: words(1, "a name NODE.CLUSTER"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := t.folder()
			if err != nil {
				return err
			}
			if err := issuer.CheckServer(args[0]); err != nil {
				return err
			}
			return f.tls(tlsServerCA, s, csr, out, "server", args[0], issuer.MaxNodeLife, func(a *issuer.Authority, public crypto.PublicKey, serial uint64, v issuer.Validity) (*x509.Certificate, error) {
				return a.Server(public, args[0], serial, v)
			})
		},
	}
	requestFlags(c, &csr, &out)
	s.add(c, issuer.DefaultNodeLife, issuer.MaxNodeLife)
	return c
}

func requestFlags(c *cobra.Command, csr, out *string) {
	c.Flags().StringVar(csr, "csr", "", "`file` of a signing request, of which only the key is taken (default: make a key)")
	c.Flags().StringVar(out, "out", "", "`base` name of what is written: BASE.crt, and BASE.key where a key is made (default: the name)")
}

// tls takes the key of a request, or makes one, and has it certified.
func (f *Folder) tls(ca string, s signFlags, csr, out, kind, name string, most time.Duration,
	sign func(*issuer.Authority, crypto.PublicKey, uint64, issuer.Validity) (*x509.Certificate, error)) error {
	if out == "" {
		out = name
	}
	most, err := f.longest(kind, most)
	if err != nil {
		return err
	}
	v, err := issuer.From(f.now(), s.life, most)
	if err != nil {
		return err
	}
	var public crypto.PublicKey
	var private []byte
	if csr != "" {
		public, err = requested(csr)
	} else if err = newFile(out+".key", "renew its certificate (halligan ca renew "+out+".crt), or choose another name with --out"); err == nil {
		public, private, err = leafKey()
	}
	if err != nil {
		return err
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		return fault.New(fault.Usage, "take an ECDSA or ed25519 key", "the key cannot be certified: %w", err)
	}
	if err := f.refuseRevoked(name, key); err != nil {
		return err
	}
	a, k, err := f.authority(ca, s.signer)
	if err != nil {
		return err
	}
	defer k.Close()
	serial, err := f.serial()
	if err != nil {
		return err
	}
	cert, err := sign(a, public, serial, v)
	if err != nil {
		return err
	}
	if private != nil {
		if err := durable.Write(out+".key", private); err != nil {
			return err
		}
	}
	return f.handTLS(out+".crt", kind, cert, key, k.Public())
}

// handTLS records an X.509 certificate, writes it and says what it is.
func (f *Folder) handTLS(out, kind string, cert *x509.Certificate, key, by ssh.PublicKey) error {
	line := issued{Time: f.now().UTC().Truncate(time.Second), Kind: kind, Name: cert.Subject.CommonName, Serial: cert.SerialNumber.Uint64(), NotAfter: cert.NotAfter, Key: ssh.FingerprintSHA256(key)}
	if kind == "client" && len(cert.URIs) == 1 {
		line.Roles, line.Clusters = []string{strings.TrimPrefix(cert.URIs[0].Path, "/")}, strings.Split(cert.URIs[0].Host, ",")
	}
	if err := f.record(line); err != nil {
		return err
	}
	if err := durable.Write(out, certificatePEM(cert)); err != nil {
		return err
	}
	f.say("%s: TLS %s certificate", out, kind)
	f.what(line)
	f.say("  signed by %s", cert.Issuer.CommonName)
	if err := f.doubt(kind, line.Clusters, by); err != nil {
		return err
	}
	f.say("see all of it: openssl x509 -noout -text -in %s", out)
	return nil
}

func leafKey() (crypto.PublicKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return key.Public(), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// requested returns the key of a request whose maker has its private half.
func requested(file string) (crypto.PublicKey, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fault.New(fault.Usage, "name a readable file", "signing request: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fault.New(fault.Usage, "make one: openssl req -new -key KEY -subj /CN=x -out FILE", "%s is no signing request", file)
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = request.CheckSignature()
	}
	if err != nil {
		return nil, fault.New(fault.Usage, "make one: openssl req -new -key KEY -subj /CN=x -out FILE", "%s is no signing request: %w", file, err)
	}
	return request.PublicKey, nil
}

func (t *tool) renew() *cobra.Command {
	var s signFlags
	c := &cobra.Command{
		Use: "renew CERT", Short: "Sign a certificate anew: the same key, name and scope, a new validity and serial", Args: words(1, "one certificate"),
		Long: "Replaces a certificate of this authority, NAME-cert.pub or NAME.crt, by one for the same key, name, roles and\n" +
			"scope, valid from now for as long as the old one was. One that was revoked is not renewed.",
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := t.folder()
			if err != nil {
				return err
			}
			data, err := os.ReadFile(args[0])
			if err != nil {
				return fault.New(fault.Usage, "name NAME-cert.pub or NAME.crt", "certificate: %w", err)
			}
			if block, _ := pem.Decode(data); block != nil {
				return f.renewTLS(args[0], s)
			}
			return f.renewSSH(args[0], s)
		},
	}
	c.Flags().DurationVar(&s.life, "for", 0, "how `long` it is valid (default: as the old one was)")
	s.addSigner(c)
	return c
}

// again is the validity of a new certificate after an old one.
func (f *Folder) again(kind string, old issuer.Validity, life, most time.Duration) (issuer.Validity, error) {
	longest, err := f.longest(kind, most)
	if err != nil {
		return issuer.Validity{}, err
	}
	if life == 0 {
		if life = old.Life(); life <= most { // else it was made by somebody else
			life = min(life, longest)
		}
	}
	return issuer.From(f.now(), life, longest)
}

func (f *Folder) renewSSH(file string, s signFlags) error {
	public, _, err := issuer.ReadPublic(file)
	if err != nil {
		return err
	}
	old, ok := public.(*ssh.Certificate)
	if !ok {
		return fault.New(fault.Usage, "name NAME-cert.pub", "%s is a key, not a certificate", file)
	}
	if err := f.refuse(func(r *bundle.Revocations) (string, bool) { return r.Certificate(old) }); err != nil {
		return err
	}
	kind, ca, most := "user", userCA, issuer.MaxLife
	if old.CertType == ssh.HostCert {
		kind, ca, most = "host", hostCA, issuer.MaxNodeLife
	}
	k, err := f.Key(ca, s.signer)
	if err != nil {
		return err
	}
	defer k.Close()
	if err := k.CheckSSH(old); err != nil {
		return err
	}
	v, err := f.again(kind, issuer.Of(old), s.life, most)
	if err != nil {
		return err
	}
	serial, err := f.serial()
	if err != nil {
		return err
	}
	cert, err := k.Again(old, serial, v)
	if err != nil {
		return err
	}
	return f.hand(file, kind, cert)
}

func (f *Folder) renewTLS(file string, s signFlags) error {
	old, err := readCertificate(file)
	if err != nil {
		return err
	}
	key, err := ssh.NewPublicKey(old.PublicKey)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if err := f.refuse(func(r *bundle.Revocations) (string, bool) { return r.X509(old) }); err != nil {
		return err
	}
	kind, ca, most := "client", tlsClientCA, issuer.MaxLife
	if len(old.DNSNames) > 0 {
		kind, ca, most = "server", tlsServerCA, issuer.MaxNodeLife
	}
	a, k, err := f.authority(ca, s.signer)
	if err != nil {
		return err
	}
	defer k.Close()
	v, err := f.again(kind, issuer.Validity{NotBefore: old.NotBefore, NotAfter: old.NotAfter}, s.life, most)
	if err != nil {
		return err
	}
	serial, err := f.serial()
	if err != nil {
		return err
	}
	cert, err := a.Again(old, serial, v)
	if err != nil {
		return err
	}
	return f.handTLS(file, kind, cert, key, k.Public())
}
