package ca_test

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// TestSecurityPage: every command of SECURITY.md is one that this build has, with
// those flags. A page that is read at 3 a.m. must not be wrong.
func TestSecurityPage(t *testing.T) {
	page, err := os.ReadFile("../../../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	lines := regexp.MustCompile("(?m)^ *(halligan ca .*)$|`(halligan ca [^`]*)`").FindAllStringSubmatch(string(page), -1)
	if len(lines) < 12 {
		t.Fatalf("only %d commands", len(lines))
	}
	for _, m := range lines {
		line := m[1] + m[2]
		cmd := exec.Command("halligan", append(strings.Fields(line)[1:], "--help")...)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "Usage:") || strings.Contains(string(out), "Available Commands:") {
			t.Errorf("%s: %v\n%s", line, err, out)
		}
	}
}
