"""Into and out of what tensor ranks do each a part of, with the collectives that forward and backward pass need.

Outside, the residual stream is whole on every rank, [B, S, D], or under sequence parallelism a stretch of it,
[B, S/T, D].
"""

import torch
from torch import nn

from neox.parallel.mesh import Mesh


def enter_parts(x_BSD: torch.Tensor, mesh: Mesh, *, sequence_parallel: bool) -> torch.Tensor:
    """The whole sequence; its gradient is summed over the ranks, each of which used it for a part of the work."""
    from megatron.core.tensor_parallel import mappings

    group = mesh.tensor_group
    if not sequence_parallel:
        return mappings.copy_to_tensor_model_parallel_region(x_BSD, group=group)
    x_SBD = x_BSD.transpose(0, 1).contiguous()
    return mappings.gather_from_sequence_parallel_region(x_SBD, group=group).transpose(0, 1)


def leave_parts(x_BSD: torch.Tensor, mesh: Mesh, *, sequence_parallel: bool) -> torch.Tensor:
    """The sum of what the ranks have made, of all or of this rank's stretch."""
    from megatron.core.tensor_parallel import mappings

    group = mesh.tensor_group
    if not sequence_parallel:
        return mappings.reduce_from_tensor_model_parallel_region(x_BSD, group=group)
    x_SBD = x_BSD.transpose(0, 1).contiguous()
    return mappings.reduce_scatter_to_sequence_parallel_region(x_SBD, group=group).transpose(0, 1)


class EnterParts(nn.Module):
    """`enter_parts` as a module."""

    def __init__(self, mesh: Mesh, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.mesh, self.sequence_parallel = mesh, sequence_parallel

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """See `enter_parts`."""
        return enter_parts(x_BSD, self.mesh, sequence_parallel=self.sequence_parallel)


class LeaveParts(EnterParts):
    """`leave_parts` as a module."""

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """See `leave_parts`."""
        return leave_parts(x_BSD, self.mesh, sequence_parallel=self.sequence_parallel)
