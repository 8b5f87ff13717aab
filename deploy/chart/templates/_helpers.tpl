{{/* There is one Sluice on a node, so its objects have one name. */}}
{{- define "sluice.name" -}}sluiced{{- end -}}

{{- define "sluice.selector" -}}
app.kubernetes.io/name: sluice
app.kubernetes.io/component: daemon
{{- end -}}

{{- define "sluice.labels" -}}
{{ include "sluice.selector" . }}
app.kubernetes.io/part-of: sluice
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- define "sluice.image" -}}
{{- $i := .Values.image -}}
{{- with $i.registry }}{{ . }}/{{ end }}{{ $i.repository }}
{{- if $i.digest }}@{{ $i.digest }}{{ else }}:{{ $i.tag | default .Chart.AppVersion }}{{ end -}}
{{- end -}}

{{/* Where a probe asks. On the loopback the kubelet has to be told the host. */}}
{{- define "sluice.probe" -}}
{{- if eq .daemon.listen "node" -}}
{path: {{ .path }}, port: {{ .daemon.port }}}
{{- else -}}
{path: {{ .path }}, port: {{ .daemon.port }}, host: 127.0.0.1}
{{- end -}}
{{- end -}}

{{/* An AppArmor profile as Kubernetes before 1.30 wants it. */}}
{{- define "sluice.appArmorAnnotation" -}}
{{- if eq .type "Localhost" -}}localhost/{{ .localhostProfile }}
{{- else if eq .type "Unconfined" -}}unconfined
{{- else -}}runtime/default
{{- end -}}
{{- end -}}
