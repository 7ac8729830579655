"""Training on preferences: every objective learns, at every layout alike, and goes on as if nothing had happened."""

import math
from pathlib import Path
from typing import Any

import pytest
from training.preferences import MODEL, logged, pairs, rewarded, trained

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"model_parallel_size": 2},
    "tp2_sp": {"model_parallel_size": 2, "sequence_parallel": True},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
}
TRIED = {"dpo": tuple(LAYOUTS), "rm": ("tp2_sp", "zero3"), "kto": ("dp2", "tp2")}
OBJECTIVES = ("dpo", "rm", "kto")


def settings(folder: Path, objective: str) -> dict[str, Any]:
    """Keys of a small run with data of its own."""
    if objective == "kto":
        data = rewarded(folder, splits=("train", "valid", "test"))
    else:
        data = pairs(folder, for_rewards=objective == "rm", splits=("train", "valid"))
    # The difference of two rewards says nothing of their level; the penalty does.
    return MODEL | data | {"train_impl": objective} | ({"z_loss": 0.05} if objective == "rm" else {})


@pytest.fixture(scope="module", params=OBJECTIVES)
def one_process(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Objective, settings and figures of a run on one process, with a checkpoint on the way."""
    folder = tmp_path_factory.mktemp(request.param)
    flat = settings(folder, request.param) | {
        "save": str(folder / "one"),
        "extra_save_iters": [3],
        "eval_interval": 3,
        "eval_iters": 2,
    }
    return request.param, flat, trained(flat, 1)


def test_the_objective_is_learnt(one_process: tuple[str, dict[str, Any], list[dict[str, float]]]) -> None:
    objective, _, steps = one_process
    accuracy = "train/accuracy" if objective == "rm" else "train/reward_acc"
    losses = [step["train/lm_loss"] for step in steps]
    assert losses[-1] < 0.7 * losses[0]
    assert steps[-1][accuracy] >= 0.9 > steps[0][accuracy]
    assert steps[-1][f"validation/{accuracy.partition('/')[2]}"] >= 0.9
    assert steps[-1]["validation/lm_loss"] < losses[0]
    assert not [name for name in steps[-1] if name.endswith("ppl")]
    if objective == "dpo":
        # The model is its own reference yet: every ratio is 0.
        assert losses[0] == pytest.approx(math.log(2), abs=1e-7)
        assert steps[0]["train/margins"] == 0.0
    if objective == "kto":
        assert losses[0] == pytest.approx(0.5, abs=1e-7)


def test_a_layout_changes_nothing(
    tmp_path: Path, one_process: tuple[str, dict[str, Any], list[dict[str, float]]]
) -> None:
    objective, flat, expected = one_process
    for layout in TRIED[objective]:
        found = trained(flat | LAYOUTS[layout] | {"save": str(tmp_path / layout)}, 2)
        assert len(found) == len(expected)
        for step, wanted in zip(found, expected, strict=True):
            assert step.keys() == wanted.keys()
            assert step == {name: pytest.approx(value, rel=2e-4, abs=2e-5) for name, value in wanted.items()}, layout


def test_a_run_goes_on_with_the_same_reference(
    tmp_path: Path, one_process: tuple[str, dict[str, Any], list[dict[str, float]]]
) -> None:
    _, flat, expected = one_process
    resumed = flat | {"load": flat["save"], "iteration": 3, "save": str(tmp_path)}
    found = trained(resumed, 1)
    assert found == expected[3:]
    assert logged(tmp_path) == found


def test_every_figure_is_documented(one_process: tuple[str, dict[str, Any], list[dict[str, float]]]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = {name.partition("/")[2] for name in one_process[2][0]}
    assert not [name for name in names if f"`{name}`" not in page and f"`train/{name}`" not in page]


@pytest.mark.parametrize("in_fp32", [True, False])
def test_half_precision(tmp_path: Path, in_fp32: bool) -> None:
    flat = settings(tmp_path, "dpo") | {"precision": "bfloat16", "dpo_fp32": in_fp32}
    steps = trained(flat | {"save": str(tmp_path / "save"), "checkpoint_factor": 100}, 1)
    assert steps[0]["train/margins"] == 0.0
    assert steps[-1]["train/lm_loss"] < 0.6 < steps[0]["train/lm_loss"]
