"""Documents that are scored whole, and what a reference model thinks of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference.small_model import small_model

from neox.data import IndexedDataset, IndexedDatasetWriter
from neox.data.completions import ScoredDocuments
from neox.errors import DataError
from neox.inference.precompute import document_scores


def written(prefix: Path, rows: list[Any], dtype: type) -> IndexedDataset:
    with IndexedDatasetWriter(str(prefix), dtype) as writer:
        for row in rows:
            writer.add_document(np.array(row, dtype))
    return IndexedDataset(prefix)


def test_a_reference_of_shorter_sequences_is_no_reference(tmp_path: Path) -> None:
    """What it has not read is no certainty: a run of longer sequences would train on a ratio to nothing."""
    model = small_model()
    length = model.config.seq_length
    long, short = [np.arange(size, dtype=np.int64) % 50 + 1 for size in (length + 4, 5)]
    scores = document_scores(model, [long, short])
    assert [int(np.isnan(row).sum()) for row in scores] == [4, 0]
    alone = document_scores(model, [long[: length + 1]])[0]
    assert np.allclose(scores[0][:length], alone[:length], atol=1e-6)
    assert torch.equal(torch.tensor(scores[1][-1]), torch.tensor(0.0))

    tokens = written(tmp_path / "tokens", [long, short], np.int32)
    masked = [np.where(np.arange(len(row)) < len(row) - 2, -100, row) for row in (long, short)]
    reference = written(tmp_path / "reference", scores, np.float32)
    documents = ScoredDocuments(tokens, written(tmp_path / "labels", masked, np.int32), reference=reference)
    with pytest.raises(
        DataError, match="has nothing on the end of document 0, for it was made with a smaller seq_length"
    ):
        documents.row(0, length + 4)
    assert np.isfinite(documents.row(0, length + 1)["reference"]).all()  # nothing is scored where it ends
    assert np.array_equal(documents.row(1, 8)["reference"][:5], scores[1])
