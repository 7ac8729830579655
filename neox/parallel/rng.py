"""Random numbers for dropout.

Each rank has one stream, torch's default generator of its device, and nothing else draws from it after start-up.
It is equal on the ranks of a tensor-parallel group and differs between data-parallel and pipeline ranks, so
dropout on replicated activations agrees by itself. Where activations are divided (attention heads; the sequence
under sequence parallelism) a derived stream is used: same place in the stream, another seed for each tensor rank.
Checkpointed blocks rewind the stream and so repeat their masks.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from neox.parallel.mesh import Mesh


def seed_dropout(seed: int, mesh: Mesh, *, step: int = 0) -> None:
    """Start this rank's stream from (seed, step, pipeline stage, data rank)."""
    value = _fold(seed, step, mesh.pipe_rank, mesh.data_rank)
    torch.manual_seed(value)


def rng_state(device: torch.device) -> torch.Tensor:
    """The state of this rank's stream, uint8."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: torch.device) -> None:
    """Put this rank's stream where `rng_state` found it."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def divided_stream(mesh: Mesh) -> Iterator[None]:
    """Draw numbers that differ between tensor-parallel ranks; afterwards the shared stream stands a step further.

    On a GPU the state is a seed and an offset kept on the host, so this costs no synchronisation.
    """
    if mesh.device.type == "cuda":
        generator = torch.cuda.default_generators[mesh.device.index]
        seed = generator.initial_seed()
        offset = generator.get_offset()
        generator.manual_seed(_fold(seed, mesh.tensor_rank))
        generator.set_offset(offset)
        yield
        advanced = generator.get_offset()
        generator.manual_seed(seed)
        generator.set_offset(advanced)
        return
    draw = int(torch.randint(2**62, (), dtype=torch.int64))
    state = torch.get_rng_state()
    torch.manual_seed(_fold(draw, mesh.tensor_rank))
    yield
    torch.set_rng_state(state)


def divide_dropout(module: nn.Module, mesh: Mesh) -> None:
    """Make a module's forward draw its random numbers from the divided stream while it trains."""
    inner: Callable[..., torch.Tensor] = module.forward

    def forward(*args: object, **kwargs: object) -> torch.Tensor:
        if not module.training:
            return inner(*args, **kwargs)
        with divided_stream(mesh):
            return inner(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


def _fold(*numbers: int) -> int:
    digest = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
