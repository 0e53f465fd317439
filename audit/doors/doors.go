// Package doors is what both daemons do with their evidence: the section of their
// configuration, the log that they open, what their doors write into it, and what
// they tell people about it. What is done to a cluster is recorded by what does it;
// see audit.Do.
//
// It must never block a door, let strangers push events out of the log, or write
// down the value of a secret. It stands on floor 2.
package doors
