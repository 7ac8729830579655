"""Normalisation of queries and keys before their scores (Dehghani et al. 2023, "ViT-22B", section 2)."""

from collections.abc import Callable

import torch
from torch import nn

from neox.config import ModelConfig
from neox.model.norms import LayerNorm, build_norm, wide


def build_qk_norm(config: ModelConfig) -> nn.Module:
    """Make the norm of queries and keys, [..., N, H] -> the same, with a parameter for each head and dimension.

    It is upstream's: one set of parameters serves queries and keys; rmsnorm and scalenorm look at each head alone,
    the layer norms at all heads of a token together.
    """
    shape = (config.num_attention_heads, config.head_dim)
    if config.norm in ("layernorm", "non_parametric_layernorm"):
        return JointLayerNorm(shape, eps=config.layernorm_epsilon, elementwise_affine=config.norm == "layernorm")
    return build_norm(config, size=shape)


class JointLayerNorm(LayerNorm):
    """Layer norm over all heads of a token together, also where the heads are divided over tensor ranks.

    Attributes:
        heads: of all ranks.
        sum_over_ranks: adds up a tensor over the ranks that share the heads, differentiable; None where one rank has
            them all.
    """

    def __init__(self, shape: tuple[int, int], *, eps: float, elementwise_affine: bool) -> None:
        super().__init__(shape, eps=eps, elementwise_affine=elementwise_affine)
        self.heads = shape[0]
        self.sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N or this rank's share of it, H] -> the same, in the dtype of x."""
        if self.sum_over_ranks is None:
            return super().forward(x)
        count = self.heads * x.shape[-1]
        # Two sums instead of one of x and x^2 together, which cancel where the mean is large.
        x_wide = wide(x)
        centred = x_wide - self.sum_over_ranks(x_wide.sum((-2, -1), keepdim=True)) / count
        variance = self.sum_over_ranks(centred.square().sum((-2, -1), keepdim=True)) / count
        normal = centred * torch.rsqrt(variance + self.eps)
        return (normal if self.weight is None else normal * self.weight + self.bias).to(x.dtype)
