package trust

import (
	"regexp"
	"strings"
)

// The forms of names, in the bundle, in certificates and in configurations. A
// node's may have dots, a cluster's may not, so that NODE.CLUSTER has one reading.
var (
	personForm  = regexp.MustCompile(`^[a-z0-9._@-]{1,64}$`)
	clusterForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	nodeForm    = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,120}[a-z0-9])?$`)
)

// ValidPerson reports whether the name can stand for a person or an automation:
// the key ID of an SSH certificate, the common name of an X.509 one.
func ValidPerson(name string) bool { return personForm.MatchString(name) }

// ValidCluster reports whether the name can be a cluster's, or a fleet's.
func ValidCluster(name string) bool { return clusterForm.MatchString(name) }

// ValidNode reports whether the name can be a node's, or a bastion's.
func ValidNode(name string) bool { return nodeForm.MatchString(name) }

// ValidServer reports whether the name can be a server's, NODE.CLUSTER.
func ValidServer(name string) bool {
	node, cluster, ok := CutServer(name)
	return ok && ValidNode(node) && ValidCluster(cluster)
}

// CutServer parts NODE.CLUSTER, of which only the node may have dots; ok is false
// where there is none.
func CutServer(name string) (node, cluster string, ok bool) {
	i := strings.LastIndexByte(name, '.')
	if i < 0 {
		return "", "", false
	}
	return name[:i], name[i+1:], true
}
