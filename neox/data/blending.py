"""Mixing corpora by weight, and the shares of train, validation and test."""

import re
from collections.abc import Sequence
from itertools import accumulate
from math import ceil
from typing import Any, Protocol

import numpy as np

from neox.data.gpt_dataset import Sample
from neox.errors import DataError

SAMPLE_MARGIN = 1.005  # each corpus prepares half a percent more than its share, as the greedy order may need it


class SampleSource(Protocol):
    """Anything with a length that gives samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def origin(self, index: int) -> dict[str, Any]:
        """Where a sample comes from, without reading it: `dataset`, the prefix of its files; `sample`, its number in
        the order of that dataset; `documents`, those items of the files that it has tokens of.
        """
        ...


def normalized_weights(weights: Sequence[float]) -> list[float]:
    """Return the weights divided by their sum.

    Raises:
        DataError: a weight is negative, or all are zero.
    """
    total = float(sum(weights))
    if min(weights, default=0) < 0 or total <= 0:
        raise DataError(f"data weights {list(weights)}: they must not be negative, and one must be above zero")
    return [weight / total for weight in weights]


def share_sizes(weights: Sequence[float], num_samples: int) -> list[int]:
    """Return how many samples each corpus prepares: ceil(num_samples * weight * 1.005)."""
    return [ceil(num_samples * weight * SAMPLE_MARGIN) for weight in weights]


def weights_by_num_documents(counts: Sequence[int], alpha: float) -> list[float]:
    """Return weights ~ p^alpha * (1 - p), where p is a corpus' share of all documents.

    The second factor damps large corpora, unlike the plain p^alpha of multilingual sampling; a single corpus
    gets weight 1.
    """
    if len(counts) == 1:
        return [1.0]
    shares = [count / sum(counts) for count in counts]
    return normalized_weights([share**alpha * (1 - share) for share in shares])


def blend_order(weights: Sequence[float], num_samples: int) -> np.ndarray:
    """Return the corpus that each sample of a blend comes from, uint8 or uint16 [num_samples].

    Sample i goes to the corpus whose count so far lags most behind weight * max(i, 1); the first of equals.
    """
    corpora = range(len(weights))
    order = np.empty(num_samples, np.uint8 if len(weights) < 256 else np.uint16)
    counts = [0] * len(weights)
    for i in range(num_samples):
        step = float(i or 1)
        most = corpora[0]
        largest = weights[most] * step - counts[most]
        for corpus in corpora[1:]:
            lag = weights[corpus] * step - counts[corpus]
            if lag > largest:
                most, largest = corpus, lag
        counts[most] += 1
        order[i] = most
    return order


def interleaved_order(sizes: Sequence[int]) -> np.ndarray:
    """Return an order with every sample of every corpus exactly once, evenly spread; uint8 or uint16."""
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    corpora = np.repeat(np.arange(len(sizes), dtype=np.uint8 if len(sizes) < 256 else np.uint16), sizes)
    return corpora[np.argsort(places, kind="stable")]


def positions_within(order: np.ndarray) -> np.ndarray:
    """Return, for each entry of an order, how many earlier entries are of the same corpus; int64."""
    positions = np.empty(len(order), np.int64)
    for corpus in np.unique(order):
        chosen = order == corpus
        positions[chosen] = np.arange(np.count_nonzero(chosen))
    return positions


class BlendedDataset:
    """Samples of several corpora in one order; a corpus that runs out starts again.

    Args:
        datasets: the corpora.
        order: which corpus each sample comes from, see `blend_order`.
    """

    def __init__(self, datasets: Sequence[SampleSource], order: np.ndarray) -> None:
        self.datasets = list(datasets)
        self.dataset_index = order
        self.sample_index = positions_within(order)

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> Sample:
        dataset, number = self._place(index)
        return dataset[number]

    def origin(self, index: int) -> dict[str, Any]:
        """See SampleSource."""
        dataset, number = self._place(index)
        return dataset.origin(number)

    def _place(self, index: int) -> tuple[SampleSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        dataset = self.datasets[int(self.dataset_index[index])]
        return dataset, int(self.sample_index[index]) % len(dataset)


def split_boundaries(split: str, size: int) -> list[int]:
    """Return [0, end of train, end of validation, end of test] for a split such as "969, 30, 1" of `size`
    documents.

    Args:
        split: one to three shares, separated by commas or slashes; missing ones are 0.
        size: documents in all; the last boundary equals it.

    Raises:
        DataError: the split is not of that form.
    """
    try:
        shares = [float(share) for share in re.split(r"[,/]", split)]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or sum(shares) <= 0:
        raise DataError(f"split: '{split}' is not one to three shares such as '969, 30, 1'")
    shares += [0.0] * (3 - len(shares))
    total = sum(shares)
    ends = list(accumulate(round(share / total * size) for share in shares))
    overshoot = ends[-1] - size  # rounding each share may give too many or too few; all boundaries move alike
    return [0, *(end - overshoot for end in ends)]
