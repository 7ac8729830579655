"""Normalisation: the four kinds, each over the features of one token, computed in fp32 whatever the model's dtype.

With x one token of D features and g, b the parameters:

    layernorm                  (x - mean) / sqrt(var + eps) * weight + bias       Ba et al. 2016, section 3
    non_parametric_layernorm   (x - mean) / sqrt(var + eps)                       the same without parameters
    rmsnorm                    x / sqrt(mean(x^2) + eps) * scale                  Zhang & Sennrich 2019, section 3
    scalenorm                  x / max(|x|, eps) * g, with g one number           Nguyen & Salazar 2019, section 2.2

var is the biased variance. The result is rounded once, to the dtype of x. Parameters may be in a wider dtype than x.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import layer_norm, normalize, rms_norm

from neox.config import ModelConfig


def build_norm(config: ModelConfig, size: int | Sequence[int] | None = None) -> nn.Module:
    """Make the norm that `config.norm` names, with its epsilon.

    Args:
        config: the model.
        size: shape of the trailing dimensions, `hidden_size` unless given. Where there are several, the layer norms
            take their statistics over all of them together, rmsnorm and scalenorm over the last alone.

    Returns:
        A module from [..., *size] to the same shape and dtype.
    """
    shape = (config.hidden_size if size is None else size,) if not isinstance(size, Sequence) else tuple(size)
    match config.norm:
        case "layernorm":
            return LayerNorm(shape, eps=config.layernorm_epsilon)
        case "non_parametric_layernorm":
            return LayerNorm(shape, eps=config.layernorm_epsilon, elementwise_affine=False)
        case "rmsnorm":
            return RMSNorm(shape, eps=config.rms_norm_epsilon)
        case "scalenorm":
            return ScaleNorm(eps=config.scalenorm_epsilon)
    raise AssertionError(f"norm {config.norm!r} is resolved to a plain kind before the model is built")


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the trailing dimensions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., *shape] -> the same."""
        if self.weight is None or self.weight.dtype == x.dtype:
            return super().forward(x)
        return layer_norm(wide(x), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension; the parameter has upstream's name."""

    def __init__(self, shape: Sequence[int], *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(tuple(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., *shape] -> the same."""
        if self.scale.dim() == 1 and self.scale.dtype == x.dtype:
            return rms_norm(x, self.scale.shape, self.scale, self.eps)
        return (rms_norm(wide(x), x.shape[-1:], eps=self.eps) * self.scale).to(x.dtype)


class ScaleNorm(nn.Module):
    """x / max(|x|, eps) * g, the length taken over the last dimension.

    g starts at 1 as upstream's does, so that outputs begin as unit vectors; the paper starts it at sqrt(D).
    """

    def __init__(self, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> the same."""
        return (normalize(wide(x), dim=-1, eps=self.eps) * self.g).to(x.dtype)


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or in fp64 if it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


NORMS = (LayerNorm, RMSNorm, ScaleNorm)
