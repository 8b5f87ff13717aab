#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Boots one of Debian's kernels in a virtual machine and runs a test binary on
# it. `tests/vm/run.sh -h` tells how.

set -euo pipefail

usage() {
	cat <<'EOF'
Usage: tests/vm/run.sh [-f FILE[:PATH]]... [-m MODULE]... KERNEL [BINARY [ARG...]]

Boots Debian's newest KERNEL (5.10, 6.1, 6.12, or what trixie-backports has)
under qemu, as root runs BINARY in it, and ends with BINARY's exit status:
124 when it took too long, 125 when the machine could not be made or died.

BINARY must be statically linked (CGO_ENABLED=0). Without it, the tests in
tests/vm are built and run. The machine has 2 CPUs and no network, and brings
nothing but BINARY: no shell, no ip. /proc, /sys, cgroup2, bpffs, /run, /tmp
are mounted, and lo is up.

  -f FILE[:PATH]  put FILE (or a directory) into the machine, as /NAME or PATH
  -m MODULE       load one more kernel module

Environment:
  SLUICE_VM_CACHE    where kernels are kept (default ~/.cache/sluice-vm)
  SLUICE_VM_DEB      the kernel's .deb (several: separated by spaces) in place
                     of fetching one
  SLUICE_VM_TIMEOUT  seconds from start to end of the machine (default 1200)
  SLUICE_VM_LOG      where to leave the kernel's messages
EOF
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=kernel.sh
. "$here/kernel.sh"

# What the datapath and its tests use and Debian builds as modules.
modules=(veth dummy bridge sch_ingress cls_bpf tcp_diag)
files=()
timeout=${SLUICE_VM_TIMEOUT:-1200}

say() { printf 'vm: %s\n' "$*"; }
die() {
	printf 'vm: %s\n' "$*" >&2
	exit 125
}

# cleanup ends the machine, also when it is we who are interrupted.
work='' fresh='' qemu=''
# shellcheck disable=SC2317
cleanup() {
	if [[ -n $qemu ]]; then
		kill "$qemu" 2>/dev/null || true
		wait "$qemu" 2>/dev/null || true
	fi
	rm -rf ${work:+"$work"} ${fresh:+"$fresh"}
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# need names the package of every command that is missing, in one sentence.
need() {
	local pair missing=()
	for pair in qemu-system-x86_64:qemu-system-x86 cpio:cpio modprobe:kmod \
		xz:xz-utils dpkg-deb:dpkg; do
		command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
	done
	((${#missing[@]} == 0)) ||
		die "missing programs; as root run: apt-get install --no-install-recommends ${missing[*]}"
}

# build_go PACKAGE OUTPUT builds a static program, or with a third argument
# the package's tests.
build_go() {
	local what=(build)
	[[ $# -lt 3 ]] || what=(test -c)
	(cd "$root" && CGO_ENABLED=0 GOOS=linux GOARCH=amd64 \
		go "${what[@]}" -o "$2" "$1") ||
		die "$1 does not build; see the errors above"
}

# add_modules DIR copies the modules and what they need and lists them in
# loading order.
add_modules() {
	local dir=$1 name kind path plan
	mkdir -p "$dir/modules"
	: >"$dir/sluice/modules"
	for name in "${modules[@]}"; do
		plan=$(modprobe --config /dev/null --dirname "$kernel_dir" \
			--set-version "$kernel_release" --show-depends "$name") ||
			die "kernel $kernel_release has no module $name; leave it out or try another kernel"
		while read -r kind path _; do
			[[ $kind == insmod ]] || continue # the others are built in
			name=$(basename "${path%.xz}")
			[[ ! -e $dir/modules/$name ]] || continue
			case $path in
			*.xz) xz -dc "$path" >"$dir/modules/$name" ;;
			*) cp "$path" "$dir/modules/$name" ;;
			esac
			printf '/modules/%s\n' "$name" >>"$dir/sluice/modules"
		done <<<"$plan"
	done
}

add_files() {
	local dir=$1 spec src dest
	for spec in ${files[@]+"${files[@]}"}; do
		src=${spec%%:*}
		dest=/$(basename "$src")
		[[ $spec != *:* ]] || dest=/${spec#*:}
		[[ -e $src ]] || die "-f $spec: there is no file $src"
		mkdir -p "$dir$(dirname "$dest")"
		cp -aL "$src" "$dir$dest"
	done
}

# make_initramfs BINARY ARG... writes $work/initramfs. It is not compressed:
# under emulation, unpacking takes longer than reading.
make_initramfs() {
	local dir=$work/root binary=$1 program
	program=/bin/$(basename "$1")
	shift
	mkdir -p "$dir"/{bin,dev,proc,root,run,sluice,sys,tmp}
	build_go ./tests/vm/init "$dir/init"
	install -m 755 "$binary" "$dir$program"
	printf '%s\0' "$program" "$@" >"$dir/sluice/args"
	printf '%s\n' PATH=/bin:/sbin HOME=/root TMPDIR=/tmp \
		"SLUICE_VM_KERNEL=$kernel" >"$dir/sluice/env"
	printf '%s\n' "$token" >"$dir/sluice/token"
	add_modules "$dir"
	add_files "$dir"
	(cd "$dir" && find . -print0 | cpio --null --quiet -o -H newc -R 0:0) >"$work/initramfs"
	rm -rf "$dir"
}

# boot runs the machine, shows what BINARY prints and sets status.
boot() {
	local line log=$work/kernel.log
	mkfifo "$work/out"
	: >"$log"
	# Emulation, because nested virtualisation hangs on machines where it
	# pretends to work; it is also the same everywhere.
	timeout --kill-after=5 "$timeout" qemu-system-x86_64 \
		-accel tcg -cpu Haswell-v4 -smp 2 -m 1024 \
		-nodefaults -no-user-config -no-reboot -display none \
		-serial "file:$log" -serial stdio \
		-kernel "$kernel_dir/vmlinuz" -initrd "$work/initramfs" \
		-append 'console=ttyS0 panic=-1' \
		</dev/null >"$work/out" 2>"$work/qemu.err" &
	qemu=$!
	while IFS= read -r line || [[ -n $line ]]; do
		case $line in
		*"$token "*) # after what the program left of a line
			status=${line##* }
			line=${line%%"$token"*}
			[[ -n $line ]] || continue
			;;
		esac
		printf '%s\n' "$line"
	done <"$work/out"
	wait "$qemu" && ended=0 || ended=$?
	qemu=''
	[[ -z ${SLUICE_VM_LOG:-} ]] || cp "$log" "$SLUICE_VM_LOG"
}

# report ends with BINARY's status, or says what became of the machine.
report() {
	local took=$1 log=$work/kernel.log
	if [[ -n $status ]]; then
		grep -aE '(BUG|WARNING|Oops|Call Trace):' "$log" |
			sed 's/^/vm: the kernel complained: /' || true
		say "$kernel_release: exit status $status after $took seconds"
		exit "$status"
	fi
	# The emulator says every time which features of the CPU it lacks.
	grep -v "TCG doesn't support" "$work/qemu.err" >&2 || true
	tail -n 60 "$log" | tr -d '\r' | sed 's/^/  kernel: /' >&2
	if ((ended == 124 || ended == 137)); then
		say "$kernel_release: not done after $timeout seconds and stopped; SLUICE_VM_TIMEOUT gives it more" >&2
		exit 124
	fi
	die "$kernel_release: the machine ended (qemu: $ended) before the program did; the kernel's last words are above"
}

while getopts 'hf:m:' option; do
	case $option in
	h) usage && exit 0 ;;
	f) files+=("$OPTARG") ;;
	m) modules+=("$OPTARG") ;;
	*) usage >&2 && exit 125 ;;
	esac
done
shift $((OPTIND - 1))
(($# >= 1)) || { usage >&2 && exit 125; }
kernel=$1
shift
[[ $kernel =~ ^[0-9]+\.[0-9]+$ ]] ||
	die "KERNEL is \"$kernel\" and must be a version of two numbers, such as 6.1"
[[ $timeout =~ ^[0-9]+$ ]] ||
	die "SLUICE_VM_TIMEOUT is \"$timeout\" and must be a number of seconds"
need

work=$(mktemp -d)
token=sluice-vm-status-$RANDOM$RANDOM$RANDOM
status='' ended=0
find_kernel "$kernel" # sets kernel_dir and kernel_release

if (($# == 0)); then
	say "building the tests in tests/vm"
	build_go ./tests/vm "$work/tests" tests
	set -- "$work/tests" -test.v
fi
[[ -f $1 ]] || die "there is no file $1 to run; build it with CGO_ENABLED=0 go test -c -o $1 PACKAGE"
make_initramfs "$@"

say "booting $kernel_release (emulated, so the first line takes some seconds)"
started=$SECONDS
boot
report $((SECONDS - started))
