"""Micro-batches of this rank, from files or from a server."""

from collections.abc import Iterator

import torch.distributed as dist

from neox.config import Config
from neox.data import BatchLoader
from neox.data.blending import SampleSource
from neox.data.loader import Batch, stack_samples
from neox.data.online import OnlineDataset
from neox.data.order import Ranges
from neox.errors import DataError
from neox.parallel.mesh import Mesh
from neox.watch import phase


def micro_batches(
    dataset: SampleSource | OnlineDataset,
    config: Config,
    mesh: Mesh,
    *,
    start: int = 0,
    left_out: Ranges = (),
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Micro-batches for this data-parallel rank, without end.

    Args:
        dataset: samples in order, or a server's as they come.
        config: the run.
        mesh: this rank's place.
        start: samples consumed so far over all ranks; a server knows no such thing.
        left_out: ranges of the order that are passed over.
        num_workers: processes that read files ahead.
    """
    size = config.batch.train_micro_batch_size_per_gpu
    if isinstance(dataset, OnlineDataset):
        return _from_server(dataset, size, mesh)
    return BatchLoader(
        dataset,
        micro_batch_size=size,
        dp_rank=mesh.data_rank,
        dp_size=mesh.data_size,
        start=start,
        left_out=left_out,
        num_workers=num_workers,
    )


def _from_server(dataset: OnlineDataset, size: int, mesh: Mesh) -> Iterator[Batch]:
    """Batches of a server's samples; the first rank of a tensor-parallel group asks for all of it.

    Raises:
        DataError: on all of them, whatever the first one met.
    """
    while True:
        box: list[Batch | DataError | None] = [None]
        if mesh.tensor_rank == 0:
            try:
                with phase("waiting for completions", lawful=True):  # which end by themselves, after half an hour
                    box[0] = stack_samples(dataset.take(size))
            except DataError as error:
                box[0] = error
        if mesh.tensor_size > 1:
            dist.broadcast_object_list(box, src=mesh.rank - mesh.tensor_rank, group=mesh.tensor_group)
        if isinstance(box[0], DataError):
            raise box[0]
        assert box[0] is not None, "the first rank sent a batch"
        yield box[0]
