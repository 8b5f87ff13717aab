{{/*
What each platform sets. Only what differs from the defaults is here; a value that
the user gives goes before it.

  eks        Fargate has no DaemonSets; the pods would wait for ever
  aks        nor have virtual nodes
  gke        plugins are in /home/kubernetes/bin; system-node-critical needs a quota
  openshift  CRI-O's own directories, where Multus stands first; SELinux; an SCC
  k3s        its containerd has its own directories
  kind, minikube   a node is a container: its cgroup root is not the machine's
*/}}
{{- define "sluice.platforms" -}}
aks: {}
eks: {}
gke:
  binDir: /home/kubernetes/bin
  resourceQuota: true
openshift:
  confDir: /etc/kubernetes/cni/net.d
  binDir: /var/lib/cni/bin
  seLinuxOptions: {type: spc_t}
  scc: privileged
k3s:
  confDir: /var/lib/rancher/k3s/agent/etc/cni/net.d
  binDir: /var/lib/rancher/k3s/data/cni
minikube:
  cgroupDir: /host/cgroup
kind:
  cgroupDir: /host/cgroup
{{- end -}}

{{/* The settings in force, as YAML: the platform's, under the user's. */}}
{{- define "sluice.settings" -}}
{{- $defaults := dict "confDir" "/etc/cni/net.d" "binDir" "/opt/cni/bin" "cgroupDir" "" "resourceQuota" false "seLinuxOptions" (dict) "scc" "" -}}
{{- $platform := get (include "sluice.platforms" . | fromYaml) .Values.platform | default dict -}}
{{- $s := mergeOverwrite $defaults $platform -}}
{{- with .Values.cni.confDir }}{{ $_ := set $s "confDir" . }}{{ end -}}
{{- with .Values.cni.binDir }}{{ $_ := set $s "binDir" . }}{{ end -}}
{{- with .Values.cgroupDir }}{{ $_ := set $s "cgroupDir" . }}{{ end -}}
{{- with .Values.daemon.seLinuxOptions }}{{ $_ := set $s "seLinuxOptions" . }}{{ end -}}
{{- if .Values.resourceQuota.enabled }}{{ $_ := set $s "resourceQuota" true }}{{ end -}}
{{- toYaml $s -}}
{{- end -}}
