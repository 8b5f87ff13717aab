/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Knobs, set by user space before load; what they switch off is not verified,
 * so one object serves every kernel.
 */
#ifndef SLUICE_CONFIG_H
#define SLUICE_CONFIG_H

#include <stdbool.h>
#include <linux/types.h>

/* bpf_set_retval in cgroup programs (5.18): real errno values on refusal */
const volatile bool have_set_retval = false;
/* bpf_skc_to_mptcp_sock (5.19) in connect and sockops programs */
const volatile bool have_mptcp_sock = false;
/* bpf_sk_lookup.ingress_ifindex (5.17) */
const volatile bool have_ingress_ifindex = false;
/* destinations that one pod's address book may hold */
const volatile __u32 target_share = 16384;
/* entries of handshakes that one pod may hold */
const volatile __u32 handshake_share = 16384;

#endif
