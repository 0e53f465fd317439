package verb

import (
	"errors"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/structpb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/neutral"
)

// maxInt is the largest value of an "int" parameter, that of a count in
// Kubernetes' own API (int32 replicas); the least is 0.
const maxInt = 1<<31 - 1

// What the fingers type that know kubectl, or other tools: answered with a hint.
var (
	kubectlVerbs = map[string][]string{
		"get":    {"describe", "list", "ls"},
		"scale":  {"stop", "suspend", "rollout"},
		"pause":  {"suspend", "rollout", "freeze", "hold"},
		"resume": {"unpause", "unsuspend"},
		"cordon": {"drain", "taint"},
		"delete": {"rm", "remove", "kill"},
		"revoke": {"deny", "ban"},
		"undo":   {"rollback", "revert", "restore"},
	}
	kubectlFlags = map[string]string{"replicas": "to"}
)

// verb builds the command of an action.
func (v *Verbs) verb(action *halliganv1.Action) *cobra.Command {
	use := []string{action.GetName()}
	for _, p := range action.GetParameters() {
		if p.GetPositional() && p.GetRequired() {
			use = append(use, placeholder(p))
		} else if p.GetPositional() {
			use = append(use, "["+placeholder(p)+"]")
		} else if p.GetRequired() {
			use = append(use, "--"+flagName(p), placeholder(p))
		}
	}
	cmd := &cobra.Command{
		Use:         neutral.Line(strings.Join(use, " ")),
		Short:       neutral.Line(action.GetSummary()),
		Long:        fold(neutral.Text(action.GetDescription())),
		Annotations: map[string]string{"effect": action.GetEffect()},
	}
	if cmd.Long == "" {
		cmd.Long = cmd.Short + "."
	}
	if words := choices(action); words != nil {
		cmd.ValidArgs = words
	}
	cmd.SuggestFor = kubectlVerbs[action.GetName()]
	for _, e := range action.GetExamples() {
		cmd.Example += "  halligan " + neutral.Line(strings.TrimPrefix(e, "halligan ")) + "\n"
	}
	cmd.Example = strings.TrimSuffix(cmd.Example, "\n")
	values := map[string]*value{}
	for _, p := range action.GetParameters() {
		if p.GetPositional() || cmd.Flags().Lookup(flagName(p)) != nil {
			continue
		}
		taken := &value{kind: p.GetType(), placeholder: placeholder(p)}
		values[p.GetName()] = taken
		short := p.GetShorthand()
		if len(short) != 1 || cmd.Flags().ShorthandLookup(short) != nil {
			short = ""
		}
		flag := cmd.Flags().VarPF(taken, flagName(p), short, neutral.Line(p.GetDescription()))
		if taken.kind == "bool" {
			flag.NoOptDefVal = "true"
		}
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		parameters, err := collect(cmd, action, args, values)
		if err != nil {
			return err
		}
		if action.GetEffect() == "mutate" {
			return v.mutate(cmd, action, parameters)
		}
		read, known := reads[action.GetName()]
		if !known {
			return Usage(cmd, "this client is too old to show %s", action.GetName())
		}
		return read(v, cmd, action, parameters)
	}
	return cmd
}

// choices are the words that the first argument is one of, which its placeholder
// says: open|delete; nil where it is anything else.
func choices(action *halliganv1.Action) []string {
	for _, p := range action.GetParameters() {
		if p.GetPositional() {
			if words := strings.Split(p.GetPlaceholder(), "|"); len(words) > 1 {
				return words
			}
			return nil
		}
	}
	return nil
}

// collect gathers the parameters of a call.
func collect(cmd *cobra.Command, action *halliganv1.Action, args []string, values map[string]*value) (*structpb.Struct, error) {
	out := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	args = joinKindAndName(action, args)
	for _, p := range action.GetParameters() {
		if !p.GetPositional() {
			if v := values[p.GetName()]; v != nil && v.set != nil {
				out.Fields[p.GetName()] = v.set
			} else if p.GetRequired() {
				return nil, Usage(cmd, "%s needs --%s %s", action.GetName(), flagName(p), placeholder(p))
			}
			continue
		}
		if len(args) == 0 {
			if p.GetRequired() {
				err := Usage(cmd, "%s needs %s", action.GetName(), placeholder(p))
				if placeholder(p) == "ACTION-ID" {
					err.Next = "see: halligan history"
				}
				return nil, err
			}
			continue
		}
		if p.GetType() == "strings" { // all that is left
			list := &structpb.ListValue{}
			for _, a := range args {
				v := value{kind: "string"}
				if err := v.Set(a); err != nil {
					return nil, Usage(cmd, "%s: %w", placeholder(p), err)
				}
				list.Values = append(list.Values, v.set)
			}
			out.Fields[p.GetName()], args = structpb.NewListValue(list), nil
			continue
		}
		v := value{kind: p.GetType()}
		if err := v.Set(args[0]); err != nil {
			return nil, Usage(cmd, "%s: %w", placeholder(p), err)
		}
		out.Fields[p.GetName()], args = v.set, args[1:]
	}
	if len(args) > 0 {
		return nil, Usage(cmd, "%q is one argument too many", args[0])
	}
	return out, nil
}

// joinKindAndName takes KIND NAME for KIND/NAME, as kubectl does.
func joinKindAndName(action *halliganv1.Action, args []string) []string {
	for _, p := range action.GetParameters() {
		if p.GetType() == "strings" && len(args) > 2 && !strings.ContainsAny(args[0], "/=") && !strings.ContainsAny(args[1], "/=") {
			return append([]string{args[0] + "/" + args[1]}, args[2:]...)
		}
	}
	for _, p := range action.GetParameters() {
		if p.GetPositional() && strings.HasPrefix(p.GetPlaceholder(), "KIND") && strings.Contains(p.GetPlaceholder(), "/NAME") &&
			len(args) == 2 && !strings.Contains(args[0]+args[1], "/") {
			return []string{args[0] + "/" + args[1]}
		}
	}
	return args
}

// fold breaks lines between words, before column 80 where that can be.
func fold(text string) string {
	var b strings.Builder
	column := 0
	for word := range strings.FieldsSeq(text) {
		switch {
		case column > 0 && column+1+len(word) >= 80:
			b.WriteByte('\n')
			column = 0
		case column > 0:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += len(word)
	}
	return b.String()
}

// flagName returns the long flag of a parameter: allNamespaces becomes
// all-namespaces.
func flagName(p *halliganv1.Parameter) string {
	var b strings.Builder
	for _, r := range p.GetName() {
		if unicode.IsUpper(r) {
			b.WriteByte('-')
			r = unicode.ToLower(r)
		}
		b.WriteRune(r)
	}
	return b.String()
}

func placeholder(p *halliganv1.Parameter) string {
	if p.GetPlaceholder() != "" {
		return p.GetPlaceholder()
	}
	return strings.ToUpper(p.GetName())
}

// limit is how long to wait for an action: what the person said, or what the
// agent grants it and some time for the way.
func (v *Verbs) limit(action *halliganv1.Action) time.Duration {
	if v.timeout > 0 {
		return v.timeout
	}
	return time.Duration(max(action.GetTimeoutSeconds(), 20))*time.Second + 10*time.Second
}

// value is a flag or argument of one of the three types.
type value struct {
	kind, placeholder string
	set               *structpb.Value
}

func (v *value) String() string { return "" }

// Type names the value in a help text.
func (v *value) Type() string {
	if v.kind == "bool" {
		return "bool"
	}
	return v.placeholder
}

func (v *value) Set(s string) error {
	switch v.kind {
	case "int":
		n, err := strconv.ParseUint(s, 10, 31)
		if err != nil {
			return errors.New("must be a whole number from 0 to " + strconv.Itoa(maxInt))
		}
		v.set = structpb.NewNumberValue(float64(n))
	case "bool":
		b, err := strconv.ParseBool(s)
		if err != nil {
			return errors.New("must be true or false")
		}
		v.set = structpb.NewBoolValue(b)
	default:
		if strings.ToValidUTF8(s, "") != s {
			return errors.New("must be UTF-8")
		}
		v.set = structpb.NewStringValue(s)
	}
	return nil
}
