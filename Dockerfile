# One file, two images:
#
#   docker build -t higgs-audio-vllm .                                  CUDA
#   docker build -t higgs-audio-vllm:cpu --build-arg DEVICE=cpu .       CPU only, much smaller
#
#   docker run --gpus all -p 8778:8778 -v higgs-cache:/cache higgs-audio-vllm \
#       --model bosonai/higgs-audio-v2-generation-3B-base
#
# Arguments after the image name go to the server. CUDA's libraries come with torch's wheels, so both
# images start from the same base and the host only has to have the NVIDIA driver and its container
# toolkit.
ARG DEVICE=cuda

FROM python:3.12-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_CACHE_ROOT=/cache/higgs-audio-vllm \
    HF_HOME=/cache/huggingface
RUN useradd --create-home --uid 1000 speech && install -d -o speech /cache
WORKDIR /app
COPY constraints.txt ./

# The compiler stays behind; what it makes needs the C library only.
FROM base AS native
RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake g++ make \
    && rm -rf /var/lib/apt/lists/*
COPY CMakeLists.txt ./
COPY csrc csrc
RUN cmake -S . -B build && cmake --build build --parallel && cmake --install build --prefix .

FROM base AS cpu
RUN pip install --constraint constraints.txt --index-url https://download.pytorch.org/whl/cpu torch

FROM base AS cuda
# Triton builds its launchers with a C compiler when a kernel is first used.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --constraint constraints.txt torch
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${DEVICE}
COPY pyproject.toml setup.py README.md LICENSE ./
COPY vllm vllm
COPY --from=native /app/vllm/kernels/lib vllm/kernels/lib
RUN pip install --constraint constraints.txt --editable '.[s3]'
USER speech
VOLUME /cache
EXPOSE 8778
HEALTHCHECK --start-period=15m --interval=10s --timeout=5s \
    CMD ["python", "-c", "import re, urllib.request; port = re.findall(r'--port[ =](\\d+)', open('/proc/1/cmdline').read().replace(chr(0), ' '))[-1]; urllib.request.urlopen(f'http://127.0.0.1:{port}/health')"]
ENTRYPOINT ["python", "-m", "vllm.entrypoints.bosonai.api_server", "--host", "0.0.0.0", "--port", "8778"]
