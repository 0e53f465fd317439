package lab

import (
	"context"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/halligan-io/halligan/agent/localapi"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
)

// TestKubeLocalAPI: a real API server says of the administrator's credentials that flow
// control lets them pass, and of a person's that it does not; the agent beside it shows
// so, and one without an API server of its own asks none.
func TestKubeLocalAPI(t *testing.T) {
	l := sharedKube(t)
	for file, exempt := range map[string]bool{l.kube.AdminKubeconfig(): true, l.kube.UserKubeconfig(): false} {
		e := localapi.Open(localapi.Options{Kubeconfigs: []string{file}, Address: l.API(0), ServerName: l.ip(0), Log: zerolog.Nop()})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { e.Run(ctx); close(ended) }()
		eventually(t, "it is asked", func() bool { return e.State().Ready })
		stop()
		<-ended
		if s := e.State(); s.FlowControl != "on" || s.Exempt != exempt || s.Err != nil || s.Latency <= 0 || time.Until(s.Expires) <= 0 || (len(e.Warnings()) == 0) != exempt {
			t.Errorf("%s: %+v, %q", file, s, e.Warnings())
		}
	}
	of := func(i int) *halliganv1.LocalAPIStatus {
		conn, err := grpc.NewClient("unix:"+l.Socket(i), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		st, err := halliganv1.NewAgentClient(conn).Status(t.Context(), &halliganv1.StatusRequest{}, grpc.WaitForReady(true))
		if err != nil {
			t.Fatal(err)
		}
		return st.GetLocalApi()
	}
	eventually(t, "cp-1 says so", func() bool { return of(0).GetReady() })
	if a := of(0); !a.Exempt || a.Endpoint != l.API(0) || a.Kubeconfig != l.kube.AdminKubeconfig() {
		t.Errorf("cp-1: %v", a)
	}
	if a := of(1); a != nil {
		t.Errorf("cp-2, which has no API server: %v", a)
	}
}
