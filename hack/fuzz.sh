#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Run every fuzz target of the repository, each for FUZZTIME (30s): `make fuzz`.
# One target a CPU at a time, with one worker each: go's own way, all workers on
# one target after the other, takes as many times longer.
# An input that fails is left below the package's testdata/fuzz, where go test
# finds it from then on: commit it with the repair.
set -euo pipefail
cd "$(dirname "$0")/.."

fuzztime=${FUZZTIME:-30s}
if [[ ! $fuzztime =~ ^[1-9][0-9]*(s|m|h|x)$ ]]; then
	echo "FUZZTIME=$fuzztime is neither a time nor a number of inputs: give 30s, 5m or 1000x, for example."
	exit 1
fi

targets=()
packages=$(grep -rl --include='*_test.go' '^func Fuzz' cmd pkg tests | xargs -n 1 dirname | sort -u)
for package in $packages; do
	names=$(go test -list '^Fuzz' "./$package") # fails if it does not build
	while read -r name; do
		[[ $name != Fuzz* ]] || targets+=("$package $name") # go says "ok" too
	done <<<"$names"
done
((${#targets[@]})) || { echo "There are no fuzz targets below cmd, pkg and tests: this script looks in the wrong place."; exit 1; }
echo "${#targets[@]} fuzz targets, $fuzztime each"

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 130' INT TERM

fuzz() { # NUMBER PACKAGE NAME
	local outcome=ok
	go test -run '^$' -fuzz "^$3\$" -fuzztime "$fuzztime" -parallel 1 "./$2" >"$logs/$1" 2>&1 || outcome=failed
	[[ $outcome == ok ]] || echo "$3 in $2" >"$logs/$1.failed"
	printf '\n[%d/%d] %s in %s: %s\n%s\n' "$1" "${#targets[@]}" "$3" "$2" "$outcome" "$(tail -n 40 "$logs/$1")"
}

for i in "${!targets[@]}"; do
	while (($(jobs -rp | wc -l) >= $(nproc))); do wait -n || true; done
	read -r package name <<<"${targets[i]}"
	fuzz $((i + 1)) "$package" "$name" &
done
wait

mapfile -t failed < <(cat "$logs"/*.failed 2>/dev/null || true)
echo
if ((${#failed[@]})); then
	printf 'Failed: %s. The input is in a new file below its testdata/fuzz.\n' "${failed[@]}"
	exit 1
fi
echo "None of ${#targets[@]} fuzz targets failed."
