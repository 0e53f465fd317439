package storage

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/halligan-io/halligan/internal/fault"
)

// bindings makes a binding of the subjects in each format of storage.
func bindings(t testing.TB, names ...string) map[string][]byte {
	t.Helper()
	b := binding(names...)
	wire := encode(t, b)
	b.APIVersion, b.Kind = "rbac.authorization.k8s.io/v1", "ClusterRoleBinding"
	text, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{"protobuf": wire, "JSON": text}
}

// removals are the edits that take out every subject of the name.
func removals(t testing.TB, plain []byte, name string) (edits []Edit) {
	t.Helper()
	for i, n := range strings.Fields(subjectNames(t, plain)) {
		if n == name {
			edits = append(edits, Edit{Field: Subjects, Index: i})
		}
	}
	return edits
}

func TestEqualSubjects(t *testing.T) {
	for _, test := range []struct{ before, after, meanwhile, back string }{
		{"a a", "", "", "a a"},
		{"a b a c a", "b c", "b c", "a b a c a"},
		{"a b a c a", "b c", "a b a c a", "a b a c a"}, // reverted already
		{"a b a c a", "b c", "a b c", "a a a b c"},     // one is there again, two are missing
		{"a b a c a", "b c", "c", "a c a a"},
		{"a b a c a", "b c", "a a a a", "a a a a"},
	} {
		for format, plain := range bindings(t, strings.Fields(test.before)...) {
			at := format + " " + test.before + " / " + test.meanwhile
			out, changes, err := bindingKind.Apply(plain, removals(t, plain, "a")...)
			if err != nil || subjectNames(t, out) != test.after {
				t.Fatalf("%s: %q, %v", at, subjectNames(t, out), err)
			}
			checkHolds(t, at, out, changes, true)
			checkHolds(t, at, plain, changes, false)
			meanwhile := bindings(t, strings.Fields(test.meanwhile)...)[format]
			checkHolds(t, at+" meanwhile", meanwhile, changes, !strings.Contains(test.meanwhile, "a"))
			back, reverted, err := bindingKind.Revert(meanwhile, changes)
			if err != nil || subjectNames(t, back) != test.back {
				t.Errorf("%s: put back are %q, %v", at, subjectNames(t, back), err)
			}
			checkHolds(t, at+" back", back, reverted, true)
			if len(reverted) > 0 {
				checkHolds(t, at+" not back", meanwhile, reverted, false)
			}
			// A second Revert finds nothing to do, and one of the Revert gives
			// what was before it.
			if again, more, err := bindingKind.Revert(back, changes); err != nil || len(more) > 0 || !bytes.Equal(again, back) {
				t.Errorf("%s: reverted twice: %+v, %v", at, more, err)
			}
			if undone, _, err := bindingKind.Revert(back, reverted); err != nil || subjectNames(t, undone) != test.meanwhile {
				t.Errorf("%s: undone the undo are %q, %v", at, subjectNames(t, undone), err)
			}
		}
	}
}

func checkHolds(t *testing.T, at string, plain []byte, changes []Change, want bool) {
	t.Helper()
	if got, err := bindingKind.Holds(plain, changes); got != want || err != nil {
		t.Errorf("%s: Holds is %v, %v, want %v", at, got, err, want)
	}
}

// TestSomeOfEqualSubjects takes out one of several equal elements: those that
// stay are not those that an undo puts back.
func TestSomeOfEqualSubjects(t *testing.T) {
	for format, plain := range bindings(t, "a", "b", "a", "a") {
		out, changes, err := bindingKind.Apply(plain, Edit{Field: Subjects, Index: 2})
		if err != nil || subjectNames(t, out) != "a b a" {
			t.Fatalf("%s: %q, %v", format, subjectNames(t, out), err)
		}
		checkHolds(t, format, out, changes, true)
		checkHolds(t, format, plain, changes, false)
		checkHolds(t, format, bindings(t, "b")[format], changes, true)
		back, reverted, err := bindingKind.Revert(out, changes)
		if err != nil || !bytes.Equal(back, plain) {
			t.Errorf("%s: put back are %q, %v", format, subjectNames(t, back), err)
		}
		if back, more, err := bindingKind.Revert(plain, changes); err != nil || len(more) > 0 || !bytes.Equal(back, plain) {
			t.Errorf("%s: reverted twice: %+v, %v", format, more, err)
		}
		checkHolds(t, format+" not back", out, reverted, false)
		_, _, err = bindingKind.Revert(out, reverted)
		wantFault(t, err, fault.Stale)
	}
}

// TestListEditsAtRandom compares with the same on a slice of names.
func TestListEditsAtRandom(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		names := make([]string, random.IntN(9))
		for i := range names {
			names[i] = string(rune('a' + random.IntN(3)))
		}
		var edits []Edit
		var left []string
		for i, name := range names {
			if random.IntN(2) == 0 {
				edits = append(edits, Edit{Field: Subjects, Index: i})
			} else {
				left = append(left, name)
			}
		}
		random.Shuffle(len(edits), func(i, j int) { edits[i], edits[j] = edits[j], edits[i] })
		for format, plain := range bindings(t, names...) {
			out, changes, err := bindingKind.Apply(plain, edits...)
			if err != nil || subjectNames(t, out) != strings.Join(left, " ") {
				t.Fatalf("%s %v but %+v: %q, %v", format, names, edits, subjectNames(t, out), err)
			}
			if len(edits) == 0 {
				continue
			}
			checkHolds(t, format, out, changes, true)
			checkHolds(t, format, plain, changes, false)
			checkRevert(t, fmt.Sprint(format, names, edits), bindingKind, mustDecode(t, plain), plain, out, changes)
			back, reverted, err := bindingKind.Revert(out, changes)
			if err != nil {
				t.Fatal(err)
			}
			if undone, _, err := bindingKind.Revert(back, reverted); err != nil || !bytes.Equal(undone, out) {
				t.Fatalf("%s %v but %+v: undone the undo are %q, %v", format, names, edits, subjectNames(t, undone), err)
			}
		}
	}
}

// TestJSONListsKeepTheirSpelling takes elements out of, and puts them into,
// lists that were not written by an encoder.
func TestJSONListsKeepTheirSpelling(t *testing.T) {
	k := customKind("spec", "replicas")
	k.Fields[Subjects] = Field{Type: List, JSON: []string{"subjects"}}
	for _, test := range []struct {
		list string
		gone []int
		want string
	}{
		{`[ {"b":1, "a":2} , 7 ,"x" ]`, []int{1}, `[ {"b":1, "a":2} , "x" ]`},
		{`[ 1 ,2, 3 ]`, []int{0, 2}, `[ 2 ]`},
		{`[ 1 ,2, 3 ]`, []int{1, 2}, `[ 1 ]`},
		{`[ 1 ,2, 3 ]`, []int{0, 1, 2}, `[  ]`},
	} {
		plain := []byte(head + `,"subjects":` + test.list + `}`)
		var edits []Edit
		for _, i := range test.gone {
			edits = append(edits, Edit{Field: Subjects, Index: i})
		}
		out, changes, err := k.Apply(plain, edits...)
		if err != nil || string(out) != head+`,"subjects":`+test.want+`}` {
			t.Errorf("%s without %v: %s, %v", test.list, test.gone, out, err)
			continue
		}
		for _, into := range [][]byte{out, []byte(head + `,"subjects":null}`), []byte(head + `}`)} {
			back, _, err := k.Revert(into, changes)
			if err != nil {
				t.Errorf("%s into %s: %v", test.list, into, err)
				continue
			}
			again, _, err := k.Apply(back, edits[:0]...)
			if err != nil || !json.Valid(again) {
				t.Errorf("%s into %s: %s, %v", test.list, into, again, err)
			}
			if bytes.Equal(into, out) && !slices.Equal(compacted(t, back), compacted(t, plain)) {
				t.Errorf("%s reverted is %s", test.list, back)
			}
		}
	}
}

func compacted(t *testing.T, text []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := json.Compact(&out, text); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestManySubjects revokes from, and gives back to, the largest bindings that
// etcd takes. Work that grows with the square of their subjects would take
// minutes and gigabytes; the bounds leave room for slow machines.
func TestManySubjects(t *testing.T) {
	const n = 36_000
	for format, different := range map[string]bool{"protobuf": false, "JSON": true} {
		names := make([]string, n)
		for i := range names {
			if names[i] = "a"; different {
				names[i] = fmt.Sprint(i)
			} else if i%2 == 1 {
				names[i] = "b"
			}
		}
		plain := bindings(t, names...)[format]
		if len(plain) > maxValueBytes {
			names = names[:n*9/10*maxValueBytes/len(plain)]
			plain = bindings(t, names...)[format]
		}
		t.Run(format, func(t *testing.T) {
			var edits []Edit
			for i, name := range names {
				if different || name == "a" {
					edits = append(edits, Edit{Field: Subjects, Index: i})
				}
			}
			var out, back []byte
			var changes, reverted []Change
			bounded(t, "Apply", func() (err error) {
				out, changes, err = bindingKind.Apply(plain, edits...)
				return err
			})
			bounded(t, "Holds", func() error {
				checkHolds(t, "out", out, changes, true)
				return nil
			})
			bounded(t, "Revert", func() (err error) {
				back, reverted, err = bindingKind.Revert(out, changes)
				return err
			})
			if len(changes) != len(edits) || len(reverted) != len(edits) || !bytes.Equal(back, plain) {
				t.Errorf("%d bytes are %d after %d changes and %d", len(plain), len(back), len(changes), len(reverted))
			}
			bounded(t, "Revert of the Revert", func() (err error) {
				back, _, err = bindingKind.Revert(back, reverted)
				return err
			})
			if !bytes.Equal(back, out) {
				t.Error("the undo of the undo gives something else")
			}
		})
	}
}

func bounded(t *testing.T, what string, do func() error) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	began := time.Now()
	if err := do(); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	took := time.Since(began)
	runtime.ReadMemStats(&after)
	mebibytes := (after.TotalAlloc - before.TotalAlloc) >> 20
	t.Logf("%s took %v and %d MiB", what, took.Round(time.Millisecond), mebibytes)
	if mebibytes > 300 || took > 20*time.Second {
		t.Errorf("%s took %v and allocated %d MiB", what, took, mebibytes)
	}
}

// FuzzSubjects removes some of a binding's subjects, and takes that back in a
// binding that changed meanwhile. Every letter is a subject.
func FuzzSubjects(f *testing.F) {
	f.Add("abca", uint64(1), "bc")
	f.Add("aaaa", uint64(5), "")
	f.Add("aaaa", uint64(15), "xaa")
	f.Add("abacabad", uint64(0x55), "dabacaba")
	f.Fuzz(func(t *testing.T, before string, mask uint64, meanwhile string) {
		if len(before) > 64 || len(meanwhile) > 64 || strings.ContainsFunc(before+meanwhile, func(r rune) bool { return r < '!' || r > '~' }) {
			return
		}
		letters := func(s string) string { return strings.Join(strings.Split(s, ""), " ") }
		var edits []Edit
		removed, left := map[string]int{}, ""
		for i, name := range strings.Split(before, "") {
			if mask>>i&1 == 1 {
				edits = append(edits, Edit{Field: Subjects, Index: i})
				removed[name]++
			} else {
				left += name
			}
		}
		others := bindings(t, strings.Split(meanwhile, "")...)
		for format, plain := range bindings(t, strings.Split(before, "")...) {
			out, changes, err := bindingKind.Apply(plain, edits...)
			if err != nil || subjectNames(t, out) != letters(left) {
				t.Fatalf("%s: left are %q, %v", format, subjectNames(t, out), err)
			}
			if back, _, err := bindingKind.Revert(out, changes); err != nil || !bytes.Equal(back, plain) {
				t.Fatalf("%s: put back are %q, %v", format, subjectNames(t, back), err)
			}
			back, reverted, err := bindingKind.Revert(others[format], changes)
			if err != nil {
				t.Fatal(err)
			}
			checkHolds(t, format, back, reverted, true)
			for name, n := range removed {
				was, now := strings.Count(meanwhile, name), strings.Count(subjectNames(t, back), name)
				if want := was + max(0, min(n, n+strings.Count(left, name)-was)); now != want {
					t.Fatalf("%s: %d of %s became %d, want %d", format, was, name, now, want)
				}
			}
			undone, _, err := bindingKind.Revert(back, reverted)
			if err != nil || subjectNames(t, undone) != letters(meanwhile) {
				t.Fatalf("%s: undone the undo are %q, %v", format, subjectNames(t, undone), err)
			}
		}
	})
}

// TestVerifyCatchesLists records one change of a list and makes another.
func TestVerifyCatchesLists(t *testing.T) {
	f := bindingKind.Fields[Subjects]
	for format, plain := range bindings(t, "a", "b", "c", "b") {
		for name, makes := range map[string]struct {
			recorded, gone []bool
			insert         []int // elements to put in front of themselves
		}{
			"the same":       {[]bool{false, true, false, false}, []bool{false, true, false, false}, nil},
			"nothing":        {[]bool{false, true, false, false}, []bool{false, false, false, false}, nil},
			"another":        {[]bool{false, true, false, false}, []bool{true, false, false, false}, nil},
			"an equal one":   {[]bool{false, true, false, false}, []bool{false, false, false, true}, nil},
			"one more":       {[]bool{false, true, false, false}, []bool{false, true, true, false}, nil},
			"one less":       {[]bool{true, true, false, false}, []bool{true, false, false, false}, nil},
			"one put beside": {[]bool{false, true, false, false}, []bool{false, true, false, false}, []int{0}},
			"another order":  {[]bool{false, true, false, false}, []bool{true, true, false, false}, []int{3}},
		} {
			e, err := bindingKind.edit(plain)
			if err != nil {
				t.Fatal(err)
			}
			l, err := e.list(f)
			if err != nil {
				t.Fatal(err)
			}
			if err := e.remove(Subjects, f, l, makes.recorded); err != nil {
				t.Fatal(err)
			}
			var insert []insertion
			for _, i := range makes.insert {
				insert = append(insert, insertion{i, l.elements[i]})
			}
			if err := e.doc.relist(f, makes.gone, insert); err != nil {
				t.Fatal(err)
			}
			_, _, err = e.finish()
			if name == "the same" {
				if err != nil {
					t.Errorf("%s: %v", format, err)
				}
				continue
			}
			if !fault.Is(err, fault.Undecodable) {
				t.Errorf("%s %s: %v", format, name, err)
			}
		}
	}
}

// TestSubjectsAmongOtherFields takes subjects out from between fields that no
// encoder puts there.
func TestSubjectsAmongOtherFields(t *testing.T) {
	subject := func(name string) []byte { return message(2, text(1, "User"), text(3, name)) }
	meta, unknown := message(1, text(1, "b")), varint(900, 1)
	store := func(fields ...[]byte) []byte {
		return envelope("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", fields...)
	}
	plain := store(subject("a"), meta, subject("b"), unknown, subject("c"))
	out, changes, err := bindingKind.Apply(plain, Edit{Field: Subjects, Index: 0}, Edit{Field: Subjects, Index: 2})
	if err != nil || !bytes.Equal(out, store(meta, subject("b"), unknown)) {
		t.Fatalf("%q, %v", out, err)
	}
	back, _, err := bindingKind.Revert(out, changes)
	if err != nil || subjectNames(t, back) != "a b c" || !bytes.Equal(back, store(meta, subject("a"), subject("b"), subject("c"), unknown)) {
		t.Errorf("%q, %v", back, err)
	}
}
