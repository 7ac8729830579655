"""Running so that the same run on the same machine gives the same bits.

Sums of floating-point numbers depend on their order. Kernels that add in whatever order their threads come to it are
replaced by ones with a fixed order, and choices made by timing are not made. What else a step depends on is fixed in
every run: the order of samples, the streams of dropout, and the numbers of processes and threads.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neox.config import Config
from neox.errors import ConfigError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_CHOICES = (":4096:8", ":16:8")
"""NVIDIA's documentation of cuBLAS, "Results reproducibility": of 8 buffers each stream keeps its own."""

NCCL = "NCCL_ALGO"
NCCL_CHOICE = "^NVLS,NVLSTree"
"""Switches that add up (NVLink SHARP) take numbers in the order in which they arrive; rings and trees have theirs."""

_REFUSALS = ("does not have a deterministic implementation", "Deterministic behavior was enabled with either")


@contextmanager
def determinism(config: Config) -> Iterator[None]:
    """Set everything for a run with `determinism: true`; entered first in a worker, before CUDA and NCCL start.

    Raises:
        ConfigError: variables of the environment contradict it, or an operation has no kernel of a fixed order.
    """
    if not config.reliability.determinism:
        yield
        return
    set_variables()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.compile too, which then chooses no kernel by timing it
    # Among kernels of cuDNN that are equally good none is chosen by timing.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        raise ConfigError(refusal) from error
    finally:
        torch.use_deterministic_algorithms(before)


def set_variables() -> None:
    """Fill in the variables that libraries read when they start.

    Raises:
        ConfigError: one is set to what does not go with it.
    """
    given = os.environ.setdefault(CUBLAS, CUBLAS_CHOICES[0])
    if given not in CUBLAS_CHOICES:
        raise ConfigError(
            f"determinism: {CUBLAS} is {given!r}, with which cuBLAS may change its mind; unset it, or set it to "
            f"{' or '.join(CUBLAS_CHOICES)}"
        )
    algorithm = os.environ.setdefault(NCCL, NCCL_CHOICE)
    if "nvls" in algorithm.lower() and not algorithm.startswith("^"):
        raise ConfigError(
            f"determinism: {NCCL} is {algorithm!r}, which adds in the order of arrival; unset it, or set it to Ring"
        )


def _refusal(error: RuntimeError) -> str | None:
    """The line for an operation that torch refuses; None for any other error."""
    text = " ".join(str(error).split())
    if not any(mark in text for mark in _REFUSALS):
        return None
    operation = text.partition(_REFUSALS[0])[0].strip() or "a matrix product of cuBLAS"
    operation = "a matrix product of cuBLAS" if text.startswith(_REFUSALS[1]) else operation
    return (
        f"determinism: {operation} has no kernel here that adds in a fixed order; set determinism: false, or leave out "
        "what uses it"
    )
