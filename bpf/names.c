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
#include "targets.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

enum which {
	PEER,
	NAME,
};

/* A proxy in TPROXY mode asks its own socket where a connection was going, also
 * where the pod called itself.
 */
static __always_inline bool names_target(const struct pod *pod, enum which which)
{
	return which == NAME && pod->flags & POD_TPROXY;
}

/* An end of a connection that came about by the address book. */
static __always_inline bool shown_by_target(struct bpf_sock_addr *ctx, enum which which,
					    struct addr *addr, __u16 *port)
{
	__be32 local = NOW(ctx->sk->src_ip4), remote = NOW(ctx->sk->dst_ip4);
	const struct addr *source = 0;
	struct target *t;
	struct pod *pod;
	__u64 cookie;

	if (!target_index_of(local) && !target_index_of(remote))
		return false;
	cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod)
		return false;
	t = target_of_end(pod, cookie, remote, bpf_ntohs(ctx->sk->dst_port));
	if (t && which == PEER) { /* the client's peer: what it dialled */
		*addr = t->dst;
		*port = t->port;
		return true;
	}
	if (!t && names_target(pod, which) && ctx->sk->src_port == pod->in_port) {
		t = target_of_end(pod, cookie, local, ctx->sk->src_port);
		if (!t)
			return false;
		*addr = t->dst;
		*port = t->port;
		return true;
	}
	if (!t && which == PEER) /* the proxy's peer */
		t = target_of_end(pod, cookie, local, ctx->sk->src_port);
	if (t && addr_is_loopback(addr))
		source = target_source(pod, cookie, t);
	if (source)
		*addr = *source;
	return source;
}

/* An end of a connection that was announced. */
static __always_inline bool shown_by_record(struct bpf_sock_addr *ctx, enum which which,
					    struct addr *addr, __u16 *port)
{
	struct record *rec = bpf_sk_storage_get(&orig_dst, ctx->sk, 0, 0);
	bool client, destination;
	struct pod *pod;
	__u64 cookie;

	if (!rec)
		return false;
	if (which == NAME && rec->flags & RECORD_BOUND && !ctx->sk->src_port &&
	    !ctx->sk->dst_port) { /* disconnected: it would have no address */
		__builtin_memset(addr, 0, sizeof(*addr));
		return true;
	}
	if (!is_captured(rec->reason))
		return false;
	if (rec->via && ctx->sk->dst_port != bpf_htons(rec->via))
		return false; /* UDP: asked by datagrams, or connected unseen since */
	client = !(rec->flags & RECORD_ACCEPTED);
	destination = client && which == PEER;
	if (!client && rec->reason == CAPTURED_SELF) {
		cookie = bpf_get_netns_cookie(ctx);
		pod = bpf_map_lookup_elem(&pods, &cookie);
		destination = pod && names_target(pod, which);
	}
	if (destination) {
		*addr = rec->dst;
		*port = rec->dport;
		return true;
	}
	/* The pod's address in place of the loopback source that the kernel chose;
	 * a socket that is not connected any more shows its own.
	 */
	if (client == (which == PEER) || !(rec->flags & RECORD_PRESENT_SRC) ||
	    !addr_is_loopback(addr) || addr_is_any(&rec->src) || !ctx->sk->dst_port)
		return false;
	*addr = rec->src;
	return true;
}

static __always_inline bool shown(struct bpf_sock_addr *ctx, enum which which, struct addr *addr,
				  __u16 *port)
{
	if (!ctx->sk)
		return false;
	return shown_by_record(ctx, which, addr, port) || shown_by_target(ctx, which, addr, port);
}

static __always_inline int show4(struct bpf_sock_addr *ctx, enum which which)
{
	__u16 port = bpf_ntohs(ctx->user_port);
	struct addr addr;

	addr_set4(&addr, ctx->user_ip4);
	if (shown(ctx, which, &addr, &port)) {
		ctx->user_ip4 = addr_word(&addr, 3);
		ctx->user_port = bpf_htons(port);
	}
	return 1;
}

static __always_inline int show6(struct bpf_sock_addr *ctx, enum which which)
{
	__u16 port = bpf_ntohs(ctx->user_port);
	struct addr addr;

	addr_set(&addr, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	if (shown(ctx, which, &addr, &port)) {
		ctx->user_ip6[0] = addr_word(&addr, 0);
		ctx->user_ip6[1] = addr_word(&addr, 1);
		ctx->user_ip6[2] = addr_word(&addr, 2);
		ctx->user_ip6[3] = addr_word(&addr, 3);
		ctx->user_port = bpf_htons(port);
	}
	return 1;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return show4(ctx, PEER);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return show6(ctx, PEER);
}

SEC("cgroup/getsockname4")
int getsockname4(struct bpf_sock_addr *ctx)
{
	return show4(ctx, NAME);
}

SEC("cgroup/getsockname6")
int getsockname6(struct bpf_sock_addr *ctx)
{
	return show6(ctx, NAME);
}
