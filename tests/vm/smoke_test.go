// SPDX-License-Identifier: Apache-2.0

// Package vm holds the tests that run.sh runs on other kernels than the
// machine's own. In this file are those of the virtual machine itself: that it
// is what the other tests take it for.
package vm

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// wantKernel is the kernel that run.sh was asked for, such as "6.1". Outside
// of its machine the test is skipped.
func wantKernel(t *testing.T) string {
	t.Helper()
	want := os.Getenv("SLUICE_VM_KERNEL")
	if want == "" {
		t.Skip("runs in a virtual machine only: tests/vm/run.sh 6.1")
	}
	return want
}

func TestKernelRelease(t *testing.T) {
	want := wantKernel(t)
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	got := unix.ByteSliceToString(uts.Release[:])
	if !strings.HasPrefix(got, want+".") {
		t.Errorf("the kernel is %s, asked for was %s", got, want)
	}
}

func TestMounts(t *testing.T) {
	wantKernel(t)
	for _, tt := range []struct {
		dir   string
		magic int64
	}{
		{"/proc", unix.PROC_SUPER_MAGIC},
		{"/sys", unix.SYSFS_MAGIC},
		{"/sys/fs/cgroup", unix.CGROUP2_SUPER_MAGIC},
		{"/sys/fs/bpf", unix.BPF_FS_MAGIC},
		{"/run", unix.TMPFS_MAGIC},
		{"/tmp", unix.TMPFS_MAGIC},
	} {
		var st unix.Statfs_t
		if err := unix.Statfs(tt.dir, &st); err != nil {
			t.Errorf("statfs %s: %v", tt.dir, err)
		} else if st.Type != tt.magic {
			t.Errorf("%s has magic %#x, want %#x", tt.dir, st.Type, tt.magic)
		}
	}
}

// The true root of cgroup2 has inode 1 and, alone of all, no cgroup.type.
func TestCgroupRoot(t *testing.T) {
	wantKernel(t)
	var st unix.Stat_t
	if err := unix.Stat("/sys/fs/cgroup", &st); err != nil {
		t.Fatal(err)
	}
	if st.Ino != 1 {
		t.Errorf("/sys/fs/cgroup has inode %d, want 1", st.Ino)
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.type"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("/sys/fs/cgroup/cgroup.type: %v, want it not to exist", err)
	}
}

func TestMPTCPSocket(t *testing.T) {
	if wantKernel(t) == "5.10" {
		t.Skip("Debian builds its kernel 5.10 without MPTCP")
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
		if err != nil {
			t.Errorf("socket of family %d: %v", family, err)
			continue
		}
		unix.Close(fd)
	}
}

// TCP flows over a veth pair between two network namespaces with a BPF
// program of cls_bpf on both sides of clsact.
func TestVethWithClsact(t *testing.T) {
	wantKernel(t)
	if err := unlimitLockedMemory(); err != nil {
		t.Fatal(err)
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:    ebpf.SchedCLS,
		License: "Dual BSD/GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R0, -1), // TC_ACT_UNSPEC: go on
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatalf("load a tc program: %v", err)
	}
	defer prog.Close()

	var client, server netns.NsHandle
	// Both namespaces end with the thread, which is never unlocked.
	runtime.LockOSThread()
	if server, err = netns.New(); err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if client, err = netns.New(); err != nil {
		t.Fatal(err)
	}
	defer client.Close()

	pair := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: "server"}
	pair.Name = "client"
	pair.PeerNamespace = netlink.NsFd(server)
	if err := netlink.LinkAdd(pair); err != nil {
		t.Fatalf("add a veth pair: %v", err)
	}
	configure(t, "client", prog, "192.0.2.1/24", "2001:db8::1/64")
	if err := netns.Set(server); err != nil {
		t.Fatal(err)
	}
	configure(t, "server", prog, "192.0.2.2/24", "2001:db8::2/64")

	for _, addr := range []string{"192.0.2.2:80", "[2001:db8::2]:80"} {
		if err := netns.Set(server); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Errorf("listen: %v", err)
			continue
		}
		go func() {
			if c, err := l.Accept(); err == nil {
				_, _ = io.Copy(c, c)
				c.Close()
			}
		}()
		if err := netns.Set(client); err != nil {
			t.Fatal(err)
		}
		if err := echo(addr); err != nil {
			t.Errorf("echo from %s: %v", addr, err)
		}
		l.Close()
	}
}

// unlimitLockedMemory lifts the limit on locked memory, which kernels before 5.11
// count BPF objects against.
func unlimitLockedMemory() error {
	inf := &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	return unix.Setrlimit(unix.RLIMIT_MEMLOCK, inf)
}

// configure gives a link of the current namespace addresses and programs.
func configure(t *testing.T, name string, prog *ebpf.Program, addrs ...string) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(link, addr); err != nil {
			t.Fatalf("add %s to %s: %v", a, name, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	index := link.Attrs().Index
	err = netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_CLSACT,
	}})
	if err != nil {
		t.Fatalf("add clsact to %s: %v", name, err)
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		err := netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{
				LinkIndex: index, Parent: parent, Priority: 1, Protocol: unix.ETH_P_ALL,
			},
			Fd: prog.FD(), Name: "pass", DirectAction: true,
		})
		if err != nil {
			t.Fatalf("add a BPF filter to %s: %v", name, err)
		}
	}
}

func echo(addr string) error {
	c, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	const want = "hello"
	if _, err := io.WriteString(c, want); err != nil {
		return err
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != want {
		return errors.New("got " + string(got))
	}
	return nil
}
