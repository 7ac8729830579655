"""Documents that are scored whole, one a row: pairs of a preferred and a rejected one, or each with a reward.

Labels say which tokens are scored. Rewards, and what a reference model thinks of each token, are further indexed files
beside the documents.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from neox.data.gpt_dataset import IGNORED_LABEL, PADDING_TOKEN, PackingOptions, Sample
from neox.data.index_cache import Coordinator, cached_maps, map_stem
from neox.data.indexed import IndexedDataset, open_corpus
from neox.data.packing import IndexMaps, unpacked_maps
from neox.errors import DataError

if TYPE_CHECKING:
    from neox.config import Config

LARGEST_REWARD = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ScoredDocuments:
    """Documents and all that lies beside them, document by document.

    Attributes:
        tokens: the documents.
        labels: the tokens again, -100 where one is not scored.
        rewards: float, one a document or one a token; None where there are none.
        reference: float32, at each token the log-probability that a reference model gives the next one (the last has
            any value, NaN stands where it has not read); None where a reference model runs.
    """

    tokens: IndexedDataset
    labels: IndexedDataset
    rewards: IndexedDataset | None = None
    reference: IndexedDataset | None = None

    def check(self) -> None:
        """Compare the files beside the documents with the documents.

        Raises:
            DataError: one has other documents.
        """
        for found in (self.labels, self.reference):
            if found is not None and not np.array_equal(found.sizes, self.tokens.sizes):
                raise _misfit(found, "its documents have other lengths than those", self.tokens)
        if self.rewards is not None:
            if len(self.rewards) != len(self.tokens):
                raise _misfit(
                    self.rewards, f"{len(self.rewards)} rewards for the {len(self.tokens)} documents", self.tokens
                )
            sizes = np.asarray(self.rewards.sizes)
            if not ((sizes == 1) | (sizes == np.asarray(self.tokens.sizes))).all():
                raise _misfit(self.rewards, "expected one reward a document, or one a token,", self.tokens)

    def usable(self, capacity: int, *, allow_chopped: bool) -> np.ndarray:
        """Tell which documents have a scored token within `capacity` tokens, and fit if they must; bool [documents]."""
        numbers = range(len(self.tokens))
        scored = ((self.labels.get(number)[1:capacity] != IGNORED_LABEL).any() for number in numbers)
        kept = np.fromiter(scored, bool, len(numbers))
        return kept if allow_chopped else kept & (np.asarray(self.tokens.sizes) <= capacity)

    def row(self, document: int, length: int) -> Sample:
        """A document cut or padded to `length`: `tokens`, `labels`, and where there are any `rewards`, `reference`."""
        labels = self.labels.get(document)
        sample = {
            "tokens": _fit(self.tokens.get(document), length, PADDING_TOKEN, np.int64),
            "labels": _fit(labels, length, IGNORED_LABEL, np.int64),
        }
        if self.rewards is not None:
            given = self.rewards.get(document)
            scored = given if len(given) != len(labels) else given[labels != IGNORED_LABEL]
            sample["rewards"] = np.array(scored.mean(dtype=np.float64), np.float32)
        if self.reference is not None:
            sample["reference"] = _fit(self._known_reference(document, labels[1:length]), length, 0, np.float32)
        return sample

    def _known_reference(self, document: int, targets: np.ndarray) -> np.ndarray:
        """What the reference model thinks of a document, 0 where it has not read on and nothing is scored."""
        assert self.reference is not None, "there is a file of it"
        values = self.reference.get(document)
        if np.isnan(values[: len(targets)][targets != IGNORED_LABEL]).any():
            raise DataError(
                f"{self.reference.prefix}: has nothing on the end of document {document}, for it was made with a "
                "smaller seq_length; make it again with that of the run (text_gen_type: precompute)"
            )
        return np.nan_to_num(values, nan=0.0)


def _misfit(found: IndexedDataset, what: str, tokens: IndexedDataset) -> DataError:
    return DataError(f"{found.prefix}: {what} of {tokens.prefix}; make both from the same text")


def _fit(values: np.ndarray, length: int, filler: float, dtype: Any) -> np.ndarray:
    row = np.full(length, filler, dtype)
    row[: min(length, len(values))] = values[:length]
    return row


class CompletionDataset:
    """Scored documents in a fixed, seeded order; each once before any comes again.

    Item i is {"tokens", "labels": int64 [S + 1], "reference": float32 [S + 1], "rewards": float32 []}, the last two
    where there are any. A pair has one more dimension at the front of each: the preferred document, then the rejected.

    Args:
        sides: the documents; or the preferred and the rejected ones.
        maps: the order, see `neox.data.packing.unpacked_maps`.
        seq_length: S.
    """

    def __init__(self, sides: tuple[ScoredDocuments, ...], maps: IndexMaps, seq_length: int) -> None:
        self.sides = sides
        self.maps = maps
        self.seq_length = seq_length

    def __len__(self) -> int:
        return len(self.maps.shuffle_idx)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        document = self._document(index)
        rows = [side.row(document, self.seq_length + 1) for side in self.sides]
        if len(rows) == 1:
            return rows[0]
        return {field: np.stack([row[field] for row in rows]) for field in rows[0]}

    def origin(self, index: int) -> dict[str, Any]:
        """See `neox.data.blending.SampleSource`; the dataset of a pair is that of its preferred documents."""
        prefix = str(self.sides[0].tokens.prefix)
        return {"dataset": prefix, "sample": index, "documents": [self._document(index)]}

    def _document(self, index: int) -> int:
        return int(self.maps.doc_idx[self.maps.shuffle_idx[index]])


@dataclass(frozen=True)
class CompletionSource:
    """One set of scored documents, under the name that its order is kept by."""

    name: str
    sides: tuple[ScoredDocuments, ...]

    @property
    def tokens(self) -> IndexedDataset:
        """The documents, the preferred ones of pairs."""
        return self.sides[0].tokens

    @cached_property
    def files(self) -> tuple[IndexedDataset, ...]:
        """Every file that the order depends on."""
        return tuple(file for side in self.sides for file in (side.tokens, side.labels))

    def build(self, packing: PackingOptions, num_samples: int, coordinator: Coordinator) -> CompletionDataset:
        """The samples, with their order taken from disk or computed.

        Raises:
            DataError: no document has anything to score.
        """
        stem = map_stem(
            self.tokens.prefix,
            name=self.name,
            num_samples=num_samples,
            seq_length=packing.seq_length,
            seed=packing.seed,
            pack_impl=packing.pack_impl,
            chopped=len(self.sides) == 1 and packing.allow_chopped,  # upstream's names of pairs never say so
        )
        fingerprint = {
            "files": [file.fingerprint_with_content_date for file in self.files],
            "allow_chopped": packing.allow_chopped,
        }
        maps = cached_maps(
            stem,
            fingerprint,
            partial(self._order, packing, num_samples),
            coordinator=coordinator,
            use_shared_fs=packing.use_shared_fs,
            patience=self.tokens.patience,
        )
        return CompletionDataset(self.sides, maps, packing.seq_length)

    def _order(self, packing: PackingOptions, num_samples: int) -> IndexMaps:
        capacity = packing.seq_length + 1
        usable = [side.usable(capacity, allow_chopped=packing.allow_chopped) for side in self.sides]
        eligible = np.logical_and.reduce(usable)
        if not eligible.any():
            raise DataError(
                f"{self.tokens.prefix}: no document is usable (nothing labelled within seq_length, or too long)"
            )
        return unpacked_maps(np.arange(len(eligible)), eligible=eligible, num_samples=num_samples, seed=packing.seed)


def completion_sources(config: "Config", split: str) -> list[CompletionSource]:
    """Open the scored documents of a split; empty where none are named.

    Raises:
        DataError: a file is missing or damaged, or does not fit another.
    """
    comparison, data = config.comparison, config.data
    if comparison.is_pairwise:
        columns = [_opened(config, comparison, f"{side}_{split}") for side in ("pos", "neg")]
    else:
        columns = [_opened(config, data, split)]
    sources = [CompletionSource(f"{split}_{n}", sides) for n, sides in enumerate(zip(*columns, strict=True))]
    for source in sources:
        first, last = source.sides[0].tokens, source.sides[-1].tokens
        if len(first) != len(last):
            raise DataError(
                f"{last.prefix}: {len(last)} documents, and {first.prefix} has {len(first)}; a pair needs one of each"
            )
    return sources


def _opened(config: "Config", section: Any, which: str) -> Iterable[ScoredDocuments]:
    """Documents of `<which>_data_paths` with their labels, and the rewards and log-probabilities that are asked for."""
    open_one = partial(open_corpus, config)
    paths = getattr(section, f"{which}_data_paths") or ()
    labels = getattr(section, f"{which}_label_data_paths") or ()
    rewards = getattr(config.comparison, f"{which}_reward_data_paths", None) or (None,) * len(paths)
    name = config.reference_files
    found = [
        ScoredDocuments(
            open_one(path),
            open_one(label, "labels"),
            open_one(reward, "numbers") if reward else None,
            open_one(f"{path}_{name}", "numbers") if name else None,
        )
        for path, label, reward in zip(paths, labels, rewards, strict=True)
    ]
    for documents in found:
        documents.check()
    return found
