// Package api is the wire contract between an agent and whoever stands before
// it: the messages of halligan/v1, their one canonical JSON form, which plan
// hashes, records and the output of the command line share, and the form in
// which errors cross a connection.
//
// It must never know how an action is carried out, nor talk to anything. It
// stands on floor 1, and is where agent and bastion meet.
package api

import (
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
)

// DefaultSocket is where an agent has its console and the command line looks
// for it, unless either is told otherwise.
const DefaultSocket = "/run/halligan/console.sock"

// CanonicalJSON returns the one JSON text of a message: equal messages give
// equal bytes on every release and machine, and protojson.Unmarshal reads them
// back. It is the JSON Canonicalization Scheme (RFC 8785: no spaces, keys
// sorted by UTF-16 code units, shortest numbers, only the necessary escapes)
// of the usual JSON form of protobuf, with two differences: 64-bit integers
// are numbers and exact, and fields without a value are left out.
//
// It fails on what has no such form: strings that are not UTF-8, NaN and
// infinities, times outside the years 1 to 9999, well-known types other than
// Timestamp and Struct, and fields that this build does not know.
func CanonicalJSON(m proto.Message) ([]byte, error) {
	return appendMessage(nil, m.ProtoReflect())
}

// PlanSHA256 returns the hexadecimal SHA-256 of the canonical JSON of the plan
// without its sha256 field. It does not change the plan.
func PlanSHA256(p *halliganv1.Plan) (string, error) {
	if p.GetSha256() != "" {
		p = proto.CloneOf(p)
		p.Sha256 = ""
	}
	text, err := CanonicalJSON(p)
	if err != nil {
		return "", fmt.Errorf("hashing plan %s: %w", p.GetId(), err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

// A member is one key of a JSON object with its encoded value.
type member struct{ key, value string }

func appendObject(b []byte, members []member) ([]byte, error) {
	slices.SortFunc(members, func(x, y member) int { return compareKeys(x.key, y.key) })
	b = append(b, '{')
	for i, m := range members {
		if i > 0 {
			b = append(b, ',')
		}
		var err error
		if b, err = appendString(b, m.key); err != nil {
			return nil, err
		}
		b = append(b, ':')
		b = append(b, m.value...)
	}
	return append(b, '}'), nil
}

// compareKeys orders by UTF-16 code units (RFC 8785, section 3.2.3), which
// differs from the order of bytes above U+D7FF only.
func compareKeys(x, y string) int {
	high := func(r rune) bool { return r > 0xD7FF }
	if !strings.ContainsFunc(x, high) || !strings.ContainsFunc(y, high) {
		return cmp.Compare(x, y)
	}
	return slices.Compare(utf16.Encode([]rune(x)), utf16.Encode([]rune(y)))
}

func appendMessage(b []byte, m protoreflect.Message) ([]byte, error) {
	d := m.Descriptor()
	if len(m.GetUnknown()) > 0 {
		return nil, fmt.Errorf("%s has fields that this release does not know", d.FullName())
	}
	switch v := m.Interface().(type) {
	case *timestamppb.Timestamp:
		if err := v.CheckValid(); err != nil {
			return nil, err
		}
		return append(v.AsTime().AppendFormat(append(b, '"'), time.RFC3339Nano), '"'), nil
	case *structpb.Struct:
		return appendMap(b, m.Get(d.Fields().ByName("fields")).Map(), d.Fields().ByName("fields"))
	case *structpb.ListValue:
		return appendList(b, m.Get(d.Fields().ByName("values")).List(), d.Fields().ByName("values"))
	case *structpb.Value:
		return appendDynamic(b, v)
	}
	if d.ParentFile().Package() == "google.protobuf" {
		return nil, fmt.Errorf("%s has no canonical form here", d.FullName())
	}
	var members []member
	var err error
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		var value []byte
		switch {
		case f.IsMap():
			value, err = appendMap(nil, v.Map(), f)
		case f.IsList():
			value, err = appendList(nil, v.List(), f)
		default:
			value, err = appendScalar(nil, v, f)
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", f.JSONName(), err)
		}
		members = append(members, member{f.JSONName(), string(value)})
		return err == nil
	})
	if err != nil {
		return nil, err
	}
	return appendObject(b, members)
}

func appendMap(b []byte, m protoreflect.Map, f protoreflect.FieldDescriptor) ([]byte, error) {
	var members []member
	var err error
	m.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		var value []byte
		value, err = appendScalar(nil, v, f.MapValue())
		members = append(members, member{k.String(), string(value)})
		return err == nil
	})
	if err != nil {
		return nil, err
	}
	return appendObject(b, members)
}

func appendList(b []byte, l protoreflect.List, f protoreflect.FieldDescriptor) ([]byte, error) {
	b = append(b, '[')
	for i := range l.Len() {
		if i > 0 {
			b = append(b, ',')
		}
		var err error
		if b, err = appendScalar(b, l.Get(i), f); err != nil {
			return nil, err
		}
	}
	return append(b, ']'), nil
}

// appendDynamic writes a Value of a Struct.
func appendDynamic(b []byte, v *structpb.Value) ([]byte, error) {
	switch k := v.GetKind().(type) {
	case *structpb.Value_NullValue:
		return append(b, "null"...), nil
	case *structpb.Value_NumberValue:
		return appendFloat(b, k.NumberValue, 64)
	case *structpb.Value_StringValue:
		return appendString(b, k.StringValue)
	case *structpb.Value_BoolValue:
		return strconv.AppendBool(b, k.BoolValue), nil
	case *structpb.Value_StructValue:
		return appendMessage(b, k.StructValue.ProtoReflect())
	case *structpb.Value_ListValue:
		return appendMessage(b, k.ListValue.ProtoReflect())
	}
	return nil, errors.New("a value without a kind")
}

// appendScalar writes one value that is neither a list nor a map.
func appendScalar(b []byte, v protoreflect.Value, f protoreflect.FieldDescriptor) ([]byte, error) {
	switch f.Kind() {
	case protoreflect.BoolKind:
		return strconv.AppendBool(b, v.Bool()), nil
	case protoreflect.StringKind:
		return appendString(b, v.String())
	case protoreflect.BytesKind:
		return append(base64.StdEncoding.AppendEncode(append(b, '"'), v.Bytes()), '"'), nil
	case protoreflect.EnumKind:
		if e := f.Enum().Values().ByNumber(v.Enum()); e != nil {
			return appendString(b, string(e.Name()))
		}
		return strconv.AppendInt(b, int64(v.Enum()), 10), nil
	case protoreflect.FloatKind:
		return appendFloat(b, v.Float(), 32)
	case protoreflect.DoubleKind:
		return appendFloat(b, v.Float(), 64)
	case protoreflect.MessageKind, protoreflect.GroupKind:
		return appendMessage(b, v.Message())
	case protoreflect.Uint32Kind, protoreflect.Uint64Kind, protoreflect.Fixed32Kind, protoreflect.Fixed64Kind:
		return strconv.AppendUint(b, v.Uint(), 10), nil
	default:
		return strconv.AppendInt(b, v.Int(), 10), nil
	}
}

// appendFloat writes a number as ECMAScript does (RFC 8785, section 3.2.2.3):
// the shortest digits that give the number back, an exponent only below 1e-6
// and from 1e21 on.
func appendFloat(b []byte, v float64, bits int) ([]byte, error) {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return nil, errors.New("a number that JSON has no form for")
	}
	if v == 0 {
		return append(b, '0'), nil // also for -0
	}
	if abs := math.Abs(v); abs >= 1e-6 && abs < 1e21 {
		return strconv.AppendFloat(b, v, 'f', -1, bits), nil
	}
	mantissa, exponent, _ := strings.Cut(strconv.FormatFloat(v, 'e', -1, bits), "e")
	// ECMAScript writes no leading zero in an exponent.
	return append(b, mantissa+"e"+exponent[:1]+strings.TrimLeft(exponent[1:], "0")...), nil
}

// appendString writes a string with the escapes of RFC 8785, section 3.2.2.2.
func appendString(b []byte, s string) ([]byte, error) {
	if !utf8.ValidString(s) {
		return nil, fmt.Errorf("%q is not UTF-8", s)
	}
	b = append(b, '"')
	for i := range len(s) {
		switch c := s[i]; c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\b':
			b = append(b, `\b`...)
		case '\t':
			b = append(b, `\t`...)
		case '\n':
			b = append(b, `\n`...)
		case '\f':
			b = append(b, `\f`...)
		case '\r':
			b = append(b, `\r`...)
		default:
			if c < 0x20 {
				b = fmt.Appendf(b, `\u%04x`, c)
			} else {
				b = append(b, c)
			}
		}
	}
	return append(b, '"'), nil
}
