"""Reading and writing .bin/.idx against files that upstream wrote."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from data_pipeline.golden_files import FOLDER, LABEL, TEXT, copy_corpus

from neox.data import IndexedDataset, IndexedDatasetWriter
from neox.data.indexed_writer import smallest_token_dtype
from neox.errors import DataError


@pytest.mark.parametrize("name", [TEXT, LABEL, "enwik100_i32_text_document"])
def test_rewriting_upstreams_files_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    corpus = IndexedDataset(FOLDER / name)
    with IndexedDatasetWriter(tmp_path / "copy", corpus.dtype) as writer:
        for document in corpus:
            writer.add_document(document)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"copy{suffix}").read_bytes() == (FOLDER / f"{name}{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.bin", "copy.idx"]


def test_documents_added_together_equal_documents_added_singly(tmp_path: Path) -> None:
    corpus = IndexedDataset(FOLDER / TEXT)
    with IndexedDatasetWriter(tmp_path / "copy", "uint16") as writer:
        writer.add_documents(np.concatenate([corpus[i] for i in range(60)]), corpus.sizes[:60])
        writer.add_documents(np.concatenate([corpus[i] for i in range(60, 100)]), corpus.sizes[60:])
    assert (tmp_path / "copy.idx").read_bytes() == (FOLDER / f"{TEXT}.idx").read_bytes()


def test_cached_format_holds_the_same_documents_as_mmap() -> None:
    cached, mapped = IndexedDataset(FOLDER / "enwik100_cached"), IndexedDataset(FOLDER / TEXT)
    assert cached.index.kind == "cached"
    assert mapped.index.kind == "mmap"
    assert len(cached) == 10
    for item in range(10):
        np.testing.assert_array_equal(cached[item], mapped[item])


def test_get_reads_a_slice() -> None:
    corpus = IndexedDataset(FOLDER / TEXT, data_impl="mmap", warmup=True)
    part = corpus.get(3, offset=5, length=7)
    np.testing.assert_array_equal(part, corpus[3][5:12])


def test_pickle_reopens_the_files() -> None:
    corpus = IndexedDataset(FOLDER / TEXT)
    sent = pickle.dumps(corpus)
    assert len(sent) < 500
    np.testing.assert_array_equal(pickle.loads(sent)[99], corpus[99])


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def stop_halfway() -> None:
        with IndexedDatasetWriter(tmp_path / "half", "uint16") as writer:
            writer.add_document([1, 2, 3])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="70000 do not fit uint16"),
        IndexedDatasetWriter(tmp_path / "x", "u2") as writer,
    ):
        writer.add_document([1, 70_000])


def test_an_empty_corpus_can_be_read(tmp_path: Path) -> None:
    IndexedDatasetWriter(tmp_path / "none", "int32").finalize()
    assert len(IndexedDataset(tmp_path / "none")) == 0


@pytest.mark.parametrize(("size", "dtype"), [(65_499, "uint16"), (65_500, "int32"), (None, "int32")])
def test_token_type_rule(size: int | None, dtype: str) -> None:
    assert smallest_token_dtype(size) == np.dtype(dtype)


def _truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: Path(f"{prefix}.bin").unlink(), r"document\.bin: no such file"),
        (lambda prefix: Path(f"{prefix}.idx").unlink(), r"document\.idx: no such file"),
        (lambda prefix: _truncate(Path(f"{prefix}.bin"), 2), "3086 bytes, but .* lists 1544 tokens"),
        (lambda prefix: _truncate(Path(f"{prefix}.idx"), 8), "2034 bytes, but its header asks for 2042"),
        (lambda prefix: Path(f"{prefix}.idx").write_bytes(b"MMIDIDX\x00\x00abc"), "too short for a header"),
        (lambda prefix: Path(f"{prefix}.idx").write_bytes(b"hello"), "not a dataset index"),
    ],
)
def test_damaged_files_are_named_in_one_line(damage, message: str, tmp_path: Path) -> None:
    prefix = copy_corpus(tmp_path)
    damage(prefix)
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(prefix)
    assert "\n" not in str(caught.value)


def test_a_wrong_data_impl_is_refused() -> None:
    with pytest.raises(DataError, match="data_impl is 'cached' but the file is 'mmap'"):
        IndexedDataset(FOLDER / TEXT, data_impl="cached")


def test_a_prefix_with_extension_is_explained() -> None:
    with pytest.raises(DataError, match=r"give the prefix without \.bin"):
        IndexedDataset(FOLDER / f"{TEXT}.bin")


def test_a_list_of_prefixes_in_the_place_of_one_is_explained() -> None:
    with pytest.raises(DataError, match="one dataset is named here; name several in train_, valid_ and test_data_"):
        IndexedDataset(f"{FOLDER / TEXT},{FOLDER / TEXT}")


@pytest.mark.parametrize(
    ("offset", "kind", "value"),
    [
        (34 + 4 * 7, "<i4", -5),
        (34 + 4 * 7, "<i4", 10**8),
        (34 + 4 * 100 + 8 * 7, "<i8", -2),
        (34 + 4 * 100 + 8 * 7, "<i8", 10**12),
    ],
    ids=["negative size", "large size", "negative place", "far place"],
)
def test_an_item_outside_of_the_tokens_is_named(offset: int, kind: str, value: int, tmp_path: Path) -> None:
    """Neither is it trained on, nor taken for storage that fails and may come back."""
    prefix = copy_corpus(tmp_path)
    index = Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    content[offset : offset + np.dtype(kind).itemsize] = np.array([value], kind).tobytes()
    IndexedDataset(prefix).check_items()
    index.write_bytes(content)
    with pytest.raises(DataError, match=r"\.idx: item 7 does not lie in .*\.bin; damaged, make the pair again"):
        IndexedDataset(prefix).check_items()
