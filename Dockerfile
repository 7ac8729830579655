# Training on one host or many: docker build -t neox .    (CI does not build it; see docs/multi-node.md)
# The torch wheels bring CUDA's libraries; the base brings what the driver's container runtime looks for.
ARG CUDA=12.8.1
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04

# Compiler and Python headers: torch.compile builds its kernels' launchers with them.
# Open MPI, pdsh and ssh: launchers for several hosts. libibverbs, rdma: NCCL over InfiniBand.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential ca-certificates git iproute2 \
        libibverbs1 ibverbs-providers librdmacm1 \
        openmpi-bin openssh-client pdsh \
        python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu's image has a user 1000 already.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 --shell /bin/bash neox \
    && mkdir -p /workspace/neox /opt/venv \
    && chown neox:neox /workspace/neox /opt/venv

USER neox
WORKDIR /workspace/neox
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DS_BUILD_OPS=0 \
    PDSH_RCMD_TYPE=ssh

# Packages before the code, so that a change of code does not install them again.
ARG TORCH_INDEX=https://pypi.org/simple
ARG EXTRAS=hf,eval,wandb,tensorboard,data
COPY --chown=neox:neox pyproject.toml constraints.txt LICENSE README.md ./
COPY --chown=neox:neox neox/__init__.py neox/__init__.py
RUN python3.12 -m venv /opt/venv \
    && pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" -c constraints.txt -e ".[${EXTRAS}]"

COPY --chown=neox:neox . .

CMD ["python", "train.py", "--help"]
