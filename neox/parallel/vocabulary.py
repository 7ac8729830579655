"""The rows of the vocabulary a rank holds, and how ranks that hold different rows work together."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from neox.parallel.mesh import Mesh
from neox.parallel.regions import enter_parts
from neox.parallel.splits import rows_allocated


@dataclass(frozen=True)
class VocabularyRows:
    """All rows are here.

    Attributes:
        size: size of the softmax. Allocated rows of id `size` and above are padding: probability 0, no gradient.
        start: id of the first local row.
    """

    size: int
    start: int = 0

    def real_rows(self, rows: int) -> int:
        """Of `rows` local rows, how many are not padding."""
        return max(0, min(rows, self.size - self.start))

    def enter(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """The input of the projection as the rows here need it: the whole sequence, gradients summed over ranks."""
        return hidden_BSD

    def collect(self, logits_BSV: torch.Tensor) -> torch.Tensor:
        """The logits of the whole vocabulary, [B, S, size], from those of the local rows."""
        return logits_BSV[..., : self.size]


@dataclass(frozen=True)
class ShardedVocabulary(VocabularyRows):
    """The rows are divided over the tensor-parallel group of `mesh`."""

    mesh: Mesh = field(default_factory=Mesh)
    sequence_parallel: bool = False

    @classmethod
    def of(cls, size: int, mesh: Mesh, *, sequence_parallel: bool) -> "ShardedVocabulary":
        """The share of `mesh`'s tensor rank of a vocabulary of `size`."""
        rows = rows_allocated(size, mesh.tensor_size) // mesh.tensor_size
        return cls(size=size, start=rows * mesh.tensor_rank, mesh=mesh, sequence_parallel=sequence_parallel)

    def enter(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] (or [B, S/T, D] under sequence parallelism) -> [B, S, D]."""
        return enter_parts(hidden_BSD, self.mesh, sequence_parallel=self.sequence_parallel)

    def collect(self, logits_BSV: torch.Tensor) -> torch.Tensor:
        """Gather the logits of every rank's rows and drop the padding."""
        from megatron.core.tensor_parallel import mappings

        whole = mappings.gather_from_tensor_model_parallel_region(logits_BSV, group=self.mesh.tensor_group)
        return whole[..., : self.size]

    def maximum(self, tensor: torch.Tensor) -> None:
        """Element-wise maximum over the tensor-parallel group, in place."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.mesh.tensor_group)

    def sum(self, tensor: torch.Tensor) -> None:
        """Element-wise sum over the tensor-parallel group, in place."""
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.mesh.tensor_group)
