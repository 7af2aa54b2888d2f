# The coordinator: no torch, no tensor. Build in the repository's root:
#   docker build -f deploy/docker/coordinator.Dockerfile -t swarm-coordinator .
FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/swarm
ENV PATH=/opt/swarm/bin:$PATH
WORKDIR /source
COPY . ./
RUN pip install -c constraints.txt '.[coordinator,otel]'

FROM python:3.11-slim-bookworm
COPY --from=build /opt/swarm /opt/swarm
RUN install -d -m 0700 -o 10001 -g 10001 /data && install -d -m 0755 -o 10001 -g 10001 /link
ENV PATH=/opt/swarm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    SWARM_COORDINATOR_STATE_DIR=/data
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 4300 9400
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9400/healthz', timeout=4)"]
ENTRYPOINT ["swarm"]
CMD ["coordinator", "--run", "/run-files/run.yaml", "--listen", "0.0.0.0:4300", "--metrics", "0.0.0.0:9400"]
