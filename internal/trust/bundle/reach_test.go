package bundle

import (
	"strings"
	"testing"
)

// TestReach: which hosts keep tunnels, and which take them.
func TestReach(t *testing.T) {
	const text = `format: 1
part: inventory
fleet: acme
version: 1
signed: 2026-01-31T09:00:00Z
policyVersion: 1
clusters:
- name: prod
  nodes:
  - {name: cp-1, address: 10.0.0.11, sshPort: 2222, grpcPort: 2223, reach: out}
  - {name: cp-2, address: 10.0.0.12, sshPort: 2222, reach: in}
bastions:
- {name: a, address: 192.0.2.1, sshPort: 2222, grpcPort: 2223, tunnelPort: 7444}
- {name: b, address: 192.0.2.2, sshPort: 2222}
`
	inv, err := decodeInventory([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if nodes := inv.Nodes(""); nodes[0].Reach != ReachOut || nodes[1].Reach != ReachIn {
		t.Errorf("%+v", nodes)
	}
	if at, ok := inv.Bastions[0].Tunnel(); !ok || at.String() != "192.0.2.1:7444" {
		t.Errorf("%v, %v", at, ok)
	}
	if _, ok := inv.Bastions[1].Tunnel(); ok {
		t.Error("a bastion without a port takes tunnels")
	}
	for old, c := range map[string]struct{ new, want string }{
		"reach: out":       {"reach: both", "neither in nor out"},
		"reach: in":        {"tunnelPort: 1", "tunnelPort is a bastion's"},
		"tunnelPort: 7444": {"tunnelPort: 2223", "another tunnelPort"},
		"sshPort: 2222}\n": {"sshPort: 2222, reach: in}\n", "reach is a node's"},
		"tunnelPort: 744":  {"tunnelPort: 7444", "tunnelPort"},
	} {
		if _, err := decodeInventory([]byte(strings.Replace(text, old, c.new, 1))); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.new, err, c.want)
		}
	}
	both := strings.ReplaceAll(strings.ReplaceAll(text, "192.0.2.2", "192.0.2.1"), "sshPort: 2222}\n", "sshPort: 7444}\n")
	if _, err := decodeInventory([]byte(both)); err == nil || !strings.Contains(err.Error(), "same address") {
		t.Errorf("a door where another takes tunnels: %v", err)
	}
}
