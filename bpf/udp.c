// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* DNS over UDP from sockets that are not connected: each datagram to port 53 goes
 * to the DNS proxy instead, and its answer is shown as the server's. (A connect()
 * to port 53 is connect.c's; its datagrams come by no hook but recvmsg.)
 *
 * IPv4, by the address book: 127.192.0.N stands for the server. The query goes
 * out with that as its source, so that the proxy answers to it; the answer goes
 * out with it as its source too, and is recognised by it. Nothing is kept of a
 * query, and one socket may ask many servers at once.
 *
 * By record, where that cannot be (IPv6, which has one loopback address; a socket
 * that is bound to an address): the answer is the server's that was asked last.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>
#include "sluice.h"
#include "config.h"
#include "maps.h"
#include "addr.h"
#include "rules.h"
#include "book.h"
#include "dns.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define ECONNREFUSED 111

enum fate {
	PASS,
	TO_PROXY,
	REFUSE,
};

/* To the socket's own peer? connect() has judged that. (The kernel calls sendmsg4
 * for each datagram of an AF_INET6 socket that is connected by IPv4.)
 */
static __always_inline bool to_peer(struct bpf_sock *sk, const struct addr *dst)
{
	__be32 v4 = NOW(sk->dst_ip4);

	if (sk->dst_port != bpf_htons(PORT_DNS))
		return false;
	if (addr_is4(dst))
		return addr_word(dst, 3) == v4;
	return addr_word(dst, 0) == sk->dst_ip6[0] && addr_word(dst, 1) == sk->dst_ip6[1] &&
	       addr_word(dst, 2) == sk->dst_ip6[2] && addr_word(dst, 3) == sk->dst_ip6[3];
}

/* A datagram to port 53. booked: the address that stands for its server, to be its
 * source; 0: it keeps its own.
 */
static __always_inline enum fate on_query(struct bpf_sock_addr *ctx, struct call *call, __u16 *via,
					  __be32 *booked)
{
	struct bpf_sock *sk = ctx->sk;
	struct record *rec;
	struct addr local;
	struct pod *pod;

	if (!sk || ctx->protocol != IPPROTO_UDP)
		return PASS; /* UDP-Lite comes here too */
	if (to_peer(sk, &call->dst))
		return PASS;
	pod = captures_dns(ctx, call);
	if (!pod)
		return PASS;
	*via = pod->dns_port;
	addr_of_sock(&local, sk);
	if (addr_is4(&call->dst) && addr_is_any(&local)) {
		*booked = book(call->cookie, &call->dst, PORT_DNS);
		if (*booked)
			return TO_PROXY;
	}
	if (sk->dst_port)
		return TO_PROXY; /* connected: it hears its peer only, whom its names show */
	rec = bpf_sk_storage_get(&orig_dst, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!rec) {
		count(call->cookie, REFUSED_NO_MEMORY);
		return REFUSE;
	}
	note_server(rec, pod, call);
	return TO_PROXY;
}

/* Where the DNS proxy listens: no other loopback address. */
static __always_inline bool is_dns_proxy(const struct addr *a)
{
	return addr_is4(a) ? addr_v4(a) == LOOPBACK4 : addr_is6_low(a, 1);
}

/* A datagram from an address of the book by anybody's choice (IP_PKTINFO): its
 * receiver would take it for an answer.
 */
static __always_inline bool is_forged(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);

	return pod && pod->flags & POD_DNS;
}

/* A datagram to an address of the book: does the DNS proxy answer a query? */
static __always_inline bool is_answer(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct addr local;
	struct pod *pod;
	__u64 cookie;

	if (!sk)
		return false;
	cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod || !(pod->flags & POD_DNS) || sk->src_port != pod->dns_port)
		return false;
	addr_of_sock(&local, sk);
	return is_dns_proxy(&local) || addr_is_any(&local); /* no other can be there too */
}

static __always_inline int refuse(void)
{
	if (have_set_retval)
		bpf_set_retval(-ECONNREFUSED);
	return 0;
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	__be32 to = NOW(ctx->user_ip4), from = NOW(ctx->msg_src_ip4), booked = 0;
	struct call call = {};
	__u16 via;

	if (target_index_of(to) && is_answer(ctx)) {
		ctx->msg_src_ip4 = to;
		return 1;
	}
	if (target_index_of(from) && is_forged(ctx))
		return 0;
	if (ctx->user_port != bpf_htons(PORT_DNS))
		return 1; /* not DNS */
	addr_set4(&call.dst, to);
	addr_set4(&call.src, from);
	switch (on_query(ctx, &call, &via, &booked)) {
	case REFUSE:
		return refuse();
	case TO_PROXY:
		if (booked)
			ctx->msg_src_ip4 = booked;
		ctx->user_ip4 = bpf_htonl(LOOPBACK4);
		ctx->user_port = bpf_htons(via);
		return 1;
	default:
		return 1;
	}
}

/* Only for IPv6: a datagram to ::ffff:a.b.c.d is sendmsg4's. */
SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct call call = {};
	__be32 booked = 0;
	__u16 via;

	if (ctx->user_port != bpf_htons(PORT_DNS))
		return 1; /* not DNS */
	addr_set(&call.dst, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	addr_set(&call.src, ctx->msg_src_ip6[0], ctx->msg_src_ip6[1], ctx->msg_src_ip6[2],
		 ctx->msg_src_ip6[3]);
	switch (on_query(ctx, &call, &via, &booked)) {
	case REFUSE:
		return refuse();
	case TO_PROXY:
		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = 0;
		ctx->user_ip6[3] = bpf_htonl(1);
		ctx->user_port = bpf_htons(via);
		return 1;
	default:
		return 1;
	}
}

/* The server that an answer from an address of the book is by. */
static __always_inline bool by_book(struct bpf_sock_addr *ctx, struct addr *from, __u16 *port)
{
	struct target *t;
	struct pod *pod;
	__u64 cookie;

	if (!addr_is4(from) || !target_index_of(addr_word(from, 3)))
		return false;
	cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod || !(pod->flags & POD_DNS) || *port != pod->dns_port)
		return false;
	t = target_at(cookie, addr_word(from, 3));
	if (!t)
		return false;
	*from = t->dst;
	*port = t->port;
	return true;
}

/* The same of one from the DNS proxy's own address: the socket's peer, as long as
 * it is connected, or the server that it asked last.
 */
static __always_inline bool by_record(struct bpf_sock_addr *ctx, struct addr *from, __u16 *port)
{
	struct record *rec = bpf_sk_storage_get(&orig_dst, ctx->sk, 0, 0);
	struct pod *pod;
	__u64 cookie;

	if (!rec || rec->reason != CAPTURED_DNS || rec->via != *port ||
	    addr_is4(from) != addr_is4(&rec->dst) || !is_dns_proxy(from))
		return false;
	if (!ctx->sk->dst_port) {
		cookie = bpf_get_netns_cookie(ctx);
		pod = bpf_map_lookup_elem(&pods, &cookie);
		if (!pod || !(pod->flags & POD_DNS))
			return false; /* what it asks now is not captured */
	}
	*from = rec->dst;
	*port = rec->dport;
	return true;
}

static __always_inline bool is_by_server(struct bpf_sock_addr *ctx, struct addr *from, __u16 *port)
{
	if (!ctx->sk || !addr_is_loopback(from))
		return false; /* not by way of the DNS proxy */
	return by_book(ctx, from, port) || by_record(ctx, from, port);
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	__u16 port = bpf_ntohs(ctx->user_port);
	struct addr from;

	addr_set4(&from, ctx->user_ip4);
	if (is_by_server(ctx, &from, &port)) {
		ctx->user_ip4 = addr_word(&from, 3);
		ctx->user_port = bpf_htons(port);
	}
	return 1;
}

/* Of AF_INET6 sockets, also what came by IPv4. */
SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	__u16 port = bpf_ntohs(ctx->user_port);
	struct addr from;

	addr_set(&from, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	if (is_by_server(ctx, &from, &port)) {
		ctx->user_ip6[0] = addr_word(&from, 0);
		ctx->user_ip6[1] = addr_word(&from, 1);
		ctx->user_ip6[2] = addr_word(&from, 2);
		ctx->user_ip6[3] = addr_word(&from, 3);
		ctx->user_port = bpf_htons(port);
	}
	return 1;
}
