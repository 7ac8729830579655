"""Tokens that do not count, unevenly spread, change nothing between layouts."""

from typing import Any

import numpy as np
import pytest
from corpus import documents
from training.layouts import MODEL, SGD, TRAINING, curve_of

from neox.data import IndexedDatasetWriter

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp2_zero2_accumulation2": (2, {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2}),
    "accumulation8": (1, {"gradient_accumulation_steps": 8}),
    "pp2_dp2": (4, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}),
    "tp2": (2, {"model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Documents whose labels are masked from nowhere to everywhere."""
    folder = tmp_path_factory.mktemp("masked")
    random = np.random.RandomState(7)
    text = "".join(documents()).encode("ascii")
    with (
        IndexedDatasetWriter(folder / "tokens", np.int32) as tokens,
        IndexedDatasetWriter(folder / "labels", np.int32) as labels,
    ):
        for start in range(0, 60000, 500):
            ids = np.frombuffer(text[start : start + 500], dtype=np.uint8).astype(np.int32)
            keep = random.rand(len(ids)) < random.choice([0.0, 0.02, 0.5, 1.0])
            tokens.add_document(ids)
            labels.add_document(np.where(keep, ids, -100))
    paths = {"train_data_paths": [str(folder / "tokens")], "train_label_data_paths": [str(folder / "labels")]}
    others = {f"{split}_data_paths": [str(folder / "tokens")] for split in ("valid", "test")}
    return paths | others | {f"{split}_label_data_paths": [str(folder / "labels")] for split in ("valid", "test")}


def settings(masked: dict[str, Any]) -> dict[str, Any]:
    return MODEL | TRAINING | SGD | masked | {"train_iters": 6}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uneven_masks_give_the_same_result(masked: dict[str, Any], layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    expected = curve_of(settings(masked), 1)
    found = curve_of(settings(masked) | changes, world_size)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=2e-5)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-5)


def test_masks_matter(masked: dict[str, Any]) -> None:
    unmasked = {key: value for key, value in settings(masked).items() if "label" not in key}
    assert abs(curve_of(unmasked, 1).losses[0] - curve_of(settings(masked), 1).losses[0]) > 1e-3
