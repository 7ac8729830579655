"""From a configuration to datasets, and from datasets to micro-batches."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from data_pipeline.golden_files import FOLDER, LABEL, TEXT, copy_corpus

from neox.config import Config, config_from_dict
from neox.data import (
    BatchLoader,
    Done,
    IndexedDataset,
    IndexedDatasetWriter,
    build_datasets,
    requested_samples,
    train_iters_for_epochs,
)
from neox.errors import DataError

END = 0
"""The token that ends documents here."""


def make_config(**changes: object) -> Config:
    """Return a small configuration; three sequences make a global batch."""
    flat = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "max_position_embeddings": 32}
    flat |= {"seq_length": 32, "train_batch_size": 3, "split": "80,15,5", "seed": 7}
    flat |= {"train_iters": 10, "eval_interval": 4, "eval_iters": 2}
    flat |= changes
    if "train_data_paths" in changes:
        flat = {
            "valid_data_paths": changes["train_data_paths"],
            "test_data_paths": changes["train_data_paths"],
            **flat,
        }
        del flat["split"]
    return config_from_dict({key: value for key, value in flat.items() if value is not None})


def test_requested_samples_follow_upstreams_rule() -> None:
    assert requested_samples(make_config()) == {"train": 30, "valid": 3 * 2 * 3, "test": 6}


def test_a_blend_goes_on_with_new_samples_after_larger_batches(tmp_path: Path) -> None:
    """Ten steps, five of them made: of six samples before, of two from now on."""
    for name in "ab":
        (tmp_path / name).mkdir()
    paths = [str(copy_corpus(tmp_path / name)) for name in "ab"]
    before = build_datasets(make_config(train_data_paths=paths, train_batch_size=6)).train
    config, done = make_config(train_data_paths=paths, train_batch_size=2), Done(steps=5, samples=30)
    after = build_datasets(config, done=done).train
    assert len(after) == 40
    assert [after.origin(place) for place in range(40)] == [before.origin(place) for place in range(40)]
    assert requested_samples(config, Done(steps=8, samples=36)) == requested_samples(config, done)
    assert requested_samples(make_config(), Done(steps=4, samples=12)) == requested_samples(make_config())
    assert requested_samples(make_config(), Done(steps=4, samples=4)) == requested_samples(make_config())


def test_one_path_is_split_as_upstream_splits_it(tmp_path: Path) -> None:
    splits = build_datasets(make_config(data_path=str(copy_corpus(tmp_path))))
    name = f"{TEXT}_train_indexmap_30ns_32sl_7s_packedpi_ac_doc_idx.npy"
    assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    assert sorted(set(splits.valid.maps.doc_idx[:].tolist())) == list(range(80, 95))
    assert sorted(set(splits.test.maps.doc_idx[:].tolist())) == list(range(95, 100))
    assert len(splits.train) == 39


def test_a_split_without_documents_or_batches_is_none(tmp_path: Path) -> None:
    prefix = str(copy_corpus(tmp_path))
    assert build_datasets(make_config(data_path=prefix, split="100,0,0")).valid is None
    assert build_datasets(make_config(data_path=prefix, eval_iters=0)).test is None
    assert build_datasets(make_config(data_path=prefix, do_train=False)).train is None


def _corpus(prefix: Path, value: int, documents: int) -> str:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for number in range(documents):
            writer.add_document(np.full(40 + number % 3, value))
    return str(prefix)


def _fractions(dataset, corpora: int) -> list[float]:
    values = [int(dataset[i]["tokens"][0]) for i in range(len(dataset))]
    return [values.count(value) / len(values) for value in range(corpora)]


def test_listed_paths_are_blended_by_weight(tmp_path: Path) -> None:
    paths = [_corpus(tmp_path / f"c{value}", value, 30) for value in range(3)]
    splits = build_datasets(make_config(train_data_paths=paths, train_data_weights=[5, 3, 2], train_iters=40))
    assert len(splits.train) == 120
    assert _fractions(splits.train, 3) == pytest.approx([0.5, 0.3, 0.2], abs=0.01)
    assert _fractions(splits.valid, 3) == pytest.approx([1 / 3] * 3, abs=0.03)
    assert (tmp_path / "c2_train_2_indexmap_25ns_32sl_7s_packedpi_ac_sample_idx.npy").exists()


@pytest.mark.parametrize("pack_impl", ["packed", "pack_until_overflow", "unpacked"])
def test_a_corpus_of_weight_zero_is_left_out(pack_impl: str, tmp_path: Path) -> None:
    paths = [_corpus(tmp_path / f"c{value}", value, 30) for value in range(2)]
    config = make_config(train_data_paths=paths, train_data_weights=[1, 0], pack_impl=pack_impl)
    assert _fractions(build_datasets(config).train, 2) == [1.0, 0.0]


def test_weights_from_document_counts(tmp_path: Path) -> None:
    paths = [_corpus(tmp_path / "c0", 0, 10), _corpus(tmp_path / "c1", 1, 90)]
    config = make_config(train_data_paths=paths, weight_by_num_documents=True, weighted_sampler_alpha=0.0)
    assert _fractions(build_datasets(config).train, 2) == pytest.approx([0.9, 0.1], abs=0.02)


def test_labels_come_with_listed_paths(tmp_path: Path) -> None:
    prefix = str(copy_corpus(tmp_path))
    config = make_config(train_data_paths=[prefix], train_label_data_paths=[str(tmp_path / LABEL)])
    batch = next(BatchLoader(build_datasets(config).train, micro_batch_size=4))
    kept = batch["labels"] != -100
    assert batch["labels"].shape == (4, 33)
    assert torch.equal(batch["labels"][kept], batch["tokens"][kept])
    assert 0 < kept.sum() < kept.numel()


def test_epochs_read_each_sample_once_a_pass(tmp_path: Path) -> None:
    paths = [_corpus(tmp_path / "c0", 0, 10), _corpus(tmp_path / "c1", 1, 50)]
    config = make_config(train_data_paths=paths, train_epochs=3, train_iters=None)
    train = build_datasets(config).train
    assert sorted(train.place(sample) for sample in range(len(train))) == [
        *((0, i) for i in range((10 * 41 - 2) // 32)), *((1, i) for i in range((50 * 41 - 1 - 1) // 32))
    ]  # fmt: skip
    assert train_iters_for_epochs(config) == len(train) * 3 // 3


def _numbered_by_ends(row: torch.Tensor) -> list[int]:
    """Documents of a row as their last token, END, tells them."""
    is_end = row == END
    return (is_end.cumsum(0) - is_end.long()).tolist()


@pytest.mark.parametrize("pack_impl", ["packed", "pack_until_overflow", "unpacked"])
def test_samples_number_their_documents_as_tokens_at_all_ends_do(pack_impl: str, tmp_path: Path) -> None:
    rng, prefix = np.random.RandomState(0), tmp_path / "ended"
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for _ in range(60):
            writer.add_document(np.append(rng.randint(1, 50, rng.randint(0, 20)), END))
    lists = {"train_data_paths": [str(prefix)], "train_label_data_paths": [str(prefix)], "eval_iters": 0}
    config = make_config(**lists, pack_impl=pack_impl, document_masking=True)
    plain = build_datasets(make_config(**lists, pack_impl=pack_impl)).train
    several = 0
    for sample, without in zip(build_datasets(config).train, plain, strict=True):
        row, numbers = torch.from_numpy(sample["tokens"]), sample.pop("documents")
        kept = len(row) if pack_impl == "packed" else int((sample["labels"] >= 0).sum())
        assert numbers[:kept].tolist() == _numbered_by_ends(row[:kept])
        assert (numbers[kept:] == numbers[kept - 1] + 1).all()  # padding is none of them
        assert all(np.array_equal(sample[name], without[name]) for name in (*sample, *without))
        several += numbers[kept - 1] > 0
    assert several == 0 if pack_impl == "unpacked" else several > len(plain) / 2


@pytest.mark.parametrize("name", [TEXT, "enwik100_cached"])
def test_samples_number_documents_by_the_index_alone(name: str, tmp_path: Path) -> None:
    prefix = copy_corpus(tmp_path, names=(name,))
    corpus = IndexedDataset(prefix)
    train = build_datasets(make_config(data_path=str(prefix), split="1,0,0", document_masking=True)).train
    for number in range(len(train)):
        sample, documents = train[number], train.origin(number)["documents"]
        pieces = [sample["tokens"][sample["documents"] == n] for n in range(len(documents))]
        assert sample["documents"].tolist() == sorted(sample["documents"].tolist())
        for piece, document in zip(pieces[1:-1], documents[1:-1], strict=True):
            assert piece.tolist() == corpus.get(document).tolist()
        assert pieces[-1].tolist() == corpus.get(documents[-1])[: len(pieces[-1])].tolist() or len(pieces) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "set data_path"),
        ({"data_path": "nowhere/corpus"}, r"nowhere/corpus\.idx: no such file"),
    ],
)
def test_mistakes_are_one_line(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        build_datasets(make_config(**changes))
    assert "\n" not in str(caught.value)


class Counted:
    """A dataset of n samples that say their number."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": np.array([index, index + 1])}


def _numbers(batches, count: int) -> list[list[int]]:
    return [batch["tokens"][:, 0].tolist() for batch in islice(batches, count)]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 8, 13, 1000])
def test_ranks_share_each_global_batch_in_order(dp_size: int, start: int) -> None:
    loaders = [
        BatchLoader(Counted(50), micro_batch_size=2, dp_rank=rank, dp_size=dp_size, start=start)
        for rank in range(dp_size)
    ]
    read = [number for _ in range(40) for loader in loaders for number in _numbers(loader, 1)[0]]
    assert read == [(start + i) % 50 for i in range(80 * dp_size)]
    assert all(loader.consumed_samples == start + 80 * dp_size for loader in loaders)


def test_batches_do_not_depend_on_workers_nor_touch_the_random_state() -> None:
    state = torch.get_rng_state()
    runs = []
    for workers in (0, 2):
        loader = BatchLoader(Counted(31), micro_batch_size=3, dp_rank=1, dp_size=2, start=5, num_workers=workers)
        runs.append(_numbers(loader, 25))
    assert runs[0] == runs[1]
    assert runs[0][0] == [8, 9, 10]
    assert torch.equal(torch.get_rng_state(), state)


def test_resuming_continues_where_the_run_stood(tmp_path: Path) -> None:
    train = build_datasets(make_config(data_path=str(copy_corpus(tmp_path)))).train
    whole = BatchLoader(train, micro_batch_size=2, dp_rank=1, dp_size=2, num_workers=2)
    before = [next(whole)["tokens"] for _ in range(7)]
    resumed = BatchLoader(train, micro_batch_size=2, dp_rank=1, dp_size=2, start=whole.consumed_samples)
    assert len(before) == 7
    assert whole.consumed_samples == 28
    for _ in range(9):
        assert torch.equal(next(whole)["tokens"], next(resumed)["tokens"])
