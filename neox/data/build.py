"""From the configuration to the three datasets of a run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neox.data.blending import (
    BlendedDataset,
    SampleSource,
    blend_order,
    interleaved_order,
    normalized_weights,
    share_sizes,
    split_documents,
    weights_by_num_documents,
)
from neox.data.completions import CompletionDataset, CompletionSource, completion_sources
from neox.data.gpt_dataset import GPTDataset, PackingOptions, build_gpt_dataset
from neox.data.index_cache import SINGLE_PROCESS, Coordinator
from neox.data.indexed import IndexedDataset, open_corpus
from neox.data.online import OnlineDataset
from neox.data.packing import packed_sample_count
from neox.errors import DataError

if TYPE_CHECKING:
    from neox.config import Config

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
NAMES = {"train": "training", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class DatasetSplits:
    """The datasets of a run; None where there is nothing to read or nothing is asked for."""

    train: SampleSource | OnlineDataset | None
    valid: SampleSource | OnlineDataset | None
    test: SampleSource | OnlineDataset | None


@dataclass(frozen=True)
class Done:
    """How far a run has come.

    Attributes:
        steps: made.
        samples: read in them; the batch may have been another.
    """

    steps: int = 0
    samples: int = 0


NOTHING = Done()


def requested_samples(config: "Config", done: Done = NOTHING) -> dict[str, int | None]:
    """Return how many samples the run takes of each split; None means one pass over the documents.

    Training takes train_iters batches, or more samples where batches were larger before; validation eval_iters batches
    at every eval_interval steps and once at the end; testing eval_iters batches.
    """
    training, batch = config.training, _global_batch(config)
    if training.train_epochs is not None:
        return dict.fromkeys(SPLITS)
    assert training.train_iters is not None, "the length of the run is not resolved"
    evaluations = training.train_iters // training.eval_interval + 1
    return {
        # A blend ends after so many, and begins again: with samples that the run has seen.
        "train": max(training.train_iters * batch, done.samples + (training.train_iters - done.steps) * batch),
        "valid": evaluations * training.eval_iters * batch,
        "test": training.eval_iters * batch,
    }


def train_iters_for_epochs(config: "Config") -> int:
    """Return the number of steps that `train_epochs` passes over the training data make, the last one full.

    Reads index files only. Give `build_datasets` the configuration that still has train_epochs: then every
    pass has the same order, as upstream's, and takes each sample once; with train_iters passes would mix.

    Raises:
        DataError: a file is missing, or the data do not fill one batch.
    """
    sources = [source for source in _sources(config, "train") if isinstance(source, _Source)]
    seq_length = config.model.seq_length
    samples = sum(packed_sample_count(source.num_tokens, seq_length) for source in sources)
    epochs = config.training.train_epochs
    assert epochs is not None, "train_epochs is not set"
    steps = samples * epochs // _global_batch(config)
    if steps == 0:
        raise DataError(
            f"train_epochs {epochs}: {samples} samples of seq_length {seq_length} "
            f"do not fill one batch of {_global_batch(config)}; use more data or a smaller batch"
        )
    return steps


def _global_batch(config: "Config") -> int:
    size = config.batch.train_batch_size
    assert size is not None, "train_batch_size is not resolved: the configuration has no world size"
    return size


def build_datasets(
    config: "Config", coordinator: Coordinator = SINGLE_PROCESS, *, data_rank: int = 0, done: Done = NOTHING
) -> DatasetSplits:
    """Return the datasets that the configuration names, with their sample orders, for a run that has come so far.

    Every process that shares the coordinator's barrier must make this call. A server of completions is asked only
    when a sample is taken; data-parallel rank `data_rank` asks the one that is its own.

    Raises:
        DataError: no data are named, a file is missing or damaged, or labels do not fit their tokens.
    """
    if config.comparison.dataset_impl == "online":
        return DatasetSplits(**{name: _online(config, name, data_rank) for name in SPLITS})
    if not (config.data.data_path or config.data.train_data_paths or config.comparison.is_pairwise):
        raise DataError("no training data: set data_path, or train_data_paths, valid_data_paths and test_data_paths")
    for line in without_documents(config):
        log.info("%s", line)
    wanted = requested_samples(config, done)
    built = {name: _build_split(config, name, wanted[name], coordinator) for name in SPLITS}
    return DatasetSplits(**built)


def is_wanted(config: "Config", split: str) -> bool:
    """Whether the run reads anything of a split."""
    training = config.training
    if not getattr(training, f"do_{split}"):
        return False
    return training.train_iters != 0 if split == "train" else training.eval_iters > 0


def _online(config: "Config", split: str, data_rank: int) -> OnlineDataset | None:
    if not is_wanted(config, split):
        return None
    servers, vocabulary = config.comparison.servers, config.model.padded_vocab_size
    assert vocabulary is not None, "the vocabulary is resolved before the data are read"
    return OnlineDataset(
        servers[data_rank % len(servers)],
        split,
        seq_length=config.model.seq_length,
        vocabulary=vocabulary,
        leaves_one_out=config.preference.reinforce_leave_one_out,
    )


@dataclass(frozen=True)
class _Source:
    """A range of documents of one corpus, under the name that its sample order is kept by."""

    name: str
    tokens: IndexedDataset
    documents: range
    labels: IndexedDataset | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.sizes[self.documents.start : self.documents.stop].sum(dtype="int64"))


def _build_split(
    config: "Config", split: str, num_samples: int | None, coordinator: Coordinator
) -> SampleSource | None:
    if not is_wanted(config, split):
        return None
    sources = _sources(config, split)
    if not sources:
        return None
    if config.data.data_path:
        return _build_source(config, sources[0], num_samples, coordinator)
    if num_samples is None:
        return _one_pass(config, sources, coordinator)
    weights = _weights(config, split, sources)
    shares = [max(1, share) for share in share_sizes(weights, num_samples)]  # a weight may be 0
    datasets = [
        _build_source(config, source, share, coordinator) for source, share in zip(sources, shares, strict=True)
    ]
    return BlendedDataset(datasets, blend_order(weights, num_samples))


def _one_pass(
    config: "Config", sources: Sequence[_Source | CompletionSource], coordinator: Coordinator
) -> BlendedDataset:
    """Mix corpora so that each sample comes once: the configuration allows train_epochs no other weights."""
    datasets = [_build_source(config, source, None, coordinator) for source in sources]
    return BlendedDataset(datasets, interleaved_order([len(dataset) for dataset in datasets]))


def _build_source(
    config: "Config", source: _Source | CompletionSource, num_samples: int | None, coordinator: Coordinator
) -> GPTDataset | CompletionDataset:
    packing = PackingOptions(
        seq_length=config.model.seq_length,
        seed=config.training.seed,
        pack_impl=config.data.pack_impl,
        allow_chopped=config.data.allow_chopped,
        use_shared_fs=config.data.use_shared_fs,
        numbers_documents=config.data.document_masking,
    )
    if isinstance(source, CompletionSource):
        assert num_samples is not None, "a pass over packed documents is what train_epochs means"
        return source.build(packing, num_samples, coordinator)
    dataset = build_gpt_dataset(
        source.tokens,
        packing,
        name=source.name,
        documents=source.documents,
        num_samples=num_samples,
        labels=source.labels,
        coordinator=coordinator,
    )
    passes = len(dataset.maps.doc_idx) / len(source.documents)
    log.info("%s: %s, %d samples, %.2f passes", source.name, source.tokens.prefix, len(dataset), passes)
    return dataset


def without_documents(config: "Config") -> list[str]:
    """Return a line for each evaluation that `split` leaves without a document.

    Raises:
        DataError: training has none, or an evaluation that the configuration asks for by do_valid or do_test.
    """
    prefix = config.data.data_path
    if prefix is None:
        return []  # the lists are all given
    lines, tokens = [], open_corpus(config, prefix, warmup=False)
    for split, documents in zip(SPLITS, split_documents(config.data.split, len(tokens)), strict=True):
        if documents or not is_wanted(config, split):
            continue
        share = f"{prefix}: split {config.data.split} gives {NAMES[split]} 0 of {len(tokens)} documents"
        if split == "train" or config.given.get(f"do_{split}"):
            raise DataError(f"{share}; give it a larger share, or set do_{split}: false")
        lines.append(f"{share}, so there is no {NAMES[split]}")
    return lines


def _sources(config: "Config", split: str) -> Sequence[_Source | CompletionSource]:
    """Return the corpora of a split; empty if it has no documents."""
    data = config.data
    if config.preference.is_on:
        return completion_sources(config, split)
    if not data.data_path:
        return _listed_sources(config, split)
    tokens = open_corpus(config, data.data_path)
    documents = split_documents(data.split, len(tokens))[SPLITS.index(split)]
    return [_Source(split, tokens, documents)] if documents else []


def _listed_sources(config: "Config", split: str) -> list[_Source]:
    paths = getattr(config.data, f"{split}_data_paths") or []
    label_paths = getattr(config.data, f"{split}_label_data_paths") or [None] * len(paths)
    sources = []
    for number, (path, label_path) in enumerate(zip(paths, label_paths, strict=True)):
        tokens = open_corpus(config, path)
        labels = open_corpus(config, label_path, "labels") if label_path else None
        sources.append(_Source(f"{split}_{number}", tokens, range(len(tokens)), labels))
    return sources


def _weights(config: "Config", split: str, sources: Sequence[_Source | CompletionSource]) -> list[float]:
    """Return the weight of each corpus; they sum to 1."""
    data = config.data
    if data.weight_by_num_documents:
        return weights_by_num_documents([len(source.tokens) for source in sources], data.weighted_sampler_alpha)
    weights = getattr(data, f"{split}_data_weights") or [1.0] * len(sources)
    return normalized_weights(weights)
