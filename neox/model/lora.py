"""LoRA (Hu et al. 2021, section 4.1): y = W x + (alpha / rank) B A x, with W frozen.

The factors are parameters of the linear layer they adapt, `attention.query_key_value.lora_A` [rank, in] and `.lora_B`
[out, rank], added from outside after tensor parallelism. Under it they are divided like their matrix: `lora_B` of a
Column along its outputs, `lora_A` of a Row along its inputs; the other factor is whole on every rank.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.functional import dropout, linear

from neox.config.lora import LoraConfig
from neox.model.init import name_generator
from neox.parallel.low_rank import input_is_divided, share_low_rank
from neox.parallel.mesh import Mesh
from neox.parallel.rng import divided_stream
from neox.parallel.splits import Split, split_of

FACTORS = ("lora_A", "lora_B")


class LowRankUpdate:
    """A forward hook that adds (alpha / rank) B A x to what a linear layer returns.

    Args:
        lora: scale and dropout.
        split: the layer's split under tensor parallelism.
        mesh: the process grid.
        sequence_parallel: whether the sequence is divided over tensor ranks outside the linear layers.
    """

    def __init__(self, lora: LoraConfig, split: Split | None, mesh: Mesh, *, sequence_parallel: bool) -> None:
        self.scale = lora.scale
        self.dropout = lora.dropout
        self.split, self.mesh, self.sequence_parallel = split, mesh, sequence_parallel
        self.input_is_divided = input_is_divided(split, mesh, sequence_parallel=sequence_parallel)

    def __call__(self, layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Return the adapted output, of the shape of `output`."""
        (x,) = inputs
        if self.dropout > 0.0 and layer.training:
            with divided_stream(self.mesh) if self.input_is_divided else nullcontext():
                x = dropout(x, self.dropout)
        h = linear(x, layer.lora_A)  # type: ignore[arg-type]
        h = share_low_rank(h, self.split, self.mesh, sequence_parallel=self.sequence_parallel)
        return output + self.scale * linear(h, layer.lora_B)  # type: ignore[arg-type]


def add_factors(
    layer: nn.Module,
    lora: LoraConfig,
    *,
    shapes: Mapping[str, torch.Size],
    mesh: Mesh,
    sequence_parallel: bool,
) -> dict[str, torch.Size]:
    """Freeze a layer of the list, and give its targets factors to train, in place, on the current default device.

    Args:
        layer: already divided over tensor ranks.
        lora: what to adapt.
        shapes: whole shape of each parameter of the layer, by its name in the layer.
        mesh: the process grid.
        sequence_parallel: see `LowRankUpdate`.

    Returns:
        Whole shapes of the new parameters, which are left uninitialised.
    """
    layer.requires_grad_(False)
    whole: dict[str, torch.Size] = {}
    for name, module in layer.named_modules():
        if name not in lora.targets:
            continue
        assert isinstance(module.weight, nn.Parameter), f"{name} is a linear layer"
        module.lora_A = nn.Parameter(torch.empty(lora.rank, module.weight.shape[1]))
        module.lora_B = nn.Parameter(torch.empty(module.weight.shape[0], lora.rank))
        module.register_forward_hook(
            LowRankUpdate(lora, split_of(name), mesh, sequence_parallel=sequence_parallel)  # type: ignore[arg-type]
        )
        rows, columns = shapes[f"{name}.weight"]
        whole |= {f"{name}.lora_A": torch.Size((lora.rank, columns)), f"{name}.lora_B": torch.Size((rows, lora.rank))}
    return whole


def is_factor(name: str) -> bool:
    """Whether a parameter of this canonical name is a factor."""
    return name.rpartition(".")[2] in FACTORS


def initial_factor(name: str, shape: torch.Size, *, seed: int) -> torch.Tensor:
    """Zeros for B, so that training starts from the model as it is; A uniform on +-1/sqrt(in), torch's for a linear.

    That is Kaiming's uniform with a = sqrt(5), as in the authors' code. Drawn whole from a generator of its own, so it
    is the same at every layout.

    Args:
        name: canonical name.
        shape: of the whole factor.
        seed: seed of the run.

    Returns:
        fp32 on the CPU.
    """
    if name.endswith("lora_B"):
        return torch.zeros(shape)
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=name_generator(name, seed))


def with_fresh_factors(
    weights: Callable[[str, torch.Size], torch.Tensor], *, seed: int
) -> Callable[[str, torch.Size], torch.Tensor]:
    """A source of weights that has initial factors too."""

    def source(name: str, shape: torch.Size) -> torch.Tensor:
        return initial_factor(name, shape, seed=seed) if is_factor(name) else weights(name, shape)

    return source


def merge_factors(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, scale: float) -> torch.Tensor:
    """W + (alpha / rank) B A in fp32: the one matrix that does what the adapted layer does."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
