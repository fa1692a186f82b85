# fgaif for the CPU and for NVIDIA GPUs, on Linux x86-64:
#   docker build --target cpu -t fgaif:cpu .
#   docker build --target gpu -t fgaif:latest .      # the image of cluster/kuberay_rayjob.yaml
#   docker run --rm --read-only --tmpfs /tmp --shm-size 2g -v "$PWD/runs:/runs" fgaif:cpu demo dir=/runs
# What is installed changes with pyproject.toml, the pins and .ci/install alone: an edit of the code
# builds only the last layers. It runs as a user without rights and writes nothing but its run folder
# and /tmp.
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    HOME=/tmp \
    HF_HOME=/tmp/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    PATH=/opt/fgaif/.venv/bin:$PATH
# Triton and DeepSpeed compile small pieces at their first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --no-create-home fgaif && mkdir /runs && chown fgaif /runs
WORKDIR /opt/fgaif
COPY pyproject.toml constraints.txt constraints-gpu.txt README.md LICENSE ./
COPY .ci .ci
# The packages as empty ones: enough to install what they need, and to be found in place later.
RUN mkdir fgaif actors cluster configs \
    && touch fgaif/__init__.py actors/__init__.py cluster/__init__.py

FROM base AS cpu
RUN FGAIF_DEVICE=cpu FGAIF_EXTRAS=,track,baselines .ci/install
COPY fgaif fgaif
COPY actors actors
COPY cluster cluster
COPY configs configs
USER 10001
WORKDIR /runs
ENTRYPOINT ["fgaif"]
CMD ["--help"]

FROM base AS gpu
RUN FGAIF_DEVICE=gpu FGAIF_EXTRAS=,track,baselines .ci/install
COPY fgaif fgaif
COPY actors actors
COPY cluster cluster
COPY configs configs
USER 10001
WORKDIR /runs
ENTRYPOINT ["fgaif"]
CMD ["--help"]
