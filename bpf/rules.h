/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The order of decisions. One function for IPv4 and IPv6 in each direction.
 * The names O0..O14 and I0..I3 are those of docs/rules.md.
 */
#ifndef SLUICE_RULES_H
#define SLUICE_RULES_H

#include <linux/in.h>
#include "addr.h"
#include "config.h"
#include "maps.h"

#define PORT_HBONE 15008 /* the mesh's own tunnel: never captured */
#define PORT_DNS 53
#define LOOPBACK_IFINDEX 1

static __always_inline enum rule_verdict port_rule(__u32 rules_id, enum direction direction,
						   __u16 port)
{
	struct port_rule_key key = {
		.rules_id = rules_id,
		.direction = direction,
		.protocol = IPPROTO_TCP,
		.port = port,
	};
	enum rule_verdict *verdict = bpf_map_lookup_elem(&port_rules, &key);

	return verdict ? *verdict : 0;
}

static __always_inline __u32 id_value(__u32 rules_id, enum id_kind kind, __u32 id)
{
	struct proxy_id_key key = { .rules_id = rules_id, .kind = kind, .id = id };
	__u32 *value = bpf_map_lookup_elem(&proxy_ids, &key);

	return value ? *value : 0;
}

/* What the caller is to the proxy: its UID's flags if it has some, else its
 * GID's. enum id_flags.
 */
static __always_inline __u32 proxy_flags(__u32 rules_id, __u32 uid, __u32 gid)
{
	__u32 flags = id_value(rules_id, ID_UID, uid);

	return flags ? flags : id_value(rules_id, ID_GID, gid);
}

/* Was this socket bound to its port by the proxy? (sk may be any kind of socket
 * pointer, which a function could not take.)
 */
#define BOUND_BY_PROXY(sk, pod)                                               \
	({                                                                    \
		struct binder *b_ = bpf_sk_storage_get(&binders, (sk), 0, 0); \
		b_ &&proxy_flags((pod)->rules_id, b_->uid, b_->gid);          \
	})

/* What user space noted of an MPTCP socket stands on the msk, not on the subflow
 * that listens.
 */
static __always_inline bool proxys_own(struct bpf_sock *sk, const struct pod *pod)
{
	struct mptcp_sock *msk;

	if (!have_mptcp_sock || bpf_sk_storage_get(&binders, sk, 0, 0))
		return BOUND_BY_PROXY(sk, pod);
	msk = bpf_skc_to_mptcp_sock(sk);
	return msk && BOUND_BY_PROXY(msk, pod);
}

static __always_inline bool is_fact(__u64 cookie, enum pod_fact fact)
{
	struct pod_fact_key key = { .cookie = cookie, .fact = fact };

	return bpf_map_lookup_elem(&pod_facts, &key);
}

/* Of one of the two capture ports. */
static __always_inline enum pod_fact assignable(const struct pod *pod, __u16 port)
{
	return port == pod->out_port ? FACT_OUT_ASSIGNABLE : FACT_IN_ASSIGNABLE;
}

/* What the ranges hold of an address. */
static __always_inline __u32 cidr_value(const struct pod *pod, const struct addr *dst)
{
	enum rule_verdict *verdict = 0;

	if (addr_is4(dst)) {
		struct cidr4_key key = { .prefixlen = 64, .rules_id = pod->rules_id };

		if (pod->flags & POD_OUT_HAS_CIDRS4) {
			__builtin_memcpy(key.addr, dst->b + 12, 4);
			verdict = bpf_map_lookup_elem(&cidr_rules4, &key);
		}
	} else {
		struct cidr6_key key = { .prefixlen = 160, .rules_id = pod->rules_id };

		if (pod->flags & POD_OUT_HAS_CIDRS6) {
			__builtin_memcpy(key.addr, dst->b, 16);
			verdict = bpf_map_lookup_elem(&cidr_rules6, &key);
		}
	}
	return verdict ? *verdict : 0;
}

/* What the ranges say of an address; 0: they do not hold it. RULE_DIRECT is
 * said by an exclude only.
 */
static __always_inline enum rule_verdict cidr_rule(const struct pod *pod, const struct addr *dst)
{
	return cidr_value(pod, dst) & RULE_VERDICT;
}

/* Is it the proxy's, what a machine behind a rerouted interface sends there by
 * TCP? Istio asks the includes only.
 */
static __always_inline bool is_rerouted(const struct pod *pod, const struct addr *dst)
{
	if (!addr_is_unicast(dst))
		return false;
	return pod->flags & POD_OUT_DEFAULT_CAPTURE || cidr_value(pod, dst) & RULE_REROUTE;
}

/* The two ports at which the proxy takes what was captured. */
static __always_inline bool is_capture_port(const struct pod *pod, __u16 port)
{
	return port == pod->out_port || port == pod->in_port;
}

/* The ports at which a connection may arrive that another address was meant for. */
static __always_inline bool may_be_captured(const struct pod *pod, __u16 port)
{
	return is_capture_port(pod, port) || (pod->flags & POD_DNS && port == pod->dns_port);
}

/* What counts as 127.0.0.1 or ::1 (V4LO, V6LO in Istio's rules). */
static __always_inline bool is_lo_address(const struct pod *pod, const struct addr *a)
{
	if (addr_is4(a))
		return (addr_word(a, 3) & pod->loopback_mask) == pod->loopback_net;
	return addr_is6_low(a, 1);
}

/* A connect() or a datagram to dst:port. */
struct call {
	__u64 cookie;
	struct addr src; /* zero: not bound */
	struct addr dst;
	__u16 port;
	__u8 protocol;
	__u8 pad;
	__u32 ifindex; /* SO_BINDTODEVICE; 0: none */
	__u32 mark; /* SO_MARK */
	__u32 tail; /* no byte may be left unset: decide_out is handed all of them */
};

/* From 127.0.0.6 or ::6? Who calls ::6 itself gets it as the source. */
static __always_inline bool from_proxy_source(const struct call *c)
{
	if (addr_is_any(&c->src))
		return addr_is6_low(&c->dst, 6);
	return addr_is_proxy_source(&c->src);
}

static __always_inline enum interface_kind interface_kind(__u64 cookie, __u32 ifindex)
{
	struct interface_key key = { .cookie = cookie, .ifindex = ifindex };
	enum interface_kind *kind = bpf_map_lookup_elem(&interfaces, &key);

	return kind ? *kind : 0;
}

/* By which kind of route an address is reached. 0: none says anything. */
static __always_inline enum route_kind route_kind(const struct pod *pod, __u64 cookie,
						  const struct addr *a)
{
	enum route_kind *kind;

	if (!(pod->flags & (POD_HAS_INTERFACES | POD_HAS_LOCALS)))
		return 0; /* most pods */
	if (addr_is4(a)) {
		struct route4_key key = { .prefixlen = 96, .cookie_low = cookie };

		key.cookie_high = cookie >> 32;
		__builtin_memcpy(key.addr, a->b + 12, 4);
		kind = bpf_map_lookup_elem(&routes4, &key);
	} else {
		struct route6_key key = { .prefixlen = 192, .cookie_low = cookie };

		key.cookie_high = cookie >> 32;
		__builtin_memcpy(key.addr, a->b, 16);
		kind = bpf_map_lookup_elem(&routes6, &key);
	}
	return kind ? *kind : 0;
}

/* Is it one of the pod's own addresses, by itself or in a local prefix? */
static __always_inline bool is_own(const struct pod *pod, __u64 cookie, const struct addr *a)
{
	return own_addr(&own_addrs, cookie, a) || route_kind(pod, cookie, a) == ROUTE_LOCAL;
}

/* Would the kernel send it out through an excluded interface? */
static __always_inline bool leaves_by_excluded(const struct call *c, bool local,
					       enum route_kind route)
{
	if (local)
		return interface_kind(c->cookie, LOOPBACK_IFINDEX) == INTERFACE_EXCLUDED;
	if (c->ifindex)
		return interface_kind(c->cookie, c->ifindex) == INTERFACE_EXCLUDED;
	return route == ROUTE_EXCLUDED;
}

static __always_inline bool owner_is_direct(const struct pod *pod, __u32 gid)
{
	__u32 verdict;

	if (!(pod->flags & POD_HAS_OWNERS))
		return pod->flags & POD_OWNERS_DIRECT;
	verdict = id_value(pod->rules_id, ID_OWNER, gid);
	return verdict ? verdict == RULE_DIRECT : pod->flags & POD_OWNERS_DIRECT;
}

/* In proxy-ready mode, before the proxy has listened. */
static __always_inline bool goes_without(const struct pod *pod, __u64 cookie)
{
	return pod->flags & POD_WHEN_READY && is_fact(cookie, FACT_WAITING);
}

/* Inbound: is a connection to this port of the pod the proxy's? */
static __always_inline bool captured_in(const struct pod *pod, __u16 port)
{
	enum rule_verdict verdict;

	if (port == PORT_HBONE)
		return false; /* I1 */
	verdict = port_rule(pod->rules_id, DIR_IN, port);
	if (pod->flags & POD_IN_DEFAULT_CAPTURE)
		return verdict != RULE_DIRECT; /* I2, I3 */
	return verdict == RULE_CAPTURE;
}

/* Bound to an address that is neither the pod's nor the proxy's own source. */
static __always_inline bool is_foreign(const struct call *c)
{
	return !addr_is_any(&c->src) && !addr_is_loopback(&c->src) &&
	       !addr_is_proxy_source(&c->src) && !own_addr(&own_addrs, c->cookie, &c->src);
}

/* In TPROXY mode the proxy calls the app for a client: from the client's address,
 * or, where that is the pod's own, with the mark that says so.
 */
static __always_inline bool is_for_client(const struct pod *pod, const struct call *c)
{
	return pod->flags & POD_TPROXY && (c->mark == SLUICE_TPROXY_MARK || is_foreign(c));
}

/* T3: in TPROXY mode a call of any of the proxy's identities to its own pod comes
 * back in, to the ports that are captured inbound. Excluded outbound ports (O1) do not
 * matter to it.
 */
static __always_inline bool is_tproxy_self_call(const struct pod *pod, const struct call *c,
						__u32 proxy)
{
	return pod->flags & POD_TPROXY && proxy && captured_in(pod, c->port);
}

/* O3, O6: does the proxy call a service that it is itself in front of? That is asked
 * of its first identity.
 */
static __always_inline bool is_self_call(const struct call *c, __u32 proxy, bool dns)
{
	return c->port != PORT_HBONE && proxy & (dns ? ID_SELF_DNS : ID_SELF);
}

static __always_inline enum reason decide(const struct pod *pod, const struct call *c)
{
	enum own_kind own = own_kind(&own_addrs, c->cookie, &c->dst);
	enum route_kind route = route_kind(pod, c->cookie, &c->dst);
	bool local = addr_is_loopback(&c->dst) || own == OWN_ADDR || route == ROUTE_LOCAL;
	bool dns = pod->flags & POD_DNS && c->port == PORT_DNS;
	bool tcp = c->protocol == IPPROTO_TCP;
	bool lo = is_lo_address(pod, &c->dst);
	enum rule_verdict by_address, by_port = 0;
	__u32 proxy, uid, gid;
	bool comes_back;
	__u64 id;

	if (!addr_is_unicast(&c->dst) || own == OWN_BROADCAST)
		return LEFT_TO_KERNEL;
	if (!local && addr_is_any(addr_is4(&c->dst) ? &pod->addr4 : &pod->addr6) &&
	    !addr_is_link_local6(&c->dst))
		return LEFT_TO_KERNEL; /* no address of this family: ENETUNREACH, as ever */
	id = bpf_get_current_uid_gid();
	uid = id;
	gid = id >> 32;
	proxy = proxy_flags(pod->rules_id, uid, gid);
	if (tcp && local && is_for_client(pod, c) && proxy)
		return is_capture_port(pod, c->port) ? REFUSED_LOOP : DIRECT_PROXY_SOURCE; /* T1 */
	if (pod->flags & POD_HAS_INTERFACES && leaves_by_excluded(c, local, route))
		return DIRECT_INTERFACE; /* O0 */
	comes_back = tcp && local && !lo && is_tproxy_self_call(pod, c, proxy);
	if (pod->flags & POD_OUT_HAS_PORTS)
		by_port = port_rule(pod->rules_id, DIR_OUT, c->port);
	if (by_port == RULE_DIRECT && (!comes_back || from_proxy_source(c)))
		return DIRECT_PORT_OUT; /* O1 */
	if (tcp && local && is_capture_port(pod, c->port) && (proxy || from_proxy_source(c)))
		return REFUSED_LOOP; /* it would be handed its own connection, for ever */
	if (local && from_proxy_source(c))
		return DIRECT_PROXY_SOURCE; /* O2 */
	if (comes_back || (tcp && local && !lo && is_self_call(c, proxy, dns)))
		return CAPTURED_SELF; /* O3, O6, T3 */
	if (local && !dns && !(pod->flags & POD_LOCAL_CAPTURABLE))
		return lo ? DIRECT_LOOPBACK : DIRECT_LOCAL; /* O4, O7 */
	if (proxy)
		return DIRECT_PROXY; /* O5, O8 */
	if (owner_is_direct(pod, gid))
		return DIRECT_OWNER_GROUP; /* O9 */
	if (dns)
		return goes_without(pod, c->cookie) ? DIRECT_NOT_READY : CAPTURED_DNS; /* O10 */
	if (lo)
		return DIRECT_LOOPBACK; /* O11 */
	by_address = cidr_rule(pod, &c->dst);
	if (by_address == RULE_DIRECT)
		return DIRECT_CIDR; /* O12 */
	if (by_port != RULE_CAPTURE && by_address != RULE_CAPTURE &&
	    !(pod->flags & POD_OUT_DEFAULT_CAPTURE))
		return DIRECT_CIDR;
	return goes_without(pod, c->cookie) ? DIRECT_NOT_READY : CAPTURED_OUT; /* O13, O14 */
}

/* Outbound: what becomes of a TCP connect(), or of a datagram to port 53 of a pod
 * with POD_DNS.
 *
 * A global function: the verifier looks at it once, by itself, and at its callers with
 * any result. Inlined it is walked through again on each way that leads to it, which
 * took connect6 to the limit of what it walks.
 */
__noinline enum reason decide_out(const struct pod *pod, const struct call *c)
{
	if (!pod || !c)
		return REFUSED_NO_POD; /* cannot be, and a global function has to ask */
	return decide(pod, c);
}

static __always_inline bool is_captured(enum reason reason)
{
	return reason == CAPTURED_OUT || reason == CAPTURED_SELF || reason == CAPTURED_DNS;
}

/* Judged, and free to leave the pod. */
static __always_inline bool is_direct(enum reason reason)
{
	return (reason >= DIRECT_PROXY && reason <= PASSED_BEFORE && reason != LEFT_TO_KERNEL) ||
	       (reason >= DIRECT_INTERFACE && reason <= DIRECT_NOT_READY);
}

#endif
