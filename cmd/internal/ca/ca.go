// Package ca is halligan ca: the key ceremony and the daily work of a fleet's
// authority, for a machine that is offline. It makes keys, issues and renews
// certificates, revokes them, and signs and verifies the parts of the bundle,
// all of which stock ssh-keygen can check.
//
// It must never touch the network, write a private key that others may read, or
// replace a key. It stands on floor 5.
package ca

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// Surroundings are what a command is run in.
type Surroundings struct {
	Out io.Writer
	Env func(string) string
	Now func() time.Time
}

// tool is one run of a command below ca.
type tool struct {
	Surroundings
	dir string
}

// Command returns halligan ca with all below it.
func Command(s Surroundings) *cobra.Command {
	t := &tool{Surroundings: s}
	c := &cobra.Command{
		Use: "ca", Short: "Run the offline authority: keys, certificates, revocations and the bundle",
		Long: "Runs a fleet's authority on an offline machine. Everything lies in one folder (--dir, or HALLIGAN_CA).\n" +
			"A key that signs is a file, or one in the ssh-agent where its .pub file is named, so that hardware keys work.\n\n" +
			"  halligan ca init DIR --fleet NAME             once: keys, a policy to review, skeletons\n" +
			"  halligan ca bundle sign PART --signer KEY     each signer, on a machine of their own\n" +
			"  halligan ca issue user NAME --key FILE.pub --roles ROLE --clusters CLUSTER\n" +
			"  halligan ca renew FILE-cert.pub               daily\n" +
			"  halligan ca revoke --person NAME              then: halligan ca bundle sign revocations",
		Args: cobra.ArbitraryArgs, RunE: group,
		// In place of the root's: what says how to reach an agent, or how to change a
		// cluster, means nothing here.
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) (err error) {
			cmd.Flags().Visit(func(f *pflag.Flag) {
				if cmd.Root().PersistentFlags().Lookup(f.Name) == f {
					err = usage(cmd, "%s asks no agent: --%s does not apply", cmd.CommandPath(), f.Name)
				}
			})
			return err
		},
	}
	dir := s.Env("HALLIGAN_CA")
	if dir == "" {
		dir = "."
	}
	c.PersistentFlags().StringVar(&t.dir, "dir", dir, "`folder` of the authority (HALLIGAN_CA)")
	if s.Env("HALLIGAN_CA") != "" {
		c.PersistentFlags().Lookup("dir").DefValue = ""
	}
	c.AddCommand(t.initialise(), t.issue(), t.renew(), t.revoke(), t.bundle())
	c.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		cmd.Root().PersistentFlags().VisitAll(func(f *pflag.Flag) { f.Hidden = true })
		cmd.Root().HelpFunc()(cmd, args)
	})
	return c
}

// group is a command that only has others below it.
func group(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(cmd, "unknown command %q", args[0])
	}
	return cmd.Help()
}

func usage(cmd *cobra.Command, text string, args ...any) error {
	return fault.New(fault.Usage, "see: "+cmd.CommandPath()+" --help", text, args...)
}

// words demands so many arguments.
func words(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return usage(cmd, "%s needs %s", cmd.CommandPath(), what)
		}
		return nil
	}
}

// folder returns the authority's folder.
func (t *tool) folder() (*Folder, error) {
	f := t.anyFolder()
	return f, f.check()
}

// anyFolder returns it also where there is none: whoever only signs a part that
// another machine made has no authority.
func (t *tool) anyFolder() *Folder {
	return &Folder{dir: t.dir, ask: t.passphrase, socket: t.Env("SSH_AUTH_SOCK"), now: t.Now, out: t.Out}
}

// passphrase asks on the terminal of this process, wherever its streams lead.
func (t *tool) passphrase(file string) ([]byte, error) {
	return t.prompt("Passphrase of "+file+": ", "load the key into an ssh-agent: ssh-add "+file)
}

func (t *tool) prompt(question, instead string) ([]byte, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, fault.New(fault.Usage, "run this on a terminal, or "+instead, "there is no terminal to ask for a passphrase on")
	}
	defer tty.Close()
	if _, err := io.WriteString(tty, neutral.Line(question)); err != nil {
		return nil, err
	}
	answer, err := term.ReadPassword(int(tty.Fd()))
	_, _ = io.WriteString(tty, "\n")
	if err != nil {
		return nil, fault.New(fault.Cancelled, "nothing was done", "no passphrase was given")
	}
	return answer, nil
}

// newPassphrase asks twice.
func (t *tool) newPassphrase() ([]byte, error) {
	const instead = "give --no-passphrase where the disk itself is encrypted"
	one, err := t.prompt("Passphrase for the keys that are made here: ", instead)
	if err != nil {
		return nil, err
	}
	if len(one) == 0 {
		return nil, fault.New(fault.Usage, instead, "the passphrase is empty")
	}
	two, err := t.prompt("The same again: ", instead)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(one, two) {
		return nil, fault.New(fault.Usage, "nothing was made; start again", "the two passphrases differ")
	}
	return one, nil
}

// say prints a line of a command's answer.
func (t *tool) say(format string, args ...any) { fmt.Fprintf(t.Out, format+"\n", args...) }

// hours writes a time as people say it: 90 days, 168h, 1h30m, 40m.
func hours(d time.Duration) string {
	d = d.Round(time.Minute)
	h, m := int(d.Hours()), int(d.Minutes())%60
	switch {
	case h > 14*24:
		return fmt.Sprintf("%d days", h/24)
	case m == 0:
		return fmt.Sprintf("%dh", h)
	case h == 0:
		return fmt.Sprintf("%dm", m)
	}
	return fmt.Sprintf("%dh%dm", h, m)
}
