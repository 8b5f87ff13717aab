// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The inbound decision, called by the stub in the pod's namespace when the
 * kernel looks for a listener: once per SYN (and per SYN cookie), never for an
 * open connection.
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

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* The TC program's question is not a packet: do not count it. */
static __always_inline void count_packet(const struct scratch *this, enum reason reason)
{
	if (!this->tc_asks)
		count(this->cookie, reason);
}

static __always_inline bool try_listener(struct bpf_sk_lookup *ctx, struct listener_key *key)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, key);
	long err;

	if (!sk)
		return false;
	err = bpf_sk_assign(ctx, sk, 0); /* fails for one that is shut down, or V6ONLY */
	bpf_sk_release(sk);
	return !err;
}

/* The proxy's listener on a port, in whichever slot a usable one is. An IPv4
 * connection may go to an AF_INET6 listener; the kernel knows which are V6ONLY.
 *
 * Not inlined: clang then lays the loop out so that nothing falls through into
 * its head, which kernels before 6.4 take for an endless loop ("back-edge").
 */
static __noinline bool assign_proxy(struct bpf_sk_lookup *ctx, __u64 cookie, __u16 port,
				    enum listener_scope scope)
{
	struct listener_key key = { .cookie = cookie, .port = port, .scope = scope };
	int i;

	for (i = 0; i < SLUICE_LISTENER_SLOTS; i++) {
		key.slot = i;
		key.family = ctx->family;
		if (try_listener(ctx, &key))
			return true;
		key.family = AF_INET6;
		if (ctx->family == AF_INET && try_listener(ctx, &key))
			return true;
	}
	return false;
}

/* Did a captured connect of this pod send this SYN, so that the proxy will learn
 * where it was meant to go?
 */
static __always_inline bool announced(struct bpf_sk_lookup *ctx, __u64 cookie,
				      const struct addr *local, const struct addr *remote)
{
	struct handshake_key key = {
		.cookie = cookie,
		.client = *remote,
		.server = *local,
		.client_port = bpf_ntohs(ctx->remote_port),
		.server_port = ctx->local_port,
	};

	if (addr_is4(local) && target_index_of(addr_word(local, 3)))
		return target_at(cookie, addr_word(local, 3));
	return bpf_map_lookup_elem(&handshakes, &key);
}

/* To a capture port on loopback. Without an original destination the proxy
 * would not know what to do with it, or dial itself.
 */
static __always_inline int from_loopback(struct bpf_sk_lookup *ctx, const struct scratch *this,
					 const struct pod *pod, const struct addr *local,
					 const struct addr *remote)
{
	if (!is_capture_port(pod, ctx->local_port))
		return SK_PASS;
	if (!announced(ctx, this->cookie, local, remote)) {
		count_packet(this, REFUSED_NO_HANDSHAKE);
		return SK_DROP;
	}
	if (assign_proxy(ctx, this->cookie, ctx->local_port, LISTENS_TO_ALL) ||
	    assign_proxy(ctx, this->cookie, ctx->local_port, LISTENS_ON_LOOPBACK))
		return SK_PASS;
	if (addr_is4(local) && is_fact(this->cookie, assignable(pod, ctx->local_port))) {
		count_packet(this, REFUSED_NO_LISTENER); /* not to a stranger in its place */
		return SK_DROP;
	}
	return SK_PASS; /* to whoever the kernel finds there: an MPTCP listener, for one */
}

/* From a machine behind a rerouted interface. What is the proxy's comes to an
 * address of the address book, which the TC program there has put in the place
 * of where it was meant to go.
 */
static __always_inline int from_rerouted(struct bpf_sk_lookup *ctx, const struct scratch *this,
					 const struct pod *pod, const struct addr *local)
{
	if (!addr_is_loopback(local) && !addr_is_target6(local)) {
		if (!is_rerouted(pod, local)) {
			count_packet(this, DIRECT_INTERFACE);
			return SK_PASS;
		}
	} else if (ctx->local_port == pod->out_port &&
		   target_of_addr(pod, this->cookie, local, ctx->local_port)) {
		if (assign_proxy(ctx, this->cookie, ctx->local_port, LISTENS_TO_ALL)) {
			count_packet(this, CAPTURED_REROUTED);
			return SK_PASS;
		}
		count_packet(this, REFUSED_NO_LISTENER);
		return SK_DROP;
	}
	count_packet(this, REFUSED_REROUTED); /* the TC program has not seen it */
	return SK_DROP;
}

/* When a pod calls its own address, the kernel names the address's interface as
 * the incoming one, not lo. Then the peer's address decides: no packet from
 * outside has one of ours (IPv4 drops martian sources; over IPv6 the answer to
 * one would never leave the pod).
 */
static __always_inline bool from_within(const struct pod *pod, __u64 cookie,
					const struct addr *remote)
{
	return addr_is_loopback(remote) || is_own(pod, cookie, remote);
}

static __always_inline bool over_loopback(struct bpf_sk_lookup *ctx, const struct pod *pod,
					  __u64 cookie, const struct addr *remote)
{
	return (have_ingress_ifindex && ctx->ingress_ifindex == LOOPBACK_IFINDEX) ||
	       from_within(pod, cookie, remote);
}

/* Did a machine behind the pod send it? */
static __always_inline bool enters_rerouted(struct bpf_sk_lookup *ctx, const struct pod *pod,
					    __u64 cookie, const struct addr *remote)
{
	return have_ingress_ifindex && pod->flags & POD_REROUTES &&
	       interface_kind(cookie, ctx->ingress_ifindex) == INTERFACE_REROUTED &&
	       !from_within(pod, cookie, remote);
}

/* Kernels that do not say where a packet came in enrol no pod that excludes
 * interfaces.
 */
static __always_inline bool by_excluded(struct bpf_sk_lookup *ctx, const struct pod *pod,
					__u64 cookie)
{
	return have_ingress_ifindex && pod->flags & POD_HAS_INTERFACES &&
	       interface_kind(cookie, ctx->ingress_ifindex) == INTERFACE_EXCLUDED;
}

static __always_inline void read_addrs(struct bpf_sk_lookup *ctx, struct addr *local,
				       struct addr *remote)
{
	__be32 local4 = NOW(ctx->local_ip4), remote4 = NOW(ctx->remote_ip4);

	if (ctx->family == AF_INET) {
		addr_set4(local, local4);
		addr_set4(remote, remote4);
		return;
	}
	addr_set(local, ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3]);
	addr_set(remote, ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2],
		 ctx->remote_ip6[3]);
}

SEC("sk_lookup")
int inbound(struct bpf_sk_lookup *ctx)
{
	struct scratch *this = this_cpu();
	struct addr local, remote;
	struct pod *pod;

	if (!this)
		return SK_DROP; /* cannot be: the array has one entry */
	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (!ctx->remote_port)
		return SK_PASS; /* a question by a helper of ours */
	if (have_ingress_ifindex && !ctx->ingress_ifindex)
		return SK_PASS; /* anybody's question: no packet comes from nowhere */
	pod = bpf_map_lookup_elem(&pods, &this->cookie);
	if (!pod) {
		count_packet(this, REFUSED_NO_POD);
		return SK_DROP;
	}
	read_addrs(ctx, &local, &remote);
	if (enters_rerouted(ctx, pod, this->cookie, &remote))
		return from_rerouted(ctx, this, pod, &local);
	if (addr_is_target6(&local) && pod->flags & POD_REROUTES6) {
		count_packet(this, REFUSED_REROUTED); /* nobody else has business there */
		return SK_DROP;
	}
	if (addr_is_loopback(&local))
		return from_loopback(ctx, this, pod, &local, &remote);
	if (over_loopback(ctx, pod, this->cookie, &remote))
		return SK_PASS;
	if (by_excluded(ctx, pod, this->cookie)) {
		count_packet(this, DIRECT_INTERFACE); /* I0 */
		return SK_PASS;
	}
	if (!captured_in(pod, ctx->local_port)) {
		count_packet(this, DIRECT_PORT_IN);
		return SK_PASS;
	}
	if (assign_proxy(ctx, this->cookie, pod->in_port, LISTENS_TO_ALL)) {
		count_packet(this, CAPTURED_IN);
		return SK_PASS;
	}
	/* Fail closed: the peer gets a RST, the app never sees the SYN. */
	count_packet(this, REFUSED_NO_LISTENER);
	return SK_DROP;
}
