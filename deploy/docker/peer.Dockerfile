# A volunteer's peer. Build in the repository's root:
#   docker build -f deploy/docker/peer.Dockerfile -t swarm .
# Join with all GPUs of the machine:
#   docker run --gpus all -v swarm:/data -e SWARM_LINK='swarm://...' swarm
# Without a GPU: add `join --cpu` at the end.
FROM python:3.11-slim-bookworm AS build
# TORCH chooses the variant (for example torch==2.13.0+cpu); TORCH_INDEX_URL is the page with its wheels, where the default index
# has none.
ARG TORCH=torch
ARG TORCH_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/swarm
ENV PATH=/opt/swarm/bin:$PATH
WORKDIR /source
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "$TORCH"
COPY . ./
RUN pip install -c constraints.txt '.[peer,otel]'

FROM python:3.11-slim-bookworm
COPY --from=build /opt/swarm /opt/swarm
# 10001 owns nothing but its data; /link is where a compose file may share the join link.
RUN install -d -m 0700 -o 10001 -g 10001 /data && install -d -m 0755 -o 10001 -g 10001 /link
ENV PATH=/opt/swarm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    SWARM_IDENTITY=/data/identity.key \
    SWARM_DATA_DIR=/data/peer \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /data
VOLUME /data
# The first SIGTERM finishes the round and waits for its receipt: give it time with `docker stop --time 600`.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=15s --start-period=120s --retries=3 CMD ["swarm", "status", "--json"]
ENTRYPOINT ["swarm"]
CMD ["join", "--gpu", "auto"]
