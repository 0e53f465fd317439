// Package agent is the daemon on a control-plane node: it puts the surgical
// engine together from the node's files and opens its doors: the console socket
// always, SSH and gRPC to the network where it has a bundle that says whom to
// trust.
//
// It must never need anything that may be what failed: no DNS, no API server, no
// other machine. It stands on floor 4.
package agent

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/agent/action"
	"github.com/halligan-io/halligan/agent/diagnose"
	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/journal"
	"github.com/halligan-io/halligan/agent/localapi"
	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/audit/record"
	"github.com/halligan-io/halligan/audit/service"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/inforce"
	"github.com/halligan-io/halligan/internal/version"
)

// gcPercent is half of Go's usual 100: a list of 100,000 objects then stays
// below 64 MiB resident, for some more CPU time. GOGC in the environment wins.
const gcPercent = 50

// Run serves until the context ends. It starts without etcd: reads and writes
// then say what is missing, and work as soon as it is back. The same goes for the
// encryption configuration, and for a state folder on a file system that fails.
func Run(ctx context.Context, c Config, distribution string, log zerolog.Logger) error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	alarms, err := alarm.Open(alarm.Options{Node: c.Node, Cluster: c.Cluster, Sinks: c.Alarms, Log: log})
	if err != nil {
		return err
	}
	defer alarms.Close()
	records, err := journal.Open(c.StateDir, journal.Options{MaxBytes: c.JournalMaxBytes})
	if err != nil {
		return err
	}
	defer records.Close()
	clock := trust.NewClock(version.Built())
	holder := service.NewHolder()
	var believed *trusted
	evidence, err := record.Open(record.Options{StateDir: c.StateDir, Origin: c.origin(), Config: c.Audit, Now: clock.Now, Hold: holder,
		Witnesses: func() int { return believed.bastions() }, Raise: alarms.Raise, Log: log})
	if err != nil {
		return err
	}
	defer evidence.Close()
	past := func() (all []inforce.Moment) {
		for _, e := range records.Entries() {
			all = append(all, inforce.Moment{What: "the action " + e.ID, At: e.Time})
		}
		return append(all, inforce.Moment{What: "an event of the evidence log", At: evidence.LastTime()})
	}
	if believed, err = newTrusted(c, clock, past, evidence.Raise, evidence.Believe, log); err != nil {
		return err
	}
	images, err := openSealed(c, evidence, believed, clock, log)
	if err != nil {
		return err
	}
	defer images.Close()
	encryption := storage.OpenEncryption(c.EncryptionConfig)
	defer encryption.Close()
	if err := encryption.Usable(ctx); err != nil {
		// Reads and deletions of what is not encrypted do not depend on it.
		log.Error().Msg(neutral.Line(fault.Of(err).Error()))
	}
	client, err := etcd.Open(etcd.Config{Endpoints: c.Etcd.Endpoints, CAFile: c.Etcd.CAFile, CertFile: c.Etcd.CertFile, KeyFile: c.Etcd.KeyFile,
		ServerName: c.Etcd.ServerName})
	if err != nil {
		return fmt.Errorf("etcd: %w", err)
	}
	defer client.Close()

	var local *localapi.Endpoint // a nil one asks nobody
	if l := c.LocalAPI; l.asked() {
		local = localapi.Open(localapi.Options{Kubeconfigs: l.Kubeconfigs, Address: l.Endpoint, ServerName: l.ServerName, Now: clock.Now, Log: log})
	}
	engine := action.New(action.Options{LocalAPI: local.Status, Node: c.Node, Version: version.String(), Prefix: c.Etcd.Prefix, Distribution: distribution, Etcd: client, Elsewhere: c.Etcd.Overrides,
		Encryption: encryption, Journal: records, Audit: evidence, Past: action.PastOf(evidence.Ledger), Sealed: images.seal(), Take: images.take(), Gone: filepath.Join(c.StateDir, "gone"), Policy: believed.Policy, Cluster: c.Cluster, Fresh: believed.Fresh, Approvals: believed, Alarm: evidence.Raise,
		Now: clock.Now, Log: log})
	served, _ := netip.ParseAddrPort(c.LocalAPI.Endpoint) // empty: the usual port
	look := diagnose.New(diagnose.Options{Node: c.Node, Prefix: c.Etcd.Prefix, Etcd: client, Encryption: encryption, Elsewhere: c.Etcd.Overrides,
		API: local, APIPort: served.Port(), Policy: believed.Policy, Log: log})
	// Ending, in this order: the doors close when every call has returned, then
	// the settling of old actions, then what both stand on, the alarms last.
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var background sync.WaitGroup
	defer background.Wait()
	background.Go(func() { engine.Recover(ctx) })
	background.Go(func() { engine.WatchGone(ctx) })
	background.Go(func() { local.Run(ctx) })
	background.Go(func() { expire(ctx, records, believed, clock.Now, log) })
	if err := records.Ready(); err != nil {
		log.Error().Msg("nothing can be changed: " + neutral.Line(fault.Of(err).Error()))
		background.Go(func() {
			if mended(ctx, records) {
				log.Info().Msg("actions can be recorded again")
				believed.Recall(past(), true)
				tellDamaged(records, log)
			}
		})
	} else {
		tellDamaged(records, log)
	}
	defer stop()
	log.Info().Str("version", version.String()).Str("distribution", distribution).Str("socket", c.Socket).
		Strs("etcd", c.Etcd.Endpoints).Int("unfinished", len(records.Unfinished())).Msg("agent starts")
	return serve(ctx, c, engine, look, believed, evidence, images, holder, local, alarms, log)
}

// mended waits until the state folder can be opened, or the context ends.
func mended(ctx context.Context, records *journal.Journal) bool {
	for records.Ready() != nil {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(5 * time.Second):
		}
	}
	return true
}

// tellDamaged logs which records cannot be read.
func tellDamaged(records *journal.Journal, log zerolog.Logger) {
	for _, e := range records.Entries() {
		if e.Result == journal.Damaged {
			log.Error().Str("action", e.ID).Msg(neutral.Line(e.Summary) + "; keep the file for whoever investigates")
		}
	}
}
