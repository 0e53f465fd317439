package trust

import "errors"

// ErrRevoked is in the chain of the fault with which an identity ends that was
// taken back: by serial, key ID or key, by its authority leaving the policy, or
// by a sealed key no longer listed. A certificate that only lapsed does not have
// it. An action under way stops between two objects for the former, not for the
// latter.
var ErrRevoked = errors.New("revoked")
