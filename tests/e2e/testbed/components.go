package testbed

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// PauseImage is what the runtime makes sandboxes of.

// The cluster's networks.
const (
	apiURL = "https://" + nodeIP4 + ":6443"

	serviceIP4     = "10.96.0.1" // of service kubernetes
	serviceRanges  = "10.96.0.0/16,fd96::/112"
	podRange4      = "10.244.0.0/24"
	podRange6      = "fd44::/112"
	podRanges      = podRange4 + "," + podRange6
	containerdSock = "/run/containerd/containerd.sock"
	PauseImage     = "sluice.e2e/pause:1"
)

// The cluster's programs, by the names of their processes.
const (
	Etcd              = "etcd"
	Containerd        = "containerd"
	APIServer         = "kube-apiserver"
	ControllerManager = "kube-controller-manager"
	Scheduler         = "kube-scheduler"
	Kubelet           = "kubelet"
	KubeProxy         = "kube-proxy"
)

// commands are the programs' command lines.
func (c *Cluster) commands() map[string][]string {
	pki := func(file string) string { return filepath.Join(c.pki, file) }
	kube := func(name string, args ...string) []string { return append([]string{c.kubernetes, name}, args...) }
	return map[string][]string{
		Etcd: {"etcd", "--data-dir=/var/lib/etcd/data", "--unsafe-no-fsync", "--log-level=warn",
			"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380"},
		Containerd: {"containerd", "--config=" + c.path("containerd.toml")},
		APIServer: kube(APIServer, "--bind-address="+nodeIP4, "--advertise-address="+nodeIP4, "--secure-port=6443",
			"--etcd-servers=http://127.0.0.1:2379", "--service-cluster-ip-range="+serviceRanges,
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
			"--client-ca-file="+pki("ca.crt"), "--tls-cert-file="+pki("apiserver.crt"), "--tls-private-key-file="+pki("apiserver.key"),
			"--kubelet-client-certificate="+pki("apiserver-kubelet-client.crt"), "--kubelet-client-key="+pki("apiserver-kubelet-client.key"),
			"--kubelet-certificate-authority="+pki("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file="+pki("sa.pub"), "--service-account-signing-key-file="+pki("sa.key"),
			"--requestheader-client-ca-file="+pki("front-proxy-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
			"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group", "--requestheader-username-headers=X-Remote-User",
			"--proxy-client-cert-file="+pki("front-proxy-client.crt"), "--proxy-client-key-file="+pki("front-proxy-client.key")),
		ControllerManager: kube(ControllerManager, "--kubeconfig="+pki("kube-controller-manager.kubeconfig"),
			"--bind-address=127.0.0.1", "--leader-elect=false", "--use-service-account-credentials",
			"--service-account-private-key-file="+pki("sa.key"), "--root-ca-file="+pki("ca.crt"),
			"--cluster-signing-cert-file="+pki("ca.crt"), "--cluster-signing-key-file="+pki("ca.key"),
			"--authentication-kubeconfig="+pki("kube-controller-manager.kubeconfig"), "--authorization-kubeconfig="+pki("kube-controller-manager.kubeconfig")),
		Scheduler: kube(Scheduler, "--kubeconfig="+pki("kube-scheduler.kubeconfig"), "--bind-address=127.0.0.1", "--leader-elect=false",
			"--authentication-kubeconfig="+pki("kube-scheduler.kubeconfig"), "--authorization-kubeconfig="+pki("kube-scheduler.kubeconfig")),
		Kubelet: kube(Kubelet, "--config="+c.path("kubelet.json"), "--kubeconfig="+pki("kubelet.kubeconfig"),
			"--hostname-override="+Node, "--node-ip="+nodeIP4+","+nodeIP6),
		KubeProxy: kube(KubeProxy, "--kubeconfig="+pki("kube-proxy.kubeconfig"), "--proxy-mode=iptables", "--hostname-override="+Node,
			"--cluster-cidr="+podRanges, "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0",
			"--metrics-bind-address=127.0.0.1:10249", "--healthz-bind-address=127.0.0.1:10256"),
	}
}

// containerdConfig: restrict_oom_score_adj, for without CAP_SYS_RESOURCE, as in many
// CI machines, the kubelet's negative scores make every sandbox fail.
const containerdConfig = `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "` + containerdSock + `"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + PauseImage + `"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
`

// kubeletConfig: the thresholds keep the kubelet from evicting pods or collecting
// images because the machine's disk is nearly full.
func (c *Cluster) kubeletConfig() map[string]any {
	none := map[string]string{}
	for _, signal := range []string{"memory.available", "nodefs.available", "nodefs.inodesFree", "imagefs.available", "imagefs.inodesFree"} {
		none[signal] = "0%"
	}
	return map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"address": nodeIP4, "port": 10250, "readOnlyPort": 0, "healthzBindAddress": "127.0.0.1",
		"tlsCertFile": filepath.Join(c.pki, "kubelet-serving.crt"), "tlsPrivateKeyFile": filepath.Join(c.pki, "kubelet-serving.key"),
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": false}, "webhook": map[string]any{"enabled": true},
			"x509": map[string]any{"clientCAFile": filepath.Join(c.pki, "ca.crt")},
		},
		"authorization":            map[string]any{"mode": "Webhook"},
		"containerRuntimeEndpoint": "unix://" + containerdSock,
		"cgroupDriver":             "cgroupfs", "cgroupRoot": "/" + filepath.Base(c.dir),
		"failSwapOn": false, "resolvConf": "", "maxPods": 200,
		"evictionHard": none, "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
		"shutdownGracePeriod": "0s", "syncFrequency": "10s",
	}
}

// Conflist is where the cluster's CNI configuration is, and ConflistText what it
// says before anybody else writes to it.
const Conflist = "/etc/cni/net.d/10-bridge.conflist"

// ConflistText returns the primary CNI's own configuration, with pods' addresses of
// the given ranges.
func ConflistText(ranges ...string) string {
	var list, routes []string
	for _, r := range ranges {
		list = append(list, fmt.Sprintf(`[{ "subnet": %q }]`, r))
		if strings.Contains(r, ":") {
			routes = append(routes, `{ "dst": "::/0" }`)
		} else {
			routes = append(routes, `{ "dst": "0.0.0.0/0" }`)
		}
	}
	return fmt.Sprintf(`{ "cniVersion": "1.0.0", "name": "podnet", "plugins": [
  { "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
    "ipam": { "type": "host-local", "dataDir": "/var/lib/cni/networks", "ranges": [%s], "routes": [%s] } },
  { "type": "portmap", "capabilities": { "portMappings": true } }
] }
`, strings.Join(list, ", "), strings.Join(routes, ", "))
}

// PodRanges are the ranges of pods' addresses, IPv4 and IPv6.
func PodRanges() []string { return strings.Split(podRanges, ",") }

func (c *Cluster) writeConfigs() error {
	kubelet, err := json.MarshalIndent(c.kubeletConfig(), "", "  ")
	if err != nil {
		return err
	}
	for path, text := range map[string]string{
		c.path("containerd.toml"): containerdConfig,
		c.path("kubelet.json"):    string(kubelet),
		Conflist:                  ConflistText(PodRanges()...),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
