# Two images from one lock: `api` (no torch) and `worker` (--build-arg EXTRA=cuda; native, without vLLM and Unsloth; or cpu).
# Both run as user 10001, without capabilities, on a read-only root: they write to /tmp, and the worker to its volumes.

# A release names it by its digest: .github/workflows/release.yml.
ARG BASE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE} AS base
# Our program is process 1, without an init such as tini above it: an init holds every key in an environment that
# training, which has the same user, could read. The program hides its own, handles TERM, and the worker reaps.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp grpo
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# hadolint ignore=DL3006
FROM ${BASE} AS build
COPY deploy/uv.txt deploy/torch-cpu.txt deploy/requirements.sh /opt/locked/
# In a venv, since Debian's Python takes no packages. uv trusts the system's certificates, as behind a proxy it must.
RUN python3 -m venv /opt/uv \
 && /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement /opt/locked/uv.txt
ENV PATH=/opt/uv/bin:$PATH UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_SYSTEM_CERTS=1
RUN uv venv --quiet --python python3 /venv
WORKDIR /src

# What makes a wheel of our code: as everything that is installed, by its hash.
FROM build AS wheels
COPY pyproject.toml uv.lock ./
COPY grpo_client/pyproject.toml grpo_client/
RUN uv export --quiet --frozen --no-emit-workspace --only-group build --output-file locked.txt \
 && uv venv --quiet --python python3 /opt/wheels \
 && uv pip install --quiet --no-cache --python /opt/wheels --require-hashes --no-build --requirement locked.txt

# Our own code, apart from what it needs: a change to it makes one small layer.
FROM wheels AS code
COPY README.md LICENSE ./
COPY grpo_core grpo_core
COPY jobs jobs
COPY deploy deploy
COPY api api
COPY grpo_client grpo_client
RUN uv build --quiet --wheel --all-packages --no-build-isolation --python /opt/wheels --out-dir /dist \
 && uv pip install --quiet --no-cache --python /venv --no-deps /dist/*.whl

FROM build AS build-api
COPY pyproject.toml uv.lock ./
COPY grpo_client/pyproject.toml grpo_client/
RUN --mount=type=cache,target=/root/.cache/uv \
    /opt/locked/requirements.sh --no-dev --extra api > locked.txt \
 && uv pip install --quiet --python /venv --require-hashes --no-build --requirement locked.txt

FROM base AS api
COPY --from=build-api /venv /venv
COPY --from=code /venv/bin/grpo /venv/bin/
COPY --from=code /venv/lib /venv/lib
ENV GRPO_API_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", "import http.client, os; \
  api = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('GRPO_API_PORT', 8080)), timeout=4); \
  api.request('GET', '/healthz'); raise SystemExit(api.getresponse().status != 200)"]
CMD ["grpo", "api"]
LABEL org.opencontainers.image.title="grpo-jobs API" \
      org.opencontainers.image.description="HTTP service that accepts GRPO training jobs" \
      org.opencontainers.image.licenses="Apache-2.0"

FROM build AS build-worker
ARG EXTRA=cuda
# Not empty: with Ray, for jobs over several hosts.
ARG RAY=
# Where the CPU image's torch comes from, a page or folder; deploy/torch-cpu.txt says which file it must be.
ARG UV_FIND_LINKS=https://download.pytorch.org/whl/cpu/torch/
COPY pyproject.toml uv.lock ./
COPY grpo_client/pyproject.toml grpo_client/
# Nothing here links statically, and nobody tests pandas: 130 MB.
RUN --mount=type=cache,target=/root/.cache/uv \
    if [ "${EXTRA}" != cpu ]; then unset UV_FIND_LINKS; fi \
 && /opt/locked/requirements.sh --no-dev --extra worker --extra "${EXTRA}" ${RAY:+--extra ray} > locked.txt \
 && uv pip install --quiet --python /venv --require-hashes --no-build --requirement locked.txt \
 && find /venv -name '*_static.a' -delete \
 && rm -r /venv/lib/python*/site-packages/pandas/tests

FROM base AS worker
# Triton and torch.compile make code while a job runs; Python's own headers come with the base image.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ libc6-dev && rm -rf /var/lib/apt/lists/* \
 && install -d -o grpo -g grpo /cache /work
COPY --from=build-worker /venv /venv
COPY --from=code /venv/bin/grpo /venv/bin/
COPY --from=code /venv/lib /venv/lib
# Of a program that its user may run and not read, Linux hides memory and environment from the first moment on. A health
# check is given every key of the container, and runs beside training.
RUN install --mode 0711 "$(readlink -f /venv/bin/python)" /venv/bin/python-hidden
# /cache keeps models and compiled kernels from one container to the next; anything else that writes to a home or cache folder
# finds them there. /work is scratch.
ENV HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor VLLM_CACHE_ROOT=/cache/vllm GRPO_WORK_DIR=/work \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
VOLUME ["/cache", "/work"]
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["python-hidden", "-m", "jobs.health"]
# A run finishes its step and is handed back: use `docker stop --time 150`.
STOPSIGNAL SIGTERM
CMD ["grpo", "worker"]
LABEL org.opencontainers.image.title="grpo-jobs worker" \
      org.opencontainers.image.description="Runs GRPO training jobs on the GPUs, or the CPU, of its host" \
      org.opencontainers.image.licenses="Apache-2.0"
