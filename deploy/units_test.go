package deploy_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var units = []string{"halligan-agent.service", "halligan-bastion.service"}

// analyze runs systemd-analyze, which needs no systemd that runs.
func analyze(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("systemd-analyze", append([]string{"--no-pager"}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("systemd-analyze %v (of Debian's package systemd): %v\n%s", args, err, out)
	}
	return string(out)
}

// systemdVersion is that of this machine.
func systemdVersion(t *testing.T) string {
	fields := strings.Fields(analyze(t, "--version"))
	if len(fields) < 2 {
		t.Fatalf("systemd-analyze --version: %v", fields)
	}
	return fields[1]
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestUnitsAreValid: nothing in them is unknown or misspelt, apart from what is
// newer than the oldest systemd that they are for.
func TestUnitsAreValid(t *testing.T) {
	newer := regexp.MustCompile(`Unknown key(?: name)? '(RestartSteps|RestartMaxDelaySec)' in section '?\[?Service\]?'?, ignoring\.`)
	dir := t.TempDir()
	for _, unit := range append(units, "halligan.slice") {
		// What they start is not installed here.
		text := strings.ReplaceAll(read(t, filepath.Join("systemd", unit)), "/usr/local/bin/halligan-", "/bin/true #")
		if err := os.WriteFile(filepath.Join(dir, unit), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, unit := range append(units, "halligan.slice") {
		// Its exit status is that of anything at all, other units included.
		out, err := exec.Command("systemd-analyze", "--no-pager", "--man=no", "verify", filepath.Join(dir, unit)).CombinedOutput()
		if err != nil && len(out) == 0 {
			t.Fatalf("systemd-analyze verify (of Debian's package systemd): %v", err)
		}
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, "halligan") && !newer.MatchString(line) {
				t.Errorf("%s: %s", unit, line)
			}
		}
	}
}

// TestExposure keeps the figures in the units' headers true.
func TestExposure(t *testing.T) {
	said := regexp.MustCompile(`(?m)^# .*overall exposure level ([0-9.]+) with systemd ([0-9]+)$`)
	found := regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`)
	version := systemdVersion(t)
	for _, unit := range units {
		file := filepath.Join("systemd", unit)
		header, measured := said.FindStringSubmatch(read(t, file)), found.FindStringSubmatch(analyze(t, "--offline=yes", "security", "./"+file))
		if header == nil || measured == nil {
			t.Errorf("%s: header %q, measured %q", unit, header, measured)
			continue
		}
		want, got := number(t, header[1]), number(t, measured[1])
		// Another version may weigh otherwise.
		if version == header[2] && got != want || got > want+0.5 {
			t.Errorf("%s: exposure level %v with systemd %s; its header says %v with %s", unit, got, version, want, header[2])
		}
	}
}

func number(t *testing.T, s string) float64 {
	t.Helper()
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// setting returns the values of a key of a unit, in their order.
func setting(t *testing.T, unit, key string) (values []string) {
	t.Helper()
	for line := range strings.Lines(read(t, filepath.Join("systemd", unit))) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), key+"="); ok {
			values = append(values, v)
		}
	}
	return values
}

// TestUnitsNeedNothing holds what makes the units start when all else is gone.
func TestUnitsNeedNothing(t *testing.T) {
	for _, unit := range units {
		for _, key := range []string{"After", "Requires", "Requisite", "Wants", "BindsTo", "PartOf", "Upholds", "Before", "RequiresMountsFor", "ConditionPathExists",
			"AssertPathExists", "StartLimitBurst", "WatchdogSec", "RuntimeMaxSec", "IPAddressDeny", "MemoryHigh"} {
			if v := setting(t, unit, key); v != nil {
				t.Errorf("%s: %s=%v", unit, key, v)
			}
		}
		for key, want := range map[string]string{"StartLimitIntervalSec": "0", "Restart": "always", "RestartSec": "1s", "RestartMaxDelaySec": "30s", "OOMScoreAdjust": "-900",
			"Slice": "halligan.slice", "WantedBy": "multi-user.target", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "CapabilityBoundingSet": ""} {
			if v := setting(t, unit, key); len(v) != 1 || v[0] != want {
				t.Errorf("%s: %s=%q, want %q", unit, key, v, want)
			}
		}
		// A key that is not there must not keep the daemon from starting.
		for _, credential := range setting(t, unit, "LoadCredential") {
			name, path, _ := strings.Cut(credential, ":")
			if !strings.HasPrefix(path, "/etc/halligan/keys/") || !slices.Contains(setting(t, unit, "SetCredential"), name+":missing") {
				t.Errorf("%s: %s has no stand-in", unit, credential)
			}
		}
		// The collector has to start before the kernel kills.
		most, limit := setting(t, unit, "MemoryMax"), setting(t, unit, "Environment")
		if len(most) != 1 || len(limit) != 1 {
			t.Fatalf("%s: MemoryMax=%v, Environment=%v", unit, most, limit)
		}
		limits := bytesOf(t, strings.TrimPrefix(limit[0], "GOMEMLIMIT="))
		if unit == "halligan-bastion.service" {
			limits += 192 << 20 // of the store's process (bastion/store)
		}
		if share := limits / bytesOf(t, most[0]); share < 0.7 || share > 0.85 {
			t.Errorf("%s: GOMEMLIMIT is %.2f of MemoryMax", unit, share)
		}
	}
}

// bytesOf reads 512M of systemd and 512MiB of Go.
func bytesOf(t *testing.T, s string) float64 {
	t.Helper()
	for suffix, factor := range map[string]float64{"MiB": 1 << 20, "GiB": 1 << 30, "M": 1 << 20, "G": 1 << 30} {
		if n, ok := strings.CutSuffix(s, suffix); ok {
			return number(t, n) * factor
		}
	}
	t.Fatalf("%q is no size", s)
	return 0
}
