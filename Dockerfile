# Everything of ours that runs beside Kafka and Redis, in one image: the worker, `feast apply` and
# the feature server. REQUIREMENTS names the file of requirements/ (cpu or gpu), BASE what it
# stands on; docker-compose.gpu.yml has the pair for a GPU.
ARG BASE=python:3.11-slim

FROM ${BASE} AS python
# CUDA's images have no Python; that of Ubuntu 24.04 is 3.12.
RUN python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' || { \
        apt-get update \
        && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    }

FROM python AS packages
ARG REQUIREMENTS=cpu
COPY requirements/${REQUIREMENTS}.txt /tmp/requirements.txt
# Wheels alone, each known by its hash: nothing is compiled, and no compiler is needed. Behind a
# mirror, give pip's settings: docker build --secret id=pip.conf,src=...
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
        --require-hashes --only-binary :all: -r /tmp/requirements.txt \
    && /opt/venv/bin/python -m pip uninstall -y -q pip

FROM python
RUN useradd --system --create-home --uid 10001 llm4es
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY llm4es llm4es
COPY stream_worker stream_worker
COPY feature_repo feature_repo
# A volume that is mounted on data/ for the first time takes over its owner.
RUN /opt/venv/bin/python -m compileall -q llm4es stream_worker \
    && install -d -o llm4es feature_repo/data
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1
USER llm4es
CMD ["python", "-m", "stream_worker", "run"]
