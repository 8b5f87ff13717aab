/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The address book: IPv4 destinations and the loopback addresses that stand for
 * them in a pod.
 */
#ifndef SLUICE_TARGETS_H
#define SLUICE_TARGETS_H

#include "addr.h"
#include "maps.h"
#include "rules.h"

/* The destination that a loopback address stands for, if it does. */
static __always_inline struct target *target_at(__u64 cookie, __be32 v4)
{
	struct target_key key = { .cookie = cookie, .index = target_index_of(v4) };

	return key.index ? bpf_map_lookup_elem(&targets, &key) : 0;
}

/* The same, where address and port are one end of a connection to the proxy. */
static __always_inline struct target *target_of_end(const struct pod *pod, __u64 cookie, __be32 v4,
						    __u16 port)
{
	return is_capture_port(pod, port) ? target_at(cookie, v4) : 0;
}

/* The same for either family. */
static __always_inline struct target *target_of_addr(const struct pod *pod, __u64 cookie,
						     const struct addr *a, __u16 port)
{
	struct target_key key = { .cookie = cookie, .index = target_index_of_addr(a) };

	if (!key.index || !is_capture_port(pod, port))
		return 0;
	return bpf_map_lookup_elem(&targets, &key);
}

/* What the source of a captured connection would be without us: the pod's
 * address; towards oneself, the address dialled. 0: what it is.
 */
static __always_inline const struct addr *target_source(const struct pod *pod, __u64 cookie,
							const struct target *t)
{
	if (addr_is_loopback(&t->dst))
		return 0;
	if (is_own(pod, cookie, &t->dst))
		return &t->dst;
	return addr_is_any(&pod->addr4) ? 0 : &pod->addr4;
}

#endif
