package api

import (
	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// BundleStatus says which bundle is in force, nil for none.
func BundleStatus(b *bundle.Bundle) *halliganv1.BundleStatus {
	if b == nil {
		return nil
	}
	return &halliganv1.BundleStatus{PolicyVersion: b.Policy.Version, InventoryVersion: b.Inventory.Version, RevocationsVersion: b.Revocations.Version,
		Signed: timestamppb.New(b.Signed()), FreshUntil: timestamppb.New(b.FreshUntil()), Hash: b.Hash}
}
