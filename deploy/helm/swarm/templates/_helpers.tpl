{{- define "swarm.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "swarm.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "swarm.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "swarm.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "swarm.selector" -}}
app.kubernetes.io/name: {{ include "swarm.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "swarm.labels" -}}
{{ include "swarm.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "swarm.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "swarm.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "swarm.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "swarm.priorityClassName" -}}
{{- if .Values.peers.priorityClass.existing -}}
{{- .Values.peers.priorityClass.existing -}}
{{- else if .Values.peers.priorityClass.create -}}
{{- printf "%s-peer-%s" (include "swarm.fullname" .) .Release.Namespace | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "swarm.peersEnabled" -}}
{{- if or .Values.peers.gpu.enabled .Values.peers.cpu.enabled -}}yes{{- end -}}
{{- end -}}

{{- define "swarm.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "swarm.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "swarm.settings" -}}
{{- $prefix := .prefix -}}
{{- $lines := list -}}
{{- range $name, $value := .settings -}}
{{- if kindIs "float64" $value }}{{- if eq (floor $value) $value }}{{- $value = int64 $value }}{{- end }}{{- end -}}
{{- $lines = append $lines (printf "- name: %s%s\n  value: %s" $prefix (upper $name) ($value | toString | quote)) -}}
{{- end -}}
{{- join "\n" $lines -}}
{{- end -}}

{{- /* What a schema can't say: which values belong together. */ -}}
{{- define "swarm.check" -}}
{{- $c := .Values.coordinator -}}
{{- if $c.enabled -}}
{{- $sources := 0 -}}
{{- range (list $c.run.existingConfigMap $c.run.existingSecret $c.run.signed) -}}{{- if . -}}{{- $sources = add1 $sources -}}{{- end -}}{{- end -}}
{{- if ne (int $sources) 1 -}}
{{- fail "coordinator.run: name one of existingConfigMap, existingSecret and signed" -}}
{{- end -}}
{{- if eq $c.database.kind "postgresql" -}}
{{- if not $c.database.existingSecret -}}{{- fail "coordinator.database.existingSecret: PostgreSQL needs its URL" -}}{{- end -}}
{{- if not $c.keys.existingSecret -}}{{- fail "coordinator.keys.existingSecret: with PostgreSQL all replicas need the same keys" -}}{{- end -}}
{{- else if gt (int $c.replicas) 1 -}}
{{- fail "coordinator.replicas: SQLite has one; several need database.kind: postgresql" -}}
{{- end -}}
{{- if and $c.admin.enabled (not $c.admin.keys) -}}{{- fail "coordinator.admin.keys: name the admins' keys" -}}{{- end -}}
{{- else if not (include "swarm.peersEnabled" .) -}}
{{- fail "nothing is enabled: coordinator.enabled, peers.gpu.enabled or peers.cpu.enabled" -}}
{{- end -}}
{{- if include "swarm.peersEnabled" . -}}
{{- if eq (empty .Values.peers.link) (empty .Values.peers.linkSecret.existingSecret) -}}
{{- fail "peers: give the join link in peers.link or in peers.linkSecret.existingSecret" -}}
{{- end -}}
{{- if and .Values.peers.hostPort .Values.peers.gpu.enabled (gt (int .Values.peers.gpu.devices) 1) -}}
{{- fail "peers.hostPort: several peers of a pod can't share a port; give them one device each" -}}
{{- end -}}
{{- end -}}
{{- end -}}
