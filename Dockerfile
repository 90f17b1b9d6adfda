# Two images from one lock: `api` (no torch) and `worker` (--build-arg EXTRA=cuda or cpu).
# Both run as user 10001, without capabilities, on a read-only root: they write to /tmp, and the worker to its volumes.

FROM python:3.11-slim-bookworm AS base
# tini is process 1: it passes signals on and reaps what a killed training run leaves.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends tini && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp grpo
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["tini", "--"]

FROM python:3.11-slim-bookworm AS build
ARG UV_VERSION=0.13.9
# In a venv, since Debian's Python takes no packages. uv trusts the system's certificates, as behind a proxy it must.
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}"
ENV PATH=/opt/uv/bin:$PATH UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_SYSTEM_CERTS=1
RUN uv venv --quiet --python python3 /venv
WORKDIR /src

# Our own code, apart from what it needs: a change to it makes one small layer.
FROM build AS code
COPY pyproject.toml README.md LICENSE ./
COPY grpo_core grpo_core
COPY jobs jobs
COPY deploy deploy
COPY api api
RUN uv pip install --quiet --no-cache --python /venv --no-deps .

FROM build AS build-api
COPY pyproject.toml uv.lock ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv export --quiet --frozen --no-dev --no-emit-project --extra api --output-file locked.txt \
 && uv pip install --quiet --python /venv --require-hashes --requirement locked.txt

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
# The lock's torch is the package index's, a CUDA build. The CPU image takes the same version from here, a page or folder,
# and everything else from the lock.
ARG UV_FIND_LINKS=https://download.pytorch.org/whl/cpu/torch/
COPY pyproject.toml uv.lock ./
RUN --mount=type=cache,target=/root/.cache/uv \
    locked() { uv export --quiet --frozen --no-dev --no-emit-project --extra worker --extra "${EXTRA}" "$@"; } \
 && if [ "${EXTRA}" = cpu ]; then \
      locked --no-hashes --output-file constraints.txt \
   && { locked --prune torch && grep '^torch==' constraints.txt; } > locked.txt \
   && uv pip install --quiet --python /venv --requirement locked.txt --constraint constraints.txt; \
    else \
      unset UV_FIND_LINKS \
   && locked --output-file locked.txt \
   && uv pip install --quiet --python /venv --require-hashes --requirement locked.txt; \
    fi

FROM base AS worker
# Triton and torch.compile make code while a job runs; Python's own headers come with the base image.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ libc6-dev && rm -rf /var/lib/apt/lists/* \
 && install -d -o grpo -g grpo /cache /work
COPY --from=build-worker /venv /venv
COPY --from=code /venv/bin/grpo /venv/bin/
COPY --from=code /venv/lib /venv/lib
# /cache keeps models and compiled kernels from one container to the next; whatever else writes to a home or cache folder
# finds them there. /work is scratch.
ENV HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor VLLM_CACHE_ROOT=/cache/vllm GRPO_WORK_DIR=/work \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
VOLUME ["/cache", "/work"]
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["python", "-m", "jobs.health"]
# A run at hand is asked to finish its step and is handed back: give it `docker stop --time 150`.
STOPSIGNAL SIGTERM
CMD ["grpo", "worker"]
LABEL org.opencontainers.image.title="grpo-jobs worker" \
      org.opencontainers.image.description="Runs GRPO training jobs on the GPUs, or the CPU, of its host" \
      org.opencontainers.image.licenses="Apache-2.0"
