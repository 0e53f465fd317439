package cli

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	gossh "golang.org/x/crypto/ssh"
	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/internal/trust/issuer"
)

// realBastion is a bastion in a process of its own.
type realBastion struct {
	name    string
	address netip.AddrPort
	cmd     *exec.Cmd // nil: it does not run
	log     saying
}

// saying is what a process writes while it is read.
type saying struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (s *saying) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *saying) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// newBastion has an address that nobody has at the moment.
func newBastion(name string) *realBastion {
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	return &realBastion{name: name, address: netip.MustParseAddrPort(l.Addr().String())}
}

// startBastion starts it under a name, and returns when it lets people in and its
// store works, without which there is no mailbox.
func (f *fleetStage) startBastion(b *realBastion, name string) {
	dir := must(os.MkdirTemp(f.dir, "bastion"))
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			panic(err)
		}
		return path
	}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	key := pem.EncodeToMemory(must(gossh.MarshalPrivateKey(must(private, err), name)))
	f.serial++
	cert := must(f.keys.Host.Host(must(gossh.NewPublicKey(private.Public())), name+".bastion", f.serial, issuer.Validity{NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(issuer.DefaultNodeLife)}))
	config := must(yaml.Marshal(map[string]any{
		"name": name, "stateDir": filepath.Join(dir, "state"), "trust": map[string]any{"bundle": file("bundle", f.file.Format())},
		"ssh":     map[string]any{"listen": []string{b.address.String()}, "hostKey": file("key", key), "hostCertificate": file("cert", gossh.MarshalAuthorizedKey(cert))},
		"metrics": map[string]any{"listen": "off"},
	}))
	argv := append(bastionCommand(), "--config", file("bastion.yaml", config))
	b.cmd = exec.Command(argv[0], argv[1:]...)
	// No bastion outlives its test, however that ends.
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	b.log.text.Reset()
	b.cmd.Stdout, b.cmd.Stderr = &b.log, &b.log
	if err := b.cmd.Start(); err != nil {
		panic(err)
	}
	for range 3000 {
		if strings.Contains(b.log.String(), "store works") {
			if conn, err := net.Dial("tcp", b.address.String()); err == nil {
				conn.Close()
				return
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	b.kill()
	panic(fmt.Sprintf("%s does not answer: %s", name, b.log.String()))
}

// kill ends it at once, as kill -9 does.
func (b *realBastion) kill() {
	if b.cmd != nil {
		_ = b.cmd.Process.Kill()
		_ = b.cmd.Wait()
		b.cmd = nil
	}
}

// TestBastions runs the real command against real SSH doors behind two real
// bastions, which die, freeze and are not who they should be.
func TestBastions(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/bastion",
		RequireExplicitExec: true,
		Setup:               func(env *testscript.Env) error { return furnishFleet(t, env, 2) },
		Cmds:                fleetCommands(),
	})
}
