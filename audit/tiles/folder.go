package tiles

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// Folder returns the name of the folder of one generation of a log.
func Folder(lineage string, generation uint64) string {
	return fmt.Sprintf("%s.%08d", lineage, generation)
}

// ParseFolder is the reverse of Folder, and takes no other names.
func ParseFolder(name string) (lineage string, generation uint64, ok bool) {
	lineage, digits, _ := strings.Cut(name, ".")
	generation, err := strconv.ParseUint(digits, 10, 64)
	return lineage, generation, err == nil && logkey.ValidLineage(lineage) && Folder(lineage, generation) == name
}
