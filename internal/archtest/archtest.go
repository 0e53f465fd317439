// Package archtest holds the rules of the repository's architecture as tests:
// which folder may import which, what each binary may link, and what every
// package says of itself. It has no code of its own, must never be imported,
// and stands on floor 0.
package archtest
