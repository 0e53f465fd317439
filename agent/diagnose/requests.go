package diagnose

import (
	"context"
	"time"

	"github.com/halligan-io/halligan/internal/fault"
)

var requestsRow = Row{
	Name: "requests", Title: "requests to the API server, by user", Unit: "requests/s",
	Timeout: 10 * time.Second, Memory: "nothing",
	Blind: []string{"who asks for what: this agent has no way to the API server's own flow control and audit log; connections and writes tell a part of it"},
	look: func(context.Context, *scene) (*finding, error) {
		return nil, fault.New(fault.Failed, "look by connections and writes", "this agent does not ask the API server")
	},
}
