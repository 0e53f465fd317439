package diagnose

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/halligan-io/halligan/internal/fault"
)

// The states of a socket (Linux, include/net/tcp_states.h).
const (
	established = "01"
	listening   = "0A"
)

// sockets reads the kernel's tables, a line at a time: 150 bytes for each socket.
func sockets(ctx context.Context, port uint16, fn func(socket)) (served bool, err error) {
	return tables(ctx, []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"}, port, fn)
}

func tables(ctx context.Context, files []string, port uint16, fn func(socket)) (served bool, err error) {
	missing := 0
	for _, name := range files {
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
			missing++
			continue
		}
		if err != nil {
			return served, fault.New(fault.Failed, "run the agent as root, with /proc", "the sockets of this node cannot be read: %w", err)
		}
		is, err := readTable(ctx, f, port, fn)
		f.Close()
		served = served || is
		if err != nil {
			return served, fault.New(fault.Failed, "try again", "reading the sockets of this node: %w", err)
		}
	}
	if missing == len(files) {
		return false, fault.New(fault.Failed, "run the agent on Linux, with /proc", "this node has no tables of sockets")
	}
	return served, nil
}

// readTable reads one table: after a line of titles, local and remote address and the
// state are the second to fourth field (Linux, net/ipv4/tcp_ipv4.c: get_tcp4_sock).
// Lines of another form are passed over.
func readTable(ctx context.Context, r io.Reader, port uint16, fn func(socket)) (served bool, err error) {
	lines := bufio.NewReaderSize(r, 64<<10)
	for n := 0; ; n++ {
		if n%1024 == 0 && ctx.Err() != nil {
			return served, ctx.Err()
		}
		line, err := lines.ReadSlice('\n')
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return served, err
		}
		fields := strings.Fields(string(line))
		if len(fields) < 4 || fields[3] != established && fields[3] != listening {
			continue
		}
		local, ok := address(fields[1])
		if !ok || local.Port() != port {
			continue
		}
		if fields[3] == listening {
			served = true
			continue
		}
		if remote, ok := address(fields[2]); ok {
			fn(socket{remote.Addr()})
		}
	}
}

// address parses the kernel's form: 32-bit words of an address in network order, each
// printed as a number of this machine, then the port.
func address(text string) (netip.AddrPort, bool) {
	host, number, ok := strings.Cut(text, ":")
	if !ok || len(host) != 8 && len(host) != 32 {
		return netip.AddrPort{}, false
	}
	port, err := strconv.ParseUint(number, 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	raw, err := hex.DecodeString(host)
	if err != nil {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	addr, ok := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), ok
}
