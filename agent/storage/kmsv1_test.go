package storage

//lint:file-ignore SA1019 KMS v1 is deprecated, and yet what it encrypted in a cluster of 1.28 must open.

import (
	"bytes"
	"context"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	kmsv1 "k8s.io/kms/apis/v1beta1"

	"github.com/halligan-io/halligan/internal/fault"
)

// kmsV1Plugin is the plugin of a cluster that still has KMS v1.
type kmsV1Plugin struct {
	kmsv1.UnsafeKeyManagementServiceServer
}

func (kmsV1Plugin) Version(context.Context, *kmsv1.VersionRequest) (*kmsv1.VersionResponse, error) {
	return &kmsv1.VersionResponse{Version: "v1beta1", RuntimeName: "test", RuntimeVersion: "0"}, nil
}

func (kmsV1Plugin) Decrypt(_ context.Context, r *kmsv1.DecryptRequest) (*kmsv1.DecryptResponse, error) {
	return &kmsv1.DecryptResponse{Plain: flip(r.Cipher)}, nil
}

func (kmsV1Plugin) Encrypt(_ context.Context, r *kmsv1.EncryptRequest) (*kmsv1.EncryptResponse, error) {
	return &kmsv1.EncryptResponse{Cipher: flip(r.Plain)}, nil
}

func TestKMSv1(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "kms.sock")
	stop := serveKMS(t, socket, func(s *grpc.Server) { kmsv1.RegisterKeyManagementServiceServer(s, kmsV1Plugin{}) })
	config := rule("secrets", "kms-v1:old:"+socket)
	tr, k := load(t, config), kindNamed(t, "secrets")
	stored := seal(t, tr, "secrets", secretKey, secretPlain)
	if !bytes.HasPrefix(stored, []byte("k8s:enc:kms:v1:old:")) {
		t.Fatalf("sealed as %q", stored)
	}
	if got, err := load(t, config).Open(t.Context(), k, secretKey, stored); err != nil || !bytes.Equal(got, secretPlain) {
		t.Errorf("%q, %v", got, err)
	}
	stop()
	_, err := load(t, config).Open(t.Context(), k, secretKey, stored)
	checkSealed(t, err, fault.Encrypted, "old", socket)
}
