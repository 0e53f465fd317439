package trust

import (
	"strings"
	"testing"
)

func TestNames(t *testing.T) {
	long := strings.Repeat("a", 200)
	for form, c := range map[string]struct {
		valid     func(string) bool
		good, bad []string
	}{
		"person":  {ValidPerson, []string{"a", "ada.l@example.org", "deploy-bot_1", long[:64]}, []string{"Ada", "ada/1", "a b", long[:65]}},
		"cluster": {ValidCluster, []string{"a", "prod-1", long[:63]}, []string{"-a", "a-", "a.b", "Prod", "*", long[:64]}},
		"node":    {ValidNode, []string{"a", "cp-1.rack2", long[:122]}, []string{"-a", "a.", "Cp", long[:123]}},
		"server":  {ValidServer, []string{"cp-1.prod", "cp-1.rack2.prod"}, []string{"cp-1", ".prod", "cp-1.", "cp-1.*", "cp-1..prod"}},
	} {
		for _, name := range c.good {
			if !c.valid(name) {
				t.Errorf("%s %q is refused", form, name)
			}
		}
		for _, name := range append(c.bad, "", "a\n", "\na", "é") {
			if c.valid(name) {
				t.Errorf("%s %q is taken", form, name)
			}
		}
	}
}
