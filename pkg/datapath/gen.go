package datapath

// The objects are committed, so that building needs no clang. `make generate`
// rebuilds them with the pinned one and `make generate-check` shows the difference.

//go:generate -command object go tool bpf2go -tags linux -target bpfel -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu -I../../bpf"
//go:generate object -type addr -type pod -type pod_name -type attachment_key -type attachment -type attachment_flags -type own_addr_key -type proxy_id_key -type port_rule_key -type cidr4_key -type cidr6_key -type interface_key -type interface_name -type reroute_key -type reroute -type forwarded_key -type route4_key -type route6_key -type listener_key -type rule_set -type tc_prog -type record -type binder -type target_key -type target -type target_index_key -type handshake_key -type stat_key -type pod_flags -type id_kind -type own_kind -type interface_kind -type route_kind -type listener_scope -type direction -type rule_verdict -type record_flags -type reason -type pod_fact -type pod_fact_key connect ../../bpf/connect.c
//go:generate object names ../../bpf/names.c
//go:generate object sockops ../../bpf/sockops.c
//go:generate object sockopt ../../bpf/sockopt.c
//go:generate object inbound ../../bpf/inbound.c
//go:generate object tc ../../bpf/tc.c
//go:generate object reroute ../../bpf/reroute.c
//go:generate object udp ../../bpf/udp.c
