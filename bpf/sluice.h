/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the programs and user space share: the shape of every map's key and
 * value, and the reasons for every decision. Addresses are 16 bytes in network
 * order, IPv4 as ::ffff:a.b.c.d, so that a family 2 client and a family 10
 * listener name one connection the same way. Ports are in host order.
 */
#ifndef SLUICE_H
#define SLUICE_H

#include <linux/bpf.h>

#define SLUICE_MAX_PODS 1024
#define SLUICE_LISTENER_SLOTS 64
#define SLUICE_TPROXY_MARK 1337 /* of the proxy's calls for a client, and of their answers */
#define SLUICE_LISTENER_MARK 1339 /* of its inbound listeners in that mode: no route asks for it */

struct addr {
	__u8 b[16];
};

/* Why a connection was captured, passed or stopped. Counters, records and
 * reports share this list; append only, the numbers are part of the pins.
 */
enum reason {
	REASON_NONE,
	/* captured */
	CAPTURED_OUT, /* outbound, to the proxy's outbound port */
	CAPTURED_SELF, /* the proxy called its own pod: to the inbound port */
	CAPTURED_IN, /* inbound, to the proxy's inbound port */
	/* passed */
	DIRECT_PROXY, /* the proxy's own traffic */
	DIRECT_PORT_OUT, /* port in excludeOutboundPorts */
	DIRECT_CIDR, /* address excluded, or not included */
	DIRECT_LOCAL, /* an app calls its own pod */
	DIRECT_PROXY_SOURCE, /* the proxy calls the app from 127.0.0.6, ::6 or, by TPROXY, for a client */
	DIRECT_LOOPBACK, /* 127.0.0.1 or ::1 */
	DIRECT_PORT_IN, /* inbound port not captured */
	LEFT_TO_KERNEL, /* no address of that family, or not a unicast address */
	PASSED_BEFORE, /* its SYN was out before the pod was enrolled */
	/* refused */
	REFUSED_NO_MEMORY, /* no memory for the socket's record */
	REFUSED_TABLE_FULL, /* handshakes, or the pod's share of it, is full */
	REFUSED_NO_HANDSHAKE, /* a SYN for a capture port that no connect announced */
	REFUSED_NO_LISTENER, /* the proxy does not listen (or cannot be assigned) */
	REFUSED_NO_POD, /* program attached, pod unknown: fail closed */
	REFUSED_NO_RECORD, /* SO_ORIGINAL_DST asked for a connection nobody captured */
	/* stopped by the guard on its way out */
	GUARD_NO_VERDICT, /* a SYN that no connect hook has judged */
	GUARD_LOOPBACK, /* destination 127.0.0.0/8 on the wire */
	/* about the proxy's listeners */
	LISTENER_NOT_MAPPABLE, /* an MPTCP listener: needs the TC way */
	LISTENER_SLOTS_FULL, /* more than SLUICE_LISTENER_SLOTS listeners */
	REFUSED_LOOP, /* the proxy, or a call from its source, to its own ports */
	CAPTURED_DNS, /* port 53, to the DNS proxy */
	CAPTURED_REROUTED, /* came in through a rerouted interface, to the outbound port */
	DIRECT_INTERFACE, /* through an excluded interface */
	DIRECT_OWNER_GROUP, /* the caller's group is not one to capture */
	DIRECT_NOT_READY, /* the proxy has not listened yet, and the pod may go without */
	GUARD_OTHER_INTERFACE, /* direct for an excluded interface, and leaves by another */
	REFUSED_REROUTED, /* came in through a rerouted interface, and cannot be rerouted */
	REASON_MAX,
};

enum pod_flags {
	POD_OUT_DEFAULT_CAPTURE = 1 << 0, /* includeOutboundIPRanges is "*" */
	POD_OUT_HAS_CIDRS4 = 1 << 1, /* cidr_rules4 has entries for rules_id */
	POD_OUT_HAS_CIDRS6 = 1 << 2,
	POD_IN_DEFAULT_CAPTURE = 1 << 3, /* includeInboundPorts is "*" */
	POD_LOCAL_CAPTURABLE = 1 << 4, /* an include CIDR is itself loopback: no O4 */
	POD_INBOUND_TC = 1 << 5, /* the TC ingress program is attached as well */
	POD_GUARD = 1 << 6, /* the TC egress guard is attached */
	POD_TCX = 1 << 10, /* TC programs by TCX link, otherwise by clsact filter */
	POD_ADDED_SOURCE6 = 1 << 11, /* enrolment added ::6 to lo */
	POD_OUT_HAS_PORTS = 1 << 7, /* port_rules has outbound entries for rules_id */
	POD_DNS = 1 << 12, /* port 53 goes to dns_port */
	POD_HAS_OWNERS = 1 << 13, /* proxy_ids has owner groups for rules_id */
	POD_OWNERS_DIRECT = 1 << 14, /* verdict of a group that is not among them */
	POD_HAS_INTERFACES = 1 << 15, /* interfaces and routes have entries of the pod */
	POD_WHEN_READY = 1 << 16, /* capture outbound only once the proxy has listened */
	POD_TPROXY = 1 << 18, /* user space set up the way back for TPROXY mode */
	POD_REROUTES = 1 << 19, /* has rerouted interfaces */
	POD_HAS_LOCALS = 1 << 20, /* routes has local prefixes of the pod */
	POD_REROUTES6 = 1 << 21, /* the address book's IPv6 prefix is on lo */
};

/* pod_facts: what is found out of a pod while it runs, by sockops and by user
 * space. Each is an entry of its own that is there or not, so that no writer
 * undoes what another one has noted meanwhile; user space alone writes pods.
 */
enum pod_fact {
	/* The proxy has never listened on the outbound port. Made at the first
	 * enrolment, never again: without it a connection is captured.
	 */
	FACT_WAITING = 1,
	/* An IPv4 listener of the proxy's on that port is, or was, in listeners, so
	 * that sk_lookup can give it what is sent to any loopback address.
	 */
	FACT_OUT_ASSIGNABLE,
	FACT_IN_ASSIGNABLE,
};

struct pod_fact_key {
	__u64 cookie;
	enum pod_fact fact;
	__u32 pad;
};

/* pods: netns cookie -> pod */
struct pod {
	struct addr addr4; /* what a captured socket shows as its source; zero: no IPv4 */
	struct addr addr6; /* the same for IPv6 */
	__u32 rules_id;
	enum pod_flags flags;
	__u16 out_port; /* the proxy's outbound listener */
	__u16 in_port; /* the proxy's inbound listener */
	__u16 dns_port; /* the DNS proxy, with POD_DNS */
	__u16 way_back; /* what user space added to the namespace for POD_TPROXY */
	__be32 loopback_net; /* what counts as 127.0.0.1 */
	__be32 loopback_mask;
};

/* pod_names: netns cookie -> names, for people */
struct pod_name {
	char namespace[64];
	char name[256];
	char uid[40];
};

/* attachments: what the plugin attached -> the namespace it is about. The key is
 * made of hashes: of the network's name, and of container and interface.
 */
struct attachment_key {
	__u64 network;
	__u8 interface[24];
};

enum attachment_flags {
	ATTACHMENT_PROVISIONAL = 1 << 0, /* decided without the daemon, which is to judge again */
};

struct attachment {
	__u64 cookie;
	enum attachment_flags flags;
	char network[64]; /* the names for people, cut where they are longer */
	char container[72];
	char interface[20];
};

enum own_kind {
	OWN_ADDR = 1,
	OWN_BROADCAST = 2, /* of one of its subnets: TCP connects to none */
};

struct own_addr_key {
	__u64 cookie;
	struct addr addr;
};

enum id_kind {
	ID_UID,
	ID_GID,
	ID_OWNER, /* a GID again, as an owner group: its value is a rule_verdict */
};

/* What is said of a proxy's UID or GID. */
enum id_flags {
	ID_EXEMPT = 1 << 0, /* its traffic is direct */
	ID_SELF = 1 << 1, /* its calls to its own pod go to the inbound port */
	ID_SELF_DNS = 1 << 2, /* those to port 53 too, where DNS is captured */
};

struct proxy_id_key {
	__u32 rules_id;
	enum id_kind kind;
	__u32 id; /* as the initial user namespace sees it */
};

enum direction {
	DIR_OUT,
	DIR_IN,
};

enum rule_verdict {
	RULE_DIRECT = 1,
	RULE_CAPTURE = 2,
	RULE_VERDICT = 3, /* mask of the verdict */
	RULE_REROUTE = 4, /* beside the verdict of an address: an include range holds it */
};

struct port_rule_key {
	__u32 rules_id;
	enum direction direction;
	__u16 port;
	__u8 protocol; /* IPPROTO_TCP */
	__u8 pad;
};

/* interfaces: of pods that exclude or reroute some */
struct interface_key {
	__u64 cookie;
	__u32 ifindex;
	__u32 pad;
};

enum interface_kind {
	INTERFACE_EXCLUDED = 1,
	INTERFACE_REROUTED = 2,
	INTERFACE_CARRIER = 3, /* an excluded one stands upon it: a VLAN, a bridge */
	INTERFACE_OTHER = 4, /* of pods that reroute some: seen, and none of these */
};

/* interface_names: which interfaces a pod's rules name, there or not. The value
 * is an enum interface_kind.
 */
struct interface_name {
	__u64 cookie;
	char name[16];
};

/* reroutes: what user space knows of a rerouted interface, by name */
struct reroute_key {
	__u64 cookie;
	char name[16];
};

struct reroute {
	__u32 ifindex; /* 0: not seen yet */
	__u8 changed; /* the two below are what the sysctls were before us */
	__u8 route_localnet;
	__u8 arp_announce;
	__u8 pad;
};

/* forwarded: a connection of a machine behind the pod that we leave alone */
struct forwarded_key {
	__u64 cookie;
	struct addr machine;
	struct addr peer;
	__u16 machine_port;
	__u16 peer_port;
	__u32 pad;
};

/* routes: through which kind of interface a pod's destination is reached */
struct route4_key {
	__u32 prefixlen; /* 64 (cookie) + the prefix */
	__u32 cookie_low; /* in two halves, for the trie knows no padding */
	__u32 cookie_high;
	__u8 addr[4];
};

struct route6_key {
	__u32 prefixlen;
	__u32 cookie_low;
	__u32 cookie_high;
	__u8 addr[16];
};

enum route_kind {
	ROUTE_OTHER = 1,
	ROUTE_EXCLUDED = 2, /* out through an excluded interface */
	ROUTE_LOCAL = 3, /* over lo: all of the prefix is the pod's own */
};

struct cidr4_key {
	__u32 prefixlen; /* 32 (rules_id) + the prefix */
	__u32 rules_id;
	__u8 addr[4];
};

struct cidr6_key {
	__u32 prefixlen;
	__u32 rules_id;
	__u8 addr[16];
};

/* scratch: what a pod's stub tells the shared program that it calls */
struct scratch {
	__u64 cookie; /* of the namespace that the stub is attached to */
	__u32 tc_asks; /* the TC program asks who would get a packet: count nothing */
	__u32 l3_offset; /* TC: where the IP header is; 14 behind an Ethernet header */
};

/* The programs in pod_tc. */
enum tc_prog {
	TC_GUARD,
	TC_INBOUND,
	TC_REROUTE_IN,
	TC_REROUTE_OUT,
};

/* rule_sets: rules_id -> the rules' digest, by which equal ones are found */
struct rule_set {
	__u8 sha256[32];
};

/* Where a listener of the proxy's takes connections from: one that is bound to
 * loopback (istio-validation's) gets none from the network.
 */
enum listener_scope {
	LISTENS_TO_ALL,
	LISTENS_ON_LOOPBACK,
};

struct listener_key {
	__u64 cookie;
	__u16 port;
	__u8 family;
	__u8 slot;
	enum listener_scope scope;
};

enum record_flags {
	RECORD_ACCEPTED = 1 << 0, /* the proxy's end of a captured connection */
	RECORD_PRESENT_SRC = 1 << 1, /* show src in place of the loopback source */
	RECORD_BOUND = 1 << 2, /* UDP: connect bound the socket to src, not the app */
};

/* orig_dst (socket storage) and handshakes: what a connection was meant to be */
struct record {
	struct addr dst; /* original destination */
	struct addr src; /* the pod's address, if RECORD_PRESENT_SRC */
	__u16 dport;
	__u16 via; /* UDP: the port of the DNS proxy, to which it goes instead */
	enum reason reason;
	enum record_flags flags;
};

/* binders (socket storage): who bound a socket to a proxy's port */
struct binder {
	__u32 uid;
	__u32 gid;
};

struct handshake_key {
	__u64 cookie;
	struct addr client;
	struct addr server;
	__u16 client_port;
	__u16 server_port;
	__u32 pad;
};

/* targets: the loopback address 127.192.0.0 + index -> the destination it stands
 * for in this pod
 */
struct target_key {
	__u64 cookie;
	__u32 index;
	__u32 pad;
};

struct target {
	struct addr dst;
	__u16 port;
	__u16 pad;
};

/* target_index: destination -> index */
struct target_index_key {
	__u64 cookie;
	struct target target;
	__u32 pad;
};

struct stat_key {
	__u64 cookie;
	enum reason reason;
	__u32 pad;
};

_Static_assert(sizeof(struct pod) == 56, "pod");
_Static_assert(sizeof(struct attachment_key) == 32, "attachment_key");
_Static_assert(sizeof(struct attachment) == 168, "attachment");
_Static_assert(sizeof(struct pod_fact_key) == 16, "pod_fact_key");
_Static_assert(sizeof(struct own_addr_key) == 24, "own_addr_key");
_Static_assert(sizeof(struct proxy_id_key) == 12, "proxy_id_key");
_Static_assert(sizeof(struct port_rule_key) == 12, "port_rule_key");
_Static_assert(sizeof(struct interface_key) == 16, "interface_key");
_Static_assert(sizeof(struct reroute_key) == 24, "reroute_key");
_Static_assert(sizeof(struct reroute) == 8, "reroute");
_Static_assert(sizeof(struct forwarded_key) == 48, "forwarded_key");
_Static_assert(sizeof(struct interface_name) == 24, "interface_name");
_Static_assert(sizeof(struct route4_key) == 16, "route4_key");
_Static_assert(sizeof(struct route6_key) == 28, "route6_key");
_Static_assert(sizeof(struct cidr4_key) == 12, "cidr4_key");
_Static_assert(sizeof(struct cidr6_key) == 24, "cidr6_key");
_Static_assert(sizeof(struct listener_key) == 16, "listener_key");
_Static_assert(sizeof(struct record) == 44, "record");
_Static_assert(sizeof(struct handshake_key) == 48, "handshake_key");
_Static_assert(sizeof(struct target_key) == 16, "target_key");
_Static_assert(sizeof(struct target) == 20, "target");
_Static_assert(sizeof(struct target_index_key) == 32, "target_index_key");
_Static_assert(sizeof(struct stat_key) == 16, "stat_key");

#endif
