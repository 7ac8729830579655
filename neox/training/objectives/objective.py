"""What an engine sees of an objective, and the one of ordinary training."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
import torch.distributed as dist

from neox.parallel.mesh import Mesh
from neox.training.batches import ModelInputs

Figures = Mapping[str, torch.Tensor]
"""What an objective measures of a micro-batch beside the loss, fp32 scalars on the device, by name."""

Model = Callable[..., torch.Tensor]
"""A decoder, or an engine around one; called with tokens, what is asked of the head, and a context."""


class Objective(Protocol):
    """Turns a micro-batch into a loss.

    Attributes:
        recorded: flat keys that checkpoints keep beside the configuration's, for a run that goes on from them.
    """

    recorded: Mapping[str, str]

    def __call__(self, model: Model, inputs: ModelInputs) -> tuple[torch.Tensor, Figures]:
        """Loss of a micro-batch, whose mean over micro-batches and data-parallel ranks is minimised, and figures."""
        ...


class NextToken:
    """Cross-entropy of the next token: the head makes it a loss itself."""

    recorded: Mapping[str, str] = MappingProxyType({})

    def __call__(self, model: Model, inputs: ModelInputs) -> tuple[torch.Tensor, Figures]:
        """See Objective."""
        return model(inputs.tokens_BS, inputs.targets, inputs.context), {}


def mean_figures(found: Sequence[Figures], mesh: Mesh) -> dict[str, torch.Tensor]:
    """Mean of each figure over micro-batches and data-parallel ranks; nothing is exchanged where there are none."""
    names = list(found[0])
    if not names:
        return {}
    means = torch.stack([torch.stack([figures[name].float() for figures in found]).mean() for name in names])
    if mesh.data_size > 1:
        dist.all_reduce(means, group=mesh.data_group)
        means /= mesh.data_size
    return dict(zip(names, means, strict=True))
