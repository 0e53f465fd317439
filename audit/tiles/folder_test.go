package tiles

import "testing"

func TestFolder(t *testing.T) {
	for generation, name := range map[uint64]string{1: "00ff00ff.00000001", 99_999_999: "00ff00ff.99999999", 100_000_000: "00ff00ff.100000000", 1<<64 - 1: "00ff00ff.18446744073709551615"} {
		if got := Folder("00ff00ff", generation); got != name {
			t.Errorf("%d: %s", generation, got)
		}
		if lineage, n, ok := ParseFolder(name); lineage != "00ff00ff" || n != generation || !ok {
			t.Errorf("%s: %s, %d, %v", name, lineage, n, ok)
		}
	}
	for _, name := range []string{"", ".", "00ff00ff", "00ff00ff.", "00ff00ff.1", "00ff00ff.000000001", "00FF00FF.00000001", "00ff00f.00000001", "00ff00ff.+0000001", "00ff00ff.18446744073709551616", ".removed-00ff00ff.00000001", "00ff00ff.00000001.x"} {
		if _, _, ok := ParseFolder(name); ok {
			t.Errorf("%q is taken", name)
		}
	}
}
