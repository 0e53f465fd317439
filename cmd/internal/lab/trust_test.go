package lab

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// TestStockSSH comes to a lab's agents as people do who have sourced nothing:
// with stock ssh and the lab's ssh_config.
func TestStockSSH(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("ssh"); err != nil {
		t.Skip(err)
	}
	// Paths with a space are what quoting is for.
	o := options(filepath.Join(t.TempDir(), "a lab"), network())
	o.Objects = 0
	o.Progress = t.Output()
	l, err := Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	// What ssh starts for a jump gets the name of this file without any quoting.
	link := filepath.Join(t.TempDir(), "lab")
	if err := os.Symlink(l.opts.Dir, link); err != nil {
		t.Fatal(err)
	}
	ssh := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "ssh", append([]string{"-F", filepath.Join(link, "ssh_config"), "-o", "BatchMode=yes"}, args...)...)
		cmd.Env = []string{"HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH")}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}

	for i, who := range identities {
		host := []string{nodeName(i % controlNodes), serverName(i % controlNodes)}[i%2]
		out, err := ssh(who.name+"@"+host, "whoami")
		if err != nil || !strings.HasPrefix(out, who.name+"@lab\n") || !strings.Contains(out, "role      "+who.name) {
			t.Errorf("%s at %s: %v\n%s", who.name, host, err, out)
		}
	}
	if out, err := ssh("cp-1", "whoami"); err != nil || !strings.HasPrefix(out, "responder@lab\n") {
		t.Errorf("without a name: %v\n%s", err, out)
	}
	t.Run("either bastion, and none", func(t *testing.T) {
		for _, way := range [][]string{{"-J", "bastion-b"}, {"-J", "observer@bastion-b.bastion"}, {"-o", "ProxyJump=none"}} {
			out, err := ssh(append(way, "observer@cp-2", "whoami")...)
			if err != nil || !strings.HasPrefix(out, "observer@lab\n") {
				t.Errorf("%v: %v\n%s", way, err, out)
			}
		}
		for i := range bastionHosts {
			if out, err := ssh(bastionName(i), "nodes"); err != nil || !strings.Contains(out, "cp-3") {
				t.Errorf("%s: %v\n%s", bastionName(i), err, out)
			}
		}
		if out, err := ssh("-o", "HostKeyAlias=bastion-b.bastion", "bastion-a", "nodes"); err == nil {
			t.Errorf("bastion-a passes for bastion-b:\n%s", out)
		}
		if out, err := ssh("-o", "ProxyCommand=ssh -F "+filepath.Join(link, "ssh_config")+" -W "+l.ip(1)+":2222 bastion-a", "responder@cp-1", "whoami"); err == nil {
			t.Errorf("a bastion that leads to cp-2 does for cp-1:\n%s", out)
		}
	})
	t.Run("a role that the certificate does not have", func(t *testing.T) {
		file := l.file("ids", "observer")
		out, err := ssh("-F", "none", "-p", fmt.Sprint(sshPort), "-i", file, "-o", "IdentitiesOnly=yes", "-o", "UserKnownHostsFile="+quoted(l.file("known_hosts")),
			"-o", "HostKeyAlias=cp-1.lab", "responder@"+l.ip(0), "whoami")
		if err == nil || !strings.Contains(out, "Permission denied") {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("a server under another name, and one that nobody vouches for", func(t *testing.T) {
		for _, option := range []string{"HostKeyAlias=cp-2.lab", "UserKnownHostsFile=/dev/null"} {
			if out, err := ssh("-o", option, "responder@cp-1", "whoami"); err == nil || strings.Contains(out, "responder@lab") {
				t.Errorf("%s: %v\n%s", option, err, out)
			}
		}
	})
	t.Run("strict settings", func(t *testing.T) {
		out, err := ssh("-G", "commander@cp-2")
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{"stricthostkeychecking true", "hostkeyalgorithms ssh-ed25519-cert-v01@openssh.com", "forwardagent no", "identitiesonly yes",
			"port 2222", "hostkeyalias cp-2.lab", "proxyjump commander@bastion-a", "updatehostkeys false", "identityfile " + l.file("ids", "commander")} {
			if !regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(line) + `$`).MatchString(out) {
				t.Errorf("not %q in\n%s", line, out)
			}
		}
	})
	t.Run("automation by mTLS", func(t *testing.T) {
		far := filepath.Join(t.TempDir(), "grpc.sock")
		forward := exec.CommandContext(t.Context(), "ssh", "-F", filepath.Join(link, "ssh_config"), "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-N", "-L", far+":cp-3:7443", "bastion-a")
		if err := forward.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = forward.Process.Kill(); _ = forward.Wait() }()
		eventually(t, "ssh -L", func() bool { _, err := os.Stat(far); return err == nil })
		pair, err := tls.LoadX509KeyPair(l.file("ids", "automation.crt"), l.file("ids", "automation.key"))
		if err != nil {
			t.Fatal(err)
		}
		pem, err := os.ReadFile(l.file("ca.crt"))
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(pem)
		config := &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots, ServerName: serverName(2), NextProtos: []string{"h2"}}
		for _, at := range [][2]string{{"tcp", fmt.Sprintf("%s:%d", l.ip(2), grpcPort)}, {"unix", far}} {
			conn, err := tls.Dial(at[0], at[1], config)
			if err != nil {
				t.Fatalf("%v: %v", at, err)
			}
			conn.Close()
		}
		config.ServerName = serverName(1)
		if conn, err := tls.Dial("tcp", fmt.Sprintf("%s:%d", l.ip(2), grpcPort), config); err == nil {
			conn.Close()
			t.Error("cp-3 passes for cp-2")
		}
	})
	t.Run("nobody else looks in", func(t *testing.T) {
		err := filepath.WalkDir(l.opts.Dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if st, err := d.Info(); err == nil && strings.HasPrefix(path, l.file("ids")+"/") && st.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v", path, st.Mode())
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("environment", func(t *testing.T) {
		out, err := exec.Command("sh", "-ec", `. "$0/env"; echo "$HALLIGAN_BUNDLE"; echo "$HALLIGAN_IDENTITY"`, l.opts.Dir).CombinedOutput()
		if want := l.file("bundle") + "\n" + l.file("ids", "responder") + "\n"; err != nil || string(out) != want {
			t.Errorf("got %q, %v", out, err)
		}
	})
	t.Run("again with the same keys", func(t *testing.T) {
		before := versions(t, l)
		if err := l.makeTrust(); err != nil {
			t.Fatal(err)
		}
		if after := versions(t, l); before != "1 1 1" || after != "2 2 2" {
			t.Errorf("versions %s, then %s", before, after)
		}
		if out, err := ssh("responder@cp-1", "whoami"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

func versions(t *testing.T, l *Lab) string {
	t.Helper()
	data, err := os.ReadFile(l.file("bundle"))
	if err != nil {
		t.Fatal(err)
	}
	f, err := bundle.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	b, err := bundle.Verify(f, nil)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(b.Policy.Version, b.Inventory.Version, b.Revocations.Version)
}
