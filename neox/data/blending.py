"""Mixing corpora by weight, and the shares of train, validation and test."""

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import ceil, inf
from typing import Any, Protocol

import numpy as np

from neox.data import blend_blocks
from neox.data.gpt_dataset import Sample
from neox.errors import DataError

COUNTED = 4096
"""Samples of a blend whose counts by corpus are kept together."""

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
    if not 0 < total < inf or min(weights) < 0:
        raise DataError(f"data weights {list(weights)}: they must not be negative, and one must be above zero")
    return [weight / total for weight in weights]


def share_sizes(weights: Sequence[float], num_samples: int) -> list[int]:
    """Return how many samples each corpus prepares: ceil(num_samples * weight * 1.005)."""
    return [ceil(num_samples * weight * SAMPLE_MARGIN) for weight in weights]


def weights_by_num_documents(counts: Sequence[int], alpha: float) -> list[float]:
    """Return weights ~ p^alpha * (1 - p), where p is a corpus' share of all documents.

    The second factor damps large corpora, unlike the plain p^alpha of multilingual sampling; a single corpus
    gets weight 1.

    Raises:
        DataError: there is no document.
    """
    if len(counts) == 1:
        return [1.0]
    if not any(counts):
        raise DataError("weight_by_num_documents: none of the datasets has a document")
    shares = [count / sum(counts) for count in counts]
    return normalized_weights([share**alpha * (1 - share) for share in shares])


def blend_order(weights: Sequence[float], num_samples: int) -> np.ndarray:
    """Return the corpus that each sample of a blend comes from, uint8 or uint16 [num_samples].

    Sample i goes to the corpus whose count so far lags most behind weight * max(i, 1) in float64; the first of equals.
    """
    weights_C = np.asarray(weights, np.float64)
    order = np.empty(num_samples, np.uint8 if len(weights) < 256 else np.uint16)
    counts_C, done, blocks = np.zeros(len(weights)), 0, blend_blocks.FEWEST
    while done < num_samples:
        blocks = min(blocks, -(-(num_samples - done) // blend_blocks.BLOCK))
        found_KL, ends_KC = blend_blocks.right_blocks(weights_C, counts_C, done, blocks, order.dtype)
        kept = order[done : done + found_KL.size]
        kept[:] = found_KL.ravel()[: len(kept)]
        counts_C, done = ends_KC[-1], done + found_KL.size
        all_right = len(found_KL) == blocks
        blocks = min(2 * blocks, blend_blocks.MOST) if all_right else max(blocks // 4, blend_blocks.FEWEST)
    return order


def interleaved_order(sizes: Sequence[int]) -> np.ndarray:
    """Return an order with every sample of every corpus exactly once, evenly spread; uint8 or uint16."""
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    corpora = np.repeat(np.arange(len(sizes), dtype=np.uint8 if len(sizes) < 256 else np.uint16), sizes)
    return corpora[np.argsort(places, kind="stable")]


class BlendedDataset:
    """Samples of several corpora in one order; a corpus that runs out starts again.

    Args:
        datasets: the corpora.
        order: which corpus each sample comes from, see `blend_order`.
    """

    def __init__(self, datasets: Sequence[SampleSource], order: np.ndarray) -> None:
        self.datasets = list(datasets)
        self.order = order
        self._before_KC = _counts_before_blocks(order, len(self.datasets))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Sample:
        corpus, number = self.place(index)
        return self.datasets[corpus][number % len(self.datasets[corpus])]

    def origin(self, index: int) -> dict[str, Any]:
        """See SampleSource."""
        corpus, number = self.place(index)
        return self.datasets[corpus].origin(number % len(self.datasets[corpus]))

    def place(self, index: int) -> tuple[int, int]:
        """The corpus that a sample comes from, and how many samples before it come from the same one."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        corpus, start = int(self.order[index]), index - index % COUNTED
        near = int(np.count_nonzero(self.order[start:index] == corpus))
        return corpus, int(self._before_KC[index // COUNTED, corpus]) + near


def _counts_before_blocks(order: np.ndarray, corpora: int) -> np.ndarray:
    """How many samples of each corpus come before sample 0, COUNTED, 2 COUNTED, ...; int64 [blocks, corpora].

    The numbers of all samples would take eight bytes for each, on every rank.
    """
    starts = range(0, len(order), COUNTED)
    counts = [np.bincount(order[start : start + COUNTED], minlength=corpora) for start in starts]
    return np.cumsum([np.zeros(corpora, np.int64), *counts], axis=0)


def split_shares(split: str) -> list[float]:
    """Return the three shares that a split such as "969, 30, 1" gives training, validation and test.

    Args:
        split: one to three numbers, separated by commas or slashes; missing ones are 0.

    Raises:
        DataError: the split is not of that form.
    """
    try:
        shares = [float(share) for share in re.split(r"[,/]", split)]
    except ValueError:
        shares = []
    if not (1 <= len(shares) <= 3 and min(shares) >= 0 and 0 < sum(shares) < inf):
        raise DataError(f"split: '{split}' is not one to three shares such as '969, 30, 1'")
    return shares + [0.0] * (3 - len(shares))


def split_boundaries(split: str, size: int) -> list[int]:
    """Return [0, end of train, end of validation, end of test] of `size` documents; none is below the one before.

    Raises:
        DataError: see `split_shares`.
    """
    shares = split_shares(split)
    total = sum(shares)
    ends = list(accumulate(round(share / total * size) for share in shares))
    overshoot = ends[-1] - size  # rounding each share may give too many or too few; all boundaries move alike
    return [0, *(max(0, end - overshoot) for end in ends)]


def split_documents(split: str, size: int) -> list[range]:
    """Return the documents of training, validation and test; none where the share is 0, whatever rounding left there.

    Raises:
        DataError: see `split_shares`.
    """
    bounds, shares = split_boundaries(split, size), split_shares(split)
    return [
        range(start, stop if share else start) for (start, stop), share in zip(pairwise(bounds), shares, strict=True)
    ]
