package cli

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/halligan-io/halligan/internal/fault"
)

// maxConfig bounds the configuration file, in bytes.
const maxConfig = 64 << 10

// config is the configuration file, ~/.config/halligan/config.yaml unless
// HALLIGAN_CONFIG names another. Every key is the flag of the same name, and
// gives way to the flag and to the variable of the environment. What says why
// something is done, or answers for a person, has no place in it. It is read at
// each start.
type config struct {
	// Bundle and Identity are files; relative to the folder of this one, or to the
	// home with ~/.
	Bundle   string `json:"bundle"`
	Identity string `json:"identity"`
	// Socket is an agent's console, for a node's own configuration.
	Socket string `json:"socket"`
	// Cluster, Node, Bastion and As are names.
	Cluster string `json:"cluster"`
	Node    string `json:"node"`
	Bastion string `json:"bastion"`
	As      string `json:"as"`
	Direct  bool   `json:"direct"`
	// Output is table, json or yaml; Timeout a time such as 30s.
	Output  string `json:"output"`
	Timeout string `json:"timeout"`
}

// loadConfig reads the file, if there is one. One that is named must be there.
func loadConfig(env func(string) string) (config, error) {
	name, named := env("HALLIGAN_CONFIG"), true
	if name == "" {
		base := env("XDG_CONFIG_HOME")
		if base == "" && env("HOME") != "" {
			base = filepath.Join(env("HOME"), ".config")
		}
		if base == "" {
			return config{}, nil
		}
		name, named = filepath.Join(base, "halligan", "config.yaml"), false
	}
	next := "correct it, or pass over it with HALLIGAN_CONFIG=/dev/null"
	data, err := readFile(name, maxConfig)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return config{}, nil
	}
	if err != nil {
		return config{}, fault.New(fault.Usage, next, "the configuration file: %w", err)
	}
	var c config
	if err := yaml.UnmarshalStrict(data, &c); err != nil {
		text := strings.TrimPrefix(strings.ReplaceAll(err.Error(), "\n", " "), "error unmarshaling JSON: while decoding JSON: ")
		return config{}, fault.New(fault.Usage, next, "the configuration file %s: %s", name, strings.TrimPrefix(text, "json: "))
	}
	for _, file := range []*string{&c.Bundle, &c.Identity, &c.Socket} {
		if rest, home := strings.CutPrefix(*file, "~/"); home {
			*file = filepath.Join(env("HOME"), rest)
		} else if *file != "" && !filepath.IsAbs(*file) {
			*file = filepath.Join(filepath.Dir(name), *file)
		}
	}
	return c, nil
}

// defaults lets the file's values stand where neither a flag nor a variable
// says otherwise. The flags are defined already.
func (c config) defaults(set *pflag.FlagSet) error {
	for name, value := range map[string]string{"output": c.Output, "timeout": c.Timeout} {
		if value == "" {
			continue
		}
		if err := set.Lookup(name).Value.Set(value); err != nil {
			return fault.New(fault.Usage, "correct it, or pass over it with HALLIGAN_CONFIG=/dev/null", "the configuration file: %s: %w", name, err)
		}
	}
	return nil
}

// readFile reads a file that is not larger than it may be. "-" is the standard
// input.
func readFile(name string, most int64) ([]byte, error) {
	f := os.Stdin
	if name != "-" {
		var err error
		if f, err = os.Open(name); err != nil { // #nosec G304 -- the person names it
			return nil, err
		}
		defer f.Close()
	}
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = &fs.PathError{Op: "read", Path: name, Err: errors.New("the file is too large")}
	}
	return data, err
}
