/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Writing the address book: targets.h reads it. */
#ifndef SLUICE_BOOK_H
#define SLUICE_BOOK_H

#include "config.h"
#include "targets.h"

/* The address that stands for a destination. Two first connects at once may get
 * one each: both are right.
 */
static __always_inline __be32 book(__u64 cookie, const struct addr *dst, __u16 dport)
{
	struct target_index_key key = {
		.cookie = cookie,
		.target = { .dst = *dst, .port = dport },
	};
	struct target_key mine = { .cookie = cookie };
	__u32 *index = bpf_map_lookup_elem(&target_index, &key), *used;

	if (index)
		return bpf_htonl(TARGETS4 | *index);
	used = bpf_map_lookup_elem(&target_use, &cookie);
	if (!used || *used >= target_share)
		return 0;
	mine.index = __sync_fetch_and_add(used, 1) + 1;
	if (mine.index >= SPREAD4_MASK) /* 127.255.255.255 is a broadcast address */
		return 0;
	if (bpf_map_update_elem(&targets, &mine, &key.target, BPF_NOEXIST))
		return 0;
	bpf_map_update_elem(&target_index, &key, &mine.index, BPF_NOEXIST);
	return bpf_htonl(TARGETS4 | mine.index);
}

#endif
