/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
#ifndef SLUICE_STATS_H
#define SLUICE_STATS_H

#include "maps.h"

/* Count one connection of a pod under a reason. */
static __always_inline void count(__u64 cookie, enum reason reason)
{
	struct stat_key key = { .cookie = cookie, .reason = reason };
	__u64 one = 1, *n;

	n = bpf_map_lookup_elem(&stats, &key);
	if (n)
		(*n)++; /* per CPU; connect hooks may lose a count to preemption, no more */
	else if (bpf_map_update_elem(&stats, &key, &one, BPF_NOEXIST)) {
		/* another CPU created it meanwhile: its slot for us is there now */
		n = bpf_map_lookup_elem(&stats, &key);
		if (n)
			(*n)++;
	}
}

#endif
