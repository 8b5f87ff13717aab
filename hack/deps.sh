#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# deps.sh: the one list of system packages. The Makefile, .ci/run and
# Dockerfile.builder all call it; nothing else in the repository calls apt.
#
#   hack/deps.sh GROUP...     install what the groups need and this machine lacks
#
# It asks apt only for what is missing, so it needs neither root nor a network
# when everything is there, and it starts no service. Debian 12 and 13, Ubuntu
# 22.04 and 24.04; elsewhere it says what to install by hand.
#
# Exit status: 0 everything is there, 1 something is missing, 2 wrong usage.
set -euo pipefail

usage() {
	cat <<'USAGE'
usage: hack/deps.sh GROUP...
  build  make, git and certificates for the Go module proxy
  demo   a proxy (HAProxy), the reference CNI plugins, ip and bpftool
  test   demo, iptables to compare with, and DNS resolvers
  race   a C compiler for the race detector
  bpf    clang, llvm and headers to regenerate the BPF objects
  lint   clang-format and shellcheck
  bench  demo, the firewalls to compare with, and wrk
  vm     qemu and what an initramfs is made with
  all    every group
USAGE
}

# One word per package: NAME, or NAME=COMMAND where having that command on the
# PATH is as good as having the package.
group_packages() {
	case $1 in
	build) echo make=make git=git ca-certificates ;;
	demo) echo haproxy=haproxy containernetworking-plugins iproute2=ip bpftool=bpftool ;;
	test) echo "$(group_packages demo) iptables=iptables bind9-dnsutils=dig musl-tools=musl-gcc gcc=gcc libc6-dev util-linux=setpriv mount=mount" ;;
	race) echo gcc=gcc libc6-dev ;;
	bpf) echo clang-19=clang-19 llvm-19=llvm-strip-19 libbpf-dev linux-libc-dev bpftool=bpftool ;;
	lint) echo clang-format-19=clang-format-19 shellcheck=shellcheck ;;
	bench) echo "$(group_packages demo) iptables=iptables nftables=nft wrk=wrk" ;;
	vm) echo qemu-system-x86=qemu-system-x86_64 cpio=cpio kmod=modprobe xz-utils=xz ;;
	all) for g in build test race bpf lint bench vm; do group_packages "$g"; done ;;
	*) return 2 ;;
	esac
}

say() { echo "deps: $*"; }

present() { # NAME[=COMMAND]
	if [[ $1 == *=* ]]; then
		# Ubuntu's bpftool is a wrapper; the tool itself has the kernel in its path.
		if [[ $1 == bpftool=* ]]; then
			bpftool version >/dev/null 2>&1 && return
			compgen -G '/usr/lib/linux-tools*/*/bpftool' >/dev/null && return
		else
			command -v "${1#*=}" >/dev/null && return
		fi
	fi
	[[ $(dpkg-query -W -f '${db:Status-Status}' "${1%%=*}" 2>/dev/null) == installed ]]
}

available() { # NAME: has apt a version to install?
	grep -q 'Candidate: [^(]' <<<"$(LC_ALL=C apt-cache policy "$1" 2>/dev/null)"
}

# Before 24.10 Ubuntu has no bpftool package: it comes with the kernel's tools.
apt_names() { # NAME...
	local name
	for name in "$@"; do
		if [[ $name == bpftool ]] && ! available bpftool && available linux-tools-common; then
			echo linux-tools-common
			if available "linux-tools-$(uname -r)"; then
				echo "linux-tools-$(uname -r)"
			else
				echo linux-tools-generic
			fi
		else
			echo "$name"
		fi
	done
}

# A policy-rc.d that answers 101 keeps maintainer scripts from starting
# services. One that is not ours stays; one that a killed run left goes with the
# next installation.
policy=/usr/sbin/policy-rc.d
policy_mark='# written by sluice hack/deps.sh for the time of one installation'

haproxy_is_new=

tidy_up() {
	if grep -qsxF "$policy_mark" "$policy"; then rm -f "$policy"; fi
	# Not started now, and not at the next boot either.
	if [[ -n $haproxy_is_new ]]; then
		deb-systemd-helper disable haproxy.service >/dev/null 2>&1 || true
		update-rc.d haproxy disable >/dev/null 2>&1 || true
	fi
}

policy_place() {
	trap tidy_up EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	[[ -e $policy ]] || install -m 0755 /dev/stdin "$policy" <<<"#!/bin/sh
$policy_mark
exit 101"
}

apt_quiet() {
	local log status=0
	log=$(mktemp)
	DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get -q -y \
		-o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-confold \
		"$@" >"$log" 2>&1 </dev/null || status=$?
	[[ $status == 0 ]] || tail -n 20 "$log" >&2
	rm -f "$log"
	return $status
}

apt_update() {
	say "fetching apt's package lists"
	# One unreachable source must not stop us: what counts is what apt then offers.
	apt_quiet update || say "apt-get update ended with an error; going on with the lists there are"
}

apt_install() { # NAME...
	policy_place
	[[ " $* " != *" haproxy "* ]] || haproxy_is_new=yes
	say "installing $*"
	if ! apt_quiet install --no-install-recommends "$@"; then
		apt_update # the lists may name versions that the mirror has dropped
		say "installing $*, second try"
		if ! apt_quiet install --no-install-recommends "$@"; then
			say "apt could not install $*; its last lines are above" >&2
			exit 1
		fi
	fi
}

find_missing() { # NAME[=COMMAND]... -> missing
	local p
	missing=()
	for p in "$@"; do present "$p" || missing+=("${p%%=*}"); done
}

main() {
	local group names name wanted=() missing=() ask=() absent=()

	[[ $# -gt 0 ]] || { usage >&2; exit 2; }
	for group in "$@"; do
		case $group in -h | --help) usage; exit 0 ;; esac
		names=$(group_packages "$group") || {
			echo "deps: there is no group \"$group\"" >&2
			usage >&2
			exit 2
		}
		# shellcheck disable=SC2206 # words are wanted
		wanted+=($names)
	done
	mapfile -t wanted < <(printf '%s\n' "${wanted[@]}" | awk '!seen[$0]++')
	export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

	find_missing "${wanted[@]}"
	if [[ ${#missing[@]} == 0 ]]; then
		say "everything for $* is installed"
		return
	fi
	if ! command -v apt-get >/dev/null; then
		say "this machine has no apt; please install these by hand (Debian's names): ${missing[*]}" >&2
		exit 1
	fi
	if [[ $(id -u) != 0 ]]; then
		say "installing needs root; please run: sudo hack/deps.sh $*   (it would install: ${missing[*]})" >&2
		exit 1
	fi

	exec 9<"${BASH_SOURCE[0]}" && flock 9 # one installation at a time
	mapfile -t ask < <(apt_names "${missing[@]}")
	for name in "${ask[@]}"; do
		available "$name" || { apt_update; break; }
	done
	mapfile -t ask < <(apt_names "${missing[@]}")
	for name in "${ask[@]}"; do
		available "$name" || absent+=("$name")
	done
	mapfile -t ask < <(comm -23 <(printf '%s\n' "${ask[@]}" | sort -u) <(printf '%s\n' "${absent[@]}" | sort -u))
	[[ ${#ask[@]} == 0 ]] || apt_install "${ask[@]}"

	if [[ ${#absent[@]} -gt 0 ]]; then
		say "apt has no package ${absent[*]} on this release" >&2
		[[ " ${absent[*]} " != *-19* ]] ||
			say "clang, llvm and clang-format 19 are needed only to regenerate or format the BPF C; the generated objects are committed, so build, test and demo work without" >&2
		exit 1
	fi
	if [[ " ${missing[*]} " == *" bpftool "* ]] && ! bpftool version >/dev/null 2>&1; then
		say "bpftool is not packaged for kernel $(uname -r); any /usr/lib/linux-tools*/*/bpftool will do in its place"
	fi
	say "installed ${ask[*]}; everything for $* is there now, and no service was started"
}

main "$@"
