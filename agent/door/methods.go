package door

import (
	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/trust"
)

// right says who may call a method at all. What an action needs beyond that is
// in the action's row and in the policy.
type right struct {
	least trust.Role
	// approver: those who sign approvals may call it, too.
	approver bool
	// bastion: bastions may call it as themselves. They have no role, and no
	// authority but what is signed in what they bring.
	bastion bool
	// whole: a credential that is narrowed to some objects, actions or drills does
	// not do, since it shows what others did.
	whole  bool
	record grpcdoor.Recording
}

// methods is the inventory of what the doors offer: every method that the server
// has. One without a row keeps the agent from starting.
var methods = map[string]right{
	halliganv1.Agent_Describe_FullMethodName:       {trust.Observer, true, false, false, grpcdoor.Routine},
	halliganv1.Agent_Status_FullMethodName:         {trust.Observer, true, false, false, grpcdoor.Routine},
	halliganv1.Agent_Plan_FullMethodName:           {trust.Observer, false, false, false, grpcdoor.Noted},
	halliganv1.Agent_Undo_FullMethodName:           {trust.Observer, false, false, false, grpcdoor.Noted},
	halliganv1.Agent_Apply_FullMethodName:          {trust.Responder, false, false, false, grpcdoor.Deed},
	halliganv1.Agent_ShowPlan_FullMethodName:       {trust.Observer, true, false, false, grpcdoor.Noted},
	halliganv1.Agent_ExchangeBundle_FullMethodName: {trust.Observer, true, true, false, grpcdoor.Routine},
	halliganv1.Agent_Stop_FullMethodName:           {trust.Responder, false, false, false, grpcdoor.Deed},
	halliganv1.Agent_Get_FullMethodName:            {trust.Observer, false, false, false, grpcdoor.Noted},
	halliganv1.Agent_History_FullMethodName:        {trust.Observer, false, false, false, grpcdoor.Noted},
	halliganv1.Agent_Top_FullMethodName:            {trust.Observer, false, false, true, grpcdoor.Noted},
	// Responders: a component that logs much logs what it was sent, tokens included,
	// of which not all can be recognised.
	halliganv1.Agent_Logs_FullMethodName: {trust.Responder, false, false, true, grpcdoor.Noted},

	halliganv1.Evidence_ListLogs_FullMethodName:      {trust.Observer, false, false, false, grpcdoor.Routine},
	halliganv1.Evidence_ReadLog_FullMethodName:       {trust.Observer, false, false, true, grpcdoor.Routine},
	halliganv1.Evidence_ReadRecording_FullMethodName: {trust.Commander, false, false, true, grpcdoor.Deed},
	halliganv1.Evidence_ReadSealed_FullMethodName:    {trust.Responder, false, false, true, grpcdoor.Noted},
	halliganv1.Evidence_Witness_FullMethodName:       {trust.None, false, true, false, grpcdoor.Routine},
	// So that grpcurl works without our .proto file.
	grpcdoor.Reflection[0]: {trust.Observer, true, false, false, grpcdoor.Routine},
	grpcdoor.Reflection[1]: {trust.Observer, true, false, false, grpcdoor.Routine},
}

// has reports whether somebody has the right.
func (r right) has(who trust.Identity) bool {
	if who.Kind == trust.Bastion {
		return r.bastion
	}
	if s := who.Scope; r.whole && (s.Drill || len(s.Actions)+len(s.Namespaces) > 0) {
		return false
	}
	return who.May(r.least) || r.approver && who.Person != "" && who.Role == trust.Approver
}
