# One image for API and worker: docker-compose.yml says which of the two a container is.

FROM python:3.11-slim-bookworm AS build
# Another index for pip. Without it torch brings CUDA along (several GB), which a GPU worker needs and a CPU does not;
# PyTorch's install page names the index of its CPU builds.
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/nanomoe
WORKDIR /src
# By far the largest part in a layer of its own, which a change of the code does not touch.
COPY constraints.txt ./
RUN /opt/nanomoe/bin/pip install -c constraints.txt torch
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY nanomoe/ nanomoe/
COPY service/ service/
COPY worker/ worker/
RUN /opt/nanomoe/bin/pip install -c constraints.txt '.[postgres,s3]'

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --create-home nanomoe && install --directory --owner nanomoe /data /locks
COPY --from=build /opt/nanomoe /opt/nanomoe
ENV PATH=/opt/nanomoe/bin:$PATH PYTHONUNBUFFERED=1 NANOMOE_DATA_DIR=/data
USER 10001
WORKDIR /home/nanomoe
# For this machine's processor; on another one the first generation does it, in half a minute.
RUN python -m nanomoe.generation.kernels
VOLUME /data
EXPOSE 8000
CMD ["python", "-m", "service"]
