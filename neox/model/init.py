"""Initial weights that depend on the seed and a tensor's name, and on nothing else.

Each logical tensor is drawn whole, in fp32 on the CPU, from a generator of its own; a rank then takes its
slice. So the same seed gives the same model at every layout, and adding a layer changes no other.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch.nn.init import orthogonal_, xavier_normal_, xavier_uniform_

from neox.config import ModelConfig

OUTPUT_PROJECTIONS = (".dense.weight", ".linear2.weight")
"""Matrices that write to the residual stream; they follow `output_layer_init_method`."""


def initial_tensor(name: str, shape: Sequence[int], *, config: ModelConfig, seed: int) -> torch.Tensor:
    """Return the initial value of a logical tensor, fp32 on the CPU.

    Biases start at 0 and the factors of norms at 1, scalenorm's `g` too (see `neox.model.norms`).

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
    return draw(method, shape, config=config, generator=name_generator(name, seed))


def draw(method: str, shape: Sequence[int], *, config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    """Draw a matrix [out, in], fp32 on the CPU, by one of upstream's nine initialisers.

    With std `init_method_std`, D the hidden size and L the number of layers:

        normal                         N(0, std^2)
        scaled_normal                  N(0, std^2 / 2L)         Radford et al. 2019 (GPT-2), section 2.3
        single_residual_scaled_normal  N(0, std^2 / L)          Gu & Dao 2023 (Mamba), for one residual a layer
        small_init                     N(0, 2 / 5D)             Nguyen & Salazar 2019, section 2.2
        wang_init                      N(0, 4 / (L^2 D))        Wang & Komatsuzaki 2021 (GPT-J)
        xavier_normal                  N(0, 2 / (in + out))     Glorot & Bengio 2010, section 4.2.1
        xavier_uniform                 U(+-sqrt(6 / (in + out)))
        orthogonal                     sqrt(2) Q                Saxe et al. 2013, section 3; Q by Mezzadri 2007
        scaled_orthogonal              sqrt(2 / L) Q            the gains are upstream's

    Q has orthonormal rows or columns, whichever are fewer. `in` and `out` are the sizes of the matrix as it is
    stored: query_key_value and a gated linear1 count as one matrix with all their rows, as upstream takes them
    without tensor parallelism.
    """
    tensor = torch.empty(*shape)
    match method:
        case "xavier_normal":
            return xavier_normal_(tensor, generator=generator)
        case "xavier_uniform":
            return xavier_uniform_(tensor, generator=generator)
        case "orthogonal":
            return orthogonal_(tensor, math.sqrt(2.0), generator=generator)
        case "scaled_orthogonal":
            return orthogonal_(tensor, math.sqrt(2.0 / config.num_layers), generator=generator)
    return tensor.normal_(0.0, standard_deviation(method, config), generator=generator)


def standard_deviation(method: str, config: ModelConfig) -> float:
    """Standard deviation of an initialiser that does not look at the shape of the matrix; see `draw`."""
    width, depth = config.hidden_size, config.num_layers
    return {
        "normal": config.init_method_std,
        "scaled_normal": config.init_method_std / math.sqrt(2.0 * depth),
        "single_residual_scaled_normal": config.init_method_std / math.sqrt(depth),
        "small_init": math.sqrt(2.0 / (5.0 * width)),
        "wang_init": 2.0 / (depth * math.sqrt(width)),
    }[method]


def name_generator(name: str, seed: int) -> torch.Generator:
    """The stream of one tensor in a run of `seed`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
