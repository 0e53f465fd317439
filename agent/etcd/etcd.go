// Package etcd is Halligan's way to the cluster's etcd: bounded reads, writes
// that compare and swap one key at a time, and an honest answer when the
// outcome of a write is not known.
//
// It must never write without a comparison, never delete more than one key in a
// transaction, and never repeat a write whose outcome is unknown. It knows
// nothing of Kubernetes. It stands on floor 4, below agent/action.
package etcd
