package record

import "fmt"

// Config is the section audit of a daemon's configuration. All of it may be left
// out, and 0 is the default everywhere.
type Config struct {
	// MaxBytes bounds the daemon's own log on disk; default 256 MiB. The oldest
	// generations make room. GenerationBytes is when it goes on in a new one;
	// default 32 MiB.
	MaxBytes        int64 `json:"maxBytes,omitempty"`
	GenerationBytes int64 `json:"generationBytes,omitempty"`
	// ReserveBytes are set aside for when the disk takes nothing any more; default
	// 8 MiB, which are 2,048 events.
	ReserveBytes int64 `json:"reserveBytes,omitempty"`
	// Recordings are those of shells and exec lines.
	Recordings RecordingsConfig `json:"recordings,omitzero"`
}

// RecordingsConfig is what becomes of recordings.
type RecordingsConfig struct {
	// MaxBytes bounds all of them on disk; default 256 MiB. The oldest make room.
	MaxBytes int64 `json:"maxBytes,omitempty"`
	// Input has what people type recorded, too, passwords that they paste included;
	// default false. What they see is recorded always.
	Input bool `json:"input,omitempty"`
}

// Least values, below which the defaults of the others make no sense.
const (
	leastGeneration = 1 << 20
	leastReserve    = 1 << 20
	leastRecordings = 1 << 20
)

// Check refuses values that cannot be meant. Errors name the key.
func (c Config) Check() error {
	for _, v := range []struct {
		key          string
		value, least int64
	}{
		{"maxBytes", c.MaxBytes, 4 * max(c.GenerationBytes, leastGeneration)},
		{"generationBytes", c.GenerationBytes, leastGeneration},
		{"reserveBytes", c.ReserveBytes, leastReserve},
		{"recordings.maxBytes", c.Recordings.MaxBytes, leastRecordings},
	} {
		if v.value != 0 && v.value < v.least {
			return fmt.Errorf("audit.%s: %d is less than the %d bytes that it takes", v.key, v.value, v.least)
		}
	}
	return nil
}
