# SPDX-License-Identifier: Apache-2.0

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# sudo drops Go from the PATH; look where it is usually installed.
export PATH := $(PATH):/usr/local/go/bin:/usr/sbin:/sbin

# The pinned compiler. bpf2go reads these.
export BPF2GO_CC := clang-19
export BPF2GO_STRIP := llvm-strip-19
CLANG_FORMAT := clang-format-19

KERNEL ?= 6.1
# More flags for go test, such as TESTFLAGS='-v -run Outbound'.
TESTFLAGS ?=

DEPS := hack/deps.sh
GENERATED := pkg/datapath/**/*_bpfel*.go pkg/datapath/**/*_bpfel*.o
LINTER := bin/tools/golangci-lint

.PHONY: help
help: ## list every target
	@awk 'BEGIN { FS = ":.*## " } /^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

.PHONY: build
build: go-is-there ## build the static binaries into bin/
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X github.com/sluice-mesh/sluice/pkg/version.linked=$(VERSION)' -o bin/ ./cmd/...

.PHONY: generate
generate: go-is-there ## compile the BPF C into the committed objects (pinned clang)
	$(DEPS) bpf
	go generate ./pkg/datapath/...

.PHONY: generate-check
generate-check: generate ## regenerate, and fail if the committed objects differ
	@changed=$$(git diff --name-only -- $(foreach g,$(GENERATED),':(glob)$g'); \
		git ls-files --others --exclude-standard -- $(foreach g,$(GENERATED),':(glob)$g')); \
	if [[ -n $$changed ]]; then \
		echo "These generated files differ from what is committed:"; \
		sed 's/^/  /' <<<"$$changed"; \
		echo "Run 'make generate' on a machine with clang-19 and commit them with the change to bpf/."; \
		exit 1; \
	fi; \
	echo "The committed BPF objects are what $$($(BPF2GO_CC) --version | head -n 1) makes of bpf/."

.PHONY: demo
demo: root go-is-there ## watch a real proxy's traffic being redirected (root, under a minute)
	$(DEPS) demo
	@$(MAKE) build
	bin/sluicectl demo

.PHONY: test
test: root go-is-there ## run every test, in network namespaces (root)
	$(DEPS) test
	@$(MAKE) build
	@SLUICE_REQUIRE_ROOT=1 go test -count=1 -timeout 20m $(TESTFLAGS) ./... || \
		{ echo "Some tests failed: see the lines that begin with FAIL above."; exit 1; }
	@echo "Every test passed, as root, on kernel $$(uname -r)."

# Random configurations for the oracle, and the seed of the first (empty: any).
N ?= 200
SEED ?=

# Istio's own program, to check the oracle's rules with: a module of its own.
ISTIO := bin/tools/istio-iptables

$(ISTIO): tests/istio/go.mod tests/istio/go.sum tests/istio/main.go
	@echo "building Istio's istio-iptables (half a minute the first time)"
	@CGO_ENABLED=0 go -C tests/istio build -o $(CURDIR)/$@ .
	@touch $@

.PHONY: oracle
oracle: root go-is-there $(ISTIO) ## compare Sluice with Istio's iptables rules, case by case: make oracle N=200 [SEED=17] (root)
	$(DEPS) test
	@SLUICE_REQUIRE_ROOT=1 go test -count=1 -timeout 20m -v -run 'Test(Every|Without|Table|Random|Both|APod|OurRules|Istios)' ./tests/oracle \
		-oracle.istio=$(CURDIR)/$(ISTIO) -oracle.n=$(N) $(if $(SEED),-oracle.seed=$(SEED)) || \
		{ echo "Sluice and iptables differ, or the comparison failed: see above, and docs/oracle.md."; exit 1; }
	@echo "No difference but those that docs/compatibility.md lists."

.PHONY: oracle-mutants
oracle-mutants: root go-is-there ## take each rule out of iptables and of Sluice: does the oracle notice? (root, clang)
	$(DEPS) test bpf
	@SLUICE_REQUIRE_ROOT=1 go test -count=1 -timeout 20m -v -run TestOracleNoticesAMissingRule ./tests/oracle -oracle.mutate

.PHONY: upgrade
upgrade: root go-is-there ## replace, kill and churn Sluice under load (root, clang; several minutes)
	$(DEPS) test bpf
	@SLUICE_REQUIRE_ROOT=1 go test -tags sluice_failpoints -count=1 -timeout 20m $(TESTFLAGS) ./pkg/failpoint ./tests/upgrade || \
		{ echo "Something failed, escaped or was left behind: see the lines that begin with FAIL above."; exit 1; }
	@echo "Nothing failed, escaped or was left behind."

.PHONY: race
race: root go-is-there ## run the tests of pkg/ and cmd/ under the race detector (root)
	$(DEPS) test race
	@CGO_ENABLED=1 SLUICE_REQUIRE_ROOT=1 go test -race -count=1 -timeout 20m $(TESTFLAGS) ./pkg/... ./cmd/... || \
		{ echo "Some tests failed or raced: see FAIL and DATA RACE above."; exit 1; }
	@echo "No test failed and no data race was found."

# How long each fuzz target runs.
FUZZTIME ?= 30s

.PHONY: fuzz
fuzz: go-is-there ## run every fuzz target for FUZZTIME (30s each)
	@FUZZTIME=$(FUZZTIME) hack/fuzz.sh

# More flags for the benchmark, such as BENCHFLAGS=--quick, and where it writes.
BENCHFLAGS ?=
BENCH_OUT ?= bench-out

.PHONY: bench
bench: root go-is-there ## measure Sluice beside iptables, nftables and no mesh, into bench-out/ (root, under 20 minutes)
	$(DEPS) bench
	@$(MAKE) build
	bin/sluicectl bench --out $(BENCH_OUT) $(BENCHFLAGS)

.PHONY: bench-docs
bench-docs: root go-is-there ## measure everything on a quiet machine, and put the result and its charts into docs/benchmark/ (root)
	@$(MAKE) bench
	mkdir -p docs/benchmark
	rm -f docs/benchmark/*.svg
	cp $(BENCH_OUT)/*.svg docs/benchmark/
	cp $(BENCH_OUT)/bench.md docs/benchmark/result.md

.PHONY: bench-check
bench-check: root go-is-there ## measure quickly, and fail if a ratio leaves its band (docs/benchmark.md) (root)
	$(DEPS) bench
	@$(MAKE) build
	bin/sluicectl bench --quick --check --out $(BENCH_OUT) $(BENCHFLAGS)

.PHONY: vm
vm: root go-is-there ## run the datapath tests under another kernel in qemu: make vm KERNEL=6.1
	$(DEPS) vm
	@$(MAKE) build
	@CGO_ENABLED=0 go test -c -o bin/netns.test ./tests/netns
	tests/vm/run.sh -f bin/sluicectl:/bin/sluicectl -f bin/netns.test:/bin/netns.test $(KERNEL)

# The version of what is released next: the chart's, and the image's tag.
VERSION ?= $(shell sed -n 's/^appVersion: *//p' deploy/chart/Chart.yaml)
# The image's name without tag. Nothing pulls from "localhost": it comes from the tarball.
IMAGE ?= localhost/sluice
PLATFORMS ?= amd64,arm64
IMAGE_DIR ?= bin/image

.PHONY: image
image: go-is-there ## build the image (amd64, arm64) into bin/image/, as OCI layout and tarball: make image VERSION=... IMAGE=...
	@go -C hack/image build -o $(CURDIR)/bin/tools/image .
	@bin/tools/image --version '$(VERSION)' --name '$(IMAGE)' --platforms '$(PLATFORMS)' --out '$(IMAGE_DIR)' \
		--revision "$$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
		--created "$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || echo 0)}"

HELM := bin/tools/helm
# The Kubernetes that helm renders for where it is not told; it would be 1.20.
HELM_RENDERS_FOR := -X helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor=1 -X helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor=34

$(HELM): hack/helm/go.mod hack/helm/go.sum
	@echo "building helm (about two minutes the first time)"
	@CGO_ENABLED=0 go -C hack/helm build -trimpath -ldflags '-s -w $(HELM_RENDERS_FOR)' -o $(CURDIR)/$@ helm.sh/helm/v3/cmd/helm
	@touch $@

.PHONY: deploy
deploy: go-is-there $(HELM) ## render deploy/sluice.yaml and deploy/kustomize/ from the chart
	@HELM=$(HELM) hack/render.sh

.PHONY: deploy-check
deploy-check: go-is-there $(HELM) ## test the chart and the image builder; fail if what is rendered from the chart differs
	@HELM=$(HELM) hack/render.sh --check
	@$(HELM) lint --strict deploy/chart
	@go test -count=1 ./tests/deploy -deploy.helm=$(CURDIR)/$(HELM)
	@go -C hack/image test -count=1 -timeout 20m ./...

.PHONY: lint
lint: go-is-there $(LINTER) ## check formatting, imports, Go and C style, and the scripts
	$(DEPS) lint
	$(LINTER) run ./...
	$(CLANG_FORMAT) --dry-run --Werror bpf/*.c bpf/*.h
	shellcheck -x .ci/run $$(find hack tests -name '*.sh' -perm -u+x) # and what they source
	@echo "Lint found nothing."

.PHONY: format
format: go-is-there ## format Go and C in place
	$(DEPS) lint
	gofmt -w $$(git ls-files --cached --others --exclude-standard '*.go')
	$(CLANG_FORMAT) -i bpf/*.c bpf/*.h

$(LINTER): hack/tools/go.mod hack/tools/go.sum
	@echo "building the linter (about two minutes the first time)"
	@go -C hack/tools build -o $(CURDIR)/$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	@touch $@

# The cluster that tests/e2e brings up: Kubernetes, one program for all of its parts,
# in a module of its own.
KUBERNETES := bin/e2e/kubernetes
KUBERNETES_VERSION := 1.32.13
KUBERNETES_STAMP := k8s.io/component-base/version

$(KUBERNETES): tests/e2e/kubernetes/go.mod tests/e2e/kubernetes/go.sum tests/e2e/kubernetes/main.go
	@echo "building Kubernetes $(KUBERNETES_VERSION) and kubectl (a quarter of an hour the first time)"
	@CGO_ENABLED=0 nice go -C tests/e2e/kubernetes build -trimpath -o $(CURDIR)/$@ -ldflags "-s -w \
		-X $(KUBERNETES_STAMP).gitVersion=v$(KUBERNETES_VERSION) -X $(KUBERNETES_STAMP).gitMajor=1 -X $(KUBERNETES_STAMP).gitMinor=32 -X $(KUBERNETES_STAMP).gitTreeState=clean" .
	@touch $@

.PHONY: e2e-build
e2e-build: go-is-there $(KUBERNETES) ## build the Kubernetes that make e2e runs, ahead (15 minutes the first time)

# Which tests, and more flags, such as E2EFLAGS='-test.run Reboot'.
E2EFLAGS ?=
E2E_TEST := bin/e2e/e2e.test -test.v -test.timeout 30m

.PHONY: e2e
e2e: go-is-there ## run Sluice on a real cluster, made for it (root); KUBECONFIG=... make e2e: on yours
	@CGO_ENABLED=0 go test -c -o bin/e2e/e2e.test ./tests/e2e
	@if [[ -n "$${KUBECONFIG:-}" ]]; then \
		$(E2E_TEST) $(E2EFLAGS) || { echo "Some tests failed on the cluster of $$KUBECONFIG: see FAIL above, and docs/e2e.md."; exit 1; }; \
	else $(MAKE) e2e-here; fi

# A checkout of another version, as far as installing it goes: the same programs and
# deploy/, but for what they say of their version.
NEXT := bin/e2e/next

.PHONY: e2e-next
e2e-next: go-is-there
	@rm -rf $(NEXT) && mkdir -p $(NEXT) && cp -r deploy $(NEXT)/
	@grep -rlF '$(VERSION)' $(NEXT)/deploy | xargs sed -i 's/$(VERSION)/&-next/g'
	@$(MAKE) image VERSION=$(VERSION)-next IMAGE_DIR=$(NEXT)/bin/image PLATFORMS=$$(go env GOARCH)

# What make e2e does where it is given no cluster.
.PHONY: e2e-here
e2e-here: root $(KUBERNETES) $(HELM) e2e-next
	$(DEPS) e2e
	@CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o bin/e2e/podapp ./tests/e2e/podapp
	@$(MAKE) image PLATFORMS=$$(go env GOARCH)
	@$(E2E_TEST) -e2e.kubernetes=$(CURDIR)/$(KUBERNETES) -e2e.helm=$(CURDIR)/$(HELM) -e2e.podapp=$(CURDIR)/bin/e2e/podapp \
		-e2e.checkout=$(CURDIR) -e2e.next=$(CURDIR)/$(NEXT) -e2e.logs=$(CURDIR)/bin/e2e/logs $(E2EFLAGS) || \
		{ echo "Some tests failed, or the machine is not as it was: see FAIL and \"left behind\" above; the logs of the cluster are in bin/e2e/logs."; exit 1; }

.PHONY: clean
clean: ## remove what the other targets made
	rm -rf bin bench-out

.PHONY: go-is-there
go-is-there:
	@command -v go >/dev/null || { echo "Sluice is built with Go $$(sed -n 's/^go //p' go.mod) or later, and there is no go here: install it from your distribution or from the Go project's site."; exit 1; }

.PHONY: root
root:
	@[[ $$(id -u) == 0 ]] || { echo "This target makes network namespaces and loads BPF programs: run it as root (sudo make $(MAKECMDGOALS))."; exit 1; }
