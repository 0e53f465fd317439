package sealed

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"filippo.io/age"
	"google.golang.org/protobuf/encoding/protojson"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
)

// maxPlain bounds what a file is decompressed to, in bytes: anywhere, and in an
// agent, which has little memory and takes no larger files than a request has.
const (
	maxPlain = 512 << 20
	maxTaken = 32 << 20
)

// Record is what a sealed file holds.
type Record struct {
	// Plan is what was applied.
	Plan *halliganv1.Plan
	// Images are the before-images, as the agent's journal has them.
	Images []json.RawMessage
}

// Server is the agent that made it.
func (r *Record) Server() string { return r.Plan.GetNode() + "." + r.Plan.GetClusterName() }

// line is one line of a journal's record, as far as it matters here: its checksum is
// of no use where the whole file has a hash.
type line struct {
	Intent json.RawMessage `json:"intent"`
	Image  json.RawMessage `json:"image"`
	// Access stands beside the intent.
	Access struct {
		// Intent is the event of the log that the action stands on.
		Intent string `json:"intent"`
	} `json:"access"`
}

// write writes a file. The compression is the fastest, with the least state: images
// are many copies of the same few fields, and what is short travels with an undo.
func write(w io.Writer, record io.Reader, to []age.Recipient) error {
	crypt, err := age.Encrypt(w, to...)
	if err != nil {
		return err
	}
	packed, err := gzip.NewWriterLevel(crypt, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if _, err := io.Copy(packed, record); err != nil {
		return err
	}
	return errors.Join(packed.Close(), crypt.Close())
}

// encrypt writes a file of what is compressed already.
func encrypt(w io.Writer, packed []byte, to []age.Recipient) error {
	crypt, err := age.Encrypt(w, to...)
	if err == nil {
		_, err = crypt.Write(packed)
	}
	if err != nil {
		return err
	}
	return crypt.Close()
}

// unpack opens a file, and returns what is compressed in it and the event that the
// action stands on.
func unpack(file io.Reader, key age.Identity) (packed []byte, intent string, err error) {
	plain, err := age.Decrypt(file, key)
	if err != nil {
		return nil, "", err
	}
	if packed, err = io.ReadAll(plain); err != nil {
		return nil, "", err
	}
	text, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, "", err
	}
	var first line
	err = json.NewDecoder(io.LimitReader(text, maxTaken)).Decode(&first)
	return packed, first.Access.Intent, err
}

// Read opens a file with one of the keys.
func Read(file io.Reader, keys ...age.Identity) (*Record, error) {
	r, err := read(file, maxPlain, keys)
	if err != nil {
		return nil, fault.New(fault.Refused, "see that it is a whole file of sealed/, and the key one that it was sealed to", "sealed before-images cannot be opened: %w", err)
	}
	return r, nil
}

func read(file io.Reader, most int64, keys []age.Identity) (*Record, error) {
	plain, err := age.Decrypt(file, keys...)
	if err != nil {
		return nil, err
	}
	packed, err := gzip.NewReader(plain)
	if err != nil {
		return nil, err
	}
	limited := &io.LimitedReader{R: packed, N: most}
	lines := json.NewDecoder(limited)
	var r *Record
	for {
		var l line
		err := lines.Decode(&l)
		switch {
		case limited.N == 0:
			return nil, fmt.Errorf("it has more than %d MiB", most>>20)
		case errors.Is(err, io.EOF) && r != nil:
			return r, nil
		case err != nil:
			return nil, err
		case r == nil && l.Intent == nil || r != nil && l.Intent != nil:
			return nil, errors.New("it is no record of an action")
		case r == nil:
			r = &Record{Plan: &halliganv1.Plan{}}
			if err := protojson.Unmarshal(l.Intent, r.Plan); err != nil {
				return nil, err
			}
		case l.Image != nil:
			r.Images = append(r.Images, l.Image)
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
