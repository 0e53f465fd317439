package api

import (
	"bytes"
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
)

func parameters(t testing.TB, m map[string]any) *structpb.Struct {
	t.Helper()
	s, err := structpb.NewStruct(m)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func plan(t testing.TB) *halliganv1.Plan {
	return &halliganv1.Plan{
		Id:     "20261123t020304-abcd",
		Action: "scale",
		Parameters: parameters(t, map[string]any{
			"to": 0, "target": "ds/collector", "list": []any{1.5, nil, true, "x"}, "big": 1e20, "huge": 1e21, "tiny": 1e-7,
			"empty": map[string]any{},
		}),
		Reason:   "<telemetry> & \"storm\"\n\u2028\x01",
		Revision: math.MaxInt64,
		Created:  timestamppb.New(time.Date(2026, 11, 23, 2, 3, 4, 500, time.FixedZone("", 3600))),
		Objects: []*halliganv1.PlannedObject{{
			Key: "/registry/daemonsets/telemetry/collector", Revision: 7,
			Changes: []*halliganv1.FieldChange{{Path: "spec.replicas", Before: "3", After: "0"}},
		}},
	}
}

func TestCanonicalJSON(t *testing.T) {
	want := `{"action":"scale","created":"2026-11-23T01:03:04.0000005Z","id":"20261123t020304-abcd",` +
		`"objects":[{"changes":[{"after":"0","before":"3","path":"spec.replicas"}],"key":"/registry/daemonsets/telemetry/collector","revision":7}],` +
		`"parameters":{"big":100000000000000000000,"empty":{},"huge":1e+21,"list":[1.5,null,true,"x"],"target":"ds/collector","tiny":1e-7,"to":0},` +
		`"reason":"<telemetry> & \"storm\"\n` + "\u2028" + `\u0001","revision":9223372036854775807}`
	got, err := CanonicalJSON(plan(t))
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for name, m := range map[string]proto.Message{
		"plan":   plan(t),
		"result": &halliganv1.Result{TimingsMs: map[string]float64{"b": 0.25, "a": 12}, Plan: plan(t)},
		"status": &halliganv1.StatusResponse{Encryption: map[string]string{"secrets": "aesgcm", "a\"b": ""}, Etcd: &halliganv1.EtcdStatus{Quorum: true}},
		"event":  &halliganv1.ApplyEvent{Event: &halliganv1.ApplyEvent_Progress{Progress: &halliganv1.Progress{}}},
		"empty":  &halliganv1.DescribeRequest{},
	} {
		roundTrip(t, name, m)
	}
}

func roundTrip(t *testing.T, name string, m proto.Message) {
	t.Helper()
	text, err := CanonicalJSON(m)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	back := m.ProtoReflect().New().Interface()
	if err := protojson.Unmarshal(text, back); err != nil {
		t.Fatalf("%s: protojson does not read %s: %v", name, text, err)
	}
	again, err := CanonicalJSON(back)
	if err != nil || !bytes.Equal(again, text) {
		t.Fatalf("%s: %s\nbecame %s (%v)", name, text, again, err)
	}
	if !proto.Equal(m, back) {
		t.Fatalf("%s: %s reads back as another message", name, text)
	}
}

// The order of keys is that of UTF-16 code units: RFC 8785's own example.
func TestCanonicalKeyOrder(t *testing.T) {
	s := parameters(t, map[string]any{"€": "Euro Sign", "\r": "Carriage Return", "\ufb33": "Hebrew Letter Dalet With Dagesh",
		"1": "One", "😀": "Emoji: Grinning Face", "\u0080": "Control", "ö": "Latin Small Letter O With Diaeresis"})
	got, err := CanonicalJSON(s)
	if err != nil {
		t.Fatal(err)
	}
	at := -1
	for _, value := range []string{"Carriage", "One", "Control", "Latin", "Euro", "Emoji", "Hebrew"} {
		i := strings.Index(string(got), value)
		if i < at {
			t.Errorf("%s stands too early in %s", value, got)
		}
		at = i
	}
}

func TestCanonicalRefuses(t *testing.T) {
	unknown := &halliganv1.Plan{}
	unknown.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 9999, protowire.VarintType), 1))
	for name, m := range map[string]proto.Message{
		"not UTF-8":        &halliganv1.Plan{Reason: "\xff"},
		"NaN":              &halliganv1.Progress{PerSecond: math.NaN()},
		"infinity":         structpb.NewNumberValue(math.Inf(1)),
		"no kind":          &structpb.Value{},
		"absurd time":      &timestamppb.Timestamp{Seconds: math.MaxInt64},
		"unknown field":    unknown,
		"other well-known": durationpb.New(1),
	} {
		if got, err := CanonicalJSON(m); err == nil {
			t.Errorf("%s: got %s", name, got)
		}
	}
}

func TestPlanSHA256(t *testing.T) {
	p := plan(t)
	sum, err := PlanSHA256(p)
	if err != nil {
		t.Fatal(err)
	}
	p.Sha256 = sum
	if again, err := PlanSHA256(p); err != nil || again != sum || p.Sha256 != sum || len(sum) != 64 {
		t.Errorf("with the hash set: %s, %v; before: %s", again, err, sum)
	}
	p.Objects[0].Revision++
	if other, _ := PlanSHA256(p); other == sum {
		t.Error("another revision has the same hash")
	}
}

func FuzzCanonicalJSON(f *testing.F) {
	p := plan(f)
	p.Sha256 = "x"
	wire, err := proto.Marshal(p)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	f.Fuzz(func(t *testing.T, wire []byte) {
		var m halliganv1.Plan
		if proto.Unmarshal(wire, &m) != nil {
			return
		}
		text, err := CanonicalJSON(&m)
		if err != nil {
			return
		}
		if !json.Valid(text) {
			t.Fatalf("no JSON: %q", text)
		}
		var back halliganv1.Plan
		if err := protojson.Unmarshal(text, &back); err != nil {
			t.Fatalf("protojson does not read %q: %v", text, err)
		}
		if again, err := CanonicalJSON(&back); err != nil || !bytes.Equal(again, text) {
			t.Fatalf("%q became %q (%v)", text, again, err)
		}
	})
}
