"""Samples of S + 1 tokens from one corpus: the inputs are the first S, the targets the last S."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from neox.data.index_cache import SINGLE_PROCESS, Coordinator, cached_maps, map_stem
from neox.data.indexed import IndexedDataset
from neox.data.packing import (
    IndexMaps,
    epochs_needed,
    overflow_maps,
    packed_maps,
    packed_sample_count,
    unpacked_maps,
)
from neox.errors import DataError

IGNORED_LABEL = -100  # a label that takes no part in the loss
PADDING_TOKEN = 0

Sample = dict[str, np.ndarray]


@dataclass(frozen=True)
class PackingOptions:
    """How documents become samples.

    Attributes:
        seq_length: S.
        seed: of the sample order.
        pack_impl: "packed", "pack_until_overflow" or "unpacked", see `neox.data.packing`.
        allow_chopped: keep documents longer than S + 1 tokens, cut; "packed" cuts in any case.
        use_shared_fs: one cache of the sample order for all machines, rather than one on each.
        numbers_documents: samples say which of their tokens belong together.
    """

    seq_length: int
    seed: int
    pack_impl: str = "packed"
    allow_chopped: bool = True
    use_shared_fs: bool = True
    numbers_documents: bool = False


class GPTDataset:
    """Samples of one corpus in a fixed, seeded order.

    Item i is {"tokens": int64 [S + 1]} and, where there are label files or padding, {"labels": int64 [S +
    1]}: the label of a token is that token, or -100 where it must not be learnt. "packed" samples are full;
    the other two kinds are padded with token 0 and label -100, and hold nothing of the document that follows
    (upstream's hold its first token).

    Where documents are numbered a sample also has {"documents": int64 [S + 1]}, the number of each token's document
    within the sample, from 0. It follows from the index alone, never from a token that may end a document. A document
    that the sample cuts is there as a piece, which counts as a document; padding comes after the last.

    The length is the true number of samples. Upstream reports one fewer, and wraps round one earlier; all
    samples before that are the same.

    Args:
        tokens: the corpus.
        maps: the sample order, see `neox.data.packing`.
        packing: how documents become samples.
        labels: a corpus of the same shape that holds the label of each token.
    """

    def __init__(
        self,
        tokens: IndexedDataset,
        maps: IndexMaps,
        packing: PackingOptions,
        *,
        labels: IndexedDataset | None = None,
    ) -> None:
        self.tokens = tokens
        self.maps = maps
        self.packing = packing
        self.labels = labels

    def __len__(self) -> int:
        return len(self.maps.shuffle_idx)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        parts = self._parts(int(self.maps.shuffle_idx[index]))
        pieces = [self.tokens.get(*part) for part in parts]
        sample = {"tokens": np.concatenate(pieces, dtype=np.int64)}
        if self.packing.numbers_documents:
            lengths = [len(piece) for piece in pieces if len(piece)]
            sample["documents"] = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
        if self.labels:
            sample["labels"] = np.concatenate([self.labels.get(*part) for part in parts], dtype=np.int64)
        return sample if self.packing.pack_impl == "packed" else self._padded(sample)

    def _padded(self, sample: Sample) -> Sample:
        wanted = self.packing.seq_length + 1
        padded = {
            "tokens": _pad(sample["tokens"], wanted, PADDING_TOKEN),
            "labels": _pad(sample.get("labels", sample["tokens"]), wanted, IGNORED_LABEL),
        }
        if "documents" in sample:
            padded["documents"] = _pad(sample["documents"], wanted, int(sample["documents"][-1]) + 1)
        return padded

    def origin(self, index: int) -> dict[str, Any]:
        """See `neox.data.blending.SampleSource`."""
        documents = [item for item, _, _ in self._parts(int(self.maps.shuffle_idx[index]))]
        return {"dataset": str(self.tokens.prefix), "sample": index, "documents": documents}

    def _parts(self, sample: int) -> list[tuple[int, int, int | None]]:
        """Return the pieces (item, offset, length or None for the rest) that make up a sample, in order."""
        (first, offset), (last, end) = self.maps.sample_idx[sample : sample + 2].tolist()
        if self.packing.pack_impl != "packed":
            return [(int(item), 0, None) for item in self.maps.doc_idx[first:last]]
        items = self.maps.doc_idx[first : last + 1].tolist()
        if first == last:
            return [(items[0], offset, end + 1 - offset)]
        middle = [(item, 0, None) for item in items[1:-1]]
        return [(items[0], offset, None), *middle, (items[-1], 0, end + 1)]


def _pad(row: np.ndarray, length: int, value: int) -> np.ndarray:
    """Cut or fill a row to a length."""
    padded = np.full(length, value, np.int64)
    padded[: min(length, len(row))] = row[:length]
    return padded


def build_gpt_dataset(
    tokens: IndexedDataset,
    packing: PackingOptions,
    *,
    name: str,
    documents: range,
    num_samples: int | None,
    num_epochs: int = 1,
    labels: IndexedDataset | None = None,
    coordinator: Coordinator = SINGLE_PROCESS,
) -> GPTDataset:
    """Return the samples of a range of documents, with their order taken from disk or computed.

    Args:
        tokens: the corpus.
        packing: how documents become samples.
        name: "train", "valid_1", ...: part of the cache's file name.
        documents: the items to use.
        num_samples: at least so many samples; None for all of `num_epochs` passes ("packed" only).
        num_epochs: passes over the documents if `num_samples` is None.
        labels: label files of the same shape.
        coordinator: the processes that make this call together.

    Raises:
        DataError: the corpus is too small, or the labels do not fit the tokens.
    """
    if labels is not None:
        _check_labels(tokens, labels)
    stem = map_stem(
        tokens.prefix,
        name=name,
        num_samples=num_samples,
        seq_length=packing.seq_length,
        seed=packing.seed,
        pack_impl=packing.pack_impl,
        chopped=packing.allow_chopped,
    )
    build = partial(
        _build_maps, tokens, packing, documents, num_samples=num_samples, num_epochs=num_epochs, labels=labels
    )
    maps = cached_maps(
        stem,
        _fingerprint(tokens, packing, documents, num_epochs, labels),
        build,
        coordinator=coordinator,
        use_shared_fs=packing.use_shared_fs,
        patience=tokens.patience,
    )
    return GPTDataset(tokens, maps, packing, labels=labels)


def _build_maps(
    tokens: IndexedDataset,
    packing: PackingOptions,
    documents: range,
    *,
    num_samples: int | None,
    num_epochs: int,
    labels: IndexedDataset | None,
) -> IndexMaps:
    for corpus in (tokens, labels):
        if corpus is not None:
            corpus.check_items()
    items = np.arange(documents.start, documents.stop)
    if packing.pack_impl == "packed":
        return _build_packed(tokens, packing, items, num_samples, num_epochs)
    if num_samples is None:
        raise DataError(f"train_epochs needs pack_impl: packed, not {packing.pack_impl}; give train_iters instead")
    eligible = _eligible(tokens, packing, items, labels)
    if not eligible.any():
        raise DataError(f"{tokens.prefix}: no document of {documents} is usable (all masked, empty or too long)")
    if packing.pack_impl == "unpacked":
        return unpacked_maps(items, eligible=eligible, num_samples=num_samples, seed=packing.seed)
    return overflow_maps(
        np.asarray(tokens.sizes),
        items,
        eligible=eligible,
        seq_length=packing.seq_length,
        num_samples=num_samples,
        seed=packing.seed,
    )


def _build_packed(
    tokens: IndexedDataset,
    packing: PackingOptions,
    items: np.ndarray,
    num_samples: int | None,
    num_epochs: int,
) -> IndexMaps:
    per_epoch = int(tokens.sizes[items[0] : items[-1] + 1].sum(dtype=np.int64)) if len(items) else 0
    if num_samples is not None and per_epoch:
        num_epochs = epochs_needed(per_epoch, packing.seq_length, num_samples)
    if not packed_sample_count(per_epoch * num_epochs, packing.seq_length):
        raise DataError(
            f"{tokens.prefix}: {per_epoch} tokens in {len(items)} documents are too few for one sample of "
            f"seq_length {packing.seq_length}; use more data or a larger share in split"
        )
    sizes = np.asarray(tokens.sizes)
    return packed_maps(sizes, items, seq_length=packing.seq_length, num_epochs=num_epochs, seed=packing.seed)


def _eligible(
    tokens: IndexedDataset, packing: PackingOptions, items: np.ndarray, labels: IndexedDataset | None
) -> np.ndarray:
    """Tell which items may be packed whole: bool [L]."""
    capacity = packing.seq_length + 1
    sizes = np.asarray(tokens.sizes)[items]
    kept = sizes > 0
    if not packing.allow_chopped:
        kept &= sizes <= capacity
    if labels is not None:
        kept &= np.fromiter(
            ((labels.get(item)[:capacity] != IGNORED_LABEL).any() for item in items.tolist()),
            bool,
            len(items),
        )
    return kept


def _check_labels(tokens: IndexedDataset, labels: IndexedDataset) -> None:
    if not np.array_equal(tokens.sizes, labels.sizes):
        raise DataError(
            f"{labels.prefix}: its documents have other lengths than those of {tokens.prefix}; "
            f"make both from the same text"
        )


def _fingerprint(
    tokens: IndexedDataset,
    packing: PackingOptions,
    documents: range,
    num_epochs: int,
    labels: IndexedDataset | None,
) -> dict[str, Any]:
    """Return what the maps depend on beyond their file name."""
    found: dict[str, Any] = {
        **tokens.fingerprint,
        "documents": [documents.start, documents.stop],
        "num_epochs": num_epochs,
    }
    if labels is not None and packing.pack_impl != "packed":
        found["labels"] = labels.fingerprint_with_content_date
    return found
