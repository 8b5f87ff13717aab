{{/* What the schema could only refuse with a pattern is refused with a sentence. */}}
{{- define "sluice.check" -}}
{{- $v := .Values -}}
{{- range $name, $path := dict "cni.confDir" $v.cni.confDir "cni.binDir" $v.cni.binDir "cni.logFile" $v.cni.logFile "cgroupDir" $v.cgroupDir -}}
{{- if and $path (not (regexMatch "^/[^,:[:space:]]*$" $path)) -}}
{{- fail (printf "%s is %q: give an absolute path without spaces, commas and colons" $name $path) -}}
{{- end -}}
{{- end -}}
{{- if not $v.cni.logFile -}}
{{- fail "cni.logFile is empty: give an absolute path on the host" -}}
{{- end -}}
{{- if not (regexMatch "^(sha256:[0-9a-f]{64})?$" $v.image.digest) -}}
{{- fail (printf "image.digest is %q: give sha256: and 64 hexadecimal digits, as `make image` prints it" $v.image.digest) -}}
{{- end -}}
{{- if not (regexMatch "^([1-9][0-9]*|([1-9][0-9]?|100)%)$" (toString $v.daemon.maxUnavailable)) -}}
{{- fail (printf "daemon.maxUnavailable is %q: give a number of nodes from 1, or a percentage from \"1%%\" to \"100%%\"" (toString $v.daemon.maxUnavailable)) -}}
{{- end -}}
{{- if not (regexMatch "^([0-9]+(h|m|s))+$" $v.daemon.resync) -}}
{{- fail (printf "daemon.resync is %q: give a time such as 30s or 2m" $v.daemon.resync) -}}
{{- end -}}
{{- if and $v.namespace.create (has .Release.Namespace (list "default" "kube-system")) -}}
{{- fail (printf "namespace.create would label the namespace %q as privileged: install into one of Sluice's own, with --namespace sluice-system" .Release.Namespace) -}}
{{- end -}}
{{- end -}}
