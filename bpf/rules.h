/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The order of decisions. One function for IPv4 and IPv6 in each direction.
 * The names O1..O14 and I1..I3 are those of docs/rules.md.
 */
#ifndef SLUICE_RULES_H
#define SLUICE_RULES_H

#include <linux/in.h>
#include "addr.h"
#include "maps.h"

#define PORT_HBONE 15008 /* the mesh's own tunnel: never captured */

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

/* An exemption: the UID's if it has one, else the GID's. */
static __always_inline enum id_verdict proxy_verdict(__u32 rules_id, __u32 uid, __u32 gid)
{
	struct proxy_id_key key = { .rules_id = rules_id, .kind = ID_UID, .id = uid };
	enum id_verdict *verdict = bpf_map_lookup_elem(&proxy_ids, &key);

	if (verdict)
		return *verdict;
	key.kind = ID_GID;
	key.id = gid;
	verdict = bpf_map_lookup_elem(&proxy_ids, &key);
	return verdict ? *verdict : 0;
}

/* Was this socket bound to its port by the proxy? (sk may be any kind of socket
 * pointer, which a function could not take.)
 */
#define BOUND_BY_PROXY(sk, pod)                                               \
	({                                                                    \
		struct binder *b_ = bpf_sk_storage_get(&binders, (sk), 0, 0); \
		b_ &&proxy_verdict((pod)->rules_id, b_->uid, b_->gid);        \
	})

static __always_inline bool cidr_captures(const struct pod *pod, const struct addr *dst)
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
	if (verdict)
		return *verdict == RULE_CAPTURE;
	return pod->flags & POD_OUT_DEFAULT_CAPTURE;
}

/* Is this the pod's proxy's? The ports that handshakes belong to. */
static __always_inline bool is_capture_port(const struct pod *pod, __u16 port)
{
	return port == pod->out_port || port == pod->in_port;
}

/* Outbound: what becomes of a connect() to dst:port from src (zero: not bound). */
static __always_inline enum reason decide_out(__u64 cookie, const struct pod *pod,
					      const struct addr *src, const struct addr *dst,
					      __u16 port)
{
	bool lo = addr_is_lo_address(dst);
	enum own_kind own = own_kind(&own_addrs, cookie, dst);
	bool local = addr_is_loopback(dst) || own == OWN_ADDR;
	enum id_verdict proxy;
	__u64 id;

	if (!addr_is_unicast(dst) || own == OWN_BROADCAST)
		return LEFT_TO_KERNEL;
	if (!local && addr_is_any(addr_is4(dst) ? &pod->addr4 : &pod->addr6) &&
	    !addr_is_link_local6(dst))
		return LEFT_TO_KERNEL; /* no address of this family: ENETUNREACH, as ever */
	if (pod->flags & POD_OUT_HAS_PORTS &&
	    port_rule(pod->rules_id, DIR_OUT, port) == RULE_DIRECT)
		return DIRECT_PORT_OUT; /* O1 */
	id = bpf_get_current_uid_gid();
	proxy = proxy_verdict(pod->rules_id, (__u32)id, id >> 32);
	if (local && is_capture_port(pod, port) && (proxy || addr_is_proxy_source(src)))
		return REFUSED_LOOP; /* it would be handed its own connection, for ever */
	if (local && addr_is_proxy_source(src))
		return DIRECT_PROXY_SOURCE; /* O2 */
	if (proxy == ID_EXEMPT_SELF && local && !lo && port != PORT_HBONE)
		return CAPTURED_SELF; /* O3, O6 */
	if (local && !(pod->flags & POD_LOCAL_CAPTURABLE))
		return lo ? DIRECT_LOOPBACK : DIRECT_LOCAL; /* O4, O7 */
	if (proxy)
		return DIRECT_PROXY; /* O5, O8 */
	if (lo)
		return DIRECT_LOOPBACK; /* O11 */
	return cidr_captures(pod, dst) ? CAPTURED_OUT : DIRECT_CIDR; /* O12, O14 */
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

static __always_inline bool is_captured(enum reason reason)
{
	return reason == CAPTURED_OUT || reason == CAPTURED_SELF;
}

#endif
