package datapath

// The objects are committed, so that building needs no clang. `make generate`
// rebuilds them with the pinned one and `make generate-check` shows the difference.

//go:generate go tool bpf2go -tags linux -target bpfel -cc clang-19 -strip llvm-strip-19 -type addr -type pod -type pod_name -type own_addr_key -type proxy_id_key -type port_rule_key -type cidr4_key -type cidr6_key -type listener_key -type rule_set -type tc_prog -type record -type binder -type target_key -type target -type target_index_key -type handshake_key -type stat_key -type pod_flags -type id_kind -type own_kind -type listener_scope -type id_verdict -type direction -type rule_verdict -type record_flags -type reason connect ../../bpf/connect.c -- -O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu -I../../bpf
//go:generate go tool bpf2go -tags linux -target bpfel -cc clang-19 -strip llvm-strip-19 names ../../bpf/names.c -- -O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu -I../../bpf
//go:generate go tool bpf2go -tags linux -target bpfel -cc clang-19 -strip llvm-strip-19 sockops ../../bpf/sockops.c -- -O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu -I../../bpf
//go:generate go tool bpf2go -tags linux -target bpfel -cc clang-19 -strip llvm-strip-19 sockopt ../../bpf/sockopt.c -- -O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu -I../../bpf
//go:generate go tool bpf2go -tags linux -target bpfel -cc clang-19 -strip llvm-strip-19 inbound ../../bpf/inbound.c -- -O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu -I../../bpf
//go:generate go tool bpf2go -tags linux -target bpfel -cc clang-19 -strip llvm-strip-19 tc ../../bpf/tc.c -- -O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu -I../../bpf
