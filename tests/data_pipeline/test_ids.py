"""Token ids that the vocabulary has no row for are found wherever they are read."""

from collections import deque
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data_pipeline.test_build import make_config

from neox.data import BatchLoader, IndexedDataset, IndexedDatasetWriter, build_datasets, indexed
from neox.data.ids import AllowedIds
from neox.data.indexed import open_corpus
from neox.errors import DataError

ROWS = 60
LAST_ROW = 59


def corpus(prefix: Path, odd_one: int, *, place: int = 150, documents: int = 4, dtype: str = "int32") -> str:
    """Documents of 100 tokens below ROWS, one of which is `odd_one`."""
    tokens = np.arange(100 * documents) % ROWS
    tokens[place] = odd_one
    with IndexedDatasetWriter(prefix, np.dtype(dtype)) as writer:
        for document in np.split(tokens, documents):
            writer.add_document(document.astype(dtype))
    return str(prefix)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_an_id_beyond_the_vocabulary_is_named_with_its_corpus_and_the_rows(tmp_path: Path, dtype: str) -> None:
    found = IndexedDataset(corpus(tmp_path / "odd", 60, dtype=dtype), allowed=AllowedIds(ROWS))
    assert found.get(0).tolist() == [n % ROWS for n in range(100)]
    assert found.get(1, 0, 50).max() == LAST_ROW
    for read in (found.check_ids, lambda: found.get(1), lambda: found.get(1, 50, 1)):
        with pytest.raises(DataError, match=r"odd: has token id 60, but the vocabulary of the model has 60 rows"):
            read()
    assert IndexedDataset(found.prefix).get(1)[50] == 60  # nobody said what they are


def test_an_id_below_zero_is_a_label_or_a_mistake(tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "odd", -100)
    with pytest.raises(DataError, match=r"odd: has token id -100, but only labels may be negative"):
        IndexedDataset(prefix, allowed=AllowedIds(ROWS)).get(1)
    labels = IndexedDataset(prefix, allowed=AllowedIds(ROWS, are_labels=True))
    labels.check_ids()
    assert labels.get(1)[50] == -100
    with pytest.raises(DataError, match="token id 60"):
        IndexedDataset(corpus(tmp_path / "more", 60), allowed=AllowedIds(ROWS, are_labels=True)).check_ids()


def test_numbers_that_are_no_ids_are_refused_as_tokens(tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "rewards", 1, dtype="float32")
    config = make_config(padded_vocab_size=ROWS)
    with pytest.raises(DataError, match="rewards: holds numbers of type float32, but token ids are integers"):
        open_corpus(config, prefix)
    assert open_corpus(config, prefix, "numbers").get(0).dtype == np.float32


def test_a_large_corpus_is_looked_at_in_chunks_from_its_first_token_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", 10)
    monkeypatch.setattr(indexed, "_CHUNKS_CHECKED", 4)
    seen = []
    for place in (0, 9, 10, 129, 130, 139, 140, 259, 260, 269, 270, 389, 390, 399):
        found = IndexedDataset(corpus(tmp_path / "odd", 60, place=place), allowed=AllowedIds(ROWS))
        try:
            found.check_ids()
        except DataError:
            seen.append(place)
    assert seen == [0, 9, 130, 139, 260, 269, 390, 399]


def test_a_corpus_without_tokens_has_no_id(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "none", np.uint16):
        pass
    IndexedDataset(tmp_path / "none", allowed=AllowedIds(ROWS)).check_ids()


def test_a_batch_with_such_an_id_is_not_given_out(tmp_path: Path) -> None:
    config = make_config(data_path=corpus(tmp_path / "odd", 60, documents=20), padded_vocab_size=ROWS)
    batches = BatchLoader(build_datasets(config).train, micro_batch_size=3)
    with pytest.raises(DataError, match=r"odd: has token id 60, but the vocabulary of the model has 60 rows"):
        deque(islice(batches, 40))
