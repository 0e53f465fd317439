package storage

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/halligan-io/halligan/internal/fault"
)

// maxArg bounds a kind or target that a person types, in bytes. The longest
// sensible one is plural.version.group/name, each DNS name at most 253.
const maxArg = 1024

// Catalogue is all kinds that one cluster stores: the native ones, and those
// that its CustomResourceDefinitions define. Its zero value is of no use; take
// NewCatalogue. AddCRD must not run at the same time as any other method; once
// filled, a catalogue may be shared.
type Catalogue struct {
	native []*Kind
	custom []*Kind // sorted by Resource
	dirs   map[string]*Kind
}

// NewCatalogue returns a catalogue of the native kinds.
func NewCatalogue() *Catalogue {
	c := &Catalogue{dirs: make(map[string]*Kind)}
	for i := range nativeKinds {
		k := nativeKinds[i]
		if k.Singular == "" {
			k.Singular = strings.ToLower(k.Kind)
		}
		if k.Dir == "" {
			k.Dir = k.Plural
		}
		c.native = append(c.native, &k)
		if c.dirs[k.Dir] == nil { // the core group's events come first
			c.dirs[k.Dir] = &k
		}
	}
	return c
}

// Kinds returns the kinds sorted by directory, each storage location once.
func (c *Catalogue) Kinds() []*Kind {
	kinds := make([]*Kind, 0, len(c.dirs))
	for _, k := range c.dirs {
		kinds = append(kinds, k)
	}
	slices.SortFunc(kinds, func(a, b *Kind) int { return strings.Compare(a.Dir, b.Dir) })
	return kinds
}

// ByGroupKind returns the kind that an apiVersion's group and a kind name, such
// as those in an owner reference, or nil. Groups that a kind has left, such as
// extensions, still find it.
func (c *Catalogue) ByGroupKind(group, kind string) *Kind {
	for _, kinds := range [][]*Kind{c.native, c.custom} {
		for _, k := range kinds {
			if k.Kind == kind && k.inGroup(group) {
				return k
			}
		}
	}
	return nil
}

// inGroup reports whether the kind is, or once was, in the group.
func (k *Kind) inGroup(group string) bool {
	if k.Group == group {
		return true
	}
	for v := range k.versions {
		if gv, err := schema.ParseGroupVersion(v); err == nil && gv.Group == group {
			return true
		}
	}
	return false
}

// A matcher is one way in which a word can name a kind.
type matcher func(k *Kind, word string) bool

// The ways in the order in which kubectl tries them (client-go,
// restmapper/shortcut.go, then the mapper itself), first among native kinds and
// then among custom ones: a full plural, a short name, and then singular and kind
// in any case.
var matchers = []matcher{
	func(k *Kind, word string) bool { return k.Plural == word },
	func(k *Kind, word string) bool { return slices.Contains(k.ShortNames, word) },
	func(k *Kind, word string) bool { return k.Singular == word || strings.ToLower(k.Kind) == word },
}

// Resolve finds a kind by the words that kubectl takes: plural, singular, short
// name or kind, in any case, each also with .group or .version.group behind it.
// It returns fault.Usage for a name that is unknown, or that several custom kinds
// share.
//
// Unlike with kubectl, a native kind wins over every custom one, even where the
// word is the latter's plural and only a short name of the former: what a word
// without a group means then depends neither on what CustomResourceDefinitions
// there are nor on whether they could be read, and nobody can put a decoy in the
// way. Such custom kinds need their group: ds.example.com.
func (c *Catalogue) Resolve(arg string) (*Kind, error) {
	const next = "name the kind as kubectl does, such as deployments, deploy or deployments.apps"
	quoted := quoteASCII(arg)
	switch {
	case arg == "":
		return nil, fault.New(fault.Usage, next, "no kind was given")
	case !typable(arg):
		return nil, fault.New(fault.Usage, next, "%s is no kind", quoted)
	case strings.ContainsAny(arg, ", ") || strings.EqualFold(arg, "all"):
		return nil, fault.New(fault.Usage, "give one kind at a time", "%s names more than one kind", quoted)
	}
	word := strings.ToLower(arg)
	gvr, gr := schema.ParseResourceArg(word)
	var found []*Kind
	if gvr != nil {
		found = c.find(gvr.Resource, func(k *Kind) bool { return k.Group == gvr.Group && k.serves(gvr.Version) })
	}
	if found == nil && strings.Contains(word, ".") {
		found = c.find(gr.Resource, func(k *Kind) bool { return k.Group == gr.Group })
		if found == nil && gr.Group != "" { // kubectl takes the beginning of a group too
			found = c.find(gr.Resource, func(k *Kind) bool { return strings.HasPrefix(k.Group, gr.Group) })
		}
	} else if found == nil {
		found = c.find(word, func(*Kind) bool { return true })
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return nil, fault.New(fault.Usage, "use one of these full names", "%s is ambiguous: %s", quoted, strings.Join(resources(found), ", "))
	case computedKinds[word]:
		return nil, fault.New(fault.Usage, "ask the API server, or look at what it is computed from",
			"%s is computed by the API server and not stored in etcd", quoted)
	}
	if near := c.near(gr.Resource); len(near) > 0 {
		return nil, fault.New(fault.Usage, "did you mean "+strings.Join(near, ", ")+"?", "this cluster has no kind %s", quoted)
	}
	return nil, fault.New(fault.Usage, next, "this cluster has no kind %s", quoted)
}

// find returns the kind that word names among those that in lets through; nil
// where there is none, several where custom kinds are ambiguous.
func (c *Catalogue) find(word string, in func(*Kind) bool) []*Kind {
	for _, match := range matchers {
		for _, k := range c.native {
			if in(k) && match(k, word) {
				return []*Kind{k}
			}
		}
	}
	for _, match := range matchers {
		var found []*Kind
		for _, k := range c.custom {
			if in(k) && match(k, word) {
				found = append(found, k)
			}
		}
		if found != nil {
			return found
		}
	}
	return nil
}

var versionWord = regexp.MustCompile(`^v[1-9][0-9]{0,3}((alpha|beta)[1-9][0-9]{0,3})?$`)

// serves reports whether version may be one of the kind's. Of native kinds any
// will do, since all versions lie under the same key.
func (k *Kind) serves(version string) bool {
	if k.Custom {
		_, ok := k.versions[k.Group+"/"+version]
		return ok
	}
	return versionWord.MatchString(version)
}

// ParseTarget splits KIND/NAME, such as ds/collector, or KIND alone, for which
// name is "". It returns fault.Usage for anything else, and for characters that
// nobody types: whether an object of that name exists is not asked.
func (c *Catalogue) ParseTarget(arg string) (k *Kind, name string, err error) {
	const next = "write KIND/NAME, such as deploy/web"
	if !typable(arg) {
		return nil, "", fault.New(fault.Usage, next, "%s is no kind and name: it is too long, or has characters that cannot be typed", quoteASCII(arg))
	}
	kind, name, named := strings.Cut(arg, "/")
	if named && (kind == "" || name == "" || strings.Contains(name, "/")) {
		return nil, "", fault.New(fault.Usage, next, "%s is no kind and name", quoteASCII(arg))
	}
	if k, err = c.Resolve(kind); err != nil {
		return nil, "", err
	}
	if named && (name == "." || name == ".." || strings.Contains(name, "%")) {
		return nil, "", fault.New(fault.Usage, next, "%s is no name that a %s can have", quoteASCII(name), k.word())
	}
	return k, name, nil
}

// typable reports whether s is text of a sane length that a terminal shows as
// it is: no control, formatting or bidirectional characters.
func typable(s string) bool {
	return len(s) <= maxArg && utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// quoteASCII makes hostile text fit for one line.
func quoteASCII(s string) string {
	const most = 80
	if len(s) > most {
		return strconv.QuoteToASCII(s[:most]) + "..."
	}
	return strconv.QuoteToASCII(s)
}

func resources(kinds []*Kind) []string {
	names := make([]string, len(kinds))
	for i, k := range kinds {
		names[i] = k.Resource()
	}
	return names
}

// near returns up to three kinds whose names are a slip of the finger away, the
// nearest first.
func (c *Catalogue) near(word string) []string {
	if len(word) > 64 {
		return nil
	}
	type candidate struct {
		name     string
		distance int
	}
	var all []candidate
	for _, k := range c.Kinds() {
		best := max(1, min(3, len(word)/3)) + 1
		for _, name := range append([]string{k.Plural, k.Singular}, k.ShortNames...) {
			best = min(best, editDistance(word, name, best))
		}
		if best <= max(1, min(3, len(word)/3)) {
			all = append(all, candidate{k.Resource(), best})
		}
	}
	slices.SortStableFunc(all, func(a, b candidate) int { return a.distance - b.distance })
	var names []string
	for _, n := range all[:min(3, len(all))] {
		names = append(names, n.name)
	}
	return names
}

// editDistance is the number of insertions, deletions and replacements that
// turn a into b, or limit where it is not less.
func editDistance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return min(row[len(b)], limit)
}
