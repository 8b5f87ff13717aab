# SPDX-License-Identifier: Apache-2.0
#
# The pinned toolchain. Sluice's own image is made by 'make image', without Docker:
#
#   docker build -f Dockerfile.builder -t sluice-builder .
#   docker run --rm -v "$PWD:/src" sluice-builder make generate-check

FROM golang:1.26-bookworm AS go

# Debian 12 for its clang-19, which makes the committed BPF objects.
FROM debian:bookworm AS builder
COPY --from=go /usr/local/go /usr/local/go
ENV PATH=/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    GOTOOLCHAIN=local \
    GOFLAGS=-buildvcs=false
WORKDIR /src
COPY hack/deps.sh hack/deps.sh
RUN hack/deps.sh build bpf && rm -rf /var/lib/apt/lists/*
# The source may be mounted here by another user than root.
RUN git config --system --add safe.directory /src
