{{- /* A peer's pod. root: the chart's scope; kind: gpu or cpu. */ -}}
{{- define "swarm.peerPod" -}}
{{- $ := .root -}}
{{- $peers := $.Values.peers -}}
{{- $own := index $peers .kind -}}
{{- $scope := dict "root" $ "component" (printf "peer-%s" .kind) -}}
metadata:
  labels: {{- include "swarm.labels" $scope | nindent 4 }}
    swarm/peer: "true"
  {{- with $peers.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "swarm.serviceAccountName" $ }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $peers.terminationGracePeriodSeconds }}
  securityContext: {{- include "swarm.podSecurity" $ | nindent 4 }}
  {{- with include "swarm.priorityClassName" $ }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $own.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $own.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $own.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $own.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: peer
      image: {{ include "swarm.image" (dict "root" $ "image" $peers.image) }}
      imagePullPolicy: {{ $peers.image.pullPolicy }}
      args:
        - join
        {{- if eq .kind "gpu" }}
        - --gpu=auto
        {{- else }}
        - --cpu
        - --threads={{ $own.threads }}
        {{- end }}
        - --listen=0.0.0.0:{{ $peers.port }}
        - --metrics=0.0.0.0:{{ $peers.metricsPort }}
        {{- if $peers.files.existingClaim }}
        - --files=/run-files
        {{- end }}
      env:
        - name: SWARM_LINK
          {{- if $peers.link }}
          value: {{ $peers.link | quote }}
          {{- else }}
          valueFrom:
            secretKeyRef:
              name: {{ $peers.linkSecret.existingSecret }}
              key: {{ $peers.linkSecret.key }}
          {{- end }}
        {{- if $peers.ticketSecret.existingSecret }}
        - name: SWARM_TICKET
          valueFrom:
            secretKeyRef:
              name: {{ $peers.ticketSecret.existingSecret }}
              key: {{ $peers.ticketSecret.key }}
        {{- end }}
        {{- if eq .kind "cpu" }}
        - name: OMP_NUM_THREADS
          value: {{ $own.threads | quote }}
        {{- end }}
        {{- if $peers.hostPort }}
        - name: HOST_IP
          valueFrom:
            fieldRef:
              fieldPath: status.hostIP
        - name: SWARM_ANNOUNCE
          value: $(HOST_IP):{{ $peers.port }}
        {{- end }}
        {{- with $peers.settings }}
        {{- include "swarm.settings" (dict "prefix" "SWARM_" "settings" .) | nindent 8 }}
        {{- end }}
      ports:
        - name: peer
          containerPort: {{ $peers.port }}
          protocol: TCP
          {{- if $peers.hostPort }}
          hostPort: {{ $peers.port }}
          {{- end }}
        - {name: metrics, containerPort: {{ $peers.metricsPort }}, protocol: TCP}
      # Loading the libraries and the model takes a while before a peer answers.
      startupProbe:
        exec:
          command: [swarm, status, --json]
        periodSeconds: 15
        timeoutSeconds: 15
        failureThreshold: 40
      livenessProbe:
        exec:
          command: [swarm, status, --json]
        periodSeconds: 60
        timeoutSeconds: 30
        failureThreshold: 5
      resources:
        {{- with $own.resources.requests }}
        requests: {{- toYaml . | nindent 10 }}
        {{- end }}
        limits:
          {{- with $own.resources.limits }}{{- toYaml . | nindent 10 }}{{- end }}
          {{- if eq .kind "gpu" }}
          nvidia.com/gpu: {{ $own.devices }}
          {{- end }}
      securityContext: {{- include "swarm.containerSecurity" $ | nindent 8 }}
      volumeMounts:
        - {name: data, mountPath: /data}
        - {name: tmp, mountPath: /tmp}
        {{- if $peers.files.existingClaim }}
        - {name: files, mountPath: /run-files, readOnly: true}
        {{- end }}
  volumes:
    - name: data
      {{- if $own.persistence.hostPath }}
      hostPath:
        path: {{ $own.persistence.hostPath }}
        type: Directory
      {{- else }}
      emptyDir: {sizeLimit: {{ $own.persistence.sizeLimit }}}
      {{- end }}
    - name: tmp
      emptyDir: {sizeLimit: 1Gi}
    {{- with $peers.files.existingClaim }}
    - name: files
      persistentVolumeClaim:
        claimName: {{ . }}
        readOnly: true
    {{- end }}
{{- end -}}
