// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Called by the stubs on a pod's rerouted interfaces, behind which a virtual
 * machine is: what it sends by TCP is the pod's outbound traffic.
 *
 * reroute_in (ingress) writes an address of the address book and the proxy's
 * outbound port in the place of where a packet was meant to go, reroute_out
 * (egress) the other way round into the proxy's answers. Both know from the
 * packet alone what to write. docs/adr/0008.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <bpf/bpf_helpers.h>
#include "sluice.h"
#include "config.h"
#include "maps.h"
#include "addr.h"
#include "packet.h"
#include "rules.h"
#include "stats.h"
#include "targets.h"
#include "book.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* "No opinion": later programs and filters still run, by TCX and by clsact. */
#define NEXT TC_ACT_UNSPEC

#define VLAN_ID 0x0fff
#define CSUM_IPV6 (1ULL << 7) /* BPF_F_IPV6 (6.16) */

enum end {
	SRC,
	DST,
};

/* Addresses that are nobody's on a wire. */
static __always_inline bool is_inner(const struct addr *a)
{
	return addr_is_target6(a) || addr_is_loopback(a);
}

static __always_inline int refuse(__u64 cookie, enum reason reason)
{
	count(cookie, reason);
	return TC_ACT_SHOT;
}

/* The sums are changed by differences, so that what an interface has yet to
 * compute, or has checked already, stays as good as it was.
 */
static __always_inline bool replace4(struct __sk_buff *skb, __u32 l3, __u32 check, enum end end,
				     __be32 from, __be32 to)
{
	__u32 at =
		l3 + (end == SRC ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr));

	return !bpf_l4_csum_replace(skb, check, from, to, BPF_F_PSEUDO_HDR | sizeof(to)) &&
	       !bpf_l3_csum_replace(skb, l3 + offsetof(struct iphdr, check), from, to,
				    sizeof(to)) &&
	       !bpf_skb_store_bytes(skb, at, &to, sizeof(to), 0);
}

static __always_inline bool replace6(struct __sk_buff *skb, __u32 l3, __u32 check, enum end end,
				     struct addr *from, struct addr *to)
{
	__u32 at = l3 +
		   (end == SRC ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr));
	__s64 diff = bpf_csum_diff((__be32 *)from, sizeof(*from), (__be32 *)to, sizeof(*to), 0);

	if (diff < 0)
		return false;
	if (bpf_l4_csum_replace(skb, check, 0, diff, BPF_F_PSEUDO_HDR | CSUM_IPV6) &&
	    bpf_l4_csum_replace(skb, check, 0, diff, BPF_F_PSEUDO_HDR))
		return false;
	return !bpf_skb_store_bytes(skb, at, to, sizeof(*to), 0);
}

/* Writes another address and port into one end of a TCP packet. */
static __always_inline bool replace(struct __sk_buff *skb, __u32 l3, struct packet *p, enum end end,
				    struct addr *to, __be16 to_port)
{
	__u32 l4 = l3 + p->off, check = l4 + offsetof(struct tcphdr, check);
	__u32 at =
		l4 + (end == SRC ? offsetof(struct tcphdr, source) : offsetof(struct tcphdr, dest));
	struct addr *from = end == SRC ? &p->src : &p->dst;
	__be16 from_port = end == SRC ? p->sport : p->dport;

	if (bpf_l4_csum_replace(skb, check, from_port, to_port, sizeof(to_port)) ||
	    bpf_skb_store_bytes(skb, at, &to_port, sizeof(to_port), 0))
		return false;
	if (addr_is4(from))
		return replace4(skb, l3, check, end, addr_word(from, 3), addr_word(to, 3));
	return replace6(skb, l3, check, end, from, to);
}

static __always_inline void forwarded_key(struct forwarded_key *key, __u64 cookie,
					  const struct packet *p, enum end machine)
{
	key->cookie = cookie;
	key->machine = machine == SRC ? p->src : p->dst;
	key->peer = machine == SRC ? p->dst : p->src;
	key->machine_port = machine == SRC ? p->sport : p->dport;
	key->peer_port = machine == SRC ? p->dport : p->sport;
}

/* Has the proxy a connection with the machine, by this address of the book? */
static __always_inline bool has_connection(struct __sk_buff *skb, struct scratch *this,
					   const struct pod *pod, const struct packet *p,
					   const struct addr *to)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	bool has;

	this->tc_asks = 1;
	if (addr_is4(to)) {
		tuple.ipv4.saddr = addr_word(&p->src, 3);
		tuple.ipv4.daddr = addr_word(to, 3);
		tuple.ipv4.sport = p->sport;
		tuple.ipv4.dport = bpf_htons(pod->out_port);
		sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, p->src.b, 16);
		__builtin_memcpy(tuple.ipv6.daddr, to->b, 16);
		tuple.ipv6.sport = p->sport;
		tuple.ipv6.dport = bpf_htons(pod->out_port);
		sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	this->tc_asks = 0;
	if (!sk)
		return false;
	has = sk->state != BPF_TCP_LISTEN;
	bpf_sk_release(sk);
	return has;
}

/* The index of where the packet was meant to go, and in *skip whether it belongs
 * to a connection that the machine has not opened since enrolment.
 */
static __always_inline __u32 index_of(__u64 cookie, struct packet *p, bool *skip)
{
	struct forwarded_key key = {};
	__u16 port = bpf_ntohs(p->dport);

	forwarded_key(&key, cookie, p, SRC);
	if (p->flags & TCP_FLAG_SYN) { /* a new connection, whatever was before */
		bpf_map_delete_elem(&forwarded, &key);
		return book_index(cookie, &p->dst, port);
	}
	*skip = bpf_map_lookup_elem(&forwarded, &key);
	return booked(cookie, &p->dst, port);
}

SEC("tc")
int reroute_in(struct __sk_buff *skb)
{
	struct scratch *this = this_cpu();
	struct packet p = {};
	enum parsed what;
	bool skip = false;
	struct pod *pod;
	struct addr to;
	__u64 cookie;
	__u32 index;

	if (!this)
		return TC_ACT_SHOT; /* cannot be: the array has one entry */
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return NEXT; /* not IP to the kernel */
	if (skb->vlan_present && skb->vlan_tci & VLAN_ID)
		return NEXT; /* belongs to the VLAN's interface, not to this one */
	cookie = this->cookie;
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod)
		return NEXT; /* not enrolled any more */
	what = parse(skb, &p);
	/* The interface routes 127.0.0.0/8 for us, and for nobody else. */
	if (is_inner(&p.src) || is_inner(&p.dst))
		return refuse(cookie, REFUSED_REROUTED);
	if (!is_rerouted(pod, &p.dst))
		return NEXT;
	if (p.fragment || what == TCP_HIDDEN)
		return refuse(cookie, REFUSED_REROUTED); /* no TCP sends it by itself */
	if (what != TCP)
		return NEXT;
	if ((p.flags & (TCP_FLAG_SYN | TCP_FLAG_ACK)) == (TCP_FLAG_SYN | TCP_FLAG_ACK))
		return NEXT; /* somebody calls the machine */
	if (!addr_is4(&p.dst) && !(pod->flags & POD_REROUTES6))
		return p.flags & TCP_FLAG_SYN ? refuse(cookie, REFUSED_REROUTED) : NEXT;
	index = index_of(cookie, &p, &skip);
	if (!index)
		return p.flags & TCP_FLAG_SYN ? refuse(cookie, REFUSED_TABLE_FULL) : NEXT;
	if (addr_is4(&p.dst))
		addr_set4(&to, bpf_htonl(TARGETS4 | index));
	else
		addr_set(&to, bpf_htonl(TARGETS6_0), bpf_htonl(TARGETS6_1), 0, bpf_htonl(index));
	if (skip && !has_connection(skb, this, pod, &p, &to))
		return NEXT;
	if (!replace(skb, this->l3_offset, &p, DST, &to, bpf_htons(pod->out_port)))
		return refuse(cookie, REFUSED_REROUTED); /* half written: nobody's */
	return NEXT;
}

SEC("tc")
int reroute_out(struct __sk_buff *skb)
{
	struct scratch *this = this_cpu();
	struct forwarded_key key = {};
	struct packet p = {};
	struct target *t;
	enum parsed what;
	struct pod *pod;
	struct addr to;
	__u64 cookie;
	__u8 yes = 1;

	if (!this)
		return TC_ACT_SHOT;
	cookie = this->cookie;
	what = parse(skb, &p);
	if (!is_inner(&p.src)) {
		if (what == TCP && booked(cookie, &p.src, bpf_ntohs(p.sport))) {
			forwarded_key(&key, cookie, &p, DST);
			bpf_map_update_elem(&forwarded, &key, &yes, BPF_ANY);
		}
		return NEXT;
	}
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod || what != TCP || p.fragment)
		return refuse(cookie, REFUSED_REROUTED);
	t = target_of_addr(pod, cookie, &p.src, bpf_ntohs(p.sport));
	if (!t)
		return refuse(cookie, REFUSED_REROUTED);
	to = t->dst;
	if (!replace(skb, this->l3_offset, &p, SRC, &to, bpf_htons(t->port)))
		return refuse(cookie, REFUSED_REROUTED);
	return NEXT;
}
