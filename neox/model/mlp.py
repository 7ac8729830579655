"""The feed-forward half of a block."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import gelu, mish, relu, sigmoid, silu, softsign

from neox.config import ModelConfig

Activation = Callable[[torch.Tensor], torch.Tensor]


def identity(x: torch.Tensor) -> torch.Tensor:
    """The gate of `bilinear`, which has no nonlinearity."""
    return x


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "relu": relu,
    "softsign": softsign,
    "swish": silu,
    "silu": silu,
    "mish": mish,
    "geglu": gelu,
    "swiglu": silu,
    "reglu": relu,
    "bilinear": identity,
    "glu": sigmoid,
}
"""The nonlinearity of each name; of the gated ones, that of the gate (Shazeer 2020, "GLU Variants", section 2)."""


def build_activation(config: ModelConfig) -> Activation:
    """The elementwise function of the config.

    `bias_gelu_fusion` makes `gelu` its tanh approximation (Hendrycks & Gimpel 2016, section 2), because upstream's
    fused kernel computes that one and 20B was trained with it. Everything else, `geglu` included, is exact.
    """
    if config.activation == "gelu" and config.bias_gelu_fusion:
        return partial(gelu, approximate="tanh")
    return ACTIVATIONS[config.activation]


class MLP(nn.Module):
    """linear2(act(linear1(x))), or gated linear2(up * act(gate)) with [up; gate] the rows of linear1."""

    def __init__(self, config: ModelConfig, *, bias: bool = True) -> None:
        super().__init__()
        bias = bias and config.use_bias_in_mlp
        self.is_gated = config.is_gated
        self.activation = build_activation(config)
        self.linear1 = nn.Linear(config.hidden_size, config.linear1_width, bias=bias)
        self.linear2 = nn.Linear(config.mlp_inner_width, config.hidden_size, bias=bias)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Transform each token alone: [B, S, D] -> [B, S, D]."""
        if not self.is_gated:
            return self.linear2(self.activation(self.linear1(x_BSD)))
        up_BSF, gate_BSF = self.linear1(x_BSD).chunk(2, dim=-1)
        return self.linear2(up_BSF * self.activation(gate_BSF))
