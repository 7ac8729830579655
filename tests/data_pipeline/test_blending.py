"""Blends, splits and weights against upstream's numbers."""

import numpy as np
import pytest
from data_pipeline.golden_files import read_json

from neox.data.blending import (
    BlendedDataset,
    blend_order,
    interleaved_order,
    normalized_weights,
    positions_within,
    share_sizes,
    split_boundaries,
    weights_by_num_documents,
)
from neox.errors import DataError

GOLDEN = read_json("blend_split_weights.json")


class Numbers:
    """A dataset whose sample i is the number (which, i)."""

    def __init__(self, which: int, size: int) -> None:
        self.which, self.size = which, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        assert index < self.size
        return {"tokens": np.array([self.which, index])}


@pytest.mark.parametrize("case", GOLDEN["blending"].values(), ids=GOLDEN["blending"])
def test_blends_are_upstreams(case: dict) -> None:
    order = blend_order(case["weights"], len(case["dataset_index"]))
    assert order.tolist() == case["dataset_index"]
    assert positions_within(order).tolist() == case["sample_index"]


@pytest.mark.parametrize(("case", "bounds"), GOLDEN["splits"].items())
def test_splits_are_upstreams(case: str, bounds: list[int]) -> None:
    split, size = case.split("|")
    assert split_boundaries(split, int(size)) == bounds


@pytest.mark.parametrize(("alpha", "weights"), GOLDEN["weights_by_num_docs"].items())
def test_weights_by_document_count_are_upstreams(alpha: str, weights: list[float]) -> None:
    assert weights_by_num_documents([100, 2000, 30_000], float(alpha)) == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize(("samples", "case"), GOLDEN["normalized"].items())
def test_shares_are_upstreams(samples: str, case: list) -> None:
    weights = normalized_weights([1, 2, 5])
    assert weights == case[0]
    assert share_sizes(weights, int(samples)) == case[1]


def test_a_short_corpus_starts_again() -> None:
    blend = BlendedDataset([Numbers(0, 2), Numbers(1, 100)], blend_order([0.5, 0.5], 20))
    rows = [blend[i]["tokens"].tolist() for i in range(20)]
    assert [row for row in rows if row[0] == 0][:5] == [[0, 0], [0, 1], [0, 0], [0, 1], [0, 0]]
    assert [row for row in rows if row[0] == 1] == [[1, i] for i in range(10)]
    with pytest.raises(IndexError):
        blend[20]


def test_interleaving_takes_each_sample_once_and_spreads_them() -> None:
    order = interleaved_order([30, 10, 3])
    assert np.bincount(order).tolist() == [30, 10, 3]
    assert 6 <= np.count_nonzero(order[:20] == 1) + np.count_nonzero(order[:20] == 2) <= 7


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,2,3,4", "-1,2"])
def test_bad_splits_are_refused(split: str) -> None:
    with pytest.raises(DataError, match="is not one to three shares"):
        split_boundaries(split, 10)


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], []])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="must not be negative"):
        normalized_weights(weights)
