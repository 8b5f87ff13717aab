/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* UDP calls to port 53, by connect() or by a datagram. */
#ifndef SLUICE_DNS_H
#define SLUICE_DNS_H

#include "rules.h"
#include "stats.h"

/* Judges a call to port 53 whose source and destination are set. The pod, if the
 * call is to go to its DNS proxy; else 0.
 */
static __always_inline struct pod *captures_dns(struct bpf_sock_addr *ctx, struct call *call)
{
	enum reason reason;
	struct pod *pod;

	call->cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &call->cookie);
	if (!pod || !(pod->flags & POD_DNS))
		return 0; /* nobody's, or one whose UDP is not ours */
	any_is_loopback(&call->dst);
	call->port = PORT_DNS;
	call->protocol = IPPROTO_UDP;
	call->ifindex = ctx->sk->bound_dev_if;
	reason = decide_out(pod, call);
	count(call->cookie, reason);
	return reason == CAPTURED_DNS ? pod : 0;
}

/* What the socket's answers from the DNS proxy, or its peer, will be shown as. */
static __always_inline void note_server(struct record *rec, const struct pod *pod,
					const struct call *call)
{
	rec->dst = call->dst;
	rec->dport = PORT_DNS;
	rec->via = pod->dns_port;
	rec->reason = CAPTURED_DNS;
}

/* The socket calls nobody by way of the DNS proxy any more. That we bound it is
 * true for as long as it lives.
 */
static __always_inline void forget_server(struct bpf_sock *sk, struct record *rec)
{
	if (rec->flags & RECORD_BOUND) {
		rec->reason = REASON_NONE;
		rec->flags = RECORD_BOUND;
	} else {
		bpf_sk_storage_delete(&orig_dst, sk);
	}
}

#endif
