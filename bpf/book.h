/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Writing the address book: targets.h reads it. */
#ifndef SLUICE_BOOK_H
#define SLUICE_BOOK_H

#include "config.h"
#include "targets.h"

/* The index that stands for a destination, made if there is none; 0: the pod's
 * share is used up. Two first calls at once may get one each: both are right.
 */
static __always_inline __u32 book_index(__u64 cookie, const struct addr *dst, __u16 dport)
{
	struct target_index_key key = {
		.cookie = cookie,
		.target = { .dst = *dst, .port = dport },
	};
	struct target_key mine = { .cookie = cookie };
	__u32 *index = bpf_map_lookup_elem(&target_index, &key), *used;

	if (index)
		return *index;
	used = bpf_map_lookup_elem(&target_use, &cookie);
	if (!used || *used >= target_share)
		return 0;
	mine.index = __sync_fetch_and_add(used, 1) + 1;
	if (mine.index >= SPREAD4_MASK) /* 127.255.255.255 is a broadcast address */
		return 0;
	if (bpf_map_update_elem(&targets, &mine, &key.target, BPF_NOEXIST))
		return 0;
	bpf_map_update_elem(&target_index, &key, &mine.index, BPF_NOEXIST);
	return mine.index;
}

/* The index that stands for a destination; 0: none. */
static __always_inline __u32 booked(__u64 cookie, const struct addr *dst, __u16 dport)
{
	struct target_index_key key = {
		.cookie = cookie,
		.target = { .dst = *dst, .port = dport },
	};
	__u32 *index = bpf_map_lookup_elem(&target_index, &key);

	return index ? *index : 0;
}

/* The IPv4 address that stands for a destination; 0: as above. */
static __always_inline __be32 book(__u64 cookie, const struct addr *dst, __u16 dport)
{
	__u32 index = book_index(cookie, dst, dport);

	return index ? bpf_htonl(TARGETS4 | index) : 0;
}

#endif
