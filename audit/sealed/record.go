package sealed

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"

	"filippo.io/age"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
)

const (
	format = 1
	// maxPlain bounds what a file is decompressed to, in bytes.
	maxPlain = 128 << 20
)

// Record is what a sealed file holds.
type Record struct {
	// Server is the agent that sealed it, and Plan what it applied.
	Server string
	Plan   *halliganv1.Plan
	// Images are the before-images, as the agent's journal has them.
	Images []json.RawMessage
}

// line is one line of a file: the first one has all but the image.
type line struct {
	Format int             `json:"format,omitempty"`
	Server string          `json:"server,omitempty"`
	Plan   json.RawMessage `json:"plan,omitempty"`
	Image  any             `json:"image,omitempty"`
}

// write writes a file. The compression is the fastest, with the least state: images
// are many copies of the same few fields, and what is short travels with an undo.
func write(w io.Writer, server string, plan *halliganv1.Plan, images iter.Seq2[any, error], to []age.Recipient) error {
	crypt, err := age.Encrypt(w, to...)
	if err != nil {
		return err
	}
	packed, err := gzip.NewWriterLevel(crypt, gzip.BestSpeed)
	if err != nil {
		return err
	}
	first := line{Format: format, Server: server}
	if first.Plan, err = api.CanonicalJSON(plan); err != nil {
		return err
	}
	lines := json.NewEncoder(packed)
	if err := lines.Encode(first); err != nil {
		return err
	}
	for image, err := range images {
		if err == nil {
			err = lines.Encode(line{Image: image})
		}
		if err != nil {
			return err
		}
	}
	return errors.Join(packed.Close(), crypt.Close())
}

// Read opens a file with one of the keys.
func Read(file io.Reader, keys ...age.Identity) (*Record, error) {
	r, err := read(file, keys)
	if err != nil {
		return nil, fault.New(fault.Refused, "see that it is a whole file of sealed/, and the key one that it was sealed to", "sealed before-images cannot be opened: %w", err)
	}
	return r, nil
}

func read(file io.Reader, keys []age.Identity) (*Record, error) {
	plain, err := age.Decrypt(file, keys...)
	if err != nil {
		return nil, err
	}
	packed, err := gzip.NewReader(plain)
	if err != nil {
		return nil, err
	}
	limited := &io.LimitedReader{R: packed, N: maxPlain}
	lines := json.NewDecoder(limited)
	lines.DisallowUnknownFields()
	var r *Record
	for {
		var image json.RawMessage
		l := line{Image: &image}
		err := lines.Decode(&l)
		switch {
		case limited.N == 0:
			return nil, fmt.Errorf("it has more than %d MiB", maxPlain>>20)
		case errors.Is(err, io.EOF) && r != nil:
			return r, nil
		case err != nil:
			return nil, err
		case r == nil && l.Format != format:
			return nil, fmt.Errorf("its format %d is not known to this build, which knows %d", l.Format, format)
		case r == nil:
			r = &Record{Server: l.Server, Plan: &halliganv1.Plan{}}
			if err := protojson.Unmarshal(l.Plan, r.Plan); err != nil {
				return nil, err
			}
		case image == nil || l.Format != 0:
			return nil, errors.New("a line of it is no image")
		default:
			r.Images = append(r.Images, image)
		}
	}
}

// Image is a before-image, without what only the agent knows to use.
type Image struct {
	// Index is that of the object in the plan.
	Index int    `json:"index"`
	Key   string `json:"key"`
	UID   string `json:"uid"`
	// Revision is the object's before the action; 0: there was none, and no Value.
	Revision int64 `json:"revision"`
	// Value is what etcd held, byte for byte: what was encrypted still is.
	Value       []byte `json:"value"`
	ValueSHA256 []byte `json:"valueSHA256"`
	Delete      bool   `json:"delete"`
}

// Decode returns the before-images, each checked against its hash and the plan.
func (r *Record) Decode() ([]Image, error) {
	images := make([]Image, len(r.Images))
	for i, raw := range r.Images {
		img := &images[i]
		if err := json.Unmarshal(raw, img); err != nil {
			return nil, fault.New(fault.Refused, "report this", "before-image %d is malformed: %w", i, err)
		}
		if img.Index < 0 || img.Index >= len(r.Plan.Objects) || r.Plan.Objects[img.Index].Key != img.Key {
			return nil, fault.New(fault.Refused, "report this", "before-image %d is of no object of the plan", i)
		}
		if sum := sha256.Sum256(img.Value); img.Value != nil && !bytes.Equal(sum[:], img.ValueSHA256) {
			return nil, fault.New(fault.Refused, "report this", "before-image %d does not have its hash", i)
		}
	}
	return images, nil
}
