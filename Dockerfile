# `ballast serve` in a container: docs/serving.md.
#   docker build -t ballast-serve .                               CPU
#   docker build -t ballast-serve:gpu --build-arg EXTRA=gpu .     NVIDIA GPU
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
ARG EXTRA=cpu
ARG UV=0.13.9
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
RUN pip install --no-cache-dir "uv==${UV}" && python -m venv /opt/ballast
WORKDIR /build
COPY pyproject.toml overrides.txt README.md LICENSE ./
COPY src ./src
# vLLM for CPUs wants the CPU build of torch, which is not on PyPI; that for GPUs wants PyPI's.
RUN --mount=type=cache,target=/root/.cache/uv \
    case "${EXTRA}" in cpu) set -- --torch-backend=cpu ;; gpu) set -- ;; *) echo "EXTRA is ${EXTRA}: cpu or gpu" >&2; exit 1 ;; esac \
    && uv pip install --python /opt/ballast/bin/python "$@" --override overrides.txt ".[${EXTRA},embedded,serve]"

FROM python:${PYTHON}-slim-bookworm
# A compiler: vLLM compiles kernels for the model when it starts, unless it is told --eager.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --home-dir /cache --shell /usr/sbin/nologin ballast \
    && install --directory --owner=ballast --group=ballast /cache
COPY --from=build /opt/ballast /opt/ballast
# All that is written goes below /cache and /tmp, so that the root may be read-only.
ENV PATH=/opt/ballast/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    XDG_CONFIG_HOME=/cache/config \
    HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
WORKDIR /cache
VOLUME /cache
EXPOSE 8080
STOPSIGNAL SIGTERM
# No request is answered before vLLM is up and its tokenisation compared, which takes minutes for a large model.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["ballast", "serve"]
# The address is the container's own: which clients reach it is decided where the port is published.
CMD ["/model", "serve.host=0.0.0.0", "serve.port=8080"]
