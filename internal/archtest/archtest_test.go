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
var floors = map[string]int{"internal": 0, "api": 1, "audit": 2, "runbooks": 3, "agent": 4, "bastion": 4, "cmd": 5, "deploy": 5}

// links says what a binary must not link, not even through others, and why.
var links = []struct{ binary, forbidden, why string }{
	{"cmd/halligan", "k8s.io/", "it must start in milliseconds; the agent knows Kubernetes"},
	{"cmd/halligan", "go.etcd.io/", "it must start in milliseconds; the agent knows etcd"},
	{"cmd/halligan", "github.com/google/cel-go", "it must start in milliseconds"},
	{"cmd/halligan", module + "/agent", "it meets the agent in api"},
	{"cmd/halligan", module + "/bastion", "it meets the bastion in api"},
	{"cmd/halligan", "github.com/gliderlabs/ssh", "it serves nobody"},
	{"cmd/halligan", "github.com/transparency-dev/tessera", "it reads logs, and keeps none"},
	{"cmd/halligan-agent", "go.etcd.io/etcd/server", "it has little memory at rest, and runs no etcd"},
	{"cmd/halligan-agent", module + "/internal/labpki", "a lab's keys have no place on a node"},
	{"cmd/halligan-agent", module + "/internal/trust/issuer", "a node vouches for nobody"},
	{"cmd/halligan-bastion", "k8s.io/api", "it relays, and knows no Kubernetes"},
	{"cmd/halligan-bastion", "k8s.io/client-go", "it relays, and knows no Kubernetes"},
	{"cmd/halligan-bastion", module + "/agent", "it meets the agent in api"},
	{"cmd/halligan-bastion", module + "/internal/sshclient", "it opens no session at a node, as anybody"},
	{"cmd/halligan-bastion", module + "/internal/labpki", "a lab's keys have no place on a bastion"},
	{"cmd/halligan-bastion", module + "/internal/trust/issuer", "a bastion vouches for nobody"},
}

// inside is the order inside audit, agent and bastion: which of its packages each of
// them may import, outside of tests. What is not in it has no place there.
var inside = map[string][]string{
	"audit": nil, "audit/tiles": nil,
	"audit/ledger":   {"audit", "audit/tiles"},
	"audit/cast":     {"audit"},
	"audit/evidence": {"audit", "audit/tiles"},
	"audit/export":   {"audit"},
	"audit/sealed":   {"audit", "audit/evidence"},
	"audit/mirror":   {"audit", "audit/ledger", "audit/sealed", "audit/tiles"},
	"audit/record":   {"audit", "audit/cast", "audit/ledger"},
	"audit/report":   {"audit", "audit/cast", "audit/export"},
	"audit/service":  {"audit", "audit/ledger", "audit/sealed", "audit/tiles"},

	"agent/storage": nil, "agent/etcd": nil, "agent/node": nil, "agent/door": nil,
	"agent/console": nil, "agent/sshd": nil, "agent/tunnel": nil, "agent/localapi": nil,
	"agent/journal":  {"agent/storage"},
	"agent/diagnose": {"agent/storage", "agent/etcd"},
	"agent/hostlogs": {"agent/node"},
	"agent/action":   {"agent/storage", "agent/etcd", "agent/journal"},
	"agent":          {"agent/storage", "agent/etcd", "agent/node", "agent/door", "agent/console", "agent/sshd", "agent/tunnel", "agent/journal", "agent/action", "agent/localapi", "agent/diagnose", "agent/hostlogs"},

	"bastion/relay": nil, "bastion/lobby": nil, "bastion/store": nil,
	"bastion/push": nil, "bastion/witness": nil,
	"bastion/rpc":    {"bastion/relay"},
	"bastion/tunnel": {"bastion/relay"},
	"bastion":        {"bastion/relay", "bastion/lobby", "bastion/store", "bastion/rpc", "bastion/tunnel", "bastion/push", "bastion/witness"},
}

// mustNot says what a package and those below it must not import themselves,
// outside of tests.
var mustNot = []struct{ path, forbidden, why string }{
	{"agent/etcd", "k8s.io", "it carries keys and bytes, and knows no objects"},
	{"agent/storage", "go.etcd.io", "it turns bytes into bytes; agent/etcd carries them"},
	{"agent/journal", "go.etcd.io", "what is recorded must not depend on what is broken"},
	{"agent/storage", module + "/internal/durable", "it writes no file"},
	{"agent/storage", "golang.org/x/sys", "it writes no file"},
	{"agent/storage", "syscall", "it writes no file"},
	{"agent/storage", "os/exec", "it starts nothing"},
	{"bastion/relay", "net/http", "it carries bytes that it cannot read"},
	{"bastion/relay", "crypto", "it carries bytes that it cannot read"},
	{"bastion/relay", "os", "it touches no file, and starts nothing"}, // os/exec too
	{"bastion/relay", "go.etcd.io", "relaying needs no store"},
	{"bastion/lobby", "os", "whoever logs in may look around, and gets nothing of the machine"}, // as above
	{"bastion/lobby", "syscall", "whoever logs in may look around, and gets nothing of the machine"},
	{"api/verb", "os", "many shells run in one process, which is not theirs"}, // os/signal too
	{"api/verb", "syscall", "many shells run in one process, which is not theirs"},
	{"api/verb", "k8s.io", "the command that is made of it must start in milliseconds"},
	{"api/verb", "go.etcd.io", "the command that is made of it must start in milliseconds"},
	{"agent/sshd", "os", "whoever logs in gets verbs, and nothing of the machine"}, // os/exec too
	{"agent/sshd", "syscall", "whoever logs in gets verbs, and nothing of the machine"},
	{"internal/sshserver", "os/exec", "it starts nothing; what is asked in a session is its daemon's"},
	{"internal/sshserver", module + "/internal/trust/bundle", "it is told who may come in, and for how long"},
	{"internal/sshserver", module + "/internal/trust/credential", "it is told who may come in, and for how long"},
	{"internal/trust", "net/http", "it needs nothing but files and clocks, since all else may be what failed"},
	{"internal/trust", "os/exec", "it needs nothing but files and clocks, since all else may be what failed"},
	{"internal/trust", "google.golang.org/grpc", "it never looks at a request to find out who sent it"},
	{"cmd/internal/ca", "net", "it is for a machine that is offline"}, // the ssh-agent is trust/issuer's
	{"audit/report", "net/http", "a report asks nobody for anything"},
	{"audit/report", "os", "it writes into what it is given"}, // os/exec too
	{"agent/node", "net/http", "it only reads files, since what runs may be what failed"},
	{"agent/localapi", "os/exec", "it starts nothing, whatever a kubeconfig names"},
	{"agent/node", "os/exec", "it only reads files, since what runs may be what failed"},
}

// readers are packages that write no file.
var readers = []string{"agent/storage", "agent/node"}

// importers says who alone may import a package or one below it, outside of
// tests.
var importers = []struct {
	path    string
	allowed []string
	why     string
}{
	{"go.etcd.io/etcd/client/v3", []string{"agent/etcd", "bastion/store", "cmd", "internal/etcdcluster"},
		"agent/etcd has the deadlines and knows which writes may be retried; bastion/store has an etcd of its own"},
	{"k8s.io/client-go/tools/clientcmd", []string{"agent/localapi", "cmd"}, "only there is the server that a kubeconfig names not believed, nor a program started"},
	{"github.com/gliderlabs/ssh", []string{"internal/sshserver"}, "only there are its traps closed"},
	{"github.com/hashicorp/yamux", []string{"api/mux"}, "both ends of a tunnel have the same bounds"},
	{"github.com/hiddeco/sshsig", []string{"internal/trust/bundle", "internal/trust/approval"}, "only there are namespaces and hashes pinned"},
	{"github.com/transparency-dev/tessera", []string{"audit/ledger", "cmd/internal/lab"}, "only there are its driver's traps closed; a lab has its fsck as an outsider"},
	{"filippo.io/torchwood", []string{"audit/evidence", "audit/ledger", "audit/mirror", "audit/service", "audit/tiles", "internal/trust/logkey"},
		"what a checkpoint and a countersignature are worth is decided in one place"},
	{"golang.org/x/mod/sumdb", []string{"audit", "cmd/internal/lab", "internal/trust/logkey"}, "what signs and verifies notes is the evidence's"},
	{"filippo.io/age", []string{"audit/sealed", "cmd/internal/evidence", "internal/trust/bundle"}, "before-images are sealed in one place, and opened there"},
	{"k8s.io/klog/v2", []string{"audit/record", "cmd/internal/lab"}, "what libraries tell klog is silenced once"},
	{"golang.org/x/crypto/ssh/agent", []string{"internal/sshclient", "internal/trust/issuer"}, "nothing that serves holds or forwards keys"},
	{module + "/internal/trust/testfleet", nil, "a test's keys have no place with people, nor on a node"},
	{module + "/internal/sshclient/testagent", nil, "a played token has no place with people"},
	{"log", nil, "daemons log through internal/daemonlog"}, // log/slog too
}

// gate says who alone may mention a name of the audit package: what takes effect goes
// through one gate, and its permits to who writes.
var gate = map[string][]string{"Do": {"agent/action"}, "Permit": {"agent/action", "agent/etcd"}}

// passes reports what goes through the gate in a package that is not of it.
func passes(folder string) func(path, name string) bool {
	return func(path, name string) bool {
		allowed, is := gate[name]
		return is && path == module+"/audit" && !slices.Contains(allowed, folder)
	}
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
	t.Run("folders have an order", func(t *testing.T) {
		for _, p := range all {
			if slices.Contains([]string{"audit", "agent", "bastion"}, p.folder()) {
				for _, problem := range disorder(p) {
					t.Error(problem)
				}
			}
		}
	})
	t.Run("some imports have no place", func(t *testing.T) {
		for _, p := range all {
			for _, problem := range misplaced(p) {
				t.Error(problem)
			}
		}
	})
	t.Run("readers write nothing", func(t *testing.T) {
		for _, p := range all {
			if !slices.ContainsFunc(readers, func(f string) bool { return within(p.path(), f) }) {
				continue
			}
			if err := mentions(p, writesFiles, func(where string) { t.Errorf("%s: this package writes no file", where) }); err != nil {
				t.Errorf("%s: %v", p.path(), err)
			}
		}
	})
	t.Run("effects have one gate", func(t *testing.T) {
		for _, p := range all {
			if err := mentions(p, passes(p.path()), func(where string) { t.Errorf("%s: what takes effect does so in agent/action", where) }); err != nil {
				t.Errorf("%s: %v", p.path(), err)
			}
		}
	})
	t.Run("some imports have one place", func(t *testing.T) {
		for _, p := range all {
			for _, rule := range importers {
				if slices.ContainsFunc(p.Imports, func(i string) bool { return within(i, rule.path) }) && !slices.ContainsFunc(rule.allowed, func(f string) bool { return within(p.path(), f) }) {
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
			if err := mentions(p, prints, func(where string) { t.Errorf("%s: a daemon's stdout is nobody's; use the logger", where) }); err != nil {
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

// row returns the package's own row or that of the one that it is below, "" where
// there is none. audit, agent and bastion themselves have rows for nothing below them.
func row(path string) string {
	best := ""
	for r := range inside {
		if (path == r || strings.Contains(r, "/") && within(path, r)) && len(r) > len(best) {
			best = r
		}
	}
	return best
}

// disorder says what a package of a folder that has an order imports against it.
func disorder(p pkg) (problems []string) {
	own := row(p.path())
	if own == "" {
		return []string{p.path() + " has no place in the order inside " + p.folder() + "; give it a row"}
	}
	for _, imported := range p.Imports {
		other := pkg{ImportPath: imported}
		if within(imported, module) && other.folder() == p.folder() && row(other.path()) != own && !slices.Contains(inside[own], row(other.path())) {
			problems = append(problems, fmt.Sprintf("%s imports %s, and may import %v of its folder", p.path(), other.path(), inside[own]))
		}
	}
	return problems
}

// misplaced says what a package imports that it must not.
func misplaced(p pkg) (problems []string) {
	for _, rule := range mustNot {
		for _, imported := range p.Imports {
			if within(p.path(), rule.path) && within(imported, rule.forbidden) {
				problems = append(problems, fmt.Sprintf("%s imports %s: %s", p.path(), imported, rule.why))
			}
		}
	}
	return problems
}

// prints reports what writes to standard output. Whoever mentions os.Stdout is
// about to.
func prints(path, name string) bool {
	switch path {
	case "fmt":
		return name == "Print" || name == "Printf" || name == "Println"
	case "os", "syscall":
		return name == "Stdout"
	case "":
		return name == "print" || name == "println"
	}
	return false
}

// writesFiles reports what changes files.
func writesFiles(path, name string) bool {
	return path == "os" && slices.Contains([]string{"Create", "CreateTemp", "OpenFile", "OpenRoot", "WriteFile", "CopyFS", "Truncate", "Mkdir", "MkdirAll",
		"MkdirTemp", "Remove", "RemoveAll", "Rename", "Link", "Symlink", "Chmod", "Chown", "Lchown", "Chtimes"}, name)
}

// mentions reports where a package uses a name of an imported package, or calls
// a builtin (of path ""), that is asked for.
func mentions(p pkg, asked func(path, name string) bool, report func(where string)) error {
	for _, file := range slices.Concat(p.GoFiles, p.CgoFiles) {
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, filepath.Join(p.Dir, file), nil, 0)
		if err != nil {
			return err
		}
		imports := map[string]string{} // by the name in this file
		for _, spec := range f.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			name := path[strings.LastIndexByte(path, '/')+1:]
			if spec.Name != nil {
				name = spec.Name.Name
			}
			imports[name] = path
		}
		ast.Inspect(f, func(n ast.Node) bool {
			found := false
			switch n := n.(type) {
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && imports[x.Name] != "" {
					found = asked(imports[x.Name], n.Sel.Name)
				}
			case *ast.CallExpr:
				if fun, ok := n.Fun.(*ast.Ident); ok {
					found = asked("", fun.Name)
				}
			}
			if found {
				report(fmt.Sprintf("%s:%d", filepath.Join(p.path(), file), set.Position(n.Pos()).Line))
			}
			return true
		})
	}
	return nil
}

// TestRules breaks the rules, so that none of them holds by looking away.
func TestRules(t *testing.T) {
	of := func(path string, imports ...string) pkg {
		return pkg{ImportPath: module + "/" + path, Imports: imports}
	}
	for _, p := range []pkg{
		of("agent/storage", module+"/agent/etcd"), of("agent/storage/deep", module+"/agent/journal"), of("agent/etcd", module+"/agent/storage"),
		of("agent/node", module+"/agent/storage"), of("agent/storage", module+"/agent/action"), of("agent/journal", module+"/agent/etcd/deep"),
		of("agent/console", module+"/agent/action"), of("agent/console", module+"/agent"), of("agent/action", module+"/agent/node"),
		of("agent/action", module+"/agent/console"), of("agent/new"),
		of("bastion/relay", module+"/bastion/store"), of("bastion/lobby", module+"/bastion/rpc"), of("bastion/relay", module+"/bastion"), of("bastion/new"),
		of("audit/tiles", module+"/audit"), of("audit", module+"/audit/ledger"), of("audit/service", module+"/audit/mirror"), of("audit/new"),
	} {
		if len(disorder(p)) != 1 {
			t.Errorf("%s may import %v", p.path(), p.Imports)
		}
	}
	for _, p := range []pkg{
		of("agent", module+"/agent/action", module+"/agent/console"), of("agent/journal", module+"/agent/storage", module+"/agent/storage/deep"),
		of("agent/storage/deep", module+"/agent/storage", module+"/internal/fault"), of("agent/action", module+"/agent/etcd"),
	} {
		if problems := disorder(p); len(problems) > 0 {
			t.Error(problems)
		}
	}
	for _, p := range []pkg{of("agent/etcd/deep", "k8s.io/api/core/v1"), of("agent/storage", "go.etcd.io/etcd/client/v3"), of("agent/journal", "go.etcd.io/bbolt")} {
		if len(misplaced(p)) != 1 {
			t.Errorf("%s may import %v", p.path(), p.Imports)
		}
	}
	if problems := misplaced(of("agent/etcd", "sigs.k8s.io/yaml", "k8s.iot/x")); len(problems) > 0 {
		t.Error(problems)
	}

	const text = `package p

import (
	"fmt"
	"io"
	"os"
	sys "os"

	"github.com/halligan-io/halligan/audit"
)

func f(w io.Writer, x struct{ Stdout io.Writer }) {
	fmt.Fprint(w, x.Stdout, os.Stderr)
	fmt.Print() // prints
	fmt.Fprintln(os.Stdout) // prints
	os.Stdout.WriteString("") // prints
	io.WriteString(sys.Stdout, "") // prints
	println() // prints
	sys.WriteFile("", nil, 0) // writes
	os.ReadFile("")
	audit.Do(nil, nil, audit.Event{}, nil) // passes
	var _ audit.Permit // passes
}
`
	p := pkg{ImportPath: module + "/agent/p", Dir: t.TempDir(), GoFiles: []string{"p.go"}}
	if err := os.WriteFile(filepath.Join(p.Dir, "p.go"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for word, rule := range map[string]func(string, string) bool{"prints": prints, "writes": writesFiles, "passes": passes("agent/p")} {
		var want, got []string
		for i, line := range strings.Split(text, "\n") {
			if strings.HasSuffix(line, "// "+word) {
				want = append(want, fmt.Sprintf("agent/p/p.go:%d", i+1))
			}
		}
		if err := mentions(p, rule, func(where string) { got = append(got, where) }); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v; %v", word, got, want, err)
		}
	}
}
