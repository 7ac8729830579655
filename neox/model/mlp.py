"""The feed-forward half of a block."""

import torch
from torch import nn
from torch.nn.functional import gelu

from neox.config import ModelConfig


class MLP(nn.Module):
    """linear2(gelu(linear1(x))).

    `bias_gelu_fusion` selects the tanh approximation of the GELU (Hendrycks & Gimpel 2016, section 2), because
    upstream's fused kernel computes that one and 20B was trained with it; otherwise the exact erf form is used.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if config.bias_gelu_fusion else "none"
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias_in_mlp)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias_in_mlp)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Transform each token alone: [B, S, D] -> [B, S, D]."""
        return self.linear2(gelu(self.linear1(x_BSD), approximate=self.approximate))
