# shellcheck shell=bash disable=SC2015,SC2034,SC2154
# SPDX-License-Identifier: Apache-2.0
#
# Fetches Debian's kernels for run.sh, which sources this file. Nothing is
# installed: packages are unpacked into a cache directory.

cache=${SLUICE_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sluice-vm}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# find_kernel KERNEL sets kernel_dir, which has vmlinuz and lib/modules, and
# kernel_release, and fetches the kernel where it is not in the cache.
find_kernel() {
	kernel_dir=$cache/$1
	if [[ -n ${SLUICE_VM_DEB:-} ]]; then
		kernel_dir=$work/kernel
		mkdir "$work/debs"
		# shellcheck disable=SC2086
		cp $SLUICE_VM_DEB "$work/debs" ||
			die "SLUICE_VM_DEB is \"$SLUICE_VM_DEB\", which cannot be read"
		unpack "$kernel_dir"
	elif [[ ! -e $kernel_dir/vmlinuz ]]; then
		say "fetching Debian's kernel $1 into $kernel_dir"
		fetch "$1"
		add_to_cache "$kernel_dir"
	fi
	kernel_release=$(basename "$kernel_dir"/lib/modules/*)
}

# add_to_cache DIR makes DIR at one stroke: another run may want it too.
add_to_cache() {
	mkdir -p "$cache" && fresh=$(mktemp -d "$cache/new.XXXXXX") ||
		die "cannot write to $cache; set SLUICE_VM_CACHE to a directory of yours"
	chmod 755 "$fresh"
	unpack "$fresh"
	mv -T "$fresh" "$1" 2>/dev/null || [[ -e $1/vmlinuz ]] ||
		die "$1 holds no kernel and is in the way; remove it"
}

# unpack DIR turns the packages in $work/debs into DIR.
unpack() {
	local deb release
	mkdir -p "$1"
	for deb in "$work"/debs/*.deb; do
		dpkg-deb -x "$deb" "$1" || die "$deb cannot be unpacked; is it a whole .deb?"
	done
	# Since Debian 13 modules lie in /usr/lib.
	[[ ! -d $1/usr/lib/modules ]] || { mkdir -p "$1/lib" && mv "$1/usr/lib/modules" "$1/lib/"; }
	release=$(basename "$1"/lib/modules/*)
	mv "$1/boot/vmlinuz-$release" "$1/vmlinuz" 2>/dev/null ||
		mv "$1/lib/modules/$release/vmlinuz" "$1/vmlinuz" 2>/dev/null ||
		die "the packages hold no kernel with its modules: $(cd "$work/debs" && echo *.deb)"
	mv "$1/boot/config-$release" "$1/config" 2>/dev/null || true
	rm -rf "${1:?}"/{boot,usr,etc} "$work/debs"
	depmod --basedir "$1" "$release"
}

# suite_of KERNEL prints the Debian release that has this kernel.
suite_of() {
	case $1 in
	5.10) echo bullseye ;;
	6.1) echo bookworm ;;
	6.12) echo trixie ;;
	*) echo trixie-backports ;;
	esac
}

# fetch KERNEL downloads its packages to $work/debs. The security archive comes
# first: it is the newest and its index is a twentieth of the main one's.
fetch() {
	local suite site release tried=()
	suite=$(suite_of "$1")
	command -v apt-get >/dev/null && [[ -e $keyring ]] ||
		die "kernel $1 is fetched with apt and $keyring, which this machine lacks; $remedy"
	while read -r site release; do
		[[ -n $site ]] || continue
		tried+=("$release")
		fetch_from "$1" "$site" "$release" && return
	done <<<"$(sites "$suite")"
	((${#tried[@]})) ||
		die "kernel $1 comes from Debian, and this machine's apt knows no mirror of it; on Debian run apt-get update, elsewhere $remedy"
	die "Debian's ${tried[*]} had no kernel $1 (the lines above say why); $remedy"
}

remedy='download a linux-image-*-cloud-amd64 .deb of that version and set SLUICE_VM_DEB to its path'

# sites SUITE prints "URI SUITE" for each archive that may have it, on the
# mirrors that this machine uses for its own Debian.
sites() {
	local security main
	security=$(mirror Debian-Security)
	main=$(mirror Debian)
	[[ -z $security || $1 == *-backports ]] || echo "$security $1-security"
	[[ -z $main ]] || echo "$main $1"
}

# mirror LABEL prints the URI of an archive that calls itself so. Ubuntu's
# archives are of another origin, and have other kernels.
mirror() {
	# shellcheck disable=SC2016
	apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' "Label: $1" |
		sort -u | sed -n 1p
}

# fetch_from KERNEL URI SUITE downloads from one archive, with a configuration
# of apt that has no effect on the machine's.
fetch_from() {
	local dir=$work/apt names option=()
	rm -rf "$dir" "$work/debs"
	mkdir -p "$dir"/{lists/partial,cache/archives/partial,empty} "$work/debs"
	# An old release is not signed anew, so its date may not count.
	printf 'deb [arch=amd64 signed-by=%s check-valid-until=no] %s %s main\n' \
		"$keyring" "$2" "$3" >"$dir/sources.list"
	option=(-qq -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts="$dir/empty"
		-o "Dir::State::lists=$dir/lists" -o "Dir::Cache=$dir/cache"
		-o Dir::State::status=/dev/null -o Debug::NoLocking=true
		-o APT::Architecture=amd64 -o APT::Architectures=amd64
		-o APT::Sandbox::User="$(id -un)" -o Acquire::Languages=none
		-o Acquire::Retries=3 -o APT::Update::Error-Mode=any
		-o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false)
	apt-get "${option[@]}" update || return 1
	names=$(apt-cache "${option[@]}" dumpavail | newest "$1")
	if [[ -z $names ]]; then
		say "Debian's $3 has no linux-image-$1.*-cloud-amd64" >&2
		return 1
	fi
	# shellcheck disable=SC2086
	(cd "$work/debs" && apt-get "${option[@]}" download $names)
}

# newest KERNEL reads descriptions of packages and prints the names of those
# that make up the newest KERNEL: linux-image-RELEASE, or since 7.2
# linux-binary-RELEASE with the kernel, linux-modules-RELEASE, and
# linux-base-RELEASE with the list of what is built in.
# The flavour "cloud" is the smallest that has what a mesh needs.
newest() {
	local names release
	names=$(sed -nE "s/^Package: (linux-(image|binary|modules|base)-${1/./\\.}\.[0-9a-z.+-]*-cloud-amd64)$/\1/p" | sort -u)
	release=$(sed -E 's/^linux-[a-z]+-//' <<<"$names" | sort -V | tail -n 1)
	if grep -qx "linux-binary-$release" <<<"$names"; then
		grep -xE "linux-(binary|modules|base)-${release//+/\\+}" <<<"$names"
	else
		grep -x "linux-image-$release" <<<"$names" || true
	fi
}
