package evidence

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/halligan-io/halligan/audit/sealed"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

// maxSealed bounds a sealed file in bytes.
const maxSealed = 256 << 20

// recovered is a before-image, as it is shown and listed beside the values.
type recovered struct {
	Key       string `json:"key"`
	UID       string `json:"uid,omitempty"`
	Operation string `json:"operation"`
	// Revision is the object's before the action; 0: there was none.
	Revision int64  `json:"revision"`
	Bytes    int    `json:"bytes"`
	SHA256   string `json:"sha256,omitempty"`
	File     string `json:"file,omitempty"`
}

func (t *tool) recover() *cobra.Command {
	var keyFile, out string
	c := &cobra.Command{
		Use: "recover FILE.age --offline-key FILE [--out DIR]", Short: "Open sealed before-images with the policy's offline key",
		Long: "Opens a file of the folder sealed/ of an evidence folder, for when no agent of the cluster is left that could take\n" +
			"the action back. It needs nothing but the file and the key, so that it runs where the key is: offline. Values are\n" +
			"never shown, only written with --out, as etcd had them: what was encrypted at rest still is. One is put back with\n" +
			"etcdctl put KEY < FILE. Stock age opens the same file: age -d -i KEY FILE.age | gunzip.\n\n" +
			"Whether it is the file that the log tells of says its SHA-256: halligan audit show --kind outcome -o json.",
		Args: arguments(1, 1, "one file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if keyFile == "" {
				return usage(cmd, "%s needs --offline-key", cmd.CommandPath())
			}
			return t.recovers(args[0], keyFile, out)
		},
	}
	c.Flags().StringVar(&keyFile, "offline-key", "", "`file` with the key (AGE-SECRET-KEY-1…), as age-keygen writes it")
	c.Flags().StringVar(&out, "out", "", "`folder` to write the values to, which must not be there")
	return c
}

func (t *tool) recovers(file, keyFile, out string) error {
	const next = "name the files as they are: halligan audit recover --help"
	data, err := readBounded(file, maxSealed)
	if err != nil {
		return fault.New(fault.Usage, next, "%w", err)
	}
	if err := durable.CheckPrivate(keyFile); err != nil {
		return fault.New(fault.Usage, next, "the offline key: %w", err)
	}
	text, err := readBounded(keyFile, 64<<10)
	if err != nil {
		return fault.New(fault.Usage, next, "the offline key: %w", err)
	}
	keys, err := age.ParseIdentities(bytes.NewReader(text))
	if err != nil { // which could quote the key
		return fault.New(fault.Usage, "where a passphrase protects it, decrypt it first: age -d", "%s holds no key of age", keyFile)
	}
	record, err := sealed.Read(bytes.NewReader(data), keys...)
	if err != nil {
		return err
	}
	images, err := record.Decode()
	if err != nil {
		return err
	}
	all := make([]recovered, len(images))
	for i, img := range images {
		all[i] = recovered{Key: img.Key, UID: img.UID, Operation: record.Plan.Objects[img.Index].Operation, Revision: img.Revision, Bytes: len(img.Value)}
		if img.Value != nil {
			sum := sha256.Sum256(img.Value)
			all[i].SHA256 = hex.EncodeToString(sum[:])
		}
	}
	if out != "" {
		if err := writeImages(out, images, all); err != nil {
			return fault.New(fault.Failed, "name another folder", "writing the values: %w", err)
		}
	}
	sum := sha256.Sum256(data)
	return t.showRecovered(record, all, hex.EncodeToString(sum[:]), out)
}

// writeImages writes each value to a file of its own, and the list of them last.
func writeImages(out string, images []sealed.Image, all []recovered) error {
	if _, err := os.Lstat(out); !errors.Is(err, os.ErrNotExist) {
		return errors.Join(err, fmt.Errorf("%s is there already", out))
	}
	if err := durable.Dir(out); err != nil {
		return err
	}
	for i, img := range images {
		if img.Value == nil {
			continue
		}
		all[i].File = fmt.Sprintf("%05d.value", i)
		if err := durable.Write(filepath.Join(out, all[i].File), img.Value); err != nil {
			return err
		}
	}
	list, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	return durable.Write(filepath.Join(out, "index.json"), append(list, '\n'))
}

func (t *tool) showRecovered(r *sealed.Record, all []recovered, sum, out string) error {
	p := r.Plan
	if !t.table() {
		plan, err := protojson.Marshal(p)
		if err != nil {
			return err
		}
		text, err := json.Marshal(struct {
			Server string          `json:"server"`
			SHA256 string          `json:"sha256"`
			Plan   json.RawMessage `json:"plan"`
			Images []recovered     `json:"images"`
		}{r.Server(), sum, plan, all})
		if err != nil {
			return err
		}
		return t.PrintJSON(text)
	}
	t.say("%s: %s by %s as %s on %s, %s", p.Id, p.Action, p.Actor, p.Role, r.Server(), p.Summary)
	t.say("reason: %s   incident: %s   sha256: %s", p.Reason, p.Incident, sum)
	for _, img := range all {
		t.say("%s", strings.TrimSpace(fmt.Sprintf("%s  %s  revision %d, %d bytes  %s", img.Operation, img.Key, img.Revision, img.Bytes, img.File)))
	}
	if out != "" {
		t.say("written to %s; put one back with: etcdctl put KEY < FILE", out)
	}
	return nil
}

func readBounded(name string, most int64) ([]byte, error) {
	st, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > most {
		return nil, fmt.Errorf("%s is no plain file of at most %d MiB", name, max(most>>20, 1))
	}
	return os.ReadFile(name)
}
