package audit
import (
 _ "filippo.io/torchwood"
 _ "filippo.io/age"
 _ "github.com/transparency-dev/tessera"
 _ "github.com/transparency-dev/tessera/storage/posix"
 _ "github.com/transparency-dev/tessera/fsck"
 _ "golang.org/x/mod/sumdb/note"
)
