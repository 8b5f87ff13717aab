package agent

import (
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/install"
	"github.com/sluice-mesh/sluice/pkg/version"
)

// metrics are the daemon's. What the maps count is read when somebody asks.
type metrics struct {
	addSeconds      *prometheus.HistogramVec
	undone          prometheus.Counter
	swept           prometheus.Counter
	changes         prometheus.Counter
	reconcileErrors prometheus.Counter
	judged          *prometheus.CounterVec
	repairs         *prometheus.CounterVec
	api             prometheus.Gauge

	mu          sync.Mutex
	node        node // nil before the datapath is up
	connections counts
	installer   interface{ Status() install.Status } // nil: nothing is installed
}

const namespace = "sluice"

var (
	descConnections = desc("connections_total", "What became of connections, by direction and reason; some reasons count SYNs, packets or calls, as docs/rules.md says. What was counted for a pod since the last look is lost when the pod ends.", "direction", "reason")
	descPods        = desc("pods", "Pods that are enrolled.")
	descProvisional = desc("provisional_attachments", "Interfaces of pods that were enrolled in doubt and are to be judged again.")
	descEntries     = desc("map_entries", "Entries of a BPF map.", "map")
	descMax         = desc("map_max_entries", "How many entries a BPF map can hold.", "map")
	descFeature     = desc("kernel_feature", "Whether the kernel has an optional feature.", "feature")
	descInstalled   = desc("cni_installed", "Whether the plugin and its entry are in place, and likely to stay.")
	descOverwritten = desc("cni_overwritten_total", "How often somebody else took the plugin or its entry away.")
	descBuild       = desc("build_info", "Always 1; the label is the daemon's version.", "version")
	descUp          = desc("datapath_up", "Whether the datapath is loaded, attached and proven.")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(namespace, "", name), help, labels, nil)
}

func counter(name, help string) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help})
}

func counterVec(name, help, label string, values ...string) *prometheus.CounterVec {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, []string{label})
	for _, value := range values {
		v.WithLabelValues(value) // there from the start, so that a rate can be taken
	}
	return v
}

func newMetrics() *metrics {
	m := &metrics{
		addSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: namespace, Name: "add_duration_seconds", Help: "How long the daemon takes to tell the plugin what a pod is.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .05, .1, .5, 1, 2},
		}, []string{"decision"}),
		undone:          counter("add_undone_total", "Pods that the plugin could not enroll after the daemon had told it to."),
		swept:           counter("pods_swept_total", "Pods that were un-enrolled because their network namespace was gone."),
		changes:         counter("rule_changes_total", "Changes of a running pod's rules."),
		reconcileErrors: counter("reconcile_errors_total", "Pods and tasks that were not as they should be and are tried again."),
		judged:          counterVec("judged_again_total", "Pods that were enrolled in doubt and judged again.", "result", "kept", "changed", "left"),
		repairs:         counterVec("repairs_total", "Pods that ran outside the mesh and should not.", "result", "enrolled", "labelled", "deleted", "failed"),
		api:             prometheus.NewGauge(prometheus.GaugeOpts{Namespace: namespace, Name: "api_server_up", Help: "Whether the API server answered the last time."}),
		connections:     counts{total: map[string]uint64{}, last: map[countKey]uint64{}},
	}
	for _, decision := range []string{"enroll", "skip", "error"} {
		m.addSeconds.WithLabelValues(decision)
	}
	return m
}

func (m *metrics) own() []prometheus.Collector {
	return []prometheus.Collector{m.addSeconds, m.undone, m.swept, m.changes, m.reconcileErrors, m.judged, m.repairs, m.api}
}

func (m *metrics) setNode(n node) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.node = n
}

func (m *metrics) followInstaller(i interface{ Status() install.Status }) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.installer = i
}

func (m *metrics) setAPI(up bool) {
	m.api.Set(boolean(up))
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (m *metrics) observeAdd(answer agentapi.Answer, took time.Duration) {
	decision := string(answer.Decision)
	if answer.Error != nil {
		decision = "error"
	}
	m.addSeconds.WithLabelValues(decision).Observe(took.Seconds())
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(out chan<- *prometheus.Desc) {
	for _, c := range m.own() {
		c.Describe(out)
	}
	for _, d := range []*prometheus.Desc{descConnections, descPods, descProvisional, descEntries, descMax, descFeature, descInstalled, descOverwritten, descBuild, descUp} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(out chan<- prometheus.Metric) {
	for _, c := range m.own() {
		c.Collect(out)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	out <- prometheus.MustNewConstMetric(descBuild, prometheus.GaugeValue, 1, version.String())
	out <- prometheus.MustNewConstMetric(descUp, prometheus.GaugeValue, boolean(m.node != nil))
	if m.installer != nil {
		status := m.installer.Status()
		out <- prometheus.MustNewConstMetric(descInstalled, prometheus.GaugeValue, boolean(status.Ready))
		out <- prometheus.MustNewConstMetric(descOverwritten, prometheus.CounterValue, float64(status.Overwritten))
	}
	if m.node != nil {
		m.collectNode(out)
	}
}

func (m *metrics) collectNode(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	f := m.node.Features()
	gauge(descFeature, boolean(f.SetRetval), "set_retval")
	gauge(descFeature, boolean(f.MPTCPSock), "mptcp_sock")
	gauge(descFeature, boolean(f.IngressIfindex), "ingress_ifindex")
	gauge(descFeature, boolean(f.TCX), "tcx")
	fill, err := m.node.Fill()
	if err != nil {
		out <- prometheus.NewInvalidMetric(descEntries, err)
		return
	}
	for _, table := range fill {
		gauge(descEntries, float64(table.Entries), table.Table)
		gauge(descMax, float64(table.Max), table.Table)
		if table.Table == "pods" {
			gauge(descPods, float64(table.Entries))
		}
	}
	attachments, err := m.node.Attachments()
	if err != nil {
		out <- prometheus.NewInvalidMetric(descProvisional, err)
		return
	}
	provisional := 0
	for _, a := range attachments {
		if a.Provisional {
			provisional++
		}
	}
	gauge(descProvisional, float64(provisional))
	stats, err := m.node.Stats()
	if err != nil {
		out <- prometheus.NewInvalidMetric(descConnections, err)
		return
	}
	now := map[countKey]uint64{}
	for _, s := range stats {
		now[countKey{s.Cookie, s.Reason}] = s.Count
	}
	for reason, n := range m.connections.add(now) {
		out <- prometheus.MustNewConstMetric(descConnections, prometheus.CounterValue, float64(n), direction(reason), reason)
	}
}

// inbound are the reasons of connections that come in. All others go out.
var inbound = map[string]bool{
	"captured-in": true, "direct-port-in": true, "direct-proxy-source": true, "refused-no-listener": true,
	"refused-no-pod": true, "refused-no-handshake": true, "captured-rerouted": true,
}

// direction of connections, by their reason. What is counted about listeners is
// about no connection.
func direction(reason string) string {
	switch {
	case inbound[reason]:
		return "inbound"
	case strings.HasPrefix(reason, "listener-"):
		return "none"
	}
	return "outbound"
}

// counts adds up what the maps count by pod: a pod's counters end with it, and a
// sum of those that are there would go down.
type counts struct {
	total map[string]uint64
	last  map[countKey]uint64
}

type countKey struct {
	cookie uint64
	reason string
}

func (c *counts) add(now map[countKey]uint64) map[string]uint64 {
	for key, n := range now {
		before := c.last[key]
		if n < before { // un-enrolled and enrolled again
			before = 0
		}
		c.total[key.reason] += n - before
	}
	c.last = now
	return c.total
}
