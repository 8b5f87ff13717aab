// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* getsockopt(SO_ORIGINAL_DST), the one question that a proxy asks. */
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <bpf/bpf_helpers.h>
#include "sluice.h"
#include "config.h"
#include "maps.h"
#include "addr.h"
#include "rules.h"
#include "stats.h"
#include "targets.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define SOL_IP 0
#define SOL_IPV6 41
#define SO_ORIGINAL_DST 80 /* and IP6T_SO_ORIGINAL_DST */
#define ENOENT 2

/* The largest buffer that the kernel hands to a program. */
#define MAX_OPTLEN 4096

static __always_inline int answer4(struct bpf_sockopt *ctx, const struct addr *dst, __u16 port)
{
	struct sockaddr_in *out = ctx->optval;

	if ((void *)(out + 1) > ctx->optval_end)
		return 1; /* too short: the kernel has said EINVAL */
	__builtin_memset(out, 0, sizeof(*out));
	out->sin_family = AF_INET;
	out->sin_port = bpf_htons(port);
	out->sin_addr.s_addr = addr_word(dst, 3);
	ctx->optlen = sizeof(*out);
	barrier(); /* or LLVM merges the two stores and the verifier refuses */
	ctx->retval = 0;
	return 1;
}

static __always_inline int answer6(struct bpf_sockopt *ctx, const struct addr *dst, __u16 port)
{
	struct sockaddr_in6 *out = ctx->optval;

	if ((void *)(out + 1) > ctx->optval_end)
		return 1;
	__builtin_memset(out, 0, sizeof(*out));
	out->sin6_family = AF_INET6;
	out->sin6_port = bpf_htons(port);
	__builtin_memcpy(&out->sin6_addr, dst->b, 16);
	ctx->optlen = sizeof(*out);
	barrier();
	ctx->retval = 0;
	return 1;
}

static __always_inline int answer(struct bpf_sockopt *ctx, const struct addr *dst, __u16 port)
{
	bool v4 = addr_is4(dst);

	if (v4 && ctx->level == SOL_IP)
		return answer4(ctx, dst, port);
	if (!v4 && ctx->level == SOL_IPV6)
		return answer6(ctx, dst, port);
	return 1; /* the other family's question: the kernel's error stands */
}

/* An accepted connection to the proxy's outbound port that nobody captured: its
 * own local address is no answer, the proxy would dial itself for ever.
 */
static __always_inline int no_answer(struct bpf_sockopt *ctx, __u64 cookie)
{
	count(cookie, REFUSED_NO_RECORD);
	if (have_set_retval)
		bpf_set_retval(-ENOENT);
	else if (!ctx->retval)
		return 0; /* EPERM: an old kernel lets us say no more */
	return 1;
}

/* Did conntrack answer, and with another port than the proxy's own? Then
 * iptables rules redirected it, before Sluice came or beside it.
 */
static __always_inline bool kernel_answered(struct bpf_sockopt *ctx, __u16 own_port)
{
	struct sockaddr_in *out = ctx->optval; /* the port is at the same offset in both */

	if (ctx->retval || (void *)(out + 1) > ctx->optval_end)
		return false;
	return out->sin_port != bpf_htons(own_port);
}

SEC("cgroup/getsockopt")
int getsockopt(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct record *rec;
	struct addr local;
	struct target *t;
	struct pod *pod;
	__u64 cookie;

	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6))
		goto untouched;
	if (!sk || (sk->protocol != IPPROTO_TCP && sk->protocol != IPPROTO_MPTCP))
		goto untouched;
	if (sk->state == BPF_TCP_LISTEN || sk->state == BPF_TCP_CLOSE)
		goto untouched;
	cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod)
		goto untouched;
	rec = bpf_sk_storage_get(&orig_dst, sk, 0, 0);
	if (rec && (!(rec->flags & RECORD_ACCEPTED) || is_captured(rec->reason)))
		return rec->reason == PASSED_BEFORE ? 1 : answer(ctx, &rec->dst, rec->dport);
	t = target_of_end(pod, cookie, NOW(sk->src_ip4), sk->src_port);
	if (!t)
		t = target_of_end(pod, cookie, NOW(sk->dst_ip4), bpf_ntohs(sk->dst_port));
	addr_of_sock(&local, sk);
	if (!t && addr_is_target6(&local))
		t = target_of_addr(pod, cookie, &local, sk->src_port);
	if (t)
		return answer(ctx, &t->dst, t->port);
	if (kernel_answered(ctx, sk->src_port))
		goto untouched;
	if (sk->src_port == pod->out_port ||
	    (addr_is4(&local) && addr_v4(&local) >= SPREAD4 && addr_is_loopback(&local)))
		return no_answer(ctx, cookie);
	if (!ctx->retval)
		goto untouched; /* conntrack answers with the local address too */
	/* Inbound by sk_lookup: nothing was rewritten, the local address is it. */
	return answer(ctx, &local, sk->src_port);

untouched:
	if (ctx->optlen > MAX_OPTLEN)
		ctx->optlen = 0; /* do not truncate what the program cannot see */
	return 1;
}
