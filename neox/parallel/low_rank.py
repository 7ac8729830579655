"""The product A x of a low-rank update B A x where ranks hold parts of it.

B of a Column is divided along its outputs and A of a Row along its inputs, like the matrices they belong to; the other
factor is whole on every rank. What crosses between the ranks is only `rank` numbers a token.
"""

import torch

from neox.parallel.mesh import Mesh
from neox.parallel.regions import enter_parts, leave_parts
from neox.parallel.splits import Column, Row, Split


def share_low_rank(h_BSR: torch.Tensor, split: Split | None, mesh: Mesh, *, sequence_parallel: bool) -> torch.Tensor:
    """A x as B on this rank needs it.

    Args:
        h_BSR: what A on this rank gives, [B, S, rank], or [B, S/T, rank] where the sequence of its input is divided.
        split: that of the adapted matrix.
        mesh: the process grid.
        sequence_parallel: whether the sequence is divided outside the adapted matrices.

    Returns:
        Before a Column's B, which sees the whole sequence: [B, S, rank], its gradient summed over the ranks, each of
        which used other rows of B. Before a Row's B: the sum over the ranks, this rank's stretch of it where the
        sequence is divided.
    """
    if mesh.tensor_size == 1:
        return h_BSR
    if isinstance(split, Column):
        return enter_parts(h_BSR, mesh, sequence_parallel=sequence_parallel)
    assert isinstance(split, Row), f"{split} cannot be adapted"
    return leave_parts(h_BSR, mesh, sequence_parallel=sequence_parallel)


def input_is_divided(split: Split | None, mesh: Mesh, *, sequence_parallel: bool) -> bool:
    """Whether tensor ranks hold different parts of an adapted matrix's input, so that dropout must differ too."""
    return mesh.tensor_size > 1 and (isinstance(split, Row) or sequence_parallel)
