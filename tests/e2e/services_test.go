package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// service makes a ClusterIP service, port 80, for the pods of one name, and returns
// its address.
func (s *space) service(app string, port int32, families ...corev1.IPFamily) string {
	s.t.Helper()
	service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: app}, Spec: corev1.ServiceSpec{
		Selector: map[string]string{"app": app}, IPFamilies: families,
		Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(port)}},
	}}
	service, err := cluster.client.CoreV1().Services(s.name).Create(s.t.Context(), service, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	if address := service.Spec.ClusterIP; strings.Contains(address, ":") {
		return "[" + address + "]"
	}
	return service.Spec.ClusterIP
}

func TestTheProxySeesAServicesAddress(t *testing.T) {
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"), plain("outside"), meshed("client"), meshed("inner"))
	server, inner := s.service("server", 8080), s.service("inner", 8080)
	s.goesStraight("outside", "http://"+server)
	s.sees("client", "http://"+server, s.out("client", server+":80"))
	client, to := s.get("client").Status.PodIP, s.get("inner").Status.PodIP
	s.sees("client", "http://"+inner, s.out("client", inner+":80"), "in inner "+client+" "+to+":8080")
}

func TestAHostPortReachesThePodThroughItsProxy(t *testing.T) {
	needSluice(t)
	s := newSpace(t, "pod-security.kubernetes.io/enforce", "privileged")
	port := func(host int32) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Spec.Containers[0].Ports = []corev1.ContainerPort{{ContainerPort: 8080, HostPort: host}}
		}
	}
	bare := plain("bare")
	port(18081)(bare)
	s.run(bare, meshed("inner", port(18080)), plain("outside"))
	node := s.get("inner").Status.HostIP
	s.goesStraight("outside", "http://"+net.JoinHostPort(node, "18081"))
	s.goesThrough("outside", "http://"+net.JoinHostPort(node, "18080"), "in inner")
}

// TestTheHostsOwnRulesStillStopProxiedTraffic: what a primary CNI drops on the host's
// side, as for a NetworkPolicy, is dropped though a proxy called.
func TestTheHostsOwnRulesStillStopProxiedTraffic(t *testing.T) {
	needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(meshed("client"), plain("outside"))
	l, err := net.Listen("tcp4", net.JoinHostPort(s.get("client").Status.HostIP, "0"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"path": ["%s"]}`, strings.Join(r.Header.Values("X-Path"), `", "`))
	})}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	to := "http://" + l.Addr().String()
	s.goesThrough("client", to, "out client")
	rule := []string{"INPUT", "-s", s.get("client").Status.PodIP, "-p", "tcp", "--dport", fmt.Sprint(l.Addr().(*net.TCPAddr).Port), "-j", "REJECT"}
	iptables(t, append([]string{"-I"}, rule...)...)
	defer iptables(t, append([]string{"-D"}, rule...)...)
	eventually(t, "the client's requests are stopped behind its proxy", func() error {
		if got := s.fetch("client", to); !strings.Contains(got.Error, "503") {
			return errors.New(got.path()) // HAProxy answers for a server that it cannot reach
		}
		return nil
	})
	if got := s.fetch("outside", to); got.Error != "" {
		t.Error("another pod's request is stopped too:", got.Error)
	}
}

// iptables changes the rules of the namespace that the tests run in.
func iptables(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("iptables", append([]string{"-w"}, args...)...).CombinedOutput(); err != nil {
		t.Fatalf("iptables %v: %v: %s", args, err, out)
	}
}
