"""Initial weights that depend on the seed and a tensor's name, and on nothing else.

Each logical tensor is drawn whole, in fp32 on the CPU, from a generator of its own; a rank then takes its
slice. So the same seed gives the same model at every layout, and adding a layer changes no other.
"""

import hashlib
import math
from collections.abc import Sequence

import torch

from neox.config import ModelConfig

OUTPUT_PROJECTIONS = ("attention.dense.weight", "mlp.linear2.weight")
"""Matrices that write to the residual stream; they follow `output_layer_init_method`."""


def initial_tensor(name: str, shape: Sequence[int], *, config: ModelConfig, seed: int) -> torch.Tensor:
    """Return the initial value of a logical tensor, fp32 on the CPU.

    Args:
        name: canonical name, `layers.<disk index>.<name>`.
        shape: shape of the whole tensor, before any sharding.
        config: the model, for the initialiser and its scale.
        seed: seed of the run.
    """
    if name.endswith(".bias"):
        return torch.zeros(*shape)
    if "norm" in name.split(".")[-2]:
        return torch.ones(*shape)
    method = config.output_layer_init_method if name.endswith(OUTPUT_PROJECTIONS) else config.init_method
    generator = torch.Generator().manual_seed(_name_seed(name, seed))
    return torch.empty(*shape).normal_(0.0, standard_deviation(method, config), generator=generator)


def standard_deviation(method: str, config: ModelConfig) -> float:
    """Standard deviation of a normal initialiser.

    `scaled_normal` is GPT-2's scaling of residual outputs (Radford et al. 2019, section 2.3), `small_init` is
    Nguyen & Salazar 2019, section 2.2, and `wang_init` is that of GPT-J (Wang & Komatsuzaki 2021).
    """
    width, depth = config.hidden_size, config.num_layers
    return {
        "normal": config.init_method_std,
        "scaled_normal": config.init_method_std / math.sqrt(2.0 * depth),
        "small_init": math.sqrt(2.0 / (5.0 * width)),
        "wang_init": 2.0 / (depth * math.sqrt(width)),
    }[method]


def _name_seed(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
