/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Addresses: normalising, and the classes that decisions need. */
#ifndef SLUICE_ADDR_H
#define SLUICE_ADDR_H

#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "sluice.h"

#define AF_INET 2
#define AF_INET6 10

#define LOOPBACK4 0x7f000001 /* 127.0.0.1 */
#define PROXY_SOURCE4 0x7f000006 /* 127.0.0.6: what Envoy binds to call the app */
#define SPREAD4 0x7f800000 /* 127.128.0.0/10: announced connections */
#define TARGETS4 0x7fc00000 /* 127.192.0.0/10: addresses of the address book */
#define SPREAD4_MASK 0x003fffff
/* fd73:6c75:6963:6500::/96 ("sluice"): the address book for IPv6 destinations of
 * machines behind a pod; ::1 is refused where it does not come from lo
 */
#define TARGETS6_0 0xfd736c75
#define TARGETS6_1 0x69636500

/* The 32-bit word of an address, network order. */
static __always_inline __be32 addr_word(const struct addr *a, int i)
{
	return ((const __be32 *)a->b)[i];
}

static __always_inline void addr_set(struct addr *a, __be32 w0, __be32 w1, __be32 w2, __be32 w3)
{
	__be32 *w = (__be32 *)a->b;

	w[0] = w0;
	w[1] = w1;
	w[2] = w2;
	w[3] = w3;
}

/* A field of a BPF context, read here and now: LLVM must not turn two reads into
 * one through a computed pointer, which the verifier refuses.
 */
#define NOW(field)                           \
	({                                   \
		__u32 v_ = (field);          \
		asm volatile("" : "+r"(v_)); \
		v_;                          \
	})

static __always_inline void addr_set4(struct addr *a, __be32 v4)
{
	addr_set(a, 0, 0, bpf_htonl(0xffff), v4);
}

static __always_inline bool addr_is4(const struct addr *a)
{
	return !addr_word(a, 0) && !addr_word(a, 1) && addr_word(a, 2) == bpf_htonl(0xffff);
}

/* IPv4 part in host order; only for addr_is4. */
static __always_inline __u32 addr_v4(const struct addr *a)
{
	return bpf_ntohl(addr_word(a, 3));
}

/* ::N for a small N. */
static __always_inline bool addr_is6_low(const struct addr *a, __u32 low)
{
	return !addr_word(a, 0) && !addr_word(a, 1) && !addr_word(a, 2) &&
	       addr_word(a, 3) == bpf_htonl(low);
}

/* 0.0.0.0 or :: */
static __always_inline bool addr_is_any(const struct addr *a)
{
	return addr_is6_low(a, 0) || (addr_is4(a) && !addr_word(a, 3));
}

/* A call to the any address means loopback. */
static __always_inline void any_is_loopback(struct addr *a)
{
	if (!addr_is_any(a))
		return;
	if (addr_is4(a))
		addr_set4(a, bpf_htonl(LOOPBACK4));
	else
		addr_set(a, 0, 0, 0, bpf_htonl(1));
}

/* 127.0.0.0/8 or ::1 */
static __always_inline bool addr_is_loopback(const struct addr *a)
{
	if (addr_is4(a))
		return addr_v4(a) >> 24 == 127;
	return addr_is6_low(a, 1);
}

/* The index of an address of the address book; 0 is none. */
static __always_inline __u32 target_index_of(__be32 v4)
{
	__u32 a = bpf_ntohl(v4);

	return (a & ~SPREAD4_MASK) == TARGETS4 ? a & SPREAD4_MASK : 0;
}

static __always_inline bool addr_is_target6(const struct addr *a)
{
	return addr_word(a, 0) == bpf_htonl(TARGETS6_0) &&
	       addr_word(a, 1) == bpf_htonl(TARGETS6_1) && !addr_word(a, 2);
}

/* target_index_of, for both families. */
static __always_inline __u32 target_index_of_addr(const struct addr *a)
{
	if (addr_is4(a))
		return target_index_of(addr_word(a, 3));
	return addr_is_target6(a) ? bpf_ntohl(addr_word(a, 3)) : 0;
}

/* The source with which the proxy calls the app. */
static __always_inline bool addr_is_proxy_source(const struct addr *a)
{
	if (addr_is4(a))
		return addr_v4(a) == PROXY_SOURCE4;
	return addr_is6_low(a, 6);
}

/* fe80::/10: reachable without any global address. */
static __always_inline bool addr_is_link_local6(const struct addr *a)
{
	return (bpf_ntohl(addr_word(a, 0)) & 0xffc00000) == 0xfe800000;
}

/* TCP connects to unicast only; the kernel has its own errors for the rest. */
static __always_inline bool addr_is_unicast(const struct addr *a)
{
	if (addr_is4(a))
		return addr_v4(a) >> 28 != 0xe && addr_v4(a) != 0xffffffff;
	return a->b[0] != 0xff;
}

/* The local address of a socket. */
static __always_inline void addr_of_sock(struct addr *a, struct bpf_sock *sk)
{
	__be32 v4 = NOW(sk->src_ip4);

	if (sk->family == AF_INET)
		addr_set4(a, v4);
	else
		addr_set(a, sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3]);
}

static __always_inline enum own_kind own_kind(void *own_addrs_map, __u64 cookie,
					      const struct addr *a)
{
	struct own_addr_key key = { .cookie = cookie, .addr = *a };
	enum own_kind *kind = bpf_map_lookup_elem(own_addrs_map, &key);

	return kind ? *kind : 0;
}

static __always_inline bool own_addr(void *own_addrs_map, __u64 cookie, const struct addr *a)
{
	return own_kind(own_addrs_map, cookie, a) == OWN_ADDR;
}

#endif
