"""Micro-batches for one data-parallel rank: endless, in a fixed order, from any starting sample."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from neox.data.blending import SampleSource
from neox.data.gpt_dataset import Sample
from neox.data.order import Ranges, advance, read_places
from neox.data.workers import serve
from neox.errors import DataError, LostDataError

Batch = dict[str, torch.Tensor]


class RankSampler(Sampler[list[int]]):
    """Sample numbers of each micro-batch of one rank.

    The run reads samples start, start + 1, ... in order, and starts again after the last. Of every dp_size *
    b of them, rank r takes the r-th block of b: with G micro-batches to a step, step i consumes samples [i *
    G * dp_size * b, (i + 1) * G * dp_size * b), whatever the number of ranks. Where ranges are left out, the same
    holds of the order without them.

    Args:
        num_samples: length of the dataset.
        micro_batch_size: b.
        dp_rank, dp_size: this rank among the data-parallel ranks.
        start: samples that the run has consumed so far, over all ranks.
        left_out: ranges of the order that are passed over, as `neox.data.order.merged` makes them.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start: int = 0,
        left_out: Ranges = (),
    ) -> None:
        assert min(num_samples, micro_batch_size, start + 1) > 0, "sizes must be positive"
        assert 0 <= dp_rank < dp_size, f"rank {dp_rank} of {dp_size}"
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.stride = micro_batch_size * dp_size
        self.before = dp_rank * micro_batch_size
        self.start = start
        self.left_out = left_out

    def __iter__(self) -> Iterator[list[int]]:
        place = self.start
        while True:
            own = read_places(advance(place, self.before, self.left_out), self.left_out)
            yield [number % self.num_samples for number in islice(own, self.micro_batch_size)]
            place = advance(place, self.stride, self.left_out)


class BatchLoader:
    """An endless iterator of micro-batches {"tokens": int64 [b, S + 1], optionally "labels": int64 [b, S +
    1]}.

    The batches depend on the arguments alone, not on `num_workers` nor on torch's global random state (which
    is left untouched). To resume, construct it with `start` set to the samples consumed.

    Args:
        dataset: map-style samples, see `neox.data.build_datasets`.
        micro_batch_size: b, samples of each batch.
        dp_rank, dp_size: this rank among the data-parallel ranks.
        start: samples that the run has consumed so far, over all ranks; may exceed the dataset.
        left_out: ranges of the order that are passed over, see `RankSampler`.
        num_workers: processes that read ahead; 0 reads in this one.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start: int = 0,
        left_out: Ranges = (),
        num_workers: int = 0,
    ) -> None:
        sampler = RankSampler(
            len(dataset),
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            start=start,
            left_out=left_out,
        )
        self.consumed_samples = start
        self._samples_per_batch = micro_batch_size * dp_size
        self._left_out = left_out
        loader = DataLoader(
            _AsTorchDataset(dataset),
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=_batch_or_error,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # else it draws from the global one, and dropout changes
            worker_init_fn=partial(serve, os.getpid()),
        )
        self._batches = iter(loader)

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if isinstance(batch, DataError):
            raise batch
        self.consumed_samples = advance(self.consumed_samples, self._samples_per_batch, self._left_out)
        return batch


class _AsTorchDataset(Dataset[Sample]):
    def __init__(self, source: SampleSource) -> None:
        self.source = source
        self._lost: LostDataError | None = None

    def __getitems__(self, numbers: list[int]) -> list[Sample] | DataError:
        # An error that a worker raises arrives with the worker's traceback as its text; as a value it arrives as it is.
        if self._lost is not None:  # a worker reads ahead: it need not wait for each batch
            return self._lost
        try:
            return [self.source[number] for number in numbers]
        except LostDataError as error:
            self._lost = error
            return error
        except DataError as error:
            return error


def _batch_or_error(found: list[Sample] | DataError) -> Batch | DataError:
    return found if isinstance(found, DataError) else stack_samples(found)


def stack_samples(samples: Sequence[Sample]) -> Batch:
    """Stack samples into tensors [b, S + 1]; samples without labels get their tokens as labels.

    What else they have, rewards say, all of them have.
    """
    batch = {"tokens": torch.from_numpy(np.stack([sample["tokens"] for sample in samples]))}
    if any("labels" in sample for sample in samples):
        labels = [sample.get("labels", sample["tokens"]) for sample in samples]
        batch["labels"] = torch.from_numpy(np.stack(labels))
    for name in samples[0].keys() - {"tokens", "labels"}:
        batch[name] = torch.from_numpy(np.stack([sample[name] for sample in samples]))
    return batch
