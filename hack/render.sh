#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# render.sh: what is in deploy/ beside the chart comes from the chart.
#
#   hack/render.sh          write deploy/sluice.yaml and deploy/kustomize/
#   hack/render.sh --check  fail if they are not what the chart renders
set -euo pipefail
cd "$(dirname "$0")/.."

helm=${HELM:-bin/tools/helm}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Nothing of the user's own Helm takes part.
export HELM_CONFIG_HOME=$work/helm HELM_CACHE_HOME=$work/helm HELM_DATA_HOME=$work/helm

render() { # MORE...
	"$helm" template sluice deploy/chart --namespace sluice-system \
		--kube-version 1.30.0 --set namespace.create=true "$@"
}

render --output-dir "$work/split" >/dev/null
mkdir "$work/kustomize"
for f in "$work"/split/sluice/templates/*.yaml; do
	{
		echo "# Made from deploy/chart by 'make deploy'. Change the chart."
		cat "$f"
	} >"$work/kustomize/$(basename "$f")"
done
{
	echo "# Sluice on a cluster, Kubernetes 1.30 or later: docs/install.md."
	echo "# Made from deploy/chart by 'make deploy'. Change the chart."
	render
} >"$work/sluice.yaml"

if [[ ${1:-} == --check ]]; then
	status=0
	diff -u deploy/sluice.yaml "$work/sluice.yaml" || status=1
	diff -u -x kustomization.yaml -r deploy/kustomize "$work/kustomize" || status=1
	if [[ $status != 0 ]]; then
		echo "deploy/ is not what its chart renders: run 'make deploy' and commit the result." >&2
		exit 1
	fi
	echo "deploy/sluice.yaml and deploy/kustomize/ are what the chart renders."
	exit
fi
mkdir -p deploy/kustomize
find deploy/kustomize -name '*.yaml' ! -name kustomization.yaml -delete
cp "$work"/kustomize/*.yaml deploy/kustomize/
cp "$work/sluice.yaml" deploy/sluice.yaml
echo "wrote deploy/sluice.yaml and deploy/kustomize/"
