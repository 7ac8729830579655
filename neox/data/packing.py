"""The order in which documents become samples: three arrays computed from document lengths and a seed.

Sample i of a dataset is entry `shuffle_idx[i]` of `sample_idx`, which says where in the sequence of documents
`doc_idx` it starts. All three are, byte for byte, what upstream's training runs used, so an old run can be
continued or replayed. Everything here is a pure function; `neox.data.index_cache` keeps the results on disk.

Three ways to pack:

* packed: documents are laid end to end and cut every S tokens; a sample takes S + 1 tokens and shares one
  with
  the next, so that every token is predicted once.
* pack_until_overflow: whole documents are appended while they fit in S + 1 tokens.
* unpacked: one document a sample, in corpus order.
"""

from typing import NamedTuple

import numpy as np

from neox.data.stored import Rows

CHUNK = 1 << 22  # samples located at a time, which bounds the temporary memory


class IndexMaps(NamedTuple):
    """The order of one dataset's M samples.

    Attributes:
        doc_idx: int [L], item numbers in reading order.
        sample_idx: int [M + 1, 2], where each sample starts: position in `doc_idx`, token offset in that
            item.
        shuffle_idx: int [M], the order in which samples are given out.
    """

    doc_idx: Rows
    sample_idx: Rows
    shuffle_idx: Rows


def packed_sample_count(tokens: int, seq_length: int) -> int:
    """Return how many samples of S + 1 tokens, each sharing one with the next, `tokens` tokens give."""
    return max(0, (tokens - 1) // seq_length)


def epochs_needed(tokens_per_epoch: int, seq_length: int, num_samples: int) -> int:
    """Return the fewest passes (at least one) over the documents that give `num_samples` packed samples."""
    return max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))


def packed_maps(sizes: np.ndarray, documents: np.ndarray, *, seq_length: int, num_epochs: int, seed: int) -> IndexMaps:
    """Return the maps of the "packed" way.

    Args:
        sizes: int [I], tokens per item of the corpus.
        documents: int [L], the items that belong to this split.
        seq_length: S.
        num_epochs: passes over `documents`; they are shuffled together, so epochs mix.
        seed: of the shuffles; order of the random draws is documents, then samples.
    """
    rng = np.random.RandomState(seed)
    doc_idx = np.tile(documents.astype(np.int32), num_epochs)
    rng.shuffle(doc_idx)
    ends = np.cumsum(sizes[doc_idx], dtype=np.int64)
    sample_idx = _packed_sample_idx(ends, seq_length)
    shuffle_idx = _sample_numbers(len(sample_idx) - 1)
    rng.shuffle(shuffle_idx)
    return IndexMaps(doc_idx, sample_idx, shuffle_idx)


def _packed_sample_idx(ends: np.ndarray, seq_length: int) -> np.ndarray:
    """Locate token 0, S, 2S, ... among documents that end at the given positions; int [samples + 1, 2]."""
    count = packed_sample_count(int(ends[-1]), seq_length)
    wide = max(2 * (count + 1), len(ends)) >= np.iinfo(np.int32).max
    sample_idx = np.empty((count + 1, 2), np.int64 if wide else np.int32)
    for first in range(0, count + 1, CHUNK):
        last = min(first + CHUNK, count + 1)
        position = np.arange(first, last, dtype=np.int64) * seq_length
        document = np.searchsorted(ends, position, side="right")
        sample_idx[first:last, 0] = document
        sample_idx[first:last, 1] = position - np.where(document > 0, ends[document - 1], 0)
    sample_idx[0] = 0  # even if the first documents are empty, as upstream's walk has it
    return sample_idx


def _sample_numbers(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64 if count >= np.iinfo(np.uint32).max - 1 else np.uint32)


def overflow_maps(
    sizes: np.ndarray,
    documents: np.ndarray,
    *,
    eligible: np.ndarray,
    seq_length: int,
    num_samples: int,
    seed: int,
) -> IndexMaps:
    """Return the maps of the "pack_until_overflow" way.

    Args:
        sizes: int [I], tokens per item of the corpus.
        documents: int [L], the items that belong to this split.
        eligible: bool [L], False where an item is passed over (all its labels masked, or too long to keep
            whole).
        seq_length: S; a sample holds documents of at most S + 1 tokens together, or one longer one to be cut.
        num_samples: M.
        seed: of the shuffles; order of the random draws is samples, then the documents of each pass.
    """
    assert eligible.any(), "no document is eligible for packing"
    rng = np.random.RandomState(seed)
    shuffle_idx = np.arange(num_samples)
    rng.shuffle(shuffle_idx)
    order = np.arange(len(documents))
    starts: list[int] = []
    read: list[np.ndarray] = []
    room = 0
    while len(starts) < num_samples:
        rng.shuffle(order)
        kept = documents[order[eligible[order]]]
        taken, room = _fill_samples(
            sizes[kept],
            starts,
            first=sum(map(len, read)),
            room=room,
            capacity=seq_length + 1,
            num_samples=num_samples,
        )
        read.append(kept[:taken])
    doc_idx = np.concatenate(read).astype(np.int64)
    sample_idx = np.zeros((num_samples + 1, 2), np.int64)
    sample_idx[:, 0] = [*starts, len(doc_idx)]
    return IndexMaps(doc_idx, sample_idx, shuffle_idx)


def _fill_samples(
    lengths: np.ndarray, starts: list[int], *, first: int, room: int, capacity: int, num_samples: int
) -> tuple[int, int]:
    """Append to `starts` the position of each document that opens a sample; stop where the last one opens.

    Returns:
        How many documents were taken, and the tokens still free in the open sample (negative if it
        overflows).
    """
    for taken, length in enumerate(lengths.tolist(), start=1):
        if length > room or not starts:
            starts.append(first + taken - 1)
            room = capacity
        room -= length
        if len(starts) == num_samples:
            return taken, room
    return len(lengths), room


def unpacked_maps(documents: np.ndarray, *, eligible: np.ndarray, num_samples: int, seed: int) -> IndexMaps:
    """Return the maps of the "unpacked" way: eligible documents in corpus order, repeated where they run out.

    Args:
        documents: int [L], the items that belong to this split.
        eligible: bool [L], False where an item is passed over.
        num_samples: M; one document more than M is listed, as the end of the last sample.
        seed: of the shuffle of samples.
    """
    assert eligible.any(), "no document is eligible"
    shuffle_idx = np.arange(num_samples)
    np.random.RandomState(seed).shuffle(shuffle_idx)
    doc_idx = np.resize(documents[eligible], num_samples + 1).astype(np.int64)
    sample_idx = np.zeros((num_samples + 1, 2), np.int64)
    sample_idx[:, 0] = np.arange(num_samples + 1)
    return IndexMaps(doc_idx, sample_idx, shuffle_idx)
