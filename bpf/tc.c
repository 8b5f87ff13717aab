// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Called by the stubs on every interface of a pod but lo and the excluded ones.
 *
 * guard (egress) stops a SYN that no connect hook has judged: it does not
 * decide rules again, it wants a verdict. tc_inbound (ingress, --inbound=tc)
 * steers to listeners that no sockhash can hold (MPTCP); whatever it cannot
 * assign is left to the sk_lookup program, which refuses.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include "sluice.h"
#include "config.h"
#include "maps.h"
#include "addr.h"
#include "packet.h"
#include "rules.h"
#include "stats.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* "No opinion": later programs and filters still run, by TCX and by clsact. */
#define NEXT TC_ACT_UNSPEC

/* Most packets are seen through with three comparisons: TCP that is no SYN, UDP,
 * ICMP. Whatever is not plainly harmless is parsed in full.
 */
static __always_inline bool plainly_harmless(struct __sk_buff *skb, __u32 l3)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u8 *ip, *tcp, next;

	if (l3 > ETH_HLEN)
		return false;
	ip = data + l3;
	if ((void *)(ip + sizeof(struct iphdr) + MIN_TCP) > end)
		return false;
	if (*ip == 0x45) { /* IPv4 without options */
		if (ip[16] == 127)
			return false;
		next = ip[9];
		tcp = ip + sizeof(struct iphdr);
	} else if (*ip >> 4 == 6 && (void *)(ip + sizeof(struct ipv6hdr) + MIN_TCP) <= end) {
		next = ip[6];
		tcp = ip + sizeof(struct ipv6hdr);
	} else {
		return false;
	}
	if (next == IPPROTO_TCP)
		return (tcp[13] & (TCP_FLAG_SYN | TCP_FLAG_ACK)) != TCP_FLAG_SYN;
	return next == IPPROTO_UDP || next == IPPROTO_ICMP || next == IPPROTO_ICMPV6;
}

/* A machine behind the pod sends a SYN through it. Where some are rerouted, an
 * interface that nobody has looked at yet may be one of theirs.
 */
static __always_inline bool may_be_forwarded(__u64 cookie, __u32 ifindex, const struct addr *dst)
{
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	enum interface_kind kind;

	if (!pod || !(pod->flags & POD_REROUTES))
		return true;
	kind = interface_kind(cookie, ifindex);
	return kind == INTERFACE_REROUTED ? !is_rerouted(pod, dst) : kind;
}

/* A connection that was let go because it leaves by an excluded interface comes
 * past no guard, unless that interface stands upon this one (or was excluded a
 * moment ago). Otherwise the routes changed meanwhile, or are not those that we
 * know of: stop it.
 */
static __always_inline bool leaves_here(const struct record *rec, __u64 cookie, __u32 ifindex)
{
	enum interface_kind kind;

	if (rec->reason != DIRECT_INTERFACE)
		return true;
	kind = interface_kind(cookie, ifindex);
	return kind == INTERFACE_CARRIER || kind == INTERFACE_EXCLUDED;
}

SEC("tc")
int guard(struct __sk_buff *skb)
{
	struct scratch *this = this_cpu();
	struct packet p = {};
	struct bpf_sock *sk;
	struct record *rec = 0;
	enum parsed what;
	__u64 cookie;

	if (!this || plainly_harmless(skb, this->l3_offset))
		return NEXT;
	cookie = this->cookie;
	what = parse(skb, &p);
	if (addr_is4(&p.dst) && addr_is_loopback(&p.dst)) {
		count(cookie, GUARD_LOOPBACK); /* SO_BINDTODEVICE and a captured connect */
		return TC_ACT_SHOT;
	}
	if (what == NOT_TCP)
		return NEXT;
	if (what == TCP && (p.flags & (TCP_FLAG_SYN | TCP_FLAG_ACK)) != TCP_FLAG_SYN)
		return NEXT;
	sk = skb->sk;
	if (skb->ingress_ifindex && !sk) {
		if (may_be_forwarded(cookie, skb->ingress_ifindex, &p.dst))
			return NEXT;
		count(cookie, GUARD_NO_VERDICT);
		return TC_ACT_SHOT;
	}
	if (sk) {
		rec = bpf_sk_storage_get(&orig_dst, sk, 0, 0);
		if (rec && is_direct(rec->reason) && leaves_here(rec, cookie, skb->ifindex))
			return NEXT;
	}
	if (!bpf_map_lookup_elem(&pods, &cookie))
		return NEXT; /* not enrolled any more: nobody gives verdicts */
	count(cookie,
	      rec && rec->reason == DIRECT_INTERFACE ? GUARD_OTHER_INTERFACE : GUARD_NO_VERDICT);
	return TC_ACT_SHOT;
}

/* Is this packet somebody's already? The kernel's own answer, our sk_lookup
 * program included, which counts nothing meanwhile: an open connection, a
 * handshake, or the proxy's listener. Not another listener: that is the app's,
 * seen while the pod is being enrolled and sk_lookup is not attached yet.
 */
static __always_inline bool is_taken(struct __sk_buff *skb, struct scratch *this,
				     const struct pod *pod, struct bpf_sock_tuple *tuple, __u32 len)
{
	struct bpf_sock *sk;
	bool taken;

	this->tc_asks = 1;
	sk = bpf_skc_lookup_tcp(skb, tuple, len, BPF_F_CURRENT_NETNS, 0);
	this->tc_asks = 0;
	if (!sk)
		return false;
	taken = sk->state != BPF_TCP_LISTEN || proxys_own(sk, pod);
	bpf_sk_release(sk);
	return taken;
}

SEC("tc")
int tc_inbound(struct __sk_buff *skb)
{
	struct scratch *this = this_cpu();
	struct bpf_sock_tuple tuple = {};
	struct packet p = {};
	struct bpf_sock *sk;
	struct pod *pod;
	__u64 cookie;
	__u32 len;

	if (!this || parse(skb, &p) != TCP)
		return NEXT;
	cookie = this->cookie;
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod || !captured_in(pod, bpf_ntohs(p.dport)) || !is_own(pod, cookie, &p.dst))
		return NEXT;
	if (addr_is4(&p.dst)) {
		len = sizeof(tuple.ipv4);
		tuple.ipv4.saddr = addr_word(&p.src, 3);
		tuple.ipv4.daddr = addr_word(&p.dst, 3);
		tuple.ipv4.sport = p.sport;
		tuple.ipv4.dport = p.dport;
	} else {
		len = sizeof(tuple.ipv6);
		__builtin_memcpy(tuple.ipv6.saddr, p.src.b, 16);
		__builtin_memcpy(tuple.ipv6.daddr, p.dst.b, 16);
		tuple.ipv6.sport = p.sport;
		tuple.ipv6.dport = p.dport;
	}
	if (len == sizeof(tuple.ipv4) ? is_taken(skb, this, pod, &tuple, sizeof(tuple.ipv4)) :
					is_taken(skb, this, pod, &tuple, sizeof(tuple.ipv6)))
		return NEXT;

	/* Source port 0: a question to the kernel that sk_lookup leaves alone. */
	if (addr_is4(&p.dst)) {
		tuple.ipv4.sport = 0;
		tuple.ipv4.dport = bpf_htons(pod->in_port);
		sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		tuple.ipv6.sport = 0;
		tuple.ipv6.dport = bpf_htons(pod->in_port);
		sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return NEXT;
	if (proxys_own(sk, pod) && !bpf_sk_assign(skb, sk, 0) && p.flags & TCP_FLAG_SYN)
		count(cookie, CAPTURED_IN);
	bpf_sk_release(sk);
	return NEXT;
}
