# Two images from one lock: `api` (no torch) and `worker` (--build-arg EXTRA=cuda or cpu).
# The base is Debian's Python, so that Debian's own packages fit.

FROM python:3.11-slim-bookworm AS build
ARG UV_VERSION=0.13.9
RUN pip install --no-cache-dir uv==${UV_VERSION}
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
WORKDIR /app
COPY pyproject.toml uv.lock README.md LICENSE ./

FROM build AS build-api
RUN uv export --quiet --frozen --extra api --no-dev --no-emit-project --output-file requirements.txt \
 && uv venv /venv && uv pip install --python /venv --no-cache --require-hashes --requirement requirements.txt
COPY api api
COPY jobs jobs
COPY grpo_core grpo_core
COPY deploy deploy
RUN uv pip install --python /venv --no-cache --no-deps .

FROM build AS build-worker
ARG EXTRA=cuda
# A CPU build of torch is not on the package index: UV_FIND_LINKS may name a folder or page that has one.
ARG UV_FIND_LINKS=
RUN uv export --quiet --frozen --extra worker --extra "${EXTRA}" --no-dev --no-emit-project --no-hashes \
      --output-file requirements.txt \
 && uv venv /venv && UV_FIND_LINKS="${UV_FIND_LINKS}" uv pip install --python /venv --no-cache --requirement requirements.txt
COPY api api
COPY jobs jobs
COPY grpo_core grpo_core
COPY deploy deploy
RUN uv pip install --python /venv --no-cache --no-deps .

FROM python:3.11-slim-bookworm AS api
RUN useradd --uid 10001 --create-home grpo
COPY --from=build-api /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER grpo
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
CMD ["grpo", "api", "--host", "0.0.0.0", "--port", "8080"]

FROM python:3.11-slim-bookworm AS worker
# Triton compiles its kernels at run time.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home grpo && mkdir -p /cache /work && chown grpo /cache /work
COPY --from=build-worker /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface TORCHINDUCTOR_CACHE_DIR=/cache/inductor TRITON_CACHE_DIR=/cache/triton \
    VLLM_CACHE_ROOT=/cache/vllm GRPO_WORK_DIR=/work
USER grpo
VOLUME ["/cache", "/work"]
# A run at hand is asked to finish its step and is handed back.
STOPSIGNAL SIGTERM
CMD ["grpo", "worker"]
