"""Blends, splits and weights against upstream's numbers."""

import re
from itertools import accumulate, pairwise, product

import numpy as np
import pytest
from data_pipeline.golden_files import read_json

from neox.data import blend_blocks
from neox.data.blending import (
    BlendedDataset,
    blend_order,
    interleaved_order,
    normalized_weights,
    share_sizes,
    split_boundaries,
    split_documents,
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
    blend = BlendedDataset([Numbers(corpus, 1) for corpus in range(len(case["weights"]))], order)
    places = list(zip(case["dataset_index"], case["sample_index"], strict=True))
    assert [blend.place(sample) for sample in range(len(blend))] == places


def step_by_step(weights: list[float], num_samples: int) -> list[int]:
    """The order of a blend as it is defined."""
    counts, order = [0] * len(weights), []
    for sample in range(num_samples):
        lags = [weight * float(max(sample, 1)) - count for weight, count in zip(weights, counts, strict=True)]
        order.append(lags.index(max(lags)))
        counts[order[-1]] += 1
    return order


BLENDS = {
    "one": [1],
    "two": [0.3, 0.7],
    "equal, so ties at every step": [1] * 22,
    "unlike": list(range(1, 23)),
    "none of the first": [0, 1, 1],
    "none of some": [1, 0, 2, 0, 3],
    "hardly any of some": [1, 1e-3, 1, 2e-5, 2, 1e-9],
    "far apart": [1 / n**2 for n in range(1, 60)],
    "eighths, exact in binary": [1, 2, 1, 4],
}


@pytest.mark.parametrize("block", [16, 256, 1024])
@pytest.mark.parametrize("weights", BLENDS.values(), ids=BLENDS)
def test_many_steps_at_a_time_are_the_steps_one_by_one(
    weights: list[float], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"BLOCK": block, "WARM_UP": block // 8, "FEWEST": 2, "REPAIRS": 2}.items():
        monkeypatch.setattr(blend_blocks, name, value)
    shares = normalized_weights(weights)
    assert blend_order(shares, 9001).tolist() == step_by_step(shares, 9001)


def test_random_blends_are_the_steps_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.RandomState(3)
    for _ in range(40):
        monkeypatch.setattr(blend_blocks, "BLOCK", int(rng.choice([8, 64, 512])))
        monkeypatch.setattr(blend_blocks, "WARM_UP", blend_blocks.BLOCK // 8)
        monkeypatch.setattr(blend_blocks, "FEWEST", int(rng.randint(1, 9)))
        shares = normalized_weights(rng.dirichlet(np.full(rng.randint(1, 12), rng.choice([0.05, 0.3, 5.0]))))
        size = int(rng.randint(1, 4000))
        assert blend_order(shares, size).tolist() == step_by_step(shares, size), shares


def test_hardly_a_step_of_a_long_blend_is_walked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    walked, walk = [], blend_blocks._walk

    def counted(weights_C: np.ndarray, counts_BC: np.ndarray, steps_B: np.ndarray, corpora_BL: np.ndarray) -> None:
        walked.append(corpora_BL.size)
        walk(weights_C, counts_BC, steps_B, corpora_BL)

    monkeypatch.setattr(blend_blocks, "_walk", counted)
    blend_order(normalized_weights(range(1, 23)), 400_000)
    assert sum(walked) < 1.2 * 400_000
    assert len(walked) < 10  # and they are many at a time


@pytest.mark.parametrize(("case", "bounds"), GOLDEN["splits"].items())
def test_splits_are_upstreams(case: str, bounds: list[int]) -> None:
    split, size = case.split("|")
    assert split_boundaries(split, int(size)) == bounds


def upstreams_boundaries(split: str, size: int) -> list[int]:
    """GPT-NeoX's rule, whose first boundaries may lie below 0."""
    shares = [float(share) for share in re.split(r"[,/]", split)]
    ends = list(accumulate(round(share / sum(shares) * size) for share in shares))
    return [0, *(end - (ends[-1] - size) for end in ends)]


def test_split_boundaries_are_upstreams_and_never_fall() -> None:
    repaired = 0
    for shares, size in product(product((0, 1, 2, 50), repeat=3), range(20)):
        if not any(shares):
            continue
        split = ",".join(map(str, shares))
        upstreams, bounds = upstreams_boundaries(split, size), split_boundaries(split, size)
        assert bounds == [max(0, bound) for bound in upstreams]
        assert (bounds[0], bounds[-1]) == (0, size)
        assert bounds == sorted(bounds)
        repaired += min(upstreams) < 0
        for share, documents, (start, stop) in zip(shares, split_documents(split, size), pairwise(bounds), strict=True):
            assert documents == (range(start, stop) if share else range(start, start))
    assert repaired > 10


@pytest.mark.parametrize(
    ("split", "size", "documents"),
    [
        ("0,50,50", 3, [[], [0], [1, 2]]),  # the halves of 3 are both rounded to 2
        ("0,1,1", 5, [[], [1, 2], [3, 4]]),  # the halves of 5 are both rounded to 2, and nobody asked for the one left
        ("1,1,1", 2, [[], [0], [1]]),
        ("969,30,1", 5, [[0, 1, 2, 3, 4], [], []]),
    ],
)
def test_documents_of_splits(split: str, size: int, documents: list[list[int]]) -> None:
    assert [list(found) for found in split_documents(split, size)] == documents


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


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,2,3,4", "-1,2", "nan,1", "inf,1"])
def test_bad_splits_are_refused(split: str) -> None:
    with pytest.raises(DataError, match="is not one to three shares"):
        split_boundaries(split, 10)


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [], [float("nan"), 1], [float("inf"), 1]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="must not be negative"):
        normalized_weights(weights)


def test_weights_of_datasets_without_documents_are_refused() -> None:
    with pytest.raises(DataError, match="none of the datasets has a document"):
        weights_by_num_documents([0, 0], 1.0)
