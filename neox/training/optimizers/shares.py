"""Which part of which parameter an optimizer's tensors hold: whole shards, or ZeRO's flat fp32 partitions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from neox.parallel.mesh import Mesh


@dataclass(frozen=True)
class Shard:
    """A parameter as a tensor-parallel rank holds it.

    Attributes:
        name: canonical name.
        shape: of this rank's shard.
        whole: of the logical tensor.
        is_divided: whether tensor ranks hold different parts.
    """

    name: str
    shape: torch.Size
    whole: torch.Size
    is_divided: bool

    @classmethod
    def of(cls, parameter: nn.Parameter) -> "Shard":
        """Read what `neox.model.build.label_parameter` wrote."""
        return cls(
            name=parameter.canonical_name,  # type: ignore[attr-defined]
            shape=parameter.shape,
            whole=parameter.whole_shape,  # type: ignore[attr-defined]
            is_divided=parameter.tensor_model_parallel,  # type: ignore[attr-defined]
        )


@dataclass(frozen=True)
class Share:
    """Elements [start, stop) of a flattened shard and where they lie.

    Attributes:
        shard: the parameter.
        tensor: the optimizer's tensor that holds the elements.
        offset: place of the first of them in the flattened tensor.
        start, stop: which elements of the shard they are.
        owners: every data rank with its elements (rank, start, stop); this rank alone where the shard is whole.
    """

    shard: Shard
    tensor: torch.Tensor
    offset: int
    start: int
    stop: int
    owners: tuple[tuple[int, int, int], ...]

    def of(self, like_tensor: torch.Tensor) -> torch.Tensor:
        """The elements of this share in `tensor`, or in a state of its shape: a flat view."""
        return like_tensor.view(-1)[self.offset : self.offset + self.stop - self.start]


def shares(group: dict[str, Any], data_rank: int) -> Iterator[Share]:
    """What a parameter group of an optimizer holds on this rank, in the order of its `shards`.

    Without ZeRO a group has its parameters. ZeRO 1 and 2 (and DeepSpeed's bf16 optimizer) put one flat tensor in
    their place: the parameters are laid end to end in their order, padded, and cut into equal parts, one a data rank.

    Args:
        group: with `shards`, one Shard for each parameter it was made of.
        data_rank: coordinate of this process along the data axis.
    """
    tensors, shards = group["params"], group["shards"]
    if len(tensors) == len(shards) and all(t.shape == s.shape for t, s in zip(tensors, shards, strict=True)):
        for tensor, shard in zip(tensors, shards, strict=True):
            size = tensor.numel()
            yield Share(shard, tensor, 0, 0, size, ((data_rank, 0, size),))
        return
    (flat,) = tensors
    length, begin = flat.numel(), 0
    for shard in shards:
        size = shard.shape.numel()
        owners = tuple(
            (rank, max(0, rank * length - begin), min(size, (rank + 1) * length - begin))
            for rank in range(begin // length, (begin + size - 1) // length + 1)
        )
        for rank, start, stop in owners:
            if rank == data_rank:
                yield Share(shard, flat, begin + start - rank * length, start, stop, owners)
        begin += size


def complete(parts: list[tuple[Share, torch.Tensor]], mesh: Mesh) -> list[torch.Tensor]:
    """Give every share's owner the whole shard; a collective over those data ranks that share one.

    Args:
        parts: this rank's shares with their values, flat.
        mesh: the process grid.

    Returns:
        The values of each whole shard, in its shape.
    """
    whole, transfers = [], []
    for share, values in parts:
        if len(share.owners) == 1:
            whole.append(values.view(share.shard.shape))
            continue
        full = values.new_empty(share.shard.shape.numel())
        full[share.start : share.stop] = values
        whole.append(full.view(share.shard.shape))
        for rank, start, stop in share.owners:
            if rank != mesh.data_rank:
                assert mesh.data_group is not None, "several data ranks have a group"
                peer = dist.get_global_rank(mesh.data_group, rank)
                transfers += [
                    dist.P2POp(dist.isend, values.contiguous(), peer, mesh.data_group),
                    dist.P2POp(dist.irecv, full[start:stop], peer, mesh.data_group),
                ]
    for work in dist.batch_isend_irecv(transfers) if transfers else []:
        work.wait()
    return whole
