// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The original destination travels from the client's socket to the proxy's
 * accepted socket through handshakes, and the proxy's listeners are noted.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "sluice.h"
#include "config.h"
#include "maps.h"
#include "addr.h"
#include "rules.h"
#include "stats.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define DEFAULT_OUT_PORT 15001
#define DEFAULT_IN_PORT 15006
#define EEXIST 17
#define EOPNOTSUPP 95
#define SOL_SOCKET 1
#define SO_MARK 36

static __always_inline void local_addr(struct bpf_sock_ops *ctx, struct addr *a)
{
	__be32 v4 = NOW(ctx->local_ip4);

	if (ctx->family == AF_INET)
		addr_set4(a, v4);
	else
		addr_set(a, ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2],
			 ctx->local_ip6[3]);
}

static __always_inline void remote_addr(struct bpf_sock_ops *ctx, struct addr *a)
{
	__be32 v4 = NOW(ctx->remote_ip4);

	if (ctx->family == AF_INET)
		addr_set4(a, v4);
	else
		addr_set(a, ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2],
			 ctx->remote_ip6[3]);
}

static __always_inline void client_key(struct bpf_sock_ops *ctx, struct handshake_key *key)
{
	key->cookie = bpf_get_netns_cookie(ctx);
	local_addr(ctx, &key->client);
	remote_addr(ctx, &key->server);
	key->client_port = ctx->local_port;
	key->server_port = bpf_ntohl(ctx->remote_port);
}

static __always_inline void server_key(struct bpf_sock_ops *ctx, struct handshake_key *key)
{
	key->cookie = bpf_get_netns_cookie(ctx);
	remote_addr(ctx, &key->client);
	local_addr(ctx, &key->server);
	key->client_port = bpf_ntohl(ctx->remote_port);
	key->server_port = ctx->local_port;
}

static __always_inline void remove_handshake(struct handshake_key *key)
{
	__u32 *used;

	if (bpf_map_delete_elem(&handshakes, key))
		return;
	used = bpf_map_lookup_elem(&handshake_use, &key->cookie);
	if (used)
		__sync_fetch_and_sub(used, 1);
}

/* Takes one of the pod's share first, so that it cannot be exceeded. */
static __always_inline bool add_handshake(struct handshake_key *key, struct record *rec)
{
	__u32 *used = bpf_map_lookup_elem(&handshake_use, &key->cookie);
	long err;

	if (!used)
		return false;
	if (__sync_fetch_and_add(used, 1) >= handshake_share) {
		__sync_fetch_and_sub(used, 1);
		return false;
	}
	err = bpf_map_update_elem(&handshakes, key, rec, BPF_NOEXIST);
	if (!err)
		return true;
	__sync_fetch_and_sub(used, 1);
	if (err != -EEXIST)
		return false;
	/* Left by a socket with the same addresses that is no more. */
	return !bpf_map_update_elem(&handshakes, key, rec, BPF_EXIST);
}

/* The source port is known and the SYN is not out. Also for a direct call to a
 * capture port on loopback: sk_lookup refuses a SYN there that has no entry.
 */
static __always_inline void on_client_syn(struct bpf_sock_ops *ctx)
{
	struct handshake_key key = {};
	struct bpf_sock *sk = ctx->sk;
	struct record *rec;
	struct pod *pod;

	if (!sk)
		return;
	rec = bpf_sk_storage_get(&orig_dst, sk, 0, 0);
	if (!rec)
		return; /* not a pod of ours */
	client_key(ctx, &key);
	if (!is_captured(rec->reason)) {
		if (!addr_is_loopback(&key.server))
			return;
		pod = bpf_map_lookup_elem(&pods, &key.cookie);
		if (!pod || !is_capture_port(pod, key.server_port))
			return;
	}
	if (!add_handshake(&key, rec)) {
		if (bpf_map_lookup_elem(&pods, &key.cookie)) /* not un-enrolled just now */
			count(key.cookie, REFUSED_TABLE_FULL);
		return; /* sk_lookup refuses the SYN */
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* Only sockets with an announced SYN have this callback on. A handshake that
 * never reached the proxy's accept ends here.
 */
static __always_inline void on_client_state(struct bpf_sock_ops *ctx)
{
	struct handshake_key key = {};

	if (ctx->args[1] == BPF_TCP_ESTABLISHED)
		return; /* here, and not yet at the proxy */
	client_key(ctx, &key);
	if (ctx->args[1] == BPF_TCP_CLOSE)
		remove_handshake(&key);
	else if (!bpf_map_lookup_elem(&handshakes, &key)) /* accepted: nothing to do any more */
		bpf_sock_ops_cb_flags_set(ctx,
					  ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void on_proxy_accept(struct bpf_sock_ops *ctx)
{
	struct handshake_key key = {};
	struct bpf_sock *sk = ctx->sk;
	struct record *waiting, *rec;
	struct mptcp_sock *msk;
	struct pod *pod;

	if (!sk)
		return;
	key.cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &key.cookie);
	if (!pod || !may_be_captured(pod, ctx->local_port))
		return;
	server_key(ctx, &key);
	if (addr_is4(&key.server) && target_index_of(addr_word(&key.server, 3)))
		return; /* the address says it all */
	waiting = bpf_map_lookup_elem(&handshakes, &key);
	if (!waiting)
		return;
	rec = bpf_sk_storage_get(&orig_dst, sk, waiting, BPF_SK_STORAGE_GET_F_CREATE);
	if (rec) {
		rec->flags = (rec->flags & RECORD_PRESENT_SRC) | RECORD_ACCEPTED;
		if (have_mptcp_sock) {
			msk = bpf_skc_to_mptcp_sock(sk);
			/* a later subflow finds the record of the first */
			if (msk)
				bpf_sk_storage_get(&orig_dst, msk, rec,
						   BPF_SK_STORAGE_GET_F_CREATE);
		}
	}
	remove_handshake(&key);
}

/* The proxy listens, and not on loopback alone as istio-validation does: from now
 * on outbound is captured. Whether a map can hold the listener, or the connection
 * is of its family, does not matter: what it does not take is refused.
 */
static __always_inline void on_ready(__u64 cookie)
{
	struct pod_fact_key key = { .cookie = cookie, .fact = FACT_WAITING };

	bpf_map_delete_elem(&pod_facts, &key);
}

static __always_inline void set_assignable(const struct listener_key *listener,
					   const struct pod *pod, bool yes)
{
	struct pod_fact_key key = {
		.cookie = listener->cookie,
		.fact = assignable(pod, listener->port),
	};
	__u32 nothing = 0;

	if (yes)
		bpf_map_update_elem(&pod_facts, &key, &nothing, BPF_ANY);
	else
		bpf_map_delete_elem(&pod_facts, &key);
}

/* Istio's rules, where they are still there beside us, mark what a client sends with
 * SLUICE_TPROXY_MARK. A socket that is accepted takes that mark (tcp_fwmark_accept), and
 * its answers would be led to lo, but for a mark of the listener's own, which it takes
 * instead.
 */
static __always_inline void give_mark(struct bpf_sock_ops *ctx, const struct bpf_sock *sk)
{
	int mark = SLUICE_LISTENER_MARK;

	if (!sk->mark)
		bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
}

/* Only the proxy's listeners, or anyone in the pod could take its traffic or
 * stop it: bound by the proxy's UID or GID, on a wildcard or an address of the
 * pod.
 */
static __always_inline void on_listen(struct bpf_sock_ops *ctx)
{
	struct listener_key key = {};
	struct bpf_sock *sk = ctx->sk;
	struct addr local;
	struct pod *pod;
	long err;
	int i;

	if (!sk)
		return;
	key.cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &key.cookie);
	if (!pod || !is_capture_port(pod, ctx->local_port))
		return;
	if (!proxys_own(sk, pod))
		return; /* a stranger's */
	key.port = ctx->local_port;
	if (pod->flags & POD_TPROXY && key.port == pod->in_port)
		give_mark(ctx, sk);
	key.family = ctx->family;
	local_addr(ctx, &local);
	if (addr_is_loopback(&local))
		key.scope = LISTENS_ON_LOOPBACK;
	else if (key.port == pod->out_port)
		on_ready(key.cookie);
	if (key.scope == LISTENS_TO_ALL && !addr_is_any(&local) &&
	    !own_addr(&own_addrs, key.cookie, &local))
		return; /* an address that the pod has not */
	for (i = 0; i < SLUICE_LISTENER_SLOTS; i++) {
		key.slot = i;
		err = bpf_sock_hash_update(ctx, &listeners, &key, BPF_NOEXIST);
		if (!err) {
			if (key.family == AF_INET) /* an AF_INET6 one may be V6ONLY */
				set_assignable(&key, pod, true);
			return;
		}
		if (err == -EOPNOTSUPP) {
			set_assignable(&key, pod, false);
			count(key.cookie, LISTENER_NOT_MAPPABLE);
			return;
		}
		if (err != -EEXIST)
			break;
	}
	count(key.cookie, LISTENER_SLOTS_FULL);
}

SEC("sockops")
int sock_ops(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		on_client_syn(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		on_proxy_accept(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		on_client_state(ctx);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		on_listen(ctx);
		break;
	}
	return 1;
}

/* Sockops cannot ask who calls listen(): bind(), in the same process, can. In a
 * namespace that is not enrolled (yet) the usual ports are noted.
 */
static __always_inline int on_bound(struct bpf_sock *ctx, __be32 v4)
{
	__u64 cookie = bpf_get_netns_cookie(ctx), id;
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	__u32 port = ctx->src_port;
	struct binder *binder;

	if (pod && pod->flags & POD_DNS && port == pod->dns_port && target_index_of(v4) &&
	    ctx->protocol == IPPROTO_UDP)
		return 0; /* what it sends would pass for the DNS proxy's answers */
	if (pod ? !is_capture_port(pod, port) : port != DEFAULT_OUT_PORT && port != DEFAULT_IN_PORT)
		return 1;
	binder = bpf_sk_storage_get(&binders, ctx, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!binder)
		return 1;
	id = bpf_get_current_uid_gid();
	binder->uid = id;
	binder->gid = id >> 32;
	return 1;
}

SEC("cgroup/post_bind4")
int post_bind4(struct bpf_sock *ctx)
{
	return on_bound(ctx, NOW(ctx->src_ip4));
}

SEC("cgroup/post_bind6")
int post_bind6(struct bpf_sock *ctx)
{
	bool is4 = !ctx->src_ip6[0] && !ctx->src_ip6[1] && ctx->src_ip6[2] == bpf_htonl(0xffff);

	return on_bound(ctx, is4 ? ctx->src_ip6[3] : 0);
}
