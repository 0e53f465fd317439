// Package testagent plays ssh-agents and FIDO2 tokens for tests.
//
// It must never be linked into a program: its tokens have no hardware. It stands
// on floor 0.
package testagent

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// Serve serves the agent until the test ends, and returns its socket.
func Serve(t testing.TB, a agent.Agent) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent") // sockets have short names only
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex // guards live
	live := map[net.Conn]bool{}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			live[conn] = true
			mu.Unlock()
			serving.Go(func() {
				defer conn.Close()
				_ = agent.ServeAgent(a, conn)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for conn := range live {
			conn.Close()
		}
		mu.Unlock()
		serving.Wait()
		os.RemoveAll(dir)
	})
	return socket
}

// Token is an ssh-agent that holds one FIDO2 key, as hardware would.
type Token struct {
	agent.ExtendedAgent // nil: what is not below is not asked for
	Private             ed25519.PrivateKey
	// Certificate is one for the key, if it has one.
	Certificate *gossh.Certificate
	// Touch is closed when somebody touches the token; nil: somebody always does.
	Touch chan struct{}
}

// application is what ssh-keygen binds a key to, unless it is told otherwise.
const application = "ssh:"

// Public returns the key.
func (k *Token) Public() gossh.PublicKey {
	public, err := gossh.ParsePublicKey(gossh.Marshal(struct {
		Type        string
		Key         []byte
		Application string
	}{gossh.KeyAlgoSKED25519, k.Private.Public().(ed25519.PublicKey), application}))
	if err != nil {
		panic(err)
	}
	return public
}

// List returns the key and its certificate.
func (k *Token) List() ([]*agent.Key, error) {
	keys := []*agent.Key{{Format: k.Public().Type(), Blob: k.Public().Marshal(), Comment: "token"}}
	if k.Certificate != nil {
		keys = append(keys, &agent.Key{Format: k.Certificate.Type(), Blob: k.Certificate.Marshal(), Comment: "token"})
	}
	return keys, nil
}

// Extension knows none.
func (k *Token) Extension(string, []byte) ([]byte, error) { return nil, agent.ErrExtensionUnsupported }

// Sign signs once the token is touched.
func (k *Token) Sign(key gossh.PublicKey, data []byte) (*gossh.Signature, error) {
	return k.SignWithFlags(key, data, 0)
}

// SignWithFlags signs as a token does (PROTOCOL.u2f in OpenSSH's sources): over
// the application, the flags, the counter and the message.
func (k *Token) SignWithFlags(_ gossh.PublicKey, data []byte, _ agent.SignatureFlags) (*gossh.Signature, error) {
	if k.Touch != nil {
		<-k.Touch
	}
	const present = 1
	app, message := sha256.Sum256([]byte(application)), sha256.Sum256(data)
	tail := binary.BigEndian.AppendUint32([]byte{present}, 1)
	signed := append(append(append([]byte{}, app[:]...), tail...), message[:]...)
	return &gossh.Signature{Format: gossh.KeyAlgoSKED25519, Blob: ed25519.Sign(k.Private, signed), Rest: tail}, nil
}
