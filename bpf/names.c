// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The names that both ends of a captured connection show, as if nothing had
 * happened: the client's peer is its original destination and its own name is
 * the pod's address; the proxy's peer is the pod's address.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "sluice.h"
#include "maps.h"
#include "addr.h"
#include "rules.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline struct record *captured_record(struct bpf_sock_addr *ctx)
{
	struct record *rec;

	if (!ctx->sk)
		return 0;
	rec = bpf_sk_storage_get(&orig_dst, ctx->sk, 0, 0);
	return rec && is_captured(rec->reason) ? rec : 0;
}

/* The pod's address in place of the loopback source that the kernel chose. */
static __always_inline const struct addr *presented(const struct record *rec,
						    const struct addr *now)
{
	if (!(rec->flags & RECORD_PRESENT_SRC) || !addr_is_loopback(now))
		return 0;
	return addr_is_any(&rec->src) ? 0 : &rec->src;
}

static __always_inline const struct addr *peer(const struct record *rec, const struct addr *now)
{
	return rec->flags & RECORD_ACCEPTED ? presented(rec, now) : &rec->dst;
}

static __always_inline const struct addr *name(const struct record *rec, const struct addr *now)
{
	return rec->flags & RECORD_ACCEPTED ? 0 : presented(rec, now);
}

static __always_inline int show4(struct bpf_sock_addr *ctx, bool of_peer)
{
	struct record *rec = captured_record(ctx);
	const struct addr *shown;
	struct addr now;

	if (!rec)
		return 1;
	addr_set4(&now, ctx->user_ip4);
	shown = of_peer ? peer(rec, &now) : name(rec, &now);
	if (!shown)
		return 1;
	ctx->user_ip4 = addr_word(shown, 3);
	if (of_peer && !(rec->flags & RECORD_ACCEPTED))
		ctx->user_port = bpf_htons(rec->dport);
	return 1;
}

static __always_inline int show6(struct bpf_sock_addr *ctx, bool of_peer)
{
	struct record *rec = captured_record(ctx);
	const struct addr *shown;
	struct addr now;

	if (!rec)
		return 1;
	addr_set(&now, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	shown = of_peer ? peer(rec, &now) : name(rec, &now);
	if (!shown)
		return 1;
	ctx->user_ip6[0] = addr_word(shown, 0);
	ctx->user_ip6[1] = addr_word(shown, 1);
	ctx->user_ip6[2] = addr_word(shown, 2);
	ctx->user_ip6[3] = addr_word(shown, 3);
	if (of_peer && !(rec->flags & RECORD_ACCEPTED))
		ctx->user_port = bpf_htons(rec->dport);
	return 1;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return show4(ctx, true);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return show6(ctx, true);
}

SEC("cgroup/getsockname4")
int getsockname4(struct bpf_sock_addr *ctx)
{
	return show4(ctx, false);
}

SEC("cgroup/getsockname6")
int getsockname6(struct bpf_sock_addr *ctx)
{
	return show6(ctx, false);
}
