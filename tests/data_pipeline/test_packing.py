"""Sample orders against upstream's arrays, byte for byte, and against a plain walk over the documents."""

import re
from pathlib import Path

import numpy as np
import pytest
from data_pipeline.golden_files import FOLDER, LABEL, TEXT, copy_corpus, read_json

from neox.data import IndexedDataset
from neox.data.gpt_dataset import GPTDataset, PackingOptions, build_gpt_dataset
from neox.data.packing import packed_maps
from neox.errors import DataError

PATTERN = re.compile(
    rf"{TEXT}_(?P<name>\w+)_indexmap_(?P<ns>\w+)ns_(?P<seq>\d+)sl_(?P<seed>\d+)s_"
    r"(?P<impl>\w+)pi(?P<ac>_ac)?_sample_idx.npy"
)
ORDERS = sorted(path.name for path in FOLDER.glob("*_sample_idx.npy"))
DOCUMENTS = {("train", "7"): range(80), ("valid", "7"): range(80, 95)}


def _build(name: str, folder: Path) -> GPTDataset:
    """Build the order that upstream kept under a file name."""
    found = PATTERN.fullmatch(name)
    assert found, name
    prefix = copy_corpus(folder)
    labelled = "lab" in found["name"]
    packing = PackingOptions(
        seq_length=int(found["seq"]),
        seed=int(found["seed"]),
        pack_impl=found["impl"],
        allow_chopped=found["ac"] is not None,
    )
    return build_gpt_dataset(
        IndexedDataset(prefix),
        packing,
        name=found["name"],
        documents=DOCUMENTS.get((found["name"], found["seed"]), range(100)),
        num_samples=None if found["ns"] == "None" else int(found["ns"]),
        num_epochs=2,  # of the one order without a number of samples
        labels=IndexedDataset(folder / LABEL) if labelled else None,
    )


@pytest.mark.parametrize("name", ORDERS)
def test_files_are_upstreams_byte_for_byte(name: str, tmp_path: Path) -> None:
    _build(name, tmp_path)
    for field in ("doc_idx", "sample_idx", "shuffle_idx"):
        file = name.replace("sample_idx", field)
        assert (tmp_path / file).read_bytes() == (FOLDER / file).read_bytes(), file


def test_packed_samples_are_upstreams(tmp_path: Path) -> None:
    golden = read_json("dataset_items.json")["packed"]
    dataset = _build(f"{TEXT}_item_packed_indexmap_12ns_32sl_1234s_packedpi_ac_sample_idx.npy", tmp_path)
    assert len(dataset) == golden["len"] + 1  # the true number; upstream hides the last sample
    for number, item in enumerate(golden["items"]):
        assert dataset[number]["tokens"].tolist() == item["text"]
        assert dataset[number]["tokens"].dtype == np.int64
        assert "labels" not in dataset[number]


@pytest.mark.parametrize(("kind", "impl"), [("overflow_lab", "pack_until_overflow"), ("unpacked_lab", "unpacked")])
def test_padded_samples_are_upstreams_without_the_stray_token(kind: str, impl: str, tmp_path: Path) -> None:
    dataset = _build(f"{TEXT}_item_{kind}_indexmap_12ns_32sl_1234s_{impl}pi_ac_sample_idx.npy", tmp_path)
    for number, golden in enumerate(read_json("dataset_items.json")[kind]["items"]):
        if dataset.maps.sample_idx[int(dataset.maps.shuffle_idx[number]) + 1][0] == len(dataset.maps.doc_idx):
            continue  # upstream cannot read past the last document, and gives sample 0 instead
        sample = dataset[number]
        tokens, labels = np.array(golden["text"]), np.array(golden["label"])
        stray = np.flatnonzero(tokens)[-1]  # upstream reads one token into the next document
        assert tokens[stray] == 220
        assert labels[stray] == -100
        tokens[stray] = 0
        np.testing.assert_array_equal(sample["tokens"], tokens)
        np.testing.assert_array_equal(sample["labels"], labels)


def test_padding_is_masked_without_label_files(tmp_path: Path) -> None:
    tokens = IndexedDataset(copy_corpus(tmp_path))
    packing = PackingOptions(seq_length=40, seed=3, pack_impl="pack_until_overflow")
    dataset = build_gpt_dataset(tokens, packing, name="valid", documents=range(40, 70), num_samples=50)
    assert set(np.unique(dataset.maps.doc_idx)) <= set(range(40, 70))  # the split is kept
    for sample in (dataset[i] for i in range(len(dataset))):
        padding = sample["labels"] == -100
        np.testing.assert_array_equal(sample["labels"][~padding], sample["tokens"][~padding])
        assert (sample["tokens"][padding] == 0).all()
        assert not padding[:2].any()


def _walk(sizes: list[int], seq_length: int, count: int) -> list[tuple[int, int]]:
    """Find sample starts the slow way: step through the documents token by token."""
    places = [(document, offset) for document, size in enumerate(sizes) for offset in range(size)]
    return [(0, 0), *(places[number * seq_length] for number in range(1, count + 1))]


@pytest.mark.parametrize("seed", range(8))
def test_packing_equals_a_plain_walk(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = (rng.geometric(0.03, 400) * (rng.random(400) > 0.2)).astype(np.int32)  # a fifth are empty
    seq_length = int(rng.integers(1, 70))
    maps = packed_maps(sizes, np.arange(20, 380), seq_length=seq_length, num_epochs=3, seed=seed)
    assert len(maps.shuffle_idx) == (3 * int(sizes[20:380].sum()) - 1) // seq_length
    wanted = _walk(sizes[maps.doc_idx].tolist(), seq_length, len(maps.shuffle_idx))
    assert [tuple(row) for row in maps.sample_idx.tolist()] == wanted
    assert sorted(maps.doc_idx.tolist()) == sorted([*range(20, 380)] * 3)
    assert sorted(maps.shuffle_idx.tolist()) == list(range(len(maps.shuffle_idx)))


def test_locating_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = np.random.default_rng(0).integers(0, 50, 300).astype(np.int32)
    whole = packed_maps(sizes, np.arange(300), seq_length=7, num_epochs=2, seed=1)
    monkeypatch.setattr("neox.data.packing.CHUNK", 13)
    parts = packed_maps(sizes, np.arange(300), seq_length=7, num_epochs=2, seed=1)
    np.testing.assert_array_equal(whole.sample_idx, parts.sample_idx)


def test_every_token_is_predicted_once_in_an_epoch(tmp_path: Path) -> None:
    tokens = IndexedDataset(copy_corpus(tmp_path))
    packing = PackingOptions(seq_length=16, seed=5)
    dataset = build_gpt_dataset(tokens, packing, name="train", documents=range(100), num_samples=None)
    stream = np.concatenate([tokens[int(item)] for item in dataset.maps.doc_idx])
    starts = np.empty(len(dataset), int)
    starts[np.arange(len(dataset))] = dataset.maps.shuffle_idx
    for number, sample in enumerate(starts):
        np.testing.assert_array_equal(dataset[number]["tokens"], stream[sample * 16 : sample * 16 + 17])
    assert len(dataset) == (len(stream) - 1) // 16


def test_labels_follow_the_tokens(tmp_path: Path) -> None:
    tokens = IndexedDataset(copy_corpus(tmp_path))
    labels = IndexedDataset(tmp_path / LABEL)
    dataset = build_gpt_dataset(
        tokens,
        PackingOptions(seq_length=20, seed=1),
        name="l",
        documents=range(100),
        num_samples=9,
        labels=labels,
    )
    masked = 0
    for sample in (dataset[i] for i in range(len(dataset))):
        kept = sample["labels"] != -100
        np.testing.assert_array_equal(sample["labels"][kept], sample["tokens"][kept])
        masked += np.count_nonzero(~kept)
    assert masked >= 3 * 80  # three tokens of each document


def test_too_little_text_is_explained(tmp_path: Path) -> None:
    tokens = IndexedDataset(copy_corpus(tmp_path))
    with pytest.raises(DataError, match="6 tokens in 1 documents are too few"):
        build_gpt_dataset(
            tokens, PackingOptions(seq_length=64, seed=1), name="t", documents=range(1, 2), num_samples=None
        )


def test_labels_of_another_corpus_are_refused(tmp_path: Path) -> None:
    tokens = IndexedDataset(copy_corpus(tmp_path))
    other = IndexedDataset(FOLDER / "enwik100_cached")
    with pytest.raises(DataError, match="other lengths"):
        build_gpt_dataset(
            tokens,
            PackingOptions(seq_length=8, seed=1),
            name="t",
            documents=range(10),
            num_samples=5,
            labels=other,
        )
