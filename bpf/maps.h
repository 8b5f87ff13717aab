/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Every map. Sizes are defaults that user space may raise before loading. */
#ifndef SLUICE_MAPS_H
#define SLUICE_MAPS_H

#include <bpf/bpf_helpers.h>
#include "sluice.h"

/* Enrolled pods. Key: netns cookie. Written by user space; read by every
 * program. Full: the pod is not enrolled and its start fails with a sentence.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod);
} pods SEC(".maps");

/* What is found out of the pods. Written by user space at enrolment and by
 * sockops as the proxy listens; read by connect and sk_lookup. Full: the pod is
 * not enrolled; sockops' facts cost a lookup per connect where they are missing.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 4);
	__type(key, struct pod_fact_key);
	__type(value, __u32); /* says nothing */
} pod_facts SEC(".maps");

/* Names of enrolled pods, for people. User space only. Full: as pods. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod_name);
} pod_names SEC(".maps");

/* What the plugin attached, so that DEL finds the namespace without its path and
 * without the daemon. User space only. Full: ADD fails.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 4);
	__type(key, struct attachment_key);
	__type(value, struct attachment);
} attachments SEC(".maps");

/* The addresses of a pod. Written by user space from the namespace itself;
 * read by the connect hooks and, on kernels without ingress_ifindex, by
 * sk_lookup. Full: enrolment fails.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 16);
	__type(key, struct own_addr_key);
	__type(value, enum own_kind);
} own_addrs SEC(".maps");

/* The proxy's identities (the UID 1337 exclusions) and the owner groups, by rule
 * set. Written by user space; read by connect and post_bind. Full: enrolment
 * fails.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 8);
	__type(key, struct proxy_id_key);
	__type(value, __u32); /* enum id_flags; of ID_OWNER enum rule_verdict */
} proxy_ids SEC(".maps");

/* Port rules by rule set. Written by user space;
 * read by connect and inbound. Full: enrolment fails.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 64);
	__type(key, struct port_rule_key);
	__type(value, enum rule_verdict);
} port_rules SEC(".maps");

/* Outbound address rules by rule set, one longest-prefix match each,
 * with "an exclude beats an include" already folded in.
 * Written by user space; read by connect. Full: enrolment fails.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 64);
	__type(key, struct cidr4_key);
	__type(value, enum rule_verdict);
} cidr_rules4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 64);
	__type(key, struct cidr6_key);
	__type(value, enum rule_verdict);
} cidr_rules6 SEC(".maps");

/* The interfaces that a pod's rules name, whether they are there or not: what
 * user space needs to keep interfaces and routes current. User space only. Full:
 * enrolment fails.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 4);
	__type(key, struct interface_name);
	__type(value, enum interface_kind);
} interface_names SEC(".maps");

/* The excluded and rerouted interfaces of the pods that have any, and those that
 * carry excluded ones. Written by user space, kept current from the namespace;
 * read by connect, sk_lookup and TC. Full: enrolment fails.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 4);
	__type(key, struct interface_key);
	__type(value, enum interface_kind);
} interfaces SEC(".maps");

/* The names of the interfaces that pods reroute, and what enrolment changed for
 * them. User space only. Full: enrolment fails.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 4);
	__type(key, struct reroute_key);
	__type(value, struct reroute);
} reroutes SEC(".maps");

/* Connections between a machine behind a pod and an address and port that the
 * address book holds as well, which do not go by the proxy: the far end opened
 * them, or the machine did before the pod was enrolled. Written by reroute_out
 * for each packet of the far end, read by reroute_in. An entry is a hint that
 * the next packet repeats, so the oldest may go; without one the machine's
 * packet goes to the proxy's port and is answered with a RST.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct forwarded_key);
	__type(value, __u8);
} forwarded SEC(".maps");

/* What the routing tables of pods that exclude interfaces say, for connect
 * programs may not ask the kernel's; of other pods just the local prefixes.
 * Routes that make no difference are left out. Written by user space, kept
 * current from the namespace; read by connect, sk_lookup and TC. Full: enrolment
 * fails, and a change of routes is not followed.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 64);
	__type(key, struct route4_key);
	__type(value, enum route_kind);
} routes4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 64);
	__type(key, struct route6_key);
	__type(value, enum route_kind);
} routes6 SEC(".maps");

/* The proxy's own listening sockets on its two ports. Written by sockops when
 * it listens and by user space for those opened before enrolment; read by
 * sk_lookup. The kernel removes closed sockets. Full: that listener is not
 * found, and inbound is refused and counted.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

/* What a socket was meant to reach, for as long as the socket lives. Written
 * by connect (client) and sockops (accepted socket); read by connect, the
 * name hooks, sockopt and the guard. No memory: the connection is refused.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct record);
} orig_dst SEC(".maps");

/* Who bound a socket to a proxy's port, for as long as the socket lives. Written
 * by post_bind, and by user space for sockets bound before Sluice was up; read
 * when it listens. No memory: the listener is a stranger's.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct binder);
} binders SEC(".maps");

/* Captured connections between their SYN and their acceptance, where targets
 * cannot be used: IPv6, a source that the app has bound, a full address book, a
 * proxy on 127.0.0.1 alone. Written and read by sockops, read by sk_lookup. Each pod has a bounded share. Full: the
 * SYN is refused and counted.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct handshake_key);
	__type(value, struct record);
} handshakes SEC(".maps");

/* How many entries of handshakes a pod holds. Created by user space at
 * enrolment; counted by sockops.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS);
	__type(key, __u64);
	__type(value, __u32);
} handshake_use SEC(".maps");

/* The address book of each pod: which loopback address stands for which IPv4
 * destination. An entry is made by the first captured connect to a destination
 * and stays until the pod is un-enrolled: a connection needs nothing else, so
 * none is stored for it and there is nothing to clean up after it. Written by
 * connect; read by connect (target_index), and by the name hooks, sockopt and
 * sk_lookup (targets). Each pod has a bounded share. Full: that connection goes
 * by handshakes instead.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct target_key);
	__type(value, struct target);
} targets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct target_index_key);
	__type(value, __u32);
} target_index SEC(".maps");

/* How many indexes a pod has used. Created by user space at enrolment; counted
 * by connect.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS);
	__type(key, __u64);
	__type(value, __u32);
} target_use SEC(".maps");

/* Connections by pod and reason. Written by every program; read by user
 * space. Full: a count is lost, no decision.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS * 32);
	__type(key, struct stat_key);
	__type(value, __u64);
} stats SEC(".maps");

/* Rule sets in use. Key: rules_id. User space only: equal rules share an id.
 * Full: enrolment fails.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLUICE_MAX_PODS);
	__type(key, __u32);
	__type(value, struct rule_set);
} rule_sets SEC(".maps");

/* sk_lookup and TC programs cannot ask for the netns cookie. Each pod has stubs,
 * a dozen instructions that hold its cookie, leave it here and call the shared
 * programs below: enrolling a pod verifies next to nothing, and one write
 * replaces a program for every pod. Packets are looked up in softirq, one at a
 * time on a CPU, so that nobody comes between writing and reading.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

/* The shared programs. Written by user space. Empty: inbound drops, TC passes. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} pod_inbound SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 4);
	__type(key, enum tc_prog);
	__type(value, __u32);
} pod_tc SEC(".maps");

static __always_inline struct scratch *this_cpu(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

#endif
