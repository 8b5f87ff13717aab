package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	nsGetUserns     = 0xb701     // NS_GET_USERNS, ioctl_ns(2)
	initialUserns   = 0xeffffffd // the inode of the initial user namespace, on every kernel
	idsPerPod       = 65536      // Kubernetes maps at least as many, in one piece, from 0
	firstIDOfAnyPod = 65536      // and those below are the machine's
	ownersSysctl    = "/proc/sys/net/ipv4/ip_forward"
)

// ErrNoIDs is returned where nobody can say what the IDs of a namespace's
// processes are on the machine.
var ErrNoIDs = errors.New("the IDs of its user namespace are unknown")

// IDs says what the user and group IDs of a namespace's processes are for the
// machine (the initial user namespace), which is how programs see them. They
// differ in a pod with a user namespace of its own (hostUsers: false).
type IDs struct {
	uids, gids []idRange // nil: the same
	own        bool
}

// idRange is a line of uid_map, user_namespaces(7).
type idRange struct{ inside, outside, count uint32 }

// Own says whether they are those of a user namespace of the pod's own.
func (i IDs) Own() bool { return i.own }

// UID translates a user ID of the pod. One that is not mapped is an error.
func (i IDs) UID(inside uint32) (uint32, error) { return i.translate("UID", i.uids, inside) }

// GID translates a group ID of the pod. One that is not mapped is an error.
func (i IDs) GID(inside uint32) (uint32, error) { return i.translate("GID", i.gids, inside) }

func (i IDs) translate(kind string, ranges []idRange, id uint32) (uint32, error) {
	if !i.own {
		return id, nil
	}
	for _, r := range ranges {
		if id >= r.inside && id-r.inside < r.count {
			return r.outside + (id - r.inside), nil
		}
	}
	return 0, fmt.Errorf("%s %d does not exist in the pod's user namespace: give one that it maps (cat /proc/PID/%s_map shows them)", kind, id, strings.ToLower(kind))
}

// IDs finds out what the IDs of the namespace's processes are. The user
// namespace that owns it says so, to whom a process of it lives. When a CNI
// plugin runs there may be none (yet). Then the owner of the namespace's sysctls
// tells the pod's root, and Kubernetes' promise of one piece the rest.
func (n *NetNS) IDs() (IDs, error) {
	fd, err := unix.IoctlRetInt(n.Fd(), nsGetUserns)
	if err != nil {
		return IDs{}, fmt.Errorf("find the user namespace that owns %s: %w", n.path, err)
	}
	defer unix.Close(fd)
	var userns unix.Stat_t
	if err := unix.Fstat(fd, &userns); err != nil {
		return IDs{}, fmt.Errorf("identify the user namespace of %s: %w", n.path, err)
	}
	if userns.Ino == initialUserns {
		return IDs{}, nil
	}
	if ids, ok := idsOfProcess(userns.Ino); ok {
		return ids, nil
	}
	return n.idsOfOwner()
}

// idsOfProcess reads the maps of a user namespace in which a process lives.
// Those of one that is being made are empty.
func idsOfProcess(userns uint64) (IDs, bool) {
	links, _ := filepath.Glob("/proc/[0-9]*/ns/user") // the pattern is right
	for _, link := range links {
		var st unix.Stat_t
		if unix.Stat(link, &st) != nil || st.Ino != userns {
			continue
		}
		dir := filepath.Dir(filepath.Dir(link))
		uids, err1 := os.ReadFile(filepath.Join(dir, "uid_map"))
		gids, err2 := os.ReadFile(filepath.Join(dir, "gid_map"))
		ids := IDs{parseIDMap(string(uids)), parseIDMap(string(gids)), true}
		// Still the same process? Its number may be another's meanwhile.
		if err1 != nil || err2 != nil || unix.Stat(link, &st) != nil || st.Ino != userns {
			continue
		}
		if len(ids.uids) > 0 && len(ids.gids) > 0 {
			return ids, true
		}
	}
	return IDs{}, false
}

// parseIDMap reads "inside outside count" lines; outside is the reader's.
func parseIDMap(text string) []idRange {
	var out []idRange
	for line := range strings.Lines(text) {
		var r idRange
		if _, err := fmt.Sscan(line, &r.inside, &r.outside, &r.count); err == nil {
			out = append(out, r)
		}
	}
	return out
}

// idsOfOwner goes by who owns the namespace's sysctls: root of the user
// namespace, or the machine's root if that has none.
func (n *NetNS) idsOfOwner() (IDs, error) {
	var st unix.Stat_t
	err := n.Do(func() error { return unix.Stat(ownersSysctl, &st) }) // shows the caller's
	if err != nil {
		return IDs{}, fmt.Errorf("%w: no process of it has ID maps, and %s cannot be looked at: %w", ErrNoIDs, ownersSysctl, err)
	}
	if st.Uid < firstIDOfAnyPod || st.Gid < firstIDOfAnyPod {
		return IDs{}, fmt.Errorf("%w: no process of it has ID maps, and its root is %d:%d on the machine, which is no pod's; enroll it once a process of it runs", ErrNoIDs, st.Uid, st.Gid)
	}
	return IDs{[]idRange{{0, st.Uid, idsPerPod}}, []idRange{{0, st.Gid, idsPerPod}}, true}, nil
}
