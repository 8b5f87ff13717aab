// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The outbound decision, once per connect(), and the names that sockets show.
 *
 * A captured connect keeps its original destination in socket storage and goes
 * to the proxy's port on a loopback address. Nothing is bound: a source bound
 * by us would outlive the connection (docs/adr/0001). Instead getsockname and
 * getpeername show what the app asked for and what the proxy expects.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>
#include "sluice.h"
#include "config.h"
#include "maps.h"
#include "addr.h"
#include "rules.h"
#include "stats.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define ECONNREFUSED 111

/* Where a captured connect goes instead. */
struct target {
	struct addr addr;
	__u16 port;
};

enum outcome {
	PASS,
	REWRITE,
	REFUSE,
};

/* An address of 127.128.0.0/9 for this destination, so that a pod's
 * connections are not limited to the ephemeral ports of one address pair.
 */
static __always_inline __be32 spread4(const struct addr *dst, __u16 port)
{
	__u32 h = addr_v4(dst) ^ ((__u32)port << 16 | port);

	h ^= h >> 16;
	h *= 0x7feb352d;
	h ^= h >> 15;
	h *= 0x846ca68b;
	h ^= h >> 16;
	h &= SPREAD4_MASK;
	if (h == SPREAD4_MASK)
		h = 1; /* 127.255.255.255 is a broadcast address */
	return bpf_htonl(SPREAD4 | h);
}

/* Would the proxy accept at this IPv4 address and port? The source port 0 tells
 * our own sk_lookup program that this is a question, not a packet.
 */
static __always_inline bool listens4(struct bpf_sock_addr *ctx, __be32 addr, __u16 port)
{
	struct bpf_sock_tuple tuple = {
		.ipv4 = { .daddr = addr, .dport = bpf_htons(port) },
	};
	struct bpf_sock *sk;
	bool yes;

	sk = bpf_sk_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	yes = sk->src_port == port && sk->state == BPF_TCP_LISTEN;
	bpf_sk_release(sk);
	return yes;
}

static __always_inline void choose_target(struct bpf_sock_addr *ctx, const struct addr *dst,
					  __u16 dport, struct target *to)
{
	__be32 v4;

	if (!addr_is4(dst)) {
		addr_set(&to->addr, 0, 0, 0, bpf_htonl(1));
		return;
	}
	v4 = spread4(dst, dport);
	if (!listens4(ctx, v4, to->port))
		v4 = bpf_htonl(LOOPBACK4); /* bound to 127.0.0.1 alone, or not there */
	addr_set4(&to->addr, v4);
}

/* MPTCP: the hook sees the first subflow, but the app's calls see the msk. */
static __always_inline void copy_to_msk(struct bpf_sock *sk, const struct record *rec)
{
	struct mptcp_sock *msk;
	struct record *copy;

	if (!have_mptcp_sock)
		return;
	msk = bpf_skc_to_mptcp_sock(sk);
	if (!msk)
		return;
	copy = bpf_sk_storage_get(&orig_dst, msk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (copy)
		*copy = *rec;
}

static __always_inline enum outcome on_connect(struct bpf_sock_addr *ctx, struct addr *dst,
					       struct target *to)
{
	__u16 dport = bpf_ntohs(ctx->user_port);
	struct bpf_sock *sk = ctx->sk;
	struct record *rec;
	enum reason reason;
	struct pod *pod;
	struct addr src;
	__u64 cookie;

	if (ctx->protocol != IPPROTO_TCP || !sk)
		return PASS;
	cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod) {
		bpf_sk_storage_delete(&orig_dst, sk); /* enrolled once, not now */
		return PASS;
	}
	if (addr_is_any(dst)) { /* connect() to the any address means loopback */
		if (addr_is4(dst))
			addr_set4(dst, bpf_htonl(LOOPBACK4));
		else
			addr_set(dst, 0, 0, 0, bpf_htonl(1));
	}
	addr_of_sock(&src, sk);
	reason = decide_out(cookie, pod, &src, dst, dport);

	/* Every connect leaves a verdict: the guard wants one, and what an
	 * earlier connect of this socket left must not answer for this one.
	 */
	rec = bpf_sk_storage_get(&orig_dst, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!rec) {
		count(cookie, REFUSED_NO_MEMORY);
		return REFUSE;
	}
	rec->dst = *dst;
	rec->dport = dport;
	rec->reason = reason;
	rec->flags &= RECORD_PROXY_BOUND;
	if (is_captured(reason) && addr_is_any(&src) && !addr_is_loopback(dst)) {
		rec->flags |= RECORD_PRESENT_SRC;
		if (reason == CAPTURED_SELF) /* to oneself, the kernel answers from there */
			rec->src = *dst;
		else
			rec->src = addr_is4(dst) ? pod->addr4 : pod->addr6;
	}
	copy_to_msk(sk, rec);
	count(cookie, reason);
	if (!is_captured(reason))
		return PASS;
	to->port = reason == CAPTURED_SELF ? pod->in_port : pod->out_port;
	choose_target(ctx, dst, dport, to);
	return REWRITE;
}

static __always_inline int refuse(void)
{
	if (have_set_retval)
		bpf_set_retval(-ECONNREFUSED);
	return 0;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct target to = {};
	struct addr dst;

	addr_set4(&dst, ctx->user_ip4);
	switch (on_connect(ctx, &dst, &to)) {
	case REFUSE:
		return refuse();
	case REWRITE:
		ctx->user_ip4 = addr_word(&to.addr, 3);
		ctx->user_port = bpf_htons(to.port);
		return 1;
	default:
		return 1;
	}
}

/* AF_INET6 sockets come here with IPv4 destinations too (::ffff:a.b.c.d). */
SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct target to = {};
	struct addr dst;

	addr_set(&dst, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	switch (on_connect(ctx, &dst, &to)) {
	case REFUSE:
		return refuse();
	case REWRITE:
		ctx->user_ip6[0] = addr_word(&to.addr, 0);
		ctx->user_ip6[1] = addr_word(&to.addr, 1);
		ctx->user_ip6[2] = addr_word(&to.addr, 2);
		ctx->user_ip6[3] = addr_word(&to.addr, 3);
		ctx->user_port = bpf_htons(to.port);
		return 1;
	default:
		return 1;
	}
}
