/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What TC programs read of a packet. */
#ifndef SLUICE_PACKET_H
#define SLUICE_PACKET_H

#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_helpers.h>
#include "addr.h"

#define IP_MF 0x2000
#define IP_OFFSET 0x1fff
#define TCP_FLAG_SYN 0x02
#define TCP_FLAG_ACK 0x10
#define MIN_TCP 14 /* up to the flags */
#define MAX_EXT_HEADERS 6

struct packet {
	struct addr src, dst;
	__be16 sport, dport;
	__u16 off; /* of the TCP header from that of IP */
	__u8 flags;
	bool fragment; /* of what is, or may be, TCP */
};

enum parsed {
	NOT_TCP, /* or a later fragment, or not IP */
	TCP,
	TCP_HIDDEN, /* TCP whose flags cannot be seen: no honest stack sends it */
};

static __always_inline bool load(struct __sk_buff *skb, __u32 off, void *to, __u32 len)
{
	return !bpf_skb_load_bytes_relative(skb, off, to, len, BPF_HDR_START_NET);
}

static __always_inline enum parsed parse_tcp(struct __sk_buff *skb, __u32 off, struct packet *p)
{
	__u8 head[MIN_TCP];

	if (!load(skb, off, head, sizeof(head)))
		return TCP_HIDDEN;
	p->sport = *(__be16 *)head;
	p->dport = *(__be16 *)(head + 2);
	p->off = off;
	p->flags = head[13];
	return TCP;
}

static __always_inline enum parsed parse4(struct __sk_buff *skb, struct packet *p)
{
	struct iphdr ip;

	if (!load(skb, 0, &ip, sizeof(ip)))
		return NOT_TCP;
	addr_set4(&p->src, ip.saddr);
	addr_set4(&p->dst, ip.daddr);
	if (ip.protocol != IPPROTO_TCP)
		return NOT_TCP;
	p->fragment = ip.frag_off & bpf_htons(IP_MF | IP_OFFSET);
	if (ip.frag_off & bpf_htons(IP_OFFSET))
		return NOT_TCP;
	return parse_tcp(skb, ip.ihl * 4, p);
}

static __always_inline enum parsed parse6(struct __sk_buff *skb, struct packet *p)
{
	struct ipv6hdr ip;
	__u32 off = sizeof(ip);
	__u8 next, head[4];
	int i;

	if (!load(skb, 0, &ip, sizeof(ip)))
		return NOT_TCP;
	__builtin_memcpy(p->src.b, &ip.saddr, 16);
	__builtin_memcpy(p->dst.b, &ip.daddr, 16);
	next = ip.nexthdr;
	for (i = 0; i < MAX_EXT_HEADERS; i++) {
		if (next == IPPROTO_TCP)
			return parse_tcp(skb, off, p);
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT)
			return NOT_TCP;
		if (!load(skb, off, head, sizeof(head)))
			return TCP_HIDDEN;
		if (next == IPPROTO_FRAGMENT) {
			p->fragment = head[0] != IPPROTO_UDP && head[0] != IPPROTO_ICMPV6;
			if (*(__be16 *)(head + 2) & bpf_htons(0xfff8))
				return NOT_TCP;
			off += 8;
		} else {
			off += (head[1] + 1) * 8;
		}
		next = head[0];
	}
	return TCP_HIDDEN;
}

/* By the version in the header: a packet socket may claim any protocol. */
static __always_inline enum parsed parse(struct __sk_buff *skb, struct packet *p)
{
	__u8 version;

	if (!load(skb, 0, &version, 1))
		return NOT_TCP;
	if (version >> 4 == 4)
		return parse4(skb, p);
	if (version >> 4 == 6)
		return parse6(skb, p);
	return NOT_TCP;
}

#endif
