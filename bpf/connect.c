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
#include <linux/in6.h>
#include <bpf/bpf_helpers.h>
#include "sluice.h"
#include "config.h"
#include "maps.h"
#include "addr.h"
#include "rules.h"
#include "stats.h"
#include "book.h"
#include "dns.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define EINVAL 22
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
	INVALID,
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
	__be32 v4 = book(cookie, dst, dport);

	if (!v4)
		return false;
	forget(sk);
	addr_set4(&to->addr, v4);
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
	char lo[] = { 'l', 'o', 0 };

	if (call->mark != SLUICE_TPROXY_MARK &&
	    bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
		return false;
	return call->ifindex == LOOPBACK_IFINDEX ||
	       !bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, lo, sizeof(lo));
}

/* Bind a socket that has no port yet to an address, or to none, reserving no port. */
static __always_inline bool bind_source(struct bpf_sock_addr *ctx, const struct addr *a)
{
	struct sockaddr_in6 in6 = { .sin6_family = AF_INET6 };
	struct sockaddr_in in = { .sin_family = AF_INET };

	if (ctx->sk->family == AF_INET) {
		in.sin_addr.s_addr = addr_word(a, 3);
		return !bpf_bind(ctx, (struct sockaddr *)&in, sizeof(in));
	}
	__builtin_memcpy(&in6.sin6_addr, a->b, 16);
	return !bpf_bind(ctx, (struct sockaddr *)&in6, sizeof(in6));
}

/* The source that a UDP socket would get without us. Towards loopback the kernel
 * takes a loopback address, which would stay if the socket is connected elsewhere
 * next, and leads nowhere: an IPv4 source is bound, where the app has not. (An
 * IPv6 one would forbid the socket IPv4 for good: docs/adr/0001.) The name hooks
 * show it where it cannot be.
 */
static __always_inline void choose_source(struct bpf_sock_addr *ctx, struct record *rec,
					  const struct pod *pod, const struct call *call)
{
	if (rec->flags & RECORD_PRESENT_SRC && addr_is_loopback(&call->src) &&
	    addr_is4(&rec->src) == addr_is4(&call->dst))
		return; /* connected before: that stays, as it would */
	rec->flags &= RECORD_BOUND;
	if (!addr_is_any(&call->src) || addr_is_loopback(&call->dst))
		return;
	rec->flags |= RECORD_PRESENT_SRC;
	if (own_addr(&own_addrs, call->cookie, &call->dst))
		rec->src = call->dst;
	else
		rec->src = addr_is4(&call->dst) ? pod->addr4 : pod->addr6;
	if (addr_is4(&rec->src) && !ctx->sk->src_port && bind_source(ctx, &rec->src))
		rec->flags |= RECORD_BOUND;
}

/* Is its source the loopback address of a captured connect before, which the
 * kernel keeps, and from which nothing comes back from there? IPv4 says so itself.
 */
static __always_inline bool is_stranded(struct bpf_sock_addr *ctx, const struct record *rec,
					const struct call *call)
{
	return rec->flags & RECORD_PRESENT_SRC && !addr_is4(&call->src) && !addr_is4(&call->dst) &&
	       addr_is_loopback(&call->src) && !addr_is_loopback(&call->dst) &&
	       !addr_is_any(&call->dst) &&
	       !own_addr(&own_addrs, bpf_get_netns_cookie(ctx), &call->dst);
}

/* Only port 53 is anything to us. The record is the socket's own, and its
 * datagrams go by no other hook.
 */
static __always_inline enum outcome on_connect_udp(struct bpf_sock_addr *ctx,
						   const struct addr *dst, struct choice *to)
{
	struct record *rec = bpf_sk_storage_get(&orig_dst, ctx->sk, 0, 0);
	struct call call = { .dst = *dst };
	const struct addr none = {};
	struct pod *pod = 0;

	if (rec && rec->flags & RECORD_BOUND && !ctx->sk->src_port)
		bind_source(ctx, &none); /* disconnected meanwhile: it is free again */
	addr_of_sock(&call.src, ctx->sk);
	if (ctx->user_port == bpf_htons(PORT_DNS))
		pod = captures_dns(ctx, &call);
	if (!pod && rec && is_stranded(ctx, rec, &call))
		return INVALID;
	if (!pod) {
		if (rec)
			forget_server(ctx->sk, rec);
		return PASS;
	}
	if (!rec)
		rec = bpf_sk_storage_get(&orig_dst, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!rec) {
		count(call.cookie, REFUSED_NO_MEMORY);
		return REFUSE;
	}
	choose_source(ctx, rec, pod, &call);
	note_server(rec, pod, &call);
	if (addr_is4(&call.dst))
		addr_set4(&to->addr, bpf_htonl(LOOPBACK4));
	else
		addr_set(&to->addr, 0, 0, 0, bpf_htonl(1));
	to->port = pod->dns_port;
	return REWRITE;
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

	if (ctx->protocol == IPPROTO_UDP && sk)
		return on_connect_udp(ctx, dst, to);
	if (ctx->protocol != IPPROTO_TCP || !sk)
		return PASS;
	cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod) {
		forget(sk); /* enrolled once, not now */
		return PASS;
	}
	any_is_loopback(dst);
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
		/* The DNS proxy listens on 127.0.0.1, and has few connections.
		 * A proxy's call to its own pod goes to exactly 127.0.0.1 as
		 * well: iptables rules that are still there send one to any
		 * other loopback address to the inbound port a second time.
		 */
		anywhere = addr_is4(dst) && reason == CAPTURED_OUT &&
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
		if (own_addr(&own_addrs, cookie, dst)) /* the kernel answers from there */
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

static __always_inline int refuse(int error)
{
	if (have_set_retval)
		bpf_set_retval(-error);
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
		return refuse(ECONNREFUSED);
	case INVALID:
		return refuse(EINVAL);
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
		return refuse(ECONNREFUSED);
	case INVALID:
		return refuse(EINVAL);
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
