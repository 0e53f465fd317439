package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/halligan-io/halligan"

// floors says on which floor each top-level folder stands. Imports go down, or
// stay inside one folder: agent and bastion share a floor, and meet in api.
var floors = map[string]int{"internal": 0, "api": 1, "audit": 2, "runbooks": 3, "agent": 4, "bastion": 4, "cmd": 5}

// links says what a binary must not link, not even through others, and why.
var links = []struct{ binary, forbidden, why string }{
	{"cmd/halligan", "k8s.io/", "it must start in milliseconds; the agent knows Kubernetes"},
	{"cmd/halligan", "go.etcd.io/", "it must start in milliseconds; the agent knows etcd"},
	{"cmd/halligan", "github.com/google/cel-go", "it must start in milliseconds"},
	{"cmd/halligan", module + "/agent", "it meets the agent in api"},
	{"cmd/halligan", module + "/bastion", "it meets the bastion in api"},
	{"cmd/halligan-agent", "go.etcd.io/etcd/server", "it has little memory at rest, and runs no etcd"},
	{"cmd/halligan-agent", module + "/internal/labpki", "a lab's keys have no place on a node"},
}

// importers says who alone may import a package itself, outside of tests.
var importers = []struct {
	path    string
	allowed []string
	why     string
}{
	{"go.etcd.io/etcd/client/v3", []string{"agent/etcd", "cmd", "internal/etcdcluster"},
		"agent/etcd has the deadlines and knows which writes may be retried"},
	{"log", nil, "daemons log through internal/daemonlog"},
}

type pkg struct {
	ImportPath, Dir, Name                                       string
	GoFiles, CgoFiles, Imports, Deps, TestImports, XTestImports []string
}

// path is the package's folder in the repository.
func (p pkg) path() string { return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/") }

func (p pkg) folder() string {
	top, _, _ := strings.Cut(p.path(), "/")
	return top
}

// packages lists every package of the module.
func packages(t *testing.T) []pkg {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	// The test cache knows which files a test has opened, but not what go list
	// reads: opening every folder makes a new file run the test again.
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && path != root && strings.HasPrefix(d.Name(), ".") {
			return fs.SkipDir
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,Name,GoFiles,CgoFiles,Imports,Deps,TestImports,XTestImports", "./...")
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.Bytes())
	}
	var all []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if len(p.GoFiles)+len(p.TestImports)+len(p.XTestImports) > 0 {
			all = append(all, p)
		}
	}
	if len(all) == 0 {
		t.Fatal("no packages")
	}
	return all
}

func within(path, folder string) bool { return path == folder || strings.HasPrefix(path, folder+"/") }

func TestArchitecture(t *testing.T) {
	all := packages(t)
	t.Run("imports go down", func(t *testing.T) {
		for _, p := range all {
			floor, known := floors[p.folder()]
			if !known {
				t.Errorf("%s: the folder %q has no floor", p.path(), p.folder())
				continue
			}
			for _, imported := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
				if !within(imported, module) {
					continue
				}
				other := pkg{ImportPath: imported}
				if below := floors[other.folder()]; below > floor || below == floor && other.folder() != p.folder() {
					t.Errorf("%s (floor %d) imports %s (floor %d)", p.path(), floor, other.path(), below)
				}
			}
		}
	})
	t.Run("binaries link what they may", func(t *testing.T) {
		for _, rule := range links {
			i := slices.IndexFunc(all, func(p pkg) bool { return p.path() == rule.binary })
			if i < 0 {
				t.Errorf("%s is not there; drop its rules or give it back", rule.binary)
				continue
			}
			for _, dep := range all[i].Deps {
				if dep == rule.forbidden || strings.HasPrefix(dep, strings.TrimSuffix(rule.forbidden, "/")+"/") {
					t.Errorf("%s links %s: %s", rule.binary, dep, rule.why)
				}
			}
		}
	})
	t.Run("some imports have one place", func(t *testing.T) {
		for _, p := range all {
			for _, rule := range importers {
				if slices.Contains(p.Imports, rule.path) && !slices.ContainsFunc(rule.allowed, func(f string) bool { return within(p.path(), f) }) {
					t.Errorf("%s imports %s: %s", p.path(), rule.path, rule.why)
				}
			}
		}
	})
	t.Run("names are nouns", func(t *testing.T) {
		for _, p := range all {
			for _, element := range append(strings.Split(p.path(), "/"), p.Name) {
				if slices.Contains([]string{"util", "utils", "common", "helper", "helpers", "misc", "shared", "base"}, element) {
					t.Errorf("%s: %q says nothing about what is inside", p.path(), element)
				}
			}
		}
	})
	t.Run("main packages are short", func(t *testing.T) {
		const most = 150
		for _, p := range all {
			if p.Name != "main" {
				continue
			}
			if p.folder() != "cmd" {
				t.Errorf("%s: binaries live in cmd", p.path())
			}
			lines := 0
			for _, file := range p.GoFiles {
				text, err := os.ReadFile(filepath.Join(p.Dir, file))
				if err != nil {
					t.Fatal(err)
				}
				lines += bytes.Count(text, []byte("\n"))
			}
			if lines > most {
				t.Errorf("%s has %d lines; what is over %d belongs below", p.path(), lines, most)
			}
		}
	})
	t.Run("packages explain themselves", func(t *testing.T) {
		floorOf := regexp.MustCompile(`\bfloor\s+(\d)`)
		for _, p := range all {
			doc, generated, err := documentation(p)
			if err != nil {
				t.Errorf("%s: %v", p.path(), err)
				continue
			}
			if len(p.GoFiles) == 0 || generated {
				continue
			}
			switch m := floorOf.FindStringSubmatch(doc); {
			case doc == "":
				t.Errorf("%s has no package comment", p.path())
			case p.Name == "main":
			case m == nil:
				t.Errorf("%s: the package comment does not say on which floor it stands", p.path())
			case m[1] != strconv.Itoa(floors[p.folder()]):
				t.Errorf("%s: the package comment says floor %s, it stands on %d", p.path(), m[1], floors[p.folder()])
			}
		}
	})
	t.Run("daemons do not print", func(t *testing.T) {
		for _, p := range all {
			if p.folder() == "cmd" && p.path() != "cmd/halligan-agent" && p.path() != "cmd/halligan-bastion" {
				continue
			}
			if err := prints(p, func(where string) { t.Errorf("%s: a daemon's stdout is nobody's; use the logger", where) }); err != nil {
				t.Errorf("%s: %v", p.path(), err)
			}
		}
	})
}

// documentation returns the package comment, and whether all is generated.
func documentation(p pkg) (doc string, generated bool, err error) {
	generated = true
	for _, file := range p.GoFiles {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.ParseComments)
		if err != nil {
			return "", false, err
		}
		generated = generated && ast.IsGenerated(f)
		if f.Doc != nil {
			doc += f.Doc.Text()
		}
	}
	return doc, generated, nil
}

// prints reports each call that writes to standard output.
func prints(p pkg, report func(where string)) error {
	for _, file := range p.GoFiles {
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, filepath.Join(p.Dir, file), nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			switch fun := call.Fun.(type) {
			case *ast.SelectorExpr:
				if x, ok := fun.X.(*ast.Ident); ok && x.Name == "fmt" && slices.Contains([]string{"Print", "Printf", "Println"}, fun.Sel.Name) {
					report(fmt.Sprintf("%s:%d", filepath.Join(p.path(), file), set.Position(n.Pos()).Line))
				}
			case *ast.Ident:
				if fun.Name == "print" || fun.Name == "println" {
					report(fmt.Sprintf("%s:%d", filepath.Join(p.path(), file), set.Position(n.Pos()).Line))
				}
			}
			return true
		})
	}
	return nil
}
