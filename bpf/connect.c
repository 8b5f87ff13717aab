// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The outbound decision, once per connect().
 *
 * A captured connect goes to the proxy's port on a loopback address which by
 * itself says where it was meant to go (targets), or else keeps its original
 * destination in socket storage until sockops announces it (handshakes). The
 * source is not bound: that would outlive the connection (docs/adr/0001); the
 * name hooks show what the app and the proxy expect.
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
#include "targets.h"
#include "book.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define ECONNREFUSED 111
#define SOL_SOCKET 1
#define SO_BINDTODEVICE 25
#define SO_MARK 36

/* Where a captured connect goes instead. */
struct choice {
	struct addr addr;
	__u16 port;
};

enum outcome {
	PASS,
	REWRITE,
	REFUSE,
};

/* An address of 127.128.0.0/10 for this destination, so that a pod's
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
	return bpf_htonl(SPREAD4 | h);
}

/* Would the proxy's own listener accept at any IPv4 loopback address? If one is
 * in listeners, sk_lookup sees to it, wherever it is bound. Otherwise (opened by another identity, or
 * MPTCP) ask the kernel; the source port 0 tells our own sk_lookup program that
 * this is a question, not a packet.
 */
static __always_inline bool accepts_anywhere(struct bpf_sock_addr *ctx, __u64 cookie,
					     const struct pod *pod, __u16 port)
{
	struct bpf_sock_tuple tuple = {
		.ipv4 = { .daddr = bpf_htonl(SPREAD4 | 1), .dport = bpf_htons(port) },
	};
	struct bpf_sock *sk;
	bool yes = false;

	if (is_fact(cookie, assignable(pod, port)))
		return true;
	sk = bpf_sk_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	if (sk->src_port == port && sk->state == BPF_TCP_LISTEN) {
		/* not a stranger on just that address */
		yes = !sk->src_ip4 || BOUND_BY_PROXY(sk, pod);
	}
	bpf_sk_release(sk);
	return yes;
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

/* Nothing of an earlier connect may answer for this one. */
static __always_inline void forget(struct bpf_sock *sk)
{
	struct mptcp_sock *msk;

	bpf_sk_storage_delete(&orig_dst, sk);
	if (!have_mptcp_sock)
		return;
	msk = bpf_skc_to_mptcp_sock(sk);
	if (msk)
		bpf_sk_storage_delete(&orig_dst, msk);
}

/* By the address book: what both ends need to know is in the address itself. */
static __always_inline bool by_target(struct bpf_sock *sk, __u64 cookie, const struct addr *dst,
				      __u16 dport, struct choice *to)
{
	__u32 index = book(cookie, dst, dport);

	if (!index)
		return false;
	forget(sk);
	addr_set4(&to->addr, bpf_htonl(TARGETS4 | index));
	return true;
}

/* One of our own loopback addresses, at a capture port. */
static __always_inline bool is_ours(const struct pod *pod, const struct addr *dst, __u16 port)
{
	return is_capture_port(pod, port) && addr_is4(dst) && addr_is_loopback(dst) &&
	       addr_v4(dst) >= SPREAD4;
}

static __always_inline __u16 port_of(const struct pod *pod, enum reason reason)
{
	if (reason == CAPTURED_DNS)
		return pod->dns_port;
	return reason == CAPTURED_SELF ? pod->in_port : pod->out_port;
}

/* A call from a client's address goes out by lo, so that the inbound program sees
 * that it came from within: otherwise the kernel names the interface that has the
 * address called, as for a packet from the network. The mark leads there, and the
 * app's answers back.
 */
static __always_inline bool send_by_lo(struct bpf_sock_addr *ctx, const struct call *call)
{
	int mark = SLUICE_TPROXY_MARK;
	char lo[] = "lo";

	if (call->mark != SLUICE_TPROXY_MARK &&
	    bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
		return false;
	return call->ifindex == LOOPBACK_IFINDEX ||
	       !bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, lo, sizeof(lo));
}

static __always_inline enum outcome on_connect(struct bpf_sock_addr *ctx, struct addr *dst,
					       struct choice *to)
{
	__u16 dport = bpf_ntohs(ctx->user_port);
	struct call call = { .port = dport, .protocol = IPPROTO_TCP };
	bool captured, refused, anywhere = false;
	struct bpf_sock *sk = ctx->sk;
	struct record *rec;
	enum reason reason;
	struct pod *pod;
	__u64 cookie;

	if (ctx->protocol != IPPROTO_TCP || !sk)
		return PASS;
	cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod) {
		forget(sk); /* enrolled once, not now */
		return PASS;
	}
	if (addr_is_any(dst)) { /* connect() to the any address means loopback */
		if (addr_is4(dst))
			addr_set4(dst, bpf_htonl(LOOPBACK4));
		else
			addr_set(dst, 0, 0, 0, bpf_htonl(1));
	}
	call.cookie = cookie;
	call.dst = *dst;
	call.ifindex = sk->bound_dev_if;
	call.mark = sk->mark;
	addr_of_sock(&call.src, sk);
	reason = decide_out(pod, &call);
	captured = is_captured(reason);
	refused = reason == REFUSED_LOOP;
	if (captured && !dport) { /* nobody listens there: refuse, as a far host would */
		reason = LEFT_TO_KERNEL;
		refused = true;
	} else if (captured && is_ours(pod, dst, dport)) { /* would stand for itself */
		reason = REFUSED_LOOP;
		refused = true;
	} else if (reason == DIRECT_PROXY_SOURCE && is_foreign(&call) && !send_by_lo(ctx, &call)) {
		/* it would come back to the proxy */
		reason = REFUSED_LOOP;
		refused = true;
	}
	if (refused) {
		forget(sk);
		count(cookie, reason);
		return REFUSE;
	}
	if (captured) {
		to->port = port_of(pod, reason);
		/* The DNS proxy listens on 127.0.0.1, and has few connections. */
		anywhere = addr_is4(dst) && reason != CAPTURED_DNS &&
			   accepts_anywhere(ctx, cookie, pod, to->port);
		if (anywhere && addr_is_any(&call.src) && by_target(sk, cookie, dst, dport, to)) {
			count(cookie, reason);
			return REWRITE;
		}
	}

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
	rec->flags = 0;
	if (captured && addr_is_any(&call.src) && !addr_is_loopback(dst)) {
		rec->flags |= RECORD_PRESENT_SRC;
		if (reason == CAPTURED_SELF) /* to oneself, the kernel answers from there */
			rec->src = *dst;
		else
			rec->src = addr_is4(dst) ? pod->addr4 : pod->addr6;
	}
	copy_to_msk(sk, rec);
	count(cookie, reason);
	if (!captured)
		return PASS;
	if (!addr_is4(dst))
		addr_set(&to->addr, 0, 0, 0, bpf_htonl(1));
	else /* bound to 127.0.0.1 alone, or not there: it must be that address */
		addr_set4(&to->addr, anywhere ? spread4(dst, dport) : bpf_htonl(LOOPBACK4));
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
	struct choice to = {};
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
	struct choice to = {};
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
